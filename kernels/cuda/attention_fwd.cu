/* Causal attention, forward, on tensor cores (bf16, head_dim D = 64 or 128).
 *
 *   S = scale Q K^T, P = softmax of each row of S, O = P V, lse = log sum exp of S's row
 *
 * Flash attention: keys come in tiles of 64, each row keeps its running maximum m and sum l, and
 * rescales what it has (online softmax; exponentials to base 2, log2 e is part of the scale). The
 * heads of a group share their keys, so they lie side by side as rows of one tile ("packed GQA"):
 * row r is query r / group, head r % group, and keys and values are read once for all of them.
 *
 * attend: a block takes 64 or 128 rows (MT = 1, 2: each of 4 warps owns 16 MT rows) of one kv head,
 *   i.e. a window of 64 MT / group queries of the pack, run after run of those that meet it.
 *   Keys are double-buffered by cp.async: the next tile travels while this one is multiplied.
 *   Shared memory: Q 64 MT x D, 2 x (K, V) 64 x D: 80 or 96 KB for D = 128, two blocks on an SM of
 *   sm_90. Windows are taken from the end, where rows see most keys.
 * attend_part: serving, runs of at most 16 rows (decoding). The keys of a run are cut into parts
 *   of 128 (or 256, …: at most 32 parts) positions; a block takes one part, each warp 16 keys of
 *   every tile with all 16 rows, and the warps' results are joined at the end. 68 KB, three blocks
 *   on an SM. The grid is as large as the chip holds and walks over (part, run, kv head).
 *
 *   In decoding of few rows (cuda_attention.finish) it also does what qkv_finish would: each block
 *   normalises and rotates its queries, and the one whose part holds the row's own position makes
 *   that key and value, for its tile and for the cache. All other keys are of earlier passes, so
 *   that the first tile is fetched before the q|k|v product is done.
 *
 * join_parts: one warp per row and head joins the parts in order.
 *
 * Which kernel takes a run, and its parts, follow from that run alone, and rows of a tile do not
 * mix: a row's result never depends on what else is in the pass.
 *
 * Sources: Dao, FlashAttention-2 (2023); flash-decoding (2023) for parts. */
#include "cuda/attention_tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/qkv_head.cuh"

#define PART_ROWS ATTN_PART_ROWS
#define PART_KEYS 128 /* at least */
#define PARTS_MAX 32
/* Rows up to which attend_part finishes q, k and v itself. The launch saved, and keys that need not
 * wait for it, are some 3 us a layer; every part of a row pays its queries again, about 0.3 us more
 * than fetching them, and items are five deep on the card at 8 rows of 4,096 positions. Prediction. */
#define FINISH_ROWS 8

struct attend_args {
    struct cuda_attention a;
    int group;
    float scale2; /* scale log2 e */
    /* of parts */
    int part_rows, parts_max, items;
    float *part_out;    /* [run][kv head][part][part_rows][D], not yet divided by the sum */
    float2 *part_stats; /* the same without D: maximum of the unscaled scores, sum */
    struct cuda_qkv finish; /* if a.finish */
};

static __host__ __device__ __forceinline__ int part_keys(int end)
{
    int keys = PART_KEYS;

    while ((end + keys - 1) / keys > PARTS_MAX)
        keys *= 2;
    return keys;
}

/* The parts a run is done in, 0: not in parts. */
static __device__ __forceinline__ int parts_of(const struct attend_args &args,
                                               const struct cuda_attn_run &run)
{
    const int end = run.pos + run.count, keys = part_keys(end);

    if (!attn_in_parts(args.a, args.group, run))
        return 0;
    return (end + keys - 1) / keys;
}

/* --- one tile of keys --- */

/* What a warp keeps of 16 MT rows; [..][0] is of row l / 4, [..][1] of row l / 4 + 8. The sum is
 * this lane's share. */
template <int D, int MT> struct attend_state {
    float out[MT][D / 8][4];
    float max[MT][2], sum[MT][2];
};

