/* The YAML file, by libfyaml: nested mappings are the parts of a key, sequences are lists.
 *
 * libfyaml's reports (file, line, column, the line itself and a caret) are collected in memory, for
 * its own errors and for ours alike, and become the sentence of the failure. No aliases are
 * resolved, so no small file can unfold into a large one. */
#include "config_internal.h"

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"

#include <libfyaml.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX     8
#define TWO_DOCUMENTS "a second document: all settings are in one"

struct reading {
    claas_config_t *config;
    const char *path;
    struct claas_buf report;
    bool seen[256]; /* rows that the file has set */
};

static void collect(struct fy_diag *diag, void *user, const char *text, size_t length)
{
    claas_buf_add(user, text, length);
}

/* A report about a place in the file becomes the failure. libfyaml writes the name that it was
 * given for the source, so the path is in it. */
static int fail_at(struct reading *reading, struct fy_node *node, const char *text)
{
    fy_node_report(node, FYET_ERROR, "%s", text);
    return CLAAS_ERR_INVALID;
}

static int end_with_report(struct reading *reading, int code)
{
    size_t length = reading->report.length;

    while (length > 0 && reading->report.data[length - 1] == '\n')
        length--;
    if (length == 0)
        return claas_fail(code, "%s: not a YAML mapping of settings", reading->path);
    return claas_fail(code, "%.*s", (int)length, reading->report.data);
}

/* --- values ----------------------------------------------------------------------------------- */

static char *scalar_text(struct fy_node *node)
{
    size_t length = 0;
    const char *text = fy_node_get_scalar(node, &length);

    if (!text)
        return claas_strdup("");
    return memchr(text, '\0', length) ? NULL : claas_strndup(text, length);
}

/* A sequence as the comma-separated text of a LIST. */
static int join_sequence(struct reading *reading, struct fy_node *node, struct claas_buf *text)
{
    void *place = NULL;
    struct fy_node *item;

    while ((item = fy_node_sequence_iterate(node, &place)) != NULL) {
        CLAAS_AUTO_FREE char *entry = fy_node_is_scalar(item) ? scalar_text(item) : NULL;

        if (!entry || strchr(entry, ','))
            return fail_at(reading, item, "an entry of a list is a plain text without commas");
        if (text->length > 0)
            claas_buf_add_text(text, ",");
        claas_buf_add_text(text, entry);
    }
    return text->error;
}

static char *value_text(struct reading *reading, struct fy_node *node, enum setting_type type)
{
    struct claas_buf text;

    if (fy_node_is_alias(node)) {
        fail_at(reading, node, "aliases are not supported");
        return NULL;
    }
    if (fy_node_is_scalar(node)) {
        char *scalar = scalar_text(node);

        if (!scalar)
            fail_at(reading, node, "a NUL byte in a value");
        return scalar;
    }
    if (type != SETTING_LIST || !fy_node_is_sequence(node)) {
        fail_at(reading, node,
                type == SETTING_LIST ? "a list is expected" : "a single value is expected");
        return NULL;
    }
    claas_buf_init(&text, CONFIG_FILE_MAX);
    if (join_sequence(reading, node, &text) < 0) {
        claas_buf_done(&text);
        return NULL;
    }
    return claas_buf_take(&text, NULL);
}

static int set_value(struct reading *reading, int row, struct fy_node *key, struct fy_node *value)
{
    if (reading->seen[row])
        return fail_at(reading, key, "this setting is there twice");
    reading->seen[row] = true;
    CLAAS_AUTO_FREE char *text =
        value ? value_text(reading, value, setting_rows[row].type) : claas_strdup("");
    if (!text)
        return CLAAS_ERR_INVALID;
    if (config_set(reading->config, row, text, "file") < 0)
        return fail_at(reading, value ? value : key, claas_error_text());
    return 0;
}

/* --- mappings --------------------------------------------------------------------------------- */

static bool is_section(const char *prefix)
{
    size_t length = strlen(prefix);

    for (size_t i = 0; i < setting_count; i++)
        if (strncmp(setting_rows[i].key, prefix, length) == 0 && setting_rows[i].key[length] == '.')
            return true;
    return false;
}

static int fail_unknown(struct reading *reading, struct fy_node *node, const char *key)
{
    const char *closest = config_closest(key);
    char text[256];

    if (closest)
        snprintf(text, sizeof(text), "unknown setting '%.80s', did you mean '%s'?", key, closest);
    else
        snprintf(text, sizeof(text), "unknown setting '%.80s'", key);
    return fail_at(reading, node, text);
}

static int read_mapping(struct reading *reading, struct fy_node *mapping, const char *prefix,
                        int depth);

