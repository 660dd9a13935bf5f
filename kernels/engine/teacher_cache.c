/* The teacher's rows of evaluations: see teacher_cache.h. Entries are few, and keys of one length
 * that differ do so early, so they are searched linearly and without hashes. */
#include "engine/teacher_cache.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

/* 2,000 rows of a model 4,096 wide in bfloat16; a cycle's gate has some 400 to 1,000. */
#define CYCLE_BYTES  ((size_t)16 << 20)
#define CYCLES_LEAST 4

struct entry {
    struct claas_teacher_kept kept;
    int32_t *key; /* [length]; NULL: the entry is free */
    size_t length;
    uint64_t used; /* cache->uses when it last was */
};

struct claas_teacher_cache {
    const struct claas_backend_ops *ops;
    claas_backend_t *backend;
    struct entry entries[CLAAS_TEACHER_ENTRIES];
    struct entry fresh; /* of the request that runs, if none was found */
    size_t limit;
    uint64_t uses, bytes, found, missed;
};

/* --- keys --- */

/* An evaluation with a teacher in some row, and in no row a teacher that could change. */
static bool can_be_kept(const struct claas_backend_train *request)
{
    bool has_teacher = false;

    for (size_t i = 0; i < request->row_count; i++) {
        if (request->rows[i].row.teacher_count == 0)
            continue;
        if (request->rows[i].teacher != NULL)
            return false;
        has_teacher = true;
    }
    return has_teacher && !request->update;
}

static int32_t *put_tokens(int32_t *at, const int32_t *tokens, size_t count)
{
    if (count > 0)
        memcpy(at, tokens, count * sizeof(int32_t));
    return at + count;
}

/* A token that is not trained is stored as its complement, which is negative and so no token. */
static int32_t *put_response(int32_t *at, const struct claas_train_row *row)
{
    for (size_t t = 0; t < row->response_count; t++)
        *at++ = row->mask == NULL || row->mask[t] ? row->response[t] : ~row->response[t];
    return at;
}

/* All that the teacher's rows and their order follow from (pack/step_plan.c): the texts of both
 * sides, since trained positions are numbered along the student's, by adapter and prompt; and which
 * rows share a student, but not which one it is. Lengths come first, so that equal keys are equal
 * requests. False if the key exceeds the limit or there is no memory. */
static bool make_key(const struct claas_backend_train *request, size_t limit, struct entry *ret)
{
    size_t length = 0;
    int32_t *at;

    for (size_t i = 0; i < request->row_count; i++) {
        const struct claas_train_row *row = &request->rows[i].row;

        length += 4 + row->student_count + row->teacher_count + row->response_count;
    }
    if (length > limit / sizeof(int32_t))
        return false;
    at = ret->key = CLAAS_NEW_ARRAY(int32_t, length);
    if (at == NULL)
        return false;
    ret->length = length;
    for (size_t i = 0; i < request->row_count; i++) {
        const struct claas_train_row *row = &request->rows[i].row;
        size_t first = 0;

        while (request->rows[first].student != request->rows[i].student)
            first++;
        *at++ = (int32_t)first;
        *at++ = (int32_t)row->student_count;
        *at++ = (int32_t)row->teacher_count;
        *at++ = (int32_t)row->response_count;
        at = put_tokens(at, row->student_prompt, row->student_count);
        at = put_tokens(at, row->teacher_prompt, row->teacher_count);
        at = put_response(at, row);
    }
    return true;
}

static size_t key_bytes(const struct entry *entry)
{
    return entry->length * sizeof(int32_t);
}

/* --- entries --- */

static void drop(claas_teacher_cache_t *cache, struct entry *entry)
{
    if (entry->kept.rows != NULL && cache->ops->host_free != NULL)
        cache->ops->host_free(cache->backend, entry->kept.rows);
    else
        free(entry->kept.rows);
    free(entry->key);
    *entry = (struct entry){0};
}

