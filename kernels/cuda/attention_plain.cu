/* Causal attention without tensor cores: float32, and bf16 with a head_dim or an alignment that the
 * tiles do not take. A warp does one row of one head; sums are in one order, whatever else is in
 * the pass.
 *
 *   forward    out = sum over keys of softmax(scale q.k) v
 *   gradients  p = exp(scale q.k - lse), ds = p (dout.v - delta) scale
 *              dq = sum over keys of ds k     dk = sum over queries of ds q, dv = sum of p dout
 *
 * Keys (or queries, for dk and dv) go in lots of 32: each lane has the products of one of them over
 * head_dim, then each lane has the sums of its elements of head_dim (j = lane, lane+32, …) over the
 * 32. Float32 throughout; P is rounded to act for the product with V. The formulas are those of
 * cpu/ops_ref_attn_tmpl.h. The floor is arithmetic on CUDA cores; nothing here is tuned. */
#include "cuda/attention_internal.h"

#include <cuda_bf16.h>

#define HEAD_MAX 256
#define LANE_MAX (HEAD_MAX / 32) /* elements of head_dim of a lane */
#define WARPS    4
#define THREADS  (32 * WARPS)
#define ALL      0xffffffffu

typedef __nv_bfloat16 bf16;

struct plain_args {
    struct cuda_attention a;
    const int32_t *children;
    const void *dout;
    const float *delta;
    void *dqkv;
    int group;
};

static __device__ __forceinline__ float load(const float *x)
{
    return *x;
}
static __device__ __forceinline__ float load(const bf16 *x)
{
    return __bfloat162float(*x);
}
static __device__ __forceinline__ void store(float *x, float value)
{
    *x = value;
}
static __device__ __forceinline__ void store(bf16 *x, float value)
{
    *x = __float2bfloat16_rn(value);
}
static __device__ __forceinline__ float rounded(const float *, float x)
{
    return x;
}
static __device__ __forceinline__ float rounded(const bf16 *, float x)
{
    return __bfloat162float(__float2bfloat16_rn(x));
}

/* Vectors of a warp in shared memory, as float. */
struct vectors {
    float a[HEAD_MAX], b[HEAD_MAX];
};

template <typename T> static __device__ __forceinline__ void fetch(float *to, const T *from, int d)
{
    for (int j = (int)threadIdx.x % 32; j < d; j += 32)
        to[j] = load(from + j);
}

template <typename T> static __device__ __forceinline__ float dot(const float *x, const T *y, int d)
{
    float sum = 0;

    for (int j = 0; j < d; j++)
        sum = fmaf(x[j], load(y + j), sum);
    return sum;
}

/* sum[e] += over the lanes l < count, in order: weight of lane l times element lane + 32 e of its
 * vector, which lies at base + (at of lane l). */
template <typename T>
static __device__ __forceinline__ void add_lot(float (&sum)[LANE_MAX], float weight, const T *base,
                                               size_t at, int count, int d)
{
    const int lane = (int)threadIdx.x % 32;

    for (int l = 0; l < count; l++) {
        const float w = __shfl_sync(ALL, weight, l);
        const T *from = base + __shfl_sync(ALL, (unsigned long long)at, l);

#pragma unroll
        for (int e = 0; e < LANE_MAX; e++)
            if (lane + 32 * e < d)
                sum[e] = fmaf(w, load(from + lane + 32 * e), sum[e]);
    }
}

template <typename T>
static __device__ __forceinline__ void put(T *to, const float (&sum)[LANE_MAX], float scale, int d)
{
    const int lane = (int)threadIdx.x % 32;

#pragma unroll
    for (int e = 0; e < LANE_MAX; e++)
        if (lane + 32 * e < d)
            store(to + lane + 32 * e, sum[e] * scale);
}

