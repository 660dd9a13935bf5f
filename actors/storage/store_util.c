/* Small things that the store's files share: JSON in and out of columns, hashes, required
 * members. */
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define JSON_BYTES_MAX ((size_t)64 << 20) /* what was accepted once is read again */

int store_parse(const char *text, cJSON **ret)
{
    int rc;

    *ret = NULL;
    if (!text)
        return 0;
    rc = claas_json_parse(text, strlen(text), JSON_BYTES_MAX, ret);
    if (rc < 0 && rc != CLAAS_ERR_NO_MEMORY)
        return claas_fail_context(CLAAS_ERR_CORRUPT, "a stored value: ");
    return rc;
}

int store_print(const cJSON *json, char **ret)
{
    *ret = claas_json_print(json);
    return *ret ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

void store_set_text(cJSON *object, const char *key, sqlite3_stmt *row, int column)
{
    if (db_is_null(row, column))
        claas_json_set_null(object, key);
    else
        claas_json_set_string(object, key, db_text(row, column));
}

void store_set_int(cJSON *object, const char *key, sqlite3_stmt *row, int column)
{
    if (db_is_null(row, column))
        claas_json_set_null(object, key);
    else
        claas_json_set_int(object, key, db_int(row, column));
}

int store_set_json(cJSON *object, const char *key, sqlite3_stmt *row, int column)
{
    cJSON *value = NULL;
    int rc = store_parse(db_text(row, column), &value);

    if (rc < 0)
        return rc;
    if (value)
        claas_json_set(object, key, value);
    else
        claas_json_set_null(object, key);
    return 0;
}

void store_hash(const void *data, size_t length, uint8_t ret[32])
{
    crypto_hash_sha256(ret, data, length);
}

int store_need_text(const cJSON *body, const char *key, const char **ret)
{
    int rc = claas_json_get_string(body, key, ret);

    if (rc == 0 || (rc > 0 && (*ret)[0] == '\0'))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' must be a non-empty string", key);
    return rc < 0 ? rc : 0;
}

int store_need_array(const cJSON *body, const char *key, const cJSON **ret)
{
    int rc = claas_json_get_array(body, key, ret);

    if (rc == 0)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is missing", key);
    return rc < 0 ? rc : 0;
}

int store_need_int(const cJSON *body, const char *key, int64_t min, int64_t max, int64_t *ret)
{
    int rc = claas_json_get_int(body, key, min, max, ret);

    if (rc == 0)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is missing", key);
    return rc < 0 ? rc : 0;
}

void claas_store_answer_done(struct claas_store_answer *answer)
{
    claas_json_free(&answer->body);
    for (size_t i = 0; i < answer->blob_count; i++)
        free(answer->blobs[i].data);
    free(answer->blobs);
    memset(answer, 0, sizeof(*answer));
}
