/* What upkeep leaves of jobs: old ones lose their details, those of an adapter that is gone go with
 * all that is about them, and nobody else's do. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "storage_fixture.h"
#include "store_sqlite.h"

#define KEEP 4

static struct {
    char *data;
    claas_store_t *store;
} test;

static void open_store(void)
{
    struct claas_store_options options = fixture_options(test.data);

    options.keep_jobs = KEEP;
    if (claas_store_open_sqlite(&options, &test.store) < 0)
        fail_msg("%s", claas_error_text());
}

static int set_up(void **state)
{
    test.data = fixture_directory();
    open_store();
    assert_int_equal(fixture_publish(test.store, test.data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_publish(test.store, test.data, "u/b", -1, "[]", false), 0);
    return 0;
}

static int tear_down(void **state)
{
    if (test.store)
        test.store->ops->close(&test.store);
    fixture_remove(&test.data);
    return 0;
}

static void start_anew(void)
{
    test.store->ops->close(&test.store);
    open_store();
}

static void tend_all(void)
{
    int rc;

    while ((rc = test.store->ops->tend(test.store)) > 0)
        continue;
    assert_int_equal(rc, 0);
}

static struct db *writer(void)
{
    return &((struct store *)test.store)->writer;
}

#define COUNT(from) count_rows("SELECT count(*) FROM " from)

static int count_rows(const char *sql)
{
    int64_t count = -1;

    assert_int_equal(db_get_int(writer(), &count, sql, ""), 1);
    return (int)count;
}

/* As if all of it had been 59 minutes, and then an hour, ago. */
static void pass_minutes(int minutes)
{
    CLAAS_AUTO_FREE char *sql =
        claas_format("UPDATE jobs SET updated = updated - %d; UPDATE gone_adapters SET since = "
                     "since - %d",
                     minutes * 60000, minutes * 60000);

    assert_int_equal(db_exec(writer(), sql), 0);
}

static void change(enum claas_store_op op, const char *format, const char *value)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    CLAAS_AUTO_FREE char *body = claas_format(format, value);

    assert_int_equal(fixture_call(test.store, op, &answer, "%s", body), 0);
    assert_int_equal(test.store->ops->commit(test.store), 0);
}

static void record_step(const char *job)
{
    change(CLAAS_STORE_JOB_RECORD,
           "{\"job_ids\":[\"%s\"],\"event\":{\"kind\":\"step\",\"step\":1}}", job);
}

/* Ends, after a step, as rejected. */
static void reject(const char *job)
{
    record_step(job);
    change(CLAAS_STORE_JOB_RECORD,
           "{\"job_ids\":[\"%s\"],\"state\":\"rejected\",\"event\":{\"reason\":\"kl\"},"
           "\"result\":{\"steps\":[1]}}",
           job);
}

static int get_job(const char *job, struct claas_store_answer *answer)
{
    return fixture_call(test.store, CLAAS_STORE_JOB_GET, answer, "{\"job_id\":\"%s\"}", job);
}

static void expect_job(const char *id, bool details, int states, int steps)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    const cJSON *job;

    assert_int_equal(get_job(id, &answer), 0);
    job = claas_json_get(answer.body, "job");
    assert_int_equal(cJSON_IsObject(claas_json_get(job, "result")), details);
    assert_int_equal(cJSON_GetArraySize(claas_json_get(job, "transitions")), states);
    assert_int_equal(cJSON_GetArraySize(claas_json_get(job, "events")), states + steps);
    assert_int_equal(cJSON_GetArraySize(claas_json_get(job, "feedback")), 1);
}

static void expect_gone(const char *job)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};

    assert_int_equal(get_job(job, &answer), CLAAS_ERR_NOT_FOUND);
}

static void give(const char *lora_id, const char *response, char job[65])
{
    if (fixture_feedback(test.store, lora_id, response, "no", job) < 0)
        fail_msg("%s", claas_error_text());
}

/* --- details --- */

static void old_jobs_lose_details(void **state)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer standing = {0};
    CLAAS_AUTO_FREE char *list = NULL;
    char done[65], waiting[65], rejected[65], later[KEEP][65];

    assert_int_equal(fixture_rollout(test.store, "r", "u/a", "q", "text", 1), 0);
    give("u/a", "r", done);
    record_step(done);
    list = claas_format("[\"%s\"]", done);
    assert_int_equal(fixture_publish(test.store, test.data, "u/a", 0, list, false), 1);
    give("u/a", "r", waiting);
    record_step(waiting);
    give("u/a", "r", rejected);
    reject(rejected);
    for (int i = 0; i < KEEP; i++) {
        give("u/a", "r", later[i]);
        reject(later[i]);
    }
    pass_minutes(59);
    tend_all();
    expect_job(done, true, 2, 1);
    expect_job(rejected, true, 2, 1);
    pass_minutes(1);
    tend_all();
    start_anew();
    tend_all();
    expect_job(done, false, 2, 0);
    expect_job(rejected, false, 2, 0);
    expect_job(waiting, false, 1, 1);
    for (int i = 0; i < KEEP; i++)
        expect_job(later[i], true, 2, 1);
    assert_int_equal(COUNT("jobs WHERE reason = 'kl'"), 1 + KEEP);
    assert_int_equal(COUNT("feedback"), 3 + KEEP);
    assert_int_equal(
        fixture_call(test.store, CLAAS_STORE_STANDING_LIST, &standing, "{\"lora_id\":\"u/a\"}"), 0);
    assert_int_equal(cJSON_GetArraySize(claas_json_get(standing.body, "feedback")), 1);
    /* One that waited long has its hour, too. */
    reject(waiting);
    tend_all();
    expect_job(waiting, true, 2, 2);
}

