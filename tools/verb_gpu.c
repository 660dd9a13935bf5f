/* `claas gpu`: the cards of this machine, and what a running server holds on its device. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/device.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "cli.h"
#include "http_client.h"
#include "table.h"
#include "verbs.h"

static void set_version(cJSON *body, const char *key, int version)
{
    char text[24];

    snprintf(text, sizeof(text), "%d.%d", version / 1000, version % 1000 / 10);
    if (version > 0)
        claas_json_set_string(body, key, text);
    else
        claas_json_set_null(body, key);
}

static cJSON *cards_json(const struct claas_cards *cards)
{
    cJSON *list = cJSON_CreateArray();

    for (int i = 0; i < cards->count; i++) {
        const struct claas_card *card = &cards->cards[i];
        cJSON *one = cJSON_CreateObject();
        char capability[24];

        snprintf(capability, sizeof(capability), "%d.%d", card->major, card->minor);
        claas_json_set_int(one, "card", i);
        claas_json_set_string(one, "name", card->name);
        claas_json_set_string(one, "compute_capability", capability);
        claas_json_set_int(one, "bytes", (int64_t)card->bytes);
        if (card->unknown[0])
            claas_json_set_null(one, "bytes_free");
        else
            claas_json_set_int(one, "bytes_free", (int64_t)card->bytes_free);
        cJSON_AddItemToArray(list, one);
    }
    return list;
}

/* The server's device from its health; NULL without one. That a server does not answer is no
 * failure unless --url named it. */
static int ask_server(const struct cli *cli, cJSON **ret)
{
    CLAAS_AUTO(http_close) struct http http = {0};
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    int rc = http_open(cli->url, &http);

    if (rc == 0)
        rc = http_json(&http, "GET", "/v1/health", NULL, &reply);
    if (rc < 0)
        return cli->url ? rc : 0;
    *ret = cJSON_Duplicate(claas_json_get(claas_json_get(reply, "model"), "device"), true);
    return 0;
}

static int64_t bytes_at(const cJSON *object, const char *key)
{
    int64_t bytes = 0;

    claas_json_get_int(object, key, 0, INT64_MAX, &bytes);
    return bytes;
}

static void print_cards(const struct claas_cards *cards)
{
    for (int i = 0; i < cards->count; i++) {
        const struct claas_card *card = &cards->cards[i];

        printf("card %d     %s, compute capability %d.%d, ", i, card->name, card->major,
               card->minor);
        if (card->unknown[0])
            printf("%" PRIu64 " MB, how much is free is not known: %s\n", card->bytes / 1000000,
                   card->unknown);
        else
            printf("%" PRIu64 " of %" PRIu64 " MB free\n", card->bytes_free / 1000000,
                   card->bytes / 1000000);
    }
    printf("CUDA       %d.%d here, driver up to %d.%d\n", cards->runtime / 1000,
           cards->runtime % 1000 / 10, cards->driver / 1000, cards->driver % 1000 / 10);
}

/* Nothing where the device keeps none. What was not found there came from a file, or failed. */
static void print_host_cache(const cJSON *device)
{
    int64_t bytes = bytes_at(device, "host_cache_bytes");
    int64_t found = bytes_at(device, "host_cache_found");
    int64_t missed = bytes_at(device, "host_cache_missed");

    if (bytes > 0 || found + missed > 0)
        printf("  %-24s %" PRId64 " adapters, found %" PRId64 " times, not found %" PRId64
               " times\n",
               "", bytes_at(device, "host_cache_adapters"), found, missed);
}

static void print_bytes(const char *title, int64_t bytes)
{
    printf("  %-24s %8.1f MB\n", title, (double)bytes / 1e6);
}

static int print_device(const cJSON *device)
{
    static const struct {
        const char *key, *title;
    } figures[] = {{"bytes_peak", "at most, in all"},
                   {"host_cache_bytes", "in host memory"},
                   {"teacher_bytes", "teacher's rows"}};
    static const struct table_column columns[] = {{"name", "ADAPTER", TABLE_TEXT},
                                                  {"use", "USE", TABLE_TEXT},
                                                  {"bytes", "BYTES", TABLE_NUMBER}};
    const cJSON *memory = claas_json_get(device, "memory"), *use;
    const char *name = "";

    claas_json_get_string(device, "name", &name);
    printf("server     on %s\n", name);
    cJSON_ArrayForEach(use, memory) print_bytes(use->string, bytes_at(memory, use->string));
    for (size_t i = 0; i < CLAAS_COUNT(figures); i++)
        print_bytes(figures[i].title, bytes_at(device, figures[i].key));
    print_host_cache(device);
    return table_print("adapters", columns, CLAAS_COUNT(columns),
                       claas_json_get(device, "adapters"), false);
}

static int print_json(const struct claas_cards *cards, const cJSON *device)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = cJSON_CreateObject();
    CLAAS_AUTO_FREE char *text = NULL;

    set_version(body, "driver", cards->driver);
    set_version(body, "runtime", cards->runtime);
    claas_json_set(body, "cards", cards_json(cards));
    claas_json_set(body, "device", device ? cJSON_Duplicate(device, true) : cJSON_CreateNull());
    text = claas_json_print(body);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    puts(text);
    return 0;
}

int verb_gpu(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_URL | CLI_JSON,
        .doc = "Shows the CUDA cards of this machine and, of a running server, what its device "
               "holds. Ends with 1 if there is no card, or no answer from the server of --url.",
    };
    CLAAS_AUTO(claas_json_free) cJSON *device = NULL;
    struct claas_cards cards;
    struct cli cli;
    bool no_card, no_answer;
    int rc = 0;

    cli_parse(&spec, argc, argv, &cli, NULL);
    no_answer = ask_server(&cli, &device) < 0;
    if (no_answer)
        cli_fail(argv[0]);
    no_card = claas_device_cards(&cards) < 0;
    if (no_card)
        cli_fail(argv[0]);
    if (cli.json)
        rc = print_json(&cards, device);
    else if (!no_card)
        print_cards(&cards);
    if (!cli.json && device)
        rc = print_device(device);
    if (rc < 0)
        return cli_fail(argv[0]);
    return no_card || no_answer ? EXIT_CODE_FAILED : EXIT_CODE_OK;
}
