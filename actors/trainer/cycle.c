/* Opening, keeping, staging and closing a cycle. A cycle answers one request at a time; the
 * optimizer steps are in cycle_step.c. */
#include "cycle.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

struct cycle *cycle_find(struct trainer *trainer, const char *id)
{
    struct cycle *cycle = trainer->cycles;

    while (cycle && strcmp(cycle->id, id) != 0)
        cycle = cycle->next;
    return cycle;
}

static void item_done(struct item *item)
{
    cJSON_Delete(item->messages);
    free(item->feedback);
    free(item->prompt);
    free(item->response);
    free(item->logprobs);
}

static void drop_last(struct cycle *cycle)
{
    staging_drop(&cycle->last.staging);
    claas_adapter_unref(&cycle->last.adapter);
}

void cycle_free(struct cycle *cycle)
{
    struct cycle **link = &cycle->trainer->cycles;

    while (*link && *link != cycle)
        link = &(*link)->next;
    if (*link)
        *link = cycle->next;
    cycle_step_free(cycle);
    cycle_ahead_free(cycle);
    device_calls_drop(cycle->trainer, cycle);
    base_figures_forget(cycle->trainer, cycle);
    for (size_t i = 0; i < cycle->item_count + cycle->replay_count; i++)
        item_done(&cycle->items[i]);
    for (size_t i = 0; i < cycle->standing_count; i++)
        free(cycle->standing[i]);
    for (size_t i = 0; i < cycle->held_out_count; i++) {
        free(cycle->held_out[i].student_prompt);
        free(cycle->held_out[i].teacher_prompt);
        free(cycle->held_out[i].tokens);
    }
    cJSON_Delete(cycle->recent);
    staging_drop(&cycle->staging);
    drop_last(cycle);
    claas_adapter_unref(&cycle->adapter);
    claas_adapter_unref(&cycle->kept);
    free(cycle);
}

void cycles_free(struct trainer *trainer)
{
    while (trainer->cycles)
        cycle_free(trainer->cycles);
}

void cycles_lose(struct trainer *trainer, const char *text)
{
    for (struct cycle *cycle = trainer->cycles; cycle; cycle = cycle->next)
        if (cycle->busy)
            cycle_fail(cycle, CLAAS_ERR_DEVICE_LOST, text);
}

void cycle_fail(struct cycle *cycle, int code, const char *text)
{
    cycle->busy = false;
    claas_actor_reply_error(cycle->trainer->actor, &cycle->reply_to, code, text);
}

/* --- reading CYCLE_BEGIN ---------------------------------------------------------------------- */

static int copy_attachment(const claas_message_t *message, int64_t index, void **ret,
                           size_t *ret_count)
{
    const struct claas_attachment *part;

    if (index < 0 || (size_t)index >= message->attachment_count)
        return claas_fail(CLAAS_ERR_INVALID, "attachment %lld is missing", (long long)index);
    part = &message->attachments[index];
    if (part->length % sizeof(int32_t) != 0)
        return claas_fail(CLAAS_ERR_INVALID, "attachment %lld is no array of 32-bit values",
                          (long long)index);
    *ret = claas_alloc(part->length / 4 + 1, 4);
    if (!*ret)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memcpy(*ret, part->data, part->length);
    *ret_count = part->length / 4;
    return 0;
}

static int check_tokens(const struct cycle *cycle, const int32_t *tokens, size_t count)
{
    int vocab = claas_model_config(cycle->trainer->model)->vocab;

    for (size_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || tokens[i] >= vocab)
            return claas_fail(CLAAS_ERR_INVALID, "token %d is not in the vocabulary", tokens[i]);
    }
    return 0;
}

static int read_item(struct cycle *cycle, const claas_message_t *message, const cJSON *json,
                     struct item *item)
{
    const cJSON *messages = NULL;
    const char *feedback = NULL;
    int64_t first = -1;
    size_t logprob_count = 0;
    int rc;

