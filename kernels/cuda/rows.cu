/* Operations on rows of activations. All of them are bound by memory: each reads its rows once,
 * keeps them in registers, computes in float32 and writes once.
 *
 * A row is cut into chunks of 8 consecutive elements, the work of one thread at a time: 16 bytes in
 * bfloat16, 32 in float32. Where n is a multiple of 8 and the pointers are 16-byte aligned, a chunk
 * is moved by 16-byte loads and stores, else element by element; which thread has which chunk is
 * the same in both, and so are the sums.
 *
 *   rmsnorm [m][n]       n <= 1024: one warp per row, 4 rows per block; more: one block per row, 2
 *                        chunks per thread (4 above 8192). Sums: a thread's chunks in order, lanes
 *                        by a butterfly, then warps by a butterfly: by n alone, never by m.
 *   qkv_finish [m][Nqkv] d/16 lanes (made a power of two) per head; a lane has 8 elements of the
 *                        head's first half and the 8 they are rotated with.
 *   swiglu [m][F]        one chunk per thread, rows end to end.
 *   copies, spread       one to eight rows per block of 256 threads.
 *
 * Formulas: cpu/ops.h. RMSNorm: Zhang and Sennrich 2019; rotation: Su et al. 2021 in the half-split
 * form; SwiGLU: Shazeer 2020. */
#include "cuda/cuda_rows.h"
#include "cuda/attention.h"

#include <cuda_bf16.h>
#include <limits.h>

#define WARP           32
#define ALL_LANES      0xffffffffu
#define CHUNK          8
#define THREADS        256

#define NORM_THREADS   512 /* of a block at most: leaves 128 registers each */
#define NORM_WARP_ROWS 4   /* rows per block where a warp has a row */
#define NORM_ITEMS_MAX 4   /* chunks per thread */
#define NORM_N_MAX     (NORM_THREADS * NORM_ITEMS_MAX * CHUNK)

#define HEAD_DIM_MAX   512 /* a warp per head */

static int divide_up(int a, int b)
{
    return (a + b - 1) / b;
}

/* True for NULL too. */
static bool aligned16(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

/* --- chunks --- */

/* p[0 … 8) as float; without VECTOR only p[0 … valid), the rest zero. */
template <bool VECTOR> __device__ static void load8(const float *p, int valid, float v[CHUNK])
{
    if constexpr (VECTOR) {
        const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];

        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            v[j] = j < valid ? p[j] : 0.0f;
    }
}

template <bool VECTOR>
__device__ static void load8(const __nv_bfloat16 *p, int valid, float v[CHUNK])
{
    if constexpr (VECTOR) {
        const uint4 raw = *(const uint4 *)p;
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};

#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[2 * j] = __uint_as_float(words[j] << 16);
            v[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            v[j] = j < valid ? __bfloat162float(p[j]) : 0.0f;
    }
}

template <bool VECTOR> __device__ static void store8(float *p, int valid, const float v[CHUNK])
{
    if constexpr (VECTOR) {
        ((float4 *)p)[0] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *)p)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            if (j < valid)
                p[j] = v[j];
    }
}

__device__ static uint32_t pack2(float low, float high)
{
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);

    return (uint32_t)__bfloat16_as_ushort(__low2bfloat16(pair)) |
           (uint32_t)__bfloat16_as_ushort(__high2bfloat16(pair)) << 16;
}

template <bool VECTOR>
__device__ static void store8(__nv_bfloat16 *p, int valid, const float v[CHUNK])
{
    if constexpr (VECTOR) {
        *(uint4 *)p =
            make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
    } else {
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            if (j < valid)
                p[j] = __float2bfloat16_rn(v[j]);
    }
}

/* v as an array of T would hold it. In pairs: a lone conversion to bfloat16 is four times as slow.
 */
