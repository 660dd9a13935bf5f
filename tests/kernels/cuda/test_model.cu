/* The frozen model and adapters on the device against the host's: every weight must have the bits
 * of the rounded row that claas_tensor_row gives, an adapter's image must come back as it went, and
 * the view must be the rounded A and scale*B. CLAAS_TEST_MODEL, if set, names a model file to load
 * too. */
#include "cuda_check.h"
#include "cuda/cuda_model.h"

#include "claas/mem.h"
#include "cpu/pool.h"
#include "cpu/rope.h"

#include <time.h>

static double now_ms(void)
{
    struct timespec t = {};

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static claas_model_t *open_model(const char *path)
{
    struct claas_model_options options = {};
    claas_model_t *model = NULL;

    options.path = path;
    check_rc(claas_model_open(&options, &model), path);
    return model;
}

/* --- weights --- */

/* Rows of a matrix on the device, `stride` rows apart, against the file's. */
static void compare_rows(const struct cuda_context *context, const struct claas_tensor *tensor,
                         const void *device, int stride)
{
    size_t columns = (size_t)tensor->columns, bytes = columns * context->act_bytes;
    float *row = (float *)check_alloc(columns, sizeof(float));
    uint16_t *want = (uint16_t *)check_alloc(columns, sizeof(float));
    uint8_t *got = (uint8_t *)check_alloc(bytes, 1);

    for (int r = 0; r < tensor->rows; r += stride) {
        const uint8_t *at = (const uint8_t *)device + (size_t)r * bytes;

        claas_tensor_row(tensor, r, row);
        for (size_t i = 0; i < columns && context->act == CUDA_TYPE_BF16; i++)
            want[i] = check_to_bf16(row[i]);
        check_cuda(cudaMemcpy(got, at, bytes, cudaMemcpyDeviceToHost), "a row of weights");
        check_same(tensor->name, got,
                   context->act == CUDA_TYPE_BF16 ? (const void *)want : (const void *)row, bytes);
        /* The last row too. */
        if (r + stride >= tensor->rows && r < tensor->rows - 1)
            r = tensor->rows - 1 - stride;
    }
    free(row);
    free(want);
    free(got);
}

static const struct claas_tensor *tensor_of(const claas_model_t *source, int layer,
                                            const char *name)
{
    char full[128];

    if (layer < 0)
        snprintf(full, sizeof(full), "%s", name);
    else
        snprintf(full, sizeof(full), "model.layers.%d.%s", layer, name);
    return claas_model_tensor(source, full);
}

static void compare_vector(const claas_model_t *source, int layer, const char *name,
                           const float *device)
{
    const struct claas_tensor *tensor = tensor_of(source, layer, name);
    float *want, *got;

    if (!tensor || !device) {
        if (tensor || device)
            check_fail("%s is there on one side only", name);
        return;
    }
    want = (float *)check_alloc((size_t)tensor->columns, sizeof(float));
    got = (float *)check_alloc((size_t)tensor->columns, sizeof(float));
    claas_tensor_row(tensor, 0, want);
    check_cuda(
        cudaMemcpy(got, device, (size_t)tensor->columns * sizeof(float), cudaMemcpyDeviceToHost),
        name);
    check_same(name, got, want, (size_t)tensor->columns * sizeof(float));
    free(want);
    free(got);
}

static void compare_layer(const struct cuda_context *context, const claas_model_t *source,
                          const struct cuda_model *model, int l, int stride)
{
    const struct cuda_layer *layer = &model->layers[l];
    char name[64];

    compare_vector(source, l, "input_layernorm.weight", layer->norm_in);
    compare_vector(source, l, "post_attention_layernorm.weight", layer->norm_mid);
    compare_vector(source, l, "self_attn.q_norm.weight", layer->norm_q);
    compare_vector(source, l, "self_attn.k_norm.weight", layer->norm_k);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        const struct cuda_weight *weight = &layer->weights[kind];

        for (int i = 0; i < weight->part_count; i++) {
            const struct cuda_part *part = &weight->parts[i];
            const char *block = part->module <= CLAAS_MODULE_O ? "self_attn" : "mlp";
            const struct claas_tensor *tensor;

            snprintf(name, sizeof(name), "%s.%s.weight", block, claas_module_name(part->module));
            tensor = tensor_of(source, l, name);
            if (!tensor || tensor->rows != part->n || tensor->columns != weight->k)
                check_fail("layer %d, %s: no such tensor, or another shape", l, name);
            else
                compare_rows(context, tensor,
                             cuda_at(context, weight->w, (size_t)part->row * weight->k), stride);
            snprintf(name, sizeof(name), "%s.%s.bias", block, claas_module_name(part->module));
            if (kind == CUDA_QKV)
                compare_vector(source, l, name, layer->bias ? layer->bias + part->row : NULL);
        }
    }
}

