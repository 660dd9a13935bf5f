/* Jobs and their events. Every transition is a row with a number and a time; a job that has ended
 * changes no more, until retention takes its details. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define JOBS_MAX      64
#define LIST_DEFAULT  100
#define LIST_MAX      1000
#define EVENT_SEQ_MAX INT64_C(1000000000000000)

static const struct {
    const char *name;
    bool final;
    bool recordable; /* by JOB_RECORD; done comes with its version */
} states[] = {
    {"queued", false, true},  {"batched", false, true},    {"training", false, true},
    {"gating", false, true},  {"publishing", false, true}, {"done", true, false},
    {"rejected", true, true}, {"failed", true, true},      {"cancelled", true, true},
};

static int find_state(const char *name)
{
    for (size_t i = 0; i < CLAAS_COUNT(states); i++)
        if (strcmp(states[i].name, name) == 0)
            return (int)i;
    return -1;
}

int store_find_job(struct db *db, const char *id, struct store_job *ret)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(db, &statement,
                      "SELECT seq, adapter, strikes, ended, job_id, state, principal, lora_id"
                      " FROM jobs WHERE job_id = ?",
                      "t", id);

    if (rc == 0)
        rc = db_step(db, statement);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: %.100s", id);
    ret->seq = db_int(statement, 0);
    ret->adapter = db_int(statement, 1);
    ret->strikes = db_int(statement, 2);
    ret->ended = db_int(statement, 3) != 0;
    snprintf(ret->id, sizeof(ret->id), "%s", db_text(statement, 4));
    snprintf(ret->state, sizeof(ret->state), "%s", db_text(statement, 5));
    snprintf(ret->principal, sizeof(ret->principal), "%s", db_text(statement, 6));
    snprintf(ret->lora_id, sizeof(ret->lora_id), "%s", db_text(statement, 7));
    return 0;
}

/* --- events ---------------------------------------------------------------------------- */

/* What the columns hold is set over whatever the body says. */
static void complete_event(cJSON *event, const char *job_id, int64_t seq, int64_t time,
                           const char *state)
{
    claas_json_set_string(event, "job_id", job_id);
    claas_json_set_int(event, "seq", seq);
    claas_json_set_int(event, "time", time);
    if (state) {
        claas_json_set_string(event, "kind", "state");
        claas_json_set_string(event, "state", state);
    }
}

/* Keeps a copy for on_event. Events may be missed anyway, so being out of memory for one does not
 * fail the change. */
static void note_event(struct store *store, const struct store_job *job, const cJSON *event)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set(body, "event", cJSON_Duplicate(event, true));
    claas_json_set_string(body, "lora_id", job->lora_id);
    if (!store->events)
        store->events = cJSON_CreateArray();
    if (!cJSON_AddItemToArray(store->events, body))
        cJSON_Delete(body);
}

int store_add_event(struct store *store, const struct store_job *job, const char *state,
                    const cJSON *extra, cJSON **ret)
{
    CLAAS_AUTO(claas_json_free)
    cJSON *event = extra ? cJSON_Duplicate(extra, true) : cJSON_CreateObject();
    CLAAS_AUTO_FREE char *text = NULL;
    int64_t now = claas_clock_unix_ms();
    int rc = store_print(event, &text);

    if (rc == 0)
        rc = db_run(&store->writer,
                    "INSERT INTO job_events(job, time, state, body) VALUES(?, ?, ?, ?)", "iitt",
                    job->seq, now, state, text);
    if (rc < 0)
        return rc;
    complete_event(event, job->id, sqlite3_last_insert_rowid(store->writer.handle), now, state);
    if (store->options.on_event)
        note_event(store, job, event);
    if (ret)
        *ret = CLAAS_TAKE(event);
    return 0;
}

static int event_row(sqlite3_stmt *row, const char *job_id, cJSON **ret)
{
    cJSON *event = NULL;
    int rc = store_parse(db_text(row, 3), &event);

    if (rc < 0)
        return rc;
    complete_event(event, job_id, db_int(row, 0), db_int(row, 1),
                   db_is_null(row, 2) ? NULL : db_text(row, 2));
    *ret = event;
    return 0;
}

