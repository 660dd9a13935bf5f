/* The matrix products of every operation table against sums in double, and the rule that a row's
 * result does not depend on its company: bit for bit the same alone, among 3 or 129 rows, with one
 * thread or two.
 *
 * Tolerance: a sum of t products in float32 is off by at most about t half-ulps of the sum of
 * magnitudes; the result is then rounded once to an act. */
#include "check.h"

struct shape {
    int m, n, k, r;
};
static const struct shape shapes[] = {
    {0, 16, 16, 0},    {1, 1, 1, 0},      {1, 16, 2, 1},     {1, 33, 31, 8},    {2, 48, 64, 3},
    {3, 15, 33, 16},   {5, 17, 16, 0},    {8, 64, 96, 16},   {9, 31, 47, 5},    {13, 32, 80, 0},
    {14, 96, 64, 32},  {15, 65, 100, 7},  {16, 130, 64, 0},  {29, 100, 129, 9}, {57, 16, 576, 0},
    {128, 48, 66, 16}, {129, 80, 50, 33}, {300, 24, 40, 12},
};

static double dot(const struct claas_ops *ops, const void *x, size_t at, const float *w, int k,
                  double *magnitude)
{
    double sum = 0;

    for (int i = 0; i < k; i++) {
        sum += (double)act_get(ops, x, at + i) * w[i];
        *magnitude += fabs((double)act_get(ops, x, at + i) * w[i]);
    }
    return sum;
}

/* Bits of `features`: which parts of the operation are used. */
enum { WITH_LORA = 1, WITH_BIAS = 2, WITH_RESIDUAL = 4, TO_FLOAT = 8, ACCUMULATE = 16 };

static void check_gemm(const struct claas_ops *ops, claas_pool_t *pool, const struct shape *s,
                       int features)
{
    const int ldx = s->k + 3, ldo = s->n + 5, lds = s->r + 1, r = features & WITH_LORA ? s->r : 0;
    float *w = weights_new(ops, s->n, s->k), *b = weights_new(ops, s->n, r);
    struct buffer x = act_rows(ops, s->m, s->k, ldx, 1), lora = act_rows(ops, s->m, r, lds, 1);
    struct buffer pw = panels_of(ops, w, s->n, s->k), pb = panels_of(ops, b, s->n, r);
    struct buffer residual = act_rows(ops, s->m, s->n, ldo, 2), bias = float_rows(1, s->n, s->n, 1);
    struct buffer out = buffer_new((size_t)s->m * ldo, features & TO_FLOAT ? 4 : ops->act_bytes);
    struct buffer start = float_rows(s->m, s->n, ldo, 3);
    struct claas_gemm_args args = {
        .m = s->m, .n = s->n, .k = s->k, .x = x.data, .ldx = ldx, .w = pw.data, .ldo = ldo};

    if (r)
        args.lora_s = lora.data, args.lds = lds, args.lora_b = pb.data, args.r = r;
    if (features & WITH_BIAS)
        args.bias = bias.data;
    if (features & WITH_RESIDUAL)
        args.residual = residual.data;
    if (features & TO_FLOAT)
        args.out32 = out.data;
    else
        args.out = out.data;
    if (features & ACCUMULATE) {
        memcpy(out.data, start.data, out.count * sizeof(float));
        args.accumulate = true;
    }
    ops->gemm(pool, &args);
    for (int i = 0; i < s->m; i++)
        for (int j = 0; j < s->n; j++) {
            const size_t at = (size_t)i * ldo + j;
            double sum = 0, magnitude = 0, got = 0;

            sum += dot(ops, x.data, (size_t)i * ldx, w + (size_t)j * s->k, s->k, &magnitude);
            sum += dot(ops, lora.data, (size_t)i * lds, b + (size_t)j * r, r, &magnitude);
            if (features & WITH_BIAS)
                sum += ((float *)bias.data)[j], magnitude += fabs(((float *)bias.data)[j]);
            if (features & WITH_RESIDUAL)
                sum += act_get(ops, residual.data, at),
                    magnitude += fabs(act_get(ops, residual.data, at));
            if (features & ACCUMULATE)
                sum += ((float *)start.data)[at], magnitude += fabs(((float *)start.data)[at]);
            got = features & TO_FLOAT ? ((float *)out.data)[at] : act_get(ops, out.data, at);
            check_close(got, sum,
                        (s->k + r + 3) * HALF_ULP_F32 * magnitude +
                            (features & TO_FLOAT ? 0 : 1.01 * act_rounding(ops) * fabs(sum)),
                        "%s gemm m=%d n=%d k=%d r=%d features %d at (%d, %d)", ops->name, s->m,
                        s->n, s->k, r, features, i, j);
        }
    check_gaps(&out, s->m, s->n, ldo, ops->name);
    buffer_free(&out, ops->name);
    buffer_free(&x, "x"), buffer_free(&lora, "s"), buffer_free(&pw, "w"), buffer_free(&pb, "b");
    buffer_free(&residual, "residual"), buffer_free(&bias, "bias"), buffer_free(&start, "start");
    free(w), free(b);
}

