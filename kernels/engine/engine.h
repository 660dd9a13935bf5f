/* What the files of the engine share. Who owns what:
 *
 * - device->lock: the inbox, the queues of the two I/O threads (one loads, one saves), the list of
 *   live requests, adapters without references, `poked`, `stats`
 * - client->lock: the client's event queue
 * - the compute thread: everything under "the compute thread's own" below, and all calls of the
 *   back-end but those that backend.h allows the I/O threads
 *
 * A request lives in exactly one place at a time (inbox, lane, waiting, running, an I/O queue) and
 * ends by claas_request_finish, which sends its last event and gives back its references. Locks are
 * never nested but for device->lock over client->lock. */
#ifndef CLAAS_ENGINE_ENGINE_H
#define CLAAS_ENGINE_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "engine/backend.h"
#include "engine/fault.h"
#include "engine/host_cache.h"
#include "engine/kv.h"
#include "engine/teacher_cache.h"

#define CLAAS_ENGINE_QUEUE_MAX 1024 /* waiting requests of a kind, then OVERLOADED */
/* The same for chats. An adapter may have as many waiting as there are places left: one alone gets
 * half of them, and always leaves places to others. */
#define CLAAS_ENGINE_CHATS_MAX (2 * CLAAS_ENGINE_QUEUE_MAX)
/* The same for rollouts: the most cycles at the same time (64), each with the largest step (272
 * rollouts). Chats are counted apart, so that learning never makes the device refuse one. */
#define CLAAS_ENGINE_ROLLOUTS_MAX (64 * 272)

enum claas_request_kind {
    CLAAS_REQUEST_GENERATE,
    CLAAS_REQUEST_TRAIN,
    CLAAS_REQUEST_LOAD,
    CLAAS_REQUEST_INIT,
    CLAAS_REQUEST_COPY,
    CLAAS_REQUEST_SAVE,
};

/* An event as it waits in a client's queue: small, since there is one per generated token. */
struct claas_event_node {
    struct claas_event_node *next;
    enum claas_device_event_kind kind;
    uint64_t id;
    int32_t token;
    float logprob;
    int64_t made;
    int top_count;
    enum claas_finish finish;
    int error;
    size_t prompt_tokens, cached_tokens, generated_tokens;
    claas_adapter_t *adapter;
    struct claas_train_result trained;
    char *text;
    struct {
        int32_t token;
        float logprob;
    } top[]; /* [top_count] */
};

/* The head of every request. */
struct claas_request {
    struct claas_request *next, *prev;           /* in the queue it is in */
    struct claas_request *live_next, *live_prev; /* device->live */
    enum claas_request_kind kind;
    uint64_t id;
    claas_device_client_t *client; /* one reference */
    atomic_bool cancelled;
    bool begun; /* no longer counted as waiting */
    struct claas_event_node
        *last; /* room for the last event, so that running out of memory loses no request */
};

struct claas_queue {
    struct claas_request *first, *last;
    int count;
};

struct claas_device_client {
    claas_device_t *device;
    atomic_int references;
    pthread_mutex_t lock;
    int fd; /* eventfd; readable exactly while events wait */
    bool closed;
    struct claas_event_node *first, *last;
    uint64_t lane_scan; /* compute thread: the last scan of the lane that met one of the client's
                           requests */
    claas_device_client_t *next_keeper; /* device->keepers; device->lock */
    bool is_asked;                      /* was asked for memory and has not answered;
                                           device->lock */
};

/* What an adapter, or the base model, has of the device: chats are admitted so that none keeps
 * another waiting (generate.c). */
struct claas_share {
    int unbegun; /* chats not begun; device->lock */
    /* Of the compute thread: */
    int waiting, running; /* chats */
    int64_t turn;         /* of its next prompt: see claas_sequence */
    uint64_t scan;        /* the last scan that met one of its waiting chats */
};

