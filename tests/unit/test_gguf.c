/* The GGUF reader: a good file, seventy-three bad ones with their errors, every truncation, ten
 * thousand flipped bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "../../kernels/model/model_internal.h"
#include "gguf_builder.h"
#include "touch_model.h"

/* Loads a copy whose end is the end of its heap block. */
static int load_image(const void *bytes, size_t length)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = claas_alloc(1, sizeof(*model));
    CLAAS_AUTO_FREE char *name = NULL;
    CLAAS_AUTO_FREE uint8_t *copy = malloc(length ? length : 1);

    assert_non_null(model);
    assert_non_null(copy);
    memcpy(copy, bytes, length);
    int rc = claas_gguf_load(model, copy, length, NULL, &name);
    if (rc >= 0)
        touch_model(model);
    return rc;
}

static void base_image(struct claas_buf *out)
{
    struct gguf_builder b;

    builder_init(&b);
    builder_add_base(&b);
    claas_buf_init(out, 1 << 24);
    builder_finish(&b, out);
    assert_int_equal(out->error, 0);
    builder_done(&b);
}

static char *write_temporary(const struct claas_buf *image, const char *suffix)
{
    char *path = claas_format("%s/claas-test-XXXXXX%s",
                              getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", suffix);
    int fd = mkstemps(path, (int)strlen(suffix));

    assert_true(fd >= 0);
    assert_int_equal(claas_fd_write_all(fd, image->data, image->length), 0);
    close(fd);
    return path;
}

static void test_gguf_open(void **state)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf image;
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    CLAAS_AUTO(claas_model_free) claas_model_t *again = NULL;
    float rows[16][32], direct[16][32];

    (void)state;
    base_image(&image);
    CLAAS_AUTO_FREE char *path = write_temporary(&image, ".gguf");
    const struct claas_model_options options = {.path = path};
    assert_int_equal(claas_model_open(&options, &model), 0);
    assert_int_equal(claas_model_open(&options, &again), 0);
    unlink(path);
    const struct claas_model_config *c = claas_model_config(model);
    assert_int_equal(c->hidden, 32);
    assert_int_equal(c->head_dim, 16);
    assert_int_equal(c->vocab, BUILDER_VOCAB);
    assert_true(c->tied);
    assert_int_equal(strncmp(claas_model_name(model), "claas-test-", 11), 0);
    assert_int_equal(strlen(claas_model_fingerprint(model)), 16);
    assert_string_equal(claas_model_fingerprint(model), claas_model_fingerprint(again));
    int32_t stops[4];
    assert_int_equal(claas_model_stop_tokens(model, stops, 4), 2);
    assert_int_equal(stops[0], 258);
    assert_int_equal(stops[1], 256);
    assert_null(claas_model_tensor(model, "lm_head.weight"));
    assert_null(claas_model_tensor(model, "x"));
    /* k has one head of 16 rows: Hugging Face's row j is the file's 2j, row j + 8 its 2j + 1. */
    const struct claas_tensor *k =
        claas_model_tensor(model, "model.layers.0.self_attn.k_proj.weight");
    assert_non_null(k);
    assert_int_equal(k->permuted_head_rows, 16);
    for (int r = 0; r < 16; r++) {
        claas_tensor_row(k, r, rows[r]);
        claas_dequantize(k->type, k->data + r * 20, 32, direct[r]);
    }
    for (int j = 0; j < 8; j++) {
        assert_memory_equal(rows[j], direct[2 * j], sizeof(rows[j]));
        assert_memory_equal(rows[j + 8], direct[2 * j + 1], sizeof(rows[j]));
    }
    claas_model_release_weights(again);
    assert_non_null(claas_model_tokenizer(again));
    claas_model_release_weights(again);
}

/* Qwen2 has biases, Qwen3 norms on heads; neither is permuted. Token types 4 and 5: user-defined,
 * unused. */
