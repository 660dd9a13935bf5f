/* The bridge's pure parts: the header guard, body schemas, contents of messages, the route table,
 * the users' shares, the listen address. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "http_guard.h"
#include "listen.h"
#include "openai.h"
#include "routes.h"
#include "schema.h"
#include "shares.h"

/* --- guard --- */

struct header {
    const char *name, *value;
};

static const char *verdict(const char *version, const struct header *headers)
{
    struct http_guard guard = {0};

    for (; headers->name; headers++)
        http_guard_header(&guard, headers->name, strlen(headers->name), headers->value,
                          strlen(headers->value));
    return http_guard_verdict(&guard, version);
}

#define HOST                                                                                       \
    {                                                                                              \
        "Host", "localhost:8080"                                                                   \
    }
#define ASK(...) verdict("HTTP/1.1", (const struct header[]){__VA_ARGS__, {NULL, NULL}})

static void test_guard_passes(void **state)
{
    (void)state;
    assert_null(ASK(HOST));
    assert_null(ASK(HOST, {"Content-Length", "0"}));
    assert_null(ASK(HOST, {"content-length", "123456789012345678"}));
    assert_null(ASK(HOST, {"Transfer-Encoding", "Chunked"}));
    assert_null(ASK(HOST, {"X-Any", "tab\tand \xc3\xa9"}));
    assert_null(ASK(HOST, {"x!#$%&'*+-.^_`|~9", ""}));
    assert_null(ASK({"host", "[::1]:80"}));
    assert_null(verdict("HTTP/1.0", (const struct header[]){{NULL, NULL}}));
    assert_null(verdict("HTTP/1.0", (const struct header[]){HOST, {NULL, NULL}}));
}

static void test_guard_host(void **state)
{
    static const char *const addresses[] = {"127.0.0.1", "127.0.0.1:8080", "10.1.2.3:80",
                                            "[::1]",     "[::1]:8080",     "127.0.0.1.:80"};
    static const char *const names[] = {
        "localhost",   "",          ":80", "[::1", "[", "[]", "127.1", "::1", "127.0.0.1.nip.io",
        "[127.0.0.1]", "2130706433"};
    static const char *const local[] = {"localhost", "LocalHost.:80", "foo.localhost",
                                        "a.b.Localhost:8080", "foo.localhost."};
    static const char *const far[] = {
        "",        ".", ".localhost", "evillocalhost", "localhost.evil.example", "localhost..",
        "ocalhost"};

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(addresses); i++)
        assert_true(http_guard_host_is_address(addresses[i]));
    for (size_t i = 0; i < CLAAS_COUNT(names); i++)
        assert_false(http_guard_host_is_address(names[i]));
    assert_true(http_guard_host_is("LocalHost:8080", "localhost"));
    assert_true(http_guard_host_is("localhost", "localhost"));
    assert_false(http_guard_host_is("localhost.evil.example", "localhost"));
    assert_false(http_guard_host_is("evil.example:80", "localhost"));
    assert_true(http_guard_host_is("x.example", "x.example:8443"));
    assert_true(http_guard_host_is("x.example:80", "x.example:8443"));
    assert_true(http_guard_host_is("x.example.:80", "x.example"));
    assert_true(http_guard_host_is("x.example", "x.example."));
    assert_false(http_guard_host_is("x.example..", "x.example"));
    assert_false(http_guard_host_is("x.example.evil", "x.example:8443"));
    assert_false(http_guard_host_is("[", "[::1]:80"));
    assert_int_equal(http_guard_name_length("x.example.:80"), strlen("x.example"));
    assert_int_equal(http_guard_name_length("[::1]:80"), strlen("[::1]"));
    for (size_t i = 0; i < CLAAS_COUNT(local); i++)
        assert_true(http_guard_host_is_local(local[i]));
    for (size_t i = 0; i < CLAAS_COUNT(far); i++)
        assert_false(http_guard_host_is_local(far[i]));
}

