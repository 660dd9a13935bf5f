/* Publication: a staged directory becomes a version.
 *
 *     check, fsync            the staged directory is whole and on disk
 *     commit: trash += path   whatever happens now, a start knows of this path
 *     rename                  staging/x -> adapters/user/name/v000007, both parents fsynced
 *     commit: version, pointer (compare-and-set on the parent), jobs done, trash -= path
 *
 * kill -9 anywhere leaves the old version current, or the new one. When the last commit fails the
 * directory goes back to where it was, so the same publication can be tried again; but only when it
 * is certain that no start will find that commit. Else it stays: a start has it as a version or as
 * trash. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "store_sqlite.h"

#define GENERATIONS_MAX 10000
#define SKIPPED_MAX     10000 /* numbers whose directories exist although no catalogue knows them */

struct publication {
    struct store *store;
    const char *principal;
    struct claas_lora_name name;
    int64_t parent; /* -1: new */
    const char *staged;
    const cJSON *job_ids, *result;
    bool overwrite;
    const char *base_model;
    struct adapter_facts facts;
    bool exists; /* `adapter` is what is there now */
    struct store_adapter adapter;
    char dir[sizeof(((struct store_adapter *)0)->dir)]; /* of the new version's adapter */
    int64_t number;
    char *path, *trash; /* absolute, and below data; owned */
    cJSON *events;      /* owned */
    bool jobs_ended;    /* those of the adapter that was there before */
};

static void publication_done(struct publication *publication)
{
    free(publication->path);
    free(publication->trash);
    claas_json_free(&publication->events);
}

static void at_point(const struct publication *publication, const char *point)
{
    const struct claas_store_options *options = &publication->store->options;

    if (options->at_point)
        options->at_point(options->arg, point);
}

static int read_publication(const cJSON *body, struct publication *publication)
{
    const char *lora_id = NULL;
    int rc = store_need_text(body, "lora_id", &lora_id);

    if (rc == 0)
        rc = store_need_int(body, "parent", -1, 1000000000, &publication->parent);
    if (rc == 0)
        rc = store_need_text(body, "directory", &publication->staged);
    if (rc == 0)
        rc = claas_json_get_array(body, "job_ids", &publication->job_ids);
    if (rc >= 0)
        rc = claas_json_get_object(body, "result", &publication->result);
    if (rc >= 0)
        rc = claas_json_get_bool(body, "overwrite", &publication->overwrite);
    if (rc >= 0)
        rc = claas_json_get_string(body, "base_model", &publication->base_model);
    if (rc >= 0)
        rc = claas_lora_name_parse(lora_id, &publication->name);
    return rc < 0 ? rc : 0;
}

static int check_jobs(const struct publication *publication)
{
    const cJSON *id;

    cJSON_ArrayForEach(id, publication->job_ids)
    {
        struct store_job job;
        int rc;

        if (!cJSON_IsString(id))
            return claas_fail(CLAAS_ERR_INVALID, "job_ids must be strings");
        rc = store_find_job(&publication->store->writer, id->valuestring, &job);
        if (rc < 0)
            return rc;
        if (job.ended)
            return claas_fail(CLAAS_ERR_CONFLICT, "job %s has ended: %s", job.id, job.state);
        if (!publication->exists || job.adapter != publication->adapter.id)
            return claas_fail(CLAAS_ERR_CONFLICT, "job %s is about another adapter than '%s'",
                              job.id, publication->name.name);
    }
    return 0;
}

/* The rules of names and parents; nothing is changed yet. */
static int check_target(struct publication *publication)
{
    const char *name = publication->name.name;
    int rc = store_find_adapter(&publication->store->writer, publication->principal, name,
                                &publication->adapter, NULL);

    if (rc < 0 && rc != CLAAS_ERR_NOT_FOUND)
        return rc;
    /* A flat alias of another adapter is not this adapter. */
    publication->exists = rc == 0 && strcmp(publication->adapter.name, name) == 0;
    if (publication->parent < 0) {
        rc = claas_lora_name_check_new(&publication->name);
        if (rc == 0 && publication->job_ids && publication->job_ids->child)
            rc = claas_fail(CLAAS_ERR_INVALID, "a new adapter comes from no jobs");
        if (rc == 0 && publication->exists && !publication->overwrite)
            rc = claas_fail(CLAAS_ERR_EXISTS,
                            "LoRA already exists: %s (overwrite: true starts it anew)", name);
        return rc;
    }
    if (!publication->exists)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "LoRA not found: %s", name);
    if (publication->adapter.current != publication->parent)
        return claas_fail(CLAAS_ERR_CONFLICT,
                          "the current version of '%s' is %" PRId64 ", not %" PRId64, name,
                          publication->adapter.current, publication->parent);
    return check_jobs(publication);
}

