/* The streaming text filter: pieces must add up to the visible text whatever the token borders. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdlib.h>
#include <string.h>

#include "claas/json.h"
#include "claas/mem.h"
#include "claas/visible_text.h"
#include "text_stream.h"

struct streamed {
    char *text; /* all pieces */
    bool valid; /* every piece was whole UTF-8 characters */
    bool stopped;
};

/* Feeds `raw` in chunks of `size` bytes. */
static struct streamed stream(const char *raw, size_t length, size_t size, const char *const *stops,
                              size_t stop_count, bool plain)
{
    struct text_stream filter;
    struct claas_buf all;
    struct streamed result = {.valid = true};
    char *piece;

    claas_buf_init(&all, 1 << 20);
    text_stream_init(&filter, stops, stop_count, plain);
    for (size_t at = 0; at < length && !result.stopped; at += size) {
        size_t n = length - at < size ? length - at : size;
        int rc = text_stream_add(&filter, raw + at, n);

        assert_true(rc >= 0);
        result.stopped = rc == 1;
        assert_int_equal(text_stream_next(&filter, false, &piece), 0);
        if (!claas_utf8_valid(piece, strlen(piece)))
            result.valid = false;
        claas_buf_add_text(&all, piece);
        free(piece);
    }
    assert_int_equal(text_stream_next(&filter, true, &piece), 0);
    claas_buf_add_text(&all, piece);
    free(piece);
    text_stream_done(&filter);
    result.text = all.data ? claas_buf_take(&all, NULL) : claas_strdup("");
    return result;
}

static void check_all_sizes(const char *raw, const char *want, const char *const *stops,
                            size_t stop_count, bool plain)
{
    for (size_t size = 1; size <= strlen(raw) + 1; size++) {
        struct streamed got = stream(raw, strlen(raw), size, stops, stop_count, plain);

        assert_string_equal(got.text, want);
        assert_true(got.valid);
        free(got.text);
    }
}

static void test_equals_visible_text(void **state)
{
    static const char *const raws[] = {
        "Hello, world!",
        "  \n leading and trailing \n ",
        "<think>secret plan</think>\n\nThe answer.",
        "a <think>x</think> b",
        "unclosed <think>stays",
        "a < b <thin line",
        "caf\xc3\xa9 \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80",
        "\xe3\x80\x80wide space in front",
        "",
        "   ",
        "<think>only thoughts</think>",
        "inner   spaces\n\nkept",
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(raws); i++) {
        char *want = claas_visible_text(raws[i]);

        check_all_sizes(raws[i], want, NULL, 0, false);
        free(want);
    }
}

static void test_stops_never_show(void **state)
{
    static const char *const stops[] = {"END", "\n\n"};

    (void)state;
    check_all_sizes("one two END three", "one two", stops, 1, false);
    check_all_sizes("one EN two", "one EN two", stops, 1, false);
    check_all_sizes("first\n\nsecond END", "first", stops, 2, false);
    check_all_sizes("ENEND", "EN", stops, 2, false);
    check_all_sizes("END", "", stops, 1, false);
    check_all_sizes("tail EN", "tail EN", stops, 1, false);
}

static void test_plain_is_untouched(void **state)
{
    (void)state;
    check_all_sizes("  <think>x</think> \n", "  <think>x</think> \n", NULL, 0, true);
}

static void test_broken_utf8_is_replaced(void **state)
{
    struct streamed got = stream("a\xff"
                                 "b\xe4\xbd",
                                 5, 1, NULL, 0, true);

    (void)state;
    assert_string_equal(got.text, "a\xef\xbf\xbd"
                                  "b\xef\xbf\xbd\xef\xbf\xbd");
    free(got.text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_visible_text),
        cmocka_unit_test(test_stops_never_show),
        cmocka_unit_test(test_plain_is_untouched),
        cmocka_unit_test(test_broken_utf8_is_replaced),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
