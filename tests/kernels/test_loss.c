/* The SDPO loss against: the golden values (golden/sdpo_golden.json), an obvious reference in
 * doubles, central differences of that reference, degenerate rows, and its own row loops on every
 * instruction set. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/loss.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "sdpo/rows.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define V_MAX 1000

static const char *golden_dir = ".";
static const char *const variant_names[] = {"full", "student_topk_tail", "teacher_topk"};

/* NaN-proof; relative for large values, because the results are floats. */
static void check_near(double value, double wanted, double tolerance, const char *what)
{
    double scale = fabs(wanted) > 1 ? fabs(wanted) : 1;

    if (!(fabs(value - wanted) <= tolerance * scale))
        fail_msg("%s: %.9g, wanted %.9g", what, value, wanted);
}

/* --- the reference ---------------------------------------------------------------------------- */

static void reference_log_softmax(const double *z, int n, double *ret)
{
    double max = -INFINITY;
    double sum = 0;

    for (int i = 0; i < n; i++)
        max = z[i] > max ? z[i] : max;
    for (int i = 0; i < n; i++)
        sum += exp(z[i] - max);
    for (int i = 0; i < n; i++)
        ret[i] = z[i] - max - log(sum);
}

static double kl(double log_a, double log_b)
{
    return exp(log_a) > 0 ? exp(log_a) * (log_a - log_b) : 0;
}

static double reference_buckets(const double *s, const double *t, int n, double alpha,
                                bool mixture_only)
{
    double sum = 0;

    for (int i = 0; i < n; i++) {
        double m = log((1 - alpha) * exp(s[i]) + alpha * exp(t[i]));

        if (alpha == 0 && !mixture_only)
            sum += kl(t[i], s[i]);
        else if (alpha == 1 && !mixture_only)
            sum += kl(s[i], t[i]);
        else
            sum += (1 - alpha) * kl(s[i], m) + alpha * kl(t[i], m);
    }
    return sum;
}

/* What is constant under differentiation: fixed at the row's own logits. */
struct frozen {
    int ids[V_MAX];
    int count;
    double coefficient; /* of the token form */
    double ratio;
};

static void reference_top(const double *values, int n, struct frozen *frozen, int count)
{
    bool taken[V_MAX] = {false};

    frozen->count = count < n ? count : n;
    for (int k = 0; k < frozen->count; k++) {
        int best = -1;

        for (int i = 0; i < n; i++)
            if (!taken[i] && (best < 0 || values[i] > values[best]))
                best = i;
        taken[best] = true;
        frozen->ids[k] = best;
    }
}

static double log_sum(const double *logs, const struct frozen *frozen)
{
    double sum = 0;

    for (int k = 0; k < frozen->count; k++)
        sum += exp(logs[frozen->ids[k]]);
    return log(sum);
}

/* The same as log(1 - top mass), without its cancellation, which differences would magnify. */
static double log_tail(const double *logs, int n, const struct frozen *frozen)
{
    bool inside[V_MAX] = {false};
    double sum = 0;

    for (int k = 0; k < frozen->count; k++)
        inside[frozen->ids[k]] = true;
    for (int i = 0; i < n; i++)
        sum += inside[i] ? 0 : exp(logs[i]);
    return log(fmax(sum, -expm1(-1e-7)));
}

static double reference_divergence(const struct claas_loss_config *config, int n, const double *s,
                                   const double *t, int token, const struct frozen *frozen)
{
    double fs[V_MAX + 1], ft[V_MAX + 1];
    int count = frozen->count;
    double norm_s = 0, norm_t = 0;

    if (config->variant == CLAAS_LOSS_FULL ||
        (config->variant == CLAAS_LOSS_STUDENT_TOPK_TAIL && count == n))
        return reference_buckets(s, t, n, config->alpha, false);
    if (config->variant == CLAAS_LOSS_TEACHER_TOPK && config->alpha == 1)
        return frozen->coefficient * s[token];
    if (config->variant == CLAAS_LOSS_TEACHER_TOPK) {
        norm_s = fmax(log_sum(s, frozen), log(1e-8));
        norm_t = fmax(log_sum(t, frozen), log(1e-8));
    }
    for (int k = 0; k < count; k++) {
        fs[k] = s[frozen->ids[k]] - norm_s;
        ft[k] = t[frozen->ids[k]] - norm_t;
    }
    if (config->variant == CLAAS_LOSS_TEACHER_TOPK)
        return reference_buckets(fs, ft, count, config->alpha, true);
    fs[count] = log_tail(s, n, frozen);
    ft[count] = log_tail(t, n, frozen);
    return reference_buckets(fs, ft, count + 1, config->alpha, false);
}

