/* What a person sees while a model's weights are read: a progress bar on a terminal, and a line in
 * the log when they are there. */
#ifndef CLAAS_TOOLS_LOAD_PROGRESS_H
#define CLAAS_TOOLS_LOAD_PROGRESS_H

#include "claas/device.h"

/* claas_device_open with that progress shown. Sets `loading` of the options itself. */
int load_progress_open(const struct claas_device_options *options, claas_model_t *model,
                       claas_device_t **ret);

#endif
