/* The frozen model on the device: one allocation, act weights row-major, float32 odds and ends
 * behind them.
 *
 * Rows of a file are decoded and rounded by a team of threads into two pinned buffers by turns: one
 * is copied while the next fills, so that loading takes as long as the slower of decoding and the
 * bus. What is bfloat16 in the file and on the device is copied as it is. Random weights are made
 * where they are needed: Philox is counter based, so a kernel makes the bits that claas_tensor_row
 * makes.
 *
 *   fill: one thread per four columns; element (row, 4q + i) is
 *   bf16((sum of the four bytes of word i of philox(seed, row, q) - 510) std / 147.800542) */
#include "cuda/cuda_model.h"
#include "cuda/philox.cuh"

#include "claas/mem.h"
#include "cpu/pool.h"
#include "cpu/rope.h"

#include <cuda_bf16.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STAGING_BYTES ((size_t)32 << 20)
#define AHEAD         3     /* buffers' worth of the file that are asked for ahead of being read */
#define TASK_ELEMENTS 32768 /* decoded by a thread at a time: long beside handing them out */
#define FILL_THREADS  256
#define FILL_BLOCKS   16 /* per multiprocessor */
#define HEAD_DIM_STEP 16
#define HEAD_DIM_MAX  256

/* The modules fused into each weight, in order. */
static const struct {
    int count;
    enum claas_module modules[CUDA_PARTS_MAX];
} weight_parts[CUDA_WEIGHTS] = {
    {3, {CLAAS_MODULE_Q, CLAAS_MODULE_K, CLAAS_MODULE_V}},
    {1, {CLAAS_MODULE_O}},
    {2, {CLAAS_MODULE_GATE, CLAAS_MODULE_UP}},
    {1, {CLAAS_MODULE_DOWN}},
};

struct staging {
    uint8_t *host; /* pinned, STAGING_BYTES */
    cudaEvent_t copied;
    bool pending;
};

struct loader {
    struct cuda_context *context;
    struct cuda_model *model;
    const claas_model_t *source;
    struct claas_loading *loading; /* or NULL */
    claas_pool_t *pool;
    struct cuda_arena weights, small;
    float *host_small; /* what the small arena will hold */
    float *rows;       /* [members][widest] */
    int widest;
    struct staging staging[2];
    int turn;
};

static int find_tensor(const struct loader *loader, int layer, const char *name,
                       const struct claas_tensor **ret)
{
    char full[128];

    if (layer < 0)
        (void)snprintf(full, sizeof(full), "%s", name);
    else
        (void)snprintf(full, sizeof(full), "model.layers.%d.%s", layer, name);
    *ret = claas_model_tensor(loader->source, full);
    if (!*ret)
        return claas_fail(CLAAS_ERR_FORMAT, "the model has no tensor %s", full);
    return 0;
}

/* --- random weights --- */

/* Rounded to bfloat16 in every precision (see make_random_row of kernels/model). */
static __device__ void store(float *out, float value)
{
    *out = __bfloat162float(__float2bfloat16_rn(value));
}

static __device__ void store(__nv_bfloat16 *out, float value)
{
    *out = __float2bfloat16_rn(value);
}

template <typename T>
static __global__ void fill_random_kernel(int rows, int columns, uint64_t seed, float unit, T *out)
{
    size_t quads = ((size_t)columns + 3) / 4;
    size_t count = (size_t)rows * quads, step = (size_t)gridDim.x * blockDim.x;

    for (size_t q = (size_t)blockIdx.x * blockDim.x + threadIdx.x; q < count; q += step) {
        size_t row = q / quads, quad = q % quads;
        uint32_t words[4];

        philox(seed, row, quad, words);
        for (int i = 0; i < 4; i++) {
            uint32_t word = words[i];
            int sum = (int)((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24));
            size_t column = 4 * quad + i;

            if (column < (size_t)columns)
                store(out + row * columns + column, (float)(sum - 510) * unit);
        }
    }
}

