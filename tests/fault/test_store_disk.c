/* A disk that fails for a moment. In a read: nothing is damaged for that. In the commit of a
 * publication, when its pages are in SQLite's log already: nobody was told of a success, but a
 * start after a crash finds the commit there. Whichever of the two a start sees, the current
 * version is whole. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "../unit/storage_fixture.h"
#include "adapter_files.h"

#define ENDED  42 /* exit statuses of the child */
#define FAILED 43

static struct {
    int failing;       /* syncs of the log, from now on */
    int left;          /* syncs of whatever, after those, until the process ends; -1: it goes on */
    const char *blind; /* files with this in their path cannot be read; NULL: all can */
    const char *read_only; /* a file that cannot be opened for writing */
} disk = {0, -1, NULL, NULL};

static void count_sync(void)
{
    if (disk.failing == 0 && disk.left >= 0 && disk.left-- == 0)
        _exit(ENDED);
}

/* These stand in for the C library's, for SQLite too. */
__attribute__((visibility("default"))) int fdatasync(int fd)
{
    count_sync();
    if (disk.failing == 0)
        return (int)syscall(SYS_fdatasync, fd);
    disk.failing--;
    errno = EIO;
    return -1;
}

__attribute__((visibility("default"))) int fsync(int fd)
{
    count_sync();
    return (int)syscall(SYS_fsync, fd);
}

__attribute__((visibility("default"))) ssize_t pread64(int fd, void *bytes, size_t length,
                                                       off64_t at)
{
    CLAAS_AUTO_FREE char *link = claas_format("/proc/self/fd/%d", fd);
    char path[4096] = "";

    if (!disk.blind || readlink(link, path, sizeof(path) - 1) < 0 || !strstr(path, disk.blind))
        return syscall(SYS_pread64, fd, bytes, length, at);
    errno = EIO;
    return -1;
}

__attribute__((visibility("default"))) int open64(const char *path, int flags, ...)
{
    const char *name = strrchr(path, '/');
    mode_t mode = 0;
    va_list args;

    va_start(args, flags);
    if (flags & O_CREAT)
        mode = va_arg(args, mode_t);
    va_end(args);
    if (!disk.read_only || !name || strcmp(name + 1, disk.read_only) != 0 ||
        (flags & O_ACCMODE) == O_RDONLY)
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    errno = EIO;
    return -1;
}

/* What begins in front of the last commit of the next publication. */
struct plan {
    int failing, left;
};

static void fail_at(void *arg, const char *point)
{
    const struct plan *plan = arg;

    if (strcmp(point, "before commit") != 0)
        return;
    disk.failing = plan->failing;
    disk.left = plan->left;
}

static claas_store_t *open_store(const char *data, const struct plan *plan)
{
    struct claas_store_options options = fixture_options(data);
    claas_store_t *store = NULL;

    options.at_point = fail_at;
    options.arg = (void *)(uintptr_t)plan;
    assert_int_equal(claas_store_open_sqlite(&options, &store), 0);
    return store;
}

