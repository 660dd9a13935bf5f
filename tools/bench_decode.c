/* `claas bench decode`: tokens per second while N sequences decode together: from when the last of
 * them has begun until the first of them ends, so that neither prefill nor a thinning batch counts.
 * Each sequence gets one token a pass, so the tokens of one of them count whole passes; their times
 * are those of the passes' ends, not those at which this thread hears of them.
 *
 * Counted reading: all weights once in each pass. */
#include "bench.h"

#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"

struct decode_run {
    int batch;
    uint64_t *ids;
    int *counts;    /* tokens of each */
    int64_t *times; /* ns: of the first one's tokens while all decode */
};
/* Of a round. */
struct decode_rate {
    double tok_s, gap_ms; /* all sequences' tokens; the median time from pass to pass */
};

static void free_run(struct decode_run *run)
{
    free(run->ids);
    free(run->counts);
    free(run->times);
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

/* Fills run->times. Returns how many, or an error. */
static int time_tokens(struct bench_rig *rig, struct decode_run *run)
{
    int begun = 0, ended = 0, timed = 0;

    while (ended < run->batch) {
        struct claas_device_event event;
        int rc = bench_wait(rig, &event), i;

        if (rc < 0)
            return rc;
        i = find(run, event.id);
        if (i < 0)
            continue;
        if (event.kind != CLAAS_EVENT_TOKEN) {
            ended++;
            continue;
        }
        begun += ++run->counts[i] == 1;
        if (i == 0 && begun == run->batch && ended == 0)
            run->times[timed++] = event.made;
    }
    return timed;
}

static int measure(struct bench_rig *rig, struct decode_run *run, struct decode_rate *ret)
{
    int timed = time_tokens(rig, run), passes = timed - 1;
    CLAAS_AUTO_FREE double *gaps = NULL;

    if (timed < 0)
        return timed;
    if (passes < 1)
        return claas_fail(CLAAS_ERR_INVALID,
                          "the first sequence ended before the last began: ask for more tokens");
    gaps = CLAAS_NEW_ARRAY(double, (size_t)passes);
    if (gaps == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < passes; i++)
        gaps[i] = (double)(run->times[i + 1] - run->times[i]) * 1e-6;
    ret->tok_s = run->batch * passes / ((double)(run->times[passes] - run->times[0]) * 1e-9);
    ret->gap_ms = bench_median(gaps, passes);
    return 0;
}

static cJSON *describe(struct bench_rig *rig, const struct bench_args *args, int batch,
                       const struct decode_rate *measured, const struct claas_device_floor *floor)
{
    double rate = measured->tok_s;
    double lora = args->adapters > 0 ? rig->lora_per_rank * args->rank : 0;
    struct bench_work second = {
        .flop = 2 * (rig->body + rig->head + lora) * rate,
        .bytes = (rig->body_bytes + rig->head_bytes) * rate / batch,
        .ms = 1e3,
    };
    cJSON *line = bench_line(rig, "decode");

    claas_json_set_int(line, "batch", batch);
    claas_json_set_int(line, "prompt", args->prompt[0]);
    claas_json_set_int(line, "tokens", args->tokens);
    claas_json_set_int(line, "adapters", args->adapters < batch ? args->adapters : batch);
    claas_json_set_int(line, "rank", args->adapters > 0 ? args->rank : 0);
    claas_json_set_number(line, "tok_s", rate);
    claas_json_set_number(line, "ms_per_token", batch / rate * 1e3);
    claas_json_set_number(line, "median_gap_ms", measured->gap_ms);
    bench_add_rates(line, &second, floor);
    bench_add_memory(line, rig);
    return line;
}

static int run_batch(struct bench_rig *rig, const struct bench_args *args, int batch,
                     claas_adapter_t **adapters, const struct claas_device_floor *floor)
{
    CLAAS_AUTO(free_run) struct decode_run run = {.batch = batch};
    size_t rounds = (size_t)args->iterations;
    CLAAS_AUTO_FREE double *rates = CLAAS_NEW_ARRAY(double, rounds);
    CLAAS_AUTO_FREE double *gaps = CLAAS_NEW_ARRAY(double, rounds);
    struct decode_rate rate = {0};

    run.ids = CLAAS_NEW_ARRAY(uint64_t, (size_t)batch);
    run.counts = CLAAS_NEW_ARRAY(int, (size_t)batch);
    run.times = CLAAS_NEW_ARRAY(int64_t, (size_t)args->tokens);
    if (run.ids == NULL || run.counts == NULL || run.times == NULL || rates == NULL || gaps == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < args->iterations; i++) {
        int rc = submit(rig, args, &run, adapters, (batch * 1000 + i) * 1024);

        if (rc == 0)
            rc = measure(rig, &run, &rate);
        if (rc < 0)
            return rc;
        rates[i] = rate.tok_s;
        gaps[i] = rate.gap_ms;
    }
    rate = (struct decode_rate){bench_median(rates, args->iterations),
                                bench_median(gaps, args->iterations)};
    return bench_print(args, describe(rig, args, batch, &rate, floor));
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
