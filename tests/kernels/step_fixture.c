#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"

#ifdef CLAAS_CUDA
#include "cuda/cuda_backend.h"
#endif

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define KV_BLOCKS  256
#define MAX_TOKENS 256

int step_check(int code, const char *file, int line)
{
    if (code < 0) {
        print_error("%s:%d: %s\n", file, line, claas_error_text());
        _fail(file, line);
    }
    return code;
}

/* CLAAS_TEST_BACKEND=cuda runs the tests on the GPU. */
const struct claas_backend_ops *step_backend(void)
{
#ifdef CLAAS_CUDA
    const char *name = getenv("CLAAS_TEST_BACKEND");

    if (name && strcmp(name, claas_backend_cuda.name) == 0)
        return &claas_backend_cuda;
#endif
    return &claas_backend_cpu;
}

void step_open(struct step_fixture *f, const char *path, const char *precision, int threads,
               const char *cpu)
{
    struct claas_model_options options = {.path = path, .chat_template = "chatml"};
    struct claas_backend_options backend = {.precision = precision,
                                            .threads = threads,
                                            .kv_blocks = KV_BLOCKS,
                                            .max_tokens = MAX_TOKENS};

    if (cpu)
        (void)setenv("CLAAS_CPU", cpu, 1);
    else
        (void)unsetenv("CLAAS_CPU");
    *f = (struct step_fixture){.ops = step_backend()};
    CHECK(claas_model_open(&options, &f->model));
    f->config = claas_model_config(f->model);
    CHECK(f->ops->open(&backend, f->model, &f->backend));
}

void step_close(struct step_fixture *f)
{
    f->ops->free(&f->backend);
    claas_model_free(&f->model);
}

struct claas_adapter_image step_image(const struct step_fixture *f,
                                      const struct claas_lora_config *lora, uint64_t seed,
                                      float b_scale)
{
    struct claas_adapter_image image = {.lora = *lora};
    size_t count = claas_lora_parameter_count(f->config, lora);
    uint64_t index = 0;

    image.parameters = CLAAS_NEW_ARRAY(float, count);
    assert_non_null(image.parameters);
    claas_lora_init(f->config, lora, seed, image.parameters);
    for (int l = 0; l < f->config->layers; l++)
        for (int module = 0; module < CLAAS_MODULE_COUNT; module++) {
            size_t at = claas_lora_offset(f->config, lora, l, module, 1);
            size_t size = (size_t)claas_module_rows(f->config, module) * (size_t)lora->rank;

            for (size_t i = 0; at != SIZE_MAX && i < size; i++)
                image.parameters[at + i] = b_scale * claas_random_normal(seed, 77, index++);
        }
    return image;
}

claas_backend_adapter_t *step_adapter(const struct step_fixture *f,
                                      const struct claas_adapter_image *image,
                                      enum claas_adapter_use use)
{
    claas_backend_adapter_t *adapter = NULL;

    CHECK(f->ops->adapter_new(f->backend, &image->lora, use, &adapter));
    CHECK(f->ops->adapter_upload(f->backend, adapter, image));
    return adapter;
}

struct claas_adapter_image step_download(const struct step_fixture *f,
                                         const claas_backend_adapter_t *adapter)
{
    struct claas_adapter_image image = {0};

    CHECK(f->ops->adapter_download(f->backend, adapter, NULL, NULL, &image));
    return image;
}

static bool same_floats(const float *a, const float *b, size_t count)
{
    return (!a && !b) || (a && b && memcmp(a, b, count * sizeof(float)) == 0);
}

bool step_same_image(const struct step_fixture *f, const struct claas_adapter_image *a,
                     const struct claas_adapter_image *b)
{
    size_t count = claas_lora_parameter_count(f->config, &a->lora);

    return a->step == b->step && same_floats(a->parameters, b->parameters, count) &&
           same_floats(a->exp_avg, b->exp_avg, count) &&
           same_floats(a->exp_avg_sq, b->exp_avg_sq, count);
}

void step_random_tokens(const struct step_fixture *f, uint64_t seed, int count, int32_t *out)
{
    for (int i = 0; i < count; i++)
        out[i] = (int32_t)(claas_random_uniform(seed, 5, (uint64_t)i) * (float)f->config->vocab);
}

void step_score(const struct step_fixture *f, claas_backend_adapter_t *adapter,
                const int32_t *tokens, int count, int chunk, int first_block, float *out)
{
    int32_t blocks[KV_BLOCKS];
    struct claas_sample *samples = CLAAS_NEW_ARRAY(struct claas_sample, (size_t)count);

    assert_non_null(samples);
    for (int i = 0; i < KV_BLOCKS; i++)
        blocks[i] = first_block + i;
    for (int i = 0; i + 1 < count; i++)
        samples[i].given = tokens[i + 1];
    for (int pos = 0; pos < count - 1; pos += chunk) {
        int take = count - 1 - pos < chunk ? count - 1 - pos : chunk;
        struct claas_segment segment = {.tokens = tokens + pos,
                                        .count = take,
                                        .pos = pos,
                                        .blocks = blocks,
                                        .adapter = adapter,
                                        .wanted = take};

        CHECK(f->ops->forward(f->backend, &segment, 1, samples + pos));
    }
    for (int i = 0; i + 1 < count; i++)
        out[i] = samples[i].logprob;
    free(samples);
}

struct claas_adamw_config step_adamw(float rate)
{
    return (struct claas_adamw_config){
        .rate = rate, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1};
}

struct claas_train_result step_train(const struct step_fixture *f, struct claas_backend_row *rows,
                                     size_t count, const struct claas_loss_config *loss,
                                     const struct claas_adamw_config *adamw, bool update)
{
    struct claas_backend_train request = {
        .rows = rows, .row_count = count, .loss = *loss, .update = update};
    struct claas_train_result result = {0};

    if (adamw)
        request.adamw = *adamw;
    CHECK(f->ops->train(f->backend, &request, &result));
    return result;
}
