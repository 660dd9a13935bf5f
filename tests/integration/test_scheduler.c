/* The scheduler's state machine, one cycle after the other (scheduler_world.h). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "scheduler_world.h"

#include <stdio.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

static void test_done(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"done\""));
    assert_int_equal(question.ends, 1);
    assert_true(question.progress >= 7); /* queued, batched, training, 2 steps, gating, … */
    assert_int_equal(look()->versions[0], 1);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_KEEP), 1); /* the second score is no better */
}

static void test_rejected(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    world.bad_gate = true;
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"rejected\""));
    assert_non_null(strstr(question.reply, "neutral text"));
    assert_int_equal(calls_of(CLAAS_MSG_VERSION_PUBLISH), 0);
    check_end("job-1", "rejected");
}

static void test_strikes_park(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);
    const struct world_job *job;
    const char *error = "";

    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_DEVICE, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
    assert_true(look()->seeds[0] == look()->seeds[1]);
    job = look_for("job-1");
    claas_json_get_string(cJSON_GetArrayItem(job->events, cJSON_GetArraySize(job->events) - 1),
                          "error", &error);
    assert_int_equal(strlen(error), FAILURE_BYTES); /* the whole sentence */
}

static void test_absent_peers_are_no_strikes(void **state)
{
    struct rig *rig = *state;

    fail_next(CLAAS_MSG_CYCLE_BEGIN, 1, CLAAS_ERR_UNAVAILABLE, false);
    fail_next(CLAAS_MSG_CYCLE_STEP, 1, CLAAS_ERR_NOT_FOUND, false); /* the trainer started anew */
    fail_next(CLAAS_MSG_VERSION_PUBLISH, 1, CLAAS_ERR_OVERLOADED, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_int_equal(look()->versions[0], 1);
    assert_int_equal(count_state(look_for("job-1"), "batched"), 4);
    assert_int_equal(count_state(look_for("job-1"), "queued"), 4); /* each time it waits */
}

/* A disk that fails or lets nobody write is no more to blame on the job than a full one. */
static void test_failing_disks_are_no_strikes(void **state)
{
    struct rig *rig = *state;

    fail_next(CLAAS_MSG_CYCLE_BEGIN, 1, CLAAS_ERR_IO, false);
    fail_next(CLAAS_MSG_VERSION_PUBLISH, 1, CLAAS_ERR_DENIED, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    submit(rig, "me/b", "shorter");
    check_end("job-1", "done");
    check_end("job-2", "done");
    for (int i = 0; i < 2; i++) {
        const struct world_job *job = look_for(i == 0 ? "job-1" : "job-2");

        assert_int_equal(job->strikes, 0);
        assert_int_equal(count_state(job, "queued"), 1 + 1); /* it waits */
    }
}

/* However often the peer is looked for, the job says once that it waits, and once that it began. */
static void test_long_waits(void **state)
{
    struct rig *rig = *state;
    const struct world_job *job;

    fail_next(CLAAS_MSG_CYCLE_INPUT, 2, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    job = look_for("job-1");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 3);
    assert_int_equal(count_state(job, "queued"), 1 + 1);
    assert_int_equal(count_state(job, "batched"), 1);
    fail_next(CLAAS_MSG_CYCLE_BEGIN, 2, CLAAS_ERR_UNAVAILABLE, false);
    submit(rig, "me/a", "shorter still");
    check_end("job-2", "done");
    job = look_for("job-2");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_BEGIN), 1 + 3);
    assert_int_equal(count_state(job, "queued"), 1 + 1);
    assert_int_equal(count_state(job, "batched"), 1 + 1); /* before the first try, and at last */
}

/* Whether the disk says that it waits is not certain when the answer is an error: once more. */
static void test_wait_that_was_not_recorded(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "shorter");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    await_calls(CLAAS_MSG_JOB_RECORD, 1);
    fail_next(CLAAS_MSG_CYCLE_BEGIN, 2, CLAAS_ERR_UNAVAILABLE, false);
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_NO_SPACE, false);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
    assert_int_equal(count_state(look_for("job-1"), "queued"), 1 + 1);
}

