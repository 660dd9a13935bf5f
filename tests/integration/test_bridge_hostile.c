/* The bridge before clients that err, dawdle, vanish, flood or smuggle. Real sockets, raw bytes;
 * each server here has limits small enough to meet in a test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

#include "bridge.h"
#include "bridge_fakes.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "http_probe.h"

#define GET_ROOT     "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
#define CHAT(text)   "{\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"
#define STREAM(text) "{\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"

static struct fake_server server;

static void send_post(struct probe *probe, const char *path, const char *headers, const char *body)
{
    CLAAS_AUTO_FREE char *text =
        claas_format("POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %zu\r\n\r\n%s", path,
                     headers, strlen(body), body);

    probe_send(probe, text);
}

static void send_chat(struct probe *probe, const char *body)
{
    send_post(probe, "/v1/chat/completions", "", body);
}

static void check_alive(void)
{
    cJSON_Delete(http_json(server.port, "GET", "/", NULL, 200));
}

static void check_answer(struct probe *probe, int status)
{
    struct answer answer;

    probe_read(probe, false, &answer);
    if (answer.status != status)
        fail_msg("%d instead of %d: %s", answer.status, status, answer.body);
    answer_done(&answer);
}

/* --- names --- */

/* A page whose own name leads here is told apart by that name alone. */
static void test_hosts(void **state)
{
    static const struct {
        const char *host;
        int status;
    } cases[] = {
        {"localhost", 200},         {"LOCALHOST:1", 200},        {"127.0.0.1:8080", 200},
        {"[::1]:8080", 200},        {"192.168.1.7", 200},        {"proxy.example", 200},
        {"Proxy.Example:443", 200}, {"evil.example", 403},       {"evil.example:8080", 403},
        {"localhost.:1", 200},      {"app.localhost:1", 200},    {"proxy.example.", 200},
        {"other.example", 200},     {"other.example:80", 200},   {"localhost.evil.com", 403},
        {"x.proxy.example", 403},   {"127.0.0.1.evil.com", 403},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        CLAAS_AUTO_FREE char *text =
            claas_format("GET /health HTTP/1.1\r\nHost: %s\r\n\r\n", cases[i].host);
        struct probe probe;

        probe_open(&probe, server.port);
        probe_send(&probe, text);
        check_answer(&probe, cases[i].status);
        probe_close(&probe);
    }
}

/* What is to be added to http.hosts is said as it is to be written there. */
static void test_host_is_quoted(void **state)
{
    struct probe probe;

    (void)state;
    probe_open(&probe, server.port);
    probe_send(&probe, "GET /health HTTP/1.1\r\nHost: evil.example.:8080\r\n\r\n");
    probe_wait_for(&probe, "Host 'evil.example' is no name of this server");
    probe_close(&probe);
}

/* --- smuggling --- */

/* Each hides a second request; it must never be answered. */
#define HIDDEN "GET /docs HTTP/1.1\r\nHost: localhost\r\n\r\n"

