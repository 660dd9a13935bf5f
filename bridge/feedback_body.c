/* Feedback's bodies: see feedback.h. */
#include <math.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "errors.h"
#include "feedback.h"
#include "request.h"
#include "schema.h"

#define TEXT_MAX  8388608
#define ITEMS_MAX 16

static const struct schema_place body_place = {NULL, "body", 0};

static const struct schema_field item_fields[] = {
    {"lora_id", SCHEMA_STRING, true, 1, 256},      {"feedback", SCHEMA_STRING, true, 1, TEXT_MAX},
    {"prompt", SCHEMA_STRING, false, 1, TEXT_MAX}, {"response", SCHEMA_STRING, false, 1, TEXT_MAX},
    {"response_id", SCHEMA_STRING, false, 1, 64},  {"choice", SCHEMA_INT, false, 0, 15},
    {"training", SCHEMA_OBJECT, false, 0, 0},
};

/* Types only: the bounds have one sentence for all of them, made by the scheduler. */
static const struct schema_field training_fields[] = {
    {"learning_rate", SCHEMA_NUMBER, false, 0, 0},
    {"alpha", SCHEMA_NUMBER, false, 0, 0},
    {"is_clip", SCHEMA_NUMBER, false, 0, 0},
    {"max_grad_norm", SCHEMA_NUMBER, false, 0, 0},
    {"kl_reg_weight", SCHEMA_NUMBER, false, 0, 0},
    {"teacher_top_k", SCHEMA_INT, false, 0, 0},
    {"steps", SCHEMA_INT, false, 0, 0},
};

static const struct schema_field outer_fields[] = {
    {"requests", SCHEMA_ARRAY, true, 1, ITEMS_MAX},
};

static const struct schema_field common_fields[] = {
    {"orchestration", SCHEMA_OBJECT, false, 0, 0},
    {"wait", SCHEMA_BOOL, false, 0, 0},
};

/* Accepted for the Python system's clients; nothing needs to sleep here. */
static const struct schema_field orchestration_fields[] = {
    {"sleep_before", SCHEMA_BOOL, false, 0, 0},
    {"wake_after", SCHEMA_BOOL, false, 0, 0},
    {"wake_on_failure", SCHEMA_BOOL, false, 0, 0},
    {"sleep_level", SCHEMA_INT, false, 1, 2},
};

/* What an absent field of `training` means, for comparing two of them. */
static const struct {
    const char *key;
    double value;
} training_defaults[] = {
    {"learning_rate", 3e-5}, {"alpha", 0.5},         {"is_clip", 5}, {"max_grad_norm", 1},
    {"kl_reg_weight", 0},    {"teacher_top_k", 100}, {"steps", 1},
};

static bool same_training(const cJSON *left, const cJSON *right)
{
    if (!left || !right)
        return left == right;
    for (size_t i = 0; i < CLAAS_COUNT(training_defaults); i++) {
        double a = training_defaults[i].value, b = a;

        claas_json_get_number(left, training_defaults[i].key, -HUGE_VAL, HUGE_VAL, &a);
        claas_json_get_number(right, training_defaults[i].key, -HUGE_VAL, HUGE_VAL, &b);
        if (!(a == b))
            return false;
    }
    return true;
}

static void check_item(cJSON *faults, const struct schema_place *place, const cJSON *item)
{
    struct schema_place training_place = {place, "training", 0};
    struct schema_place response_place = {place, "response", 0};
    const cJSON *training = claas_json_get(item, "training");

    schema_check(faults, place, item, item_fields, CLAAS_COUNT(item_fields));
    if (cJSON_IsObject(item) && !claas_json_get(item, "response") &&
        !claas_json_get(item, "response_id"))
        schema_fault(faults, &response_place, "missing", "Field required");
    if (cJSON_IsObject(training))
        schema_check(faults, &training_place, training, training_fields,
                     CLAAS_COUNT(training_fields));
}

static void check_common(cJSON *faults, const cJSON *json)
{
    struct schema_place place = {&body_place, "orchestration", 0};
    const cJSON *orchestration = claas_json_get(json, "orchestration");

    schema_check(faults, &body_place, json, common_fields, CLAAS_COUNT(common_fields));
    if (cJSON_IsObject(orchestration))
        schema_check(faults, &place, orchestration, orchestration_fields,
                     CLAAS_COUNT(orchestration_fields));
}

static cJSON *clean_item(const cJSON *item)
{
    cJSON *clean = cJSON_CreateObject();

    for (size_t i = 0; i < CLAAS_COUNT(item_fields); i++) {
        const cJSON *value = claas_json_get(item, item_fields[i].name);

        if (value && strcmp(item_fields[i].name, "training") != 0)
            claas_json_set(clean, item_fields[i].name, cJSON_Duplicate(value, true));
    }
    return clean;
}

/* Rules between the items; NULL or the sentence for a 400. */
static const char *compare_items(const cJSON *requests)
{
    const cJSON *first = cJSON_GetArrayItem(requests, 0);
    const cJSON *item;
    const char *lora_id = "", *other = "";

    claas_json_get_string(first, "lora_id", &lora_id);
    cJSON_ArrayForEach(item, requests)
    {
        claas_json_get_string(item, "lora_id", &other);
        if (strcmp(lora_id, other) != 0)
            return "all requests must use the same lora_id";
    }
    cJSON_ArrayForEach(item, requests)
    {
        if (!same_training(claas_json_get(first, "training"), claas_json_get(item, "training")))
            return "all requests must use the same training config";
    }
    return NULL;
}

static cJSON *check_items(const cJSON *json, bool single)
{
    cJSON *faults = cJSON_CreateArray();
    struct schema_place list = {&body_place, "requests", 0};
    const cJSON *requests = claas_json_get(json, "requests");
    const cJSON *item;
    int index = 0;

    check_common(faults, json);
    if (single) {
        check_item(faults, &body_place, json);
        return faults;
    }
    schema_check(faults, &body_place, json, outer_fields, CLAAS_COUNT(outer_fields));
    if (!cJSON_IsArray(requests) || cJSON_GetArraySize(requests) > ITEMS_MAX)
        return faults;
    cJSON_ArrayForEach(item, requests)
    {
        struct schema_place place = {&list, NULL, index++};

        check_item(faults, &place, item);
    }
    return faults;
}

cJSON *feedback_body(struct request *request, const cJSON *json, int *ret_batch)
{
    bool single = !claas_json_get(json, "requests") && claas_json_get(json, "lora_id");
    const cJSON *requests = claas_json_get(json, "requests");
    const cJSON *training, *item;
    const char *reason;
    cJSON *faults = check_items(json, single);
    cJSON *body, *items;

    if (cJSON_GetArraySize(faults) > 0) {
        request_fail_schema(request, faults);
        return NULL;
    }
    cJSON_Delete(faults);
    reason = single ? NULL : compare_items(requests);
    if (reason) {
        request_fail(request, CLAAS_ERR_INVALID, reason);
        return NULL;
    }
    body = cJSON_CreateObject();
    items = claas_json_set(body, "requests", cJSON_CreateArray());
    if (single)
        cJSON_AddItemToArray(items, clean_item(json));
    cJSON_ArrayForEach(item, requests) cJSON_AddItemToArray(items, clean_item(item));
    training = claas_json_get(single ? json : requests->child, "training");
    if (training)
        claas_json_set(body, "training", cJSON_Duplicate(training, true));
    *ret_batch = cJSON_GetArraySize(items);
    return body;
}
