/* The runtime in one process: asking in all its ways, limits, failures, restarts, drain. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"
#include "supervisor.h"

#include "claas/client.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <signal.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct question list_question(const char *to, const char *prefix)
{
    return (struct question){
        .to = to, .prefix = prefix, .type = CLAAS_MSG_ADAPTER_LIST, .timeout_ms = 8000};
}

static int set_up(void **state)
{
    struct fixture *fixture = CLAAS_NEW(struct fixture);

    fixture_new(fixture, NULL);
    fixture_start(fixture);
    *state = fixture;
    return 0;
}

static int set_up_small(void **state)
{
    struct fixture *fixture = CLAAS_NEW(struct fixture);

    fixture_new(fixture, "runtime.mailbox=16");
    fixture_start(fixture);
    *state = fixture;
    return 0;
}

static struct supervisor_limits usual_limits;

static int set_up_impatient(void **state)
{
    usual_limits = supervisor_limits;
    supervisor_limits = (struct supervisor_limits){.backoff_min_ms = 1,
                                                   .backoff_max_ms = 1,
                                                   .restarts_max = 3,
                                                   .window_ms = 60000,
                                                   .poke_ms = 5,
                                                   .slow_ms = 500,
                                                   .stuck_ms = 1000,
                                                   .stop_ms = usual_limits.stop_ms};
    return set_up(state);
}

static int tear_down(void **state)
{
    fixture_free(*state);
    free(*state);
    return 0;
}

static int tear_down_impatient(void **state)
{
    int rc = tear_down(state);

    supervisor_limits = usual_limits;
    return rc;
}

/* Returns when the switch has dealt with all that the driver sent before: a link keeps its order.
 */
static void pass_the_switch(struct fixture *fixture)
{
    struct question question = {.to = "switch", .type = CLAAS_MSG_STATUS, .timeout_ms = 8000};

    assert_int_equal(probe_call(fixture->probe, &question), 0);
}

/* --- asking ------------------------------------------------------------------------------------
 */

static void ask_and_reply(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("storage", "");

    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_string_equal(question.reply, "{\"adapters\":[\"storage\"]}");
    question = list_question("storage", "later");
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_string_equal(question.reply, "{\"adapters\":[\"later\"]}");
    question = list_question("storage", "fail");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_NOT_FOUND);
    assert_string_equal(question.text, "no such adapter");
}

static void progress_then_reply(void **state)
{
    struct fixture *fixture = *state;
    struct question question = {.to = "storage", .type = CLAAS_MSG_FEEDBACK, .timeout_ms = 8000};
    cJSON *requests = cJSON_CreateArray();

    cJSON_AddItemToArray(requests, cJSON_CreateObject());
    question.body = cJSON_CreateObject();
    claas_json_set(question.body, "requests", requests);
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_int_equal(question.progress, 3);
    assert_int_equal(question.ends, 1);
    assert_string_equal(question.reply, "{\"job_id\":\"job-1\"}");
}

static void attachments_there_and_back(void **state)
{
    struct fixture *fixture = *state;
    float small[3] = {1, 2, 3};
    float *large = CLAAS_NEW_ARRAY(float, 1 << 20);
    struct claas_attachment attachments[3] = {
        {small, sizeof(small)}, {NULL, 0}, {large, sizeof(float) << 20}};
    struct question question = {.to = "storage",
                                .type = CLAAS_MSG_ROLLOUT_PUT,
                                .timeout_ms = 8000,
                                .attachments = attachments,
                                .attachment_count = 3};

    for (int i = 0; i < 1 << 20; i++)
        large[i] = 0.5f;
    question.body = cJSON_CreateObject();
    claas_json_set_string(question.body, "id", "r1");
    claas_json_set(question.body, "sampling", cJSON_CreateObject());
    cJSON *choices = claas_json_set(question.body, "choices", cJSON_CreateArray());
    cJSON_AddItemToArray(choices, cJSON_CreateObject());
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_true(question.attachment_sum == 6 + 524288.0);
    free(large);
}

static void refused_before_sending(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("storage", "");

    question.timeout_ms = 0;
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_DEADLINE);
    question = list_question("not a name", "");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_INVALID);
    question = list_question("storage", NULL);
    question.type = CLAAS_MSG_JOB_GET; /* needs job_id */
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_INVALID);
    assert_string_equal(question.text, "'job_id' is missing");
    char *long_prefix = CLAAS_NEW_ARRAY(char, 5001);
    memset(long_prefix, 'x', 5000);
    question = list_question("storage", "");
    question.body = cJSON_CreateObject();
    claas_json_set_string(question.body, "padding", long_prefix);
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_TOO_LARGE);
    free(long_prefix);
}

