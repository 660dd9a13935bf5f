/* Inside of the SQLite store: its state, and what its files use of each other. Every
 * `store_<operation>` is an operation of store.h, run inside a savepoint of the writer (changes) or
 * a read transaction of the reader (questions). */
#ifndef CLAAS_STORAGE_STORE_SQLITE_H
#define CLAAS_STORAGE_STORE_SQLITE_H

#include "adapter_files.h"
#include "db.h"
#include "names.h"
#include "store.h"

#define STORE_STANDING_MAX 256
#define STORE_REPLAY_MAX   256
#define STORE_RECENT_MAX   16
#define STORE_ITEMS_MAX    16 /* of one cycle */

/* Of a row of `rollouts`: an adapter that is there has feedback on it. */
#define STORE_STANDS                                                                               \
    "EXISTS (SELECT 1 FROM feedback f JOIN adapters a ON a.id = f.adapter"                         \
    " WHERE f.rollout = rollouts.seq)"

struct store {
    struct claas_store base;
    struct claas_store_options options;
    char *data;    /* absolute */
    char *staging; /* data/staging */
    int lock;      /* flock of data/lock */
    struct db writer, reader;

    bool open;      /* a transaction */
    size_t pending; /* changes in it */
    int broken; /* < 0: SQLite took the whole transaction back; nothing of it can be committed */
    char broken_text[512];
    bool doubtful; /* a COMMIT failed: a start would perhaps find it in the log (store_settle) */
    /* Jobs not at their end, kept here because counting 10,000 rows for every feedback is too slow:
     * the value of the writer's transaction, and the committed one to fall back to. */
    int64_t unfinished, unfinished_committed;
    cJSON *events; /* of the open transaction, for on_event; NULL: none */
    /* The last path of `trash` that could not be removed (NULL: none): those after it are next,
     * until it is time to begin from the front again. */
    char *trash_stuck;
    int64_t trash_retry_ms;
    bool trash_told;
    size_t tended; /* parts of the upkeep are asked in turn, from this one on */
};

typedef int store_op_fn(struct store *store, const struct claas_store_request *request,
                        struct claas_store_answer *answer);
store_op_fn store_rollout_put, store_feedback_put, store_job_record, store_jobs_unfinished,
    store_cycle_input, store_cycle_check, store_version_publish, store_job_get, store_job_list,
    store_adapter_resolve, store_adapter_list, store_adapter_versions, store_adapter_rollback,
    store_adapter_delete, store_standing_list, store_standing_withdraw;

/* --- store_schema.c -------------------------------------------------------------------- */
/* Brings the file to the newest schema, each step in a transaction of its own. VERSION for a file
 * of a newer program, CORRUPT for one of another program. */
int store_migrate(struct db *db);
int store_schema_version(void);
/* A commit that changes nothing: it writes the newest schema's number once more. */
int store_commit_nothing(struct db *db);

/* --- store_sqlite.c -------------------------------------------------------------------- */
/* The writer's transaction, for operations of kind ALONE. */
int store_begin(struct store *store);
/* Commits it, or takes it back if what was done in it failed (rc < 0). 0, or the failure. */
int store_end(struct store *store, int rc);
/* A COMMIT whose fsync failed is taken back here, but its pages are in the log, and the start after
 * a crash takes them for good. So before files change in a way that only one of the two worlds
 * allows, another commit has to take their place. 0 when there is no doubt any more. */
int store_settle(struct store *store);

/* --- recovery.c ------------------------------------------------------------------------ */
int store_lock_directory(struct store *store);
bool store_has_adapters(struct store *store);
/* After the migration: empties staging, removes half-done publications, checks the versions and
 * marks those whose files are lost, or are there again. */
int store_recover(struct store *store);
/* Strikes for the jobs that ran when the last process crashed (crash_marker.c). */
int store_count_crash(struct store *store);
/* The jobs that ran wait again. */
int store_requeue(struct store *store);
/* Removes one path that the table `trash` names, or passes it by if it cannot be removed; > 0 if
 * there was one. */
