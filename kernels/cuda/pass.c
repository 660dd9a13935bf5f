/* A walk over the layers: places of its buffers, one weight with LoRA, the two halves of a layer,
 * all layers of a pass that keeps nothing. */
#include "cuda/pass.h"

#include <math.h>

/* --- places --- */

void cuda_place_pass(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                     struct cuda_pass *pass)
{
    const struct claas_model_config *c = &backend->model.config;
    size_t act = (size_t)m * backend->context.act_bytes;

    pass->xn = cuda_take(arena, act * (size_t)c->hidden);
    pass->h = cuda_take(arena, act * (size_t)c->intermediate);
}

struct cuda_acts cuda_place_acts(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                                 const int lds[CUDA_WEIGHTS], enum cuda_keep keep)
{
    const struct cuda_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    size_t act = (size_t)m * backend->context.act_bytes, real = (size_t)m * sizeof(float);
    struct cuda_acts acts = {0};

    acts.qkv = cuda_take(arena, act * (size_t)model->nqkv);
    acts.attn = cuda_take(arena, act * (size_t)model->nq);
    acts.x_mid = cuda_take(arena, act * (size_t)c->hidden);
    acts.gate_up = cuda_take(arena, act * 2 * (size_t)c->intermediate);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        acts.s[kind] = cuda_take(arena, act * (size_t)lds[kind]);
    if (keep == CUDA_KEEP_NOTHING)
        return acts;
    if (keep == CUDA_KEEP_ALL) {
        acts.xn_in = cuda_take(arena, act * (size_t)c->hidden);
        acts.xn_mid = cuda_take(arena, act * (size_t)c->hidden);
    }
    acts.rstd_in = cuda_take(arena, real);
    acts.rstd_mid = cuda_take(arena, real);
    acts.lse = cuda_take(arena, real * (size_t)c->heads);
    if (c->qk_norm) {
        acts.qk_raw = cuda_take(arena, act * (size_t)(model->nq + model->nk));
        acts.rstd_q = cuda_take(arena, real * (size_t)c->heads);
        acts.rstd_k = cuda_take(arena, real * (size_t)c->kv_heads);
    }
    return acts;
}

void cuda_place_infer(const claas_backend_t *backend, struct cuda_arena *arena, int m, int tail,
                      const struct cuda_pass *pass, struct cuda_infer *infer)
{
    size_t act = backend->context.act_bytes, d = (size_t)backend->model.config.hidden;

    infer->acts = cuda_place_acts(backend, arena, m, pass->lds, CUDA_KEEP_NOTHING);
    infer->acts.x_in = infer->acts.x_out = cuda_take(arena, (size_t)m * d * act);
    infer->tail_x = cuda_take(arena, (size_t)tail * d * act);
    infer->tail_attn = cuda_take(arena, (size_t)tail * (size_t)backend->model.nq * act);
}

/* --- a layer --- */

int cuda_turn(const struct cuda_pass *pass)
{
    if (cuda_give_turn(&pass->backend->context.turns))
        return claas_fail(CLAAS_ERR_CANCELLED, NULL);
    return 0;
}

int cuda_yield(const struct cuda_pass *pass)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    int code;

    if (!context->turns.give)
        return 0;
    code = cuda_check(context, cudaEventRecord(backend->turns[backend->turn], context->stream),
                      "a step");
    backend->turn ^= 1;
    if (code >= 0)
        code = cuda_check(context, cudaEventSynchronize(backend->turns[backend->turn]), "a step");
    return code >= 0 ? cuda_turn(pass) : code;
}

int cuda_linear(const struct cuda_pass *pass, const struct cuda_lora_rows *rows, int layer,
                enum cuda_weight_kind kind, const void *x, void *s, const void *residual, void *out)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct cuda_weight *weight = &backend->model.layers[layer].weights[kind];
    const struct cuda_lora lora = {
        .rows = rows,
        .weight = weight,
        .kind = kind,
        .layer = layer,
        .ld = pass->lds[kind],
        .x = x,
        .s = s,
        .y = out,
        .sums = pass->lora_sums,
        .pair = pass->lora_pair,
    };
    struct cuda_gemm gemm = {
        .form = CUDA_GEMM_NT,
        .m = rows->m,
        .n = weight->n,
        .k = weight->k,
        .a = x,
        .lda = weight->k,
        .b = weight->w,
        .ldb = weight->k,
        .out = out,
        .ldo = weight->n,
        .out_type = context->act,
        .add = residual,
        .frozen = true,
        .lora = rows->group_count > 0 ? &lora : NULL,
    };
    bool apart = gemm.lora && !cuda_gemm_adds_lora(context, &gemm);
    int code = 0;

    if (apart) {
        gemm.lora = NULL;
        code = cuda_lora_shrink(context, &lora);
    }
    if (code >= 0)
        code = cuda_gemm(context, &gemm);
    if (code >= 0 && apart)
        code = cuda_lora_expand(context, &lora);
    return code >= 0 ? cuda_turn(pass) : code;
}

