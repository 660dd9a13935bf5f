/* How cycles end: the best candidate is staged and published, or all were refused, or something
 * failed, or the jobs were cancelled, or the server stops. Every way out leaves each job either
 * ended on disk or waiting again. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "scheduler_internal.h"

#define RETRY_FIRST_MS 500
#define RETRY_FULL_MS  5000 /* after a disk that is full or fails, or a full device */
#define AWAY_MAX       3    /* doublings of the first delay while a peer is away: 4 s */
#define LOST_MAX       6    /* doublings where each try loses a cycle's work: 5 minutes */
#define STRIKES_MAX    100  /* of a job, in messages */
#define CROWDED_MAX    3    /* tries that met a full device beside other cycles; then alone */

void cycle_run_free(struct cycle_run *run)
{
    struct scheduler *scheduler = run->scheduler;
    struct cycle_run **link = &scheduler->runs;

    while (*link != run)
        link = &(*link)->next;
    *link = run->next;
    scheduler->run_count--;
    if (run->ask)
        claas_actor_cancel(scheduler->actor, run->ask);
    for (int i = 0; i < run->job_count; i++)
        run->jobs[i]->run = NULL;
    plan_done(&run->plan);
    cJSON_Delete(run->base);
    cJSON_Delete(run->best_metadata);
    cJSON_Delete(run->steps);
    cJSON_Delete(run->gate);
    free(run);
}

static void end_trainer(struct cycle_run *run)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "cycle_id", run->cycle_id);
    claas_actor_tell(run->scheduler->actor, run->trainer, CLAAS_MSG_CYCLE_END, body);
}

/* Otherwise jobs that only wait would look as if they ran, and get a strike for the next crash. One
 * record for each: one of all would fail if one of the jobs has ended meanwhile. */
static void record_waiting(struct cycle_run *run)
{
    for (int i = 0; i < run->job_count && !run->waits; i++)
        if (!run->jobs[i]->cancel)
            record_waits(run->scheduler, run->jobs[i], run->away);
}

void cycle_run_abandon(struct cycle_run *run)
{
    record_waiting(run);
    end_trainer(run);
    cycle_run_free(run);
}

/* The jobs have ended on disk; the next cycle may start. */
static void close_run(struct cycle_run *run, int metric)
{
    struct scheduler *scheduler = run->scheduler;

    end_trainer(run);
    claas_metric_add(metric, run->job_count);
    while (run->job_count > 0) {
        struct job *job = run->jobs[--run->job_count];

        claas_metric_observe(CLAAS_METRIC_JOB_SECONDS,
                             (double)(claas_clock_ms() - job->accepted_ms) / 1e3);
        job_remove(scheduler, job);
    }
    cycle_run_free(run);
    jobs_dispatch(scheduler);
}

/* The jobs wait again, for at least delay_ms; cancelled ones are let go. The next cycle is left to
 * a timer: this may be called from within the start of one. */
static void requeue(struct cycle_run *run, int64_t delay_ms)
{
    struct scheduler *scheduler = run->scheduler;
    int kept = 0;

    for (int i = 0; i < run->job_count; i++) {
        struct job *job = run->jobs[i];

        if (job->cancel) {
            job_remove(scheduler, job);
        } else {
            job->not_before_ms = claas_clock_ms() + delay_ms;
            run->jobs[kept++] = job;
        }
    }
    run->job_count = kept;
    cycle_run_abandon(run);
    jobs_wake(scheduler, 0);
}

/* The jobs wait again, each for a cycle of its own: one of them may be what makes the cycle
 * fail. */
static void part(struct cycle_run *run, int64_t delay_ms)
{
    for (int i = 0; i < run->job_count; i++)
        run->jobs[i]->alone = true;
    requeue(run, delay_ms);
}

/* A record is for all jobs of the run or none. So if one of them has ended meanwhile in another way
 * (CONFLICT), the others have no end yet and wait again. */
static void end_recorded(struct cycle_run *run, int error, int metric)
{
    run->ending = false;
    if (!error) {
        close_run(run, metric);
        return;
    }
    if (error == CLAAS_ERR_CONFLICT)
        jobs_load(run->scheduler);
    requeue(run, error == CLAAS_ERR_CONFLICT ? 0 : RETRY_FULL_MS);
}