static void test_guard_refuses(void **state)
{
    (void)state;
    assert_string_equal(ASK({"X", "y"}), "no Host");
    assert_string_equal(ASK(HOST, HOST), "more than one Host");
    assert_string_equal(ASK({"Host", "a b"}), "malformed Host");
    assert_string_equal(ASK({"Host", "a/b"}), "malformed Host");
    assert_string_equal(ASK(HOST, {"Content-Length", "1"}, {"Content-Length", "1"}),
                        "more than one Content-Length");
    assert_string_equal(ASK(HOST, {"Content-Length", "1, 1"}), "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", "+1"}), "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", "-1"}), "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", "0x10"}), "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", ""}), "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", "99999999999999999999"}),
                        "Content-Length is not a number");
    assert_string_equal(ASK(HOST, {"Content-Length", "1"}, {"Transfer-Encoding", "chunked"}),
                        "both Content-Length and Transfer-Encoding");
    assert_string_equal(ASK(HOST, {"Transfer-Encoding", "xchunked"}),
                        "Transfer-Encoding other than chunked");
    assert_string_equal(ASK(HOST, {"Transfer-Encoding", "gzip, chunked"}),
                        "Transfer-Encoding other than chunked");
    assert_string_equal(
        ASK(HOST, {"Transfer-Encoding", "chunked"}, {"Transfer-Encoding", "chunked"}),
        "more than one Transfer-Encoding");
    assert_string_equal(ASK(HOST, {"Content-Length ", "1"}), "malformed header name");
    assert_string_equal(ASK(HOST, {"", "1"}), "malformed header name");
    assert_string_equal(ASK(HOST, {"a(b", "1"}), "malformed header name");
    assert_string_equal(ASK(HOST, {"X", "a\rb"}), "control character in a header");
    assert_string_equal(ASK(HOST, {"X", "a\x7f"}), "control character in a header");
    assert_string_equal(verdict("HTTP/2.0", (const struct header[]){HOST, {NULL, NULL}}),
                        "unsupported HTTP version");
    assert_string_equal(
        verdict("HTTP/1.0",
                (const struct header[]){{"Transfer-Encoding", "chunked"}, {NULL, NULL}}),
        "Transfer-Encoding in HTTP/1.0");
}

static void test_guard_embedded_nul(void **state)
{
    struct http_guard guard = {0};

    (void)state;
    http_guard_header(&guard, "X", 1, "a\0b", 3);
    assert_string_equal(guard.reason, "control character in a header");
    guard = (struct http_guard){0};
    http_guard_header(&guard, "X\0y", 3, "a", 1);
    assert_string_equal(guard.reason, "malformed header name");
}

static void test_guard_target(void **state)
{
    (void)state;
    assert_true(http_guard_target_ok("/v1/lora?lora_id=a%2Fb"));
    assert_false(http_guard_target_ok(""));
    assert_false(http_guard_target_ok("/a%00b"));
    assert_false(http_guard_target_ok("/a b"));
    assert_false(http_guard_target_ok("/a\x01"));
    assert_false(http_guard_target_ok("/a\x7f"));
}

/* --- schema --- */

static const struct schema_field fields[] = {
    {"name", SCHEMA_STRING, true, 1, 5},
    {"count", SCHEMA_INT, false, 4, 128},
    {"rate", SCHEMA_NUMBER, false, 0, 8.03},
    {"on", SCHEMA_BOOL, false, 0, 0},
    {"list", SCHEMA_ARRAY, false, 1, 2},
    {"object", SCHEMA_OBJECT, false, 0, 0},
    {"anything", SCHEMA_ANY, false, 0, 0},
    {"exact", SCHEMA_INT, false, -9007199254740991.0, 1000001},
};

