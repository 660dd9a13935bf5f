/* The SDPO loss (self-distillation: Hübotter et al. 2026, arXiv 2601.20802) of rows of logits and
 * its gradient; see claas/loss.h for the symbols and kernels/sdpo for the slow, plain form, whose
 * steps these are.
 *
 *   student, teacher float32 [rows][V] -> results [rows], dlogits act [rows][V]
 *
 *   loss = rho D + kl_weight (exp(x) - 1 - x), x = log of the base's probability of y over S_y
 *   D    = (1-a) KL(S||M) + a KL(T||M), M = (1-a) S + a T: the weighted Jensen-Shannon divergence
 *          (Lin 1991; of distillation: Agarwal et al. 2023, arXiv 2306.13649), in whose place
 *          a = 0 has KL(T||S) and a = 1 KL(S||T)
 *
 * The second term is Schulman's estimate k3 (2020, "Approximating KL divergence") of KL(S||base).
 *
 * A row is held by a cluster of blocks (wide_rows.cuh). z, zt are a row's logits of student and
 * teacher, S and T their distributions. With us = z - max z, es = exp(us), and ut, et likewise for
 * the teacher, the passes over a row are
 *
 *   1  copy into shared memory; max z, max zt
 *   2  sum es, sum et (integers), sum es us, sum et (ut - us), sum es (us - ut)
 *   3  by variant: nothing (forward, reverse KL: pass 2 left es and x in shared memory); log(S/M)
 *      of every element and two sums (Jensen-Shannon); selection of the K largest and the sums over
 *      buckets (top K)
 *   4  the gradient a x + c es (x: enum loss_form), corrected at the K selected and at the token
 *
 * The scalars between the passes are doubles of the first warp, whose lanes take one logarithm,
 * quotient or exponential each. Over the whole vocabulary a cluster has one row after another, and
 * the next one comes into shared memory while the gradient is written: a thread that is done with
 * four elements asks for the next row's four.
 *
 * With g = log(T/S) = ut - us + log(sum es / sum et) one logarithm gives both of Jensen-Shannon's:
 * log(M/S) = log((1-a) + a e^g), log(M/T) = log(M/S) - g. An error of g does not matter to first
 * order: the divergence is stationary in it.
 *
 * Membership in the top K is a comparison with the K-th largest key, so no list of the K exists.
 * Buckets are computed in double, in logarithms, as in sdpo/buckets.c. A term whose factor es or et
 * is 0 counts 0. */
#include "cuda/cuda_loss.h"
#include "cuda/act.cuh"
#include "cuda/wide_rows.cuh"

#define LOG_RATIO_MAX 20.0
#define TAIL_LOG_MAX  -1e-7 /* the log of the top K's mass is held below: tail >= 1e-7 */
#define MASS_MIN      1e-8  /* floor of the renormalisation */
#define TEACHER_FLOOR -20.0 /* log-prob of a token that the teacher did not list */
#define EXPONENT_MAX  88.0F /* e^88 is a float */

/* x of the gradient a x + c es: none, et, es (us - ut), es log(S/M). */
enum loss_form { FORM_NONE, FORM_FORWARD, FORM_REVERSE, FORM_JSD };

struct loss_args {
    struct row_plan plan;
    struct claas_loss_config config;
    enum loss_form form;
    int top_k; /* 0: no selection */
    const float *student, *teacher;
    const struct cuda_loss_position *positions;
    void *dlogits;
    struct claas_loss_result *results;
    float mass_scale;
    bool quads, quads_out; /* rows are aligned for groups of four */
    bool ahead;            /* a cluster has several rows, and fetches the next one early */
    int rows;
};

/* The row's scalars, written by the first warp. */
struct loss_scalars {
    double s, t;                 /* sum es, sum et */
    double us, gap_t, gap_s;     /* sum es us / s, sum et (ut - us) / t, sum es (us - ut) / s */
    double inverse_s, inverse_t; /* 1 / s, 1 / t */
    double log_s, log_t, lse, lse_t;
    double divergence;
    /* the gradient of D: a x + c es; center, mass_s, mass_t and held are for the members of the
     * top K (patch_members) */
    double a, c, at_token, center, mass_s, mass_t;
    bool held;
    /* the gradient of the loss, ready to be written */
    float grad_a, grad_c, grad_token;
    double kept, weight;
};

#define POSITIONS 4 /* three are needed; a power of two */

struct alignas(16) loss_shared {
    struct row_shared row;
    struct loss_scalars scalars;
    struct cuda_loss_position positions[POSITIONS]; /* the row's and the next two's, by turns */
};

/* A row as a thread sees it. */
struct loss_row {
    struct row_block block;
    struct loss_scalars *scalars;
    struct row_slice z, zt;
    float max, max_t;
    row_key_t bound; /* members' keys are no smaller */
};

struct loss_term {
    float us, es, gap, et; /* gap = ut - us */
};

static __device__ __forceinline__ struct loss_term term_of(float z, float zt, float max,
                                                           float max_t)
{
    struct loss_term term;
    float ut = zt - max_t;

    term.us = z - max;
    term.gap = ut - term.us;
    term.es = expf(term.us);
    term.et = expf(ut);
    return term;
}

/* --- passes 1 and 2 --- */

