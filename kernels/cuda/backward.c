/* Gradients of the LoRA matrices, layer by layer from the top. With y = x W^T + S (sB)^T and S = x
 * A^T:
 *
 *   dS  = dY (sB)          dB += s dY^T S
 *   dA += dS^T x           dx  = dY W + dS A
 *
 * The residual stream's gradient stays float32; what enters a product is act. */
#include "cuda/cuda_train.h"

struct backward {
    struct cuda_step *step;
    const struct cuda_batch *batch;
    const struct cuda_lora_rows *rows; /* rows at hand: the tail's until the last layer's attention
                                          is reached, then all */
    int layer;
    const struct cuda_acts *acts;
    float *dx;   /* of the rows at hand */
    void *dattn; /* likewise */
};

static struct cuda_context *context_of(const struct backward *bw)
{
    return &bw->step->backend->context;
}

/* The LoRA of a weight: dY [m][N], the input x [m][K], and dx [m][K], where the input's gradient
 * goes. dS lies in space.ds, until the next weight's. */
static struct cuda_lora lora_of(const struct backward *bw, enum cuda_weight_kind kind,
                                const void *dy, const void *x, void *dx)
{
    return (struct cuda_lora){
        .rows = bw->rows,
        .weight = &bw->step->backend->model.layers[bw->layer].weights[kind],
        .kind = kind,
        .layer = bw->layer,
        .ld = bw->step->space.pass.lds[kind],
        .x = x,
        .s = bw->acts->s[kind],
        .dy = dy,
        .ds = bw->step->space.ds,
        .dx = dx,
    };
}

/* dS, and the frozen weight's part of dx: dY W. */
static int outer_gradient(const struct backward *bw, const struct cuda_lora *lora)
{
    struct cuda_context *context = context_of(bw);
    const struct cuda_weight *weight = lora->weight;
    int code = cuda_lora_outer(context, lora);

    if (code < 0 || !lora->dx)
        return code;
    code = cuda_gemm(context, &(struct cuda_gemm){
                                  .form = CUDA_GEMM_NN,
                                  .m = lora->rows->m,
                                  .n = weight->k,
                                  .k = weight->n,
                                  .a = lora->dy,
                                  .lda = weight->n,
                                  .b = weight->w,
                                  .ldb = weight->k,
                                  .out = lora->dx,
                                  .ldo = weight->k,
                                  .out_type = context->act,
                              });
    return code >= 0 ? cuda_turn(&bw->step->space.pass) : code;
}

/* The output of a norm that the forward pass kept, or made again in the pass's xn. */
static int find_norm(const struct backward *bw, const void *kept, const void *x,
                     const float *weight, const void **ret)
{
    const struct cuda_pass *pass = &bw->step->space.pass;
    const struct claas_model_config *c = &bw->step->backend->model.config;

    *ret = kept ? kept : pass->xn;
    if (kept)
        return 0;
    return cuda_rmsnorm(context_of(bw), bw->rows->m, c->hidden, x, weight, c->norm_eps, pass->xn,
                        NULL);
}

/* Everything of one weight: the adapters' gradients, and dx unless it is NULL. */
static int weight_gradient(const struct backward *bw, const struct cuda_lora *lora)
{
    int code = outer_gradient(bw, lora);

    if (code >= 0)
        code = cuda_lora_inner(context_of(bw), lora, true, lora->dx != NULL);
    return code >= 0 ? cuda_turn(&bw->step->space.pass) : code;
}

/* dx (after the layer) -> dx (before its MLP); `dy` holds dx rounded before and after. */
static int mlp_backward(const struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_context *context = context_of(bw);
    const struct cuda_model *model = &bw->step->backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cuda_acts *acts = bw->acts;
    const float *norm = model->layers[bw->layer].norm_mid;
    struct cuda_lora down = lora_of(bw, CUDA_DOWN, space->dy, space->pass.h, space->dh);
    struct cuda_lora gate_up = lora_of(bw, CUDA_GATE_UP, space->dgu, NULL, space->dxn);
    int m = bw->rows->m, code = outer_gradient(bw, &down);

    if (code >= 0)
        code = cuda_lora_inner(context, &down, false, true);
    /* this makes h again, the input of the down product, whose A gets its gradient after it */
    if (code >= 0)
        code = cuda_swiglu_bwd(context, m, c->intermediate, acts->gate_up, space->dh, space->dgu,
                               space->pass.h);
    if (code >= 0)
        code = cuda_lora_inner(context, &down, true, false);
    if (code >= 0)
        code = find_norm(bw, acts->xn_mid, acts->x_mid, norm, &gate_up.x);
    if (code >= 0)
        code = weight_gradient(bw, &gate_up);
    if (code >= 0)
        code = cuda_rmsnorm_bwd(context, m, c->hidden, acts->x_mid, norm, acts->rstd_mid,
                                space->dxn, bw->dx, space->dy);
    return code;
}

