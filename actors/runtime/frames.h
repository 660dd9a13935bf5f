/* Frames of one message on a link: [address][header][body][attachment]….
 *
 * A parcel is what switch and actors pass around: address and header taken apart, body and
 * attachments as untouched frames, so that the switch never looks into a body. The address frame
 * holds up to three texts separated by NUL; which ones depends on the link:
 *     client -> switch    to
 *     switch -> client    from, principal
 *     actor  -> switch    to, principal
 *     switch -> actor     from, principal, arrival (monotonic ms)
 *     node  <-> switch    to, from, principal */
#ifndef CLAAS_RUNTIME_FRAMES_H
#define CLAAS_RUNTIME_FRAMES_H

#include "claas/message.h"

#include <czmq.h>

#define ADDRESS_FIELDS 3
/* Flag bits of the header. */
#define FLAG_READY  0x01 /* HELLO of an actor: it can be called now */
#define FLAG_JOINED 0x02 /* PONG: the asking node is known here */

struct peer_id {
    uint8_t length;
    uint8_t bytes[255];
};

/* Bytes that a socket holds for one peer, which may read slowly or not at all. libzmq's high-water
 * mark counts messages only. But libzmq frees a frame once it is written or its connection is gone,
 * so a message is counted until its header frame is freed: in libzmq's thread, perhaps after the
 * sender has dropped the backlog. */
struct backlog;
struct backlog *backlog_new(void);
void backlog_drop(struct backlog **backlog);
/* 0 for NULL. */
size_t backlog_bytes(const struct backlog *backlog);

struct parcel {
    struct peer_id peer; /* filled by a ROUTER */
    char address[ADDRESS_FIELDS][CLAAS_NAME_MAX];
    struct claas_header header;
    zmsg_t *load;            /* body, then attachments; NULL = an empty body */
    size_t bytes;            /* of the load */
    bool readable;           /* correlation and type of the header can be used in an answer */
    struct backlog *backlog; /* where it is counted when it is sent; NULL = nowhere */
};

void parcel_done(struct parcel *parcel);
/* Takes the next message of a socket: 1 there was one, 0 there was none, < 0 it broke a rule
 * (FORMAT, VERSION, LIMIT; the peer is filled, and `readable` says whether the header is). Never
 * blocks, given RCVTIMEO 0. */
int parcel_receive(zsock_t *socket, bool router, struct parcel *ret);
/* Sends all frames or none; the load is gone afterwards in any case. `peer` is for a ROUTER.
 * OVERLOADED: the pipe is full (or not connected yet), UNAVAILABLE: the peer is gone. */
int parcel_send(zsock_t *socket, const struct peer_id *peer, struct parcel *parcel);
/* A parcel of this kind with an empty load. */
void parcel_init(struct parcel *parcel, enum claas_message_kind kind, int type,
                 uint64_t correlation);
/* Fills the load from a body (NULL = {}) and attachments. TOO_LARGE, NO_MEMORY. `body` stays the
 * caller's. */
int parcel_pack(struct parcel *parcel, const cJSON *body,
                const struct claas_attachment *attachments, size_t count);
/* The body of an ERR. */
int parcel_pack_error(struct parcel *parcel, int code, const char *text);
void parcel_address(struct parcel *parcel, const char *first, const char *second,
                    const char *third);

/* A message opened for an actor or a client; the claas_message lives as long as this. */
struct envelope {
    claas_message_t message;
    zmsg_t *load;
    struct claas_attachment *attachments;
    void **copies; /* attachments that came unaligned, moved to aligned memory; NULL-terminated */
};
/* Parses the body, checks it (as request, progress or reply, by the kind) and lists the
 * attachments. Takes the parcel's load. `limit` is the largest body. After a failure the body is an
 * empty object, all else is filled in. */
int envelope_open(struct envelope *envelope, struct parcel *parcel, size_t limit);
/* An ERR that was made here. */
void envelope_error(struct envelope *envelope, int type, uint64_t correlation, const char *from,
                    int code, const char *text);
void envelope_close(struct envelope *envelope);

/* True for 1-63 characters of [A-Za-z0-9._-]. */
bool name_valid(const char *name);

#endif
