/* The top-K variants of the loss: the vocabulary is folded into a few buckets, each with a student
 * and a teacher mass, and everything about buckets is done in double and in logarithms.
 *
 * With g_b = dD/dS_b for bucket b and S_b the sum of its members' probabilities,
 *     dD/dz_v = S_v (g_b(v) - C),   C = sum over buckets of g_b S_b,
 * where a bucket whose mass is held at a floor counts as constant (g_b = 0). */
#include "sdpo/loss_parts.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#define TAIL_LOG_MAX  -1e-7 /* the log of the top K's mass is held below: tail >= 1e-7 */
#define MASS_MIN      1e-8  /* floor of the renormalisation */
#define TEACHER_FLOOR -20.0 /* log-prob of a token that the teacher did not list */

/* True if a is dropped before b: its logit is smaller, or equal and its id larger. */
static bool is_worse(const float *z, int32_t a, int32_t b)
{
    return z[a] < z[b] || (z[a] == z[b] && a > b);
}

/* Restores the heap below `at`; heap[0] is the worst of the ids kept. */
static void sift_down(const float *z, int32_t *heap, size_t count, size_t at)
{
    for (;;) {
        size_t child = 2 * at + 1;
        int32_t moved = heap[at];

        if (child + 1 < count && is_worse(z, heap[child + 1], heap[child]))
            child++;
        if (child >= count || !is_worse(z, heap[child], moved))
            return;
        heap[at] = heap[child];
        heap[child] = moved;
        at = child;
    }
}

/* The ids of the `count` largest logits, in no meaningful order (but always the same one). */
static void select_top(const float *z, size_t vocab, size_t count, int32_t *ids)
{
    for (size_t i = 0; i < count; i++)
        ids[i] = (int32_t)i;
    if (count == vocab)
        return;
    for (size_t i = count / 2; i-- > 0;)
        sift_down(z, ids, count, i);
    for (size_t v = count; v < vocab; v++) {
        if (z[v] > z[ids[0]]) {
            ids[0] = (int32_t)v;
            sift_down(z, ids, count, 0);
        }
    }
}

/* One bucket's part of (1-a) KL(S||M) + a KL(T||M), and g S = (1-a) S log(S/M). */
static double jensen_shannon(double alpha, double log_s, double log_t, double *slope)
{
    double s = exp(log_s);
    double t = exp(log_t);
    double log_m = log((1 - alpha) * s + alpha * t);
    double part_s = s == 0 ? 0.0 : (1 - alpha) * s * (log_s - log_m);
    double part_t = t == 0 ? 0.0 : alpha * t * (log_t - log_m);

    *slope = part_s;
    return part_s + part_t;
}

/* One bucket's part of D, and g S. */
static double diverge(double alpha, double log_s, double log_t, double *slope)
{
    double s = exp(log_s);
    double t = exp(log_t);
    double part;

    if (alpha == 0) {
        *slope = -t;
        return t == 0 ? 0.0 : t * (log_t - log_s);
    }
    if (alpha == 1) {
        part = s == 0 ? 0.0 : s * (log_s - log_t);
        *slope = part + s;
        return part;
    }
    return jensen_shannon(alpha, log_s, log_t, slope);
}

/* The log of the mass outside of `ids`, which is summed, not subtracted from 1: exact even where
 * the top K hold nearly all. */
static double tail_log_mass(struct claas_loss_work *work, const float *e, double sum, size_t count,
                            bool *held)
{
    double mass;

    memcpy(work->spare, e, work->vocab * sizeof(float));
    for (size_t k = 0; k < count; k++)
        work->spare[work->ids[k]] = 0.0F;
    mass = work->rows->sum(work->spare, work->vocab) / sum;
    *held = mass < -expm1(TAIL_LOG_MAX);
    return log(*held ? -expm1(TAIL_LOG_MAX) : mass);
}