/* Which model was sampled cannot be told: nothing is trained meanwhile, and it is no strike. */
static void test_absent_sampler(void **state)
{
    struct rig *rig = *state;
    const char *reason = "";
    const cJSON *event;

    fail_next(CLAAS_MSG_MODEL_INFO, 1, CLAAS_ERR_DEADLINE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_int_equal(calls_of(CLAAS_MSG_MODEL_INFO), 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 1);
    cJSON_ArrayForEach(event, look_for("job-1")->events)
        claas_json_get_string(event, "reason", &reason);
    assert_int_equal(strlen(reason), FAILURE_BYTES); /* what it waited for */
}

/* What a job's own kernels fault on would lose every device, one life after the other. */
static void test_job_that_loses_devices(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_DEVICE_LOST, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_int_equal(look_for("job-1")->strikes, 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
}

/* Two that wait are learnt together; what one of them spoils is not the other's fault. */
static void test_bad_company(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "first");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/a", "good");
    submit(rig, "me/a", "bad");
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "failed");
    assert_string_equal(look()->cycles[1], "job-2 job-3 ");
    assert_string_equal(look()->cycles[2], "job-2 ");
}

static void test_adapters_take_turns(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/a", "2");
    submit(rig, "me/b", "3");
    submit(rig, "me/a", "4");
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-4", "done");
    assert_string_equal(look()->cycles[1], "job-3 ");
    assert_string_equal(look()->cycles[2], "job-2 job-4 ");
}

/* However many adapters of one user wait, another user's first is next. */
static void test_users_take_turns(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    submit(rig, "me/a", "4");
    submit(rig, "us/d", "5");
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-4", "done");
    check_end("job-3", "done");
    assert_string_equal(look()->cycles[1], "job-5 ");
    assert_string_equal(look()->cycles[2], "job-2 ");
    assert_string_equal(look()->cycles[3], "job-3 ");
    assert_string_equal(look()->cycles[4], "job-4 ");
}

/* Each in a cycle of its own: no two have the same number of steps. */
static void submit_apart(struct rig *rig, const char *lora_id, int count)
{
    for (int i = 1; i <= count; i++) {
        struct question question = ask_feedback(lora_id, "shorter", false);
        cJSON *training = claas_json_set(question.body, "training", cJSON_CreateObject());

        claas_json_set_int(training, "steps", i);
        assert_int_equal(probe_call(rig->probe, &question), 0);
    }
}

/* Nor does an adapter wait for all that another of its user has, with another user's turns in
 * between. */
static void test_a_users_adapters_take_turns(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit_apart(rig, "me/a", 3);
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/b", "4");
    submit_apart(rig, "us/d", 3);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-3", "done");
    check_end("job-7", "done");
    assert_string_equal(look()->cycles[0], "job-1 ");
    assert_string_equal(look()->cycles[1], "job-5 ");
    assert_string_equal(look()->cycles[2], "job-4 ");
    assert_string_equal(look()->cycles[3], "job-6 ");
    assert_string_equal(look()->cycles[4], "job-2 ");
}

/* Cancelled twice in a cycle: it ends at once, and nothing of it goes on. */
static void test_cancel_in_a_cycle(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);
    struct question first = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");
    struct question second = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    rig_start(rig);
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_block(CLAAS_MSG_JOB_RECORD, true);
    probe_ask(rig->probe, &first);
    probe_ask(rig->probe, &second);
    set_block(CLAAS_MSG_JOB_RECORD, false);
    probe_await(rig->probe, &first);
    probe_await(rig->probe, &second);
    probe_await(rig->probe, &watch);
    assert_non_null(strstr(first.reply, "\"cancelled\":true"));
    assert_non_null(strstr(second.reply, "\"cancelled\":false"));
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
    await_calls(CLAAS_MSG_CYCLE_END, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/a", "next");
    check_end("job-2", "done");
    assert_int_equal(look()->cycle_count, 2);
    assert_string_equal(look()->cycles[1], "job-2 ");
}

/* The others of the cycle begin anew without it. */
static void test_cancel_one_of_two(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-2");

    add_job("me/a", "local");
    add_job("me/a", "local");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    check_end("job-1", "done");
    assert_string_equal(look_for("job-2")->state, "cancelled");
    assert_string_equal(look()->cycles[1], "job-1 ");
}

static void test_a_cancel_that_is_not_recorded(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "shorter");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    await_calls(CLAAS_MSG_JOB_RECORD, 1);
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_NO_SPACE, false);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    assert_non_null(strstr(cancel.reply, "\"cancelled\":false"));
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
}

static void test_jobs_of_others(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    add_job("you/a", "someone");
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    rig_start(rig);
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    assert_int_equal(probe_call(rig->probe, &cancel), CLAAS_ERR_NOT_FOUND);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
}

static void roll_back(void)
{
    script_of(CLAAS_MSG_CYCLE_STAGE)->hook = NULL;
    world.versions[0] = 40;
}