static void compare_rope(const struct cuda_model *model)
{
    size_t count = (size_t)model->config.context * (size_t)model->config.head_dim;
    float *want = (float *)check_alloc(count, sizeof(float));
    float *got = (float *)check_alloc(count, sizeof(float));
    claas_pool_t *pool = NULL;

    check_rc(claas_pool_new(2, &pool), "claas_pool_new");
    claas_cpu_rope_table(&model->config, pool, want);
    check_cuda(cudaMemcpy(got, model->cos_sin, count * sizeof(float), cudaMemcpyDeviceToHost),
               "cos_sin");
    check_same("cos_sin", got, want, count * sizeof(float));
    claas_pool_free(&pool);
    free(want);
    free(got);
}

/* Layers and rows `stride` apart. */
static void compare_model(const struct cuda_context *context, const claas_model_t *source,
                          const struct cuda_model *model, int layer_stride, int row_stride)
{
    for (int l = 0; l < model->config.layers; l += layer_stride)
        compare_layer(context, source, model, l, row_stride);
    compare_vector(source, -1, "model.norm.weight", model->norm_out);
    compare_rows(context, tensor_of(source, -1, "model.embed_tokens.weight"), model->embedding,
                 row_stride);
    if (model->config.tied && model->head != model->embedding)
        check_fail("a tied head is not the embedding");
    if (!model->config.tied)
        compare_rows(context, tensor_of(source, -1, "lm_head.weight"), model->head, row_stride);
    compare_rope(model);
}

static void test_load(enum cuda_type act, const char *path, int layer_stride, int row_stride)
{
    struct cuda_context context;
    struct cuda_model model;
    claas_model_t *source;
    size_t before, bytes;
    double start;
    int rc;

    if (check_elsewhere())
        return;
    check_open(act, &context);
    check_begin("load %s %s", check_name(act), path);
    source = open_model(path);
    if (source) {
        before = context.bytes;
        start = now_ms();
        rc = cuda_model_load(&context, source, NULL, &model);
        check_rc(rc, "cuda_model_load");
        if (rc == 0) {
            bytes = model.region.bytes;
            if (bytes > 100000000)
                check_report(path, (float)(now_ms() - start), (double)bytes, 0);
            compare_model(&context, source, &model, layer_stride, row_stride);
            cuda_model_done(&context, &model);
        }
        if (context.bytes != before)
            check_fail("%zu bytes were not given back", context.bytes - before);
    }
    check_end();
    claas_model_free(&source);
    cuda_context_close(&context);
}

/* --- adapters --- */

static struct claas_adapter_image random_image(const struct claas_model_config *config, int rank,
                                               unsigned modules, bool moments)
{
    struct claas_adapter_image image = {};
    size_t count;

    image.lora.rank = rank;
    image.lora.alpha = 16.0f;
    image.lora.modules = modules;
    image.step = 7;
    count = claas_lora_parameter_count(config, &image.lora);
    image.parameters = (float *)check_alloc(count, sizeof(float));
    for (size_t i = 0; i < count; i++)
        image.parameters[i] = check_random();
    if (!moments)
        return image;
    image.exp_avg = (float *)check_alloc(count, sizeof(float));
    image.exp_avg_sq = (float *)check_alloc(count, sizeof(float));
    for (size_t i = 0; i < count; i++) {
        image.exp_avg[i] = 0.1f * check_random();
        image.exp_avg_sq[i] = 0.01f * fabsf(check_random());
    }
    return image;
}