__device__ static void round8(float *, const float *)
{
}
__device__ static void round8(float v[CHUNK], const __nv_bfloat16 *)
{
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) {
        const uint32_t pair = pack2(v[j], v[j + 1]);

        v[j] = __uint_as_float(pair << 16);
        v[j + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}

/* The sum over aligned groups of `width` lanes (a power of two), the same bits in each of them. All
 * lanes of the warp must come here. */
__device__ static float lanes_sum(float sum, int width)
{
    for (int step = width / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

/* --- RMSNorm --- */

struct norm_args {
    int m, n;
    const void *x; /* T [m][n] */
    const float *weight;
    float eps;
    void *y;     /* forward: T [m][n] */
    float *rstd; /* [m]; written by the forward pass, read by the backward */
    const void *dy;
    float *dx;
    void *dx_act;
};
typedef void norm_kernel(struct norm_args);

/* Over the threads of a row: blockDim.x of them, one warp or a whole block (which then comes here
 * once). */
__device__ static float row_sum(float sum)
{
    __shared__ float warps[WARP];
    const int lane = threadIdx.x % WARP;

    sum = lanes_sum(sum, WARP);
    if (blockDim.x == WARP)
        return sum;
    if (lane == 0)
        warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    return lanes_sum(lane < blockDim.x / WARP ? warps[lane] : 0.0f, WARP);
}

/* y = x rstd w, rstd = 1/sqrt(mean x^2 + eps) */
template <typename T, int ITEMS, bool VECTOR>
__global__ static void __launch_bounds__(NORM_THREADS) rmsnorm_rows(struct norm_args a)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const T *x = (const T *)a.x + (size_t)row * a.n;
    T *y = (T *)a.y + (size_t)row * a.n;
    float v[ITEMS][CHUNK], w[ITEMS][CHUNK], sum = 0, rstd;

    if (row >= a.m) /* a whole warp that has a row of its own */
        return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * CHUNK;

        if (at < a.n) {
            load8<VECTOR>(x + at, a.n - at, v[i]);
            load8<VECTOR>(a.weight + at, a.n - at, w[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if ((threadIdx.x + i * blockDim.x) * CHUNK < a.n)
#pragma unroll
            for (int j = 0; j < CHUNK; j++)
                sum += v[i][j] * v[i][j];
    rstd = 1.0f / sqrtf(row_sum(sum) / (float)a.n + a.eps);
    if (a.rstd && threadIdx.x == 0)
        a.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * CHUNK;

        if (at >= a.n)
            continue;
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            v[i][j] = v[i][j] * rstd * w[i][j];
        store8<VECTOR>(y + at, a.n - at, v[i]);
    }
}

/* g = dy w: dx += rstd (g - x rstd^2 mean(g x)) */
template <typename T, int ITEMS, bool VECTOR>
__global__ static void __launch_bounds__(NORM_THREADS) rmsnorm_bwd_rows(struct norm_args a)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const size_t start = (size_t)row * a.n;
    const T *x = (const T *)a.x + start, *dy = (const T *)a.dy + start;
    float *dx = a.dx + start;
    float v[ITEMS][CHUNK], g[ITEMS][CHUNK], d[ITEMS][CHUNK], sum = 0, rstd, shift;

    if (row >= a.m)
        return;
    rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * CHUNK;

        if (at < a.n) {
            load8<VECTOR>(x + at, a.n - at, v[i]);
            load8<VECTOR>(dy + at, a.n - at, g[i]);
            load8<VECTOR>(dx + at, a.n - at, d[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * CHUNK;
        float w[CHUNK];

        if (at >= a.n)
            continue;
        load8<VECTOR>(a.weight + at, a.n - at, w);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            g[i][j] *= w[j];
            sum += g[i][j] * v[i][j];
        }
    }
    shift = rstd * rstd * (row_sum(sum) / (float)a.n);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * CHUNK;

        if (at >= a.n)
            continue;
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            d[i][j] += rstd * (g[i][j] - v[i][j] * shift);
        store8<VECTOR>(dx + at, a.n - at, d[i]);
        if (a.dx_act)
            store8<VECTOR>((T *)a.dx_act + start + at, a.n - at, d[i]);
    }
}

/* How the chunks of a row are dealt to threads. */
struct norm_split {
    int items; /* chunks per thread: 1, 2 or 4 */
    dim3 block;
};

static struct norm_split split_row(int n)
{
    const int chunks = divide_up(n, CHUNK);
    struct norm_split split = {1, dim3(WARP, NORM_WARP_ROWS)};

    if (chunks <= WARP * NORM_ITEMS_MAX) {
        split.items = chunks <= WARP ? 1 : chunks <= 2 * WARP ? 2 : 4;
        return split;
    }
    split.items = chunks <= 2 * NORM_THREADS ? 2 : 4;
    split.block = dim3(divide_up(divide_up(chunks, split.items), WARP) * WARP, 1);
    return split;
}

template <typename T, bool VECTOR> static norm_kernel *pick_norm(int items)
{
    return items == 1   ? rmsnorm_rows<T, 1, VECTOR>
           : items == 2 ? rmsnorm_rows<T, 2, VECTOR>
                        : rmsnorm_rows<T, 4, VECTOR>;
}
template <typename T, bool VECTOR> static norm_kernel *pick_norm_bwd(int items)
{
    return items == 1   ? rmsnorm_bwd_rows<T, 1, VECTOR>
           : items == 2 ? rmsnorm_bwd_rows<T, 2, VECTOR>
                        : rmsnorm_bwd_rows<T, 4, VECTOR>;
}
template <typename T> static norm_kernel *pick_kernel(const struct norm_args *a, int items)
{
    const bool vector = a->n % CHUNK == 0 && aligned16(a->x) && aligned16(a->weight) &&
                        aligned16(a->y) && aligned16(a->dy) && aligned16(a->dx) &&
                        aligned16(a->dx_act);

    if (a->dx)
        return vector ? pick_norm_bwd<T, true>(items) : pick_norm_bwd<T, false>(items);
    return vector ? pick_norm<T, true>(items) : pick_norm<T, false>(items);
}

static int run_norm(struct cuda_context *context, const struct norm_args *args, const char *what)
{
    const struct norm_split split = split_row(args->n);
    norm_kernel *kernel = NULL;

    if (args->n < 1 || args->n > NORM_N_MAX)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "%s: rows of %d, the limit is %d", what, args->n,
                          NORM_N_MAX);
    if (args->m <= 0)
        return 0;
    kernel = context->act == CUDA_TYPE_BF16 ? pick_kernel<__nv_bfloat16>(args, split.items)
                                            : pick_kernel<float>(args, split.items);
    kernel<<<divide_up(args->m, split.block.y), split.block, 0, context->stream>>>(*args);
    return cuda_check_launch(context, what);
}

int cuda_rmsnorm(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                 float eps, void *y, float *rstd)
{
    struct norm_args args = {};

    args.m = m, args.n = n, args.x = x, args.weight = weight, args.eps = eps;
    args.y = y, args.rstd = rstd;
    return run_norm(context, &args, "rmsnorm");
}

int cuda_rmsnorm_bwd(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                     const float *rstd, const void *dy, float *dx, void *dx_act)
{
    struct norm_args args = {};

    args.m = m, args.n = n, args.x = x, args.weight = weight, args.rstd = (float *)rstd;
    args.dy = dy, args.dx = dx, args.dx_act = dx_act;
    return run_norm(context, &args, "rmsnorm_bwd");
}

/* --- q|k|v: bias, norm of each head, rotation, the key/value store --- */

/* What a thread works on: elements [at, at+8) of a head's first half and the same of its second. */
struct head_place {
    int row, head, at;
    bool q, k; /* neither: v */
    bool here; /* false: beyond the last head, or a lane beyond head_dim/2 */
};

/* heads_done: heads per row that the kernel touches, q before k before v. */
__device__ static struct head_place place_of(const struct cuda_qkv &a, int lanes, int heads_done)
{
    const uint32_t group = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    struct head_place place;

    place.row = group / heads_done;
    place.head = group % heads_done;
    place.at = threadIdx.x % lanes * CHUNK;
    place.q = place.head < a.heads;
    place.k = !place.q && place.head < a.heads + a.kv_heads;
    place.here = place.row < a.m && place.at < a.head_dim / 2;
    return place;
}

/* (low, high) -> (low cos - high sin, high cos + low sin); sign -1 turns back. table: cos, sin of 8
 * angles. */
__device__ static void rotate(float low[CHUNK], float high[CHUNK], const float *table, float sign)
{
    float cs[2 * CHUNK];

    load8<true>(table, CHUNK, cs);
    load8<true>(table + CHUNK, CHUNK, cs + CHUNK);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float x = low[j], y = high[j], cosine = cs[2 * j], sine = sign * cs[2 * j + 1];

        low[j] = x * cosine - y * sine;
        high[j] = y * cosine + x * sine;
    }
}

__device__ static void add_from(float v[CHUNK], const float *p)
{
    float w[CHUNK];

    load8<true>(p, CHUNK, w);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        v[j] += w[j];
}
__device__ static void scale_from(float v[CHUNK], float factor, const float *p)
{
    float w[CHUNK];

    load8<true>(p, CHUNK, w);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        v[j] = v[j] * factor * w[j];
}

template <typename T>
__device__ static void store_halves(T *p, int half, const float low[CHUNK], const float high[CHUNK])
{
    store8<true>(p, CHUNK, low);
    store8<true>(p + half, CHUNK, high);
}

/* First position of the row's block that this call leaves unwritten, if the row begins its block;
 * else CUDA_KV_BLOCK. Rows of one block lie side by side, in increasing positions. */
__device__ static int unwritten_from(const struct cuda_qkv &a, int row)
{
    int count = 1;

    if (a.pos[row] % CUDA_KV_BLOCK != 0)
        return CUDA_KV_BLOCK;
    while (count < CUDA_KV_BLOCK && row + count < a.m && a.blocks[row + count] == a.blocks[row] &&
           a.pos[row + count] == a.pos[row] + count)
        count++;
    return count;
}

/* Into block [2][G][16][d]. A row that begins a block also clears what lies behind the call's last
 * position: attention multiplies it by 0, and what an earlier user left may be NaN. */
template <typename T>
__device__ static void store_kv(const struct cuda_qkv &a, const struct head_place &place,
                                const float low[CHUNK], const float high[CHUNK])
{
    const int d = a.head_dim, slot = place.head - a.heads; /* k heads, then v heads: [2][G] */
    T *out = (T *)a.kv + ((size_t)a.blocks[place.row] * 2 * a.kv_heads + slot) * CUDA_KV_BLOCK * d +
             place.at;
    const float zero[CHUNK] = {};

    store_halves(out + (size_t)(a.pos[place.row] % CUDA_KV_BLOCK) * d, d / 2, low, high);
    for (int p = unwritten_from(a, place.row); p < CUDA_KV_BLOCK; p++)
        store_halves(out + (size_t)p * d, d / 2, zero, zero);
}

/* Without norm nothing is rounded and the result means nothing. With it the norm reads what raw
 * holds, so that the backward pass is that of the very same numbers. */
template <typename T>
__device__ static float head_rstd(const struct cuda_qkv &a, int lanes, bool norm, float low[CHUNK],
                                  float high[CHUNK])
{
    float sum = 0;

    if (norm) {
        round8(low, (const T *)NULL);
        round8(high, (const T *)NULL);
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            sum += low[j] * low[j] + high[j] * high[j];
    }
    return 1.0f / sqrtf(lanes_sum(sum, lanes) / (float)a.head_dim + a.eps);
}

template <typename T>
__global__ static void __launch_bounds__(THREADS)
    qkv_finish_heads(struct cuda_qkv a, int lanes, int heads_done)
{
    const struct head_place place = place_of(a, lanes, heads_done);
    const int d = a.head_dim, half = d / 2, at = place.at, rotated = a.heads + a.kv_heads;
    const float *norm = place.q ? a.norm_q : place.k ? a.norm_k : NULL;
    float *rstd_out = place.q ? a.rstd_q : a.rstd_k;
    float low[CHUNK] = {}, high[CHUNK] = {}, rstd;
    T *x = (T *)a.qkv + ((size_t)place.row * (rotated + a.kv_heads) + place.head) * d + at;

    if (place.here) {
        load8<true>(x, CHUNK, low);
        load8<true>(x + half, CHUNK, high);
    }
    if (place.here && a.bias) {
        add_from(low, a.bias + place.head * d + at);
        add_from(high, a.bias + place.head * d + at + half);
    }
    rstd = head_rstd<T>(a, lanes, norm, low, high); /* the last meeting of the warp's lanes */
    if (!place.here)
        return;
    if (place.q || place.k) {
        if (a.raw)
            store_halves((T *)a.raw + ((size_t)place.row * rotated + place.head) * d + at, half,
                         low, high);
        if (norm && rstd_out && at == 0)
            rstd_out[place.q ? (size_t)place.row * a.heads + place.head
                             : (size_t)place.row * a.kv_heads + place.head - a.heads] = rstd;
        if (norm) {
            scale_from(low, rstd, norm + at);
            scale_from(high, rstd, norm + at + half);
        }
        rotate(low, high, a.cos_sin + (size_t)a.pos[place.row] * d + 2 * at, 1);
    }
    if (place.q || place.k || a.bias)
        store_halves(x, half, low, high);
    if (a.kv && !place.q)
        store_kv<T>(a, place, low, high);
}

/* dx from the rotation turned back, then as rmsnorm's: rstd (g - x rstd^2 mean(g x)), g = dx w. */
template <typename T>
__global__ static void __launch_bounds__(THREADS)
    qkv_finish_bwd_heads(struct cuda_qkv a, T *dqkv, int lanes, int heads_done)
{
    const struct head_place place = place_of(a, lanes, heads_done);
    const int d = a.head_dim, half = d / 2, at = place.at;
    const float *norm = place.q ? a.norm_q : a.norm_k;
    float low[CHUNK] = {}, high[CHUNK] = {}, x[CHUNK] = {}, y[CHUNK] = {}, sum = 0, shift, rstd;
    T *dx = dqkv + ((size_t)place.row * (heads_done + a.kv_heads) + place.head) * d + at;

    if (place.here) {
        load8<true>(dx, CHUNK, low);
        load8<true>(dx + half, CHUNK, high);
        rotate(low, high, a.cos_sin + (size_t)a.pos[place.row] * d + 2 * at, -1);
    }
    if (place.here && norm) {
        const T *raw = (const T *)a.raw + ((size_t)place.row * heads_done + place.head) * d + at;

        load8<true>(raw, CHUNK, x);
        load8<true>(raw + half, CHUNK, y);
        scale_from(low, 1, norm + at);
        scale_from(high, 1, norm + at + half);
#pragma unroll
        for (int j = 0; j < CHUNK; j++)
            sum += low[j] * x[j] + high[j] * y[j];
    }
    sum = lanes_sum(sum, lanes); /* the last meeting of the warp's lanes */
    if (!place.here)
        return;
    if (norm) {
        rstd = place.q ? a.rstd_q[(size_t)place.row * a.heads + place.head]
                       : a.rstd_k[(size_t)place.row * a.kv_heads + place.head - a.heads];
        shift = rstd * rstd * (sum / (float)d);
#pragma unroll
        for (int j = 0; j < CHUNK; j++) {
            low[j] = rstd * (low[j] - x[j] * shift);
            high[j] = rstd * (high[j] - y[j] * shift);
        }
    }
    store_halves(dx, half, low, high);
}

/* Lanes per head, a power of two, and blocks for m rows of `heads` heads. */
static int split_heads(const struct cuda_qkv *a, int heads, int *lanes, int *blocks)
{
    size_t threads = 0;

    if (a->head_dim < 16 || a->head_dim % 16 != 0 || a->head_dim > HEAD_DIM_MAX)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "heads of %d: multiples of 16 up to %d",
                          a->head_dim, HEAD_DIM_MAX);
    *lanes = 1;
    while (*lanes * 2 * CHUNK < a->head_dim)
        *lanes *= 2;
    threads = (size_t)a->m * (size_t)heads * (size_t)*lanes;
    if (threads > INT_MAX - THREADS)
        return claas_fail(CLAAS_ERR_LIMIT, "%d rows of %d heads in one call", a->m, heads);
    *blocks = divide_up((int)threads, THREADS);
    return 0;
}

