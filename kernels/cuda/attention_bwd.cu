/* Causal attention, backward, on tensor cores (bf16, head_dim D = 64 or 128), for packed rows whose
 * sequences may share a prompt.
 *
 *   P = exp(scale Q K^T - lse)        dV = P^T dO          dP = dO V^T
 *   dS = P (dP - delta), delta = rows of dO.O summed
 *   dQ = scale dS K                   dK = scale dS^T Q
 *
 * Two kernels, so that every sum has one owner and one order and nothing is added atomically: P and
 * dP are computed twice, seven products of a tile instead of five.
 *
 * row_deltas: a vector of D (a row's head) lies across 2^n lanes, 8 elements each, and each lane
 *   has its part of two such vectors; the sum goes from element to element, then from lane to lane.
 * grad_keys: a block takes a window of 64 key rows of one kv head, one run of the window after the
 *   other, a warp 16 of the rows. It walks over the queries that see them: tiles of 64 / group
 *   queries with all heads of the group, first of the run itself, from the diagonal on, then of its
 *   children in order. It computes S^T = K Q^T and dP^T = V dO^T, whose register layout is that of
 *   the left operands of dV += P^T dO and dK += dS^T Q. Queries are double-buffered by cp.async.
 *   Shared memory: K, V, 2 x (Q, dO) 64 x D and lse, delta, limits: 97.5 KB for D = 128, two
 *   blocks on an SM of sm_90.
 *
 * grad_queries: a block takes a window of 64 rows (query, head of the group) as attend does, and
 *   walks over the keys in tiles of 64 positions. Shared memory: Q, dO, 2 x (K, V): 96 KB.
 *
 * Tiles of queries begin at multiples of 64 / group queries of their run and tiles of keys at
 * multiples of 64 positions, and what a row does not see adds exact zeros: so a gradient does not
 * depend on where in the pack its sequence lies.
 *
 * Source: Dao, FlashAttention-2 (2023), section 3.1.2. */
#include "cuda/attention_grad.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_chunks.cuh"

#define ROWS       64 /* of a tile */
#define DELTA_ROWS 2  /* vectors of a lane of row_deltas: more loads under way at once */

/* --- delta --- */

/* A block is lanes (x) by rows (y), a row being one of `count` vectors of d elements. VECTOR: out
 * and dout are aligned to 16 bytes. A lane or row beyond the end loads a valid element and drops
 * it: a branch around the loads would put the second row's behind the first row's. */
template <typename T, bool VECTOR>
static __global__ __launch_bounds__(ROW_THREADS) void row_deltas(size_t count, int d, const T *out,
                                                                 const T *dout, float *delta)
{
    const size_t first = (size_t)blockIdx.x * DELTA_ROWS * blockDim.y + threadIdx.y;
    const int lane = (int)threadIdx.x, from = lane * ROW_CHUNK < d ? lane * ROW_CHUNK : 0;
    float x[DELTA_ROWS][ROW_CHUNK], y[DELTA_ROWS][ROW_CHUNK];

    launch_next();
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; r++) {
        const size_t at = min(first + (size_t)r * blockDim.y, count - 1) * (size_t)d + (size_t)from;

        load8<VECTOR>(out + at, ROW_CHUNK, x[r]);
        load8<VECTOR>(dout + at, ROW_CHUNK, y[r]);
    }
#pragma unroll
    for (int r = 0; r < DELTA_ROWS; r++) {
        const size_t at = first + (size_t)r * blockDim.y;
        float sum = 0;

#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            sum = fmaf(x[r][j], y[r][j], sum);
        if (lane * ROW_CHUNK >= d)
            sum = 0;
        for (int step = (int)blockDim.x / 2; step > 0; step /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, step);
        if (lane == 0 && at < count)
            delta[at] = sum;
    }
}

/* --- keys and values --- */

/* A tile of queries in shared memory, with what belongs to each of its rows. */
template <int D> struct query_tile {
    bf16 q[ROWS * D], dout[ROWS * D];
    float lse[ROWS], delta[ROWS];
    int limit[ROWS]; /* sees the keys up to this position */
};

