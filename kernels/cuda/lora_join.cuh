/* LoRA beside a frozen product of few rows, in the product's own launch (gemm_few.cu); the arithmetic
 * is lora_few.cuh's.
 *
 * The grid's first blocks make S, a slab of 16 of its columns at a time for one tile: warp c takes
 * chunk c of K. A comes through a ring of a lane's own pieces in shared memory, which runs on from
 * slab to slab and is filled before x is waited for. A slab that is stored is counted in turns[0].
 *
 * The product's blocks do their sums meanwhile. Towards the end of k their ring has room for the
 * rows of B that meet the block's columns, and, when turns[0] says that all of S is there, for S.
 * A warp takes 32 columns of one tile after another; B too comes as a lane's own pieces.
 *
 * Who waits: a product's block for blocks of lower number in its own grid, and those for none.
 * Blocks are handed out in the order of their numbers (which cuBLAS and CUTLASS rely on where they
 * split k), so when one waits the others run or are done. Besides, there are no more of them than
 * find room beside the product's, as long as those of the product alone do. Kernels before this one
 * are all running when it begins (launch.cuh) and need nothing of it; later ones begin when all of
 * its blocks run. turns[1] counts the product's blocks that have seen S; with the last of them both
 * become zero for the next launch, which counts only when this one is done. A launch that is cut
 * short leaves them wrong, but what cuts it short (a sticky error) ends the context too. */
#ifndef CLAAS_CUDA_LORA_JOIN_CUH
#define CLAAS_CUDA_LORA_JOIN_CUH

#include "cuda/launch.cuh"
#include "cuda/lora_few.cuh"

/* --- who has what --- */

#define LORA_WARPS   8 /* of a block, and at least as many as there are chunks */
#define LORA_THREADS (32 * LORA_WARPS)
#define LORA_LINES   64 /* rows of a pack, so tiles too */
#define LORA_NOBODY  0xff

struct lora_join {
    struct lora_args args;
    unsigned *turns; /* [2]: slabs made, blocks that have seen them all */
    int blocks;      /* that make S, the first of the grid: whole clusters */
};

/* One tile, as those see it who make S of all the weight's parts, or add one part. */
struct lora_line {
    const bf16 *from; /* the first row of A, or of B; NULL: the adapter has none */
    int first, count; /* rows of the pack */
    int size;         /* rows of A, or terms of a row of B: the rank */
    int column;       /* of S, which B's first term meets */
};
/* In shared memory. used and slabs are counted by halves of the list. */
struct lora_lines {
    struct lora_line line[LORA_LINES];
    int used[2];            /* tiles that there are: the first ones */
    int slabs[2];           /* of S, of all the weight's parts */
    uint8_t of[LORA_LINES]; /* the line that a row of the pack has, or LORA_NOBODY */
};

static __device__ __forceinline__ int lora_slabs_of(int width)
{
    return (width + LORA_SLAB - 1) / LORA_SLAB;
}

/* Line t, and how many slabs its tile has. module: B's, or -1: A. */
static __device__ __forceinline__ int
lora_read_line(struct lora_line *line, const struct lora_args &args, int t, int module)
{
    const struct cuda_lora_tile tile = args.tiles[t];

    if (tile.count == 0)
        return 0;
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const bf16 *view = (const bf16 *)group->view + (size_t)args.layer * group->layer;
    const int width = group->parts[args.kind] * group->rank;

    line->first = tile.first;
    line->count = tile.count;
    if (module < 0) {
        line->from = width > 0 ? view + group->a[args.kind] : NULL;
        line->size = width;
    } else if (group->index[module] >= 0) {
        line->from = view + group->b[module];
        line->size = group->rank;
        line->column = group->index[module] * group->rank;
    }
    return lora_slabs_of(width);
}

/* By all threads, the last warps doing it, since the first ones ask for the product's rows; a
 * barrier makes the list everybody's. The pack's description and the adapters were written before a
 * copy to the device, which no early start overtakes: they may be read before launch_wait. */
