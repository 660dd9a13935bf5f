/* Models without files, "random:NAME[:SEED]": the shapes of known models, and tiny ones, with
 * random weights that are made row by row when asked for. A whole server runs on one: the tokenizer
 * is byte-level with a few merges and the ChatML markers. Like a real model's, the embedding has
 * more rows than the tokenizer has tokens. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "model_internal.h"

struct shape_row {
    const char *name;
    struct claas_model_config config;
};

#define LLAMA3_ROPE                                                                                \
    .rope_kind = CLAAS_ROPE_LLAMA3, .rope_factor = 8.0f, .rope_low_freq_factor = 1.0f,             \
    .rope_high_freq_factor = 4.0f, .rope_original_context = 8192
#define TINY(family_, head_dim_, tied_)                                                            \
    .family = family_, .hidden = 64, .intermediate = 160, .layers = 2, .heads = 4, .kv_heads = 2,  \
    .head_dim = head_dim_, .vocab = 512, .context = 2048, .tied = tied_, .norm_eps = 1e-6f,        \
    .rope_theta = 10000.0f

/* 30 to 40 million parameters, for checks: deep and wide enough that errors grow as in a real one.
 */
#define SMALL(family_, heads_, kv_heads_, head_dim_, tied_)                                        \
    .family = family_, .hidden = 512, .intermediate = 1536, .layers = 6, .heads = heads_,          \
    .kv_heads = kv_heads_, .head_dim = head_dim_, .vocab = 16384, .context = 16384, .tied = tied_, \
    .norm_eps = 1e-6f, .rope_theta = 1000000.0f

