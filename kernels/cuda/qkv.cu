/* What follows the q|k|v product, [m][Nqkv], in one pass: bias, norm of each head, rotation, the
 * key/value store; and the way back. Formulas: cpu/ops.h; rotation: Su et al. 2021 in the
 * half-split form. One head: qkv_head.cuh. */
#include "cuda/launch.cuh"
#include "cuda/qkv_head.cuh"

#include <limits.h>

#define HEAD_DIM_MAX 512 /* a warp per head */

/* heads_done: heads per row that the kernel touches, q before k before v. */
__device__ static struct head_place place_of(const struct cuda_qkv &a, int lanes, int heads_done)
{
    const uint32_t group = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    struct head_place place;

    place.row = group / heads_done;
    place.head = group % heads_done;
    place.at = threadIdx.x % lanes * ROW_CHUNK;
    place.q = place.head < a.heads;
    place.k = !place.q && place.head < a.heads + a.kv_heads;
    place.here = place.row < a.m && place.at < a.head_dim / 2;
    return place;
}

template <typename T>
__global__ static void __launch_bounds__(ROW_THREADS)
    qkv_finish_heads(struct cuda_qkv a, int lanes, int heads_done)
{
    const struct head_place place = place_of(a, lanes, heads_done);
    const int d = a.head_dim, half = d / 2, at = place.at, rotated = a.heads + a.kv_heads;
    float *rstd_out = place.q ? a.rstd_q : a.rstd_k;
    float low[ROW_CHUNK] = {}, high[ROW_CHUNK] = {}, rstd;
    struct head_turn turn;
    T *x = (T *)a.qkv + ((size_t)place.row * (rotated + a.kv_heads) + place.head) * d + at;

    launch_next();
    launch_wait();
    rstd = read_head<T>(a, place, lanes, low, high); /* the last meeting of the warp's lanes */
    if (!place.here)
        return;
    if (place.q || place.k) {
        if (a.raw)
            store_halves((T *)a.raw + ((size_t)place.row * rotated + place.head) * d + at, half,
                         low, high);
        if (head_norm(a, place) && rstd_out && at == 0)
            rstd_out[place.q ? (size_t)place.row * a.heads + place.head
                             : (size_t)place.row * a.kv_heads + place.head - a.heads] = rstd;
        load_turn(a, place, a.pos[place.row], turn);
        finish_head(a, place, rstd, turn, low, high);
    }
    if (place.q || place.k || a.bias)
        store_halves(x, half, low, high);
    if (a.kv && !place.q)
        store_kv<T>(a, place, find_slot(a, place.row), low, high);
}

/* dx from the rotation turned back, then as rmsnorm's: rstd (g - x rstd^2 mean(g x)), g = dx w. */
template <typename T>
__global__ static void __launch_bounds__(ROW_THREADS)
    qkv_finish_bwd_heads(struct cuda_qkv a, T *dqkv, int lanes, int heads_done)
{
    const struct head_place place = place_of(a, lanes, heads_done);
    const int d = a.head_dim, half = d / 2, at = place.at;
    const float *norm = place.q ? a.norm_q : a.norm_k;
    float low[ROW_CHUNK] = {}, high[ROW_CHUNK] = {}, x[ROW_CHUNK] = {}, y[ROW_CHUNK] = {}, sum = 0,
          shift, rstd;
    struct head_turn turn;
    T *dx = dqkv + ((size_t)place.row * (heads_done + a.kv_heads) + place.head) * d + at;

    launch_next();
    launch_wait();
    if (place.here) {
        load8<true>(dx, ROW_CHUNK, low);
        load8<true>(dx + half, ROW_CHUNK, high);
        load_angles(turn.cs, a.cos_sin + (size_t)a.pos[place.row] * d + 2 * at);
        rotate(low, high, turn.cs, -1);
    }
    if (place.here && norm) {
        const T *raw = (const T *)a.raw + ((size_t)place.row * heads_done + place.head) * d + at;

        load8<true>(raw, ROW_CHUNK, x);
        load8<true>(raw + half, ROW_CHUNK, y);
        load8<true>(norm + at, ROW_CHUNK, turn.low);
        load8<true>(norm + at + half, ROW_CHUNK, turn.high);
        scale_by(low, 1, turn.low);
        scale_by(high, 1, turn.high);
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
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
        for (int j = 0; j < ROW_CHUNK; j++) {
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
    while (*lanes * 2 * ROW_CHUNK < a->head_dim)
        *lanes *= 2;
    threads = (size_t)a->m * (size_t)heads * (size_t)*lanes;
    if (threads > INT_MAX - ROW_THREADS)
        return claas_fail(CLAAS_ERR_LIMIT, "%d rows of %d heads in one call", a->m, heads);
    *blocks = divide_up((int)threads, ROW_THREADS);
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
    return launch(context, "qkv_finish",
                  context->act == CUDA_TYPE_BF16 ? qkv_finish_heads<__nv_bfloat16>
                                                 : qkv_finish_heads<float>,
                  dim3(blocks), dim3(ROW_THREADS), 0, *args, lanes, heads);
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
        return launch(context, "qkv_finish_bwd", qkv_finish_bwd_heads<__nv_bfloat16>, dim3(blocks),
                      dim3(ROW_THREADS), 0, *args, (__nv_bfloat16 *)dqkv, lanes, heads);
    return launch(context, "qkv_finish_bwd", qkv_finish_bwd_heads<float>, dim3(blocks),
                  dim3(ROW_THREADS), 0, *args, (float *)dqkv, lanes, heads);
}
