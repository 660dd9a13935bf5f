/* The outer side of the switch: clients over ipc, and peers that break every rule. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include "claas/client.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"

#include <czmq.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

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

static void write_endpoint(const struct fixture *fixture, const char *name, char text[128])
{
    snprintf(text, 128, "ipc://%s/%s", fixture->dir, name);
}

static claas_client_t *new_client(const struct fixture *fixture)
{
    claas_client_t *client = NULL;
    char endpoint[128];

    write_endpoint(fixture, "claas.ipc", endpoint);
    assert_int_equal(claas_client_new(endpoint, &client), 0);
    return client;
}

static cJSON *prefix_body(const char *prefix)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "prefix", prefix);
    return body;
}

/* A list request of the client; its first adapter goes to `text`. */
static int list(claas_client_t *client, const char *prefix, int64_t timeout_ms, char text[64])
{
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;
    int rc = claas_client_request(client, "storage", CLAAS_MSG_ADAPTER_LIST, prefix_body(prefix),
                                  timeout_ms, NULL, NULL, &body);

    if (rc == 0)
        claas_copy_text(text, 64,
                        cJSON_GetArrayItem(claas_json_get(body, "adapters"), 0)->valuestring);
    return rc;
}

/* --- well-behaved clients ----------------------------------------------------------------------
 */

static void request(void **state)
{
    claas_client_t *client = new_client(*state);
    char text[64];

    assert_int_equal(list(client, "", 8000, text), 0);
    assert_string_equal(text, "storage");
    assert_int_equal(list(client, "principal", 8000, text), 0);
    assert_string_equal(text, "local");
    assert_int_equal(list(client, "fail", 8000, text), CLAAS_ERR_NOT_FOUND);
    assert_string_equal(claas_error_text(), "no such adapter");
    assert_int_equal(list(client, "never", 100, text), CLAAS_ERR_DEADLINE);
    assert_int_equal(list(client, "", 8000, text), 0);
    claas_client_free(&client);
}

static void count_progress(void *arg, const cJSON *body)
{
    (*(int *)arg)++;
}

static void progress(void **state)
{
    claas_client_t *client = new_client(*state);
    cJSON *body = cJSON_CreateObject();
    cJSON *requests = claas_json_set(body, "requests", cJSON_CreateArray());
    int pieces = 0;

    cJSON_AddItemToArray(requests, cJSON_CreateObject());
    assert_int_equal(claas_client_request(client, "storage", CLAAS_MSG_FEEDBACK, body, 8000,
                                          count_progress, &pieces, NULL),
                     0);
    assert_int_equal(pieces, 3);
    claas_client_free(&client);
}

static void role_is_checked(void **state)
{
    claas_client_t *client = new_client(*state);
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "cycle_id", "c");
    assert_int_equal(
        claas_client_request(client, "storage", CLAAS_MSG_CYCLE_END, body, 8000, NULL, NULL, NULL),
        CLAAS_ERR_DENIED);
    assert_string_equal(claas_error_text(), "CYCLE_END may not be sent by clients");
    claas_client_free(&client);
}

static void no_server(void **state)
{
    claas_client_t *client = NULL;

    assert_int_equal(claas_client_new("ipc:///nowhere/claas.ipc", &client), CLAAS_ERR_UNAVAILABLE);
    assert_null(client);
}

struct cut {
    struct fixture *fixture;
    pthread_t thread;
};

static void *stop_runtime(void *arg)
{
    struct cut *cut = arg;

    probe_await_count(cut->fixture->probe, "kept", 1);
    claas_runtime_free(&cut->fixture->runtime);
    return NULL;
}

static void server_stops_while_asked(void **state)
{
    struct cut cut = {.fixture = *state};
    claas_client_t *client = new_client(*state);
    char text[64];

    pthread_create(&cut.thread, NULL, stop_runtime, &cut);
    assert_int_equal(list(client, "never", 60000, text), CLAAS_ERR_UNAVAILABLE);
    pthread_join(cut.thread, NULL);
    assert_int_equal(list(client, "", 8000, text), CLAAS_ERR_UNAVAILABLE);
    claas_client_free(&client);
}

/* --- raw peers ---------------------------------------------------------------------------------
 */

