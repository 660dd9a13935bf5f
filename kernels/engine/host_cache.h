/* Adapters in the host's memory, between those on the device and those on disk: the images of
 * directories that were read or written lately, in memory that the device copies from fastest. An
 * image is found again by what its files are (device, inode, size, times), not by where they lie:
 * publication renames a directory, and a file that was replaced is another one.
 *
 * The same memory serves images that are not cached (being read, being written): what one gives
 * back the next one takes, since new pages of a gigabyte cost more than the copy into them. */
#ifndef CLAAS_ENGINE_HOST_CACHE_H
#define CLAAS_ENGINE_HOST_CACHE_H

#include "engine/backend.h"

typedef struct claas_host_cache claas_host_cache_t;

/* Identifies the files of an adapter's directory: config, weights, moments. Zeros for moments that
 * are not there. */
#define CLAAS_MARK_FILES 3
struct claas_adapter_mark {
    struct {
        uint64_t device, inode, size;
        int64_t modified_ns, changed_ns;
    } files[CLAAS_MARK_FILES];
};
/* Looks at the directory without reading a file; false if it holds no adapter. */
bool claas_adapter_mark_read(const char *directory, struct claas_adapter_mark *ret);
/* Whether the weights are the same, and (with_moments) the moments too. */
bool claas_adapter_mark_is(const struct claas_adapter_mark *a, const struct claas_adapter_mark *b,
                           bool with_moments);

/* `budget`: bytes to hold; above it whatever nobody uses at the moment is freed. 0: nothing is
 * kept. `backend` must outlive the cache. */
int claas_host_cache_new(const struct claas_backend_ops *ops, claas_backend_t *backend,
                         uint64_t budget, claas_host_cache_t **ret);
void claas_host_cache_free(claas_host_cache_t **cache);
/* Where images that may be cached get their arrays from; NULL (plain memory) when nothing is
 * cached. */
const struct claas_adapter_memory *claas_host_cache_memory(claas_host_cache_t *cache);

/* Takes the image over, whether it is kept or not. `whole`: the image is all of the directory
 * (without moments: they are zero); else it is the weights alone. */
void claas_host_cache_put(claas_host_cache_t *cache, const struct claas_adapter_mark *mark,
                          bool whole, struct claas_adapter_image *image);
/* The image of these files, valid until claas_host_cache_done; NULL if it is not there. */
const struct claas_adapter_image *claas_host_cache_get(claas_host_cache_t *cache,
                                                       const struct claas_adapter_mark *mark,
                                                       bool with_moments);
void claas_host_cache_done(claas_host_cache_t *cache, const struct claas_adapter_image *image);

/* Makes `count` free arrays of that size ready for whoever asks next, as far as the budget allows:
 * pinning a gigabyte takes tenths of a second. */
void claas_host_cache_prepare(claas_host_cache_t *cache, size_t bytes, int count);

/* Drops the images of that directory: none is found any more; one in use is freed with its last
 * user. */
void claas_host_cache_drop(claas_host_cache_t *cache, const struct claas_adapter_mark *mark);

struct claas_host_cache_stats {
    uint64_t bytes; /* held, used or not */
    uint64_t images, found, missed;
};
void claas_host_cache_stats(const claas_host_cache_t *cache, struct claas_host_cache_stats *ret);

#endif
