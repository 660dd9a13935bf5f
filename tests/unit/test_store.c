/* The store without actors: names, answers, feedback, jobs, versions, lists, transactions. Files
 * and start-up are in test_store_files.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include <math.h>
#include <sodium.h>

#include "names.h"
#include "storage_fixture.h"

struct state {
    char *data;
    claas_store_t *store;
};

static int set_up(void **ret)
{
    struct state *state = CLAAS_NEW(struct state);
    struct claas_store_options options;

    state->data = fixture_directory();
    options = fixture_options(state->data);
    if (claas_store_open_sqlite(&options, &state->store) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        return -1;
    }
    *ret = state;
    return 0;
}

static int tear_down(void **ret)
{
    struct state *state = *ret;

    if (state->store)
        state->store->ops->close(&state->store);
    fixture_remove(&state->data);
    free(state);
    return 0;
}

static void reopen(struct state *state, const struct claas_store_options *options)
{
    struct claas_store_options defaults = fixture_options(state->data);

    state->store->ops->close(&state->store);
    assert_int_equal(claas_store_open_sqlite(options ? options : &defaults, &state->store), 0);
}

static void commit(struct state *state)
{
    int rc = state->store->ops->commit(state->store);

    if (rc < 0)
        print_error("%s\n", claas_error_text());
    assert_int_equal(rc, 0);
}

static const char *text_of(const cJSON *object, const char *key)
{
    const char *text = "(absent)";

    claas_json_get_string(object, key, &text);
    return text;
}

static int64_t int_of(const cJSON *object, const char *key)
{
    int64_t value = -999;

    claas_json_get_int(object, key, INT64_MIN, INT64_MAX, &value);
    return value;
}

static int size_of(const cJSON *object, const char *key)
{
    const cJSON *list = claas_json_get(object, key);

    return list ? cJSON_GetArraySize(list) : -1;
}

static const cJSON *at(const cJSON *object, const char *key, int index)
{
    return cJSON_GetArrayItem(claas_json_get(object, key), index);
}

#define assert_fails(code, expression)                                                             \
    do {                                                                                           \
        assert_int_equal(expression, code);                                                        \
        assert_null(answer.body);                                                                  \
    } while (0)

/* --- names ----------------------------------------------------------------------------- */

static void test_names(void **ret)
{
    static const struct {
        const char *text, *name;
        int64_t version;
    } good[] = {
        {"user/name", "user/name", -1},        {"user/name-init", "user/name", -1},
        {"user/name-latest", "user/name", -1}, {"user/name-init-latest", "user/name", -1},
        {"user/name@7", "user/name", 7},       {"user/name-init@0", "user/name", 0},
        {"/user/name/", "user/name", -1},      {"name", "name", -1},
        {"A.b_c-9/..x", "A.b_c-9/..x", -1},    {"user/-init", "user/-init", -1},
    };
    static const char *const bad[] = {
        "",
        "/",
        "user/../x",
        "..",
        "../x",
        "user/..",
        "user//x",
        "./x",
        "user/x y",
        "user/x\n",
        "user/\xc3\xa4",
        "a/b/c",
        "user/x@",
        "user/x@1x",
        "@7",
        "user/x@-1",
        "user/x@1@2",
        "user/x@99999999999",
        "user/%2e%2e",
        "user\\x",
        "~/x",
        "user/x:y",
        "a/../../etc/passwd",
        "x/../../..",
    };
    char longest[300];

    (void)ret;
    for (size_t i = 0; i < CLAAS_COUNT(good); i++) {
        struct claas_lora_name name;

        assert_int_equal(claas_lora_name_parse(good[i].text, &name), 0);
        assert_string_equal(name.name, good[i].name);
        assert_int_equal(name.version, good[i].version);
    }
    for (size_t i = 0; i < CLAAS_COUNT(bad); i++) {
        struct claas_lora_name name;

        assert_int_equal(claas_lora_name_parse(bad[i], &name), CLAAS_ERR_INVALID);
    }
    for (size_t length = 120; length < sizeof(longest); length++) {
        struct claas_lora_name name;

        memset(longest, 'a', length);
        longest[length] = '\0';
        assert_int_equal(claas_lora_name_parse(longest, &name),
                         length <= 128 ? 0 : CLAAS_ERR_INVALID);
    }
    assert_int_equal(claas_lora_name_parse("a/../b", &(struct claas_lora_name){0}),
                     CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "Invalid lora_id: path traversal detected in 'a/../b'");
}

/* --- adapters -------------------------------------------------------------------------- */

static void test_adapter_life(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char uid[64];

    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a\"}"));
    assert_string_equal(claas_error_text(), "LoRA not found: u/a");
    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(store, state->data, "u/a-init", -1, "[]", false),
                     CLAAS_ERR_EXISTS);
    assert_int_equal(fixture_publish(store, state->data, "base", -1, "[]", false),
                     CLAAS_ERR_INVALID);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a-latest\"}"), 0);
    assert_string_equal(text_of(answer.body, "lora_id"), "u/a");
    assert_true(int_of(answer.body, "version") == 0 && int_of(answer.body, "created") > 0);
    assert_true(cJSON_IsFalse(claas_json_get(answer.body, "trained")));
    assert_non_null(strstr(text_of(answer.body, "directory"), "/adapters/u/a/v000000"));
    snprintf(uid, sizeof(uid), "%s", text_of(answer.body, "uid"));
    claas_store_answer_done(&answer);

    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, "[]", false), 1);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, "[]", false),
                     CLAAS_ERR_CONFLICT);
    assert_int_equal(fixture_publish(store, state->data, "u/b", 0, "[]", false),
                     CLAAS_ERR_NOT_FOUND);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u-a\"}"),
        0); /* the name that the Python system served it by */
    assert_int_equal(int_of(answer.body, "version"), 1);
    assert_true(cJSON_IsTrue(claas_json_get(answer.body, "trained")));
    claas_store_answer_done(&answer);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a@0\"}"), 0);
    assert_int_equal(int_of(answer.body, "version"), 0);
    claas_store_answer_done(&answer);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a@5\"}"));

    /* Delete and init: another adapter of the same name. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_DELETE, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    assert_true(cJSON_IsTrue(claas_json_get(answer.body, "deleted")));
    claas_store_answer_done(&answer);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_DELETE, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    assert_true(cJSON_IsFalse(claas_json_get(answer.body, "deleted")));
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a\"}"), 0);
    assert_string_not_equal(text_of(answer.body, "uid"), uid);
    snprintf(uid, sizeof(uid), "%s", text_of(answer.body, "uid"));
    claas_store_answer_done(&answer);
    /* So does an overwrite. */
    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, "[]", false), 1);
    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", true), 0);
    while (store->ops->tend(store) > 0)
        continue;
    reopen(state, NULL);
    store = state->store;
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_VERSIONS, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    assert_int_equal(size_of(answer.body, "versions"), 1);
    assert_int_equal(int_of(answer.body, "current"), 0);
    assert_string_equal(text_of(at(answer.body, "versions", 0), "state"), "current");
    claas_store_answer_done(&answer);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer, "{\"name\":\"u/a\"}"), 0);
    assert_string_not_equal(text_of(answer.body, "uid"), uid);
    assert_int_equal(access(text_of(answer.body, "directory"), R_OK), 0);
    claas_store_answer_done(&answer);
}

