/* What the files of kernels/model share: the model object and the readers that fill it.
 *
 * A source (GGUF, Hugging Face directory, random) fills config, then binds every tensor that the
 * config calls for (model_tensors.c knows the list and both naming schemes), then tokenizer,
 * template and stop tokens. Everything that comes from a file is hostile until checked: counts are
 * compared with the bytes that are left before anything is allocated, and all arithmetic on sizes
 * is overflow-checked. */
#ifndef CLAAS_MODEL_INTERNAL_H
#define CLAAS_MODEL_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "claas/adapter.h"
#include "claas/buf.h"
#include "claas/chat_template.h"
#include "claas/json.h"
#include "claas/model.h"
#include "claas/safetensors.h"
#include "claas/tokenizer.h"

/* Bounds on shapes: beyond any dense model known, and small enough that no product of three
 * overflows 64 bits. */
#define CLAAS_HIDDEN_MAX   (1 << 17)
#define CLAAS_LAYERS_MAX   1024
#define CLAAS_HEADS_MAX    1024
#define CLAAS_HEAD_DIM_MAX 1024
#define CLAAS_VOCAB_MAX    (1 << 22)
#define CLAAS_CONTEXT_MAX  (1 << 24)
#define CLAAS_STOP_MAX     16

struct claas_model {
    char *path;
    char *name;
    char fingerprint[17];
    struct claas_model_config config;
    struct claas_tensor *tensors; /* sorted by name */
    size_t tensor_count;
    const uint8_t *mapping; /* of a GGUF file */
    size_t mapping_length;
    claas_safetensors_t **shards; /* of a Hugging Face directory */
    size_t shard_count;
    claas_tokenizer_t *tokenizer;
    claas_chat_template_t *chat_template;
    int32_t stops[CLAAS_STOP_MAX];
    size_t stop_count;
};

/* The tensors that a config calls for, in a fixed order. */
struct claas_tensor_spec {
    char name[128];      /* Hugging Face's */
    char gguf_name[128]; /* ggml's */
    int rows, columns;
    bool norm;    /* a norm's weight */
    bool rotated; /* q or k projection: GGUF of arch "llama" permutes its rows */
    bool is_bias; /* a bias vector */
};
/* Whether the config calls for a tensor of that name: ggml's name if `gguf`, else Hugging
 * Face's. */
bool claas_model_spec_find(const struct claas_model_config *config, const char *name, bool gguf);

/* Fills type, rows, columns, data and bytes (or the random fields) of a tensor; NOT_FOUND if the
 * source has none. */
typedef int claas_tensor_source_fn(void *source, const struct claas_tensor_spec *spec,
                                   struct claas_tensor *tensor);
/* Asks the source for every tensor of model->config and checks shapes and sizes. */
int claas_model_bind(struct claas_model *model, claas_tensor_source_fn *find, void *source);
/* Ranges and relations of the fields; UNSUPPORTED or FORMAT. */
int claas_model_config_check(const struct claas_model_config *config);
/* Adds a stop token once; ids outside the vocabulary are ignored, as are those beyond
 * CLAAS_STOP_MAX. */
void claas_model_add_stop(struct claas_model *model, int64_t token);

/* FORMAT unless every token has a row of the embedding. (More rows than tokens are common: they are
 * padded.) */
int claas_model_check_tokenizer(const struct claas_model *model);

/* Sets model->name from `hint` (may be NULL) and the path, and model->fingerprint. */
int claas_model_identify(struct claas_model *model, const char *hint);

/* ---- GGUF ---- */
enum claas_gguf_type {
    CLAAS_GGUF_U8 = 0,
    CLAAS_GGUF_I8 = 1,
    CLAAS_GGUF_U16 = 2,
    CLAAS_GGUF_I16 = 3,
    CLAAS_GGUF_U32 = 4,
    CLAAS_GGUF_I32 = 5,
    CLAAS_GGUF_F32 = 6,
    CLAAS_GGUF_BOOL = 7,
    CLAAS_GGUF_STRING = 8,
    CLAAS_GGUF_ARRAY = 9,
    CLAAS_GGUF_U64 = 10,
    CLAAS_GGUF_I64 = 11,
    CLAAS_GGUF_F64 = 12,
};

