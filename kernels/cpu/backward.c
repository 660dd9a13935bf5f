/* Gradients of the LoRA matrices, layer by layer from the top. The frozen weights and norms have no
 * gradients; only the gradient of their input passes through them.
 *
 *   y   = x W^T + S (sB)^T       S = x A^T
 *   dS  = dY (sB)          d(B^T) += s S^T dY
 *   dA += dS^T x           dx = dY W + dS A
 *
 * The residual stream's gradient stays float32; what enters a product is rounded to act, as
 * activations are. Sums over rows run in the order of the rows, batches add up in their order. */
#include "cpu/train.h"

#include <math.h>
#include <string.h>

struct backward {
    claas_backend_t *backend;
    const struct claas_plan_batch *batch;
    struct cpu_step_space *space;
    const claas_backend_adapter_t *adapter;
    float *grad; /* of the layer at hand */
    int layer;
    int m; /* rows at hand: the tail's until the last layer's attention is reached, then all */
    const struct cpu_acts *acts;
};

/* --- a product --- */

static bool has_lora(const struct backward *bw, enum cpu_weight_kind kind)
{
    return bw->adapter->layout.parts[kind] > 0;
}

/* dS, rounded into ds_act, and the gradient of B, from dY [m][N]. */
static void lora_outer(const struct backward *bw, enum cpu_weight_kind kind, const void *dy)
{
    claas_backend_t *backend = bw->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_lora_layout *layout = &bw->adapter->layout;
    const struct cpu_weight *weight = &backend->model.layers[bw->layer].weights[kind];
    int m = bw->m, width = layout->parts[kind] * layout->rank;

    for (int i = 0; i < weight->part_count; i++) {
        const struct cpu_part *part = &weight->parts[i];
        int place = layout->index[part->module] * layout->rank;
        struct claas_gemm_dx_args ds = {
            .m = m,
            .n = part->n,
            .k = layout->rank,
            .dy = claas_cpu_at(ops, dy, (size_t)part->row),
            .ldy = weight->n,
            .ldx = width,
        };
        struct claas_gemm_tn_args db = {
            .m = m,
            .r = layout->rank,
            .k = part->n,
            .ldp = bw->space->pass.lds[kind],
            .x = ds.dy,
            .ldx = weight->n,
            .g = bw->grad + layout->b[part->module],
            .ldg = part->n,
            .scale = bw->adapter->scale,
            .accumulate = true,
        };

        if (place < 0)
            continue;
        ds.w = claas_cpu_b_panels(bw->adapter, bw->layer, part->module);
        ds.dx = bw->space->ds + place;
        db.p = claas_cpu_at(ops, bw->acts->s[kind], (size_t)place);
        ops->gemm_dx(backend->pool, &ds);
        ops->gemm_tn(backend->pool, &db);
    }
    claas_cpu_to_act(backend, bw->space->ds, bw->space->ds_act, (size_t)m * (size_t)width);
}

/* The gradient of A from dS and the product's input x [m][K]. */
static void lora_inner(const struct backward *bw, enum cpu_weight_kind kind, const void *x)
{
    const struct cpu_lora_layout *layout = &bw->adapter->layout;
    int k = bw->backend->model.layers[bw->layer].weights[kind].k;
    struct claas_gemm_tn_args da = {
        .m = bw->m,
        .r = layout->parts[kind] * layout->rank,
        .k = k,
        .p = bw->space->ds_act,
        .ldp = layout->parts[kind] * layout->rank,
        .x = x,
        .ldx = k,
        .g = bw->grad + layout->a[kind],
        .ldg = k,
        .scale = 1,
        .accumulate = true,
    };

    bw->backend->ops->gemm_tn(bw->backend->pool, &da);
}

/* dx [m][K] = dY W + dS A. */
static void input_gradient(const struct backward *bw, enum cpu_weight_kind kind, const void *dy,
                           float *dx)
{
    claas_backend_t *backend = bw->backend;
    const struct cpu_lora_layout *layout = &bw->adapter->layout;
    const struct cpu_weight *weight = &backend->model.layers[bw->layer].weights[kind];
    struct claas_gemm_dx_args args = {
        .m = bw->m,
        .n = weight->n,
        .k = weight->k,
        .dy = dy,
        .ldy = weight->n,
        .w = weight->panels,
        .dx = dx,
        .ldx = weight->k,
    };

    backend->ops->gemm_dx(backend->pool, &args);
    if (!has_lora(bw, kind))
        return;
    args.n = args.ldy = layout->parts[kind] * layout->rank;
    args.dy = bw->space->ds_act;
    args.w = claas_cpu_a_panels(bw->adapter, bw->layer, kind);
    args.accumulate = true;
    backend->ops->gemm_dx(backend->pool, &args);
}

