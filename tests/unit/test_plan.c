/* The scheduler's pure parts: recipes, the plan of a cycle, the contract's bounds, the gate's
 * judgement. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
#include <math.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "judge.h"
#include "plan.h"

static claas_config_t *config_with(const char *const *overrides, size_t count)
{
    claas_config_t *config = NULL;

    assert_int_equal(claas_config_load(NULL, overrides, count, &config), 0);
    return config;
}

static cJSON *parse(const char *text)
{
    cJSON *json = NULL;

    assert_int_equal(claas_json_parse(text, strlen(text), 1 << 20, &json), 0);
    return json;
}

struct counts {
    int feedback, replay, other, recorded, from_teacher;
    int forms[2]; /* brief, hindsight */
    int teacher_forms[2];
};

static struct counts count_rows(const cJSON *rows)
{
    struct counts counts = {0};
    const cJSON *row;

    cJSON_ArrayForEach(row, rows)
    {
        const char *source = "", *form = "";
        bool from_teacher = false;
        int hindsight;

        claas_json_get_string(row, "source", &source);
        claas_json_get_string(row, "form", &form);
        claas_json_get_bool(row, "from_teacher", &from_teacher);
        hindsight = strcmp(form, "hindsight") == 0;
        counts.feedback += strcmp(source, "feedback") == 0;
        counts.replay += strcmp(source, "replay") == 0;
        counts.other += strcmp(source, "other") == 0;
        counts.recorded += strcmp(source, "recorded") == 0;
        counts.from_teacher += from_teacher;
        counts.forms[hindsight]++;
        counts.teacher_forms[hindsight] += from_teacher;
    }
    return counts;
}

static void test_recipes(void **state)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = config_with(NULL, 0);
    struct recipe smollm = recipe_for(config, "0123", "SmolLM2-135M-Instruct");
    struct recipe qwen = recipe_for(config, "0123", "Qwen2.5_0.5B-Instruct");
    struct recipe other = recipe_for(config, "0123", "anything");

    (void)state;
    assert_int_equal(smollm.rows, 12);
    assert_true(fabs(smollm.rate - 7e-4) < 1e-12);
    assert_int_equal(smollm.form_count, 3);
    assert_string_equal(smollm.forms[0], "brief");
    assert_true(smollm.other_share == 0);
    assert_int_equal(qwen.rows, 16);
    assert_string_equal(qwen.forms[0], "list");
    assert_true(fabs(other.other_share - 0.375) < 1e-12);
}

static void test_configuration_overrides_a_recipe(void **state)
{
    static const char *const overrides[] = {"cycle.rows=5", "cycle.forms=system,turns",
                                            "cycle.rate=1e-5", "cycle.other_share=0"};
    CLAAS_AUTO(claas_config_free)
    claas_config_t *config = config_with(overrides, CLAAS_COUNT(overrides));
    struct recipe recipe = recipe_for(config, "", "Qwen2.5-0.5B");

    (void)state;
    assert_int_equal(recipe.rows, 5);
    assert_int_equal(recipe.form_count, 2);
    assert_string_equal(recipe.forms[1], "turns");
    assert_true(recipe.other_share == 0);
    assert_true(fabs(recipe.rate - 1e-5) < 1e-15);
}

static void test_default_cycle(void **state)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = config_with(NULL, 0);
    struct recipe recipe = recipe_for(config, "", "SmolLM2-135M");
    int brief = 0;
    struct plan plan;

    (void)state;
    plan_init(&plan, config, &recipe, NULL);
    plan.items = 1;
    plan.replay = 2;
    plan.prompts = 12;
    assert_int_equal(plan.steps, 8);
    assert_true(fabs(plan_rate(&plan, 1) - 7e-4) < 1e-12);
    assert_true(fabs(plan_rate(&plan, 8) - 7e-5) < 1e-12);
    for (int step = 1; step <= 8; step++) {
        CLAAS_AUTO(claas_json_free) cJSON *rows = plan_rows(&plan, step);
        struct counts counts = count_rows(rows);

        assert_int_equal(counts.feedback, 7);
        assert_int_equal(counts.replay, 5);
        assert_int_equal(counts.other, 0);
        assert_true(counts.forms[0] > 0 && counts.forms[1] > 0);
        brief += counts.forms[0];
        if (step == 1) {
            assert_int_equal(counts.from_teacher, 5); /* half of either, rounded down */
            assert_true(counts.teacher_forms[0] > 0 && counts.teacher_forms[1] > 0);
        }
        if (step > 4)
            assert_int_equal(counts.from_teacher, 0);
    }
    assert_true(brief > 8 * 12 / 2 && brief < 8 * 12 * 3 / 4); /* about two of three */
    plan_done(&plan);
}

