/* One HTTP request's life.
 *
 *   headers -> request_begin: guard, route, limits    (a refusal is remembered, the body dropped)
 *   body    -> request_take_body: kept up to the limit, or given to the route
 *   end     -> request_work: the route's function runs once. It answers, or asks actors and
 *              returns; the connection is then suspended until an answer is set
 *   answer  -> request_answer*, request_fail*, or a stream (sse.h); exactly one is sent
 *   over    -> request_end: pending asks are cancelled, everything is freed
 * A client that goes away while its connection is suspended ends the same way. A route never sees
 * any of this: it returns < 0 to fail (with claas_error_text()), and its callbacks are not called
 * once the request has an answer. All of it in the bridge's thread. */
#ifndef CLAAS_BRIDGE_REQUEST_H
#define CLAAS_BRIDGE_REQUEST_H

#include <microhttpd.h>

#include "claas/actor.h"
#include "claas/buf.h"
#include "http_server.h"
#include "routes.h"
#include "sse.h"

#define REQUEST_HEADERS_MAX 8

enum request_timer { TIMER_WAIT, TIMER_AGAIN, REQUEST_TIMERS };

/* < 0: the request fails with that code and claas_error_text(). */
typedef int request_reply_fn(struct request *request, claas_message_t *reply, void *arg);
typedef int request_fn(struct request *request);

struct request {
    struct http_server *server;
    struct peer *peer;
    struct MHD_Connection *connection;
    struct request *next, **link;
    const struct route *route; /* NULL: unknown path */
    char *path, *tail;         /* tail: what the route's wildcard matched, or NULL */
    char id[33];               /* x-request-id */
    char principal[CLAAS_NAME_MAX];
    const char *method; /* the daemon's */
    int64_t started_ns;
    bool head; /* HEAD: the answer has no body */

    struct claas_buf body;
    int64_t body_limit, body_received;
    bool drop_body;

    bool working;        /* the route's function was called */
    bool suspended;      /* the connection is suspended, and peer is watched */
    bool gone;           /* the client is gone; nothing more may be sent */
    bool counted;        /* in server->inflight */
    bool close;          /* answer with Connection: close */
    struct share *share; /* counted in it, too; or NULL */

    struct request_ask_entry *asks;
    struct {
        struct request *request;
        request_fn *fn;
        int id;
    } timers[REQUEST_TIMERS];
    request_fn *on_drain; /* the server stops: answer soon; may be NULL */

    int status;                    /* 0: no answer yet */
    struct MHD_Response *response; /* set and not yet handed to the daemon */
    struct {
        const char *name;
        char *value;
    } headers[REQUEST_HEADERS_MAX];
    size_t header_count;
    struct sse sse;

    void *state; /* the route's own */
    void (*state_free)(void *state);
};

/* --- called by the server --- */
enum MHD_Result request_begin(struct http_server *server, struct peer *peer,
                              struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, struct request **ret);
enum MHD_Result request_take_body(struct request *request, const char *data, size_t length);
enum MHD_Result request_work(struct request *request);
void request_end(struct request *request, bool complete);
/* The client went away, or must go. */
void request_gone(struct request *request);
void request_drain(struct request *request);

/* --- for routes --- */
struct request_ask {
    const char *to;
    int type;
    cJSON *body; /* taken */
    int64_t timeout_ms;
    request_reply_fn *reply; /* PROGRESS and REP */
    void *arg;
    bool sees_errors; /* reply is called for ERR too; else the request fails with it */
};
int request_ask(struct request *request, const struct request_ask *ask);
void request_cancel_asks(struct request *request);

/* Arms (or re-arms) a timer of the request. */
int request_timer(struct request *request, enum request_timer which, int64_t delay_ms,
                  request_fn *fn);
void request_timer_stop(struct request *request, enum request_timer which);

/* A query argument, NULL if absent; broken UTF-8 counts as INVALID. */
int request_query(struct request *request, const char *name, const char **ret);
const char *request_header_in(struct request *request, const char *name);
/* Parses the body as a JSON object (*ret is the caller's). If it is none, answers the request and
 * returns -1: the route then returns 0. */
int request_json(struct request *request, cJSON **ret);

/* To be called before work that may take long, with the adapter's name ("": the request names none;
 * NULL: a stream of a job's events): counts the request against http.max_inflight_per_user. If that
 * is reached, answers it and returns -1: the route then returns 0. */
int request_take_share(struct request *request, const char *name);

/* Adds a header to the answer to come. */
void request_header(struct request *request, const char *name, const char *value);
/* `body` is taken. */
void request_answer_json(struct request *request, int status, cJSON *body);
/* `text` is taken (free()). */
void request_answer_text(struct request *request, int status, const char *type, char *text);
/* `response` is taken; an answer that comes second is dropped. */
void request_answer(struct request *request, int status, struct MHD_Response *response);
/* The start of a stream: asks and timers stay. */
void request_answer_stream(struct request *request, int status, struct MHD_Response *response);
/* Resumes the connection; http_server_pump must follow (request_wait.c calls it after every
 * callback). */
void request_wake(struct request *request);
/* Suspends it: only for callbacks of the daemon. */
void request_sleep(struct request *request);
bool request_answered(const struct request *request);

#endif