static const struct {
    const char *name, *bytes;
} smugglers[] = {
    {"length and encoding",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
     "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" HIDDEN},
    {"encoding and length",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked"
     "\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" HIDDEN},
    {"two lengths", "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n"
                    "Content-Length: 33\r\n\r\n" HIDDEN},
    {"two equal lengths", "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                          "Content-Length: 2\r\n\r\n{}" HIDDEN},
    {"list of lengths",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2, 2\r\n\r\n{}" HIDDEN},
    {"signed length",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{}" HIDDEN},
    {"xchunked",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n"
     "0\r\n\r\n" HIDDEN},
    {"chunked, identity",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, "
     "identity\r\n\r\n0\r\n\r\n" HIDDEN},
    {"blank before colon",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nContent-Length : 33\r\n\r\n" HIDDEN},
    {"tab before colon",
     "POST /v1/lora/init HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding\t: chunked"
     "\r\n\r\n0\r\n\r\n" HIDDEN},
    {"no host", "GET / HTTP/1.1\r\n\r\n" HIDDEN},
    {"two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" HIDDEN},
    {"odd name", "GET / HTTP/1.1\r\nHost: localhost\r\nA(B: c\r\n\r\n" HIDDEN},
    {"control character", "GET / HTTP/1.1\r\nHost: localhost\r\nA: b\x01\r\n\r\n" HIDDEN},
    {"encoding in 1.0", "POST /v1/lora/init HTTP/1.0\r\nTransfer-Encoding: chunked\r\n"
                        "Connection: keep-alive\r\n\r\n0\r\n\r\n" HIDDEN},
    {"nul in target", "GET /a%00b HTTP/1.1\r\nHost: localhost\r\n\r\n" HIDDEN},
    {"broken utf-8 in path", "GET /a%ff HTTP/1.1\r\nHost: localhost\r\n\r\n" HIDDEN},
};

static void test_smuggling(void **state)
{
    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(smugglers); i++) {
        struct probe probe;
        struct answer answer;

        probe_open(&probe, server.port);
        probe_send(&probe, smugglers[i].bytes);
        probe_read(&probe, false, &answer);
        if (answer.status != 400)
            fail_msg("%s: %d %s", smugglers[i].name, answer.status, answer.body);
        answer_done(&answer);
        probe_closed(&probe);
        /* A Content-Length that is no number is refused by libmicrohttpd itself; 0.9.75 sends the
         * headers of that refusal twice. */
        if (probe.in.length > 0 && strstr(probe.in.data, "CLaaS API"))
            fail_msg("%s: the hidden request was answered: %s", smugglers[i].name, probe.in.data);
        probe_close(&probe);
    }
    check_alive();
}

/* Let through by libmicrohttpd 0.9.75 before anyone can see it: the value ends at the NUL. What
 * matters is that nothing else changes: one request, one answer. */
static void test_nul_in_header(void **state)
{
    static const char bytes[] =
        "GET / HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\nConnection: close\r\n\r\n";
    struct probe probe;
    struct answer answer;

    (void)state;
    probe_open(&probe, server.port);
    probe_send_bytes(&probe, bytes, sizeof(bytes) - 1);
    probe_read(&probe, false, &answer);
    assert_true(answer.status == 200 || answer.status == 400);
    answer_done(&answer);
    probe_closed(&probe);
    assert_int_equal(probe.in.length, 0);
    probe_close(&probe);
}

static void test_bare_line_feeds(void **state)
{
    struct probe probe;

    (void)state;
    probe_open(&probe, server.port);
    probe_send(&probe, "GET / HTTP/1.1\nHost: localhost\nConnection: close\n\n");
    check_answer(&probe, 200);
    probe_closed(&probe);
    assert_int_equal(probe.in.length, 0);
    probe_close(&probe);
}

static void test_garbage(void **state)
{
    static const char *const texts[] = {
        "\r\n\r\n\r\n", "GET\r\n\r\n", "\x16\x03\x01\x02garbage\r\n\r\n",
        "GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"};

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(texts); i++) {
        struct probe probe;

        probe_open(&probe, server.port);
        probe_try_send(&probe, texts[i], strlen(texts[i]));
        shutdown(probe.fd, SHUT_WR);
        probe_closed(&probe);
        probe_close(&probe);
    }
    check_alive();
}

static void test_huge_headers(void **state)
{
    CLAAS_AUTO_FREE char *value = claas_alloc(1, 40001);
    CLAAS_AUTO_FREE char *text = NULL;
    struct probe probe;
    struct answer answer;

    (void)state;
    memset(value, 'a', 40000);
    text = claas_format("GET / HTTP/1.1\r\nHost: localhost\r\nA: %s\r\n\r\n", value);
    probe_open(&probe, server.port);
    probe_try_send(&probe, text, strlen(text));
    probe_read(&probe, false, &answer);
    assert_true(answer.status == 431 || answer.status == 0); /* or a reset overtook it */
    answer_done(&answer);
    probe_close(&probe);
    check_alive();
}

/* --- bodies over the limit (http.max_body=64KiB, http.max_import=256KiB) --- */

static void test_length_over_limit(void **state)
{
    struct probe probe;
    struct answer answer;
    char value[32];

    (void)state;
    probe_open(&probe, server.port);
    probe_send(&probe,
               "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65537\r\n"
               "Expect: 100-continue\r\n\r\n");
    probe_read(&probe, false, &answer); /* at once, without a byte of the body */
    assert_int_equal(answer.status, 413);
    assert_string_equal(answer_header(&answer, "Connection", value, sizeof(value)), "close");
    assert_non_null(strstr(answer.body, "\"error\""));
    answer_done(&answer);
    probe_closed(&probe);
    probe_close(&probe);
    probe_open(&probe, server.port);
    probe_send(&probe, "POST /v1/lora/import?lora_id=a/b HTTP/1.1\r\nHost: localhost\r\n"
                       "Content-Length: 262145\r\n\r\n");
    check_answer(&probe, 413);
    probe_close(&probe);
}

static void send_chunks(struct probe *probe, int count)
{
    char block[16384 + 8];

    memset(block, ' ', sizeof(block));
    memcpy(block, "4000\r\n", 6);
    memcpy(block + 6 + 16384, "\r\n", 2);
    for (int i = 0; i < count; i++) {
        if (!probe_try_send(probe, block, sizeof(block)))
            return;
    }
}

static void test_chunks_over_limit(void **state)
{
    struct probe probe;
    struct answer answer;

    (void)state;
    probe_open(&probe, server.port);
    probe_send(&probe, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n");
    send_chunks(&probe, 8); /* 128 KiB */
    probe_send(&probe, "0\r\n\r\n");
    check_answer(&probe, 413);
    probe_close(&probe);
    probe_open(&probe, server.port);
    probe_send(&probe, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n");
    send_chunks(&probe, 4000); /* cut off at four times the limit */
    probe_read(&probe, false, &answer);
    assert_int_equal(answer.status, 0);
    answer_done(&answer);
    probe_close(&probe);
    check_alive();
}

static void test_body_at_limit(void **state)
{
    CLAAS_AUTO_FREE char *body = claas_alloc(1, 65537);
    CLAAS_AUTO_FREE char *upload = claas_alloc(1, 262145);
    static const char chat[] = CHAT("hi");
    struct probe probe;

    (void)state;
    memset(body, ' ', 65536);
    memcpy(body, chat, strlen(chat));
    memset(upload, 'z', 262144);
    probe_open(&probe, server.port);
    send_chat(&probe, body);
    check_answer(&probe, 200);
    send_post(&probe, "/v1/lora/import?lora_id=a/b", "", upload);
    check_answer(&probe, 200);
    probe_close(&probe);
}

/* --- protocol --- */

static void test_pipelining(void **state)
{
    struct probe probe;
    struct answer answer;

    (void)state;
    probe_open(&probe, server.port);
    send_chat(&probe, CHAT("late")); /* suspended for a while; the others wait behind it */
    send_chat(&probe, CHAT("hi"));
    probe_send(&probe, GET_ROOT);
    probe_read(&probe, false, &answer);
    assert_non_null(strstr(answer.body, "\"late\""));
    answer_done(&answer);
    probe_read(&probe, false, &answer);
    assert_non_null(strstr(answer.body, "Hi there"));
    answer_done(&answer);
    check_answer(&probe, 200);
    probe_close(&probe);
}

static void test_expect_continue(void **state)
{
    CLAAS_AUTO_FREE char *text = NULL;
    struct probe probe;

    (void)state;
    probe_open(&probe, server.port);
    text = claas_format(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n"
        "Expect: 100-continue\r\n\r\n",
        strlen(CHAT("hi")));
    probe_send(&probe, text);
    probe_wait_for(&probe, "HTTP/1.1 100 Continue\r\n\r\n");
    probe_send(&probe, CHAT("hi"));
    check_answer(&probe, 200);
    probe_close(&probe);
}

static void test_old_http(void **state)
{
    CLAAS_AUTO_FREE char *text = NULL;
    struct probe probe;
    struct answer answer;

    (void)state;
    probe_open(&probe, server.port);
    probe_send(&probe, "GET / HTTP/1.0\r\n\r\n");
    probe_read(&probe, false, &answer);
    assert_int_equal(answer.status, 200);
    answer_done(&answer);
    probe_closed(&probe);
    probe_close(&probe);
    probe_open(&probe, server.port); /* a stream without chunks, ended by closing */
    text = claas_format("POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %zu\r\n\r\n%s",
                        strlen(STREAM("hi")), STREAM("hi"));
    probe_send(&probe, text);
    probe_read(&probe, false, &answer);
    assert_int_equal(answer.status, 200);
    assert_non_null(strstr(answer.body, "data: [DONE]"));
    answer_done(&answer);
    probe_close(&probe);
}

/* --- clients that dawdle (header 400 ms, body 400 ms, idle 800 ms) --- */

/* Sends one byte every 50 ms until the server has had enough; ms that took. */
static int64_t drip(struct probe *probe, const char *bytes)
{
    int64_t start = claas_clock_ms();
    char block[64];

    for (size_t i = 0; claas_clock_ms() < start + 8000; i++) {
        if (send(probe->fd, bytes + i % strlen(bytes), 1, MSG_NOSIGNAL) != 1)
            break;
        nanosleep(&(struct timespec){0, 50000000}, NULL);
        if (recv(probe->fd, block, sizeof(block), MSG_DONTWAIT) == 0)
            break;
    }
    return claas_clock_ms() - start;
}

static void check_dripped(const char *first, const char *bytes)
{
    struct probe probe;
    int64_t took;

    probe_open(&probe, server.port);
    probe_send(&probe, first);
    took = drip(&probe, bytes);
    probe_close(&probe);
    if (!(took >= 300 && took < 2500))
        fail_msg("cut off after %d ms", (int)took);
}

static void test_slow_clients(void **state)
{
    (void)state;
    check_dripped("", "GET /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    check_dripped("GET / HTTP/1.1\r\nHost: localhost\r\n",
                  "A: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb");
    check_dripped(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n",
        " ");
    check_alive();
}

static void test_idle_connections(void **state)
{
    struct probe probe;
    struct answer answer;
    int64_t start;

    (void)state;
    probe_open(&probe, server.port); /* never says a word */
    start = claas_clock_ms();
    probe_closed(&probe);
    assert_true(claas_clock_ms() - start < 2500);
    probe_close(&probe);
    probe_open(&probe, server.port); /* kept alive, then silent */
    probe_send(&probe, GET_ROOT);
    probe_read(&probe, false, &answer);
    answer_done(&answer);
    start = claas_clock_ms();
    probe_closed(&probe);
    if (!(claas_clock_ms() - start >= 600 && claas_clock_ms() - start < 3000))
        fail_msg("closed after %d ms", (int)(claas_clock_ms() - start));
    probe_close(&probe);
    probe_open(&probe, server.port); /* kept alive, then slow */
    probe_send(&probe, GET_ROOT);
    probe_read(&probe, false, &answer);
    answer_done(&answer);
    start = drip(&probe, "GET /aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    if (!(start < 1500)) /* the header's deadline from its first byte, not the idle one's */
        fail_msg("cut off after %d ms", (int)start);
    probe_close(&probe);
}

/* Work that takes longer than every time-out of the connection is not cut off. */
static void test_patience_with_work(void **state)
{
    struct probe probe;

    (void)state;
    probe_open(&probe, server.port);
    send_chat(&probe, CHAT("late"));
    check_answer(&probe, 200);
    send_chat(&probe, CHAT("hi")); /* and the connection lives on */
    check_answer(&probe, 200);
    probe_close(&probe);
}

/* --- clients that vanish --- */

static void test_gone_while_waiting(void **state)
{
    struct probe probes[20];
    int cancels = fake_cancels, held = fake_held;

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++) {
        probe_open(&probes[i], server.port);
        send_chat(&probes[i], CHAT("hang"));
    }
    fake_wait(&fake_held, held + (int)CLAAS_COUNT(probes));
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++) {
        if (i % 2) /* a half-close counts as gone too */
            shutdown(probes[i].fd, SHUT_WR);
        else
            probe_close(&probes[i]);
    }
    fake_wait(&fake_cancels, cancels + (int)CLAAS_COUNT(probes));
    for (size_t i = 1; i < CLAAS_COUNT(probes); i += 2) {
        probe_closed(&probes[i]);
        probe_close(&probes[i]);
    }
    check_alive();
}

static void test_gone_while_streaming(void **state)
{
    struct probe probes[20];
    int cancels = fake_cancels;

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++) {
        probe_open(&probes[i], server.port);
        send_chat(&probes[i], STREAM("piece then hang"));
        probe_wait_for(&probes[i], "\"content\":\"Hi\"");
    }
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++)
        probe_close(&probes[i]);
    fake_wait(&fake_cancels, cancels + (int)CLAAS_COUNT(probes));
    check_alive();
}

/* 10 MB are written to a client that reads nothing: it is cut off, the memory freed. */
static void test_slow_reader(void **state)
{
    struct probe probe;
    int cancels = fake_cancels, small = 4096;

    (void)state;
    probe_open(&probe, server.port);
    setsockopt(probe.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    send_chat(&probe, STREAM("flood"));
    fake_wait(&fake_cancels, cancels + 1);
    probe_close(&probe);
    check_alive();
}

/* --- crowds --- */

static void test_many_idle_connections(void **state)
{
    enum { CROWD = 1000 };
    static const char *const settings[] = {"log.level=error", "http.max_connections_per_ip=1024",
                                           NULL};
    struct probe *probes = claas_alloc(CROWD, sizeof(*probes));
    struct fake_server own;

    (void)state;
    fake_server_start(&own, settings);
    for (int i = 0; i < CROWD; i++)
        probe_open(&probes[i], own.port);
    for (int i = 0; i < CROWD; i += 10) {
        probe_send(&probes[i], GET_ROOT);
        check_answer(&probes[i], 200);
    }
    cJSON_Delete(http_json(own.port, "GET", "/health", NULL, 200));
    for (int i = 0; i < CROWD; i++)
        probe_close(&probes[i]);
    fake_server_stop(&own);
    free(probes);
}

/* At the connection limit nobody is accepted; once the idle ones have timed out everybody is. */
static void test_connection_limit_recovers(void **state)
{
    enum { LIMIT = 10 };
    static const char *const settings[] = {"log.level=error",           "http.max_connections=10",
                                           "http.header_timeout=500ms", "http.idle_timeout=500ms",
                                           "http.body_timeout=500ms",   NULL};
    struct probe probes[LIMIT], late[3];
    struct fake_server own;

    (void)state;
    fake_server_start(&own, settings);
    for (int i = 0; i < LIMIT; i++)
        probe_open(&probes[i], own.port);
    for (size_t i = 0; i < CLAAS_COUNT(late); i++) {
        probe_open(&late[i], own.port); /* into the backlog */
        probe_send(&late[i], GET_ROOT);
    }
    for (size_t i = 0; i < CLAAS_COUNT(late); i++) {
        check_answer(&late[i], 200);
        probe_close(&late[i]);
    }
    for (int i = 0; i < LIMIT; i++)
        probe_close(&probes[i]);
    cJSON_Delete(http_json(own.port, "GET", "/", NULL, 200));
    fake_server_stop(&own);
}

static void test_inflight_limit(void **state)
{
    static const char *const settings[] = {"log.level=error", "http.max_inflight=2", NULL};
    struct probe first, second, third;
    struct fake_server own;
    struct answer answer;
    char value[32];

    (void)state;
    fake_server_start(&own, settings);
    probe_open(&first, own.port);
    probe_open(&second, own.port);
    probe_open(&third, own.port);
    send_chat(&first, CHAT("hang"));
    send_chat(&second, CHAT("hang"));
    fake_wait(&fake_held, 2);
    send_chat(&third, CHAT("hi"));
    probe_read(&third, false, &answer);
    assert_int_equal(answer.status, 503);
    assert_string_equal(answer_header(&answer, "Retry-After", value, sizeof(value)), "2");
    answer_done(&answer);
    cJSON_Delete(http_json(own.port, "GET", "/health", NULL, 200));
    probe_close(&first);
    fake_wait(&fake_cancels, 1);
    send_chat(&third, CHAT("hi")); /* on the same connection: it was kept */
    check_answer(&third, 200);
    probe_close(&second);
    probe_close(&third);
    fake_server_stop(&own);
}

#define CHAT_OF(model, text)                                                                       \
    "{\"model\":\"" model "\",\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"
#define STREAM_OF(model, text)                                                                     \
    "{\"stream\":true,\"model\":\"" model                                                          \
    "\",\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"

/* Over a user's share: 429 that says which bound it is, with Retry-After and the route's shape of
 * errors. */
static void check_share_refused(int port, const char *method, const char *path, const char *body,
                                const char *whose)
{
    struct answer answer;
    char value[32];

    http_ask(port, method, path, "", body, &answer);
    if (answer.status != 429)
        fail_msg("%s %s %s: %d %s", method, path, body ? body : "", answer.status, answer.body);
    assert_string_equal(answer_header(&answer, "Retry-After", value, sizeof(value)), "2");
    assert_non_null(strstr(answer.body, whose));
    assert_non_null(strstr(answer.body, "http.max_inflight_per_user is 2,"));
    if (strstr(path, "completions")) {
        assert_non_null(strstr(answer.body, "\"type\":\"rate_limit_error\""));
        assert_non_null(strstr(answer.body, "\"code\":\"rate_limit_exceeded\""));
    } else {
        assert_non_null(strstr(answer.body, "\"detail\":\""));
    }
    answer_done(&answer);
}

/* Everything that may take long for the user's adapters, however they are spelt. */
static void check_all_refused(int port, const char *whose)
{
    static const struct {
        const char *method, *path, *body;
    } asks[] = {
        {"POST", "/v1/chat/completions", CHAT_OF("alice/x", "hi")},
        {"POST", "/v1/chat/completions", STREAM_OF("/alice/other@3", "hi")},
        {"POST", "/v1/completions", "{\"model\":\"alice/x-latest\",\"prompt\":\"hi\"}"},
        {"POST", "/v1/feedback",
         "{\"lora_id\":\"alice/x\",\"response\":\"r\",\"feedback\":\"good\"}"},
        {"POST", "/v1/feedback",
         "{\"requests\":[{\"lora_id\":\"alice/x\",\"response\":\"r\",\"feedback\":\"good\"}]}"},
        {"POST", "/v1/lora/init", "{\"lora_id\":\"alice/new\"}"},
        {"POST", "/v1/lora/import?lora_id=alice/new", "PK zip"},
        {"GET", "/v1/lora/export?lora_id=alice/x", NULL},
    };

    for (size_t i = 0; i < CLAAS_COUNT(asks); i++)
        check_share_refused(port, asks[i].method, asks[i].path, asks[i].body, whose);
    assert_true(claas_metric_value(CLAAS_METRIC_HTTP_SHARE_REFUSED) == CLAAS_COUNT(asks));
}

/* The end of a request is known to the bridge a moment after its client left. */
static void wait_inflight(int port, int64_t wanted)
{
    int64_t end = claas_clock_ms() + 10000, inflight = -1;

    while (inflight != wanted) {
        cJSON *health = http_json(port, "GET", "/health", NULL, 200);

        claas_json_get_int(claas_json_get(health, "http"), "inflight", 0, INT64_MAX, &inflight);
        cJSON_Delete(health);
        if (claas_clock_ms() > end)
            fail_msg("%d requests are being answered", (int)inflight);
    }
}

/* One user's long requests leave the rest of the pool to others. */
static void test_share_of_a_user(void **state)
{
    static const char *const settings[] = {"log.level=error", "http.max_inflight=6",
                                           "http.max_inflight_per_user=2", NULL};
    const char *chat = "/v1/chat/completions";
    const char *watch = "GET /v1/jobs/job-hang/events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    struct probe first, second, third, watches[2];
    struct fake_server own;

    (void)state;
    fake_server_start(&own, settings);
    claas_metric_set(CLAAS_METRIC_HTTP_SHARE_REFUSED, 0);
    probe_open(&first, own.port);
    probe_open(&second, own.port);
    send_chat(&first, CHAT_OF("alice/x", "hang"));
    send_chat(&second, STREAM_OF("alice/y", "piece then hang"));
    fake_wait(&fake_held, 2);
    check_all_refused(own.port, "user 'alice'");
    wait_inflight(own.port, 2);
    /* What ends at once is answered, and so are others, with or without a user's name. */
    cJSON_Delete(http_json(own.port, "GET", "/v1/lora/versions?lora_id=alice/x", NULL, 200));
    cJSON_Delete(http_json(own.port, "DELETE", "/v1/jobs/job-1", NULL, 200));
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT_OF("bob/x", "hi"), 200));
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT("hi"), 200));
    probe_close(&second);
    wait_inflight(own.port, 1);
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT_OF("alice/x", "hi"), 200));
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT_OF("alice/x", "hi"), 200));
    /* Streams of events have a share of their own, and so have, whatever they name, all that name
     * no user. */
    for (size_t i = 0; i < CLAAS_COUNT(watches); i++) {
        probe_open(&watches[i], own.port);
        probe_send(&watches[i], watch);
    }
    fake_wait(&fake_held, 4);
    check_share_refused(own.port, "GET", "/v1/jobs/job-1/events", NULL, "streams of jobs' events");
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT("hi"), 200));
    probe_open(&second, own.port);
    probe_open(&third, own.port);
    send_chat(&second, CHAT_OF("alice-x", "hang"));
    send_chat(&third, CHAT("hang"));
    fake_wait(&fake_held, 6);
    check_share_refused(own.port, "POST", chat, CHAT("hi"), "that name no user");
    cJSON_Delete(http_json(own.port, "POST", chat, CHAT_OF("bob/x", "hi"), 200));
    probe_close(&first);
    probe_close(&second);
    probe_close(&third);
    for (size_t i = 0; i < CLAAS_COUNT(watches); i++)
        probe_close(&watches[i]);
    wait_inflight(own.port, 0);
    fake_server_stop(&own);
}