static void test_gemm(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};
    static const int features[] = {0,
                                   WITH_LORA,
                                   WITH_LORA | WITH_RESIDUAL,
                                   WITH_BIAS | TO_FLOAT,
                                   WITH_LORA | WITH_BIAS | WITH_RESIDUAL,
                                   TO_FLOAT,
                                   TO_FLOAT | ACCUMULATE | WITH_LORA};

    FOR_EACH_TABLE(ops)
    for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
        for (size_t f = 0; f < sizeof(features) / sizeof(features[0]); f++) {
            if ((features[f] & ACCUMULATE) && !shapes[s].m)
                continue;
            check_gemm(ops, pools[f & 1], &shapes[s], features[f]);
        }
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

/* Rows exactly a multiple of a page apart, which the tiles read from a copy. */
static void test_gemm_aliased_rows(void **state)
{
    enum { M = 17, N = 40, K = 70, LD = 2048 };
    claas_pool_t *pool = pool_of(2);

    FOR_EACH_TABLE(ops)
    {
        float *w = weights_new(ops, N, K);
        struct buffer x = act_rows(ops, M, K, LD, 1), y = buffer_new(M * K, ops->act_bytes);
        struct buffer pw = panels_of(ops, w, N, K);
        struct buffer far = buffer_new(M * N, 4), near = buffer_new(M * N, 4);
        struct claas_gemm_args args = {.m = M,
                                       .n = N,
                                       .k = K,
                                       .x = x.data,
                                       .ldx = LD,
                                       .w = pw.data,
                                       .out32 = far.data,
                                       .ldo = N};

        for (int i = 0; i < M; i++)
            memcpy(act_at(ops, y.data, (size_t)i * K), act_at(ops, x.data, (size_t)i * LD),
                   K * ops->act_bytes);
        ops->gemm(pool, &args);
        args.x = y.data, args.ldx = K, args.out32 = near.data;
        ops->gemm(pool, &args);
        assert_memory_equal(far.data, near.data, M * N * 4);
        buffer_free(&x, "x"), buffer_free(&y, "x"), buffer_free(&pw, "w");
        buffer_free(&far, "out"), buffer_free(&near, "out");
        free(w);
    }
    claas_pool_free(&pool);
}

/* A matrix wider than a part's panels, and one with more columns than a widened tile fits in
 * scratch memory. */
static void test_gemm_large(void **state)
{
    claas_pool_t *pool = pool_of(3);
    static const struct shape large[] = {{3, 2000, 64, 0}, {20, 17, 30001, 4}, {40, 1040, 96, 8}};

    FOR_EACH_TABLE(ops)
    for (size_t s = 0; s < sizeof(large) / sizeof(large[0]); s++)
        check_gemm(ops, pool, &large[s], WITH_LORA);
    claas_pool_free(&pool);
}

static void check_dx(const struct claas_ops *ops, claas_pool_t *pool, const struct shape *s,
                     bool accumulate)
{
    const int ldy = s->n + 3, ldx = s->k + 2;
    float *w = weights_new(ops, s->n, s->k);
    struct buffer dy = act_rows(ops, s->m, s->n, ldy, 1), pw = panels_of(ops, w, s->n, s->k);
    struct buffer dx = buffer_new((size_t)s->m * ldx, 4), start = float_rows(s->m, s->k, ldx, 3);
    struct claas_gemm_dx_args args = {.m = s->m,
                                      .n = s->n,
                                      .k = s->k,
                                      .dy = dy.data,
                                      .ldy = ldy,
                                      .w = pw.data,
                                      .dx = dx.data,
                                      .ldx = ldx,
                                      .accumulate = accumulate};

    if (accumulate)
        memcpy(dx.data, start.data, dx.count * sizeof(float));
    ops->gemm_dx(pool, &args);
    for (int i = 0; i < s->m; i++)
        for (int k = 0; k < s->k; k++) {
            double sum = 0, magnitude = 0;

            if (accumulate)
                sum = ((float *)start.data)[(size_t)i * ldx + k], magnitude = fabs(sum);
            for (int n = 0; n < s->n; n++) {
                const double term =
                    (double)act_get(ops, dy.data, (size_t)i * ldy + n) * w[(size_t)n * s->k + k];

                sum += term, magnitude += fabs(term);
            }
            check_close(((float *)dx.data)[(size_t)i * ldx + k], sum,
                        (s->n + 1) * HALF_ULP_F32 * magnitude,
                        "%s gemm_dx m=%d n=%d k=%d at (%d, %d)", ops->name, s->m, s->n, s->k, i, k);
        }
    check_gaps(&dx, s->m, s->k, ldx, ops->name);
    buffer_free(&dx, ops->name), buffer_free(&dy, "dy"), buffer_free(&pw, "w");
    buffer_free(&start, "start");
    free(w);
}

