/* The storage actor: the only writer of durable state. */
#ifndef CLAAS_STORAGE_H
#define CLAAS_STORAGE_H

#include "claas/actor.h"
#include "claas/config.h"

struct claas_storage_args {
    const claas_config_t *config; /* outlives the actor */
};

extern const struct claas_actor_class claas_storage_class;

#endif
