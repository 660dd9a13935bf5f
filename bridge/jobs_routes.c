/* Learning jobs: list, one, its events as a stream, cancel. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "request.h"
#include "schema.h"

#define ASK_MS    30000
#define WATCH_MS  86400000 /* a client that wants more asks again with Last-Event-ID */
#define HOLD_MS   1000     /* how long the 200 is held back for an error to come first */
#define LIMIT_MAX 1000
#define ID_MAX    64

static int pass_on(struct request *request, claas_message_t *reply, void *arg)
{
    (void)arg;
    if (reply->kind != CLAAS_KIND_PROGRESS)
        request_answer_json(request, MHD_HTTP_OK, cJSON_Duplicate(reply->body, true));
    return 0;
}

/* The job itself, without the message around it. */
static int pass_job(struct request *request, claas_message_t *reply, void *arg)
{
    (void)arg;
    if (reply->kind != CLAAS_KIND_PROGRESS)
        request_answer_json(request, MHD_HTTP_OK,
                            cJSON_Duplicate(claas_json_get(reply->body, "job"), true));
    return 0;
}

static int check_id(const struct request *request)
{
    if (strlen(request->tail) > ID_MAX)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "there is no job '%s'", request->tail);
    return 0;
}

static cJSON *job_body(const struct request *request)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "job_id", request->tail);
    return body;
}

/* --- list --- */

static void query_fault(struct request *request, const char *name, const char *type,
                        const char *text)
{
    struct schema_place query = {NULL, "query", 0};
    struct schema_place place = {&query, name, 0};
    cJSON *faults = cJSON_CreateArray();

    schema_fault(faults, &place, type, "%s", text);
    request_fail_schema(request, faults);
}

static bool is_state(const char *text)
{
    static const char *const states[] = {"queued", "batched",  "training", "gating",   "publishing",
                                         "done",   "rejected", "failed",   "cancelled"};

    for (size_t i = 0; i < CLAAS_COUNT(states); i++) {
        if (strcmp(states[i], text) == 0)
            return true;
    }
    return false;
}

/* False when it is wrong: the request is answered then. */
static bool set_limit(struct request *request, const char *text, cJSON *body)
{
    char *end;
    long limit;

    errno = 0;
    limit = strtol(text, &end, 10);
    if (errno || end == text || *end || limit < 1 || limit > LIMIT_MAX) {
        query_fault(request, "limit", "int_parsing", "Input should be an integer from 1 to 1000");
        return false;
    }
    claas_json_set_int(body, "limit", limit);
    return true;
}

int route_jobs(struct request *request)
{
    static const char *const names[] = {"lora_id", "state", "limit", "before"};
    const char *values[CLAAS_COUNT(names)];
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;

    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        int rc = request_query(request, names[i], &values[i]);

        if (rc < 0)
            return rc;
    }
    body = cJSON_CreateObject();
    if (values[0])
        claas_json_set_string(body, "lora_id", values[0]);
    if (values[1] && !is_state(values[1])) {
        query_fault(request, "state", "enum",
                    "Input should be queued, batched, training, gating, publishing, done, "
                    "rejected, failed or cancelled");
        return 0;
    }
    if (values[1])
        claas_json_set_string(body, "state", values[1]);
    if (values[2] && !set_limit(request, values[2], body))
        return 0;
    if (values[3])
        claas_json_set_string(body, "before", values[3]);
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_JOB_LIST,
                                    .body = CLAAS_TAKE(body),
                                    .timeout_ms = ASK_MS,
                                    .reply = pass_on,
                                });
}

/* --- one --- */

int route_job(struct request *request)
{
    int rc = check_id(request);

    if (rc < 0)
        return rc;
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_JOB_GET,
                                    .body = job_body(request),
                                    .timeout_ms = ASK_MS,
                                    .reply = pass_job,
                                });
}

int route_job_cancel(struct request *request)
{
    int rc = check_id(request);

    if (rc < 0)
        return rc;
    return request_ask(request, &(struct request_ask){
                                    .to = "scheduler",
                                    .type = CLAAS_MSG_JOB_CANCEL,
                                    .body = job_body(request),
                                    .timeout_ms = ASK_MS,
                                    .reply = pass_on,
                                });
}

/* --- events --- */

static int send_event(struct request *request, const cJSON *event)
{
    const char *kind = "event";
    int64_t seq = -1;

    claas_json_get_string(event, "kind", &kind);
    claas_json_get_int(event, "seq", 0, INT64_MAX, &seq);
    return sse_send(request, kind, seq, cJSON_Duplicate(event, true));
}

static int event_arrived(struct request *request, claas_message_t *reply, void *arg)
{
    int rc = sse_begin(request);

    (void)arg;
    if (rc < 0)
        return rc;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return send_event(request, claas_json_get(reply->body, "event"));
    rc = sse_send(request, "job", -1, cJSON_Duplicate(claas_json_get(reply->body, "job"), true));
    sse_end(request);
    return rc;
}

/* The server stops: the client comes back with Last-Event-ID. */
static int end_events(struct request *request)
{
    sse_end(request);
    return 0;
}

int route_job_events(struct request *request)
{
    const char *last = request_header_in(request, "Last-Event-ID");
    cJSON *body;
    int rc = check_id(request);

    if (rc < 0)
        return rc;
    if (request_take_share(request, NULL) < 0)
        return 0;
    body = job_body(request);
    if (last) {
        char *end;
        long long seq;

        errno = 0;
        seq = strtoll(last, &end, 10);
        if (!errno && end != last && !*end && seq >= 0 && seq <= 1000000000000000LL)
            claas_json_set_int(body, "since", seq); /* else from the beginning */
    }
    request->on_drain = end_events;
    rc = request_ask(request, &(struct request_ask){
                                  .to = "scheduler",
                                  .type = CLAAS_MSG_JOB_WATCH,
                                  .body = body,
                                  .timeout_ms = WATCH_MS,
                                  .reply = event_arrived,
                              });
    return rc < 0 ? rc : request_timer(request, TIMER_WAIT, HOLD_MS, sse_begin);
}
