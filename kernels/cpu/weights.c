/* The frozen model in the operation table's layout: every weight once, as panels. q|k|v and gate|up
 * are fused into one weight each; because a part starts at a multiple of 16 rows, its panels can be
 * addressed by themselves, so LoRA and the file's blocks work per part. In bf16 the quantised
 * blocks of the file are kept beside the panels for decoding: a third of the bytes per token, the
 * same values. */
#include "cpu/step.h"
#include "pack/loading.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The modules fused into each weight, in order. */
static const struct {
    int count;
    enum claas_module modules[CPU_PARTS_MAX];
} weight_parts[CPU_WEIGHTS] = {
    [CPU_QKV] = {3, {CLAAS_MODULE_Q, CLAAS_MODULE_K, CLAAS_MODULE_V}},
    [CPU_O] = {1, {CLAAS_MODULE_O}},
    [CPU_GATE_UP] = {2, {CLAAS_MODULE_GATE, CLAAS_MODULE_UP}},
    [CPU_DOWN] = {1, {CLAAS_MODULE_DOWN}},
};
static const char *const module_path[CLAAS_MODULE_COUNT] = {
    [CLAAS_MODULE_Q] = "self_attn.q_proj", [CLAAS_MODULE_K] = "self_attn.k_proj",
    [CLAAS_MODULE_V] = "self_attn.v_proj", [CLAAS_MODULE_O] = "self_attn.o_proj",
    [CLAAS_MODULE_GATE] = "mlp.gate_proj", [CLAAS_MODULE_UP] = "mlp.up_proj",
    [CLAAS_MODULE_DOWN] = "mlp.down_proj",
};

struct loader {
    struct cpu_model *model;
    const struct claas_ops *ops;
    claas_pool_t *pool;
    const claas_model_t *source;
    struct claas_loading *loading;
    struct cpu_arena panels, small;
};

static int find_tensor(const struct loader *loader, int layer, const char *name,
                       const struct claas_tensor **ret)
{
    CLAAS_AUTO_FREE char *full =
        layer < 0 ? claas_strdup(name) : claas_format("model.layers.%d.%s", layer, name);

    if (!full)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret = claas_model_tensor(loader->source, full);
    if (!*ret)
        return claas_fail(CLAAS_ERR_FORMAT, "the model has no tensor %s", full);
    return 0;
}

/* --- packing over the pool --- */

#define AHEAD_BYTES ((size_t)64 << 20) /* of the file that are asked for ahead of being read */

static int rows_ahead(const struct claas_tensor *tensor)
{
    const size_t rows = AHEAD_BYTES / (tensor->bytes / (size_t)tensor->rows + 1);

    return rows < (size_t)tensor->rows ? (int)rows : tensor->rows;
}

struct pack_task {
    const struct claas_ops *ops;
    const struct claas_tensor *tensor;
    void *panels;
    float *rows; /* [members][16][K] */
    claas_pool_t *pool;
};

static void pack_panel(void *arg, int panel)
{
    const struct pack_task *task = arg;
    const struct claas_tensor *tensor = task->tensor;
    size_t k = (size_t)tensor->columns;
    float *buffer = task->rows + (size_t)claas_pool_member(task->pool) * CLAAS_LANES * k;
    const float *rows[CLAAS_LANES];

    claas_tensor_prepare(tensor, panel * CLAAS_LANES + rows_ahead(tensor), CLAAS_LANES);
    for (int j = 0; j < CLAAS_LANES; j++) {
        int row = panel * CLAAS_LANES + j;

        rows[j] = NULL;
        if (row < tensor->rows) {
            claas_tensor_row(tensor, row, buffer + (size_t)j * k);
            rows[j] = buffer + (size_t)j * k;
        }
    }
    task->ops->pack_panel(task->panels, tensor->columns, panel, rows);
}

