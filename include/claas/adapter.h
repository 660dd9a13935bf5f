/* A LoRA adapter: its configuration and its directory on disk in PEFT's format.
 *
 *   adapter_config.json          PEFT's keys
 *   adapter_model.safetensors    float32: NAME.lora_A.weight [r, in], NAME.lora_B.weight [out, r];
 *                                NAME = base_model.model.model.layers.N.self_attn.q_proj, …
 *   optimizer.safetensors        optional, float32: exp_avg.TENSOR, exp_avg_sq.TENSOR; "step" in
 *                                the metadata
 */
#ifndef CLAAS_ADAPTER_H
#define CLAAS_ADAPTER_H

#include "claas/model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum claas_module {
    CLAAS_MODULE_Q,
    CLAAS_MODULE_K,
    CLAAS_MODULE_V,
    CLAAS_MODULE_O,
    CLAAS_MODULE_GATE,
    CLAAS_MODULE_UP,
    CLAAS_MODULE_DOWN,
};
#define CLAAS_MODULE_COUNT 7
#define CLAAS_MODULE_ALL   0x7fu
#define CLAAS_RANK_MAX     128

struct claas_lora_config {
    int rank;         /* r */
    float alpha;      /* scale = alpha / r */
    unsigned modules; /* bit per enum claas_module */
};

/* "q_proj"; and the other way round, -1 if unknown. */
const char *claas_module_name(enum claas_module module);
int claas_module_from_name(const char *name);
/* Out and in features of a module in a model. */
int claas_module_rows(const struct claas_model_config *model, enum claas_module module);
int claas_module_columns(const struct claas_model_config *model, enum claas_module module);

/* Host image of an adapter's weights or moments, float32: per layer and module present, A [r][in]
 * then B [out][r], in the order layer, module, A, B. One block; offsets by claas_lora_offset. */
size_t claas_lora_parameter_count(const struct claas_model_config *model,
                                  const struct claas_lora_config *lora);
/* Where A (matrix 0) or B (matrix 1) of a module starts, in elements; SIZE_MAX if the module is not
 * targeted. */
size_t claas_lora_offset(const struct claas_model_config *model,
                         const struct claas_lora_config *lora, int layer, enum claas_module module,
                         int matrix);
/* PEFT's initial values: A uniform in +-1/sqrt(in) (Kaiming, a = sqrt 5), B zero. Reproducible by
 * seed. */
void claas_lora_init(const struct claas_model_config *model, const struct claas_lora_config *lora,
                     uint64_t seed, float *parameters);

/* Where the arrays of an image come from and go back to: an owner of memory that is kept for the
 * next image. Any thread. */
struct claas_adapter_memory {
    void *(*take)(void *arg, size_t bytes); /* not zeroed; NULL: none is left */
    void (*give)(void *arg, void *array);
    void *arg;
};
struct claas_adapter_image {
    struct claas_lora_config lora;
    float *parameters;           /* claas_lora_parameter_count elements; owned */
    float *exp_avg, *exp_avg_sq; /* NULL when the directory has no optimizer state; owned */
    int64_t step;                /* optimizer steps taken */
    const struct claas_adapter_memory *memory; /* of the arrays; NULL: malloc and free */
};
/* An image with arrays from `memory`, the values still to be filled in. */
int claas_adapter_image_new(const struct claas_model_config *model,
                            const struct claas_lora_config *lora,
                            const struct claas_adapter_memory *memory, bool moments,
                            struct claas_adapter_image *ret);
void claas_adapter_image_done(struct claas_adapter_image *image);

/* Reads and checks a directory against a model: every tensor named, shaped and finite. Accepts F32,
 * F16, BF16, and use_rslora; refuses what it would get wrong (DoRA, bias, modules_to_save,
 * rank_pattern) with UNSUPPORTED. */
int claas_adapter_read(const char *directory, const struct claas_model_config *model,
                       bool with_moments, struct claas_adapter_image *ret);
/* The same into arrays from `memory`. */
int claas_adapter_read_into(const char *directory, const struct claas_model_config *model,
                            bool with_moments, const struct claas_adapter_memory *memory,
                            struct claas_adapter_image *ret);
/* Writes and fsyncs a complete directory (created by the call, must not exist). */
int claas_adapter_write(const char *directory, const struct claas_model_config *model,
                        const char *base_model_name, const struct claas_adapter_image *image);
/* The same, asking between tensors whether it is still wanted: CANCELLED if not, and the directory
 * is gone as after any failure. */
int claas_adapter_write_unless(const char *directory, const struct claas_model_config *model,
                               const char *base_model_name, const struct claas_adapter_image *image,
                               bool (*is_unwanted)(void *arg), void *arg);

#ifdef __cplusplus
}
#endif
#endif
