/* LoRA for few rows in launches of its own, bound by reading A and B once: what cannot be done
 * beside the frozen product (gemm_few.cu), which is more than 64 rows, and weights whose parts do
 * not begin at whole blocks. lora_few.cuh has tiles and arithmetic; both ways give the same bits.
 *
 * shrink_kernel: a chunk of K among the four warps of a block, which takes 16 rows of A at a time
 *   and joins the warps' sums through shared memory: float32 sums [chunk][m][ld].
 * expand_kernel: a block takes 128 rows of B; it begins to load them, then adds up the chunks of S
 *   in order, rounds S to bf16, and multiplies.
 *
 * Both begin while the kernel before them on the stream still ends (launch.cuh) and fetch what they
 * can of A or B meanwhile: adapters, groups and tiles were written before a copy to the device that
 * the pass began with. A row of a product follows from that row of the tile alone: the bits of a
 * row depend on neither the tile nor the pack. Grids follow from the number of tiles alone, which
 * is the pack's number of rows (the rest of the list is empty): launches can be replayed.
 *
 *   Qwen3-8B, rank 32, one adapter: q|k|v 786 + 393 KB, 48 + 48 blocks; 64 adapters: 3072 blocks.
 */
#include "cuda/launch.cuh"
#include "cuda/lora_few.cuh"

#define WARPS   4
#define THREADS (32 * WARPS)
#define SLAB    LORA_SLAB
#define AHEAD   4   /* times 32 terms of x in flight in a warp */
#define COLUMNS 128 /* rows of B of a block */
#define S_LD    (CLAAS_RANK_MAX + 8)

/* --- S = x A^T --- */

/* Sums this warp's terms k … end-1, of rows `a` … +15 of A, of which `rows` are there. x: the
 * tile's first row, which is waited for after the first terms of A have been asked for. */
static __device__ __forceinline__ void sum_slab(float (&sum)[2][4], const bf16 *x, int count,
                                                const bf16 *a, int rows, size_t ld, int k, int end)
{
    const int lane = (int)threadIdx.x % 32, r = lane / 4, term = 8 * (lane % 4);

    for (; k < end; k += 32 * AHEAD) {
        uint4 right[AHEAD][2], low[AHEAD], high[AHEAD];

#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const size_t at = (size_t)(k + 32 * i + term);
            const bool within = k + 32 * i + term < end;

#pragma unroll
            for (int n = 0; n < 2; n++)
                right[i][n] =
                    load_16(a + (size_t)(8 * n + r) * ld + at, within && 8 * n + r < rows);
        }
        launch_wait();
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const size_t at = (size_t)(k + 32 * i + term);
            const bool within = k + 32 * i + term < end;

            low[i] = load_16(x + (size_t)r * ld + at, within && r < count);
            high[i] = load_16(x + (size_t)(r + 8) * ld + at, within && r + 8 < count);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                multiply_32(sum[n], low[i], high[i], right[i][n]);
    }
}

/* blockIdx.y: tile; blockIdx.x: chunk, and the first of the slabs taken, `slabs` apart. */
static __global__ void __launch_bounds__(THREADS)
    shrink_kernel(const struct lora_args args, float *sums, int slabs)
{
    __shared__ float joined[WARPS][16][SLAB];
    const struct cuda_lora_tile tile = args.tiles[blockIdx.y];
    const int chunks = lora_chunks_of(args.k), part = lora_chunk_of(args.k) / WARPS;
    const int chunk = (int)blockIdx.x % chunks, warp = (int)threadIdx.x / 32;
    const int lane = (int)threadIdx.x % 32, k = (chunk * WARPS + warp) * part;

    launch_next();
    if (tile.count == 0) {
        launch_wait(); /* a grid that does not wait would be done before the work queued before
                          it */
        return;
    }
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const bf16 *view = (const bf16 *)group->view + (size_t)args.layer * group->layer;
    const bf16 *x = (const bf16 *)args.x + (size_t)tile.first * (size_t)args.k;
    const int width = group->parts[args.kind] * group->rank;

    for (int slab = (int)blockIdx.x / chunks * SLAB; slab < width; slab += slabs * SLAB) {
        float sum[2][4] = {};

        sum_slab(sum, x, tile.count, view + group->a[args.kind] + (size_t)slab * (size_t)args.k,
                 width - slab, (size_t)args.k, k, k + part < args.k ? k + part : args.k);
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 4; e++)
                joined[warp][lane / 4 + e / 2 * 8][8 * n + 2 * (lane % 4) + e % 2] = sum[n][e];
        __syncthreads();
        for (int e = (int)threadIdx.x; e < tile.count * SLAB; e += THREADS) {
            const int row = e / SLAB, column = e % SLAB;
            float total = joined[0][row][column];

            for (int w = 1; w < WARPS; w++)
                total += joined[w][row][column];
            if (slab + column < width)
                sums[((size_t)chunk * (size_t)args.m + (size_t)(tile.first + row)) *
                         (size_t)args.ld +
                     (size_t)(slab + column)] = total;
        }
        __syncthreads();
    }
    launch_wait();
}

/* --- y += S (sB)^T --- */

/* Gathers the tile's S of one part, rounded; zeros beyond its rows and the rank, up to 16 x
 * `terms`. */