static __device__ __forceinline__ void find_maxima(struct loss_row *row)
{
    struct row_sums sums = row_nothing();

    for (int i = 4 * (int)threadIdx.x; i < row->block.count; i += 4 * (int)blockDim.x) {
        float4 z = row_quad(&row->z, i), zt = row_quad(&row->zt, i);

        sums.max[0] = fmaxf(sums.max[0], fmaxf(fmaxf(z.x, z.y), fmaxf(z.z, z.w)));
        sums.max[1] = fmaxf(sums.max[1], fmaxf(fmaxf(zt.x, zt.y), fmaxf(zt.z, zt.w)));
    }
    sums = row_fold(&row->block, sums, FOLD_MAX);
    row->max = sums.max[0];
    row->max_t = sums.max[1];
}

/* Adds four elements up in float and adds that to the sums in double. In their place it leaves es
 * and, for forward and reverse KL, the x of the gradient's a x + c es: there x follows from the
 * element alone. */
static __device__ __forceinline__ void add_terms(const struct loss_row *row, float z[4],
                                                 float zt[4], enum loss_form form, float scale,
                                                 struct row_sums *sums)
{
    float s_us = 0, t_less = 0, s_less = 0;

    for (int k = 0; k < 4; k++) {
        struct loss_term term = term_of(z[k], zt[k], row->max, row->max_t);
        float s_gap = term.es != 0 ? term.es * term.gap : 0.0F;

        sums->mass[0] += to_mass(term.es, scale);
        sums->mass[1] += to_mass(term.et, scale);
        s_us += term.es != 0 ? term.es * term.us : 0.0F;
        t_less += term.et != 0 ? term.et * term.gap : 0.0F;
        s_less -= s_gap;
        z[k] = term.es;
        zt[k] = form == FORM_FORWARD ? term.et : -s_gap;
    }
    sums->sum[0] += (double)s_us;
    sums->sum[1] += (double)t_less;
    sums->sum[2] += (double)s_less;
}

#define LOSS_FOLD (FOLD_MASS | FOLD_SUM | FOLD_MORE)

/* By the first warp: even lanes work with s, odd ones with t. */
static __device__ __forceinline__ void set_scalars(const struct loss_row *row,
                                                   const struct row_sums &sums, float scale)
{
    struct loss_scalars *ret = row->scalars;
    int lane = (int)threadIdx.x & 31;
    /* A NaN among the terms is a NaN in these sums, and integers do not show it. */
    double s = from_mass(sums.mass[0], scale, isnan(sums.sum[0]));
    double t = from_mass(sums.mass[1], scale, isnan(sums.sum[1]));
    double whole = lane & 1 ? t : s, logarithm = log(whole);
    double above = lane == 0   ? sums.sum[0]
                   : lane == 1 ? sums.sum[1]
                   : lane == 2 ? sums.sum[2]
                               : 1.0;
    double quotient = above / whole; /* lanes 3 and 4: inverses */

    if (lane == 0) {
        ret->s = s;
        ret->us = quotient;
        ret->log_s = logarithm;
        ret->lse = (double)row->max + logarithm;
        ret->a = ret->c = ret->at_token = ret->center = 0;
        ret->mass_s = ret->mass_t = 0;
        ret->held = false;
    }
    if (lane == 1) {
        ret->t = t;
        ret->gap_t = quotient;
        ret->log_t = logarithm;
        ret->lse_t = (double)row->max_t + logarithm;
    }
    if (lane == 2)
        ret->gap_s = quotient;
    if (lane == 3)
        ret->inverse_t = quotient;
    if (lane == 4)
        ret->inverse_s = quotient;
    __syncwarp();
}

/* Where the slice lies in shared memory and the form is forward or reverse KL, es and x replace the
 * logits there: the gradient needs no exponentials then. */
template <bool TOP_K, bool RESIDENT>
static __device__ __forceinline__ void measure(struct loss_row *row, const struct loss_args *args)
{
    enum loss_form form = TOP_K ? FORM_NONE : args->form;
    bool store = RESIDENT && (form == FORM_FORWARD || form == FORM_REVERSE);
    float scale = args->mass_scale;
    struct row_sums sums = row_nothing();

    for (int i = 4 * (int)threadIdx.x; i < row->block.count; i += 4 * (int)blockDim.x) {
        float4 z4 = row_quad(&row->z, i), zt4 = row_quad(&row->zt, i);
        float z[4] = {z4.x, z4.y, z4.z, z4.w}, zt[4] = {zt4.x, zt4.y, zt4.z, zt4.w};

        add_terms(row, z, zt, form, scale, &sums);
        if (store) {
            *(float4 *)(row->z.values + i) = make_float4(z[0], z[1], z[2], z[3]);
            *(float4 *)(row->zt.values + i) = make_float4(zt[0], zt[1], zt[2], zt[3]);
        }
    }
    row_send(&row->block, &sums, LOSS_FOLD);
    if (threadIdx.x < 32)
        set_scalars(row, row_take(&row->block, LOSS_FOLD), scale);
    if (form == FORM_NONE || form == FORM_JSD)
        __syncthreads(); /* the next pass reads the scalars */
}

/* KL(T||S) = sum T (log T - log S), with log T - log S = (ut - us) - log sum et + log sum es. */
static __device__ double forward_kl(const struct loss_scalars *s)
{
    return s->gap_t - s->log_t + s->log_s;
}

