/* Upkeep in small pieces while nothing else is to do: old answers, weights of old versions,
 * moments, details of old jobs, jobs whose adapter is gone, the log.
 *
 * Each piece is one short transaction. Files go through `trash` like everything that is removed:
 * first the catalogue says that they are gone, then they go. The current version, version 0 and
 * pinned ones are never touched. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define BATCH      256
#define JOBS_BATCH 16
#define WATCHED_MS INT64_C(3600000) /* for those who watch a job to read its end */

/* Answers without feedback, beyond the count or the age. Only the oldest are looked at: age and
 * number grow together, so the scan stops where the first one stays. */
static int drop_rollouts(struct store *store)
{
    return db_run(&store->writer,
                  "DELETE FROM rollouts WHERE seq IN ("
                  " SELECT seq FROM ("
                  "  SELECT seq, created FROM rollouts WHERE kept = 0 ORDER BY seq LIMIT ?1)"
                  " WHERE created < ?2 OR seq <= (SELECT max(seq) FROM rollouts) - ?3)",
                  "iii", (int64_t)BATCH, claas_clock_unix_ms() - store->options.keep_rollouts_ms,
                  store->options.keep_rollouts);
}

static int expire(struct store *store, int64_t adapter, int64_t number, const char *dir)
{
    CLAAS_AUTO_FREE char *path = store_version_path(store, dir, number, true);
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = store_begin(store);
    if (rc == 0)
        rc = db_run(&store->writer,
                    "UPDATE versions SET state = 'expired', moments = 0"
                    " WHERE adapter = ? AND number = ?",
                    "ii", adapter, number);
    if (rc >= 0)
        rc = db_run(&store->writer, "INSERT OR IGNORE INTO trash(path) VALUES(?)", "t", path);
    rc = store_end(store, rc);
    return rc < 0 ? rc : 1;
}

/* Expires one version that is past keep_versions of the adapter and still has its weights. */
static int expire_version(struct store *store, int64_t adapter)
{
    CLAAS_AUTO_FREE char *dir = NULL;
    DB_STATEMENT *statement = NULL;
    int64_t number;
    int rc = db_query(&store->writer, &statement,
                      "SELECT v.number, a.dir FROM adapters a"
                      " JOIN versions v ON v.adapter = a.id"
                      " WHERE a.id = ?2"
                      "  AND v.state = 'available' AND v.number > 0 AND v.number <> a.current"
                      "  AND NOT v.pinned AND v.number < ("
                      "   SELECT min(number) FROM (SELECT number FROM versions n"
                      "    WHERE n.adapter = ?2 ORDER BY number DESC LIMIT ?1))"
                      " LIMIT 1",
                      "ii", store->options.keep_versions, adapter);

    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc <= 0)
        return rc;
    number = db_int(statement, 0);
    dir = claas_strdup(db_text(statement, 1));
    db_statement_done(&statement);
    return dir ? expire(store, adapter, number, dir) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int drop_moments_of(struct store *store, int64_t adapter, int64_t number, const char *dir)
{
    CLAAS_AUTO_FREE char *path = store_version_path(store, dir, number, false);
    CLAAS_AUTO_FREE char *file = path ? claas_format("%s/%s", path, ADAPTER_MOMENTS) : NULL;
    int rc;

    if (!file)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = store_settle(store); /* what is in doubt may be current yet, and want its moments */
    if (rc < 0)
        return rc;
    /* The row is changed after the file is gone: a crash in between repeats this. */
    if (unlink(file) < 0 && errno != ENOENT)
        return claas_fail_errno("%s", file);
    rc = db_run(&store->writer, "UPDATE versions SET moments = 0 WHERE adapter = ? AND number = ?",
                "ii", adapter, number);
    return rc < 0 ? rc : 1;
}

/* Training goes on from the current version, so its moments stay as long as any are wanted. */
static int drop_moments(struct store *store, int64_t adapter)
{
    CLAAS_AUTO_FREE char *dir = NULL;
    DB_STATEMENT *statement = NULL;
    int64_t number;
    int rc = db_query(&store->writer, &statement,
                      "SELECT v.number, a.dir FROM adapters a"
                      " JOIN versions v ON v.adapter = a.id"
                      " WHERE a.id = ?2"
                      "  AND v.state = 'available' AND v.moments AND NOT v.pinned"
                      "  AND (v.number <> a.current OR ?1 = 0)"
                      "  AND v.number NOT IN (SELECT number FROM versions n"
                      "   WHERE n.adapter = ?2 ORDER BY number DESC LIMIT ?1)"
                      " LIMIT 1",
                      "ii", store->options.keep_moments, adapter);

    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc <= 0)
        return rc;
    number = db_int(statement, 0);
    dir = claas_strdup(db_text(statement, 1));
    db_statement_done(&statement);
    return dir ? drop_moments_of(store, adapter, number, dir)
               : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

int store_retain_all(struct store *store)
{
    return db_exec(&store->writer, "CREATE TEMP TABLE retention_due(adapter INTEGER PRIMARY KEY);"
                                   "INSERT INTO retention_due SELECT id FROM adapters");
}

int store_retain_later(struct store *store, int64_t adapter)
{
    int rc = db_run(&store->writer, "INSERT OR IGNORE INTO retention_due(adapter) VALUES(?)", "i",
                    adapter);

    return rc < 0 ? rc : 0;
}

/* What one publication costs here does not grow with the adapters that it is not about. An adapter
 * whose files cannot be removed stays due, and the others have their turn. */
