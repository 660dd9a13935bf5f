/* Sending and receiving parcels, frame by frame.
 *
 * zmsg_send and zmsg_recv are not used for the wire on purpose: zmsg_send loses a frame on EINTR
 * and leaks one on EAGAIN, zmsg_recv takes whatever a peer sends. Here a message beyond the limits
 * is read to its end without being kept, and a message is sent as a whole or not at all: only its
 * first frame can be refused (a ROUTER checks the routing id, a DEALER picks a pipe). Should a pipe
 * die in the middle, the rest is still written, because libzmq then swallows frames up to the one
 * without MORE; stopping early would swallow the next message instead. */
#include "frames.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

void parcel_done(struct parcel *parcel)
{
    zmsg_destroy(&parcel->load);
    parcel->bytes = 0;
}

void parcel_init(struct parcel *parcel, enum claas_message_kind kind, int type,
                 uint64_t correlation)
{
    memset(parcel, 0, sizeof(*parcel));
    parcel->header.version = CLAAS_PROTOCOL_VERSION;
    parcel->header.kind = (uint8_t)kind;
    parcel->header.type = (uint16_t)type;
    parcel->header.correlation = correlation;
}

void parcel_address(struct parcel *parcel, const char *first, const char *second, const char *third)
{
    const char *fields[ADDRESS_FIELDS] = {first, second, third};

    for (int i = 0; i < ADDRESS_FIELDS; i++)
        claas_copy_text(parcel->address[i], CLAAS_NAME_MAX, fields[i] ? fields[i] : "");
}

bool name_valid(const char *name)
{
    size_t length = strlen(name);

    return length > 0 && length < CLAAS_NAME_MAX &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") ==
               length;
}

/* --- receiving -------------------------------------------------------------------------------- */

static int read_address(struct parcel *parcel, zframe_t *frame)
{
    const char *at = (const char *)zframe_data(frame);
    size_t left = zframe_size(frame);

    memset(parcel->address, 0, sizeof(parcel->address));
    for (int i = 0; i < ADDRESS_FIELDS; i++) {
        size_t length = strnlen(at, left);

        if (length >= CLAAS_NAME_MAX)
            return claas_fail(CLAAS_ERR_FORMAT, "a name in the address is longer than %d bytes",
                              CLAAS_NAME_MAX - 1);
        memcpy(parcel->address[i], at, length);
        if (length == left)
            return 0;
        at += length + 1;
        left -= length + 1;
    }
    return claas_fail(CLAAS_ERR_FORMAT, "the address has more than %d parts", ADDRESS_FIELDS);
}

static int read_header(struct parcel *parcel, zframe_t *frame)
{
    int rc = claas_header_decode(zframe_data(frame), zframe_size(frame), &parcel->header);

    /* Kind and correlation keep their place in every version. */
    parcel->readable = rc == 0 || rc == CLAAS_ERR_VERSION;
    return rc;
}

static int keep_frame(struct parcel *parcel, zframe_t **frame)
{
    parcel->bytes += zframe_size(*frame);
    if (parcel->bytes > CLAAS_MESSAGE_BYTES)
        return claas_fail(CLAAS_ERR_LIMIT, "the message is longer than %d bytes",
                          CLAAS_MESSAGE_BYTES);
    if (parcel->load && zmsg_size(parcel->load) > CLAAS_ATTACHMENT_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "the message has more than %d attachments",
                          CLAAS_ATTACHMENT_MAX);
    if (!parcel->load)
        parcel->load = zmsg_new();
    if (!parcel->load || zmsg_append(parcel->load, frame) < 0)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return 0;
}

/* One frame of a message into its place: 0 address, 1 header, then the load. */
static int take_frame(struct parcel *parcel, size_t place, zframe_t **frame)
{
    if (place == 0)
        return read_address(parcel, *frame);
    if (place == 1)
        return read_header(parcel, *frame);
    return keep_frame(parcel, frame);
}

static int check_frames(const struct parcel *parcel, size_t count)
{
    if (count < 3)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "the message has %zu frames, it needs address, header and body", count);
    zframe_t *body = zmsg_first(parcel->load);
    if (zframe_size(body) != parcel->header.body_len)
        return claas_fail(CLAAS_ERR_FORMAT, "the body has %zu bytes, the header says %u",
                          zframe_size(body), parcel->header.body_len);
    return 0;
}

