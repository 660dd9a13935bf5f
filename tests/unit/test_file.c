/* Files: atomic replacement, limits, mapping, mkdir -p, and rm -r that stays inside its tree. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "count_entries.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void assert_text_has(const char *part)
{
    if (!strstr(claas_error_text(), part))
        fail_msg("'%s' lacks '%s'", claas_error_text(), part);
}

static char root[] = "/tmp/claas-base-XXXXXX";
static char path_text[4096];

static const char *path(const char *name)
{
    snprintf(path_text, sizeof(path_text), "%s/%s", root, name);
    return path_text;
}

static int make_root(void **state)
{
    strcpy(root, "/tmp/claas-base-XXXXXX");
    return mkdtemp(root) ? 0 : -1;
}

static int drop_root(void **state)
{
    return claas_remove_all(root);
}

static void expect_content(const char *name, const char *content)
{
    CLAAS_AUTO_FREE char *data = NULL;
    size_t length = 0;

    assert_int_equal(claas_file_read(path(name), 1 << 20, &data, &length), 0);
    assert_int_equal(length, strlen(content));
    assert_string_equal(data, content);
}

static void test_file_write(void **state)
{
    char big[65];

    assert_int_equal(claas_file_write(path("f"), "old", 3), 0);
    expect_content("f", "old");
    assert_int_equal(claas_file_write(path("f"), "new and longer", 14), 0);
    expect_content("f", "new and longer");
    assert_int_equal(claas_file_write(path("f"), "", 0), 0);
    expect_content("f", "");
    assert_int_equal(count_entries(root), 1); /* no temporary is left */
    assert_int_equal(claas_file_write(path("none/f"), "x", 1), CLAAS_ERR_NOT_FOUND);
    assert_text_has("none/f");
    assert_int_equal(claas_mkdir_all(path("dir")), 0);
    assert_true(claas_file_write(path("dir"), "x", 1) < 0);
    assert_int_equal(count_entries(root), 2);
    memset(big, 'x', sizeof(big));
    assert_int_equal(claas_file_write(path("f"), big, sizeof(big)), 0);
    assert_int_equal(claas_file_write_cache(path("f"), "short", 5), 0);
    expect_content("f", "short");
    assert_true(claas_file_write_cache(path("dir"), "x", 1) < 0);
    assert_int_equal(count_entries(root), 2);
}

/* The writer replaces the file over and over; a reader never sees anything but one whole content.
 */
struct writer {
    char name[4096];
    int failures;
};

static void *write_many(void *arg)
{
    struct writer *writer = arg;
    char content[9000];

    for (int i = 0; i < 60; i++) {
        memset(content, 'a' + i % 26, sizeof(content));
        if (claas_file_write(writer->name, content, i % 2 ? sizeof(content) : 1000) < 0)
            writer->failures++;
    }
    return NULL;
}

static void test_file_atomicity(void **state)
{
    struct writer writer = {{0}, 0};
    pthread_t thread;

    snprintf(writer.name, sizeof(writer.name), "%s", path("atomic"));
    assert_int_equal(claas_file_write(writer.name, "z", 0), 0);
    assert_int_equal(pthread_create(&thread, NULL, write_many, &writer), 0);
    for (int i = 0; i < 2000; i++) {
        CLAAS_AUTO_FREE char *data = NULL;
        size_t length = 0;

        assert_int_equal(claas_file_read(writer.name, 1 << 20, &data, &length), 0);
        assert_true(length == 0 || length == 1000 || length == 9000);
        for (size_t k = 1; k < length; k++)
            assert_true(data[k] == data[0]);
    }
    pthread_join(thread, NULL);
    assert_int_equal(writer.failures, 0);
}

static void test_file_read(void **state)
{
    CLAAS_AUTO_FREE char *data = NULL;
    CLAAS_AUTO_FREE char *proc = NULL;
    size_t length = 7;

    assert_int_equal(claas_file_write(path("f"), "12345", 5), 0);
    assert_int_equal(claas_file_read(path("f"), 4, &data, &length), CLAAS_ERR_TOO_LARGE);
    assert_null(data);
    assert_int_equal(claas_file_read(path("f"), 5, &data, &length), 0);
    assert_int_equal(length, 5);
    assert_string_equal(data, "12345");
    assert_int_equal(claas_file_read("/proc/self/status", 1 << 20, &proc, &length), 0);
    assert_true(length > 100 && strlen(proc) == length); /* fstat says 0 bytes */
    claas_free_pointer(&proc);
    assert_int_equal(claas_file_read("/proc/self/status", 10, &proc, &length), CLAAS_ERR_TOO_LARGE);
    assert_int_equal(claas_file_read(path("absent"), 9, &proc, &length), CLAAS_ERR_NOT_FOUND);
    assert_text_has("absent: No such file");
    assert_int_equal(claas_file_read(root, 1 << 20, &proc, &length), CLAAS_ERR_INVALID);
    assert_null(proc);
}

static void test_file_map(void **state)
{
    const uint8_t *data = NULL;
    size_t length = 7;

    assert_int_equal(claas_file_write(path("m"), "abc", 3), 0);
    assert_int_equal(claas_file_map(path("m"), &data, &length), 0);
    assert_int_equal(length, 3);
    assert_memory_equal(data, "abc", 3);
    claas_file_unmap(data, length);
    assert_int_equal(claas_file_write(path("m"), "", 0), 0);
    assert_int_equal(claas_file_map(path("m"), &data, &length), 0);
    assert_null(data);
    assert_int_equal(length, 0);
    claas_file_unmap(data, length);
    assert_int_equal(claas_file_map(path("none"), &data, &length), CLAAS_ERR_NOT_FOUND);
    assert_int_equal(claas_file_map(root, &data, &length), CLAAS_ERR_INVALID);
}

