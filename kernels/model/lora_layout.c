/* The host image of a LoRA adapter: where each matrix lies, how large it is, what it starts with.
 *
 * One block of float32: for each layer, for each targeted module in enum order, A [r][in] then B
 * [out][r]. Weights, gradients and both moments share this layout, so that one offset serves all
 * four. */
#include "claas/adapter.h"
#include <math.h>
#include <string.h>
#include "claas/random.h"

static const char *const module_names[CLAAS_MODULE_COUNT] = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
};

const char *claas_module_name(enum claas_module module)
{
    return (unsigned)module < CLAAS_MODULE_COUNT ? module_names[module] : NULL;
}

int claas_module_from_name(const char *name)
{
    for (int i = 0; i < CLAAS_MODULE_COUNT; i++)
        if (strcmp(name, module_names[i]) == 0)
            return i;
    return -1;
}

int claas_module_rows(const struct claas_model_config *model, enum claas_module module)
{
    switch (module) {
    case CLAAS_MODULE_Q:
        return model->heads * model->head_dim;
    case CLAAS_MODULE_K:
    case CLAAS_MODULE_V:
        return model->kv_heads * model->head_dim;
    case CLAAS_MODULE_GATE:
    case CLAAS_MODULE_UP:
        return model->intermediate;
    case CLAAS_MODULE_O:
    case CLAAS_MODULE_DOWN:
        return model->hidden;
    }
    return 0;
}

int claas_module_columns(const struct claas_model_config *model, enum claas_module module)
{
    switch (module) {
    case CLAAS_MODULE_O:
        return model->heads * model->head_dim;
    case CLAAS_MODULE_DOWN:
        return model->intermediate;
    case CLAAS_MODULE_Q:
    case CLAAS_MODULE_K:
    case CLAAS_MODULE_V:
    case CLAAS_MODULE_GATE:
    case CLAAS_MODULE_UP:
        return model->hidden;
    }
    return 0;
}

/* Elements of A and B of one module. */
static size_t count_module(const struct claas_model_config *model,
                           const struct claas_lora_config *lora, enum claas_module module)
{
    size_t sides =
        (size_t)claas_module_rows(model, module) + (size_t)claas_module_columns(model, module);

    return lora->modules >> module & 1 ? sides * (size_t)lora->rank : 0;
}

static size_t count_layer(const struct claas_model_config *model,
                          const struct claas_lora_config *lora)
{
    size_t count = 0;

    for (int i = 0; i < CLAAS_MODULE_COUNT; i++)
        count += count_module(model, lora, (enum claas_module)i);
    return count;
}

size_t claas_lora_parameter_count(const struct claas_model_config *model,
                                  const struct claas_lora_config *lora)
{
    return (size_t)model->layers * count_layer(model, lora);
}

size_t claas_lora_offset(const struct claas_model_config *model,
                         const struct claas_lora_config *lora, int layer, enum claas_module module,
                         int matrix)
{
    if (layer < 0 || layer >= model->layers || (unsigned)module >= CLAAS_MODULE_COUNT ||
        !(lora->modules >> module & 1))
        return SIZE_MAX;
    size_t offset = (size_t)layer * count_layer(model, lora);
    for (int i = 0; i < (int)module; i++)
        offset += count_module(model, lora, (enum claas_module)i);
    if (matrix == 1)
        offset += (size_t)lora->rank * (size_t)claas_module_columns(model, module);
    return offset;
}

void claas_lora_init(const struct claas_model_config *model, const struct claas_lora_config *lora,
                     uint64_t seed, float *parameters)
{
    memset(parameters, 0, claas_lora_parameter_count(model, lora) * sizeof(float));
    for (int layer = 0; layer < model->layers; layer++)
        for (int i = 0; i < CLAAS_MODULE_COUNT; i++) {
            enum claas_module module = (enum claas_module)i;
            size_t offset = claas_lora_offset(model, lora, layer, module, 0);
            size_t columns = (size_t)claas_module_columns(model, module);
            /* Kaiming with a = sqrt(5): sqrt(6 / ((1 + 5) * in)). */
            float bound = 1.0f / sqrtf((float)columns);
            uint64_t stream = (uint64_t)layer * CLAAS_MODULE_COUNT + (uint64_t)i;

            if (offset == SIZE_MAX)
                continue;
            for (size_t k = 0; k < (size_t)lora->rank * columns; k++)
                parameters[offset + k] =
                    (2.0f * claas_random_uniform(seed, stream, k) - 1.0f) * bound;
        }
}