template <int D, int MT>
static __device__ __forceinline__ void attend_begin(struct attend_state<D, MT> &state)
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        state.max[mt][0] = state.max[mt][1] = -INFINITY;
        state.sum[mt][0] = state.sum[mt][1] = 0;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            state.out[mt][n][0] = state.out[mt][n][1] = state.out[mt][n][2] = state.out[mt][n][3] =
                0;
    }
}

/* The same with what was summed before. */
template <int D, int NT>
static __device__ __forceinline__ void softmax_rows(float (&s)[NT][4], float (&out)[D / 8][4],
                                                    float &max, float &sum, int half, float scale2)
{
    const float shrink = soften(s, max, sum, half, scale2);

#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
    }
}

/* The warp's rows q_row … against keys k_row … k_row+8 NT-1 of the tile, the first of which is at
 * position `key`. position: of the rows; a row sees the keys up to its own. */
template <int D, int MT, int NT>
static __device__ __forceinline__ void attend_tile(struct attend_state<D, MT> &state, const bf16 *q,
                                                   int q_row, const bf16 *k, const bf16 *v,
                                                   int k_row, int key, const int (&position)[MT][2],
                                                   bool masked, float scale2)
{
    const int column = key + 2 * ((int)threadIdx.x % 4);
    float s[MT][NT][4] = {};
    uint32_t p[MT][NT / 2][4];

    product_nt<D, MT, NT>(s, q, q_row, k, k_row);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        if (masked)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (column + 8 * n + e % 2 > position[mt][e / 2])
                        s[mt][n][e] = -INFINITY;
        softmax_rows<D, NT>(s[mt], state.out[mt], state.max[mt][0], state.sum[mt][0], 0, scale2);
        softmax_rows<D, NT>(s[mt], state.out[mt], state.max[mt][1], state.sum[mt][1], 1, scale2);
        as_operand<NT>(p[mt], s[mt]);
    }
    product_nn<D, MT, NT / 2>(state.out, p, v, k_row);
}

/* --- windows of queries --- */

/* The run's queries i0 … i0+count-1 of kv head g. Ends with all warps past their use of `shared`.
 */
template <int D, int MT>
static __device__ __forceinline__ void attend_segment(const struct attend_args &args,
                                                      const struct cuda_attn_run &run, int g,
                                                      int i0, int count, bf16 *shared)
{
    constexpr int rows = 64 * MT, tile = ATTN_KEYS * D;
    const struct cuda_attention &a = args.a;
    const struct attn_keys<bf16> keys = attn_keys_of<bf16>(a, run, g);
    const int lane = (int)threadIdx.x % 32, row0 = (int)threadIdx.x / 32 * 16 * MT;
    const int used = count * args.group, first = run.first + i0, head = g * args.group;
    const int first_pos = run.pos + i0, last = first_pos + count - 1, tiles = last / ATTN_KEYS + 1;
    bf16 *q = shared, *stages = shared + rows * D;
    struct attend_state<D, MT> state;
    int position[MT][2];

    attend_begin(state);
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row0 + 16 * mt + 8 * half + lane / 4;

            position[mt][half] = r < used ? first_pos + r / args.group : last;
        }
    load_queries<D, rows>(q, (const bf16 *)a.qkv + (size_t)head * D, (size_t)a.ldqkv, first, count,
                          args.group);
    load_keys<D>(stages, stages + tile, keys, 0, last);
    for (int t = 0; t < tiles; t++) {
        bf16 *k = stages + t % 2 * 2 * tile, *next = stages + (t + 1) % 2 * 2 * tile;

        copies_wait();
        __syncthreads();
        if (t + 1 < tiles)
            load_keys<D>(next, next + tile, keys, (t + 1) * ATTN_KEYS, last);
        attend_tile<D, MT, ATTN_KEYS / 8>(state, q, row0, k, k + tile, 0, t * ATTN_KEYS, position,
                                          (t + 1) * ATTN_KEYS - 1 > first_pos, args.scale2);
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        const float low = row_sum(state.sum[mt][0]), high = row_sum(state.sum[mt][1]);
        const int r = row0 + 16 * mt + lane / 4;

        if (a.lse && lane % 4 == 0) {
            if (r < used)
                a.lse[(size_t)(first + r / args.group) * a.heads + head + r % args.group] =
                    state.max[mt][0] * a.scale + logf(low);
            if (r + 8 < used)
                a.lse[(size_t)(first + (r + 8) / args.group) * a.heads + head +
                      (r + 8) % args.group] = state.max[mt][1] * a.scale + logf(high);
        }
        /* Q's rows of this warp are read by no other. */
        stage_rows<D>(q, row0 + 16 * mt, state.out[mt], 1.0f / low, 1.0f / high);
        store_rows<D>((bf16 *)a.out + (size_t)head * D, (size_t)(a.heads * D), first, args.group, q,
                      row0 + 16 * mt, used);
    }
    __syncthreads();
}

