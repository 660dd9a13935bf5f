/* LoRA's forms with few terms, which are added to what is there: y += S (sB)^T and dx += dS A
 * (lora_problem.cuh). They are bound by reading and writing y or dx.
 *
 * A block takes a tile of 64 rows and walks over `walk` tiles of 64 columns. Its rows of S or dS
 * stay in shared memory. The other operand comes in pieces of 64 terms by cp.async, two in flight,
 * and with the last piece of each tile of columns comes that tile of y or dx. All terms of an
 * element are one sum; it is added to y or dx in float32 and rounded once.
 *
 *   Shared memory: 8 KB for every 64 terms, 32 KB for the stages: five blocks on an SM up to 64
 *   terms, four up to 192 (three parts of rank 64). */
#ifndef CLAAS_CUDA_LORA_ADDS_CUH
#define CLAAS_CUDA_LORA_ADDS_CUH

#include "cuda/launch.cuh"
#include "cuda/lora_pieces.cuh"

#define WALK_MAX   8 /* tiles of columns */
#define ADD_STAGES 2 /* pieces in flight */

/* Where a block stands in its walk: at a piece of the tile of columns from j on. */
struct add_walk {
    int j, piece;
};

static __device__ __forceinline__ void add_next(struct add_walk *walk, int pieces)
{
    if (++walk->piece == pieces) {
        walk->piece = 0;
        walk->j += LORA_TILE;
    }
}

/* Asks for the piece at which the walk stands, into a stage; with a tile's last one for the tile of
 * y or dx, which goes behind it. */
template <bool TURNED>
static __device__ __forceinline__ void load_add(bf16 *stage, const lora_problem<bf16> &p,
                                                const struct add_walk &walk, int pieces)
{
    load_right<TURNED>(stage, p, walk.j, walk.piece * STEP);
    if (walk.piece == pieces - 1)
        load_piece(stage + PIECE, (const bf16 *)p.out + (size_t)walk.j, p.out_i, p.m, p.n - walk.j);
}

/* Adds the sums to the tile of y or dx that was copied into `tile`, and stores it from there, 16
 * bytes a thread: the sums' own layout would store 4. */
static __device__ __forceinline__ void add_rows(const lora_problem<bf16> &p, int j,
                                                const warp_sums &sum, bf16 *tile)
{
    const int chunk = team_thread() % 8, first = team_thread() / 8;

#pragma unroll
    for (int mt = 0; mt < 2; mt++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int row = warp_row() + 16 * mt, column = warp_column() + 16 * n;
            const auto &low = sum[mt][2 * n], &high = sum[mt][2 * n + 1];
            uint32_t old[4];

            left_operand<false>(old, tile, row, column);
            old[0] = add_pair(old[0], low[0], low[1]);
            old[1] = add_pair(old[1], low[2], low[3]);
            old[2] = add_pair(old[2], high[0], high[1]);
            old[3] = add_pair(old[3], high[2], high[3]);
            put_matrices(tile, row, column, old);
        }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64 * 8 / TEAM; i++) {
        const int r = first + i * (TEAM / 8);

        if (r < p.m && j + chunk * 8 < p.n)
            *(uint4 *)((bf16 *)p.out + (size_t)r * p.out_i + (size_t)(j + chunk * 8)) =
                *(const uint4 *)(tile + place<64>(r, chunk));
    }
}

/* TURNED: dx, whose right operand A is turned; else y. */
template <bool TURNED>
static __device__ __forceinline__ void add_columns(const lora_problem<bf16> &p, bf16 *shared)
{
    const int pieces = (p.k_end + STEP - 1) / STEP;
    const int tiles = (min(p.n, p.j_end) - p.j + LORA_TILE - 1) / LORA_TILE;
    bf16 *stages = shared + pieces * PIECE;
    struct add_walk walk = {p.j, 0}, ahead = walk;
    warp_sums sum = {};

    for (int i = 0, stage = 0; i < tiles * pieces + ADD_STAGES; i++) {
        bf16 *right = stages + stage * 2 * PIECE;

        if (i >= ADD_STAGES) { /* the piece asked for ADD_STAGES turns ago */
            copies_wait_but<ADD_STAGES - 1>();
            __syncthreads();
            multiply_pieces<TURNED>(sum, shared + walk.piece * PIECE, right,
                                    p.k_end - walk.piece * STEP);
            if (walk.piece == pieces - 1) {
                add_rows(p, walk.j, sum, right + PIECE);
#pragma unroll
                for (int e = 0; e < 32; e++)
                    sum[e / 16][e / 4 % 4][e % 4] = 0.0f;
            }
            add_next(&walk, pieces);
            __syncthreads(); /* all warps are done with the stage */
        }
        if (i < pieces)
            load_left<false>(shared + i * PIECE, p, i * STEP);
        if (i < tiles * pieces) {
            load_add<TURNED>(right, p, ahead, pieces);
            add_next(&ahead, pieces);
        }
        copies_commit();
        stage = stage + 1 == ADD_STAGES ? 0 : stage + 1;
    }
}

/* beside: this kernel comes behind the gradients' sum_kernel (and join_spans), and what it needs
 * was complete when sum_kernel let it begin. So its work does not wait; only its last block does,
 * at the end (launch.cuh). */
template <bool TURNED>
static __global__ void __launch_bounds__(TEAM, 5)
    add_kernel(const struct lora_args args, bool beside)
{
    extern __shared__ __align__(128) uint8_t shared[];
    lora_problem<bf16> p;
    const bool found = lora_find(args, &p);

    launch_next();
    if (!beside)
        launch_wait();
    if (found)
        add_columns<TURNED>(p, (bf16 *)shared);
    if (beside && blockIdx.x == gridDim.x - 1)
        launch_wait();
}

#endif
