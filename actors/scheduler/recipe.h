/* How a cycle is run on a base model: the settings that learn best by measurement
 * (docs/learning.md), by the model's fingerprint or name. The configuration can override each. */
#ifndef CLAAS_SCHEDULER_RECIPE_H
#define CLAAS_SCHEDULER_RECIPE_H

#include "claas/config.h"

#define RECIPE_FORMS_MAX 6

struct recipe {
    const char *match; /* fingerprint, or start of a lower-case model name; NULL = any model */
    int steps, rows;
    double rate, other_share;
    const char *forms[RECIPE_FORMS_MAX]; /* taken in turns, NULL-terminated if shorter */
    int form_count;
};

/* The model's row of the table with the configuration's cycle.* laid over it. */
struct recipe recipe_for(const claas_config_t *config, const char *fingerprint, const char *model);

#endif
