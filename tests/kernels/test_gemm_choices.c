/* The file of chosen algorithms: what is written is read back, and nothing else is: not a byte
 * changed, not a byte missing, not another card's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "cuda/gemm_choices.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNT   5
#define WRITERS 8
#define ROUNDS  50

static char root[] = "/tmp/claas-choices-XXXXXX";
static char path_text[4096];
static int fsyncs;

/* In place of libc's. */
int fsync(int fd)
{
    fsyncs++;
    return 0;
}

static const char *path(const char *name)
{
    snprintf(path_text, sizeof(path_text), "%s/%s", root, name);
    return path_text;
}

static int make_root(void **state)
{
    strcpy(root, "/tmp/claas-choices-XXXXXX");
    return mkdtemp(root) ? 0 : -1;
}

static int drop_root(void **state)
{
    return claas_remove_all(root);
}

static struct gemm_choices_origin origin_of(const char *device)
{
    struct gemm_choices_origin origin = {.library = 120401, .driver = 12040, .arch = 90};

    snprintf(origin.device, sizeof(origin.device), "%s", device);
    return origin;
}

/* Choices number first … first + count - 1, whose algorithms are filled with `fill`. */
static struct gemm_choices some_choices(int first, int count, int fill)
{
    struct gemm_choices choices = {claas_alloc((size_t)count + 1, sizeof(struct gemm_choice)),
                                   (size_t)count};

    assert_non_null(choices.items);
    for (int i = 0; i < count; i++) {
        memset(choices.items[i].key, first + i, GEMM_CHOICE_KEY);
        memset(choices.items[i].algo, fill, GEMM_CHOICE_ALGO);
    }
    return choices;
}

/* The algorithm's filling of choice `number`; -1: there is none. */
static int find_fill(const struct gemm_choices *choices, int number)
{
    for (size_t i = 0; i < choices->count; i++)
        if (choices->items[i].key[0] == number)
            return choices->items[i].algo[0];
    return -1;
}

static void test_round_trip(void **state)
{
    struct gemm_choices_origin origin = origin_of("NVIDIA H100 80GB HBM3");

    for (int count = 0; count <= COUNT; count += COUNT) {
        CLAAS_AUTO(gemm_choices_done) struct gemm_choices in = some_choices(1, count, 9);
        CLAAS_AUTO(gemm_choices_done) struct gemm_choices out = {0};
        CLAAS_AUTO_FREE uint8_t *data = NULL;
        size_t length = 0;

        assert_int_equal(gemm_choices_encode(&origin, &in, &data, &length), 0);
        assert_int_equal(length, 112 + count * 112);
        assert_int_equal(gemm_choices_decode(&origin, data, length, &out), 0);
        assert_int_equal(out.count, count);
        assert_memory_equal(out.items, in.items, (size_t)count * sizeof(*in.items));
    }
}

static void refuse(const struct gemm_choices_origin *origin, const uint8_t *data, size_t length,
                   const char *what, size_t where)
{
    struct gemm_choices out = {0};
    /* A copy of just this length, so that a sanitizer sees what is read behind it. */
    CLAAS_AUTO_FREE uint8_t *copy = claas_alloc(length ? length : 1, 1);

    assert_non_null(copy);
    memcpy(copy, data, length);
    if (gemm_choices_decode(origin, copy, length, &out) != CLAAS_ERR_FORMAT)
        fail_msg("%s at %zu went through", what, where);
    assert_null(out.items);
}

static void test_damage(void **state)
{
    struct gemm_choices_origin origin = origin_of("NVIDIA H100 80GB HBM3");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices in = some_choices(1, COUNT, 9);
    CLAAS_AUTO_FREE uint8_t *data = NULL;
    CLAAS_AUTO_FREE uint8_t *longer = NULL;
    size_t length = 0;

    assert_int_equal(gemm_choices_encode(&origin, &in, &data, &length), 0);
    for (size_t i = 0; i < length; i++)
        refuse(&origin, data, i, "a file cut", i);
    for (size_t i = 0; i < length; i++)
        for (int bit = 0; bit < 8; bit++) {
            data[i] ^= (uint8_t)(1 << bit);
            refuse(&origin, data, length, "a flipped bit", i);
            data[i] ^= (uint8_t)(1 << bit);
        }
    longer = claas_alloc(length + 112, 1);
    assert_non_null(longer);
    memcpy(longer, data, length);
    refuse(&origin, longer, length + 1, "a byte more", length);
    refuse(&origin, longer, length + 112, "a choice more", length);
    /* A count whose size in bytes wraps round to what is there: 2^62 * 112 = 0 modulo 2^64. */
    longer[16 + 7] = 0x40;
    refuse(&origin, longer, length, "a count that wraps", 16);
}