static double clamp20(double x)
{
    return x > 20 ? 20 : x < -20 ? -20 : x;
}

static double reference_k3(const struct claas_loss_config *config, double logprob, double base)
{
    double x = clamp20(config->reference_k3 ? logprob - base : base - logprob);

    return exp(x) - 1 - x;
}

static double reference_loss(const struct claas_loss_config *config, int n, const double *z,
                             const double *t, const struct claas_loss_row *row,
                             const struct frozen *frozen)
{
    double s[V_MAX];
    double loss;

    reference_log_softmax(z, n, s);
    loss = frozen->ratio * reference_divergence(config, n, s, t, row->token, frozen);
    if (config->kl_weight > 0)
        loss += (double)config->kl_weight *
                reference_k3(config, s[row->token], (double)row->base_logprob);
    return loss;
}

static void freeze(const struct claas_loss_config *config, int n, const double *s, const double *t,
                   const struct claas_loss_row *row, struct frozen *frozen)
{
    double tau = -20;

    reference_top(config->variant == CLAAS_LOSS_TEACHER_TOPK ? t : s, n, frozen, config->top_k);
    for (int k = 0; k < frozen->count; k++)
        if (frozen->ids[k] == row->token)
            tau = t[row->token];
    frozen->coefficient = s[row->token] - tau;
    frozen->ratio = 1;
    if (config->is_clip > 0 && !isnan(row->rollout_logprob))
        frozen->ratio = fmin(exp(clamp20(s[row->token] - (double)row->rollout_logprob)),
                             (double)config->is_clip);
}

/* --- one row against the reference ------------------------------------------------------------ */

static int run(const struct claas_loss_config *config, int vocab, const struct claas_loss_row *row,
               float weight, float *grad, struct claas_loss_result *ret)
{
    CLAAS_AUTO_FREE float *scratch =
        claas_alloc_aligned(claas_loss_scratch_floats(vocab) * sizeof(float));
    size_t floats = claas_loss_scratch_floats(vocab);

    /* Stale scratch must not matter. */
    for (size_t i = 0; i < floats; i++)
        scratch[i] = NAN;
    return claas_loss_row(config, vocab, row, weight, grad, scratch, ret);
}

/* Loss and every gradient element; `stride` > 1 checks only some elements by differences. */
static void check_row(const struct claas_loss_config *config, int n,
                      const struct claas_loss_row *row, int stride, const char *what)
{
    double z[V_MAX], zt[V_MAX], s[V_MAX], t[V_MAX];
    float grad[V_MAX], in_place[V_MAX];
    struct claas_loss_result result, again;
    struct claas_loss_row moved = *row;
    struct frozen frozen = {.count = 0};
    const double h = 1e-5;
    const double weight = 0.75;

    for (int i = 0; i < n; i++) {
        z[i] = (double)row->student_logits[i];
        zt[i] = (double)row->teacher_logits[i];
        grad[i] = NAN;
    }
    reference_log_softmax(z, n, s);
    reference_log_softmax(zt, n, t);
    freeze(config, n, s, t, row, &frozen);
    assert_int_equal(run(config, n, row, (float)weight, grad, &result), 0);
    check_near((double)result.divergence,
               reference_divergence(config, n, s, t, row->token, &frozen), 1e-6, what);
    check_near((double)result.loss, reference_loss(config, n, z, t, row, &frozen), 2e-6, what);
    check_near((double)result.logprob, s[row->token], 1e-6, what);
    check_near((double)result.ratio, frozen.ratio, 2e-6, what);
    check_near((double)result.forward_kl, reference_buckets(s, t, n, 0, false), 1e-6, what);
    for (int i = 0; i < n; i += stride) {
        double kept = z[i];
        double up, down;

        z[i] = kept + h;
        up = reference_loss(config, n, z, t, row, &frozen);
        z[i] = kept - h;
        down = reference_loss(config, n, z, t, row, &frozen);
        z[i] = kept;
        check_near((double)grad[i], weight * (up - down) / (2 * h), 2e-6, what);
    }
    /* Without a gradient, and with the gradient written over the logits: the same bits. */
    assert_int_equal(run(config, n, row, 1.0F, NULL, &again), 0);
    assert_memory_equal(&again, &result, sizeof(result));
    memcpy(in_place, row->student_logits, (size_t)n * sizeof(float));
    moved.student_logits = in_place;
    assert_int_equal(run(config, n, &moved, (float)weight, in_place, &again), 0);
    assert_memory_equal(in_place, grad, (size_t)n * sizeof(float));
}

