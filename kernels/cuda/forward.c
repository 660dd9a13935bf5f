/* One forward pass of the engine: segments become rows of a pack, the layers run once, and the
 * wanted rows' logits are turned into tokens or scores on the device, in chunks. The only waiting
 * is for the samples, and for the timing of a product whose shape is new. Its workspace is its own:
 * the pass may run between two products of a training step, or between two timings of one.
 *
 * Decoding, one row of each sequence, is the same few hundred launches again and again: its rows
 * are filled up to one of a few numbers, and what is launched then follows from that number and
 * from the longest sequence's size class alone (graph.h). A row that only fills up is the first
 * token of a sequence of its own, whose keys and values go into a block behind the pool. */
#include "cuda/gemm_few.h"
#include "cuda/pass.h"
#include "cuda/sample.h"
#include "pack/backend_common.h"
#include "pack/segments.h"

#include "claas/mem.h"

#include <stdlib.h>
#include <string.h>

/* Floats of the logits buffer: 256 rows of a small vocabulary, 138 of a large one. */
#define LOGITS_FLOATS   ((size_t)20 << 20)
#define LOGITS_ROWS     256
#define LOGITS_ROWS_MIN 8
#define DECODE_ROWS_MAX 256 /* more are not filled up: there products dominate by far */

/* The number of rows that `m` rows are filled up to; at most `most`, as many as fit into a pass. */
static int find_bucket(int m, int most)
{
    static const int buckets[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, DECODE_ROWS_MAX};
    size_t i = 0;

    while (buckets[i] < m)
        i++;
    return buckets[i] < most ? buckets[i] : most;
}

/* The most runs of a pass: one for each sequence, or for each row of a small pass. */
static int most_runs(const claas_backend_t *backend)
{
    int sequences = backend->max_sequences;
    int runs =
        sequences <= DECODE_ROWS_MAX ? find_bucket(sequences, backend->max_tokens) : sequences;

    return runs > CUDA_GEMM_FEW_ROWS ? runs : CUDA_GEMM_FEW_ROWS;
}

/* How long the runs of a pass may be. With as few rows as the products of few rows take, all of a
 * prompt is attended to in the way of decoding: a row then has the same bits whether its prompt is
 * read at once, in pieces, or found in the cache up to it. */
static int run_length(const claas_backend_t *backend)
{
    const struct claas_model_config *c = &backend->model.config;

    return backend->forward.pack.m <= CUDA_GEMM_FEW_ROWS
               ? cuda_attention_part_queries(c->heads, c->kv_heads)
               : 0;
}

static void place(claas_backend_t *backend, struct cuda_arena *arena)
{
    struct cuda_forward_space *space = &backend->forward;
    const struct claas_model_config *c = &backend->model.config;
    size_t m = (size_t)backend->max_tokens, vocab = (size_t)c->vocab;

    space->logits_rows = claas_backend_logits_rows(LOGITS_FLOATS, LOGITS_ROWS_MIN, LOGITS_ROWS,
                                                   c->vocab, backend->max_tokens);
    space->pass.lds[CUDA_QKV] = 3 * CLAAS_RANK_MAX;
    space->pass.lds[CUDA_O] = CLAAS_RANK_MAX;
    space->pass.lds[CUDA_GATE_UP] = 2 * CLAAS_RANK_MAX;
    space->pass.lds[CUDA_DOWN] = CLAAS_RANK_MAX;
    cuda_place_pass(backend, arena, (int)m, &space->pass);
    space->pass.lora_sums =
        cuda_take(arena, CUDA_LORA_PARTS * (m < CUDA_LORA_FEW ? m : CUDA_LORA_FEW) *
                             (size_t)space->pass.lds[CUDA_QKV] * sizeof(float));
    space->lora_pair.s = cuda_take(arena, CUDA_LORA_PAIR_BYTES);
    space->pass.lora_pair = &space->lora_pair;
    space->pass.split_bytes = cuda_attention_scratch_bytes(c->heads, c->kv_heads, c->head_dim,
                                                           most_runs(backend), (int)m, c->context);
    space->pass.splits = cuda_take(arena, space->pass.split_bytes);
    cuda_place_infer(backend, arena, (int)m, (int)m, &space->pass, &space->infer);
    space->hidden = cuda_take(arena, m * (size_t)c->hidden * backend->context.act_bytes);
    space->logits = cuda_take(arena, (size_t)space->logits_rows * vocab * sizeof(float));
    space->device_samples =
        cuda_take(arena, (size_t)space->logits_rows * sizeof(struct claas_sample));
}

