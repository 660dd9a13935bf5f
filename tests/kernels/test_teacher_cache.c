/* The teacher's rows of evaluations, on the fake back-ends: which requests are given the rows of
 * another, and which are not; what goes when there are too many; that nothing stays of a request
 * that ended badly. The bits are test_step's and test_device's business. */
#include "engine_fixture.h"

#include <stdio.h>
#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"

#define ROWS   3
#define LENGTH 6

/* Texts of an evaluation that a test may change. */
struct asked {
    int32_t student[ROWS][LENGTH], teacher[ROWS][LENGTH], response[ROWS][LENGTH];
    uint8_t mask[ROWS][LENGTH];
    struct claas_train_row rows[ROWS];
    bool update;
};

/* The first row has no teacher, as the gate's sentences. */
static void fill(struct asked *asked, int variant, claas_adapter_t *student)
{
    memset(asked, 0, sizeof(*asked));
    for (int i = 0; i < ROWS; i++) {
        for (int t = 0; t < LENGTH; t++) {
            asked->student[i][t] = 10 * i + t;
            asked->teacher[i][t] = 100 + 10 * i + t;
            asked->response[i][t] = 200 + 10 * i + t;
            asked->mask[i][t] = 1;
        }
        asked->rows[i] = (struct claas_train_row){
            .student_prompt = asked->student[i],
            .student_count = 4,
            .teacher_prompt = asked->teacher[i],
            .teacher_count = i == 0 ? 0 : 5,
            .response = asked->response[i],
            .response_count = LENGTH - 1,
            .student = student,
        };
    }
    asked->teacher[ROWS - 1][0] = variant;
}

static uint64_t submit(struct rig *rig, const struct asked *asked)
{
    struct claas_train_request request = {
        .rows = asked->rows,
        .row_count = ROWS,
        .adamw = {.rate = 1e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1},
        .update = asked->update,
    };
    uint64_t id;

    assert_int_equal(claas_device_train(rig->client, &request, &id), 0);
    return id;
}

enum teacher { ALONE, LEFT, TAKEN };

/* What the back-end did for the teacher: nothing was kept, its rows were left, or they were given.
 */
static enum teacher run(struct rig *rig, const struct asked *asked)
{
    int left = fake.teachers_left, taken = fake.teachers_taken;
    uint64_t id = submit(rig, asked);
    struct claas_device_event event = wait_for(rig, CLAAS_EVENT_TRAINED, id);

    claas_device_event_done(&event);
    return fake.teachers_left > left ? LEFT : fake.teachers_taken > taken ? TAKEN : ALONE;
}

static enum teacher run_variant(struct rig *rig, int variant)
{
    struct asked asked;

    fill(&asked, variant, NULL);
    return run(rig, &asked);
}

static struct claas_device_stats stats_of(const struct rig *rig)
{
    struct claas_device_stats stats;

    claas_device_stats(rig->device, &stats);
    return stats;
}

/* --- which requests are equal --- */

/* The same texts from other memory, under a student that learnt meanwhile or is another: the rows
 * of the first. A mask of ones is none. */
