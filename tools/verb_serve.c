/* `claas serve`: puts a process together - configuration, model, device, runtime, actors - and runs
 * it until a signal. */
#include <argp.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/buf.h"
#include "claas/config.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "process.h"
#include "supervise.h"
#include "verbs.h"

#define OVERRIDES_MAX 128

struct serve_args {
    const char *config_path;
    const char *overrides[OVERRIDES_MAX]; /* "key=value", in order */
    char *owned[OVERRIDES_MAX];           /* those made from options */
    size_t count;
    bool supervise;
    bool beside; /* --role: joins the server of its data directory */
};

enum {
    OPTION_LISTEN = 256,
    OPTION_DATA,
    OPTION_MODEL,
    OPTION_DEVICE,
    OPTION_TEMPLATE,
    OPTION_ROLES,
    OPTION_ROLE,
    OPTION_CONNECT,
    OPTION_SUPERVISE
};

static const struct argp_option options[] = {
    {"listen", OPTION_LISTEN, "ADDR:PORT", 0, "where HTTP is served; port 0 = any free one", 0},
    {"data", OPTION_DATA, "DIR", 0, "directory of everything durable", 0},
    {"model", OPTION_MODEL, "PATH", 0, "GGUF file, Hugging Face directory, or random:NAME", 0},
    {"device", OPTION_DEVICE, "NAME", 0, "what computes: auto, cpu or cuda", 0},
    {"config", 'c', "FILE", 0, "settings (YAML); docs/configuration.md lists them", 0},
    {"set", 's', "KEY=VALUE", 0, "one setting; may be given several times", 0},
    {"chat-template", OPTION_TEMPLATE, "NAME", 0, "template family instead of the model's own", 0},
    {"roles", OPTION_ROLES, "A,B", 0, "actors of this process", 0},
    {"role", OPTION_ROLE, "A,B", 0,
     "run only these actors and join the server of the same --data, which runs the others "
     "(--roles)",
     0},
    {"connect", OPTION_CONNECT, "ENDPOINT", 0, "join the node at this ipc:// address", 0},
    {"supervise", OPTION_SUPERVISE, NULL, 0,
     "start the server again after a crash or a lost device", 0},
    {0},
};

/* Takes over `text`, "key=value"; there is room. */
static void own_override(struct serve_args *args, char *text)
{
    args->owned[args->count] = text;
    args->overrides[args->count++] = text;
}

static void add_override(struct argp_state *state, const char *key, const char *value)
{
    struct serve_args *args = state->input;

    if (args->count == OVERRIDES_MAX)
        argp_error(state, "more than %d settings", OVERRIDES_MAX);
    if (key)
        own_override(args, claas_format("%s=%s", key, value));
    else
        args->overrides[args->count++] = value;
}

