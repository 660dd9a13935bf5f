/* POST /v1/feedback. Two messages: FEEDBACK makes the feedback durable and names its job; from then
 * on the client can be told a job id whatever happens. JOB_WATCH then waits for the job's end; it
 * is asked again if the scheduler restarts. A client that goes away loses only the answer. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "claas/clock.h"
#include "claas/config.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "feedback.h"
#include "request.h"

#define SUBMIT_MS   60000
#define WATCH_AGAIN 500                /* ms, after the scheduler was away */
#define NO_EVENTS   1000000000000000.0 /* JOB_WATCH since: only the end matters */

struct feedback {
    char job_id[65];
    int batch;
    bool wait;
};

static int watch(struct request *request);

/* --- 202 --- */

static int answer_later(struct request *request)
{
    const struct feedback *feedback = request->state;
    cJSON *body = cJSON_CreateObject();
    char location[96];

    snprintf(location, sizeof(location), "/v1/jobs/%s", feedback->job_id);
    request_header(request, MHD_HTTP_HEADER_LOCATION, location);
    claas_json_set_string(body, "job_id", feedback->job_id);
    request_answer_json(request, MHD_HTTP_ACCEPTED, body);
    return 0;
}

/* --- the job has ended --- */

static int ended(struct request *request, claas_message_t *reply, void *arg)
{
    const struct feedback *feedback = request->state;

    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    if (reply->error == CLAAS_ERR_UNAVAILABLE || reply->error == CLAAS_ERR_DEADLINE ||
        reply->error == CLAAS_ERR_OVERLOADED) {
        if (request->server->draining || reply->error == CLAAS_ERR_DEADLINE)
            return answer_later(request);
        /* The feedback is on disk and its job goes on: watch it again. */
        return request_timer(request, TIMER_AGAIN, WATCH_AGAIN, watch);
    }
    if (reply->error)
        return claas_fail(reply->error, "%s", reply->error_text);
    feedback_answer(request, claas_json_get(reply->body, "job"), feedback->job_id, feedback->batch);
    return 0;
}

static int watch(struct request *request)
{
    const struct feedback *feedback = request->state;
    cJSON *body = cJSON_CreateObject();
    int rc;

    claas_json_set_string(body, "job_id", feedback->job_id);
    claas_json_set_number(body, "since", NO_EVENTS);
    rc = request_ask(
        request,
        &(struct request_ask){
            .to = "scheduler",
            .type = CLAAS_MSG_JOB_WATCH,
            .body = body,
            .timeout_ms = claas_config_int(request->server->config, "feedback.wait") + SUBMIT_MS,
            .reply = ended,
            .sees_errors = true,
        });
    return rc == CLAAS_ERR_UNAVAILABLE || rc == CLAAS_ERR_OVERLOADED
               ? request_timer(request, TIMER_AGAIN, WATCH_AGAIN, watch)
               : rc;
}

/* --- submitting --- */

static int accepted(struct request *request, claas_message_t *reply, void *arg)
{
    struct feedback *feedback = request->state;
    int64_t wait_ms = claas_config_int(request->server->config, "feedback.wait");
    const char *job_id = "";
    int rc;

    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    claas_json_get_string(reply->body, "job_id", &job_id);
    claas_copy_text(feedback->job_id, sizeof(feedback->job_id), job_id);
    if (!feedback->wait || wait_ms == 0 || request->server->draining)
        return answer_later(request);
    request->on_drain = answer_later;
    rc = request_timer(request, TIMER_WAIT, wait_ms, answer_later);
    return rc < 0 ? rc : watch(request);
}

/* Prefer: respond-async (RFC 7240). */
static bool prefers_async(struct request *request)
{
    const char *prefer = request_header_in(request, "Prefer");

    while (prefer && *prefer) {
        size_t length;

        prefer += strspn(prefer, ", \t");
        length = strcspn(prefer, ",; \t");
        if (length == 13 && strncasecmp(prefer, "respond-async", 13) == 0)
            return true;
        prefer += strcspn(prefer, ",");
    }
    return false;
}

static int set_idempotency_key(struct request *request, cJSON *body)
{
    const char *key = request_header_in(request, "Idempotency-Key");

    if (!key)
        return 0;
    if (!key[0] || strlen(key) > 256 || !claas_utf8_valid(key, strlen(key)))
        return claas_fail(CLAAS_ERR_INVALID, "Idempotency-Key must have 1 to 256 characters");
    claas_json_set_string(body, "idempotency_key", key);
    return 0;
}

int route_feedback(struct request *request)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    struct feedback *feedback = CLAAS_NEW(struct feedback);
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;
    const char *lora_id = "";
    int rc;

    if (!feedback)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    request->state = feedback;
    request->state_free = free;
    if (request_json(request, &json) < 0)
        return 0;
    body = feedback_body(request, json, &feedback->batch);
    if (!body) /* answered */
        return 0;
    claas_json_get_string(cJSON_GetArrayItem(claas_json_get(body, "requests"), 0), "lora_id",
                          &lora_id);
    if (request_take_share(request, lora_id) < 0)
        return 0;
    feedback->wait = true;
    claas_json_get_bool(json, "wait", &feedback->wait);
    if (prefers_async(request)) {
        feedback->wait = false;
        request_header(request, "Preference-Applied", "respond-async");
    }
    rc = set_idempotency_key(request, body);
    if (rc < 0)
        return rc;
    return request_ask(request, &(struct request_ask){
                                    .to = "scheduler",
                                    .type = CLAAS_MSG_FEEDBACK,
                                    .body = CLAAS_TAKE(body),
                                    .timeout_ms = SUBMIT_MS,
                                    .reply = accepted,
                                });
}