static __device__ __forceinline__ void lora_list(struct lora_lines *lines,
                                                 const struct lora_args &args, int module)
{
    const int t = (int)threadIdx.x - (LORA_THREADS - LORA_LINES);
    struct lora_line line = {};
    int slabs = 0;

    if (t >= 0)
        lines->of[t] = LORA_NOBODY;
    __syncthreads();
    if (t < 0)
        return;
    if (t < args.m)
        slabs = lora_read_line(&line, args, t, module);
    lines->line[t] = line;
    for (int row = 0; row < line.count && line.from; row++)
        lines->of[line.first + row] = (uint8_t)t;
    slabs = __reduce_add_sync(~0u, slabs);
    const unsigned used = __ballot_sync(~0u, line.count > 0);

    if (t % 32 == 0) {
        lines->used[t / 32] = __popc(used);
        lines->slabs[t / 32] = slabs;
    }
}

static __device__ __forceinline__ int lora_used(const struct lora_lines *lines)
{
    return lines->used[0] + lines->used[1];
}

/* --- S = x A^T --- */

/* Shared memory of a block that makes S: the chunks' sums, then each warp's ring of STEPS times 32
 * terms of A, 1 KB each. With many adapters S waits for memory as the product does, and what a block
 * has on its way is its share of it: STEPS are as many as fit. */
#define LORA_SUMS_BYTES          (CUDA_LORA_PARTS * 16 * LORA_SLAB * 4)
#define LORA_STEPS_IN(bytes)     (((bytes)-LORA_SUMS_BYTES) / (LORA_WARPS * 1024))

/* A slab of a tile, and what a warp of it asks for next: the terms from k on of its chunk. */
struct lora_feed {
    int line, slab, k;
    int rows;      /* of the slab, if below 16 */
    const bf16 *a; /* row l / 4 of the slab, term 8 (l % 4) */
};

/* To the slab that lies `by` further. */
static __device__ __forceinline__ void lora_seek(const struct lora_lines *lines, int by, int *line,
                                                 int *slab)
{
    const int used = lora_used(lines);

    for (*slab += by; *line < used; (*line)++) {
        const int slabs = lora_slabs_of(lines->line[*line].size);

        if (*slab < slabs)
            return;
        *slab -= slabs;
    }
}

static __device__ __forceinline__ void
lora_aim(struct lora_feed *feed, const struct lora_lines *lines, int by, int begin, int k)
{
    const int lane = (int)threadIdx.x % 32;

    lora_seek(lines, by, &feed->line, &feed->slab);
    feed->k = begin;
    if (feed->line >= lora_used(lines))
        return;
    const struct lora_line *line = &lines->line[feed->line];
    const int row = feed->slab * LORA_SLAB;

    feed->rows = line->size - row;
    feed->a = line->from + (size_t)(row + lane / 4) * (size_t)k + (size_t)(8 * (lane % 4));
}

/* Starts the copy of the next 32 terms of the 16 rows, or of nothing after the last: a group of
 * copies in either case. begin, end: the warp's chunk of the k terms of a row. */
static __device__ __forceinline__ void lora_ask(struct lora_feed *feed,
                                                const struct lora_lines *lines, int blocks,
                                                int begin, int end, int k, uint4 *slot)
{
    const int lane = (int)threadIdx.x % 32, row = lane / 4;

    if (begin < k && feed->line < lora_used(lines)) {
        const bool within = feed->k + 8 * (lane % 4) < k;
        const bool low = within && row < feed->rows, high = within && row + 8 < feed->rows;

        copy_16_of_many(slot + lane, feed->a + (low ? feed->k : 0), low);
        copy_16_of_many(slot + 32 + lane, feed->a + (high ? (size_t)8 * k + feed->k : 0), high);
        feed->k += 32;
        if (feed->k >= end)
            lora_aim(feed, lines, blocks, begin, k);
    }
    copies_commit();
}

/* total = the warp's chunk of a slab; x: the tile's row l / 4, term 8 (l % 4). */
template <int STEPS>
static __device__ __forceinline__ void lora_sum_chunk(float (&total)[2][4],
                                                      const struct lora_lines *lines, const bf16 *x,
                                                      int count, int blocks, int begin, int end,
                                                      int k, uint4 *ring, int *slot,
                                                      struct lora_feed *feed)
{
    const int lane = (int)threadIdx.x % 32, row = lane / 4;
    const int quarter = (end - begin) / LORA_QUARTERS;

