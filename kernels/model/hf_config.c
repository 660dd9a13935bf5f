/* config.json of a Hugging Face model -> shape.
 *
 * Read in the order that transformers 4 and 5 write: RoPE from "rope_parameters" (5; perhaps nested
 * by layer type), else from "rope_scaling" and a top-level "rope_theta" (4). What the numeric core
 * would compute wrongly (a bias it does not add, a window it does not apply, another activation) is
 * refused, never ignored. */
#include <math.h>
#include <string.h>
#include "claas/err.h"
#include "model_internal.h"

/* Reads fields; the first failure sticks, so that a run of reads is checked once. */
struct fields {
    const cJSON *json;
    int error;
};

struct family_row {
    const char *name;
    enum claas_family family;
};

static const struct family_row family_rows[] = {
    {"llama", CLAAS_FAMILY_LLAMA},
    {"qwen2", CLAAS_FAMILY_QWEN2},
    {"qwen3", CLAAS_FAMILY_QWEN3},
};

/* `fallback` below `min` means that the field must be there. */
static int take_int(struct fields *fields, const char *key, int min, int max, int fallback)
{
    int64_t value = fallback;

    if (fields->error)
        return fallback;
    int rc = claas_json_get_int(fields->json, key, min, max, &value);
    if (rc < 0)
        fields->error = claas_fail_context(CLAAS_ERR_FORMAT, "config.json: ");
    else if (rc == 0 && fallback < min)
        fields->error = claas_fail(CLAAS_ERR_FORMAT, "config.json: '%s' is missing", key);
    return (int)value;
}

static double take_number(struct fields *fields, const char *key, double min, double max,
                          double fallback)
{
    double value = fallback;

    if (fields->error)
        return fallback;
    int rc = claas_json_get_number(fields->json, key, min, max, &value);
    if (rc < 0)
        fields->error = claas_fail_context(CLAAS_ERR_FORMAT, "config.json: ");
    else if (rc == 0 && fallback < min)
        fields->error = claas_fail(CLAAS_ERR_FORMAT, "config.json: '%s' is missing", key);
    return value;
}

static bool take_bool(struct fields *fields, const char *key, bool fallback)
{
    bool value = fallback;

    if (!fields->error && claas_json_get_bool(fields->json, key, &value) < 0)
        fields->error = claas_fail_context(CLAAS_ERR_FORMAT, "config.json: ");
    return value;
}

static const char *take_text(struct fields *fields, const char *key, const char *fallback)
{
    const char *value = fallback;

    if (!fields->error && claas_json_get_string(fields->json, key, &value) < 0)
        fields->error = claas_fail_context(CLAAS_ERR_FORMAT, "config.json: ");
    return value;
}

static void refuse(struct fields *fields, bool condition, const char *what)
{
    if (!fields->error && condition)
        fields->error = claas_fail(CLAAS_ERR_UNSUPPORTED, "config.json: %s is not supported", what);
}

/* The paper's temperature for a stretch of `factor`, as transformers computes it. */
static double yarn_mscale(double factor, double weight)
{
    return factor <= 1.0 ? 1.0 : 0.1 * weight * log(factor) + 1.0;
}

static void read_yarn(struct fields *rope, struct claas_model_config *config)
{
    double mscale = take_number(rope, "mscale", 0.0, 1e3, 0.0);
    double mscale_all = take_number(rope, "mscale_all_dim", 0.0, 1e3, 0.0);
    double attention = yarn_mscale(config->rope_factor, 1.0);

    if (mscale > 0.0 && mscale_all > 0.0)
        attention =
            yarn_mscale(config->rope_factor, mscale) / yarn_mscale(config->rope_factor, mscale_all);
    config->rope_kind = CLAAS_ROPE_YARN;
    config->rope_beta_fast = (float)take_number(rope, "beta_fast", 1e-3, 1e6, 32.0);
    config->rope_beta_slow = (float)take_number(rope, "beta_slow", 1e-3, 1e6, 1.0);
    config->rope_attention_factor =
        (float)take_number(rope, "attention_factor", 1e-6, 1e3, attention);
    config->rope_original_context =
        take_int(rope, "original_max_position_embeddings", 1, CLAAS_CONTEXT_MAX, config->context);
    refuse(rope, !take_bool(rope, "truncate", true), "YaRN without truncation");
}

static void read_rope_kind(struct fields *rope, struct claas_model_config *config)
{
    const char *kind = take_text(rope, "rope_type", take_text(rope, "type", "default"));

    if (rope->error || strcmp(kind, "default") == 0)
        return;
    config->rope_factor = (float)take_number(rope, "factor", 1e-3, 1e4, 0.0);
    if (strcmp(kind, "linear") == 0) {
        config->rope_kind = CLAAS_ROPE_LINEAR;
    } else if (strcmp(kind, "llama3") == 0) {
        config->rope_kind = CLAAS_ROPE_LLAMA3;
        config->rope_low_freq_factor = (float)take_number(rope, "low_freq_factor", 1e-3, 1e6, 0.0);
        config->rope_high_freq_factor =
            (float)take_number(rope, "high_freq_factor", 1e-3, 1e6, 0.0);
        config->rope_original_context =
            take_int(rope, "original_max_position_embeddings", 1, CLAAS_CONTEXT_MAX, 0);
        refuse(rope, !(config->rope_high_freq_factor > config->rope_low_freq_factor),
               "a high_freq_factor that is not above low_freq_factor");
    } else if (strcmp(kind, "yarn") == 0) {
        read_yarn(rope, config);
    } else {
        rope->error = claas_fail(CLAAS_ERR_UNSUPPORTED,
                                 "config.json: RoPE of type '%.40s' (default, linear, llama3 and "
                                 "yarn are supported)",
                                 kind);
    }
}