/* --- attention --- */

static struct claas_attn_bwd_args attention_args(const struct backward *bw,
                                                 const struct claas_pack_run *run)
{
    const claas_backend_t *backend = bw->backend;
    const struct cpu_model *model = &backend->model;

    return (struct claas_attn_bwd_args){
        .heads = model->config.heads,
        .kv_heads = model->config.kv_heads,
        .head_dim = model->config.head_dim,
        .scale = 1.0f / sqrtf((float)model->config.head_dim),
        .kv = (const uint8_t *)bw->space->kv + (size_t)bw->layer * bw->space->pass.kv_layer_bytes,
        .kv_block_bytes = backend->kv_block_bytes,
        .count = run->pos + run->count,
        .blocks = run->blocks,
        .lddo = model->nq,
        .ldo = model->nq,
        .lddq = model->nqkv,
        .lddkv = model->nqkv,
    };
}

/* A run without a parent. */
static void whole_sequence(const struct backward *bw, const struct claas_pack_run *run)
{
    const struct claas_ops *ops = bw->backend->ops;
    const struct cpu_model *model = &bw->backend->model;
    struct claas_attn_bwd_args args = attention_args(bw, run);
    size_t first = (size_t)run->first, wide = first * (size_t)model->nqkv;

    args.q = claas_cpu_at(ops, bw->acts->qkv, wide);
    args.ldq = model->nqkv;
    args.out = claas_cpu_at(ops, bw->acts->attn, first * (size_t)model->nq);
    args.lse = bw->acts->lse + first * (size_t)model->config.heads;
    args.dout = claas_cpu_at(ops, bw->space->dattn_act, first * (size_t)model->nq);
    args.dq = bw->space->dwide + wide;
    args.dk = args.dq + model->nq;
    args.dv = args.dk + model->nk;
    ops->attention_bwd(bw->backend->pool, &args);
}

/* A branch: the whole sequence is put together, with zeros for the prompt's queries (a huge
 * log-sum-exp makes their probabilities zero), and its part of the gradient of the prompt's keys
 * and values is added to the parent's rows. */
static void branch_sequence(const struct backward *bw, const struct claas_pack_run *run)
{
    const struct claas_ops *ops = bw->backend->ops;
    const struct cpu_model *model = &bw->backend->model;
    struct cpu_step_space *space = bw->space;
    struct claas_attn_bwd_args args = attention_args(bw, run);
    const struct claas_pack_run *parent = &bw->batch->pack.runs[run->parent];
    size_t nq = (size_t)model->nq, nqkv = (size_t)model->nqkv, act = ops->act_bytes;
    size_t heads = (size_t)model->config.heads, pos = (size_t)run->pos, count = (size_t)run->count;
    size_t first = (size_t)run->first;

    memset(space->branch_q, 0, pos * nq * act);
    memset(space->branch_out, 0, pos * nq * act);
    memset(space->branch_dout, 0, pos * nq * act);
    for (size_t i = 0; i < pos * heads; i++)
        space->branch_lse[i] = 1e30f;
    for (size_t i = 0; i < count; i++)
        memcpy(claas_cpu_at(ops, space->branch_q, (pos + i) * nq),
               claas_cpu_at(ops, bw->acts->qkv, (first + i) * nqkv), nq * act);
    memcpy(claas_cpu_at(ops, space->branch_out, pos * nq),
           claas_cpu_at(ops, bw->acts->attn, first * nq), count * nq * act);
    memcpy(claas_cpu_at(ops, space->branch_dout, pos * nq),
           claas_cpu_at(ops, space->dattn_act, first * nq), count * nq * act);
    memcpy(space->branch_lse + pos * heads, bw->acts->lse + first * heads,
           count * heads * sizeof(float));
    args.q = space->branch_q;
    args.ldq = model->nq;
    args.out = space->branch_out;
    args.lse = space->branch_lse;
    args.dout = space->branch_dout;
    args.dq = space->branch_d;
    args.dk = args.dq + model->nq;
    args.dv = args.dk + model->nk;
    ops->attention_bwd(bw->backend->pool, &args);
    memcpy(space->dwide + first * nqkv, space->branch_d + pos * nqkv, count * nqkv * sizeof(float));
    for (size_t i = 0; i < pos; i++) {
        float *to = space->dwide + ((size_t)parent->first + i) * nqkv;

        for (size_t j = nq; j < nqkv; j++)
            to[j] += space->branch_d[i * nqkv + j];
    }
}

