/* Causal attention, backward, on sm_90a: what grad_keys and grad_queries of attention_bwd.cu do
 * (formulas there), by warpgroup products.
 *
 * grad_keys_wide: a cluster of two blocks takes a window of 128 key rows of one kv head, 64 for
 *   each of a block's two warpgroups, and walks over the queries that see them in tiles of 64 rows
 *   (64 / group queries with all heads of the group). Each block takes every second tile
 *   (walk_rank), since the whole launch waits for the longest walk. For a tile: S^T = K Q^T and
 *   dP^T = V dO^T from shared memory; P^T and dS^T, in registers, are the left operands of
 *   dV += P^T dO and dK += dS^T Q. At the end block 1 sends its sums of dK to block 0, which stores
 *   dK, and block 0 those of dV to block 1 (mbarrier.cuh). What is sent comes to lie where the
 *   tiles were.
 * grad_queries_wide: a block takes a window of 128 rows (query, head of the group) and walks over
 *   the keys in tiles of 64 positions: S = Q K^T, dP = dO V^T, dQ += dS K. It needs nothing of
 *   grad_keys_wide and begins on multiprocessors that grad_keys_wide leaves idle (launch.cuh).
 *
 * The exponentials of a tile run beside dP, the differences beside dV, and the last product beside
 * the next tile's first. There are three stages, since a tile is still read when the next one is
 * and the one after that is copied.
 * Shared memory, D = 128: 2 x 32 KB and 3 x 32 KB; registers: dK 64, dV 64, S 32, dP 32, operands
 * 32.
 *
 * Every sum has one order: a key's are those over block 0's tiles plus those over block 1's. Tiles
 * begin where those of attention_bwd.cu do. */
#include "cuda/attention_grad.cuh"
#include "cuda/attention_sm90.cuh"
#include "cuda/launch.cuh"
#include "cuda/mbarrier.cuh"

#define WG      2
#define THREADS (128 * WG)
#define ROWS    (64 * WG) /* of a block */
#define TILE    64        /* rows of a tile walked over */
#define NT      (TILE / 8)
#define STAGES  3
#define PAIR    2 /* blocks of a cluster that share the walks of a window */

/* The result of a product over a tile as the left operand of the next. */
typedef uint32_t operand[NT / 2][4];

/* --- keys and values --- */

template <int D> struct key_block {
    bf16 k[ROWS * D], v[ROWS * D];
    union {
        struct {
            bf16 q[STAGES][TILE * D], dout[STAGES][TILE * D];
        };
        float4 sums[D / 8][THREADS]; /* of the cluster's other block, as its threads held them */
    };
    float lse[STAGES][TILE], delta[STAGES][TILE];
    int limit[STAGES][TILE]; /* the query sees the keys up to this position */
    uint64_t counted;        /* mbarrier: the sums' bytes; a phase for each segment */
};

/* Starts the copy of the tile at which the walk stands. Rows beyond its last query are zero and add
 * zeros. */
template <int D>
static __device__ __forceinline__ void load_walk(const struct grad_args &args,
                                                 const struct query_walk &walk, int g,
                                                 int inverse, struct key_block<D> *to, int stage)
{
    const struct cuda_attention &a = args.a;
    const int i0 = walk.tile * args.queries, first = walk.run.first + i0;
    const int count = min(args.queries, walk.run.count - i0), head = g * args.group;

    wide_rows<D, TILE, THREADS>(to->q[stage], (const bf16 *)a.qkv + (size_t)head * D,
                                (size_t)a.ldqkv, first, count, args.group, inverse);
    wide_rows<D, TILE, THREADS>(to->dout[stage], args.dout + (size_t)head * D,
                                (size_t)(a.heads * D), first, count, args.group, inverse);
    if (threadIdx.x < TILE) {
        const int r = (int)threadIdx.x;
        const bool valid = r < count * args.group;
        const int i = valid ? r * inverse >> 16 : 0, h = valid ? r - i * args.group : 0;
        const size_t at = (size_t)(first + i) * a.heads + head + h;

        copy_4(&to->lse[stage][r], a.lse + at, valid);
        copy_4(&to->delta[stage][r], args.delta + at, valid);
        to->limit[stage][r] = walk.limit ? walk.limit - 1 : walk.run.pos + i0 + i;
    }
}

