/* Byte pair encoding (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword
 * Units"): which words are in the vocabulary, and how a word becomes ids.
 *
 * Most words of a text are a token that their own merges lead to. Which ones is found out once,
 * when the vocabulary is read; such a word costs one hash look-up, and there is no state that
 * threads would have to share. Other words are merged (bpe_merge.c), and long texts remember the
 * recent ones for the time of their own encoding. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

#define CACHE_FROM   16384 /* bytes of text: below it clearing the cache costs more than it saves */
#define CACHE_SLOTS  2048
#define CACHED_BYTES 22 /* longest word kept */
#define CACHED_IDS   10 /* with these a slot is one cache line */

/* --- hashes --- */

static uint64_t load(const char *bytes, size_t count)
{
    uint64_t value = 0;

    memcpy(&value, bytes, count);
    return value;
}

static uint64_t hash_word(const char *word, size_t length)
{
    uint64_t hash = claas_hash_mix(length + 1);

    if (length >= 8) {
        for (size_t i = 0; i + 8 < length; i += 8)
            hash = claas_hash_mix(hash ^ load(word + i, 8));
        return claas_hash_mix(hash ^ load(word + length - 8, 8));
    }
    /* Overlapping loads of a fixed width are cheaper than a loop over the bytes. */
    if (length >= 4)
        return claas_hash_mix(hash ^ (load(word, 4) | load(word + length - 4, 4) << 32));
    if (length > 0)
        hash ^= (uint64_t)(uint8_t)word[0] | (uint64_t)(uint8_t)word[length / 2] << 8 |
                (uint64_t)(uint8_t)word[length - 1] << 16;
    return claas_hash_mix(hash);
}

uint64_t claas_table_slots(size_t entries)
{
    uint64_t slots = 16;

    while (slots < 2 * (uint64_t)entries)
        slots *= 2;
    return slots;
}

/* --- words --- */

static bool same_word(const struct claas_bpe *bpe, int32_t id, const char *word, size_t length)
{
    uint32_t start = bpe->offsets[id];

    return bpe->offsets[id + 1] - start == length && memcmp(bpe->bytes + start, word, length) == 0;
}

static int32_t find_word(const struct claas_bpe *bpe, const char *word, size_t length,
                         uint64_t hash)
{
    uint32_t tag = (uint32_t)(hash >> 32);

    for (uint64_t i = hash & bpe->word_mask;; i = (i + 1) & bpe->word_mask) {
        const struct claas_word_slot *slot = &bpe->words[i];

        if (slot->id_plus_one == 0)
            return -1;
        if (slot->tag == tag && same_word(bpe, slot->id_plus_one - 1, word, length))
            return slot->id_plus_one - 1;
    }
}

int32_t claas_bpe_find_word(const struct claas_bpe *bpe, const char *word, size_t length)
{
    return find_word(bpe, word, length, hash_word(word, length));
}

int claas_bpe_add_word(struct claas_bpe *bpe, int32_t id)
{
    const char *word = bpe->bytes + bpe->offsets[id];
    size_t length = bpe->offsets[id + 1] - bpe->offsets[id];
    uint64_t hash = hash_word(word, length);
    uint64_t i = hash & bpe->word_mask;
    int32_t other = find_word(bpe, word, length, hash);

    if (other >= 0)
        return claas_fail(CLAAS_ERR_FORMAT, "tokens %d and %d have the same text", other, id);
    while (bpe->words[i].id_plus_one != 0)
        i = (i + 1) & bpe->word_mask;
    bpe->words[i] = (struct claas_word_slot){(uint32_t)(hash >> 32), id + 1};
    if (length == 1)
        bpe->byte_ids[(uint8_t)word[0]] = id;
    return 0;
}

int claas_bpe_init(struct claas_bpe *bpe, const char *bytes, const uint32_t *offsets,
                   size_t vocab_count, size_t merge_count)
{
    uint64_t word_slots = claas_table_slots(vocab_count);

    *bpe = (struct claas_bpe){.unknown = -1, .bytes = bytes, .offsets = offsets};
    bpe->words = CLAAS_NEW_ARRAY(struct claas_word_slot, word_slots);
    bpe->whole = CLAAS_NEW_ARRAY(uint8_t, vocab_count + 1);
    if (!bpe->words || !bpe->whole)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    bpe->word_mask = word_slots - 1;
    for (int i = 0; i < 256; i++)
        bpe->byte_ids[i] = -1;
    return claas_bpe_reserve_merges(bpe, merge_count);
}

