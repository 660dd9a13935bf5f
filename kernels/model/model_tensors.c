/* Which tensors a model has: one table of parts with both naming schemes and the shapes, and the
 * binding of a source's tensors to it. Whatever a source holds, after claas_model_bind() every
 * tensor of the config is there, with the right shape, in an encoding that can be decoded row by
 * row. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "model_internal.h"

enum part_size { SIZE_ONE, SIZE_HIDDEN, SIZE_MLP, SIZE_VOCAB, SIZE_Q, SIZE_KV, SIZE_HEAD };
enum part_when { WHEN_ALWAYS, WHEN_UNTIED, WHEN_BIAS, WHEN_QK_NORM };
enum part_kind { KIND_MATRIX, KIND_ROTATED, KIND_NORM, KIND_BIAS };

struct part {
    const char *name, *gguf_name; /* below "model.layers.N." and "blk.N." for those of a layer */
    enum part_size rows, columns;
    enum part_kind kind;
    enum part_when when;
};

static const struct part global_parts[] = {
    {"model.embed_tokens.weight", "token_embd.weight", SIZE_VOCAB, SIZE_HIDDEN, KIND_MATRIX,
     WHEN_ALWAYS},
    {"model.norm.weight", "output_norm.weight", SIZE_ONE, SIZE_HIDDEN, KIND_NORM, WHEN_ALWAYS},
    {"lm_head.weight", "output.weight", SIZE_VOCAB, SIZE_HIDDEN, KIND_MATRIX, WHEN_UNTIED},
};

static const struct part layer_parts[] = {
    {"input_layernorm.weight", "attn_norm.weight", SIZE_ONE, SIZE_HIDDEN, KIND_NORM, WHEN_ALWAYS},
    {"self_attn.q_proj.weight", "attn_q.weight", SIZE_Q, SIZE_HIDDEN, KIND_ROTATED, WHEN_ALWAYS},
    {"self_attn.k_proj.weight", "attn_k.weight", SIZE_KV, SIZE_HIDDEN, KIND_ROTATED, WHEN_ALWAYS},
    {"self_attn.v_proj.weight", "attn_v.weight", SIZE_KV, SIZE_HIDDEN, KIND_MATRIX, WHEN_ALWAYS},
    {"self_attn.o_proj.weight", "attn_output.weight", SIZE_HIDDEN, SIZE_Q, KIND_MATRIX,
     WHEN_ALWAYS},
    {"self_attn.q_proj.bias", "attn_q.bias", SIZE_ONE, SIZE_Q, KIND_BIAS, WHEN_BIAS},
    {"self_attn.k_proj.bias", "attn_k.bias", SIZE_ONE, SIZE_KV, KIND_BIAS, WHEN_BIAS},
    {"self_attn.v_proj.bias", "attn_v.bias", SIZE_ONE, SIZE_KV, KIND_BIAS, WHEN_BIAS},
    {"self_attn.q_norm.weight", "attn_q_norm.weight", SIZE_ONE, SIZE_HEAD, KIND_NORM, WHEN_QK_NORM},
    {"self_attn.k_norm.weight", "attn_k_norm.weight", SIZE_ONE, SIZE_HEAD, KIND_NORM, WHEN_QK_NORM},
    {"post_attention_layernorm.weight", "ffn_norm.weight", SIZE_ONE, SIZE_HIDDEN, KIND_NORM,
     WHEN_ALWAYS},
    {"mlp.gate_proj.weight", "ffn_gate.weight", SIZE_MLP, SIZE_HIDDEN, KIND_MATRIX, WHEN_ALWAYS},
    {"mlp.up_proj.weight", "ffn_up.weight", SIZE_MLP, SIZE_HIDDEN, KIND_MATRIX, WHEN_ALWAYS},
    {"mlp.down_proj.weight", "ffn_down.weight", SIZE_HIDDEN, SIZE_MLP, KIND_MATRIX, WHEN_ALWAYS},
};

static int size_of(const struct claas_model_config *config, enum part_size size)
{
    switch (size) {
    case SIZE_ONE:
        return 1;
    case SIZE_HIDDEN:
        return config->hidden;
    case SIZE_MLP:
        return config->intermediate;
    case SIZE_VOCAB:
        return config->vocab;
    case SIZE_Q:
        return config->heads * config->head_dim;
    case SIZE_KV:
        return config->kv_heads * config->head_dim;
    case SIZE_HEAD:
        return config->head_dim;
    }
    return 0;
}

static bool is_present(const struct claas_model_config *config, enum part_when when)
{
    switch (when) {
    case WHEN_ALWAYS:
        return true;
    case WHEN_UNTIED:
        return !config->tied;
    case WHEN_BIAS:
        return config->qkv_bias;
    case WHEN_QK_NORM:
        return config->qk_norm;
    }
    return false;
}

static size_t count_present(const struct claas_model_config *config, const struct part *parts,
                            size_t count)
{
    size_t present = 0;

    for (size_t i = 0; i < count; i++)
        present += is_present(config, parts[i].when);
    return present;
}

