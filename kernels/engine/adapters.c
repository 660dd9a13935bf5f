/* Adapter handles. References are counted from any thread; the weights behind a handle are freed on
 * the compute thread, between two operations of the back-end. A handle's *identity* is a number
 * that changes with its weights: cached keys and values are found by it, so a trained adapter never
 * meets those of its former weights. */
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void link_adapter(claas_device_t *device, claas_adapter_t *adapter)
{
    pthread_mutex_lock(&device->lock);
    adapter->identity = ++device->last_identity;
    adapter->all_next = device->adapters;
    if (device->adapters != NULL)
        device->adapters->all_prev = adapter;
    device->adapters = adapter;
    pthread_mutex_unlock(&device->lock);
}

static void unlink_adapter(claas_device_t *device, claas_adapter_t *adapter)
{
    pthread_mutex_lock(&device->lock);
    if (adapter->all_prev != NULL)
        adapter->all_prev->all_next = adapter->all_next;
    else
        device->adapters = adapter->all_next;
    if (adapter->all_next != NULL)
        adapter->all_next->all_prev = adapter->all_prev;
    pthread_mutex_unlock(&device->lock);
}

/* Frees what the handle holds; the handle itself is unlinked already. */
static void release(claas_device_t *device, claas_adapter_t *adapter)
{
    if (adapter->backend != NULL)
        device->ops->adapter_free(device->backend, &adapter->backend);
    if (adapter->marked) /* what was saved and let go is what will be loaded next */
        claas_host_cache_put(device->host_cache, &adapter->mark, true, &adapter->image);
    claas_adapter_image_done(&adapter->image);
}

static int new_handle(claas_device_t *device, const struct claas_lora_config *lora,
                      enum claas_adapter_use use, claas_adapter_t **ret)
{
    claas_adapter_t *adapter = CLAAS_NEW(claas_adapter_t);

    if (adapter == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    adapter->device = device;
    adapter->lora = *lora;
    adapter->use = use;
    atomic_init(&adapter->references, 1);
    *ret = adapter;
    return 0;
}

int claas_adapter_new(claas_device_t *device, const struct claas_lora_config *lora,
                      enum claas_adapter_use use, claas_adapter_t **ret)
{
    CLAAS_AUTO_FREE claas_adapter_t *adapter = NULL;
    int rc = new_handle(device, lora, use, &adapter);

    if (rc == 0)
        rc = device->ops->adapter_new(device->backend, lora, use, &adapter->backend);
    if (rc < 0)
        return rc;
    link_adapter(device, adapter);
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

bool claas_device_copies(const claas_device_t *device)
{
    return device->ops->adapter_clone != NULL;
}

int claas_adapter_new_clone(claas_device_t *device, const claas_adapter_t *source,
                            enum claas_adapter_use use, claas_adapter_t **ret)
{
    CLAAS_AUTO_FREE claas_adapter_t *adapter = NULL;
    int rc = 0;

    if (device->ops->adapter_clone == NULL)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "the device makes no copies of adapters");
    rc = new_handle(device, &source->lora, use, &adapter);
    if (rc == 0)
        rc = device->ops->adapter_clone(device->backend, source->backend, use, &adapter->backend);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&device->lock);
    device->stats.clones++;
    pthread_mutex_unlock(&device->lock);
    link_adapter(device, adapter);
    *ret = CLAAS_TAKE(adapter);
    return 0;
}

int claas_adapter_new_kept(claas_device_t *device, struct claas_adapter_image *image,
                           claas_adapter_t **ret)
{
    claas_adapter_t *adapter = NULL;
    int rc = new_handle(device, &image->lora, CLAAS_ADAPTER_KEEP, &adapter);

    if (rc < 0)
        return rc;
    adapter->image = *image;
    *image = (struct claas_adapter_image){0};
    link_adapter(device, adapter);
    *ret = adapter;
    return 0;
}

claas_adapter_t *claas_adapter_ref(claas_adapter_t *adapter)
{
    atomic_fetch_add(&adapter->references, 1);
    return adapter;
}

