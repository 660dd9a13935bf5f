/* Uploaded zips being unpacked beside the trainer's loop. */
#ifndef CLAAS_TRAINER_IMPORTS_H
#define CLAAS_TRAINER_IMPORTS_H

#include "trainer_internal.h"

/* The files are in the directory, or the error. Called once for each that was started. */
typedef void import_done_fn(struct trainer *trainer, void *arg, int error, const char *text);

int imports_new(struct trainer *trainer, struct imports **ret);
/* Breaks off what is being unpacked; `done` is told that the trainer stopped. */
void imports_free(struct imports **imports);
/* Unpacks the zip into a new directory in a thread. TOO_LARGE at once for more than any adapter of
 * the model takes, OVERLOADED when too many are under way. */
int imports_start(struct imports *imports, const char *zip_path, const char *directory,
                  import_done_fn *done, void *arg);
/* For the actor's watch on imports_fd. */
int imports_fd(const struct imports *imports);
void imports_finish(struct imports *imports);

#endif
