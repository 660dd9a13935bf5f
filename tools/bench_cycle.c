/* `claas bench cycle`: whole learning cycles, from feedback that arrives to a version that is
 * current. A server without HTTP runs in this process on a directory of its own; a client gives
 * each cycle a new adapter, an answer and feedback on it. What is reported is what the jobs
 * recorded: the times of their transitions, and of the parts of each step. The same seeds make
 * every cycle the same work.
 *
 * Counted work is what the figures tell, less than what was done: with N weights of the layers, H
 * of the head, A of the adapter, 2 (N + A) for each token of a prompt that rollouts computed,
 * 2 (N + H + A) for each sampled one, 6 (N + H + A) for each trained one (forward for student and
 * teacher, the gradient of the inputs; see step), 2 (N + H + A) for each one that the gate scored.
 * The prompts of what was trained and scored, which rows share, are not in the figures, nor is
 * attention.
 *
 * Counted reading: the weights of the layers once in each pass of generation, and all weights three
 * times in each step, as in `step`. */
#include "bench.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/client.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "process.h"
#include "verbs.h"

#define SETTINGS_MAX  16
#define ASK_MS        600000 /* the chat is the longest of the requests */
#define LOOK_MS       50     /* the end's time is in the job; this is how often it is looked for */
#define WARM_UP_STEPS 2
#define ANSWER_TOKENS 64
#define QUESTION      "What is gravity?"
#define FEEDBACK      "Too long. Answer in one short sentence."
#define EXPLICIT_RATE 1e-4
#define TIME_MAX      ((int64_t)1 << 53)

struct bench_server {
    char directory[512]; /* "" = not made */
    struct process process;
    claas_client_t *client;
    sigset_t ends; /* blocked everywhere: what was written must be removed first */
};

/* Milliseconds, and counts of tokens, of one cycle. */
struct cycle_figures {
    double total, rollout, teacher, train, gate;
    /* The rest: before the first step, between the steps' parts, after the last one. */
    double begin, between, end;
    /* Reading and writing the adapter's directory, and moving it to the device and back: most of it
     * at the same time as the rest. */
    double read, write, upload, download;
    int64_t steps, rows, tokens;
    uint64_t prefilled, decoded, trained, passes; /* trained: and scored by the gate */
    bool published;
};

/* --- the server ------------------------------------------------------------------------------- */

struct settings {
    char *texts[SETTINGS_MAX];
    size_t count;
};

static void settings_done(struct settings *settings)
{
    for (size_t i = 0; i < settings->count; i++)
        free(settings->texts[i]);
}

static void set(struct settings *settings, const char *key, const char *value)
{
    if (settings->count < SETTINGS_MAX)
        settings->texts[settings->count++] = claas_format("%s=%s", key, value);
}

/* 0 leaves the setting as it is: the model's recipe. */
static void set_int(struct settings *settings, const char *key, int value)
{
    char text[16];

    snprintf(text, sizeof(text), "%d", value);
    if (value > 0)
        set(settings, key, text);
}

