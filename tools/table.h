/* Tables for people, or the same as JSON (libsmartcols): one description for both. */
#ifndef CLAAS_TOOLS_TABLE_H
#define CLAAS_TOOLS_TABLE_H

#include <stdbool.h>
#include <stdint.h>

#include "claas/json.h"

enum table_kind {
    TABLE_TEXT,
    TABLE_NUMBER, /* to the right; a number in JSON */
    TABLE_TIME,   /* Unix ms: local time for people, the number in JSON */
    TABLE_FREE,   /* text that is cut where the terminal ends */
};

/* One column: the member of each object that it shows. */
struct table_column {
    const char *key;
    const char *title;
    enum table_kind kind;
};

/* Prints an array of objects. `name` is the member that holds it in JSON. Returns < 0 when out of
 * memory. */
int table_print(const char *name, const struct table_column *columns, size_t count,
                const cJSON *rows, bool json);
/* "2026-11-24 09:15:00", local time; "" for 0. */
void table_time(int64_t unix_ms, char *text, size_t size);

#endif
