/* The teacher's final hidden rows of evaluations, in the host's memory: after every step of a cycle
 * the gate asks the same base model about the same texts, so half of its evaluation repeats an
 * answer that was there before.
 *
 * The one idea: an entry is found by the rows of the request themselves, all tokens compared, so
 * that no caller names it and nobody has to say when it is stale. Only the base's answers are kept,
 * since its weights are the one teacher that never changes. Bounded in number and bytes; the least
 * recently used entry goes first. The rows of the request under way come on top of the bound until
 * it ends.
 *
 * Used by the compute thread only, for one request at a time. */
#ifndef CLAAS_ENGINE_TEACHER_CACHE_H
#define CLAAS_ENGINE_TEACHER_CACHE_H

#include "engine/backend.h"

#define CLAAS_TEACHER_ENTRIES 32

typedef struct claas_teacher_cache claas_teacher_cache_t;

/* Most bytes of rows and tokens, of all entries together. Cycles take turns, and each one's entry
 * must still be there at its next gate, so there is room for one entry of each. */
size_t claas_teacher_cache_limit(const struct claas_backend_ops *ops);

/* `backend` must outlive the cache. */
int claas_teacher_cache_new(const struct claas_backend_ops *ops, claas_backend_t *backend,
                            claas_teacher_cache_t **ret);
void claas_teacher_cache_free(claas_teacher_cache_t **cache);

/* Before a request runs: request->kept becomes the rows of an equal one, or an empty place for its
 * own, or NULL where there is nothing to keep. */
void claas_teacher_cache_begin(claas_teacher_cache_t *cache, struct claas_backend_train *request);
/* After it ran, whatever the outcome. `good`: it ended well, and all figures are finite; else what
 * it filled is dropped. */
void claas_teacher_cache_end(claas_teacher_cache_t *cache, struct claas_backend_train *request,
                             bool good);

struct claas_teacher_cache_stats {
    uint64_t bytes;         /* of rows and tokens */
    uint64_t found, missed; /* requests that ended well and could have been kept: found, or not */
};
void claas_teacher_cache_stats(const claas_teacher_cache_t *cache,
                               struct claas_teacher_cache_stats *ret);

#endif
