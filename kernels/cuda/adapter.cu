/* LoRA adapters on the device. Every adapter has a *view*, the rounded A and scale*B that products
 * read; one that trains has float32 masters and moments beside it, and the view is made from the
 * masters again after every optimizer step.
 *
 * All of them share one order of elements (cuda_model.h), which differs from the host image's only
 * by stacking the A of fused modules and by the rank made a multiple of 8, for aligned products: a
 * zero row of A and a zero column of B have zero gradients, so they stay zero.
 *
 *   view[i] = round(A_i)  or  round(scale * B_i);  a thread does 8 elements: 32 bytes read, 16
 *   written. Within a layer the B of a weight's modules lie together, behind their A.
 *
 * Images come and go a layer at a time on the calling thread's own stream, because that thread is
 * not the one that computes: pinned images go matrix by matrix straight to their place, others
 * through two pinned buffers. */
#include "cuda/cuda_model.h"
#include "cuda/row_chunks.cuh"

#include "claas/mem.h"

#include <stdlib.h>
#include <string.h>

#define RANK_STEP       8
#define ELEMENTS        8 /* of a thread at a time */
#define VIEW_THREADS    256
#define VIEW_BLOCKS_MAX 1024 /* of a layer */

/* --- layout --- */

static int check_lora(const struct claas_lora_config *lora)
{
    if (lora->rank < 1 || lora->rank > CLAAS_RANK_MAX)
        return claas_fail(CLAAS_ERR_INVALID, "LoRA rank %d is not in 1 ... %d", lora->rank,
                          CLAAS_RANK_MAX);
    if (lora->modules == 0 || (lora->modules & ~CLAAS_MODULE_ALL))
        return claas_fail(CLAAS_ERR_INVALID, "LoRA modules 0x%x", lora->modules);
    return 0;
}

int cuda_lora_layout(const struct cuda_model *model, const struct claas_lora_config *lora,
                     struct cuda_lora_layout *ret)
{
    struct cuda_lora_layout layout;
    int rc = check_lora(lora);

    if (rc < 0)
        return rc;
    memset(&layout, 0, sizeof(layout));
    layout.rank = (lora->rank + RANK_STEP - 1) / RANK_STEP * RANK_STEP;
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        const struct cuda_weight *weight = &model->layers[0].weights[kind];

        for (int i = 0; i < weight->part_count; i++) {
            enum claas_module module = weight->parts[i].module;
            bool present = lora->modules >> module & 1;

            layout.index[module] = present ? layout.parts[kind]++ : -1;
        }
        layout.a[kind] = layout.layer;
        layout.layer += (size_t)layout.parts[kind] * (size_t)layout.rank * (size_t)weight->k;
        for (int i = 0; i < weight->part_count; i++) {
            enum claas_module module = weight->parts[i].module;

            layout.b[module] = layout.layer;
            if (layout.index[module] >= 0)
                layout.layer += (size_t)weight->parts[i].n * (size_t)layout.rank;
        }
    }
    layout.count = layout.layer * (size_t)model->config.layers;
    *ret = layout;
    return 0;
}

static int new_adapter(struct cuda_context *context, const struct cuda_model *model,
                       const struct claas_lora_config *lora, bool view, bool trains,
                       struct cuda_adapter *ret)
{
    struct cuda_adapter adapter;
    int rc;

    memset(&adapter, 0, sizeof(adapter));
    adapter.lora = *lora;
    adapter.trains = trains;
    rc = cuda_lora_layout(model, lora, &adapter.layout);
    if (rc < 0)
        return rc;
    adapter.scale = lora->alpha / (float)lora->rank;
    if (view)
        rc = cuda_region_new(context, &adapter.view, adapter.layout.count * context->act_bytes,
                             "an adapter");
    if (rc == 0 && trains) {
        rc = cuda_region_new(context, &adapter.masters, 3 * adapter.layout.count * sizeof(float),
                             "an adapter in training");
        adapter.parameters = (float *)adapter.masters.base;
    }
    if (rc < 0) {
        cuda_adapter_done(context, &adapter);
        return rc;
    }
    if (trains) {
        adapter.exp_avg = adapter.parameters + adapter.layout.count;
        adapter.exp_avg_sq = adapter.exp_avg + adapter.layout.count;
    }
    *ret = adapter;
    return 0;
}

