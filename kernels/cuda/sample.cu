/* From logits to tokens on the device, by the rules of cpu/sample.c.
 *
 *   logits float32 [m][V] -> per row: token, log-prob, up to 20 alternatives
 *
 * A row is held by a cluster of blocks (wide_rows.cuh), as wide as can be: few rows are sampled at
 * a time, and what counts is the delay. Passes over the row, in shared memory:
 *
 *   1  copy; the largest logit and its lowest index; sum exp(z - max), hence every log-prob
 *   2  p = exp((z - max) / T), stored; their sum
 *   3  without a filter: the first index at which the sum of p exceeds u times the whole, by
 *      dividing the row, again and again, into shares for the warps
 *      with top-k or top-p (the nucleus: Holtzman et al. 2019, arXiv 1904.09751): the key (likelier
 *      first, then the lower index) of the last candidate kept by either; the mass that is kept;
 *      the key at which the sum of p from the likeliest down exceeds u times that
 *
 * Nothing is sorted: a key is found by radix select (select_key), by counts for top-k, else by
 * masses. Of a key's five digits of 11 bits, the highest first, each takes a pass: a histogram of
 * the elements whose digits so far are the key's; the bin in which the sum from the highest down
 * reaches what is wanted is the next digit, and what lies above it is wanted no more.
 *
 * Masses are integers, so that the order of sums does not matter; the CPU adds doubles one by one.
 * Of two tokens the one with the larger logit is likelier, there as here: their exponentials may be
 * equal on one side only, and the tokens would change places. So a token differs from the CPU's
 * only where u falls within 1e-7 or so of the border between two, or top_p within as little of the
 * end of its list. */
#include "cuda/sample.h"
#include "cuda/philox.cuh"
#include "cuda/wide_rows.cuh"

#include <stdlib.h>
#include <string.h>

#define SAMPLE_STREAM 1    /* of cpu/sample.c */
#define SPREAD_VOCAB  8192 /* rows from this length on are given all blocks of a cluster */

struct sample_args {
    struct row_plan plan;
    const float *logits;
    struct claas_sample *samples;
    float mass_scale;
    bool quads;
};

struct alignas(16) sample_shared {
    struct row_shared row;
    struct digit_bins<mass_t> bins;
};

/* --- the random number: claas_random_uniform of actors/base/random.c --- */

static __device__ float uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];

    philox(seed, stream, index, words);
    return (float)(words[0] >> 8) * 5.9604644775390625e-8F; /* 2^-24 */
}

/* --- choosing --- */

/* The largest key below `bound`: 0 if there is none. */
static __device__ row_key_t best_below(struct row_block *block, const struct row_slice *z,
                                       row_key_t bound)
{
    struct row_sums sums = row_nothing();

    for (int i = (int)threadIdx.x; i < z->count; i += (int)blockDim.x) {
        row_key_t key = row_key(z->values[i], z->begin + i);

        sums.key = key < bound && key > sums.key ? key : sums.key;
    }
    return row_fold(block, sums, FOLD_KEY).key;
}

/* What is left of `wanted` (1 or more) where the part `shares[i]` is that in which the sum of parts
 * reaches it; the part's number. */
static __device__ int find_share(const mass_t *shares, int count, int stride, mass_t *wanted)
{
    int last = count - 1;

    for (int i = 0; i < last; i++) {
        mass_t share = shares[i * stride];

        if (share >= *wanted)
            return i;
        *wanted -= share;
    }
    return last;
}

/* Within the block: the element at which the sum of masses, in order, reaches `wanted`. Each warp
 * takes a part of what is left; the part that is hit is what is left then. */
static __device__ int find_element(struct row_block *block, const struct row_values *p, float scale,
                                   mass_t wanted)
{
    int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    int first = 0, left = p->count;
    mass_t *shares = &block->shared->warps[0][0].mass[0];
    int stride = (int)(sizeof(struct row_sums) / sizeof(mass_t));

    while (left > 1) {
        int part = (left + warps - 1) / warps;
        int begin = min(warp * part, left), end = min(begin + part, left);
        mass_t sum = 0;

        for (int i = begin + lane; i < end; i += 32)
            sum += to_mass(row_value(p, first + i), scale);
        for (int step = 16; step > 0; step /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane == 0)
            shares[warp * stride] = sum;
        __syncthreads();
        begin = find_share(shares, (left + part - 1) / part, stride, &wanted) * part;
        first += begin;
        left = min(part, left - begin);
        __syncthreads();
    }
    return p->begin + first;
}