/* The routing id that a ROUTER puts in front. */
static int read_peer(struct parcel *parcel, zframe_t *frame)
{
    size_t length = zframe_size(frame);

    if (length > sizeof(parcel->peer.bytes))
        return claas_fail(CLAAS_ERR_FORMAT, "routing id of %zu bytes", length);
    parcel->peer.length = (uint8_t)length;
    memcpy(parcel->peer.bytes, zframe_data(frame), length);
    return 0;
}

int parcel_receive(zsock_t *socket, bool router, struct parcel *ret)
{
    size_t place = 0;
    bool more, first = router;
    int rc = 0;

    memset(ret, 0, sizeof(*ret));
    do {
        zframe_t *frame = zframe_recv(socket);

        if (!frame) {
            if (errno == EINTR && (place > 0 || first != router)) {
                more = true; /* the rest of a message is there: parts arrive together */
                continue;
            }
            break;
        }
        more = zframe_more(frame) != 0;
        if (first) {
            rc = read_peer(ret, frame);
            first = false;
        } else {
            if (rc == 0)
                rc = take_frame(ret, place, &frame);
            place++;
        }
        zframe_destroy(&frame);
    } while (more);

    if (place == 0 && first == router)
        return 0;
    if (rc == 0)
        rc = check_frames(ret, place);
    if (rc < 0)
        parcel_done(ret);
    return rc < 0 ? rc : 1;
}

/* --- backlog ---------------------------------------------------------------------------------- */

struct backlog {
    _Atomic size_t bytes;
    _Atomic size_t users; /* the sender (1), and one for each header that is not written yet */
};

struct counted_header {
    uint8_t bytes[CLAAS_HEADER_BYTES];
    struct backlog *backlog;
    size_t load;
};

struct backlog *backlog_new(void)
{
    struct backlog *backlog = CLAAS_NEW(struct backlog);

    if (backlog)
        backlog->users = 1;
    return backlog;
}

void backlog_drop(struct backlog **backlog)
{
    if (*backlog && atomic_fetch_sub(&(*backlog)->users, 1) == 1)
        free(*backlog);
    *backlog = NULL;
}

size_t backlog_bytes(const struct backlog *backlog)
{
    return backlog ? atomic_load(&backlog->bytes) : 0;
}

/* In libzmq's thread, or where sending failed. */
static void header_done(void *data, void *hint)
{
    struct counted_header *header = hint;

    (void)data;
    atomic_fetch_sub(&header->backlog->bytes, header->load);
    backlog_drop(&header->backlog);
    free(header);
}

/* A message's header, counted with its load; one that cannot be counted goes out all the same. */
static bool count_header(const struct parcel *parcel, const uint8_t bytes[], zmq_msg_t *ret)
{
    struct counted_header *header = parcel->backlog ? CLAAS_NEW(struct counted_header) : NULL;

    if (!header)
        return false;
    memcpy(header->bytes, bytes, sizeof(header->bytes));
    header->backlog = parcel->backlog;
    header->load = sizeof(header->bytes) + parcel->bytes;
    if (zmq_msg_init_data(ret, header->bytes, sizeof(header->bytes), header_done, header) < 0) {
        free(header);
        return false;
    }
    atomic_fetch_add(&header->backlog->users, 1);
    atomic_fetch_add(&header->backlog->bytes, header->load);
    return true;
}

/* --- sending ---------------------------------------------------------------------------------- */

static size_t write_address(const struct parcel *parcel, char bytes[])
{
    size_t length = 0;
    int last = ADDRESS_FIELDS - 1;

    while (last > 0 && !parcel->address[last][0])
        last--;
    for (int i = 0; i <= last; i++) {
        size_t part = strlen(parcel->address[i]);

        if (i > 0)
            bytes[length++] = '\0';
        memcpy(bytes + length, parcel->address[i], part);
        length += part;
    }
    return length;
}

static int send_bytes(void *socket, const void *bytes, size_t length)
{
    int rc;

    do
        rc = zmq_send(socket, bytes, length, ZMQ_SNDMORE | ZMQ_DONTWAIT);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? -1 : 0;
}

static int send_header(void *socket, const struct parcel *parcel, const uint8_t bytes[])
{
    zmq_msg_t message;
    int rc, number;

    if (!count_header(parcel, bytes, &message))
        return send_bytes(socket, bytes, CLAAS_HEADER_BYTES);
    do
        rc = zmq_msg_send(&message, socket, ZMQ_SNDMORE | ZMQ_DONTWAIT);
    while (rc < 0 && errno == EINTR);
    number = errno;
    if (rc < 0)
        zmq_msg_close(&message);
    errno = number;
    return rc < 0 ? -1 : 0;
}

