/* The scheduler actor: its handler table and its life, and the cancelling of jobs. */
#include "scheduler.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "scheduler_internal.h"

/* --- JOB_CANCEL ------------------------------------------------------------------------------- */

struct cancellation {
    struct claas_reply_to reply_to;
    char job_id[65];
    bool cancelled;
};

static void cancelled_job_read(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct cancellation *cancellation = arg;
    const cJSON *job = claas_json_get(reply->body, "job");
    cJSON *body;

    if (reply->error) {
        claas_actor_reply_error(scheduler->actor, &cancellation->reply_to, reply->error,
                                reply->error_text);
    } else {
        body = cJSON_CreateObject();
        claas_json_set_bool(body, "cancelled", cancellation->cancelled);
        claas_json_set(body, "job", cJSON_Duplicate(job, true));
        claas_actor_reply(scheduler->actor, &cancellation->reply_to, body);
    }
    free(cancellation);
}

static void reply_with_job(struct scheduler *scheduler, struct cancellation *cancellation)
{
    cJSON *body = cJSON_CreateObject();
    int rc;

    claas_json_set_string(body, "job_id", cancellation->job_id);
    rc = claas_actor_ask(scheduler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_JOB_GET,
                             .body = body,
                             .timeout_ms = ASK_MS,
                             .principal = cancellation->reply_to.principal,
                             .reply = cancelled_job_read,
                             .arg = cancellation,
                         },
                         NULL);
    if (rc < 0) {
        claas_actor_reply_error(scheduler->actor, &cancellation->reply_to, rc, claas_error_text());
        free(cancellation);
    }
}

/* A job that has ended on disk. */
static void let_go(struct scheduler *scheduler, struct job *job)
{
    job->cancel = true; /* also when an earlier cancellation could not be recorded */
    if (!job->run)
        job_remove(scheduler, job);
    else if (!job->run->publishing && !job->run->ending)
        cycle_run_drop_cancelled(job->run);
}

static void cancel_recorded(struct scheduler *scheduler, void *arg, int error, const char *text,
                            const cJSON *reply)
{
    struct cancellation *cancellation = arg;
    struct job *job = job_find(scheduler, cancellation->job_id);

    (void)text;
    (void)reply;
    cancellation->cancelled = error == 0;
    if (!error)
        claas_metric_add(CLAAS_METRIC_JOBS_CANCELLED, 1);
    if (!error || error == CLAAS_ERR_CONFLICT) {
        watch_ended(scheduler, cancellation->job_id);
        if (job)
            let_go(scheduler, job);
    } else {
        if (job)
            job->cancel = false;
        jobs_load(scheduler); /* it may be recorded all the same, or its cycle let it go already */
    }
    reply_with_job(scheduler, cancellation);
}

static int handle_cancel(void *self, claas_message_t *message)
{
    struct scheduler *scheduler = self;
    struct cancellation *cancellation = CLAAS_NEW(struct cancellation);
    const char *id = "";
    struct job *job;
    cJSON *event;
    int rc;

    if (!cancellation)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_json_get_string(message->body, "job_id", &id);
    cancellation->reply_to = message->reply_to;
    claas_copy_text(cancellation->job_id, sizeof(cancellation->job_id), id);
    job = job_find(scheduler, cancellation->job_id);
    if (!job || strcmp(job->principal, message->principal) != 0 ||
        (job->run && job->run->publishing)) {
        reply_with_job(scheduler, cancellation);
        return 0;
    }
    job->cancel = true; /* no step and no cycle with it begins */
    event = cJSON_CreateObject();
    claas_json_set_string(event, "kind", "state");
    rc = record_jobs(
        scheduler, &job, 1,
        &(struct record){
            .state = "cancelled", .event = event, .done = cancel_recorded, .arg = cancellation});
    if (rc < 0) {
        job->cancel = false;
        free(cancellation);
    }
    return rc;
}

/* Storage ended jobs with their adapter: which, its list says. */
static int handle_jobs_ended(void *self, claas_message_t *message)
{
    struct scheduler *scheduler = self;

    jobs_load(scheduler);
    return claas_actor_reply(scheduler->actor, &message->reply_to, NULL);
}

/* --- life ------------------------------------------------------------------------------------- */

static void given_up(void *self, const struct claas_reply_to *to)
{
    watch_cancel(self, to);
}

static void stop(void **self)
{
    struct scheduler *scheduler = *self;

    if (!scheduler)
        return;
    while (scheduler->runs)
        cycle_run_free(scheduler->runs);
    watch_free_all(scheduler, false);
    while (scheduler->jobs)
        job_remove(scheduler, scheduler->jobs);
    claas_json_free(&scheduler->crash_jobs);
    free(scheduler);
    *self = NULL;
}

static int start(claas_actor_t *actor, const void *args, void **ret_self)
{
    const struct claas_scheduler_args *given = args;
    struct scheduler *scheduler = CLAAS_NEW(struct scheduler);

    if (!scheduler)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    scheduler->actor = actor;
    scheduler->config = given->config;
    claas_actor_on_cancel(actor, given_up);
    jobs_load(scheduler);
    *ret_self = scheduler;
    return 0;
}

/* The cycles under way are dropped: their jobs begin anew at the next start. That they wait has to
 * be on disk before storage stops. */
static bool drain(void *self)
{
    struct scheduler *scheduler = self;
    struct cycle_run *next;

    scheduler->draining = true;
    for (struct cycle_run *run = scheduler->runs; run; run = next) {
        next = run->next;
        if (!run->publishing && !run->ending)
            cycle_run_abandon(run);
    }
    if (scheduler->runs || scheduler->records > 0)
        return false; /* seconds away from done */
    watch_free_all(scheduler, true);
    return true;
}

static const struct claas_handler handlers[] = {
    {CLAAS_MSG_FEEDBACK, handle_feedback},
    {CLAAS_MSG_JOB_WATCH, handle_job_watch},
    {CLAAS_MSG_JOB_CANCEL, handle_cancel},
    {CLAAS_MSG_JOBS_ENDED, handle_jobs_ended},
};

const struct claas_actor_class claas_scheduler_class = {
    .name = "scheduler",
    .handlers = handlers,
    .handler_count = CLAAS_COUNT(handlers),
    .start = start,
    .drain = drain,
    .stop = stop,
};