static int fill_random(const struct loader *loader, const struct claas_tensor *tensor, void *out)
{
    struct cuda_context *context = loader->context;
    float unit = tensor->random_std / 147.800542f; /* of the sum of four bytes */
    int blocks = FILL_BLOCKS * context->multiprocessors;

    if (context->act == CUDA_TYPE_F32)
        fill_random_kernel<<<blocks, FILL_THREADS, 0, context->stream>>>(
            tensor->rows, tensor->columns, tensor->random_seed, unit, (float *)out);
    else
        fill_random_kernel<<<blocks, FILL_THREADS, 0, context->stream>>>(
            tensor->rows, tensor->columns, tensor->random_seed, unit, (__nv_bfloat16 *)out);
    return cuda_check_launch(context, "random weights");
}

/* --- weights of a file --- */

struct decode_task {
    const struct loader *loader;
    const struct claas_tensor *tensor;
    uint8_t *out;       /* of row `first` */
    int first, count;   /* rows */
    int rows_at_a_time; /* of one index */
};

static void decode_row(const struct decode_task *task, int row)
{
    const struct loader *loader = task->loader;
    const struct claas_tensor *tensor = task->tensor;
    size_t columns = (size_t)tensor->columns;
    void *out = task->out + (size_t)(row - task->first) * columns * loader->context->act_bytes;
    float *buffer = loader->rows + (size_t)claas_pool_member(loader->pool) * loader->widest;
    __nv_bfloat16 *rounded = (__nv_bfloat16 *)out;

    if (loader->context->act == CUDA_TYPE_F32) {
        claas_tensor_row(tensor, row, (float *)out);
        return;
    }
    if (tensor->data && tensor->type == CLAAS_TYPE_BF16 && tensor->permuted_head_rows == 0) {
        memcpy(out, tensor->data + (size_t)row * columns * sizeof(*rounded),
               columns * sizeof(*rounded));
        return;
    }
    claas_tensor_row(tensor, row, buffer);
    for (size_t i = 0; i < columns; i++)
        rounded[i] = __float2bfloat16_rn(buffer[i]);
}

static void decode_rows(void *arg, int index)
{
    const struct decode_task *task = (const struct decode_task *)arg;
    int row = task->first + index * task->rows_at_a_time;
    int end = task->first + task->count;

    if (end - row > task->rows_at_a_time)
        end = row + task->rows_at_a_time;
    for (; row < end; row++)
        decode_row(task, row);
}

/* The buffer to fill next; waits until its last copy is done. */
static int next_staging(struct loader *loader, struct staging **ret)
{
    struct cuda_context *context = loader->context;
    struct staging *staging = &loader->staging[loader->turn];
    int rc = 0;

    loader->turn = !loader->turn;
    if (!staging->host) {
        rc = cuda_pin(context, (void **)&staging->host, STAGING_BYTES, "loading the model");
        if (rc == 0)
            rc = cuda_check(context,
                            cudaEventCreateWithFlags(&staging->copied, cudaEventDisableTiming),
                            "making an event");
    } else if (staging->pending) {
        rc = cuda_check(context, cudaEventSynchronize(staging->copied), "copying weights");
    }
    staging->pending = false;
    *ret = staging;
    return rc;
}

static int load_rows(struct loader *loader, const struct claas_tensor *tensor, int first, int count,
                     void *out)
{
    struct cuda_context *context = loader->context;
    size_t bytes = (size_t)count * (size_t)tensor->columns * context->act_bytes;
    struct staging *staging = NULL;
    struct decode_task task;
    int rc = next_staging(loader, &staging);

    if (rc < 0)
        return rc;
    task.loader = loader;
    task.tensor = tensor;
    task.out = staging->host;
    task.first = first;
    task.count = count;
    task.rows_at_a_time = tensor->columns < TASK_ELEMENTS ? TASK_ELEMENTS / tensor->columns : 1;
    claas_pool_run(loader->pool, (count + task.rows_at_a_time - 1) / task.rows_at_a_time,
                   decode_rows, &task);
    rc = cuda_check(
        context,
        cudaMemcpyAsync(out, staging->host, bytes, cudaMemcpyHostToDevice, context->stream),
        "copying weights");
    if (rc == 0)
        rc = cuda_check(context, cudaEventRecord(staging->copied, context->stream),
                        "copying weights");
    staging->pending = rc == 0;
    return rc;
}

