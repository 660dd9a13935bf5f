/* The tables of messages and settings as documents: docs/protocol.md, docs/configuration.md and the
 * sample file are made from what the program itself reads, so they cannot disagree with it. */
#include "claas/config.h"
#include "claas/err.h"
#include "claas/message.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* --- messages --------------------------------------------------------------------------------- */

/* A cell of a Markdown table: the bar would end it. */
static void print_cell(FILE *file, const char *text)
{
    for (; *text; text++) {
        if (*text == '|')
            fputc('\\', file);
        fputc(*text, file);
    }
}

static void print_range(FILE *file, const struct claas_field *field)
{
    switch (field->type) {
    case CLAAS_FIELD_STRING:
        fprintf(file, "%.0f–%.0f bytes", field->min, field->max);
        break;
    case CLAAS_FIELD_ARRAY:
        fprintf(file, "%.0f–%.0f elements", field->min, field->max);
        break;
    case CLAAS_FIELD_INT:
    case CLAAS_FIELD_NUMBER:
        fprintf(file, "%s–%s", claas_number(field->min).text, claas_number(field->max).text);
        break;
    default:
        break;
    }
}

static void print_fields(FILE *file, const struct claas_message_info *info)
{
    static const char *const parts[] = {"request", "progress", "reply"};
    static const char *const types[] = {"",     "string", "int",    "number",
                                        "bool", "array",  "object", "any"};

    if (info->fields[0].type == CLAAS_FIELD_NONE) {
        fprintf(file, "Request and reply are empty objects.\n\n");
        return;
    }
    fprintf(file, "| part | field | type | needed | range | meaning |\n"
                  "| --- | --- | --- | --- | --- | --- |\n");
    for (const struct claas_field *field = info->fields; field->type != CLAAS_FIELD_NONE; field++) {
        fprintf(file, "| %s | `%s` | %s | %s | ", parts[field->part], field->name,
                types[field->type], field->required ? "yes" : "");
        print_range(file, field);
        fprintf(file, " | ");
        print_cell(file, field->doc);
        fprintf(file, " |\n");
    }
    fprintf(file, "\n");
}

void claas_catalogue_print_markdown(FILE *file)
{
    const struct claas_message_info *info;

    for (size_t i = 0; (info = claas_message_info_at(i)) != NULL; i++) {
        fprintf(file, "### `%s` (0x%04X)\n\n", info->name, (unsigned)info->type);
        if (info->doc[0])
            fprintf(file, "%s\n\n", info->doc);
        fprintf(file, "Receiver: %s. Sent by: %s. Largest body: %zu bytes.\n\n",
                strcmp(info->receiver, "*") == 0 ? "any actor" : info->receiver,
                info->role == CLAAS_ROLE_CLIENT ? "clients and actors" : "actors", info->max_body);
        print_fields(file, info);
    }
}

/* --- settings --------------------------------------------------------------------------------- */

static bool has_range(const struct claas_setting *setting)
{
    return setting->words[0] ||
           (strcmp(setting->type, "STRING") != 0 && strcmp(setting->type, "BOOL") != 0 &&
            strcmp(setting->type, "LIST") != 0);
}

/* A bound in the setting's own unit, exact. */
static void write_bound(const struct claas_setting *setting, double value, char *text, size_t size)
{
    static const struct {
        const char *type, *name;
        double factor;
    } units[] = {{"SIZE", "GiB", 1073741824.0}, {"SIZE", "MiB", 1048576.0},
                 {"SIZE", "KiB", 1024.0},       {"DURATION", "d", 86400000},
                 {"DURATION", "h", 3600000},    {"DURATION", "m", 60000},
                 {"DURATION", "s", 1000},       {"DURATION", "ms", 1}};

    for (size_t i = 0; i < sizeof(units) / sizeof(units[0]) && value > 0; i++)
        if (strcmp(setting->type, units[i].type) == 0 && fmod(value, units[i].factor) == 0) {
            snprintf(text, size, "%s%s", claas_number(value / units[i].factor).text, units[i].name);
            return;
        }
    snprintf(text, size, "%s", claas_number(value).text);
}

static void print_setting_range(FILE *file, const struct claas_setting *setting)
{
    char min[48], max[48];

    if (setting->words[0]) {
        fputs(setting->words, file);
        return;
    }
    write_bound(setting, setting->min, min, sizeof(min));
    write_bound(setting, setting->max, max, sizeof(max));
    fprintf(file, "%s to %s", min, max);
}

static void print_variable(FILE *file, const char *key)
{
    fprintf(file, "CLAAS_");
    for (; *key; key++)
        fputc(*key == '.' ? '_' : *key >= 'a' && *key <= 'z' ? *key - 'a' + 'A' : *key, file);
}

void claas_config_print_markdown(FILE *file)
{
    const struct claas_setting *setting;

    fprintf(file, "| setting | type | default | range | environment | meaning |\n"
                  "| --- | --- | --- | --- | --- | --- |\n");
    for (size_t i = 0; (setting = claas_config_setting_at(i)) != NULL; i++) {
        fprintf(file, "| `%s` | ", setting->key);
        for (const char *at = setting->type; *at; at++)
            fputc(*at - 'A' + 'a', file);
        fprintf(file, " | %s%s%s | ", setting->default_text[0] ? "`" : "", setting->default_text,
                setting->default_text[0] ? "`" : "");
        if (has_range(setting))
            print_setting_range(file, setting);
        fprintf(file, " | `");
        print_variable(file, setting->key);
        fprintf(file, "` | ");
        print_cell(file, setting->help);
        fprintf(file, " |\n");
    }
}

/* A default as YAML: quoted where a plain scalar would be empty or end at a special character. */
static void print_yaml(FILE *file, const char *text)
{
    bool is_plain = text[0] && !strpbrk(text, ":#{}[],&*!|>'\"%@`");

    if (is_plain)
        fprintf(file, "%s", text);
    else
        fprintf(file, "\"%s\"", text);
}

void claas_config_print_sample(FILE *file)
{
    const struct claas_setting *setting;
    char section[64] = "";

    fprintf(file, "# Every setting with its built-in value. Later wins: built-in, this file, the\n"
                  "# environment (CLAAS_HTTP_MAX_BODY for http.max_body), --set key=value.\n"
                  "# Sizes: 64MiB, 1GiB. Durations: 50ms, 30s, 5m, 12h, 30d.\n");
    for (size_t i = 0; (setting = claas_config_setting_at(i)) != NULL; i++) {
        const char *dot = strchr(setting->key, '.');
        int length = dot ? (int)(dot - setting->key) : 0;

        if ((size_t)length != strlen(section) ||
            strncmp(section, setting->key, (size_t)length) != 0) {
            snprintf(section, sizeof(section), "%.*s", length, setting->key);
            fprintf(file, "\n%s:\n", section);
        }
        fprintf(file, "%s# %s", dot ? "  " : "", setting->help);
        if (has_range(setting)) {
            fprintf(file, " (");
            print_setting_range(file, setting);
            fprintf(file, ")");
        }
        fprintf(file, "\n%s%s: ", dot ? "  " : "", dot ? dot + 1 : setting->key);
        print_yaml(file, setting->default_text);
        fprintf(file, "\n");
    }
}
