/* Row-wise operations and the optimizer of every table against double; tolerances count float32
 * roundings (a sum over d terms: d of them) times the magnitude of what is summed, plus one
 * rounding to an act. Backward formulas are checked against finite differences of the forward ones
 * in double. */
#include "check.h"

#define EPS 1e-5f

static const int widths[] = {1, 7, 15, 16, 17, 33, 64, 576, 1000};
static const int heights[] = {0, 1, 3, 8, 17};

static double get(const struct buffer *b, size_t i)
{
    return ((const float *)b->data)[i];
}

/* --- RMSNorm
 * ---------------------------------------------------------------------------------------------------
 */

static double rms_double(const double *x, const double *w, int d, int at, double *rstd)
{
    double sum = 0;

    for (int k = 0; k < d; k++)
        sum += x[k] * x[k];
    *rstd = 1 / sqrt(sum / d + (double)EPS);
    return x[at] * *rstd * w[at];
}

static void check_rmsnorm(const struct claas_ops *ops, claas_pool_t *pool, int m, int d)
{
    const int ldx = d + 3, ldy = d + 1;
    struct buffer x = act_rows(ops, m, d, ldx, 2), w = float_rows(1, d, d, 1);
    struct buffer y = buffer_new((size_t)m * ldy, ops->act_bytes), rstd = buffer_new((size_t)m, 4);
    struct buffer dy = float_rows(m, d, ldy, 1), dx = float_rows(m, d, ldx, 1);
    struct buffer start = float_rows(m, d, ldx, 1);

    memcpy(dx.data, start.data, start.count * 4);
    ops->rmsnorm(pool, m, d, x.data, ldx, w.data, EPS, y.data, ldy, rstd.data);
    ops->rmsnorm_bwd(pool, m, d, x.data, ldx, w.data, rstd.data, dy.data, ldy, dx.data, ldx);
    for (int i = 0; i < m; i++) {
        double row[1000], weight[1000], r = 0, mean = 0, magnitude = 0;

        for (int k = 0; k < d; k++) {
            row[k] = act_get(ops, x.data, (size_t)i * ldx + k), weight[k] = get(&w, (size_t)k);
            mean += get(&dy, (size_t)i * ldy + k) * weight[k] * row[k] / d;
            magnitude += fabs(get(&dy, (size_t)i * ldy + k) * weight[k] * row[k] / d);
        }
        for (int k = 0; k < d; k++) {
            const double want = rms_double(row, weight, d, k, &r);
            const double g = get(&dy, (size_t)i * ldy + k) * weight[k];
            const size_t at = (size_t)i * ldx + k;

            check_close(act_get(ops, y.data, (size_t)i * ldy + k), want,
                        ((d + 8) * HALF_ULP_F32 + 1.01 * act_rounding(ops)) * fabs(want),
                        "%s rmsnorm m=%d d=%d", ops->name, m, d);
            check_close(
                get(&dx, at), get(&start, at) + r * (g - row[k] * r * r * mean),
                (2 * d + 12) * HALF_ULP_F32 *
                    (fabs(get(&start, at)) + r * (fabs(g) + fabs(row[k]) * r * r * magnitude)),
                "%s rmsnorm_bwd m=%d d=%d", ops->name, m, d);
        }
        check_close(get(&rstd, (size_t)i), r, (d + 8) * HALF_ULP_F32 * r, "%s rstd", ops->name);
    }
    check_gaps(&y, m, d, ldy, "rmsnorm"), check_gaps(&dx, m, d, ldx, "rmsnorm_bwd");
    buffer_free(&x, "x"), buffer_free(&w, "w"), buffer_free(&y, "y"), buffer_free(&rstd, "rstd");
    buffer_free(&dy, "dy"), buffer_free(&dx, "dx"), buffer_free(&start, "start");
}

static void test_rmsnorm(void **state)
{
    claas_pool_t *pool = pool_of(2);

    FOR_EACH_TABLE(ops)
    for (size_t m = 0; m < sizeof(heights) / sizeof(heights[0]); m++)
        for (size_t d = 0; d < sizeof(widths) / sizeof(widths[0]); d++)
            check_rmsnorm(ops, pool, heights[m], widths[d]);
    claas_pool_free(&pool);
}

/* --- head norm and rotary embedding
 * --------------------------------------------------------------------------- */

/* One head in double: optional norm, then rotation. */
static void rope_double(const double *x, const double *w, const float *cs, int d, double *out)
{
    double y[512], rstd = 1;

    for (int k = 0; k < d; k++)
        y[k] = w ? rms_double(x, w, d, k, &rstd) : x[k];
    for (int k = 0; k < d / 2; k++) {
        out[k] = y[k] * cs[2 * k] - y[k + d / 2] * cs[2 * k + 1];
        out[k + d / 2] = y[k + d / 2] * cs[2 * k] + y[k] * cs[2 * k + 1];
    }
}

