/* What the operations on rows (norm.cu, qkv.cu, swiglu.cu, rows.cu) share. All of them are bound by
 * memory: each reads its rows once, keeps them in registers, computes in float32 and writes once.
 *
 * A row is cut into chunks of 8 consecutive elements, the work of one thread at a time: 16 bytes in
 * bfloat16, 32 in float32. Where n is a multiple of 8 and the pointers are 16-byte aligned, a chunk
 * is moved by 16-byte loads and stores, else element by element; which thread has which chunk is
 * the same in both, and so are the sums. */
#ifndef CLAAS_CUDA_ROW_CHUNKS_CUH
#define CLAAS_CUDA_ROW_CHUNKS_CUH

#include "cuda/act.cuh"
#include "cuda/context.h"
#include "cuda/sizes.cuh"

#define ROW_CHUNK   8
#define ROW_THREADS 256

/* p[0 … 8) as float; without VECTOR only p[0 … valid), the rest zero. */
template <bool VECTOR>
__device__ static inline void load8(const float *p, int valid, float v[ROW_CHUNK])
{
    if constexpr (VECTOR) {
        const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];

        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            v[j] = j < valid ? p[j] : 0.0f;
    }
}

template <bool VECTOR>
__device__ static inline void load8(const __nv_bfloat16 *p, int valid, float v[ROW_CHUNK])
{
    if constexpr (VECTOR) {
        const uint4 raw = *(const uint4 *)p;
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[2 * j] = __uint_as_float(words[j] << 16);
            v[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            v[j] = j < valid ? widen(p[j]) : 0.0f;
    }
}

template <bool VECTOR>
__device__ static inline void store8(float *p, int valid, const float v[ROW_CHUNK])
{
    if constexpr (VECTOR) {
        ((float4 *)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            if (j < valid)
                p[j] = v[j];
    }
}

template <bool VECTOR>
__device__ static inline void store8(__nv_bfloat16 *p, int valid, const float v[ROW_CHUNK])
{
    if constexpr (VECTOR) {
        *(uint4 *)p = make_uint4(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]),
                                 pack_pair(v[4], v[5]), pack_pair(v[6], v[7]));
    } else {
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            if (j < valid)
                narrow(p + j, v[j]);
    }
}

/* Rounds v to what an array of T would hold. In pairs, since a lone conversion to bfloat16 is four
 * times as slow. */
__device__ static inline void round8(float *, const float *)
{
}
__device__ static inline void round8(float v[ROW_CHUNK], const __nv_bfloat16 *)
{
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j += 2) {
        const uint32_t pair = pack_pair(v[j], v[j + 1]);

        v[j] = __uint_as_float(pair << 16);
        v[j + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}

/* The sum over aligned groups of `width` lanes (a power of two), the same bits in each of them. All
 * lanes of the warp must come here. */
__device__ static inline float lanes_sum(float sum, int width)
{
    for (int step = width / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

#endif
