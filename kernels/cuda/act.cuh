/* Elements of act, float or bfloat16, from and to float, and pairs of bfloat16 in a word. To
 * bfloat16 is to the nearest, ties to even. */
#ifndef CLAAS_CUDA_ACT_CUH
#define CLAAS_CUDA_ACT_CUH

#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

static __device__ __forceinline__ float widen(float x)
{
    return x;
}
static __device__ __forceinline__ float widen(bf16 x)
{
    return __bfloat162float(x);
}
static __device__ __forceinline__ void narrow(float *to, float x)
{
    *to = x;
}
static __device__ __forceinline__ void narrow(bf16 *to, float x)
{
    *to = __float2bfloat16_rn(x);
}

/* Two floats as bf16, a in the lower half. */
static __device__ __forceinline__ uint32_t pack_pair(float a, float b)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);

    return (uint32_t)__bfloat16_as_ushort(__low2bfloat16(pair)) |
           (uint32_t)__bfloat16_as_ushort(__high2bfloat16(pair)) << 16;
}

/* A pair of bf16 plus two floats, rounded once. */
static __device__ __forceinline__ uint32_t add_pair(uint32_t old, float low, float high)
{
    const float2 pair = __bfloat1622float2(*(const __nv_bfloat162 *)&old);

    return pack_pair(pair.x + low, pair.y + high);
}

#endif