static void check_norm_rope(const struct claas_ops *ops, claas_pool_t *pool, int m, int heads,
                            int d, bool norm)
{
    const int ldx = heads * d + 5, context = 40;
    struct buffer raw = act_rows(ops, m, heads * d, ldx, 1), w = float_rows(1, d, d, 1);
    struct buffer x = buffer_new(raw.count, raw.size), cs = buffer_new((size_t)context * d, 4);
    struct buffer rstd = buffer_new((size_t)m * heads, 4), dx = float_rows(m, heads * d, ldx, 1);
    struct buffer dy = buffer_new(dx.count, 4);
    int32_t pos[32];

    memcpy(x.data, raw.data, raw.count * raw.size);
    memcpy(dy.data, dx.data, dx.count * 4);
    for (int i = 0; i < m; i++)
        pos[i] = (int32_t)(check_bits() % context);
    for (int i = 0; i < context * d / 2; i++) {
        ((float *)cs.data)[2 * i] = cosf((float)i * 0.7f);
        ((float *)cs.data)[2 * i + 1] = sinf((float)i * 0.7f);
    }
    ops->norm_rope(pool, m, heads, d, x.data, ldx, norm ? w.data : NULL, EPS,
                   norm ? rstd.data : NULL, cs.data, pos);
    ops->norm_rope_bwd(pool, m, heads, d, dx.data, ldx, raw.data, ldx, norm ? w.data : NULL,
                       norm ? rstd.data : NULL, cs.data, pos);
    for (int i = 0; i < m; i++)
        for (int h = 0; h < heads; h++) {
            const size_t at = (size_t)i * ldx + (size_t)h * d;
            const float *angles = (float *)cs.data + (size_t)pos[i] * d;
            double in[512], weight[512], out[512], up[512], down[512];

            for (int k = 0; k < d; k++)
                in[k] = act_get(ops, raw.data, at + k), weight[k] = get(&w, (size_t)k);
            rope_double(in, norm ? weight : NULL, angles, d, out);
            for (int k = 0; k < d; k++)
                check_close(act_get(ops, x.data, at + k), out[k],
                            act_rounding(ops) * fabs(out[k]) * 1.01 + (d + 8) * HALF_ULP_F32 * 12,
                            "%s norm_rope d=%d norm %d", ops->name, d, norm);
            for (int k = 0; k < d; k++) { /* d(sum of dy out) / d in[k] */
                const double saved = in[k], h_ = 1e-5;
                double slope = 0;

                in[k] = saved + h_, rope_double(in, norm ? weight : NULL, angles, d, up);
                in[k] = saved - h_, rope_double(in, norm ? weight : NULL, angles, d, down);
                in[k] = saved;
                for (int j = 0; j < d; j++)
                    slope += get(&dy, at + j) * (up[j] - down[j]) / (2 * h_);
                check_close(get(&dx, at + k), slope, 1e-7 + (d + 8) * HALF_ULP_F32 * 16,
                            "%s norm_rope_bwd d=%d norm %d", ops->name, d, norm);
            }
        }
    check_gaps(&x, m, heads * d, ldx, "norm_rope"), check_gaps(&dx, m, heads * d, ldx, "bwd");
    buffer_free(&raw, "raw"), buffer_free(&w, "w"), buffer_free(&x, "x"), buffer_free(&cs, "cs");
    buffer_free(&rstd, "rstd"), buffer_free(&dx, "dx"), buffer_free(&dy, "dy");
}

static void test_norm_rope(void **state)
{
    claas_pool_t *pool = pool_of(2);

    FOR_EACH_TABLE(ops)
    for (int norm = 0; norm < 2; norm++) {
        check_norm_rope(ops, pool, 0, 3, 16, norm);
        check_norm_rope(ops, pool, 1, 1, 16, norm);
        check_norm_rope(ops, pool, 9, 3, 64, norm);
        check_norm_rope(ops, pool, 17, 2, 48, norm);
        check_norm_rope(ops, pool, 2, 2, 128, norm);
    }
    claas_pool_free(&pool);
}

/* --- SwiGLU
 * ----------------------------------------------------------------------------------------------------
 */

static double silu(double x)
{
    return x / (1 + exp(-x));
}

