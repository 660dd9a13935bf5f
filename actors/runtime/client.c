/* The blocking client: one DEALER, one request at a time.
 *
 * The socket connects only while someone listens (IMMEDIATE), so a request to nobody fails instead
 * of waiting in a queue; while it waits for the answer it pings once a second, and five seconds of
 * silence, or a PONG of another incarnation, mean that the server is gone or was started again and
 * that the answer will never come. */
#include "claas/client.h"

#include "frames.h"
#include "switch.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECT_MS 3000
#define PING_MS    1000
#define SILENT_MS  5000

struct claas_client {
    zsock_t *socket;
    char endpoint[512];
    uint64_t last_id;
    uint32_t link_seq;
    uint64_t server; /* incarnation of the server by its last PONG, 0 = unknown */
};

/* What one request waits for. */
struct wait {
    uint64_t id;
    int type;
    int64_t deadline_ms, heard_ms, ping_ms;
    claas_client_progress_fn *progress;
    void *arg;
    cJSON **ret_body;
};

/* libzmq connects in the background and never says that nobody listens on an ipc path. */
static int probe_ipc(const char *endpoint)
{
    const char *path = endpoint + strlen("ipc://");
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strncmp(endpoint, "ipc://", 6) != 0)
        return 0;
    if (claas_copy_text(address.sun_path, sizeof(address.sun_path), path) < 0)
        return claas_fail(CLAAS_ERR_LIMIT, "the path %s is too long for a socket", path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return claas_fail_errno("socket");
    int rc = connect(fd, (const struct sockaddr *)&address, sizeof(address));
    int number = errno;
    close(fd);
    if (rc < 0)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "no server at %s: %s", endpoint, strerror(number));
    return 0;
}

int claas_client_new(const char *endpoint, claas_client_t **ret)
{
    CLAAS_AUTO(claas_client_free) claas_client_t *client = CLAAS_NEW(claas_client_t);

    if (!client)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_zmq_setup();
    if (claas_copy_text(client->endpoint, sizeof(client->endpoint), endpoint) < 0)
        return claas_fail(CLAAS_ERR_LIMIT, "the address is too long");
    int rc = probe_ipc(endpoint);
    if (rc < 0)
        return rc;
    client->last_id = claas_random_seed() >> 16;
    client->socket = zsock_new(ZMQ_DEALER);
    if (!client->socket)
        return claas_fail(CLAAS_ERR_IO, "no socket: %s", zmq_strerror(errno));
    zsock_set_linger(client->socket, 1000);
    zsock_set_rcvtimeo(client->socket, 0);
    zsock_set_sndtimeo(client->socket, 0);
    zsock_set_immediate(client->socket, 1);
    zsock_set_maxmsgsize(client->socket, CLAAS_MESSAGE_BYTES);
    if (zsock_connect(client->socket, "%s", endpoint) < 0)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not an address: %s", endpoint,
                          zmq_strerror(errno));
    *ret = CLAAS_TAKE(client);
    return 0;
}

void claas_client_free(claas_client_t **client)
{
    if (!*client)
        return;
    zsock_destroy(&(*client)->socket);
    free(*client);
    *client = NULL;
}

/* --- sending ---------------------------------------------------------------------------------- */

/* Waits until the socket can take (POLLOUT) or has (POLLIN) a message; false at the deadline. */
static bool await(claas_client_t *client, short events, int64_t until_ms)
{
    zmq_pollitem_t item = {zsock_resolve(client->socket), 0, events, 0};

    for (;;) {
        int64_t left = until_ms - claas_clock_ms();

        if (zmq_poll(&item, 1, left > 0 ? (long)left : 0) > 0)
            return true;
        if (left <= 0)
            return false;
    }
}

static int send_parcel(claas_client_t *client, struct parcel *parcel)
{
    parcel->header.link_seq = ++client->link_seq;
    return parcel_send(client->socket, NULL, parcel);
}

static int send_simple(claas_client_t *client, enum claas_message_kind kind, int type, uint64_t id)
{
    struct parcel parcel;

    parcel_init(&parcel, kind, type, id);
    return send_parcel(client, &parcel);
}

