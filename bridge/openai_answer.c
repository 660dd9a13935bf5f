/* Answers in OpenAI's shapes: see openai.h. */
#include <string.h>

#include "openai.h"

static size_t characters(const char *text)
{
    size_t count = 0;

    for (; *text; text++)
        count += ((unsigned char)*text & 0xC0) != 0x80;
    return count;
}

/* Chat: the entries as they are, by reference into the reply, since a long answer has millions of
 * values. */
static cJSON *chat_logprobs(const cJSON *entries)
{
    cJSON *logprobs = cJSON_CreateObject();

    claas_json_set(logprobs, "content", cJSON_CreateArrayReference(entries->child));
    claas_json_set_null(logprobs, "refusal");
    return logprobs;
}

static cJSON *top_object(const cJSON *entry)
{
    cJSON *object = cJSON_CreateObject();
    const cJSON *alternative;

    cJSON_ArrayForEach(alternative, claas_json_get(entry, "top_logprobs"))
    {
        const char *token = "";
        double logprob = 0;

        claas_json_get_string(alternative, "token", &token);
        claas_json_get_number(alternative, "logprob", -1e30, 1e30, &logprob);
        claas_json_set_number(object, token, logprob);
    }
    return object;
}

/* Completions: parallel lists. */
static cJSON *completion_logprobs(const cJSON *entries, size_t offset)
{
    cJSON *logprobs = cJSON_CreateObject();
    cJSON *tokens = claas_json_set(logprobs, "tokens", cJSON_CreateArray());
    cJSON *values = claas_json_set(logprobs, "token_logprobs", cJSON_CreateArray());
    cJSON *tops = claas_json_set(logprobs, "top_logprobs", cJSON_CreateArray());
    cJSON *offsets = claas_json_set(logprobs, "text_offset", cJSON_CreateArray());
    const cJSON *entry;

    cJSON_ArrayForEach(entry, entries)
    {
        const char *token = "";
        double logprob = 0;

        claas_json_get_string(entry, "token", &token);
        claas_json_get_number(entry, "logprob", -1e30, 1e30, &logprob);
        cJSON_AddItemToArray(tokens, cJSON_CreateString(token));
        cJSON_AddItemToArray(values, cJSON_CreateNumber(logprob));
        cJSON_AddItemToArray(tops, top_object(entry));
        cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)offset));
        offset += characters(token);
    }
    return logprobs;
}

cJSON *openai_logprobs(const struct openai_call *call, const cJSON *entries, size_t offset)
{
    if (!entries)
        return cJSON_CreateNull();
    return call->chat ? chat_logprobs(entries) : completion_logprobs(entries, offset);
}

cJSON *openai_usage(const cJSON *reply)
{
    cJSON *usage = cJSON_CreateObject();
    cJSON *details;
    int64_t prompt = 0, completion = 0, cached = 0;

    claas_json_get_int(reply, "prompt_tokens", 0, INT64_MAX, &prompt);
    claas_json_get_int(reply, "completion_tokens", 0, INT64_MAX, &completion);
    claas_json_get_int(reply, "cached_tokens", 0, INT64_MAX, &cached);
    claas_json_set_int(usage, "prompt_tokens", prompt);
    claas_json_set_int(usage, "completion_tokens", completion);
    claas_json_set_int(usage, "total_tokens", prompt + completion);
    details = claas_json_set(usage, "prompt_tokens_details", cJSON_CreateObject());
    claas_json_set_int(details, "cached_tokens", cached);
    return usage;
}

static cJSON *answer_choice(const struct openai_call *call, const cJSON *choice)
{
    cJSON *answer = cJSON_CreateObject();
    const char *text = "", *finish = "stop";
    int64_t index = 0;
    cJSON *message;

    claas_json_get_int(choice, "index", 0, OPENAI_CHOICES_MAX, &index);
    claas_json_get_string(choice, "text", &text);
    claas_json_get_string(choice, "finish_reason", &finish);
    claas_json_set_int(answer, "index", index);
    if (call->chat) {
        message = claas_json_set(answer, "message", cJSON_CreateObject());
        claas_json_set_string(message, "role", "assistant");
        claas_json_set_string(message, "content", text);
    } else {
        claas_json_set_string(answer, "text", text);
    }
    claas_json_set(
        answer, "logprobs",
        openai_logprobs(call, call->logprobs ? claas_json_get(choice, "logprobs") : NULL, 0));
    claas_json_set_string(answer, "finish_reason", finish);
    return answer;
}

cJSON *openai_answer(const struct openai_call *call, const cJSON *reply)
{
    cJSON *answer = cJSON_CreateObject();
    const char *id = "", *lora_id = NULL;
    const cJSON *choice;
    cJSON *choices, *adapter;
    int64_t version = 0;

    claas_json_get_string(reply, "id", &id);
    claas_json_set_string(answer, "id", id);
    claas_json_set_string(answer, "object", call->chat ? "chat.completion" : "text_completion");
    claas_json_set_int(answer, "created", call->created);
    claas_json_set_string(answer, "model", call->model);
    choices = claas_json_set(answer, "choices", cJSON_CreateArray());
    cJSON_ArrayForEach(choice, claas_json_get(reply, "choices"))
        cJSON_AddItemToArray(choices, answer_choice(call, choice));
    claas_json_set(answer, "usage", openai_usage(reply));
    if (claas_json_get_string(reply, "lora_id", &lora_id) == 1) {
        claas_json_get_int(reply, "version", 0, INT64_MAX, &version);
        adapter = claas_json_set(answer, "adapter", cJSON_CreateObject());
        claas_json_set_string(adapter, "lora_id", lora_id);
        claas_json_set_int(adapter, "version", version);
    }
    return answer;
}

cJSON *openai_chunk(const struct openai_call *call)
{
    cJSON *chunk = cJSON_CreateObject();

    claas_json_set_string(chunk, "id", call->id);
    claas_json_set_string(chunk, "object",
                          call->chat ? "chat.completion.chunk" : "text_completion");
    claas_json_set_int(chunk, "created", call->created);
    claas_json_set_string(chunk, "model", call->model);
    claas_json_set(chunk, "choices", cJSON_CreateArray());
    if (call->include_usage)
        claas_json_set_null(chunk, "usage");
    return chunk;
}
