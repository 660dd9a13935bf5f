/* Whole steps against PyTorch and PEFT: tests/golden/step/<model>/ holds tiny models of every
 * family and what make_step_dumps.py computed on them (float64 where it can). In float32, so
 * tolerances are those of a few hundred roundings: loss 1e-6, gradients 1e-5 of a tensor's norm,
 * parameters after ten steps 1e-5, logits' log-probs 1e-5. */
#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/safetensors.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define ROWS 5

static const char *golden_directory;
static const char *const model_names[] = {"llama-tied",   "llama-untied", "qwen2-tied",
                                          "qwen2-untied", "qwen3-tied",   "qwen3-untied"};
/* As the generator has them. */
static const struct claas_lora_config lora = {.rank = 4, .alpha = 8, .modules = CLAAS_MODULE_ALL};
static const struct claas_loss_config losses[] = {
    {.variant = CLAAS_LOSS_FULL, .alpha = 0, .is_clip = 2},
    {.variant = CLAAS_LOSS_FULL,
     .alpha = 0.5f,
     .is_clip = 2,
     .kl_weight = 0.1f,
     .sample_mean = true},
};
static const char *const loss_names[] = {"kl", "jsd"};

struct golden {
    struct step_fixture f;
    claas_safetensors_t *dump;
    struct claas_backend_row rows[ROWS];
    uint8_t masks[ROWS][64];
};

