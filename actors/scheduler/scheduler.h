/* The scheduler: takes feedback in, and drives every adapter's learning cycles as a state machine
 * (queued, batched, training, gating, publishing, done | rejected | failed | cancelled). Each
 * transition is on disk, by storage, before anybody is told. */
#ifndef CLAAS_SCHEDULER_H
#define CLAAS_SCHEDULER_H

#include "claas/actor.h"
#include "claas/config.h"

struct claas_scheduler_args {
    const claas_config_t *config;
};

/* Handles FEEDBACK, JOB_WATCH, JOB_CANCEL and JOBS_ENDED; asks "storage", "trainer" and "sampler".
 * Start argument: struct claas_scheduler_args. */
extern const struct claas_actor_class claas_scheduler_class;

#endif
