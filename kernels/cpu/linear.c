/* A product with its LoRA terms: y = round(x W^T + S (sB)^T + bias + residual), S = round(x A^T),
 * for rows of any number of adapters. Three ways, chosen by shape and never visible in the result,
 * because each element's products are summed in one order (x W, then S B, then bias, then
 * residual):
 *
 *   plain  no LoRA: the fused weight in one call
 *   group  one adapter at a time: a call per part (module), LoRA in the same accumulators
 *   mixed  few rows: the weight is read once for all rows (of all adapters, and from the file's
 *          fused blocks), the LoRA products go on from the float accumulators */
#include "cpu/step.h"

/* The product at hand. */
struct linear {
    const struct cpu_pass *pass;
    const struct claas_pack *pack;
    const struct cpu_weight *weight;
    int layer;
    enum cpu_weight_kind kind;
    const void *x;        /* act [m][K] */
    void *s;              /* act [m][lds] */
    const void *residual; /* act [m][N] or NULL */
    void *out;            /* act [m][N] */
};

static bool has_lora(const struct linear *linear, const struct claas_pack_group *group)
{
    return group->adapter && group->adapter->layout.parts[linear->kind] > 0;
}

/* S = round(x A^T), group by group. */
static void lora_inputs(const struct linear *linear)
{
    const claas_backend_t *backend = linear->pass->backend;
    const struct cpu_weight *weight = linear->weight;
    int lds = linear->pass->lds[linear->kind];

    for (int g = 0; g < linear->pack->group_count; g++) {
        const struct claas_pack_group *group = &linear->pack->groups[g];
        struct claas_gemm_args args = {
            .m = group->count, .k = weight->k, .ldx = weight->k, .ldo = lds};

        if (!has_lora(linear, group))
            continue;
        args.n = group->adapter->layout.parts[linear->kind] * group->adapter->layout.rank;
        args.x = claas_cpu_at(backend->ops, linear->x, (size_t)group->first * (size_t)weight->k);
        args.w = claas_cpu_a_panels(group->adapter, linear->layer, linear->kind);
        args.out = claas_cpu_at(backend->ops, linear->s, (size_t)group->first * (size_t)lds);
        backend->ops->gemm(backend->pool, &args);
    }
}

/* Arguments for the frozen weight, or one part of it, over some rows; the caller adds LoRA and the
 * output. */
static struct claas_gemm_args frozen(const struct linear *linear, int first, int count,
                                     const struct cpu_part *part)
{
    const struct claas_ops *ops = linear->pass->backend->ops;
    const struct cpu_weight *weight = linear->weight;
    int row = part ? part->row : 0;
    struct claas_gemm_args args = {
        .m = count,
        .n = part ? part->n : weight->n,
        .k = weight->k,
        .x = claas_cpu_at(ops, linear->x, (size_t)first * (size_t)weight->k),
        .ldx = weight->k,
        .w = (const uint8_t *)weight->panels + claas_panel_bytes(ops->precision, row, weight->k),
        .blocks = part && weight->part_count > 1 ? part->blocks : weight->blocks,
        .ldo = weight->n,
    };

    return args;
}

static void add_lora(const struct linear *linear, const struct claas_pack_group *group,
                     const struct cpu_part *part, struct claas_gemm_args *args)
{
    const struct claas_ops *ops = linear->pass->backend->ops;
    const struct cpu_lora_layout *layout = &group->adapter->layout;
    int lds = linear->pass->lds[linear->kind], index = layout->index[part->module];

    args->lora_s = claas_cpu_at(
        ops, linear->s, (size_t)group->first * (size_t)lds + (size_t)(index * layout->rank));
    args->lds = lds;
    args->lora_b = claas_cpu_b_panels(group->adapter, linear->layer, part->module);
    args->r = layout->rank;
}

/* Where the result goes, and what is added to it: rows from `first`, columns from `row` on. */
static void finish_args(const struct linear *linear, int first, int row,
                        struct claas_gemm_args *args)
{
    const struct claas_ops *ops = linear->pass->backend->ops;
    size_t place = (size_t)first * (size_t)linear->weight->n + (size_t)row;

    args->out = claas_cpu_at(ops, linear->out, place);
    if (linear->residual)
        args->residual = claas_cpu_at(ops, linear->residual, place);
    if (linear->weight->bias)
        args->bias = linear->weight->bias + row;
}

/* All of a weight at once: no LoRA anywhere. */
static void linear_plain(const struct linear *linear, int first, int count)
{
    const claas_backend_t *backend = linear->pass->backend;
    struct claas_gemm_args args = frozen(linear, first, count, NULL);

    finish_args(linear, first, 0, &args);
    backend->ops->gemm(backend->pool, &args);
}

