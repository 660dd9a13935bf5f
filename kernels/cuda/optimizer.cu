/* Gradient norm, clipping and AdamW over the flat float32 arrays of one adapter (count elements).
 *
 *   norm       = sqrt(sum g^2), squares and sums in double. Block b of at most 1024 sums a stretch
 *                that depends on count alone: thread t the quads t, t+256, … of it, each of a
 *                quad's four elements apart; then a tree over threads, then one over blocks
 *   clip       = min(1, max_grad_norm / (norm + 1e-6)), double, as PyTorch's clip_grad_norm_
 *   g          = grad clip
 *   exp_avg    = b1 exp_avg + (1 - b1) g
 *   exp_avg_sq = b2 exp_avg_sq + (1 - b2) g g
 *   p          = p (1 - rate decay) - (rate / c1) exp_avg / (sqrt(exp_avg_sq) / c2 + eps)
 *                with c1 = 1 - b1^step, c2 = sqrt(1 - b2^step)
 *
 * The operations of the update and their order are those of cpu/optim_fast.h, each rounded by
 * itself (no fused multiply-add), so that the same gradient and norm give the CPU's bits. Bound by
 * memory: 4 bytes per element for the norm, 28 for the update. AdamW: Loshchilov and Hutter 2019,
 * with PyTorch's place of eps (outside of the root). */
#include "cuda/optimizer.h"
#include "cuda/sizes.cuh"

#include <limits.h>
#include <math.h>

#define THREADS   256
#define QUAD      4
#define PART_UNIT (THREADS * QUAD)

/* p[at … at+4), zeros from `end` on. */
template <bool VECTOR> __device__ static float4 load4(const float *p, size_t at, size_t end)
{
    if (VECTOR && at + QUAD <= end)
        return *(const float4 *)(p + at);
    return make_float4(at < end ? p[at] : 0.0f, at + 1 < end ? p[at + 1] : 0.0f,
                       at + 2 < end ? p[at + 2] : 0.0f, at + 3 < end ? p[at + 3] : 0.0f);
}

template <bool VECTOR> __device__ static void store4(float *p, size_t at, size_t end, float4 v)
{
    if (VECTOR && at + QUAD <= end) {
        *(float4 *)(p + at) = v;
        return;
    }
    if (at < end)
        p[at] = v.x;
    if (at + 1 < end)
        p[at + 1] = v.y;
    if (at + 2 < end)
        p[at + 2] = v.z;
    if (at + 3 < end)
        p[at + 3] = v.w;
}

/* --- the norm --- */

__device__ static double warp_sum(double sum)
{
    for (int step = WARP / 2; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

/* The same in all threads of a block of whole warps; called once. */
__device__ static double block_sum(double sum)
{
    __shared__ double warps[WARP];
    const int lane = threadIdx.x % WARP;

    sum = warp_sum(sum);
    if (lane == 0)
        warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? warps[lane] : 0.0);
}

template <bool VECTOR>
__global__ static void __launch_bounds__(THREADS)
    sum_squares(const float *__restrict__ grad, size_t count, size_t part, double *parts)
{
    const size_t first = blockIdx.x * part;
    const size_t end = first + part < count ? first + part : count;
    double x = 0, y = 0, z = 0, w = 0, sum;

#pragma unroll 4
    for (size_t at = first + threadIdx.x * QUAD; at < end; at += PART_UNIT) {
        const float4 g = load4<VECTOR>(grad, at, end);

        x += (double)g.x * (double)g.x;
        y += (double)g.y * (double)g.y;
        z += (double)g.z * (double)g.z;
        w += (double)g.w * (double)g.w;
    }
    sum = block_sum((x + y) + (z + w));
    if (threadIdx.x == 0)
        parts[blockIdx.x] = sum;
}

/* One block of CUDA_NORM_PARTS threads. */
__global__ static void __launch_bounds__(CUDA_NORM_PARTS)
    finish_norm(const double *parts, int part_count, struct cuda_learned *ret)
{
    const double sum = block_sum(threadIdx.x < part_count ? parts[threadIdx.x] : 0.0);
    const double norm = sqrt(sum);

    if (threadIdx.x == 0) {
        ret->norm = norm;
        ret->finite = isfinite(norm);
    }
}

int cuda_measure_gradient(struct cuda_context *context, const float *grad, size_t count,
                          double *parts, struct cuda_learned *ret)
{
    /* A multiple of PART_UNIT, so that parts begin as aligned as the whole. */
    const size_t part = divide_up(divide_up(count, CUDA_NORM_PARTS), PART_UNIT) * PART_UNIT;
    const int part_count = count > 0 ? (int)divide_up(count, part) : 0;

    if (part_count > 0 && aligned16(grad))
        sum_squares<true><<<part_count, THREADS, 0, context->stream>>>(grad, count, part, parts);
    else if (part_count > 0)
        sum_squares<false><<<part_count, THREADS, 0, context->stream>>>(grad, count, part, parts);
    finish_norm<<<1, CUDA_NORM_PARTS, 0, context->stream>>>(parts, part_count, ret);
    return cuda_check_launch(context, "the gradient's norm");
}

/* --- AdamW --- */

/* What is the same for all elements. */
struct adamw_factors {
    float beta1, rest1, beta2, rest2;
    float decay, step_size, correction2, eps;
    double max_grad_norm;
};

__device__ static float clip_factor(double norm, double max_grad_norm)
{
    return max_grad_norm > 0 ? (float)fmin(1.0, max_grad_norm / (norm + 1e-6)) : 1.0f;
}

__device__ static void update_one(const struct adamw_factors &f, float clip, float grad, float *p,
                                  float *exp_avg, float *exp_avg_sq)
{
    const float g = __fmul_rn(grad, clip);
    const float m = __fadd_rn(__fmul_rn(f.beta1, *exp_avg), __fmul_rn(f.rest1, g));
    const float v = __fadd_rn(__fmul_rn(f.beta2, *exp_avg_sq), __fmul_rn(__fmul_rn(f.rest2, g), g));
    const float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.correction2), f.eps);
    const float step = __fdiv_rn(__fmul_rn(f.step_size, m), root);

    *exp_avg = m;
    *exp_avg_sq = v;
    *p = __fsub_rn(__fmul_rn(*p, f.decay), step);
}

