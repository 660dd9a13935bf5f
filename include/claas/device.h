/* The device object: one per device and process, shared by sampler and trainer. It owns the base
 * weights, the KV blocks, the adapters on the device and the compute thread, and works through a
 * queue with the priorities decode > prefill > training. Training runs in slices: between two
 * slices waiting decode and prefill work goes first, so chat keeps streaming while a cycle runs.
 *
 * Whoever uses the device opens a *client*: requests go in through it, events come out of it in
 * order, and its file descriptor becomes readable when one waits (poll it in the actor's loop;
 * never block on it). All calls may be made from any thread; a client is used by one thread. Token
 * ids, log-probs and figures cross this seam, pointers to device memory never do. */
#ifndef CLAAS_DEVICE_H
#define CLAAS_DEVICE_H

#include "claas/adapter.h"
#include "claas/err.h"
#include "claas/loss.h"
#include "claas/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct claas_device claas_device_t;
typedef struct claas_device_client claas_device_client_t;
/* An adapter on the device: reference counted; requests hold their own reference until their last
 * event. */
typedef struct claas_adapter claas_adapter_t;

/* Progress of opening: `done` of the `total` bytes of the model's file have been read. Called first
 * with 0, last with all. */
typedef void claas_loading_fn(void *arg, uint64_t done, uint64_t total);

struct claas_device_options {
    const char *device;    /* "auto" (or NULL: CUDA where there is a card, else the CPU), "cpu",
                              "cuda" */
    const char *precision; /* "bf16" or "f32" */
    int threads;           /* 0 = one per CPU */
    size_t kv_tokens;      /* capacity of the KV pool in tokens; 0 = max(context, 8192), and on a
                              GPU as many more as its memory allows */
    int prefill_chunk;     /* most prompt tokens of one forward pass; 0 = 256, on a GPU 2048 */
    int max_batch;         /* most sequences decoded together; 0 = 64 */
    int slice_ms;          /* longest slice of training while chat waits; 0 = 50 */
    int64_t host_cache;    /* bytes for images of adapters in the host's memory; 0 = none, -1 = on a
                              GPU an eighth of what this process may have (the machine's, or what
                              its control group is limited to), at most 16 GiB, else none */
    claas_loading_fn *loading; /* NULL, or called by the thread that opens while weights are read */
    void *loading_arg;
    bool warm; /* on a GPU: opens only after passes of every size (5 s at most), whose products are
                  timed once for a card and then known; else the first chats wait for that */
};

/* `model` must outlive the device; its weights are copied into the device's layout. INVALID (an
 * option), UNSUPPORTED (an unknown device, no card, a model that the device cannot run), NO_MEMORY,
 * or DEVICE and DEVICE_LOST for a card that does not open. */
int claas_device_open(const struct claas_device_options *options, claas_model_t *model,
                      claas_device_t **ret);
/* Cancels what runs; clients must be freed first. */
void claas_device_free(claas_device_t **device);
claas_model_t *claas_device_model(const claas_device_t *device);
/* Longest sequence (prompt and answer) that can be generated: the model's context, or all of the KV
 * pool where that is smaller. */
int claas_device_context(const claas_device_t *device);
/* How many learning cycles must run at the same time to keep the device busy: their rollouts share
 * its passes. */
int claas_device_cycles(const claas_device_t *device);

/* A line of the memory map: what the device's memory is held for. */
struct claas_memory_use {
    const char *what; /* a literal, such as "keys and values" */
    uint64_t bytes;
};
#define CLAAS_MEMORY_USES 16

