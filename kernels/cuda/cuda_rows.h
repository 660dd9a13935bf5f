/* Operations on rows: embedding, norms, rotation, SwiGLU, copies. All pointers are device pointers.
 * Arithmetic is float32; what is stored as act is rounded once. Formulas are those of cpu/ops.h. */
#ifndef CLAAS_CUDA_CUDA_ROWS_H
#define CLAAS_CUDA_CUDA_ROWS_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[i] = table[tokens[i]], act [m][D]. */
int cuda_embed(struct cuda_context *context, int m, int d, const void *table, const int32_t *tokens,
               void *out);

/* y = x rstd weight, rstd = 1/sqrt(mean x^2 + eps). x, y: act [m][n]; rstd: [m] or NULL. */
int cuda_rmsnorm(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                 float eps, void *y, float *rstd);
/* dx += the gradient by the norm's input x, from dy (act [m][n]), that by its output; dx float
 * [m][n]. dx_act, if not NULL, gets the new dx rounded, act [m][n]. */
int cuda_rmsnorm_bwd(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                     const float *rstd, const void *dy, float *dx, void *dx_act);

/* Finishes q|k|v rows in place: adds the bias (or NULL), normalises each head of q and k (norm_q,
 * norm_k [d], or NULL), rotates them by cos_sin [context][d/2][2] at pos [m] (halves, as Llama
 * does). raw (or NULL): act [m][Nq+Nk], q and k with bias before the norm; rstd_q [m][H], rstd_k
 * [m][G] (or NULL). If kv is not NULL, keys and values also go into the layer's blocks: row i at
 * position pos[i] % 16 of block blocks[i]; see attention.h for the layout. */
struct cuda_qkv {
    int m, heads, kv_heads, head_dim;
    void *qkv; /* act [m][Nqkv] */
    const float *bias, *norm_q, *norm_k;
    float eps;
    const float *cos_sin;
    const int32_t *pos;
    void *raw;
    float *rstd_q, *rstd_k;
    void *kv;
    const int32_t *blocks;
};
int cuda_qkv_finish(struct cuda_context *context, const struct cuda_qkv *args);
/* The gradient back through rotation and norm, in place: dqkv act [m][Nqkv]. raw, rstd_q, rstd_k as
 * saved (NULL without norms); other fields of args as before, kv and bias unused. */
int cuda_qkv_finish_bwd(struct cuda_context *context, const struct cuda_qkv *args, void *dqkv);

/* h = silu(gate) up; gate_up act [m][2F], h act [m][F]. */
int cuda_swiglu(struct cuda_context *context, int m, int f, const void *gate_up, void *h);
/* dgu act [m][2F] from dh act [m][F]; h is written again, act [m][F]. */
int cuda_swiglu_bwd(struct cuda_context *context, int m, int f, const void *gate_up, const void *dh,
                    void *dgu, void *h);

/* out[i] = in[rows[i]]; act rows of n. */
int cuda_gather(struct cuda_context *context, int count, int n, const void *in, const int32_t *rows,
                void *out);
/* out[rows[i]] = in[i], every other row of out[m] zero; rows increasing. The first for act, the
 * second for float32. */
int cuda_spread(struct cuda_context *context, int m, int count, int n, const void *in,
                const int32_t *rows, void *out);
int cuda_spread_f32(struct cuda_context *context, int m, int count, int n, const float *in,
                    const int32_t *rows, float *out);
/* out[rows[i]] += in[i] in the order of i, for float32 rows of n; several i may name one row.
 * `starts` [targets+1] and `items` list, for each distinct row in turn, the i's that name it, in
 * order. */
int cuda_add_rows(struct cuda_context *context, int targets, int n, const int32_t *starts,
                  const int32_t *items, const int32_t *rows, const float *in, float *out);
/* float32 -> act. */
int cuda_to_act(struct cuda_context *context, size_t count, const float *in, void *out);

#ifdef __cplusplus
}
#endif
#endif
