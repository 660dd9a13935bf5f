/* Matrix products. Sums are float32 (float32 operands: no TF32), in an order that repeats.
 *
 * Few rows by a weight (gemm_few.h says which) are an own kernel's, with the same bits for a row
 * whatever the number of rows. The rest is cuBLASLt's, by an algorithm chosen once per shape by
 * timing those that it proposes, and kept: for the context's life, and in a file for later ones. */
#ifndef CLAAS_CUDA_GEMM_H
#define CLAAS_CUDA_GEMM_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

enum cuda_gemm_form {
    CUDA_GEMM_NT, /* out[m][n] = a[m][k] b[n][k]^T   x W^T */
    CUDA_GEMM_NN, /* out[m][n] = a[m][k] b[k][n]     dy W */
    CUDA_GEMM_TN, /* out[m][n] = a[k][m]^T b[k][n]   p^T x: gradients */
};

/* What the rows of a product are made of. But for plain ones the product makes them itself, rounded
 * to act, with the bits of the operation named: a few rows of NT (cuda_gemm_makes). */
enum cuda_gemm_source {
    CUDA_GEMM_PLAIN,
    CUDA_GEMM_NORMED, /* a [m][k], by cuda_rmsnorm with `norm` and `eps` */
    CUDA_GEMM_GATED,  /* a [m][2k], gate | up, by cuda_swiglu */
};

/* out = alpha a b + beta add; a, b, add: act (device). */
struct cuda_gemm {
    enum cuda_gemm_form form;
    int m, n, k;
    const void *a, *b;
    int lda, ldb;
    void *out;
    int ldo;
    enum cuda_type out_type; /* the context's act, or float32 */
    float alpha;
    float beta;      /* 0: `add` is not read */
    const void *add; /* [m][n] of out_type, row length ldo; NULL = out itself */
    bool frozen;     /* b never changes: it may be read before the work queued so far is done */
    enum cuda_gemm_source source;
    const float *norm; /* [k] */
    float eps;
};
/* Whether cuda_gemm should be given rows to make (not with CLAAS_CUDA_FUSE=0). It refuses those
 * that it cannot make, or that would cost more than they save: INTERNAL. */
bool cuda_gemm_makes(struct cuda_context *context, const struct cuda_gemm *gemm);
int cuda_gemm(struct cuda_context *context, const struct cuda_gemm *gemm);
void cuda_gemm_plans_free(struct cuda_context *context);

#ifdef __cplusplus
}
#endif
#endif