    if (claas_json_get_string(json, "feedback", &feedback) != 1 ||
        claas_json_get_array(json, "messages", &messages) != 1 ||
        claas_json_get_int(json, "attachments", 0, 1 << 20, &first) != 1)
        return claas_fail(CLAAS_ERR_INVALID, "an item needs feedback, messages and attachments");
    item->messages = cJSON_Duplicate(messages, true);
    item->feedback = claas_strdup(feedback);
    rc = copy_attachment(message, first, (void **)&item->prompt, &item->prompt_count);
    if (rc == 0)
        rc = copy_attachment(message, first + 1, (void **)&item->response, &item->response_count);
    if (rc == 0)
        rc = copy_attachment(message, first + 2, (void **)&item->logprobs, &logprob_count);
    if (rc == 0 && (!item->messages || !item->feedback))
        rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc == 0 && (logprob_count != item->response_count || item->prompt_count == 0))
        rc = claas_fail(CLAAS_ERR_INVALID, "an item's arrays do not fit together");
    if (rc == 0)
        rc = check_tokens(cycle, item->prompt, item->prompt_count);
    if (rc == 0)
        rc = check_tokens(cycle, item->response, item->response_count);
    return rc;
}

static int read_items(struct cycle *cycle, const claas_message_t *message, const char *key,
                      size_t *count)
{
    const cJSON *list = claas_json_get(message->body, key);
    const cJSON *json;

    cJSON_ArrayForEach(json, list)
    {
        size_t index = cycle->item_count + cycle->replay_count;
        int rc;

        if (index == CYCLE_ITEMS_MAX)
            return claas_fail(CLAAS_ERR_LIMIT, "more than %d items", CYCLE_ITEMS_MAX);
        (*count)++; /* first, so that a half-read item is freed too */
        rc = read_item(cycle, message, json, &cycle->items[index]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int read_standing(struct cycle *cycle, const cJSON *list)
{
    const cJSON *text;

    cJSON_ArrayForEach(text, list)
    {
        if (!cJSON_IsString(text) || cycle->standing_count == CYCLE_STANDING_MAX)
            return claas_fail(CLAAS_ERR_INVALID, "standing must hold at most %d texts",
                              CYCLE_STANDING_MAX);
        cycle->standing[cycle->standing_count] = claas_strdup(text->valuestring);
        if (!cycle->standing[cycle->standing_count])
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        cycle->standing_count++;
    }
    return 0;
}

/* Another model's tokens and log-probs must not be trained as if they were this one's. UNAVAILABLE:
 * the jobs wait for a trainer of the right model. */
static int check_model(const struct trainer *trainer, const cJSON *body)
{
    const char *own = claas_model_fingerprint(trainer->model);
    const char *model = "", *fingerprint = "";

    claas_json_get_string(body, "model", &model);
    claas_json_get_string(body, "fingerprint", &fingerprint);
    if (strcmp(fingerprint, own) == 0)
        return 0;
    return claas_fail(CLAAS_ERR_UNAVAILABLE,
                      "the trainer has the model %s (fingerprint %s), the sampler %s (fingerprint "
                      "%s): both need the same --model",
                      claas_model_name(trainer->model), own, model, fingerprint);
}

static int read_begin(struct cycle *cycle, const claas_message_t *message)
{
    const cJSON *body = message->body;
    const char *text = "";
    int64_t value = 0;
    int rc;

    claas_json_get_string(body, "cycle_id", &text);
    rc = claas_copy_text(cycle->id, sizeof(cycle->id), text);
    claas_json_get_string(body, "lora_id", &text);
    if (rc == 0)
        rc = claas_copy_text(cycle->lora_id, sizeof(cycle->lora_id), text);
    claas_json_get_int(body, "seed", 0, (int64_t)1 << 53, &value);
    cycle->seed = (uint64_t)value;
    claas_json_get_int(body, "max_tokens", 1, 4096, &value);
    cycle->max_tokens = (int)value;
    if (rc == 0)
        rc = read_items(cycle, message, "items", &cycle->item_count);
    if (rc == 0)
        rc = read_items(cycle, message, "replay", &cycle->replay_count);
    if (rc == 0)
        rc = read_standing(cycle, claas_json_get(body, "standing"));
    cycle->recent = cJSON_Duplicate(claas_json_get(body, "recent"), true);
    return rc;
}

/* --- CYCLE_BEGIN: adapter, then the base's figures, then the reply ---------------------------- */

static void base_measured(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct cycle *cycle = arg;
    int recent = cJSON_GetArraySize(cycle->recent);
    cJSON *body;

    if (error) {
        cycle_fail(cycle, error, text);
        cycle_free(cycle);
        return;
    }
    body = cJSON_CreateObject();
    claas_json_set(body, "base", gate_figures_json(&trainer->probes->base));
    claas_json_set_string(body, "model", claas_model_name(trainer->model));
    claas_json_set_string(body, "fingerprint", claas_model_fingerprint(trainer->model));
    claas_json_set_int(body, "prompts", recent > 0 ? recent : (int64_t)probes_other_count());
    claas_json_set_int(body, "jobs", claas_device_cycles(trainer->device));
    cycle->busy = false;
    claas_actor_reply(trainer->actor, &cycle->reply_to, body);
}

static void adapter_loaded(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct cycle *cycle = arg;
    int rc;

    if (event->kind != CLAAS_EVENT_ADAPTER) {
        cycle_fail(cycle, event->error, event->text);
        cycle_free(cycle);
        return;
    }
    cycle->adapter = CLAAS_TAKE(event->adapter);
    claas_adapter_set_name(cycle->adapter, cycle->lora_id);
    rc = base_figures_measure(trainer, base_measured, cycle);
    if (rc < 0) {
        cycle_fail(cycle, rc, claas_error_text());
        cycle_free(cycle);
    }
}

/* Closes the cycles that the asker opened before it was restarted: nobody will. */
static void drop_orphans(struct trainer *trainer, const struct claas_reply_to *asker)
{
    struct cycle *next;

    for (struct cycle *cycle = trainer->cycles; cycle; cycle = next) {
        next = cycle->next;
        if (strcmp(cycle->reply_to.to, asker->to) == 0 && cycle->reply_to.epoch != asker->epoch)
            cycle_free(cycle);
    }
}

int handle_cycle_begin(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    struct cycle *cycle = CLAAS_NEW(struct cycle);
    const char *directory = "";
    uint64_t id;
    int rc;

    if (!cycle)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    drop_orphans(trainer, &message->reply_to);
    cycle->trainer = trainer;
    cycle->reply_to = message->reply_to;
    rc = check_model(trainer, message->body);
    if (rc == 0)
        rc = read_begin(cycle, message);
    if (rc == 0 && cycle_find(trainer, cycle->id))
        rc = claas_fail(CLAAS_ERR_EXISTS, "cycle %s is open", cycle->id);
    claas_json_get_string(message->body, "directory", &directory);
    if (rc == 0)
        rc = claas_device_adapter_load(trainer->client, directory, CLAAS_ADAPTER_TRAIN, &id);
    if (rc == 0)
        rc = device_call_add(trainer, id, adapter_loaded, cycle);
    if (rc < 0) {
        cycle_free(cycle);
        return rc;
    }
    cycle->busy = true;
    cycle->next = trainer->cycles;
    trainer->cycles = cycle;
    return 0;
}

/* --- keep, stage, end ------------------------------------------------------------------------- */

int cycle_take(struct trainer *trainer, const claas_message_t *message, struct cycle **ret)
{
    const char *id = "";
    struct cycle *cycle;

    claas_json_get_string(message->body, "cycle_id", &id);
    cycle = cycle_find(trainer, id);
    if (!cycle)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "no cycle %s", id);
    if (cycle->busy)
        return claas_fail(CLAAS_ERR_BUSY, "cycle %s is at work", id);
    cycle->busy = true;
    cycle->reply_to = message->reply_to;
    *ret = cycle;
    return 0;
}

/* Begins to write, unless the disk is still busy with an earlier candidate: it would only fall
 * further behind. A failure shows when the directory is asked for. */
static void stage_early(struct trainer *trainer, claas_adapter_t *adapter, struct staging **ret)
{
    if (trainer->stagings == 0)
        (void)staging_start(trainer, adapter, ret);
}

static void copied(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct cycle *cycle = arg;

    if (event->kind != CLAAS_EVENT_ADAPTER) {
        cycle_fail(cycle, event->error, event->text);
        return;
    }
    cycle->kept = CLAAS_TAKE(event->adapter);
    claas_adapter_set_name(cycle->kept, cycle->lora_id);
    cycle->busy = false;
    claas_actor_reply(trainer->actor, &cycle->reply_to, NULL);
    stage_early(trainer, cycle->kept, &cycle->staging);
}

static void last_copied(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct cycle *cycle = arg;

    if (event->kind != CLAAS_EVENT_ADAPTER)
        return; /* then CYCLE_KEEP makes the copy, if one is wanted */
    cycle->last.adapter = CLAAS_TAKE(event->adapter);
    claas_adapter_set_name(cycle->last.adapter, cycle->lora_id);
    stage_early(trainer, cycle->last.adapter, &cycle->last.staging);
}

void cycle_last_start(struct cycle *cycle)
{
    struct trainer *trainer = cycle->trainer;
    uint64_t id;

    drop_last(cycle);
    if (!claas_device_copies(trainer->device))
        return;
    cycle->last.step = cycle->step->number;
    if (claas_device_adapter_copy_if_room(trainer->client, cycle->adapter, &id) == 0)
        (void)device_call_add(trainer, id, last_copied, cycle);
}

/* True if the copy of the last step is the one to keep, which makes it the kept one. */
static bool keep_last(struct cycle *cycle)
{
    if (!cycle->last.adapter || cycle->last.step != cycle->kept_step)
        return false;
    cycle->kept = CLAAS_TAKE(cycle->last.adapter);
    cycle->staging = CLAAS_TAKE(cycle->last.staging);
    if (!cycle->staging)
        stage_early(cycle->trainer, cycle->kept, &cycle->staging);
    return true;
}

int handle_cycle_keep(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    struct cycle *cycle = NULL;
    int64_t step = 0;
    uint64_t id;
    int rc = cycle_take(trainer, message, &cycle);

    if (rc < 0)
        return rc;
    claas_json_get_int(message->body, "step", 1, 10000, &step);
    cycle->kept_step = (int)step;
    staging_drop(&cycle->staging);
    claas_adapter_unref(&cycle->kept); /* first: two copies would be the cycle's peak of memory */
    if (keep_last(cycle)) {
        cycle->busy = false;
        return claas_actor_reply(trainer->actor, &cycle->reply_to, NULL);
    }
    rc = claas_device_adapter_copy(trainer->client, cycle->adapter, &id);
    if (rc == 0)
        rc = device_call_add(trainer, id, copied, cycle);
    if (rc < 0)
        cycle->busy = false;
    return rc;
}

static void staged(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct cycle *cycle = arg;
    cJSON *body;

    if (error) { /* which the job's clients read: they need not know where the data lies */
        claas_fail(error, "%s", text);
        claas_fail_hide_path(error, staging_directory(cycle->staging), "the new version");
        claas_fail_hide_path(error, claas_config_string(trainer->config, "data"),
                             "the data directory");
        cycle_fail(cycle, error, claas_error_text());
        return;
    }
    body = cJSON_CreateObject();
    claas_json_set_string(body, "directory", staging_directory(cycle->staging));
    claas_json_set_int(body, "step", cycle->kept_step);
    cycle->busy = false;
    claas_actor_reply(trainer->actor, &cycle->reply_to, body);
}

int handle_cycle_stage(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    struct cycle *cycle = NULL;
    int rc = cycle_take(trainer, message, &cycle);

    if (rc < 0)
        return rc;
    if (!cycle->kept)
        rc = claas_fail(CLAAS_ERR_CONFLICT, "cycle %s kept no step", cycle->id);
    drop_last(cycle); /* it was not kept, so it was no better */
    if (cycle->staging && (staging_has_failed(cycle->staging) || staging_is_gone(cycle->staging)))
        staging_drop(&cycle->staging);
    if (rc == 0 && !cycle->staging)
        rc = staging_start(trainer, cycle->kept, &cycle->staging);
    if (rc < 0)
        cycle->busy = false;
    else
        staging_await(cycle->staging, staged, cycle);
    return rc;
}

void cycle_cancel(struct trainer *trainer, const struct claas_reply_to *to)
{
    struct cycle *next;

    for (struct cycle *cycle = trainer->cycles; cycle; cycle = next) {
        next = cycle->next;
        if (cycle->busy && cycle->reply_to.correlation == to->correlation &&
            strcmp(cycle->reply_to.to, to->to) == 0)
            cycle_free(cycle);
    }
}

int handle_cycle_end(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    const char *id = "";
    struct cycle *cycle;

    claas_json_get_string(message->body, "cycle_id", &id);
    cycle = cycle_find(trainer, id);
    if (cycle) {
        if (cycle->busy)
            cycle_fail(cycle, CLAAS_ERR_CANCELLED, "the cycle was ended");
        cycle_free(cycle);
    }
    return claas_actor_reply(trainer->actor, &message->reply_to, NULL);
}
