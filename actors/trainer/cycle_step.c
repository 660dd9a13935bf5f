/* One step of a cycle: rollouts with the weights as they stand, one optimizer step over all rows,
 * then the gate's figures. Each phase starts from the last event of the one before.
 *
 * While the gate is measured the weights are already those that the next step samples with, and the
 * gate's few answers leave most of the device idle: so if the asker has said what the next step's
 * rows will be, their rollouts are sampled at the same time (`cycle->ahead`). They are the same as
 * if sampled later: a seed depends on the cycle's seed and the numbers of step and row alone. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/tokenizer.h"
#include "cycle.h"

#define SCORED_TEXTS_MAX 16
#define SCORED_BYTES_MAX (128 << 10) /* together: they travel in the result, a message of 1 MiB */

/* The candidate's weights, or at a later step those that the rollouts are sampled with, give values
 * that are not finite. */
static void reply_not_finite(struct cycle *cycle)
{
    cJSON *reply = CLAAS_TAKE(cycle->step->reply);

    if (!reply) {
        reply = cJSON_CreateObject();
        claas_json_set(reply, "metadata", cJSON_CreateObject());
    }
    cJSON_DeleteItemFromObjectCaseSensitive(reply, "gate");
    claas_json_set_bool(reply, "finite", false);
    cycle->step->reply = reply;
    cycle_step_reply(cycle);
}

void cycle_step_fail(struct cycle *cycle, int code, const char *text)
{
    CLAAS_AUTO_FREE char *kept = NULL;

    if (code == CLAAS_ERR_NOT_FINITE) {
        reply_not_finite(cycle);
        return;
    }
    kept = claas_strdup(text); /* may belong to an event that goes away */
    cycle_step_free(cycle);
    cycle_fail(cycle, code, kept);
}

void cycle_step_reply(struct cycle *cycle)
{
    cJSON *reply = CLAAS_TAKE(cycle->step->reply);

    cycle_step_free(cycle);
    cycle->busy = false;
    claas_actor_reply(cycle->trainer->actor, &cycle->reply_to, reply);
}

double cycle_step_lap(struct cycle_step *step)
{
    int64_t now = claas_clock_ns(), passed = now - step->lap_ns;

    step->lap_ns = now;
    return (double)(passed / 1000) / 1000; /* no more digits than it is worth */
}

double cycle_step_phase(struct cycle *cycle, const char *phase)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "phase", phase);
    claas_actor_progress(cycle->trainer->actor, &cycle->reply_to, body);
    return cycle_step_lap(cycle->step);
}

static void start_ahead(struct cycle *cycle);

/* --- training --------------------------------------------------------------------------------- */

/* Decoded teacher prompts, for people who look at what the teacher saw. */
static cJSON *scored_texts(const struct cycle *cycle)
{
    const claas_tokenizer_t *tokenizer = claas_model_tokenizer(cycle->trainer->model);
    const struct cycle_step *step = cycle->step;
    cJSON *texts = cJSON_CreateArray();
    size_t bytes = 0;

    for (size_t i = 0; i < step->row_count && i < SCORED_TEXTS_MAX; i++) {
        CLAAS_AUTO_FREE char *text = NULL;
        size_t length = 0;

        if (claas_tokenizer_decode(tokenizer, step->rows[i].teacher_prompt,
                                   step->rows[i].teacher_count, false, &text, &length) < 0 ||
            !claas_utf8_valid(text, length))
            continue;
        bytes += length;
        if (bytes > SCORED_BYTES_MAX)
            break;
        cJSON_AddItemToArray(texts, cJSON_CreateString(text));
    }
    return texts;
}

static void set_times(cJSON *metadata, const struct cycle_step *step, double ms, double teacher_ms)
{
    claas_json_set_number(metadata, "rollout_ms", step->rollout_ms);
    claas_json_set_number(metadata, "teacher_ms", round(teacher_ms * 1000) / 1000);
    claas_json_set_number(metadata, "train_ms", round((ms - teacher_ms) * 1000) / 1000);
}

