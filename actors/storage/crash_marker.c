/* Crashes count against the jobs that ran. A process that crashes by itself (SIGSEGV, SIGABRT)
 * leaves a marker in the data directory; at the next start the jobs whose cycle was running get a
 * strike, and those with too many are parked: else a job that crashes its worker would do so at
 * every start. kill -9 and power cuts leave no marker and count for nothing. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define MARKER     "crash-marker"
#define MARKER_MAX 256

/* Running jobs, by whether this strike is one too many. */
static int find_jobs(struct store *store, cJSON *again, cJSON *parked)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(&store->reader, &statement,
                      "SELECT job_id, strikes FROM jobs WHERE ended = 0"
                      " AND state IN ('batched', 'training', 'gating', 'publishing') ORDER BY seq"
                      " LIMIT 16",
                      "");

    if (rc < 0)
        return rc;
    while ((rc = db_step(&store->reader, statement)) > 0) {
        bool too_many =
            store->options.retries > 0 && db_int(statement, 1) + 1 >= store->options.retries;

        cJSON_AddItemToArray(too_many ? parked : again, cJSON_CreateString(db_text(statement, 0)));
    }
    return rc;
}

/* Records the strike; `ids` is taken. */
static int record(struct store *store, cJSON *ids, const char *state, const char *text)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();
    struct claas_store_request request = {.principal = "local", .body = body};
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    bool some = cJSON_GetArraySize(ids) > 0;
    cJSON *event = cJSON_CreateObject();

    claas_json_set_string(event, "kind", "error");
    claas_json_set_string(event, "error", text);
    claas_json_set(body, "job_ids", ids);
    claas_json_set_string(body, "state", state);
    claas_json_set(body, "event", event);
    claas_json_set_bool(body, "failure", true);
    return some ? store->base.ops->call(&store->base, CLAAS_STORE_JOB_RECORD, &request, &answer)
                : 0;
}

static int count(struct store *store, const char *what)
{
    CLAAS_AUTO_FREE char *text = claas_format("the process crashed while it worked (%s)", what);
    CLAAS_AUTO(claas_json_free) cJSON *again = cJSON_CreateArray();
    CLAAS_AUTO(claas_json_free) cJSON *parked = cJSON_CreateArray();
    int many, rc;

    if (!text || !again || !parked)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = find_jobs(store, again, parked);
    if (rc < 0)
        return rc;
    many = cJSON_GetArraySize(again) + cJSON_GetArraySize(parked);
    rc = record(store, CLAAS_TAKE(again), "queued", text);
    if (rc == 0)
        rc = record(store, CLAAS_TAKE(parked), "failed", text);
    if (rc == 0)
        rc = store->base.ops->commit(&store->base);
    else
        store->base.ops->abort(&store->base);
    if (rc == 0)
        store_warn(store, "the last process crashed (%s): a strike for %d jobs", what, many);
    return rc;
}

int store_count_crash(struct store *store)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/" MARKER, store->data);
    CLAAS_AUTO_FREE char *what = NULL;
    size_t length;
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_file_read(path, MARKER_MAX, &what, &length);
    if (rc == CLAAS_ERR_NOT_FOUND)
        return 0;
    if (rc == 0) {
        what[strcspn(what, "\r\n")] = '\0';
        rc = count(store, claas_utf8_valid(what, strlen(what)) ? what : "unknown");
    }
    if (rc < 0)
        return rc;
    return unlink(path) < 0 && errno != ENOENT ? claas_fail_errno("%s", path) : 0;
}