/* What `claas health`, /metrics and `claas bench` show. */
struct claas_device_stats {
    char name[64]; /* "cpu bf16-avx512bf16 x2" */
    uint64_t bytes_weights, bytes_kv, bytes_adapters, bytes_workspace, bytes_peak;
    struct claas_memory_use
        uses[CLAAS_MEMORY_USES]; /* all that the device holds, under its names */
    int use_count;
    /* Blocks of 16 tokens. */
    int kv_blocks, kv_blocks_free;
    int running, waiting; /* sequences */
    uint64_t passes;      /* of generation */
    uint64_t tokens_prefilled, tokens_decoded, tokens_trained;
    uint64_t prefix_tokens_shared; /* prompt tokens not computed because their blocks were shared */
    /* Time spent on adapters so far, most of it while other work went on: directories read and
     * written, and images moved to the device and back. */
    uint64_t read_ns, write_ns, upload_ns, download_ns;
    uint64_t clones;           /* copies of adapters made on the device */
    uint64_t host_cache_bytes; /* held for images of adapters in the host's memory, whether in use
                                  or free */
    uint64_t host_cache_images, host_cache_found, host_cache_missed;
    /* Evaluations whose teacher is the base: bytes of its rows kept in the host's memory; how many
     * evaluations found theirs there, how many had to compute them. */
    uint64_t teacher_bytes, teacher_found, teacher_missed;
};
void claas_device_stats(const claas_device_t *device, struct claas_device_stats *ret);

/* What the device that the options name could do at best, measured by this call (about a second),
 * so that a time can be read as a share of what is possible. No device need be open; one that is
 * must be idle. */
struct claas_device_floor {
    double gemm_flop_s;    /* of large matrix products in the precision asked for */
    double memory_bytes_s; /* the CPU's: reading with all threads; a card's: copying, both ways */
};
int claas_device_floor(const struct claas_device_options *options, struct claas_device_floor *ret);

/* The CUDA cards of this machine, whether a device is open or not. UNSUPPORTED with one clear line
 * when there is none, no driver, or no CUDA in this program. */
#define CLAAS_CARDS_MAX 16
struct claas_card {
    char name[64];
    int major, minor; /* compute capability */
    uint64_t bytes, bytes_free;
    char unknown[64]; /* why bytes_free could not be asked for (the card is full, or another process
                         has it for itself); "" if it could */
};
struct claas_cards {
    int driver, runtime; /* CUDA versions, 1000 * major + 10 * minor: the newest that the driver
                            knows; this program's */
    int count;
    struct claas_card cards[CLAAS_CARDS_MAX];
};
int claas_device_cards(struct claas_cards *ret);

/* Set in the environment by whoever restarts a process that lost its card. A card that is not
 * there, or does not open, is then DEVICE_LOST, and `auto` does not make do with the CPU. */
#define CLAAS_DEVICE_LOST_VARIABLE "CLAAS_DEVICE_LOST"

int claas_device_client_new(claas_device_t *device, claas_device_client_t **ret);
/* Cancels the client's requests and drops its events. */
void claas_device_client_free(claas_device_client_t **client);
int claas_device_client_fd(const claas_device_client_t *client);
/* Says that the client keeps SERVE adapters that it could do without. When the device has no memory
 * for a training step, or for an adapter to train, the client gets a MEMORY event; it lets go of
 * what it can, and says so by claas_device_client_gave. The work that found no memory waits for
 * that, for some seconds at most, and is tried once more. */
void claas_device_client_keeps_idle(claas_device_client_t *client);
void claas_device_client_gave(claas_device_client_t *client);
/* Whether any adapter is in training: the memory that it holds may be free soon. */
bool claas_device_trains(const claas_device_client_t *client);

/* --- adapters --------------------------------------------------------------------------------- */
/* Reading and writing directories takes tens of milliseconds, so two threads of the device do it,
 * one that loads and one that saves. A request ends in an ADAPTER, SAVED or FAILED event with its
 * id. */

enum claas_adapter_use {
    CLAAS_ADAPTER_SERVE, /* forward only */
    CLAAS_ADAPTER_TRAIN, /* float32 weights and moments kept beside */
    CLAAS_ADAPTER_KEEP,  /* weights and moments, to be saved and nothing else: takes the least
                            memory. A copy is in a GPU's memory if that has room, else in the
                            host's */
};
/* Loads a PEFT directory. For TRAIN and KEEP the moments come along; they are zero if the directory
 * has none. */
int claas_device_adapter_load(claas_device_client_t *client, const char *directory,
                              enum claas_adapter_use use, uint64_t *ret_id);
/* A new untrained adapter (B = 0), for any use. */
int claas_device_adapter_init(claas_device_client_t *client, const struct claas_lora_config *lora,
                              uint64_t seed, enum claas_adapter_use use, uint64_t *ret_id);
