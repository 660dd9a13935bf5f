/* The sampler actor: its handlers, and the pump that hands device events to the chats they belong
 * to. */
#include "sampler.h"

#include <stdlib.h>
#include <string.h>

#include "chat.h"
#include "claas/chat_template.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#define EVENTS_MAX 64 /* of the device, handled in one go */

static int handle_chat(void *self, claas_message_t *message)
{
    struct sampler *sampler = self;

    if (sampler->draining)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "the server is shutting down");
    return chat_start(sampler, message);
}

#define ADAPTERS_SHOWN 64

/* Everything this process's device holds, the trainer's too. */
static void set_adapters(const struct sampler *sampler, cJSON *device)
{
    static const char *const uses[] = {[CLAAS_ADAPTER_SERVE] = "serve",
                                       [CLAAS_ADAPTER_TRAIN] = "train",
                                       [CLAAS_ADAPTER_KEEP] = "keep"};
    struct claas_adapter_info adapters[ADAPTERS_SHOWN];
    size_t count = claas_device_adapters(sampler->device, adapters, ADAPTERS_SHOWN);
    cJSON *list = claas_json_set(device, "adapters", cJSON_CreateArray());

    claas_json_set_int(device, "adapter_count", (int64_t)count);
    for (size_t i = 0; i < count && i < ADAPTERS_SHOWN; i++) {
        cJSON *one = cJSON_CreateObject();

        claas_json_set_string(one, "name", adapters[i].name);
        claas_json_set_string(one, "use", uses[adapters[i].use]);
        claas_json_set_int(one, "bytes", (int64_t)adapters[i].bytes);
        claas_json_set_bool(one, "in_host", adapters[i].in_host);
        cJSON_AddItemToArray(list, one);
    }
}

static void set_memory(const struct claas_device_stats *stats, cJSON *device)
{
    cJSON *memory = claas_json_set(device, "memory", cJSON_CreateObject());

    for (int i = 0; i < stats->use_count; i++)
        claas_json_set_int(memory, stats->uses[i].what, (int64_t)stats->uses[i].bytes);
}

static cJSON *device_object(const struct sampler *sampler)
{
    struct claas_device_stats stats;
    cJSON *device = cJSON_CreateObject();

    claas_device_stats(sampler->device, &stats);
    claas_json_set_string(device, "name", stats.name);
    claas_json_set_int(device, "bytes_weights", (int64_t)stats.bytes_weights);
    claas_json_set_int(device, "bytes_kv", (int64_t)stats.bytes_kv);
    claas_json_set_int(device, "bytes_adapters", (int64_t)stats.bytes_adapters);
    claas_json_set_int(device, "bytes_workspace", (int64_t)stats.bytes_workspace);
    claas_json_set_int(device, "bytes_peak", (int64_t)stats.bytes_peak);
    set_memory(&stats, device);
    claas_json_set_int(device, "kv_blocks", stats.kv_blocks);
    claas_json_set_int(device, "kv_blocks_free", stats.kv_blocks_free);
    claas_json_set_int(device, "running", stats.running);
    claas_json_set_int(device, "waiting", stats.waiting);
    claas_json_set_int(device, "tokens_prefilled", (int64_t)stats.tokens_prefilled);
    claas_json_set_int(device, "tokens_decoded", (int64_t)stats.tokens_decoded);
    claas_json_set_int(device, "tokens_trained", (int64_t)stats.tokens_trained);
    claas_json_set_int(device, "prefix_tokens_shared", (int64_t)stats.prefix_tokens_shared);
    claas_json_set_int(device, "host_cache_bytes", (int64_t)stats.host_cache_bytes);
    claas_json_set_int(device, "host_cache_adapters", (int64_t)stats.host_cache_images);
    claas_json_set_int(device, "host_cache_found", (int64_t)stats.host_cache_found);
    claas_json_set_int(device, "host_cache_missed", (int64_t)stats.host_cache_missed);
    claas_json_set_int(device, "teacher_bytes", (int64_t)stats.teacher_bytes);
    claas_json_set_int(device, "teacher_found", (int64_t)stats.teacher_found);
    claas_json_set_int(device, "teacher_missed", (int64_t)stats.teacher_missed);
    set_adapters(sampler, device);
    return device;
}

static int handle_model_info(void *self, claas_message_t *message)
{
    struct sampler *sampler = self;
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "name", claas_model_name(sampler->model));
    claas_json_set_string(body, "fingerprint", claas_model_fingerprint(sampler->model));
    claas_json_set_int(body, "context", claas_device_context(sampler->device));
    claas_json_set_string(body, "chat_template",
                          claas_chat_template_name(claas_model_chat_template(sampler->model)));
    claas_json_set(body, "device", device_object(sampler));
    claas_json_set_int(body, "created", sampler->started_unix_s);
    return claas_actor_reply(sampler->actor, &message->reply_to, body);
}

