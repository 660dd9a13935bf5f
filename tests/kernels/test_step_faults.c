/* What a step does when it may not go through: bad requests, a callback that gives up at any
 * moment, numbers that are not finite. Each time the adapter is bit for bit what it was. And what
 * runs between its operations does not disturb it. */
#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define TOKENS 64

static const struct claas_lora_config lora = {.rank = 4, .alpha = 8, .modules = CLAAS_MODULE_ALL};

struct faults {
    struct step_fixture f;
    claas_backend_adapter_t *adapter;
    struct claas_adapter_image before;
    int32_t tokens[TOKENS], other[TOKENS];
    struct claas_backend_row rows[2];
    struct claas_backend_train request;
};

static void open_faults(struct faults *x, const char *precision)
{
    *x = (struct faults){0};
    step_open(&x->f, "random:tiny-llama", precision, 2, NULL);
    x->before = step_image(&x->f, &lora, 3, 0.1f);
    x->adapter = step_adapter(&x->f, &x->before, CLAAS_ADAPTER_TRAIN);
    claas_adapter_image_done(&x->before);
    x->before = step_download(&x->f, x->adapter);
    step_random_tokens(&x->f, 1, TOKENS, x->tokens);
    step_random_tokens(&x->f, 2, TOKENS, x->other);
    for (int i = 0; i < 2; i++) {
        x->rows[i].student = x->adapter;
        x->rows[i].row = (struct claas_train_row){
            .student_prompt = x->tokens,
            .student_count = 20,
            .teacher_prompt = x->other,
            .teacher_count = 30,
            .response = x->tokens + 20 + i,
            .response_count = 12,
        };
    }
    x->request = (struct claas_backend_train){
        .rows = x->rows,
        .row_count = 2,
        .loss = {.variant = CLAAS_LOSS_FULL, .kl_weight = 0.1f},
        .adamw = step_adamw(1e-3f),
        .update = true,
    };
}

static void close_faults(struct faults *x)
{
    claas_adapter_image_done(&x->before);
    x->f.ops->adapter_free(x->f.backend, &x->adapter);
    step_close(&x->f);
}

static void expect_unchanged(const struct faults *x)
{
    struct claas_adapter_image now = step_download(&x->f, x->adapter);

    assert_true(step_same_image(&x->f, &now, &x->before));
    claas_adapter_image_done(&now);
}

static void expect_refused(struct faults *x, int code, const char *text)
{
    struct claas_train_result result = {0};

    assert_int_equal(x->f.ops->train(x->f.backend, &x->request, &result), code);
    if (!strstr(claas_error_text(), text))
        fail_msg("'%s' does not say '%s'", claas_error_text(), text);
    assert_null(result.rows);
    expect_unchanged(x);
}

static void bad_rows_are_refused(void **state)
{
    struct faults x;
    struct claas_train_row good;
    claas_backend_adapter_t *served;
    int32_t bad[2] = {3, 512};

    open_faults(&x, "f32");
    good = x.rows[1].row;
    served = step_adapter(&x.f, &x.before, CLAAS_ADAPTER_SERVE);
    x.rows[1].row.student_count = 0;
    expect_refused(&x, CLAAS_ERR_INVALID, "row 1 has no prompt");
    x.rows[1].row = good;
    x.rows[1].row.response_count = 0;
    expect_refused(&x, CLAAS_ERR_INVALID, "row 1 has no response");
    x.rows[1].row = good;
    x.rows[1].row.teacher_prompt = NULL;
    expect_refused(&x, CLAAS_ERR_INVALID, "teacher prompt");
    x.rows[1].row = good;
    x.rows[1].row.student_count = 2040;
    expect_refused(&x, CLAAS_ERR_LIMIT, "2040");
    x.rows[1].row = good;
    x.rows[1].row.teacher_count = SIZE_MAX;
    expect_refused(&x, CLAAS_ERR_LIMIT, "context");
    x.rows[1].row = good;
    x.rows[1].row.response = bad;
    x.rows[1].row.response_count = 2;
    expect_refused(&x, CLAAS_ERR_INVALID, "token 512");
    bad[1] = -1;
    expect_refused(&x, CLAAS_ERR_INVALID, "token -1");
    x.rows[1].row = good;
    x.rows[1].student = NULL;
    expect_refused(&x, CLAAS_ERR_INVALID, "adapter");
    x.rows[1].student = served;
    expect_refused(&x, CLAAS_ERR_INVALID, "adapter");
    x.rows[1].student = x.adapter;
    x.request.loss.alpha = 2;
    expect_refused(&x, CLAAS_ERR_INVALID, "loss");
    x.f.ops->adapter_free(x.f.backend, &served);
    close_faults(&x);
}

