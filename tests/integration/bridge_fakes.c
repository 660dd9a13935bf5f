/* Scripted actors behind a bridge: see bridge_fakes.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "bridge_fakes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "bridge.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"

atomic_int fake_cancels;
atomic_int fake_held;

struct fake {
    claas_actor_t *actor;
    struct claas_reply_to later; /* of a request answered by a timer */
};

static int fake_start(claas_actor_t *actor, const void *args, void **ret_self);

static void fake_stop(void **self)
{
    free(*self);
    *self = NULL;
}

static cJSON *parse(const char *text)
{
    cJSON *json = cJSON_Parse(text);

    assert_non_null(json);
    return json;
}

/* --- sampler: by the text of the last message, or the prompt --- */

static void piece(struct fake *fake, const struct claas_reply_to *to, int choice, const char *text,
                  bool logprobs, const char *finish)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "id", "chatcmpl-0123456789ab");
    claas_json_set_int(body, "choice", choice);
    claas_json_set_string(body, "text", text);
    if (logprobs)
        claas_json_set(body, "logprobs",
                       parse("[{\"token\":\"Hi\",\"logprob\":-0.5,\"bytes\":[72,105],"
                             "\"top_logprobs\":[{\"token\":\"Hi\",\"logprob\":-0.5,"
                             "\"bytes\":[72,105]}]}]"));
    if (finish)
        claas_json_set_string(body, "finish_reason", finish);
    claas_actor_progress(fake->actor, to, body);
}

static cJSON *chat_reply(const cJSON *request, const char *text)
{
    cJSON *body = parse("{\"id\":\"chatcmpl-0123456789ab\",\"prompt_tokens\":7,"
                        "\"completion_tokens\":3,\"cached_tokens\":2,\"lora_id\":\"me/x\","
                        "\"version\":4}");
    cJSON *choices = claas_json_set(body, "choices", cJSON_CreateArray());
    const char *model = "default";
    int64_t n = 1;
    bool logprobs = false;

    claas_json_get_string(request, "model", &model);
    claas_json_get_int(request, "n", 1, 16, &n);
    claas_json_get_bool(request, "logprobs", &logprobs);
    claas_json_set_string(body, "model", model);
    for (int64_t i = 0; i < n; i++) {
        cJSON *choice = cJSON_CreateObject();

        claas_json_set_int(choice, "index", i);
        claas_json_set_string(choice, "text", text);
        claas_json_set_string(choice, "finish_reason", i ? "length" : "stop");
        claas_json_set_int(choice, "tokens", 3);
        if (logprobs)
            claas_json_set(choice, "logprobs",
                           parse("[{\"token\":\"Hi\",\"logprob\":-0.5,\"bytes\":[72,105],"
                                 "\"top_logprobs\":[{\"token\":\"Hi\",\"logprob\":-0.5,"
                                 "\"bytes\":[72,105]}]}]"));
        cJSON_AddItemToArray(choices, choice);
    }
    return body;
}

static const char *last_text(const cJSON *body)
{
    const cJSON *messages = claas_json_get(body, "messages");
    const char *text = "";

    if (!messages)
        claas_json_get_string(body, "prompt", &text);
    else
        claas_json_get_string(cJSON_GetArrayItem(messages, cJSON_GetArraySize(messages) - 1),
                              "content", &text);
    return text;
}

static void stream_pieces(struct fake *fake, claas_message_t *message)
{
    bool logprobs = false;
    int64_t n = 1;

    claas_json_get_bool(message->body, "logprobs", &logprobs);
    claas_json_get_int(message->body, "n", 1, 16, &n);
    for (int i = 0; i < n; i++) {
        piece(fake, &message->reply_to, i, "Hi", logprobs, NULL);
        piece(fake, &message->reply_to, i, " there", false, NULL);
        piece(fake, &message->reply_to, i, "", false, i ? "length" : "stop");
    }
}

static void answer_late(void *self, void *arg)
{
    struct fake *fake = self;

    (void)arg;
    claas_actor_reply(fake->actor, &fake->later, chat_reply(NULL, "late"));
}

