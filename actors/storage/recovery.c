/* The start: makes sure that this is the only server of the directory, and puts in order what the
 * last one left, however it ended.
 *
 * Nothing is deleted that the catalogue does not name. A publication writes the directory's final
 * path to `trash` before it renames, and takes the row back in the transaction that makes the
 * version; so what a crash leaves behind is known. Directories that the catalogue does not know (as
 * after restoring an older database) are left alone, with a warning. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "store_sqlite.h"

#define WARNINGS_MAX   20
#define TRASH_RETRY_MS 30000 /* until what could not be removed is tried again */

void store_warn(const struct store *store, const char *format, ...)
{
    char text[1024];
    va_list args;

    if (!store->options.warn)
        return;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    store->options.warn(store->options.arg, text);
}

int store_lock_directory(struct store *store)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/lock", store->data);
    char text[32] = "";
    int length;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    store->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (store->lock < 0)
        return claas_fail_errno("the data directory %s is not writable", store->data);
    if (flock(store->lock, LOCK_EX | LOCK_NB) < 0) {
        ssize_t n = errno == EWOULDBLOCK ? pread(store->lock, text, sizeof(text) - 1, 0) : -1;

        if (n < 0)
            return claas_fail_errno("%s", path);
        text[strcspn(text, " \n")] = '\0';
        return claas_fail(CLAAS_ERR_BUSY,
                          "the data directory %s is in use by another server (process %s)",
                          store->data, text[0] ? text : "unknown");
    }
    /* Always 16 bytes and never truncated: on a full disk the old ones are written over. */
    length = snprintf(text, sizeof(text), "%-15ld\n", (long)getpid());
    if (pwrite(store->lock, text, (size_t)length, 0) != length)
        return claas_fail_errno("%s", path);
    return 0;
}

static void close_directory(DIR **dir)
{
    if (*dir)
        closedir(*dir);
    *dir = NULL;
}

