/* From GGUF keys and tensors to a model: shape, RoPE, weights.
 *
 * Keys are prefixed by the architecture ("llama.block_count"). A tensor that the shape does not
 * call for is an error, not ignored: a model with, say, a bias we do not add would answer, wrongly.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "model_internal.h"

#define TEMPLATE_MAX ((size_t)1 << 20)

/* Reads keys below the architecture's prefix; the first failure sticks. */
struct keys {
    const struct claas_gguf *gguf;
    char arch[32];
    int error;
};

struct arch_row {
    const char *name;
    enum claas_family family;
};

static const struct arch_row arch_rows[] = {
    {"llama", CLAAS_FAMILY_LLAMA},
    {"qwen2", CLAAS_FAMILY_QWEN2},
    {"qwen3", CLAAS_FAMILY_QWEN3},
};

static void full_key(const struct keys *keys, const char *key, char full[128])
{
    snprintf(full, 128, "%s.%s", keys->arch, key);
}

/* `fallback` below `min` means that the key must be there. */
static int64_t take_int(struct keys *keys, const char *key, int64_t min, int64_t max,
                        int64_t fallback)
{
    char full[128];
    int64_t value = fallback;

    if (keys->error)
        return fallback;
    full_key(keys, key, full);
    int rc = claas_gguf_get_int(keys->gguf, full, min, max, &value);
    if (rc < 0)
        keys->error = rc;
    else if (rc == 0 && fallback < min)
        keys->error = claas_fail(CLAAS_ERR_FORMAT, "the key '%s' is missing", full);
    return value;
}

static float take_number(struct keys *keys, const char *key, double min, double max,
                         double fallback)
{
    char full[128];
    double value = fallback;

    if (keys->error)
        return (float)fallback;
    full_key(keys, key, full);
    int rc = claas_gguf_get_number(keys->gguf, full, min, max, &value);
    if (rc < 0)
        keys->error = rc;
    else if (rc == 0 && fallback < min)
        keys->error = claas_fail(CLAAS_ERR_FORMAT, "the key '%s' is missing", full);
    return (float)value;
}

static int read_arch(struct keys *keys, struct claas_model_config *config)
{
    struct claas_span arch = {NULL, 0};
    int64_t parts = 1;
    int rc = claas_gguf_get_text(keys->gguf, "general.architecture", &arch);

    if (rc <= 0)
        return rc < 0 ? rc
                      : claas_fail(CLAAS_ERR_FORMAT, "the key 'general.architecture' is missing");
    for (size_t i = 0; i < CLAAS_COUNT(arch_rows); i++)
        if (claas_span_equal(arch, arch_rows[i].name)) {
            config->family = arch_rows[i].family;
            snprintf(keys->arch, sizeof(keys->arch), "%s", arch_rows[i].name);
        }
    if (!keys->arch[0])
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "architecture '%.*s' (llama, qwen2 and qwen3 are supported)",
                          (int)(arch.length < 64 ? arch.length : 64), arch.text);
    rc = claas_gguf_get_int(keys->gguf, "split.count", 0, 65536, &parts);
    if (rc >= 0 && parts > 1)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "one of %lld parts of a split model; merge them with gguf-split first",
                          (long long)parts);
    return rc < 0 ? rc : 0;
}

static void read_rope(struct keys *keys, struct claas_model_config *config)
{
    struct claas_span kind = {"none", 4};
    char full[128];

    config->rope_kind = CLAAS_ROPE_PLAIN;
    config->rope_factor = 1.0f;
    config->rope_attention_factor = 1.0f;
    config->rope_theta = take_number(keys, "rope.freq_base", 1.0, 1e12, 10000.0);
    if (take_int(keys, "rope.dimension_count", 1, CLAAS_HEAD_DIM_MAX, config->head_dim) !=
            config->head_dim &&
        !keys->error)
        keys->error = claas_fail(CLAAS_ERR_UNSUPPORTED, "RoPE over a part of the head");
    full_key(keys, "rope.scaling.type", full);
    if (keys->error || (keys->error = claas_gguf_get_text(keys->gguf, full, &kind)) < 0)
        return;
    keys->error = 0;
    if (claas_span_equal(kind, "none"))
        return;
    config->rope_factor = take_number(keys, "rope.scaling.factor", 1e-3, 1e4, 1.0);
    if (claas_span_equal(kind, "linear")) {
        config->rope_kind = CLAAS_ROPE_LINEAR;
    } else if (claas_span_equal(kind, "yarn")) {
        config->rope_kind = CLAAS_ROPE_YARN;
        config->rope_beta_fast = take_number(keys, "rope.scaling.yarn_beta_fast", 1e-3, 1e6, 32.0);
        config->rope_beta_slow = take_number(keys, "rope.scaling.yarn_beta_slow", 1e-3, 1e6, 1.0);
        config->rope_original_context = (int)take_int(keys, "rope.scaling.original_context_length",
                                                      1, CLAAS_CONTEXT_MAX, config->context);
        /* ggml multiplies the paper's temperature by attn_factor. */
        config->rope_attention_factor =
            take_number(keys, "rope.scaling.attn_factor", 1e-3, 1e3, 1.0) *
            (1.0f + 0.1f * logf(config->rope_factor));
    } else if (!keys->error) {
        keys->error = claas_fail(CLAAS_ERR_UNSUPPORTED, "RoPE scaling of kind '%.*s'",
                                 (int)(kind.length < 64 ? kind.length : 64), kind.text);
    }
}