static void fill(float *logits, int n, float spread, uint64_t stream)
{
    for (int i = 0; i < n; i++)
        logits[i] = spread * claas_random_normal(11, stream, (uint64_t)i);
}

/* --- golden ----------------------------------------------------------------------------------- */

static void read_floats(const cJSON *object, const char *key, float *ret, int count)
{
    const cJSON *array = NULL;
    const cJSON *item;
    int i = 0;

    assert_int_equal(claas_json_get_array(object, key, &array), 1);
    assert_int_equal(cJSON_GetArraySize(array), count);
    cJSON_ArrayForEach(item, array) ret[i++] = (float)item->valuedouble;
}

static double read_number(const cJSON *object, const char *key)
{
    double value = NAN;

    assert_int_equal(claas_json_get_number(object, key, -1e9, 1e9, &value), 1);
    return value;
}

static void check_golden_case(const cJSON *item, struct claas_loss_row *row)
{
    struct claas_loss_config config = {.variant = CLAAS_LOSS_FULL};
    struct claas_loss_result result;
    const char *name = NULL;
    const cJSON *array = NULL;
    const cJSON *value;
    float grad[6];
    int i = 0;

    assert_int_equal(claas_json_get_string(item, "variant", &name), 1);
    while (strcmp(variant_names[config.variant], name) != 0)
        config.variant++;
    config.alpha = (float)read_number(item, "alpha");
    config.top_k = (int)read_number(item, "top_k");
    config.is_clip = (float)read_number(item, "is_clip");
    config.kl_weight = (float)read_number(item, "kl_weight");
    assert_int_equal(claas_json_get_bool(item, "reference_k3", &config.reference_k3), 1);
    row->token = (int32_t)read_number(item, "token");
    assert_int_equal(run(&config, 6, row, 1.0F, grad, &result), 0);
    check_near((double)result.divergence, read_number(item, "divergence"), 1e-6, "divergence");
    check_near((double)result.ratio, read_number(item, "ratio"), 1e-6, "ratio");
    check_near((double)result.ratio * (double)result.divergence, read_number(item, "weighted"),
               1e-6, "weighted");
    check_near((double)result.kl_base, read_number(item, "k3"), 1e-6, "k3");
    check_near((double)result.loss, read_number(item, "total"), 1e-6, "total");
    assert_true(result.clipped == ((float)read_number(item, "ratio") >= config.is_clip));
    assert_int_equal(claas_json_get_array(item, "gradient", &array), 1);
    cJSON_ArrayForEach(value, array)
        check_near((double)grad[i++], value->valuedouble, 1e-6, "gradient");
    assert_int_equal(i, 6);
    config.is_clip = 0; /* neither ratio nor KL: the divergence alone */
    config.kl_weight = 0;
    assert_int_equal(run(&config, 6, row, 1.0F, grad, &result), 0);
    assert_int_equal(claas_json_get_array(item, "divergence_gradient", &array), 1);
    i = 0;
    cJSON_ArrayForEach(value, array)
        check_near((double)grad[i++], value->valuedouble, 1e-6, "gradient of D");
}

