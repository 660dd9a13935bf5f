/* One HTTP request's life: its beginning, body, answer and end. Asks and timers are in
 * request_wait.c. */
#include "request.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/random.h"
#include "errors.h"
#include "http_guard.h"
#include "shares.h"

/* A chunked body may go this many times over its limit before the connection is cut: the daemon
 * cannot answer in the middle of an upload. */
#define EXCESS_FACTOR 4
/* Bodies in memory, all requests together, in units of http.max_body. */
#define BODIES_MAX 8

bool request_answered(const struct request *request)
{
    return request->status != 0;
}

/* --- beginning --- */

static enum MHD_Result guard_one(void *arg, enum MHD_ValueKind kind, const char *name,
                                 size_t name_length, const char *value, size_t value_length)
{
    (void)kind;
    http_guard_header(arg, name, name_length, value ? value : "", value ? value_length : 0);
    return MHD_YES;
}

static struct request *request_new(struct http_server *server, struct peer *peer,
                                   struct MHD_Connection *connection, const char *url,
                                   const char *method)
{
    struct request *request = CLAAS_NEW(struct request);

    if (!request)
        return NULL;
    request->server = server;
    request->peer = peer;
    request->connection = connection;
    request->method = method;
    request->started_ns = claas_clock_ns();
    request->head = strcmp(method, "HEAD") == 0;
    request->path = claas_strdup(url);
    claas_random_hex(request->id, 16);
    claas_copy_text(request->principal, sizeof(request->principal), "local");
    if (!request->path) {
        free(request);
        return NULL;
    }
    request->next = server->requests;
    request->link = &server->requests;
    if (request->next)
        request->next->link = &request->next;
    server->requests = request;
    peer->request = request;
    return request;
}

/* A refusal of what may be smuggling or a flood: the connection is closed after it. */
static void refuse(struct request *request, int code, const char *text)
{
    request->close = true;
    claas_metric_add(CLAAS_METRIC_HTTP_REFUSED, 1);
    request_fail(request, code, text);
}

static int fail_large(const struct request *request)
{
    return claas_fail(
        CLAAS_ERR_TOO_LARGE, "the request body is too large: the limit is %" PRId64 " bytes (%s)",
        request->body_limit,
        request->route && request->route->take_body ? "http.max_import" : "http.max_body");
}

static bool is_json_type(const char *type)
{
    size_t length = strcspn(type, "; \t");

    return (length == 16 && strncasecmp(type, "application/json", 16) == 0) ||
           (length > 5 && strncasecmp(type + length - 5, "+json", 5) == 0);
}

/* A page of another site can make its own name resolve to this machine, and its browser then takes
 * it for a page of ours (DNS rebinding). But the Host header still has that name. An address cannot
 * be rebound. */
static bool is_own_host(const struct request *request, const char *host)
{
    const char *name;

    if (!host || http_guard_host_is_address(host) || http_guard_host_is_local(host))
        return true;
    for (size_t i = 0;
         (name = claas_config_list_at(request->server->config, "http.hosts", i)) != NULL; i++)
        if (http_guard_host_is(name, "*") || http_guard_host_is(host, name))
            return true;
    return false;
}

static void fail_host(struct request *request, const char *host)
{
    char name[256];

    snprintf(name, sizeof(name), "%.*s", (int)http_guard_name_length(host), host);
    claas_fail(CLAAS_ERR_DENIED,
               "Host '%s' is no name of this server: call its address or localhost, or add the "
               "name to http.hosts",
               claas_quote(name).text);
    request_fail(request, CLAAS_ERR_DENIED, claas_error_text());
}

/* Pages of other sites, and of other ports of this machine, may not train adapters; browsers say
 * what kind of page sends a request. */
static bool is_foreign_page(struct request *request)
{
    const char *site = request_header_in(request, "Sec-Fetch-Site");

    return site && (strcmp(site, "cross-site") == 0 || strcmp(site, "same-site") == 0) &&
           strcmp(request->method, "GET") != 0 && !request->head;
}

static void check_admission(struct request *request, const struct http_guard *guard)
{
    struct http_server *server = request->server;
    bool exempt = request->route && (request->route->flags & ROUTE_EXEMPT);
    const char *type = request_header_in(request, "Content-Type");
    const char *host = request_header_in(request, "Host");

    if (server->draining && !exempt) {
        refuse(request, CLAAS_ERR_UNAVAILABLE, "the server is shutting down");
    } else if (!exempt && server->inflight >= (size_t)server->max_inflight) {
        claas_metric_add(CLAAS_METRIC_HTTP_REFUSED, 1);
        request_fail(request, CLAAS_ERR_OVERLOADED, "too many requests at once, try again later");
    } else if (!is_own_host(request, host)) {
        fail_host(request, host);
    } else if (!request->route) {
        routes_fail(request);
    } else if (is_foreign_page(request)) {
        request_fail(request, CLAAS_ERR_DENIED,
                     "requests from pages of other sites or ports are refused");
    } else if ((request->route->flags & ROUTE_JSON) && type && !is_json_type(type) &&
               http_guard_has_body(guard)) {
        request_fail_status(request, MHD_HTTP_UNSUPPORTED_MEDIA_TYPE,
                            "Content-Type must be application/json", NULL, NULL);
    }
    if (!exempt && !request_answered(request)) {
        request->counted = true;
        claas_metric_set(CLAAS_METRIC_HTTP_INFLIGHT, (double)++server->inflight);
    }
}

