/* Row loops of the SDPO loss, written in vectors of 8 floats (GCC and Clang vector extensions).
 *
 * The compiler lowers a vector to what the instruction set has (two SSE, one AVX); the lanes, and
 * so the order of every sum, stay the same. Each lane adds 16 floats, then moves into a double: the
 * error of a sum stays near one float ulp whatever V is, and the result does not depend on
 * alignment. */
#include "sdpo/rows.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef ROWS_TABLE
#define ROWS_TABLE claas_rows_base
#define ROWS_NAME  "base"
#endif

#define LANES 8
#define BLOCK 16 /* vectors summed in float before they move to double */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef double dvec __attribute__((vector_size(8 * LANES)));

#define INLINE static inline __attribute__((always_inline))

/* Macros, not functions: a vector as argument would depend on the instruction set's calling
 * convention. */
#define LOAD(v, p)      memcpy(&(v), (p), sizeof(v))
#define STORE(p, v)     memcpy((p), &(v), sizeof(v))
#define SELECT(m, a, b) ((vec)(((ivec)(a) & (m)) | ((ivec)(b) & ~(m))))
/* 0 where f is 0, else v; so a NaN in f lets v through. */
#define WHERE(f, v) ((vec)((ivec)(v) & ((f) != 0.0F)))
#define FLUSH(t, a) ((t) += __builtin_convertvector((a), dvec))

/* exp(x) for x <= 0; below -87 (where floats end) 0, NaN stays NaN. x = n ln 2 + r with ln 2 in two
 * parts, |r| <= ln(2)/2; polynomial of Cephes expf. Error below 1.5 ulp. */
INLINE void exp_vec(const vec *in, vec *out)
{
    const float magic = 0x1.8p23F; /* adding it rounds to an integer in the low bits */
    vec x = *in;
    vec shifted = x * 1.44269504088896341F + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375F;
    vec y;
    vec scale;

    r = r - n * -2.12194440e-4F;
    y = r * 1.9875691500e-4F + 1.3981999507e-3F;
    y = y * r + 8.3334519073e-3F;
    y = y * r + 4.1665795894e-2F;
    y = y * r + 1.6666665459e-1F;
    y = y * r + 5.0000001201e-1F;
    y = y * (r * r) + r + 1.0F;
    /* shifted = 1.5 * 2^23 + n, so its low bits are n: 2^n is n + 127 in the exponent. */
    scale = (vec)(((uvec)shifted + 127) << 23);
    y = y * scale;
    *out = (vec)((ivec)y & ~(x < -87.0F));
}

/* log(x) for normal x > 0; an infinite x gives 89, which only meets factors near 0. x = m 2^e with
 * m in [sqrt(1/2), sqrt(2)); polynomial of Cephes logf. Relative error small near x = 1 too. */
INLINE void log_vec(const vec *in, vec *out)
{
    ivec bits = (ivec)*in;
    ivec exponent = (bits >> 23) - 126;
    vec m = (vec)((bits & 0x007fffff) | 0x3f000000); /* [0.5, 1) */
    ivec low = m < 0.707106781186547524F;
    vec e = __builtin_convertvector(exponent + low, vec);
    vec z;
    vec y;

    m = m + (vec)((ivec)m & low) - 1.0F;
    z = m * m;
    y = m * 7.0376836292e-2F - 1.1514610310e-1F;
    y = y * m + 1.1676998740e-1F;
    y = y * m - 1.2420140846e-1F;
    y = y * m + 1.4249322787e-1F;
    y = y * m - 1.6668057665e-1F;
    y = y * m + 2.0000714765e-1F;
    y = y * m - 2.4999993993e-1F;
    y = y * m + 3.3333331174e-1F;
    y = y * m * z;
    y = y + e * -2.12194440e-4F;
    y = y - z * 0.5F;
    *out = m + y + e * 0.693359375F;
}

INLINE double total(const dvec *lanes)
{
    double sum = 0;

    for (int i = 0; i < LANES; i++)
        sum += (*lanes)[i];
    return sum;
}