/* Without the setting a single user may have the whole pool. */
static void test_no_share_by_default(void **state)
{
    static const char *const settings[] = {"log.level=error", "http.max_inflight=3", NULL};
    struct probe probes[3];
    struct fake_server own;

    (void)state;
    fake_server_start(&own, settings);
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++) {
        probe_open(&probes[i], own.port);
        send_chat(&probes[i], CHAT_OF("alice/x", "hang"));
    }
    fake_wait(&fake_held, 3);
    cJSON_Delete(
        http_json(own.port, "POST", "/v1/chat/completions", CHAT_OF("alice/x", "hi"), 503));
    for (size_t i = 0; i < CLAAS_COUNT(probes); i++)
        probe_close(&probes[i]);
    wait_inflight(own.port, 0);
    fake_server_stop(&own);
}

static void test_bad_addresses(void **state)
{
    static const char *const addresses[] = {"listen=0.0.0.0:0", "listen=[::]:0", "listen=nowhere"};

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(addresses); i++) {
        CLAAS_AUTO_FREE char *data = claas_format("data=%s/%zu", server.directory, i);
        const char *overrides[] = {addresses[i], data, "log.level=error"};
        claas_config_t *config = NULL;
        claas_runtime_t *runtime = NULL;
        struct claas_bridge_args args = {0};

        assert_int_equal(claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &config), 0);
        if (claas_runtime_new(config, &runtime) < 0)
            fail_msg("%s", claas_error_text());
        args.config = config;
        assert_true(claas_runtime_start(runtime, &claas_bridge_class, "bridge", &args) < 0);
        if (!strstr(claas_error_text(), "listen: "))
            fail_msg("'%s'", claas_error_text());
        claas_runtime_free(&runtime);
        claas_config_free(&config);
    }
}