static void test_rollback_during_a_cycle(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STAGE, roll_back);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->version, 41);
    assert_int_equal(look()->cycle_count, 2);
}

static void withdraw(void)
{
    script_of(CLAAS_MSG_CYCLE_STEP)->hook = NULL;
    world.withdrawn++;
}

/* Withdrawn while the first step runs: no second one shows it to the teacher, and what was learnt
 * from it is dropped. */
static void test_feedback_withdrawn_during_a_cycle(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STEP, withdraw);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 1 + 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 2);
    assert_int_equal(calls_of(CLAAS_MSG_VERSION_PUBLISH), 1);
    assert_int_equal(look()->cycle_count, 2);
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_true(look()->seeds[0] == look()->seeds[1]);
}

static void withdraw_late(void)
{
    if (script_of(CLAAS_MSG_CYCLE_STEP)->calls == 2)
        withdraw();
}

/* In the last step: it is not published either. */
static void test_feedback_withdrawn_at_the_end(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STEP, withdraw_late);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2 + 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STAGE), 1);
    assert_int_equal(look()->versions[0], 1);
}

/* Storage is away for a moment: no strike. */
static void test_a_check_without_answer(void **state)
{
    struct rig *rig = *state;

    fail_next(CLAAS_MSG_CYCLE_CHECK, 1, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_int_equal(look()->cycle_count, 2);
}

static void delete_adapter(void)
{
    script_of(CLAAS_MSG_CYCLE_STEP)->hook = NULL;
    cJSON_Delete(add_event(&world.jobs[0], "cancelled", NULL));
}

/* The name is taken anew at once, and its first feedback meets the old adapter's job. */
static void test_adapter_deleted_during_a_cycle(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    set_hook(CLAAS_MSG_CYCLE_STEP, delete_adapter);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &watch), 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
    submit(rig, "me/a", "new");
    check_end("job-2", "done");
    assert_string_equal(look()->cycles[look()->cycle_count - 1], "job-2 ");
    assert_true(calls_of(CLAAS_MSG_CYCLE_INPUT) <= 3);
}

/* What a watcher of the job gets whose adapter is deleted while its input is asked for. dropped:
 * storage no longer has the job either. */
static void delete_unheard(struct rig *rig, bool dropped, struct question *watch)
{
    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_INPUT, true);
    probe_ask(rig->probe, watch);
    await_calls(CLAAS_MSG_CYCLE_INPUT, 1);
    pthread_mutex_lock(&world.lock);
    world.deleted = true;
    cJSON_Delete(add_event(&world.jobs[0], "cancelled", NULL));
    if (dropped)
        claas_copy_text(world.jobs[0].id, sizeof(world.jobs[0].id), "another");
    unlock();
    set_block(CLAAS_MSG_CYCLE_INPUT, false);
    probe_await(rig->probe, watch);
}

static void test_adapter_deleted_while_jobs_wait(void **state)
{
    struct question watch = ask_feedback("me/a", "shorter", true);

    delete_unheard(*state, false, &watch);
    assert_int_equal(watch.code, 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
}

/* Nobody told the scheduler, and by now storage has dropped the job. */
static void test_job_gone_with_its_adapter(void **state)
{
    struct question watch = ask_feedback("me/a", "shorter", true);

    delete_unheard(*state, true, &watch);
    assert_int_equal(watch.code, CLAAS_ERR_NOT_FOUND);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 1);
}

/* Who waits for a job of another adapter does not wait for the cycle under way. */
static void test_told_that_jobs_ended(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/b", "shorter", true);
    struct question tell = {.to = "scheduler", .type = CLAAS_MSG_JOBS_ENDED, .is_tell = true};

    tell.body = cJSON_CreateObject();
    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_STEP, true);
    submit(rig, "me/a", "longer");
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    probe_ask(rig->probe, &watch);
    probe_await_progress(rig->probe, &watch, 1);
    pthread_mutex_lock(&world.lock);
    cJSON_Delete(add_event(&world.jobs[1], "cancelled", NULL));
    unlock();
    probe_ask(rig->probe, &tell);
    probe_await(rig->probe, &watch);
    assert_int_equal(watch.code, 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
    assert_string_equal(look_for("job-1")->state, "training");
    set_block(CLAAS_MSG_CYCLE_STEP, false);
    check_end("job-1", "done");
}

/* No list is the last word: cycles start all the same. */
static void test_jobs_end_all_the_time(void **state)
{
    struct rig *rig = *state;

    world.more_end = true;
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    submit(rig, "me/a", "longer");
    check_end("job-2", "done");
}

