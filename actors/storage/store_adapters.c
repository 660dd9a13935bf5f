/* Adapters and their versions: names to rows, listings, the pointer. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define VERSION_MAX INT64_C(1000000000)
/* In read_adapter's order. */
#define ADAPTER_COLUMNS "id, current, next, uid, name, dir, created"

static int fail_unknown(const char *asked)
{
    return claas_fail(CLAAS_ERR_NOT_FOUND, "LoRA not found: %s", asked);
}

static void read_adapter(sqlite3_stmt *row, struct store_adapter *adapter)
{
    adapter->id = db_int(row, 0);
    adapter->current = db_int(row, 1);
    adapter->next = db_int(row, 2);
    snprintf(adapter->uid, sizeof(adapter->uid), "%s", db_text(row, 3));
    snprintf(adapter->name, sizeof(adapter->name), "%s", db_text(row, 4));
    snprintf(adapter->dir, sizeof(adapter->dir), "%s", db_text(row, 5));
    adapter->created = db_int(row, 6);
}

/* `user-name` is what the Python system made of `user/name` for its inference server; accepted
 * while it is unambiguous. */
static int find_flat_name(struct db *db, const char *principal, const char *name,
                          struct store_adapter *ret)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(db, &statement,
                      "SELECT " ADAPTER_COLUMNS " FROM adapters"
                      " WHERE principal = ?1 AND replace(name, '/', '-') = ?2 LIMIT 2",
                      "tt", principal, name);

    if (rc == 0)
        rc = db_step(db, statement);
    if (rc <= 0)
        return rc;
    read_adapter(statement, ret);
    rc = db_step(db, statement);
    return rc < 0 ? rc : rc == 0;
}

int store_find_adapter(struct db *db, const char *principal, const char *asked,
                       struct store_adapter *ret, int64_t *ret_version)
{
    DB_STATEMENT *statement = NULL;
    struct claas_lora_name name;
    int rc = claas_lora_name_parse(asked, &name);

    if (rc == 0)
        rc = db_query(db, &statement,
                      "SELECT " ADAPTER_COLUMNS " FROM adapters"
                      " WHERE principal = ? AND name = ?",
                      "tt", principal, name.name);
    if (rc == 0)
        rc = db_step(db, statement);
    if (rc > 0)
        read_adapter(statement, ret);
    else if (rc == 0 && !strchr(name.name, '/'))
        rc = find_flat_name(db, principal, name.name, ret);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return fail_unknown(asked);
    if (ret_version)
        *ret_version = name.version;
    return 0;
}

char *store_version_path(const struct store *store, const char *dir, int64_t version, bool relative)
{
    return claas_format("%s%sadapters/%s/v%06" PRId64, relative ? "" : store->data,
                        relative ? "" : "/", dir, version);
}

int store_check_available(struct db *db, const struct store_adapter *adapter, int64_t version,
                          bool *ret_trained)
{
    DB_STATEMENT *statement = NULL;
    const char *state;
    int rc = db_query(db, &statement,
                      "SELECT state, trained FROM versions WHERE adapter = ? AND number = ?", "ii",
                      adapter->id, version);

    if (rc == 0)
        rc = db_step(db, statement);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "LoRA '%s' has no version %" PRId64, adapter->name,
                          version);
    state = db_text(statement, 0);
    if (strcmp(state, "expired") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND,
                          "the weights of version %" PRId64 " of '%s' are no longer kept", version,
                          adapter->name);
    if (strcmp(state, "available") != 0) /* lost: our fault, not the caller's */
        return claas_fail(CLAAS_ERR_CORRUPT,
                          "the weights of version %" PRId64
                          " of '%s' are lost on the server's disk",
                          version, adapter->name);
    *ret_trained = db_int(statement, 1) != 0;
    return 0;
}

int store_adapter_resolve(struct store *store, const struct claas_store_request *request,
                          struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE char *path = NULL;
    struct store_adapter adapter;
    const char *asked = NULL;
    int64_t version = 0;
    bool trained = false;
    int rc = store_need_text(request->body, "name", &asked);

    if (rc == 0)
        rc = store_find_adapter(&store->reader, request->principal, asked, &adapter, &version);
    if (rc < 0)
        return rc;
    if (version == CLAAS_LORA_CURRENT)
        version = adapter.current;
    rc = store_check_available(&store->reader, &adapter, version, &trained);
    if (rc < 0)
        return rc;
    path = store_version_path(store, adapter.dir, version, false);
    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    answer->body = cJSON_CreateObject();
    claas_json_set_string(answer->body, "lora_id", adapter.name);
    claas_json_set_int(answer->body, "version", version);
    claas_json_set_string(answer->body, "directory", path);
    claas_json_set_string(answer->body, "uid", adapter.uid);
    claas_json_set_bool(answer->body, "trained", trained);
    claas_json_set_int(answer->body, "created", adapter.created);
    return 0;
}

