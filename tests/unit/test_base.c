/* actors/base: errors, memory, buffers, files, random numbers, clock and log. JSON has its own
 * test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "claas/buf.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/json.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void assert_text_has(const char *part)
{
    if (!strstr(claas_error_text(), part))
        fail_msg("'%s' lacks '%s'", claas_error_text(), part);
}

/* --- err -------------------------------------------------------------------------------------- */

static void test_err_catalogue(void **state)
{
    assert_string_equal(claas_err_name(CLAAS_ERR_NOT_FOUND), "NOT_FOUND");
    assert_int_equal(claas_err_http_status(CLAAS_ERR_NOT_FOUND), 404);
    assert_int_equal(claas_err_http_status(CLAAS_ERR_NO_SPACE), 507);
    assert_int_equal(claas_err_http_status(-999), 500);
    assert_string_equal(claas_err_name(-999), "UNKNOWN");
    assert_non_null(claas_err_text(-999));
    assert_int_equal(claas_err_http_status(0), 200);
    for (int code = CLAAS_ERR_INVALID; code >= CLAAS_ERR_BUSY; code--) {
        assert_int_equal(claas_err_from_name(claas_err_name(code)), code);
        assert_true(strlen(claas_err_text(code)) > 0);
    }
    assert_int_equal(claas_err_from_name("nonsense"), CLAAS_ERR_INTERNAL);
    assert_int_equal(claas_err_from_name("not_found"), CLAAS_ERR_INTERNAL);
}

static void check_hidden(const char *sentence, const char *path, const char *expected)
{
    claas_fail(CLAAS_ERR_IO, "%s", sentence);
    assert_int_equal(claas_fail_hide_path(CLAAS_ERR_IO, path, "the upload"), CLAAS_ERR_IO);
    assert_string_equal(claas_error_text(), expected);
}

static void test_err_hide_path(void **state)
{
    char word[3000];

    check_hidden("/d/x/a.json: no 'r'", "/d/x", "a.json: no 'r'");
    check_hidden("cannot create '/d/x': full", "/d/x", "cannot create 'the upload': full");
    check_hidden("/d/x/a cannot become /d/x/b/c", "/d/x", "a cannot become b/c");
    /* Whole names only. */
    check_hidden("/d/xy/a, /c/d/x/a, /d/x.zip", "/d/x", "/d/xy/a, /c/d/x/a, /d/x.zip");
    check_hidden("the metadata of data/a: data", "data", "the metadata of a: the upload");
    check_hidden("a sentence", "", "a sentence");
    check_hidden("", "/d", "");
    memset(word, 'w', sizeof(word));
    word[sizeof(word) - 1] = '\0';
    claas_fail(CLAAS_ERR_IO, "/d and %s", "/d");
    claas_fail_hide_path(CLAAS_ERR_IO, "/d", word);
    assert_int_equal(strlen(claas_error_text()), 1023); /* cut, not over the edge */
    assert_memory_equal(claas_error_text(), word, 1023);
    (void)state;
}

static void test_err_quote(void **state)
{
    char text[300];
    struct claas_quoted quoted;

    assert_string_equal(claas_quote("me/chat-1").text, "me/chat-1");
    assert_string_equal(claas_quote("").text, "");
    assert_string_equal(claas_quote("a\nb\x1b[31m\x7f\\").text, "a\\x0Ab\\x1B[31m\\x7F\\\\");
    assert_string_equal(claas_quote("\u202eé").text, "\\xE2\\x80\\xAE\\xC3\\xA9");
    memset(text, 'a', sizeof(text));
    text[100] = '\0';
    assert_string_equal(claas_quote(text).text, text);
    text[100] = 'a';
    text[sizeof(text) - 1] = '\0';
    quoted = claas_quote(text);
    assert_int_equal(strlen(quoted.text), 100 + strlen("…"));
    assert_string_equal(quoted.text + 100, "…");
    memset(text, '\n', sizeof(text) - 1);
    quoted = claas_quote(text);
    assert_string_equal(quoted.text + 96, "\\x0A…");
    (void)state;
}