template <int D, int MT>
static __global__ __launch_bounds__(ATTN_THREADS, 2) void attend(const struct attend_args args)
{
    extern __shared__ __align__(128) bf16 shared[];
    const int queries = 64 * MT / args.group;
    const int begin = (int)(gridDim.x - 1 - blockIdx.x) * queries;
    const int end = min(begin + queries, args.a.m);

    launch_next();
    launch_wait();
    for (int row = begin; row < end;) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        if (!parts_of(args, run))
            attend_segment<D, MT>(args, run, (int)blockIdx.y, row - run.first, stop - row, shared);
        row = stop;
    }
}

/* --- parts of keys --- */

static __device__ __forceinline__ size_t part_slot(const struct attend_args &args, int run, int g,
                                                   int part, int row)
{
    return ((((size_t)run * args.a.kv_heads + g) * args.parts_max + part) * args.part_rows) + row;
}

/* Row r of a run and kv head has its result. */
static __device__ __forceinline__ size_t row_head(const struct attend_args &args,
                                                  const struct cuda_attn_run &run, int g, int r)
{
    return (size_t)(run.first + r / args.group) * args.a.heads + g * args.group + r % args.group;
}

/* Joins the four warps' results of one part, in the warps' order, and stores them: as the result if
 * this is the only part. out: [4][16][D + 8], stats [4][16]. */
template <int D>
static __device__ __forceinline__ void
join_warps(const struct attend_args &args, const struct cuda_attn_run &run, int run_index, int g,
           int part, bool alone, const float *out, const float2 *stats)
{
    for (int i = (int)threadIdx.x; i < run.count * args.group * D; i += ATTN_THREADS) {
        const int r = i / D, j = i % D;
        float max = -INFINITY, seen = 0, sum = 0, value = 0;

        for (int w = 0; w < ATTN_WARPS; w++)
            max = fmaxf(max, stats[w * PART_ROWS + r].x);
        seen = max == -INFINITY ? 0.0f : max;
        for (int w = 0; w < ATTN_WARPS; w++) {
            const float2 s = stats[w * PART_ROWS + r];
            const float weight = power_of_2((s.x - seen) * args.scale2);

            sum = fmaf(weight, s.y, sum);
            value = fmaf(weight, out[(w * PART_ROWS + r) * (D + 8) + j], value);
        }
        if (alone) {
            const size_t at = row_head(args, run, g, r);

            ((bf16 *)args.a.out)[at * D + j] = __float2bfloat16_rn(value * (1.0f / sum));
            if (args.a.lse && j == 0)
                args.a.lse[at] = max * args.a.scale + logf(sum);
        } else {
            const size_t slot = part_slot(args, run_index, g, part, r);

            args.part_out[slot * D + j] = value;
            if (j == 0)
                args.part_stats[slot] = make_float2(max, sum);
        }
    }
}

/* --- rows that are finished here --- */

/* The queries of a run of one row into tile rows 0 …, and, if the part has the row's own key, that
 * and its value into own [2][D] and into the cache. The same bits as qkv_finish's. What they are
 * multiplied by, and where they go, does not change during the pass and is read before launch_wait. */
