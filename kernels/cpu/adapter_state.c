/* LoRA adapters on the CPU. Every adapter has *panels*, the rounded A and s*B that forward and
 * backward passes read; one that trains has float32 *masters* and moments beside them, and the
 * panels are made from the masters again after every optimizer step.
 *
 * Masters are not in the host image's order: A of q, k, v lie together (one product makes all their
 * S), and B lies transposed, because its gradient comes as S^T dY, [R][N]. Upload and download
 * translate. An odd rank is padded to an even one: a zero row of A and of B^T has zero gradients,
 * so it stays zero. */
#include "cpu/step.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <stdlib.h>
#include <string.h>

static size_t align_up(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

static void make_layout(const claas_backend_t *backend, const struct claas_lora_config *lora,
                        struct cpu_lora_layout *layout)
{
    enum claas_precision precision = backend->ops->precision;
    const struct cpu_layer *layer = &backend->model.layers[0];

    layout->rank = (lora->rank + 1) & ~1;
    for (int kind = 0; kind < CPU_WEIGHTS; kind++) {
        const struct cpu_weight *weight = &layer->weights[kind];
        int rows = 0;

        for (int i = 0; i < weight->part_count; i++) {
            enum claas_module module = weight->parts[i].module;
            bool present = lora->modules & (1u << module);

            layout->index[module] = present ? layout->parts[kind]++ : -1;
        }
        rows = layout->parts[kind] * layout->rank;
        layout->a[kind] = layout->layer_floats;
        layout->a_panels[kind] = layout->layer_bytes;
        layout->layer_floats += (size_t)rows * (size_t)weight->k;
        layout->layer_bytes += align_up(claas_panel_bytes(precision, rows, weight->k));
        for (int i = 0; i < weight->part_count; i++) {
            enum claas_module module = weight->parts[i].module;

            layout->b[module] = layout->layer_floats;
            layout->b_panels[module] = layout->layer_bytes;
            if (layout->index[module] < 0)
                continue;
            layout->layer_floats += (size_t)weight->parts[i].n * (size_t)layout->rank;
            layout->layer_bytes +=
                align_up(claas_panel_bytes(precision, weight->parts[i].n, layout->rank));
        }
    }
    layout->count = layout->layer_floats * (size_t)backend->model.config.layers;
}

int claas_cpu_adapter_new(claas_backend_t *backend, const struct claas_lora_config *lora,
                          enum claas_adapter_use use, claas_backend_adapter_t **ret)
{
    size_t layers = (size_t)backend->model.config.layers, bytes = 0;
    CLAAS_AUTO_FREE claas_backend_adapter_t *adapter = NULL;
    int code;

    if (lora->rank < 1 || lora->rank > CLAAS_RANK_MAX)
        return claas_fail(CLAAS_ERR_INVALID, "LoRA rank %d is not in 1 ... %d", lora->rank,
                          CLAAS_RANK_MAX);
    if (lora->modules == 0 || (lora->modules & ~CLAAS_MODULE_ALL))
        return claas_fail(CLAAS_ERR_INVALID, "LoRA modules 0x%x", lora->modules);
    adapter = CLAAS_NEW(claas_backend_adapter_t);
    if (!adapter)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    adapter->lora = *lora;
    adapter->use = use;
    adapter->scale = lora->alpha / (float)lora->rank;
    make_layout(backend, lora, &adapter->layout);
    code =
        claas_cpu_region_new(&adapter->panels, adapter->layout.layer_bytes * layers, "an adapter");
    if (code >= 0 && use == CLAAS_ADAPTER_TRAIN) {
        code = claas_cpu_region_new(&adapter->masters, 3 * adapter->layout.count * sizeof(float),
                                    "an adapter in training");
        adapter->parameters = adapter->masters.base;
        if (code >= 0) {
            adapter->exp_avg = adapter->parameters + adapter->layout.count;
            adapter->exp_avg_sq = adapter->exp_avg + adapter->layout.count;
        }
    }
    if (code < 0) {
        claas_cpu_region_done(&adapter->panels);
        return code;
    }
    bytes = adapter->panels.bytes + adapter->masters.bytes;
    atomic_fetch_add(&backend->bytes_adapters, bytes);
    claas_cpu_memory_changed(backend);
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

uint64_t claas_cpu_adapter_bytes(const claas_backend_adapter_t *adapter)
{
    return adapter->panels.bytes + adapter->masters.bytes;
}

void claas_cpu_adapter_free(claas_backend_t *backend, claas_backend_adapter_t **adapter)
{
    claas_backend_adapter_t *a = *adapter;

    if (!a)
        return;
    atomic_fetch_sub(&backend->bytes_adapters, claas_cpu_adapter_bytes(a));
    claas_cpu_region_done(&a->panels);
    claas_cpu_region_done(&a->masters);
    free(a);
    *adapter = NULL;
}

/* --- between the host image and the masters --- */

/* One module of one layer: A [r][K] and B [N][r] of the image; A [R][K] and B^T [R][N] of the
 * layer's masters. */
struct module_view {
    int r, n, k;
    size_t image_a, image_b, master_a, master_b;
};

static struct module_view view_module(const claas_backend_t *backend,
                                      const claas_backend_adapter_t *adapter, int layer,
                                      enum cpu_weight_kind kind, const struct cpu_part *part)
{
    const struct cpu_lora_layout *layout = &adapter->layout;
    const struct claas_model_config *config = &backend->model.config;
    int k = backend->model.layers[layer].weights[kind].k;

    return (struct module_view){
        .r = adapter->lora.rank,
        .n = part->n,
        .k = k,
        .image_a = claas_lora_offset(config, &adapter->lora, layer, part->module, 0),
        .image_b = claas_lora_offset(config, &adapter->lora, layer, part->module, 1),
        .master_a = layout->a[kind] +
                    (size_t)layout->index[part->module] * (size_t)layout->rank * (size_t)k,
        .master_b = layout->b[part->module],
    };
}

static void copy_module(const struct module_view *v, float *image, float *master, bool to_image)
{
    for (int i = 0; i < v->r; i++) {
        float *in = image + v->image_a + (size_t)i * (size_t)v->k;
        float *own = master + v->master_a + (size_t)i * (size_t)v->k;

        memcpy(to_image ? in : own, to_image ? own : in, (size_t)v->k * sizeof(float));
    }
    for (int i = 0; i < v->n; i++)
        for (int j = 0; j < v->r; j++) {
            float *in = image + v->image_b + (size_t)i * (size_t)v->r + j;
            float *own = master + v->master_b + (size_t)j * (size_t)v->n + i;

            *(to_image ? in : own) = *(to_image ? own : in);
        }
}

/* One layer between a whole image and the masters of that layer. */
static void copy_layer(const claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                       int layer, float *image, float *master, bool to_image)
{
    for (int kind = 0; kind < CPU_WEIGHTS; kind++) {
        const struct cpu_weight *weight = &backend->model.layers[layer].weights[kind];

        for (int i = 0; i < weight->part_count; i++) {
            struct module_view view;

            if (adapter->layout.index[weight->parts[i].module] < 0)
                continue;
            view = view_module(backend, adapter, layer, kind, &weight->parts[i]);
            copy_module(&view, image, master, to_image);
        }
    }
}

/* Copies all layers, to or from the image; calls `turn` after each one, unless it is NULL. */
static void copy_image(const claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                       float *image, float *master, bool to_image, claas_turn_fn *turn,
                       void *turn_arg)
{
    for (int l = 0; l < backend->model.config.layers; l++) {
        copy_layer(backend, adapter, l, image, master + (size_t)l * adapter->layout.layer_floats,
                   to_image);
        if (turn)
            turn(turn_arg);
    }
}

/* --- panels --- */

/* A [rows][k] as panels. */
static void pack_a(const struct claas_ops *ops, const float *a, int rows, int k, void *panels)
{
    for (int first = 0; first < rows; first += CLAAS_LANES) {
        const float *lanes[CLAAS_LANES];

        for (int j = 0; j < CLAAS_LANES; j++)
            lanes[j] = first + j < rows ? a + (size_t)(first + j) * (size_t)k : NULL;
        ops->pack_panel(panels, k, first / CLAAS_LANES, lanes);
    }
}

/* scale * B from its transpose [rank][n]. */
static void pack_b(const struct claas_ops *ops, const float *b, int n, int rank, float scale,
                   void *panels)
{
    float rows[CLAAS_LANES][CLAAS_RANK_MAX];
    const float *lanes[CLAAS_LANES];

    for (int first = 0; first < n; first += CLAAS_LANES) {
        for (int j = 0; j < CLAAS_LANES; j++)
            lanes[j] = first + j < n ? rows[j] : NULL;
        for (int i = 0; i < rank; i++)
            for (int j = 0; j < CLAAS_LANES && first + j < n; j++)
                rows[j][i] = scale * b[(size_t)i * (size_t)n + first + j];
        ops->pack_panel(panels, rank, first / CLAAS_LANES, lanes);
    }
}

/* One weight of one layer, from the masters of that layer. */
static void pack_weight(const claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                        int layer, enum cpu_weight_kind kind, const float *masters)
{
    const struct cpu_lora_layout *layout = &adapter->layout;
    const struct cpu_weight *weight = &backend->model.layers[layer].weights[kind];

    pack_a(backend->ops, masters + layout->a[kind], layout->parts[kind] * layout->rank, weight->k,
           (void *)(uintptr_t)claas_cpu_a_panels(adapter, layer, kind));
    for (int i = 0; i < weight->part_count; i++) {
        enum claas_module module = weight->parts[i].module;

        if (layout->index[module] >= 0)
            pack_b(backend->ops, masters + layout->b[module], weight->parts[i].n, layout->rank,
                   adapter->scale, (void *)(uintptr_t)claas_cpu_b_panels(adapter, layer, module));
    }
}

struct repack_task {
    const claas_backend_t *backend;
    const claas_backend_adapter_t *adapter;
};

static void repack_weight(void *arg, int index)
{
    const struct repack_task *task = arg;
    const claas_backend_adapter_t *adapter = task->adapter;
    int layer = index / CPU_WEIGHTS, kind = index % CPU_WEIGHTS;

    pack_weight(task->backend, adapter, layer, kind,
                adapter->parameters + (size_t)layer * adapter->layout.layer_floats);
}

void claas_cpu_adapter_repack(claas_backend_t *backend, claas_backend_adapter_t *adapter)
{
    struct repack_task task = {backend, adapter};

    claas_pool_run(backend->pool, backend->model.config.layers * CPU_WEIGHTS, repack_weight, &task);
}

/* --- upload and download --- */

static bool same_lora(const struct claas_lora_config *a, const struct claas_lora_config *b)
{
    return a->rank == b->rank && a->alpha == b->alpha && a->modules == b->modules;
}

static void upload_moments(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                           const struct claas_adapter_image *image)
{
    size_t bytes = adapter->layout.count * sizeof(float);

    memset(adapter->exp_avg, 0, bytes);
    memset(adapter->exp_avg_sq, 0, bytes);
    adapter->step = 0;
    if (image->exp_avg && image->exp_avg_sq) {
        copy_image(backend, adapter, image->exp_avg, adapter->exp_avg, false, NULL, NULL);
        copy_image(backend, adapter, image->exp_avg_sq, adapter->exp_avg_sq, false, NULL, NULL);
        adapter->step = image->step;
    }
}

/* Runs on the I/O threads too, so it must not use the pool, which does one thing at a time. A SERVE
 * adapter has masters only of one layer at a time, while the panels are made from them. */
int claas_cpu_adapter_upload(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                             const struct claas_adapter_image *image)
{
    size_t layer_floats = adapter->layout.layer_floats;
    bool train = adapter->use == CLAAS_ADAPTER_TRAIN;
    CLAAS_AUTO_FREE float *temporary = NULL;

    if (!same_lora(&image->lora, &adapter->lora) || !image->parameters)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter's image has another shape");
    if (!train) {
        temporary = claas_alloc_aligned(layer_floats * sizeof(float));
        if (!temporary)
            return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory to upload an adapter");
    }
    for (int l = 0; l < backend->model.config.layers; l++) {
        float *masters = train ? adapter->parameters + (size_t)l * layer_floats : temporary;

        copy_layer(backend, adapter, l, image->parameters, masters, false);
        for (int kind = 0; kind < CPU_WEIGHTS; kind++)
            pack_weight(backend, adapter, l, kind, masters);
    }
    if (train)
        upload_moments(backend, adapter, image);
    return 0;
}

int claas_cpu_adapter_download(claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                               claas_turn_fn *turn, void *turn_arg, struct claas_adapter_image *ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    int code;

    if (adapter->use != CLAAS_ADAPTER_TRAIN)
        return claas_fail(CLAAS_ERR_INVALID, "only an adapter in training can be read back");
    code =
        claas_adapter_image_new(&backend->model.config, &adapter->lora, ret->memory, true, &image);
    if (code < 0)
        return code;
    image.step = adapter->step;
    copy_image(backend, adapter, image.parameters, adapter->parameters, true, turn, turn_arg);
    copy_image(backend, adapter, image.exp_avg, adapter->exp_avg, true, turn, turn_arg);
    copy_image(backend, adapter, image.exp_avg_sq, adapter->exp_avg_sq, true, turn, turn_arg);
    *ret = image;
    image = (struct claas_adapter_image){0};
    return 0;
}
