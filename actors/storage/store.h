/* The store: everything durable, behind one interface. SQLite and local directories today; a second
 * one (PostgreSQL and objects) implements the same table. Plain C and JSON, no actors.
 *
 * An operation takes the body of the message of the same name (messages.def) and makes the reply's
 * body. Questions are answered from what is committed. Changes share a transaction: the first one
 * opens it, `commit` makes them all durable at once, and only then may their answers go out. One
 * that fails leaves no trace and does not harm the others.
 *
 *     store->ops->call(store, CLAAS_STORE_FEEDBACK_PUT, &request, &answer);    … more of them …
 *     if (store->ops->commit(store) == 0)
 *         … send the answers …
 *     else
 *         … all of them failed, with claas_error_text() … */
#ifndef CLAAS_STORAGE_STORE_H
#define CLAAS_STORAGE_STORE_H

#include "claas/json.h"

enum claas_store_op {
    CLAAS_STORE_ROLLOUT_PUT,
    CLAAS_STORE_FEEDBACK_PUT,
    CLAAS_STORE_JOB_RECORD,
    CLAAS_STORE_JOBS_UNFINISHED,
    CLAAS_STORE_CYCLE_INPUT,
    CLAAS_STORE_CYCLE_CHECK,
    CLAAS_STORE_VERSION_PUBLISH,
    CLAAS_STORE_JOB_GET,
    CLAAS_STORE_JOB_LIST,
    CLAAS_STORE_ADAPTER_RESOLVE,
    CLAAS_STORE_ADAPTER_LIST,
    CLAAS_STORE_ADAPTER_VERSIONS,
    CLAAS_STORE_ADAPTER_ROLLBACK,
    CLAAS_STORE_ADAPTER_DELETE,
    CLAAS_STORE_STANDING_LIST,
    CLAAS_STORE_STANDING_WITHDRAW,
};

enum claas_store_kind {
    CLAAS_STORE_QUESTION, /* answered at once */
    CLAAS_STORE_CHANGE,   /* durable with the next commit */
    CLAAS_STORE_ALONE,    /* commits itself; only while no transaction is open */
};

struct claas_store_blob {
    void *data;
    size_t length;
};

struct claas_store_request {
    const char *principal; /* whose; never NULL */
    const cJSON *body;
    const struct claas_store_blob *blobs; /* borrowed */
    size_t blob_count;
};

struct claas_store_answer {
    cJSON *body;                    /* never NULL after success */
    struct claas_store_blob *blobs; /* owned, each one too */
    size_t blob_count;
    bool jobs_ended; /* jobs ended with their adapter, which is gone: tell the scheduler */
};
void claas_store_answer_done(struct claas_store_answer *answer);

typedef struct claas_store claas_store_t;

struct claas_store_ops {
    const char *name;
    void (*close)(claas_store_t **store);
    enum claas_store_kind (*kind)(enum claas_store_op op);
    /* *answer is empty before and after a failure. */
    int (*call)(claas_store_t *store, enum claas_store_op op,
                const struct claas_store_request *request, struct claas_store_answer *answer);
    /* Changes waiting for a commit. */
    size_t (*pending)(const claas_store_t *store);
    /* < 0: none of the pending changes happened. Nothing pending is fine. */
    int (*commit)(claas_store_t *store);
    /* Drops the pending changes. */
    void (*abort)(claas_store_t *store);
    /* One small piece of upkeep (retention, files to remove, the database's log); > 0 when there
     * may be more to do. Only while nothing is pending. */
    int (*tend)(claas_store_t *store);
};

struct claas_store {
    const struct claas_store_ops *ops;
};

struct claas_store_options {
    const char *data; /* the directory; made if missing */
    int64_t queue_max;
    int64_t replay_items, replay_age;
    int64_t retries;          /* strikes after which a job is parked; 0 = never */
    bool scheduler_elsewhere; /* it is in another process, where its cycles may still run */
    int64_t keep_versions, keep_moments;
    int64_t keep_rollouts, keep_rollouts_ms;
    int64_t keep_jobs; /* with their details */
    /* What a person should look at after the start (a version's files are gone, …). May be NULL. */
    void (*warn)(void *arg, const char *text);
    /* An event of a job (JOB_EVENT's body), once it is on disk; in the call that commits it. May be
     * NULL. */
    void (*on_event)(void *arg, const cJSON *body);
    /* For crash tests: called between the steps of a publication. May be NULL. */
    void (*at_point)(void *arg, const char *point);
    void *arg;
};

/* Locks the directory (BUSY names the process that has it), migrates, recovers, checks. Errors are
 * sentences to show. */
int claas_store_open_sqlite(const struct claas_store_options *options, claas_store_t **ret);

#endif
