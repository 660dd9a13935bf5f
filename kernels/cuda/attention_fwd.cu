/* Causal attention, forward, on tensor cores (bf16, head_dim D = 64 or 128): the kernel of training
 * and prefill for any card, and which kernel takes what.
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
 *
 * Runs of few rows are left to decoding's kernels (attention_parts.cu), and on sm_90a all others to
 * those of warpgroups (attention_sm90_fwd.cu). Which kernel takes a run follows from that run
 * alone, and rows of a tile do not mix: a row's result never depends on what else is in the pass.
 *
 * Source: Dao, FlashAttention-2 (2023). */
#include "cuda/attention_fwd.cuh"
#include "cuda/launch.cuh"

struct attend_args {
    struct cuda_attention a;
    int group;
    float scale2; /* scale log2 e */
};

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
    for (int mt = 0; mt < MT; mt++) /* Q's rows of this warp are read by no other */
        store_result<D>(a, args.group, state.out[mt], state.max[mt], state.sum[mt], q,
                        row0 + 16 * mt, first, head, used);
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

        if (!attn_in_parts(args.a, args.group, run))
            attend_segment<D, MT>(args, run, (int)blockIdx.y, row - run.first, stop - row, shared);
        row = stop;
    }
}

/* --- host --- */

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

/* Tiles of 128 rows halve the traffic of keys through shared memory; 64 where those would leave
 * multiprocessors idle. The numbers are the same. */
template <int D> static int pick(struct cuda_context *context, const struct attend_args &args)
{
    const int queries = 128 / args.group;
    const int64_t blocks = (int64_t)((args.a.m + queries - 1) / queries) * args.a.kv_heads;

    if (blocks >= 2 * context->multiprocessors)
        return launch_windows<D, 2>(context, args);
    return launch_windows<D, 1>(context, args);
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

extern "C" int cuda_attention(struct cuda_context *context, const struct cuda_attention *a)
{
    struct attend_args args = {};
    int err = attn_check(a);

    if (err < 0 || a->m == 0 || a->run_count == 0)
        return err;
    if (a->finish && !attn_can_finish(context, a))
        return claas_fail(CLAAS_ERR_INTERNAL, "attention of %d rows cannot finish them", a->m);
    if (!attn_tiled(context, a))
        return cuda_attention_plain(context, a);
    args.a = *a;
    args.group = a->heads / a->kv_heads;
    args.scale2 = a->scale * ATTN_LOG2E;
    if (a->kv)
        err = cuda_attention_parts(context, a);
    if (err < 0 || (a->kv && a->longest * args.group <= ATTN_PART_ROWS))
        return err;
    if (context->warpgroups)
        return cuda_attention_sm90(context, a);
    return a->head_dim == 64 ? pick<64>(context, args) : pick<128>(context, args);
}
