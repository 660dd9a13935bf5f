/* `claas bench prefill`: from sending a prompt that nothing is cached of to its first token. */
#include "bench.h"

#include <stdlib.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#define WARM_UP 1

static int measure(struct bench_rig *rig, int count, uint64_t stream, double *ret_ms)
{
    CLAAS_AUTO_FREE int32_t *prompt = bench_tokens(rig, stream, (size_t)count);
    struct claas_generate_request request = {
        .prompt = prompt,
        .prompt_count = (size_t)count,
        .max_tokens = 1,
        .top_p = 1,
        .priority = CLAAS_PRIORITY_CHAT,
    };
    struct claas_device_event event = {0};
    int64_t start = claas_clock_ns();
    uint64_t id;
    int rc;

    if (prompt == NULL)
        return CLAAS_ERR_NO_MEMORY;
    rc = claas_device_generate(rig->client, &request, &id);
    while (rc == 0 && event.kind != CLAAS_EVENT_FINISHED) {
        rc = bench_wait(rig, &event);
        if (rc == 0 && event.kind == CLAAS_EVENT_TOKEN)
            *ret_ms = (double)(claas_clock_ns() - start) * 1e-6;
    }
    return rc;
}

static int run_prompt(struct bench_rig *rig, const struct bench_args *args, int count, double peak)
{
    CLAAS_AUTO_FREE double *times = CLAAS_NEW_ARRAY(double, (size_t)args->iterations);
    double median, ignored, flop;
    cJSON *line;

    if (times == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = -WARM_UP; i < args->iterations; i++) {
        int rc = measure(rig, count, (uint64_t)(count * 1000 + i + WARM_UP),
                         i < 0 ? &ignored : &times[i]);

        if (rc < 0)
            return rc;
    }
    median = bench_median(times, args->iterations);
    flop = 2 * rig->body * count + 2 * rig->head;
    line = bench_line(rig, "prefill");
    claas_json_set_int(line, "prompt", count);
    claas_json_set_number(line, "median_ms", median);
    claas_json_set_number(line, "min_ms", times[0]);
    claas_json_set_number(line, "tok_s", count / median * 1e3);
    claas_json_set_number(line, "gflop_s", flop / median * 1e-6);
    claas_json_set_number(line, "gemm_peak_gflop_s", peak * 1e-9);
    claas_json_set_number(line, "share_of_peak", flop / median * 1e3 / peak);
    claas_json_set_int(line, "peak_bytes", (int64_t)bench_peak_bytes());
    return bench_print(args, line);
}

int bench_prefill(const struct bench_args *args)
{
    CLAAS_AUTO(bench_close) struct bench_rig rig = {0};
    double peak = 0;
    int longest = 0, rc;

    for (int i = 0; i < args->prompt_count; i++)
        longest = args->prompt[i] > longest ? args->prompt[i] : longest;
    rc = bench_gemm_peak(args, &peak);
    if (rc == 0)
        rc = bench_open(&rig, args, (size_t)longest + 16);
    for (int i = 0; rc == 0 && i < args->prompt_count; i++)
        rc = run_prompt(&rig, args, args->prompt[i], peak);
    return rc;
}
