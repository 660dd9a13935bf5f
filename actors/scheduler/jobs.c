/* The list of unfinished jobs and the choice of the next cycle: the adapter that has waited
 * longest, but never the same one twice while another waits, with all its waiting jobs of the same
 * kind together. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "scheduler_internal.h"

#define RETRY_MS 1000

struct job *job_add(struct scheduler *scheduler, const char *id, const char *lora_id,
                    const char *principal, int items, const cJSON *training)
{
    struct job *job = CLAAS_NEW(struct job);
    struct job **link = &scheduler->jobs;

    if (!job)
        return NULL; /* it stays on disk and is found at the next start */
    snprintf(job->id, sizeof(job->id), "%s", id);
    snprintf(job->lora_id, sizeof(job->lora_id), "%s", lora_id);
    snprintf(job->principal, sizeof(job->principal), "%s", principal);
    job->items = items > 0 ? items : 1;
    job->training = training ? cJSON_Duplicate(training, true) : NULL;
    job->accepted_ms = claas_clock_ms();
    while (*link)
        link = &(*link)->next;
    *link = job;
    scheduler->job_count++;
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
    struct job **link = &scheduler->jobs;

    while (*link && *link != job)
        link = &(*link)->next;
    if (!*link)
        return;
    *link = job->next;
    cJSON_Delete(job->training);
    free(job);
    scheduler->job_count--;
    claas_metric_set(CLAAS_METRIC_JOBS_QUEUED, (double)scheduler->job_count);
}

/* --- the next cycle
 * ---------------------------------------------------------------------------------------------------
 */

static void dispatch_later(void *self, void *arg)
{
    struct scheduler *scheduler = self;

    (void)arg;
    scheduler->timer = 0;
    jobs_dispatch(scheduler);
}

/* The first job of the adapter whose turn it is; NULL if none may start now. *ret_wait: until the
 * earliest may. */
static struct job *first_job(struct scheduler *scheduler, int64_t *ret_wait)
{
    int64_t now = claas_clock_ms();
    struct job *same = NULL;

    *ret_wait = -1;
    for (struct job *job = scheduler->jobs; job; job = job->next) {
        int64_t wait = job->not_before_ms - now;

        if (wait > 0) {
            if (*ret_wait < 0 || wait < *ret_wait)
                *ret_wait = wait;
            continue;
        }
        if (strcmp(job->lora_id, scheduler->last_lora_id) != 0)
            return job;
        if (!same)
            same = job;
    }
    return same;
}

static bool same_kind(const struct job *a, const struct job *b)
{
    if (strcmp(a->lora_id, b->lora_id) != 0 || strcmp(a->principal, b->principal) != 0)
        return false;
    if (!a->training || !b->training)
        return !a->training && !b->training;
    return cJSON_Compare(a->training, b->training, true);
}

void jobs_dispatch(struct scheduler *scheduler)
{
    struct job *taken[CYCLE_JOBS_MAX];
    int count = 0, items = 0;
    int items_max = (int)claas_config_int(scheduler->config, "feedback.items_max");
    int64_t wait;
    struct job *first;

    if (scheduler->run || scheduler->draining || !scheduler->loaded)
        return;
    first = first_job(scheduler, &wait);
    if (!first) {
        if (wait > 0 && !scheduler->timer)
            scheduler->timer = claas_actor_timer(scheduler->actor, wait, dispatch_later, NULL);
        return;
    }
    for (struct job *job = first; job && count < CYCLE_JOBS_MAX; job = job->next) {
        if (!same_kind(first, job) || (count > 0 && items + job->items > items_max))
            continue;
        taken[count++] = job;
        items += job->items;
    }
    cycle_run_start(scheduler, taken, count);
}

/* --- after a start
 * ----------------------------------------------------------------------------------------------------
 */

static void load_again(void *self, void *arg)
{
    (void)arg;
    jobs_load(self);
}

static void take_unfinished(struct scheduler *scheduler, const cJSON *jobs)
{
    const cJSON *json;

    cJSON_ArrayForEach(json, jobs)
    {
        const char *id = NULL, *lora_id = NULL, *principal = "local";
        const cJSON *training = NULL;
        int64_t items = 1;

        claas_json_get_string(json, "job_id", &id);
        claas_json_get_string(json, "lora_id", &lora_id);
        claas_json_get_string(json, "principal", &principal);
        claas_json_get_int(json, "items", 1, 16, &items);
        claas_json_get_object(json, "training", &training);
        if (id && lora_id && !job_find(scheduler, id))
            job_add(scheduler, id, lora_id, principal, (int)items, training);
    }
}

static void unfinished(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;

    (void)arg;
    if (reply->error) {
        claas_actor_timer(scheduler->actor, RETRY_MS, load_again, NULL);
        return;
    }
    take_unfinished(scheduler, claas_json_get(reply->body, "jobs"));
    if (scheduler->job_count > 0)
        claas_info("%zu unfinished jobs go on", scheduler->job_count);
    scheduler->loaded = true;
    jobs_dispatch(scheduler);
}

void jobs_load(struct scheduler *scheduler)
{
    int rc = claas_actor_ask(scheduler->actor,
                             &(struct claas_ask){
                                 .to = "storage",
                                 .type = CLAAS_MSG_JOBS_UNFINISHED,
                                 .timeout_ms = ASK_MS,
                                 .reply = unfinished,
                             },
                             NULL);

    if (rc < 0)
        claas_actor_timer(scheduler->actor, RETRY_MS, load_again, NULL);
}
