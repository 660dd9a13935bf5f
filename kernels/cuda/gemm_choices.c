/* The file of chosen algorithms: a header, then the choices as they are in memory. It is made and
 * read on one machine, so numbers are in its byte order; a file of another order fails at the
 * version.
 *
 * The checksum is FNV-1a over everything else: each step is a bijection of the state, so no change
 * of a single byte goes unseen. It guards against disks, not against people: a file is in the
 * user's own cache, and cuBLASLt looks at every algorithm before its first use. */
#include "cuda/gemm_choices.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FORMAT_VERSION 2 /* also changes when keys mean something else */
#define FILE_LIMIT     (sizeof(struct header) + GEMM_CHOICES_MAX * sizeof(struct gemm_choice))
#define LOCK_WAIT      500     /* ms; it is held for one or two */
#define LOCK_PAUSE     1000000 /* ns */
#define SLOW_MS        10      /* of choosing: worth a line in the log */

static const char magic[8] = "CLaaSmm";

struct header {
    char magic[8];
    uint32_t version;
    uint32_t choice_bytes;
    uint64_t count;
    uint64_t checksum; /* of everything, this word being 0 */
    struct gemm_choices_origin origin;
};
_Static_assert(sizeof(struct gemm_choices_origin) == 80, "no padding");
_Static_assert(sizeof(struct gemm_choice) == GEMM_CHOICE_KEY + GEMM_CHOICE_ALGO, "no padding");
_Static_assert(sizeof(struct header) == 112, "no padding");

void gemm_choices_done(struct gemm_choices *choices)
{
    free(choices->items);
    *choices = (struct gemm_choices){0};
}

/* --- bytes --- */

static uint64_t add_to_checksum(uint64_t sum, const void *data, size_t length)
{
    const uint8_t *bytes = data;

    for (size_t i = 0; i < length; i++)
        sum = (sum ^ bytes[i]) * UINT64_C(0x100000001b3);
    return sum;
}

/* `choices` may lie unaligned. */
static uint64_t checksum(const struct header *header, const void *choices)
{
    struct header blank = *header;
    uint64_t sum = UINT64_C(0xcbf29ce484222325);

    blank.checksum = 0;
    sum = add_to_checksum(sum, &blank, sizeof(blank));
    return add_to_checksum(sum, choices, (size_t)header->count * sizeof(struct gemm_choice));
}

int gemm_choices_encode(const struct gemm_choices_origin *origin,
                        const struct gemm_choices *choices, uint8_t **ret, size_t *ret_length)
{
    struct header header = {
        .version = FORMAT_VERSION,
        .choice_bytes = sizeof(struct gemm_choice),
        .count = choices->count,
        .origin = *origin,
    };
    size_t bytes = choices->count * sizeof(struct gemm_choice);
    uint8_t *data;

    if (choices->count > GEMM_CHOICES_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "%zu chosen algorithms, the limit is %d", choices->count,
                          GEMM_CHOICES_MAX);
    data = claas_alloc(sizeof(header) + bytes, 1);
    if (!data)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memcpy(header.magic, magic, sizeof(magic));
    header.checksum = checksum(&header, choices->items);
    memcpy(data, &header, sizeof(header));
    if (bytes > 0)
        memcpy(data + sizeof(header), choices->items, bytes);
    *ret = data;
    *ret_length = sizeof(header) + bytes;
    return 0;
}

int gemm_choices_decode(const struct gemm_choices_origin *origin, const void *data, size_t length,
                        struct gemm_choices *ret)
{
    const uint8_t *bytes = data;
    struct header header;
    struct gemm_choice *items;

    if (length < sizeof(header))
        return claas_fail(CLAAS_ERR_FORMAT, "%zu bytes are too few for chosen algorithms", length);
    memcpy(&header, bytes, sizeof(header));
    if (memcmp(header.magic, magic, sizeof(magic)) != 0)
        return claas_fail(CLAAS_ERR_FORMAT, "not a file of chosen algorithms");
    if (header.version != FORMAT_VERSION || header.choice_bytes != sizeof(struct gemm_choice))
        return claas_fail(CLAAS_ERR_FORMAT, "chosen algorithms in format %u of %u bytes each",
                          header.version, header.choice_bytes);
    if (header.count > GEMM_CHOICES_MAX ||
        length != sizeof(header) + (size_t)header.count * sizeof(struct gemm_choice))
        return claas_fail(CLAAS_ERR_FORMAT, "%zu bytes cannot be %llu chosen algorithms", length,
                          (unsigned long long)header.count);
    if (checksum(&header, bytes + sizeof(header)) != header.checksum)
        return claas_fail(CLAAS_ERR_FORMAT, "the checksum of the chosen algorithms is wrong");
    if (memcmp(&header.origin, origin, sizeof(*origin)) != 0)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "the algorithms were chosen for another card, driver or cuBLASLt");
    items = CLAAS_NEW_ARRAY(struct gemm_choice, header.count ? header.count : 1);
    if (!items)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memcpy(items, bytes + sizeof(header), (size_t)header.count * sizeof(struct gemm_choice));
    *ret = (struct gemm_choices){items, (size_t)header.count};
    return 0;
}

/* --- the file --- */

