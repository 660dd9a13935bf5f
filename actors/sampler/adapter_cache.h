/* Adapter versions held on the device for chat: loaded on first use, and the least recently used
 * one dropped when there are too many. When the device's memory is too full for one more, those are
 * dropped that no chat uses; when there is none left, the load fails with OVERLOADED, or with
 * NO_MEMORY if no other adapter is loaded and nothing learns. A version is immutable, so (uid,
 * version) is the whole key and a new version is simply another entry: chats in flight keep the one
 * they began with, the next chat takes the new one. */
#ifndef CLAAS_SAMPLER_ADAPTER_CACHE_H
#define CLAAS_SAMPLER_ADAPTER_CACHE_H

#include "claas/device.h"

struct adapter_cache;

/* Called once per request: with a reference the receiver owns, or NULL and an error's code and
 * sentence. */
typedef void adapter_ready_fn(void *arg, claas_adapter_t *adapter, int error, const char *text);

/* `limit`: versions held (the setting device.adapters). */
int adapter_cache_new(claas_device_client_t *client, size_t limit, struct adapter_cache **ret);
void adapter_cache_free(struct adapter_cache **cache);
/* Hands the version out now or once it is loaded. */
int adapter_cache_get(struct adapter_cache *cache, const char *uid, int version,
                      const char *directory, adapter_ready_fn *ready, void *arg);
/* Lets go of every version that no chat uses; returns how many. */
int adapter_cache_drop_idle(struct adapter_cache *cache);
/* Forgets a waiter that went away. */
void adapter_cache_forget(struct adapter_cache *cache, void *arg);
/* Takes an ADAPTER or FAILED event of the client; true if it was the cache's. */
bool adapter_cache_event(struct adapter_cache *cache, struct claas_device_event *event);

#endif
