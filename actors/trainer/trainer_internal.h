/* State shared by the trainer's files. */
#ifndef CLAAS_TRAINER_INTERNAL_H
#define CLAAS_TRAINER_INTERNAL_H

#include "trainer.h"

struct cycle;
struct imports;
struct probes;
struct trainer;

/* What a device request's events are handed to; called for each, the last one is FINISHED, ADAPTER,
 * SAVED, TRAINED or FAILED. */
typedef void device_call_fn(struct trainer *trainer, void *arg, struct claas_device_event *event);

/* Lists of calls, by the request's id modulo this. */
#define DEVICE_CALL_LISTS 256

struct device_call {
    struct device_call *next;
    uint64_t id;
    device_call_fn *fn;
    void *arg;
};

struct trainer {
    claas_actor_t *actor;
    const claas_config_t *config;
    claas_device_t *device;
    claas_model_t *model;
    claas_device_client_t *client;
    struct device_call *calls[DEVICE_CALL_LISTS];
    struct cycle *cycles;
    struct probes *probes;
    struct imports *imports;
    int stagings;                      /* kept adapters that are being written, wanted or not */
    int adapters_in_work;              /* ADAPTER_INIT and ADAPTER_IMPORT not answered yet */
    char lost[CLAAS_ERROR_TEXT_BYTES]; /* why the device is lost, "" = it is not */
    bool draining;
};

/* device_calls.c: remembers which callback waits for a request. Without memory the request is
 * cancelled. */
int device_call_add(struct trainer *trainer, uint64_t id, device_call_fn *fn, void *arg);
/* Forgets every call of `arg`, cancelling generations. */
void device_calls_drop(struct trainer *trainer, void *arg);
void device_calls_pump(struct trainer *trainer);
/* Calls back everything that still waits, with FAILED. */
void device_calls_end(struct trainer *trainer);

/* adapters.c */
int handle_adapter_init(void *self, claas_message_t *message);
int handle_adapter_import(void *self, claas_message_t *message);
/* Removes a staged directory that will not be published. It is renamed first, so that storage
 * either has moved away all of it before, or finds nothing. */
void staged_remove(const char *directory);

/* cycle.c, cycle_step.c */
int handle_cycle_begin(void *self, claas_message_t *message);
int handle_cycle_step(void *self, claas_message_t *message);
int handle_cycle_keep(void *self, claas_message_t *message);
int handle_cycle_stage(void *self, claas_message_t *message);
int handle_cycle_end(void *self, claas_message_t *message);
/* The asker of a request under way has given up: its cycle ends. */
void cycle_cancel(struct trainer *trainer, const struct claas_reply_to *to);
void cycles_free(struct trainer *trainer);
/* Answers the request that each busy cycle works on with DEVICE_LOST. */
void cycles_lose(struct trainer *trainer, const char *text);

#endif
