/* `claas model show`: what a base model is, read as the server reads it. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "claas/adapter.h"
#include "claas/chat_template.h"
#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/model.h"
#include "claas/tokenizer.h"
#include "cli.h"
#include "model_verbs.h"
#include "verbs.h"

#define STOP_TOKENS_MAX 16
#define TYPES_MAX       32 /* of enum claas_tensor_type */

static const char *const family_names[] = {
    [CLAAS_FAMILY_LLAMA] = "llama",
    [CLAAS_FAMILY_QWEN2] = "qwen2",
    [CLAAS_FAMILY_QWEN3] = "qwen3",
};

static const char *const rope_names[] = {
    [CLAAS_ROPE_PLAIN] = "plain",
    [CLAAS_ROPE_LINEAR] = "linear",
    [CLAAS_ROPE_LLAMA3] = "llama3",
    [CLAAS_ROPE_YARN] = "yarn",
};

/* --- tensors ---------------------------------------------------------------------------------- */

/* Parts of a layer, and of the model around them; models lack some of them. */
static const char *const layer_parts[] = {
    "input_layernorm.weight",  "post_attention_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.k_proj.weight",
    "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "self_attn.q_proj.bias",   "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",   "self_attn.q_norm.weight",
    "self_attn.k_norm.weight", "mlp.gate_proj.weight",
    "mlp.up_proj.weight",      "mlp.down_proj.weight",
};
static const char *const outer_parts[] = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
};

struct totals {
    int64_t tensors, parameters, bytes;
    int64_t of_type[TYPES_MAX], bytes_of_type[TYPES_MAX]; /* tensors and bytes */
};

static void count(const claas_model_t *model, const char *name, struct totals *totals)
{
    const struct claas_tensor *tensor = claas_model_tensor(model, name);
    int64_t elements, bytes, block;

    if (!tensor)
        return;
    elements = (int64_t)tensor->rows * tensor->columns;
    block = claas_type_block_elements(tensor->type);
    bytes = block > 0 ? elements / block * claas_type_block_bytes(tensor->type) : 0;
    totals->tensors++;
    totals->parameters += elements;
    totals->bytes += bytes;
    if ((unsigned)tensor->type < TYPES_MAX) {
        totals->of_type[tensor->type]++;
        totals->bytes_of_type[tensor->type] += bytes;
    }
}

static struct totals count_all(const claas_model_t *model)
{
    struct totals totals = {0};
    char name[160];

    for (size_t i = 0; i < CLAAS_COUNT(outer_parts); i++)
        count(model, outer_parts[i], &totals);
    for (int layer = 0; layer < claas_model_config(model)->layers; layer++) {
        for (size_t i = 0; i < CLAAS_COUNT(layer_parts); i++) {
            snprintf(name, sizeof(name), "model.layers.%d.%s", layer, layer_parts[i]);
            count(model, name, &totals);
        }
    }
    return totals;
}

static cJSON *encodings(const struct totals *totals)
{
    cJSON *list = cJSON_CreateArray();

    for (int type = 0; type < TYPES_MAX; type++) {
        cJSON *entry;

        if (totals->of_type[type] == 0)
            continue;
        entry = cJSON_CreateObject();
        claas_json_set_string(entry, "type", claas_type_name((enum claas_tensor_type)type));
        claas_json_set_int(entry, "tensors", totals->of_type[type]);
        claas_json_set_int(entry, "bytes", totals->bytes_of_type[type]);
        cJSON_AddItemToArray(list, entry);
    }
    return list;
}

/* --- the rest --------------------------------------------------------------------------------- */

static cJSON *shape(const struct claas_model_config *config)
{
    cJSON *shape = cJSON_CreateObject();

    claas_json_set_int(shape, "layers", config->layers);
    claas_json_set_int(shape, "hidden", config->hidden);
    claas_json_set_int(shape, "intermediate", config->intermediate);
    claas_json_set_int(shape, "heads", config->heads);
    claas_json_set_int(shape, "kv_heads", config->kv_heads);
    claas_json_set_int(shape, "head_dim", config->head_dim);
    claas_json_set_int(shape, "vocab", config->vocab);
    claas_json_set_int(shape, "context", config->context);
    claas_json_set_bool(shape, "tied", config->tied);
    claas_json_set_bool(shape, "qkv_bias", config->qkv_bias);
    claas_json_set_bool(shape, "qk_norm", config->qk_norm);
    claas_json_set_number(shape, "norm_eps", (double)config->norm_eps);
    claas_json_set_number(shape, "rope_theta", (double)config->rope_theta);
    claas_json_set_string(shape, "rope", rope_names[config->rope_kind]);
    return shape;
}

static cJSON *stop_tokens(const claas_model_t *model)
{
    int32_t ids[STOP_TOKENS_MAX];
    size_t found = claas_model_stop_tokens(model, ids, STOP_TOKENS_MAX);
    cJSON *list = cJSON_CreateArray();

    for (size_t i = 0; i < found && i < STOP_TOKENS_MAX; i++) {
        size_t length = 0;
        const char *piece = claas_tokenizer_piece(claas_model_tokenizer(model), ids[i], &length);
        CLAAS_AUTO_FREE char *text = claas_strndup(piece ? piece : "", length);
        cJSON *entry = cJSON_CreateObject();

        claas_json_set_int(entry, "id", ids[i]);
        claas_json_set_string(entry, "text", text ? text : "");
        cJSON_AddItemToArray(list, entry);
    }
    return list;
}

