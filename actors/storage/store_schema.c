/* The tables, as the list of steps that made them: step n brings a file from user_version n to n +
 * 1, in one transaction with the new number, so a crash leaves the old schema or the new one. A
 * step is never changed once released.
 *
 * Who refers to whom:
 *     adapters 1-n versions (current is one of them)      rollouts 1-n rollout_choices
 *     jobs 1-n job_events, 1-n feedback n-1 rollout choice
 *     gone_adapters 1-n jobs, which follow them
 * Lists per version are not copied: feedback.version is the version that first learned an item, so
 * the standing feedback of version N is that of N and of all its ancestors, and a rollback, which
 * moves `current`, restores it by itself. */
#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define APPLICATION_ID 0x434c6153 /* "CLaS", shown by file(1) */

static const char *const steps[] = {
    /* 0 -> 1 */
    "CREATE TABLE adapters("
    "  id INTEGER PRIMARY KEY AUTOINCREMENT,"
    "  uid TEXT NOT NULL UNIQUE,"
    "  principal TEXT NOT NULL,"
    "  name TEXT NOT NULL,"
    "  dir TEXT NOT NULL UNIQUE," /* below adapters/ */
    "  current INTEGER NOT NULL,"
    "  next INTEGER NOT NULL," /* number of the next version; numbers are not used twice */
    "  base_model TEXT NOT NULL,"
    "  rank INTEGER NOT NULL,"
    "  alpha REAL NOT NULL,"
    "  created INTEGER NOT NULL,"
    "  UNIQUE(principal, name),"
    "  FOREIGN KEY(id, current) REFERENCES versions(adapter, number) DEFERRABLE INITIALLY DEFERRED"
    ") STRICT;"
    "CREATE TABLE versions("
    "  adapter INTEGER NOT NULL REFERENCES adapters(id) ON DELETE CASCADE,"
    "  number INTEGER NOT NULL,"
    "  parent INTEGER,"
    "  job_id TEXT,"
    "  state TEXT NOT NULL CHECK(state IN ('available', 'expired', 'missing')),"
    "  trained INTEGER NOT NULL," /* 0: lora_B is zero, the same as the base model */
    "  moments INTEGER NOT NULL,"
    "  pinned INTEGER NOT NULL DEFAULT 0,"
    "  created INTEGER NOT NULL,"
    "  PRIMARY KEY(adapter, number)"
    ") STRICT, WITHOUT ROWID;"
    /* Paths below the data directory that are to be removed: written before a directory gets its
     * final name and deleted with the row that makes it a version, or written when a version or an
     * adapter goes. */
    "CREATE TABLE trash(path TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;"
    "CREATE TABLE rollouts("
    "  seq INTEGER PRIMARY KEY,"
    "  principal TEXT NOT NULL,"
    "  response_id TEXT NOT NULL,"
    "  lora_id TEXT NOT NULL," /* '' = the base model */
    "  version INTEGER,"
    "  messages TEXT," /* JSON; NULL for a text completion */
    "  prompt TEXT,"
    "  conversation BLOB," /* SHA-256 of messages */
    "  sampling TEXT NOT NULL,"
    "  kept INTEGER NOT NULL DEFAULT 0," /* 1: there is feedback on it, retention passes it by */
    "  created INTEGER NOT NULL,"
    "  UNIQUE(principal, response_id)"
    ") STRICT;"
    "CREATE INDEX rollouts_recent ON rollouts(principal, lora_id, seq) WHERE kept = 0;"
    "CREATE INDEX rollouts_kept ON rollouts(principal, conversation) WHERE kept = 1;"
    "CREATE INDEX rollouts_old ON rollouts(seq) WHERE kept = 0;"
    "CREATE TABLE rollout_choices("
    "  rollout INTEGER NOT NULL REFERENCES rollouts(seq) ON DELETE CASCADE,"
    "  choice INTEGER NOT NULL,"
    "  principal TEXT NOT NULL,"
    "  lora_id TEXT NOT NULL,"
    "  hash BLOB NOT NULL," /* SHA-256 of the normalised visible text */
    "  text TEXT NOT NULL,"
    "  raw TEXT NOT NULL,"
    "  finish_reason TEXT NOT NULL,"
    "  prompt_ids BLOB NOT NULL,"   /* int32, little-endian */
    "  response_ids BLOB NOT NULL," /* int32, with the stop token */
    "  logprobs BLOB NOT NULL,"     /* float32, one per response id */
    "  PRIMARY KEY(rollout, choice)"
    ") STRICT, WITHOUT ROWID;"
    "CREATE INDEX choices_hash ON rollout_choices(principal, hash, lora_id, rollout);"
    "CREATE TABLE jobs("
    "  seq INTEGER PRIMARY KEY AUTOINCREMENT,"
    "  job_id TEXT NOT NULL UNIQUE,"
    "  principal TEXT NOT NULL,"
    "  adapter INTEGER NOT NULL," /* may be gone */
    "  lora_id TEXT NOT NULL,"
    "  state TEXT NOT NULL,"
    "  ended INTEGER NOT NULL DEFAULT 0,"
    "  training TEXT,"
    "  idempotency_key TEXT,"
    "  body_hash BLOB NOT NULL,"
    "  version INTEGER,"
    "  reason TEXT,"
    "  error TEXT,"
    "  result TEXT,"
    "  strikes INTEGER NOT NULL DEFAULT 0,"
    "  created INTEGER NOT NULL,"
    "  updated INTEGER NOT NULL"
    ") STRICT;"
    "CREATE UNIQUE INDEX jobs_key ON jobs(principal, idempotency_key) WHERE idempotency_key NOT "
    "NULL;"
    "CREATE INDEX jobs_unfinished ON jobs(seq) WHERE ended = 0;"
    "CREATE INDEX jobs_adapter ON jobs(principal, lora_id, seq);"
    "CREATE TABLE job_events("
    "  seq INTEGER PRIMARY KEY AUTOINCREMENT,"
    "  job INTEGER NOT NULL REFERENCES jobs(seq) ON DELETE CASCADE,"
    "  time INTEGER NOT NULL,"
    "  state TEXT," /* of a transition */
    "  body TEXT NOT NULL"
    ") STRICT;"
    "CREATE INDEX events_job ON job_events(job, seq);"
    "CREATE TABLE feedback("
    "  seq INTEGER PRIMARY KEY AUTOINCREMENT,"
    "  id TEXT NOT NULL UNIQUE,"
    "  job INTEGER NOT NULL REFERENCES jobs(seq) ON DELETE CASCADE,"
    "  adapter INTEGER NOT NULL,"
    "  principal TEXT NOT NULL,"
    "  rollout INTEGER REFERENCES rollouts(seq) ON DELETE SET NULL,"
    "  choice INTEGER NOT NULL,"
    "  text TEXT NOT NULL,"
    "  prompt TEXT,"       /* as the client gave it */
    "  version INTEGER,"   /* that first learned it */
    "  withdrawn INTEGER," /* when */
    "  created INTEGER NOT NULL"
    ") STRICT;"
    "CREATE INDEX feedback_job ON feedback(job);"
    "CREATE INDEX feedback_rollout ON feedback(rollout);"
    "CREATE INDEX feedback_version ON feedback(adapter, version);",

    /* 1 -> 2: the size of the weights file, so that a cut one is found at the start without reading
     * it; NULL for versions from before. Jobs of one state, for listings. */
    "ALTER TABLE versions ADD COLUMN bytes INTEGER;"
    "CREATE INDEX jobs_state ON jobs(principal, state, seq);",

    /* 2 -> 3: counted around every step of a cycle. */
    "CREATE INDEX feedback_withdrawn ON feedback(adapter) WHERE withdrawn IS NOT NULL;",

    /* 3 -> 4: jobs.ended is 2 for those that lost their result and all events but the states;
     * adapters that went, whose jobs are to follow. When those of before went is not known. */
    "CREATE INDEX jobs_ended ON jobs(seq) WHERE ended = 1;"
    "CREATE TABLE gone_adapters("
    "  since INTEGER NOT NULL," /* Unix ms */
    "  adapter INTEGER NOT NULL,"
    "  PRIMARY KEY(since, adapter)"
    ") STRICT, WITHOUT ROWID;"
    "INSERT INTO gone_adapters SELECT DISTINCT CAST(strftime('%s', 'now') AS INTEGER) * 1000,"
    " adapter FROM feedback WHERE adapter NOT IN (SELECT id FROM adapters);",
};