/* Starts the copy of the walk's tile. Beyond the last query all is zero, and so is what it adds. */
template <int D>
static __device__ __forceinline__ void load_walk(const struct grad_args &args,
                                                 const struct query_walk &walk, int g,
                                                 struct query_tile<D> *to)
{
    const struct cuda_attention &a = args.a;
    const int i0 = walk.tile * args.queries, first = walk.run.first + i0;
    const int count = min(args.queries, walk.run.count - i0), head = g * args.group;

    load_queries<D, ROWS>(to->q, (const bf16 *)a.qkv + (size_t)head * D, (size_t)a.ldqkv, first,
                          count, args.group);
    load_queries<D, ROWS>(to->dout, args.dout + (size_t)head * D, (size_t)(a.heads * D), first,
                          count, args.group);
    if (threadIdx.x < ROWS) {
        const int r = (int)threadIdx.x;
        const bool valid = r < count * args.group;
        const int i = valid ? r / args.group : 0, h = valid ? r - i * args.group : 0;
        const size_t at = (size_t)(first + i) * a.heads + head + h;

        copy_4(&to->lse[r], a.lse + at, valid);
        copy_4(&to->delta[r], args.delta + at, valid);
        to->limit[r] = walk.limit ? walk.limit - 1 : walk.run.pos + i0 + i;
    }
}

/* Adds what 32 rows of a tile of queries, from q_row on, give to the warp's 16 keys (half a tile:
 * the sums alone take 2 D / 4 registers). key: position of its first key. */
template <int D>
static __device__ __forceinline__ void
grad_keys_rows(float (&dk)[1][D / 8][4], float (&dv)[1][D / 8][4], const bf16 *k, const bf16 *v,
               int k_row, const struct query_tile<D> *tile, int q_row, int key, bool masked,
               float scale2)
{
    constexpr int NT = 4;
    const int lane = (int)threadIdx.x % 32, column = q_row + 2 * (lane % 4);
    float p[1][NT][4] = {}, dp[1][NT][4] = {};
    uint32_t left[1][NT / 2][4];

    product_nt<D, 1, NT>(p, k, k_row, tile->q, q_row);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int c = 8 * n + column + e % 2;

            p[0][n][e] = power_of_2(fmaf(p[0][n][e], scale2, -tile->lse[c] * ATTN_LOG2E));
            if (masked && key + lane / 4 + 8 * (e / 2) > tile->limit[c])
                p[0][n][e] = 0;
        }
    as_operand<NT>(left[0], p[0]);
    product_nn<D, 1, NT / 2>(dv, left, tile->dout, q_row);
    product_nt<D, 1, NT>(dp, v, k_row, tile->dout, q_row);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            dp[0][n][e] = p[0][n][e] * (dp[0][n][e] - tile->delta[8 * n + column + e % 2]);
    as_operand<NT>(left[0], dp[0]);
    product_nn<D, 1, NT / 2>(dk, left, tile->q, q_row);
}

/* Shared memory of grad_keys. */
template <int D> struct key_block {
    bf16 k[ROWS * D], v[ROWS * D];
    struct query_tile<D> tiles[2];
};

/* The gradient of the run's keys and values in rows key_row … key_row+count-1, count <= 64. */
template <int D>
static __device__ __forceinline__ void
grad_keys_segment(const struct grad_args &args, const struct cuda_attn_run &run, int g, int key_row,
                  int count, struct key_block<D> *shared)
{
    const struct cuda_attention &a = args.a;
    const size_t k_at = (size_t)(a.heads + g) * D, v_at = k_at + (size_t)a.kv_heads * D;
    const size_t ld = (size_t)a.ldqkv;
    const int row = (int)threadIdx.x / 32 * 16;
    struct query_walk walk = walk_begin(args, run, key_row);
    float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};

    load_queries<D, ROWS>(shared->k, (const bf16 *)a.qkv + k_at, ld, key_row, count, 1);
    load_queries<D, ROWS>(shared->v, (const bf16 *)a.qkv + v_at, ld, key_row, count, 1);
    load_walk<D>(args, walk, g, &shared->tiles[0]);
    for (int stage = 0, more = 1; more; stage = 1 - stage) {
        const bool masked = walk_masked(args, walk, key_row + ROWS - 1);
        const int key = key_row + row + walk.shift;

        copies_wait();
        __syncthreads();
        more = walk_next(args, walk, key_row);
        if (more)
            load_walk<D>(args, walk, g, &shared->tiles[1 - stage]);
#pragma unroll 1
        for (int q_row = 0; q_row < ROWS; q_row += 32)
            grad_keys_rows<D>(dk, dv, shared->k, shared->v, row, &shared->tiles[stage], q_row, key,
                              masked, args.scale2);
    }
    __syncthreads();
    stage_rows<D>(shared->k, row, dk[0], a.scale, a.scale);
    store_rows<D>(args.dqkv + k_at, ld, key_row, 1, shared->k, row, count);
    stage_rows<D>(shared->v, row, dv[0], 1, 1);
    store_rows<D>(args.dqkv + v_at, ld, key_row, 1, shared->v, row, count);
    __syncthreads();
}

