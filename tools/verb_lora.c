/* `claas lora`: adapters and their versions. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapter_calls.h"
#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "cli.h"
#include "table.h"
#include "verbs.h"

/* What a verb does with the server once its command line is read. */
typedef int lora_fn(struct http *http, const struct cli *cli, const void *input);

static int run(const struct cli_spec *spec, int argc, char **argv, void *input, lora_fn *fn)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    struct cli cli;
    int rc;

    cli_parse(spec, argc, argv, &cli, input);
    rc = http_open(cli.url, &http);
    if (rc == 0)
        rc = fn(&http, &cli, input);
    return rc < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}

static int print_json(const cJSON *json)
{
    CLAAS_AUTO_FREE char *text = claas_json_print(json);

    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    puts(text);
    return 0;
}

/* --- init ------------------------------------------------------------------------------------- */

struct init {
    int64_t rank, alpha;
    bool overwrite;
};

static const struct argp_option init_options[] = {
    {"rank", 'r', "R", 0, "4 to 128 (default: the server's adapter.rank, 32)", 0},
    {"alpha", 'a', "ALPHA", 0, "8 to 256 (default: the server's adapter.alpha, 64)", 0},
    {"overwrite", 'f', NULL, 0, "replace an adapter of this name, with all its versions", 0},
    {0},
};

static error_t take_init_option(int key, char *value, struct argp_state *state, void *input)
{
    struct init *init = input;

    switch (key) {
    case 'r':
        init->rank = cli_int(state, NULL, "--rank", value, 4, 128);
        return 0;
    case 'a':
        init->alpha = cli_int(state, NULL, "--alpha", value, 8, 256);
        return 0;
    case 'f':
        init->overwrite = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int init(struct http *http, const struct cli *cli, const void *input)
{
    const struct init *wanted = input;
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    cJSON *body = cJSON_CreateObject();
    int rc;

    claas_json_set_string(body, "lora_id", cli->positional[0]);
    if (wanted->rank > 0)
        claas_json_set_int(body, "lora_r", wanted->rank);
    if (wanted->alpha > 0)
        claas_json_set_int(body, "lora_alpha", wanted->alpha);
    if (wanted->overwrite)
        claas_json_set_bool(body, "overwrite", true);
    rc = http_json(http, "POST", "/v1/lora/init", body, &reply);
    if (rc < 0)
        return rc;
    if (cli->json)
        return print_json(reply);
    printf("%s is at version 0\n", cli->positional[0]);
    return 0;
}

static int lora_init(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "USER/NAME",
        .doc = "Makes an untrained adapter: its version 0 answers as the base model does.",
        .options = init_options,
        .take = take_init_option,
    };
    struct init wanted = {0};

    return run(&spec, argc, argv, &wanted, init);
}

/* --- list, show ------------------------------------------------------------------------------- */

static int list(struct http *http, const struct cli *cli, const void *input)
{
    static const struct table_column columns[] = {
        {"lora_id", "ADAPTER", TABLE_TEXT},       {"current", "CURRENT", TABLE_NUMBER},
        {"versions", "VERSIONS", TABLE_NUMBER},   {"rank", "RANK", TABLE_NUMBER},
        {"alpha", "ALPHA", TABLE_NUMBER},         {"created", "CREATED", TABLE_TIME},
        {"base_model", "BASE MODEL", TABLE_TEXT},
    };
    CLAAS_AUTO_FREE char *path = http_path(http, "/v1/lora", "prefix", cli->positional[0], NULL);
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    int rc = http_json(http, "GET", path, NULL, &reply);

    (void)input;
    return rc < 0 ? rc
                  : table_print("adapters", columns, CLAAS_COUNT(columns),
                                claas_json_get(reply, "adapters"), cli->json);
}

static int lora_list(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .max = 1,
        .args = "[PREFIX]",
        .doc = "Lists adapters; with PREFIX (user, or user/name) only those below it.",
    };

    return run(&spec, argc, argv, NULL, list);
}

/* The server's two answers as one object. */
static int show_json(cJSON *versions, const cJSON *standing)
{
    claas_json_set(versions, "feedback",
                   cJSON_Duplicate(claas_json_get(standing, "feedback"), true));
    return print_json(versions);
}

static int show(struct http *http, const struct cli *cli, const void *input)
{
    CLAAS_AUTO(claas_json_free) cJSON *versions = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *standing = NULL;
    const char *name = "";
    int64_t current = 0;
    int rc = adapter_versions(http, cli->positional[0], &versions);

    (void)input;
    if (rc == 0)
        rc = adapter_standing(http, cli->positional[0], &standing);
    if (rc < 0)
        return rc;
    if (cli->json)
        return show_json(versions, standing);
    claas_json_get_string(versions, "lora_id", &name);
    claas_json_get_int(versions, "current", 0, INT64_MAX, &current);
    printf("%s is at version %" PRId64 "\n\n", name, current);
    rc = adapter_print_versions(versions, false);
    if (rc == 0 && cJSON_GetArraySize(claas_json_get(standing, "feedback")) > 0) {
        printf("\nstanding feedback\n\n");
        rc = adapter_print_standing(standing, false);
    }
    return rc;
}

static int lora_show(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "USER/NAME",
        .doc = "Shows an adapter's versions and its standing feedback.",
    };

    return run(&spec, argc, argv, NULL, show);
}

/* --- delete, rollback ------------------------------------------------------------------------- */

