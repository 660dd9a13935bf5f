/* Names of adapters. A name becomes a path below the data directory, so it is taken apart and
 * judged here before anything else sees it; what passes is made of plain segments only.
 *
 * "-init" and "-latest" are aliases that the Python system kept in a file; here both are the
 * adapter itself, and are cut off wherever a name comes in, so no adapter's canonical name ends in
 * one. */
#include "names.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

#define SEGMENTS_MAX      2
#define SEGMENT_BYTES_MAX 128 /* a file name holds 255 bytes; a generation mark may follow */
#define VERSION_DIGITS    9

static bool is_plain(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
}

static int check_segment(const char *segment, size_t length, const char *text)
{
    if (length == 2 && memcmp(segment, "..", 2) == 0)
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: path traversal detected in '%s'",
                          claas_quote(text).text);
    if (length == 0 || (length == 1 && segment[0] == '.'))
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: empty path segment in '%s'",
                          claas_quote(text).text);
    if (length > SEGMENT_BYTES_MAX)
        return claas_fail(CLAAS_ERR_INVALID,
                          "Invalid lora_id: a segment of '%s' is longer than %d bytes",
                          claas_quote(text).text, SEGMENT_BYTES_MAX);
    for (size_t i = 0; i < length; i++)
        if (!is_plain(segment[i]))
            return claas_fail(CLAAS_ERR_INVALID,
                              "Invalid lora_id: '%s' may hold only letters, digits, '.', '_', '-' "
                              "and one '/'",
                              claas_quote(text).text);
    return 0;
}

/* Every segment is judged, also after the second, so that a traversal is reported as one. */
static int check_segments(const char *name, const char *text)
{
    int segments = 0;

    for (const char *segment = name;;) {
        size_t length = strcspn(segment, "/");
        int rc = check_segment(segment, length, text);

        if (rc < 0)
            return rc;
        segments++;
        if (segment[length] == '\0')
            break;
        segment += length + 1;
    }
    if (segments > SEGMENTS_MAX)
        return claas_fail(
            CLAAS_ERR_INVALID,
            "Invalid lora_id: '%s' has %d segments, a name is user/name or name alone",
            claas_quote(text).text, segments);
    return 0;
}

/* "@7" at the end; the text in front of it is left in `name`. */
static int cut_version(char *name, const char *text, int64_t *version)
{
    char *at = strchr(name, '@');
    size_t digits;

    *version = CLAAS_LORA_CURRENT;
    if (!at)
        return 0;
    digits = strspn(at + 1, "0123456789");
    if (digits == 0 || digits > VERSION_DIGITS || at[1 + digits] != '\0')
        return claas_fail(CLAAS_ERR_INVALID,
                          "Invalid lora_id: '%s' needs a version number behind the '@'",
                          claas_quote(text).text);
    *version = strtoll(at + 1, NULL, 10);
    *at = '\0';
    return 0;
}

static bool cut_suffix(char *name, const char *suffix)
{
    size_t length = strlen(name), cut = strlen(suffix);

    if (length <= cut || strcmp(name + length - cut, suffix) != 0 || name[length - cut - 1] == '/')
        return false;
    name[length - cut] = '\0';
    return true;
}

static void trim_slashes(char *name)
{
    size_t start = strspn(name, "/");
    size_t length = strlen(name + start);

    memmove(name, name + start, length + 1);
    while (length > 0 && name[length - 1] == '/')
        name[--length] = '\0';
}

int claas_lora_name_parse(const char *text, struct claas_lora_name *ret)
{
    struct claas_lora_name parsed;
    int rc;

    if (!text || claas_copy_text(parsed.name, sizeof(parsed.name), text) < 0)
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: longer than %d bytes",
                          CLAAS_LORA_NAME_BYTES - 1);
    trim_slashes(parsed.name);
    if (parsed.name[0] == '\0')
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: empty");
    rc = cut_version(parsed.name, text, &parsed.version);
    if (rc == 0)
        rc = check_segments(parsed.name, text);
    if (rc < 0)
        return rc;
    while (cut_suffix(parsed.name, "-init") || cut_suffix(parsed.name, "-latest"))
        continue;
    *ret = parsed;
    return 0;
}

int claas_lora_name_check_new(const struct claas_lora_name *name)
{
    if (strcmp(name->name, "base") == 0 || strcmp(name->name, "default") == 0)
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: '%s' is the base model's name",
                          name->name);
    if (name->version != CLAAS_LORA_CURRENT)
        return claas_fail(CLAAS_ERR_INVALID,
                          "Invalid lora_id: a new adapter's name has no version, use '%s'",
                          name->name);
    return 0;
}