int cuda_adapter_new(struct cuda_context *context, const struct cuda_model *model,
                     const struct claas_lora_config *lora, bool trains, struct cuda_adapter *ret)
{
    return new_adapter(context, model, lora, true, trains, ret);
}

void cuda_adapter_done(struct cuda_context *context, struct cuda_adapter *adapter)
{
    cuda_region_done(context, &adapter->view);
    cuda_region_done(context, &adapter->masters);
    adapter->parameters = adapter->exp_avg = adapter->exp_avg_sq = NULL;
}

/* --- the view --- */

/* Where B lies within a layer, per weight. */
struct view_args {
    size_t begin[CUDA_WEIGHTS], end[CUDA_WEIGHTS];
    size_t layer; /* elements, a multiple of ELEMENTS like all borders */
    float scale;
};

/* gridDim.y: layers. */
template <typename T>
static __global__ void view_kernel(struct view_args args, const float *parameters, T *view)
{
    size_t step = (size_t)gridDim.x * blockDim.x * ELEMENTS;
    size_t base = blockIdx.y * args.layer;

    for (size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * ELEMENTS; at < args.layer;
         at += step) {
        const float4 *in = (const float4 *)(parameters + base + at);
        float4 low = in[0], high = in[1];
        float values[ELEMENTS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float scale = 1.0f;

        for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
            if (at >= args.begin[kind] && at < args.end[kind])
                scale = args.scale;
        for (int i = 0; i < ELEMENTS; i++)
            values[i] *= scale;
        store8<true>(view + base + at, ELEMENTS, values);
    }
}

/* Views of `layers` layers from `first` on; parameters begin at that layer. */
static int make_view(struct cuda_context *context, const struct cuda_model *model,
                     const struct cuda_adapter *adapter, cudaStream_t stream,
                     const float *parameters, int first, int layers)
{
    const struct cuda_lora_layout *layout = &adapter->layout;
    size_t blocks = divide_up(layout->layer / ELEMENTS, VIEW_THREADS);
    void *view = cuda_at(context, adapter->view.base, (size_t)first * layout->layer);
    struct view_args args;
    dim3 grid(blocks < VIEW_BLOCKS_MAX ? (unsigned)blocks : VIEW_BLOCKS_MAX, (unsigned)layers);

    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        size_t rows = (size_t)layout->parts[kind] * (size_t)layout->rank;

        args.begin[kind] = layout->a[kind] + rows * (size_t)model->layers[0].weights[kind].k;
        args.end[kind] = kind + 1 < CUDA_WEIGHTS ? layout->a[kind + 1] : layout->layer;
    }
    args.layer = layout->layer;
    args.scale = adapter->scale;
    if (context->act == CUDA_TYPE_F32)
        view_kernel<<<grid, VIEW_THREADS, 0, stream>>>(args, parameters, (float *)view);
    else
        view_kernel<<<grid, VIEW_THREADS, 0, stream>>>(args, parameters, (__nv_bfloat16 *)view);
    return cuda_check_launch(context, "an adapter's view");
}

int cuda_adapter_refresh(struct cuda_context *context, const struct cuda_model *model,
                         struct cuda_adapter *adapter)
{
    if (!adapter->trains)
        return claas_fail(CLAAS_ERR_INTERNAL, "an adapter for serving has nothing to refresh from");
    return make_view(context, model, adapter, context->stream, adapter->parameters, 0,
                     model->config.layers);
}

/* --- between the host image and a layer in the device's order --- */

/* Copies `rows` rows of `count` floats whose starts lie `ld_in` and `ld_out` apart. */
static void copy_rows(float *out, int ld_out, const float *in, int ld_in, int rows, int count)
{
    if (ld_in == count && ld_out == count) {
        memcpy(out, in, (size_t)rows * (size_t)count * sizeof(float));
        return;
    }
    for (int i = 0; i < rows; i++)
        memcpy(out + (size_t)i * (size_t)ld_out, in + (size_t)i * (size_t)ld_in,
               (size_t)count * sizeof(float));
}

/* A matrix of one layer: `rows` rows of `count` floats, whose starts lie ld_… apart. */
struct matrix {
    float *image, *layer;
    int ld_image, ld_layer, rows, count;
};