static int pack_tensor(const struct loader *loader, const struct claas_tensor *tensor, void *panels)
{
    size_t members = (size_t)claas_pool_threads(loader->pool);
    struct pack_task task = {
        .ops = loader->ops, .tensor = tensor, .panels = panels, .pool = loader->pool};
    CLAAS_AUTO_FREE float *rows =
        claas_alloc_aligned(members * CLAAS_LANES * (size_t)tensor->columns * sizeof(float));

    if (!rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory to load %s", tensor->name);
    task.rows = rows;
    claas_tensor_prepare(tensor, 0, rows_ahead(tensor));
    claas_pool_run(loader->pool, (tensor->rows + CLAAS_LANES - 1) / CLAAS_LANES, pack_panel, &task);
    claas_loading_add(loader->loading, tensor, tensor->rows);
    return 0;
}

static void count_blocks(const struct loader *loader, const struct claas_blocks *blocks)
{
    if (blocks)
        loader->model->blocks_bytes += claas_blocks_bytes(blocks);
}

/* The fused weight in one object when the encodings allow it, else part by part. */
static int keep_blocks(const struct loader *loader, struct cpu_weight *weight,
                       const struct claas_tensor *const *tensors)
{
    int code;

    if (loader->ops->precision != CLAAS_PRECISION_BF16)
        return 0;
    code = claas_blocks_new_fused(tensors, weight->part_count, &weight->blocks);
    if (code < 0)
        return code;
    count_blocks(loader, weight->blocks);
    for (int i = 0; i < weight->part_count && !weight->blocks && weight->part_count > 1; i++) {
        code = claas_blocks_new(tensors[i], &weight->parts[i].blocks);
        if (code < 0)
            return code;
        count_blocks(loader, weight->parts[i].blocks);
    }
    return 0;
}

/* --- one weight --- */

static int load_vector(struct loader *loader, int layer, const char *name, int count, float *out)
{
    const struct claas_tensor *tensor = NULL;
    int code = find_tensor(loader, layer, name, &tensor);

    if (code < 0)
        return code;
    if (tensor->rows != 1 || tensor->columns != count)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor %s: %d x %d values, %d expected", tensor->name,
                          tensor->rows, tensor->columns, count);
    claas_tensor_row(tensor, 0, out);
    claas_loading_add(loader->loading, tensor, 1);
    return 0;
}

static int load_part(struct loader *loader, int layer, struct cpu_weight *weight,
                     const struct cpu_part *part, const struct claas_tensor **ret)
{
    const struct claas_tensor *tensor = NULL;
    char name[64];
    int code;

    (void)snprintf(name, sizeof(name), "%s.weight", module_path[part->module]);
    code = find_tensor(loader, layer, name, &tensor);
    if (code < 0)
        return code;
    if (tensor->rows != part->n || tensor->columns != weight->k)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor %s: [%d, %d], expected [%d, %d]", tensor->name,
                          tensor->rows, tensor->columns, part->n, weight->k);
    code = pack_tensor(loader, tensor,
                       (uint8_t *)weight->panels +
                           claas_panel_bytes(loader->ops->precision, part->row, weight->k));
    if (code < 0)
        return code;
    if (weight->bias) {
        (void)snprintf(name, sizeof(name), "%s.bias", module_path[part->module]);
        code = load_vector(loader, layer, name, part->n, weight->bias + part->row);
        if (code < 0)
            return code;
    }
    *ret = tensor;
    return 0;
}

static int load_weight(struct loader *loader, int layer, struct cpu_weight *weight)
{
    const struct claas_tensor *tensors[CPU_PARTS_MAX];

    for (int i = 0; i < weight->part_count; i++) {
        int code = load_part(loader, layer, weight, &weight->parts[i], &tensors[i]);

        if (code < 0)
            return code;
    }
    return keep_blocks(loader, weight, tensors);
}

/* Shapes and places of a weight. With arenas that only count the places are NULL. */
static void place_weight(struct loader *loader, struct cpu_weight *weight,
                         enum cpu_weight_kind kind)
{
    const struct claas_model_config *config = &loader->model->config;

