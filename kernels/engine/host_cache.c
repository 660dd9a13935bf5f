/* Adapters in the host's memory: see host_cache.h. Arrays are blocks of one list, cached images a
 * list with the most recently used first; both are short (tens), so they are searched linearly. */
#include "engine/host_cache.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "claas/err.h"
#include "claas/mem.h"

/* An array of an image. */
struct block {
    struct block *next;
    void *base;
    size_t bytes;
    bool pinned, used;
};

struct cached {
    struct cached *next;
    struct claas_adapter_mark mark;
    struct claas_adapter_image image;
    bool whole;
    bool dropped; /* found by nobody any more; goes with its last user */
    int users;
};

struct claas_host_cache {
    const struct claas_backend_ops *ops;
    claas_backend_t *backend;
    uint64_t budget;
    struct claas_adapter_memory memory;
    pthread_mutex_t lock; /* of all below */
    struct block *blocks;
    struct cached *images;
    _Atomic uint64_t bytes, image_count, found, missed; /* read without the lock */
};

/* --- marks --- */

static int64_t nanoseconds(const struct timespec *time)
{
    return (int64_t)time->tv_sec * 1000000000 + time->tv_nsec;
}

bool claas_adapter_mark_read(const char *directory, struct claas_adapter_mark *ret)
{
    static const char *const names[CLAAS_MARK_FILES] = {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"};

    memset(ret, 0, sizeof(*ret));
    for (int i = 0; i < CLAAS_MARK_FILES; i++) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, names[i]);
        struct stat info;

        if (path == NULL)
            return false;
        if (stat(path, &info) < 0) {
            if (i < CLAAS_MARK_FILES - 1)
                return false;
            continue;
        }
        ret->files[i].device = info.st_dev;
        ret->files[i].inode = info.st_ino;
        ret->files[i].size = (uint64_t)info.st_size;
        ret->files[i].modified_ns = nanoseconds(&info.st_mtim);
        ret->files[i].changed_ns = nanoseconds(&info.st_ctim);
    }
    return true;
}

bool claas_adapter_mark_is(const struct claas_adapter_mark *a, const struct claas_adapter_mark *b,
                           bool with_moments)
{
    size_t files = with_moments ? CLAAS_MARK_FILES : CLAAS_MARK_FILES - 1;

    return memcmp(a->files, b->files, files * sizeof(a->files[0])) == 0;
}

/* --- blocks; the lock is held --- */

static void free_block(claas_host_cache_t *cache, struct block *block)
{
    struct block **link = &cache->blocks;

    while (*link != block)
        link = &(*link)->next;
    *link = block->next;
    cache->bytes -= block->bytes;
    if (block->pinned)
        cache->ops->host_free(cache->backend, block->base);
    else
        free(block->base);
    free(block);
}

static struct block *find_free(claas_host_cache_t *cache, size_t bytes, bool any)
{
    for (struct block *block = cache->blocks; block != NULL; block = block->next)
        if (!block->used && (any || block->bytes == bytes))
            return block;
    return NULL;
}

static void give_locked(claas_host_cache_t *cache, const void *array)
{
    struct block *block = cache->blocks;

    while (block != NULL && block->base != array)
        block = block->next;
    if (block != NULL)
        block->used = false;
}

static void drop_image(claas_host_cache_t *cache, struct cached *cached)
{
    struct cached **link = &cache->images;

    while (*link != cached)
        link = &(*link)->next;
    *link = cached->next;
    cache->image_count--;
    give_locked(cache, cached->image.parameters);
    give_locked(cache, cached->image.exp_avg);
    give_locked(cache, cached->image.exp_avg_sq);
    free(cached);
}

/* Drops the least recently used image that nobody reads; false if there is none. */
static bool drop_oldest(claas_host_cache_t *cache)
{
    struct cached *oldest = NULL;

    for (struct cached *cached = cache->images; cached != NULL; cached = cached->next)
        if (cached->users == 0)
            oldest = cached;
    if (oldest != NULL)
        drop_image(cache, oldest);
    return oldest != NULL;
}

