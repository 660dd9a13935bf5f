/* Progress of loading a model: see loading.h. */
#include "pack/loading.h"

void claas_loading_begin(struct claas_loading *loading, const struct claas_backend_options *options,
                         const claas_model_t *model)
{
    *loading = (struct claas_loading){.total = claas_model_weight_bytes(model)};
    if (loading->total == 0 || !options->loading)
        return;
    loading->fn = options->loading;
    loading->arg = options->loading_arg;
    loading->fn(loading->arg, 0, loading->total);
}

void claas_loading_add(struct claas_loading *loading, const struct claas_tensor *tensor, int rows)
{
    if (!loading || !loading->fn || !tensor->data)
        return;
    loading->done += tensor->bytes / (size_t)tensor->rows * (size_t)rows;
    loading->fn(loading->arg, loading->done, loading->total);
}
