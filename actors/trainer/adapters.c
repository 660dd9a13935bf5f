/* New adapters: untrained ones, and imported ones. Both begin by asking storage about the name, so
 * that nothing is made for an invalid one, and end as a staged directory that storage publishes. An
 * import is unpacked beside the loop, read and written anew, so what gets published was checked
 * tensor by tensor. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "imports.h"

#define PUBLISH_TIMEOUT_MS 60000

/* An ADAPTER_INIT or ADAPTER_IMPORT under way. */
struct adapter_work {
    struct trainer *trainer;
    struct claas_reply_to reply_to;
    char lora_id[257];
    bool overwrite;
    claas_adapter_t *adapter;
    char directory[4096]; /* staged, to be published */
    int64_t parent;
    struct claas_lora_config lora; /* init */
    /* Import ("" for an init): the upload, and the directory with what was in it. Both are removed
     * at the end. */
    char zip[4080], unpacked[4096];
};

/* To be called before the answer goes out: with it the upload is gone. */
static void remove_upload(const struct adapter_work *work)
{
    if (!work->zip[0])
        return;
    claas_remove_all(work->zip);
    claas_remove_all(work->unpacked);
}

static void work_free(struct adapter_work *work)
{
    work->trainer->adapters_in_work--;
    device_calls_drop(work->trainer, work);
    claas_adapter_unref(&work->adapter);
    remove_upload(work);
    free(work);
}

void staged_remove(const char *directory)
{
    CLAAS_AUTO_FREE char *aside = claas_format("%s.dropped", directory);

    if (aside && rename(directory, aside) == 0)
        claas_remove_all(aside);
}

/* The asker knows the names of what was uploaded, not where it lies here. */
static void hide_paths(const struct adapter_work *work, int code)
{
    const char *data = claas_config_string(work->trainer->config, "data");
    CLAAS_AUTO_FREE char *staging = claas_format("%s/staging", data);
    CLAAS_AUTO_FREE char *real = realpath(data, NULL); /* as storage has it */

    if (work->zip[0])
        claas_fail_hide_path(code, work->unpacked, "the upload");
    if (staging)
        claas_fail_hide_path(code, staging, "the staging folder");
    if (real)
        claas_fail_hide_path(code, real, "the data directory");
}

static void work_fail(struct adapter_work *work, int code, const char *text)
{
    CLAAS_AUTO_FREE char *told = NULL;

    claas_fail(code, "%s", text);
    hide_paths(work, code);
    told = claas_strdup(claas_error_text());
    remove_upload(work);
    claas_device_adapter_forget(work->trainer->device, work->directory);
    staged_remove(work->directory);
    claas_actor_reply_error(work->trainer->actor, &work->reply_to, code, told);
    work_free(work);
}

static void published(void *self, void *arg, claas_message_t *reply)
{
    struct trainer *trainer = self;
    struct adapter_work *work = arg;
    int64_t version = 0;
    cJSON *body;

    if (reply->error) {
        work_fail(work, reply->error, reply->error_text);
        return;
    }
    claas_json_get_int(reply->body, "version", 0, 1000000000, &version);
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", work->lora_id);
    claas_json_set_int(body, "version", version);
    remove_upload(work);
    claas_actor_reply(trainer->actor, &work->reply_to, body);
    work_free(work);
}

static int publish(struct adapter_work *work)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "lora_id", work->lora_id);
    claas_json_set_int(body, "parent", work->parent);
    claas_json_set_string(body, "directory", work->directory);
    claas_json_set(body, "job_ids", cJSON_CreateArray());
    claas_json_set_bool(body, "overwrite", work->overwrite);
    claas_json_set_string(body, "base_model", claas_model_name(work->trainer->model));
    return claas_actor_ask(work->trainer->actor,
                           &(struct claas_ask){
                               .to = "storage",
                               .type = CLAAS_MSG_VERSION_PUBLISH,
                               .body = body,
                               .timeout_ms = PUBLISH_TIMEOUT_MS,
                               .principal = work->reply_to.principal,
                               .reply = published,
                               .arg = work,
                           },
                           NULL);
}

