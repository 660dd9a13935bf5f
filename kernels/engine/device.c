/* The device object: its options, its three threads (one computes, one loads, one saves) and the
 * compute thread's loop. One turn of the loop takes what clients sent, runs one request of the
 * training lane if there is one (generation goes on inside it, train.c) and one pass of generation;
 * with nothing to do it sleeps on a condition variable. */
#include "engine/engine.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/log.h"
#include "engine/host_memory.h"

#define DEFAULT_KV_TOKENS     8192 /* at least; a back-end may take more */
#define DEFAULT_PREFILL_CHUNK 256
#define DEFAULT_MAX_BATCH     64
#define DEFAULT_SLICE_MS      50
#define HOST_CACHE_SHARE      8                    /* 1/8 of the memory there is */
#define HOST_CACHE_MAX        ((uint64_t)16 << 30) /* pinned pages are lost to all else */

void claas_device_poke(claas_device_t *device)
{
    device->poked = true;
    pthread_cond_signal(&device->wake);
}

static void update_stats(claas_device_t *device)
{
    struct claas_backend_memory memory = {0};
    struct claas_host_cache_stats cache;

    device->ops->memory(device->backend, &memory);
    claas_host_cache_stats(device->host_cache, &cache);
    pthread_mutex_lock(&device->lock);
    device->stats.bytes_weights = memory.weights;
    device->stats.bytes_kv = memory.kv;
    device->stats.bytes_adapters = memory.adapters;
    device->stats.bytes_workspace = memory.workspace;
    device->stats.bytes_peak = memory.peak;
    memcpy(device->stats.uses, memory.uses, sizeof(memory.uses));
    device->stats.use_count = memory.use_count;
    device->stats.kv_blocks = claas_kv_total(device->kv);
    device->stats.kv_blocks_free = claas_kv_available(device->kv);
    device->stats.running = device->running.count;
    device->stats.waiting = device->waiting.count;
    device->stats.host_cache_bytes = cache.bytes;
    device->stats.host_cache_images = cache.images;
    device->stats.host_cache_found = cache.found;
    device->stats.host_cache_missed = cache.missed;
    pthread_mutex_unlock(&device->lock);
}

void claas_device_stats(const claas_device_t *device, struct claas_device_stats *ret)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)&device->lock;

    pthread_mutex_lock(lock);
    *ret = device->stats;
    pthread_mutex_unlock(lock);
}

claas_model_t *claas_device_model(const claas_device_t *device)
{
    return device->model;
}

int claas_device_context(const claas_device_t *device)
{
    int64_t pool = (int64_t)claas_kv_total(device->kv) * CLAAS_KV_BLOCK_TOKENS;

    return pool < device->config.context ? (int)pool : device->config.context;
}

int claas_device_cycles(const claas_device_t *device)
{
    return device->ops->cycles > 0 ? device->ops->cycles : 1;
}

/* --- the compute thread --- */

void claas_device_take_inbox(claas_device_t *device)
{
    struct claas_queue inbox;
    struct claas_request *request;
    bool reap;

    pthread_mutex_lock(&device->lock);
    inbox = device->inbox;
    device->inbox = (struct claas_queue){0};
    reap = device->cancel_seen;
    device->cancel_seen = false;
    pthread_mutex_unlock(&device->lock);
    while ((request = claas_queue_pop(&inbox)) != NULL)
        if (request->kind == CLAAS_REQUEST_GENERATE)
            claas_generate_enqueue(device, (struct claas_sequence *)request);
        else
            claas_queue_append(&device->lane, request);
    if (reap) {
        claas_generate_reap(device);
        claas_train_reap(device);
    }
    claas_adapters_sweep(device);
    update_stats(device);
}

static bool wait_for_work(claas_device_t *device, bool worked)
{
    bool stop;

    pthread_mutex_lock(&device->lock);
    while (!worked && !device->poked && !device->stop)
        if (!claas_memory_sleep(device, &device->wake))
            break; /* not all clients answered in time: what waited for memory gets its second
                      try */
    device->poked = false;
    stop = device->stop;
    pthread_mutex_unlock(&device->lock);
    return !stop;
}

