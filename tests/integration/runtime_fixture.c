/* See runtime_fixture.h. All shared state of the probe is under one lock; waiting is on a
 * condition, never a sleep. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define WAIT_MS  10000
#define COUNTERS 16
#define QUEUE    4096

struct counter {
    const char *name;
    int value;
};

struct probe {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct counter counters[COUNTERS];
    struct question *queue[QUEUE]; /* for the driver */
    size_t queue_count;
    struct question *cancel;
    int driver_fd;
    int releases, failing_starts;
    bool is_drain_held;
};

/* --- probe -------------------------------------------------------------------------------------
 */

struct probe *probe_new(void)
{
    struct probe *probe = CLAAS_NEW(struct probe);
    pthread_condattr_t monotonic;

    pthread_mutex_init(&probe->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&probe->changed, &monotonic);
    probe->driver_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return probe;
}

void probe_free(struct probe **probe)
{
    if (!*probe)
        return;
    close((*probe)->driver_fd);
    pthread_cond_destroy(&(*probe)->changed);
    pthread_mutex_destroy(&(*probe)->lock);
    free(*probe);
    *probe = NULL;
}

static struct counter *find_counter(struct probe *probe, const char *name)
{
    for (int i = 0; i < COUNTERS; i++) {
        if (!probe->counters[i].name)
            probe->counters[i].name = name;
        if (strcmp(probe->counters[i].name, name) == 0)
            return &probe->counters[i];
    }
    abort();
}

static void count(struct probe *probe, const char *name)
{
    pthread_mutex_lock(&probe->lock);
    find_counter(probe, name)->value++;
    pthread_cond_broadcast(&probe->changed);
    pthread_mutex_unlock(&probe->lock);
}

/* One wait for a change; false at the deadline. The lock is held. */
static bool wait_change(struct probe *probe, int64_t until_ms)
{
    struct timespec when = {until_ms / 1000, until_ms % 1000 * 1000000};

    return pthread_cond_timedwait(&probe->changed, &probe->lock, &when) != ETIMEDOUT;
}