static cJSON *describe(const claas_model_t *model)
{
    const struct claas_model_config *config = claas_model_config(model);
    const claas_chat_template_t *chat_template = claas_model_chat_template(model);
    const struct claas_lora_config lora = {.rank = 32, .alpha = 64, .modules = CLAAS_MODULE_ALL};
    const char *warning = claas_chat_template_warning(chat_template);
    struct totals totals = count_all(model);
    cJSON *json = cJSON_CreateObject();

    claas_json_set_string(json, "name", claas_model_name(model));
    claas_json_set_string(json, "path", claas_model_path(model));
    claas_json_set_string(json, "fingerprint", claas_model_fingerprint(model));
    claas_json_set_string(json, "family", family_names[config->family]);
    claas_json_set(json, "shape", shape(config));
    claas_json_set_int(json, "parameters", totals.parameters);
    claas_json_set_int(json, "tensors", totals.tensors);
    claas_json_set_int(json, "bytes", totals.bytes);
    claas_json_set(json, "encodings", encodings(&totals));
    claas_json_set_string(json, "chat_template", claas_chat_template_name(chat_template));
    if (warning)
        claas_json_set_string(json, "warning", warning);
    claas_json_set_int(json, "tokens",
                       (int64_t)claas_tokenizer_vocab_count(claas_model_tokenizer(model)));
    claas_json_set(json, "stop_tokens", stop_tokens(model));
    claas_json_set_int(json, "lora_parameters_r32",
                       (int64_t)claas_lora_parameter_count(config, &lora));
    return json;
}

/* --- printing --------------------------------------------------------------------------------- */

static int64_t number(const cJSON *json, const char *key)
{
    int64_t value = 0;

    claas_json_get_int(json, key, 0, INT64_MAX, &value);
    return value;
}

static const char *text(const cJSON *json, const char *key)
{
    const char *value = "";

    claas_json_get_string(json, key, &value);
    return value;
}

static void print_shape(const cJSON *json)
{
    const cJSON *shape = claas_json_get(json, "shape");
    static const struct {
        const char *key, *text;
    } flags[] = {{"tied", "tied head"}, {"qkv_bias", "q, k, v biases"}, {"qk_norm", "QK-norm"}};

    printf("shape        %" PRId64 " layers, width %" PRId64 ", MLP %" PRId64 ", %" PRId64
           " heads (%" PRId64 " for keys and values) of %" PRId64 "\n",
           number(shape, "layers"), number(shape, "hidden"), number(shape, "intermediate"),
           number(shape, "heads"), number(shape, "kv_heads"), number(shape, "head_dim"));
    printf("             vocabulary %" PRId64 ", context %" PRId64, number(shape, "vocab"),
           number(shape, "context"));
    for (size_t i = 0; i < CLAAS_COUNT(flags); i++) {
        bool set = false;

        claas_json_get_bool(shape, flags[i].key, &set);
        if (set)
            printf(", %s", flags[i].text);
    }
    printf("\n");
}

static void print_text(const cJSON *json)
{
    const cJSON *entry;

    printf("name         %s\n", text(json, "name"));
    printf("path         %s\n", text(json, "path"));
    printf("fingerprint  %s\n", text(json, "fingerprint"));
    printf("family       %s\n", text(json, "family"));
    print_shape(json);
    printf("weights      %.1f million in %" PRId64 " tensors, %.1f MB:",
           (double)number(json, "parameters") / 1e6, number(json, "tensors"),
           (double)number(json, "bytes") / 1e6);
    cJSON_ArrayForEach(entry, claas_json_get(json, "encodings"))
        printf(" %s (%" PRId64 ")", text(entry, "type"), number(entry, "tensors"));
    printf("\nadapter      %.1f million parameters at rank 32\n",
           (double)number(json, "lora_parameters_r32") / 1e6);
    printf("template     %s\n", text(json, "chat_template"));
    if (text(json, "warning")[0])
        printf("             warning: %s\n", text(json, "warning"));
    printf("stops at    ");
    cJSON_ArrayForEach(entry, claas_json_get(json, "stop_tokens"))
        printf(" %s (%" PRId64 ")", text(entry, "text"), number(entry, "id"));
    printf("\n");
}

static const struct argp_option options[] = {
    {"chat-template", 't', "NAME", 0, "template family instead of the model's own", 0},
    {0},
};

static error_t take_option(int key, char *value, struct argp_state *state, void *input)
{
    (void)state;
    if (key != 't')
        return ARGP_ERR_UNKNOWN;
    *(const char **)input = value;
    return 0;
}

static int show(const struct cli *cli, const char *template_name)
{
    struct claas_model_options model_options = {cli->positional[0], template_name};
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    CLAAS_AUTO_FREE char *line = NULL;
    int rc = claas_model_open(&model_options, &model);

    if (rc < 0)
        return claas_fail_context(rc, "%s: ", cli->positional[0]);
    json = describe(model);
    line = claas_json_print(json);
    if (!line)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (cli->json)
        puts(line);
    else
        print_text(json);
    return 0;
}

int model_show(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "PATH",
        .doc = "Shows a GGUF file or Hugging Face directory as the server reads it.",
        .options = options,
        .take = take_option,
    };
    const char *template_name = NULL;
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, &template_name);
    return show(&cli, template_name) < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}