int cuda_qkv_finish(struct cuda_context *context, const struct cuda_qkv *args)
{
    const int rotated = args->heads + args->kv_heads;
    /* nothing happens to v without bias and store */
    const int heads = args->bias || args->kv ? rotated + args->kv_heads : rotated;
    int lanes = 0, blocks = 0, rc = split_heads(args, heads, &lanes, &blocks);

    if (rc < 0)
        return rc;
    if (!aligned16(args->qkv) || !aligned16(args->bias) || !aligned16(args->norm_q) ||
        !aligned16(args->norm_k) || !aligned16(args->cos_sin) || !aligned16(args->raw) ||
        !aligned16(args->kv))
        return claas_fail(CLAAS_ERR_INTERNAL, "qkv_finish: a pointer is not 16-byte aligned");
    if (args->m <= 0)
        return 0;
    if (context->act == CUDA_TYPE_BF16)
        qkv_finish_heads<__nv_bfloat16>
            <<<blocks, THREADS, 0, context->stream>>>(*args, lanes, heads);
    else
        qkv_finish_heads<float><<<blocks, THREADS, 0, context->stream>>>(*args, lanes, heads);
    return cuda_check_launch(context, "qkv_finish");
}

int cuda_qkv_finish_bwd(struct cuda_context *context, const struct cuda_qkv *args, void *dqkv)
{
    const int heads = args->heads + args->kv_heads;
    int lanes = 0, blocks = 0, rc = split_heads(args, heads, &lanes, &blocks);

    if (rc < 0)
        return rc;
    if (!aligned16(dqkv) || !aligned16(args->norm_q) || !aligned16(args->norm_k) ||
        !aligned16(args->cos_sin) || !aligned16(args->raw))
        return claas_fail(CLAAS_ERR_INTERNAL, "qkv_finish_bwd: a pointer is not 16-byte aligned");
    if ((args->norm_q && !(args->raw && args->rstd_q)) ||
        (args->norm_k && !(args->raw && args->rstd_k)))
        return claas_fail(CLAAS_ERR_INTERNAL, "qkv_finish_bwd: a norm without what it saved");
    if (args->m <= 0)
        return 0;
    if (context->act == CUDA_TYPE_BF16)
        qkv_finish_bwd_heads<<<blocks, THREADS, 0, context->stream>>>(*args, (__nv_bfloat16 *)dqkv,
                                                                      lanes, heads);
    else
        qkv_finish_bwd_heads<<<blocks, THREADS, 0, context->stream>>>(*args, (float *)dqkv, lanes,
                                                                      heads);
    return cuda_check_launch(context, "qkv_finish_bwd");
}