static void test_same_teacher(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapters[2] = {adapter_new(&rig, 1), adapter_new(&rig, 2)};
    struct asked *asked = CLAAS_NEW_ARRAY(struct asked, 5);
    uint64_t id;

    fill(&asked[0], 0, adapters[0]);
    fill(&asked[1], 0, adapters[0]);
    fill(&asked[2], 0, adapters[1]);
    fill(&asked[3], 0, NULL);
    fill(&asked[4], 0, adapters[0]);
    asked[4].rows[1].mask = asked[4].mask[1];
    assert_int_equal(run(&rig, &asked[0]), LEFT);
    assert_int_equal(run(&rig, &asked[1]), TAKEN);
    assert_int_equal(train_submit(&rig, adapters[0], true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    for (int i = 1; i < 5; i++)
        assert_int_equal(run(&rig, &asked[i]), TAKEN);
    assert_int_equal(stats_of(&rig).teacher_found, 5);
    assert_int_equal(stats_of(&rig).teacher_missed, 1);
    assert_true(stats_of(&rig).teacher_bytes > fake.teacher_bytes);
    for (int i = 0; i < 2; i++)
        claas_adapter_unref(&adapters[i]);
    free(asked);
    rig_close(&rig);
}

static void swap_rows(struct asked *asked)
{
    struct claas_train_row row = asked->rows[1];

    asked->rows[1] = asked->rows[2];
    asked->rows[2] = row;
}

/* Everything by which a teacher's rows, or their numbers, could be others. */
static void change(struct asked *asked, int what, claas_adapter_t *other)
{
    switch (what) {
    case 0:
        asked->teacher[1][4]++;
        break;
    case 1:
        asked->rows[2].teacher_count--;
        break;
    case 2:
        asked->response[1][4]++;
        break;
    case 3:
        asked->rows[2].response_count++;
        break;
    case 4:
        asked->rows[1].mask = asked->mask[1];
        asked->mask[1][3] = 0;
        break;
    case 5:
        asked->rows[0].mask = asked->mask[0]; /* of a row without a teacher */
        asked->mask[0][0] = 0;
        break;
    case 6:
        swap_rows(asked);
        break;
    case 7:
        asked->rows[1].teacher_count = 0;
        break;
    case 8:
        asked->rows[0].teacher_count = 5;
        break;
    case 9:
        asked->student[2][0]++; /* whom it is a neighbour of decides its positions' numbers */
        break;
    case 10:
        asked->rows[1].student = other; /* likewise */
        break;
    default:
        /* the same tokens, divided into prompt and response elsewhere */
        memmove(asked->response[1] + 1, asked->response[1], (LENGTH - 1) * sizeof(int32_t));
        asked->response[1][0] = asked->teacher[1][4];
        asked->rows[1].response_count++;
        asked->rows[1].teacher_count--;
        break;
    }
}

static void test_other_teacher(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct asked *asked = CLAAS_NEW(struct asked);

    assert_int_equal(run_variant(&rig, 0), LEFT);
    for (int what = 0; what < 12; what++) {
        fill(asked, 0, NULL);
        change(asked, what, adapter);
        if (run(&rig, asked) != LEFT)
            fail_msg("change %d is not seen", what);
        assert_int_equal(run(&rig, asked), TAKEN);
    }
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    claas_adapter_unref(&adapter);
    free(asked);
    rig_close(&rig);
}

/* A teacher that may change, an update, and no teacher at all. */
static void test_nothing_to_keep(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct asked *asked = CLAAS_NEW(struct asked);

    fill(asked, 0, adapter);
    assert_int_equal(run(&rig, asked), LEFT);
    for (int i = 0; i < 2; i++) {
        fill(asked, 0, adapter);
        asked->rows[1].teacher = adapter;
        assert_int_equal(run(&rig, asked), ALONE);
        fill(asked, 0, adapter);
        asked->rows[0].teacher_count = 5;
        asked->update = true;
        assert_int_equal(run(&rig, asked), ALONE);
        fill(asked, 0, adapter);
        for (int row = 0; row < ROWS; row++)
            asked->rows[row].teacher_count = 0;
        assert_int_equal(run(&rig, asked), ALONE);
    }
    assert_int_equal(stats_of(&rig).teacher_found, 0);
    assert_int_equal(stats_of(&rig).teacher_missed, 1);
    claas_adapter_unref(&adapter);
    free(asked);
    rig_close(&rig);
}

/* --- bounds --- */

static void test_too_many(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory, (struct claas_device_options){0});

    for (int i = 0; i < CLAAS_TEACHER_ENTRIES; i++)
        assert_int_equal(run_variant(&rig, i), LEFT);
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    assert_int_equal(run_variant(&rig, CLAAS_TEACHER_ENTRIES), LEFT);
    assert_int_equal(atomic_load(&fake.host_blocks), CLAAS_TEACHER_ENTRIES);
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    for (int i = 2; i <= CLAAS_TEACHER_ENTRIES; i++)
        assert_int_equal(run_variant(&rig, i), TAKEN);
    assert_int_equal(run_variant(&rig, 1), LEFT); /* the least recently used one had gone */
    rig_close(&rig);
}

/* As many cycles as the device takes at the same time, each with rows of its own: all find theirs
 * when their turn comes again. */
static void test_turns(void **state)
{
    const size_t limit = (size_t)64 << 20;
    struct claas_backend_ops many = fake_backend_with_memory;
    struct rig rig;

    many.cycles = 0;
    assert_true(claas_teacher_cache_limit(&many) == limit);
    many.cycles = 8;
    assert_true(claas_teacher_cache_limit(&many) == 2 * limit);
    rig = rig_open_on(&many, (struct claas_device_options){0});
    fake.teacher_bytes = limit / 5; /* 13 MB: a model 8,192 wide */
    for (int i = 0; i < 3 * many.cycles; i++)
        assert_int_equal(run_variant(&rig, i % many.cycles), i < many.cycles ? LEFT : TAKEN);
    rig_close(&rig);
}

static void test_too_large(void **state)
{
    const size_t limit = claas_teacher_cache_limit(&fake_backend_with_memory);
    struct rig rig = rig_open_on(&fake_backend_with_memory, (struct claas_device_options){0});

    fake.teacher_bytes = limit / 3 - 1000;
    for (int i = 0; i < 3; i++)
        assert_int_equal(run_variant(&rig, i), LEFT);
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    assert_int_equal(run_variant(&rig, 3), LEFT);
    assert_int_equal(atomic_load(&fake.host_blocks), 3);
    assert_in_range(stats_of(&rig).teacher_bytes, 3 * fake.teacher_bytes, limit);
    assert_int_equal(run_variant(&rig, 2), TAKEN);
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    assert_int_equal(run_variant(&rig, 1), LEFT);
    fake.teacher_bytes = limit; /* the tokens come on top: more than all may have */
    assert_int_equal(run_variant(&rig, 4), ALONE);
    assert_int_equal(atomic_load(&fake.host_blocks), 3);
    fake.teacher_bytes = limit - 1000; /* all others go for it */
    assert_int_equal(run_variant(&rig, 5), LEFT);
    assert_int_equal(atomic_load(&fake.host_blocks), 1);
    assert_int_equal(run_variant(&rig, 5), TAKEN);
    rig_close(&rig);
}

/* No memory for the rows fails no evaluation. */
static void test_no_memory(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory, (struct claas_device_options){0});

    fake.fail_host_new = true;
    for (int i = 0; i < 2; i++)
        assert_int_equal(run_variant(&rig, 0), ALONE);
    fake.fail_host_new = false;
    assert_int_equal(run_variant(&rig, 0), LEFT);
    assert_int_equal(run_variant(&rig, 0), TAKEN);
    assert_int_equal(stats_of(&rig).teacher_missed, 3);
    rig_close(&rig);
}

