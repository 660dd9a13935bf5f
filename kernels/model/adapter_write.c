/* Writing an adapter's directory: weights and moments side by side, then, once both are durable,
 * the config, so that a directory with a config is whole. A failure removes what was written. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "model_internal.h"

#define NAME_BYTES (CLAAS_ADAPTER_NAME_BYTES + 16)

/* A write under way: where to, what, and until when it is wanted. */
struct writing {
    const char *directory;
    const struct claas_model_config *model;
    const struct claas_adapter_image *image;
    bool (*is_unwanted)(void *arg); /* or NULL */
    void *arg;
};

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

static int write_parameters(const struct writing *w)
{
    CLAAS_AUTO(listing_done) struct listing listing = {NULL, NULL, 0};
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_model.safetensors", w->directory);
    static const char *const metadata[] = {"format", "pt", NULL};
    int rc = path ? listing_init(&listing, w->model) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0)
        return rc;
    add_image(&listing, "", w->model, &w->image->lora, w->image->parameters);
    return claas_safetensors_write_unless(path, listing.tensors, listing.count, metadata,
                                          w->is_unwanted, w->arg);
}

static int write_moments(const struct writing *w)
{
    CLAAS_AUTO(listing_done) struct listing listing = {NULL, NULL, 0};
    CLAAS_AUTO_FREE char *path = claas_format("%s/optimizer.safetensors", w->directory);
    char step[24];
    const char *const metadata[] = {"format", "pt", "step", step, NULL};
    int rc = path ? listing_init(&listing, w->model) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc < 0)
        return rc;
    snprintf(step, sizeof(step), "%lld", (long long)w->image->step);
    add_image(&listing, "exp_avg.", w->model, &w->image->lora, w->image->exp_avg);
    add_image(&listing, "exp_avg_sq.", w->model, &w->image->lora, w->image->exp_avg_sq);
    return claas_safetensors_write_unless(path, listing.tensors, listing.count, metadata,
                                          w->is_unwanted, w->arg);
}

/* Writes the moments' file while the weights' is written: it is twice as large, and most of the
 * time goes into copying to the page cache. */
struct moments_thread {
    const struct writing *writing;
    pthread_t thread;
    bool started;
    int rc;
    char text[1024];
};

static void *moments_main(void *arg)
{
    struct moments_thread *own = arg;

    own->rc = write_moments(own->writing);
    if (own->rc < 0)
        claas_copy_text(own->text, sizeof(own->text), claas_error_text());
    return NULL;
}

static int write_tensors(const struct writing *w)
{
    struct moments_thread own = {.writing = w};
    int rc;

    if (!w->image->exp_avg || !w->image->exp_avg_sq)
        return write_parameters(w);
    own.started = pthread_create(&own.thread, NULL, moments_main, &own) == 0;
    rc = write_parameters(w);
    if (own.started)
        pthread_join(own.thread, NULL);
    else if (rc >= 0)
        return write_moments(w);
    if (rc >= 0 && own.rc < 0)
        return claas_fail(own.rc, "%s", own.text);
    return rc;
}

static int write_files(const struct writing *w, const char *base_model_name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_config.json", w->directory);
    int rc = path ? write_tensors(w) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc >= 0)
        rc = claas_adapter_config_write(path, base_model_name, &w->image->lora);
    if (rc >= 0)
        rc = claas_fsync_path(w->directory);
    if (rc >= 0)
        rc = claas_fsync_parent(w->directory);
    return rc;
}

int claas_adapter_write(const char *directory, const struct claas_model_config *model,
                        const char *base_model_name, const struct claas_adapter_image *image)
{
    return claas_adapter_write_unless(directory, model, base_model_name, image, NULL, NULL);
}

int claas_adapter_write_unless(const char *directory, const struct claas_model_config *model,
                               const char *base_model_name, const struct claas_adapter_image *image,
                               bool (*is_unwanted)(void *arg), void *arg)
{
    const struct writing writing = {directory, model, image, is_unwanted, arg};

    if (image->lora.rank < 1 || image->lora.rank > CLAAS_RANK_MAX || image->lora.modules == 0 ||
        (image->lora.modules & ~CLAAS_MODULE_ALL))
        return claas_fail(CLAAS_ERR_INVALID, "an adapter of rank %d and modules %#x",
                          image->lora.rank, image->lora.modules);
    if (mkdir(directory, 0700) < 0)
        return claas_fail_errno("cannot create '%s'", directory);
    int rc = write_files(&writing, base_model_name);
    if (rc < 0) {
        /* The first failure is the one to report. */
        CLAAS_AUTO_FREE char *why = claas_strdup(claas_error_text());

        (void)claas_remove_all(directory);
        return claas_fail(rc, "%s", why ? why : directory);
    }
    return 0;
}