static void check_swiglu(const struct claas_ops *ops, claas_pool_t *pool, int m, int n, float scale)
{
    const int ldx = 2 * n + 3, ldh = n + 2;
    struct buffer x = act_rows(ops, m, 2 * n, ldx, scale), dh = float_rows(m, n, ldh, 1);
    struct buffer h = buffer_new((size_t)m * ldh, ops->act_bytes);
    struct buffer again = buffer_new((size_t)m * ldh, ops->act_bytes);
    struct buffer dx = buffer_new((size_t)m * ldx, ops->act_bytes);

    ops->swiglu(pool, m, n, x.data, ldx, h.data, ldh);
    ops->swiglu_bwd(pool, m, n, x.data, ldx, dh.data, ldh, dx.data, ldx, again.data, ldh);
    assert_memory_equal(h.data, again.data, h.count * h.size);
    for (int i = 0; i < m; i++)
        for (int k = 0; k < n; k++) {
            const double gate = act_get(ops, x.data, (size_t)i * ldx + k),
                         g = get(&dh, (size_t)i * ldh + k);
            const double up = act_get(ops, x.data, (size_t)i * ldx + n + k), step = 1e-5;
            const double slope = (silu(gate + step) - silu(gate - step)) / (2 * step);
            const double rounding = 1.01 * act_rounding(ops), tiny = 1e-35;

            check_close(act_get(ops, h.data, (size_t)i * ldh + k), silu(gate) * up,
                        (16 * HALF_ULP_F32 + rounding) * fabs(silu(gate) * up) + tiny,
                        "%s swiglu n=%d gate %g", ops->name, n, gate);
            check_close(act_get(ops, dx.data, (size_t)i * ldx + k), g * up * slope,
                        rounding * fabs(g * up * slope) +
                            (16 * HALF_ULP_F32 + 1e-9) * fabs(g * up) * (1 + fabs(gate)),
                        "%s swiglu_bwd gate n=%d gate %g", ops->name, n, gate);
            check_close(act_get(ops, dx.data, (size_t)i * ldx + n + k), g * silu(gate),
                        (16 * HALF_ULP_F32 + rounding) * fabs(g * silu(gate)) + tiny,
                        "%s swiglu_bwd up n=%d gate %g", ops->name, n, gate);
        }
    check_gaps(&h, m, n, ldh, "swiglu"), check_gaps(&dx, m, 2 * n, ldx, "swiglu_bwd");
    ops->swiglu_bwd(pool, m, n, x.data, ldx, dh.data, ldh, x.data, ldx, NULL, 0); /* in place */
    assert_memory_equal(x.data, dx.data, x.count * x.size);
    buffer_free(&x, "x"), buffer_free(&dh, "dh"), buffer_free(&h, "h"), buffer_free(&dx, "dx");
    buffer_free(&again, "h");
}

static void test_swiglu(void **state)
{
    claas_pool_t *pool = pool_of(2);

    FOR_EACH_TABLE(ops)
    for (size_t m = 0; m < sizeof(heights) / sizeof(heights[0]); m++)
        for (size_t d = 0; d < sizeof(widths) / sizeof(widths[0]); d++)
            check_swiglu(ops, pool, heights[m], widths[d], d % 3 == 2 ? 30 : 3);
    claas_pool_free(&pool);
}

/* What is not finite stays not finite: a broken update must be visible in the loss. */
static void test_nan_is_kept(void **state)
{
    claas_pool_t *pool = pool_of(1);

    FOR_EACH_TABLE(ops)
    {
        struct buffer x = act_rows(ops, 1, 64, 64, 1), w = float_rows(1, 64, 64, 1);
        struct buffer y = buffer_new(64, ops->act_bytes);

        act_put(ops, x.data, 5, NAN);
        memset(y.data, 0, 64 * ops->act_bytes);
        ops->rmsnorm(pool, 1, 64, x.data, 64, w.data, EPS, y.data, 64, NULL);
        for (int k = 0; k < 64; k++)
            assert_true(isnan(act_get(ops, y.data, (size_t)k)));
        ops->swiglu(pool, 1, 32, x.data, 64, y.data, 64);
        assert_true(isnan(act_get(ops, y.data, 5)));
        assert_false(isnan(act_get(ops, y.data, 6)));
        buffer_free(&x, "x"), buffer_free(&w, "w"), buffer_free(&y, "y");
    }
    claas_pool_free(&pool);
}

/* --- conversions
 * -----------------------------------------------------------------------------------------------
 */

