/* From the scheduler's rows to prompts: which conversation, which feedback shown in which form. */
#include <stdlib.h>
#include <string.h>

#include "claas/chat_template.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "cycle.h"

#define ROLLOUT_MIN 8 /* tokens: a shorter answer teaches nothing */

static int read_row(const cJSON *json, struct step_row *row, int64_t *ret_index)
{
    static const char *const sources[] = {"feedback", "replay", "other", "recorded"};
    const char *source = "", *form = "hindsight";
    int rc;

    claas_json_get_string(json, "source", &source);
    claas_json_get_string(json, "form", &form);
    claas_json_get_bool(json, "from_teacher", &row->from_teacher);
    *ret_index = 0;
    claas_json_get_int(json, "index", 0, 1 << 20, ret_index);
    rc = form_from_name(form, &row->form);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < CLAAS_COUNT(sources); i++) {
        if (strcmp(source, sources[i]) == 0) {
            row->source = (enum row_source)i;
            return 0;
        }
    }
    return claas_fail(CLAAS_ERR_INVALID, "'%s' is no source of rows", source);
}

/* Which feedback the teacher is shown with this row: its own, or every standing one but the
 * `skipped` oldest, and the new ones. */
static size_t shown_feedback(const struct cycle *cycle, const struct step_row *row, size_t skipped,
                             const char **texts)
{
    const char *mode = claas_config_string(cycle->trainer->config, "cycle.show_standing");
    bool all = strcmp(mode, "all") == 0 || (strcmp(mode, "auto") == 0 && form_is_list(row->form));
    size_t count = 0;

    if (row->source == ROW_RECORDED || (row->item && !all)) {
        texts[count++] = row->item->feedback;
        return count;
    }
    if (all) {
        for (size_t i = skipped; i < cycle->standing_count; i++)
            texts[count++] = cycle->standing[i];
    }
    for (size_t i = 0; i < cycle->item_count; i++)
        texts[count++] = cycle->items[i].feedback;
    return count;
}

/* The conversation of a row of source `other`: one of the user's recent ones, else a built-in
 * question. A new array. */
static cJSON *other_messages(const struct cycle *cycle, int64_t index)
{
    int recent = cJSON_GetArraySize(cycle->recent);
    cJSON *messages, *message;

    if (recent > 0)
        return cJSON_Duplicate(cJSON_GetArrayItem(cycle->recent, (int)(index % recent)), true);
    messages = cJSON_CreateArray();
    message = cJSON_CreateObject();
    claas_json_set_string(message, "role", "user");
    claas_json_set_string(message, "content", probes_other_question((size_t)index));
    cJSON_AddItemToArray(messages, message);
    return messages;
}

static int find_item(struct cycle *cycle, struct step_row *row, int64_t index)
{
    size_t count = row->source == ROW_REPLAY ? cycle->replay_count : cycle->item_count;

    if ((size_t)index >= count)
        return claas_fail(CLAAS_ERR_INVALID, "row index %lld of %zu", (long long)index, count);
    row->item = &cycle->items[(row->source == ROW_REPLAY ? cycle->item_count : 0) + (size_t)index];
    row->student_prompt = row->item->prompt;
    row->student_count = row->item->prompt_count;
    return 0;
}

/* Tokens of the longest sequence of a row. What is sampled has to fit into the key/value cache
 * too. */
static size_t find_context(const struct cycle *cycle, const struct step_row *row)
{
    const struct trainer *trainer = cycle->trainer;

    return (size_t)(row->source == ROW_RECORDED ? claas_model_config(trainer->model)->context
                                                : claas_device_context(trainer->device));
}

/* The conversation with the feedback shown. A long list loses its oldest entries until there is
 * room for an answer. */
static int encode_teacher(struct cycle *cycle, struct step_row *row, const cJSON *messages)
{
    const claas_model_t *model = cycle->trainer->model;
    size_t context = find_context(cycle, row);
    const char *texts[CYCLE_STANDING_MAX + CYCLE_ITEMS_MAX];
    size_t skipped = 0, count, last = 0;

    for (;;) {
        int rc;

        count = shown_feedback(cycle, row, skipped, texts);
        if (count == last) /* there was no list to shorten */
            return 0;
        free(CLAAS_TAKE(row->teacher_prompt));
        rc = form_encode(row->form, messages, texts, count, claas_model_chat_template(model),
                         claas_model_tokenizer(model), &row->teacher_prompt, &row->teacher_count);
        if (rc < 0)
            return rc;
        if (row->teacher_count + (size_t)cycle->max_tokens <= context ||
            skipped == cycle->standing_count)
            return 0;
        last = count;
        skipped += (cycle->standing_count - skipped + 1) / 2;
    }
}

