/* The process's router, in a thread of its own. */
#ifndef CLAAS_RUNTIME_SWITCH_H
#define CLAAS_RUNTIME_SWITCH_H

#include "claas/config.h"

struct claas_switch;

/* Opens the sockets in the calling thread (so that errors come back from here) and starts the
 * thread, which with `connect` set asks the other node to take us in. */
int claas_switch_new(const claas_config_t *config, struct claas_switch **ret);
/* 1 once the other node has taken us in (or there is none), 0 while it has not answered, < 0 when
 * it refuses. */
int claas_switch_joined(struct claas_switch *sw);
/* Whether `connect` can be another node's address: ipc:// and a path where a socket is or may
 * be. */
int claas_switch_check_upstream(const char *endpoint);
/* Whether a switch could begin on the data directory now: BUSY while another server is there, or
 * what the file system says. With `connect` it is not asked. Nothing is kept. */
int claas_switch_try(const claas_config_t *config);
/* What `connect` is set to. */
const char *claas_switch_upstream(const struct claas_switch *sw);
/* Stops the thread and closes the sockets; answers on their way out get a second. */
void claas_switch_free(struct claas_switch **sw);
const char *claas_switch_endpoint(const struct claas_switch *sw);
/* Once per process, before the first socket: CZMQ without its signal handlers. Safe to call
 * again. */
void claas_zmq_setup(void);

#endif
