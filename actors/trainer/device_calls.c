/* Which callback waits for which device request: hundreds when several cycles sample at the same
 * time, and each token is an event. Ids are counted up, so a list for each value of their last byte
 * is short. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "trainer_internal.h"

static struct device_call **list_of(struct trainer *trainer, uint64_t id)
{
    return &trainer->calls[id % DEVICE_CALL_LISTS];
}

int device_call_add(struct trainer *trainer, uint64_t id, device_call_fn *fn, void *arg)
{
    struct device_call *call = CLAAS_NEW(struct device_call);

    if (!call) {
        claas_device_cancel(trainer->client, id);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    *call = (struct device_call){*list_of(trainer, id), id, fn, arg};
    *list_of(trainer, id) = call;
    return 0;
}

static void drop_from(struct trainer *trainer, struct device_call **link, const void *arg)
{
    while (*link) {
        struct device_call *call = *link;

        if (call->arg == arg) {
            claas_device_cancel(trainer->client, call->id);
            *link = call->next;
            free(call);
        } else {
            link = &call->next;
        }
    }
}

void device_calls_drop(struct trainer *trainer, void *arg)
{
    for (size_t i = 0; i < DEVICE_CALL_LISTS; i++)
        drop_from(trainer, &trainer->calls[i], arg);
}

static bool is_last(const struct claas_device_event *event)
{
    return event->kind != CLAAS_EVENT_TOKEN;
}

/* Appends what holds the device's memory to the sentence that says which allocation failed, unless
 * it is there already: a job that fails for want of memory shows both. */
static void add_memory_map(const struct trainer *trainer, struct claas_device_event *event)
{
    size_t used = strnlen(event->text, sizeof(event->text));
    struct claas_device_stats s;

    if (strstr(event->text, CLAAS_MEMORY_HELD))
        return;
    claas_device_stats(trainer->device, &s);
    snprintf(event->text + used, sizeof(event->text) - used,
             " (MB: weights %" PRIu64 ", keys and values %" PRIu64 ", adapters %" PRIu64
             ", workspace %" PRIu64 ", at most %" PRIu64 ")",
             s.bytes_weights / 1000000, s.bytes_kv / 1000000, s.bytes_adapters / 1000000,
             s.bytes_workspace / 1000000, s.bytes_peak / 1000000);
}

static void look_at_failure(struct trainer *trainer, struct claas_device_event *event)
{
    if (event->error == CLAAS_ERR_NO_MEMORY) {
        add_memory_map(trainer, event);
        claas_warning("%s", event->text);
    }
    if (event->error != CLAAS_ERR_DEVICE_LOST)
        return;
    if (!trainer->lost[0])
        snprintf(trainer->lost, sizeof(trainer->lost), "%s",
                 event->text[0] ? event->text : "the device is lost");
    claas_actor_fail(trainer->actor, event->error, event->text);
}

void device_calls_pump(struct trainer *trainer)
{
    struct claas_device_event event;

    while (claas_device_client_next(trainer->client, &event) == 1) {
        struct device_call **link = list_of(trainer, event.id);

        if (event.kind == CLAAS_EVENT_FAILED)
            look_at_failure(trainer, &event);
        while (*link && (*link)->id != event.id)
            link = &(*link)->next;
        if (*link) {
            struct device_call call = **link;

            if (is_last(&event)) {
                struct device_call *dead = *link;

                *link = dead->next;
                free(dead);
            }
            call.fn(trainer, call.arg, &event);
        }
        claas_device_event_done(&event);
    }
}

void device_calls_end(struct trainer *trainer)
{
    struct claas_device_event event = {
        .kind = CLAAS_EVENT_FAILED, .error = CLAAS_ERR_UNAVAILABLE, .text = "the trainer stopped"};

    for (size_t i = 0; i < DEVICE_CALL_LISTS; i++) {
        while (trainer->calls[i]) {
            struct device_call call = *trainer->calls[i];

            free(trainer->calls[i]);
            trainer->calls[i] = call.next;
            event.id = call.id;
            call.fn(trainer, call.arg, &event);
        }
    }
}
