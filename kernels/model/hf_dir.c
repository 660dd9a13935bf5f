/* A Hugging Face model directory:
 *
 *   config.json                          shape (hf_config.c)
 *   model.safetensors                    weights, or model.safetensors.index.json naming the shards
 *   tokenizer.json                       vocabulary, merges, special tokens
 *   chat_template.jinja, else tokenizer_config.json "chat_template"
 *   generation_config.json               more end-of-sequence tokens (optional)
 *
 * Shard names in the index are plain names of the same directory: an index cannot open files
 * elsewhere. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

#define CONFIG_MAX    ((size_t)4 << 20)
#define INDEX_MAX     ((size_t)8 << 20)
#define TOKENIZER_MAX ((size_t)128 << 20)
#define TEMPLATE_MAX  ((size_t)1 << 20)
#define SHARDS_MAX    1024

static char *join(const char *directory, const char *name)
{
    return claas_format("%s/%s", directory, name);
}

/* 1 and the tree, 0 if there is no such file, or an error that names the file. */
static int read_json(const char *directory, const char *name, size_t limit, cJSON **ret)
{
    CLAAS_AUTO_FREE char *path = join(directory, name);
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length = 0;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = claas_file_read(path, limit, &text, &length);
    if (rc == CLAAS_ERR_NOT_FOUND)
        return 0;
    if (rc < 0)
        return rc;
    rc = claas_json_parse(text, length, limit, ret);
    return rc < 0 ? claas_fail_context(rc, "%s: ", path) : 1;
}

/* Which shard holds which tensor; `map` is NULL for a single file. */
struct shards {
    const cJSON *map;   /* tensor name -> file name */
    const char **names; /* of model->shards, in order */
    struct claas_model *model;
};

static int open_shard(struct claas_model *model, const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = join(directory, name);

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = claas_safetensors_open(path, &model->shards[model->shard_count]);
    if (rc >= 0)
        model->shard_count++;
    return rc;
}

