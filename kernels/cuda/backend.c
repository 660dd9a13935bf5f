/* The CUDA back-end of the engine: opens the device and the model on it, and names the functions.
 */
#include "cuda/cuda_backend.h"
#include "cuda/cuda_floor.h"
#include "cuda/pass.h"
#include "pack/backend_common.h"
#include "pack/loading.h"
#include "pack/peak.h"

#include "claas/mem.h"

#include <stdio.h>
#include <stdlib.h>

_Static_assert(CUDA_USES <= CLAAS_MEMORY_USES, "a line of the memory map for each");

#define KV_SHARE      0.35 /* of the card's memory */
#define KV_TOKENS_MAX ((size_t)4 << 20)

static void close_backend(claas_backend_t **backend)
{
    claas_backend_t *b = *backend;

    if (!b)
        return;
    if (b->context.stream)
        (void)cuda_wait(&b->context);
    cuda_forward_close(b);
    cuda_upload_done(&b->context, &b->step_upload);
    cuda_upload_done(&b->context, &b->chunk_upload);
    cuda_region_done(&b->context, &b->step);
    cuda_region_done(&b->context, &b->kv);
    for (int i = 0; i < 2; i++)
        if (b->turns[i])
            (void)cudaEventDestroy(b->turns[i]);
    cuda_model_done(&b->context, &b->model);
    cuda_context_close(&b->context);
    free(b);
    *backend = NULL;
}

/* Makes the pool as large as leaves room for a training step: a share of the card, but no more than
 * half of what the weights left; never less than was asked for. */
static int widen_kv(claas_backend_t *backend, size_t block)
{
    size_t available = 0, share = (size_t)(KV_SHARE * (double)backend->context.memory), blocks;
    int code = cuda_memory_free(&backend->context, &available);

    if (code < 0)
        return code;
    blocks = (share < available / 2 ? share : available / 2) / block;
    if (blocks > KV_TOKENS_MAX / CUDA_KV_BLOCK)
        blocks = KV_TOKENS_MAX / CUDA_KV_BLOCK;
    if (blocks > (size_t)backend->kv_blocks)
        backend->kv_blocks = (int)blocks;
    return 0;
}

static int open_kv(claas_backend_t *backend, bool more)
{
    const struct claas_model_config *c = &backend->model.config;
    size_t block = 2 * (size_t)c->kv_heads * CUDA_KV_BLOCK * (size_t)c->head_dim *
                   backend->context.act_bytes * (size_t)c->layers;
    int code = more ? widen_kv(backend, block) : 0;
    size_t bytes;

    if (code < 0)
        return code;
    /* one more: the spare block */
    if (__builtin_mul_overflow(block, (size_t)backend->kv_blocks + 1, &bytes))
        return claas_fail(CLAAS_ERR_LIMIT, "%d key/value blocks are too many", backend->kv_blocks);
    return cuda_region_new(&backend->context, &backend->kv, bytes, "keys and values");
}

static int open_turns(claas_backend_t *backend)
{
    int code = 0;

    for (int i = 0; i < 2 && code >= 0; i++)
        code = cuda_check(&backend->context,
                          cudaEventCreateWithFlags(&backend->turns[i], cudaEventDisableTiming),
                          "an event");
    return code;
}

static int open_backend(const struct claas_backend_options *options, claas_model_t *model,
                        claas_backend_t **ret)
{
    CLAAS_AUTO(close_backend) claas_backend_t *backend = CLAAS_NEW(claas_backend_t);
    struct claas_loading loading;
    bool f32 = false;
    int code = claas_backend_precision(options, &f32);

    if (!backend)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (code < 0)
        return code;
    if (options->kv_blocks < 1 || options->max_tokens < 1)
        return claas_fail(CLAAS_ERR_INVALID, "%d key/value blocks, %d tokens in a pass",
                          options->kv_blocks, options->max_tokens);
    backend->kv_blocks = options->kv_blocks;
    backend->max_tokens = options->max_tokens;
    backend->max_sequences =
        options->max_sequences > 0 ? options->max_sequences : options->max_tokens;
    code = cuda_context_open(f32 ? CUDA_TYPE_F32 : CUDA_TYPE_BF16, &backend->context);
    if (code >= 0)
        claas_loading_begin(&loading, options, model);
    if (code >= 0)
        code = cuda_model_load(&backend->context, model, &loading, &backend->model);
    if (code >= 0)
        code = open_kv(backend, options->kv_more);
    if (code >= 0)
        code = open_turns(backend);
    if (code >= 0)
        code = cuda_forward_open(backend);
    if (code >= 0)
        code = cuda_wait(&backend->context);
    if (code < 0)
        return code;
    (void)snprintf(backend->name, sizeof(backend->name), "cuda %s %s", f32 ? "f32" : "bf16",
                   backend->context.name);
    *ret = CLAAS_TAKE(backend);
    return 0;
}