/* --- the whole vocabulary --- */

struct jsd_scalars {
    float keep, mix, shift; /* 1 - alpha, alpha, log(sum es / sum et) */
};

static __device__ __forceinline__ struct jsd_scalars jsd_of(const struct loss_row *row, float alpha)
{
    struct jsd_scalars jsd = {(float)(1.0 - (double)alpha), alpha,
                              (float)(row->scalars->log_s - row->scalars->log_t)};

    return jsd;
}

/* es log(S/M); *t_log: et log(T/M). */
static __device__ __forceinline__ float jsd_term(const struct jsd_scalars *jsd,
                                                 const struct loss_term *term, float *t_log)
{
    float g = fminf(fmaxf(term->gap + jsd->shift, -EXPONENT_MAX), EXPONENT_MAX);
    float log_m = logf(fmaf(jsd->mix, expf(g), jsd->keep)); /* log(M/S) */

    *t_log = term->et != 0 ? term->et * (g - log_m) : 0.0F;
    return term->es != 0 ? -term->es * log_m : 0.0F;
}

/* Where the slice lies in shared memory, es and es log(S/M) replace the logits there. */
template <bool RESIDENT>
static __device__ __forceinline__ void jensen_shannon_rows(struct loss_row *row, float alpha)
{
    struct jsd_scalars jsd = jsd_of(row, alpha);
    struct row_sums sums = row_nothing();
    struct loss_scalars *ret = row->scalars;

    for (int i = 4 * (int)threadIdx.x; i < row->block.count; i += 4 * (int)blockDim.x) {
        float4 z4 = row_quad(&row->z, i), zt4 = row_quad(&row->zt, i);
        float z[4] = {z4.x, z4.y, z4.z, z4.w}, zt[4] = {zt4.x, zt4.y, zt4.z, zt4.w};
        float x_sum = 0, t_sum = 0;

        for (int k = 0; k < 4; k++) {
            struct loss_term term = term_of(z[k], zt[k], row->max, row->max_t);
            float t_log;

            z[k] = term.es;
            zt[k] = jsd_term(&jsd, &term, &t_log);
            x_sum += zt[k];
            t_sum += t_log;
        }
        sums.sum[0] += (double)x_sum;
        sums.sum[1] += (double)t_sum;
        if (RESIDENT) {
            *(float4 *)(row->z.values + i) = make_float4(z[0], z[1], z[2], z[3]);
            *(float4 *)(row->zt.values + i) = make_float4(zt[0], zt[1], zt[2], zt[3]);
        }
    }
    row_send(&row->block, &sums, FOLD_SUM);
    if (threadIdx.x < 32) {
        double keep = 1.0 - (double)alpha, part_s, part_t;
        bool odd = threadIdx.x & 1;

        sums = row_take(&row->block, FOLD_SUM);
        part_s = (odd ? sums.sum[1] : sums.sum[0]) / (odd ? ret->t : ret->s);
        part_t = __shfl_sync(ALL_LANES, part_s, 1);
        if (threadIdx.x == 0) {
            ret->divergence = keep * part_s + (double)alpha * part_t;
            ret->a = keep * ret->inverse_s;
            ret->c = -ret->a * part_s;
        }
    }
}

/* D and its gradient's scalars over the whole vocabulary, by thread 0:
 *   alpha = 0: dD/dz = S - T
 *   alpha = 1: dD/dz = S (log(S/T) - KL(S||T))
 *   else       dD/dz = (1-alpha) S (log(S/M) - KL(S||M)) */
template <bool RESIDENT>
static __device__ __forceinline__ void full_vocabulary(struct loss_row *row,
                                                       const struct loss_args *args)
{
    struct loss_scalars *ret = row->scalars;

    if (args->form == FORM_JSD) {
        jensen_shannon_rows<RESIDENT>(row, args->config.alpha);
        return;
    }
    if (threadIdx.x == 0 && args->form == FORM_FORWARD) {
        ret->divergence = forward_kl(ret);
        ret->a = -ret->inverse_t;
        ret->c = ret->inverse_s;
    }
    if (threadIdx.x == 0 && args->form == FORM_REVERSE) {
        ret->divergence = ret->gap_s - ret->log_s + ret->log_t;
        ret->a = ret->inverse_s;
        ret->c = -ret->a * ret->gap_s;
    }
}

/* --- the top K, as buckets --- */

/* One bucket's part of (1-a) KL(S||M) + a KL(T||M); *slope: g S = (1-a) S log(S/M). */
static __device__ double jensen_shannon(double alpha, double log_s, double log_t, double *slope)
{
    double s = exp(log_s);
    double t = exp(log_t);
    double log_m = log((1 - alpha) * s + alpha * t);
    double part_s = s == 0 ? 0.0 : (1 - alpha) * s * (log_s - log_m);
    double part_t = t == 0 ? 0.0 : alpha * t * (log_t - log_m);

    *slope = part_s;
    return part_s + part_t;
}

/* One bucket's part of D; *slope: g S. */
static __device__ __noinline__ double diverge(double alpha, double log_s, double log_t,
                                              double *slope)
{
    double s;
    double t;
    double part;

    if (alpha > 0 && alpha < 1)
        return jensen_shannon(alpha, log_s, log_t, slope);
    s = exp(log_s);
    t = exp(log_t);
    if (alpha == 0) {
        *slope = -t;
        return t == 0 ? 0.0 : t * (log_t - log_s);
    }
    part = s == 0 ? 0.0 : s * (log_s - log_t);
    *slope = part + s;
    return part;
}

