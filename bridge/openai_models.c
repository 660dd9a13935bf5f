/* GET /v1/models and /v1/models/{id}: the base model under "base" and under its own name, and every
 * adapter as user/name. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "request.h"

#define ASK_MS 10000

static cJSON *model_object(const char *id, int64_t created, const char *parent)
{
    cJSON *model = cJSON_CreateObject();

    claas_json_set_string(model, "id", id);
    claas_json_set_string(model, "object", "model");
    claas_json_set_int(model, "created", created);
    claas_json_set_string(model, "owned_by", "claas");
    if (parent)
        claas_json_set_string(model, "parent", parent);
    return model;
}

static int ask_adapters(struct request *request);
static int ask_resolve(struct request *request);

static void models_free(void *state)
{
    cJSON_Delete(state);
}

/* The base's two entries. */
static cJSON *base_models(const cJSON *info)
{
    cJSON *list = cJSON_CreateArray();
    const char *name = "";
    int64_t created = 0, context = 0;
    cJSON *model;

    claas_json_get_string(info, "name", &name);
    claas_json_get_int(info, "created", 0, INT64_MAX, &created);
    claas_json_get_int(info, "context", 0, INT64_MAX, &context);
    model = model_object("base", created, NULL);
    claas_json_set_string(model, "root", name);
    claas_json_set_int(model, "max_model_len", context);
    cJSON_AddItemToArray(list, model);
    if (strcmp(name, "base") != 0) {
        model = model_object(name, created, NULL);
        claas_json_set_string(model, "root", name);
        claas_json_set_int(model, "max_model_len", context);
        cJSON_AddItemToArray(list, model);
    }
    return list;
}

static int info_known(struct request *request, claas_message_t *reply, void *arg)
{
    cJSON *list = base_models(reply->body);
    const cJSON *model;
    const char *id;

    (void)arg;
    if (!request->tail) {
        request->state = list;
        request->state_free = models_free;
        return ask_adapters(request);
    }
    cJSON_ArrayForEach(model, list)
    {
        if (claas_json_get_string(model, "id", &id) == 1 && strcmp(id, request->tail) == 0) {
            request_answer_json(request, MHD_HTTP_OK, cJSON_Duplicate(model, true));
            cJSON_Delete(list);
            return 0;
        }
    }
    cJSON_Delete(list);
    return ask_resolve(request);
}

static int adapters_known(struct request *request, claas_message_t *reply, void *arg)
{
    cJSON *list = request->state;
    cJSON *body = cJSON_CreateObject();
    const cJSON *adapter;

    (void)arg;
    request->state = NULL;
    cJSON_ArrayForEach(adapter, claas_json_get(reply->body, "adapters"))
    {
        const char *lora_id = "";
        int64_t created_ms = 0;

        claas_json_get_string(adapter, "lora_id", &lora_id);
        claas_json_get_int(adapter, "created", 0, INT64_MAX, &created_ms);
        cJSON_AddItemToArray(list, model_object(lora_id, created_ms / 1000, "base"));
    }
    claas_json_set_string(body, "object", "list");
    claas_json_set(body, "data", list);
    request_answer_json(request, MHD_HTTP_OK, body);
    return 0;
}

static int ask_adapters(struct request *request)
{
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_ADAPTER_LIST,
                                    .timeout_ms = ASK_MS,
                                    .reply = adapters_known,
                                });
}

static int resolved(struct request *request, claas_message_t *reply, void *arg)
{
    int64_t version = 0, created_ms = 0;
    cJSON *model;

    (void)arg;
    if (reply->error == CLAAS_ERR_NOT_FOUND || reply->error == CLAAS_ERR_INVALID)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "The model `%s` does not exist.", request->tail);
    if (reply->error)
        return claas_fail(reply->error, "%s", reply->error_text);
    claas_json_get_int(reply->body, "version", 0, INT64_MAX, &version);
    claas_json_get_int(reply->body, "created", 0, INT64_MAX, &created_ms);
    model = model_object(request->tail, created_ms / 1000, "base");
    claas_json_set_int(model, "version", version);
    request_answer_json(request, MHD_HTTP_OK, model);
    return 0;
}

static int ask_resolve(struct request *request)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "name", request->tail);
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_ADAPTER_RESOLVE,
                                    .body = body,
                                    .timeout_ms = ASK_MS,
                                    .reply = resolved,
                                    .sees_errors = true,
                                });
}

int route_models(struct request *request)
{
    return request_ask(request, &(struct request_ask){
                                    .to = "sampler",
                                    .type = CLAAS_MSG_MODEL_INFO,
                                    .timeout_ms = ASK_MS,
                                    .reply = info_known,
                                });
}

int route_model(struct request *request)
{
    return route_models(request);
}