static void test_err_number(void **state)
{
    assert_string_equal(claas_number(0).text, "0");
    assert_string_equal(claas_number(0.1).text, "0.1");
    assert_string_equal(claas_number(8.03).text, "8.03");
    assert_string_equal(claas_number(1e15).text, "1000000000000000");
    assert_string_equal(claas_number(9007199254740991.0).text, "9007199254740991");
    assert_string_equal(claas_number(0.1 + 0.2).text, "0.30000000000000004");
    assert_string_equal(claas_number(-1e300).text, "-1e+300");
    (void)state;
}

static void test_err_text(void **state)
{
    assert_int_equal(claas_fail(CLAAS_ERR_LIMIT, "%d rows, the limit is %d", 9, 8),
                     CLAAS_ERR_LIMIT);
    assert_string_equal(claas_error_text(), "9 rows, the limit is 8");
    assert_int_equal(claas_fail_context(CLAAS_ERR_LIMIT, "%s: ", "a.gguf"), CLAAS_ERR_LIMIT);
    assert_int_equal(claas_fail_context(CLAAS_ERR_LIMIT, "step %d: ", 3), CLAAS_ERR_LIMIT);
    assert_string_equal(claas_error_text(), "step 3: a.gguf: 9 rows, the limit is 8");
    /* An argument may be the old sentence. */
    claas_fail(CLAAS_ERR_FORMAT, "again (%s)", claas_error_text());
    assert_string_equal(claas_error_text(), "again (step 3: a.gguf: 9 rows, the limit is 8)");
    claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    assert_string_equal(claas_error_text(), "out of memory");
}

static void test_err_long_text(void **state)
{
    char text[3001];

    /* A cut sentence stays valid UTF-8, whatever the phase of the cut. */
    for (int shift = 0; shift < 4; shift++) {
        for (int i = 0; i + 4 <= 3000; i += 4)
            memcpy(text + i, "\xF0\x9F\x98\x80", 4);
        memset(text, 'x', (size_t)shift * 4);
        text[3000] = '\0';
        claas_fail(CLAAS_ERR_FORMAT, "%.*s%s", shift, "abcd", text);
        assert_true(claas_utf8_valid(claas_error_text(), strlen(claas_error_text())));
        assert_true(strlen(claas_error_text()) > 1000);
        claas_fail_context(CLAAS_ERR_FORMAT, "%.*s", shift, "efgh");
        assert_true(claas_utf8_valid(claas_error_text(), strlen(claas_error_text())));
    }
}

static void *fail_in_thread(void *ret)
{
    *(int *)ret = (int)strlen(claas_error_text());
    claas_fail(CLAAS_ERR_IO, "the other thread's");
    return NULL;
}

static void test_err_errno_and_threads(void **state)
{
    static const struct {
        int number;
        int code;
    } cases[] = {{ENOSPC, CLAAS_ERR_NO_SPACE},  {ENOENT, CLAAS_ERR_NOT_FOUND},
                 {ENOMEM, CLAAS_ERR_NO_MEMORY}, {EACCES, CLAAS_ERR_DENIED},
                 {EEXIST, CLAAS_ERR_EXISTS},    {EROFS, CLAAS_ERR_IO},
                 {EIO, CLAAS_ERR_IO},           {EMFILE, CLAAS_ERR_OVERLOADED}};
    pthread_t thread;
    int inherited = -1;

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        errno = cases[i].number;
        assert_int_equal(claas_fail_errno("open %s", "x"), cases[i].code);
        assert_text_has("open x: ");
        assert_text_has(strerror(cases[i].number));
        assert_int_equal(errno, cases[i].number);
    }
    claas_fail(CLAAS_ERR_FORMAT, "mine");
    assert_int_equal(pthread_create(&thread, NULL, fail_in_thread, &inherited), 0);
    pthread_join(thread, NULL);
    assert_int_equal(inherited, 0);
    assert_string_equal(claas_error_text(), "mine");
}

/* --- mem -------------------------------------------------------------------------------------- */

