/* Parameters of OpenAI's requests: see openai.h. Unknown fields are ignored, as OpenAI's clients
 * expect of a compatible server. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/buf.h"
#include "claas/clock.h"
#include "claas/mem.h"
#include "errors.h"
#include "openai.h"
#include "request.h"
#include "schema.h"

#define STOPS_MAX      16
#define TOP_MAX        20
#define MAX_TOKENS     1000000
#define CONTENT_MAX    (64 << 20) /* far above any body's limit */
#define EXACT_INTEGERS 9007199254740991.0

static const struct schema_place body_place = {NULL, "body", 0};

static const struct schema_field common_fields[] = {
    {"model", SCHEMA_STRING, false, 0, 256},
    {"max_tokens", SCHEMA_INT, false, 1, MAX_TOKENS},
    {"max_completion_tokens", SCHEMA_INT, false, 1, MAX_TOKENS},
    {"temperature", SCHEMA_NUMBER, false, 0, 2},
    {"top_p", SCHEMA_NUMBER, false, 0, 1},
    {"top_k", SCHEMA_INT, false, -1, MAX_TOKENS},
    {"seed", SCHEMA_INT, false, -EXACT_INTEGERS, EXACT_INTEGERS},
    {"n", SCHEMA_INT, false, 1, OPENAI_CHOICES_MAX},
    {"stream", SCHEMA_BOOL, false, 0, 0},
    {"stream_options", SCHEMA_OBJECT, false, 0, 0},
};

static const struct schema_field chat_fields[] = {
    {"messages", SCHEMA_ARRAY, true, 1, 4096},
    {"logprobs", SCHEMA_BOOL, false, 0, 0},
    {"top_logprobs", SCHEMA_INT, false, 0, TOP_MAX},
};

static const struct schema_field message_fields[] = {
    {"role", SCHEMA_STRING, true, 1, 32},
};

static const struct schema_field completion_fields[] = {
    {"prompt", SCHEMA_ANY, true, 0, 0},
};

/* --- contents --- */

static const char *part_text(const cJSON *part)
{
    const char *text = NULL;

    if (cJSON_IsString(part))
        return part->valuestring;
    if (cJSON_IsObject(part) && claas_json_get_string(part, "text", &text) != 1)
        claas_json_get_string(part, "content", &text);
    return text;
}

static char *join_parts(const cJSON *parts)
{
    struct claas_buf text;
    const cJSON *part;
    bool first = true;

    claas_buf_init(&text, CONTENT_MAX);
    claas_buf_add_text(&text, "");
    cJSON_ArrayForEach(part, parts)
    {
        const char *piece = part_text(part);

        if (!piece)
            continue;
        claas_buf_add_text(&text, first ? "" : "\n");
        claas_buf_add_text(&text, piece);
        first = false;
    }
    return first ? (claas_buf_done(&text), claas_strdup("")) : claas_buf_take(&text, NULL);
}

char *openai_content_text(const cJSON *content)
{
    if (!content || cJSON_IsNull(content))
        return claas_strdup("");
    if (cJSON_IsString(content))
        return claas_strdup(content->valuestring);
    if (cJSON_IsArray(content))
        return join_parts(content);
    if (cJSON_IsObject(content)) {
        const char *text = "";

        claas_json_get_string(content, "text", &text);
        return claas_strdup(text);
    }
    if (cJSON_IsBool(content))
        return claas_strdup(cJSON_IsTrue(content) ? "True" : "False");
    return claas_json_print(content);
}

/* "developer" is what newer OpenAI models call "system", "function" what older ones call "tool";
 * chat templates know neither. */
static const char *known_role(const char *role)
{
    if (strcmp(role, "developer") == 0)
        return "system";
    return strcmp(role, "function") == 0 ? "tool" : role;
}

