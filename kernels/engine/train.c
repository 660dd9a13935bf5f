/* The training lane: optimizer steps and evaluations, and the copies and snapshots of adapters that
 * must see the weights between them. One request at a time, in order of age; the requests of one
 * client keep their order.
 *
 * Chat goes on inside a step. The back-end calls back between its operations; once a slice of
 * training is used up, the callback gives generation its turn: one pass, or, while a chat is under
 * way, passes for up to a slice of time. So a step takes at most about twice as long with chat as
 * without, and a chat never waits for longer than a slice. */
#include "engine/engine.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/log.h"

#define LONG_NS INT64_C(50000000) /* between two turns of a chat: worth a line in the log */

/* --- making a request --- */

static int check_tokens(const claas_device_t *device, size_t row, const char *what,
                        const int32_t *tokens, size_t count)
{
    if (count == 0 || tokens == NULL)
        return claas_fail(CLAAS_ERR_INVALID, "row %zu: the %s is empty", row, what);
    for (size_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= device->config.vocab)
            return claas_fail(CLAAS_ERR_INVALID,
                              "row %zu: token %d of the %s is not in the vocabulary of %d", row,
                              tokens[i], what, device->config.vocab);
    return 0;
}

static bool is_kept(const claas_adapter_t *adapter)
{
    return adapter != NULL && adapter->use == CLAAS_ADAPTER_KEEP;
}

static int check_row(const claas_device_t *device, size_t i, const struct claas_train_row *row,
                     bool update)
{
    size_t context = (size_t)device->config.context;
    size_t longest =
        row->student_count > row->teacher_count ? row->student_count : row->teacher_count;
    int rc = check_tokens(device, i, "student's prompt", row->student_prompt, row->student_count);

    if (rc == 0 && (update || row->teacher_count > 0))
        rc = check_tokens(device, i, "teacher's prompt", row->teacher_prompt, row->teacher_count);
    if (rc == 0)
        rc = check_tokens(device, i, "response", row->response, row->response_count);
    if (rc < 0)
        return rc;
    if (longest > context || row->response_count > context - longest)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "row %zu has %zu + %zu tokens, the model's context is %zu", i, longest,
                          row->response_count, context);
    if (update && (row->student == NULL || row->student->use != CLAAS_ADAPTER_TRAIN))
        return claas_fail(CLAAS_ERR_INVALID, "row %zu: there is no adapter to train", i);
    if (is_kept(row->student) || is_kept(row->teacher))
        return claas_fail(CLAAS_ERR_INVALID, "row %zu: the adapter is kept for saving only", i);
    if ((row->student != NULL && row->student->device != device) ||
        (row->teacher != NULL && row->teacher->device != device))
        return claas_fail(CLAAS_ERR_INVALID, "row %zu: the adapter is another device's", i);
    return 0;
}

static int check_request(const claas_device_t *device, const struct claas_train_request *r)
{
    const struct claas_adamw_config *w = &r->adamw;

    if (r->row_count == 0 || r->rows == NULL)
        return claas_fail(CLAAS_ERR_INVALID, "a training request without rows");
    if (r->update && !(w->rate >= 0 && w->beta1 >= 0 && w->beta1 < 1 && w->beta2 >= 0 &&
                       w->beta2 < 1 && w->eps > 0 && w->weight_decay >= 0 &&
                       w->max_grad_norm >= 0 && isfinite(w->rate) && isfinite(w->weight_decay)))
        return claas_fail(CLAAS_ERR_INVALID,
                          "AdamW: rate %g, betas %g and %g, eps %g, decay %g, clip %g",
                          (double)w->rate, (double)w->beta1, (double)w->beta2, (double)w->eps,
                          (double)w->weight_decay, (double)w->max_grad_norm);
    for (size_t i = 0; i < r->row_count; i++) {
        int rc = check_row(device, i, &r->rows[i], r->update);

        if (rc < 0)
            return rc;
    }
    return 0;
}

static void *copy_bytes(uint8_t **cursor, const void *bytes, size_t length)
{
    uint8_t *target = *cursor;

    if (bytes == NULL)
        return NULL;
    memcpy(target, bytes, length);
    *cursor += (length + 3) & ~(size_t)3;
    return target;
}

