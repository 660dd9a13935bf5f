#include "cuda/pass.h"

#include "claas/mem.h"

#include <math.h>
#include <string.h>

/* --- what the host hands over --- */

int cuda_upload_new(struct cuda_context *context, struct cuda_upload *upload, size_t bytes,
                    const char *what)
{
    int code = cuda_check(context, cudaMallocHost((void **)&upload->host, bytes), what);

    if (code >= 0)
        code = cuda_region_new(context, &upload->device, bytes, what);
    if (code >= 0)
        code = cuda_check(context,
                          cudaEventCreateWithFlags(&upload->copied, cudaEventDisableTiming), what);
    if (code < 0) {
        cuda_upload_done(context, upload);
        return code;
    }
    upload->bytes = bytes;
    return 0;
}

void cuda_upload_done(struct cuda_context *context, struct cuda_upload *upload)
{
    if (upload->copied)
        (void)cudaEventDestroy(upload->copied);
    if (upload->host)
        (void)cudaFreeHost(upload->host);
    cuda_region_done(context, &upload->device);
    *upload = (struct cuda_upload){0};
}

int cuda_upload_begin(struct cuda_context *context, struct cuda_upload *upload)
{
    upload->used = 0;
    if (!upload->pending)
        return 0;
    upload->pending = false;
    return cuda_check(context, cudaEventSynchronize(upload->copied), "a copy to the device");
}

void *cuda_upload_take(struct cuda_upload *upload, size_t bytes, const void **device)
{
    size_t at = upload->used;

    if (bytes > upload->bytes - at)
        return NULL;
    upload->used = (at + bytes + 15) & ~(size_t)15;
    if (upload->used > upload->bytes)
        upload->used = upload->bytes;
    *device = (uint8_t *)upload->device.base + at;
    return upload->host + at;
}

int cuda_upload_send(struct cuda_context *context, struct cuda_upload *upload)
{
    int code = cuda_check(context,
                          cudaMemcpyAsync(upload->device.base, upload->host, upload->used,
                                          cudaMemcpyHostToDevice, context->stream),
                          "a copy to the device");

    if (code >= 0)
        code = cuda_check(context, cudaEventRecord(upload->copied, context->stream),
                          "a copy to the device");
    upload->pending = code >= 0;
    return code;
}

/* --- packs --- */

size_t cuda_pack_bytes(int m, int runs, int tables)
{
    return 4 * ((size_t)m * sizeof(int32_t) + 16) + (size_t)runs * sizeof(struct cuda_attn_run) +
           ((size_t)runs + (size_t)tables) * sizeof(int32_t) + 64;
}

static int blocks_of(const struct claas_pack_run *run)
{
    return (run->pos + run->count + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK;
}

/* Runs in the device's form; a run's children are listed in their order. */
static void fill_runs(const struct claas_pack *pack, bool paged, struct cuda_attn_run *runs,
                      int32_t *children, int32_t *tables, struct cuda_pack *ret)
{
    int table = 0, child = 0;

    for (int i = 0; i < pack->run_count; i++) {
        const struct claas_pack_run *run = &pack->runs[i];

        runs[i] = (struct cuda_attn_run){
            .first = run->first,
            .count = run->count,
            .pos = run->pos,
            .parent_first = run->parent >= 0 ? pack->runs[run->parent].first : 0,
            .table = table,
            .child_from = child,
        };
        if (paged) {
            memcpy(tables + table, run->blocks, (size_t)blocks_of(run) * sizeof(int32_t));
            table += blocks_of(run);
        }
        for (int j = i + 1; j < pack->run_count && !paged && run->parent < 0; j++)
            if (pack->runs[j].parent == i)
                children[child++] = j;
        runs[i].child_end = child;
        if (ret->longest < run->count)
            ret->longest = run->count;
        if (ret->furthest < run->pos + run->count)
            ret->furthest = run->pos + run->count;
    }
}

static void fill_rows(const struct claas_pack *pack, int32_t *tokens, int32_t *pos, int32_t *blocks,
                      int32_t *row_run)
{
    size_t bytes = (size_t)pack->m * sizeof(int32_t);

    memcpy(tokens, pack->tokens, bytes);
    memcpy(pos, pack->pos, bytes);
    memcpy(blocks, pack->blocks, bytes);
    for (int i = 0; i < pack->run_count; i++)
        for (int j = 0; j < pack->runs[i].count; j++)
            row_run[pack->runs[i].first + j] = i;
}

int cuda_pack_fill(struct cuda_upload *upload, const struct claas_pack *pack, bool paged,
                   struct cuda_pack *ret)
{
    size_t rows = (size_t)pack->m * sizeof(int32_t), table = 0;
    const void *at[7] = {0};
    void *host[7];

    *ret = (struct cuda_pack){.m = pack->m,
                              .run_count = pack->run_count,
                              .groups = pack->groups,
                              .group_count = pack->group_count};
    for (int i = 0; i < pack->run_count && paged; i++)
        table += (size_t)blocks_of(&pack->runs[i]);
    for (int i = 0; i < 4; i++)
        host[i] = cuda_upload_take(upload, rows, &at[i]);
    host[4] =
        cuda_upload_take(upload, (size_t)pack->run_count * sizeof(struct cuda_attn_run), &at[4]);
    host[5] = cuda_upload_take(upload, (size_t)pack->run_count * sizeof(int32_t), &at[5]);
    host[6] = cuda_upload_take(upload, table * sizeof(int32_t), &at[6]);
    for (int i = 0; i < 7; i++)
        if (!host[i])
            return claas_fail(CLAAS_ERR_LIMIT, "a pack of %d rows is larger than its buffer",
                              pack->m);
    fill_rows(pack, host[0], host[1], host[2], host[3]);
    fill_runs(pack, paged, host[4], host[5], host[6], ret);
    ret->tokens = at[0];
    ret->pos = at[1];
    ret->blocks = at[2];
    ret->row_run = at[3];
    ret->runs = at[4];
    ret->children = at[5];
    ret->tables = at[6];
    return 0;
}

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
                                 const int lds[CUDA_WEIGHTS], bool saved)
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
    if (!saved)
        return acts;
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

    infer->acts = cuda_place_acts(backend, arena, m, pass->lds, false);
    infer->acts.x_in = infer->acts.x_out = cuda_take(arena, (size_t)m * d * act);
    infer->tail_x = cuda_take(arena, (size_t)tail * d * act);
    infer->tail_attn = cuda_take(arena, (size_t)tail * (size_t)backend->model.nq * act);
}