/* --- SwiGLU --- */

__device__ static float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}
/* Products alone: the forward and the backward pass get the same bits. s = sigmoid(gate). */
__device__ static float gated(float gate, float s, float up)
{
    return gate * s * up;
}

template <typename T, bool VECTOR>
__global__ static void __launch_bounds__(THREADS)
    swiglu_chunks(uint32_t count, int f, const T *gate_up, T *h)
{
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x, per_row = (f + CHUNK - 1) / CHUNK;
    const uint32_t row = index / per_row;
    const int at = index % per_row * CHUNK, valid = f - at;
    const T *gate = gate_up + (size_t)row * 2 * f + at;
    float g[CHUNK], u[CHUNK];

    if (index >= count)
        return;
    load8<VECTOR>(gate, valid, g);
    load8<VECTOR>(gate + f, valid, u);
#pragma unroll
    for (int j = 0; j < CHUNK; j++)
        g[j] = gated(g[j], sigmoid(g[j]), u[j]);
    store8<VECTOR>(h + (size_t)row * f + at, valid, g);
}

/* d silu / d gate = s (1 + gate (1 - s)) */
template <typename T, bool VECTOR>
__global__ static void __launch_bounds__(THREADS)
    swiglu_bwd_chunks(uint32_t count, int f, const T *gate_up, const T *dh, T *dgu, T *h)
{
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x, per_row = (f + CHUNK - 1) / CHUNK;
    const uint32_t row = index / per_row;
    const int at = index % per_row * CHUNK, valid = f - at;
    const size_t wide = (size_t)row * 2 * f + at, narrow = (size_t)row * f + at;
    float g[CHUNK], u[CHUNK], d[CHUNK];

    if (index >= count)
        return;
    load8<VECTOR>(gate_up + wide, valid, g);
    load8<VECTOR>(gate_up + wide + f, valid, u);
    load8<VECTOR>(dh + narrow, valid, d);
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
        const float gate = g[j], up = u[j], dout = d[j], s = sigmoid(gate);

        g[j] = dout * up * (s * (1.0f + gate * (1.0f - s)));
        u[j] = dout * (gate * s);
        d[j] = gated(gate, s, up);
    }
    store8<VECTOR>(dgu + wide, valid, g);
    store8<VECTOR>(dgu + wide + f, valid, u);
    store8<VECTOR>(h + narrow, valid, d);
}