struct claas_adapter {
    claas_device_t *device; /* NULL once the device is gone */
    atomic_int references;
    claas_backend_adapter_t *backend; /* SERVE, TRAIN, and KEEP of a device with its own memory */
    struct claas_adapter_image image; /* KEEP without `backend`: all there is; never changed */
    struct claas_adapter_mark mark;   /* of the directory that `image` was saved to, if marked */
    bool marked;
    struct claas_lora_config lora;
    enum claas_adapter_use use;
    char name[288]; /* device->lock */
    claas_adapter_t *next_dead;
    claas_adapter_t *all_next, *all_prev; /* device->adapters */
    /* Of the compute thread: */
    uint64_t identity; /* new with every change of the weights: names the cached keys and values */
    bool training;     /* a step on it is under way */
    struct claas_share share;
};

/* A generation. */
struct claas_sequence {
    struct claas_request request;
    claas_adapter_t *adapter; /* NULL = base */
    struct claas_sample sample;
    enum claas_priority priority;
    int64_t turn; /* running chats: in this order prompts are read */
    int32_t *stops;
    size_t stop_count;
    int limit; /* longest prompt + answer */
    int prompt_count;
    int32_t *tokens; /* prompt, then answer */
    int count, capacity;
    int computed; /* tokens whose keys and values are in `blocks` */
    int32_t *blocks;
    int block_count, block_capacity;
    int registered; /* leading blocks whose chain is known: found or registered */
    uint64_t identity, chain;
    int cached; /* prompt tokens found instead of computed, before any preemption */
    bool preempted;
    int planned; /* tokens in the pass being built */
    bool wanted; /* the pass gives it a token */
};

/* One training step or evaluation; copies of all that the rows point to are in `storage`. */
struct claas_training {
    struct claas_request request;
    struct claas_backend_train train;
    struct claas_backend_row *rows;
    claas_adapter_t **adapters; /* [2 * row_count] references: student, teacher of each row */
    void *storage;
    bool again; /* the second try: at the first the device was full, and idle adapters have gone
                   since */
};

/* Load, init, copy or save. */
struct claas_adapter_job {
    struct claas_request request;
    claas_adapter_t *adapter; /* copy, save: the source */
    char *directory;
    enum claas_adapter_use use;
    struct claas_lora_config lora;
    uint64_t seed;
    bool if_room;                     /* copy: only in free memory of the device */
    struct claas_adapter_image image; /* save of TRAIN: the snapshot */
};

/* A thread for adapters and directories, and what waits for it (device->lock). */
struct claas_io {
    claas_device_t *device;
    struct claas_queue queue;
    pthread_cond_t wake;
    pthread_t thread;
    bool started;
};

/* A saved copy that is left on the device. There is room for one of each cycle that it takes to
 * keep the device busy: all of them may have ended before somebody loads the first one's
 * version. */
#define CLAAS_HOT_MAX 16 /* at most */
struct claas_hot {
    claas_adapter_t *adapter; /* a reference; NULL: free */
    struct claas_adapter_mark mark;
};

struct claas_device {
    const struct claas_backend_ops *ops;
    claas_backend_t *backend;
    claas_model_t *model;
    struct claas_model_config config;
    struct claas_device_options options; /* defaults filled in */
    int64_t (*now)(void);                /* nanoseconds */
    pthread_t compute_thread;
    bool compute_started;
    claas_host_cache_t *host_cache; /* its own lock */

    pthread_mutex_t lock;
    pthread_cond_t wake, swept;
    bool stop, io_stop, poked;
    bool cancel_seen; /* some request was cancelled since the compute thread looked */
    uint64_t last_id;
    struct claas_queue inbox;
    struct claas_io loads, saves;        /* two, so that loading a chat's adapter does not wait for
                                            a save */
    struct claas_hot hot[CLAAS_HOT_MAX]; /* the one used last first */
    struct claas_request *live;
    int chat_count, rollout_count, lane_count, io_count; /* requests not begun, by kind */
    claas_adapter_t *dead, *adapters;
    bool room_wanted;                   /* a load wants the memory that a step left */
    claas_device_client_t *keepers;     /* clients whose adapters may go */
    int asked_count;                    /* how many of them were asked for memory and have not
                                           answered */
    int64_t asked_ms;                   /* when the last one was asked (claas_clock_ms) */
    int await_ms;                       /* how long they have to answer, ms */
    uint64_t sweeps_begun, sweeps_done; /* counts sweeps that found something */
    struct claas_device_stats stats;

