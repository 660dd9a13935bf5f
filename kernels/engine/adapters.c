/* Adapter handles. References are counted from any thread; the weights behind a handle are freed on
 * the compute thread, between two operations of the back-end. A handle's *identity* is a number
 * that changes with its weights: cached keys and values are found by it, so a trained adapter never
 * meets what it was before. */
#include "engine/engine.h"

#include <stdio.h>
#include <stdlib.h>

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

/* What the handle is around. */
static void release(claas_device_t *device, claas_adapter_t *adapter)
{
    if (adapter->backend != NULL)
        device->ops->adapter_free(device->backend, &adapter->backend);
    claas_adapter_image_done(&adapter->image);
}

int claas_adapter_new(claas_device_t *device, const struct claas_lora_config *lora,
                      enum claas_adapter_use use, claas_adapter_t **ret)
{
    claas_adapter_t *adapter = CLAAS_NEW(claas_adapter_t);
    int rc;

    if (adapter == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = device->ops->adapter_new(device->backend, lora, use, &adapter->backend);
    if (rc < 0) {
        free(adapter);
        return rc;
    }
    adapter->device = device;
    adapter->lora = *lora;
    adapter->use = use;
    atomic_init(&adapter->references, 1);
    link_adapter(device, adapter);
    *ret = adapter;
    return 0;
}

int claas_adapter_new_kept(claas_device_t *device, struct claas_adapter_image *image,
                           claas_adapter_t **ret)
{
    size_t count = claas_lora_parameter_count(&device->config, &image->lora);
    claas_adapter_t *adapter;

    /* Pages of zeros that are only read take no memory. */
    if (image->exp_avg == NULL)
        image->exp_avg = CLAAS_NEW_ARRAY(float, count);
    if (image->exp_avg_sq == NULL)
        image->exp_avg_sq = CLAAS_NEW_ARRAY(float, count);
    adapter = CLAAS_NEW(claas_adapter_t);
    if (adapter == NULL || image->exp_avg == NULL || image->exp_avg_sq == NULL) {
        free(adapter);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    adapter->device = device;
    adapter->lora = image->lora;
    adapter->use = CLAAS_ADAPTER_KEEP;
    adapter->image = *image;
    *image = (struct claas_adapter_image){0};
    atomic_init(&adapter->references, 1);
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
    /* Weights and two moments. */
    return 3 * sizeof(float) * claas_lora_parameter_count(&device->config, &adapter->lora);
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
        ret[count] = (struct claas_adapter_info){.use = a->use, .bytes = bytes_of(device, a)};
        (void)snprintf(ret[count].name, sizeof(ret[count].name), "%s", a->name);
    }
    pthread_mutex_unlock(lock);
    return count;
}

void claas_adapters_sweep(claas_device_t *device)
{
    claas_adapter_t *adapter;

    pthread_mutex_lock(&device->lock);
    adapter = CLAAS_TAKE(device->dead);
    device->sweeps_begun += adapter != NULL;
    pthread_mutex_unlock(&device->lock);
    if (adapter == NULL)
        return;
    while (adapter != NULL) {
        claas_adapter_t *next = adapter->next_dead;

        claas_kv_forget(device->kv, claas_kv_root(adapter->identity));
        unlink_adapter(device, adapter);
        release(device, adapter);
        free(adapter);
        adapter = next;
    }
    pthread_mutex_lock(&device->lock);
    device->sweeps_done++;
    pthread_cond_broadcast(&device->swept);
    pthread_mutex_unlock(&device->lock);
}

void claas_adapters_await_sweep(claas_device_t *device)
{
    uint64_t wanted;

    pthread_mutex_lock(&device->lock);
    wanted = device->sweeps_begun + (device->dead != NULL);
    while (device->sweeps_done < wanted && !device->stop)
        pthread_cond_wait(&device->swept, &device->lock);
    pthread_mutex_unlock(&device->lock);
}

void claas_adapters_close(claas_device_t *device)
{
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
