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
    const struct cuda_adapter *adapter;
    float *grad; /* of the layer at hand */
    int layer;
    int m; /* rows at hand: the tail's down to the last layer's attention, then all */
    const struct cuda_acts *acts;
    float *dx;   /* of the rows at hand */
    void *dattn; /* likewise */
};

static struct cuda_context *context_of(const struct backward *bw)
{
    return &bw->step->backend->context;
}

static const struct cuda_weight *weight_of(const struct backward *bw, enum cuda_weight_kind kind)
{
    return &bw->step->backend->model.layers[bw->layer].weights[kind];
}

static int lora_width(const struct backward *bw, enum cuda_weight_kind kind)
{
    return bw->adapter->layout.parts[kind] * bw->adapter->layout.rank;
}

static const void *view_of(const struct backward *bw, size_t place)
{
    return cuda_at(context_of(bw), bw->adapter->view.base,
                   (size_t)bw->layer * bw->adapter->layout.layer + place);
}

/* dS of one part, and the gradient of its B, from dY [m][N]. */
static int lora_outer_part(const struct backward *bw, enum cuda_weight_kind kind,
                           const struct cuda_part *part, const void *dy)
{
    struct cuda_context *context = context_of(bw);
    const struct cuda_lora_layout *layout = &bw->adapter->layout;
    size_t place = (size_t)layout->index[part->module] * (size_t)layout->rank;
    const void *dy_part = cuda_at(context, dy, (size_t)part->row);
    int n = weight_of(bw, kind)->n;
    int code = cuda_gemm(context, &(struct cuda_gemm){
                                      .form = CUDA_GEMM_NN,
                                      .m = bw->m,
                                      .n = layout->rank,
                                      .k = part->n,
                                      .a = dy_part,
                                      .lda = n,
                                      .b = view_of(bw, layout->b[part->module]),
                                      .ldb = layout->rank,
                                      .out = cuda_at(context, bw->step->space.ds, place),
                                      .ldo = lora_width(bw, kind),
                                      .out_type = context->act,
                                      .alpha = 1,
                                  });

    if (code < 0)
        return code;
    return cuda_gemm(context, &(struct cuda_gemm){
                                  .form = CUDA_GEMM_TN,
                                  .m = part->n,
                                  .n = layout->rank,
                                  .k = bw->m,
                                  .a = dy_part,
                                  .lda = n,
                                  .b = cuda_at(context, bw->acts->s[kind], place),
                                  .ldb = bw->step->space.pass.lds[kind],
                                  .out = bw->grad + layout->b[part->module],
                                  .ldo = layout->rank,
                                  .out_type = CUDA_TYPE_F32,
                                  .alpha = bw->adapter->scale,
                                  .beta = 1,
                              });
}

/* The adapter's gradients from dY [m][N] and the product's input x [m][K]; leaves dS in space.ds.
 */
static int lora_gradient(const struct backward *bw, enum cuda_weight_kind kind, const void *dy,
                         const void *x)
{
    const struct cuda_weight *weight = weight_of(bw, kind);
    const struct cuda_lora_layout *layout = &bw->adapter->layout;
    int width = lora_width(bw, kind), code = 0;

    if (width == 0)
        return 0;
    for (int i = 0; i < weight->part_count && code >= 0; i++)
        if (layout->index[weight->parts[i].module] >= 0)
            code = lora_outer_part(bw, kind, &weight->parts[i], dy);
    if (code < 0)
        return code;
    return cuda_gemm(context_of(bw), &(struct cuda_gemm){
                                         .form = CUDA_GEMM_TN,
                                         .m = width,
                                         .n = weight->k,
                                         .k = bw->m,
                                         .a = bw->step->space.ds,
                                         .lda = width,
                                         .b = x,
                                         .ldb = weight->k,
                                         .out = bw->grad + layout->a[kind],
                                         .ldo = weight->k,
                                         .out_type = CUDA_TYPE_F32,
                                         .alpha = 1,
                                         .beta = 1,
                                     });
}