void claas_loss_student_topk(struct claas_loss_work *work, struct claas_loss_slope *slope)
{
    const float *z = work->row->student_logits;
    const float *zt = work->row->teacher_logits;
    double alpha = work->config->alpha;
    size_t count = (size_t)work->config->top_k;
    double center = 0;
    double tail_slope;
    double log_s;
    double log_t;
    double part;
    bool held;
    bool held_t;

    select_top(z, work->vocab, count, work->ids);
    log_s = tail_log_mass(work, work->es, work->sums.s, count, &held);
    log_t = tail_log_mass(work, work->et, work->sums.t, count, &held_t);
    work->divergence = diverge(alpha, log_s, log_t, &part);
    tail_slope = held ? 0.0 : part / exp(log_s);
    center = held ? 0.0 : part;
    for (size_t k = 0; k < count; k++) {
        int32_t id = work->ids[k];

        work->divergence += diverge(alpha, z[id] - work->lse, zt[id] - work->lse_t, &part);
        center += part;
    }
    for (size_t k = 0; k < count; k++) {
        int32_t id = work->ids[k];

        log_s = z[id] - work->lse;
        diverge(alpha, log_s, zt[id] - work->lse_t, &part);
        work->spare[k] = (float)(part - exp(log_s) * center);
    }
    slope->c = (tail_slope - center) / work->sums.s;
    slope->ids = work->ids;
    slope->patch = work->spare;
    slope->patches = count;
    slope->replaces = true;
}

/* The support (the teacher's top K): ids, and the teacher's log-prob of each. */
struct support {
    const int32_t *ids;
    size_t count;
    const float *values; /* log-probs by position (remote teacher) or, if by_id, logits by id */
    bool by_id;
    double lse_t;
};

static double teacher_log(const struct support *support, size_t k)
{
    return support->by_id ? support->values[support->ids[k]] - support->lse_t : support->values[k];
}

/* D = stopgrad(log S_y - tau_y) log S_y, with tau_y the teacher's log-prob of y, or the floor if y
 * is not in the support. */
static void token_form(struct claas_loss_work *work, const struct support *support,
                       struct claas_loss_slope *slope)
{
    int32_t token = work->row->token;
    double log_s = work->row->student_logits[token] - work->lse;
    double tau = TEACHER_FLOOR;
    double gap;

    for (size_t k = support->count; k-- > 0;)
        if (support->ids[k] == token)
            tau = teacher_log(support, k);
    gap = log_s - tau;
    work->divergence = gap * log_s;
    slope->at_token = gap;
    slope->c = -gap / work->sums.s;
}

/* D over the support, student and teacher each renormalised there. */
static void renormalised_form(struct claas_loss_work *work, const struct support *support,
                              struct claas_loss_slope *slope)
{
    const float *z = work->row->student_logits;
    double alpha = work->config->alpha;
    double mass_s = 0;
    double mass_t = 0;
    double center = 0;
    double part;
    bool held;

    for (size_t k = 0; k < support->count; k++) {
        mass_s += exp(z[support->ids[k]] - work->lse);
        mass_t += exp(teacher_log(support, k));
    }
    held = mass_s < MASS_MIN;
    mass_s = log(held ? MASS_MIN : mass_s); /* both are logs from here on */
    mass_t = log(mass_t < MASS_MIN ? MASS_MIN : mass_t);
    work->divergence = 0;
    for (size_t k = 0; k < support->count; k++) {
        work->divergence += jensen_shannon(alpha, z[support->ids[k]] - work->lse - mass_s,
                                           teacher_log(support, k) - mass_t, &part);
        center += part;
    }
    for (size_t k = 0; k < support->count; k++) {
        double log_s = z[support->ids[k]] - work->lse - mass_s;

        jensen_shannon(alpha, log_s, teacher_log(support, k) - mass_t, &part);
        work->spare[k] = (float)(held ? part : part - exp(log_s) * center);
    }
    /* Held: S_k is divided by a constant, and so depends on every logit again. */
    slope->c = held ? -center / work->sums.s : 0.0;
    slope->ids = support->ids;
    slope->patch = work->spare;
    slope->patches = support->count;
}

void claas_loss_teacher_topk(struct claas_loss_work *work, struct claas_loss_slope *slope)
{
    const struct claas_loss_row *row = work->row;
    struct support support = {.count = (size_t)work->config->top_k, .lse_t = work->lse_t};

    if (support.count > work->vocab)
        support.count = work->vocab;
    if (row->teacher_logits) {
        select_top(row->teacher_logits, work->vocab, support.count, work->ids);
        support.ids = work->ids;
        support.values = row->teacher_logits;
        support.by_id = true;
    } else {
        support.ids = row->teacher_ids;
        support.values = row->teacher_logprobs;
        if (support.count > (size_t)row->teacher_count)
            support.count = (size_t)row->teacher_count;
    }
    if (work->config->alpha == 1)
        token_form(work, &support, slope);
    else if (work->config->alpha > 0)
        renormalised_form(work, &support, slope);
    else
        work->divergence =
            0; /* M = S: the Python system's alpha = 0 teaches nothing; kept for parity */
}
