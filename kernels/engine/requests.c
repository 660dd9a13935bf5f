/* The life of a request: made and checked on the client's thread, numbered and queued under the
 * device's lock, worked on by the compute thread or one of the two I/O threads, ended by its last
 * event. That event's memory is taken at the start, so that a request never ends silently. */
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- queues --- */

void claas_queue_insert_after(struct claas_queue *queue, struct claas_request *where,
                              struct claas_request *request)
{
    request->prev = where;
    request->next = where == NULL ? queue->first : where->next;
    if (request->prev == NULL)
        queue->first = request;
    else
        request->prev->next = request;
    if (request->next == NULL)
        queue->last = request;
    else
        request->next->prev = request;
    queue->count++;
}

void claas_queue_append(struct claas_queue *queue, struct claas_request *request)
{
    claas_queue_insert_after(queue, queue->last, request);
}

void claas_queue_remove(struct claas_queue *queue, struct claas_request *request)
{
    if (request->prev == NULL)
        queue->first = request->next;
    else
        request->prev->next = request->next;
    if (request->next == NULL)
        queue->last = request->prev;
    else
        request->next->prev = request->prev;
    request->next = request->prev = NULL;
    queue->count--;
}

struct claas_request *claas_queue_pop(struct claas_queue *queue)
{
    struct claas_request *request = queue->first;

    if (request != NULL)
        claas_queue_remove(queue, request);
    return request;
}

/* --- begin --- */

struct claas_request *claas_request_new(claas_device_client_t *client, enum claas_request_kind kind,
                                        size_t size)
{
    struct claas_request *request = claas_alloc(1, size);

    if (request == NULL)
        return NULL;
    request->last = CLAAS_NEW(struct claas_event_node);
    if (request->last != NULL)
        request->last->text = claas_alloc(1, CLAAS_ERROR_TEXT_BYTES);
    if (request->last == NULL || request->last->text == NULL) {
        claas_event_node_free(request->last);
        free(request);
        return NULL;
    }
    request->kind = kind;
    request->client = client;
    atomic_init(&request->cancelled, false);
    atomic_fetch_add(&client->references, 1);
    return request;
}

/* The counter that bounds a kind of request, to be read under the device's lock. */
static int *find_count(claas_device_t *device, const struct claas_request *request)
{
    switch (request->kind) {
    case CLAAS_REQUEST_GENERATE:
        return ((const struct claas_sequence *)request)->priority == CLAAS_PRIORITY_ROLLOUT
                   ? &device->rollout_count
                   : &device->chat_count;
    case CLAAS_REQUEST_LOAD:
    case CLAAS_REQUEST_INIT:
        return &device->io_count;
    default:
        return &device->lane_count;
    }
}

/* The I/O thread of a request that the compute thread has no part in. A kept adapter never changes.
 */
static struct claas_io *find_io(claas_device_t *device, const struct claas_request *request)
{
    const struct claas_adapter_job *job = (const struct claas_adapter_job *)request;

    if (request->kind == CLAAS_REQUEST_LOAD || request->kind == CLAAS_REQUEST_INIT)
        return &device->loads;
    if (request->kind == CLAAS_REQUEST_SAVE && job->adapter->use == CLAAS_ADAPTER_KEEP)
        return &device->saves;
    return NULL;
}

/* Whether one more of its kind may wait. The device's lock is held. */
static bool has_place(claas_device_t *device, const struct claas_request *request)
{
    int *count = find_count(device, request);

    if (count == &device->chat_count)
        return claas_generate_share((const struct claas_sequence *)request)->unbegun <
               CLAAS_ENGINE_CHATS_MAX - *count;
    return *count <
           (count == &device->rollout_count ? CLAAS_ENGINE_ROLLOUTS_MAX : CLAAS_ENGINE_QUEUE_MAX);
}

/* Counts a request as waiting, or no longer. The device's lock is held. */
static void count_waiting(claas_device_t *device, struct claas_request *request, int change)
{
    int *count = find_count(device, request);

    *count += change;
    if (count == &device->chat_count)
        claas_generate_share((struct claas_sequence *)request)->unbegun += change;
}

