/* From text to values: numbers with units, lists, and the nearest known key for a misspelt one. */
#include "config_internal.h"

#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

struct unit {
    const char *name;
    double factor;
};

static const struct unit size_units[] = {
    {"", 1},
    {"B", 1},
    {"kB", 1e3},
    {"KB", 1e3},
    {"MB", 1e6},
    {"GB", 1e9},
    {"TB", 1e12},
    {"KiB", 1024.0},
    {"MiB", 1048576.0},
    {"GiB", 1073741824.0},
    {"K", 1024.0},
    {"M", 1048576.0},
    {"G", 1073741824.0},
    {"TiB", 1099511627776.0},
};
static const struct unit duration_units[] = {
    {"ms", 1}, {"s", 1000}, {"m", 60000}, {"min", 60000}, {"h", 3600000}, {"d", 86400000},
};

/* --- numbers ---------------------------------------------------------------------------------- */

static int check_range(const struct setting_row *row, const char *text, double value)
{
    if (!(value >= row->min && value <= row->max)) {
        if (row->type == SETTING_SIZE)
            return claas_fail(CLAAS_ERR_INVALID, "'%s' is out of range: %.0f to %.0f bytes", text,
                              row->min, row->max);
        if (row->type == SETTING_DURATION)
            return claas_fail(CLAAS_ERR_INVALID, "'%s' is out of range: %.0f to %.0f ms", text,
                              row->min, row->max);
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is out of range: %s to %s", text,
                          claas_number(row->min).text, claas_number(row->max).text);
    }
    return 0;
}

static int parse_int(const struct setting_row *row, const char *text, struct config_value *value)
{
    char *end;

    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (end == text || *end || errno == ERANGE || strspn(text, "+-0123456789") != strlen(text))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not an integer", text);
    value->integer = number;
    value->number = (double)number;
    return check_range(row, text, (double)number);
}

/* A decimal number at the start of `text`: no hexadecimal, no infinity, no nan. */
static bool scan_number(const char *text, double *ret, const char **ret_end)
{
    char *end;

    if (strspn(text, "+-.0123456789") == 0 || strncasecmp(text, "0x", 2) == 0)
        return false;
    errno = 0;
    *ret = strtod(text, &end);
    *ret_end = end;
    return end != text && isfinite(*ret);
}

static int parse_number(const struct setting_row *row, const char *text, struct config_value *value)
{
    const char *end;

    if (!scan_number(text, &value->number, &end) || *end)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not a number", text);
    if (value->number > -9e15 && value->number < 9e15)
        value->integer = (int64_t)value->number;
    return check_range(row, text, value->number);
}

static const struct unit *find_unit(const struct unit *units, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(units[i].name, name) == 0)
            return &units[i];
    return NULL;
}

static int parse_with_unit(const struct setting_row *row, const char *text,
                           struct config_value *value)
{
    bool is_size = row->type == SETTING_SIZE;
    const struct unit *units = is_size ? size_units : duration_units;
    size_t count = is_size ? CLAAS_COUNT(size_units) : CLAAS_COUNT(duration_units);
    double number;
    const char *end;

    if (!scan_number(text, &number, &end))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not a %s", text,
                          is_size ? "size (like 64MiB)" : "duration (like 30s)");
    end += strspn(end, " ");
    const struct unit *unit = find_unit(units, count, end);
    if (!unit && !*end && number == 0)
        unit = &units[0];
    if (!unit && !*end)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' needs a unit: ms, s, m, h or d", text);
    if (!unit)
        return claas_fail(CLAAS_ERR_INVALID, "'%s': unknown unit '%s', known are %s", text, end,
                          is_size ? "B, KiB, MiB, GiB, TiB, kB, MB, GB, TB" : "ms, s, m, h, d");
    int rc = check_range(row, text, number * unit->factor);
    if (rc < 0)
        return rc;
    value->integer = (int64_t)llround(number * unit->factor);
    value->number = (double)value->integer;
    return 0;
}

static int parse_bool(const char *text, struct config_value *value)
{
    static const char *const yes[] = {"true", "yes", "on", "1"};
    static const char *const no[] = {"false", "no", "off", "0"};

    for (size_t i = 0; i < CLAAS_COUNT(yes); i++) {
        if (strcasecmp(text, yes[i]) == 0 || strcasecmp(text, no[i]) == 0) {
            value->integer = strcasecmp(text, yes[i]) == 0;
            return 0;
        }
    }
    return claas_fail(CLAAS_ERR_INVALID, "'%s' is neither true nor false", text);
}

/* --- words and lists -------------------------------------------------------------------------- */