/* Hands a set answer to the daemon. */
static enum MHD_Result queue_answer(struct request *request)
{
    enum MHD_Result result =
        MHD_queue_response(request->connection, (unsigned)request->status, request->response);

    MHD_destroy_response(request->response);
    request->response = NULL;
    peer_set_phase(request->peer, PEER_ANSWER);
    return result;
}

enum MHD_Result request_begin(struct http_server *server, struct peer *peer,
                              struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, struct request **ret)
{
    struct request *request = request_new(server, peer, connection, url, method);
    struct http_guard guard = {0};
    const char *reason;

    if (!request)
        return MHD_NO;
    *ret = request;
    claas_metric_add(CLAAS_METRIC_HTTP_REQUESTS, 1);
    request->route = routes_find(method, url, &request->tail);
    request->body_limit =
        request->route && request->route->take_body ? server->max_import : server->max_body;
    claas_buf_init(&request->body, (size_t)server->max_body);
    MHD_get_connection_values_n(connection, MHD_HEADER_KIND, guard_one, &guard);
    /* The version follows the target at once, unless a NUL has cut the target short. */
    if (version[0] && peer->target_end && version != peer->target_end + 1)
        peer->bad_target = true;
    reason =
        peer->bad_target || !claas_utf8_valid(url, strlen(url)) ? "malformed request target" : NULL;
    if (!reason)
        reason = http_guard_verdict(&guard, version);
    if (reason)
        refuse(request, CLAAS_ERR_INVALID, reason);
    else if (guard.lengths && guard.content_length > (uint64_t)request->body_limit)
        refuse(request, fail_large(request), claas_error_text());
    else
        check_admission(request, &guard);
    request->drop_body = request_answered(request);
    if (request->close)
        return queue_answer(request); /* at once, unread body or not */
    peer_set_phase(peer, PEER_BODY);
    return MHD_YES;
}

/* --- body --- */

/* The request fails, but its body is still read, so that the client gets to see the answer. */
static void fail_body(struct request *request, int code, const char *text)
{
    request->drop_body = true;
    request_fail(request, code, text);
}

static void keep_body(struct request *request, const char *data, size_t length)
{
    struct http_server *server = request->server;
    int rc;

    if (server->body_bytes + length > (size_t)(BODIES_MAX * server->max_body)) {
        fail_body(request, CLAAS_ERR_OVERLOADED, "too many large requests at once");
        return;
    }
    rc = claas_buf_add(&request->body, data, length);
    if (rc < 0)
        fail_body(request, rc, claas_error_text());
    else
        server->body_bytes += length;
}

static void release_body(struct request *request)
{
    request->server->body_bytes -= request->body.length;
    claas_buf_done(&request->body);
}

enum MHD_Result request_take_body(struct request *request, const char *data, size_t length)
{
    request->body_received += (int64_t)length;
    if (request->body_received > EXCESS_FACTOR * request->body_limit)
        return MHD_NO;
    if (request->body_received > request->body_limit && !request->drop_body) {
        request->close = true;
        claas_metric_add(CLAAS_METRIC_HTTP_REFUSED, 1);
        fail_body(request, fail_large(request), claas_error_text());
    }
    if (request->drop_body)
        return MHD_YES;
    if (request->route->take_body) {
        int rc = request->route->take_body(request, data, length);

        if (rc < 0)
            fail_body(request, rc, claas_error_text());
    } else {
        keep_body(request, data, length);
    }
    return MHD_YES;
}

/* --- work --- */

enum MHD_Result request_work(struct request *request)
{
    if (request->gone)
        return MHD_NO;
    if (!request_answered(request) && !request->working) {
        int rc;

        request->working = true;
        peer_set_phase(request->peer, PEER_WORK);
        rc = request->route->handle(request);
        if (rc < 0)
            request_fail(request, rc, claas_error_text());
    }
    if (request->response)
        return queue_answer(request);
    request_sleep(request);
    return MHD_YES;
}

/* Suspended connections are not watched by the daemon: a hang-up is seen by the outer epoll set. */
void request_sleep(struct request *request)
{
    if (request->suspended)
        return;
    request->suspended = true;
    MHD_suspend_connection(request->connection);
    peer_watch(request->peer);
}

void request_wake(struct request *request)
{
    if (!request->suspended)
        return;
    request->suspended = false;
    peer_unwatch(request->peer);
    MHD_resume_connection(request->connection);
    request->server->again = true;
}

