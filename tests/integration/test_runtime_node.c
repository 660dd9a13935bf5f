/* Two processes: this one is the main node; the children run this program again as nodes that join
 * it.
 *
 *   test_runtime_node                       the tests
 *   test_runtime_node node DIR NAME ACTOR   a node with one answering actor, until SIGTERM; its
 * counters go to DIR/NAME.sum test_runtime_node main DIR              a main node with "storage",
 * until SIGTERM */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* --- the child ---------------------------------------------------------------------------------
 */

static int run_child(const char *dir, const char *connect_to, const char *name, const char *actor)
{
    char data[128], connect[160] = "connect=", node[80];
    const char *overrides[] = {data, connect, node};
    claas_config_t *config = NULL;
    claas_runtime_t *runtime = NULL;
    struct probe *probe = probe_new();

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(data, sizeof(data), "data=%s", dir);
    if (connect_to)
        snprintf(connect, sizeof(connect), "connect=ipc://%s/claas.ipc", connect_to);
    snprintf(node, sizeof(node), "node_name=%s", name);
    int rc = claas_config_load(NULL, overrides, 3, &config);
    if (rc == 0)
        rc = claas_runtime_new(config, &runtime);
    if (rc == 0)
        rc = claas_runtime_start(runtime, &fake_class, actor, probe);
    if (rc == 0)
        claas_runtime_wait(runtime);
    claas_runtime_free(&runtime);
    snprintf(data, sizeof(data), "%s/%s.sum", dir, name);
    FILE *file = rc == 0 ? fopen(data, "w") : NULL;
    if (file) {
        fprintf(file, "%.17g\n", messages_unaccounted());
        fclose(file);
    }
    claas_config_free(&config);
    probe_free(&probe);
    return rc == 0 ? 0 : 3;
}

static pid_t spawn(const char *verb, const char *dir, const char *name, const char *actor)
{
    char *arguments[] = {
        (char *)"test_runtime_node", (char *)verb, (char *)dir, (char *)name, (char *)actor, NULL};
    pid_t pid;

    assert_int_equal(posix_spawn(&pid, "/proc/self/exe", NULL, NULL, arguments, environ), 0);
    return pid;
}

static int end_child(pid_t pid, int signal_number)
{
    int status = 0;

    kill(pid, signal_number);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

/* --- this process ------------------------------------------------------------------------------
 */

static int set_up(void **state)
{
    struct fixture *fixture = CLAAS_NEW(struct fixture);

    fixture_new(fixture, NULL);
    fixture_start(fixture);
    *state = fixture;
    return 0;
}

static int tear_down(void **state)
{
    fixture_free(*state);
    free(*state);
    return 0;
}

static struct question list_question(const char *to, const char *prefix)
{
    return (struct question){
        .to = to, .prefix = prefix, .type = CLAAS_MSG_ADAPTER_LIST, .timeout_ms = 9000};
}

/* Asks until somebody is there: joining takes as long as a process start. */
static void await_actor(struct fixture *fixture, const char *name)
{
    int64_t until = claas_clock_ms() + 10000;
    int rc;

    do {
        struct question question = list_question(name, "");

        rc = probe_call(fixture->probe, &question);
        if (rc == CLAAS_ERR_UNAVAILABLE)
            poll(NULL, 0, 5);
    } while (rc == CLAAS_ERR_UNAVAILABLE && claas_clock_ms() < until);
    assert_int_equal(rc, 0);
}

static double child_sum(const struct fixture *fixture, const char *name)
{
    char path[128];
    double sum = 1e9;

    snprintf(path, sizeof(path), "%s/%s.sum", fixture->dir, name);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%lf", &sum), 1);
    fclose(file);
    return sum;
}

/* Over all processes every message sent has one end: what this process sent and did not end is what
 * the other one ended and did not send. */
static void ask_a_node(void **state)
{
    struct fixture *fixture = *state;
    pid_t pid = spawn("node", fixture->dir, "second", "other");

    await_actor(fixture, "other");
    struct question question = list_question("other", "");
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_string_equal(question.reply, "{\"adapters\":[\"other\"]}");
    question = list_question("other", "fail");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_NOT_FOUND);
    question = (struct question){.to = "other", .type = CLAAS_MSG_FEEDBACK, .timeout_ms = 9000};
    question.body = cJSON_CreateObject();
    cJSON_AddItemToArray(claas_json_set(question.body, "requests", cJSON_CreateArray()),
                         cJSON_CreateObject());
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    assert_int_equal(question.progress, 3);
    question = list_question("other", "later");
    question.timeout_ms = 10;
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_DEADLINE);

    /* 200 at once, in both directions: the node's actor asks "storage" here. */
    struct question many[200];
    for (int i = 0; i < 200; i++) {
        many[i] = list_question("other", "principal");
        probe_ask(fixture->probe, &many[i]);
    }
    for (int i = 0; i < 200; i++) {
        probe_await(fixture->probe, &many[i]);
        assert_int_equal(many[i].code, 0);
    }
    int status = end_child(pid, SIGTERM);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_true(messages_unaccounted() + child_sum(fixture, "second") == 0);
    /* For fixture_free: what ended in the other process. */
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
    question = list_question("other", "");
    assert_int_equal(probe_call(fixture->probe, &question), CLAAS_ERR_UNAVAILABLE);
}

