/* The head and the loss over the trained positions of a batch, a chunk of rows at a time: logits of
 * student and teacher, the loss of every row and its gradient over the vocabulary, and from there
 * back to the hidden rows. Logits of a whole batch never exist.
 *
 * Chats get their turn behind each product: where its shape is new, the product is timed first, and
 * over a whole vocabulary that takes tens of milliseconds. */
#include "cuda/cuda_train.h"

#include "claas/mem.h"

#include <string.h>

/* Rows [first, first + count) of a batch's trained positions; `index`: the first one's number in
 * the step, the others follow. */
struct chunk {
    struct cuda_step *step;
    const struct cuda_batch *batch;
    int first, count;
    size_t index;
};

/* The final norm of the chunk's hidden rows into head_xn. */
static int gather(const struct chunk *chunk, bool saved)
{
    claas_backend_t *backend = chunk->step->backend;
    struct cuda_step_space *space = &chunk->step->space;
    const struct claas_model_config *c = &backend->model.config;
    const int32_t *rows = chunk->batch->scored_tail + chunk->first;
    int code;

    if (!saved)
        return cuda_gather(&backend->context, chunk->count, c->hidden, space->hidden, rows,
                           space->head_xn);
    code = cuda_gather(&backend->context, chunk->count, c->hidden,
                       space->saved[c->layers - 1].x_out, rows, space->head_x);
    if (code < 0)
        return code;
    return cuda_rmsnorm(&backend->context, chunk->count, c->hidden, space->head_x,
                        backend->model.norm_out, c->norm_eps, space->head_xn, space->head_rstd);
}

/* Logits of count rows after the final norm. */
static int make_logits(const struct chunk *chunk, const void *x, float *logits)
{
    int code = cuda_logits(chunk->step->backend, chunk->count, x, logits);

    return code >= 0 ? cuda_turn(&chunk->step->space.pass) : code;
}

/* Which rows of the chunk go to which tail row, in order, for cuda_add_rows. */
struct targets {
    int count;
    const int32_t *starts, *items, *rows; /* device */
};

/* An array of count + 1 numbers, rounded up to 16 bytes, takes at most 16 bytes a position. */
size_t cuda_head_bytes(int positions)
{
    return 3 * 16 * (size_t)positions;
}

/* Scored rows are in the order of the sequences, so those of one tail row need not be neighbours.
 */
static int list_targets(const struct chunk *chunk, struct targets *ret)
{
    const struct claas_plan_batch *plan = chunk->batch->plan;
    struct cuda_upload *upload = &chunk->step->backend->chunk_upload;
    const int32_t *rows = plan->scored_tail + chunk->first;
    CLAAS_AUTO_FREE int32_t *counts = CLAAS_NEW_ARRAY(int32_t, (size_t)plan->tail_count + 1);
    size_t bytes = ((size_t)chunk->count + 1) * sizeof(int32_t);
    const void *at[3] = {0};
    int32_t *starts = cuda_upload_take(upload, bytes, &at[0]);
    int32_t *items = cuda_upload_take(upload, bytes, &at[1]);
    int32_t *own = cuda_upload_take(upload, bytes, &at[2]);
    int next = 0;

    if (!counts)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (!starts || !items || !own)
        return claas_fail(CLAAS_ERR_LIMIT, "a chunk of %d rows is larger than its buffer",
                          chunk->count);
    for (int i = 0; i < chunk->count; i++) {
        own[i] = rows[i];
        counts[rows[i]]++;
    }
    for (int row = 0; row < plan->tail_count; row++) { /* each count becomes the place where the
                                                          row's items begin */
        int n = counts[row];

        counts[row] = next;
        if (n > 0)
            starts[ret->count++] = next;
        next += n;
    }
    starts[ret->count] = next;
    for (int i = 0; i < chunk->count; i++)
        items[counts[rows[i]]++] = i;
    ret->starts = at[0];
    ret->items = at[1];
    ret->rows = at[2];
    return 0;
}

