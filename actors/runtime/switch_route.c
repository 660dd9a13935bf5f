/* The way of a message through the switch.
 *
 * Every request and tell that arrives is counted as sent, and ends as exactly one of: given on (it
 * is then counted where it ends: handled, refused or expired by the actor, lost when the receiver
 * dies with it in the mailbox), refused here (the requester gets an ERR), or lost (a tell to
 * nobody). A message from another node was counted as sent there. The switch reads headers and
 * addresses only; bodies are checked by the actor that they are for. */
#include "switch_internal.h"

#include "claas/actor.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <inttypes.h>
#include <string.h>

static zsock_t *socket_of(const struct claas_switch *sw, const struct peer *peer)
{
    switch (peer->kind) {
    case PEER_ACTOR:
        return sw->inner;
    case PEER_UPSTREAM:
        return sw->link;
    default:
        return sw->outer;
    }
}

static bool is_node(const struct peer *peer)
{
    return peer->kind == PEER_NODE || peer->kind == PEER_UPSTREAM;
}

static bool is_request(const struct claas_header *header)
{
    return header->kind == CLAAS_KIND_REQ || header->kind == CLAAS_KIND_EVT;
}

/* --- sending ---------------------------------------------------------------------------------- */

static void write_address(struct parcel *parcel, const struct peer *peer, const char *to,
                          const char *from, const char *principal)
{
    char arrival[24] = "";

    if (is_node(peer)) {
        parcel_address(parcel, to, from, principal);
        return;
    }
    /* In the same process the clock is the same: time spent in the mailbox counts. */
    if (peer->kind == PEER_ACTOR)
        snprintf(arrival, sizeof(arrival), "%" PRId64, claas_clock_ms());
    parcel_address(parcel, from, principal, arrival);
}

int switch_send(struct claas_switch *sw, struct peer *peer, const char *to, const char *from,
                const char *principal, struct parcel *parcel)
{
    if (peer->dead || (peer->kind == PEER_UPSTREAM && !sw->link)) {
        parcel_done(parcel);
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s went away", peer->name);
    }
    write_address(parcel, peer, to, from, principal);
    parcel->header.version = CLAAS_PROTOCOL_VERSION;
    parcel->header.link_seq = ++peer->seq_out;
    parcel->header.credit = peer->owed;
    parcel->backlog = peer->kind == PEER_CLIENT ? peer->backlog : NULL;
    int rc =
        parcel_send(socket_of(sw, peer), peer->kind == PEER_UPSTREAM ? NULL : &peer->id, parcel);
    if (rc == 0)
        peer->owed = 0;
    else
        peer->seq_out--;
    /* A DEALER says EAGAIN for "not connected"; its mailbox is bounded far below its mark. */
    if (rc == CLAAS_ERR_OVERLOADED && peer->kind == PEER_UPSTREAM)
        rc = claas_fail(CLAAS_ERR_UNAVAILABLE, "the link to %s is down", peer->name);
    if (rc == CLAAS_ERR_UNAVAILABLE)
        peer_mark_dead(sw, peer);
    return rc;
}

void switch_send_credit(struct claas_switch *sw, struct peer *peer)
{
    struct parcel parcel;

    if (peer->owed == 0)
        return;
    parcel_init(&parcel, CLAAS_KIND_CREDIT, 0, 0);
    switch_send(sw, peer, "", "", "", &parcel);
}

void switch_send_error(struct claas_switch *sw, struct peer *peer, const char *to,
                       const struct claas_header *about, int code, const char *text)
{
    struct parcel parcel;

    parcel_init(&parcel, CLAAS_KIND_ERR, about->type, about->correlation);
    parcel.header.epoch = about->epoch;
    memcpy(parcel.header.trace_id, about->trace_id, sizeof(about->trace_id));
    if (parcel_pack_error(&parcel, code, text) < 0)
        return;
    if (switch_send(sw, peer, to, SWITCH_NAME, "local", &parcel) < 0)
        claas_metric_add(CLAAS_METRIC_REPLIES_LOST, 1);
}

