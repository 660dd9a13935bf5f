/* The runtime of one process: the switch, its actors and their supervisor. */
#ifndef CLAAS_RUNTIME_H
#define CLAAS_RUNTIME_H

#include "claas/actor.h"
#include "claas/config.h"

typedef struct claas_runtime claas_runtime_t;

/* INVALID when `connect` cannot be the address of a node, whether one runs there or not. For a call
 * before anything slow begins. */
int claas_runtime_check(const claas_config_t *config);
/* Whether claas_runtime_new would get the data directory now: BUSY while another server has it, or
 * the file system's error. Likewise. */
int claas_runtime_try(const claas_config_t *config);
/* Starts the switch. Without `connect` it binds ipc://DATA/claas.ipc (0600; a stale file is
 * replaced). With it, it joins the node there by the token of DATA/keys/node.token, and waits for
 * that node without end, or until SIGTERM or SIGINT (CANCELLED). The caller has blocked these
 * signals. */
int claas_runtime_new(const claas_config_t *config, claas_runtime_t **ret);
/* Starts an actor under supervision and waits until it is ready (0) or failed (its error). Later,
 * one that ends (claas_actor_fail) is started again with back-off (0.2 s … 30 s), with a new
 * incarnation. `args` is given to its `start`, and must outlive the runtime. */
int claas_runtime_start(claas_runtime_t *runtime, const struct claas_actor_class *actor_class,
                        const char *name, const void *args);
/* Waits for SIGTERM or SIGINT: 0. < 0: the process should end, because an actor was restarted too
 * often, is stuck, or failed with DEVICE_LOST, which no restart of an actor mends and which leaves
 * little time to drain. Block both signals in main before any thread starts. SIGHUP is ignored. */
int claas_runtime_wait(claas_runtime_t *runtime);
/* Drains actors in reverse order of their start within the configured time (a second signal cuts it
 * short), stops them, closes the switch. false: the thread of an actor does not end (a line in the
 * log names it) and still uses what it was given, so that must stay, and the process end by _exit.
 */
bool claas_runtime_free(claas_runtime_t **runtime);
/* All counters as Prometheus text 0.0.4; free with free(). Any thread. */
char *claas_metrics_text(void);

#endif