static void test_every_new_feedback_has_a_row(void **state)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = config_with(NULL, 0);
    struct recipe recipe = recipe_for(config, "", "SmolLM2-135M");
    CLAAS_AUTO(claas_json_free) cJSON *rows = NULL;
    struct plan plan;
    bool seen[16] = {false};
    const cJSON *row;

    (void)state;
    plan_init(&plan, config, &recipe, NULL);
    plan.items = 16;
    plan.replay = 64;
    rows = plan_rows(&plan, 3);
    cJSON_ArrayForEach(row, rows)
    {
        int64_t index = -1;

        claas_json_get_int(row, "index", 0, 1000, &index);
        seen[index] = true;
    }
    for (int i = 0; i < 16; i++)
        assert_true(seen[i]);
    plan_done(&plan);
}

static void test_reference_step(void **state)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = config_with(NULL, 0);
    struct recipe recipe = recipe_for(config, "", "SmolLM2-135M");
    CLAAS_AUTO(claas_json_free) cJSON *training = parse("{\"alpha\": 0.25, \"is_clip\": 4}");
    CLAAS_AUTO(claas_json_free) cJSON *rows = NULL, *json = NULL;
    const char *variant = "";
    double value = 0;
    struct plan plan;

    (void)state;
    plan_init(&plan, config, &recipe, training);
    plan.items = 3;
    assert_true(plan.reference);
    rows = plan_rows(&plan, 1);
    assert_int_equal(count_rows(rows).recorded, 3);
    json = plan_training(&plan, config, 1);
    claas_json_get_string(json, "variant", &variant);
    assert_string_equal(variant, "teacher_topk");
    claas_json_get_number(json, "rate", 0, 1, &value);
    assert_true(fabs(value - 3e-5) < 1e-15);
    claas_json_get_number(json, "is_clip", 0, 100, &value);
    assert_true(value == 4);
    plan_done(&plan);
}

static void test_bounds_of_the_contract(void **state)
{
    CLAAS_AUTO(claas_json_free) cJSON *good = parse("{\"learning_rate\":1e-4,\"steps\":8}");
    CLAAS_AUTO(claas_json_free)
    cJSON *bad = parse("{\"learning_rate\":0,\"alpha\":1.5,\"is_clip\":\"x\",\"teacher_top_k\":5}");

    (void)state;
    assert_int_equal(training_check(good), 0);
    assert_int_equal(training_check(bad), CLAAS_ERR_UNPROCESSABLE);
    assert_string_equal(claas_error_text(),
                        "invalid training config: learning_rate must be > 0; alpha must be within "
                        "[0, 1]; is_clip must be within [1, 20]; teacher_top_k must be within [10, "
                        "100]");
}

static void check_judgement(const claas_config_t *config, const char *candidate, bool finite,
                            const char *reason_start)
{
    CLAAS_AUTO(claas_json_free)
    cJSON *base = parse("{\"nll\":3.0,\"kl\":0,\"short_share\":0,\"distinct2\":0.9}");
    CLAAS_AUTO(claas_json_free) cJSON *json = parse(candidate);
    char reason[256];
    bool passed = judge(config, finite, base, json, reason, sizeof(reason));

    assert_int_equal(passed, reason_start == NULL);
    if (reason_start)
        assert_memory_equal(reason, reason_start, strlen(reason_start));
}

static void test_the_gate(void **state)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = config_with(NULL, 0);

    (void)state;
    check_judgement(config, "{\"nll\":3.09,\"kl\":1.4,\"short_share\":0.3,\"distinct2\":0.46}",
                    true, NULL);
    check_judgement(config, "{\"nll\":3.11,\"kl\":0,\"short_share\":0,\"distinct2\":0.9}", true,
                    "neutral text");
    check_judgement(config, "{\"nll\":3,\"kl\":1.6,\"short_share\":0,\"distinct2\":0.9}", true,
                    "unrelated prompts");
    check_judgement(config, "{\"nll\":3,\"kl\":0,\"short_share\":0.5,\"distinct2\":0.9}", true,
                    "50 %");
    check_judgement(config, "{\"nll\":3,\"kl\":0,\"short_share\":0,\"distinct2\":0.4}", true,
                    "answers repeat");
    check_judgement(config, "{\"nll\":3,\"kl\":0,\"short_share\":0,\"distinct2\":0.9}", false,
                    "the step's loss");
    /* A figure that is not finite is printed as null, and must not pass. */
    check_judgement(config, "{\"nll\":null,\"kl\":0,\"short_share\":0,\"distinct2\":0.9}", true,
                    "neutral text");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recipes),
        cmocka_unit_test(test_configuration_overrides_a_recipe),
        cmocka_unit_test(test_default_cycle),
        cmocka_unit_test(test_every_new_feedback_has_a_row),
        cmocka_unit_test(test_reference_step),
        cmocka_unit_test(test_bounds_of_the_contract),
        cmocka_unit_test(test_the_gate),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