void switch_refuse(struct claas_switch *sw, struct peer *peer, const char *to,
                   const struct claas_header *about, int code)
{
    char text[512];

    claas_copy_text(text, sizeof(text), claas_error_text());
    claas_metric_add(CLAAS_METRIC_MESSAGES_REFUSED, 1);
    switch_send_error(sw, peer, to, about, code, text);
}

void switch_note(struct claas_switch *sw, struct peer *peer, const struct claas_header *header)
{
    uint32_t gap = header->link_seq - peer->seq_in - 1;

    peer->heard_ms = claas_clock_ms();
    if (header->link_seq != 0) {
        if (peer->seq_in != 0 && gap != 0 && gap < UINT32_MAX / 2)
            claas_metric_add(CLAAS_METRIC_LINK_GAPS, gap);
        peer->seq_in = header->link_seq;
    }
    if (peer->kind != PEER_CLIENT)
        mailbox_take(&peer->waiting, header->credit);
}

/* --- requests --------------------------------------------------------------------------------- */

/* Rules that need no receiver: 0, or why it is refused. */
static int check_request(const struct peer *sender, const struct parcel *parcel)
{
    const struct claas_header *header = &parcel->header;
    const struct claas_message_info *info = claas_message_info(header->type);

    if (!info)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "unknown message type 0x%04X", header->type);
    if (sender->kind == PEER_CLIENT && info->role != CLAAS_ROLE_CLIENT)
        return claas_fail(CLAAS_ERR_DENIED, "%s may not be sent by clients", info->name);
    if (header->kind == CLAAS_KIND_REQ && header->correlation == 0)
        return claas_fail(CLAAS_ERR_FORMAT, "a request needs a correlation other than 0");
    if (header->kind == CLAAS_KIND_REQ && header->budget_ms == 0)
        return claas_fail(CLAAS_ERR_FORMAT, "a request needs a budget_ms greater than 0");
    if (header->body_len > info->max_body)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "a body of %u bytes, %s takes %zu", header->body_len,
                          info->name, info->max_body);
    return 0;
}

static int check_flights(struct claas_switch *sw, const struct peer *sender, const char *from,
                         const struct claas_header *header)
{
    if (flight_find(sw, from, header->correlation))
        return claas_fail(CLAAS_ERR_CONFLICT, "correlation %" PRIu64 " is in use",
                          header->correlation);
    if (zhashx_size(sw->flights) >= FLIGHTS_MAX ||
        (sender->kind == PEER_CLIENT && sender->asked_count >= FLIGHTS_CLIENT_MAX))
        return claas_fail(CLAAS_ERR_OVERLOADED, "too many requests under way");
    if (sender->kind == PEER_CLIENT && backlog_bytes(sender->backlog) > UNREAD_BYTES_MAX / 2)
        return claas_fail(CLAAS_ERR_OVERLOADED, "%zu bytes of earlier answers are unread",
                          backlog_bytes(sender->backlog));
    return 0;
}

/* Where a name is: a local actor, a joined node, or upstream. */
static int find_receiver(struct claas_switch *sw, const struct peer *sender, const char *to,
                         struct peer **ret_peer, char ret_name[CLAAS_NAME_MAX])
{
    struct route *route = route_pick(sw, to);

    if (route && route->ready && !route->peer->dead) {
        *ret_peer = route->peer;
        claas_copy_text(ret_name, CLAAS_NAME_MAX, route->name);
        return 0;
    }
    if (route)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s is starting", to);
    if (!sw->link || sender->kind == PEER_UPSTREAM)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "there is no actor %s", to);
    if (!atomic_load(&sw->joined))
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s: the other node cannot be reached", to);
    *ret_peer = sw->upstream;
    claas_copy_text(ret_name, CLAAS_NAME_MAX, to);
    return 0;
}

