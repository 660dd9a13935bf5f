/* Settings from one table (config.def): built-in < file < environment < command line. Immutable
 * once loaded; any thread. */
#ifndef CLAAS_CONFIG_H
#define CLAAS_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef struct claas_config claas_config_t;

/* Loads the table's defaults, then `path` (YAML; may be NULL), then CLAAS_* of the environment,
 * then `overrides` ("key=value"). INVALID, FORMAT: the sentence has file, line, column and a caret
 * for what is in a file, and "did you mean" for a misspelt key. */
int claas_config_load(const char *path, const char *const *overrides, size_t count,
                      claas_config_t **ret);
void claas_config_free(claas_config_t **config);

/* An unknown key is a bug of the caller, and ends the process. `string` is for STRING and CHOICE,
 * the text is borrowed; `int` also for SIZE (bytes) and DURATION (ms). */
const char *claas_config_string(const claas_config_t *config, const char *key);
int64_t claas_config_int(const claas_config_t *config, const char *key);
double claas_config_number(const claas_config_t *config, const char *key);
bool claas_config_bool(const claas_config_t *config, const char *key);
/* The i-th entry of a LIST, NULL past the end. */
const char *claas_config_list_at(const claas_config_t *config, const char *key, size_t index);
bool claas_config_list_has(const claas_config_t *config, const char *key, const char *value);

struct claas_setting {
    const char *key, *type, *default_text, *help;
    double min, max;
    const char *words; /* "a, b, c": what a CHOICE, or an entry of a LIST, may be; "" = anything */
};
/* One row of the table, NULL past the end: for --help, the sample file and the docs. Valid until
 * the thread's next call. */
const struct claas_setting *claas_config_setting_at(size_t index);
/* Where a value came from: "default", "file", "environment", "command line"; and its text. */
const char *claas_config_origin(const claas_config_t *config, const char *key);
const char *claas_config_text(const claas_config_t *config, const char *key);
/* The table as the generated part of docs/configuration.md, and as a commented sample file. */
void claas_config_print_markdown(FILE *file);
void claas_config_print_sample(FILE *file);

#endif
