/* What the files of the switch share: its sockets, who is connected, which name is where, which
 * requests are under way.
 *
 *   peer      one connection: a local actor, a client, a node that joined, or the node that we
 *             joined (upstream, "main")
 *   route     one name: the peer to send to, the incarnation of the actor that has the name
 *   flight    one request under way: who asked, who answers */
#ifndef CLAAS_RUNTIME_SWITCH_INTERNAL_H
#define CLAAS_RUNTIME_SWITCH_INTERNAL_H

#include "frames.h"

#include "claas/actor.h"
#include "claas/metrics.h"

#include <stdatomic.h>
#include <sys/queue.h>

#define SWITCH_NAME        "switch"
#define EVENTS_ADDRESS     "*"

#define CLIENTS_MAX        4096
#define NODES_MAX          64
#define FLIGHTS_MAX        65536
#define FLIGHTS_CLIENT_MAX 1024
#define WAITING_BYTES_MAX  (256u << 20) /* of one mailbox */
#define OUTER_HWM          4096         /* messages on their way to a client */
#define UNREAD_BYTES_MAX   (64u << 20)  /* the same in bytes; half of it for new requests */
#define TICK_MS            250
#define CLIENT_IDLE_MS     600000 /* a silent client without requests is forgotten */
#define PING_MS            1000
#define SILENT_MS          3000 /* three missed answers */
#define HELLO_BODY_MAX     65536
#define NODE_ACTORS_MAX    256

enum peer_kind { PEER_ACTOR, PEER_CLIENT, PEER_NODE, PEER_UPSTREAM };

/* Requests and tells given to a peer that it has not taken from its mailbox yet: their sizes, first
 * in first out. */
struct mailbox {
    uint32_t *sizes;
    size_t first, count, capacity;
    size_t bytes;
};

LIST_HEAD(flight_list, flight);

struct peer {
    struct peer_id id;
    enum peer_kind kind;
    char name[CLAAS_NAME_MAX];
    uint64_t incarnation; /* of the actor, or of the node's process */
    struct mailbox waiting;
    struct flight_list asked, asked_of; /* requests by it, and to it */
    size_t asked_count;
    uint32_t seq_in, seq_out;
    uint16_t owed; /* requests taken from a node and not yet credited to it */
    int64_t heard_ms;
    struct backlog *backlog; /* of a client */
    uint64_t hello_id; /* of the HELLO by which main learns of this ready local actor; 0 = none */
    bool dead;         /* found out while sending; buried at the end of the pass */
};

struct route {
    char name[CLAAS_NAME_MAX];
    struct peer *peer;
    uint64_t incarnation;
    bool ready;
};

struct flight_key {
    uint64_t correlation;
    char requester[CLAAS_NAME_MAX];
};
struct flight {
    struct flight_key key;
    struct peer *requester, *receiver;
    char receiver_name[CLAAS_NAME_MAX];
    int type;
    uint64_t epoch;
    int64_t deadline_ms;
    uint8_t trace_id[16];
    LIST_ENTRY(flight) by_requester, by_receiver;
};

struct claas_switch {
    char endpoint[64];                                   /* inproc of the inner ROUTER */
    char data[4096], upstream_endpoint[4200], token[65]; /* the token is this node's own, as main */
    char node_name[CLAAS_NAME_MAX];
    uint64_t incarnation;
    size_t mailbox;

    zsock_t *inner, *outer, *events; /* outer and events: only without `connect` */
    zsock_t *link;                   /* DEALER to the node that has the rest */
    int lock_fd;
    zloop_t *loop;
    int stop_fd;
    pthread_t thread;
    bool running, stopping;
    int64_t started_ms;

    zhashx_t *inner_peers, *outer_peers; /* peer_id -> peer */
    zhashx_t *routes;                    /* name -> route */
    zhashx_t *flights;                   /* flight_key -> flight */
    size_t client_count, node_count, dead_count;
    uint64_t client_last;
    size_t turn; /* of "any trainer" */

    struct peer *upstream;
    _Atomic bool joined;
    pthread_mutex_t join_lock; /* of the next two, which claas_switch_joined reads */
    int join_refusal;          /* why the last HELLO failed; 0 = it did not */
    char join_text[256];
    int64_t hello_ms, ping_ms;
    uint64_t hello_count;
};

