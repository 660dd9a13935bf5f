/* Tiles of attention on tensor cores: copies into shared memory, fragments, products.
 *
 * A tile is bf16 [rows][D], D = 64 or 128, in shared memory, swizzled (tiles.cuh). A warp owns 16
 * rows of a product (or MT times 16) and all of its columns, by mma.sync.m16n8k16 with float32
 * sums; lane l holds of a 16 x 8 result the columns 2 (l % 4) + {0, 1} of row l / 4 (elements 0, 1)
 * and of row l / 4 + 8 (elements 2, 3). The same layout, rounded to bf16, is the left operand of a
 * next product over those columns, so P and dS never leave the registers. Fragment layouts: PTX
 * ISA, "Matrix fragments for mma.m16n8k16".
 *
 * A row of a result depends on that row of the left tile alone and on the right tile: how rows are
 * put together in tiles never shows in the numbers. Key tiles begin at multiples of 64 positions of
 * the sequence, wherever its rows lie. */
#ifndef CLAAS_CUDA_ATTENTION_TILES_CUH
#define CLAAS_CUDA_ATTENTION_TILES_CUH

#include "cuda/attention_internal.h"
#include "cuda/tiles.cuh"

#define ATTN_WARPS   4
#define ATTN_THREADS (32 * ATTN_WARPS)
#define ATTN_KEYS    64 /* keys of a tile */

#define ATTN_LOG2E   1.4426950408889634f

/* --- instructions --- */

static __device__ __forceinline__ void copy_4(float *to, const float *from, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
                 : "memory");
}

/* 2^x, relative error 2^-22; 0 for -inf. */
static __device__ __forceinline__ float power_of_2(float x)
{
    float y;

    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* --- tiles --- */

/* Starts the copy of the keys and values at positions first … first+63; zeros beyond `last`, which
 * may be before `first`: behind it not even block numbers are looked up. */
template <int D>
static __device__ __forceinline__ void
load_keys(bf16 *k, bf16 *v, const struct attn_keys<bf16> &keys, int first, int last)
{
    constexpr int chunks = D / 8, rows = ATTN_THREADS / chunks;
    const int chunk = (int)threadIdx.x % chunks, row = (int)threadIdx.x / chunks;

#pragma unroll 4
    for (int i = 0; i < ATTN_KEYS / rows; i++) {
        const int r = row + i * rows, p = first + r;
        const bool valid = p <= last;
        const size_t at = attn_key_at(keys, min(p, last)) + (size_t)(chunk * 8);

        copy_16(k + place<D>(r, chunk), keys.k + at, valid);
        copy_16(v + place<D>(r, chunk), keys.v + at, valid);
    }
}

/* Starts the copy of `count` queries with the heads of a group: tile row i*group + h is head h of
 * matrix row first+i, at `base` + row*ld + h*D. Zeros beyond, up to M rows. */
template <int D, int M>
static __device__ __forceinline__ void load_queries(bf16 *tile, const bf16 *base, size_t ld,
                                                    int first, int count, int group)
{
    constexpr int chunks = D / 8, rows = ATTN_THREADS / chunks;
    const int chunk = (int)threadIdx.x % chunks, row = (int)threadIdx.x / chunks;

#pragma unroll 4
    for (int r = row; r < M; r += rows) {
        const bool valid = r < count * group;
        const int i = valid ? r / group : 0, h = valid ? r - i * group : 0;

        copy_16(tile + place<D>(r, chunk),
                base + (size_t)(first + i) * ld + (size_t)(h * D + chunk * 8), valid);
    }
}

/* c[mt][nt] += rows a_row+16 mt … of a times rows b_row+8 nt … of b, over D: a b^T. */
template <int D, int MT, int NT>
static __device__ __forceinline__ void product_nt(float (&c)[MT][NT][4], const bf16 *a, int a_row,
                                                  const bf16 *b, int b_row)
{
    const int lane = (int)threadIdx.x % 32;

#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t left[MT][4];

#pragma unroll
        for (int mt = 0; mt < MT; mt++)
            load_matrices(left[mt], a + place<D>(a_row + 16 * mt + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            uint32_t right[4];

            load_matrices(right, b + place<D>(b_row + 16 * n + lane % 8 + lane / 16 * 8,
                                              2 * k + lane / 8 % 2));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                multiply(c[mt][2 * n], left[mt], right[0], right[1]);
                multiply(c[mt][2 * n + 1], left[mt], right[2], right[3]);
            }
        }
    }
}

/* c[mt] (16 x D) += a[mt] (16 x 16 KT, in registers) times rows b_row … b_row+16 KT-1 of b. */
template <int D, int MT, int KT>
static __device__ __forceinline__ void
product_nn(float (&c)[MT][D / 8][4], const uint32_t (&a)[MT][KT][4], const bf16 *b, int b_row)
{
    const int lane = (int)threadIdx.x % 32;

#pragma unroll
    for (int k = 0; k < KT; k++) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t right[4];

            load_transposed(right, b + place<D>(b_row + 16 * k + lane % 16, 2 * n + lane / 16));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                multiply(c[mt][2 * n], a[mt][k], right[0], right[1]);
                multiply(c[mt][2 * n + 1], a[mt][k], right[2], right[3]);
            }
        }
    }
}

/* A result (16 x 8 NT) as the left operand of a product over its columns. */
template <int NT>
static __device__ __forceinline__ void as_operand(uint32_t (&a)[NT / 2][4], const float (&c)[NT][4])
{
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        a[k][0] = pack_pair(c[2 * k][0], c[2 * k][1]);
        a[k][1] = pack_pair(c[2 * k][2], c[2 * k][3]);
        a[k][2] = pack_pair(c[2 * k + 1][0], c[2 * k + 1][1]);
        a[k][3] = pack_pair(c[2 * k + 1][2], c[2 * k + 1][3]);
    }
}

/* Puts this warp's result (16 x D) into rows `row` … of a tile that no other warp uses, element 0,
 * 1 times low, 2, 3 times high. */
template <int D, int PANEL = 0>
static __device__ __forceinline__ void stage_rows(bf16 *tile, int row, const float (&c)[D / 8][4],
                                                  float low, float high)
{
    const int lane = (int)threadIdx.x % 32, r = row + lane / 4, within = 2 * (lane % 4);

#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        *(uint32_t *)(tile + place<D, PANEL>(r, n) + within) =
            pack_pair(c[n][0] * low, c[n][1] * low);
        *(uint32_t *)(tile + place<D, PANEL>(r + 8, n) + within) =
            pack_pair(c[n][2] * high, c[n][3] * high);
    }
}

/* Writes the warp's rows row … row+15 of a tile, those below `rows`, to the places that
 * load_queries reads. */
template <int D, int PANEL = 0>
static __device__ __forceinline__ void store_rows(bf16 *base, size_t ld, int first, int group,
                                                  const bf16 *tile, int row, int rows)
{
    constexpr int chunks = D / 8, step = 32 / chunks;
    const int lane = (int)threadIdx.x % 32, chunk = lane % chunks;

    __syncwarp();
#pragma unroll
    for (int j = 0; j < 16; j += step) {
        const int r = row + j + lane / chunks, i = r / group, h = r - i * group;

        if (r < rows)
            *(uint4 *)(base + (size_t)(first + i) * ld + (size_t)(h * D + chunk * 8)) =
                *(const uint4 *)(tile + place<D, PANEL>(r, chunk));
    }
}

#endif