/* One quad per thread. The loads go out before the block waits for the clip factor, a division in
 * double that one thread does for all. */
template <bool VECTOR>
__global__ static void __launch_bounds__(THREADS)
    adamw_quads(struct cuda_adamw a, struct adamw_factors f)
{
    __shared__ float clip;
    const size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * QUAD;
    const float4 g = load4<VECTOR>(a.grad, at, a.count);
    float4 p = load4<VECTOR>(a.parameters, at, a.count);
    float4 m = load4<VECTOR>(a.exp_avg, at, a.count);
    float4 v = load4<VECTOR>(a.exp_avg_sq, at, a.count);

    if (threadIdx.x == 0)
        clip = clip_factor(a.learned->norm, f.max_grad_norm);
    __syncthreads();
    if (!a.learned->finite)
        return;
    update_one(f, clip, g.x, &p.x, &m.x, &v.x);
    update_one(f, clip, g.y, &p.y, &m.y, &v.y);
    update_one(f, clip, g.z, &p.z, &m.z, &v.z);
    update_one(f, clip, g.w, &p.w, &m.w, &v.w);
    store4<VECTOR>(a.parameters, at, a.count, p);
    store4<VECTOR>(a.exp_avg, at, a.count, m);
    store4<VECTOR>(a.exp_avg_sq, at, a.count, v);
}

static struct adamw_factors factors_of(const struct cuda_adamw *a)
{
    const float correction1 = (float)(1.0 - pow((double)a->beta1, (double)a->step));
    struct adamw_factors f;

    f.beta1 = a->beta1;
    f.rest1 = 1.0f - a->beta1;
    f.beta2 = a->beta2;
    f.rest2 = 1.0f - a->beta2;
    f.decay = 1.0f - a->rate * a->weight_decay;
    f.step_size = a->rate / correction1;
    f.correction2 = (float)sqrt(1.0 - pow((double)a->beta2, (double)a->step));
    f.eps = a->eps;
    f.max_grad_norm = a->max_grad_norm;
    return f;
}

int cuda_adamw(struct cuda_context *context, const struct cuda_adamw *args)
{
    const size_t blocks = divide_up(args->count, THREADS * QUAD);
    const bool vector = aligned16(args->parameters) && aligned16(args->exp_avg) &&
                        aligned16(args->exp_avg_sq) && aligned16(args->grad);

    if (args->count == 0)
        return 0;
    if (blocks > INT_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "adamw: %zu elements in one call", args->count);
    if (vector)
        adamw_quads<true>
            <<<(unsigned)blocks, THREADS, 0, context->stream>>>(*args, factors_of(args));
    else
        adamw_quads<false>
            <<<(unsigned)blocks, THREADS, 0, context->stream>>>(*args, factors_of(args));
    return cuda_check_launch(context, "adamw");
}
