/* The one door for JSON: cJSON behind limits, UTF-8 checks and typed getters.
 *
 * cJSON alone accepts trailing garbage, control characters, broken UTF-8, "\u0000", duplicate keys
 * and looks keys up without regard to case; all of these are refused here. */
#ifndef CLAAS_JSON_H
#define CLAAS_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CLAAS_JSON_DEPTH_MAX 64
/* A value takes 64 bytes or more in memory, but perhaps only 2 in the text. */
#define CLAAS_JSON_VALUES_MAX (1 << 20)

/* Parses exactly `length` bytes (at most `limit`). Errors: TOO_LARGE, FORMAT (with line and
 * column), NO_MEMORY. */
int claas_json_parse(const char *text, size_t length, size_t limit, cJSON **ret);
/* The same for what our own actors wrote, without the bound on the number of values. */
int claas_json_parse_own(const char *text, size_t length, size_t limit, cJSON **ret);
/* Cleanup handler. */
void claas_json_free(cJSON **json);
/* Compact text of a tree; NULL when out of memory; free with free(). */
char *claas_json_print(const cJSON *json);

/* Case-sensitive look-up; NULL if absent. A JSON null counts as absent. */
const cJSON *claas_json_get(const cJSON *object, const char *key);

/* Typed getters: 0 and *ret as it was when the key is absent, 1 when its value is right, INVALID
 * with a sentence that names the key when it is not. Strings, arrays and objects are borrowed. */
int claas_json_get_string(const cJSON *object, const char *key, const char **ret);
int claas_json_get_bool(const cJSON *object, const char *key, bool *ret);
int claas_json_get_int(const cJSON *object, const char *key, int64_t min, int64_t max,
                       int64_t *ret);
int claas_json_get_number(const cJSON *object, const char *key, double min, double max,
                          double *ret);
int claas_json_get_array(const cJSON *object, const char *key, const cJSON **ret);
int claas_json_get_object(const cJSON *object, const char *key, const cJSON **ret);

/* Builders that never fail half-way: each adds to `object` and ignores a NULL object; the caller
 * checks the tree once at the end by printing it (a member that could not be made spoils its
 * object: the print is NULL). A key that is there is replaced. Broken UTF-8 becomes U+FFFD. 64-bit
 * integers beyond 2^53 are written as strings, and claas_json_get_int reads them back. */
void claas_json_set_string(cJSON *object, const char *key, const char *value);
void claas_json_set_int(cJSON *object, const char *key, int64_t value);
void claas_json_set_number(cJSON *object, const char *key, double value);
void claas_json_set_bool(cJSON *object, const char *key, bool value);
void claas_json_set_null(cJSON *object, const char *key);
/* Adds `child` (ownership moves) and returns it. */
cJSON *claas_json_set(cJSON *object, const char *key, cJSON *child);

/* True for well-formed UTF-8 without NUL. */
bool claas_utf8_valid(const char *text, size_t length);

#endif
