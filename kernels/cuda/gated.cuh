/* An element of SwiGLU's h = silu(gate) up, for every kernel that makes one: the same bits. */
#ifndef CLAAS_CUDA_GATED_CUH
#define CLAAS_CUDA_GATED_CUH

/* The sum is rounded by itself: contracted with expf's last product it would depend on the kernel
 * that it is compiled into. */
__device__ static inline float sigmoid(float x)
{
    return 1.0f / __fadd_rn(1.0f, expf(-x));
}

/* Products alone. s = sigmoid(gate). */
__device__ static inline float gated(float gate, float s, float up)
{
    return gate * s * up;
}

#endif