template <int D>
static __device__ __forceinline__ void finish_row(const struct attend_args &args,
                                                  const struct cuda_attn_run &run, int g, bool key,
                                                  bf16 *q, bf16 *own)
{
    constexpr int lanes = D / 16, at_once = ATTN_THREADS / lanes, chunks = D / 8;
    const struct cuda_qkv &a = args.finish;
    const int heads = args.group + (key ? 2 : 0);
    struct kv_slot slot = {};

    if (key)
        slot = find_slot(a, run.first);
    for (int i = (int)threadIdx.x; i < (PART_ROWS - args.group) * chunks; i += ATTN_THREADS)
        *(uint4 *)(q + place<D>(args.group + i / chunks, i % chunks)) = make_uint4(0, 0, 0, 0);
    for (int first = 0; first < heads; first += at_once) { /* warps whole, for read_head */
        const int i = first + (int)threadIdx.x / lanes, chunk = (int)threadIdx.x % lanes;
        float low[CHUNK] = {}, high[CHUNK] = {}, rstd = 0;
        struct head_turn turn = {};
        struct head_place at = {};

        at.row = run.first;
        at.at = chunk * CHUNK;
        at.q = i < args.group;
        at.k = i == args.group;
        at.here = i < heads;
        at.head = at.q ? g * args.group + i : a.heads + (at.k ? 0 : a.kv_heads) + g;
        if (at.here && (at.q || at.k))
            load_turn(a, at, run.pos, turn);
        launch_wait();
        rstd = read_head<bf16>(a, at, lanes, low, high);
        if (at.here && (at.q || at.k))
            finish_head(a, at, rstd, turn, low, high);
        if (at.here && at.q) {
            store8<true>(q + place<D>(i, chunk), CHUNK, low);
            store8<true>(q + place<D>(i, chunk + chunks / 2), CHUNK, high);
        } else if (at.here) {
            store_halves(own + (at.k ? 0 : D) + at.at, D / 2, low, high);
            store_kv<bf16>(a, at, slot, low, high);
        }
    }
}

/* The row's own key and value into row `row` of their tiles, which have arrived without them; then
 * everybody's. */
template <int D>
static __device__ __forceinline__ void place_own(bf16 *k, bf16 *v, int row, const bf16 *own)
{
    constexpr int chunks = D / 8;
    const int chunk = (int)threadIdx.x % chunks;

    if ((int)threadIdx.x < 2 * chunks)
        *(uint4 *)(((int)threadIdx.x < chunks ? k : v) + place<D>(row, chunk)) =
            *(const uint4 *)(own + (int)threadIdx.x * CHUNK);
    __syncthreads();
}

