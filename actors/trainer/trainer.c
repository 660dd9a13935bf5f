/* The trainer actor: its handler table and its life. */
#include "trainer.h"

#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "imports.h"
#include "probes.h"
#include "staging.h"
#include "trainer_internal.h"

static void device_readable(void *self, int fd)
{
    (void)fd;
    device_calls_pump(self);
}

static void import_readable(void *self, int fd)
{
    struct trainer *trainer = self;

    (void)fd;
    imports_finish(trainer->imports);
}

static void stop(void **self)
{
    struct trainer *trainer = *self;

    if (!trainer)
        return;
    /* A job that ran on the lost device may be what it was lost by, and has to be told DEVICE_LOST:
     * a trainer that is merely gone (UNAVAILABLE) counts for nothing. */
    if (trainer->lost[0])
        cycles_lose(trainer, trainer->lost);
    cycles_free(trainer);
    if (trainer->imports)
        claas_actor_unwatch(trainer->actor, imports_fd(trainer->imports));
    imports_free(&trainer->imports);
    device_calls_end(trainer);
    probes_free(&trainer->probes);
    if (trainer->client)
        claas_actor_unwatch(trainer->actor, claas_device_client_fd(trainer->client));
    claas_device_client_free(&trainer->client);
    free(trainer);
    *self = NULL;
}

static void given_up(void *self, const struct claas_reply_to *to)
{
    cycle_cancel(self, to);
}

static int start(claas_actor_t *actor, const void *args, void **ret_self)
{
    const struct claas_trainer_args *given = args;
    CLAAS_AUTO(stop) void *self = CLAAS_NEW(struct trainer);
    struct trainer *trainer = self;
    int rc;

    if (!trainer)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    trainer->actor = actor;
    trainer->config = given->config;
    trainer->device = given->device;
    trainer->model = claas_device_model(given->device);
    rc = claas_device_client_new(given->device, &trainer->client);
    if (rc == 0)
        rc = probes_new(trainer, &trainer->probes);
    if (rc == 0)
        rc = claas_actor_watch(actor, claas_device_client_fd(trainer->client), device_readable);
    if (rc == 0)
        rc = imports_new(trainer, &trainer->imports);
    if (rc == 0)
        rc = claas_actor_watch(actor, imports_fd(trainer->imports), import_readable);
    if (rc < 0)
        return rc;
    staging_sweep(trainer);
    claas_actor_on_cancel(actor, given_up);
    *ret_self = CLAAS_TAKE(self);
    return 0;
}

/* Cycles belong to the scheduler, which drains them; only adapters being made are finished here. */
static bool drain(void *self)
{
    struct trainer *trainer = self;

    trainer->draining = true;
    return trainer->adapters_in_work == 0;
}

static const struct claas_handler handlers[] = {
    {CLAAS_MSG_ADAPTER_INIT, handle_adapter_init},
    {CLAAS_MSG_ADAPTER_IMPORT, handle_adapter_import},
    {CLAAS_MSG_CYCLE_BEGIN, handle_cycle_begin},
    {CLAAS_MSG_CYCLE_STEP, handle_cycle_step},
    {CLAAS_MSG_CYCLE_KEEP, handle_cycle_keep},
    {CLAAS_MSG_CYCLE_STAGE, handle_cycle_stage},
    {CLAAS_MSG_CYCLE_END, handle_cycle_end},
};

const struct claas_actor_class claas_trainer_class = {
    .name = "trainer",
    .handlers = handlers,
    .handler_count = CLAAS_COUNT(handlers),
    .start = start,
    .drain = drain,
    .stop = stop,
};