static struct entry *find(claas_teacher_cache_t *cache, const struct entry *wanted)
{
    for (size_t i = 0; i < CLAAS_TEACHER_ENTRIES; i++) {
        struct entry *entry = &cache->entries[i];

        if (entry->length == wanted->length &&
            memcmp(entry->key, wanted->key, key_bytes(wanted)) == 0)
            return entry;
    }
    return NULL;
}

/* The least recently used entry, a free one counting as never used; in_use: of those that are not
 * free. */
static struct entry *find_oldest(claas_teacher_cache_t *cache, bool in_use)
{
    struct entry *oldest = NULL;

    for (size_t i = 0; i < CLAAS_TEACHER_ENTRIES; i++) {
        struct entry *entry = &cache->entries[i];

        if ((!in_use || entry->key != NULL) && (oldest == NULL || entry->used < oldest->used))
            oldest = entry;
    }
    return oldest;
}

static void evict(claas_teacher_cache_t *cache, struct entry *entry)
{
    cache->bytes -= key_bytes(entry) + entry->kept.bytes;
    drop(cache, entry);
}

/* kept.limit made sure that it fits once all others are gone. */
static void keep(claas_teacher_cache_t *cache, struct entry *fresh)
{
    size_t bytes = key_bytes(fresh) + fresh->kept.bytes;
    struct entry *place;

    while (cache->bytes + bytes > cache->limit)
        evict(cache, find_oldest(cache, true));
    place = find_oldest(cache, false);
    if (place->key != NULL)
        evict(cache, place);
    *place = *fresh;
    place->used = ++cache->uses;
    cache->bytes += bytes;
    *fresh = (struct entry){0};
}

/* --- the whole --- */

size_t claas_teacher_cache_limit(const struct claas_backend_ops *ops)
{
    return CYCLE_BYTES * (size_t)(ops->cycles > CYCLES_LEAST ? ops->cycles : CYCLES_LEAST);
}

int claas_teacher_cache_new(const struct claas_backend_ops *ops, claas_backend_t *backend,
                            claas_teacher_cache_t **ret)
{
    claas_teacher_cache_t *cache = CLAAS_NEW(claas_teacher_cache_t);

    if (cache == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cache->ops = ops;
    cache->backend = backend;
    cache->limit = claas_teacher_cache_limit(ops);
    *ret = cache;
    return 0;
}

void claas_teacher_cache_free(claas_teacher_cache_t **ref)
{
    claas_teacher_cache_t *cache = CLAAS_TAKE(*ref);

    if (cache == NULL)
        return;
    for (size_t i = 0; i < CLAAS_TEACHER_ENTRIES; i++)
        drop(cache, &cache->entries[i]);
    drop(cache, &cache->fresh);
    free(cache);
}

void claas_teacher_cache_begin(claas_teacher_cache_t *cache, struct claas_backend_train *request)
{
    struct entry *fresh = &cache->fresh, *entry;

    request->kept = NULL;
    if (!can_be_kept(request) || !make_key(request, cache->limit, fresh))
        return;
    entry = find(cache, fresh);
    if (entry != NULL) {
        entry->used = ++cache->uses;
        drop(cache, fresh);
        request->kept = &entry->kept;
        return;
    }
    fresh->kept.limit = cache->limit - key_bytes(fresh);
    request->kept = &fresh->kept;
}

void claas_teacher_cache_end(claas_teacher_cache_t *cache, struct claas_backend_train *request,
                             bool good)
{
    struct claas_teacher_kept *kept = CLAAS_TAKE(request->kept);
    struct entry *fresh = &cache->fresh;

    if (kept != NULL && good) {
        cache->found += kept != &fresh->kept;
        cache->missed += kept == &fresh->kept;
    }
    if (good && fresh->kept.filled)
        keep(cache, fresh);
    else
        drop(cache, fresh);
}

void claas_teacher_cache_stats(const claas_teacher_cache_t *cache,
                               struct claas_teacher_cache_stats *ret)
{
    *ret = (struct claas_teacher_cache_stats){
        .bytes = cache->bytes, .found = cache->found, .missed = cache->missed};
}
