/* The CPU back-end of the engine: opens the model on an operation table and a pool of threads, and
 * names the functions. */
#include "cpu/step.h"
#include "pack/backend_common.h"
#include "pack/loading.h"
#include "pack/peak.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <stdio.h>
#include <stdlib.h>

/* Activations that a training step may keep: as much as half of the weights, and never less than
 * this (1300 tokens of a 135M model). */
#define SAVED_BYTES ((size_t)512 << 20)

void claas_cpu_memory_changed(claas_backend_t *backend)
{
    uint64_t now = backend->model.panels.bytes + backend->model.small.bytes +
                   backend->model.blocks_bytes + backend->kv.bytes +
                   atomic_load(&backend->bytes_adapters) + atomic_load(&backend->bytes_workspace);

    claas_peak_raise(&backend->bytes_peak, now);
}

static void close_backend(claas_backend_t **backend)
{
    claas_backend_t *b = *backend;

    if (!b)
        return;
    claas_cpu_region_done(&b->forward.region);
    claas_cpu_region_done(&b->step);
    claas_cpu_region_done(&b->kv);
    claas_cpu_model_done(&b->model);
    claas_pool_free(&b->pool);
    free(b);
    *backend = NULL;
}

static int open_kv(claas_backend_t *backend)
{
    const struct claas_model_config *c = &backend->model.config;
    size_t bytes;

    backend->kv_block_bytes = claas_kv_block_bytes(backend->ops->precision, c->head_dim);
    bytes = (size_t)c->layers * (size_t)c->kv_heads * backend->kv_block_bytes;
    if (__builtin_mul_overflow(bytes, (size_t)backend->kv_blocks, &bytes))
        return claas_fail(CLAAS_ERR_LIMIT, "%d key/value blocks are too many", backend->kv_blocks);
    return claas_cpu_region_new(&backend->kv, bytes, "keys and values");
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
    backend->ops = claas_ops_pick(f32 ? CLAAS_PRECISION_F32 : CLAAS_PRECISION_BF16);
    backend->kv_blocks = options->kv_blocks;
    backend->max_tokens = options->max_tokens;
    code = claas_pool_new(options->threads, &backend->pool);
    if (code >= 0)
        claas_loading_begin(&loading, options, model);
    if (code >= 0)
        code = claas_cpu_model_load(&backend->model, backend->ops, backend->pool, model, &loading);
    if (code >= 0)
        code = open_kv(backend);
    if (code >= 0)
        code = claas_cpu_forward_open(backend);
    if (code < 0)
        return code;
    backend->saved_limit = backend->model.panels.bytes / 2;
    if (backend->saved_limit < SAVED_BYTES)
        backend->saved_limit = SAVED_BYTES;
    (void)snprintf(backend->name, sizeof(backend->name), "cpu %s x%d", backend->ops->name,
                   claas_pool_threads(backend->pool));
    claas_cpu_memory_changed(backend);
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
        .weights =
            backend->model.panels.bytes + backend->model.small.bytes + backend->model.blocks_bytes,
        .kv = backend->kv.bytes,
        .adapters = atomic_load(&backend->bytes_adapters),
        .workspace = atomic_load(&backend->bytes_workspace),
        .peak = claas_peak(&backend->bytes_peak),
    };
    claas_backend_add_use(ret, "the model's weights", ret->weights);
    claas_backend_add_use(ret, "keys and values", ret->kv);
    claas_backend_add_use(ret, "adapters", ret->adapters);
    claas_backend_add_use(ret, "workspace", ret->workspace);
}

const struct claas_backend_ops claas_backend_cpu = {
    .name = "cpu",
    .open = open_backend,
    .free = close_backend,
    .describe = describe,
    .memory = report_memory,
    .adapter_new = claas_cpu_adapter_new,
    .adapter_free = claas_cpu_adapter_free,
    .adapter_bytes = claas_cpu_adapter_bytes,
    .adapter_upload = claas_cpu_adapter_upload,
    .adapter_download = claas_cpu_adapter_download,
    .forward = claas_cpu_forward,
    .train = claas_cpu_train,
    .floor = claas_cpu_floor,
};