template <int D, bool FINISH>
static __device__ __forceinline__ void
attend_one_part(const struct attend_args &args, const struct cuda_attn_run &run, int run_index,
                int g, int part, int parts, bf16 *shared)
{
    constexpr int tile = ATTN_KEYS * D;
    const struct cuda_attention &a = args.a;
    const struct attn_keys<bf16> keys = attn_keys_of<bf16>(a, run, g);
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int end = run.pos + run.count, length = part_keys(end), from = part * length;
    const int last = min(from + length, end) - 1, tiles = (last - from) / ATTN_KEYS + 1;
    const bool own_key = FINISH && part == parts - 1;
    const int stored = own_key ? last - 1 : last; /* before `from`: none */
    bf16 *q = shared, *stages = shared + PART_ROWS * D, *own = stages + 4 * tile;
    float *out = (float *)stages;
    float2 *stats = (float2 *)(out + ATTN_WARPS * PART_ROWS * (D + 8));
    struct attend_state<D, 1> state;
    int position[1][2];

    attend_begin(state);
    for (int half = 0; half < 2; half++)
        position[0][half] = min(run.pos + (lane / 4 + 8 * half) / args.group, end - 1);
    if (!FINISH)
        load_queries<D, PART_ROWS>(q, (const bf16 *)a.qkv + (size_t)(g * args.group) * D,
                                   (size_t)a.ldqkv, run.first, run.count, args.group);
    load_keys<D>(stages, stages + tile, keys, from, stored);
    if (FINISH)
        finish_row<D>(args, run, g, own_key, q, own);
    for (int t = 0; t < tiles; t++) {
        bf16 *k = stages + t % 2 * 2 * tile, *next = stages + (t + 1) % 2 * 2 * tile;
        const int key = from + t * ATTN_KEYS;

        copies_wait();
        __syncthreads();
        if (own_key && t + 1 == tiles)
            place_own<D>(k, k + tile, last - key, own);
        if (t + 1 < tiles)
            load_keys<D>(next, next + tile, keys, key + ATTN_KEYS, stored);
        attend_tile<D, 1, 2>(state, q, 0, k, k + tile, 16 * warp, key + 16 * warp, position, true,
                             args.scale2);
    }
    __syncthreads();
    for (int half = 0; half < 2; half++) {
        const int r = warp * PART_ROWS + lane / 4 + 8 * half;
        const float sum = row_sum(state.sum[0][half]);

        if (lane % 4 == 0)
            stats[r] = make_float2(state.max[0][half], sum);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(out + r * (D + 8) + 8 * n + 2 * (lane % 4)) =
                make_float2(state.out[0][n][2 * half], state.out[0][n][2 * half + 1]);
    }
    __syncthreads();
    join_warps<D>(args, run, run_index, g, part, parts == 1, out, stats);
    __syncthreads();
}

/* FINISH: what describes the pass (runs, block numbers) and earlier keys are there before its first
 * kernel begins, so launch_wait can come after them: in finish_row, which every launch's first block
 * comes to. */
template <int D, bool FINISH>
static __global__ __launch_bounds__(ATTN_THREADS, 3) void attend_part(const struct attend_args args)
{
    extern __shared__ __align__(128) bf16 shared[];

    launch_next();
    if (!FINISH)
        launch_wait();
    for (int item = (int)blockIdx.x; item < args.items; item += (int)gridDim.x) {
        const int g = item % args.a.kv_heads, rest = item / args.a.kv_heads;
        const int run_index = rest % args.a.run_count, part = rest / args.a.run_count;
        const struct cuda_attn_run run = args.a.runs[run_index];
        const int parts = parts_of(args, run);

        if (part < parts)
            attend_one_part<D, FINISH>(args, run, run_index, g, part, parts, shared);
    }
}

template <int D>
static __global__ __launch_bounds__(ATTN_THREADS) void join_parts(const struct attend_args args)
{
    const int lane = (int)threadIdx.x % 32;
    const int item = (int)(blockIdx.x * ATTN_WARPS + threadIdx.x / 32);
    const int r = item % args.part_rows, rest = item / args.part_rows;
    const int g = rest % args.a.kv_heads, run_index = rest / args.a.kv_heads;
    float2 own = make_float2(-INFINITY, 0);
    float max = 0, weight = 0, sum = 0, value[D / 32] = {};
    struct cuda_attn_run run;
    int parts = 0;

    launch_next();
    if (run_index >= args.a.run_count)
        return;
    launch_wait();
    run = args.a.runs[run_index];
    parts = parts_of(args, run);
    if (parts <= 1 || r >= run.count * args.group)
        return;
    if (lane < parts)
        own = args.part_stats[part_slot(args, run_index, g, lane, r)];
    max = own.x;
    for (int step = 16; step > 0; step /= 2)
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    weight = power_of_2((own.x - max) * args.scale2);
    for (int part = 0; part < parts; part++) {
        const float w = __shfl_sync(0xffffffffu, weight, part);
        const float *out = args.part_out + part_slot(args, run_index, g, part, r) * D;

        sum = fmaf(w, __shfl_sync(0xffffffffu, own.y, part), sum);
#pragma unroll
        for (int j = 0; j < D / 32; j++)
            value[j] = fmaf(w, out[lane + 32 * j], value[j]);
    }
    for (int j = 0; j < D / 32; j++)
        ((bf16 *)args.a.out)[row_head(args, run, g, r) * D + lane + 32 * j] =
            __float2bfloat16_rn(value[j] * (1.0f / sum));
    if (args.a.lse && lane == 0)
        args.a.lse[row_head(args, run, g, r)] = max * args.a.scale + logf(sum);
}