static int send_request(claas_client_t *client, const char *to, const cJSON *body,
                        const struct wait *wait, int64_t timeout_ms)
{
    int64_t connect = timeout_ms < CONNECT_MS ? timeout_ms : CONNECT_MS;
    struct parcel parcel;
    int rc = claas_message_check(wait->type, CLAAS_PART_REQUEST, body);

    if (rc < 0)
        return rc;
    if (!name_valid(to))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not the name of an actor", to);
    if (timeout_ms <= 0)
        return claas_fail(CLAAS_ERR_DEADLINE, "no time is left to ask %s", to);
    parcel_init(&parcel, CLAAS_KIND_REQ, wait->type, wait->id);
    parcel.header.budget_ms = (uint32_t)(timeout_ms < UINT32_MAX ? timeout_ms : UINT32_MAX);
    parcel.header.attempt = 1;
    parcel_address(&parcel, to, NULL, NULL);
    rc = parcel_pack(&parcel, body, NULL, 0);
    if (rc < 0)
        return rc;
    if (!await(client, ZMQ_POLLOUT, claas_clock_ms() + connect)) {
        parcel_done(&parcel);
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "no server answers at %s", client->endpoint);
    }
    return send_parcel(client, &parcel);
}

/* --- waiting ---------------------------------------------------------------------------------- */

/* 1: the request has ended well, 0: goes on, < 0: it has failed. */
static int take_answer(struct wait *wait, struct parcel *parcel)
{
    struct envelope envelope;
    int rc = envelope_open(&envelope, parcel, CLAAS_MESSAGE_BYTES);
    claas_message_t *message = &envelope.message;

    if (message->kind == CLAAS_KIND_ERR) {
        rc = claas_fail(message->error, "%s", message->error_text);
    } else if (rc == 0 && message->kind == CLAAS_KIND_PROGRESS) {
        if (wait->progress)
            wait->progress(wait->arg, message->body);
    } else if (rc == 0) {
        if (wait->ret_body)
            *wait->ret_body = CLAAS_TAKE(message->body);
        rc = 1;
    }
    envelope_close(&envelope);
    return rc;
}

static int take_pong(claas_client_t *client, const struct parcel *parcel)
{
    if (client->server != 0 && client->server != parcel->header.epoch) {
        client->server = parcel->header.epoch;
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "the server was started again");
    }
    client->server = parcel->header.epoch;
    return 0;
}

/* Everything that has arrived. */
static int take_all(claas_client_t *client, struct wait *wait)
{
    struct parcel parcel;
    int rc, got;

    while ((got = parcel_receive(client->socket, false, &parcel)) != 0) {
        uint8_t kind = parcel.header.kind;

        if (got < 0)
            return got;
        wait->heard_ms = claas_clock_ms();
        rc = 0;
        if (kind == CLAAS_KIND_PONG)
            rc = take_pong(client, &parcel);
        else if ((kind == CLAAS_KIND_REP || kind == CLAAS_KIND_ERR ||
                  kind == CLAAS_KIND_PROGRESS) &&
                 parcel.header.correlation == wait->id)
            rc = take_answer(wait, &parcel);
        parcel_done(&parcel); /* answers to earlier requests are nobody's */
        if (rc != 0)
            return rc;
    }
    return 0;
}

static int look_at_clock(claas_client_t *client, struct wait *wait)
{
    int64_t now = claas_clock_ms();

    if (now >= wait->deadline_ms) {
        send_simple(client, CLAAS_KIND_CANCEL, wait->type, wait->id);
        return claas_fail(CLAAS_ERR_DEADLINE, "no answer in time");
    }
    if (now - wait->heard_ms > SILENT_MS)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "the server at %s went away", client->endpoint);
    if (now - wait->ping_ms >= PING_MS) {
        wait->ping_ms = now;
        if (send_simple(client, CLAAS_KIND_PING, 0, 0) < 0)
            return claas_fail(CLAAS_ERR_UNAVAILABLE, "the server at %s went away",
                              client->endpoint);
    }
    return 0;
}

int claas_client_request(claas_client_t *client, const char *to, int type, cJSON *body,
                         int64_t timeout_ms, claas_client_progress_fn *progress, void *arg,
                         cJSON **ret_body)
{
    CLAAS_AUTO(claas_json_free) cJSON *owned = body ? body : cJSON_CreateObject();
    int64_t now = claas_clock_ms();
    struct wait wait = {.id = ++client->last_id,
                        .type = type,
                        .deadline_ms = now + timeout_ms,
                        .progress = progress,
                        .arg = arg,
                        .ret_body = ret_body};
    int rc = send_request(client, to, owned, &wait, timeout_ms);

    if (ret_body)
        *ret_body = NULL;
    wait.heard_ms = claas_clock_ms();
    /* The first ping learns the server's incarnation while the request is under way. */
    while (rc == 0) {
        rc = look_at_clock(client, &wait);
        if (rc < 0)
            break;
        int64_t until = wait.ping_ms + PING_MS;
        await(client, ZMQ_POLLIN, until < wait.deadline_ms ? until : wait.deadline_ms);
        rc = take_all(client, &wait);
    }
    return rc < 0 ? rc : 0;
}
