/* Server-sent events: see sse.h. */
#include "sse.h"

#include <inttypes.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "request.h"

#define BLOCK_BYTES 16384

/* The daemon's callback: gives it bytes to send. */
static ssize_t reader(void *arg, uint64_t position, char *block, size_t size)
{
    struct request *request = arg;
    struct sse *sse = &request->sse;
    size_t left = sse->out.length - sse->sent;

    (void)position;
    if (request->gone)
        return MHD_CONTENT_READER_END_WITH_ERROR;
    if (left > 0) {
        size_t taken = left < size ? left : size;

        memcpy(block, sse->out.data + sse->sent, taken);
        sse->sent += taken;
        if (sse->sent == sse->out.length) {
            claas_buf_consume(&sse->out, sse->sent);
            sse->sent = 0;
        }
        return (ssize_t)taken;
    }
    if (sse->ended)
        return MHD_CONTENT_READER_END_OF_STREAM;
    request_sleep(request); /* 0 without suspending would be a busy loop */
    return 0;
}

/* A comment now and then keeps proxies and clients from giving the connection up. */
static int ping(struct request *request)
{
    struct sse *sse = &request->sse;

    if (sse->ended)
        return 0;
    if (sse->quiet) {
        claas_buf_add_text(&sse->out, ": ping\n\n");
        request_wake(request);
    }
    sse->quiet = true;
    return request_timer(request, TIMER_AGAIN, SSE_PING_MS, ping);
}

int sse_begin(struct request *request)
{
    struct MHD_Response *response;

    if (request->sse.begun || request_answered(request))
        return 0;
    claas_buf_init(&request->sse.out, SSE_BUFFER_MAX);
    request->sse.begun = true;
    response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, BLOCK_BYTES, reader, request, NULL);
    if (response) {
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE,
                                "text/event-stream; charset=utf-8");
        MHD_add_response_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
        MHD_add_response_header(response, "X-Accel-Buffering", "no");
    }
    request_timer_stop(request, TIMER_WAIT);
    request_answer_stream(request, MHD_HTTP_OK, response);
    return request_timer(request, TIMER_AGAIN, SSE_PING_MS, ping);
}

/* After something was added: checks the buffer's sticky error, and wakes the connection. */
static int added(struct request *request)
{
    request->sse.quiet = false;
    if (request->sse.out.error) {
        claas_info("a client reads its stream too slowly: cut off (%s)", request->id);
        request_gone(request);
        return 0;
    }
    request_wake(request);
    return 0;
}

/* Drops what was sent already, when it takes half of the buffer. */
static void make_room(struct sse *sse)
{
    if (sse->sent > SSE_BUFFER_MAX / 2) {
        claas_buf_consume(&sse->out, sse->sent);
        sse->sent = 0;
    }
}

int sse_send(struct request *request, const char *event, int64_t id, cJSON *data)
{
    CLAAS_AUTO_FREE char *text = claas_json_print(data);
    struct claas_buf *out = &request->sse.out;

    cJSON_Delete(data);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (!request->sse.begun || request->sse.ended || request->gone)
        return 0;
    make_room(&request->sse);
    if (id >= 0)
        claas_buf_printf(out, "id: %" PRId64 "\n", id);
    if (event)
        claas_buf_printf(out, "event: %s\n", event);
    claas_buf_add_text(out, "data: ");
    claas_buf_add_text(out, text);
    claas_buf_add_text(out, "\n\n");
    return added(request);
}

int sse_send_text(struct request *request, const char *text)
{
    struct claas_buf *out = &request->sse.out;

    if (!request->sse.begun || request->sse.ended || request->gone)
        return 0;
    make_room(&request->sse);
    claas_buf_printf(out, "data: %s\n\n", text);
    return added(request);
}

void sse_end(struct request *request)
{
    if (request->sse.ended)
        return;
    request->sse.ended = true;
    request_cancel_asks(request);
    request_timer_stop(request, TIMER_AGAIN);
    request_wake(request);
}

void sse_done(struct sse *sse)
{
    claas_buf_done(&sse->out);
}
