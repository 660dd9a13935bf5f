/* The C side of tests/e2e/logits_parity.py: what the CPU back-end computes, as raw numbers that
 * another program can compare.
 *
 *   dump_logits logits MODEL f32|bf16 ADAPTER|- OUT TOKENS...   TOKENS: files of int32; OUT gets
 *       float32 [count][vocab] of each of them, one behind the other
 *   dump_logits train MODEL f32|bf16 DIRECTORY RANK STEPS SEED  a new adapter, trained for STEPS
 *       steps on random tokens, written with its moments to DIRECTORY; rates as in a default cycle
 *
 * Prompts are read in chunks that are no multiple of a key/value block, as the server may read
 * them. */
#include "cpu/step.h"

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONGEST 1024
#define CHUNK   100
#define ROWS    2
#define PROMPT  24
#define ANSWER  24
#define RATE    7e-4f /* of the first step, falling linearly */

struct rig {
    claas_model_t *model;
    claas_backend_t *backend;
    claas_backend_adapter_t *adapter;
};

static void close_rig(struct rig *rig)
{
    if (rig->backend) {
        claas_backend_cpu.adapter_free(rig->backend, &rig->adapter);
        claas_backend_cpu.free(&rig->backend);
    }
    claas_model_free(&rig->model);
}

static int open_rig(struct rig *rig, const char *path, const char *precision)
{
    struct claas_model_options model = {.path = path, .chat_template = "chatml"};
    struct claas_backend_options backend = {
        .precision = precision, .kv_blocks = LONGEST / CLAAS_KV_BLOCK_TOKENS, .max_tokens = CHUNK};
    int code = claas_model_open(&model, &rig->model);

    return code < 0 ? code : claas_backend_cpu.open(&backend, rig->model, &rig->backend);
}

/* --- logits --- */

static int load_adapter(struct rig *rig, const char *directory)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    int code = claas_adapter_read(directory, claas_model_config(rig->model), false, &image);

    if (code >= 0)
        code = claas_backend_cpu.adapter_new(rig->backend, &image.lora, CLAAS_ADAPTER_SERVE,
                                             &rig->adapter);
    return code < 0 ? code : claas_backend_cpu.adapter_upload(rig->backend, rig->adapter, &image);
}

static int write_logits(struct rig *rig, const int32_t *tokens, int count, FILE *out)
{
    claas_backend_t *backend = rig->backend;
    size_t vocab = (size_t)backend->model.config.vocab;
    CLAAS_AUTO_FREE float *logits = CLAAS_NEW_ARRAY(float, CHUNK *vocab);
    int32_t blocks[LONGEST / CLAAS_KV_BLOCK_TOKENS];

    if (!logits)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < CLAAS_COUNT(blocks); i++)
        blocks[i] = (int32_t)i;
    for (int pos = 0; pos < count; pos += CHUNK) {
        struct claas_sample samples[CHUNK] = {0};
        int rows = count - pos < CHUNK ? count - pos : CHUNK;
        struct claas_segment segment = {.tokens = tokens + pos,
                                        .count = rows,
                                        .pos = pos,
                                        .blocks = blocks,
                                        .adapter = rig->adapter,
                                        .wanted = rows};
        int code = claas_cpu_forward(backend, &segment, 1, samples);

        if (code < 0)
            return code;
        claas_cpu_logits(backend, rows, backend->forward.hidden, logits);
        if (fwrite(logits, sizeof(float), (size_t)rows * vocab, out) != (size_t)rows * vocab)
            return claas_fail_errno("writing");
    }
    return 0;
}

static int write_file(struct rig *rig, const char *path, FILE *out)
{
    CLAAS_AUTO_FREE char *bytes = NULL;
    size_t size = 0;
    int code = claas_file_read(path, LONGEST * sizeof(int32_t), &bytes, &size);
    const int32_t *tokens = (const int32_t *)(void *)bytes;
    int count = (int)(size / sizeof(int32_t));

    for (int i = 0; i < count && code >= 0; i++)
        if (tokens[i] < 0 || tokens[i] >= rig->backend->model.config.vocab)
            code = claas_fail(CLAAS_ERR_INVALID, "%s: token %d", path, tokens[i]);
    return code < 0 ? code : write_logits(rig, tokens, count, out);
}

static int run_logits(char **args, int count)
{
    CLAAS_AUTO(close_rig) struct rig rig = {0};
    int code = open_rig(&rig, args[0], args[1]);
    FILE *out;

    if (code >= 0 && strcmp(args[2], "-") != 0)
        code = load_adapter(&rig, args[2]);
    if (code < 0)
        return code;
    out = fopen(args[3], "wb");
    if (!out)
        return claas_fail_errno("%s", args[3]);
    for (int i = 4; i < count && code >= 0; i++)
        code = write_file(&rig, args[i], out);
    if (fclose(out) != 0 && code >= 0)
        code = claas_fail_errno("%s", args[3]);
    return code;
}