int store_first_event(struct db *db, const char *job_id, cJSON **ret)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(db, &statement,
                      "SELECT e.seq, e.time, e.state, e.body FROM jobs j"
                      " JOIN job_events e ON e.job = j.seq WHERE j.job_id = ? ORDER BY e.seq"
                      " LIMIT 1",
                      "t", job_id);

    if (rc == 0)
        rc = db_step(db, statement);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return claas_fail(CLAAS_ERR_CORRUPT, "job %s has no events", job_id);
    return event_row(statement, job_id, ret);
}

static int list_events(struct db *db, int64_t job, const char *job_id, int64_t since, cJSON *list)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(db, &statement,
                      "SELECT seq, time, state, body FROM job_events WHERE job = ? AND seq > ?"
                      " ORDER BY seq",
                      "ii", job, since);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *event = NULL;

        rc = event_row(statement, job_id, &event);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(list, event);
    }
    return rc;
}

/* --- transitions ----------------------------------------------------------------------- */

/* The text of `key` in the event, else in the result; NULL if neither has it. */
static const char *told(const cJSON *extra, const cJSON *result, const char *key)
{
    const char *text = NULL;

    if (claas_json_get_string(extra, key, &text) != 1 &&
        claas_json_get_string(result, key, &text) != 1)
        return NULL;
    return text;
}

int store_end_job(struct store *store, const struct store_job *job, const char *state,
                  const cJSON *extra, const cJSON *result, int64_t version, cJSON **ret_event)
{
    CLAAS_AUTO_FREE char *text = NULL;
    int rc = result ? store_print(result, &text) : 0;

    if (rc == 0)
        rc = db_run(&store->writer,
                    "UPDATE jobs SET state = ?, ended = 1, result = ?, version = nullif(?, -1),"
                    " reason = ?, error = ?, updated = ? WHERE seq = ?",
                    "ttittii", state, text, version, told(extra, result, "reason"),
                    told(extra, result, "error"), claas_clock_unix_ms(), job->seq);
    if (rc < 0)
        return rc;
    store->unfinished--;
    return store_add_event(store, job, state, extra, ret_event);
}

struct record {
    const char *state; /* NULL: an event only */
    const cJSON *event, *result;
    bool final, failure;
};

static int read_record(const cJSON *body, struct record *record)
{
    int state = -1;
    int rc = claas_json_get_string(body, "state", &record->state);

    if (rc >= 0)
        rc = claas_json_get_object(body, "event", &record->event);
    if (rc >= 0)
        rc = claas_json_get_object(body, "result", &record->result);
    if (rc >= 0)
        rc = claas_json_get_bool(body, "failure", &record->failure);
    if (rc < 0)
        return rc;
    if (!record->event)
        return claas_fail(CLAAS_ERR_INVALID, "'event' is missing");
    if (record->state)
        state = find_state(record->state);
    if (record->state && (state < 0 || !states[state].recordable))
        return claas_fail(CLAAS_ERR_INVALID, "'%.32s' is no state that can be recorded",
                          record->state);
    record->final = record->state && states[state].final;
    return 0;
}

static int record_one(struct store *store, const char *id, const struct record *record,
                      cJSON **ret_event, int64_t *strikes)
{
    struct store_job job;
    int rc = store_find_job(&store->writer, id, &job);

    if (rc < 0)
        return rc;
    if (job.ended)
        return claas_fail(CLAAS_ERR_CONFLICT, "job %s has ended: %s", job.id, job.state);
    if (record->failure)
        job.strikes++;
    if (job.strikes > *strikes)
        *strikes = job.strikes;
    rc = db_run(&store->writer,
                "UPDATE jobs SET state = ifnull(?, state), strikes = ?, updated = ? WHERE seq = ?",
                "tiii", record->state, job.strikes, claas_clock_unix_ms(), job.seq);
    if (rc < 0)
        return rc;
    if (record->final)
        return store_end_job(store, &job, record->state, record->event, record->result, -1,
                             ret_event);
    return store_add_event(store, &job, record->state, record->event, ret_event);
}

int store_job_record(struct store *store, const struct claas_store_request *request,
                     struct claas_store_answer *answer)
{
    struct record record = {0};
    const cJSON *ids = NULL, *id;
    int64_t strikes = 0;
    cJSON *events;
    int rc = store_need_array(request->body, "job_ids", &ids);

