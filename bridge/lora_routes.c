/* Adapters: init, list, delete, versions, rollback, standing feedback. Files (export, import) are
 * in lora_files.c. */
#include "lora.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "request.h"
#include "schema.h"

#define ASK_MS 30000

static const struct schema_place body_place = {NULL, "body", 0};

/* --- shared --- */

int lora_id_query(struct request *request, const char **ret)
{
    struct schema_place query = {NULL, "query", 0};
    struct schema_place place = {&query, "lora_id", 0};
    cJSON *faults;
    int rc = request_query(request, "lora_id", ret);

    if (rc < 0) {
        request_fail(request, rc, claas_error_text());
        return -1;
    }
    if (*ret && (*ret)[0] && strlen(*ret) <= 256)
        return 0;
    faults = cJSON_CreateArray();
    if (!*ret)
        schema_fault(faults, &place, "missing", "Field required");
    else
        schema_fault(faults, &place, (*ret)[0] ? "string_too_long" : "string_too_short",
                     "String should have 1 to 256 characters");
    request_fail_schema(request, faults);
    return -1;
}

/* The actor's reply as it is. */
static int pass_on(struct request *request, claas_message_t *reply, void *arg)
{
    (void)arg;
    if (reply->kind != CLAAS_KIND_PROGRESS)
        request_answer_json(request, MHD_HTTP_OK, cJSON_Duplicate(reply->body, true));
    return 0;
}

static int ask_storage(struct request *request, int type, cJSON *body)
{
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = type,
                                    .body = body,
                                    .timeout_ms = ASK_MS,
                                    .reply = pass_on,
                                });
}

static int ask_about(struct request *request, int type)
{
    const char *lora_id;
    cJSON *body;

    if (lora_id_query(request, &lora_id) < 0)
        return 0;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    return ask_storage(request, type, body);
}

/* --- init --- */

static const struct schema_field init_fields[] = {
    {"lora_id", SCHEMA_STRING, true, 1, 256},      {"base_model", SCHEMA_STRING, false, 0, 256},
    {"lora_r", SCHEMA_INT, false, 4, 128},         {"lora_alpha", SCHEMA_INT, false, 8, 256},
    {"target_modules", SCHEMA_ARRAY, false, 1, 7}, {"overwrite", SCHEMA_BOOL, false, 0, 0},
};

/* The contract's sentence for what went wrong inside; what the client did wrong keeps the status it
 * has everywhere. */
static int initialized(struct request *request, claas_message_t *reply, void *arg)
{
    char text[600];
    const char *lora_id = "";
    cJSON *body;
    int status;

    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return 0;
    if (reply->error) {
        status = claas_err_http_status(reply->error);
        if (status >= 500 || reply->error == CLAAS_ERR_INVALID)
            snprintf(text, sizeof(text), "LoRA initialization failed: %s", reply->error_text);
        else
            snprintf(text, sizeof(text), "%s", reply->error_text);
        request_fail(request, reply->error, text);
        return 0;
    }
    claas_json_get_string(reply->body, "lora_id", &lora_id);
    snprintf(text, sizeof(text), "%s-init", lora_id);
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", text);
    request_answer_json(request, MHD_HTTP_OK, body);
    return 0;
}

int route_lora_init(struct request *request)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    const char *lora_id = "";
    cJSON *faults, *body;

    if (request_json(request, &json) < 0)
        return 0;
    faults = cJSON_CreateArray();
    schema_check(faults, &body_place, json, init_fields, CLAAS_COUNT(init_fields));
    if (cJSON_GetArraySize(faults) > 0) {
        request_fail_schema(request, faults);
        return 0;
    }
    cJSON_Delete(faults);
    claas_json_get_string(json, "lora_id", &lora_id);
    if (request_take_share(request, lora_id) < 0)
        return 0;
    body = cJSON_CreateObject();
    for (size_t i = 0; i < CLAAS_COUNT(init_fields); i++) {
        const cJSON *value = claas_json_get(json, init_fields[i].name);

        if (value)
            claas_json_set(body, init_fields[i].name, cJSON_Duplicate(value, true));
    }
    return request_ask(request, &(struct request_ask){
                                    .to = "trainer",
                                    .type = CLAAS_MSG_ADAPTER_INIT,
                                    .body = body,
                                    .timeout_ms = LORA_TRAINER_MS,
                                    .reply = initialized,
                                    .sees_errors = true,
                                });
}