/* dx (before the MLP) -> dattn, the gradient of the attention's output. */
static int output_backward(struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_context *context = context_of(bw);
    const struct cuda_model *model = &bw->step->backend->model;
    const struct claas_plan_batch *plan = bw->batch->plan;
    bool last = bw->layer == model->config.layers - 1;
    struct cuda_lora lora =
        lora_of(bw, CUDA_O, space->dy, last ? space->tail_attn : bw->acts->attn, space->dattn);
    int code = weight_gradient(bw, &lora);

    bw->dattn = space->dattn;
    if (code < 0 || !last)
        return code;
    /* From the tail's rows to all rows; the gradient of the others is zero so far. */
    bw->rows = &bw->batch->pack.rows;
    bw->dattn = space->dattn_spread;
    bw->dx = space->dx_spread;
    code = cuda_spread(context, plan->pack.m, plan->tail_count, model->nq, space->dattn,
                       bw->batch->tail, space->dattn_spread);
    if (code >= 0)
        code = cuda_spread_f32(context, plan->pack.m, plan->tail_count, model->config.hidden,
                               space->dx, bw->batch->tail, space->dx_spread);
    return code;
}

static int attention_backward(const struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_qkv qkv = cuda_qkv_args(&space->pass, bw->layer, bw->acts);
    struct cuda_attention_bwd args = {
        .forward = cuda_attention_args(&space->pass, bw->layer, bw->acts),
        .children = bw->batch->pack.children,
        .key_order = bw->batch->pack.key_order,
        .dout = bw->dattn,
        .delta = space->delta,
        .dqkv = space->dy,
    };
    int code = cuda_attention_bwd(context_of(bw), &args);

    return code >= 0 ? cuda_qkv_finish_bwd(context_of(bw), &qkv, space->dy) : code;
}

/* dattn and dx (before the MLP) -> dx (before the layer), which the first layer does not need. */
static int input_backward(const struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_context *context = context_of(bw);
    const struct cuda_model *model = &bw->step->backend->model;
    const struct claas_model_config *c = &model->config;
    const float *norm = model->layers[bw->layer].norm_in;
    bool first = bw->layer == 0;
    struct cuda_lora lora = lora_of(bw, CUDA_QKV, space->dy, NULL, first ? NULL : space->dxn);
    int m = bw->rows->m, code = attention_backward(bw);

    if (code >= 0)
        code = find_norm(bw, bw->acts->xn_in, bw->acts->x_in, norm, &lora.x);
    if (code >= 0)
        code = weight_gradient(bw, &lora);
    if (code >= 0 && !first)
        code = cuda_rmsnorm_bwd(context, m, c->hidden, bw->acts->x_in, norm, bw->acts->rstd_in,
                                space->dxn, bw->dx, space->dy);
    return code;
}

int cuda_backward(struct cuda_step *step, const struct cuda_batch *batch)
{
    claas_backend_t *backend = step->backend;
    struct cuda_step_space *space = &step->space;
    struct backward bw = {
        .step = step,
        .batch = batch,
        .rows = &batch->pack.tail,
        .dx = space->dx,
    };
    int layers = backend->model.config.layers;
    size_t count = (size_t)bw.rows->m * (size_t)backend->model.config.hidden;
    int code = cuda_to_act(&backend->context, count, space->dx, space->dy);

    for (int l = layers - 1; l >= 0 && code >= 0; l--) {
        bw.layer = l;
        bw.acts = &space->saved[l];
        if (space->recompute && l < layers - 1)
            code = cuda_layer_saved(step, batch, l);
        if (code >= 0)
            code = mlp_backward(&bw);
        if (code >= 0)
            code = output_backward(&bw);
        if (code >= 0)
            code = input_backward(&bw);
        if (code >= 0)
            code = cuda_yield(&space->pass);
    }
    return code;
}
