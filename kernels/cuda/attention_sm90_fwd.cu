/* Causal attention, forward, on sm_90a: what attend of attention_fwd.cu does, by products of
 * warpgroups.
 *
 *   S = scale Q K^T, P = softmax of each row of S, O = P V, lse = log sum exp of S's row
 *
 * A block takes 64 or 128 rows (one or two warpgroups of 64) of one kv head: a window of 64 WG /
 * group queries of the pack, with all heads of the group side by side. Keys come in tiles of 64,
 * keys and values in two stages each, by cp.async. The order of a tile's work:
 *
 *   S of the next tile is asked for; while it runs, this tile's S become probabilities (online
 *   softmax) and O is rescaled; then O += P V
 *
 * so that a warpgroup's exponentials hide behind its own products. Shared memory for D = 128, WG =
 * 2: Q 32 KB, 2 x (K, V) 64 KB; registers: O 64, S 2 x 32, P 16.
 *
 * A row's result depends on its run alone, as in attention_fwd.cu; the tiles begin at multiples of
 * 64 positions. Source: Shah et al., FlashAttention-3 (2024), sections 3.1 and 3.2. */
#include "cuda/attention_fwd.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/launch.cuh"

#define KEYS 64 /* of a tile */

struct wide_args {
    struct cuda_attention a;
    int group;
    float scale2; /* scale log2 e */
    struct wide_order order;
};

/* What a warp keeps of its 16 rows; [..][0] is of row l / 4, [..][1] of row l / 4 + 8. The sum is
 * this lane's share. */
template <int D> struct wide_state {
    float out[D / 8][4];
    float max[2], sum[2];
};

template <int D, int WG> struct wide_shared {
    bf16 q[64 * WG * D];
    bf16 k[2][KEYS * D], v[2][KEYS * D];
};

/* Masks the scores of the tile whose first key is at position `key`; they become probabilities. */
template <int D>
static __device__ __forceinline__ void
take_scores(struct wide_state<D> &state, float (&s)[KEYS / 8][4], int key, const int (&position)[2],
            bool masked, float scale2, float (&shrink)[2])
{
    const int column = key + 2 * ((int)threadIdx.x % 4);

    if (masked)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (column + 8 * n + e % 2 > position[e / 2])
                    s[n][e] = -INFINITY;
    shrink[0] = soften(s, state.max[0], state.sum[0], 0, scale2);
    shrink[1] = soften(s, state.max[1], state.sum[1], 1, scale2);
}

/* What the tiles of a block's rows have in common. */
template <int D, int WG> struct key_walk {
    const struct attn_keys<bf16> &keys;
    struct wide_shared<D, WG> *shared;
    int row0; /* of the warpgroup */
    int tiles;
    int first_pos, last; /* of the queries */
    int position[2];     /* of this lane's rows */
    float scale2;
};

template <int D, int WG>
static __device__ __forceinline__ void ask_scores(const struct key_walk<D, WG> &walk,
                                                  float (&s)[KEYS / 8][4], const bf16 *k)
{
    wgmma_begin();
    wgmma_product_nt<D, 64 * WG, KEYS>(s, walk.shared->q, walk.row0, k);
    wgmma_close();
}

/* Does tile t, whose scores are `s`. The next tile's scores are asked for, into `next`, before
 * these become probabilities, and are there at the end. */
template <int D, int WG>
static __device__ __forceinline__ void
take_tile(const struct key_walk<D, WG> &walk, int t, float (&s)[KEYS / 8][4],
          float (&next)[KEYS / 8][4], struct wide_state<D> &state)
{
    struct wide_shared<D, WG> *shared = walk.shared;
    const int key = t * KEYS, slot = t % 2;
    float shrink[2];
    uint32_t p[KEYS / 16][4];

    wide_arrived<0>(); /* the next keys and these values; the others' readers are done */
    ask_scores<D, WG>(walk, next, shared->k[1 - slot]);
    if (t + 2 < walk.tiles)
        wide_keys<D, KEYS, 128 * WG>(shared->k[slot], walk.keys, walk.keys.k, key + 2 * KEYS,
                                     walk.last);
    wide_keys<D, KEYS, 128 * WG>(shared->v[1 - slot], walk.keys, walk.keys.v, key + KEYS,
                                 walk.last);
    take_scores(state, s, key, walk.position, key + KEYS - 1 > walk.first_pos, walk.scale2, shrink);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            state.out[n][e] *= shrink[e / 2];
    as_operand<KEYS / 8>(p, s);
    wgmma_settle(state.out);
    wgmma_settle(p);
    wgmma_begin();
    wgmma_product_nn<KEYS>(state.out, p, shared->v[slot]);
    wgmma_close();
    wgmma_wait<0>();
    wgmma_settle(next);
    wgmma_settle(state.out);
}

template <int D, int WG>
static __device__ __forceinline__ void take_last(const struct key_walk<D, WG> &walk,
                                                 float (&s)[KEYS / 8][4],
                                                 struct wide_state<D> &state)
{
    const int t = walk.tiles - 1, key = t * KEYS;
    float shrink[2];
    uint32_t p[KEYS / 16][4];