static void put_with_key(const char *lora_id, int want, bool want_duplicate)
{
    CLAAS_AUTO(claas_store_answer_done) struct claas_store_answer answer = {0};
    CLAAS_AUTO(claas_json_free) cJSON *event = NULL;
    bool duplicate = false;

    assert_int_equal(fixture_call(test.store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                                  "{\"idempotency_key\":\"k\",\"requests\":[{\"lora_id\":\"%s\","
                                  "\"response_id\":\"r\",\"feedback\":\"no\"}]}",
                                  lora_id),
                     want);
    if (want < 0)
        return;
    claas_json_get_bool(answer.body, "duplicate", &duplicate);
    assert_int_equal(duplicate, want_duplicate);
    assert_true(cJSON_IsObject(claas_json_get(answer.body, "event")));
    assert_int_equal(test.store->ops->commit(test.store), 0);
}

/* A key is known for as long as its job is, details or not. */
static void keys_last_as_long_as_jobs(void **state)
{
    char job[65];

    assert_int_equal(fixture_rollout(test.store, "r", NULL, "q", "text", 1), 0);
    put_with_key("u/a", 0, false);
    assert_int_equal(
        db_exec(writer(), "UPDATE jobs SET ended = 1, state = 'rejected', result = '{}'"), 0);
    for (int i = 0; i < KEEP; i++)
        give("u/b", "r", job);
    pass_minutes(60);
    tend_all();
    assert_int_equal(COUNT("jobs WHERE ended = 2"), 1);
    put_with_key("u/a", 0, true);
    change(CLAAS_STORE_ADAPTER_DELETE, "{\"lora_id\":\"%s\"}", "u/a");
    put_with_key("u/a", 0, true);
    pass_minutes(60);
    tend_all();
    put_with_key("u/a", CLAAS_ERR_NOT_FOUND, false);
}

/* --- adapters that are gone --- */

static void jobs_follow_their_adapter(void **state)
{
    char job[40][65], others[65], id[32];
    int left;

    ((struct store *)test.store)->options.keep_jobs = 100;
    for (int i = 0; i < 40; i++) {
        snprintf(id, sizeof(id), "r%d", i);
        assert_int_equal(fixture_rollout(test.store, id, NULL, id, "text", i), 0);
        give("u/a", id, job[i]);
        record_step(job[i]);
    }
    give("u/b", "r7", others); /* waits */
    change(CLAAS_STORE_ADAPTER_DELETE, "{\"lora_id\":\"%s\"}", "u/a");
    pass_minutes(59);
    tend_all();
    expect_job(job[0], false, 2, 1);
    pass_minutes(1);
    assert_true(test.store->ops->tend(test.store) > 0);
    left = COUNT("jobs");
    assert_in_range(left, 2, 40); /* in pieces; after a start the rest */
    start_anew();
    tend_all();
    for (int i = 0; i < 40; i++)
        expect_gone(job[i]);
    expect_job(others, false, 1, 0);
    assert_int_equal(COUNT("jobs"), 1);
    assert_int_equal(COUNT("job_events"), 1);
    assert_int_equal(COUNT("feedback"), 1);
    assert_int_equal(COUNT("rollouts"), 1);
    assert_int_equal(COUNT("rollout_choices"), 1);
    assert_int_equal(COUNT("rollouts WHERE kept AND response_id = 'r7'"), 1);
    assert_int_equal(COUNT("gone_adapters"), 0);
}

/* The one that has the name now keeps what is its own. */
static void a_name_given_anew(void **state)
{
    char before[65], after[65];

    assert_int_equal(fixture_rollout(test.store, "r", "u/a", "q", "text", 1), 0);
    assert_int_equal(fixture_rollout(test.store, "s", "u/a", "q", "other", 2), 0);
    give("u/a", "r", before);
    assert_int_equal(fixture_publish(test.store, test.data, "u/a", -1, "[]", true), 0);
    give("u/a", "s", after);
    reject(after);
    pass_minutes(60);
    tend_all();
    expect_gone(before);
    expect_job(after, true, 2, 1);
    assert_int_equal(COUNT("rollouts WHERE response_id = 's' AND kept"), 1);
    assert_int_equal(COUNT("rollouts"), 1);
}

/* An answer that two adapters kept goes when both are gone, not before. */
static void an_answer_of_two(void **state)
{
    char job[65];

    assert_int_equal(fixture_rollout(test.store, "r", NULL, "q", "text", 1), 0);
    give("u/a", "r", job);
    give("u/b", "r", job);
    change(CLAAS_STORE_ADAPTER_DELETE, "{\"lora_id\":\"%s\"}", "u/a");
    assert_int_equal(COUNT("rollouts WHERE kept"), 1);
    change(CLAAS_STORE_ADAPTER_DELETE, "{\"lora_id\":\"%s\"}", "u/b");
    assert_int_equal(COUNT("rollouts WHERE kept"), 0);
    pass_minutes(60);
    tend_all();
    assert_int_equal(COUNT("rollouts"), 0);
    assert_int_equal(COUNT("jobs"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(old_jobs_lose_details, set_up, tear_down),
        cmocka_unit_test_setup_teardown(keys_last_as_long_as_jobs, set_up, tear_down),
        cmocka_unit_test_setup_teardown(jobs_follow_their_adapter, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_name_given_anew, set_up, tear_down),
        cmocka_unit_test_setup_teardown(an_answer_of_two, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
