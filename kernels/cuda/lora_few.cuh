/* LoRA for the few rows of a decoding step, on tensor cores: the arithmetic of lora_few.cu's
 * kernels, and of what is done in a frozen product's own launch (lora_join.cuh).
 *
 * A tile is at most 16 rows of one adapter: the 16 rows of an mma.sync.m16n8k16. Rows of A (and of
 * B) are its columns, 16 bytes a lane: lane l takes terms 8 (l % 4) … +7 of row l / 4, and the
 * tile's row l / 4 likewise. Two products then sum the 32 terms, the first elements 0-3 of every
 * lane, the second 4-7: in another order than they lie in, but the same one on both sides.
 *
 * S = x A^T. K is cut into at most CUDA_LORA_PARTS chunks, a chunk into quarters. A quarter is
 *   summed in the order of k, the quarters of a chunk are added in order, then the chunks, and the
 *   sum is rounded to bf16. Chunks follow from K alone.
 * y = bf16(y0 + S (sB)^T), y0 the frozen product, rounded: terms in the order of the rank.
 */
#ifndef CLAAS_CUDA_LORA_FEW_CUH
#define CLAAS_CUDA_LORA_FEW_CUH

#include "cuda/lora_problem.cuh"
#include "cuda/mma.cuh"

#define LORA_SLAB     16 /* rows of A at a time */
#define LORA_QUARTERS 4  /* of a chunk */

/* Terms of a chunk: each of its quarters is a multiple of 32. */
static __host__ __device__ __forceinline__ int lora_chunk_of(int k)
{
    const int step = 32 * LORA_QUARTERS, chunk = (k + CUDA_LORA_PARTS - 1) / CUDA_LORA_PARTS;

    return (chunk + step - 1) / step * step;
}
static __host__ __device__ __forceinline__ int lora_chunks_of(int k)
{
    return (k + lora_chunk_of(k) - 1) / lora_chunk_of(k);
}

/* Loads from the L2, past the L1: the kernel before this one may have written it while this one was
 * running already. */
static __device__ __forceinline__ uint4 load_16(const bf16 *from, bool valid)
{
    return valid ? __ldcg((const uint4 *)from) : make_uint4(0, 0, 0, 0);
}

/* sum (16 x 8) += 32 terms of the tile's rows l / 4 (low) and l / 4 + 8 (high), and of 8 rows. */
static __device__ __forceinline__ void multiply_32(float (&sum)[4], const uint4 &low,
                                                   const uint4 &high, const uint4 &right)
{
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};

    multiply(sum, first, right.x, right.y);
    multiply(sum, second, right.z, right.w);
}

#endif
