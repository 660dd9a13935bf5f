/* From a vocabulary and merges to a tokenizer: undoes GPT-2's byte alphabet, enters words and
 * merges into their hash tables, sorts the added tokens. Everything is checked here, so that
 * encoding has nothing left to refuse.
 *
 * GPT-2's alphabet shows each byte as one printable character: 0x21-0x7E, 0xA1-0xAC and 0xAE-0xFF
 * stand for themselves, the other 68 bytes, in order, for U+0100 to U+0143. */
#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

#define VOCAB_MAX ((size_t)1 << 24)
#define MERGE_MAX ((size_t)1 << 26)

static int byte_of_character(ucs4_t c)
{
    if ((c >= 0x21 && c <= 0x7e) || (c >= 0xa1 && c <= 0xff && c != 0xad))
        return (int)c;
    if (c < 0x100 || c > 0x143)
        return -1;
    c -= 0x100;
    if (c <= 0x20) /* 33 control characters and the space */
        return (int)c;
    return c < 67 ? (int)(0x7f + c - 33) : 0xad;
}

/* Undoes GPT-2's alphabet: bytes of `text` into `out` (room for `length`); SIZE_MAX when a
 * character of the text is not in the alphabet. */
static size_t decode_alphabet(const char *text, size_t length, char *out)
{
    size_t count = 0;

    for (size_t at = 0; at < length;) {
        ucs4_t c;
        int taken = u8_mbtoucr(&c, (const uint8_t *)text + at, length - at);
        int byte = taken > 0 ? byte_of_character(c) : -1;

        if (byte < 0)
            return SIZE_MAX;
        out[count++] = (char)byte;
        at += (size_t)taken;
    }
    return count;
}

/* --- pieces --- */

static int check_source(const struct claas_tokenizer_source *source, uint64_t *ret_bytes)
{
    uint64_t bytes = 0;

    if (source->vocab_count == 0 || source->vocab_count > VOCAB_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "a vocabulary of %zu tokens; 1 to %zu are possible",
                          source->vocab_count, VOCAB_MAX);
    if (source->merge_count > MERGE_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "%zu merges, the limit is %zu", source->merge_count,
                          MERGE_MAX);
    for (size_t i = 0; i < source->vocab_count; i++)
        if (source->vocab[i].text)
            bytes += source->vocab[i].length;
    if (bytes >= UINT32_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "a vocabulary of %llu bytes", (unsigned long long)bytes);
    *ret_bytes = bytes;
    return 0;
}

/* Fills bytes, offsets and control. A text outside the alphabet is kept as it is and is no word. */
static int read_pieces(struct claas_tokenizer *tokenizer,
                       const struct claas_tokenizer_source *source, uint8_t *is_word)
{
    size_t used = 0;
    uint64_t bytes = 0;
    int rc = check_source(source, &bytes);

    if (rc < 0)
        return rc;
    tokenizer->vocab_count = source->vocab_count;
    tokenizer->bytes = CLAAS_NEW_ARRAY(char, bytes + 1);
    tokenizer->offsets = CLAAS_NEW_ARRAY(uint32_t, source->vocab_count + 1);
    tokenizer->control = CLAAS_NEW_ARRAY(uint8_t, source->vocab_count);
    if (!tokenizer->bytes || !tokenizer->offsets || !tokenizer->control)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < source->vocab_count; i++) {
        const struct claas_vocab_entry *entry = &source->vocab[i];
        size_t count = SIZE_MAX;

        tokenizer->offsets[i] = (uint32_t)used;
        tokenizer->control[i] = entry->control;
        if (!entry->text || entry->length == 0)
            continue;
        if (!entry->special)
            count = decode_alphabet(entry->text, entry->length, tokenizer->bytes + used);
        is_word[i] = count != SIZE_MAX;
        if (!is_word[i]) {
            memcpy(tokenizer->bytes + used, entry->text, entry->length);
            count = entry->length;
        }
        used += count;
    }
    tokenizer->offsets[source->vocab_count] = (uint32_t)used;
    return 0;
}

/* --- merges --- */

/* The id of a merge's half or result, spelt in the byte alphabet; special tokens may be part of
 * merges too. */
static int32_t find_text(const struct claas_tokenizer *tokenizer, const char *text, size_t length,
                         char *scratch)
{
    const struct claas_added_token *token;
    size_t count = decode_alphabet(text, length, scratch);
    int32_t id = -1;

    if (count != SIZE_MAX && count > 0)
        id = claas_bpe_find_word(&tokenizer->bpe, scratch, count);
    if (id >= 0)
        return id;
    token = claas_added_set_find(&tokenizer->raw_added, text, length);
    return token ? token->id : -1;
}

