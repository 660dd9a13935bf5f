/* What the store tells of jobs: events are heard of when they are on disk, and only those that
 * are. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "storage_fixture.h"

static struct {
    char *data;
    claas_store_t *store;
    cJSON *heard;
} test;

static void keep_event(void *arg, const cJSON *body)
{
    cJSON_AddItemToArray(arg, cJSON_Duplicate(body, true));
}

static int set_up(void **state)
{
    struct claas_store_options options;

    test.data = fixture_directory();
    test.heard = cJSON_CreateArray();
    options = fixture_options(test.data);
    options.on_event = keep_event;
    options.arg = test.heard;
    return claas_store_open_sqlite(&options, &test.store);
}

static int tear_down(void **state)
{
    if (test.store)
        test.store->ops->close(&test.store);
    fixture_remove(&test.data);
    cJSON_Delete(test.heard);
    return 0;
}

static void commit(void)
{
    assert_int_equal(test.store->ops->commit(test.store), 0);
}

static void give_feedback(char job[65])
{
    struct claas_store_answer answer;
    const char *id = "";

    assert_int_equal(fixture_call(test.store, CLAAS_STORE_FEEDBACK_PUT, &answer,
                                  "{\"requests\":[{\"lora_id\":\"u/a\",\"response_id\":\"r\","
                                  "\"feedback\":\"x\"}]}"),
                     0);
    claas_json_get_string(answer.body, "job_id", &id);
    snprintf(job, 65, "%s", id);
    claas_store_answer_done(&answer);
}

static void record_training(const char *job, const char *others, int want)
{
    struct claas_store_answer answer;

    assert_int_equal(fixture_call(test.store, CLAAS_STORE_JOB_RECORD, &answer,
                                  "{\"job_ids\":[\"%s\"%s],\"state\":\"training\",\"event\":{}}",
                                  job, others),
                     want);
    claas_store_answer_done(&answer);
}

static void expect_heard(int count, const char *job, const char *state)
{
    const cJSON *body = cJSON_GetArrayItem(test.heard, count - 1);
    const cJSON *event = claas_json_get(body, "event");
    const char *text = "";

    assert_int_equal(cJSON_GetArraySize(test.heard), count);
    claas_json_get_string(body, "lora_id", &text);
    assert_string_equal(text, "u/a");
    claas_json_get_string(event, "job_id", &text);
    assert_string_equal(text, job);
    claas_json_get_string(event, "state", &text);
    assert_string_equal(text, state);
}

static void what_is_on_disk_is_heard_of(void **state)
{
    struct claas_store_answer answer;
    char job[65];

    assert_int_equal(fixture_publish(test.store, test.data, "u/a", -1, "[]", false), 0);
    assert_int_equal(fixture_rollout(test.store, "r", NULL, "q", "text", 1), 0);
    give_feedback(job);
    /* Fails when the first job's event has been written. */
    record_training(job, ",\"job-none\"", CLAAS_ERR_NOT_FOUND);
    assert_int_equal(cJSON_GetArraySize(test.heard), 0);
    commit();
    expect_heard(1, job, "queued");
    record_training(job, "", 0);
    test.store->ops->abort(test.store);
    commit();
    expect_heard(1, job, "queued");
    record_training(job, "", 0);
    commit();
    expect_heard(2, job, "training");
    assert_int_equal(
        fixture_call(test.store, CLAAS_STORE_ADAPTER_DELETE, &answer, "{\"lora_id\":\"u/a\"}"), 0);
    claas_store_answer_done(&answer);
    commit();
    expect_heard(3, job, "cancelled");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_is_on_disk_is_heard_of, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
