/* The blocks that make S = x A^T beside a frozen product of few rows (lora_join.cuh).
 *
 * A block takes a slab of 16 columns of S at a time for one tile: warp c sums chunk c of K. Where K
 * is long that is too much of it for one block, and LORA_TEAM neighbours of a cluster take a slab
 * together: block p has the chunks 2p and 2p + 1, and a warp a quarter of one. A and x come through
 * a ring of a lane's own pieces in shared memory, which runs on from slab to slab and has A before
 * x is waited for. Beside a product that fills the memory's queues even what is in the L2 takes 2
 * or 3 us to come, so the ring must be long for x as well.
 *
 * A team's block p stores the columns 4p to 4p + 3 of each slab: it is sent (mbarrier.cuh) all
 * chunks' sums of them by all four, itself too, for one slab and the next by turns into two places.
 * That a place is free again needs no message: a block that sends for the next slab but one has
 * received what this block sent for the next one, which this block did after it had read this
 * slab's. The same holds for a place's barrier: all sends that it counts in a phase come when the
 * phase before has ended. A block leaves when it has stored its last slab, and then no block sends
 * to it any more; all four have the same list of slabs, so all stay or, without slabs, none
 * does. */
#ifndef CLAAS_CUDA_LORA_SHRINK_CUH
#define CLAAS_CUDA_LORA_SHRINK_CUH

#include "cuda/lora_join.cuh"
#include "cuda/mbarrier.cuh"

/* Shared memory of a block that makes S: sums, then each warp's ring of groups of 64 terms, of the
 * slab's 16 rows of A and of 8 or (HIGH) 16 rows of x. With many adapters S waits for memory as the
 * product does, and what a block has on its way is its share of it.
 *
 * The sums are those of the chunks [8][16][16], or a team's: of three quarters of each chunk, as
 * the lanes have them, then two places for the chunks' of four columns. */
#define LORA_GROUP                 64 /* terms */
#define LORA_STEPS                 (LORA_GROUP / 32)
#define LORA_GROUP_PIECES(high)    (LORA_STEPS * ((high) ? 128 : 96)) /* of 16 bytes */
#define LORA_GROUPS_IN(ring, high) ((ring) / (LORA_GROUP_PIECES(high) * 16))
#define LORA_TEAM_COLUMNS          (LORA_SLAB / LORA_TEAM)
#define LORA_QUARTERS_BYTES        (2 * (LORA_QUARTERS - 1) * 16 * LORA_SLAB * 4)
#define LORA_PLACE_BYTES           (CUDA_LORA_PARTS * 16 * LORA_TEAM_COLUMNS * 4)
#define LORA_SUMS_BYTES            (LORA_QUARTERS_BYTES + 2 * LORA_PLACE_BYTES)
#define LORA_SHRINK_BYTES(ring)    (LORA_SUMS_BYTES + (ring)*LORA_WARPS)
static_assert(CUDA_LORA_PARTS * 16 * LORA_SLAB * 4 <= LORA_SUMS_BYTES, "a block's own chunks fit");

/* What a warp sums of each slab that its block takes. */
struct lora_range {
    int begin, end; /* terms; from k on they are zeros */
    int quarter;    /* terms of a quarter of a chunk */
    int step;       /* from one of the block's slabs to the next */
};

static __device__ __forceinline__ struct lora_range lora_range_of(const struct lora_join &join)
{
    const int warp = (int)threadIdx.x / 32, chunk = lora_chunk_of(join.args.k);
    struct lora_range range = {0, 0, chunk / LORA_QUARTERS, join.blocks};

    if (join.team == 1) {
        range.begin = warp * chunk;
        range.end = range.begin + chunk;
    } else {
        range.begin = ((int)blockIdx.x % LORA_TEAM * LORA_WARPS + warp) * range.quarter;
        range.end = range.begin + range.quarter;
        range.step = join.blocks / LORA_TEAM;
    }
    return range;
}

/* What a warp asks for next: the terms from k on of its range of a slab. */
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
                                                 const struct lora_lines *lines,
                                                 const struct lora_range &range)
{
    feed->k += LORA_GROUP;
    if (feed->k >= range.end)
        lora_aim(feed, join, lines, range.step, range.begin);
}

/* Starts the copies of the group's A and of its x, of zeros where there are none. end: of the
 * range. */
