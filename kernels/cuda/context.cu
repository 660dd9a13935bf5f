/* Opening the device, errors, memory.
 *
 * Memory is zeroed on the calling thread's own stream and waited for, so that it is zero for
 * whoever uses it next, on whatever stream; the device's I/O thread makes adapters while the
 * compute thread works, which is why counters change atomically. */
#include "cuda/context.h"
#include "cuda/gemm.h"

#include <stdio.h>
#include <string.h>

#define ALIGNMENT      ((size_t)256)
#define LT_SPACE_BYTES ((size_t)64 << 20)
#define OLDEST_ARCH    80 /* bfloat16 on tensor cores, cp.async */

/* --- errors --- */

/* A sticky error (a kernel that faulted, a device that fell off the bus) is answered to every later
 * call, also to one as harmless as asking whether the stream is done. */
static bool is_lost(const struct cuda_context *context)
{
    cudaError_t now = cudaStreamQuery(context->stream);

    (void)cudaGetLastError();
    return now != cudaSuccess && now != cudaErrorNotReady &&
           now != cudaErrorStreamCaptureUnsupported && now != cudaErrorStreamCaptureInvalidated;
}

int cuda_check(struct cuda_context *context, cudaError_t code, const char *what)
{
    if (code == cudaSuccess)
        return 0;
    (void)cudaGetLastError(); /* else the next launch would be blamed for it */
    if (code == cudaErrorMemoryAllocation)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "%s: the device's memory is full", what);
    if (context->stream && is_lost(context))
        __atomic_store_n(&context->lost, true, __ATOMIC_RELAXED);
    return claas_fail(CLAAS_ERR_DEVICE, "%s: %s (%s)", what, cudaGetErrorString(code),
                      cudaGetErrorName(code));
}

int cuda_check_launch(struct cuda_context *context, const char *what)
{
    return cuda_check(context, cudaGetLastError(), what);
}

int cuda_wait(struct cuda_context *context)
{
    return cuda_check(context, cudaStreamSynchronize(context->stream), "the device's work");
}

/* --- memory --- */

int cuda_region_new(struct cuda_context *context, struct cuda_region *region, size_t bytes,
                    const char *what)
{
    size_t rounded = (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    size_t available = 0, total = 0;
    cudaError_t code;
    void *base = NULL;

    region->base = NULL;
    region->bytes = 0;
    if (rounded < bytes) /* so near to SIZE_MAX that it wrapped around */
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory on the device for %s: %zu bytes", what,
                          bytes);
    if (rounded == 0)
        rounded = ALIGNMENT;
    code = cudaMalloc(&base, rounded);
    if (code == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&available, &total);
        return claas_fail(CLAAS_ERR_NO_MEMORY,
                          "no memory on the device for %s: %zu MiB, %zu of %zu MiB are free", what,
                          rounded >> 20, available >> 20, total >> 20);
    }
    if (code == cudaSuccess) {
        code = cudaMemsetAsync(base, 0, rounded, cudaStreamPerThread);
        if (code == cudaSuccess)
            code = cudaStreamSynchronize(cudaStreamPerThread);
        if (code != cudaSuccess)
            (void)cudaFree(base);
    }
    if (code != cudaSuccess)
        return cuda_check(context, code, what);
    region->base = base;
    region->bytes = rounded;
    (void)__atomic_fetch_add(&context->bytes, rounded, __ATOMIC_RELAXED);
    return 0;
}

void cuda_region_done(struct cuda_context *context, struct cuda_region *region)
{
    if (!region->base)
        return;
    (void)cudaFree(region->base); /* waits for the device's work */
    (void)cudaGetLastError();
    (void)__atomic_fetch_sub(&context->bytes, region->bytes, __ATOMIC_RELAXED);
    region->base = NULL;
    region->bytes = 0;
}

