/* The runtime of one process: the switch, its actors and their supervisor. */
#ifndef CLAAS_RUNTIME_H
#define CLAAS_RUNTIME_H

#include "claas/actor.h"
#include "claas/config.h"

typedef struct claas_runtime claas_runtime_t;

/* INVALID when `connect` cannot be the address of a node, whether one runs or not: before anything
 * slow is begun. */
int claas_runtime_check(const claas_config_t *config);
/* Starts the switch: binds ipc://DATA/claas.ipc (0600; a stale file is replaced) unless `connect`
 * names another node's, which is then joined with the node token of DATA/keys/node.token: waits
 * without end until that node is there, or is CANCELLED by SIGTERM or SIGINT. Blocks no signals
 * itself. */
int claas_runtime_new(const claas_config_t *config, claas_runtime_t **ret);
/* Starts an actor under supervision and waits until it is ready (or failed: its error). An actor
 * whose thread ends or whose handler reports a fatal error is started again with back-off (0.2 s …
 * 30 s), with a new incarnation. `args` is borrowed and must outlive the runtime. */
int claas_runtime_start(claas_runtime_t *runtime, const struct claas_actor_class *actor_class,
                        const char *name, const void *args);
/* Waits for SIGTERM or SIGINT (block both in main before any thread starts), or until an actor was
 * restarted too often, or failed with DEVICE_LOST, which no restart of an actor mends: the process
 * should end then, and gets little time to drain. 0 after a signal. SIGHUP is ignored. */
int claas_runtime_wait(claas_runtime_t *runtime);
/* Drains actors in reverse order of their start within the configured time (a second signal cuts it
 * short), stops them, closes the switch. */
void claas_runtime_free(claas_runtime_t **runtime);
/* All counters as Prometheus text 0.0.4; free with free(). Any thread. */
char *claas_metrics_text(void);

#endif
