/* What the card could do at best, measured when asked: an 8192 x 8192 x 8192 product of random
 * values, 2 * 8192^3 FLOP, by the same cuda_gemm that everything uses, and a copy of 1 GiB on the
 * card, which counts as read and written. Both are timed by events, several runs between two of
 * them; the best of some rounds counts, so that a share of it is never overstated.
 *
 * It opens a context of its own (stream, cuBLASLt, workspace) and gives everything back, so it may
 * run before a model is loaded and afterwards. */
#include "cuda/cuda_floor.h"
#include "cuda/gemm.h"

#include <cuda_bf16.h>
#include <string.h>

#define GEMM_SIDE    8192
#define GEMM_RUNS    8 /* of a round: 11 ms in bfloat16 on an H100 */
#define COPY_BYTES   ((size_t)1 << 30)
#define COPY_RUNS    8
#define ROUNDS       5
#define FILL_BLOCKS  1024
#define FILL_THREADS 256

/* Uniform in [-0.5, 0.5): zeros would need less power than real work, and so run faster. */
template <typename T> __global__ static void fill_uniform(size_t count, uint32_t seed, T *out)
{
    const size_t step = (size_t)gridDim.x * blockDim.x;

    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        uint32_t x = (uint32_t)i + seed; /* mixed by the finaliser of MurmurHash3 */

        x ^= x >> 16;
        x *= 0x85ebca6bu;
        x ^= x >> 13;
        x *= 0xc2b2ae35u;
        x ^= x >> 16;
        out[i] = (T)((float)(x >> 8) * (1.0f / 16777216.0f) - 0.5f);
    }
}

struct floor_space {
    struct cuda_context context;
    cudaEvent_t begin, end;
    struct cuda_region a, b, c;
};

static void floor_done(struct floor_space *space)
{
    struct cuda_context *context = &space->context;

    if (context->stream)
        (void)cudaStreamSynchronize(context->stream);
    if (space->begin)
        (void)cudaEventDestroy(space->begin);
    if (space->end)
        (void)cudaEventDestroy(space->end);
    cuda_region_done(context, &space->a);
    cuda_region_done(context, &space->b);
    cuda_region_done(context, &space->c);
    cuda_context_close(context);
}

/* The least milliseconds of one run of `work(space)`. */
template <typename F> static int time_best(struct floor_space *space, int runs, double *ret, F work)
{
    struct cuda_context *context = &space->context;
    int rc = work(space); /* cuBLASLt's choice, code and caches */

    *ret = 0;
    for (int round = 0; round < ROUNDS && rc >= 0; round++) {
        float ms = 0;

        rc = cuda_check(context, cudaEventRecord(space->begin, context->stream), "an event");
        for (int i = 0; i < runs && rc >= 0; i++)
            rc = work(space);
        if (rc >= 0)
            rc = cuda_check(context, cudaEventRecord(space->end, context->stream), "an event");
        if (rc >= 0)
            rc = cuda_wait(context);
        if (rc >= 0)
            rc = cuda_check(context, cudaEventElapsedTime(&ms, space->begin, space->end),
                            "an event's time");
        if (rc >= 0 && (round == 0 || ms / runs < *ret))
            *ret = ms / runs;
    }
    return rc;
}

static int multiply(struct floor_space *space)
{
    struct cuda_gemm gemm = {};

    gemm.form = CUDA_GEMM_NT;
    gemm.m = gemm.n = gemm.k = GEMM_SIDE;
    gemm.a = space->a.base;
    gemm.b = space->b.base;
    gemm.lda = gemm.ldb = gemm.ldo = GEMM_SIDE;
    gemm.out = space->c.base;
    gemm.out_type = space->context.act;
    return cuda_gemm(&space->context, &gemm);
}

static int copy(struct floor_space *space)
{
    return cuda_check(&space->context,
                      cudaMemcpyAsync(space->b.base, space->a.base, COPY_BYTES,
                                      cudaMemcpyDeviceToDevice, space->context.stream),
                      "copying on the device");
}

static int fill(struct floor_space *space, const struct cuda_region *region, uint32_t seed)
{
    struct cuda_context *context = &space->context;
    const size_t count = region->bytes / context->act_bytes;

    if (context->act == CUDA_TYPE_BF16)
        fill_uniform<<<FILL_BLOCKS, FILL_THREADS, 0, context->stream>>>(
            count, seed, (__nv_bfloat16 *)region->base);
    else
        fill_uniform<<<FILL_BLOCKS, FILL_THREADS, 0, context->stream>>>(count, seed,
                                                                        (float *)region->base);
    return cuda_check_launch(context, "random values");
}

static int open_space(enum cuda_type act, struct floor_space *space)
{
    struct cuda_context *context = &space->context;
    int rc = cuda_context_open(act, context);

    if (rc >= 0)
        rc = cuda_check(context, cudaEventCreate(&space->begin), "an event");
    if (rc >= 0)
        rc = cuda_check(context, cudaEventCreate(&space->end), "an event");
    if (rc >= 0)
        rc = cuda_region_new(context, &space->a, COPY_BYTES, "measuring the card");
    if (rc >= 0)
        rc = cuda_region_new(context, &space->b, COPY_BYTES, "measuring the card");
    if (rc >= 0)
        rc = cuda_region_new(context, &space->c, (size_t)GEMM_SIDE * GEMM_SIDE * context->act_bytes,
                             "measuring the card");
    if (rc >= 0)
        rc = fill(space, &space->a, 1);
    if (rc >= 0)
        rc = fill(space, &space->b, 2);
    return rc;
}

int cuda_floor(enum cuda_type act, struct claas_device_floor *ret)
{
    struct floor_space space;
    double gemm_ms = 0, copy_ms = 0;
    int rc;

    memset(&space, 0, sizeof(space));
    rc = open_space(act, &space);
    if (rc >= 0)
        rc = time_best(&space, GEMM_RUNS, &gemm_ms, multiply);
    if (rc >= 0)
        rc = time_best(&space, COPY_RUNS, &copy_ms, copy);
    floor_done(&space);
    if (rc < 0)
        return rc;
    ret->gemm_flop_s = 2e3 * GEMM_SIDE * GEMM_SIDE * GEMM_SIDE / gemm_ms;
    ret->memory_bytes_s = 2e3 * (double)COPY_BYTES / copy_ms;
    return 0;
}