/* --- switch_peers.c: tables ------------------------------------------------------------------- */
int switch_tables_new(struct claas_switch *sw);
void switch_tables_free(struct claas_switch *sw);
struct peer *peer_new(struct claas_switch *sw, enum peer_kind kind, const struct peer_id *id);
/* Forgets it: fails the requests to it, cancels those by it, drops its names. */
void peer_bury(struct claas_switch *sw, struct peer *peer);
void peer_mark_dead(struct claas_switch *sw, struct peer *peer);
void switch_bury_dead(struct claas_switch *sw);
bool mailbox_has_room(const struct claas_switch *sw, const struct mailbox *box, size_t bytes);
int mailbox_put(struct mailbox *box, size_t bytes);
void mailbox_take(struct mailbox *box, size_t count);
struct route *route_find(struct claas_switch *sw, const char *name);
/* `name`, or the next ready one of `name`.N; NULL. */
struct route *route_pick(struct claas_switch *sw, const char *name);
int route_set(struct claas_switch *sw, const char *name, struct peer *peer, uint64_t incarnation,
              bool ready);
/* Removes a name and fails what was asked of it. */
void route_drop(struct claas_switch *sw, struct route *route);

/* --- switch_flights.c ------------------------------------------------------------------------- */
struct flight *flight_find(struct claas_switch *sw, const char *requester, uint64_t correlation);
struct flight *flight_new(struct claas_switch *sw, struct peer *requester,
                          const char *requester_name, struct peer *receiver,
                          const char *receiver_name, const struct claas_header *header);
void flight_free(struct claas_switch *sw, struct flight *flight);
/* ERR to the requester, then frees it. */
void flight_fail(struct claas_switch *sw, struct flight *flight, int code, const char *text);
/* ERR to the requester and CANCEL to the receiver, which may be working on it; then frees it. */
void flight_abort(struct claas_switch *sw, struct flight *flight, int code, const char *text);
/* CANCEL to the receiver, then frees it. */
void flight_cancel(struct claas_switch *sw, struct flight *flight);
void flights_fail_of(struct claas_switch *sw, struct peer *receiver, const char *receiver_name,
                     int code, const char *text);
void flights_cancel_by(struct claas_switch *sw, struct peer *requester, const char *requester_name);
void flights_expire(struct claas_switch *sw, int64_t now_ms);

/* --- switch_route.c: from a sender to a receiver ---------------------------------------------- */
/* The sender's name and principal are known; `parcel->address[0]` is the receiver. Takes the
 * parcel. */
void switch_take(struct claas_switch *sw, struct peer *sender, const char *from,
                 const char *principal, struct parcel *parcel);
/* Sends to a peer; marks it dead when it is gone. */
int switch_send(struct claas_switch *sw, struct peer *peer, const char *to, const char *from,
                const char *principal, struct parcel *parcel);
void switch_send_error(struct claas_switch *sw, struct peer *peer, const char *to,
                       const struct claas_header *about, int code, const char *text);
/* Counts a message that never got as far as a sender and receiver, and answers it if it can be. */
void switch_refuse(struct claas_switch *sw, struct peer *peer, const char *to,
                   const struct claas_header *about, int code);
/* Notes what every header carries: sequence number, credit, sign of life. */
void switch_note(struct claas_switch *sw, struct peer *peer, const struct claas_header *header);
void switch_send_credit(struct claas_switch *sw, struct peer *peer);

/* --- switch_outer.c, switch_join.c, switch_node.c --------------------------------------------- */
int on_outer(zloop_t *loop, zsock_t *socket, void *arg);
/* A node's HELLO: checks token and names, makes the peer a node. */
int join_take_hello(struct claas_switch *sw, struct peer *peer, const struct claas_header *header,
                    const cJSON *body);
void outer_tick(struct claas_switch *sw, int64_t now_ms);
int on_link(zloop_t *loop, zsock_t *socket, void *arg);
void node_tick(struct claas_switch *sw, int64_t now_ms);
/* Answers the HELLO of a local actor: WELCOME, or the error that ends it. */
void switch_welcome(struct claas_switch *sw, struct peer *peer, int code, const char *text);
/* Tells main the names of this node (again). */
void node_send_hello(struct claas_switch *sw);
/* BYE to nodes, or to main. */
void switch_leave(struct claas_switch *sw);
/* The node token of DATA/keys; `make` writes a new one if there is none. */
int node_token(const char *data, bool make, char ret[65]);

/* switch_status.c: the body of the switch's own STATUS reply. */
cJSON *switch_status(struct claas_switch *sw);

/* Reads up to 64 messages or 2 ms and gives each to `take`. */
typedef void switch_take_fn(struct claas_switch *sw, struct parcel *parcel, int rc);
int switch_drain(struct claas_switch *sw, zsock_t *socket, bool router, switch_take_fn *take);

#endif
