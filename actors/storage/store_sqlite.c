/* The SQLite store: opening, and the transaction that changes share.
 *
 * The first change opens a transaction of the writer; each change runs in a savepoint of its own,
 * so that a failing one is taken back alone. A full disk can make SQLite take the whole transaction
 * back in the middle: then the group is marked broken, every later change of it fails with the same
 * sentence, and so does the commit, so nobody is told of a success that did not happen. */
#include "store_sqlite.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

#define QUICK_CHECK_BYTES ((int64_t)64 << 20) /* about half a second */

static const struct {
    store_op_fn *run;
    enum claas_store_kind kind;
} operations[] = {
    [CLAAS_STORE_ROLLOUT_PUT] = {store_rollout_put, CLAAS_STORE_CHANGE},
    [CLAAS_STORE_FEEDBACK_PUT] = {store_feedback_put, CLAAS_STORE_CHANGE},
    [CLAAS_STORE_JOB_RECORD] = {store_job_record, CLAAS_STORE_CHANGE},
    [CLAAS_STORE_JOBS_UNFINISHED] = {store_jobs_unfinished, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_CYCLE_INPUT] = {store_cycle_input, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_CYCLE_CHECK] = {store_cycle_check, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_VERSION_PUBLISH] = {store_version_publish, CLAAS_STORE_ALONE},
    [CLAAS_STORE_JOB_GET] = {store_job_get, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_JOB_LIST] = {store_job_list, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_ADAPTER_RESOLVE] = {store_adapter_resolve, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_ADAPTER_LIST] = {store_adapter_list, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_ADAPTER_VERSIONS] = {store_adapter_versions, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_ADAPTER_ROLLBACK] = {store_adapter_rollback, CLAAS_STORE_CHANGE},
    [CLAAS_STORE_ADAPTER_DELETE] = {store_adapter_delete, CLAAS_STORE_CHANGE},
    [CLAAS_STORE_STANDING_LIST] = {store_standing_list, CLAAS_STORE_QUESTION},
    [CLAAS_STORE_STANDING_WITHDRAW] = {store_standing_withdraw, CLAAS_STORE_CHANGE},
};

static struct store *store_of(claas_store_t *store)
{
    return (struct store *)store; /* base is its first member */
}

/* --- the transaction ------------------------------------------------------------------- */

int store_begin(struct store *store)
{
    int rc;

    if (store->broken)
        return claas_fail(store->broken, "%s", store->broken_text);
    if (store->open)
        return 0;
    /* IMMEDIATE: the lock is taken now, not at the first write in the middle of a request. */
    rc = db_exec(&store->writer, "BEGIN IMMEDIATE");
    if (rc < 0)
        return rc;
    store->open = true;
    store->pending = 0;
    store->unfinished = store->unfinished_committed;
    return 0;
}

static void leave(struct store *store)
{
    if (!sqlite3_get_autocommit(store->writer.handle))
        sqlite3_exec(store->writer.handle, "ROLLBACK", NULL, NULL, NULL);
    store->open = false;
    store->pending = 0;
    store->broken = 0;
    store->unfinished = store->unfinished_committed;
    claas_json_free(&store->events);
}

static void sqlite_abort(claas_store_t *base)
{
    leave(store_of(base));
}

static int sqlite_commit(claas_store_t *base)
{
    CLAAS_AUTO(claas_json_free) cJSON *events = NULL;
    struct store *store = store_of(base);
    const cJSON *event;
    int rc = store->broken;

    if (!store->open)
        return 0;
    if (rc < 0)
        claas_fail(rc, "%s", store->broken_text);
    else
        rc = db_exec(&store->writer, "COMMIT");
    if (rc == 0) {
        store->unfinished_committed = store->unfinished;
        events = CLAAS_TAKE(store->events);
    } else {
        store->doubtful = true;
    }
    leave(store); /* after a failed COMMIT the transaction may still be open */
    cJSON_ArrayForEach(event, events) store->options.on_event(store->options.arg, event);
    return rc;
}

int store_end(struct store *store, int rc)
{
    if (rc >= 0)
        return sqlite_commit(&store->base);
    leave(store);
    return rc;
}

int store_settle(struct store *store)
{
    int rc = store->doubtful ? store_commit_nothing(&store->writer) : 0;

    if (rc == 0)
        store->doubtful = false;
    return rc;
}

static size_t sqlite_pending(const claas_store_t *base)
{
    return ((const struct store *)base)->pending;
}

/* The transaction is gone when SQLite fell back to autocommit by itself. */
static void note_broken(struct store *store, int rc)
{
    if (!sqlite3_get_autocommit(store->writer.handle))
        return;
    store->broken = rc;
    snprintf(store->broken_text, sizeof(store->broken_text), "%s", claas_error_text());
}