static void test_mem(void **state)
{
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO_FREE int *numbers = CLAAS_NEW_ARRAY(int, 4);
    CLAAS_AUTO_FREE float *aligned = claas_alloc_aligned(100);
    CLAAS_AUTO_FREE void *nothing = claas_alloc(0, 8);
    char small[4];

    assert_non_null(nothing);
    assert_int_equal(numbers[3], 0);
    assert_null(claas_alloc(SIZE_MAX / 2, 3));
    assert_null(claas_realloc(numbers, SIZE_MAX / 2, 3));
    assert_int_equal((uintptr_t)aligned % 64, 0);
    assert_true(aligned[24] == 0);
    assert_null(claas_alloc_aligned(SIZE_MAX - 5));
    text = claas_format("%s-%03d", "v", 7);
    assert_string_equal(text, "v-007");
    claas_free_pointer(&text);
    assert_null(text);
    text = claas_strndup("abcdef", 3);
    assert_string_equal(text, "abc");
    assert_int_equal(claas_copy_text(small, sizeof(small), "abc"), 0);
    assert_string_equal(small, "abc");
    assert_int_equal(claas_copy_text(small, sizeof(small), "wxyz"), CLAAS_ERR_LIMIT);
    assert_string_equal(small, "wxy");
    assert_int_equal(claas_copy_text(small, 0, ""), CLAAS_ERR_LIMIT);
    assert_string_equal(small, "wxy");
    {
        char *taken = CLAAS_TAKE(text);

        assert_null(text);
        free(taken);
    }
}

/* --- buf -------------------------------------------------------------------------------------- */

static void test_buf(void **state)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf buf;
    CLAAS_AUTO_FREE char *taken = NULL;
    size_t length = 99;

    claas_buf_init(&buf, 10);
    assert_int_equal(claas_buf_add_text(&buf, "hello"), 0);
    assert_int_equal(claas_buf_printf(&buf, "%05d", 42), 0); /* exactly the limit */
    assert_string_equal(buf.data, "hello00042");
    assert_int_equal(claas_buf_add(&buf, "x", 1), CLAAS_ERR_TOO_LARGE);
    assert_int_equal(buf.length, 10); /* nothing half-added */
    assert_string_equal(buf.data, "hello00042");
    claas_buf_consume(&buf, 6);
    assert_string_equal(buf.data, "0042");
    /* Sticky: even what would fit now is refused, and nothing is handed over. */
    assert_int_equal(claas_buf_add(&buf, "x", 1), CLAAS_ERR_TOO_LARGE);
    assert_int_equal(claas_buf_printf(&buf, "x"), CLAAS_ERR_TOO_LARGE);
    assert_int_equal(buf.error, CLAAS_ERR_TOO_LARGE);
    assert_null(claas_buf_take(&buf, &length));
    assert_int_equal(length, 0);
    assert_int_equal(buf.error, CLAAS_ERR_TOO_LARGE);

    claas_buf_init(&buf, 10);
    taken = claas_buf_take(&buf, &length);
    assert_string_equal(taken, "");
    claas_free_pointer(&taken);
    claas_buf_add(&buf, NULL, 0);
    claas_buf_add(&buf, "a\0b", 3);
    claas_buf_consume(&buf, 100);
    assert_int_equal(buf.length, 0);
    claas_buf_add(&buf, "a\0b", 3);
    taken = claas_buf_take(&buf, &length);
    assert_int_equal(length, 3);
    assert_memory_equal(taken, "a\0b", 4);
    assert_null(buf.data);
    assert_int_equal(buf.length, 0);
}

static void test_buf_growth(void **state)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf buf;

    claas_buf_init(&buf, 100000);
    for (int i = 0; i < 100000; i++)
        assert_int_equal(claas_buf_add(&buf, &"0123456789"[i % 10], 1), 0);
    assert_true(buf.capacity <= 100001);
    assert_int_equal(buf.data[99999], '9');
    assert_int_equal(buf.data[100000], 0);
    assert_int_equal(claas_buf_printf(&buf, "%d", 1), CLAAS_ERR_TOO_LARGE);
    claas_buf_done(&buf);
    claas_buf_init(&buf, SIZE_MAX); /* the arithmetic must not wrap */
    assert_int_equal(claas_buf_add_text(&buf, "ab"), 0);
    assert_int_equal(claas_buf_add(&buf, "x", SIZE_MAX - 2), CLAAS_ERR_TOO_LARGE);
}

