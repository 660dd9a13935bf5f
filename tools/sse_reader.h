/* A reader of server-sent events that takes the bytes as they arrive, in pieces of any size
 * (https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6). */
#ifndef CLAAS_TOOLS_SSE_READER_H
#define CLAAS_TOOLS_SSE_READER_H

#include <stdbool.h>

#include "claas/buf.h"

/* `name` is "message" when the event has none; `id` is NULL until the stream gave one. */
typedef int sse_event_fn(void *arg, const char *name, const char *id, const char *data);

struct sse_reader {
    struct claas_buf line, data;
    char name[64], id[64];
    bool has_data, after_cr;
    sse_event_fn *event;
    void *arg;
};

void sse_reader_init(struct sse_reader *reader, sse_event_fn *event, void *arg);
void sse_reader_done(struct sse_reader *reader);
/* Calls `event` for each event that is complete; its error ends the reading. */
int sse_reader_feed(struct sse_reader *reader, const char *bytes, size_t length);

#endif