static const struct claas_safetensor *find(const struct golden *g, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static const struct claas_safetensor *find(const struct golden *g, const char *format, ...)
{
    char name[256];
    va_list args;
    const struct claas_safetensor *tensor;

    va_start(args, format);
    (void)vsnprintf(name, sizeof(name), format, args);
    va_end(args);
    tensor = claas_safetensors_find(g->dump, name);
    if (!tensor)
        fail_msg("the dump has no %s", name);
    return tensor;
}

/* Tensors of the file are aligned to their element size by the order they are written in; copying
 * is safe always. */
static void *copy_of(const struct claas_safetensor *tensor)
{
    void *copy = claas_alloc(tensor->bytes, 1);

    assert_non_null(copy);
    memcpy(copy, tensor->data, tensor->bytes);
    return copy;
}

static void open_golden(struct golden *g, const char *name, const char *cpu)
{
    CLAAS_AUTO_FREE char *directory = claas_format("%s/step/%s", golden_directory, name);
    CLAAS_AUTO_FREE char *dump = claas_format("%s/dump.safetensors", directory);

    *g = (struct golden){0};
    step_open(&g->f, directory, "f32", 1, cpu);
    CHECK(claas_safetensors_open(dump, &g->dump));
    for (int i = 0; i < ROWS; i++) {
        const struct claas_safetensor *student = find(g, "tokens.%d.student", i);
        const struct claas_safetensor *teacher = find(g, "tokens.%d.teacher", i);
        const struct claas_safetensor *response = find(g, "tokens.%d.response", i);
        CLAAS_AUTO_FREE float *mask = copy_of(find(g, "mask.%d", i));

        g->rows[i].row = (struct claas_train_row){
            .student_prompt = copy_of(student),
            .student_count = student->bytes / 4,
            .teacher_prompt = copy_of(teacher),
            .teacher_count = teacher->bytes / 4,
            .response = copy_of(response),
            .response_count = response->bytes / 4,
            .rollout_logprobs = copy_of(find(g, "rollout.%d", i)),
            .mask = g->masks[i],
        };
        for (size_t t = 0; t < response->bytes / 4; t++)
            g->masks[i][t] = mask[t] != 0;
    }
}

static void close_golden(struct golden *g)
{
    for (int i = 0; i < ROWS; i++) {
        free((void *)(uintptr_t)g->rows[i].row.student_prompt);
        free((void *)(uintptr_t)g->rows[i].row.teacher_prompt);
        free((void *)(uintptr_t)g->rows[i].row.response);
        free((void *)(uintptr_t)g->rows[i].row.rollout_logprobs);
    }
    claas_safetensors_free(&g->dump);
    step_close(&g->f);
}

static const char *peft_name(int layer, int module, int matrix, char *text, size_t size)
{
    (void)snprintf(text, size, "base_model.model.model.layers.%d.%s.%s.lora_%c.weight", layer,
                   module <= CLAAS_MODULE_O ? "self_attn" : "mlp", claas_module_name(module),
                   matrix ? 'B' : 'A');
    return text;
}

/* Walks an image: gives each matrix and the dump's tensor of the same name under a prefix. */
typedef void visit_fn(void *arg, float *values, const float *golden, size_t count,
                      const char *name);
static void visit(const struct golden *g, const char *prefix, float *image, visit_fn *fn, void *arg)
{
    for (int l = 0; l < g->f.config->layers; l++)
        for (int module = 0; module < CLAAS_MODULE_COUNT; module++)
            for (int matrix = 0; matrix < 2; matrix++) {
                char name[160];
                size_t at = claas_lora_offset(g->f.config, &lora, l, module, matrix);
                const struct claas_safetensor *tensor =
                    find(g, "%s.%s", prefix, peft_name(l, module, matrix, name, sizeof(name)));
                CLAAS_AUTO_FREE float *golden = copy_of(tensor);

                fn(arg, image + at, golden, tensor->bytes / sizeof(float), name);
            }
}

static void take_values(void *arg, float *values, const float *golden, size_t count,
                        const char *name)
{
    memcpy(values, golden, count * sizeof(float));
}

struct comparison {
    double tolerance, worst;
};

static void compare_values(void *arg, float *values, const float *golden, size_t count,
                           const char *name)
{
    struct comparison *c = arg;
    double difference = 0, norm = 0, relative;

    for (size_t i = 0; i < count; i++) {
        difference += pow((double)values[i] - golden[i], 2);
        norm += pow(golden[i], 2);
    }
    relative = sqrt(difference / norm);
    c->worst = fmax(c->worst, relative);
    if (!(relative <= c->tolerance))
        fail_msg("%s: relative error %.3g, at most %.3g", name, relative, c->tolerance);
}

static void expect_near(const char *what, double value, double golden, double tolerance)
{
    if (!(fabs(value - golden) <= tolerance * fabs(golden)))
        fail_msg("%s: %.9g, PyTorch has %.9g", what, value, golden);
}

static claas_backend_adapter_t *initial_adapter(struct golden *g)
{
    struct claas_adapter_image image = step_image(&g->f, &lora, 1, 0);
    claas_backend_adapter_t *adapter;

    visit(g, "init", image.parameters, take_values, NULL);
    adapter = step_adapter(&g->f, &image, CLAAS_ADAPTER_TRAIN);
    claas_adapter_image_done(&image);
    for (int i = 0; i < ROWS; i++)
        g->rows[i].student = adapter;
    return adapter;
}

/* With beta1 = 0, no clipping and rate 0 the first moment of a step is its gradient. */
static void check_gradient(struct golden *g, int which)
{
    struct claas_adamw_config plain = {.beta2 = 0.999f, .eps = 1e-8f};
    claas_backend_adapter_t *adapter = initial_adapter(g);
    struct claas_train_result result =
        step_train(&g->f, g->rows, ROWS, &losses[which], &plain, true);
    struct claas_adapter_image image = step_download(&g->f, adapter);
    struct comparison comparison = {.tolerance = 1e-5};
    char prefix[32];
    float golden;

    assert_true(result.finite);
    memcpy(&golden, find(g, "%s.loss", loss_names[which])->data, sizeof(golden));
    expect_near("loss", result.loss, golden, 1e-6);
    memcpy(&golden, find(g, "%s.norm", loss_names[which])->data, sizeof(golden));
    expect_near("gradient norm", result.grad_norm, golden, 1e-5);
    (void)snprintf(prefix, sizeof(prefix), "%s.grad", loss_names[which]);
    visit(g, prefix, image.exp_avg, compare_values, &comparison);
    print_message("  %s: worst gradient %.2g\n", loss_names[which], comparison.worst);
    free(result.rows);
    claas_adapter_image_done(&image);
    g->f.ops->adapter_free(g->f.backend, &adapter);
}

static void check_ten_steps(struct golden *g, int which)
{
    struct claas_adamw_config config = step_adamw(5e-4f);
    claas_backend_adapter_t *adapter = initial_adapter(g);
    CLAAS_AUTO_FREE float *golden = copy_of(find(g, "%s.losses", loss_names[which]));
    struct comparison comparison = {.tolerance = 1e-5};
    struct claas_adapter_image image;
    char prefix[32];

    config.weight_decay = 0.01f;
    for (int step = 0; step < 10; step++) {
        struct claas_train_result result =
            step_train(&g->f, g->rows, ROWS, &losses[which], &config, true);

        expect_near("loss", result.loss, golden[step], 1e-5);
        assert_int_equal(result.step, step + 1);
        free(result.rows);
    }
    image = step_download(&g->f, adapter);
    (void)snprintf(prefix, sizeof(prefix), "%s.after", loss_names[which]);
    visit(g, prefix, image.parameters, compare_values, &comparison);
    print_message("  %s: worst parameter after ten steps %.2g\n", loss_names[which],
                  comparison.worst);
    claas_adapter_image_done(&image);
    g->f.ops->adapter_free(g->f.backend, &adapter);
}

/* Base logits of row 2, as log-probs of its own next tokens. */
static void check_logits(struct golden *g)
{
    const struct claas_train_row *row = &g->rows[2].row;
    int count = (int)(row->student_count + row->response_count), vocab = g->f.config->vocab;
    CLAAS_AUTO_FREE float *logits = copy_of(find(g, "logits"));
    int32_t tokens[64];
    float scores[64];

    memcpy(tokens, row->student_prompt, row->student_count * sizeof(int32_t));
    memcpy(tokens + row->student_count, row->response, row->response_count * sizeof(int32_t));
    step_score(&g->f, NULL, tokens, count, 16, 3, scores);
    for (int i = 0; i + 1 < count; i++) {
        double sum = 0, expected;

        for (int v = 0; v < vocab; v++)
            sum += exp(logits[i * vocab + v]);
        expected = logits[i * vocab + tokens[i + 1]] - log(sum);
        if (!(fabs(scores[i] - expected) <= 1e-5 * fmax(1, fabs(expected))))
            fail_msg("position %d: log-prob %.9g, PyTorch has %.9g", i, scores[i], expected);
    }
}

static void check_models(const char *cpu)
{
    for (size_t i = 0; i < CLAAS_COUNT(model_names); i++) {
        struct golden g;

        open_golden(&g, model_names[i], cpu);
        print_message("%s on %s\n", model_names[i], g.f.ops->describe(g.f.backend));
        check_logits(&g);
        for (int which = 0; which < 2; which++) {
            check_gradient(&g, which);
            check_ten_steps(&g, which);
        }
        close_golden(&g);
    }
}

static void steps_equal_pytorch_on_the_reference_table(void **state)
{
    check_models("ref");
}

static void steps_equal_pytorch_on_the_fastest_table(void **state)
{
    check_models(NULL);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_equal_pytorch_on_the_reference_table),
        cmocka_unit_test(steps_equal_pytorch_on_the_fastest_table),
    };

    golden_directory = argc > 1 ? argv[1] : "tests/golden";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