/* Hugging Face's configs of these models; fields not given are zero or follow from the family. */
static const struct shape_row shape_rows[] = {
    {"tiny-llama", {TINY(CLAAS_FAMILY_LLAMA, 16, true)}},
    {"tiny-llama-untied", {TINY(CLAAS_FAMILY_LLAMA, 16, false)}},
    {"tiny-qwen2", {TINY(CLAAS_FAMILY_QWEN2, 16, true)}},
    {"tiny-qwen2-untied", {TINY(CLAAS_FAMILY_QWEN2, 16, false)}},
    {"tiny-qwen3", {TINY(CLAAS_FAMILY_QWEN3, 32, true)}},
    {"tiny-qwen3-untied", {TINY(CLAAS_FAMILY_QWEN3, 32, false)}},
    /* For sequences that are long and cheap. */
    {"tiny-long",
     {.family = CLAAS_FAMILY_QWEN3,
      .hidden = 128,
      .intermediate = 320,
      .layers = 2,
      .heads = 2,
      .kv_heads = 1,
      .head_dim = 128,
      .vocab = 512,
      .context = 16384,
      .tied = true,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"small-llama", {SMALL(CLAAS_FAMILY_LLAMA, 8, 8, 64, true), LLAMA3_ROPE}},
    {"small-qwen2-untied", {SMALL(CLAAS_FAMILY_QWEN2, 12, 4, 64, false)}},
    {"small-qwen3", {SMALL(CLAAS_FAMILY_QWEN3, 8, 2, 128, true)}},
    {"smollm2-135m",
     {.family = CLAAS_FAMILY_LLAMA,
      .hidden = 576,
      .intermediate = 1536,
      .layers = 30,
      .heads = 9,
      .kv_heads = 3,
      .head_dim = 64,
      .vocab = 49152,
      .context = 8192,
      .tied = true,
      .norm_eps = 1e-5f,
      .rope_theta = 100000.0f}},
    {"qwen2.5-0.5b",
     {.family = CLAAS_FAMILY_QWEN2,
      .hidden = 896,
      .intermediate = 4864,
      .layers = 24,
      .heads = 14,
      .kv_heads = 2,
      .head_dim = 64,
      .vocab = 151936,
      .context = 32768,
      .tied = true,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"qwen3-0.6b",
     {.family = CLAAS_FAMILY_QWEN3,
      .hidden = 1024,
      .intermediate = 3072,
      .layers = 28,
      .heads = 16,
      .kv_heads = 8,
      .head_dim = 128,
      .vocab = 151936,
      .context = 40960,
      .tied = true,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"qwen3-1.7b",
     {.family = CLAAS_FAMILY_QWEN3,
      .hidden = 2048,
      .intermediate = 6144,
      .layers = 28,
      .heads = 16,
      .kv_heads = 8,
      .head_dim = 128,
      .vocab = 151936,
      .context = 40960,
      .tied = true,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"qwen3-4b",
     {.family = CLAAS_FAMILY_QWEN3,
      .hidden = 2560,
      .intermediate = 9728,
      .layers = 36,
      .heads = 32,
      .kv_heads = 8,
      .head_dim = 128,
      .vocab = 151936,
      .context = 40960,
      .tied = true,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"qwen3-8b",
     {.family = CLAAS_FAMILY_QWEN3,
      .hidden = 4096,
      .intermediate = 12288,
      .layers = 36,
      .heads = 32,
      .kv_heads = 8,
      .head_dim = 128,
      .vocab = 151936,
      .context = 40960,
      .tied = false,
      .norm_eps = 1e-6f,
      .rope_theta = 1000000.0f}},
    {"llama3-8b",
     {.family = CLAAS_FAMILY_LLAMA,
      .hidden = 4096,
      .intermediate = 14336,
      .layers = 32,
      .heads = 32,
      .kv_heads = 8,
      .head_dim = 128,
      .vocab = 128256,
      .context = 131072,
      .tied = false,
      .norm_eps = 1e-5f,
      .rope_theta = 500000.0f,
      LLAMA3_ROPE}},
};

static const char *const special_texts[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
#define SPECIALS 3
#define BYTES    256
/* The merges: a space before a letter, then a consonant before a vowel, and a vowel before a
 * consonant. */
#define LETTERS    26
#define VOWELS     "aeiou"
#define CONSONANTS "bcdfghjklmnpqrstvwxyz"
#define MERGES     (LETTERS + 2 * 5 * 21)
#define TOKENS     (SPECIALS + BYTES + MERGES)
#define TEXT_BYTES 8

/* GPT-2's alphabet: printable bytes stand for themselves, the other 68, in order, for U+0100 and
 * up. */
static void write_byte_text(int byte, char text[TEXT_BYTES])
{
    int code = 0x100;

    for (int b = 0; b <= byte; b++) {
        bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;

        if (b == byte && printable)
            code = b;
        else if (b < byte && !printable)
            code++;
    }
    if (code < 0x80)
        snprintf(text, TEXT_BYTES, "%c", code);
    else
        snprintf(text, TEXT_BYTES, "%c%c", 0xc0 | code >> 6, 0x80 | (code & 63));
}

/* Left and right of the index-th merge. */
static void write_merge(int index, char left[TEXT_BYTES], char right[TEXT_BYTES])
{
    char first, second;

    if (index < LETTERS) {
        write_byte_text(' ', left);
        snprintf(right, TEXT_BYTES, "%c", 'a' + index);
        return;
    }
    index -= LETTERS;
    first = index < 105 ? CONSONANTS[index / 5] : VOWELS[(index - 105) % 5];
    second = index < 105 ? VOWELS[index % 5] : CONSONANTS[(index - 105) / 5];
    snprintf(left, TEXT_BYTES, "%c", first);
    snprintf(right, TEXT_BYTES, "%c", second);
}

struct material {
    struct claas_vocab_entry vocab[TOKENS];
    char texts[BYTES][TEXT_BYTES];
    char lefts[MERGES][TEXT_BYTES], rights[MERGES][TEXT_BYTES], merged[MERGES][2 * TEXT_BYTES];
    const char *left[MERGES], *right[MERGES];
};

static void set_entry(struct claas_vocab_entry *entry, const char *text, bool special)
{
    entry->text = text;
    entry->length = strlen(text);
    entry->special = entry->control = special;
}

static int make_tokenizer(claas_tokenizer_t **ret)
{
    CLAAS_AUTO_FREE struct material *m = CLAAS_NEW(struct material);
    size_t left;

    if (!m)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < BYTES; i++) {
        write_byte_text(i, m->texts[i]);
        set_entry(&m->vocab[i], m->texts[i], false);
    }
    for (int i = 0; i < SPECIALS; i++)
        set_entry(&m->vocab[BYTES + i], special_texts[i], true);
    for (int i = 0; i < MERGES; i++) {
        write_merge(i, m->lefts[i], m->rights[i]);
        left = strlen(m->lefts[i]);
        memcpy(m->merged[i], m->lefts[i], left);
        memcpy(m->merged[i] + left, m->rights[i], strlen(m->rights[i]) + 1);
        set_entry(&m->vocab[BYTES + SPECIALS + i], m->merged[i], false);
        m->left[i] = m->lefts[i];
        m->right[i] = m->rights[i];
    }
    const struct claas_tokenizer_source source = {
        .pretokenizer = CLAAS_PRETOKENIZER_GPT2,
        .vocab = m->vocab,
        .vocab_count = TOKENS,
        .merge_left = m->left,
        .merge_right = m->right,
        .merge_count = MERGES,
        .bos = -1,
    };
    return claas_tokenizer_new(&source, ret);
}

struct random_source {
    uint64_t seed;
    uint64_t next; /* tensors made so far: each has its own key */
};

/* 1/sqrt(in) keeps the size of activations from layer to layer, and gives logits a spread of
 * about 1. */
static int make_tensor(void *source, const struct claas_tensor_spec *spec,
                       struct claas_tensor *tensor)
{
    struct random_source *from = source;

    tensor->type = CLAAS_TYPE_F32;
    tensor->rows = spec->rows;
    tensor->columns = spec->columns;
    tensor->bytes = (size_t)spec->rows * (size_t)spec->columns * sizeof(float);
    /* splitmix64's increment: keys of different seeds do not meet. */
    tensor->random_seed = from->seed * UINT64_C(0x9e3779b97f4a7c15) + from->next++;
    if (!spec->norm)
        tensor->random_std = spec->is_bias ? 0.1f : 1.0f / sqrtf((float)spec->columns);
    return 0;
}

static int fail_unknown(const char *spec)
{
    char names[512] = "";
    size_t used = 0;

    for (size_t i = 0; i < CLAAS_COUNT(shape_rows) && used < sizeof(names); i++)
        used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%s", used > 0 ? ", " : "",
                                 shape_rows[i].name);
    return claas_fail(CLAAS_ERR_NOT_FOUND, "no random model '%.60s' (%s)", spec, names);
}

/* "NAME[:SEED]" */
static int parse_spec(const char *spec, const struct shape_row **ret_shape, uint64_t *ret_seed)
{
    size_t length = strcspn(spec, ":");
    char *end = NULL;

    *ret_shape = NULL;
    *ret_seed = 0;
    for (size_t i = 0; i < CLAAS_COUNT(shape_rows); i++)
        if (strlen(shape_rows[i].name) == length && memcmp(shape_rows[i].name, spec, length) == 0)
            *ret_shape = &shape_rows[i];
    if (!*ret_shape)
        return fail_unknown(spec);
    if (spec[length] == '\0')
        return 0;
    errno = 0;
    *ret_seed = strtoull(spec + length + 1, &end, 10);
    if (errno != 0 || *end != '\0' || spec[length + 1] < '0' || spec[length + 1] > '9')
        return claas_fail(CLAAS_ERR_INVALID, "'%.60s' is not a seed", spec + length + 1);
    return 0;
}

int claas_random_load(struct claas_model *model, const char *spec, const char *chat_template)
{
    const struct shape_row *shape;
    struct random_source source = {0, 0};

    int rc = parse_spec(spec, &shape, &source.seed);
    if (rc < 0)
        return rc;
    model->config = shape->config;
    model->config.qkv_bias = model->config.family == CLAAS_FAMILY_QWEN2;
    model->config.qk_norm = model->config.family == CLAAS_FAMILY_QWEN3;
    model->config.rope_attention_factor = 1.0f;
    if (!(model->config.rope_factor > 0.0f))
        model->config.rope_factor = 1.0f;
    rc = claas_model_config_check(&model->config);
    if (rc >= 0)
        rc = claas_model_bind(model, make_tensor, &source);
    if (rc >= 0)
        rc = make_tokenizer(&model->tokenizer);
    if (rc >= 0)
        rc = claas_chat_template_new(NULL, chat_template ? chat_template : "chatml",
                                     &model->chat_template);
    if (rc < 0)
        return rc;
    claas_model_add_stop(model, BYTES + 2);
    claas_model_add_stop(model, BYTES);
    return 0;
}
