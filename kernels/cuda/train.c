/* One training step, or the same figures without an update:
 *
 *   teacher's rows   forward, final hidden rows of the trained positions kept; or copied, where an
 *                    evaluation like this one left them; or, in a short step, behind the student's
 *                    rows in the same pass (JOINT_VALUES)
 *   base's rows      forward, log-probs of the tokens kept (only if the loss has a KL term)
 *   student's rows   batch by batch: forward with activations kept, loss in chunks, backward
 *   update           per adapter: global norm, clip, AdamW, the act view again
 *
 * On the way the host is kept at most two layers, or two chunks of the head, ahead of the device
 * (cuda_yield), and times products whose shape is new; in the end it waits for losses and gradient
 * norms. Nothing of an adapter changes before all are known to be finite, and from then on the step
 * does not yield: it happens whole or not at all. */
#include "cuda/cuda_train.h"

#include "claas/clock.h"
#include "claas/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define INFER_TOKENS 8192
/* Up to so many values of the residual stream, student's and teacher's rows go forward in one pass:
 * fewer launches, and fewer half-filled tiles. In more rows nothing is gained by it (2,112 of 8B,
 * 8,448 of 0.6B), and activations of the teacher's rows, which nobody reads, would take as much
 * memory as the student's. */
#define JOINT_VALUES (4 << 20)

/* --- what the device must know --- */

static size_t batch_bytes(const struct claas_plan_batch *b)
{
    return cuda_pack_bytes(b->pack.m, b->pack.run_count, 0) +
           ((size_t)b->tail_count + 2 * (size_t)b->scored_count) * sizeof(int32_t) + 64;
}

static size_t side_bytes(const struct claas_plan_side *side)
{
    size_t bytes = 0;

    for (int i = 0; i < side->batch_count; i++)
        bytes += batch_bytes(&side->batches[i]);
    return bytes;
}

static int fill_batch(const struct cuda_step *step, const struct claas_plan_batch *plan,
                      struct cuda_batch *ret)
{
    struct cuda_upload *upload = &step->backend->step_upload;
    size_t tail = (size_t)plan->tail_count * sizeof(int32_t);
    size_t scored = (size_t)plan->scored_count * sizeof(int32_t);
    const void *at[3] = {0};
    int code = cuda_pack_fill(upload, &plan->pack, false, 0, &ret->pack);
    int32_t *host[3];

    if (code < 0)
        return code;
    host[0] = cuda_upload_take(upload, tail, &at[0]);
    host[1] = cuda_upload_take(upload, scored, &at[1]);
    host[2] = cuda_upload_take(upload, scored, &at[2]);
    if (!host[0] || !host[1] || !host[2])
        return claas_fail(CLAAS_ERR_LIMIT, "a batch of %d rows is larger than its buffer",
                          plan->pack.m);
    memcpy(host[0], plan->tail, tail);
    memcpy(host[1], plan->scored_tail, scored);
    for (int i = 0; i < plan->scored_count; i++)
        host[2][i] = step->plan.positions[plan->scored_index[i]].token;
    ret->plan = plan;
    ret->tail = at[0];
    ret->scored_tail = at[1];
    ret->scored_token = at[2];
    return 0;
}

static int fill_side(const struct cuda_step *step, const struct claas_plan_side *side,
                     struct cuda_batch **ret)
{
    int code = 0;

    *ret = CLAAS_NEW_ARRAY(struct cuda_batch, (size_t)side->batch_count + 1);
    if (!*ret)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < side->batch_count && code >= 0; i++)
        code = fill_batch(step, &side->batches[i], &(*ret)[i]);
    return code;
}

static int fill_positions(const struct cuda_step *step)
{
    size_t n = (size_t)step->plan.position_count;
    const void *device = NULL;
    struct cuda_loss_position *host = cuda_upload_take(
        &step->backend->step_upload, n * sizeof(struct cuda_loss_position), &device);

    if (!host)
        return claas_fail(CLAAS_ERR_LIMIT, "%zu positions are more than their buffer holds", n);
    for (size_t i = 0; i < n; i++) {
        const struct claas_plan_position *p = &step->plan.positions[i];

        host[i] = (struct cuda_loss_position){
            .token = p->token, .rollout = p->rollout, .weight = p->weight, .teacher = p->teacher};
    }
    return (int)((const uint8_t *)device - (const uint8_t *)step->backend->step_upload.device.base);
}

