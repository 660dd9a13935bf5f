/* The I/O threads, one that loads and one that saves: adapter directories are read and written
 * here, so that neither an actor's loop nor the compute thread waits for a disk. A new adapter is
 * unknown to anyone until its ADAPTER event, which is what lets a thread fill it beside the compute
 * thread.
 *
 * A load takes the nearest place that has the directory's content: a copy on the device that was
 * saved as this very directory, its image in the host's memory, the disk. */
#include "engine/engine.h"

#include <stdlib.h>

#include "claas/clock.h"
#include "claas/log.h"

#define IMAGE_ARRAYS 3 /* weights and two moments */

void claas_io_account(claas_device_t *device, uint64_t *counter, int64_t start)
{
    pthread_mutex_lock(&device->lock);
    *counter += (uint64_t)(claas_clock_ns() - start);
    pthread_mutex_unlock(&device->lock);
}

/* --- to the device --- */

static int upload_once(claas_device_t *device, const struct claas_adapter_image *image,
                       enum claas_adapter_use use, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_unref) claas_adapter_t *adapter = NULL;
    int64_t start = claas_clock_ns();
    int rc = claas_adapter_new(device, &image->lora, use, &adapter);

    if (rc == 0)
        rc = device->ops->adapter_upload(device->backend, adapter->backend, image);
    claas_io_account(device, &device->stats.upload_ns, start);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

/* From a host image to a handle. Adapters that were let go of may still hold memory, for the
 * compute thread frees them between two operations. So when the device has no room, this waits for
 * that, gives up the saved copies and what the last step left (what the failed try left behind
 * goes, too), and tries again. An adapter to train then also has precedence over idle ones. */
static int upload(claas_device_t *device, const struct claas_adapter_image *image,
                  enum claas_adapter_use use, claas_adapter_t **ret)
{
    int rc = upload_once(device, image, use, ret);

    if (rc != CLAAS_ERR_NO_MEMORY)
        return rc;
    claas_adapters_drop_hot(device);
    claas_adapters_await_sweep(device);
    rc = upload_once(device, image, use, ret);
    if (rc != CLAAS_ERR_NO_MEMORY || use != CLAAS_ADAPTER_TRAIN || !claas_memory_ask(device))
        return rc;
    claas_memory_await(device);
    return upload_once(device, image, use, ret);
}

/* --- load and init --- */

/* Loads from memory: 1, or 0 if it is not there. */
static int load_near(claas_device_t *device, const struct claas_adapter_mark *mark,
                     enum claas_adapter_use use, claas_adapter_t **ret)
{
    bool with_moments = use != CLAAS_ADAPTER_SERVE;
    CLAAS_AUTO(claas_adapter_unref)
    claas_adapter_t *hot = claas_adapters_find_hot(device, mark, with_moments);
    const struct claas_adapter_image *image;
    int rc;

    if (hot != NULL && claas_adapter_new_clone(device, hot, use, ret) == 0)
        return 1;
    claas_adapter_unref(&hot); /* it may be in the way */
    image = claas_host_cache_get(device->host_cache, mark, with_moments);
    if (image == NULL)
        return 0;
    rc = upload(device, image, use, ret);
    claas_host_cache_done(device->host_cache, image);
    return rc < 0 ? rc : 1;
}

static int load_file(claas_device_t *device, struct claas_adapter_job *job,
                     const struct claas_adapter_mark *mark, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    bool with_moments = job->use != CLAAS_ADAPTER_SERVE;
    struct claas_adapter_mark after;
    int64_t start = claas_clock_ns();
    int rc = claas_adapter_read_into(job->directory, &device->config, with_moments,
                                     claas_host_cache_memory(device->host_cache), &image);

    claas_io_account(device, &device->stats.read_ns, start);
    if (rc < 0) /* the caller knows which adapter it asked for; clients need not know where it
                   lies */
        return claas_fail_hide_path(rc, job->directory, "the adapter");
    if (job->use == CLAAS_ADAPTER_KEEP)
        return claas_adapter_new_kept(device, &image, ret);
    rc = upload(device, &image, job->use, ret);
    if (rc == 0 && claas_adapter_mark_read(job->directory, &after) &&
        claas_adapter_mark_is(mark, &after, true))
        claas_host_cache_put(device->host_cache, mark, with_moments, &image);
    return rc;
}

static int load(claas_device_t *device, struct claas_adapter_job *job, claas_adapter_t **ret)
{
    struct claas_adapter_mark mark;
    int rc = 0;

    if (claas_adapter_mark_read(job->directory, &mark) && job->use != CLAAS_ADAPTER_KEEP)
        rc = load_near(device, &mark, job->use, ret);
    if (rc != 0)
        return rc < 0 ? rc : 0;
    return load_file(device, job, &mark, ret);
}

