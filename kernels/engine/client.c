/* The client's side of the device: requests checked and copied in, events handed out. An eventfd is
 * readable exactly while events wait, so an actor's loop can poll it beside its sockets. */
#include "engine/engine.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "claas/clock.h"

int claas_device_client_new(claas_device_t *device, claas_device_client_t **ret)
{
    claas_device_client_t *client = CLAAS_NEW(claas_device_client_t);

    if (client == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    client->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (client->fd < 0) {
        free(client);
        return claas_fail_errno("eventfd");
    }
    client->device = device;
    pthread_mutex_init(&client->lock, NULL);
    atomic_init(&client->references, 1);
    *ret = client;
    return 0;
}

void claas_client_unref(claas_device_client_t *client)
{
    if (atomic_fetch_sub(&client->references, 1) != 1)
        return;
    pthread_mutex_destroy(&client->lock);
    free(client);
}

int claas_device_client_fd(const claas_device_client_t *client)
{
    return client->fd;
}

/* Marks the client's live requests, or the one with the id, for the compute thread to end. */
static void mark_cancelled(claas_device_client_t *client, const uint64_t *id)
{
    claas_device_t *device = client->device;

    pthread_mutex_lock(&device->lock);
    for (struct claas_request *r = device->live; r != NULL; r = r->live_next)
        if (r->client == client && (id == NULL || r->id == *id)) {
            atomic_store(&r->cancelled, true);
            device->cancel_seen = true;
        }
    if (device->cancel_seen)
        claas_device_poke(device);
    pthread_mutex_unlock(&device->lock);
}

void claas_device_cancel(claas_device_client_t *client, uint64_t id)
{
    mark_cancelled(client, &id);
}

void claas_device_client_free(claas_device_client_t **ref)
{
    claas_device_client_t *client = CLAAS_TAKE(*ref);
    struct claas_event_node *node;

    if (client == NULL)
        return;
    pthread_mutex_lock(&client->lock);
    client->closed = true;
    node = CLAAS_TAKE(client->first);
    close(client->fd);
    pthread_mutex_unlock(&client->lock);
    while (node != NULL) {
        struct claas_event_node *next = node->next;

        claas_event_node_free(node);
        node = next;
    }
    mark_cancelled(client, NULL);
    claas_memory_forget(client);
    claas_client_unref(client);
}

/* --- events --- */

void claas_event_node_free(struct claas_event_node *node)
{
    if (node == NULL)
        return;
    claas_adapter_unref(&node->adapter);
    free(node->trained.rows);
    free(node->text);
    free(node);
}

void claas_client_push(claas_device_client_t *client, struct claas_event_node *node)
{
    node->next = NULL;
    pthread_mutex_lock(&client->lock);
    if (!client->closed) {
        if (client->first == NULL) {
            client->first = node;
            eventfd_write(client->fd, 1);
        } else {
            client->last->next = node;
        }
        client->last = node;
        node = NULL;
    }
    pthread_mutex_unlock(&client->lock);
    claas_event_node_free(node);
}

static void fill_event(struct claas_event_node *node, struct claas_device_event *ret)
{
    memset(ret, 0, sizeof(*ret));
    ret->kind = node->kind;
    ret->id = node->id;
    ret->token = node->token;
    ret->logprob = node->logprob;
    ret->made = node->made;
    ret->top_count = node->top_count;
    for (int i = 0; i < node->top_count; i++) {
        ret->top_tokens[i] = node->top[i].token;
        ret->top_logprobs[i] = node->top[i].logprob;
    }
    ret->finish = node->finish;
    ret->prompt_tokens = node->prompt_tokens;
    ret->cached_tokens = node->cached_tokens;
    ret->generated_tokens = node->generated_tokens;
    ret->adapter = CLAAS_TAKE(node->adapter);
    ret->trained = node->trained;
    node->trained.rows = NULL;
    ret->error = node->error;
    if (node->text != NULL)
        claas_copy_text(ret->text, sizeof(ret->text), node->text);
}

int claas_device_client_next(claas_device_client_t *client, struct claas_device_event *ret)
{
    struct claas_event_node *node;

    pthread_mutex_lock(&client->lock);
    node = client->first;
    if (node != NULL) {
        client->first = node->next;
        if (client->first == NULL) {
            eventfd_t count;

            eventfd_read(client->fd, &count);
        }
    }
    pthread_mutex_unlock(&client->lock);
    if (node == NULL)
        return 0;
    fill_event(node, ret);
    claas_event_node_free(node);
    return 1;
}

int claas_device_client_wait(claas_device_client_t *client, int timeout_ms,
                             struct claas_device_event *ret)
{
    int64_t end = claas_clock_ms() + timeout_ms;

    for (;;) {
        struct pollfd item = {.fd = client->fd, .events = POLLIN};
        int64_t left = timeout_ms < 0 ? -1 : end - claas_clock_ms();

        if (claas_device_client_next(client, ret) == 1)
            return 1;
        if (timeout_ms >= 0 && left <= 0)
            return 0;
        if (poll(&item, 1, (int)left) < 0 && errno != EINTR)
            return claas_fail_errno("poll");
    }
}

void claas_device_event_done(struct claas_device_event *event)
{
    claas_adapter_unref(&event->adapter);
    free(event->trained.rows);
    event->trained.rows = NULL;
}

/* --- generation --- */

static int check_tokens(const claas_device_t *device, const char *what, const int32_t *tokens,
                        size_t count)
{
    if (count == 0 || tokens == NULL)
        return claas_fail(CLAAS_ERR_INVALID, "%s is empty", what);
    for (size_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= device->config.vocab)
            return claas_fail(CLAAS_ERR_INVALID, "%s: token %d is not in the vocabulary of %d",
                              what, tokens[i], device->config.vocab);
    return 0;
}

static int check_generate(const claas_device_t *device, const struct claas_generate_request *r)
{
    int rc = check_tokens(device, "the prompt", r->prompt, r->prompt_count);

    if (rc < 0)
        return rc;
    if (r->prompt_count >= (size_t)device->config.context)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "the prompt has %zu tokens, the model's context is %d tokens",
                          r->prompt_count, device->config.context);
    if (r->prompt_count >= (size_t)claas_device_context(device)) /* no wait makes room for it */
        return claas_fail(CLAAS_ERR_LIMIT,
                          "the prompt has %zu tokens, the key/value cache (device.kv_tokens) holds "
                          "%d",
                          r->prompt_count, claas_device_context(device));
    if (r->max_tokens < 1)
        return claas_fail(CLAAS_ERR_INVALID, "max_tokens %d", r->max_tokens);
    if (!(r->temperature >= 0) || isinf(r->temperature))
        return claas_fail(CLAAS_ERR_INVALID, "temperature %g", (double)r->temperature);
    if (!(r->top_p > 0 && r->top_p <= 1))
        return claas_fail(CLAAS_ERR_INVALID, "top_p %g", (double)r->top_p);
    if (r->top_k < 0)
        return claas_fail(CLAAS_ERR_INVALID, "top_k %d", r->top_k);
    if (r->top_logprobs < 0 || r->top_logprobs > CLAAS_TOP_LOGPROBS_MAX)
        return claas_fail(CLAAS_ERR_INVALID, "top_logprobs %d", r->top_logprobs);
    if (r->priority != CLAAS_PRIORITY_CHAT && r->priority != CLAAS_PRIORITY_ROLLOUT)
        return claas_fail(CLAAS_ERR_INVALID, "priority %d", (int)r->priority);
    if (r->stop_count > 0 && r->stop_tokens == NULL)
        return claas_fail(CLAAS_ERR_INVALID, "stop_tokens is missing");
    if (r->adapter != NULL && r->adapter->device != device)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter is another device's");
    if (r->adapter != NULL && r->adapter->use == CLAAS_ADAPTER_KEEP)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter is kept for saving only");
    return 0;
}