static __device__ bool is_member(const struct loss_row *row, const struct row_slice *by, int i)
{
    return row_key(by->values[i], by->begin + i) >= row->bound;
}

static __device__ void select_top(struct loss_row *row, const struct row_slice *by, int count,
                                  int vocab, struct digit_bins<unsigned> *bins)
{
    struct row_values values = {};

    row->bound = 0;
    if (count >= vocab)
        return;
    values.values = by->values;
    values.begin = by->begin;
    values.count = by->count;
    row->bound = select_key(&row->block, bins, &values, (unsigned)count, 0.0F, false);
}

/* The log of a tail's mass. `sum` is over what lies outside of the top K: unlike 1 - their mass, it
 * is exact even where the top K hold nearly all. */
static __device__ double tail_log_mass(double sum, double whole, bool *held)
{
    double mass = sum / whole;

    *held = mass < -expm1(TAIL_LOG_MAX);
    return log(*held ? -expm1(TAIL_LOG_MAX) : mass);
}

/* sum[0 … 3]: the tail's es and et, the members' parts of D and of the center. */
static __device__ void student_topk(struct loss_row *row, double alpha)
{
    struct loss_scalars *ret = row->scalars;
    struct row_sums sums = row_nothing();
    double lse = ret->lse, lse_t = ret->lse_t, part;
    bool held_t;

    for (int i = (int)threadIdx.x; i < row->block.count; i += (int)blockDim.x) {
        float z = row->z.values[i], zt = row->zt.values[i];

        if (is_member(row, &row->z, i)) {
            sums.sum[2] += diverge(alpha, (double)z - lse, (double)zt - lse_t, &part);
            sums.sum[3] += part;
        } else {
            sums.sum[0] += (double)expf(z - row->max);
            sums.sum[1] += (double)expf(zt - row->max_t);
        }
    }
    sums = row_fold(&row->block, sums, FOLD_SUM | FOLD_MORE);
    if (threadIdx.x == 0) {
        double log_s = tail_log_mass(sums.sum[0], ret->s, &ret->held);
        double log_t = tail_log_mass(sums.sum[1], ret->t, &held_t);

        ret->divergence = diverge(alpha, log_s, log_t, &part) + sums.sum[2];
        ret->center = (ret->held ? 0.0 : part) + sums.sum[3];
        ret->c = ((ret->held ? 0.0 : part / exp(log_s)) - ret->center) / ret->s;
    }
    __syncthreads();
}

/* D = stopgrad(log S_y - tau_y) log S_y, as in sdpo/buckets.c */
static __device__ void token_form(const struct loss_row *row, float z, float zt, int token)
{
    struct loss_scalars *ret = row->scalars;
    double log_s = (double)z - ret->lse;
    double tau = row_key(zt, token) >= row->bound ? (double)zt - ret->lse_t : TEACHER_FLOOR;
    double gap = log_s - tau;

    ret->divergence = gap * log_s;
    ret->at_token = gap;
    ret->c = -gap / ret->s;
}

/* Student and teacher renormalised over the members: first their masses, then the divergence. */
static __device__ void renormalised_form(struct loss_row *row, double alpha)
{
    struct loss_scalars *ret = row->scalars;
    struct row_sums sums = row_nothing();
    double lse = ret->lse, lse_t = ret->lse_t, part;

    for (int i = (int)threadIdx.x; i < row->block.count; i += (int)blockDim.x)
        if (is_member(row, &row->zt, i)) {
            sums.sum[0] += exp((double)row->z.values[i] - lse);
            sums.sum[1] += exp((double)row->zt.values[i] - lse_t);
        }
    sums = row_fold(&row->block, sums, FOLD_SUM);
    if (threadIdx.x == 0) {
        ret->held = sums.sum[0] < MASS_MIN;
        ret->mass_s = log(ret->held ? MASS_MIN : sums.sum[0]);
        ret->mass_t = log(sums.sum[1] < MASS_MIN ? MASS_MIN : sums.sum[1]);
    }
    __syncthreads();
    lse += ret->mass_s;
    lse_t += ret->mass_t;
    sums = row_nothing();
    for (int i = (int)threadIdx.x; i < row->block.count; i += (int)blockDim.x)
        if (is_member(row, &row->zt, i)) {
            sums.sum[0] += jensen_shannon(alpha, (double)row->z.values[i] - lse,
                                          (double)row->zt.values[i] - lse_t, &part);
            sums.sum[1] += part;
        }
    sums = row_fold(&row->block, sums, FOLD_SUM);
    if (threadIdx.x == 0) {
        ret->divergence = sums.sum[0];
        ret->center = sums.sum[1];
        /* Held: S_k is divided by a constant, and so depends on logits of no member, too. */
        ret->c = ret->held ? -ret->center / ret->s : 0.0;
    }
    __syncthreads();
}