/* This layer's blocks when serving. */
static uint8_t *layer_kv(const struct cuda_pass *pass, int layer)
{
    return pass->kv ? pass->kv + (size_t)layer * pass->kv_layer_bytes : NULL;
}

struct cuda_qkv cuda_qkv_args(const struct cuda_pass *pass, int layer, const struct cuda_acts *acts)
{
    const struct cuda_model *model = &pass->backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cuda_layer *weights = &model->layers[layer];

    return (struct cuda_qkv){
        .m = pass->pack.m,
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .qkv = acts->qkv,
        .bias = weights->bias,
        .norm_q = weights->norm_q,
        .norm_k = weights->norm_k,
        .eps = c->norm_eps,
        .cos_sin = model->cos_sin,
        .pos = pass->pack.pos,
        .raw = acts->qk_raw,
        .rstd_q = acts->rstd_q,
        .rstd_k = acts->rstd_k,
        .kv = layer_kv(pass, layer),
        .blocks = pass->pack.blocks,
    };
}

struct cuda_attention cuda_attention_args(const struct cuda_pass *pass, int layer,
                                          const struct cuda_acts *acts)
{
    const struct cuda_model *model = &pass->backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cuda_pack *pack = &pass->pack;

    return (struct cuda_attention){
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .scale = 1.0f / sqrtf((float)c->head_dim),
        .m = pack->m,
        .run_count = pack->run_count,
        .longest = pack->longest,
        .furthest = pack->furthest,
        .runs = pack->runs,
        .row_run = pack->row_run,
        .qkv = acts->qkv,
        .ldqkv = model->nqkv,
        .out = acts->attn,
        .lse = acts->lse,
        .kv = layer_kv(pass, layer),
        .tables = pack->tables,
        .apart = pack->decoding,
        .scratch = pass->splits,
        .scratch_bytes = pass->split_bytes,
    };
}

int cuda_attention_half(const struct cuda_pass *pass, int layer, const struct cuda_acts *acts)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct claas_model_config *c = &backend->model.config;
    const struct cuda_pack *pack = &pass->pack;
    struct cuda_qkv qkv = cuda_qkv_args(pass, layer, acts);
    struct cuda_attention attention = cuda_attention_args(pass, layer, acts);
    void *xn = acts->xn_in ? acts->xn_in : pass->xn;
    int code = cuda_rmsnorm(context, pack->m, c->hidden, acts->x_in,
                            backend->model.layers[layer].norm_in, c->norm_eps, xn, acts->rstd_in);

    if (code >= 0)
        code =
            cuda_linear(pass, &pack->rows, layer, CUDA_QKV, xn, acts->s[CUDA_QKV], NULL, acts->qkv);
    attention.finish = pack->decoding ? &qkv : NULL;
    if (!cuda_attention_finishes(context, &attention)) {
        attention.finish = NULL;
        code = code >= 0 ? cuda_qkv_finish(context, &qkv) : code;
    }
    return code >= 0 ? cuda_attention(context, &attention) : code;
}

int cuda_mlp_half(const struct cuda_pass *pass, const struct cuda_lora_rows *rows, int layer,
                  const struct cuda_acts *acts)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct claas_model_config *c = &backend->model.config;
    void *xn = acts->xn_mid ? acts->xn_mid : pass->xn;
    int m = rows->m, code = cuda_linear(pass, rows, layer, CUDA_O, acts->attn, acts->s[CUDA_O],
                                        acts->x_in, acts->x_mid);

    if (code >= 0)
        code = cuda_rmsnorm(context, m, c->hidden, acts->x_mid,
                            backend->model.layers[layer].norm_mid, c->norm_eps, xn, acts->rstd_mid);
    if (code >= 0)
        code = cuda_linear(pass, rows, layer, CUDA_GATE_UP, xn, acts->s[CUDA_GATE_UP], NULL,
                           acts->gate_up);
    if (code >= 0)
        code = cuda_swiglu(context, m, c->intermediate, acts->gate_up, pass->h);
    if (code >= 0)
        code = cuda_linear(pass, rows, layer, CUDA_DOWN, pass->h, acts->s[CUDA_DOWN], acts->x_mid,
                           acts->x_out);
    return code >= 0 ? cuda_yield(pass) : code;
}

