/* A progress bar: see progress.h. */
#include "progress.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/clock.h"

#define BAR_CELLS 24
#define REDRAW_MS 100

void progress_begin(struct progress *progress)
{
    const char *terminal = getenv("TERM");
    const char *no_colour = getenv("NO_COLOR");

    *progress = (struct progress){.started_ms = claas_clock_ms()};
    progress->on = isatty(STDERR_FILENO) && terminal && strcmp(terminal, "dumb") != 0;
    progress->colour = !no_colour || !no_colour[0];
}

static void draw(struct progress *progress)
{
    int64_t seconds = (claas_clock_ms() - progress->started_ms) / 1000;
    int filled = progress->total > 0 ? (int)(progress->done * BAR_CELLS / progress->total) : 0;
    char bar[BAR_CELLS + 1];

    if (filled > BAR_CELLS)
        filled = BAR_CELLS;
    memset(bar, '-', BAR_CELLS);
    memset(bar, '#', (size_t)filled);
    bar[BAR_CELLS] = '\0';
    fprintf(stderr, "\r\033[K%s[%s]%s %s  %" PRId64 " s", progress->colour ? "\033[36m" : "", bar,
            progress->colour ? "\033[0m" : "", progress->text, seconds);
    fflush(stderr);
    progress->drawn_ms = claas_clock_ms();
    progress->shown = true;
}

void progress_set(struct progress *progress, int64_t done, int64_t total, const char *format, ...)
{
    va_list arguments;

    progress->done = done;
    progress->total = total;
    va_start(arguments, format);
    vsnprintf(progress->text, sizeof(progress->text), format, arguments);
    va_end(arguments);
    progress_tick(progress);
}

void progress_tick(struct progress *progress)
{
    if (progress->on && claas_clock_ms() - progress->drawn_ms >= REDRAW_MS)
        draw(progress);
}

void progress_end(struct progress *progress)
{
    if (progress->shown)
        fputs("\r\033[K", stderr);
    progress->shown = false;
}
