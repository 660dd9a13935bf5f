/* What an actor does with a message from its switch: requests and tells to the handler table,
 * answers to the table of questions, cancels to the actor's callback.
 *
 * Counters: a request or tell ends here as exactly one of handled (its handler was called),
 * refused (answered with an error before) or expired (its budget was used up in the mailbox). The
 * switch gets one credit for each, whatever became of it. */
#include "actor_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/metrics.h"

#include <string.h>

static const struct claas_handler *find_handler(const claas_actor_t *actor, int type)
{
    for (size_t i = 0; i < actor->class->handler_count; i++)
        if (actor->class->handlers[i].type == type)
            return &actor->class->handlers[i];
    return NULL;
}

static void refuse(claas_actor_t *actor, const claas_message_t *message, int code)
{
    claas_metric_add(CLAAS_METRIC_MESSAGES_REFUSED, 1);
    if (message->kind == CLAAS_KIND_EVT)
        claas_warning("refused a tell 0x%04X of %s: %s", message->type, message->from,
                      claas_error_text());
    claas_actor_reply_error(actor, &message->reply_to, code, claas_error_text());
}

static void handle(claas_actor_t *actor, claas_message_t *message)
{
    const struct claas_handler *handler = find_handler(actor, message->type);
    int rc;

    if (!handler && message->type != CLAAS_MSG_STATUS) {
        refuse(actor, message,
               claas_fail(CLAAS_ERR_UNSUPPORTED, "%s does not serve %s", actor->name,
                          claas_message_info(message->type)->name));
        return;
    }
    actor->handled++;
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, 1);
    if (!handler) {
        actor_answer_status(actor, message);
        return;
    }
    memcpy(actor->trace_id, message->header.trace_id, sizeof(actor->trace_id));
    rc = handler->handle(actor->self, message);
    memset(actor->trace_id, 0, sizeof(actor->trace_id));
    if (rc < 0 && message->kind == CLAAS_KIND_REQ)
        claas_actor_reply_error(actor, &message->reply_to, rc, claas_error_text());
    else if (rc < 0)
        claas_warning("a tell %s of %s failed: %s", claas_message_info(message->type)->name,
                      message->from, claas_error_text());
}

static void take_request(claas_actor_t *actor, struct parcel *parcel)
{
    const struct claas_message_info *info = claas_message_info(parcel->header.type);
    struct envelope envelope;
    int rc = envelope_open(&envelope, parcel, info ? info->max_body : 0);
    claas_message_t *message = &envelope.message;

    actor->owed++;
    if (message->kind == CLAAS_KIND_REQ && message->reply_to.deadline_ms <= claas_clock_ms())
        claas_metric_add(CLAAS_METRIC_MESSAGES_EXPIRED, 1);
    else if (rc < 0)
        refuse(actor, message, rc);
    else
        handle(actor, message);
    envelope_close(&envelope);
}

/* A reply that breaks the catalogue ends its question as an error that says so. */
static void take_answer(claas_actor_t *actor, struct parcel *parcel)
{
    struct parcel opened = *parcel;
    struct envelope envelope;
    int rc = envelope_open(&envelope, parcel, CLAAS_MESSAGE_BYTES);

    if (rc < 0 && envelope.message.kind != CLAAS_KIND_ERR) {
        claas_fail_context(rc, "a wrong answer of %s: ", opened.address[0]);
        claas_error("%s", claas_error_text());
        envelope_close(&envelope);
        envelope_error(&envelope, opened.header.type, opened.header.correlation, opened.address[0],
                       CLAAS_ERR_INTERNAL, claas_error_text());
        envelope.message.header.epoch = opened.header.epoch;
    }
    actor_take_reply(actor, &envelope);
    envelope_close(&envelope);
}

/* The switch routes requests to us from now on (a refusal comes as an ERR). */
static void take_welcome(claas_actor_t *actor)
{
    if (!actor->announced)
        actor->owner.ready(actor->owner.handle, 0, "");
    actor->announced = true;
}

static void take_error(claas_actor_t *actor, struct parcel *parcel)
{
    struct envelope envelope;

    if (parcel->header.correlation != 0) {
        take_answer(actor, parcel);
        return;
    }
    envelope_open(&envelope, parcel, CLAAS_MESSAGE_BYTES);
    claas_actor_fail(actor, envelope.message.error, envelope.message.error_text);
    envelope_close(&envelope);
}

static void take_cancel(claas_actor_t *actor, const struct parcel *parcel)
{
    struct claas_reply_to to = {.correlation = parcel->header.correlation,
                                .epoch = parcel->header.epoch,
                                .type = parcel->header.type};

    memcpy(to.to, parcel->address[0], sizeof(to.to));
    memcpy(to.principal, parcel->address[1], sizeof(to.principal));
    if (actor->on_cancel)
        actor->on_cancel(actor->self, &to);
}

void actor_dispatch(claas_actor_t *actor, struct parcel *parcel)
{
    switch (parcel->header.kind) {
    case CLAAS_KIND_REQ:
    case CLAAS_KIND_EVT:
        take_request(actor, parcel);
        break;
    case CLAAS_KIND_REP:
    case CLAAS_KIND_PROGRESS:
        take_answer(actor, parcel);
        break;
    case CLAAS_KIND_ERR:
        take_error(actor, parcel);
        break;
    case CLAAS_KIND_WELCOME:
        take_welcome(actor);
        break;
    case CLAAS_KIND_CANCEL:
        take_cancel(actor, parcel);
        break;
    default:
        break; /* the switch sends nothing else */
    }
    parcel_done(parcel);
    if (actor->owed >= DRAIN_MESSAGES)
        actor_send_credit(actor);
}