static void test_adapter_list(void **ret)
{
    static const char *const names[] = {"user10/x", "user1/b", "user1/a", "user1", "zed"};
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;

    for (size_t i = 0; i < CLAAS_COUNT(names); i++)
        assert_int_equal(fixture_publish(store, state->data, names[i], -1, "[]", false), 0);
    assert_int_equal(fixture_call(store, CLAAS_STORE_ADAPTER_LIST, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "adapters"), 5);
    assert_string_equal(text_of(at(answer.body, "adapters", 0), "lora_id"), "user1");
    assert_string_equal(text_of(at(answer.body, "adapters", 0), "base_model"), "tiny");
    assert_int_equal(int_of(at(answer.body, "adapters", 0), "rank"), 8);
    assert_int_equal(int_of(at(answer.body, "adapters", 0), "alpha"), 16);
    assert_int_equal(int_of(at(answer.body, "adapters", 0), "versions"), 1);
    claas_store_answer_done(&answer);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_LIST, &answer, "{\"prefix\":\"user1/\"}"), 0);
    assert_int_equal(size_of(answer.body, "adapters"), 3);
    assert_string_equal(text_of(at(answer.body, "adapters", 1), "lora_id"), "user1/a");
    claas_store_answer_done(&answer);
    assert_int_equal(
        fixture_call_as(store, "other", CLAAS_STORE_ADAPTER_LIST, NULL, 0, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "adapters"), 0);
    claas_store_answer_done(&answer);
    /* An exact segment and a flat name that two adapters would have. */
    assert_int_equal(fixture_publish(store, state->data, "user1-a/x", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(store, state->data, "user1/a-x", -1, "[]", false), 0);
    assert_fails(CLAAS_ERR_NOT_FOUND, fixture_call(store, CLAAS_STORE_ADAPTER_RESOLVE, &answer,
                                                   "{\"name\":\"user1-a-x\"}"));
}

static void test_principals(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char job[65];
    char body[256];

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r1", "u/a", "q", "An answer.", 7), 0);
    assert_int_equal(fixture_rollout_as(store, "other", "r2", NULL, "q", "Another.", 7), 0);
    commit(state);
    assert_int_equal(fixture_feedback(store, "u/a", "r1", "no", job), 0);
    assert_int_equal(fixture_feedback(store, "u/a", "r2", "no", job), CLAAS_ERR_NOT_FOUND);
    assert_fails(CLAAS_ERR_NOT_FOUND, fixture_call_as(store, "other", CLAAS_STORE_ADAPTER_RESOLVE,
                                                      NULL, 0, &answer, "{\"name\":\"u/a\"}"));
    snprintf(body, sizeof(body), "{\"job_id\":\"%s\"}", job);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call_as(store, "other", CLAAS_STORE_JOB_GET, NULL, 0, &answer, body));
    snprintf(body, sizeof(body), "{\"before\":\"%s\"}", job);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call_as(store, "other", CLAAS_STORE_JOB_LIST, NULL, 0, &answer, body));
    assert_int_equal(fixture_call_as(store, "other", CLAAS_STORE_ADAPTER_DELETE, NULL, 0, &answer,
                                     "{\"lora_id\":\"u/a\"}"),
                     0);
    assert_true(cJSON_IsFalse(claas_json_get(answer.body, "deleted")));
    claas_store_answer_done(&answer);
}

/* --- answers and feedback -------------------------------------------------------------- */

static void test_lookup(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    unsigned char hash[32];
    char expected[128], job[65];

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(store, state->data, "u/b", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "base1", NULL, "q", "Hello  there.", 3), 0);
    assert_int_equal(fixture_rollout(store, "a1", "u/a-latest", "q1", "Hello there.", 4), 0);
    assert_int_equal(fixture_rollout(store, "a2", "u/a", "q2", "\n Hello\tthere.  ", 5), 0);
    assert_int_equal(fixture_rollout(store, "b1", "u/b", "q3", "Only b.", 6), 0);
    assert_int_equal(fixture_rollout(store, "a2", "u/a", "q2", "again", 5), CLAAS_ERR_EXISTS);
    commit(state);
    /* Own and base answers; not another adapter's, not a choice that is not there. */
    assert_int_equal(fixture_feedback(store, "u/a", "a1", "no", job), 0);
    assert_int_equal(fixture_feedback(store, "u/a-init", "base1", "no", job), 0);
    assert_int_equal(fixture_feedback(store, "u/a", "b1", "no", job), CLAAS_ERR_NOT_FOUND);
    assert_int_equal(fixture_feedback(store, "u/a", "zz", "no", job), CLAAS_ERR_NOT_FOUND);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                              "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"a1\","
                              "\"choice\":3,\"feedback\":\"no\"}]}"));
    /* By text: normalised as the Python system does; the adapter's newest first. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                     "{\"requests\":[{\"lora_id\":\"u/a\",\"response\":"
                     "\"<think>hm</think> Hello\\u2003there. \",\"feedback\":\"no\"}]}"),
        0);
    snprintf(job, sizeof(job), "%s", text_of(answer.body, "job_id"));
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_GET, &answer, "{\"job_id\":\"%s\"}", job),
                     0);
    assert_string_equal(
        text_of(at(claas_json_get(answer.body, "job"), "feedback", 0), "response_id"), "a2");
    claas_store_answer_done(&answer);
    /* "Only b." is not u/a's. */
    crypto_hash_sha256(hash, (const unsigned char *)"Only b.", 7);
    snprintf(expected, sizeof(expected),
             "No cached completion for content_hash=%02x%02x%02x%02x%02x%02x%02x%02x…", hash[0],
             hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                              "{\"requests\":[{\"lora_id\":\"u/a\",\"response\":\"Only b.\","
                              "\"feedback\":\"no\"}]}"));
    assert_string_equal(claas_error_text(), expected);
}

