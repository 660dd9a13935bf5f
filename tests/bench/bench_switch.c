/* Round trips and rates through the switch: an actor asks another one, one request at a time and 64
 * at a time; and the same from a client over ipc. Informational: jobs take seconds, a message some
 * tens of microseconds.
 *
 *   bench_switch [seconds per line, default 1] */
#include "claas/client.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/runtime.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SAMPLES_MAX 1000000

struct run {
    pthread_mutex_t lock;
    pthread_cond_t done;
    bool is_done;
    int window;
    int64_t seconds;
    /* results */
    int64_t started_ns, ended_ns, count, sent_ns[64];
    float *us;
};

struct asker {
    claas_actor_t *actor;
    struct run *run;
    int slots[64];
};

/* --- the answering actor -----------------------------------------------------------------------
 */

struct echo {
    claas_actor_t *actor;
};

static int handle_list(void *self, claas_message_t *message)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set(body, "adapters", cJSON_CreateArray());
    return claas_actor_reply(((struct echo *)self)->actor, &message->reply_to, body);
}

static int start_echo(claas_actor_t *actor, const void *args, void **ret_self)
{
    struct echo *echo = CLAAS_NEW(struct echo);

    echo->actor = actor;
    *ret_self = echo;
    return 0;
}

static void stop_any(void **self)
{
    free(*self);
    *self = NULL;
}

static const struct claas_handler echo_handlers[] = {{CLAAS_MSG_ADAPTER_LIST, handle_list}};
static const struct claas_actor_class echo_class = {"echo",     echo_handlers, 1,
                                                    start_echo, NULL,          stop_any};

/* --- the asking actor --------------------------------------------------------------------------
 */

static struct asker *asker_of_slot(int *slot)
{
    return (struct asker *)((char *)(slot - *slot) - offsetof(struct asker, slots));
}

static void ask_once(struct asker *asker, int *slot);

static void on_reply(void *self, void *arg, claas_message_t *reply)
{
    int *slot = arg;
    struct asker *asker = asker_of_slot(slot);
    struct run *run = asker->run;
    int64_t now = claas_clock_ns();

    if (reply->error < 0) {
        fprintf(stderr, "%s\n", reply->error_text);
        exit(1);
    }
    if (run->count < SAMPLES_MAX)
        run->us[run->count] = (float)((double)(now - run->sent_ns[*slot]) / 1000);
    run->count++;
    if (now - run->started_ns < run->seconds * 1000000000) {
        ask_once(asker, slot);
        return;
    }
    run->ended_ns = now;
    pthread_mutex_lock(&run->lock);
    run->is_done = true;
    pthread_cond_signal(&run->done);
    pthread_mutex_unlock(&run->lock);
}

static void ask_once(struct asker *asker, int *slot)
{
    asker->run->sent_ns[*slot] = claas_clock_ns();
    int rc = claas_actor_ask(asker->actor,
                             &(struct claas_ask){.to = "storage",
                                                 .type = CLAAS_MSG_ADAPTER_LIST,
                                                 .timeout_ms = 60000,
                                                 .reply = on_reply,
                                                 .arg = slot},
                             NULL);
    if (rc < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        exit(1);
    }
}

static void begin(void *self, void *arg)
{
    struct asker *asker = self;

    asker->run->started_ns = claas_clock_ns();
    for (int i = 0; i < asker->run->window; i++)
        ask_once(asker, &asker->slots[i]);
}

static int start_asker(claas_actor_t *actor, const void *args, void **ret_self)
{
    struct asker *asker = CLAAS_NEW(struct asker);

    asker->actor = actor;
    asker->run = (struct run *)args;
    for (int i = 0; i < 64; i++)
        asker->slots[i] = i;
    *ret_self = asker;
    return claas_actor_timer(actor, 0, begin, NULL) < 0 ? CLAAS_ERR_NO_MEMORY : 0;
}

static const struct claas_actor_class asker_class = {"asker", NULL, 0, start_asker, NULL, stop_any};

/* --- report ------------------------------------------------------------------------------------
 */

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

static void report(const char *what, struct run *run)
{
    size_t n = (size_t)(run->count < SAMPLES_MAX ? run->count : SAMPLES_MAX);
    double seconds = (double)(run->ended_ns - run->started_ns) / 1e9;

    qsort(run->us, n, sizeof(float), compare);
    printf("%-34s %9.0f round trips/s   p50 %7.1f us   p99 %7.1f us\n", what,
           (double)run->count / seconds, run->us[n / 2], run->us[n * 99 / 100]);
}

static void bench_actors(claas_runtime_t *runtime, struct run *run, int window, const char *name)
{
    char what[64];

    run->window = window;
    run->count = 0;
    run->is_done = false;
    if (claas_runtime_start(runtime, &asker_class, name, run) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        exit(1);
    }
    pthread_mutex_lock(&run->lock);
    while (!run->is_done)
        pthread_cond_wait(&run->done, &run->lock);
    pthread_mutex_unlock(&run->lock);
    snprintf(what, sizeof(what), "actor -> switch -> actor, window %d", window);
    report(what, run);
}

static void bench_client(const char *dir, struct run *run)
{
    claas_client_t *client = NULL;
    char endpoint[128];

    snprintf(endpoint, sizeof(endpoint), "ipc://%s/claas.ipc", dir);
    if (claas_client_new(endpoint, &client) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        exit(1);
    }
    run->count = 0;
    run->started_ns = claas_clock_ns();
    do {
        int64_t before = claas_clock_ns();

        if (claas_client_request(client, "storage", CLAAS_MSG_ADAPTER_LIST, NULL, 60000, NULL, NULL,
                                 NULL) < 0) {
            fprintf(stderr, "%s\n", claas_error_text());
            exit(1);
        }
        run->ended_ns = claas_clock_ns();
        if (run->count < SAMPLES_MAX)
            run->us[run->count] = (float)((double)(run->ended_ns - before) / 1000);
        run->count++;
    } while (run->ended_ns - run->started_ns < run->seconds * 1000000000);
    report("client -> ipc -> switch -> actor", run);
    claas_client_free(&client);
}

int main(int argc, char **argv)
{
    char dir[] = "/tmp/claas-bench-XXXXXX", data[64];
    const char *overrides[] = {data};
    claas_config_t *config = NULL;
    claas_runtime_t *runtime = NULL;
    struct run run = {.lock = PTHREAD_MUTEX_INITIALIZER,
                      .done = PTHREAD_COND_INITIALIZER,
                      .seconds = argc > 1 ? strtol(argv[1], NULL, 10) : 1};

    run.us = CLAAS_NEW_ARRAY(float, SAMPLES_MAX);
    if (!mkdtemp(dir))
        return 1;
    snprintf(data, sizeof(data), "data=%s", dir);
    if (claas_config_load(NULL, overrides, 1, &config) < 0 ||
        claas_runtime_new(config, &runtime) < 0 ||
        claas_runtime_start(runtime, &echo_class, "storage", NULL) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        return 1;
    }
    bench_actors(runtime, &run, 1, "asker.1");
    bench_actors(runtime, &run, 64, "asker.64");
    bench_client(dir, &run);
    claas_runtime_free(&runtime);
    claas_config_free(&config);
    free(run.us);
    return claas_remove_all(dir);
}