static int delete_one(struct http *http, const struct cli *cli, const void *input)
{
    CLAAS_AUTO_FREE char *path = http_path(http, "/v1/lora", "lora_id", cli->positional[0], NULL);
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    bool deleted = false;
    int rc = http_json(http, "DELETE", path, NULL, &reply);

    (void)input;
    if (rc < 0)
        return rc;
    claas_json_get_bool(reply, "deleted", &deleted);
    if (!deleted)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "there is no adapter '%s'", cli->positional[0]);
    printf("%s is deleted\n", cli->positional[0]);
    return 0;
}

static int lora_delete(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL,
        .min = 1,
        .max = 1,
        .args = "USER/NAME",
        .doc = "Deletes an adapter with all its versions.",
    };

    return run(&spec, argc, argv, NULL, delete_one);
}

static int rollback(struct http *http, const struct cli *cli, const void *input)
{
    int64_t version = 0;
    int rc = 0;

    (void)input;
    if (cli->count == 2)
        version =
            cli_int(NULL, "claas lora rollback", "VERSION", cli->positional[1], 0, 1000000000);
    else
        rc = adapter_parent(http, cli->positional[0], &version);
    if (rc == 0)
        rc = adapter_rollback(http, cli->positional[0], version);
    if (rc == 0)
        printf("%s is at version %" PRId64 " now\n", cli->positional[0], version);
    return rc;
}

static int lora_rollback(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL,
        .min = 1,
        .max = 2,
        .args = "USER/NAME [VERSION]",
        .doc = "Serves an earlier version again, with the standing feedback it had; by default the "
               "one that the current version was made from.",
    };

    return run(&spec, argc, argv, NULL, rollback);
}

/* --- export, import --------------------------------------------------------------------------- */

/* Written beside the target and renamed, so that a cut transfer leaves no half file. */
static int export_to(struct http *http, const char *path, const char *target)
{
    CLAAS_AUTO_FREE char *partial = claas_format("%s.part", target);
    FILE *file = partial ? fopen(partial, "wb") : NULL;
    int rc;

    if (!file)
        return claas_fail_errno("%s", partial ? partial : target);
    rc = http_download(http, path, file);
    if (fclose(file) != 0 && rc == 0)
        rc = claas_fail_errno("%s", partial);
    if (rc == 0 && rename(partial, target) < 0)
        rc = claas_fail_errno("%s", target);
    if (rc < 0)
        unlink(partial);
    return rc;
}

/* "me/chat@3" is exported to me__chat@3.zip by default. */
static char *default_target(const char *lora_id)
{
    struct claas_buf buf;

    claas_buf_init(&buf, 4096);
    for (const char *c = lora_id; *c; c++)
        claas_buf_add(&buf, *c == '/' ? "__" : c, *c == '/' ? 2 : 1);
    claas_buf_add_text(&buf, ".zip");
    return claas_buf_take(&buf, NULL);
}

static const struct argp_option export_options[] = {
    {"optimizer", 'o', NULL, 0, "with the optimizer's state, to go on learning elsewhere", 0},
    {0},
};

static error_t take_export_option(int key, char *value, struct argp_state *state, void *input)
{
    (void)value;
    (void)state;
    if (key != 'o')
        return ARGP_ERR_UNKNOWN;
    *(bool *)input = true;
    return 0;
}

static int export_one(struct http *http, const struct cli *cli, const void *input)
{
    const bool *optimizer = input;
    CLAAS_AUTO_FREE char *path = http_path(http, "/v1/lora/export", "lora_id", cli->positional[0],
                                           "optimizer", *optimizer ? "true" : NULL, NULL);
    CLAAS_AUTO_FREE char *target =
        cli->count == 2 ? claas_strdup(cli->positional[1]) : default_target(cli->positional[0]);
    int rc;

    if (!target)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (strcmp(target, "-") == 0)
        return http_download(http, path, stdout);
    rc = export_to(http, path, target);
    if (rc == 0)
        printf("%s\n", target);
    return rc;
}

static int lora_export(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL,
        .min = 1,
        .max = 2,
        .args = "USER/NAME[@VERSION] [FILE]",
        .doc = "Writes an adapter to a zip of its PEFT files; - is stdout.",
        .options = export_options,
        .take = take_export_option,
    };
    bool optimizer = false;

    return run(&spec, argc, argv, &optimizer, export_one);
}

static int import_one(struct http *http, const struct cli *cli, const void *input)
{
    CLAAS_AUTO_FREE char *path =
        http_path(http, "/v1/lora/import", "lora_id", cli->positional[0], NULL);
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    int64_t version = 0;
    int rc = http_upload(http, path, cli->positional[1], &reply);

    (void)input;
    if (rc < 0)
        return rc;
    if (cli->json)
        return print_json(reply);
    claas_json_get_int(reply, "version", 0, INT64_MAX, &version);
    printf("%s is at version %" PRId64 " now\n", cli->positional[0], version);
    return 0;
}

static int lora_import(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 2,
        .max = 2,
        .args = "USER/NAME ZIP",
        .doc = "Makes an adapter, or a new version of one, from a zip of PEFT files "
               "(adapter_config.json, adapter_model.safetensors).",
    };

    return run(&spec, argc, argv, NULL, import_one);
}

int verb_lora(int argc, char **argv)
{
    static const struct cli_verb verbs[] = {
        {"init", lora_init, "make an untrained adapter"},
        {"list", lora_list, "list adapters"},
        {"show", lora_show, "show versions and standing feedback"},
        {"delete", lora_delete, "delete an adapter"},
        {"rollback", lora_rollback, "serve an earlier version again"},
        {"export", lora_export, "write an adapter to a zip"},
        {"import", lora_import, "read one from a zip"},
    };

    return cli_dispatch(verbs, CLAAS_COUNT(verbs), "Adapters: what each user's model has learnt.",
                        argc, argv);
}