void claas_adapter_unref(claas_adapter_t **ref)
{
    claas_adapter_t *adapter = CLAAS_TAKE(*ref);
    claas_device_t *device;

    if (adapter == NULL || atomic_fetch_sub(&adapter->references, 1) != 1)
        return;
    device = adapter->device;
    if (device == NULL) {
        free(adapter);
        return;
    }
    pthread_mutex_lock(&device->lock);
    adapter->next_dead = device->dead;
    device->dead = adapter;
    claas_device_poke(device);
    pthread_mutex_unlock(&device->lock);
}

bool claas_adapter_is_shared(const claas_adapter_t *adapter)
{
    return atomic_load(&adapter->references) > 1;
}

struct claas_lora_config claas_adapter_lora(const claas_adapter_t *adapter)
{
    return adapter->lora;
}

void claas_adapter_set_name(claas_adapter_t *adapter, const char *name)
{
    claas_device_t *device = adapter->device;

    if (device == NULL)
        return;
    pthread_mutex_lock(&device->lock);
    (void)snprintf(adapter->name, sizeof(adapter->name), "%s", name);
    pthread_mutex_unlock(&device->lock);
}

static uint64_t bytes_of(const claas_device_t *device, const claas_adapter_t *adapter)
{
    if (adapter->backend != NULL)
        return device->ops->adapter_bytes(adapter->backend);
    /* Weights and, unless they are zero, two moments. */
    return (adapter->image.exp_avg != NULL ? 3 : 1) * sizeof(float) *
           claas_lora_parameter_count(&device->config, &adapter->lora);
}

size_t claas_device_adapters(const claas_device_t *device, struct claas_adapter_info *ret,
                             size_t max)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)&device->lock;
    size_t count = 0;

    pthread_mutex_lock(lock);
    for (const claas_adapter_t *a = device->adapters; a != NULL; a = a->all_next, count++) {
        if (count >= max)
            continue;
        ret[count] = (struct claas_adapter_info){
            .use = a->use, .bytes = bytes_of(device, a), .in_host = a->backend == NULL};
        (void)snprintf(ret[count].name, sizeof(ret[count].name), "%s", a->name);
    }
    pthread_mutex_unlock(lock);
    return count;
}

/* The lock is held. */
static bool has_learner(const claas_device_t *device)
{
    for (const claas_adapter_t *a = device->adapters; a != NULL; a = a->all_next)
        if (a->use == CLAAS_ADAPTER_TRAIN)
            return true;
    return false;
}

bool claas_device_trains(const claas_device_client_t *client)
{
    claas_device_t *device = client->device;
    bool trains;

    pthread_mutex_lock(&device->lock);
    trains = has_learner(device);
    pthread_mutex_unlock(&device->lock);
    return trains;
}

/* Frees the memory that a step left, unless a step is under way or another will come. */
static void give_back(claas_device_t *device)
{
    bool is_idle;

    pthread_mutex_lock(&device->lock);
    is_idle = device->current == NULL && !has_learner(device);
    pthread_mutex_unlock(&device->lock);
    if (is_idle)
        device->ops->give_back(device->backend);
}

void claas_adapters_sweep(claas_device_t *device)
{
    claas_adapter_t *adapter;
    bool room_wanted;

    pthread_mutex_lock(&device->lock);
    adapter = CLAAS_TAKE(device->dead);
    room_wanted = device->room_wanted;
    device->room_wanted = false;
    device->sweeps_begun += adapter != NULL || room_wanted;
    pthread_mutex_unlock(&device->lock);
    if (adapter == NULL && !room_wanted)
        return;
    while (adapter != NULL) {
        claas_adapter_t *next = adapter->next_dead;

        claas_kv_forget(device->kv, claas_kv_root(adapter->identity));
        unlink_adapter(device, adapter);
        release(device, adapter);
        free(adapter);
        adapter = next;
    }
    if (room_wanted)
        give_back(device);
    pthread_mutex_lock(&device->lock);
    device->sweeps_done++;
    pthread_cond_broadcast(&device->swept);
    pthread_mutex_unlock(&device->lock);
}

void claas_adapters_await_sweep(claas_device_t *device)
{
    uint64_t wanted;

    pthread_mutex_lock(&device->lock);
    if (device->ops->give_back != NULL) {
        device->room_wanted = true;
        claas_device_poke(device);
    }
    wanted = device->sweeps_begun + (device->dead != NULL || device->room_wanted);
    while (device->sweeps_done < wanted && !device->stop)
        pthread_cond_wait(&device->swept, &device->lock);
    pthread_mutex_unlock(&device->lock);
}