/* dattn_act -> dwide [m][Nqkv], before rotation and QK-norm. */
static void attention_backward(const struct backward *bw)
{
    claas_backend_t *backend = bw->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cpu_layer *weights = &model->layers[bw->layer];
    const struct claas_pack *pack = &bw->batch->pack;
    float *dqkv = bw->space->dwide;
    int raw = model->nq + model->nk;

    for (int i = 0; i < pack->run_count; i++) /* a parent comes before its branches */
        if (pack->runs[i].parent < 0)
            whole_sequence(bw, &pack->runs[i]);
        else
            branch_sequence(bw, &pack->runs[i]);
    if (!c->qk_norm) {
        ops->norm_rope_bwd(backend->pool, pack->m, c->heads + c->kv_heads, c->head_dim, dqkv,
                           model->nqkv, NULL, 0, NULL, NULL, model->cos_sin, pack->pos);
        return;
    }
    ops->norm_rope_bwd(backend->pool, pack->m, c->heads, c->head_dim, dqkv, model->nqkv,
                       bw->acts->qk_raw, raw, weights->norm_q, bw->acts->rstd_q, model->cos_sin,
                       pack->pos);
    ops->norm_rope_bwd(backend->pool, pack->m, c->kv_heads, c->head_dim, dqkv + model->nq,
                       model->nqkv, claas_cpu_at(ops, bw->acts->qk_raw, (size_t)model->nq), raw,
                       weights->norm_k, bw->acts->rstd_k, model->cos_sin, pack->pos);
}

/* --- a layer --- */

/* dx (after the layer) -> dx (before its MLP). */
static int mlp_backward(const struct backward *bw)
{
    claas_backend_t *backend = bw->backend;
    const struct claas_ops *ops = backend->ops;
    const struct claas_model_config *c = &backend->model.config;
    const struct cpu_acts *acts = bw->acts;
    struct cpu_step_space *space = bw->space;
    int m = bw->m, code;

    claas_cpu_to_act(backend, space->dx, space->dy_act, (size_t)m * (size_t)c->hidden);
    if (has_lora(bw, CPU_DOWN))
        lora_outer(bw, CPU_DOWN, space->dy_act);
    input_gradient(bw, CPU_DOWN, space->dy_act, space->dwide);
    ops->swiglu_bwd(backend->pool, m, c->intermediate, acts->gate_up, 2 * c->intermediate,
                    space->dwide, c->intermediate, space->dgu, 2 * c->intermediate, space->pass.h,
                    c->intermediate);
    if (has_lora(bw, CPU_DOWN))
        lora_inner(bw, CPU_DOWN, space->pass.h);
    code = claas_cpu_yield(&space->pass);
    if (code < 0)
        return code;
    ops->rmsnorm(backend->pool, m, c->hidden, acts->x_mid, c->hidden,
                 backend->model.layers[bw->layer].norm_mid, c->norm_eps, space->pass.xn, c->hidden,
                 NULL);
    if (has_lora(bw, CPU_GATE_UP)) {
        lora_outer(bw, CPU_GATE_UP, space->dgu);
        lora_inner(bw, CPU_GATE_UP, space->pass.xn);
    }
    input_gradient(bw, CPU_GATE_UP, space->dgu, space->dxn);
    ops->rmsnorm_bwd(backend->pool, m, c->hidden, acts->x_mid, c->hidden,
                     backend->model.layers[bw->layer].norm_mid, acts->rstd_mid, space->dxn,
                     c->hidden, space->dx, c->hidden);
    return claas_cpu_yield(&space->pass);
}