template <int D>
static __global__ __launch_bounds__(ATTN_THREADS, 2) void grad_keys(const struct grad_args args)
{
    extern __shared__ __align__(128) uint8_t shared[];
    const int begin = (int)blockIdx.x * ROWS, end = min(begin + ROWS, args.a.m);

    for (int row = begin; row < end;) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        grad_keys_segment<D>(args, run, (int)blockIdx.y, row, stop - row,
                             (struct key_block<D> *)shared);
        row = stop;
    }
}

/* --- queries --- */

/* Shared memory of grad_queries. */
template <int D> struct query_block {
    bf16 q[ROWS * D], dout[ROWS * D];
    struct {
        bf16 k[ATTN_KEYS * D], v[ATTN_KEYS * D];
    } tiles[2];
};

/* Adds what one tile of keys, the first of them at position `key`, gives to the warp's 16 rows. */
template <int D>
static __device__ __forceinline__ void
grad_queries_tile(float (&dq)[1][D / 8][4], const struct query_block<D> *shared, int row, int stage,
                  const struct query_rows &rows, int key, bool masked, float scale2)
{
    constexpr int NT = ATTN_KEYS / 8;
    const int column = key + 2 * ((int)threadIdx.x % 4);
    const bf16 *k = shared->tiles[stage].k, *v = shared->tiles[stage].v;
    float s[1][NT][4] = {}, dp[1][NT][4] = {};
    uint32_t left[1][NT / 2][4];

    product_nt<D, 1, NT>(s, shared->q, row, k, 0);
    product_nt<D, 1, NT>(dp, shared->dout, row, v, 0);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float p = power_of_2(fmaf(s[0][n][e], scale2, -rows.lse2[e / 2]));

            if (masked && column + 8 * n + e % 2 > rows.position[e / 2])
                p = 0;
            s[0][n][e] = p * (dp[0][n][e] - rows.delta[e / 2]);
        }
    as_operand<NT>(left[0], s[0]);
    product_nn<D, 1, NT / 2>(dq, left, k, 0);
}

/* The gradient of the run's queries i0 … i0+count-1 in the heads of group g. */
template <int D>
static __device__ __forceinline__ void
grad_queries_segment(const struct grad_args &args, const struct cuda_attn_run &run, int g, int i0,
                     int count, struct query_block<D> *shared)
{
    const struct cuda_attention &a = args.a;
    const struct attn_keys<bf16> keys = attn_keys_of<bf16>(a, run, g);
    const int first = run.first + i0, first_pos = run.pos + i0, head = g * args.group;
    const int last = first_pos + count - 1, tiles = last / ATTN_KEYS + 1, used = count * args.group;
    const int row = (int)threadIdx.x / 32 * 16;
    const struct query_rows rows = query_rows_of(args, first, first_pos, row, used, head);
    float dq[1][D / 8][4] = {};

    load_queries<D, ROWS>(shared->q, (const bf16 *)a.qkv + (size_t)head * D, (size_t)a.ldqkv, first,
                          count, args.group);
    load_queries<D, ROWS>(shared->dout, args.dout + (size_t)head * D, (size_t)(a.heads * D), first,
                          count, args.group);
    load_keys<D>(shared->tiles[0].k, shared->tiles[0].v, keys, 0, last);
    for (int t = 0; t < tiles; t++) {
        const int key = t * ATTN_KEYS, next = (t + 1) % 2;

        copies_wait();
        __syncthreads();
        if (t + 1 < tiles)
            load_keys<D>(shared->tiles[next].k, shared->tiles[next].v, keys, key + ATTN_KEYS, last);
        grad_queries_tile<D>(dq, shared, row, t % 2, rows, key, key + ATTN_KEYS - 1 > first_pos,
                             args.scale2);
    }
    __syncthreads();
    stage_rows<D>(shared->q, row, dq[0], a.scale, a.scale);
    store_rows<D>(args.dqkv + (size_t)head * D, (size_t)a.ldqkv, first, args.group, shared->q, row,
                  used);
    __syncthreads();
}