/* Records something that ends the run when it is on disk. */
static void record_end(struct cycle_run *run, const struct record *record)
{
    run->ending = true;
    if (record_jobs(run->scheduler, run->jobs, run->job_count, record) < 0) {
        run->ending = false;
        requeue(run, RETRY_FULL_MS);
    }
}

/* --- failure ---------------------------------------------------------------------------------- */

struct failed_run {
    struct cycle_run *run;
    int code;
    char text[CLAAS_ERROR_TEXT_BYTES];
};

static void parked(struct scheduler *scheduler, void *arg, int error, const char *text,
                   const cJSON *reply)
{
    struct cycle_run *run = arg;

    (void)scheduler;
    (void)text;
    (void)reply;
    end_recorded(run, error, CLAAS_METRIC_JOBS_FAILED);
}

static void park(struct cycle_run *run, int code, const char *text)
{
    cJSON *event = cJSON_CreateObject();
    cJSON *result = cJSON_CreateObject();

    claas_json_set_string(event, "kind", "state");
    claas_json_set_string(event, "error", text);
    claas_json_set_string(event, "code", claas_err_name(code));
    claas_json_set_string(result, "error", text);
    record_end(
        run, &(struct record){
                 .state = "failed", .event = event, .result = result, .done = parked, .arg = run});
}

/* 0.5 s, doubled with each strike. A full device gets more time, since memory comes back when chats
 * end and adapters are dropped: 5 s without a strike (other cycles ran), then 10 s, 20 s. */
static int64_t retry_delay(int code, int64_t strikes)
{
    int64_t first = code == CLAAS_ERR_NO_MEMORY ? RETRY_FULL_MS : RETRY_FIRST_MS;

    return first << (strikes < 6 ? strikes : 6);
}

static void struck(struct scheduler *scheduler, void *arg, int error, const char *text,
                   const cJSON *reply)
{
    struct failed_run *failed = arg;
    struct cycle_run *run = failed->run;
    int64_t strikes = 0;

    (void)text;
    run->ending = false;
    claas_json_get_int(reply, "strikes", 0, STRIKES_MAX, &strikes);
    if (error) {
        end_recorded(run, error, CLAAS_METRIC_JOBS_FAILED);
    } else if (run->job_count == 1 && !run->company &&
               strikes >= claas_config_int(scheduler->config, "cycle.retries")) {
        park(run, failed->code, failed->text);
    } else {
        run->waits = true;
        for (int i = 0; i < run->job_count; i++)
            run->jobs[i]->sole = true;
        part(run, retry_delay(failed->code, strikes));
    }
    free(failed);
}

static bool is_of_disk(int code)
{
    return code == CLAAS_ERR_NO_SPACE || code == CLAAS_ERR_IO || code == CLAAS_ERR_DENIED;
}

/* Failures that say nothing against the job: the peer is away or stops; the disk is full, fails or
 * lets nobody write. Not so a lost device: the job may be what its kernels faulted on, and would
 * lose the next device too. */
static bool is_blameless(int code)
{
    return code == CLAAS_ERR_UNAVAILABLE || code == CLAAS_ERR_OVERLOADED ||
           code == CLAAS_ERR_CANCELLED || is_of_disk(code);
}

/* Failures that no retry mends. */
static bool is_hopeless(int code)
{
    return code == CLAAS_ERR_INVALID || code == CLAAS_ERR_LIMIT || code == CLAAS_ERR_NOT_FOUND ||
           code == CLAAS_ERR_UNPROCESSABLE || code == CLAAS_ERR_CORRUPT ||
           code == CLAAS_ERR_FORMAT || code == CLAAS_ERR_UNSUPPORTED || code == CLAAS_ERR_TOO_LARGE;
}

/* A strike for each of the jobs; what follows depends on how many they have now. No job is parked
 * for a failure while others ran: it has its next try alone, and that decides. */
