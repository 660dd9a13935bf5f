/* A cycle, step by step: the sampler's model, input from storage, CYCLE_BEGIN, one CYCLE_STEP after
 * the other with the gate's judgement in between, CYCLE_KEEP whenever a candidate is the best so
 * far, and around every step CYCLE_CHECK. Each function sends one request; its reply starts the
 * next. The end of a cycle is in cycle_end.c. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/random.h"
#include "judge.h"
#include "scheduler_internal.h"

#define RETRY_MS 1000

static void next_step(struct cycle_run *run);

int cycle_run_ask(struct cycle_run *run, const char *to, int type, cJSON *body, int64_t timeout_ms,
                  claas_reply_fn *reply)
{
    return claas_actor_ask(run->scheduler->actor,
                           &(struct claas_ask){
                               .to = to,
                               .type = type,
                               .body = body,
                               .timeout_ms = timeout_ms,
                               .principal = run->jobs[0]->principal,
                               .reply = reply,
                               .arg = run,
                           },
                           &run->ask);
}

/* Each of the other cycles may have a step that the device takes first. */
int64_t cycle_run_patience(const struct cycle_run *run, int64_t ms)
{
    return ms + (turns_limit(run->scheduler) - 1) * (int64_t)STEP_ASK_MS;
}

static cJSON *cycle_body(const struct cycle_run *run)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "cycle_id", run->cycle_id);
    return body;
}

/* --- records ---------------------------------------------------------------------------------- */

static void record_state(struct cycle_run *run, const char *state)
{
    cJSON *event = cJSON_CreateObject();

    claas_json_set_string(event, "kind", "state");
    record_jobs(run->scheduler, run->jobs, run->job_count,
                &(struct record){.state = state, .event = event});
}

/* A crash strikes the jobs that are recorded as being in a cycle, so `batched` is recorded before
 * the trainer works on them. But jobs that already wait for a peer are recorded only when the
 * trainer has answered: else every try would leave two events more, until the peer is back. */
static bool is_awaiting(const struct cycle_run *run)
{
    for (int i = 0; i < run->job_count; i++)
        if (run->jobs[i]->waits && run->jobs[i]->waits[0])
            return true;
    return false;
}

static void record_step(struct cycle_run *run, const cJSON *reply, bool passed)
{
    const cJSON *metadata = claas_json_get(reply, "metadata");
    const cJSON *gate = claas_json_get(reply, "gate");
    cJSON *event = cJSON_CreateObject();
    double loss = NAN, score = NAN;

    claas_json_get_number(metadata, "total_loss", -1e30, 1e30, &loss);
    claas_json_get_number(reply, "score", -1e30, 1e30, &score);
    claas_json_set_string(event, "kind", "step");
    claas_json_set_int(event, "step", run->step);
    claas_json_set_int(event, "steps", run->plan.steps);
    claas_json_set_number(event, "loss", loss);
    claas_json_set_number(event, "rate", plan_rate(&run->plan, run->step));
    if (isfinite(score))
        claas_json_set_number(event, "score", score);
    if (gate)
        claas_json_set(event, "gate", cJSON_Duplicate(gate, true));
    claas_json_set_bool(event, "passed", passed);
    if (!passed)
        claas_json_set_string(event, "reason", run->last_reason);
    record_jobs(run->scheduler, run->jobs, run->job_count, &(struct record){.event = event});
}

/* --- steps ------------------------------------------------------------------------------------ */

static void kept(void *self, void *arg, claas_message_t *reply)
{
    struct cycle_run *run = arg;

    (void)self;
    run->ask = 0;
    if (reply->error) {
        cycle_run_fail_trainer(run, reply->error, reply->error_text);
        return;
    }
    next_step(run);
}

static void keep_gate(struct cycle_run *run, const cJSON *reply)
{
    cJSON_Delete(run->gate);
    run->gate = cJSON_Duplicate(claas_json_get(reply, "gate"), true);
}

/* Whether a candidate that passed is the best so far: the lower score is; without scores the later
 * one. */
