/* From GGUF's tokenizer keys to a tokenizer: tokens, their types, merges, pre-tokenizer.
 *
 * The strings of the file are not terminated and the tokenizer borrows terminated ones while it is
 * built, so both lists are copied into one arena each, whose size is the file's own. */
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "model_internal.h"

/* llama.cpp's token types. */
enum token_type {
    TOKEN_NORMAL = 1,
    TOKEN_UNKNOWN = 2,
    TOKEN_CONTROL = 3,
    TOKEN_USER = 4,
    TOKEN_UNUSED = 5,
    TOKEN_BYTE = 6,
};

struct pre_row {
    const char *name;
    enum claas_pretokenizer pretokenizer;
    bool nfc, ignore_merges, add_bos; /* what Hugging Face's tokenizer.json of the family says */
};

static const struct pre_row pre_rows[] = {
    {"gpt-2", CLAAS_PRETOKENIZER_GPT2, false, false, false},
    {"smollm", CLAAS_PRETOKENIZER_SMOLLM, false, false, false},
    {"qwen2", CLAAS_PRETOKENIZER_QWEN2, true, false, false},
    {"deepseek-r1-qwen", CLAAS_PRETOKENIZER_QWEN2, true, false, false},
    {"llama-bpe", CLAAS_PRETOKENIZER_LLAMA3, false, true, true},
    {"llama3", CLAAS_PRETOKENIZER_LLAMA3, false, true, true},
    {"llama-v3", CLAAS_PRETOKENIZER_LLAMA3, false, true, true},
};

/* Everything that a tokenizer is built from; freed after it is. */
struct material {
    struct claas_vocab_entry *vocab;
    const char **left, **right;
    char *vocab_text, *merge_text; /* arenas */
};

static void material_done(struct material *material)
{
    free(material->vocab);
    free((void *)material->left);
    free((void *)material->right);
    free(material->vocab_text);
    free(material->merge_text);
}

static int copy_span(struct claas_span span, char **arena, const char **ret)
{
    if (!claas_utf8_valid(span.text, span.length))
        return CLAAS_ERR_FORMAT;
    if (span.length > 0)
        memcpy(*arena, span.text, span.length);
    (*arena)[span.length] = '\0';
    *ret = *arena;
    *arena += span.length + 1;
    return 0;
}

static int read_tokens(const struct claas_gguf *gguf, struct material *material,
                       struct claas_tokenizer_source *source)
{
    const struct claas_gguf_value *tokens, *types;
    struct claas_reader text_reader, type_reader;
    int rc = claas_gguf_get_array(gguf, "tokenizer.ggml.tokens", CLAAS_GGUF_STRING, &tokens);

    if (rc >= 0)
        rc = claas_gguf_get_array(gguf, "tokenizer.ggml.token_type", CLAAS_GGUF_I32, &types);
    if (rc < 0)
        return rc;
    if (!tokens || tokens->item_count == 0 || tokens->item_count > CLAAS_VOCAB_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "no vocabulary of a possible size");
    if (types && types->item_count != tokens->item_count)
        return claas_fail(CLAAS_ERR_FORMAT, "%llu tokens but %llu token types",
                          (unsigned long long)tokens->item_count,
                          (unsigned long long)types->item_count);
    source->vocab_count = (size_t)tokens->item_count;
    material->vocab = CLAAS_NEW_ARRAY(struct claas_vocab_entry, source->vocab_count);
    /* A token is 8 bytes of length and its text in the file, so its text and a NUL fit in the same
     * room. */
    char *arena = material->vocab_text = claas_alloc(tokens->items_bytes, 1);
    if (!material->vocab || !arena)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_reader_init(&text_reader, tokens->items, tokens->items_bytes);
    claas_reader_init(&type_reader, types ? types->items : NULL, types ? types->items_bytes : 0);
    for (size_t i = 0; i < source->vocab_count; i++) {
        struct claas_vocab_entry *entry = &material->vocab[i];
        struct claas_span span = claas_gguf_next_text(&text_reader);
        uint32_t type = types ? claas_reader_u32(&type_reader) : TOKEN_NORMAL;

        if (type == TOKEN_UNUSED)
            continue;
        if (copy_span(span, &arena, &entry->text) < 0)
            return claas_fail(CLAAS_ERR_FORMAT, "token %zu is not valid UTF-8", i);
        entry->length = span.length;
        entry->control = type == TOKEN_CONTROL || type == TOKEN_UNKNOWN;
        entry->special = entry->control || type == TOKEN_USER;
    }
    source->vocab = material->vocab;
    return 0;
}

