/* The reference tables, "bf16-ref" and "f32-ref": the specification of every operation in plain C,
 * and what runs on a CPU without AVX2. The loops are in ops_ref_tmpl.h and ops_ref_attn_tmpl.h,
 * included once per precision; the optimizer, which is float32 in both, is here. */
#include <math.h>
#include <string.h>

#include "cpu/ops_impl.h"

struct sum_job {
    const float *x;
    size_t count, part;
    double sums[SUM_PARTS];
};

static void sum_part(void *arg, int index)
{
    struct sum_job *job = arg;
    const size_t first = (size_t)index * job->part;
    const size_t end = first + job->part < job->count ? first + job->part : job->count;
    double sum = 0;

    for (size_t i = first; i < end; i++)
        sum += (double)job->x[i] * (double)job->x[i];
    job->sums[index] = sum;
}

static double sum_squares(claas_pool_t *pool, const float *x, size_t count)
{
    struct sum_job job = {.x = x, .count = count, .part = sum_part_size(count)};
    const int parts = (int)((count + job.part - 1) / job.part);
    double sum = 0;

    claas_pool_run(pool, parts, sum_part, &job);
    for (int i = 0; i < parts; i++)
        sum += job.sums[i];
    return sum;
}

#define ADAMW_PART 8192

/* PyTorch's AdamW: decay first, then the bias-corrected step. */
static void adamw_part(void *arg, int index)
{
    const struct claas_adamw_args *a = arg;
    const size_t first = (size_t)index * ADAMW_PART;
    const size_t end = first + ADAMW_PART < a->count ? first + ADAMW_PART : a->count;
    const float correction1 = (float)(1.0 - pow(a->beta1, (double)a->step));
    const float correction2 = (float)sqrt(1.0 - pow(a->beta2, (double)a->step));
    const float step_size = a->rate / correction1, decay = 1.0f - a->rate * a->weight_decay;

    for (size_t i = first; i < end; i++) {
        const float g = a->grad[i] * a->grad_scale;
        const float m = a->beta1 * a->exp_avg[i] + (1.0f - a->beta1) * g;
        const float v = a->beta2 * a->exp_avg_sq[i] + (1.0f - a->beta2) * g * g;

        a->exp_avg[i] = m;
        a->exp_avg_sq[i] = v;
        a->parameters[i] =
            a->parameters[i] * decay - step_size * m / (sqrtf(v) / correction2 + a->eps);
    }
}

static void adamw(claas_pool_t *pool, const struct claas_adamw_args *args)
{
    claas_pool_run(pool, (int)((args->count + ADAMW_PART - 1) / ADAMW_PART), adamw_part,
                   (void *)args);
}

#define NAME(x)            x##_bf16
#define act                claas_bf16
#define LOAD(a)            claas_from_bf16(a)
#define STORE(x)           claas_to_bf16(x)
#define PANEL_ELEMENTS(k)  panel_elements_bf16(k)
#define PANEL_AT(lane, k)  panel_at_bf16(lane, k)
#define KEY_AT(hd, p, d)   key_at_bf16(hd, p, d)
#define VALUE_AT(hd, p, d) value_at_bf16(hd, p, d)
#define TABLE              claas_ops_bf16_ref
#define TABLE_NAME         "bf16-ref"
#define PRECISION          CLAAS_PRECISION_BF16
#include "cpu/ops_ref_attn_tmpl.h"
#include "cpu/ops_ref_tmpl.h"
#undef NAME
#undef act
#undef LOAD
#undef STORE
#undef PANEL_ELEMENTS
#undef PANEL_AT
#undef KEY_AT
#undef VALUE_AT
#undef TABLE
#undef TABLE_NAME
#undef PRECISION

#define NAME(x)            x##_f32
#define act                float
#define LOAD(a)            (a)
#define STORE(x)           (x)
#define PANEL_ELEMENTS(k)  panel_elements_f32(k)
#define PANEL_AT(lane, k)  panel_at_f32(lane, k)
#define KEY_AT(hd, p, d)   key_at_f32(hd, p, d)
#define VALUE_AT(hd, p, d) value_at_f32(hd, p, d)
#define TABLE              claas_ops_f32_ref
#define TABLE_NAME         "f32-ref"
#define PRECISION          CLAAS_PRECISION_F32
#include "cpu/ops_ref_attn_tmpl.h"
#include "cpu/ops_ref_tmpl.h"