/* What the device's copy of an image must be, [count] in the device's order, by the header's words;
 * `scale` for what is B. */
static float *expected(const struct cuda_model *model, const struct cuda_adapter *adapter,
                       const float *image, float scale)
{
    const struct cuda_lora_layout *layout = &adapter->layout;
    float *want = (float *)check_alloc(layout->count, sizeof(float));
    int r = adapter->lora.rank;

    for (int l = 0; l < model->config.layers; l++)
        for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
            const struct cuda_weight *weight = &model->layers[l].weights[kind];

            for (int p = 0; p < weight->part_count; p++) {
                enum claas_module module = weight->parts[p].module;
                int index = layout->index[module];
                const float *a =
                    image + claas_lora_offset(&model->config, &adapter->lora, l, module, 0);
                const float *b =
                    image + claas_lora_offset(&model->config, &adapter->lora, l, module, 1);
                float *layer = want + (size_t)l * layout->layer;

                for (int i = 0; i < r && index >= 0; i++)
                    for (int j = 0; j < weight->k; j++)
                        layer[layout->a[kind] + ((size_t)index * layout->rank + i) * weight->k +
                              j] = a[(size_t)i * weight->k + j];
                for (int i = 0; i < weight->parts[p].n && index >= 0; i++)
                    for (int j = 0; j < r; j++)
                        layer[layout->b[module] + (size_t)i * layout->rank + j] =
                            scale * b[(size_t)i * r + j];
            }
        }
    return want;
}

static void compare_floats(const char *what, const float *device, const float *want, size_t count)
{
    float *got = (float *)check_alloc(count, sizeof(float));

    check_cuda(cudaMemcpy(got, device, count * sizeof(float), cudaMemcpyDeviceToHost), what);
    check_same(what, got, want, count * sizeof(float));
    free(got);
}

static void compare_view(const struct cuda_context *context, const struct cuda_model *model,
                         const struct cuda_adapter *adapter, const float *image)
{
    size_t count = adapter->layout.count;
    float *want = expected(model, adapter, image, adapter->scale);
    uint16_t *narrow = (uint16_t *)check_alloc(count, sizeof(uint16_t));
    uint16_t *got = (uint16_t *)check_alloc(count, sizeof(uint16_t));

    if (context->act == CUDA_TYPE_F32) {
        compare_floats("view", (const float *)adapter->view.base, want, count);
    } else {
        for (size_t i = 0; i < count; i++)
            narrow[i] = check_to_bf16(want[i]);
        check_cuda(cudaMemcpy(got, adapter->view.base, count * 2, cudaMemcpyDeviceToHost), "view");
        check_same("view", got, narrow, count * 2);
    }
    free(want);
    free(narrow);
    free(got);
}

/* What the device holds of a training adapter, and what comes back of it. */
static void compare_masters(struct cuda_context *context, const struct cuda_model *model,
                            const struct cuda_adapter *adapter,
                            const struct claas_adapter_image *image)
{
    size_t count = claas_lora_parameter_count(&model->config, &image->lora);
    const float *sources[3] = {image->parameters, image->exp_avg, image->exp_avg_sq};
    const float *device[3] = {adapter->parameters, adapter->exp_avg, adapter->exp_avg_sq};
    float *zeros = (float *)check_alloc(count, sizeof(float));
    struct claas_adapter_image back = {};
    int rc;

    back.memory = image->memory;
    for (int i = 0; i < 3; i++) {
        float *want = expected(model, adapter, sources[i] ? sources[i] : zeros, 1.0f);

        compare_floats("masters", device[i], want, adapter->layout.count);
        free(want);
    }
    rc = cuda_adapter_download(context, model, adapter, NULL, NULL, &back);
    check_rc(rc, "cuda_adapter_download");
    if (rc == 0) {
        check_same("parameters back", back.parameters, image->parameters, count * sizeof(float));
        check_same("exp_avg back", back.exp_avg, image->exp_avg ? image->exp_avg : zeros,
                   count * sizeof(float));
        check_same("exp_avg_sq back", back.exp_avg_sq,
                   image->exp_avg_sq ? image->exp_avg_sq : zeros, count * sizeof(float));
        if (back.step != (image->exp_avg ? image->step : 0))
            check_fail("step %lld", (long long)back.step);
        claas_adapter_image_done(&back);
    }
    free(zeros);
}

