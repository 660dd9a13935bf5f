/* Feedback and its job: see teach.h. */
#include "teach.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "progress.h"

#define AGAIN_MS    500    /* between two tries to take a stream up again */
#define PATIENCE_MS 120000 /* how long a server may be away */
#define EVENT_MAX   (16 << 20)

int teach_send(struct http *http, const char *lora_id, const char *response_id, int choice,
               const char *text, char job_id[65])
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    cJSON *body = cJSON_CreateObject();
    const char *id = NULL;
    int rc;

    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_string(body, "response_id", response_id);
    if (choice > 0)
        claas_json_set_int(body, "choice", choice);
    claas_json_set_string(body, "feedback", text);
    claas_json_set_bool(body, "wait", false);
    rc = http_json(http, "POST", "/v1/feedback", body, &reply);
    if (rc < 0)
        return rc;
    if (claas_json_get_string(reply, "job_id", &id) != 1)
        return claas_fail(CLAAS_ERR_FORMAT, "the server named no job");
    return claas_copy_text(job_id, 65, id);
}

/* --- watching --------------------------------------------------------------------------------- */

struct watch {
    struct progress progress;
    char last_id[64];
    cJSON *job; /* the end */
    teach_event_fn *event;
    void *arg;
};

static void show_state(struct watch *watch, const char *state)
{
    struct progress *progress = &watch->progress;

    if (strcmp(state, "queued") == 0)
        progress_set(progress, 0, 0, "waiting for its turn");
    else if (strcmp(state, "batched") == 0 || strcmp(state, "training") == 0)
        progress_set(progress, 0, progress->total, "training");
    else if (strcmp(state, "gating") == 0)
        progress_set(progress, progress->total, progress->total, "checking");
    else if (strcmp(state, "publishing") == 0)
        progress_set(progress, progress->total, progress->total, "publishing");
}

static void show_step(struct watch *watch, const cJSON *event)
{
    int64_t step = 0, steps = 0;
    double loss = NAN, rate = NAN;

    claas_json_get_int(event, "step", 0, 1000000, &step);
    claas_json_get_int(event, "steps", 0, 1000000, &steps);
    claas_json_get_number(event, "loss", -1e30, 1e30, &loss);
    claas_json_get_number(event, "rate", 0, 1e30, &rate);
    progress_set(&watch->progress, step, steps,
                 "step %" PRId64 "/%" PRId64 "  loss %.4f  rate %.1e", step, steps, loss, rate);
}

static int take_event(void *arg, const char *name, const char *id, const char *data)
{
    struct watch *watch = arg;
    cJSON *event = NULL;
    const char *state = NULL;
    int rc = claas_json_parse(data, strlen(data), EVENT_MAX, &event);

    if (rc < 0)
        return rc;
    if (id)
        claas_copy_text(watch->last_id, sizeof(watch->last_id), id);
    if (watch->event)
        watch->event(watch->arg, data);
    if (strcmp(name, "job") == 0) {
        claas_json_free(&watch->job);
        watch->job = event;
        return 0;
    }
    if (claas_json_get_string(event, "state", &state) == 1)
        show_state(watch, state);
    else if (strcmp(name, "step") == 0)
        show_step(watch, event);
    claas_json_free(&event);
    return 0;
}

static void tick(void *arg)
{
    struct watch *watch = arg;

    progress_tick(&watch->progress);
}

static void pause_ms(int64_t ms)
{
    struct timespec span = {ms / 1000, (ms % 1000) * 1000000};

    nanosleep(&span, NULL);
}

/* A stream that ends without the job's end was cut by a restart of the server: the job is on disk
 * and goes on. */
static int watch_until_end(struct http *http, const char *path, struct watch *watch)
{
    int64_t seen_ms = claas_clock_ms();
    int rc;

    for (;;) {
        struct http_stream stream = {
            .method = "GET",
            .path = path,
            .last_event_id = watch->last_id[0] ? watch->last_id : NULL,
            .event = take_event,
            .tick = tick,
            .arg = watch,
        };

        rc = http_events(http, &stream);
        if (watch->job)
            return 0;
        if (rc == 0)
            seen_ms = claas_clock_ms();
        else if (rc != CLAAS_ERR_UNAVAILABLE && rc != CLAAS_ERR_OVERLOADED)
            return rc;
        else if (claas_clock_ms() - seen_ms > PATIENCE_MS || http->status == 0)
            return rc;
        progress_tick(&watch->progress);
        pause_ms(AGAIN_MS);
    }
}

int teach_watch_events(struct http *http, const char *job_id, teach_event_fn *event, void *arg,
                       cJSON **ret)
{
    CLAAS_AUTO_FREE char *path = NULL;
    char *text = curl_easy_escape(http->curl, job_id, 0);
    struct watch watch = {.event = event, .arg = arg};
    int rc;

    path = claas_format("/v1/jobs/%s/events", text ? text : "");
    curl_free(text);
    progress_begin(&watch.progress);
    progress_set(&watch.progress, 0, 0, "accepted");
    rc = watch_until_end(http, path, &watch);
    progress_end(&watch.progress);
    *ret = watch.job;
    return rc;
}

int teach_watch(struct http *http, const char *job_id, cJSON **ret)
{
    return teach_watch_events(http, job_id, NULL, NULL, ret);
}

/* --- the outcome ------------------------------------------------------------------------------ */

bool teach_outcome(const cJSON *job, char **ret)
{
    const char *state = "", *lora_id = "", *reason = "no reason given", *error = "unknown error";
    const cJSON *result = claas_json_get(job, "result");
    int64_t version = 0, step = 0, duration_ms = 0;
    int steps = cJSON_GetArraySize(claas_json_get(result, "steps"));

    claas_json_get_string(job, "state", &state);
    claas_json_get_string(job, "lora_id", &lora_id);
    claas_json_get_string(job, "reason", &reason);
    claas_json_get_string(job, "error", &error);
    claas_json_get_int(job, "version", 0, INT64_MAX, &version);
    claas_json_get_int(result, "published_step", 0, INT64_MAX, &step);
    claas_json_get_int(result, "duration_ms", 0, INT64_MAX, &duration_ms);
    if (strcmp(state, "done") == 0 && !cJSON_IsObject(result)) /* it is no longer kept */
        *ret = claas_format("%s got version %" PRId64, lora_id, version);
    else if (strcmp(state, "done") == 0)
        *ret = claas_format("%s is at version %" PRId64 " now: %d steps in %.1f s, step %" PRId64
                            " was the best",
                            lora_id, version, steps, (double)duration_ms / 1000, step);
    else if (strcmp(state, "rejected") == 0)
        *ret = claas_format("rejected, %s stays as it was: %s", lora_id, reason);
    else if (strcmp(state, "failed") == 0)
        *ret = claas_format("failed: %s", error);
    else
        *ret = claas_format("%s", state);
    return strcmp(state, "done") == 0;
}
