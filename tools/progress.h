/* A progress bar on stderr: drawn on a terminal only, at most ten times a second. */
#ifndef CLAAS_TOOLS_PROGRESS_H
#define CLAAS_TOOLS_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct progress {
    bool on; /* stderr is a terminal that can go back in a line */
    bool colour;
    int64_t started_ms, drawn_ms;
    int64_t done, total; /* total 0: not known yet */
    char text[96];       /* after the bar */
    bool shown;          /* the line holds something to be cleared */
};

void progress_begin(struct progress *progress);
/* The text is kept for progress_tick. */
void progress_set(struct progress *progress, int64_t done, int64_t total, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Draws again, for the clock in it. */
void progress_tick(struct progress *progress);
/* Clears the line. */
void progress_end(struct progress *progress);

#endif
