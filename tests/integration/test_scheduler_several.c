/* The scheduler with several cycles at the same time, and trainers that crash (scheduler_world.h).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "scheduler_world.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

/* Three wait for each other's step, which one after the other never would. */
static void test_adapters_learn_together(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_gather(CLAAS_MSG_CYCLE_STEP, 3);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    submit(rig, "me/d", "4");
    submit(rig, "me/a", "5");
    for (int i = 1; i <= 5; i++) {
        char id[16];

        snprintf(id, sizeof(id), "job-%d", i);
        check_end(id, "done");
        assert_int_equal(look_for(id)->strikes, 0);
    }
    assert_int_equal(look()->open_most, 3);
    assert_false(look()->open_twice);
    assert_int_equal(look()->versions[0], 2);
    assert_int_equal(look()->versions[3], 1);
    assert_int_equal(look_for("job-1")->version, 1);
    assert_int_equal(look_for("job-5")->version, 2);
    assert_string_equal(look()->cycles[3], "job-4 "); /* job-5's adapter had its turn */
}

/* While its adapter learns, a job waits, whatever room there is; another's goes on. */
static void test_one_adapter_one_cycle(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/a", "2");
    submit(rig, "me/b", "3");
    check_end("job-3", "done");
    assert_false(has_ended(look_for("job-2")));
    assert_int_equal(look()->cycle_count, 2);
    assert_string_equal(look()->cycles[1], "job-3 ");
    assert_false(look()->open_twice);
}

/* One until the trainer has said how many. */
static void test_the_trainer_says_how_many(void **state)
{
    struct rig *rig = *state;

    world.trainer_jobs = 2;
    set_gather(CLAAS_MSG_CYCLE_STEP, 2);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 1);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look()->open_most, 2);
}

/* Two jobs whose first steps end with `code`, together; retries=1. */
static void fail_together(struct rig *rig, int count, int code)
{
    configure(rig, "trainer.jobs=2", "cycle.retries=1");
    set_gather(CLAAS_MSG_CYCLE_STEP, 2);
    fail_next(CLAAS_MSG_CYCLE_STEP, count, code, false);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
}

/* Nobody pays for what happened in company: each has one more try, by itself. */
static void test_a_strike_in_company(void **state)
{
    struct rig *rig = *state;

    fail_together(rig, 2, CLAAS_ERR_DEVICE_LOST);
    await_calls(CLAAS_MSG_CYCLE_STEP, 2);
    pthread_mutex_lock(&world.lock);
    world.open_most = 0;
    unlock();
    check_end("job-1", "done");
    check_end("job-2", "done");
    assert_int_equal(look_for("job-1")->strikes, 1);
    assert_int_equal(look_for("job-2")->strikes, 1);
    assert_int_equal(look()->open_most, 1);
    assert_int_equal(look()->cycle_count, 4);
}

static void test_the_guilty_of_two(void **state)
{
    struct rig *rig = *state;
    bool first;

    fail_together(rig, 3, CLAAS_ERR_DEVICE_LOST);
    await(job_ended, "job-1", "job-1");
    await(job_ended, "job-2", "job-2");
    first = strcmp(look_for("job-1")->state, "failed") == 0;
    assert_string_equal(look_for(first ? "job-1" : "job-2")->state, "failed");
    assert_int_equal(look_for(first ? "job-1" : "job-2")->strikes, 2);
    assert_string_equal(look_for(first ? "job-2" : "job-1")->state, "done");
}

/* A device too full for two: no strike, and one after the other. The last one's is a strike. */
static void test_a_full_device(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    configure(rig, "trainer.jobs=2", "cycle.retries=1");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    fail_next(CLAAS_MSG_CYCLE_BEGIN, 1, CLAAS_ERR_NO_MEMORY, false);
    submit(rig, "me/b", "2");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 2);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/c", "3"); /* there is no room for it now */
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_BEGIN), 2);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look_for("job-2")->strikes, 0);
    assert_int_equal(look()->open_most, 1);
}

static void test_cancel_beside_another(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    configure(rig, "trainer.jobs=2", "cycle.retries=2");
    set_gather(CLAAS_MSG_CYCLE_STEP, 3);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    await_calls(CLAAS_MSG_CYCLE_STEP, 2);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    assert_non_null(strstr(cancel.reply, "\"cancelled\":true"));
    submit(rig, "me/c", "3"); /* in its place: the third who is gathered */
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_string_equal(look_for("job-1")->state, "cancelled");
    assert_int_equal(look()->versions[0], 0);
    assert_int_equal(look()->cycle_count, 3);
}

static void test_stop_and_start_with_several(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    await_calls(CLAAS_MSG_CYCLE_STEP, 3);
    claas_runtime_free(&rig->runtime);
    assert_int_equal(look()->ends, 3);
    assert_int_equal(look()->open_count, 0);
    for (int i = 0; i < 3; i++)
        assert_string_equal(look()->jobs[i].state, "queued");
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    rig_start(rig);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
}

/* --- a trainer in another process: its crash is known by its marker --- */

static char marker_path[96];

