/* Watchers of jobs. Old events are read from storage, new ones come from the scheduler's own
 * records; both carry the event's seq, so that none is sent twice or left out. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "scheduler_internal.h"

#define RETRY_MS      1000
#define SHUTTING_DOWN "the server is shutting down; the job goes on at its next start"

static void watcher_free(struct watcher *watcher)
{
    struct watcher **link = &watcher->scheduler->watchers;

    while (*link && *link != watcher)
        link = &(*link)->next;
    if (*link)
        *link = watcher->next;
    if (watcher->ask)
        claas_actor_cancel(watcher->scheduler->actor, watcher->ask);
    free(watcher);
}

static void send_event(struct watcher *watcher, const cJSON *event)
{
    int64_t seq = 0;
    cJSON *body;

    claas_json_get_int(event, "seq", 0, (int64_t)1 << 53, &seq);
    if (seq <= watcher->seq)
        return;
    watcher->seq = seq;
    body = cJSON_CreateObject();
    claas_json_set(body, "event", cJSON_Duplicate(event, true));
    claas_actor_progress(watcher->scheduler->actor, &watcher->reply_to, body);
}

static bool is_end_state(const char *state)
{
    return strcmp(state, "done") == 0 || strcmp(state, "rejected") == 0 ||
           strcmp(state, "failed") == 0 || strcmp(state, "cancelled") == 0;
}

static void finish(struct watcher *watcher, const cJSON *job)
{
    cJSON *body = cJSON_CreateObject();

    if (watcher->feedback)
        claas_json_set_string(body, "job_id", watcher->job_id);
    claas_json_set(body, "job", cJSON_Duplicate(job, true));
    claas_actor_reply(watcher->scheduler->actor, &watcher->reply_to, body);
    watcher_free(watcher);
}

static void fail(struct watcher *watcher, int code, const char *text)
{
    claas_actor_reply_error(watcher->scheduler->actor, &watcher->reply_to, code, text);
    watcher_free(watcher);
}

static void read_job(struct watcher *watcher);

static void read_again(void *self, void *arg)
{
    struct scheduler *scheduler = self;
    struct watcher *next;

    (void)arg;
    scheduler->watch_timer = 0;
    for (struct watcher *watcher = scheduler->watchers; watcher; watcher = next) {
        next = watcher->next;
        if (watcher->again && !watcher->reading)
            read_job(watcher);
    }
}

/* Storage is away for a moment. The job goes on all the same, so the watcher is kept. */
static void read_later(struct watcher *watcher)
{
    struct scheduler *scheduler = watcher->scheduler;

    watcher->again = true;
    if (scheduler->watch_timer <= 0)
        scheduler->watch_timer = claas_actor_timer(scheduler->actor, RETRY_MS, read_again, NULL);
    if (scheduler->watch_timer < 0)
        fail(watcher, scheduler->watch_timer, claas_error_text());
}

static void job_read(void *self, void *arg, claas_message_t *reply)
{
    struct watcher *watcher = arg;
    const cJSON *job = claas_json_get(reply->body, "job");
    const char *state = "";
    const cJSON *event;

    (void)self;
    watcher->ask = 0;
    watcher->reading = false;
    if (reply->error == CLAAS_ERR_UNAVAILABLE || reply->error == CLAAS_ERR_OVERLOADED ||
        reply->error == CLAAS_ERR_DEADLINE) {
        read_later(watcher);
        return;
    }
    if (reply->error) {
        fail(watcher, reply->error, reply->error_text);
        return;
    }
    cJSON_ArrayForEach(event, claas_json_get(job, "events")) send_event(watcher, event);
    claas_json_get_string(job, "state", &state);
    if (is_end_state(state)) {
        finish(watcher, job);
        return;
    }
    if (watcher->again)
        read_job(watcher);
}

/* The watcher may be gone afterwards. */
static void read_job(struct watcher *watcher)
{
    cJSON *body = cJSON_CreateObject();
    int rc;

    claas_json_set_string(body, "job_id", watcher->job_id);
    claas_json_set_int(body, "since", watcher->seq);
    watcher->again = false;
    rc = claas_actor_ask(watcher->scheduler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_JOB_GET,
                             .body = body,
                             .timeout_ms = ASK_MS,
                             .principal = watcher->reply_to.principal,
                             .reply = job_read,
                             .arg = watcher,
                         },
                         &watcher->ask);
    watcher->reading = rc == 0;
    if (rc < 0)
        fail(watcher, rc, claas_error_text());
}

int watch_start(struct scheduler *scheduler, const struct claas_reply_to *to, const char *job_id,
                int64_t since, bool feedback)
{
    struct watcher *watcher;

    if (scheduler->draining)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, SHUTTING_DOWN);
    watcher = CLAAS_NEW(struct watcher);
    if (!watcher)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    watcher->scheduler = scheduler;
    watcher->reply_to = *to;
    snprintf(watcher->job_id, sizeof(watcher->job_id), "%s", job_id);
    watcher->seq = since;
    watcher->feedback = feedback;
    watcher->next = scheduler->watchers;
    scheduler->watchers = watcher;
    read_job(watcher); /* answers its own failures */
    return 0;
}

void watch_event(struct scheduler *scheduler, const cJSON *event)
{
    const char *job_id = "", *state = "";
    struct watcher *next;

    claas_json_get_string(event, "job_id", &job_id);
    claas_json_get_string(event, "state", &state);
    for (struct watcher *watcher = scheduler->watchers; watcher; watcher = next) {
        next = watcher->next;
        if (strcmp(watcher->job_id, job_id) != 0)
            continue;
        if (watcher->reading) {
            watcher->again = true;
            continue;
        }
        send_event(watcher, event);
        if (is_end_state(state))
            read_job(watcher); /* the whole job, for the reply */
    }
}

void watch_ended(struct scheduler *scheduler, const char *job_id)
{
    struct watcher *next;

    for (struct watcher *watcher = scheduler->watchers; watcher; watcher = next) {
        next = watcher->next;
        if (strcmp(watcher->job_id, job_id) != 0)
            continue;
        if (watcher->reading)
            watcher->again = true;
        else
            read_job(watcher);
    }
}

void watch_cancel(struct scheduler *scheduler, const struct claas_reply_to *to)
{
    for (struct watcher *watcher = scheduler->watchers; watcher; watcher = watcher->next) {
        if (watcher->reply_to.correlation == to->correlation &&
            strcmp(watcher->reply_to.to, to->to) == 0) {
            watcher_free(watcher);
            return;
        }
    }
}

void watch_free_all(struct scheduler *scheduler, bool tell)
{
    while (scheduler->watchers) {
        struct watcher *watcher = scheduler->watchers;

        if (tell)
            claas_actor_reply_error(scheduler->actor, &watcher->reply_to, CLAAS_ERR_UNAVAILABLE,
                                    SHUTTING_DOWN);
        watcher_free(watcher);
    }
}

int handle_job_watch(void *self, claas_message_t *message)
{
    const char *job_id = "";
    int64_t since = 0;

    claas_json_get_string(message->body, "job_id", &job_id);
    claas_json_get_int(message->body, "since", 0, (int64_t)1 << 53, &since);
    return watch_start(self, &message->reply_to, job_id, since, false);
}
