/* The weights, as they are read: see load_progress.h. */
#include "load_progress.h"

#include <stdio.h>

#include "claas/clock.h"
#include "claas/log.h"

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
    struct load_progress *loading = arg;
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

void load_progress_begin(struct load_progress *loading, struct claas_device_options *options)
{
    *loading = (struct load_progress){0};
    progress_begin(&loading->progress);
    options->loading = show;
    options->loading_arg = loading;
}

void load_progress_end(struct load_progress *loading, bool opened)
{
    double seconds = (double)(loading->ended_ns - loading->began_ns) * 1e-9;
    double bytes = (double)loading->bytes;
    char text[16];

    progress_end(&loading->progress);
    if (opened && bytes > 0 && seconds > 0)
        claas_info("weights: %s %s read in %.1f s, %.2f GB/s",
                   in_units(bytes, bytes, text, sizeof(text)), unit_of(loading->bytes), seconds,
                   bytes * 1e-9 / seconds);
}