static void saved(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct adapter_work *work = arg;
    int rc;

    (void)trainer;
    if (event->kind != CLAAS_EVENT_SAVED) {
        work_fail(work, event->error, event->text);
        return;
    }
    rc = publish(work);
    if (rc < 0)
        work_fail(work, rc, claas_error_text());
}

static void made(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct adapter_work *work = arg;
    uint64_t id;
    int rc;

    if (event->kind != CLAAS_EVENT_ADAPTER) {
        work_fail(work, event->error, event->text);
        return;
    }
    work->adapter = CLAAS_TAKE(event->adapter);
    rc = claas_device_adapter_save(trainer->client, work->adapter, work->directory, &id);
    if (rc == 0)
        rc = device_call_add(trainer, id, saved, work);
    if (rc < 0)
        work_fail(work, rc, claas_error_text());
}

static int work_new(struct trainer *trainer, const claas_message_t *message,
                    struct adapter_work **ret)
{
    struct adapter_work *work;
    const char *lora_id = "";
    char hex[17];

    if (trainer->draining)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "the server is shutting down");
    work = CLAAS_NEW(struct adapter_work);
    if (!work)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    trainer->adapters_in_work++;
    work->trainer = trainer;
    work->reply_to = message->reply_to;
    work->parent = -1;
    claas_json_get_string(message->body, "lora_id", &lora_id);
    snprintf(work->lora_id, sizeof(work->lora_id), "%s", lora_id);
    claas_random_hex(hex, 8);
    snprintf(work->directory, sizeof(work->directory), "%s/staging/adapter-%s",
             claas_config_string(trainer->config, "data"), hex);
    *ret = work;
    return 0;
}

/* The loaded model is the only one there is; its names and the usual aliases are accepted. */
static int check_base_model(const struct trainer *trainer, const cJSON *body)
{
    const char *name = NULL;

    claas_json_get_string(body, "base_model", &name);
    if (!name || !name[0] || strcmp(name, "base") == 0 || strcmp(name, "default") == 0 ||
        strcmp(name, claas_model_name(trainer->model)) == 0)
        return 0;
    return claas_fail(CLAAS_ERR_DENIED,
                      "base_model '%s' is not allowed for initialization. Allowed models: %s, base",
                      claas_quote(name).text, claas_model_name(trainer->model));
}

static int read_lora(const struct trainer *trainer, const cJSON *body,
                     struct claas_lora_config *lora)
{
    int64_t rank = claas_config_int(trainer->config, "adapter.rank");
    int64_t alpha = claas_config_int(trainer->config, "adapter.alpha");
    const cJSON *modules = claas_json_get(body, "target_modules");
    const cJSON *module;

    claas_json_get_int(body, "lora_r", 4, CLAAS_RANK_MAX, &rank);
    claas_json_get_int(body, "lora_alpha", 8, 256, &alpha);
    *lora = (struct claas_lora_config){(int)rank, (float)alpha, modules ? 0 : CLAAS_MODULE_ALL};
    cJSON_ArrayForEach(module, modules)
    {
        int index = cJSON_IsString(module) ? claas_module_from_name(module->valuestring) : -1;

        if (index < 0)
            return claas_fail(
                CLAAS_ERR_INVALID,
                "Unsupported target_modules: %s. Supported modules: down_proj, "
                "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
                claas_quote(cJSON_IsString(module) ? module->valuestring : "not a text").text);
        lora->modules |= 1u << index;
    }
    return 0;
}

/* With cycle.seed set, the initial weights too follow from it: a whole experiment can be
 * repeated. */
static uint64_t initial_seed(const struct trainer *trainer, const char *lora_id)
{
    uint64_t seed = (uint64_t)claas_config_int(trainer->config, "cycle.seed");

    if (seed == 0)
        return claas_random_seed();
    for (; *lora_id; lora_id++)
        seed = (seed ^ (unsigned char)*lora_id) * 1099511628211u;
    return seed;
}