static int start(void **state)
{
    static const char *const settings[] = {"log.level=error",
                                           "http.max_body=64KiB",
                                           "http.max_import=256KiB",
                                           "http.header_timeout=400ms",
                                           "http.body_timeout=400ms",
                                           "http.idle_timeout=800ms",
                                           "http.hosts=proxy.example, other.example:8443",
                                           NULL};

    (void)state;
    fake_server_start(&server, settings);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    fake_server_stop(&server);
    return 0;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hosts),
        cmocka_unit_test(test_host_is_quoted),
        cmocka_unit_test(test_smuggling),
        cmocka_unit_test(test_nul_in_header),
        cmocka_unit_test(test_bare_line_feeds),
        cmocka_unit_test(test_garbage),
        cmocka_unit_test(test_huge_headers),
        cmocka_unit_test(test_length_over_limit),
        cmocka_unit_test(test_chunks_over_limit),
        cmocka_unit_test(test_body_at_limit),
        cmocka_unit_test(test_pipelining),
        cmocka_unit_test(test_expect_continue),
        cmocka_unit_test(test_old_http),
        cmocka_unit_test(test_slow_clients),
        cmocka_unit_test(test_idle_connections),
        cmocka_unit_test(test_patience_with_work),
        cmocka_unit_test(test_gone_while_waiting),
        cmocka_unit_test(test_gone_while_streaming),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_bad_addresses),
    };
    const struct CMUnitTest own_servers[] = {
        cmocka_unit_test(test_many_idle_connections),
        cmocka_unit_test(test_connection_limit_recovers),
        cmocka_unit_test(test_inflight_limit),
        cmocka_unit_test(test_share_of_a_user),
        cmocka_unit_test(test_no_share_by_default),
    };
    struct rlimit limit;
    int failed;

    signal(SIGPIPE, SIG_IGN);
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
    setrlimit(RLIMIT_NOFILE, &limit);
    failed = cmocka_run_group_tests(tests, start, stop);
    return failed + cmocka_run_group_tests(own_servers, NULL, NULL);
}