/* The last n % LANES elements, filled up with `filler`. */
INLINE void load_tail(vec *v, const float *p, size_t n, float filler)
{
    float lanes[LANES];

    for (size_t i = 0; i < LANES; i++)
        lanes[i] = i < n ? p[i] : filler;
    LOAD(*v, lanes);
}

static float row_max(const float *z, size_t n)
{
    vec best = (vec){0} - INFINITY;
    float max = -INFINITY;
    size_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        vec v;

        LOAD(v, z + i);
        best = SELECT(v > best, v, best);
    }
    for (int l = 0; l < LANES; l++)
        max = best[l] > max ? best[l] : max;
    for (; i < n; i++)
        max = z[i] > max ? z[i] : max;
    return max;
}

static double row_sum(const float *e, size_t n)
{
    dvec sum = {0};
    vec v;
    size_t i = 0;

    while (i + LANES <= n) {
        vec acc = {0};

        for (int b = 0; b < BLOCK && i + LANES <= n; b++, i += LANES) {
            LOAD(v, e + i);
            acc += v;
        }
        FLUSH(sum, acc);
    }
    if (i < n) {
        load_tail(&v, e + i, n - i, 0.0F);
        FLUSH(sum, v);
    }
    return total(&sum);
}

static double row_sum_exp(const float *z, size_t n, float max)
{
    dvec sum = {0};
    vec v;
    size_t i = 0;

    while (i + LANES <= n) {
        vec acc = {0};

        for (int b = 0; b < BLOCK && i + LANES <= n; b++, i += LANES) {
            LOAD(v, z + i);
            v -= max;
            exp_vec(&v, &v);
            acc += v;
        }
        FLUSH(sum, acc);
    }
    if (i < n) {
        load_tail(&v, z + i, n - i, -INFINITY);
        v -= max;
        exp_vec(&v, &v);
        FLUSH(sum, v);
    }
    return total(&sum);
}

struct moment_lanes {
    vec s, s_us, t, t_ut_less;
};

/* us and ut in, es and et out. */
INLINE void moments_step(vec *us, vec *ut, struct moment_lanes *acc)
{
    vec es;
    vec et;

    exp_vec(us, &es);
    exp_vec(ut, &et);
    acc->s += es;
    acc->s_us += WHERE(es, es * *us);
    acc->t += et;
    acc->t_ut_less += WHERE(et, et * (*ut - *us));
    *us = es;
    *ut = et;
}

static void row_moments(const float *z, const float *zt, size_t n, float max, float max_t,
                        float *es, float *et, struct claas_rows_sums *sums)
{
    dvec s = {0}, s_us = {0}, t = {0}, t_ut_less = {0};
    vec us, ut;
    size_t i = 0;

    while (i < n) {
        struct moment_lanes acc = {{0}, {0}, {0}, {0}};

        for (int b = 0; b < BLOCK && i + LANES <= n; b++, i += LANES) {
            LOAD(us, z + i);
            LOAD(ut, zt + i);
            us -= max;
            ut -= max_t;
            moments_step(&us, &ut, &acc);
            STORE(es + i, us);
            STORE(et + i, ut);
        }
        FLUSH(s, acc.s);
        FLUSH(s_us, acc.s_us);
        FLUSH(t, acc.t);
        FLUSH(t_ut_less, acc.t_ut_less);
        if (i < n && n - i < LANES) {
            acc = (struct moment_lanes){{0}, {0}, {0}, {0}};
            load_tail(&us, z + i, n - i, -INFINITY);
            load_tail(&ut, zt + i, n - i, -INFINITY);
            us -= max;
            ut -= max_t;
            moments_step(&us, &ut, &acc);
            memcpy(es + i, &us, (n - i) * sizeof(float));
            memcpy(et + i, &ut, (n - i) * sizeof(float));
            FLUSH(s, acc.s);
            FLUSH(s_us, acc.s_us);
            FLUSH(t, acc.t);
            FLUSH(t_ut_less, acc.t_ut_less);
            i = n;
        }
    }
    sums->s = total(&s);
    sums->s_us = total(&s_us);
    sums->t = total(&t);
    sums->t_ut_less = total(&t_ut_less);
}

