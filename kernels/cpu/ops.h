/* The CPU operation table: one row per operation, one table per precision, variants picked by CPU
 * features.
 *
 * Two precisions share every caller: an *act* (activation element) is a bfloat16 in the BF16 table
 * and a float in the F32 table; sizes in bytes come from ops->act_bytes. Sums are always float32.
 *
 * THE RULE that makes decode, chunked prefill and packed training agree bit for bit: the value of
 * an output element depends only on its own inputs and never on how many rows are computed
 * together, on the number of threads or on how the work was split. So every reduction runs in one
 * fixed order per element:
 *   - gemm sums over k in increasing pairs (k, k+1): one accumulator per output element, no split
 *   - row reductions (norms, log-sum-exp) use a fixed lane count and a fixed tree
 *   - attention walks the key blocks in increasing order, borders at multiples of 16 positions
 * Within one variant this is exact; between variants only to rounding.
 *
 * Panels. A weight W[N][K] (N out features, K in features) is stored as panels of 16 output lanes:
 *   BF16: [ceil(N/16)][ceil(K/2)][16][2] bf16   (lane-major pairs: what vdpbf16ps eats)
 *   F32:  [ceil(N/16)][K][16] float
 * Lanes beyond N and k beyond K are zero.
 *
 * Key/value blocks. One block holds 16 positions of one layer and one kv head: first K as a panel
 * with N = 16 positions, K = head_dim; then V as panels with N = head_dim outputs and K = 16
 * positions:
 *   BF16: K [head_dim/2][16][2], V [head_dim/16][8][16][2]
 *   F32:  K [head_dim][16],      V [head_dim/16][16][16]
 * head_dim is a multiple of 16. Positions not yet written hold zeros or old finite values (kv_store
 * sees to that); attention masks them. */
#ifndef CLAAS_CPU_OPS_H
#define CLAAS_CPU_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "claas/model.h"
#include "cpu/pool.h"

enum claas_precision { CLAAS_PRECISION_BF16, CLAAS_PRECISION_F32 };

#define CLAAS_LANES    16 /* output lanes of a panel */
#define CLAAS_KV_BLOCK 16 /* positions of a key/value block */

/* Attention's accumulators have this size; a back-end refuses a model with larger heads. */
#define CLAAS_HEAD_DIM_MAX 512

typedef uint16_t claas_bf16;

/* Round to nearest even, NaN kept; the inverse is exact. */
static inline claas_bf16 claas_to_bf16(float x)
{
    union {
        float f;
        uint32_t u;
    } v = {x};

    if ((v.u & 0x7fffffffu) > 0x7f800000u)
        return (claas_bf16)((v.u >> 16) | 0x40u);
    return (claas_bf16)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}
static inline float claas_from_bf16(claas_bf16 x)
{
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)x << 16};

    return v.f;
}

/* y[M][N] = round(start + X[M][K] W[N][K]^T (+ S[M][R] B[N][R]^T)), per element:
 * float acc = accumulate ? y32 : 0; acc += sum over k of X W; acc += sum over r of S B; then the
 * epilogue. `lora_s`/`lora_b` NULL = no second product. Exactly one of out32 and out is set.
 * `residual` (act, same ld as out) is added in float32 before rounding. `bias` [N] float32 is added
 * after the products. */
struct claas_gemm_args {
    int m, n, k;
    const void *x; /* act [m][ldx] */
    int ldx;
    const void *w;                     /* panels [N][K] */
    const struct claas_blocks *blocks; /* the same weight in the file's blocks, or NULL: used in
                                          place of w for few rows if that is faster; gives the same
                                          bits */
    const void *lora_s;                /* act [m][lds] */
    int lds;
    const void *lora_b; /* panels [N][R], scale already inside */
    int r;
    const float *bias;
    const void *residual;
    void *out;    /* act [m][ldo] */
    float *out32; /* float [m][ldo] */
    int ldo;
    bool accumulate; /* start from out32 */
};

/* dX[M][K] (+)= dY[M][N] W[N][K]: the same panels as gemm's, in the other direction. Sums over n in
 * increasing order. */
