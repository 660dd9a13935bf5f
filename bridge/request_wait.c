/* What a request waits for: answers of actors and timers. Every callback from the actor's loop
 * passes here, so this is where failures become HTTP answers and the pump is called. */
#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "request.h"

struct request_ask_entry {
    struct request_ask_entry *next;
    struct request *request;
    request_reply_fn *reply;
    void *arg;
    uint64_t id;
    bool sees_errors;
};

static void unlink_entry(struct request_ask_entry *entry)
{
    struct request_ask_entry **link = &entry->request->asks;

    while (*link && *link != entry)
        link = &(*link)->next;
    if (*link)
        *link = entry->next;
}

static void replied(void *self, void *arg, claas_message_t *reply)
{
    struct request_ask_entry *entry = arg;
    struct request *request = entry->request;
    struct http_server *server = request->server;
    request_reply_fn *fn = entry->reply;
    void *fn_arg = entry->arg;
    bool sees_errors = entry->sees_errors;
    int rc;

    (void)self;
    if (reply->kind != CLAAS_KIND_PROGRESS) {
        unlink_entry(entry);
        free(entry);
    } /* else the callback may cancel it: entry is not touched again */
    if (reply->error && !sees_errors) {
        request_fail(request, reply->error, reply->error_text);
    } else {
        rc = fn(request, reply, fn_arg);
        if (rc < 0)
            request_fail(request, rc, claas_error_text());
    }
    http_server_pump(server);
}

int request_ask(struct request *request, const struct request_ask *ask)
{
    struct request_ask_entry *entry = CLAAS_NEW(struct request_ask_entry);
    int rc;

    if (!entry) {
        cJSON_Delete(ask->body);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    *entry = (struct request_ask_entry){
        .request = request, .reply = ask->reply, .arg = ask->arg, .sees_errors = ask->sees_errors};
    rc = claas_actor_ask(request->server->actor,
                         &(struct claas_ask){
                             .to = ask->to,
                             .type = ask->type,
                             .body = ask->body,
                             .timeout_ms = ask->timeout_ms,
                             .principal = request->principal,
                             .reply = replied,
                             .arg = entry,
                         },
                         &entry->id);
    if (rc < 0) {
        free(entry);
        return rc;
    }
    entry->next = request->asks;
    request->asks = entry;
    return 0;
}

void request_cancel_asks(struct request *request)
{
    while (request->asks) {
        struct request_ask_entry *entry = request->asks;

        request->asks = entry->next;
        claas_actor_cancel(request->server->actor, entry->id);
        free(entry);
    }
}

/* --- timers --- */

static void timer_fired(void *self, void *arg)
{
    struct request *request = *(struct request **)arg; /* the slot's first member */
    struct http_server *server = request->server;
    int rc = 0;

    (void)self;
    for (int i = 0; i < REQUEST_TIMERS; i++) {
        if (arg == (void *)&request->timers[i]) {
            request->timers[i].id = 0;
            rc = request->timers[i].fn(request);
            break;
        }
    }
    if (rc < 0)
        request_fail(request, rc, claas_error_text());
    http_server_pump(server);
}

int request_timer(struct request *request, enum request_timer which, int64_t delay_ms,
                  request_fn *fn)
{
    request_timer_stop(request, which);
    request->timers[which].request = request;
    request->timers[which].fn = fn;
    request->timers[which].id =
        claas_actor_timer(request->server->actor, delay_ms, timer_fired, &request->timers[which]);
    return request->timers[which].id < 0 ? request->timers[which].id : 0;
}

void request_timer_stop(struct request *request, enum request_timer which)
{
    if (request->timers[which].id > 0)
        claas_actor_timer_cancel(request->server->actor, request->timers[which].id);
    request->timers[which].id = 0;
}
