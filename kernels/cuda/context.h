/* One CUDA device as the files of this folder see it: its stream, its cuBLASLt handle, how errors
 * become ours, and arenas of its memory.
 *
 * Everything runs on one stream in the order of the calls; nothing here waits for the device unless
 * its comment says so. "act" is an activation element: bfloat16, or float32 in the float32 build of
 * a model. Pointers named d_… or documented as device pointers are never read on the host.
 *
 * Letters in shapes are those of cpu/step.h: m rows of a pack, D hidden, F intermediate, V
 * vocabulary, L layers, H heads, G kv heads, d head_dim, Nq = H*d, Nk = G*d, Nqkv = Nq + 2*Nk, R
 * rank. Matrices are row-major; ld… are row lengths in elements. */
#ifndef CLAAS_CUDA_CONTEXT_H
#define CLAAS_CUDA_CONTEXT_H

#include "claas/err.h"

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum cuda_type { CUDA_TYPE_F32, CUDA_TYPE_BF16 };

struct cuda_gemm_plans; /* gemm.cu: algorithms chosen so far */

/* Device memory, and the line of context->uses that counts it. */
struct cuda_region {
    void *base;
    size_t bytes;
    int use;
};
/* Bytes held under one name: the memory map of messages. */
struct cuda_use {
    const char *what; /* NULL: not used yet */
    size_t bytes;
};
#define CUDA_USES 16
/* How chats get their turn within something long; give NULL: none waits. refused: give returned
 * nonzero, the step is to be given up. */
struct cuda_turns {
    int (*give)(void *arg);
    void *arg;
    bool refused;
};
/* Gives one turn. true: the step is to be given up. */
static inline bool cuda_give_turn(struct cuda_turns *turns)
{
    if (turns->give && !turns->refused)
        turns->refused = turns->give(turns->arg) != 0;
    return turns->refused;
}

struct cuda_context {
    int ordinal;
    int arch; /* 80, 86, 90, …: of the card, or of the code that it runs where that is older */
    int multiprocessors;
    bool early;      /* kernels may begin before the one before them ends (launch.cuh): sm_90, and
                        CLAAS_CUDA_EARLY is not 0 */
    bool warpgroups; /* the card runs code of sm_90a, the only kind with products of warpgroups */
    bool fuse;       /* attention of few decoded rows also does cuda_qkv_finish's work:
                        CLAAS_CUDA_FUSE is not 0 */
    size_t memory;   /* bytes of the card, or the limit where that is lower */
    char name[64];   /* "NVIDIA H100 80GB HBM3" */
    enum cuda_type act;
    size_t act_bytes;
    cudaStream_t stream;
    cublasLtHandle_t lt;
    struct cuda_region lt_region;
    void *lt_space; /* workspace of every product on the stream: lt_region.base */
    size_t lt_space_bytes;
    struct cuda_gemm_plans *plans;
    struct cuda_turns turns; /* of the training step under way */
    size_t bytes;            /* device memory taken through cuda_region_new */
    uint64_t peak;           /* the most that `bytes` was (pack/peak.h) */
    size_t limit;            /* the most that `bytes` may be; 0: no limit */
    struct cuda_use uses[CUDA_USES];
    bool lost; /* a sticky error was seen: nothing works any more */
    /* Held while work of the stream is captured into a graph. Another thread than the computing one
     * must hold it, too, to record an event on the stream or to ask about it: that would else be
     * captured, or spoil the capture. */
    pthread_mutex_t capture;
};

/* Whether an environment variable says 0, which turns off what it is about. */
static inline bool cuda_is_off(const char *variable)
{
    const char *value = getenv(variable);

    return value && strcmp(value, "0") == 0;
}

/* Whether there is a usable driver and a card: 0, or UNSUPPORTED with one clear line. */
int cuda_find_device(void);
/* Opens device 0 (CUDA_VISIBLE_DEVICES chooses). UNSUPPORTED with one clear line: no device, or a
 * driver or card that is too old (below sm_80). A card that is listed and does not open is DEVICE,
 * or DEVICE_LOST with CLAAS_DEVICE_LOST_VARIABLE set. CLAAS_CUDA_MEMORY_LIMIT=BYTES limits what
 * cuda_region_new hands out, to see on a large card what happens on a full one. */
int cuda_context_open(enum cuda_type act, struct cuda_context *ret);
void cuda_context_close(struct cuda_context *context);

/* 0 for success. NO_MEMORY for an allocation, else DEVICE, with `what` and CUDA's words in the
 * error's text. A sticky error (a kernel that faulted, a card that fell off the bus) sets
 * context->lost and is DEVICE_LOST, as is every error from then on: only a new process helps. */
int cuda_check(struct cuda_context *context, cudaError_t code, const char *what);
/* After launches: the first error that CUDA has noted since the last call. Does not wait. */
int cuda_check_launch(struct cuda_context *context, const char *what);
/* After a library's failure, of which CUDA's own last error knows nothing: DEVICE_LOST when the
 * device is, else 0. Does not wait. */
int cuda_check_device(struct cuda_context *context, const char *what);
/* Takes and gives back context->capture. */
void cuda_capture_lock(struct cuda_context *context);
void cuda_capture_unlock(struct cuda_context *context);
/* Whether the stream is being captured (true too where that cannot be told). */
bool cuda_is_capturing(const struct cuda_context *context);
/* Waits for the stream. */
int cuda_wait(struct cuda_context *context);

/* Device memory, zeroed. `what` names its use; a literal, since it is kept. NO_MEMORY says which
 * allocation, of how many bytes, how much is free and what holds the rest. */
int cuda_region_new(struct cuda_context *context, struct cuda_region *region, size_t bytes,
                    const char *what);
void cuda_region_done(struct cuda_context *context, struct cuda_region *region);
/* Pinned memory of the host, for copies; cudaFreeHost gives it back. OVERLOADED, with `what` and
 * how many bytes, when the host has none left: the device's memory is not short then, so nothing
 * there has to go for it. */
int cuda_pin(struct cuda_context *context, void **ret, size_t bytes, const char *what);
/* Bytes that could still be taken: what the card says, or what the limit leaves if that is less. */
int cuda_memory_free(struct cuda_context *context, size_t *ret);

/* A bump allocator over a region, 256-byte aligned. With base NULL it only counts, so one layout
 * function both measures and places. */
struct cuda_arena {
    uint8_t *base;
    size_t used;
};
void *cuda_take(struct cuda_arena *arena, size_t bytes);

/* Element `element` of an array of acts. */
static inline void *cuda_at(const struct cuda_context *context, const void *base, size_t element)
{
    return (uint8_t *)(uintptr_t)base + element * context->act_bytes;
}

#ifdef __cplusplus
}
#endif
#endif