/* The host's arrays of a pack of max_tokens rows. */
static int open_host(claas_backend_t *backend)
{
    struct cuda_forward_space *space = &backend->forward;
    size_t m = (size_t)backend->max_tokens;
    uint8_t *at;

    space->host = claas_alloc(m, 4 * sizeof(int32_t) + sizeof(struct claas_pack_run) +
                                     sizeof(struct claas_pack_group));
    if (!space->host)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    space->spare = backend->kv_blocks;
    at = space->host; /* pointers first, so that all are aligned */
    space->pack.runs = (struct claas_pack_run *)(void *)at;
    at += m * sizeof(struct claas_pack_run);
    space->pack.groups = (struct claas_pack_group *)(void *)at;
    at += m * sizeof(struct claas_pack_group);
    space->pack.tokens = (int32_t *)(void *)at;
    space->pack.pos = space->pack.tokens + m;
    space->pack.blocks = space->pack.pos + m;
    space->tail = space->pack.blocks + m;
    return cuda_pin(&backend->context, (void **)&space->staging,
                    (size_t)space->logits_rows * sizeof(struct claas_sample), "samples");
}

int cuda_forward_open(claas_backend_t *backend)
{
    struct cuda_forward_space *space = &backend->forward;
    struct claas_model_config *c = &backend->model.config;
    struct cuda_arena arena = {0};
    int table = (c->context + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK, code;
    size_t m = (size_t)backend->max_tokens;
    /* sequences share blocks but not lists of blocks, and each may be as long as the context; a row
     * that fills up a pass of decoding has one block */
    size_t tables = (size_t)backend->max_sequences *
                        (size_t)(table < backend->kv_blocks ? table : backend->kv_blocks) +
                    DECODE_ROWS_MAX;

    place(backend, &arena);
    code = cuda_region_new(&backend->context, &space->region, arena.used, "the forward pass");
    if (code < 0)
        return code;
    arena = (struct cuda_arena){.base = space->region.base};
    place(backend, &arena);
    space->pass.backend = backend;
    space->pass.kv = backend->kv.base;
    space->pass.kv_layer_bytes = backend->kv.bytes / (size_t)c->layers;
    cuda_graphs_open(&space->graphs);
    if (tables > (size_t)4 << 20) /* many short runs or few long ones, not many long ones */
        tables = (size_t)4 << 20;
    code = cuda_upload_new(&backend->context, &space->upload,
                           cuda_pack_bytes(backend->max_tokens, backend->max_tokens, (int)tables) +
                               m * sizeof(int32_t) + 64,
                           "the rows of a pass");
    return code >= 0 ? open_host(backend) : code;
}

void cuda_forward_close(claas_backend_t *backend)
{
    struct cuda_forward_space *space = &backend->forward;

    cuda_graphs_done(&space->graphs);
    cuda_upload_done(&backend->context, &space->upload);
    cuda_region_done(&backend->context, &space->region);
    if (space->staging)
        (void)cudaFreeHost(space->staging);
    free(space->host);
}

static int take_segments(claas_backend_t *backend, const struct claas_segment *segments, int count)
{
    struct cuda_forward_space *space = &backend->forward;
    const struct claas_pack_limits limits = {
        .context = backend->model.config.context,
        .vocab = backend->model.config.vocab,
        .kv_blocks = backend->kv_blocks,
        .max_tokens = backend->max_tokens,
    };

    return claas_pack_segments(&limits, segments, count, &space->pack, space->tail,
                               &space->infer.tail_count);
}

/* The wanted rows come first in the upload. When all rows are wanted, every array then has a place
 * that follows from their number, since only the pack's last array varies in length. */
static int send_rows(claas_backend_t *backend)
{
    struct cuda_forward_space *space = &backend->forward;
    size_t bytes = (size_t)space->infer.tail_count * sizeof(int32_t);
    const void *device = NULL;
    void *tail;
    int code = cuda_upload_begin(&backend->context, &space->upload);

    if (code < 0)
        return code;
    tail = cuda_upload_take(&space->upload, bytes, &device);
    if (!tail)
        return claas_fail(CLAAS_ERR_LIMIT, "too many rows wanted");
    memcpy(tail, space->tail, bytes);
    space->infer.tail = device;
    code =
        cuda_pack_fill(&space->upload, &space->pack, true, run_length(backend), &space->pass.pack);
    return code >= 0 ? cuda_upload_send(&backend->context, &space->upload) : code;
}

/* --- decoding --- */

static bool is_decoding(const struct claas_segment *segments, int count)
{
    for (int i = 0; i < count; i++)
        if (segments[i].count != 1 || segments[i].wanted != 1)
            return false;
    return count <= DECODE_ROWS_MAX;
}

/* Adds rows of the base model that nobody wants, up to `rows`. */
static void fill_up(struct cuda_forward_space *space, int rows)
{
    struct claas_pack *pack = &space->pack;
    struct claas_pack_group *last = &pack->groups[pack->group_count - 1];

    if (rows == pack->m)
        return;
    if (last->adapter) {
        last = &pack->groups[pack->group_count++];
        *last = (struct claas_pack_group){.first = pack->m};
    }
    last->count += rows - pack->m;
    for (int row = pack->m; row < rows; row++) {
        pack->runs[pack->run_count++] = (struct claas_pack_run){
            .first = row, .count = 1, .blocks = &space->spare, .parent = -1};
        pack->tokens[row] = pack->pos[row] = 0;
        pack->blocks[row] = space->spare;
        space->tail[row] = row;
    }
    pack->m = pack->tail_count = space->infer.tail_count = rows;
}

static bool has_adapters(const struct claas_pack *pack)
{
    for (int i = 0; i < pack->group_count; i++)
        if (pack->groups[i].adapter)
            return true;
    return false;
}

/* From the rows on the device to the wanted ones' hidden state, and to their logits if all of them
 * fit at once. */
static int compute(void *arg)
{
    claas_backend_t *backend = arg;
    struct cuda_forward_space *space = &backend->forward;
    int rows = space->infer.tail_count;
    int code = cuda_infer(&space->pass, &space->infer, space->hidden);

    if (code < 0 || rows > space->logits_rows)
        return code;
    return cuda_logits(backend, rows, space->hidden, space->logits);
}

static int compute_decoding(claas_backend_t *backend)
{
    struct cuda_forward_space *space = &backend->forward;
    struct cuda_pack *pack = &space->pass.pack;
    int reach = cuda_attention_reach(pack->furthest), context = backend->model.config.context;
    struct cuda_graph_key key = {.rows = pack->m, .adapters = has_adapters(&space->pack)};

    pack->decoding = true;
    key.furthest = pack->furthest = reach < context ? reach : context;
    return cuda_graphs_run(&backend->context, &space->graphs, &key, compute, backend);
}

static int run_pass(claas_backend_t *backend, const struct claas_segment *segments, int count,
                    struct claas_sample *samples)
{
    struct cuda_forward_space *space = &backend->forward;
    struct cuda_context *context = &backend->context;
    const struct claas_model_config *c = &backend->model.config;
    int code = take_segments(backend, segments, count), wanted = space->infer.tail_count;
    bool decodes = is_decoding(segments, count);

    if (code >= 0 && count > backend->max_sequences)
        return claas_fail(CLAAS_ERR_LIMIT, "%d sequences in a pass, the limit is %d", count,
                          backend->max_sequences);
    if (code < 0 || space->pack.m == 0)
        return code;
    if (decodes)
        fill_up(space, find_bucket(space->pack.m, backend->max_tokens));
    code = send_rows(backend);
    if (code >= 0)
        code = decodes ? compute_decoding(backend) : compute(backend);
    for (int row = 0; row < wanted && code >= 0; row += space->logits_rows) {
        int rows = space->infer.tail_count - row;

        if (space->infer.tail_count > space->logits_rows)
            code = cuda_logits(backend, rows < space->logits_rows ? rows : space->logits_rows,
                               cuda_at(context, space->hidden, (size_t)row * (size_t)c->hidden),
                               space->logits);
        rows = wanted - row < space->logits_rows ? wanted - row : space->logits_rows;
        if (code >= 0)
            code = cuda_sample(context, c->vocab, rows, space->logits, samples + row,
                               space->staging, space->device_samples);
    }
    return code;
}

/* A pass within a step's turn gives none itself. */
int cuda_forward(claas_backend_t *backend, const struct claas_segment *segments, int count,
                 struct claas_sample *samples)
{
    const struct cuda_turns turns = backend->context.turns;
    int code;

    backend->context.turns = (struct cuda_turns){0};
    code = run_pass(backend, segments, count, samples);
    backend->context.turns = turns;
    return code;
}