static int fake_chat(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *text = last_text(message->body);
    const char *model = "";
    bool stream = false;

    claas_json_get_string(message->body, "model", &model);
    claas_json_get_bool(message->body, "stream", &stream);
    if (strcmp(model, "nope") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "The model `nope` does not exist.");
    if (strcmp(text, "long") == 0)
        return claas_fail(CLAAS_ERR_LIMIT, "the prompt has 9000 tokens, the context of this model "
                                           "8192");
    if (strcmp(text, "busy") == 0)
        return claas_fail(CLAAS_ERR_OVERLOADED, "too many chats");
    if (strcmp(text, "deadline") == 0)
        return claas_fail(CLAAS_ERR_DEADLINE, "too late");
    if (strcmp(text, "hang") == 0) {
        fake_held++;
        return 0;
    }
    if (strcmp(text, "late") == 0) {
        fake->later = message->reply_to;
        claas_actor_timer(fake->actor, 1600, answer_late, NULL);
        return 0;
    }
    if (strcmp(text, "piece then hang") == 0) {
        fake_held++;
        piece(fake, &message->reply_to, 0, "Hi", false, NULL);
        return 0;
    }
    if (strcmp(text, "piece then error") == 0) {
        piece(fake, &message->reply_to, 0, "Hi", false, NULL);
        return claas_fail(CLAAS_ERR_DEVICE, "the device failed");
    }
    if (strcmp(text, "flood") == 0) {
        CLAAS_AUTO_FREE char *block = claas_alloc(1, 500001);

        memset(block, 'x', 500000);
        for (int i = 0; i < 20; i++)
            piece(fake, &message->reply_to, 0, block, false, NULL);
        fake_held++;
        return 0;
    }
    if (strcmp(text, "echo") == 0) {
        CLAAS_AUTO_FREE char *printed = claas_json_print(message->body);

        return claas_actor_reply(fake->actor, &message->reply_to,
                                 chat_reply(message->body, printed));
    }
    if (stream && strcmp(text, "no pieces") != 0)
        stream_pieces(fake, message);
    return claas_actor_reply(fake->actor, &message->reply_to,
                             chat_reply(message->body, "Hi there"));
}

static int fake_model_info(void *self, claas_message_t *message)
{
    struct fake *fake = self;

    return claas_actor_reply(fake->actor, &message->reply_to,
                             parse("{\"name\":\"Tiny\",\"fingerprint\":\"f\",\"context\":8192,"
                                   "\"chat_template\":\"chatml\",\"device\":{\"name\":\"fake\"},"
                                   "\"created\":1700000000}"));
}

static void cancelled(void *self, const struct claas_reply_to *to)
{
    (void)self;
    (void)to;
    fake_cancels++;
}

/* --- scheduler: the job id says how it ends --- */

static int fake_feedback(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const cJSON *item = cJSON_GetArrayItem(claas_json_get(message->body, "requests"), 0);
    const char *text = "", *key = NULL;
    char id[64];
    cJSON *body;

    claas_json_get_string(item, "feedback", &text);
    claas_json_get_string(message->body, "idempotency_key", &key);
    if (strcmp(text, "unknown response") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "No cached completion for content_hash=0123…");
    if (strcmp(text, "bad training") == 0)
        return claas_fail(CLAAS_ERR_UNPROCESSABLE,
                          "invalid training config: alpha must be within [0, 1]");
    snprintf(id, sizeof(id), "job-%s", key ? key : text);
    body = cJSON_CreateObject();
    claas_json_set_string(body, "job_id", id);
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

static cJSON *job(const char *id)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *job = claas_json_set(
        body, "job",
        parse("{\"lora_id\":\"me/x\",\"version\":5,\"result\":{\"metadata\":{\"total_loss\":0.25,"
              "\"batch_size\":12},\"steps\":[{\"step\":1},{\"step\":2}],\"duration_ms\":1234},"
              "\"transitions\":[{\"state\":\"queued\",\"time\":1000},{\"state\":\"training\","
              "\"time\":2000},{\"state\":\"publishing\",\"time\":3000},{\"state\":\"done\","
              "\"time\":3500}]}"));

    claas_json_set_string(job, "job_id", id);
    claas_json_set_string(job, "state", "done");
    if (strcmp(id, "job-reject") == 0) {
        claas_json_set_string(job, "state", "rejected");
        claas_json_set_null(job, "version");
        claas_json_set_string(job, "reason", "KL to base 2.1");
    } else if (strcmp(id, "job-fail") == 0) {
        claas_json_set_string(job, "state", "failed");
        claas_json_set_string(job, "error", "the device failed");
    } else if (strcmp(id, "job-cancel") == 0) {
        claas_json_set_string(job, "state", "cancelled");
    }
    return body;
}

static void send_event(struct fake *fake, const struct claas_reply_to *to, int seq,
                       const char *text)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *event = claas_json_set(body, "event", parse(text));

    claas_json_set_int(event, "seq", seq);
    claas_actor_progress(fake->actor, to, body);
}

