/* libFuzzer entry for the safetensors reader: whatever the bytes, an error or tensors that lie
 * within them. clang -fsanitize=fuzzer,address,undefined with this file and the model and base
 * libraries' sources. */
#include <stdlib.h>
#include "claas/mem.h"
#include "claas/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    CLAAS_AUTO(claas_safetensors_free) claas_safetensors_t *file = NULL;

    if (claas_safetensors_parse(data, size, &file) < 0)
        return 0;
    for (size_t i = 0; i < claas_safetensors_count(file); i++) {
        const struct claas_safetensor *tensor = claas_safetensors_at(file, i);

        if (tensor->data < data || tensor->data + tensor->bytes > data + size ||
            claas_safetensors_find(file, tensor->name) != tensor)
            abort();
    }
    return 0;
}
