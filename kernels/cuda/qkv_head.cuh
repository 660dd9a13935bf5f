/* What follows the q|k|v product, for one head of one row: bias, norm, rotation, the key/value
 * store. qkv.cu does it for all heads of a pass, attention for those of a row that it is about to
 * attend to (attention_parts.cu): the same bits.
 *
 * d/16 lanes (made a power of two) per head; a lane has 8 elements of the head's first half and the
 * 8 they are rotated with. */
#ifndef CLAAS_CUDA_QKV_HEAD_CUH
#define CLAAS_CUDA_QKV_HEAD_CUH

#include "cuda/attention.h"
#include "cuda/cuda_rows.h"
#include "cuda/row_chunks.cuh"

/* What a thread works on: elements [at, at+8) of a head's first half and the same of its second. */
struct head_place {
    int row, head, at;
    bool q, k; /* neither: v */
    bool here; /* false: beyond the last head, or a lane beyond head_dim/2 */
};

__device__ static void load_angles(float cs[2 * ROW_CHUNK], const float *table)
{
    load8<true>(table, ROW_CHUNK, cs);
    load8<true>(table + ROW_CHUNK, ROW_CHUNK, cs + ROW_CHUNK);
}

/* (low, high) -> (low cos - high sin, high cos + low sin); sign -1 turns back. cs: cos, sin of 8
 * angles. Which multiply-adds are fused is said here and below, and not left to how the compiler
 * sees the kernel around them. */
__device__ static void rotate(float low[ROW_CHUNK], float high[ROW_CHUNK],
                              const float cs[2 * ROW_CHUNK], float sign)
{
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j++) {
        const float x = low[j], y = high[j], cosine = cs[2 * j], sine = sign * cs[2 * j + 1];

        low[j] = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
        high[j] = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
    }
}

__device__ static void add_from(float v[ROW_CHUNK], const float *p)
{
    float w[ROW_CHUNK];

    load8<true>(p, ROW_CHUNK, w);
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j++)
        v[j] += w[j];
}
__device__ static void scale_by(float v[ROW_CHUNK], float factor, const float w[ROW_CHUNK])
{
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j++)
        v[j] = v[j] * factor * w[j];
}

template <typename T>
__device__ static void store_halves(T *p, int half, const float low[ROW_CHUNK],
                                    const float high[ROW_CHUNK])
{
    store8<true>(p, ROW_CHUNK, low);
    store8<true>(p + half, ROW_CHUNK, high);
}

/* Where a row's keys and values go, from the pass's positions and blocks. */
struct kv_slot {
    int block, position; /* in it */
};

__device__ static struct kv_slot find_slot(const struct cuda_qkv &a, int row)
{
    struct kv_slot slot;

    slot.block = a.blocks[row];
    slot.position = a.pos[row] % CUDA_KV_BLOCK;
    return slot;
}

/* Into block [2][G][16][d]. What an earlier user left at the positions behind the row's stays, and
 * may be NaN: attention reads none behind a run's last position but takes zeros. */
template <typename T>
__device__ static void store_kv(const struct cuda_qkv &a, const struct head_place &place,
                                const struct kv_slot &slot, const float low[ROW_CHUNK],
                                const float high[ROW_CHUNK])
{
    const int d = a.head_dim, head = place.head - a.heads; /* k heads, then v heads: [2][G] */
    T *out =
        (T *)a.kv + ((size_t)slot.block * 2 * a.kv_heads + head) * CUDA_KV_BLOCK * d + place.at;

    store_halves(out + (size_t)slot.position * d, d / 2, low, high);
}

/* The head's 1/rms, for its norm. Without a norm nothing is rounded and the result means nothing.
 * With one, the norm reads the rounded values that `raw` holds, so that the backward pass works on
 * the very same numbers. */
template <typename T>
__device__ static float head_rstd(const struct cuda_qkv &a, int lanes, bool norm,
                                  float low[ROW_CHUNK], float high[ROW_CHUNK])
{
    float sum = 0;

    if (norm) {
        round8(low, (const T *)NULL);
        round8(high, (const T *)NULL);
#pragma unroll
        for (int j = 0; j < ROW_CHUNK; j++)
            sum = __fadd_rn(sum, __fmaf_rn(low[j], low[j], __fmul_rn(high[j], high[j])));
    }
    return 1.0f / sqrtf(__fadd_rn(lanes_sum(sum, lanes) / (float)a.head_dim, a.eps));
}

__device__ static const float *head_norm(const struct cuda_qkv &a, const struct head_place &place)
{
    return place.q ? a.norm_q : place.k ? a.norm_k : NULL;
}

/* Reads the head and adds its bias; zeros where there is no head. Returns what head_rstd does. All
 * lanes of the warp must come here. */
template <typename T>
__device__ static float read_head(const struct cuda_qkv &a, const struct head_place &place,
                                  int lanes, float low[ROW_CHUNK], float high[ROW_CHUNK])
{
    const int d = a.head_dim, half = d / 2, at = place.at;
    const T *x = (const T *)a.qkv +
                 ((size_t)place.row * (a.heads + 2 * a.kv_heads) + place.head) * d + at;

    if (place.here) {
        load8<true>(x, ROW_CHUNK, low);
        load8<true>(x + half, ROW_CHUNK, high);
    }
    if (place.here && a.bias) {
        add_from(low, a.bias + place.head * d + at);
        add_from(high, a.bias + place.head * d + at + half);
    }
    return head_rstd<T>(a, lanes, head_norm(a, place), low, high);
}

/* What q or k is multiplied by: the norm's weights of its two halves, if it has one, and the angles
 * of its position. */
struct head_turn {
    float low[ROW_CHUNK], high[ROW_CHUNK], cs[2 * ROW_CHUNK];
};

__device__ static void load_turn(const struct cuda_qkv &a, const struct head_place &place, int pos,
                                 struct head_turn &turn)
{
    const float *norm = head_norm(a, place);
    const int at = place.at;

    if (norm) {
        load8<true>(norm + at, ROW_CHUNK, turn.low);
        load8<true>(norm + at + a.head_dim / 2, ROW_CHUNK, turn.high);
    }
    load_angles(turn.cs, a.cos_sin + (size_t)pos * a.head_dim + 2 * at);
}

/* Normalises q or k, if it has a norm, and rotates it. */
__device__ static void finish_head(const struct cuda_qkv &a, const struct head_place &place,
                                   float rstd, const struct head_turn &turn, float low[ROW_CHUNK],
                                   float high[ROW_CHUNK])
{
    if (head_norm(a, place)) {
        scale_by(low, rstd, turn.low);
        scale_by(high, rstd, turn.high);
    }
    rotate(low, high, turn.cs, 1);
}

#endif