static __device__ void top_k(struct loss_row *row, const struct loss_args *args, int token, float z,
                             float zt, struct digit_bins<unsigned> *bins)
{
    double alpha = (double)args->config.alpha;

    if (args->config.variant == CLAAS_LOSS_STUDENT_TOPK_TAIL) {
        select_top(row, &row->z, args->top_k, args->plan.vocab, bins);
        student_topk(row, alpha);
        return;
    }
    if (alpha == 0) { /* M = S: the Python system's alpha = 0 teaches nothing; kept for parity */
        if (threadIdx.x == 0)
            row->scalars->divergence = 0;
        __syncthreads();
        return;
    }
    select_top(row, &row->zt, args->top_k, args->plan.vocab, bins);
    if (alpha < 1) {
        renormalised_form(row, alpha);
        return;
    }
    if (threadIdx.x == 0)
        token_form(row, z, zt, token);
    __syncthreads();
}

/* --- scalars of the loss --- */

/* fmin/fmax would turn NaN into a number. */
static __device__ double clamp_log_ratio(double x)
{
    return x > LOG_RATIO_MAX ? LOG_RATIO_MAX : x < -LOG_RATIO_MAX ? -LOG_RATIO_MAX : x;
}

/* What the loss needs of log S_y: the exponentials of its difference from the log-prob at sampling,
 * clamped, and of that from the base's, clamped (k3) and not (k3's derivative). */
struct loss_ratios {
    double x, clamped; /* k3's argument */
    double ratio, exp_clamped, exp_x;
};

/* By a warp: a lane for each exponential. */
static __device__ __forceinline__ struct loss_ratios
ratios_of(const struct claas_loss_config *config, const struct cuda_loss_position *position,
          float logprob)
{
    struct loss_ratios ret = {};
    double sign = config->reference_k3 ? 1.0 : -1.0, mine;
    int lane = (int)threadIdx.x & 31;

    ret.x = sign * ((double)logprob - (double)position->base);
    ret.clamped = clamp_log_ratio(ret.x);
    mine = clamp_log_ratio((double)logprob - (double)position->rollout);
    if (config->is_clip == 0 && !(config->kl_weight > 0))
        return ret;
    mine = exp(lane == 0 ? mine : lane == 1 ? ret.clamped : ret.x);
    ret.ratio = __shfl_sync(ALL_LANES, mine, 0);
    ret.exp_clamped = __shfl_sync(ALL_LANES, mine, 1);
    ret.exp_x = __shfl_sync(ALL_LANES, mine, 2);
    return ret;
}

static __device__ void weigh_ratio(const struct claas_loss_config *config, float rollout,
                                   double ratio, struct claas_loss_result *ret)
{
    ret->ratio = 1.0F;
    ret->clipped = 0.0F;
    if (config->is_clip == 0 || isnan(rollout))
        return;
    if (ratio >= (double)config->is_clip) {
        ratio = (double)config->is_clip;
        ret->clipped = 1.0F;
    }
    ret->ratio = (float)ratio;
}

/* Sets k3 and returns its derivative by log S_y: 0 outside of the clamp, where k3 is constant. */
static __device__ double kl_to_base(const struct claas_loss_config *config,
                                    const struct loss_ratios *by, struct claas_loss_result *ret)
{
    double sign = config->reference_k3 ? 1.0 : -1.0;

    ret->kl_base = 0.0F;
    if (!(config->kl_weight > 0))
        return 0.0;
    ret->kl_base = (float)(by->exp_clamped - 1.0 - by->clamped);
    return by->x != by->clamped && !isnan(by->x) ? 0.0 : sign * (by->exp_x - 1.0);
}

/* By the first warp of each block: the scalars that the gradient needs and, for thread 0, the
 * result. */
static __device__ void finish(const struct loss_row *row, const struct claas_loss_config *config,
                              const struct cuda_loss_position *position, float z_token,
                              struct claas_loss_result *ret)
{
    struct loss_scalars *s = row->scalars;
    struct loss_ratios by;
    double slope_k3;

    __syncwarp(); /* thread 0 may have set scalars just before */
    ret->logprob = z_token - row_lse(row->max, s->log_s);
    by = ratios_of(config, position, ret->logprob);
    if (threadIdx.x != 0)
        return;
    ret->entropy = (float)(s->log_s - s->us);
    ret->forward_kl = (float)forward_kl(s);
    /* Masked terms must not hide a NaN or infinity in the logits. */
    if (!isfinite(s->lse) || !isfinite(s->lse_t))
        s->divergence = (double)NAN;
    weigh_ratio(config, position->rollout, by.ratio, ret);
    slope_k3 = kl_to_base(config, &by, ret);
    ret->divergence = position->teacher ? (float)s->divergence : NAN;
    ret->loss =
        (float)((double)ret->ratio * s->divergence +
                (config->kl_weight > 0 ? (double)config->kl_weight * (double)ret->kl_base : 0.0));
    s->weight = (double)position->weight * (double)ret->ratio;
    slope_k3 *= (double)position->weight * (double)config->kl_weight;
    s->kept = -slope_k3 * s->inverse_s;
    s->grad_a = (float)(s->weight * s->a);
    s->grad_c = (float)(s->weight * s->c + s->kept);
    s->grad_token = (float)(s->weight * s->at_token + slope_k3);
}

/* --- pass 4: the gradient --- */

static __device__ __forceinline__ void put_quad(float *to, const float v[4])
{
    *(float4 *)to = make_float4(v[0], v[1], v[2], v[3]);
}
static __device__ __forceinline__ void put_quad(bf16 *to, const float v[4])
{
    *(uint2 *)to = make_uint2(pack_pair(v[0], v[1]), pack_pair(v[2], v[3]));
}

