/* One walk over the layers, the same code for decode, prefill, the teacher's rows and the student's
 * rows in training:
 *
 *   xn    = rmsnorm(x_in)
 *   q|k|v = xn Wqkv^T;  rotate q, k;  store k, v in their blocks;  attn = attention(q)
 *   x_mid = x_in + attn Wo^T
 *   xn    = rmsnorm(x_mid)
 *   g|u   = xn Wgu^T
 *   x_out = x_mid + (silu(g) u) Wd^T
 *
 * each product plus its LoRA term (linear.c). */
#include "cpu/step.h"

#include "claas/err.h"

#include <math.h>
#include <string.h>

int claas_cpu_yield(const struct cpu_pass *pass)
{
    if (pass->yield && pass->yield(pass->yield_arg) != 0)
        return claas_fail(CLAAS_ERR_CANCELLED, "the step was given up");
    return 0;
}

/* --- a layer --- */

static void rotate(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts)
{
    const claas_backend_t *backend = pass->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    const struct cpu_layer *weights = &model->layers[layer];
    const struct claas_pack *pack = pass->pack;
    size_t raw = (size_t)(model->nq + model->nk);

    for (int i = 0; acts->qk_raw && i < pack->m; i++)
        memcpy(claas_cpu_at(ops, acts->qk_raw, (size_t)i * raw),
               claas_cpu_at(ops, acts->qkv, (size_t)i * (size_t)model->nqkv), raw * ops->act_bytes);
    if (!c->qk_norm) { /* q and k lie side by side and turn alike */
        ops->norm_rope(backend->pool, pack->m, c->heads + c->kv_heads, c->head_dim, acts->qkv,
                       model->nqkv, NULL, c->norm_eps, NULL, model->cos_sin, pack->pos);
        return;
    }
    ops->norm_rope(backend->pool, pack->m, c->heads, c->head_dim, acts->qkv, model->nqkv,
                   weights->norm_q, c->norm_eps, acts->rstd_q, model->cos_sin, pack->pos);
    ops->norm_rope(backend->pool, pack->m, c->kv_heads, c->head_dim,
                   claas_cpu_at(ops, acts->qkv, (size_t)model->nq), model->nqkv, weights->norm_k,
                   c->norm_eps, acts->rstd_k, model->cos_sin, pack->pos);
}

static void store_keys(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts)
{
    const claas_backend_t *backend = pass->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    const struct claas_pack *pack = pass->pack;
    uint8_t *kv = pass->kv + (size_t)layer * pass->kv_layer_bytes;

    /* Copies first: they begin blocks that rows of the pack then continue. */
    for (int i = 0; i < pack->copy_count; i++) {
        const struct claas_pack_copy *copy = &pack->copies[i];
        size_t row = (size_t)copy->first * (size_t)model->nqkv;
        int32_t blocks[CLAAS_KV_BLOCK];

        for (int j = 0; j < copy->count; j++)
            blocks[j] = copy->block;
        ops->kv_store(backend->pool, copy->count, c->kv_heads, c->head_dim,
                      claas_cpu_at(ops, acts->qkv, row + (size_t)model->nq),
                      claas_cpu_at(ops, acts->qkv, row + (size_t)(model->nq + model->nk)),
                      model->nqkv, pack->pos + copy->first, blocks, kv, backend->kv_block_bytes);
    }
    ops->kv_store(backend->pool, pack->m, c->kv_heads, c->head_dim,
                  claas_cpu_at(ops, acts->qkv, (size_t)model->nq),
                  claas_cpu_at(ops, acts->qkv, (size_t)(model->nq + model->nk)), model->nqkv,
                  pack->pos, pack->blocks, kv, backend->kv_block_bytes);
}

/* x_in -> q, k, v, rotated, keys and values stored. */
static void project(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts)
{
    const claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;

    backend->ops->rmsnorm(backend->pool, pass->pack->m, c->hidden, acts->x_in, c->hidden,
                          backend->model.layers[layer].norm_in, c->norm_eps, pass->xn, c->hidden,
                          acts->rstd_in);
    claas_cpu_linear(pass, pass->pack, layer, CPU_QKV, pass->xn, acts->s[CPU_QKV], NULL, acts->qkv);
    rotate(pass, layer, acts);
    store_keys(pass, layer, acts);
}

