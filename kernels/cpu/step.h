/* The transformer on the CPU: what its files share.
 *
 *   backend.c         opens and describes
 *   memory.c          regions of memory
 *   weights.c         the frozen model (rope.c: its angles, blocks.c: the file's own blocks)
 *   adapter_state.c   the LoRA adapters
 *   pass.c, linear.c  walk the layers: the same code for decode, prefill and training, which is why
 *                     their log-probs agree bit for bit
 *   forward.c         a forward pass of the engine
 *   sample.c          turns logits into tokens
 *   train.c           a training step, with space.c, head.c and backward.c (cpu/train.h)
 *
 * How sequences become rows is kernels/pack's; the arithmetic is the operation table's (cpu/ops.h).
 *
 * Letters in shapes: m rows of a pack, D hidden, F intermediate, V vocabulary, L layers, H heads, G
 * kv heads, d head_dim, Nq = H*d, Nk = G*d, Nqkv = Nq + 2*Nk, R rank (made even). "act" is an
 * activation element of the operation table. */
#ifndef CLAAS_CPU_STEP_H
#define CLAAS_CPU_STEP_H

#include "cpu/ops.h"
#include "cpu/rope.h"
#include "engine/backend.h"
#include "pack/step_plan.h"

#include <stdatomic.h>

/* --- memory --- */

/* Zeroed pages straight from the system: memory that is never touched never becomes resident. */
struct cpu_region {
    void *base;
    size_t bytes;
};
/* NO_MEMORY, with `what` in the error's text. */
int claas_cpu_region_new(struct cpu_region *region, size_t bytes, const char *what);
/* Asks the system for huge pages; nothing is lost where it has none. */
void claas_cpu_region_huge(const struct cpu_region *region);
void claas_cpu_region_done(struct cpu_region *region);

/* A bump allocator over one region. With base NULL it only counts, so one layout function both
 * measures and places. */
struct cpu_arena {
    uint8_t *base;
    size_t used;
};
/* The next `bytes`, 64-byte aligned; NULL when only counting. */
void *claas_cpu_take(struct cpu_arena *arena, size_t bytes);

/* Element `element` of an array of acts. */
static inline void *claas_cpu_at(const struct claas_ops *ops, const void *base, size_t element)
{
    return (uint8_t *)(uintptr_t)base + element * ops->act_bytes;
}

/* --- the frozen model --- */

/* The four weights of a layer; q|k|v and gate|up are fused, their parts stay addressable. */
enum cpu_weight_kind { CPU_QKV, CPU_O, CPU_GATE_UP, CPU_DOWN };
#define CPU_WEIGHTS   4
#define CPU_PARTS_MAX 3

/* Rows [row, row + n) of a fused weight, both multiples of 16: one tensor of the file, one LoRA
 * module. */
struct cpu_part {
    int row, n;
    enum claas_module module;
    struct claas_blocks *blocks; /* these rows in the file's blocks, or NULL */
};
struct cpu_weight {
    int n, k;
    void *panels; /* [n][k] */
    struct claas_blocks
        *blocks; /* all rows in the file's blocks: NULL where the parts' encodings differ */
    float *bias; /* [n] or NULL */
    int part_count;
    struct cpu_part parts[CPU_PARTS_MAX];
};
struct cpu_layer {
    struct cpu_weight weights[CPU_WEIGHTS];
    float *norm_in, *norm_mid; /* [D]: before attention, before the MLP */
    float *norm_q, *norm_k;    /* [d] or NULL */
};
struct cpu_model {
    struct claas_model_config config;
    int nq, nk, nqkv;
    struct cpu_layer *layers;
    struct cpu_weight head;          /* [V][D]; the embedding too when tied */
    void *embedding;                 /* act [V][D]; NULL when tied */
    float *norm_out;                 /* [D] */
    float *cos_sin;                  /* [context][d/2][2] */
    struct cpu_region panels, small; /* all panels and the embedding; norms, biases and angles in
                                        float32 */
    size_t blocks_bytes;
};
struct claas_loading;
int claas_cpu_model_load(struct cpu_model *model, const struct claas_ops *ops, claas_pool_t *pool,
                         const claas_model_t *source, struct claas_loading *loading);
void claas_cpu_model_done(struct cpu_model *model);

/* --- adapters --- */

/* Where things lie in an adapter. Order of the masters per layer and weight: A of the parts
 * present, fused [parts*R][K], then for each of them B transposed [R][N]. gemm_tn gives gradients
 * in just these shapes. */
