/* The actors of a process: their threads, their restarts, their orderly end. */
#ifndef CLAAS_RUNTIME_SUPERVISOR_H
#define CLAAS_RUNTIME_SUPERVISOR_H

#include "claas/actor.h"

struct supervisor;

/* How patient it is; the defaults are in supervisor.c, tests set smaller ones. */
struct supervisor_limits {
    int64_t backoff_min_ms, backoff_max_ms;
    int restarts_max; /* of one actor within `window_ms`; one more ends the process */
    int64_t window_ms;
    int64_t poke_ms;           /* how often an actor is asked whether its loop still turns */
    int64_t slow_ms, stuck_ms; /* silence that is worth a line in the log; that ends the process */
    int64_t stop_ms;           /* how long a stopped actor's thread may take to end */
};
extern struct supervisor_limits supervisor_limits;

int supervisor_new(const char *endpoint, int mailbox, struct supervisor **ret);
/* Starts an actor and waits until it is ready or has failed. */
int supervisor_start(struct supervisor *supervisor, const struct claas_actor_class *actor_class,
                     const char *name, const void *args);
/* An eventfd that becomes readable whenever an actor changes its state. */
int supervisor_fd(const struct supervisor *supervisor);
/* 0, or why the process should end (an actor was started again too often, is stuck, or lost its
 * device), with the sentence in claas_error_text(). */
int supervisor_failure(struct supervisor *supervisor);
/* Asks the n-th actor, counted from the last one started, to finish its work; false past the
 * end. */
bool supervisor_drain(struct supervisor *supervisor, size_t index_from_last);
bool supervisor_is_drained(struct supervisor *supervisor, size_t index_from_last);
/* Stops all actors, the last one first. Returns false if a thread did not end within `wait_ms`: its
 * memory must stay. */
bool supervisor_stop(struct supervisor *supervisor, int64_t wait_ms);
void supervisor_free(struct supervisor **supervisor);

#endif
