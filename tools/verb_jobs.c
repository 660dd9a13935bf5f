/* `claas jobs`: learning jobs, newest first; one of them; its events as they happen; an end to
 * it. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cli.h"
#include "table.h"
#include "teach.h"
#include "verbs.h"

static char *job_path(struct http *http, const char *job_id)
{
    char *escaped = curl_easy_escape(http->curl, job_id, 0);
    char *path = claas_format("/v1/jobs/%s", escaped ? escaped : "");

    curl_free(escaped);
    return path;
}

static int print_json(const cJSON *json)
{
    CLAAS_AUTO_FREE char *text = claas_json_print(json);

    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    puts(text);
    return 0;
}

/* --- list ------------------------------------------------------------------------------------- */

struct list {
    const char *adapter, *state, *limit;
};

static const struct argp_option list_options[] = {
    {"adapter", 'a', "NAME", 0, "only those of user/name", 0},
    {"state", 's', "STATE", 0,
     "only those that are queued, batched, training, gating, publishing, done, rejected, failed or "
     "cancelled",
     0},
    {"limit", 'n', "N", 0, "at most that many (default: 100)", 0},
    {0},
};

static error_t take_list_option(int key, char *value, struct argp_state *state, void *input)
{
    struct list *list = input;

    switch (key) {
    case 'a':
        list->adapter = value;
        return 0;
    case 's':
        list->state = value;
        return 0;
    case 'n':
        cli_int(state, NULL, "--limit", value, 1, 1000);
        list->limit = value;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int list(const struct list *list, const struct cli *cli)
{
    static const struct table_column columns[] = {
        {"job_id", "JOB", TABLE_TEXT},      {"lora_id", "ADAPTER", TABLE_TEXT},
        {"state", "STATE", TABLE_TEXT},     {"version", "VERSION", TABLE_NUMBER},
        {"created", "CREATED", TABLE_TIME}, {"updated", "UPDATED", TABLE_TIME},
        {"reason", "REASON", TABLE_FREE},   {"error", "ERROR", TABLE_FREE},
    };
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    CLAAS_AUTO_FREE char *path = NULL;
    int rc = http_open(cli->url, &http);

    if (rc < 0)
        return rc;
    path = http_path(&http, "/v1/jobs", "lora_id", list->adapter, "state", list->state, "limit",
                     list->limit, NULL);
    rc = http_json(&http, "GET", path, NULL, &reply);
    return rc < 0 ? rc
                  : table_print("jobs", columns, CLAAS_COUNT(columns),
                                claas_json_get(reply, "jobs"), cli->json);
}

static int jobs_list(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .doc = "Lists learning jobs, newest first.",
        .options = list_options,
        .take = take_list_option,
    };
    struct list wanted = {0};
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, &wanted);
    return list(&wanted, &cli) < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}

/* --- show ------------------------------------------------------------------------------------- */

static void print_time(const char *name, const cJSON *object, const char *key)
{
    int64_t time = 0;
    char text[32];

    claas_json_get_int(object, key, 0, INT64_MAX, &time);
    table_time(time, text, sizeof(text));
    printf("%-10s %s\n", name, text);
}

static void print_text(const char *name, const cJSON *object, const char *key)
{
    const char *text = NULL;

    if (claas_json_get_string(object, key, &text) == 1)
        printf("%-10s %s\n", name, text);
}

static int print_steps(const cJSON *job)
{
    static const struct table_column columns[] = {
        {"step", "STEP", TABLE_NUMBER},           {"total_loss", "LOSS", TABLE_NUMBER},
        {"grad_norm", "GRAD NORM", TABLE_NUMBER}, {"tokens_processed", "TOKENS", TABLE_NUMBER},
        {"passed", "PASSED", TABLE_TEXT},
    };
    const cJSON *steps = claas_json_get(claas_json_get(job, "result"), "steps");

    return steps ? table_print("steps", columns, CLAAS_COUNT(columns), steps, false) : 0;
}

