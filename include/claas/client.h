/* A ZeroMQ client of a CLaaS node in C: blocking calls, for tools, tests and programs that embed
 * it. One thread at a time uses a client. */
#ifndef CLAAS_CLIENT_H
#define CLAAS_CLIENT_H

#include "claas/message.h"

typedef struct claas_client claas_client_t;

/* `endpoint`: "ipc://data/claas.ipc". UNAVAILABLE when no server listens there. */
int claas_client_new(const char *endpoint, claas_client_t **ret);
void claas_client_free(claas_client_t **client);
/* Sends a request to the actor `to` and waits for its end, up to timeout_ms. `body` is taken (NULL
 * = an empty object). `progress` (may be NULL) sees every PROGRESS body. *ret_body (may be NULL) is
 * the reply's body, freed with claas_json_free. Errors: the peer's, with its sentence; DEADLINE;
 * UNAVAILABLE: the server is away, or was started again meanwhile. */
typedef void claas_client_progress_fn(void *arg, const cJSON *body);
int claas_client_request(claas_client_t *client, const char *to, int type, cJSON *body,
                         int64_t timeout_ms, claas_client_progress_fn *progress, void *arg,
                         cJSON **ret_body);

#endif