/* --- list --- */

static int compare_names(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* Every name an adapter answers to: the Python system listed -init and -latest. */
static cJSON *all_names(const cJSON *adapters)
{
    static const char *const forms[] = {"", "-init", "-latest"};
    size_t count = (size_t)cJSON_GetArraySize(adapters) * CLAAS_COUNT(forms), used = 0;
    CLAAS_AUTO_FREE char **names = CLAAS_NEW_ARRAY(char *, count + 1);
    cJSON *list = cJSON_CreateArray();
    const cJSON *adapter;

    cJSON_ArrayForEach(adapter, adapters)
    {
        const char *lora_id = "";

        claas_json_get_string(adapter, "lora_id", &lora_id);
        for (size_t i = 0; names && i < CLAAS_COUNT(forms); i++) {
            char *name = claas_format("%s%s", lora_id, forms[i]);

            if (name)
                names[used++] = name;
        }
    }
    if (used > 0)
        qsort(names, used, sizeof(names[0]), compare_names);
    for (size_t i = 0; i < used; i++) {
        cJSON_AddItemToArray(list, cJSON_CreateString(names[i]));
        free(names[i]);
    }
    return list;
}

static int listed(struct request *request, claas_message_t *reply, void *arg)
{
    const cJSON *adapters = claas_json_get(reply->body, "adapters");
    cJSON *body = cJSON_CreateObject();

    (void)arg;
    claas_json_set(body, "loras", all_names(adapters));
    claas_json_set(body, "adapters", cJSON_Duplicate(adapters, true));
    request_answer_json(request, MHD_HTTP_OK, body);
    return 0;
}

int route_lora_list(struct request *request)
{
    const char *prefix;
    cJSON *body;
    int rc = request_query(request, "prefix", &prefix);

    if (rc < 0)
        return rc;
    body = cJSON_CreateObject();
    if (prefix)
        claas_json_set_string(body, "prefix", prefix);
    return request_ask(request, &(struct request_ask){
                                    .to = "storage",
                                    .type = CLAAS_MSG_ADAPTER_LIST,
                                    .body = body,
                                    .timeout_ms = ASK_MS,
                                    .reply = listed,
                                });
}

/* --- the others --- */

int route_lora_delete(struct request *request)
{
    return ask_about(request, CLAAS_MSG_ADAPTER_DELETE);
}

int route_lora_versions(struct request *request)
{
    return ask_about(request, CLAAS_MSG_ADAPTER_VERSIONS);
}

int route_standing_list(struct request *request)
{
    return ask_about(request, CLAAS_MSG_STANDING_LIST);
}

int route_lora_rollback(struct request *request)
{
    static const struct schema_field fields[] = {
        {"lora_id", SCHEMA_STRING, true, 1, 256},
        {"version", SCHEMA_INT, true, 0, 1e9},
    };
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    const char *lora_id = "";
    int64_t version = 0;
    cJSON *faults, *body;

    if (request_json(request, &json) < 0)
        return 0;
    faults = cJSON_CreateArray();
    schema_check(faults, &body_place, json, fields, CLAAS_COUNT(fields));
    if (cJSON_GetArraySize(faults) > 0) {
        request_fail_schema(request, faults);
        return 0;
    }
    cJSON_Delete(faults);
    claas_json_get_string(json, "lora_id", &lora_id);
    claas_json_get_int(json, "version", 0, INT64_MAX, &version);
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_int(body, "version", version);
    return ask_storage(request, CLAAS_MSG_ADAPTER_ROLLBACK, body);
}

int route_standing_withdraw(struct request *request)
{
    const char *lora_id, *id;
    cJSON *body;
    int rc = request_query(request, "id", &id);

    if (rc < 0)
        return rc;
    if (lora_id_query(request, &lora_id) < 0)
        return 0;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    if (id)
        claas_json_set_string(body, "id", id);
    return ask_storage(request, CLAAS_MSG_STANDING_WITHDRAW, body);
}
