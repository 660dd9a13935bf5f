/* What a learning cycle starts from: the new feedback with its exact answers, earlier feedback for
 * replay, the standing feedback, recent conversations; and whether that still stands. And the
 * standing feedback for a person to see and withdraw.
 *
 * The list of a version is its own new feedback and that of its ancestors (`chain`), less what was
 * withdrawn: a rollback brings back the list of its version without anything being copied, and
 * withdrawn feedback stays withdrawn. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "store_sqlite.h"

/* All of the input goes into one message, CYCLE_BEGIN, which holds 64 MiB with its attachments: so
 * all of it is counted, at its length in JSON. The new items have to fit; standing feedback is
 * added up to the same limit; conversations that only keep them company (replay, recent) stop
 * earlier. What is left out is the oldest. The rest of the 64 MiB is for keys and brackets. */
#define INPUT_BYTES_MAX   ((size_t)56 << 20)
#define COMPANY_BYTES_MAX ((size_t)32 << 20)
#define RECENT_BYTES_MAX  ((int64_t)256 << 10) /* longer ones make no rows of a cycle */
#define RECENT_SCAN       256                  /* answers looked at for distinct conversations */

/* ?1 adapter, ?2 version: the version and its ancestors; depth is the age in versions. */
#define CHAIN                                                                                      \
    "WITH RECURSIVE chain(number, parent, depth) AS ("                                             \
    " SELECT number, parent, 0 FROM versions WHERE adapter = ?1 AND number = ?2"                   \
    " UNION ALL SELECT v.number, v.parent, depth + 1 FROM chain c"                                 \
    " JOIN versions v ON v.adapter = ?1 AND v.number = c.parent) "
#define ITEM_COLUMNS                                                                               \
    "SELECT f.id, j.job_id, f.text, f.prompt, r.messages, r.prompt, c.text, c.finish_reason,"      \
    " r.version, c.prompt_ids, c.response_ids, c.logprobs "
#define ITEM_JOINS                                                                                 \
    " JOIN jobs j ON j.seq = f.job JOIN rollouts r ON r.seq = f.rollout"                           \
    " JOIN rollout_choices c ON c.rollout = f.rollout AND c.choice = f.choice "

struct input {
    struct store *store;
    const struct claas_store_request *request;
    struct claas_store_answer *answer;
    struct store_adapter adapter;
    size_t bytes; /* of texts and arrays so far */
};

/* --- items ----------------------------------------------------------------------------- */

/* The most that a text takes in JSON, without its quotes. */
static size_t string_bytes(const char *text)
{
    size_t bytes = 0;

    for (; *text; text++) {
        bool plain = (unsigned char)*text >= 0x20;

        bytes += plain ? 1 + (*text == '"' || *text == '\\') : strlen("\\u0000");
    }
    return bytes;
}

/* Reserves `bytes` of the message; false when that would go beyond `limit`. */
static bool take_room(struct input *input, size_t bytes, size_t limit)
{
    if (input->bytes + bytes > limit)
        return false;
    input->bytes += bytes;
    return true;
}

/* What an item takes of the message. */
static size_t row_bytes(sqlite3_stmt *row)
{
    static const int texts[] = {2, 3, 5, 6}, plain[] = {4, 9, 10, 11};
    size_t bytes = 0;

    for (size_t i = 0; i < CLAAS_COUNT(texts); i++)
        if (!db_is_null(row, texts[i]))
            bytes += string_bytes(db_text(row, texts[i]));
    for (size_t i = 0; i < CLAAS_COUNT(plain); i++)
        bytes += (size_t)sqlite3_column_bytes(row, plain[i]);
    return bytes;
}

