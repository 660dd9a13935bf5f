/* Answers kept for feedback: exactly what was sampled, so that exactly that is trained. Found again
 * by the response's id, or, as the Python system did it, by the text that a person saw. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/visible_text.h"
#include "store_sqlite.h"

#define CHOICE_MAX 15

struct rollout {
    int64_t seq;
    const char *principal;
    char lora_id[CLAAS_LORA_NAME_BYTES]; /* "" = base */
};

/* --- writing --------------------------------------------------------------------------- */

static int check_ids(const struct claas_store_blob *blob, const char *what)
{
    const unsigned char *bytes = blob->data;

    if (blob->length % sizeof(int32_t) != 0)
        return claas_fail(CLAAS_ERR_INVALID, "%s: no array of int32", what);
    for (size_t i = 0; i < blob->length; i += sizeof(int32_t)) {
        int32_t id;

        memcpy(&id, bytes + i, sizeof(id));
        if (id < 0)
            return claas_fail(CLAAS_ERR_INVALID, "%s: negative token id", what);
    }
    return 0;
}

static int check_logprobs(const struct claas_store_blob *blob, size_t response_bytes)
{
    const unsigned char *bytes = blob->data;

    if (blob->length != response_bytes)
        return claas_fail(CLAAS_ERR_INVALID, "log-probs: one float32 per response id expected");
    for (size_t i = 0; i < blob->length; i += sizeof(float)) {
        float value;

        memcpy(&value, bytes + i, sizeof(value));
        if (!isfinite(value))
            return claas_fail(CLAAS_ERR_INVALID, "log-probs: not finite");
    }
    return 0;
}

static int put_choice(struct store *store, const struct rollout *rollout, const cJSON *choice,
                      const struct claas_store_blob *blobs)
{
    CLAAS_AUTO_FREE char *normalized = NULL;
    const char *text = "", *raw = NULL, *finish = "stop";
    int64_t index = -1;
    uint8_t hash[32];
    int rc = store_need_int(choice, "index", 0, CHOICE_MAX, &index);

    if (rc == 0)
        rc = claas_json_get_string(choice, "text", &text);
    if (rc >= 0)
        rc = claas_json_get_string(choice, "raw", &raw);
    if (rc >= 0)
        rc = claas_json_get_string(choice, "finish_reason", &finish);
    if (rc >= 0)
        rc = check_ids(&blobs[0], "prompt ids");
    if (rc >= 0)
        rc = check_ids(&blobs[1], "response ids");
    if (rc >= 0)
        rc = check_logprobs(&blobs[2], blobs[1].length);
    if (rc < 0)
        return rc;
    normalized = claas_normalized_text(text);
    if (!normalized)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    store_hash(normalized, strlen(normalized), hash);
    rc = db_run(&store->writer,
                "INSERT INTO rollout_choices(rollout, choice, principal, lora_id, hash, text, raw,"
                " finish_reason, prompt_ids, response_ids, logprobs)"
                " VALUES(?,?,?,?,?,?,?,?,?,?,?)",
                "iittbtttbbb", rollout->seq, index, rollout->principal, rollout->lora_id, hash,
                sizeof(hash), text, raw ? raw : text, finish, blobs[0].data, blobs[0].length,
                blobs[1].data, blobs[1].length, blobs[2].data, blobs[2].length);
    return rc < 0 ? rc : 0;
}

/* The canonical name, "" for the base model. */
static int read_adapter_name(const cJSON *body, char name[CLAAS_LORA_NAME_BYTES])
{
    struct claas_lora_name parsed;
    const char *asked = NULL;
    int rc = claas_json_get_string(body, "lora_id", &asked);

    name[0] = '\0';
    if (rc <= 0 || asked[0] == '\0')
        return rc < 0 ? rc : 0;
    rc = claas_lora_name_parse(asked, &parsed);
    if (rc == 0)
        snprintf(name, CLAAS_LORA_NAME_BYTES, "%s", parsed.name);
    return rc;
}

static int check_new_id(struct store *store, const char *principal, const char *id)
{
    int64_t ignored;
    int rc = db_get_int(&store->writer, &ignored,
                        "SELECT seq FROM rollouts WHERE principal = ? AND response_id = ?", "tt",
                        principal, id);

    return rc > 0 ? claas_fail(CLAAS_ERR_EXISTS, "response '%s' is stored already", id) : rc;
}