static void test_rollout_input(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    int32_t ids[2] = {1, 2}, negative[2] = {1, -2};
    float logprobs[2] = {-1, -2}, nan[2] = {-1, NAN};
    const struct claas_store_blob good[3] = {{ids, 8}, {ids, 8}, {logprobs, 8}};
    const struct claas_store_blob bad[][3] = {
        {{ids, 7}, {ids, 8}, {logprobs, 8}},      {{ids, 8}, {ids, 4}, {logprobs, 8}},
        {{ids, 8}, {ids, 8}, {nan, 8}},           {{negative, 8}, {ids, 8}, {logprobs, 8}},
        {{ids, 8}, {negative, 8}, {logprobs, 8}}, {{ids, 8}, {ids, 8}, {NULL, 0}},
    };
    static const char body[] = "{\"id\":\"r\",\"prompt\":\"p\",\"sampling\":{},\"choices\":"
                               "[{\"index\":0,\"text\":\"t\"}]}";
    static const char *const bodies[] = {
        "{}",
        "{\"id\":\"\",\"prompt\":\"p\",\"choices\":[{\"index\":0,\"text\":\"t\"}]}",
        "{\"id\":\"r\",\"choices\":[{\"index\":0,\"text\":\"t\"}]}",
        "{\"id\":\"r\",\"prompt\":\"p\",\"choices\":[]}",
        "{\"id\":\"r\",\"prompt\":\"p\",\"choices\":[{\"text\":\"t\"}]}",
        "{\"id\":\"r\",\"prompt\":\"p\",\"choices\":[{\"index\":16,\"text\":\"t\"}]}",
        "{\"id\":\"r\",\"prompt\":\"p\",\"choices\":[{\"index\":0,\"text\":7}]}",
        "{\"id\":\"r\",\"prompt\":\"p\",\"lora_id\":\"../"
        "x\",\"choices\":[{\"index\":0,\"text\":\"t\"}]}",
        "{\"id\":7,\"prompt\":\"p\",\"choices\":[{\"index\":0,\"text\":\"t\"}]}",
    };
    struct claas_store_answer answer;

    for (size_t i = 0; i < CLAAS_COUNT(bad); i++)
        assert_fails(CLAAS_ERR_INVALID, fixture_call_as(store, "local", CLAAS_STORE_ROLLOUT_PUT,
                                                        bad[i], 3, &answer, body));
    for (size_t i = 0; i < CLAAS_COUNT(bodies); i++)
        assert_fails(CLAAS_ERR_INVALID, fixture_call_as(store, "local", CLAAS_STORE_ROLLOUT_PUT,
                                                        good, 3, &answer, bodies[i]));
    assert_int_equal(store->ops->pending(store), 0);
    assert_int_equal(
        fixture_call_as(store, "local", CLAAS_STORE_ROLLOUT_PUT, good, 3, &answer, body), 0);
    claas_store_answer_done(&answer);
    commit(state);
}

static void test_feedback_input(void **ret)
{
    static const struct {
        int code;
        const char *body, *text;
    } cases[] = {
        {CLAAS_ERR_INVALID, "{}", NULL},
        {CLAAS_ERR_INVALID, "{\"requests\":[]}", NULL},
        {CLAAS_ERR_INVALID, "{\"requests\":[{}]}",
         "requests[0]: 'lora_id' must be a non-empty string"},
        {CLAAS_ERR_INVALID, "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\"}]}",
         "requests[0]: 'feedback' must be a non-empty string"},
        {CLAAS_ERR_INVALID,
         "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\",\"feedback\":\" \\n\"}]}",
         NULL},
        {CLAAS_ERR_INVALID, "{\"requests\":[{\"lora_id\":\"u/a\",\"feedback\":\"x\"}]}", NULL},
        {CLAAS_ERR_INVALID,
         "{\"requests\":[{\"lora_id\":\"u/../a\",\"response_id\":\"r\",\"feedback\":\"x\"}]}",
         "Invalid lora_id: path traversal detected in 'u/../a'"},
        {CLAAS_ERR_NOT_FOUND,
         "{\"requests\":[{\"lora_id\":\"u/zz\",\"response_id\":\"r\",\"feedback\":\"x\"}]}",
         "LoRA not found: u/zz"},
        {CLAAS_ERR_INVALID,
         "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\",\"feedback\":\"x\"},"
         "{\"lora_id\":\"u/b\",\"response_id\":\"r\",\"feedback\":\"x\"}]}",
         "all requests must use the same lora_id"},
        {CLAAS_ERR_NOT_FOUND,
         "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\",\"feedback\":\"x\"},"
         "{\"lora_id\":\"u/a\",\"response_id\":\"none\",\"feedback\":\"x\"}]}",
         NULL},
        {CLAAS_ERR_INVALID, "{\"requests\":7}", NULL},
        {CLAAS_ERR_INVALID, "{\"requests\":[7]}", NULL},
    };
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(store, state->data, "u/b", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "t", 1), 0);
    commit(state);
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        assert_fails(cases[i].code, fixture_call_as(store, "local", CLAAS_STORE_FEEDBACK_PUT, NULL,
                                                    0, &answer, cases[i].body));
        if (cases[i].text)
            assert_string_equal(claas_error_text(), cases[i].text);
    }
    commit(state);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "jobs"), 0);
    claas_store_answer_done(&answer);
}

