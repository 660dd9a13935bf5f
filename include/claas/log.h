/* One line per event on stderr: plain text on a terminal, a JSON object per line elsewhere.
 * Never put prompts or answers into a log line. Safe from any thread; never blocks longer than a
 * write. */
#ifndef CLAAS_LOG_H
#define CLAAS_LOG_H

#include <stdbool.h>

enum claas_log_level {
    CLAAS_LOG_DEBUG,
    CLAAS_LOG_INFO,
    CLAAS_LOG_WARNING,
    CLAAS_LOG_ERROR,
};

/* Once, before threads start. `format`: "auto", "text" or "json". */
void claas_log_setup(enum claas_log_level level, const char *format);
/* Names the calling thread in its lines ("trainer.0"); the text is copied. */
void claas_log_thread_name(const char *name);
void claas_log(enum claas_log_level level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* 0, or CLAAS_ERR_INVALID for a name that is none of debug, info, warning, error. */
int claas_log_level_parse(const char *name, enum claas_log_level *ret);

#define claas_debug(...)   claas_log(CLAAS_LOG_DEBUG, __VA_ARGS__)
#define claas_info(...)    claas_log(CLAAS_LOG_INFO, __VA_ARGS__)
#define claas_warning(...) claas_log(CLAAS_LOG_WARNING, __VA_ARGS__)
#define claas_error(...)   claas_log(CLAAS_LOG_ERROR, __VA_ARGS__)

#endif