static int load_config(struct bench_server *server, const struct bench_args *args)
{
    CLAAS_AUTO(settings_done) struct settings settings = {0};
    CLAAS_AUTO_FREE char *model = bench_model_path(args->model);

    if (model == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    set(&settings, "data", server->directory);
    set(&settings, "roles", "storage,scheduler,trainer,sampler");
    set(&settings, "connect", "");
    set(&settings, "model", model);
    set(&settings, "cycle.seed", "1");
    if (args->device != NULL)
        set(&settings, "device.name", args->device);
    if (args->precision != NULL)
        set(&settings, "device.precision", args->precision);
    if (args->chat_template != NULL)
        set(&settings, "chat_template", args->chat_template);
    set_int(&settings, "device.threads", args->threads);
    set_int(&settings, "cycle.rows", args->rows);
    set_int(&settings, "cycle.steps", args->steps);
    set_int(&settings, "cycle.max_tokens", args->tokens);
    for (size_t i = 0; i < settings.count; i++)
        if (settings.texts[i] == NULL)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_config_load(NULL, (const char *const *)settings.texts, settings.count,
                             &server->process.config);
}

static int make_directory(struct bench_server *server)
{
    const char *parent = getenv("TMPDIR");
    char path[sizeof(server->directory)];

    if (parent == NULL || parent[0] == '\0')
        parent = "/tmp";
    snprintf(path, sizeof(path), "%s/claas-bench-XXXXXX", parent);
    if (mkdtemp(path) == NULL)
        return claas_fail_errno("a directory in %s", parent);
    claas_copy_text(server->directory, sizeof(server->directory), path);
    return 0;
}

static int open_server(struct bench_server *server, const struct bench_args *args)
{
    struct process *process = &server->process;
    CLAAS_AUTO_FREE char *endpoint = NULL;
    int rc;

    sigemptyset(&server->ends);
    sigaddset(&server->ends, SIGINT);
    sigaddset(&server->ends, SIGTERM);
    sigaddset(&server->ends, SIGHUP);
    sigprocmask(SIG_BLOCK, &server->ends, NULL);
    signal(SIGPIPE, SIG_IGN);
    claas_log_setup(CLAAS_LOG_WARNING, "text");
    rc = make_directory(server);
    if (rc == 0)
        rc = load_config(server, args);
    if (rc == 0)
        rc = bench_fail_model(process_open_device(process), args->model);
    if (rc == 0)
        rc = claas_runtime_new(process->config, &process->runtime);
    if (rc == 0)
        rc = process_start_actors(process);
    if (rc < 0)
        return rc;
    endpoint = claas_format("ipc://%s/claas.ipc", server->directory);
    if (endpoint == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_client_new(endpoint, &server->client);
}

static void close_server(struct bench_server *server)
{
    CLAAS_AUTO_FREE char *failure = claas_strdup(claas_error_text());
    bool is_clean;

    claas_client_free(&server->client);
    is_clean = process_done(&server->process);
    if (server->directory[0] != '\0' && claas_remove_all(server->directory) < 0)
        fprintf(stderr, "claas bench cycle: %s is left behind: %s\n", server->directory,
                claas_error_text());
    if (is_clean)
        return;
    fprintf(stderr, "claas bench cycle: %s\n", failure && failure[0] ? failure : "a thread stays");
    fflush(stdout);
    _exit(EXIT_CODE_FAILED); /* a thread still uses `server` */
}

/* --- one cycle -------------------------------------------------------------------------------- */

static int ask(struct bench_server *server, const char *to, int type, cJSON *body, cJSON **ret)
{
    return claas_client_request(server->client, to, type, body, ASK_MS, NULL, NULL, ret);
}

static int make_adapter(struct bench_server *server, const char *name)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "lora_id", name);
    return ask(server, "trainer", CLAAS_MSG_ADAPTER_INIT, body, NULL);
}