    if (rc == 0)
        rc = read_record(request->body, &record);
    if (rc == 0 && (cJSON_GetArraySize(ids) < 1 || cJSON_GetArraySize(ids) > JOBS_MAX))
        rc = claas_fail(CLAAS_ERR_INVALID, "job_ids: 1 to %d are allowed", JOBS_MAX);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    events = claas_json_set(answer->body, "events", cJSON_CreateArray());
    cJSON_ArrayForEach(id, ids)
    {
        cJSON *event = NULL;

        if (!cJSON_IsString(id))
            return claas_fail(CLAAS_ERR_INVALID, "job_ids must be strings");
        rc = record_one(store, id->valuestring, &record, &event, &strikes);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(events, event);
    }
    claas_json_set_int(answer->body, "strikes", strikes);
    return 0;
}

/* --- listings -------------------------------------------------------------------------- */

/* `result` is the column, or NULL: a value that is asked for is read, wanted or not. */
#define JOB_COLUMNS(result)                                                                        \
    "SELECT seq, job_id, lora_id, principal, state, created, updated, version, reason, "           \
    "error, " result                                                                               \
    ", training, strikes, (SELECT count(*) FROM feedback f WHERE f.job = jobs.seq) FROM "          \
    "jobs "

static int add_transitions(struct db *db, int64_t job, cJSON *object)
{
    DB_STATEMENT *statement = NULL;
    cJSON *list = claas_json_set(object, "transitions", cJSON_CreateArray());
    int rc = db_query(db, &statement,
                      "SELECT state, time FROM job_events WHERE job = ? AND state NOT NULL"
                      " ORDER BY seq",
                      "i", job);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *item = cJSON_CreateObject();

        store_set_text(item, "state", statement, 0);
        store_set_int(item, "time", statement, 1);
        cJSON_AddItemToArray(list, item);
    }
    return rc;
}

/* Without `transitions` a query per job is saved: a restarted scheduler has no use for them. The
 * result, which may have a hundred KiB and more, is left to store_job_get. */
static int job_row(struct db *db, sqlite3_stmt *row, bool transitions, cJSON **ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *job = cJSON_CreateObject();
    int rc;

    store_set_text(job, "job_id", row, 1);
    store_set_text(job, "lora_id", row, 2);
    store_set_text(job, "principal", row, 3);
    store_set_text(job, "state", row, 4);
    store_set_int(job, "created", row, 5);
    store_set_int(job, "updated", row, 6);
    store_set_int(job, "version", row, 7);
    store_set_text(job, "reason", row, 8);
    store_set_text(job, "error", row, 9);
    rc = store_set_json(job, "training", row, 11);
    store_set_int(job, "strikes", row, 12);
    store_set_int(job, "items", row, 13);
    if (rc == 0 && transitions)
        rc = add_transitions(db, db_int(row, 0), job);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(job);
    return 0;
}

/* The words that the job is about. */
static int add_feedback(struct db *db, int64_t job, cJSON *object)
{
    DB_STATEMENT *statement = NULL;
    cJSON *list = claas_json_set(object, "feedback", cJSON_CreateArray());
    int rc = db_query(db, &statement,
                      "SELECT f.id, f.text, r.response_id, f.choice FROM feedback f"
                      " LEFT JOIN rollouts r ON r.seq = f.rollout WHERE f.job = ? ORDER BY f.seq",
                      "i", job);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *item = cJSON_CreateObject();

        store_set_text(item, "id", statement, 0);
        store_set_text(item, "text", statement, 1);
        store_set_text(item, "response_id", statement, 2);
        store_set_int(item, "choice", statement, 3);
        cJSON_AddItemToArray(list, item);
    }
    return rc;
}

