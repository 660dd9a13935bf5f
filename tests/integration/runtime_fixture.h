/* Actors for tests of the runtime, and a driver: an actor that asks on behalf of the test's thread.
 *
 * The answering actor ("storage") does what the `prefix` of an ADAPTER_LIST says: "" replies,
 * "fail" returns an error, "never" keeps the request, "later" replies after 50 ms, "block" sleeps
 * until the test lets it go, "die" ends the actor, "wrong" replies with a body that breaks the
 * catalogue, "ask" asks the actor named "other" and passes its answer on. */
#ifndef CLAAS_TEST_RUNTIME_FIXTURE_H
#define CLAAS_TEST_RUNTIME_FIXTURE_H

#include "claas/runtime.h"

struct probe;

/* One question of the driver; filled while it runs. Read after probe_await. */
struct question {
    const char *to, *prefix;
    int type;
    cJSON *body; /* else {"prefix": prefix} */
    const struct claas_attachment *attachments;
    size_t attachment_count;
    int64_t timeout_ms;
    bool is_tell;
    /* results */
    int sent; /* of claas_actor_ask */
    uint64_t id;
    int ends, progress, code;
    char text[256];
    char reply[4096];      /* the body, printed */
    double attachment_sum; /* of the reply's float attachments */
};

struct fixture {
    char dir[64];
    claas_config_t *config;
    claas_runtime_t *runtime;
    struct probe *probe;
};

/* A temporary data directory and a configuration for it; `extra` is one more override or NULL. */
void fixture_new(struct fixture *fixture, const char *extra);
/* Frees the runtime, then checks that every message sent was handled, refused, expired or lost. */
void fixture_free(struct fixture *fixture);
void fixture_start(struct fixture *fixture);

extern const struct claas_actor_class fake_class;   /* args = struct probe */
extern const struct claas_actor_class driver_class; /* args = struct probe */

/* What actors tell the test, and the test tells them. */
struct probe *probe_new(void);
void probe_free(struct probe **probe);
/* Posts a question to the driver and returns when it was sent. */
void probe_ask(struct probe *probe, struct question *question);
void probe_cancel(struct probe *probe, struct question *question);
/* Waits (10 s at most, then fails the test) until the question has ended. */
void probe_await(struct probe *probe, struct question *question);
void probe_await_progress(struct probe *probe, struct question *question, int count);
/* ask + await */
int probe_call(struct probe *probe, struct question *question);
/* Lets a handler that blocks go on. */
void probe_release(struct probe *probe);
/* Waits until a counter of the fakes has this value: "starts", "stops", "cancels", "kept",
 * "blocked", "handled". */
void probe_await_count(struct probe *probe, const char *name, int value);
int probe_count(struct probe *probe, const char *name);
/* How the fakes behave on drain: not done until probe_finish. */
void probe_hold_drain(struct probe *probe);
void probe_finish_drain(struct probe *probe);
/* The next n starts of a fake fail. */
void probe_fail_starts(struct probe *probe, int count);

double messages_unaccounted(void);

#endif
