/* A test's way to find wrong bounds under ASan: read every row of every tensor of an opened model.
 */
#ifndef TOUCH_MODEL_H
#define TOUCH_MODEL_H

/* Reads everything that can be read, so that a wrong bound shows under ASan. */
static inline void touch_model(const claas_model_t *model)
{
    const struct claas_model_config *config = claas_model_config(model);
    size_t widest = 0;

    for (size_t i = 0; i < model->tensor_count; i++)
        if ((size_t)model->tensors[i].columns > widest)
            widest = (size_t)model->tensors[i].columns;
    float *row = claas_alloc(widest, sizeof(float));
    assert_non_null(row);
    for (size_t i = 0; i < model->tensor_count; i++)
        for (int r = 0; r < model->tensors[i].rows; r++)
            claas_tensor_row(&model->tensors[i], r, row);
    free(row);
    assert_true(config->head_dim > 0 && config->heads % config->kv_heads == 0);
}

#endif