static int load_matrix(struct loader *loader, const struct claas_tensor *tensor, void *out)
{
    size_t row_bytes = (size_t)tensor->columns * loader->context->act_bytes;
    int at_a_time = (int)(STAGING_BYTES / row_bytes);
    int rc = 0;

    if (!tensor->data && tensor->random_std > 0.0f)
        return fill_random(loader, tensor, out);
    if (at_a_time < 1)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor %s: rows of %d", tensor->name,
                          tensor->columns);
    claas_tensor_prepare(tensor, 0, AHEAD * at_a_time);
    for (int first = 0; first < tensor->rows && rc == 0; first += at_a_time) {
        int count = tensor->rows - first < at_a_time ? tensor->rows - first : at_a_time;

        claas_tensor_prepare(tensor, first + AHEAD * at_a_time, at_a_time);
        rc = load_rows(loader, tensor, first, count, (uint8_t *)out + (size_t)first * row_bytes);
        claas_loading_add(loader->loading, tensor, count);
    }
    return rc;
}

/* Where the host prepares what a place in the small arena, `device`, will hold. */
static float *host_place(const struct loader *loader, const float *device)
{
    return loader->host_small + (device - (const float *)loader->small.base);
}

static int load_vector(struct loader *loader, int layer, const char *name, int count, float *out)
{
    const struct claas_tensor *tensor = NULL;
    int rc = find_tensor(loader, layer, name, &tensor);

    if (rc < 0)
        return rc;
    if (tensor->rows != 1 || tensor->columns != count)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor %s: %d x %d values, %d expected", tensor->name,
                          tensor->rows, tensor->columns, count);
    claas_tensor_row(tensor, 0, host_place(loader, out));
    claas_loading_add(loader->loading, tensor, 1);
    return 0;
}

static int load_part(struct loader *loader, int layer, const struct cuda_weight *weight,
                     const struct cuda_part *part, float *bias)
{
    const char *block = part->module <= CLAAS_MODULE_O ? "self_attn" : "mlp";
    const struct claas_tensor *tensor = NULL;
    char name[64];
    int rc;

    (void)snprintf(name, sizeof(name), "%s.%s.weight", block, claas_module_name(part->module));
    rc = find_tensor(loader, layer, name, &tensor);
    if (rc < 0)
        return rc;
    if (tensor->rows != part->n || tensor->columns != weight->k)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor %s: [%d, %d], expected [%d, %d]", tensor->name,
                          tensor->rows, tensor->columns, part->n, weight->k);
    rc = load_matrix(loader, tensor,
                     cuda_at(loader->context, weight->w, (size_t)part->row * (size_t)weight->k));
    if (rc == 0 && bias) {
        (void)snprintf(name, sizeof(name), "%s.%s.bias", block, claas_module_name(part->module));
        rc = load_vector(loader, layer, name, part->n, bias + part->row);
    }
    return rc;
}

static int load_layer(struct loader *loader, int l)
{
    const struct claas_model_config *c = &loader->model->config;
    const struct cuda_layer *layer = &loader->model->layers[l];
    int rc = load_vector(loader, l, "input_layernorm.weight", c->hidden, layer->norm_in);

    if (rc == 0)
        rc = load_vector(loader, l, "post_attention_layernorm.weight", c->hidden, layer->norm_mid);
    if (rc == 0 && c->qk_norm)
        rc = load_vector(loader, l, "self_attn.q_norm.weight", c->head_dim, layer->norm_q);
    if (rc == 0 && c->qk_norm)
        rc = load_vector(loader, l, "self_attn.k_norm.weight", c->head_dim, layer->norm_k);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        const struct cuda_weight *weight = &layer->weights[kind];

        for (int i = 0; i < weight->part_count && rc == 0; i++)
            rc = load_part(loader, l, weight, &weight->parts[i],
                           kind == CUDA_QKV ? layer->bias : NULL);
    }
    return rc;
}