static void test_other_origins(void **state)
{
    struct gemm_choices_origin ours = origin_of("NVIDIA H100 80GB HBM3"), other;
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices in = some_choices(1, COUNT, 9);
    CLAAS_AUTO_FREE uint8_t *data = NULL;
    size_t length = 0;

    assert_int_equal(gemm_choices_encode(&ours, &in, &data, &length), 0);
    other = origin_of("NVIDIA H200");
    refuse(&other, data, length, "another card", 0);
    other = ours;
    other.library++;
    refuse(&other, data, length, "another library", 0);
    other = ours;
    other.driver++;
    refuse(&other, data, length, "another driver", 0);
    other = ours;
    other.arch = 80;
    refuse(&other, data, length, "another architecture", 0);
}

/* A whole file of an earlier version of this program, whose keys mean something else. */
static void test_other_version(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices in = some_choices(1, COUNT, 9), out = {0};
    CLAAS_AUTO_FREE uint8_t *data = NULL;
    const char *name = path("version.bin");
    size_t length = 0;

    assert_int_equal(gemm_choices_encode(&origin, &in, &data, &length), 0);
    assert_int_equal(data[8], 2);
    data[8] = 1;
    assert_int_equal(gemm_choices_decode(&origin, data, length, &out), CLAAS_ERR_FORMAT);
    assert_non_null(strstr(claas_error_text(), "in format 1 of"));
    assert_int_equal(claas_file_write(name, data, length), 0);
    gemm_choices_read(name, &origin, &out);
    assert_int_equal(out.count, 0);
    in.count = 2;
    assert_int_equal(gemm_choices_write(name, &origin, &in), 0);
    gemm_choices_read(name, &origin, &out);
    assert_int_equal(out.count, 2);
}

static void test_too_many(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    struct gemm_choices many = {0};
    uint8_t *data = NULL;
    size_t length = 0;

    many.count = GEMM_CHOICES_MAX + 1;
    assert_int_equal(gemm_choices_encode(&origin, &many, &data, &length), CLAAS_ERR_LIMIT);
    assert_null(data);
}

static void test_files(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card"), other = origin_of("another card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices first = some_choices(1, 3, 10);
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices second = some_choices(3, 2, 20);
    struct gemm_choices read = {0};
    const char *name = path("deep/er/gemm-NVIDIA-H100-80GB----HBM3.bin");

    gemm_choices_read(name, &origin, &read);
    assert_int_equal(read.count, 0);
    assert_int_equal(gemm_choices_write(name, &origin, &first), 0);
    gemm_choices_read(name, &origin, &read);
    assert_int_equal(read.count, 3);
    gemm_choices_done(&read);
    /* Two processes: what one does not know stays, what both know is the last one's. */
    assert_int_equal(gemm_choices_write(name, &origin, &second), 0);
    gemm_choices_read(name, &origin, &read);
    assert_int_equal(read.count, 4);
    assert_int_equal(find_fill(&read, 1), 10);
    assert_int_equal(find_fill(&read, 2), 10);
    assert_int_equal(find_fill(&read, 3), 20);
    assert_int_equal(find_fill(&read, 4), 20);
    gemm_choices_done(&read);
    /* Another card's file is ignored, and replaced as a whole. */
    gemm_choices_read(name, &other, &read);
    assert_int_equal(read.count, 0);
    assert_int_equal(gemm_choices_write(name, &other, &second), 0);
    gemm_choices_read(name, &other, &read);
    assert_int_equal(read.count, 2);
    gemm_choices_done(&read);
    /* So is a damaged one. */
    assert_int_equal(claas_file_write(name, "CLaaSmm", 8), 0);
    gemm_choices_read(name, &origin, &read);
    assert_int_equal(read.count, 0);
    assert_int_equal(gemm_choices_write(name, &origin, &first), 0);
    gemm_choices_read(name, &origin, &read);
    assert_int_equal(read.count, 3);
    gemm_choices_done(&read);
}