/* Each case with the teacher's logits and, where the variant allows it, with its top K alone. */
static void test_golden(void **state)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/sdpo_golden.json", golden_dir);
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    const cJSON *cases = NULL;
    const cJSON *item;
    float student[6], teacher[6], teacher_lp[6], ids[3], top_lp[3];
    int32_t top_ids[3];
    size_t length = 0;
    int count = 0;

    if (claas_file_read(path, 1 << 20, &text, &length) < 0 ||
        claas_json_parse(text, length, 1 << 20, &json) < 0)
        fail_msg("%s", claas_error_text());
    read_floats(json, "student_logits", student, 6);
    read_floats(json, "teacher_logits", teacher, 6);
    read_floats(json, "teacher_logprobs", teacher_lp, 6);
    read_floats(json, "teacher_top_ids", ids, 3);
    for (int k = 0; k < 3; k++) {
        top_ids[k] = (int32_t)ids[k];
        top_lp[k] = teacher_lp[top_ids[k]];
    }
    assert_int_equal(claas_json_get_array(json, "cases", &cases), 1);
    cJSON_ArrayForEach(item, cases)
    {
        struct claas_loss_row row = {
            .student_logits = student,
            .teacher_logits = teacher,
            .rollout_logprob = (float)read_number(json, "rollout_logprob"),
            .base_logprob = (float)read_number(json, "base_logprob"),
        };

        check_golden_case(item, &row);
        if (strcmp(cJSON_GetObjectItemCaseSensitive(item, "variant")->valuestring,
                   "teacher_topk") == 0) {
            row.teacher_logits = NULL;
            row.teacher_ids = top_ids;
            row.teacher_logprobs = top_lp;
            row.teacher_count = 3;
            check_golden_case(item, &row);
        }
        count++;
    }
    assert_int_equal(count, 14);
}

/* --- finite differences ----------------------------------------------------------------------- */

static const float alphas[] = {0.0F, 0.1F, 0.25F, 0.5F, 0.9F, 1.0F};

static void test_differences(void **state)
{
    static const int sizes[] = {1, 2, 7, 8, 9, 33, 130, 1000};
    float student[V_MAX], teacher[V_MAX];
    char what[128];

    for (size_t i = 0; i < CLAAS_COUNT(sizes) * CLAAS_COUNT(alphas) * 3; i++) {
        int n = sizes[i % CLAAS_COUNT(sizes)];
        struct claas_loss_config config = {
            .variant = (enum claas_loss_variant)(i / CLAAS_COUNT(sizes) % 3),
            .alpha = alphas[i / CLAAS_COUNT(sizes) / 3],
            .top_k = n > 100 ? 20 : 3,
            .is_clip = 2,
            .kl_weight = 0.3F,
            .reference_k3 = i % 2 == 0,
        };
        struct claas_loss_row row = {.student_logits = student, .teacher_logits = teacher};

        fill(student, n, 2.5F, 2 * i);
        fill(teacher, n, 2.5F, 2 * i + 1);
        row.token = (int32_t)(i * 7 % (size_t)n);
        row.rollout_logprob =
            student[row.token] - claas_logsumexp(student, n) + (i % 3 ? 0.2F : -3.0F);
        row.base_logprob =
            student[row.token] - claas_logsumexp(student, n) + (i % 5 ? 0.4F : -0.7F);
        snprintf(what, sizeof(what), "%s alpha %g V %d token %d", variant_names[config.variant],
                 (double)config.alpha, n, (int)row.token);
        check_row(&config, n, &row, n > 500 ? 13 : 1, what);
        row.rollout_logprob = NAN;
        config.kl_weight = 0;
        config.top_k = 2 * n; /* K >= V */
        check_row(&config, n, &row, n > 100 ? 29 : 1, what);
    }
}

/* Student and teacher nearly equal: a small divergence must not drown in rounding. */
static void test_small_divergence(void **state)
{
    float student[V_MAX], teacher[V_MAX];
    double s[V_MAX], t[V_MAX], z[V_MAX], zt[V_MAX];
    struct frozen frozen = {.count = 0};

    fill(student, V_MAX, 3.0F, 900);
    for (int i = 0; i < V_MAX; i++) {
        teacher[i] = student[i] + 0.01F * claas_random_normal(5, 901, (uint64_t)i);
        z[i] = (double)student[i];
        zt[i] = (double)teacher[i];
    }
    reference_log_softmax(z, V_MAX, s);
    reference_log_softmax(zt, V_MAX, t);
    for (size_t i = 0; i < CLAAS_COUNT(alphas); i++) {
        struct claas_loss_config config = {.variant = CLAAS_LOSS_FULL, .alpha = alphas[i]};
        struct claas_loss_row row = {.student_logits = student, .teacher_logits = teacher};
        struct claas_loss_result result;
        double wanted = reference_divergence(&config, V_MAX, s, t, 0, &frozen);

        assert_int_equal(run(&config, V_MAX, &row, 1.0F, NULL, &result), 0);
        assert_true(wanted < 1e-3);
        check_near((double)result.divergence, wanted, 2e-7, "small divergence");
    }
}