/* Changes a few masters behind the adapter's back, as a step does, and refreshes. */
static void test_refresh(struct cuda_context *context, const struct cuda_model *model,
                         struct cuda_adapter *adapter, struct claas_adapter_image *image)
{
    size_t count = claas_lora_parameter_count(&model->config, &image->lora);
    float *device;

    for (size_t i = 0; i < count; i++)
        image->parameters[i] = -1.5f * image->parameters[i];
    device = expected(model, adapter, image->parameters, 1.0f);
    check_cuda(cudaMemcpy(adapter->parameters, device, adapter->layout.count * sizeof(float),
                          cudaMemcpyHostToDevice),
               "new masters");
    check_cuda(cudaDeviceSynchronize(), "new masters");
    check_rc(cuda_adapter_refresh(context, model, adapter), "cuda_adapter_refresh");
    check_rc(cuda_wait(context), "cuda_wait");
    compare_view(context, model, adapter, image->parameters);
    free(device);
}

static void *take_pinned(void *arg, size_t bytes)
{
    void *base = cuda_host_new(bytes);

    (void)arg;
    if (!base) {
        check_fail("no pinned memory of %zu bytes", bytes);
        exit(1);
    }
    memset(base, 0x7f, bytes); /* whatever a download leaves out shows */
    return base;
}

static void give_pinned(void *arg, void *array)
{
    (void)arg;
    cuda_host_free(array);
}

static const struct claas_adapter_memory pinned_memory = {take_pinned, give_pinned, NULL};

/* The image in pinned memory, in place of that in plain memory. */
static void pin_image(const struct claas_model_config *config, struct claas_adapter_image *image)
{
    size_t bytes = claas_lora_parameter_count(config, &image->lora) * sizeof(float);
    struct claas_adapter_image pinned = {};

    check_rc(claas_adapter_image_new(config, &image->lora, &pinned_memory, image->exp_avg != NULL,
                                     &pinned),
             "claas_adapter_image_new");
    pinned.step = image->step;
    memcpy(pinned.parameters, image->parameters, bytes);
    if (image->exp_avg) {
        memcpy(pinned.exp_avg, image->exp_avg, bytes);
        memcpy(pinned.exp_avg_sq, image->exp_avg_sq, bytes);
    }
    claas_adapter_image_done(image);
    *image = pinned;
}

/* Copies on the device: the view to serve, the state to be kept, and from that state all of it
 * again. They stay as they are when the source goes on. */
static void test_clones(struct cuda_context *context, const struct cuda_model *model,
                        struct cuda_adapter *adapter, const struct claas_adapter_image *image)
{
    struct cuda_adapter view, state, all, none;
    int rc = cuda_adapter_clone(context, model, adapter, CUDA_CLONE_STATE, &state);