/* The first index at which the sum of masses exceeds u times the whole. Comes after a fold of them,
 * whose slots still have the share of each block. */
static __device__ int draw_in_order(struct row_block *block, const struct row_values *p,
                                    float scale, mass_t wanted)
{
    struct row_shared *shared = block->shared;
    const struct row_sums *slots = shared->slots[(block->folds - 1) & 1];
    int owner;

    if (threadIdx.x == 0) {
        mass_t shares[ROW_BLOCKS_MAX];

        for (int rank = 0; rank < block->blocks; rank++)
            shares[rank] = slots[rank].mass[0];
        shared->owner = find_share(shares, block->blocks, 1, &wanted);
        shared->wanted = wanted;
    }
    __syncthreads();
    owner = shared->owner;
    if (owner == block->rank) {
        int token = find_element(block, p, scale, shared->wanted);

        if (threadIdx.x == 0)
            shared->token = token;
    }
    row_sync(block);
    return *row_remote(&shared->token, owner, block->blocks);
}

/* floor(u mass) + 1: the least integer above u mass. */
static __device__ mass_t above_share(mass_t mass, float u)
{
    mass_t wanted = (mass_t)((double)mass * (double)u) + 1;

    return wanted < mass ? wanted : mass;
}

static __device__ mass_t mass_from(struct row_block *block, const struct row_values *p, float scale,
                                   row_key_t bound)
{
    struct row_sums sums = row_nothing();

    for (int i = (int)threadIdx.x; i < p->count; i += (int)blockDim.x) {
        if (row_value_key(p, i) >= bound)
            sums.mass[0] += to_mass(row_value(p, i), scale);
    }
    return row_fold(block, sums, FOLD_MASS).mass[0];
}

/* total: mass and number of the tokens that are not impossible. */
static __device__ int draw_filtered(struct row_block *block, struct digit_bins<mass_t> *bins,
                                    const struct claas_sample *sample, const struct row_values *p,
                                    float scale, float u, const mass_t total[2])
{
    row_key_t bound = 0, other;
    mass_t wanted;

    if (sample->top_k > 0 && (mass_t)sample->top_k < total[1])
        bound = select_key(block, bins, p, (mass_t)sample->top_k, 0.0F, false);
    if (sample->top_p < 1) {
        wanted = (mass_t)ceil((double)sample->top_p * (double)total[0]);
        wanted = wanted < 1 ? 1 : wanted > total[0] ? total[0] : wanted;
        other = select_key(block, bins, p, wanted, scale, true);
        bound = other > bound ? other : bound;
    }
    wanted = above_share(mass_from(block, p, scale, bound), u);
    return row_key_id(select_key(block, bins, p, wanted, scale, true));
}

/* `space`: room for the block's part of p, or NULL. */
static __device__ int choose(struct row_block *block, struct digit_bins<mass_t> *bins,
                             const struct claas_sample *sample, const struct row_slice *z,
                             float *space, float max, float scale, int vocab)
{
    struct row_values p = {z->values, z->values, z->begin, z->count,
                           true,      max,       sample->temperature};
    struct row_sums sums = row_nothing();
    float u = uniform(sample->seed, SAMPLE_STREAM, sample->index);

    for (int i = (int)threadIdx.x; i < p.count; i += (int)blockDim.x) {
        float value = row_value(&p, i);

        if (space)
            space[i] = value;
        sums.mass[0] += to_mass(value, scale);
        sums.mass[1] += value > 0;
    }
    sums = row_fold(block, sums, FOLD_MASS);
    if (space) {
        p.values = space;
        p.scaled = false;
    }
    if (sample->top_p >= 1 && (sample->top_k <= 0 || sample->top_k >= vocab))
        return draw_in_order(block, &p, scale, above_share(sums.mass[0], u));
    return draw_filtered(block, bins, sample, &p, scale, u, sums.mass);
}