static int attach(struct claas_store_answer *answer, sqlite3_stmt *row, int column)
{
    size_t length = (size_t)sqlite3_column_bytes(row, column);
    struct claas_store_blob *grown;
    void *copy = claas_alloc(length + 1, 1);

    if (!copy)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    grown = claas_realloc(answer->blobs, answer->blob_count + 1, sizeof(*grown));
    if (!grown) {
        free(copy);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    if (length > 0)
        memcpy(copy, sqlite3_column_blob(row, column), length);
    answer->blobs = grown;
    answer->blobs[answer->blob_count++] = (struct claas_store_blob){copy, length};
    return 0;
}

/* A text completion is shown to the teacher as a conversation of one turn. */
static int set_messages(cJSON *item, sqlite3_stmt *row)
{
    cJSON *list, *turn;

    if (!db_is_null(row, 4))
        return store_set_json(item, "messages", row, 4);
    list = claas_json_set(item, "messages", cJSON_CreateArray());
    turn = cJSON_CreateObject();
    claas_json_set_string(turn, "role", "user");
    store_set_text(turn, "content", row, 5);
    cJSON_AddItemToArray(list, turn);
    return 0;
}

static int item_row(struct input *input, sqlite3_stmt *row, cJSON **ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *item = cJSON_CreateObject();
    int rc = 0;

    store_set_text(item, "feedback_id", row, 0);
    store_set_text(item, "job_id", row, 1);
    store_set_text(item, "feedback", row, 2);
    if (!db_is_null(row, 3))
        store_set_text(item, "prompt", row, 3);
    rc = set_messages(item, row);
    store_set_text(item, "response", row, 6);
    store_set_text(item, "finish_reason", row, 7);
    store_set_int(item, "version", row, 8);
    claas_json_set_int(item, "attachments", (int64_t)input->answer->blob_count);
    for (int column = 9; rc == 0 && column <= 11; column++)
        rc = attach(input->answer, row, column);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(item);
    return 0;
}

static int add_job_items(struct input *input, const struct store_job *job, cJSON *list)
{
    struct db *db = &input->store->reader;
    DB_STATEMENT *statement = NULL;
    int rc = db_query(db, &statement,
                      ITEM_COLUMNS "FROM feedback f" ITEM_JOINS "WHERE f.job = ? ORDER BY f.seq",
                      "i", job->seq);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *item = NULL;

        if (cJSON_GetArraySize(list) == STORE_ITEMS_MAX)
            return claas_fail(CLAAS_ERR_LIMIT, "the jobs have more than %d items together",
                              STORE_ITEMS_MAX);
        if (!take_room(input, row_bytes(statement), INPUT_BYTES_MAX))
            return claas_fail(CLAAS_ERR_TOO_LARGE,
                              "the jobs' conversations are too large together");
        rc = item_row(input, statement, &item);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(list, item);
    }
    return rc;
}

static int add_items(struct input *input)
{
    cJSON *list = claas_json_set(input->answer->body, "items", cJSON_CreateArray());
    const cJSON *ids = NULL, *id;
    int rc = store_need_array(input->request->body, "job_ids", &ids);

    if (rc < 0)
        return rc;
    cJSON_ArrayForEach(id, ids)
    {
        struct store_job job;

        if (!cJSON_IsString(id))
            return claas_fail(CLAAS_ERR_INVALID, "job_ids must be strings");
        rc = store_find_job(&input->store->reader, id->valuestring, &job);
        if (rc < 0)
            return rc;
        if (strcmp(job.principal, input->request->principal) != 0)
            return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: %.100s", id->valuestring);
        if (job.ended)
            return claas_fail(CLAAS_ERR_CONFLICT, "job %s has ended: %s", job.id, job.state);
        if (job.adapter != input->adapter.id)
            return claas_fail(CLAAS_ERR_CONFLICT, "job %s is about another adapter than '%s'",
                              job.id, input->adapter.name);
        rc = add_job_items(input, &job, list);
        if (rc < 0)
            return rc;
    }
    if (cJSON_GetArraySize(list) == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "the jobs have no items left to learn from");
    return 0;
}

static int add_replay(struct input *input)
{
    const struct claas_store_options *options = &input->store->options;
    cJSON *list = claas_json_set(input->answer->body, "replay", cJSON_CreateArray());
    struct db *db = &input->store->reader;
    DB_STATEMENT *statement = NULL;
    int64_t limit =
        options->replay_items < STORE_REPLAY_MAX ? options->replay_items : STORE_REPLAY_MAX;
    int rc = db_query(
        db, &statement,
        CHAIN ITEM_COLUMNS
        "FROM chain JOIN feedback f ON f.adapter = ?1 AND f.version = chain.number" ITEM_JOINS
        "WHERE chain.depth < ?3 AND f.withdrawn IS NULL"
        " ORDER BY f.seq DESC LIMIT ?4",
        "iiii", input->adapter.id, input->adapter.current, options->replay_age, limit);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *item = NULL;

        if (!take_room(input, row_bytes(statement), COMPANY_BYTES_MAX))
            return 0;
        rc = item_row(input, statement, &item);
        if (rc < 0)
            return rc;
        cJSON_AddItemToArray(list, item);
    }
    return rc;
}

/* The newest ones, each text once, in the order in which they were said. */
static int add_standing(struct input *input)
{
    cJSON *list = claas_json_set(input->answer->body, "standing", cJSON_CreateArray());
    struct db *db = &input->store->reader;
    DB_STATEMENT *statement = NULL;
    int rc =
        db_query(db, &statement,
                 CHAIN "SELECT f.id, f.text, max(f.seq) FROM chain"
                       " JOIN feedback f ON f.adapter = ?1 AND f.version = chain.number"
                       " WHERE f.withdrawn IS NULL GROUP BY f.text ORDER BY 3 DESC LIMIT ?3",
                 "iii", input->adapter.id, input->adapter.current, (int64_t)STORE_STANDING_MAX);

    if (rc < 0)
        return rc;
    while ((rc = db_step(db, statement)) > 0) {
        cJSON *item;

        if (!take_room(input, string_bytes(db_text(statement, 1)), INPUT_BYTES_MAX))
            return 0;
        item = cJSON_CreateObject();
        store_set_text(item, "id", statement, 0);
        store_set_text(item, "text", statement, 1);
        cJSON_InsertItemInArray(list, 0, item);
    }
    return rc;
}

