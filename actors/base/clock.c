/* Two clocks: one that never jumps, for deadlines and durations, and the wall's, for people. */
#include "claas/clock.h"

#include <stdio.h>
#include <time.h>

static int64_t read_ns(clockid_t id)
{
    struct timespec now;

    clock_gettime(id, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t claas_clock_ns(void)
{
    return read_ns(CLOCK_MONOTONIC);
}

int64_t claas_clock_ms(void)
{
    return claas_clock_ns() / 1000000;
}

int64_t claas_clock_unix_ms(void)
{
    return read_ns(CLOCK_REALTIME) / 1000000;
}

void claas_clock_iso(int64_t unix_ms, char text[32])
{
    int64_t ms = unix_ms % 1000;
    time_t seconds = (time_t)(unix_ms / 1000);
    struct tm utc = {0};

    if (ms < 0) { /* before 1970: round towards the past */
        ms += 1000;
        seconds -= 1;
    }
    gmtime_r(&seconds, &utc);
    /* 24 characters for the years 0 to 9999; a wild value is cut, never written beyond the
     * array. */
    if (snprintf(text, 32, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", utc.tm_year + 1900,
                 utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec, (int)ms) < 0)
        text[0] = '\0';
}
