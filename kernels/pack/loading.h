/* How far the reading of a model's file is, for who asked a device to be told. */
#ifndef CLAAS_PACK_LOADING_H
#define CLAAS_PACK_LOADING_H

#include "claas/model.h"
#include "engine/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

struct claas_loading {
    claas_loading_fn *fn; /* NULL: nobody */
    void *arg;
    uint64_t done, total; /* bytes */
};
void claas_loading_begin(struct claas_loading *loading, const struct claas_backend_options *options,
                         const claas_model_t *model);
/* `rows` more of a tensor's have been read. Those of a random model are made, and do not count.
 * NULL: nothing. */
void claas_loading_add(struct claas_loading *loading, const struct claas_tensor *tensor, int rows);

#ifdef __cplusplus
}
#endif

#endif