static int load_ends(struct loader *loader)
{
    const struct cuda_model *model = loader->model;
    const struct claas_model_config *c = &model->config;
    const struct claas_tensor *embedding = NULL, *head = NULL;
    int rc = find_tensor(loader, -1, "model.embed_tokens.weight", &embedding);

    head = embedding;
    if (rc == 0 && !c->tied)
        rc = find_tensor(loader, -1, "lm_head.weight", &head);
    if (rc < 0)
        return rc;
    if (embedding->rows != c->vocab || embedding->columns != c->hidden || head->rows != c->vocab ||
        head->columns != c->hidden)
        return claas_fail(CLAAS_ERR_FORMAT, "embedding or head is not [%d, %d]", c->vocab,
                          c->hidden);
    rc = load_matrix(loader, embedding, model->embedding);
    if (rc == 0 && !c->tied)
        rc = load_matrix(loader, head, model->head);
    if (rc == 0)
        rc = load_vector(loader, -1, "model.norm.weight", c->hidden, model->norm_out);
    return rc;
}

/* --- places --- */

static void place_weight(struct loader *loader, struct cuda_weight *weight, int kind)
{
    const struct claas_model_config *config = &loader->model->config;

    weight->n = 0;
    weight->k = claas_module_columns(config, weight_parts[kind].modules[0]);
    weight->part_count = weight_parts[kind].count;
    for (int i = 0; i < weight->part_count; i++) {
        struct cuda_part *part = &weight->parts[i];

        part->module = weight_parts[kind].modules[i];
        part->row = weight->n;
        part->n = claas_module_rows(config, part->module);
        weight->n += part->n;
    }
    weight->w = cuda_take(&loader->weights,
                          (size_t)weight->n * (size_t)weight->k * loader->context->act_bytes);
}

static float *take_floats(struct loader *loader, size_t count)
{
    return (float *)cuda_take(&loader->small, count * sizeof(float));
}

/* Places everything. With arenas that only count it does nothing else. */
static void place_model(struct loader *loader)
{
    struct cuda_model *model = loader->model;
    const struct claas_model_config *c = &model->config;
    size_t table = (size_t)c->vocab * (size_t)c->hidden * loader->context->act_bytes;

    for (int l = 0; l < c->layers; l++) {
        struct cuda_layer *layer = &model->layers[l];

        for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
            place_weight(loader, &layer->weights[kind], kind);
        layer->norm_in = take_floats(loader, (size_t)c->hidden);
        layer->norm_mid = take_floats(loader, (size_t)c->hidden);
        layer->bias = c->qkv_bias ? take_floats(loader, (size_t)model->nqkv) : NULL;
        layer->norm_q = c->qk_norm ? take_floats(loader, (size_t)c->head_dim) : NULL;
        layer->norm_k = c->qk_norm ? take_floats(loader, (size_t)c->head_dim) : NULL;
    }
    model->embedding = cuda_take(&loader->weights, table);
    model->head = c->tied ? model->embedding : cuda_take(&loader->weights, table);
    model->norm_out = take_floats(loader, (size_t)c->hidden);
    model->cos_sin = take_floats(loader, (size_t)c->context * (size_t)c->head_dim);
}