static int fail_send(int number)
{
    if (number == EAGAIN)
        return claas_fail(CLAAS_ERR_OVERLOADED, "the link is full");
    if (number == EHOSTUNREACH)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "the receiver is gone");
    return claas_fail(CLAAS_ERR_IO, "sending: %s", zmq_strerror(number));
}

/* Body and attachments; the message is accepted already, so a failure only means that the peer has
 * just left. */
static int send_load(zsock_t *socket, zmsg_t *load)
{
    zframe_t *frame = load ? zmsg_pop(load) : NULL;
    int failure = 0;

    if (!frame && zmq_send(zsock_resolve(socket), "", 0, ZMQ_DONTWAIT) < 0)
        failure = errno;
    while (frame) {
        zframe_t *next = zmsg_pop(load);
        int rc = zframe_send(&frame, socket, ZFRAME_DONTWAIT | (next ? ZFRAME_MORE : 0));

        if (rc < 0)
            failure = errno;
        zframe_destroy(&frame);
        frame = next;
    }
    return failure;
}

int parcel_send(zsock_t *socket, const struct peer_id *peer, struct parcel *parcel)
{
    void *raw = zsock_resolve(socket);
    uint8_t header[CLAAS_HEADER_BYTES];
    char address[ADDRESS_FIELDS * CLAAS_NAME_MAX];
    size_t address_length = write_address(parcel, address);
    zframe_t *body = parcel->load ? zmsg_first(parcel->load) : NULL;
    int failure = 0;

    parcel->header.body_len = body ? (uint32_t)zframe_size(body) : 0;
    claas_header_encode(&parcel->header, header);
    if (peer && send_bytes(raw, peer->bytes, peer->length) < 0)
        failure = errno;
    else if (send_bytes(raw, address, address_length) < 0 && !peer)
        failure = errno;
    if (failure) {
        parcel_done(parcel);
        return fail_send(failure);
    }
    if (send_header(raw, parcel, header) < 0)
        failure = errno;
    int late = send_load(socket, parcel->load);
    parcel_done(parcel);
    return failure || late ? fail_send(EHOSTUNREACH) : 0;
}

/* --- packing ---------------------------------------------------------------------------------- */

int parcel_pack(struct parcel *parcel, const cJSON *body,
                const struct claas_attachment *attachments, size_t count)
{
    CLAAS_AUTO_FREE char *text = body ? claas_json_print(body) : claas_strdup("{}");
    CLAAS_AUTO(zmsg_destroy) zmsg_t *load = zmsg_new();

    if (!text || !load)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "a body could not be written");
    if (count > CLAAS_ATTACHMENT_MAX)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "%zu attachments, the limit is %d", count,
                          CLAAS_ATTACHMENT_MAX);
    size_t bytes = strlen(text);
    if (zmsg_addmem(load, text, bytes) < 0)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < count; i++) {
        if (attachments[i].length > CLAAS_MESSAGE_BYTES - bytes)
            return claas_fail(CLAAS_ERR_TOO_LARGE, "a message of more than %d bytes",
                              CLAAS_MESSAGE_BYTES);
        bytes += attachments[i].length;
        if (zmsg_addmem(load, attachments[i].data, attachments[i].length) < 0)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    if (bytes > CLAAS_MESSAGE_BYTES)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "a message of more than %d bytes",
                          CLAAS_MESSAGE_BYTES);
    zmsg_destroy(&parcel->load);
    parcel->load = CLAAS_TAKE(load);
    parcel->bytes = bytes;
    parcel->header.codec = CLAAS_CODEC_JSON;
    return 0;
}

int parcel_pack_error(struct parcel *parcel, int code, const char *text)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "error", claas_err_name(code));
    claas_json_set_int(body, "code", code);
    claas_json_set_string(body, "text", text);
    if (code == CLAAS_ERR_OVERLOADED)
        claas_json_set_int(body, "retry_after_ms", 1000);
    if (code == CLAAS_ERR_VERSION)
        claas_json_set_int(body, "version", CLAAS_PROTOCOL_VERSION);
    return parcel_pack(parcel, body, NULL, 0);
}
