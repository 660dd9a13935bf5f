/* The HTTP bridge: HTTP requests in, messages to the other actors out, and back.
 *
 * It owns the listening socket, the connections and the limits on both; what an answer means is
 * decided by the actors it asks ("sampler", "scheduler", "storage", "trainer"). */
#ifndef CLAAS_BRIDGE_H
#define CLAAS_BRIDGE_H

#include "claas/actor.h"
#include "claas/config.h"

struct claas_bridge_args {
    const claas_config_t *config;
    /* Port that is listened on, written before start returns; may be NULL. A value > 0 found there
     * is taken in place of a configured port 0: so a restarted bridge keeps its port. */
    int *ret_port;
};

/* Checks the setting `listen`, before anything is opened. INVALID: malformed; DENIED: not a
 * loopback address. */
int claas_bridge_check(const claas_config_t *config);
/* Whether `listen` could be bound now: CONFLICT while another program has it. */
int claas_bridge_try(const claas_config_t *config);

/* Start argument: struct claas_bridge_args. Starting fails with a clear sentence if the address is
 * taken, malformed, or not a loopback address. */
extern const struct claas_actor_class claas_bridge_class;

#endif
