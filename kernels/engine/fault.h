/* Failures on demand, to test everything above a back-end: CLAAS_DEVICE_FAULT=CODE:N in the
 * environment makes the N-th training step of the process, and every later one, fail with a code of
 * err.def ("NO_MEMORY:2", "DEVICE_LOST:1"). After DEVICE_LOST nothing else works either, as on a
 * real device. */
#ifndef CLAAS_ENGINE_FAULT_H
#define CLAAS_ENGINE_FAULT_H

#include <stdbool.h>
#include <stdint.h>

struct claas_fault {
    int code;       /* 0 = none was ordered */
    uint64_t first; /* the step it begins with, from 1 */
    uint64_t steps; /* begun so far */
    bool is_lost;
};

/* Reads the environment; INVALID if it is not understood. */
int claas_fault_read(struct claas_fault *ret);
/* Before each training step, and before each pass or evaluation: 0, or the failure that was
 * ordered. */
int claas_fault_step(struct claas_fault *fault);
int claas_fault_pass(const struct claas_fault *fault);

#endif