/* An upload of at least `bytes`, emptied. */
static int ready_upload(struct cuda_context *context, struct cuda_upload *upload, size_t bytes)
{
    int code = cuda_upload_begin(context, upload);

    if (code < 0 || bytes <= upload->bytes)
        return code;
    cuda_upload_done(context, upload);
    return cuda_upload_new(context, upload, bytes + bytes / 2, "the rows of a step");
}

/* Copies the plan's arrays, then, on the device, the loss positions to their place in the step's
 * memory, where the base's log-probs are added later. */
static int send_plan(struct cuda_step *step)
{
    claas_backend_t *backend = step->backend;
    struct cuda_context *context = &backend->context;
    const struct claas_plan *plan = &step->plan;
    size_t positions = (size_t)plan->position_count * sizeof(struct cuda_loss_position);
    int at = 0, code = ready_upload(context, &backend->step_upload,
                                    side_bytes(&plan->student) + side_bytes(&plan->teacher) +
                                        side_bytes(&plan->base) + side_bytes(&plan->joint) +
                                        positions + 64);

    if (code >= 0)
        code = ready_upload(context, &backend->chunk_upload, cuda_head_bytes(plan->position_count));
    if (code >= 0)
        code = fill_side(step, &plan->student, &step->student);
    if (code >= 0)
        code = fill_side(step, &plan->teacher, &step->teacher);
    if (code >= 0)
        code = fill_side(step, &plan->base, &step->base);
    if (code >= 0)
        code = fill_side(step, &plan->joint, &step->joint);
    if (code >= 0)
        code = at = fill_positions(step);
    if (code >= 0)
        code = cuda_upload_send(context, &backend->step_upload);
    if (code >= 0)
        code = cuda_check(context,
                          cudaMemcpyAsync(step->space.positions,
                                          (uint8_t *)backend->step_upload.device.base + at,
                                          positions, cudaMemcpyDeviceToDevice, context->stream),
                          "the positions of a step");
    return code;
}

/* --- the passes --- */

static int infer_batch(struct cuda_step *step, const struct cuda_batch *batch)
{
    struct cuda_step_space *space = &step->space;

    space->pass.pack = batch->pack;
    space->infer.tail = batch->tail;
    space->infer.tail_count = batch->plan->tail_count;
    return cuda_infer(&space->pass, &space->infer, space->hidden);
}

/* Copies hidden rows to the places that their positions' numbers give, a run of consecutive numbers
 * at once. */
static int keep_teacher(struct cuda_step *step, const struct cuda_batch *batch)
{
    const struct claas_plan_batch *plan = batch->plan;
    struct cuda_context *context = &step->backend->context;
    int d = step->backend->model.config.hidden, code = 0;

    for (int first = 0, end; first < plan->scored_count && code >= 0; first = end) {
        for (end = first + 1; end < plan->scored_count; end++)
            if (plan->scored_index[end] != plan->scored_index[first] + end - first)
                break;
        code = cuda_gather(context, end - first, d, step->space.hidden, batch->scored_tail + first,
                           cuda_at(context, step->space.teacher_hidden,
                                   (size_t)plan->scored_index[first] * (size_t)d));
    }
    return code;
}

/* Each learner's gradient has its stretch of one buffer, whose place is the same in every stage. */
static void place_gradients(struct cuda_step *step)
{
    float *at = step->space.grads;

    for (int i = 0; i < step->plan.learner_count && step->plan.request->update; i++) {
        struct claas_plan_learner *learner = &step->plan.learners[i];

        learner->grad = learner->adapter->grad = at;
        at += learner->adapter->cuda.layout.count;
    }
}

static size_t teacher_bytes(const struct cuda_step *step)
{
    return (size_t)step->plan.position_count * (size_t)step->backend->model.config.hidden *
           step->backend->context.act_bytes;
}