/* --- host --- */

extern "C" int cuda_attention_part_queries(int heads, int kv_heads)
{
    return PART_ROWS / (heads / kv_heads);
}

extern "C" int cuda_attention_part_border(int position)
{
    int border = PART_KEYS * PARTS_MAX;

    while (border <= position)
        border *= 2;
    return border;
}

/* Rows of a run in parts, at most; 0: no run is done in parts. */
static int rows_in_parts(int heads, int kv_heads, int longest)
{
    const int group = heads / kv_heads, queries = cuda_attention_part_queries(heads, kv_heads);

    return group * (longest < queries ? longest : queries);
}

static int parts_at_most(int furthest)
{
    const int parts = (furthest + PART_KEYS - 1) / PART_KEYS;

    return parts < PARTS_MAX ? parts : PARTS_MAX;
}

extern "C" size_t cuda_attention_scratch_bytes(int heads, int kv_heads, int head_dim, int runs,
                                               int longest, int furthest)
{
    const int parts = parts_at_most(furthest);
    const size_t slots = (size_t)runs * (size_t)kv_heads * (size_t)parts *
                         (size_t)rows_in_parts(heads, kv_heads, longest);

    if (parts <= 1 || (head_dim != 64 && head_dim != 128))
        return 0;
    return slots * ((size_t)head_dim * sizeof(float) + sizeof(float2));
}

/* Parts to the next power of two: six sizes of grids. */
extern "C" int cuda_attention_reach(int furthest)
{
    int parts = 1;

    while (parts < PARTS_MAX && parts * PART_KEYS < furthest)
        parts *= 2;
    return parts < PARTS_MAX ? parts * PART_KEYS : INT32_MAX;
}

template <int D, int MT>
static int launch_windows(struct cuda_context *context, const struct attend_args &args)
{
    static bool ready = false;
    const size_t bytes = (size_t)(64 * MT + 4 * ATTN_KEYS) * D * sizeof(bf16);
    const int queries = 64 * MT / args.group;
    const dim3 grid((unsigned)((args.a.m + queries - 1) / queries), (unsigned)args.a.kv_heads);
    const int err = allow_shared(context, attend<D, MT>, bytes, &ready);

    if (err < 0)
        return err;
    return launch(context, "attention", attend<D, MT>, grid, dim3(ATTN_THREADS), bytes, args);
}

template <int D, bool FINISH>
static int launch_parts(struct cuda_context *context, const struct attend_args &args)
{
    static bool ready = false;
    /* queries, two stages of keys and values, a row's own */
    const size_t bytes = (size_t)(PART_ROWS + 4 * ATTN_KEYS + (FINISH ? 2 : 0)) * D * sizeof(bf16);
    const int resident = 3 * context->multiprocessors;
    const int grid = args.items < resident ? args.items : resident;
    const int rows = args.a.run_count * args.a.kv_heads * args.part_rows;
    int err = allow_shared(context, attend_part<D, FINISH>, bytes, &ready);

    if (err < 0)
        return err;
    err = launch(context, "attention in parts", attend_part<D, FINISH>, dim3((unsigned)grid),
                 dim3(ATTN_THREADS), bytes, args);
    if (err < 0 || args.parts_max == 1)
        return err;
    return launch(context, "attention in parts", join_parts<D>,
                  dim3((unsigned)((rows + ATTN_WARPS - 1) / ATTN_WARPS)), dim3(ATTN_THREADS), 0,
                  args);
}

/* Tiles of 128 rows halve the traffic of keys through shared memory; 64 where those would leave
 * multiprocessors idle. The numbers are the same. */
