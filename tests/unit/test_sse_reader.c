/* Server-sent events give the same events however the bytes are cut. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "sse_reader.h"

/* Events as one text, to compare. */
static int note(void *arg, const char *name, const char *id, const char *data)
{
    return claas_buf_printf(arg, "<%s|%s|%s>", name, id ? id : "-", data);
}

static int feed(const char *stream, size_t cut, struct claas_buf *events)
{
    struct sse_reader reader;
    size_t length = strlen(stream);
    int rc;

    claas_buf_init(events, 65536);
    sse_reader_init(&reader, note, events);
    rc = sse_reader_feed(&reader, stream, cut < length ? cut : length);
    if (rc == 0 && cut < length)
        rc = sse_reader_feed(&reader, stream + cut, length - cut);
    sse_reader_done(&reader);
    return rc;
}

static void expect(const char *stream, const char *wanted)
{
    for (size_t cut = 0; cut <= strlen(stream); cut++) {
        struct claas_buf events;

        assert_int_equal(feed(stream, cut, &events), 0);
        assert_string_equal(events.data ? events.data : "", wanted);
        claas_buf_done(&events);
    }
}

static void test_events(void **state)
{
    (void)state;
    expect("data: one\n\ndata: two\n\n", "<message|-|one><message|-|two>");
    expect("event: step\nid: 7\ndata: {\"a\": 1}\n\n", "<step|7|{\"a\": 1}>");
    expect("data: a\ndata: b\ndata:c\n\n", "<message|-|a\nb\nc>");
    expect("data\n\n", "<message|-|>");
    expect("data:  two blanks\n\n", "<message|-| two blanks>");
}

/* The id stays, the name does not. */
static void test_memory(void **state)
{
    (void)state;
    expect("event: step\nid: 7\ndata: x\n\ndata: y\n\n", "<step|7|x><message|7|y>");
}

static void test_line_ends(void **state)
{
    (void)state;
    expect("data: one\r\n\r\ndata: two\r\n\r\n", "<message|-|one><message|-|two>");
    expect("data: one\r\rdata: two\r\r", "<message|-|one><message|-|two>");
}

/* Comments, unknown fields, events without data, and what was cut off at the end are nothing. */
static void test_nothing(void **state)
{
    (void)state;
    expect(": ping\n\n\n\nretry: 3\nevent: x\n\ndata: y\n\n", "<message|-|y>");
    expect("data: cut off\n", "");
    expect("", "");
}

static int refuse(void *arg, const char *name, const char *id, const char *data)
{
    (void)arg, (void)name, (void)id, (void)data;
    return claas_fail(CLAAS_ERR_CANCELLED, NULL);
}

static void test_errors(void **state)
{
    static const char stream[] = "data: one\n\ndata: two\n\n";
    static char long_name[200];
    struct sse_reader reader;

    (void)state;
    sse_reader_init(&reader, refuse, NULL);
    assert_int_equal(sse_reader_feed(&reader, stream, strlen(stream)), CLAAS_ERR_CANCELLED);
    sse_reader_done(&reader);
    memset(long_name, 'x', sizeof(long_name));
    memcpy(long_name, "event: ", 7);
    long_name[sizeof(long_name) - 1] = '\n';
    sse_reader_init(&reader, refuse, NULL);
    assert_true(sse_reader_feed(&reader, long_name, sizeof(long_name)) < 0);
    sse_reader_done(&reader);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_events),    cmocka_unit_test(test_memory),
        cmocka_unit_test(test_line_ends), cmocka_unit_test(test_nothing),
        cmocka_unit_test(test_errors),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
