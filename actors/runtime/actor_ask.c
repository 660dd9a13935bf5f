/* The table of questions: id -> who answers, what to call, until when.
 *
 * Every entry ends exactly once: by the reply, by an error of the peer or of the switch (which
 * answers UNAVAILABLE for every request of a peer that died), by the deadline, or at the latest
 * when the actor stops. An entry leaves the table before its callback runs, so the callback may ask
 * and cancel as it likes. */
#include "actor_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <string.h>

/* Copies what outlives the ask and frees it. */
static struct ask take_ask(claas_actor_t *actor, struct ask *ask)
{
    struct ask copy = *ask;

    zhashx_delete(actor->asks, &ask->id);
    timers_remove(&actor->timers, copy.deadline);
    free(ask);
    return copy;
}

static void send_cancel(claas_actor_t *actor, uint64_t id, int type)
{
    struct parcel parcel;

    parcel_init(&parcel, CLAAS_KIND_CANCEL, type, id);
    parcel.header.epoch = actor->incarnation;
    if (actor_send(actor, &parcel) < 0)
        claas_debug("a cancel was not sent: %s", claas_error_text());
}

static void end_ask(claas_actor_t *actor, struct ask *ask, int code, const char *text)
{
    struct ask ended = take_ask(actor, ask);
    struct envelope envelope;

    envelope_error(&envelope, ended.type, ended.id, ended.to, code, text);
    if (ended.reply && actor->started) /* else there is no self to call back */
        ended.reply(actor->self, ended.arg, &envelope.message);
    envelope_close(&envelope);
}

static void deadline_passed(void *self, void *arg)
{
    claas_actor_t *actor = self;
    struct ask *ask = arg;
    char text[CLAAS_NAME_MAX + 64];

    ask->deadline = NULL; /* the loop frees the timer that fired */
    snprintf(text, sizeof(text), "no answer from %s in time", ask->to);
    send_cancel(actor, ask->id, ask->type);
    end_ask(actor, ask, CLAAS_ERR_DEADLINE, text);
}

static int pack_request(claas_actor_t *actor, const struct claas_ask *ask, const cJSON *body,
                        struct parcel *parcel)
{
    const struct claas_message_info *info = claas_message_info(ask->type);
    int64_t budget = ask->timeout_ms < UINT32_MAX ? ask->timeout_ms : UINT32_MAX;

    if (ask->timeout_ms <= 0)
        return claas_fail(CLAAS_ERR_DEADLINE, "no time is left to ask %s", ask->to);
    if (!name_valid(ask->to))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not the name of an actor", ask->to);
    int rc = claas_message_check(ask->type, CLAAS_PART_REQUEST, body);
    if (rc < 0)
        return rc;
    parcel_init(parcel, CLAAS_KIND_REQ, ask->type, actor->last_ask + 1);
    parcel->header.budget_ms = (uint32_t)budget;
    parcel->header.epoch = actor->incarnation;
    parcel->header.attempt = 1;
    actor_trace(actor, parcel->header.trace_id, parcel->header.span_id);
    parcel_address(parcel, ask->to, ask->principal ? ask->principal : "local", NULL);
    rc = parcel_pack(parcel, body, ask->attachments, ask->attachment_count);
    if (rc == 0 && zframe_size(zmsg_first(parcel->load)) > info->max_body)
        rc = claas_fail(CLAAS_ERR_TOO_LARGE, "a body of %zu bytes, %s takes %zu",
                        zframe_size(zmsg_first(parcel->load)), info->name, info->max_body);
    if (rc < 0)
        parcel_done(parcel);
    return rc;
}

int claas_actor_ask(claas_actor_t *actor, const struct claas_ask *question, uint64_t *ret_id)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = question->body;
    struct parcel parcel;

    if (ret_id)
        *ret_id = 0;
    if (!body)
        body = cJSON_CreateObject();
    if (actor->stopping)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s is stopping", actor->name);
    CLAAS_AUTO_FREE struct ask *ask = CLAAS_NEW(struct ask);
    if (!ask)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = pack_request(actor, question, body, &parcel);
    if (rc < 0)
        return rc;
    ask->id = actor->last_ask + 1;
    ask->type = question->type;
    ask->reply = question->reply;
    ask->arg = question->arg;
    claas_copy_text(ask->to, sizeof(ask->to), question->to);
    ask->deadline = actor_set_timer(actor, question->timeout_ms, deadline_passed, ask);
    if (!ask->deadline) {
        parcel_done(&parcel);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    rc = actor_send(actor, &parcel);
    if (rc < 0) {
        timers_remove(&actor->timers, ask->deadline);
        return rc;
    }
    actor->last_ask = ask->id;
    if (ret_id)
        *ret_id = ask->id;
    zhashx_insert(actor->asks, &ask->id, ask);
    ask = NULL;
    return 0;
}

void claas_actor_cancel(claas_actor_t *actor, uint64_t id)
{
    struct ask *ask = zhashx_lookup(actor->asks, &id);

    if (!ask)
        return;
    struct ask ended = take_ask(actor, ask);
    send_cancel(actor, ended.id, ended.type);
}

void actor_take_reply(claas_actor_t *actor, struct envelope *envelope)
{
    claas_message_t *message = &envelope->message;
    uint64_t id = message->header.correlation;
    struct ask *ask = zhashx_lookup(actor->asks, &id);

    /* The epoch is the asker's incarnation, sent back: an answer to an earlier life is nobody's. */
    if (!ask || message->header.epoch != actor->incarnation) {
        claas_metric_add(CLAAS_METRIC_REPLIES_LATE, 1);
        return;
    }
    message->type = ask->type;
    if (message->kind == CLAAS_KIND_PROGRESS) {
        if (ask->reply)
            ask->reply(actor->self, ask->arg, message);
        return;
    }
    struct ask ended = take_ask(actor, ask);
    if (ended.reply)
        ended.reply(actor->self, ended.arg, message);
}

void actor_end_asks(claas_actor_t *actor, int code, const char *text)
{
    struct ask *ask;

    while ((ask = zhashx_first(actor->asks)) != NULL)
        end_ask(actor, ask, code, text);
}