    weight->n = 0;
    weight->k = claas_module_columns(config, weight_parts[kind].modules[0]);
    weight->part_count = weight_parts[kind].count;
    for (int i = 0; i < weight->part_count; i++) {
        struct cpu_part *part = &weight->parts[i];

        part->module = weight_parts[kind].modules[i];
        part->row = weight->n;
        part->n = claas_module_rows(config, part->module);
        weight->n += part->n;
    }
    weight->panels = claas_cpu_take(
        &loader->panels, claas_panel_bytes(loader->ops->precision, weight->n, weight->k));
    if (kind == CPU_QKV && config->qkv_bias)
        weight->bias = claas_cpu_take(&loader->small, (size_t)weight->n * sizeof(float));
}

static void place_model(struct loader *loader)
{
    struct cpu_model *model = loader->model;
    const struct claas_model_config *c = &model->config;
    size_t hidden = (size_t)c->hidden * sizeof(float), head = (size_t)c->head_dim * sizeof(float);

    for (int l = 0; l < c->layers; l++) {
        struct cpu_layer *layer = &model->layers[l];

        for (int kind = 0; kind < CPU_WEIGHTS; kind++)
            place_weight(loader, &layer->weights[kind], kind);
        layer->norm_in = claas_cpu_take(&loader->small, hidden);
        layer->norm_mid = claas_cpu_take(&loader->small, hidden);
        if (c->qk_norm) {
            layer->norm_q = claas_cpu_take(&loader->small, head);
            layer->norm_k = claas_cpu_take(&loader->small, head);
        }
    }
    model->head = (struct cpu_weight){.n = c->vocab, .k = c->hidden, .part_count = 1};
    model->head.parts[0].n = c->vocab;
    model->head.panels = claas_cpu_take(
        &loader->panels, claas_panel_bytes(loader->ops->precision, c->vocab, c->hidden));
    if (!c->tied)
        model->embedding = claas_cpu_take(&loader->panels, (size_t)c->vocab * (size_t)c->hidden *
                                                               loader->ops->act_bytes);
    model->norm_out = claas_cpu_take(&loader->small, hidden);
    model->cos_sin =
        claas_cpu_take(&loader->small, (size_t)c->context * (size_t)c->head_dim * sizeof(float));
}

/* --- the whole --- */

static int load_layer(struct loader *loader, int l)
{
    const struct claas_model_config *c = &loader->model->config;
    struct cpu_layer *layer = &loader->model->layers[l];
    int code = load_vector(loader, l, "input_layernorm.weight", c->hidden, layer->norm_in);

    if (code >= 0)
        code =
            load_vector(loader, l, "post_attention_layernorm.weight", c->hidden, layer->norm_mid);
    if (code >= 0 && c->qk_norm)
        code = load_vector(loader, l, "self_attn.q_norm.weight", c->head_dim, layer->norm_q);
    if (code >= 0 && c->qk_norm)
        code = load_vector(loader, l, "self_attn.k_norm.weight", c->head_dim, layer->norm_k);
    for (int kind = 0; kind < CPU_WEIGHTS && code >= 0; kind++)
        code = load_weight(loader, l, &layer->weights[kind]);
    return code;
}

struct embed_task {
    const struct claas_ops *ops;
    const struct claas_tensor *tensor;
    uint8_t *out;
    float *rows; /* [members][D] */
    claas_pool_t *pool;
};

static void round_embedding_row(void *arg, int row)
{
    const struct embed_task *task = arg;
    size_t k = (size_t)task->tensor->columns;
    float *buffer = task->rows + (size_t)claas_pool_member(task->pool) * k;

    if (row % CLAAS_LANES == 0)
        claas_tensor_prepare(task->tensor, row + rows_ahead(task->tensor), CLAAS_LANES);
    claas_tensor_row(task->tensor, row, buffer);
    task->ops->to_act(buffer, task->out + (size_t)row * k * task->ops->act_bytes, k);
}

