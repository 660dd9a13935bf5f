/* How far the reading of a model's file is, told to whoever opened the device and asked for it. */
#ifndef CLAAS_PACK_LOADING_H
#define CLAAS_PACK_LOADING_H

#include "claas/model.h"
#include "engine/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

struct claas_loading {
    claas_loading_fn *fn; /* NULL: nobody asked */
    void *arg;
    uint64_t done, total; /* bytes */
};
/* Reports 0 bytes read, unless nobody asked or the model has no file. */
void claas_loading_begin(struct claas_loading *loading, const struct claas_backend_options *options,
                         const claas_model_t *model);
/* `rows` more rows of the tensor have been read. A random model's tensors are made, not read, and
 * do not count. Does nothing for loading = NULL. */
void claas_loading_add(struct claas_loading *loading, const struct claas_tensor *tensor, int rows);

#ifdef __cplusplus
}
#endif

#endif
