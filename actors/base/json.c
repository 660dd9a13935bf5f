/* The one door for JSON: cJSON behind the checks it does not make.
 *
 * cJSON builds the tree and checks the structure; everything it lets through (broken UTF-8, control
 * characters, BOM, 01 and 1., \u0000 and bad \u digits, infinite numbers, trailing text, duplicate
 * keys, 1000 levels) is refused by one scan before it and one walk after it. Grammar: RFC 8259. */
#include "claas/json.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#define EXACT_MAX    (INT64_C(1) << 53)        /* integers up to here are exact in a double */
#define PRINT_MAX    INT64_C(1000000000000000) /* beyond it cJSON may print 15 digits only */
#define NUMBER_BYTES 63                        /* cJSON reads no more of one number */
#define FEW_KEYS     8 /* below it comparing all pairs is cheaper than sorting */

struct scan {
    const char *text;
    size_t length;
    size_t at;
};

/* FORMAT with the place of `offset`: lines and columns count from 1, a column is a character. */
static int fail_at(const char *text, size_t offset, const char *what)
{
    size_t line = 1;
    size_t column = 1;

    for (size_t i = 0; i < offset; i++) {
        if (text[i] == '\n') {
            line++;
            column = 1;
        } else if (((unsigned char)text[i] & 0xC0) != 0x80) {
            column++;
        }
    }
    return claas_fail(CLAAS_ERR_FORMAT, "JSON line %zu, column %zu: %s", line, column, what);
}

static unsigned char peek(const struct scan *scan, size_t ahead)
{
    return scan->at + ahead < scan->length ? (unsigned char)scan->text[scan->at + ahead] : 0;
}

/* From the backslash on; leaves the rest of the escapes' rules to cJSON. */
static int scan_escape(struct scan *scan)
{
    bool zero = true;

    if (peek(scan, 1) != 'u') {
        scan->at += 2;
        return 0;
    }
    for (size_t i = 2; i < 6; i++) {
        if (!isxdigit(peek(scan, i)))
            return fail_at(scan->text, scan->at, "\\u without four hexadecimal digits");
        zero = zero && peek(scan, i) == '0';
    }
    if (zero)
        return fail_at(scan->text, scan->at, "\\u0000 is not allowed");
    scan->at += 6;
    return 0;
}

/* From the opening quote to just after the closing one. */
static int scan_string(struct scan *scan)
{
    size_t start = scan->at++;

    while (scan->at < scan->length) {
        unsigned char c = (unsigned char)scan->text[scan->at];

        if (c == '"') {
            scan->at++;
            return 0;
        }
        if (c < 0x20)
            return fail_at(scan->text, scan->at, "control character in a string");
        if (c == '\\') {
            int rc = scan_escape(scan);

            if (rc < 0)
                return rc;
        } else {
            scan->at++;
        }
    }
    return fail_at(scan->text, start, "string without an end");
}

static size_t skip_digits(struct scan *scan)
{
    size_t start = scan->at;

    while (isdigit(peek(scan, 0)))
        scan->at++;
    return scan->at - start;
}

/* -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)? */
static bool scan_number_grammar(struct scan *scan)
{
    if (peek(scan, 0) == '-')
        scan->at++;
    if (peek(scan, 0) == '0')
        scan->at++;
    else if (skip_digits(scan) == 0)
        return false;
    if (isdigit(peek(scan, 0)))
        return false;
    if (peek(scan, 0) == '.') {
        scan->at++;
        if (skip_digits(scan) == 0)
            return false;
    }
    if (peek(scan, 0) == 'e' || peek(scan, 0) == 'E') {
        scan->at++;
        if (peek(scan, 0) == '+' || peek(scan, 0) == '-')
            scan->at++;
        if (skip_digits(scan) == 0)
            return false;
    }
    return true;
}

