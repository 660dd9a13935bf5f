/* What a person sees while a model's weights are read: a progress bar on a terminal, and a line in
 * the log when they are there. */
#ifndef CLAAS_TOOLS_LOAD_PROGRESS_H
#define CLAAS_TOOLS_LOAD_PROGRESS_H

#include "claas/device.h"
#include "progress.h"

struct load_progress {
    struct progress progress;
    int64_t began_ns, ended_ns;
    uint64_t bytes; /* of the file */
};

/* Has the opening of a device with these options report here. */
void load_progress_begin(struct load_progress *loading, struct claas_device_options *options);
/* After claas_device_open; opened: it succeeded. */
void load_progress_end(struct load_progress *loading, bool opened);

#endif
