/* The frozen model on the device: every weight once, act, row-major [N][K], q|k|v and gate|up
 * fused. */
#ifndef CLAAS_CUDA_CUDA_MODEL_H
#define CLAAS_CUDA_CUDA_MODEL_H

#include "claas/model.h"
#include "claas/adapter.h"
#include "cuda/context.h"
#include "pack/loading.h"

#ifdef __cplusplus
extern "C" {
#endif

enum cuda_weight_kind { CUDA_QKV, CUDA_O, CUDA_GATE_UP, CUDA_DOWN };
#define CUDA_WEIGHTS   4
#define CUDA_PARTS_MAX 3

/* Rows [row, row+n) of a fused weight: one LoRA module. */
struct cuda_part {
    int row, n;
    enum claas_module module;
};
struct cuda_weight {
    int n, k;
    void *w; /* act [n][k] */
    int part_count;
    struct cuda_part parts[CUDA_PARTS_MAX];
};
struct cuda_layer {
    struct cuda_weight weights[CUDA_WEIGHTS];
    float *bias;               /* of q|k|v, [Nqkv] or NULL */
    float *norm_in, *norm_mid; /* [D] */
    float *norm_q, *norm_k;    /* [d] or NULL */
};
struct cuda_model {
    struct claas_model_config config;
    int nq, nk, nqkv;
    struct cuda_layer *layers; /* host array */
    void *head, *embedding;    /* act [V][D]; the same when tied */
    float *norm_out;           /* [D] */
    float *cos_sin;            /* [context][d/2][2], the values of claas_cpu_rope_table */
    struct cuda_region region;
};
/* Values are bf16(dequantised) as on the CPU. Rows are decoded by several threads into two pinned
 * buffers, one of which is copied while the other fills. A random model's rows are made on the
 * device, with the bits that claas_tensor_row makes. loading: told of what has been read, or NULL.
 * On failure `ret` holds nothing. */
int cuda_model_load(struct cuda_context *context, const claas_model_t *source,
                    struct claas_loading *loading, struct cuda_model *ret);
void cuda_model_done(struct cuda_context *context, struct cuda_model *model);

/* --- adapters --- */

/* Where things lie in an adapter, in elements. Per layer and weight: A of the parts present,
 * stacked [parts*R][K], then for each of them B [N][R]. Parameters, moments, gradient and the act
 * view share these places; the act view holds A and (alpha/r) B. R: the rank made a multiple of 8,
 * the padding is zero for ever. */
struct cuda_lora_layout {
    int rank;
    int parts[CUDA_WEIGHTS];                       /* modules present in a weight */
    int index[CLAAS_MODULE_COUNT];                 /* a module's place among them, -1 if absent */
    size_t a[CUDA_WEIGHTS], b[CLAAS_MODULE_COUNT]; /* within a layer */
    size_t layer, count;                           /* of a layer; of all layers */
};
int cuda_lora_layout(const struct cuda_model *model, const struct claas_lora_config *lora,
                     struct cuda_lora_layout *ret);

struct cuda_adapter {
    struct claas_lora_config lora;
    struct cuda_lora_layout layout;
    float scale; /* alpha / rank */
    bool trains;
    struct cuda_region view;    /* act [count]; of CUDA_CLONE_STATE none */
    struct cuda_region masters; /* trains: parameters, exp_avg, exp_avg_sq, float32 [count] each */
    float *parameters, *exp_avg, *exp_avg_sq;
    int64_t step;
};
int cuda_adapter_new(struct cuda_context *context, const struct cuda_model *model,
                     const struct claas_lora_config *lora, bool trains, struct cuda_adapter *ret);
void cuda_adapter_done(struct cuda_context *context, struct cuda_adapter *adapter);
/* From and to the host's image; both wait for the copies. The download allocates from ret->memory.
 * An image in pinned memory (cuda_host_new) moves without passing through another buffer. */
int cuda_adapter_upload(struct cuda_context *context, const struct cuda_model *model,
                        struct cuda_adapter *adapter, const struct claas_adapter_image *image);
/* turn, unless NULL: called after every layer; may use the computing stream. */
int cuda_adapter_download(struct cuda_context *context, const struct cuda_model *model,
                          const struct cuda_adapter *adapter, void (*turn)(void *arg),
                          void *turn_arg, struct claas_adapter_image *ret);
/* A copy, on the device, of an adapter with masters as the work queued so far leaves it; waits for
 * that. Any thread, while nobody writes the source. */
enum cuda_clone {
    CUDA_CLONE_VIEW,  /* to serve */
    CUDA_CLONE_STATE, /* masters and moments alone, to be read back or cloned again */
    CUDA_CLONE_ALL,
};
int cuda_adapter_clone(struct cuda_context *context, const struct cuda_model *model,
                       const struct cuda_adapter *source, enum cuda_clone what,
                       struct cuda_adapter *ret);
/* Pinned memory of the host; NULL if there is none left. Any thread. */
void *cuda_host_new(size_t bytes);
void cuda_host_free(void *base);
/* Parameters -> act view, after a step; on the stream. */
int cuda_adapter_refresh(struct cuda_context *context, const struct cuda_model *model,
                         struct cuda_adapter *adapter);

#ifdef __cplusplus
}
#endif
#endif
