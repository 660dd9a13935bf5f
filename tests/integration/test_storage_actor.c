/* The storage actor behind the switch: answers with attachments, the group commit, a failing
 * request in a group, exports, restart with everything there; and how many feedbacks a second eight
 * producers get acknowledged (for information). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <time.h>

#include "../unit/count_entries.h"
#include "../unit/storage_fixture.h"
#include "claas/actor.h"
#include "claas/clock.h"
#include "claas/metrics.h"
#include "claas/runtime.h"
#include "storage.h"

#define WAIT_MS   20000
#define PRODUCERS 8
#define FLOOD     4000

/* --- an actor that asks what the test's thread wants asked ----------------------------- */

struct question {
    int type;
    cJSON *body; /* taken by the asking */
    const struct claas_attachment *attachments;
    size_t attachment_count;
    bool give_up; /* nobody waits for the answer: cancelled when it is asked */
    int repeat;   /* so many at once, with one outstanding per producer */
    /* the answer */
    bool done;
    int error, ended, failed;
    char text[512];
    cJSON *reply;
    unsigned char *first; /* of the attachments */
    size_t first_length, reply_attachments;
};

static struct driver {
    claas_actor_t *actor;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int event;
    struct question *question;
    int started;
} driver = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void ask_next(struct question *question);
static void question_ended(struct question *question);

static void keep_answer(struct question *question, claas_message_t *reply)
{
    question->error = reply->error;
    question->reply = cJSON_Duplicate(reply->body, true);
    question->reply_attachments = reply->attachment_count;
    if (reply->error)
        snprintf(question->text, sizeof(question->text), "%s", reply->error_text);
    if (reply->attachment_count > 0) {
        question->first_length = reply->attachments[0].length;
        question->first = claas_alloc(question->first_length + 1, 1);
        memcpy(question->first, reply->attachments[0].data, question->first_length);
    }
}

static void answered(void *self, void *arg, claas_message_t *reply)
{
    struct question *question = arg;

    (void)self;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return;
    question->ended++;
    question->failed += reply->error != 0;
    if (question->ended == 1)
        keep_answer(question, reply);
    if (driver.started < question->repeat)
        ask_next(question);
    if (question->ended == question->repeat)
        question_ended(question);
}

static void question_ended(struct question *question)
{
    pthread_mutex_lock(&driver.lock);
    question->done = true;
    pthread_cond_signal(&driver.changed);
    pthread_mutex_unlock(&driver.lock);
}

static void ask_next(struct question *question)
{
    uint64_t id = 0;
    int rc;

    driver.started++;
    rc = claas_actor_ask(driver.actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = question->type,
                             .body = cJSON_Duplicate(question->body, true),
                             .attachments = question->attachments,
                             .attachment_count = question->attachment_count,
                             .timeout_ms = WAIT_MS,
                             .reply = answered,
                             .arg = question,
                         },
                         &id);
    if (rc < 0) {
        fprintf(stderr, "ask: %s\n", claas_error_text());
        abort();
    }
    if (question->give_up) {
        claas_actor_cancel(driver.actor, id);
        question_ended(question);
    }
}

static void wanted(void *self, int fd)
{
    struct question *question;
    uint64_t count;
    int repeat;

    (void)self;
    (void)!read(fd, &count, sizeof(count));
    question = driver.question;
    repeat = question->repeat;
    driver.started = 0;
    /* One that is given up is the asker's again once it was asked. */
    for (int i = 0; i < PRODUCERS && i < repeat; i++)
        ask_next(question);
}

static int driver_start(claas_actor_t *actor, const void *args, void **ret_self)
{
    (void)args;
    driver.actor = actor;
    driver.event = eventfd(0, EFD_CLOEXEC);
    *ret_self = &driver;
    return claas_actor_watch(actor, driver.event, wanted);
}

static void driver_stop(void **self)
{
    close(driver.event);
    *self = NULL;
}

static const struct claas_actor_class driver_class = {"driver",     NULL, 0,
                                                      driver_start, NULL, driver_stop};

/* Where the scheduler would be. */
static atomic_int told;

static int hear(void *self, claas_message_t *message)
{
    (void)self;
    (void)message;
    atomic_fetch_add(&told, 1);
    return 0;
}

static int listener_start(claas_actor_t *actor, const void *args, void **ret_self)
{
    (void)actor;
    (void)args;
    *ret_self = &told;
    return 0;
}

static void listener_stop(void **self)
{
    *self = NULL;
}