/* The likeliest tokens, best first: the largest key below the one before. */
static __device__ void list_top(struct row_block *block, const struct row_slice *z,
                                const float *row, float lse, row_key_t best, int vocab,
                                struct claas_sample *sample)
{
    int wanted = min(sample->top_logprobs, CLAAS_TOP_LOGPROBS_MAX);

    for (int i = 0; i < wanted; i++) {
        if (i > 0 && i < vocab)
            best = best_below(block, z, best);
        if (block->rank == 0 && threadIdx.x == 0) {
            int id = row_key_id(best);

            sample->top_tokens[i] = i < vocab ? id : -1;
            sample->top_logprob[i] = i < vocab ? row[id] - lse : -INFINITY;
        }
    }
}

static __device__ void sample_row(struct row_block *block, const struct sample_args *args,
                                  const struct row_slice *z, float *space, const float *row,
                                  struct digit_bins<mass_t> *bins, struct claas_sample *ret)
{
    const struct claas_sample sample = *ret;
    bool writes = block->rank == 0 && threadIdx.x == 0;
    int token = sample.given, vocab = args->plan.vocab;
    double log_sum;
    float max, lse;
    row_key_t best;

    log_sum = row_measure(block, z, args->mass_scale, &max);
    lse = row_lse(max, log_sum);
    if (!isfinite(lse)) {
        if (writes)
            ret->token = -1;
        return;
    }
    best = best_below(block, z, ~(row_key_t)0);
    if (token < 0 || token >= vocab) {
        token = row_key_id(best);
        if (sample.temperature > 0 && sample.top_k != 1)
            token = choose(block, bins, &sample, z, space, max, args->mass_scale, vocab);
    }
    if (writes) {
        ret->token = token;
        ret->logprob = row[token] - lse;
    }
    list_top(block, z, row, lse, best, vocab, ret);
}

static __global__ void __launch_bounds__(1024, 1) sample_rows(const struct sample_args args)
{
    extern __shared__ __align__(16) unsigned char row_memory[];
    struct sample_shared *shared = (struct sample_shared *)row_memory;
    float *memory = (float *)(shared + 1);
    size_t index = blockIdx.x / (unsigned)args.plan.blocks;
    const float *row = args.logits + index * (size_t)args.plan.vocab;
    struct row_block block = row_open(&args.plan, row_memory);
    struct row_slice z = {(float *)(row + block.begin), block.begin, block.count, args.quads};
    bool resident = args.plan.resident;

    if (resident) {
        z.values = memory;
        z.quads = true;
        row_fetch(row + block.begin, block.count, args.quads, memory);
        row_fetched();
    }
    row_meet(&block);
    sample_row(&block, &args, &z, resident ? memory + args.plan.slice : NULL, row, &shared->bins,
               &args.samples[index]);
    if (block.blocks > 1)
        row_sync(&block); /* a block's shared memory must outlive its readers */
}

/* --- host --- */

int cuda_sample(struct cuda_context *context, int vocab, int m, const float *logits,
                struct claas_sample *samples, struct claas_sample *staging,
                struct claas_sample *device_samples)
{
    struct sample_args args = {};
    size_t bytes = (size_t)(m > 0 ? m : 0) * sizeof(*samples);
    int code;

    if (m <= 0)
        return 0;
    code = row_plan(context, (const void *)sample_rows, vocab, 2, sizeof(struct sample_shared),
                    vocab >= SPREAD_VOCAB ? ROW_BLOCKS : 1, &args.plan);
    if (code < 0)
        return code;
    args.logits = logits;
    args.samples = device_samples;
    args.mass_scale = row_mass_scale(vocab);
    args.quads = vocab % 4 == 0 && aligned16(logits);
    memcpy(staging, samples, bytes);
    code = cuda_check(
        context,
        cudaMemcpyAsync(device_samples, staging, bytes, cudaMemcpyHostToDevice, context->stream),
        "samples");
    if (code >= 0)
        code = row_launch(context, sample_rows, &args.plan, m, &args, "sampling");
    if (code >= 0)
        code = cuda_check(context,
                          cudaMemcpyAsync(staging, device_samples, bytes, cudaMemcpyDeviceToHost,
                                          context->stream),
                          "samples");
    if (code >= 0)
        code = cuda_wait(context);
    if (code >= 0)
        memcpy(samples, staging, bytes);
    return code;
}
