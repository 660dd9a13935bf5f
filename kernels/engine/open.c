/* The table of devices: the one place that knows back-ends by name. */
#include "engine/engine.h"

#include <string.h>

int claas_device_open(const struct claas_device_options *options, claas_model_t *model,
                      claas_device_t **ret)
{
    const char *name = options->device != NULL ? options->device : "cpu";

    if (strcmp(name, claas_backend_cpu.name) == 0)
        return claas_device_open_with(&claas_backend_cpu, NULL, options, model, ret);
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "unknown device '%s' (there is: cpu)", name);
}
