/* Requests about adapters: see adapter_calls.h. */
#include "adapter_calls.h"

#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "table.h"

int adapter_versions(struct http *http, const char *lora_id, cJSON **ret)
{
    CLAAS_AUTO_FREE char *path = http_path(http, "/v1/lora/versions", "lora_id", lora_id, NULL);

    return http_json(http, "GET", path, NULL, ret);
}

int adapter_ensure(struct http *http, const char *lora_id, bool *made)
{
    CLAAS_AUTO(claas_json_free) cJSON *versions = NULL;
    cJSON *body;
    int rc = adapter_versions(http, lora_id, &versions);

    *made = false;
    if (rc != CLAAS_ERR_NOT_FOUND)
        return rc;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    rc = http_json(http, "POST", "/v1/lora/init", body, NULL);
    if (rc == CLAAS_ERR_CONFLICT) /* somebody else was faster */
        return 0;
    *made = rc == 0;
    return rc;
}

int adapter_rollback(struct http *http, const char *lora_id, int64_t version)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_int(body, "version", version);
    return http_json(http, "POST", "/v1/lora/rollback", body, NULL);
}

int adapter_parent(struct http *http, const char *lora_id, int64_t *ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    int64_t current = 0, version;
    const cJSON *entry;
    int rc = adapter_versions(http, lora_id, &reply);

    if (rc < 0)
        return rc;
    claas_json_get_int(reply, "current", 0, INT64_MAX, &current);
    cJSON_ArrayForEach(entry, claas_json_get(reply, "versions"))
    {
        version = -1;
        claas_json_get_int(entry, "version", 0, INT64_MAX, &version);
        if (version == current && claas_json_get_int(entry, "parent", 0, INT64_MAX, ret) == 1)
            return 0;
    }
    return claas_fail(CLAAS_ERR_CONFLICT, "%s is at its first version: there is nothing to undo",
                      lora_id);
}

int adapter_standing(struct http *http, const char *lora_id, cJSON **ret)
{
    CLAAS_AUTO_FREE char *path = http_path(http, "/v1/lora/feedback", "lora_id", lora_id, NULL);

    return http_json(http, "GET", path, NULL, ret);
}

int adapter_withdraw(struct http *http, const char *lora_id, const char *id)
{
    CLAAS_AUTO_FREE char *path =
        http_path(http, "/v1/lora/feedback", "lora_id", lora_id, "id", id, NULL);

    return http_json(http, "DELETE", path, NULL, NULL);
}

int adapter_print_versions(const cJSON *reply, bool json)
{
    static const struct table_column columns[] = {
        {"version", "VERSION", TABLE_NUMBER}, {"parent", "PARENT", TABLE_NUMBER},
        {"created", "CREATED", TABLE_TIME},   {"state", "STATE", TABLE_TEXT},
        {"job_id", "JOB", TABLE_TEXT},
    };

    return table_print("versions", columns, CLAAS_COUNT(columns), claas_json_get(reply, "versions"),
                       json);
}

int adapter_print_standing(const cJSON *reply, bool json)
{
    static const struct table_column columns[] = {
        {"id", "ID", TABLE_TEXT},
        {"created", "CREATED", TABLE_TIME},
        {"version", "VERSION", TABLE_NUMBER},
        {"text", "FEEDBACK", TABLE_FREE},
    };

    return table_print("feedback", columns, CLAAS_COUNT(columns), claas_json_get(reply, "feedback"),
                       json);
}