/* --- degenerate rows -------------------------------------------------------------------------- */

static void test_one_hot(void **state)
{
    float student[40], teacher[40], grad[40];

    for (size_t i = 0; i < CLAAS_COUNT(alphas) * 3; i++) {
        struct claas_loss_config config = {
            .variant = (enum claas_loss_variant)(i % 3), .alpha = alphas[i / 3], .top_k = 5};
        struct claas_loss_row row = {.student_logits = student, .teacher_logits = teacher};
        struct claas_loss_result result;

        fill(student, 40, 1.0F, 950);
        fill(teacher, 40, 1.0F, 951);
        row.token = 3;
        row.rollout_logprob = NAN;
        student[3] = 18.0F;
        check_row(&config, 40, &row, 1, "student nearly one-hot");
        teacher[3] = 60.0F;
        check_row(&config, 40, &row, 1, "both nearly one-hot");
        teacher[3] = 0.0F;
        teacher[7] = 25.0F;
        check_row(&config, 40, &row, 1, "nearly one-hot, opposed");
        student[3] = 24.0F; /* both floors hold: tail 1e-7, mass of the teacher's top K 1e-8 */
        check_row(&config, 40, &row, 1, "opposed, at the floors");
        student[3] = 70.0F; /* the others' exponentials are below float's smallest */
        assert_int_equal(run(&config, 40, &row, 1.0F, grad, &result), 0);
        assert_true(isfinite(result.loss) && isfinite(result.entropy));
        for (int v = 0; v < 40; v++)
            assert_true(isfinite(grad[v]));
    }
}

/* A token forbidden to both (logit -inf) counts nothing and gets no gradient. */
static void test_minus_infinity(void **state)
{
    float student[40], teacher[40], grad[40], compact_s[38], compact_t[38], compact_grad[38];
    struct claas_loss_row row = {.student_logits = student, .teacher_logits = teacher};
    struct claas_loss_row compact = {.student_logits = compact_s, .teacher_logits = compact_t};

    fill(student, 40, 2.0F, 960);
    fill(teacher, 40, 2.0F, 961);
    student[38] = student[39] = teacher[38] = teacher[39] = -INFINITY;
    memcpy(compact_s, student, sizeof(compact_s));
    memcpy(compact_t, teacher, sizeof(compact_t));
    row.token = compact.token = 5;
    row.rollout_logprob = compact.rollout_logprob = NAN;
    for (size_t i = 0; i < CLAAS_COUNT(alphas) * 3; i++) {
        struct claas_loss_config config = {
            .variant = (enum claas_loss_variant)(i % 3), .alpha = alphas[i / 3], .top_k = 6};
        struct claas_loss_result result, wanted;

        assert_int_equal(run(&config, 40, &row, 1.0F, grad, &result), 0);
        assert_int_equal(run(&config, 38, &compact, 1.0F, compact_grad, &wanted), 0);
        check_near((double)result.loss, (double)wanted.loss, 1e-6, "-inf loss");
        check_near((double)result.entropy, (double)wanted.entropy, 1e-6, "-inf entropy");
        for (int v = 0; v < 38; v++)
            check_near((double)grad[v], (double)compact_grad[v], 1e-6, "-inf gradient");
        assert_true(grad[38] == 0 && grad[39] == 0);
    }
    /* Forbidden to the student alone: forward KL is infinite, and says so. */
    teacher[39] = 0;
    {
        struct claas_loss_config config = {.variant = CLAAS_LOSS_FULL, .alpha = 0};
        struct claas_loss_result result;

        assert_int_equal(run(&config, 40, &row, 1.0F, grad, &result), 0);
        assert_false(isfinite(result.loss));
        assert_false(isfinite(result.forward_kl));
        config.alpha = 0.5F;
        assert_int_equal(run(&config, 40, &row, 1.0F, grad, &result), 0);
        assert_true(isfinite(result.loss));
    }
}

