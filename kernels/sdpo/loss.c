/* The SDPO loss of one response position and its exact gradient.
 *
 * Every variant's gradient by the logits has the form a x + c es with es = exp(z - max z),
 * corrected at a few ids: so the row is read twice for the maxima, once for exponentials and sums,
 * and the gradient is one multiply-add per element. Scalars are doubles; formulas in
 * include/claas/loss.h. */
#include "claas/loss.h"

#include "claas/err.h"
#include "sdpo/loss_parts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOG_RATIO_MAX 20.0

const struct claas_rows *claas_rows_pick(void)
{
#ifdef __x86_64__
    const char *forced = getenv("CLAAS_CPU");
    int most = !forced ? 2 : strcmp(forced, "ref") == 0 ? 0 : strcmp(forced, "avx2") == 0 ? 1 : 2;

    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd"))
        return &claas_rows_v4;
    if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2"))
        return &claas_rows_v3;
#endif
    return &claas_rows_base;
}

/* Racing threads store the same pointer. */
static const struct claas_rows *pick_once(void)
{
    static const struct claas_rows *picked;
    const struct claas_rows *rows = __atomic_load_n(&picked, __ATOMIC_RELAXED);

    if (!rows) {
        rows = claas_rows_pick();
        __atomic_store_n(&picked, rows, __ATOMIC_RELAXED);
    }
    return rows;
}

float claas_logsumexp(const float *logits, int vocab)
{
    const struct claas_rows *rows = pick_once();
    float max = rows->max(logits, (size_t)vocab);

    return (float)((double)max + log(rows->sum_exp(logits, (size_t)vocab, max)));
}

/* Floats from one row of the scratch to the next: a multiple of 16, so that each row is aligned as
 * the scratch is. */
static size_t row_stride(int vocab)
{
    return ((size_t)vocab + 15) / 16 * 16;
}

size_t claas_loss_scratch_floats(int vocab)
{
    return vocab > 0 ? 4 * row_stride(vocab) : 0;
}

int claas_loss_check(const struct claas_loss_config *config)
{
    if (config->variant < CLAAS_LOSS_FULL || config->variant > CLAAS_LOSS_TEACHER_TOPK)
        return claas_fail(CLAAS_ERR_INVALID, "loss: unknown variant %d", (int)config->variant);
    if (!(config->alpha >= 0 && config->alpha <= 1))
        return claas_fail(CLAAS_ERR_INVALID, "loss: alpha is %g, it must be from 0 to 1",
                          (double)config->alpha);
    if (config->variant != CLAAS_LOSS_FULL && config->top_k < 1)
        return claas_fail(CLAAS_ERR_INVALID, "loss: top_k is %d, it must be at least 1",
                          config->top_k);
    if (!(config->is_clip >= 0))
        return claas_fail(CLAAS_ERR_INVALID, "loss: is_clip is %g, it must not be negative",
                          (double)config->is_clip);
    if (!(config->kl_weight >= 0) || isinf(config->kl_weight))
        return claas_fail(CLAAS_ERR_INVALID, "loss: kl_weight is %g, it must not be negative",
                          (double)config->kl_weight);
    return 0;
}

static int check_row(const struct claas_loss_config *config, int vocab,
                     const struct claas_loss_row *row)
{
    if (vocab < 1)
        return claas_fail(CLAAS_ERR_INVALID, "loss: a vocabulary of %d", vocab);
    if (row->token < 0 || row->token >= vocab)
        return claas_fail(CLAAS_ERR_INVALID, "loss: token %d is outside of the vocabulary of %d",
                          (int)row->token, vocab);
    if (row->teacher_logits)
        return 0;
    if (config->variant != CLAAS_LOSS_TEACHER_TOPK)
        return claas_fail(CLAAS_ERR_INVALID, "loss: this variant needs the teacher's logits");
    if (!row->teacher_ids || !row->teacher_logprobs || row->teacher_count < 1)
        return claas_fail(CLAAS_ERR_INVALID, "loss: a row without teacher");
    for (int k = 0; k < row->teacher_count; k++)
        if (row->teacher_ids[k] < 0 || row->teacher_ids[k] >= vocab)
            return claas_fail(CLAAS_ERR_INVALID,
                              "loss: teacher token %d is outside of the vocabulary of %d",
                              (int)row->teacher_ids[k], vocab);
    return 0;
}

/* Exponentials and sums of the row. A remote teacher gave no logits: then the student's stand in,
 * and what depends on them is not used. */
static void measure(struct claas_loss_work *work)
{
    const float *z = work->row->student_logits;
    const float *zt = work->row->teacher_logits;

    work->max = work->rows->max(z, work->vocab);
    work->max_t = zt ? work->rows->max(zt, work->vocab) : work->max;
    work->rows->moments(z, zt ? zt : z, work->vocab, work->max, work->max_t, work->es, work->et,
                        &work->sums);
    work->lse = (double)work->max + log(work->sums.s);
    work->lse_t = zt ? (double)work->max_t + log(work->sums.t) : NAN;
}

/* KL(T||S) = sum T (log T - log S), the logs split into row and constant parts. */
static double forward_kl(const struct claas_loss_work *work)
{
    return work->sums.t_ut_less / work->sums.t - log(work->sums.t) + log(work->sums.s);
}

/* Over the whole vocabulary:
 *   alpha = 0: dD/dz = S - T
 *   alpha = 1: dD/dz = S (log(S/T) - KL(S||T))
 *   else       dD/dz = (1-alpha) S (log(S/M) - KL(S||M)) */
