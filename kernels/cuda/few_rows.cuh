/* The rows that a product of few rows multiplies, made where they are needed from what the
 * operation before would have been made of (cuda_gemm_source): the same bits, without its launch.
 *
 *   normed   bf16(x rstd w) of rows x: all warps of the block add up the squares of all rows, in
 *            norm_row.cuh's order (few_add_rows, a barrier, few_rstd)
 *   gated    bf16(silu(gate) up) of rows gate | up
 *
 * A piece is 2 WORDS neighbouring elements of a row: first it is read (few_read), later, when that
 * has arrived, made (few_make). Where it begins is a multiple of its length. */
#ifndef CLAAS_CUDA_FEW_ROWS_CUH
#define CLAAS_CUDA_FEW_ROWS_CUH

#include "cuda/gated.cuh"
#include "cuda/gemm.h"
#include "cuda/norm_row.cuh"

#define FEW_MADE_ROWS 8 /* at most: a warp for each */
#define FEW_AHEAD     8 /* chunks of 16 bytes that a thread has on their way while it adds squares */

struct few_rows {
    const __nv_bfloat16 *a;
    int ld;              /* row length of a, in elements */
    int up;              /* gated: from a gate to its up */
    const float *weight; /* normed */
    float eps;
    struct norm_split split; /* of a row that is normed */
    int step_rows, step_parts; /* from a warp's task to its next: 8 / split.warps, 8 % split.warps */
};

static inline struct few_rows few_rows_of(const struct cuda_gemm *gemm)
{
    struct few_rows rows = {};

    rows.a = (const __nv_bfloat16 *)gemm->a;
    rows.ld = gemm->lda;
    rows.up = gemm->k;
    rows.weight = gemm->norm;
    rows.eps = gemm->eps;
    rows.split = norm_split_row(gemm->k);
    rows.step_rows = THREADS / WARP / rows.split.warps;
    rows.step_parts = THREADS / WARP % rows.split.warps;
    return rows;
}

template <int WORDS> struct alignas(4 * WORDS) few_words {
    uint32_t word[WORDS];
};
template <int WORDS> struct alignas(WORDS == 1 ? 8 : 16) few_weights {
    float low_high[2 * WORDS];
};

/* A piece's elements as they lie in memory, two in a word. */
template <int WORDS> struct few_raw {
    struct few_words<WORDS> x, up; /* x: what is normed, or gates */
    struct few_weights<WORDS> weight;
};

/* The piece of row `row` at `column`; zeros if not valid. */
template <enum cuda_gemm_source SOURCE, int WORDS>
static __device__ __forceinline__ struct few_raw<WORDS>
few_read(const struct few_rows &rows, int row, int column, bool valid)
{
    const __nv_bfloat16 *x = rows.a + (size_t)row * (size_t)rows.ld + (size_t)column;
    struct few_raw<WORDS> raw = {};

    if (!valid)
        return raw;
    raw.x = *(const struct few_words<WORDS> *)x;
    if (SOURCE == CUDA_GEMM_NORMED)
        raw.weight = *(const struct few_weights<WORDS> *)(rows.weight + column);
    else
        raw.up = *(const struct few_words<WORDS> *)(x + rows.up);
    return raw;
}

static __device__ __forceinline__ float few_low(uint32_t pair)
{
    return __uint_as_float(pair << 16);
}
static __device__ __forceinline__ float few_high(uint32_t pair)
{
    return __uint_as_float(pair & 0xffff0000u);
}

/* rstd: of the piece's row, if it is normed. */
template <enum cuda_gemm_source SOURCE, int WORDS>
static __device__ __forceinline__ struct few_words<WORDS>
few_make(const struct few_raw<WORDS> &raw, float rstd)
{
    struct few_words<WORDS> made;

#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        const float low = few_low(raw.x.word[i]), high = few_high(raw.x.word[i]);

        if (SOURCE == CUDA_GEMM_NORMED)
            made.word[i] = pack2(norm_element(low, rstd, raw.weight.low_high[2 * i]),
                                 norm_element(high, rstd, raw.weight.low_high[2 * i + 1]));
        else
            made.word[i] = pack2(gated(low, sigmoid(low), few_low(raw.up.word[i])),
                                 gated(high, sigmoid(high), few_high(raw.up.word[i])));
    }
    return made;
}

/* --- a normed row's sum --- */

/* Task t: the part of row t / W that is warp t % W's of norm.cu, W of them to a row. A warp of this
 * block takes every eighth task, so many at a time that FEW_AHEAD loads a thread are on their way.
 * Nothing is divided: that would take longer than the loads. ITEMS: the split's. */
template <int ITEMS>
static __device__ __forceinline__ void few_add_tasks(const struct few_rows &rows, int m, int k,
                                                     float (*sums)[NORM_WARPS])
{
    const int tasks = FEW_AHEAD / ITEMS, warps = rows.split.warps;
    const int lane = (int)threadIdx.x % WARP;
    int row = 0, part = (int)threadIdx.x / WARP;

    for (; part >= warps; part -= warps)
        row++;
    while (row < m) {
        float *to[tasks]; /* NULL: no task */
        uint4 raw[tasks][ITEMS];

#pragma unroll
        for (int t = 0; t < tasks; t++) {
            const __nv_bfloat16 *x = rows.a + (size_t)row * (size_t)rows.ld;

            to[t] = row < m ? &sums[row][part] : NULL;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int at = ((part + i * warps) * WARP + lane) * CHUNK;

                raw[t][i] = make_uint4(0, 0, 0, 0);
                if (row < m && at < k)
                    raw[t][i] = *(const uint4 *)(x + at);
            }
            row += rows.step_rows;
            part += rows.step_parts;
            row += part >= warps;
            part -= part >= warps ? warps : 0;
        }
#pragma unroll
        for (int t = 0; t < tasks; t++) {
            float sum = 0;

            if (!to[t]) /* for the whole warp, and so are those behind it */
                break;
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const float v[CHUNK] = {
                    few_low(raw[t][i].x), few_high(raw[t][i].x), few_low(raw[t][i].y),
                    few_high(raw[t][i].y), few_low(raw[t][i].z), few_high(raw[t][i].z),
                    few_low(raw[t][i].w), few_high(raw[t][i].w)};

                sum = norm_add(sum, v);
            }
            sum = lanes_sum(sum, WARP);
            if (lane == 0)
                *to[t] = sum;
        }
    }
}

/* The squares of m rows of k elements, m <= FEW_MADE_ROWS, by THREADS threads; sums are in shared
 * memory, a barrier makes them everybody's. */
static __device__ __forceinline__ void few_add_rows(const struct few_rows &rows, int m, int k,
                                                    float (*sums)[NORM_WARPS])
{
    if (rows.split.items == 1)
        few_add_tasks<1>(rows, m, k, sums);
    else if (rows.split.items == 2)
        few_add_tasks<2>(rows, m, k, sums);
    else
        few_add_tasks<4>(rows, m, k, sums);
}

/* Of row `row`, which is below m and the same for the whole warp. */
static __device__ __forceinline__ float few_rstd(const struct few_rows &rows, int k,
                                                 float (*sums)[NORM_WARPS], int row)
{
    const int lane = (int)threadIdx.x % WARP;

    return norm_rstd(norm_join(lane < rows.split.warps ? sums[row][lane] : 0.0f), k, rows.eps);
}

#endif
