/* The table of key/value blocks (kv.h): reference counts, the chained look-up of full blocks, and
 * the list of unused but still valid blocks in the order of their last use. Everything is arrays
 * indexed by block number, sized at start. */
#include "engine/kv.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

#define NONE (-1)
/* Roots and block numbers share one space of chain numbers; roots have the top bit. */
#define ROOT_BIT (UINT64_C(1) << 63)

struct block {
    int users;
    uint64_t chain;  /* its own number; 0 = not registered */
    uint64_t root;   /* of the sequence it was computed for */
    uint64_t before; /* the chain number in front of it */
    int32_t tokens[CLAAS_KV_BLOCK_TOKENS];
    int32_t next_in_bucket;
    int32_t older, newer; /* unused blocks: neighbours in the list of unused ones */
};

struct claas_kv {
    int total, unused;
    int touched; /* blocks [touched, total) were never handed out, and are in no list */
    struct block *blocks;
    int32_t *buckets;
    uint32_t bucket_mask;
    /* Unused blocks from the one to take first to the one to keep longest; unregistered ones are
     * put in front. */
    int32_t oldest, newest;
    uint64_t last_chain;
};

int claas_kv_new(int blocks, claas_kv_t **ret)
{
    CLAAS_AUTO(claas_kv_free) claas_kv_t *kv = CLAAS_NEW(claas_kv_t);
    uint32_t buckets = 16;

    if (blocks < 1)
        return claas_fail(CLAAS_ERR_INVALID, "a key/value pool of %d blocks", blocks);
    while (buckets < 2u * (uint32_t)blocks && buckets < (1u << 30))
        buckets *= 2;
    if (kv == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    kv->total = blocks;
    kv->blocks = CLAAS_NEW_ARRAY(struct block, blocks);
    kv->buckets = CLAAS_NEW_ARRAY(int32_t, buckets);
    if (kv->blocks == NULL || kv->buckets == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    kv->bucket_mask = buckets - 1;
    memset(kv->buckets, 0xff, buckets * sizeof(*kv->buckets));
    kv->oldest = kv->newest = NONE;
    kv->unused = blocks;
    *ret = CLAAS_TAKE(kv);
    return 0;
}

void claas_kv_free(claas_kv_t **kv)
{
    if (*kv == NULL)
        return;
    free((*kv)->blocks);
    free((*kv)->buckets);
    free(*kv);
    *kv = NULL;
}

int claas_kv_available(const claas_kv_t *kv)
{
    return kv->unused;
}

int claas_kv_total(const claas_kv_t *kv)
{
    return kv->total;
}

uint64_t claas_kv_root(uint64_t identity)
{
    return ROOT_BIT | identity;
}

static int32_t *find_bucket(claas_kv_t *kv, uint64_t chain, const int32_t *tokens)
{
    /* splitmix64's finaliser after each pair of tokens: the order of the tokens matters. */
    uint64_t hash = chain;

    for (int i = 0; i < CLAAS_KV_BLOCK_TOKENS; i += 2) {
        hash += UINT64_C(0x9e3779b97f4a7c15);
        hash ^= (uint32_t)tokens[i] | (uint64_t)(uint32_t)tokens[i + 1] << 32;
        hash = (hash ^ (hash >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        hash = (hash ^ (hash >> 27)) * UINT64_C(0x94d049bb133111eb);
        hash ^= hash >> 31;
    }
    return &kv->buckets[hash & kv->bucket_mask];
}

/* --- the list of unused blocks --- */

static void unlink_unused(claas_kv_t *kv, int32_t number)
{
    struct block *block = &kv->blocks[number];

    if (block->older == NONE)
        kv->oldest = block->newer;
    else
        kv->blocks[block->older].newer = block->newer;
    if (block->newer == NONE)
        kv->newest = block->older;
    else
        kv->blocks[block->newer].older = block->older;
    kv->unused--;
}

static void link_unused(claas_kv_t *kv, int32_t number)
{
    struct block *block = &kv->blocks[number];
    bool keep = block->chain != 0;

    block->older = keep ? kv->newest : NONE;
    block->newer = keep ? NONE : kv->oldest;
    if (block->older == NONE)
        kv->oldest = number;
    else
        kv->blocks[block->older].newer = number;
    if (block->newer == NONE)
        kv->newest = number;
    else
        kv->blocks[block->newer].older = number;
    kv->unused++;
}

static void unregister(claas_kv_t *kv, int32_t number)
{
    struct block *block = &kv->blocks[number];
    int32_t *link;

    if (block->chain == 0)
        return;
    link = find_bucket(kv, block->before, block->tokens);
    while (*link != number)
        link = &kv->blocks[*link].next_in_bucket;
    *link = block->next_in_bucket;
    block->chain = 0;
}

/* --- users --- */

/* A block that was never handed out has no memory yet, so once half of the pool was touched the
 * oldest block that is only remembered is taken first. */
int32_t claas_kv_take(claas_kv_t *kv)
{
    int32_t number = kv->oldest;
    bool keep = number != NONE && kv->blocks[number].chain != 0 && kv->touched < kv->total / 2;

    if ((number == NONE || keep) && kv->touched < kv->total) {
        number = kv->touched++;
        kv->unused--;
    } else if (number != NONE) {
        unlink_unused(kv, number);
        unregister(kv, number);
    } else {
        return NONE;
    }
    kv->blocks[number].users = 1;
    return number;
}

void claas_kv_discard(claas_kv_t *kv, int32_t number)
{
    if (kv->blocks[number].users == 1)
        unregister(kv, number);
    claas_kv_drop(kv, number);
}

void claas_kv_drop(claas_kv_t *kv, int32_t number)
{
    if (--kv->blocks[number].users == 0)
        link_unused(kv, number);
}

bool claas_kv_is_alone(const claas_kv_t *kv, int32_t number)
{
    return kv->blocks[number].users == 1;
}

/* --- content --- */

static int32_t look_up(claas_kv_t *kv, uint64_t chain, const int32_t *tokens)
{
    int32_t number = *find_bucket(kv, chain, tokens);

    while (number != NONE) {
        const struct block *block = &kv->blocks[number];

        if (block->before == chain && memcmp(block->tokens, tokens, sizeof(block->tokens)) == 0)
            break;
        number = block->next_in_bucket;
    }
    return number;
}

int32_t claas_kv_find(claas_kv_t *kv, uint64_t chain, const int32_t *tokens, uint64_t *ret_chain)
{
    int32_t number = look_up(kv, chain, tokens);

    if (number == NONE)
        return NONE;
    if (kv->blocks[number].users++ == 0)
        unlink_unused(kv, number);
    *ret_chain = kv->blocks[number].chain;
    return number;
}

uint64_t claas_kv_register(claas_kv_t *kv, int32_t number, uint64_t root, uint64_t chain,
                           const int32_t *tokens)
{
    struct block *block = &kv->blocks[number];
    int32_t equal = look_up(kv, chain, tokens);
    int32_t *bucket;

    if (equal != NONE)
        return kv->blocks[equal].chain;
    unregister(kv, number);
    block->chain = ++kv->last_chain;
    block->root = root;
    block->before = chain;
    memcpy(block->tokens, tokens, sizeof(block->tokens));
    bucket = find_bucket(kv, chain, tokens);
    block->next_in_bucket = *bucket;
    *bucket = number;
    return block->chain;
}

void claas_kv_forget(claas_kv_t *kv, uint64_t root)
{
    for (int32_t i = 0; i < kv->touched; i++) {
        struct block *block = &kv->blocks[i];

        if (block->chain == 0 || block->root != root)
            continue;
        unregister(kv, i);
        if (block->users == 0) {
            unlink_unused(kv, i);
            link_unused(kv, i);
        }
    }
}
