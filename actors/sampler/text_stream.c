/* The streaming text filter: see text_stream.h. What is held back at any moment is the longest tail
 * that could still turn out to be something else: the start of a stop text, half a character, an
 * open <think>, or trailing white space. */
#include "text_stream.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/visible_text.h"

#define ANSWER_BYTES_MAX (64 << 20)

static const char think_open[] = "<think>", think_close[] = "</think>";

void text_stream_init(struct text_stream *stream, const char *const *stops, size_t stop_count,
                      bool plain)
{
    *stream = (struct text_stream){.stops = stops, .stop_count = stop_count, .plain = plain};
    claas_buf_init(&stream->raw, ANSWER_BYTES_MAX);
}

void text_stream_done(struct text_stream *stream)
{
    claas_buf_done(&stream->raw);
}

/* Cuts raw before the first stop text that ends in the newest `added` bytes. */
static bool cut_at_stop(struct text_stream *stream, size_t added)
{
    const char *first = NULL;

    for (size_t i = 0; i < stream->stop_count; i++) {
        size_t length = strlen(stream->stops[i]);
        size_t back = added + length;
        size_t from = stream->raw.length > back ? stream->raw.length - back : 0;
        const char *found;

        if (length == 0 || stream->raw.length == 0)
            continue;
        found =
            memmem(stream->raw.data + from, stream->raw.length - from, stream->stops[i], length);
        if (found && (!first || found < first))
            first = found;
    }
    if (!first)
        return false;
    stream->raw.length = (size_t)(first - stream->raw.data);
    stream->raw.data[stream->raw.length] = '\0';
    stream->stopped = true;
    return true;
}

int text_stream_add(struct text_stream *stream, const char *bytes, size_t length)
{
    int rc;

    if (stream->stopped)
        return 1;
    rc = claas_buf_add(&stream->raw, bytes, length);
    if (rc < 0)
        return rc;
    return cut_at_stop(stream, length) ? 1 : 0;
}

/* Bytes at the end of text that may be the beginning of `pattern`. */
static size_t partial_match(const char *text, size_t length, const char *pattern)
{
    size_t longest = strlen(pattern);

    if (longest > 0)
        longest--;
    if (longest > length)
        longest = length;
    for (size_t n = longest; n > 0; n--) {
        if (memcmp(text + length - n, pattern, n) == 0)
            return n;
    }
    return 0;
}

/* Bytes at the end that are an unfinished UTF-8 character. */
static size_t partial_character(const char *text, size_t length)
{
    for (size_t back = 1; back <= 3 && back <= length; back++) {
        unsigned char c = (unsigned char)text[length - back];
        size_t need = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;

        if ((c & 0xc0) == 0x80)
            continue;
        return need > back ? back : 0;
    }
    return 0;
}

/* Where the showable text ends: everything before a possible stop text, open tag or half
 * character. */
static size_t safe_end(const struct text_stream *stream)
{
    size_t hold = partial_character(stream->raw.data, stream->raw.length);

    for (size_t i = 0; i < stream->stop_count; i++) {
        size_t part = partial_match(stream->raw.data, stream->raw.length, stream->stops[i]);

        if (part > hold)
            hold = part;
    }
    if (!stream->plain) {
        size_t part = partial_match(stream->raw.data, stream->raw.length, think_open);

        if (part > hold)
            hold = part;
    }
    return stream->raw.length - hold;
}

/* Copies raw[shown, end) to `out` without thinking spans and, before the first visible character,
 * without white space. Trailing white space stays unshown until something follows it. */
static int show_visible(struct text_stream *stream, size_t end, bool last, struct claas_buf *out)
{
    while (stream->shown < end) {
        char *at = stream->raw.data + stream->shown;
        size_t left = end - stream->shown;
        size_t space = 0, run = 0;

        if (left >= strlen(think_open) && memcmp(at, think_open, strlen(think_open)) == 0) {
            const char *close =
                memmem(at, stream->raw.length - stream->shown, think_close, strlen(think_close));

            if (close) {
                stream->shown = (size_t)(close - stream->raw.data) + strlen(think_close);
                continue;
            }
            if (!last)
                return 0; /* hidden until it closes; an unclosed one is shown in the end */
        }
        while (run < left && (space = claas_space_length(at + run)) > 0 && run + space <= left)
            run += space;
        if (run > 0 && (!stream->started || run == left)) {
            if (run == left && stream->started)
                return 0;
            stream->shown += run;
            continue;
        }
        run = run ? run : 1;
        stream->started = true;
        if (claas_buf_add(out, at, run) < 0)
            return out->error;
        stream->shown += run;
    }
    return 0;
}

/* Replaces what is not UTF-8 by U+FFFD: a sampled byte token may be anything. */
static char *valid_utf8(char *text, size_t length)
{
    struct claas_buf out;

    if (length > 0 && claas_utf8_valid(text, length))
        return text;
    claas_buf_init(&out, ANSWER_BYTES_MAX);
    for (size_t i = 0; i < length;) {
        size_t need = 1;
        unsigned char c = (unsigned char)text[i];

        if (c >= 0xc0)
            need = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
        if (i + need <= length && claas_utf8_valid(text + i, need)) {
            claas_buf_add(&out, text + i, need);
            i += need;
        } else {
            claas_buf_add(&out, "\xef\xbf\xbd", 3);
            i++;
        }
    }
    free(text);
    if (out.error) {
        claas_buf_done(&out);
        return NULL;
    }
    return out.data ? claas_buf_take(&out, NULL) : claas_strdup("");
}

int text_stream_next(struct text_stream *stream, bool last, char **ret)
{
    struct claas_buf out;
    size_t end;
    int rc = 0;
    char *text;
    size_t length = 0;

    claas_buf_init(&out, ANSWER_BYTES_MAX);
    if (stream->raw.length > 0) {
        end = last || stream->stopped ? stream->raw.length : safe_end(stream);
        if (!stream->plain) {
            rc = show_visible(stream, end, last, &out);
        } else if (end > stream->shown) {
            rc = claas_buf_add(&out, stream->raw.data + stream->shown, end - stream->shown);
            stream->shown = end;
        }
    }
    if (rc < 0) {
        claas_buf_done(&out);
        return rc;
    }
    text = out.data ? claas_buf_take(&out, &length) : claas_strdup("");
    text = text ? valid_utf8(text, length) : NULL;
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret = text;
    return 0;
}
