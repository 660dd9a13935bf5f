/* Feedback and its job, one transaction: when it is answered, both are on disk. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "claas/visible_text.h"
#include "store_sqlite.h"

#define JOB_ID_BYTES      8
#define FEEDBACK_ID_BYTES 6

struct put {
    const cJSON *requests;
    const cJSON *training; /* NULL: the default cycle */
    const char *key;       /* idempotency, NULL without */
    uint8_t hash[32];      /* of requests and training */
    struct store_adapter adapter;
    struct store_choice choices[STORE_ITEMS_MAX];
    struct store_job job;
};

/* The same key with the same hash is the same request sent again. */
static int hash_body(struct put *put)
{
    CLAAS_AUTO_FREE char *requests = NULL;
    CLAAS_AUTO_FREE char *training = NULL;
    CLAAS_AUTO_FREE char *both = NULL;
    int rc = store_print(put->requests, &requests);

    if (rc == 0 && put->training)
        rc = store_print(put->training, &training);
    if (rc < 0)
        return rc;
    both = claas_format("%s %s", requests, training ? training : "");
    if (!both)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    store_hash(both, strlen(both), put->hash);
    return 0;
}

static int read_put(const cJSON *body, struct put *put)
{
    int rc = store_need_array(body, "requests", &put->requests);
    int count;

    if (rc == 0)
        rc = claas_json_get_object(body, "training", &put->training);
    if (rc >= 0)
        rc = claas_json_get_string(body, "idempotency_key", &put->key);
    if (rc < 0)
        return rc;
    count = cJSON_GetArraySize(put->requests);
    if (count < 1 || count > STORE_ITEMS_MAX)
        return claas_fail(CLAAS_ERR_INVALID, "requests: %d items, 1 to %d are allowed", count,
                          STORE_ITEMS_MAX);
    return hash_body(put);
}

static int put_answer(struct claas_store_answer *answer, const char *job_id, const char *lora_id,
                      bool duplicate, cJSON *event)
{
    answer->body = cJSON_CreateObject();
    claas_json_set_string(answer->body, "job_id", job_id);
    claas_json_set_string(answer->body, "lora_id", lora_id);
    claas_json_set_bool(answer->body, "duplicate", duplicate);
    claas_json_set(answer->body, "event", event);
    return 0;
}

/* 1 and the earlier job's answer when the idempotency key is known, 0 when it is new or absent. */
static int answer_known_key(struct store *store, const char *principal, const struct put *put,
                            struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    cJSON *event = NULL;
    int rc;

    if (!put->key)
        return 0;
    rc = db_query(&store->writer, &statement,
                  "SELECT job_id, lora_id, body_hash FROM jobs"
                  " WHERE principal = ? AND idempotency_key = ?",
                  "tt", principal, put->key);
    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc <= 0)
        return rc;
    if (sqlite3_column_bytes(statement, 2) != sizeof(put->hash) ||
        memcmp(sqlite3_column_blob(statement, 2), put->hash, sizeof(put->hash)) != 0)
        return claas_fail(CLAAS_ERR_CONFLICT,
                          "Idempotency-Key '%.100s' was used for another request", put->key);
    rc = store_first_event(&store->writer, db_text(statement, 0), &event);
    if (rc < 0)
        return rc;
    put_answer(answer, db_text(statement, 0), db_text(statement, 1), true, event);
    return 1;
}

static bool is_blank(const char *text)
{
    size_t space;

    while ((space = claas_space_length(text)) > 0)
        text += space;
    return text[0] == '\0';
}

static int check_request(const cJSON *request, int index, const char **lora_id)
{
    const char *feedback = NULL;
    int rc = store_need_text(request, "lora_id", lora_id);

    if (rc == 0)
        rc = store_need_text(request, "feedback", &feedback);
    if (rc == 0 && is_blank(feedback))
        rc = claas_fail(CLAAS_ERR_INVALID, "'feedback' must say something");
    return rc < 0 ? claas_fail_context(rc, "requests[%d]: ", index) : 0;
}

