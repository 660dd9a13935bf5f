/* The bridge actor: the HTTP server's life in the runtime. Requests are in request.c, what they ask
 * for in *_routes.c and openai_*.c. */
#include "bridge.h"

#include <stdlib.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "http_server.h"
#include "listen.h"

int claas_bridge_check(const claas_config_t *config)
{
    return listen_check(claas_config_string(config, "listen"));
}

int claas_bridge_try(const claas_config_t *config)
{
    return listen_try(claas_config_string(config, "listen"));
}

static void stop(void **self)
{
    struct http_server *server = *self;

    if (!server)
        return;
    http_server_stop(server);
    free(server);
    *self = NULL;
}

static int start(claas_actor_t *actor, const void *args, void **ret_self)
{
    const struct claas_bridge_args *given = args;
    CLAAS_AUTO(stop) void *self = CLAAS_NEW(struct http_server);
    struct http_server *server = self;
    int rc;

    if (!server)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = http_server_start(server, actor, given->config, given->ret_port ? *given->ret_port : 0);
    if (rc < 0)
        return rc;
    if (given->ret_port)
        *given->ret_port = server->port;
    *ret_self = CLAAS_TAKE(self);
    return 0;
}

static bool drain(void *self)
{
    return http_server_drain(self);
}

/* It only asks; STATUS is answered by the runtime. */
const struct claas_actor_class claas_bridge_class = {
    .name = "bridge",
    .start = start,
    .drain = drain,
    .stop = stop,
};