void *cuda_take(struct cuda_arena *arena, size_t bytes)
{
    void *place = arena->base ? arena->base + arena->used : NULL;

    arena->used += (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    return place;
}

/* --- opening --- */

int cuda_find_device(void)
{
    int count = 0, driver = 0;
    cudaError_t code = cudaGetDeviceCount(&count);

    (void)cudaGetLastError();
    if (code == cudaSuccess && count > 0)
        return 0;
    if (code == cudaSuccess || code == cudaErrorNoDevice)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "no CUDA device here");
    (void)cudaDriverGetVersion(&driver);
    (void)cudaGetLastError();
    if (code == cudaErrorInsufficientDriver && driver == 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "no CUDA driver here");
    if (code == cudaErrorInsufficientDriver)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "the CUDA driver is too old: it knows CUDA %d.%d, this build is of %d.%d",
                          driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                          CUDART_VERSION % 1000 / 10);
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "no usable CUDA device: %s", cudaGetErrorString(code));
}

/* The device must be new enough, and this binary must have code for it. */
static __global__ void probe_kernel(void)
{
}

static int check_device(struct cuda_context *context)
{
    struct cudaFuncAttributes attributes;
    cudaDeviceProp properties;
    cudaError_t code = cudaSetDevice(0);

    if (code == cudaSuccess)
        code = cudaGetDeviceProperties(&properties, 0);
    if (code != cudaSuccess)
        return cuda_check(context, code, "opening the CUDA device");
    context->arch = 10 * properties.major + properties.minor;
    context->multiprocessors = properties.multiProcessorCount;
    context->memory = properties.totalGlobalMem;
    (void)snprintf(context->name, sizeof(context->name), "%.63s", properties.name);
    if (context->arch < OLDEST_ARCH)
        return claas_fail(
            CLAAS_ERR_UNSUPPORTED, "%s has compute capability %d.%d, %d.%d or later is needed",
            context->name, properties.major, properties.minor, OLDEST_ARCH / 10, OLDEST_ARCH % 10);
    code = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction) {
        (void)cudaGetLastError();
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "this build has no code for %s (compute capability %d.%d)", context->name,
                          properties.major, properties.minor);
    }
    return cuda_check(context, code, "opening the CUDA device");
}

static int open_library(struct cuda_context *context)
{
    struct cuda_region space;
    cublasStatus_t status;
    int rc = cuda_check(context, cudaStreamCreateWithFlags(&context->stream, cudaStreamNonBlocking),
                        "making a stream");

    if (rc < 0)
        return rc;
    status = cublasLtCreate(&context->lt);
    if (status != CUBLAS_STATUS_SUCCESS)
        return claas_fail(CLAAS_ERR_DEVICE, "opening cuBLASLt: %s",
                          cublasLtGetStatusString(status));
    rc = cuda_region_new(context, &space, LT_SPACE_BYTES, "matrix products");
    if (rc < 0)
        return rc;
    context->lt_space = space.base;
    context->lt_space_bytes = space.bytes;
    return 0;
}

int cuda_context_open(enum cuda_type act, struct cuda_context *ret)
{
    struct cuda_context context;
    int rc = cuda_find_device();

    memset(&context, 0, sizeof(context));
    context.act = act;
    context.act_bytes = act == CUDA_TYPE_F32 ? 4 : 2;
    if (rc == 0)
        rc = check_device(&context);
    if (rc == 0)
        rc = open_library(&context);
    if (rc < 0) {
        cuda_context_close(&context);
        return rc;
    }
    *ret = context;
    return 0;
}

void cuda_context_close(struct cuda_context *context)
{
    struct cuda_region space;

    space.base = context->lt_space;
    space.bytes = context->lt_space_bytes;
    if (context->stream)
        (void)cudaStreamSynchronize(context->stream);
    cuda_gemm_plans_free(context);
    cuda_region_done(context, &space);
    if (context->lt)
        (void)cublasLtDestroy(context->lt);
    if (context->stream)
        (void)cudaStreamDestroy(context->stream);
    (void)cudaGetLastError();
    memset(context, 0, sizeof(*context));
}