/* A child whose disk fails once, and that ends `left` syncs later if it has not ended by then. */
static int publish_and_end(const char *data, int64_t current, int left)
{
    const struct plan plan = {.failing = 1, .left = left};
    pid_t child = fork();
    int status;

    if (child == 0) {
        claas_store_t *store = open_store(data, &plan);

        _exit(fixture_publish(store, data, "u/a", current, "[]", false) == CLAAS_ERR_IO ? FAILED
                                                                                        : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* After a start: `before` or a later one, and whole. */
static int64_t check_current(const char *data, int64_t before)
{
    claas_store_t *store = open_store(data, &(struct plan){0, -1});
    struct claas_store_answer answer;
    struct adapter_facts facts;
    const char *directory = "";
    int64_t version = -1;

    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a\"}"), 0);
    claas_json_get_int(answer.body, "version", 0, 1000, &version);
    claas_json_get_string(answer.body, "directory", &directory);
    assert_true(version >= before);
    if (adapter_check(directory, false, &facts) < 0)
        fail_msg("version %d: %s", (int)version, claas_error_text());
    claas_store_answer_done(&answer);
    store->ops->close(&store);
    return version;
}

static void test_failing_reads(void **ret)
{
    CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
    const struct plan none = {0, -1};
    claas_store_t *store = open_store(data, &none);
    struct claas_store_answer answer;
    char job[65];

    (void)ret;
    assert_int_equal(fixture_publish(store, data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "t", 1), 0);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "x", job), 0);
    store->ops->close(&store);
    store = open_store(data, &none); /* it remembers no page of what is asked */
    for (int i = 0; i < 2; i++) {
        disk.blind = i == 0 ? "claas.db" : NULL;
        assert_int_equal(fixture_call(store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                      "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                         disk.blind ? CLAAS_ERR_IO : 0);
        claas_store_answer_done(&answer);
    }
    store->ops->close(&store);
}

/* A version that the start could not read is there for whoever asks later. */
static void test_failing_reads_at_the_start(void **ret)
{
    CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
    const struct plan none = {0, -1};
    claas_store_t *store = open_store(data, &none);

    (void)ret;
    assert_int_equal(fixture_publish(store, data, "u/a", -1, "[]", false), 0);
    store->ops->close(&store);
    disk.blind = "safetensors";
    store = open_store(data, &none);
    disk.blind = NULL;
    assert_int_equal(fixture_publish(store, data, "u/a", 0, "[]", false), 1);
    store->ops->close(&store);
    assert_int_equal(check_current(data, 1), 1);
}

/* SQLite opens for reading what it cannot open for writing: nothing could be changed until the next
 * start. */
static void test_opened_for_reading(void **ret)
{
    static const char *const files[] = {"claas.db", "claas.db-wal", "claas.db-shm"};

    (void)ret;
    for (size_t i = 0; i < CLAAS_COUNT(files); i++) {
        CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
        struct claas_store_options options = fixture_options(data);
        claas_store_t *store;
        pid_t child = fork();

        if (child == 0) { /* ends without closing, so that there are a log and its index to open */
            open_store(data, &(struct plan){0, -1});
            _exit(0);
        }
        assert_int_equal(waitpid(child, NULL, 0), child);
        disk.read_only = files[i];
        assert_int_equal(claas_store_open_sqlite(&options, &store), CLAAS_ERR_IO);
        assert_non_null(strstr(claas_error_text(), "cannot be opened for writing"));
        disk.read_only = NULL;
        assert_int_equal(claas_store_open_sqlite(&options, &store), 0);
        store->ops->close(&store);
    }
}

static void test_end_in_doubt(void **ret)
{
    CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
    const struct plan none = {0, -1};
    claas_store_t *store = open_store(data, &none);
    int64_t current = fixture_publish(store, data, "u/a", -1, "[]", false);
    int status = ENDED, left = 0;

    (void)ret;
    store->ops->close(&store);
    while (status == ENDED) {
        status = publish_and_end(data, current, left++);
        assert_true(status == ENDED || status == FAILED);
        current = check_current(data, current);
    }
    assert_true(left > 3); /* at least: settled, moved back, row deleted */
}

/* As long as no commit is possible the directory is neither moved back nor removed. */
static void test_long_doubt(void **ret)
{
    CLAAS_AUTO(fixture_remove) char *data = fixture_directory();
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapters/u/a/v000001", data);
    struct plan plan = {0, -1};
    claas_store_t *store = open_store(data, &plan);
    int rc;

    (void)ret;
    assert_int_equal(fixture_publish(store, data, "u/a", -1, "[]", false), 0);
    plan.failing = INT_MAX;
    assert_int_equal(fixture_publish(store, data, "u/a", 0, "[]", false), CLAAS_ERR_IO);
    assert_int_equal(store->ops->tend(store), CLAAS_ERR_IO);
    assert_true(path_exists(path));
    disk.failing = plan.failing = 0;
    assert_int_equal(fixture_publish(store, data, "u/a", 0, "[]", false), 2);
    while ((rc = store->ops->tend(store)) > 0)
        continue;
    assert_int_equal(rc, 0);
    assert_false(path_exists(path));
    store->ops->close(&store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_failing_reads),
        cmocka_unit_test(test_failing_reads_at_the_start),
        cmocka_unit_test(test_opened_for_reading),
        cmocka_unit_test(test_end_in_doubt),
        cmocka_unit_test(test_long_doubt),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
