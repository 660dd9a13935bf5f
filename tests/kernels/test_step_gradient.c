/* The gradient of a whole training step by finite differences, in float32, for a tiny random model
 * of every family: the loss is evaluated (forward only) at parameters moved a little along a
 * direction, and compared with the gradient that a step computed. The loss has about seven digits,
 * so the moves are large and the tolerance is what a second-order error leaves: along the gradient
 * itself of every matrix (the strongest signal), along random directions, and on single entries.
 * Also: the same gradient with and without shared prompts, and bfloat16 against float32. */
#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ROWS    3
#define LONGEST 40

static const struct claas_lora_config lora = {.rank = 4, .alpha = 8, .modules = CLAAS_MODULE_ALL};

struct gradient {
    struct step_fixture f;
    claas_backend_adapter_t *adapter;
    struct claas_adapter_image image; /* where the gradient is taken */
    float *grad;
    size_t count;
    struct claas_backend_row rows[ROWS];
    int32_t prompt[LONGEST], hinted[LONGEST], other[LONGEST], responses[ROWS][LONGEST];
    float rollouts[ROWS][LONGEST];
    struct claas_loss_config loss;
};

/* Two rows share their prompts, student's and teacher's; the third is apart. */
static void open_gradient(struct gradient *g, const char *model, const char *precision,
                          const struct claas_loss_config *loss)
{
    static const int counts[ROWS] = {6, 11, 9};

    *g = (struct gradient){.loss = *loss};
    step_open(&g->f, model, precision, 1, NULL);
    g->count = claas_lora_parameter_count(g->f.config, &lora);
    g->image = step_image(&g->f, &lora, 3, 0.15f);
    g->adapter = step_adapter(&g->f, &g->image, CLAAS_ADAPTER_TRAIN);
    step_random_tokens(&g->f, 1, LONGEST, g->prompt);
    step_random_tokens(&g->f, 2, LONGEST, g->hinted);
    step_random_tokens(&g->f, 3, LONGEST, g->other);
    for (int i = 0; i < ROWS; i++) {
        struct claas_train_row *row = &g->rows[i].row;

        step_random_tokens(&g->f, 10 + (uint64_t)i, LONGEST, g->responses[i]);
        for (int t = 0; t < LONGEST; t++)
            g->rollouts[i][t] = -6.0f;
        g->rows[i].student = g->adapter;
        row->student_prompt = i < 2 ? g->prompt : g->other;
        row->student_count = i < 2 ? 19 : 7;
        row->teacher_prompt = g->hinted;
        row->teacher_count = i < 2 ? 23 : 30;
        row->response = g->responses[i];
        row->response_count = (size_t)counts[i];
    }
}

static void close_gradient(struct gradient *g)
{
    claas_adapter_image_done(&g->image);
    free(g->grad);
    g->f.ops->adapter_free(g->f.backend, &g->adapter);
    step_close(&g->f);
}

/* With beta1 = 0, rate 0 and no clipping the first moment after a step is its gradient. */
static float *take_gradient(struct gradient *g, struct claas_backend_row *rows, size_t count)
{
    struct claas_adamw_config plain = {.beta2 = 0.999f, .eps = 1e-8f};
    struct claas_train_result result;
    struct claas_adapter_image image;
    float *grad;

    CHECK(g->f.ops->adapter_upload(g->f.backend, g->adapter, &g->image));
    result = step_train(&g->f, rows, count, &g->loss, &plain, true);
    assert_true(result.finite);
    free(result.rows);
    image = step_download(&g->f, g->adapter);
    assert_memory_equal(image.parameters, g->image.parameters, g->count * sizeof(float));
    grad = CLAAS_TAKE(image.exp_avg);
    claas_adapter_image_done(&image);
    return grad;
}

static double loss_at(struct gradient *g, const float *direction, float step)
{
    struct claas_adapter_image moved = {.lora = lora};
    struct claas_train_result result;
    double loss;

    moved.parameters = CLAAS_NEW_ARRAY(float, g->count);
    assert_non_null(moved.parameters);
    for (size_t i = 0; i < g->count; i++)
        moved.parameters[i] = g->image.parameters[i] + step * direction[i];
    CHECK(g->f.ops->adapter_upload(g->f.backend, g->adapter, &moved));
    result = step_train(&g->f, g->rows, ROWS, &g->loss, NULL, false);
    loss = result.loss;
    free(result.rows);
    claas_adapter_image_done(&moved);
    return loss;
}

/* Fourth-order central difference along a direction against its product with the gradient. */
static void check_direction(struct gradient *g, const float *direction, float h, const char *what)
{
    double expected = 0, found;

    for (size_t i = 0; i < g->count; i++)
        expected += (double)direction[i] * g->grad[i];
    found = (8 * (loss_at(g, direction, h) - loss_at(g, direction, -h)) -
             (loss_at(g, direction, 2 * h) - loss_at(g, direction, -2 * h))) /
            (12.0 * h);
    if (!(fabs(found - expected) <= 0.01 * fabs(expected) + 2e-6 / h))
        fail_msg("%s: difference %.6g, gradient %.6g", what, found, expected);
}