/* --- train --- */

static int new_adapter(struct rig *rig, int rank, uint64_t seed)
{
    CLAAS_AUTO(claas_adapter_image_done)
    struct claas_adapter_image image = {
        .lora = {.rank = rank, .alpha = 2 * (float)rank, .modules = CLAAS_MODULE_ALL}};
    const struct claas_model_config *config = claas_model_config(rig->model);
    int code;

    image.parameters = CLAAS_NEW_ARRAY(float, claas_lora_parameter_count(config, &image.lora));
    if (!image.parameters)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_lora_init(config, &image.lora, seed, image.parameters);
    code = claas_backend_cpu.adapter_new(rig->backend, &image.lora, CLAAS_ADAPTER_TRAIN,
                                         &rig->adapter);
    return code < 0 ? code : claas_backend_cpu.adapter_upload(rig->backend, rig->adapter, &image);
}

static void random_tokens(const struct rig *rig, uint64_t seed, uint64_t stream, int count,
                          int32_t *out)
{
    for (int i = 0; i < count; i++)
        out[i] = (int32_t)(claas_random_uniform(seed, stream, (uint64_t)i) *
                           (float)rig->backend->model.config.vocab);
}

/* Teachers read other prompts than students do, so there is something to learn. */
static int train_step(struct rig *rig, int step, int steps, uint64_t seed)
{
    int32_t student[ROWS][PROMPT], teacher[ROWS][PROMPT], answer[ROWS][ANSWER];
    struct claas_backend_row rows[ROWS] = {0};
    struct claas_backend_train request = {
        .rows = rows,
        .row_count = ROWS,
        .loss = {.variant = CLAAS_LOSS_FULL},
        .adamw = {.rate = RATE * (1 - 0.9f * (float)step / (float)steps),
                  .beta1 = 0.9f,
                  .beta2 = 0.999f,
                  .eps = 1e-8f,
                  .max_grad_norm = 1},
        .update = true};
    struct claas_train_result result = {0};
    int code;

    for (int i = 0; i < ROWS; i++) {
        uint64_t stream = 3 * (uint64_t)(step * ROWS + i);

        random_tokens(rig, seed, stream, PROMPT, student[i]);
        random_tokens(rig, seed, stream + 1, PROMPT, teacher[i]);
        random_tokens(rig, seed, stream + 2, ANSWER, answer[i]);
        rows[i].student = rig->adapter;
        rows[i].row = (struct claas_train_row){.student_prompt = student[i],
                                               .student_count = PROMPT,
                                               .teacher_prompt = teacher[i],
                                               .teacher_count = PROMPT,
                                               .response = answer[i],
                                               .response_count = ANSWER};
    }
    code = claas_backend_cpu.train(rig->backend, &request, &result);
    if (code >= 0 && !result.finite)
        code = claas_fail(CLAAS_ERR_INVALID, "step %d is not finite", step);
    free(result.rows);
    return code;
}

static int run_train(char **args)
{
    CLAAS_AUTO(close_rig) struct rig rig = {0};
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {0};
    uint64_t seed = strtoull(args[5], NULL, 10);
    int steps = atoi(args[4]), code = open_rig(&rig, args[0], args[1]);

    if (code >= 0)
        code = new_adapter(&rig, atoi(args[3]), seed);
    for (int step = 0; step < steps && code >= 0; step++)
        code = train_step(&rig, step, steps, seed);
    if (code >= 0)
        code = claas_backend_cpu.adapter_download(rig.backend, rig.adapter, NULL, NULL, &image);
    if (code < 0)
        return code;
    return claas_adapter_write(args[2], claas_model_config(rig.model), claas_model_name(rig.model),
                               &image);
}

int main(int argc, char **argv)
{
    bool is_logits = argc >= 7 && strcmp(argv[1], "logits") == 0;
    bool is_train = argc == 8 && strcmp(argv[1], "train") == 0;

    if (!is_logits && !is_train) {
        (void)fprintf(stderr,
                      "usage: dump_logits logits MODEL f32|bf16 ADAPTER|- OUT TOKENS...\n"
                      "       dump_logits train MODEL f32|bf16 DIRECTORY RANK STEPS SEED\n");
        return 2;
    }
    if ((is_logits ? run_logits(argv + 2, argc - 2) : run_train(argv + 2)) < 0) {
        (void)fprintf(stderr, "dump_logits: %s\n", claas_error_text());
        return 1;
    }
    return 0;
}