static __device__ __forceinline__ void lora_ask_a(const struct lora_feed &feed, int k, int end,
                                                  uint4 *group)
{
    const int lane = (int)threadIdx.x % 32, terms = min(k, end) - feed.k - 8 * (lane % 4);
    const bf16 *low = feed.a + feed.k, *high = low + (size_t)8 * k;

#pragma unroll
    for (int i = 0; i < LORA_STEPS; i++) {
        copy_16_of_many(group + 64 * i + lane, low + 32 * i, feed.rows > 0 && 32 * i < terms);
        copy_16_of_many(group + 64 * i + 32 + lane, high + 32 * i, feed.rows > 8 && 32 * i < terms);
    }
}
template <bool HIGH>
static __device__ __forceinline__ void lora_ask_x(const struct lora_feed &feed, int k, int end,
                                                  uint4 *group)
{
    const int lane = (int)threadIdx.x % 32, terms = min(k, end) - feed.k - 8 * (lane % 4);
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

/* total = the warp's range of the slab whose groups come next. */
template <int GROUPS, bool HIGH>
static __device__ __forceinline__ void
lora_sum_range(float (&total)[2][4], const struct lora_join &join, const struct lora_lines *lines,
               const struct lora_range &range, uint4 *ring, int *slot, struct lora_feed *feed)
{
    const int lane = (int)threadIdx.x % 32;
    int left = range.quarter; /* of the quarter, terms; a team's may end within a group */
    float sum[2][4] = {};

    for (int at = range.begin; at < range.end; at += LORA_GROUP) {
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
            left = range.quarter;
#pragma unroll
            for (int e = 0; e < 8; e++) { /* the first quarter's sum is added to zeros */
                total[e / 4][e % 4] += sum[e / 4][e % 4];
                sum[e / 4][e % 4] = 0;
            }
        }
        lora_ask_a(*feed, join.args.k, range.end, group);
        lora_ask_x<HIGH>(*feed, join.args.k, range.end, group);
        copies_commit();
        lora_move(feed, join, lines, range);
        *slot = *slot + 1 < GROUPS ? *slot + 1 : 0;
    }
}

/* Stored as a whole, in no order with anything else. */
static __device__ __forceinline__ void lora_store_sum(const struct lora_join &join,
                                                      const struct lora_line &line, int row,
                                                      int column, float sum)
{
    bf16 *to = join.s + (line.first + row) * CUDA_LORA_PAIR_LD + column;

    if (row < line.count && column < line.size)
        asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)),
                     "h"(__bfloat16_as_ushort(__float2bfloat16_rn(sum)))
                     : "memory");
}

/* Stores the chunks' sums, added in order and rounded. By all threads: one element each. */
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
    lora_store_sum(join, line, row, slab * LORA_SLAB + column, sum);
    __syncthreads(); /* no thread reads the sums any more */
}

/* By the warp that has the first quarter of a chunk in `total`: adds the others in order, and sends
 * the chunk's sums to those who store them, two columns at a time. place, barrier: this block's. */
template <bool HIGH>
static __device__ __forceinline__ void lora_push_chunk(float (&total)[2][4], const float4 *quarters,
                                                       const float *place, const uint64_t *barrier)
{
    const int lane = (int)threadIdx.x % 32, of = (int)threadIdx.x / 32 / LORA_QUARTERS;
    const int chunk = (int)blockIdx.x % LORA_TEAM * 2 + of, row = lane / 4;
    const int first = cluster_rank() / LORA_TEAM * LORA_TEAM;

#pragma unroll
    for (int half = 0; half < (HIGH ? 2 : 1); half++)
#pragma unroll
        for (int q = 0; q < LORA_QUARTERS - 1; q++) {
            const float4 sum = quarters[((2 * half + of) * (LORA_QUARTERS - 1) + q) * 32 + lane];

            total[0][2 * half] += sum.x;
            total[0][2 * half + 1] += sum.y;
            total[1][2 * half] += sum.z;
            total[1][2 * half + 1] += sum.w;
        }
    __syncwarp(); /* all lanes have read before any chunk is sent: a block that has all of them may
                     go on */
    place += (chunk * (HIGH ? 16 : 8) + row) * LORA_TEAM_COLUMNS + lane % 2 * 2;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int to = first + 2 * n + lane % 4 / 2;
        const uint32_t at = cluster_address(place, to), counted = cluster_address(barrier, to);

        push_8(at, total[n][0], total[n][1], counted);
        if (HIGH)
            push_8(at + 8 * LORA_TEAM_COLUMNS * 4, total[n][2], total[n][3], counted);
    }
}

/* The same by a team. made: slabs that it has stored before. The barrier's phase ends when this
 * block, too, has read its quarters and sent its chunks. */