/* Into the receiver's mailbox. */
static int give(struct claas_switch *sw, struct peer *sender, const char *from,
                const char *principal, struct peer *receiver, const char *name,
                struct parcel *parcel)
{
    struct claas_header header = parcel->header;
    size_t bytes = parcel->bytes;
    struct flight *flight = NULL;

    if (!mailbox_has_room(sw, &receiver->waiting, bytes))
        return claas_fail(CLAAS_ERR_OVERLOADED, "%s has %zu messages waiting", name,
                          receiver->waiting.count);
    if (header.kind == CLAAS_KIND_REQ) {
        flight = flight_new(sw, sender, from, receiver, name, &header);
        if (!flight)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    int rc = mailbox_put(&receiver->waiting, bytes);
    if (rc == 0) {
        rc = switch_send(sw, receiver, name, from, principal, parcel);
        if (rc < 0) { /* not given after all: the newest entry goes again */
            receiver->waiting.count--;
            receiver->waiting.bytes -= bytes;
        }
    }
    if (rc < 0 && flight)
        flight_free(sw, flight);
    return rc;
}

static void answer_status(struct claas_switch *sw, struct peer *sender, const char *from,
                          const struct claas_header *about)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = switch_status(sw);
    struct parcel parcel;

    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, 1);
    parcel_init(&parcel, CLAAS_KIND_REP, about->type, about->correlation);
    parcel.header.epoch = about->epoch;
    if (parcel_pack(&parcel, body, NULL, 0) < 0 ||
        switch_send(sw, sender, from, SWITCH_NAME, "local", &parcel) < 0)
        claas_metric_add(CLAAS_METRIC_REPLIES_LOST, 1);
}

static void take_request(struct claas_switch *sw, struct peer *sender, const char *from,
                         const char *principal, struct parcel *parcel)
{
    struct claas_header header = parcel->header;
    char name[CLAAS_NAME_MAX], to[CLAAS_NAME_MAX];
    struct peer *receiver = NULL;
    int rc = check_request(sender, parcel);

    memcpy(to, parcel->address[0], sizeof(to));
    if (rc == 0 && header.kind == CLAAS_KIND_REQ)
        rc = check_flights(sw, sender, from, &header);
    if (rc == 0 && header.type == CLAAS_MSG_STATUS && strcmp(to, SWITCH_NAME) == 0 &&
        header.kind == CLAAS_KIND_REQ) {
        answer_status(sw, sender, from, &header);
        return;
    }
    if (rc == 0)
        rc = find_receiver(sw, sender, to, &receiver, name);
    if (rc == 0)
        rc = give(sw, sender, from, principal, receiver, name, parcel);
    if (rc == 0)
        return;
    if (header.kind == CLAAS_KIND_REQ) {
        switch_refuse(sw, sender, from, &header, rc);
        return;
    }
    bool is_dead_letter = rc == CLAAS_ERR_UNAVAILABLE || rc == CLAAS_ERR_OVERLOADED;
    claas_metric_add(is_dead_letter ? CLAAS_METRIC_MESSAGES_LOST : CLAAS_METRIC_MESSAGES_REFUSED,
                     1);
    claas_warning("a tell 0x%04X of %s to %s: %s", header.type, from, to, claas_error_text());
}

/* --- events ----------------------------------------------------------------------------------- */

/* [name of the message][header][body] to whoever subscribed; a slow subscriber misses some, the
 * publisher never waits. On a joined node events go to the main node. */
static void take_event(struct claas_switch *sw, struct peer *sender, const char *from,
                       const char *principal, struct parcel *parcel)
{
    const struct claas_message_info *info = claas_message_info(parcel->header.type);

    if (!info || sender->kind == PEER_CLIENT) {
        claas_metric_add(CLAAS_METRIC_MESSAGES_REFUSED, 1);
        return;
    }
    if (!is_node(sender)) /* else it was counted there */
        claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, 1);
    if (sw->events) {
        claas_metric_add(CLAAS_METRIC_EVENTS_PUBLISHED, 1);
        parcel_address(parcel, info->name, NULL, NULL);
        if (parcel_send(sw->events, NULL, parcel) < 0)
            claas_debug("an event was not published: %s", claas_error_text());
    } else if (atomic_load(&sw->joined)) {
        switch_send(sw, sw->upstream, EVENTS_ADDRESS, from, principal, parcel);
    }
}