static void nothing_to_train_changes_nothing(void **state)
{
    struct faults x;
    uint8_t none[12] = {0};
    struct claas_train_result result = {0};

    open_faults(&x, "f32");
    x.rows[0].row.mask = x.rows[1].row.mask = none;
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
    assert_int_equal(result.tokens, 0);
    assert_int_equal(result.rows[0].tokens, 0);
    assert_true(result.finite);
    expect_unchanged(&x);
    free(result.rows);
    result = (struct claas_train_result){0};
    x.request.row_count = 0;
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
    assert_int_equal(result.row_count, 0);
    free(result.rows);
    close_faults(&x);
}

/* --- callbacks --- */

struct countdown {
    int left, calls;
};

static int count_down(void *arg)
{
    struct countdown *c = arg;

    c->calls++;
    return c->left-- == 0;
}

static void giving_up_at_any_moment_changes_nothing(void **state)
{
    struct faults x;
    struct countdown all = {.left = -1};
    struct claas_train_result result = {0};

    open_faults(&x, "bf16");
    x.request.yield = count_down;
    x.request.yield_arg = &all;
    x.request.update = false;
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
    free(result.rows);
    x.request.update = true;
    for (int i = 0;; i++) {
        struct countdown c = {.left = i};
        int code;

        x.request.yield_arg = &c;
        result = (struct claas_train_result){0};
        code = x.f.ops->train(x.f.backend, &x.request, &result);
        if (code == 0) {
            assert_true(i > all.calls); /* more calls with a backward pass */
            free(result.rows);
            break;
        }
        assert_int_equal(code, CLAAS_ERR_CANCELLED);
        assert_int_equal(c.calls, i + 1);
        expect_unchanged(&x);
    }
    close_faults(&x);
}

struct visitor {
    const struct faults *x;
    float expected[TOKENS];
    int calls;
};

/* Chat with the adapter that is being trained, in the middle of the step. */
static int chat_between(void *arg)
{
    struct visitor *visitor = arg;
    float scores[TOKENS];

    visitor->calls++;
    step_score(&visitor->x->f, visitor->x->adapter, visitor->x->other, TOKENS, 9, 7, scores);
    assert_memory_equal(scores, visitor->expected, (TOKENS - 1) * sizeof(float));
    return 0;
}

static void chat_runs_between_the_operations_of_a_step(void **state)
{
    struct claas_adapter_image alone = {0}, visited;
    struct claas_train_result result = {0};

    for (int round = 0; round < 2; round++) {
        struct faults x;
        struct visitor visitor = {0};

        open_faults(&x, "bf16");
        visitor.x = &x;
        if (round == 1) {
            step_score(&x.f, x.adapter, x.other, TOKENS, 1, 0, visitor.expected);
            x.request.yield = chat_between;
            x.request.yield_arg = &visitor;
        }
        CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
        free(result.rows);
        assert_true(round == 0 || visitor.calls > 20);
        if (round == 0)
            alone = step_download(&x.f, x.adapter);
        if (round == 1) {
            visited = step_download(&x.f, x.adapter);
            assert_true(step_same_image(&x.f, &alone, &visited));
            assert_false(step_same_image(&x.f, &alone, &x.before));
            claas_adapter_image_done(&visited);
        }
        close_faults(&x);
    }
    claas_adapter_image_done(&alone);
}

/* --- numbers --- */