    wide_arrived<0>();
    take_scores(state, s, key, walk.position, key + KEYS - 1 > walk.first_pos, walk.scale2, shrink);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            state.out[n][e] *= shrink[e / 2];
    as_operand<KEYS / 8>(p, s);
    wgmma_settle(state.out);
    wgmma_settle(p);
    wgmma_begin();
    wgmma_product_nn<KEYS>(state.out, p, walk.shared->v[t % 2]);
    wgmma_close();
    wgmma_wait<0>();
    wgmma_settle(state.out);
}

/* Walks over all tiles. Ends with the products done. */
template <int D, int WG>
static __device__ __forceinline__ void walk_keys(const struct key_walk<D, WG> &walk,
                                                 struct wide_state<D> &state)
{
    float even[KEYS / 8][4], odd[KEYS / 8][4];
    int t = 0;

    wide_arrived<1>(); /* Q and the first keys */
    ask_scores<D, WG>(walk, even, walk.shared->k[0]);
    wgmma_wait<0>();
    wgmma_settle(even);
    for (; t + 2 < walk.tiles; t += 2) {
        take_tile<D, WG>(walk, t, even, odd, state);
        take_tile<D, WG>(walk, t + 1, odd, even, state);
    }
    if (t + 1 < walk.tiles) {
        take_tile<D, WG>(walk, t, even, odd, state);
        take_last<D, WG>(walk, odd, state);
    } else {
        take_last<D, WG>(walk, even, state);
    }
}

/* The run's queries i0 … i0+count-1 of kv head g. Ends with all warps past their use of `shared`.
 */
template <int D, int WG>
static __device__ __forceinline__ void
attend_segment(const struct wide_args &args, const struct cuda_attn_run &run, int g, int i0,
               int count, struct wide_shared<D, WG> *shared)
{
    constexpr int rows = 64 * WG, threads = 128 * WG;
    const struct cuda_attention &a = args.a;
    const struct attn_keys<bf16> keys = attn_keys_of<bf16>(a, run, g);
    const int lane = (int)threadIdx.x % 32, row0 = (int)threadIdx.x / 128 * 64;
    const int row = (int)threadIdx.x / 32 * 16; /* of the warp */
    const int used = count * args.group, first = run.first + i0, head = g * args.group;
    const int first_pos = run.pos + i0, last = first_pos + count - 1;
    struct wide_state<D> state = {};
    struct key_walk<D, WG> walk = {keys,      shared, row0, last / KEYS + 1,
                                   first_pos, last,   {},   args.scale2};

    state.max[0] = state.max[1] = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + 8 * half + lane / 4;

        walk.position[half] = r < used ? first_pos + r / args.group : last;
    }
    wide_rows<D, rows, threads>(shared->q, (const bf16 *)a.qkv + (size_t)head * D, (size_t)a.ldqkv,
                                first, count, args.group, wide_inverse(args.group));
    wide_keys<D, KEYS, threads>(shared->k[0], keys, keys.k, 0, last);
    copies_commit();
    if (last >= KEYS)
        wide_keys<D, KEYS, threads>(shared->k[1], keys, keys.k, KEYS, last);
    wide_keys<D, KEYS, threads>(shared->v[0], keys, keys.v, 0, last);
    copies_commit();
    walk_keys<D, WG>(walk, state);
    store_result<D, rows>(a, args.group, state.out, state.max, state.sum, shared->q, row, first,
                          head, used);
    __syncthreads();
}

template <int D, int WG>
static __global__ __launch_bounds__(128 * WG, 1) void attend_wide(const struct wide_args args)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    const int queries = 64 * WG / args.group;
    const int begin = wide_window(args.order, (int)blockIdx.y) * queries;
    const int end = min(begin + queries, args.a.m);

    launch_next();
    launch_wait();
    for (int row = begin; row < end;) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        if (!attn_in_parts(args.a, args.group, run))
            attend_segment<D, WG>(args, run, (int)blockIdx.x, row - run.first, stop - row,
                                  (struct wide_shared<D, WG> *)memory);
        row = stop;
    }
}

/* --- host --- */

template <int D, int WG>
static int launch_wide(struct cuda_context *context, struct wide_args args)
{
    static bool ready = false;
    const size_t bytes = sizeof(struct wide_shared<D, WG>);
    const int err = allow_shared(context, attend_wide<D, WG>, bytes, &ready);

    if (err < 0)
        return err;
    args.order = wide_order_of(&args.a, 64 * WG / args.group);
    return launch(context, "attention", attend_wide<D, WG>, wide_grid(args.order, &args.a),
                  dim3(128 * WG), bytes, args);
}

/* Two warpgroups share their keys; one where blocks of two would leave multiprocessors idle. The
 * numbers are the same. */
template <int D> static int pick(struct cuda_context *context, const struct wide_args &args)
{
    const int queries = 128 / args.group;
    const int64_t blocks = (int64_t)((args.a.m + queries - 1) / queries) * args.a.kv_heads;

    return blocks >= context->multiprocessors ? launch_wide<D, 2>(context, args)
                                              : launch_wide<D, 1>(context, args);
}

int cuda_attention_sm90(struct cuda_context *context, const struct cuda_attention *a)
{
    struct wide_args args = {};

    args.a = *a;
    args.group = a->heads / a->kv_heads;
    args.scale2 = a->scale * ATTN_LOG2E;
    return a->head_dim == 64 ? pick<64>(context, args) : pick<128>(context, args);
}