static void check_matrices(struct gradient *g)
{
    CLAAS_AUTO_FREE float *direction = CLAAS_NEW_ARRAY(float, g->count);

    assert_non_null(direction);
    for (int l = 0; l < g->f.config->layers; l++)
        for (int module = 0; module < CLAAS_MODULE_COUNT; module++)
            for (int matrix = 0; matrix < 2; matrix++) {
                size_t at = claas_lora_offset(g->f.config, &lora, l, module, matrix);
                int side = matrix ? claas_module_rows(g->f.config, module)
                                  : claas_module_columns(g->f.config, module);
                size_t size = (size_t)side * (size_t)lora.rank, biggest = at;
                double norm = 0;

                for (size_t i = at; i < at + size; i++) {
                    norm += (double)g->grad[i] * g->grad[i];
                    biggest = fabsf(g->grad[i]) > fabsf(g->grad[biggest]) ? i : biggest;
                }
                assert_true(norm > 0);
                memset(direction, 0, g->count * sizeof(float));
                for (size_t i = at; i < at + size; i++)
                    direction[i] = (float)(g->grad[i] / sqrt(norm));
                check_direction(g, direction, 0.02f, claas_module_name(module));
                memset(direction, 0, g->count * sizeof(float));
                direction[biggest] = 1;
                check_direction(g, direction, 0.02f, "one entry");
            }
}

static void check_random_directions(struct gradient *g)
{
    CLAAS_AUTO_FREE float *direction = CLAAS_NEW_ARRAY(float, g->count);

    assert_non_null(direction);
    for (uint64_t k = 0; k < 4; k++) {
        for (size_t i = 0; i < g->count; i++)
            direction[i] = claas_random_normal(k, 9, i);
        check_direction(g, direction, 0.002f, "random direction");
    }
}

/* (The importance ratio is a constant of the gradient, so it stays off: a difference would see it
 * move.) */
static const struct claas_loss_config losses[] = {
    {.variant = CLAAS_LOSS_FULL, .alpha = 0},
    {.variant = CLAAS_LOSS_FULL, .alpha = 1},
    {.variant = CLAAS_LOSS_FULL, .alpha = 0.5f, .kl_weight = 0.1f, .sample_mean = true},
};

static void gradients_match_finite_differences(void **state)
{
    static const char *const models[] = {"random:tiny-llama",        "random:tiny-qwen2",
                                         "random:tiny-qwen3",        "random:tiny-llama-untied",
                                         "random:tiny-qwen2-untied", "random:tiny-qwen3-untied"};

    for (size_t i = 0; i < CLAAS_COUNT(models); i++) {
        struct gradient g;

        print_message("%s\n", models[i]);
        open_gradient(&g, models[i], "f32", &losses[i % CLAAS_COUNT(losses)]);
        g.grad = take_gradient(&g, g.rows, ROWS);
        check_matrices(&g);
        check_random_directions(&g);
        close_gradient(&g);
    }
}

/* Rows of one prompt cannot be told from rows of different prompts by their figures: the same step
 * with the sharing broken up by giving each row to a step of its own. */
static void shared_prompts_change_nothing(void **state)
{
    struct claas_loss_config loss = {.variant = CLAAS_LOSS_FULL, .sample_mean = true};
    struct gradient g;
    double difference = 0, norm = 0;
    float *sum;

    open_gradient(&g, "random:tiny-qwen3", "f32", &loss);
    g.grad = take_gradient(&g, g.rows, ROWS);
    sum = CLAAS_NEW_ARRAY(float, g.count);
    assert_non_null(sum);
    for (int r = 0; r < ROWS; r++) {
        CLAAS_AUTO_FREE float *own = take_gradient(&g, &g.rows[r], 1);

        for (size_t i = 0; i < g.count; i++)
            sum[i] += own[i] / ROWS;
    }
    for (size_t i = 0; i < g.count; i++) {
        difference += pow((double)sum[i] - g.grad[i], 2);
        norm += pow(g.grad[i], 2);
    }
    if (!(sqrt(difference / norm) <= 2e-6))
        fail_msg("relative difference %.3g", sqrt(difference / norm));
    free(sum);
    close_gradient(&g);
}

/* bfloat16 rounds activations and their gradients to 8 bits: directions stay. */
static void bfloat16_points_the_same_way(void **state)
{
    static const char *const models[] = {"random:tiny-llama", "random:tiny-qwen3-untied"};

    for (size_t m = 0; m < CLAAS_COUNT(models); m++) {
        struct gradient exact, rounded;
        double dot = 0, a = 0, b = 0;

        open_gradient(&exact, models[m], "f32", &losses[0]);
        open_gradient(&rounded, models[m], "bf16", &losses[0]);
        exact.grad = take_gradient(&exact, exact.rows, ROWS);
        rounded.grad = take_gradient(&rounded, rounded.rows, ROWS);
        for (size_t i = 0; i < exact.count; i++) {
            dot += (double)exact.grad[i] * rounded.grad[i];
            a += pow(exact.grad[i], 2);
            b += pow(rounded.grad[i], 2);
        }
        print_message("%s: cosine %.6f, norm ratio %.4f\n", models[m], dot / sqrt(a * b),
                      sqrt(b / a));
        if (!(dot / sqrt(a * b) >= 0.999) || !(fabs(sqrt(b / a) - 1) <= 0.01))
            fail_msg("cosine %.6f", dot / sqrt(a * b));
        close_gradient(&exact);
        close_gradient(&rounded);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_match_finite_differences),
        cmocka_unit_test(shared_prompts_change_nothing),
        cmocka_unit_test(bfloat16_points_the_same_way),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