static int check_word(const struct setting_row *row, const char *text)
{
    size_t length = strlen(text);

    for (const char *at = row->words; *at;) {
        size_t word = strcspn(at, ",");

        if (word == length && strncmp(at, text, length) == 0)
            return 0;
        at += word;
        at += strspn(at, ", ");
    }
    return claas_fail(CLAAS_ERR_INVALID, "'%s' is none of %s", text, row->words);
}

static int parse_choice(const struct setting_row *row, const char *text)
{
    return !text[0] && !row->default_text[0] ? 0 : check_word(row, text);
}

static int add_entry(const struct setting_row *row, struct config_value *value, size_t count,
                     const char *text, size_t length)
{
    while (length > 0 && (*text == ' ' || *text == '\t')) {
        text++;
        length--;
    }
    while (length > 0 && (text[length - 1] == ' ' || text[length - 1] == '\t'))
        length--;
    if (length == 0)
        return claas_fail(CLAAS_ERR_INVALID, "an entry of the list is empty");
    value->entries[count] = claas_strndup(text, length);
    if (!value->entries[count])
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return row->words[0] ? check_word(row, value->entries[count]) : 0;
}

static int parse_list(const struct setting_row *row, const char *text, struct config_value *value)
{
    size_t commas = 0, count = 0;

    for (const char *at = text; *at; at++)
        commas += *at == ',';
    value->entries = CLAAS_NEW_ARRAY(char *, commas + 2);
    if (!value->entries)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (text[strspn(text, " \t")] == '\0')
        return 0;
    for (const char *at = text;; at++) {
        size_t length = strcspn(at, ",");
        int rc = add_entry(row, value, count++, at, length);

        if (rc < 0)
            return rc;
        at += length;
        if (!*at)
            return 0;
    }
}

/* --- all types -------------------------------------------------------------------------------- */

int config_parse_value(const struct setting_row *row, const char *text, struct config_value *value)
{
    if (!claas_utf8_valid(text, strlen(text)))
        return claas_fail(CLAAS_ERR_INVALID, "the value is not UTF-8");
    switch (row->type) {
    case SETTING_INT:
        return parse_int(row, text, value);
    case SETTING_NUMBER:
        return parse_number(row, text, value);
    case SETTING_BOOL:
        return parse_bool(text, value);
    case SETTING_SIZE:
    case SETTING_DURATION:
        return parse_with_unit(row, text, value);
    case SETTING_LIST:
        return parse_list(row, text, value);
    case SETTING_CHOICE:
        return parse_choice(row, text);
    case SETTING_STRING:
        break;
    }
    if (strlen(text) > 4096)
        return claas_fail(CLAAS_ERR_INVALID, "the value has %zu bytes, the limit is 4096",
                          strlen(text));
    return 0;
}

void config_value_done(struct config_value *value)
{
    for (size_t i = 0; value->entries && value->entries[i]; i++)
        free(value->entries[i]);
    free(value->entries);
    free(value->text);
    memset(value, 0, sizeof(*value));
}

/* --- did you mean ----------------------------------------------------------------------------- */

#define KEY_MAX 63

/* Edits (insert, delete, replace, swap neighbours) that lead from one key to the other
 * (optimal string alignment distance). */
static int distance(const char *a, const char *b)
{
    int rows[3][KEY_MAX + 2];
    int n = (int)strlen(a), m = (int)strlen(b);
    int *before = rows[0], *last = rows[1], *now = rows[2];

    for (int j = 0; j <= m; j++)
        last[j] = j;
    for (int i = 1; i <= n; i++) {
        now[0] = i;
        for (int j = 1; j <= m; j++) {
            int best = last[j - 1] + (a[i - 1] != b[j - 1]);

            if (last[j] + 1 < best)
                best = last[j] + 1;
            if (now[j - 1] + 1 < best)
                best = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                before[j - 2] + 1 < best)
                best = before[j - 2] + 1;
            now[j] = best;
        }
        int *spare = before;
        before = last;
        last = now;
        now = spare;
    }
    return last[m];
}

/* "drain" for "runtime.drain" is a frequent slip: the last part alone counts as close. */
static bool is_last_part(const char *key, const char *known)
{
    const char *dot = strrchr(known, '.');

    return dot && strcmp(dot + 1, key) == 0;
}

const char *config_closest(const char *key)
{
    const char *closest = NULL;
    int best = (int)strlen(key) / 3 + 1;

    if (strlen(key) > KEY_MAX)
        return NULL;
    for (size_t i = 0; i < setting_count; i++) {
        const char *known = setting_rows[i].key;
        int edits = is_last_part(key, known) ? 0 : distance(key, known);

        if (strlen(known) <= KEY_MAX && edits < best) {
            best = edits;
            closest = known;
        }
    }
    return closest;
}