template <int D> static int pick(struct cuda_context *context, const struct attend_args &args)
{
    const int queries = 128 / args.group;
    const int64_t blocks = (int64_t)((args.a.m + queries - 1) / queries) * args.a.kv_heads;
    int err = 0;

    if (args.part_rows > 0)
        err = args.a.finish ? launch_parts<D, true>(context, args)
                            : launch_parts<D, false>(context, args);
    if (err < 0 || (args.a.kv && args.a.longest * args.group <= PART_ROWS))
        return err;
    if (context->warpgroups)
        return cuda_attention_sm90(context, &args.a);
    if (blocks >= 2 * context->multiprocessors)
        return launch_windows<D, 2>(context, args);
    return launch_windows<D, 1>(context, args);
}

/* Sizes of the parts and their place in the scratch. */
static int place_parts(struct attend_args *args)
{
    const struct cuda_attention *a = &args->a;
    const size_t need = cuda_attention_scratch_bytes(a->heads, a->kv_heads, a->head_dim,
                                                     a->run_count, a->longest, a->furthest);

    if (!a->kv || (a->run_count == 1 && a->longest * args->group > PART_ROWS))
        return 0;
    args->part_rows = rows_in_parts(a->heads, a->kv_heads, a->longest);
    args->parts_max = parts_at_most(a->furthest);
    args->items = a->run_count * a->kv_heads * args->parts_max;
    if (need > (a->scratch ? a->scratch_bytes : 0))
        return claas_fail(CLAAS_ERR_INTERNAL, "attention: %zu bytes of scratch, %zu are needed",
                          a->scratch ? a->scratch_bytes : (size_t)0, need);
    args->part_stats = (float2 *)a->scratch;
    args->part_out = (float *)(args->part_stats + (size_t)args->items * (size_t)args->part_rows);
    return 0;
}

int attn_check(const struct cuda_attention *a)
{
    if (a->heads < 1 || a->kv_heads < 1 || a->heads % a->kv_heads || a->head_dim < 16 ||
        a->head_dim > 256 || a->head_dim % 16)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "attention of %d heads of %d, %d of keys: not on a CUDA device", a->heads,
                          a->head_dim, a->kv_heads);
    return 0;
}

/* Runs of one row, as many as there are rows, all of them in parts; whole pieces of 16 bytes. */
static bool can_finish(const struct cuda_context *context, const struct cuda_attention *a)
{
    const struct cuda_qkv *finish = a->finish;

    return attn_tiled(context, a) && a->kv && a->longest == 1 && a->m == a->run_count &&
           a->m <= FINISH_ROWS && a->heads / a->kv_heads <= PART_ROWS && a->kv == finish->kv &&
           a->qkv == finish->qkv && !finish->raw && !finish->rstd_q && !finish->rstd_k &&
           a->ldqkv == (a->heads + 2 * a->kv_heads) * a->head_dim && aligned16(finish->bias) &&
           aligned16(finish->norm_q) && aligned16(finish->norm_k) && aligned16(finish->cos_sin);
}

extern "C" bool cuda_attention_finishes(const struct cuda_context *context,
                                        const struct cuda_attention *a)
{
    return context->fuse && a->finish && attn_check(a) == 0 && can_finish(context, a);
}

extern "C" int cuda_attention(struct cuda_context *context, const struct cuda_attention *a)
{
    struct attend_args args = {};
    int err = attn_check(a);

    if (err < 0 || a->m == 0 || a->run_count == 0)
        return err;
    if (a->finish && !can_finish(context, a))
        return claas_fail(CLAAS_ERR_INTERNAL, "attention of %d rows cannot finish them", a->m);
    if (!attn_tiled(context, a))
        return cuda_attention_plain(context, a);
    args.a = *a;
    args.group = a->heads / a->kv_heads;
    args.scale2 = a->scale * ATTN_LOG2E;
    if (a->finish)
        args.finish = *a->finish;
    err = place_parts(&args);
    if (err < 0)
        return err;
    return a->head_dim == 64 ? pick<64>(context, args) : pick<128>(context, args);
}