static int start_init(struct adapter_work *work)
{
    struct trainer *trainer = work->trainer;
    uint64_t id;
    int rc =
        claas_device_adapter_init(trainer->client, &work->lora,
                                  initial_seed(trainer, work->lora_id), CLAAS_ADAPTER_KEEP, &id);

    return rc < 0 ? rc : device_call_add(trainer, id, made, work);
}

static void unpacked(struct trainer *trainer, void *arg, int error, const char *text)
{
    struct adapter_work *work = arg;
    uint64_t id;
    int rc;

    claas_remove_all(work->zip); /* no need to hold the disk's space twice */
    if (error) {
        work_fail(work, error, text);
        return;
    }
    rc = claas_device_adapter_load(trainer->client, work->unpacked, CLAAS_ADAPTER_KEEP, &id);
    if (rc == 0)
        rc = device_call_add(trainer, id, made, work);
    if (rc < 0)
        work_fail(work, rc, claas_error_text());
}

/* Storage's answer: the name is valid, and perhaps new. An import into an existing adapter becomes
 * its next version; whether an init may replace an existing one is decided by the publication. */
static void name_known(void *self, void *arg, claas_message_t *reply)
{
    struct trainer *trainer = self;
    struct adapter_work *work = arg;
    int rc;

    if (reply->error && reply->error != CLAAS_ERR_NOT_FOUND) {
        work_fail(work, reply->error, reply->error_text);
        return;
    }
    if (!work->zip[0]) {
        rc = start_init(work);
    } else {
        if (!reply->error)
            claas_json_get_int(reply->body, "current", 0, 1000000000, &work->parent);
        rc = imports_start(trainer->imports, work->zip, work->unpacked, unpacked, work);
    }
    if (rc < 0)
        work_fail(work, rc, claas_error_text());
}

static int ask_name(struct adapter_work *work)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "lora_id", work->lora_id);
    return claas_actor_ask(work->trainer->actor,
                           &(struct claas_ask){
                               .to = "storage",
                               .type = CLAAS_MSG_ADAPTER_VERSIONS,
                               .body = body,
                               .timeout_ms = PUBLISH_TIMEOUT_MS,
                               .principal = work->reply_to.principal,
                               .reply = name_known,
                               .arg = work,
                           },
                           NULL);
}

int handle_adapter_init(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    struct claas_lora_config lora;
    struct adapter_work *work;
    int rc = check_base_model(trainer, message->body);

    if (rc == 0)
        rc = read_lora(trainer, message->body, &lora);
    if (rc == 0)
        rc = work_new(trainer, message, &work);
    if (rc < 0)
        return rc;
    claas_json_get_bool(message->body, "overwrite", &work->overwrite);
    work->lora = lora;
    rc = ask_name(work);
    if (rc < 0)
        work_free(work);
    return rc;
}

/* The path comes from the bridge of this node; all the same nothing outside the staging folder is
 * touched. */
static int check_staged(const struct trainer *trainer, const char *path)
{
    CLAAS_AUTO_FREE char *staging =
        claas_format("%s/staging/", claas_config_string(trainer->config, "data"));

    const char *name;

    if (!staging)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    name = strncmp(path, staging, strlen(staging)) == 0 ? path + strlen(staging) : "";
    if (!name[0] || name[0] == '.' || strchr(name, '/') ||
        strlen(path) >= sizeof(((struct adapter_work *)0)->zip))
        return claas_fail(CLAAS_ERR_DENIED, "imports come from the staging folder");
    return 0;
}

int handle_adapter_import(void *self, claas_message_t *message)
{
    struct trainer *trainer = self;
    struct adapter_work *work;
    const char *path = "";
    int rc;

    claas_json_get_string(message->body, "path", &path);
    rc = check_staged(trainer, path);
    if (rc == 0)
        rc = work_new(trainer, message, &work);
    if (rc < 0)
        return rc;
    snprintf(work->zip, sizeof(work->zip), "%s", path);
    snprintf(work->unpacked, sizeof(work->unpacked), "%s.unpacked", path);
    rc = ask_name(work);
    if (rc < 0)
        work_free(work);
    return rc;
}