static cJSON *adapter_row(sqlite3_stmt *row)
{
    cJSON *item = cJSON_CreateObject();

    store_set_text(item, "lora_id", row, 0);
    store_set_int(item, "current", row, 1);
    store_set_int(item, "versions", row, 2);
    store_set_int(item, "created", row, 3);
    store_set_text(item, "base_model", row, 4);
    store_set_int(item, "rank", row, 5);
    claas_json_set_number(item, "alpha", sqlite3_column_double(row, 6));
    return item;
}

/* "user1" means user1/… and not user10/…: the range ends at '0', the character after '/'. */
int store_adapter_list(struct store *store, const struct claas_store_request *request,
                       struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE char *prefix = NULL;
    DB_STATEMENT *statement = NULL;
    const char *asked = "";
    cJSON *list;
    int rc = claas_json_get_string(request->body, "prefix", &asked);

    if (rc < 0)
        return rc;
    prefix = claas_strdup(asked + strspn(asked, "/"));
    if (!prefix)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t length = strlen(prefix); length > 0 && prefix[length - 1] == '/'; length--)
        prefix[length - 1] = '\0';
    rc = db_query(&store->reader, &statement,
                  "SELECT name, current, (SELECT count(*) FROM versions v WHERE v.adapter = a.id),"
                  " created, base_model, rank, alpha FROM adapters a WHERE principal = ?1"
                  " AND (?2 = '' OR name = ?2 OR (name >= ?2 || '/' AND name < ?2 || '0'))"
                  " ORDER BY name",
                  "tt", request->principal, prefix);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    list = claas_json_set(answer->body, "adapters", cJSON_CreateArray());
    while ((rc = db_step(&store->reader, statement)) > 0)
        cJSON_AddItemToArray(list, adapter_row(statement));
    return rc;
}

/* In the answer the pointer counts as a state, unless the files are lost; what is stored is the
 * state of the files. */
static cJSON *version_row(sqlite3_stmt *row, int64_t current)
{
    cJSON *item = cJSON_CreateObject();
    bool is_current;

    store_set_int(item, "version", row, 0);
    store_set_int(item, "parent", row, 1);
    store_set_int(item, "created", row, 2);
    store_set_text(item, "job_id", row, 3);
    is_current = db_int(row, 0) == current && strcmp(db_text(row, 4), "available") == 0;
    claas_json_set_string(item, "state", is_current ? "current" : db_text(row, 4));
    claas_json_set_bool(item, "moments", db_int(row, 5) != 0);
    return item;
}

int store_adapter_versions(struct store *store, const struct claas_store_request *request,
                           struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    struct store_adapter adapter;
    const char *asked = NULL;
    cJSON *list;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = store_find_adapter(&store->reader, request->principal, asked, &adapter, NULL);
    if (rc == 0)
        rc = db_query(&store->reader, &statement,
                      "SELECT number, parent, created, job_id, state, moments FROM versions"
                      " WHERE adapter = ? ORDER BY number",
                      "i", adapter.id);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set_string(answer->body, "lora_id", adapter.name);
    claas_json_set_int(answer->body, "current", adapter.current);
    list = claas_json_set(answer->body, "versions", cJSON_CreateArray());
    while ((rc = db_step(&store->reader, statement)) > 0)
        cJSON_AddItemToArray(list, version_row(statement, adapter.current));
    return rc;
}

/* A disk that fails for a moment damages nothing. Whatever it is, who asked is not to blame. */
static int fail_damaged(const struct store *store, int code, int64_t version, const char *name)
{
    bool damaged = code != CLAAS_ERR_IO && code != CLAAS_ERR_DENIED &&
                   code != CLAAS_ERR_NO_MEMORY && code != CLAAS_ERR_OVERLOADED;

    if (code == CLAAS_ERR_DENIED)
        code = CLAAS_ERR_IO;
    claas_fail_hide_path(code, store->data, "the data directory");
    return claas_fail_context(damaged ? CLAAS_ERR_CORRUPT : code,
                              "version %" PRId64 " of '%s' %s: ", version, name,
                              damaged ? "is damaged" : "cannot be read");
}