/* dlogits -> through the head and the final norm -> added to the rows of space->dx. */
static int chunk_backward(const struct chunk *chunk)
{
    claas_backend_t *backend = chunk->step->backend;
    struct cuda_context *context = &backend->context;
    struct cuda_step_space *space = &chunk->step->space;
    const struct claas_model_config *c = &backend->model.config;
    struct targets targets = {0};
    int code = list_targets(chunk, &targets);

    if (code >= 0)
        code = cuda_upload_send(context, &backend->chunk_upload);
    if (code >= 0)
        code = cuda_gemm(context, &(struct cuda_gemm){
                                      .form = CUDA_GEMM_NN,
                                      .m = chunk->count,
                                      .n = c->hidden,
                                      .k = c->vocab,
                                      .a = space->dlogits,
                                      .lda = c->vocab,
                                      .b = backend->model.head,
                                      .ldb = c->hidden,
                                      .out = space->head_dxn,
                                      .ldo = c->hidden,
                                      .out_type = context->act,
                                  });
    if (code >= 0)
        code = cuda_turn(&space->pass);
    if (code >= 0)
        code = cuda_check(context,
                          cudaMemsetAsync(space->head_dx, 0,
                                          (size_t)chunk->count * (size_t)c->hidden * sizeof(float),
                                          context->stream),
                          "the head");
    if (code >= 0)
        code = cuda_rmsnorm_bwd(context, chunk->count, c->hidden, space->head_x,
                                backend->model.norm_out, space->head_rstd, space->head_dxn,
                                space->head_dx, NULL);
    if (code >= 0)
        code = cuda_add_rows(context, targets.count, c->hidden, targets.starts, targets.items,
                             targets.rows, space->head_dx, space->dx);
    return code;
}

static int run_chunk(const struct chunk *chunk, bool saved)
{
    claas_backend_t *backend = chunk->step->backend;
    struct cuda_context *context = &backend->context;
    struct cuda_step_space *space = &chunk->step->space;
    const struct claas_model_config *c = &backend->model.config;
    int code = gather(chunk, saved);

    if (code >= 0)
        code = make_logits(chunk, space->head_xn, space->logits);
    /* positions are numbered along the student's sequences, so the teacher's rows of a chunk lie
     * together */
    if (code >= 0)
        code = make_logits(
            chunk, cuda_at(context, space->teacher_hidden, chunk->index * (size_t)c->hidden),
            space->teacher_logits);
    if (code >= 0)
        code = cuda_loss(context, &chunk->step->plan.request->loss, c->vocab, chunk->count,
                         space->logits, space->teacher_logits, space->positions + chunk->index,
                         saved ? space->dlogits : NULL, space->results + chunk->index);
    if (code >= 0 && saved)
        code = chunk_backward(chunk);
    return code >= 0 ? cuda_yield(&space->pass) : code;
}

/* The next chunk: rows whose numbers follow each other. */
static struct chunk next_chunk(struct cuda_step *step, const struct cuda_batch *batch, int first)
{
    const struct claas_plan_batch *plan = batch->plan;
    struct chunk chunk = {
        .step = step, .batch = batch, .first = first, .index = (size_t)plan->scored_index[first]};

    while (chunk.count < step->space.chunk && first + chunk.count < plan->scored_count &&
           plan->scored_index[first + chunk.count] == plan->scored_index[first] + chunk.count)
        chunk.count++;
    return chunk;
}

int cuda_head(struct cuda_step *step, const struct cuda_batch *batch, bool saved)
{
    int code = 0;

    for (int first = 0; first < batch->plan->scored_count && code >= 0;) {
        struct chunk chunk = next_chunk(step, batch, first);

        code = run_chunk(&chunk, saved);
        first += chunk.count;
    }
    return code;
}

int cuda_head_logprobs(struct cuda_step *step, const struct cuda_batch *batch)
{
    claas_backend_t *backend = step->backend;
    struct cuda_context *context = &backend->context;
    struct cuda_step_space *space = &step->space;
    int code = 0;

    for (int first = 0; first < batch->plan->scored_count && code >= 0;) {
        struct chunk chunk = next_chunk(step, batch, first);
        const struct cuda_batch *b = chunk.batch;

        code = gather(&chunk, false);
        if (code >= 0)
            code = make_logits(&chunk, space->head_xn, space->logits);
        if (code >= 0)
            code = cuda_logprobs(context, backend->model.config.vocab, chunk.count, space->logits,
                                 b->scored_token + first, space->base_logprobs + chunk.index);
        first += chunk.count;
    }
    return code;
}