    /* The compute thread's own: */
    claas_kv_t *kv;
    claas_teacher_cache_t *teachers;     /* the teacher's rows of evaluations */
    struct claas_queue waiting, running; /* sequences, by priority, then turn, then age */
    struct claas_share base_share;       /* of the base model */
    int waiting_shares;                  /* shares with waiting chats */
    uint64_t share_scan;
    int64_t turn;            /* of the prompt being read, or read last */
    struct claas_queue lane; /* training, copies, saves, by age */
    uint64_t lane_scan;
    struct claas_training *current; /* the training step under way */
    struct claas_fault fault;
    int64_t slice_start, last_yield;
    uint64_t last_identity;
    bool streaming; /* the pass being built delays a chat's next token */
    /* Prompt tokens of a pass while a chat streams, steered so that the pass takes about two
     * slices; 0 = not known. */
    double streaming_tokens;
    double ns_per_token; /* of the last pass that read a prompt: where streaming_tokens starts */
    struct claas_segment *segments;
    struct claas_sample *samples;
    struct claas_sequence **planned;
};

/* --- open.c, device.c --- */

/* claas_device_open on any back-end and clock (NULL = the real one). */
int claas_device_open_with(const struct claas_backend_ops *ops, int64_t (*now)(void),
                           const struct claas_device_options *options, claas_model_t *model,
                           claas_device_t **ret);
/* Moves what clients sent to the compute thread's queues, ends what was cancelled, frees dead
 * adapters. */
void claas_device_take_inbox(claas_device_t *device);
/* Wakes the compute thread. Caller holds device->lock. */
void claas_device_poke(claas_device_t *device);

/* --- requests.c: queues and the life of a request --- */

void claas_queue_append(struct claas_queue *queue, struct claas_request *request);
void claas_queue_insert_after(struct claas_queue *queue, struct claas_request *where,
                              struct claas_request *request);
void claas_queue_remove(struct claas_queue *queue, struct claas_request *request);
struct claas_request *claas_queue_pop(struct claas_queue *queue);

/* A zeroed request of `size` bytes with its reference on the client and its last event's memory. */
struct claas_request *claas_request_new(claas_device_client_t *client, enum claas_request_kind kind,
                                        size_t size);
/* Numbers it, puts it into the inbox (or an I/O queue) and wakes whoever works there. OVERLOADED
 * when too many of its kind wait; the request then still belongs to the caller. */
int claas_request_submit(struct claas_request *request, uint64_t *ret_id);
/* Hands a save from the compute thread to the thread that saves. */
void claas_request_to_io(struct claas_request *request);
/* It has begun: no longer counted as waiting. May be called again. */
void claas_request_begin(struct claas_request *request);
/* Frees a request with its references, without an event. */
void claas_request_free(struct claas_request *request);
/* Sends its last event (request->last, filled in by the caller) and frees the request. */
void claas_request_finish(struct claas_request *request);
/* Ends the request with FAILED: `code` and this thread's error text. */
void claas_request_fail(struct claas_request *request, int code);
/* Ends a request that was cancelled, whatever its kind. */
void claas_request_cancel(struct claas_request *request);

/* --- client.c --- */

void claas_client_unref(claas_device_client_t *client);
/* Takes over the node: queued, or dropped when the client was freed. */
void claas_client_push(claas_device_client_t *client, struct claas_event_node *node);
void claas_event_node_free(struct claas_event_node *node);

/* --- adapters.c --- */

/* A handle with one reference around a new adapter of the back-end (SERVE, TRAIN). */
int claas_adapter_new(claas_device_t *device, const struct claas_lora_config *lora,
                      enum claas_adapter_use use, claas_adapter_t **ret);
/* A KEEP handle with one reference; takes over the image, whose moments are zero if it has none. */
int claas_adapter_new_kept(claas_device_t *device, struct claas_adapter_image *image,
                           claas_adapter_t **ret);