/* "left right"; the space that parts them is the first one that is not the first character. */
static int split_merge(struct claas_span span, char **arena, const char **left, const char **right)
{
    const char *space = span.length > 2 ? memchr(span.text + 1, ' ', span.length - 2) : NULL;

    if (!space)
        return CLAAS_ERR_FORMAT;
    struct claas_span first = {span.text, (size_t)(space - span.text)};
    struct claas_span second = {space + 1, span.length - first.length - 1};
    int rc = copy_span(first, arena, left);
    return rc < 0 ? rc : copy_span(second, arena, right);
}

static int read_merges(const struct claas_gguf *gguf, struct material *material,
                       struct claas_tokenizer_source *source)
{
    const struct claas_gguf_value *merges;
    struct claas_reader reader;
    int rc = claas_gguf_get_array(gguf, "tokenizer.ggml.merges", CLAAS_GGUF_STRING, &merges);

    if (rc < 0)
        return rc;
    if (!merges)
        return claas_fail(CLAAS_ERR_FORMAT, "the key 'tokenizer.ggml.merges' is missing");
    if (merges->item_count > 4 * (uint64_t)CLAAS_VOCAB_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "%llu merges", (unsigned long long)merges->item_count);
    source->merge_count = (size_t)merges->item_count;
    material->left = CLAAS_NEW_ARRAY(const char *, source->merge_count + 1);
    material->right = CLAAS_NEW_ARRAY(const char *, source->merge_count + 1);
    char *arena = material->merge_text = claas_alloc(merges->items_bytes + 1, 1);
    if (!material->left || !material->right || !arena)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_reader_init(&reader, merges->items, merges->items_bytes);
    for (size_t i = 0; i < source->merge_count; i++)
        if (split_merge(claas_gguf_next_text(&reader), &arena, &material->left[i],
                        &material->right[i]) < 0)
            return claas_fail(CLAAS_ERR_FORMAT, "merge %zu is not two tokens with a space between",
                              i);
    source->merge_left = material->left;
    source->merge_right = material->right;
    return 0;
}

static int read_kind(const struct claas_gguf *gguf, struct claas_tokenizer_source *source)
{
    struct claas_span model = {NULL, 0}, pre = {"none", 4};
    int rc = claas_gguf_get_text(gguf, "tokenizer.ggml.model", &model);

    if (rc >= 0 && !claas_span_equal(model, "gpt2"))
        return claas_fail(
            CLAAS_ERR_UNSUPPORTED, "tokenizer '%.*s' (byte-level BPE, 'gpt2', is supported)",
            (int)(model.length < 64 ? model.length : 64), model.text ? model.text : "");
    if (rc >= 0)
        rc = claas_gguf_get_text(gguf, "tokenizer.ggml.pre", &pre);
    if (rc < 0)
        return rc;
    for (size_t i = 0; i < CLAAS_COUNT(pre_rows); i++)
        if (claas_span_equal(pre, pre_rows[i].name)) {
            source->pretokenizer = pre_rows[i].pretokenizer;
            source->normalize_nfc = pre_rows[i].nfc;
            source->ignore_merges = pre_rows[i].ignore_merges;
            source->add_bos = pre_rows[i].add_bos;
            return 0;
        }
    return claas_fail(CLAAS_ERR_UNSUPPORTED,
                      "pre-tokenizer '%.*s' (gpt-2, smollm, qwen2 and llama-bpe are supported)",
                      (int)(pre.length < 64 ? pre.length : 64), pre.text);
}

int claas_gguf_load_tokenizer(struct claas_model *model, const struct claas_gguf *gguf)
{
    CLAAS_AUTO(material_done) struct material material = {NULL, NULL, NULL, NULL, NULL};
    struct claas_tokenizer_source source = {.bos = -1};
    int64_t bos = -1;
    int rc = read_kind(gguf, &source);

    if (rc >= 0)
        rc = read_tokens(gguf, &material, &source);
    if (rc >= 0)
        rc = read_merges(gguf, &material, &source);
    if (rc >= 0)
        rc = claas_gguf_get_bool(gguf, "tokenizer.ggml.add_bos_token", &source.add_bos);
    if (rc >= 0)
        rc = claas_gguf_get_int(gguf, "tokenizer.ggml.bos_token_id", -1, UINT32_MAX, &bos);
    if (rc < 0)
        return rc;
    source.bos = bos >= 0 && (uint64_t)bos < source.vocab_count ? (int32_t)bos : -1;
    source.add_bos = source.add_bos && source.bos >= 0;
    rc = claas_tokenizer_new(&source, &model->tokenizer);
    return rc < 0 ? rc : claas_model_check_tokenizer(model);
}