#define AWAIT(probe, condition)                                                                    \
    do {                                                                                           \
        int64_t until_ = claas_clock_ms() + WAIT_MS;                                               \
        pthread_mutex_lock(&(probe)->lock);                                                        \
        while (!(condition) && wait_change((probe), until_))                                       \
            ;                                                                                      \
        bool met_ = (condition);                                                                   \
        pthread_mutex_unlock(&(probe)->lock);                                                      \
        if (!met_)                                                                                 \
            fail_msg("waited in vain for %s", #condition);                                         \
    } while (0)

void probe_await_count(struct probe *probe, const char *name, int value)
{
    AWAIT(probe, find_counter(probe, name)->value >= value);
}

int probe_count(struct probe *probe, const char *name)
{
    pthread_mutex_lock(&probe->lock);
    int value = find_counter(probe, name)->value;
    pthread_mutex_unlock(&probe->lock);
    return value;
}

static void poke_driver(struct probe *probe)
{
    uint64_t one = 1;

    assert_int_equal(write(probe->driver_fd, &one, sizeof(one)), sizeof(one));
}

void probe_ask(struct probe *probe, struct question *question)
{
    question->sent = 1;
    pthread_mutex_lock(&probe->lock);
    assert_true(probe->queue_count < QUEUE);
    probe->queue[probe->queue_count++] = question;
    pthread_mutex_unlock(&probe->lock);
    poke_driver(probe);
    AWAIT(probe, question->sent <= 0);
}

void probe_cancel(struct probe *probe, struct question *question)
{
    pthread_mutex_lock(&probe->lock);
    probe->cancel = question;
    pthread_mutex_unlock(&probe->lock);
    poke_driver(probe);
    AWAIT(probe, probe->cancel == NULL);
}

void probe_await(struct probe *probe, struct question *question)
{
    AWAIT(probe, question->ends > 0);
}

void probe_await_progress(struct probe *probe, struct question *question, int wanted)
{
    AWAIT(probe, question->progress >= wanted);
}

int probe_call(struct probe *probe, struct question *question)
{
    probe_ask(probe, question);
    if (question->sent < 0)
        return question->sent;
    probe_await(probe, question);
    return question->code;
}

void probe_release(struct probe *probe)
{
    pthread_mutex_lock(&probe->lock);
    probe->releases++;
    pthread_cond_broadcast(&probe->changed);
    pthread_mutex_unlock(&probe->lock);
}

void probe_hold_drain(struct probe *probe)
{
    pthread_mutex_lock(&probe->lock);
    probe->is_drain_held = true;
    pthread_mutex_unlock(&probe->lock);
}

void probe_finish_drain(struct probe *probe)
{
    pthread_mutex_lock(&probe->lock);
    probe->is_drain_held = false;
    pthread_mutex_unlock(&probe->lock);
}

void probe_fail_starts(struct probe *probe, int times)
{
    pthread_mutex_lock(&probe->lock);
    probe->failing_starts = times;
    pthread_mutex_unlock(&probe->lock);
}

/* --- the answering actor -----------------------------------------------------------------------
 */

struct fake {
    claas_actor_t *actor;
    struct probe *probe;
    struct claas_reply_to asked;
    struct claas_reply_to *late[64]; /* replies that a timer will give; freed at the end */
    int late_count;
};

static cJSON *list_body(const char *name)
{
    cJSON *body = cJSON_CreateObject(), *array = cJSON_CreateArray();

    cJSON_AddItemToArray(array, cJSON_CreateString(name));
    claas_json_set(body, "adapters", array);
    return body;
}

static void reply_later(void *self, void *arg)
{
    struct fake *fake = self;

    claas_actor_reply(fake->actor, arg, list_body("later"));
    count(fake->probe, "late");
}

static void pass_on(void *self, void *arg, claas_message_t *reply)
{
    struct fake *fake = self;

    if (reply->error < 0)
        claas_actor_reply_error(fake->actor, &fake->asked, reply->error, reply->error_text);
    else
        claas_actor_reply(fake->actor, &fake->asked, cJSON_Duplicate(reply->body, true));
}

static int ask_other(struct fake *fake, claas_message_t *message)
{
    fake->asked = message->reply_to;
    cJSON *body = cJSON_CreateObject();
    claas_json_set_string(body, "prefix", "");
    return claas_actor_ask(fake->actor,
                           &(struct claas_ask){.to = "other",
                                               .type = CLAAS_MSG_ADAPTER_LIST,
                                               .body = body,
                                               .timeout_ms = 5000,
                                               .reply = pass_on},
                           NULL);
}

static void block(struct probe *probe)
{
    count(probe, "blocked");
    pthread_mutex_lock(&probe->lock);
    int64_t until = claas_clock_ms() + WAIT_MS;
    while (probe->releases == 0 && wait_change(probe, until))
        ;
    if (probe->releases > 0)
        probe->releases--;
    pthread_mutex_unlock(&probe->lock);
}

static int handle_list(void *self, claas_message_t *message)
{
    struct fake *fake = self;
    const char *prefix = "";

    claas_json_get_string(message->body, "prefix", &prefix);
    count(fake->probe, "handled");
    if (strcmp(prefix, "fail") == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "no such adapter");
    if (strcmp(prefix, "never") == 0) {
        count(fake->probe, "kept");
        return 0;
    }
    if (strcmp(prefix, "later") == 0) {
        struct claas_reply_to *to = CLAAS_NEW(struct claas_reply_to);

        assert_true(fake->late_count < 64);
        fake->late[fake->late_count++] = to;
        *to = message->reply_to;
        return claas_actor_timer(fake->actor, 50, reply_later, to) < 0 ? CLAAS_ERR_INTERNAL : 0;
    }
    if (strcmp(prefix, "die") == 0) {
        claas_actor_fail(fake->actor, CLAAS_ERR_DEVICE, "as it was told to");
        return 0;
    }
    if (strcmp(prefix, "ask") == 0)
        return ask_other(fake, message);
    if (strcmp(prefix, "block") == 0)
        block(fake->probe);
    if (strcmp(prefix, "wrong") == 0)
        return claas_actor_reply(fake->actor, &message->reply_to, cJSON_CreateObject()) < 0 ? 0
                                                                                            : -1;
    if (strcmp(prefix, "principal") == 0)
        return claas_actor_reply(fake->actor, &message->reply_to, list_body(message->principal));
    return claas_actor_reply(fake->actor, &message->reply_to,
                             list_body(claas_actor_name(fake->actor)));
}

static int handle_feedback(void *self, claas_message_t *message)
{
    struct fake *fake = self;

    for (int i = 1; i <= 3; i++) {
        cJSON *body = cJSON_CreateObject();
        cJSON *event = claas_json_set(body, "event", cJSON_CreateObject());

        claas_json_set_int(event, "seq", i);
        claas_actor_progress(fake->actor, &message->reply_to, body);
    }
    cJSON *body = cJSON_CreateObject();
    claas_json_set_string(body, "job_id", "job-1");
    return claas_actor_reply(fake->actor, &message->reply_to, body);
}

/* Replies with the attachments it got; each must be readable as floats where it lies. */
static int handle_rollout(void *self, claas_message_t *message)
{
    struct fake *fake = self;

    for (size_t i = 0; i < message->attachment_count; i++)
        if ((uintptr_t)message->attachments[i].data % 8 != 0)
            return claas_fail(CLAAS_ERR_INTERNAL, "attachment %zu is not aligned", i);
    return claas_actor_reply_attached(fake->actor, &message->reply_to, NULL, message->attachments,
                                      message->attachment_count);
}

static void on_cancel(void *self, const struct claas_reply_to *to)
{
    struct fake *fake = self;

    count(fake->probe, "cancels");
}

static int start_fake(claas_actor_t *actor, const void *args, void **ret_self)
{
    struct probe *probe = (struct probe *)args;

    pthread_mutex_lock(&probe->lock);
    bool is_failing = probe->failing_starts > 0;
    if (is_failing)
        probe->failing_starts--;
    pthread_mutex_unlock(&probe->lock);
    if (is_failing)
        return claas_fail(CLAAS_ERR_IO, "cannot start yet");
    struct fake *fake = CLAAS_NEW(struct fake);
    fake->actor = actor;
    fake->probe = probe;
    claas_actor_on_cancel(actor, on_cancel);
    *ret_self = fake;
    count(fake->probe, "starts");
    return 0;
}

static bool drain_fake(void *self)
{
    struct fake *fake = self;

    count(fake->probe, "drains");
    pthread_mutex_lock(&fake->probe->lock);
    bool is_done = !fake->probe->is_drain_held;
    pthread_mutex_unlock(&fake->probe->lock);
    return is_done;
}

static void stop_fake(void **self)
{
    struct fake *fake = *self;

    count(fake->probe, "stops");
    for (int i = 0; i < fake->late_count; i++)
        free(fake->late[i]);
    free(fake);
    *self = NULL;
}

static const struct claas_handler fake_handlers[] = {
    {CLAAS_MSG_ADAPTER_LIST, handle_list},
    {CLAAS_MSG_FEEDBACK, handle_feedback},
    {CLAAS_MSG_ROLLOUT_PUT, handle_rollout},
};
const struct claas_actor_class fake_class = {"fake",     fake_handlers, CLAAS_COUNT(fake_handlers),
                                             start_fake, drain_fake,    stop_fake};

/* --- the driver --------------------------------------------------------------------------------
 */

struct driver {
    claas_actor_t *actor;
    struct probe *probe;
};

static void sum_attachments(struct question *question, const claas_message_t *reply)
{
    for (size_t i = 0; i < reply->attachment_count; i++) {
        const float *values = reply->attachments[i].data;

        for (size_t j = 0; j < reply->attachments[i].length / sizeof(float); j++)
            question->attachment_sum += values[j];
    }
}

static void on_reply(void *self, void *arg, claas_message_t *reply)
{
    struct driver *driver = self;
    struct question *question = arg;
    CLAAS_AUTO_FREE char *text = claas_json_print(reply->body);

    pthread_mutex_lock(&driver->probe->lock);
    if (reply->kind == CLAAS_KIND_PROGRESS) {
        question->progress++;
    } else {
        question->ends++;
        question->code = reply->error;
        claas_copy_text(question->text, sizeof(question->text),
                        reply->error < 0 ? reply->error_text : "");
        claas_copy_text(question->reply, sizeof(question->reply), text);
        sum_attachments(question, reply);
    }
    pthread_cond_broadcast(&driver->probe->changed);
    pthread_mutex_unlock(&driver->probe->lock);
}

static void send_question(struct driver *driver, struct question *question)
{
    cJSON *body = question->body;
    int rc;

    if (!body) {
        body = cJSON_CreateObject();
        claas_json_set_string(body, "prefix", question->prefix ? question->prefix : "");
    }
    if (question->is_tell)
        rc = claas_actor_tell(driver->actor, question->to, question->type, body);
    else
        rc = claas_actor_ask(driver->actor,
                             &(struct claas_ask){.to = question->to,
                                                 .type = question->type,
                                                 .body = body,
                                                 .attachments = question->attachments,
                                                 .attachment_count = question->attachment_count,
                                                 .timeout_ms = question->timeout_ms,
                                                 .reply = on_reply,
                                                 .arg = question},
                             &question->id);
    pthread_mutex_lock(&driver->probe->lock);
    question->sent = rc;
    if (rc < 0)
        claas_copy_text(question->text, sizeof(question->text), claas_error_text());
    pthread_cond_broadcast(&driver->probe->changed);
    pthread_mutex_unlock(&driver->probe->lock);
}

static struct question *next_question(struct probe *probe)
{
    struct question *question = NULL;

    pthread_mutex_lock(&probe->lock);
    if (probe->queue_count > 0) {
        question = probe->queue[0];
        memmove(probe->queue, probe->queue + 1, --probe->queue_count * sizeof(probe->queue[0]));
    }
    pthread_mutex_unlock(&probe->lock);
    return question;
}

static void on_poke(void *self, int fd)
{
    struct driver *driver = self;
    struct probe *probe = driver->probe;
    struct question *question;
    uint64_t pokes;

    if (read(fd, &pokes, sizeof(pokes)) < 0)
        return;
    while ((question = next_question(probe)) != NULL)
        send_question(driver, question);
    pthread_mutex_lock(&probe->lock);
    struct question *cancel = probe->cancel;
    pthread_mutex_unlock(&probe->lock);
    if (!cancel)
        return;
    claas_actor_cancel(driver->actor, cancel->id);
    pthread_mutex_lock(&probe->lock);
    probe->cancel = NULL;
    pthread_cond_broadcast(&probe->changed);
    pthread_mutex_unlock(&probe->lock);
}

static int start_driver(claas_actor_t *actor, const void *args, void **ret_self)
{
    struct driver *driver = CLAAS_NEW(struct driver);

    driver->actor = actor;
    driver->probe = (struct probe *)args;
    *ret_self = driver;
    return claas_actor_watch(actor, driver->probe->driver_fd, on_poke);
}

static void stop_driver(void **self)
{
    free(*self);
    *self = NULL;
}

const struct claas_actor_class driver_class = {"driver", NULL, 0, start_driver, NULL, stop_driver};

/* --- the process -------------------------------------------------------------------------------
 */

double messages_unaccounted(void)
{
    return claas_metric_value(CLAAS_METRIC_MESSAGES_SENT) -
           claas_metric_value(CLAAS_METRIC_MESSAGES_HANDLED) -
           claas_metric_value(CLAAS_METRIC_MESSAGES_REFUSED) -
           claas_metric_value(CLAAS_METRIC_MESSAGES_EXPIRED) -
           claas_metric_value(CLAAS_METRIC_MESSAGES_LOST);
}

void fixture_new(struct fixture *fixture, const char *extra)
{
    char data[96];
    const char *overrides[2] = {data, extra};

    memset(fixture, 0, sizeof(*fixture));
    claas_copy_text(fixture->dir, sizeof(fixture->dir), "/tmp/claas-test-XXXXXX");
    assert_non_null(mkdtemp(fixture->dir));
    snprintf(data, sizeof(data), "data=%s", fixture->dir);
    fixture->probe = probe_new();
    assert_int_equal(claas_config_load(NULL, overrides, extra ? 2 : 1, &fixture->config), 0);
}

void fixture_start(struct fixture *fixture)
{
    if (claas_runtime_new(fixture->config, &fixture->runtime) < 0)
        fail_msg("claas_runtime_new: %s", claas_error_text());
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "storage", fixture->probe),
                     0);
    assert_int_equal(claas_runtime_start(fixture->runtime, &driver_class, "driver", fixture->probe),
                     0);
}

void fixture_free(struct fixture *fixture)
{
    claas_runtime_free(&fixture->runtime);
    claas_config_free(&fixture->config);
    probe_free(&fixture->probe);
    assert_int_equal(claas_remove_all(fixture->dir), 0);
    assert_true(messages_unaccounted() == 0);
}
