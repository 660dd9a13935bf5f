/* `claas bench decode`: tokens per second while N sequences decode together. Measured between the
 * moment when the last of them has its first token and the moment when the first of them ends, so
 * neither prefill nor a thinning batch counts. */
#include "bench.h"

#include <stdlib.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

struct decode_run {
    int batch;
    uint64_t *ids;
    int *counts;
};

static void free_run(struct decode_run *run)
{
    free(run->ids);
    free(run->counts);
}

static int submit(struct bench_rig *rig, const struct bench_args *args, struct decode_run *run,
                  claas_adapter_t **adapters, int stream)
{
    for (int i = 0; i < run->batch; i++) {
        CLAAS_AUTO_FREE int32_t *prompt =
            bench_tokens(rig, (uint64_t)(stream + i), (size_t)args->prompt[0]);
        struct claas_generate_request request = {
            .prompt = prompt,
            .prompt_count = (size_t)args->prompt[0],
            .adapter = args->adapters > 0 ? adapters[i % args->adapters] : NULL,
            .max_tokens = args->tokens,
            .temperature = 1,
            .top_p = 1,
            .seed = (uint64_t)i,
            .priority = CLAAS_PRIORITY_ROLLOUT,
        };
        int rc;

        if (prompt == NULL)
            return CLAAS_ERR_NO_MEMORY;
        rc = claas_device_generate(rig->client, &request, &run->ids[i]);
        if (rc < 0)
            return rc;
        run->counts[i] = 0;
    }
    return 0;
}

static int find(const struct decode_run *run, uint64_t id)
{
    for (int i = 0; i < run->batch; i++)
        if (run->ids[i] == id)
            return i;
    return -1;
}

/* Tokens per second of one round. */
static int measure(struct bench_rig *rig, struct decode_run *run, double *ret)
{
    int begun = 0, ended = 0, tokens = 0;
    int64_t start = 0;

    *ret = 0;
    while (ended < run->batch) {
        struct claas_device_event event;
        int rc = bench_wait(rig, &event), i;

        if (rc < 0)
            return rc;
        i = find(run, event.id);
        if (i < 0)
            continue;
        if (event.kind == CLAAS_EVENT_TOKEN) {
            tokens += begun == run->batch && ended == 0;
            if (++run->counts[i] == 1 && ++begun == run->batch)
                start = claas_clock_ns();
            continue;
        }
        if (ended++ == 0 && begun == run->batch)
            *ret = tokens / ((double)(claas_clock_ns() - start) * 1e-9);
    }
    if (!(*ret > 0))
        return claas_fail(CLAAS_ERR_INVALID,
                          "the first sequence ended before the last began: ask for more tokens");
    return 0;
}

static cJSON *describe(struct bench_rig *rig, const struct bench_args *args, int batch, double rate,
                       const struct claas_device_floor *floor)
{
    double lora = args->adapters > 0 ? rig->lora_per_rank * args->rank : 0;
    double read = rig->weight_bytes * rate / batch;
    cJSON *line = bench_line(rig, "decode");

    claas_json_set_int(line, "batch", batch);
    claas_json_set_int(line, "prompt", args->prompt[0]);
    claas_json_set_int(line, "tokens", args->tokens);
    claas_json_set_int(line, "adapters", args->adapters);
    claas_json_set_int(line, "rank", args->adapters > 0 ? args->rank : 0);
    claas_json_set_number(line, "tok_s", rate);
    claas_json_set_number(line, "ms_per_token", batch / rate * 1e3);
    claas_json_set_number(line, "read_gb_s", read * 1e-9);
    claas_json_set_number(line, "share_of_bandwidth", read / floor->memory_bytes_s);
    bench_add_rates(line, 2 * (rig->body + rig->head + lora) * rate, 1e3, floor);
    bench_add_memory(line, rig);
    return line;
}

static int run_batch(struct bench_rig *rig, const struct bench_args *args, int batch,
                     claas_adapter_t **adapters, const struct claas_device_floor *floor)
{
    CLAAS_AUTO(free_run) struct decode_run run = {.batch = batch};
    CLAAS_AUTO_FREE double *rates = CLAAS_NEW_ARRAY(double, (size_t)args->iterations);

    run.ids = CLAAS_NEW_ARRAY(uint64_t, (size_t)batch);
    run.counts = CLAAS_NEW_ARRAY(int, (size_t)batch);
    if (run.ids == NULL || run.counts == NULL || rates == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < args->iterations; i++) {
        int rc = submit(rig, args, &run, adapters, (batch * 1000 + i) * 1024);

        if (rc == 0)
            rc = measure(rig, &run, &rates[i]);
        if (rc < 0)
            return rc;
    }
    return bench_print(args,
                       describe(rig, args, batch, bench_median(rates, args->iterations), floor));
}

/* The adapters are as trained ones are laid out for serving; B is zero, which costs the same. */
int bench_decode(const struct bench_args *args)
{
    CLAAS_AUTO(bench_close) struct bench_rig rig = {0};
    claas_adapter_t **adapters = NULL;
    size_t longest = (size_t)(args->prompt[0] + args->tokens + 16);
    struct claas_device_floor floor;
    int most = 1, rc;

    for (int i = 0; i < args->batch_count; i++)
        most = args->batch[i] > most ? args->batch[i] : most;
    rc = bench_floor(args, &floor);
    if (rc == 0)
        rc = bench_open(&rig, args, (size_t)most * longest);
    if (rc == 0)
        rc = bench_adapters(&rig, args->adapters, args->rank, CLAAS_ADAPTER_SERVE, &adapters);
    for (int i = 0; rc == 0 && i < args->batch_count; i++)
        rc = run_batch(&rig, args, args->batch[i], adapters, &floor);
    bench_adapters_free(&adapters, args->adapters);
    return rc;
}