static void test_gguf_families(void **state)
{
    static const char *const archs[] = {"qwen2", "qwen3"};

    (void)state;
    for (int i = 0; i < 2; i++) {
        CLAAS_AUTO(claas_model_free) claas_model_t *model = claas_alloc(1, sizeof(*model));
        CLAAS_AUTO(claas_buf_done) struct claas_buf image;
        CLAAS_AUTO_FREE char *name = NULL;
        struct gguf_builder b;
        int32_t types[BUILDER_VOCAB];

        for (int k = 0; k < BUILDER_VOCAB; k++)
            types[k] = k < 256 || k > 258 ? 1 : k == 256 ? 5 : k == 257 ? 4 : 3;
        builder_init(&b);
        claas_buf_init(&image, 1 << 24);
        b.arch = archs[i];
        b.skip_pair = "tokenizer.ggml.token_type";
        builder_add_base(&b);
        b.skip_pair = NULL;
        pair_i32s(&b, "tokenizer.ggml.token_type", types, BUILDER_VOCAB);
        pair_u64(&b, i == 0 ? "qwen2.attention.key_length" : "qwen3.attention.key_length", 16);
        for (int k = 0; k < 3 && i == 0; k++)
            add_tensor(
                &b,
                (const char *[]){"blk.0.attn_q.bias", "blk.0.attn_k.bias", "blk.0.attn_v.bias"}[k],
                CLAAS_TYPE_F32, k == 0 ? 32 : 16, 0);
        for (int k = 0; k < 2 && i == 1; k++)
            add_tensor(&b, k == 0 ? "blk.0.attn_q_norm.weight" : "blk.0.attn_k_norm.weight",
                       CLAAS_TYPE_F32, 16, 0);
        add_tensor(&b, "output.weight", CLAAS_TYPE_F16, 32, BUILDER_VOCAB);
        builder_finish(&b, &image);
        builder_done(&b);
        if (claas_gguf_load(model, (const uint8_t *)image.data, image.length, NULL, &name) < 0)
            fail_msg("%s", claas_error_text());
        assert_true(model->config.qkv_bias == (i == 0) && model->config.qk_norm == (i == 1));
        assert_false(model->config.tied);
        const struct claas_tensor *q =
            claas_model_tensor(model, "model.layers.0.self_attn.q_proj.weight");
        assert_int_equal(q->permuted_head_rows, 0);
        assert_int_equal(claas_tokenizer_special(model->tokenizer, "<|endoftext|>"), -1);
        assert_int_equal(claas_tokenizer_special(model->tokenizer, "<|im_start|>"), 257);
        assert_false(claas_tokenizer_is_control(model->tokenizer, 257));
        assert_true(claas_tokenizer_is_control(model->tokenizer, 258));
        touch_model(model);
    }
}

