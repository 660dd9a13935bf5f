/* Reading an adapter's directory.
 *
 * Files are read, not mapped: an imported file that shrinks under a mapping would kill the process.
 * Every matrix of every layer of the targeted modules must be there, shaped for the model, and
 * finite; nothing else may be. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

#define CONFIG_MAX    ((size_t)1 << 20)
#define PREFIX        "base_model.model."
#define PREFIX_LENGTH 17

void claas_adapter_tensor_name(int layer, enum claas_module module, int matrix,
                               char name[CLAAS_ADAPTER_NAME_BYTES])
{
    snprintf(name, CLAAS_ADAPTER_NAME_BYTES, PREFIX "model.layers.%d.%s.%s.lora_%c.weight", layer,
             module <= CLAAS_MODULE_O ? "self_attn" : "mlp", claas_module_name(module),
             matrix == 0 ? 'A' : 'B');
}

static float *take_array(const struct claas_adapter_memory *memory, size_t count)
{
    if (!memory)
        return CLAAS_NEW_ARRAY(float, count);
    return memory->take(memory->arg, count * sizeof(float));
}

static void give_array(const struct claas_adapter_memory *memory, float *array)
{
    if (!memory)
        free(array);
    else if (array)
        memory->give(memory->arg, array);
}

void claas_adapter_image_done(struct claas_adapter_image *image)
{
    give_array(image->memory, image->parameters);
    give_array(image->memory, image->exp_avg);
    give_array(image->memory, image->exp_avg_sq);
    memset(image, 0, sizeof(*image));
}

int claas_adapter_image_new(const struct claas_model_config *model,
                            const struct claas_lora_config *lora,
                            const struct claas_adapter_memory *memory, bool moments,
                            struct claas_adapter_image *ret)
{
    size_t count = claas_lora_parameter_count(model, lora);
    struct claas_adapter_image image = {.lora = *lora, .memory = memory};

    image.parameters = take_array(memory, count);
    if (image.parameters && moments) {
        image.exp_avg = take_array(memory, count);
        image.exp_avg_sq = take_array(memory, count);
    }
    if (!image.parameters || (moments && (!image.exp_avg || !image.exp_avg_sq))) {
        claas_adapter_image_done(&image);
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory for an adapter");
    }
    *ret = image;
    return 0;
}

/* A file read into memory and parsed there. */
struct loaded {
    char *bytes;
    claas_safetensors_t *file;
};

static void loaded_done(struct loaded *loaded)
{
    claas_safetensors_free(&loaded->file);
    free(loaded->bytes);
}

static int load_file(const char *directory, const char *name, size_t data_max,
                     struct loaded *loaded)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    size_t length = 0;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc =
        claas_file_read(path, data_max + CLAAS_SAFETENSORS_HEADER_MAX, &loaded->bytes, &length);
    if (rc < 0)
        return rc;
    rc = claas_safetensors_parse((const uint8_t *)loaded->bytes, length, &loaded->file);
    return rc < 0 ? claas_fail_context(rc, "%s: ", path) : 0;
}

static int read_config(const char *directory, struct claas_lora_config *ret)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_config.json", directory);
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    size_t length = 0;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = claas_file_read(path, CONFIG_MAX, &text, &length);
    if (rc < 0)
        return rc;
    rc = claas_json_parse(text, length, CONFIG_MAX, &json);
    if (rc < 0)
        return claas_fail_context(rc, "%s: ", path);
    rc = claas_adapter_config_parse(json, ret);
    return rc < 0 ? claas_fail_context(rc, "%s/", directory) : 0; /* the error's text begins with
                                                                     the file's name */
}

/* Finds the tensor of that name, with PEFT's prefix or without; `lead` ("exp_avg.") goes in front
 * of either. */
static const struct claas_safetensor *find_tensor(const claas_safetensors_t *file, const char *lead,
                                                  const char *name)
{
    char full[CLAAS_ADAPTER_NAME_BYTES + 16];
    const struct claas_safetensor *found;

    snprintf(full, sizeof(full), "%s%s", lead, name);
    found = claas_safetensors_find(file, full);
    if (found)
        return found;
    snprintf(full, sizeof(full), "%s%s", lead, name + PREFIX_LENGTH);
    return claas_safetensors_find(file, full);
}

