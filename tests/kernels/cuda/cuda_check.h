/* What the tests of the CUDA kernels share: seeded values, arrays on the device between guard
 * zones, comparison with double references in which NaN fails, groups of cases with one line each,
 * and times by events.
 *
 *   check_begin("rmsnorm %s", "bf16");  … check_close(…) …  check_end();   prints  ok rmsnorm bf16
 *   return check_finish();              prints  12 passed, 0 failed
 *
 * Fresh arrays and the guard zones around them are all ones bits, a NaN in every format: what is
 * read out of bounds or never written spoils the result, what is written out of bounds is seen. */
#ifndef CLAAS_CUDA_CHECK_H
#define CLAAS_CUDA_CHECK_H

#include "cuda/context.h"
#include "shard.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK_GUARD      256 /* bytes on each side */
#define CHECK_SKIP       77  /* exit status without a device */

#define CHECK_F32_LIMIT  1e-5
#define CHECK_BF16_LIMIT 1e-2

/* --- groups of cases --- */

static struct {
    int passed, failed, left_out;
    char name[128], why[512]; /* of the group at hand; why: its first failure, or "" */
} check_state;

__attribute__((format(printf, 1, 2))) static inline void check_begin(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(check_state.name, sizeof(check_state.name), format, args);
    va_end(args);
    check_state.why[0] = '\0';
}

__attribute__((format(printf, 1, 2))) static inline void check_fail(const char *format, ...)
{
    va_list args;

    if (check_state.why[0])
        return;
    va_start(args, format);
    vsnprintf(check_state.why, sizeof(check_state.why), format, args);
    va_end(args);
}

static inline void check_end(void)
{
    if (check_state.why[0]) {
        check_state.failed++;
        printf("FAILED %s: %s\n", check_state.name, check_state.why);
    } else {
        check_state.passed++;
        printf("ok %s\n", check_state.name);
    }
    fflush(stdout);
}

/* The program's exit status. */
static inline int check_finish(void)
{
    if (check_state.left_out > 0)
        printf("%d cases left out (CLAAS_TEST_SMALL)\n", check_state.left_out);
    printf("%d passed, %d failed\n", check_state.passed, check_state.failed);
    return check_state.failed > 0;
}

/* A CUDA error ends the program: nothing works after most of them. */
static inline void check_cuda(cudaError_t code, const char *what)
{
    if (code == cudaSuccess)
        return;
    check_fail("%s: %s", what, cudaGetErrorString(code));
    check_end();
    exit(check_finish());
}

/* For calls of the back-end: 0 or an error's code. */
static inline void check_rc(int rc, const char *what)
{
    if (rc < 0)
        check_fail("%s: %s", what, claas_error_text());
}

/* Opens the device or ends the program with CHECK_SKIP. */
static inline void check_open(enum cuda_type act, struct cuda_context *context)
{
    if (cuda_context_open(act, context) >= 0)
        return;
    printf("skipped: %s\n", claas_error_text());
    exit(CHECK_SKIP);
}

/* --- how much is tried --- */

/* CLAAS_TEST_SMALL: for a run under a tool that watches every access, large cases are left out. */
static inline bool check_is_small(void)
{
    return getenv("CLAAS_TEST_SMALL") != NULL;
}
/* `work` in any unit: elements, or multiplications. Counts what is left out. */
static inline bool check_leaves_out(double work, double most)
{
    if (!check_is_small() || work <= most)
        return false;
    check_state.left_out++;
    return true;
}
/* CLAAS_TEST_OWN: without cases that have products of cuBLASLt in bfloat16. */
static inline bool check_only_own(void)
{
    return getenv("CLAAS_TEST_OWN") != NULL;
}
/* CLAAS_TEST_NO_TIMES: nothing is measured. */
static inline bool check_measures(void)
{
    return getenv("CLAAS_TEST_NO_TIMES") == NULL;
}

