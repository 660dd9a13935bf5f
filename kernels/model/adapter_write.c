/* Writing an adapter's directory: weights, moments, then the config, each durable before the next,
 * so that a directory with a config is whole. A failure removes what was written. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

#define NAME_BYTES (CLAAS_ADAPTER_NAME_BYTES + 16)

/* Room for the tensors of one file and their names. */
struct listing {
    struct claas_safetensor_out *tensors;
    char (*names)[NAME_BYTES];
    size_t count;
};

static void listing_done(struct listing *listing)
{
    free(listing->tensors);
    free(listing->names);
}

static int listing_init(struct listing *listing, const struct claas_model_config *model)
{
    size_t most = (size_t)model->layers * CLAAS_MODULE_COUNT * 2 * 2;

    listing->tensors = CLAAS_NEW_ARRAY(struct claas_safetensor_out, most);
    listing->names = claas_alloc(most, NAME_BYTES);
    return listing->tensors && listing->names ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* Adds every matrix of an image under `lead` + PEFT's name. */
static void add_image(struct listing *listing, const char *lead,
                      const struct claas_model_config *model, const struct claas_lora_config *lora,
                      const float *image)
{
    for (int slot = 0; slot < model->layers * CLAAS_MODULE_COUNT * 2; slot++) {
        enum claas_module module = (enum claas_module)(slot / 2 % CLAAS_MODULE_COUNT);
        int layer = slot / (2 * CLAAS_MODULE_COUNT), matrix = slot % 2;
        size_t offset = claas_lora_offset(model, lora, layer, module, matrix);
        char name[CLAAS_ADAPTER_NAME_BYTES];

        if (offset == SIZE_MAX)
            continue;
        claas_adapter_tensor_name(layer, module, matrix, name);
        snprintf(listing->names[listing->count], NAME_BYTES, "%s%s", lead, name);
        int rows = matrix == 0 ? lora->rank : claas_module_rows(model, module);
        int columns = matrix == 0 ? claas_module_columns(model, module) : lora->rank;
        listing->tensors[listing->count] = (struct claas_safetensor_out){
            .name = listing->names[listing->count],
            .dims = 2,
            .shape = {rows, columns},
            .data = image + offset,
        };
        listing->count++;
    }
}

static int write_parameters(const char *directory, const struct claas_model_config *model,
                            const struct claas_adapter_image *image)
{
    CLAAS_AUTO(listing_done) struct listing listing = {NULL, NULL, 0};
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_model.safetensors", directory);
    static const char *const metadata[] = {"format", "pt", NULL};
    int rc = path ? listing_init(&listing, model) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0)
        return rc;
    add_image(&listing, "", model, &image->lora, image->parameters);
    return claas_safetensors_write(path, listing.tensors, listing.count, metadata);
}

static int write_moments(const char *directory, const struct claas_model_config *model,
                         const struct claas_adapter_image *image)
{
    CLAAS_AUTO(listing_done) struct listing listing = {NULL, NULL, 0};
    CLAAS_AUTO_FREE char *path = claas_format("%s/optimizer.safetensors", directory);
    char step[24];
    const char *const metadata[] = {"format", "pt", "step", step, NULL};
    int rc = path ? listing_init(&listing, model) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0)
        return rc;
    snprintf(step, sizeof(step), "%lld", (long long)image->step);
    add_image(&listing, "exp_avg.", model, &image->lora, image->exp_avg);
    add_image(&listing, "exp_avg_sq.", model, &image->lora, image->exp_avg_sq);
    return claas_safetensors_write(path, listing.tensors, listing.count, metadata);
}

static int write_files(const char *directory, const struct claas_model_config *model,
                       const char *base_model_name, const struct claas_adapter_image *image)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_config.json", directory);
    int rc =
        path ? write_parameters(directory, model, image) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc >= 0 && image->exp_avg && image->exp_avg_sq)
        rc = write_moments(directory, model, image);
    if (rc >= 0)
        rc = claas_adapter_config_write(path, base_model_name, &image->lora);
    if (rc >= 0)
        rc = claas_fsync_path(directory);
    if (rc >= 0)
        rc = claas_fsync_parent(directory);
    return rc;
}

int claas_adapter_write(const char *directory, const struct claas_model_config *model,
                        const char *base_model_name, const struct claas_adapter_image *image)
{
    if (image->lora.rank < 1 || image->lora.rank > CLAAS_RANK_MAX || image->lora.modules == 0 ||
        (image->lora.modules & ~CLAAS_MODULE_ALL))
        return claas_fail(CLAAS_ERR_INVALID, "an adapter of rank %d and modules %#x",
                          image->lora.rank, image->lora.modules);
    if (mkdir(directory, 0700) < 0)
        return claas_fail_errno("cannot create '%s'", directory);
    int rc = write_files(directory, model, base_model_name, image);
    if (rc < 0) {
        /* The first failure is the one to report. */
        CLAAS_AUTO_FREE char *why = claas_strdup(claas_error_text());

        (void)claas_remove_all(directory);
        return claas_fail(rc, "%s", why ? why : directory);
    }
    return 0;
}