/* An answer to give feedback on; free *ret. */
static int chat(struct bench_server *server, const char *name, char **ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    cJSON *body = cJSON_CreateObject(), *message = cJSON_CreateObject();
    const char *id = "";
    int rc;

    claas_json_set_string(message, "role", "user");
    claas_json_set_string(message, "content", QUESTION);
    claas_json_set_string(body, "model", name);
    cJSON_AddItemToArray(claas_json_set(body, "messages", cJSON_CreateArray()), message);
    claas_json_set_int(body, "max_tokens", ANSWER_TOKENS);
    claas_json_set_int(body, "seed", 1);
    rc = ask(server, "sampler", CLAAS_MSG_CHAT, body, &reply);
    if (rc < 0)
        return rc;
    claas_json_get_string(reply, "id", &id);
    *ret = claas_strdup(id);
    return *ret != NULL ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* `steps`: of a cycle with explicit values; 0 = the default cycle. The job's id; free *ret. */
static int send_feedback(struct bench_server *server, const char *name, const char *response,
                         int steps, char **ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    cJSON *body = cJSON_CreateObject(), *request = cJSON_CreateObject();
    const char *id = "";
    int rc;

    claas_json_set_string(request, "lora_id", name);
    claas_json_set_string(request, "feedback", FEEDBACK);
    claas_json_set_string(request, "response_id", response);
    cJSON_AddItemToArray(claas_json_set(body, "requests", cJSON_CreateArray()), request);
    if (steps > 0) {
        cJSON *training = claas_json_set(body, "training", cJSON_CreateObject());

        claas_json_set_int(training, "steps", steps);
        claas_json_set_number(training, "learning_rate", EXPLICIT_RATE);
    }
    rc = ask(server, "scheduler", CLAAS_MSG_FEEDBACK, body, &reply);
    if (rc < 0)
        return rc;
    claas_json_get_string(reply, "job_id", &id);
    *ret = claas_strdup(id);
    return *ret != NULL ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static bool is_ended(const cJSON *job)
{
    static const char *const ends[] = {"done", "rejected", "failed", "cancelled"};
    const char *state = "";

    claas_json_get_string(job, "state", &state);
    for (size_t i = 0; i < CLAAS_COUNT(ends); i++)
        if (strcmp(state, ends[i]) == 0)
            return true;
    return false;
}

/* The reply of JOB_GET once the job has ended. */
static int await_end(struct bench_server *server, const char *id, cJSON **ret)
{
    const struct timespec pause = {.tv_nsec = LOOK_MS * 1000000L};

    for (;;) {
        CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
        cJSON *body = cJSON_CreateObject();
        int rc;

        claas_json_set_string(body, "job_id", id);
        rc = ask(server, "storage", CLAAS_MSG_JOB_GET, body, &reply);
        if (rc < 0)
            return rc;
        if (is_ended(claas_json_get(reply, "job"))) {
            *ret = CLAAS_TAKE(reply);
            return 0;
        }
        if (sigtimedwait(&server->ends, NULL, &pause) > 0)
            return claas_fail(CLAAS_ERR_CANCELLED, "interrupted");
    }
}

static double number(const cJSON *object, const char *key)
{
    double value = 0;

    claas_json_get_number(object, key, 0, 1e15, &value);
    return value;
}

static double transition_time(const cJSON *transition)
{
    int64_t time = 0;

    claas_json_get_int(transition, "time", 0, TIME_MAX, &time);
    return (double)time;
}

/* When the job came to a state for the last time; the job's beginning if it never did. */
static double state_time(const cJSON *transitions, const char *state)
{
    double time = transition_time(cJSON_GetArrayItem(transitions, 0));
    const cJSON *transition;

    cJSON_ArrayForEach(transition, transitions)
    {
        const char *name = "";

        claas_json_get_string(transition, "state", &name);
        if (strcmp(name, state) == 0)
            time = transition_time(transition);
    }
    return time;
}

/* What the steps do not report. */
static void set_rest(const cJSON *transitions, struct cycle_figures *figures)
{
    double first = transition_time(cJSON_GetArrayItem(transitions, 0));
    double begun = state_time(transitions, "training"), ended = state_time(transitions, "gating");

    figures->begin = begun - first;
    figures->between =
        ended - begun - figures->rollout - figures->teacher - figures->train - figures->gate;
    figures->end = first + figures->total - ended;
}

static int read_job(const cJSON *job, struct cycle_figures *figures)
{
    const cJSON *transitions = claas_json_get(job, "transitions"), *step;
    const char *state = "", *error = "";
    int last = cJSON_GetArraySize(transitions) - 1;

    claas_json_get_string(job, "state", &state);
    claas_json_get_string(job, "error", &error);
    figures->published = strcmp(state, "done") == 0;
    if ((!figures->published && strcmp(state, "rejected") != 0) || last < 1)
        return claas_fail(CLAAS_ERR_INTERNAL, "the cycle ended %s: %s", state, error);
    figures->total = transition_time(cJSON_GetArrayItem(transitions, last)) -
                     transition_time(cJSON_GetArrayItem(transitions, 0));
    cJSON_ArrayForEach(step, claas_json_get(claas_json_get(job, "result"), "steps"))
    {
        figures->steps++;
        figures->rollout += number(step, "rollout_ms");
        figures->teacher += number(step, "teacher_ms");
        figures->train += number(step, "train_ms");
        figures->gate += number(step, "gate_ms");
        figures->tokens += (int64_t)number(step, "tokens_processed");
        if (figures->rows < (int64_t)number(step, "batch_size"))
            figures->rows = (int64_t)number(step, "batch_size");
    }
    set_rest(transitions, figures);
    return 0;
}

static int run_cycle(struct bench_server *server, int cycle, int steps, struct cycle_figures *ret)
{
    CLAAS_AUTO_FREE char *response = NULL, *id = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    struct claas_device_stats before, after;
    char name[32];
    int rc;

    snprintf(name, sizeof(name), "bench/cycle-%d", cycle);
    rc = make_adapter(server, name);
    if (rc == 0)
        rc = chat(server, name, &response);
    if (rc < 0)
        return rc;
    claas_device_stats(server->process.device, &before);
    rc = send_feedback(server, name, response, steps, &id);
    if (rc == 0)
        rc = await_end(server, id, &reply);
    if (rc < 0)
        return rc;
    claas_device_stats(server->process.device, &after);
    *ret = (struct cycle_figures){
        .prefilled = after.tokens_prefilled - before.tokens_prefilled,
        .decoded = after.tokens_decoded - before.tokens_decoded,
        .trained = after.tokens_trained - before.tokens_trained,
        .passes = after.passes - before.passes,
        .read = (double)(after.read_ns - before.read_ns) * 1e-6,
        .write = (double)(after.write_ns - before.write_ns) * 1e-6,
        .upload = (double)(after.upload_ns - before.upload_ns) * 1e-6,
        .download = (double)(after.download_ns - before.download_ns) * 1e-6,
    };
    return read_job(claas_json_get(reply, "job"), ret);
}

/* --- all of them ------------------------------------------------------------------------------ */

static int compare(const void *a, const void *b)
{
    double x = ((const struct cycle_figures *)a)->total;
    double y = ((const struct cycle_figures *)b)->total;

    return (x > y) - (x < y);
}

static struct bench_work count_work(const struct bench_rig *rig, double rank,
                                    const struct cycle_figures *cycle)
{
    double lora = rig->lora_per_rank * rank, all = rig->body + rig->head + lora;
    double steps = (double)cycle->steps, tokens = (double)cycle->tokens;

    return (struct bench_work){
        .flop = 2 * (rig->body + lora) * (double)cycle->prefilled +
                2 * all * (double)cycle->decoded + 6 * all * tokens +
                2 * all * ((double)cycle->trained - tokens),
        .bytes = rig->body_bytes * (double)cycle->passes +
                 3 * (rig->body_bytes + rig->head_bytes) * steps,
        .ms = cycle->total,
    };
}

static void set_ms(cJSON *line, const char *key, double ms)
{
    claas_json_set_number(line, key, round(ms * 1000) / 1000);
}

/* The parts are those of one cycle, the one in the middle, so that they add up to its time. */
static int report(struct bench_server *server, const struct bench_args *args,
                  struct cycle_figures *cycles, const struct claas_device_floor *floor)
{
    struct bench_rig rig = {
        .device = server->process.device,
        .model = server->process.model,
        .config = claas_model_config(server->process.model),
    };
    const struct cycle_figures *middle = &cycles[args->iterations / 2];
    struct bench_work work;
    int published = 0;
    cJSON *line;

    for (int i = 0; i < args->iterations; i++)
        published += cycles[i].published;
    qsort(cycles, (size_t)args->iterations, sizeof(*cycles), compare);
    claas_copy_text(rig.name, sizeof(rig.name), claas_model_name(rig.model));
    bench_measure_model(&rig);
    work =
        count_work(&rig, (double)claas_config_int(server->process.config, "adapter.rank"), middle);
    line = bench_line(&rig, "cycle");
    claas_json_set_int(line, "steps", middle->steps);
    claas_json_set_int(line, "rows", middle->rows);
    claas_json_set_int(line, "rollout_tokens",
                       claas_config_int(server->process.config, "cycle.max_tokens"));
    claas_json_set_int(line, "iterations", args->iterations);
    claas_json_set_int(line, "published", published);
    claas_json_set_number(line, "median_ms", middle->total);
    claas_json_set_number(line, "min_ms", cycles[0].total);
    claas_json_set_number(line, "rollout_ms", middle->rollout);
    claas_json_set_number(line, "teacher_ms", middle->teacher);
    claas_json_set_number(line, "train_ms", middle->train);
    claas_json_set_number(line, "gate_ms", middle->gate);
    set_ms(line, "other_ms", middle->begin + middle->between + middle->end);
    set_ms(line, "begin_ms", middle->begin);
    set_ms(line, "between_ms", middle->between);
    set_ms(line, "end_ms", middle->end);
    set_ms(line, "adapter_read_ms", middle->read);
    set_ms(line, "adapter_upload_ms", middle->upload);
    set_ms(line, "adapter_download_ms", middle->download);
    set_ms(line, "adapter_write_ms", middle->write);
    claas_json_set_int(line, "tokens", middle->tokens);
    claas_json_set_int(line, "prefilled_tokens", (int64_t)middle->prefilled);
    claas_json_set_int(line, "decoded_tokens", (int64_t)middle->decoded);
    bench_add_rates(line, &work, floor);
    bench_add_memory(line, &rig);
    return bench_print(args, line);
}

int bench_cycle(const struct bench_args *args)
{
    CLAAS_AUTO(close_server) struct bench_server server = {0};
    CLAAS_AUTO_FREE struct cycle_figures *cycles =
        CLAAS_NEW_ARRAY(struct cycle_figures, (size_t)args->iterations);
    struct claas_device_floor floor;
    struct cycle_figures warm_up;
    int rc;

    if (cycles == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = bench_floor(args, &floor);
    if (rc == 0)
        rc = open_server(&server, args);
    /* The base's own figures, which every later cycle of a process finds measured, and the memory
     * of a step. */
    if (rc == 0)
        rc = run_cycle(&server, 0, WARM_UP_STEPS, &warm_up);
    for (int i = 0; rc == 0 && i < args->iterations; i++)
        rc = run_cycle(&server, i + 1, 0, &cycles[i]);
    return rc < 0 ? rc : report(&server, args, cycles, &floor);
}