static int copy_tokens(const int32_t *tokens, size_t count, int32_t **ret)
{
    *ret = CLAAS_NEW_ARRAY(int32_t, count + 1);
    if (*ret == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (count > 0)
        memcpy(*ret, tokens, count * sizeof(*tokens));
    return 0;
}

int claas_device_generate(claas_device_client_t *client, const struct claas_generate_request *r,
                          uint64_t *ret_id)
{
    claas_device_t *device = client->device;
    struct claas_sequence *seq;
    int rc = check_generate(device, r);

    if (rc < 0)
        return rc;
    seq = (struct claas_sequence *)claas_request_new(client, CLAAS_REQUEST_GENERATE, sizeof(*seq));
    if (seq == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (r->adapter != NULL)
        seq->adapter = claas_adapter_ref(r->adapter);
    seq->priority = r->priority;
    seq->sample = (struct claas_sample){
        .temperature = r->temperature,
        .top_p = r->top_p,
        .top_k = r->top_k,
        .seed = r->seed,
        .top_logprobs = r->top_logprobs,
        .given = -1,
    };
    seq->prompt_count = seq->count = (int)r->prompt_count;
    seq->capacity = seq->count + 1;
    seq->stop_count = r->stop_count;
    /* A pool smaller than the context shortens answers, for every request alike: the result never
     * depends on load. */
    seq->limit = claas_device_context(device);
    if (r->max_tokens < seq->limit - seq->count)
        seq->limit = seq->count + r->max_tokens;
    rc = copy_tokens(r->prompt, r->prompt_count, &seq->tokens);
    if (rc == 0)
        rc = copy_tokens(r->stop_tokens, r->stop_count, &seq->stops);
    if (rc == 0)
        rc = claas_request_submit(&seq->request, ret_id);
    if (rc < 0)
        claas_request_free(&seq->request);
    return rc;
}

/* --- adapters --- */

static int submit_job(struct claas_adapter_job *job, const char *directory,
                      claas_adapter_t *adapter, uint64_t *ret_id)
{
    int rc = 0;

    if (adapter != NULL)
        job->adapter = claas_adapter_ref(adapter);
    if (directory != NULL) {
        job->directory = claas_strdup(directory);
        if (job->directory == NULL)
            rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    if (rc == 0)
        rc = claas_request_submit(&job->request, ret_id);
    if (rc < 0)
        claas_request_free(&job->request);
    return rc;
}

static int new_job(claas_device_client_t *client, enum claas_request_kind kind,
                   struct claas_adapter_job **ret)
{
    *ret = (struct claas_adapter_job *)claas_request_new(client, kind, sizeof(**ret));
    return *ret == NULL ? claas_fail(CLAAS_ERR_NO_MEMORY, NULL) : 0;
}

int claas_device_adapter_load(claas_device_client_t *client, const char *directory,
                              enum claas_adapter_use use, uint64_t *ret_id)
{
    struct claas_adapter_job *job;
    int rc;

    if (directory == NULL)
        return claas_fail(CLAAS_ERR_INVALID, "adapter load: no directory");
    rc = new_job(client, CLAAS_REQUEST_LOAD, &job);
    if (rc < 0)
        return rc;
    job->use = use;
    return submit_job(job, directory, NULL, ret_id);
}

int claas_device_adapter_init(claas_device_client_t *client, const struct claas_lora_config *lora,
                              uint64_t seed, enum claas_adapter_use use, uint64_t *ret_id)
{
    struct claas_adapter_job *job;
    int rc;

    if (lora->rank < 1 || lora->rank > CLAAS_RANK_MAX || !(lora->alpha > 0) || isinf(lora->alpha) ||
        lora->modules == 0 || (lora->modules & ~CLAAS_MODULE_ALL) != 0)
        return claas_fail(CLAAS_ERR_INVALID, "LoRA of rank %d (1 … %d), alpha %g, modules %#x",
                          lora->rank, CLAAS_RANK_MAX, (double)lora->alpha, lora->modules);
    rc = new_job(client, CLAAS_REQUEST_INIT, &job);
    if (rc < 0)
        return rc;
    job->use = use;
    job->lora = *lora;
    job->seed = seed;
    return submit_job(job, NULL, NULL, ret_id);
}

static int check_source(const claas_device_client_t *client, const claas_adapter_t *adapter)
{
    if (adapter == NULL || adapter->device != client->device)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter is another device's");
    if (adapter->use == CLAAS_ADAPTER_SERVE)
        return claas_fail(CLAAS_ERR_INVALID, "the adapter is loaded for serving only");
    return 0;
}

static int copy_adapter(claas_device_client_t *client, claas_adapter_t *adapter, bool if_room,
                        uint64_t *ret_id)
{
    struct claas_adapter_job *job = NULL;
    int rc = check_source(client, adapter);

    if (rc == 0 && adapter->use != CLAAS_ADAPTER_TRAIN)
        rc = claas_fail(CLAAS_ERR_INVALID, "the adapter is kept already");
    if (rc == 0)
        rc = new_job(client, CLAAS_REQUEST_COPY, &job);
    if (rc < 0)
        return rc;
    job->if_room = if_room;
    return submit_job(job, NULL, adapter, ret_id);
}

int claas_device_adapter_copy(claas_device_client_t *client, claas_adapter_t *adapter,
                              uint64_t *ret_id)
{
    return copy_adapter(client, adapter, false, ret_id);
}

int claas_device_adapter_copy_if_room(claas_device_client_t *client, claas_adapter_t *adapter,
                                      uint64_t *ret_id)
{
    return copy_adapter(client, adapter, true, ret_id);
}

int claas_device_adapter_save(claas_device_client_t *client, claas_adapter_t *adapter,
                              const char *directory, uint64_t *ret_id)
{
    struct claas_adapter_job *job = NULL;
    int rc = check_source(client, adapter);

    if (rc == 0 && directory == NULL)
        rc = claas_fail(CLAAS_ERR_INVALID, "adapter save: no directory");
    if (rc == 0)
        rc = new_job(client, CLAAS_REQUEST_SAVE, &job);
    return rc < 0 ? rc : submit_job(job, directory, adapter, ret_id);
}
