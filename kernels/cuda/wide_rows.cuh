/* What loss.cu and sample.cu share: one row of V float32 logits, V = 49,152 to 151,936, held by the
 * blocks of a thread-block cluster.
 *
 * Block r of C (1, 2, 4, 8, 16) has the elements [r slice, (r+1) slice). They are copied into
 * shared memory once (cp.async, the whole slice in flight at a time) and every pass over the row
 * reads them there: a row comes from memory once, although maximum, sums and gradient need three
 * passes or more. Sums go thread -> warp -> block -> cluster, in an order that depends on V and
 * the card alone; for the last step each block sends its sums to every block (mbarrier.cuh), and
 * all add them in the same order: a *fold*. Without clusters (below sm_90) one block has the row;
 * where its slice does not fit into shared memory the passes read global memory again.
 *
 * Masses, that is sums of exp(z - max), are integers: each term is rounded to a multiple of
 * 2^-(62 - log2 V), so that the sum depends on the terms only, not on their order. A log-prob
 * therefore has the same bits from the loss, from cuda_logprobs and from the sampler, although they
 * cut a row differently. The error is below V 2^-45 = 4e-9, less than a float's.
 *
 * Selection (K-th largest, nucleus) is a radix select over keys of 55 bits: the float's ordered
 * bits, then the complement of the index. Keys are unique, so ties need no care: the lowest index
 * first. Its histograms are made by integer atomics, whose order does not matter. */
#ifndef CLAAS_CUDA_WIDE_ROWS_CUH
#define CLAAS_CUDA_WIDE_ROWS_CUH

#include "cuda/context.h"
#include "cuda/mbarrier.cuh"
#include "cuda/sizes.cuh"

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#define ROW_WARPS_MAX  32
#define ROW_BLOCKS     8  /* the largest cluster that every card of sm_90 grants */
#define ROW_BLOCKS_MAX 16 /* where the card grants it */

#define KEY_ID_BITS    23 /* V < 2^23 */
#define KEY_BITS       (32 + KEY_ID_BITS)
#define DIGIT_BITS     11
#define DIGIT_BINS     (1 << DIGIT_BITS)
#define DIGITS         (KEY_BITS / DIGIT_BITS)
#define BIN_GROUPS     32
#define GROUP_BINS     (DIGIT_BINS / BIN_GROUPS)

typedef unsigned long long mass_t; /* of probability: integers, see above */
typedef unsigned long long row_key_t;

/* --- sums over a row --- */

/* Which fields of row_sums are folded; FOLD_SUM is sum[0] and sum[1], FOLD_MORE the other two. */
enum { FOLD_MAX = 1, FOLD_KEY = 2, FOLD_MASS = 4, FOLD_SUM = 8, FOLD_MORE = 16 };

/* Eight words of 8 bytes: in fold_words each has four lanes of a warp. */
struct row_sums {
    float max[2];
    row_key_t key; /* the largest */
    mass_t mass[2];
    double sum[4];
};
#define SUMS_WORDS 8
static_assert(sizeof(struct row_sums) == SUMS_WORDS * 8 && SUMS_WORDS * 4 == 32, "a warp's lanes");

/* Aligned since what follows it in shared memory is read four floats at a time. Folds have two
 * places by turns: what one left is overwritten two folds later. */
struct alignas(16) row_shared {
    struct row_sums warps[2][ROW_WARPS_MAX];
    struct row_sums slots[2][ROW_BLOCKS_MAX]; /* [turn][sender]: each block of the cluster */
    uint64_t arrived[2];                      /* mbarriers: the bytes that came into the slots */
    unsigned long long digit, above, inside;  /* select_key */
    unsigned long long wanted;                /* sample.cu: draw_in_order */
    int owner, token;
};

/* A thread's view of its block. */
struct row_block {
    struct row_shared *shared;
    int rank, blocks;
    int begin, count;  /* the block's elements of the row */
    int folds, digits; /* folds and digits done so far: buffers alternate */
};

/* Where block `rank` of the cluster has what this block has at `mine`. */
template <typename T> static __device__ __forceinline__ T *row_remote(T *mine, int rank, int blocks)
{
#if __CUDA_ARCH__ >= 900
    if (blocks > 1)
        return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#endif
    return mine;
}

/* A barrier of the row's blocks, with the fences that reads of other blocks' memory need. Folds
 * need neither. */