static int put_rollout(struct store *store, const struct claas_store_request *request,
                       const char *id, struct rollout *rollout)
{
    CLAAS_AUTO_FREE char *messages = NULL;
    CLAAS_AUTO_FREE char *sampling = NULL;
    const cJSON *body = request->body, *list = NULL, *object = NULL;
    const char *prompt = NULL;
    int64_t version = -1;
    uint8_t conversation[32] = {0};
    int rc = claas_json_get_array(body, "messages", &list);

    if (rc >= 0)
        rc = claas_json_get_string(body, "prompt", &prompt);
    if (rc >= 0)
        rc = claas_json_get_object(body, "sampling", &object);
    if (rc >= 0)
        rc = claas_json_get_int(body, "version", 0, 1000000000, &version);
    if (rc >= 0 && !list && !prompt)
        rc = claas_fail(CLAAS_ERR_INVALID, "messages or prompt expected");
    if (rc >= 0 && list)
        rc = store_print(list, &messages);
    if (rc >= 0 && object)
        rc = store_print(object, &sampling);
    if (rc < 0)
        return rc;
    if (messages)
        store_hash(messages, strlen(messages), conversation);
    /* nullif: -1 stands for no version, a hash of nothing for no conversation */
    rc = db_run(&store->writer,
                "INSERT INTO rollouts(principal, response_id, lora_id, version, messages, prompt,"
                " conversation, sampling, created)"
                " VALUES(?1, ?2, ?3, nullif(?4, -1), ?5, ?6, iif(?5 IS NULL, NULL, ?7), ?8, ?9)",
                "tttittbti", request->principal, id, rollout->lora_id, version, messages, prompt,
                conversation, sizeof(conversation), sampling ? sampling : "{}",
                claas_clock_unix_ms());
    rollout->seq = sqlite3_last_insert_rowid(store->writer.handle);
    return rc < 0 ? rc : 0;
}

int store_rollout_put(struct store *store, const struct claas_store_request *request,
                      struct claas_store_answer *answer)
{
    struct rollout rollout = {.principal = request->principal};
    const cJSON *choices = NULL, *choice;
    const char *id = NULL;
    size_t at = 0;
    int rc = store_need_text(request->body, "id", &id);

    if (rc == 0)
        rc = store_need_array(request->body, "choices", &choices);
    if (rc == 0)
        rc = read_adapter_name(request->body, rollout.lora_id);
    if (rc == 0 && request->blob_count != 3 * (size_t)cJSON_GetArraySize(choices))
        rc = claas_fail(CLAAS_ERR_INVALID, "three attachments per choice expected");
    if (rc == 0)
        rc = check_new_id(store, request->principal, id);
    if (rc == 0)
        rc = put_rollout(store, request, id, &rollout);
    if (rc < 0)
        return rc;
    cJSON_ArrayForEach(choice, choices)
    {
        rc = put_choice(store, &rollout, choice, &request->blobs[at]);
        if (rc < 0)
            return rc;
        at += 3;
    }
    answer->body = cJSON_CreateObject();
    return 0;
}

/* --- finding --------------------------------------------------------------------------- */

static int find_by_id(struct db *db, const char *principal, const char *lora_id, const char *id,
                      int64_t index, struct store_choice *ret)
{
    int64_t seq = 0, choices = 0;
    int rc = db_get_int(db, &seq,
                        "SELECT seq FROM rollouts WHERE principal = ? AND response_id = ?"
                        " AND lora_id IN (?, '')",
                        "ttt", principal, id, lora_id);

    if (rc < 0)
        return rc;
    if (rc == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "No completion with response_id '%s' for LoRA '%s'",
                          id, lora_id);
    rc = db_get_int(db, &choices,
                    "SELECT count(*) FROM rollout_choices WHERE rollout = ? AND choice = ?", "ii",
                    seq, index);
    if (rc < 0)
        return rc;
    if (choices == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "response '%s' has no choice %d", id, (int)index);
    *ret = (struct store_choice){seq, index};
    return 0;
}

/* Newest first; what the adapter itself said goes before what the base model said. */
static int find_by_text(struct db *db, const char *principal, const char *lora_id,
                        const char *response, struct store_choice *ret)
{
    CLAAS_AUTO_FREE char *normalized = claas_normalized_text(response);
    const char *const sources[] = {lora_id, ""};
    uint8_t hash[32];

    if (!normalized)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    store_hash(normalized, strlen(normalized), hash);
    for (size_t i = 0; i < CLAAS_COUNT(sources); i++) {
        DB_STATEMENT *statement = NULL;
        int rc = db_query(db, &statement,
                          "SELECT rollout, choice FROM rollout_choices"
                          " WHERE principal = ? AND hash = ? AND lora_id = ?"
                          " ORDER BY rollout DESC, choice LIMIT 1",
                          "tbt", principal, hash, sizeof(hash), sources[i]);

        if (rc == 0)
            rc = db_step(db, statement);
        if (rc < 0)
            return rc;
        if (rc > 0) {
            *ret = (struct store_choice){db_int(statement, 0), db_int(statement, 1)};
            return 0;
        }
    }
    return claas_fail(CLAAS_ERR_NOT_FOUND,
                      "No cached completion for content_hash=%02x%02x%02x%02x%02x%02x%02x%02x…",
                      hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]);
}

int store_find_choice(struct db *db, const char *principal, const char *lora_id,
                      const cJSON *request, struct store_choice *ret)
{
    const char *id = NULL, *response = NULL;
    int64_t index = 0;
    int rc = claas_json_get_string(request, "response_id", &id);

    if (rc >= 0)
        rc = claas_json_get_string(request, "response", &response);
    if (rc >= 0)
        rc = claas_json_get_int(request, "choice", 0, CHOICE_MAX, &index);
    if (rc < 0)
        return rc;
    if (id && id[0])
        return find_by_id(db, principal, lora_id, id, index, ret);
    if (response)
        return find_by_text(db, principal, lora_id, response, ret);
    return claas_fail(CLAAS_ERR_INVALID, "each request needs a response_id or the response's text");
}
