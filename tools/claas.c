/* `claas`: one binary, a table of verbs. */
#include <locale.h>
#include <stdio.h>
#include <string.h>

#include "claas/mem.h"
#include "cli.h"
#include "verbs.h"

static const struct cli_verb verbs[] = {
    {"serve", verb_serve, "run the server"},
    {"chat", verb_chat, "talk to a model in the terminal, and teach it"},
    {"feedback", verb_feedback, "send feedback on an answer"},
    {"jobs", verb_jobs, "list, show, watch or cancel learning jobs"},
    {"lora", verb_lora, "make, list, show, delete, roll back, export or import adapters"},
    {"model", verb_model, "show a base model, or measure how it is best shown feedback"},
    {"bench", claas_bench_main, "measure training steps, learning cycles, decoding and prefill"},
    {"gpu", verb_gpu, "show the CUDA cards, and what a server holds on its device"},
    {"health", verb_health, "ask a server how it is"},
    {"version", verb_version, "print the version"},
};

int main(int argc, char **argv)
{
    static char name[] = "claas";

    setlocale(LC_ALL, "");
    setlocale(LC_NUMERIC, "C"); /* JSON and configuration have points, never commas */
    argv[0] = name;
    if (argc > 1 && (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0))
        return verb_version(1, argv);
    return cli_dispatch(
        verbs, CLAAS_COUNT(verbs),
        "Continual learning as a service: chat, feedback in words, a better answer.", argc, argv);
}
