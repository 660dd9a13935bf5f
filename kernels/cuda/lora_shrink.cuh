/* The blocks that make S = x A^T beside a frozen product of few rows (lora_join.cuh).
 *
 * A block makes a slab of 16 columns of S at a time for one tile: warp c takes chunk c of K. A and x
 * come through a ring of a lane's own pieces in shared memory, which runs on from slab to slab and
 * has A before x is waited for. Beside a product that fills the memory's queues even what is in the
 * L2 takes 2 or 3 us to come, so the ring must be long for x as well. */
#ifndef CLAAS_CUDA_LORA_SHRINK_CUH
#define CLAAS_CUDA_LORA_SHRINK_CUH

#include "cuda/lora_join.cuh"

/* Shared memory of a block that makes S: the chunks' sums, then each warp's ring of groups of 64
 * terms, of the slab's 16 rows of A and of 8 or (HIGH) 16 rows of x. With many adapters S waits for
 * memory as the product does, and what a block has on its way is its share of it. */
#define LORA_GROUP                 64 /* terms */
#define LORA_STEPS                 (LORA_GROUP / 32)
#define LORA_GROUP_PIECES(high)    (LORA_STEPS * ((high) ? 128 : 96)) /* of 16 bytes */
#define LORA_GROUPS_IN(ring, high) ((ring) / (LORA_GROUP_PIECES(high) * 16))
#define LORA_SUMS_BYTES            (CUDA_LORA_PARTS * 16 * LORA_SLAB * 4)
#define LORA_SHRINK_BYTES(ring)    (LORA_SUMS_BYTES + (ring)*LORA_WARPS)

/* What a warp asks for next: the terms from k on of its chunk of a slab. */
struct lora_feed {
    int line, slab, k;
    int rows;      /* of A, from row l / 4 of the slab on; below 1: there are none */
    int count;     /* of x, likewise */
    const bf16 *a; /* row l / 4 of the slab, term 8 (l % 4) */
    const bf16 *x; /* likewise */
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

static __device__ __forceinline__ void lora_aim(struct lora_feed *feed,
                                                const struct lora_join &join,
                                                const struct lora_lines *lines, int by, int begin)
{
    const int lane = (int)threadIdx.x % 32;
    const size_t k = (size_t)join.args.k, term = (size_t)(8 * (lane % 4));

    lora_seek(lines, by, &feed->line, &feed->slab);
    feed->k = begin;
    feed->rows = feed->count = 0;
    if (feed->line >= lora_used(lines))
        return;
    const struct lora_line *line = &lines->line[feed->line];
    const int row = feed->slab * LORA_SLAB + lane / 4;

    feed->rows = line->size - row;
    feed->count = line->count - lane / 4;
    feed->a = line->from + (size_t)row * k + term;
    feed->x = (const bf16 *)join.args.x + (size_t)(line->first + lane / 4) * k + term;
}

static __device__ __forceinline__ void lora_move(struct lora_feed *feed,
                                                 const struct lora_join &join,
                                                 const struct lora_lines *lines, int begin, int end)
{
    feed->k += LORA_GROUP;
    if (feed->k >= end)
        lora_aim(feed, join, lines, join.blocks, begin);
}

/* Starts the copies of the group's A and of its x, of zeros where there are none. */
static __device__ __forceinline__ void lora_ask_a(const struct lora_feed &feed, int k, uint4 *group)
{
    const int lane = (int)threadIdx.x % 32, terms = k - feed.k - 8 * (lane % 4);
    const bf16 *low = feed.a + feed.k, *high = low + (size_t)8 * k;

#pragma unroll
    for (int i = 0; i < LORA_STEPS; i++) {
        copy_16_of_many(group + 64 * i + lane, low + 32 * i, feed.rows > 0 && 32 * i < terms);
        copy_16_of_many(group + 64 * i + 32 + lane, high + 32 * i, feed.rows > 8 && 32 * i < terms);
    }
}
template <bool HIGH>
static __device__ __forceinline__ void lora_ask_x(const struct lora_feed &feed, int k, uint4 *group)
{
    const int lane = (int)threadIdx.x % 32, terms = k - feed.k - 8 * (lane % 4);
    const bf16 *low = feed.x + feed.k, *high = low + (size_t)8 * k;

    group += 64 * LORA_STEPS;
#pragma unroll
    for (int i = 0; i < LORA_STEPS; i++) {
        copy_16(group + 32 * i + lane, low + 32 * i, feed.count > 0 && 32 * i < terms);
        if (HIGH)
            copy_16(group + 32 * (LORA_STEPS + i) + lane, high + 32 * i,
                    feed.count > 8 && 32 * i < terms);
    }
}

/* total = the warp's chunk of the slab whose groups come next. */
template <int GROUPS, bool HIGH>
static __device__ __forceinline__ void
lora_sum_chunk(float (&total)[2][4], const struct lora_join &join, const struct lora_lines *lines,
               int begin, int end, uint4 *ring, int *slot, struct lora_feed *feed)
{
    const int lane = (int)threadIdx.x % 32, quarter = (end - begin) / LORA_QUARTERS;
    int left = quarter; /* of the quarter, terms */
    float sum[2][4] = {};

    for (int at = begin; at < end; at += LORA_GROUP) {
        uint4 *group = ring + *slot * LORA_GROUP_PIECES(HIGH), *x = group + 64 * LORA_STEPS + lane;

        copies_wait_but<GROUPS - 1>();
#pragma unroll
        for (int i = 0; i < LORA_STEPS; i++) {
            const uint4 low = x[32 * i];
            const uint4 high = HIGH ? x[32 * (LORA_STEPS + i)] : make_uint4(0, 0, 0, 0);

            multiply_32(sum[0], low, high, group[64 * i + lane]);
            multiply_32(sum[1], low, high, group[64 * i + 32 + lane]);
            left -= 32;
            if (left > 0)
                continue;
            left = quarter;
#pragma unroll
            for (int e = 0; e < 8; e++) { /* the first quarter's sum is added to zeros */
                total[e / 4][e % 4] += sum[e / 4][e % 4];
                sum[e / 4][e % 4] = 0;
            }
        }
        lora_ask_a(*feed, join.args.k, group);
        lora_ask_x<HIGH>(*feed, join.args.k, group);
        copies_commit();
        lora_move(feed, join, lines, begin, end);
        *slot = *slot + 1 < GROUPS ? *slot + 1 : 0;
    }
}

/* The chunks' sums, added in order and rounded. By all threads: one element each. */
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
}