static bool is_best(struct cycle_run *run, const cJSON *reply)
{
    double score = NAN;

    claas_json_get_number(reply, "score", -1e30, 1e30, &score);
    if (run->best_step > 0 && isfinite(score) && !(score < run->best_score))
        return false;
    run->best_score = isfinite(score) ? score : INFINITY;
    run->best_step = run->step;
    keep_gate(run, reply);
    cJSON_Delete(run->best_metadata);
    run->best_metadata = cJSON_Duplicate(claas_json_get(reply, "metadata"), true);
    return true;
}

static void keep_candidate(struct cycle_run *run)
{
    cJSON *body = cycle_body(run);
    int rc;

    claas_json_set_int(body, "step", run->step);
    rc = cycle_run_ask(run, run->trainer, CLAAS_MSG_CYCLE_KEEP, body,
                       cycle_run_patience(run, ASK_MS), kept);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

static void stepped(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct cycle_run *run = arg;
    bool finite = false, passed;
    cJSON *step;

    if (reply->kind == CLAAS_KIND_PROGRESS)
        return;
    run->ask = 0;
    if (reply->error) {
        cycle_run_fail_trainer(run, reply->error, reply->error_text);
        return;
    }
    claas_json_get_bool(reply->body, "finite", &finite);
    passed = judge(scheduler->config, finite, run->base, claas_json_get(reply->body, "gate"),
                   run->last_reason, sizeof(run->last_reason));
    if (run->best_step == 0)
        keep_gate(run, reply->body);
    step = cJSON_Duplicate(claas_json_get(reply->body, "metadata"), true);
    claas_json_set_int(step, "step", run->step);
    claas_json_set_bool(step, "passed", passed);
    cJSON_DeleteItemFromObjectCaseSensitive(step, "teacher_scored_texts");
    cJSON_AddItemToArray(run->steps, step);
    record_step(run, reply->body, passed);
    if (!finite) { /* another step from these weights would be no better */
        if (!cycle_run_drop_cancelled(run))
            cycle_run_finish(run);
        return;
    }
    if (passed && is_best(run, reply->body))
        keep_candidate(run);
    else
        next_step(run);
}

static void send_step(struct cycle_run *run)
{
    cJSON *body = cycle_body(run);
    int rc;

    run->step++;
    claas_json_set_int(body, "step", run->step);
    claas_json_set(body, "rows", plan_rows(&run->plan, run->step));
    claas_json_set(body, "training", plan_training(&run->plan, run->scheduler->config, run->step));
    claas_json_set_bool(body, "gate", true);
    if (run->step < run->plan.steps)
        claas_json_set(body, "next", plan_rows(&run->plan, run->step + 1));
    rc = cycle_run_ask(run, run->trainer, CLAAS_MSG_CYCLE_STEP, body,
                       cycle_run_patience(run, STEP_ASK_MS), stepped);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

/* Feedback that was withdrawn must not be shown to the teacher any more, and what was learnt so far
 * came from it too: so the cycle begins anew without it. After a rollback it begins anew as well:
 * its version would be refused in the end, because its parent is not current any more. */
static void checked(void *self, void *arg, claas_message_t *reply)
{
    struct cycle_run *run = arg;

    (void)self;
    run->ask = 0;
    if (reply->error) {
        /* An adapter that is gone has ended its jobs: read which. */
        cycle_run_fail(run, reply->error == CLAAS_ERR_NOT_FOUND ? CLAAS_ERR_CONFLICT : reply->error,
                       reply->error_text);
        return;
    }
    if (cycle_run_drop_cancelled(run))
        return;
    if (run->step == run->plan.steps)
        cycle_run_finish(run);
    else
        send_step(run);
}

/* The next step, or the end: but first, whether what the cycle learns from still stands. */
static void next_step(struct cycle_run *run)
{
    cJSON *body;
    int rc;

    if (cycle_run_drop_cancelled(run))
        return;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", run->lora_id);
    claas_json_set_int(body, "version", run->version);
    claas_json_set_int(body, "withdrawn", run->withdrawn);
    rc = cycle_run_ask(run, "storage", CLAAS_MSG_CYCLE_CHECK, body, ASK_MS, checked);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

/* --- the beginning ---------------------------------------------------------------------------- */

static void begun(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct cycle_run *run = arg;
    const char *model = "", *fingerprint = "";
    int64_t prompts = 0, at_once = 1;
    int items = run->plan.items, replay = run->plan.replay;
    struct recipe recipe;

    run->ask = 0;
    if (reply->error) {
        cycle_run_fail_trainer(run, reply->error, reply->error_text);
        return;
    }
    /* Where there are several trainers, the cycle is in the one that answered. */
    claas_copy_text(run->trainer, sizeof(run->trainer), reply->from);
    claas_json_get_string(reply->body, "model", &model);
    claas_json_get_string(reply->body, "fingerprint", &fingerprint);
    claas_json_get_int(reply->body, "prompts", 0, 1000000, &prompts);
    claas_json_get_int(reply->body, "jobs", 1, CYCLES_MAX, &at_once);
    scheduler->trainer_jobs = (int)at_once;
    recipe = recipe_for(scheduler->config, fingerprint, model);
    plan_done(&run->plan);
    plan_init(&run->plan, scheduler->config, &recipe, run->jobs[0]->training);
    run->plan.items = items;
    run->plan.replay = replay;
    run->plan.prompts = (int)prompts;
    run->base = cJSON_Duplicate(claas_json_get(reply->body, "base"), true);
    if (is_awaiting(run))
        record_state(run, "batched");
    record_state(run, "training");
    next_step(run);
    jobs_dispatch(scheduler); /* more cycles, now that the trainer has said how many it wants */
}

/* CYCLE_INPUT's standing entries have ids; the trainer needs the texts. */
static cJSON *standing_texts(const cJSON *standing)
{
    cJSON *texts = cJSON_CreateArray();
    const cJSON *entry;

    cJSON_ArrayForEach(entry, standing)
    {
        const char *text = NULL;

        if (claas_json_get_string(entry, "text", &text) == 1)
            cJSON_AddItemToArray(texts, cJSON_CreateString(text));
    }
    return texts;
}

static cJSON *begin_body(struct cycle_run *run, const cJSON *input)
{
    cJSON *body = cycle_body(run);
    const char *directory = "";

    claas_json_get_string(input, "directory", &directory);
    claas_json_set_string(body, "lora_id", run->lora_id);
    claas_json_set_string(body, "model", run->model);
    claas_json_set_string(body, "fingerprint", run->fingerprint);
    claas_json_set_int(body, "version", run->version);
    claas_json_set_string(body, "directory", directory);
    claas_json_set_int(body, "seed", (int64_t)run->seed);
    claas_json_set(body, "items", cJSON_Duplicate(claas_json_get(input, "items"), true));
    claas_json_set(body, "replay", cJSON_Duplicate(claas_json_get(input, "replay"), true));
    claas_json_set(body, "recent", cJSON_Duplicate(claas_json_get(input, "recent"), true));
    claas_json_set(body, "standing", standing_texts(claas_json_get(input, "standing")));
    claas_json_set_int(body, "max_tokens",
                       claas_config_int(run->scheduler->config, "cycle.max_tokens"));
    return body;
}

static void input_read(void *self, void *arg, claas_message_t *reply)
{
    struct scheduler *scheduler = self;
    struct cycle_run *run = arg;
    int rc;

    run->ask = 0;
    if (reply->error) {
        cycle_run_fail(run, reply->error, reply->error_text);
        return;
    }
    claas_json_get_int(reply->body, "version", 0, 1000000000, &run->version);
    claas_json_get_int(reply->body, "withdrawn", 0, (int64_t)1 << 53, &run->withdrawn);
    run->plan.items = cJSON_GetArraySize(claas_json_get(reply->body, "items"));
    run->plan.replay = cJSON_GetArraySize(claas_json_get(reply->body, "replay"));
    if (!is_awaiting(run))
        record_state(run, "batched");
    rc = claas_actor_ask(scheduler->actor,
                         &(struct claas_ask){
                             .to = run->trainer,
                             .type = CLAAS_MSG_CYCLE_BEGIN,
                             .body = begin_body(run, reply->body),
                             .attachments = reply->attachments,
                             .attachment_count = reply->attachment_count,
                             .timeout_ms = cycle_run_patience(run, STEP_ASK_MS),
                             .principal = run->jobs[0]->principal,
                             .reply = begun,
                             .arg = run,
                         },
                         &run->ask);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

static void ask_input(struct cycle_run *run)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *ids = cJSON_CreateArray();
    int rc;

    for (int i = 0; i < run->job_count; i++)
        cJSON_AddItemToArray(ids, cJSON_CreateString(run->jobs[i]->id));
    claas_json_set_string(body, "lora_id", run->lora_id);
    claas_json_set(body, "job_ids", ids);
    rc = cycle_run_ask(run, "storage", CLAAS_MSG_CYCLE_INPUT, body, ASK_MS, input_read);
    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

/* The trainer must have the sampler's model, and only the sampler can say which that is: the jobs
 * wait for it too. */
static void model_read(void *self, void *arg, claas_message_t *reply)
{
    struct cycle_run *run = arg;
    const char *model = "", *fingerprint = "";

    (void)self;
    run->ask = 0;
    if (reply->error) {
        cycle_run_fail(run, CLAAS_ERR_UNAVAILABLE, reply->error_text);
        return;
    }
    claas_json_get_string(reply->body, "name", &model);
    claas_json_get_string(reply->body, "fingerprint", &fingerprint);
    claas_copy_text(run->model, sizeof(run->model), model);
    claas_copy_text(run->fingerprint, sizeof(run->fingerprint), fingerprint);
    ask_input(run);
}

static void ask_model(struct cycle_run *run)
{
    int rc = cycle_run_ask(run, "sampler", CLAAS_MSG_MODEL_INFO, NULL, ASK_MS, model_read);

    if (rc < 0)
        cycle_run_fail(run, rc, claas_error_text());
}

/* FNV-1a of a job's id: the cycle's seed, so that a resumed job makes the same cycle. */
static uint64_t seed_of(const char *text)
{
    uint64_t hash = 14695981039346656037u;

    for (; *text; text++)
        hash = (hash ^ (unsigned char)*text) * 1099511628211u;
    return hash >> 12; /* 52 bits: survives JSON */
}

void cycle_run_start(struct scheduler *scheduler, struct job *const *jobs, int count)
{
    struct cycle_run *run = CLAAS_NEW(struct cycle_run);
    int64_t seed = claas_config_int(scheduler->config, "cycle.seed");
    char hex[17];

    if (!run) {
        jobs_wake(scheduler, RETRY_MS);
        return;
    }
    run->scheduler = scheduler;
    claas_copy_text(run->trainer, sizeof(run->trainer), "trainer");
    run->started_ms = claas_clock_ms();
    run->started_unix_ms = claas_clock_unix_ms();
    run->steps = cJSON_CreateArray();
    claas_random_hex(hex, 8);
    snprintf(run->cycle_id, sizeof(run->cycle_id), "cycle-%s", hex);
    snprintf(run->lora_id, sizeof(run->lora_id), "%s", jobs[0]->lora_id);
    for (int i = 0; i < count; i++) {
        run->jobs[i] = jobs[i];
        jobs[i]->run = run;
    }
    run->job_count = count;
    run->seed = seed > 0 ? (uint64_t)seed : seed_of(jobs[0]->id);
    for (struct cycle_run *other = scheduler->runs; other; other = other->next)
        other->company = run->company = true;
    run->next = scheduler->runs;
    scheduler->runs = run;
    scheduler->run_count++;
    ask_model(run);
}