/* dx [m][K] = dY W (+ dS A, of the lora_gradient just before; dS must be that of dY). */
static int input_gradient(const struct backward *bw, enum cuda_weight_kind kind, const void *dy,
                          void *dx)
{
    struct cuda_context *context = context_of(bw);
    const struct cuda_weight *weight = weight_of(bw, kind);
    int width = lora_width(bw, kind);
    struct cuda_gemm gemm = {
        .form = CUDA_GEMM_NN,
        .m = bw->m,
        .n = weight->k,
        .k = weight->n,
        .a = dy,
        .lda = weight->n,
        .b = weight->w,
        .ldb = weight->k,
        .out = dx,
        .ldo = weight->k,
        .out_type = context->act,
        .alpha = 1,
    };
    int code = cuda_gemm(context, &gemm);

    if (code < 0 || width == 0)
        return code;
    gemm.k = gemm.lda = width;
    gemm.a = bw->step->space.ds;
    gemm.b = view_of(bw, bw->adapter->layout.a[kind]);
    gemm.beta = 1;
    return cuda_gemm(context, &gemm);
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
    int m = bw->m, code;

    code = cuda_swiglu(context, m, c->intermediate, acts->gate_up, space->pass.h);
    if (code >= 0)
        code = lora_gradient(bw, CUDA_DOWN, space->dy, space->pass.h);
    if (code >= 0)
        code = input_gradient(bw, CUDA_DOWN, space->dy, space->dh);
    if (code >= 0)
        code = cuda_swiglu_bwd(context, m, c->intermediate, acts->gate_up, space->dh, space->dgu,
                               space->pass.h);
    if (code >= 0)
        code = cuda_rmsnorm(context, m, c->hidden, acts->x_mid, norm, c->norm_eps, space->pass.xn,
                            NULL);
    if (code >= 0)
        code = lora_gradient(bw, CUDA_GATE_UP, space->dgu, space->pass.xn);
    if (code >= 0)
        code = input_gradient(bw, CUDA_GATE_UP, space->dgu, space->dxn);
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
    int code = lora_gradient(bw, CUDA_O, space->dy, last ? space->tail_attn : bw->acts->attn);

    if (code >= 0)
        code = input_gradient(bw, CUDA_O, space->dy, space->dattn);
    bw->dattn = space->dattn;
    if (code < 0 || !last)
        return code;
    /* From the tail's rows to all rows: the others have had no gradient so far. */
    bw->m = plan->pack.m;
    bw->dattn = space->dattn_spread;
    bw->dx = space->dx_spread;
    code = cuda_spread(context, bw->m, plan->tail_count, model->nq, space->dattn, bw->batch->tail,
                       space->dattn_spread);
    if (code >= 0)
        code = cuda_spread_f32(context, bw->m, plan->tail_count, model->config.hidden, space->dx,
                               bw->batch->tail, space->dx_spread);
    return code;
}

static int attention_backward(const struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_qkv qkv = cuda_qkv_args(&space->pass, bw->layer, bw->acts);
    struct cuda_attention_bwd args = {
        .forward = cuda_attention_args(&space->pass, bw->layer, bw->acts),
        .children = bw->batch->pack.children,
        .dout = bw->dattn,
        .delta = space->delta,
        .dqkv = space->dy,
    };
    int code = cuda_attention_bwd(context_of(bw), &args);

    return code >= 0 ? cuda_qkv_finish_bwd(context_of(bw), &qkv, space->dy) : code;
}

/* dattn and dx (before the MLP) -> dx (before the layer); below the first layer nobody needs it. */
static int input_backward(const struct backward *bw)
{
    struct cuda_step_space *space = &bw->step->space;
    struct cuda_context *context = context_of(bw);
    const struct cuda_model *model = &bw->step->backend->model;
    const struct claas_model_config *c = &model->config;
    const float *norm = model->layers[bw->layer].norm_in;
    int code = attention_backward(bw);

    if (code >= 0)
        code = cuda_rmsnorm(context, bw->m, c->hidden, bw->acts->x_in, norm, c->norm_eps,
                            space->pass.xn, NULL);
    if (code >= 0)
        code = lora_gradient(bw, CUDA_QKV, space->dy, space->pass.xn);
    if (code < 0 || bw->layer == 0)
        return code;
    code = input_gradient(bw, CUDA_QKV, space->dy, space->dxn);
    if (code >= 0)
        code = cuda_rmsnorm_bwd(context, bw->m, c->hidden, bw->acts->x_in, norm, bw->acts->rstd_in,
                                space->dxn, bw->dx, space->dy);
    return code;
}

int cuda_backward(struct cuda_step *step, const struct cuda_batch *batch, float *grad)
{
    claas_backend_t *backend = step->backend;
    struct cuda_step_space *space = &step->space;
    struct backward bw = {
        .step = step,
        .batch = batch,
        .adapter = &batch->plan->pack.groups[0].adapter->cuda,
        .m = batch->plan->tail_count,
        .dx = space->dx,
    };
    int layers = backend->model.config.layers;
    int code = cuda_to_act(&backend->context, (size_t)bw.m * (size_t)backend->model.config.hidden,
                           space->dx, space->dy);

    for (int l = layers - 1; l >= 0 && code >= 0; l--) {
        bw.layer = l;
        bw.acts = &space->saved[l];
        bw.grad = grad + (size_t)l * bw.adapter->layout.layer;
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
