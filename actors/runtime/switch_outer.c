/* The outer ROUTER of the main node: clients, and nodes that join.
 *
 * Whoever connects is a client until it says HELLO with the node token. The switch gives it its
 * name ("client.7"), whatever routing id it chose and whatever its messages claim; so no peer can
 * take an actor's name or answer in its place. */
#include "switch_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <inttypes.h>
#include <string.h>

/* What a client has not read is counted for as long as it is there. */
static bool waits_for_nothing(const struct peer *peer)
{
    return peer->kind == PEER_CLIENT && peer->asked_count == 0 && backlog_bytes(peer->backlog) == 0;
}

/* Forgets the client that has been silent for longest and waits for nothing. */
static void forget_a_client(struct claas_switch *sw)
{
    struct peer *oldest = NULL;

    for (struct peer *peer = zhashx_first(sw->outer_peers); peer;
         peer = zhashx_next(sw->outer_peers))
        if (waits_for_nothing(peer) && (!oldest || peer->heard_ms < oldest->heard_ms))
            oldest = peer;
    if (oldest)
        peer_bury(sw, oldest);
}

static struct peer *find_or_welcome(struct claas_switch *sw, const struct peer_id *id)
{
    struct peer *peer = zhashx_lookup(sw->outer_peers, id);

    if (peer)
        return peer;
    if (sw->client_count >= CLIENTS_MAX)
        forget_a_client(sw);
    if (sw->client_count >= CLIENTS_MAX)
        return NULL;
    peer = peer_new(sw, PEER_CLIENT, id);
    if (!peer)
        return NULL;
    sw->client_count++;
    snprintf(peer->name, sizeof(peer->name), "client.%" PRIu64, ++sw->client_last);
    return peer;
}

/* --- HELLO, PING ------------------------------------------------------------------------------ */

static void send_welcome(struct claas_switch *sw, struct peer *peer,
                         const struct claas_header *about)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();
    char incarnation[32];
    struct parcel parcel;

    snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, sw->incarnation);
    claas_json_set_string(body, "name", peer->name);
    claas_json_set_int(body, "version", CLAAS_PROTOCOL_VERSION);
    claas_json_set_string(body, "incarnation", incarnation);
    parcel_init(&parcel, CLAAS_KIND_WELCOME, 0, about->correlation);
    parcel.header.epoch = sw->incarnation;
    if (parcel_pack(&parcel, body, NULL, 0) == 0)
        switch_send(sw, peer, peer->name, SWITCH_NAME, "local", &parcel);
}

static void take_hello(struct claas_switch *sw, struct peer *peer, struct parcel *parcel)
{
    struct claas_header header = parcel->header;
    struct envelope envelope;
    int rc = envelope_open(&envelope, parcel, HELLO_BODY_MAX);
    const cJSON *body = envelope.message.body;

    if (rc == 0 && (claas_json_get(body, "token") || claas_json_get(body, "actors")))
        rc = join_take_hello(sw, peer, &header, body);
    if (rc < 0) {
        char text[256];

        claas_copy_text(text, sizeof(text), claas_error_text());
        claas_metric_add(CLAAS_METRIC_PEERS_REFUSED, 1);
        claas_warning("HELLO of %s refused: %s", peer->name, text);
        switch_send_error(sw, peer, peer->name, &header, rc, text);
    } else {
        send_welcome(sw, peer, &header);
    }
    envelope_close(&envelope);
}

static void take_bye(struct claas_switch *sw, struct peer *peer)
{
    if (peer->kind == PEER_CLIENT)
        flights_cancel_by(sw, peer, NULL);
    if (peer->kind == PEER_NODE || waits_for_nothing(peer))
        peer_bury(sw, peer);
}

static void take_ping(struct claas_switch *sw, struct peer *peer, const struct claas_header *about)
{
    struct parcel parcel;

    parcel_init(&parcel, CLAAS_KIND_PONG, 0, about->correlation);
    parcel.header.epoch = sw->incarnation;
    parcel.header.flags = peer->kind == PEER_NODE ? FLAG_JOINED : 0;
    switch_send(sw, peer, peer->name, SWITCH_NAME, "local", &parcel);
}

/* --- messages --------------------------------------------------------------------------------- */

static void refuse(struct claas_switch *sw, struct peer *peer, const struct claas_header *about,
                   int code)
{
    claas_metric_add(CLAAS_METRIC_MESSAGES_SENT, 1);
    /* Never an error about an error: two peers would play ping-pong with it. */
    if (about->kind == CLAAS_KIND_ERR)
        claas_metric_add(CLAAS_METRIC_MESSAGES_REFUSED, 1);
    else
        switch_refuse(sw, peer, peer->name, about, code);
}