static void killed_node(void **state)
{
    struct fixture *fixture = *state;
    pid_t pid = spawn("node", fixture->dir, "second", "other");
    struct question pending = list_question("other", "never");

    await_actor(fixture, "other");
    probe_ask(fixture->probe, &pending);
    struct question after = list_question("other", "");
    assert_int_equal(probe_call(fixture->probe, &after), 0);
    int64_t before = claas_clock_ms();
    end_child(pid, SIGKILL);
    probe_await(fixture->probe, &pending);
    assert_int_equal(pending.code, CLAAS_ERR_UNAVAILABLE);
    assert_true(claas_clock_ms() - before < 4500);
    after = list_question("other", "");
    assert_int_equal(probe_call(fixture->probe, &after), CLAAS_ERR_UNAVAILABLE);
    /* It comes back under the same name. */
    pid = spawn("node", fixture->dir, "second", "other");
    await_actor(fixture, "other");
    end_child(pid, SIGTERM);
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
}

/* A node that stands still is noticed by its silence, and is taken in again when it goes on. */
static void frozen_node(void **state)
{
    struct fixture *fixture = *state;
    pid_t pid = spawn("node", fixture->dir, "second", "other");
    struct question pending = list_question("other", "never");

    await_actor(fixture, "other");
    probe_ask(fixture->probe, &pending);
    kill(pid, SIGSTOP);
    int64_t before = claas_clock_ms();
    probe_await(fixture->probe, &pending);
    assert_int_equal(pending.code, CLAAS_ERR_UNAVAILABLE);
    assert_true(claas_clock_ms() - before < 5500);
    kill(pid, SIGCONT);
    await_actor(fixture, "other");
    end_child(pid, SIGTERM);
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
}

/* An actor that dies on the node ends what was asked of it, and comes back. */
static void restart_on_the_node(void **state)
{
    struct fixture *fixture = *state;
    pid_t pid = spawn("node", fixture->dir, "second", "other");
    struct question pending = list_question("other", "never");
    struct question killer = list_question("other", "die");

    await_actor(fixture, "other");
    probe_ask(fixture->probe, &pending);
    assert_int_equal(probe_call(fixture->probe, &killer), CLAAS_ERR_UNAVAILABLE);
    probe_await(fixture->probe, &pending);
    assert_int_equal(pending.code, CLAAS_ERR_UNAVAILABLE);
    await_actor(fixture, "other");
    end_child(pid, SIGTERM);
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
}

static void write_token(const struct fixture *node, const char *token)
{
    char path[128];

    snprintf(path, sizeof(path), "%s/keys", node->dir);
    assert_int_equal(claas_mkdir_all(path), 0);
    snprintf(path, sizeof(path), "%s/keys/node.token", node->dir);
    assert_int_equal(claas_file_write(path, token, strlen(token)), 0);
}