/* --- all layers --- */

/* Gathers the tail's rows of what the last layer's second half reads. */
static int gather_tail(const struct cuda_pass *pass, const struct cuda_infer *infer,
                       struct cuda_acts *acts)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    int code = cuda_gather(context, infer->tail_count, backend->model.config.hidden, acts->x_in,
                           infer->tail, infer->tail_x);

    if (code >= 0)
        code = cuda_gather(context, infer->tail_count, backend->model.nq, acts->attn, infer->tail,
                           infer->tail_attn);
    acts->x_in = infer->tail_x;
    acts->attn = infer->tail_attn;
    return code;
}

static int infer_tail(const struct cuda_pass *pass, struct cuda_infer *infer, void *out)
{
    claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;
    bool all = infer->tail_count == pass->pack.m; /* then they are in order */
    const struct cuda_lora_rows *rows = all ? &pass->pack.rows : &pass->pack.tail;
    struct cuda_acts acts = infer->acts;
    int code = 0;

    if (rows->m != infer->tail_count)
        return claas_fail(CLAAS_ERR_INTERNAL, "a tail of %d rows, %d of them described",
                          infer->tail_count, rows->m);
    if (!all)
        code = gather_tail(pass, infer, &acts);
    if (code >= 0)
        code = cuda_mlp_half(pass, rows, c->layers - 1, &acts);
    if (code >= 0)
        code = cuda_rmsnorm(&backend->context, infer->tail_count, c->hidden, acts.x_out,
                            backend->model.norm_out, c->norm_eps, out, NULL);
    return code;
}

/* Prepares the pair for the rows that may have LoRA beside their products: all rows, or those of
 * the tail if the pack is larger. */
static int begin_lora(const struct cuda_pass *pass, int tail_count)
{
    struct cuda_context *context = &pass->backend->context;
    const struct cuda_lora_rows *rows = &pass->pack.rows;
    const int m = rows->m <= CUDA_LORA_PAIR_ROWS ? rows->m : tail_count;
    const bool may = rows->group_count > 0 && rows->tile_rows == CUDA_LORA_FEW_ROWS &&
                     context->act == CUDA_TYPE_BF16 && m <= CUDA_LORA_PAIR_ROWS;

    return pass->lora_pair ? cuda_lora_begin(context, pass->lora_pair, may ? m : 0) : 0;
}

int cuda_infer(const struct cuda_pass *pass, struct cuda_infer *infer, void *out)
{
    claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;
    const struct cuda_pack *pack = &pass->pack;
    int code = begin_lora(pass, infer->tail_count);

    if (code >= 0)
        code = cuda_embed(&backend->context, pack->m, c->hidden, backend->model.embedding,
                          pack->tokens, infer->acts.x_in);
    for (int l = 0; l < c->layers && code >= 0; l++) {
        code = cuda_attention_half(pass, l, &infer->acts);
        if (code >= 0 && l < c->layers - 1)
            code = cuda_mlp_half(pass, &pack->rows, l, &infer->acts);
    }
    if (code < 0 || infer->tail_count == 0)
        return code;
    return infer_tail(pass, infer, out);
}

int cuda_logits(claas_backend_t *backend, int m, const void *x, float *logits)
{
    const struct claas_model_config *c = &backend->model.config;

    return cuda_gemm(&backend->context, &(struct cuda_gemm){
                                            .form = CUDA_GEMM_NT,
                                            .m = m,
                                            .n = c->vocab,
                                            .k = c->hidden,
                                            .a = x,
                                            .lda = c->hidden,
                                            .b = backend->model.head,
                                            .ldb = c->hidden,
                                            .out = logits,
                                            .ldo = c->vocab,
                                            .out_type = CUDA_TYPE_F32,
                                            .frozen = true,
                                        });
}
