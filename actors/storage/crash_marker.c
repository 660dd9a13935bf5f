/* Crashes count against the jobs that ran. A process that crashes by itself (SIGSEGV, SIGABRT)
 * leaves a marker in the data directory; at the next start the jobs whose cycle was running get a
 * strike, and one that ran alone and has too many is parked: else a job that crashes its worker
 * would do so at every start. Which of several jobs it was is not known, so each of them has its
 * next try alone. kill -9 and power cuts leave no marker and count for nothing. Either way nothing
 * runs when storage starts, unless the scheduler is in another process: whatever ran waits
 * again. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "store_sqlite.h"

/* Adds to `jobs` those that ran, as [job_id, strikes]. */
static int find_jobs(struct store *store, cJSON *jobs)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(&store->reader, &statement,
                      "SELECT job_id, strikes FROM jobs WHERE ended = 0"
                      " AND state IN ('batched', 'training', 'gating', 'publishing') ORDER BY seq",
                      "");

    if (rc < 0)
        return rc;
    while ((rc = db_step(&store->reader, statement)) > 0) {
        cJSON *job = cJSON_CreateArray();

        cJSON_AddItemToArray(job, cJSON_CreateString(db_text(statement, 0)));
        cJSON_AddItemToArray(job, cJSON_CreateNumber((double)db_int(statement, 1)));
        cJSON_AddItemToArray(jobs, job);
    }
    return rc;
}

/* Records the strike of one job, or without `text` only its state. */
static int record(struct store *store, const char *job_id, const char *state, const char *text)
{
    cJSON *ids = cJSON_CreateArray();
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();
    struct claas_store_request request = {.principal = "local", .body = body};
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    cJSON *event = cJSON_CreateObject();

    cJSON_AddItemToArray(ids, cJSON_CreateString(job_id));
    claas_json_set_string(event, "kind", text ? "error" : "state");
    if (text)
        claas_json_set_string(event, "error", text);
    claas_json_set(body, "job_ids", ids);
    claas_json_set_string(body, "state", state);
    claas_json_set(body, "event", event);
    claas_json_set_bool(body, "failure", text != NULL);
    return store->base.ops->call(&store->base, CLAAS_STORE_JOB_RECORD, &request, &answer);
}

static int count(struct store *store, const char *what)
{
    CLAAS_AUTO_FREE char *text = claas_format("the process crashed while it worked (%s)", what);
    CLAAS_AUTO(claas_json_free) cJSON *jobs = cJSON_CreateArray();
    const cJSON *job;
    int many, rc;

    if (!text || !jobs)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = find_jobs(store, jobs);
    if (rc < 0)
        return rc;
    many = cJSON_GetArraySize(jobs);
    cJSON_ArrayForEach(job, jobs)
    {
        int strikes = cJSON_GetArrayItem(job, 1)->valueint + 1;
        bool park = many == 1 && store->options.retries > 0 && strikes >= store->options.retries;

        if (rc == 0)
            rc = record(store, cJSON_GetArrayItem(job, 0)->valuestring, park ? "failed" : "queued",
                        text);
    }
    rc = store_end(store, rc);
    if (rc == 0)
        store_warn(store, "the last process crashed (%s): a strike for %d jobs", what, many);
    return rc;
}

int store_requeue(struct store *store)
{
    CLAAS_AUTO(claas_json_free) cJSON *jobs = cJSON_CreateArray();
    const cJSON *job;
    int rc = jobs ? find_jobs(store, jobs) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0 || cJSON_GetArraySize(jobs) == 0)
        return rc;
    cJSON_ArrayForEach(job, jobs)
    {
        if (rc == 0)
            rc = record(store, cJSON_GetArrayItem(job, 0)->valuestring, "queued", NULL);
    }
    return store_end(store, rc);
}

int store_count_crash(struct store *store)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/" CLAAS_CRASH_MARKER, store->data);
    CLAAS_AUTO_FREE char *what = NULL;
    size_t length;
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_file_read(path, CLAAS_CRASH_MARKER_MAX, &what, &length);
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