static __device__ __forceinline__ float warp_max(float x)
{
    for (int step = 16; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}
static __device__ __forceinline__ float warp_sum(float x)
{
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(ALL, x, step);
    return x;
}

/* --- forward --- */

template <typename T>
static __global__ __launch_bounds__(THREADS) void attend(const struct plain_args args)
{
    __shared__ struct vectors shared[WARPS];
    const struct cuda_attention &a = args.a;
    const int lane = (int)threadIdx.x % 32, d = a.head_dim;
    const size_t item = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int row = (int)(item / a.heads), head = (int)(item % a.heads);
    float *q = shared[threadIdx.x / 32].a;
    float max = -INFINITY, sum = 0, out[LANE_MAX] = {};

    if (row >= a.m)
        return;
    const struct cuda_attn_run run = a.runs[a.row_run[row]];
    const struct attn_keys<T> keys = attn_keys_of<T>(a, run, head / args.group);
    const int position = run.pos + row - run.first;

    fetch(q, (const T *)a.qkv + (size_t)row * a.ldqkv + (size_t)head * d, d);
    __syncwarp();
    for (int p0 = 0; p0 <= position; p0 += 32) {
        const int count = min(32, position + 1 - p0);
        const size_t at = attn_key_at(keys, min(p0 + lane, position));
        const float score = lane < count ? dot(q, keys.k + at, d) * a.scale : -INFINITY;
        const float top = fmaxf(max, warp_max(score)), shrink = expf(max - top);
        const float p = expf(score - top);

        max = top;
        sum = fmaf(sum, shrink, warp_sum(p));
#pragma unroll
        for (int e = 0; e < LANE_MAX; e++)
            out[e] *= shrink;
        add_lot(out, rounded(keys.v, p), keys.v, at, count, d);
    }
    put((T *)a.out + item * d, out, 1.0f / sum, d);
    if (a.lse && lane == 0)
        a.lse[item] = max + logf(sum);
}

/* --- gradient of queries --- */

template <typename T>
static __global__ __launch_bounds__(THREADS) void grad_queries(const struct plain_args args)
{
    __shared__ struct vectors shared[WARPS];
    const struct cuda_attention &a = args.a;
    const int lane = (int)threadIdx.x % 32, d = a.head_dim;
    const size_t item = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int row = (int)(item / a.heads), head = (int)(item % a.heads);
    struct vectors *own = &shared[threadIdx.x / 32];
    float dq[LANE_MAX] = {};

    if (row >= a.m)
        return;
    const struct cuda_attn_run run = a.runs[a.row_run[row]];
    const struct attn_keys<T> keys = attn_keys_of<T>(a, run, head / args.group);
    const int position = run.pos + row - run.first;
    const size_t at_row = (size_t)row * a.ldqkv + (size_t)head * d;

    fetch(own->a, (const T *)a.qkv + at_row, d);
    fetch(own->b, (const T *)args.dout + item * d, d);
    __syncwarp();
    for (int p0 = 0; p0 <= position; p0 += 32) {
        const int count = min(32, position + 1 - p0);
        const size_t at = attn_key_at(keys, min(p0 + lane, position));
        const float p = expf(dot(own->a, keys.k + at, d) * a.scale - a.lse[item]);
        const float ds = p * (dot(own->b, keys.v + at, d) - args.delta[item]);

        add_lot(dq, ds, keys.k, at, count, d);
    }
    put((T *)args.dqkv + at_row, dq, a.scale, d);
}

/* --- gradient of keys and values --- */

/* Adds what the queries i0 … of a run, all heads of group g, give to one key (own->a) and value
 * (own->b). */
template <typename T>
static __device__ void add_queries(const struct plain_args &args, const struct cuda_attn_run &run,
                                   int i0, int g, const struct vectors *own, float (&dk)[LANE_MAX],
                                   float (&dv)[LANE_MAX])
{
    const struct cuda_attention &a = args.a;
    const int lane = (int)threadIdx.x % 32, d = a.head_dim;

    for (int head = g * args.group; head < (g + 1) * args.group; head++)
        for (int i = i0; i < run.count; i += 32) {
            const int count = min(32, run.count - i);
            const size_t row = (size_t)(run.first + i + min(lane, count - 1));
            const size_t item = row * a.heads + head;
            const size_t q = row * a.ldqkv + (size_t)head * d;
            const float p = expf(dot(own->a, (const T *)a.qkv + q, d) * a.scale - a.lse[item]);
            const float ds =
                p * (dot(own->b, (const T *)args.dout + item * d, d) - args.delta[item]);

            add_lot(dv, p, (const T *)args.dout, item * d, count, d);
            add_lot(dk, ds, (const T *)a.qkv, q, count, d);
        }
}

template <typename T>
static __global__ __launch_bounds__(THREADS) void grad_keys(const struct plain_args args)
{
    __shared__ struct vectors shared[WARPS];
    const struct cuda_attention &a = args.a;
    const int d = a.head_dim;
    const size_t item = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
    const int row = (int)(item / a.kv_heads), g = (int)(item % a.kv_heads);
    const size_t k_at = (size_t)row * a.ldqkv + (size_t)(a.heads + g) * d;
    const size_t v_at = k_at + (size_t)a.kv_heads * d;
    struct vectors *own = &shared[threadIdx.x / 32];
    float dk[LANE_MAX] = {}, dv[LANE_MAX] = {};

    if (row >= a.m)
        return;
    const struct cuda_attn_run run = a.runs[a.row_run[row]];

    fetch(own->a, (const T *)a.qkv + k_at, d);
    fetch(own->b, (const T *)a.qkv + v_at, d);
    __syncwarp();
    add_queries<T>(args, run, row - run.first, g, own, dk, dv);
    for (int c = run.child_from; c < run.child_end; c++) {
        const struct cuda_attn_run child = a.runs[args.children[c]];

        if (row - child.parent_first < child.pos)
            add_queries<T>(args, child, 0, g, own, dk, dv);
    }
    put((T *)args.dqkv + k_at, dk, a.scale, d);
    put((T *)args.dqkv + v_at, dv, 1, d);
}

/* --- host --- */

static unsigned blocks_for(int rows, int heads)
{
    return (unsigned)(((size_t)rows * (size_t)heads + WARPS - 1) / WARPS);
}

int cuda_attention_plain(struct cuda_context *context, const struct cuda_attention *a)
{
    const unsigned blocks = blocks_for(a->m, a->heads);
    struct plain_args args = {};

    args.a = *a;
    args.group = a->heads / a->kv_heads;
    if (context->act == CUDA_TYPE_BF16)
        attend<bf16><<<blocks, THREADS, 0, context->stream>>>(args);
    else
        attend<float><<<blocks, THREADS, 0, context->stream>>>(args);
    return cuda_check_launch(context, "attention");
}

template <typename T>
static int launch_bwd(struct cuda_context *context, const struct plain_args &args)
{
    const struct cuda_attention *a = &args.a;

    grad_keys<T><<<blocks_for(a->m, a->kv_heads), THREADS, 0, context->stream>>>(args);
    grad_queries<T><<<blocks_for(a->m, a->heads), THREADS, 0, context->stream>>>(args);
    return cuda_check_launch(context, "attention's gradient");
}

int cuda_attention_bwd_plain(struct cuda_context *context, const struct cuda_attention_bwd *bwd)
{
    struct plain_args args = {};

    args.a = bwd->forward;
    args.children = bwd->children;
    args.dout = bwd->dout;
    args.delta = bwd->delta;
    args.dqkv = bwd->dqkv;
    args.group = args.a.heads / args.a.kv_heads;
    return context->act == CUDA_TYPE_BF16 ? launch_bwd<bf16>(context, args)
                                          : launch_bwd<float>(context, args);
}