static int read_pair(struct reading *reading, struct fy_node_pair *pair, const char *prefix,
                     int depth)
{
    struct fy_node *key_node = fy_node_pair_key(pair);
    struct fy_node *value = fy_node_pair_value(pair);
    CLAAS_AUTO_FREE char *name =
        key_node && fy_node_is_scalar(key_node) && !fy_node_is_alias(key_node)
            ? scalar_text(key_node)
            : NULL;

    if (!key_node)
        return fail_at(reading, value, "a value without a key");
    if (!name || !claas_utf8_valid(name, strlen(name)))
        return fail_at(reading, key_node, "a key must be plain text");
    CLAAS_AUTO_FREE char *key = claas_format("%s%s%s", prefix, prefix[0] ? "." : "", name);
    if (!key)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int row = config_find(key);
    if (row >= 0)
        return set_value(reading, row, key_node, value);
    if (!is_section(key))
        return fail_unknown(reading, key_node, key);
    if (!value || (fy_node_is_scalar(value) && !fy_node_is_alias(value) &&
                   fy_node_get_scalar_length(value) == 0))
        return 0; /* a section whose lines are all commented out */
    if (fy_node_is_alias(value) || !fy_node_is_mapping(value))
        return fail_at(reading, value, "this is a section: its settings go below it, indented");
    return read_mapping(reading, value, key, depth + 1);
}

static int read_mapping(struct reading *reading, struct fy_node *mapping, const char *prefix,
                        int depth)
{
    void *place = NULL;
    struct fy_node_pair *pair;
    int rc = 0;

    if (depth > DEPTH_MAX)
        return fail_at(reading, mapping, "nested too deeply");
    while (rc == 0 && (pair = fy_node_mapping_iterate(mapping, &place)) != NULL)
        rc = read_pair(reading, pair, prefix, depth);
    return rc;
}

/* --- the file --------------------------------------------------------------------------------- */

static int read_document(struct reading *reading, struct fy_document *document)
{
    struct fy_node *root = fy_document_root(document);

    if (!root || (fy_node_is_scalar(root) && !fy_node_is_alias(root) &&
                  fy_node_get_scalar_length(root) == 0))
        return 0; /* nothing but comments */
    if (!fy_node_is_mapping(root))
        return fail_at(reading, root, "the file must be a mapping of settings (key: value)");
    return read_mapping(reading, root, "", 0);
}

/* What follows the first document would be ignored without a word. */
static int refuse_second(struct reading *reading, struct fy_parser *parser)
{
    struct fy_document *document = fy_parse_load_document(parser);
    int rc = 0;

    if (document) {
        struct fy_node *root = fy_document_root(document);
        struct fy_node_pair *first =
            root && fy_node_is_mapping(root) ? fy_node_mapping_get_by_index(root, 0) : NULL;

        rc = CLAAS_ERR_INVALID;
        if (root)
            fail_at(reading, first ? fy_node_pair_key(first) : root, TWO_DOCUMENTS);
        if (reading->report.length == 0) /* an empty one has no place */
            claas_buf_printf(&reading->report, "%s: error: %s", reading->path, TWO_DOCUMENTS);
    } else if (fy_parser_get_stream_error(parser)) {
        rc = CLAAS_ERR_FORMAT;
    }
    fy_parse_document_destroy(parser, document);
    return rc;
}

static int read_stream(struct reading *reading, struct fy_parser *parser)
{
    struct fy_document *document;
    int rc;

    /* By its name, because libfyaml takes the name in its reports from there. */
    if (fy_parser_set_input_file(parser, reading->path) < 0)
        return CLAAS_ERR_FORMAT;
    document = fy_parse_load_document(parser);
    rc = document ? read_document(reading, document) : CLAAS_ERR_FORMAT;
    fy_parse_document_destroy(parser, document);
    return rc == 0 ? refuse_second(reading, parser) : rc;
}

static int parse(struct reading *reading)
{
    struct fy_diag_cfg diag_config = {
        .output_fn = collect, .user = &reading->report, .level = FYET_ERROR, .module_mask = ~0u};
    struct fy_diag *diag = fy_diag_create(&diag_config);
    struct fy_parse_cfg config = {.diag = diag};
    struct fy_parser *parser = diag ? fy_parser_create(&config) : NULL;
    int rc = parser ? read_stream(reading, parser) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc == CLAAS_ERR_INVALID || rc == CLAAS_ERR_FORMAT)
        rc = end_with_report(reading, rc);
    fy_parser_destroy(parser);
    fy_diag_destroy(diag);
    return rc;
}

/* Comments and blanks only: libfyaml calls that an error. */
static bool is_blank(const char *text)
{
    while (*text) {
        text += strspn(text, " \t\r\n");
        if (*text && *text != '#')
            return false;
        text += strcspn(text, "\n");
    }
    return true;
}

int config_read_file(claas_config_t *config, const char *path)
{
    struct reading reading = {.config = config, .path = path};
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length;
    int rc = claas_file_read(path, CONFIG_FILE_MAX, &text, &length);

    if (rc < 0)
        return rc;
    if (!claas_utf8_valid(text, length))
        return claas_fail(CLAAS_ERR_FORMAT, "%s: not UTF-8 text", path);
    if (is_blank(text))
        return 0;
    claas_buf_init(&reading.report, 64 << 10);
    rc = parse(&reading);
    claas_buf_done(&reading.report);
    return rc;
}
