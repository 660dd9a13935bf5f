/* Where the buffers of a training step lie. One region holds first what is kept through the step,
 * then the buffers of the stage at hand: the stages (teacher, base, student) use the same memory
 * one after the other. The same code counts (with an arena that has no base) and places. */
#include "cuda/cuda_train.h"

#include "claas/clock.h"
#include "claas/log.h"

#include <limits.h>

/* Floats of one logits buffer: 2,048 rows of a small vocabulary, 883 of a large one. */
#define LOSS_FLOATS   ((size_t)128 << 20)
#define LOSS_ROWS     2048
#define LOSS_ROWS_MIN 64
#define CHUNK_STEP    256 /* whole tiles of the head's products: 704 rows take as long as 768 */
/* Share of the free memory for saved activations: the rest is for the stage's other buffers. */
#define SAVED_SHARE      0.6
#define TRAIN_TOKENS_MIN 1024
#define TRAIN_TOKENS_MAX 16384
/* What the region takes beyond a step's need where that is nothing to the free memory. */
#define SPARE_BYTES ((size_t)1 << 30)
#define SPARE_SHARE 16 /* of the free memory: one part of so many */
#define SLOW_MS     10 /* an allocation that is worth a line in the log */

/* The most rows of each kind that a batch of a side has. */
struct extent {
    int m, tail, scored;
};

static struct extent extent_of(const struct claas_plan_side *side)
{
    struct extent e = {0};

    for (int i = 0; i < side->batch_count; i++) {
        const struct claas_plan_batch *b = &side->batches[i];

        e.m = e.m > b->pack.m ? e.m : b->pack.m;
        e.tail = e.tail > b->tail_count ? e.tail : b->tail_count;
        e.scored = e.scored > b->scored_count ? e.scored : b->scored_count;
    }
    return e;
}