static int copy_kept(struct cuda_step *step, const struct claas_teacher_kept *kept)
{
    struct cuda_context *context = &step->backend->context;

    if (kept->bytes != teacher_bytes(step))
        return claas_fail(CLAAS_ERR_INTERNAL, "the teacher's rows are another request's");
    return cuda_check(context,
                      cudaMemcpyAsync(step->space.teacher_hidden, kept->rows, kept->bytes,
                                      cudaMemcpyHostToDevice, context->stream),
                      "the teacher's rows");
}

/* Pinning memory may wait for the device, so it is done while the device has nothing to do yet. */
static void make_kept(const struct cuda_step *step, struct claas_teacher_kept *kept)
{
    kept->bytes = teacher_bytes(step);
    kept->rows = kept->bytes <= kept->limit ? cuda_host_new(kept->bytes) : NULL;
}

static int run_teacher(struct cuda_step *step)
{
    struct cuda_context *context = &step->backend->context;
    struct claas_teacher_kept *kept = step->plan.request->kept;
    size_t bytes = teacher_bytes(step);
    int code;

    cuda_space_enter(step, CUDA_STAGE_TEACHER);
    place_gradients(step);
    if (kept && !kept->filled)
        make_kept(step, kept);
    code = send_plan(step);
    if (code >= 0 && kept && kept->filled)
        return copy_kept(step, kept);
    if (code >= 0)
        code = cuda_check(context,
                          cudaMemsetAsync(step->space.teacher_hidden, 0, bytes, context->stream),
                          "the teacher");
    if (step->plan.joint.batch_count > 0) /* the student's pass brings them */
        return code;
    for (int i = 0; i < step->plan.teacher.batch_count && code >= 0; i++) {
        code = infer_batch(step, &step->teacher[i]);
        if (code >= 0)
            code = keep_teacher(step, &step->teacher[i]);
    }
    return code;
}

static int run_base(struct cuda_step *step)
{
    struct cuda_context *context = &step->backend->context;
    int code = 0;

    if (step->plan.base.batch_count == 0)
        return 0;
    cuda_space_enter(step, CUDA_STAGE_BASE);
    for (int i = 0; i < step->plan.base.batch_count && code >= 0; i++) {
        code = infer_batch(step, &step->base[i]);
        if (code >= 0)
            code = cuda_head_logprobs(step, &step->base[i]);
    }
    if (code < 0)
        return code;
    return cuda_check(context,
                      cudaMemcpy2DAsync(&step->space.positions->base,
                                        sizeof(struct cuda_loss_position),
                                        step->space.base_logprobs, sizeof(float), sizeof(float),
                                        (size_t)step->plan.position_count, cudaMemcpyDeviceToDevice,
                                        context->stream),
                      "the base's log-probs");
}

int cuda_layer_saved(struct cuda_step *step, const struct cuda_batch *batch, int layer)
{
    claas_backend_t *backend = step->backend;
    struct cuda_step_space *space = &step->space;
    const struct claas_model_config *c = &backend->model.config;
    const struct claas_plan_batch *plan = batch->plan;
    struct cuda_acts acts = space->saved[layer];
    int code = cuda_attention_half(&space->pass, layer, &acts);

    if (code < 0)
        return code;
    if (layer < c->layers - 1)
        return cuda_mlp_half(&space->pass, &batch->pack.rows, layer, &acts);
    code = cuda_gather(&backend->context, plan->tail_count, c->hidden, acts.x_in, batch->tail,
                       space->tail_x);
    if (code >= 0)
        code = cuda_gather(&backend->context, plan->tail_count, backend->model.nq, acts.attn,
                           batch->tail, space->tail_attn);
    acts.x_in = space->tail_x;
    acts.attn = space->tail_attn;
    if (code >= 0)
        code = cuda_mlp_half(&space->pass, &batch->pack.tail, layer, &acts);
    return code;
}

