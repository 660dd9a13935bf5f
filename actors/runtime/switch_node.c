/* The side of a node that joins another one: it says HELLO with the token and its actors' names,
 * pings once a second, and takes three seconds of silence, or a PONG of a switch that does not know
 * it, for the end of the link. Then whatever was asked upstream fails at once, and HELLO is said
 * again until someone answers. */
#include "switch_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

#define TOKEN_BYTES 32

/* --- the token -------------------------------------------------------------------------------- */

static bool token_valid(const char *token)
{
    return strlen(token) == 2 * TOKEN_BYTES && strspn(token, "0123456789abcdef") == strlen(token);
}

static int make_token(const char *folder, const char *path, char ret[65])
{
    int rc = claas_mkdir_all(folder);

    if (rc < 0)
        return rc;
    claas_random_hex(ret, TOKEN_BYTES);
    mode_t mask = umask(0177);
    rc = claas_file_write(path, ret, strlen(ret));
    umask(mask);
    return rc;
}

int node_token(const char *data, bool make, char ret[65])
{
    CLAAS_AUTO_FREE char *folder = claas_format("%s/keys", data);
    CLAAS_AUTO_FREE char *path = claas_format("%s/keys/node.token", data);
    CLAAS_AUTO_FREE char *text = NULL;
    struct stat status;

    if (!folder || !path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (make && stat(path, &status) < 0 && errno == ENOENT)
        return make_token(folder, path, ret);
    int rc = claas_file_read(path, 1024, &text, NULL);
    if (rc < 0)
        return rc;
    text[strcspn(text, "\r\n")] = '\0';
    if (!token_valid(text))
        return claas_fail(CLAAS_ERR_FORMAT, "%s does not hold a token (%d hex digits)", path,
                          2 * TOKEN_BYTES);
    claas_copy_text(ret, 65, text);
    return 0;
}

/* --- joining ---------------------------------------------------------------------------------- */

static void note_refusal(struct claas_switch *sw, int code, const char *text)
{
    pthread_mutex_lock(&sw->join_lock);
    bool is_new = sw->join_refusal != code;
    sw->join_refusal = code;
    claas_copy_text(sw->join_text, sizeof(sw->join_text), text);
    pthread_mutex_unlock(&sw->join_lock);
    if (is_new)
        claas_warning("cannot join %s: %s", sw->upstream_endpoint, text);
}

static cJSON *hello_body(struct claas_switch *sw, const char *token)
{
    cJSON *body = cJSON_CreateObject(), *actors;
    char incarnation[32];

    claas_json_set_string(body, "node", sw->node_name);
    claas_json_set_string(body, "token", token);
    actors = claas_json_set(body, "actors", cJSON_CreateArray());
    for (struct route *route = zhashx_first(sw->routes); route; route = zhashx_next(sw->routes)) {
        cJSON *actor = cJSON_CreateObject();

        snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, route->incarnation);
        claas_json_set_string(actor, "name", route->name);
        claas_json_set_string(actor, "incarnation", incarnation);
        claas_json_set_bool(actor, "ready", route->ready);
        cJSON_AddItemToArray(actors, actor);
    }
    return body;
}

void node_send_hello(struct claas_switch *sw)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;
    char token[65];
    struct parcel parcel;
    int rc = node_token(sw->data, false, token);

    sw->hello_ms = claas_clock_ms();
    if (rc < 0) {
        note_refusal(sw, CLAAS_ERR_UNAVAILABLE, claas_error_text());
        return;
    }
    body = hello_body(sw, token);
    parcel_init(&parcel, CLAAS_KIND_HELLO, 0, ++sw->hello_count);
    parcel.header.epoch = sw->incarnation;
    if (parcel_pack(&parcel, body, NULL, 0) == 0)
        switch_send(sw, sw->upstream, "", "", "", &parcel);
}

/* Everything asked upstream fails now; the object stays for the next link. */
static void lose_link(struct claas_switch *sw, const char *why)
{
    if (!atomic_exchange(&sw->joined, false))
        return;
    claas_warning("lost the node at %s: %s", sw->upstream_endpoint, why);
    peer_bury(sw, sw->upstream);
    sw->upstream->seq_in = 0;
}

/* Main has answered this HELLO, and so knows the actors that were new in it or earlier. */
static void settle_actors(struct claas_switch *sw, uint64_t hello_id, int code, const char *text)
{
    for (struct peer *peer = zhashx_first(sw->inner_peers); peer;
         peer = zhashx_next(sw->inner_peers))
        if (peer->hello_id != 0 && peer->hello_id <= hello_id)
            switch_welcome(sw, peer, code, text);
}

