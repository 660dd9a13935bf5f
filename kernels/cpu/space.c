/* Where the buffers of a training step lie. One region holds first what is kept through the step,
 * then the buffers of the stage at hand: the stages (teacher, base, student) use the same memory
 * one after the other. The same code counts (with an arena that has no base) and places. */
#include "cpu/train.h"

#include <string.h>

/* Floats of one logits buffer of the loss: 64 rows of a small vocabulary, 55 of a large one. */
#define LOSS_FLOATS   ((size_t)8 << 20)
#define LOSS_ROWS     64
#define LOSS_ROWS_MIN 16
/* A region up to this size waits for the next step; a larger one goes back to the system at once:
 * touching new pages costs a hundredth of the step that needs them. */
#define KEPT_BYTES ((size_t)384 << 20)

/* The largest of everything over a list of batches. */
struct extent {
    int m, runs, groups, tail, blocks, scored, longest;
};

static void stretch(struct extent *extent, const struct claas_plan_side *side)
{
    for (int i = 0; i < side->batch_count; i++) {
        const struct claas_plan_batch *b = &side->batches[i];

#define LARGER(field, value) extent->field = extent->field > (value) ? extent->field : (value)
        LARGER(m, b->pack.m);
        LARGER(runs, b->pack.run_count);
        LARGER(groups, b->pack.group_count);
        LARGER(tail, b->tail_count);
        LARGER(blocks, b->block_count);
        LARGER(scored, b->scored_count);
        LARGER(longest, b->longest);
#undef LARGER
    }
}

