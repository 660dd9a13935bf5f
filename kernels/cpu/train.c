/* One training step, or the same figures without an update:
 *
 *   teacher's rows   forward, final hidden rows of the trained positions kept; or copied, where an
 *                    evaluation like this one left them
 *   base's rows      forward, log-probs of the tokens kept (only if the loss has a KL term)
 *   student's rows   batch by batch: forward with activations kept, loss in chunks, backward
 *   update           per adapter: global norm, clip, AdamW, panels again
 *
 * Nothing of an adapter changes before all gradients are known to be finite, and from then on the
 * step does not yield: it happens whole or not at all. */
#include "cpu/train.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Tokens of a batch. Training keeps about 0.4 MB per token of a 135M model; inference keeps
 * nothing, and more rows per product than this gain nothing. */
#define TRAIN_TOKENS 512
#define INFER_TOKENS 1024

/* --- the passes --- */

static int infer_batch(struct cpu_step_space *space, const struct claas_plan_batch *batch)
{
    space->pass.pack = &batch->pack;
    space->infer.tail = batch->tail;
    space->infer.tail_count = batch->tail_count;
    return claas_cpu_infer(&space->pass, &space->infer, space->hidden);
}

/* Leaves the rows for later requests if they are wanted, fit, and there is memory. */
static void leave_teacher(struct claas_teacher_kept *kept, const void *rows, size_t bytes)
{
    if (bytes > kept->limit)
        return;
    kept->rows = claas_alloc(bytes, 1);
    if (!kept->rows)
        return;
    memcpy(kept->rows, rows, bytes);
    kept->bytes = bytes;
    kept->filled = true;
}

static int run_teacher(claas_backend_t *backend, const struct claas_plan *plan)
{
    struct claas_teacher_kept *kept = plan->request->kept;
    struct cpu_step_space space;
    size_t row = (size_t)backend->model.config.hidden * backend->ops->act_bytes;
    size_t bytes = (size_t)plan->position_count * row;

    claas_cpu_space_enter(backend, plan, CPU_STAGE_TEACHER, &space);
    if (kept && kept->filled) {
        if (kept->bytes != bytes)
            return claas_fail(CLAAS_ERR_INTERNAL, "the teacher's rows are another request's");
        memcpy(space.teacher_hidden, kept->rows, bytes);
        return 0;
    }
    memset(space.teacher_hidden, 0, bytes);
    for (int i = 0; i < plan->teacher.batch_count; i++) {
        const struct claas_plan_batch *batch = &plan->teacher.batches[i];
        int code = infer_batch(&space, batch);

        if (code < 0)
            return code;
        for (int j = 0; j < batch->scored_count; j++)
            memcpy((uint8_t *)space.teacher_hidden + (size_t)batch->scored_index[j] * row,
                   (const uint8_t *)space.hidden + (size_t)batch->scored_tail[j] * row, row);
    }
    if (kept)
        leave_teacher(kept, space.teacher_hidden, bytes);
    return 0;
}

static int run_base(claas_backend_t *backend, const struct claas_plan *plan)
{
    struct cpu_step_space space;

    claas_cpu_space_enter(backend, plan, CPU_STAGE_BASE, &space);
    for (int i = 0; i < plan->base.batch_count; i++) {
        int code = infer_batch(&space, &plan->base.batches[i]);

        if (code >= 0)
            code = claas_cpu_head_logprobs(backend, plan, &plan->base.batches[i], &space);
        if (code < 0)
            return code;
    }
    return 0;
}

int claas_cpu_layer_saved(claas_backend_t *backend, const struct claas_plan_batch *batch,
                          struct cpu_step_space *space, int layer)
{
    const struct claas_model_config *c = &backend->model.config;
    struct cpu_acts acts = space->saved[layer];
    struct claas_pack tail = {
        .m = batch->tail_count, .groups = &space->tail_group, .group_count = 1};
    int code = claas_cpu_attention_half(&space->pass, layer, &acts);

    if (code < 0)
        return code;
    if (layer < c->layers - 1)
        return claas_cpu_mlp_half(&space->pass, &batch->pack, layer, &acts);
    space->tail_group = batch->pack.groups[0];
    space->tail_group.count = batch->tail_count;
    claas_cpu_gather(backend->ops, acts.x_in, batch->tail, batch->tail_count, (size_t)c->hidden,
                     space->tail_x);
    claas_cpu_gather(backend->ops, acts.attn, batch->tail, batch->tail_count,
                     (size_t)backend->model.nq, space->tail_attn);
    acts.x_in = space->tail_x;
    acts.attn = space->tail_attn;
    return claas_cpu_mlp_half(&space->pass, &tail, layer, &acts);
}

static int train_batch(claas_backend_t *backend, const struct claas_plan *plan,
                       const struct claas_plan_batch *batch, struct cpu_step_space *space)
{
    const struct claas_model_config *c = &backend->model.config;
    int learner = plan->positions[batch->scored_index[0]].learner, code = 0;

    space->pass.pack = &batch->pack;
    claas_cpu_embed(backend, batch->pack.tokens, batch->pack.m, space->saved[0].x_in);
    for (int l = 0; l < c->layers && code >= 0; l++)
        code = claas_cpu_layer_saved(backend, batch, space, l);
    memset(space->dx, 0, (size_t)batch->tail_count * (size_t)c->hidden * sizeof(float));
    if (code >= 0)
        code = claas_cpu_head(backend, plan, batch, space, true);
    if (code >= 0)
        code = claas_cpu_backward(backend, batch, space, plan->learners[learner].grad);
    return code;
}