static void a_step_that_is_not_finite_changes_nothing(void **state)
{
    static const char *const precisions[] = {"f32", "bf16"};
    static const float bad[] = {NAN, INFINITY};

    for (size_t p = 0; p < CLAAS_COUNT(precisions); p++)
        for (size_t i = 0; i < CLAAS_COUNT(bad); i++) {
            struct faults x;
            struct claas_train_result result = {0};
            float scores[TOKENS];
            size_t at;
            int32_t block = 0;
            struct claas_sample sample = {.given = -1};
            struct claas_segment segment;

            open_faults(&x, precisions[p]);
            at = claas_lora_offset(x.f.config, &lora, 1, CLAAS_MODULE_DOWN, 1);
            x.before.parameters[at] = bad[i];
            x.before.step = 5;
            CHECK(x.f.ops->adapter_upload(x.f.backend, x.adapter, &x.before));
            CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
            assert_false(result.finite);
            assert_int_equal(result.step, 5);
            free(result.rows);
            expect_unchanged(&x);
            /* chatting with it gives no token, and the device goes on */
            segment = (struct claas_segment){.tokens = x.tokens,
                                             .count = 8,
                                             .blocks = &block,
                                             .adapter = x.adapter,
                                             .wanted = 1};
            CHECK(x.f.ops->forward(x.f.backend, &segment, 1, &sample));
            assert_int_equal(sample.token, -1);
            step_score(&x.f, NULL, x.tokens, TOKENS, 16, 0, scores);
            assert_true(isfinite(scores[TOKENS - 2]));
            close_faults(&x);
        }
}

/* What a broken adapter left in the workspaces and in key/value blocks does not reach the next
 * user. */
static void a_broken_step_leaves_no_traces(void **state)
{
    static const char *const precisions[] = {"f32", "bf16"};

    for (size_t p = 0; p < CLAAS_COUNT(precisions); p++) {
        struct claas_adapter_image fresh = {0}, after = {0};
        float expected[TOKENS], scores[TOKENS];

        for (int broken = 0; broken < 2; broken++) {
            struct faults x;
            struct claas_train_result result = {0};
            size_t at;

            open_faults(&x, precisions[p]);
            at = claas_lora_offset(x.f.config, &lora, 0, CLAAS_MODULE_K, 1);
            if (broken) {
                float good = x.before.parameters[at];

                x.before.parameters[at] = NAN;
                CHECK(x.f.ops->adapter_upload(x.f.backend, x.adapter, &x.before));
                step_score(&x.f, x.adapter, x.other, TOKENS, 16, 0, scores);
                CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
                assert_false(result.finite);
                free(result.rows);
                x.before.parameters[at] = good;
                CHECK(x.f.ops->adapter_upload(x.f.backend, x.adapter, &x.before));
            }
            step_score(&x.f, NULL, x.tokens, TOKENS, 7, 0, broken ? scores : expected);
            CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
            assert_true(result.finite);
            free(result.rows);
            *(broken ? &after : &fresh) = step_download(&x.f, x.adapter);
            if (broken) {
                assert_true(step_same_image(&x.f, &fresh, &after));
                assert_memory_equal(scores, expected, (TOKENS - 1) * sizeof(float));
            }
            close_faults(&x);
        }
        claas_adapter_image_done(&fresh);
        claas_adapter_image_done(&after);
    }
}

static void evaluation_needs_no_adapter_and_no_teacher(void **state)
{
    struct faults x;
    struct claas_train_result result = {0};
    float scores[TOKENS];
    double sum = 0;

    open_faults(&x, "f32");
    x.request.update = false;
    for (int i = 0; i < 2; i++) {
        x.rows[i].student = NULL;
        x.rows[i].row.teacher_prompt = NULL;
        x.rows[i].row.teacher_count = 0;
    }
    step_score(&x.f, NULL, x.tokens, 32, 32, 0, scores);
    for (int t = 19; t < 31; t++)
        sum += scores[t];
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
    assert_true(result.rows[0].logprob == (float)(sum / 12));
    assert_true(isnan(result.rows[0].divergence));
    assert_true(fabsf(result.rows[0].forward_kl) <= 1e-6f);
    assert_true(fabsf(result.rows[0].kl_base) <= 1e-6f);
    assert_true(result.rows[0].entropy > 0);
    assert_int_equal(result.tokens, 24);
    free(result.rows);
    close_faults(&x);
}

/* --- the forward pass and the rest --- */