/* Scores of the warp's 16 keys (rows; the first at position `key`) and a tile's queries (columns)
 * become probabilities. */
static __device__ __forceinline__ void probabilities(float (&s)[NT][4], const float *lse,
                                                     const int *limit, int key, bool masked,
                                                     float scale2)
{
    const int lane = (int)threadIdx.x % 32, column = 2 * (lane % 4), row = key + lane / 4;

#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float2 log = *(const float2 *)(lse + 8 * n + column);
        const float base[2] = {-log.x * ATTN_LOG2E, -log.y * ATTN_LOG2E};

#pragma unroll
        for (int e = 0; e < 4; e++)
            s[n][e] = power_of_2(fmaf(s[n][e], scale2, base[e % 2]));
    }
    if (masked)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int2 last = *(const int2 *)(limit + 8 * n + column);

#pragma unroll
            for (int e = 0; e < 4; e++)
                if (row + 8 * (e / 2) > (e % 2 ? last.y : last.x))
                    s[n][e] = 0;
        }
}

/* dP becomes dS = P (dP - delta), delta of the columns. */
static __device__ __forceinline__ void differences(float (&dp)[NT][4], const float (&p)[NT][4],
                                                   const float *delta)
{
    const int column = 2 * ((int)threadIdx.x % 4);

#pragma unroll
    for (int n = 0; n < NT; n++) {
        const float2 mean = *(const float2 *)(delta + 8 * n + column);

#pragma unroll
        for (int e = 0; e < 4; e++)
            dp[n][e] = p[n][e] * (dp[n][e] - (e % 2 ? mean.y : mean.x));
    }
}

/* Begins two products of 64 rows, from row0 on, with all rows of a tile: scores from left and
 * right, dP from left_d and right_d. */
template <int D>
static __device__ __forceinline__ void ask_scores(float (&s)[NT][4], float (&dp)[NT][4],
                                                  const bf16 *left, const bf16 *left_d, int row0,
                                                  const bf16 *right, const bf16 *right_d)
{
    wgmma_begin();
    wgmma_product_nt<D, ROWS, TILE>(s, left, row0, right);
    wgmma_close();
    wgmma_product_nt<D, ROWS, TILE>(dp, left_d, row0, right_d);
    wgmma_close();
}

/* Waits for the scores, then begins the two products that add the tile to the warpgroup's 64 keys;
 * both may still be under way at the end. key: position of the warp's first key. */
template <int D>
static __device__ __forceinline__ void
add_queries(float (&dk)[D / 8][4], float (&dv)[D / 8][4], float (&p)[NT][4], float (&dp)[NT][4],
            operand &left_p, operand &left_s, const struct key_block<D> *shared, int stage, int key,
            bool masked, float scale2)
{
    wgmma_wait<1>(); /* also the products of the tile before */
    wgmma_settle(p);
    wgmma_settle(dk);
    wgmma_settle(dv);
    probabilities(p, shared->lse[stage], shared->limit[stage], key, masked, scale2);
    as_operand<NT>(left_p, p);
    wgmma_settle(left_p);
    wgmma_begin();
    wgmma_product_nn<TILE>(dv, left_p, shared->dout[stage]);
    wgmma_close();
    wgmma_wait<1>();
    wgmma_settle(dp);
    differences(dp, p, shared->delta[stage]);
    as_operand<NT>(left_s, dp);
    wgmma_settle(left_s);
    wgmma_begin();
    wgmma_product_nn<TILE>(dk, left_s, shared->q[stage]);
    wgmma_close();
}

/* Moves on to the block's next tile, unless the walk stands at one of them; false at the end. */
static __device__ __forceinline__ bool walk_to(const struct grad_args &args,
                                               struct query_walk &walk, int key_row, int rank)
{
    while (walk_rank(walk) != rank)
        if (!walk_next(args, walk, key_row))
            return false;
    return true;
}

/* Adds up the block's tiles, perhaps none, of the run's walk over the keys in rows key_row …
 * key_row+count-1. */
