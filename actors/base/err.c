/* The error catalogue and the sentence of the last failure.
 *
 * One fixed buffer per thread: recording a failure must work when memory is gone, and must not need
 * an owner. Sentences are composed in a second buffer first, because the arguments may point into
 * the recorded sentence (`claas_fail(code, "step 3: %s", claas_error_text())`). */
#include "claas/err.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QUOTED_MAX 100

struct catalogue_row {
    int code;
    int http_status;
    const char *name;
    const char *text;
};

static const struct catalogue_row catalogue[] = {
#define X(name, code, http, text) {code, http, #name, text},
#include "claas/err.def"
#undef X
};

static _Thread_local char last_text[CLAAS_ERROR_TEXT_BYTES];

static const struct catalogue_row *find_row(int code)
{
    for (size_t i = 0; i < sizeof(catalogue) / sizeof(catalogue[0]); i++)
        if (catalogue[i].code == code)
            return &catalogue[i];
    return NULL;
}

const char *claas_err_name(int code)
{
    const struct catalogue_row *row = find_row(code);

    return row ? row->name : code >= 0 ? "OK" : "UNKNOWN";
}

const char *claas_err_text(int code)
{
    const struct catalogue_row *row = find_row(code);

    return row ? row->text : code >= 0 ? "success" : "unknown error";
}

int claas_err_http_status(int code)
{
    const struct catalogue_row *row = find_row(code);

    return row ? row->http_status : code >= 0 ? 200 : 500;
}

int claas_err_from_name(const char *name)
{
    for (size_t i = 0; name && i < sizeof(catalogue) / sizeof(catalogue[0]); i++)
        if (strcmp(catalogue[i].name, name) == 0)
            return catalogue[i].code;
    return CLAAS_ERR_INTERNAL;
}

const char *claas_error_text(void)
{
    return last_text;
}

/* A cut in the middle of a UTF-8 sequence would make the sentence unusable in JSON: drop the
 * stump. */
static void trim_broken_tail(char *text)
{
    size_t length = strlen(text);
    size_t start = length;
    unsigned char lead;
    size_t wanted;

    if (length + 1 < CLAAS_ERROR_TEXT_BYTES)
        return;
    while (start > 0 && length - start < 3 && ((unsigned char)text[start - 1] & 0xC0) == 0x80)
        start--;
    if (start == 0)
        return;
    lead = (unsigned char)text[start - 1];
    wanted = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (length - (start - 1) < wanted)
        text[start - 1] = '\0';
}

static void record(const char *text)
{
    memcpy(last_text, text, strlen(text) + 1);
}

int claas_fail(int code, const char *format, ...)
{
    char text[CLAAS_ERROR_TEXT_BYTES];
    va_list args;

    if (!format) {
        snprintf(text, sizeof(text), "%s", claas_err_text(code));
    } else {
        va_start(args, format);
        vsnprintf(text, sizeof(text), format, args);
        va_end(args);
        trim_broken_tail(text);
    }
    record(text);
    return code;
}

int claas_fail_context(int code, const char *format, ...)
{
    char text[CLAAS_ERROR_TEXT_BYTES] = "";
    va_list args;
    size_t length;

    if (format) {
        va_start(args, format);
        vsnprintf(text, sizeof(text), format, args);
        va_end(args);
    }
    length = strlen(text);
    snprintf(text + length, sizeof(text) - length, "%s",
             last_text[0] ? last_text : claas_err_text(code));
    trim_broken_tail(text);
    record(text);
    return code;
}

static bool is_in_names(char c)
{
    return c != '\0' && !strchr(" '\":,;()", c);
}