    for (int from = begin; from < end; from += quarter) {
        float sum[2][4] = {};

        for (int at = from; at < from + quarter; at += 32 * LORA_AHEAD) {
            uint4 low[LORA_AHEAD], high[LORA_AHEAD];

#pragma unroll
            for (int i = 0; i < LORA_AHEAD; i++) {
                const int term = at + 32 * i;
                const bool within = term < from + quarter && term + 8 * (lane % 4) < k;

                low[i] = load_16(x + term, within && row < count);
                high[i] = load_16(x + (size_t)8 * k + term, within && row + 8 < count);
            }
#pragma unroll
            for (int i = 0; i < LORA_AHEAD; i++)
                if (at + 32 * i < from + quarter) {
                    uint4 *piece = ring + *slot * 64;

                    copies_wait_but<STEPS - 1>();
                    multiply_32(sum[0], low[i], high[i], piece[lane]);
                    multiply_32(sum[1], low[i], high[i], piece[32 + lane]);
                    lora_ask(feed, lines, blocks, begin, end, k, piece);
                    *slot = *slot + 1 < STEPS ? *slot + 1 : 0;
                }
        }
        for (int n = 0; n < 2; n++)
            for (int e = 0; e < 4; e++)
                total[n][e] = from == begin ? sum[n][e] : total[n][e] + sum[n][e];
    }
}

/* The chunks' sums, added in order, rounded and counted. By all threads: one element each. */
static __device__ __forceinline__ void lora_store_slab(const struct lora_join &join,
                                                       const struct lora_line &line, int slab,
                                                       const float (&total)[2][4],
                                                       float (*sums)[16][LORA_SLAB])
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int row = (int)threadIdx.x / LORA_SLAB, column = (int)threadIdx.x % LORA_SLAB;
    float sum = 0.0f;

    for (int n = 0; n < 2; n++)
        for (int e = 0; e < 4; e++)
            sums[warp][lane / 4 + e / 2 * 8][8 * n + 2 * (lane % 4) + e % 2] = total[n][e];
    __syncthreads();
    for (int c = 0; c < CUDA_LORA_PARTS; c++)
        sum += sums[c][row][column];
    if (row < line.count && slab * LORA_SLAB + column < line.size)
        ((bf16 *)join.args.s)[(size_t)(line.first + row) * (size_t)join.args.ld +
                              (size_t)(slab * LORA_SLAB + column)] = __float2bfloat16_rn(sum);
    __syncthreads(); /* all have stored, and nobody reads the sums any more */
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&join.turns[0], 1u);
    }
}

/* A block that makes S: slabs blockIdx.x, + join.blocks, … */
template <int STEPS>
static __device__ __forceinline__ void lora_shrink(const struct lora_join &join, void *shared,
                                                   struct lora_lines *lines)
{
    static_assert(CUDA_LORA_PARTS == LORA_WARPS, "a warp takes a chunk");
    static_assert(16 * LORA_SLAB == LORA_THREADS, "a thread adds up an element");
    const int k = join.args.k, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int begin = warp * lora_chunk_of(k), end = begin + lora_chunk_of(k);
    uint4 *ring = (uint4 *)((uint8_t *)shared + LORA_SUMS_BYTES) + warp * STEPS * 64;
    struct lora_feed feed = {};
    int line = 0, slab = 0, slot = 0;

    launch_next();
    lora_list(lines, join.args, -1);
    __syncthreads();
    lora_aim(&feed, lines, (int)blockIdx.x, begin, k);
    lora_seek(lines, (int)blockIdx.x, &line, &slab);
    for (int i = 0; i < STEPS; i++)
        lora_ask(&feed, lines, join.blocks, begin, end, k, ring + i * 64);
    launch_wait();
    while (line < lora_used(lines)) {
        const struct lora_line *now = &lines->line[line];
        const bf16 *x = (const bf16 *)join.args.x + (size_t)(now->first + lane / 4) * (size_t)k +
                        (size_t)(8 * (lane % 4));
        float total[2][4] = {};

        if (begin < k)
            lora_sum_chunk<STEPS>(total, lines, x, now->count, join.blocks, begin, end, k, ring,
                                  &slot, &feed);
        lora_store_slab(join, *now, slab, total, (float(*)[16][LORA_SLAB])shared);
        lora_seek(lines, join.blocks, &line, &slab);
    }
}