static int read_config(const struct claas_gguf *gguf, struct claas_model_config *config)
{
    struct keys keys = {.gguf = gguf};
    int rc = read_arch(&keys, config);

    if (rc < 0)
        return rc;
    config->hidden = (int)take_int(&keys, "embedding_length", 1, CLAAS_HIDDEN_MAX, 0);
    config->intermediate = (int)take_int(&keys, "feed_forward_length", 1, 8 * CLAAS_HIDDEN_MAX, 0);
    config->layers = (int)take_int(&keys, "block_count", 1, CLAAS_LAYERS_MAX, 0);
    config->heads = (int)take_int(&keys, "attention.head_count", 1, CLAAS_HEADS_MAX, 0);
    if (keys.error)
        return keys.error;
    config->kv_heads =
        (int)take_int(&keys, "attention.head_count_kv", 1, CLAAS_HEADS_MAX, config->heads);
    config->head_dim = (int)take_int(&keys, "attention.key_length", 1, CLAAS_HEAD_DIM_MAX,
                                     config->hidden / config->heads);
    if (take_int(&keys, "attention.value_length", 1, CLAAS_HEAD_DIM_MAX, config->head_dim) !=
            config->head_dim &&
        !keys.error)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "keys and values of different lengths");
    config->context = (int)take_int(&keys, "context_length", 1, CLAAS_CONTEXT_MAX, 0);
    config->norm_eps = take_number(&keys, "attention.layer_norm_rms_epsilon", 1e-12, 0.1, 0.0);
    if (take_int(&keys, "expert_count", 0, INT32_MAX, 0) > 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "a mixture of experts");
    read_rope(&keys, config);
    config->qkv_bias = config->family == CLAAS_FAMILY_QWEN2;
    config->qk_norm = config->family == CLAAS_FAMILY_QWEN3;
    const struct claas_gguf_tensor *embedding = claas_gguf_find(gguf, "token_embd.weight");
    if (keys.error)
        return keys.error;
    if (!embedding || embedding->dims != 2 || embedding->shape[1] > CLAAS_VOCAB_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "no embedding of a possible shape");
    config->vocab = (int)embedding->shape[1];
    config->tied = !claas_gguf_find(gguf, "output.weight");
    return 0;
}

/* What Llama 3's scaling divides frequency i by: 1 for short waves, factor for long ones, blended
 * between. */
static double llama3_divisor(const struct claas_model_config *config, int i)
{
    double inverse = pow((double)config->rope_theta, -2.0 * i / config->head_dim);
    double wave = 2.0 * M_PI / inverse, original = config->rope_original_context;
    double low = config->rope_low_freq_factor, high = config->rope_high_freq_factor;

    if (wave < original / high)
        return 1.0;
    if (wave > original / low)
        return config->rope_factor;
    double blend = (original / wave - low) / (high - low);
    return 1.0 / ((1.0 - blend) / config->rope_factor + blend);
}

/* GGUF keeps Llama 3's scaling as a tensor of divisors instead of its parameters. All published
 * models have low 1, high 4, original context 8192; the factor is the largest divisor. Whether that
 * is right is checked on every entry. */
