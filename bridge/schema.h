/* Checks of JSON bodies: one table of fields per body. Every fault is listed as {loc, msg, type},
 * with the words and types that clients of the Python system (FastAPI, pydantic) know. Unknown
 * fields are ignored. */
#ifndef CLAAS_BRIDGE_SCHEMA_H
#define CLAAS_BRIDGE_SCHEMA_H

#include "claas/json.h"

enum schema_type {
    SCHEMA_ANY,
    SCHEMA_STRING, /* min, max: characters */
    SCHEMA_INT,
    SCHEMA_NUMBER,
    SCHEMA_BOOL,
    SCHEMA_ARRAY, /* min, max: elements */
    SCHEMA_OBJECT,
};

/* min == max == 0: no bounds. A null counts as absent. */
struct schema_field {
    const char *name;
    enum schema_type type;
    bool required;
    double min, max;
};

/* The path to what is being checked: built on the stack, outermost first. */
struct schema_place {
    const struct schema_place *outer;
    const char *name; /* NULL: an index */
    int index;
};

/* Appends the faults of `object`, which lies at `place`, to the array `faults`. */
void schema_check(cJSON *faults, const struct schema_place *place, const cJSON *object,
                  const struct schema_field *fields, size_t count);
/* Appends one fault: pydantic's `type`, and the message. */
void schema_fault(cJSON *faults, const struct schema_place *place, const char *type,
                  const char *format, ...) __attribute__((format(printf, 4, 5)));

#endif
