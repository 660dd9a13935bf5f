/* What the server is and how it is: /, /docs, /health, /metrics. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/runtime.h"
#include "errors.h"
#include "request.h"

#define STATUS_TIMEOUT_MS 2000

int route_root(struct request *request)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "name", "CLaaS API");
    claas_json_set_string(body, "version", "0.1.0");
    claas_json_set_string(body, "description",
                          "Continual Learning as a Service - SDPO-style distillation");
    claas_json_set_string(body, "docs", "/docs");
    request_answer_json(request, MHD_HTTP_OK, body);
    return 0;
}

int route_docs(struct request *request)
{
    struct claas_buf text;
    const struct route *route;

    claas_buf_init(&text, 65536);
    claas_buf_add_text(&text, "CLaaS API. The whole reference is docs/http-api.md.\n\n");
    for (size_t i = 0; (route = routes_at(i)); i++)
        claas_buf_printf(&text, "%-7s %-24s %s\n", route->method, route->path, route->summary);
    request_answer_text(request, MHD_HTTP_OK, "text/plain; charset=utf-8",
                        claas_buf_take(&text, NULL));
    return 0;
}

int route_metrics(struct request *request)
{
    char *text = claas_metrics_text();

    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    request_answer_text(request, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", text);
    return 0;
}

/* --- health --- */

/* Everyone a chat or a feedback needs, in this process or another. */
static const char *const actors[] = {"storage", "scheduler", "trainer", "sampler"};
#define TRAINER 2 /* the contract's "worker" */

struct health {
    cJSON *status[CLAAS_COUNT(actors)]; /* of each actor, or its {status, error} */
    cJSON *model;
    bool degraded;
    int pending;
    char worker_error[256];
};

static void health_free(void *state)
{
    struct health *health = state;

    for (size_t i = 0; i < CLAAS_COUNT(actors); i++)
        cJSON_Delete(health->status[i]);
    cJSON_Delete(health->model);
    free(health);
}

static void answer_health(struct request *request)
{
    struct health *health = request->state;
    cJSON *body = cJSON_CreateObject();
    cJSON *worker, *list, *http;
    bool worker_ill = health->worker_error[0] != '\0';

    claas_json_set_string(body, "status", health->degraded ? "degraded" : "healthy");
    worker = claas_json_set(body, "worker", cJSON_CreateObject());
    claas_json_set_string(worker, "status", worker_ill ? "unhealthy" : "healthy");
    if (worker_ill)
        claas_json_set_string(worker, "error", health->worker_error);
    else
        claas_json_set_null(worker, "error");
    list = claas_json_set(body, "actors", cJSON_CreateObject());
    for (size_t i = 0; i < CLAAS_COUNT(actors); i++)
        claas_json_set(list, actors[i], CLAAS_TAKE(health->status[i]));
    if (health->model)
        claas_json_set(body, "model", CLAAS_TAKE(health->model));
    http = claas_json_set(body, "http", cJSON_CreateObject());
    claas_json_set_int(http, "connections", (int64_t)request->server->peer_count);
    claas_json_set_int(http, "inflight", (int64_t)request->server->inflight);
    claas_json_set_bool(http, "draining", request->server->draining);
    request_answer_json(request, MHD_HTTP_OK, body);
}

static void part_arrived(struct request *request)
{
    struct health *health = request->state;

    if (--health->pending == 0)
        answer_health(request);
}

static void actor_ill(struct health *health, size_t index, const char *text)
{
    health->degraded = true;
    health->status[index] = cJSON_CreateObject();
    claas_json_set_string(health->status[index], "status", "unhealthy");
    claas_json_set_string(health->status[index], "error", text);
    if (index == TRAINER)
        snprintf(health->worker_error, sizeof(health->worker_error), "%s", text);
}

static int status_known(struct request *request, claas_message_t *reply, void *arg)
{
    struct health *health = request->state;
    size_t index = (size_t)((const char *const *)arg - actors);

    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    if (reply->error) {
        actor_ill(health, index, reply->error_text);
    } else {
        health->status[index] = cJSON_Duplicate(reply->body, true);
        claas_json_set_string(health->status[index], "status", "healthy");
    }
    part_arrived(request);
    return 0;
}

static int model_known(struct request *request, claas_message_t *reply, void *arg)
{
    struct health *health = request->state;

    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    if (reply->error)
        health->degraded = true;
    else
        health->model = cJSON_Duplicate(reply->body, true);
    part_arrived(request);
    return 0;
}

int route_health(struct request *request)
{
    struct health *health = CLAAS_NEW(struct health);
    int rc;

    if (!health)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    request->state = health;
    request->state_free = health_free;
    health->pending = 1; /* this function's own */
    for (size_t i = 0; i < CLAAS_COUNT(actors); i++) {
        rc = request_ask(request, &(struct request_ask){
                                      .to = actors[i],
                                      .type = CLAAS_MSG_STATUS,
                                      .timeout_ms = STATUS_TIMEOUT_MS,
                                      .reply = status_known,
                                      .arg = (void *)&actors[i],
                                      .sees_errors = true,
                                  });
        if (rc < 0)
            actor_ill(health, i, claas_error_text());
        else
            health->pending++;
    }
    rc = request_ask(request, &(struct request_ask){
                                  .to = "sampler",
                                  .type = CLAAS_MSG_MODEL_INFO,
                                  .timeout_ms = STATUS_TIMEOUT_MS,
                                  .reply = model_known,
                                  .sees_errors = true,
                              });
    if (rc < 0)
        health->degraded = true;
    else
        health->pending++;
    part_arrived(request);
    return 0;
}
