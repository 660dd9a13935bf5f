/* A set of answers generated together: rollouts of a step, held-out answers of the teacher, probe
 * answers of the gate. */
#ifndef CLAAS_TRAINER_GENERATIONS_H
#define CLAAS_TRAINER_GENERATIONS_H

#include "trainer_internal.h"

struct generation {
    /* in */
    const int32_t *prompt; /* borrowed until the set is done */
    size_t prompt_count;
    claas_adapter_t *adapter; /* borrowed; NULL = base */
    float temperature;
    int max_tokens; /* 0 = the set's, which it must not exceed */
    uint64_t seed;
    /* out, owned */
    int32_t *tokens;
    float *logprobs;
    size_t count;
    /* private */
    struct generations *set;
};

/* Called once, when all are finished (error 0) or one failed. The set is not freed by it. */
typedef void generations_done_fn(struct trainer *trainer, void *arg, int error, const char *text);

struct generations {
    struct generation *items; /* owned array */
    size_t count;
    size_t running;
    int max_tokens;
    generations_done_fn *done;
    void *arg;
    struct trainer *trainer;
};

/* `count` zeroed items to be filled in. */
int generations_new(struct trainer *trainer, size_t count, int max_tokens,
                    generations_done_fn *done, void *arg, struct generations **ret);
/* Sends them all; on an error nothing keeps running and `done` is not called. */
int generations_start(struct generations *set);
/* Cancels what runs and frees the answers. */
void generations_free(struct generations **set);

#endif