/* Part by part, the LoRA product in the same accumulators. */
static void linear_group(const struct linear *linear, const struct claas_pack_group *group)
{
    const claas_backend_t *backend = linear->pass->backend;

    if (!has_lora(linear, group)) {
        linear_plain(linear, group->first, group->count);
        return;
    }
    for (int i = 0; i < linear->weight->part_count; i++) {
        const struct cpu_part *part = &linear->weight->parts[i];
        struct claas_gemm_args args = frozen(linear, group->first, group->count, part);

        if (group->adapter->layout.index[part->module] >= 0)
            add_lora(linear, group, part, &args);
        finish_args(linear, group->first, part->row, &args);
        backend->ops->gemm(backend->pool, &args);
    }
}

/* round(acc + bias + residual) of one row of the mixed way. */
static void finish_row(void *arg, int row)
{
    const struct linear *linear = arg;
    const struct claas_ops *ops = linear->pass->backend->ops;
    const struct cpu_weight *weight = linear->weight;
    size_t n = (size_t)weight->n, place = (size_t)row * n;
    float *acc = linear->pass->mixed + place;

    for (size_t i = 0; weight->bias && i < n; i++)
        acc[i] += weight->bias[i];
    if (linear->residual && ops->precision == CLAAS_PRECISION_BF16) {
        const claas_bf16 *residual = claas_cpu_at(ops, linear->residual, place);

        for (size_t i = 0; i < n; i++)
            acc[i] += claas_from_bf16(residual[i]);
    } else if (linear->residual) {
        const float *residual = claas_cpu_at(ops, linear->residual, place);

        for (size_t i = 0; i < n; i++)
            acc[i] += residual[i];
    }
    ops->to_act(acc, claas_cpu_at(ops, linear->out, place), n);
}

/* The rows of several adapters, or a few rows over the file's blocks: the frozen weight is read
 * once for all rows into float accumulators, every adapter's product goes on from there, and one
 * more walk finishes. */
static void linear_mixed(const struct linear *linear)
{
    const claas_backend_t *backend = linear->pass->backend;
    const struct cpu_weight *weight = linear->weight;
    bool by_part = !weight->blocks && weight->part_count > 1;

    for (int i = 0; i < (by_part ? weight->part_count : 1); i++) {
        const struct cpu_part *part = by_part ? &weight->parts[i] : NULL;
        struct claas_gemm_args args = frozen(linear, 0, linear->pack->m, part);

        args.out32 = linear->pass->mixed + (part ? part->row : 0);
        backend->ops->gemm(backend->pool, &args);
    }
    for (int g = 0; g < linear->pack->group_count; g++) {
        const struct claas_pack_group *group = &linear->pack->groups[g];

        for (int i = 0; i < weight->part_count && has_lora(linear, group); i++) {
            const struct cpu_part *part = &weight->parts[i];
            struct claas_gemm_args lora = {.m = group->count, .n = part->n, .ldo = weight->n};
            struct claas_gemm_args args = {.m = group->count, .n = part->n, .ldo = weight->n};

            if (group->adapter->layout.index[part->module] < 0)
                continue;
            add_lora(linear, group, part, &lora);
            args.x = lora.lora_s;
            args.ldx = lora.lds;
            args.w = lora.lora_b;
            args.k = lora.r;
            args.out32 = linear->pass->mixed + (size_t)group->first * (size_t)weight->n + part->row;
            args.accumulate = true;
            backend->ops->gemm(backend->pool, &args);
        }
    }
    if (linear->pack->m < 4)
        for (int row = 0; row < linear->pack->m; row++)
            finish_row((void *)(uintptr_t)linear, row);
    else
        claas_pool_run(backend->pool, linear->pack->m, finish_row, (void *)(uintptr_t)linear);
}

static void run_linear(const struct linear *linear)
{
    const struct claas_pack *pack = linear->pack;
    const struct cpu_weight *weight = linear->weight;
    bool lora = false, few = pack->m <= CPU_FEW_ROWS;

    for (int g = 0; g < pack->group_count; g++)
        lora = lora || has_lora(linear, &pack->groups[g]);
    if (lora)
        lora_inputs(linear);
    if (!lora && (weight->blocks || !few || !weight->parts[0].blocks))
        linear_plain(linear, 0, pack->m);
    else if (pack->group_count == 1 && (weight->part_count == 1 || !few))
        linear_group(linear, &pack->groups[0]);
    else if (pack->m <= CPU_MIXED_ROWS)
        linear_mixed(linear);
    else
        for (int g = 0; g < pack->group_count; g++)
            linear_group(linear, &pack->groups[g]);
}

void claas_cpu_linear(const struct cpu_pass *pass, const struct claas_pack *pack, int layer,
                      enum cpu_weight_kind kind, const void *x, void *s, const void *residual,
                      void *out)
{
    struct linear linear = {
        .pass = pass,
        .pack = pack,
        .weight = &pass->backend->model.layers[layer].weights[kind],
        .layer = layer,
        .kind = kind,
        .x = x,
        .s = s,
        .residual = residual,
        .out = out,
    };

    run_linear(&linear);
}