struct claas_gemm_dx_args {
    int m, n, k;
    const void *dy; /* act [m][ldy] */
    int ldy;
    const void *w; /* panels [N][K] */
    float *dx;     /* float [m][ldx] */
    int ldx;
    bool accumulate;
};

/* G[R][K] (+)= P[M][R]^T X[M][K], sums over the m rows in increasing order: LoRA's dA (P = dS, X =
 * x) and dB^T. */
struct claas_gemm_tn_args {
    int m, r, k;
    const void *p; /* act [m][ldp] */
    int ldp;
    const void *x; /* act [m][ldx] */
    int ldx;
    float *g; /* float [r][ldg] */
    int ldg;
    float scale; /* multiplies the sum before it is added */
    bool accumulate;
};

/* One run of consecutive queries of one sequence. */
struct claas_attn_run {
    int count;             /* queries */
    int pos;               /* position of the first one */
    const int32_t *blocks; /* block numbers of positions 0 … pos+count-1 */
    const void *q;         /* act [count][ldq], rotated; head h at q + h*head_dim */
    int ldq;
    void *out; /* act [count][ldo] */
    int ldo;
    float *lse; /* float [count][heads] or NULL: log sum exp of the scaled scores, for backward */
};

struct claas_attn_args {
    int heads, kv_heads, head_dim;
    float scale;
    const void *kv; /* this layer's blocks: block b, kv head g at (b*kv_heads + g)*kv_block_bytes */
    size_t kv_block_bytes;
    const struct claas_attn_run *runs;
    int n_runs;
};

/* Backward of one whole sequence (pos = 0): needs q, the K/V blocks, out, lse; gives dq, dk, dv
 * (float, written). */
struct claas_attn_bwd_args {
    int heads, kv_heads, head_dim;
    float scale;
    const void *kv;
    size_t kv_block_bytes;
    int count; /* tokens */
    const int32_t *blocks;
    const void *q, *out; /* act [count][ld] */
    int ldq, ldo;
    const float *lse; /* [count][heads] */
    const void *dout; /* act [count][lddo] */
    int lddo;
    float *dq; /* float [count][lddq], head h at h*head_dim */
    int lddq;
    float *dk, *dv; /* float [count][lddkv], kv head g at g*head_dim */
    int lddkv;
};

struct claas_adamw_args {
    size_t count;
    float *parameters, *exp_avg, *exp_avg_sq;
    const float *grad;
    float grad_scale; /* clip factor */
    float rate, beta1, beta2, eps, weight_decay;
    int64_t step; /* 1 for the first: bias correction */
};

/* A quantised weight regrouped for decoding; NULL where a type has no fast path. */
struct claas_blocks;

struct claas_ops {
    const char *name; /* "bf16-avx512bf16", "f32-ref", … */
    enum claas_precision precision;
    size_t act_bytes;

    /* --- weights --- */
    /* Writes the panel of the 16 rows from row 16*panel on: rows[j] = float[k] or NULL beyond N. */
    void (*pack_panel)(void *panels, int k, int panel, const float *const rows[CLAAS_LANES]);
    /* Row `row` of the panels as act (embedding look-up from a tied head). */
    void (*unpack_row)(const void *panels, int k, int row, void *out);
    void (*to_act)(const float *in, void *out, size_t count);
    void (*to_float)(const void *in, float *out, size_t count);

    /* --- matrix products (run over the pool) --- */
    void (*gemm)(claas_pool_t *pool, const struct claas_gemm_args *args);
    void (*gemm_dx)(claas_pool_t *pool, const struct claas_gemm_dx_args *args);
    void (*gemm_tn)(claas_pool_t *pool, const struct claas_gemm_tn_args *args);

