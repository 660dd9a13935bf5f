/* `claas bench step|decode|prefill|cycle`: how long the work of training and serving takes here,
 * beside what the machine could do at best. One device, no network. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "verbs.h"

enum {
    KEY_MODEL = 256,
    KEY_DEVICE,
    KEY_PRECISION,
    KEY_THREADS,
    KEY_BATCH,
    KEY_PROMPT,
    KEY_RESPONSE,
    KEY_HINT,
    KEY_RANK,
    KEY_TOKENS,
    KEY_CHUNK,
    KEY_ADAPTERS,
    KEY_ROWS,
    KEY_STEPS,
    KEY_ITERATIONS,
    KEY_ALPHA,
    KEY_TEMPLATE,
    KEY_JSON,
};

#define OPTION_MODEL                                                                               \
    {                                                                                              \
        "model", KEY_MODEL, "PATH", 0, "GGUF file, Hugging Face directory, or random:NAME", 0      \
    }
#define OPTION_DEVICE                                                                              \
    {                                                                                              \
        "device", KEY_DEVICE, "NAME", 0, "what computes: auto (default), cpu or cuda", 0           \
    }
#define OPTION_PRECISION                                                                           \
    {                                                                                              \
        "precision", KEY_PRECISION, "P", 0, "bf16 (default) or f32", 0                             \
    }
#define OPTION_THREADS                                                                             \
    {                                                                                              \
        "threads", KEY_THREADS, "N", 0, "threads; 0 = one per CPU (default)", 0                    \
    }
#define OPTION_ITERS                                                                               \
    {                                                                                              \
        "iters", KEY_ITERATIONS, "N", 0, "measured runs (step 7, prefill 5, decode and cycle 3)",  \
            0                                                                                      \
    }
#define OPTION_JSON                                                                                \
    {                                                                                              \
        "json", KEY_JSON, NULL, 0, "one JSON object per line", 0                                   \
    }
#define OPTIONS_OF_ALL                                                                             \
    OPTION_MODEL, OPTION_ITERS, OPTION_DEVICE, OPTION_PRECISION, OPTION_THREADS, OPTION_JSON

static const struct argp_option step_options[] = {
    OPTIONS_OF_ALL,
    {"batch", KEY_BATCH, "N", 0, "rows of the step (4)", 0},
    {"prompt", KEY_PROMPT, "N", 0, "tokens of each prompt (128)", 0},
    {"response", KEY_RESPONSE, "N", 0, "tokens of each response (128)", 0},
    {"hint", KEY_HINT, "N", 0, "tokens the teacher sees beside the prompt (64)", 0},
    {"rank", KEY_RANK, "R", 0, "rank of the LoRA adapters (32)", 0},
    {"adapters", KEY_ADAPTERS, "N", 0, "different adapters among the rows (1)", 0},
    {"alpha", KEY_ALPHA, "A", 0, "0 forward KL … 1 reverse KL (0.5)", 0},
    {0},
};
static const struct argp_option decode_options[] = {
    OPTIONS_OF_ALL,
    {"batch", KEY_BATCH, "N,…", 0, "sequences decoded together (1,8)", 0},
    {"prompt", KEY_PROMPT, "N", 0, "tokens of each prompt (64)", 0},
    {"tokens", KEY_TOKENS, "N", 0, "tokens of each answer (128)", 0},
    {"adapters", KEY_ADAPTERS, "N", 0,
     "different adapters among the sequences; 1 = one that all share, 0 = the base alone (0)", 0},
    {"rank", KEY_RANK, "R", 0, "of the adapters (32)", 0},
    {0},
};
static const struct argp_option prefill_options[] = {
    OPTIONS_OF_ALL,
    {"batch", KEY_BATCH, "N", 0, "prompts sent together (1)", 0},
    {"prompt", KEY_PROMPT, "N,…", 0, "tokens of each prompt (512)", 0},
    {"chunk", KEY_CHUNK, "N", 0, "most prompt tokens of one pass; 0 = the device's choice (0)", 0},
    {0},
};
static const struct argp_option cycle_options[] = {
    OPTIONS_OF_ALL,
    {"rows", KEY_ROWS, "N", 0, "rollouts of a step (the model's recipe)", 0},
    {"steps", KEY_STEPS, "N", 0, "optimizer steps of a cycle (the model's recipe)", 0},
    {"tokens", KEY_TOKENS, "N", 0, "most tokens of a rollout (64)", 0},
    {"chat-template", KEY_TEMPLATE, "NAME", 0, "template family instead of the model's own", 0},
    {0},
};

static int parse_int(struct argp_state *state, const char *text, int min, int max)
{
    char *end;
    long value = strtol(text, &end, 10);

    if (end == text || *end != '\0' || value < min || value > max)
        argp_error(state, "'%s' is not a number from %d to %d", text, min, max);
    return (int)value;
}

static void parse_list(struct argp_state *state, char *text, int max, int *list, int *count)
{
    char *rest = NULL;

    *count = 0;
    for (char *item = strtok_r(text, ",", &rest); item; item = strtok_r(NULL, ",", &rest)) {
        if (*count == BENCH_LIST_MAX)
            argp_error(state, "more than %d values", BENCH_LIST_MAX);
        list[(*count)++] = parse_int(state, item, 1, max);
    }
    if (*count == 0)
        argp_error(state, "an empty list");
}

/* Where the option's text goes; NULL if it is no text. */
static const char **find_text(struct bench_args *args, int key)
{
    switch (key) {
    case KEY_MODEL:
        return &args->model;
    case KEY_DEVICE:
        return &args->device;
    case KEY_PRECISION:
        return &args->precision;
    case KEY_TEMPLATE:
        return &args->chat_template;
    default:
        return NULL;
    }
}

