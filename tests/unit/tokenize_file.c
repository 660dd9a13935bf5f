/* tokenize_file [--plain] [--repeat N] MODEL_OR_TOKENIZER_JSON TEXTFILE
 *
 * Writes the token ids of a text file to standard output, binary int32 of this machine: the C side
 * of tests/e2e/tokenizer_parity.py. --plain recognises no control tokens in the text; --repeat
 * encodes N times and reports the best speed on standard error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/model.h"
#include "claas/tokenizer.h"

#define FILE_MAX ((size_t)1 << 30)

struct options {
    bool plain;
    int repeat;
    const char *model, *text;
};

static bool ends_with(const char *text, const char *suffix)
{
    size_t length = strlen(text), suffix_length = strlen(suffix);

    return length >= suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

/* A tokenizer of its own, or one that lives in *ret_model. */
static int open_tokenizer(const char *path, claas_tokenizer_t **ret, claas_model_t **ret_model)
{
    CLAAS_AUTO_FREE char *json = NULL;
    struct claas_model_options options = {.path = path, .chat_template = "chatml"};
    size_t length;
    int rc;

    if (!ends_with(path, ".json"))
        return claas_model_open(&options, ret_model);
    rc = claas_file_read(path, FILE_MAX, &json, &length);
    return rc < 0 ? rc : claas_tokenizer_from_json(json, length, ret);
}

static int tokenize(const claas_tokenizer_t *tokenizer, const struct options *options)
{
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO_FREE int32_t *ids = NULL;
    size_t length, count = 0;
    int64_t best = INT64_MAX;
    int rc = claas_file_read(options->text, FILE_MAX, &text, &length);

    for (int i = 0; rc >= 0 && i < options->repeat; i++) {
        int64_t start = claas_clock_ns();

        free(CLAAS_TAKE(ids));
        rc = claas_tokenizer_encode(tokenizer, text, length, !options->plain, &ids, &count);
        if (claas_clock_ns() - start < best)
            best = claas_clock_ns() - start;
    }
    if (rc < 0)
        return rc;
    if (options->repeat > 1)
        fprintf(stderr, "%zu bytes, %zu tokens, %.1f MB/s\n", length, count,
                (double)length / ((double)best * 1e-9) / 1e6);
    if (fwrite(ids, sizeof(*ids), count, stdout) != count || fflush(stdout) != 0)
        return claas_fail_errno("standard output");
    return 0;
}

int main(int argc, char **argv)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = NULL;
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    struct options options = {.repeat = 1};
    int rc;

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--plain") == 0)
            options.plain = true;
        else if (strcmp(argv[i], "--repeat") == 0 && i + 1 < argc)
            options.repeat = atoi(argv[++i]);
        else if (!options.model)
            options.model = argv[i];
        else
            options.text = argv[i];
    }
    if (!options.text || options.repeat < 1) {
        fprintf(stderr, "usage: tokenize_file [--plain] [--repeat N] MODEL_OR_JSON TEXTFILE\n");
        return 2;
    }
    rc = open_tokenizer(options.model, &tokenizer, &model);
    if (rc >= 0)
        rc = tokenize(tokenizer ? tokenizer : claas_model_tokenizer(model), &options);
    if (rc < 0)
        fprintf(stderr, "tokenize_file: %s\n", claas_error_text());
    return rc < 0 ? 1 : 0;
}