/* A block that makes S: slabs blockIdx.x, + join.blocks, … lines: there; RING: bytes of a warp's.
 */
template <int RING, bool HIGH>
static __device__ __forceinline__ void lora_make_slabs(const struct lora_join &join, void *shared,
                                                       const struct lora_lines *lines)
{
    static_assert(CUDA_LORA_PARTS == LORA_WARPS, "a warp takes a chunk");
    static_assert(16 * LORA_SLAB == LORA_THREADS, "a thread adds up an element");
    static_assert(32 * LORA_QUARTERS % LORA_GROUP == 0, "a chunk is groups");
    constexpr int groups = LORA_GROUPS_IN(RING, HIGH), pieces = LORA_GROUP_PIECES(HIGH);
    const int k = join.args.k, warp = (int)threadIdx.x / 32;
    const int begin = warp * lora_chunk_of(k), end = begin + lora_chunk_of(k);
    uint4 *ring = (uint4 *)((uint8_t *)shared + LORA_SUMS_BYTES + warp * RING);
    struct lora_feed feed = {0, 0, 0, 0, 0, (const bf16 *)join.args.x, (const bf16 *)join.args.x};
    struct lora_feed of_a;
    int line = 0, slab = 0, slot = 0;
    unsigned made = 0;

    lora_seek(lines, (int)blockIdx.x, &line, &slab);
    if (line >= lora_used(lines))
        return; /* without waiting: the product's blocks want the room */
    lora_aim(&feed, join, lines, (int)blockIdx.x, begin);
    of_a = feed;
    for (int i = 0; i < groups; i++) {
        lora_ask_a(of_a, k, ring + i * pieces);
        lora_move(&of_a, join, lines, begin, end);
    }
    launch_wait();
    for (int i = 0; i < groups; i++) {
        lora_ask_x<HIGH>(feed, k, ring + i * pieces);
        copies_commit(); /* the first one's also holds all of A above */
        lora_move(&feed, join, lines, begin, end);
    }
    for (; line < lora_used(lines); made++) {
        float total[2][4] = {};

        if (begin < k)
            lora_sum_chunk<groups, HIGH>(total, join, lines, begin, end, ring, &slot, &feed);
        lora_store_slab(join, lines->line[line], slab, total, (float(*)[16][LORA_SLAB])shared);
        lora_seek(lines, join.blocks, &line, &slab);
    }
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&join.turns[0], made);
    }
}

/* MORE: the pack may have more than 8 rows. */
template <int RING, bool MORE>
static __device__ __forceinline__ void lora_shrink(const struct lora_join &join, void *shared,
                                                   struct lora_lines *lines)
{
    const struct cuda_lora_tile tile = lora_begin_list(lines, join.args);

    launch_next();
    lora_list(lines, join.args, tile, -1);
    __syncthreads();
    if (MORE && (lines->high[0] | lines->high[1]))
        lora_make_slabs<RING, true>(join, shared, lines);
    else
        lora_make_slabs<RING, false>(join, shared, lines);
}

#endif