/* All layers of a batch's rows, activations kept. */
static int forward_saved(struct cuda_step *step, const struct cuda_batch *batch)
{
    claas_backend_t *backend = step->backend;
    struct cuda_step_space *space = &step->space;
    const struct claas_model_config *c = &backend->model.config;
    int code;

    space->pass.pack = batch->pack;
    code = cuda_embed(&backend->context, batch->pack.m, c->hidden, backend->model.embedding,
                      batch->pack.tokens, space->saved[0].x_in);
    for (int l = 0; l < c->layers && code >= 0; l++)
        code = cuda_layer_saved(step, batch, l);
    return code;
}

/* Student's and teacher's rows at once. The student's come first, so what is saved of them lies
 * where a pass over them alone would have left it; behind them, the teacher's tail gets its final
 * norm. */
static int forward_joint(struct cuda_step *step)
{
    claas_backend_t *backend = step->backend;
    struct cuda_context *context = &backend->context;
    struct cuda_step_space *space = &step->space;
    const struct claas_model_config *c = &backend->model.config;
    const struct cuda_batch *student = &step->student[0], *teacher = &step->teacher[0];
    size_t before = (size_t)student->plan->tail_count * (size_t)c->hidden;
    int code = forward_saved(step, &step->joint[0]);

    space->pass.pack = student->pack;
    if (code >= 0)
        code = cuda_rmsnorm(context, teacher->plan->tail_count, c->hidden,
                            cuda_at(context, space->saved[c->layers - 1].x_out, before),
                            backend->model.norm_out, c->norm_eps, space->hidden, NULL);
    return code >= 0 ? keep_teacher(step, teacher) : code;
}

static int train_batch(struct cuda_step *step, const struct cuda_batch *batch)
{
    claas_backend_t *backend = step->backend;
    struct cuda_context *context = &backend->context;
    struct cuda_step_space *space = &step->space;
    const struct claas_model_config *c = &backend->model.config;
    size_t bytes = (size_t)batch->plan->tail_count * (size_t)c->hidden * sizeof(float);
    int code = step->plan.joint.batch_count > 0 ? forward_joint(step) : forward_saved(step, batch);

    if (code >= 0)
        code =
            cuda_check(context, cudaMemsetAsync(space->dx, 0, bytes, context->stream), "the head");
    if (code >= 0)
        code = cuda_head(step, batch, true);
    return code >= 0 ? cuda_backward(step, batch) : code;
}

static int run_student(struct cuda_step *step)
{
    struct cuda_context *context = &step->backend->context;
    const struct claas_plan *plan = &step->plan;
    bool train = plan->request->update;
    int code = 0;

    cuda_space_enter(step, CUDA_STAGE_STUDENT);
    if (train)
        code = cuda_check(context,
                          cudaMemsetAsync(step->space.grads, 0, step->grad_bytes, context->stream),
                          "the gradients");
    for (int i = 0; i < plan->student.batch_count && code >= 0; i++) {
        const struct cuda_batch *batch = &step->student[i];

        if (train) {
            code = train_batch(step, batch);
            continue;
        }
        code = infer_batch(step, batch);
        if (code >= 0)
            code = cuda_head(step, batch, false);
    }
    return code;
}

/* --- figures and the update --- */

static int measure_gradients(struct cuda_step *step, struct cuda_learned *learned)
{
    struct cuda_context *context = &step->backend->context;
    const struct claas_plan *plan = &step->plan;
    int code = 0;

    for (int i = 0; i < plan->learner_count && code >= 0; i++)
        code = cuda_measure_gradient(context, plan->learners[i].grad,
                                     plan->learners[i].adapter->cuda.layout.count,
                                     step->space.parts, step->space.learned + i);
    if (code < 0)
        return code;
    return cuda_check(context,
                      cudaMemcpyAsync(learned, step->space.learned,
                                      (size_t)plan->learner_count * sizeof(*learned),
                                      cudaMemcpyDeviceToHost, context->stream),
                      "the gradients' norms");
}

/* Copies the teacher's rows to the host. This is the last work queued before the wait, so that no
 * step ends while the copy is under way: the memory may be freed then. */