static void test_non_finite(void **state)
{
    static const float poisons[] = {NAN, INFINITY};
    float student[50], teacher[50], grad[50];

    for (size_t i = 0; i < CLAAS_COUNT(alphas) * 3 * 2 * 2 * 50; i++) {
        struct claas_loss_config config = {.variant = (enum claas_loss_variant)(i / 200 % 3),
                                           .alpha = alphas[i / 600],
                                           .top_k = 4,
                                           .is_clip = 2};
        struct claas_loss_row row = {
            .student_logits = student, .teacher_logits = teacher, .token = 20};
        struct claas_loss_result result;

        fill(student, 50, 2.0F, 970);
        fill(teacher, 50, 2.0F, 971);
        (i / 100 % 2 ? student : teacher)[i % 50] = poisons[i / 50 % 2];
        row.rollout_logprob = -1.0F;
        assert_int_equal(run(&config, 50, &row, 1.0F, grad, &result), 0);
        if (isfinite(result.loss))
            fail_msg("%s alpha %g hides a poisoned logit %d", variant_names[config.variant],
                     (double)config.alpha, (int)(i % 50));
    }
    for (int i = 0; i < 50; i++)
        student[i] = -INFINITY;
    assert_false(isfinite(claas_logsumexp(student, 50)));
}

static void test_bad_arguments(void **state)
{
    float student[4] = {1, 2, 3, 4}, teacher[4] = {4, 3, 2, 1}, lp[2] = {-1, -1};
    int32_t ids[2] = {0, 4};
    const struct claas_loss_config good = {.variant = CLAAS_LOSS_STUDENT_TOPK_TAIL, .top_k = 2};
    const struct claas_loss_row good_row = {.student_logits = student, .teacher_logits = teacher};
    struct claas_loss_result result;

    for (int i = 0; i < 8; i++) {
        struct claas_loss_config config = good;

        config.alpha = i == 0 ? -0.1F : i == 1 ? 1.1F : i == 2 ? NAN : 0.5F;
        config.top_k = i == 3 ? 0 : 2;
        config.is_clip = i == 4 ? -1.0F : i == 5 ? NAN : 0;
        config.kl_weight = i == 6 ? -1.0F : 0;
        config.variant = i == 7 ? (enum claas_loss_variant)9 : good.variant;
        assert_int_equal(run(&config, 4, &good_row, 1, NULL, &result), CLAAS_ERR_INVALID);
    }
    for (int i = 0; i < 6; i++) {
        struct claas_loss_config config = good;
        struct claas_loss_row row = good_row;

        config.variant = i >= 3 ? CLAAS_LOSS_TEACHER_TOPK : good.variant;
        row.token = i == 0 ? -1 : i == 1 ? 4 : 0;
        row.teacher_logits = i >= 2 ? NULL : teacher; /* 2: only TEACHER_TOPK knows lists */
        row.teacher_ids = i == 3 ? NULL : ids;        /* 4: the second id is out of range */
        row.teacher_logprobs = lp;
        row.teacher_count = i == 5 ? 0 : 2;
        assert_int_equal(run(&config, 4, &row, 1, NULL, &result), CLAAS_ERR_INVALID);
    }
    assert_int_equal(run(&good, 4, &good_row, 1, NULL, &result), 0);
    assert_int_equal(claas_loss_row(&good, 0, &good_row, 1, NULL, NULL, &result),
                     CLAAS_ERR_INVALID);
}

/* A remote teacher's list, and a row whose weight is 0 (masked by its caller). */
static void test_remote_and_masked(void **state)
{
    float student[30], grad[30];
    int32_t ids[4] = {7, 3, 29, 11};
    float lp[4] = {-0.5F, -1.5F, -3.0F, -4.0F};
    struct claas_loss_config config = {
        .variant = CLAAS_LOSS_TEACHER_TOPK, .alpha = 0.5F, .top_k = 3, .kl_weight = 0.1F};
    struct claas_loss_row row = {.student_logits = student,
                                 .teacher_ids = ids,
                                 .teacher_logprobs = lp,
                                 .teacher_count = 4,
                                 .token = 2,
                                 .base_logprob = -2.0F};
    struct claas_loss_result result, three;

    fill(student, 30, 1.0F, 980);
    assert_int_equal(run(&config, 30, &row, 1.0F, grad, &result), 0);
    assert_true(isfinite(result.loss) && isnan(result.forward_kl));
    assert_true(result.ratio == 1.0F && result.clipped == 0.0F); /* is_clip 0: no ratio */
    row.teacher_count = 3;                                       /* top_k cuts the list */
    assert_int_equal(run(&config, 30, &row, 1.0F, grad, &three), 0);
    assert_true(three.loss == result.loss);
    assert_int_equal(run(&config, 30, &row, 0.0F, grad, &result), 0);
    for (int v = 0; v < 30; v++)
        assert_true(grad[v] == 0.0F);
}