/* A KEEP copy of a TRAIN adapter as it stands after the client's requests before this one. */
int claas_device_adapter_copy(claas_device_client_t *client, claas_adapter_t *adapter,
                              uint64_t *ret_id);
/* The same for a copy that may never be wanted: it is made in the device's free memory or not at
 * all (FAILED with NO_MEMORY, or UNSUPPORTED where claas_device_copies is false). */
int claas_device_adapter_copy_if_room(claas_device_client_t *client, claas_adapter_t *adapter,
                                      uint64_t *ret_id);
/* Whether copies are made on the device, which takes a millisecond and none of the host's
 * memory. */
bool claas_device_copies(const claas_device_t *device);
/* Writes a complete, fsynced PEFT directory (must not exist) of a TRAIN or KEEP adapter. */
int claas_device_adapter_save(claas_device_client_t *client, claas_adapter_t *adapter,
                              const char *directory, uint64_t *ret_id);
/* To be called before a saved directory is removed: no copy of what was saved there is kept any
 * longer. */
void claas_device_adapter_forget(claas_device_t *device, const char *directory);
claas_adapter_t *claas_adapter_ref(claas_adapter_t *adapter);
/* Drops a reference and nulls the pointer. The memory is free a moment later: a load or init that
 * meets a full device waits for that moment before it fails. */
void claas_adapter_unref(claas_adapter_t **adapter);
/* Whether the caller's reference is not the only one, so that dropping it frees nothing. */
bool claas_adapter_is_shared(const claas_adapter_t *adapter);
struct claas_lora_config claas_adapter_lora(const claas_adapter_t *adapter);
/* Sets the name that claas_device_adapters shows: "me/chat@3". */
void claas_adapter_set_name(claas_adapter_t *adapter, const char *name);

/* What the device holds of adapters, for people who look. */
struct claas_adapter_info {
    char name[288]; /* as set by claas_adapter_set_name, else "" */
    enum claas_adapter_use use;
    uint64_t bytes;
    bool in_host; /* `bytes` are of the host's memory, not the device's */
};
/* Fills `ret` with the youngest `max`; returns how many there are in all. */
size_t claas_device_adapters(const claas_device_t *device, struct claas_adapter_info *ret,
                             size_t max);

/* --- generation ------------------------------------------------------------------------------- */

#define CLAAS_TOP_LOGPROBS_MAX 20

enum claas_priority { CLAAS_PRIORITY_CHAT, CLAAS_PRIORITY_ROLLOUT };

struct claas_generate_request {
    const int32_t *prompt; /* copied; 1 … context-1 tokens */
    size_t prompt_count;
    claas_adapter_t *adapter;   /* NULL = the base model */
    int max_tokens;             /* >= 1; ends earlier when the context is full */
    float temperature;          /* 0 = greedy */
    float top_p;                /* (0, 1] */
    int top_k;                  /* 0 = off */
    uint64_t seed;              /* same request and seed, same tokens, whatever else runs */
    const int32_t *stop_tokens; /* copied; the one that ends the answer is part of it */
    size_t stop_count;
    int top_logprobs; /* 0 … 20 alternatives with each token */
    enum claas_priority priority;
};
/* Events: TOKEN for each token, then FINISHED; or FAILED. Errors at once: INVALID, LIMIT (prompt
 * too long), OVERLOADED (queue full, or the adapter's share of it). */
int claas_device_generate(claas_device_client_t *client,
                          const struct claas_generate_request *request, uint64_t *ret_id);
/* The last event of a generation is then FINISHED with CLAAS_FINISH_CANCELLED, unless it ended
 * before. Other requests end in FAILED with CLAAS_ERR_CANCELLED; a training step stops at its next
 * operation and changes nothing. */
void claas_device_cancel(claas_device_client_t *client, uint64_t id);

/* --- training and evaluation ------------------------------------------------------------------ */

/* One row: a response seen by the student behind its prompt, and by the teacher behind another
 * prompt. EVALUATE rows may have no teacher (teacher_count 0): the student stands in, so forward_kl
 * is 0 but for rounding, and their divergence is NAN; log-prob and entropy are measured. */