template <int D>
static __device__ __forceinline__ void
walk_tiles(const struct grad_args &args, const struct cuda_attn_run &run, int g, int rank,
           int key_row, int count, float (&dk)[D / 8][4], float (&dv)[D / 8][4],
           struct key_block<D> *shared)
{
    const struct cuda_attention &a = args.a;
    const size_t k_at = (size_t)(a.heads + g) * D, v_at = k_at + (size_t)a.kv_heads * D;
    const size_t ld = (size_t)a.ldqkv;
    const int row0 = (int)threadIdx.x / 128 * 64, row = (int)threadIdx.x / 32 * 16;
    const int inverse = wide_inverse(args.group);
    struct query_walk walk = walk_begin(args, run, key_row);
    float p[NT][4], dp[NT][4];
    operand left_p, left_s;
    int stage = 0;

    if (!walk_to(args, walk, key_row, rank))
        return;
    wide_rows<D, ROWS, THREADS>(shared->k, (const bf16 *)a.qkv + k_at, ld, key_row, count, 1,
                                65536);
    wide_rows<D, ROWS, THREADS>(shared->v, (const bf16 *)a.qkv + v_at, ld, key_row, count, 1,
                                65536);
    load_walk<D>(args, walk, g, inverse, shared, 0);
    for (bool more = true; more;) {
        const bool masked = walk_masked(args, walk, key_row + ROWS - 1);
        const int key = key_row + row + walk.shift, next = stage + 1 < STAGES ? stage + 1 : 0;

        wide_arrived<0>(); /* the next stage was read two tiles ago */
        ask_scores<D>(p, dp, shared->k, shared->v, row0, shared->q[stage], shared->dout[stage]);
        more = walk_next(args, walk, key_row) && walk_to(args, walk, key_row, rank);
        if (more)
            load_walk<D>(args, walk, g, inverse, shared, next);
        add_queries<D>(dk, dv, p, dp, left_p, left_s, shared, stage, key, masked, args.scale2);
        stage = next;
    }
    wgmma_wait<0>();
    wgmma_settle(dk);
    wgmma_settle(dv);
}

/* Sends sums to block `to`, the cluster's other one: each thread to the place of the thread there
 * that holds the same elements. Only warps that have keys do. */
template <int D>
static __device__ __forceinline__ void push_sums(const float (&c)[D / 8][4], int to,
                                                 const struct key_block<D> *shared)
{
    const uint32_t at = cluster_address(&shared->sums[0][threadIdx.x], to);
    const uint32_t counted = cluster_address(&shared->counted, to);

#pragma unroll
    for (int n = 0; n < D / 8; n++)
        push_16(at + (uint32_t)(n * THREADS * (int)sizeof(float4)),
                make_float4(c[n][0], c[n][1], c[n][2], c[n][3]), counted);
}

/* Adds what was sent. To a warp without keys nothing was: what it adds here is never stored. */
template <int D>
static __device__ __forceinline__ void add_sums(float (&c)[D / 8][4],
                                                const struct key_block<D> *shared)
{
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const float4 x = shared->sums[n][threadIdx.x];

        c[n][0] += x.x;
        c[n][1] += x.y;
        c[n][2] += x.z;
        c[n][3] += x.w;
    }
}

/* The gradient of the run's keys and values in rows key_row … key_row+count-1, count <= 128. By all
 * threads of both blocks, even of one without tiles. phase: how many segments came before. */
