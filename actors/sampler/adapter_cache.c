/* Least-recently-used cache of loaded adapter versions: see adapter_cache.h. The list is short
 * (tens), so it is searched linearly. */
#include "adapter_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

/* Of one adapter: the current version and one to compare it with. Versions from before that are
 * rarely asked for. */
#define VERSIONS_MAX 2

struct waiter {
    struct waiter *next;
    adapter_ready_fn *ready;
    void *arg;
};

struct entry {
    struct entry *next;
    char uid[65];
    int version;
    char *directory;
    claas_adapter_t *adapter; /* NULL while it loads */
    uint64_t load_id;
    uint64_t used; /* tick of the last use */
    struct waiter *waiters;
};

struct adapter_cache {
    claas_device_client_t *client;
    size_t limit;
    uint64_t tick;
    struct entry *entries;
};

int adapter_cache_new(claas_device_client_t *client, size_t limit, struct adapter_cache **ret)
{
    struct adapter_cache *cache = CLAAS_NEW(struct adapter_cache);

    if (!cache)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cache->client = client;
    cache->limit = limit;
    *ret = cache;
    return 0;
}

static void entry_free(struct entry *entry)
{
    while (entry->waiters) {
        struct waiter *waiter = entry->waiters;

        entry->waiters = waiter->next;
        free(waiter);
    }
    if (entry->adapter)
        claas_adapter_unref(&entry->adapter);
    free(entry->directory);
    free(entry);
}

void adapter_cache_free(struct adapter_cache **cache)
{
    if (!*cache)
        return;
    while ((*cache)->entries) {
        struct entry *entry = (*cache)->entries;

        (*cache)->entries = entry->next;
        entry_free(entry);
    }
    free(*cache);
    *cache = NULL;
}

static void entry_remove(struct adapter_cache *cache, struct entry *entry)
{
    struct entry **link = &cache->entries;

    while (*link && *link != entry)
        link = &(*link)->next;
    if (*link)
        *link = entry->next;
    entry_free(entry);
}

/* The least recently used entry of an adapter (NULL: of any) that is loaded, and how many entries
 * there are, those that are still loading among them or not. */
static struct entry *find_oldest(const struct adapter_cache *cache, const char *uid,
                                 bool with_loading, size_t *ret_count)
{
    struct entry *oldest = NULL;

    *ret_count = 0;
    for (struct entry *e = cache->entries; e; e = e->next) {
        if (uid && strcmp(e->uid, uid) != 0)
            continue;
        *ret_count += with_loading || e->adapter;
        if (e->adapter && (!oldest || e->used < oldest->used))
            oldest = e;
    }
    return oldest;
}

/* Drops the least recently used entries of an adapter (NULL: of any) until there are at most
 * `most`. Requests in flight hold their own references. */
static void keep_at_most(struct adapter_cache *cache, const char *uid, size_t most,
                         bool with_loading)
{
    struct entry *oldest;
    size_t count;

    while ((oldest = find_oldest(cache, uid, with_loading, &count)) && count > most)
        entry_remove(cache, oldest);
}

/* Drops the least recently used entry that no request uses: another would give no memory back.
 * False if there is none. */
static bool drop_idle(struct adapter_cache *cache)
{
    struct entry *oldest = NULL;

    for (struct entry *e = cache->entries; e; e = e->next)
        if (e->adapter && !claas_adapter_is_shared(e->adapter) &&
            (!oldest || e->used < oldest->used))
            oldest = e;
    if (oldest)
        entry_remove(cache, oldest);
    return oldest != NULL;
}

int adapter_cache_drop_idle(struct adapter_cache *cache)
{
    int count = 0;

    while (drop_idle(cache))
        count++;
    return count;
}

static struct entry *entry_add(struct adapter_cache *cache, const char *uid, int version,
                               const char *directory)
{
    struct entry *entry = CLAAS_NEW(struct entry);

    if (entry)
        entry->directory = claas_strdup(directory);
    if (!entry || !entry->directory) {
        free(entry);
        return NULL;
    }
    snprintf(entry->uid, sizeof(entry->uid), "%s", uid);
    entry->version = version;
    entry->next = cache->entries;
    cache->entries = entry;
    return entry;
}