int store_empty_trash(struct store *store);
void store_warn(const struct store *store, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* --- retention.c ----------------------------------------------------------------------- */
int store_tend(struct store *store);
/* At the start: every adapter is due for retention. Those that are due are a table of the writer's
 * connection, so that who leaves a transaction leaves that too. */
int store_retain_all(struct store *store);
/* A version of the adapter came, or its pointer moved; in the same transaction. */
int store_retain_later(struct store *store, int64_t adapter);

/* --- store_adapters.c ------------------------------------------------------------------ */
struct store_adapter {
    int64_t id, current, next;
    int64_t created; /* Unix ms */
    char uid[33];
    char name[CLAAS_LORA_NAME_BYTES];
    char dir[CLAAS_LORA_NAME_BYTES + 16]; /* below data/adapters */
};
/* 0, or NOT_FOUND "LoRA not found: <asked>". */
int store_find_adapter(struct db *db, const char *principal, const char *asked,
                       struct store_adapter *ret, int64_t *ret_version);
/* Path of a version's directory (absolute, or below data when `relative`); free with free(); NULL:
 * no memory. */
char *store_version_path(const struct store *store, const char *dir, int64_t version,
                         bool relative);
/* 0 when the version's weights can be used; *ret_trained: they differ from the base model's. */
int store_check_available(struct db *db, const struct store_adapter *adapter, int64_t version,
                          bool *ret_trained);
/* Drops the adapter's rows; ends its unfinished jobs as cancelled, if there are any; its directory
 * goes to the trash, its jobs go later (retention.c). */
int store_drop_adapter(struct store *store, const struct store_adapter *adapter, const char *why,
                       bool *ret_jobs_ended);

/* --- store_jobs.c ---------------------------------------------------------------------- */
struct store_job {
    int64_t seq, adapter, strikes;
    bool ended;
    char id[65], state[17];
    char principal[65];
    char lora_id[CLAAS_LORA_NAME_BYTES];
};
/* 0, or NOT_FOUND. */
int store_find_job(struct db *db, const char *id, struct store_job *ret);
/* Writes an event: `extra` (an object or NULL) with the job's id, seq, time and state (may be
 * NULL). *ret (may be NULL) is all of it, to be freed. */
int store_add_event(struct store *store, const struct store_job *job, const char *state,
                    const cJSON *extra, cJSON **ret);
/* Ends a job: state, result (may be NULL), version (-1 = none), and its event. */
int store_end_job(struct store *store, const struct store_job *job, const char *state,
                  const cJSON *extra, const cJSON *result, int64_t version, cJSON **ret_event);
/* The queued event of a job. */
int store_first_event(struct db *db, const char *job_id, cJSON **ret);

/* --- store_rollouts.c ------------------------------------------------------------------ */
struct store_choice {
    int64_t rollout;
    int64_t index;
};
/* The answer that a feedback's request means: by response_id and choice, else by response;
 * NOT_FOUND unless it is this principal's and came from this adapter or from the base model. */
int store_find_choice(struct db *db, const char *principal, const char *lora_id,
                      const cJSON *request, struct store_choice *ret);

/* --- helpers (store_util.c) ------------------------------------------------------------ */
/* Parses JSON that this store wrote; CORRUPT with a sentence when it is none. NULL text gives
 * NULL. */
int store_parse(const char *text, cJSON **ret);
/* claas_json_print, NO_MEMORY for NULL. */
int store_print(const cJSON *json, char **ret);
/* Adds text as string / integer / parsed JSON; a NULL column adds JSON null. */
void store_set_text(cJSON *object, const char *key, sqlite3_stmt *row, int column);
void store_set_int(cJSON *object, const char *key, sqlite3_stmt *row, int column);
int store_set_json(cJSON *object, const char *key, sqlite3_stmt *row, int column);
/* The integer `key` of a body that must be there. */
int store_need_int(const cJSON *body, const char *key, int64_t min, int64_t max, int64_t *ret);
/* SHA-256. */
void store_hash(const void *data, size_t length, uint8_t ret[32]);
/* Required members of a body whose catalogue check may have been skipped (tests, other callers). */
int store_need_text(const cJSON *body, const char *key, const char **ret);
int store_need_array(const cJSON *body, const char *key, const cJSON **ret);

#endif
