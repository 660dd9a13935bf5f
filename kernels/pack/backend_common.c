/* What every back-end does alike: see backend_common.h. */
#include "pack/backend_common.h"

#include "claas/err.h"

#include <string.h>

int claas_backend_precision(const struct claas_backend_options *options, bool *ret_f32)
{
    const char *name = options->precision;

    *ret_f32 = name && strcmp(name, "f32") == 0;
    if (*ret_f32 || !name || strcmp(name, "bf16") == 0)
        return 0;
    return claas_fail(CLAAS_ERR_INVALID, "precision '%s' is none of bf16, f32", name);
}

void claas_backend_add_use(struct claas_backend_memory *memory, const char *what, uint64_t bytes)
{
    if (bytes > 0 && memory->use_count < CLAAS_MEMORY_USES)
        memory->uses[memory->use_count++] = (struct claas_memory_use){what, bytes};
}

int claas_backend_logits_rows(size_t floats, int least, int most, int vocab, int max_tokens)
{
    size_t fit = floats / (size_t)vocab;
    int rows = fit > (size_t)most ? most : fit < (size_t)least ? least : (int)fit;

    return rows < max_tokens ? rows : max_tokens;
}