static int scan_number(struct scan *scan)
{
    size_t start = scan->at;
    char digits[NUMBER_BYTES + 1];
    size_t length;

    if (!scan_number_grammar(scan))
        return fail_at(scan->text, start, "malformed number");
    length = scan->at - start;
    if (length > NUMBER_BYTES)
        return fail_at(scan->text, start, "number with too many digits");
    memcpy(digits, scan->text + start, length);
    digits[length] = '\0';
    if (!isfinite(strtod(digits, NULL)))
        return fail_at(scan->text, start, "number out of range");
    return 0;
}

/* What cJSON would let through. Brackets are only counted here, matching them is cJSON's work. */
static int scan_text(struct scan *scan, size_t values_max)
{
    int depth = 0;
    size_t values = 0;
    int rc = 0;

    while (rc == 0 && scan->at < scan->length) {
        unsigned char c = (unsigned char)scan->text[scan->at];

        if (c == '"') {
            rc = scan_string(scan);
        } else if (c == '-' || isdigit(c)) {
            rc = scan_number(scan);
        } else if ((c < 0x20 && c != '\t' && c != '\n' && c != '\r') || c > 0x7E) {
            rc = fail_at(scan->text, scan->at, "character outside of a string");
        } else {
            depth += (c == '[' || c == '{') - (c == ']' || c == '}');
            values += c == ',' || c == '[' || c == '{';
            if (depth > CLAAS_JSON_DEPTH_MAX)
                rc = fail_at(scan->text, scan->at, "nested too deeply");
            else if (values > values_max)
                rc = fail_at(scan->text, scan->at, "too many values");
            scan->at++;
        }
    }
    return rc;
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int fail_duplicate(const char *key)
{
    return claas_fail(CLAAS_ERR_FORMAT, "JSON: the key '%.100s' appears twice in one object", key);
}

static int check_keys(const cJSON *object)
{
    const cJSON *member;
    const cJSON *other;
    CLAAS_AUTO_FREE const char **keys = NULL;
    size_t count = 0;

    for (member = object->child; member; member = member->next)
        count++;
    if (count <= FEW_KEYS) {
        for (member = object->child; member; member = member->next)
            for (other = member->next; other; other = other->next)
                if (strcmp(member->string, other->string) == 0)
                    return fail_duplicate(member->string);
        return 0;
    }
    keys = CLAAS_NEW_ARRAY(const char *, count);
    if (!keys)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    count = 0;
    for (member = object->child; member; member = member->next)
        keys[count++] = member->string;
    qsort(keys, count, sizeof(*keys), compare_keys);
    for (size_t i = 1; i < count; i++)
        if (strcmp(keys[i - 1], keys[i]) == 0)
            return fail_duplicate(keys[i]);
    return 0;
}

/* Recursion is bounded by CLAAS_JSON_DEPTH_MAX. */
static int check_tree(const cJSON *item)
{
    const cJSON *child;
    int rc = cJSON_IsObject(item) ? check_keys(item) : 0;

    for (child = item->child; rc == 0 && child; child = child->next)
        if (child->child)
            rc = check_tree(child);
    return rc;
}

static int parse(const char *text, size_t length, size_t limit, size_t values_max, cJSON **ret)
{
    struct scan scan = {text, length, 0};
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    const uint8_t *broken;
    const char *end = NULL;
    int rc;

    if (length > limit)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "JSON of %zu bytes, the limit is %zu", length,
                          limit);
    if (length == 0)
        return claas_fail(CLAAS_ERR_FORMAT, "JSON expected, got nothing");
    broken = u8_check((const uint8_t *)text, length);
    if (broken)
        return fail_at(text, (size_t)((const char *)broken - text), "broken UTF-8");
    rc = scan_text(&scan, values_max);
    if (rc < 0)
        return rc;
    errno = 0;
    json = cJSON_ParseWithLengthOpts(text, length, &end, 0);
    if (!json && errno == ENOMEM)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory for a JSON tree");
    if (!json)
        return fail_at(text, end ? (size_t)(end - text) : 0, "syntax error");
    while (end < text + length && strchr(" \t\r\n", *end))
        end++;
    if (end != text + length)
        return fail_at(text, (size_t)(end - text), "text after the end of the value");
    rc = check_tree(json);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(json);
    return 0;
}