static void extra_split(struct gguf_builder *b)
{
    pair_u32(b, "split.count", 2);
}
static void extra_experts(struct gguf_builder *b)
{
    pair_u32(b, "llama.expert_count", 8);
}
static void extra_version_1(struct gguf_builder *b)
{
    b->version = 1;
}
static void extra_version_big(struct gguf_builder *b)
{
    b->version = 3u << 24;
}
static void extra_version_99(struct gguf_builder *b)
{
    b->version = 99;
}
static void extra_magic(struct gguf_builder *b)
{
    b->magic = "GGML";
}
static void extra_pair_count(struct gguf_builder *b)
{
    b->pair_count = UINT64_C(1) << 62;
}
static void extra_pair_count_1(struct gguf_builder *b)
{
    b->pair_count++;
}
static void extra_tensor_count(struct gguf_builder *b)
{
    b->tensor_count = UINT64_MAX;
}
static void extra_tensor_count_0(struct gguf_builder *b)
{
    b->tensor_count = 0;
}
static void extra_key_length(struct gguf_builder *b)
{
    put_u64(&b->pairs, UINT64_MAX - 3);
    b->pair_count++;
}
static void extra_key_empty(struct gguf_builder *b)
{
    pair_u32(b, "", 1);
}
static void extra_key_binary(struct gguf_builder *b)
{
    pair_u32(b, "a\nb", 1);
}
static void extra_key_twice(struct gguf_builder *b)
{
    pair_text(b, "general.name", "again");
}
static void extra_value_type(struct gguf_builder *b)
{
    begin_pair(b, "x", 13);
}
static void extra_bool(struct gguf_builder *b)
{
    begin_pair(b, "x", 7);
    claas_buf_add(&b->pairs, "\2", 1);
}
static void extra_u64(struct gguf_builder *b)
{
    pair_u64(b, "x", UINT64_MAX);
}
static void extra_nested(struct gguf_builder *b)
{
    begin_pair(b, "x", 9);
    put_u32(&b->pairs, 9);
    put_u64(&b->pairs, 1);
}
static void extra_array_count(struct gguf_builder *b)
{
    begin_pair(b, "x", 9);
    put_u32(&b->pairs, 6);
    put_u64(&b->pairs, UINT64_C(1) << 61);
}
static void extra_array_texts(struct gguf_builder *b)
{
    begin_pair(b, "x", 9);
    put_u32(&b->pairs, 8);
    put_u64(&b->pairs, 2);
    put_text(&b->pairs, "one");
    put_u64(&b->pairs, 1 << 30);
}
static void extra_text_length(struct gguf_builder *b)
{
    begin_pair(b, "x", 8);
    put_u64(&b->pairs, UINT64_MAX);
}
static void extra_arch(struct gguf_builder *b)
{
    pair_text(b, "general.architecture", "mamba");
}
static void extra_arch_number(struct gguf_builder *b)
{
    pair_u32(b, "general.architecture", 1);
}
static void extra_layers_text(struct gguf_builder *b)
{
    pair_text(b, "llama.block_count", "1");
}
static void extra_layers_0(struct gguf_builder *b)
{
    pair_u32(b, "llama.block_count", 0);
}
static void extra_layers_many(struct gguf_builder *b)
{
    pair_u32(b, "llama.block_count", 1000);
}
static void extra_layers_too_many(struct gguf_builder *b)
{
    pair_u64(b, "llama.block_count", UINT64_C(1) << 40);
}
static void extra_heads(struct gguf_builder *b)
{
    pair_u32(b, "llama.attention.head_count_kv", 3);
}
static void extra_head_dim(struct gguf_builder *b)
{
    pair_u32(b, "llama.attention.key_length", 15);
    pair_u32(b, "llama.attention.value_length", 15);
}
static void extra_value_length(struct gguf_builder *b)
{
    pair_u32(b, "llama.attention.value_length", 32);
}
static void extra_eps(struct gguf_builder *b)
{
    pair_f32(b, "llama.attention.layer_norm_rms_epsilon", NAN);
}
static void extra_theta(struct gguf_builder *b)
{
    pair_f32(b, "llama.rope.freq_base", -1.0f);
}
static void extra_rope_part(struct gguf_builder *b)
{
    pair_u32(b, "llama.rope.dimension_count", 8);
}
static void extra_rope_kind(struct gguf_builder *b)
{
    pair_text(b, "llama.rope.scaling.type", "longrope");
}
static void extra_alignment_3(struct gguf_builder *b)
{
    pair_u32(b, "general.alignment", 3);
}
static void extra_alignment_0(struct gguf_builder *b)
{
    pair_u32(b, "general.alignment", 0);
}
static void extra_tensor_twice(struct gguf_builder *b)
{
    add_tensor(b, "output_norm.weight", CLAAS_TYPE_F32, 32, 0);
}
static void extra_tensor_unknown(struct gguf_builder *b)
{
    add_tensor(b, "blk.0.attn_q.bias", CLAAS_TYPE_F32, 32, 0);
}
static void extra_tensor_layer(struct gguf_builder *b)
{
    add_tensor(b, "blk.1.attn_norm.weight", CLAAS_TYPE_F32, 32, 0);
}
static void extra_tensor_type(struct gguf_builder *b)
{
    add_info(b, "x", 1, (const uint64_t[]){256}, 16, UINT64_MAX);
}
static void extra_tensor_dims_0(struct gguf_builder *b)
{
    add_info(b, "x", 0, NULL, 0, UINT64_MAX);
}
static void extra_tensor_dims_5(struct gguf_builder *b)
{
    add_info(b, "x", 5, (const uint64_t[]){1, 1, 1, 1, 1}, 0, UINT64_MAX);
}
static void extra_tensor_zero(struct gguf_builder *b)
{
    add_info(b, "x", 2, (const uint64_t[]){32, 0}, 0, UINT64_MAX);
}
static void extra_tensor_huge(struct gguf_builder *b)
{
    add_info(b, "x", 4, (const uint64_t[]){1u << 31, 1u << 31, 1u << 31, 1u << 31}, 0, UINT64_MAX);
}
static void extra_tensor_negative(struct gguf_builder *b)
{
    add_info(b, "x", 1, (const uint64_t[]){UINT64_MAX}, 0, UINT64_MAX);
}
static void extra_tensor_block(struct gguf_builder *b)
{
    add_info(b, "x", 1, (const uint64_t[]){33}, CLAAS_TYPE_Q8_0, UINT64_MAX);
}
static void extra_tensor_offset(struct gguf_builder *b)
{
    add_info(b, "x", 1, (const uint64_t[]){32}, 0, 1 << 20);
}
static void extra_tensor_beyond(struct gguf_builder *b)
{
    add_info(b, "x", 1, (const uint64_t[]){32}, 0, UINT64_MAX);
}
static void extra_tensor_shape(struct gguf_builder *b)
{
    add_tensor(b, "blk.0.ffn_up.weight", CLAAS_TYPE_F32, 32, 16);
}
static void extra_embedding_1d(struct gguf_builder *b)
{
    add_tensor(b, "token_embd.weight", CLAAS_TYPE_F32, 32, 0);
}
static void extra_embedding_small(struct gguf_builder *b)
{
    add_tensor(b, "token_embd.weight", CLAAS_TYPE_F32, 32, 100);
}
static void extra_rope_freqs(struct gguf_builder *b)
{
    add_tensor(b, "rope_freqs.weight", CLAAS_TYPE_F32, 8, 0);
}
static void extra_rope_freqs_shape(struct gguf_builder *b)
{
    add_tensor(b, "rope_freqs.weight", CLAAS_TYPE_F32, 4, 0);
}
static void extra_tokenizer_model(struct gguf_builder *b)
{
    pair_text(b, "tokenizer.ggml.model", "llama");
}
static void extra_tokenizer_pre(struct gguf_builder *b)
{
    pair_text(b, "tokenizer.ggml.pre", "tekken");
}
static void extra_types_count(struct gguf_builder *b)
{
    pair_i32s(b, "tokenizer.ggml.token_type", (const int32_t[]){1, 1}, 2);
}
static void extra_tokens_type(struct gguf_builder *b)
{
    pair_i32s(b, "tokenizer.ggml.tokens", (const int32_t[]){1, 1}, 2);
}
static void extra_tokens_utf8(struct gguf_builder *b)
{
    const char *tokens[BUILDER_VOCAB];

    for (int i = 0; i < BUILDER_VOCAB; i++)
        tokens[i] = "\xff";
    pair_texts(b, "tokenizer.ggml.tokens", tokens, BUILDER_VOCAB);
}
static void extra_merge_space(struct gguf_builder *b)
{
    pair_texts(b, "tokenizer.ggml.merges", (const char *[]){"he"}, 1);
}
static void extra_merge_half(struct gguf_builder *b)
{
    pair_texts(b, "tokenizer.ggml.merges", (const char *[]){"h "}, 1);
}
static void extra_template(struct gguf_builder *b)
{
    pair_text(b, "tokenizer.chat_template", "{{ messages }}");
}
static void extra_template_utf8(struct gguf_builder *b)
{
    pair_text(b, "tokenizer.chat_template", "<|im_start|>\xc3");
}

