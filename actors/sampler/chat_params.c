/* Reads a CHAT body into checked parameters. Types and ranges were checked by the catalogue; here
 * are the rules between fields and the contents of lists. */
#include <string.h>

#include "chat.h"
#include "claas/err.h"
#include "claas/random.h"

static int check_messages(const cJSON *messages)
{
    const cJSON *message;
    int index = 0;

    cJSON_ArrayForEach(message, messages)
    {
        const char *role = NULL, *content = NULL;
        int rc = claas_json_get_string(message, "role", &role);

        if (!cJSON_IsObject(message) || rc <= 0)
            return claas_fail(CLAAS_ERR_INVALID, "messages[%d] needs a role", index);
        if (claas_json_get_string(message, "content", &content) <= 0)
            return claas_fail(CLAAS_ERR_INVALID, "messages[%d].content must be a text", index);
        if (strcmp(role, "system") != 0 && strcmp(role, "user") != 0 &&
            strcmp(role, "assistant") != 0 && strcmp(role, "developer") != 0 &&
            strcmp(role, "tool") != 0)
            return claas_fail(
                CLAAS_ERR_INVALID,
                "messages[%d].role must be system, developer, user, assistant or tool", index);
        index++;
    }
    return 0;
}

static int read_stops(const cJSON *body, struct chat_params *params)
{
    const cJSON *list = claas_json_get(body, "stop");
    const cJSON *stop;

    cJSON_ArrayForEach(stop, list)
    {
        if (!cJSON_IsString(stop) || stop->valuestring[0] == '\0')
            return claas_fail(CLAAS_ERR_INVALID, "stop must hold non-empty texts");
        if (params->stop_count == CHAT_STOPS_MAX)
            return claas_fail(CLAAS_ERR_LIMIT, "at most %d stop texts", CHAT_STOPS_MAX);
        params->stops[params->stop_count++] = stop->valuestring;
    }
    return 0;
}

static void read_numbers(const claas_config_t *config, const cJSON *body, struct chat_params *p)
{
    int64_t value;

    p->temperature = claas_config_number(config, "chat.temperature");
    p->top_p = claas_config_number(config, "chat.top_p");
    p->max_tokens = (int)claas_config_int(config, "chat.max_tokens");
    p->n = 1;
    claas_json_get_number(body, "temperature", 0, 2, &p->temperature);
    claas_json_get_number(body, "top_p", 0, 1, &p->top_p);
    if (claas_json_get_int(body, "max_tokens", 1, 1000000, &value) == 1)
        p->max_tokens = (int)value;
    if (claas_json_get_int(body, "top_k", 0, 1000000, &value) == 1)
        p->top_k = (int)value;
    if (claas_json_get_int(body, "n", 1, CHAT_CHOICES_MAX, &value) == 1)
        p->n = (int)value;
    if (claas_json_get_int(body, "top_logprobs", 0, CLAAS_TOP_LOGPROBS_MAX, &value) == 1)
        p->top_logprobs = (int)value;
    if (claas_json_get_int(body, "seed", -((int64_t)1 << 53), (int64_t)1 << 53, &value) == 1)
        p->seed = (uint64_t)value;
    else
        p->seed = claas_random_seed() >> 11; /* 53 bits: survives JSON */
}

int chat_params_read(const claas_config_t *config, const cJSON *body, struct chat_params *ret)
{
    struct chat_params params = {0};
    int rc;

    claas_json_get_string(body, "model", &params.model);
    claas_json_get_string(body, "prompt", &params.prompt);
    claas_json_get_array(body, "messages", &params.messages);
    claas_json_get_bool(body, "logprobs", &params.logprobs);
    claas_json_get_bool(body, "stream", &params.stream);
    read_numbers(config, body, &params);
    if (!params.messages == !params.prompt)
        return claas_fail(CLAAS_ERR_INVALID, "either messages or prompt is needed, not both");
    rc = params.messages ? check_messages(params.messages) : 0;
    if (rc == 0)
        rc = read_stops(body, &params);
    if (rc < 0)
        return rc;
    if (params.top_p <= 0)
        params.top_p = 1e-6; /* OpenAI accepts 0: the single likeliest token */
    if (params.top_logprobs > 0)
        params.logprobs = true;
    *ret = params;
    return 0;
}
