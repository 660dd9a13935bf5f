/* LoRA over the rows of many adapters: one launch per operation, whichever adapters the rows belong
 * to.
 *
 * With y = x W^T + S (sB)^T and S = x A^T, per adapter:
 *
 *   forward    S = x A^T        y += S (sB)^T
 *   backward   dS = dY (sB)     dB += s dY^T S     dA += dS^T x     dx += dS A
 *
 * Which rows belong to which adapter is said by *groups* (neighbouring rows under one adapter) and
 * *tiles* (at most so many rows of one group); rows of the base model are in neither. Three ways to
 * do an operation:
 *
 *   few      packs of serving of at most CUDA_LORA_FEW rows, bound by reading A and B: up to 64
 *            rows in the frozen product's own launch (gemm_few.cu), or by lora_few.cu
 *   grouped  everything else: lora_grouped.cu, products on tensor cores over the list of tiles
 *   gemm     S and dS of one adapter with many rows of a large model: cuBLASLt, for dS a launch per
 *            part (unless CLAAS_CUDA_LORA=grouped)
 *
 * S and dS are rounded to act; y and dx are read, added to in float32 and rounded once per
 * operation. Element [i][j] of S lies at i*ld + j, the parts of a weight side by side. */
#ifndef CLAAS_CUDA_CUDA_LORA_H
#define CLAAS_CUDA_CUDA_LORA_H

#include "cuda/cuda_model.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_LORA_FEW       256 /* rows */
#define CUDA_LORA_FEW_ROWS  16  /* of a tile */
#define CUDA_LORA_TILE_ROWS 64
#define CUDA_LORA_PARTS     8 /* few: chunks of K at most, whose sums add up to S */

/* Rows [first, first+count) of a pack under one adapter, as the device knows them; places in
 * elements, within a layer (see struct cuda_lora_layout). */
struct cuda_lora_group {
    const void *view; /* act; of layer 0 */
    float *grad;      /* likewise float32; NULL unless the adapter learns */
    uint64_t layer, a[CUDA_WEIGHTS], b[CLAAS_MODULE_COUNT];
    int32_t index[CLAAS_MODULE_COUNT], parts[CUDA_WEIGHTS];
    int32_t rank, first, count;
    float scale;
};
/* Rows [first, first+count) of a pack, all of one group; count 0: nothing to do. */
struct cuda_lora_tile {
    int32_t group, first, count;
};
/* The rows of a pack. An adapter has at most one group where gradients are made: two would add to
 * the same elements at once. */
struct cuda_lora_rows {
    const struct cuda_lora_group *groups; /* device [group_count] */
    const struct cuda_lora_tile *tiles;   /* device [tile_count] */
    int m;                                /* rows of the pack */
    int group_count;                      /* 0: there is nothing to launch */
    int tile_count;
    int tile_rows;               /* CUDA_LORA_FEW_ROWS or CUDA_LORA_TILE_ROWS */
    int rank;                    /* the largest */
    struct cuda_lora_group only; /* the group, if there is just one */
    bool by_gemm;                /* there is one group, large enough for cuBLASLt's S and dS */
};

/* A group of `adapter`'s rows; grad may be NULL. */
struct cuda_lora_group cuda_lora_group(const struct cuda_adapter *adapter, float *grad, int first,
                                       int count);
/* Lists the tiles of groups in order and returns how many there are: at most one per row. */
int cuda_lora_tiles(const struct cuda_lora_group *groups, int count, int tile_rows,
                    struct cuda_lora_tile *tiles);
/* What the host knows of the rows: all but the two device pointers. `tiles`: how many the list has.
 */
struct cuda_lora_rows cuda_lora_rows(const struct cuda_lora_group *groups, int count, int m,
                                     int tile_rows, int tiles);

/* Where launches that make S beside the product (gemm_few.cu) keep it: two buffers, taken by turns.
 * An element is CUDA_LORA_MISSING until it is made, which is how the launch knows what is there,
 * and each launch makes the other buffer's rows missing again for the next one. So within a pass
 *
 *   - cuda_lora_begin comes first, also after a pass that failed;
 *   - no launch that joins has more rows than the one before it (the tail has fewer);
 *   - every kernel between two of them waits for the work queued before it (launch.cuh): some block
 *     of it calls launch_wait before it ends, or it is launched the ordinary way;
 *   - all are on one stream.
 *
 * The host keeps turn and rows: a captured pass has its turns in the kernels' arguments. */
