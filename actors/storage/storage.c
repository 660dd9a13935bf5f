/* The storage actor: messages in front of the store, and the group commit.
 *
 * A change is carried out at once, inside the transaction that is open, and its answer is kept;
 * when the group is full or has waited long enough, one COMMIT makes all of them durable with one
 * fsync, and the answers go out. One fsync per change would be 9 times slower with 64 writers. A
 * writer that waits for its answer sends no next change: so once there are as many changes as the
 * last group had, longer waiting would be for nothing, and the commit comes after the messages that
 * are in the mailbox just now. If the commit fails, all of them get its error and none has
 * happened.
 *
 * Questions are answered at once, from what is committed. */
#include "storage.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "exports.h"
#include "store.h"

#define GROUP_MAX      256
#define TEND_IDLE_MS   2000
#define TEND_BUSY_MS   20
#define TEND_FAILED_MS 30000

struct waiting {
    struct claas_reply_to reply_to;
    cJSON *body;
    bool jobs_ended;
};

struct storage {
    claas_actor_t *actor;
    const claas_config_t *config;
    claas_store_t *store;
    struct exports *exports;
    char *staging; /* absolute: the process that opens an export may run in another directory */
    struct waiting waiting[GROUP_MAX];
    size_t count;
    size_t expected; /* size of the last group */
    int soon;        /* eventfd: readable = commit, after the messages that are there already */
    bool soon_set;
    int commit_timer; /* 0 = none */
    int tend_timer;
    int64_t swept_ms; /* when exports were */
    bool tend_failed; /* already logged; cleared when it works again */
};

/* --- the group ------------------------------------------------------------------------- */

/* The scheduler still lists these jobs, and people watch them. Should the message be lost, it
 * learns of them at the end of a cycle. */
static void tell_jobs_ended(struct storage *storage)
{
    if (claas_actor_tell(storage->actor, "scheduler", CLAAS_MSG_JOBS_ENDED, NULL) < 0)
        claas_debug("the scheduler was not told of jobs that ended: %s", claas_error_text());
}

static void answer_group(struct storage *storage, int rc, const char *text)
{
    bool jobs_ended = false;

    for (size_t i = 0; i < storage->count; i++) {
        struct waiting *waiting = &storage->waiting[i];

        if (rc == 0) {
            jobs_ended = jobs_ended || waiting->jobs_ended;
            claas_actor_reply(storage->actor, &waiting->reply_to, CLAAS_TAKE(waiting->body));
        } else {
            claas_json_free(&waiting->body);
            claas_actor_reply_error(storage->actor, &waiting->reply_to, rc, text);
        }
    }
    storage->count = 0;
    if (jobs_ended)
        tell_jobs_ended(storage);
}

static void commit_group(struct storage *storage)
{
    CLAAS_AUTO_FREE char *text = NULL;
    int64_t start = claas_clock_ns();
    int rc;

    if (storage->commit_timer)
        claas_actor_timer_cancel(storage->actor, storage->commit_timer);
    storage->commit_timer = 0;
    if (storage->count == 0)
        return;
    storage->expected = storage->count;
    rc = storage->store->ops->commit(storage->store);
    if (rc < 0) {
        text = claas_strdup(claas_error_text());
        claas_error("%zu changes were not stored: %s", storage->count, claas_error_text());
    }
    claas_metric_add(CLAAS_METRIC_STORAGE_COMMITS, 1);
    claas_metric_observe(CLAAS_METRIC_STORAGE_COMMIT_SECONDS,
                         (double)(claas_clock_ns() - start) * 1e-9);
    claas_metric_observe(CLAAS_METRIC_STORAGE_GROUP, (double)storage->count);
    answer_group(storage, rc, text ? text : claas_err_text(rc));
}

static void commit_due(void *self, void *arg)
{
    struct storage *storage = self;

    (void)arg;
    storage->commit_timer = 0;
    commit_group(storage);
}

static void commit_soon(void *self, int fd)
{
    struct storage *storage = self;
    uint64_t count;

    (void)!read(fd, &count, sizeof(count));
    storage->soon_set = false;
    commit_group(storage);
}

static void set_soon(struct storage *storage)
{
    uint64_t one = 1;

    if (storage->soon_set)
        return;
    storage->soon_set = true;
    (void)!write(storage->soon, &one, sizeof(one));
}

