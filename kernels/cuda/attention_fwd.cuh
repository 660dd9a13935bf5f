/* What attention's forward kernels share (attention_fwd.cu, attention_parts.cu,
 * attention_sm90_fwd.cu): the online softmax of rows, storing them, and, for products by mma.sync,
 * one tile of keys. */
#ifndef CLAAS_CUDA_ATTENTION_FWD_CUH
#define CLAAS_CUDA_ATTENTION_FWD_CUH

#include "cuda/attention_tiles.cuh"

/* --- rows of scores --- */

/* Scores of one row half become exp2(scale2 (s - max)). Returns what earlier sums are multiplied
 * by. A row that has seen no key keeps -inf and 0. */
template <int NT>
static __device__ __forceinline__ float soften(float (&s)[NT][4], float &max, float &sum, int half,
                                               float scale2)
{
    float top = max, seen = 0, base = 0, shrink = 0, added = 0;

#pragma unroll
    for (int n = 0; n < NT; n++)
        top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    seen = top == -INFINITY ? 0.0f : top;
    base = seen * scale2;
    /* Exactly 1 where the maximum stays: a tile that a row does not see changes nothing. (By fmaf
     * as below it would be 2 to the rounding error of base.) */
    shrink = power_of_2((max - seen) * scale2);
    max = top;
#pragma unroll
    for (int n = 0; n < NT; n++) {
        s[n][2 * half] = power_of_2(fmaf(s[n][2 * half], scale2, -base));
        s[n][2 * half + 1] = power_of_2(fmaf(s[n][2 * half + 1], scale2, -base));
        added += s[n][2 * half] + s[n][2 * half + 1];
    }
    sum = fmaf(sum, shrink, added);
    return shrink;
}

/* The sum over the four lanes of a row. */
static __device__ __forceinline__ float row_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* --- one tile of keys --- */

/* What a warp keeps of 16 MT rows; [..][0] is of row l / 4, [..][1] of row l / 4 + 8. The sum is
 * this lane's share. */
template <int D, int MT> struct attend_state {
    float out[MT][D / 8][4];
    float max[MT][2], sum[MT][2];
};

template <int D, int MT>
static __device__ __forceinline__ void attend_begin(struct attend_state<D, MT> &state)
{
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        state.max[mt][0] = state.max[mt][1] = -INFINITY;
        state.sum[mt][0] = state.sum[mt][1] = 0;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            state.out[mt][n][0] = state.out[mt][n][1] = state.out[mt][n][2] = state.out[mt][n][3] =
                0;
    }
}

/* soften(), and rescales what was summed before. */
template <int D, int NT>
static __device__ __forceinline__ void softmax_rows(float (&s)[NT][4], float (&out)[D / 8][4],
                                                    float &max, float &sum, int half, float scale2)
{
    const float shrink = soften(s, max, sum, half, scale2);

#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        out[n][2 * half] *= shrink;
        out[n][2 * half + 1] *= shrink;
    }
}

/* The warp's rows q_row … against keys k_row … k_row+8 NT-1 of the tile, the first of which is at
 * position `key`. position: that of each row, which sees the keys up to its own. */
template <int D, int MT, int NT>
static __device__ __forceinline__ void attend_tile(struct attend_state<D, MT> &state, const bf16 *q,
                                                   int q_row, const bf16 *k, const bf16 *v,
                                                   int k_row, int key, const int (&position)[MT][2],
                                                   bool masked, float scale2)
{
    const int column = key + 2 * ((int)threadIdx.x % 4);
    float s[MT][NT][4] = {};
    uint32_t p[MT][NT / 2][4];

    product_nt<D, MT, NT>(s, q, q_row, k, k_row);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        if (masked)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (column + 8 * n + e % 2 > position[mt][e / 2])
                        s[mt][n][e] = -INFINITY;
        softmax_rows<D, NT>(s[mt], state.out[mt], state.max[mt][0], state.sum[mt][0], 0, scale2);
        softmax_rows<D, NT>(s[mt], state.out[mt], state.max[mt][1], state.sum[mt][1], 1, scale2);
        as_operand<NT>(p[mt], s[mt]);
    }
    product_nn<D, MT, NT / 2>(state.out, p, v, k_row);
}

/* --- results --- */

/* Which row and head of the result, counted together, row r of a tile is: the tile's first row is
 * matrix row `first`, head `head`, the first one of a group. */
static __device__ __forceinline__ size_t row_head(const struct cuda_attention &a, int group,
                                                  int first, int head, int r)
{
    return (size_t)(first + r / group) * a.heads + head + r % group;
}

/* Stores the warp's 16 rows, row … row+15 of a tile with `used` rows: lse = scale m + log l, and O
 * divided by l, by way of these rows of the tile q, which no other warp reads. max: m of rows l / 4
 * and l / 4 + 8 of this lane, before the scale; sum: the lane's share of their l. */
template <int D, int PANEL = 0>
static __device__ __forceinline__ void
store_result(const struct cuda_attention &a, int group, const float (&out)[D / 8][4],
             const float (&max)[2], const float (&sum)[2], bf16 *q, int row, int first, int head,
             int used)
{
    const int lane = (int)threadIdx.x % 32, r = row + lane / 4;
    const float low = row_sum(sum[0]), high = row_sum(sum[1]);

    if (a.lse && lane % 4 == 0) {
        if (r < used)
            a.lse[row_head(a, group, first, head, r)] = max[0] * a.scale + logf(low);
        if (r + 8 < used)
            a.lse[row_head(a, group, first, head, r + 8)] = max[1] * a.scale + logf(high);
    }
    stage_rows<D, PANEL>(q, row, out, 1.0f / low, 1.0f / high);
    store_rows<D, PANEL>((bf16 *)a.out + (size_t)head * D, (size_t)(a.heads * D), first, group, q,
                         row, used);
}

#endif