static void test_reader(void **state)
{
    static const uint8_t data[] = {0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09,
                                   0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0xFF, 'a',  'b'};
    struct claas_reader reader;

    claas_reader_init(&reader, data, sizeof(data));
    assert_int_equal(claas_reader_u16(&reader), 0x0201);
    assert_int_equal(claas_reader_u32(&reader), 0x06050403);
    assert_true(claas_reader_u64(&reader) == UINT64_C(0x0E0D0C0B0A090807));
    assert_int_equal(claas_reader_u8(&reader), 0xFF);
    assert_int_equal(claas_reader_left(&reader), 2);
    assert_memory_equal(claas_reader_bytes(&reader, 2), "ab", 2);
    assert_int_equal(reader.error, 0);
    assert_non_null(claas_reader_bytes(&reader, 0));
    assert_int_equal(claas_reader_u8(&reader), 0);
    assert_int_equal(reader.error, CLAAS_ERR_FORMAT);

    /* Every truncation of every read fails and stays failed. */
    for (size_t length = 0; length < 8; length++) {
        claas_reader_init(&reader, data, length);
        assert_true(claas_reader_u64(&reader) == 0);
        assert_int_equal(reader.error, CLAAS_ERR_FORMAT);
        assert_int_equal(claas_reader_u8(&reader), 0);
        assert_null(claas_reader_bytes(&reader, 0));
    }
    claas_reader_init(&reader, data, 3);
    claas_reader_u8(&reader);
    assert_null(claas_reader_bytes(&reader, SIZE_MAX));
    assert_int_equal(reader.error, CLAAS_ERR_FORMAT);
    claas_reader_init(&reader, NULL, 0);
    assert_non_null(claas_reader_bytes(&reader, 0));
    assert_int_equal(reader.error, 0);
}

/* --- random, clock, log -------------------------------------------------------------------------
 */