int claas_request_submit(struct claas_request *request, uint64_t *ret_id)
{
    claas_device_t *device = request->client->device;
    struct claas_io *io = find_io(device, request);

    pthread_mutex_lock(&device->lock);
    if (device->stop || !has_place(device, request)) {
        bool stop = device->stop;
        int waiting = *find_count(device, request);

        pthread_mutex_unlock(&device->lock);
        return stop ? claas_fail(CLAAS_ERR_UNAVAILABLE, "the device is closing")
                    : claas_fail(CLAAS_ERR_OVERLOADED, "%d requests wait for the device", waiting);
    }
    count_waiting(device, request, 1);
    request->id = ++device->last_id;
    request->last->id = request->id;
    *ret_id = request->id;
    request->live_next = device->live;
    if (device->live != NULL)
        device->live->live_prev = request;
    device->live = request;
    if (io != NULL) {
        claas_queue_append(&io->queue, request);
        pthread_cond_signal(&io->wake);
    } else {
        claas_queue_append(&device->inbox, request);
        claas_device_poke(device);
    }
    pthread_mutex_unlock(&device->lock);
    return 0;
}

void claas_request_to_io(struct claas_request *request)
{
    claas_device_t *device = request->client->device;

    pthread_mutex_lock(&device->lock);
    claas_queue_append(&device->saves.queue, request);
    pthread_cond_signal(&device->saves.wake);
    pthread_mutex_unlock(&device->lock);
}

/* The device's lock is held. */
static void stop_counting(claas_device_t *device, struct claas_request *request)
{
    if (!request->begun)
        count_waiting(device, request, -1);
    request->begun = true;
}

void claas_request_begin(struct claas_request *request)
{
    claas_device_t *device = request->client->device;

    if (request->begun)
        return;
    pthread_mutex_lock(&device->lock);
    stop_counting(device, request);
    pthread_mutex_unlock(&device->lock);
}

/* --- end --- */

static void free_sequence(struct claas_sequence *sequence)
{
    claas_adapter_unref(&sequence->adapter);
    free(sequence->stops);
    free(sequence->tokens);
    free(sequence->blocks);
}

static void free_training(struct claas_training *training)
{
    for (size_t i = 0; training->adapters != NULL && i < 2 * training->train.row_count; i++)
        claas_adapter_unref(&training->adapters[i]);
    free(training->adapters);
    free(training->rows);
    free(training->storage);
}

static void free_adapter_job(struct claas_adapter_job *job)
{
    claas_adapter_unref(&job->adapter);
    claas_adapter_image_done(&job->image);
    free(job->directory);
}

void claas_request_free(struct claas_request *request)
{
    if (request == NULL)
        return;
    switch (request->kind) {
    case CLAAS_REQUEST_GENERATE:
        free_sequence((struct claas_sequence *)request);
        break;
    case CLAAS_REQUEST_TRAIN:
        free_training((struct claas_training *)request);
        break;
    default:
        free_adapter_job((struct claas_adapter_job *)request);
    }
    claas_event_node_free(request->last);
    claas_client_unref(request->client);
    free(request);
}

void claas_request_finish(struct claas_request *request)
{
    claas_device_t *device = request->client->device;

    pthread_mutex_lock(&device->lock);
    stop_counting(device, request);
    if (request->live_prev != NULL)
        request->live_prev->live_next = request->live_next;
    else
        device->live = request->live_next;
    if (request->live_next != NULL)
        request->live_next->live_prev = request->live_prev;
    pthread_mutex_unlock(&device->lock);
    claas_client_push(request->client, CLAAS_TAKE(request->last));
    claas_request_free(request);
}

void claas_request_fail(struct claas_request *request, int code)
{
    request->last->kind = CLAAS_EVENT_FAILED;
    request->last->error = code;
    snprintf(request->last->text, CLAAS_ERROR_TEXT_BYTES, "%s", claas_error_text());
    claas_request_finish(request);
}

void claas_request_cancel(struct claas_request *request)
{
    if (request->kind != CLAAS_REQUEST_GENERATE) {
        claas_request_fail(request, claas_fail(CLAAS_ERR_CANCELLED, NULL));
        return;
    }
    request->last->kind = CLAAS_EVENT_FINISHED;
    request->last->finish = CLAAS_FINISH_CANCELLED;
    claas_request_finish(request);
}
