/* What the parts of `claas bench` share: a device on a model, random tokens, medians, and the
 * machine's own limits, measured in the same run so that every figure can be read as a share of
 * what is possible. */
#ifndef CLAAS_TOOLS_BENCH_H
#define CLAAS_TOOLS_BENCH_H

#include <argp.h>

#include "claas/device.h"
#include "claas/json.h"

#define BENCH_LIST_MAX 16

/* Options of all benchmarks; each uses its own. */
struct bench_args {
    const char *model, *device, *precision;
    int threads;
    int batch[BENCH_LIST_MAX], batch_count;
    int prompt[BENCH_LIST_MAX], prompt_count;
    int response, hint, rank, tokens, adapters, rows, steps, iterations;
    double alpha;
    bool json;
};

struct bench_rig {
    claas_model_t *model;
    claas_device_t *device;
    claas_device_client_t *client;
    const struct claas_model_config *config;
    char name[64];        /* the model's */
    double weight_bytes;  /* as the file encodes them, each once: what a decoding pass must read */
    double body, head;    /* weights of all layers; of the head */
    double lora_per_rank; /* adapter parameters per unit of rank, all modules */
};

/* What --model means: a bare name of a known shape is random weights of that shape. Free with
 * free(); NULL when out of memory. */
char *bench_model_path(const char *model);
int bench_open(struct bench_rig *rig, const struct bench_args *args, size_t kv_tokens);
void bench_close(struct bench_rig *rig);
/* The next event, with FAILED turned into its error. */
int bench_wait(struct bench_rig *rig, struct claas_device_event *ret);
/* `count` tokens that no other (stream, position) shares. NULL when out of memory. */
int32_t *bench_tokens(const struct bench_rig *rig, uint64_t stream, size_t count);
/* A new adapter, r = rank, all modules. */
int bench_adapter(struct bench_rig *rig, int rank, claas_adapter_t **ret);
double bench_median(double *values, int count); /* sorts */
uint64_t bench_peak_bytes(void);                /* of the process */

/* The device's name, the peak memory and the fields every line has. */
cJSON *bench_line(struct bench_rig *rig, const char *what);
/* One line of JSON, or a row of a table: the heads are printed before the first row. */
int bench_print(const struct bench_args *args, cJSON *line);

/* --- bench_floor.c
 * --------------------------------------------------------------------------------------------------
 */

/* FLOP per second of the best matrix product that the operation table makes here, of sizes that
 * training has. */
int bench_gemm_peak(const struct bench_args *args, double *ret);
/* Bytes per second of reading memory with all threads. */
int bench_read_peak(const struct bench_args *args, double *ret);

/* --- the benchmarks
 * ---------------------------------------------------------------------------------------------------
 */

int bench_step(const struct bench_args *args);
int bench_decode(const struct bench_args *args);
int bench_prefill(const struct bench_args *args);
int bench_cycle(const struct bench_args *args);

#endif
