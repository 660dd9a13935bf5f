/* Causal attention with grouped queries, over packed rows (training) or over paged keys and values
 * (serving). All pointers in the arguments' structs are device pointers, except `finish`. head_dim
 * 64 or 128 in bfloat16 on tensor cores; any multiple of 16 up to 256, and float32, by a plain
 * kernel. Softmax in float32, P rounded to act for the product with V. Deterministic: no
 * atomics. */
#ifndef CLAAS_CUDA_ATTENTION_H
#define CLAAS_CUDA_ATTENTION_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_KV_BLOCK   16
#define CUDA_KEY_WINDOW 128

struct cuda_qkv; /* cuda_rows.h */

/* Rows [first, first+count) of the pack are positions pos … of one sequence. Positions 0 … pos-1
 * are rows parent_first … of the same pack (training; pos = 0: none), or in the blocks (serving).
 */
struct cuda_attn_run {
    int32_t first, count, pos;
    int32_t parent_first;
    int32_t table;      /* serving: this run's block numbers begin at tables[table] */
    int32_t child_from; /* training, backward: the runs whose parent this one is are … */
    int32_t child_end;  /* … children[child_from … child_end), in order */
};

struct cuda_attention {
    int heads, kv_heads, head_dim;
    float scale;
    int m, run_count;
    int longest;  /* the largest count of a run */
    int furthest; /* the largest pos + count */
    const struct cuda_attn_run *runs;
    const int32_t *row_run; /* [m]: the run of each row */
    const void *qkv;        /* act [m][ldqkv]: q | k | v of each row, rotated */
    int ldqkv;
    void *out;  /* act [m][Nq] */
    float *lse; /* [m][H], or NULL */
    /* serving: this layer's blocks, act [block][2][G][16][d] (keys, then values), and block
     * numbers; kv = NULL: training */
    const void *kv;
    const int32_t *tables;
    /* serving: no run reads a key that another one of the pass writes (decoding). All but a run's
     * own keys are then there before the pass's first kernel begins, and may be read that early. */
    bool apart;
    /* serving: device memory for the parts of long rows, aligned to 16 bytes; may be NULL where the
     * size function gives 0 */
    void *scratch;
    size_t scratch_bytes;
    /* decoding, or NULL (host): cuda_qkv_finish has not been called for this pass's rows; its work
     * is done here, except that qkv itself keeps what the product left. Each run is one row, and
     * `apart` holds. */
    const struct cuda_qkv *finish;
};
/* Whether cuda_attention should be given args->finish: not with CLAAS_CUDA_FUSE=0, nor where it
 * cannot finish the rows or that would cost more than it saves. In the last two cases it refuses
 * them with INTERNAL. */
bool cuda_attention_finishes(const struct cuda_context *context, const struct cuda_attention *args);
/* Bytes of scratch that are enough for any pass of at most these sizes: the keys of runs of few
 * queries are cut into parts that are joined afterwards. 0 where nothing is cut. */
size_t cuda_attention_scratch_bytes(int heads, int kv_heads, int head_dim, int runs, int longest,
                                    int furthest);
int cuda_attention(struct cuda_context *context, const struct cuda_attention *args);
/* part_queries: the most queries that a run may have for its keys to be taken in parts, as in
 * decoding; 0: none. The length of the parts follows from where the run ends: beyond certain
 * positions parts are longer, and part_border is the first such position behind `position`. A row
 * at `position` has the same bits in any run of at most so many queries that ends no later than
 * that border. */
int cuda_attention_part_queries(int heads, int kv_heads);
int cuda_attention_part_border(int position);
/* The largest `furthest` (INT32_MAX: any) for which decoding launches the same kernels with the
 * same sizes as for this one: the grid has room for more parts than there are, and results do not
 * depend on that. */
int cuda_attention_reach(int furthest);

/* dqkv act [m][ldqkv] from dout act [m][Nq]; delta: scratch float [m][H]. The gradient of a shared
 * prompt's keys and values sums over the queries of its own run, then over its children's in
 * order; on sm_90a, over every second tile of these, then the others. */
struct cuda_attention_bwd {
    struct cuda_attention forward; /* as it was, out and lse filled; training only */
    const int32_t *children;
    /* device: the numbers of the pack's windows of CUDA_KEY_WINDOW rows, each in the low half of
     * its word; first those whose keys most queries see. An order of work that does not show in the
     * results. NULL: as they lie. */
    const int64_t *key_order;
    const void *dout;
    float *delta;
    void *dqkv;
};
int cuda_attention_bwd(struct cuda_context *context, const struct cuda_attention_bwd *args);

#ifdef __cplusplus
}
#endif
#endif