static const struct claas_handler heard[] = {{CLAAS_MSG_JOBS_ENDED, hear}};
static const struct claas_actor_class listener_class = {"scheduler",    heard, 1,
                                                        listener_start, NULL,  listener_stop};

static void question_done(struct question *question)
{
    claas_json_free(&question->body);
    claas_json_free(&question->reply);
    free(question->first);
    question->first = NULL;
}

/* Asks and waits. */
static void put(struct question *question)
{
    uint64_t one = 1;

    if (question->repeat == 0)
        question->repeat = 1;
    pthread_mutex_lock(&driver.lock);
    driver.question = question;
    assert_int_equal(write(driver.event, &one, sizeof(one)), sizeof(one));
    while (!question->done)
        pthread_cond_wait(&driver.changed, &driver.lock);
    pthread_mutex_unlock(&driver.lock);
}

__attribute__((format(printf, 3, 4))) static int ask(struct question *question, int type,
                                                     const char *format, ...)
{
    char text[8192];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    *question = (struct question){.type = type};
    assert_int_equal(claas_json_parse(text, strlen(text), sizeof(text), &question->body), 0);
    put(question);
    if (question->error)
        print_message("%s\n", question->text);
    return question->error;
}

/* --- the process ----------------------------------------------------------------------- */

struct process {
    char *data;
    claas_config_t *config;
    struct claas_storage_args args;
    claas_runtime_t *runtime;
};

static int start_process(struct process *process)
{
    CLAAS_AUTO_FREE char *data = claas_format("data=%s", process->data);
    const char *overrides[] = {data, "feedback.queue_max=1000000"};
    int rc = claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &process->config);

    process->args = (struct claas_storage_args){process->config};
    if (rc == 0)
        rc = claas_runtime_new(process->config, &process->runtime);
    if (rc == 0)
        rc = claas_runtime_start(process->runtime, &claas_storage_class, "storage", &process->args);
    if (rc == 0)
        rc = claas_runtime_start(process->runtime, &driver_class, "driver", NULL);
    if (rc == 0)
        rc = claas_runtime_start(process->runtime, &listener_class, "scheduler", NULL);
    return rc;
}

static void stop_process(struct process *process)
{
    claas_runtime_free(&process->runtime);
    claas_config_free(&process->config);
}

static int set_up(void **ret)
{
    struct process *process = CLAAS_NEW(struct process);

    process->data = fixture_directory();
    *ret = process;
    if (start_process(process) == 0)
        return 0;
    fprintf(stderr, "%s\n", claas_error_text());
    return -1;
}

static int tear_down(void **ret)
{
    struct process *process = *ret;

    stop_process(process);
    fixture_remove(&process->data);
    free(process);
    return 0;
}

static const char *text_of(const cJSON *object, const char *key)
{
    const char *text = "(absent)";

    claas_json_get_string(object, key, &text);
    return text;
}

static void make_adapter(struct process *process)
{
    CLAAS_AUTO_FREE char *staged = fixture_stage(process->data, "new", 0.0f, true);
    CLAAS_AUTO(question_done) struct question question;

    assert_int_equal(ask(&question, CLAAS_MSG_VERSION_PUBLISH,
                         "{\"lora_id\":\"u/a\",\"parent\":-1,\"directory\":\"%s\",\"job_ids\":[]}",
                         staged),
                     0);
}

static void make_rollout(void)
{
    static const int32_t prompt[] = {11, 12}, response[] = {13, 14};
    static const float logprobs[] = {-1, -2};
    static const struct claas_attachment parts[] = {
        {prompt, sizeof(prompt)}, {response, sizeof(response)}, {logprobs, sizeof(logprobs)}};
    static const char body[] =
        "{\"id\":\"r\",\"messages\":[{\"role\":\"user\",\"content\":\"q\"}],\"sampling\":{},"
        "\"choices\":[{\"index\":0,\"text\":\"t\",\"raw\":\"t\",\"finish_reason\":\"stop\"}]}";
    CLAAS_AUTO(question_done)
    struct question question = {
        .type = CLAAS_MSG_ROLLOUT_PUT, .attachments = parts, .attachment_count = 3};

    assert_int_equal(claas_json_parse(body, strlen(body), sizeof(body), &question.body), 0);
    put(&question);
    assert_int_equal(question.error, 0);
}

#define FEEDBACK                                                                                   \
    "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"%s\",\"feedback\":\"be kind\"}]}"