int claas_json_parse(const char *text, size_t length, size_t limit, cJSON **ret)
{
    return parse(text, length, limit, CLAAS_JSON_VALUES_MAX, ret);
}

int claas_json_parse_own(const char *text, size_t length, size_t limit, cJSON **ret)
{
    return parse(text, length, limit, SIZE_MAX, ret);
}

void claas_json_free(cJSON **json)
{
    cJSON_Delete(*json);
    *json = NULL;
}

char *claas_json_print(const cJSON *json)
{
    return json ? cJSON_PrintBuffered(json, 512, 0) : NULL;
}

const cJSON *claas_json_get(const cJSON *object, const char *key)
{
    const cJSON *item =
        cJSON_IsObject(object) ? cJSON_GetObjectItemCaseSensitive(object, key) : NULL;

    return item && !cJSON_IsNull(item) ? item : NULL;
}

int claas_json_get_string(const cJSON *object, const char *key, const char **ret)
{
    const cJSON *item = claas_json_get(object, key);

    if (!item)
        return 0;
    if (!cJSON_IsString(item))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be a string", key);
    *ret = item->valuestring;
    return 1;
}

int claas_json_get_bool(const cJSON *object, const char *key, bool *ret)
{
    const cJSON *item = claas_json_get(object, key);

    if (!item)
        return 0;
    if (!cJSON_IsBool(item))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be true or false", key);
    *ret = cJSON_IsTrue(item);
    return 1;
}

/* The forms that claas_json_set_int gives to large integers: `raw` for a number kept as digits,
 * else a string, which only an integer beyond 2^53 may be. */
static bool parse_big(const char *text, bool raw, int64_t *ret)
{
    char *end;
    long long value;

    if (!(isdigit((unsigned char)text[0]) || (text[0] == '-' && isdigit((unsigned char)text[1]))))
        return false;
    errno = 0;
    value = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || (!raw && value >= -EXACT_MAX && value <= EXACT_MAX))
        return false;
    *ret = value;
    return true;
}

int claas_json_get_int(const cJSON *object, const char *key, int64_t min, int64_t max, int64_t *ret)
{
    const cJSON *item = claas_json_get(object, key);
    int64_t value = 0;
    bool whole;

    if (!item)
        return 0;
    if (cJSON_IsString(item) || cJSON_IsRaw(item)) {
        whole = parse_big(item->valuestring, cJSON_IsRaw(item), &value);
    } else {
        double number = cJSON_IsNumber(item) ? item->valuedouble : 0.5;

        whole = number == floor(number);
        if (whole && fabs(number) > (double)EXACT_MAX)
            return claas_fail(CLAAS_ERR_INVALID,
                              "'%s' is beyond 2^53: a JSON number cannot hold it exactly", key);
        if (whole)
            value = (int64_t)number;
    }
    if (!whole)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be an integer", key);
    if (value < min || value > max)
        return claas_fail(CLAAS_ERR_INVALID,
                          "'%s' is %" PRId64 ", it must be from %" PRId64 " to %" PRId64, key,
                          value, min, max);
    *ret = value;
    return 1;
}

int claas_json_get_number(const cJSON *object, const char *key, double min, double max, double *ret)
{
    const cJSON *item = claas_json_get(object, key);

    if (!item)
        return 0;
    if (!cJSON_IsNumber(item))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be a number", key);
    if (!(item->valuedouble >= min && item->valuedouble <= max))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is %s, it must be from %s to %s", key,
                          claas_number(item->valuedouble).text, claas_number(min).text,
                          claas_number(max).text);
    *ret = item->valuedouble;
    return 1;
}

