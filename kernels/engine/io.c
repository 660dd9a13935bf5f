/* The I/O thread: adapter directories are read and written here, so that neither an actor's loop
 * nor the compute thread waits for a disk. A new adapter is unknown to anyone until its ADAPTER
 * event, which is what lets this thread fill it beside the compute thread. */
#include "engine/engine.h"

#include <stdlib.h>

#include "claas/log.h"

static int upload_once(claas_device_t *device, const struct claas_adapter_image *image,
                       enum claas_adapter_use use, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_unref) claas_adapter_t *adapter = NULL;
    int rc = claas_adapter_new(device, &image->lora, use, &adapter);

    if (rc == 0)
        rc = device->ops->adapter_upload(device->backend, adapter->backend, image);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

/* From a host image to a handle. Adapters that were let go may still be there, for the compute
 * thread frees them between two operations: a device without room is asked again after that. What
 * a failed try leaves behind is among them. An adapter to train then has precedence over idle ones.
 */
static int upload(claas_device_t *device, struct claas_adapter_image *image,
                  enum claas_adapter_use use, claas_adapter_t **ret)
{
    int rc;

    if (use == CLAAS_ADAPTER_KEEP)
        return claas_adapter_new_kept(device, image, ret);
    rc = upload_once(device, image, use, ret);
    if (rc != CLAAS_ERR_NO_MEMORY)
        return rc;
    claas_adapters_await_sweep(device);
    rc = upload_once(device, image, use, ret);
    if (rc != CLAAS_ERR_NO_MEMORY || use != CLAAS_ADAPTER_TRAIN || !claas_memory_ask(device))
        return rc;
    claas_memory_await(device);
    return upload_once(device, image, use, ret);
}

static int load(claas_device_t *device, struct claas_adapter_job *job, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    int rc = claas_adapter_read(job->directory, &device->config, job->use != CLAAS_ADAPTER_SERVE,
                                &image);

    if (rc < 0) /* who asked knows which adapter; clients need not know where it lies */
        return claas_fail_hide_path(rc, job->directory, "the adapter");
    return upload(device, &image, job->use, ret);
}

static int init(claas_device_t *device, struct claas_adapter_job *job, claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {.lora = job->lora};

    image.parameters =
        claas_alloc(claas_lora_parameter_count(&device->config, &job->lora), sizeof(float));
    if (image.parameters == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_lora_init(&device->config, &job->lora, job->seed, image.parameters);
    return upload(device, &image, job->use, ret);
}

static int save(claas_device_t *device, struct claas_adapter_job *job)
{
    bool kept = job->adapter->use == CLAAS_ADAPTER_KEEP;

    return claas_adapter_write(job->directory, &device->config, claas_model_name(device->model),
                               kept ? &job->adapter->image : &job->image);
}

static void run(claas_device_t *device, struct claas_adapter_job *job)
{
    struct claas_event_node *last = job->request.last;
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
    }
    if (rc < 0)
        claas_request_fail(&job->request, rc);
    else
        claas_request_finish(&job->request);
}

void *claas_io_main(void *arg)
{
    claas_device_t *device = arg;

    claas_log_thread_name("device-io");
    pthread_mutex_lock(&device->lock);
    for (;;) {
        struct claas_request *request;

        while (!device->io_stop && device->io.first == NULL)
            pthread_cond_wait(&device->io_wake, &device->lock);
        request = claas_queue_pop(&device->io);
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
