/* The four actors a bridge asks, played by a script, and a server made of them. What a fake does is
 * told by the texts it gets: see bridge_fakes.c. */
#ifndef CLAAS_TEST_BRIDGE_FAKES_H
#define CLAAS_TEST_BRIDGE_FAKES_H

#include <stdatomic.h>

#include "claas/config.h"
#include "claas/runtime.h"

struct fake_server {
    claas_config_t *config;
    claas_runtime_t *runtime;
    int port;
    char directory[64];
};

/* `settings` ("key=value", ends with NULL) over the defaults of the tests. */
void fake_server_start(struct fake_server *server, const char *const *settings);
void fake_server_stop(struct fake_server *server);

/* Cancels that reached the fake sampler and scheduler. */
extern atomic_int fake_cancels;
/* Requests they hold right now without answering. */
extern atomic_int fake_held;
/* Waits until *counter is at least `value`; fails the test after 10 s. */
void fake_wait(atomic_int *counter, int value);

#endif
