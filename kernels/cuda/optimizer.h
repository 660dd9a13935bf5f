/* Gradient norm, clipping and AdamW. All pointers are device pointers; sums are of fixed order.
 *
 * The norm stays on the device, where the update clips by it; the host reads a copy. Whether a step
 * is applied is decided by the host, from the losses and the norms of all adapters (train.c). That
 * cuda_adamw skips a gradient that is not finite is a second guard. */
#ifndef CLAAS_CUDA_OPTIMIZER_H
#define CLAAS_CUDA_OPTIMIZER_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_NORM_PARTS 1024

/* The gradient of one adapter, before clipping. */
struct cuda_learned {
    double norm;
    int finite; /* whether the norm is */
};

/* Measures grad [count]. parts: scratch, double [CUDA_NORM_PARTS]. */
int cuda_measure_gradient(struct cuda_context *context, const float *grad, size_t count,
                          double *parts, struct cuda_learned *ret);

/* PyTorch's AdamW with clip_grad_norm_ (see cpu/optim_fast.h for the order of operations), skipped
 * where !learned->finite. */
struct cuda_adamw {
    size_t count;
    float *parameters, *exp_avg, *exp_avg_sq;
    const float *grad;
    float rate, beta1, beta2, eps, weight_decay, max_grad_norm;
    int64_t step; /* of this update, from 1 */
    const struct cuda_learned *learned;
};
int cuda_adamw(struct cuda_context *context, const struct cuda_adamw *args);

#ifdef __cplusplus
}
#endif
#endif
