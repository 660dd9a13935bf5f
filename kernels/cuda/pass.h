/* A walk over the layers on the device, for serving and for training, and the memory it needs. Host
 * code in C; the arithmetic is in gemm.cu, rows.cu, attention_*.cu.
 *
 * What the device must know of a pack (tokens, positions, runs, …) is written into one pinned
 * buffer and copied once, before the first operation: see cuda_pack_fill. */
#ifndef CLAAS_CUDA_PASS_H
#define CLAAS_CUDA_PASS_H

#include "cuda/attention.h"
#include "cuda/graph.h"
#include "cuda/gemm.h"
#include "cuda/cuda_model.h"
#include "cuda/cuda_rows.h"
#include "cuda/cuda_lora.h"
#include "engine/backend.h"
#include "pack/step_plan.h"

#include <stdatomic.h>

struct claas_backend_adapter {
    struct cuda_adapter cuda;
    float *grad; /* during a step that it learns in: its gradient on the device */
};

/* A buffer that the host fills and the device reads: pinned pages and as many bytes of device
 * memory. */
struct cuda_upload {
    uint8_t *host;
    struct cuda_region device;
    size_t bytes, used, sent;
    cudaEvent_t copied; /* until this event the host's side must not be written */
    bool pending;
};
int cuda_upload_new(struct cuda_context *context, struct cuda_upload *upload, size_t bytes,
                    const char *what);
void cuda_upload_done(struct cuda_context *context, struct cuda_upload *upload);
/* Starts filling from the beginning; waits for the last copy. */
int cuda_upload_begin(struct cuda_context *context, struct cuda_upload *upload);
/* Room for `bytes` on the host's side and its address on the device's. NULL when full. */
void *cuda_upload_take(struct cuda_upload *upload, size_t bytes, const void **device);
/* Copies what was taken since it began, or since the last call. */
int cuda_upload_send(struct cuda_context *context, struct cuda_upload *upload);

/* A pack as the device sees it (device pointers). */
struct cuda_pack {
    int m, run_count, longest, furthest;
    bool decoding; /* each run is one row, and reads no block that another row writes */
    const int32_t *tokens, *pos, *blocks, *row_run, *tables, *children;
    const int64_t *key_order; /* training: see cuda_attention_bwd */
    const struct cuda_attn_run *runs;
    struct cuda_lora_rows rows; /* which rows belong to which adapter */
    struct cuda_lora_rows tail; /* likewise for the pack's tail, numbered along it */
};
/* The most bytes that cuda_pack_fill takes of an upload. */
size_t cuda_pack_bytes(int m, int runs, int tables);
/* Runs with a parent find it in the same pack (paged = false), or all earlier positions in their
 * blocks (paged = true). LIMIT if the upload is full.
 *
 * When serving (paged) at most CUDA_LORA_FEW rows, the places of all arrays (except for block
 * tables, and for what describes a tail shorter than the pack) follow from the numbers of rows and
 * runs alone, and so do the launches of cuda_linear: only whether there is any adapter makes a
 * difference. A run longer than `queries` becomes several (0: none does). */
int cuda_pack_fill(struct cuda_upload *upload, const struct claas_pack *pack, bool paged,
                   int queries, struct cuda_pack *ret);

/* Activations of one layer, act. An inference pass uses one set for all layers; training keeps one
 * per layer. */
struct cuda_acts {
    void *x_in, *x_mid,
        *x_out;            /* [m][D]: residual stream before attention, before the MLP, after */
    void *qkv;             /* [m][Nqkv], q and k rotated in place */
    void *qk_raw;          /* [m][Nq+Nk] before QK-norm, or NULL */
    void *attn;            /* [m][Nq] */
    void *gate_up;         /* [m][2F] */
    void *s[CUDA_WEIGHTS]; /* [m][lds]: x A^T of a weight's modules side by side */
    float *rstd_in, *rstd_mid, *rstd_q, *rstd_k, *lse; /* NULL when nothing is saved */
    void *xn_in, *xn_mid; /* [m][D]: outputs of the norms; NULL: in the pass's xn, until the next */
};

/* Memory of a pass over at most m rows. */
struct cuda_pass {
    claas_backend_t *backend;
    struct cuda_pack pack;
    int lds[CUDA_WEIGHTS];            /* row length of acts->s: parts * R of the widest adapter */
    void *xn, *h;                     /* act [m][D], [m][F] */
    float *lora_sums;                 /* [CUDA_LORA_PARTS][few rows][widest lds]: serving only */
    struct cuda_lora_pair *lora_pair; /* serving only */
    void *splits;                     /* scratch of attention: serving only */
    size_t split_bytes;
    uint8_t *kv; /* serving: block 0 of layer 0 */
    size_t kv_layer_bytes;
};