static int load_ends(struct loader *loader)
{
    struct cpu_model *model = loader->model;
    const struct claas_model_config *c = &model->config;
    const struct claas_tensor *embedding = NULL, *head = NULL;
    int code = find_tensor(loader, -1, "model.embed_tokens.weight", &embedding);

    head = embedding;
    if (code >= 0 && !c->tied)
        code = find_tensor(loader, -1, "lm_head.weight", &head);
    if (code < 0)
        return code;
    if (embedding->rows != c->vocab || embedding->columns != c->hidden || head->rows != c->vocab ||
        head->columns != c->hidden)
        return claas_fail(CLAAS_ERR_FORMAT, "embedding or head is not [%d, %d]", c->vocab,
                          c->hidden);
    code = pack_tensor(loader, head, model->head.panels);
    if (code >= 0)
        code = keep_blocks(loader, &model->head, &head);
    if (code >= 0 && !c->tied) {
        struct embed_task task = {
            .ops = loader->ops, .tensor = embedding, .out = model->embedding, .pool = loader->pool};
        CLAAS_AUTO_FREE float *rows = claas_alloc_aligned((size_t)claas_pool_threads(loader->pool) *
                                                          (size_t)c->hidden * sizeof(float));

        if (!rows)
            return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory to load the embedding");
        task.rows = rows;
        claas_tensor_prepare(embedding, 0, rows_ahead(embedding));
        claas_pool_run(loader->pool, c->vocab, round_embedding_row, &task);
        claas_loading_add(loader->loading, embedding, embedding->rows);
    }
    return code < 0 ? code
                    : load_vector(loader, -1, "model.norm.weight", c->hidden, model->norm_out);
}

static int check_shape(const struct claas_model_config *c)
{
    if (c->head_dim % CLAAS_LANES || c->intermediate % CLAAS_LANES)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "head size %d and MLP width %d must be multiples of %d", c->head_dim,
                          c->intermediate, CLAAS_LANES);
    if (c->kv_heads < 1 || c->heads % c->kv_heads)
        return claas_fail(CLAAS_ERR_FORMAT, "%d heads are no multiple of %d kv heads", c->heads,
                          c->kv_heads);
    if (c->head_dim > CLAAS_HEAD_DIM_MAX)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "head size %d, the limit is %d", c->head_dim,
                          CLAAS_HEAD_DIM_MAX);
    return 0;
}

int claas_cpu_model_load(struct cpu_model *model, const struct claas_ops *ops, claas_pool_t *pool,
                         const claas_model_t *source, struct claas_loading *loading)
{
    struct loader loader = {
        .model = model, .ops = ops, .pool = pool, .source = source, .loading = loading};
    int code;

    model->config = *claas_model_config(source);
    model->nq = model->config.heads * model->config.head_dim;
    model->nk = model->config.kv_heads * model->config.head_dim;
    model->nqkv = model->nq + 2 * model->nk;
    code = check_shape(&model->config);
    if (code < 0)
        return code;
    model->layers = CLAAS_NEW_ARRAY(struct cpu_layer, (size_t)model->config.layers);
    if (!model->layers)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    place_model(&loader); /* the arenas only count */
    code = claas_cpu_region_new(&model->panels, loader.panels.used, "the model's weights");
    if (code >= 0)
        code = claas_cpu_region_new(&model->small, loader.small.used, "the model's tables");
    if (code < 0)
        return code;
    claas_cpu_region_huge(&model->panels);
    loader.panels = (struct cpu_arena){.base = model->panels.base};
    loader.small = (struct cpu_arena){.base = model->small.base};
    place_model(&loader);
    for (int l = 0; l < model->config.layers && code >= 0; l++)
        code = load_layer(&loader, l);
    if (code >= 0)
        code = load_ends(&loader);
    if (code >= 0)
        claas_cpu_rope_table(&model->config, pool, model->cos_sin);
    return code;
}

static void free_blocks(struct cpu_weight *weight)
{
    claas_blocks_free(&weight->blocks);
    for (int i = 0; i < CPU_PARTS_MAX; i++)
        claas_blocks_free(&weight->parts[i].blocks);
}

void claas_cpu_model_done(struct cpu_model *model)
{
    for (int l = 0; model->layers && l < model->config.layers; l++)
        for (int kind = 0; kind < CPU_WEIGHTS; kind++)
            free_blocks(&model->layers[l].weights[kind]);
    free_blocks(&model->head);
    free(model->layers);
    model->layers = NULL;
    claas_cpu_region_done(&model->panels);
    claas_cpu_region_done(&model->small);
}
