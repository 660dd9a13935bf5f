/* The optimizer's operations in the fast tables; float32 in both precisions. Part of ops_fast.c. */
#ifndef CLAAS_CPU_OPTIM_FAST_H
#define CLAAS_CPU_OPTIM_FAST_H

struct sum_job {
    const float *x;
    size_t count, part;
    double sums[SUM_PARTS];
};

/* Sixteen sums side by side: the loop over j is one or two vector instructions. */
static void sum_part(void *arg, int index)
{
    struct sum_job *job = arg;
    const size_t first = (size_t)index * job->part;
    const size_t end = first + job->part < job->count ? first + job->part : job->count;
    double sums[16] = {0}, sum = 0;
    size_t i = first;

    for (; i + 16 <= end; i += 16)
        for (int j = 0; j < 16; j++)
            sums[j] += (double)job->x[i + j] * (double)job->x[i + j];
    for (int j = 0; i < end; i++, j++)
        sums[j] += (double)job->x[i] * (double)job->x[i];
    for (int j = 0; j < 16; j++)
        sum += sums[j];
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

struct adamw_job {
    const struct claas_adamw_args *a;
    float step_size, decay, correction2;
};

static void adamw_part(void *arg, int index)
{
    const struct adamw_job *job = arg;
    const struct claas_adamw_args *a = job->a;
    const size_t first = (size_t)index * ADAMW_PART;
    const size_t end = first + ADAMW_PART < a->count ? first + ADAMW_PART : a->count;
    const lanes beta1 = l_set1(a->beta1), rest1 = l_set1(1.0f - a->beta1);
    const lanes beta2 = l_set1(a->beta2), rest2 = l_set1(1.0f - a->beta2);
    const lanes decay = l_set1(job->decay), step_size = l_set1(job->step_size);
    const lanes correction2 = l_set1(job->correction2), eps = l_set1(a->eps);

    for (size_t i = first; i < end; i += 16) {
        const int n = end - i < 16 ? (int)(end - i) : 16;
        const lanes g = l_mul(l_read(a->grad + i, n), l_set1(a->grad_scale));
        const lanes m = l_add(l_mul(beta1, l_read(a->exp_avg + i, n)), l_mul(rest1, g));
        const lanes v =
            l_add(l_mul(beta2, l_read(a->exp_avg_sq + i, n)), l_mul(l_mul(rest2, g), g));
        const lanes root = l_add(l_div(l_sqrt(v), correction2), eps);
        const lanes step = l_div(l_mul(step_size, m), root);

        l_write(a->exp_avg + i, m, n);
        l_write(a->exp_avg_sq + i, v, n);
        l_write(a->parameters + i, l_sub(l_mul(l_read(a->parameters + i, n), decay), step), n);
    }
}

/* PyTorch's AdamW: decay first, then the bias-corrected step. The same operations in the same order
 * as the reference, so the same bits. */
static void adamw(claas_pool_t *pool, const struct claas_adamw_args *a)
{
    const float correction1 = (float)(1.0 - pow(a->beta1, (double)a->step));
    struct adamw_job job = {.a = a,
                            .step_size = a->rate / correction1,
                            .decay = 1.0f - a->rate * a->weight_decay,
                            .correction2 = (float)sqrt(1.0 - pow(a->beta2, (double)a->step))};

    claas_pool_run(pool, (int)((a->count + ADAMW_PART - 1) / ADAMW_PART), adamw_part, &job);
}

#endif