static void attend(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts)
{
    const claas_backend_t *backend = pass->backend;
    const struct claas_ops *ops = backend->ops;
    const struct cpu_model *model = &backend->model;
    const struct claas_model_config *c = &model->config;
    struct claas_attn_args args = {
        .heads = c->heads,
        .kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .scale = 1.0f / sqrtf((float)c->head_dim),
        .kv = pass->kv + (size_t)layer * pass->kv_layer_bytes,
        .kv_block_bytes = backend->kv_block_bytes,
        .runs = pass->runs,
        .n_runs = pass->pack->run_count,
    };

    for (int i = 0; i < pass->pack->run_count; i++) {
        const struct claas_pack_run *run = &pass->pack->runs[i];

        pass->runs[i] = (struct claas_attn_run){
            .count = run->count,
            .pos = run->pos,
            .blocks = run->blocks,
            .q = claas_cpu_at(ops, acts->qkv, (size_t)run->first * (size_t)model->nqkv),
            .ldq = model->nqkv,
            .out = claas_cpu_at(ops, acts->attn, (size_t)run->first * (size_t)model->nq),
            .ldo = model->nq,
            .lse = acts->lse ? acts->lse + (size_t)run->first * (size_t)c->heads : NULL,
        };
    }
    ops->attention(backend->pool, &args);
}

int claas_cpu_attention_half(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts)
{
    int code;

    project(pass, layer, acts);
    code = claas_cpu_yield(pass);
    if (code < 0)
        return code;
    attend(pass, layer, acts);
    return claas_cpu_yield(pass);
}

int claas_cpu_mlp_half(const struct cpu_pass *pass, const struct claas_pack *pack, int layer,
                       const struct cpu_acts *acts)
{
    const claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;
    int code;

    claas_cpu_linear(pass, pack, layer, CPU_O, acts->attn, acts->s[CPU_O], acts->x_in, acts->x_mid);
    backend->ops->rmsnorm(backend->pool, pack->m, c->hidden, acts->x_mid, c->hidden,
                          backend->model.layers[layer].norm_mid, c->norm_eps, pass->xn, c->hidden,
                          acts->rstd_mid);
    claas_cpu_linear(pass, pack, layer, CPU_GATE_UP, pass->xn, acts->s[CPU_GATE_UP], NULL,
                     acts->gate_up);
    code = claas_cpu_yield(pass);
    if (code < 0)
        return code;
    backend->ops->swiglu(backend->pool, pack->m, c->intermediate, acts->gate_up,
                         2 * c->intermediate, pass->h, c->intermediate);
    claas_cpu_linear(pass, pack, layer, CPU_DOWN, pass->h, acts->s[CPU_DOWN], acts->x_mid,
                     acts->x_out);
    return claas_cpu_yield(pass);
}

/* --- all layers, nothing kept --- */

void claas_cpu_gather(const struct claas_ops *ops, const void *in, const int32_t *rows, int count,
                      size_t width, void *out)
{
    for (int i = 0; i < count; i++)
        memcpy(claas_cpu_at(ops, out, (size_t)i * width),
               claas_cpu_at(ops, in, (size_t)rows[i] * width), width * ops->act_bytes);
}

/* The wanted rows as a pack of their own: gathers x_in and attn, and cuts the groups down to them.
 */
static struct claas_pack gather_tail(const struct cpu_pass *pass, struct cpu_infer *infer)
{
    const claas_backend_t *backend = pass->backend;
    struct claas_pack pack = {.m = infer->tail_count, .groups = infer->tail_groups};

    claas_cpu_gather(backend->ops, infer->acts.x_in, infer->tail, infer->tail_count,
                     (size_t)backend->model.config.hidden, infer->tail_x);
    claas_cpu_gather(backend->ops, infer->acts.attn, infer->tail, infer->tail_count,
                     (size_t)backend->model.nq, infer->tail_attn);
    for (int i = 0, g = 0; i < infer->tail_count; i++) {
        const struct claas_pack_group *from = &pass->pack->groups[g];

        while (infer->tail[i] >= from->first + from->count)
            from = &pass->pack->groups[++g];
        if (pack.group_count == 0 || pack.groups[pack.group_count - 1].adapter != from->adapter)
            pack.groups[pack.group_count++] =
                (struct claas_pack_group){.first = i, .adapter = from->adapter};
        pack.groups[pack.group_count - 1].count++;
    }
    return pack;
}

int claas_cpu_infer(const struct cpu_pass *pass, struct cpu_infer *infer, void *out)
{
    claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;
    int last = c->layers - 1, code = 0;
    struct cpu_acts tail = infer->acts;
    struct claas_pack pack;

    claas_cpu_embed(backend, pass->pack->tokens, pass->pack->m, infer->acts.x_in);
    for (int l = 0; l < last && code >= 0; l++) {
        code = claas_cpu_attention_half(pass, l, &infer->acts);
        if (code >= 0)
            code = claas_cpu_mlp_half(pass, pass->pack, l, &infer->acts);
    }
    if (code < 0)
        return code;
    project(pass, last, &infer->acts);
    if (infer->tail_count == 0) /* only the keys and values were wanted */
        return claas_cpu_yield(pass);
    attend(pass, last, &infer->acts);
    pack = gather_tail(pass, infer);
    tail.x_in = infer->tail_x;
    tail.attn = infer->tail_attn;
    code = claas_cpu_mlp_half(pass, &pack, last, &tail);
    if (code < 0)
        return code;
    backend->ops->rmsnorm(backend->pool, pack.m, c->hidden, tail.x_out, c->hidden,
                          backend->model.norm_out, c->norm_eps, out, c->hidden, NULL);
    return 0;
}

