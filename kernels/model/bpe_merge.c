/* The merging of one word: its single bytes are joined, again and again, where the leftmost
 * neighbours of the lowest rank meet. Up to SHORT symbols in arrays, by scanning for the lowest
 * rank; longer words in a linked list with a heap, so that a run of n letters costs O(n log n).
 * Both orders are the same: ranks first, then places from left to right. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

#define FREE_KEY UINT64_MAX
#define NO_RANK  UINT32_MAX
#define SHORT    48 /* symbols: up to here scanning beats the heap */

struct bpe_symbol {
    int32_t id;             /* -1: swallowed by its left neighbour */
    int32_t previous, next; /* -1 at the ends */
};

struct bpe_candidate {
    uint32_t rank;
    int32_t place; /* of the left symbol */
    int32_t left, right, result;
};

/* --- the table of merges --- */

int claas_bpe_reserve_merges(struct claas_bpe *bpe, size_t count)
{
    uint64_t slots = claas_table_slots(count);

    bpe->merges = CLAAS_NEW_ARRAY(struct claas_merge, slots);
    if (!bpe->merges)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    bpe->merge_mask = slots - 1;
    for (uint64_t i = 0; i < slots; i++)
        bpe->merges[i].key = FREE_KEY;
    return 0;
}

static const struct claas_merge *find_merge(const struct claas_bpe *bpe, int32_t left,
                                            int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;

    for (uint64_t i = claas_hash_mix(key) >> 8 & bpe->merge_mask;; i = (i + 1) & bpe->merge_mask) {
        if (bpe->merges[i].key == key)
            return &bpe->merges[i];
        if (bpe->merges[i].key == FREE_KEY)
            return NULL;
    }
}

void claas_bpe_add_merge(struct claas_bpe *bpe, int32_t left, int32_t right, uint32_t rank,
                         int32_t result)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    uint64_t i = claas_hash_mix(key) >> 8 & bpe->merge_mask;

    while (bpe->merges[i].key != FREE_KEY && bpe->merges[i].key != key)
        i = (i + 1) & bpe->merge_mask;
    bpe->merges[i] = (struct claas_merge){key, rank, result};
}

/* --- short words: arrays --- */

/* Pair i is symbols i and i + 1. */
struct short_word {
    int32_t ids[SHORT];
    uint32_t ranks[SHORT];
    int32_t results[SHORT];
    int count;
};

static void look_up_pair(const struct claas_bpe *bpe, struct short_word *word, int i)
{
    const struct claas_merge *merge = find_merge(bpe, word->ids[i], word->ids[i + 1]);

    word->ranks[i] = merge ? merge->rank : NO_RANK;
    word->results[i] = merge ? merge->result : -1;
}

static int lowest_pair(const struct short_word *word)
{
    int best = -1;
    uint32_t rank = NO_RANK;

    for (int i = 0; i + 1 < word->count; i++)
        if (word->ranks[i] < rank) {
            rank = word->ranks[i];
            best = i;
        }
    return best;
}

static void merge_short(const struct claas_bpe *bpe, struct short_word *word)
{
    int i;

    for (i = 0; i + 1 < word->count; i++)
        look_up_pair(bpe, word, i);
    while ((i = lowest_pair(word)) >= 0) {
        size_t behind = (size_t)(word->count - i - 2); /* symbols behind the pair */

        word->ids[i] = word->results[i];
        memmove(&word->ids[i + 1], &word->ids[i + 2], behind * sizeof(word->ids[0]));
        memmove(&word->ranks[i], &word->ranks[i + 1], behind * sizeof(word->ranks[0]));
        memmove(&word->results[i], &word->results[i + 1], behind * sizeof(word->results[0]));
        word->count--;
        if (i + 1 < word->count)
            look_up_pair(bpe, word, i);
        if (i > 0)
            look_up_pair(bpe, word, i - 1);
    }
}

/* --- long words: linked list and heap --- */

static bool before(const struct bpe_candidate *a, const struct bpe_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->place < b->place;
}