/* Conversations with this adapter about which nobody complained, each once. */
static int add_recent(struct input *input)
{
    cJSON *list = claas_json_set(input->answer->body, "recent", cJSON_CreateArray());
    struct db *db = &input->store->reader;
    uint8_t seen[STORE_RECENT_MAX][32];
    DB_STATEMENT *statement = NULL;
    int count = 0;
    int rc = db_query(db, &statement,
                      "SELECT messages, conversation FROM rollouts r"
                      " WHERE principal = ?1 AND lora_id = ?2 AND kept = 0"
                      " AND length(CAST(messages AS BLOB)) <= ?4"
                      " AND NOT EXISTS (SELECT 1 FROM rollouts k WHERE k.principal = ?1"
                      "  AND k.conversation = r.conversation AND k.kept = 1)"
                      " ORDER BY seq DESC LIMIT ?3",
                      "ttii", input->request->principal, input->adapter.name, (int64_t)RECENT_SCAN,
                      RECENT_BYTES_MAX);

    if (rc < 0)
        return rc;
    while (count < STORE_RECENT_MAX && (rc = db_step(db, statement)) > 0) {
        const void *hash = sqlite3_column_blob(statement, 1);
        cJSON *messages = NULL;
        bool known = sqlite3_column_bytes(statement, 1) != sizeof(seen[0]);

        for (int i = 0; !known && i < count; i++)
            known = memcmp(seen[i], hash, sizeof(seen[0])) == 0;
        if (known)
            continue;
        if (!take_room(input, (size_t)sqlite3_column_bytes(statement, 0), COMPANY_BYTES_MAX))
            return 0;
        rc = store_parse(db_text(statement, 0), &messages);
        if (rc < 0)
            return rc;
        memcpy(seen[count++], hash, sizeof(seen[0]));
        cJSON_AddItemToArray(list, messages);
    }
    return rc < 0 ? rc : 0;
}

/* Only grows, so that an equal count means that nothing was withdrawn in between. */
static int count_withdrawn(struct store *store, const struct store_adapter *adapter, int64_t *ret)
{
    int rc = db_get_int(&store->reader, ret,
                        "SELECT count(*) FROM feedback WHERE adapter = ? AND withdrawn IS NOT NULL",
                        "i", adapter->id);

    return rc < 0 ? rc : 0;
}

/* A lost version may be restored or rolled back, and its feedback was acknowledged: so that is
 * UNAVAILABLE, and the jobs wait. */
static int check_parent(const struct input *input)
{
    bool trained;
    int rc = store_check_available(&input->store->reader, &input->adapter, input->adapter.current,
                                   &trained);

    return rc == CLAAS_ERR_CORRUPT ? claas_fail(CLAAS_ERR_UNAVAILABLE, "%s", claas_error_text())
                                   : rc;
}

int store_cycle_input(struct store *store, const struct claas_store_request *request,
                      struct claas_store_answer *answer)
{
    struct input input = {.store = store, .request = request, .answer = answer};
    CLAAS_AUTO_FREE char *path = NULL;
    const char *asked = NULL;
    int64_t withdrawn = 0;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = store_find_adapter(&store->reader, request->principal, asked, &input.adapter, NULL);
    if (rc == 0)
        rc = check_parent(&input);
    if (rc == 0)
        rc = count_withdrawn(store, &input.adapter, &withdrawn);
    if (rc < 0)
        return rc;
    path = store_version_path(store, input.adapter.dir, input.adapter.current, false);
    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    answer->body = cJSON_CreateObject();
    claas_json_set_int(answer->body, "version", input.adapter.current);
    claas_json_set_string(answer->body, "directory", path);
    claas_json_set_string(answer->body, "staging", store->staging);
    claas_json_set_int(answer->body, "withdrawn", withdrawn);
    rc = add_items(&input);
    if (rc == 0)
        rc = add_standing(&input);
    if (rc == 0)
        rc = add_recent(&input);
    if (rc == 0)
        rc = add_replay(&input);
    return rc;
}

