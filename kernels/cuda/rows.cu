/* Moving rows: gather (embedding), spread, sums into rows, rounding to act. Copies take one to
 * eight rows per block of 256 threads; an output row of spread finds its input, so that everything
 * is written once. */
#include "cuda/cuda_rows.h"
#include "cuda/launch.cuh"
#include "cuda/row_chunks.cuh"

#include <limits.h>

/* --- copies of rows --- */

/* U: what is moved at once, 16 bytes or an element; a row has `units` of them. */
template <typename U>
__global__ static void __launch_bounds__(ROW_THREADS)
    gather_rows(int m, int units, const U *in, const int32_t *rows, U *out)
{
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    const U *from = NULL;

    launch_next();
    if (row >= m)
        return;
    launch_wait();
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
__global__ static void __launch_bounds__(ROW_THREADS)
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

    while (threads < ROW_THREADS && threads < units)
        threads *= 2;
    return dim3(threads, ROW_THREADS / threads);
}

template <typename U>
static int run_gather(struct cuda_context *context, int m, int units, const void *in,
                      const int32_t *rows, void *out)
{
    const dim3 block = copy_block(units);

    return launch(context, "gather", gather_rows<U>, dim3(divide_up(m, block.y)), block, 0, m,
                  units, (const U *)in, rows, (U *)out);
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
        return run_gather<uint4>(context, count, units, in, rows, out);
    if (context->act == CUDA_TYPE_BF16)
        return run_gather<uint16_t>(context, count, n, in, rows, out);
    return run_gather<uint32_t>(context, count, n, in, rows, out);
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
__global__ static void __launch_bounds__(ROW_THREADS)
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
    const dim3 block(units < ROW_THREADS ? divide_up(units, WARP) * WARP : ROW_THREADS);
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
#define ACTS_PER_BLOCK (ROW_THREADS * QUADS * QUAD)

/* Four elements at once: 16 bytes in and 8 out leave no gaps between lanes. */
template <bool VECTOR>
__global__ static void __launch_bounds__(ROW_THREADS)
    to_bf16(size_t count, const float *__restrict__ in, __nv_bfloat16 *__restrict__ out)
{
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const size_t at =
            ((size_t)blockIdx.x * QUADS + i) * ROW_THREADS * QUAD + threadIdx.x * QUAD;

        if (VECTOR && at + QUAD <= count) {
            const float4 v = *(const float4 *)(in + at);

            *(uint2 *)(out + at) = make_uint2(pack_pair(v.x, v.y), pack_pair(v.z, v.w));
            continue;
        }
        for (size_t j = at; j < at + QUAD && j < count; j++)
            narrow(out + j, in[j]);
    }
}

int cuda_to_act(struct cuda_context *context, size_t count, const float *in, void *out)
{
    const size_t blocks = divide_up(count, ACTS_PER_BLOCK);

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
        to_bf16<true><<<(unsigned)blocks, ROW_THREADS, 0, context->stream>>>(count, in,
                                                                             (__nv_bfloat16 *)out);
    else
        to_bf16<false><<<(unsigned)blocks, ROW_THREADS, 0, context->stream>>>(count, in,
                                                                              (__nv_bfloat16 *)out);
    return cuda_check_launch(context, "to_act");
}
