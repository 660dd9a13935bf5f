/* Builds small GGUF images in memory, good ones and bad ones, for tests of the reader.
 *
 * The base image is a llama of one layer (hidden 32, heads 2/1 of 16, mixed encodings, byte-level
 * vocabulary). A test leaves out a key or a tensor by name (`skip_…`), adds its own, or overrides
 * header fields, then assembles. */
#ifndef GGUF_BUILDER_H
#define GGUF_BUILDER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include "claas/buf.h"
#include "claas/model.h"
#include "claas/random.h"

struct gguf_builder {
    struct claas_buf pairs, infos, data;
    uint64_t pair_count, tensor_count; /* as the header will say */
    uint32_t version;
    const char *magic;
    const char *skip_pair, *skip_tensor;
    const char *arch;
};

static inline void builder_init(struct gguf_builder *b)
{
    memset(b, 0, sizeof(*b));
    claas_buf_init(&b->pairs, 1 << 24);
    claas_buf_init(&b->infos, 1 << 24);
    claas_buf_init(&b->data, 1 << 24);
    b->version = 3;
    b->magic = "GGUF";
    b->arch = "llama";
}

static inline void builder_done(struct gguf_builder *b)
{
    claas_buf_done(&b->pairs);
    claas_buf_done(&b->infos);
    claas_buf_done(&b->data);
}

static inline void put_u32(struct claas_buf *buf, uint32_t value)
{
    claas_buf_add(buf, &value, sizeof(value));
}

static inline void put_u64(struct claas_buf *buf, uint64_t value)
{
    claas_buf_add(buf, &value, sizeof(value));
}

static inline void put_text(struct claas_buf *buf, const char *text)
{
    put_u64(buf, strlen(text));
    claas_buf_add_text(buf, text);
}

/* Key and type; false when the test skips the key. */
static inline bool begin_pair(struct gguf_builder *b, const char *key, uint32_t type)
{
    if (b->skip_pair && strcmp(b->skip_pair, key) == 0)
        return false;
    put_text(&b->pairs, key);
    put_u32(&b->pairs, type);
    b->pair_count++;
    return true;
}

static inline void pair_u32(struct gguf_builder *b, const char *key, uint32_t value)
{
    if (begin_pair(b, key, 4))
        put_u32(&b->pairs, value);
}

static inline void pair_u64(struct gguf_builder *b, const char *key, uint64_t value)
{
    if (begin_pair(b, key, 10))
        put_u64(&b->pairs, value);
}

static inline void pair_f32(struct gguf_builder *b, const char *key, float value)
{
    if (begin_pair(b, key, 6))
        claas_buf_add(&b->pairs, &value, sizeof(value));
}

static inline void pair_text(struct gguf_builder *b, const char *key, const char *value)
{
    if (begin_pair(b, key, 8))
        put_text(&b->pairs, value);
}

static inline void pair_texts(struct gguf_builder *b, const char *key, const char *const *texts,
                              size_t count)
{
    if (!begin_pair(b, key, 9))
        return;
    put_u32(&b->pairs, 8);
    put_u64(&b->pairs, count);
    for (size_t i = 0; i < count; i++)
        put_text(&b->pairs, texts[i]);
}

static inline void pair_i32s(struct gguf_builder *b, const char *key, const int32_t *values,
                             size_t count)
{
    if (!begin_pair(b, key, 9))
        return;
    put_u32(&b->pairs, 5);
    put_u64(&b->pairs, count);
    claas_buf_add(&b->pairs, values, count * sizeof(values[0]));
}

/* Only the description; `offset` UINT64_MAX = where the data ends now. */
static inline void add_info(struct gguf_builder *b, const char *name, uint32_t dims,
                            const uint64_t *shape, uint32_t type, uint64_t offset)
{
    put_text(&b->infos, name);
    put_u32(&b->infos, dims);
    for (uint32_t i = 0; i < dims; i++)
        put_u64(&b->infos, shape[i]);
    put_u32(&b->infos, type);
    put_u64(&b->infos, offset == UINT64_MAX ? b->data.length : offset);
    b->tensor_count++;
}

/* Random bytes whose float16 (and float32) fields are finite: no byte has all exponent bits set. */
static inline void add_tensor(struct gguf_builder *b, const char *name, uint32_t type,
                              uint64_t columns, uint64_t rows)
{
    const uint64_t shape[2] = {columns, rows};
    enum claas_tensor_type t = (enum claas_tensor_type)type;

    if (b->skip_tensor && strcmp(b->skip_tensor, name) == 0)
        return;
    add_info(b, name, rows > 0 ? 2 : 1, shape, type, UINT64_MAX);
    size_t bytes = (size_t)(columns * (rows > 0 ? rows : 1)) /
                   (size_t)claas_type_block_elements(t) * (size_t)claas_type_block_bytes(t);
    for (size_t i = 0; i < bytes; i++) {
        char byte = (char)(claas_random_uniform(1, b->tensor_count, i) * 256.0f);

        byte = (char)(byte & 0x3b);
        claas_buf_add(&b->data, &byte, 1);
    }
    while (b->data.length % 32 != 0)
        claas_buf_add(&b->data, "", 1);
}