/* The contract's metadata of a step. */
static cJSON *step_metadata(const struct cycle *cycle, const struct claas_train_result *result)
{
    cJSON *metadata = cJSON_CreateObject();
    double divergence = 0, kl = 0, ratio = 0, clipped = 0;
    int tokens = result->tokens > 0 ? result->tokens : 1;

    for (size_t i = 0; i < result->row_count; i++) {
        const struct claas_train_row_result *row = &result->rows[i];

        divergence += (double)row->divergence * row->ratio * row->tokens;
        kl += (double)row->kl_base * row->tokens;
        ratio += (double)row->ratio * row->tokens;
        clipped += (double)row->clip_fraction * row->tokens;
    }
    claas_json_set_number(metadata, "total_loss", result->loss);
    claas_json_set_number(metadata, "distill_loss", divergence / tokens);
    claas_json_set_number(metadata, "kl_reg", kl / tokens);
    claas_json_set_number(metadata, "mean_is_ratio", ratio / tokens);
    claas_json_set_number(metadata, "clip_fraction", clipped / tokens);
    claas_json_set_number(metadata, "grad_norm", result->grad_norm);
    claas_json_set_int(metadata, "tokens_processed", result->tokens);
    claas_json_set_int(metadata, "batch_size", (int64_t)result->row_count);
    claas_json_set_number(metadata, "max_ratio_error", result->max_ratio_error);
    claas_json_set_int(metadata, "optimizer_step", result->step);
    claas_json_set(metadata, "teacher_scored_texts", scored_texts(cycle));
    return metadata;
}

static void trained(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct cycle *cycle = arg;
    struct cycle_step *step = cycle->step;
    cJSON *metadata;
    int rc;

    (void)trainer;
    if (event->kind != CLAAS_EVENT_TRAINED) {
        cycle_step_fail(cycle, event->error, event->text);
        return;
    }
    claas_metric_add(CLAAS_METRIC_STEPS, 1);
    step->reply = cJSON_CreateObject();
    metadata = step_metadata(cycle, &event->trained);
    claas_json_set(step->reply, "metadata", metadata);
    set_times(metadata, step, cycle_step_lap(step), event->trained.teacher_ms);
    claas_json_set_bool(step->reply, "finite", event->trained.finite);
    if (!event->trained.finite || !step->gate) {
        cycle_step_reply(cycle);
        return;
    }
    cycle_step_phase(cycle, "gate");
    if (!step->next)
        cycle_last_start(cycle);
    rc = cycle_gate_start(cycle);
    if (rc < 0)
        cycle_step_fail(cycle, rc, claas_error_text());
    else
        start_ahead(cycle);
}

static int fill_train_row(struct cycle *cycle, struct step_row *row, struct claas_train_row *out)
{
    const struct item *item = row->item;

    *out = (struct claas_train_row){
        .student_prompt = row->student_prompt,
        .student_count = row->student_count,
        .teacher_prompt = row->teacher_prompt,
        .teacher_count = row->teacher_count,
        .student = cycle->adapter,
    };
    if (row->source == ROW_RECORDED) {
        out->response = item->response;
        out->response_count = item->response_count;
        out->rollout_logprobs = item->logprobs;
    } else {
        out->response = row->rollout->tokens;
        out->response_count = row->rollout->count;
        /* A teacher's rollout has no behaviour of the student to correct for. */
        out->rollout_logprobs = row->from_teacher ? NULL : row->rollout->logprobs;
    }
    return step_row_mask(claas_model_tokenizer(cycle->trainer->model), out->response,
                         out->response_count, &row->mask);
}

static bool has_trained_token(const struct claas_train_row *row)
{
    if (!row->mask)
        return row->response_count > 0;
    return memchr(row->mask, 1, row->response_count) != NULL;
}

static int start_training(struct cycle *cycle)
{
    struct cycle_step *step = cycle->step;
    CLAAS_AUTO_FREE struct claas_train_row *rows =
        CLAAS_NEW_ARRAY(struct claas_train_row, step->row_count);
    struct claas_train_request request = {
        .rows = rows,
        .loss = step->loss,
        .adamw = step->adamw,
        .update = true,
    };
    uint64_t id;
    int rc = 0;

    if (!rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; rc == 0 && i < step->row_count; i++) {
        struct claas_train_row *row = &rows[request.row_count];

        rc = fill_train_row(cycle, &step->rows[i], row);
        row->mask = step->rows[i].mask;
        if (has_trained_token(row))
            request.row_count++;
    }
    if (rc == 0 && request.row_count == 0)
        rc = claas_fail(CLAAS_ERR_UNPROCESSABLE,
                        "there is not one token to train on: the answers are empty or thinking");
    if (rc == 0)
        rc = claas_device_train(cycle->trainer->client, &request, &id);
    if (rc == 0)
        rc = device_call_add(cycle->trainer, id, trained, cycle);
    return rc;
}

/* --- rollouts --------------------------------------------------------------------------------- */

static int32_t *copy_tokens(const int32_t *tokens, size_t count)
{
    int32_t *copy = CLAAS_NEW_ARRAY(int32_t, count + 1);

    if (copy)
        memcpy(copy, tokens, count * sizeof(int32_t));
    return copy;
}

