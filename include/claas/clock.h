/* Two clocks: one that never jumps, for the program, and the wall's, for people. Any thread. */
#ifndef CLAAS_CLOCK_H
#define CLAAS_CLOCK_H

#include <stdint.h>

/* Monotonic milliseconds and nanoseconds since an arbitrary start: for deadlines and durations. */
int64_t claas_clock_ms(void);
int64_t claas_clock_ns(void);
/* Unix time in milliseconds: for records that people read. */
int64_t claas_clock_unix_ms(void);
/* "2026-11-24T09:15:00.123Z"; `text` holds at least 25 bytes. */
void claas_clock_iso(int64_t unix_ms, char text[32]);

#endif
