/* What a back-end (CPU, CUDA) implements for the engine: packed forward, decode and training steps
 * over opaque handles. The engine owns the queue, the block tables and the requests; a back-end
 * owns memory and arithmetic and may fuse what it likes. All calls come from one thread (the
 * device's compute thread), with these exceptions: host_new, host_free and adapter_bytes are for
 * any thread, and the I/O threads may call adapter_new/free, adapter_upload, adapter_download and
 * adapter_clone while nobody else writes the same *adapter*. */
#ifndef CLAAS_ENGINE_BACKEND_H
#define CLAAS_ENGINE_BACKEND_H

#include "claas/device.h"

#define CLAAS_KV_BLOCK_TOKENS 16

typedef struct claas_backend claas_backend_t;
typedef struct claas_backend_adapter claas_backend_adapter_t;

/* A run of consecutive tokens of one sequence in a forward pack: a decode row has count 1. Keys and
 * values of earlier positions are already in `blocks`; those of this run are written by the pass.
 */
struct claas_segment {
    const int32_t *tokens;
    int count;
    int pos;                          /* position of tokens[0] */
    const int32_t *blocks;            /* block numbers for positions 0 … pos+count-1 */
    claas_backend_adapter_t *adapter; /* NULL = base */
    int wanted; /* how many of the last tokens get a row of logits: 0 in all prefill chunks but the
                   last */
};

/* What to do with one wanted logits row (in order of segments and tokens). */
struct claas_sample {
    float temperature, top_p;
    int top_k;
    uint64_t seed;
    uint64_t index; /* n-th token of its answer, from 0: the counter of the random stream */
    int top_logprobs;
    int32_t given; /* >= 0: do not sample, score this token */
    /* results */
    int32_t token; /* -1: the row is not finite, the adapter or the model is broken */
    float logprob; /* temperature 1, whole vocabulary */
    int32_t top_tokens[CLAAS_TOP_LOGPROBS_MAX];
    float top_logprob[CLAAS_TOP_LOGPROBS_MAX];
};

struct claas_backend_options {
    const char *precision; /* "bf16" or "f32" */
    int threads;
    int kv_blocks;             /* blocks of 16 positions in the shared pool */
    bool kv_more;              /* kv_blocks is only a default: take more as memory allows */
    int max_tokens;            /* most tokens of one forward pack */
    int max_sequences;         /* most segments of one pack; 0 = max_tokens */
    claas_loading_fn *loading; /* may be NULL */
    void *loading_arg;
};

/* A training row as the back-end sees it: claas_train_row with its adapters resolved. */
struct claas_backend_row {
    struct claas_train_row row; /* student/teacher fields of it are not used */
    claas_backend_adapter_t *student, *teacher;
};
/* Called between operations of a training step (at least every ~20 ms); may run forward() on the
 * same back-end, whose workspace is separate from the step's. Nonzero return: give up, the step
 * ends with CLAAS_ERR_CANCELLED and changes nothing. */
typedef int claas_yield_fn(void *arg);

/* Called between the parts of work that cannot be given up; may run forward() too. */
typedef void claas_turn_fn(void *arg);
/* Lets go of what the device holds but can do without (it frees adapters); runs no forward(). */
typedef void claas_room_fn(void *arg);

/* The teacher's final hidden rows of a request, in the host's memory, in the order in which the
 * request's trained positions are numbered; zeros for positions without a teacher. The owner of
 * this struct frees the rows. */
struct claas_teacher_kept {
    void *rows;   /* from host_new where the back-end has it, else from claas_alloc */
    size_t bytes; /* of the rows */
    size_t limit; /* most bytes that the rows may take */
    bool filled;
};

struct claas_backend_train {
    const struct claas_backend_row *rows;
    size_t row_count;
    struct claas_loss_config loss;
    struct claas_adamw_config adamw;
    bool update;
    claas_yield_fn *yield; /* may be NULL */
    /* May be NULL. Called when the device has no room for the step; the back-end then tries again,
     * and may settle for less memory and more time, before it fails. */
    claas_room_fn *make_room;
    void *yield_arg; /* of yield and make_room */
    /* May be NULL. Filled: the rows that an equal request left (equal in all that the teacher's
     * rows and their order depend on), so the teacher is not run. Empty: the teacher is run, and
     * its rows are left here unless they exceed the limit or there is no memory for them, which
     * fails no step. What a failed step left here must not be used. */
    struct claas_teacher_kept *kept;
};

