/* A full device: what trains has precedence over adapters that no chat uses. Clients that keep such
 * adapters (the sampler) get a MEMORY event, let go of them and say so; then what failed is tried
 * once more. Nobody waits meanwhile but the work itself: chats go on. */
#include "engine/engine.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#define AWAIT_S 5 /* of the I/O thread: a client that does not answer shall not stop all loads */

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
        claas_client_push(c, node);
    }
    is_asked = device->asked_count > 0;
    pthread_mutex_unlock(&device->lock);
    return is_asked;
}

bool claas_memory_is_asked(claas_device_t *device)
{
    bool is_asked;

    pthread_mutex_lock(&device->lock);
    is_asked = device->asked_count > 0;
    pthread_mutex_unlock(&device->lock);
    return is_asked;
}

void claas_memory_await(claas_device_t *device)
{
    struct timespec until;
    int rc = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += AWAIT_S;
    pthread_mutex_lock(&device->lock);
    while (device->asked_count > 0 && !device->stop && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&device->swept, &device->lock, &until);
    pthread_mutex_unlock(&device->lock);
    claas_adapters_await_sweep(device);
}