static void refused_by_switch_or_actor(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("nobody", "");

    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_UNAVAILABLE);
    assert_string_equal(question.text, "there is no actor nobody");
    question = list_question("driver", "");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_UNSUPPORTED);
    question = list_question("storage", "wrong");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_INTERNAL);
    assert_string_equal(question.text, "a wrong answer of storage: 'adapters' is missing");
}

static void deadline_and_late_reply(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("storage", "later");
    double late = claas_metric_value(CLAAS_METRIC_REPLIES_LATE);

    question.timeout_ms = 10;
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_DEADLINE);
    assert_int_equal(question.ends, 1);
    probe_await_count(fixture->probe, "cancels", 1);
    probe_await_count(fixture->probe, "late", 1);
    /* Links keep their order: this answer comes after the late one. */
    question = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_true(claas_metric_value(CLAAS_METRIC_REPLIES_LATE) == late + 1);
}

static void cancel(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("storage", "never");

    probe_ask(fixture->probe, &question);
    probe_await_count(fixture->probe, "kept", 1);
    probe_cancel(fixture->probe, &question);
    probe_await_count(fixture->probe, "cancels", 1);
    assert_int_equal(question.ends, 0);
    struct question next = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &next), 0);
    assert_int_equal(question.ends, 0);
}

static void tell(void **state)
{
    struct fixture *fixture = *state;
    struct question question = list_question("storage", "");

    question.is_tell = true;
    probe_ask(fixture->probe, &question);
    assert_int_equal(question.sent, 0);
    probe_await_count(fixture->probe, "handled", 1);
    question.to = "nobody"; /* a dead letter, counted by fixture_free */
    probe_ask(fixture->probe, &question);
    assert_int_equal(question.sent, 0);
}

static void status_of_all(void **state)
{
    struct fixture *fixture = *state;
    struct question question = {.to = "storage", .type = CLAAS_MSG_STATUS, .timeout_ms = 8000};

    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"actor\":\"storage\",\"incarnation\":\""));
    question = (struct question){.to = "switch", .type = CLAAS_MSG_STATUS, .timeout_ms = 8000};
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"actor\":\"driver\""));
}

/* "storage" finds storage.N when there is no actor of just that name. */
static void any_of_a_kind(void **state)
{
    struct fixture *fixture = *state;
    bool seen[2] = {false, false};

    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other.0", fixture->probe),
                     0);
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other.1", fixture->probe),
                     0);
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other.1", fixture->probe),
                     CLAAS_ERR_EXISTS);
    for (int i = 0; i < 16; i++) {
        struct question question = list_question("other", "");

        assert_int_equal(probe_call(fixture->probe, &question), 0);
        seen[strcmp(question.reply, "{\"adapters\":[\"other.1\"]}") == 0] = true;
    }
    assert_true(seen[0] && seen[1]);
    struct question chain = list_question("storage", "ask");
    assert_int_equal(probe_call(fixture->probe, &chain), 0);
}

/* --- limits ------------------------------------------------------------------------------------
 */

static void overload(void **state)
{
    struct fixture *fixture = *state;
    struct question blocker = list_question("storage", "block");
    struct question flood[40];
    int refused = 0, answered = 0;

    probe_ask(fixture->probe, &blocker);
    probe_await_count(fixture->probe, "blocked", 1);
    for (int i = 0; i < 40; i++) {
        flood[i] = list_question("storage", "");
        probe_ask(fixture->probe, &flood[i]);
    }
    /* The blocking one counts as waiting until its handler returns: 15 places are left of 16. */
    for (int i = 15; i < 40; i++) {
        probe_await(fixture->probe, &flood[i]);
        assert_int_equal(flood[i].code, CLAAS_ERR_OVERLOADED);
    }
    probe_release(fixture->probe);
    for (int i = 0; i < 40; i++) {
        probe_await(fixture->probe, &flood[i]);
        refused += flood[i].code == CLAAS_ERR_OVERLOADED;
        answered += flood[i].code == 0;
    }
    assert_int_equal(refused, 25);
    assert_int_equal(answered, 15);
    probe_await(fixture->probe, &blocker);
    struct question after = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &after), 0);
}

