/* The answer to feedback whose job has ended: the contract's fields, and what is new here: job_id,
 * version, reason. */
#include <stdio.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "feedback.h"
#include "request.h"

/* --- a job's history --- */

/* When the job came into a state, Unix ms; 0 if never. */
static int64_t time_of(const cJSON *job, const char *state)
{
    const cJSON *transition;
    int64_t time = 0;

    cJSON_ArrayForEach(transition, claas_json_get(job, "transitions"))
    {
        const char *name = "";

        claas_json_get_string(transition, "state", &name);
        if (strcmp(name, state) == 0)
            claas_json_get_int(transition, "time", 0, INT64_MAX, &time);
    }
    return time;
}

/* The contract's phases: the job's last state before it failed. */
static const char *failed_phase(const cJSON *job)
{
    const cJSON *transition;
    const char *phase = "distill";

    cJSON_ArrayForEach(transition, claas_json_get(job, "transitions"))
    {
        const char *name = "";

        claas_json_get_string(transition, "state", &name);
        if (strcmp(name, "publishing") == 0)
            phase = "save";
        else if (strcmp(name, "gating") == 0)
            phase = "gate";
        else if (strcmp(name, "failed") != 0)
            phase = "distill";
    }
    return phase;
}

static int64_t span(int64_t from, int64_t to)
{
    return from > 0 && to > from ? to - from : 0;
}

static cJSON *timing(const struct request *request, const cJSON *job)
{
    cJSON *timing = cJSON_CreateObject();
    int64_t distill = 0;

    if (claas_json_get_int(claas_json_get(job, "result"), "duration_ms", 0, INT64_MAX, &distill) !=
        1)
        distill = span(time_of(job, "training"), time_of(job, "done"));
    claas_json_set_int(timing, "sleep", 0);
    claas_json_set_int(timing, "distill", distill);
    claas_json_set_int(timing, "save", span(time_of(job, "publishing"), time_of(job, "done")));
    claas_json_set_int(timing, "wake", 0);
    claas_json_set_int(timing, "logprobs", 0);
    claas_json_set_int(timing, "total", (claas_clock_ns() - request->started_ns) / 1000000);
    return timing;
}

/* --- answers --- */

static void answer_failed(struct request *request, const cJSON *job, const char *job_id)
{
    CLAAS_AUTO_FREE char *text = NULL;
    const char *error = "unknown error";
    cJSON *body = cJSON_CreateObject();

    if (claas_json_get_string(job, "error", &error) != 1)
        claas_json_get_string(claas_json_get(job, "result"), "error", &error);
    text = claas_format("Feedback update failed in phase '%s': %s", failed_phase(job), error);
    claas_json_set_string(body, "detail", text);
    claas_json_set_string(body, "job_id", job_id);
    request_header(request, "x-should-retry", "false"); /* it was retried already */
    request_answer_json(request, MHD_HTTP_INTERNAL_SERVER_ERROR, body);
}

static void answer_cancelled(struct request *request, const char *job_id)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "detail", "the job was cancelled");
    claas_json_set_string(body, "job_id", job_id);
    request_header(request, "x-should-retry", "false");
    request_answer_json(request, MHD_HTTP_CONFLICT, body);
}

/* {lora_id, metadata}, the published step's figures with all steps. */
static cJSON *distill_result(const cJSON *job, const char *lora_id)
{
    const cJSON *result = claas_json_get(job, "result");
    const cJSON *metadata = claas_json_get(result, "metadata");
    const cJSON *steps = claas_json_get(result, "steps");
    cJSON *object = cJSON_CreateObject();
    cJSON *copy = metadata ? cJSON_Duplicate(metadata, true) : cJSON_CreateObject();

    claas_json_set_string(object, "lora_id", lora_id);
    if (steps)
        claas_json_set(copy, "steps", cJSON_Duplicate(steps, true));
    claas_json_set(object, "metadata", copy);
    return object;
}

static void set_reason(cJSON *body, const cJSON *job)
{
    const char *reason = NULL;

    if (claas_json_get_string(job, "reason", &reason) != 1)
        claas_json_get_string(claas_json_get(job, "result"), "reason", &reason);
    if (reason)
        claas_json_set_string(body, "reason", reason);
    else
        claas_json_set_null(body, "reason");
}

static void answer_ended(struct request *request, const cJSON *job, const char *job_id, int batch,
                         bool rejected)
{
    cJSON *body = cJSON_CreateObject();
    const char *lora_id = "";
    int64_t version = 0;
    cJSON *vllm;

    claas_json_get_string(job, "lora_id", &lora_id);
    claas_json_set_string(body, "status", rejected ? "rejected" : "ok");
    claas_json_set_string(body, "request_id", request->id);
    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set(body, "distill_result",
                   rejected ? cJSON_CreateNull() : distill_result(job, lora_id));
    vllm = claas_json_set(body, "vllm", cJSON_CreateObject());
    claas_json_set_bool(vllm, "slept", false);
    claas_json_set_bool(vllm, "woke", false);
    claas_json_set_string(body, "feedback_log_path", "");
    claas_json_set(body, "timing_ms", timing(request, job));
    claas_json_set_int(body, "batch_size", batch);
    claas_json_set_string(body, "job_id", job_id);
    if (!rejected && claas_json_get_int(job, "version", 0, INT64_MAX, &version) == 1)
        claas_json_set_int(body, "version", version);
    else
        claas_json_set_null(body, "version");
    set_reason(body, job);
    request_answer_json(request, MHD_HTTP_OK, body);
}

void feedback_answer(struct request *request, const cJSON *job, const char *job_id, int batch)
{
    const char *state = "";

    claas_json_get_string(job, "state", &state);
    if (strcmp(state, "failed") == 0)
        answer_failed(request, job, job_id);
    else if (strcmp(state, "cancelled") == 0)
        answer_cancelled(request, job_id);
    else
        answer_ended(request, job, job_id, batch, strcmp(state, "rejected") == 0);
}
