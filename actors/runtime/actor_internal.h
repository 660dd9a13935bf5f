/* What actor.c, actor_ask.c, actor_dispatch.c and actor_loop.c share, and what the supervisor sees
 * of an actor. */
#ifndef CLAAS_RUNTIME_ACTOR_INTERNAL_H
#define CLAAS_RUNTIME_ACTOR_INTERNAL_H

#include "frames.h"
#include "timers.h"

#include "claas/actor.h"

#include <stdatomic.h>

#define DRAIN_MESSAGES 64 /* of one wake-up */
#define DRAIN_MS       2
#define DRAIN_POLL_MS  50
#define WATCH_MAX      64

/* One request that waits for its answer. */
struct ask {
    uint64_t id;
    int type;
    char to[CLAAS_NAME_MAX];
    claas_reply_fn *reply;
    void *arg;
    struct timer *deadline;
};

struct watch {
    int fd;
    uint32_t generation; /* tells a stale event of an fd number that was used anew */
    claas_watch_fn *fn;
};

/* What an actor tells its supervisor; see supervisor.c. */
struct actor_owner {
    void *handle;
    void (*ready)(void *handle, int rc, const char *text);
    void (*alive)(void *handle); /* after each poke of the control descriptor */
    void (*drained)(void *handle);
};

struct claas_actor {
    const struct claas_actor_class *class;
    const void *args;
    char name[CLAAS_NAME_MAX];
    uint64_t incarnation;
    struct actor_owner owner;
    void *self;

    zsock_t *data; /* DEALER to the switch */
    zloop_t *loop;
    int epoll_fd; /* watches, timer and control behind one descriptor: zloop scans linearly */
    int timer_fd;
    int control_fd; /* the supervisor's eventfd: readable = look at the two requests below */
    const _Atomic bool *drain_request, *stop_request;

    struct timers timers;
    int64_t armed_ms; /* what timer_fd is set to; INT64_MAX = off */
    struct watch watches[WATCH_MAX];
    size_t watch_count;
    uint32_t watch_generation;
    zhashx_t *asks; /* id -> struct ask */
    uint64_t last_ask;
    claas_cancel_fn *on_cancel;

    uint32_t link_seq;
    uint16_t owed; /* messages handled and not yet credited to the switch */
    uint64_t handled;
    int64_t started_ms;
    uint8_t trace_id[16]; /* of the message being handled, else zero */
    uint64_t trace_seed;
    bool started, announced, draining, drained, stopping;
    int failure; /* claas_actor_fail */
    char failure_text[256];
};

struct actor_options {
    const struct claas_actor_class *class;
    const char *name, *endpoint; /* inproc of the switch */
    const void *args;
    uint64_t incarnation;
    int mailbox; /* of the switch; sizes the high-water marks */
    int control_fd;
    const _Atomic bool *drain_request, *stop_request;
    struct actor_owner owner;
};
/* An actor's whole life, in the calling thread: 0 after a stop request, else why it ended. */
int actor_run(const struct actor_options *options);

/* actor_dispatch.c: handles what the switch delivered. */
void actor_dispatch(claas_actor_t *actor, struct parcel *parcel);
/* actor_ask.c: ends every pending ask with this error; gives an answer to the ask it belongs to. */
void actor_end_asks(claas_actor_t *actor, int code, const char *text);
void actor_take_reply(claas_actor_t *actor, struct envelope *envelope);
/* actor.c: sends to the switch (takes the parcel), credit alone, the common STATUS reply; fills in
 * the ids of a trace. */
int actor_send(claas_actor_t *actor, struct parcel *parcel);
void actor_send_credit(claas_actor_t *actor);
void actor_answer_status(claas_actor_t *actor, claas_message_t *message);
void actor_trace(claas_actor_t *actor, uint8_t trace_id[16], uint8_t span_id[8]);
/* actor_loop.c: adds a timer of the runtime's own. */
struct timer *actor_set_timer(claas_actor_t *actor, int64_t delay_ms, timers_fn *fn, void *arg);

#endif