static zsock_t *new_peer(const struct fixture *fixture, const char *routing_id)
{
    zsock_t *peer = zsock_new(ZMQ_DEALER);
    char endpoint[128];

    write_endpoint(fixture, "claas.ipc", endpoint);
    if (routing_id)
        zsock_set_identity(peer, routing_id);
    zsock_set_linger(peer, 1000);
    zsock_set_rcvtimeo(peer, 10000);
    assert_int_equal(zsock_connect(peer, "%s", endpoint), 0);
    return peer;
}

static struct claas_header request_header(int type, uint64_t correlation)
{
    return (struct claas_header){.version = CLAAS_PROTOCOL_VERSION,
                                 .kind = CLAAS_KIND_REQ,
                                 .type = (uint16_t)type,
                                 .codec = CLAAS_CODEC_JSON,
                                 .correlation = correlation,
                                 .budget_ms = 8000,
                                 .epoch = 77};
}

static void send_raw(zsock_t *peer, const char *to, size_t to_length,
                     const struct claas_header *header, const char *body)
{
    uint8_t bytes[CLAAS_HEADER_BYTES];
    zmsg_t *message = zmsg_new();

    claas_header_encode(header, bytes);
    zmsg_addmem(message, to, to_length);
    zmsg_addmem(message, bytes, sizeof(bytes));
    zmsg_addmem(message, body, strlen(body));
    assert_int_equal(zmsg_send(&message, peer), 0);
}

static void send_text(zsock_t *peer, const char *to, struct claas_header header, const char *body)
{
    header.body_len = (uint32_t)strlen(body);
    send_raw(peer, to, strlen(to), &header, body);
}

/* Receives one message; the error code of its body, 0 for another kind than ERR. */
static int receive(zsock_t *peer, struct claas_header *header)
{
    zmsg_t *message = zmsg_recv(peer);
    int64_t code = 0;

    assert_non_null(message);
    assert_int_equal(zmsg_size(message), 3);
    zmsg_first(message);
    zframe_t *frame = zmsg_next(message);
    assert_int_equal(claas_header_decode(zframe_data(frame), zframe_size(frame), header), 0);
    frame = zmsg_next(message);
    assert_int_equal(zframe_size(frame), header->body_len);
    if (header->kind == CLAAS_KIND_ERR) {
        CLAAS_AUTO(claas_json_free) cJSON *body = NULL;

        assert_int_equal(
            claas_json_parse((char *)zframe_data(frame), zframe_size(frame), 65536, &body), 0);
        assert_int_equal(claas_json_get_int(body, "code", -1000, -1, &code), 1);
        assert_non_null(claas_json_get(body, "error"));
        assert_non_null(claas_json_get(body, "text"));
    }
    zmsg_destroy(&message);
    return (int)code;
}

static int answer_of(zsock_t *peer, struct claas_header header, const char *to, const char *body)
{
    struct claas_header answer;

    send_text(peer, to, header, body);
    int code = receive(peer, &answer);
    assert_true(answer.correlation == header.correlation);
    return code;
}

static void raw_request(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header answer;

    send_text(peer, "storage", request_header(CLAAS_MSG_ADAPTER_LIST, 5), "{}");
    assert_int_equal(receive(peer, &answer), 0);
    assert_int_equal(answer.kind, CLAAS_KIND_REP);
    assert_int_equal(answer.type, CLAAS_MSG_ADAPTER_LIST);
    assert_true(answer.correlation == 5 && answer.epoch == 77);
    zsock_destroy(&peer);
}

static void wrong_requests(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header good = request_header(CLAAS_MSG_ADAPTER_LIST, 9), bad;

    bad = good;
    bad.version = 2;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_VERSION);
    bad = good;
    bad.kind = 99;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_FORMAT);
    bad = good;
    bad.type = 0x7777;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_UNSUPPORTED);
    bad = good;
    bad.budget_ms = 0;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_FORMAT);
    bad = good;
    bad.correlation = 0;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_FORMAT);
    bad = good;
    bad.codec = 1;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_UNSUPPORTED);
    bad = good;
    bad.type = CLAAS_MSG_VERSION_PUBLISH;
    assert_int_equal(answer_of(peer, bad, "storage", "{}"), CLAAS_ERR_DENIED);
    assert_int_equal(answer_of(peer, good, "nobody", "{}"), CLAAS_ERR_UNAVAILABLE);
    assert_int_equal(answer_of(peer, good, "", "{}"), CLAAS_ERR_UNAVAILABLE);
    assert_int_equal(answer_of(peer, good, "storage", "{\"prefix\":"), CLAAS_ERR_FORMAT);
    assert_int_equal(answer_of(peer, good, "storage", "[]"), CLAAS_ERR_INVALID);
    assert_int_equal(answer_of(peer, good, "storage", "{\"prefix\":7}"), CLAAS_ERR_INVALID);
    char *big = CLAAS_NEW_ARRAY(char, 6000);
    memset(big, ' ', 5999);
    assert_int_equal(answer_of(peer, good, "storage", big), CLAAS_ERR_TOO_LARGE);
    free(big);
    assert_int_equal(answer_of(peer, good, "storage", "{}"), 0);
    zsock_destroy(&peer);
}