int claas_json_get_array(const cJSON *object, const char *key, const cJSON **ret)
{
    const cJSON *item = claas_json_get(object, key);

    if (!item)
        return 0;
    if (!cJSON_IsArray(item))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be an array", key);
    *ret = item;
    return 1;
}

int claas_json_get_object(const cJSON *object, const char *key, const cJSON **ret)
{
    const cJSON *item = claas_json_get(object, key);

    if (!item)
        return 0;
    if (!cJSON_IsObject(item))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be an object", key);
    *ret = item;
    return 1;
}

/* A tree that lost a member must not look whole: printing an object marked invalid gives NULL,
 * which is where the caller looks. */
static void spoil(cJSON *object)
{
    object->type = (object->type & ~0xFF) | cJSON_Invalid;
}

cJSON *claas_json_set(cJSON *object, const char *key, cJSON *child)
{
    bool added;

    if (!object || !child) {
        if (object)
            spoil(object);
        cJSON_Delete(child);
        return NULL;
    }
    if (cJSON_GetObjectItemCaseSensitive(object, key))
        added = cJSON_ReplaceItemInObjectCaseSensitive(object, key, child);
    else
        added = cJSON_AddItemToObject(object, key, child);
    if (added)
        return child;
    spoil(object);
    cJSON_Delete(child);
    return NULL;
}

/* Each byte that is no UTF-8 becomes U+FFFD, so that whatever is printed can be parsed again. */
static char *repair_utf8(const char *text)
{
    size_t length = strlen(text);
    char *repaired = claas_alloc(length + 1, 3);
    char *to = repaired;

    while (repaired && length > 0) {
        ucs4_t point;
        int used = u8_mbtoucr(&point, (const uint8_t *)text, length);

        if (used < 0) {
            memcpy(to, "\xEF\xBF\xBD", 3);
            to += 3;
            used = 1;
        } else {
            memcpy(to, text, (size_t)used);
            to += used;
        }
        text += used;
        length -= (size_t)used;
    }
    return repaired;
}

void claas_json_set_string(cJSON *object, const char *key, const char *value)
{
    CLAAS_AUTO_FREE char *repaired = NULL;

    if (!object)
        return;
    if (!value) {
        claas_json_set_null(object, key);
        return;
    }
    if (!claas_utf8_valid(value, strlen(value))) {
        repaired = repair_utf8(value);
        claas_json_set(object, key, repaired ? cJSON_CreateString(repaired) : NULL);
        return;
    }
    claas_json_set(object, key, cJSON_CreateString(value));
}

void claas_json_set_int(cJSON *object, const char *key, int64_t value)
{
    char digits[24];

    if (!object)
        return;
    snprintf(digits, sizeof(digits), "%" PRId64, value);
    if (value >= -PRINT_MAX && value <= PRINT_MAX)
        claas_json_set(object, key, cJSON_CreateNumber((double)value));
    else if (value >= -EXACT_MAX && value <= EXACT_MAX)
        claas_json_set(object, key, cJSON_CreateRaw(digits));
    else
        claas_json_set(object, key, cJSON_CreateString(digits));
}

void claas_json_set_number(cJSON *object, const char *key, double value)
{
    if (object) /* JSON has no NaN and no infinity: cJSON prints them as null */
        claas_json_set(object, key, cJSON_CreateNumber(value));
}

void claas_json_set_bool(cJSON *object, const char *key, bool value)
{
    if (object)
        claas_json_set(object, key, cJSON_CreateBool(value));
}

void claas_json_set_null(cJSON *object, const char *key)
{
    if (object)
        claas_json_set(object, key, cJSON_CreateNull());
}

bool claas_utf8_valid(const char *text, size_t length)
{
    return length == 0 || (!memchr(text, '\0', length) && !u8_check((const uint8_t *)text, length));
}
