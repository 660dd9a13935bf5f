/* The weights, as they are read: see load_progress.h. */
#include "load_progress.h"

#include <stdio.h>

#include "claas/clock.h"
#include "claas/log.h"
#include "progress.h"

struct loading {
    struct progress progress;
    int64_t began_ns, ended_ns;
    uint64_t bytes; /* of the file */
};

/* In MB below a GB. */
static const char *in_units(double bytes, double total, char *text, size_t size)
{
    if (total < 1e9)
        snprintf(text, size, "%.0f", bytes * 1e-6);
    else
        snprintf(text, size, "%.1f", bytes * 1e-9);
    return text;
}

static const char *unit_of(uint64_t total)
{
    return total < 1000000000 ? "MB" : "GB";
}

static void show(void *arg, uint64_t done, uint64_t total)
{
    struct loading *loading = arg;
    char of_done[16], of_total[16];

    if (done == 0)
        loading->began_ns = claas_clock_ns();
    loading->bytes = done;
    loading->ended_ns = claas_clock_ns();
    progress_set(&loading->progress, (int64_t)done, (int64_t)total, "weights, %s of %s %s",
                 in_units((double)done, (double)total, of_done, sizeof(of_done)),
                 in_units((double)total, (double)total, of_total, sizeof(of_total)),
                 unit_of(total));
    if (done == total)
        progress_end(&loading->progress); /* what is opened then may have something to say */
}

int load_progress_open(const struct claas_device_options *options, claas_model_t *model,
                       claas_device_t **ret)
{
    struct claas_device_options seen = *options;
    struct loading loading = {0};
    double seconds, bytes;
    char text[16];
    int rc;

    seen.loading = show;
    seen.loading_arg = &loading;
    progress_begin(&loading.progress);
    rc = claas_device_open(&seen, model, ret);
    progress_end(&loading.progress);
    seconds = (double)(loading.ended_ns - loading.began_ns) * 1e-9;
    bytes = (double)loading.bytes;
    if (rc == 0 && bytes > 0 && seconds > 0)
        claas_info("weights: %s %s read in %.1f s, %.2f GB/s",
                   in_units(bytes, bytes, text, sizeof(text)), unit_of(loading.bytes), seconds,
                   bytes * 1e-9 / seconds);
    return rc;
}