/* Every truncation of a good message, frame by frame, and garbage of all sizes; then all is well.
 */
static void garbage(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header good = request_header(CLAAS_MSG_ADAPTER_LIST, 3), answer;
    uint8_t bytes[CLAAS_HEADER_BYTES];
    int sent = 0;

    good.body_len = 2;
    claas_header_encode(&good, bytes);
    for (size_t length = 0; length < sizeof(bytes); length++, sent++) {
        zmsg_t *message = zmsg_new();

        zmsg_addmem(message, "storage", 7);
        zmsg_addmem(message, bytes, length);
        zmsg_addmem(message, "{}", 2);
        zmsg_send(&message, peer);
    }
    for (size_t frames = 1; frames < 3; frames++, sent++) {
        zmsg_t *message = zmsg_new();

        zmsg_addmem(message, "storage", 7);
        if (frames > 1)
            zmsg_addmem(message, bytes, sizeof(bytes));
        zmsg_send(&message, peer);
    }
    for (int i = 0; i < 200; i++, sent++) {
        zmsg_t *message = zmsg_new();

        for (int j = 0; j <= i % 5; j++) {
            uint8_t noise[300];

            for (size_t k = 0; k < sizeof(noise); k++)
                noise[k] = (uint8_t)((i * 7919 + j * 104729 + (int)k * 31) >> 3);
            zmsg_addmem(message, noise, (size_t)(i * 13 + j) % sizeof(noise));
        }
        zmsg_send(&message, peer);
    }
    good.body_len = 1; /* one less than there is */
    send_raw(peer, "storage", 7, &good, "{}");
    for (int i = 0; i <= sent; i++)
        assert_int_equal(receive(peer, &answer), CLAAS_ERR_FORMAT);
    assert_int_equal(answer_of(peer, request_header(CLAAS_MSG_ADAPTER_LIST, 4), "storage", "{}"),
                     0);
    zsock_destroy(&peer);
}

static void too_many_attachments(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header header = request_header(CLAAS_MSG_ADAPTER_LIST, 3), answer;
    uint8_t bytes[CLAAS_HEADER_BYTES];
    zmsg_t *message = zmsg_new();

    header.body_len = 2;
    claas_header_encode(&header, bytes);
    zmsg_addmem(message, "storage", 7);
    zmsg_addmem(message, bytes, sizeof(bytes));
    zmsg_addmem(message, "{}", 2);
    for (int i = 0; i <= CLAAS_ATTACHMENT_MAX; i++)
        zmsg_addmem(message, "x", 1);
    zmsg_send(&message, peer);
    assert_int_equal(receive(peer, &answer), CLAAS_ERR_LIMIT);
    assert_true(answer.correlation == 3);
    zsock_destroy(&peer);
}

/* Neither a routing id nor a claim in the address makes a peer somebody. */
static void claimed_names(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *peer = new_peer(fixture, "storage");
    struct claas_header header = request_header(CLAAS_MSG_ADAPTER_LIST, 3), answer;
    double refused = claas_metric_value(CLAAS_METRIC_PEERS_REFUSED);
    struct question question = {
        .to = "storage", .prefix = "", .type = CLAAS_MSG_ADAPTER_LIST, .timeout_ms = 8000};

    header.body_len = 2;
    send_raw(peer, "storage\0scheduler\0alice", 23, &header, "{}");
    assert_int_equal(receive(peer, &answer), CLAAS_ERR_DENIED);
    struct claas_header hello = {.version = 1, .kind = CLAAS_KIND_HELLO, .codec = 2, .epoch = 1};
    assert_int_equal(
        answer_of(peer, hello, "", "{\"node\":\"evil\",\"actors\":[{\"name\":\"storage\"}]}"),
        CLAAS_ERR_DENIED);
    assert_int_equal(answer_of(peer, hello, "",
                               "{\"node\":\"evil\",\"token\":\"0123456789abcdef0123456789abcdef"
                               "0123456789abcdef0123456789abcdef\",\"actors\":[]}"),
                     CLAAS_ERR_DENIED);
    assert_true(claas_metric_value(CLAAS_METRIC_PEERS_REFUSED) == refused + 3);
    assert_int_equal(answer_of(peer, hello, "", "{\"client\":\"good\"}"), 0);
    assert_int_equal(probe_call(fixture->probe, &question), 0); /* the real one still answers */
    zsock_destroy(&peer);
}