static size_t wider(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Row lengths of S: the widest of the adapters in a side. */
static void set_lds(const struct claas_plan_side *side, int lds[CPU_WEIGHTS])
{
    memset(lds, 0, CPU_WEIGHTS * sizeof(int));
    for (int i = 0; i < side->seq_count; i++)
        for (int kind = 0; kind < CPU_WEIGHTS && side->seqs[i].adapter; kind++) {
            const struct cpu_lora_layout *layout = &side->seqs[i].adapter->layout;
            int width = layout->parts[kind] * layout->rank;

            lds[kind] = lds[kind] > width ? lds[kind] : width;
        }
}

static void place_kv(const claas_backend_t *backend, struct cpu_arena *arena, int blocks,
                     int layers, struct cpu_step_space *space)
{
    space->kv_bytes =
        (size_t)blocks * (size_t)backend->model.config.kv_heads * backend->kv_block_bytes;
    space->kv = claas_cpu_take(arena, (size_t)layers * space->kv_bytes);
    space->pass.kv = space->kv;
    space->pass.kv_layer_bytes = layers > 1 ? space->kv_bytes : 0;
}

static void place_infer_side(const claas_backend_t *backend, struct cpu_arena *arena,
                             const struct claas_plan_side *side, struct cpu_step_space *space)
{
    struct extent e = {0};

    stretch(&e, side);
    set_lds(side, space->pass.lds);
    claas_cpu_place_pass(backend, arena, e.m, e.runs, &space->pass);
    claas_cpu_place_infer(backend, arena, e.m, e.tail, e.groups, &space->pass, &space->infer);
    space->hidden = claas_cpu_take(arena, (size_t)e.tail * (size_t)backend->model.config.hidden *
                                              backend->ops->act_bytes);
    place_kv(backend, arena, e.blocks, 1, space);
}

static void place_head(const claas_backend_t *backend, struct cpu_arena *arena,
                       struct cpu_step_space *space, bool gradient)
{
    size_t vocab = (size_t)backend->model.config.vocab, d = (size_t)backend->model.config.hidden;
    size_t rows = LOSS_FLOATS / vocab, act = backend->ops->act_bytes;
    size_t members = (size_t)claas_pool_threads(backend->pool);

    rows = rows > LOSS_ROWS ? LOSS_ROWS : rows < LOSS_ROWS_MIN ? LOSS_ROWS_MIN : rows;
    space->chunk = (int)rows;
    space->head_xn = claas_cpu_take(arena, rows * d * act);
    space->logits = claas_cpu_take(arena, rows * vocab * sizeof(float));
    space->teacher_logits = claas_cpu_take(arena, rows * vocab * sizeof(float));
    space->scratch_floats = (claas_loss_scratch_floats((int)vocab) + 15) & ~(size_t)15;
    space->loss_scratch = claas_cpu_take(arena, members * space->scratch_floats * sizeof(float));
    if (!gradient)
        return;
    space->head_x = claas_cpu_take(arena, rows * d * act);
    space->head_rstd = claas_cpu_take(arena, rows * sizeof(float));
    space->head_dxn = claas_cpu_take(arena, rows * d * sizeof(float));
    space->head_dx = claas_cpu_take(arena, rows * d * sizeof(float));
    space->dlogits = claas_cpu_take(arena, rows * vocab * act);
    space->grad_row = claas_cpu_take(arena, members * vocab * sizeof(float));
}

/* What the backward pass needs of one layer, except for the residual stream. */
static struct cpu_acts place_layer(const claas_backend_t *backend, struct cpu_arena *arena,
                                   size_t m, const struct cpu_step_space *space)
{
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    size_t act = m * backend->ops->act_bytes, d = (size_t)c->hidden, real = m * sizeof(float);
    struct cpu_acts acts = {0};

    acts.rstd_in = claas_cpu_take(arena, real);
    acts.qkv = claas_cpu_take(arena, act * (size_t)model->nqkv);
    if (c->qk_norm) {
        acts.qk_raw = claas_cpu_take(arena, act * (size_t)(model->nq + model->nk));
        acts.rstd_q = claas_cpu_take(arena, real * (size_t)c->heads);
        acts.rstd_k = claas_cpu_take(arena, real * (size_t)c->kv_heads);
    }
    acts.attn = claas_cpu_take(arena, act * (size_t)model->nq);
    acts.lse = claas_cpu_take(arena, real * (size_t)c->heads);
    acts.x_mid = claas_cpu_take(arena, act * d);
    acts.rstd_mid = claas_cpu_take(arena, real);
    acts.gate_up = claas_cpu_take(arena, act * 2 * (size_t)c->intermediate);
    for (int kind = 0; kind < CPU_WEIGHTS; kind++)
        acts.s[kind] = claas_cpu_take(arena, act * (size_t)space->pass.lds[kind]);
    return acts;
}

/* Every layer's activations if they fit the limit; else only the residual stream between the layers
 * (a tenth), and one set that each layer is computed into a second time on the way back. A layer's
 * x_out is the next one's x_in. */
static void place_saved(const claas_backend_t *backend, struct cpu_arena *arena, size_t m,
                        struct cpu_step_space *space)
{
    const struct claas_model_config *c = &backend->model.config;
    size_t stream = m * backend->ops->act_bytes * (size_t)c->hidden;
    struct cpu_arena one = {0};
    struct cpu_acts acts;
    void *x = claas_cpu_take(arena, stream);

    (void)place_layer(backend, &one, m, space);
    space->recompute = (one.used + stream) * (size_t)c->layers > backend->saved_limit;
    for (int l = 0; l < c->layers; l++) {
        if (l == 0 || !space->recompute)
            acts = place_layer(backend, arena, m, space);
        acts.x_in = x;
        acts.x_out = x = claas_cpu_take(arena, stream);
        if (arena->base)
            space->saved[l] = acts;
    }
}

static void place_train_side(const claas_backend_t *backend, struct cpu_arena *arena,
                             const struct claas_plan_side *side, struct cpu_step_space *space)
{
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    size_t act = backend->ops->act_bytes, d = (size_t)c->hidden, f = (size_t)c->intermediate;
    size_t nq = (size_t)model->nq, nqkv = (size_t)model->nqkv, s = 0, m, longest;
    struct extent e = {0};

    stretch(&e, side);
    set_lds(side, space->pass.lds);
    m = (size_t)e.m;
    longest = (size_t)e.longest;
    for (int kind = 0; kind < CPU_WEIGHTS; kind++)
        s = wider(s, (size_t)space->pass.lds[kind]);
    claas_cpu_place_pass(backend, arena, e.m, e.runs, &space->pass);
    space->saved = claas_cpu_take(arena, (size_t)c->layers * sizeof(struct cpu_acts));
    space->tail_x = claas_cpu_take(arena, (size_t)e.tail * d * act);
    space->tail_attn = claas_cpu_take(arena, (size_t)e.tail * nq * act);
    place_saved(backend, arena, m, space);
    space->dx = claas_cpu_take(arena, m * d * sizeof(float));
    space->dxn = claas_cpu_take(arena, m * d * sizeof(float));
    space->dwide = claas_cpu_take(arena, m * wider(f, nqkv) * sizeof(float));
    space->dattn = claas_cpu_take(arena, m * nq * sizeof(float));
    space->ds = claas_cpu_take(arena, m * s * sizeof(float));
    space->ds_act = claas_cpu_take(arena, m * s * act);
    space->dy_act = claas_cpu_take(arena, m * wider(d, nqkv) * act);
    space->dgu = claas_cpu_take(arena, m * 2 * f * act);
    space->dattn_act = claas_cpu_take(arena, m * nq * act);
    space->branch_q = claas_cpu_take(arena, longest * nq * act);
    space->branch_out = claas_cpu_take(arena, longest * nq * act);
    space->branch_dout = claas_cpu_take(arena, longest * nq * act);
    space->branch_lse = claas_cpu_take(arena, longest * (size_t)c->heads * sizeof(float));
    space->branch_d = claas_cpu_take(arena, longest * nqkv * sizeof(float));
    place_kv(backend, arena, e.blocks, space->recompute ? 1 : c->layers, space);
}

/* What lives through the whole step. */
static void place_kept(const claas_backend_t *backend, struct cpu_arena *arena,
                       const struct claas_plan *plan, struct cpu_step_space *space)
{
    size_t n = (size_t)plan->position_count;

    space->teacher_hidden =
        claas_cpu_take(arena, n * (size_t)backend->model.config.hidden * backend->ops->act_bytes);
    space->base_logprobs = claas_cpu_take(arena, n * sizeof(float));
    space->results = claas_cpu_take(arena, n * sizeof(struct claas_loss_result));
    for (int i = 0; i < plan->learner_count && plan->request->update; i++)
        plan->learners[i].grad =
            claas_cpu_take(arena, plan->learners[i].adapter->layout.count * sizeof(float));
}

static void place_stage(const claas_backend_t *backend, const struct claas_plan *plan,
                        enum cpu_stage stage, struct cpu_arena *arena, struct cpu_step_space *space)
{
    bool train = stage == CPU_STAGE_STUDENT && plan->request->update;

    arena->used = 0;
    place_kept(backend, arena, plan, space);
    if (stage != CPU_STAGE_TEACHER)
        place_head(backend, arena, space, train);
    if (train)
        place_train_side(backend, arena, &plan->student, space);
    else
        place_infer_side(backend, arena,
                         stage == CPU_STAGE_TEACHER ? &plan->teacher
                         : stage == CPU_STAGE_BASE  ? &plan->base
                                                    : &plan->student,
                         space);
}

int claas_cpu_space_reserve(claas_backend_t *backend, const struct claas_plan *plan)
{
    size_t need = 0;
    int code;

    for (int stage = CPU_STAGE_TEACHER; stage <= CPU_STAGE_STUDENT; stage++) {
        struct cpu_arena count = {0};
        struct cpu_step_space space = {0};

        place_stage(backend, plan, stage, &count, &space);
        need = wider(need, count.used);
    }
    if (need <= backend->step.bytes)
        return 0;
    atomic_fetch_sub(&backend->bytes_workspace, backend->step.bytes);
    claas_cpu_region_done(&backend->step);
    code = claas_cpu_region_new(&backend->step, need, "a training step");
    if (code < 0)
        return code;
    claas_cpu_region_huge(&backend->step);
    atomic_fetch_add(&backend->bytes_workspace, need);
    claas_cpu_memory_changed(backend);
    return 0;
}

void claas_cpu_space_leave(claas_backend_t *backend)
{
    if (backend->step.bytes <= KEPT_BYTES)
        return;
    atomic_fetch_sub(&backend->bytes_workspace, backend->step.bytes);
    claas_cpu_region_done(&backend->step);
}

void claas_cpu_space_enter(claas_backend_t *backend, const struct claas_plan *plan,
                           enum cpu_stage stage, struct cpu_step_space *space)
{
    struct cpu_arena arena = {.base = backend->step.base};

    *space = (struct cpu_step_space){0};
    place_stage(backend, plan, stage, &arena, space);
    space->pass.backend = backend;
    space->pass.yield = plan->request->yield;
    space->pass.yield_arg = plan->request->yield_arg;
}