/* Elements of a case of wide rows (3 of 32,000 are in: clusters of several blocks), multiplications
 * of one of products. */
#define CHECK_SMALL_ROWS     9.7e4
#define CHECK_SMALL_PRODUCTS 5e8

/* --- numbers --- */

static uint64_t check_seed = 1;

static inline uint32_t check_bits(void)
{
    check_seed = check_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(check_seed >> 33);
}
/* From 0 to limit-1. */
static inline int check_below(int limit)
{
    return (int)(check_bits() % (uint32_t)limit);
}
/* Roughly normal(0, 1): the sum of four uniforms. */
static inline float check_random(void)
{
    double sum = 0;

    for (int i = 0; i < 4; i++)
        sum += check_bits() / 2147483648.0 - 0.5;
    return (float)(sum * 1.7320508);
}

/* Round to nearest even, NaN kept; the inverse is exact. */
static inline uint16_t check_to_bf16(float x)
{
    uint32_t bits = 0;

    memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static inline float check_from_bf16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float value = 0;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static inline size_t check_size(enum cuda_type type)
{
    return type == CUDA_TYPE_BF16 ? 2 : 4;
}
static inline const char *check_name(enum cuda_type type)
{
    return type == CUDA_TYPE_BF16 ? "bf16" : "f32";
}
static inline double check_limit(enum cuda_type type)
{
    return type == CUDA_TYPE_BF16 ? CHECK_BF16_LIMIT : CHECK_F32_LIMIT;
}
/* The value as an element of this type holds it. */
static inline float check_rounded(enum cuda_type type, float x)
{
    return type == CUDA_TYPE_BF16 ? check_from_bf16(check_to_bf16(x)) : x;
}

static inline void *check_alloc(size_t count, size_t size)
{
    void *p = calloc(count + 1, size);

    if (!p) {
        printf("no memory for %zu elements of %zu\n", count, size);
        exit(1);
    }
    return p;
}

/* --- memory of the device --- */

/* Bytes added to the start of new arrays, to make them less aligned than cudaMalloc does. */
static size_t check_shift = 0;

struct check_buffer {
    size_t bytes, shift;
    uint8_t *whole;
    void *data; /* on the device */
};

/* CLAAS_TEST_RAW: between its guard zones memory stays as it came, so that initcheck sees what is
 * read before it was written. Only for programs that do not look for the NaN of fresh arrays. */
static inline struct check_buffer check_buffer_new(size_t bytes)
{
    struct check_buffer b = {bytes, check_shift, NULL, NULL};
    const size_t before = CHECK_GUARD + b.shift, whole = before + bytes + CHECK_GUARD;

    check_cuda(cudaMalloc((void **)&b.whole, whole), "cudaMalloc");
    if (getenv("CLAAS_TEST_RAW")) {
        check_cuda(cudaMemset(b.whole, 0xff, before), "cudaMemset");
        check_cuda(cudaMemset(b.whole + before + bytes, 0xff, CHECK_GUARD), "cudaMemset");
    } else {
        check_cuda(cudaMemset(b.whole, 0xff, whole), "cudaMemset");
    }
    check_cuda(cudaDeviceSynchronize(), "a new array");
    b.data = b.whole + before;
    return b;
}

/* Waits, so that a stream of any kind sees the data. */
static inline void check_upload(const struct check_buffer *b, const void *from)
{
    check_cuda(cudaMemcpy(b->data, from, b->bytes, cudaMemcpyHostToDevice), "upload");
    check_cuda(cudaDeviceSynchronize(), "upload");
}
/* Waits for all kernels. */
static inline void check_download(const struct check_buffer *b, void *to)
{
    check_cuda(cudaDeviceSynchronize(), "kernel");
    check_cuda(cudaMemcpy(to, b->data, b->bytes, cudaMemcpyDeviceToHost), "download");
}

static inline struct check_buffer check_buffer_of(const void *from, size_t bytes)
{
    const struct check_buffer b = check_buffer_new(bytes);

    check_upload(&b, from);
    return b;
}

/* Looks at the guard zones and frees. */
static inline void check_buffer_free(struct check_buffer *b, const char *what)
{
    const size_t before = CHECK_GUARD + b->shift;
    uint8_t guard[2 * CHECK_GUARD + 64];

    check_cuda(cudaDeviceSynchronize(), what);
    check_cuda(cudaMemcpy(guard, b->whole, before, cudaMemcpyDeviceToHost), "guard");
    check_cuda(cudaMemcpy(guard + before, b->whole + before + b->bytes, CHECK_GUARD,
                          cudaMemcpyDeviceToHost),
               "guard");
    for (size_t i = 0; i < before + CHECK_GUARD; i++)
        if (guard[i] != 0xff) {
            check_fail("%s: written %s its bounds", what, i < before ? "before" : "behind");
            break;
        }
    check_cuda(cudaFree(b->whole), "cudaFree");
    b->whole = NULL;
    b->data = NULL;
}

/* --- arrays of act or float --- */

/* host: the values as the device holds them, as float. */
struct check_array {
    enum cuda_type type;
    size_t count;
    float *host;
    struct check_buffer buffer;
    void *data; /* of buffer */
};

/* NaN; for outputs. */
static inline struct check_array check_blank(enum cuda_type type, size_t count)
{
    struct check_array a = {};

    a.type = type;
    a.count = count;
    a.host = (float *)check_alloc(count, sizeof(float));
    a.buffer = check_buffer_new(count * check_size(type));
    a.data = a.buffer.data;
    return a;
}

/* host -> device, rounding host in place. */
static inline void check_put(struct check_array *a)
{
    uint16_t *narrow = NULL;

    if (a->type == CUDA_TYPE_F32) {
        check_upload(&a->buffer, a->host);
        return;
    }
    narrow = (uint16_t *)check_alloc(a->count, sizeof(uint16_t));
    for (size_t i = 0; i < a->count; i++) {
        narrow[i] = check_to_bf16(a->host[i]);
        a->host[i] = check_from_bf16(narrow[i]);
    }
    check_upload(&a->buffer, narrow);
    free(narrow);
}

/* device -> host. */
static inline void check_get(struct check_array *a)
{
    uint16_t *narrow = NULL;

    if (a->type == CUDA_TYPE_F32) {
        check_download(&a->buffer, a->host);
        return;
    }
    narrow = (uint16_t *)check_alloc(a->count, sizeof(uint16_t));
    check_download(&a->buffer, narrow);
    for (size_t i = 0; i < a->count; i++)
        a->host[i] = check_from_bf16(narrow[i]);
    free(narrow);
}

static inline struct check_array check_acts(enum cuda_type type, size_t count, float scale)
{
    struct check_array a = check_blank(type, count);

    for (size_t i = 0; i < count; i++)
        a.host[i] = scale * check_random();
    check_put(&a);
    return a;
}

static inline struct check_array check_copy_of(enum cuda_type type, const float *from, size_t count)
{
    struct check_array a = check_blank(type, count);

    memcpy(a.host, from, count * sizeof(float));
    check_put(&a);
    return a;
}

static inline void check_free(struct check_array *a, const char *what)
{
    check_buffer_free(&a->buffer, what);
    free(a->host);
    a->host = NULL;
    a->data = NULL;
}

/* Fills a large array for measurements: one million random values again and again. */
static inline void check_fill(enum cuda_type type, void *device, size_t count, float scale)
{
    const size_t period = count < 1000003 ? count : 1000003;
    struct check_array a = check_acts(type, period, scale);

    for (size_t i = 0; i < count; i += period)
        check_cuda(cudaMemcpy((uint8_t *)device + i * check_size(type), a.data,
                              (count - i < period ? count - i : period) * check_size(type),
                              cudaMemcpyDeviceToDevice),
                   "fill");
    check_cuda(cudaDeviceSynchronize(), "fill");
    check_free(&a, "fill");
}

/* --- comparison --- */

/* ||got - want|| / ||want||; NaN if any value is NaN or infinite. */
static inline double check_error(const float *got, const double *want, size_t count)
{
    double off = 0, all = 0;

    for (size_t i = 0; i < count; i++) {
        off += (got[i] - want[i]) * (got[i] - want[i]);
        all += want[i] * want[i];
    }
    return all == 0 && off == 0 ? 0 : sqrt(off / all);
}

static inline void check_close(const char *what, const float *got, const double *want, size_t count,
                               double limit)
{
    const double error = check_error(got, want, count);
    size_t worst = 0;

    if (error <= limit)
        return;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(got[i])) {
            worst = i;
            break;
        }
        if (fabs(got[i] - want[i]) > fabs(got[worst] - want[worst]))
            worst = i;
    }
    check_fail("%s: error %.3g, limit %.3g; worst at %zu of %zu: got %.9g, want %.9g", what, error,
               limit, worst, count, (double)got[worst], want[worst]);
}