/* Gives memory back: what nobody uses first, then the oldest images. False if all is in use. */
static bool shrink(claas_host_cache_t *cache)
{
    struct block *block = find_free(cache, 0, true);

    if (block == NULL)
        return drop_oldest(cache);
    free_block(cache, block);
    return true;
}

static void trim(claas_host_cache_t *cache)
{
    while (cache->bytes > cache->budget && shrink(cache))
        continue;
}

/* A free block of just that size, taken from an old image if need be; NULL when the budget has room
 * for a new one, or all are in use. */
static struct block *reuse(claas_host_cache_t *cache, size_t bytes)
{
    struct block *block = find_free(cache, bytes, false);

    while (block == NULL && cache->bytes + bytes > cache->budget && shrink(cache))
        block = find_free(cache, bytes, false);
    return block;
}

/* Without the lock: pinning takes tenths of a second. */
static struct block *new_block(const claas_host_cache_t *cache, size_t bytes)
{
    struct block *block = CLAAS_NEW(struct block);

    if (block == NULL)
        return NULL;
    block->bytes = bytes;
    block->used = true;
    if (cache->ops->host_new != NULL) {
        block->base = cache->ops->host_new(cache->backend, bytes);
        block->pinned = block->base != NULL;
    }
    if (block->base == NULL) /* pages that cannot be pinned are slower, not wrong */
        block->base = claas_alloc_aligned(bytes);
    if (block->base == NULL) {
        free(block);
        return NULL;
    }
    return block;
}

/* --- memory of images --- */

static void add_block(claas_host_cache_t *cache, struct block *block)
{
    block->next = cache->blocks;
    cache->blocks = block;
    cache->bytes += block->bytes;
}

static void *take(void *arg, size_t bytes)
{
    claas_host_cache_t *cache = arg;
    struct block *block;

    pthread_mutex_lock(&cache->lock);
    block = reuse(cache, bytes);
    if (block != NULL)
        block->used = true;
    pthread_mutex_unlock(&cache->lock);
    if (block != NULL)
        return block->base;
    block = new_block(cache, bytes);
    if (block == NULL)
        return NULL;
    pthread_mutex_lock(&cache->lock);
    add_block(cache, block);
    pthread_mutex_unlock(&cache->lock);
    return block->base;
}

/* Counts the free blocks of that size. The lock is held. */
static int count_free(const claas_host_cache_t *cache, size_t bytes)
{
    int count = 0;

    for (const struct block *block = cache->blocks; block != NULL; block = block->next)
        count += !block->used && block->bytes == bytes;
    return count;
}

void claas_host_cache_prepare(claas_host_cache_t *cache, size_t bytes, int count)
{
    for (;;) {
        struct block *block;
        bool enough;

        pthread_mutex_lock(&cache->lock);
        enough = count_free(cache, bytes) >= count || cache->bytes + bytes > cache->budget;
        pthread_mutex_unlock(&cache->lock);
        block = enough ? NULL : new_block(cache, bytes);
        if (block == NULL)
            return;
        pthread_mutex_lock(&cache->lock);
        block->used = false;
        add_block(cache, block);
        trim(cache);
        pthread_mutex_unlock(&cache->lock);
    }
}

static void give(void *arg, void *array)
{
    claas_host_cache_t *cache = arg;

    pthread_mutex_lock(&cache->lock);
    give_locked(cache, array);
    trim(cache);
    pthread_mutex_unlock(&cache->lock);
}

const struct claas_adapter_memory *claas_host_cache_memory(claas_host_cache_t *cache)
{
    return cache->budget > 0 ? &cache->memory : NULL;
}