static void test_life(void **ret)
{
    struct process *process = *ret;
    struct question question;
    char job[65];

    make_adapter(process);
    make_rollout();
    assert_int_equal(ask(&question, CLAAS_MSG_FEEDBACK_PUT, FEEDBACK, "nothing"),
                     CLAAS_ERR_NOT_FOUND);
    assert_string_equal(question.text, "No completion with response_id 'nothing' for LoRA 'u/a'");
    question_done(&question);
    assert_int_equal(ask(&question, CLAAS_MSG_FEEDBACK_PUT, FEEDBACK, "r"), 0);
    snprintf(job, sizeof(job), "%s", text_of(question.reply, "job_id"));
    question_done(&question);
    assert_int_equal(
        ask(&question, CLAAS_MSG_CYCLE_INPUT, "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
        0);
    assert_int_equal(question.reply_attachments, 3);
    assert_int_equal(question.first_length, 8);
    assert_int_equal(((int32_t *)question.first)[1], 12);
    question_done(&question);
    /* Everything is there after an orderly end. */
    stop_process(process);
    assert_int_equal(start_process(process), 0);
    assert_int_equal(ask(&question, CLAAS_MSG_JOB_GET, "{\"job_id\":\"%s\"}", job), 0);
    assert_string_equal(text_of(claas_json_get(question.reply, "job"), "state"), "queued");
    question_done(&question);
}

static void test_export(void **ret)
{
    struct process *process = *ret;
    CLAAS_AUTO_FREE char *first = NULL;
    CLAAS_AUTO_FREE char *second = NULL;
    size_t first_length, second_length;
    struct question question;

    make_adapter(process);
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_EXPORT, "{\"lora_id\":\"u/none\"}"),
                     CLAAS_ERR_NOT_FOUND);
    question_done(&question);
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_EXPORT, "{\"lora_id\":\"u/a-latest\"}"), 0);
    assert_string_equal(text_of(question.reply, "lora_id"), "u/a");
    assert_int_equal(
        claas_file_read(text_of(question.reply, "path"), 1 << 20, &first, &first_length), 0);
    question_done(&question);
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_EXPORT, "{\"lora_id\":\"u/a@0\"}"), 0);
    assert_int_equal(
        claas_file_read(text_of(question.reply, "path"), 1 << 20, &second, &second_length), 0);
    assert_int_equal(first_length, second_length);
    assert_memory_equal(first, second, first_length);
    question_done(&question);
    free(CLAAS_TAKE(second));
    assert_int_equal(
        ask(&question, CLAAS_MSG_ADAPTER_EXPORT, "{\"lora_id\":\"u/a\",\"optimizer\":true}"), 0);
    assert_int_equal(
        claas_file_read(text_of(question.reply, "path"), 1 << 20, &second, &second_length), 0);
    assert_true(second_length > first_length);
    question_done(&question);
}

static int count_staged(const struct process *process)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/staging", process->data);

    return count_entries(path);
}

static void await_staged(const struct process *process, int count)
{
    for (int i = 0; i < WAIT_MS && count_staged(process) != count; i++)
        (void)poll(NULL, 0, 1);
    assert_int_equal(count_staged(process), count);
}

/* Who gives an export up leaves no zip. The weights are long enough that it is still written. */
static void test_export_given_up(void **ret)
{
    struct process *process = *ret;
    CLAAS_AUTO_FREE char *weights =
        claas_format("%s/adapters/u/a/v000000/adapter_model.safetensors", process->data);
    struct question question = {.type = CLAAS_MSG_ADAPTER_EXPORT, .give_up = true};
    struct stat info;

    make_adapter(process);
    assert_int_equal(stat(weights, &info), 0);
    assert_int_equal(truncate(weights, (off_t)512 << 20), 0);
    question.body = cJSON_CreateObject();
    claas_json_set_string(question.body, "lora_id", "u/a");
    put(&question);
    question_done(&question);
    /* Told before this is answered, and the end waits for exports. */
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_LIST, "{}"), 0);
    question_done(&question);
    stop_process(process);
    assert_int_equal(count_staged(process), 0);
    assert_int_equal(truncate(weights, info.st_size), 0);
    assert_int_equal(start_process(process), 0);
}

