/* Opening the device, errors, memory.
 *
 * Memory is zeroed on the calling thread's own stream, and that is waited for, so that it is zero
 * for every stream that uses it next. The device's I/O threads make adapters while the compute
 * thread works, which is why counters change atomically. */
#include "cuda/context.h"
#include "claas/device.h"
#include "cuda/gemm.h"
#include "pack/peak.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT      ((size_t)256)
#define LT_SPACE_BYTES ((size_t)64 << 20)
#define OLDEST_ARCH    80 /* bfloat16 on tensor cores, cp.async */

/* --- errors --- */

static thread_local bool holds_capture; /* this thread holds a context's `capture` */

void cuda_capture_lock(struct cuda_context *context)
{
    (void)pthread_mutex_lock(&context->capture);
    holds_capture = true;
}

void cuda_capture_unlock(struct cuda_context *context)
{
    holds_capture = false;
    (void)pthread_mutex_unlock(&context->capture);
}

/* A sticky error (a kernel that faulted, a device that fell off the bus) is the answer to every
 * later call, even to one as harmless as asking whether the stream is done. While the stream is
 * captured it cannot be asked; what comes after the capture will meet the error again. */
static cudaError_t sticky_error(struct cuda_context *context)
{
    cudaError_t now;

    if (holds_capture || !context->stream)
        return cudaSuccess;
    cuda_capture_lock(context);
    now = cudaStreamQuery(context->stream);
    cuda_capture_unlock(context);
    (void)cudaGetLastError();
    return now == cudaErrorNotReady ? cudaSuccess : now;
}

int cuda_check(struct cuda_context *context, cudaError_t code, const char *what)
{
    if (code == cudaSuccess)
        return 0;
    (void)cudaGetLastError(); /* clears it, or the next launch would be blamed for it */
    if (code == cudaErrorMemoryAllocation)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "%s: the device's memory is full", what);
    if (sticky_error(context) != cudaSuccess)
        __atomic_store_n(&context->lost, true, __ATOMIC_RELAXED);
    return claas_fail(__atomic_load_n(&context->lost, __ATOMIC_RELAXED) ? CLAAS_ERR_DEVICE_LOST
                                                                        : CLAAS_ERR_DEVICE,
                      "%s: %s (%s)", what, cudaGetErrorString(code), cudaGetErrorName(code));
}

int cuda_check_launch(struct cuda_context *context, const char *what)
{
    return cuda_check(context, cudaGetLastError(), what);
}

int cuda_check_device(struct cuda_context *context, const char *what)
{
    return cuda_check(context, sticky_error(context), what);
}

