/* The table of key/value blocks: who uses which of the pool's blocks, and which blocks hold the
 * keys and values of which tokens. The memory itself is the back-end's.
 *
 * The one idea: a full block is named by what it was computed from. Each *registered* block gets a
 * number that is never used again, and is found by (number of the block before it, its 16 tokens);
 * the first block of a sequence has the identity of its adapter in place of a predecessor. A match
 * is therefore exact for the whole prefix, with one comparison of 16 tokens per block and no
 * reliance on hashes being unique. Blocks that nobody uses stay registered and are reused in the
 * order of their last use.
 *
 * Used by the compute thread only. */
#ifndef CLAAS_ENGINE_KV_H
#define CLAAS_ENGINE_KV_H

#include "engine/backend.h"

typedef struct claas_kv claas_kv_t;

/* `blocks` >= 1 blocks, numbered from 0, all free. */
int claas_kv_new(int blocks, claas_kv_t **ret);
void claas_kv_free(claas_kv_t **kv);

/* A block for one user, with nothing registered; -1 when all are in use. The least recently used
 * registered block is forgotten for it if none is free, and also if half of the pool has been
 * touched and the free ones never were: memory becomes resident for what runs at the same time, not
 * for what is remembered. */
int32_t claas_kv_take(claas_kv_t *kv);
/* Drops one use. A registered block without users stays findable until its memory is needed. */
void claas_kv_drop(claas_kv_t *kv, int32_t block);
/* Drops one use; if it was the last, the block is no longer found and is the next to be taken. */
void claas_kv_discard(claas_kv_t *kv, int32_t block);
/* Whether a block has one user, so that dropping that use makes it free. */
bool claas_kv_is_alone(const claas_kv_t *kv, int32_t block);
/* Blocks that claas_kv_take could hand out now. */
int claas_kv_available(const claas_kv_t *kv);
int claas_kv_total(const claas_kv_t *kv);

/* The chain number in front of a sequence's first block, for an adapter's identity (0 = the base
 * model). */
uint64_t claas_kv_root(uint64_t identity);
/* The registered block behind `chain` that holds tokens[16], with one use added, or -1; *ret_chain
 * is its number. */
int32_t claas_kv_find(claas_kv_t *kv, uint64_t chain, const int32_t *tokens, uint64_t *ret_chain);
/* Registers a block in use, once its 16 positions are computed. Returns the chain number to
 * continue with: the block's own, or that of an equal block that was registered before (this one
 * then stays private). */
uint64_t claas_kv_register(claas_kv_t *kv, int32_t block, uint64_t root, uint64_t chain,
                           const int32_t *tokens);
/* Forgets every block below `root`: its adapter changed or is gone. */
void claas_kv_forget(claas_kv_t *kv, uint64_t root);

#endif
