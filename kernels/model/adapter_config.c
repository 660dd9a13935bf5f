/* adapter_config.json, PEFT's description of an adapter.
 *
 * What is no plain LoRA would change the sums (DoRA, biases, whole modules saved, ranks by pattern,
 * a subset of the layers…) and is refused by name: an adapter must not load and answer wrongly.
 * Keys that only concern training in PEFT (dropout, initialisation, revision) are ignored. */
#include <math.h>
#include <string.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

/* Keys that must be absent, null, false, zero or empty. */
static const char *const refused_keys[] = {
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
};
/* These initialisations move a part of the base weights into the adapter, which PEFT takes back out
 * when it is told to (path_initial_model_for_weight_conversion, which also resets the key). As
 * saved such adapters fit another base. */
static const char *const refused_inits[] = {"pissa", "olora", "corda", "loftq"};

static bool is_unset(const cJSON *value)
{
    if (!value || cJSON_IsFalse(value))
        return true;
    if (cJSON_IsArray(value) || cJSON_IsObject(value))
        return value->child == NULL;
    return (cJSON_IsString(value) && value->valuestring[0] == '\0') ||
           (cJSON_IsNumber(value) && value->valuedouble == 0.0);
}

static int check_refused(const cJSON *json)
{
    const char *bias = "none", *type = "LORA";

    if (claas_json_get_string(json, "bias", &bias) < 0 ||
        claas_json_get_string(json, "peft_type", &type) < 0)
        return claas_fail_context(CLAAS_ERR_FORMAT, "adapter_config.json: ");
    if (strcmp(type, "LORA") != 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "adapter_config.json: peft_type '%.40s' (LORA is supported)", type);
    if (strcmp(bias, "none") != 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "adapter_config.json: bias '%.40s'", bias);
    for (size_t i = 0; i < CLAAS_COUNT(refused_keys); i++)
        if (!is_unset(claas_json_get(json, refused_keys[i])))
            return claas_fail(CLAAS_ERR_UNSUPPORTED, "adapter_config.json: '%s' is not supported",
                              refused_keys[i]);
    const cJSON *init = claas_json_get(json, "init_lora_weights");
    for (size_t i = 0; i < CLAAS_COUNT(refused_inits); i++)
        if (cJSON_IsString(init) &&
            strncmp(init->valuestring, refused_inits[i], strlen(refused_inits[i])) == 0)
            return claas_fail(CLAAS_ERR_UNSUPPORTED,
                              "adapter_config.json: an adapter initialised by '%.40s' fits changed "
                              "base weights only (convert it to plain LoRA)",
                              init->valuestring);
    return 0;
}

/* "q_proj" or a path that ends so. */
static int add_module(const char *name, unsigned *modules)
{
    const char *dot = strrchr(name, '.');
    int module = claas_module_from_name(dot ? dot + 1 : name);

    if (module < 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "adapter_config.json: target module '%.80s' (q_proj, k_proj, v_proj, "
                          "o_proj, gate_proj, up_proj, down_proj are supported)",
                          name);
    *modules |= 1u << module;
    return 0;
}

static int read_modules(const cJSON *json, unsigned *modules)
{
    const cJSON *value = claas_json_get(json, "target_modules"), *item;

    *modules = 0;
    if (cJSON_IsString(value)) {
        if (strcmp(value->valuestring, "all-linear") == 0)
            *modules = CLAAS_MODULE_ALL;
        return 0;
    }
    if (!cJSON_IsArray(value) || !value->child)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "adapter_config.json: 'target_modules' is not a list of names");
    cJSON_ArrayForEach(item, value)
    {
        if (!cJSON_IsString(item))
            return claas_fail(CLAAS_ERR_FORMAT,
                              "adapter_config.json: 'target_modules' holds something else than "
                              "names");
        int rc = add_module(item->valuestring, modules);
        if (rc < 0)
            return rc;
    }
    return 0;
}

int claas_adapter_config_parse(const cJSON *json, struct claas_lora_config *ret)
{
    struct claas_lora_config lora = {0};
    int64_t rank = 0;
    double alpha = 0.0;
    bool rslora = false;

    if (!cJSON_IsObject(json))
        return claas_fail(CLAAS_ERR_FORMAT, "adapter_config.json: not an object");
    int rc = check_refused(json);
    if (rc < 0)
        return rc;
    rc = claas_json_get_int(json, "r", 1, INT32_MAX, &rank);
    if (rc <= 0)
        return rc < 0 ? claas_fail_context(CLAAS_ERR_FORMAT, "adapter_config.json: ")
                      : claas_fail(CLAAS_ERR_FORMAT, "adapter_config.json: 'r' is missing");
    if (rank > CLAAS_RANK_MAX)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "adapter_config.json: rank %lld, the limit is %d",
                          (long long)rank, CLAAS_RANK_MAX);
    rc = claas_json_get_number(json, "lora_alpha", 1e-6, 1e6, &alpha);
    if (rc <= 0)
        return rc < 0
                   ? claas_fail_context(CLAAS_ERR_FORMAT, "adapter_config.json: ")
                   : claas_fail(CLAAS_ERR_FORMAT, "adapter_config.json: 'lora_alpha' is missing");
    if (claas_json_get_bool(json, "use_rslora", &rslora) < 0)
        return claas_fail_context(CLAAS_ERR_FORMAT, "adapter_config.json: ");
    rc = read_modules(json, &lora.modules);
    if (rc < 0)
        return rc;
    lora.rank = (int)rank;
    /* rslora scales by alpha / sqrt(r); with alpha * sqrt(r) our alpha / r is the same number. */
    lora.alpha = (float)(rslora ? alpha * sqrt((double)rank) : alpha);
    *ret = lora;
    return 0;
}

/* The keys that PEFT, vLLM and their resolvers read; the rest have PEFT's defaults. */
int claas_adapter_config_write(const char *path, const char *base_model_name,
                               const struct claas_lora_config *lora)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = cJSON_CreateObject();
    CLAAS_AUTO_FREE char *text = NULL;
    static const char *const nulls[] = {"modules_to_save", "layers_to_transform", "layers_pattern",
                                        "revision"};

    claas_json_set_string(json, "peft_type", "LORA");
    claas_json_set_string(json, "task_type", "CAUSAL_LM");
    if (base_model_name)
        claas_json_set_string(json, "base_model_name_or_path", base_model_name);
    else
        claas_json_set_null(json, "base_model_name_or_path");
    claas_json_set_int(json, "r", lora->rank);
    claas_json_set_number(json, "lora_alpha", (double)lora->alpha);
    claas_json_set_number(json, "lora_dropout", 0.0);
    cJSON *modules = claas_json_set(json, "target_modules", cJSON_CreateArray());
    for (int i = 0; i < CLAAS_MODULE_COUNT; i++)
        if (lora->modules >> i & 1)
            cJSON_AddItemToArray(modules,
                                 cJSON_CreateString(claas_module_name((enum claas_module)i)));
    claas_json_set_string(json, "bias", "none");
    claas_json_set_bool(json, "use_rslora", false);
    claas_json_set_bool(json, "use_dora", false);
    claas_json_set_bool(json, "fan_in_fan_out", false);
    claas_json_set_bool(json, "inference_mode", true);
    claas_json_set_bool(json, "init_lora_weights", true);
    claas_json_set(json, "rank_pattern", cJSON_CreateObject());
    claas_json_set(json, "alpha_pattern", cJSON_CreateObject());
    for (size_t i = 0; i < CLAAS_COUNT(nulls); i++)
        claas_json_set_null(json, nulls[i]);
    text = claas_json_print(json);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_file_write(path, text, strlen(text));
}
