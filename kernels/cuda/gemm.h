/* Matrix products. Sums are float32 (float32 operands: no TF32), in an order that repeats.
 *
 * Few rows by a weight (gemm_few.h says which) are done by a kernel of ours, with the same bits for
 * a row whatever the number of rows. The rest is cuBLASLt's. Its algorithm is chosen once per
 * shape, by timing those that cuBLASLt proposes, and kept: for the context's life, and in a file
 * for later processes. */
#ifndef CLAAS_CUDA_GEMM_H
#define CLAAS_CUDA_GEMM_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

struct cuda_lora;

enum cuda_gemm_form {
    CUDA_GEMM_NT, /* out[m][n] = a[m][k] b[n][k]^T   x W^T */
    CUDA_GEMM_NN, /* out[m][n] = a[m][k] b[k][n]     dy W */
};

/* out = a b (+ add), on the device; a, b: act. */
struct cuda_gemm {
    enum cuda_gemm_form form;
    int m, n, k;
    const void *a, *b;
    int lda, ldb;
    void *out;
    int ldo;
    enum cuda_type out_type; /* the context's act, or float32 */
    const void *add;         /* [m][n] of out_type, row length ldo, not `out` itself; NULL: none */
    bool frozen; /* b never changes: it may be read before the work queued so far is done */
    /* NULL, or a LoRA to add (x and y are a and out): S = x A^T is made and S (sB)^T added, rounded
     * as if by launches of their own. Only if cuda_gemm_adds_lora; takes a turn of lora->pair. */
    const struct cuda_lora *lora;
};
/* Within a training step (context->turns) other passes may run inside of it, on the same stream: so
 * nothing may be left in the context's workspace across a call, and no kernel may rely on being
 * launched just behind another one with a call between them. */
int cuda_gemm(struct cuda_context *context, const struct cuda_gemm *gemm);
/* The most rows that take what was chosen for m rows. */
int cuda_gemm_class(int m);
/* Writes what was chosen to its file now. */
void cuda_gemm_keep(struct cuda_context *context);
/* Whether cuda_gemm can do this product with this LoRA in one launch. */
bool cuda_gemm_adds_lora(struct cuda_context *context, const struct cuda_gemm *gemm);
void cuda_gemm_plans_free(struct cuda_context *context);

#ifdef __cplusplus
}
#endif
#endif
