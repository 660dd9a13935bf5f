/* A back-end for the engine's tests that computes nothing but shows every mistake of the engine:
 * its "keys and values" are the tokens themselves, stamped with the weights they were computed
 * under, and the next token is a hash of all that it finds through the block table. A wrong block,
 * a stale prefix or a row of another sequence gives other tokens. */
#ifndef CLAAS_TEST_FAKE_BACKEND_H
#define CLAAS_TEST_FAKE_BACKEND_H

#include "engine/engine.h"

struct claas_backend_adapter {
    struct claas_lora_config lora;
    enum claas_adapter_use use;
    size_t count;
    float *parameters;
    int64_t step;
    _Atomic uint64_t stamp; /* hash of the parameters */
};

/* What the tests read and turn. One device at a time. */
struct fake {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int gate;          /* forward() waits once `passes` has come to it */
    int at_gate;       /* calls that came to a closed gate so far */
    int fail_forwards; /* so many next calls of forward() fail */
    int fail_trains;
    int adapter_room;     /* adapters that fit; 0 = any number */
    int train_room;       /* adapters beside which a step fits; 0 = any number */
    int step_leaves;      /* room of so many adapters stays taken after a step, until given back */
    int train_operations; /* operations, and calls of yield, of one training step */
    int download_operations; /* the same of reading an adapter back */
    int64_t operation_ns;    /* of the test's clock */
    int64_t pass_ns, token_ns;
    bool report_nonfinite;
    bool fail_host_new;   /* no memory can be pinned */
    bool pins;            /* the back-end has memory of its own, so rows it leaves are pinned */
    size_t teacher_bytes; /* of the teacher's rows of a step */
    /* Figures. */
    int passes, tokens, single_rows, passes_in_training;
    int largest_pass;          /* tokens */
    int most_groups;           /* of neighbours with the same adapter, in a pass */
    int passes_without_decode; /* passes with a chunk of a prompt but no row of one token */
    int64_t longest_slice;     /* training, or reading back, between two passes */
    int operations_done;
    int fewest_operations; /* between two turns of generation in training */
    int adapters_refused;  /* for want of room */
    int trains_refused;    /* the same of steps */
    int given_back;        /* calls to give back what a step left */
    int teachers_left,
        teachers_taken; /* steps that left their teacher's rows, or were given them */
    _Atomic int uploads, host_blocks;
    int broken; /* rules of backend.h that the engine broke */
};
extern struct fake fake;
extern const struct claas_backend_ops fake_backend;
/* The same as a device with memory of its own: it clones adapters, and pins the host's memory. */
extern const struct claas_backend_ops fake_backend_with_memory;

void fake_reset(void);
int64_t fake_now(void);
/* Lets so many more passes through. */
void fake_close_gate(int passes);
/* Waits until a forward pass stands at the closed gate. */
void fake_wait_at_gate(void);
void fake_open_gate(void);
/* Waits until so many adapters were refused. */
void fake_wait_refused(int count);
uint64_t fake_stamp(const claas_adapter_t *adapter);
/* The n-th token after a sequence under weights of that stamp. */
int32_t fake_next(const int32_t *tokens, size_t count, uint64_t stamp, uint64_t seed,
                  uint64_t index);
float fake_logprob(int32_t token);

#define FAKE_VOCAB 512
/* What a full one says, with a map of its memory as long as a card's. */
#define FAKE_FULL      "the fake device is full" CLAAS_MEMORY_HELD
#define FAKE_MAP_BYTES 600

#endif