static size_t count_specs(const struct claas_model_config *config)
{
    return count_present(config, global_parts, CLAAS_COUNT(global_parts)) +
           (size_t)config->layers * count_present(config, layer_parts, CLAAS_COUNT(layer_parts));
}

/* The index-th of the parts that are present in the config. */
static const struct part *pick_part(const struct claas_model_config *config,
                                    const struct part *parts, size_t count, size_t index)
{
    for (size_t i = 0; i < count; i++)
        if (is_present(config, parts[i].when) && index-- == 0)
            return &parts[i];
    return NULL;
}

static void spec_at(const struct claas_model_config *config, size_t index,
                    struct claas_tensor_spec *ret)
{
    size_t globals = count_present(config, global_parts, CLAAS_COUNT(global_parts));
    size_t per_layer = count_present(config, layer_parts, CLAAS_COUNT(layer_parts));
    const struct part *part;

    memset(ret, 0, sizeof(*ret));
    if (index < globals) {
        part = pick_part(config, global_parts, CLAAS_COUNT(global_parts), index);
        snprintf(ret->name, sizeof(ret->name), "%s", part->name);
        snprintf(ret->gguf_name, sizeof(ret->gguf_name), "%s", part->gguf_name);
    } else {
        size_t layer = (index - globals) / per_layer;

        part =
            pick_part(config, layer_parts, CLAAS_COUNT(layer_parts), (index - globals) % per_layer);
        snprintf(ret->name, sizeof(ret->name), "model.layers.%zu.%s", layer, part->name);
        snprintf(ret->gguf_name, sizeof(ret->gguf_name), "blk.%zu.%s", layer, part->gguf_name);
    }
    ret->rows = size_of(config, part->rows);
    ret->columns = size_of(config, part->columns);
    ret->norm = part->kind == KIND_NORM;
    ret->rotated = part->kind == KIND_ROTATED;
    ret->is_bias = part->kind == KIND_BIAS;
}

bool claas_model_spec_find(const struct claas_model_config *config, const char *name, bool gguf)
{
    const char *prefix = gguf ? "blk." : "model.layers.";
    const struct part *parts = global_parts;
    size_t count = CLAAS_COUNT(global_parts);

    if (strncmp(name, prefix, strlen(prefix)) == 0) {
        char *end;
        unsigned long layer = strtoul(name + strlen(prefix), &end, 10);
        if (layer >= (unsigned long)config->layers || *end != '.')
            return false;
        name = end + 1;
        parts = layer_parts;
        count = CLAAS_COUNT(layer_parts);
    }
    for (size_t i = 0; i < count; i++)
        if (is_present(config, parts[i].when) &&
            strcmp(name, gguf ? parts[i].gguf_name : parts[i].name) == 0)
            return true;
    return false;
}

static int fail_range(const char *what, long value)
{
    return claas_fail(CLAAS_ERR_FORMAT, "%s of %ld is out of range", what, value);
}

int claas_model_config_check(const struct claas_model_config *config)
{
    if (config->hidden < 1 || config->hidden > CLAAS_HIDDEN_MAX)
        return fail_range("a hidden size", config->hidden);
    if (config->intermediate < 1 || config->intermediate > 8 * CLAAS_HIDDEN_MAX)
        return fail_range("an intermediate size", config->intermediate);
    if (config->layers < 1 || config->layers > CLAAS_LAYERS_MAX)
        return fail_range("a layer count", config->layers);
    if (config->heads < 1 || config->heads > CLAAS_HEADS_MAX)
        return fail_range("a head count", config->heads);
    if (config->kv_heads < 1 || config->kv_heads > config->heads ||
        config->heads % config->kv_heads != 0)
        return claas_fail(CLAAS_ERR_FORMAT, "%d heads are not a multiple of %d key/value heads",
                          config->heads, config->kv_heads);
    if (config->head_dim < 2 || config->head_dim > CLAAS_HEAD_DIM_MAX || config->head_dim % 2 != 0)
        return fail_range("a head size", config->head_dim);
    if (config->vocab < 1 || config->vocab > CLAAS_VOCAB_MAX)
        return fail_range("a vocabulary size", config->vocab);
    if (config->context < 1 || config->context > CLAAS_CONTEXT_MAX)
        return fail_range("a context length", config->context);
    if (!(config->norm_eps > 0.0f && config->norm_eps < 1.0f))
        return claas_fail(CLAAS_ERR_FORMAT, "a norm epsilon of %g", (double)config->norm_eps);
    if (!(config->rope_theta > 1.0f && config->rope_theta < 1e12f))
        return claas_fail(CLAAS_ERR_FORMAT, "a RoPE base of %g", (double)config->rope_theta);
    return 0;
}

static int compare_tensors(const void *a, const void *b)
{
    return strcmp(((const struct claas_tensor *)a)->name, ((const struct claas_tensor *)b)->name);
}