static int print_job(const cJSON *job)
{
    CLAAS_AUTO_FREE char *outcome = NULL;
    const cJSON *transition, *item;

    print_text("job", job, "job_id");
    print_text("adapter", job, "lora_id");
    print_time("created", job, "created");
    cJSON_ArrayForEach(item, claas_json_get(job, "feedback")) print_text("feedback", item, "text");
    cJSON_ArrayForEach(transition, claas_json_get(job, "transitions"))
    {
        const char *state = "";

        claas_json_get_string(transition, "state", &state);
        print_time(state, transition, "time");
    }
    teach_outcome(job, &outcome);
    printf("%-10s %s\n", "outcome", outcome ? outcome : "");
    return print_steps(job);
}

static int show(const struct cli *cli)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *job = NULL;
    CLAAS_AUTO_FREE char *path = NULL;
    int rc = http_open(cli->url, &http);

    if (rc < 0)
        return rc;
    path = job_path(&http, cli->positional[0]);
    rc = http_json(&http, "GET", path, NULL, &job);
    if (rc < 0)
        return rc;
    return cli->json ? print_json(job) : print_job(job);
}

static int jobs_show(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "JOB",
        .doc = "Shows a job: what it was given, its states and steps, and what came of it.",
    };
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, NULL);
    return show(&cli) < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}

/* --- watch ------------------------------------------------------------------------------------ */

static void print_event(void *arg, const char *data)
{
    (void)arg;
    puts(data);
    fflush(stdout);
}

static int watch(const struct cli *cli)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *job = NULL;
    CLAAS_AUTO_FREE char *outcome = NULL;
    int rc = http_open(cli->url, &http);

    if (rc == 0)
        rc = teach_watch_events(&http, cli->positional[0], cli->json ? print_event : NULL, NULL,
                                &job);
    if (rc < 0)
        return rc;
    teach_outcome(job, &outcome);
    if (!cli->json)
        puts(outcome ? outcome : "");
    return 0;
}

static int jobs_watch(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "JOB",
        .doc = "Waits for the end of a job, with a progress bar; with --json prints each event as "
               "a line, and the job as the last.",
    };
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, NULL);
    return watch(&cli) < 0 ? cli_fail(argv[0]) : EXIT_CODE_OK;
}

/* --- cancel ----------------------------------------------------------------------------------- */

static int cancel(const struct cli *cli, bool *ret_cancelled)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    CLAAS_AUTO_FREE char *path = NULL;
    int rc = http_open(cli->url, &http);

    if (rc < 0)
        return rc;
    path = job_path(&http, cli->positional[0]);
    rc = http_json(&http, "DELETE", path, NULL, &reply);
    if (rc < 0)
        return rc;
    claas_json_get_bool(reply, "cancelled", ret_cancelled);
    if (cli->json)
        return print_json(reply);
    puts(*ret_cancelled ? "cancelled" : "it had ended already");
    return 0;
}

static int jobs_cancel(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "JOB",
        .doc = "Cancels a job whose version is not published yet.",
    };
    struct cli cli;
    bool cancelled = false;

    cli_parse(&spec, argc, argv, &cli, NULL);
    if (cancel(&cli, &cancelled) < 0)
        return cli_fail(argv[0]);
    return cancelled ? EXIT_CODE_OK : EXIT_CODE_FAILED;
}

int verb_jobs(int argc, char **argv)
{
    static const struct cli_verb verbs[] = {
        {"list", jobs_list, "list jobs, newest first"},
        {"show", jobs_show, "show one"},
        {"watch", jobs_watch, "wait for the end of one"},
        {"cancel", jobs_cancel, "cancel one"},
    };

    return cli_dispatch(verbs, CLAAS_COUNT(verbs), "Learning jobs: one for each feedback.", argc,
                        argv);
}
