/* The weights, as they are read: see load_progress.h. */
#include "load_progress.h"

#include "claas/clock.h"
#include "claas/log.h"

static void show(void *arg, uint64_t done, uint64_t total)
{
    const int large = total >= 1000000000;
    const double unit = large ? 1e9 : 1e6;
    struct load_progress *loading = arg;

    if (done == 0)
        loading->began_ns = claas_clock_ns();
    loading->bytes = done;
    loading->ended_ns = claas_clock_ns();
    progress_set(&loading->progress, (int64_t)done, (int64_t)total, "weights, %.*f of %.*f %s",
                 large, (double)done / unit, large, (double)total / unit, large ? "GB" : "MB");
}

void load_progress_begin(struct load_progress *loading, struct claas_device_options *options)
{
    *loading = (struct load_progress){0};
    progress_begin(&loading->progress);
    options->loading = show;
    options->loading_arg = loading;
}

void load_progress_end(struct load_progress *loading)
{
    double seconds = (double)(loading->ended_ns - loading->began_ns) * 1e-9;

    progress_end(&loading->progress);
    if (loading->bytes > 0 && seconds > 0)
        claas_info("weights: %.2f GB read in %.1f s, %.2f GB/s", (double)loading->bytes * 1e-9,
                   seconds, (double)loading->bytes * 1e-9 / seconds);
}
