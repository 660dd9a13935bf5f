/* The configuration as others see it: loading in order (built-in, file, environment, command line)
 * and typed look-ups. Everything is parsed and checked when it is loaded, so that reading never
 * fails; each value remembers where it came from. */
#include "config_internal.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct setting_row setting_rows[] = {
#define X(key, type, default_text, min, max, help, ...)                                            \
    {key, SETTING_##type, default_text, min, max, help, "" __VA_ARGS__},
#include "claas/config.def"
#undef X
};
const size_t setting_count = CLAAS_COUNT(setting_rows);

static const char *const type_names[] = {"STRING", "INT",      "NUMBER", "BOOL",
                                         "SIZE",   "DURATION", "LIST",   "CHOICE"};

/* --- loading ---------------------------------------------------------------------------------- */

int config_find(const char *key)
{
    for (size_t i = 0; i < setting_count; i++)
        if (strcmp(setting_rows[i].key, key) == 0)
            return (int)i;
    return -1;
}

int config_set(claas_config_t *config, int row, const char *text, const char *origin)
{
    struct config_value value = {0};
    int rc = config_parse_value(&setting_rows[row], text, &value);

    if (rc == 0) {
        value.text = claas_strdup(text);
        value.origin = origin;
        if (!value.text)
            rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    if (rc < 0) {
        config_value_done(&value);
        return rc;
    }
    config_value_done(&config->values[row]);
    config->values[row] = value;
    return 0;
}

static int set_defaults(claas_config_t *config)
{
    for (size_t i = 0; i < setting_count; i++) {
        int rc = config_set(config, (int)i, setting_rows[i].default_text, "default");

        if (rc < 0)
            return claas_fail_context(rc, "the default of %s: ", setting_rows[i].key);
    }
    return 0;
}

/* a.b_c -> CLAAS_A_B_C */
static void write_variable(const char *key, char name[128])
{
    size_t length = (size_t)snprintf(name, 128, "CLAAS_%s", key);

    for (size_t i = 0; i < length && name[i]; i++)
        name[i] = name[i] == '.' ? '_' : (char)toupper((unsigned char)name[i]);
}

static int read_environment(claas_config_t *config)
{
    char name[128];

    for (size_t i = 0; i < setting_count; i++) {
        write_variable(setting_rows[i].key, name);
        const char *text = getenv(name);
        int rc = text ? config_set(config, (int)i, text, "environment") : 0;

        if (rc < 0)
            return claas_fail_context(rc, "%s=%s: ", name, text);
    }
    return 0;
}

static int apply_override(claas_config_t *config, const char *override)
{
    const char *equals = strchr(override, '=');
    CLAAS_AUTO_FREE char *key =
        equals ? claas_strndup(override, (size_t)(equals - override)) : NULL;

    if (!equals)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is not of the form key=value", override);
    if (!key)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int row = config_find(key);
    if (row < 0) {
        const char *closest = config_closest(key);

        if (closest)
            return claas_fail(CLAAS_ERR_INVALID, "unknown setting '%s', did you mean '%s'?", key,
                              closest);
        return claas_fail(CLAAS_ERR_INVALID, "unknown setting '%s'", key);
    }
    int rc = config_set(config, row, equals + 1, "command line");
    return rc < 0 ? claas_fail_context(rc, "%s: ", override) : 0;
}

int claas_config_load(const char *path, const char *const *overrides, size_t count,
                      claas_config_t **ret)
{
    CLAAS_AUTO(claas_config_free) claas_config_t *config = CLAAS_NEW(claas_config_t);

    if (!config || !(config->values = CLAAS_NEW_ARRAY(struct config_value, setting_count)))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = set_defaults(config);
    if (rc == 0 && path)
        rc = config_read_file(config, path);
    if (rc == 0)
        rc = read_environment(config);
    for (size_t i = 0; i < count && rc == 0; i++)
        rc = apply_override(config, overrides[i]);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(config);
    return 0;
}

void claas_config_free(claas_config_t **pointer)
{
    claas_config_t *config = *pointer;

    if (!config)
        return;
    for (size_t i = 0; config->values && i < setting_count; i++)
        config_value_done(&config->values[i]);
    free(config->values);
    free(config);
    *pointer = NULL;
}

/* --- reading ---------------------------------------------------------------------------------- */

/* An unknown key is a slip in our own code that the first test shows. */
static const struct config_value *find_value(const claas_config_t *config, const char *key)
{
    int row = config_find(key);

    if (row >= 0)
        return &config->values[row];
    fprintf(stderr, "claas: there is no setting '%s'\n", key);
    abort();
}

const char *claas_config_string(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->text;
}

int64_t claas_config_int(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->integer;
}

double claas_config_number(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->number;
}

bool claas_config_bool(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->integer != 0;
}

const char *claas_config_list_at(const claas_config_t *config, const char *key, size_t index)
{
    char **entries = find_value(config, key)->entries;

    for (size_t i = 0; entries && entries[i]; i++)
        if (i == index)
            return entries[i];
    return NULL;
}

bool claas_config_list_has(const claas_config_t *config, const char *key, const char *value)
{
    const char *entry;

    for (size_t i = 0; (entry = claas_config_list_at(config, key, i)) != NULL; i++)
        if (strcmp(entry, value) == 0)
            return true;
    return false;
}

const char *claas_config_origin(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->origin;
}

const char *claas_config_text(const claas_config_t *config, const char *key)
{
    return find_value(config, key)->text;
}

const struct claas_setting *claas_config_setting_at(size_t index)
{
    static _Thread_local struct claas_setting setting;

    if (index >= setting_count)
        return NULL;
    const struct setting_row *row = &setting_rows[index];
    setting = (struct claas_setting){.key = row->key,
                                     .type = type_names[row->type],
                                     .default_text = row->default_text,
                                     .help = row->help,
                                     .min = row->min,
                                     .max = row->max,
                                     .words = row->words};
    return &setting;
}