static __device__ void gather_s(bf16 (*s)[S_LD], const struct lora_args &args, const float *sums,
                                const struct cuda_lora_tile &tile, int place, int rank, int terms)
{
    const int chunks = lora_chunks_of(args.k);
    const size_t chunk = (size_t)args.m * (size_t)args.ld;

    for (int e = (int)threadIdx.x; e < 16 * terms; e += THREADS) {
        const int row = e / terms, column = e % terms;
        const float *from =
            sums + (size_t)(tile.first + row) * (size_t)args.ld + (size_t)(place * rank + column);
        float part[CUDA_LORA_PARTS], total = 0.0f;

        if (row < tile.count && column < rank) {
#pragma unroll
            for (int i = 0; i < CUDA_LORA_PARTS; i++)
                part[i] = i < chunks ? from[(size_t)i * chunk] : 0.0f;
#pragma unroll
            for (int i = 0; i < CUDA_LORA_PARTS; i++)
                total += part[i];
        }
        s[row][column] = __float2bfloat16_rn(total);
    }
    __syncthreads();
}

/* What a lane adds to and multiplies: four times 8 columns. */
struct expand_lane {
    bf16 *y;        /* of row l / 4 of the tile, column 2 (l % 4) of the warp's first */
    const bf16 *b;  /* row l / 4 of the warp's first, term 8 (l % 4) */
    size_t ld;      /* of y */
    int rank, term; /* of b */
    int columns;    /* of the part, from the warp's first on */
    bool low, high; /* rows l / 4 and l / 4 + 8 are there */
};

static __device__ __forceinline__ void load_rows_of_b(uint4 (&b)[4], const expand_lane &lane, int k)
{
#pragma unroll
    for (int n = 0; n < 4; n++)
        b[n] = load_16(lane.b + (size_t)(8 * n) * (size_t)lane.rank + (size_t)k,
                       8 * n < lane.columns && lane.term + k < lane.rank);
}

static __device__ __forceinline__ void load_y(uint32_t (&y)[4][2], const expand_lane &lane)
{
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const bool there = 8 * n < lane.columns;

        y[n][0] = there && lane.low ? *(const uint32_t *)(lane.y + 8 * n) : 0;
        y[n][1] = there && lane.high ? *(const uint32_t *)(lane.y + 8 * lane.ld + 8 * n) : 0;
    }
}

static __device__ __forceinline__ void store_y(const expand_lane &lane, const uint32_t (&y)[4][2],
                                               const float (&sum)[4][4])
{
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const bool there = 8 * n < lane.columns;

        if (there && lane.low)
            *(uint32_t *)(lane.y + 8 * n) = add_pair(y[n][0], sum[n][0], sum[n][1]);
        if (there && lane.high)
            *(uint32_t *)(lane.y + 8 * lane.ld + 8 * n) = add_pair(y[n][1], sum[n][2], sum[n][3]);
    }
}

/* blockIdx.y: tile; blockIdx.x: COLUMNS rows of a part's B. */
static __global__ void __launch_bounds__(THREADS)
    expand_kernel(const struct lora_args args, const float *sums)
{
    __shared__ __align__(16) bf16 s[16][S_LD];
    const struct cuda_lora_tile tile = args.tiles[blockIdx.y];
    const int l = (int)threadIdx.x % 32, r = l / 4;
    int block = (int)blockIdx.x, part = lora_part_of(args, COLUMNS, 1, &block);
    const int first = block * COLUMNS + (int)threadIdx.x / 32 * (COLUMNS / WARPS);
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const int place = tile.count > 0 ? group->index[args.module[part]] : -1;

    launch_next();
    if (place < 0) {
        launch_wait();
        return;
    }
    const int rank = group->rank, terms = (rank + 31) / 32 * 32;
    expand_lane lane;
    uint4 b[4];
    uint32_t y[4][2];
    float sum[4][4] = {};

    lane.rank = rank;
    lane.term = 8 * (l % 4);
    lane.ld = (size_t)args.n;
    lane.columns = args.part_n[part] - first;
    lane.low = r < tile.count;
    lane.high = r + 8 < tile.count;
    lane.b = (const bf16 *)group->view + (size_t)args.layer * group->layer +
             group->b[args.module[part]] + (size_t)(first + r) * (size_t)rank + (size_t)lane.term;
    lane.y = (bf16 *)args.y + (size_t)(tile.first + r) * (size_t)args.n +
             (size_t)(args.row[part] + first + 2 * (l % 4));
    load_rows_of_b(b, lane, 0);
    launch_wait();
    load_y(y, lane);
    gather_s(s, args, sums, tile, place, rank, terms);
    for (int k = 0;;) {
        const uint4 low = *(const uint4 *)&s[r][k + lane.term];
        const uint4 high = *(const uint4 *)&s[r + 8][k + lane.term];

#pragma unroll
        for (int n = 0; n < 4; n++)
            multiply_32(sum[n], low, high, b[n]);
        k += 32;
        if (k >= terms)
            break;
        load_rows_of_b(b, lane, k);
    }
    store_y(lane, y, sum);
}

/* --- launches --- */

int cuda_lora_few_shrink(struct cuda_context *context, const struct cuda_lora *lora)
{
    const struct lora_args args = lora_args_of(lora);
    const int slabs = 2 * args.part_count;

    return launch(
        context, "LoRA", shrink_kernel,
        dim3((unsigned)(lora_chunks_of(args.k) * slabs), (unsigned)lora->rows->tile_count),
        dim3(THREADS), 0, args, lora->sums, slabs);
}

int cuda_lora_few_expand(struct cuda_context *context, const struct cuda_lora *lora)
{
    const struct lora_args args = lora_args_of(lora);
    unsigned blocks = 0;

    for (int i = 0; i < args.part_count; i++)
        blocks += (unsigned)(args.part_n[i] + COLUMNS - 1) / COLUMNS;
    return launch(context, "LoRA", expand_kernel, dim3(blocks, (unsigned)lora->rows->tile_count),
                  dim3(THREADS), 0, args, (const float *)lora->sums);
}