struct cpu_lora_layout {
    int rank;                                     /* R: even, the padding is zero for ever */
    int parts[CPU_WEIGHTS];                       /* modules present in a weight */
    int index[CLAAS_MODULE_COUNT];                /* a module's place among them, -1 if absent */
    size_t a[CPU_WEIGHTS], b[CLAAS_MODULE_COUNT]; /* element offsets within a layer's masters */
    size_t a_panels[CPU_WEIGHTS],
        b_panels[CLAAS_MODULE_COUNT]; /* byte offsets within a layer's panels */
    size_t layer_floats, layer_bytes;
    size_t count; /* floats of all layers */
};
struct claas_backend_adapter {
    struct claas_lora_config lora;
    struct cpu_lora_layout layout;
    enum claas_adapter_use use;
    float scale;               /* alpha / rank: inside the B panels */
    struct cpu_region panels;  /* act panels, what every pass reads */
    struct cpu_region masters; /* TRAIN: parameters, exp_avg, exp_avg_sq, float32 [count] each */
    float *parameters, *exp_avg, *exp_avg_sq;
    int64_t step;
};
static inline const void *claas_cpu_a_panels(const claas_backend_adapter_t *adapter, int layer,
                                             enum cpu_weight_kind kind)
{
    return (const uint8_t *)adapter->panels.base + (size_t)layer * adapter->layout.layer_bytes +
           adapter->layout.a_panels[kind];
}
static inline const void *claas_cpu_b_panels(const claas_backend_adapter_t *adapter, int layer,
                                             enum claas_module module)
{
    return (const uint8_t *)adapter->panels.base + (size_t)layer * adapter->layout.layer_bytes +
           adapter->layout.b_panels[module];
}
int claas_cpu_adapter_new(claas_backend_t *backend, const struct claas_lora_config *lora,
                          enum claas_adapter_use use, claas_backend_adapter_t **ret);
void claas_cpu_adapter_free(claas_backend_t *backend, claas_backend_adapter_t **adapter);
uint64_t claas_cpu_adapter_bytes(const claas_backend_adapter_t *adapter);
int claas_cpu_adapter_upload(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                             const struct claas_adapter_image *image);
int claas_cpu_adapter_download(claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                               claas_turn_fn *turn, void *turn_arg,
                               struct claas_adapter_image *ret);
/* Rounds the masters into the panels again, after an optimizer step; over the pool. */
void claas_cpu_adapter_repack(claas_backend_t *backend, claas_backend_adapter_t *adapter);

/* --- a pass over the layers --- */

/* Activations of one layer. An inference pass uses one set for all layers; training keeps one per
 * layer. */
struct cpu_acts {
    void *x_in, *x_mid,
        *x_out;    /* act [m][D]: residual stream before attention, before the MLP, after it */
    void *qkv;     /* act [m][Nqkv], q and k rotated in place */
    void *qk_raw;  /* act [m][Nq+Nk] before QK-norm: training of models that have it, else NULL */
    void *attn;    /* act [m][Nq] */
    void *gate_up; /* act [m][2F] */
    void *s[CPU_WEIGHTS];      /* act [m][lds]: x A^T of a weight's modules side by side; lds is 0
                                  without LoRA */
    float *rstd_in, *rstd_mid; /* [m]; NULL when nothing is saved, like rstd_q, rstd_k and lse */
    float *rstd_q, *rstd_k;    /* [m][H], [m][G] */
    float *lse;                /* [m][H] */
};
struct cpu_pass {
    claas_backend_t *backend;
    const struct claas_pack *pack;
    uint8_t *kv;           /* block 0 of layer 0 */
    size_t kv_layer_bytes; /* from layer to layer; 0: all layers use the same blocks, one after the
                              other */
    int lds[CPU_WEIGHTS];  /* row length of acts->s */
    /* scratch */
    void *xn, *h;                /* act [m][D], [m][F] */
    float *mixed;                /* float [CPU_MIXED_ROWS][max N]: sums of linear_mixed() in
                                    linear.c */
    struct claas_attn_run *runs; /* [run_count] */
    claas_yield_fn *yield;
    void *yield_arg;
};
/* A pack of several adapters and at most this many rows reads the weights once instead of once per
 * adapter. */
#define CPU_MIXED_ROWS 64
/* Up to this many rows decoding from the file's blocks is worth a call per part. */
#define CPU_FEW_ROWS 16

/* 0, or CLAAS_ERR_CANCELLED when the yield callback gives up. */
int claas_cpu_yield(const struct cpu_pass *pass);
/* One weight of one layer over all rows of the pack, with LoRA: x act [m][K], s act [m][lds],
 * residual (or NULL) and out act [m][N]. */