/* es of an element, from its logits; *x: the x that goes with it. */
static __device__ __forceinline__ float gradient_term(const struct loss_row *row,
                                                      enum loss_form form,
                                                      const struct jsd_scalars *jsd, float z,
                                                      float zt, float *x)
{
    struct loss_term term;
    float t_log;

    term.us = z - row->max;
    term.es = expf(term.us);
    *x = 0;
    if (form == FORM_NONE)
        return term.es;
    term.gap = (zt - row->max_t) - term.us;
    term.et = form == FORM_FORWARD ? expf(zt - row->max_t) : 0.0F;
    *x = form == FORM_FORWARD   ? term.et
         : form == FORM_REVERSE ? (term.es != 0 ? -term.es * term.gap : 0.0F)
                                : jsd_term(jsd, &term, &t_log);
    return term.es;
}

/* Starts the copy of four elements of the next row, unless that is NULL, over those done with. */
static __device__ __forceinline__ void fetch_quad(const struct row_slice *slice, const float *next,
                                                  int i)
{
    if (next)
        copy_16(slice->values + i, next + i, true);
}

/* out: the block's part of the gradient's row; next_z, next_zt: its parts of the next row, or NULL.
 * Over the whole vocabulary, shared memory holds es and x by now. */
template <bool TOP_K, bool RESIDENT, typename Act>
static __device__ __forceinline__ void
write_gradient(const struct loss_row *row, const struct loss_args *args, int token, Act *out,
               const float *next_z, const float *next_zt)
{
    float a = row->scalars->grad_a, c = row->scalars->grad_c, extra = row->scalars->grad_token;
    struct jsd_scalars jsd = jsd_of(row, args->config.alpha);
    enum loss_form form = TOP_K ? FORM_NONE : args->form;
    constexpr bool stored = RESIDENT && !TOP_K;

    token -= row->block.begin;
    for (int i = 4 * (int)threadIdx.x; i < row->block.count; i += 4 * (int)blockDim.x) {
        float4 z4 = row_quad(&row->z, i), zt4 = TOP_K ? z4 : row_quad(&row->zt, i);
        float z[4] = {z4.x, z4.y, z4.z, z4.w}, zt[4] = {zt4.x, zt4.y, zt4.z, zt4.w}, grad[4];

        for (int k = 0; k < 4; k++) {
            float x = zt[k], es = z[k];

            if (!stored)
                es = gradient_term(row, form, &jsd, z[k], zt[k], &x);
            grad[k] = TOP_K ? c * es : a * x + c * es;
            grad[k] += i + k == token ? extra : 0.0F;
        }
        if (args->quads_out)
            put_quad(out + i, grad);
        else
            for (int k = 0; k < 4 && i + k < row->block.count; k++)
                narrow(out + i + k, grad[k]);
        fetch_quad(&row->z, next_z, i);
        fetch_quad(&row->zt, next_zt, i);
    }
}

/* The gradient of the top K's members, over what write_gradient() left there. With a tail bucket it
 * replaces D's c es: to correct that instead would be to subtract large numbers. */
template <typename Act>
static __device__ void patch_members(const struct loss_row *row, const struct loss_args *args,
                                     int token, Act *out)
{
    bool tail = args->config.variant == CLAAS_LOSS_STUDENT_TOPK_TAIL;
    const struct loss_scalars *s = row->scalars;
    const struct row_slice *by = tail ? &row->z : &row->zt;
    double alpha = (double)args->config.alpha, part;

    __syncthreads();
    for (int i = (int)threadIdx.x; i < row->block.count; i += (int)blockDim.x) {
        float z = row->z.values[i], zt = row->zt.values[i], es, grad;
        double log_s, log_t;

        if (!is_member(row, by, i))
            continue;
        es = expf(z - row->max);
        log_s = (double)z - s->lse - s->mass_s;
        log_t = (double)zt - s->lse_t - s->mass_t;
        if (tail)
            diverge(alpha, log_s, log_t, &part);
        else
            jensen_shannon(alpha, log_s, log_t, &part);
        part = !tail && s->held ? part : part - exp(log_s) * s->center;
        grad = (float)((tail ? s->kept * (double)es : (double)(s->grad_c * es)) + s->weight * part);
        narrow(out + i, grad + (row->block.begin + i == token ? s->grad_token : 0.0F));
    }
}

/* --- kernels --- */

/* Sets up the slices of student and teacher, in shared memory and with the copy under way if
 * RESIDENT. z, zt: the block's part of the row. */
template <bool RESIDENT>
static __device__ __forceinline__ void fetch(struct loss_row *row, const struct loss_args *args,
                                             const float *z, const float *zt, float *memory)
{
    const struct row_block *block = &row->block;

    row->z.begin = row->zt.begin = block->begin;
    row->z.count = row->zt.count = block->count;
    row->z.quads = row->zt.quads = RESIDENT || args->quads;
    row->z.values = RESIDENT ? memory : (float *)z;
    row->zt.values = RESIDENT ? memory + args->plan.slice : (float *)zt;
    if (!RESIDENT)
        return;
    row_fetch(z, block->count, args->quads, row->z.values);
    row_fetch(zt, block->count, args->quads, row->zt.values);
}

