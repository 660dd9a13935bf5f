/* What tests of the store share: a data directory, staged adapters, operations written as JSON
 * text. */
#ifndef STORAGE_FIXTURE_H
#define STORAGE_FIXTURE_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "store.h"

/* A new directory below TMPDIR; removed by fixture_remove. */
static inline char *fixture_directory(void)
{
    const char *root = getenv("TMPDIR");
    char *path = claas_format("%s/claas-store-XXXXXX", root ? root : P_tmpdir);

    if (!path || !mkdtemp(path))
        abort();
    return path;
}

static inline void fixture_remove(char **path)
{
    if (*path)
        claas_remove_all(*path);
    free(*path);
    *path = NULL;
}

static inline struct claas_store_options fixture_options(const char *data)
{
    return (struct claas_store_options){
        .data = data,
        .queue_max = 1000000,
        .replay_items = 64,
        .replay_age = 50,
        .keep_versions = 50,
        .keep_moments = 2,
        .keep_rollouts = 100000,
        .keep_rollouts_ms = INT64_C(30) * 86400 * 1000,
        .keep_jobs = 10000,
    };
}

/* One lora_B tensor of four float32: `value` 0 is an untrained adapter. */
static inline void fixture_safetensors(const char *path, const char *name, float value)
{
    char header[256];
    unsigned char file[512] = {0};
    float values[4] = {value, value, value, value};
    int length =
        snprintf(header, sizeof(header),
                 "{\"%s\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", name);

    file[0] = (unsigned char)length;
    memcpy(file + 8, header, (size_t)length);
    memcpy(file + 8 + length, values, sizeof(values));
    if (claas_file_write(path, file, 8 + (size_t)length + sizeof(values)) < 0)
        abort();
}

/* DATA/staging/NAME with the three files; its path, free with free(). */
static inline char *fixture_stage(const char *data, const char *name, float value, bool moments)
{
    static const char config[] =
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"base_model_name_or_path\":\"tiny\"}";
    char *directory = claas_format("%s/staging/%s", data, name);
    CLAAS_AUTO_FREE char *path = NULL;
    CLAAS_AUTO_FREE char *weights = NULL;
    CLAAS_AUTO_FREE char *optimizer = NULL;

    if (!directory || claas_mkdir_all(directory) < 0)
        abort();
    path = claas_format("%s/adapter_config.json", directory);
    weights = claas_format("%s/adapter_model.safetensors", directory);
    optimizer = claas_format("%s/optimizer.safetensors", directory);
    if (claas_file_write(path, config, strlen(config)) < 0)
        abort();
    fixture_safetensors(weights, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                        value);
    if (moments)
        fixture_safetensors(optimizer, "exp_avg.x", 0.5f);
    return directory;
}

/* Runs an operation with a body given as (printf) JSON text. */
static inline int fixture_call_as(claas_store_t *store, const char *principal,
                                  enum claas_store_op op, const struct claas_store_blob *blobs,
                                  size_t blob_count, struct claas_store_answer *answer,
                                  const char *text)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;

    memset(answer, 0, sizeof(*answer));
    if (claas_json_parse(text, strlen(text), (size_t)1 << 24, &body) < 0) {
        fprintf(stderr, "bad JSON in the test: %s: %s\n", claas_error_text(), text);
        abort();
    }
    return store->ops->call(
        store, op, &(struct claas_store_request){principal, body, blobs, blob_count}, answer);
}

__attribute__((format(printf, 4, 5))) static inline int
fixture_call(claas_store_t *store, enum claas_store_op op, struct claas_store_answer *answer,
             const char *format, ...)
{
    char text[16384];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return fixture_call_as(store, "local", op, NULL, 0, answer, text);
}

/* An answer of one choice: three prompt ids, three response ids with log-probs that depend on
 * `salt`. */