static int run_student(claas_backend_t *backend, const struct claas_plan *plan,
                       struct cpu_step_space *space)
{
    int code = 0;

    claas_cpu_space_enter(backend, plan, CPU_STAGE_STUDENT, space);
    for (int i = 0; i < plan->learner_count && plan->request->update; i++)
        memset(plan->learners[i].grad, 0, plan->learners[i].adapter->layout.count * sizeof(float));
    for (int i = 0; i < plan->student.batch_count && code >= 0; i++) {
        const struct claas_plan_batch *batch = &plan->student.batches[i];

        if (plan->request->update) {
            code = train_batch(backend, plan, batch, space);
            continue;
        }
        code = infer_batch(space, batch);
        if (code >= 0)
            code = claas_cpu_head(backend, plan, batch, space, false);
    }
    return code;
}

/* --- the update --- */

/* The norm of each learner's gradient; ret->grad_norm becomes the largest. */
static void measure_gradients(claas_backend_t *backend, struct claas_plan *plan,
                              struct claas_train_result *ret)
{
    for (int i = 0; i < plan->learner_count; i++) {
        struct claas_plan_learner *learner = &plan->learners[i];

        learner->norm = sqrt(backend->ops->sum_squares(backend->pool, learner->grad,
                                                       learner->adapter->layout.count));
        ret->finite = ret->finite && isfinite(learner->norm);
        if (!(learner->norm <= ret->grad_norm))
            ret->grad_norm = (float)learner->norm;
    }
}

static void update(claas_backend_t *backend, const struct claas_plan *plan)
{
    const struct claas_adamw_config *config = &plan->request->adamw;

    for (int i = 0; i < plan->learner_count; i++) {
        const struct claas_plan_learner *learner = &plan->learners[i];
        claas_backend_adapter_t *adapter = learner->adapter;
        double scale = 1;

        if (learner->tokens == 0)
            continue;
        if (config->max_grad_norm > 0) /* PyTorch's clip_grad_norm_ */
            scale = fmin(1, config->max_grad_norm / (learner->norm + 1e-6));
        adapter->step++;
        backend->ops->adamw(backend->pool, &(struct claas_adamw_args){
                                               .count = adapter->layout.count,
                                               .parameters = adapter->parameters,
                                               .exp_avg = adapter->exp_avg,
                                               .exp_avg_sq = adapter->exp_avg_sq,
                                               .grad = learner->grad,
                                               .grad_scale = (float)scale,
                                               .rate = config->rate,
                                               .beta1 = config->beta1,
                                               .beta2 = config->beta2,
                                               .eps = config->eps,
                                               .weight_decay = config->weight_decay,
                                               .step = adapter->step,
                                           });
        claas_cpu_adapter_repack(backend, adapter);
    }
}

static int run_step(claas_backend_t *backend, struct claas_plan *plan,
                    struct claas_train_result *ret)
{
    struct cpu_step_space space;
    int code = claas_cpu_space_reserve(backend, plan);
    int64_t start = claas_clock_ns();

    if (code >= 0)
        code = run_teacher(backend, plan);
    ret->teacher_ms = (double)(claas_clock_ns() - start) * 1e-6;
    if (code >= 0)
        code = run_base(backend, plan);
    if (code >= 0)
        code = run_student(backend, plan, &space);
    if (code < 0)
        return code;
    claas_plan_collect(plan, space.results, ret);
    if (plan->request->update)
        measure_gradients(backend, plan, ret);
    if (plan->request->update && ret->finite)
        update(backend, plan);
    return 0;
}

static int check_adapters(const struct claas_backend_train *request)
{
    for (size_t i = 0; i < request->row_count && request->update; i++)
        if (!request->rows[i].student || request->rows[i].student->use != CLAAS_ADAPTER_TRAIN)
            return claas_fail(CLAAS_ERR_INVALID, "row %zu: its adapter is not one in training", i);
    return 0;
}

int claas_cpu_train(claas_backend_t *backend, const struct claas_backend_train *request,
                    struct claas_train_result *ret)
{
    CLAAS_AUTO(claas_plan_done) struct claas_plan plan = {0};
    CLAAS_AUTO_FREE struct claas_train_row_result *rows =
        CLAAS_NEW_ARRAY(struct claas_train_row_result, request->row_count);
    struct claas_train_result result = {.rows = rows, .row_count = request->row_count};
    const struct claas_plan_limits limits = {TRAIN_TOKENS, INFER_TOKENS};
    int code = check_adapters(request);

    if (!rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (code >= 0)
        code = claas_plan_new(&backend->model.config, request, &limits, &plan);
    if (code >= 0) {
        code = run_step(backend, &plan, &result);
        claas_cpu_space_leave(backend);
    }
    if (code < 0)
        return code;
    for (int i = 0; i < plan.learner_count; i++)
        if (plan.learners[i].adapter && plan.learners[i].adapter->step > result.step)
            result.step = plan.learners[i].adapter->step;
    *ret = result;
    rows = NULL;
    return 0;
}