/* --- ends --- */

struct embed_task {
    const claas_backend_t *backend;
    const int32_t *tokens;
    void *out;
};

static void embed_row(void *arg, int row)
{
    const struct embed_task *task = arg;
    const struct claas_ops *ops = task->backend->ops;
    const struct cpu_model *model = &task->backend->model;
    size_t d = (size_t)model->config.hidden;
    void *out = claas_cpu_at(ops, task->out, (size_t)row * d);

    if (model->embedding)
        memcpy(out, claas_cpu_at(ops, model->embedding, (size_t)task->tokens[row] * d),
               d * ops->act_bytes);
    else
        ops->unpack_row(model->head.panels, model->config.hidden, task->tokens[row], out);
}

void claas_cpu_embed(claas_backend_t *backend, const int32_t *tokens, int m, void *out)
{
    struct embed_task task = {backend, tokens, out};

    claas_pool_run(backend->pool, m, embed_row, &task);
}

void claas_cpu_logits(claas_backend_t *backend, int m, const void *x, float *logits)
{
    const struct cpu_weight *head = &backend->model.head;
    struct claas_gemm_args args = {
        .m = m,
        .n = head->n,
        .k = head->k,
        .x = x,
        .ldx = head->k,
        .w = head->panels,
        .blocks = head->blocks,
        .out32 = logits,
        .ldo = head->n,
    };

    backend->ops->gemm(backend->pool, &args);
}

struct round_task {
    const struct claas_ops *ops;
    const float *in;
    void *out;
    size_t count;
};
#define ROUND_PART 16384

static void round_part(void *arg, int part)
{
    const struct round_task *task = arg;
    size_t first = (size_t)part * ROUND_PART, left = task->count - first;

    task->ops->to_act(task->in + first, claas_cpu_at(task->ops, task->out, first),
                      left < ROUND_PART ? left : ROUND_PART);
}

void claas_cpu_to_act(claas_backend_t *backend, const float *in, void *out, size_t count)
{
    struct round_task task = {backend->ops, in, out, count};

    claas_pool_run(backend->pool, (int)((count + ROUND_PART - 1) / ROUND_PART), round_part, &task);
}

/* --- places --- */

void claas_cpu_place_pass(const claas_backend_t *backend, struct cpu_arena *arena, int m, int runs,
                          struct cpu_pass *pass)
{
    const struct cpu_model *model = &backend->model;
    size_t row = (size_t)m * backend->ops->act_bytes;
    size_t f = (size_t)model->config.intermediate, d = (size_t)model->config.hidden;
    size_t widest = 2 * f;

    if (widest < (size_t)model->nqkv)
        widest = (size_t)model->nqkv;
    if (widest < d)
        widest = d;
    pass->xn = claas_cpu_take(arena, row * d);
    pass->h = claas_cpu_take(arena, row * f);
    pass->mixed = claas_cpu_take(arena, (size_t)(m < CPU_MIXED_ROWS ? m : CPU_MIXED_ROWS) * widest *
                                            sizeof(float));
    pass->runs = claas_cpu_take(arena, (size_t)runs * sizeof(struct claas_attn_run));
}

void claas_cpu_place_infer(const claas_backend_t *backend, struct cpu_arena *arena, int m, int tail,
                           int groups, const struct cpu_pass *pass, struct cpu_infer *infer)
{
    const struct cpu_model *model = &backend->model;
    size_t act = backend->ops->act_bytes, row = (size_t)m * act;
    size_t f = (size_t)model->config.intermediate, d = (size_t)model->config.hidden;
    struct cpu_acts *acts = &infer->acts;

    acts->x_in = claas_cpu_take(arena, row * d);
    acts->x_mid = claas_cpu_take(arena, row * d);
    acts->x_out = acts->x_in; /* x_in is read for the last time before x_out is written */
    acts->qkv = claas_cpu_take(arena, row * (size_t)model->nqkv);
    acts->attn = claas_cpu_take(arena, row * (size_t)model->nq);
    acts->gate_up = claas_cpu_take(arena, row * 2 * f);
    for (int kind = 0; kind < CPU_WEIGHTS; kind++)
        acts->s[kind] = claas_cpu_take(arena, row * (size_t)pass->lds[kind]);
    infer->tail_x = claas_cpu_take(arena, (size_t)tail * act * d);
    infer->tail_attn = claas_cpu_take(arena, (size_t)tail * act * (size_t)model->nq);
    infer->tail_groups = claas_cpu_take(arena, (size_t)groups * sizeof(struct claas_pack_group));
}