/* Chunks of m rows of f in *count; an error if they are too many for 32 bits. */
static int count_chunks(int m, int f, uint32_t *count)
{
    const size_t chunks = m > 0 && f > 0 ? (size_t)m * (size_t)divide_up(f, CHUNK) : 0;

    if (chunks > INT_MAX - THREADS)
        return claas_fail(CLAAS_ERR_LIMIT, "swiglu: %d rows of %d in one call", m, f);
    *count = (uint32_t)chunks;
    return 0;
}

template <typename T>
static void launch_swiglu(cudaStream_t stream, uint32_t count, int f, const T *gate_up, T *h)
{
    const int blocks = divide_up((int)count, THREADS);

    if (f % CHUNK == 0 && aligned16(gate_up) && aligned16(h))
        swiglu_chunks<T, true><<<blocks, THREADS, 0, stream>>>(count, f, gate_up, h);
    else
        swiglu_chunks<T, false><<<blocks, THREADS, 0, stream>>>(count, f, gate_up, h);
}
template <typename T>
static void launch_swiglu_bwd(cudaStream_t stream, uint32_t count, int f, const T *gate_up,
                              const T *dh, T *dgu, T *h)
{
    const int blocks = divide_up((int)count, THREADS);

    if (f % CHUNK == 0 && aligned16(gate_up) && aligned16(dh) && aligned16(dgu) && aligned16(h))
        swiglu_bwd_chunks<T, true><<<blocks, THREADS, 0, stream>>>(count, f, gate_up, dh, dgu, h);
    else
        swiglu_bwd_chunks<T, false><<<blocks, THREADS, 0, stream>>>(count, f, gate_up, dh, dgu, h);
}

