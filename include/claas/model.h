/* A base model as read from disk: its shape, its tensors (still in the file's encoding), its
 * tokenizer and chat template. Sources: a GGUF file, a Hugging Face directory, or
 * "random:NAME[:seed]". Nothing here is about a device; a back-end turns the tensors into its own
 * layout. */
#ifndef CLAAS_MODEL_H
#define CLAAS_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum claas_family {
    CLAAS_FAMILY_LLAMA, /* Llama, SmolLM2: no biases, no QK-norm */
    CLAAS_FAMILY_QWEN2, /* Qwen2, Qwen2.5: biases on q, k, v */
    CLAAS_FAMILY_QWEN3, /* RMSNorm on each head of q and k before RoPE */
};

enum claas_rope_kind { CLAAS_ROPE_PLAIN, CLAAS_ROPE_LINEAR, CLAAS_ROPE_LLAMA3, CLAAS_ROPE_YARN };

/* The shape of a model; names follow Hugging Face's config.json. */
struct claas_model_config {
    enum claas_family family;
    int hidden;       /* D, width of the residual stream */
    int intermediate; /* F, width of the MLP */
    int layers;       /* L */
    int heads;        /* H, query heads */
    int kv_heads;     /* key/value heads; H is a multiple */
    int head_dim;     /* d; read, never derived when the file says it */
    int vocab;        /* V, rows of the embedding */
    int context;      /* longest sequence */
    bool tied;        /* the head is the embedding */
    bool qkv_bias;
    bool qk_norm;
    float norm_eps;
    float rope_theta;
    enum claas_rope_kind rope_kind;
    float rope_factor;
    float rope_low_freq_factor, rope_high_freq_factor; /* Llama 3 */
    float rope_beta_fast, rope_beta_slow;              /* YaRN */
    float rope_attention_factor;                       /* YaRN: scales cos and sin; 1 elsewhere */
    int rope_original_context;
};

/* ggml's type numbers, which name every encoding a tensor may have on disk. */
enum claas_tensor_type {
    CLAAS_TYPE_F32 = 0,
    CLAAS_TYPE_F16 = 1,
    CLAAS_TYPE_Q4_0 = 2,
    CLAAS_TYPE_Q4_1 = 3,
    CLAAS_TYPE_Q5_0 = 6,
    CLAAS_TYPE_Q5_1 = 7,
    CLAAS_TYPE_Q8_0 = 8,
    CLAAS_TYPE_Q2_K = 10,
    CLAAS_TYPE_Q3_K = 11,
    CLAAS_TYPE_Q4_K = 12,
    CLAAS_TYPE_Q5_K = 13,
    CLAAS_TYPE_Q6_K = 14,
    CLAAS_TYPE_BF16 = 30,
};

/* Elements and bytes of one block of an encoding; 0 for an unknown type. */
int claas_type_block_elements(enum claas_tensor_type type);
int claas_type_block_bytes(enum claas_tensor_type type);
const char *claas_type_name(enum claas_tensor_type type);
/* Decodes `count` consecutive elements (a multiple of the block) to float32, with ggml's formulas,
 * products and sums rounded separately (no fused multiply-add), so that every reader gets the same
 * bits. */
void claas_dequantize(enum claas_tensor_type type, const void *blocks, size_t count, float *out);

/* A 2-D weight [rows = out features][columns = in features] (1-D: rows = 1), row-major, in the
 * file's mapping. */
struct claas_tensor {
    char name[128]; /* Hugging Face's name: model.layers.3.self_attn.q_proj.weight */
    enum claas_tensor_type type;
    int rows, columns;
    const uint8_t *data; /* borrowed from the model; NULL for a random one: use claas_tensor_row */
    size_t bytes;
    /* GGUF of arch "llama" interleaves the rows of q and k per head (adjacent-pair RoPE). When > 0,
     * row r of head h in Hugging Face's order is row h*head_rows + (r < head_rows/2 ? 2r : 2(r -
     * head_rows/2) + 1) of `data`. */
    int permuted_head_rows;
    uint64_t random_seed; /* random models: values are nearly normal(0, random_std), rounded to
                             bfloat16, or all 1 where that is 0 (norms) */
    float random_std;
};

typedef struct claas_model claas_model_t;
typedef struct claas_tokenizer claas_tokenizer_t;
typedef struct claas_chat_template claas_chat_template_t;

struct claas_model_options {
    /* GGUF file, directory, or "random:smollm2-135m[:SEED]", "random:tiny-llama", … */
    const char *path;
    /* NULL: by the model's own template; else a family name that overrides it */
    const char *chat_template;
};

/* Opens and checks a whole model. Errors: NOT_FOUND, FORMAT (what and where), UNSUPPORTED
 * (architecture, type, template of no known family), NO_MEMORY. Hostile files give an error, never
 * a crash. Any thread. */
int claas_model_open(const struct claas_model_options *options, claas_model_t **ret);
void claas_model_free(claas_model_t **model);

const struct claas_model_config *claas_model_config(const claas_model_t *model);
/* The tensor of a Hugging Face name, or NULL. Shapes were checked against the config at open. */
const struct claas_tensor *claas_model_tensor(const claas_model_t *model, const char *name);
/* One row, in Hugging Face's order, decoded to float32: out[columns]. */
void claas_tensor_row(const struct claas_tensor *tensor, int row, float *out);
/* A hint that these rows (some of which may not exist) will be read soon: the disk may begin. */
void claas_tensor_prepare(const struct claas_tensor *tensor, int first, int count);
/* Bytes of all tensors in the file; 0 of a random model. */
uint64_t claas_model_weight_bytes(const claas_model_t *model);
/* "SmolLM2-135M-Instruct": the file's or directory's name without quantisation, else general.name;
 * fit for an API. */
const char *claas_model_name(const claas_model_t *model);
/* 16 hex digits over config, tokenizer size and a sample of the weights: the key of per-model
 * tables. */
const char *claas_model_fingerprint(const claas_model_t *model);
const char *claas_model_path(const claas_model_t *model);
const claas_tokenizer_t *claas_model_tokenizer(const claas_model_t *model);
const claas_chat_template_t *claas_model_chat_template(const claas_model_t *model);
/* Releases the file's mapping once a device holds the weights; tensors' data must not be read
 * afterwards. */
void claas_model_release_weights(claas_model_t *model);
/* Tokens that end an answer (end of turn, end of text), as the file and generation_config.json give
 * them. */
size_t claas_model_stop_tokens(const claas_model_t *model, int32_t *tokens, size_t max);

#ifdef __cplusplus
}
#endif
#endif