static error_t parse_option(int key, char *arg, struct argp_state *state)
{
    struct bench_args *args = state->input;
    const char **text = find_text(args, key);
    char *end;

    if (text != NULL) {
        *text = arg;
        return 0;
    }
    switch (key) {
    case KEY_THREADS:
        args->threads = parse_int(state, arg, 0, 1024);
        return 0;
    case KEY_BATCH:
        parse_list(state, arg, 1024, args->batch, &args->batch_count);
        return 0;
    case KEY_PROMPT:
        parse_list(state, arg, 1 << 20, args->prompt, &args->prompt_count);
        return 0;
    case KEY_RESPONSE:
        args->response = parse_int(state, arg, 1, 1 << 20);
        return 0;
    case KEY_HINT:
        args->hint = parse_int(state, arg, 0, 1 << 20);
        return 0;
    case KEY_RANK:
        args->rank = parse_int(state, arg, 1, CLAAS_RANK_MAX);
        return 0;
    case KEY_TOKENS:
        args->tokens = parse_int(state, arg, 2, 1 << 20);
        return 0;
    case KEY_CHUNK:
        args->chunk = parse_int(state, arg, 0, 1 << 16);
        return 0;
    case KEY_ADAPTERS:
        args->adapters = parse_int(state, arg, 0, 1024);
        return 0;
    case KEY_ROWS:
        args->rows = parse_int(state, arg, 1, 256);
        return 0;
    case KEY_STEPS:
        args->steps = parse_int(state, arg, 1, 1000);
        return 0;
    case KEY_ITERATIONS:
        args->iterations = parse_int(state, arg, 1, 1000);
        return 0;
    case KEY_ALPHA:
        args->alpha = strtod(arg, &end);
        if (end == arg || *end != '\0' || !(args->alpha >= 0 && args->alpha <= 1))
            argp_error(state, "'%s' is not a number from 0 to 1", arg);
        return 0;
    case KEY_JSON:
        args->json = true;
        return 0;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", arg);
        return 0;
    case ARGP_KEY_END:
        if (args->model == NULL)
            argp_error(state, "--model is missing");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct benchmark {
    const char *name;
    const struct argp_option *options;
    int (*run)(const struct bench_args *args);
    struct bench_args defaults;
    const char *help;
} benchmarks[] = {
    {"step",
     step_options,
     bench_step,
     {.batch = {4},
      .batch_count = 1,
      .prompt = {128},
      .prompt_count = 1,
      .response = 128,
      .hint = 64,
      .rank = 32,
      .adapters = 1,
      .alpha = 0.5,
      .iterations = 7},
     "Measures training steps: student and teacher forward, loss over the whole vocabulary, "
     "backward, AdamW."},
    {"decode",
     decode_options,
     bench_decode,
     {.batch = {1, 8},
      .batch_count = 2,
      .prompt = {64},
      .prompt_count = 1,
      .tokens = 128,
      .rank = 32,
      .iterations = 3},
     "Measures decoding, several sequences at a time."},
    {"prefill",
     prefill_options,
     bench_prefill,
     {.batch = {1}, .batch_count = 1, .prompt = {512}, .prompt_count = 1, .iterations = 5},
     "Measures how fast prompts are read."},
    {"cycle",
     cycle_options,
     bench_cycle,
     {.iterations = 3},
     "Measures learning cycles, from feedback to the new version: rollouts, teacher, training, the "
     "gate's figures, and the rest (files, messages)."},
};

static int print_usage(FILE *out)
{
    fputs("usage: claas bench step|decode|prefill|cycle --model PATH [OPTION]... [--json]\n\n",
          out);
    for (size_t i = 0; i < CLAAS_COUNT(benchmarks); i++)
        fprintf(out, "  %-8s %s\n", benchmarks[i].name, benchmarks[i].help);
    fputs("\n`claas bench step --help` lists the options of one.\n", out);
    return out == stdout ? EXIT_CODE_OK : EXIT_CODE_USAGE;
}

static int run(const struct benchmark *benchmark, int argc, char **argv)
{
    const struct argp argp = {
        benchmark->options, parse_option, NULL, benchmark->help, NULL, NULL, NULL};
    struct bench_args args = benchmark->defaults;
    char name[64];

    snprintf(name, sizeof(name), "claas bench %s", benchmark->name);
    argv[0] = name;
    argp_parse(&argp, argc, argv, 0, NULL, &args);
    if ((benchmark->run != bench_prefill && args.prompt_count > 1) ||
        (benchmark->run != bench_decode && args.batch_count > 1)) {
        fprintf(stderr, "%s: one value is enough for --%s\n", name,
                args.prompt_count > 1 ? "prompt" : "batch");
        return EXIT_CODE_USAGE;
    }
    if (benchmark->run(&args) < 0) {
        fprintf(stderr, "%s: %s\n", name, claas_error_text());
        return EXIT_CODE_FAILED;
    }
    return EXIT_CODE_OK;
}

int claas_bench_main(int argc, char **argv)
{
    argp_err_exit_status = EXIT_CODE_USAGE;
    if (argc < 2)
        return print_usage(stderr);
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "-?") == 0)
        return print_usage(stdout);
    for (size_t i = 0; i < CLAAS_COUNT(benchmarks); i++)
        if (strcmp(argv[1], benchmarks[i].name) == 0)
            return run(&benchmarks[i], argc - 1, argv + 1);
    fprintf(stderr, "claas bench: '%s' is none of step, decode, prefill, cycle\n", argv[1]);
    return print_usage(stderr);
}