/* At step 1 the answers from `first` on, after those of the rows, are the teacher's, which are kept
 * out of training. */
static int keep_held_out(struct cycle *cycle, size_t first)
{
    struct cycle_step *step = cycle->step;

    for (size_t i = first; i < step->rollouts->count; i++) {
        const struct generation *answer = &step->rollouts->items[i];
        const struct step_row *row = NULL;
        size_t n = cycle->held_out_count;

        for (size_t r = 0; r < step->row_count && !row; r++) {
            if (step->rows[r].teacher_prompt == answer->prompt)
                row = &step->rows[r];
        }
        if (!row || answer->count == 0 || n == CLAAS_COUNT(cycle->held_out))
            continue;
        cycle->held_out_count++;
        cycle->held_out[n].student_prompt = copy_tokens(row->student_prompt, row->student_count);
        cycle->held_out[n].teacher_prompt = copy_tokens(row->teacher_prompt, row->teacher_count);
        cycle->held_out[n].tokens = copy_tokens(answer->tokens, answer->count);
        cycle->held_out[n].student_count = row->student_count;
        cycle->held_out[n].teacher_count = row->teacher_count;
        cycle->held_out[n].count = answer->count;
        cycle->held_out[n].replay = row->source == ROW_REPLAY;
        if (!cycle->held_out[n].student_prompt || !cycle->held_out[n].teacher_prompt ||
            !cycle->held_out[n].tokens)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    return 0;
}

static void rolled_out(struct cycle *cycle)
{
    struct cycle_step *step = cycle->step;
    size_t sampled = 0;
    int rc = 0;

    if (step->rollout_error) {
        cycle_step_fail(cycle, step->rollout_error, step->rollout_text);
        return;
    }
    for (size_t i = 0; i < step->row_count; i++)
        sampled += step->rows[i].rollout != NULL;
    if (step->rollouts)
        rc = keep_held_out(cycle, sampled);
    step->rollout_ms = cycle_step_phase(cycle, "train");
    if (rc == 0)
        rc = start_training(cycle);
    if (rc < 0)
        cycle_step_fail(cycle, rc, claas_error_text());
}

static void rollouts_ended(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct cycle_step *step = arg;

    (void)trainer;
    step->rolled_out = true;
    step->rollout_error = error;
    if (error)
        step->rollout_text = claas_strdup(text);
    if (step->cycle->step == step)
        rolled_out(step->cycle);
}

static uint64_t row_seed(const struct cycle_step *step, size_t row)
{
    return step->cycle->seed + (uint64_t)step->number * 1000003u + row * 7919u;
}

/* The rows whose teacher prompts are answered once more for the score: the first few of each
 * source. */
static size_t held_out_wanted(const struct cycle_step *step, const struct step_row **rows)
{
    size_t count = 0, fresh = 0, replay = 0;

    if (step->number != 1 || !step->gate)
        return 0;
    for (size_t i = 0; i < step->row_count; i++) {
        if ((step->rows[i].source == ROW_FEEDBACK && fresh++ < CYCLE_HELD_OUT) ||
            (step->rows[i].source == ROW_REPLAY && replay++ < CYCLE_HELD_OUT))
            rows[count++] = &step->rows[i];
    }
    return count;
}

static int start_rollouts(struct cycle_step *step)
{
    const struct cycle *cycle = step->cycle;
    const struct step_row *held_out[2 * CYCLE_HELD_OUT];
    size_t extra = held_out_wanted(step, held_out);
    size_t sampled = 0, n = 0;
    int rc;

    for (size_t i = 0; i < step->row_count; i++)
        sampled += step->rows[i].source != ROW_RECORDED;
    step->rolled_out = sampled + extra == 0;
    if (step->rolled_out)
        return 0;
    rc = generations_new(cycle->trainer, sampled + extra, cycle->max_tokens, rollouts_ended, step,
                         &step->rollouts);
    for (size_t i = 0; rc == 0 && i < step->row_count; i++) {
        struct step_row *row = &step->rows[i];

        if (row->source == ROW_RECORDED)
            continue;
        row->rollout = &step->rollouts->items[n++];
        row->rollout->prompt = row->from_teacher ? row->teacher_prompt : row->student_prompt;
        row->rollout->prompt_count = row->from_teacher ? row->teacher_count : row->student_count;
        row->rollout->adapter = row->from_teacher ? NULL : cycle->adapter;
        row->rollout->temperature = 1;
        row->rollout->max_tokens = row->max_tokens;
        row->rollout->seed = row_seed(step, i);
    }
    for (size_t i = 0; rc == 0 && i < extra; i++) {
        struct generation *answer = &step->rollouts->items[n++];

        answer->prompt = held_out[i]->teacher_prompt;
        answer->prompt_count = held_out[i]->teacher_count;
        answer->temperature = 1;
        answer->max_tokens = held_out[i]->max_tokens;
        answer->seed = row_seed(step, 500000 + i);
    }
    return rc < 0 ? rc : generations_start(step->rollouts);
}

/* --- the request ------------------------------------------------------------------------------ */

static float number(const cJSON *object, const char *key, double fallback)
{
    double value = fallback;

    claas_json_get_number(object, key, -HUGE_VAL, HUGE_VAL, &value);
    return (float)fmin(fmax(value, -FLT_MAX), FLT_MAX);
}

static int read_training(const cJSON *json, struct cycle_step *step)
{
    const char *variant = "full";

    claas_json_get_string(json, "variant", &variant);
    if (strcmp(variant, "full") == 0)
        step->loss.variant = CLAAS_LOSS_FULL;
    else if (strcmp(variant, "student_topk_tail") == 0)
        step->loss.variant = CLAAS_LOSS_STUDENT_TOPK_TAIL;
    else if (strcmp(variant, "teacher_topk") == 0)
        step->loss.variant = CLAAS_LOSS_TEACHER_TOPK;
    else
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is no variant of the loss", variant);
    step->loss.alpha = number(json, "alpha", 0);
    step->loss.top_k = (int)number(json, "top_k", 100);
    step->loss.is_clip = number(json, "is_clip", 0);
    step->loss.kl_weight = number(json, "kl_weight", 0);
    claas_json_get_bool(json, "sample_mean", &step->loss.sample_mean);
    step->adamw.rate = number(json, "rate", 5e-4);
    step->adamw.beta1 = number(json, "beta1", 0.9);
    step->adamw.beta2 = number(json, "beta2", 0.999);
    step->adamw.eps = number(json, "eps", 1e-8);
    step->adamw.weight_decay = number(json, "weight_decay", 0);
    step->adamw.max_grad_norm = number(json, "max_grad_norm", 1);
    return 0;
}

static int new_step(struct cycle *cycle, int number, bool gate, const cJSON *rows,
                    struct cycle_step **ret)
{
    struct cycle_step *step = CLAAS_NEW(struct cycle_step);
    int rc;

    if (!step)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret = step; /* whatever happens: its owner frees it */
    step->cycle = cycle;
    step->number = number;
    step->gate = gate;
    step->asked = cJSON_Duplicate(rows, true);
    rc = step->asked ? step_rows_build(cycle, step, rows) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return rc < 0 ? rc : start_rollouts(step);
}

/* Begins the step after this one. A failure shows when that step is asked for, and is tried
 * again. */
static void start_ahead(struct cycle *cycle)
{
    const struct cycle_step *step = cycle->step;

    if (step->next && new_step(cycle, step->number + 1, true, step->next, &cycle->ahead) < 0)
        cycle_ahead_free(cycle);
}

/* True if the step begun ahead is the one that is asked for, which makes it the step under way.
 * Else it is dropped. */
static bool take_ahead(struct cycle *cycle, int number, bool gate, const cJSON *rows)
{
    const struct cycle_step *ahead = cycle->ahead;

    if (ahead && ahead->number == number && ahead->gate == gate &&
        cJSON_Compare(ahead->asked, rows, true))
        cycle->step = CLAAS_TAKE(cycle->ahead);
    else
        cycle_ahead_free(cycle);
    return cycle->step != NULL;
}

int handle_cycle_step(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    const cJSON *rows = claas_json_get(message->body, "rows");
    struct cycle *cycle = NULL;
    int64_t number_of_step = 0;
    bool gate = false;
    int rc = cycle_take(trainer, message, &cycle);

    if (rc < 0)
        return rc;
    claas_json_get_int(message->body, "step", 1, 10000, &number_of_step);
    claas_json_get_bool(message->body, "gate", &gate);
    if (!take_ahead(cycle, (int)number_of_step, gate, rows))
        rc = new_step(cycle, (int)number_of_step, gate, rows, &cycle->step);
    if (rc == 0)
        rc = read_training(claas_json_get(message->body, "training"), cycle->step);
    if (rc < 0) {
        cycle_step_free(cycle);
        cycle->busy = false;
        return rc;
    }
    cycle->step->next = cJSON_Duplicate(claas_json_get(message->body, "next"), true);
    cycle_step_phase(cycle, "rollout");
    if (cycle->step->rolled_out)
        rolled_out(cycle);
    return 0;
}