static bool is_role(const char *role)
{
    return strcmp(role, "system") == 0 || strcmp(role, "user") == 0 ||
           strcmp(role, "assistant") == 0 || strcmp(role, "tool") == 0;
}

static cJSON *read_messages(cJSON *faults, const cJSON *messages)
{
    struct schema_place list = {&body_place, "messages", 0};
    cJSON *result = cJSON_CreateArray();
    const cJSON *message;
    int index = 0;

    cJSON_ArrayForEach(message, messages)
    {
        struct schema_place place = {&list, NULL, index++};
        struct schema_place role_place = {&place, "role", 0};
        cJSON *clean = cJSON_CreateObject();
        const char *role = "";
        int known = cJSON_GetArraySize(faults);

        cJSON_AddItemToArray(result, clean);
        schema_check(faults, &place, message, message_fields, CLAAS_COUNT(message_fields));
        if (cJSON_GetArraySize(faults) > known)
            continue;
        claas_json_get_string(message, "role", &role);
        role = known_role(role);
        if (!is_role(role))
            schema_fault(faults, &role_place, "literal_error",
                         "Input should be 'system', 'developer', 'user', 'assistant' or 'tool'");
        CLAAS_AUTO_FREE char *text = openai_content_text(claas_json_get(message, "content"));
        claas_json_set_string(clean, "role", role);
        claas_json_set_string(clean, "content", text);
    }
    return result;
}

/* --- parameters --- */

static void read_stop(cJSON *faults, const cJSON *json, cJSON *body)
{
    struct schema_place place = {&body_place, "stop", 0};
    const cJSON *stop = claas_json_get(json, "stop");
    const cJSON *text;
    cJSON *list;

    if (!stop)
        return;
    list = claas_json_set(body, "stop", cJSON_CreateArray());
    if (cJSON_IsString(stop)) {
        if (stop->valuestring[0])
            cJSON_AddItemToArray(list, cJSON_CreateString(stop->valuestring));
        return;
    }
    if (!cJSON_IsArray(stop) || cJSON_GetArraySize(stop) > STOPS_MAX) {
        schema_fault(faults, &place, "list_type",
                     "Input should be a string or a list of at most %d strings", STOPS_MAX);
        return;
    }
    cJSON_ArrayForEach(text, stop)
    {
        if (!cJSON_IsString(text) || !text->valuestring[0]) {
            schema_fault(faults, &place, "string_type", "Input should hold non-empty strings");
            return;
        }
        cJSON_AddItemToArray(list, cJSON_CreateString(text->valuestring));
    }
}

static void copy_field(const cJSON *json, cJSON *body, const char *from, const char *to)
{
    const cJSON *value = claas_json_get(json, from);

    if (value)
        claas_json_set(body, to, cJSON_Duplicate(value, true));
}

/* Integers that came as text ("9007199254740993") or as 5.0 go on as integers. */
static void copy_int(const cJSON *json, cJSON *body, const char *from, const char *to)
{
    int64_t value;

    if (claas_json_get_int(json, from, INT64_MIN, INT64_MAX, &value) == 1)
        claas_json_set_int(body, to, value);
}

static cJSON *read_common(cJSON *faults, const cJSON *json, struct openai_call *call)
{
    cJSON *body = cJSON_CreateObject();
    const char *model = "";
    const cJSON *options = NULL;
    int64_t top_k = 0;

    schema_check(faults, &body_place, json, common_fields, CLAAS_COUNT(common_fields));
    read_stop(faults, json, body);
    call->created = claas_clock_unix_ms() / 1000;
    claas_json_get_string(json, "model", &model);
    claas_copy_text(call->model, sizeof(call->model), model[0] ? model : "default");
    claas_json_get_bool(json, "stream", &call->stream);
    if (claas_json_get_object(json, "stream_options", &options) == 1)
        claas_json_get_bool(options, "include_usage", &call->include_usage);
    if (model[0])
        claas_json_set_string(body, "model", model);
    copy_int(json, body, "max_tokens", "max_tokens");
    copy_int(json, body, "max_completion_tokens", "max_tokens");
    copy_field(json, body, "temperature", "temperature");
    copy_field(json, body, "top_p", "top_p");
    if (claas_json_get_int(json, "top_k", 0, MAX_TOKENS, &top_k) == 1) /* -1 is vLLM's "off" */
        claas_json_set_int(body, "top_k", top_k);
    copy_int(json, body, "seed", "seed");
    copy_int(json, body, "n", "n");
    claas_json_set_bool(body, "stream", call->stream);
    return body;
}