struct claas_train_row {
    const int32_t *student_prompt, *teacher_prompt, *response;
    size_t student_count, teacher_count,
        response_count;            /* teacher_count 0: no teacher (EVALUATE only) */
    const float *rollout_logprobs; /* [response_count] or NULL: ratio 1 */
    const uint8_t *mask;           /* [response_count], 0 = not trained; NULL = all trained */
    claas_adapter_t *student;      /* TRAIN adapter; NULL = the base model (EVALUATE only) */
    claas_adapter_t *teacher;      /* NULL = the frozen base */
};

struct claas_adamw_config {
    float rate, beta1, beta2, eps, weight_decay;
    float max_grad_norm; /* 0 = no clipping; the norm is over one adapter */
};

struct claas_train_request {
    const struct claas_train_row *rows; /* copied, with what they point to */
    size_t row_count;
    struct claas_loss_config loss;
    struct claas_adamw_config adamw;
    bool update; /* false: EVALUATE, forward only */
};
/* One optimizer step for each adapter among the rows (or none). Ends in TRAINED or FAILED. */
int claas_device_train(claas_device_client_t *client, const struct claas_train_request *request,
                       uint64_t *ret_id);

/* Means over the trained tokens of a row of the figures of struct claas_loss_result (loss.h): in
 * nats, but for ratio and clip_fraction. */
struct claas_train_row_result {
    float loss, divergence, forward_kl, kl_base, ratio, clip_fraction;
    float logprob; /* mean log-prob of the response under the student: its negative is the NLL */
    float entropy;
    int tokens;
};
struct claas_train_result {
    float loss;            /* as trained */
    float grad_norm;       /* before clipping; the largest where several adapters learn */
    float max_ratio_error; /* largest |log-prob now - rollout log-prob|: 0 on policy */
    bool finite;           /* loss and gradient; a step that is not finite changes nothing */
    int tokens;
    double teacher_ms; /* the part of the step's time that the teacher's forward passes took; near 0
                          where its rows were in the student's pass */
    int64_t step;      /* optimizer steps of the adapter so far, this one included; the largest
                          where there are several */
    size_t row_count;
    struct claas_train_row_result *rows;
};

/* --- events ----------------------------------------------------------------------------------- */

enum claas_device_event_kind {
    CLAAS_EVENT_TOKEN,
    CLAAS_EVENT_FINISHED,
    CLAAS_EVENT_ADAPTER,
    CLAAS_EVENT_SAVED,
    CLAAS_EVENT_TRAINED,
    CLAAS_EVENT_FAILED,
    CLAAS_EVENT_MEMORY, /* belongs to no request: claas_device_client_keeps_idle */
};
enum claas_finish {
    CLAAS_FINISH_STOP,   /* a stop token */
    CLAAS_FINISH_LENGTH, /* max_tokens or the context */
    CLAAS_FINISH_CANCELLED,
};

/* Separates the text of a NO_MEMORY error from the list of what holds the device's memory, where
 * that is known. */
#define CLAAS_MEMORY_HELD "; held: "

struct claas_device_event {
    enum claas_device_event_kind kind;
    uint64_t id;
    /* TOKEN */
    int32_t token;
    float logprob; /* temperature 1, whole vocabulary */
    int64_t made;  /* claas_clock_ns at the end of its pass */
    int top_count;
    int32_t top_tokens[CLAAS_TOP_LOGPROBS_MAX];
    float top_logprobs[CLAAS_TOP_LOGPROBS_MAX];
    /* FINISHED */
    enum claas_finish finish;
    size_t prompt_tokens, cached_tokens, generated_tokens;
    /* ADAPTER: a reference that the receiver owns */
    claas_adapter_t *adapter;
    /* TRAINED: owned by the receiver */
    struct claas_train_result trained;
    /* FAILED */
    int error;
    char text[CLAAS_ERROR_TEXT_BYTES];
};
/* The next event: 1, or 0 when none waits. Release what it owns with claas_device_event_done. */
int claas_device_client_next(claas_device_client_t *client, struct claas_device_event *ret);
/* The same, waiting up to timeout_ms (-1 = for ever): for tools and tests. */
int claas_device_client_wait(claas_device_client_t *client, int timeout_ms,
                             struct claas_device_event *ret);
void claas_device_event_done(struct claas_device_event *event);

#ifdef __cplusplus
}
#endif
#endif