static int join_group(struct storage *storage, const struct claas_reply_to *reply_to,
                      struct claas_store_answer *answer)
{
    storage->waiting[storage->count++] =
        (struct waiting){*reply_to, CLAAS_TAKE(answer->body), answer->jobs_ended};
    if (storage->count == GROUP_MAX)
        commit_group(storage);
    else if (storage->count >= storage->expected)
        set_soon(storage);
    else if (!storage->commit_timer)
        storage->commit_timer = claas_actor_timer(
            storage->actor, claas_config_int(storage->config, "storage.commit_wait"), commit_due,
            NULL);
    if (storage->commit_timer < 0) { /* no timer could be set: commit without waiting */
        storage->commit_timer = 0;
        set_soon(storage);
    }
    return 0;
}

/* --- handlers -------------------------------------------------------------------------- */

static const struct {
    int type;
    enum claas_store_op op;
} operations[] = {
    {CLAAS_MSG_ROLLOUT_PUT, CLAAS_STORE_ROLLOUT_PUT},
    {CLAAS_MSG_FEEDBACK_PUT, CLAAS_STORE_FEEDBACK_PUT},
    {CLAAS_MSG_JOB_RECORD, CLAAS_STORE_JOB_RECORD},
    {CLAAS_MSG_JOBS_UNFINISHED, CLAAS_STORE_JOBS_UNFINISHED},
    {CLAAS_MSG_CYCLE_INPUT, CLAAS_STORE_CYCLE_INPUT},
    {CLAAS_MSG_CYCLE_CHECK, CLAAS_STORE_CYCLE_CHECK},
    {CLAAS_MSG_VERSION_PUBLISH, CLAAS_STORE_VERSION_PUBLISH},
    {CLAAS_MSG_JOB_GET, CLAAS_STORE_JOB_GET},
    {CLAAS_MSG_JOB_LIST, CLAAS_STORE_JOB_LIST},
    {CLAAS_MSG_ADAPTER_RESOLVE, CLAAS_STORE_ADAPTER_RESOLVE},
    {CLAAS_MSG_ADAPTER_LIST, CLAAS_STORE_ADAPTER_LIST},
    {CLAAS_MSG_ADAPTER_VERSIONS, CLAAS_STORE_ADAPTER_VERSIONS},
    {CLAAS_MSG_ADAPTER_ROLLBACK, CLAAS_STORE_ADAPTER_ROLLBACK},
    {CLAAS_MSG_ADAPTER_DELETE, CLAAS_STORE_ADAPTER_DELETE},
    {CLAAS_MSG_STANDING_LIST, CLAAS_STORE_STANDING_LIST},
    {CLAAS_MSG_STANDING_WITHDRAW, CLAAS_STORE_STANDING_WITHDRAW},
};

static int find_operation(int type, enum claas_store_op *ret)
{
    for (size_t i = 0; i < CLAAS_COUNT(operations); i++)
        if (operations[i].type == type) {
            *ret = operations[i].op;
            return 0;
        }
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "storage has no operation for message 0x%04x", type);
}

/* The store's interface knows no messages: an attachment becomes a blob (the same pointer and
 * length). */
static int call_store(struct storage *storage, enum claas_store_op op,
                      const claas_message_t *message, struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE struct claas_store_blob *blobs = NULL;
    struct claas_store_request request = {
        .principal = message->principal,
        .body = message->body,
        .blob_count = message->attachment_count,
    };

    if (request.blob_count > 0) {
        blobs = CLAAS_NEW_ARRAY(struct claas_store_blob, request.blob_count);
        if (!blobs)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        for (size_t i = 0; i < request.blob_count; i++)
            blobs[i] = (struct claas_store_blob){(void *)(uintptr_t)message->attachments[i].data,
                                                 message->attachments[i].length};
        request.blobs = blobs;
    }
    return storage->store->ops->call(storage->store, op, &request, answer);
}

static int reply_answer(struct storage *storage, const struct claas_reply_to *reply_to,
                        struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE struct claas_attachment *attachments = NULL;

    if (answer->blob_count == 0)
        return claas_actor_reply(storage->actor, reply_to, CLAAS_TAKE(answer->body));
    attachments = CLAAS_NEW_ARRAY(struct claas_attachment, answer->blob_count);
    if (!attachments)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < answer->blob_count; i++)
        attachments[i] = (struct claas_attachment){answer->blobs[i].data, answer->blobs[i].length};
    return claas_actor_reply_attached(storage->actor, reply_to, CLAAS_TAKE(answer->body),
                                      attachments, answer->blob_count);
}

