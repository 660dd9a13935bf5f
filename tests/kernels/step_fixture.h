/* A model on the CPU back-end, driven without the engine: block tables are simply consecutive. */
#ifndef CLAAS_STEP_FIXTURE_H
#define CLAAS_STEP_FIXTURE_H

#include "engine/backend.h"

/* Everything that fails ends the test with its sentence. */
#define CHECK(call) step_check((call), __FILE__, __LINE__)
int step_check(int code, const char *file, int line);

struct step_fixture {
    claas_model_t *model;
    const struct claas_model_config *config;
    const struct claas_backend_ops *ops;
    claas_backend_t *backend;
};
/* The CPU's, or what CLAAS_TEST_BACKEND names. */
const struct claas_backend_ops *step_backend(void);
/* `cpu`: value of CLAAS_CPU, NULL for the fastest table. */
void step_open(struct step_fixture *f, const char *path, const char *precision, int threads,
               const char *cpu);
void step_close(struct step_fixture *f);

/* Adapters. `b_scale`: B is normal with that deviation instead of zero. */
struct claas_adapter_image step_image(const struct step_fixture *f,
                                      const struct claas_lora_config *lora, uint64_t seed,
                                      float b_scale);
claas_backend_adapter_t *step_adapter(const struct step_fixture *f,
                                      const struct claas_adapter_image *image,
                                      enum claas_adapter_use use);
struct claas_adapter_image step_download(const struct step_fixture *f,
                                         const claas_backend_adapter_t *adapter);
/* The same bits in parameters, moments and step. */
bool step_same_image(const struct step_fixture *f, const struct claas_adapter_image *a,
                     const struct claas_adapter_image *b);

void step_random_tokens(const struct step_fixture *f, uint64_t seed, int count, int32_t *out);

/* Log-probs of tokens[1 … count-1], each given those before it, computed `chunk` tokens at a time
 * in blocks from `first_block` on: out[i] belongs to tokens[i + 1]. */
void step_score(const struct step_fixture *f, claas_backend_adapter_t *adapter,
                const int32_t *tokens, int count, int chunk, int first_block, float *out);

struct claas_adamw_config step_adamw(float rate);
/* A step or an evaluation of `count` rows; the result's rows are freed with free(). */
struct claas_train_result step_train(const struct step_fixture *f, struct claas_backend_row *rows,
                                     size_t count, const struct claas_loss_config *loss,
                                     const struct claas_adamw_config *adamw, bool update);

#endif
