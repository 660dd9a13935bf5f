/* `claas bench step`: optimizer steps on random rows whose prompts and responses have nothing in
 * common, so that nothing can be computed once for two rows.
 *
 * Counted work, in FLOP, N weights of the layers, H of the head, A of the adapter, tokens s of the
 * student and t of the teacher, p scored positions: forward and the gradient of the inputs (the
 * weights are frozen) for the student, forward for the teacher, the same for the head on scored
 * positions, the adapter's forward, input gradient and own gradient, and causal attention, whose
 * backward has 2.5 times the products of its forward: 4 N s + 2 N t + 6 H p + 6 A s + attention(s)
 * (1 + 2.5) + attention(t)
 *
 * Counted reading: the weights, three times: forward for the teacher and for the student, and
 * backward. Several micro-batches read them as often, which is not counted. */
#include "bench.h"

#include <stdlib.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#define WARM_UP 2

struct step_rows {
    int count;
    struct claas_train_row *rows;
    int32_t **owned; /* [3 * count] */
};

static void free_rows(struct step_rows *rows)
{
    for (int i = 0; rows->owned != NULL && i < 3 * rows->count; i++)
        free(rows->owned[i]);
    free(rows->owned);
    free(rows->rows);
}

/* The rows take turns with the adapters. */
static int make_rows(const struct bench_rig *rig, const struct bench_args *args,
                     claas_adapter_t **adapters, struct step_rows *ret)
{
    ret->count = args->batch[0];
    ret->rows = CLAAS_NEW_ARRAY(struct claas_train_row, (size_t)ret->count);
    ret->owned = CLAAS_NEW_ARRAY(int32_t *, 3 * (size_t)ret->count);
    if (ret->rows == NULL || ret->owned == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < ret->count; i++) {
        size_t counts[3] = {(size_t)args->prompt[0], (size_t)(args->prompt[0] + args->hint),
                            (size_t)args->response};
        int32_t **tokens = &ret->owned[3 * i];

        for (int j = 0; j < 3; j++) {
            tokens[j] = bench_tokens(rig, (uint64_t)(3 * i + j), counts[j]);
            if (tokens[j] == NULL)
                return CLAAS_ERR_NO_MEMORY;
        }
        ret->rows[i] = (struct claas_train_row){
            .student_prompt = tokens[0],
            .student_count = counts[0],
            .teacher_prompt = tokens[1],
            .teacher_count = counts[1],
            .response = tokens[2],
            .response_count = counts[2],
            .student = adapters[i % args->adapters],
        };
    }
    return 0;
}

static double count_flop(const struct bench_rig *rig, const struct bench_args *args)
{
    double rows = args->batch[0], response = args->response;
    double student = args->prompt[0] + response, teacher = student + args->hint;

    return rows * (4 * rig->body * student + 2 * rig->body * teacher + 6 * rig->head * response +
                   6 * rig->lora_per_rank * args->rank * student +
                   3.5 * bench_attention_flop(rig->config, student) +
                   bench_attention_flop(rig->config, teacher));
}

static int run_steps(struct bench_rig *rig, const struct bench_args *args,
                     const struct step_rows *rows, double *times, float *loss)
{
    struct claas_train_request request = {
        .rows = rows->rows,
        .row_count = (size_t)rows->count,
        .loss = {.variant = CLAAS_LOSS_FULL, .alpha = (float)args->alpha},
        .adamw = {.rate = 1e-4f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1},
        .update = true,
    };

    for (int i = -WARM_UP; i < args->iterations; i++) {
        int64_t start = claas_clock_ns();
        struct claas_device_event event;
        uint64_t id;
        int rc = claas_device_train(rig->client, &request, &id);

        if (rc == 0)
            rc = bench_wait(rig, &event);
        if (rc < 0)
            return rc;
        if (i >= 0)
            times[i] = (double)(claas_clock_ns() - start) * 1e-6;
        *loss = event.trained.loss;
        claas_device_event_done(&event);
    }
    return 0;
}

static cJSON *describe(struct bench_rig *rig, const struct bench_args *args, double *times,
                       double median, float loss)
{
    cJSON *line = bench_line(rig, "step");

    claas_json_set_int(line, "batch", args->batch[0]);
    claas_json_set_int(line, "prompt", args->prompt[0]);
    claas_json_set_int(line, "response", args->response);
    claas_json_set_int(line, "hint", args->hint);
    claas_json_set_int(line, "rank", args->rank);
    claas_json_set_int(line, "adapters", args->adapters);
    claas_json_set_number(line, "median_ms", median);
    claas_json_set_number(line, "min_ms", times[0]);
    bench_add_memory(line, rig);
    claas_json_set_number(line, "student_tok_s",
                          args->batch[0] * (args->prompt[0] + args->response) / median * 1e3);
    claas_json_set_number(line, "gflop", count_flop(rig, args) * 1e-9);
    claas_json_set_number(line, "loss", (double)loss);
    return line;
}

/* The line but for what the machine could do, which is measured when the rig has given its memory
 * back. */
static int measure(const struct bench_args *args, struct bench_work *ret_work, cJSON **ret)
{
    CLAAS_AUTO(bench_close) struct bench_rig rig = {0};
    CLAAS_AUTO(free_rows) struct step_rows rows = {0};
    CLAAS_AUTO_FREE double *times = CLAAS_NEW_ARRAY(double, (size_t)args->iterations);
    claas_adapter_t **adapters = NULL;
    float loss = 0;
    int rc = bench_open(&rig, args, 16);

    if (rc == 0 && times == NULL)
        rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc == 0)
        rc = bench_adapters(&rig, args->adapters, args->rank, CLAAS_ADAPTER_TRAIN, &adapters);
    if (rc == 0)
        rc = make_rows(&rig, args, adapters, &rows);
    if (rc == 0)
        rc = run_steps(&rig, args, &rows, times, &loss);
    if (rc == 0) {
        *ret_work = (struct bench_work){
            .flop = count_flop(&rig, args),
            .bytes = 3 * (rig.body_bytes + rig.head_bytes),
            .ms = bench_median(times, args->iterations),
        };
        *ret = describe(&rig, args, times, ret_work->ms, loss);
    }
    bench_adapters_free(&adapters, args->adapters);
    return rc;
}

int bench_step(const struct bench_args *args)
{
    CLAAS_AUTO(claas_json_free) cJSON *line = NULL;
    struct claas_device_floor floor;
    struct bench_work work;
    int rc;

    if (args->adapters < 1 || args->adapters > args->batch[0])
        return claas_fail(CLAAS_ERR_INVALID, "--adapters %d: from 1 to the rows of --batch, %d",
                          args->adapters, args->batch[0]);
    rc = measure(args, &work, &line);
    if (rc == 0)
        rc = bench_floor(args, &floor);
    if (rc < 0)
        return rc;
    bench_add_rates(line, &work, &floor);
    return bench_print(args, CLAAS_TAKE(line));
}