static void test_gemm_dx(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};
    static const struct shape more[] = {{70, 1300, 40, 0}, {200, 515, 24, 0}, {3, 1024, 300, 0}};

    FOR_EACH_TABLE(ops)
    {
        for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++)
            for (int accumulate = 0; accumulate < 2; accumulate++)
                check_dx(ops, pools[accumulate], &shapes[s], accumulate);
        for (size_t s = 0; s < sizeof(more) / sizeof(more[0]); s++)
            check_dx(ops, pools[1], &more[s], s & 1);
    }
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

static void check_tn(const struct claas_ops *ops, claas_pool_t *pool, int m, int r, int k,
                     bool accumulate)
{
    const int ldp = r + 1, ldx = k + 3, ldg = k + 2;
    struct buffer p = act_rows(ops, m, r, ldp, 1), x = act_rows(ops, m, k, ldx, 1);
    struct buffer g = buffer_new((size_t)r * ldg, 4), start = float_rows(r, k, ldg, 3);
    struct claas_gemm_tn_args args = {.m = m,
                                      .r = r,
                                      .k = k,
                                      .p = p.data,
                                      .ldp = ldp,
                                      .x = x.data,
                                      .ldx = ldx,
                                      .g = g.data,
                                      .ldg = ldg,
                                      .scale = 0.75f,
                                      .accumulate = accumulate};

    if (accumulate)
        memcpy(g.data, start.data, g.count * sizeof(float));
    ops->gemm_tn(pool, &args);
    for (int a = 0; a < r; a++)
        for (int b = 0; b < k; b++) {
            double sum = 0, magnitude = 0, begin = 0;

            for (int i = 0; i < m; i++) {
                const double term = (double)act_get(ops, p.data, (size_t)i * ldp + a) *
                                    act_get(ops, x.data, (size_t)i * ldx + b);

                sum += term, magnitude += fabs(term);
            }
            begin = accumulate ? ((float *)start.data)[(size_t)a * ldg + b] : 0;
            check_close(((float *)g.data)[(size_t)a * ldg + b], begin + 0.75 * sum,
                        (m + 3) * HALF_ULP_F32 * (magnitude + fabs(begin)),
                        "%s gemm_tn m=%d r=%d k=%d at (%d, %d)", ops->name, m, r, k, a, b);
        }
    check_gaps(&g, r, k, ldg, ops->name);
    buffer_free(&g, ops->name), buffer_free(&p, "p"), buffer_free(&x, "x");
    buffer_free(&start, "start");
}

