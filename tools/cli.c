/* Command lines: see cli.h. */
#include "cli.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "verbs.h"

/* --- options ---------------------------------------------------------------------------------- */

enum { OPTION_URL = 0x1000, OPTION_JSON };

static const struct argp_option common_options[] = {
    {"url", OPTION_URL, "URL", 0, "the server (default: CLAAS_URL, else http://127.0.0.1:8080)", 0},
    {"json", OPTION_JSON, NULL, 0, "print JSON", 0},
    {0},
};

struct parse {
    const struct cli_spec *spec;
    struct cli *cli;
    void *input;
};

static void take_positional(struct argp_state *state, char *value)
{
    const struct parse *parse = state->input;
    struct cli *cli = parse->cli;

    if (cli->count == parse->spec->max)
        argp_error(state, "unexpected argument '%s'", value);
    else
        cli->positional[cli->count++] = value;
}

static error_t take(int key, char *value, struct argp_state *state)
{
    const struct parse *parse = state->input;

    switch (key) {
    case OPTION_URL:
        parse->cli->url = value;
        return 0;
    case OPTION_JSON:
        parse->cli->json = true;
        return 0;
    case ARGP_KEY_ARG:
        take_positional(state, value);
        return 0;
    case ARGP_KEY_END:
        if (parse->cli->count < parse->spec->min)
            argp_error(state, "missing argument: %s", parse->spec->args);
        return 0;
    default:
        return parse->spec->take ? parse->spec->take(key, value, state, parse->input)
                                 : ARGP_ERR_UNKNOWN;
    }
}

void cli_parse(const struct cli_spec *spec, int argc, char **argv, struct cli *ret, void *input)
{
    struct argp_option options[32] = {{0}};
    struct parse parse = {spec, ret, input};
    struct argp argp = {options, take, spec->args, spec->doc, NULL, NULL, NULL};
    size_t count = 0;

    *ret = (struct cli){0};
    for (size_t i = 0; spec->options && spec->options[i].name && count < 29; i++)
        options[count++] = spec->options[i];
    if (spec->flags & CLI_JSON)
        options[count++] = common_options[1];
    if (spec->flags & CLI_URL)
        options[count++] = common_options[0];
    argp_parse(&argp, argc, argv, 0, NULL, &parse);
}

/* --- numbers ---------------------------------------------------------------------------------- */

int64_t cli_int(struct argp_state *state, const char *who, const char *name, const char *text,
                int64_t min, int64_t max)
{
    char *end;
    long long value;

    errno = 0;
    value = strtoll(text, &end, 10);
    if (errno == 0 && end != text && !*end && value >= min && value <= max)
        return value;
    if (state)
        argp_error(state, "%s: '%s' is no whole number from %lld to %lld", name, text,
                   (long long)min, (long long)max);
    fprintf(stderr, "%s: %s: '%s' is no whole number from %lld to %lld\n", who, name, text,
            (long long)min, (long long)max);
    exit(EXIT_CODE_USAGE);
}

double cli_number(struct argp_state *state, const char *name, const char *text, double min,
                  double max)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end || !(value >= min && value <= max))
        argp_error(state, "%s: '%s' is no number from %g to %g", name, text, min, max);
    return value;
}

/* --- verbs ------------------------------------------------------------------------------------ */

static int smallest(int a, int b, int c)
{
    int least = a < b ? a : b;

    return least < c ? least : c;
}

/* Levenshtein distance of two short words. */
static int distance(const char *a, const char *b)
{
    int row[64];
    int columns = (int)strlen(b);

    if (columns >= 64)
        return 64;
    for (int j = 0; j <= columns; j++)
        row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];

        row[0] = i;
        for (int j = 1; j <= columns; j++) {
            int above = row[j];

            row[j] = smallest(above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1]));
            diagonal = above;
        }
    }
    return row[columns];
}

static int answer_unknown(const struct cli_verb *verbs, size_t count, const char *who,
                          const char *name)
{
    const struct cli_verb *nearest = NULL;
    int least = 3; /* further away is no help */

    for (size_t i = 0; i < count; i++) {
        int d = distance(name, verbs[i].name);

        if (d < least) {
            least = d;
            nearest = &verbs[i];
        }
    }
    fprintf(stderr, "%s: '%s' is not a %s verb. See '%s --help'.\n", who, name, who, who);
    if (nearest)
        fprintf(stderr, "\nThe most similar verb is\n\t%s\n", nearest->name);
    return EXIT_CODE_USAGE;
}

static void print_verbs(FILE *out, const struct cli_verb *verbs, size_t count, const char *who,
                        const char *doc)
{
    fprintf(out, "Usage: %s VERB [ARGUMENT]...\n%s\n\n", who, doc);
    for (size_t i = 0; i < count; i++)
        fprintf(out, "  %-10s %s\n", verbs[i].name, verbs[i].help);
    fprintf(out, "\n`%s help VERB` or `%s VERB --help` says more about one.\n", who, who);
}

static const struct cli_verb *find(const struct cli_verb *verbs, size_t count, const char *name)
{
    for (size_t i = 0; i < count; i++) {
        if (strcmp(verbs[i].name, name) == 0)
            return &verbs[i];
    }
    return NULL;
}

static bool is_help(const char *text)
{
    return strcmp(text, "--help") == 0 || strcmp(text, "-?") == 0 || strcmp(text, "-h") == 0 ||
           strcmp(text, "help") == 0;
}

int cli_dispatch(const struct cli_verb *verbs, size_t count, const char *doc, int argc, char **argv)
{
    static char help_flag[] = "--help";
    const char *who = argv[0];
    const struct cli_verb *verb;
    char name[64];

    if (argc < 2) {
        print_verbs(stderr, verbs, count, who, doc);
        return EXIT_CODE_USAGE;
    }
    if (is_help(argv[1]) && (argc == 2 || is_help(argv[2]))) { /* "help --help" asks for no verb */
        print_verbs(stdout, verbs, count, who, doc);
        return EXIT_CODE_OK;
    }
    if (strcmp(argv[1], "help") == 0) { /* help VERB [VERB] = VERB [VERB] --help */
        memmove(&argv[1], &argv[2], (size_t)(argc - 2) * sizeof(argv[0]));
        argv[argc - 1] = help_flag;
    }
    verb = find(verbs, count, argv[1]);
    if (!verb)
        return answer_unknown(verbs, count, who, argv[1]);
    /* argv[0] is what argp and the verb itself show in their messages. */
    snprintf(name, sizeof(name), "%s %s", who, verb->name);
    argv[1] = name;
    return verb->run(argc - 1, argv + 1);
}

int cli_fail(const char *who)
{
    fprintf(stderr, "%s: %s\n", who, claas_error_text());
    return EXIT_CODE_FAILED;
}
