/* The order of a step's rows: adapters apart or together in a batch, groups, tails and budgets.
 * Adapters are only names here. */
#include "pack/segments.h"
#include "pack/step_plan.h"

#include "claas/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ROWS     6
#define PROMPT   5
#define RESPONSE 4

static const struct claas_model_config config = {.vocab = 100, .context = 64};
static char names[3]; /* adapters are addresses */

static claas_backend_adapter_t *adapter(int i)
{
    return (claas_backend_adapter_t *)(void *)&names[i];
}

struct request {
    int32_t tokens[ROWS][PROMPT + RESPONSE];
    struct claas_backend_row rows[ROWS];
    struct claas_backend_train train;
};

/* Rows of adapters 0, 1, 2, 0, 1, 2; those of adapter 1 share their prompt. */
static void make_request(struct request *r)
{
    *r = (struct request){0};
    for (int i = 0; i < ROWS; i++) {
        for (int t = 0; t < PROMPT + RESPONSE; t++)
            r->tokens[i][t] = i % 3 == 1 && t < PROMPT ? 40 + t : 10 * i + t;
        r->rows[i].student = adapter(i % 3);
        r->rows[i].row.student_prompt = r->rows[i].row.teacher_prompt = r->tokens[i];
        r->rows[i].row.student_count = r->rows[i].row.teacher_count = PROMPT;
        r->rows[i].row.response = r->tokens[i] + PROMPT;
        r->rows[i].row.response_count = RESPONSE;
    }
    r->train.rows = r->rows;
    r->train.row_count = ROWS;
    r->train.update = true;
}

static void make_plan(const struct request *r, int tokens, bool mixed, struct claas_plan *plan)
{
    const struct claas_plan_limits limits = {tokens, tokens, mixed, 0};

    assert_int_equal(claas_plan_new(&config, &r->train, &limits, plan), 0);
}

/* Groups cover the rows in order, and the tail is that of the scored rows. */
static void check_rows(const struct claas_plan_batch *batch)
{
    const struct claas_pack *pack = &batch->pack;
    int row = 0;

    for (int g = 0; g < pack->group_count; g++) {
        assert_int_equal(pack->groups[g].first, row);
        assert_true(pack->groups[g].count > 0);
        row += pack->groups[g].count;
    }
    assert_int_equal(row, pack->m);
    assert_true(pack->group_count <= pack->run_count);
    assert_ptr_equal(pack->tail, batch->tail);
    assert_int_equal(pack->tail_count, batch->tail_count);
    for (int i = 0; i < pack->tail_count; i++) {
        assert_true(pack->tail[i] >= 0 && pack->tail[i] < pack->m);
        assert_true(i == 0 || pack->tail[i] > pack->tail[i - 1]);
    }
    for (int i = 0; i < batch->scored_count; i++)
        assert_int_equal(batch->tail[batch->scored_tail[i]], batch->scored_row[i]);
}

/* Likewise, and no adapter has two groups. */
static void check_batch(const struct claas_plan_batch *batch)
{
    const struct claas_pack *pack = &batch->pack;

    check_rows(batch);
    for (int g = 0; g < pack->group_count; g++)
        for (int other = 0; other < g; other++)
            assert_ptr_not_equal(pack->groups[g].adapter, pack->groups[other].adapter);
}

static void adapters_stay_apart_unless_they_may_mix(void **state)
{
    struct request r;
    struct claas_plan apart, mixed;

    make_request(&r);
    make_plan(&r, 1000, false, &apart);
    make_plan(&r, 1000, true, &mixed);
    assert_int_equal(apart.student.batch_count, 3);
    assert_int_equal(apart.learner_count, 3);
    for (int i = 0; i < 3; i++) {
        check_batch(&apart.student.batches[i]);
        assert_int_equal(apart.student.batches[i].pack.group_count, 1);
        assert_ptr_equal(apart.student.batches[i].pack.groups[0].adapter, adapter(i));
    }
    assert_int_equal(mixed.student.batch_count, 1);
    check_batch(&mixed.student.batches[0]);
    assert_int_equal(mixed.student.batches[0].pack.group_count, 3);
    for (int i = 0; i < 3; i++) {
        const struct claas_pack_group *group = &mixed.student.batches[0].pack.groups[i];

        assert_ptr_equal(group->adapter, adapter(i));
        /* the last token of a response is not an input; adapter 1's prompt is there once */
        assert_int_equal(group->count, (i == 1 ? 1 : 2) * PROMPT + 2 * (RESPONSE - 1));
    }
    claas_plan_done(&apart);
    claas_plan_done(&mixed);
}

/* Positions and their weights are the same however the batches are cut. */
static void batches_do_not_change_the_positions(void **state)
{
    struct request r;
    struct claas_plan apart, mixed;

    make_request(&r);
    make_plan(&r, 1000, false, &apart);
    make_plan(&r, 20, true, &mixed);
    assert_true(mixed.student.batch_count > 1);
    assert_int_equal(mixed.position_count, ROWS * RESPONSE);
    assert_int_equal(apart.position_count, mixed.position_count);
    for (int i = 0; i < mixed.position_count; i++) {
        assert_int_equal(mixed.positions[i].row, apart.positions[i].row);
        assert_int_equal(mixed.positions[i].learner, apart.positions[i].learner);
        assert_int_equal(mixed.positions[i].token, apart.positions[i].token);
        assert_true(mixed.positions[i].weight == apart.positions[i].weight);
    }
    for (int i = 0; i < mixed.student.batch_count; i++) {
        check_batch(&mixed.student.batches[i]);
        assert_true(mixed.student.batches[i].pack.m <= 20);
    }
    claas_plan_done(&apart);
    claas_plan_done(&mixed);
}