bool cuda_is_capturing(const struct cuda_context *context)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;

    return cudaStreamIsCapturing(context->stream, &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

int cuda_wait(struct cuda_context *context)
{
    return cuda_check(context, cudaStreamSynchronize(context->stream), "the device's work");
}

/* --- memory --- */

/* The map's line of that name, or the last one when there are too many names. Several threads may
 * be here at once. */
static int find_use(struct cuda_context *context, const char *what)
{
    for (int i = 0; i < CUDA_USES; i++) {
        const char *there = NULL;

        if (__atomic_compare_exchange_n(&context->uses[i].what, &there, what, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ||
            strcmp(there, what) == 0)
            return i;
    }
    return CUDA_USES - 1;
}

/* "the model's weights 15623 MiB, keys and values 28000 MiB" */
static void write_map(const struct cuda_context *context, char *out, size_t size)
{
    size_t used = 0;

    out[0] = '\0';
    for (int i = 0; i < CUDA_USES && used < size; i++) {
        const char *what = __atomic_load_n(&context->uses[i].what, __ATOMIC_ACQUIRE);
        size_t bytes = __atomic_load_n(&context->uses[i].bytes, __ATOMIC_RELAXED);

        if (what && bytes > 0)
            used += (size_t)snprintf(out + used, size - used, "%s%s %zu MiB", used ? ", " : "",
                                     what, bytes >> 20);
    }
}

int cuda_memory_free(struct cuda_context *context, size_t *ret)
{
    size_t available = 0, total = 0, held = __atomic_load_n(&context->bytes, __ATOMIC_RELAXED);
    int rc = cuda_check(context, cudaMemGetInfo(&available, &total), "asking for free memory");

    if (rc < 0)
        return rc;
    if (context->limit && held >= context->limit)
        available = 0;
    else if (context->limit && context->limit - held < available)
        available = context->limit - held;
    *ret = available;
    return 0;
}

static int refuse(struct cuda_context *context, const char *what, size_t bytes)
{
    size_t available = 0;
    char map[640];

    write_map(context, map, sizeof(map));
    if (cuda_memory_free(context, &available) == CLAAS_ERR_DEVICE_LOST)
        return CLAAS_ERR_DEVICE_LOST;
    return claas_fail(CLAAS_ERR_NO_MEMORY,
                      "no memory on the device for %s: %zu bytes (%zu MiB), %zu of %zu MiB are "
                      "free" CLAAS_MEMORY_HELD "%s",
                      what, bytes, bytes >> 20, available >> 20, context->memory >> 20, map);
}

/* Counts the bytes as held, unless that is more than the limit. */
static bool hold(struct cuda_context *context, size_t bytes)
{
    size_t now = __atomic_add_fetch(&context->bytes, bytes, __ATOMIC_RELAXED);

    if (!context->limit || now <= context->limit)
        return true;
    (void)__atomic_fetch_sub(&context->bytes, bytes, __ATOMIC_RELAXED);
    return false;
}

int cuda_region_new(struct cuda_context *context, struct cuda_region *region, size_t bytes,
                    const char *what)
{
    size_t rounded = (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    cudaError_t code = cudaErrorMemoryAllocation;
    void *base = NULL;

    region->base = NULL;
    region->bytes = 0;
    if (rounded < bytes || rounded > SIZE_MAX / 2) /* wraps around, here or in the sum of all */
        return refuse(context, what, bytes);
    if (rounded == 0)
        rounded = ALIGNMENT;
    if (!hold(context, rounded))
        return refuse(context, what, rounded);
    code = cudaMalloc(&base, rounded);
    if (code == cudaSuccess) {
        code = cudaMemsetAsync(base, 0, rounded, cudaStreamPerThread);
        if (code == cudaSuccess)
            code = cudaStreamSynchronize(cudaStreamPerThread);
        if (code != cudaSuccess)
            (void)cudaFree(base);
    }
    if (code != cudaSuccess) {
        (void)cudaGetLastError();
        (void)__atomic_fetch_sub(&context->bytes, rounded, __ATOMIC_RELAXED);
        return code == cudaErrorMemoryAllocation ? refuse(context, what, rounded)
                                                 : cuda_check(context, code, what);
    }
    claas_peak_raise(&context->peak, __atomic_load_n(&context->bytes, __ATOMIC_RELAXED));
    region->base = base;
    region->bytes = rounded;
    region->use = find_use(context, what);
    (void)__atomic_fetch_add(&context->uses[region->use].bytes, rounded, __ATOMIC_RELAXED);
    return 0;
}

void cuda_region_done(struct cuda_context *context, struct cuda_region *region)
{
    if (!region->base)
        return;
    (void)cudaFree(region->base); /* waits for the device's work */
    (void)cudaGetLastError();
    (void)__atomic_fetch_sub(&context->bytes, region->bytes, __ATOMIC_RELAXED);
    (void)__atomic_fetch_sub(&context->uses[region->use].bytes, region->bytes, __ATOMIC_RELAXED);
    region->base = NULL;
    region->bytes = 0;
}

int cuda_pin(struct cuda_context *context, void **ret, size_t bytes, const char *what)
{
    cudaError_t code = cudaMallocHost(ret, bytes);

    if (code != cudaErrorMemoryAllocation)
        return cuda_check(context, code, what);
    (void)cudaGetLastError();
    *ret = NULL;
    return claas_fail(CLAAS_ERR_OVERLOADED, "no pinned host memory for %s: %zu bytes", what, bytes);
}

void *cuda_take(struct cuda_arena *arena, size_t bytes)
{
    void *place = arena->base ? arena->base + arena->used : NULL;

    arena->used += (bytes + ALIGNMENT - 1) & ~(ALIGNMENT - 1);
    return place;
}

/* --- opening --- */

/* Whether this process was started because one before it lost its card. */
static bool is_second_life(void)
{
    return getenv(CLAAS_DEVICE_LOST_VARIABLE) != NULL;
}

int cuda_find_device(void)
{
    int count = 0, driver = 0;
    cudaError_t code = cudaGetDeviceCount(&count);

    (void)cudaGetLastError();
    if (code == cudaSuccess && count > 0)
        return 0;
    (void)cudaDriverGetVersion(&driver);
    (void)cudaGetLastError();
    if (driver > 0 && is_second_life())
        return claas_fail(CLAAS_ERR_DEVICE_LOST, "the card has not come back: %s",
                          code == cudaSuccess ? "no CUDA device" : cudaGetErrorString(code));
    if (code == cudaSuccess || code == cudaErrorNoDevice)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "no CUDA device here");
    if (code == cudaErrorInsufficientDriver && driver == 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "no CUDA driver here");
    if (code == cudaErrorInsufficientDriver)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "the CUDA driver is too old: it knows CUDA %d.%d, this build is of %d.%d",
                          driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                          CUDART_VERSION % 1000 / 10);
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "no usable CUDA device: %s", cudaGetErrorString(code));
}