static int leave_teacher(struct cuda_step *step, const struct claas_teacher_kept *kept)
{
    struct cuda_context *context = &step->backend->context;

    if (!kept || kept->filled || !kept->rows)
        return 0;
    return cuda_check(context,
                      cudaMemcpyAsync(kept->rows, step->space.teacher_hidden, kept->bytes,
                                      cudaMemcpyDeviceToHost, context->stream),
                      "the teacher's rows");
}

/* Fetches losses and norms; waits for all that the step queued. */
static int fetch_figures(struct cuda_step *step, struct claas_train_result *ret)
{
    struct cuda_context *context = &step->backend->context;
    const struct claas_plan *plan = &step->plan;
    struct claas_teacher_kept *kept = plan->request->kept;
    size_t n = (size_t)plan->position_count;
    CLAAS_AUTO_FREE struct claas_loss_result *results =
        CLAAS_NEW_ARRAY(struct claas_loss_result, n + 1);
    CLAAS_AUTO_FREE struct cuda_learned *learned =
        CLAAS_NEW_ARRAY(struct cuda_learned, (size_t)plan->learner_count + 1);
    int code = 0;

    if (!results || !learned)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (plan->request->update)
        code = measure_gradients(step, learned);
    if (code >= 0)
        code = cuda_check(context,
                          cudaMemcpyAsync(results, step->space.results, n * sizeof(*results),
                                          cudaMemcpyDeviceToHost, context->stream),
                          "the losses");
    if (code >= 0)
        code = leave_teacher(step, kept);
    if (code >= 0)
        code = cuda_wait(context);
    if (code < 0)
        return code;
    if (kept)
        kept->filled = kept->rows != NULL;
    claas_plan_collect(plan, results, ret);
    for (int i = 0; i < plan->learner_count && plan->request->update; i++) {
        ret->finite = ret->finite && isfinite(learned[i].norm);
        if (!(learned[i].norm <= ret->grad_norm))
            ret->grad_norm = (float)learned[i].norm;
    }
    return 0;
}

static int update(struct cuda_step *step)
{
    struct cuda_context *context = &step->backend->context;
    const struct claas_plan *plan = &step->plan;
    const struct claas_adamw_config *config = &plan->request->adamw;
    bool changed = false;
    int code = 0;

    for (int i = 0; i < plan->learner_count && code >= 0; i++) {
        struct cuda_adapter *adapter = &plan->learners[i].adapter->cuda;

        if (plan->learners[i].tokens == 0)
            continue;
        code = cuda_adamw(context, &(struct cuda_adamw){
                                       .count = adapter->layout.count,
                                       .parameters = adapter->parameters,
                                       .exp_avg = adapter->exp_avg,
                                       .exp_avg_sq = adapter->exp_avg_sq,
                                       .grad = plan->learners[i].grad,
                                       .rate = config->rate,
                                       .beta1 = config->beta1,
                                       .beta2 = config->beta2,
                                       .eps = config->eps,
                                       .weight_decay = config->weight_decay,
                                       .max_grad_norm = config->max_grad_norm,
                                       .step = adapter->step + 1,
                                       .learned = step->space.learned + i,
                                   });
        if (code < 0)
            break;
        adapter->step++;
        changed = true;
        code = cuda_adapter_refresh(context, &step->backend->model, adapter);
    }
    /* A step that finds no memory is made again, which must not update anything twice. */
    if (code == CLAAS_ERR_NO_MEMORY && changed)
        return claas_fail(CLAAS_ERR_DEVICE, "in the middle of an update: %s", claas_error_text());
    return code;
}

static int run_stages(struct cuda_step *step, struct claas_train_result *ret)
{
    int64_t start = claas_clock_ns();
    int code = cuda_space_reserve(step);

    if (code >= 0)
        code = run_teacher(step);
    ret->teacher_ms = (double)(claas_clock_ns() - start) * 1e-6;
    if (code >= 0)
        code = run_base(step);
    if (code >= 0)
        code = run_student(step);
    if (code >= 0)
        code = fetch_figures(step, ret);
    if (code >= 0 && step->plan.request->update && ret->finite)
        code = update(step);
    return code;
}

