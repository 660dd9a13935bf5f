/* Zips being written beside the storage actor's loop. */
#ifndef CLAAS_STORAGE_EXPORTS_H
#define CLAAS_STORAGE_EXPORTS_H

#include <stdbool.h>
#include <stdint.h>

#include "claas/actor.h"
#include "names.h"

struct exports;

struct export_order {
    struct claas_reply_to reply_to;
    char lora_id[CLAAS_LORA_NAME_BYTES];
    int64_t version;
    bool optimizer; /* with its state */
};

int exports_new(claas_actor_t *actor, struct exports **ret);
/* Breaks off what is being written; answers nobody any more. */
void exports_free(struct exports **exports);
/* Opens the version's files at once, writes a zip below `staging` in a thread, then answers the
 * order. OVERLOADED when too many are under way. */
int exports_start(struct exports *exports, const struct export_order *order, const char *directory,
                  const char *staging);
/* The asker has gone: what is written for it is broken off and removed. */
void exports_abandon(struct exports *exports, const struct claas_reply_to *to);
/* Removes zips that were written, but whose asker went away before it opened them. */
void exports_sweep(const struct exports *exports, const char *staging);
bool exports_idle(const struct exports *exports);
/* For the actor's watch on exports_fd. */
int exports_fd(const struct exports *exports);
void exports_finish(struct exports *exports);

#endif