static int call_change(struct store *store, store_op_fn *run,
                       const struct claas_store_request *request, struct claas_store_answer *answer)
{
    int64_t unfinished;
    int events, rc = store_begin(store);

    if (rc < 0)
        return rc;
    unfinished = store->unfinished;
    events = cJSON_GetArraySize(store->events);
    rc = db_exec(&store->writer, "SAVEPOINT request");
    if (rc == 0)
        rc = run(store, request, answer);
    if (rc == 0 && !answer->body)
        rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc == 0)
        rc = db_exec(&store->writer, "RELEASE request");
    if (rc == 0) {
        store->pending++;
        return 0;
    }
    store->unfinished = unfinished;
    while (cJSON_GetArraySize(store->events) > events)
        cJSON_DeleteItemFromArray(store->events, events);
    note_broken(store, rc);
    if (store->broken)
        return rc;
    /* Not db_exec: the sentence of the failure is to stay. */
    if (sqlite3_exec(store->writer.handle, "ROLLBACK TO request; RELEASE request", NULL, NULL,
                     NULL) != SQLITE_OK) {
        store->broken = rc;
        snprintf(store->broken_text, sizeof(store->broken_text), "%s", claas_error_text());
    }
    if (store->pending == 0)
        leave(store); /* nothing in it: no reason to keep the lock */
    return rc;
}

/* One snapshot for all statements of a question. */
static int call_question(struct store *store, store_op_fn *run,
                         const struct claas_store_request *request,
                         struct claas_store_answer *answer)
{
    int rc = db_exec(&store->reader, "BEGIN");

    if (rc < 0)
        return rc;
    rc = run(store, request, answer);
    sqlite3_exec(store->reader.handle, "COMMIT", NULL, NULL, NULL);
    if (rc == 0 && !answer->body)
        rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return rc;
}

static int sqlite_call(claas_store_t *base, enum claas_store_op op,
                       const struct claas_store_request *request, struct claas_store_answer *answer)
{
    struct store *store = store_of(base);
    store_op_fn *run = operations[op].run;
    int rc = 0;

    memset(answer, 0, sizeof(*answer));
    switch (operations[op].kind) {
    case CLAAS_STORE_QUESTION:
        rc = call_question(store, run, request, answer);
        break;
    case CLAAS_STORE_CHANGE:
        rc = call_change(store, run, request, answer);
        break;
    case CLAAS_STORE_ALONE:
        if (store->open)
            return claas_fail(CLAAS_ERR_INTERNAL, "changes are waiting for their commit");
        rc = run(store, request, answer);
        if (store->open)
            leave(store);
        break;
    }
    if (rc < 0)
        claas_store_answer_done(answer);
    return rc;
}

static enum claas_store_kind sqlite_kind(enum claas_store_op op)
{
    return operations[op].kind;
}

static int sqlite_tend(claas_store_t *base)
{
    struct store *store = store_of(base);

    return store->open ? 0 : store_tend(store);
}

/* --- opening --------------------------------------------------------------------------- */

static void store_close(claas_store_t **base)
{
    struct store *store = *base ? store_of(*base) : NULL;

    if (!store)
        return;
    if (store->writer.handle && store->open)
        leave(store);
    db_close(&store->reader);
    db_close(&store->writer); /* last: it folds the log into the file */
    if (store->lock >= 0)
        close(store->lock);
    free(store->data);
    free(store->staging);
    free(store->trash_stuck);
    free(store);
    *base = NULL;
}

static void store_free(struct store **store)
{
    claas_store_t *base = *store ? &(*store)->base : NULL;

    store_close(&base);
    *store = NULL;
}

static const struct claas_store_ops sqlite_ops = {
    "sqlite",       store_close,   sqlite_kind,  sqlite_call,
    sqlite_pending, sqlite_commit, sqlite_abort, sqlite_tend,
};

static int make_directories(struct store *store)
{
    CLAAS_AUTO_FREE char *adapters = NULL;
    int rc = claas_mkdir_all(store->options.data);

    if (rc < 0)
        return claas_fail_context(rc, "the data directory cannot be made: ");
    store->data = realpath(store->options.data, NULL);
    if (!store->data)
        return claas_fail_errno("data directory %s", store->options.data);
    store->staging = claas_format("%s/staging", store->data);
    adapters = claas_format("%s/adapters", store->data);
    if (!store->staging || !adapters)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = store_lock_directory(store);
    if (rc == 0)
        rc = claas_mkdir_all(store->staging);
    if (rc == 0)
        rc = claas_mkdir_all(adapters);
    if (rc == 0)
        rc = claas_fsync_path(store->data);
    return rc;
}