/* A peer with the right token cannot take a name that is in use either. */
static void taken_name_with_token(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *peer = new_peer(fixture, NULL);
    struct claas_header hello = {.version = 1, .kind = CLAAS_KIND_HELLO, .codec = 2, .epoch = 1};
    char path[128], token[65] = "", body[512];

    snprintf(path, sizeof(path), "%s/keys/node.token", fixture->dir);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_non_null(fgets(token, sizeof(token), file));
    fclose(file);
    snprintf(body, sizeof(body),
             "{\"node\":\"n\",\"token\":\"%s\",\"actors\":[{\"name\":\"storage\","
             "\"incarnation\":\"1\",\"ready\":true}]}",
             token);
    assert_int_equal(answer_of(peer, hello, "", body), CLAAS_ERR_EXISTS);
    for (const char *const *bad =
             (const char *const[]){"switch", "client.1", "", "a b", "../x", NULL};
         *bad; bad++) {
        snprintf(body, sizeof(body),
                 "{\"node\":\"n\",\"token\":\"%s\",\"actors\":[{\"name\":\"%s\"}]}", token, *bad);
        assert_int_equal(answer_of(peer, hello, "", body), CLAAS_ERR_INVALID);
    }
    zsock_destroy(&peer);
}

/* Answers and credits that nobody asked for. */
static void unasked_answers(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *peer = new_peer(fixture, NULL);
    struct question pending = {
        .to = "storage", .prefix = "never", .type = CLAAS_MSG_ADAPTER_LIST, .timeout_ms = 8000};
    static const int kinds[] = {CLAAS_KIND_REP,    CLAAS_KIND_ERR,  CLAAS_KIND_PROGRESS,
                                CLAAS_KIND_CREDIT, CLAAS_KIND_PONG, CLAAS_KIND_WELCOME,
                                CLAAS_KIND_CANCEL};

    probe_ask(fixture->probe, &pending);
    probe_await_count(fixture->probe, "kept", 1);
    for (size_t i = 0; i < CLAAS_COUNT(kinds); i++) {
        struct claas_header header = request_header(CLAAS_MSG_ADAPTER_LIST, pending.id);

        header.kind = (uint8_t)kinds[i];
        header.credit = 1000;
        send_text(peer, "driver", header, "{\"adapters\":[]}");
    }
    assert_int_equal(answer_of(peer, request_header(CLAAS_MSG_ADAPTER_LIST, 4), "storage", "{}"),
                     0);
    assert_int_equal(pending.ends, 0);
    probe_cancel(fixture->probe, &pending);
    zsock_destroy(&peer);
}

static void ping_hello_bye(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header header = {.version = 1, .kind = CLAAS_KIND_PING, .correlation = 8}, answer;

    send_text(peer, "", header, "");
    receive(peer, &answer);
    assert_int_equal(answer.kind, CLAAS_KIND_PONG);
    assert_int_equal(answer.flags, 0);
    header.kind = CLAAS_KIND_HELLO;
    send_text(peer, "", header, "");
    receive(peer, &answer);
    assert_int_equal(answer.kind, CLAAS_KIND_WELCOME);
    header.kind = CLAAS_KIND_BYE;
    send_text(peer, "", header, "");
    assert_int_equal(answer_of(peer, request_header(CLAAS_MSG_ADAPTER_LIST, 4), "storage", "{}"),
                     0);
    zsock_destroy(&peer);
}

