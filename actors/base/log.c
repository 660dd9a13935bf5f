/* One line per event on stderr, assembled in a buffer on the stack and given to one write(2): lines
 * of different threads (and processes, for lines up to PIPE_BUF) do not mix, and no lock is needed.
 *
 * Text for a terminal, a JSON object per line for a machine. Either way whatever comes in as an
 * argument cannot break out of its line: control characters and broken UTF-8 are escaped. */
#include "claas/log.h"

#include "claas/clock.h"
#include "claas/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <unistr.h>

#define MESSAGE_BYTES 1024
#define LINE_BYTES    (MESSAGE_BYTES * 6 + 256) /* every byte may become \u00XX */

static const char *const level_names[] = {"debug", "info", "warning", "error"};
static enum claas_log_level level_min = CLAAS_LOG_INFO;
static bool as_json;
static _Thread_local char thread_name[32];

struct line {
    char bytes[LINE_BYTES];
    size_t length;
};

static void add_bytes(struct line *line, const char *bytes, size_t length)
{
    size_t room = sizeof(line->bytes) - line->length;

    if (length > room)
        length = room;
    memcpy(line->bytes + line->length, bytes, length);
    line->length += length;
}

static void add_text(struct line *line, const char *text)
{
    add_bytes(line, text, strlen(text));
}

/* Text that is safe inside a JSON string and on a terminal. Backslash and quote stay as they are in
 * text lines. */
static void add_escaped(struct line *line, const char *text)
{
    size_t left = strlen(text);

    while (left > 0) {
        ucs4_t point;
        int used = u8_mbtoucr(&point, (const uint8_t *)text, left);
        char escape[8];

        if (used < 0) {
            add_text(line, "\xEF\xBF\xBD"); /* U+FFFD for one broken byte */
            used = 1;
        } else if (point == '\n') {
            add_text(line, "\\n");
        } else if (point < 0x20 || (point >= 0x7F && point < 0xA0)) {
            snprintf(escape, sizeof(escape), "\\u%04x", (unsigned)point);
            add_text(line, escape);
        } else {
            if (as_json && (point == '"' || point == '\\'))
                add_text(line, "\\");
            add_bytes(line, text, (size_t)used);
        }
        text += used;
        left -= (size_t)used;
    }
}

void claas_log_setup(enum claas_log_level level, const char *format)
{
    level_min = level;
    if (format && strcmp(format, "json") == 0)
        as_json = true;
    else if (format && strcmp(format, "text") == 0)
        as_json = false;
    else
        as_json = !isatty(STDERR_FILENO);
}

void claas_log_thread_name(const char *name)
{
    snprintf(thread_name, sizeof(thread_name), "%s", name ? name : "");
}

int claas_log_level_parse(const char *name, enum claas_log_level *ret)
{
    for (int i = CLAAS_LOG_DEBUG; i <= CLAAS_LOG_ERROR; i++) {
        if (name && strcmp(name, level_names[i]) == 0) {
            *ret = (enum claas_log_level)i;
            return 0;
        }
    }
    return claas_fail(CLAAS_ERR_INVALID,
                      "'%s' is not a log level: use debug, info, warning or error",
                      name ? name : "");
}

static void compose_json(struct line *line, const char *level, const char *time,
                         const char *message)
{
    add_text(line, "{\"time\":\"");
    add_text(line, time);
    add_text(line, "\",\"level\":\"");
    add_text(line, level);
    if (thread_name[0]) {
        add_text(line, "\",\"thread\":\"");
        add_escaped(line, thread_name);
    }
    add_text(line, "\",\"message\":\"");
    add_escaped(line, message);
    add_text(line, "\"}\n");
}

static void compose_text(struct line *line, const char *level, const char *time,
                         const char *message)
{
    add_text(line, time);
    add_text(line, " ");
    add_text(line, level);
    if (thread_name[0]) {
        add_text(line, " ");
        add_escaped(line, thread_name);
    }
    add_text(line, ": ");
    add_escaped(line, message);
    add_text(line, "\n");
}

/* A log line that cannot be written is lost: there is nobody left to tell. */
static void write_line(const struct line *line)
{
    size_t done = 0;

    while (done < line->length) {
        ssize_t n = write(STDERR_FILENO, line->bytes + done, line->length - done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return;
        done += (size_t)n;
    }
}

void claas_log(enum claas_log_level level, const char *format, ...)
{
    int saved_errno = errno;
    char message[MESSAGE_BYTES];
    char time[32];
    struct line line;
    va_list args;
    int length;

    if (level < level_min || level > CLAAS_LOG_ERROR)
        return;
    va_start(args, format);
    length = vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    if (length >= (int)sizeof(message)) /* say that it was cut */
        memcpy(message + sizeof(message) - 4, "...", 4);
    else if (length < 0)
        snprintf(message, sizeof(message), "%s", format);
    claas_clock_iso(claas_clock_unix_ms(), time);
    line.length = 0;
    if (as_json)
        compose_json(&line, level_names[level], time, message);
    else
        compose_text(&line, level_names[level], time, message);
    write_line(&line);
    errno = saved_errno;
}