int store_schema_version(void)
{
    return (int)CLAAS_COUNT(steps);
}

/* PRAGMA takes no bound values. */
static int set_pragma(struct db *db, const char *name, int value)
{
    CLAAS_AUTO_FREE char *sql = claas_format("PRAGMA %s=%d", name, value);

    if (!sql)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return db_exec(db, sql);
}

int store_commit_nothing(struct db *db)
{
    return set_pragma(db, "user_version", store_schema_version());
}

static int run_step(struct db *db, int step)
{
    int rc = db_exec(db, "BEGIN IMMEDIATE");

    if (rc < 0)
        return rc;
    rc = db_exec(db, steps[step]);
    if (rc == 0)
        rc = set_pragma(db, "user_version", step + 1);
    if (rc == 0 && step == 0)
        rc = set_pragma(db, "application_id", APPLICATION_ID);
    if (rc == 0)
        rc = db_exec(db, "COMMIT");
    if (rc < 0) {
        if (!sqlite3_get_autocommit(db->handle))
            sqlite3_exec(db->handle, "ROLLBACK", NULL, NULL, NULL);
        return claas_fail_context(rc, "migration to schema %d: ", step + 1);
    }
    return 0;
}

int store_migrate(struct db *db)
{
    int64_t version = 0, application = 0, tables = 0;
    int rc = db_get_int(db, &version, "PRAGMA user_version", "");

    if (rc >= 0)
        rc = db_get_int(db, &application, "PRAGMA application_id", "");
    if (rc >= 0)
        rc = db_get_int(db, &tables, "SELECT count(*) FROM sqlite_schema", "");
    if (rc < 0)
        return rc;
    if (tables > 0 && application != APPLICATION_ID)
        return claas_fail(CLAAS_ERR_CORRUPT, "claas.db is the database of another program");
    if (version > store_schema_version())
        return claas_fail(
            CLAAS_ERR_VERSION,
            "claas.db has schema %d, this program knows up to %d: it was written by a "
            "newer version of claas",
            (int)version, store_schema_version());
    for (int step = (int)version; step < store_schema_version(); step++) {
        rc = run_step(db, step);
        if (rc < 0)
            return rc;
    }
    return 0;
}