/* All arrays of a row have elements of 4 bytes but the mask, whose length is rounded up. */
static size_t count_storage(const struct claas_train_request *request)
{
    size_t bytes = 4;

    for (size_t i = 0; i < request->row_count; i++) {
        const struct claas_train_row *row = &request->rows[i];

        bytes += 4 * (row->student_count + row->teacher_count + 3 * row->response_count + 1);
    }
    return bytes;
}

static int copy_rows(struct claas_training *training, const struct claas_train_request *request)
{
    uint8_t *cursor;

    training->storage = claas_alloc(count_storage(request), 1);
    training->rows = CLAAS_NEW_ARRAY(struct claas_backend_row, request->row_count);
    training->adapters = CLAAS_NEW_ARRAY(claas_adapter_t *, 2 * request->row_count);
    if (training->storage == NULL || training->rows == NULL || training->adapters == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    training->train.rows = training->rows;
    training->train.row_count = request->row_count;
    cursor = training->storage;
    for (size_t i = 0; i < request->row_count; i++) {
        struct claas_train_row *row = &training->rows[i].row;

        *row = request->rows[i];
        row->student_prompt = copy_bytes(&cursor, row->student_prompt, 4 * row->student_count);
        row->teacher_prompt = copy_bytes(&cursor, row->teacher_prompt, 4 * row->teacher_count);
        row->response = copy_bytes(&cursor, row->response, 4 * row->response_count);
        row->rollout_logprobs = copy_bytes(&cursor, row->rollout_logprobs, 4 * row->response_count);
        row->mask = copy_bytes(&cursor, row->mask, row->response_count);
        if (row->teacher_count == 0)
            row->teacher_prompt = NULL;
        if (row->student != NULL) {
            training->adapters[2 * i] = claas_adapter_ref(row->student);
            training->rows[i].student = row->student->backend;
        }
        if (row->teacher != NULL) {
            training->adapters[2 * i + 1] = claas_adapter_ref(row->teacher);
            training->rows[i].teacher = row->teacher->backend;
        }
    }
    return 0;
}

int claas_device_train(claas_device_client_t *client, const struct claas_train_request *request,
                       uint64_t *ret_id)
{
    struct claas_training *training;
    int rc = check_request(client->device, request);

    if (rc < 0)
        return rc;
    training =
        (struct claas_training *)claas_request_new(client, CLAAS_REQUEST_TRAIN, sizeof(*training));
    if (training == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    training->train.loss = request->loss;
    training->train.adamw = request->adamw;
    training->train.update = request->update;
    rc = copy_rows(training, request);
    if (rc == 0)
        rc = claas_request_submit(&training->request, ret_id);
    if (rc < 0)
        claas_request_free(&training->request);
    return rc;
}

/* --- order --- */

/* Whether the request is an optimizer step of the adapter. */
static bool updates(const struct claas_request *request, const claas_adapter_t *adapter)
{
    const struct claas_training *training = (const struct claas_training *)request;

    if (request->kind != CLAAS_REQUEST_TRAIN || !training->train.update || adapter == NULL)
        return false;
    for (size_t i = 0; i < training->train.row_count; i++)
        if (training->adapters[2 * i] == adapter)
            return true;
    return false;
}

static bool step_precedes(const struct claas_request *step, const struct claas_sequence *seq)
{
    return step->client == seq->request.client && step->id < seq->request.id &&
           updates(step, seq->adapter);
}

bool claas_train_precedes(const claas_device_t *device, const struct claas_sequence *seq)
{
    if (seq->adapter == NULL)
        return false;
    if (device->current != NULL && step_precedes(&device->current->request, seq))
        return true;
    for (struct claas_request *r = device->lane.first; r != NULL; r = r->next)
        if (step_precedes(r, seq))
            return true;
    return false;
}

/* A client's rollouts come before its training of the same adapter, if they were asked for first.
 */
static bool rollouts_precede(const struct claas_queue *queue, const struct claas_request *step)
{
    for (struct claas_request *r = queue->first; r != NULL; r = r->next) {
        const struct claas_sequence *seq = (const struct claas_sequence *)r;

        if (seq->priority == CLAAS_PRIORITY_ROLLOUT && r->client == step->client &&
            r->id < step->id && updates(step, seq->adapter))
            return true;
    }
    return false;
}

/* Whether the request is a second try and idle adapters are still being let go of. That does not
 * last long: a client that never answers delays the second try and no more. */
static bool waits_for_memory(const struct claas_request *request, bool is_asked)
{
    return is_asked && request->kind == CLAAS_REQUEST_TRAIN &&
           ((const struct claas_training *)request)->again;
}

/* The oldest request that may run: it is the first of its client and has no rollouts to wait
 * for. */
static struct claas_request *pick(claas_device_t *device)
{
    bool is_asked = claas_memory_is_asked(device);

    device->lane_scan++;
    for (struct claas_request *r = device->lane.first; r != NULL; r = r->next) {
        if (r->client->lane_scan == device->lane_scan)
            continue;
        r->client->lane_scan = device->lane_scan;
        if (!waits_for_memory(r, is_asked) && !rollouts_precede(&device->running, r) &&
            !rollouts_precede(&device->waiting, r))
            return r;
    }
    return NULL;
}

/* --- running --- */

static bool must_stop(claas_device_t *device)
{
    bool stop;

    pthread_mutex_lock(&device->lock);
    stop = device->stop;
    pthread_mutex_unlock(&device->lock);
    return stop || atomic_load(&device->current->request.cancelled);
}

/* Generation runs if a slice has passed. The time until the next call is taken to be the time since
 * the last one, so that a slice ends before it would be overrun. */
static void give_turn(claas_device_t *device)
{
    int64_t slice = (int64_t)device->options.slice_ms * 1000000;
    int64_t now = device->now(), start = now;
    int64_t ahead = now - device->last_yield;

    device->last_yield = now;
    if (ahead >= LONG_NS && claas_generate_has_chat(device))
        claas_debug("a chat waited %lld ms for its turn", (long long)(ahead / 1000000));
    if (now - device->slice_start + ahead <= slice)
        return;
    while (claas_generate_iterate(device)) {
        now = device->now();
        claas_device_take_inbox(device);
        if (!claas_generate_has_chat(device) || now - start >= slice)
            break;
    }
    device->slice_start = device->last_yield = device->now();
}

/* The back-end's callback in a step. */
static int yield_to_generation(void *arg)
{
    claas_device_t *device = arg;

    claas_device_take_inbox(device);
    if (must_stop(device))
        return 1;
    give_turn(device);
    return 0;
}

/* The back-end's callback while an adapter is read back, which takes long: most of it is the host's
 * new pages. */
static void turn_to_generation(void *arg)
{
    claas_device_t *device = arg;

    claas_device_take_inbox(device);
    give_turn(device);
}

static int download(claas_device_t *device, const claas_adapter_t *adapter,
                    struct claas_adapter_image *ret)
{
    int64_t start = claas_clock_ns();
    int rc;

    ret->memory = claas_host_cache_memory(device->host_cache);
    device->slice_start = device->last_yield = device->now();
    rc = device->ops->adapter_download(device->backend, adapter->backend, turn_to_generation,
                                       device, ret);
    claas_io_account(device, &device->stats.download_ns, start);
    return rc;
}

/* The back-end's callback of a step that finds no room. */
static void make_room(void *arg)
{
    claas_device_t *device = arg;

    claas_adapters_drop_hot(device);
    claas_adapters_sweep(device);
}

static void mark_training(struct claas_training *training, bool on)
{
    for (size_t i = 0; training->train.update && i < training->train.row_count; i++)
        training->adapters[2 * i]->training = on;
}

/* Each adapter once, however many rows it has. */
static void mark_changed(struct claas_training *training)
{
    for (size_t i = 0; training->train.update && i < training->train.row_count; i++) {
        claas_adapter_t *adapter = training->adapters[2 * i];
        size_t first = 0;

        while (training->adapters[2 * first] != adapter)
            first++;
        if (first == i)
            claas_adapter_changed(adapter);
    }
}

/* A step that found no memory has changed nothing: it goes to the front of the lane. */
static bool try_again(claas_device_t *device, struct claas_training *training, int rc)
{
    if (rc != CLAAS_ERR_NO_MEMORY || training->again || !claas_memory_ask(device))
        return false;
    training->again = true;
    claas_queue_insert_after(&device->lane, NULL, &training->request);
    return true;
}

static void count_training(claas_device_t *device, const struct claas_train_result *trained)
{
    struct claas_teacher_cache_stats teachers;

    claas_teacher_cache_stats(device->teachers, &teachers);
    pthread_mutex_lock(&device->lock);
    device->stats.tokens_trained += (uint64_t)trained->tokens;
    device->stats.teacher_bytes = teachers.bytes;
    device->stats.teacher_found = teachers.found;
    device->stats.teacher_missed = teachers.missed;
    pthread_mutex_unlock(&device->lock);
}

static void run_training(claas_device_t *device, struct claas_training *training)
{
    struct claas_event_node *last = training->request.last;
    int rc;

    if (training->again)
        claas_adapters_sweep(device); /* frees what was let go of for this step */

    training->train.yield = yield_to_generation;
    training->train.make_room = make_room;
    training->train.yield_arg = device;
    claas_teacher_cache_begin(device->teachers, &training->train);
    device->current = training;
    device->slice_start = device->last_yield = device->now();
    mark_training(training, true);
    rc = training->train.update ? claas_fault_step(&device->fault)
                                : claas_fault_pass(&device->fault);
    if (rc == 0)
        rc = device->ops->train(device->backend, &training->train, &last->trained);
    mark_training(training, false);
    device->current = NULL;
    claas_teacher_cache_end(device->teachers, &training->train, rc == 0 && last->trained.finite);
    /* After an error it is not known what changed; a cancelled step changed nothing. */
    if (rc < 0 ? rc != CLAAS_ERR_CANCELLED : last->trained.finite)
        mark_changed(training);
    if (rc < 0) {
        free(last->trained.rows);
        last->trained = (struct claas_train_result){0};
        if (try_again(device, training, rc))
            return;
        claas_request_fail(&training->request, rc);
        return;
    }
    count_training(device, &last->trained);
    last->kind = CLAAS_EVENT_TRAINED;
    claas_request_finish(&training->request);
}

/* On the device where it has room: that takes a millisecond, and the thread that saves reads the
 * copy back while the next work runs. Else it is read back now, into the host's memory; a copy that
 * may never be wanted (if_room) is worth neither that time nor what would have to go for it. */
static int make_copy(claas_device_t *device, const claas_adapter_t *source, bool if_room,
                     claas_adapter_t **ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    int rc = claas_adapter_new_clone(device, source, CLAAS_ADAPTER_KEEP, ret);

    if (if_room)
        return rc;
    if (rc == CLAAS_ERR_NO_MEMORY) {
        make_room(device);
        rc = claas_adapter_new_clone(device, source, CLAAS_ADAPTER_KEEP, ret);
    }
    if (rc != CLAAS_ERR_NO_MEMORY && rc != CLAAS_ERR_UNSUPPORTED)
        return rc;
    rc = download(device, source, &image);
    return rc < 0 ? rc : claas_adapter_new_kept(device, &image, ret);
}

static void run_copy(claas_device_t *device, struct claas_adapter_job *job)
{
    int rc = make_copy(device, job->adapter, job->if_room, &job->request.last->adapter);

    if (rc < 0) {
        claas_request_fail(&job->request, rc);
        return;
    }
    job->request.last->kind = CLAAS_EVENT_ADAPTER;
    claas_request_finish(&job->request);
}

/* Saves an adapter in training: the snapshot is taken here, between two steps; writing it is left
 * to the thread that saves. */
static void run_save(claas_device_t *device, struct claas_adapter_job *job)
{
    int rc = download(device, job->adapter, &job->image);

    if (rc < 0)
        claas_request_fail(&job->request, rc);
    else
        claas_request_to_io(&job->request);
}

bool claas_train_run(claas_device_t *device)
{
    struct claas_request *request = pick(device);

    if (request == NULL)
        return false;
    claas_queue_remove(&device->lane, request);
    claas_request_begin(request);
    if (request->kind == CLAAS_REQUEST_TRAIN)
        run_training(device, (struct claas_training *)request);
    else if (request->kind == CLAAS_REQUEST_COPY)
        run_copy(device, (struct claas_adapter_job *)request);
    else
        run_save(device, (struct claas_adapter_job *)request);
    return true;
}

static void cancel_lane(claas_device_t *device, bool all)
{
    struct claas_request *request = device->lane.first;

    while (request != NULL) {
        struct claas_request *next = request->next;

        if (all || atomic_load(&request->cancelled)) {
            claas_queue_remove(&device->lane, request);
            claas_request_cancel(request);
        }
        request = next;
    }
}

void claas_train_reap(claas_device_t *device)
{
    cancel_lane(device, false);
}

void claas_train_close(claas_device_t *device)
{
    cancel_lane(device, true);
}
