/* The trainer: runs learning cycles on the device object for the scheduler (rollouts, optimizer
 * steps, gate figures, staged versions) and makes new adapters. It decides nothing: what to train
 * on, what to keep and what to publish comes in the messages. */
#ifndef CLAAS_TRAINER_H
#define CLAAS_TRAINER_H

#include "claas/actor.h"
#include "claas/config.h"
#include "claas/device.h"

struct claas_trainer_args {
    const claas_config_t *config;
    claas_device_t *device;
};

/* Handles ADAPTER_INIT, ADAPTER_IMPORT and CYCLE_*; asks "storage". Start argument: struct
 * claas_trainer_args. */
extern const struct claas_actor_class claas_trainer_class;

#endif