static void *compute_main(void *arg)
{
    claas_device_t *device = arg;
    bool worked = false;

    claas_log_thread_name("device");
    while (wait_for_work(device, worked)) {
        claas_device_take_inbox(device);
        worked = claas_train_run(device);
        if (claas_generate_iterate(device))
            worked = true;
    }
    claas_device_take_inbox(device);
    claas_generate_close(device);
    claas_train_close(device);
    return NULL;
}

/* --- open and free --- */

static int take_options(claas_device_t *device, const struct claas_device_options *given)
{
    struct claas_device_options *o = &device->options;

    *o = *given;
    if (o->precision == NULL)
        o->precision = "bf16";
    if (o->threads < 0 || o->prefill_chunk < 0 || o->max_batch < 0 || o->slice_ms < 0 ||
        o->prefill_chunk > 65536 || o->max_batch > 4096)
        return claas_fail(CLAAS_ERR_INVALID,
                          "device options: threads %d, prefill_chunk %d, max_batch %d, slice_ms %d",
                          o->threads, o->prefill_chunk, o->max_batch, o->slice_ms);
    if (o->kv_tokens > (size_t)INT32_MAX - CLAAS_KV_BLOCK_TOKENS)
        return claas_fail(CLAAS_ERR_INVALID, "kv_tokens %zu", o->kv_tokens);
    if (o->prefill_chunk == 0)
        o->prefill_chunk = device->ops->prefill_chunk;
    if (o->prefill_chunk == 0)
        o->prefill_chunk = DEFAULT_PREFILL_CHUNK;
    if (o->prefill_chunk < CLAAS_KV_BLOCK_TOKENS) /* chunks end at block borders */
        o->prefill_chunk = CLAAS_KV_BLOCK_TOKENS;
    if (o->max_batch == 0)
        o->max_batch = DEFAULT_MAX_BATCH;
    if (o->slice_ms == 0)
        o->slice_ms = DEFAULT_SLICE_MS;
    return 0;
}

/* A file that was read lately is in the machine's own cache of files, which is as near as memory
 * gets where the device has none of its own. */
static uint64_t host_cache_budget(const claas_device_t *device)
{
    int64_t bytes = device->options.host_cache;
    uint64_t share;

    if (bytes >= 0)
        return (uint64_t)bytes;
    if (device->ops->host_new == NULL)
        return 0;
    share = claas_host_memory() / HOST_CACHE_SHARE;
    return share < HOST_CACHE_MAX ? share : HOST_CACHE_MAX;
}

static int open_backend(claas_device_t *device)
{
    int context = device->config.context;
    size_t tokens = device->options.kv_tokens;
    struct claas_backend_options options = {
        .precision = device->options.precision,
        .threads = device->options.threads,
        .kv_more = tokens == 0,
        .max_tokens = device->options.max_batch + device->options.prefill_chunk,
        .max_sequences = device->options.max_batch,
        .loading = device->options.loading,
        .loading_arg = device->options.loading_arg,
    };
    size_t batch = (size_t)device->options.max_batch;
    int rc;

    if (tokens == 0)
        tokens = (size_t)(context > DEFAULT_KV_TOKENS ? context : DEFAULT_KV_TOKENS);
    options.kv_blocks = (int)((tokens + CLAAS_KV_BLOCK_TOKENS - 1) / CLAAS_KV_BLOCK_TOKENS);
    device->segments = CLAAS_NEW_ARRAY(struct claas_segment, batch);
    device->samples = CLAAS_NEW_ARRAY(struct claas_sample, batch);
    device->planned = CLAAS_NEW_ARRAY(struct claas_sequence *, batch);
    if (device->segments == NULL || device->samples == NULL || device->planned == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = device->ops->open(&options, device->model, &device->backend);
    if (rc >= 0 && device->options.warm && device->ops->warm != NULL)
        rc = device->ops->warm(device->backend);
    if (rc >= 0)
        rc = claas_kv_new(device->ops->kv_blocks ? device->ops->kv_blocks(device->backend)
                                                 : options.kv_blocks,
                          &device->kv);
    if (rc >= 0)
        rc = claas_host_cache_new(device->ops, device->backend, host_cache_budget(device),
                                  &device->host_cache);
    if (rc >= 0)
        rc = claas_teacher_cache_new(device->ops, device->backend, &device->teachers);
    if (rc < 0)
        return rc;
    claas_copy_text(device->stats.name, sizeof(device->stats.name),
                    device->ops->describe(device->backend));
    update_stats(device);
    return 0;
}

/* Signals are the main thread's business: the device's threads, and those the back-end starts,
 * block all of them. */
static int start_thread(pthread_t *thread, void *(*main)(void *), void *arg, const char *name)
{
    int rc = pthread_create(thread, NULL, main, arg);

    if (rc != 0)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "cannot start a thread: %s", strerror(rc));
    pthread_setname_np(*thread, name);
    return 0;
}