template <bool HIGH>
static __device__ __forceinline__ void
lora_store_team(const struct lora_join &join, const struct lora_line &line, int slab, unsigned made,
                float (&total)[2][4], void *shared, uint64_t *barriers)
{
    static_assert(LORA_TEAM == 4 && LORA_TEAM_COLUMNS == 4 && LORA_WARPS == 2 * LORA_QUARTERS &&
                      LORA_TEAM * 2 == CUDA_LORA_PARTS,
                  "a block has two chunks, two lanes have a row of four columns");
    constexpr int rows = HIGH ? 16 : 8, sums = rows * LORA_TEAM_COLUMNS;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int quarter = warp % LORA_QUARTERS, turn = (int)(made % 2);
    float4 *quarters = (float4 *)shared;
    const float *place =
        (const float *)((uint8_t *)shared + LORA_QUARTERS_BYTES + turn * LORA_PLACE_BYTES);
    uint64_t *barrier = &barriers[turn];
    float sum = 0.0f;

    if (made > 0)
        __syncthreads(); /* the quarters of the slab before have been read */
    if (quarter > 0) {
        float4 *at = quarters + (warp / LORA_QUARTERS * (LORA_QUARTERS - 1) + quarter - 1) * 32;

        at[lane] = make_float4(total[0][0], total[0][1], total[1][0], total[1][1]);
        if (HIGH)
            at[2 * (LORA_QUARTERS - 1) * 32 + lane] =
                make_float4(total[0][2], total[0][3], total[1][2], total[1][3]);
    }
    if (threadIdx.x == 0)
        mbarrier_expect(barrier, CUDA_LORA_PARTS * sums * (int)sizeof(float));
    if (made == 0) {
        __syncwarp();   /* cluster_wait is by whole warps */
        cluster_wait(); /* the others have their barriers */
    }
    __syncthreads();
    if (quarter == 0)
        lora_push_chunk<HIGH>(total, quarters, place, barrier);
    mbarrier_wait(barrier, (int)(made / 2 % 2));
    if ((int)threadIdx.x >= sums)
        return;
    for (int c = 0; c < CUDA_LORA_PARTS; c++)
        sum += place[c * sums + (int)threadIdx.x];
    lora_store_sum(join, line, (int)threadIdx.x / LORA_TEAM_COLUMNS,
                   slab * LORA_SLAB + (int)blockIdx.x % LORA_TEAM * LORA_TEAM_COLUMNS +
                       (int)threadIdx.x % LORA_TEAM_COLUMNS,
                   sum);
}

/* A block that makes S: slabs n, n + range.step, … of the list, n its number or its team's. lines:
 * there; RING: bytes of a warp's. */
template <int RING, bool HIGH>
static __device__ __forceinline__ void lora_make_slabs(const struct lora_join &join, void *shared,
                                                       const struct lora_lines *lines,
                                                       uint64_t *barriers)
{
    static_assert(CUDA_LORA_PARTS == LORA_WARPS, "a warp takes a chunk");
    static_assert(16 * LORA_SLAB == LORA_THREADS, "a thread adds up an element");
    static_assert(32 * LORA_QUARTERS % LORA_GROUP == 0, "a chunk is groups");
    constexpr int groups = LORA_GROUPS_IN(RING, HIGH), pieces = LORA_GROUP_PIECES(HIGH);
    const int k = join.args.k, first = (int)blockIdx.x / join.team;
    const struct lora_range range = lora_range_of(join);
    uint4 *ring = (uint4 *)((uint8_t *)shared + LORA_SUMS_BYTES + (int)threadIdx.x / 32 * RING);
    struct lora_feed feed = {0, 0, 0, 0, 0, (const bf16 *)join.args.x, (const bf16 *)join.args.x};
    struct lora_feed of_a;
    int line = 0, slab = 0, slot = 0;
    unsigned made = 0;

    lora_seek(lines, first, &line, &slab);
    if (line >= lora_used(lines))
        return; /* without launch_wait: the product's blocks want the room */
    if (join.team > 1)
        cluster_arrive(); /* those that have left are not waited for */
    lora_aim(&feed, join, lines, first, range.begin);
    of_a = feed;
    for (int i = 0; i < groups; i++) {
        lora_ask_a(of_a, k, range.end, ring + i * pieces);
        lora_move(&of_a, join, lines, range);
    }
    launch_wait();
    for (int i = 0; i < groups; i++) {
        lora_ask_x<HIGH>(feed, k, range.end, ring + i * pieces);
        copies_commit(); /* the first one's also holds all of A above */
        lora_move(&feed, join, lines, range);
    }
    for (; line < lora_used(lines); made++) {
        float total[2][4] = {};

        if (range.begin < k)
            lora_sum_range<groups, HIGH>(total, join, lines, range, ring, &slot, &feed);
        if (join.team > 1)
            lora_store_team<HIGH>(join, lines->line[line], slab, made, total, shared, barriers);
        else
            lora_store_slab(join, lines->line[line], slab, total, (float(*)[16][LORA_SLAB])shared);
        lora_seek(lines, range.step, &line, &slab);
    }
}

/* MORE: the pack may have more than 8 rows. barriers: two of a team. */
template <int RING, bool MORE>
static __device__ __forceinline__ void lora_shrink(const struct lora_join &join, void *shared,
                                                   struct lora_lines *lines, uint64_t *barriers)
{
    const struct cuda_lora_tile tile = lora_begin_list(lines, join.args);

    launch_next();
    if (join.team > 1 && threadIdx.x == 0) {
        mbarrier_init(&barriers[0]);
        mbarrier_init(&barriers[1]);
    }
    lora_list(lines, join.args, tile, -1);
    __syncthreads();
    if (MORE && (lines->high[0] | lines->high[1]))
        lora_make_slabs<RING, true>(join, shared, lines, barriers);
    else
        lora_make_slabs<RING, false>(join, shared, lines, barriers);
}

#endif