static int load(struct adapter_cache *cache, struct entry *entry)
{
    return claas_device_adapter_load(cache->client, entry->directory, CLAAS_ADAPTER_SERVE,
                                     &entry->load_id);
}

int adapter_cache_get(struct adapter_cache *cache, const char *uid, int version,
                      const char *directory, adapter_ready_fn *ready, void *arg)
{
    struct entry *entry = cache->entries;
    struct waiter *waiter;
    int rc;

    while (entry && (entry->version != version || strcmp(entry->uid, uid) != 0))
        entry = entry->next;
    if (entry && entry->adapter) {
        entry->used = ++cache->tick;
        ready(arg, claas_adapter_ref(entry->adapter), 0, NULL);
        return 0;
    }
    if (!entry) {
        keep_at_most(cache, uid, VERSIONS_MAX - 1, true);
        keep_at_most(cache, NULL, cache->limit - 1, true);
        entry = entry_add(cache, uid, version, directory);
        if (!entry)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        rc = load(cache, entry);
        if (rc < 0) {
            entry_remove(cache, entry);
            return rc;
        }
    }
    waiter = CLAAS_NEW(struct waiter);
    if (!waiter)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *waiter = (struct waiter){entry->waiters, ready, arg};
    entry->waiters = waiter;
    return 0;
}

void adapter_cache_forget(struct adapter_cache *cache, void *arg)
{
    for (struct entry *entry = cache->entries; entry; entry = entry->next) {
        struct waiter **link = &entry->waiters;

        while (*link) {
            struct waiter *waiter = *link;

            if (waiter->arg == arg) {
                *link = waiter->next;
                free(waiter);
            } else {
                link = &waiter->next;
            }
        }
    }
}

static void serve_waiters(struct entry *entry, int error, const char *text)
{
    while (entry->waiters) {
        struct waiter *waiter = entry->waiters;

        entry->waiters = waiter->next;
        waiter->ready(waiter->arg, error ? NULL : claas_adapter_ref(entry->adapter), error, text);
        free(waiter);
    }
}

static void load_failed(struct adapter_cache *cache, struct entry *entry, int error,
                        const char *text)
{
    serve_waiters(entry, error, text);
    entry_remove(cache, entry);
}

/* The device's memory is the true limit: drops an idle adapter and loads again. When none is idle
 * the client should wait (OVERLOADED), unless there is no other adapter and nothing learns: then
 * waiting does not help. */
static void out_of_memory(struct adapter_cache *cache, struct entry *entry, const char *text)
{
    if (drop_idle(cache)) {
        int rc = load(cache, entry);

        if (rc < 0)
            load_failed(cache, entry, rc, claas_error_text());
        return;
    }
    claas_warning("no memory for another adapter: %s", text);
    if (cache->entries != entry || entry->next || claas_device_trains(cache->client))
        load_failed(cache, entry, CLAAS_ERR_OVERLOADED,
                    "there is no memory for it beside the adapters in use, try again later");
    else
        load_failed(cache, entry, CLAAS_ERR_NO_MEMORY,
                    "there is no memory for it, even with no other adapter loaded");
}

bool adapter_cache_event(struct adapter_cache *cache, struct claas_device_event *event)
{
    struct entry *entry = cache->entries;

    while (entry && (entry->adapter || entry->load_id != event->id))
        entry = entry->next;
    if (!entry)
        return false;
    if (event->kind == CLAAS_EVENT_ADAPTER) {
        entry->adapter = CLAAS_TAKE(event->adapter);
        entry->used = ++cache->tick;
        serve_waiters(entry, 0, NULL);
        /* Many may have been asked for while none was there that could go. */
        keep_at_most(cache, entry->uid, VERSIONS_MAX, false);
        keep_at_most(cache, NULL, cache->limit, false);
    } else if (event->error == CLAAS_ERR_NO_MEMORY) {
        out_of_memory(cache, entry, event->text);
    } else {
        load_failed(cache, entry, event->error ? event->error : CLAAS_ERR_INTERNAL, event->text);
    }
    return true;
}