/* One whose asker went when its answer was on its way is swept when nobody can want it any more. */
static void test_exports_that_nobody_fetched(void **ret)
{
    struct process *process = *ret;
    CLAAS_AUTO_FREE char *old = claas_format("%s/staging/export-0.zip", process->data);
    CLAAS_AUTO_FREE char *other = claas_format("%s/staging/upload-0.zip", process->data);
    struct timespec times[2] = {{.tv_sec = time(NULL) - 3600}, {.tv_sec = time(NULL) - 3600}};
    struct question question;

    make_adapter(process);
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_EXPORT, "{\"lora_id\":\"u/a\"}"), 0);
    assert_int_equal(claas_file_write(other, "x", 1), 0);
    assert_int_equal(utimensat(AT_FDCWD, other, times, 0), 0);
    assert_int_equal(claas_file_write(old, "x", 1), 0);
    assert_int_equal(utimensat(AT_FDCWD, old, times, 0), 0);
    await_staged(process, 2);
    assert_int_equal(access(other, F_OK), 0);
    assert_int_equal(access(text_of(question.reply, "path"), F_OK), 0);
    question_done(&question);
}

/* An adapter's end is its jobs' end: the scheduler is told, once it is durable. */
static void test_scheduler_is_told(void **ret)
{
    struct process *process = *ret;
    struct question question;

    for (int i = 0; i < 2; i++) {
        make_adapter(process);
        if (i == 0)
            make_rollout();
        assert_int_equal(ask(&question, CLAAS_MSG_FEEDBACK_PUT, FEEDBACK, "r"), 0);
        question_done(&question);
        assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_DELETE, "{\"lora_id\":\"u/a\"}"), 0);
        question_done(&question);
        for (int ms = 0; ms < WAIT_MS && atomic_load(&told) <= i; ms++)
            (void)poll(NULL, 0, 1);
        assert_int_equal(atomic_load(&told), i + 1);
    }
    /* No jobs, no word. */
    make_adapter(process);
    assert_int_equal(ask(&question, CLAAS_MSG_ADAPTER_DELETE, "{\"lora_id\":\"u/a\"}"), 0);
    question_done(&question);
    assert_int_equal(ask(&question, CLAAS_MSG_JOBS_UNFINISHED, "{}"), 0);
    assert_int_equal(cJSON_GetArraySize(claas_json_get(question.reply, "jobs")), 0);
    question_done(&question);
    assert_int_equal(atomic_load(&told), 2);
}

/* Page by page, none twice: they come in order. */
static void count_unfinished(int wanted)
{
    char after[80] = "null";
    int count = 0, page;

    do {
        CLAAS_AUTO(question_done) struct question list;
        const cJSON *jobs;
        const char *id = NULL;

        assert_int_equal(
            ask(&list, CLAAS_MSG_JOBS_UNFINISHED, "{\"limit\":600,\"after\":%s}", after), 0);
        jobs = claas_json_get(list.reply, "jobs");
        page = cJSON_GetArraySize(jobs);
        assert_true(page <= 600);
        count += page;
        claas_json_get_string(cJSON_GetArrayItem(jobs, page - 1), "job_id", &id);
        if (id)
            snprintf(after, sizeof(after), "\"%s\"", id);
    } while (page == 600);
    assert_int_equal(count, wanted);
}

/* Groups under one commit, each request acknowledged once, and the rate. */
static void test_flood(void **ret)
{
    struct process *process = *ret;
    CLAAS_AUTO(question_done)
    struct question flood = {.type = CLAAS_MSG_FEEDBACK_PUT, .repeat = FLOOD};
    double commits, seconds;
    char text[256];
    int64_t start;

    make_adapter(process);
    make_rollout();
    commits = claas_metric_value(CLAAS_METRIC_STORAGE_COMMITS);
    snprintf(text, sizeof(text), FEEDBACK, "r");
    assert_int_equal(claas_json_parse(text, strlen(text), sizeof(text), &flood.body), 0);
    start = claas_clock_ns();
    put(&flood);
    seconds = (double)(claas_clock_ns() - start) * 1e-9;
    commits = claas_metric_value(CLAAS_METRIC_STORAGE_COMMITS) - commits;
    assert_int_equal(flood.ended, FLOOD);
    assert_int_equal(flood.failed, 0);
    assert_true(commits >= 1 && commits < FLOOD);
    print_message("%d producers: %.0f feedbacks/s acknowledged, %.1f per commit\n", PRODUCERS,
                  FLOOD / seconds, FLOOD / commits);
    count_unfinished(FLOOD);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_life, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_export, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_export_given_up, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_exports_that_nobody_fetched, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_scheduler_is_told, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_flood, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
