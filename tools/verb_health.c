/* `claas health`: asks a server how its actors and its device are. Ends with 1 unless all is
 * well. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cli.h"
#include "http_client.h"
#include "verbs.h"

static void print_actor(const char *name, const cJSON *actor)
{
    const char *status = "unknown", *error = NULL;
    int64_t handled = 0, uptime_ms = 0;

    claas_json_get_string(actor, "status", &status);
    claas_json_get_string(actor, "error", &error);
    claas_json_get_int(actor, "handled", 0, INT64_MAX, &handled);
    claas_json_get_int(actor, "uptime_ms", 0, INT64_MAX, &uptime_ms);
    if (error)
        printf("%-10s %s: %s\n", name, status, error);
    else
        printf("%-10s %s, up %" PRId64 " s, %" PRId64 " messages\n", name, status, uptime_ms / 1000,
               handled);
}

static void print_model(const cJSON *model)
{
    const char *name = NULL, *device = "";
    int64_t context = 0;

    if (claas_json_get_string(model, "name", &name) != 1)
        return;
    claas_json_get_string(claas_json_get(model, "device"), "name", &device);
    claas_json_get_int(model, "context", 0, INT64_MAX, &context);
    printf("%-10s %s, context %" PRId64 "%s%s\n", "model", name, context, device[0] ? ", on " : "",
           device);
}

static int run(const struct cli *cli, bool *ret_healthy)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    CLAAS_AUTO_FREE char *text = NULL;
    const char *status = "unknown";
    const cJSON *actor;
    int rc = http_open(cli->url, &http);

    if (rc == 0)
        rc = http_json(&http, "GET", "/v1/health", NULL, &reply);
    if (rc < 0)
        return rc;
    claas_json_get_string(reply, "status", &status);
    *ret_healthy = strcmp(status, "healthy") == 0;
    if (cli->json) {
        text = claas_json_print(reply);
        puts(text ? text : "");
        return 0;
    }
    printf("%-10s %s\n", "status", status);
    cJSON_ArrayForEach(actor, claas_json_get(reply, "actors"))
        print_actor(actor->string ? actor->string : "", actor);
    print_model(claas_json_get(reply, "model"));
    return 0;
}

int verb_health(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .doc = "Asks a server how it is. Ends with 0 if it is healthy, else with 1.",
    };
    struct cli cli;
    bool healthy = false;

    cli_parse(&spec, argc, argv, &cli, NULL);
    if (run(&cli, &healthy) < 0)
        return cli_fail(argv[0]);
    return healthy ? EXIT_CODE_OK : EXIT_CODE_FAILED;
}