/* Lists all matrices of a layer: A [r][K] and B [N][r] of the image, A [R][K] and B [N][R] of the
 * layer in the device's order. Returns how many. */
static int list_matrices(const struct cuda_model *model, const struct cuda_adapter *adapter, int l,
                         float *image, float *layer, struct matrix ret[2 * CLAAS_MODULE_COUNT])
{
    const struct cuda_lora_layout *layout = &adapter->layout;
    int r = adapter->lora.rank, ld = layout->rank, count = 0;

    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        const struct cuda_weight *weight = &model->layers[l].weights[kind];

        for (int i = 0; i < weight->part_count; i++) {
            enum claas_module module = weight->parts[i].module;
            int index = layout->index[module], n = weight->parts[i].n, k = weight->k;
            float *image_a, *image_b, *a, *b;

            if (index < 0)
                continue;
            image_a = image + claas_lora_offset(&model->config, &adapter->lora, l, module, 0);
            image_b = image + claas_lora_offset(&model->config, &adapter->lora, l, module, 1);
            a = layer + layout->a[kind] + (size_t)index * (size_t)ld * (size_t)k;
            b = layer + layout->b[module];
            ret[count++] = {image_a, a, k, k, r, k};
            ret[count++] = {image_b, b, r, ld, n, r};
        }
    }
    return count;
}

static void copy_layer(const struct cuda_model *model, const struct cuda_adapter *adapter, int l,
                       float *image, float *layer, bool to_image)
{
    struct matrix list[2 * CLAAS_MODULE_COUNT];
    int count = list_matrices(model, adapter, l, image, layer, list);

    for (const struct matrix *m = list; m < list + count; m++)
        if (to_image)
            copy_rows(m->image, m->ld_image, m->layer, m->ld_layer, m->rows, m->count);
        else
            copy_rows(m->layer, m->ld_layer, m->image, m->ld_image, m->rows, m->count);
}

/* --- two buffers by turns --- */

struct shuttle {
    cudaStream_t stream;
    bool direct;             /* the image is pinned: no buffers */
    void (*turn)(void *arg); /* of a download, or NULL */
    void *turn_arg;
    float *host[2]; /* pinned, a layer each, zeroed */
    cudaEvent_t done[2];
    bool pending[2];
    struct cuda_region layer; /* on the device, where there are no masters */
};

static void close_shuttle(struct cuda_context *context, struct shuttle *shuttle)
{
    (void)cudaStreamSynchronize(shuttle->stream);
    for (int i = 0; i < 2; i++) {
        if (shuttle->host[i])
            (void)cudaFreeHost(shuttle->host[i]);
        if (shuttle->done[i])
            (void)cudaEventDestroy(shuttle->done[i]);
    }
    cuda_region_done(context, &shuttle->layer);
}

static bool is_pinned(const void *base)
{
    struct cudaPointerAttributes attributes;
    cudaError_t code = cudaPointerGetAttributes(&attributes, base);

    (void)cudaGetLastError();
    return code == cudaSuccess && attributes.type == cudaMemoryTypeHost;
}

/* Whether all arrays of the image that are there are pinned. */
static bool is_pinned_image(const struct claas_adapter_image *image)
{
    return is_pinned(image->parameters) && (!image->exp_avg || is_pinned(image->exp_avg)) &&
           (!image->exp_avg_sq || is_pinned(image->exp_avg_sq));
}

static int open_shuttle(struct cuda_context *context, const struct cuda_adapter *adapter,
                        const struct claas_adapter_image *image, struct shuttle *shuttle)
{
    size_t bytes = adapter->layout.layer * sizeof(float);
    int rc = 0;

    memset(shuttle, 0, sizeof(*shuttle));
    shuttle->stream = cudaStreamPerThread;
    shuttle->direct = is_pinned_image(image);
    for (int i = 0; i < 2 && rc == 0; i++) {
        rc = cuda_check(context,
                        cudaEventCreateWithFlags(&shuttle->done[i], cudaEventDisableTiming),
                        "making an event");
        if (rc < 0 || shuttle->direct)
            continue;
        rc = cuda_pin(context, (void **)&shuttle->host[i], bytes, "an adapter's layer");
        if (rc == 0)
            memset(shuttle->host[i], 0, bytes);
    }
    if (rc == 0 && !adapter->trains)
        rc = cuda_region_new(context, &shuttle->layer, bytes, "an adapter's layer");
    if (rc < 0)
        close_shuttle(context, shuttle);
    return rc;
}