int store_job_get(struct store *store, const struct claas_store_request *request,
                  struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    const char *id = NULL;
    int64_t since = 0;
    cJSON *job = NULL;
    int rc = store_need_text(request->body, "job_id", &id);

    if (rc == 0)
        rc = claas_json_get_int(request->body, "since", 0, EVENT_SEQ_MAX, &since);
    if (rc >= 0)
        rc = db_query(&store->reader, &statement,
                      JOB_COLUMNS("result") "WHERE job_id = ? AND principal = ?", "tt", id,
                      request->principal);
    if (rc == 0)
        rc = db_step(&store->reader, statement);
    if (rc < 0)
        return rc;
    if (rc == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: %.100s", id);
    rc = job_row(&store->reader, statement, true, &job);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set(answer->body, "job", job);
    rc = store_set_json(job, "result", statement, 10);
    if (rc == 0)
        rc = add_feedback(&store->reader, db_int(statement, 0), job);
    if (rc == 0)
        rc = list_events(&store->reader, db_int(statement, 0), id, since,
                         claas_json_set(job, "events", cJSON_CreateArray()));
    return rc;
}

static int list_rows(struct store *store, sqlite3_stmt *statement, bool transitions,
                     struct claas_store_answer *answer)
{
    cJSON *list;
    int rc;

    answer->body = cJSON_CreateObject();
    list = claas_json_set(answer->body, "jobs", cJSON_CreateArray());
    while ((rc = db_step(&store->reader, statement)) > 0) {
        cJSON *job = NULL;

        rc = job_row(&store->reader, statement, transitions, &job);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(list, job);
    }
    return rc;
}

/* Each form of the question finds its jobs by an index that has them in order; one statement for
 * all forms would read and sort every job there is. ?1 principal, ?2 before, ?3 adapter, ?4 state,
 * ?5 limit. A '+' keeps SQLite from taking an index for that column. */
static const char *list_query(const char *lora_id, const char *state)
{
    if (lora_id[0])
        return JOB_COLUMNS("NULL") "WHERE principal = ?1 AND lora_id = ?3 AND seq < ?2"
                                   " AND (?4 IS NULL OR +state = ?4) ORDER BY seq DESC LIMIT ?5";
    if (state)
        return JOB_COLUMNS("NULL") "WHERE principal = ?1 AND state = ?4 AND seq < ?2"
                                   " ORDER BY seq DESC LIMIT ?5";
    return JOB_COLUMNS("NULL") "WHERE +principal = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT ?5";
}

int store_job_list(struct store *store, const struct claas_store_request *request,
                   struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    const char *lora_id = NULL, *state = NULL, *before = NULL;
    int64_t limit = LIST_DEFAULT, last = INT64_MAX;
    struct claas_lora_name name = {.name = ""};
    struct store_job job;
    int rc = claas_json_get_string(request->body, "lora_id", &lora_id);

    if (rc >= 0)
        rc = claas_json_get_string(request->body, "state", &state);
    if (rc >= 0)
        rc = claas_json_get_string(request->body, "before", &before);
    if (rc >= 0)
        rc = claas_json_get_int(request->body, "limit", 1, LIST_MAX, &limit);
    if (rc >= 0 && lora_id && lora_id[0])
        rc = claas_lora_name_parse(lora_id, &name);
    if (rc >= 0 && state && find_state(state) < 0)
        rc = claas_fail(CLAAS_ERR_INVALID, "'%.32s' is no state of a job", state);
    if (rc >= 0 && before)
        rc = store_find_job(&store->reader, before, &job);
    if (rc < 0)
        return rc;
    if (before && strcmp(job.principal, request->principal) != 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: %.100s", before);
    if (before)
        last = job.seq;
    rc = db_query(&store->reader, &statement, list_query(name.name, state), "titti",
                  request->principal, last, name.name, state, limit);
    return rc < 0 ? rc : list_rows(store, statement, true, answer);
}

int store_jobs_unfinished(struct store *store, const struct claas_store_request *request,
                          struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    const char *after = NULL;
    int64_t limit = LIST_MAX;
    struct store_job job = {.seq = 0};
    int rc = claas_json_get_int(request->body, "limit", 1, LIST_MAX, &limit);

    if (rc >= 0)
        rc = claas_json_get_string(request->body, "after", &after);
    if (rc >= 0 && after)
        rc = store_find_job(&store->reader, after, &job);
    if (rc >= 0)
        rc = db_query(&store->reader, &statement,
                      JOB_COLUMNS("NULL") "WHERE ended = 0 AND seq > ? ORDER BY seq LIMIT ?", "ii",
                      job.seq, limit);
    return rc < 0 ? rc : list_rows(store, statement, false, answer);
}
