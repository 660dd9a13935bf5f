/* What the engine's tests share: a device on the fake back-end and requests whose right answers are
 * known. */
#ifndef CLAAS_TEST_ENGINE_FIXTURE_H
#define CLAAS_TEST_ENGINE_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "fake_backend.h"

#define WAIT_MS 60000

struct rig {
    claas_model_t *model;
    claas_device_t *device;
    claas_device_client_t *client;
};

/* A generation with what came of it. */
struct job {
    struct claas_generate_request request;
    int32_t prompt[2048];
    int32_t stops[1];
    uint64_t id;
    uint64_t stamp; /* of the weights it shall run under */
    int32_t tokens[2048];
    size_t count;
    bool ended;
    struct claas_device_event last;
};

/* Zero fields of the options: one sequence of the model's context fits. */
struct rig rig_open(struct claas_device_options options);
/* The same on another of the fake back-ends. */
struct rig rig_open_on(const struct claas_backend_ops *ops, struct claas_device_options options);
/* Frees all and checks that the engine broke no rule and left no adapter. */
void rig_close(struct rig *rig);

/* A prompt of `count` tokens that depends on `variant` from token `same` on. */
void job_fill(struct job *job, int count, int same, int variant, int max_tokens);
void job_submit(struct rig *rig, struct job *job);
/* Takes events until all have ended, or (count_tokens >= 0) until jobs[0] has so many tokens. */
void jobs_wait(struct rig *rig, struct job *jobs, int count, int count_tokens);
/* Tokens, log-probs and counts are those of a run alone. */
void job_check(const struct job *job);
struct job *jobs_new(int count);

/* The next event that is not a token; it must be of that kind. */
struct claas_device_event wait_for(struct rig *rig, enum claas_device_event_kind kind, uint64_t id);
claas_adapter_t *adapter_new(struct rig *rig, uint64_t seed);
/* One row that trains (or evaluates) the adapter. */
int train_submit(struct rig *rig, claas_adapter_t *adapter, bool update, uint64_t *ret_id);

#endif
