/* Actors: one thread, one loop, one DEALER to the process's switch, a handler table, timers, file
 * descriptors and state of its own.
 *
 * An actor never blocks in a handler (> 10 ms): device work, files read in bulk and HTTP waits run
 * beside it and come back as readable descriptors or replies. Actors know each other by name and
 * message only.
 *
 *     static int handle_list(void *self, claas_message_t *message)
 *     {
 *         …
 *         return claas_actor_reply(actor, &message->reply_to, body);
 *     }
 *     static const struct claas_handler handlers[] = {{CLAAS_MSG_ADAPTER_LIST, handle_list}, …};
 *     const struct claas_actor_class claas_storage_class = {
 *         "storage", handlers, CLAAS_COUNT(handlers), start, drain, stop};
 *
 * Functions with a claas_actor_t are for that actor's own thread; the metrics are for any. Those
 * that return an int give 0 or more, or a negative code with its sentence (err.h). */
#ifndef CLAAS_ACTOR_H
#define CLAAS_ACTOR_H

#include "claas/json.h"
#include "claas/message.h"

typedef struct claas_actor claas_actor_t;

/* Handles a request: answers it at once, or copies reply_to and answers later. Returns 0, or < 0:
 * then the runtime answers with that code and claas_error_text(). The message is the runtime's and
 * lives until the handler returns. */
typedef int claas_handler_fn(void *self, claas_message_t *message);

struct claas_handler {
    int type; /* enum claas_message_type */
    claas_handler_fn *handle;
};

struct claas_actor_class {
    const char *name;
    const struct claas_handler *handlers;
    size_t handler_count;
    /* In the actor's thread. `args` is what the starter passed; *ret_self is given to every handler
     * and callback. On failure *ret_self stays NULL, or is something that `stop` can take. */
    int (*start)(claas_actor_t *actor, const void *args, void **ret_self);
    /* Refuses new work, and says whether none is left; if not, the runtime calls again every 50 ms
     * until the drain deadline. NULL = nothing to drain. */
    bool (*drain)(void *self);
    void (*stop)(void **self); /* frees *self and sets it to NULL */
};

/* "trainer.0"; borrowed from the actor. */
const char *claas_actor_name(const claas_actor_t *actor);
/* Ends the actor after the running handler or callback; its supervisor starts it again with
 * back-off and a new incarnation. For failures from which its state cannot be trusted (a broken
 * device, a damaged file). */
void claas_actor_fail(claas_actor_t *actor, int code, const char *text);

/* --- answering -------------------------------------------------------------------------------- */
/* `body` is taken, also on failure, and may be NULL for an empty object; attachments are copied.
 * Answers to a tell (correlation 0) are dropped. < 0: the answer broke the catalogue (the requester
 * gets an error instead) or did not go out. */
int claas_actor_reply(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body);
int claas_actor_reply_attached(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body,
                               const struct claas_attachment *attachments, size_t count);
/* A part of the answer; a reply or an error has to follow. */
int claas_actor_progress(claas_actor_t *actor, const struct claas_reply_to *to, cJSON *body);
int claas_actor_reply_error(claas_actor_t *actor, const struct claas_reply_to *to, int code,
                            const char *text);

/* --- asking ----------------------------------------------------------------------------------- */
/* Called for every PROGRESS and exactly once with the end: REP, or ERR with message->error set (the
 * peer's error, or DEADLINE / UNAVAILABLE made here). */
typedef void claas_reply_fn(void *self, void *arg, claas_message_t *reply);

struct claas_ask {
    const char *to; /* actor name; "trainer" = any trainer */
    int type;
    cJSON *body; /* taken */
    const struct claas_attachment *attachments;
    size_t attachment_count;
    int64_t timeout_ms;    /* budget; > 0 */
    const char *principal; /* on whose behalf; NULL = "local" */
    claas_reply_fn *reply; /* may be NULL */
    void *arg;             /* given to `reply` */
};
/* Returns 0 and the request's id (ret_id may be NULL), or < 0 when it could not be sent: then the
 * callback is never called. */
int claas_actor_ask(claas_actor_t *actor, const struct claas_ask *ask, uint64_t *ret_id);
/* Drops the callback and tells the peer (CANCEL). An id that has ended is fine. */
void claas_actor_cancel(claas_actor_t *actor, uint64_t id);
/* One way, no answer; `body` is taken. */
int claas_actor_tell(claas_actor_t *actor, const char *to, int type, cJSON *body);
/* An event for all subscribers (PUB, topic = message name); `body` is taken. Never blocks, may be
 * lost. */
void claas_actor_publish(claas_actor_t *actor, int type, cJSON *body);

/* Called when a requester gives up on a request that this actor is still answering. */
typedef void claas_cancel_fn(void *self, const struct claas_reply_to *to);
void claas_actor_on_cancel(claas_actor_t *actor, claas_cancel_fn *fn);

/* --- time and descriptors --------------------------------------------------------------------- */
typedef void claas_timer_fn(void *self, void *arg);
/* Calls `fn` once after delay_ms; returns an id > 0. For a period, set it again in the callback. */
int claas_actor_timer(claas_actor_t *actor, int64_t delay_ms, claas_timer_fn *fn, void *arg);
void claas_actor_timer_cancel(claas_actor_t *actor, int timer);
typedef void claas_watch_fn(void *self, int fd);
/* Calls `fn` as long as `fd`, which stays the caller's, is readable. At most 64 (LIMIT). Unwatch
 * before closing it. */
int claas_actor_watch(claas_actor_t *actor, int fd, claas_watch_fn *fn);
void claas_actor_unwatch(claas_actor_t *actor, int fd);

/* --- counters --------------------------------------------------------------------------------- */
/* A row of metrics.def (enum claas_metric): adds to a counter or gauge, sets a gauge, counts a
 * value into a histogram. Any thread. */
void claas_metric_add(int metric, double value);
void claas_metric_set(int metric, double value);
void claas_metric_observe(int metric, double value);
/* The value now (the sum, for a histogram): for health pages and tests. */
double claas_metric_value(int metric);

#endif