/* A new adapter gets a directory that nothing has ever been in: `name`, else `name~2`, …; so an
 * overwritten one keeps its files until the catalogue has let go of them. */
static int choose_directory(struct publication *publication)
{
    const char *name = publication->name.name;
    const char *tenant = strchr(name, '/') ? "" : "~/";

    for (int i = 1; i <= GENERATIONS_MAX; i++) {
        CLAAS_AUTO_FREE char *path = NULL;
        int64_t known = 0;
        char mark[16] = "";
        int rc;

        if (i > 1)
            snprintf(mark, sizeof(mark), "~%d", i);
        snprintf(publication->dir, sizeof(publication->dir), "%s%s%s", tenant, name, mark);
        path = claas_format("%s/adapters/%s", publication->store->data, publication->dir);
        if (!path)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        rc = db_get_int(&publication->store->writer, &known,
                        "SELECT (SELECT count(*) FROM adapters WHERE dir = ?1)"
                        " + (SELECT count(*) FROM trash WHERE path = 'adapters/' || ?1)",
                        "t", publication->dir);
        if (rc < 0)
            return rc;
        if (!known && !path_exists(path))
            return 0;
    }
    return claas_fail(CLAAS_ERR_LIMIT, "too many directories of the name '%s'", name);
}

static int choose_path(struct publication *publication)
{
    int rc = 0;

    if (publication->parent < 0) {
        rc = choose_directory(publication);
        publication->number = 0;
    } else {
        snprintf(publication->dir, sizeof(publication->dir), "%s", publication->adapter.dir);
        publication->number = publication->adapter.next;
    }
    for (int i = 0; rc == 0 && i < SKIPPED_MAX; i++) {
        free(publication->path);
        publication->path =
            store_version_path(publication->store, publication->dir, publication->number, false);
        if (!publication->path)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        if (!path_exists(publication->path))
            break;
        publication->number++;
    }
    if (rc < 0)
        return rc;
    publication->trash =
        store_version_path(publication->store, publication->dir, publication->number, true);
    return publication->trash ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* --- the transaction ------------------------------------------------------------------- */

static int insert_adapter(struct publication *publication)
{
    const char *base_model = publication->base_model && publication->base_model[0]
                                 ? publication->base_model
                                 : publication->facts.base_model;
    char uid[17];
    int rc = 0;

    if (publication->exists)
        rc = store_drop_adapter(publication->store, &publication->adapter,
                                "the adapter was started anew", &publication->jobs_ended);
    if (rc < 0)
        return rc;
    claas_random_hex(uid, 8);
    rc = db_run(&publication->store->writer,
                "INSERT INTO adapters(uid, principal, name, dir, current, next, base_model, rank,"
                " alpha, created) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                "ttttiitidi", uid, publication->principal, publication->name.name, publication->dir,
                publication->number, publication->number + 1, base_model, publication->facts.rank,
                publication->facts.alpha, claas_clock_unix_ms());
    publication->adapter.id = sqlite3_last_insert_rowid(publication->store->writer.handle);
    return rc < 0 ? rc : 0;
}

/* Compare-and-set, so that a rollback since the check would win. (There is none: storage is one
 * thread. But the rule is here, where it counts.) */
static int move_pointer(const struct publication *publication)
{
    int rc = db_run(&publication->store->writer,
                    "UPDATE adapters SET current = ?, next = ?, rank = ?, alpha = ?"
                    " WHERE id = ? AND current = ?",
                    "iiidii", publication->number, publication->number + 1, publication->facts.rank,
                    publication->facts.alpha, publication->adapter.id, publication->parent);

    if (rc == 0)
        return claas_fail(CLAAS_ERR_CONFLICT, "the current version of '%s' is not %" PRId64,
                          publication->name.name, publication->parent);
    return rc < 0 ? rc : 0;
}

static int insert_version(const struct publication *publication)
{
    const cJSON *first = publication->job_ids ? publication->job_ids->child : NULL;
    bool trained = publication->facts.trained || publication->parent >= 0;
    int rc = db_run(&publication->store->writer,
                    "INSERT INTO versions(adapter, number, parent, job_id, state, trained, moments,"
                    " created, bytes)"
                    " VALUES(?, ?, nullif(?, -1), ?, 'available', ?, ?, ?, ?)",
                    "iiitiiii", publication->adapter.id, publication->number, publication->parent,
                    first ? first->valuestring : NULL, (int64_t)trained,
                    (int64_t)publication->facts.moments, claas_clock_unix_ms(),
                    publication->facts.bytes);

    return rc < 0 ? rc : 0;
}

/* The jobs end as done and their feedback becomes standing feedback of the version. */
static int end_jobs(struct publication *publication)
{
    CLAAS_AUTO(claas_json_free) cJSON *extra = cJSON_CreateObject();
    const cJSON *id;

    claas_json_set_int(extra, "version", publication->number);
    cJSON_ArrayForEach(id, publication->job_ids)
    {
        struct store_job job;
        cJSON *event = NULL;
        int rc = store_find_job(&publication->store->writer, id->valuestring, &job);

        if (rc == 0 && job.ended) /* named twice */
            rc = claas_fail(CLAAS_ERR_INVALID, "job %s is named twice", job.id);
        if (rc == 0)
            rc = store_end_job(publication->store, &job, "done", extra, publication->result,
                               publication->number, &event);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(publication->events, event);
        rc = db_run(&publication->store->writer, "UPDATE feedback SET version = ? WHERE job = ?",
                    "ii", publication->number, job.seq);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int write_catalogue(struct publication *publication)
{
    struct store *store = publication->store;
    int rc = store_begin(store);

    if (rc < 0)
        return rc;
    rc = publication->parent < 0 ? insert_adapter(publication) : move_pointer(publication);
    if (rc == 0)
        rc = insert_version(publication);
    if (rc == 0)
        rc = end_jobs(publication);
    if (rc == 0)
        rc = store_retain_later(store, publication->adapter.id);
    if (rc == 0)
        rc = db_run(&store->writer, "DELETE FROM trash WHERE path = ?", "t", publication->trash);
    at_point(publication, "before commit");
    return store_end(store, rc);
}

static int note_intent(struct publication *publication)
{
    int rc = db_run(&publication->store->writer, "INSERT OR IGNORE INTO trash(path) VALUES(?)", "t",
                    publication->trash);

    return rc < 0 ? rc : 0;
}

/* Undoes the rename; the sentence of the failure that led here stays. */
static void take_back(const struct publication *publication)
{
    char text[1024];

    snprintf(text, sizeof(text), "%s", claas_error_text());
    if (store_settle(publication->store) == 0) {
        if (!path_exists(publication->staged) && path_exists(publication->path))
            adapter_move(publication->path, publication->staged);
        if (!path_exists(publication->path))
            db_run(&publication->store->writer, "DELETE FROM trash WHERE path = ?", "t",
                   publication->trash);
    }
    claas_fail(CLAAS_ERR_INTERNAL, "%s", text);
}

static int publish(struct publication *publication)
{
    int rc = note_intent(publication);

    if (rc < 0)
        return rc;
    at_point(publication, "before rename");
    rc = adapter_move(publication->staged, publication->path);
    at_point(publication, "after rename");
    if (rc == 0)
        rc = write_catalogue(publication);
    if (rc < 0)
        take_back(publication);
    return rc;
}

int store_version_publish(struct store *store, const struct claas_store_request *request,
                          struct claas_store_answer *answer)
{
    CLAAS_AUTO(publication_done)
    struct publication publication = {
        .store = store,
        .principal = request->principal,
        .events = cJSON_CreateArray(),
    };
    int rc = read_publication(request->body, &publication);

    if (rc == 0)
        rc = check_target(&publication);
    if (rc == 0)
        rc = adapter_check_staged(publication.staged, store->staging);
    if (rc == 0)
        rc = adapter_check(publication.staged, publication.parent < 0, &publication.facts);
    if (rc == 0)
        rc = adapter_sync(publication.staged);
    if (rc == 0)
        rc = choose_path(&publication);
    if (rc == 0)
        rc = publish(&publication);
    if (rc < 0) {
        if (publication.staged)
            claas_fail_hide_path(rc, publication.staged, "the new version");
        return claas_fail_hide_path(rc, store->data, "the data directory");
    }
    at_point(&publication, "after commit");
    answer->body = cJSON_CreateObject();
    claas_json_set_int(answer->body, "version", publication.number);
    claas_json_set_string(answer->body, "directory", publication.path);
    claas_json_set(answer->body, "events", CLAAS_TAKE(publication.events));
    answer->jobs_ended = publication.jobs_ended;
    return 0;
}