template <int D>
static __device__ __forceinline__ void
grad_keys_segment(const struct grad_args &args, const struct cuda_attn_run &run, int g, int rank,
                  int key_row, int count, int phase, struct key_block<D> *shared)
{
    const struct cuda_attention &a = args.a;
    const size_t k_at = (size_t)(a.heads + g) * D, v_at = k_at + (size_t)a.kv_heads * D;
    const size_t ld = (size_t)a.ldqkv;
    const int row = (int)threadIdx.x / 32 * 16;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};

    walk_tiles<D>(args, run, g, rank, key_row, count, dk, dv, shared);
    if (threadIdx.x == 0)
        mbarrier_expect(&shared->counted, (count + 15) / 16 * 16 * D * (int)sizeof(float));
    __syncwarp();
    cluster_arrive(); /* this warp's products have read their tiles */
    cluster_wait();   /* those of all warps of both blocks have */
    if (rank == 0) {
        if (row < count)
            push_sums<D>(dv, 1, shared);
        mbarrier_wait(&shared->counted, phase & 1);
        add_sums<D>(dk, shared);
        stage_rows<D, ROWS>(shared->k, row, dk, a.scale, a.scale);
        store_rows<D, ROWS>(args.dqkv + k_at, ld, key_row, 1, shared->k, row, count);
    } else {
        if (row < count)
            push_sums<D>(dk, 0, shared);
        mbarrier_wait(&shared->counted, phase & 1);
        add_sums<D>(dv, shared);
        stage_rows<D, ROWS>(shared->v, row, dv, 1, 1);
        store_rows<D, ROWS>(args.dqkv + v_at, ld, key_row, 1, shared->v, row, count);
    }
    __syncthreads(); /* the next segment's tiles are copied to where the sums are */
}

/* launch_next comes behind launch_wait: grad_queries_wide, which begins when all blocks here have
 * called it, reads row_deltas' results without waiting for them. */
template <int D>
static __global__ __launch_bounds__(THREADS, 1) void grad_keys_wide(const struct grad_args args)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    struct key_block<D> *shared = (struct key_block<D> *)memory;
    const int rank = cluster_rank();

    static_assert(ROWS == CUDA_KEY_WINDOW, "a cluster takes a window");
    static_assert(sizeof(shared->sums) <= sizeof(shared->q) + sizeof(shared->dout),
                  "the sums have room where the tiles were");
    if (threadIdx.x == 0)
        mbarrier_init(&shared->counted);
    __syncthreads(); /* a block without tiles has no other barrier of its own before it waits */
    launch_wait();
    launch_next();

    const int window = args.key_order ? (int)args.key_order[blockIdx.y] : (int)blockIdx.y;
    const int begin = window * ROWS, end = min(begin + ROWS, args.a.m);

    for (int row = begin, phase = 0; row < end; phase++) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        grad_keys_segment<D>(args, run, (int)blockIdx.x / PAIR, rank, row, stop - row, phase,
                             shared);
        row = stop;
    }
}

/* --- queries --- */

template <int D> struct query_block {
    bf16 q[ROWS * D], dout[ROWS * D];
    bf16 k[STAGES][TILE * D], v[STAGES][TILE * D];
};

/* Waits for the scores, then begins the product that adds a tile of keys, the first at position
 * `key`, to the warpgroup's 64 rows; it is still under way at the end. */
template <int D>
static __device__ __forceinline__ void add_keys(float (&dq)[D / 8][4], float (&s)[NT][4],
                                                float (&dp)[NT][4], operand &left, const bf16 *k,
                                                const struct query_rows &rows, int key, bool masked,
                                                float scale2)
{
    const int column = key + 2 * ((int)threadIdx.x % 4);

    wgmma_wait<1>(); /* also the product of the tile before */
    wgmma_settle(s);
    wgmma_settle(dq);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = power_of_2(fmaf(s[n][e], scale2, -rows.lse2[e / 2]));
            if (masked && column + 8 * n + e % 2 > rows.position[e / 2])
                s[n][e] = 0;
        }
    wgmma_settle(s); /* before the wait, not after it */
    wgmma_wait<0>();
    wgmma_settle(dp);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            dp[n][e] = s[n][e] * (dp[n][e] - rows.delta[e / 2]);
    as_operand<NT>(left, dp);
    wgmma_settle(left);
    wgmma_begin();
    wgmma_product_nn<TILE>(dq, left, k);
    wgmma_close();
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
    const int last = first_pos + count - 1, tiles = last / TILE + 1, used = count * args.group;
    const int row0 = (int)threadIdx.x / 128 * 64, row = (int)threadIdx.x / 32 * 16;
    const struct query_rows rows = query_rows_of(args, first, first_pos, row, used, head);
    const int inverse = wide_inverse(args.group);
    float dq[D / 8][4] = {}, s[NT][4], dp[NT][4];
    operand left;

    wide_rows<D, ROWS, THREADS>(shared->q, (const bf16 *)a.qkv + (size_t)head * D, (size_t)a.ldqkv,
                                first, count, args.group, inverse);
    wide_rows<D, ROWS, THREADS>(shared->dout, args.dout + (size_t)head * D, (size_t)(a.heads * D),
                                first, count, args.group, inverse);
    wide_keys<D, TILE, THREADS>(shared->k[0], keys, keys.k, 0, last);
    wide_keys<D, TILE, THREADS>(shared->v[0], keys, keys.v, 0, last);
    for (int t = 0, stage = 0; t < tiles; t++) {
        const int key = t * TILE, next = stage + 1 < STAGES ? stage + 1 : 0;

        wide_arrived<0>(); /* the next stage was read two tiles ago */
        ask_scores<D>(s, dp, shared->q, shared->dout, row0, shared->k[stage], shared->v[stage]);
        if (t + 1 < tiles) {
            wide_keys<D, TILE, THREADS>(shared->k[next], keys, keys.k, key + TILE, last);
            wide_keys<D, TILE, THREADS>(shared->v[next], keys, keys.v, key + TILE, last);
        }
        add_keys<D>(dq, s, dp, left, shared->k[stage], rows, key, key + TILE - 1 > first_pos,
                    args.scale2);
        stage = next;
    }
    wgmma_wait<0>();
    wgmma_settle(dq);
    __syncthreads();
    stage_rows<D, ROWS>(shared->q, row, dq, a.scale, a.scale);
    store_rows<D, ROWS>(args.dqkv + (size_t)head * D, (size_t)a.ldqkv, first, args.group, shared->q,
                        row, used);
    __syncthreads();
}

