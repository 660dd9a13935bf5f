/* Opening a model: picks the reader that a path needs. Also the getters of an open one. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

/* Ends of turn and of text that a family's own files do not always list: generation must not run
 * past them. */
static const char *const stop_texts[] = {
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>",
};

void claas_model_add_stop(struct claas_model *model, int64_t token)
{
    if (token < 0 || token >= model->config.vocab || model->stop_count == CLAAS_STOP_MAX)
        return;
    for (size_t i = 0; i < model->stop_count; i++)
        if (model->stops[i] == token)
            return;
    model->stops[model->stop_count++] = (int32_t)token;
}

int claas_model_check_tokenizer(const struct claas_model *model)
{
    size_t count = claas_tokenizer_vocab_count(model->tokenizer);

    if (count > (size_t)model->config.vocab)
        return claas_fail(CLAAS_ERR_FORMAT, "%zu tokens for an embedding of %d rows", count,
                          model->config.vocab);
    return 0;
}

static int load_gguf(struct claas_model *model, const char *chat_template, char **ret_name)
{
    int rc = claas_file_map(model->path, &model->mapping, &model->mapping_length);

    if (rc < 0)
        return rc;
    rc = claas_gguf_load(model, model->mapping, model->mapping_length, chat_template, ret_name);
    return rc < 0 ? claas_fail_context(rc, "%s: ", model->path) : 0;
}

/* Fills everything but name, fingerprint and the stop tokens known by text. */
static int load_any(struct claas_model *model, const char *chat_template, char **ret_name)
{
    struct stat info;

    if (strncmp(model->path, "random:", 7) == 0)
        return claas_random_load(model, model->path + 7, chat_template);
    if (stat(model->path, &info) < 0)
        return claas_fail_errno("model '%s'", model->path);
    if (S_ISDIR(info.st_mode))
        return claas_hf_load(model, model->path, chat_template, ret_name);
    if (!S_ISREG(info.st_mode))
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "model '%s' is neither a file nor a directory",
                          model->path);
    return load_gguf(model, chat_template, ret_name);
}

int claas_model_open(const struct claas_model_options *options, claas_model_t **ret)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = CLAAS_NEW(claas_model_t);
    CLAAS_AUTO_FREE char *name = NULL;

    if (!options->path || !options->path[0])
        return claas_fail(CLAAS_ERR_INVALID, "no model path");
    if (!model || !(model->path = claas_strdup(options->path)))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = load_any(model, options->chat_template, &name);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < CLAAS_COUNT(stop_texts); i++)
        claas_model_add_stop(model, claas_tokenizer_special(model->tokenizer, stop_texts[i]));
    rc = claas_model_identify(model, name);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(model);
    return 0;
}

void claas_model_release_weights(claas_model_t *model)
{
    bool mapped = model->mapping || model->shards;

    for (size_t i = 0; mapped && i < model->tensor_count; i++)
        model->tensors[i].data = NULL;
    for (size_t i = 0; i < model->shard_count; i++)
        claas_safetensors_free(&model->shards[i]);
    free(model->shards);
    model->shards = NULL;
    model->shard_count = 0;
    if (model->mapping)
        claas_file_unmap(model->mapping, model->mapping_length);
    model->mapping = NULL;
}

void claas_model_free(claas_model_t **model)
{
    if (!*model)
        return;
    claas_model_release_weights(*model);
    claas_tokenizer_free(&(*model)->tokenizer);
    claas_chat_template_free(&(*model)->chat_template);
    free((*model)->tensors);
    free((*model)->path);
    free((*model)->name);
    free(*model);
    *model = NULL;
}

const struct claas_model_config *claas_model_config(const claas_model_t *model)
{
    return &model->config;
}

uint64_t claas_model_weight_bytes(const claas_model_t *model)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < model->tensor_count; i++)
        bytes += model->tensors[i].data ? model->tensors[i].bytes : 0;
    return bytes;
}

const char *claas_model_name(const claas_model_t *model)
{
    return model->name;
}

const char *claas_model_fingerprint(const claas_model_t *model)
{
    return model->fingerprint;
}

const char *claas_model_path(const claas_model_t *model)
{
    return model->path;
}

const claas_tokenizer_t *claas_model_tokenizer(const claas_model_t *model)
{
    return model->tokenizer;
}

const claas_chat_template_t *claas_model_chat_template(const claas_model_t *model)
{
    return model->chat_template;
}

size_t claas_model_stop_tokens(const claas_model_t *model, int32_t *tokens, size_t max)
{
    size_t count = model->stop_count < max ? model->stop_count : max;

    if (count > 0)
        memcpy(tokens, model->stops, count * sizeof(tokens[0]));
    return count;
}