/* Called between layers: gives the engine its turn, and keeps the host at most two calls ahead of
 * the device, so that time measured by the host means something. CANCELLED when the engine gives
 * up. */
int cuda_yield(const struct cuda_pass *pass);
/* Called after each product: gives the turn alone. It is needed that often because a kernel's first
 * launch loads it, which takes milliseconds, and a first step meets dozens of kernels in its first
 * layer. A product whose shape is new also gives turns itself, while it is timed. */
int cuda_turn(const struct cuda_pass *pass);

/* One weight of one layer over rows->m rows, with LoRA: out = x W^T (+ residual) + S (sB)^T. */
int cuda_linear(const struct cuda_pass *pass, const struct cuda_lora_rows *rows, int layer,
                enum cuda_weight_kind kind, const void *x, void *s, const void *residual,
                void *out);
/* The arguments of a layer's q|k|v and attention: those of the pass's pack, in serving with its
 * blocks. */
struct cuda_qkv cuda_qkv_args(const struct cuda_pass *pass, int layer,
                              const struct cuda_acts *acts);
struct cuda_attention cuda_attention_args(const struct cuda_pass *pass, int layer,
                                          const struct cuda_acts *acts);
/* x_in -> attn */
int cuda_attention_half(const struct cuda_pass *pass, int layer, const struct cuda_acts *acts);
/* x_in, attn -> x_out over the given rows */
int cuda_mlp_half(const struct cuda_pass *pass, const struct cuda_lora_rows *rows, int layer,
                  const struct cuda_acts *acts);

/* All layers without keeping anything; the last one's second half only for the rows named by `tail`
 * (device [tail_count], increasing), whose final norm goes to out, act [tail_count][D]. */
struct cuda_infer {
    struct cuda_acts acts;
    void *tail_x, *tail_attn; /* act [tail_count][D], [tail_count][Nq] */
    const int32_t *tail;      /* device */
    int tail_count;           /* that of the pack's tail, or of all its rows */
};
int cuda_infer(const struct cuda_pass *pass, struct cuda_infer *infer, void *out);

void cuda_place_pass(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                     struct cuda_pass *pass);
/* What is kept of a layer. */
enum cuda_keep {
    CUDA_KEEP_NOTHING, /* an inference pass */
    CUDA_KEEP_LEAST,   /* what a backward pass reads; norms' outputs are made again there */
    CUDA_KEEP_ALL,     /* these, too */
};
/* One layer's activations. */
struct cuda_acts cuda_place_acts(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                                 const int lds[CUDA_WEIGHTS], enum cuda_keep keep);
void cuda_place_infer(const claas_backend_t *backend, struct cuda_arena *arena, int m, int tail,
                      const struct cuda_pass *pass, struct cuda_infer *infer);

/* logits float32 [m][V] of rows after the final norm. */
int cuda_logits(claas_backend_t *backend, int m, const void *x, float *logits);

/* --- the back-end --- */

struct cuda_forward_space {
    struct cuda_region region;
    struct cuda_upload upload;
    struct claas_pack pack;
    struct cuda_pass pass;
    struct cuda_lora_pair lora_pair; /* the pass's */
    struct cuda_infer infer;
    struct cuda_graphs graphs;
    int32_t spare; /* the block behind the pool, for rows that fill up a pass */
    int32_t *tail; /* host [max_tokens] */
    void *host;    /* memory of the pack's and tail's arrays on the host */
    void *hidden;
    float *logits; /* [logits_rows][V] */
    struct claas_sample *device_samples, *staging;
    int logits_rows;
};

struct claas_backend {
    struct cuda_context context;
    struct cuda_model model;
    int kv_blocks, max_tokens, max_sequences;
    struct cuda_region kv; /* [L][kv_blocks + 1][2][G][16][d] */
    struct cuda_forward_space forward;
    struct cuda_region step; /* of training; grown when a step needs more, kept for the next one */
    struct cuda_upload step_upload;  /* the rows of all its batches */
    struct cuda_upload chunk_upload; /* for the head's chunks, one behind the other */
    cudaEvent_t turns[2];            /* of cuda_yield */
    int turn;
    char name[96];
    _Atomic uint64_t bytes_adapters;
};
int cuda_forward_open(claas_backend_t *backend);
void cuda_forward_close(claas_backend_t *backend);
int cuda_forward(claas_backend_t *backend, const struct claas_segment *segments, int count,
                 struct claas_sample *samples);
int cuda_train(claas_backend_t *backend, const struct claas_backend_train *request,
               struct claas_train_result *ret);
/* Passes of every size class of rows. Only what makes the device useless is an error. */
int cuda_warm(claas_backend_t *backend);

#endif