static void strike(struct cycle_run *run, int code, const char *text)
{
    struct failed_run *failed = CLAAS_NEW(struct failed_run);
    cJSON *event;

    if (!failed) {
        requeue(run, RETRY_FULL_MS);
        return;
    }
    failed->run = run;
    failed->code = code;
    claas_copy_text(failed->text, sizeof(failed->text), text);
    event = cJSON_CreateObject();
    claas_json_set_string(event, "kind", "error");
    claas_json_set_string(event, "error", text);
    run->ending = true;
    if (record_jobs(run->scheduler, run->jobs, run->job_count,
                    &(struct record){.state = "queued",
                                     .event = event,
                                     .failure = true,
                                     .done = struck,
                                     .arg = failed}) < 0) {
        free(failed);
        run->ending = false;
        requeue(run, RETRY_FULL_MS);
    }
}

/* A full device while other cycles ran says nothing against the jobs, but after CROWDED_MAX times
 * they have to show that they fit alone. */
static bool is_crowded(struct cycle_run *run, int code)
{
    bool crowded = code == CLAAS_ERR_NO_MEMORY && run->company;

    for (int i = 0; crowded && i < run->job_count; i++)
        if (++run->jobs[i]->crowded >= CROWDED_MAX)
            run->jobs[i]->sole = true;
    if (crowded && run->scheduler->run_count > 1)
        turns_narrow(run->scheduler);
    return crowded;
}

/* The longer a peer stays away, the less often it is tried; and so for a version that cannot be
 * written, which is found out when all steps are done. To look whether a disk is well again before
 * the first step costs nothing. */
static int64_t blameless_delay(struct cycle_run *run, int code)
{
    bool lost = run->step > 0 && (is_of_disk(code) || code == CLAAS_ERR_OVERLOADED);
    int times = 0;

    if (is_of_disk(code) && !lost)
        return RETRY_FULL_MS;
    for (int i = 0; i < run->job_count; i++) {
        struct job *job = run->jobs[i];

        job->away = lost || run->step == 0 ? job->away + 1 : 0;
        times = times > job->away ? times : job->away;
    }
    times = times > 0 ? times - 1 : 0;
    if (lost)
        return (int64_t)RETRY_FULL_MS << (times < LOST_MAX ? times : LOST_MAX);
    return (int64_t)RETRY_FIRST_MS << (times < AWAY_MAX ? times : AWAY_MAX);
}

void cycle_run_fail(struct cycle_run *run, int code, const char *text)
{
    claas_warning("cycle %s of %s: %s", run->cycle_id, run->lora_id, text);
    run->publishing = false;
    if (cycle_run_drop_cancelled(run))
        return;
    if (code == CLAAS_ERR_NOT_FOUND && run->step > 0)
        code = CLAAS_ERR_UNAVAILABLE; /* the trainer was restarted and does not know the cycle */
    if (code == CLAAS_ERR_CONFLICT) {
        jobs_load(run->scheduler); /* the parent changed, or a job has ended: which one? */
        requeue(run, RETRY_FIRST_MS);
    } else if (is_crowded(run, code)) {
        requeue(run, retry_delay(code, 0));
    } else if (is_blameless(code)) {
        claas_copy_text(run->away, sizeof(run->away), text);
        for (int i = 0; i < run->job_count && code == CLAAS_ERR_IO; i++)
            run->jobs[i]->alone = true; /* what cannot be read may be of one of them */
        requeue(run, blameless_delay(run, code));
    } else if (!is_hopeless(code)) {
        strike(run, code, text);
    } else if (run->job_count > 1) {
        part(run, 0);
    } else {
        park(run, code, text);
    }
}

void cycle_run_fail_trainer(struct cycle_run *run, int code, const char *text)
{
    char how[128];

    if (code == CLAAS_ERR_UNAVAILABLE &&
        crash_since(run->scheduler, run->started_unix_ms, how, sizeof(how)))
        cycle_run_fail(run, CLAAS_ERR_INTERNAL, how);
    else
        cycle_run_fail(run, code, text);
}

/* --- cancelling ------------------------------------------------------------------------------- */