/* Runs beside grad_keys_wide, whose blocks have all begun when this kernel does. Neither touches
 * what the other writes, so only this kernel's end has to wait (launch.cuh). Its last block does
 * that: any other one, while it waits, would keep its multiprocessor from the blocks still to
 * begin. */
template <int D>
static __global__ __launch_bounds__(THREADS, 1) void
grad_queries_wide(const struct grad_args args, const struct wide_order order)
{
    extern __shared__ __align__(1024) uint8_t memory[];
    const int queries = ROWS / args.group;
    const int begin = wide_window(order, (int)blockIdx.y) * queries;
    const int end = min(begin + queries, args.a.m);

    launch_next();
    for (int row = begin; row < end;) {
        const struct cuda_attn_run run = args.a.runs[args.a.row_run[row]];
        const int stop = min(end, run.first + run.count);

        grad_queries_segment<D>(args, run, (int)blockIdx.x, row - run.first, stop - row,
                                (struct query_block<D> *)memory);
        row = stop;
    }
    if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1)
        launch_wait();
}

/* --- host --- */

/* Heads are the grid's fastest dimension: blocks that begin together have walks of one length. */
template <int D>
static int launch_wide(struct cuda_context *context, const struct grad_args &args)
{
    static bool keys_ready = false, queries_ready = false;
    const size_t keys_bytes = sizeof(struct key_block<D>), bytes = sizeof(struct query_block<D>);
    const unsigned groups = (unsigned)args.a.kv_heads;
    const struct wide_order order = wide_order_of(&args.a, ROWS / args.group);
    int err = allow_shared(context, grad_keys_wide<D>, keys_bytes, &keys_ready);

    if (err < 0)
        return err;
    err = allow_shared(context, grad_queries_wide<D>, bytes, &queries_ready);
    if (err < 0)
        return err;
    err = launch_clusters(context, "attention's gradient of keys", grad_keys_wide<D>,
                          dim3(PAIR * groups, (unsigned)((args.a.m + ROWS - 1) / ROWS)),
                          dim3(THREADS), keys_bytes, PAIR, args);
    if (err < 0)
        return err;
    return launch(context, "attention's gradient of queries", grad_queries_wide<D>,
                  wide_grid(order, &args.a), dim3(THREADS), bytes, args, order);
}

int cuda_attention_bwd_sm90(struct cuda_context *context, const struct grad_args &args)
{
    struct grad_args tiled = args;

    tiled.queries = TILE / args.group;
    return args.a.head_dim == 64 ? launch_wide<64>(context, tiled)
                                 : launch_wide<128>(context, tiled);
}