static int read_rope_freqs(const struct claas_gguf *gguf, struct claas_model_config *config)
{
    const struct claas_gguf_tensor *tensor = claas_gguf_find(gguf, "rope_freqs.weight");
    float largest = 1.0f, value;

    if (!tensor)
        return 0;
    if (tensor->type != CLAAS_TYPE_F32 || tensor->dims != 1 ||
        tensor->shape[0] != config->head_dim / 2)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "tensor 'rope_freqs.weight' has not half a head's size");
    for (int i = 0; i < config->head_dim / 2; i++) {
        memcpy(&value, tensor->data + 4 * i, sizeof(value));
        largest = value > largest ? value : largest;
    }
    config->rope_kind = CLAAS_ROPE_LLAMA3;
    config->rope_factor = largest;
    config->rope_low_freq_factor = 1.0f;
    config->rope_high_freq_factor = 4.0f;
    config->rope_original_context = 8192;
    for (int i = 0; i < config->head_dim / 2; i++) {
        memcpy(&value, tensor->data + 4 * i, sizeof(value));
        double wanted = llama3_divisor(config, i);
        if (!(fabs((double)value - wanted) <= 1e-3 * wanted))
            return claas_fail(CLAAS_ERR_UNSUPPORTED,
                              "'rope_freqs.weight' is not Llama 3's scaling (entry %d is %g)", i,
                              (double)value);
    }
    return 0;
}

struct tensor_source {
    const struct claas_gguf *gguf;
    const struct claas_model_config *config;
};

static int find_tensor(void *source, const struct claas_tensor_spec *spec,
                       struct claas_tensor *tensor)
{
    const struct tensor_source *from = source;
    const struct claas_gguf_tensor *found = claas_gguf_find(from->gguf, spec->gguf_name);

    if (!found)
        return CLAAS_ERR_NOT_FOUND;
    if (found->dims > 2 || found->shape[0] > INT32_MAX ||
        (found->dims == 2 && found->shape[1] > INT32_MAX))
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is not a matrix", spec->gguf_name);
    tensor->type = found->type;
    tensor->columns = (int)found->shape[0];
    tensor->rows = found->dims == 2 ? (int)found->shape[1] : 1;
    tensor->data = found->data;
    tensor->bytes = found->bytes;
    if (spec->rotated && from->config->family == CLAAS_FAMILY_LLAMA)
        tensor->permuted_head_rows = from->config->head_dim;
    return 0;
}

static int check_extra_tensors(const struct claas_gguf *gguf,
                               const struct claas_model_config *config)
{
    for (size_t i = 0; i < gguf->tensor_count; i++) {
        char name[128];

        snprintf(name, sizeof(name), "%.*s", (int)gguf->tensors[i].name.length,
                 gguf->tensors[i].name.text);
        if (strcmp(name, "rope_freqs.weight") != 0 && !claas_model_spec_find(config, name, true))
            return claas_fail(CLAAS_ERR_UNSUPPORTED,
                              "tensor '%s' has no place in a model of this architecture", name);
    }
    return 0;
}

static int load_template(struct claas_model *model, const struct claas_gguf *gguf,
                         const char *override)
{
    struct claas_span span = {NULL, 0};
    CLAAS_AUTO_FREE char *text = NULL;
    int rc = claas_gguf_get_text(gguf, "tokenizer.chat_template", &span);

    if (rc < 0)
        return rc;
    if (span.length > TEMPLATE_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "a chat template of %zu bytes", span.length);
    if (rc > 0 && !(text = claas_strndup(span.text, span.length)))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_chat_template_new(text, override, &model->chat_template);
}

static int load_stops(struct claas_model *model, const struct claas_gguf *gguf)
{
    static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};

    for (size_t i = 0; i < CLAAS_COUNT(keys); i++) {
        int64_t token = -1;
        int rc = claas_gguf_get_int(gguf, keys[i], -1, UINT32_MAX, &token);
        if (rc < 0)
            return rc;
        claas_model_add_stop(model, token);
    }
    return 0;
}

int claas_gguf_load(struct claas_model *model, const uint8_t *data, size_t length,
                    const char *chat_template, char **ret_name)
{
    CLAAS_AUTO(claas_gguf_free) struct claas_gguf *gguf = NULL;
    struct claas_span name = {NULL, 0};
    int rc = claas_gguf_parse(data, length, &gguf);

    if (rc < 0)
        return rc;
    rc = read_config(gguf, &model->config);
    if (rc >= 0)
        rc = read_rope_freqs(gguf, &model->config);
    if (rc >= 0)
        rc = claas_model_config_check(&model->config);
    if (rc >= 0)
        rc = check_extra_tensors(gguf, &model->config);
    struct tensor_source source = {gguf, &model->config};
    if (rc >= 0)
        rc = claas_model_bind(model, find_tensor, &source);
    if (rc >= 0)
        rc = claas_gguf_load_tokenizer(model, gguf);
    if (rc >= 0)
        rc = load_template(model, gguf, chat_template);
    if (rc >= 0)
        rc = load_stops(model, gguf);
    if (rc >= 0)
        rc = claas_gguf_get_text(gguf, "general.name", &name);
    if (rc > 0 && !(*ret_name = claas_strndup(name.text, name.length)))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return rc < 0 ? rc : 0;
}
