/* `claas model calibrate`: measures every form of showing feedback to a base model, and prints the
 * settings that follow, as YAML for the server's configuration. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calibrate.h"
#include "claas/buf.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "cli.h"
#include "load_progress.h"
#include "model_verbs.h"
#include "progress.h"
#include "table.h"
#include "verbs.h"

#define KV_TOKENS 32768 /* 48 answers at once, each with its prompt */

struct options {
    const char *write, *chat_template;
    int samples, threads;
};

enum { OPTION_WRITE = 'w', OPTION_SAMPLES = 'n', OPTION_THREADS = 'j', OPTION_TEMPLATE = 't' };

static const struct argp_option options[] = {
    {"samples", OPTION_SAMPLES, "N", 0, "answers to each question (default: 4)", 0},
    {"write", OPTION_WRITE, "FILE", 0, "write the settings to this file", 0},
    {"threads", OPTION_THREADS, "N", 0, "threads; 0 = one per CPU (default)", 0},
    {"chat-template", OPTION_TEMPLATE, "NAME", 0, "template family instead of the model's own", 0},
    {0},
};

static error_t take_option(int key, char *value, struct argp_state *state, void *input)
{
    struct options *wanted = input;

    switch (key) {
    case OPTION_SAMPLES:
        wanted->samples = (int)cli_int(state, NULL, "--samples", value, 1, 1000);
        return 0;
    case OPTION_WRITE:
        wanted->write = value;
        return 0;
    case OPTION_THREADS:
        wanted->threads = (int)cli_int(state, NULL, "--threads", value, 0, 1024);
        return 0;
    case OPTION_TEMPLATE:
        wanted->chat_template = value;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* --- results ---------------------------------------------------------------------------------- */

static double rounded(double share)
{
    return round(share * 1000) / 1000;
}

static cJSON *form_rows(const struct calibration *measured)
{
    cJSON *rows = cJSON_CreateArray();

    for (int form = 0; form < CALIBRATE_FORMS; form++) {
        cJSON *row = cJSON_CreateObject();

        claas_json_set_string(row, "form", calibrate_form_names[form]);
        for (int i = 0; i < CALIBRATE_PREFERENCES; i++)
            claas_json_set_number(row, calibrate_preferences[i].name,
                                  rounded(measured->hit[form][i]));
        claas_json_set_number(row, "leak", rounded(measured->leak[form]));
        cJSON_AddItemToArray(rows, row);
    }
    return rows;
}

static char *settings_yaml(const claas_model_t *model, const struct calibrated *chosen)
{
    struct claas_buf buf;

    claas_buf_init(&buf, 4096);
    claas_buf_printf(&buf, "# %s (%s): in context, hit %.2f, leak %.2f\n", claas_model_name(model),
                     claas_model_fingerprint(model), chosen->mean_hit, chosen->leak);
    claas_buf_printf(&buf, "cycle:\n  forms: %s%s%s\n  other_share: %g\n  rows: %d\n",
                     calibrate_form_names[chosen->forms[0]], chosen->form_count > 1 ? "," : "",
                     chosen->form_count > 1 ? calibrate_form_names[chosen->forms[1]] : "",
                     chosen->other_share, chosen->rows);
    return claas_buf_take(&buf, NULL);
}

static int print_json(const claas_model_t *model, const struct calibration *measured,
                      const struct calibrated *chosen)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = cJSON_CreateObject();
    CLAAS_AUTO_FREE char *text = NULL;
    cJSON *settings, *forms;

    claas_json_set_string(json, "model", claas_model_name(model));
    claas_json_set_string(json, "fingerprint", claas_model_fingerprint(model));
    claas_json_set(json, "forms", form_rows(measured));
    settings = claas_json_set(json, "settings", cJSON_CreateObject());
    forms = claas_json_set(settings, "cycle.forms", cJSON_CreateArray());
    for (int i = 0; i < chosen->form_count; i++)
        cJSON_AddItemToArray(forms, cJSON_CreateString(calibrate_form_names[chosen->forms[i]]));
    claas_json_set_number(settings, "cycle.other_share", chosen->other_share);
    claas_json_set_int(settings, "cycle.rows", chosen->rows);
    text = claas_json_print(json);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    puts(text);
    return 0;
}

static int print_text(const struct calibration *measured, const char *yaml)
{
    static const struct table_column columns[] = {
        {"form", "SHOWN AS", TABLE_TEXT},     {"identity", "IDENTITY", TABLE_NUMBER},
        {"concise", "CONCISE", TABLE_NUMBER}, {"style", "STYLE", TABLE_NUMBER},
        {"leak", "LEAK", TABLE_NUMBER},
    };
    CLAAS_AUTO(claas_json_free) cJSON *rows = form_rows(measured);
    int rc = table_print("forms", columns, CLAAS_COUNT(columns), rows, false);

    if (rc == 0)
        printf("\n%s", yaml);
    return rc;
}

/* --- running ---------------------------------------------------------------------------------- */

static void show_progress(void *arg, int done, int total)
{
    progress_set(arg, done, total, "%d/%d answers", done, total);
}

static int measure(const char *path, const struct options *wanted, claas_model_t **ret_model,
                   struct calibration *measured)
{
    struct claas_model_options model_options = {path, wanted->chat_template};
    struct claas_device_options device_options = {
        .device = "cpu", .precision = "bf16", .threads = wanted->threads, .kv_tokens = KV_TOKENS};
    claas_device_t *device = NULL;
    struct progress progress;
    int rc = claas_model_open(&model_options, ret_model);

    if (rc < 0)
        return claas_fail_context(rc, "%s: ", path);
    rc = load_progress_open(&device_options, *ret_model, &device);
    if (rc < 0)
        return rc;
    progress_begin(&progress);
    rc = calibrate_measure(device, wanted->samples, show_progress, &progress, measured);
    progress_end(&progress);
    claas_device_free(&device);
    return rc;
}

static int run(const struct cli *cli, const struct options *wanted)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    CLAAS_AUTO_FREE char *yaml = NULL;
    struct calibration measured;
    struct calibrated chosen;
    int rc = measure(cli->positional[0], wanted, &model, &measured);

    if (rc < 0)
        return rc;
    chosen = calibrate_choose(&measured);
    yaml = settings_yaml(model, &chosen);
    if (!yaml)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = cli->json ? print_json(model, &measured, &chosen) : print_text(&measured, yaml);
    if (rc == 0 && wanted->write)
        rc = claas_file_write(wanted->write, yaml, strlen(yaml));
    return rc;
}

int model_calibrate(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "PATH",
        .doc = "Measures how a base model is best shown feedback: for each form the share of "
               "answers that follow three built-in preferences, and the share of unrelated answers "
               "that show the first one, which must not.\vPrints the settings that follow as YAML; "
               "put them into the server's configuration. Takes minutes on a small model; uses "
               "every CPU, and never a GPU.",
        .options = options,
        .take = take_option,
    };
    struct options wanted = {.samples = 4};
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, &wanted);
    return run(&cli, &wanted) < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}