/* --- the row loops ---------------------------------------------------------------------------- */

/* The tables that this CPU can run. */
static int list_tables(const struct claas_rows *tables[3])
{
    int count = 0;

    tables[count++] = &claas_rows_base;
#ifdef __x86_64__
    if (claas_rows_pick() != &claas_rows_base && __builtin_cpu_supports("avx2"))
        tables[count++] = &claas_rows_v3;
    if (claas_rows_pick() == &claas_rows_v4)
        tables[count++] = &claas_rows_v4;
#endif
    return count;
}

struct outputs {
    float max;
    double sum_exp, sum;
    struct claas_rows_sums moments, reverse, jsd;
    uint64_t hash; /* of the rows written */
};

static uint64_t hash_row(uint64_t hash, const float *row, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t bits;

        memcpy(&bits, &row[i], sizeof(bits));
        hash = (hash ^ bits) * UINT64_C(0x100000001b3);
    }
    return hash;
}

static void run_table(const struct claas_rows *rows, const float *z, const float *zt, int n,
                      int offset, struct outputs *ret)
{
    CLAAS_AUTO_FREE float *block = claas_alloc_aligned((size_t)(n + 32) * 5 * sizeof(float));
    float *at[5];
    float max_t;

    memset(ret, 0, sizeof(*ret));
    for (int i = 0; i < 5; i++)
        at[i] = block + (size_t)i * (size_t)(n + 32) + offset;
    memcpy(at[0], z, (size_t)n * sizeof(float));
    memcpy(at[1], zt, (size_t)n * sizeof(float));
    ret->max = rows->max(at[0], (size_t)n);
    max_t = rows->max(at[1], (size_t)n);
    ret->sum_exp = rows->sum_exp(at[0], (size_t)n, ret->max);
    rows->moments(at[0], at[1], (size_t)n, ret->max, max_t, at[2], at[3], &ret->moments);
    assert_true(ret->moments.s == ret->sum_exp);
    ret->sum = rows->sum(at[2], (size_t)n);
    assert_true(ret->sum == ret->sum_exp);
    ret->hash = hash_row(hash_row(1, at[2], n), at[3], n);
    ret->reverse = ret->moments;
    rows->diverge_reverse(at[0], at[1], (size_t)n, ret->max, max_t, at[2], at[4], &ret->reverse);
    ret->hash = hash_row(ret->hash, at[4], n);
    ret->jsd = ret->moments;
    rows->diverge_jsd((size_t)n, 0.3F, at[2], at[3], &ret->jsd);
    ret->hash = hash_row(ret->hash, at[3], n);
    rows->combine((size_t)n, 1.5F, at[3], -0.5F, at[2], at[4]);
    ret->hash = hash_row(ret->hash, at[4], n);
}

/* Same bits from every instruction set and at every alignment. */
static void test_tables_agree(void **state)
{
    static const int sizes[] = {1, 5, 8, 16, 127, 128, 129, 1000, 49152, 49157};
    const struct claas_rows *tables[3];
    int table_count = list_tables(tables);

    for (size_t i = 0; i < CLAAS_COUNT(sizes); i++) {
        int n = sizes[i];
        CLAAS_AUTO_FREE float *z = CLAAS_NEW_ARRAY(float, (size_t)n);
        CLAAS_AUTO_FREE float *zt = CLAAS_NEW_ARRAY(float, (size_t)n);
        struct outputs first, other;

        fill(z, n, 6.0F, 990);
        fill(zt, n, 6.0F, 991);
        if (n > 100)
            z[50] = zt[50] = -INFINITY;
        run_table(tables[0], z, zt, n, 0, &first);
        for (int table = 0; table < table_count; table++) {
            for (int offset = 0; offset<9; offset += table_count> 1 && n > 2000 ? 4 : 1) {
                run_table(tables[table], z, zt, n, offset, &other);
                assert_memory_equal(&first, &other, sizeof(first));
            }
        }
    }
}

