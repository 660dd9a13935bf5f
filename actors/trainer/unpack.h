/* The files of a PEFT directory out of an uploaded zip. Reads and writes in bulk: not for an
 * actor's loop (imports.h runs it beside one). */
#ifndef CLAAS_TRAINER_UNPACK_H
#define CLAAS_TRAINER_UNPACK_H

#include <stdatomic.h>

#include "claas/model.h"

struct unpack_order {
    const struct claas_model_config *model;
    const char *zip_path;
    const char *directory;   /* new */
    const atomic_bool *stop; /* breaks it off: CANCELLED */
};

/* TOO_LARGE for a zip that no adapter of this model needs, before a byte of it is read. */
int unpack_check_size(const struct claas_model_config *model, const char *zip_path);
/* Refuses what is no adapter; sentences name files as the zip does. */
int unpack_adapter(const struct unpack_order *order);

#endif