static int fake_job_watch(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *id = "";
    int64_t since = 0;

    claas_json_get_string(message->body, "job_id", &id);
    claas_json_get_int(message->body, "since", 0, INT64_MAX, &since);
    if (strcmp(id, "job-none") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: job-none");
    if (since < 1)
        send_event(fake, &message->reply_to, 1,
                   "{\"kind\":\"state\",\"state\":\"queued\",\"job_id\":\"x\"}");
    if (since < 2)
        send_event(fake, &message->reply_to, 2, "{\"kind\":\"step\",\"step\":1,\"loss\":0.5}");
    if (strcmp(id, "job-hang") == 0) {
        fake_held++;
        return 0;
    }
    return claas_actor_reply(fake->actor, &message->reply_to, job(id));
}

static int fake_job_cancel(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    cJSON *body = job("job-cancel");

    claas_json_set_bool(body, "cancelled", true);
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

/* --- trainer --- */

static int fake_init(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *lora_id = "";
    cJSON *body;

    claas_json_get_string(message->body, "lora_id", &lora_id);
    if (strcmp(lora_id, "me/exists") == 0)
        return claas_fail(CLAAS_ERR_EXISTS, "LoRA already exists: me/exists");
    if (strcmp(lora_id, "me/denied") == 0)
        return claas_fail(CLAAS_ERR_DENIED, "base_model 'x' is not allowed for initialization. "
                                            "Allowed models: Tiny, base");
    if (strcmp(lora_id, "me/broken") == 0)
        return claas_fail(CLAAS_ERR_IO, "disk");
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_int(body, "version", 0);
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

/* The size of the upload comes back as the version. */
static int fake_import(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *path = "", *lora_id = "";
    struct stat status;
    cJSON *body;

    claas_json_get_string(message->body, "path", &path);
    claas_json_get_string(message->body, "lora_id", &lora_id);
    if (stat(path, &status) < 0)
        return claas_fail_errno("import");
    unlink(path);
    body = cJSON_CreateObject();
    claas_json_set_string(body, "lora_id", lora_id);
    claas_json_set_int(body, "version", status.st_size);
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

/* --- storage --- */

static int reply_text(void *self, claas_message_t *message, const char *text)
{
    struct fake *fake = self;

    return claas_actor_reply(fake->actor, &message->reply_to, parse(text));
}

static int check_adapter(const claas_message_t *message)
{
    const char *lora_id = "";

    claas_json_get_string(message->body, "lora_id", &lora_id);
    if (strcmp(lora_id, "me/none") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "LoRA not found: me/none");
    if (strstr(lora_id, ".."))
        return claas_fail(CLAAS_ERR_INVALID, "Invalid lora_id: path traversal detected in '%s'",
                          lora_id);
    return 0;
}

static int fake_list(void *self, claas_message_t *message)
{
    return reply_text(self, message,
                      "{\"adapters\":[{\"lora_id\":\"me/x\",\"current\":5,\"versions\":6,"
                      "\"created\":1700000000000}]}");
}

static int fake_resolve(void *self, claas_message_t *message)
{
    const char *name = "";

    claas_json_get_string(message->body, "name", &name);
    if (strncmp(name, "me/x", 4) != 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "LoRA not found: %s", name);
    return reply_text(self, message,
                      "{\"lora_id\":\"me/x\",\"version\":5,\"directory\":\"/d\",\"uid\":\"u\","
                      "\"trained\":true,\"created\":1700000000000}");
}

static int fake_versions(void *self, claas_message_t *message)
{
    int rc = check_adapter(message);

    return rc < 0 ? rc
                  : reply_text(self, message,
                               "{\"lora_id\":\"me/x\",\"current\":1,\"versions\":[{\"version\":0},"
                               "{\"version\":1,\"parent\":0}]}");
}

static int fake_rollback(void *self, claas_message_t *message)
{
    int rc = check_adapter(message);

    return rc < 0 ? rc : reply_text(self, message, "{\"lora_id\":\"me/x\",\"version\":0}");
}

static int fake_delete(void *self, claas_message_t *message)
{
    return reply_text(self, message, "{\"deleted\":true}");
}

static int fake_standing(void *self, claas_message_t *message)
{
    return reply_text(
        self, message,
        "{\"lora_id\":\"me/x\",\"feedback\":[{\"id\":\"fb-1\",\"text\":\"be brief\"}]}");
}

static int fake_withdraw(void *self, claas_message_t *message)
{
    return reply_text(self, message, "{\"withdrawn\":1}");
}

static int fake_export(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    char path[] = "/tmp/claas-test-export-XXXXXX";
    int rc = check_adapter(message);
    bool optimizer = false;
    int fd;
    cJSON *body;

    claas_json_get_bool(message->body, "optimizer", &optimizer);
    if (rc == 0 && optimizer)
        rc = claas_fail(CLAAS_ERR_NOT_FOUND, "the optimizer's state is gone");
    if (rc < 0)
        return rc;
    fd = mkstemp(path);
    if (fd < 0 || write(fd, "PK zip", 6) != 6)
        return claas_fail_errno("export");
    close(fd);
    body = parse("{\"lora_id\":\"me/x\",\"version\":5}");
    claas_json_set_string(body, "path", path);
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

static int fake_job_get(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *id = "";

    claas_json_get_string(message->body, "job_id", &id);
    if (strcmp(id, "job-none") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: job-none");
    return claas_actor_reply(fake->actor, &message->reply_to, job(id));
}

/* What was asked comes back as the first job. */
static int fake_job_list(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    cJSON *body = cJSON_CreateObject();
    cJSON *jobs = claas_json_set(body, "jobs", cJSON_CreateArray());

    cJSON_AddItemToArray(jobs, cJSON_Duplicate(message->body, true));
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

/* --- the cast --- */

static const struct claas_handler sampler_handlers[] = {
    {CLAAS_MSG_CHAT, fake_chat},
    {CLAAS_MSG_MODEL_INFO, fake_model_info},
};
static const struct claas_handler scheduler_handlers[] = {
    {CLAAS_MSG_FEEDBACK, fake_feedback},
    {CLAAS_MSG_JOB_WATCH, fake_job_watch},
    {CLAAS_MSG_JOB_CANCEL, fake_job_cancel},
};
static const struct claas_handler trainer_handlers[] = {
    {CLAAS_MSG_ADAPTER_INIT, fake_init},
    {CLAAS_MSG_ADAPTER_IMPORT, fake_import},
};
static const struct claas_handler storage_handlers[] = {
    {CLAAS_MSG_ADAPTER_LIST, fake_list},         {CLAAS_MSG_ADAPTER_RESOLVE, fake_resolve},
    {CLAAS_MSG_ADAPTER_VERSIONS, fake_versions}, {CLAAS_MSG_ADAPTER_ROLLBACK, fake_rollback},
    {CLAAS_MSG_ADAPTER_DELETE, fake_delete},     {CLAAS_MSG_ADAPTER_EXPORT, fake_export},
    {CLAAS_MSG_STANDING_LIST, fake_standing},    {CLAAS_MSG_STANDING_WITHDRAW, fake_withdraw},
    {CLAAS_MSG_JOB_GET, fake_job_get},           {CLAAS_MSG_JOB_LIST, fake_job_list},
};

#define CAST(name)                                                                                 \
    {                                                                                              \
#name, name##_handlers, CLAAS_COUNT(name##_handlers), fake_start, NULL, fake_stop          \
    }
static const struct claas_actor_class cast[] = {CAST(sampler), CAST(scheduler), CAST(trainer),
                                                CAST(storage)};

static int fake_start(claas_actor_t *actor, const void *args, void **ret_self)
{
    struct fake *fake = CLAAS_NEW(struct fake);

    (void)args;
    fake->actor = actor;
    claas_actor_on_cancel(actor, cancelled);
    *ret_self = fake;
    return 0;
}

/* --- the server --- */

static struct claas_bridge_args bridge_args;

void fake_server_start(struct fake_server *server, const char *const *settings)
{
    const char *overrides[32] = {"listen=127.0.0.1:0", "runtime.drain=3s"};
    char data[96];
    size_t count = 2;

    *server = (struct fake_server){0};
    snprintf(server->directory, sizeof(server->directory), "/tmp/claas-test-bridge-XXXXXX");
    assert_non_null(mkdtemp(server->directory));
    snprintf(data, sizeof(data), "data=%s", server->directory);
    overrides[count++] = data;
    while (settings && *settings)
        overrides[count++] = *settings++;
    if (claas_config_load(NULL, overrides, count, &server->config) < 0)
        fail_msg("%s", claas_error_text());
    if (claas_runtime_new(server->config, &server->runtime) < 0)
        fail_msg("%s", claas_error_text());
    for (size_t i = 0; i < CLAAS_COUNT(cast); i++) {
        if (claas_runtime_start(server->runtime, &cast[i], cast[i].name, NULL) < 0)
            fail_msg("%s", claas_error_text());
    }
    bridge_args = (struct claas_bridge_args){server->config, &server->port};
    if (claas_runtime_start(server->runtime, &claas_bridge_class, "bridge", &bridge_args) < 0)
        fail_msg("%s", claas_error_text());
    fake_cancels = 0;
    fake_held = 0;
}

void fake_server_stop(struct fake_server *server)
{
    claas_runtime_free(&server->runtime);
    claas_config_free(&server->config);
    claas_remove_all(server->directory);
}

void fake_wait(atomic_int *counter, int value)
{
    int64_t end = claas_clock_ms() + 10000;

    while (*counter < value) {
        if (claas_clock_ms() > end)
            fail_msg("%d instead of %d", (int)*counter, value);
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
}