int cuda_swiglu(struct cuda_context *context, int m, int f, const void *gate_up, void *h)
{
    uint32_t count = 0;
    int rc = count_chunks(m, f, &count);

    if (rc < 0 || count == 0)
        return rc;
    if (context->act == CUDA_TYPE_BF16)
        launch_swiglu(context->stream, count, f, (const __nv_bfloat16 *)gate_up,
                      (__nv_bfloat16 *)h);
    else
        launch_swiglu(context->stream, count, f, (const float *)gate_up, (float *)h);
    return cuda_check_launch(context, "swiglu");
}

int cuda_swiglu_bwd(struct cuda_context *context, int m, int f, const void *gate_up, const void *dh,
                    void *dgu, void *h)
{
    uint32_t count = 0;
    int rc = count_chunks(m, f, &count);

    if (rc < 0 || count == 0)
        return rc;
    if (context->act == CUDA_TYPE_BF16)
        launch_swiglu_bwd(context->stream, count, f, (const __nv_bfloat16 *)gate_up,
                          (const __nv_bfloat16 *)dh, (__nv_bfloat16 *)dgu, (__nv_bfloat16 *)h);
    else
        launch_swiglu_bwd(context->stream, count, f, (const float *)gate_up, (const float *)dh,
                          (float *)dgu, (float *)h);
    return cuda_check_launch(context, "swiglu_bwd");
}

