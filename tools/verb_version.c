/* `claas version`. */
#include <stdio.h>

#include "claas/message.h"
#include "cli.h"
#include "verbs.h"

int verb_version(int argc, char **argv)
{
    static const struct cli_spec spec = {
        .flags = CLI_JSON,
        .doc = "Prints the version of this program and of the ZeroMQ protocol it speaks.",
    };
    struct cli cli;

    cli_parse(&spec, argc, argv, &cli, NULL);
    if (cli.json)
        printf("{\"version\":\"%s\",\"protocol\":%d}\n", CLAAS_VERSION, CLAAS_PROTOCOL_VERSION);
    else
        printf("claas %s (protocol %d)\n", CLAAS_VERSION, CLAAS_PROTOCOL_VERSION);
    return EXIT_CODE_OK;
}
