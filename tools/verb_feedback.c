/* `claas feedback`: sends feedback on an answer and waits for the version that learnt from it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cli.h"
#include "teach.h"
#include "verbs.h"

struct feedback {
    const char *adapter, *response_id;
    int choice;
    bool no_wait;
};

enum { OPTION_ADAPTER = 'a', OPTION_RESPONSE_ID = 'r', OPTION_CHOICE = 256, OPTION_NO_WAIT };

static const struct argp_option options[] = {
    {"adapter", OPTION_ADAPTER, "NAME", 0, "user/name (default: local/chat)", 0},
    {"response-id", OPTION_RESPONSE_ID, "ID", 0, "the answer: `id` of its chat completion", 0},
    {"choice", OPTION_CHOICE, "N", 0, "which of its choices (default: 0)", 0},
    {"no-wait", OPTION_NO_WAIT, NULL, 0, "print the job's id and do not wait for it", 0},
    {0},
};

static error_t take_option(int key, char *value, struct argp_state *state, void *input)
{
    struct feedback *feedback = input;

    switch (key) {
    case OPTION_ADAPTER:
        feedback->adapter = value;
        return 0;
    case OPTION_RESPONSE_ID:
        feedback->response_id = value;
        return 0;
    case OPTION_CHOICE:
        feedback->choice = (int)cli_int(state, NULL, "--choice", value, 0, 15);
        return 0;
    case OPTION_NO_WAIT:
        feedback->no_wait = true;
        return 0;
    case ARGP_KEY_FINI:
        if (!feedback->response_id)
            argp_error(state, "--response-id is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int print_job(const cJSON *job, bool json, bool *ret_published)
{
    CLAAS_AUTO_FREE char *outcome = NULL;
    CLAAS_AUTO_FREE char *text = json ? claas_json_print(job) : NULL;

    *ret_published = teach_outcome(job, &outcome);
    if (!outcome || (json && !text))
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    puts(json ? text : outcome);
    return 0;
}

static int run(const struct feedback *feedback, const struct cli *cli, bool *ret_published)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *job = NULL;
    char job_id[65];
    int rc = http_open(cli->url, &http);

    if (rc == 0)
        rc = teach_send(&http, feedback->adapter, feedback->response_id, feedback->choice,
                        cli->positional[0], job_id);
    if (rc < 0)
        return rc;
    if (feedback->no_wait) {
        printf(cli->json ? "{\"job_id\":\"%s\"}\n" : "%s\n", job_id);
        *ret_published = true;
        return 0;
    }
    rc = teach_watch(&http, job_id, &job);
    if (rc < 0)
        return claas_fail_context(rc, "job %s: ", job_id);
    return print_job(job, cli->json, ret_published);
}

int verb_feedback(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .min = 1,
        .max = 1,
        .args = "WORDS",
        .doc = "Sends feedback on an answer and waits until the version that learnt from it is "
               "served.\vEnds with 0 if a version was published, with 1 if the gate rejected it or "
               "the job failed. Interrupting it does not end the job.",
        .options = options,
        .take = take_option,
    };
    struct feedback feedback = {.adapter = "local/chat"};
    struct cli cli;
    bool published = false;

    cli_parse(&spec, argc, argv, &cli, &feedback);
    if (run(&feedback, &cli, &published) < 0)
        return cli_fail(argv[0]);
    return published ? EXIT_CODE_OK : EXIT_CODE_FAILED;
}