/* A handle with one reference around a clone, for any use; UNSUPPORTED where images do as well. */
int claas_adapter_new_clone(claas_device_t *device, const claas_adapter_t *source,
                            enum claas_adapter_use use, claas_adapter_t **ret);
/* Leaves a saved KEEP adapter on the device, for whoever loads its directory next. */
void claas_adapters_add_hot(claas_device_t *device, const struct claas_adapter_mark *mark,
                            claas_adapter_t *adapter);
/* A reference to the one of that directory, or NULL. */
claas_adapter_t *claas_adapters_find_hot(claas_device_t *device,
                                         const struct claas_adapter_mark *mark, bool with_moments);
/* Lets go of all of them: the memory is wanted. The next sweep frees it. */
void claas_adapters_drop_hot(claas_device_t *device);
/* Frees the adapters without references, and the memory that a step left if a load wants it and
 * nothing learns (the next step of a cycle would only take it again). Compute thread. */
void claas_adapters_sweep(claas_device_t *device);
/* Waits until the adapters that had no references at the call are freed and, on a back-end that
 * keeps it, the memory that a step left. Returns at once when there was nothing, or when the device
 * closes. For the thread that loads. */
void claas_adapters_await_sweep(claas_device_t *device);
/* Frees every adapter; handles still held elsewhere stay valid but empty. Only while the device
 * closes. */
void claas_adapters_close(claas_device_t *device);
/* The weights changed: nothing cached under the old ones is found again. Compute thread. */
void claas_adapter_changed(claas_adapter_t *adapter);

/* --- generate.c --- */

/* Takes a new or preempted sequence into the waiting queue, by priority and age. */
void claas_generate_enqueue(claas_device_t *device, struct claas_sequence *sequence);
/* The share that a sequence counts to. */
struct claas_share *claas_generate_share(const struct claas_sequence *sequence);
/* One forward pass over all that can run; false if nothing can. */
bool claas_generate_iterate(claas_device_t *device);
/* Whether a sequence of CHAT priority waits or runs. */
bool claas_generate_has_chat(const claas_device_t *device);
/* Ends sequences that were cancelled. */
void claas_generate_reap(claas_device_t *device);
/* Ends all of them. */
void claas_generate_close(claas_device_t *device);

/* --- budget.c --- */

/* Most prompt tokens of the next pass; at least a block. */
int claas_budget_find(claas_device_t *device);
/* Learns from a pass with `tokens` prompt tokens. */
void claas_budget_learn(claas_device_t *device, int tokens, int64_t ns);

/* --- train.c --- */

/* Runs the next request of the lane that may run now; false if none may. */
bool claas_train_run(claas_device_t *device);
/* Whether an earlier training step of the sequence's client on its adapter is still to be made. */
bool claas_train_precedes(const claas_device_t *device, const struct claas_sequence *sequence);
void claas_train_reap(claas_device_t *device);
void claas_train_close(claas_device_t *device);

/* --- memory.c --- */

#define CLAAS_MEMORY_AWAIT_MS 5000 /* device->await_ms, but for tests */

/* Asks the clients that keep idle adapters to let go of them; false if there is none whose answer
 * is worth waiting for. */
bool claas_memory_ask(claas_device_t *device);
/* Whether one of them has not answered yet and still has time to. The compute thread is woken when
 * all have answered. */
bool claas_memory_is_asked(claas_device_t *device);
/* Sleeps until `changed` is signalled; while a client is being asked, no longer than its time to
 * answer lasts: false when that is over. Caller holds device->lock. */
bool claas_memory_sleep(claas_device_t *device, pthread_cond_t *changed);
/* Waits until all have answered or their time is over, and what they let go of is freed. For the
 * thread that loads. */
void claas_memory_await(claas_device_t *device);
/* Forgets a client that goes away. */
void claas_memory_forget(claas_device_client_t *client);

/* --- io.c --- */

void *claas_io_main(void *io);
/* Adds the time since `start` (claas_clock_ns) to a counter of device->stats. */
void claas_io_account(claas_device_t *device, uint64_t *counter, int64_t start);

#endif
