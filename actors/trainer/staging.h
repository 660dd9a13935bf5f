/* A kept adapter on its way to a directory below staging/. Writing begins when the adapter is kept,
 * not when the directory is asked for, so that the disk works while the next step does. The price:
 * most candidates that are written are replaced by a better one and removed. */
#ifndef CLAAS_TRAINER_STAGING_H
#define CLAAS_TRAINER_STAGING_H

#include "trainer_internal.h"

struct staging;

/* Begins to write. The adapter is referenced for as long as that takes. */
int staging_start(struct trainer *trainer, claas_adapter_t *kept, struct staging **ret);
/* Calls back once, perhaps at once: the directory is complete and fsynced (error 0), or is not
 * there. */
typedef void staged_fn(struct trainer *trainer, void *arg, int error, const char *text);
void staging_await(struct staging *staging, staged_fn *done, void *arg);
/* Whether writing ended with an error; then it is worth a new try. */
bool staging_has_failed(const struct staging *staging);
/* Whether it was written and is gone: storage, in another process, was restarted and emptied the
 * folder. */
bool staging_is_gone(const struct staging *staging);
const char *staging_directory(const struct staging *staging);
/* Nobody waits any more: what is being written is given up, and what was written and not moved away
 * is removed. */
void staging_drop(struct staging **staging);
/* Removes what trainers of dead processes left, and this process's earlier trainer. Storage does so
 * too, but only when it starts itself, and it may live on when a trainer in another process
 * dies. */
void staging_sweep(struct trainer *trainer);

#endif