static int allocate(struct loader *loader)
{
    struct cuda_model *model = loader->model;
    size_t weights, small;
    int rc;

    place_model(loader); /* the arenas only count */
    weights = loader->weights.used;
    small = loader->small.used;
    rc = cuda_region_new(loader->context, &model->region, weights + small, "the model's weights");
    if (rc < 0)
        return rc;
    loader->weights.base = (uint8_t *)model->region.base;
    loader->small.base = loader->weights.base + weights;
    loader->weights.used = loader->small.used = 0;
    place_model(loader);
    loader->widest = model->config.hidden;
    if (loader->widest < model->nq)
        loader->widest = model->nq;
    if (loader->widest < model->config.intermediate)
        loader->widest = model->config.intermediate;
    loader->host_small = (float *)claas_alloc_aligned(small);
    loader->rows = (float *)claas_alloc_aligned((size_t)claas_pool_threads(loader->pool) *
                                                (size_t)loader->widest * sizeof(float));
    if (!loader->host_small || !loader->rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory to load the model");
    return 0;
}

/* --- the whole --- */

static int check_shape(const struct claas_model_config *c)
{
    if (c->head_dim % HEAD_DIM_STEP || c->head_dim > HEAD_DIM_MAX)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "head size %d: CUDA needs a multiple of %d up to %d", c->head_dim,
                          HEAD_DIM_STEP, HEAD_DIM_MAX);
    if (c->hidden % 8 || c->intermediate % 8)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "widths %d and %d: CUDA needs multiples of 8",
                          c->hidden, c->intermediate);
    if (c->kv_heads < 1 || c->heads % c->kv_heads)
        return claas_fail(CLAAS_ERR_FORMAT, "%d heads are no multiple of %d kv heads", c->heads,
                          c->kv_heads);
    return 0;
}

static int load_all(struct loader *loader)
{
    struct cuda_context *context = loader->context;
    struct cuda_model *model = loader->model;
    int rc = allocate(loader);

    for (int l = 0; l < model->config.layers && rc == 0; l++)
        rc = load_layer(loader, l);
    if (rc == 0)
        rc = load_ends(loader);
    if (rc < 0)
        return rc;
    claas_cpu_rope_table(&model->config, loader->pool, host_place(loader, model->cos_sin));
    rc = cuda_check(context,
                    cudaMemcpyAsync(loader->small.base, loader->host_small, loader->small.used,
                                    cudaMemcpyHostToDevice, context->stream),
                    "copying the model's tables");
    return rc < 0 ? rc : cuda_wait(context);
}

static void close_loader(struct loader *loader)
{
    (void)cudaStreamSynchronize(loader->context->stream);
    for (int i = 0; i < 2; i++) {
        if (loader->staging[i].host)
            (void)cudaFreeHost(loader->staging[i].host);
        if (loader->staging[i].copied)
            (void)cudaEventDestroy(loader->staging[i].copied);
    }
    free(loader->host_small);
    free(loader->rows);
    claas_pool_free(&loader->pool);
}

int cuda_model_load(struct cuda_context *context, const claas_model_t *source,
                    struct claas_loading *loading, struct cuda_model *ret)
{
    struct loader loader;
    int rc;

    memset(&loader, 0, sizeof(loader));
    memset(ret, 0, sizeof(*ret));
    ret->config = *claas_model_config(source);
    ret->nq = ret->config.heads * ret->config.head_dim;
    ret->nk = ret->config.kv_heads * ret->config.head_dim;
    ret->nqkv = ret->nq + 2 * ret->nk;
    rc = check_shape(&ret->config);
    if (rc < 0)
        return rc;
    ret->layers = CLAAS_NEW_ARRAY(struct cuda_layer, (size_t)ret->config.layers);
    if (!ret->layers)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    loader.context = context;
    loader.model = ret;
    loader.source = source;
    loader.loading = loading;
    rc = claas_pool_new(0, &loader.pool);
    if (rc == 0)
        rc = load_all(&loader);
    close_loader(&loader);
    if (rc < 0)
        cuda_model_done(context, ret);
    return rc;
}

void cuda_model_done(struct cuda_context *context, struct cuda_model *model)
{
    free(model->layers);
    model->layers = NULL;
    cuda_region_done(context, &model->region);
}