static void test_lost_answer_of_a_publication(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    fail_next(CLAAS_MSG_VERSION_PUBLISH, 1, CLAAS_ERR_UNAVAILABLE, true);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &watch), 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"done\""));
    assert_int_equal(look()->versions[0], 1);
    assert_int_equal(look()->cycle_count, 1);
}

static void test_lost_answer_of_a_feedback(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", false);

    fail_next(CLAAS_MSG_FEEDBACK_PUT, 1, CLAAS_ERR_UNAVAILABLE, true);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_UNAVAILABLE);
    check_end("job-1", "done");
}

static void test_lost_answer_of_an_end(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "bad", true);

    /* batched, then failed */
    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    await_calls(CLAAS_MSG_JOB_RECORD, 1);
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_CONFLICT, true);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    probe_await(rig->probe, &watch);
    assert_non_null(strstr(watch.reply, "\"state\":\"failed\""));
    assert_int_equal(look()->cycle_count, 1);
}

/* The end of the process answers who waits, and the next start makes the same cycle again. */
static void test_stop_and_start(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    rig_start(rig);
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    claas_runtime_free(&rig->runtime);
    assert_int_equal(watch.ends, 1);
    assert_true(watch.code < 0);
    assert_string_equal(look()->jobs[0].state, "queued");
    assert_int_equal(look()->ends, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    rig_start(rig);
    check_end("job-1", "done");
    assert_true(look()->seeds[0] == look()->seeds[1]);
}

static bool waits_again(const void *arg)
{
    const struct world_job *job = arg;

    return strcmp(job->state, "queued") == 0;
}

/* More jobs than one answer of storage lists: the scheduler knows the last of them, and what ran
 * when it was stopped waits again wherever it stands. */
static void test_many_jobs(void **state)
{
    struct rig *rig = *state;
    char id[16];
    struct question cancel;

    for (int i = 0; i < JOBS_MAX; i++)
        add_job("me/a", "local");
    snprintf(world.jobs[JOBS_MAX - 2].state, sizeof(world.jobs[0].state), "training");
    set_hold(CLAAS_MSG_CYCLE_INPUT, true);
    rig_start(rig);
    await_calls(CLAAS_MSG_CYCLE_INPUT, 1);
    assert_int_equal(calls_of(CLAAS_MSG_JOBS_UNFINISHED), (JOBS_MAX + 999) / 1000);
    await(waits_again, &world.jobs[JOBS_MAX - 2], "the end of a cycle that was");
    snprintf(id, sizeof(id), "job-%d", JOBS_MAX);
    cancel = ask_about(CLAAS_MSG_JOB_CANCEL, id);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    assert_non_null(strstr(cancel.reply, "\"cancelled\":true"));
}

static void test_training_values(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);
    cJSON *training;

    rig_start(rig);
    training = claas_json_set(question.body, "training", cJSON_CreateObject());
    claas_json_set_number(training, "steps", 2.5);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_UNPROCESSABLE);
    question = ask_feedback("me/a", "shorter", true);
    training = claas_json_set(question.body, "training", cJSON_CreateObject());
    claas_json_set_number(training, "steps", 1);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 1);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_done),
        TEST(test_rejected),
        TEST(test_strikes_park),
        TEST(test_absent_peers_are_no_strikes),
        TEST(test_failing_disks_are_no_strikes),
        TEST(test_long_waits),
        TEST(test_wait_that_was_not_recorded),
        TEST(test_absent_sampler),
        TEST(test_job_that_loses_devices),
        TEST(test_bad_company),
        TEST(test_adapters_take_turns),
        TEST(test_users_take_turns),
        TEST(test_a_users_adapters_take_turns),
        TEST(test_cancel_in_a_cycle),
        TEST(test_cancel_one_of_two),
        TEST(test_a_cancel_that_is_not_recorded),
        TEST(test_jobs_of_others),
        TEST(test_rollback_during_a_cycle),
        TEST(test_feedback_withdrawn_during_a_cycle),
        TEST(test_feedback_withdrawn_at_the_end),
        TEST(test_a_check_without_answer),
        TEST(test_adapter_deleted_during_a_cycle),
        TEST(test_adapter_deleted_while_jobs_wait),
        TEST(test_job_gone_with_its_adapter),
        TEST(test_told_that_jobs_ended),
        TEST(test_jobs_end_all_the_time),
        TEST(test_lost_answer_of_a_publication),
        TEST(test_lost_answer_of_a_feedback),
        TEST(test_lost_answer_of_an_end),
        TEST(test_stop_and_start),
        TEST(test_many_jobs),
        TEST(test_training_values),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