static int read_merge(struct claas_tokenizer *tokenizer, const char *left, const char *right,
                      size_t rank)
{
    size_t left_length = strlen(left), right_length = strlen(right);
    size_t length = left_length + right_length;
    char small[512];
    CLAAS_AUTO_FREE char *large = NULL;
    char *joined = small;
    int32_t left_id, right_id, result;

    if (length > sizeof(small) / 2) { /* half for the text, half for its bytes */
        joined = large = claas_alloc(length, 2);
        if (!large)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    memcpy(joined, left, left_length);
    memcpy(joined + left_length, right, right_length);
    left_id = find_text(tokenizer, left, left_length, joined + length);
    right_id = find_text(tokenizer, right, right_length, joined + length);
    result = find_text(tokenizer, joined, length, joined + length);
    if (left_id < 0 || right_id < 0 || result < 0)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "merge %zu ('%.64s' '%.64s'): %s is not in the vocabulary", rank, left,
                          right,
                          left_id < 0    ? "the left half"
                          : right_id < 0 ? "the right half"
                                         : "what they make");
    claas_bpe_add_merge(&tokenizer->bpe, left_id, right_id, (uint32_t)rank, result);
    return 0;
}

static int read_words_and_merges(struct claas_tokenizer *tokenizer,
                                 const struct claas_tokenizer_source *source,
                                 const uint8_t *is_word)
{
    int rc = claas_bpe_init(&tokenizer->bpe, tokenizer->bytes, tokenizer->offsets,
                            source->vocab_count, source->merge_count);

    for (size_t i = 0; rc >= 0 && i < source->vocab_count; i++)
        if (is_word[i])
            rc = claas_bpe_add_word(&tokenizer->bpe, (int32_t)i);
    for (size_t i = 0; rc >= 0 && i < source->merge_count; i++)
        rc = read_merge(tokenizer, source->merge_left[i], source->merge_right[i], i);
    return rc;
}

/* --- added tokens --- */

static int add_token(struct claas_tokenizer *tokenizer, struct claas_added_token token)
{
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length = 0;
    int rc;

    if (!token.normalized)
        return claas_added_set_add(&tokenizer->raw_added, &token);
    if (tokenizer->normalize_nfc) {
        rc = claas_nfc(token.text, token.length, &text, &length);
        if (rc < 0)
            return rc;
    }
    if (text) {
        token.text = text;
        token.length = (uint32_t)length;
    }
    return claas_added_set_add(&tokenizer->normalized_added, &token);
}

static int read_added(struct claas_tokenizer *tokenizer,
                      const struct claas_tokenizer_source *source,
                      const struct claas_tokenizer_extra *extra)
{
    size_t count = extra ? extra->added_count : source->vocab_count;
    int rc = 0;

    for (size_t i = 0; rc >= 0 && i < count; i++) {
        struct claas_added_token token = {.id = (int32_t)i};
        const struct claas_vocab_entry *entry;

        if (extra)
            token = extra->added[i];
        entry = &source->vocab[token.id];
        if (!entry->special || !entry->text || entry->length == 0)
            continue;
        if (u8_check((const uint8_t *)entry->text, entry->length))
            return claas_fail(CLAAS_ERR_FORMAT, "special token %d is not valid UTF-8", token.id);
        token.text = entry->text;
        token.length = (uint32_t)entry->length;
        token.control = entry->control;
        rc = add_token(tokenizer, token);
    }
    if (rc >= 0)
        rc = claas_added_set_settle(&tokenizer->raw_added);
    if (rc >= 0)
        rc = claas_added_set_settle(&tokenizer->normalized_added);
    return rc;
}

/* --- the whole --- */

int claas_tokenizer_build(const struct claas_tokenizer_source *source,
                          const struct claas_tokenizer_extra *extra, claas_tokenizer_t **ret)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = CLAAS_NEW(claas_tokenizer_t);
    CLAAS_AUTO_FREE uint8_t *is_word = CLAAS_NEW_ARRAY(uint8_t, source->vocab_count + 1);
    int rc;

    if (!tokenizer || !is_word)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    tokenizer->normalize_nfc = source->normalize_nfc;
    tokenizer->bos = source->add_bos ? source->bos : -1;
    if (tokenizer->bos >= 0 && (size_t)tokenizer->bos >= source->vocab_count)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "the token %d that starts a text is not in the"
                          " vocabulary of %zu",
                          tokenizer->bos, source->vocab_count);
    rc = read_pieces(tokenizer, source, is_word);
    if (rc >= 0)
        rc = read_added(tokenizer, source, extra);
    if (rc >= 0)
        rc = read_words_and_merges(tokenizer, source, is_word);
    if (rc < 0)
        return rc;
    if (extra) {
        tokenizer->bpe.unknown = extra->unknown;
        tokenizer->bpe.fuse_unknown = extra->fuse_unknown;
    }
    rc = claas_bpe_settle(&tokenizer->bpe, source->vocab_count, source->ignore_merges);
    if (rc >= 0)
        rc = claas_pretoken_pattern_new(source->pretokenizer, &tokenizer->pattern);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(tokenizer);
    return 0;
}

int claas_tokenizer_new(const struct claas_tokenizer_source *source, claas_tokenizer_t **ret)
{
    return claas_tokenizer_build(source, NULL, ret);
}

void claas_tokenizer_free(claas_tokenizer_t **tokenizer)
{
    claas_tokenizer_t *t = *tokenizer;

    if (!t)
        return;
    claas_added_set_done(&t->raw_added);
    claas_added_set_done(&t->normalized_added);
    claas_pretoken_pattern_free(&t->pattern);
    claas_bpe_done(&t->bpe);
    free(t->bytes);
    free(t->offsets);
    free(t->control);
    free(t);
    *tokenizer = NULL;
}
