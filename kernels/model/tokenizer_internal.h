/* The parts of the tokenizer, private to kernels/model. The way of a text:
 *
 *   tokenizer.c, tokenizer_added.c   added tokens are cut out; what lies between are stretches
 *   normalize.c                      NFC, where the family asks for it
 *   pretokenize.c                    stretches are cut into words
 *   bpe.c, bpe_merge.c               words become ids
 *
 * Words are raw bytes all the way: GPT-2's byte alphabet is undone once, when the vocabulary is
 * read (tokenizer_build.c), so that encoding never translates anything. */
#ifndef CLAAS_TOKENIZER_INTERNAL_H
#define CLAAS_TOKENIZER_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "claas/tokenizer.h"

/* --- a list of ids that grows --- */

struct claas_id_list {
    int32_t *ids; /* freed with free() */
    size_t count, capacity;
};
int claas_id_list_reserve(struct claas_id_list *list, size_t more);
void claas_id_list_done(struct claas_id_list *list);

/* --- normalisation (normalize.c) --- */

/* NFC of valid UTF-8. *ret is NULL when the text is certain to be its own NFC, else freed with
 * free(). */
int claas_nfc(const char *text, size_t length, char **ret, size_t *ret_length);

/* --- cutting into words (pretokenize.c) --- */

struct claas_pretoken_pattern; /* shared by threads */
struct claas_pretoken_cursor;  /* one per running encode */

int claas_pretoken_pattern_new(enum claas_pretokenizer kind, struct claas_pretoken_pattern **ret);
void claas_pretoken_pattern_free(struct claas_pretoken_pattern **pattern);
/* The kind whose original regular expression (as in tokenizer.json) this is, or -1. */
int claas_pretokenizer_from_regex(const char *regex);
int claas_pretoken_cursor_new(const struct claas_pretoken_pattern *pattern,
                              struct claas_pretoken_cursor **ret);
void claas_pretoken_cursor_free(struct claas_pretoken_cursor **cursor);
/* End of the word that starts at `start` < `length`; the text is valid UTF-8. */
int claas_pretoken_next(struct claas_pretoken_cursor *cursor, const char *text, size_t length,
                        size_t start, size_t *ret_end);

/* --- byte pair encoding (bpe.c) --- */

/* A merge, found by the ids of its halves; `key` is left << 32 | right, ~0 marks a free slot. */
struct claas_merge {
    uint64_t key;
    uint32_t rank; /* lower merges first */
    int32_t result;
};

/* Spreads a key over all bits (Fibonacci hashing). */
static inline uint64_t claas_hash_mix(uint64_t value)
{
    value *= UINT64_C(0x9E3779B97F4A7C15);
    return value ^ value >> 29;
}
/* Slots of a hash table: a power of two of at least twice the entries, so probes are short and
 * always end. */
uint64_t claas_table_slots(size_t entries);

struct claas_bpe {
    int32_t byte_ids[256];      /* the token of a single byte, -1 if the vocabulary lacks it */
    int32_t unknown;            /* stands for a byte without a token; -1: such bytes vanish */
    bool fuse_unknown;          /* neighbouring unknowns are one token */
    struct claas_merge *merges; /* open addressing */
    uint64_t merge_mask;
    /* Words that are a token: slot = hash tag and id + 1, 0 marks a free slot. */
    struct claas_word_slot {
        uint32_t tag;
        int32_t id_plus_one;
    } * words;
    uint64_t word_mask;
    uint8_t *whole;          /* [vocab] 1: this word as a whole encodes to its own token */
    const char *bytes;       /* of all tokens, one after the other; borrowed */
    const uint32_t *offsets; /* [vocab + 1]; borrowed */
};

int claas_bpe_init(struct claas_bpe *bpe, const char *bytes, const uint32_t *offsets,
                   size_t vocab_count, size_t merge_count);
void claas_bpe_done(struct claas_bpe *bpe);
/* Enters a token's bytes; FORMAT if another token has the same. */
int claas_bpe_add_word(struct claas_bpe *bpe, int32_t id);
int32_t claas_bpe_find_word(const struct claas_bpe *bpe, const char *word, size_t length);
/* Enters a merge; a later one of the same pair replaces the earlier, as in the original. */
void claas_bpe_add_merge(struct claas_bpe *bpe, int32_t left, int32_t right, uint32_t rank,
                         int32_t result);