/* --- copies of rows --- */

/* U: what is moved at once, 16 bytes or an element; a row has `units` of them. */
template <typename U>
__global__ static void __launch_bounds__(THREADS)
    gather_rows(int m, int units, const U *__restrict__ in, const int32_t *__restrict__ rows,
                U *__restrict__ out)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const U *from = NULL;

    if (row >= m)
        return;
    from = in + (size_t)rows[row] * units;
#pragma unroll 4
    for (int i = threadIdx.x; i < units; i += blockDim.x)
        out[(size_t)row * units + i] = from[i];
}

/* The i with rows[i] = row, or -1; rows increase. */
__device__ static int find_row(const int32_t *rows, int count, int row)
{
    int low = 0, high = count;

    while (low < high) {
        const int middle = low + (high - low) / 2;

        if (rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && rows[low] == row ? low : -1;
}

/* Each output row looks for its input, so that everything is written once. */
template <typename U>
__global__ static void __launch_bounds__(THREADS)
    spread_rows(int m, int count, int units, const U *__restrict__ in,
                const int32_t *__restrict__ rows, U *__restrict__ out)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const U zero = U();
    int from = -1;

    if (row >= m)
        return;
    from = find_row(rows, count, row);
#pragma unroll 4
    for (int i = threadIdx.x; i < units; i += blockDim.x)
        out[(size_t)row * units + i] = from < 0 ? zero : in[(size_t)from * units + i];
}

/* The threads of a row: the least power of two from 32 to 256 that covers it. */
static dim3 copy_block(int units)
{
    int threads = WARP;

    while (threads < THREADS && threads < units)
        threads *= 2;
    return dim3(threads, THREADS / threads);
}

template <typename U>
static void launch_gather(struct cuda_context *context, int m, int units, const void *in,
                          const int32_t *rows, void *out)
{
    const dim3 block = copy_block(units);

    gather_rows<<<divide_up(m, block.y), block, 0, context->stream>>>(m, units, (const U *)in, rows,
                                                                      (U *)out);
}
template <typename U>
static void launch_spread(struct cuda_context *context, int m, int count, int units, const void *in,
                          const int32_t *rows, void *out)
{
    const dim3 block = copy_block(units);

    spread_rows<<<divide_up(m, block.y), block, 0, context->stream>>>(
        m, count, units, (const U *)in, rows, (U *)out);
}

/* Units of 16 bytes in a row of n elements, 0 if it must be moved element by element. */
static int wide_units(int n, size_t element, const void *in, const void *out)
{
    const int per_unit = (int)(16 / element);

    return n % per_unit == 0 && aligned16(in) && aligned16(out) ? n / per_unit : 0;
}

int cuda_gather(struct cuda_context *context, int count, int n, const void *in, const int32_t *rows,
                void *out)
{
    const int units = wide_units(n, context->act_bytes, in, out);

    if (count <= 0 || n <= 0)
        return 0;
    if (units > 0)
        launch_gather<uint4>(context, count, units, in, rows, out);
    else if (context->act == CUDA_TYPE_BF16)
        launch_gather<uint16_t>(context, count, n, in, rows, out);
    else
        launch_gather<uint32_t>(context, count, n, in, rows, out);
    return cuda_check_launch(context, "gather");
}

int cuda_embed(struct cuda_context *context, int m, int d, const void *table, const int32_t *tokens,
               void *out)
{
    return cuda_gather(context, m, d, table, tokens, out);
}

static int spread(struct cuda_context *context, int m, int count, int n, size_t element,
                  const void *in, const int32_t *rows, void *out)
{
    const int units = wide_units(n, element, in, out);

    if (m <= 0 || n <= 0)
        return 0;
    if (units > 0)
        launch_spread<uint4>(context, m, count, units, in, rows, out);
    else if (element == sizeof(uint16_t))
        launch_spread<uint16_t>(context, m, count, n, in, rows, out);
    else
        launch_spread<uint32_t>(context, m, count, n, in, rows, out);
    return cuda_check_launch(context, "spread");
}

int cuda_spread(struct cuda_context *context, int m, int count, int n, const void *in,
                const int32_t *rows, void *out)
{
    return spread(context, m, count, n, context->act_bytes, in, rows, out);
}

int cuda_spread_f32(struct cuda_context *context, int m, int count, int n, const float *in,
                    const int32_t *rows, float *out)
{
    return spread(context, m, count, n, sizeof(float), in, rows, out);
}

/* --- sums into rows --- */

__device__ static float plus(float a, float b)
{
    return a + b;
}
__device__ static float4 plus(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/* Block (target, part of its columns), one unit per thread, its items one after the other. */
template <typename U>
__global__ static void __launch_bounds__(THREADS)
    add_to_rows(int units, const int32_t *__restrict__ starts, const int32_t *__restrict__ items,
                const int32_t *__restrict__ rows, const U *__restrict__ in, U *__restrict__ out)
{
    const int first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    size_t at = 0;
    U sum;

    if (first >= end || column >= units)
        return;
    at = (size_t)rows[items[first]] * units + column;
    sum = out[at];
#pragma unroll 4
    for (int i = first; i < end; i++)
        sum = plus(sum, in[(size_t)items[i] * units + column]);
    out[at] = sum;
}

int cuda_add_rows(struct cuda_context *context, int targets, int n, const int32_t *starts,
                  const int32_t *items, const int32_t *rows, const float *in, float *out)
{
    const int wide = wide_units(n, sizeof(float), in, out), units = wide > 0 ? wide : n;
    const dim3 block(units < THREADS ? divide_up(units, WARP) * WARP : THREADS);
    const dim3 grid(targets, units > 0 ? divide_up(units, block.x) : 1);

    if (targets <= 0 || n <= 0)
        return 0;
    if (wide > 0)
        add_to_rows<<<grid, block, 0, context->stream>>>(units, starts, items, rows,
                                                         (const float4 *)in, (float4 *)out);
    else
        add_to_rows<<<grid, block, 0, context->stream>>>(units, starts, items, rows, in, out);
    return cuda_check_launch(context, "add_rows");
}

/* --- conversion --- */

#define QUAD           4
#define QUADS          2 /* per thread */
#define ACTS_PER_BLOCK (THREADS * QUADS * QUAD)

/* Four elements at once: 16 bytes in and 8 out leave no gaps between lanes. */
template <bool VECTOR>
__global__ static void __launch_bounds__(THREADS)
    to_bf16(size_t count, const float *__restrict__ in, __nv_bfloat16 *__restrict__ out)
{
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const size_t at = ((size_t)blockIdx.x * QUADS + i) * THREADS * QUAD + threadIdx.x * QUAD;

        if (VECTOR && at + QUAD <= count) {
            const float4 v = *(const float4 *)(in + at);

            *(uint2 *)(out + at) = make_uint2(pack2(v.x, v.y), pack2(v.z, v.w));
            continue;
        }
        for (size_t j = at; j < at + QUAD && j < count; j++)
            out[j] = __float2bfloat16_rn(in[j]);
    }
}

int cuda_to_act(struct cuda_context *context, size_t count, const float *in, void *out)
{
    const size_t blocks = (count + ACTS_PER_BLOCK - 1) / ACTS_PER_BLOCK;

    if (count == 0)
        return 0;
    if (blocks > INT_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "to_act: %zu elements in one call", count);
    if (context->act == CUDA_TYPE_F32)
        return in == out ? 0
                         : cuda_check(context,
                                      cudaMemcpyAsync(out, in, count * sizeof(float),
                                                      cudaMemcpyDeviceToDevice, context->stream),
                                      "to_act");
    if (aligned16(in) && aligned16(out))
        to_bf16<true>
            <<<(unsigned)blocks, THREADS, 0, context->stream>>>(count, in, (__nv_bfloat16 *)out);
    else
        to_bf16<false>
            <<<(unsigned)blocks, THREADS, 0, context->stream>>>(count, in, (__nv_bfloat16 *)out);
    return cuda_check_launch(context, "to_act");
}