static char *default_path(const char *device)
{
    char card[64]; /* as in the origin */
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");

    claas_copy_text(card, sizeof(card), device);
    for (char *c = card; *c; c++)
        if (!isalnum((unsigned char)*c))
            *c = '-';
    if (cache && cache[0] == '/') /* the XDG specification: a relative path does not count */
        return claas_format("%s/claas/gemm-%s.bin", cache, card);
    if (home && home[0] == '/')
        return claas_format("%s/.cache/claas/gemm-%s.bin", home, card);
    return NULL;
}

char *gemm_choices_path(const char *device)
{
    const char *wish = getenv("CLAAS_CUDA_CHOICES");
    char *path = wish == NULL ? default_path(device) : wish[0] ? claas_strdup(wish) : NULL;
    struct stat status;

    /* The file is replaced by another one: a device, as /dev/null, must not be. */
    if (path && stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        claas_warning("chosen algorithms are not kept in %s, which is not a file", path);
        free(path);
        return NULL;
    }
    return path;
}

/* NOT_FOUND without such a file. */
static int load(const char *path, const struct gemm_choices_origin *origin,
                struct gemm_choices *ret)
{
    CLAAS_AUTO_FREE char *data = NULL;
    size_t length = 0;
    int rc = claas_file_read(path, FILE_LIMIT, &data, &length);

    *ret = (struct gemm_choices){0};
    if (rc == 0)
        rc = gemm_choices_decode(origin, data, length, ret);
    return rc;
}

void gemm_choices_read(const char *path, const struct gemm_choices_origin *origin,
                       struct gemm_choices *ret)
{
    int rc = load(path, origin, ret);

    if (rc < 0 && rc != CLAAS_ERR_NOT_FOUND)
        claas_warning("%s is ignored and will be replaced: %s", path, claas_error_text());
}

static int compare(const void *a, const void *b)
{
    const struct gemm_choice *x = a, *y = b;

    return memcmp(x->key, y->key, sizeof(x->key));
}

/* Ours, sorted, then those of `theirs` whose product is not among ours, as many as there may be. */
static int merge(const struct gemm_choices *ours, const struct gemm_choices *theirs,
                 struct gemm_choices *ret)
{
    size_t room = ours->count + theirs->count, count = ours->count;
    struct gemm_choice *items = CLAAS_NEW_ARRAY(struct gemm_choice, room ? room : 1);

    if (!items)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (ours->count > 0)
        memcpy(items, ours->items, ours->count * sizeof(*items));
    qsort(items, ours->count, sizeof(*items), compare);
    for (size_t i = 0; i < theirs->count && count < GEMM_CHOICES_MAX; i++)
        if (!bsearch(&theirs->items[i], items, ours->count, sizeof(*items), compare))
            items[count++] = theirs->items[i];
    *ret = (struct gemm_choices){items, count};
    return 0;
}

static int make_folder(const char *path)
{
    const char *slash = strrchr(path, '/');
    CLAAS_AUTO_FREE char *folder = NULL;

    if (!slash || slash == path)
        return 0;
    folder = claas_strndup(path, (size_t)(slash - path));
    if (!folder)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_mkdir_all(folder);
}

static void unlock(const int *lock)
{
    if (*lock >= 0)
        close(*lock);
}

/* Locks a file beside `path`, since `path` itself is replaced. -1: no lock was to be had. Then
 * somebody's choices may get lost, which costs timing them again; but the thread that computes
 * waits no longer. */
static int lock_beside(const char *path)
{
    const struct timespec pause = {.tv_nsec = LOCK_PAUSE};
    CLAAS_AUTO_FREE char *name = claas_format("%s.lock", path);
    int64_t end = claas_clock_ms() + LOCK_WAIT;
    int lock = name ? open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;

    while (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) < 0) {
        if ((errno != EWOULDBLOCK && errno != EINTR) || claas_clock_ms() >= end) {
            close(lock);
            return -1;
        }
        (void)nanosleep(&pause, NULL);
    }
    return lock;
}

static int replace(const char *path, const struct gemm_choices_origin *origin,
                   const struct gemm_choices *choices)
{
    CLAAS_AUTO(gemm_choices_done) struct gemm_choices theirs = {0}, all = {0};
    CLAAS_AUTO_FREE uint8_t *data = NULL;
    CLAAS_AUTO(unlock) int lock = -1;
    size_t length = 0;
    int rc = make_folder(path);

    if (rc < 0)
        return rc;
    lock = lock_beside(path);
    (void)load(path, origin, &theirs); /* what is no good adds nothing */
    rc = merge(choices, &theirs, &all);
    if (rc == 0)
        rc = gemm_choices_encode(origin, &all, &data, &length);
    if (rc == 0)
        rc = claas_file_write_cache(path, data, length);
    return rc;
}

int gemm_choices_write(const char *path, const struct gemm_choices_origin *origin,
                       const struct gemm_choices *choices)
{
    int rc = replace(path, origin, choices);

    if (rc < 0)
        claas_warning("chosen algorithms are not kept in %s: %s", path, claas_error_text());
    return rc;
}

int64_t gemm_choices_clock(void)
{
    return claas_clock_ms();
}

void gemm_choices_note(int m, int n, int k, int64_t ms)
{
    if (ms >= SLOW_MS)
        claas_debug("choosing for a matrix product of %d x %d x %d took %lld ms", m, n, k,
                    (long long)ms);
}