/* --- saved copies on the device --- */

/* Puts `hot` in front of the list; entries 0 … place-1 move one place back, over the one at
 * `place`. The lock is held. */
static void put_first(claas_device_t *device, int place, struct claas_hot hot)
{
    memmove(device->hot + 1, device->hot, (size_t)place * sizeof(device->hot[0]));
    device->hot[0] = hot;
}

void claas_adapters_add_hot(claas_device_t *device, const struct claas_adapter_mark *mark,
                            claas_adapter_t *adapter)
{
    int cycles = claas_device_cycles(device), place = 0;
    int last = (cycles < CLAAS_HOT_MAX ? cycles : CLAAS_HOT_MAX) - 1;
    claas_adapter_t *dropped;

    pthread_mutex_lock(&device->lock);
    while (place < last && device->hot[place].adapter != NULL)
        place++;
    dropped = device->hot[place].adapter;
    put_first(device, place, (struct claas_hot){claas_adapter_ref(adapter), *mark});
    pthread_mutex_unlock(&device->lock);
    claas_adapter_unref(&dropped);
}

claas_adapter_t *claas_adapters_find_hot(claas_device_t *device,
                                         const struct claas_adapter_mark *mark, bool with_moments)
{
    claas_adapter_t *found = NULL;

    pthread_mutex_lock(&device->lock);
    for (int i = 0; i < CLAAS_HOT_MAX && found == NULL; i++)
        if (device->hot[i].adapter != NULL &&
            claas_adapter_mark_is(&device->hot[i].mark, mark, with_moments)) {
            found = claas_adapter_ref(device->hot[i].adapter);
            put_first(device, i, device->hot[i]);
        }
    pthread_mutex_unlock(&device->lock);
    return found;
}

void claas_adapters_drop_hot(claas_device_t *device)
{
    struct claas_hot dropped[CLAAS_HOT_MAX];

    pthread_mutex_lock(&device->lock);
    memcpy(dropped, device->hot, sizeof(dropped));
    memset(device->hot, 0, sizeof(device->hot));
    pthread_mutex_unlock(&device->lock);
    for (int i = 0; i < CLAAS_HOT_MAX; i++)
        claas_adapter_unref(&dropped[i].adapter);
}

void claas_device_adapter_forget(claas_device_t *device, const char *directory)
{
    struct claas_hot dropped[CLAAS_HOT_MAX] = {0};
    struct claas_adapter_mark mark;

    if (!claas_adapter_mark_read(directory, &mark))
        return;
    pthread_mutex_lock(&device->lock);
    for (int i = 0; i < CLAAS_HOT_MAX; i++)
        if (device->hot[i].adapter != NULL &&
            claas_adapter_mark_is(&device->hot[i].mark, &mark, true)) {
            dropped[i] = device->hot[i];
            device->hot[i].adapter = NULL;
        }
    for (claas_adapter_t *a = device->adapters; a != NULL; a = a->all_next)
        if (a->marked && claas_adapter_mark_is(&a->mark, &mark, true))
            a->marked = false;
    pthread_mutex_unlock(&device->lock);
    for (int i = 0; i < CLAAS_HOT_MAX; i++)
        claas_adapter_unref(&dropped[i].adapter);
    claas_host_cache_drop(device->host_cache, &mark);
}

void claas_adapters_close(claas_device_t *device)
{
    claas_adapters_drop_hot(device);
    claas_adapters_sweep(device);
    while (device->adapters != NULL) {
        claas_adapter_t *adapter = device->adapters;

        unlink_adapter(device, adapter);
        release(device, adapter);
        adapter->device = NULL;
    }
}

void claas_adapter_changed(claas_adapter_t *adapter)
{
    claas_device_t *device = adapter->device;

    claas_kv_forget(device->kv, claas_kv_root(adapter->identity));
    pthread_mutex_lock(&device->lock);
    adapter->identity = ++device->last_identity;
    pthread_mutex_unlock(&device->lock);
}