/* One adapter for all, known, and each item's answer found. */
static int resolve(struct store *store, const char *principal, struct put *put)
{
    struct claas_lora_name first = {0}, name;
    const char *lora_id = NULL;
    const cJSON *request;
    int index = 0, rc;

    cJSON_ArrayForEach(request, put->requests)
    {
        rc = check_request(request, index, &lora_id);
        if (rc == 0)
            rc = claas_lora_name_parse(lora_id, index == 0 ? &first : &name);
        if (rc < 0)
            return rc;
        if (index > 0 && strcmp(first.name, name.name) != 0)
            return claas_fail(CLAAS_ERR_INVALID, "all requests must use the same lora_id");
        index++;
    }
    rc = store_find_adapter(&store->writer, principal, lora_id, &put->adapter, NULL);
    index = 0;
    cJSON_ArrayForEach(request, put->requests)
    {
        if (rc == 0)
            rc = store_find_choice(&store->writer, principal, put->adapter.name, request,
                                   &put->choices[index++]);
    }
    return rc;
}

static int insert_job(struct store *store, const char *principal, struct put *put)
{
    CLAAS_AUTO_FREE char *training = NULL;
    char hex[2 * JOB_ID_BYTES + 1];
    int64_t now = claas_clock_unix_ms();
    int rc = put->training ? store_print(put->training, &training) : 0;

    if (rc < 0)
        return rc;
    claas_random_hex(hex, JOB_ID_BYTES);
    snprintf(put->job.id, sizeof(put->job.id), "job-%s", hex);
    snprintf(put->job.lora_id, sizeof(put->job.lora_id), "%s", put->adapter.name);
    rc = db_run(&store->writer,
                "INSERT INTO jobs(job_id, principal, adapter, lora_id, state, training,"
                " idempotency_key, body_hash, created, updated)"
                " VALUES(?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                "ttitttbii", put->job.id, principal, put->adapter.id, put->adapter.name, training,
                put->key, put->hash, sizeof(put->hash), now, now);
    put->job.seq = sqlite3_last_insert_rowid(store->writer.handle);
    store->unfinished++;
    return rc < 0 ? rc : 0;
}

static int insert_item(struct store *store, const char *principal, const struct put *put,
                       const cJSON *request, const struct store_choice *choice)
{
    const char *text = "", *prompt = NULL;
    char hex[2 * FEEDBACK_ID_BYTES + 1], id[sizeof(hex) + 3];
    int rc = claas_json_get_string(request, "feedback", &text);

    if (rc >= 0)
        rc = claas_json_get_string(request, "prompt", &prompt);
    if (rc < 0)
        return rc;
    claas_random_hex(hex, FEEDBACK_ID_BYTES);
    snprintf(id, sizeof(id), "fb-%s", hex);
    rc = db_run(&store->writer,
                "INSERT INTO feedback(id, job, adapter, principal, rollout, choice, text, prompt,"
                " created) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
                "tiitiitti", id, put->job.seq, put->adapter.id, principal, choice->rollout,
                choice->index, text, prompt, claas_clock_unix_ms());
    if (rc >= 0)
        rc = db_run(&store->writer, "UPDATE rollouts SET kept = 1 WHERE seq = ? AND kept = 0", "i",
                    choice->rollout);
    return rc < 0 ? rc : 0;
}

int store_feedback_put(struct store *store, const struct claas_store_request *request,
                       struct claas_store_answer *answer)
{
    struct put put = {0};
    const cJSON *item;
    cJSON *event = NULL;
    int index = 0;
    int rc = read_put(request->body, &put);

    if (rc == 0)
        rc = answer_known_key(store, request->principal, &put, answer);
    if (rc != 0)
        return rc < 0 ? rc : 0;
    if (store->unfinished >= store->options.queue_max)
        return claas_fail(CLAAS_ERR_OVERLOADED,
                          "%" PRId64 " jobs are waiting, that is the limit: try again later",
                          store->unfinished);
    rc = resolve(store, request->principal, &put);
    if (rc == 0)
        rc = insert_job(store, request->principal, &put);
    if (rc < 0)
        return rc;
    cJSON_ArrayForEach(item, put.requests)
    {
        rc = insert_item(store, request->principal, &put, item, &put.choices[index++]);
        if (rc < 0)
            return rc;
    }
    rc = store_add_event(store, &put.job, "queued", NULL, &event);
    if (rc < 0)
        return rc;
    return put_answer(answer, put.job.id, put.adapter.name, false, event);
}