int store_cycle_check(struct store *store, const struct claas_store_request *request,
                      struct claas_store_answer *answer)
{
    struct store_adapter adapter;
    const char *asked = NULL;
    int64_t version = 0, withdrawn = 0, count = 0;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = store_need_int(request->body, "version", 0, 1000000000, &version);
    if (rc == 0)
        rc = store_need_int(request->body, "withdrawn", 0, (int64_t)1 << 53, &withdrawn);
    if (rc == 0)
        rc = store_find_adapter(&store->reader, request->principal, asked, &adapter, NULL);
    if (rc == 0)
        rc = count_withdrawn(store, &adapter, &count);
    if (rc < 0)
        return rc;
    if (adapter.current != version)
        return claas_fail(CLAAS_ERR_CONFLICT,
                          "the current version of '%s' is %" PRId64 ", not %" PRId64, adapter.name,
                          adapter.current, version);
    if (count != withdrawn)
        return claas_fail(CLAAS_ERR_CONFLICT, "feedback of '%s' was withdrawn", adapter.name);
    answer->body = cJSON_CreateObject();
    return 0;
}

/* --- standing feedback ----------------------------------------------------------------- */

int store_standing_list(struct store *store, const struct claas_store_request *request,
                        struct claas_store_answer *answer)
{
    DB_STATEMENT *statement = NULL;
    struct store_adapter adapter;
    const char *asked = NULL;
    cJSON *list;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = store_find_adapter(&store->reader, request->principal, asked, &adapter, NULL);
    if (rc == 0)
        rc = db_query(&store->reader, &statement,
                      CHAIN "SELECT f.id, f.text, f.created, j.job_id, f.version FROM chain"
                            " JOIN feedback f ON f.adapter = ?1 AND f.version = chain.number"
                            " JOIN jobs j ON j.seq = f.job WHERE f.withdrawn IS NULL"
                            " ORDER BY f.seq LIMIT 10000",
                      "ii", adapter.id, adapter.current);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set_string(answer->body, "lora_id", adapter.name);
    list = claas_json_set(answer->body, "feedback", cJSON_CreateArray());
    while ((rc = db_step(&store->reader, statement)) > 0) {
        cJSON *item = cJSON_CreateObject();

        store_set_text(item, "id", statement, 0);
        store_set_text(item, "text", statement, 1);
        store_set_int(item, "created", statement, 2);
        store_set_text(item, "job_id", statement, 3);
        store_set_int(item, "version", statement, 4);
        cJSON_AddItemToArray(list, item);
    }
    return rc;
}

static int withdraw_all(struct store *store, const struct store_adapter *adapter)
{
    return db_run(&store->writer,
                  CHAIN "UPDATE feedback SET withdrawn = ?3 WHERE adapter = ?1"
                        " AND withdrawn IS NULL AND version IN (SELECT number FROM chain)",
                  "iii", adapter->id, adapter->current, claas_clock_unix_ms());
}

/* Of any version, not only of the current one's ancestors: a later rollback shall not bring it
 * back. */
static int withdraw_one(struct store *store, const struct store_adapter *adapter, const char *id)
{
    DB_STATEMENT *statement = NULL;
    bool learned, gone;
    int rc = db_query(&store->writer, &statement,
                      "SELECT f.version NOT NULL, f.withdrawn NOT NULL, j.job_id, j.ended"
                      " FROM feedback f JOIN jobs j ON j.seq = f.job"
                      " WHERE f.id = ? AND f.adapter = ?",
                      "ti", id, adapter->id);

    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc < 0)
        return rc;
    learned = rc > 0 && db_int(statement, 0);
    gone = rc > 0 && db_int(statement, 1);
    if (rc > 0 && !learned && !db_int(statement, 3))
        return claas_fail(CLAAS_ERR_CONFLICT,
                          "feedback '%.64s' is not learned yet: cancel its job %s instead", id,
                          db_text(statement, 2));
    if (!learned)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "'%s' has no standing feedback '%.64s'",
                          adapter->name, id);
    if (gone)
        return 0;
    return db_run(&store->writer, "UPDATE feedback SET withdrawn = ? WHERE id = ?", "it",
                  claas_clock_unix_ms(), id);
}

int store_standing_withdraw(struct store *store, const struct claas_store_request *request,
                            struct claas_store_answer *answer)
{
    struct store_adapter adapter;
    const char *asked = NULL, *id = NULL;
    int rc = store_need_text(request->body, "lora_id", &asked);

    if (rc == 0)
        rc = claas_json_get_string(request->body, "id", &id);
    if (rc >= 0)
        rc = store_find_adapter(&store->writer, request->principal, asked, &adapter, NULL);
    if (rc == 0)
        rc = id ? withdraw_one(store, &adapter, id) : withdraw_all(store, &adapter);
    if (rc < 0)
        return rc;
    answer->body = cJSON_CreateObject();
    claas_json_set_int(answer->body, "withdrawn", rc);
    return 0;
}
