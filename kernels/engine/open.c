/* The table of devices: the one place that knows back-ends by name. */
#include "engine/engine.h"

#include <string.h>

#include "claas/log.h"

#ifdef CLAAS_CUDA
#include "cuda/cuda_backend.h"
static const struct claas_backend_ops *const cuda_backend = &claas_backend_cuda;
#else
static const struct claas_backend_ops *const cuda_backend = NULL;
#endif

static int fail_without_cuda(void)
{
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "this program was built without CUDA");
}

/* Whoever insists on a card is told what to do without one. */
static int advise(int rc)
{
    if (rc != CLAAS_ERR_UNSUPPORTED)
        return rc;
    return claas_fail(rc,
                      "device cuda: %s; cpu does without (what cuda needs: README, \"On a GPU\")",
                      claas_error_text());
}

int claas_device_cards(struct claas_cards *ret)
{
    *ret = (struct claas_cards){0};
#ifdef CLAAS_CUDA
    return claas_cuda_cards(ret);
#else
    return fail_without_cuda();
#endif
}

static int open_cuda(const struct claas_device_options *options, claas_model_t *model,
                     claas_device_t **ret)
{
    if (cuda_backend == NULL)
        return fail_without_cuda();
    return claas_device_open_with(cuda_backend, NULL, options, model, ret);
}

static int open_cpu(const struct claas_device_options *options, claas_model_t *model,
                    claas_device_t **ret)
{
    return claas_device_open_with(&claas_backend_cpu, NULL, options, model, ret);
}

/* A device that is there but too small is an error, not a reason for the CPU: nobody wants to be a
 * hundred times slower without having asked for it. */
static int open_any(const struct claas_device_options *options, claas_model_t *model,
                    claas_device_t **ret)
{
    int rc = open_cuda(options, model, ret);

    if (rc != CLAAS_ERR_UNSUPPORTED)
        return rc;
    claas_info("the CPU computes: %s", claas_error_text());
    return open_cpu(options, model, ret);
}

static int fail_unknown(const char *name)
{
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "unknown device '%s' (there are: auto, cpu, cuda)",
                      claas_quote(name).text);
}

int claas_device_open(const struct claas_device_options *options, claas_model_t *model,
                      claas_device_t **ret)
{
    const char *name = options->device != NULL ? options->device : "auto";

    if (strcmp(name, "auto") == 0)
        return open_any(options, model, ret);
    if (strcmp(name, "cuda") == 0)
        return advise(open_cuda(options, model, ret));
    if (strcmp(name, "cpu") == 0)
        return open_cpu(options, model, ret);
    return fail_unknown(name);
}

static int floor_of_cuda(const struct claas_backend_options *options,
                         struct claas_device_floor *ret)
{
    if (cuda_backend == NULL)
        return fail_without_cuda();
    return cuda_backend->floor(options, ret);
}

int claas_device_floor(const struct claas_device_options *options, struct claas_device_floor *ret)
{
    const struct claas_backend_options backend = {.precision = options->precision,
                                                  .threads = options->threads};
    const char *name = options->device != NULL ? options->device : "auto";
    int rc = CLAAS_ERR_UNSUPPORTED;

    *ret = (struct claas_device_floor){0};
    if (strcmp(name, "auto") != 0 && strcmp(name, "cuda") != 0 && strcmp(name, "cpu") != 0)
        return fail_unknown(name);
    if (strcmp(name, "cpu") != 0)
        rc = floor_of_cuda(&backend, ret);
    if (rc == CLAAS_ERR_UNSUPPORTED && strcmp(name, "cuda") != 0)
        rc = claas_backend_cpu.floor(&backend, ret);
    return strcmp(name, "cuda") == 0 ? advise(rc) : rc;
}