static void row_diverge_reverse(const float *z, const float *zt, size_t n, float max, float max_t,
                                const float *es, float *x, struct claas_rows_sums *sums)
{
    dvec sum = {0};
    vec us, ut, e;
    size_t i = 0;

    while (i + LANES <= n) {
        vec acc = {0};

        for (int b = 0; b < BLOCK && i + LANES <= n; b++, i += LANES) {
            LOAD(us, z + i);
            LOAD(ut, zt + i);
            LOAD(e, es + i);
            us = WHERE(e, e * ((us - max) - (ut - max_t)));
            STORE(x + i, us);
            acc += us;
        }
        FLUSH(sum, acc);
    }
    if (i < n) {
        load_tail(&us, z + i, n - i, -INFINITY);
        load_tail(&ut, zt + i, n - i, -INFINITY);
        load_tail(&e, es + i, n - i, 0.0F);
        us = WHERE(e, e * ((us - max) - (ut - max_t)));
        memcpy(x + i, &us, (n - i) * sizeof(float));
        FLUSH(sum, us);
    }
    sums->x = total(&sum);
}

/* log(S/M) = -log((1-a) + a T/S) and log(T/M) = -log((1-a) S/T + a): both exact near S = T, where
 * the difference of two logarithms would lose everything. */
INLINE void jsd_step(const vec *e, const vec *et, float keep, float mix, float t_per_s,
                     float s_per_t, vec *x, vec *t_log)
{
    vec qs = (*et / *e) * t_per_s * mix + keep;
    vec qt = (*e / *et) * s_per_t * keep + mix;

    log_vec(&qs, &qs);
    log_vec(&qt, &qt);
    *x = WHERE(*e, -(*e * qs));
    *t_log = WHERE(*et, -(*et * qt));
}

static void row_diverge_jsd(size_t n, float alpha, const float *es, float *et_to_x,
                            struct claas_rows_sums *sums)
{
    const float keep = (float)(1.0 - (double)alpha);
    const float t_per_s = (float)(sums->s / sums->t);
    const float s_per_t = (float)(sums->t / sums->s);
    dvec sum = {0}, sum_t = {0};
    vec e, et, x, t_log;
    size_t i = 0;

    while (i + LANES <= n) {
        vec acc = {0}, acc_t = {0};

        for (int b = 0; b < BLOCK && i + LANES <= n; b++, i += LANES) {
            LOAD(e, es + i);
            LOAD(et, et_to_x + i);
            jsd_step(&e, &et, keep, alpha, t_per_s, s_per_t, &x, &t_log);
            STORE(et_to_x + i, x);
            acc += x;
            acc_t += t_log;
        }
        FLUSH(sum, acc);
        FLUSH(sum_t, acc_t);
    }
    if (i < n) {
        load_tail(&e, es + i, n - i, 0.0F);
        load_tail(&et, et_to_x + i, n - i, 0.0F);
        jsd_step(&e, &et, keep, alpha, t_per_s, s_per_t, &x, &t_log);
        memcpy(et_to_x + i, &x, (n - i) * sizeof(float));
        FLUSH(sum, x);
        FLUSH(sum_t, t_log);
    }
    sums->x = total(&sum);
    sums->t_log = total(&sum_t);
}

static void row_combine(size_t n, float a, const float *x, float c, const float *es, float *grad)
{
    if (!x) {
        for (size_t i = 0; i < n; i++)
            grad[i] = c * es[i];
        return;
    }
    for (size_t i = 0; i < n; i++)
        grad[i] = a * x[i] + c * es[i];
}

const struct claas_rows ROWS_TABLE = {
    .name = ROWS_NAME,
    .max = row_max,
    .sum = row_sum,
    .sum_exp = row_sum_exp,
    .moments = row_moments,
    .diverge_reverse = row_diverge_reverse,
    .diverge_jsd = row_diverge_jsd,
    .combine = row_combine,
};