struct bad_gguf {
    const char *skip_pair, *skip_tensor;
    void (*extra)(struct gguf_builder *b);
    int code;
    const char *text; /* part of the sentence */
};

static const struct bad_gguf bad_ggufs[] = {
    {NULL, NULL, extra_magic, CLAAS_ERR_FORMAT, "not a GGUF file"},
    {NULL, NULL, extra_version_1, CLAAS_ERR_UNSUPPORTED, "version 1"},
    {NULL, NULL, extra_version_99, CLAAS_ERR_UNSUPPORTED, "version 99"},
    {NULL, NULL, extra_version_big, CLAAS_ERR_UNSUPPORTED, "big-endian"},
    {NULL, NULL, extra_pair_count, CLAAS_ERR_FORMAT, "keys cannot be"},
    {NULL, NULL, extra_pair_count_1, CLAAS_ERR_FORMAT, ""},
    {NULL, NULL, extra_tensor_count, CLAAS_ERR_FORMAT, "tensors cannot be"},
    {NULL, NULL, extra_tensor_count_0, CLAAS_ERR_FORMAT, "no embedding"},
    {NULL, NULL, extra_key_length, CLAAS_ERR_FORMAT, "ends inside a key"},
    {NULL, NULL, extra_key_empty, CLAAS_ERR_FORMAT, "a key of 0 bytes"},
    {NULL, NULL, extra_key_binary, CLAAS_ERR_FORMAT, "not printable"},
    {NULL, NULL, extra_key_twice, CLAAS_ERR_FORMAT, "'general.name' is there twice"},
    {NULL, NULL, extra_value_type, CLAAS_ERR_FORMAT, "unknown type 13"},
    {NULL, NULL, extra_bool, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {NULL, NULL, extra_u64, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {NULL, NULL, extra_nested, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {NULL, NULL, extra_array_count, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {NULL, NULL, extra_array_texts, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {NULL, NULL, extra_text_length, CLAAS_ERR_FORMAT, "bad or truncated value"},
    {"general.architecture", NULL, NULL, CLAAS_ERR_FORMAT, "general.architecture"},
    {"general.architecture", NULL, extra_arch, CLAAS_ERR_UNSUPPORTED, "architecture 'mamba'"},
    {"general.architecture", NULL, extra_arch_number, CLAAS_ERR_FORMAT, "not a string"},
    {NULL, NULL, extra_split, CLAAS_ERR_UNSUPPORTED, "split model"},
    {NULL, NULL, extra_experts, CLAAS_ERR_UNSUPPORTED, "mixture of experts"},
    {"llama.block_count", NULL, NULL, CLAAS_ERR_FORMAT, "'llama.block_count' is missing"},
    {"llama.block_count", NULL, extra_layers_text, CLAAS_ERR_FORMAT, "not an integer"},
    {"llama.block_count", NULL, extra_layers_0, CLAAS_ERR_FORMAT, "is 0, not in"},
    {"llama.block_count", NULL, extra_layers_many, CLAAS_ERR_FORMAT, "is missing"},
    {"llama.block_count", NULL, extra_layers_too_many, CLAAS_ERR_FORMAT, "not in"},
    {"llama.embedding_length", NULL, NULL, CLAAS_ERR_FORMAT, "embedding_length"},
    {"llama.context_length", NULL, NULL, CLAAS_ERR_FORMAT, "context_length"},
    {"llama.attention.head_count_kv", NULL, extra_heads, CLAAS_ERR_FORMAT, "not a multiple"},
    {NULL, NULL, extra_head_dim, CLAAS_ERR_FORMAT, "head size"},
    {NULL, NULL, extra_value_length, CLAAS_ERR_UNSUPPORTED, "different lengths"},
    {"llama.attention.layer_norm_rms_epsilon", NULL, NULL, CLAAS_ERR_FORMAT, "epsilon"},
    {"llama.attention.layer_norm_rms_epsilon", NULL, extra_eps, CLAAS_ERR_FORMAT, "epsilon"},
    {"llama.rope.freq_base", NULL, extra_theta, CLAAS_ERR_FORMAT, "freq_base"},
    {NULL, NULL, extra_rope_part, CLAAS_ERR_UNSUPPORTED, "part of the head"},
    {NULL, NULL, extra_rope_kind, CLAAS_ERR_UNSUPPORTED, "'longrope'"},
    {NULL, NULL, extra_alignment_3, CLAAS_ERR_FORMAT, "power of two"},
    {NULL, NULL, extra_alignment_0, CLAAS_ERR_FORMAT, "general.alignment"},
    {NULL, NULL, extra_tensor_twice, CLAAS_ERR_FORMAT, "is there twice"},
    {NULL, NULL, extra_tensor_unknown, CLAAS_ERR_UNSUPPORTED, "'blk.0.attn_q.bias' has no place"},
    {NULL, NULL, extra_tensor_layer, CLAAS_ERR_UNSUPPORTED, "has no place"},
    {NULL, NULL, extra_tensor_type, CLAAS_ERR_UNSUPPORTED, "encoding 16"},
    {NULL, NULL, extra_tensor_dims_0, CLAAS_ERR_FORMAT, "dimensions"},
    {NULL, NULL, extra_tensor_dims_5, CLAAS_ERR_FORMAT, "dimensions"},
    {NULL, NULL, extra_tensor_zero, CLAAS_ERR_FORMAT, "bad shape"},
    {NULL, NULL, extra_tensor_huge, CLAAS_ERR_FORMAT, "bad shape"},
    {NULL, NULL, extra_tensor_negative, CLAAS_ERR_FORMAT, "bad shape"},
    {NULL, NULL, extra_tensor_block, CLAAS_ERR_FORMAT, "whole number of blocks"},
    {NULL, NULL, extra_tensor_offset, CLAAS_ERR_FORMAT, "hole"},
    {NULL, NULL, extra_tensor_beyond, CLAAS_ERR_FORMAT, "ends 128 bytes too early"},
    {NULL, "blk.0.ffn_up.weight", NULL, CLAAS_ERR_FORMAT, "up_proj.weight' is missing"},
    {NULL, "blk.0.ffn_up.weight", extra_tensor_shape, CLAAS_ERR_FORMAT, "the config asks for"},
    {NULL, "token_embd.weight", NULL, CLAAS_ERR_FORMAT, "no embedding"},
    {NULL, "token_embd.weight", extra_embedding_1d, CLAAS_ERR_FORMAT, "no embedding"},
    {NULL, "token_embd.weight", extra_embedding_small, CLAAS_ERR_FORMAT, "261 tokens for"},
    {NULL, NULL, extra_rope_freqs, CLAAS_ERR_UNSUPPORTED, "Llama 3's scaling"},
    {NULL, NULL, extra_rope_freqs_shape, CLAAS_ERR_FORMAT, "rope_freqs"},
    {"tokenizer.ggml.model", NULL, NULL, CLAAS_ERR_UNSUPPORTED, "tokenizer ''"},
    {"tokenizer.ggml.model", NULL, extra_tokenizer_model, CLAAS_ERR_UNSUPPORTED, "'llama'"},
    {"tokenizer.ggml.pre", NULL, NULL, CLAAS_ERR_UNSUPPORTED, "pre-tokenizer"},
    {"tokenizer.ggml.pre", NULL, extra_tokenizer_pre, CLAAS_ERR_UNSUPPORTED, "'tekken'"},
    {"tokenizer.ggml.tokens", NULL, NULL, CLAAS_ERR_FORMAT, "no vocabulary"},
    {"tokenizer.ggml.tokens", NULL, extra_tokens_type, CLAAS_ERR_FORMAT, "tokenizer.ggml.tokens"},
    {"tokenizer.ggml.tokens", NULL, extra_tokens_utf8, CLAAS_ERR_FORMAT, "UTF-8"},
    {"tokenizer.ggml.token_type", NULL, extra_types_count, CLAAS_ERR_FORMAT, "2 token types"},
    {"tokenizer.ggml.merges", NULL, NULL, CLAAS_ERR_FORMAT, "merges' is missing"},
    {"tokenizer.ggml.merges", NULL, extra_merge_space, CLAAS_ERR_FORMAT, "merge 0"},
    {"tokenizer.ggml.merges", NULL, extra_merge_half, CLAAS_ERR_FORMAT, "merge 0"},
    {"tokenizer.chat_template", NULL, extra_template, CLAAS_ERR_UNSUPPORTED, ""},
    {"tokenizer.chat_template", NULL, extra_template_utf8, CLAAS_ERR_FORMAT, "UTF-8"},
};

static void test_gguf_bad(void **state)
{
    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(bad_ggufs); i++) {
        const struct bad_gguf *bad = &bad_ggufs[i];
        struct gguf_builder b;
        struct claas_buf image;

        builder_init(&b);
        claas_buf_init(&image, 1 << 24);
        b.skip_pair = bad->skip_pair;
        b.skip_tensor = bad->skip_tensor;
        builder_add_base(&b);
        b.skip_pair = b.skip_tensor = NULL;
        if (bad->extra)
            bad->extra(&b);
        builder_finish(&b, &image);
        int rc = load_image(image.data, image.length);
        if (rc != bad->code || !strstr(claas_error_text(), bad->text))
            fail_msg("case %zu (\"%s\"): %d \"%s\", expected %d", i, bad->text, rc,
                     rc < 0 ? claas_error_text() : "", bad->code);
        builder_done(&b);
        claas_buf_done(&image);
    }
}

static void test_gguf_truncated(void **state)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf image;

    (void)state;
    base_image(&image);
    assert_int_equal(load_image(image.data, image.length), 0);
    for (size_t length = 0; length < image.length; length++) {
        int rc = load_image(image.data, length);

        /* Only the padding after the last tensor may be missing. */
        if (rc >= 0 && length < image.length - 32)
            fail_msg("%zu of %zu bytes were accepted", length, image.length);
    }
}

/* Half of the flips in the descriptions, half anywhere. */
static void test_gguf_flipped(void **state)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf image;
    size_t header;
    int accepted = 0;

    (void)state;
    base_image(&image);
    header = image.length - 15000;
    for (uint64_t i = 0; i < 10000; i++) {
        uint32_t words[4];
        size_t range = i & 1 ? image.length : header;

        claas_philox(2, 0, i, words);
        size_t at = words[0] % range;
        char before = image.data[at];
        image.data[at] = (char)(before ^ (1 + words[1] % 255));
        int rc = load_image(image.data, image.length);
        if (rc == CLAAS_ERR_NO_MEMORY || rc == CLAAS_ERR_INTERNAL)
            fail_msg("a flip at %zu: %s", at, claas_error_text());
        accepted += rc >= 0;
        image.data[at] = before;
    }
    assert_true(accepted > 1000 && accepted < 10000);
}

static void test_gguf_rope_freqs(void **state)
{
    struct gguf_builder b;
    struct claas_buf image;
    CLAAS_AUTO(claas_model_free) claas_model_t *model = claas_alloc(1, sizeof(*model));
    CLAAS_AUTO_FREE char *name = NULL;
    float factors[8];

    (void)state;
    builder_init(&b);
    claas_buf_init(&image, 1 << 24);
    b.skip_pair = "llama.rope.freq_base";
    builder_add_base(&b);
    b.skip_pair = NULL;
    pair_f32(&b, "llama.rope.freq_base", 500000.0f);
    add_info(&b, "rope_freqs.weight", 1, (const uint64_t[]){8}, CLAAS_TYPE_F32, UINT64_MAX);
    for (int i = 0; i < 8; i++) {
        /* As convert_hf_to_gguf computes it for Llama 3.2 (factor 32). */
        double frequency = pow(500000.0, -2.0 * i / 16), wave = 2 * M_PI / frequency;
        double smooth = (8192 / wave - 1.0) / 3.0;

        factors[i] = wave < 2048   ? 1.0f
                     : wave > 8192 ? 32.0f
                                   : (float)(1 / ((1 - smooth) / 32 + smooth));
    }
    claas_buf_add(&b.data, factors, sizeof(factors));
    builder_finish(&b, &image);
    if (claas_gguf_load(model, (const uint8_t *)image.data, image.length, NULL, &name) < 0)
        fail_msg("%s", claas_error_text());
    assert_string_equal(name, "Tiny Test");
    assert_int_equal(model->config.rope_kind, CLAAS_ROPE_LLAMA3);
    assert_true(model->config.rope_factor == 32.0f);
    assert_int_equal(model->config.rope_original_context, 8192);
    builder_done(&b);
    claas_buf_done(&image);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gguf_open),       cmocka_unit_test(test_gguf_bad),
        cmocka_unit_test(test_gguf_truncated),  cmocka_unit_test(test_gguf_flipped),
        cmocka_unit_test(test_gguf_rope_freqs), cmocka_unit_test(test_gguf_families),
    };

    return cmocka_run_group_tests_name("gguf", tests, NULL, NULL);
}