int request_take_share(struct request *request, const char *name)
{
    struct http_server *server = request->server;
    int rc;

    if (server->max_inflight_per_user == 0 || request->share)
        return 0;
    rc = share_take(&server->shares, name, (size_t)server->max_inflight_per_user, &request->share);
    if (rc == 0)
        return 0;
    if (rc == CLAAS_ERR_OVERLOADED) { /* by this user: the server itself is not */
        claas_metric_add(CLAAS_METRIC_HTTP_SHARE_REFUSED, 1);
        request_fail_status(request, MHD_HTTP_TOO_MANY_REQUESTS, claas_error_text(), NULL,
                            "rate_limit_exceeded");
    } else {
        request_fail(request, rc, claas_error_text());
    }
    return -1;
}

/* --- end --- */

void request_gone(struct request *request)
{
    request->gone = true;
    request_cancel_asks(request);
    if (!request->suspended) /* the daemon is at it: let its next read or write fail */
        shutdown(request->peer->fd, SHUT_RDWR);
    request_wake(request);
}

void request_drain(struct request *request)
{
    int rc;

    request->close = true;
    if (!request->on_drain || request_answered(request) != request->sse.begun)
        return;
    rc = request->on_drain(request);
    if (rc < 0)
        request_fail(request, rc, claas_error_text());
}

static void log_end(const struct request *request, bool complete)
{
    double seconds = (double)(claas_clock_ns() - request->started_ns) / 1e9;

    claas_metric_observe(CLAAS_METRIC_HTTP_SECONDS, seconds);
    claas_debug("%s %s %d %.3f s%s %s", request->method, request->path, request->status, seconds,
                complete ? "" : ", not delivered", request->id);
}

void request_end(struct request *request, bool complete)
{
    struct http_server *server = request->server;

    log_end(request, complete && !request->gone);
    request_cancel_asks(request);
    for (int i = 0; i < REQUEST_TIMERS; i++)
        request_timer_stop(request, (enum request_timer)i);
    if (request->suspended)
        peer_unwatch(request->peer);
    if (request->counted)
        claas_metric_set(CLAAS_METRIC_HTTP_INFLIGHT, (double)--server->inflight);
    share_give_back(&request->share);
    if (request->response)
        MHD_destroy_response(request->response);
    if (request->state_free)
        request->state_free(request->state);
    for (size_t i = 0; i < request->header_count; i++)
        free(request->headers[i].value);
    release_body(request);
    sse_done(&request->sse);
    *request->link = request->next;
    if (request->next)
        request->next->link = request->link;
    request->peer->request = NULL;
    peer_set_phase(request->peer, PEER_IDLE);
    free(request->path);
    free(request->tail);
    free(request);
}

/* --- what came in --- */

int request_query(struct request *request, const char *name, const char **ret)
{
    const char *value =
        MHD_lookup_connection_value(request->connection, MHD_GET_ARGUMENT_KIND, name);

    if (value && !claas_utf8_valid(value, strlen(value)))
        return claas_fail(CLAAS_ERR_INVALID, "%s is not UTF-8", name);
    *ret = value;
    return 0;
}

const char *request_header_in(struct request *request, const char *name)
{
    return MHD_lookup_connection_value(request->connection, MHD_HEADER_KIND, name);
}

int request_json(struct request *request, cJSON **ret)
{
    int rc = claas_json_parse(request->body.data ? request->body.data : "", request->body.length,
                              (size_t)request->server->max_body, ret);

    release_body(request);
    if (rc == 0 && cJSON_IsObject(*ret))
        return 0;
    claas_json_free(ret);
    request_fail(request, CLAAS_ERR_INVALID,
                 rc < 0 ? claas_error_text() : "the body must be a JSON object");
    return -1;
}

/* --- the answer --- */

void request_header(struct request *request, const char *name, const char *value)
{
    if (request->header_count == REQUEST_HEADERS_MAX)
        return;
    request->headers[request->header_count].name = name;
    request->headers[request->header_count++].value = claas_strdup(value);
}

void request_answer_stream(struct request *request, int status, struct MHD_Response *response)
{
    if (!response) { /* out of memory: nothing can be said */
        request_gone(request);
        return;
    }
    if (request_answered(request) || request->gone) {
        MHD_destroy_response(response);
        return;
    }
    MHD_add_response_header(response, "x-request-id", request->id);
    for (size_t i = 0; i < request->header_count; i++) {
        if (request->headers[i].value)
            MHD_add_response_header(response, request->headers[i].name, request->headers[i].value);
    }
    if (request->close || request->server->draining)
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    request->status = status;
    request->response = response;
    request_wake(request);
}

void request_answer(struct request *request, int status, struct MHD_Response *response)
{
    request_cancel_asks(request);
    for (int i = 0; i < REQUEST_TIMERS; i++)
        request_timer_stop(request, (enum request_timer)i);
    request_answer_stream(request, status, response);
}

void request_answer_text(struct request *request, int status, const char *type, char *text)
{
    struct MHD_Response *response = NULL;

    if (text)
        response = MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
    if (response)
        MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    else
        free(text);
    request_answer(request, status, response);
}

void request_answer_json(struct request *request, int status, cJSON *body)
{
    char *text = claas_json_print(body);

    cJSON_Delete(body);
    request_answer_text(request, status, "application/json", text);
}