static void test_gemm_tn(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};
    static const int sizes[][3] = {{0, 4, 20},    {1, 1, 1},     {2, 3, 16},    {3, 16, 17},
                                   {16, 8, 64},   {31, 15, 33},  {128, 16, 80}, {255, 5, 31},
                                   {257, 33, 66}, {600, 8, 100}, {5, 300, 20}};

    FOR_EACH_TABLE(ops)
    for (size_t s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
        for (int accumulate = 0; accumulate < 2; accumulate++)
            check_tn(ops, pools[accumulate], sizes[s][0], sizes[s][1], sizes[s][2], accumulate);
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

/* Rows 0, 63 and 128 computed among 129, among 3 and alone; one thread and two. */
static void test_rows_do_not_depend_on_company(void **state)
{
    enum { M = 129, N = 83, K = 151, R = 11 };
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};
    static const int some[3] = {0, 63, 128};

    FOR_EACH_TABLE(ops)
    {
        float *w = weights_new(ops, N, K), *b = weights_new(ops, N, R);
        struct buffer x = act_rows(ops, M, K, K, 1), s = act_rows(ops, M, R, R, 1);
        struct buffer pw = panels_of(ops, w, N, K), pb = panels_of(ops, b, N, R);
        struct buffer all = buffer_new(M * N, 4), few = buffer_new(M * N, 4);
        struct buffer dx = buffer_new(M * K, 4), few_dx = buffer_new(M * K, 4);
        struct claas_gemm_args args = {.m = M,
                                       .n = N,
                                       .k = K,
                                       .x = x.data,
                                       .ldx = K,
                                       .w = pw.data,
                                       .lora_s = s.data,
                                       .lds = R,
                                       .lora_b = pb.data,
                                       .r = R,
                                       .out32 = all.data,
                                       .ldo = N};
        struct buffer dy = act_rows(ops, M, N, N, 1);
        struct claas_gemm_dx_args back = {
            .m = M, .n = N, .k = K, .dy = dy.data, .ldy = N, .w = pw.data, .dx = dx.data, .ldx = K};

        ops->gemm(pools[0], &args);
        ops->gemm_dx(pools[0], &back);
        args.out32 = few.data, back.dx = few_dx.data;
        ops->gemm(pools[1], &args);
        ops->gemm_dx(pools[1], &back);
        assert_memory_equal(all.data, few.data, M * N * 4);
        assert_memory_equal(dx.data, few_dx.data, M * K * 4);
        for (int rows = 1; rows <= 3; rows += 2)
            for (int i = 0; i < 3; i++) {
                const int first = some[i] < M - rows ? some[i] : M - rows;

                args.m = back.m = rows;
                args.x = act_at(ops, x.data, (size_t)first * K);
                args.lora_s = act_at(ops, s.data, (size_t)first * R);
                back.dy = act_at(ops, dy.data, (size_t)first * N);
                ops->gemm(pools[1], &args);
                ops->gemm_dx(pools[1], &back);
                assert_memory_equal((float *)all.data + first * N, few.data, (size_t)rows * N * 4);
                assert_memory_equal((float *)dx.data + first * K, few_dx.data,
                                    (size_t)rows * K * 4);
            }
        buffer_free(&x, "x"), buffer_free(&s, "s"), buffer_free(&pw, "w"), buffer_free(&pb, "b");
        buffer_free(&all, "out"), buffer_free(&few, "out"), buffer_free(&dy, "dy");
        buffer_free(&dx, "dx"), buffer_free(&few_dx, "dx");
        free(w), free(b);
    }
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

static void test_panels(void **state)
{
    enum { N = 21, K = 37 };

    FOR_EACH_TABLE(ops)
    {
        float *w = weights_new(ops, N, K);
        struct buffer panels = panels_of(ops, w, N, K), row = buffer_new(K, ops->act_bytes);
        float nonzero = 0;

        for (int n = 0; n < N; n++) {
            ops->unpack_row(panels.data, K, n, row.data);
            for (int k = 0; k < K; k++)
                assert_true(act_get(ops, row.data, k) == w[n * K + k]);
        }
        for (size_t i = 0; i < panels.count / ops->act_bytes; i++)
            nonzero += act_get(ops, panels.data, i) != 0;
        assert_true(nonzero <= N * K); /* whatever is not a weight is zero, not NaN */
        buffer_free(&row, "row"), buffer_free(&panels, "panels");
        free(w);
    }
}

/* The environment can only ask for something slower; what it does not know it ignores. */
static void test_pick(void **state)
{
    static const char *const names[] = {"ref", "avx2", "avx512", "avx512bf16", "amx", "nonsense"};

    for (int precision = 0; precision < 2; precision++) {
        const struct claas_ops *best = NULL;
        int count = 0;

        assert_int_equal(unsetenv("CLAAS_CPU"), 0);
        best = claas_ops_pick((enum claas_precision)precision);
        while (claas_ops_at((enum claas_precision)precision, count))
            count++;
        assert_ptr_equal(best, claas_ops_at((enum claas_precision)precision, count - 1));
        assert_non_null(strstr(claas_ops_at((enum claas_precision)precision, 0)->name, "-ref"));
        for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
            const struct claas_ops *ops = NULL;

            assert_int_equal(setenv("CLAAS_CPU", names[i], 1), 0);
            ops = claas_ops_pick((enum claas_precision)precision);
            assert_int_equal(ops->precision, precision);
            if (i < 2 && count > 1)
                assert_non_null(strstr(ops->name, names[i]));
            if (i == 5)
                assert_ptr_equal(ops, best);
        }
        assert_int_equal(unsetenv("CLAAS_CPU"), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pick),       cmocka_unit_test(test_panels),
        cmocka_unit_test(test_gemm),       cmocka_unit_test(test_gemm_aliased_rows),
        cmocka_unit_test(test_gemm_large), cmocka_unit_test(test_gemm_dx),
        cmocka_unit_test(test_gemm_tn),    cmocka_unit_test(test_rows_do_not_depend_on_company),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