static __device__ __forceinline__ void row_sync(const struct row_block *block)
{
#if __CUDA_ARCH__ >= 900
    if (block->blocks > 1) {
        cooperative_groups::this_cluster().sync();
        return;
    }
#endif
    __syncthreads();
}

static __device__ __forceinline__ struct row_sums row_nothing(void)
{
    struct row_sums nothing = {};

    nothing.max[0] = nothing.max[1] = -INFINITY;
    return nothing;
}

/* A float as an integer of the same order, and back. */
static __device__ __forceinline__ int in_order(int bits)
{
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/* No x is NaN: fmaxf has passed over them. */
static __device__ __forceinline__ float warp_max(float x)
{
    int max = __reduce_max_sync(ALL_LANES, in_order(__float_as_int(x)));

    return __int_as_float(in_order(max));
}

static __device__ __forceinline__ row_key_t warp_key(row_key_t key)
{
    unsigned high = (unsigned)(key >> 32), top = __reduce_max_sync(ALL_LANES, high);
    unsigned low = __reduce_max_sync(ALL_LANES, high == top ? (unsigned)key : 0u);

    return (row_key_t)top << 32 | low;
}

/* By pieces of 27 bits: the sum of a warp's 32 fits into 32 bits. */
static __device__ __forceinline__ mass_t warp_mass(mass_t mass)
{
    const unsigned piece = (1u << 27) - 1;
    unsigned low = __reduce_add_sync(ALL_LANES, (unsigned)mass & piece);
    unsigned middle = __reduce_add_sync(ALL_LANES, (unsigned)(mass >> 27) & piece);
    unsigned high = __reduce_add_sync(ALL_LANES, (unsigned)(mass >> 54));

    return low + ((mass_t)middle << 27) + ((mass_t)high << 54);
}

/* The lower half of 2 * step lanes gets the sums of x, the upper half those of y. */
static __device__ __forceinline__ double halve(double x, double y, int step)
{
    bool upper = (int)threadIdx.x & step;
    double other = __shfl_xor_sync(ALL_LANES, upper ? x : y, step);

    return (upper ? y : x) + other;
}

/* sum[n] over the warp: to the lanes 8n to 8n + 7 or, of two sums, 16n to 16n + 15, all of which
 * get the same bits. 12 or 10 shuffles instead of 40 or 20, and the order of a butterfly's. */
static __device__ __forceinline__ double warp_sums(const double sum[4], bool four)
{
    double x;

    if (four) {
        x = halve(halve(sum[0], sum[2], 16), halve(sum[1], sum[3], 16), 8);
    } else {
        x = halve(sum[0], sum[1], 16);
        x += __shfl_xor_sync(ALL_LANES, x, 8);
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

/* Stores the warp's sums, of the fields in `what`. */
static __device__ __forceinline__ void warp_fold(const struct row_sums *s, unsigned what,
                                                 struct row_sums *to)
{
    int lane = (int)threadIdx.x & 31, shift = what & FOLD_MORE ? 3 : 4;

    if (what & FOLD_MAX) {
        float max[2] = {warp_max(s->max[0]), warp_max(s->max[1])};

        if (lane == 0)
            *(float2 *)to->max = make_float2(max[0], max[1]);
    }
    if (what & FOLD_KEY) {
        row_key_t key = warp_key(s->key);

        if (lane == 0)
            to->key = key;
    }
    if (what & FOLD_MASS) {
        mass_t mass[2] = {warp_mass(s->mass[0]), warp_mass(s->mass[1])};

        if (lane < 2)
            to->mass[lane] = lane ? mass[1] : mass[0];
    }
    if (what & (FOLD_SUM | FOLD_MORE)) {
        double sum = warp_sums(s->sum, what & FOLD_MORE);

        if ((lane & ((1 << shift) - 1)) == 0)
            to->sum[lane >> shift] = sum;
    }
}

/* The words of row_sums that the fields in `what` take, a bit each. */
static __device__ __forceinline__ unsigned words_of(unsigned what)
{
    return (what & FOLD_MAX ? 1u : 0u) | (what & FOLD_KEY ? 2u : 0u) |
           (what & FOLD_MASS ? 0xcu : 0u) | (what & (FOLD_SUM | FOLD_MORE) ? 0x30u : 0u) |
           (what & FOLD_MORE ? 0xc0u : 0u);
}

/* What a word of two row_sums becomes when they are folded. */
static __device__ __forceinline__ uint64_t join_words(uint64_t x, uint64_t y, int word,
                                                      unsigned what)
{
    uint64_t ret = x + y; /* masses */

    if (what & FOLD_MAX && word == 0) {
        float low = fmaxf(__uint_as_float((unsigned)x), __uint_as_float((unsigned)y));
        float high =
            fmaxf(__uint_as_float((unsigned)(x >> 32)), __uint_as_float((unsigned)(y >> 32)));

        ret = (uint64_t)__float_as_uint(high) << 32 | __float_as_uint(low);
    }
    if (what & FOLD_KEY && word == 1)
        ret = x > y ? x : y;
    if (what & (FOLD_SUM | FOLD_MORE) && word >= 4)
        ret = (uint64_t)__double_as_longlong(__longlong_as_double((long long)x) +
                                             __longlong_as_double((long long)y));
    return ret;
}

/* By a warp: lane l gets word l / 4 of the sum over all `count`. Of the word's four lanes, the p-th
 * adds p, p + 4, p + 8, … in order; then their four sums are added, always in one order, too. */
static __device__ __forceinline__ uint64_t fold_words(const struct row_sums *all, int count,
                                                      unsigned what)
{
    int lane = (int)threadIdx.x & 31, word = lane / 4;
    const uint64_t *at = (const uint64_t *)all + word;
    uint64_t sum = word == 0 ? 0xff800000ff800000ULL : 0; /* -inf, -inf */

    count = words_of(what) >> word & 1 ? count : 0;
#pragma unroll 4
    for (int i = lane % 4; i < count; i += 4)
        sum = join_words(sum, at[i * SUMS_WORDS], word, what);
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
        sum = join_words(sum, __shfl_xor_sync(ALL_LANES, sum, step), word, what);
    return sum;
}

/* By all threads, once, before the first fold: waits until the other blocks may be sent to. The
 * copy of the row may be under way meanwhile. */
static __device__ __forceinline__ void row_meet(const struct row_block *block)
{
    if (block->blocks <= 1)
        return;
    __syncwarp();   /* cluster_wait is by whole warps */
    cluster_wait(); /* the arrival was row_open's */
}

/* A fold's first half: each block's sums go into its slot in every block. No message has to say
 * that a slot is free again: who sends in fold k + 2 has received fold k + 1 from every block, and
 * every block sent that behind a barrier of its own, which its threads reach after reading fold k.
 * The same holds for the slots' mbarriers. No fence is needed either. */
static __device__ __forceinline__ void row_send(struct row_block *block,
                                                const struct row_sums *mine, unsigned what)
{
    struct row_shared *shared = block->shared;
    int turn = block->folds++ & 1, blocks = block->blocks;
    int lane = (int)threadIdx.x & 31, word = lane / 4;
    const unsigned words = words_of(what);
    struct row_sums *slot = &shared->slots[turn][block->rank];

    if (blocks > 1 && threadIdx.x == 0)
        mbarrier_expect(&shared->arrived[turn], 8 * __popc(words) * blocks);
    warp_fold(mine, what, &shared->warps[turn][threadIdx.x / 32]);
    __syncthreads();
    if (threadIdx.x < 32) {
        uint64_t sum = fold_words(shared->warps[turn], (int)blockDim.x / 32, what);
        uint64_t *place = (uint64_t *)slot + word;

        if (blocks == 1 && lane % 4 == 0 && words >> word & 1)
            *place = sum;
        if (blocks > 1 && words >> word & 1)
#pragma unroll 4
            for (int rank = lane % 4; rank < blocks; rank += 4)
                push_8(cluster_address(place, rank), __uint_as_float((unsigned)sum),
                       __uint_as_float((unsigned)(sum >> 32)),
                       cluster_address(&shared->arrived[turn], rank));
    }
    if (blocks == 1)
        __syncthreads();
}

/* The second half, by whole warps: the sums over all threads of the row's blocks, the same bits for
 * every thread. A warp that leaves it out must meet one that did not, at a barrier of the block,
 * before it calls this again: else it could take an old phase of the mbarrier for the right one. */
static __device__ __forceinline__ struct row_sums row_take(const struct row_block *block,
                                                           unsigned what)
{
    struct row_shared *shared = block->shared;
    int turn = (block->folds - 1) & 1;
    struct row_sums sums = row_nothing();
    uint64_t word;

    if (block->blocks > 1)
        mbarrier_wait(&shared->arrived[turn], (block->folds - 1) / 2 & 1);
    word = fold_words(shared->slots[turn], block->blocks, what);
    if (what & FOLD_MAX) {
        uint64_t max = __shfl_sync(ALL_LANES, word, 0);

        sums.max[0] = __uint_as_float((unsigned)max);
        sums.max[1] = __uint_as_float((unsigned)(max >> 32));
    }
    if (what & FOLD_KEY)
        sums.key = __shfl_sync(ALL_LANES, word, 4);
#pragma unroll
    for (int k = 0; what & FOLD_MASS && k < 2; k++)
        sums.mass[k] = __shfl_sync(ALL_LANES, word, 4 * (2 + k));
#pragma unroll
    for (int k = 0; what & (FOLD_SUM | FOLD_MORE) && k < (what & FOLD_MORE ? 4 : 2); k++)
        sums.sum[k] = __shfl_sync(ALL_LANES, __longlong_as_double((long long)word), 4 * (4 + k));
    return sums;
}

/* Both halves: every thread gets the sums over all threads of the row's blocks. */
static __device__ __forceinline__ struct row_sums row_fold(struct row_block *block,
                                                           struct row_sums mine, unsigned what)
{
    row_send(block, &mine, what);
    return row_take(block, what);
}

/* --- a slice of a row --- */

/* The block's elements, in global memory or in shared, there filled up with -inf to whole quads. */
struct row_slice {
    float *values;
    int begin, count;
    bool quads; /* may be read four at a time */
};

/* Starts copying from global memory; row_fetched() waits. `quads`: both are 16-byte aligned and
 * count is a multiple of 4. */
static __device__ __forceinline__ void row_fetch(const float *from, int count, bool quads,
                                                 float *to)
{
    if (quads) {
        for (int i = 4 * (int)threadIdx.x; i < count; i += 4 * (int)blockDim.x)
            __pipeline_memcpy_async(to + i, from + i, 16);
        return;
    }
    for (int i = (int)threadIdx.x; i < (count + 3) / 4 * 4; i += (int)blockDim.x)
        to[i] = i < count ? from[i] : -INFINITY;
}

static __device__ __forceinline__ void row_fetched(void)
{
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
}

/* By one thread: starts to bring a slice that is wanted soon into the L2. Aligned as for
 * row_fetch's quads. */
static __device__ __forceinline__ void row_prefetch(const float *from, int count)
{
#if __CUDA_ARCH__ >= 900
    if (count > 0)
        asm volatile(
            "cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
            "r"(count * (int)sizeof(float))
            : "memory");
#endif
}

/* Elements i to i+3; -inf beyond the end. */
static __device__ __forceinline__ float4 row_quad(const struct row_slice *slice, int i)
{
    const float *at = slice->values + i;
    int left = slice->count - i;

    if (slice->quads)
        return *(const float4 *)at;
    return make_float4(at[0], left > 1 ? at[1] : -INFINITY, left > 2 ? at[2] : -INFINITY,
                       left > 3 ? at[3] : -INFINITY);
}

/* --- masses and log-probs --- */

/* 2^(62 - ceil(log2 V)): the sum of V terms of at most 1 stays below 2^63. */
static inline float row_mass_scale(int vocab)
{
    int bits = 0;

    while ((1 << bits) < vocab)
        bits++;
    return ldexpf(1.0F, 62 - bits);
}

static __device__ __forceinline__ mass_t to_mass(float e, float scale)
{
    return __float2ull_rn(e * scale);
}

/* A mass as a number; bad: a term of it was NaN, which integers cannot hold. */
static __device__ __forceinline__ double from_mass(mass_t mass, float scale, bool bad)
{
    /* The scale is a power of two, so its inverse is exact: a product has the quotient's bits. */
    float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));

    return bad ? (double)NAN : (double)mass * (double)inverse;
}

/* The one expression behind every log-prob (claas_logsumexp's). */
static __device__ __forceinline__ float row_lse(float max, double log_sum)
{
    return (float)((double)max + log_sum);
}

/* Maximum and log of the sum of exp(z - max) of a row. */
static __device__ __forceinline__ double
row_measure(struct row_block *block, const struct row_slice *z, float scale, float *ret_max)
{
    struct row_sums sums = row_nothing();
    float max, seen = 0;

    for (int i = 4 * (int)threadIdx.x; i < z->count; i += 4 * (int)blockDim.x) {
        float4 v = row_quad(z, i);

        sums.max[0] = fmaxf(sums.max[0], fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
    }
    max = row_fold(block, sums, FOLD_MAX).max[0];
    for (int i = 4 * (int)threadIdx.x; i < z->count; i += 4 * (int)blockDim.x) {
        float4 v = row_quad(z, i);
        float e[4] = {expf(v.x - max), expf(v.y - max), expf(v.z - max), expf(v.w - max)};

        for (int k = 0; k < 4; k++) {
            sums.mass[0] += to_mass(e[k], scale);
            seen += e[k];
        }
    }
    sums.mass[1] = isnan(seen);
    sums = row_fold(block, sums, FOLD_MASS);
    *ret_max = max;
    return log(from_mass(sums.mass[0], scale, sums.mass[1] > 0));
}

/* --- selection --- */

/* Larger for a larger value, of equals for the lower index; -0 equals 0. */
static __device__ __forceinline__ row_key_t row_key(float value, int id)
{
    unsigned bits = __float_as_uint(value);

    bits = bits == 0x80000000u ? 0u : bits;
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (row_key_t)bits << KEY_ID_BITS | (row_key_t)(((1 << KEY_ID_BITS) - 1) - id);
}

static __device__ __forceinline__ int row_key_id(row_key_t key)
{
    return ((1 << KEY_ID_BITS) - 1) - (int)(key & ((1 << KEY_ID_BITS) - 1));
}

/* What a selection orders and weighs. Weights: the values of a slice or, with `scaled`, exp((value
 * - max) / T). The order is that of `keys` if there are any: logits have the order of their
 * exponentials, but without the rounding that makes some equal here and not on the host. */
struct row_values {
    const float *keys, *values;
    int begin, count;
    bool scaled;
    float max, temperature;
};

static __device__ __forceinline__ float row_value(const struct row_values *v, int i)
{
    float x = v->values[i];

    return v->scaled ? expf((x - v->max) / v->temperature) : x;
}

static __device__ __forceinline__ row_key_t row_value_key(const struct row_values *v, int i)
{
    return row_key(v->keys ? v->keys[i] : row_value(v, i), v->begin + i);
}

/* Histograms of a digit: of counts alone (unsigned, whose atomics are one instruction), or of
 * counts and masses (mass_t). */
template <typename W> struct alignas(16) digit_bins {
    W bins[2][DIGIT_BINS];
    W groups[2][BIN_GROUPS];
};

/* An element's weight: 1 where counts are taken (unsigned, or scale 0), else its mass. */
static __device__ __forceinline__ void weigh(float value, float scale, unsigned *ret)
{
    *ret = 1;
}
static __device__ __forceinline__ void weigh(float value, float scale, mass_t *ret)
{
    *ret = scale == 0 ? 1 : to_mass(value, scale);
}

template <typename W>
static __device__ void fill_bins(const struct row_values *v, W *bins, row_key_t prefix, int shift,
                                 float scale)
{
    for (int i = (int)threadIdx.x; i < DIGIT_BINS; i += (int)blockDim.x)
        bins[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < v->count; i += (int)blockDim.x) {
        row_key_t key = row_value_key(v, i);
        W weight;

        if (key >> (shift + DIGIT_BITS) != prefix)
            continue;
        weigh(row_value(v, i), scale, &weight);
        if (weight > 0)
            atomicAdd(&bins[(key >> shift) & (DIGIT_BINS - 1)], weight);
    }
    __syncthreads();
}

template <typename W> static __device__ void sum_groups(const W *bins, W *groups)
{
    int lane = (int)threadIdx.x & 31;

    for (int g = (int)threadIdx.x / 32; g < BIN_GROUPS; g += (int)blockDim.x / 32) {
        W sum = bins[g * GROUP_BINS + lane] + bins[g * GROUP_BINS + 32 + lane];

        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane == 0)
            groups[g] = sum;
    }
}

template <typename W> static __device__ W warp_prefix(W sum)
{
    int lane = (int)threadIdx.x & 31;

    for (int step = 1; step < 32; step *= 2) {
        W below = __shfl_up_sync(ALL_LANES, sum, step);

        sum += lane >= step ? below : 0;
    }
    return sum;
}

template <typename W> static __device__ W over_blocks(const struct row_block *block, W *mine)
{
    W sum = 0;

    for (int rank = 0; rank < block->blocks; rank++)
        sum += *row_remote(mine, rank, block->blocks);
    return sum;
}

/* By one warp: finds the bin, from the highest down, at which the sum first reaches `wanted`, the
 * sum above it and the sum inside it. */
template <typename W>
static __device__ void find_bin(const struct row_block *block, W *bins, W *groups, W wanted)
{
    int lane = (int)threadIdx.x & 31, at, high;
    W here = over_blocks(block, &groups[BIN_GROUPS - 1 - lane]), above, first, second, through;
    unsigned reached;

    through = warp_prefix(here);
    reached = __ballot_sync(ALL_LANES, through >= wanted);
    at = reached ? __ffs((int)reached) - 1 : 31;
    above = __shfl_sync(ALL_LANES, through - here, at);
    high = (BIN_GROUPS - 1 - at) * GROUP_BINS + GROUP_BINS - 1 - 2 * lane;
    first = over_blocks(block, &bins[high]);
    second = over_blocks(block, &bins[high - 1]);
    through = above + warp_prefix((W)(first + second));
    reached = __ballot_sync(ALL_LANES, through >= wanted);
    at = reached ? __ffs((int)reached) - 1 : 31;
    if (lane == at) {
        bool lower = through - second < wanted;

        block->shared->digit = (unsigned)(lower ? high - 1 : high);
        block->shared->above = lower ? through - second : through - second - first;
        block->shared->inside = lower ? second : first;
    }
}

/* The key at which the weights, summed from the largest key down, first reach `wanted`, which is
 * from 1 to the weight of all. Not `exact`: it may be a smaller key, with no element between, which
 * is found sooner. */
template <typename W>
static __device__ row_key_t select_key(struct row_block *block, struct digit_bins<W> *space,
                                       const struct row_values *v, W wanted, float scale,
                                       bool exact)
{
    row_key_t prefix = 0;

    for (int digit = 0; digit < DIGITS; digit++) {
        int shift = KEY_BITS - (digit + 1) * DIGIT_BITS;
        int buffer = block->digits++ & 1; /* the other one may still be read by other blocks */

        fill_bins(v, space->bins[buffer], prefix, shift, scale);
        sum_groups(space->bins[buffer], space->groups[buffer]);
        row_sync(block);
        if (threadIdx.x < 32)
            find_bin(block, space->bins[buffer], space->groups[buffer], wanted);
        __syncthreads();
        prefix = prefix << DIGIT_BITS | block->shared->digit;
        wanted -= (W)block->shared->above;
        if (!exact && wanted == (W)block->shared->inside)
            return prefix << shift;
    }
    return prefix;
}

/* --- launching --- */

struct row_plan {
    int vocab;
    int blocks, threads;
    int slice; /* elements of a block, a multiple of 4 */
    bool resident;
    size_t bytes; /* of shared memory */
};

/* A launch of so many clusters; it points to *cluster. */
static inline cudaLaunchConfig_t row_config(const struct row_plan *plan, int clusters,
                                            cudaLaunchAttribute *cluster)
{
    cudaLaunchConfig_t config = {};

    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = (unsigned)plan->blocks;
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    config.gridDim = dim3((unsigned)clusters * (unsigned)plan->blocks);
    config.blockDim = dim3((unsigned)plan->threads);
    config.dynamicSmemBytes = plan->bytes;
    config.attrs = cluster;
    config.numAttrs = plan->blocks > 1 ? 1 : 0;
    return config;
}

static inline cudaError_t row_allow(const void *kernel, const struct row_plan *plan)
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)plan->bytes);
}