    /* --- rows (run over the pool; m rows) --- */
    /* y = round(x * rstd * weight), rstd = 1/sqrt(mean(x^2) + eps) per row of d; rstd [m] may be
     * NULL. */
    void (*rmsnorm)(claas_pool_t *pool, int m, int d, const void *x, int ldx, const float *weight,
                    float eps, void *y, int ldy, float *rstd);
    /* dx[m][d] += rstd * (dy*weight - x * rstd^2 * mean(dy*weight*x)); x as given to rmsnorm; dy,
     * dx float. */
    void (*rmsnorm_bwd)(claas_pool_t *pool, int m, int d, const void *x, int ldx,
                        const float *weight, const float *rstd, const float *dy, int lddy,
                        float *dx, int lddx);
    /* In place on `heads` heads of each row: optional RMSNorm over head_dim (norm_weight NULL =
     * none, rstd [m][heads] or NULL), then half-split RoPE: (a, b) = (x[i], x[i+d/2]) -> (a cos - b
     * sin, b cos + a sin), computed in float32 and rounded once. `cos_sin`:
     * [context][head_dim/2][2] float; `pos` [m]. */
    void (*norm_rope)(claas_pool_t *pool, int m, int heads, int head_dim, void *x, int ldx,
                      const float *norm_weight, float eps, float *rstd, const float *cos_sin,
                      const int32_t *pos);
    /* Its backward, in place on float gradients; `x_raw` = act input of norm_rope (read only if
     * norm_weight). */
    void (*norm_rope_bwd)(claas_pool_t *pool, int m, int heads, int head_dim, float *dx, int lddx,
                          const void *x_raw, int ldx, const float *norm_weight, const float *rstd,
                          const float *cos_sin, const int32_t *pos);
    /* Puts keys and values (act [m][ldk], kv heads side by side) of position pos[i], block
     * blocks[i] into the layer's pool; positions are written whole (all kv heads). Rows of one
     * block lie side by side, in increasing positions. A call that begins a block also clears that
     * block behind the last position it writes there: attention multiplies what lies there by 0,
     * and what an earlier user left may be NaN. */
    void (*kv_store)(claas_pool_t *pool, int m, int kv_heads, int head_dim, const void *k,
                     const void *v, int ldk, const int32_t *pos, const int32_t *blocks, void *kv,
                     size_t kv_block_bytes);
    void (*attention)(claas_pool_t *pool, const struct claas_attn_args *args);
    void (*attention_bwd)(claas_pool_t *pool, const struct claas_attn_bwd_args *args);
    /* h = round(silu(gate) * up); rows of n, gate at x, up at x + n (act [m][ldx]). */
    void (*swiglu)(claas_pool_t *pool, int m, int n, const void *x, int ldx, void *h, int ldh);
    /* dgate, dup (act, written to dx at 0 and n) from dh (float [m][lddh]); also writes h again
     * (act), which dA needs, unless h is NULL. */
    void (*swiglu_bwd)(claas_pool_t *pool, int m, int n, const void *x, int ldx, const float *dh,
                       int lddh, void *dx, int lddx, void *h, int ldh);

    /* --- optimizer --- */
    /* Sum of squares in double, fixed order. */
    double (*sum_squares)(claas_pool_t *pool, const float *x, size_t count);
    void (*adamw)(claas_pool_t *pool, const struct claas_adamw_args *args);
};

/* The fastest table that this CPU runs; the environment variable CLAAS_CPU = ref | avx2 | avx512 |
 * avx512bf16 | amx forces a slower one (never one that the CPU cannot run). Never NULL: "ref"
 * always works. */
const struct claas_ops *claas_ops_pick(enum claas_precision precision);
/* All tables this CPU can run, for tests: index 0 is the reference. NULL past the end. */
const struct claas_ops *claas_ops_at(enum claas_precision precision, int index);

/* Bytes of the panels of a weight [n][k], and of a key/value block of one kv head. */
size_t claas_panel_bytes(enum claas_precision precision, int n, int k);
size_t claas_kv_block_bytes(enum claas_precision precision, int head_dim);

/* Blocks for decoding straight from the file's quantisation (BF16 only). 0 with *ret NULL if there
 * are none for the tensor's type or on this CPU. The values are bf16(dequantised), the same bits as
 * the panels. */
int claas_blocks_new(const struct claas_tensor *tensor, struct claas_blocks **ret);
/* The same for a fused weight: the rows of `count` tensors one after the other (q, k, v). */
int claas_blocks_new_fused(const struct claas_tensor *const *tensors, int count,
                           struct claas_blocks **ret);
void claas_blocks_free(struct claas_blocks **blocks);
size_t claas_blocks_bytes(const struct claas_blocks *blocks);

#endif