/* Decodes one matrix and checks that all of it is finite (and not negative, for second moments). */
static int decode_matrix(const struct claas_safetensor *tensor, const char *lead, int rows,
                         int columns, float *out)
{
    size_t count = (size_t)rows * (size_t)columns;
    float least = strcmp(lead, "exp_avg_sq.") == 0 ? 0.0f : -INFINITY;

    if (tensor->dims != 2 || tensor->shape[0] != rows || tensor->shape[1] != columns)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is not [%d, %d] as this model needs",
                          tensor->name, rows, columns);
    if (tensor->dtype == CLAAS_DTYPE_OTHER)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor '%s' is not F32, F16 or BF16",
                          tensor->name);
    claas_dequantize(tensor->dtype == CLAAS_DTYPE_F32   ? CLAAS_TYPE_F32
                     : tensor->dtype == CLAAS_DTYPE_F16 ? CLAAS_TYPE_F16
                                                        : CLAAS_TYPE_BF16,
                     tensor->data, count, out);
    for (size_t i = 0; i < count; i++)
        if (!isfinite(out[i]) || !(out[i] >= least))
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': element %zu is %g", tensor->name, i,
                              (double)out[i]);
    return 0;
}

/* Fails with the name of a tensor of the file that belongs to no module of the adapter. */
static int fail_extra(const claas_safetensors_t *file, const struct claas_model_config *model,
                      const struct claas_lora_config *lora, const char *lead)
{
    for (size_t i = 0; i < claas_safetensors_count(file); i++) {
        const struct claas_safetensor *tensor = claas_safetensors_at(file, i);
        bool known = false;

        for (int slot = 0; slot < model->layers * CLAAS_MODULE_COUNT * 2 && !known; slot++) {
            char name[CLAAS_ADAPTER_NAME_BYTES];
            enum claas_module module = (enum claas_module)(slot / 2 % CLAAS_MODULE_COUNT);

            claas_adapter_tensor_name(slot / (2 * CLAAS_MODULE_COUNT), module, slot % 2, name);
            known = (lora->modules >> module & 1) && find_tensor(file, lead, name) == tensor;
        }
        if (!known && (lead[0] == '\0' || strncmp(tensor->name, lead, strlen(lead)) == 0))
            return claas_fail(CLAAS_ERR_UNSUPPORTED,
                              "tensor '%.120s' has no place in an adapter of this model",
                              tensor->name);
    }
    return claas_fail(CLAAS_ERR_FORMAT, "the file holds a matrix twice");
}

/* Reads all matrices whose names begin with `lead` into one array of an image; *ret_count is their
 * number. */
static int read_image(const claas_safetensors_t *file, const char *lead,
                      const struct claas_model_config *model, const struct claas_lora_config *lora,
                      float *out, size_t *ret_count)
{
    *ret_count = 0;
    for (int slot = 0; slot < model->layers * CLAAS_MODULE_COUNT * 2; slot++) {
        enum claas_module module = (enum claas_module)(slot / 2 % CLAAS_MODULE_COUNT);
        int layer = slot / (2 * CLAAS_MODULE_COUNT), matrix = slot % 2;
        size_t offset = claas_lora_offset(model, lora, layer, module, matrix);
        char name[CLAAS_ADAPTER_NAME_BYTES];

        if (offset == SIZE_MAX)
            continue;
        claas_adapter_tensor_name(layer, module, matrix, name);
        const struct claas_safetensor *tensor = find_tensor(file, lead, name);
        if (!tensor)
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s%s' is missing", lead, name);
        int rows = matrix == 0 ? lora->rank : claas_module_rows(model, module);
        int columns = matrix == 0 ? claas_module_columns(model, module) : lora->rank;
        int rc = decode_matrix(tensor, lead, rows, columns, out + offset);
        if (rc < 0)
            return rc;
        ++*ret_count;
    }
    return 0;
}

/* For a pattern in the config: the modules that layer 0 has. */
static unsigned find_modules(const claas_safetensors_t *file)
{
    unsigned modules = 0;
    char name[CLAAS_ADAPTER_NAME_BYTES];

    for (int i = 0; i < CLAAS_MODULE_COUNT; i++) {
        claas_adapter_tensor_name(0, (enum claas_module)i, 0, name);
        if (find_tensor(file, "", name))
            modules |= 1u << i;
    }
    return modules;
}