static int start_io(struct claas_io *io, const char *name)
{
    int rc = start_thread(&io->thread, claas_io_main, io, name);

    io->started = rc == 0;
    return rc;
}

/* Lets the thread empty its queue first. */
static void stop_io(struct claas_io *io)
{
    pthread_mutex_lock(&io->device->lock);
    pthread_cond_signal(&io->wake);
    pthread_mutex_unlock(&io->device->lock);
    if (io->started)
        pthread_join(io->thread, NULL);
    pthread_cond_destroy(&io->wake);
}

static int start(claas_device_t *device)
{
    int rc = start_thread(&device->compute_thread, compute_main, device, "claas-device");

    device->compute_started = rc == 0;
    if (rc == 0)
        rc = start_io(&device->loads, "claas-load");
    if (rc == 0)
        rc = start_io(&device->saves, "claas-save");
    return rc;
}

/* A condition whose time-outs are times of claas_clock_ms. */
static void init_cond(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
}

int claas_device_open_with(const struct claas_backend_ops *ops, int64_t (*now)(void),
                           const struct claas_device_options *options, claas_model_t *model,
                           claas_device_t **ret)
{
    CLAAS_AUTO(claas_device_free) claas_device_t *device = CLAAS_NEW(claas_device_t);
    sigset_t all, before;
    int rc;

    if (device == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    pthread_mutex_init(&device->lock, NULL);
    init_cond(&device->wake);
    init_cond(&device->swept);
    pthread_cond_init(&device->loads.wake, NULL);
    pthread_cond_init(&device->saves.wake, NULL);
    device->loads.device = device->saves.device = device;
    device->ops = ops;
    device->await_ms = CLAAS_MEMORY_AWAIT_MS;
    device->now = now != NULL ? now : claas_clock_ns;
    device->model = model;
    device->config = *claas_model_config(model);
    rc = take_options(device, options);
    if (rc == 0)
        rc = claas_fault_read(&device->fault);
    if (rc < 0)
        return rc;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    rc = open_backend(device);
    if (rc == 0)
        rc = start(device);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(device);
    return 0;
}

void claas_device_free(claas_device_t **ref)
{
    claas_device_t *device = CLAAS_TAKE(*ref);

    if (device == NULL)
        return;
    pthread_mutex_lock(&device->lock);
    device->stop = true;
    claas_device_poke(device);
    pthread_cond_broadcast(&device->swept);
    pthread_mutex_unlock(&device->lock);
    if (device->compute_started)
        pthread_join(device->compute_thread, NULL);
    /* The I/O threads last: the compute thread may still have handed saves to them. */
    pthread_mutex_lock(&device->lock);
    device->io_stop = true;
    pthread_mutex_unlock(&device->lock);
    stop_io(&device->loads);
    stop_io(&device->saves);
    if (device->backend != NULL) {
        claas_adapters_close(device);
        claas_host_cache_free(&device->host_cache);
        claas_teacher_cache_free(&device->teachers);
        device->ops->free(&device->backend);
    }
    claas_kv_free(&device->kv);
    free(device->segments);
    free(device->samples);
    free(device->planned);
    pthread_cond_destroy(&device->wake);
    pthread_cond_destroy(&device->swept);
    pthread_mutex_destroy(&device->lock);
    free(device);
}