/* --- S (sB)^T --- */

#define LORA_ITEM (32 * 32 * 2) /* bytes of B that a warp takes at a time: 32 columns, 32 terms */

/* The columns of a part that a block of the product stores, and how a warp goes through them: unit
 * u is tile u >> shift and the 32 columns u % (1 << shift). */
struct lora_share {
    int module;
    int first; /* row of the part's B */
    int left;  /* rows of it from there on */
    int width; /* columns: 128 over the size of the cluster */
    int shift;
};

/* Of `width` columns from column `first` of the weight on, which begin in one part. */
static __device__ __forceinline__ struct lora_share lora_share_of(const struct lora_args &args,
                                                                  int first, int width)
{
    struct lora_share share = {args.module[0], first, args.part_n[0] - first, width, 0};

#pragma unroll
    for (int i = 1; i < CUDA_PARTS_MAX; i++)
        if (i < args.part_count && first >= args.row[i]) {
            share.module = args.module[i];
            share.first = first - args.row[i];
            share.left = args.part_n[i] - share.first;
        }
    share.shift = width > 64 ? 2 : width > 32 ? 1 : 0;
    return share;
}

/* What a warp multiplies next: terms k … k+31 of a unit. */
struct lora_place {
    int unit, k;
};

static __device__ __forceinline__ int lora_units(const struct lora_lines *lines,
                                                 const struct lora_share &share)
{
    return lora_used(lines) << share.shift;
}
/* Units of adapters without the module are passed over. */
static __device__ __forceinline__ void lora_settle(const struct lora_lines *lines,
                                                   const struct lora_share &share,
                                                   struct lora_place *place)
{
    const int units = lora_units(lines, share);

    while (place->unit < units && !lines->line[place->unit >> share.shift].from)
        place->unit += LORA_WARPS;
}
static __device__ __forceinline__ void lora_advance(const struct lora_lines *lines,
                                                    const struct lora_share &share,
                                                    struct lora_place *place)
{
    place->k += 32;
    if (place->k < lines->line[place->unit >> share.shift].size)
        return;
    place->k = 0;
    place->unit += LORA_WARPS;
    lora_settle(lines, share, place);
}

/* Starts the copy of B at `place`, if there is any, and moves on. slot: LORA_ITEM bytes. */
static __device__ __forceinline__ void lora_ask_b(const struct lora_lines *lines,
                                                  const struct lora_share &share,
                                                  struct lora_place *place, uint4 *slot)
{
    const int lane = (int)threadIdx.x % 32, term = place->k + 8 * (lane % 4);

    if (place->unit >= lora_units(lines, share))
        return;
    const struct lora_line *line = &lines->line[place->unit >> share.shift];
    const int group = place->unit & ((1 << share.shift) - 1);

#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int column = 32 * group + 8 * n + lane / 4;
        const bool valid = column < share.width && column < share.left && term < line->size;

        copy_16(
            slot + 32 * n + lane,
            line->from +
                (valid ? (size_t)(share.first + column) * (size_t)line->size + (size_t)term : 0),
            valid);
    }
    lora_advance(lines, share, place);
}

/* Where the 8 terms `piece` of a row of S lie: rows of CLAAS_RANK_MAX terms, swizzled so that eight
 * lanes that read four pieces of two rows do not collide. */
static __device__ __forceinline__ int lora_s_at(int row, int piece)
{
    return row * (CLAAS_RANK_MAX / 8) + (piece ^ (row & 1) << 2);
}
#define LORA_S_BYTES(rows) ((rows)*CLAAS_RANK_MAX * 2)