static size_t wider(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Row lengths of S: the widest of the adapters in a side. */
static void set_lds(const struct claas_plan_side *side, int lds[CUDA_WEIGHTS])
{
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        lds[kind] = 0;
    for (int i = 0; i < side->seq_count; i++)
        for (int kind = 0; kind < CUDA_WEIGHTS && side->seqs[i].adapter; kind++) {
            const struct cuda_lora_layout *layout = &side->seqs[i].adapter->cuda.layout;
            int width = layout->parts[kind] * layout->rank;

            lds[kind] = lds[kind] > width ? lds[kind] : width;
        }
}

static void place_infer_side(const struct cuda_step *step, struct cuda_arena *arena,
                             const struct claas_plan_side *side, struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    struct extent e = extent_of(side);

    set_lds(side, space->pass.lds);
    cuda_place_pass(backend, arena, e.m, &space->pass);
    cuda_place_infer(backend, arena, e.m, e.tail, &space->pass, &space->infer);
    space->hidden = cuda_take(arena, (size_t)e.tail * (size_t)backend->model.config.hidden *
                                         backend->context.act_bytes);
}

/* Rows of a chunk: as few chunks of at most `limit` rows as possible, all of one size but the last,
 * and that size as small as whole tiles allow. */
static size_t even_chunk(size_t rows, size_t limit)
{
    size_t chunks, chunk;

    limit = wider(limit, LOSS_ROWS_MIN);
    chunks = (rows + limit - 1) / limit;
    if (chunks <= 1)
        return rows;
    chunk = (rows + chunks - 1) / chunks;
    chunk = (chunk + CHUNK_STEP - 1) / CHUNK_STEP * CHUNK_STEP;
    return chunk < limit ? chunk : limit;
}

/* For the batches of a side. The chunk's size follows from the largest batch alone: it helps to
 * decide which algorithm a product gets, and so the last bits of logits. */
static void place_head(const struct cuda_step *step, struct cuda_arena *arena,
                       const struct claas_plan_side *side, bool gradient,
                       struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    size_t vocab = (size_t)backend->model.config.vocab, d = (size_t)backend->model.config.hidden;
    size_t rows = LOSS_FLOATS / vocab, act = backend->context.act_bytes;
    size_t most = (size_t)extent_of(side).scored;

    rows = even_chunk(most, rows > LOSS_ROWS ? LOSS_ROWS : rows);
    space->chunk = (int)rows;
    space->head_xn = cuda_take(arena, rows * d * act);
    space->logits = cuda_take(arena, rows * vocab * sizeof(float));
    space->teacher_logits = cuda_take(arena, rows * vocab * sizeof(float));
    if (!gradient)
        return;
    space->head_x = cuda_take(arena, rows * d * act);
    space->head_rstd = cuda_take(arena, rows * sizeof(float));
    space->head_dxn = cuda_take(arena, rows * d * act);
    space->head_dx = cuda_take(arena, rows * d * sizeof(float));
    space->dlogits = cuda_take(arena, rows * vocab * act);
}

/* Every layer's activations if they fit, those of a joint pass with the norms' outputs: it is
 * short, and a launch saved counts for more than their bytes. Else only the residual stream between
 * the layers, and one set of activations, into which each layer is computed a second time on the
 * way back. A layer's x_out is the next one's x_in. */
static void place_saved(const struct cuda_step *step, struct cuda_arena *arena, int m,
                        struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    const struct claas_model_config *c = &backend->model.config;
    size_t stream = (size_t)m * (size_t)c->hidden * backend->context.act_bytes;
    enum cuda_keep keep = step->plan.joint.batch_count > 0 ? CUDA_KEEP_ALL : CUDA_KEEP_LEAST;
    struct cuda_acts acts;
    void *x = cuda_take(arena, stream);

    space->recompute = m > step->kept_tokens;
    space->saved = step->saved;
    for (int l = 0; l < c->layers; l++) {
        if (l == 0 || !space->recompute)
            acts = cuda_place_acts(backend, arena, m, space->pass.lds, keep);
        acts.x_in = x;
        acts.x_out = x = cuda_take(arena, stream);
        if (arena->base)
            space->saved[l] = acts;
    }
}

/* What the layers use on the way forward (`way` rows) or back (`rows`) but not across the head: it
 * shares its memory with the head's buffers. */
static void place_layers(const struct cuda_step *step, struct cuda_arena *arena, int way, int rows,
                         struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    const struct cuda_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    size_t act = backend->context.act_bytes, d = (size_t)c->hidden, f = (size_t)c->intermediate;
    size_t nq = (size_t)model->nq, nqkv = (size_t)model->nqkv, m = (size_t)rows, s = 0;

    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        s = wider(s, (size_t)space->pass.lds[kind]);
    cuda_place_pass(backend, arena, way, &space->pass);
    space->dx_spread = cuda_take(arena, m * d * sizeof(float));
    space->dy = cuda_take(arena, m * wider(d, nqkv) * act);
    space->dxn = cuda_take(arena, m * d * act);
    space->dh = cuda_take(arena, m * f * act);
    space->dgu = cuda_take(arena, m * 2 * f * act);
    space->dattn = cuda_take(arena, m * nq * act);
    space->dattn_spread = cuda_take(arena, m * nq * act);
    space->ds = cuda_take(arena, m * s * act);
    space->delta = cuda_take(arena, m * (size_t)c->heads * sizeof(float));
}

static void place_train_side(const struct cuda_step *step, struct cuda_arena *arena,
                             struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    const struct claas_plan *plan = &step->plan;
    const struct claas_plan_side *forward = plan->joint.batch_count ? &plan->joint : &plan->student;
    struct extent way = extent_of(forward), back = extent_of(&plan->student);
    size_t d = (size_t)backend->model.config.hidden, act = backend->context.act_bytes, shared, head;

    set_lds(forward, space->pass.lds);
    space->tail_x = cuda_take(arena, (size_t)way.tail * d * act);
    space->tail_attn = cuda_take(arena, (size_t)way.tail * (size_t)backend->model.nq * act);
    place_saved(step, arena, way.m, space);
    space->dx = cuda_take(arena, (size_t)back.m * d * sizeof(float));
    shared = arena->used;
    place_head(step, arena, &plan->student, true, space);
    head = arena->used;
    arena->used = shared;
    space->hidden = cuda_take(arena, (size_t)(way.tail - back.tail) * d * act);
    place_layers(step, arena, way.m, back.m, space);
    arena->used = wider(arena->used, head);
}

/* What lives through the whole step. */
static void place_kept(struct cuda_step *step, struct cuda_arena *arena,
                       struct cuda_step_space *space)
{
    const claas_backend_t *backend = step->backend;
    size_t n = (size_t)step->plan.position_count, grads = 0;

    space->teacher_hidden =
        cuda_take(arena, n * (size_t)backend->model.config.hidden * backend->context.act_bytes);
    space->base_logprobs = cuda_take(arena, n * sizeof(float));
    space->positions = cuda_take(arena, n * sizeof(struct cuda_loss_position));
    space->results = cuda_take(arena, n * sizeof(struct claas_loss_result));
    space->parts = cuda_take(arena, CUDA_NORM_PARTS * sizeof(double));
    space->learned =
        cuda_take(arena, (size_t)step->plan.learner_count * sizeof(struct cuda_learned));
    for (int i = 0; i < step->plan.learner_count && step->plan.request->update; i++)
        grads += step->plan.learners[i].adapter->cuda.layout.count;
    space->grads = cuda_take(arena, grads * sizeof(float));
}

static void place_stage(struct cuda_step *step, enum cuda_stage stage, struct cuda_arena *arena,
                        struct cuda_step_space *space)
{
    const struct claas_plan *plan = &step->plan;
    const struct claas_plan_side *side = stage == CUDA_STAGE_TEACHER ? &plan->teacher
                                         : stage == CUDA_STAGE_BASE  ? &plan->base
                                                                     : &plan->student;
    bool train = stage == CUDA_STAGE_STUDENT && plan->request->update;

    arena->used = 0;
    place_kept(step, arena, space);
    if (train) {
        place_train_side(step, arena, space);
        return;
    }
    if (stage != CUDA_STAGE_TEACHER)
        place_head(step, arena, side, false, space);
    place_infer_side(step, arena, side, space);
}

/* Rounds down to a power of two or three quarters of one. Where batches end decides in which order
 * gradients are summed: so coarse a limit hardly ever depends on what else is on the card. */
static int batch_limit(size_t tokens)
{
    int power = TRAIN_TOKENS_MIN;

    while (power < TRAIN_TOKENS_MAX && (size_t)power * 2 <= tokens)
        power *= 2;
    return power < TRAIN_TOKENS_MAX && (size_t)power / 2 * 3 <= tokens ? power / 2 * 3 : power;
}

int cuda_train_tokens(claas_backend_t *backend, size_t gradients, struct cuda_train_tokens *ret)
{
    const struct claas_model_config *c = &backend->model.config;
    const int lds[CUDA_WEIGHTS] = {96, 32, 64, 32};
    struct cuda_arena one = {0};
    size_t free_bytes = 0, tokens;
    int code = cuda_memory_free(&backend->context, &free_bytes);

    if (code < 0)
        return code;
    free_bytes += backend->step.bytes;
    free_bytes = free_bytes > gradients ? free_bytes - gradients : 0;
    (void)cuda_place_acts(backend, &one, 256, lds, CUDA_KEEP_LEAST);
    one.used += 256 * (size_t)c->hidden * backend->context.act_bytes;
    tokens = (size_t)(SAVED_SHARE * (double)free_bytes) / (one.used / 256 * (size_t)c->layers + 1);
    ret->kept = tokens < INT_MAX ? (int)tokens : INT_MAX;
    ret->batch = batch_limit(tokens);
    return 0;
}

/* Bytes of the largest stage. */
static size_t count_stages(struct cuda_step *step)
{
    size_t need = 0;

    for (int stage = CUDA_STAGE_TEACHER; stage <= CUDA_STAGE_STUDENT; stage++) {
        struct cuda_arena count = {0};
        struct cuda_step_space space = {0};

        place_stage(step, (enum cuda_stage)stage, &count, &space);
        need = wider(need, count.used);
    }
    return need;
}

static int take_region(struct cuda_step *step, size_t bytes)
{
    claas_backend_t *backend = step->backend;
    int64_t start = claas_clock_ms(), ms;
    int code = cuda_region_new(&backend->context, &backend->step, bytes, "a training step");

    ms = claas_clock_ms() - start;
    if (ms >= SLOW_MS)
        claas_debug("%zu MiB for a training step took %lld ms", bytes >> 20, (long long)ms);
    return code;
}

/* Chats wait while the region is given back, taken anew and zeroed, so steps which are each a
 * little longer must not each do that: twice what is needed, a GiB more at most, where that is a
 * small part of what is free; else a quarter more than before, where as much again stays free. */
static size_t with_spare(size_t need, size_t before, size_t available)
{
    size_t twice = need + (need < SPARE_BYTES ? need : SPARE_BYTES), more = before + before / 4;

    if (twice <= available / SPARE_SHARE)
        return twice;
    return need < more && more <= available / 2 ? more : need;
}

static int grow_region(struct cuda_step *step, size_t need)
{
    claas_backend_t *backend = step->backend;
    size_t before = backend->step.bytes, available = 0, bytes;
    int code;

    cuda_region_done(&backend->context, &backend->step);
    code = cuda_memory_free(&backend->context, &available);
    if (code < 0)
        return code;
    bytes = with_spare(need, before, available);
    code = take_region(step, bytes);
    return code == CLAAS_ERR_NO_MEMORY && bytes > need ? take_region(step, need) : code;
}

/* Rather than compute layers twice, lets go of copies of adapters that only save time. */
static int keep_more(struct cuda_step *step)
{
    const struct claas_backend_train *request = step->plan.request;
    struct cuda_train_tokens tokens = {0};
    int code;

    if (!request->update || !request->make_room ||
        extent_of(&step->plan.student).m <= step->kept_tokens)
        return 0;
    request->make_room(request->yield_arg);
    code = cuda_train_tokens(step->backend, step->grad_bytes, &tokens);
    if (code >= 0 && tokens.kept > step->kept_tokens)
        step->kept_tokens = tokens.kept;
    return code;
}

int cuda_space_reserve(struct cuda_step *step)
{
    const struct claas_backend_train *request = step->plan.request;
    size_t need;
    int code = keep_more(step);

    if (code < 0)
        return code;
    need = count_stages(step);
    if (need <= step->backend->step.bytes)
        return 0;
    code = grow_region(step, need);
    if (code == CLAAS_ERR_NO_MEMORY && step->plan.joint.batch_count > 0) {
        claas_plan_part(&step->plan);
        need = count_stages(step);
        code = take_region(step, need);
    }
    if (code == CLAAS_ERR_NO_MEMORY && request->make_room) {
        request->make_room(request->yield_arg);
        code = take_region(step, need);
    }
    if (code == CLAAS_ERR_NO_MEMORY && request->update) {
        step->kept_tokens = 0;
        code = take_region(step, count_stages(step));
    }
    return code;
}

void cuda_space_enter(struct cuda_step *step, enum cuda_stage stage)
{
    struct cuda_arena arena = {.base = step->backend->step.base};

    step->space = (struct cuda_step_space){0};
    place_stage(step, stage, &arena, &step->space);
    step->space.pass.backend = step->backend;
}