static int compare_texts(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool is_plain_name(const char *name)
{
    return name[0] && name[0] != '.' && !strchr(name, '/');
}

/* The distinct file names of a weight map, sorted, into shards->names; opens each. */
static int open_mapped(struct shards *shards, const char *directory)
{
    size_t count = (size_t)cJSON_GetArraySize(shards->map), distinct = 0, i = 0;
    const cJSON *item;

    shards->names = CLAAS_NEW_ARRAY(const char *, count + 1);
    if (!shards->names)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(item, shards->map)
    {
        if (!cJSON_IsString(item) || !is_plain_name(item->valuestring))
            return claas_fail(CLAAS_ERR_FORMAT, "the weight map of '%.100s' is not a file's name",
                              item->string);
        shards->names[i++] = item->valuestring;
    }
    qsort(shards->names, count, sizeof(shards->names[0]), compare_texts);
    for (i = 0; i < count; i++)
        if (i == 0 || strcmp(shards->names[i], shards->names[distinct - 1]) != 0)
            shards->names[distinct++] = shards->names[i];
    if (distinct == 0 || distinct > SHARDS_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "%zu shards", distinct);
    shards->model->shards = CLAAS_NEW_ARRAY(claas_safetensors_t *, distinct);
    if (!shards->model->shards)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (i = 0; i < distinct; i++) {
        int rc = open_shard(shards->model, directory, shards->names[i]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int open_shards(struct shards *shards, const char *directory, cJSON **index)
{
    int rc = read_json(directory, "model.safetensors.index.json", INDEX_MAX, index);

    if (rc < 0)
        return rc;
    if (rc == 1) {
        rc = claas_json_get_object(*index, "weight_map", &shards->map);
        if (rc <= 0)
            return claas_fail(CLAAS_ERR_FORMAT,
                              "model.safetensors.index.json: no object 'weight_map'");
        rc = open_mapped(shards, directory);
        return rc < 0 ? claas_fail_context(rc, "model.safetensors.index.json: ") : 0;
    }
    shards->model->shards = CLAAS_NEW_ARRAY(claas_safetensors_t *, 1);
    if (!shards->model->shards)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return open_shard(shards->model, directory, "model.safetensors");
}

static const struct claas_safetensor *find_in_shards(const struct shards *shards, const char *name)
{
    size_t index = 0;

    if (shards->map) {
        const cJSON *file = claas_json_get(shards->map, name);
        const char *key = file ? file->valuestring : NULL;
        const char **found = key ? bsearch(&key, shards->names, shards->model->shard_count,
                                           sizeof(shards->names[0]), compare_texts)
                                 : NULL;
        if (!found)
            return NULL;
        index = (size_t)(found - shards->names);
    }
    return claas_safetensors_find(shards->model->shards[index], name);
}

static int find_tensor(void *source, const struct claas_tensor_spec *spec,
                       struct claas_tensor *tensor)
{
    const struct claas_safetensor *found = find_in_shards(source, spec->name);

    if (!found)
        return CLAAS_ERR_NOT_FOUND;
    switch (found->dtype) {
    case CLAAS_DTYPE_F32:
        tensor->type = CLAAS_TYPE_F32;
        break;
    case CLAAS_DTYPE_F16:
        tensor->type = CLAAS_TYPE_F16;
        break;
    case CLAAS_DTYPE_BF16:
        tensor->type = CLAAS_TYPE_BF16;
        break;
    case CLAAS_DTYPE_OTHER:
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor '%s' is not F32, F16 or BF16", spec->name);
    }
    int64_t rows = found->dims == 2 ? found->shape[0] : 1;
    int64_t columns = found->dims >= 1 ? found->shape[found->dims - 1] : 1;
    if (found->dims < 1 || found->dims > 2 || rows > INT32_MAX || columns > INT32_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is not a matrix", spec->name);
    tensor->rows = (int)rows;
    tensor->columns = (int)columns;
    tensor->data = found->data;
    tensor->bytes = found->bytes;
    return 0;
}

static bool ends_with(const char *text, const char *tail)
{
    size_t length = strlen(text), tail_length = strlen(tail);

    return length >= tail_length && strcmp(text + length - tail_length, tail) == 0;
}

/* A tensor that the shape does not call for would be left out of the sums. Two kinds are harmless:
 * the head of a tied model (a copy), and the frequencies that old files carry. */
static int check_extra_tensors(const struct claas_model *model)
{
    for (size_t i = 0; i < model->shard_count; i++)
        for (size_t k = 0; k < claas_safetensors_count(model->shards[i]); k++) {
            const char *name = claas_safetensors_at(model->shards[i], k)->name;

            if (!claas_model_spec_find(&model->config, name, false) &&
                strcmp(name, "lm_head.weight") != 0 && !ends_with(name, ".rotary_emb.inv_freq"))
                return claas_fail(CLAAS_ERR_UNSUPPORTED,
                                  "tensor '%.100s' has no place in a model of this type", name);
        }
    return 0;
}

static int load_weights(struct claas_model *model, const char *directory, int tied)
{
    CLAAS_AUTO(claas_json_free) cJSON *index = NULL;
    CLAAS_AUTO_FREE const char **names = NULL;
    struct shards shards = {.model = model};

    int rc = open_shards(&shards, directory, &index);
    names = shards.names;
    if (rc < 0)
        return rc;
    model->config.tied = tied >= 0 ? tied == 1 : !find_in_shards(&shards, "lm_head.weight");
    rc = claas_model_bind(model, find_tensor, &shards);
    return rc < 0 ? rc : check_extra_tensors(model);
}

static int load_tokenizer(struct claas_model *model, const char *directory)
{
    CLAAS_AUTO_FREE char *path = join(directory, "tokenizer.json");
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length = 0;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = claas_file_read(path, TOKENIZER_MAX, &text, &length);
    if (rc < 0)
        return rc;
    rc = claas_tokenizer_from_json(text, length, &model->tokenizer);
    if (rc >= 0)
        rc = claas_model_check_tokenizer(model);
    return rc < 0 ? claas_fail_context(rc, "%s: ", path) : 0;
}

/* "chat_template": a text, or a list of {name, template} of which "default" is meant. */
static const char *template_of(const cJSON *config)
{
    const cJSON *value = claas_json_get(config, "chat_template"), *item;

    if (cJSON_IsString(value))
        return value->valuestring;
    if (cJSON_IsArray(value))
        cJSON_ArrayForEach(item, value)
        {
            const char *name = "", *text = NULL;

            if (claas_json_get_string(item, "name", &name) >= 0 &&
                claas_json_get_string(item, "template", &text) == 1 && strcmp(name, "default") == 0)
                return text;
        }
    return NULL;
}

/* eos_token: a text, or an object with "content". */
static void add_stop_text(struct claas_model *model, const cJSON *config)
{
    const cJSON *value = claas_json_get(config, "eos_token");

    if (cJSON_IsObject(value))
        value = claas_json_get(value, "content");
    if (cJSON_IsString(value))
        claas_model_add_stop(model, claas_tokenizer_special(model->tokenizer, value->valuestring));
}

static int load_template(struct claas_model *model, const char *directory, const char *override)
{
    CLAAS_AUTO(claas_json_free) cJSON *config = NULL;
    CLAAS_AUTO_FREE char *path = join(directory, "chat_template.jinja");
    CLAAS_AUTO_FREE char *text = NULL;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = read_json(directory, "tokenizer_config.json", CONFIG_MAX, &config);
    if (rc < 0)
        return rc;
    if (rc == 1)
        add_stop_text(model, config);
    rc = claas_file_read(path, TEMPLATE_MAX, &text, NULL);
    if (rc < 0 && rc != CLAAS_ERR_NOT_FOUND)
        return rc;
    return claas_chat_template_new(text ? text : template_of(config), override,
                                   &model->chat_template);
}

static void add_stop_number(struct claas_model *model, const cJSON *value)
{
    if (cJSON_IsNumber(value) && value->valuedouble >= 0 && value->valuedouble < CLAAS_VOCAB_MAX)
        claas_model_add_stop(model, (int64_t)value->valuedouble);
}

/* eos_token_id of config.json or generation_config.json: a number or a list of them. */
static void add_stops(struct claas_model *model, const cJSON *config)
{
    const cJSON *value = claas_json_get(config, "eos_token_id"), *item;

    add_stop_number(model, value);
    if (cJSON_IsArray(value))
        cJSON_ArrayForEach(item, value)
        {
            add_stop_number(model, item);
        }
}

int claas_hf_load(struct claas_model *model, const char *directory, const char *chat_template,
                  char **ret_name)
{
    CLAAS_AUTO(claas_json_free) cJSON *config = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *generation = NULL;
    const char *name = NULL;
    int tied = -1;

    int rc = read_json(directory, "config.json", CONFIG_MAX, &config);
    if (rc == 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "model '%s': no config.json in this directory",
                          directory);
    if (rc >= 0)
        rc = claas_hf_config_parse(config, &model->config, &tied);
    if (rc >= 0)
        rc = read_json(directory, "generation_config.json", CONFIG_MAX, &generation);
    if (rc >= 0)
        rc = load_weights(model, directory, tied);
    if (rc >= 0)
        rc = load_tokenizer(model, directory);
    if (rc < 0)
        return claas_fail_context(rc, "model '%s': ", directory);
    add_stops(model, generation);
    add_stops(model, config);
    rc = load_template(model, directory, chat_template);
    if (rc < 0)
        return claas_fail_context(rc, "model '%s': ", directory);
    if (claas_json_get_string(config, "_name_or_path", &name) == 1 && name[0] &&
        !(*ret_name = claas_strdup(name)))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return 0;
}