/* Starts the copy of the rows of S, as many terms as the rank and zeros up to a multiple of 32. */
static __device__ __forceinline__ void lora_ask_s(const struct lora_args &args,
                                                  const struct lora_lines *lines, uint4 *s)
{
    const int pieces = CLAAS_RANK_MAX / 8;

    for (int i = (int)threadIdx.x; i < args.m * pieces; i += LORA_THREADS) {
        const int row = i / pieces, piece = i % pieces, of = lines->of[row];

        if (of == LORA_NOBODY)
            continue;
        const struct lora_line *line = &lines->line[of];
        const bool valid = 8 * piece < line->size;

        if (8 * piece < (line->size + 31) / 32 * 32)
            copy_16(s + lora_s_at(row, piece),
                    (const bf16 *)args.s + (size_t)row * (size_t)args.ld +
                        (size_t)(line->column + (valid ? 8 * piece : 0)),
                    valid);
    }
}

#define LORA_POLLS_MAX (1u << 26) /* of one waiting thread: half a minute and more */

/* The number of the product's last block among them. */
static __device__ __forceinline__ unsigned lora_last(const struct lora_join &join)
{
    return gridDim.x - (unsigned)join.blocks - 1;
}

/* Waits until all of S is there, by one thread of a block of the product; a barrier lets the others
 * read it. Returns how many blocks have waited before this one; with the last turns[1] begins anew.
 * (Nothing waits for the result here; atomicAdd's would be waited for, being made a warp's.) */
static __device__ __forceinline__ unsigned lora_await(const struct lora_join &join,
                                                      const struct lora_lines *lines)
{
    const unsigned slabs = (unsigned)(lines->slabs[0] + lines->slabs[1]);
    unsigned made, polls = 0;

    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(made)
                     : "l"(__cvta_generic_to_global(join.turns))
                     : "memory");
    while (made < slabs && ++polls < LORA_POLLS_MAX);
    if (made < slabs)
        __trap(); /* ends the context: an error instead of a grid that never does */
    return atomicInc(&join.turns[1], lora_last(join));
}

/* sums[row of the pack][column of the share] = S (sB)^T, `pitch` floats apart, for the rows that
 * have a line. The warp's first DEPTH items of B are in its slots, `stride` pieces apart; `next` is
 * the place behind them. */
template <int DEPTH>
static __device__ __forceinline__ void
lora_expand(const struct lora_lines *lines, const struct lora_share &share, struct lora_place next,
            const uint4 *s, uint4 *slots, int stride, float *sums, int pitch)
{
    const int lane = (int)threadIdx.x % 32, row = lane / 4;
    struct lora_place now = {(int)threadIdx.x / 32, 0};
    int slot = 0;

    lora_settle(lines, share, &now);
    while (now.unit < lora_units(lines, share)) {
        const struct lora_line *line = &lines->line[now.unit >> share.shift];
        const int first = line->first + row, column = 32 * (now.unit & ((1 << share.shift) - 1));
        const bool low = row < line->count, high = row + 8 < line->count;
        float *at = sums + first * pitch + column + 2 * (lane % 4), sum[4][4] = {};

        do {
            const uint4 none = make_uint4(0, 0, 0, 0), *b = slots + slot * stride + lane;
            const int piece = now.k / 8 + lane % 4;
            const uint4 of_low = low ? s[lora_s_at(first, piece)] : none;
            const uint4 of_high = high ? s[lora_s_at(first + 8, piece)] : none;

            copies_wait_but<DEPTH - 1>();
#pragma unroll
            for (int n = 0; n < 4; n++)
                multiply_32(sum[n], of_low, of_high, b[32 * n]);
            lora_ask_b(lines, share, &next, slots + slot * stride);
            copies_commit();
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            lora_advance(lines, share, &now);
        } while (now.k > 0);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (column + 8 * n >= share.width)
                continue;
            if (low)
                *(float2 *)(at + 8 * n) = make_float2(sum[n][0], sum[n][1]);
            if (high)
                *(float2 *)(at + 8 * pitch + 8 * n) = make_float2(sum[n][2], sum[n][3]);
        }
    }
}

#endif