/* Time spent in the mailbox counts. */
static void expired_in_the_mailbox(void **state)
{
    struct fixture *fixture = *state;
    struct question blocker = list_question("storage", "block");
    struct question late = list_question("storage", ""), wait = list_question("other", "never");
    double expired = claas_metric_value(CLAAS_METRIC_MESSAGES_EXPIRED);

    probe_ask(fixture->probe, &blocker);
    probe_await_count(fixture->probe, "blocked", 1);
    late.timeout_ms = 20;
    probe_ask(fixture->probe, &late);
    pass_the_switch(fixture);
    /* Its time runs from its arrival; this one's starts later and is longer. */
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other", fixture->probe),
                     0);
    wait.timeout_ms = 60;
    assert_int_equal(probe_call(fixture->probe, &wait), CLAAS_ERR_DEADLINE);
    probe_await(fixture->probe, &late);
    assert_int_equal(late.code, CLAAS_ERR_DEADLINE);
    probe_release(fixture->probe);
    probe_await(fixture->probe, &blocker);
    struct question after = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &after), 0);
    assert_true(claas_metric_value(CLAAS_METRIC_MESSAGES_EXPIRED) == expired + 1);
    assert_int_equal(probe_count(fixture->probe, "handled"), 3);
}

/* --- failure and restart -------------------------------------------------------------------------
 */

static void restart_ends_pending_asks(void **state)
{
    struct fixture *fixture = *state;
    struct question pending = list_question("storage", "never");
    struct question killer = list_question("storage", "die");
    double restarts = claas_metric_value(CLAAS_METRIC_ACTOR_RESTARTS);

    probe_ask(fixture->probe, &pending);
    probe_await_count(fixture->probe, "kept", 1);
    assert_int_equal(probe_call(fixture->probe, &killer), CLAAS_ERR_UNAVAILABLE);
    probe_await(fixture->probe, &pending);
    assert_int_equal(pending.code, CLAAS_ERR_UNAVAILABLE);
    assert_string_equal(pending.text, "storage went away");
    probe_await_count(fixture->probe, "stops", 1);
    probe_await_count(fixture->probe, "starts", 2);
    int rc;
    do { /* ready is a moment later than started */
        struct question after = list_question("storage", "");

        rc = probe_call(fixture->probe, &after);
    } while (rc == CLAAS_ERR_UNAVAILABLE);
    assert_int_equal(rc, 0);
    assert_true(claas_metric_value(CLAAS_METRIC_ACTOR_RESTARTS) == restarts + 1);
}

static void mailbox_of_the_dead_is_lost(void **state)
{
    struct fixture *fixture = *state;
    struct question blocker = list_question("storage", "block");
    struct question killer = list_question("storage", "die");
    struct question waiting[5];
    double lost = claas_metric_value(CLAAS_METRIC_MESSAGES_LOST);

    probe_ask(fixture->probe, &blocker);
    probe_await_count(fixture->probe, "blocked", 1);
    probe_ask(fixture->probe, &killer);
    for (int i = 0; i < 5; i++) {
        waiting[i] = list_question("storage", "");
        probe_ask(fixture->probe, &waiting[i]);
    }
    pass_the_switch(fixture);
    probe_release(fixture->probe);
    for (int i = 0; i < 5; i++) {
        probe_await(fixture->probe, &waiting[i]);
        assert_int_equal(waiting[i].code, CLAAS_ERR_UNAVAILABLE);
    }
    assert_true(claas_metric_value(CLAAS_METRIC_MESSAGES_LOST) == lost + 5);
}

static void failing_start(void **state)
{
    struct fixture *fixture = *state;
    struct question killer = list_question("storage", "die");

    probe_fail_starts(fixture->probe, 1);
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other", fixture->probe),
                     CLAAS_ERR_IO);
    assert_string_equal(claas_error_text(), "other: cannot start yet");
    /* The name is free again, and a restart that fails is tried again. */
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other", fixture->probe),
                     0);
    probe_fail_starts(fixture->probe, 2);
    probe_call(fixture->probe, &killer);
    probe_await_count(fixture->probe, "starts", 3);
}

/* Restarting that does not help ends the wait for signals with the reason. */
static void restarted_too_often(void **state)
{
    struct fixture *fixture = *state;
    struct question killer = list_question("storage", "die");

    probe_fail_starts(fixture->probe, 100);
    probe_call(fixture->probe, &killer);
    assert_int_equal(claas_runtime_wait(fixture->runtime), CLAAS_ERR_IO);
    assert_string_equal(claas_error_text(), "storage failed again and again: cannot start yet");
}

static void stuck_actor(void **state)
{
    struct fixture *fixture = *state;
    struct question blocker = list_question("storage", "block");

    probe_ask(fixture->probe, &blocker);
    assert_int_equal(claas_runtime_wait(fixture->runtime), CLAAS_ERR_INTERNAL);
    assert_non_null(strstr(claas_error_text(), "storage is stuck"));
    probe_release(fixture->probe);
    probe_await(fixture->probe, &blocker);
    assert_int_equal(blocker.code, 0);
}

/* --- the end -------------------------------------------------------------------------------------
 */

static void *finish_soon(void *arg)
{
    struct probe *probe = arg;

    probe_await_count(probe, "drains", 3);
    probe_finish_drain(probe);
    return NULL;
}

