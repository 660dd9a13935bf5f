/* Error answers: see errors.h. */
#include "errors.h"

#include <stdio.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "request.h"

#define RETRY_AFTER_S "2"

static bool is_openai(const struct request *request)
{
    if (request->route)
        return request->route->flags & ROUTE_OPENAI;
    return strncmp(request->path, "/v1/chat/", 9) == 0 ||
           strncmp(request->path, "/v1/completions", 15) == 0 ||
           strncmp(request->path, "/v1/models", 10) == 0;
}

static const char *openai_type(int status)
{
    switch (status) {
    case 401:
        return "authentication_error";
    case 403:
        return "permission_error";
    case 429:
        return "rate_limit_error";
    default:
        return status >= 500 ? "server_error" : "invalid_request_error";
    }
}

/* OpenAI's `code`, by which its clients tell errors apart; NULL where there is none. */
static const char *openai_code(const struct request *request, int code)
{
    switch (code) {
    case CLAAS_ERR_NOT_FOUND:
        return request->route ? "model_not_found" : "unknown_url";
    case CLAAS_ERR_LIMIT:
        return "context_length_exceeded";
    case CLAAS_ERR_OVERLOADED:
        return "overloaded";
    case CLAAS_ERR_DEADLINE:
        return "timeout";
    default:
        return NULL;
    }
}

/* The field of the body that is to blame. */
static const char *openai_param(const struct request *request, int code)
{
    if (!request->route)
        return NULL;
    switch (code) {
    case CLAAS_ERR_NOT_FOUND:
        return "model";
    case CLAAS_ERR_LIMIT:
        return request->route->handle == route_completions ? "prompt" : "messages";
    default:
        return NULL;
    }
}

static void set_text_or_null(cJSON *object, const char *key, const char *text)
{
    if (text)
        claas_json_set_string(object, key, text);
    else
        claas_json_set_null(object, key);
}

static cJSON *error_body(const struct request *request, int status, const char *text,
                         const char *param, const char *code)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *error;

    if (!is_openai(request)) {
        claas_json_set_string(body, "detail", text);
        return body;
    }
    error = claas_json_set(body, "error", cJSON_CreateObject());
    claas_json_set_string(error, "message", text);
    claas_json_set_string(error, "type", openai_type(status));
    set_text_or_null(error, "param", param);
    set_text_or_null(error, "code", code);
    return body;
}

void request_fail_status(struct request *request, int status, const char *text, const char *param,
                         const char *code)
{
    if (request->gone)
        return;
    claas_log(status == MHD_HTTP_INTERNAL_SERVER_ERROR ? CLAAS_LOG_WARNING : CLAAS_LOG_DEBUG,
              "%s %s: %d %s (%s)", request->method, request->path, status, text, request->id);
    if (request->sse.begun) {
        sse_send(request, NULL, -1, error_body(request, status, text, param, code));
        sse_end(request);
        return;
    }
    if (request_answered(request))
        return;
    if (status == MHD_HTTP_SERVICE_UNAVAILABLE || status == MHD_HTTP_TOO_MANY_REQUESTS)
        request_header(request, MHD_HTTP_HEADER_RETRY_AFTER, RETRY_AFTER_S);
    if (status == MHD_HTTP_CONFLICT) /* OpenAI's client retries it otherwise */
        request_header(request, "x-should-retry", "false");
    request_answer_json(request, status, error_body(request, status, text, param, code));
}

void request_fail(struct request *request, int code, const char *text)
{
    request_fail_status(request, claas_err_http_status(code), text, openai_param(request, code),
                        openai_code(request, code));
}

/* "requests.0.feedback" of ["body", "requests", 0, "feedback"]. */
static void join_location(const cJSON *location, char *text, size_t size)
{
    const cJSON *part;
    size_t used = 0;

    text[0] = '\0';
    cJSON_ArrayForEach(part, location)
    {
        int added = 0;

        if (part == location->child || used >= size)
            continue;
        if (cJSON_IsString(part))
            added = snprintf(text + used, size - used, "%s%s", used ? "." : "", part->valuestring);
        else
            added =
                snprintf(text + used, size - used, "%s%.0f", used ? "." : "", part->valuedouble);
        used += added > 0 ? (size_t)added : 0;
    }
}

void request_fail_schema(struct request *request, cJSON *faults)
{
    const cJSON *first = cJSON_GetArrayItem(faults, 0);
    const char *sentence = "invalid body", *type = "";
    char where[128], text[512];
    cJSON *body;

    if (!is_openai(request)) {
        body = cJSON_CreateObject();
        claas_json_set(body, "detail", faults);
        request_answer_json(request, MHD_HTTP_UNPROCESSABLE_CONTENT, body);
        return;
    }
    claas_json_get_string(first, "msg", &sentence);
    claas_json_get_string(first, "type", &type);
    join_location(claas_json_get(first, "loc"), where, sizeof(where));
    snprintf(text, sizeof(text), "%s: %s", where, sentence);
    request_fail_status(request, MHD_HTTP_BAD_REQUEST, text, where,
                        strcmp(type, "missing") == 0 ? "missing_required_parameter" : NULL);
    cJSON_Delete(faults);
}