struct claas_span {
    const char *text; /* borrowed, not terminated */
    size_t length;
};

struct claas_gguf_value {
    enum claas_gguf_type type;
    int64_t integer;        /* integers and bool; a u64 beyond int64 is refused at parse */
    double number;          /* every number */
    struct claas_span text; /* string */
    enum claas_gguf_type item_type;
    uint64_t item_count;
    const uint8_t *items; /* array: encoded items, already walked and in bounds */
    size_t items_bytes;
};

struct claas_gguf_pair {
    struct claas_span key; /* printable ASCII */
    struct claas_gguf_value value;
};

struct claas_gguf_tensor {
    struct claas_span name; /* printable ASCII */
    int dims;
    int64_t shape[4]; /* [0] is the fastest: in features */
    enum claas_tensor_type type;
    const uint8_t *data; /* borrowed */
    size_t bytes;
};

struct claas_gguf {
    struct claas_gguf_pair *pairs; /* sorted by key */
    size_t pair_count;
    struct claas_gguf_tensor *tensors; /* sorted by name */
    size_t tensor_count;
};

/* Everything in the result borrows from `data`. */
int claas_gguf_parse(const uint8_t *data, size_t length, struct claas_gguf **ret);
void claas_gguf_free(struct claas_gguf **gguf);
const struct claas_gguf_tensor *claas_gguf_find(const struct claas_gguf *gguf, const char *name);
/* Typed getters like those of claas/json.h: 0 absent, 1 present, FORMAT when the value has another
 * type or range. */
int claas_gguf_get_int(const struct claas_gguf *gguf, const char *key, int64_t min, int64_t max,
                       int64_t *ret);
int claas_gguf_get_number(const struct claas_gguf *gguf, const char *key, double min, double max,
                          double *ret);
int claas_gguf_get_bool(const struct claas_gguf *gguf, const char *key, bool *ret);
int claas_gguf_get_text(const struct claas_gguf *gguf, const char *key, struct claas_span *ret);
/* An array of one item type; *ret NULL when absent. */
int claas_gguf_get_array(const struct claas_gguf *gguf, const char *key, enum claas_gguf_type type,
                         const struct claas_gguf_value **ret);
/* The next string of a string array; the reader must have been initialised over value->items. */
struct claas_span claas_gguf_next_text(struct claas_reader *reader);
bool claas_span_equal(struct claas_span span, const char *text);

/* Reads a GGUF image into a model: config, tensors (borrowing from data), tokenizer, template,
 * stops. *ret_name is a copy of general.name or NULL; free with free(). */
int claas_gguf_load(struct claas_model *model, const uint8_t *data, size_t length,
                    const char *chat_template, char **ret_name);
int claas_gguf_load_tokenizer(struct claas_model *model, const struct claas_gguf *gguf);

/* ---- Hugging Face directory ---- */
int claas_hf_load(struct claas_model *model, const char *directory, const char *chat_template,
                  char **ret_name);
/* config.json -> shape. *ret_tied: 1 tied, 0 untied, -1 the file does not say. */
int claas_hf_config_parse(const cJSON *json, struct claas_model_config *ret, int *ret_tied);

/* ---- random ---- */
/* `spec` is what follows "random:", see random_model.c. */
int claas_random_load(struct claas_model *model, const char *spec, const char *chat_template);

float claas_half_to_float(uint16_t half);

/* ---- adapters ---- */
/* adapter_config.json -> rank, alpha (made such that alpha / rank is the scale, with rslora too),
 * modules; modules is 0 when the file selects them by a pattern: then only the tensors' names
 * tell. */
int claas_adapter_config_parse(const cJSON *json, struct claas_lora_config *ret);
int claas_adapter_config_write(const char *path, const char *base_model_name,
                               const struct claas_lora_config *lora);
/* "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight" */
#define CLAAS_ADAPTER_NAME_BYTES 128
void claas_adapter_tensor_name(int layer, enum claas_module module, int matrix,
                               char name[CLAAS_ADAPTER_NAME_BYTES]);

#endif
