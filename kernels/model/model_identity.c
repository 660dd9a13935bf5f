/* What a model is called and how it is recognised.
 *
 * The name is what people write in requests: the file's or directory's own name without path,
 * suffix and quantisation, since general.name is often a training run's:
 *
 *   SmolLM2-135M-Instruct.Q4_1.gguf -> SmolLM2-135M-Instruct
 *
 * general.name is used only when the path says nothing ("model.gguf"). The fingerprint is the key
 * of tables of settings that were measured on a model: a hash of the shape, the vocabulary's size
 * and the decoded values of a few rows. */
#include <ctype.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "model_internal.h"

#define NAME_BYTES_MAX 96

static bool is_name_char(char c)
{
    return isalnum((unsigned char)c) || c == '.' || c == '_' || c == '-';
}

/* "meta/Llama 3" -> "Llama-3": characters that an API name may have; NULL when out of memory. */
static char *clean_name(const char *text, size_t length)
{
    char name[NAME_BYTES_MAX + 1];
    size_t used = 0;

    for (size_t i = 0; i < length && used < NAME_BYTES_MAX; i++) {
        char c = is_name_char(text[i]) ? text[i] : '-';

        /* An organisation in front is not part of the name; runs of replaced characters are one
         * dash. */
        if (text[i] == '/')
            used = 0;
        else if (c != '-' || (used > 0 && name[used - 1] != '-'))
            name[used++] = c;
    }
    while (used > 0 && (name[used - 1] == '-' || name[used - 1] == '.'))
        used--;
    return used > 0 ? claas_strndup(name, used) : claas_strdup("model");
}

/* The length of `text` without a tail such as ".Q4_K_M", "-q8_0", ".f16". */
static size_t strip_encoding(const char *text, size_t length)
{
    size_t start = length;
    static const char *const plain[] = {"f16", "f32", "bf16", "fp16", "fp32"};

    while (start > 0 && text[start - 1] != '.' && text[start - 1] != '-')
        start--;
    if (start < 2)
        return length;
    const char *tail = text + start;
    size_t bytes = length - start;
    if (bytes >= 2 && (tail[0] == 'Q' || tail[0] == 'q') && isdigit((unsigned char)tail[1]))
        return start - 1;
    for (size_t i = 0; i < CLAAS_COUNT(plain); i++)
        if (bytes == strlen(plain[i]) && strncasecmp(tail, plain[i], bytes) == 0)
            return start - 1;
    return length;
}

/* The last part of a path and its length, trailing slashes left out. */
static const char *last_part(const char *path, size_t end, size_t *ret_length)
{
    while (end > 1 && path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && path[start - 1] != '/')
        start--;
    *ret_length = end - start;
    return path + start;
}

static bool is_commit(const char *text, size_t length)
{
    size_t digits = 0;

    while (digits < length && isxdigit((unsigned char)text[digits]))
        digits++;
    return length == 40 && digits == 40;
}

/* The name within a path, or length 0 when the path says nothing. In a hub cache,
 * models--ORG--NAME/snapshots/COMMIT, it is two levels up. */
static const char *path_name(const char *path, size_t *ret_length)
{
    size_t length, up;
    const char *part = last_part(path, strlen(path), &length);

    if (is_commit(part, length)) {
        const char *parent = last_part(path, (size_t)(part - path), &up);
        part = last_part(path, (size_t)(parent - path), &length);
        for (size_t i = length; i >= 2; i--)
            if (part[i - 1] == '-' && part[i - 2] == '-') {
                part += i;
                length -= i;
                break;
            }
    }
    if (length > 5 && strncasecmp(part + length - 5, ".gguf", 5) == 0)
        length = strip_encoding(part, length - 5);
    bool generic = (length == 5 && strncasecmp(part, "model", 5) == 0) ||
                   (length == 10 && strncasecmp(part, "ggml-model", 10) == 0) ||
                   (length <= 2 && strspn(part, ".") >= length);
    *ret_length = generic ? 0 : length;
    return part;
}

/* Every field as text: padding and the order of members must not matter, and floats print exactly.
 */
static int hash_config(crypto_generichash_state *state, const struct claas_model *model)
{
    const struct claas_model_config *c = &model->config;
    CLAAS_AUTO_FREE char *text = claas_format(
        "1 %d %d %d %d %d %d %d %d %d %d %d %d %a %a %d %a %a %a %a %a %a %d %zu", (int)c->family,
        c->hidden, c->intermediate, c->layers, c->heads, c->kv_heads, c->head_dim, c->vocab,
        c->context, c->tied, c->qkv_bias, c->qk_norm, (double)c->norm_eps, (double)c->rope_theta,
        (int)c->rope_kind, (double)c->rope_factor, (double)c->rope_low_freq_factor,
        (double)c->rope_high_freq_factor, (double)c->rope_beta_fast, (double)c->rope_beta_slow,
        (double)c->rope_attention_factor, c->rope_original_context,
        claas_tokenizer_vocab_count(model->tokenizer));

    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    crypto_generichash_update(state, (const unsigned char *)text, strlen(text));
    return 0;
}

/* First, middle and last row of a tensor. */
static int hash_rows(crypto_generichash_state *state, const struct claas_tensor *tensor)
{
    CLAAS_AUTO_FREE float *row = CLAAS_NEW_ARRAY(float, (size_t)tensor->columns);
    const int rows[] = {0, tensor->rows / 2, tensor->rows - 1};

    if (!row)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < CLAAS_COUNT(rows); i++) {
        claas_tensor_row(tensor, rows[i], row);
        crypto_generichash_update(state, (const unsigned char *)row,
                                  (size_t)tensor->columns * sizeof(float));
    }
    return 0;
}

static int make_fingerprint(struct claas_model *model)
{
    crypto_generichash_state state;
    unsigned char hash[crypto_generichash_BYTES_MIN];
    int rc;

    if (sodium_init() < 0 || crypto_generichash_init(&state, NULL, 0, sizeof(hash)) != 0)
        return claas_fail(CLAAS_ERR_INTERNAL, "no hash function");
    rc = hash_config(&state, model);
    for (size_t i = 0; i < model->tensor_count && rc >= 0; i += 1 + model->tensor_count / 16)
        rc = hash_rows(&state, &model->tensors[i]);
    if (rc < 0)
        return rc;
    crypto_generichash_final(&state, hash, sizeof(hash));
    for (int i = 0; i < 8; i++)
        snprintf(model->fingerprint + 2 * i, 3, "%02x", hash[i]);
    return 0;
}

int claas_model_identify(struct claas_model *model, const char *hint)
{
    size_t length;
    const char *part = path_name(model->path, &length);

    if (length == 0 && hint)
        model->name = clean_name(hint, strlen(hint));
    else
        model->name = clean_name(part, length);
    if (!model->name)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return make_fingerprint(model);
}