void claas_cpu_linear(const struct cpu_pass *pass, const struct claas_pack *pack, int layer,
                      enum cpu_weight_kind kind, const void *x, void *s, const void *residual,
                      void *out);
/* The embeddings of m tokens, act [m][D]. */
void claas_cpu_embed(claas_backend_t *backend, const int32_t *tokens, int m, void *out);
/* x_in -> attn; also writes this layer's keys and values. */
int claas_cpu_attention_half(const struct cpu_pass *pass, int layer, const struct cpu_acts *acts);
/* x_in, attn -> x_out over the rows of `pack` (the pass's own or a part of its rows, gathered). */
int claas_cpu_mlp_half(const struct cpu_pass *pass, const struct claas_pack *pack, int layer,
                       const struct cpu_acts *acts);
/* What claas_cpu_infer works in. `tail` names the rows wanted at the end, [tail_count],
 * increasing. */
struct cpu_infer {
    struct cpu_acts acts;
    void *tail_x, *tail_attn;             /* act [tail_count][D], [tail_count][Nq] */
    struct claas_pack_group *tail_groups; /* [pack->group_count] */
    const int32_t *tail;
    int tail_count;
};
/* Copies rows of an act matrix [][width] side by side. */
void claas_cpu_gather(const struct claas_ops *ops, const void *in, const int32_t *rows, int count,
                      size_t width, void *out);
/* All layers, without keeping anything. The last layer's second half is computed for the tail's
 * rows alone; their final norm is written to out, act [tail_count][D]. */
int claas_cpu_infer(const struct cpu_pass *pass, struct cpu_infer *infer, void *out);
/* Places the buffers of a pass and of an inference walk over m rows; lds as in the pass. */
void claas_cpu_place_pass(const claas_backend_t *backend, struct cpu_arena *arena, int m, int runs,
                          struct cpu_pass *pass);
void claas_cpu_place_infer(const claas_backend_t *backend, struct cpu_arena *arena, int m, int tail,
                           int groups, const struct cpu_pass *pass, struct cpu_infer *infer);
/* logits float [m][V] of x act [m][D], rows after the final norm. */
void claas_cpu_logits(claas_backend_t *backend, int m, const void *x, float *logits);
/* Rounds `count` floats to act, over the pool. */
void claas_cpu_to_act(claas_backend_t *backend, const float *in, void *out, size_t count);

/* --- sampling --- */

/* Fills the results of m samples from float logits [m][V], over the pool, each member of which
 * needs claas_cpu_sample_bytes of backend->forward.sampling. A row that is not finite gets token
 * -1. */
void claas_cpu_sample(claas_backend_t *backend, int m, const float *logits,
                      struct claas_sample *samples);
size_t claas_cpu_sample_bytes(int vocab);

/* --- the back-end --- */

struct cpu_forward_space {
    struct cpu_region region;
    struct claas_pack pack;
    struct cpu_pass pass;
    struct cpu_infer infer;
    int32_t *tail;     /* [max_tokens] */
    void *hidden;      /* act [max_tokens][D] */
    float *logits;     /* [logits_rows][V] */
    uint8_t *sampling; /* scratch of every member of the pool */
    int logits_rows;
};
struct claas_backend {
    const struct claas_ops *ops;
    claas_pool_t *pool;
    struct cpu_model model;
    int kv_blocks, max_tokens;
    size_t kv_block_bytes; /* of one kv head */
    struct cpu_region kv;  /* blocks [L][kv_blocks][G] */
    struct cpu_forward_space forward;
    struct cpu_region step; /* memory of a training step; grown when one needs more */
    size_t
        saved_limit; /* bytes of activations to keep; a batch with more computes its layers twice */
    char name[64];
    _Atomic uint64_t bytes_adapters, bytes_workspace;
    uint64_t bytes_peak; /* pack/peak.h */
};
/* Keeps the peak up to date after the counters changed. */
void claas_cpu_memory_changed(claas_backend_t *backend);

/* Allocates the workspace of forward passes. */
int claas_cpu_forward_open(claas_backend_t *backend);
/* The functions of claas_backend_ops (engine/backend.h). */
int claas_cpu_forward(claas_backend_t *backend, const struct claas_segment *segments, int count,
                      struct claas_sample *samples);
int claas_cpu_train(claas_backend_t *backend, const struct claas_backend_train *request,
                    struct claas_train_result *ret);
int claas_cpu_floor(const struct claas_backend_options *options, struct claas_device_floor *ret);

#endif
