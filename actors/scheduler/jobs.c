/* The list of unfinished jobs, and the start of cycles: of the adapter whose turn it is (turns.c),
 * all waiting jobs of the same kind together. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "scheduler_internal.h"

#define RETRY_MS  1000
#define PAGE_JOBS 1000 /* of one JOBS_UNFINISHED */

struct job *job_add(struct scheduler *scheduler, const char *id, const char *lora_id,
                    const char *principal, int items, const cJSON *training)
{
    struct job *job = CLAAS_NEW(struct job);
    struct job **link = scheduler->last_job ? &scheduler->last_job->next : &scheduler->jobs;

    if (!job)
        return NULL; /* it stays on disk, and the next reading of the list finds it */
    snprintf(job->id, sizeof(job->id), "%s", id);
    snprintf(job->lora_id, sizeof(job->lora_id), "%s", lora_id);
    snprintf(job->principal, sizeof(job->principal), "%s", principal);
    job->items = items > 0 ? items : 1;
    job->training = training ? cJSON_Duplicate(training, true) : NULL;
    job->accepted_ms = claas_clock_ms();
    *link = scheduler->last_job = job;
    scheduler->job_count++;
    scheduler->unlisted++;
    claas_metric_set(CLAAS_METRIC_JOBS_QUEUED, (double)scheduler->job_count);
    return job;
}

struct job *job_find(struct scheduler *scheduler, const char *id)
{
    struct job *job = scheduler->jobs;

    while (job && strcmp(job->id, id) != 0)
        job = job->next;
    return job;
}

void job_remove(struct scheduler *scheduler, struct job *job)
{
    struct job **link = &scheduler->jobs, *before = NULL;

    while (*link && *link != job) {
        before = *link;
        link = &before->next;
    }
    if (!*link)
        return;
    *link = job->next;
    if (scheduler->last_job == job)
        scheduler->last_job = before;
    cJSON_Delete(job->training);
    free(job->waits);
    free(job);
    scheduler->job_count--;
    claas_metric_set(CLAAS_METRIC_JOBS_QUEUED, (double)scheduler->job_count);
}

/* --- the next cycle --------------------------------------------------------------------------- */

static void woken(void *self, void *arg)
{
    struct scheduler *scheduler = self;

    (void)arg;
    scheduler->timer = 0;
    jobs_dispatch(scheduler);
}

void jobs_wake(struct scheduler *scheduler, int64_t delay_ms)
{
    int64_t due = claas_clock_ms() + delay_ms;

    if (scheduler->timer > 0 && scheduler->wake_ms <= due)
        return;
    claas_actor_timer_cancel(scheduler->actor, scheduler->timer);
    scheduler->timer = claas_actor_timer(scheduler->actor, delay_ms, woken, NULL);
    scheduler->wake_ms = due;
    if (scheduler->timer < 0)
        claas_warning("jobs wait for the next feedback: %s", claas_error_text());
}

/* Whether two jobs may be learnt in one cycle: same adapter, same training values, and `sole` (no
 * other cycle at the same time) for both or for neither. */
static bool fits(const struct job *a, const struct job *b)
{
    if (a->alone || b->alone || b->cancel || a->sole != b->sole)
        return false;
    if (strcmp(a->lora_id, b->lora_id) != 0 || strcmp(a->principal, b->principal) != 0)
        return false;
    if (!a->training || !b->training)
        return !a->training && !b->training;
    return cJSON_Compare(a->training, b->training, true);
}

/* The cycle of the adapter whose first waiting job is `first`. */
static void start_cycle(struct scheduler *scheduler, struct job *first)
{
    struct job *taken[CYCLE_JOBS_MAX];
    int count = 0, items = 0;
    int items_max = (int)claas_config_int(scheduler->config, "feedback.items_max");

    for (struct job *job = first; job && count < CYCLE_JOBS_MAX; job = job->next) {
        if (count > 0 && (!fits(first, job) || items + job->items > items_max))
            continue;
        taken[count++] = job;
        items += job->items;
    }
    turn_take(scheduler, first->lora_id);
    cycle_run_start(scheduler, taken, count);
}

void jobs_dispatch(struct scheduler *scheduler)
{
    int tries = turns_limit(scheduler); /* a bound: a cycle may fail within its start */
    int64_t wait = -1;
    struct job *first;

    if (scheduler->draining || !scheduler->loaded)
        return;
    while (scheduler->loaded && tries-- > 0 && (first = turn_next(scheduler, &wait)) != NULL)
        start_cycle(scheduler, first);
    if (wait > 0)
        jobs_wake(scheduler, wait);
}

/* --- the list --------------------------------------------------------------------------------- */

