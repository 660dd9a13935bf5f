/* Gradient norm, clipping and AdamW, without the host: the step's decision "finite or not" is made
 * and acted on by the device. All pointers are device pointers; sums are of fixed order. */
#ifndef CLAAS_CUDA_OPTIMIZER_H
#define CLAAS_CUDA_OPTIMIZER_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CUDA_NORM_PARTS 1024

/* The result of a step for one adapter, on the device. */
struct cuda_learned {
    double norm; /* of the gradient before clipping */
    int finite;  /* losses and gradient */
    int pad;
};

/* ret->norm and, together with `losses` [count] (float32, may be NULL), ret->finite. parts:
 * scratch, double [CUDA_NORM_PARTS]. */
int cuda_measure_gradient(struct cuda_context *context, const float *grad, size_t count,
                          const float *losses, int loss_count, double *parts,
                          struct cuda_learned *ret);

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