static void drain_waits_for_work(void **state)
{
    struct fixture *fixture = *state;
    pthread_t thread;

    probe_hold_drain(fixture->probe);
    pthread_create(&thread, NULL, finish_soon, fixture->probe);
    claas_runtime_free(&fixture->runtime);
    pthread_join(thread, NULL);
    assert_true(probe_count(fixture->probe, "drains") >= 3);
    assert_int_equal(probe_count(fixture->probe, "stops"), 1);
}

static void second_signal_cuts_drain(void **state)
{
    struct fixture *fixture = *state;
    int64_t before = claas_clock_ms();

    probe_hold_drain(fixture->probe);
    kill(getpid(), SIGTERM);
    assert_int_equal(claas_runtime_wait(fixture->runtime), 0);
    kill(getpid(), SIGTERM);
    claas_runtime_free(&fixture->runtime);
    assert_true(claas_clock_ms() - before < 5000);
    assert_int_equal(probe_count(fixture->probe, "stops"), 1);
}

static void stop_ends_asks(void **state)
{
    struct fixture *fixture = *state;
    struct question pending = list_question("storage", "never");

    probe_ask(fixture->probe, &pending);
    probe_await_count(fixture->probe, "kept", 1);
    claas_runtime_free(&fixture->runtime);
    assert_int_equal(pending.ends, 1);
    assert_int_equal(pending.code, CLAAS_ERR_CANCELLED);
}

/* A process whose actor works on when its time to stop is over: 0 if that is told, so that nobody
 * frees what it uses. Nothing else can come after it. */
static int end_with_an_actor_at_work(void)
{
    struct question blocker = list_question("storage", "block");
    struct fixture fixture;
    bool is_clean;

    supervisor_limits.stop_ms = 50;
    fixture_new(&fixture, NULL);
    fixture_start(&fixture);
    probe_ask(fixture.probe, &blocker);
    probe_await_count(fixture.probe, "blocked", 1);
    kill(getpid(), SIGTERM); /* cuts the drain short */
    is_clean = claas_runtime_free(&fixture.runtime);
    return is_clean || fixture.runtime || claas_remove_all(fixture.dir) < 0;
}

/* In a child, and before there is any thread: libzmq does not work on in a fork. */
static void actor_that_does_not_stop(void **state)
{
    pid_t child = fork();
    int status;

    assert_true(child >= 0);
    if (child == 0)
        _exit(end_with_an_actor_at_work());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void one_runtime_per_directory(void **state)
{
    struct fixture *fixture = *state;
    claas_runtime_t *second = NULL;
    struct stat status;
    char path[128];

    assert_int_equal(claas_runtime_new(fixture->config, &second), CLAAS_ERR_BUSY);
    assert_null(second);
    snprintf(path, sizeof(path), "%s/claas.ipc", fixture->dir);
    assert_int_equal(stat(path, &status), 0);
    assert_int_equal(status.st_mode & 0777, 0600);
    snprintf(path, sizeof(path), "%s/keys/node.token", fixture->dir);
    assert_int_equal(stat(path, &status), 0);
    assert_int_equal(status.st_mode & 0777, 0600);
    /* A file left by a server that was killed is replaced. */
    claas_runtime_free(&fixture->runtime);
    fixture_start(fixture);
    struct question question = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &question), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name)       cmocka_unit_test_setup_teardown(name, set_up, tear_down)
#define TEST_SMALL(name) cmocka_unit_test_setup_teardown(name, set_up_small, tear_down)
#define TEST_IMPATIENT(name)                                                                       \
    cmocka_unit_test_setup_teardown(name, set_up_impatient, tear_down_impatient)
        cmocka_unit_test(actor_that_does_not_stop), /* the first: see there */
        TEST(ask_and_reply),
        TEST(progress_then_reply),
        TEST(attachments_there_and_back),
        TEST(refused_before_sending),
        TEST(refused_by_switch_or_actor),
        TEST(deadline_and_late_reply),
        TEST(cancel),
        TEST(tell),
        TEST(status_of_all),
        TEST(any_of_a_kind),
        TEST_SMALL(overload),
        TEST(expired_in_the_mailbox),
        TEST(restart_ends_pending_asks),
        TEST(mailbox_of_the_dead_is_lost),
        TEST(failing_start),
        TEST_IMPATIENT(restarted_too_often),
        TEST_IMPATIENT(stuck_actor),
        TEST(drain_waits_for_work),
        TEST(second_signal_cuts_drain),
        TEST(stop_ends_asks),
        TEST(one_runtime_per_directory),
    };
    sigset_t ends;

    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    claas_log_setup(CLAAS_LOG_WARNING, "text");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