/* Notes that what is queued so far belongs to a turn. */
static int note_copy(struct cuda_context *context, struct shuttle *shuttle, int turn)
{
    int rc = cuda_check(context, cudaEventRecord(shuttle->done[turn], shuttle->stream),
                        "copying an adapter");

    shuttle->pending[turn] = rc == 0;
    return rc;
}

/* Starts a copy and notes when it is done. */
static int start_copy(struct cuda_context *context, struct shuttle *shuttle, int turn, void *to,
                      const void *from, size_t bytes, cudaMemcpyKind kind)
{
    int rc = cuda_check(context, cudaMemcpyAsync(to, from, bytes, kind, shuttle->stream),
                        "copying an adapter");

    return rc < 0 ? rc : note_copy(context, shuttle, turn);
}

/* Starts the copy of one matrix of `rows` rows of `count` floats, which lie ld_… apart. */
static int start_matrix(struct cuda_context *context, const struct shuttle *shuttle, float *to,
                        int ld_to, const float *from, int ld_from, int rows, int count,
                        cudaMemcpyKind kind)
{
    size_t width = (size_t)count * sizeof(float);
    cudaError_t code;

    if (ld_to == count && ld_from == count)
        code = cudaMemcpyAsync(to, from, (size_t)rows * width, kind, shuttle->stream);
    else
        code = cudaMemcpy2DAsync(to, (size_t)ld_to * sizeof(float), from,
                                 (size_t)ld_from * sizeof(float), width, (size_t)rows, kind,
                                 shuttle->stream);
    return cuda_check(context, code, "copying an adapter");
}

/* Does what copy_layer does, between a pinned image and the device; the layer's padding stays as it
 * is. */
static int start_layer(struct cuda_context *context, const struct cuda_model *model,
                       const struct cuda_adapter *adapter, const struct shuttle *shuttle, int l,
                       float *image, float *layer, bool to_image)
{
    struct matrix list[2 * CLAAS_MODULE_COUNT];
    int count = list_matrices(model, adapter, l, image, layer, list), rc = 0;

    for (const struct matrix *m = list; m < list + count && rc == 0; m++)
        rc = to_image ? start_matrix(context, shuttle, m->image, m->ld_image, m->layer, m->ld_layer,
                                     m->rows, m->count, cudaMemcpyDeviceToHost)
                      : start_matrix(context, shuttle, m->layer, m->ld_layer, m->image, m->ld_image,
                                     m->rows, m->count, cudaMemcpyHostToDevice);
    return rc;
}

static int wait_copy(struct cuda_context *context, struct shuttle *shuttle, int turn)
{
    int rc = 0;

    if (shuttle->pending[turn])
        rc = cuda_check(context, cudaEventSynchronize(shuttle->done[turn]), "copying an adapter");
    shuttle->pending[turn] = false;
    return rc;
}

/* --- upload --- */

/* Uploads one array of the image. device NULL: only its view is kept. The padding of the buffers,
 * and of what is on the device, was zeroed at the start and is never written. */
static int upload_array(struct cuda_context *context, const struct cuda_model *model,
                        const struct cuda_adapter *adapter, struct shuttle *shuttle,
                        const float *image, float *device)
{
    size_t layer = adapter->layout.layer;
    int rc = 0;

    for (int l = 0; l < model->config.layers && rc == 0; l++) {
        int turn = l & 1;
        float *target = device ? device + (size_t)l * layer : (float *)shuttle->layer.base;

        if (shuttle->direct)
            rc = start_layer(context, model, adapter, shuttle, l, (float *)(uintptr_t)image,
                             target, false);
        else
            rc = wait_copy(context, shuttle, turn);
        if (rc == 0 && !shuttle->direct) {
            copy_layer(model, adapter, l, (float *)(uintptr_t)image, shuttle->host[turn], false);
            rc = start_copy(context, shuttle, turn, target, shuttle->host[turn],
                            layer * sizeof(float), cudaMemcpyHostToDevice);
        }
        if (rc == 0 && !device)
            rc = make_view(context, model, adapter, shuttle->stream, target, l, 1);
    }
    return rc;
}