static void take_welcome(struct claas_switch *sw, const struct parcel *parcel)
{
    settle_actors(sw, parcel->header.correlation, 0, NULL);
    if (sw->upstream->incarnation != parcel->header.epoch)
        lose_link(sw, "it was started again");
    sw->upstream->incarnation = parcel->header.epoch;
    pthread_mutex_lock(&sw->join_lock);
    sw->join_refusal = 0;
    pthread_mutex_unlock(&sw->join_lock);
    if (!atomic_exchange(&sw->joined, true))
        claas_info("joined %s as %s", sw->upstream_endpoint, sw->node_name);
}

static void take_pong(struct claas_switch *sw, const struct parcel *parcel)
{
    if (parcel->header.epoch != sw->upstream->incarnation)
        lose_link(sw, "it was started again");
    else if (!(parcel->header.flags & FLAG_JOINED))
        lose_link(sw, "it does not know this node any more");
    if (!atomic_load(&sw->joined))
        node_send_hello(sw);
}

static void send_simple(struct claas_switch *sw, struct peer *peer, enum claas_message_kind kind)
{
    struct parcel parcel;

    parcel_init(&parcel, kind, 0, 0);
    parcel.header.epoch = sw->incarnation;
    switch_send(sw, peer, "", "", "", &parcel);
}

/* An ERR without a type is about our HELLO. While we are joined, it is about a new actor's name. */
static void take_refusal(struct claas_switch *sw, struct parcel *parcel)
{
    struct envelope envelope;

    envelope_open(&envelope, parcel, HELLO_BODY_MAX);
    settle_actors(sw, envelope.message.header.correlation, envelope.message.error,
                  envelope.message.error_text);
    note_refusal(sw, envelope.message.error, envelope.message.error_text);
    envelope_close(&envelope);
}

static void take_link(struct claas_switch *sw, struct parcel *parcel, int rc)
{
    char from[CLAAS_NAME_MAX], principal[CLAAS_NAME_MAX];

    if (rc < 0) {
        claas_error("a broken message of %s: %s", sw->upstream_endpoint, claas_error_text());
        return;
    }
    switch_note(sw, sw->upstream, &parcel->header);
    switch (parcel->header.kind) {
    case CLAAS_KIND_WELCOME:
        take_welcome(sw, parcel);
        return;
    case CLAAS_KIND_PING:
        send_simple(sw, sw->upstream, CLAAS_KIND_PONG);
        return;
    case CLAAS_KIND_PONG:
        take_pong(sw, parcel);
        return;
    case CLAAS_KIND_BYE:
        lose_link(sw, "it stopped");
        return;
    default:
        break;
    }
    if (parcel->header.kind == CLAAS_KIND_ERR && parcel->header.type == 0) {
        take_refusal(sw, parcel);
        return;
    }
    memcpy(from, parcel->address[1], sizeof(from));
    memcpy(principal, parcel->address[2], sizeof(principal));
    switch_take(sw, sw->upstream, from, principal[0] ? principal : "local", parcel);
}

int on_link(zloop_t *loop, zsock_t *socket, void *arg)
{
    struct claas_switch *sw = arg;
    int rc = switch_drain(sw, socket, false, take_link);

    switch_send_credit(sw, sw->upstream);
    return rc;
}

void node_tick(struct claas_switch *sw, int64_t now_ms)
{
    if (atomic_load(&sw->joined) && now_ms - sw->upstream->heard_ms > SILENT_MS)
        lose_link(sw, "no answer for three seconds");
    if (!atomic_load(&sw->joined)) {
        settle_actors(sw, UINT64_MAX, 0, NULL); /* main will hear of them when it is back */
        if (now_ms - sw->hello_ms >= PING_MS / 4)
            node_send_hello(sw);
    } else if (now_ms - sw->ping_ms >= PING_MS) {
        sw->ping_ms = now_ms;
        send_simple(sw, sw->upstream, CLAAS_KIND_PING);
    }
}

void switch_leave(struct claas_switch *sw)
{
    if (sw->link && atomic_load(&sw->joined))
        send_simple(sw, sw->upstream, CLAAS_KIND_BYE);
    for (struct peer *peer = zhashx_first(sw->outer_peers); peer;
         peer = zhashx_next(sw->outer_peers))
        if (peer->kind == PEER_NODE)
            send_simple(sw, peer, CLAAS_KIND_BYE);
}
