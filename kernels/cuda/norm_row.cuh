/* How the squares of a row are added up in RMSNorm, and what becomes of its elements: norm.cu's
 * kernel and products that normalise the rows they read (few_rows.cuh) give the same bits.
 *
 * A row's chunks are dealt to one warp (n <= 1024) or to several: with W of them, chunk c is number
 * c / 32W of thread c % 32W. A thread adds up its chunks in order, lanes by a butterfly, then warps
 * by a butterfly. */
#ifndef CLAAS_CUDA_NORM_ROW_CUH
#define CLAAS_CUDA_NORM_ROW_CUH

#include "cuda/row_chunks.cuh"

#define NORM_THREADS   512 /* of a row at most: leaves 128 registers each */
#define NORM_WARPS     (NORM_THREADS / WARP)
#define NORM_ITEMS_MAX 4 /* chunks per thread */
#define NORM_N_MAX     (NORM_THREADS * NORM_ITEMS_MAX * CHUNK)

/* How the chunks of a row are dealt. */
struct norm_split {
    int items; /* chunks per thread: 1, 2 or 4 */
    int warps;
};

static inline struct norm_split norm_split_row(int n)
{
    const int chunks = divide_up(n, CHUNK);
    struct norm_split split = {1, 1};

    if (chunks <= WARP * NORM_ITEMS_MAX) {
        split.items = chunks <= WARP ? 1 : chunks <= 2 * WARP ? 2 : 4;
        return split;
    }
    split.items = chunks <= 2 * NORM_THREADS ? 2 : 4;
    split.warps = divide_up(divide_up(chunks, split.items), WARP);
    return split;
}

/* A thread's sum with the squares of one more chunk. Zeros leave it as it is. */
__device__ static inline float norm_add(float sum, const float v[CHUNK])
{
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        sum = __fmaf_rn(v[j], v[j], sum);
    return sum;
}

/* The row's sum from its warps' sums, lane i holding that of warp i, or 0. */
__device__ static inline float norm_join(float sum)
{
    return lanes_sum(sum, WARP);
}

__device__ static inline float norm_rstd(float sum, int n, float eps)
{
    return 1.0f / sqrtf(__fadd_rn(sum / (float)n, eps));
}

/* Products alone: nothing that a compiler could contract. */
__device__ static inline float norm_element(float x, float rstd, float w)
{
    return x * rstd * w;
}

#endif