/* --- a layer --- */

int cuda_yield(const struct cuda_pass *pass)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    int code;

    if (!pass->yield)
        return 0;
    code = cuda_check(context, cudaEventRecord(backend->turns[backend->turn], context->stream),
                      "a step");
    backend->turn ^= 1;
    if (code >= 0)
        code = cuda_check(context, cudaEventSynchronize(backend->turns[backend->turn]), "a step");
    if (code < 0)
        return code;
    if (pass->yield(pass->yield_arg) != 0)
        return claas_fail(CLAAS_ERR_CANCELLED, NULL);
    return 0;
}

/* Rows of one adapter: S = x A^T, and of each part out += S (sB)^T. */
static int linear_lora(const struct cuda_pass *pass, const struct claas_pack_group *group,
                       int layer, enum cuda_weight_kind kind, const void *x, void *s, void *out)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct cuda_weight *weight = &backend->model.layers[layer].weights[kind];
    const struct cuda_adapter *adapter = &group->adapter->cuda;
    const struct cuda_lora_layout *layout = &adapter->layout;
    size_t base = (size_t)layer * layout->layer, first = (size_t)group->first;
    int width = layout->parts[kind] * layout->rank, code;
    void *s_rows = cuda_at(context, s, first * (size_t)pass->lds[kind]);

    if (width == 0)
        return 0;
    code = cuda_gemm(context, &(struct cuda_gemm){
                                  .form = CUDA_GEMM_NT,
                                  .m = group->count,
                                  .n = width,
                                  .k = weight->k,
                                  .a = cuda_at(context, x, first * (size_t)weight->k),
                                  .lda = weight->k,
                                  .b = cuda_at(context, adapter->view.base, base + layout->a[kind]),
                                  .ldb = weight->k,
                                  .out = s_rows,
                                  .ldo = pass->lds[kind],
                                  .out_type = context->act,
                                  .alpha = 1,
                              });
    for (int i = 0; i < weight->part_count && code >= 0; i++) {
        const struct cuda_part *part = &weight->parts[i];
        int place = layout->index[part->module];

        if (place < 0)
            continue;
        code = cuda_gemm(
            context,
            &(struct cuda_gemm){
                .form = CUDA_GEMM_NT,
                .m = group->count,
                .n = part->n,
                .k = layout->rank,
                .a = cuda_at(context, s_rows, (size_t)place * (size_t)layout->rank),
                .lda = pass->lds[kind],
                .b = cuda_at(context, adapter->view.base, base + layout->b[part->module]),
                .ldb = layout->rank,
                .out = cuda_at(context, out, first * (size_t)weight->n + (size_t)part->row),
                .ldo = weight->n,
                .out_type = context->act,
                .alpha = 1,
                .beta = 1,
            });
    }
    return code;
}

