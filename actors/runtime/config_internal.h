/* What the files of the configuration share. */
#ifndef CLAAS_RUNTIME_CONFIG_INTERNAL_H
#define CLAAS_RUNTIME_CONFIG_INTERNAL_H

#include "claas/config.h"

#define CONFIG_FILE_MAX (1 << 20)

enum setting_type {
    SETTING_STRING,
    SETTING_INT,
    SETTING_NUMBER,
    SETTING_BOOL,
    SETTING_SIZE,
    SETTING_DURATION,
    SETTING_LIST,
    SETTING_CHOICE,
};

/* One row of config.def. */
struct setting_row {
    const char *key;
    enum setting_type type;
    const char *default_text;
    double min, max;
    const char *help;
    const char *words; /* as in struct claas_setting */
};
extern const struct setting_row setting_rows[];
extern const size_t setting_count;

struct config_value {
    char *text; /* as given */
    const char *origin;
    int64_t integer; /* INT, SIZE, DURATION, BOOL */
    double number;
    char **entries; /* LIST: NULL-terminated */
};
struct claas_config {
    struct config_value *values; /* one for each row */
};

/* The row's index, -1 for an unknown key. */
int config_find(const char *key);
/* The known key that is most like `key`, NULL if none is close. */
const char *config_closest(const char *key);
/* Parses and checks `text` as that row's type. The sentence has no key in it. */
int config_parse_value(const struct setting_row *row, const char *text, struct config_value *value);
void config_value_done(struct config_value *value);
/* Replaces a value; INVALID with a sentence that does not name the source. */
int config_set(claas_config_t *config, int row, const char *text, const char *origin);
/* Reads a YAML file into the configuration. */
int config_read_file(claas_config_t *config, const char *path);

#endif