static const char *describe(const claas_backend_t *backend)
{
    return backend->name;
}

static void report_memory(const claas_backend_t *backend, struct claas_backend_memory *ret)
{
    *ret = (struct claas_backend_memory){
        .weights = backend->model.region.bytes,
        .kv = backend->kv.bytes,
        .adapters = atomic_load(&backend->bytes_adapters),
        .workspace = backend->step.bytes + backend->forward.region.bytes,
        .peak = claas_peak(&backend->context.peak),
    };
    for (int i = 0; i < CUDA_USES; i++)
        claas_backend_add_use(ret,
                              __atomic_load_n(&backend->context.uses[i].what, __ATOMIC_ACQUIRE),
                              __atomic_load_n(&backend->context.uses[i].bytes, __ATOMIC_RELAXED));
}

static int count_kv_blocks(const claas_backend_t *backend)
{
    return backend->kv_blocks;
}

/* --- adapters --- */

static uint64_t adapter_bytes(const claas_backend_adapter_t *adapter)
{
    return adapter->cuda.view.bytes + adapter->cuda.masters.bytes;
}

static int adapter_new(claas_backend_t *backend, const struct claas_lora_config *lora,
                       enum claas_adapter_use use, claas_backend_adapter_t **ret)
{
    CLAAS_AUTO_FREE claas_backend_adapter_t *adapter = CLAAS_NEW(claas_backend_adapter_t);
    int code;

    if (!adapter)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    code = cuda_adapter_new(&backend->context, &backend->model, lora, use == CLAAS_ADAPTER_TRAIN,
                            &adapter->cuda);
    if (code < 0)
        return code;
    atomic_fetch_add(&backend->bytes_adapters, adapter_bytes(adapter));
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

static void adapter_free(claas_backend_t *backend, claas_backend_adapter_t **adapter)
{
    if (!*adapter)
        return;
    atomic_fetch_sub(&backend->bytes_adapters, adapter_bytes(*adapter));
    cuda_adapter_done(&backend->context, &(*adapter)->cuda);
    free(*adapter);
    *adapter = NULL;
}

static int adapter_upload(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                          const struct claas_adapter_image *image)
{
    return cuda_adapter_upload(&backend->context, &backend->model, &adapter->cuda, image);
}

static int adapter_download(claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                            claas_turn_fn *turn, void *turn_arg, struct claas_adapter_image *ret)
{
    return cuda_adapter_download(&backend->context, &backend->model, &adapter->cuda, turn, turn_arg,
                                 ret);
}

static int adapter_clone(claas_backend_t *backend, const claas_backend_adapter_t *source,
                         enum claas_adapter_use use, claas_backend_adapter_t **ret)
{
    CLAAS_AUTO_FREE claas_backend_adapter_t *adapter = CLAAS_NEW(claas_backend_adapter_t);
    enum cuda_clone what = use == CLAAS_ADAPTER_SERVE  ? CUDA_CLONE_VIEW
                           : use == CLAAS_ADAPTER_KEEP ? CUDA_CLONE_STATE
                                                       : CUDA_CLONE_ALL;
    int code;

    if (!adapter)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    code =
        cuda_adapter_clone(&backend->context, &backend->model, &source->cuda, what, &adapter->cuda);
    if (code < 0)
        return code;
    atomic_fetch_add(&backend->bytes_adapters, adapter_bytes(adapter));
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

static void *host_new(claas_backend_t *backend, size_t bytes)
{
    (void)backend;
    return cuda_host_new(bytes);
}

static void host_free(claas_backend_t *backend, void *base)
{
    (void)backend;
    cuda_host_free(base);
}

static void give_back(claas_backend_t *backend)
{
    cuda_region_done(&backend->context, &backend->step);
}

static int measure_floor(const struct claas_backend_options *options,
                         struct claas_device_floor *ret)
{
    bool f32 = false;
    int code = claas_backend_precision(options, &f32);

    return code >= 0 ? cuda_floor(f32 ? CUDA_TYPE_F32 : CUDA_TYPE_BF16, ret) : code;
}

const struct claas_backend_ops claas_backend_cuda = {
    .name = "cuda",
    .prefill_chunk = 2048,
    .warm = cuda_warm,
    .cycles = 8,
    .open = open_backend,
    .free = close_backend,
    .describe = describe,
    .memory = report_memory,
    .kv_blocks = count_kv_blocks,
    .adapter_new = adapter_new,
    .adapter_free = adapter_free,
    .adapter_bytes = adapter_bytes,
    .adapter_upload = adapter_upload,
    .adapter_download = adapter_download,
    .adapter_clone = adapter_clone,
    .host_new = host_new,
    .host_free = host_free,
    .forward = cuda_forward,
    .train = cuda_train,
    .give_back = give_back,
    .floor = measure_floor,
};
