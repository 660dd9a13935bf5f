/* One forward pass of the engine: segments become rows of a pack, the layers run once, and the
 * wanted rows' logits are turned into tokens or scores, in chunks so that the logits of a large
 * batch never exist together. Its workspace is its own: the pass may run between two operations of
 * a training step. */
#include "cpu/step.h"
#include "pack/backend_common.h"
#include "pack/segments.h"

/* Floats of the logits buffer: 64 rows of a small vocabulary, 27 of a large one. */
#define LOGITS_FLOATS   ((size_t)4 << 20)
#define LOGITS_ROWS     64
#define LOGITS_ROWS_MIN 8

static void place(claas_backend_t *backend, struct cpu_arena *arena)
{
    struct cpu_forward_space *space = &backend->forward;
    const struct claas_model_config *c = &backend->model.config;
    size_t m = (size_t)backend->max_tokens, vocab = (size_t)c->vocab;

    space->logits_rows = claas_backend_logits_rows(LOGITS_FLOATS, LOGITS_ROWS_MIN, LOGITS_ROWS,
                                                   c->vocab, backend->max_tokens);
    space->pass.lds[CPU_QKV] = 3 * CLAAS_RANK_MAX;
    space->pass.lds[CPU_O] = CLAAS_RANK_MAX;
    space->pass.lds[CPU_GATE_UP] = 2 * CLAAS_RANK_MAX;
    space->pass.lds[CPU_DOWN] = CLAAS_RANK_MAX;
    space->pack.tokens = claas_cpu_take(arena, m * sizeof(int32_t));
    space->pack.pos = claas_cpu_take(arena, m * sizeof(int32_t));
    space->pack.blocks = claas_cpu_take(arena, m * sizeof(int32_t));
    space->pack.groups = claas_cpu_take(arena, m * sizeof(struct claas_pack_group));
    space->pack.runs = claas_cpu_take(arena, m * sizeof(struct claas_pack_run));
    space->tail = claas_cpu_take(arena, m * sizeof(int32_t));
    claas_cpu_place_pass(backend, arena, (int)m, (int)m, &space->pass);
    claas_cpu_place_infer(backend, arena, (int)m, (int)m, (int)m, &space->pass, &space->infer);
    space->hidden = claas_cpu_take(arena, m * (size_t)c->hidden * backend->ops->act_bytes);
    space->logits = claas_cpu_take(arena, (size_t)space->logits_rows * vocab * sizeof(float));
    space->sampling = claas_cpu_take(arena, (size_t)claas_pool_threads(backend->pool) *
                                                claas_cpu_sample_bytes(c->vocab));
}

int claas_cpu_forward_open(claas_backend_t *backend)
{
    struct cpu_forward_space *space = &backend->forward;
    struct cpu_arena arena = {0};
    int code;

    place(backend, &arena);
    code = claas_cpu_region_new(&space->region, arena.used, "the forward pass");
    if (code < 0)
        return code;
    arena = (struct cpu_arena){.base = space->region.base};
    place(backend, &arena);
    space->pass.backend = backend;
    space->pass.pack = &space->pack;
    space->pass.kv = backend->kv.base;
    space->pass.kv_layer_bytes = (size_t)backend->kv_blocks *
                                 (size_t)backend->model.config.kv_heads * backend->kv_block_bytes;
    space->infer.tail = space->tail;
    atomic_fetch_add(&backend->bytes_workspace, space->region.bytes);
    return 0;
}

int claas_cpu_forward(claas_backend_t *backend, const struct claas_segment *segments, int count,
                      struct claas_sample *samples)
{
    struct cpu_forward_space *space = &backend->forward;
    size_t d = (size_t)backend->model.config.hidden;
    const struct claas_pack_limits limits = {
        .context = backend->model.config.context,
        .vocab = backend->model.config.vocab,
        .kv_blocks = backend->kv_blocks,
        .max_tokens = backend->max_tokens,
    };
    int code = claas_pack_segments(&limits, segments, count, &space->pack, space->tail,
                                   &space->infer.tail_count);

    if (code < 0 || space->pack.m == 0)
        return code;
    code = claas_cpu_infer(&space->pass, &space->infer, space->hidden);
    for (int row = 0; row < space->infer.tail_count && code >= 0; row += space->logits_rows) {
        int rows = space->infer.tail_count - row;

        if (rows > space->logits_rows)
            rows = space->logits_rows;
        claas_cpu_logits(backend, rows, claas_cpu_at(backend->ops, space->hidden, (size_t)row * d),
                         space->logits);
        claas_cpu_sample(backend, rows, space->logits, samples + row);
    }
    return code;
}