static int upload_moments(struct cuda_context *context, const struct cuda_model *model,
                          const struct cuda_adapter *adapter, struct shuttle *shuttle,
                          const struct claas_adapter_image *image)
{
    size_t bytes = 2 * adapter->layout.count * sizeof(float);
    int rc;

    if (!image->exp_avg || !image->exp_avg_sq)
        return cuda_check(context, cudaMemsetAsync(adapter->exp_avg, 0, bytes, shuttle->stream),
                          "an adapter's moments");
    rc = upload_array(context, model, adapter, shuttle, image->exp_avg, adapter->exp_avg);
    if (rc == 0)
        rc = upload_array(context, model, adapter, shuttle, image->exp_avg_sq, adapter->exp_avg_sq);
    return rc;
}

static bool same_lora(const struct claas_lora_config *a, const struct claas_lora_config *b)
{
    return a->rank == b->rank && a->alpha == b->alpha && a->modules == b->modules;
}

int cuda_adapter_upload(struct cuda_context *context, const struct cuda_model *model,
                        struct cuda_adapter *adapter, const struct claas_adapter_image *image)
{
    struct shuttle shuttle;
    int rc;

    if (!same_lora(&image->lora, &adapter->lora) || !image->parameters)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter's image has another shape");
    rc = open_shuttle(context, adapter, image, &shuttle);
    if (rc < 0)
        return rc;
    rc = upload_array(context, model, adapter, &shuttle, image->parameters, adapter->parameters);
    if (rc == 0 && adapter->trains) {
        rc = make_view(context, model, adapter, shuttle.stream, adapter->parameters, 0,
                       model->config.layers);
        if (rc == 0)
            rc = upload_moments(context, model, adapter, &shuttle, image);
    }
    if (rc == 0)
        rc = cuda_check(context, cudaStreamSynchronize(shuttle.stream), "copying an adapter");
    close_shuttle(context, &shuttle);
    if (rc == 0)
        adapter->step = adapter->trains && image->exp_avg && image->exp_avg_sq ? image->step : 0;
    return rc;
}

/* --- download --- */

static int start_download(struct cuda_context *context, const struct cuda_model *model,
                          const struct cuda_adapter *adapter, struct shuttle *shuttle,
                          const float *layer, int l, float *image)
{
    int rc;

    if (!shuttle->direct)
        return start_copy(context, shuttle, l & 1, shuttle->host[l & 1], layer,
                          adapter->layout.layer * sizeof(float), cudaMemcpyDeviceToHost);
    rc = start_layer(context, model, adapter, shuttle, l, image, (float *)(uintptr_t)layer, true);
    return rc < 0 ? rc : note_copy(context, shuttle, l & 1);
}

/* Downloads one array into the image: while a layer is unpacked the next one is on its way. */
static int download_array(struct cuda_context *context, const struct cuda_model *model,
                          const struct cuda_adapter *adapter, struct shuttle *shuttle,
                          const float *device, float *image)
{
    size_t layer = adapter->layout.layer;
    int layers = model->config.layers, rc = 0;

    for (int l = 0; l <= layers && rc == 0; l++) {
        if (l < layers)
            rc = start_download(context, model, adapter, shuttle, device + (size_t)l * layer, l,
                                image);
        if (rc == 0 && l > 0) {
            rc = wait_copy(context, shuttle, (l - 1) & 1);
            if (rc == 0 && !shuttle->direct)
                copy_layer(model, adapter, l - 1, image, shuttle->host[(l - 1) & 1], true);
            if (shuttle->turn)
                shuttle->turn(shuttle->turn_arg);
        }
    }
    return rc;
}

/* Lets a stream wait for what the computing stream has queued so far: an update may be among it. */
static int follow(struct cuda_context *context, cudaStream_t stream, cudaEvent_t now)
{
    cudaError_t code;
    int rc;

    cuda_capture_lock(context);
    code = cudaEventRecord(now, context->stream);
    cuda_capture_unlock(context);
    rc = cuda_check(context, code, "reading an adapter");
    return rc < 0
               ? rc
               : cuda_check(context, cudaStreamWaitEvent(stream, now, 0), "reading an adapter");
}