#define FEEDBACK_KEY                                                                               \
    "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\",\"feedback\":\"%s\"}],"             \
    "\"idempotency_key\":\"%s\"%s}"

static void test_idempotency(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char first[65];
    int64_t seq;

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "t", 1), 0);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k1", ""), 0);
    snprintf(first, sizeof(first), "%s", text_of(answer.body, "job_id"));
    seq = int_of(claas_json_get(answer.body, "event"), "seq");
    assert_true(cJSON_IsFalse(claas_json_get(answer.body, "duplicate")));
    assert_int_equal(strncmp(first, "job-", 4), 0);
    assert_int_equal(strlen(first), 20);
    claas_store_answer_done(&answer);
    /* In the same transaction already, and after a restart. */
    for (int round = 0; round < 2; round++) {
        assert_int_equal(
            fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k1", ""), 0);
        assert_string_equal(text_of(answer.body, "job_id"), first);
        assert_string_equal(text_of(answer.body, "lora_id"), "u/a");
        assert_true(cJSON_IsTrue(claas_json_get(answer.body, "duplicate")));
        assert_int_equal(int_of(claas_json_get(answer.body, "event"), "seq"), seq);
        assert_string_equal(text_of(claas_json_get(answer.body, "event"), "state"), "queued");
        claas_store_answer_done(&answer);
        assert_fails(CLAAS_ERR_CONFLICT, fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                                                      FEEDBACK_KEY, "y", "k1", ""));
        assert_fails(CLAAS_ERR_CONFLICT,
                     fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k1",
                                  ",\"training\":{\"steps\":2}"));
        commit(state);
        reopen(state, NULL);
        store = state->store;
    }
    /* Without a key, and with another one: a job each time. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k2", ""), 0);
    assert_string_not_equal(text_of(answer.body, "job_id"), first);
    claas_store_answer_done(&answer);
    commit(state);
}

static void test_queue_max(void **ret)
{
    struct state *state = *ret;
    struct claas_store_options options = fixture_options(state->data);
    struct claas_store_answer answer;
    claas_store_t *store;
    char job[65], other[65];

    options.queue_max = 2;
    reopen(state, &options);
    store = state->store;
    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "t", 1), 0);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k", ""), 0);
    snprintf(job, sizeof(job), "%s", text_of(answer.body, "job_id"));
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "y", other), 0);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "z", other), CLAAS_ERR_OVERLOADED);
    /* Full for new ones; a repeated request still gets its answer. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k", ""), 0);
    claas_store_answer_done(&answer);
    commit(state);
    reopen(state, &options);
    store = state->store;
    assert_int_equal(fixture_feedback(store, "u/a", "r", "z", other), CLAAS_ERR_OVERLOADED);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                  "{\"job_ids\":[\"%s\"],\"state\":\"cancelled\",\"event\":{}}",
                                  job),
                     0);
    claas_store_answer_done(&answer);
    /* An aborted transaction gives its place back. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_FEEDBACK_PUT, &answer, FEEDBACK_KEY, "x", "k3", ""), 0);
    claas_store_answer_done(&answer);
    store->ops->abort(store);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "z", other), CLAAS_ERR_OVERLOADED);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                  "{\"job_ids\":[\"%s\"],\"state\":\"cancelled\",\"event\":{}}",
                                  job),
                     0);
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "z", other), 0);
}

/* --- jobs ------------------------------------------------------------------------------ */

/* Two jobs begin; the first gets two strikes and ends. Returns the seq of the second's event. */
static int64_t record_three(claas_store_t *store, char jobs[3][65])
{
    struct claas_store_answer answer;
    const cJSON *object;
    int64_t last = 0;

    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                  "{\"job_ids\":[\"%s\",\"%s\"],\"state\":\"training\","
                                  "\"event\":{\"note\":\"hi\",\"seq\":77}}",
                                  jobs[0], jobs[1]),
                     0);
    assert_int_equal(size_of(answer.body, "events"), 2);
    object = at(answer.body, "events", 1);
    assert_string_equal(text_of(object, "job_id"), jobs[1]);
    assert_string_equal(text_of(object, "kind"), "state");
    assert_string_equal(text_of(object, "note"), "hi");
    assert_int_equal(int_of(answer.body, "strikes"), 0);
    last = int_of(object, "seq");
    assert_true(last > 0 && last != 77);
    claas_store_answer_done(&answer);
    for (int i = 1; i <= 2; i++) {
        assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                      "{\"job_ids\":[\"%s\"],\"failure\":true,\"event\":"
                                      "{\"kind\":\"step\",\"step\":%d,\"loss\":0.5}}",
                                      jobs[0], i),
                         0);
        assert_int_equal(int_of(answer.body, "strikes"), i);
        assert_true(int_of(at(answer.body, "events", 0), "seq") > last);
        claas_store_answer_done(&answer);
    }
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                     "{\"job_ids\":[\"%s\"],\"state\":\"rejected\",\"event\":{\"reason\":\"nll\"},"
                     "\"result\":{\"steps\":[1,2]}}",
                     jobs[0]),
        0);
    claas_store_answer_done(&answer);
    return last;
}