int claas_host_cache_new(const struct claas_backend_ops *ops, claas_backend_t *backend,
                         uint64_t budget, claas_host_cache_t **ret)
{
    claas_host_cache_t *cache = CLAAS_NEW(claas_host_cache_t);

    if (cache == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cache->ops = ops;
    cache->backend = backend;
    cache->budget = budget;
    cache->memory = (struct claas_adapter_memory){take, give, cache};
    pthread_mutex_init(&cache->lock, NULL);
    *ret = cache;
    return 0;
}

void claas_host_cache_free(claas_host_cache_t **ref)
{
    claas_host_cache_t *cache = CLAAS_TAKE(*ref);

    if (cache == NULL)
        return;
    while (cache->images != NULL)
        drop_image(cache, cache->images);
    while (cache->blocks != NULL)
        free_block(cache, cache->blocks);
    pthread_mutex_destroy(&cache->lock);
    free(cache);
}

/* --- images --- */

/* Only a whole image can answer for moments: if it has none they are zero. */
static bool is_wanted(const struct cached *cached, const struct claas_adapter_mark *mark,
                      bool with_moments)
{
    return !cached->dropped && claas_adapter_mark_is(&cached->mark, mark, with_moments) &&
           (cached->whole || !with_moments);
}

/* The lock is held. */
static struct cached *find(claas_host_cache_t *cache, const struct claas_adapter_mark *mark,
                           bool with_moments)
{
    struct cached **link = &cache->images, *found;

    while (*link != NULL && !is_wanted(*link, mark, with_moments))
        link = &(*link)->next;
    found = *link;
    if (found == NULL)
        return NULL;
    *link = found->next; /* to the front: the most recently used */
    found->next = cache->images;
    cache->images = found;
    return found;
}

/* Drops an image of the weights alone, which a whole one is about to replace. The lock is held. */
static void drop_part(claas_host_cache_t *cache, const struct claas_adapter_mark *mark)
{
    struct cached *part = find(cache, mark, false);

    if (part != NULL && part->users == 0)
        drop_image(cache, part);
}

void claas_host_cache_put(claas_host_cache_t *cache, const struct claas_adapter_mark *mark,
                          bool whole, struct claas_adapter_image *image)
{
    struct cached *cached = NULL;

    if (image->memory != &cache->memory || (cached = CLAAS_NEW(struct cached)) == NULL) {
        claas_adapter_image_done(image);
        return;
    }
    cached->mark = *mark;
    cached->whole = whole;
    pthread_mutex_lock(&cache->lock);
    if (find(cache, mark, whole) == NULL) {
        drop_part(cache, mark);
        cached->image = *image;
        memset(image, 0, sizeof(*image));
        cached->next = cache->images;
        cache->images = CLAAS_TAKE(cached);
        cache->image_count++;
    }
    trim(cache);
    pthread_mutex_unlock(&cache->lock);
    free(cached);
    claas_adapter_image_done(image);
}

const struct claas_adapter_image *claas_host_cache_get(claas_host_cache_t *cache,
                                                       const struct claas_adapter_mark *mark,
                                                       bool with_moments)
{
    struct cached *found;

    if (cache->budget == 0)
        return NULL;
    pthread_mutex_lock(&cache->lock);
    found = find(cache, mark, with_moments);
    if (found != NULL)
        found->users++;
    cache->found += found != NULL;
    cache->missed += found == NULL;
    pthread_mutex_unlock(&cache->lock);
    return found != NULL ? &found->image : NULL;
}

void claas_host_cache_done(claas_host_cache_t *cache, const struct claas_adapter_image *image)
{
    struct cached *used;

    pthread_mutex_lock(&cache->lock);
    used = cache->images;
    while (&used->image != image)
        used = used->next;
    if (--used->users == 0 && used->dropped)
        drop_image(cache, used);
    trim(cache);
    pthread_mutex_unlock(&cache->lock);
}

void claas_host_cache_drop(claas_host_cache_t *cache, const struct claas_adapter_mark *mark)
{
    struct cached *found;

    pthread_mutex_lock(&cache->lock);
    while ((found = find(cache, mark, false)) != NULL) {
        found->dropped = true;
        if (found->users == 0)
            drop_image(cache, found);
    }
    pthread_mutex_unlock(&cache->lock);
}

void claas_host_cache_stats(const claas_host_cache_t *cache, struct claas_host_cache_stats *ret)
{
    *ret = (struct claas_host_cache_stats){
        .bytes = cache->bytes,
        .images = cache->image_count,
        .found = cache->found,
        .missed = cache->missed,
    };
}