/* From the tail's rows to all rows of the batch; the gradient of the others is zero so far. */
static void spread_tail(struct backward *bw)
{
    claas_backend_t *backend = bw->backend;
    struct cpu_step_space *space = bw->space;
    size_t d = (size_t)backend->model.config.hidden, nq = (size_t)backend->model.nq;
    size_t row = nq * backend->ops->act_bytes;

    bw->m = bw->batch->pack.m;
    /* from the last row down, in place: the tail is increasing, so no row overwrites one that is
     * still to be moved */
    for (int from = bw->batch->tail_count - 1, to = bw->m - 1; to >= 0; to--) {
        float *dx = space->dx + (size_t)to * d;
        uint8_t *dattn = (uint8_t *)space->dattn_act + (size_t)to * row;

        if (from >= 0 && bw->batch->tail[from] == to) {
            memmove(dx, space->dx + (size_t)from * d, d * sizeof(float));
            memmove(dattn, (uint8_t *)space->dattn_act + (size_t)from * row, row);
            from--;
        } else {
            memset(dx, 0, d * sizeof(float));
            memset(dattn, 0, row);
        }
    }
}

/* dx (before the MLP) -> dattn_act, the gradient of the attention's output. */
static void output_backward(struct backward *bw)
{
    claas_backend_t *backend = bw->backend;
    struct cpu_step_space *space = bw->space;
    size_t rows = (size_t)bw->m;
    bool last = bw->layer == backend->model.config.layers - 1;

    claas_cpu_to_act(backend, space->dx, space->dy_act,
                     rows * (size_t)backend->model.config.hidden);
    if (has_lora(bw, CPU_O)) {
        lora_outer(bw, CPU_O, space->dy_act);
        lora_inner(bw, CPU_O, last ? space->tail_attn : bw->acts->attn);
    }
    input_gradient(bw, CPU_O, space->dy_act, space->dattn);
    claas_cpu_to_act(backend, space->dattn, space->dattn_act, rows * (size_t)backend->model.nq);
    if (last)
        spread_tail(bw);
}

/* dattn_act and dx (before the MLP) -> dx (before the layer), which the first layer does not
 * need. */
static int input_backward(const struct backward *bw)
{
    claas_backend_t *backend = bw->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cpu_acts *acts = bw->acts;
    struct cpu_step_space *space = bw->space;
    int m = bw->m, code;

    attention_backward(bw);
    code = claas_cpu_yield(&space->pass);
    if (code < 0)
        return code;
    claas_cpu_to_act(backend, space->dwide, space->dy_act, (size_t)m * (size_t)model->nqkv);
    if (has_lora(bw, CPU_QKV)) {
        ops->rmsnorm(backend->pool, m, c->hidden, acts->x_in, c->hidden,
                     model->layers[bw->layer].norm_in, c->norm_eps, space->pass.xn, c->hidden,
                     NULL);
        lora_outer(bw, CPU_QKV, space->dy_act);
        lora_inner(bw, CPU_QKV, space->pass.xn);
    }
    if (bw->layer > 0) {
        input_gradient(bw, CPU_QKV, space->dy_act, space->dxn);
        ops->rmsnorm_bwd(backend->pool, m, c->hidden, acts->x_in, c->hidden,
                         model->layers[bw->layer].norm_in, acts->rstd_in, space->dxn, c->hidden,
                         space->dx, c->hidden);
    }
    return claas_cpu_yield(&space->pass);
}

int claas_cpu_backward(claas_backend_t *backend, const struct claas_plan_batch *batch,
                       struct cpu_step_space *space, float *grad)
{
    struct backward bw = {
        .backend = backend,
        .batch = batch,
        .space = space,
        .adapter = batch->pack.groups[0].adapter,
        .m = batch->tail_count,
    };
    int code = 0;

    for (int l = backend->model.config.layers - 1; l >= 0 && code >= 0; l--) {
        bw.layer = l;
        bw.acts = &space->saved[l];
        bw.grad = grad + (size_t)l * bw.adapter->layout.layer_floats;
        if (space->recompute && l < backend->model.config.layers - 1)
            code = claas_cpu_layer_saved(backend, batch, space, l);
        if (code >= 0)
            code = mlp_backward(&bw);
        if (code < 0)
            break;
        output_backward(&bw);
        code = input_backward(&bw);
    }
    return code;
}