struct cuda_lora_pair {
    void *s; /* device, bfloat16 [2][CUDA_LORA_PAIR_ROWS][CUDA_LORA_PAIR_LD] */
    unsigned turn;
    int rows; /* the most rows that the next launch may have; 0: no launch may join */
};
#define CUDA_LORA_PAIR_ROWS  64
#define CUDA_LORA_PAIR_LD    (3 * CLAAS_RANK_MAX) /* for every weight: places are the same */
#define CUDA_LORA_PAIR_BYTES (2 * CUDA_LORA_PAIR_ROWS * CUDA_LORA_PAIR_LD * 2)
/* A NaN that rounding never gives: __float2bfloat16_rn turns every NaN into 0x7fff. */
#define CUDA_LORA_MISSING 0xffff

/* Queues a memset that makes m rows of both buffers missing; the first launch takes the first
 * buffer. It can be captured, but it is no kernel, so the kernel behind it does not start early. m
 * = 0, or CLAAS_CUDA_LORA=apart: nothing is queued, and no launch may join. */
int cuda_lora_begin(struct cuda_context *context, struct cuda_lora_pair *pair, int m);

/* The arguments of an operation: one weight of one layer over rows->m rows. Arrays that the
 * operation's formula above does not name may be NULL. */
struct cuda_lora {
    const struct cuda_lora_rows *rows;
    const struct cuda_weight *weight;
    enum cuda_weight_kind kind;
    int layer;
    int ld; /* of s and ds: at least the widest adapter's parts*R */
    const void *x;
    void *s;
    void *y;
    const void *dy;
    void *ds;
    void *dx;
    float *sums;                 /* few, in launches of its own: float32 [CUDA_LORA_PARTS][m][ld] */
    struct cuda_lora_pair *pair; /* few, beside the product, in place of s; or NULL */
};
/* Groups and tiles are read before launch_wait, and the few way's adapters too. So between the
 * kernels that wrote these and the launch, the stream must have a copy to the device, as at the
 * beginning of every pass: a copy is no kernel, and what is behind it does not begin early. */

/* S = x A^T */
int cuda_lora_shrink(struct cuda_context *context, const struct cuda_lora *lora);
/* y += S (sB)^T */
int cuda_lora_expand(struct cuda_context *context, const struct cuda_lora *lora);
/* dS = dY (sB) */
int cuda_lora_outer(struct cuda_context *context, const struct cuda_lora *lora);
/* gradients: dB += s dY^T S and dA += dS^T x, in one launch. input: dx += dS A, in another, which
 * runs beside it. */
int cuda_lora_inner(struct cuda_context *context, const struct cuda_lora *lora, bool gradients,
                    bool input);
/* Whether these rows go the few way, in which S depends on neither m nor the groups. Where it has
 * launches of its own, `sums` holds S: summed over the first dimension, then rounded. */
bool cuda_lora_is_few(const struct cuda_context *context, const struct cuda_lora *lora);

/* Whether these rows' LoRA may be done beside the frozen product (gemm_few.cu). */
bool cuda_lora_may_join(const struct cuda_context *context, const struct cuda_lora *lora);

/* --- for lora.c --- */

/* Whether acts are bf16, in whole pieces of 16 bytes, as the kernels on tensor cores need them. */
bool cuda_lora_is_even(const struct cuda_context *context, const struct cuda_lora *lora);
int cuda_lora_few_shrink(struct cuda_context *context, const struct cuda_lora *lora);
int cuda_lora_few_expand(struct cuda_context *context, const struct cuda_lora *lora);

enum cuda_lora_form {
    CUDA_LORA_S,
    CUDA_LORA_Y,
    CUDA_LORA_DS,
    CUDA_LORA_DB,
    CUDA_LORA_DA,
    CUDA_LORA_DX
};
#define CUDA_LORA_FORMS 2 /* the most in one launch: DB and DA */
/* Launches early (launch.cuh). beside: this is DX, directly behind DB and DA, and may run while
 * they do. */
int cuda_lora_grouped(struct cuda_context *context, const struct cuda_lora *lora,
                      const enum cuda_lora_form *forms, int count, bool beside);

#ifdef __cplusplus
}
#endif
#endif
