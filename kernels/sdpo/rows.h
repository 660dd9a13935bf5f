/* The loops over one row of V logits, V = 49,152 to 151,936: all of the loss that costs time.
 *
 * rows.c is compiled once per instruction set. All tables give the same bits: same formula, same 8
 * lanes, same order of sums, no contraction into FMA; they differ only in speed. */
#ifndef CLAAS_SDPO_ROWS_H
#define CLAAS_SDPO_ROWS_H

#include <stddef.h>

/* With us = z - max z, es = exp(us); ut, et likewise for the teacher. A term whose factor es or et
 * is 0 counts 0 (0 log 0 = 0). */
struct claas_rows_sums {
    double s;         /* sum es */
    double s_us;      /* sum es us */
    double t;         /* sum et */
    double t_ut_less; /* sum et (ut - us) */
    double x;         /* sum of the row that diverge_* wrote */
    double t_log;     /* diverge_jsd: sum et log(T/M) */
};

struct claas_rows {
    const char *name;
    /* The largest element; NaNs are passed over (they come back as a NaN sum). */
    float (*max)(const float *z, size_t n);
    double (*sum)(const float *e, size_t n);
    /* sum exp(z - max): the same bits as sums->s of `moments`. */
    double (*sum_exp)(const float *z, size_t n, float max);
    /* Writes es and et [n]; fills s, s_us, t, t_ut_less. */
    void (*moments)(const float *z, const float *zt, size_t n, float max, float max_t, float *es,
                    float *et, struct claas_rows_sums *sums);
    /* x = es (us - ut), and its sum. */
    void (*diverge_reverse)(const float *z, const float *zt, size_t n, float max, float max_t,
                            const float *es, float *x, struct claas_rows_sums *sums);
    /* x = es log(S/M), in place of et, and the sums x and t_log. S = es/s, T = et/t. */
    void (*diverge_jsd)(size_t n, float alpha, const float *es, float *et_to_x,
                        struct claas_rows_sums *sums);
    /* grad = a x + c es; x may be NULL. */
    void (*combine)(size_t n, float a, const float *x, float c, const float *es, float *grad);
};

extern const struct claas_rows claas_rows_base;
#ifdef __x86_64__
extern const struct claas_rows claas_rows_v3;
extern const struct claas_rows claas_rows_v4;
#endif

/* The fastest table of this CPU; the environment variable CLAAS_CPU = ref | avx2 forces a slower
 * one. */
const struct claas_rows *claas_rows_pick(void);

#endif
