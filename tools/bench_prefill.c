/* `claas bench prefill`: from sending prompts, of which nothing is cached, to the first token of
 * the last of them.
 *
 * Counted work, in FLOP, N weights of the layers, H of the head, for each prompt of n tokens: 2 N n
 * + 2 H + attention(n): the head is computed for the last token alone.
 *
 * Counted reading: the weights of the layers once in each pass, the head's once in all. */
#include "bench.h"

#include <stdlib.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#define WARM_UP 1

struct prompts {
    int count, length;
    int32_t **tokens; /* [count] */
};

static void free_prompts(struct prompts *prompts)
{
    for (int i = 0; prompts->tokens != NULL && i < prompts->count; i++)
        free(prompts->tokens[i]);
    free(prompts->tokens);
}

static int make_prompts(struct bench_rig *rig, uint64_t stream, struct prompts *ret)
{
    ret->tokens = CLAAS_NEW_ARRAY(int32_t *, (size_t)ret->count);
    if (ret->tokens == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < ret->count; i++) {
        ret->tokens[i] = bench_tokens(rig, stream + (uint64_t)i, (size_t)ret->length);
        if (ret->tokens[i] == NULL)
            return CLAAS_ERR_NO_MEMORY;
    }
    return 0;
}

static int measure(struct bench_rig *rig, const struct prompts *prompts, double *ret_ms)
{
    struct claas_generate_request request = {
        .prompt_count = (size_t)prompts->length,
        .max_tokens = 1,
        .top_p = 1,
        .priority = CLAAS_PRIORITY_CHAT,
    };
    int64_t start = claas_clock_ns();
    uint64_t id;
    int rc = 0;

    for (int i = 0; rc == 0 && i < prompts->count; i++) {
        request.prompt = prompts->tokens[i];
        rc = claas_device_generate(rig->client, &request, &id);
    }
    for (int ended = 0; rc == 0 && ended < prompts->count;) {
        struct claas_device_event event;

        rc = bench_wait(rig, &event);
        if (rc < 0)
            break;
        if (event.kind == CLAAS_EVENT_TOKEN)
            *ret_ms = (double)(event.made - start) * 1e-6;
        ended += event.kind == CLAAS_EVENT_FINISHED;
    }
    return rc;
}

static int run_length(struct bench_rig *rig, const struct bench_args *args, int length,
                      const struct claas_device_floor *floor)
{
    CLAAS_AUTO_FREE double *times = CLAAS_NEW_ARRAY(double, (size_t)args->iterations);
    double median, ignored, count = args->batch[0];
    struct claas_device_stats before, after;
    struct bench_work work;
    cJSON *line;

    if (times == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = -WARM_UP; i < args->iterations; i++) {
        CLAAS_AUTO(free_prompts)
        struct prompts prompts = {.count = args->batch[0], .length = length};
        uint64_t stream = (uint64_t)length << 32 | (uint64_t)((i + WARM_UP) * args->batch[0]);
        int rc = make_prompts(rig, stream, &prompts);

        if (i == 0)
            claas_device_stats(rig->device, &before);
        if (rc == 0)
            rc = measure(rig, &prompts, i < 0 ? &ignored : &times[i]);
        if (rc < 0)
            return rc;
    }
    claas_device_stats(rig->device, &after);
    median = bench_median(times, args->iterations);
    work = (struct bench_work){
        .flop = count * (2 * rig->body * length + 2 * rig->head +
                         bench_attention_flop(rig->config, length)),
        .bytes = rig->body_bytes * (double)(after.passes - before.passes) / args->iterations +
                 rig->head_bytes,
        .ms = median,
    };
    line = bench_line(rig, "prefill");
    claas_json_set_int(line, "batch", args->batch[0]);
    claas_json_set_int(line, "prompt", length);
    claas_json_set_number(line, "median_ms", median);
    claas_json_set_number(line, "min_ms", times[0]);
    claas_json_set_number(line, "tok_s", count * length / median * 1e3);
    bench_add_rates(line, &work, floor);
    bench_add_memory(line, rig);
    return bench_print(args, line);
}

int bench_prefill(const struct bench_args *args)
{
    CLAAS_AUTO(bench_close) struct bench_rig rig = {0};
    struct claas_device_floor floor;
    int longest = 0, rc;

    for (int i = 0; i < args->prompt_count; i++)
        longest = args->prompt[i] > longest ? args->prompt[i] : longest;
    rc = bench_floor(args, &floor);
    if (rc == 0)
        rc = bench_open(&rig, args, (size_t)args->batch[0] * ((size_t)longest + 16));
    for (int i = 0; rc == 0 && i < args->prompt_count; i++)
        rc = run_length(&rig, args, args->prompt[i], &floor);
    return rc;
}