/* A damaged page is found here rather than in the middle of a publication; big files are left to
 * `PRAGMA quick_check` by hand, a start must not take minutes. */
static int check_integrity(struct store *store, const char *path)
{
    DB_STATEMENT *statement = NULL;
    struct stat info;
    const char *verdict;
    int rc;

    if (stat(path, &info) < 0 || info.st_size > QUICK_CHECK_BYTES)
        return 0;
    rc = db_query(&store->writer, &statement, "PRAGMA quick_check(1)", "");
    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc < 0)
        return claas_fail_context(rc == CLAAS_ERR_IO ? CLAAS_ERR_CORRUPT : rc, "%s: ", path);
    verdict = rc > 0 ? db_text(statement, 0) : NULL;
    if (!verdict || strcmp(verdict, "ok") != 0)
        return claas_fail(CLAAS_ERR_CORRUPT, "%s is damaged (%s): restore it from a backup", path,
                          verdict ? verdict : "no verdict");
    return 0;
}

/* -1: there is none. */
static int read_size(const char *path, off_t *ret)
{
    struct stat info;

    *ret = -1;
    if (stat(path, &info) == 0)
        *ret = info.st_size;
    else if (errno != ENOENT)
        return claas_fail_errno("%s", path);
    return 0;
}

/* SQLite removes a log without a database, and what was acknowledged last is in the log alone.
 * (A file of one byte is an empty one to it.) No crash leaves this: the database's first page is on
 * disk before there is a log. */
static int check_log(const char *path, off_t size)
{
    CLAAS_AUTO_FREE char *log = claas_format("%s-wal", path);
    off_t log_size = 0;
    int rc = log ? read_size(log, &log_size) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0 || size > 1 || log_size <= 0)
        return rc;
    return claas_fail(CLAAS_ERR_CORRUPT,
                      "%s is %s, but its log %s is there: restore both from a backup, or move the "
                      "log away to begin anew",
                      path, size < 0 ? "gone" : "empty", log);
}

/* The tables may be in the log alone, too. */
static int check_tables(struct store *store, const char *path)
{
    int64_t tables = 0;
    int rc = db_get_int(&store->writer, &tables, "SELECT count(*) FROM sqlite_schema", "");

    if (rc < 0)
        return claas_fail_context(rc, "%s: ", path);
    if (tables > 0 || !store_has_adapters(store))
        return 0;
    return claas_fail(
        CLAAS_ERR_CORRUPT,
        "%s is empty, but there are adapters (is its -wal file lost?): restore it from "
        "a backup, or move it away to begin anew",
        path);
}

static int open_database(struct store *store)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/claas.db", store->data);
    off_t size = -1;
    int rc = path ? read_size(path, &size) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc == 0)
        rc = check_log(path, size);
    if (rc == 0)
        rc = db_open(&store->writer, path, true);
    /* Other people's conversations are in it. The log and its index take their modes from the
     * file. */
    if (rc == 0 && chmod(path, 0600) < 0)
        rc = claas_fail_errno("%s", path);
    if (rc == 0)
        rc = check_integrity(store, path);
    if (rc == 0 && size >= 0)
        rc = check_tables(store, path);
    if (rc == 0)
        rc = store_migrate(&store->writer);
    if (rc == 0)
        rc = claas_fsync_parent(path);
    if (rc == 0)
        rc = db_open(&store->reader, path, false);
    if (rc < 0) {
        /* What is refused is left as it was found: the log is neither folded in nor removed. */
        if (store->writer.handle)
            sqlite3_db_config(store->writer.handle, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
        return rc;
    }
    rc = db_get_int(&store->writer, &store->unfinished_committed,
                    "SELECT count(*) FROM jobs WHERE ended = 0", "");
    store->unfinished = store->unfinished_committed;
    return rc < 0 ? rc : 0;
}

int claas_store_open_sqlite(const struct claas_store_options *options, claas_store_t **ret)
{
    CLAAS_AUTO(store_free) struct store *store = CLAAS_NEW(struct store);
    int rc;

    if (!store)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    store->base.ops = &sqlite_ops;
    store->options = *options;
    store->lock = -1;
    rc = make_directories(store);
    if (rc == 0)
        rc = open_database(store);
    if (rc == 0)
        rc = store_retain_all(store);
    if (rc == 0)
        rc = store_recover(store);
    if (rc < 0)
        return rc;
    store->options.data = store->data; /* the caller's string need not live on */
    *ret = &CLAAS_TAKE(store)->base;
    return 0;
}
