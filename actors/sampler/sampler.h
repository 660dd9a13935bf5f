/* The sampler: answers chats from the base model or a published adapter version on the device
 * object, and has every answer's exact token ids and log-probs stored before the answer ends. */
#ifndef CLAAS_SAMPLER_H
#define CLAAS_SAMPLER_H

#include "claas/actor.h"
#include "claas/config.h"
#include "claas/device.h"

struct claas_sampler_args {
    const claas_config_t *config;
    claas_device_t *device;
};

/* Handles CHAT and MODEL_INFO; asks "storage". Start argument: struct claas_sampler_args. */
extern const struct claas_actor_class claas_sampler_class;

#endif
