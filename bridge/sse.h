/* Server-sent events: the streaming answer of a request.
 *
 * Bytes wait in a buffer until the client has read them; with nothing to send the connection is
 * suspended, so an idle stream costs no CPU. A client that reads more slowly than it is written to
 * is cut off when SSE_BUFFER_MAX bytes wait for it. */
#ifndef CLAAS_BRIDGE_SSE_H
#define CLAAS_BRIDGE_SSE_H

#include "claas/buf.h"
#include "claas/json.h"

#define SSE_BUFFER_MAX (4 << 20)
#define SSE_PING_MS    15000

struct request;

struct sse {
    struct claas_buf out;
    size_t sent; /* bytes of `out` that the daemon has taken */
    bool begun;  /* the 200 is out */
    bool ended;  /* no more will be added */
    bool quiet;  /* nothing was added since `ping` last looked */
};

/* Answers 200 text/event-stream; no effect when begun. The headers go out at once. */
int sse_begin(struct request *request);
/* "data: <json>"; `data` is taken. With `event` an event name, with id >= 0 an id line. */
int sse_send(struct request *request, const char *event, int64_t id, cJSON *data);
/* "data: <text>" for a text without line ends. */
int sse_send_text(struct request *request, const char *text);
/* The stream ends when everything is sent. */
void sse_end(struct request *request);
void sse_done(struct sse *sse);

#endif
