/* Products of few rows by weights: what decoding does. Bound by reading the weights, which is done
 * once; bfloat16 operands, float32 sums.
 *
 * An element of the result has the same bits whatever the number of rows, 1 to CUDA_GEMM_FEW_ROWS,
 * and wherever its row stands among them: the order of its sum follows from n, k and the card. */
#ifndef CLAAS_CUDA_GEMM_FEW_H
#define CLAAS_CUDA_GEMM_FEW_H

#include "cuda/gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_GEMM_FEW_ROWS 64

/* Once per context, before the first product. */
int cuda_gemm_few_open(struct cuda_context *context);
/* Whether cuda_gemm_few does this product: NT, bfloat16, 1 to 64 rows, n and k of 256 or more, rows
 * of a and b that begin at multiples of 16 bytes. */
bool cuda_gemm_few_suits(const struct cuda_context *context, const struct cuda_gemm *gemm);
/* Whether it also adds gemm->lora to a product that it does: in serving, where the parts of the
 * weight begin at multiples of 128 rows. */
bool cuda_gemm_few_adds(const struct cuda_context *context, const struct cuda_gemm *gemm);
/* One launch; neither allocates nor waits, so a graph can capture it. */
int cuda_gemm_few(struct cuda_context *context, const struct cuda_gemm *gemm);

#ifdef __cplusplus
}
#endif
#endif