/* Once all words and merges are in: finds out which words need no merging at all. */
int claas_bpe_settle(struct claas_bpe *bpe, size_t vocab_count, bool ignore_merges);

/* Merging alone, without looking the word up (bpe_merge.c). */
struct claas_bpe_scratch;
int claas_bpe_reserve_merges(struct claas_bpe *bpe, size_t count);
int claas_bpe_merge(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                    const char *word, size_t length, struct claas_id_list *out);

/* Scratch of one running encode; zero-initialised, grows to the longest word. */
struct claas_bpe_scratch {
    struct bpe_symbol *symbols;
    size_t symbol_capacity;
    struct bpe_candidate *heap;
    size_t heap_count, heap_capacity;
    struct bpe_cached *cache; /* NULL unless started for a long text */
};
/* Before a text is encoded. */
int claas_bpe_scratch_start(struct claas_bpe_scratch *scratch, size_t text_length);
void claas_bpe_scratch_done(struct claas_bpe_scratch *scratch);
/* Appends the ids of one word. */
int claas_bpe_encode(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                     const char *word, size_t length, struct claas_id_list *out);
#define CLAAS_TEXT_MAX                                                                             \
    ((size_t)1 << 28) /* bytes of one text; places in it fit int32_t even after NFC */

/* --- added tokens (tokenizer_added.c) --- */

struct claas_added_token {
    const char *text; /* as searched for: NFC-normalised when `normalized` */
    uint32_t length;
    int32_t id;
    bool control;    /* not recognised unless the caller asks for special tokens */
    bool normalized; /* searched for in normalised text */
    bool single_word, strip_left, strip_right;
};

/* One set for raw text, one for normalised text; sorted by bytes, so that the longest match at a
 * place is found by narrowing a range. */
struct claas_added_set {
    struct claas_added_token *tokens; /* owned, with their texts */
    size_t count;
    bool first[256]; /* bytes that a token starts with */
};
int claas_added_set_add(struct claas_added_set *set, const struct claas_added_token *token);
/* Sorts; FORMAT if two tokens have the same text. */
int claas_added_set_settle(struct claas_added_set *set);
void claas_added_set_done(struct claas_added_set *set);
const struct claas_added_token *claas_added_set_find(const struct claas_added_set *set,
                                                     const char *text, size_t length);

/* A stretch of text: a token (id >= 0) or plain text to encode (id -1). */
struct claas_stretch {
    size_t start, end;
    int32_t id;
};
struct claas_added_cursor {
    const struct claas_added_set *set;
    const char *text;
    size_t length;
    size_t search, done; /* where the next search starts; what was handed out */
    bool parse_special;
    struct claas_stretch held; /* a token whose text before it was handed out first */
    bool has_held;
};
/* The stretches of a text from left to right; false after the last. */
bool claas_added_next(struct claas_added_cursor *cursor, struct claas_stretch *ret);

/* --- the whole --- */

struct claas_tokenizer {
    size_t vocab_count;
    char *bytes;       /* of all tokens */
    uint32_t *offsets; /* [vocab_count + 1] */
    uint8_t *control;  /* [vocab_count] */
    struct claas_bpe bpe;
    struct claas_pretoken_pattern *pattern;
    struct claas_added_set raw_added, normalized_added;
    bool normalize_nfc;
    int32_t bos; /* -1 unless prompts start with it */
};

/* What tokenizer.json says beyond claas_tokenizer_source. */
struct claas_tokenizer_extra {
    const struct claas_added_token
        *added; /* flags per added token; its text is the vocabulary entry's */
    size_t added_count;
    int32_t unknown; /* model.unk_token, -1 for none */
    bool fuse_unknown;
};
/* `extra` may be NULL: every special entry is then searched for in raw text, without stripping. */
int claas_tokenizer_build(const struct claas_tokenizer_source *source,
                          const struct claas_tokenizer_extra *extra, claas_tokenizer_t **ret);

#endif