static void check_fault(const char *text, const char *expected)
{
    static const struct schema_place body = {NULL, "body", 0};
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *faults = cJSON_CreateArray();
    CLAAS_AUTO_FREE char *printed = NULL;

    assert_int_equal(claas_json_parse(text, strlen(text), 1 << 16, &json), 0);
    schema_check(faults, &body, json, fields, CLAAS_COUNT(fields));
    printed = claas_json_print(faults);
    assert_string_equal(printed, expected);
}

static void test_schema(void **state)
{
    (void)state;
    check_fault("{\"name\":\"a\",\"other\":[]}", "[]");
    check_fault("{\"name\":\"\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\"}", "[]");
    check_fault("{\"name\":\"a\",\"count\":4,\"rate\":2,\"on\":false,\"list\":[1],\"object\":{}}",
                "[]");
    check_fault("{\"name\":\"a\",\"count\":null}", "[]");
    check_fault("[]", "[{\"loc\":[\"body\"],\"msg\":\"Input should be a valid dictionary\","
                      "\"type\":\"dict_type\"}]");
    check_fault("{}", "[{\"loc\":[\"body\",\"name\"],\"msg\":\"Field required\","
                      "\"type\":\"missing\"}]");
    check_fault("{\"name\":\"\"}",
                "[{\"loc\":[\"body\",\"name\"],\"msg\":\"String should have at least 1 "
                "character\",\"type\":\"string_too_short\"}]");
    check_fault("{\"name\":7}", "[{\"loc\":[\"body\",\"name\"],\"msg\":\"Input should be a valid "
                                "string\",\"type\":\"string_type\"}]");
    check_fault("{\"name\":\"a\",\"count\":3}",
                "[{\"loc\":[\"body\",\"count\"],\"msg\":\"Input should be greater than or equal to "
                "4\",\"type\":\"greater_than_equal\"}]");
    check_fault("{\"name\":\"a\",\"count\":129}",
                "[{\"loc\":[\"body\",\"count\"],\"msg\":\"Input should be less than or equal to "
                "128\",\"type\":\"less_than_equal\"}]");
    check_fault("{\"name\":\"a\",\"count\":4.5}",
                "[{\"loc\":[\"body\",\"count\"],\"msg\":\"Input should be a valid integer\","
                "\"type\":\"int_type\"}]");
    check_fault("{\"name\":\"a\",\"rate\":\"1\"}",
                "[{\"loc\":[\"body\",\"rate\"],\"msg\":\"Input should be a valid number\","
                "\"type\":\"float_type\"}]");
    check_fault("{\"name\":\"a\",\"rate\":9}",
                "[{\"loc\":[\"body\",\"rate\"],\"msg\":\"Input should be less than or equal to "
                "8.03\",\"type\":\"less_than_equal\"}]");
    check_fault("{\"name\":\"a\",\"on\":1}",
                "[{\"loc\":[\"body\",\"on\"],\"msg\":\"Input should be a valid boolean\","
                "\"type\":\"bool_type\"}]");
    check_fault("{\"name\":\"a\",\"list\":[1,2,3]}",
                "[{\"loc\":[\"body\",\"list\"],\"msg\":\"List should have at most 2 items after "
                "validation, not 3\",\"type\":\"too_long\"}]");
    check_fault("{\"name\":\"a\",\"exact\":-9007199254740992}",
                "[{\"loc\":[\"body\",\"exact\"],\"msg\":\"Input should be greater than or equal to "
                "-9007199254740991\",\"type\":\"greater_than_equal\"}]");
    check_fault("{\"name\":\"a\",\"exact\":1000002}",
                "[{\"loc\":[\"body\",\"exact\"],\"msg\":\"Input should be less than or equal to "
                "1000001\",\"type\":\"less_than_equal\"}]");
    check_fault("{\"name\":\"a\",\"object\":[]}",
                "[{\"loc\":[\"body\",\"object\"],\"msg\":\"Input should be a valid dictionary\","
                "\"type\":\"dict_type\"}]");
}