/* The polynomial exponential against libm's, over its whole range. */
static void test_exp_accuracy(void **state)
{
    enum { COUNT = 200000 };
    CLAAS_AUTO_FREE float *x = CLAAS_NEW_ARRAY(float, COUNT);
    CLAAS_AUTO_FREE float *e = CLAAS_NEW_ARRAY(float, COUNT);
    CLAAS_AUTO_FREE float *et = CLAAS_NEW_ARRAY(float, COUNT);
    struct claas_rows_sums sums;
    double worst = 0;

    for (int i = 0; i < COUNT; i++)
        x[i] = -86.99F * claas_random_uniform(3, 4, (uint64_t)i);
    x[0] = 0.0F;
    x[1] = -87.5F;
    claas_rows_pick()->moments(x, x, COUNT, 0.0F, 0.0F, e, et, &sums);
    assert_true(e[0] == 1.0F && e[1] == 0.0F);
    for (int i = 2; i < COUNT; i++) {
        double exact = exp((double)x[i]);
        double ulp = ldexp(1.0, ilogb(exact) - 23);
        double error = fabs((double)e[i] - exact) / ulp;

        worst = error > worst ? error : worst;
    }
    if (!(worst <= 1.5))
        fail_msg("exp is off by %.2f ulp", worst);
    print_message("exp: worst error %.3f ulp\n", worst);
}

/* A full-size row: close to doubles, and the sampler's log-prob gives ratio exactly 1. */
static void test_wide_row(void **state)
{
    enum { WIDE = 151936 };
    CLAAS_AUTO_FREE float *z = CLAAS_NEW_ARRAY(float, WIDE);
    CLAAS_AUTO_FREE float *zt = CLAAS_NEW_ARRAY(float, WIDE);
    CLAAS_AUTO_FREE float *grad = CLAAS_NEW_ARRAY(float, WIDE);
    CLAAS_AUTO_FREE double *s = CLAAS_NEW_ARRAY(double, WIDE);
    CLAAS_AUTO_FREE double *t = CLAAS_NEW_ARRAY(double, WIDE);

    fill(z, WIDE, 3.0F, 995);
    fill(zt, WIDE, 3.0F, 996);
    for (int i = 0; i < WIDE; i++) {
        s[i] = (double)z[i];
        t[i] = (double)zt[i];
    }
    reference_log_softmax(s, WIDE, s);
    reference_log_softmax(t, WIDE, t);
    for (size_t i = 0; i < CLAAS_COUNT(alphas); i++) {
        struct claas_loss_config config = {
            .variant = CLAAS_LOSS_FULL, .alpha = alphas[i], .is_clip = 2};
        struct claas_loss_row row = {.student_logits = z, .teacher_logits = zt, .token = 77777};
        struct claas_loss_result result;
        double sum = 0, size = 0, entropy = 0;

        row.rollout_logprob = z[row.token] - claas_logsumexp(z, WIDE);
        assert_int_equal(run(&config, WIDE, &row, 1.0F, grad, &result), 0);
        assert_true(result.ratio == 1.0F && result.logprob == row.rollout_logprob);
        check_near((double)result.divergence,
                   reference_buckets(s, t, WIDE, (double)alphas[i], false), 1e-6, "wide");
        for (int v = 0; v < WIDE; v++) {
            sum += (double)grad[v];
            size += fabs((double)grad[v]);
            entropy -= exp(s[v]) * s[v];
        }
        check_near((double)result.entropy, entropy, 1e-6, "wide entropy");
        /* Softmax is invariant to a shift: the gradient sums to nothing. */
        if (!(fabs(sum) <= 1e-6 * size))
            fail_msg("alpha %g: the gradient sums to %g of %g", (double)alphas[i], sum, size);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),           cmocka_unit_test(test_differences),
        cmocka_unit_test(test_small_divergence), cmocka_unit_test(test_one_hot),
        cmocka_unit_test(test_minus_infinity),   cmocka_unit_test(test_non_finite),
        cmocka_unit_test(test_bad_arguments),    cmocka_unit_test(test_remote_and_masked),
        cmocka_unit_test(test_tables_agree),     cmocka_unit_test(test_exp_accuracy),
        cmocka_unit_test(test_wide_row),
    };

    if (argc > 1)
        golden_dir = argv[1];
    return cmocka_run_group_tests(tests, NULL, NULL);
}
