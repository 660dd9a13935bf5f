/* RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) of rows x act [m][n], and its gradient:
 *
 *   y   = x rstd w, rstd = 1 / sqrt(mean x^2 + eps)
 *   dx += rstd (g - x rstd^2 mean(g x)), g = dy w
 *
 * n <= 1024: one warp per row, 4 rows per block; more: one block per row, 2 chunks per
 * thread (4 above 8192). Sums: a thread's chunks in order, lanes by a butterfly, then warps by a
 * butterfly: by n alone, never by m. */
#include "cuda/cuda_rows.h"
#include "cuda/launch.cuh"
#include "cuda/row_chunks.cuh"

#define NORM_THREADS   512 /* of a block at most: leaves 128 registers each */
#define NORM_WARP_ROWS 4   /* rows per block where a warp has a row */
#define NORM_ITEMS_MAX 4   /* chunks per thread */
#define NORM_N_MAX     (NORM_THREADS * NORM_ITEMS_MAX * ROW_CHUNK)

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

/* The sum over the threads of a row: blockDim.x of them, one warp or a whole block (which must call
 * this only once). */
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

template <typename T, int ITEMS, bool VECTOR>
__global__ static void __launch_bounds__(NORM_THREADS) rmsnorm_rows(struct norm_args a)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const T *x = (const T *)a.x + (size_t)row * a.n;
    T *y = (T *)a.y + (size_t)row * a.n;
    float v[ITEMS][ROW_CHUNK], w[ITEMS][ROW_CHUNK], sum = 0, rstd;

    launch_next();
    launch_wait();
    if (row >= a.m) /* a whole warp that has a row of its own */
        return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * ROW_CHUNK;

        if (at < a.n) {
            load8<VECTOR>(x + at, a.n - at, v[i]);
            load8<VECTOR>(a.weight + at, a.n - at, w[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if ((threadIdx.x + i * blockDim.x) * ROW_CHUNK < a.n)
#pragma unroll
            for (int j = 0; j < ROW_CHUNK; j++)
                sum += v[i][j] * v[i][j];
    rstd = 1.0f / sqrtf(row_sum(sum) / (float)a.n + a.eps);
    if (a.rstd && threadIdx.x == 0)
        a.rstd[row] = rstd;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * ROW_CHUNK;

        if (at >= a.n)
            continue;
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            v[i][j] = v[i][j] * rstd * w[i][j];
        store8<VECTOR>(y + at, a.n - at, v[i]);
    }
}

template <typename T, int ITEMS, bool VECTOR>
__global__ static void __launch_bounds__(NORM_THREADS) rmsnorm_bwd_rows(struct norm_args a)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const size_t start = (size_t)row * a.n;
    const T *x = (const T *)a.x + start, *dy = (const T *)a.dy + start;
    float *dx = a.dx + start;
    float v[ITEMS][ROW_CHUNK], g[ITEMS][ROW_CHUNK], d[ITEMS][ROW_CHUNK], sum = 0, rstd, shift;

    launch_next();
    launch_wait();
    if (row >= a.m)
        return;
    rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * ROW_CHUNK;

        if (at < a.n) {
            load8<VECTOR>(x + at, a.n - at, v[i]);
            load8<VECTOR>(dy + at, a.n - at, g[i]);
            load8<VECTOR>(dx + at, a.n - at, d[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * ROW_CHUNK;
        float w[ROW_CHUNK];

        if (at >= a.n)
            continue;
        load8<VECTOR>(a.weight + at, a.n - at, w);
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++) {
            g[i][j] *= w[j];
            sum += g[i][j] * v[i][j];
        }
    }
    shift = rstd * rstd * (row_sum(sum) / (float)a.n);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int at = (threadIdx.x + i * blockDim.x) * ROW_CHUNK;

        if (at >= a.n)
            continue;
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
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
    const int chunks = divide_up(n, ROW_CHUNK);
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
    const bool vector = a->n % ROW_CHUNK == 0 && aligned16(a->x) && aligned16(a->weight) &&
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
    return launch(context, what, kernel, dim3(divide_up(args->m, split.block.y)), split.block, 0,
                  *args);
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
