/* Feedback comes in: checked, written by storage together with its job, and only then
 * acknowledged. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "scheduler_internal.h"

struct submission {
    struct claas_reply_to reply_to;
    bool wait;
    int items;
    cJSON *training;
};

static void submission_free(struct submission *submission)
{
    cJSON_Delete(submission->training);
    free(submission);
}

static int check_items(const cJSON *requests)
{
    const char *first = NULL;
    const cJSON *item;
    int index = 0;

    cJSON_ArrayForEach(item, requests)
    {
        const char *lora_id = NULL, *text = NULL, *response = NULL;

        if (claas_json_get_string(item, "lora_id", &lora_id) != 1 || !lora_id[0])
            return claas_fail(CLAAS_ERR_UNPROCESSABLE, "requests[%d] needs a lora_id", index);
        if (claas_json_get_string(item, "feedback", &text) != 1 || !text[0])
            return claas_fail(CLAAS_ERR_UNPROCESSABLE, "requests[%d] needs feedback", index);
        if (claas_json_get_string(item, "response_id", &response) != 1 &&
            claas_json_get_string(item, "response", &response) != 1)
            return claas_fail(CLAAS_ERR_UNPROCESSABLE, "requests[%d] needs response_id or response",
                              index);
        if (first && strcmp(first, lora_id) != 0)
            return claas_fail(CLAAS_ERR_INVALID, "all requests must use the same lora_id");
        first = lora_id;
        index++;
    }
    return 0;
}

static void put(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct submission *submission = arg;
    const char *job_id = "", *lora_id = "";
    bool duplicate = false;
    cJSON *body;
    int rc = 0;

    if (reply->error) {
        claas_actor_reply_error(scheduler->actor, &submission->reply_to, reply->error,
                                reply->error_text);
        submission_free(submission);
        if (reply->error == CLAAS_ERR_DEADLINE || reply->error == CLAAS_ERR_UNAVAILABLE)
            jobs_load(scheduler); /* it may be on disk all the same */
        return;
    }
    claas_json_get_string(reply->body, "job_id", &job_id);
    claas_json_get_string(reply->body, "lora_id", &lora_id);
    claas_json_get_bool(reply->body, "duplicate", &duplicate);
    if (!duplicate)
        claas_metric_add(CLAAS_METRIC_FEEDBACK_ACCEPTED, submission->items);
    if (!job_find(scheduler, job_id)) {
        if (duplicate)
            jobs_load(scheduler); /* ended, or never heard of because the first answer was lost */
        else
            job_add(scheduler, job_id, lora_id, submission->reply_to.principal, submission->items,
                    submission->training);
    }
    if (submission->wait) {
        rc = watch_start(scheduler, &submission->reply_to, job_id, 0, true);
        if (rc < 0)
            claas_actor_reply_error(scheduler->actor, &submission->reply_to, rc,
                                    claas_error_text());
    } else {
        body = cJSON_CreateObject();
        claas_json_set_string(body, "job_id", job_id);
        claas_json_set_bool(body, "duplicate", duplicate);
        claas_actor_reply(scheduler->actor, &submission->reply_to, body);
    }
    submission_free(submission);
    jobs_dispatch(scheduler);
}

int handle_feedback(void *self, claas_message_t *message)
{
    struct scheduler *scheduler = self;
    const cJSON *requests = claas_json_get(message->body, "requests");
    const cJSON *training = NULL;
    struct submission *submission;
    cJSON *body;
    int rc = check_items(requests);

    claas_json_get_object(message->body, "training", &training);
    if (rc == 0 && training)
        rc = training_check(training);
    if (rc == 0 && scheduler->draining)
        rc = claas_fail(CLAAS_ERR_UNAVAILABLE, "the server is shutting down");
    if (rc == 0 &&
        scheduler->job_count >= (size_t)claas_config_int(scheduler->config, "feedback.queue_max"))
        rc = claas_fail(CLAAS_ERR_OVERLOADED, "%zu jobs wait, try again later",
                        scheduler->job_count);
    submission = rc == 0 ? CLAAS_NEW(struct submission) : NULL;
    if (rc == 0 && !submission)
        rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc < 0)
        return rc;
    submission->reply_to = message->reply_to;
    submission->items = cJSON_GetArraySize(requests);
    submission->training = training ? cJSON_Duplicate(training, true) : NULL;
    claas_json_get_bool(message->body, "wait", &submission->wait);
    body = CLAAS_TAKE(message->body);
    message->body = cJSON_CreateObject();
    cJSON_DeleteItemFromObjectCaseSensitive(body, "wait");
    rc = claas_actor_ask(scheduler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_FEEDBACK_PUT,
                             .body = body,
                             .timeout_ms = ASK_MS,
                             .principal = message->principal,
                             .reply = put,
                             .arg = submission,
                         },
                         NULL);
    if (rc < 0)
        submission_free(submission);
    return rc;
}
