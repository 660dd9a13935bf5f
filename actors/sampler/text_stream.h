/* Turns the tokens of one answer into text as they come: whole UTF-8 characters only, stop texts
 * never shown, thinking and outer white space left out, so that the streamed pieces add up to the
 * visible text. */
#ifndef CLAAS_SAMPLER_TEXT_STREAM_H
#define CLAAS_SAMPLER_TEXT_STREAM_H

#include <stdbool.h>

#include "claas/buf.h"

struct text_stream {
    struct claas_buf raw;     /* everything decoded so far, control tokens left out */
    const char *const *stops; /* borrowed */
    size_t stop_count;
    size_t shown; /* bytes of raw that were shown or skipped for good */
    bool plain;   /* text completion: nothing is stripped */
    bool started; /* something visible was shown, so leading white space is over */
    bool stopped; /* a stop text was found; raw ends before it */
};

void text_stream_init(struct text_stream *stream, const char *const *stops, size_t stop_count,
                      bool plain);
void text_stream_done(struct text_stream *stream);
/* Adds a token's bytes. Returns 1 once a stop text is complete (further input is ignored), 0, or an
 * error. */
int text_stream_add(struct text_stream *stream, const char *bytes, size_t length);
/* The next piece that may be shown; with `last`, all that is left. *ret is a new string, "" when
 * nothing is due. */
int text_stream_next(struct text_stream *stream, bool last, char **ret);

#endif
