/* Byte-level BPE, identical to Hugging Face's `tokenizers` for the supported families. Immutable
 * after construction; every function may be called from any thread. */
#ifndef CLAAS_TOKENIZER_H
#define CLAAS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct claas_tokenizer claas_tokenizer_t;

/* How text is cut before BPE. */
enum claas_pretokenizer {
    CLAAS_PRETOKENIZER_GPT2,
    CLAAS_PRETOKENIZER_SMOLLM, /* single digits first, then GPT-2's pattern */
    CLAAS_PRETOKENIZER_QWEN2,
    CLAAS_PRETOKENIZER_LLAMA3,
};

/* One vocabulary entry as files hold it; `text` uses GPT-2's byte alphabet unless `special`.
 * Borrowed. */
struct claas_vocab_entry {
    const char *text;
    size_t length;
    bool special; /* cut out of the text before pre-tokenisation */
    bool control; /* never shown to a reader: <|im_end|> and the like */
};

/* What a file reader hands over; everything is borrowed during construction only. */
struct claas_tokenizer_source {
    enum claas_pretokenizer pretokenizer;
    const struct claas_vocab_entry *vocab; /* index = token id; text NULL for a hole */
    size_t vocab_count;
    const char *const *merge_left; /* merges in rank order, in the byte alphabet */
    const char *const *merge_right;
    size_t merge_count;
    bool normalize_nfc;
    bool ignore_merges;
    int32_t bos; /* what claas_tokenizer_bos answers when add_bos; -1 for none */
    bool add_bos;
};

int claas_tokenizer_new(const struct claas_tokenizer_source *source, claas_tokenizer_t **ret);
/* tokenizer.json, already parsed into memory. */
int claas_tokenizer_from_json(const char *json, size_t length, claas_tokenizer_t **ret);
void claas_tokenizer_free(claas_tokenizer_t **tokenizer);

/* Ids of a text (valid UTF-8, else FORMAT). `parse_special`: "<|im_end|>" in the text is that
 * token; without it user text cannot forge one (added tokens that are not `control`, such as
 * "<think>", count either way). *ret_ids is freed with free(). No BOS is added. */
int claas_tokenizer_encode(const claas_tokenizer_t *tokenizer, const char *text, size_t length,
                           bool parse_special, int32_t **ret_ids, size_t *ret_count);
/* The raw bytes of one token (control tokens included); *ret_length may be 0. Borrowed from the
 * tokenizer. */
const char *claas_tokenizer_piece(const claas_tokenizer_t *tokenizer, int32_t id,
                                  size_t *ret_length);
/* Bytes of a sequence, control tokens left out when `skip_control`; free with free(). Ids outside
 * the vocabulary (padded rows of the embedding) are nothing. May end inside a UTF-8 character:
 * streaming code holds such bytes back. */
int claas_tokenizer_decode(const claas_tokenizer_t *tokenizer, const int32_t *ids, size_t count,
                           bool skip_control, char **ret_text, size_t *ret_length);
size_t claas_tokenizer_vocab_count(const claas_tokenizer_t *tokenizer);
bool claas_tokenizer_is_control(const claas_tokenizer_t *tokenizer, int32_t id);
/* The id of a special token's text, -1 if there is none. */
int32_t claas_tokenizer_special(const claas_tokenizer_t *tokenizer, const char *text);
/* The token that a plain prompt of this model starts with (Llama 3: <|begin_of_text|>), -1 for
 * none. A rendered chat holds it already. */
int32_t claas_tokenizer_bos(const claas_tokenizer_t *tokenizer);

#endif