static void load_again(void *self, void *arg)
{
    struct scheduler *scheduler = self;

    (void)arg;
    scheduler->loading = false;
    jobs_load(scheduler);
}

void jobs_load_later(struct scheduler *scheduler)
{
    scheduler->loading = true; /* so jobs_load does not ask before the timer does */
    claas_actor_timer(scheduler->actor, RETRY_MS, load_again, NULL);
}

/* Both lists are in order of arrival: most often the job is the one after `last`. At the start
 * there is nothing to search. */
static struct job *find_next(struct scheduler *scheduler, struct job *last, const char *id)
{
    if (last && last->next && strcmp(last->next->id, id) == 0)
        return last->next;
    return scheduler->unlisted > 0 ? job_find(scheduler, id) : NULL;
}

static void take_unfinished(struct scheduler *scheduler, const cJSON *jobs)
{
    struct job *job = NULL;
    const cJSON *json;

    cJSON_ArrayForEach(json, jobs)
    {
        const char *id = NULL, *lora_id = NULL, *principal = "local";
        const cJSON *training = NULL;
        int64_t items = 1, strikes = 0;

        claas_json_get_string(json, "job_id", &id);
        claas_json_get_string(json, "lora_id", &lora_id);
        claas_json_get_string(json, "principal", &principal);
        claas_json_get_int(json, "items", 1, 16, &items);
        claas_json_get_int(json, "strikes", 0, 1000, &strikes);
        claas_json_get_object(json, "training", &training);
        if (!id || !lora_id)
            continue;
        job = find_next(scheduler, job, id);
        if (!job)
            job = job_add(scheduler, id, lora_id, principal, (int)items, training);
        if (!job)
            continue;
        scheduler->unlisted--;
        job->listing = false;
        job->alone = job->alone || strikes > 0;
        job->sole = job->sole || strikes > 0;
    }
}

/* Jobs that storage does not list have ended there: with their adapter, or by a request whose
 * answer was lost. */
static void drop_ended(struct scheduler *scheduler)
{
    struct job *next;

    for (struct job *job = scheduler->jobs; job; job = next) {
        next = job->next;
        if (!job->listing)
            continue;
        job->listing = false;
        watch_ended(scheduler, job->id);
        job->cancel = true; /* its cycle lets it go */
        if (!job->run)
            job_remove(scheduler, job);
    }
}

static void ask_unfinished(struct scheduler *scheduler, const char *after);

static void unfinished(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    const cJSON *page = claas_json_get(reply->body, "jobs");
    const char *last = NULL;
    bool again;

    (void)arg;
    if (reply->error) {
        jobs_load_later(scheduler);
        return;
    }
    take_unfinished(scheduler, page);
    if (!scheduler->crash_known)
        crash_note(scheduler, page);
    claas_json_get_string(cJSON_GetArrayItem(page, PAGE_JOBS - 1), "job_id", &last);
    if (last) {
        ask_unfinished(scheduler, last);
        return;
    }
    scheduler->loading = false;
    drop_ended(scheduler);
    if (!scheduler->crash_known && crash_count(scheduler))
        return; /* the list is read anew when the strikes are on disk */
    scheduler->crash_known = true;
    again = scheduler->load_again;
    if (scheduler->turn_count == 0 && scheduler->job_count > 0 && !again)
        claas_info("%zu unfinished jobs go on", scheduler->job_count);
    scheduler->loaded = true;
    /* Also when the list is due anew: who makes that happen again and again is not to hold up the
     * others. A job that has ended meanwhile ends its cycle at CYCLE_INPUT. */
    jobs_dispatch(scheduler);
    if (again)
        jobs_load(scheduler);
}

static void ask_unfinished(struct scheduler *scheduler, const char *after)
{
    cJSON *body = cJSON_CreateObject();
    int rc;

    claas_json_set_int(body, "limit", PAGE_JOBS);
    if (after)
        claas_json_set_string(body, "after", after);
    rc = claas_actor_ask(scheduler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_JOBS_UNFINISHED,
                             .body = body,
                             .timeout_ms = ASK_MS,
                             .reply = unfinished,
                         },
                         NULL);
    if (rc < 0)
        jobs_load_later(scheduler);
}

void jobs_load(struct scheduler *scheduler)
{
    scheduler->loaded = false;
    scheduler->load_again = scheduler->loading;
    if (scheduler->loading)
        return;
    for (struct job *job = scheduler->jobs; job; job = job->next)
        job->listing = true; /* not those that come later: the list may be older than they are */
    scheduler->loading = true;
    scheduler->unlisted = scheduler->job_count;
    claas_json_free(&scheduler->crash_jobs);
    ask_unfinished(scheduler, NULL);
}