static void crash(void)
{
    FILE *file = fopen(marker_path, "w");

    assert_non_null(file);
    assert_true(fputs("signal 11\n", file) >= 0);
    assert_int_equal(fclose(file), 0);
}

/* As if it had been so many seconds later. */
static void crash_later(int seconds)
{
    struct timespec times[2];

    crash();
    clock_gettime(CLOCK_REALTIME, &times[0]);
    times[0].tv_sec += seconds;
    times[1] = times[0];
    assert_int_equal(utimensat(AT_FDCWD, marker_path, times, 0), 0);
}

static void crash_in_an_hour(void)
{
    crash_later(3600);
}

static void find_marker(const struct rig *rig)
{
    snprintf(marker_path, sizeof(marker_path), "%s/%s", rig->dir, CLAAS_CRASH_MARKER_TRAINER);
}

/* A job as an earlier life of the scheduler left it. */
static void add_job_that_ran(const char *lora_id, const char *state, int strikes)
{
    struct world_job *job = add_job(lora_id, "local");

    job->strikes = strikes;
    cJSON_Delete(add_event(job, state, NULL));
}

static void test_a_job_that_crashes_the_trainer(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    find_marker(rig);
    set_hook(CLAAS_MSG_CYCLE_STEP, crash);
    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_non_null(strstr(question.reply, "the trainer crashed while it worked (signal 11)"));
    assert_int_equal(look_for("job-1")->strikes, 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
}

/* An old marker says nothing about a trainer that goes away. */
static void test_a_trainer_that_is_killed(void **state)
{
    struct rig *rig = *state;
    struct timespec moment = {.tv_nsec = 20000000};

    find_marker(rig);
    crash();
    nanosleep(&moment, NULL); /* the granularity of a file's time */
    fail_next(CLAAS_MSG_CYCLE_STEP, 2, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
}

/* A marker from later than now, of a clock that was set back, says nothing either. */
static void test_a_marker_ahead_of_the_clock(void **state)
{
    struct rig *rig = *state;

    find_marker(rig);
    set_hook(CLAAS_MSG_CYCLE_STEP, crash_in_an_hour);
    fail_next(CLAAS_MSG_CYCLE_STEP, 2, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
}

/* The scheduler was in the process that crashed: a strike for each job that ran, none for one that
 * waited; and none is left beside another. */
static void test_a_crash_with_the_scheduler(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=1");
    find_marker(rig);
    add_job_that_ran("me/a", "training", 0);
    add_job_that_ran("me/b", "publishing", 0);
    add_job_that_ran("me/c", "queued", 0);
    crash();
    rig_start(rig);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look_for("job-1")->strikes, 1);
    assert_int_equal(look_for("job-2")->strikes, 1);
    assert_int_equal(look_for("job-3")->strikes, 0);
    assert_int_equal(look()->open_most, 1);
    assert_int_equal(access(marker_path, F_OK), -1);
}

/* Else it would crash one life after the other. */
static void test_a_job_that_crashes_the_scheduler_too(void **state)
{
    struct rig *rig = *state;
    struct question about = ask_about(CLAAS_MSG_JOB_WATCH, "job-1");

    find_marker(rig);
    add_job_that_ran("me/a", "training", 1);
    crash();
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_NO_SPACE,
              false); /* and nothing starts meanwhile */
    rig_start(rig);
    check_end("job-1", "failed");
    assert_int_equal(look_for("job-1")->strikes, 2);
    assert_int_equal(look()->cycle_count, 0);
    assert_int_equal(probe_call(rig->probe, &about), 0);
    assert_non_null(strstr(about.reply, "the trainer crashed while it worked (signal 11)"));
    submit(rig, "me/a", "next");
    check_end("job-2", "done");
    assert_int_equal(access(marker_path, F_OK), -1);
}

/* What ran after the crash, or before a crash that is still to come, was not in it. */
static void test_an_old_crash_at_the_start(void **state)
{
    struct rig *rig = *state;

    find_marker(rig);
    for (int i = 0; i < 2; i++) {
        char id[16];

        snprintf(id, sizeof(id), "job-%d", i + 1);
        crash_later(i == 0 ? -60 : 3600);
        add_job_that_ran("me/a", "training", 0);
        rig_start(rig);
        check_end(id, "done");
        assert_int_equal(look_for(id)->strikes, 0);
        assert_int_equal(count_state(look_for(id), "queued"), 2); /* before its cycle: at once */
        assert_int_equal(access(marker_path, F_OK), -1);
        claas_runtime_free(&rig->runtime);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_adapters_learn_together),
        TEST(test_one_adapter_one_cycle),
        TEST(test_the_trainer_says_how_many),
        TEST(test_a_strike_in_company),
        TEST(test_the_guilty_of_two),
        TEST(test_a_full_device),
        TEST(test_cancel_beside_another),
        TEST(test_stop_and_start_with_several),
        TEST(test_a_job_that_crashes_the_trainer),
        TEST(test_a_trainer_that_is_killed),
        TEST(test_a_marker_ahead_of_the_clock),
        TEST(test_a_crash_with_the_scheduler),
        TEST(test_a_job_that_crashes_the_scheduler_too),
        TEST(test_an_old_crash_at_the_start),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