static int read_parameters(const char *directory, const struct claas_model_config *model,
                           struct claas_adapter_image *image)
{
    CLAAS_AUTO(loaded_done) struct loaded loaded = {NULL, NULL};
    struct claas_lora_config widest = image->lora;
    size_t count = 0;

    if (widest.modules == 0)
        widest.modules = CLAAS_MODULE_ALL;
    int rc = load_file(directory, "adapter_model.safetensors",
                       claas_lora_parameter_count(model, &widest) * sizeof(float), &loaded);
    if (rc == CLAAS_ERR_NOT_FOUND)
        return claas_fail(rc,
                          "%s: no adapter_model.safetensors (a pickled adapter_model.bin is "
                          "not read)",
                          directory);
    if (rc < 0)
        return rc;
    if (image->lora.modules == 0)
        image->lora.modules = find_modules(loaded.file);
    if (image->lora.modules == 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "the adapter has no matrices for the linear layers of this model");
    image->parameters = take_array(image->memory, claas_lora_parameter_count(model, &image->lora));
    if (!image->parameters)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = read_image(loaded.file, "", model, &image->lora, image->parameters, &count);
    if (rc >= 0 && count != claas_safetensors_count(loaded.file))
        rc = fail_extra(loaded.file, model, &image->lora, "");
    return rc < 0 ? claas_fail_context(rc, "%s/adapter_model.safetensors: ", directory) : 0;
}

static int read_step(const claas_safetensors_t *file, int64_t *ret)
{
    const char *text = claas_safetensors_metadata(file, "step");
    int64_t step = 0;

    if (!text || !text[0])
        return claas_fail(CLAAS_ERR_FORMAT, "no 'step' in the metadata");
    for (; *text; text++)
        if (*text < '0' || *text > '9' || step > (INT64_C(1) << 52))
            return claas_fail(CLAAS_ERR_FORMAT, "'step' in the metadata is not a count");
        else
            step = step * 10 + (*text - '0');
    *ret = step;
    return 0;
}

/* optimizer.safetensors is optional: without it training starts from zero moments at step 0. */
static int read_moments(const char *directory, const struct claas_model_config *model,
                        struct claas_adapter_image *image)
{
    CLAAS_AUTO(loaded_done) struct loaded loaded = {NULL, NULL};
    size_t elements = claas_lora_parameter_count(model, &image->lora), first = 0, second = 0;

    int rc = load_file(directory, "optimizer.safetensors", 2 * elements * sizeof(float), &loaded);
    if (rc == CLAAS_ERR_NOT_FOUND)
        return 0;
    if (rc < 0)
        return rc;
    image->exp_avg = take_array(image->memory, elements);
    image->exp_avg_sq = take_array(image->memory, elements);
    if (!image->exp_avg || !image->exp_avg_sq)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = read_step(loaded.file, &image->step);
    if (rc >= 0)
        rc = read_image(loaded.file, "exp_avg.", model, &image->lora, image->exp_avg, &first);
    if (rc >= 0)
        rc =
            read_image(loaded.file, "exp_avg_sq.", model, &image->lora, image->exp_avg_sq, &second);
    if (rc >= 0 && first + second != claas_safetensors_count(loaded.file))
        rc = claas_fail(CLAAS_ERR_FORMAT, "%zu tensors, expected %zu",
                        claas_safetensors_count(loaded.file), first + second);
    return rc < 0 ? claas_fail_context(rc, "%s/optimizer.safetensors: ", directory) : 0;
}

int claas_adapter_read(const char *directory, const struct claas_model_config *model,
                       bool with_moments, struct claas_adapter_image *ret)
{
    return claas_adapter_read_into(directory, model, with_moments, NULL, ret);
}

int claas_adapter_read_into(const char *directory, const struct claas_model_config *model,
                            bool with_moments, const struct claas_adapter_memory *memory,
                            struct claas_adapter_image *ret)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {.memory = memory};

    int rc = read_config(directory, &image.lora);
    if (rc >= 0)
        rc = read_parameters(directory, model, &image);
    if (rc >= 0 && with_moments)
        rc = read_moments(directory, model, &image);
    if (rc < 0)
        return rc;
    *ret = image;
    memset(&image, 0, sizeof(image));
    return 0;
}
