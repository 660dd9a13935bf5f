/* What the machine could do at best: matrix products of training's shapes, and reading memory with
 * all threads. */
#include "cpu/step.h"
#include "pack/backend_common.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#include <stdlib.h>
#include <string.h>

#define GEMM_ROUNDS 5
#define READ_BYTES  ((size_t)256 << 20)
#define READ_ROUNDS 5

struct gemm_memory {
    void *x, *w, *y;
};

static void free_gemm_memory(struct gemm_memory *memory)
{
    free(memory->x);
    free(memory->w);
    free(memory->y);
}

/* Random values, because zeros would run cooler and faster than real work. */
static int make_operands(const struct claas_ops *ops, int m, int n, int k, struct gemm_memory *ret)
{
    const float *rows[CLAAS_LANES];
    CLAAS_AUTO_FREE float *row = CLAAS_NEW_ARRAY(float, (size_t)k);
    uint32_t bits = 1;

    ret->x = claas_alloc_aligned((size_t)m * k * ops->act_bytes);
    ret->w = claas_alloc_aligned(claas_panel_bytes(ops->precision, n, k));
    ret->y = claas_alloc_aligned((size_t)m * n * ops->act_bytes);
    if (row == NULL || ret->x == NULL || ret->w == NULL || ret->y == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < CLAAS_LANES; i++)
        rows[i] = row;
    for (int i = 0; i < m || i < n / CLAAS_LANES; i++) {
        for (int j = 0; j < k; j++) {
            bits = bits * 1664525u + 1013904223u;
            row[j] = (float)(bits >> 8) / 16777216.0f - 0.5f;
        }
        if (i < m)
            ops->to_act(row, (char *)ret->x + (size_t)i * k * ops->act_bytes, (size_t)k);
        if (i < n / CLAAS_LANES)
            ops->pack_panel(ret->w, k, i, rows);
    }
    return 0;
}

static int measure_gemm(const struct claas_ops *ops, claas_pool_t *pool, int m, int n, int k,
                        double *best)
{
    CLAAS_AUTO(free_gemm_memory) struct gemm_memory memory = {0};
    struct claas_gemm_args args = {.m = m, .n = n, .k = k, .ldx = k, .ldo = n};
    int rc = make_operands(ops, m, n, k, &memory);

    if (rc < 0)
        return rc;
    args.x = memory.x;
    args.w = memory.w;
    args.out = memory.y;
    for (int i = 0; i < GEMM_ROUNDS + 1; i++) {
        int64_t start = claas_clock_ns();
        double rate;

        ops->gemm(pool, &args);
        rate = 2.0 * m * n * k / ((double)(claas_clock_ns() - start) * 1e-9);
        if (i > 0 && rate > *best)
            *best = rate;
    }
    return 0;
}

/* The best matrix product that the operation table makes here, of sizes that training has. */
static int measure_gemms(const struct claas_ops *ops, claas_pool_t *pool, double *ret)
{
    static const int shapes[][3] = {{1024, 1536, 576}, {1024, 2048, 2048}, {2048, 3072, 1024}};
    int rc = 0;

    *ret = 0;
    for (size_t i = 0; rc == 0 && i < CLAAS_COUNT(shapes); i++)
        rc = measure_gemm(ops, pool, shapes[i][0], shapes[i][1], shapes[i][2], ret);
    return rc;
}

/* --- memory --- */

struct reading {
    const uint64_t *data;
    int parts;
    uint64_t sums[256];
};

/* Eight sums side by side, so that the adds never wait for each other. */
static void read_part(void *arg, int part)
{
    struct reading *reading = arg;
    size_t words = READ_BYTES / sizeof(uint64_t) / (size_t)reading->parts / 8 * 8;
    const uint64_t *data = reading->data + words * (size_t)part;
    uint64_t sums[8] = {0};

    for (size_t i = 0; i < words; i += 8)
        for (int j = 0; j < 8; j++)
            sums[j] += data[i + j];
    for (int j = 0; j < 8; j++)
        reading->sums[part] += sums[j];
}

static int measure_reading(claas_pool_t *pool, double *ret)
{
    CLAAS_AUTO_FREE uint64_t *data = claas_alloc_aligned(READ_BYTES);
    struct reading reading = {.data = data, .parts = 64};

    *ret = 0;
    if (data == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memset(data, 1, READ_BYTES);
    for (int i = 0; i < READ_ROUNDS; i++) {
        int64_t start = claas_clock_ns();
        double rate;

        claas_pool_run(pool, reading.parts, read_part, &reading);
        rate = (double)READ_BYTES / ((double)(claas_clock_ns() - start) * 1e-9);
        if (rate > *ret)
            *ret = rate;
    }
    return 0;
}

int claas_cpu_floor(const struct claas_backend_options *options, struct claas_device_floor *ret)
{
    CLAAS_AUTO(claas_pool_free) claas_pool_t *pool = NULL;
    bool f32 = false;
    int rc = claas_backend_precision(options, &f32);

    if (rc == 0)
        rc = claas_pool_new(options->threads, &pool);
    if (rc == 0)
        rc = measure_gemms(claas_ops_pick(f32 ? CLAAS_PRECISION_F32 : CLAAS_PRECISION_BF16), pool,
                           &ret->gemm_flop_s);
    if (rc == 0)
        rc = measure_reading(pool, &ret->memory_bytes_s);
    return rc;
}