static int retain(struct store *store)
{
    int64_t adapter = 0;
    int failed = 0;

    for (int i = 0; i < BATCH; i++) {
        int rc = db_get_int(&store->writer, &adapter,
                            "SELECT adapter FROM retention_due WHERE adapter > ?"
                            " ORDER BY adapter LIMIT 1",
                            "i", adapter);

        if (rc <= 0)
            return rc < 0 ? rc : failed;
        rc = expire_version(store, adapter);
        if (rc == 0)
            rc = drop_moments(store, adapter);
        if (rc > 0)
            return rc;
        if (rc == 0)
            rc =
                db_run(&store->writer, "DELETE FROM retention_due WHERE adapter = ?", "i", adapter);
        if (rc < 0)
            failed = rc;
    }
    return failed < 0 ? failed : 1;
}

/* --- jobs ------------------------------------------------------------------------------ */

struct due {
    int64_t jobs[JOBS_BATCH];
    size_t count;
};

static int read_due(struct store *store, sqlite3_stmt *statement, struct due *due)
{
    int rc = 0;

    while (due->count < JOBS_BATCH && (rc = db_step(&store->writer, statement)) > 0)
        due->jobs[due->count++] = db_int(statement, 0);
    return rc < 0 ? rc : 0;
}

static int for_each_due(struct store *store, const struct due *due,
                        int (*run)(struct store *store, int64_t job))
{
    int rc = due->count > 0 ? store_begin(store) : 0;

    if (rc < 0 || due->count == 0)
        return rc;
    for (size_t i = 0; rc >= 0 && i < due->count; i++)
        rc = run(store, due->jobs[i]);
    rc = store_end(store, rc);
    return rc < 0 ? rc : (int)due->count;
}

/* The states stay: transitions, and what a repeated idempotency key is answered with. */
static int drop_details_of(struct store *store, int64_t job)
{
    int rc =
        db_run(&store->writer, "DELETE FROM job_events WHERE job = ? AND state IS NULL", "i", job);

    if (rc >= 0)
        rc = db_run(&store->writer, "UPDATE jobs SET ended = 2, result = NULL WHERE seq = ?", "i",
                    job);
    return rc;
}

/* As with answers, only the oldest are looked at. */
static int drop_details(struct store *store)
{
    DB_STATEMENT *statement = NULL;
    struct due due = {.count = 0};
    int rc = db_query(&store->writer, &statement,
                      "SELECT seq FROM ("
                      " SELECT seq, updated FROM jobs WHERE ended = 1"
                      "  AND seq <= (SELECT max(seq) FROM jobs) - ?1 ORDER BY seq LIMIT ?2)"
                      " WHERE updated < ?3",
                      "iii", store->options.keep_jobs, (int64_t)JOBS_BATCH,
                      claas_clock_unix_ms() - WATCHED_MS);

    if (rc == 0)
        rc = read_due(store, statement, &due);
    db_statement_done(&statement);
    return rc < 0 ? rc : for_each_due(store, &due, drop_details_of);
}

/* With its events and feedback, and the answers that no other feedback is on. */
static int drop_job(struct store *store, int64_t job)
{
    int rc = db_run(&store->writer,
                    "DELETE FROM rollouts WHERE seq IN"
                    " (SELECT rollout FROM feedback WHERE job = ?) AND NOT " STORE_STANDS,
                    "i", job);

    if (rc >= 0)
        rc = db_run(&store->writer, "DELETE FROM jobs WHERE seq = ?", "i", job);
    return rc;
}

/* Jobs are found by their feedback: there is none without. */
static int drop_jobs_of(struct store *store, int64_t adapter)
{
    DB_STATEMENT *statement = NULL;
    struct due due = {.count = 0};
    int rc = db_query(&store->writer, &statement,
                      "SELECT DISTINCT f.job FROM feedback f JOIN jobs j ON j.seq = f.job"
                      " WHERE f.adapter = ? AND j.ended > 0",
                      "i", adapter);

    if (rc == 0)
        rc = read_due(store, statement, &due);
    db_statement_done(&statement);
    return rc < 0 ? rc : for_each_due(store, &due, drop_job);
}

/* The adapter that went first, once the ends of its jobs had time to be read. */
static int drop_gone(struct store *store)
{
    DB_STATEMENT *statement = NULL;
    int64_t since, adapter;
    int rc = db_query(&store->writer, &statement,
                      "SELECT since, adapter FROM gone_adapters WHERE since < ?"
                      " ORDER BY since, adapter LIMIT 1",
                      "i", claas_clock_unix_ms() - WATCHED_MS);

    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc <= 0)
        return rc;
    since = db_int(statement, 0);
    adapter = db_int(statement, 1);
    db_statement_done(&statement);
    rc = drop_jobs_of(store, adapter);
    return rc != 0
               ? rc
               : db_run(&store->writer, "DELETE FROM gone_adapters WHERE since = ? AND adapter = ?",
                        "ii", since, adapter);
}

/* The first part that has something to do does it, and is the last one next time: where versions
 * come all the time, answers must not pile up. When one fails, the later ones still have their
 * turn. */
int store_tend(struct store *store)
{
    static int (*const parts[])(struct store *) = {store_empty_trash, retain, drop_rollouts,
                                                   drop_details, drop_gone};
    int failed = 0;

    for (size_t i = 0; i < CLAAS_COUNT(parts); i++) {
        size_t part = (store->tended + i) % CLAAS_COUNT(parts);
        int rc = parts[part](store);

        if (rc > 0) {
            store->tended = part + 1;
            return rc;
        }
        if (rc < 0)
            failed = rc;
    }
    sqlite3_wal_checkpoint_v2(store->writer.handle, NULL, SQLITE_CHECKPOINT_PASSIVE, NULL, NULL);
    return failed;
}