/* Checks a tensor as its source gave it against what the config asks for. */
static int check_tensor(const struct claas_tensor_spec *spec, const struct claas_tensor *tensor)
{
    int block = claas_type_block_elements(tensor->type);

    if (tensor->rows != spec->rows || tensor->columns != spec->columns)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is %d x %d, the config asks for %d x %d",
                          spec->name, tensor->rows, tensor->columns, spec->rows, spec->columns);
    if (block == 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor '%s' has an unsupported encoding",
                          spec->name);
    if (tensor->columns % block != 0)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': rows of %d are not whole blocks of %d",
                          spec->name, tensor->columns, block);
    size_t bytes = (size_t)tensor->rows * (size_t)(tensor->columns / block) *
                   (size_t)claas_type_block_bytes(tensor->type);
    if (tensor->data && tensor->bytes != bytes)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' has %zu bytes, its shape needs %zu",
                          spec->name, tensor->bytes, bytes);
    return 0;
}

int claas_model_bind(struct claas_model *model, claas_tensor_source_fn *find, void *source)
{
    size_t count = count_specs(&model->config);

    model->tensors = CLAAS_NEW_ARRAY(struct claas_tensor, count);
    if (!model->tensors)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < count; i++) {
        struct claas_tensor *tensor = &model->tensors[i];
        struct claas_tensor_spec spec;

        spec_at(&model->config, i, &spec);
        memcpy(tensor->name, spec.name, sizeof(tensor->name));
        int rc = find(source, &spec, tensor);
        if (rc == CLAAS_ERR_NOT_FOUND)
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is missing", spec.name);
        if (rc >= 0)
            rc = check_tensor(&spec, tensor);
        if (rc < 0)
            return rc;
    }
    model->tensor_count = count;
    qsort(model->tensors, count, sizeof(model->tensors[0]), compare_tensors);
    return 0;
}

const struct claas_tensor *claas_model_tensor(const claas_model_t *model, const char *name)
{
    struct claas_tensor wanted = {.rows = 0};

    if (claas_copy_text(wanted.name, sizeof(wanted.name), name) < 0)
        return NULL;
    return bsearch(&wanted, model->tensors, model->tensor_count, sizeof(model->tensors[0]),
                   compare_tensors);
}

/* To nearest even; x is finite. */
static float round_to_bf16(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

/* A nearly normal deviate without libm, so that every machine (and any other language) makes the
 * same weights: the sum of four uniform bytes has mean 510 and variance 4 * (256^2 - 1) / 12. One
 * Philox block gives four of them. Rounded to bfloat16, as the weights of real models are: then a
 * random model, too, is the same one in every precision. */
static void make_random_row(const struct claas_tensor *tensor, int row, float *out)
{
    const float unit = tensor->random_std / 147.800542f;

    for (int column = 0; column < tensor->columns; column += 4) {
        uint32_t words[4];

        claas_philox(tensor->random_seed, (uint64_t)row, (uint64_t)column / 4, words);
        for (int i = 0; i < 4 && column + i < tensor->columns; i++) {
            uint32_t word = words[i];
            int sum = (int)((word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24));

            out[column + i] = round_to_bf16((float)(sum - 510) * unit);
        }
    }
}

void claas_tensor_row(const struct claas_tensor *tensor, int row, float *out)
{
    int stored = row;

    if (!tensor->data) {
        if (tensor->random_std > 0.0f)
            make_random_row(tensor, row, out);
        for (int i = 0; i < tensor->columns && !(tensor->random_std > 0.0f); i++)
            out[i] = 1.0f;
        return;
    }
    if (tensor->permuted_head_rows > 0) {
        int head = tensor->permuted_head_rows, half = head / 2, within = row % head;

        stored = row - within + (within < half ? 2 * within : 2 * (within - half) + 1);
    }
    size_t stride = (size_t)(tensor->columns / claas_type_block_elements(tensor->type)) *
                    (size_t)claas_type_block_bytes(tensor->type);
    claas_dequantize(tensor->type, tensor->data + (size_t)stored * stride, (size_t)tensor->columns,
                     out);
}

/* Without this hint pages are read one after the other, as they are touched. It is given in small
 * steps: of a longer range Linux takes only what it reads ahead at a time, often 128 KB, and
 * forgets the rest. */
void claas_tensor_prepare(const struct claas_tensor *tensor, int first, int count)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), step = (size_t)128 << 10;
    const size_t row = tensor->bytes / (size_t)tensor->rows;
    const int last = tensor->rows - first < count ? tensor->rows : first + count;
    uintptr_t at, end;

    if (!tensor->data || first >= last)
        return;
    at = ((uintptr_t)tensor->data + (size_t)first * row) / page * page;
    end = (uintptr_t)tensor->data + (size_t)last * row;
    for (; at < end; at += step)
        (void)posix_madvise((void *)at, end - at < step ? end - at : step, POSIX_MADV_WILLNEED);
}
