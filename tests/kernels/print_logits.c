/* Writes a model's logits for a list of tokens: `print_logits MODEL f32|bf16 TOKENS OUT`, where
 * TOKENS holds int32 and OUT gets float32 [count][vocab]. tests/golden/compare_logits.py compares
 * them with transformers'. */
#include "cpu/step.h"

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

#include <stdio.h>
#include <stdlib.h>

#define LONGEST 1024
#define CHUNK   64

static int write_logits(claas_backend_t *backend, const int32_t *tokens, int count, FILE *out)
{
    size_t vocab = (size_t)backend->model.config.vocab, d = (size_t)backend->model.config.hidden;
    CLAAS_AUTO_FREE float *logits = CLAAS_NEW_ARRAY(float, CHUNK *vocab);
    CLAAS_AUTO_FREE struct claas_sample *samples =
        CLAAS_NEW_ARRAY(struct claas_sample, (size_t)count);
    int32_t blocks[LONGEST / CLAAS_KV_BLOCK];
    struct claas_segment segment = {
        .tokens = tokens, .count = count, .blocks = blocks, .wanted = count};
    int code;

    if (!logits || !samples)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < LONGEST / CLAAS_KV_BLOCK; i++)
        blocks[i] = i;
    code = claas_cpu_forward(backend, &segment, 1, samples);
    for (int row = 0; row < count && code >= 0; row += CHUNK) {
        int rows = count - row < CHUNK ? count - row : CHUNK;

        claas_cpu_logits(backend, rows,
                         claas_cpu_at(backend->ops, backend->forward.hidden, (size_t)row * d),
                         logits);
        if (fwrite(logits, sizeof(float), (size_t)rows * vocab, out) != (size_t)rows * vocab)
            code = claas_fail_errno("writing");
    }
    return code;
}

static int run(char **argv)
{
    struct claas_model_options options = {.path = argv[1], .chat_template = "chatml"};
    struct claas_backend_options backend_options = {
        .precision = argv[2], .kv_blocks = LONGEST / CLAAS_KV_BLOCK, .max_tokens = LONGEST};
    CLAAS_AUTO_FREE char *tokens = NULL;
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    claas_backend_t *backend = NULL;
    size_t bytes = 0;
    FILE *out;
    int code = claas_file_read(argv[3], LONGEST * sizeof(int32_t), &tokens, &bytes);

    if (code >= 0)
        code = claas_model_open(&options, &model);
    if (code >= 0)
        code = claas_backend_cpu.open(&backend_options, model, &backend);
    if (code < 0)
        return code;
    out = fopen(argv[4], "wb");
    if (out) {
        code = write_logits(backend, (const int32_t *)(void *)tokens,
                            (int)(bytes / sizeof(int32_t)), out);
        if (fclose(out) != 0 && code >= 0)
            code = claas_fail_errno("%s", argv[4]);
    } else {
        code = claas_fail_errno("%s", argv[4]);
    }
    claas_backend_cpu.free(&backend);
    return code;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        (void)fprintf(stderr, "usage: print_logits MODEL f32|bf16 TOKENS OUT\n");
        return 2;
    }
    if (run(argv) < 0) {
        (void)fprintf(stderr, "print_logits: %s\n", claas_error_text());
        return 1;
    }
    return 0;
}