/* BYE, or the loss of the connection that the next answer finds out, cancels what was asked. */
static void client_gone(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *peer = new_peer(fixture, NULL);
    struct claas_header bye = {.version = 1, .kind = CLAAS_KIND_BYE};

    send_text(peer, "storage", request_header(CLAAS_MSG_ADAPTER_LIST, 4), "{\"prefix\":\"never\"}");
    probe_await_count(fixture->probe, "kept", 1);
    send_text(peer, "", bye, "");
    probe_await_count(fixture->probe, "cancels", 1);
    zsock_destroy(&peer);

    peer = new_peer(fixture, NULL);
    send_text(peer, "storage", request_header(CLAAS_MSG_ADAPTER_LIST, 4), "{\"prefix\":\"never\"}");
    send_text(peer, "storage", request_header(CLAAS_MSG_ADAPTER_LIST, 5), "{\"prefix\":\"block\"}");
    probe_await_count(fixture->probe, "blocked", 1);
    zsock_set_linger(peer, 0);
    zsock_destroy(&peer);
    probe_release(fixture->probe);
    /* The answer to 5 may still slip into the dying pipe; another one then meets a closed door. */
    while (probe_count(fixture->probe, "cancels") < 2) {
        claas_client_t *client = new_client(fixture);
        char text[64];

        assert_int_equal(list(client, "", 8000, text), 0);
        claas_client_free(&client);
        if (claas_metric_value(CLAAS_METRIC_REPLIES_LOST) == 0)
            break; /* it slipped in: the request is cancelled at its deadline */
    }
}

static void correlation_in_use(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *peer = new_peer(fixture, NULL);

    send_text(peer, "storage", request_header(CLAAS_MSG_ADAPTER_LIST, 4), "{\"prefix\":\"never\"}");
    assert_int_equal(answer_of(peer, request_header(CLAAS_MSG_ADAPTER_LIST, 4), "storage", "{}"),
                     CLAAS_ERR_CONFLICT);
    /* Another peer's numbers are its own. */
    zsock_t *other = new_peer(fixture, NULL);
    assert_int_equal(answer_of(other, request_header(CLAAS_MSG_ADAPTER_LIST, 4), "storage", "{}"),
                     0);
    zsock_destroy(&other);
    zsock_destroy(&peer);
}

static void gaps_are_counted(void **state)
{
    zsock_t *peer = new_peer(*state, NULL);
    struct claas_header header = request_header(CLAAS_MSG_ADAPTER_LIST, 4);
    double gaps = claas_metric_value(CLAAS_METRIC_LINK_GAPS);

    header.link_seq = 10;
    assert_int_equal(answer_of(peer, header, "storage", "{}"), 0);
    header.link_seq = 14;
    assert_int_equal(answer_of(peer, header, "storage", "{}"), 0);
    assert_true(claas_metric_value(CLAAS_METRIC_LINK_GAPS) == gaps + 3);
    zsock_destroy(&peer);
}

/* --- events ------------------------------------------------------------------------------------
 */

static void events(void **state)
{
    struct fixture *fixture = *state;
    zsock_t *subscriber = zsock_new(ZMQ_SUB);
    char endpoint[128];
    zmsg_t *event = NULL;

    write_endpoint(fixture, "events.ipc", endpoint);
    zsock_set_subscribe(subscriber, "ADAPTER_LIST");
    zsock_set_rcvtimeo(subscriber, 20);
    assert_int_equal(zsock_connect(subscriber, "%s", endpoint), 0);
    /* A subscription needs a moment; events before it are not seen by design. */
    for (int i = 0; i < 500 && !event; i++) {
        struct question tell = {.to = "*", .type = CLAAS_MSG_ADAPTER_LIST, .is_tell = true};

        probe_ask(fixture->probe, &tell);
        assert_int_equal(tell.sent, 0);
        event = zmsg_recv(subscriber);
    }
    assert_non_null(event);
    assert_int_equal(zmsg_size(event), 3);
    assert_true(zframe_streq(zmsg_first(event), "ADAPTER_LIST"));
    zmsg_next(event);
    assert_true(zframe_streq(zmsg_next(event), "{\"prefix\":\"\"}"));
    zmsg_destroy(&event);
    zsock_destroy(&subscriber);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
        TEST(request),
        TEST(progress),
        TEST(role_is_checked),
        TEST(no_server),
        TEST(server_stops_while_asked),
        TEST(raw_request),
        TEST(wrong_requests),
        TEST(garbage),
        TEST(too_many_attachments),
        TEST(claimed_names),
        TEST(taken_name_with_token),
        TEST(unasked_answers),
        TEST(ping_hello_bye),
        TEST(client_gone),
        TEST(correlation_in_use),
        TEST(gaps_are_counted),
        TEST(events),
    };
    sigset_t ends;

    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    claas_log_setup(CLAAS_LOG_ERROR, "text");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