static int handle(void *self, claas_message_t *message)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    struct storage *storage = self;
    enum claas_store_kind kind;
    enum claas_store_op op = CLAAS_STORE_ROLLOUT_PUT;
    int rc = find_operation(message->type, &op);

    if (rc < 0)
        return rc;
    kind = storage->store->ops->kind(op);
    if (kind == CLAAS_STORE_ALONE)
        commit_group(storage);
    rc = call_store(storage, op, message, &answer);
    if (rc < 0)
        return rc;
    if (kind == CLAAS_STORE_CHANGE)
        return join_group(storage, &message->reply_to, &answer);
    if (answer.jobs_ended)
        tell_jobs_ended(storage);
    return reply_answer(storage, &message->reply_to, &answer);
}

/* Takes every form of a name, `@N` too: the same look-up as a chat's gives the directory. */
static int handle_export(void *self, claas_message_t *message)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    CLAAS_AUTO(claas_json_free) cJSON *question = cJSON_CreateObject();
    struct storage *storage = self;
    struct export_order order = {.reply_to = message->reply_to};
    const char *text = "", *directory = "";
    struct claas_store_request request = {.principal = message->principal, .body = question};
    int rc;

    claas_json_get_string(message->body, "lora_id", &text);
    claas_json_set_string(question, "name", text);
    rc = storage->store->ops->call(storage->store, CLAAS_STORE_ADAPTER_RESOLVE, &request, &answer);
    if (rc < 0)
        return rc;
    claas_json_get_string(answer.body, "lora_id", &text);
    claas_json_get_string(answer.body, "directory", &directory);
    claas_json_get_int(answer.body, "version", 0, 1000000000, &order.version);
    rc = claas_copy_text(order.lora_id, sizeof(order.lora_id), text);
    if (rc < 0)
        return rc;
    claas_json_get_bool(message->body, "optimizer", &order.optimizer);
    return exports_start(storage->exports, &order, directory, storage->staging);
}

/* --- upkeep ---------------------------------------------------------------------------- */

static void tend(void *self, void *arg)
{
    struct storage *storage = self;
    int64_t delay = TEND_IDLE_MS;
    int rc = 1; /* a group is open: at the next look it may not be */

    (void)arg;
    if (storage->count == 0)
        rc = storage->store->ops->tend(storage->store);
    if (rc > 0)
        delay = TEND_BUSY_MS;
    if (claas_clock_ms() - storage->swept_ms >= TEND_IDLE_MS) {
        exports_sweep(storage->exports, storage->staging);
        storage->swept_ms = claas_clock_ms();
    }
    if (rc < 0) {
        if (!storage->tend_failed)
            claas_warning("upkeep of the data directory: %s", claas_error_text());
        delay = TEND_FAILED_MS;
    }
    if (rc <= 0)
        storage->tend_failed = rc < 0;
    storage->tend_timer = claas_actor_timer(storage->actor, delay, tend, NULL);
}

static void given_up(void *self, const struct claas_reply_to *to)
{
    struct storage *storage = self;

    exports_abandon(storage->exports, to);
}

static void exported(void *self, int fd)
{
    struct storage *storage = self;

    (void)fd;
    exports_finish(storage->exports);
}

/* --- life ------------------------------------------------------------------------------ */

static void warn(void *arg, const char *text)
{
    (void)arg;
    claas_warning("%s", text);
}

static void publish_event(void *arg, const cJSON *body)
{
    struct storage *storage = arg;

    claas_actor_publish(storage->actor, CLAAS_MSG_JOB_EVENT, cJSON_Duplicate(body, true));
}

static struct claas_store_options read_options(struct storage *storage)
{
    const claas_config_t *config = storage->config;

