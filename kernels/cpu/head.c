/* The head and the loss over the trained positions of a batch, a chunk of rows at a time: logits of
 * student and teacher, the loss of every row and its gradient over the vocabulary, and from there
 * back to the hidden rows. Logits of a whole batch never exist. */
#include "cpu/train.h"

#include "claas/err.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Rows [first, first + count) of a batch's trained positions. */
struct chunk {
    claas_backend_t *backend;
    const struct claas_plan *plan;
    const struct claas_plan_batch *batch;
    struct cpu_step_space *space;
    int first, count;
    bool gradient;
    atomic_int error;
};

/* The final norm of the chunk's hidden rows into head_xn. */
static void gather(const struct chunk *chunk, bool saved)
{
    claas_backend_t *backend = chunk->backend;
    const struct claas_ops *ops = backend->ops;
    struct cpu_step_space *space = chunk->space;
    const struct claas_model_config *c = &backend->model.config;
    const void *x_out = saved ? space->saved[c->layers - 1].x_out : NULL;
    size_t d = (size_t)c->hidden;

    for (int i = 0; i < chunk->count; i++) {
        size_t row = (size_t)chunk->batch->scored_tail[chunk->first + i];

        memcpy(claas_cpu_at(ops, saved ? space->head_x : space->head_xn, (size_t)i * d),
               claas_cpu_at(ops, saved ? x_out : space->hidden, row * d), d * ops->act_bytes);
    }
    if (saved)
        ops->rmsnorm(backend->pool, chunk->count, c->hidden, space->head_x, c->hidden,
                     backend->model.norm_out, c->norm_eps, space->head_xn, c->hidden,
                     space->head_rstd);
}

/* The loss of row i of the chunk, and its gradient as act in dlogits. */
static void find_loss(void *arg, int i)
{
    struct chunk *chunk = arg;
    claas_backend_t *backend = chunk->backend;
    struct cpu_step_space *space = chunk->space;
    size_t vocab = (size_t)backend->model.config.vocab;
    size_t member = (size_t)claas_pool_member(backend->pool);
    int index = chunk->batch->scored_index[chunk->first + i], code;
    const struct claas_plan_position *position = &chunk->plan->positions[index];
    float *grad = chunk->gradient ? space->grad_row + member * vocab : NULL;
    struct claas_loss_row row = {
        .student_logits = space->logits + (size_t)i * vocab,
        .teacher_logits =
            (position->teacher ? space->teacher_logits : space->logits) + (size_t)i * vocab,
        .token = position->token,
        .rollout_logprob = position->rollout,
        .base_logprob = space->base_logprobs[index],
    };

    code = claas_loss_row(&chunk->plan->request->loss, (int)vocab, &row, position->weight, grad,
                          space->loss_scratch + member * space->scratch_floats,
                          &space->results[index]);
    if (!position->teacher)
        space->results[index].divergence = NAN; /* device.h, struct claas_train_row */
    if (code < 0)
        atomic_store(&chunk->error, code);
    else if (grad)
        backend->ops->to_act(grad, claas_cpu_at(backend->ops, space->dlogits, (size_t)i * vocab),
                             vocab);
}

/* dlogits -> through the head and the final norm -> added to the rows of space->dx, in order: a
 * prompt's last row gets a part from each of its branches. */
static void chunk_backward(const struct chunk *chunk)
{
    claas_backend_t *backend = chunk->backend;
    struct cpu_step_space *space = chunk->space;
    const struct cpu_weight *head = &backend->model.head;
    size_t d = (size_t)head->k;
    struct claas_gemm_dx_args args = {
        .m = chunk->count,
        .n = head->n,
        .k = head->k,
        .dy = space->dlogits,
        .ldy = head->n,
        .w = head->panels,
        .dx = space->head_dxn,
        .ldx = head->k,
    };

    backend->ops->gemm_dx(backend->pool, &args);
    memset(space->head_dx, 0, (size_t)chunk->count * d * sizeof(float));
    backend->ops->rmsnorm_bwd(backend->pool, chunk->count, head->k, space->head_x, head->k,
                              backend->model.norm_out, space->head_rstd, space->head_dxn, head->k,
                              space->head_dx, head->k);
    for (int i = 0; i < chunk->count; i++) {
        float *dx = space->dx + (size_t)chunk->batch->scored_tail[chunk->first + i] * d;

        for (size_t j = 0; j < d; j++)
            dx[j] += space->head_dx[(size_t)i * d + j];
    }
}

static int run_chunk(struct chunk *chunk, bool saved)
{
    claas_backend_t *backend = chunk->backend;
    struct cpu_step_space *space = chunk->space;
    size_t d = (size_t)backend->model.config.hidden;
    size_t index = (size_t)chunk->batch->scored_index[chunk->first];
    int code;

    gather(chunk, saved);
    claas_cpu_logits(backend, chunk->count, space->head_xn, space->logits);
    code = claas_cpu_yield(&space->pass);
    if (code < 0)
        return code;
    /* positions are numbered along the student's sequences, so the teacher's rows of a chunk lie
     * together */
    claas_cpu_logits(backend, chunk->count,
                     claas_cpu_at(backend->ops, space->teacher_hidden, index * d),
                     space->teacher_logits);
    code = claas_cpu_yield(&space->pass);
    if (code < 0)
        return code;
    claas_pool_run(backend->pool, chunk->count, find_loss, chunk);
    code = atomic_load(&chunk->error);
    if (code < 0)
        return claas_fail(code, "the loss refused its configuration");
    code = claas_cpu_yield(&space->pass);
    if (code >= 0 && saved) {
        chunk_backward(chunk);
        code = claas_cpu_yield(&space->pass);
    }
    return code;
}

int claas_cpu_head(claas_backend_t *backend, const struct claas_plan *plan,
                   const struct claas_plan_batch *batch, struct cpu_step_space *space, bool saved)
{
    for (int first = 0; first < batch->scored_count; first += space->chunk) {
        int left = batch->scored_count - first, code;
        struct chunk chunk = {
            .backend = backend,
            .plan = plan,
            .batch = batch,
            .space = space,
            .first = first,
            .count = left < space->chunk ? left : space->chunk,
            .gradient = saved,
        };

        code = run_chunk(&chunk, saved);
        if (code < 0)
            return code;
    }
    return 0;
}

/* The log-prob of the token of row i of the chunk. */
static void score_row(void *arg, int i)
{
    const struct chunk *chunk = arg;
    int vocab = chunk->backend->model.config.vocab;
    const float *logits = chunk->space->logits + (size_t)i * (size_t)vocab;
    int index = chunk->batch->scored_index[chunk->first + i];

    chunk->space->base_logprobs[index] =
        logits[chunk->plan->positions[index].token] - claas_logsumexp(logits, vocab);
}

int claas_cpu_head_logprobs(claas_backend_t *backend, const struct claas_plan *plan,
                            const struct claas_plan_batch *batch, struct cpu_step_space *space)
{
    for (int first = 0; first < batch->scored_count; first += space->chunk) {
        int left = batch->scored_count - first, code;
        struct chunk chunk = {
            .backend = backend,
            .plan = plan,
            .batch = batch,
            .space = space,
            .first = first,
            .count = left < space->chunk ? left : space->chunk,
        };

        gather(&chunk, false);
        claas_cpu_logits(backend, chunk.count, space->head_xn, space->logits);
        claas_pool_run(backend->pool, chunk.count, score_row, &chunk);
        code = claas_cpu_yield(&space->pass);
        if (code < 0)
            return code;
    }
    return 0;
}