/* Nodes of one host share the data directory; here each has its own, with a copy of the token. */
static void share_token(const struct fixture *from, const struct fixture *to)
{
    int64_t until = claas_clock_ms() + 10000;
    CLAAS_AUTO_FREE char *token = NULL;
    char path[128];

    snprintf(path, sizeof(path), "%s/keys/node.token", from->dir);
    while (claas_file_read(path, 1024, &token, NULL) < 0 && claas_clock_ms() < until)
        poll(NULL, 0, 5);
    assert_non_null(token);
    write_token(to, token);
}

/* This process as the node; the main node is the child, is killed, and comes back. */
static void main_node_comes_back(void **state)
{
    struct fixture main_node, node;
    char connect[128];

    fixture_new(&main_node, NULL);
    pid_t pid = spawn("main", main_node.dir, "main", "storage");
    snprintf(connect, sizeof(connect), "connect=ipc://%s/claas.ipc", main_node.dir);
    fixture_new(&node, connect);
    share_token(&main_node, &node);
    if (claas_runtime_new(node.config, &node.runtime) < 0)
        fail_msg("%s", claas_error_text());
    assert_int_equal(claas_runtime_start(node.runtime, &driver_class, "driver", node.probe), 0);
    await_actor(&node, "storage");
    struct question pending = list_question("storage", "never");
    probe_ask(node.probe, &pending);
    int64_t before = claas_clock_ms();
    end_child(pid, SIGKILL);
    probe_await(node.probe, &pending);
    assert_int_equal(pending.code, CLAAS_ERR_UNAVAILABLE);
    assert_true(claas_clock_ms() - before < 4500);
    pid = spawn("main", main_node.dir, "main", "storage");
    await_actor(&node, "storage");
    end_child(pid, SIGTERM);
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
    fixture_free(&node);
    fixture_free(&main_node);
}

/* A node's actor cannot have a name that the main node has, nor the other way round. */
static void name_in_use(void **state)
{
    struct fixture *fixture = *state;
    pid_t pid = spawn("node", fixture->dir, "second", "storage");
    int status = 0;

    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 3);
    struct question question = list_question("storage", "");
    assert_int_equal(probe_call(fixture->probe, &question), 0);
    pid = spawn("node", fixture->dir, "second", "other");
    await_actor(fixture, "other");
    assert_int_equal(claas_runtime_start(fixture->runtime, &fake_class, "other", fixture->probe),
                     CLAAS_ERR_EXISTS);
    assert_string_equal(claas_error_text(), "other: other is an actor of node second already");
    end_child(pid, SIGTERM);
    claas_metric_add(CLAAS_METRIC_MESSAGES_HANDLED, messages_unaccounted());
}

static void wrong_token(void **state)
{
    struct fixture *fixture = *state;
    struct fixture node;
    char connect[128];

    snprintf(connect, sizeof(connect), "connect=ipc://%s/claas.ipc", fixture->dir);
    fixture_new(&node, connect);
    write_token(&node, "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef");
    assert_int_equal(claas_runtime_new(node.config, &node.runtime), CLAAS_ERR_DENIED);
    assert_non_null(strstr(claas_error_text(), "the node token is missing or wrong"));
    fixture_free(&node);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        TEST(ask_a_node),
        TEST(killed_node),
        TEST(frozen_node),
        TEST(restart_on_the_node),
        cmocka_unit_test(main_node_comes_back),
        TEST(name_in_use),
        TEST(wrong_token),
    };
    sigset_t ends;

    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    claas_log_setup(getenv("CLAAS_TEST_LOG") ? CLAAS_LOG_INFO : CLAAS_LOG_ERROR, "text");
    if (argc == 5)
        return run_child(argv[2], strcmp(argv[1], "node") == 0 ? argv[2] : NULL, argv[3], argv[4]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