/* Whether the top K's members have a patch: not where only the token, or nothing, is taught. */
static __device__ __forceinline__ bool has_patch(const struct claas_loss_config *config)
{
    return config->variant == CLAAS_LOSS_STUDENT_TOPK_TAIL ||
           (config->alpha > 0 && config->alpha < 1);
}

#define POSITION_WORDS (int)(sizeof(struct cuda_loss_position) / 4)

/* Starts the copy of a row's position, if there is such a row. By all threads. */
static __device__ __forceinline__ void fetch_position(const struct loss_args *args, int index,
                                                      struct cuda_loss_position *to)
{
    const int32_t *from = (const int32_t *)(args->positions + index);
    int word = (int)threadIdx.x;

    if (word < POSITION_WORDS && index < args->rows)
        __pipeline_memcpy_async((int32_t *)to + word, from + word, 4);
}

/* The block's part of a row, the teacher's if `taught`, else the student's; the latter also stands
 * in where a position has no teacher. */
static __device__ __forceinline__ const float *
part_of(const struct loss_args *args, const struct row_block *block, int index, bool taught)
{
    return (taught ? args->teacher : args->student) + (size_t)index * (size_t)args->plan.vocab +
           block->begin;
}

/* A row from the end of its copy to its result; it is row `index`, the cluster's n-th. next: the
 * number of the cluster's next row, or 0 if none is fetched ahead. Ends with a barrier. */
template <bool TOP_K, bool RESIDENT>
static __device__ __forceinline__ void
loss_of_row(struct loss_row *row, const struct loss_args *args, int index, int next, int n,
            struct loss_shared *shared)
{
    const struct cuda_loss_position *position = &shared->positions[n % POSITIONS];
    struct claas_loss_result result;
    float z_token = NAN, zt_token = NAN;
    int token;

    row_fetched();
    if (next && threadIdx.x == blockDim.x - 1) {
        bool taught = shared->positions[(n + 1) % POSITIONS].teacher;

        row_prefetch(part_of(args, &row->block, next, false), row->block.count);
        if (taught)
            row_prefetch(part_of(args, &row->block, next, true), row->block.count);
    }
    if (next) /* of the row after that; behind row_fetched's barrier, since its place is reused */
        fetch_position(args, next + next - index, &shared->positions[(n + 2) % POSITIONS]);
    token = position->token;
    if (threadIdx.x < 32 && token >= 0 && token < args->plan.vocab) {
        int at = token - row->block.begin;

        z_token = part_of(args, &row->block, index, false)[at];
        zt_token = TOP_K ? part_of(args, &row->block, index, position->teacher)[at] : NAN;
    }
    find_maxima(row);
    measure<TOP_K, RESIDENT>(row, args);
    if constexpr (TOP_K)
        top_k(row, args, token, z_token, zt_token, (struct digit_bins<unsigned> *)(shared + 1));
    else
        full_vocabulary<RESIDENT>(row, args);
    if (threadIdx.x < 32)
        finish(row, &args->config, position, z_token, &result);
    if (threadIdx.x == 0 && row->block.rank == 0)
        args->results[index] = result;
    row_fetched(); /* that position is there, and all threads may read the scalars */
}

/* With args.ahead a cluster takes every step-th row, step being the number of clusters: a row's
 * copy begins while the gradient of the one before is written, comes from the L2, which was asked
 * for it a row ahead, and waits for no cluster to start. Else each row has its own cluster. TOP_K
 * is a template's parameter so that its doubles do not cost the other forms registers, RESIDENT so
 * that the compiler knows which memory the slices are in. */
template <typename Act, bool TOP_K, bool RESIDENT>
static __global__ void __launch_bounds__(1024, 1) loss_rows(const struct loss_args args)
{
    extern __shared__ __align__(16) unsigned char row_memory[];
    struct loss_shared *shared = (struct loss_shared *)row_memory;
    struct digit_bins<unsigned> *bins = (struct digit_bins<unsigned> *)(shared + 1);
    const int step = (int)gridDim.x / args.plan.blocks;
    int index = (int)blockIdx.x / args.plan.blocks;
    struct loss_row row = {};

    row.block = row_open(&args.plan, row_memory);
    row.scalars = &shared->scalars;
    fetch_position(&args, index, shared->positions);
    fetch_position(&args, index + step, shared->positions + 1);
    fetch<RESIDENT>(&row, &args, part_of(&args, &row.block, index, false),
                    part_of(&args, &row.block, index, args.positions[index].teacher),
                    (float *)(TOP_K ? bins + 1 : bins));
    row_meet(&row.block);
    row_fetched(); /* the loop looks at the next row's position */
    for (int n = 0, next = 0; n == 0 || next; n++, index = next) {
        next = !TOP_K && RESIDENT && args.ahead && index + step < args.rows ? index + step : 0;
        loss_of_row<TOP_K, RESIDENT>(&row, &args, index, next, n, shared);
        if (!args.dlogits)
            continue;
        Act *out = (Act *)args.dlogits + (size_t)index * (size_t)args.plan.vocab + row.block.begin;
        const int token = shared->positions[n % POSITIONS].token;
        const bool taught = next && shared->positions[(n + 1) % POSITIONS].teacher;

        write_gradient<TOP_K, RESIDENT>(&row, &args, token, out,
                                        next ? part_of(&args, &row.block, next, false) : NULL,
                                        next ? part_of(&args, &row.block, next, taught) : NULL);
        if constexpr (TOP_K)
            if (has_patch(&args.config))
                patch_members(&row, &args, token, out);
    }
    if (TOP_K && row.block.blocks > 1)
        row_sync(&row.block); /* a block's shared memory must outlive its readers */
}