/* Whether the card runs `kernel` in clusters of the plan's size. */
static inline bool row_is_granted(const void *kernel, const struct row_plan *plan)
{
    cudaLaunchAttribute cluster = {};
    const cudaLaunchConfig_t config = row_config(plan, 1, &cluster);
    int clusters = 0;

    if (plan->blocks <= ROW_BLOCKS)
        return true;
    if (row_allow(kernel, plan) == cudaSuccess &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
        return true;
    cudaGetLastError(); /* a refusal is an answer */
    return false;
}

static inline void row_cut(struct row_plan *plan, int blocks, int threads, int slots, size_t fixed)
{
    plan->blocks = blocks;
    plan->threads = threads;
    plan->slice = ((plan->vocab + blocks - 1) / blocks + 3) / 4 * 4;
    plan->bytes = fixed + (size_t)slots * (size_t)plan->slice * sizeof(float);
    plan->resident = true;
}

/* Plans a row as `slots` arrays of floats in shared memory, behind `fixed` bytes: on as few blocks,
 * `least` or more, as let two fit on a multiprocessor (one loads while the other computes). */
static inline int row_plan(struct cuda_context *context, const void *kernel, int vocab, int slots,
                           size_t fixed, int least, struct row_plan *plan)
{
    int limit = 0, whole = 0, most = context->arch >= 90 ? ROW_BLOCKS_MAX : 1;
    int code = cuda_check(
        context,
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, context->ordinal),
        "shared memory");

    if (code >= 0)
        code =
            cuda_check(context,
                       cudaDeviceGetAttribute(&whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                              context->ordinal),
                       "shared memory");
    if (code < 0)
        return code;
    if (vocab < 1 || vocab >= 1 << KEY_ID_BITS)
        return claas_fail(CLAAS_ERR_INVALID, "a vocabulary of %d on the device", vocab);
    plan->vocab = vocab;
    for (int blocks = least < most ? least : most; blocks <= most; blocks *= 2) {
        row_cut(plan, blocks, 512, slots, fixed);
        if (2 * (plan->bytes + 1024) <= (size_t)whole && plan->bytes <= (size_t)limit &&
            row_is_granted(kernel, plan))
            return 0;
    }
    row_cut(plan, most > ROW_BLOCKS ? ROW_BLOCKS : most, 1024, slots, fixed);
    plan->resident = plan->bytes <= (size_t)limit;
    plan->bytes = plan->resident ? plan->bytes : fixed;
    return 0;
}

