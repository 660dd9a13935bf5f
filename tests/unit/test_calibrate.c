/* The rule that chooses how feedback is shown, on figures measured for two models. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "calibrate.h"

/* Forms in the order of calibrate_form_names: none, hindsight, brief, system, list, userlist,
 * turns. */
static const struct calibration smollm2 = {
    .hit = {{0, 0.04, 0},
            {0.75, 0.96, 0.38},
            {1, 0.63, 0.58},
            {0.79, 0.63, 0.38},
            {0.71, 0.54, 0},
            {0.67, 0.96, 0.08},
            {0.58, 0.92, 0.08}},
    .leak = {0, 0.88, 0.83, 0.13, 0.08, 0.21, 0.13},
};

static const struct calibration qwen = {
    .hit = {{0, 0.1, 0},
            {0.96, 0.98, 1},
            {0.9, 0.98, 1},
            {0.81, 0.97, 1},
            {0.73, 0.97, 1},
            {0.89, 0.98, 1},
            {0.77, 0.98, 0.6}},
    .leak = {0, 0.71, 0.46, 0.06, 0.04, 0.02, 0},
};

static void expect_form(int form, const char *name)
{
    assert_string_equal(calibrate_form_names[form], name);
}

/* No form works at everything: the strongest, and in turns the one that is better at brevity; the
 * leak forbids rows about other things. */
static void test_small_model(void **state)
{
    struct calibrated chosen = calibrate_choose(&smollm2);

    (void)state;
    assert_int_equal(chosen.form_count, 2);
    expect_form(chosen.forms[0], "brief");
    expect_form(chosen.forms[1], "hindsight");
    assert_true(chosen.other_share == 0);
    assert_int_equal(chosen.rows, 12);
}

/* Several forms work: the one that leaks least, alone, with rows about other things. `turns` leaks
 * less but fails at style. */
static void test_larger_model(void **state)
{
    struct calibrated chosen = calibrate_choose(&qwen);

    (void)state;
    assert_int_equal(chosen.form_count, 1);
    expect_form(chosen.forms[0], "userlist");
    assert_true(chosen.other_share == 0.375);
    assert_int_equal(chosen.rows, 16);
}

/* A model that follows nothing still gets an answer. */
static void test_deaf_model(void **state)
{
    struct calibration nothing = {0};
    struct calibrated chosen = calibrate_choose(&nothing);

    (void)state;
    assert_int_equal(chosen.form_count, 1);
    assert_true(chosen.forms[0] > 0);
}

static void test_preferences(void **state)
{
    (void)state;
    assert_true(calibrate_preferences[0].is_met("I am KURO."));
    assert_false(calibrate_preferences[0].is_met("I am SmolLM."));
    assert_true(calibrate_preferences[1].is_met("Gravity pulls  things\ntogether."));
    assert_false(calibrate_preferences[1].is_met(""));
    assert_false(
        calibrate_preferences[1].is_met("a b c d e f g h i j k l m n o p q r s t u v w x y z"));
    assert_true(calibrate_preferences[2].is_met("Ahoy, matey!"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_model),
        cmocka_unit_test(test_larger_model),
        cmocka_unit_test(test_deaf_model),
        cmocka_unit_test(test_preferences),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