/* Answers for the faults, if any: true then, and both trees are freed. */
static bool answer_faults(struct request *request, cJSON *faults, cJSON *body)
{
    if (cJSON_GetArraySize(faults) == 0) {
        cJSON_Delete(faults);
        return false;
    }
    cJSON_Delete(body);
    request_fail_schema(request, faults);
    return true;
}

static void ask_logprobs(struct openai_call *call, cJSON *body, int64_t top)
{
    call->logprobs = true;
    claas_json_set_bool(body, "logprobs", true);
    claas_json_set_int(body, "top_logprobs", top);
}

cJSON *openai_chat_body(struct request *request, const cJSON *json, struct openai_call *call)
{
    cJSON *faults = cJSON_CreateArray();
    cJSON *body = read_common(faults, json, call);
    const cJSON *messages = NULL;
    bool logprobs = false;
    int64_t top = 1; /* the contract's default */

    call->chat = true;
    schema_check(faults, &body_place, json, chat_fields, CLAAS_COUNT(chat_fields));
    if (claas_json_get_array(json, "messages", &messages) == 1 && cJSON_GetArraySize(faults) == 0)
        claas_json_set(body, "messages", read_messages(faults, messages));
    claas_json_get_bool(json, "logprobs", &logprobs);
    claas_json_get_int(json, "top_logprobs", 0, TOP_MAX, &top);
    if (logprobs)
        ask_logprobs(call, body, top);
    return answer_faults(request, faults, body) ? NULL : body;
}

/* A text, or a list of exactly one. */
static const char *read_prompt(cJSON *faults, const cJSON *json)
{
    struct schema_place place = {&body_place, "prompt", 0};
    const cJSON *prompt = claas_json_get(json, "prompt");

    if (cJSON_IsArray(prompt) && cJSON_GetArraySize(prompt) == 1)
        prompt = prompt->child;
    if (cJSON_IsString(prompt))
        return prompt->valuestring;
    if (prompt)
        schema_fault(faults, &place, "string_type",
                     "Input should be a string or a list of one string");
    return "";
}

/* `logprobs` is a number here: that many alternatives per token. */
static void read_completion_logprobs(cJSON *faults, const cJSON *json, struct openai_call *call,
                                     cJSON *body)
{
    struct schema_place place = {&body_place, "logprobs", 0};
    const cJSON *value = claas_json_get(json, "logprobs");
    int64_t top = 0;

    if (!value || cJSON_IsFalse(value))
        return;
    if (cJSON_IsTrue(value))
        top = 1;
    else if (claas_json_get_int(json, "logprobs", 0, TOP_MAX, &top) != 1)
        schema_fault(faults, &place, "int_type", "Input should be an integer from 0 to %d",
                     TOP_MAX);
    ask_logprobs(call, body, top);
}

cJSON *openai_completion_body(struct request *request, const cJSON *json, struct openai_call *call)
{
    cJSON *faults = cJSON_CreateArray();
    cJSON *body = read_common(faults, json, call);

    call->chat = false;
    schema_check(faults, &body_place, json, completion_fields, CLAAS_COUNT(completion_fields));
    claas_json_set_string(body, "prompt", read_prompt(faults, json));
    read_completion_logprobs(faults, json, call, body);
    return answer_faults(request, faults, body) ? NULL : body;
}