/* Lowers *ret, a number of clusters, to what the card holds at a time with at most two blocks on a
 * multiprocessor: more would only wait for others to end. After row_plan(), which has allowed the
 * larger clusters. */
static inline int row_clusters(struct cuda_context *context, const void *kernel,
                               const struct row_plan *plan, int *ret)
{
    cudaLaunchAttribute cluster = {};
    const cudaLaunchConfig_t config = row_config(plan, *ret, &cluster);
    const int most = 2 * context->multiprocessors / plan->blocks;
    int held = most, code = cuda_check(context, row_allow(kernel, plan), "shared memory");

    if (code < 0)
        return code;
    if (plan->blocks > 1)
        code =
            cuda_check(context, cudaOccupancyMaxActiveClusters(&held, kernel, &config), "clusters");
    held = held < most ? held : most;
    held = held > 1 ? held : 1;
    *ret = held < *ret ? held : *ret;
    return code;
}

/* Launches kernel(args) in `rows` clusters: as a rule one for each row. */
template <typename Args>
static int row_launch(struct cuda_context *context, void (*kernel)(const Args),
                      const struct row_plan *plan, int rows, const Args *args, const char *what)
{
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = row_config(plan, rows, &cluster);
    int code = cuda_check(context, row_allow((const void *)kernel, plan), what);

    if (code < 0)
        return code;
    config.stream = context->stream;
    return cuda_check(context, cudaLaunchKernelEx(&config, kernel, *args), what);
}

/* The block's part of a row, and its mbarriers set up in its memory, `shared`. By all threads;
 * row_meet() must come before the first fold. */
static __device__ __forceinline__ struct row_block row_open(const struct row_plan *plan,
                                                            unsigned char *shared)
{
    struct row_block block = {};

    block.shared = (struct row_shared *)shared;
    block.blocks = plan->blocks;
    block.rank = (int)blockIdx.x % plan->blocks;
    block.begin = block.rank * plan->slice;
    block.count = min(plan->slice, plan->vocab - block.begin);
    block.count = block.count > 0 ? block.count : 0;
    if (block.blocks > 1) {
        if (threadIdx.x == 0) {
            mbarrier_init(&block.shared->arrived[0]);
            mbarrier_init(&block.shared->arrived[1]);
        }
        __syncwarp(); /* cluster_arrive is by whole warps */
        cluster_arrive();
    }
    return block;
}

#endif