static int download_all(struct cuda_context *context, const struct cuda_model *model,
                        const struct cuda_adapter *adapter, void (*turn)(void *arg), void *turn_arg,
                        struct claas_adapter_image *image)
{
    struct shuttle shuttle;
    int rc = open_shuttle(context, adapter, image, &shuttle);

    if (rc < 0)
        return rc;
    shuttle.turn = turn;
    shuttle.turn_arg = turn_arg;
    rc = follow(context, shuttle.stream, shuttle.done[0]);
    if (rc == 0)
        rc = download_array(context, model, adapter, &shuttle, adapter->parameters,
                            image->parameters);
    if (rc == 0)
        rc = download_array(context, model, adapter, &shuttle, adapter->exp_avg, image->exp_avg);
    if (rc == 0)
        rc = download_array(context, model, adapter, &shuttle, adapter->exp_avg_sq,
                            image->exp_avg_sq);
    close_shuttle(context, &shuttle);
    return rc;
}

int cuda_adapter_download(struct cuda_context *context, const struct cuda_model *model,
                          const struct cuda_adapter *adapter, void (*turn)(void *arg),
                          void *turn_arg, struct claas_adapter_image *ret)
{
    struct claas_adapter_image image;
    int rc;

    if (!adapter->trains)
        return claas_fail(CLAAS_ERR_INVALID, "only an adapter in training can be read back");
    rc = claas_adapter_image_new(&model->config, &adapter->lora, ret->memory, true, &image);
    if (rc < 0)
        return rc;
    image.step = adapter->step;
    rc = download_all(context, model, adapter, turn, turn_arg, &image);
    if (rc < 0) {
        claas_adapter_image_done(&image);
        return rc;
    }
    *ret = image;
    return 0;
}

/* --- on the device --- */

static int start_clone(struct cuda_context *context, const struct cuda_model *model,
                       const struct cuda_adapter *source, cudaStream_t stream,
                       const struct cuda_adapter *adapter)
{
    int rc = 0;

    if (adapter->trains)
        rc = cuda_check(context,
                        cudaMemcpyAsync(adapter->parameters, source->parameters,
                                        3 * source->layout.count * sizeof(float),
                                        cudaMemcpyDeviceToDevice, stream),
                        "copying an adapter");
    if (rc == 0 && adapter->view.base)
        rc = make_view(context, model, adapter, stream, source->parameters, 0,
                       model->config.layers);
    return rc;
}

int cuda_adapter_clone(struct cuda_context *context, const struct cuda_model *model,
                       const struct cuda_adapter *source, enum cuda_clone what,
                       struct cuda_adapter *ret)
{
    struct cuda_adapter adapter;
    cudaEvent_t now = NULL;
    int rc;

    if (!source->trains)
        return claas_fail(CLAAS_ERR_INVALID, "only an adapter with its masters can be copied");
    rc = new_adapter(context, model, &source->lora, what != CUDA_CLONE_STATE,
                     what != CUDA_CLONE_VIEW, &adapter);
    if (rc < 0)
        return rc;
    rc = cuda_check(context, cudaEventCreateWithFlags(&now, cudaEventDisableTiming),
                    "making an event");
    if (rc == 0)
        rc = follow(context, cudaStreamPerThread, now);
    if (rc == 0)
        rc = start_clone(context, model, source, cudaStreamPerThread, &adapter);
    if (rc == 0)
        rc = cuda_check(context, cudaStreamSynchronize(cudaStreamPerThread), "copying an adapter");
    if (now)
        (void)cudaEventDestroy(now);
    if (rc < 0) {
        cuda_adapter_done(context, &adapter);
        return rc;
    }
    if (adapter.trains)
        adapter.step = source->step;
    *ret = adapter;
    return 0;
}

/* --- pinned memory --- */

void *cuda_host_new(size_t bytes)
{
    void *base = NULL;
    cudaError_t code = cudaMallocHost(&base, bytes);

    (void)cudaGetLastError();
    return code == cudaSuccess ? base : NULL;
}

void cuda_host_free(void *base)
{
    (void)cudaFreeHost(base);
    (void)cudaGetLastError();
}
