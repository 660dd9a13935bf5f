/* A kept adapter on its way to a directory below staging/. Writing begins when it is kept, not when
 * it is asked for: the disk works while the next step does, and most candidates that are written
 * are replaced by a better one and removed. */
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
/* Whether it ended with an error: another one may fare better. */
bool staging_has_failed(const struct staging *staging);
/* Whether it was written and is there no more: storage, in another process, began anew meanwhile
 * and emptied the folder. */
bool staging_is_gone(const struct staging *staging);
const char *staging_directory(const struct staging *staging);
/* Nobody waits any more: what is being written is given up, and what was written and not moved away
 * is removed. */
void staging_drop(struct staging **staging);
/* Removes what trainers left that are no more, this one's earlier lives among them: storage does so
 * only when it starts itself, and lives on when a trainer in another process dies. */
void staging_sweep(struct trainer *trainer);

#endif