static int init(claas_device_t *device, struct claas_adapter_job *job, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    int rc = claas_adapter_image_new(&device->config, &job->lora,
                                     claas_host_cache_memory(device->host_cache), false, &image);

    if (rc < 0)
        return rc;
    claas_lora_init(&device->config, &job->lora, job->seed, image.parameters);
    if (job->use == CLAAS_ADAPTER_KEEP)
        return claas_adapter_new_kept(device, &image, ret);
    return upload(device, &image, job->use, ret);
}

/* --- save --- */

static bool is_cancelled(void *arg)
{
    const struct claas_request *request = arg;

    return atomic_load(&request->cancelled);
}

/* An image without moments stands for zero moments. They are written out, so that whoever loads the
 * directory goes on just as this adapter would. */
static int write_image(claas_device_t *device, struct claas_adapter_job *job,
                       const struct claas_adapter_image *image)
{
    struct claas_adapter_image whole = *image; /* borrowed */
    CLAAS_AUTO_FREE float *zeros = NULL;
    int64_t start = claas_clock_ns();
    int rc;

    if (whole.exp_avg == NULL || whole.exp_avg_sq == NULL) {
        /* Pages of zeros that are only read take no memory. */
        zeros = CLAAS_NEW_ARRAY(float, claas_lora_parameter_count(&device->config, &whole.lora));
        if (zeros == NULL)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        whole.exp_avg = whole.exp_avg_sq = zeros;
    }
    rc =
        claas_adapter_write_unless(job->directory, &device->config, claas_model_name(device->model),
                                   &whole, is_cancelled, &job->request);
    claas_io_account(device, &device->stats.write_ns, start);
    return rc;
}

/* Keeps what was saved at hand: on the device if it is there, and in the host's memory. */
static void remember(claas_device_t *device, struct claas_adapter_job *job)
{
    claas_adapter_t *adapter = job->adapter;
    struct claas_adapter_mark mark;

    if (!claas_adapter_mark_read(job->directory, &mark))
        return;
    if (adapter->backend == NULL) { /* its image is in use until its last reference */
        pthread_mutex_lock(&device->lock);
        adapter->mark = mark;
        adapter->marked = true;
        pthread_mutex_unlock(&device->lock);
        return;
    }
    claas_host_cache_put(device->host_cache, &mark, true, &job->image);
    if (adapter->use == CLAAS_ADAPTER_KEEP)
        claas_adapters_add_hot(device, &mark, adapter);
}

static int save(claas_device_t *device, struct claas_adapter_job *job)
{
    bool in_host = job->adapter->backend == NULL;
    int64_t start = claas_clock_ns();
    int rc = 0;

    if (!in_host && job->adapter->use == CLAAS_ADAPTER_KEEP) {
        job->image.memory = claas_host_cache_memory(device->host_cache);
        rc = device->ops->adapter_download(device->backend, job->adapter->backend, NULL, NULL,
                                           &job->image);
        claas_io_account(device, &device->stats.download_ns, start);
    }
    if (rc == 0)
        rc = write_image(device, job, in_host ? &job->adapter->image : &job->image);
    if (rc == 0)
        remember(device, job);
    return rc;
}

static void run(claas_device_t *device, struct claas_adapter_job *job)
{
    struct claas_event_node *last = job->request.last;
    size_t bytes = 0; /* of the arrays that the next save will want */
    int rc = CLAAS_ERR_INTERNAL;

    last->kind = CLAAS_EVENT_ADAPTER;
    switch (job->request.kind) {
    case CLAAS_REQUEST_LOAD:
        rc = load(device, job, &last->adapter);
        break;
    case CLAAS_REQUEST_INIT:
        rc = init(device, job, &last->adapter);
        break;
    default:
        last->kind = CLAAS_EVENT_SAVED;
        rc = save(device, job);
        if (device->ops->host_new != NULL)
            bytes =
                sizeof(float) * claas_lora_parameter_count(&device->config, &job->adapter->lora);
    }
    if (rc < 0)
        claas_request_fail(&job->request, rc);
    else
        claas_request_finish(&job->request);
    if (bytes > 0)
        claas_host_cache_prepare(device->host_cache, bytes, IMAGE_ARRAYS);
}

void *claas_io_main(void *arg)
{
    struct claas_io *io = arg;
    claas_device_t *device = io->device;

    claas_log_thread_name(io == &device->loads ? "device-load" : "device-save");
    pthread_mutex_lock(&device->lock);
    for (;;) {
        struct claas_request *request;

        while (!device->io_stop && io->queue.first == NULL)
            pthread_cond_wait(&io->wake, &device->lock);
        request = claas_queue_pop(&io->queue);
        if (request == NULL)
            break;
        pthread_mutex_unlock(&device->lock);
        claas_request_begin(request);
        if (atomic_load(&request->cancelled))
            claas_request_cancel(request);
        else
            run(device, (struct claas_adapter_job *)request);
        pthread_mutex_lock(&device->lock);
        claas_device_poke(device); /* its figures changed */
    }
    pthread_mutex_unlock(&device->lock);
    return NULL;
}