static void test_conversions(void **state)
{
    static const float special[] = {0,       -0.0f,       INFINITY,    -INFINITY, 1e-40f, -3e-39f,
                                    3.4e38f, 1.00390625f, 1.01171875f, 65535.5f,  NAN};

    FOR_EACH_TABLE(ops)
    for (size_t count = 0; count < 70; count += 1 + count / 8) {
        struct buffer in = float_rows(1, (int)count, (int)count, 3);
        struct buffer out = buffer_new(count, ops->act_bytes), back = buffer_new(count, 4);

        for (size_t i = 0; i < count && i < sizeof(special) / sizeof(special[0]); i++)
            ((float *)in.data)[i] = special[i];
        ops->to_act(in.data, out.data, count);
        ops->to_float(out.data, back.data, count);
        for (size_t i = 0; i < count; i++) {
            const float want = ops->precision == CLAAS_PRECISION_F32
                                   ? ((float *)in.data)[i]
                                   : claas_from_bf16(claas_to_bf16(((float *)in.data)[i]));

            assert_memory_equal(&want, (float *)back.data + i, 4);
        }
        buffer_free(&in, "in"), buffer_free(&out, "out"), buffer_free(&back, "back");
    }
}

/* --- optimizer
 * ---------------------------------------------------------------------------------------------------
 */

static void check_adamw(const struct claas_ops *ops, claas_pool_t *pool, size_t count)
{
    struct buffer p = float_rows(1, (int)count, (int)count, 1),
                  m = float_rows(1, (int)count, (int)count, 0);
    struct buffer v = float_rows(1, (int)count, (int)count, 0),
                  g = float_rows(1, (int)count, (int)count, 1);
    double *want = malloc((3 * count + 1) * sizeof(double));
    struct claas_adamw_args args = {.count = count,
                                    .parameters = p.data,
                                    .exp_avg = m.data,
                                    .exp_avg_sq = v.data,
                                    .grad = g.data,
                                    .grad_scale = 0.5f,
                                    .rate = 1e-3f,
                                    .beta1 = 0.9f,
                                    .beta2 = 0.999f,
                                    .eps = 1e-8f,
                                    .weight_decay = 0.01f};

    assert_non_null(want);
    for (size_t i = 0; i < count; i++)
        want[3 * i] = get(&p, i), want[3 * i + 1] = want[3 * i + 2] = 0;
    for (int64_t step = 1; step <= 3; step++) {
        const double b1 = 0.9f, b2 = 0.999f, rate = 1e-3f;

        args.step = step;
        ops->adamw(pool, &args);
        for (size_t i = 0; i < count; i++) {
            const double grad = 0.5 * get(&g, i);

            want[3 * i] *= 1 - rate * (double)0.01f;
            want[3 * i + 1] = b1 * want[3 * i + 1] + (1 - b1) * grad;
            want[3 * i + 2] = b2 * want[3 * i + 2] + (1 - b2) * grad * grad;
            want[3 * i] -= rate / (1 - pow(b1, (double)step)) * want[3 * i + 1] /
                           (sqrt(want[3 * i + 2] / (1 - pow(b2, (double)step))) + (double)1e-8f);
        }
    }
    for (size_t i = 0; i < count; i++) { /* 1 - beta2 in float32 has 14 bits less: 2^-24/0.001 */
        check_close(get(&p, i), want[3 * i], 12 * HALF_ULP_F32 * fabs(want[3 * i]) + 3e-3 * 1e-4,
                    "%s adamw", ops->name);
        check_close(get(&m, i), want[3 * i + 1], 1e-6 * fabs(want[3 * i + 1]), "%s exp_avg",
                    ops->name);
        check_close(get(&v, i), want[3 * i + 2], 1e-4 * want[3 * i + 2], "%s exp_avg_sq",
                    ops->name);
    }
    free(want);
    buffer_free(&p, "p"), buffer_free(&m, "m"), buffer_free(&v, "v"), buffer_free(&g, "g");
}

static void test_optimizer(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};
    static const size_t counts[] = {0, 1, 15, 16, 17, 1000, 8193, 20000};

    FOR_EACH_TABLE(ops)
    for (size_t c = 0; c < sizeof(counts) / sizeof(counts[0]); c++) {
        struct buffer x = float_rows(1, (int)counts[c], (int)counts[c], 3);
        double want = 0, got = ops->sum_squares(pools[0], x.data, counts[c]);

        for (size_t i = 0; i < counts[c]; i++)
            want += get(&x, i) * get(&x, i);
        check_close(got, want, 1e-12 * want, "%s sum_squares %zu", ops->name, counts[c]);
        assert_true(got == ops->sum_squares(pools[1], x.data, counts[c]));
        buffer_free(&x, "x");
        check_adamw(ops, pools[1], counts[c]);
    }
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversions), cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_norm_rope),   cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_nan_is_kept), cmocka_unit_test(test_optimizer),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