static error_t parse_option(int key, char *value, struct argp_state *state)
{
    struct serve_args *args = state->input;

    switch (key) {
    case 'c':
        args->config_path = value;
        break;
    case 's':
        if (!strchr(value, '='))
            argp_error(state, "--set wants KEY=VALUE, not '%s'", value);
        add_override(state, NULL, value);
        break;
    case OPTION_LISTEN:
        add_override(state, "listen", value);
        break;
    case OPTION_DATA:
        add_override(state, "data", value);
        break;
    case OPTION_MODEL:
        add_override(state, "model", value);
        break;
    case OPTION_DEVICE:
        add_override(state, "device.name", value);
        break;
    case OPTION_TEMPLATE:
        add_override(state, "chat_template", value);
        break;
    case OPTION_ROLES:
        add_override(state, "roles", value);
        break;
    case OPTION_ROLE:
        if (args->beside)
            argp_error(state, "--role is given once: --role A,B for several");
        add_override(state, "roles", value);
        args->beside = true;
        break;
    case OPTION_CONNECT:
        add_override(state, "connect", value);
        break;
    case OPTION_SUPERVISE:
        args->supervise = true;
        break;
    case ARGP_KEY_ARG:
        argp_error(state, "unexpected argument '%s'", value);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

/* Adds the settings after the options' help, from the table that the parser reads. */
static char *add_settings(int key, const char *text, void *input)
{
    const struct claas_setting *setting;
    struct claas_buf buf;

    (void)input;
    if (key != ARGP_KEY_HELP_EXTRA)
        return (char *)text;
    claas_buf_init(&buf, 65536);
    claas_buf_add_text(&buf,
                       "Settings, for --set and the file of --config, with their defaults:\n");
    for (size_t i = 0; (setting = claas_config_setting_at(i)); i++)
        claas_buf_printf(&buf, "\n  %s=%s\n      %s%s%s%s", setting->key, setting->default_text,
                         setting->help, setting->words[0] ? " (" : "", setting->words,
                         setting->words[0] ? ")" : "");
    return claas_buf_take(&buf, NULL);
}

static const struct argp serve_argp = {
    .options = options,
    .parser = parse_option,
    .help_filter = add_settings,
    .doc = "Runs the server: chat and feedback over HTTP and ZeroMQ.\v"
           "Prints one line `listening on http://ADDR:PORT` when it is ready. SIGTERM lets running "
           "work finish and ends it. It ends with 75 when its device was lost: --supervise, or a "
           "service manager, starts it again. Settings come from the defaults, --config, CLAAS_* "
           "of the environment and the command line; a later one of these wins.",
};

/* --- signals ---------------------------------------------------------------------------------- */

static char crash_marker[4096]; /* "" = none */

/* Which marker a crash of this process leaves: the one that storage reads at its next start, or the
 * one that the scheduler reads. Without scheduler and trainer there is none, since no job runs
 * here. */
static void choose_marker(const struct process *process)
{
    const char *data = claas_config_string(process->config, "data");
    const char *name = NULL;

    if (process_has_role(process, "scheduler") || process_has_role(process, "trainer"))
        name =
            process_has_role(process, "storage") ? CLAAS_CRASH_MARKER : CLAAS_CRASH_MARKER_TRAINER;
    if (name)
        snprintf(crash_marker, sizeof(crash_marker), "%s/%s", data, name);
}

/* Leaves the marker, so that the crash counts against the jobs that ran. Async-signal-safe calls
 * only. */
__attribute__((unused)) static void on_crash(int number)
{
    int fd = crash_marker[0] == '\0'
                 ? -1
                 : open(crash_marker, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    char text[] = "signal 00\n";

    text[7] = (char)('0' + number / 10);
    text[8] = (char)('0' + number % 10);
    if (fd >= 0) {
        (void)!write(fd, text, sizeof(text) - 1);
        close(fd);
    }
    signal(number, SIG_DFL);
    raise(number);
}

/* Before any thread: SIGTERM and SIGINT are read by the runtime alone. */
static void prepare_signals(const struct process *process)
{
    sigset_t wanted;

    choose_marker(process);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGTERM);
    sigaddset(&wanted, SIGINT);
    sigaddset(&wanted, SIGHUP);
    sigprocmask(SIG_BLOCK, &wanted, NULL);
    signal(SIGPIPE, SIG_IGN);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* these report crashes */
    signal(SIGSEGV, on_crash);
    signal(SIGABRT, on_crash);
    signal(SIGBUS, on_crash);
    signal(SIGFPE, on_crash);
    signal(SIGILL, on_crash);
#endif
}

/* --- putting it together ---------------------------------------------------------------------- */

static int load_config(struct serve_args *args, struct process *process)
{
    CLAAS_AUTO_FREE char *absolute = NULL;
    int rc = claas_config_load(args->config_path, args->overrides, args->count, &process->config);
    const char *data;

    process->bad_config = rc < 0;
    if (rc < 0)
        return rc;
    /* Paths travel in messages to other processes, so the directory is named absolutely from here
     * on. */
    data = claas_config_string(process->config, "data");
    rc = claas_mkdir_all(data);
    if (rc < 0)
        return claas_fail(rc, "data: %s", claas_error_text());
    absolute = realpath(data, NULL);
    if (!absolute)
        return claas_fail_errno("data: %s", data);
    if (args->count + 2 > OVERRIDES_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "more than %d settings", OVERRIDES_MAX - 2);
    own_override(args, claas_format("data=%s", absolute));
    if (args->beside && !claas_config_string(process->config, "connect")[0])
        own_override(args, claas_format("connect=ipc://%s/claas.ipc", absolute));
    claas_config_free(&process->config);
    return claas_config_load(args->config_path, args->overrides, args->count, &process->config);
}

static void announce(const struct process *process)
{
    const char *listen = claas_config_string(process->config, "listen");
    const char *colon = strrchr(listen, ':');

    if (process_has_role(process, "bridge"))
        printf("listening on http://%.*s:%d\n", (int)(colon ? colon - listen : 0), listen,
               process->port);
    else
        printf("ready\n");
    fflush(stdout);
}

static bool needs_device(const struct process *process)
{
    return process_has_role(process, "trainer") || process_has_role(process, "sampler");
}

/* What no single setting shows to be wrong; checked before the model is read, which takes time. */
static int check_config(const struct process *process)
{
    int rc = process_check_roles(process);

    if (rc == 0)
        rc = claas_runtime_check(process->config);
    if (rc == 0 && process_has_role(process, "bridge"))
        rc = claas_bridge_check(process->config);
    if (rc == 0 && needs_device(process) && !claas_config_string(process->config, "model")[0])
        return claas_fail(CLAAS_ERR_INVALID,
                          "no model: give --model PATH (a GGUF file or a Hugging Face directory)");
    return rc;
}

/* What somebody else may have: found before the model is read, too. Whoever comes between is found
 * later. */
static int check_free(const struct process *process)
{
    int rc = claas_runtime_try(process->config);

    if (rc == 0 && process_has_role(process, "bridge"))
        rc = claas_bridge_try(process->config);
    return rc;
}

static int run(struct serve_args *args, struct process *process)
{
    enum claas_log_level level = CLAAS_LOG_INFO;
    int rc = load_config(args, process);

    if (rc < 0)
        return rc;
    claas_log_level_parse(claas_config_string(process->config, "log.level"), &level);
    claas_log_setup(level, claas_config_string(process->config, "log.format"));
    rc = check_config(process);
    process->bad_config = rc < 0;
    if (rc < 0)
        return rc;
    rc = check_free(process);
    if (rc < 0)
        return rc;
    prepare_signals(process);
    if (needs_device(process))
        rc = process_open_device(process);
    if (rc == 0) {
        rc = claas_runtime_new(process->config, &process->runtime);
        if (rc == CLAAS_ERR_CANCELLED) { /* the end was asked for before the other node came */
            claas_info("%s", claas_error_text());
            return 0;
        }
    }
    if (rc == 0)
        rc = process_start_actors(process);
    if (rc < 0)
        return rc;
    announce(process);
    return claas_runtime_wait(process->runtime);
}

/* The device is not freed: that could wait for ever on a lost one. The jobs are on disk. */
static _Noreturn void end_without_device(struct process *process)
{
    claas_runtime_free(&process->runtime);
    fprintf(stderr, "claas serve: ending with %d, to be started again\n", EXIT_CODE_AGAIN);
    _exit(EXIT_CODE_AGAIN);
}

static int serve(void *arg)
{
    struct serve_args *args = arg;
    struct process process = {0};
    int code = EXIT_CODE_OK, rc = run(args, &process);

    if (rc < 0)
        fprintf(stderr, "claas serve: %s\n", claas_error_text());
    if (rc == CLAAS_ERR_DEVICE_LOST)
        end_without_device(&process);
    if (process.bad_config)
        code = EXIT_CODE_CONFIG;
    else if (rc < 0)
        code = EXIT_CODE_FAILED;
    if (!process_done(&process))
        _exit(code);
    return code;
}

int verb_serve(int argc, char **argv)
{
    struct serve_args args = {0};
    int code;

    argp_parse(&serve_argp, argc, argv, 0, NULL, &args);
    code = args.supervise ? supervise(serve, &args) : serve(&args);
    for (size_t i = 0; i < args.count; i++)
        free(args.owned[i]);
    return code;
}