static void refuse_records(claas_store_t *store, char jobs[3][65])
{
    struct claas_store_answer answer;

    /* All or none, and never after the end. */
    assert_fails(CLAAS_ERR_CONFLICT,
                 fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                              "{\"job_ids\":[\"%s\",\"%s\"],\"state\":\"gating\",\"event\":{}}",
                              jobs[1], jobs[0]));
    assert_fails(CLAAS_ERR_INVALID,
                 fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                              "{\"job_ids\":[\"%s\"],\"state\":\"done\",\"event\":{}}", jobs[1]));
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                              "{\"job_ids\":[\"job-1\"],\"state\":\"gating\",\"event\":{}}"));
    assert_fails(CLAAS_ERR_INVALID, fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                                 "{\"job_ids\":[],\"event\":{}}"));
    assert_fails(CLAAS_ERR_INVALID, fixture_call(store, CLAAS_STORE_JOB_RECORD, &answer,
                                                 "{\"job_ids\":[\"%s\"]}", jobs[1]));
}

/* The first job, whole and since an event. */
static void read_job(claas_store_t *store, char jobs[3][65], int64_t last)
{
    struct claas_store_answer answer;
    const cJSON *object;

    assert_int_equal(
        fixture_call(store, CLAAS_STORE_JOB_GET, &answer, "{\"job_id\":\"%s\"}", jobs[0]), 0);
    object = claas_json_get(answer.body, "job");
    assert_string_equal(text_of(object, "state"), "rejected");
    assert_string_equal(text_of(object, "reason"), "nll");
    assert_string_equal(text_of(object, "lora_id"), "u/a");
    assert_int_equal(size_of(object, "events"), 5);
    assert_int_equal(size_of(object, "transitions"), 3);
    assert_string_equal(text_of(at(object, "transitions", 0), "state"), "queued");
    assert_int_equal(size_of(claas_json_get(object, "result"), "steps"), 2);
    assert_null(claas_json_get(object, "version"));
    claas_store_answer_done(&answer);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_GET, &answer,
                                  "{\"job_id\":\"%s\",\"since\":%d}", jobs[0], (int)last),
                     0);
    assert_int_equal(size_of(claas_json_get(answer.body, "job"), "events"), 3);
    claas_store_answer_done(&answer);
}

static void list_jobs(claas_store_t *store, char jobs[3][65])
{
    struct claas_store_answer answer;

    assert_int_equal(fixture_call(store, CLAAS_STORE_JOBS_UNFINISHED, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "jobs"), 2);
    assert_string_equal(text_of(at(answer.body, "jobs", 0), "job_id"), jobs[1]);
    assert_string_equal(text_of(at(answer.body, "jobs", 0), "state"), "queued");
    assert_string_equal(text_of(at(answer.body, "jobs", 0), "principal"), "local");
    assert_int_equal(int_of(at(answer.body, "jobs", 0), "items"), 1);
    claas_store_answer_done(&answer);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer,
                                  "{\"limit\":1,\"before\":\"%s\"}", jobs[2]),
                     0);
    assert_int_equal(size_of(answer.body, "jobs"), 1);
    assert_string_equal(text_of(at(answer.body, "jobs", 0), "job_id"), jobs[1]);
    claas_store_answer_done(&answer);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer,
                                  "{\"state\":\"queued\",\"lora_id\":\"u/a-latest\"}"),
                     0);
    assert_int_equal(size_of(answer.body, "jobs"), 2);
    claas_store_answer_done(&answer);
    assert_fails(CLAAS_ERR_INVALID,
                 fixture_call(store, CLAAS_STORE_JOB_LIST, &answer, "{\"state\":\"odd\"}"));
    /* The result is for who asks for the job. */
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer, "{\"state\":\"rejected\"}"),
                     0);
    assert_int_equal(size_of(answer.body, "jobs"), 1);
    assert_false(cJSON_HasObjectItem(at(answer.body, "jobs", 0), "result"));
    claas_store_answer_done(&answer);
}

static void test_jobs(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    char jobs[3][65];
    int64_t last;

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "t", 1), 0);
    for (int i = 0; i < 3; i++)
        assert_int_equal(fixture_feedback(store, "u/a", "r", "x", jobs[i]), 0);
    last = record_three(store, jobs);
    refuse_records(store, jobs);
    commit(state);
    reopen(state, NULL);
    read_job(state->store, jobs, last);
    list_jobs(state->store, jobs);
}