/* Calls `visit` for every entry. */
static int each_entry(const char *directory,
                      int (*visit)(struct store *, const char *, const char *), struct store *store)
{
    CLAAS_AUTO(close_directory) DIR *dir = opendir(directory);
    struct dirent *entry;
    int rc = 0;

    if (!dir)
        return errno == ENOENT || errno == ENOTDIR ? 0 : claas_fail_errno("%s", directory);
    while (rc == 0 && (entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            rc = visit(store, directory, entry->d_name);
    return rc;
}

static int sweep_entry(struct store *store, const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);

    (void)store;
    return path ? claas_remove_all(path) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* The first path after those that could not be removed; > 0 if there is one. */
static int find_trash(struct store *store, char **ret)
{
    DB_STATEMENT *statement = NULL;
    int rc = db_query(&store->writer, &statement,
                      "SELECT path FROM trash WHERE path > ? ORDER BY path LIMIT 1", "t",
                      store->trash_stuck ? store->trash_stuck : "");

    if (rc == 0)
        rc = db_step(&store->writer, statement);
    if (rc <= 0)
        return rc;
    *ret = claas_strdup(db_text(statement, 0));
    return *ret ? 1 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int remove_trash(struct store *store, const char *entry)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", store->data, entry);
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_remove_all(path);
    /* The row goes last and after the removal is durable: else a crash between would leave a
     * directory without a name. */
    if (rc == 0) {
        *strrchr(path, '/') = '\0';
        rc = path_exists(path) ? claas_fsync_path(path) : 0;
    }
    if (rc == 0)
        rc = db_run(&store->writer, "DELETE FROM trash WHERE path = ?", "t", entry);
    return rc < 0 ? rc : 0;
}

int store_empty_trash(struct store *store)
{
    CLAAS_AUTO_FREE char *entry = NULL;
    int rc = find_trash(store, &entry);

    if (rc == 0 && !store->trash_stuck)
        store->trash_told = false;
    else if (rc == 0 && claas_clock_ms() >= store->trash_retry_ms)
        free(CLAAS_TAKE(store->trash_stuck));
    if (rc <= 0)
        return rc;
    rc = store_settle(store); /* what is in doubt may be a version yet */
    if (rc < 0)
        return rc;
    rc = remove_trash(store, entry);
    if (rc == 0)
        return 1;
    /* It is passed by, so that the paths after it can go all the same. */
    if (!store->trash_told)
        store_warn(store, "a leftover cannot be removed: %s", claas_error_text());
    store->trash_told = true;
    free(store->trash_stuck);
    store->trash_stuck = CLAAS_TAKE(entry);
    store->trash_retry_ms = claas_clock_ms() + TRASH_RETRY_MS;
    return 1;
}

/* --- versions against directories ------------------------------------------------------ */

struct known_version {
    int64_t adapter;
    const char *name, *dir;
    int64_t number;
    bool current;
    bool missing; /* as far as is known */
    bool sized;
    int64_t bytes;
};

/* Of every version the weights file must have the size that it was published with; of the current
 * one, and of one that was lost, the files' headers are read too. */
static int check_version(const struct store *store, const struct known_version *version)
{
    CLAAS_AUTO_FREE char *path = store_version_path(store, version->dir, version->number, false);
    CLAAS_AUTO_FREE char *weights = path ? claas_format("%s/%s", path, ADAPTER_WEIGHTS) : NULL;
    struct adapter_facts facts;
    struct stat info;
    int rc = 0;

    if (!weights)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (stat(weights, &info) < 0)
        rc = claas_fail_errno("%s", weights);
    else if (version->sized && (int64_t)info.st_size != version->bytes)
        rc = claas_fail(CLAAS_ERR_FORMAT, "%s has %jd bytes instead of %" PRId64, weights,
                        (intmax_t)info.st_size, version->bytes);
    else if (version->current || version->missing)
        rc = adapter_check(path, false, &facts);
    return rc;
}

static int mark(struct store *store, const struct known_version *version, const char *state)
{
    int rc =
        db_run(&store->writer, "UPDATE versions SET state = ? WHERE adapter = ? AND number = ?",
               "tii", state, version->adapter, version->number);

    return rc < 0 ? rc : 0;
}

/* Only a warning: the loss of one adapter's version must not keep the others from being served. */
static void tell_lost(struct store *store, const struct known_version *version, int *warnings)
{
    if (version->current)
        store_warn(store,
                   "the current version %" PRId64
                   " of adapter '%s' is lost and not served: restore "
                   "its directory from a backup and start again, or roll it back: %s",
                   version->number, version->name, claas_error_text());
    else if (!version->missing && (*warnings)++ < WARNINGS_MAX)
        store_warn(store, "version %" PRId64 " of adapter '%s' is lost: %s", version->number,
                   version->name, claas_error_text());
}

static int check_row(struct store *store, sqlite3_stmt *row, int *warnings)
{
    struct known_version version = {
        .adapter = db_int(row, 0),
        .name = db_text(row, 1),
        .dir = db_text(row, 2),
        .number = db_int(row, 3),
        .current = db_int(row, 4) != 0,
        .sized = !db_is_null(row, 5),
        .bytes = db_int(row, 5),
        .missing = strcmp(db_text(row, 6), "missing") == 0,
    };
    int rc = check_version(store, &version);

    if (rc == CLAAS_ERR_NO_MEMORY || rc == CLAAS_ERR_OVERLOADED)
        return rc;
    if (rc == CLAAS_ERR_IO || rc == CLAAS_ERR_DENIED) {
        /* Nothing is known to be lost. Whoever needs it sees whether it can be read by then. */
        if ((*warnings)++ < WARNINGS_MAX)
            store_warn(store, "version %" PRId64 " of adapter '%s' cannot be read: %s",
                       version.number, version.name, claas_error_text());
        return 0;
    }
    if (rc < 0)
        tell_lost(store, &version, warnings);
    else if (version.missing)
        store_warn(store, "version %" PRId64 " of adapter '%s' is there again", version.number,
                   version.name);
    if (version.missing == (rc < 0))
        return 0;
    return mark(store, &version, rc < 0 ? "missing" : "available");
}

static int check_versions(struct store *store)
{
    DB_STATEMENT *statement = NULL;
    int warnings = 0;
    int rc = db_query(&store->reader, &statement,
                      "SELECT a.id, a.name, a.dir, v.number, v.number = a.current, v.bytes,"
                      " v.state FROM adapters a JOIN versions v ON v.adapter = a.id"
                      " WHERE v.state IN ('available', 'missing') ORDER BY a.id, v.number",
                      "");

    if (rc < 0)
        return rc;
    while ((rc = db_step(&store->reader, statement)) > 0) {
        rc = check_row(store, statement, &warnings);
        if (rc < 0)
            return rc;
    }
    return rc;
}

/* --- directories that the catalogue does not know -------------------------------------- */

static int judge_version(struct store *store, const char *directory, const char *name)
{
    int64_t known = 0, number;
    const char *dir = directory + strlen(store->data) + strlen("/adapters/");
    int rc;

    if (sscanf(name, "v%" SCNd64, &number) != 1)
        number = -1;
    rc = db_get_int(&store->reader, &known,
                    "SELECT count(*) FROM adapters a JOIN versions v ON v.adapter = a.id"
                    " WHERE a.dir = ? AND v.number = ?",
                    "ti", dir, number);
    if (rc >= 0 && !known)
        store_warn(store, "%s/%s is in no catalogue and was left alone", directory, name);
    return rc < 0 ? rc : 0;
}

static int judge_name(struct store *store, const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);

    return path ? each_entry(path, judge_version, store) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int judge_tenant(struct store *store, const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);

    return path ? each_entry(path, judge_name, store) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int tell_unknown(struct store *store)
{
    CLAAS_AUTO_FREE char *adapters = claas_format("%s/adapters", store->data);

    return adapters ? each_entry(adapters, judge_tenant, store)
                    : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int stop_at_first(struct store *store, const char *directory, const char *name)
{
    (void)store;
    (void)directory;
    (void)name;
    return 1;
}

bool store_has_adapters(struct store *store)
{
    CLAAS_AUTO_FREE char *adapters = claas_format("%s/adapters", store->data);

    return adapters && each_entry(adapters, stop_at_first, store) > 0;
}

int store_recover(struct store *store)
{
    int rc = each_entry(store->staging, sweep_entry, store);

    if (rc < 0)
        return claas_fail_context(rc, "staging cannot be emptied: ");
    while ((rc = store_empty_trash(store)) > 0)
        continue;
    /* Leftovers are no reason not to serve; upkeep tries again. */
    if (rc < 0)
        store_warn(store, "leftovers cannot be removed: %s", claas_error_text());
    rc = check_versions(store);
    if (rc == 0)
        rc = tell_unknown(store);
    if (rc == 0)
        rc = store_count_crash(store);
    /* Nor is a full disk, on which the jobs' states cannot be written, a reason not to serve. */
    if (rc == 0 && !store->options.scheduler_elsewhere && store_requeue(store) < 0)
        store_warn(store, "jobs look as if they ran: %s", claas_error_text());
    return rc;
}