static inline void check_same(const char *what, const void *got, const void *want, size_t bytes)
{
    const uint8_t *a = (const uint8_t *)got, *b = (const uint8_t *)want;

    if (memcmp(got, want, bytes) == 0)
        return;
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != b[i]) {
            check_fail("%s: not the same bits, first at byte %zu of %zu", what, i, bytes);
            return;
        }
}

/* --- time --- */

#define CHECK_RUNS 20

static inline int check_compare_floats(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

#ifdef __cplusplus
/* Median of CHECK_RUNS calls of run() on the context's stream, in ms. */
template <typename Run> static float check_median_ms(const struct cuda_context *context, Run run)
{
    float ms[CHECK_RUNS] = {};
    cudaEvent_t start, end;

    check_cuda(cudaEventCreate(&start), "event");
    check_cuda(cudaEventCreate(&end), "event");
    for (int i = -3; i < CHECK_RUNS; i++) {
        check_cuda(cudaEventRecord(start, context->stream), "event");
        run();
        check_cuda(cudaEventRecord(end, context->stream), "event");
        check_cuda(cudaEventSynchronize(end), "a timed kernel");
        if (i >= 0)
            check_cuda(cudaEventElapsedTime(&ms[i], start, end), "event");
    }
    check_cuda(cudaEventDestroy(start), "event");
    check_cuda(cudaEventDestroy(end), "event");
    qsort(ms, CHECK_RUNS, sizeof(ms[0]), check_compare_floats);
    return ms[CHECK_RUNS / 2];
}

/* A graph of what queue() launches. The first call, as it is, chooses algorithms and loads kernels.
 */
template <typename Queue>
static cudaGraphExec_t check_graph(const struct cuda_context *context, Queue queue)
{
    cudaGraphExec_t exec = NULL;
    cudaGraph_t graph = NULL;

    queue();
    check_cuda(cudaStreamSynchronize(context->stream), "what is captured");
    check_cuda(cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    queue();
    check_cuda(cudaStreamEndCapture(context->stream, &graph), "capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    return exec;
}

/* Times of what queue() launches, in a graph: the host's part does not count. */
template <typename Queue>
static float check_graph_ms(const struct cuda_context *context, Queue queue)
{
    cudaGraphExec_t exec = check_graph(context, queue);
    const float ms = check_median_ms(
        context, [&] { check_cuda(cudaGraphLaunch(exec, context->stream), "a graph"); });

    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    return ms;
}
#endif

/* Either figure may be 0. */
static inline void check_report(const char *what, float ms, double bytes, double flops)
{
    printf("time %s: %.4f ms", what, (double)ms);
    if (bytes > 0)
        printf(", %.0f GB/s", bytes / ms * 1e-6);
    if (flops > 0)
        printf(", %.1f TFLOP/s", flops / ms * 1e-9);
    printf("\n");
}

#endif
