/* Records transitions and steps: one JOB_RECORD for all jobs of a cycle; what storage wrote goes to
 * the watchers. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "scheduler_internal.h"

struct pending_record {
    recorded_fn *done;
    void *arg;
};

static void forget_waits(struct job *job)
{
    free(job->waits);
    job->waits = NULL;
}

static void recorded(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct pending_record *pending = arg;
    /* One that is not there ended long ago, and went with its adapter. */
    int error = reply->error == CLAAS_ERR_NOT_FOUND ? CLAAS_ERR_CONFLICT : reply->error;
    const cJSON *event;

    scheduler->records--;
    if (error)
        claas_warning("a job's transition was not recorded: %s", reply->error_text);
    for (struct job *job = scheduler->jobs; error && job; job = job->next)
        forget_waits(job); /* the reply does not say which jobs it was about */
    if (error == CLAAS_ERR_CONFLICT && !pending->done)
        jobs_load(scheduler); /* one of the jobs has ended on disk: its adapter was deleted, say */
    cJSON_ArrayForEach(event, claas_json_get(reply->body, "events")) watch_event(scheduler, event);
    if (pending->done)
        pending->done(scheduler, pending->arg, error, reply->error_text, reply->body);
    free(pending);
}

int record_jobs(struct scheduler *scheduler, struct job *const *jobs, int count,
                const struct record *record)
{
    struct pending_record *pending = CLAAS_NEW(struct pending_record);
    cJSON *body = cJSON_CreateObject();
    cJSON *ids = cJSON_CreateArray();
    int rc;

    for (int i = 0; i < count; i++) {
        cJSON_AddItemToArray(ids, cJSON_CreateString(jobs[i]->id));
        if (record->state)
            forget_waits(jobs[i]);
    }
    claas_json_set(body, "job_ids", ids);
    if (record->state)
        claas_json_set_string(body, "state", record->state);
    claas_json_set(body, "event", record->event ? record->event : cJSON_CreateObject());
    if (record->result)
        claas_json_set(body, "result", record->result);
    if (record->failure)
        claas_json_set_bool(body, "failure", true);
    if (!pending) {
        cJSON_Delete(body);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    *pending = (struct pending_record){record->done, record->arg};
    rc = claas_actor_ask(scheduler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_JOB_RECORD,
                             .body = body,
                             .timeout_ms = ASK_MS,
                             .principal = count > 0 ? jobs[0]->principal : NULL,
                             .reply = recorded,
                             .arg = pending,
                         },
                         NULL);
    if (rc < 0)
        free(pending);
    else
        scheduler->records++;
    return rc;
}

void record_waits(struct scheduler *scheduler, struct job *job, const char *reason)
{
    cJSON *event;

    if (job->waits && strcmp(job->waits, reason) == 0)
        return;
    event = cJSON_CreateObject();
    claas_json_set_string(event, "kind", "state");
    if (reason[0])
        claas_json_set_string(event, "reason", reason);
    if (record_jobs(scheduler, &job, 1, &(struct record){.state = "queued", .event = event}) == 0)
        job->waits = claas_format("%s", reason);
}
