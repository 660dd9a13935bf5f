/* What the verbs share: their command lines (argp, with --url and --json everywhere they mean
 * something), verbs below verbs, and messages. Wrong command lines end the process with 64, as argp
 * does. */
#ifndef CLAAS_TOOLS_CLI_H
#define CLAAS_TOOLS_CLI_H

#include <argp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CLI_POSITIONAL_MAX 8

/* What was on a command line. */
struct cli {
    const char *url; /* NULL if not given */
    bool json;
    const char *positional[CLI_POSITIONAL_MAX];
    int count;
};

enum cli_flags {
    CLI_URL = 1,  /* takes --url */
    CLI_JSON = 2, /* takes --json */
};

struct cli_spec {
    unsigned flags;
    int min, max;                      /* positional arguments */
    const char *args;                  /* "LORA_ID VERSION", as help shows them */
    const char *doc;                   /* text before the options; after a \v what follows them */
    const struct argp_option *options; /* the verb's own, or NULL */
    /* Takes one of them: 0, or ARGP_ERR_UNKNOWN. `input` is what cli_parse was given. */
    error_t (*take)(int key, char *value, struct argp_state *state, void *input);
};
void cli_parse(const struct cli_spec *spec, int argc, char **argv, struct cli *ret, void *input);

/* The number of an option or argument `name`; anything else than a (whole) number within the bounds
 * ends the process with 64. `state` may be NULL outside of parsing; the message then begins with
 * `who` ("claas lora rollback"). */
int64_t cli_int(struct argp_state *state, const char *who, const char *name, const char *text,
                int64_t min, int64_t max);
double cli_number(struct argp_state *state, const char *name, const char *text, double min,
                  double max);

/* A table of verbs. */
struct cli_verb {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
};
/* Runs the verb argv[1], whose argv[0] is then "<argv[0]> <name>". Prints the list of verbs, below
 * `doc`, for --help; suggests a similar verb for an unknown one. */
int cli_dispatch(const struct cli_verb *verbs, size_t count, const char *doc, int argc,
                 char **argv);

/* "claas lora show: <sentence of the last failure>" on stderr; returns EXIT_CODE_FAILED. */
int cli_fail(const char *who);

#endif