/* The chat and choice a device request belongs to; false if it was abandoned. */
static bool find_choice(struct sampler *sampler, uint64_t request, struct chat **ret_chat,
                        struct choice **ret_choice)
{
    for (struct chat *chat = sampler->chats; chat; chat = chat->next) {
        for (int i = 0; i < chat->params.n; i++) {
            if (chat->choices[i].request == request) {
                *ret_chat = chat;
                *ret_choice = &chat->choices[i];
                return true;
            }
        }
    }
    return false;
}

static void observe_device(struct sampler *sampler)
{
    struct claas_device_stats stats;

    claas_device_stats(sampler->device, &stats);
    claas_metric_set(CLAAS_METRIC_DEVICE_KV_FREE, stats.kv_blocks_free);
    claas_metric_set(CLAAS_METRIC_DEVICE_RUNNING, stats.running);
    claas_metric_set(CLAAS_METRIC_DEVICE_WAITING, stats.waiting);
}

/* The trainer needs the device's memory: adapters come back from disk in a moment. */
static void give_memory(struct sampler *sampler)
{
    int count = adapter_cache_drop_idle(sampler->adapters);

    if (count > 0)
        claas_info("%d idle adapters make room for training", count);
    claas_device_client_gave(sampler->client);
}

/* Some events at a time: a device with many chats has the next ones by then, and who asks for
 * another chat would wait for all of them. */
static void device_readable(void *self, int fd)
{
    struct sampler *sampler = self;
    struct claas_device_event event;
    struct chat *chat;
    struct choice *choice;

    (void)fd;
    for (int i = 0; i < EVENTS_MAX && claas_device_client_next(sampler->client, &event) == 1; i++) {
        if (event.kind == CLAAS_EVENT_FAILED && event.error == CLAAS_ERR_DEVICE_LOST)
            claas_actor_fail(sampler->actor, event.error, event.text);
        if (event.kind == CLAAS_EVENT_MEMORY)
            give_memory(sampler);
        else if (!adapter_cache_event(sampler->adapters, &event) &&
                 find_choice(sampler, event.id, &chat, &choice))
            chat_event(chat, choice, &event);
        claas_device_event_done(&event);
    }
    observe_device(sampler);
}

static void cancelled(void *self, const struct claas_reply_to *to)
{
    struct sampler *sampler = self;

    for (struct chat *chat = sampler->chats; chat; chat = chat->next) {
        if (chat->reply_to.correlation == to->correlation &&
            strcmp(chat->reply_to.to, to->to) == 0) {
            chat_free(chat);
            return;
        }
    }
}

static void stop(void **self)
{
    struct sampler *sampler = *self;

    if (!sampler)
        return;
    while (sampler->chats)
        chat_free(sampler->chats);
    adapter_cache_free(&sampler->adapters);
    if (sampler->client)
        claas_actor_unwatch(sampler->actor, claas_device_client_fd(sampler->client));
    claas_device_client_free(&sampler->client);
    free(sampler);
    *self = NULL;
}

static int start(claas_actor_t *actor, const void *args, void **ret_self)
{
    const struct claas_sampler_args *given = args;
    CLAAS_AUTO(stop) void *self = CLAAS_NEW(struct sampler);
    struct sampler *sampler = self;
    int rc;

    if (!sampler)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    sampler->actor = actor;
    sampler->config = given->config;
    sampler->device = given->device;
    sampler->model = claas_device_model(given->device);
    sampler->started_unix_s = claas_clock_unix_ms() / 1000;
    rc = claas_device_client_new(given->device, &sampler->client);
    if (rc == 0)
        rc = adapter_cache_new(sampler->client,
                               (size_t)claas_config_int(given->config, "device.adapters"),
                               &sampler->adapters);
    if (rc == 0)
        rc = claas_actor_watch(actor, claas_device_client_fd(sampler->client), device_readable);
    if (rc < 0)
        return rc;
    claas_device_client_keeps_idle(sampler->client);
    claas_actor_on_cancel(actor, cancelled);
    *ret_self = CLAAS_TAKE(self);
    return 0;
}

static bool drain(void *self)
{
    struct sampler *sampler = self;

    sampler->draining = true;
    return sampler->chats == NULL;
}

static const struct claas_handler handlers[] = {
    {CLAAS_MSG_CHAT, handle_chat},
    {CLAAS_MSG_MODEL_INFO, handle_model_info},
};

const struct claas_actor_class claas_sampler_class = {
    .name = "sampler",
    .handlers = handlers,
    .handler_count = CLAAS_COUNT(handlers),
    .start = start,
    .drain = drain,
    .stop = stop,
};