bool cycle_run_drop_cancelled(struct cycle_run *run)
{
    for (int i = 0; i < run->job_count; i++) {
        if (run->jobs[i]->cancel) {
            /* What was learnt so far came from the cancelled feedback too: the others begin
             * anew. */
            requeue(run, 0);
            return true;
        }
    }
    return false;
}

/* --- publishing ------------------------------------------------------------------------------- */

static cJSON *result_object(struct cycle_run *run)
{
    cJSON *result = cJSON_CreateObject();

    if (run->best_metadata)
        claas_json_set(result, "metadata", cJSON_Duplicate(run->best_metadata, true));
    claas_json_set(result, "steps", cJSON_Duplicate(run->steps, true));
    claas_json_set_int(result, "published_step", run->best_step);
    if (run->base)
        claas_json_set(result, "base", cJSON_Duplicate(run->base, true));
    if (run->gate)
        claas_json_set(result, "gate", cJSON_Duplicate(run->gate, true));
    claas_json_set_int(result, "duration_ms", claas_clock_ms() - run->started_ms);
    return result;
}

static void published(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct cycle_run *run = arg;
    const cJSON *event;

    run->ask = 0;
    if (reply->error) {
        cycle_run_fail(run, reply->error, reply->error_text);
        return;
    }
    cJSON_ArrayForEach(event, claas_json_get(reply->body, "events")) watch_event(scheduler, event);
    close_run(run, CLAAS_METRIC_JOBS_DONE);
}

static void staged(void *self, void *arg, claas_message_t *reply)
{
    struct cycle_run *run = arg;
    cJSON *body = NULL, *ids;
    const char *directory = "";
    int rc;

    (void)self;
    run->ask = 0;
    if (reply->error) {
        cycle_run_fail_trainer(run, reply->error, reply->error_text);
        return;
    }
    claas_json_get_string(reply->body, "directory", &directory);
    body = cJSON_CreateObject();
    ids = cJSON_CreateArray();
    for (int i = 0; i < run->job_count; i++)
        cJSON_AddItemToArray(ids, cJSON_CreateString(run->jobs[i]->id));
    claas_json_set_string(body, "lora_id", run->lora_id);
    claas_json_set_int(body, "parent", run->version);
    claas_json_set_string(body, "directory", directory);
    claas_json_set(body, "job_ids", ids);
    claas_json_set(body, "result", result_object(run));
    rc = cycle_run_ask(run, "storage", CLAAS_MSG_VERSION_PUBLISH, body, 2 * ASK_MS, published);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

static void stage(struct cycle_run *run)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *event = cJSON_CreateObject();
    int rc;

    run->publishing = true;
    claas_json_set_string(event, "kind", "state");
    record_jobs(run->scheduler, run->jobs, run->job_count,
                &(struct record){.state = "publishing", .event = event});
    claas_json_set_string(body, "cycle_id", run->cycle_id);
    rc = cycle_run_ask(run, run->trainer, CLAAS_MSG_CYCLE_STAGE, body,
                       cycle_run_patience(run, 10 * ASK_MS), staged);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

static void rejected(struct scheduler *scheduler, void *arg, int error, const char *text,
                     const cJSON *reply)
{
    struct cycle_run *run = arg;

    (void)scheduler;
    (void)text;
    (void)reply;
    end_recorded(run, error, CLAAS_METRIC_JOBS_REJECTED);
}

void cycle_run_finish(struct cycle_run *run)
{
    cJSON *event = cJSON_CreateObject();
    cJSON *result;

    claas_json_set_string(event, "kind", "state");
    record_jobs(run->scheduler, run->jobs, run->job_count,
                &(struct record){.state = "gating", .event = event});
    if (run->best_step > 0) {
        stage(run);
        return;
    }
    event = cJSON_CreateObject();
    result = result_object(run);
    claas_json_set_string(event, "kind", "state");
    claas_json_set_string(event, "reason", run->last_reason);
    claas_json_set_string(result, "reason", run->last_reason);
    record_end(
        run,
        &(struct record){
            .state = "rejected", .event = event, .result = result, .done = rejected, .arg = run});
}
