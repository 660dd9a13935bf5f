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
    const char *model, *device, *precision, *chat_template;
    int threads;
    int batch[BENCH_LIST_MAX], batch_count;
    int prompt[BENCH_LIST_MAX], prompt_count;
    int response, hint, rank, tokens, chunk, adapters, rows, steps, iterations;
    double alpha;
    bool json;
};

struct bench_rig {
    claas_model_t *model;
    claas_device_t *device;
    claas_device_client_t *client;
    const struct claas_model_config *config;
    char name[64];                 /* the model's */
    double body, head;             /* weights of all layers; of the head */
    double body_bytes, head_bytes; /* as the file encodes them: what a pass must read once */
    double lora_per_rank;          /* adapter parameters per unit of rank, all modules */
};

/* The path that --model stands for: the bare name of a known shape means random weights of it. Free
 * with free(); NULL when out of memory. */
char *bench_model_path(const char *model);
/* The error of opening it: a name that is neither a file's nor a shape's was not understood. */
int bench_fail_model(int rc, const char *model);
int bench_open(struct bench_rig *rig, const struct bench_args *args, size_t kv_tokens);
void bench_close(struct bench_rig *rig);
/* Fills in what follows from rig->model and rig->config; bench_open has done so. */
void bench_measure_model(struct bench_rig *rig);
/* The next event, with FAILED turned into its error. */
int bench_wait(struct bench_rig *rig, struct claas_device_event *ret);
/* `count` tokens that no other (stream, position) shares. NULL when out of memory. */
int32_t *bench_tokens(const struct bench_rig *rig, uint64_t stream, size_t count);
/* Adapters of their own for measuring with many: r = rank, all modules, each with another seed.
 * Fails whole or not at all; free with bench_adapters_free, which takes NULL. */
int bench_adapters(struct bench_rig *rig, int count, int rank, enum claas_adapter_use use,
                   claas_adapter_t ***ret);
void bench_adapters_free(claas_adapter_t ***adapters, int count);
double bench_median(double *values, int count); /* sorts */

/* The fields that every line has: what, model, device. */
cJSON *bench_line(struct bench_rig *rig, const char *what);
/* Peak memory and the memory map, both by the device's own count, so that
 * they leave out what measuring takes (bench_floor). */
void bench_add_memory(cJSON *line, struct bench_rig *rig);
/* One line of JSON, or a row of a table: the heads are printed before the first row. */
int bench_print(const struct bench_args *args, cJSON *line);

/* What the device of --device could do at best. It needs memory of its own: call it while no rig is
 * open. */
int bench_floor(const struct bench_args *args, struct claas_device_floor *ret);
/* FLOP of causal attention over so many tokens, forward: scores and weighted sums over all earlier
 * positions, 4 d per head, query and key. */
double bench_attention_flop(const struct claas_model_config *config, double tokens);
/* The least work that was done in `ms` milliseconds: products, and weights read, once in each pass
 * over them. Activations, keys and values and adapters are not counted as read. */
struct bench_work {
    double flop, bytes, ms;
};
/* As rates, and as shares of what the machine could do. A model so small that it stays in a cache
 * may be read faster than memory: a share of the bandwidth above 1. */
void bench_add_rates(cJSON *line, const struct bench_work *work,
                     const struct claas_device_floor *floor);

/* --- the benchmarks --------------------------------------------------------------------------- */

int bench_step(const struct bench_args *args);
int bench_decode(const struct bench_args *args);
int bench_prefill(const struct bench_args *args);
int bench_cycle(const struct bench_args *args);

#endif