    check_rc(rc, "cuda_adapter_clone, state");
    if (rc < 0)
        return;
    if (state.view.base || !state.trains)
        check_fail("a kept state has a view, or no masters");
    check_cuda(cudaMemset(adapter->parameters, 0, 3 * adapter->layout.count * sizeof(float)),
               "the source goes on");
    check_cuda(cudaDeviceSynchronize(), "the source goes on");
    compare_masters(context, model, &state, image);
    rc = cuda_adapter_clone(context, model, &state, CUDA_CLONE_VIEW, &view);
    check_rc(rc, "cuda_adapter_clone, view");
    if (rc == 0) {
        compare_view(context, model, &view, image->parameters);
        if (view.masters.base || view.trains ||
            cuda_adapter_clone(context, model, &view, CUDA_CLONE_ALL, &none) >= 0)
            check_fail("a served copy has masters, or can be copied");
        cuda_adapter_done(context, &view);
    }
    rc = cuda_adapter_clone(context, model, &state, CUDA_CLONE_ALL, &all);
    check_rc(rc, "cuda_adapter_clone, all");
    if (rc == 0) {
        compare_view(context, model, &all, image->parameters);
        compare_masters(context, model, &all, image);
        cuda_adapter_done(context, &all);
    }
    cuda_adapter_done(context, &state);
}

static void test_adapter(struct cuda_context *context, const struct cuda_model *model, int rank,
                         unsigned modules, bool trains, bool moments, bool pinned)
{
    struct claas_adapter_image image = random_image(&model->config, rank, modules, moments);
    struct claas_adapter_image back = {};
    struct cuda_adapter adapter;
    size_t before = context->bytes;
    int rc = cuda_adapter_new(context, model, &image.lora, trains, &adapter);

    check_rc(rc, "cuda_adapter_new");
    if (pinned)
        pin_image(&model->config, &image);
    for (int again = 0; again < 2 && rc == 0; again++) {
        rc = cuda_adapter_upload(context, model, &adapter, &image);
        check_rc(rc, "cuda_adapter_upload");
        compare_view(context, model, &adapter, image.parameters);
        if (trains)
            compare_masters(context, model, &adapter, &image);
        else if (cuda_adapter_download(context, model, &adapter, NULL, NULL, &back) >= 0 ||
                 cuda_adapter_refresh(context, model, &adapter) >= 0)
            check_fail("an adapter for serving can be read back or refreshed");
        if (trains)
            test_refresh(context, model, &adapter, &image);
        if (trains)
            test_clones(context, model, &adapter, &image);
        image.lora.alpha = 8.0f; /* another shape: refused */
        if (cuda_adapter_upload(context, model, &adapter, &image) >= 0)
            check_fail("another alpha went through");
        image.lora.alpha = 16.0f;
    }
    if (rc == 0)
        cuda_adapter_done(context, &adapter);
    if (context->bytes != before)
        check_fail("%zu bytes were not given back", context->bytes - before);
    claas_adapter_image_done(&image);
}

static void test_adapters(enum cuda_type act, const char *path)
{
    static const int ranks[] = {1, 4, 5, 8, 12, 32};
    static const unsigned subsets[] = {CLAAS_MODULE_ALL, 1u << CLAAS_MODULE_V,
                                       1u << CLAAS_MODULE_Q | 1u << CLAAS_MODULE_V,
                                       1u << CLAAS_MODULE_UP | 1u << CLAAS_MODULE_DOWN};
    struct claas_lora_config bad = {};
    struct cuda_context context;
    struct cuda_adapter adapter;
    struct cuda_model model;
    claas_model_t *source;
    int rc;

    if (check_elsewhere())
        return;
    check_open(act, &context);
    check_begin("adapters %s %s", check_name(act), path);
    source = open_model(path);
    rc = cuda_model_load(&context, source, NULL, &model);
    check_rc(rc, "cuda_model_load");
    for (int rank : ranks) {
        if (check_is_small() && rank != 5 && rank != 8)
            continue; /* one that is padded and one that is whole */
        for (unsigned modules : subsets) {
            for (bool pinned : {false, true}) {
                test_adapter(&context, &model, rank, modules, true, true, pinned);
                test_adapter(&context, &model, rank, modules, true, false, pinned);
                test_adapter(&context, &model, rank, modules, false, false, pinned);
            }
        }
    }
    bad.rank = CLAAS_RANK_MAX + 1;
    bad.modules = CLAAS_MODULE_ALL;
    if (cuda_adapter_new(&context, &model, &bad, true, &adapter) >= 0)
        check_fail("a rank of %d went through", bad.rank);
    bad.rank = 8;
    bad.modules = 0;
    if (cuda_adapter_new(&context, &model, &bad, true, &adapter) >= 0)
        check_fail("no modules went through");
    check_end();
    cuda_model_done(&context, &model);
    claas_model_free(&source);
    cuda_context_close(&context);
}