/* Rows, runs and tail of `part` lie in the joint batch from row, run and tail row `at` on. */
static void check_part(const struct claas_plan_batch *joint, const struct claas_plan_batch *part,
                       const int at[3])
{
    const struct claas_pack *whole = &joint->pack, *pack = &part->pack;

    assert_memory_equal(whole->tokens + at[0], pack->tokens, (size_t)pack->m * sizeof(int32_t));
    assert_memory_equal(whole->pos + at[0], pack->pos, (size_t)pack->m * sizeof(int32_t));
    for (int i = 0; i < pack->run_count; i++) {
        const struct claas_pack_run *run = &whole->runs[at[1] + i];

        assert_int_equal(run->first, at[0] + pack->runs[i].first);
        assert_int_equal(run->count, pack->runs[i].count);
        assert_int_equal(run->pos, pack->runs[i].pos);
        assert_int_equal(run->parent, pack->runs[i].parent < 0 ? -1 : at[1] + pack->runs[i].parent);
    }
    for (int i = 0; i < part->tail_count; i++)
        assert_int_equal(joint->tail[at[2] + i], at[0] + part->tail[i]);
}

/* The student's rows come first, as in their own batch, and share no prompt with the teacher's,
 * which here are the same. */
static void student_and_teacher_lie_side_by_side(void **state)
{
    struct request r;
    struct claas_plan plan;
    struct claas_plan_limits limits = {1000, 1000, true, 1000};
    const struct claas_plan_batch *student, *teacher, *joint;
    int both;

    make_request(&r);
    for (int i = 0; i < ROWS; i++)
        r.rows[i].teacher = i % 3 ? adapter(2) : NULL;
    assert_int_equal(claas_plan_new(&config, &r.train, &limits, &plan), 0);
    assert_int_equal(plan.joint.batch_count, 1);
    student = plan.student.batches;
    teacher = plan.teacher.batches;
    joint = plan.joint.batches;
    check_rows(joint);
    both = student->pack.m + teacher->pack.m;
    assert_int_equal(joint->pack.m, both);
    assert_int_equal(joint->pack.run_count, student->pack.run_count + teacher->pack.run_count);
    assert_int_equal(joint->tail_count, student->tail_count + teacher->tail_count);
    check_part(joint, student, (const int[3]){0, 0, 0});
    check_part(joint, teacher,
               (const int[3]){student->pack.m, student->pack.run_count, student->tail_count});
    claas_plan_part(&plan);
    assert_int_equal(plan.joint.batch_count, 0);
    claas_plan_done(&plan);
    for (int less = 0; less < 2; less++) {
        limits.joint_tokens = both - less;
        assert_int_equal(claas_plan_new(&config, &r.train, &limits, &plan), 0);
        assert_int_equal(plan.joint.batch_count, !less);
        claas_plan_done(&plan);
    }
}

/* One adapter that is its own teacher has one group; several batches, and rows that are only
 * measured, stay apart. */
static void a_joint_batch_is_one_of_two(void **state)
{
    struct request r;
    struct claas_plan plan;
    struct claas_plan_limits limits = {1000, 1000, true, 1000};

    make_request(&r);
    for (int i = 0; i < ROWS; i++)
        r.rows[i].student = r.rows[i].teacher = adapter(0);
    assert_int_equal(claas_plan_new(&config, &r.train, &limits, &plan), 0);
    assert_int_equal(plan.joint.batch_count, 1);
    check_batch(plan.joint.batches);
    assert_int_equal(plan.joint.batches[0].pack.group_count, 1);
    claas_plan_done(&plan);
    limits.train_tokens = 20;
    assert_int_equal(claas_plan_new(&config, &r.train, &limits, &plan), 0);
    assert_int_equal(plan.joint.batch_count, 0);
    claas_plan_done(&plan);
    limits.train_tokens = 1000;
    r.train.update = false;
    assert_int_equal(claas_plan_new(&config, &r.train, &limits, &plan), 0);
    assert_int_equal(plan.joint.batch_count, 0);
    claas_plan_done(&plan);
}

static void segments_name_their_tail(void **state)
{
    static const int32_t tokens[] = {1, 2, 3, 4}, block[] = {0};
    const struct claas_pack_limits limits = {
        .context = 64, .vocab = 100, .kv_blocks = 1, .max_tokens = 8};
    const struct claas_segment segments[] = {
        {.tokens = tokens, .count = 3, .blocks = block, .adapter = adapter(0), .wanted = 1},
        {.tokens = tokens, .count = 4, .blocks = block, .adapter = adapter(1), .wanted = 2},
    };
    struct claas_pack_group groups[8];
    struct claas_pack_run runs[8];
    int32_t rows[3][8], tail[8], tail_count = 0;
    struct claas_pack pack = {
        .tokens = rows[0], .pos = rows[1], .blocks = rows[2], .groups = groups, .runs = runs};

    assert_int_equal(claas_pack_segments(&limits, segments, 2, &pack, tail, &tail_count), 0);
    assert_int_equal(pack.m, 7);
    assert_int_equal(pack.group_count, 2);
    assert_ptr_equal(pack.tail, tail);
    assert_int_equal(pack.tail_count, 3);
    assert_int_equal(tail[0], 2);
    assert_int_equal(tail[1], 5);
    assert_int_equal(tail[2], 6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(adapters_stay_apart_unless_they_may_mix),
        cmocka_unit_test(batches_do_not_change_the_positions),
        cmocka_unit_test(student_and_teacher_lie_side_by_side),
        cmocka_unit_test(a_joint_batch_is_one_of_two),
        cmocka_unit_test(segments_name_their_tail),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
