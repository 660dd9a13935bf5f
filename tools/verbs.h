/* The verbs of `claas`: one file each, a function that gets its own argv (argv[0] = "claas VERB")
 * and returns an exit code. */
#ifndef CLAAS_TOOLS_VERBS_H
#define CLAAS_TOOLS_VERBS_H

enum exit_code {
    EXIT_CODE_OK = 0,
    EXIT_CODE_FAILED = 1, /* the thing asked for did not work */
    EXIT_CODE_CONFIG = 2, /* the configuration is wrong */
    EXIT_CODE_USAGE = 64, /* the command line is wrong */
    EXIT_CODE_AGAIN = 75, /* the device was lost: start the server again (EX_TEMPFAIL) */
};

int verb_serve(int argc, char **argv);
int verb_chat(int argc, char **argv);
int verb_feedback(int argc, char **argv);
int verb_jobs(int argc, char **argv);
int verb_lora(int argc, char **argv);
int verb_model(int argc, char **argv);
int verb_gpu(int argc, char **argv);
int verb_health(int argc, char **argv);
int verb_version(int argc, char **argv);
/* bench.c */
int claas_bench_main(int argc, char **argv);

#endif