/* Hands out arrays that were there before, and takes none back. */
static struct claas_adapter_image reused;

static void *take_reused(void *arg, size_t bytes)
{
    float **arrays[] = {&reused.parameters, &reused.exp_avg, &reused.exp_avg_sq};

    (void)arg;
    (void)bytes;
    for (float **array : arrays)
        if (*array) {
            void *base = *array;

            *array = NULL;
            return base;
        }
    return NULL;
}

static const struct claas_adapter_memory reused_memory = {take_reused, give_pinned, NULL};

static void time_clones(struct cuda_context *context, const struct cuda_model *model,
                        const struct cuda_adapter *adapter)
{
    static const char *const names[] = {"adapter clone 8B r=32, view",
                                        "adapter clone 8B r=32, state",
                                        "adapter clone 8B r=32, all"};

    for (int i = 0; i < 3; i++) {
        struct cuda_adapter clone;
        double start = now_ms();

        check_rc(cuda_adapter_clone(context, model, adapter, (enum cuda_clone)i, &clone), names[i]);
        check_report(names[i], (float)(now_ms() - start), 0, 0);
        cuda_adapter_done(context, &clone);
    }
}

/* Of an 8B model with rank 32: 87.3 million parameters, without their layers' weights. */
static void time_adapter(void)
{
    struct claas_adapter_image image, back = {};
    struct cuda_context context;
    struct cuda_adapter adapter;
    struct cuda_model model;
    claas_model_t *source;
    double start;
    size_t count;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("adapter timing");
    source = open_model("random:qwen3-8b");
    check_rc(cuda_model_load(&context, source, NULL, &model), "cuda_model_load");
    image = random_image(&model.config, 32, CLAAS_MODULE_ALL, false);
    count = claas_lora_parameter_count(&model.config, &image.lora);
    check_rc(cuda_adapter_new(&context, &model, &image.lora, true, &adapter), "cuda_adapter_new");
    start = now_ms();
    check_rc(cuda_adapter_upload(&context, &model, &adapter, &image), "cuda_adapter_upload");
    check_report("adapter upload 8B r=32", (float)(now_ms() - start), 4.0 * (double)count, 0);
    start = now_ms();
    check_rc(cuda_adapter_download(&context, &model, &adapter, NULL, NULL, &back),
             "cuda_adapter_download");
    check_report("adapter download 8B r=32", (float)(now_ms() - start), 12.0 * (double)count, 0);
    claas_adapter_image_done(&back);
    start = now_ms();
    pin_image(&model.config, &image);
    check_report("pinning 349 MB and copying into it", (float)(now_ms() - start),
                 4.0 * (double)count, 0);
    start = now_ms();
    check_rc(cuda_adapter_upload(&context, &model, &adapter, &image), "cuda_adapter_upload");
    check_report("adapter upload 8B r=32, pinned", (float)(now_ms() - start), 4.0 * (double)count,
                 0);
    /* Twice: the pages of the first are what a cache of the host's memory has at hand. */
    check_rc(claas_adapter_image_new(&model.config, &image.lora, &pinned_memory, true, &back),
             "pinned memory");
    reused = back;
    start = now_ms();
    back = claas_adapter_image{};
    back.memory = &reused_memory;
    check_rc(cuda_adapter_download(&context, &model, &adapter, NULL, NULL, &back),
             "cuda_adapter_download");
    check_report("adapter download 8B r=32, pinned and reused", (float)(now_ms() - start),
                 12.0 * (double)count, 0);
    time_clones(&context, &model, &adapter);
    check_report("adapter refresh 8B r=32",
                 check_median_ms(&context,
                                 [&] {
                                     check_rc(cuda_adapter_refresh(&context, &model, &adapter),
                                              "cuda_adapter_refresh");
                                 }),
                 6.0 * (double)adapter.layout.count, 0);
    check_end();
    claas_adapter_image_done(&back);
    claas_adapter_image_done(&image);
    cuda_adapter_done(&context, &adapter);
    cuda_model_done(&context, &model);
    claas_model_free(&source);
    cuda_context_close(&context);
}