    return (struct claas_store_options){
        .data = claas_config_string(config, "data"),
        .queue_max = claas_config_int(config, "feedback.queue_max"),
        .replay_items = claas_config_int(config, "cycle.replay_items"),
        .replay_age = claas_config_int(config, "cycle.replay_age"),
        .retries = claas_config_int(config, "cycle.retries"),
        .scheduler_elsewhere = !claas_config_list_has(config, "roles", "scheduler"),
        .keep_versions = claas_config_int(config, "storage.keep_versions"),
        .keep_moments = claas_config_int(config, "storage.keep_moments"),
        .keep_rollouts = claas_config_int(config, "storage.keep_rollouts"),
        .keep_rollouts_ms = claas_config_int(config, "storage.keep_rollouts_for"),
        .keep_jobs = claas_config_int(config, "storage.keep_jobs"),
        .warn = warn,
        .on_event = publish_event,
        .arg = storage,
    };
}

static int find_staging(struct storage *storage)
{
    CLAAS_AUTO_FREE char *data = realpath(claas_config_string(storage->config, "data"), NULL);

    storage->staging = data ? claas_format("%s/staging", data) : NULL;
    return storage->staging ? 0 : claas_fail_errno("data directory");
}

/* Commits what is open: it was carried out, and its requesters still wait for the answer. */
static void stop(void **self)
{
    struct storage *storage = *self;

    if (!storage)
        return;
    if (storage->store)
        commit_group(storage);
    if (storage->tend_timer > 0)
        claas_actor_timer_cancel(storage->actor, storage->tend_timer);
    if (storage->soon >= 0) {
        claas_actor_unwatch(storage->actor, storage->soon);
        close(storage->soon);
    }
    if (storage->exports)
        claas_actor_unwatch(storage->actor, exports_fd(storage->exports));
    exports_free(&storage->exports);
    if (storage->store)
        storage->store->ops->close(&storage->store);
    free(storage->staging);
    free(storage);
    *self = NULL;
}

static void storage_free(struct storage **storage)
{
    void *self = *storage;

    stop(&self);
    *storage = NULL;
}

static int start(claas_actor_t *actor, const void *args, void **ret_self)
{
    CLAAS_AUTO(storage_free) struct storage *storage = CLAAS_NEW(struct storage);
    struct claas_store_options options;
    int rc;

    if (!storage)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    storage->actor = actor;
    storage->config = ((const struct claas_storage_args *)args)->config;
    storage->soon = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    options = read_options(storage);
    rc = claas_store_open_sqlite(&options, &storage->store);
    if (rc == 0)
        rc = find_staging(storage);
    if (rc == 0)
        rc = exports_new(actor, &storage->exports);
    if (rc == 0)
        rc = claas_actor_watch(actor, exports_fd(storage->exports), exported);
    if (rc == 0 && storage->soon < 0)
        rc = claas_fail_errno("eventfd");
    if (rc == 0)
        rc = claas_actor_watch(actor, storage->soon, commit_soon);
    if (rc < 0)
        return rc;
    claas_actor_on_cancel(actor, given_up);
    storage->tend_timer = claas_actor_timer(actor, TEND_IDLE_MS, tend, NULL);
    *ret_self = CLAAS_TAKE(storage);
    return 0;
}

static bool drain(void *self)
{
    struct storage *storage = self;

    commit_group(storage);
    return exports_idle(storage->exports);
}

static const struct claas_handler handlers[] = {
    {CLAAS_MSG_ROLLOUT_PUT, handle},       {CLAAS_MSG_FEEDBACK_PUT, handle},
    {CLAAS_MSG_JOB_RECORD, handle},        {CLAAS_MSG_JOBS_UNFINISHED, handle},
    {CLAAS_MSG_CYCLE_INPUT, handle},       {CLAAS_MSG_VERSION_PUBLISH, handle},
    {CLAAS_MSG_JOB_GET, handle},           {CLAAS_MSG_JOB_LIST, handle},
    {CLAAS_MSG_ADAPTER_RESOLVE, handle},   {CLAAS_MSG_ADAPTER_LIST, handle},
    {CLAAS_MSG_ADAPTER_VERSIONS, handle},  {CLAAS_MSG_ADAPTER_ROLLBACK, handle},
    {CLAAS_MSG_ADAPTER_DELETE, handle},    {CLAAS_MSG_STANDING_LIST, handle},
    {CLAAS_MSG_STANDING_WITHDRAW, handle}, {CLAAS_MSG_ADAPTER_EXPORT, handle_export},
    {CLAAS_MSG_CYCLE_CHECK, handle},
};

const struct claas_actor_class claas_storage_class = {
    "storage", handlers, CLAAS_COUNT(handlers), start, drain, stop,
};