/* --- answers ---------------------------------------------------------------------------------- */

/* A client that does not read may not fill the memory: what goes beyond its bound is lost, and it
 * is told so. As a mailbox does, an empty backlog takes anything. */
static bool give_up_unread(struct claas_switch *sw, struct flight *flight, size_t bytes,
                           bool is_last)
{
    size_t unread = backlog_bytes(flight->requester->backlog);
    char text[128];

    if (flight->requester->kind != PEER_CLIENT || unread == 0 || unread + bytes <= UNREAD_BYTES_MAX)
        return false;
    claas_metric_add(CLAAS_METRIC_REPLIES_LOST, 1);
    snprintf(text, sizeof(text), "the answer of %zu bytes is lost: %zu of earlier ones are unread",
             bytes, unread);
    if (is_last)
        flight_fail(sw, flight, CLAAS_ERR_LIMIT, text);
    else
        flight_abort(sw, flight, CLAAS_ERR_LIMIT, text);
    return true;
}

static void take_answer(struct claas_switch *sw, struct peer *sender, const char *from,
                        struct parcel *parcel)
{
    char to[CLAAS_NAME_MAX];
    bool is_last = parcel->header.kind != CLAAS_KIND_PROGRESS;

    memcpy(to, parcel->address[0], sizeof(to));
    struct flight *flight = flight_find(sw, to, parcel->header.correlation);
    if (!flight || flight->receiver != sender) {
        claas_metric_add(CLAAS_METRIC_REPLIES_LATE, 1);
        return;
    }
    if (give_up_unread(sw, flight, parcel->bytes, is_last))
        return;
    parcel->header.epoch = flight->epoch;
    struct peer *requester = flight->requester;
    if (is_last)
        flight_free(sw, flight);
    if (switch_send(sw, requester, to, from, "local", parcel) == 0)
        return;
    /* A stream with a hole is worth nothing: stop it. A requester that is gone is buried later. */
    claas_metric_add(CLAAS_METRIC_REPLIES_LOST, 1);
    if (!is_last && !requester->dead)
        flight_cancel(sw, flight);
}

static void take_cancel(struct claas_switch *sw, const struct peer *sender, const char *from,
                        const struct parcel *parcel)
{
    struct flight *flight = flight_find(sw, from, parcel->header.correlation);

    if (flight && flight->requester == sender)
        flight_cancel(sw, flight);
}

void switch_take(struct claas_switch *sw, struct peer *sender, const char *from,
                 const char *principal, struct parcel *parcel)
{
    bool is_event = strcmp(parcel->address[0], EVENTS_ADDRESS) == 0;

    if (is_request(&parcel->header)) {
        if (!is_node(sender)) {
            claas_metric_add(CLAAS_METRIC_MESSAGES_SENT, 1);
        } else if (!is_event) { /* the sender's mailbox of us */
            sender->owed++;
        }
    }
    switch (parcel->header.kind) {
    case CLAAS_KIND_REQ:
        take_request(sw, sender, from, principal, parcel);
        break;
    case CLAAS_KIND_EVT:
        if (is_event)
            take_event(sw, sender, from, principal, parcel);
        else
            take_request(sw, sender, from, principal, parcel);
        break;
    case CLAAS_KIND_REP:
    case CLAAS_KIND_ERR:
    case CLAAS_KIND_PROGRESS:
        take_answer(sw, sender, from, parcel);
        break;
    case CLAAS_KIND_CANCEL:
        take_cancel(sw, sender, from, parcel);
        break;
    default:
        break; /* credit and signs of life were noted already */
    }
    parcel_done(parcel);
    if (is_node(sender) && sender->owed >= 64)
        switch_send_credit(sw, sender);
}
