/* A serving process put together: model, device, runtime and actors, as the configuration has it.
 * `claas serve` runs one, `claas bench cycle` measures one from within. */
#ifndef CLAAS_TOOLS_PROCESS_H
#define CLAAS_TOOLS_PROCESS_H

#include "../actors/sampler/sampler.h"
#include "../actors/scheduler/scheduler.h"
#include "../actors/storage/storage.h"
#include "../actors/trainer/trainer.h"
#include "../bridge/bridge.h"
#include "claas/config.h"
#include "claas/device.h"
#include "claas/runtime.h"

/* Everything a serving process owns; freed in reverse order of its making. */
struct process {
    claas_config_t *config;
    claas_model_t *model;
    claas_device_t *device;
    claas_runtime_t *runtime;
    bool bad_config; /* what failed was the configuration */
    int port;
    struct claas_storage_args storage;
    struct claas_trainer_args trainer;
    struct claas_sampler_args sampler;
    struct claas_scheduler_args scheduler;
    struct claas_bridge_args bridge;
};

/* INVALID when a role is not the name of an actor, or there is no role: such a process would be
 * ready and do nothing. */
int process_check_roles(const struct process *process);
bool process_has_role(const struct process *process, const char *role);
/* The model and its device, for a trainer or a sampler. Needs `config`. */
int process_open_device(struct process *process);
/* The actors of this process's roles, those asked by others first. Needs `runtime`. */
int process_start_actors(struct process *process);
/* Drains and frees what there is. false: an actor's thread did not end and still uses the device,
 * the model and the configuration, which stay then: the process has to end by _exit. */
bool process_done(struct process *process);

#endif
