/* The C side of tests/e2e/peft_roundtrip.py.
 *
 *   adapter_tool init MODEL DIRECTORY RANK ALPHA SEED   a new adapter whose A and B are both random
 *   adapter_tool copy MODEL FROM TO                     reads an adapter (with moments, if any) and
 * writes it again */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "claas/adapter.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"

static int init(const struct claas_model_config *config, char **args)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {.step = 0};
    uint64_t seed = strtoull(args[3], NULL, 10);

    image.lora.rank = (int)strtol(args[1], NULL, 10);
    image.lora.alpha = strtof(args[2], NULL);
    image.lora.modules = CLAAS_MODULE_ALL;
    size_t count = claas_lora_parameter_count(config, &image.lora);
    image.parameters = CLAAS_NEW_ARRAY(float, count);
    if (!image.parameters)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < count; i++)
        image.parameters[i] = 0.1f * claas_random_normal(seed, 0, i);
    return claas_adapter_write(args[0], config, "test", &image);
}

static int copy(const struct claas_model_config *config, char **args)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image = {.step = 0};
    int rc = claas_adapter_read(args[0], config, true, &image);

    return rc < 0 ? rc : claas_adapter_write(args[1], config, "test", &image);
}

int main(int argc, char **argv)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    bool is_init = argc == 7 && strcmp(argv[1], "init") == 0;
    bool is_copy = argc == 5 && strcmp(argv[1], "copy") == 0;
    struct claas_model_options options = {.path = argc > 2 ? argv[2] : ""};

    if (!is_init && !is_copy) {
        fprintf(stderr, "usage: adapter_tool init MODEL DIRECTORY RANK ALPHA SEED\n"
                        "       adapter_tool copy MODEL FROM TO\n");
        return 2;
    }
    int rc = claas_model_open(&options, &model);
    if (rc >= 0)
        rc = is_init ? init(claas_model_config(model), argv + 3)
                     : copy(claas_model_config(model), argv + 3);
    if (rc < 0)
        fprintf(stderr, "adapter_tool: %s\n", claas_error_text());
    return rc < 0;
}
