/* The HTTP server: a libmicrohttpd daemon driven by the actor's loop, its connections, and their
 * deadlines.
 *
 * The actor watches one descriptor: an epoll set of our own (the "outer" one) that holds the
 * daemon's epoll set, a timer for the daemon's time-outs, and hang-up watches on suspended
 * connections. All work on the daemon is done by the pump, in the actor's thread, never from inside
 * a callback of the daemon. The pump calls MHD_run until there is nothing to do, because the inner
 * epoll set is edge triggered: to ignore a time-out of 0 from MHD_get_timeout would be to lose a
 * wake-up. */
#ifndef CLAAS_BRIDGE_HTTP_SERVER_H
#define CLAAS_BRIDGE_HTTP_SERVER_H

#include <microhttpd.h>

#include "claas/actor.h"
#include "claas/config.h"

struct request;
struct share;

/* What a connection waits for; each has its own deadline. */
enum peer_phase {
    PEER_HEADERS, /* from accept, or the first byte of a further request */
    PEER_BODY,
    PEER_WORK, /* with the actors; their deadlines count */
    PEER_ANSWER,
    PEER_IDLE, /* keep-alive between requests */
};

struct peer {
    struct http_server *server;
    struct peer *next, **link;
    uint64_t id; /* epoll's tag: an event for a closed connection finds no peer with its id */
    int fd;
    enum peer_phase phase;
    int64_t deadline_ms;     /* claas_clock_ms(), 0 = none */
    uint64_t bytes_received; /* of the socket, when PEER_IDLE began */
    const char *target_end;  /* of this request, in the daemon's buffer; only to compare with */
    bool bad_target;         /* of the request whose headers come in */
    bool watched;
    struct request *request; /* or NULL */
};

struct http_server {
    claas_actor_t *actor;
    const claas_config_t *config;
    struct MHD_Daemon *daemon;
    int outer, timer_fd, listen_fd, port;
    struct peer *peers;
    size_t peer_count;
    uint64_t last_peer;
    struct request *requests; /* alive, newest first */
    size_t inflight;          /* of them, those that count against http.max_inflight */
    struct share *shares;     /* of the users among them; see shares.h */
    size_t body_bytes;        /* request bodies in memory */
    int64_t max_body, max_import, max_inflight, max_inflight_per_user;
    int64_t header_ms, body_ms, idle_ms, sweep_ms;
    int sweep_timer;
    bool pumping; /* inside MHD_run */
    bool again;   /* one more MHD_run is needed */
    bool draining;
};

/* Binds config "listen" (`port_hint` > 0 replaces port 0) and starts serving. */
int http_server_start(struct http_server *server, claas_actor_t *actor,
                      const claas_config_t *config, int port_hint);
/* Stops accepting, closes idle connections; true when no request is left. */
bool http_server_drain(struct http_server *server);
/* Cuts off what is left and frees everything; safe on a half-started server. */
void http_server_stop(struct http_server *server);
/* Lets the daemon work; to be called after every resume. Called from within itself it only notes
 * that there is more to do. */
void http_server_pump(struct http_server *server);

void peer_set_phase(struct peer *peer, enum peer_phase phase);
/* Hang-up watch of a suspended connection, one shot. */
void peer_watch(struct peer *peer);
void peer_unwatch(struct peer *peer);

#endif