static int run_step(struct cuda_step *step, struct claas_train_result *ret)
{
    const struct claas_backend_train *request = step->plan.request;
    struct cuda_turns *turns = &step->backend->context.turns;
    int code;

    *turns = (struct cuda_turns){.give = request->yield, .arg = request->yield_arg};
    code = run_stages(step, ret);
    *turns = (struct cuda_turns){0};
    return code;
}

static void step_done(struct cuda_step *step)
{
    for (int i = 0; i < step->plan.learner_count; i++)
        if (step->plan.learners[i].adapter)
            step->plan.learners[i].adapter->grad = NULL;
    claas_plan_done(&step->plan);
    free(step->student);
    free(step->teacher);
    free(step->base);
    free(step->joint);
    free(step->saved);
}

/* Bytes of the gradients of the adapters that the rows name. */
static size_t gradient_bytes(const struct claas_backend_train *request)
{
    size_t bytes = 0;

    for (size_t i = 0; i < request->row_count && request->update; i++) {
        size_t first = 0;

        while (request->rows[first].student != request->rows[i].student)
            first++;
        if (first == i)
            bytes += request->rows[i].student->cuda.layout.count * sizeof(float);
    }
    return bytes;
}

/* The most rows of a joint pass: like the batches' limit, which bounds it, this hardly ever depends
 * on what else is on the card. CLAAS_CUDA_JOINT: so many instead, to measure and to compare; 0 =
 * none. */
static int joint_tokens(const claas_backend_t *backend, const struct cuda_train_tokens *tokens)
{
    const char *wish = getenv("CLAAS_CUDA_JOINT");
    long most = wish ? strtol(wish, NULL, 10) : JOINT_VALUES / backend->model.config.hidden;

    if (tokens->kept < tokens->batch) /* the least limit, and no room even for that */
        return 0;
    return most < 0 ? 0 : most < tokens->batch ? (int)most : tokens->batch;
}

static int prepare(claas_backend_t *backend, const struct claas_backend_train *request,
                   struct cuda_step *step)
{
    struct claas_plan_limits limits = {.infer_tokens = INFER_TOKENS, .mixed = true};
    struct cuda_train_tokens tokens = {0};
    int code = 0;

    step->backend = backend;
    for (size_t i = 0; i < request->row_count && request->update; i++)
        if (!request->rows[i].student || !request->rows[i].student->cuda.trains)
            return claas_fail(CLAAS_ERR_INVALID, "row %zu: its adapter is not one in training", i);
    step->grad_bytes = gradient_bytes(request);
    if (request->update)
        code = cuda_train_tokens(backend, step->grad_bytes, &tokens);
    if (code < 0)
        return code;
    step->kept_tokens = tokens.kept;
    limits.train_tokens = tokens.batch;
    limits.joint_tokens = joint_tokens(backend, &tokens);
    code = claas_plan_new(&backend->model.config, request, &limits, &step->plan);
    if (code < 0)
        return code;
    step->saved = CLAAS_NEW_ARRAY(struct cuda_acts, (size_t)backend->model.config.layers);
    if (!step->saved)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return 0;
}

int cuda_train(claas_backend_t *backend, const struct claas_backend_train *request,
               struct claas_train_result *ret)
{
    CLAAS_AUTO(step_done) struct cuda_step step = {0};
    CLAAS_AUTO_FREE struct claas_train_row_result *rows =
        CLAAS_NEW_ARRAY(struct claas_train_row_result, request->row_count);
    struct claas_train_result result = {.rows = rows, .row_count = request->row_count};
    int code = prepare(backend, request, &step);

    if (!rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (code >= 0)
        code = run_step(&step, &result);
    if (code < 0 && request->kept) /* nothing is copied from or to its memory any more */
        (void)cuda_wait(&backend->context);
    if (code < 0)
        return code;
    for (int i = 0; i < step.plan.learner_count; i++)
        if (step.plan.learners[i].adapter && step.plan.learners[i].adapter->cuda.step > result.step)
            result.step = step.plan.learners[i].adapter->cuda.step;
    *ret = result;
    rows = NULL;
    return 0;
}