template <int D>
static __global__ __launch_bounds__(ATTN_THREADS, 2) void grad_queries(const struct grad_args args)
{
    extern __shared__ __align__(128) uint8_t shared[];
    const int begin = (int)(gridDim.x - 1 - blockIdx.x) * args.queries;
    const int end = min(begin + args.queries, args.a.m);

    for (int row = begin; row < end;) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        grad_queries_segment<D>(args, run, (int)blockIdx.y, row - run.first, stop - row,
                                (struct query_block<D> *)shared);
        row = stop;
    }
}

/* --- host --- */

template <typename T>
static int launch_deltas(struct cuda_context *context, const struct cuda_attention_bwd *args)
{
    const struct cuda_attention *a = &args->forward;
    const bool vector = aligned16(a->out) && aligned16(args->dout);
    const size_t count = (size_t)a->m * (size_t)a->heads;
    unsigned lanes = 1, rows;

    static_assert(32 * ROW_CHUNK >= 256, "the lanes of a warp hold a head that attn_check accepts");
    while (lanes * ROW_CHUNK < (unsigned)a->head_dim)
        lanes *= 2;
    rows = ROW_THREADS / lanes;
    (vector ? row_deltas<T, true> : row_deltas<T, false>)<<<
        (unsigned)((count + DELTA_ROWS * rows - 1) / (DELTA_ROWS * rows)), dim3(lanes, rows), 0,
        context->stream>>>(count, a->head_dim, (const T *)a->out, (const T *)args->dout,
                           args->delta);
    return cuda_check_launch(context, "attention's deltas");
}

template <int D>
static int launch_grads(struct cuda_context *context, const struct grad_args &args)
{
    static bool keys_ready = false, queries_ready = false;
    const size_t keys_bytes = sizeof(struct key_block<D>), bytes = sizeof(struct query_block<D>);
    const unsigned groups = (unsigned)args.a.kv_heads;
    int err = allow_shared(context, grad_keys<D>, keys_bytes, &keys_ready);

    if (err < 0)
        return err;
    err = allow_shared(context, grad_queries<D>, bytes, &queries_ready);
    if (err < 0)
        return err;
    grad_keys<D><<<dim3((unsigned)((args.a.m + ROWS - 1) / ROWS), groups), ATTN_THREADS, keys_bytes,
                   context->stream>>>(args);
    err = cuda_check_launch(context, "attention's gradient of keys");
    if (err < 0)
        return err;
    grad_queries<D><<<dim3((unsigned)((args.a.m + args.queries - 1) / args.queries), groups),
                      ATTN_THREADS, bytes, context->stream>>>(args);
    return cuda_check_launch(context, "attention's gradient of queries");
}

extern "C" int cuda_attention_bwd(struct cuda_context *context,
                                  const struct cuda_attention_bwd *bwd)
{
    const struct cuda_attention *a = &bwd->forward;
    struct grad_args args = {};
    int err = attn_check(a);

    if (err < 0 || a->m == 0)
        return err;
    err = context->act == CUDA_TYPE_BF16 ? launch_deltas<bf16>(context, bwd)
                                         : launch_deltas<float>(context, bwd);
    if (err < 0)
        return err;
    if (!attn_tiled(context, a) || ((uintptr_t)bwd->dout | (uintptr_t)bwd->dqkv) % 16)
        return cuda_attention_bwd_plain(context, bwd);
    args.a = *a;
    args.children = bwd->children;
    args.key_order = bwd->key_order;
    args.dout = (const bf16 *)bwd->dout;
    args.delta = bwd->delta;
    args.dqkv = (bf16 *)bwd->dqkv;
    args.group = a->heads / a->kv_heads;
    args.queries = ROWS / args.group;
    args.scale2 = a->scale * ATTN_LOG2E;
    if (context->warpgroups)
        return cuda_attention_bwd_sm90(context, args);
    return a->head_dim == 64 ? launch_grads<64>(context, args)
                             : launch_grads<128>(context, args);
}