/* The thread that computes writes, and must not wait for a disk. */
static void test_no_fsync(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices choices = some_choices(1, 1, 10);

    fsyncs = 0;
    assert_int_equal(claas_file_write(path("kept"), "x", 1), 0);
    assert_int_equal(fsyncs, 2); /* so they are counted */
    assert_int_equal(gemm_choices_write(path("quick.bin"), &origin, &choices), 0);
    assert_int_equal(fsyncs, 2);
}

/* In a process of its own, together with the others: all wait for the pipe's end. 0 if it wrote. */
static int write_together(const char *name, int number, const int gate[2])
{
    struct gemm_choices_origin origin = origin_of("a card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices own = some_choices(number, 1, 10);
    char byte;

    close(gate[1]);
    return read(gate[0], &byte, 1) == 0 && gemm_choices_write(name, &origin, &own) == 0 ? 0 : 1;
}

/* Processes that write at the same time, each what only it knows: nothing gets lost. */
static void test_writers(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    const char *name = path("together.bin");

    for (int round = 0; round < ROUNDS; round++) {
        CLAAS_AUTO(gemm_choices_done) struct gemm_choices read = {0};
        int gate[2], status, failed = 0;

        assert_int_equal(pipe(gate), 0);
        for (int i = 0; i < WRITERS; i++)
            if (fork() == 0)
                _exit(write_together(name, 1 + i, gate));
        close(gate[0]);
        close(gate[1]);
        for (int i = 0; i < WRITERS; i++)
            failed += wait(&status) < 0 || status != 0;
        assert_int_equal(failed, 0);
        gemm_choices_read(name, &origin, &read);
        assert_int_equal(read.count, WRITERS);
        assert_int_equal(unlink(name), 0);
    }
}

/* Somebody who keeps the lock keeps nobody from writing. */
static void test_kept_lock(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices choices = some_choices(1, 1, 10);
    int lock = open(path("held.bin.lock"), O_RDWR | O_CREAT, 0600);

    assert_int_equal(flock(lock, LOCK_EX), 0);
    assert_int_equal(gemm_choices_write(path("held.bin"), &origin, &choices), 0);
    close(lock);
}

static void test_no_place(void **state)
{
    struct gemm_choices_origin origin = origin_of("a card");
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices choices = some_choices(1, 1, 10);

    assert_int_equal(claas_file_write(path("file"), "x", 1), 0);
    assert_true(gemm_choices_write(path("file/below"), &origin, &choices) < 0);
}

static void expect_path(const char *want)
{
    CLAAS_AUTO_FREE char *got = gemm_choices_path("NVIDIA H100 80GB/../HBM3");

    if (!want)
        assert_null(got);
    else
        assert_string_equal(got, want);
}

static void test_paths(void **state)
{
    setenv("HOME", "/home/someone", 1);
    unsetenv("XDG_CACHE_HOME");
    unsetenv("CLAAS_CUDA_CHOICES");
    expect_path("/home/someone/.cache/claas/gemm-NVIDIA-H100-80GB----HBM3.bin");
    setenv("XDG_CACHE_HOME", "/var/cache/someone", 1);
    expect_path("/var/cache/someone/claas/gemm-NVIDIA-H100-80GB----HBM3.bin");
    setenv("XDG_CACHE_HOME", "relative", 1);
    expect_path("/home/someone/.cache/claas/gemm-NVIDIA-H100-80GB----HBM3.bin");
    unsetenv("HOME");
    expect_path(NULL);
    setenv("CLAAS_CUDA_CHOICES", "here.bin", 1);
    expect_path("here.bin");
    setenv("CLAAS_CUDA_CHOICES", "", 1);
    expect_path(NULL);
    setenv("CLAAS_CUDA_CHOICES", "/dev/null", 1); /* would be replaced by a file */
    expect_path(NULL);
    setenv("CLAAS_CUDA_CHOICES", root, 1);
    expect_path(NULL);
    assert_int_equal(claas_file_write(path("there"), "x", 1), 0);
    setenv("CLAAS_CUDA_CHOICES", path("there"), 1);
    expect_path(path("there"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),    cmocka_unit_test(test_damage),
        cmocka_unit_test(test_other_origins), cmocka_unit_test(test_other_version),
        cmocka_unit_test(test_too_many),      cmocka_unit_test(test_files),
        cmocka_unit_test(test_no_fsync),      cmocka_unit_test(test_writers),
        cmocka_unit_test(test_kept_lock),     cmocka_unit_test(test_no_place),
        cmocka_unit_test(test_paths),
    };

    return cmocka_run_group_tests(tests, make_root, drop_root);
}
