/* What a handler can do: answer, tell, publish, count credit. Each call packs a parcel and gives it
 * to the switch; nothing here waits. */
#include "actor_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <inttypes.h>
#include <string.h>

const char *claas_actor_name(const claas_actor_t *actor)
{
    return actor->name;
}

void claas_actor_fail(claas_actor_t *actor, int code, const char *text)
{
    actor->failure = code < 0 ? code : CLAAS_ERR_INTERNAL;
    claas_copy_text(actor->failure_text, sizeof(actor->failure_text),
                    text ? text : claas_err_text(actor->failure));
}

void claas_actor_on_cancel(claas_actor_t *actor, claas_cancel_fn *fn)
{
    actor->on_cancel = fn;
}

/* Ids of a trace come from a counter under a splitmix64 mix of a random seed: unique, and no system
 * call for each. */
static uint64_t next_trace_word(claas_actor_t *actor)
{
    uint64_t z = (actor->trace_seed += 0x9E3779B97F4A7C15u);

    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

void actor_trace(claas_actor_t *actor, uint8_t trace_id[16], uint8_t span_id[8])
{
    static const uint8_t none[16];
    uint64_t words[3];

    for (int i = 0; i < 3; i++)
        words[i] = next_trace_word(actor);
    if (memcmp(actor->trace_id, none, sizeof(none)) != 0)
        memcpy(trace_id, actor->trace_id, 16);
    else
        memcpy(trace_id, words, 16);
    memcpy(span_id, &words[2], 8);
}

/* Everything an actor sends goes through here: numbered, and with the credit it owes. */
int actor_send(claas_actor_t *actor, struct parcel *parcel)
{
    parcel->header.link_seq = ++actor->link_seq;
    parcel->header.credit = actor->owed;
    int rc = parcel_send(actor->data, NULL, parcel);
    if (rc == 0)
        actor->owed = 0;
    return rc;
}

void actor_send_credit(claas_actor_t *actor)
{
    struct parcel parcel;

    if (actor->owed == 0)
        return;
    parcel_init(&parcel, CLAAS_KIND_CREDIT, 0, 0);
    actor_send(actor, &parcel);
}

static void address_answer(struct parcel *parcel, const struct claas_reply_to *to,
                           enum claas_message_kind kind)
{
    parcel_init(parcel, kind, to->type, to->correlation);
    parcel->header.epoch = to->epoch;
    memcpy(parcel->header.trace_id, to->trace_id, sizeof(to->trace_id));
    parcel_address(parcel, to->to, NULL, NULL);
}

/* An answer that the switch does not take is lost for the requester, who then runs into its
 * deadline: rare enough (the switch never blocks) to be worth a line in the log. */
static int send_answer(claas_actor_t *actor, struct parcel *parcel)
{
    int rc = actor_send(actor, parcel);

    if (rc < 0) {
        claas_metric_add(CLAAS_METRIC_REPLIES_LOST, 1);
        claas_warning("an answer was lost: %s", claas_error_text());
    }
    return rc;
}

int claas_actor_reply_error(claas_actor_t *actor, const struct claas_reply_to *to, int code,
                            const char *text)
{
    struct parcel parcel;

    if (to->correlation == 0)
        return 0; /* nobody waits for the answer to a tell */
    address_answer(&parcel, to, CLAAS_KIND_ERR);
    int rc = parcel_pack_error(&parcel, code, text ? text : claas_err_text(code));
    return rc < 0 ? rc : send_answer(actor, &parcel);
}

/* The body must be what the catalogue promises; if not, that is our bug, and the requester gets an
 * error now instead of a surprise. */
static int send_body(claas_actor_t *actor, const struct claas_reply_to *to,
                     enum claas_message_kind kind, cJSON *body,
                     const struct claas_attachment *attachments, size_t count)
{
    CLAAS_AUTO(claas_json_free) cJSON *owned = body ? body : cJSON_CreateObject();
    enum claas_field_part part = kind == CLAAS_KIND_REP ? CLAAS_PART_REPLY : CLAAS_PART_PROGRESS;
    struct parcel parcel;

    if (to->correlation == 0)
        return 0;
    address_answer(&parcel, to, kind);
    int rc = claas_message_check(to->type, part, owned);
    if (rc == 0)
        rc = parcel_pack(&parcel, owned, attachments, count);
    if (rc < 0) {
        claas_error("a wrong answer to 0x%04X: %s", to->type, claas_error_text());
        claas_fail_context(CLAAS_ERR_INTERNAL, "a wrong answer of %s: ", actor->name);
        claas_actor_reply_error(actor, to, CLAAS_ERR_INTERNAL, claas_error_text());
        return rc;
    }
    return send_answer(actor, &parcel);
}

/* What every STATUS reply has; the actor itself adds `detail`. */
static void fill_status(const claas_actor_t *actor, cJSON *body)
{
    char incarnation[32];

    snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, actor->incarnation);
    claas_json_set_string(body, "actor", actor->name);
    claas_json_set_string(body, "incarnation", incarnation);
    claas_json_set_int(body, "uptime_ms", claas_clock_ms() - actor->started_ms);
    claas_json_set_int(body, "handled", (int64_t)actor->handled);
}

int claas_actor_reply_attached(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body,
                               const struct claas_attachment *attachments, size_t count)
{
    if (to->type == CLAAS_MSG_STATUS) {
        if (!body)
            body = cJSON_CreateObject();
        fill_status(actor, body);
    }
    return send_body(actor, to, CLAAS_KIND_REP, body, attachments, count);
}

int claas_actor_reply(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body)
{
    return claas_actor_reply_attached(actor, to, body, NULL, 0);
}

void actor_answer_status(claas_actor_t *actor, claas_message_t *message)
{
    claas_actor_reply(actor, &message->reply_to, NULL);
}

int claas_actor_progress(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body)
{
    return send_body(actor, to, CLAAS_KIND_PROGRESS, body, NULL, 0);
}

static int send_event(claas_actor_t *actor, const char *to, int type, cJSON *body)
{
    CLAAS_AUTO(claas_json_free) cJSON *owned = body ? body : cJSON_CreateObject();
    struct parcel parcel;
    int rc = claas_message_check(type, CLAAS_PART_REQUEST, owned);

    if (rc < 0)
        return rc;
    parcel_init(&parcel, CLAAS_KIND_EVT, type, 0);
    parcel.header.epoch = actor->incarnation;
    actor_trace(actor, parcel.header.trace_id, parcel.header.span_id);
    parcel_address(&parcel, to, NULL, NULL);
    rc = parcel_pack(&parcel, owned, NULL, 0);
    return rc < 0 ? rc : actor_send(actor, &parcel);
}

int claas_actor_tell(claas_actor_t *actor, const char *to, int type, cJSON *body)
{
    return send_event(actor, to, type, body);
}

void claas_actor_publish(claas_actor_t *actor, int type, cJSON *body)
{
    if (send_event(actor, "*", type, body) < 0)
        claas_debug("an event was not published: %s", claas_error_text());
}