int claas_fail_hide_path(int code, const char *path, const char *word)
{
    size_t length = strlen(path), used = 0;
    char text[CLAAS_ERROR_TEXT_BYTES];
    char before = '\0';

    for (const char *from = last_text; *from && used + 1 < sizeof(text);) {
        bool found = length > 0 && !is_in_names(before) && strncmp(from, path, length) == 0;

        if (found && from[length] == '/') {
            from += length + 1;
        } else if (found && !is_in_names(from[length])) {
            from += length;
            used += (size_t)snprintf(text + used, sizeof(text) - used, "%s", word);
        } else {
            before = text[used++] = *from++;
        }
    }
    text[used < sizeof(text) ? used : sizeof(text) - 1] = '\0';
    trim_broken_tail(text);
    record(text);
    return code;
}

struct claas_quoted claas_quote(const char *text)
{
    struct claas_quoted quoted;
    size_t used = 0;

    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        char escaped[5];

        if (c == '\\')
            snprintf(escaped, sizeof(escaped), "\\\\");
        else if (c >= ' ' && c < 0x7f)
            snprintf(escaped, sizeof(escaped), "%c", c);
        else
            snprintf(escaped, sizeof(escaped), "\\x%02X", c);
        if (used + strlen(escaped) > QUOTED_MAX) {
            used += (size_t)snprintf(quoted.text + used, sizeof(quoted.text) - used, "…");
            break;
        }
        used += (size_t)snprintf(quoted.text + used, sizeof(quoted.text) - used, "%s", escaped);
    }
    quoted.text[used] = '\0';
    return quoted;
}

struct claas_number claas_number(double value)
{
    struct claas_number number;
    bool has_16_places = fabs(value) >= 1e15 && fabs(value) < 1e16; /* 15 would need an exponent */

    for (int digits = has_16_places ? 16 : 15; digits <= 17; digits++) {
        snprintf(number.text, sizeof(number.text), "%.*g", digits, value);
        if (strtod(number.text, NULL) == value)
            break;
    }
    return number;
}

static int code_of_errno(int number)
{
    switch (number) {
    case ENOSPC:
    case EDQUOT:
        return CLAAS_ERR_NO_SPACE;
    case ENOENT:
    case ENOTDIR:
        return CLAAS_ERR_NOT_FOUND;
    case ENOMEM:
        return CLAAS_ERR_NO_MEMORY;
    case EEXIST:
    case ENOTEMPTY:
        return CLAAS_ERR_EXISTS;
    case EACCES:
    case EPERM:
        return CLAAS_ERR_DENIED;
    case EINVAL:
    case ENAMETOOLONG:
    case EISDIR:
    case ELOOP:
        return CLAAS_ERR_INVALID;
    case EFBIG:
    case EOVERFLOW:
        return CLAAS_ERR_TOO_LARGE;
    case EMFILE:
    case ENFILE:
        return CLAAS_ERR_OVERLOADED; /* too much is open at once: nothing wrong with what was asked
                                      */
    case EAGAIN:
    case EBUSY:
    case ETXTBSY:
        return CLAAS_ERR_BUSY;
    case ETIMEDOUT:
        return CLAAS_ERR_DEADLINE;
    case ECANCELED:
        return CLAAS_ERR_CANCELLED;
    case ECONNREFUSED:
    case ECONNRESET:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case EPIPE:
        return CLAAS_ERR_UNAVAILABLE;
    case ENOSYS:
    case EOPNOTSUPP:
        return CLAAS_ERR_UNSUPPORTED;
    default:
        return CLAAS_ERR_IO; /* EIO, EROFS and whatever else a disk can answer */
    }
}

int claas_fail_errno(const char *format, ...)
{
    int number = errno;
    char text[CLAAS_ERROR_TEXT_BYTES];
    char reason[128];
    va_list args;
    size_t length;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    length = strlen(text);
    /* GNU strerror_r: the text may be a constant instead of `reason`. */
    snprintf(text + length, sizeof(text) - length, ": %s",
             strerror_r(number, reason, sizeof(reason)));
    trim_broken_tail(text);
    record(text);
    errno = number;
    return code_of_errno(number);
}