/* GPT-2's text of a byte. */
static inline void byte_text(int byte, char text[8])
{
    int code = 0x100;

    for (int i = 0; i <= byte; i++) {
        bool printable = (i >= 0x21 && i <= 0x7e) || (i >= 0xa1 && i <= 0xac) || i >= 0xae;

        if (i == byte && printable)
            code = i;
        else if (i < byte && !printable)
            code++;
    }
    snprintf(text, 8, code < 0x80 ? "%c" : "%c%c", code < 0x80 ? code : 0xc0 | code >> 6,
             0x80 | (code & 63));
}

#define BUILDER_VOCAB 261

static inline void builder_add_vocab(struct gguf_builder *b)
{
    static const char *const merges[] = {"h e", "l l"};
    static char texts[256][8];
    const char *tokens[BUILDER_VOCAB];
    int32_t types[BUILDER_VOCAB];

    for (int i = 0; i < 256; i++) {
        byte_text(i, texts[i]);
        tokens[i] = texts[i];
        types[i] = 1;
    }
    tokens[256] = "<|endoftext|>";
    tokens[257] = "<|im_start|>";
    tokens[258] = "<|im_end|>";
    types[256] = types[257] = types[258] = 3;
    tokens[259] = "he";
    tokens[260] = "ll";
    types[259] = types[260] = 1;
    pair_texts(b, "tokenizer.ggml.tokens", tokens, BUILDER_VOCAB);
    pair_i32s(b, "tokenizer.ggml.token_type", types, BUILDER_VOCAB);
    pair_texts(b, "tokenizer.ggml.merges", merges, 2);
}

#define BUILDER_TEMPLATE                                                                           \
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "                    \
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"         \
    "{{ '<|im_start|>assistant\n' }}{% endif %}"

/* The shape's keys below an architecture. */
static inline void builder_add_shape(struct gguf_builder *b)
{
    static const struct {
        const char *key;
        uint32_t value;
    } rows[] = {{"block_count", 1},          {"context_length", 128},
                {"embedding_length", 32},    {"feed_forward_length", 32},
                {"attention.head_count", 2}, {"attention.head_count_kv", 1}};
    char key[128];

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        snprintf(key, sizeof(key), "%s.%s", b->arch, rows[i].key);
        pair_u32(b, key, rows[i].value);
    }
    snprintf(key, sizeof(key), "%s.rope.freq_base", b->arch);
    pair_f32(b, key, 10000.0f);
    snprintf(key, sizeof(key), "%s.attention.layer_norm_rms_epsilon", b->arch);
    pair_f32(b, key, 1e-5f);
}

static inline void builder_add_base(struct gguf_builder *b)
{
    pair_text(b, "general.architecture", b->arch);
    pair_text(b, "general.name", "Tiny Test");
    builder_add_shape(b);
    pair_text(b, "tokenizer.ggml.model", "gpt2");
    pair_text(b, "tokenizer.ggml.pre", "smollm");
    builder_add_vocab(b);
    pair_u32(b, "tokenizer.ggml.eos_token_id", 258);
    pair_u32(b, "tokenizer.ggml.bos_token_id", 257);
    pair_text(b, "tokenizer.chat_template", BUILDER_TEMPLATE);
    add_tensor(b, "token_embd.weight", CLAAS_TYPE_Q8_0, 32, BUILDER_VOCAB);
    add_tensor(b, "output_norm.weight", CLAAS_TYPE_F32, 32, 0);
    add_tensor(b, "blk.0.attn_norm.weight", CLAAS_TYPE_F32, 32, 0);
    add_tensor(b, "blk.0.attn_q.weight", CLAAS_TYPE_Q4_0, 32, 32);
    add_tensor(b, "blk.0.attn_k.weight", CLAAS_TYPE_Q4_1, 32, 16);
    add_tensor(b, "blk.0.attn_v.weight", CLAAS_TYPE_Q5_0, 32, 16);
    add_tensor(b, "blk.0.attn_output.weight", CLAAS_TYPE_Q5_1, 32, 32);
    add_tensor(b, "blk.0.ffn_norm.weight", CLAAS_TYPE_F32, 32, 0);
    add_tensor(b, "blk.0.ffn_gate.weight", CLAAS_TYPE_F16, 32, 32);
    add_tensor(b, "blk.0.ffn_up.weight", CLAAS_TYPE_BF16, 32, 32);
    add_tensor(b, "blk.0.ffn_down.weight", CLAAS_TYPE_Q8_0, 32, 32);
}

static inline void builder_finish(struct gguf_builder *b, struct claas_buf *out)
{
    claas_buf_add(out, b->magic, 4);
    put_u32(out, b->version);
    put_u64(out, b->tensor_count);
    put_u64(out, b->pair_count);
    claas_buf_add(out, b->pairs.data, b->pairs.length);
    claas_buf_add(out, b->infos.data, b->infos.length);
    while (out->length % 32 != 0)
        claas_buf_add(out, "", 1);
    claas_buf_add(out, b->data.data, b->data.length);
}

#endif