/* How long the rollout may be. */
static int set_room(const struct cycle *cycle, struct step_row *row)
{
    size_t context = find_context(cycle, row);
    size_t longest =
        row->teacher_count > row->student_count ? row->teacher_count : row->student_count;
    size_t needed = row->source == ROW_RECORDED ? row->item->response_count : ROLLOUT_MIN;

    if (longest + needed > context)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "the conversation with its feedback and an answer has %zu tokens, the "
                          "%s %zu",
                          longest + needed,
                          context < (size_t)claas_model_config(cycle->trainer->model)->context
                              ? "key/value cache (device.kv_tokens) holds"
                              : "context is",
                          context);
    row->max_tokens = cycle->max_tokens;
    if ((size_t)cycle->max_tokens > context - longest)
        row->max_tokens = (int)(context - longest);
    return 0;
}

static int build_row(struct cycle *cycle, struct step_row *row, int64_t index)
{
    const claas_tokenizer_t *tokenizer = claas_model_tokenizer(cycle->trainer->model);
    const claas_chat_template_t *chat_template = claas_model_chat_template(cycle->trainer->model);
    CLAAS_AUTO(claas_json_free) cJSON *other = NULL;
    int rc = 0;

    if (row->source == ROW_OTHER) {
        other = other_messages(cycle, index);
        rc = form_encode(row->form, other, NULL, 0, chat_template, tokenizer, &row->own_prompt,
                         &row->student_count);
        row->student_prompt = row->own_prompt;
    } else {
        rc = find_item(cycle, row, index);
    }
    if (rc == 0)
        rc = encode_teacher(cycle, row, other ? other : row->item->messages);
    return rc < 0 ? rc : set_room(cycle, row);
}

static void row_done(struct step_row *row)
{
    free(row->own_prompt);
    free(row->teacher_prompt);
    free(row->mask);
    *row = (struct step_row){0};
}

int step_rows_build(struct cycle *cycle, struct cycle_step *step, const cJSON *rows)
{
    const cJSON *json;

    step->rows = CLAAS_NEW_ARRAY(struct step_row, cJSON_GetArraySize(rows));
    if (!step->rows)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(json, rows)
    {
        struct step_row *row = &step->rows[step->row_count++];
        int64_t index = 0;
        int rc = read_row(json, row, &index);

        if (rc == 0)
            rc = build_row(cycle, row, index);
        if (rc == CLAAS_ERR_LIMIT && (row->source == ROW_OTHER || row->source == ROW_REPLAY)) {
            row_done(row); /* the new feedback can be learnt without it */
            step->row_count--;
            rc = 0;
        }
        if (rc < 0)
            return rc;
    }
    if (step->row_count == 0)
        return claas_fail(CLAAS_ERR_LIMIT, "none of the step's conversations fits the context");
    return 0;
}

int step_row_mask(const claas_tokenizer_t *tokenizer, const int32_t *tokens, size_t count,
                  uint8_t **ret)
{
    int32_t open = claas_tokenizer_special(tokenizer, "<think>");
    int32_t close = claas_tokenizer_special(tokenizer, "</think>");
    bool thinking = false;

    for (size_t i = 0; open >= 0 && close >= 0 && i < count; i++) {
        if ((tokens[i] == open || tokens[i] == close) && !*ret) {
            *ret = CLAAS_NEW_ARRAY(uint8_t, count);
            if (!*ret)
                return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
            memset(*ret, 1, count);
            if (tokens[i] == close) /* the prompt had opened it */
                memset(*ret, 0, i + 1);
        }
        thinking = thinking || tokens[i] == open;
        if (thinking)
            (*ret)[i] = 0;
        thinking = thinking && tokens[i] != close;
    }
    return 0;
}

static void step_free(struct cycle_step *step)
{
    generations_free(&step->rollouts);
    generations_free(&step->answers);
    for (size_t i = 0; i < step->row_count; i++)
        row_done(&step->rows[i]);
    free(step->rows);
    free(step->rollout_text);
    cJSON_Delete(step->asked);
    cJSON_Delete(step->next);
    cJSON_Delete(step->reply);
    free(step);
}

void cycle_step_free(struct cycle *cycle)
{
    if (!cycle->step)
        return;
    device_calls_drop(cycle->trainer, cycle);
    step_free(CLAAS_TAKE(cycle->step));
}

void cycle_ahead_free(struct cycle *cycle)
{
    if (cycle->ahead)
        step_free(CLAAS_TAKE(cycle->ahead));
}
