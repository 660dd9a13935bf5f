/* What the tests of the operation tables share: seeded inputs, act buffers with guard zones whose
 * bodies start as NaN, comparison with a tolerance that NaN cannot pass, and loops over every
 * table. */
#ifndef CLAAS_TESTS_CHECK_H
#define CLAAS_TESTS_CHECK_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cpu/ops.h"

#define GUARD 256 /* bytes on each side */

/* Half an ulp at 1 of each format. */
#define HALF_ULP_F32  (1.0 / (1 << 24))
#define HALF_ULP_BF16 (1.0 / (1 << 8))

static uint64_t check_seed = 1;

static inline uint32_t check_bits(void)
{
    check_seed = check_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(check_seed >> 33);
}
/* Roughly normal(0, 1): the sum of four uniforms. */
static inline float check_random(void)
{
    double sum = 0;

    for (int i = 0; i < 4; i++)
        sum += check_bits() / 2147483648.0 - 0.5;
    return (float)(sum * 1.7320508);
}

/* A buffer of `count` elements of `size` bytes between guard zones; the body is all ones bits, a
 * NaN in every format. */
struct buffer {
    size_t count, size;
    unsigned char *whole;
    void *data;
};
static inline struct buffer buffer_new(size_t count, size_t size)
{
    struct buffer b = {.count = count, .size = size};

    b.whole = malloc(count * size + 2 * GUARD);
    assert_non_null(b.whole);
    memset(b.whole, 0xa5, count * size + 2 * GUARD);
    b.data = b.whole + GUARD;
    memset(b.data, 0xff, count * size);
    return b;
}
static inline void buffer_check(const struct buffer *b, const char *what)
{
    for (size_t i = 0; i < GUARD; i++)
        if (b->whole[i] != 0xa5 || b->whole[GUARD + b->count * b->size + i] != 0xa5)
            fail_msg("%s: a guard zone was written", what);
}
static inline void buffer_free(struct buffer *b, const char *what)
{
    buffer_check(b, what);
    free(b->whole);
    *b = (struct buffer){0};
}

static inline float act_get(const struct claas_ops *ops, const void *p, size_t i)
{
    return ops->precision == CLAAS_PRECISION_BF16 ? claas_from_bf16(((const claas_bf16 *)p)[i])
                                                  : ((const float *)p)[i];
}
static inline void act_put(const struct claas_ops *ops, void *p, size_t i, float value)
{
    if (ops->precision == CLAAS_PRECISION_BF16)
        ((claas_bf16 *)p)[i] = claas_to_bf16(value);
    else
        ((float *)p)[i] = value;
}
/* Half an ulp, relative, of an act. */
static inline double act_rounding(const struct claas_ops *ops)
{
    return ops->precision == CLAAS_PRECISION_BF16 ? HALF_ULP_BF16 : HALF_ULP_F32;
}
static inline void *act_at(const struct claas_ops *ops, void *p, size_t i)
{
    return (char *)p + i * ops->act_bytes;
}

/* Rows of random acts; what lies between the rows stays NaN. */
static inline struct buffer act_rows(const struct claas_ops *ops, int rows, int columns, int ld,
                                     float scale)
{
    struct buffer b = buffer_new((size_t)rows * ld, ops->act_bytes);

    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            act_put(ops, b.data, (size_t)i * ld + j, scale * check_random());
    return b;
}
static inline struct buffer float_rows(int rows, int columns, int ld, float scale)
{
    struct buffer b = buffer_new((size_t)rows * ld, sizeof(float));

    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++)
            ((float *)b.data)[(size_t)i * ld + j] = scale * check_random();
    return b;
}

/* A random weight [n][k] of values an act holds exactly, packed by the table. */
static inline struct buffer panels_of(const struct claas_ops *ops, const float *w, int n, int k)
{
    struct buffer b = buffer_new(claas_panel_bytes(ops->precision, n, k), 1);

    for (int p = 0; p * CLAAS_LANES < n; p++) {
        const float *rows[CLAAS_LANES] = {0};

        for (int lane = 0; lane < CLAAS_LANES && p * CLAAS_LANES + lane < n; lane++)
            rows[lane] = w + (size_t)(p * CLAAS_LANES + lane) * k;
        ops->pack_panel(b.data, k, p, rows);
    }
    buffer_check(&b, "pack_panel");
    return b;
}
static inline float *weights_new(const struct claas_ops *ops, int n, int k)
{
    float *w = malloc(((size_t)n * k + 1) * sizeof(float));

    assert_non_null(w);
    for (size_t i = 0; i < (size_t)n * k; i++) {
        w[i] = check_random();
        if (ops->precision == CLAAS_PRECISION_BF16)
            w[i] = claas_from_bf16(claas_to_bf16(w[i]));
    }
    return w;
}

/* Fails unless |got - want| <= tolerance; a NaN fails. */
#define check_close(got, want, tolerance, ...)                                                     \
    do {                                                                                           \
        const double got_ = (got), want_ = (want), tolerance_ = (tolerance);                       \
        if (!(fabs(got_ - want_) <= tolerance_)) {                                                 \
            print_error(__VA_ARGS__);                                                              \
            fail_msg(": got %.9g, want %.9g, off by %.3g, allowed %.3g", got_, want_,              \
                     fabs(got_ - want_), tolerance_);                                              \
        }                                                                                          \
    } while (0)

/* The gap between rows must still be what it was. */
static inline void check_gaps(const struct buffer *b, int rows, int columns, int ld,
                              const char *what)
{
    for (int i = 0; i < rows; i++)
        for (size_t at = ((size_t)i * ld + columns) * b->size; at < ((size_t)i + 1) * ld * b->size;
             at++)
            if (((const unsigned char *)b->data)[at] != 0xff)
                fail_msg("%s: row %d was written beyond its %d columns", what, i, columns);
}

static inline claas_pool_t *pool_of(int threads)
{
    claas_pool_t *pool = NULL;

    assert_int_equal(claas_pool_new(threads, &pool), 0);
    return pool;
}

#define FOR_EACH_TABLE(ops)                                                                        \
    for (int precision_ = 0; precision_ < 2; precision_++)                                         \
        for (int table_ = 0; claas_ops_at((enum claas_precision)precision_, table_); table_++)     \
            for (const struct claas_ops *ops =                                                     \
                     claas_ops_at((enum claas_precision)precision_, table_);                       \
                 ops; ops = NULL)

#endif
