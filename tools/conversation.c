/* A conversation: see conversation.h. */
#include "conversation.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"

#define ANSWER_MAX (16 << 20)

static void add_message(struct conversation *conversation, const char *role, const char *content)
{
    cJSON *message = cJSON_CreateObject();

    claas_json_set_string(message, "role", role);
    claas_json_set_string(message, "content", content);
    cJSON_AddItemToArray(conversation->messages, message);
}

static void drop_last(struct conversation *conversation)
{
    cJSON_DeleteItemFromArray(conversation->messages,
                              cJSON_GetArraySize(conversation->messages) - 1);
}

int conversation_begin(struct conversation *conversation, struct http *http, const char *model,
                       const char *system, const struct sampling *sampling)
{
    *conversation = (struct conversation){
        .http = http,
        .model = model,
        .sampling = *sampling,
        .messages = cJSON_CreateArray(),
        .plain = isatty(STDOUT_FILENO),
    };
    if (!conversation->messages)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (system)
        add_message(conversation, "system", system);
    return 0;
}

void conversation_done(struct conversation *conversation)
{
    claas_json_free(&conversation->messages);
}

/* --- the stream ------------------------------------------------------------------------------- */

struct answer {
    struct claas_buf text;
    char id[65];
    char finish[32];
    bool plain;
};

/* What a model writes must not steer the terminal. */
static void show(const struct answer *answer, const char *text)
{
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;

        if (!answer->plain || (c >= 0x20 && c != 0x7f) || c == '\n' || c == '\t')
            putchar(c);
    }
    fflush(stdout);
}

static int take_chunk(struct answer *answer, const cJSON *chunk)
{
    const cJSON *choice = cJSON_GetArrayItem(claas_json_get(chunk, "choices"), 0);
    const char *id = "", *text = NULL, *finish = NULL, *message = NULL;

    if (claas_json_get_string(claas_json_get(chunk, "error"), "message", &message) == 1) {
        CLAAS_AUTO_FREE char *copy = claas_strdup(message);

        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s", copy ? copy : "");
    }
    claas_json_get_string(chunk, "id", &id);
    claas_copy_text(answer->id, sizeof(answer->id), id);
    claas_json_get_string(choice, "finish_reason", &finish);
    if (finish)
        claas_copy_text(answer->finish, sizeof(answer->finish), finish);
    if (claas_json_get_string(claas_json_get(choice, "delta"), "content", &text) != 1)
        return 0;
    show(answer, text);
    return claas_buf_add_text(&answer->text, text);
}

static int take_event(void *arg, const char *name, const char *id, const char *data)
{
    CLAAS_AUTO(claas_json_free) cJSON *chunk = NULL;
    int rc;

    (void)name, (void)id;
    if (strcmp(data, "[DONE]") == 0)
        return 0;
    rc = claas_json_parse(data, strlen(data), ANSWER_MAX, &chunk);
    return rc < 0 ? rc : take_chunk(arg, chunk);
}

static cJSON *request_body(const struct conversation *conversation)
{
    const struct sampling *sampling = &conversation->sampling;
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "model", conversation->model);
    claas_json_set(body, "messages", cJSON_Duplicate(conversation->messages, true));
    claas_json_set_bool(body, "stream", true);
    if (sampling->temperature >= 0)
        claas_json_set_number(body, "temperature", sampling->temperature);
    if (sampling->top_p >= 0)
        claas_json_set_number(body, "top_p", sampling->top_p);
    if (sampling->max_tokens > 0)
        claas_json_set_int(body, "max_tokens", sampling->max_tokens);
    if (sampling->seed >= 0)
        claas_json_set_int(body, "seed", sampling->seed + conversation->answers);
    return body;
}

int conversation_ask(struct conversation *conversation, const char *text)
{
    struct answer answer = {.plain = conversation->plain};
    struct http_stream stream = {
        .method = "POST", .path = "/v1/chat/completions", .event = take_event, .arg = &answer};
    int rc;

    if (!claas_utf8_valid(text, strlen(text)))
        return claas_fail(CLAAS_ERR_INVALID, "that is not UTF-8");
    claas_buf_init(&answer.text, ANSWER_MAX);
    add_message(conversation, "user", text);
    stream.body = request_body(conversation);
    rc = http_events(conversation->http, &stream);
    if (answer.text.length > 0 || rc == 0)
        putchar('\n');
    fflush(stdout);
    if (rc == 0 && !answer.finish[0])
        rc = claas_fail(CLAAS_ERR_UNAVAILABLE, "the answer was cut off");
    if (rc == 0) {
        add_message(conversation, "assistant", answer.text.data ? answer.text.data : "");
        claas_copy_text(conversation->id, sizeof(conversation->id), answer.id);
        conversation->answers++;
        if (strcmp(answer.finish, "length") == 0 && conversation->plain)
            fputs("(cut at --max-tokens, or where the context ends)\n", stderr);
    } else {
        drop_last(conversation);
    }
    claas_buf_done(&answer.text);
    return rc;
}

/* --- going back ------------------------------------------------------------------------------- */

char *conversation_take_back(struct conversation *conversation)
{
    int count = cJSON_GetArraySize(conversation->messages);
    const cJSON *question = cJSON_GetArrayItem(conversation->messages, count - 2);
    const char *role = "", *text = "";
    char *copy;

    if (count < 2)
        return NULL;
    claas_json_get_string(question, "role", &role);
    claas_json_get_string(question, "content", &text);
    if (strcmp(role, "user") != 0)
        return NULL;
    copy = claas_strdup(text);
    drop_last(conversation);
    drop_last(conversation);
    conversation->id[0] = '\0';
    return copy;
}

void conversation_clear(struct conversation *conversation)
{
    const cJSON *first = conversation->messages->child;
    const char *role = "";
    int kept;

    if (first)
        claas_json_get_string(first, "role", &role);
    kept = strcmp(role, "system") == 0 ? 1 : 0;
    while (cJSON_GetArraySize(conversation->messages) > kept)
        drop_last(conversation);
    conversation->id[0] = '\0';
}