int store_adapter_rollback(struct store *store, const struct claas_store_request *request,
                           struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE char *path = NULL;
    struct store_adapter adapter;
    struct adapter_facts facts;
    const char *asked = NULL;
    int64_t version = 0;
    bool trained;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = store_need_int(request->body, "version", 0, VERSION_MAX, &version);
    if (rc == 0)
        rc = store_find_adapter(&store->writer, request->principal, asked, &adapter, NULL);
    if (rc == 0)
        rc = store_check_available(&store->writer, &adapter, version, &trained);
    if (rc < 0)
        return rc;
    path = store_version_path(store, adapter.dir, version, false);
    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    /* The pointer never goes to files that are not whole. */
    rc = adapter_check(path, false, &facts);
    if (rc < 0)
        return fail_damaged(store, rc, version, adapter.name);
    rc = db_run(&store->writer, "UPDATE adapters SET current = ? WHERE id = ?", "ii", version,
                adapter.id);
    if (rc >= 0)
        rc = store_retain_later(store, adapter.id);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set_string(answer->body, "lora_id", adapter.name);
    claas_json_set_int(answer->body, "version", version);
    return 0;
}

/* --- deletion -------------------------------------------------------------------------- */

static int cancel_jobs(struct store *store, const struct store_adapter *adapter, const char *why,
                       bool *ret_ended)
{
    CLAAS_AUTO(claas_json_free) cJSON *extra = cJSON_CreateObject();
    struct store_job job = {.seq = 0};
    int rc;

    claas_json_set_string(extra, "reason", why);
    for (;;) {
        DB_STATEMENT *statement = NULL;

        /* From the last one on: all that wait are walked through once, not once for each. */
        rc = db_query(&store->writer, &statement,
                      "SELECT job_id FROM jobs WHERE ended = 0 AND adapter = ? AND seq > ?"
                      " ORDER BY seq LIMIT 1",
                      "ii", adapter->id, job.seq);
        if (rc == 0)
            rc = db_step(&store->writer, statement);
        if (rc <= 0)
            return rc;
        rc = store_find_job(&store->writer, db_text(statement, 0), &job);
        if (rc == 0)
            rc = store_end_job(store, &job, "cancelled", extra, NULL, -1, NULL);
        if (rc < 0)
            return rc;
        *ret_ended = true;
    }
}

int store_drop_adapter(struct store *store, const struct store_adapter *adapter, const char *why,
                       bool *ret_jobs_ended)
{
    CLAAS_AUTO_FREE char *path = claas_format("adapters/%s", adapter->dir);
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = cancel_jobs(store, adapter, why, ret_jobs_ended);
    if (rc >= 0)
        rc = db_run(&store->writer, "DELETE FROM adapters WHERE id = ?", "i", adapter->id);
    /* Its answers are nobody's standing feedback any more: retention may have them. */
    if (rc >= 0)
        rc = db_run(&store->writer,
                    "UPDATE rollouts SET kept = 0 WHERE seq IN"
                    " (SELECT rollout FROM feedback WHERE adapter = ?) AND NOT " STORE_STANDS,
                    "i", adapter->id);
    if (rc >= 0)
        rc = db_run(&store->writer,
                    "INSERT INTO gone_adapters SELECT ?1, ?2"
                    " WHERE EXISTS (SELECT 1 FROM feedback WHERE adapter = ?2)",
                    "ii", claas_clock_unix_ms(), adapter->id);
    if (rc >= 0)
        rc = db_run(&store->writer, "INSERT OR IGNORE INTO trash(path) VALUES(?)", "t", path);
    return rc < 0 ? rc : 0;
}

int store_adapter_delete(struct store *store, const struct claas_store_request *request,
                         struct claas_store_answer *answer)
{
    struct store_adapter adapter;
    const char *asked = NULL;
    bool found;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc < 0)
        return rc;
    rc = store_find_adapter(&store->writer, request->principal, asked, &adapter, NULL);
    found = rc == 0;
    if (rc == CLAAS_ERR_NOT_FOUND)
        rc = 0;
    if (rc == 0 && found)
        rc = store_drop_adapter(store, &adapter, "the adapter was deleted", &answer->jobs_ended);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set_bool(answer->body, "deleted", found);
    return 0;
}