/* Stands before the C library's: notes what is synced. */
static char synced[8][4096];
static size_t synced_count;

int fsync(int fd)
{
    char link[64];
    ssize_t length;

    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, synced[synced_count % 8], sizeof(synced[0]) - 1);
    if (length >= 0)
        synced[synced_count++ % 8][length] = '\0';
    return (int)syscall(SYS_fsync, fd);
}

/* Each new directory's entry is where a loss of power finds it; those that were there cost nothing.
 */
static void test_mkdir_is_durable(void **state)
{
    synced_count = 0;
    assert_int_equal(claas_mkdir_all(path("a/b//c/")), 0);
    assert_int_equal(synced_count, 3);
    assert_string_equal(synced[0], root);
    assert_string_equal(synced[1], path("a"));
    assert_string_equal(synced[2], path("a/b"));
    assert_int_equal(claas_mkdir_all(path("a/b/c")), 0);
    assert_int_equal(synced_count, 3);
}

static void test_mkdir_all(void **state)
{
    struct stat info;

    assert_int_equal(claas_mkdir_all(path("a/b//c/")), 0);
    assert_int_equal(stat(path("a/b/c"), &info), 0);
    assert_int_equal(info.st_mode & 0777, 0700);
    assert_int_equal(claas_mkdir_all(path("a/b")), 0);
    assert_int_equal(claas_mkdir_all("/"), 0);
    assert_int_equal(claas_file_write(path("a/file"), "x", 1), 0);
    assert_true(claas_mkdir_all(path("a/file")) < 0);
    assert_true(claas_mkdir_all(path("a/file/x")) < 0);
    assert_text_has("a/file");
    assert_int_equal(claas_mkdir_all(""), CLAAS_ERR_INVALID);
    assert_int_equal(claas_fsync_path(path("a/b")), 0);
    assert_int_equal(claas_fsync_parent(path("a/b/")), 0);
    assert_int_equal(claas_fsync_parent("relative"), 0);
    assert_int_equal(claas_fsync_path(path("a/none")), CLAAS_ERR_NOT_FOUND);
}

/* Whoever may write into a directory makes one there, though not allowed to list it. Root may do
 * anything: the test is somebody else's then. */
static void test_mkdir_in_unreadable(void **state)
{
    bool is_root = geteuid() == 0;
    int rc;

    assert_int_equal(chmod(root, 0333), 0);
    if (is_root && seteuid(65534) < 0)
        skip();
    rc = claas_mkdir_all(path("made/deep"));
    if (is_root)
        assert_int_equal(seteuid(0), 0);
    assert_int_equal(chmod(root, 0700), 0);
    if (rc < 0)
        fail_msg("%s", claas_error_text());
    assert_int_equal(access(path("made/deep"), F_OK), 0);
}

static void test_remove_all(void **state)
{
    char outside[4096];
    char link[4096];

    snprintf(outside, sizeof(outside), "%s", path("outside"));
    assert_int_equal(claas_mkdir_all(path("outside/deep")), 0);
    assert_int_equal(claas_file_write(path("outside/deep/kept"), "k", 1), 0);
    assert_int_equal(claas_mkdir_all(path("tree/x/y")), 0);
    assert_int_equal(claas_file_write(path("tree/x/y/f"), "f", 1), 0);
    assert_int_equal(symlink(outside, path("tree/x/link")), 0);
    assert_int_equal(symlink("nowhere", path("tree/dangling")), 0);
    for (int i = 0; i < 300; i++) {
        char name[32];

        snprintf(name, sizeof(name), "tree/x/%d", i);
        close(open(path(name), O_CREAT | O_WRONLY, 0600));
    }
    assert_int_equal(claas_remove_all(path("tree")), 0);
    assert_true(access(path("tree"), F_OK) < 0);
    expect_content("outside/deep/kept", "k");
    /* The path itself is a link, even written as a directory. */
    snprintf(link, sizeof(link), "%s", path("link"));
    assert_int_equal(symlink(outside, link), 0);
    strcat(link, "//");
    assert_int_equal(claas_remove_all(link), 0);
    assert_true(faccessat(AT_FDCWD, path("link"), F_OK, AT_SYMLINK_NOFOLLOW) < 0);
    expect_content("outside/deep/kept", "k");
    assert_int_equal(claas_remove_all(path("never/was")), 0);
    assert_int_equal(claas_remove_all(path("outside/deep/kept")), 0);
    assert_int_equal(claas_remove_all(""), CLAAS_ERR_INVALID);
    assert_int_equal(claas_remove_all(path("outside/")), 0);
}

static void test_full_disk(void **state)
{
    int fd = open("/dev/full", O_WRONLY);

    if (fd < 0)
        skip();
    assert_int_equal(claas_fd_write_all(fd, "x", 1), CLAAS_ERR_NO_SPACE);
    assert_text_has("No space left");
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_file_write, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_file_atomicity, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_file_read, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_file_map, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_mkdir_all, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_mkdir_is_durable, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_mkdir_in_unreadable, make_root, drop_root),
        cmocka_unit_test_setup_teardown(test_remove_all, make_root, drop_root),
        cmocka_unit_test(test_full_disk),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
