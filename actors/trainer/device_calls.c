/* Who waits for which device request: a short list, searched linearly (tens of entries). */
#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "trainer_internal.h"

int device_call_add(struct trainer *trainer, uint64_t id, device_call_fn *fn, void *arg)
{
    struct device_call *call = CLAAS_NEW(struct device_call);

    if (!call) {
        claas_device_cancel(trainer->client, id);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    *call = (struct device_call){trainer->calls, id, fn, arg};
    trainer->calls = call;
    return 0;
}

void device_calls_drop(struct trainer *trainer, void *arg)
{
    struct device_call **link = &trainer->calls;

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

static bool is_last(const struct claas_device_event *event)
{
    return event->kind != CLAAS_EVENT_TOKEN;
}

void device_calls_pump(struct trainer *trainer)
{
    struct claas_device_event event;

    while (claas_device_client_next(trainer->client, &event) == 1) {
        struct device_call **link = &trainer->calls;

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

    while (trainer->calls) {
        struct device_call call = *trainer->calls;

        free(trainer->calls);
        trainer->calls = call.next;
        event.id = call.id;
        call.fn(trainer, call.arg, &event);
    }
}