/* --- contents --- */

static void check_content(const char *json_text, const char *expected)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = cJSON_Parse(json_text);
    CLAAS_AUTO_FREE char *text = openai_content_text(json);

    assert_string_equal(text, expected);
}

static void test_content(void **state)
{
    CLAAS_AUTO_FREE char *absent = openai_content_text(NULL);

    (void)state;
    assert_string_equal(absent, "");
    check_content("null", "");
    check_content("\"a\"", "a");
    check_content("[]", "");
    check_content(
        "[\"a\",{\"type\":\"text\",\"text\":\"b\"},{\"content\":\"c\"},{\"type\":\"image\"},"
        "7]",
        "a\nb\nc");
    check_content("[\"\",\"a\"]", "\na");
    check_content("{\"text\":\"t\"}", "t");
    check_content("{\"x\":\"t\"}", "");
    check_content("5", "5");
    check_content("true", "True");
}

/* --- routes --- */

static void check_route(const char *method, const char *path, const char *pattern,
                        const char *expected_tail)
{
    CLAAS_AUTO_FREE char *tail = NULL;
    const struct route *route = routes_find(method, path, &tail);

    if (!pattern) {
        assert_null(route);
        return;
    }
    assert_non_null(route);
    assert_string_equal(route->path, pattern);
    if (expected_tail)
        assert_string_equal(tail, expected_tail);
    else
        assert_null(tail);
}

static void test_routes(void **state)
{
    (void)state;
    check_route("GET", "/", "/", NULL);
    check_route("HEAD", "/health", "/health", NULL);
    check_route("POST", "/health", NULL, NULL);
    check_route("GET", "/v1/models", "/v1/models", NULL);
    check_route("GET", "/v1/models/", NULL, NULL);
    check_route("GET", "/v1/models/user/name@7", "/v1/models/**", "user/name@7");
    check_route("GET", "/v1/jobs/job-1", "/v1/jobs/*", "job-1");
    check_route("GET", "/v1/jobs/job-1/events", "/v1/jobs/*/events", "job-1");
    check_route("GET", "/v1/jobs/job-1/other", NULL, NULL);
    check_route("GET", "/v1/jobs/", NULL, NULL);
    check_route("DELETE", "/v1/jobs/job-1", "/v1/jobs/*", "job-1");
    check_route("GET", "/v1", NULL, NULL);
    check_route("GET", "", NULL, NULL);
}

/* --- listening --- */

static void check_listen(const char *address, int code)
{
    int fd = -1, port = 0;
    int rc = listen_open(address, 0, 1, &fd, &port);

    assert_int_equal(rc, code);
    assert_int_equal(listen_check(address), code);
    if (rc < 0)
        return;
    assert_true(port > 0);
    close(fd);
}

static void test_listen(void **state)
{
    char address[32];
    int fd, port, other;

    (void)state;
    check_listen("127.0.0.1:0", 0);
    check_listen("localhost:0", 0);
    check_listen("127.0.0.1", CLAAS_ERR_INVALID);
    check_listen(":80", CLAAS_ERR_INVALID);
    check_listen("127.0.0.1:", CLAAS_ERR_INVALID);
    check_listen("127.0.0.1:65536", CLAAS_ERR_INVALID);
    check_listen("127.0.0.1:-1", CLAAS_ERR_INVALID);
    check_listen("127.0.0.1:8o", CLAAS_ERR_INVALID);
    check_listen("example.com:80", CLAAS_ERR_INVALID);
    check_listen("[::1:80", CLAAS_ERR_INVALID);
    check_listen("0.0.0.0:0", CLAAS_ERR_DENIED);
    check_listen("192.168.1.1:0", CLAAS_ERR_DENIED);
    check_listen("[::]:0", CLAAS_ERR_DENIED);
    assert_int_equal(listen_open("127.0.0.1:0", 0, 1, &fd, &port), 0);
    snprintf(address, sizeof(address), "127.0.0.1:%d", port);
    assert_int_equal(listen_open(address, 0, 1, &other, &port), CLAAS_ERR_CONFLICT);
    assert_non_null(strstr(claas_error_text(), "in use"));
    close(fd);
}