static int heap_push(struct claas_bpe_scratch *scratch, struct bpe_candidate candidate)
{
    size_t i = scratch->heap_count;

    if (i == scratch->heap_capacity) {
        size_t capacity = i < 64 ? 128 : 2 * i;
        struct bpe_candidate *heap = claas_realloc(scratch->heap, capacity, sizeof(*heap));

        if (!heap)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        scratch->heap = heap;
        scratch->heap_capacity = capacity;
    }
    scratch->heap_count++;
    while (i > 0 && before(&candidate, &scratch->heap[(i - 1) / 2])) {
        scratch->heap[i] = scratch->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    scratch->heap[i] = candidate;
    return 0;
}

static struct bpe_candidate heap_pop(struct claas_bpe_scratch *scratch)
{
    struct bpe_candidate *heap = scratch->heap;
    struct bpe_candidate top = heap[0];
    size_t count = --scratch->heap_count;
    struct bpe_candidate last = heap[count];
    size_t i = 0;

    for (size_t child = 1; child < count; child = 2 * i + 1) {
        if (child + 1 < count && before(&heap[child + 1], &heap[child]))
            child++;
        if (!before(&heap[child], &last))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static int consider(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch, int32_t place)
{
    const struct bpe_symbol *symbol;
    const struct claas_merge *merge;
    int32_t right;

    if (place < 0 || scratch->symbols[place].next < 0)
        return 0;
    symbol = &scratch->symbols[place];
    right = scratch->symbols[symbol->next].id;
    merge = find_merge(bpe, symbol->id, right);
    if (!merge)
        return 0;
    return heap_push(scratch,
                     (struct bpe_candidate){merge->rank, place, symbol->id, right, merge->result});
}

/* A candidate is stale when either symbol was merged since it was pushed. */
static bool is_stale(const struct bpe_symbol *symbols, const struct bpe_candidate *candidate)
{
    const struct bpe_symbol *symbol = &symbols[candidate->place];

    return symbol->id != candidate->left || symbol->next < 0 ||
           symbols[symbol->next].id != candidate->right;
}

static int merge_long(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch, int32_t count)
{
    struct bpe_symbol *symbols = scratch->symbols;
    int rc = 0;

    scratch->heap_count = 0;
    for (int32_t i = 0; rc >= 0 && i < count; i++)
        rc = consider(bpe, scratch, i);
    while (rc >= 0 && scratch->heap_count > 0) {
        struct bpe_candidate candidate = heap_pop(scratch);

        if (is_stale(symbols, &candidate))
            continue;
        struct bpe_symbol *symbol = &symbols[candidate.place];
        struct bpe_symbol *right = &symbols[symbol->next];
        symbol->id = candidate.result;
        symbol->next = right->next;
        right->id = -1;
        if (symbol->next >= 0)
            symbols[symbol->next].previous = candidate.place;
        rc = consider(bpe, scratch, symbol->previous);
        if (rc >= 0)
            rc = consider(bpe, scratch, candidate.place);
    }
    return rc;
}

/* --- a word --- */

/* Tokens of the single bytes; bytes without one become `unknown` or vanish. Returns their count. */
static size_t start_symbols(const struct claas_bpe *bpe, const char *word, size_t length,
                            int32_t *ids, size_t stride)
{
    size_t count = 0;
    bool after_unknown = false;

    for (size_t i = 0; i < length; i++) {
        int32_t id = bpe->byte_ids[(uint8_t)word[i]];
        bool unknown = id < 0;

        if (unknown)
            id = bpe->unknown;
        if (id < 0 || (unknown && after_unknown && bpe->fuse_unknown))
            continue;
        ids[count++ * stride] = id;
        after_unknown = unknown;
    }
    return count;
}

static int encode_long(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                       const char *word, size_t length, struct claas_id_list *out)
{
    struct bpe_symbol *symbols = scratch->symbols;
    int32_t count;
    int rc;

    if (length > scratch->symbol_capacity) {
        symbols = claas_realloc(symbols, length, sizeof(*symbols));
        if (!symbols)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        scratch->symbols = symbols;
        scratch->symbol_capacity = length;
    }
    count = (int32_t)start_symbols(bpe, word, length, &symbols[0].id,
                                   sizeof(*symbols) / sizeof(int32_t));
    for (int32_t i = 0; i < count; i++) {
        symbols[i].previous = i - 1;
        symbols[i].next = i + 1 < count ? i + 1 : -1;
    }
    rc = merge_long(bpe, scratch, count);
    if (rc >= 0)
        rc = claas_id_list_reserve(out, (size_t)count);
    if (rc < 0)
        return rc;
    for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbols[i].next)
        out->ids[out->count++] = symbols[i].id;
    return 0;
}

int claas_bpe_merge(const struct claas_bpe *bpe, struct claas_bpe_scratch *scratch,
                    const char *word, size_t length, struct claas_id_list *out)
{
    struct short_word short_word;
    int rc;

    if (length > SHORT)
        return encode_long(bpe, scratch, word, length, out);
    short_word.count = (int)start_symbols(bpe, word, length, short_word.ids, 1);
    merge_short(bpe, &short_word);
    rc = claas_id_list_reserve(out, (size_t)short_word.count);
    if (rc < 0)
        return rc;
    memcpy(out->ids + out->count, short_word.ids,
           (size_t)short_word.count * sizeof(short_word.ids[0]));
    out->count += (size_t)short_word.count;
    return 0;
}

void claas_bpe_scratch_done(struct claas_bpe_scratch *scratch)
{
    free(scratch->symbols);
    free(scratch->heap);
    free(scratch->cache);
}
