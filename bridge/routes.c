/* The table of routes: see routes.h. */
#include "routes.h"

#include <stdio.h>
#include <string.h>

#include "claas/mem.h"
#include "errors.h"
#include "request.h"

static const struct route table[] = {
    {"GET", "/", 0, route_root, "What this is"},
    {"GET", "/docs", 0, route_docs, "This list"},
    {"GET", "/health", ROUTE_EXEMPT, route_health, "How every actor and the device are"},
    {"GET", "/v1/health", ROUTE_EXEMPT, route_health, "The same"},
    {"GET", "/metrics", ROUTE_EXEMPT, route_metrics, "Counters as Prometheus text"},
    {"GET", "/v1/models", ROUTE_OPENAI, route_models, "The base model and every adapter"},
    {"GET", "/v1/models/**", ROUTE_OPENAI, route_model, "One of them"},
    {"POST", "/v1/chat/completions", ROUTE_OPENAI | ROUTE_JSON, route_chat, "Chat"},
    {"POST", "/v1/completions", ROUTE_OPENAI | ROUTE_JSON, route_completions, "Text completion"},
    {"POST", "/v1/lora/init", ROUTE_JSON, route_lora_init, "Make an untrained adapter"},
    {"GET", "/v1/lora", 0, route_lora_list, "List adapters"},
    {"DELETE", "/v1/lora", 0, route_lora_delete, "Delete an adapter"},
    {"GET", "/v1/lora/export", 0, route_lora_export, "An adapter as a zip of its PEFT files"},
    {"POST", "/v1/lora/import", 0, route_lora_import, "Make an adapter or version from such a zip",
     take_lora_import},
    {"GET", "/v1/lora/versions", 0, route_lora_versions, "Versions of an adapter"},
    {"POST", "/v1/lora/rollback", ROUTE_JSON, route_lora_rollback, "Serve an earlier version"},
    {"GET", "/v1/lora/feedback", 0, route_standing_list, "Standing feedback of an adapter"},
    {"DELETE", "/v1/lora/feedback", 0, route_standing_withdraw, "Withdraw standing feedback"},
    {"POST", "/v1/feedback", ROUTE_JSON, route_feedback, "Feedback in words: trains the adapter"},
    {"GET", "/v1/jobs", 0, route_jobs, "Learning jobs, newest first"},
    {"GET", "/v1/jobs/*", 0, route_job, "One job"},
    {"GET", "/v1/jobs/*/events", 0, route_job_events, "Its events, streamed"},
    {"DELETE", "/v1/jobs/*", 0, route_job_cancel, "Cancel a job"},
};

const struct route *routes_at(size_t index)
{
    return index < CLAAS_COUNT(table) ? &table[index] : NULL;
}

/* True if `path` is of the pattern's form; the span of the first wildcard comes back. */
static bool matches(const char *pattern, const char *path, const char **tail, size_t *tail_length)
{
    *tail = NULL;
    while (*pattern) {
        size_t length;

        if (*pattern != '*') {
            if (*pattern++ != *path++)
                return false;
            continue;
        }
        length = pattern[1] == '*' ? strlen(path) : strcspn(path, "/");
        if (length == 0)
            return false;
        *tail = path;
        *tail_length = length;
        pattern += pattern[1] == '*' ? 2 : 1;
        path += length;
    }
    return *path == '\0';
}

const struct route *routes_find(const char *method, const char *path, char **ret_tail)
{
    const char *wanted = strcmp(method, "HEAD") == 0 ? "GET" : method;
    const char *tail;
    size_t length;

    for (size_t i = 0; i < CLAAS_COUNT(table); i++) {
        if (strcmp(table[i].method, wanted) == 0 && matches(table[i].path, path, &tail, &length)) {
            if (tail)
                *ret_tail = claas_strndup(tail, length);
            return tail && !*ret_tail ? NULL : &table[i];
        }
    }
    return NULL;
}

/* "GET, HEAD, DELETE" for a known path, "" for an unknown one. */
static void allowed_methods(const char *path, char *text, size_t size)
{
    const char *tail;
    size_t length, used = 0;

    text[0] = '\0';
    for (size_t i = 0; i < CLAAS_COUNT(table); i++) {
        const char *method = table[i].method;

        if (matches(table[i].path, path, &tail, &length) && used < size)
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? ", " : "",
                                     strcmp(method, "GET") == 0 ? "GET, HEAD" : method);
    }
}

void routes_fail(struct request *request)
{
    char allow[64];

    allowed_methods(request->path, allow, sizeof(allow));
    if (allow[0] == '\0') {
        request_fail_status(request, MHD_HTTP_NOT_FOUND, "Not Found", NULL, "unknown_url");
        return;
    }
    request_header(request, MHD_HTTP_HEADER_ALLOW, allow);
    if (strcmp(request->method, "OPTIONS") == 0)
        request_answer(request, MHD_HTTP_NO_CONTENT,
                       MHD_create_response_from_buffer(0, NULL, MHD_RESPMEM_PERSISTENT));
    else
        request_fail_status(request, MHD_HTTP_METHOD_NOT_ALLOWED, "Method Not Allowed", NULL,
                            "method_not_allowed");
}