/* --- shares --- */

static void test_shares(void **state)
{
    struct share *shares = NULL, *taken[4] = {NULL}, *refused = NULL;

    (void)state;
    assert_int_equal(share_take(&shares, "alice/one", 2, &taken[0]), 0);
    assert_int_equal(share_take(&shares, "alice/two-latest", 2, &taken[1]), 0);
    assert_ptr_equal(taken[0], taken[1]);
    assert_int_equal(share_take(&shares, "alice/one@7", 2, &refused), CLAAS_ERR_OVERLOADED);
    assert_null(refused);
    assert_non_null(strstr(claas_error_text(), "http.max_inflight_per_user is 2,"));
    assert_non_null(strstr(claas_error_text(), "user 'alice'"));
    assert_int_equal(share_take(&shares, "bob/one", 2, &taken[2]), 0);
    share_give_back(&taken[0]); /* not the last of the list, which goes on */
    assert_null(taken[0]);
    assert_int_equal(share_take(&shares, "alice/one", 2, &taken[0]), 0);
    for (size_t i = 0; i < CLAAS_COUNT(taken); i++)
        share_give_back(&taken[i]);
    assert_null(shares); /* nothing is kept of users who have no requests */
}

/* Every spelling of a user's name counts as that user, and nothing else does. */
static void test_shares_of_names(void **state)
{
    static const char *const same[] = {"/alice/one", "//alice/one", "alice/one/", "alice//one"};
    static const char *const others[] = {"alic/one", "alicex/one", "Alice/one", "a/alice"};
    static const char *const nobodys[] = {"",       "/",      "base",     "alice",
                                          "alice/", "/alice", "alice-one"};
    struct share *shares = NULL, *alice = NULL, *nobody = NULL, *share = NULL, *more = NULL;

    (void)state;
    assert_int_equal(share_take(&shares, "alice/one", 1, &alice), 0);
    for (size_t i = 0; i < CLAAS_COUNT(same); i++)
        assert_int_equal(share_take(&shares, same[i], 1, &share), CLAAS_ERR_OVERLOADED);
    for (size_t i = 0; i < CLAAS_COUNT(others); i++) {
        assert_int_equal(share_take(&shares, others[i], 1, &share), 0);
        share_give_back(&share);
    }
    assert_int_equal(share_take(&shares, "default", 1, &nobody), 0);
    for (size_t i = 0; i < CLAAS_COUNT(nobodys); i++)
        assert_int_equal(share_take(&shares, nobodys[i], 1, &share), CLAAS_ERR_OVERLOADED);
    assert_non_null(strstr(claas_error_text(), "that name no user"));
    assert_int_equal(share_take(&shares, NULL, 1, &share), 0); /* streams of events are apart */
    assert_int_equal(share_take(&shares, NULL, 1, &more), CLAAS_ERR_OVERLOADED);
    assert_int_equal(share_take(&shares, "/", 1, &more), CLAAS_ERR_OVERLOADED);
    share_give_back(&share);
    share_give_back(&alice);
    share_give_back(&nobody);
    assert_null(shares);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_guard_passes),  cmocka_unit_test(test_guard_host),
        cmocka_unit_test(test_guard_refuses), cmocka_unit_test(test_guard_embedded_nul),
        cmocka_unit_test(test_guard_target),  cmocka_unit_test(test_schema),
        cmocka_unit_test(test_content),       cmocka_unit_test(test_routes),
        cmocka_unit_test(test_shares),        cmocka_unit_test(test_shares_of_names),
        cmocka_unit_test(test_listen),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
