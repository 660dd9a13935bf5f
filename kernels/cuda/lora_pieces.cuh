/* Operands in pieces of 64 x 64 bf16 in shared memory, and the products of two of them by a team of
 * four warps: what LoRA's sums (lora_sums.cuh) and additions (lora_adds.cuh) are made of.
 *
 * A piece is a copy of 64 rows of memory, 64 elements (128 bytes) each, swizzled as wgmma.cuh has
 * it. A turned operand is copied the same way: ldmatrix or the warpgroup's product turns it. What
 * lies outside of the product is not read but filled with zeros. In multiply_pieces each warp makes
 * 32 x 32 of the team's 64 x 64, by mma.sync.m16n8k16 with float32 sums. */
#ifndef CLAAS_CUDA_LORA_PIECES_CUH
#define CLAAS_CUDA_LORA_PIECES_CUH

#include "cuda/lora_problem.cuh"
#include "cuda/tiles.cuh"

#define TEAM   128 /* threads */
#define STEP   64  /* terms of a piece */
#define PIECE  (64 * STEP)

static __device__ __forceinline__ int team_thread(void)
{
    return (int)threadIdx.x % TEAM;
}

/* Where this warp's 32 x 32 begin in the team's 64 x 64. */
static __device__ __forceinline__ int warp_row(void)
{
    return team_thread() / 64 * 32;
}
static __device__ __forceinline__ int warp_column(void)
{
    return team_thread() / 32 % 2 * 32;
}

/* Starts the copy of a piece; from row `rows` and from column `columns` (a multiple of 8) on, it
 * gets zeros. */
static __device__ __forceinline__ void load_piece(bf16 *piece, const bf16 *from, size_t ld,
                                                  int rows, int columns)
{
    const int chunk = team_thread() % 8, row = team_thread() / 8;
    const bf16 *at = from + (size_t)row * ld + (size_t)(chunk * 8);
    bf16 *to = piece + place<64>(row, chunk); /* 16 rows further the swizzle is the same */

    rows = chunk * 8 < columns ? rows - row : 0;
#pragma unroll
    for (int i = 0; i < 64 * 8 / TEAM; i++, at += TEAM / 8 * ld) {
        const bool valid = i * (TEAM / 8) < rows;

        copy_16(to + i * (TEAM / 8) * 64, valid ? at : from, valid);
    }
}

/* Terms k … k+63 of the left operand's rows from i on, and of the right one's from j on. */
template <bool TURNED>
static __device__ __forceinline__ void load_left(bf16 *piece, const lora_problem<bf16> &p, int k)
{
    if (TURNED)
        load_piece(piece, p.left + (size_t)k * p.ld_left + (size_t)p.i, p.ld_left, p.k_end - k,
                   p.m - p.i);
    else
        load_piece(piece, p.left + (size_t)p.i * p.ld_left + (size_t)k, p.ld_left, p.m - p.i,
                   p.k_end - k);
}
template <bool TURNED>
static __device__ __forceinline__ void load_right(bf16 *piece, const lora_problem<bf16> &p, int j,
                                                  int k)
{
    if (TURNED)
        load_piece(piece, p.right + (size_t)k * p.ld_right + (size_t)j, p.ld_right, p.k_end - k,
                   p.n - j);
    else
        load_piece(piece, p.right + (size_t)j * p.ld_right + (size_t)k, p.ld_right, p.n - j,
                   p.k_end - k);
}

/* Rows row … row+15 of the left piece, terms k … k+15. */
template <bool TURNED>
static __device__ __forceinline__ void left_operand(uint32_t (&to)[4], const bf16 *piece, int row,
                                                    int k)
{
    const int lane = (int)threadIdx.x % 32;

    if (TURNED)
        load_transposed(to,
                        piece + place<64>(k + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
    else
        load_matrices(to, piece + place<64>(row + lane % 16, k / 8 + lane / 16));
}

/* Columns column … column+15 of the right piece: two fragments side by side. */
template <bool TURNED>
static __device__ __forceinline__ void right_operand(uint32_t (&to)[4], const bf16 *piece,
                                                     int column, int k)
{
    const int lane = (int)threadIdx.x % 32;

    if (TURNED)
        load_transposed(to, piece + place<64>(k + lane % 16, column / 8 + lane / 16));
    else
        load_matrices(to,
                      piece + place<64>(column + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}

/* A warp's 32 x 32 of a result: lane l holds columns 2 (l % 4) + {0, 1} of row l / 4 (elements 0,
 * 1) and l / 4 + 8 (2, 3), in each of 2 x 4 fragments of 16 x 8. */
typedef float warp_sums[2][4][4];

/* sum += left right^T over the first `terms` terms of the pieces, or all 64. */
template <bool TURNED_RIGHT>
static __device__ __forceinline__ void multiply_pieces(warp_sums &sum, const bf16 *left,
                                                       const bf16 *right, int terms)
{
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
        uint32_t rows[2][4];

        if (k >= terms)
            break;
#pragma unroll
        for (int mt = 0; mt < 2; mt++)
            left_operand<false>(rows[mt], left, warp_row() + 16 * mt, k);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t columns[4];

            right_operand<TURNED_RIGHT>(columns, right, warp_column() + 16 * n, k);
#pragma unroll
            for (int mt = 0; mt < 2; mt++) {
                multiply(sum[mt][2 * n], rows[mt], columns[0], columns[1]);
                multiply(sum[mt][2 * n + 1], rows[mt], columns[2], columns[3]);
            }
        }
    }
}

/* The inverse of left_operand<false>: puts 16 x 16 into a piece. */
static __device__ __forceinline__ void put_matrices(bf16 *piece, int row, int column,
                                                    const uint32_t (&from)[4])
{
    const int lane = (int)threadIdx.x % 32;

#if __CUDA_ARCH__ >= 900
    bf16 *at = piece + place<64>(row + lane % 16, column / 8 + lane / 16);

    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(at)),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; i++)
        *(uint32_t *)(piece + place<64>(row + lane / 4 + i % 2 * 8, column / 8 + i / 2) +
                      2 * (lane % 4)) = from[i];
#endif
}

#endif