int cuda_linear(const struct cuda_pass *pass, int m, const struct claas_pack_group *groups,
                int group_count, int layer, enum cuda_weight_kind kind, const void *x, void *s,
                const void *residual, void *out)
{
    claas_backend_t *backend = pass->backend;
    const struct cuda_weight *weight = &backend->model.layers[layer].weights[kind];
    int code = cuda_gemm(&backend->context, &(struct cuda_gemm){
                                                .form = CUDA_GEMM_NT,
                                                .m = m,
                                                .n = weight->n,
                                                .k = weight->k,
                                                .a = x,
                                                .lda = weight->k,
                                                .b = weight->w,
                                                .ldb = weight->k,
                                                .out = out,
                                                .ldo = weight->n,
                                                .out_type = backend->context.act,
                                                .alpha = 1,
                                                .beta = residual ? 1 : 0,
                                                .add = residual,
                                                .frozen = true,
                                            });

    for (int i = 0; i < group_count && code >= 0; i++)
        if (groups[i].adapter)
            code = linear_lora(pass, &groups[i], layer, kind, x, s, out);
    return code;
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
    int code =
        cuda_rmsnorm(context, pack->m, c->hidden, acts->x_in, backend->model.layers[layer].norm_in,
                     c->norm_eps, pass->xn, acts->rstd_in);

    if (code >= 0)
        code = cuda_linear(pass, pack->m, pack->groups, pack->group_count, layer, CUDA_QKV,
                           pass->xn, acts->s[CUDA_QKV], NULL, acts->qkv);
    if (code >= 0)
        code = cuda_qkv_finish(context, &qkv);
    return code >= 0 ? cuda_attention(context, &attention) : code;
}

int cuda_mlp_half(const struct cuda_pass *pass, int m, const struct claas_pack_group *groups,
                  int group_count, int layer, const struct cuda_acts *acts)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct claas_model_config *c = &backend->model.config;
    int code = cuda_linear(pass, m, groups, group_count, layer, CUDA_O, acts->attn, acts->s[CUDA_O],
                           acts->x_in, acts->x_mid);

    if (code >= 0)
        code =
            cuda_rmsnorm(context, m, c->hidden, acts->x_mid, backend->model.layers[layer].norm_mid,
                         c->norm_eps, pass->xn, acts->rstd_mid);
    if (code >= 0)
        code = cuda_linear(pass, m, groups, group_count, layer, CUDA_GATE_UP, pass->xn,
                           acts->s[CUDA_GATE_UP], NULL, acts->gate_up);
    if (code >= 0)
        code = cuda_swiglu(context, m, c->intermediate, acts->gate_up, pass->h);
    if (code >= 0)
        code = cuda_linear(pass, m, groups, group_count, layer, CUDA_DOWN, pass->h,
                           acts->s[CUDA_DOWN], acts->x_mid, acts->x_out);
    return code >= 0 ? cuda_yield(pass) : code;
}

/* --- all layers --- */

/* The groups of the tail's rows, numbered along the tail. */
static int tail_groups(const struct cuda_pass *pass, struct cuda_infer *infer)
{
    int at = 0, groups = 0;

    for (int i = 0; i < pass->pack.group_count; i++) {
        const struct claas_pack_group *group = &pass->pack.groups[i];
        int first = at;

        while (at < infer->tail_count && infer->tail_host[at] < group->first + group->count)
            at++;
        if (at > first)
            infer->tail_groups[groups++] = (struct claas_pack_group){
                .first = first, .count = at - first, .adapter = group->adapter};
    }
    return groups;
}

static int infer_tail(const struct cuda_pass *pass, struct cuda_infer *infer, void *out)
{
    claas_backend_t *backend = pass->backend;
    struct cuda_context *context = &backend->context;
    const struct claas_model_config *c = &backend->model.config;
    struct cuda_acts acts = infer->acts;
    int code =
        cuda_gather(context, infer->tail_count, c->hidden, acts.x_in, infer->tail, infer->tail_x);

    if (code >= 0)
        code = cuda_gather(context, infer->tail_count, backend->model.nq, acts.attn, infer->tail,
                           infer->tail_attn);
    acts.x_in = infer->tail_x;
    acts.attn = infer->tail_attn;
    if (code >= 0)
        code = cuda_mlp_half(pass, infer->tail_count, infer->tail_groups, tail_groups(pass, infer),
                             c->layers - 1, &acts);
    if (code >= 0)
        code = cuda_rmsnorm(context, infer->tail_count, c->hidden, acts.x_out,
                            backend->model.norm_out, c->norm_eps, out, NULL);
    return code;
}

int cuda_infer(const struct cuda_pass *pass, struct cuda_infer *infer, void *out)
{
    claas_backend_t *backend = pass->backend;
    const struct claas_model_config *c = &backend->model.config;
    const struct cuda_pack *pack = &pass->pack;
    int code = cuda_embed(&backend->context, pack->m, c->hidden, backend->model.embedding,
                          pack->tokens, infer->acts.x_in);

    for (int l = 0; l < c->layers && code >= 0; l++) {
        code = cuda_attention_half(pass, l, &infer->acts);
        if (code >= 0 && l < c->layers - 1)
            code = cuda_mlp_half(pass, pack->m, pack->groups, pack->group_count, l, &infer->acts);
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
                                            .alpha = 1,
                                            .frozen = true,
                                        });
}