static void bad_segments_are_refused(void **state)
{
    struct faults x;
    int32_t blocks[16] = {0}, far[1] = {256}, bad[1] = {512};
    struct claas_sample samples[2] = {{.given = -1}, {.given = -1}};
    struct claas_segment good, segments[8];

    open_faults(&x, "f32");
    good = (struct claas_segment){.tokens = x.tokens, .count = 40, .blocks = blocks, .wanted = 1};
    segments[0] = good;
    segments[0].pos = 2048 - 39;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 1, samples), CLAAS_ERR_LIMIT);
    segments[0] = good;
    segments[0].count = 0;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 1, samples), CLAAS_ERR_LIMIT);
    segments[0] = good;
    segments[0].wanted = 41;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 1, samples), CLAAS_ERR_INVALID);
    segments[0] = good;
    segments[0].tokens = bad;
    segments[0].count = 1;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 1, samples), CLAAS_ERR_INVALID);
    segments[0].tokens = x.tokens;
    segments[0].blocks = far;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 1, samples), CLAAS_ERR_INVALID);
    for (int i = 0; i < 8; i++)
        segments[i] = good;
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 8, samples), CLAAS_ERR_LIMIT);
    assert_int_equal(x.f.ops->forward(x.f.backend, segments, 0, samples), 0);
    CHECK(x.f.ops->forward(x.f.backend, segments, 1, samples));
    close_faults(&x);
}

static void memory_is_counted_and_given_back(void **state)
{
    struct faults x;
    struct claas_backend_memory before, during, after;
    claas_backend_adapter_t *adapter = NULL;
    struct claas_train_result result = {0};

    open_faults(&x, "bf16");
    x.f.ops->memory(x.f.backend, &before);
    assert_true(before.weights > 0 && before.kv > 0 && before.workspace > 0);
    CHECK(x.f.ops->adapter_new(x.f.backend, &lora, CLAAS_ADAPTER_TRAIN, &adapter));
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result));
    free(result.rows);
    x.f.ops->memory(x.f.backend, &during);
    assert_true(during.adapters > before.adapters && during.workspace > before.workspace);
    assert_true(during.peak >= during.weights + during.kv + during.adapters + during.workspace);
    x.f.ops->adapter_free(x.f.backend, &adapter);
    assert_null(adapter);
    x.f.ops->adapter_free(x.f.backend, &adapter);
    x.f.ops->memory(x.f.backend, &after);
    assert_int_equal(after.adapters, before.adapters);
    CHECK(x.f.ops->train(x.f.backend, &x.request, &result)); /* the workspace is used again */
    free(result.rows);
    x.f.ops->memory(x.f.backend, &after);
    assert_int_equal(after.workspace, during.workspace);
    close_faults(&x);
}

static void bad_options_are_refused(void **state)
{
    struct faults x;
    struct claas_backend_options options = {
        .precision = "int3", .threads = 1, .kv_blocks = 8, .max_tokens = 8};
    struct claas_lora_config bad = {.rank = 0, .alpha = 1, .modules = 1};
    claas_backend_t *backend = NULL;
    claas_backend_adapter_t *adapter = NULL;

    open_faults(&x, "f32");
    assert_int_equal(x.f.ops->open(&options, x.f.model, &backend), CLAAS_ERR_INVALID);
    options.precision = "f32";
    options.kv_blocks = 0;
    assert_int_equal(x.f.ops->open(&options, x.f.model, &backend), CLAAS_ERR_INVALID);
    assert_null(backend);
    assert_int_equal(x.f.ops->adapter_new(x.f.backend, &bad, CLAAS_ADAPTER_TRAIN, &adapter),
                     CLAAS_ERR_INVALID);
    bad = (struct claas_lora_config){.rank = 4, .modules = 0x80};
    assert_int_equal(x.f.ops->adapter_new(x.f.backend, &bad, CLAAS_ADAPTER_TRAIN, &adapter),
                     CLAAS_ERR_INVALID);
    assert_null(adapter);
    close_faults(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_rows_are_refused),
        cmocka_unit_test(nothing_to_train_changes_nothing),
        cmocka_unit_test(giving_up_at_any_moment_changes_nothing),
        cmocka_unit_test(chat_runs_between_the_operations_of_a_step),
        cmocka_unit_test(a_step_that_is_not_finite_changes_nothing),
        cmocka_unit_test(a_broken_step_leaves_no_traces),
        cmocka_unit_test(evaluation_needs_no_adapter_and_no_teacher),
        cmocka_unit_test(bad_segments_are_refused),
        cmocka_unit_test(memory_is_counted_and_given_back),
        cmocka_unit_test(bad_options_are_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