static void test_philox(void **state)
{
    /* Known answers of Random123 (kat_vectors, philox4x32 10): counter, key, result. */
    static const struct {
        uint64_t index, stream, seed;
        uint32_t words[4];
    } vectors[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {UINT64_C(0x85a308d3243f6a88),
         UINT64_C(0x0370734413198a2e),
         UINT64_C(0x299f31d0a4093822),
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };

    for (size_t i = 0; i < CLAAS_COUNT(vectors); i++) {
        uint32_t words[4];

        claas_philox(vectors[i].seed, vectors[i].stream, vectors[i].index, words);
        assert_memory_equal(words, vectors[i].words, sizeof(words));
    }
}

static void test_random_moments(void **state)
{
    double sum = 0, square = 0, uniform = 0;
    int count = 200000;

    for (int i = 0; i < count; i++) {
        double x = claas_random_normal(7, 3, (uint64_t)i);
        float u = claas_random_uniform(7, 3, (uint64_t)i);

        assert_true(isfinite(x) && u >= 0.0F && u < 1.0F);
        sum += x;
        square += x * x;
        uniform += u;
    }
    assert_true(fabs(sum / count) < 0.01);
    assert_true(fabs(square / count - 1) < 0.02);
    assert_true(fabs(uniform / count - 0.5) < 0.003);
    assert_true(claas_random_uniform(0, 0, 0) == (float)(0x6627e8d5 >> 8) / 16777216.0F);
    assert_true(claas_random_normal(1, 0, 0) != claas_random_normal(1, 1, 0));
}

static void test_random_hex(void **state)
{
    char a[33];
    char b[33];

    memset(a, 'x', sizeof(a));
    claas_random_hex(a, 16);
    claas_random_hex(b, 16);
    assert_int_equal(strlen(a), 32);
    assert_int_equal(strspn(a, "0123456789abcdef"), 32);
    assert_string_not_equal(a, b);
    claas_random_hex(a, 0);
    assert_string_equal(a, "");
    assert_true(claas_random_seed() != claas_random_seed());
}

static void test_clock(void **state)
{
    char text[32];
    int64_t before = claas_clock_ns();

    claas_clock_iso(INT64_C(1795511700123), text);
    assert_string_equal(text, "2026-11-24T09:15:00.123Z");
    claas_clock_iso(0, text);
    assert_string_equal(text, "1970-01-01T00:00:00.000Z");
    claas_clock_iso(-1, text);
    assert_string_equal(text, "1969-12-31T23:59:59.999Z");
    claas_clock_iso(INT64_MAX, text);
    claas_clock_iso(INT64_MIN, text);
    assert_true(memchr(text, '\0', sizeof(text)) != NULL);
    assert_true(claas_clock_ns() >= before);
    assert_true(claas_clock_ms() >= before / 1000000);
    assert_true(claas_clock_unix_ms() > INT64_C(1500000000000));
}

/* One line of a child-less capture: stderr is put on a file meanwhile. */
static char *capture(const char *format, const char *thread, const char *message)
{
    char *data;
    int saved = dup(STDERR_FILENO);
    FILE *file = tmpfile();

    assert_non_null(file);
    dup2(fileno(file), STDERR_FILENO);
    claas_log_setup(CLAAS_LOG_INFO, format);
    claas_log_thread_name(thread);
    errno = 77;
    claas_debug("not shown");
    claas_warning("%s", message);
    assert_int_equal(errno, 77);
    dup2(saved, STDERR_FILENO);
    close(saved);
    claas_log_thread_name("");
    data = claas_alloc(1, 1 << 16);
    rewind(file);
    assert_true(data && fread(data, 1, (1 << 16) - 1, file) > 0);
    fclose(file);
    return data;
}

static void test_log(void **state)
{
    CLAAS_AUTO_FREE char *text = capture("text", "trainer.0", "a\nb\x1B[2J \xFF \"q\"");
    CLAAS_AUTO_FREE char *line = capture("auto", "x\"y", "a\nb\\\x1B \xC3\xA4\xFF \"q\"");
    CLAAS_AUTO_FREE char *cut = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json_cut = NULL;
    const char *value = NULL;
    enum claas_log_level level;
    char long_message[5000];

    assert_non_null(strstr(text, "Z warning trainer.0: a\\nb\\u001b[2J \xEF\xBF\xBD \"q\"\n"));
    assert_int_equal(line[strlen(line) - 1], '\n');
    assert_int_equal(claas_json_parse(line, strlen(line), 4096, &json), 0);
    assert_int_equal(claas_json_get_string(json, "level", &value), 1);
    assert_string_equal(value, "warning");
    assert_int_equal(claas_json_get_string(json, "thread", &value), 1);
    assert_string_equal(value, "x\"y");
    assert_int_equal(claas_json_get_string(json, "message", &value), 1);
    assert_string_equal(value, "a\nb\\\x1B \xC3\xA4\xEF\xBF\xBD \"q\"");

    memset(long_message, '\x02', sizeof(long_message));
    long_message[sizeof(long_message) - 1] = '\0';
    cut = capture("json", "", long_message);
    assert_int_equal(claas_json_parse(cut, strlen(cut), 1 << 20, &json_cut), 0);
    assert_int_equal(claas_json_get_string(json_cut, "message", &value), 1);
    assert_string_equal(value + strlen(value) - 3, "...");
    assert_null(claas_json_get(json_cut, "thread"));

    assert_int_equal(claas_log_level_parse("error", &level), 0);
    assert_int_equal(level, CLAAS_LOG_ERROR);
    assert_int_equal(claas_log_level_parse("loud", &level), CLAAS_ERR_INVALID);
    assert_text_has("'loud'");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_err_catalogue),
        cmocka_unit_test(test_err_text),
        cmocka_unit_test(test_err_hide_path),
        cmocka_unit_test(test_err_quote),
        cmocka_unit_test(test_err_number),
        cmocka_unit_test(test_err_long_text),
        cmocka_unit_test(test_err_errno_and_threads),
        cmocka_unit_test(test_mem),
        cmocka_unit_test(test_buf),
        cmocka_unit_test(test_buf_growth),
        cmocka_unit_test(test_reader),
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_random_moments),
        cmocka_unit_test(test_random_hex),
        cmocka_unit_test(test_clock),
        cmocka_unit_test(test_log),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