/* At a start nothing runs: what did waits, without a strike. */
static void test_jobs_that_ran(void **ret)
{
    struct state *state = *ret;
    struct claas_store_answer answer;
    const cJSON *job;
    char id[65];

    assert_int_equal(fixture_publish(state->store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(state->store, "r", NULL, "q", "t", 1), 0);
    assert_int_equal(fixture_feedback(state->store, "u/a", "r", "x", id), 0);
    assert_int_equal(fixture_call(state->store, CLAAS_STORE_JOB_RECORD, &answer,
                                  "{\"job_ids\":[\"%s\"],\"state\":\"training\",\"event\":{}}", id),
                     0);
    claas_store_answer_done(&answer);
    commit(state);
    for (int i = 0; i < 2; i++) { /* the second time there is nothing to be done */
        reopen(state, NULL);
        assert_int_equal(fixture_call(state->store, CLAAS_STORE_JOB_LIST, &answer, "{}"), 0);
        job = at(answer.body, "jobs", 0);
        assert_string_equal(text_of(job, "state"), "queued");
        assert_int_equal(int_of(job, "strikes"), 0);
        assert_int_equal(size_of(job, "transitions"), 3);
        assert_string_equal(text_of(at(job, "transitions", 2), "state"), "queued");
        claas_store_answer_done(&answer);
    }
}

/* --- cycles ---------------------------------------------------------------------------- */

static void learn(struct state *state, const char *response_id, const char *text, int64_t parent,
                  int64_t version)
{
    char job[65], jobs[80];

    assert_int_equal(fixture_feedback(state->store, "u/a", response_id, text, job), 0);
    snprintf(jobs, sizeof(jobs), "[\"%s\"]", job);
    assert_int_equal(fixture_publish(state->store, state->data, "u/a", parent, jobs, false),
                     version);
}

static void assert_standing(struct state *state, const char *const *texts)
{
    struct claas_store_answer answer;
    int count = 0;

    assert_int_equal(
        fixture_call(state->store, CLAAS_STORE_STANDING_LIST, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    for (; texts[count]; count++)
        assert_string_equal(text_of(at(answer.body, "feedback", count), "text"), texts[count]);
    assert_int_equal(size_of(answer.body, "feedback"), count);
    claas_store_answer_done(&answer);
}

#define TEXTS(...) ((const char *const[]){__VA_ARGS__ __VA_OPT__(, ) NULL})

static void rollback(struct state *state, int version)
{
    struct claas_store_answer answer;

    assert_int_equal(fixture_call(state->store, CLAAS_STORE_ADAPTER_ROLLBACK, &answer,
                                  "{\"lora_id\":\"u/a\",\"version\":%d}", version),
                     0);
    assert_int_equal(int_of(answer.body, "version"), version);
    claas_store_answer_done(&answer);
    commit(state);
}

static void test_cycle_input(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    const cJSON *item;
    char job[65], id[32];
    int64_t first;

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    for (int i = 0; i < 6; i++) {
        snprintf(id, sizeof(id), "r%d", i);
        assert_int_equal(fixture_rollout(store, id, "u/a", i % 2 ? "odd" : id, "text", 100 + i), 0);
    }
    commit(state);
    learn(state, "r0", "be kind", 0, 1);
    learn(state, "r2", "be brief", 1, 2);
    assert_int_equal(fixture_feedback(store, "u/a", "r4", "be new", job), 0);
    assert_int_equal(fixture_call(store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(int_of(answer.body, "version"), 2);
    assert_non_null(strstr(text_of(answer.body, "directory"), "u/a/v000002"));
    assert_int_equal(size_of(answer.body, "items"), 1);
    item = at(answer.body, "items", 0);
    assert_string_equal(text_of(item, "feedback"), "be new");
    assert_string_equal(text_of(item, "job_id"), job);
    assert_int_equal(strncmp(text_of(item, "feedback_id"), "fb-", 3), 0);
    assert_int_equal(strlen(text_of(item, "feedback_id")), 15);
    assert_string_equal(text_of(at(item, "messages", 0), "content"), "r4");
    first = int_of(item, "attachments");
    assert_true(first >= 0 && (size_t)first + 3 <= answer.blob_count);
    assert_int_equal(answer.blobs[first].length, 12);
    assert_int_equal(((int32_t *)answer.blobs[first].data)[2], 104);
    assert_int_equal(((int32_t *)answer.blobs[first + 1].data)[0], 104);
    assert_true(((float *)answer.blobs[first + 2].data)[2] == -104.0f);
    /* Replay newest first, standing in the order of time. */
    assert_int_equal(size_of(answer.body, "replay"), 2);
    assert_string_equal(text_of(at(answer.body, "replay", 0), "feedback"), "be brief");
    first = int_of(at(answer.body, "replay", 1), "attachments");
    assert_int_equal(((int32_t *)answer.blobs[first].data)[2], 100);
    assert_int_equal(size_of(answer.body, "standing"), 2);
    assert_string_equal(text_of(at(answer.body, "standing", 0), "text"), "be kind");
    /* r1, r3 and r5 are one conversation; the others have feedback. */
    assert_int_equal(size_of(answer.body, "recent"), 1);
    assert_string_equal(text_of(cJSON_GetArrayItem(at(answer.body, "recent", 0), 0), "content"),
                        "odd");
    claas_store_answer_done(&answer);
    assert_fails(CLAAS_ERR_NOT_FOUND,
                 fixture_call(store, CLAAS_STORE_CYCLE_INPUT, &answer,
                              "{\"lora_id\":\"u/a\",\"job_ids\":[\"job-0\"]}"));
}

static void test_lists_follow_versions(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char job[65], fb[65];

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", "u/a", "q", "text", 1), 0);
    commit(state);
    learn(state, "r", "one", 0, 1);
    learn(state, "r", "two", 1, 2);
    assert_standing(state, TEXTS("one", "two"));
    rollback(state, 1);
    assert_standing(state, TEXTS("one"));
    learn(state, "r", "three", 1, 3);
    assert_standing(state, TEXTS("one", "three"));
    rollback(state, 2);
    assert_standing(state, TEXTS("one", "two"));
    rollback(state, 0);
    assert_standing(state, TEXTS());
    rollback(state, 3);
    reopen(state, NULL);
    store = state->store;
    assert_standing(state, TEXTS("one", "three"));

    /* Withdrawn stays withdrawn, in whatever version. */
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_STANDING_LIST, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    snprintf(fb, sizeof(fb), "%s", text_of(at(answer.body, "feedback", 0), "id"));
    assert_int_equal(int_of(at(answer.body, "feedback", 0), "version"), 1);
    claas_store_answer_done(&answer);
    for (int i = 1; i >= 0; i--) {
        assert_int_equal(fixture_call(store, CLAAS_STORE_STANDING_WITHDRAW, &answer,
                                      "{\"lora_id\":\"u/a\",\"id\":\"%s\"}", fb),
                         0);
        assert_int_equal(int_of(answer.body, "withdrawn"), i);
        claas_store_answer_done(&answer);
        commit(state);
    }
    assert_standing(state, TEXTS("three"));
    rollback(state, 2);
    assert_standing(state, TEXTS("two"));
    rollback(state, 1);
    assert_standing(state, TEXTS());
    rollback(state, 3);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "four", job), 0);
    assert_int_equal(fixture_call(store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(size_of(answer.body, "replay"), 1);
    assert_int_equal(size_of(answer.body, "standing"), 1);
    assert_string_equal(text_of(at(answer.body, "replay", 0), "feedback"), "three");
    snprintf(fb, sizeof(fb), "%s", text_of(at(answer.body, "items", 0), "feedback_id"));
    claas_store_answer_done(&answer);
    /* Not learned yet: its job is what can be stopped. */
    assert_fails(CLAAS_ERR_CONFLICT, fixture_call(store, CLAAS_STORE_STANDING_WITHDRAW, &answer,
                                                  "{\"lora_id\":\"u/a\",\"id\":\"%s\"}", fb));
    assert_fails(CLAAS_ERR_NOT_FOUND, fixture_call(store, CLAAS_STORE_STANDING_WITHDRAW, &answer,
                                                   "{\"lora_id\":\"u/a\",\"id\":\"fb-0\"}"));
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_STANDING_WITHDRAW, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    assert_int_equal(int_of(answer.body, "withdrawn"), 1);
    claas_store_answer_done(&answer);
    commit(state);
    assert_standing(state, TEXTS());
    assert_fails(CLAAS_ERR_NOT_FOUND, fixture_call(store, CLAAS_STORE_ADAPTER_ROLLBACK, &answer,
                                                   "{\"lora_id\":\"u/a\",\"version\":9}"));
}

static int check_cycle(struct state *state, int version, int withdrawn)
{
    struct claas_store_answer answer;
    int rc =
        fixture_call(state->store, CLAAS_STORE_CYCLE_CHECK, &answer,
                     "{\"lora_id\":\"u/a\",\"version\":%d,\"withdrawn\":%d}", version, withdrawn);

    claas_store_answer_done(&answer);
    return rc;
}

/* What a cycle began with stands until feedback is withdrawn, and on the current version only. */
static void test_cycle_check(void **ret)
{
    struct state *state = *ret;
    struct claas_store_answer answer;
    char job[65];

    assert_int_equal(check_cycle(state, 0, 0), CLAAS_ERR_NOT_FOUND);
    assert_int_equal(fixture_publish(state->store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(state->store, "r", "u/a", "q", "text", 1), 0);
    commit(state);
    learn(state, "r", "one", 0, 1);
    learn(state, "r", "two", 1, 2);
    assert_int_equal(fixture_feedback(state->store, "u/a", "r", "three", job), 0);
    commit(state);
    assert_int_equal(check_cycle(state, 2, 0), 0);
    assert_int_equal(
        fixture_call(state->store, CLAAS_STORE_STANDING_WITHDRAW, &answer, "{\"lora_id\":\"u/a\"}"),
        0);
    claas_store_answer_done(&answer);
    assert_int_equal(check_cycle(state, 2, 0), 0); /* not durable yet, not answered yet */
    commit(state);
    assert_int_equal(check_cycle(state, 2, 0), CLAAS_ERR_CONFLICT);
    assert_non_null(strstr(claas_error_text(), "withdrawn"));
    assert_int_equal(fixture_call(state->store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(int_of(answer.body, "withdrawn"), 2);
    assert_int_equal(size_of(answer.body, "replay"), 0);
    assert_int_equal(size_of(answer.body, "standing"), 0);
    claas_store_answer_done(&answer);
    assert_int_equal(check_cycle(state, 2, 2), 0);
    rollback(state, 1);
    assert_int_equal(check_cycle(state, 2, 2), CLAAS_ERR_CONFLICT);
    assert_int_equal(check_cycle(state, 1, 2), 0);
}

static void test_replay_bounds(void **ret)
{
    struct state *state = *ret;
    struct claas_store_options options = fixture_options(state->data);
    struct claas_store_answer answer;
    char job[65], text[16];

    options.replay_items = 3;
    options.replay_age = 5;
    reopen(state, &options);
    assert_int_equal(fixture_publish(state->store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(state->store, "r", "u/a", "q", "text", 1), 0);
    commit(state);
    for (int i = 0; i < 4; i++) {
        snprintf(text, sizeof(text), "f%d", i);
        learn(state, "r", text, i, i + 1);
    }
    assert_int_equal(fixture_feedback(state->store, "u/a", "r", "new", job), 0);
    assert_int_equal(fixture_call(state->store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(size_of(answer.body, "replay"), 3);
    assert_int_equal(size_of(answer.body, "standing"), 4);
    claas_store_answer_done(&answer);
    /* Three versions without feedback: only f2's and f3's are younger than five versions. */
    for (int i = 4; i < 7; i++)
        assert_int_equal(fixture_publish(state->store, state->data, "u/a", i, "[]", false), i + 1);
    assert_int_equal(fixture_call(state->store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(size_of(answer.body, "replay"), 2);
    assert_string_equal(text_of(at(answer.body, "replay", 0), "feedback"), "f3");
    assert_int_equal(size_of(answer.body, "standing"), 4);
    claas_store_answer_done(&answer);
}

static size_t message_bytes(const struct claas_store_answer *answer)
{
    CLAAS_AUTO_FREE char *text = claas_json_print(answer->body);
    size_t bytes = strlen(text);

    for (size_t i = 0; i < answer->blob_count; i++)
        bytes += answer->blobs[i].length;
    return bytes;
}

/* `length` of one character, free with free(). */
static char *long_text(char c, size_t length)
{
    char *text = claas_alloc(length + 1, 1);

    memset(text, c, length);
    return text;
}

/* All of an input goes into one message. A control character is six in JSON. */
static void test_large_input(void **ret)
{
    struct state *state = *ret;
    CLAAS_AUTO_FREE char *text = long_text('\1', (size_t)1 << 20);
    CLAAS_AUTO_FREE char *large = long_text('\1', (size_t)5 << 20);
    CLAAS_AUTO_FREE char *recent = long_text('r', (size_t)200 << 10);
    struct claas_store_answer answer;
    char job[65], id[32];

    assert_int_equal(fixture_publish(state->store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(state->store, "new", "u/a", "q", "text", 1), 0);
    assert_int_equal(fixture_rollout(state->store, "recent", "u/a", recent, "text", 1), 0);
    for (int i = 0; i < 8; i++) {
        snprintf(id, sizeof(id), "r%d", i);
        assert_int_equal(fixture_rollout(state->store, id, "u/a", id, text, i), 0);
    }
    for (int i = 0; i < 2; i++)
        assert_int_equal(fixture_rollout(state->store, i ? "l1" : "l0", "u/a", "l", large, i), 0);
    commit(state);
    for (int i = 0; i < 8; i++) {
        snprintf(id, sizeof(id), "r%d", i);
        learn(state, id, id, i, i + 1);
    }
    assert_int_equal(fixture_feedback(state->store, "u/a", "new", "be new", job), 0);
    assert_int_equal(fixture_call(state->store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                  "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                     0);
    assert_int_equal(size_of(answer.body, "items"), 1);
    assert_int_equal(size_of(answer.body, "standing"), 8);
    assert_int_equal(size_of(answer.body, "recent"), 2);
    assert_int_equal(size_of(answer.body, "replay"), 5); /* the newest */
    assert_string_equal(text_of(at(answer.body, "replay", 0), "feedback"), "r7");
    assert_true(message_bytes(&answer) < (size_t)33 << 20);
    claas_store_answer_done(&answer);
    /* New items have to fit, together with what they are learnt beside. */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(
            fixture_call(state->store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                         "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"l0\","
                         "\"feedback\":\"x\"},{\"lora_id\":\"u/a\",\"response_id\":\"%s\","
                         "\"feedback\":\"x\"}]}",
                         i ? "l1" : "new"),
            0);
        snprintf(job, sizeof(job), "%s", text_of(answer.body, "job_id"));
        claas_store_answer_done(&answer);
        commit(state);
        assert_int_equal(fixture_call(state->store, CLAAS_STORE_CYCLE_INPUT, &answer,
                                      "{\"lora_id\":\"u/a\",\"job_ids\":[\"%s\"]}", job),
                         i ? CLAAS_ERR_TOO_LARGE : 0);
        claas_store_answer_done(&answer);
    }
}

static void test_publish_jobs(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char jobs[2][65], list[160], mixed[160];

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(store, state->data, "u/b", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "text", 1), 0);
    commit(state);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "one", jobs[0]), 0);
    assert_int_equal(fixture_feedback(store, "u/a", "r", "two", jobs[1]), 0);
    snprintf(list, sizeof(list), "[\"%s\",\"%s\"]", jobs[0], jobs[1]);
    /* Another adapter's jobs, a job twice, a wrong parent: nothing moves, the jobs stay. */
    assert_int_equal(fixture_publish(store, state->data, "u/b", 0, list, false),
                     CLAAS_ERR_CONFLICT);
    snprintf(mixed, sizeof(mixed), "[\"%s\",\"%s\"]", jobs[0], jobs[0]);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, mixed, false),
                     CLAAS_ERR_INVALID);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 3, list, false),
                     CLAAS_ERR_CONFLICT);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, list, false), 1);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 1, list, false),
                     CLAAS_ERR_CONFLICT);
    for (int i = 0; i < 2; i++) {
        const cJSON *job;

        assert_int_equal(
            fixture_call(store, CLAAS_STORE_JOB_GET, &answer, "{\"job_id\":\"%s\"}", jobs[i]), 0);
        job = claas_json_get(answer.body, "job");
        assert_string_equal(text_of(job, "state"), "done");
        assert_int_equal(int_of(job, "version"), 1);
        assert_int_equal(int_of(claas_json_get(job, "result"), "steps"), 8);
        claas_store_answer_done(&answer);
    }
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_VERSIONS, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    assert_string_equal(text_of(at(answer.body, "versions", 1), "job_id"), jobs[0]);
    assert_int_equal(int_of(at(answer.body, "versions", 1), "parent"), 0);
    assert_null(claas_json_get(at(answer.body, "versions", 0), "parent"));
    claas_store_answer_done(&answer);
    /* Jobs of a deleted adapter end. */
    assert_int_equal(fixture_feedback(store, "u/a", "r", "three", jobs[0]), 0);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_ADAPTER_DELETE, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(
        fixture_call(store, CLAAS_STORE_JOB_GET, &answer, "{\"job_id\":\"%s\"}", jobs[0]), 0);
    assert_string_equal(text_of(claas_json_get(answer.body, "job"), "state"), "cancelled");
    claas_store_answer_done(&answer);
}

/* --- transactions ---------------------------------------------------------------------- */

/* A failing request among good ones; and questions see only what is committed. */
static void test_group(void **ret)
{
    struct state *state = *ret;
    claas_store_t *store = state->store;
    struct claas_store_answer answer;
    char body[512];

    assert_int_equal(fixture_publish(store, state->data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(store, "r", NULL, "q", "text", 1), 0);
    for (int i = 0; i < 10; i++) {
        bool good = i % 3 != 1;

        /* The second item is what fails: the first one's rows are in the savepoint already. */
        snprintf(body, sizeof(body),
                 "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\",\"feedback\":\"%d\"},"
                 "{\"lora_id\":\"u/a\",\"response_id\":\"%s\",\"feedback\":\"x\"}]}",
                 i, good ? "r" : "none");
        assert_int_equal(
            fixture_call_as(store, "local", CLAAS_STORE_FEEDBACK_PUT, NULL, 0, &answer, body),
            good ? 0 : CLAAS_ERR_NOT_FOUND);
        claas_store_answer_done(&answer);
    }
    assert_int_equal(store->ops->pending(store), 8);
    assert_int_equal(fixture_publish(store, state->data, "u/a", 0, "[]", false),
                     CLAAS_ERR_INTERNAL);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "jobs"), 0);
    claas_store_answer_done(&answer);
    commit(state);
    assert_int_equal(store->ops->pending(store), 0);
    assert_int_equal(fixture_call(store, CLAAS_STORE_JOB_LIST, &answer, "{}"), 0);
    assert_int_equal(size_of(answer.body, "jobs"), 7);
    claas_store_answer_done(&answer);
    commit(state); /* nothing pending is fine */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test_setup_teardown(test_adapter_life, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_adapter_list, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_principals, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_lookup, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_rollout_input, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_feedback_input, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_idempotency, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_queue_max, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_jobs, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_jobs_that_ran, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cycle_input, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_lists_follow_versions, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_cycle_check, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_replay_bounds, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_large_input, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_publish_jobs, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_group, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