static void read_rope(struct fields *fields, struct claas_model_config *config)
{
    const cJSON *object = claas_json_get(fields->json, "rope_parameters");
    double theta = take_number(fields, "rope_theta", 1.0, 1e12, 10000.0);

    config->rope_kind = CLAAS_ROPE_PLAIN;
    config->rope_factor = 1.0f;
    config->rope_attention_factor = 1.0f;
    if (object && claas_json_get(object, "full_attention"))
        object = claas_json_get(object, "full_attention");
    if (!object)
        object = claas_json_get(fields->json, "rope_scaling");
    if (!fields->error && object && !cJSON_IsObject(object))
        fields->error =
            claas_fail(CLAAS_ERR_FORMAT, "config.json: RoPE's parameters are no object");
    if (object && !fields->error) {
        struct fields rope = {object, 0};

        theta = take_number(&rope, "rope_theta", 1.0, 1e12, theta);
        refuse(&rope, take_number(&rope, "partial_rotary_factor", 0.0, 1e3, 1.0) != 1.0,
               "RoPE over a part of the head");
        read_rope_kind(&rope, config);
        fields->error = rope.error;
    }
    config->rope_theta = (float)theta;
}

/* Whether every layer attends to everything before it. */
static bool has_window(struct fields *fields, enum claas_family family)
{
    const cJSON *types = claas_json_get(fields->json, "layer_types"), *item;

    if (cJSON_IsArray(types))
        cJSON_ArrayForEach(item, types)
        {
            if (!cJSON_IsString(item) || strcmp(item->valuestring, "full_attention") != 0)
                return true;
        }
    return family != CLAAS_FAMILY_LLAMA && take_bool(fields, "use_sliding_window", false);
}

static void refuse_unsupported(struct fields *fields, enum claas_family family)
{
    const char *activation = take_text(fields, "hidden_act", "silu");

    refuse(fields, strcmp(activation, "silu") != 0 && strcmp(activation, "swish") != 0,
           "an activation other than silu");
    /* Qwen2's biases on q, k, v are part of the family; the key would add one to o. */
    refuse(fields, take_bool(fields, "attention_bias", false), "attention_bias");
    refuse(fields, take_bool(fields, "mlp_bias", false), "mlp_bias");
    refuse(fields, has_window(fields, family), "sliding-window attention");
    refuse(fields, claas_json_get(fields->json, "quantization_config") != NULL,
           "quantization_config (use the original weights or a GGUF file)");
    refuse(fields, take_number(fields, "partial_rotary_factor", 0.0, 1e3, 1.0) != 1.0,
           "RoPE over a part of the head");
}

static int read_family(struct fields *fields, enum claas_family *ret)
{
    const char *type = take_text(fields, "model_type", "");

    if (fields->error)
        return fields->error;
    for (size_t i = 0; i < sizeof(family_rows) / sizeof(family_rows[0]); i++)
        if (strcmp(type, family_rows[i].name) == 0) {
            *ret = family_rows[i].family;
            return 0;
        }
    return claas_fail(CLAAS_ERR_UNSUPPORTED,
                      "config.json: model_type '%.40s' (llama, qwen2 and qwen3 are supported)",
                      type);
}

int claas_hf_config_parse(const cJSON *json, struct claas_model_config *ret, int *ret_tied)
{
    struct fields fields = {json, 0};
    struct claas_model_config config = {0};
    bool tied = false;

    if (!cJSON_IsObject(json))
        return claas_fail(CLAAS_ERR_FORMAT, "config.json: not an object");
    int rc = read_family(&fields, &config.family);
    if (rc < 0)
        return rc;
    config.hidden = take_int(&fields, "hidden_size", 1, CLAAS_HIDDEN_MAX, 0);
    config.intermediate = take_int(&fields, "intermediate_size", 1, 8 * CLAAS_HIDDEN_MAX, 0);
    config.layers = take_int(&fields, "num_hidden_layers", 1, CLAAS_LAYERS_MAX, 0);
    config.heads = take_int(&fields, "num_attention_heads", 1, CLAAS_HEADS_MAX, 0);
    if (fields.error)
        return fields.error;
    config.kv_heads = take_int(&fields, "num_key_value_heads", 1, CLAAS_HEADS_MAX, config.heads);
    config.head_dim =
        take_int(&fields, "head_dim", 1, CLAAS_HEAD_DIM_MAX,
                 config.family == CLAAS_FAMILY_QWEN3 ? 128 : config.hidden / config.heads);
    config.vocab = take_int(&fields, "vocab_size", 1, CLAAS_VOCAB_MAX, 0);
    config.context = take_int(&fields, "max_position_embeddings", 1, CLAAS_CONTEXT_MAX, 0);
    config.norm_eps = (float)take_number(&fields, "rms_norm_eps", 1e-12, 0.1, 1e-6);
    config.qkv_bias = config.family == CLAAS_FAMILY_QWEN2;
    config.qk_norm = config.family == CLAAS_FAMILY_QWEN3;
    read_rope(&fields, &config);
    refuse_unsupported(&fields, config.family);
    *ret_tied = -1;
    if (claas_json_get(json, "tie_word_embeddings")) {
        tied = take_bool(&fields, "tie_word_embeddings", false);
        *ret_tied = tied;
    }
    if (fields.error)
        return fields.error;
    *ret = config;
    return claas_model_config_check(&config);
}
