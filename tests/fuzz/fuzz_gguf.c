/* libFuzzer entry for the GGUF reader: whatever the bytes, an error or a model of which every row
 * can be read. clang -fsanitize=fuzzer,address,undefined with this file and the model and base
 * libraries' sources. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include "claas/mem.h"
#include "../../kernels/model/model_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A hostile shape may claim more rows than a fuzzer has time for. */
#define ROWS_MAX 64

static void read_rows(const struct claas_tensor *tensor)
{
    CLAAS_AUTO_FREE float *row = CLAAS_NEW_ARRAY(float, (size_t)tensor->columns);

    for (int i = 0; row && i < ROWS_MAX && i < tensor->rows; i++)
        claas_tensor_row(tensor, tensor->rows - 1 - i, row);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = CLAAS_NEW(claas_model_t);
    CLAAS_AUTO_FREE char *name = NULL;

    if (!model || claas_gguf_load(model, data, size, NULL, &name) < 0)
        return 0;
    for (size_t i = 0; i < model->tensor_count; i++)
        read_rows(&model->tensors[i]);
    return 0;
}