static void full_vocabulary(struct claas_loss_work *work, struct claas_loss_slope *slope)
{
    const struct claas_loss_row *row = work->row;
    struct claas_rows_sums *sums = &work->sums;
    double alpha = work->config->alpha;
    double scale = 1.0;

    if (alpha == 0) {
        work->divergence = forward_kl(work);
        slope->a = -1.0 / sums->t;
        slope->c = 1.0 / sums->s;
        slope->x = work->et;
        return;
    }
    if (alpha == 1) {
        work->rows->diverge_reverse(row->student_logits, row->teacher_logits, work->vocab,
                                    work->max, work->max_t, work->es, work->et, sums);
        work->divergence = sums->x / sums->s - log(sums->s) + log(sums->t);
    } else {
        work->rows->diverge_jsd(work->vocab, (float)alpha, work->es, work->et, sums);
        scale = 1.0 - alpha;
        work->divergence = scale * (sums->x / sums->s) + alpha * (sums->t_log / sums->t);
    }
    slope->a = scale / sums->s;
    slope->c = -slope->a * (sums->x / sums->s);
    slope->x = work->et;
}

/* fmin/fmax would turn NaN into a number. */
static double clamp_log_ratio(double x)
{
    return x > LOG_RATIO_MAX ? LOG_RATIO_MAX : x < -LOG_RATIO_MAX ? -LOG_RATIO_MAX : x;
}

/* rho and whether it was clipped. */
static void weigh_ratio(const struct claas_loss_work *work, struct claas_loss_result *ret)
{
    const struct claas_loss_config *config = work->config;
    double ratio;

    ret->ratio = 1.0F;
    ret->clipped = 0.0F;
    if (config->is_clip == 0 || isnan(work->row->rollout_logprob))
        return;
    ratio = exp(clamp_log_ratio((double)ret->logprob - (double)work->row->rollout_logprob));
    if (ratio >= config->is_clip) {
        ratio = config->is_clip;
        ret->clipped = 1.0F;
    }
    ret->ratio = (float)ratio;
}

/* k3 and its derivative by log S_y; outside of the clamp the value is constant. */
static double kl_to_base(const struct claas_loss_work *work, struct claas_loss_result *ret)
{
    double sign = work->config->reference_k3 ? 1.0 : -1.0;
    double x = sign * ((double)ret->logprob - (double)work->row->base_logprob);
    double clamped = clamp_log_ratio(x);

    ret->kl_base = 0.0F;
    if (!(work->config->kl_weight > 0))
        return 0.0;
    ret->kl_base = (float)(exp(clamped) - 1.0 - clamped);
    return x != clamped && !isnan(x) ? 0.0 : sign * (exp(x) - 1.0);
}

static void write_gradient(const struct claas_loss_work *work, const struct claas_loss_slope *slope,
                           double weight, double token_slope, float *grad)
{
    double c = weight * slope->c - token_slope / work->sums.s;

    work->rows->combine(work->vocab, (float)(weight * slope->a), slope->x, (float)c, work->es,
                        grad);
    for (size_t k = 0; k < slope->patches; k++) {
        int32_t id = slope->ids[k];
        double kept =
            slope->replaces ? -token_slope / work->sums.s * (double)work->es[id] : (double)grad[id];

        grad[id] = (float)(kept + weight * (double)slope->patch[k]);
    }
    grad[work->row->token] += (float)(weight * slope->at_token + token_slope);
}

int claas_loss_row(const struct claas_loss_config *config, int vocab,
                   const struct claas_loss_row *row, float weight, float *grad, float *scratch,
                   struct claas_loss_result *ret)
{
    struct claas_loss_work work = {.config = config, .row = row};
    struct claas_loss_slope slope = {0};
    double slope_k3;
    int rc = claas_loss_check(config);

    if (rc >= 0)
        rc = check_row(config, vocab, row);
    if (rc < 0)
        return rc;
    work.rows = pick_once();
    work.vocab = (size_t)vocab;
    work.es = scratch;
    work.et = scratch + row_stride(vocab);
    work.spare = scratch + 2 * row_stride(vocab);
    work.ids = (int32_t *)(scratch + 3 * row_stride(vocab));
    measure(&work);
    /* The sampler's own expression, so that an untouched row has ratio exactly 1. */
    ret->logprob = row->student_logits[row->token] - (float)((double)work.max + log(work.sums.s));
    ret->entropy = (float)(log(work.sums.s) - work.sums.s_us / work.sums.s);
    ret->forward_kl = row->teacher_logits ? (float)forward_kl(&work) : NAN;
    if (config->variant == CLAAS_LOSS_TEACHER_TOPK)
        claas_loss_teacher_topk(&work, &slope);
    else if (config->variant == CLAAS_LOSS_STUDENT_TOPK_TAIL && config->top_k < vocab)
        claas_loss_student_topk(&work, &slope);
    else
        full_vocabulary(&work, &slope);
    /* Masked terms must not hide a NaN or infinity in the logits. */
    if (!isfinite(work.lse) || (row->teacher_logits && !isfinite(work.lse_t)))
        work.divergence = NAN;
    weigh_ratio(&work, ret);
    slope_k3 = kl_to_base(&work, ret);
    ret->divergence = (float)work.divergence;
    ret->loss = (float)((double)ret->ratio * work.divergence +
                        (config->kl_weight > 0 ? config->kl_weight * (double)ret->kl_base : 0.0));
    if (grad)
        write_gradient(&work, &slope, (double)weight * (double)ret->ratio,
                       (double)weight * config->kl_weight * slope_k3, grad);
    return 0;
}