void claas_bpe_done(struct claas_bpe *bpe)
{
    free(bpe->merges);
    free(bpe->words);
    free(bpe->whole);
    memset(bpe, 0, sizeof(*bpe));
}

/* --- the words of one text that need merging --- */

/* A text repeats its words, so those that are several tokens are kept, one per slot, for the rest
 * of the run. */
struct bpe_cached {
    char word[CACHED_BYTES];
    uint8_t length, count; /* length 0: a free slot */
    int32_t ids[CACHED_IDS];
};

int claas_bpe_scratch_start(struct claas_bpe_scratch *scratch, size_t text_length)
{
    if (text_length < CACHE_FROM)
        return 0;
    scratch->cache = CLAAS_NEW_ARRAY(struct bpe_cached, CACHE_SLOTS);
    return scratch->cache ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int push_ids(struct claas_id_list *out, const int32_t *ids, size_t count)
{
    int rc = claas_id_list_reserve(out, count);

    if (rc < 0)
        return rc;
    memcpy(out->ids + out->count, ids, count * sizeof(*ids));
    out->count += count;
    return 0;
}

static int merge_cached(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                        const char *word, size_t length, uint64_t hash, struct claas_id_list *out)
{
    struct bpe_cached *slot = &scratch->cache[(hash >> 20) % CACHE_SLOTS];
    size_t before = out->count, count;
    int rc;

    if (slot->length == length && memcmp(slot->word, word, length) == 0)
        return push_ids(out, slot->ids, slot->count);
    rc = claas_bpe_merge(bpe, scratch, word, length, out);
    count = out->count - before;
    if (rc < 0 || count > CACHED_IDS)
        return rc;
    memcpy(slot->word, word, length);
    memcpy(slot->ids, out->ids + before, count * sizeof(*slot->ids));
    slot->length = (uint8_t)length;
    slot->count = (uint8_t)count;
    return 0;
}

int claas_bpe_encode(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                     const char *word, size_t length, struct claas_id_list *out)
{
    uint64_t hash = hash_word(word, length);
    int32_t id = find_word(bpe, word, length, hash);

    if (id >= 0 && bpe->whole[id])
        return push_ids(out, &id, 1);
    if (scratch->cache && length <= CACHED_BYTES)
        return merge_cached(bpe, scratch, word, length, hash, out);
    return claas_bpe_merge(bpe, scratch, word, length, out);
}

int claas_bpe_settle(struct claas_bpe *bpe, size_t vocab_count, bool ignore_merges)
{
    CLAAS_AUTO(claas_bpe_scratch_done) struct claas_bpe_scratch scratch = {NULL};
    CLAAS_AUTO(claas_id_list_done) struct claas_id_list ids = {NULL};
    int rc = 0;

    for (size_t id = 0; rc >= 0 && id < vocab_count; id++) {
        const char *word = bpe->bytes + bpe->offsets[id];
        size_t length = bpe->offsets[id + 1] - bpe->offsets[id];

        if (length == 0 || claas_bpe_find_word(bpe, word, length) != (int32_t)id)
            continue; /* a hole or a special token */
        ids.count = 0;
        if (!ignore_merges)
            rc = claas_bpe_merge(bpe, &scratch, word, length, &ids);
        bpe->whole[id] = ignore_merges || (ids.count == 1 && ids.ids[0] == (int32_t)id);
    }
    return rc;
}

int claas_id_list_reserve(struct claas_id_list *list, size_t more)
{
    size_t capacity = list->capacity ? list->capacity : 64;
    int32_t *ids;

    if (list->capacity - list->count >= more)
        return 0;
    while (capacity - list->count < more)
        capacity *= 2;
    ids = claas_realloc(list->ids, capacity, sizeof(*ids));
    if (!ids)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    list->ids = ids;
    list->capacity = capacity;
    return 0;
}

void claas_id_list_done(struct claas_id_list *list)
{
    free(list->ids);
    *list = (struct claas_id_list){NULL, 0, 0};
}