struct claas_backend_memory {
    uint64_t weights, kv, adapters, workspace, peak;
    struct claas_memory_use uses[CLAAS_MEMORY_USES]; /* all that is held, under its names */
    int use_count;
};

struct claas_backend_ops {
    const char *name;
    int prefill_chunk; /* prompt tokens of a pass that keep the device busy; 0 = 256 */
    int cycles;        /* learning cycles at the same time that do so; 0 = 1 */
    int (*open)(const struct claas_backend_options *options, claas_model_t *model,
                claas_backend_t **ret);
    void (*free)(claas_backend_t **backend);
    /* Runs passes of every size, so that their products are known to the first chats. Called by the
     * thread that opens, before anything else uses the back-end. NULL: there is nothing to learn
     * from them. */
    int (*warm)(claas_backend_t *backend);
    /* "cpu bf16-avx512bf16 x2" */
    const char *(*describe)(const claas_backend_t *backend);
    void (*memory)(const claas_backend_t *backend, struct claas_backend_memory *ret);
    /* Blocks of the pool. NULL: as many as were asked for. */
    int (*kv_blocks)(const claas_backend_t *backend);

    int (*adapter_new)(claas_backend_t *backend, const struct claas_lora_config *lora,
                       enum claas_adapter_use use, claas_backend_adapter_t **ret);
    void (*adapter_free)(claas_backend_t *backend, claas_backend_adapter_t **adapter);
    /* What it holds of the device's memory. */
    uint64_t (*adapter_bytes)(const claas_backend_adapter_t *adapter);
    /* Upload: from a host image to a SERVE or TRAIN adapter; a TRAIN one takes moments and step if
     * the image has them, else they are zero. Download: from a TRAIN adapter, or a KEEP one that
     * adapter_clone made; it allocates from ret->memory and calls `turn`, unless that is NULL,
     * every few milliseconds. */
    int (*adapter_upload)(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                          const struct claas_adapter_image *image);
    int (*adapter_download)(claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                            claas_turn_fn *turn, void *turn_arg, struct claas_adapter_image *ret);
    /* A new adapter with the weights of a TRAIN or KEEP one, and with its moments and step unless
     * `use` is SERVE, made on the device. A KEEP adapter can be downloaded and cloned, nothing
     * else. The call waits for what was queued before it, and the copy is complete when it returns.
     * NULL: the device has no memory of its own, so host images do as well. */
    int (*adapter_clone)(claas_backend_t *backend, const claas_backend_adapter_t *source,
                         enum claas_adapter_use use, claas_backend_adapter_t **ret);
    /* Memory of the host that uploads and downloads are fastest with, not zeroed; host_new returns
     * NULL if there is none left. Both pointers NULL: all of the host's memory is alike. */
    void *(*host_new)(claas_backend_t *backend, size_t bytes);
    void (*host_free)(claas_backend_t *backend, void *base);

    /* One forward pass. `samples` has one entry per wanted row. */
    int (*forward)(claas_backend_t *backend, const struct claas_segment *segments, int count,
                   struct claas_sample *samples);
    /* One training step or evaluation; ret->rows is allocated by the callee. A non-finite loss or
     * gradient is success with ret->finite false and nothing changed. */
    int (*train)(claas_backend_t *backend, const struct claas_backend_train *request,
                 struct claas_train_result *ret);
    /* Frees the memory that the last step left for the next one, which will take it anew. Not to be
     * called within train(). NULL: nothing is left that others could use. */
    void (*give_back)(claas_backend_t *backend);
    /* What the device could do at best, measured now; needs no open back-end. Of the options it
     * reads precision and threads. */
    int (*floor)(const struct claas_backend_options *options, struct claas_device_floor *ret);
};

extern const struct claas_backend_ops claas_backend_cpu;

#endif