struct logprob_args {
    struct row_plan plan;
    const float *logits;
    const int32_t *tokens;
    float *out;
    float mass_scale;
    bool quads;
};

template <bool RESIDENT>
static __global__ void __launch_bounds__(1024, 1) logprob_rows(const struct logprob_args args)
{
    extern __shared__ __align__(16) unsigned char row_memory[];
    size_t index = blockIdx.x / (unsigned)args.plan.blocks;
    const float *z = args.logits + index * (size_t)args.plan.vocab;
    struct row_block block = row_open(&args.plan, row_memory);
    struct row_slice slice = {(float *)(z + block.begin), block.begin, block.count, args.quads};
    int token = args.tokens[index];
    float max;
    double log_sum;

    if (RESIDENT) {
        slice.values = (float *)(row_memory + sizeof(struct row_shared));
        slice.quads = true;
        row_fetch(z + block.begin, block.count, args.quads, slice.values);
        row_fetched();
    }
    row_meet(&block);
    log_sum = row_measure(&block, &slice, args.mass_scale, &max);
    if (block.rank == 0 && threadIdx.x == 0)
        args.out[index] =
            token >= 0 && token < args.plan.vocab ? z[token] - row_lse(max, log_sum) : NAN;
}

/* --- host --- */

/* STUDENT_TOPK_TAIL with K >= V has no tail: it is the whole vocabulary. */
static void choose_form(struct loss_args *args)
{
    const struct claas_loss_config *config = &args->config;
    bool full =
        config->variant == CLAAS_LOSS_FULL ||
        (config->variant == CLAAS_LOSS_STUDENT_TOPK_TAIL && config->top_k >= args->plan.vocab);

    args->top_k = full ? 0 : config->top_k < args->plan.vocab ? config->top_k : args->plan.vocab;
    args->form = !full                ? FORM_NONE
                 : config->alpha == 0 ? FORM_FORWARD
                 : config->alpha == 1 ? FORM_REVERSE
                                      : FORM_JSD;
}

/* Plans the rows and launches the kernel that the plan asks for. */
template <typename Act, bool TOP_K>
static int launch_loss(struct cuda_context *context, struct loss_args *args)
{
    void (*kernel)(const struct loss_args) = loss_rows<Act, TOP_K, true>;
    size_t fixed = sizeof(struct loss_shared) + (TOP_K ? sizeof(struct digit_bins<unsigned>) : 0);
    int clusters = args->rows;
    int code = row_plan(context, (const void *)kernel, args->plan.vocab, 2, fixed, 1, &args->plan);

    if (code < 0)
        return code;
    if (!args->plan.resident)
        kernel = loss_rows<Act, TOP_K, false>;
    args->ahead = args->plan.resident && !TOP_K && args->quads && args->dlogits;
    if (args->ahead)
        code = row_clusters(context, (const void *)kernel, &args->plan, &clusters);
    return code < 0 ? code : row_launch(context, kernel, &args->plan, clusters, args, "the loss");
}

int cuda_loss(struct cuda_context *context, const struct claas_loss_config *config, int vocab,
              int rows, const float *student, const float *teacher,
              const struct cuda_loss_position *positions, void *dlogits,
              struct claas_loss_result *results)
{
    struct loss_args args = {};
    int code = claas_loss_check(config);

    if (code < 0 || rows <= 0)
        return code;
    args.plan.vocab = vocab;
    args.rows = rows;
    args.config = *config;
    choose_form(&args);
    args.student = student;
    args.teacher = teacher;
    args.positions = positions;
    args.dlogits = dlogits;
    args.results = results;
    args.mass_scale = row_mass_scale(vocab);
    args.quads = vocab % 4 == 0 && aligned16(student) && aligned16(teacher);
    args.quads_out = vocab % 4 == 0 && is_aligned(dlogits, 4 * context->act_bytes);
    if (context->act == CUDA_TYPE_BF16)
        return args.top_k > 0 ? launch_loss<bf16, true>(context, &args)
                              : launch_loss<bf16, false>(context, &args);
    return args.top_k > 0 ? launch_loss<float, true>(context, &args)
                          : launch_loss<float, false>(context, &args);
}

int cuda_logprobs(struct cuda_context *context, int vocab, int rows, const float *logits,
                  const int32_t *tokens, float *out)
{
    void (*kernel)(const struct logprob_args) = logprob_rows<true>;
    struct logprob_args args = {};
    int code;

    if (rows <= 0)
        return 0;
    code =
        row_plan(context, (const void *)kernel, vocab, 1, sizeof(struct row_shared), 1, &args.plan);
    if (code < 0)
        return code;
    args.logits = logits;
    args.tokens = tokens;
    args.out = out;
    args.mass_scale = row_mass_scale(vocab);
    args.quads = vocab % 4 == 0 && aligned16(logits);
    kernel = args.plan.resident ? kernel : logprob_rows<false>;
    return row_launch(context, kernel, &args.plan, rows, &args, "log-probs");
}