#define PROBE_MARK 1024

/* The device must be new enough, and this binary must have code for it. */
static __global__ void probe_kernel(void)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    /* Nobody launches it: its size says what code this is. */
    __shared__ volatile int mark[PROBE_MARK];

    mark[threadIdx.x] = 0;
#endif
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
    if (code != cudaSuccess)
        return cuda_check(context, code, "opening the CUDA device");
    /* Code of an older kind that the driver compiled for this card has what that kind has: no
     * clusters, no waiting for the kernel before. All files are compiled for the same kinds. */
    if (attributes.ptxVersion >= OLDEST_ARCH && attributes.ptxVersion < context->arch)
        context->arch = attributes.ptxVersion;
    context->warpgroups = attributes.sharedSizeBytes >= PROBE_MARK * sizeof(int);
    context->early = context->arch >= 90 && !cuda_is_off("CLAAS_CUDA_EARLY");
    context->fuse = !cuda_is_off("CLAAS_CUDA_FUSE");
    return 0;
}

static int open_library(struct cuda_context *context)
{
    cublasStatus_t status;
    int rc = cuda_check(context, cudaStreamCreateWithFlags(&context->stream, cudaStreamNonBlocking),
                        "making a stream");

    if (rc < 0)
        return rc;
    status = cublasLtCreate(&context->lt);
    if (status != CUBLAS_STATUS_SUCCESS)
        return claas_fail(CLAAS_ERR_DEVICE, "opening cuBLASLt: %s",
                          cublasLtGetStatusString(status));
    rc = cuda_region_new(context, &context->lt_region, LT_SPACE_BYTES, "matrix products");
    context->lt_space = context->lt_region.base;
    context->lt_space_bytes = context->lt_region.bytes;
    return rc;
}

static int read_limit(struct cuda_context *context)
{
    const char *text = getenv("CLAAS_CUDA_MEMORY_LIMIT");
    char *end = NULL;

    if (!text || !*text)
        return 0;
    context->limit = (size_t)strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || context->limit == 0)
        return claas_fail(CLAAS_ERR_INVALID, "CLAAS_CUDA_MEMORY_LIMIT='%s' is no number of bytes",
                          claas_quote(text).text);
    if (context->limit < context->memory)
        context->memory = context->limit;
    return 0;
}

int cuda_context_open(enum cuda_type act, struct cuda_context *ret)
{
    struct cuda_context context;
    int rc = cuda_find_device();

    memset(&context, 0, sizeof(context));
    (void)pthread_mutex_init(&context.capture, NULL);
    context.act = act;
    context.act_bytes = act == CUDA_TYPE_F32 ? 4 : 2;
    if (rc == 0)
        rc = check_device(&context);
    if (rc == 0)
        rc = read_limit(&context);
    if (rc == 0)
        rc = open_library(&context);
    if (rc < 0) {
        cuda_context_close(&context);
        /* the card is listed, but not ready yet */
        return rc == CLAAS_ERR_DEVICE && is_second_life() ? CLAAS_ERR_DEVICE_LOST : rc;
    }
    (void)pthread_mutex_destroy(&context.capture); /* a mutex in use must not be copied */
    *ret = context;
    (void)pthread_mutex_init(&ret->capture, NULL);
    return 0;
}

void cuda_context_close(struct cuda_context *context)
{
    if (context->stream)
        (void)cudaStreamSynchronize(context->stream);
    cuda_gemm_plans_free(context);
    cuda_region_done(context, &context->lt_region);
    if (context->lt)
        (void)cublasLtDestroy(context->lt);
    if (context->stream)
        (void)cudaStreamDestroy(context->stream);
    (void)cudaGetLastError();
    (void)pthread_mutex_destroy(&context->capture);
    memset(context, 0, sizeof(*context));
}
