/* What happens when the device is full: training has precedence over adapters that no chat uses.
 * Clients that keep such adapters (the sampler) get a MEMORY event, let go of them and say so; then
 * what failed is tried once more. Only that work waits meanwhile: chats go on. A client that does
 * not answer is waited for once, and not for long: neither loads nor training may hang because of
 * it. */
#include "engine/engine.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "claas/clock.h"

void claas_device_client_keeps_idle(claas_device_client_t *client)
{
    claas_device_t *device = client->device;

    pthread_mutex_lock(&device->lock);
    client->next_keeper = device->keepers;
    device->keepers = client;
    pthread_mutex_unlock(&device->lock);
}

/* The lock is held. */
static void end_asking(claas_device_client_t *client)
{
    if (!client->is_asked)
        return;
    client->is_asked = false;
    client->device->asked_count--;
    pthread_cond_broadcast(&client->device->swept);
    claas_device_poke(client->device);
}

void claas_device_client_gave(claas_device_client_t *client)
{
    pthread_mutex_lock(&client->device->lock);
    end_asking(client);
    pthread_mutex_unlock(&client->device->lock);
}

void claas_memory_forget(claas_device_client_t *client)
{
    claas_device_t *device = client->device;
    claas_device_client_t **link = &device->keepers;

    pthread_mutex_lock(&device->lock);
    end_asking(client);
    while (*link != NULL && *link != client)
        link = &(*link)->next_keeper;
    if (*link != NULL)
        *link = client->next_keeper;
    pthread_mutex_unlock(&device->lock);
}

/* The lock is held. When the time to answer ends (claas_clock_ms). */
static int64_t find_end(const claas_device_t *device)
{
    return device->asked_ms + device->await_ms;
}

/* The lock is held. */
static bool is_awaited(const claas_device_t *device)
{
    return device->asked_count > 0 && claas_clock_ms() < find_end(device);
}

bool claas_memory_ask(claas_device_t *device)
{
    bool is_asked;

    pthread_mutex_lock(&device->lock);
    for (claas_device_client_t *c = device->keepers; c != NULL; c = c->next_keeper) {
        struct claas_event_node *node = c->is_asked ? NULL : CLAAS_NEW(struct claas_event_node);

        if (node == NULL)
            continue;
        node->kind = CLAAS_EVENT_MEMORY;
        c->is_asked = true;
        device->asked_count++;
        device->asked_ms = claas_clock_ms();
        claas_client_push(c, node);
    }
    is_asked = is_awaited(device);
    pthread_mutex_unlock(&device->lock);
    return is_asked;
}

bool claas_memory_is_asked(claas_device_t *device)
{
    bool is_asked;

    pthread_mutex_lock(&device->lock);
    is_asked = is_awaited(device);
    pthread_mutex_unlock(&device->lock);
    return is_asked;
}

bool claas_memory_sleep(claas_device_t *device, pthread_cond_t *changed)
{
    int64_t end = find_end(device);
    struct timespec until = {.tv_sec = end / 1000, .tv_nsec = end % 1000 * 1000000};

    if (is_awaited(device))
        return pthread_cond_timedwait(changed, &device->lock, &until) != ETIMEDOUT;
    pthread_cond_wait(changed, &device->lock);
    return true;
}

void claas_memory_await(claas_device_t *device)
{
    pthread_mutex_lock(&device->lock);
    while (is_awaited(device) && !device->stop)
        (void)claas_memory_sleep(device, &device->swept);
    pthread_mutex_unlock(&device->lock);
    claas_adapters_await_sweep(device);
}
