/* SwiGLU (Shazeer 2020, arXiv 2002.05202) and its gradient, act: gate | up [m][2F] -> h [m][F], and
 * dh [m][F] -> dgate | dup [m][2F], h. With s = 1 / (1 + exp(-gate)):
 *
 *   h     = gate s up
 *   dgate = dh up s (1 + gate (1 - s))
 *   dup   = dh gate s
 *
 * One chunk per thread, rows end to end. */
#include "cuda/cuda_rows.h"
#include "cuda/launch.cuh"
#include "cuda/row_chunks.cuh"

#include <limits.h>

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
__global__ static void __launch_bounds__(ROW_THREADS)
    swiglu_chunks(uint32_t count, int f, const T *gate_up, T *h)
{
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t per_row = (f + ROW_CHUNK - 1) / ROW_CHUNK, row = index / per_row;
    const int at = index % per_row * ROW_CHUNK, valid = f - at;
    const T *gate = gate_up + (size_t)row * 2 * f + at;
    float g[ROW_CHUNK], u[ROW_CHUNK];

    launch_next();
    if (index >= count)
        return;
    launch_wait();
    load8<VECTOR>(gate, valid, g);
    load8<VECTOR>(gate + f, valid, u);
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j++)
        g[j] = gated(g[j], sigmoid(g[j]), u[j]);
    store8<VECTOR>(h + (size_t)row * f + at, valid, g);
}

template <typename T, bool VECTOR>
__global__ static void __launch_bounds__(ROW_THREADS)
    swiglu_bwd_chunks(uint32_t count, int f, const T *gate_up, const T *dh, T *dgu, T *h)
{
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t per_row = (f + ROW_CHUNK - 1) / ROW_CHUNK, row = index / per_row;
    const int at = index % per_row * ROW_CHUNK, valid = f - at;
    const size_t wide = (size_t)row * 2 * f + at, narrow = (size_t)row * f + at;
    float g[ROW_CHUNK], u[ROW_CHUNK], d[ROW_CHUNK];

    launch_next();
    if (index >= count)
        return;
    launch_wait();
    load8<VECTOR>(gate_up + wide, valid, g);
    load8<VECTOR>(gate_up + wide + f, valid, u);
    load8<VECTOR>(dh + narrow, valid, d);
#pragma unroll
    for (int j = 0; j < ROW_CHUNK; j++) {
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
    const size_t chunks = m > 0 && f > 0 ? (size_t)m * (size_t)divide_up(f, ROW_CHUNK) : 0;

    if (chunks > INT_MAX - ROW_THREADS)
        return claas_fail(CLAAS_ERR_LIMIT, "swiglu: %d rows of %d in one call", m, f);
    *count = (uint32_t)chunks;
    return 0;
}

template <typename T>
static int run_swiglu(struct cuda_context *context, uint32_t count, int f, const T *gate_up, T *h)
{
    const bool vector = f % ROW_CHUNK == 0 && aligned16(gate_up) && aligned16(h);

    return launch(context, "swiglu", vector ? swiglu_chunks<T, true> : swiglu_chunks<T, false>,
                  dim3(divide_up((int)count, ROW_THREADS)), dim3(ROW_THREADS), 0, count, f, gate_up,
                  h);
}
template <typename T>
static int run_swiglu_bwd(struct cuda_context *context, uint32_t count, int f, const T *gate_up,
                          const T *dh, T *dgu, T *h)
{
    const bool vector =
        f % ROW_CHUNK == 0 && aligned16(gate_up) && aligned16(dh) && aligned16(dgu) && aligned16(h);

    return launch(context, "swiglu_bwd",
                  vector ? swiglu_bwd_chunks<T, true> : swiglu_bwd_chunks<T, false>,
                  dim3(divide_up((int)count, ROW_THREADS)), dim3(ROW_THREADS), 0, count, f, gate_up,
                  dh, dgu, h);
}

int cuda_swiglu(struct cuda_context *context, int m, int f, const void *gate_up, void *h)
{
    uint32_t count = 0;
    int rc = count_chunks(m, f, &count);

    if (rc < 0 || count == 0)
        return rc;
    if (context->act == CUDA_TYPE_BF16)
        return run_swiglu(context, count, f, (const __nv_bfloat16 *)gate_up, (__nv_bfloat16 *)h);
    return run_swiglu(context, count, f, (const float *)gate_up, (float *)h);
}

int cuda_swiglu_bwd(struct cuda_context *context, int m, int f, const void *gate_up, const void *dh,
                    void *dgu, void *h)
{
    uint32_t count = 0;
    int rc = count_chunks(m, f, &count);

    if (rc < 0 || count == 0)
        return rc;
    if (context->act == CUDA_TYPE_BF16)
        return run_swiglu_bwd(context, count, f, (const __nv_bfloat16 *)gate_up,
                              (const __nv_bfloat16 *)dh, (__nv_bfloat16 *)dgu, (__nv_bfloat16 *)h);
    return run_swiglu_bwd(context, count, f, (const float *)gate_up, (const float *)dh,
                          (float *)dgu, (float *)h);
}