/* --- bad ends --- */

static void cancel(struct rig *rig, const struct asked *asked)
{
    uint64_t id;

    pthread_mutex_lock(&fake.lock);
    fake.train_operations = INT32_MAX;
    fake.operations_done = 0;
    pthread_mutex_unlock(&fake.lock);
    id = submit(rig, asked);
    pthread_mutex_lock(&fake.lock);
    while (fake.operations_done == 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    fake.train_operations = 3;
    pthread_mutex_unlock(&fake.lock);
    claas_device_cancel(rig->client, id);
    assert_int_equal(wait_for(rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_CANCELLED);
}

static void break_down(struct rig *rig, const struct asked *asked)
{
    uint64_t id;

    fake.fail_trains = 1;
    id = submit(rig, asked);
    assert_int_equal(wait_for(rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_DEVICE);
}

static void be_not_finite(struct rig *rig, const struct asked *asked)
{
    fake.report_nonfinite = true;
    (void)run(rig, asked);
    fake.report_nonfinite = false;
}

/* What it had left is not there for the next one; what was there before still is. */
static void test_bad_ends(void **state)
{
    static void (*const ends[])(struct rig *, const struct asked *) = {cancel, break_down,
                                                                       be_not_finite};
    struct rig rig = rig_open_on(&fake_backend_with_memory, (struct claas_device_options){0});
    struct asked *asked = CLAAS_NEW(struct asked);

    for (size_t i = 0; i < CLAAS_COUNT(ends); i++) {
        fill(asked, (int)i, NULL);
        ends[i](&rig, asked);
        assert_int_equal(atomic_load(&fake.host_blocks), i);
        assert_int_equal(run(&rig, asked), LEFT);
        ends[i](&rig, asked);
        assert_int_equal(run(&rig, asked), TAKEN);
    }
    assert_int_equal(stats_of(&rig).teacher_found, CLAAS_COUNT(ends));
    assert_int_equal(stats_of(&rig).teacher_missed, CLAAS_COUNT(ends));
    free(asked);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_teacher),    cmocka_unit_test(test_other_teacher),
        cmocka_unit_test(test_nothing_to_keep), cmocka_unit_test(test_too_many),
        cmocka_unit_test(test_turns),           cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_too_large),       cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_bad_ends),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