static void take_from_client(struct claas_switch *sw, struct peer *peer, struct parcel *parcel)
{
    if (parcel->address[1][0]) {
        claas_metric_add(CLAAS_METRIC_PEERS_REFUSED, 1);
        refuse(sw, peer, &parcel->header,
               claas_fail(CLAAS_ERR_DENIED, "a client cannot speak as '%s'", parcel->address[1]));
        return;
    }
    switch_take(sw, peer, peer->name, "local", parcel);
}

/* A node speaks for its actors, and for nobody else's. */
static void take_from_node(struct claas_switch *sw, struct peer *peer, struct parcel *parcel)
{
    char from[CLAAS_NAME_MAX], principal[CLAAS_NAME_MAX];
    int kind = parcel->header.kind;
    const struct route *route = route_find(sw, parcel->address[1]);
    bool is_asking = kind == CLAAS_KIND_REQ || kind == CLAAS_KIND_EVT || kind == CLAAS_KIND_CANCEL;

    if (is_asking && (!route || route->peer != peer)) {
        claas_metric_add(CLAAS_METRIC_PEERS_REFUSED, 1);
        claas_warning("node %s spoke as '%s'", peer->name, parcel->address[1]);
        if (kind != CLAAS_KIND_CANCEL) {
            peer->owed++;
            switch_refuse(sw, peer, parcel->address[1], &parcel->header,
                          claas_fail(CLAAS_ERR_DENIED, "node %s has no actor '%s'", peer->name,
                                     parcel->address[1]));
        }
        return;
    }
    memcpy(from, parcel->address[1], sizeof(from));
    memcpy(principal, parcel->address[2], sizeof(principal));
    switch_take(sw, peer, from, principal[0] ? principal : "local", parcel);
}

static void take_outer(struct claas_switch *sw, struct parcel *parcel, int rc)
{
    static const struct claas_header unreadable;
    struct peer *peer = find_or_welcome(sw, &parcel->peer);
    const struct claas_header *header = parcel->readable ? &parcel->header : &unreadable;
    int kind = parcel->header.kind;

    if (!peer || peer->dead) {
        claas_metric_add(CLAAS_METRIC_MESSAGES_SENT, 1);
        claas_metric_add(CLAAS_METRIC_MESSAGES_REFUSED, 1);
        return;
    }
    if (rc < 0) {
        refuse(sw, peer, header, rc);
        return;
    }
    switch_note(sw, peer, &parcel->header);
    if (kind == CLAAS_KIND_HELLO)
        take_hello(sw, peer, parcel);
    else if (kind == CLAAS_KIND_PING)
        take_ping(sw, peer, &parcel->header);
    else if (kind == CLAAS_KIND_BYE)
        take_bye(sw, peer);
    else if (kind < CLAAS_KIND_HELLO || kind > CLAAS_KIND_BYE)
        refuse(sw, peer, &parcel->header,
               claas_fail(CLAAS_ERR_FORMAT, "unknown kind %d of message", kind));
    else if (peer->kind == PEER_NODE)
        take_from_node(sw, peer, parcel);
    else
        take_from_client(sw, peer, parcel);
}

int on_outer(zloop_t *loop, zsock_t *socket, void *arg)
{
    struct claas_switch *sw = arg;
    int rc = switch_drain(sw, socket, true, take_outer);

    if (sw->node_count > 0)
        for (struct peer *peer = zhashx_first(sw->outer_peers); peer;
             peer = zhashx_next(sw->outer_peers))
            if (peer->kind == PEER_NODE)
                switch_send_credit(sw, peer);
    return rc;
}

/* A ping finds out about a peer that is gone even when nobody asks it anything: the ROUTER refuses
 * to send. A peer that is there but stuck is noticed by its silence. */
static void tick_node(struct claas_switch *sw, struct peer *peer, int64_t now_ms, bool is_ping)
{
    struct parcel parcel;

    if (now_ms - peer->heard_ms > SILENT_MS) {
        peer_mark_dead(sw, peer);
        return;
    }
    if (!is_ping)
        return;
    parcel_init(&parcel, CLAAS_KIND_PING, 0, 0);
    parcel.header.epoch = sw->incarnation;
    switch_send(sw, peer, peer->name, SWITCH_NAME, "local", &parcel);
}

void outer_tick(struct claas_switch *sw, int64_t now_ms)
{
    bool is_ping = now_ms - sw->ping_ms >= PING_MS;

    if (is_ping)
        sw->ping_ms = now_ms;
    for (struct peer *peer = zhashx_first(sw->outer_peers); peer;
         peer = zhashx_next(sw->outer_peers)) {
        if (peer->kind == PEER_NODE)
            tick_node(sw, peer, now_ms, is_ping);
        else if (waits_for_nothing(peer) && now_ms - peer->heard_ms > CLIENT_IDLE_MS)
            peer_mark_dead(sw, peer);
    }
}