static inline int fixture_rollout_as(claas_store_t *store, const char *principal, const char *id,
                                     const char *lora_id, const char *question, const char *text,
                                     int32_t salt)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();
    int32_t prompt[3] = {1, 2, salt}, response[3] = {salt, 5, 0};
    float logprobs[3] = {-0.5f, -1.0f, -(float)salt};
    struct claas_store_blob blobs[3] = {
        {prompt, sizeof(prompt)}, {response, sizeof(response)}, {logprobs, sizeof(logprobs)}};
    struct claas_store_answer answer;
    cJSON *list, *item;
    int rc;

    claas_json_set_string(body, "id", id);
    if (lora_id) {
        claas_json_set_string(body, "lora_id", lora_id);
        claas_json_set_int(body, "version", 0);
    }
    list = claas_json_set(body, "messages", cJSON_CreateArray());
    item = cJSON_CreateObject();
    claas_json_set_string(item, "role", "user");
    claas_json_set_string(item, "content", question);
    cJSON_AddItemToArray(list, item);
    item = claas_json_set(body, "sampling", cJSON_CreateObject());
    claas_json_set_number(item, "temperature", 1);
    list = claas_json_set(body, "choices", cJSON_CreateArray());
    item = cJSON_CreateObject();
    claas_json_set_int(item, "index", 0);
    claas_json_set_string(item, "text", text);
    claas_json_set_string(item, "raw", text);
    claas_json_set_string(item, "finish_reason", "stop");
    cJSON_AddItemToArray(list, item);
    rc = store->ops->call(store, CLAAS_STORE_ROLLOUT_PUT,
                          &(struct claas_store_request){principal, body, blobs, 3}, &answer);
    claas_store_answer_done(&answer);
    return rc;
}

static inline int fixture_rollout(claas_store_t *store, const char *id, const char *lora_id,
                                  const char *question, const char *text, int32_t salt)
{
    return fixture_rollout_as(store, "local", id, lora_id, question, text, salt);
}

/* Stages and publishes; the version, or the error. `jobs` is a JSON array. */
static inline int64_t fixture_publish(claas_store_t *store, const char *data, const char *lora_id,
                                      int64_t parent, const char *jobs, bool overwrite)
{
    static int count;
    CLAAS_AUTO_FREE char *name = claas_format("t-%d-%d", (int)getpid(), count++);
    CLAAS_AUTO_FREE char *directory = fixture_stage(data, name, parent < 0 ? 0.0f : 1.0f, true);
    struct claas_store_answer answer;
    int64_t version = -1;
    int rc = fixture_call(store, CLAAS_STORE_VERSION_PUBLISH, &answer,
                          "{\"lora_id\":\"%s\",\"parent\":%d,\"directory\":\"%s\",\"job_ids\":%s,"
                          "\"overwrite\":%s,\"result\":{\"steps\":8}}",
                          lora_id, (int)parent, directory, jobs, overwrite ? "true" : "false");

    if (rc == 0)
        claas_json_get_int(answer.body, "version", 0, 1000000000, &version);
    claas_store_answer_done(&answer);
    if (rc < 0)
        claas_remove_all(directory);
    return rc < 0 ? rc : version;
}

/* Feedback on a response id, committed; its job id in `job`. */
static inline int fixture_feedback(claas_store_t *store, const char *lora_id,
                                   const char *response_id, const char *text, char job[65])
{
    struct claas_store_answer answer;
    const char *id = "";
    int rc = fixture_call(
        store, CLAAS_STORE_FEEDBACK_PUT, &answer,
        "{\"requests\":[{\"lora_id\":\"%s\",\"response_id\":\"%s\",\"feedback\":\"%s\"}]}", lora_id,
        response_id, text);

    if (rc == 0) {
        claas_json_get_string(answer.body, "job_id", &id);
        snprintf(job, 65, "%s", id);
        claas_store_answer_done(&answer);
        rc = store->ops->commit(store);
    }
    return rc;
}

#endif