/* --- context --- */

static void test_context(void)
{
    struct cuda_context context;
    struct cuda_region region;
    struct cuda_arena arena = {};
    size_t before;
    uint8_t bytes[1000];

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("context");
    printf("device: %s, code for compute capability %d.%d%s, %d multiprocessors, %zu MiB\n",
           context.name, context.arch / 10, context.arch % 10,
           context.warpgroups ? " with products of warpgroups" : "", context.multiprocessors,
           context.memory >> 20);
    before = context.bytes;
    check_rc(cuda_region_new(&context, &region, sizeof(bytes), "a test"), "cuda_region_new");
    check_cuda(cudaMemcpy(bytes, region.base, sizeof(bytes), cudaMemcpyDeviceToHost), "region");
    for (uint8_t byte : bytes)
        if (byte != 0) {
            check_fail("a new region is not zero");
            break;
        }
    cuda_region_done(&context, &region);
    cuda_region_done(&context, &region);
    if (context.bytes != before)
        check_fail("bytes: %zu, then %zu", before, context.bytes);
    if (cuda_region_new(&context, &region, (size_t)1 << 50, "too much") != CLAAS_ERR_NO_MEMORY)
        check_fail("a petabyte was not refused with NO_MEMORY");
    printf("as it should be: %s\n", claas_error_text());
    for (const char *part : {"too much", "1125899906842624 bytes", "matrix products 64 MiB"})
        if (!strstr(claas_error_text(), part))
            check_fail("a refusal without '%s': %s", part, claas_error_text());
    context.limit = context.bytes + 4096;
    if (cuda_region_new(&context, &region, 4097, "the limit") != CLAAS_ERR_NO_MEMORY)
        check_fail("4097 of 4096 bytes were not refused");
    check_rc(cuda_region_new(&context, &region, 4096, "the limit"), "up to the limit");
    cuda_region_done(&context, &region);
    context.limit = 0;
    if (context.bytes != before)
        check_fail("bytes: %zu, after refusals %zu", before, context.bytes);
    if (cuda_check(&context, cudaErrorInvalidValue, "a test") != CLAAS_ERR_DEVICE || context.lost)
        check_fail("an invalid value made the device lost");
    check_rc(cuda_check_launch(&context, "after refusals"), "cuda_check_launch");
    if (cuda_take(&arena, 100) || cuda_take(&arena, 300) || arena.used != 768)
        check_fail("an arena that counts: %zu", arena.used);
    check_end();
    cuda_context_close(&context);
}

int main(void)
{
    static const char *const tiny[] = {"random:tiny-llama:3", "random:tiny-llama-untied:4",
                                       "random:tiny-qwen2:5", "random:tiny-qwen3-untied:6"};
    const char *file = getenv("CLAAS_TEST_MODEL");

    test_context();
    for (int type = 0; type < 2; type++) {
        for (const char *path : tiny)
            test_load((enum cuda_type)type, path, 1, 1);
        test_load((enum cuda_type)type, "random:smollm2-135m", 7, 97);
        if (file)
            test_load((enum cuda_type)type, file, 7, 13);
        test_adapters((enum cuda_type)type, tiny[0]);
        test_adapters((enum cuda_type)type, tiny[3]);
    }
    if (check_measures()) {
        test_load(CUDA_TYPE_BF16, "random:qwen3-8b", 35, 4001);
        time_adapter();
    }
    return check_finish();
}
