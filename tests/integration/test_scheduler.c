/* The scheduler's state machine between a fake storage and a fake trainer that keep just enough of
 * a world (jobs, versions, events) to notice what would be lost, done twice or never done. The test
 * scripts them: the n-th call fails, fails after it has taken effect, waits, or is never answered.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "scheduler.h"

#define JOBS_MAX   16
#define CYCLES_MAX 64
#define GATHER_MAX 4
#define WAIT_S     20

/* --- the world ---------------------------------------------------------------------------------
 */

struct world_job {
    char id[16], lora_id[64], principal[16], state[16], key[16], feedback[32];
    int strikes;
    int64_t version;
    cJSON *events;
};

/* What the next calls of a message meet. */
struct script {
    int type, calls;
    int fail_count, code;
    bool after; /* fails when it has taken effect */
    bool hold;  /* is never answered */
    bool block; /* waits until the test clears it */
    int gather; /* answers when so many wait, all at once */
    struct claas_reply_to waiting[GATHER_MAX];
    int waiting_count;
    void (*hook)(void);
};

/* A cycle between CYCLE_BEGIN and CYCLE_END. */
struct open_cycle {
    char cycle_id[65], lora_id[64];
};

static struct world {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct world_job jobs[JOBS_MAX];
    int job_count;
    int64_t seq, versions[4], withdrawn; /* versions of the adapters that end in a … d */
    bool deleted, bad_gate;
    struct script scripts[32];
    char cycles[CYCLES_MAX][64]; /* the jobs of each CYCLE_BEGIN, "job-1 job-2 " */
    int64_t seeds[CYCLES_MAX];
    int cycle_count, ends;
    struct open_cycle open[CYCLES_MAX];
    int open_count, open_most;
    bool open_twice;  /* one adapter in two cycles at the same time */
    int trainer_jobs; /* what the trainer says to CYCLE_BEGIN, 0 = nothing */
} world = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static struct script *script_of(int type)
{
    struct script *script = world.scripts;

    while (script->type && script->type != type)
        script++;
    script->type = type;
    return script;
}

static struct script *script_lock(int type)
{
    pthread_mutex_lock(&world.lock);
    return script_of(type);
}

static void unlock(void)
{
    pthread_cond_broadcast(&world.changed);
    pthread_mutex_unlock(&world.lock);
}

static struct world_job *find_in(struct world *in, const char *id)
{
    for (int i = 0; i < in->job_count; i++)
        if (strcmp(in->jobs[i].id, id) == 0)
            return &in->jobs[i];
    return NULL;
}

static int64_t *version_of(const claas_message_t *message)
{
    const char *lora_id = "?";

    claas_json_get_string(message->body, "lora_id", &lora_id);
    lora_id += strlen(lora_id) - 1;
    assert_in_range(*lora_id, 'a', 'a' + CLAAS_COUNT(world.versions) - 1);
    return &world.versions[*lora_id - 'a'];
}

static struct world_job *find(const char *id)
{
    return find_in(&world, id);
}

static bool has_ended(const struct world_job *job)
{
    return strcmp(job->state, "done") == 0 || strcmp(job->state, "rejected") == 0 ||
           strcmp(job->state, "failed") == 0 || strcmp(job->state, "cancelled") == 0;
}

static cJSON *add_event(struct world_job *job, const char *state, const cJSON *given)
{
    cJSON *event = given ? cJSON_Duplicate(given, true) : cJSON_CreateObject();

    claas_json_set_string(event, "job_id", job->id);
    claas_json_set_int(event, "seq", ++world.seq);
    if (state) {
        claas_json_set_string(event, "state", state);
        claas_copy_text(job->state, sizeof(job->state), state);
    }
    cJSON_AddItemToArray(job->events, cJSON_Duplicate(event, true));
    return event;
}

static struct world_job *add_job(const char *lora_id, const char *principal)
{
    struct world_job *job = &world.jobs[world.job_count++];

    memset(job, 0, sizeof(*job));
    snprintf(job->id, sizeof(job->id), "job-%d", world.job_count);
    claas_copy_text(job->lora_id, sizeof(job->lora_id), lora_id);
    claas_copy_text(job->principal, sizeof(job->principal), principal);
    job->events = cJSON_CreateArray();
    cJSON_Delete(add_event(job, "queued", NULL));
    return job;
}

/* --- storage -----------------------------------------------------------------------------------
 */

/* Each answers with a body, or with an error; the world is locked. */
static int feedback_put(const claas_message_t *message, cJSON *reply)
{
    const cJSON *item = cJSON_GetArrayItem(claas_json_get(message->body, "requests"), 0);
    const char *lora_id = "", *key = NULL, *text = "";
    struct world_job *job = NULL;
    bool duplicate = false;

    claas_json_get_string(item, "lora_id", &lora_id);
    claas_json_get_string(item, "feedback", &text);
    claas_json_get_string(message->body, "idempotency_key", &key);
    for (int i = 0; key && i < world.job_count; i++)
        if (strcmp(world.jobs[i].key, key) == 0)
            job = &world.jobs[i];
    duplicate = job != NULL;
    if (!job)
        job = add_job(lora_id, message->principal);
    if (key)
        claas_copy_text(job->key, sizeof(job->key), key);
    claas_copy_text(job->feedback, sizeof(job->feedback), text);
    claas_json_set_string(reply, "job_id", job->id);
    claas_json_set_string(reply, "lora_id", job->lora_id);
    claas_json_set_bool(reply, "duplicate", duplicate);
    claas_json_set(reply, "event", cJSON_CreateObject());
    return 0;
}

/* Ended jobs refuse, as in storage: all of the list or none. */
static int check_open(const claas_message_t *message)
{
    const cJSON *id;

    cJSON_ArrayForEach(id, claas_json_get(message->body, "job_ids"))
    {
        const struct world_job *job = find(id->valuestring);

        if (!job)
            return claas_fail(CLAAS_ERR_NOT_FOUND, "no such job");
        if (has_ended(job))
            return claas_fail(CLAAS_ERR_CONFLICT, "job %s has ended", job->id);
    }
    return 0;
}

static int job_record(const claas_message_t *message, cJSON *reply)
{
    cJSON *events = claas_json_set(reply, "events", cJSON_CreateArray());
    const char *state = NULL;
    bool failure = false;
    int64_t strikes = 0;
    const cJSON *id;
    int rc = check_open(message);

    claas_json_get_string(message->body, "state", &state);
    claas_json_get_bool(message->body, "failure", &failure);
    cJSON_ArrayForEach(id, claas_json_get(message->body, "job_ids"))
    {
        struct world_job *job = find(id->valuestring);

        if (rc < 0)
            return rc;
        job->strikes += failure;
        strikes = job->strikes > strikes ? job->strikes : strikes;
        cJSON_AddItemToArray(events, add_event(job, state, claas_json_get(message->body, "event")));
    }
    claas_json_set_int(reply, "strikes", strikes);
    return 0;
}

static int jobs_unfinished(const claas_message_t *message, cJSON *reply)
{
    cJSON *list = claas_json_set(reply, "jobs", cJSON_CreateArray());

    (void)message;
    for (int i = 0; i < world.job_count; i++) {
        cJSON *json;

        if (has_ended(&world.jobs[i]))
            continue;
        json = cJSON_CreateObject();
        claas_json_set_string(json, "job_id", world.jobs[i].id);
        claas_json_set_string(json, "lora_id", world.jobs[i].lora_id);
        claas_json_set_string(json, "principal", world.jobs[i].principal);
        claas_json_set_int(json, "items", 1);
        claas_json_set_int(json, "strikes", world.jobs[i].strikes);
        cJSON_AddItemToArray(list, json);
    }
    return 0;
}

static int cycle_input(const claas_message_t *message, cJSON *reply)
{
    cJSON *items = claas_json_set(reply, "items", cJSON_CreateArray());
    const cJSON *id;
    int rc = world.deleted ? claas_fail(CLAAS_ERR_NOT_FOUND, "no adapter") : check_open(message);

    if (rc < 0)
        return rc;
    cJSON_ArrayForEach(id, claas_json_get(message->body, "job_ids"))
    {
        cJSON *item = cJSON_CreateObject();

        claas_json_set_string(item, "job_id", id->valuestring);
        claas_json_set_string(item, "feedback", find(id->valuestring)->feedback);
        cJSON_AddItemToArray(items, item);
    }
    claas_json_set_int(reply, "version", *version_of(message));
    claas_json_set_int(reply, "withdrawn", world.withdrawn);
    claas_json_set_string(reply, "directory", "/somewhere");
    claas_json_set_string(reply, "staging", "/staging");
    claas_json_set(reply, "replay", cJSON_CreateArray());
    claas_json_set(reply, "standing", cJSON_CreateArray());
    claas_json_set(reply, "recent", cJSON_CreateArray());
    return 0;
}

static int cycle_check(const claas_message_t *message, cJSON *reply)
{
    int64_t version = -1, withdrawn = -1;

    (void)reply;
    claas_json_get_int(message->body, "version", 0, 1000, &version);
    claas_json_get_int(message->body, "withdrawn", 0, 1000, &withdrawn);
    if (world.deleted)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "no adapter");
    if (version != *version_of(message) || withdrawn != world.withdrawn)
        return claas_fail(CLAAS_ERR_CONFLICT, "no longer so");
    return 0;
}

static int version_publish(const claas_message_t *message, cJSON *reply)
{
    cJSON *events = claas_json_set(reply, "events", cJSON_CreateArray());
    int64_t parent = -1, *version = version_of(message);
    const cJSON *id;
    int rc = check_open(message);

    claas_json_get_int(message->body, "parent", -1, 1000, &parent);
    if (rc == 0 && parent != *version)
        rc = claas_fail(CLAAS_ERR_CONFLICT, "the current version is another");
    if (rc < 0)
        return rc;
    ++*version;
    cJSON_ArrayForEach(id, claas_json_get(message->body, "job_ids"))
    {
        struct world_job *job = find(id->valuestring);

        job->version = *version;
        cJSON_AddItemToArray(events, add_event(job, "done", NULL));
    }
    claas_json_set_int(reply, "version", *version);
    claas_json_set_string(reply, "directory", "/v");
    return 0;
}

static int job_get(const claas_message_t *message, cJSON *reply)
{
    cJSON *body = claas_json_set(reply, "job", cJSON_CreateObject());
    const char *id = "";
    struct world_job *job;

    claas_json_get_string(message->body, "job_id", &id);
    job = find(id);
    if (!job || strcmp(job->principal, message->principal) != 0)
        return claas_fail(CLAAS_ERR_NOT_FOUND, "job not found: %s", id);
    claas_json_set_string(body, "job_id", id);
    claas_json_set_string(body, "state", job->state);
    claas_json_set(body, "events", cJSON_Duplicate(job->events, true));
    return 0;
}

/* --- trainer -----------------------------------------------------------------------------------
 */

static cJSON *figures(double nll)
{
    cJSON *json = cJSON_CreateObject();

    claas_json_set_number(json, "nll", nll);
    claas_json_set_number(json, "kl", 0);
    claas_json_set_number(json, "short_share", 0);
    claas_json_set_number(json, "distinct2", 1);
    return json;
}

static void open_cycle(const claas_message_t *message)
{
    struct open_cycle *cycle = &world.open[world.open_count];
    const char *cycle_id = "", *lora_id = "";

    claas_json_get_string(message->body, "cycle_id", &cycle_id);
    claas_json_get_string(message->body, "lora_id", &lora_id);
    for (int i = 0; i < world.open_count; i++)
        world.open_twice = world.open_twice || strcmp(world.open[i].lora_id, lora_id) == 0;
    claas_copy_text(cycle->cycle_id, sizeof(cycle->cycle_id), cycle_id);
    claas_copy_text(cycle->lora_id, sizeof(cycle->lora_id), lora_id);
    if (++world.open_count > world.open_most)
        world.open_most = world.open_count;
}

static int cycle_begin(const claas_message_t *message, cJSON *reply)
{
    char *ids = world.cycles[world.cycle_count];
    bool bad = false;
    const cJSON *item;

    assert_true(world.cycle_count < CYCLES_MAX);
    ids[0] = '\0';
    cJSON_ArrayForEach(item, claas_json_get(message->body, "items"))
    {
        const char *id = "", *text = "";

        claas_json_get_string(item, "job_id", &id);
        claas_json_get_string(item, "feedback", &text);
        bad = bad || strcmp(text, "bad") == 0;
        strncat(ids, id, sizeof(world.cycles[0]) - strlen(ids) - 2);
        strcat(ids, " ");
    }
    claas_json_get_int(message->body, "seed", 0, (int64_t)1 << 53,
                       &world.seeds[world.cycle_count++]);
    if (bad)
        return claas_fail(CLAAS_ERR_LIMIT, "the conversation is too long");
    open_cycle(message);
    if (world.trainer_jobs > 0)
        claas_json_set_int(reply, "jobs", world.trainer_jobs);
    claas_json_set(reply, "base", figures(1));
    claas_json_set_string(reply, "model", "tiny");
    claas_json_set_string(reply, "fingerprint", "f");
    claas_json_set_int(reply, "prompts", 12);
    return 0;
}

static int cycle_step(const claas_message_t *message, cJSON *reply)
{
    cJSON *metadata = claas_json_set(reply, "metadata", cJSON_CreateObject());

    (void)message;
    claas_json_set_number(metadata, "total_loss", 0.5);
    claas_json_set_bool(reply, "finite", true);
    claas_json_set(reply, "gate", figures(world.bad_gate ? 9 : 1));
    claas_json_set_number(reply, "score", 0.1);
    return 0;
}

static int cycle_keep(const claas_message_t *message, cJSON *reply)
{
    (void)message;
    (void)reply;
    return 0;
}

static int cycle_stage(const claas_message_t *message, cJSON *reply)
{
    (void)message;
    claas_json_set_string(reply, "directory", "/staging/x");
    claas_json_set_int(reply, "step", 1);
    return 0;
}

static int cycle_end(const claas_message_t *message, cJSON *reply)
{
    const char *cycle_id = "";

    (void)reply;
    claas_json_get_string(message->body, "cycle_id", &cycle_id);
    for (int i = 0; i < world.open_count; i++)
        if (strcmp(world.open[i].cycle_id, cycle_id) == 0)
            world.open[i] = world.open[--world.open_count];
    world.ends++;
    return 0;
}

static const struct {
    int type;
    int (*act)(const claas_message_t *message, cJSON *reply);
} acts[] = {
    {CLAAS_MSG_FEEDBACK_PUT, feedback_put},
    {CLAAS_MSG_JOB_RECORD, job_record},
    {CLAAS_MSG_JOBS_UNFINISHED, jobs_unfinished},
    {CLAAS_MSG_CYCLE_INPUT, cycle_input},
    {CLAAS_MSG_CYCLE_CHECK, cycle_check},
    {CLAAS_MSG_VERSION_PUBLISH, version_publish},
    {CLAAS_MSG_JOB_GET, job_get},
    {CLAAS_MSG_CYCLE_BEGIN, cycle_begin},
    {CLAAS_MSG_CYCLE_STEP, cycle_step},
    {CLAAS_MSG_CYCLE_KEEP, cycle_keep},
    {CLAAS_MSG_CYCLE_STAGE, cycle_stage},
    {CLAAS_MSG_CYCLE_END, cycle_end},
};

static int act(const claas_message_t *message, struct script *script, cJSON *reply)
{
    int fails = script->fail_count > 0 ? script->code : 0;
    int rc = 0;

    script->fail_count -= fails != 0;
    if (script->hook)
        script->hook();
    for (size_t i = 0; i < CLAAS_COUNT(acts); i++)
        if (acts[i].type == message->type && (!fails || script->after))
            rc = acts[i].act(message, reply);
    return fails ? claas_fail(fails, "as the test wants it") : rc;
}

static int answer(claas_actor_t *actor, const claas_message_t *message, struct script *script,
                  const struct claas_reply_to *to)
{
    CLAAS_AUTO(claas_json_free) cJSON *reply = cJSON_CreateObject();
    int rc = act(message, script, reply);

    if (rc < 0)
        return claas_actor_reply_error(actor, to, rc, claas_error_text());
    return claas_actor_reply(actor, to, CLAAS_TAKE(reply));
}

/* Whoever waits is answered by what the last one asks: these messages differ in nothing else. */
static int gather(claas_actor_t *actor, const claas_message_t *message, struct script *script)
{
    script->waiting[script->waiting_count++] = message->reply_to;
    if (script->waiting_count < script->gather)
        return 0;
    script->gather = 0;
    for (int i = 0; i < script->waiting_count; i++)
        answer(actor, message, script, &script->waiting[i]);
    script->waiting_count = 0;
    return 0;
}

static int fake_handle(void *self, claas_message_t *message)
{
    struct script *script = script_lock(message->type);
    int rc = 0;

    script->calls++;
    pthread_cond_broadcast(&world.changed);
    while (script->block)
        pthread_cond_wait(&world.changed, &world.lock);
    if (script->gather > 0)
        rc = gather(self, message, script);
    else if (!script->hold)
        rc = answer(self, message, script, &message->reply_to);
    unlock();
    return rc;
}

static int fake_start(claas_actor_t *actor, const void *args, void **ret_self)
{
    (void)args;
    *ret_self = actor;
    return 0;
}

static void fake_stop(void **self)
{
    *self = NULL;
}

static const struct claas_handler storage_handlers[] = {
    {CLAAS_MSG_FEEDBACK_PUT, fake_handle},    {CLAAS_MSG_JOB_RECORD, fake_handle},
    {CLAAS_MSG_JOBS_UNFINISHED, fake_handle}, {CLAAS_MSG_CYCLE_INPUT, fake_handle},
    {CLAAS_MSG_VERSION_PUBLISH, fake_handle}, {CLAAS_MSG_JOB_GET, fake_handle},
    {CLAAS_MSG_CYCLE_CHECK, fake_handle},
};
static const struct claas_handler trainer_handlers[] = {
    {CLAAS_MSG_CYCLE_BEGIN, fake_handle}, {CLAAS_MSG_CYCLE_STEP, fake_handle},
    {CLAAS_MSG_CYCLE_KEEP, fake_handle},  {CLAAS_MSG_CYCLE_STAGE, fake_handle},
    {CLAAS_MSG_CYCLE_END, fake_handle},
};
static const struct claas_actor_class storage_class = {
    "storage", storage_handlers, CLAAS_COUNT(storage_handlers), fake_start, NULL, fake_stop};
static const struct claas_actor_class trainer_class = {
    "trainer", trainer_handlers, CLAAS_COUNT(trainer_handlers), fake_start, NULL, fake_stop};

/* --- the process -------------------------------------------------------------------------------
 */

struct rig {
    char dir[64];
    claas_config_t *config;
    claas_runtime_t *runtime;
    struct probe *probe;
    struct claas_scheduler_args args;
};

static void rig_start(struct rig *rig)
{
    rig->args.config = rig->config;
    assert_int_equal(claas_runtime_new(rig->config, &rig->runtime), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &storage_class, "storage", NULL), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &trainer_class, "trainer.0", NULL), 0);
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_scheduler_class, "scheduler", &rig->args), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &driver_class, "driver", rig->probe), 0);
}

static void configure(struct rig *rig, const char *jobs, const char *retries)
{
    char data[96];
    const char *overrides[] = {data, jobs, retries, "cycle.steps=2", "log.level=error"};

    snprintf(data, sizeof(data), "data=%s", rig->dir);
    claas_config_free(&rig->config);
    assert_int_equal(claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &rig->config), 0);
}

static int set_up(void **state)
{
    struct rig *rig = CLAAS_NEW(struct rig);

    claas_copy_text(rig->dir, sizeof(rig->dir), "/tmp/claas-test-XXXXXX");
    assert_non_null(mkdtemp(rig->dir));
    configure(rig, "trainer.jobs=0", "cycle.retries=2");
    rig->probe = probe_new();
    world.job_count = world.cycle_count = world.ends = 0;
    world.open_count = world.open_most = world.trainer_jobs = 0;
    world.open_twice = false;
    world.seq = world.withdrawn = 0;
    memset(world.versions, 0, sizeof(world.versions));
    world.deleted = world.bad_gate = false;
    memset(world.scripts, 0, sizeof(world.scripts));
    *state = rig;
    return 0;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    claas_runtime_free(&rig->runtime);
    claas_config_free(&rig->config);
    probe_free(&rig->probe);
    claas_remove_all(rig->dir);
    for (int i = 0; i < world.job_count; i++)
        cJSON_Delete(world.jobs[i].events);
    free(rig);
    return 0;
}

/* --- what the tests do -------------------------------------------------------------------------
 */

static void fail_next(int type, int count, int code, bool after)
{
    struct script *script = script_lock(type);

    script->fail_count = count;
    script->code = code;
    script->after = after;
    unlock();
}

static void set_block(int type, bool block)
{
    script_lock(type)->block = block;
    unlock();
}

static void set_hold(int type, bool hold)
{
    script_lock(type)->hold = hold;
    unlock();
}

static void set_gather(int type, int count)
{
    script_lock(type)->gather = count;
    unlock();
}

static void set_hook(int type, void (*hook)(void))
{
    script_lock(type)->hook = hook;
    unlock();
}

/* The world as it is now, copied under its lock: actors go on writing it. */
static struct world *look(void)
{
    static struct world copy;

    pthread_mutex_lock(&world.lock);
    copy = world;
    unlock();
    return &copy;
}

static int calls_of(int type)
{
    int calls = script_lock(type)->calls;

    unlock();
    return calls;
}

/* Waits until `holds` says so; the world is locked in it. */
static void await(bool (*holds)(const void *arg), const void *arg, const char *what)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += WAIT_S;
    pthread_mutex_lock(&world.lock);
    while (!holds(arg)) {
        if (pthread_cond_timedwait(&world.changed, &world.lock, &until) != 0) {
            pthread_mutex_unlock(&world.lock);
            fail_msg("%s did not happen", what);
        }
    }
    pthread_mutex_unlock(&world.lock);
}

struct calls {
    int type, count;
};

static bool calls_made(const void *arg)
{
    const struct calls *calls = arg;

    return script_of(calls->type)->calls >= calls->count;
}

static void await_calls(int type, int count)
{
    await(calls_made, &(struct calls){type, count}, "a call");
}

static bool job_ended(const void *arg)
{
    const struct world_job *job = find(arg);

    return job && has_ended(job);
}

static const struct world_job *look_for(const char *id)
{
    return find_in(look(), id);
}

static void check_end(const char *id, const char *state)
{
    await(job_ended, id, id);
    assert_string_equal(look_for(id)->state, state);
}

static cJSON *feedback_body(const char *lora_id, const char *text, bool wait)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *requests = claas_json_set(body, "requests", cJSON_CreateArray());
    cJSON *item = cJSON_CreateObject();

    claas_json_set_string(item, "lora_id", lora_id);
    claas_json_set_string(item, "feedback", text);
    claas_json_set_string(item, "response_id", "chatcmpl-1");
    cJSON_AddItemToArray(requests, item);
    claas_json_set_bool(body, "wait", wait);
    return body;
}

static struct question ask_feedback(const char *lora_id, const char *text, bool wait)
{
    return (struct question){.to = "scheduler",
                             .type = CLAAS_MSG_FEEDBACK,
                             .body = feedback_body(lora_id, text, wait),
                             .timeout_ms = WAIT_S * 1000};
}

static void submit(struct rig *rig, const char *lora_id, const char *text)
{
    struct question question = ask_feedback(lora_id, text, false);

    assert_int_equal(probe_call(rig->probe, &question), 0);
}

static struct question ask_about(int type, const char *job_id)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "job_id", job_id);
    return (struct question){
        .to = "scheduler", .type = type, .body = body, .timeout_ms = WAIT_S * 1000};
}

/* --- tests -------------------------------------------------------------------------------------
 */

static void test_done(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"done\""));
    assert_int_equal(question.ends, 1);
    assert_true(question.progress >= 7); /* queued, batched, training, 2 steps, gating, … */
    assert_int_equal(look()->versions[0], 1);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_KEEP), 1); /* the second score is no better */
}

static void test_rejected(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    world.bad_gate = true;
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"rejected\""));
    assert_non_null(strstr(question.reply, "neutral text"));
    assert_int_equal(calls_of(CLAAS_MSG_VERSION_PUBLISH), 0);
    check_end("job-1", "rejected");
}

static void test_strikes_park(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_DEVICE, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
    assert_true(look()->seeds[0] == look()->seeds[1]);
}

static void test_absent_peers_are_no_strikes(void **state)
{
    struct rig *rig = *state;

    fail_next(CLAAS_MSG_CYCLE_BEGIN, 1, CLAAS_ERR_UNAVAILABLE, false);
    fail_next(CLAAS_MSG_CYCLE_STEP, 1, CLAAS_ERR_NOT_FOUND, false); /* the trainer started anew */
    fail_next(CLAAS_MSG_VERSION_PUBLISH, 1, CLAAS_ERR_OVERLOADED, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_int_equal(look()->versions[0], 1);
}

/* What a job's own kernels fault on would lose every device, one life after the other. */
static void test_job_that_loses_devices(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);

    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_DEVICE_LOST, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_int_equal(look_for("job-1")->strikes, 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
}

/* Two that wait are learnt together; what one of them spoils is not the other's fault. */
static void test_bad_company(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "first");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/a", "good");
    submit(rig, "me/a", "bad");
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "failed");
    assert_string_equal(look()->cycles[1], "job-2 job-3 ");
    assert_string_equal(look()->cycles[2], "job-2 ");
}

static void test_adapters_take_turns(void **state)
{
    struct rig *rig = *state;

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    submit(rig, "me/a", "2");
    submit(rig, "me/b", "3");
    submit(rig, "me/a", "4");
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-4", "done");
    assert_string_equal(look()->cycles[1], "job-3 ");
    assert_string_equal(look()->cycles[2], "job-2 job-4 ");
}

/* Cancelled twice in a cycle: it ends at once, and nothing of it goes on. */
static void test_cancel_in_a_cycle(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);
    struct question first = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");
    struct question second = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    rig_start(rig);
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_block(CLAAS_MSG_JOB_RECORD, true);
    probe_ask(rig->probe, &first);
    probe_ask(rig->probe, &second);
    set_block(CLAAS_MSG_JOB_RECORD, false);
    probe_await(rig->probe, &first);
    probe_await(rig->probe, &second);
    probe_await(rig->probe, &watch);
    assert_non_null(strstr(first.reply, "\"cancelled\":true"));
    assert_non_null(strstr(second.reply, "\"cancelled\":false"));
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
    await_calls(CLAAS_MSG_CYCLE_END, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/a", "next");
    check_end("job-2", "done");
    assert_int_equal(look()->cycle_count, 2);
    assert_string_equal(look()->cycles[1], "job-2 ");
}

/* The others of the cycle begin anew without it. */
static void test_cancel_one_of_two(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-2");

    add_job("me/a", "local");
    add_job("me/a", "local");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    check_end("job-1", "done");
    assert_string_equal(look_for("job-2")->state, "cancelled");
    assert_string_equal(look()->cycles[1], "job-1 ");
}

static void test_a_cancel_that_is_not_recorded(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    submit(rig, "me/a", "shorter");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_NO_SPACE, false);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    assert_non_null(strstr(cancel.reply, "\"cancelled\":false"));
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
}

static void test_jobs_of_others(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    add_job("you/a", "someone");
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    rig_start(rig);
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    assert_int_equal(probe_call(rig->probe, &cancel), CLAAS_ERR_NOT_FOUND);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
}

static void roll_back(void)
{
    script_of(CLAAS_MSG_CYCLE_STAGE)->hook = NULL;
    world.versions[0] = 40;
}

static void test_rollback_during_a_cycle(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STAGE, roll_back);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->version, 41);
    assert_int_equal(look()->cycle_count, 2);
}

static void withdraw(void)
{
    script_of(CLAAS_MSG_CYCLE_STEP)->hook = NULL;
    world.withdrawn++;
}

/* Withdrawn while the first step runs: no second one shows it to the teacher, and what was learnt
 * from it is dropped. */
static void test_feedback_withdrawn_during_a_cycle(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STEP, withdraw);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 1 + 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 2);
    assert_int_equal(calls_of(CLAAS_MSG_VERSION_PUBLISH), 1);
    assert_int_equal(look()->cycle_count, 2);
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_true(look()->seeds[0] == look()->seeds[1]);
}

static void withdraw_late(void)
{
    if (script_of(CLAAS_MSG_CYCLE_STEP)->calls == 2)
        withdraw();
}

/* In the last step: it is not published either. */
static void test_feedback_withdrawn_at_the_end(void **state)
{
    struct rig *rig = *state;

    set_hook(CLAAS_MSG_CYCLE_STEP, withdraw_late);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2 + 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STAGE), 1);
    assert_int_equal(look()->versions[0], 1);
}

/* Storage is away for a moment: no strike. */
static void test_a_check_without_answer(void **state)
{
    struct rig *rig = *state;

    fail_next(CLAAS_MSG_CYCLE_CHECK, 1, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
    assert_int_equal(look()->cycle_count, 2);
}

static void delete_adapter(void)
{
    script_of(CLAAS_MSG_CYCLE_STEP)->hook = NULL;
    cJSON_Delete(add_event(&world.jobs[0], "cancelled", NULL));
}

/* The name is taken anew at once, and its first feedback meets the old adapter's job. */
static void test_adapter_deleted_during_a_cycle(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    set_hook(CLAAS_MSG_CYCLE_STEP, delete_adapter);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &watch), 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
    submit(rig, "me/a", "new");
    check_end("job-2", "done");
    assert_string_equal(look()->cycles[look()->cycle_count - 1], "job-2 ");
    assert_true(calls_of(CLAAS_MSG_CYCLE_INPUT) <= 3);
}

static void test_adapter_deleted_while_jobs_wait(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_INPUT, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_INPUT, 1);
    pthread_mutex_lock(&world.lock);
    world.deleted = true;
    cJSON_Delete(add_event(&world.jobs[0], "cancelled", NULL));
    unlock();
    set_block(CLAAS_MSG_CYCLE_INPUT, false);
    probe_await(rig->probe, &watch);
    assert_int_equal(watch.code, 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"cancelled\""));
}

static void test_lost_answer_of_a_publication(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    fail_next(CLAAS_MSG_VERSION_PUBLISH, 1, CLAAS_ERR_UNAVAILABLE, true);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &watch), 0);
    assert_non_null(strstr(watch.reply, "\"state\":\"done\""));
    assert_int_equal(look()->versions[0], 1);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 2);
}

static void test_lost_answer_of_a_feedback(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", false);

    fail_next(CLAAS_MSG_FEEDBACK_PUT, 1, CLAAS_ERR_UNAVAILABLE, true);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_UNAVAILABLE);
    check_end("job-1", "done");
}

static void test_lost_answer_of_an_end(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "bad", true);

    /* batched, then failed */
    rig_start(rig);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    fail_next(CLAAS_MSG_JOB_RECORD, 1, CLAAS_ERR_CONFLICT, true);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    probe_await(rig->probe, &watch);
    assert_non_null(strstr(watch.reply, "\"state\":\"failed\""));
    assert_int_equal(look()->cycle_count, 1);
}

/* The end of the process answers who waits, and the next start makes the same cycle again. */
static void test_stop_and_start(void **state)
{
    struct rig *rig = *state;
    struct question watch = ask_feedback("me/a", "shorter", true);

    rig_start(rig);
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    probe_ask(rig->probe, &watch);
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    claas_runtime_free(&rig->runtime);
    assert_int_equal(watch.ends, 1);
    assert_true(watch.code < 0);
    assert_false(has_ended(&look()->jobs[0]));
    assert_int_equal(look()->ends, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    rig_start(rig);
    check_end("job-1", "done");
    assert_true(look()->seeds[0] == look()->seeds[1]);
}

/* --- several cycles at the same time */

/* Three wait for each other's step, which one after the other never would. */
static void test_adapters_learn_together(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_gather(CLAAS_MSG_CYCLE_STEP, 3);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    submit(rig, "me/d", "4");
    submit(rig, "me/a", "5");
    for (int i = 1; i <= 5; i++) {
        char id[16];

        snprintf(id, sizeof(id), "job-%d", i);
        check_end(id, "done");
        assert_int_equal(look_for(id)->strikes, 0);
    }
    assert_int_equal(look()->open_most, 3);
    assert_false(look()->open_twice);
    assert_int_equal(look()->versions[0], 2);
    assert_int_equal(look()->versions[3], 1);
    assert_int_equal(look_for("job-1")->version, 1);
    assert_int_equal(look_for("job-5")->version, 2);
    assert_string_equal(look()->cycles[3], "job-4 "); /* job-5's adapter had its turn */
}

/* While its adapter learns, a job waits, whatever room there is; another's goes on. */
static void test_one_adapter_one_cycle(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/a", "2");
    submit(rig, "me/b", "3");
    check_end("job-3", "done");
    assert_false(has_ended(look_for("job-2")));
    assert_int_equal(look()->cycle_count, 2);
    assert_string_equal(look()->cycles[1], "job-3 ");
    assert_false(look()->open_twice);
}

/* One until the trainer has said how many. */
static void test_the_trainer_says_how_many(void **state)
{
    struct rig *rig = *state;

    world.trainer_jobs = 2;
    set_gather(CLAAS_MSG_CYCLE_STEP, 2);
    set_block(CLAAS_MSG_CYCLE_BEGIN, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 1);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_INPUT), 1);
    set_block(CLAAS_MSG_CYCLE_BEGIN, false);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look()->open_most, 2);
}

/* Two jobs whose first steps end with `code`, together; retries=1. */
static void fail_together(struct rig *rig, int count, int code)
{
    configure(rig, "trainer.jobs=2", "cycle.retries=1");
    set_gather(CLAAS_MSG_CYCLE_STEP, 2);
    fail_next(CLAAS_MSG_CYCLE_STEP, count, code, false);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
}

/* Nobody pays for what happened in company: each has one more try, by itself. */
static void test_a_strike_in_company(void **state)
{
    struct rig *rig = *state;

    fail_together(rig, 2, CLAAS_ERR_DEVICE_LOST);
    await_calls(CLAAS_MSG_CYCLE_STEP, 2);
    pthread_mutex_lock(&world.lock);
    world.open_most = 0;
    unlock();
    check_end("job-1", "done");
    check_end("job-2", "done");
    assert_int_equal(look_for("job-1")->strikes, 1);
    assert_int_equal(look_for("job-2")->strikes, 1);
    assert_int_equal(look()->open_most, 1);
    assert_int_equal(look()->cycle_count, 4);
}

static void test_the_guilty_of_two(void **state)
{
    struct rig *rig = *state;
    bool first;

    fail_together(rig, 3, CLAAS_ERR_DEVICE_LOST);
    await(job_ended, "job-1", "job-1");
    await(job_ended, "job-2", "job-2");
    first = strcmp(look_for("job-1")->state, "failed") == 0;
    assert_string_equal(look_for(first ? "job-1" : "job-2")->state, "failed");
    assert_int_equal(look_for(first ? "job-1" : "job-2")->strikes, 2);
    assert_string_equal(look_for(first ? "job-2" : "job-1")->state, "done");
}

/* A device too full for two: no strike, and one after the other. The last one's is a strike. */
static void test_a_full_device(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    configure(rig, "trainer.jobs=2", "cycle.retries=1");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    await_calls(CLAAS_MSG_CYCLE_STEP, 1);
    fail_next(CLAAS_MSG_CYCLE_BEGIN, 1, CLAAS_ERR_NO_MEMORY, false);
    submit(rig, "me/b", "2");
    await_calls(CLAAS_MSG_CYCLE_BEGIN, 2);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    submit(rig, "me/c", "3"); /* there is no room for it now */
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_BEGIN), 2);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look_for("job-2")->strikes, 0);
    assert_int_equal(look()->open_most, 1);
}

static void test_cancel_beside_another(void **state)
{
    struct rig *rig = *state;
    struct question cancel = ask_about(CLAAS_MSG_JOB_CANCEL, "job-1");

    configure(rig, "trainer.jobs=2", "cycle.retries=2");
    set_gather(CLAAS_MSG_CYCLE_STEP, 3);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    await_calls(CLAAS_MSG_CYCLE_STEP, 2);
    assert_int_equal(probe_call(rig->probe, &cancel), 0);
    assert_non_null(strstr(cancel.reply, "\"cancelled\":true"));
    submit(rig, "me/c", "3"); /* in its place: the third who is gathered */
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_string_equal(look_for("job-1")->state, "cancelled");
    assert_int_equal(look()->versions[0], 0);
    assert_int_equal(look()->cycle_count, 3);
}

static void test_stop_and_start_with_several(void **state)
{
    struct rig *rig = *state;

    configure(rig, "trainer.jobs=3", "cycle.retries=2");
    set_hold(CLAAS_MSG_CYCLE_STEP, true);
    rig_start(rig);
    submit(rig, "me/a", "1");
    submit(rig, "me/b", "2");
    submit(rig, "me/c", "3");
    await_calls(CLAAS_MSG_CYCLE_STEP, 3);
    claas_runtime_free(&rig->runtime);
    assert_int_equal(look()->ends, 3);
    assert_int_equal(look()->open_count, 0);
    set_hold(CLAAS_MSG_CYCLE_STEP, false);
    rig_start(rig);
    check_end("job-1", "done");
    check_end("job-2", "done");
    check_end("job-3", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
}

static const char *marker_path;

static void crash(void)
{
    FILE *file = fopen(marker_path, "w");

    assert_non_null(file);
    assert_true(fputs("signal 11\n", file) >= 0);
    assert_int_equal(fclose(file), 0);
}

/* A trainer in another process: its crash is known by its marker. */
static void test_a_job_that_crashes_the_trainer(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);
    char path[96];

    snprintf(path, sizeof(path), "%s/%s", rig->dir, CLAAS_CRASH_MARKER_TRAINER);
    marker_path = path;
    set_hook(CLAAS_MSG_CYCLE_STEP, crash);
    fail_next(CLAAS_MSG_CYCLE_STEP, 9, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"state\":\"failed\""));
    assert_non_null(strstr(question.reply, "the trainer crashed while it worked (signal 11)"));
    assert_int_equal(look_for("job-1")->strikes, 2);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 2);
}

/* An old marker says nothing about a trainer that goes away. */
static void test_a_trainer_that_is_killed(void **state)
{
    struct rig *rig = *state;
    struct timespec moment = {.tv_nsec = 20000000};
    char path[96];

    snprintf(path, sizeof(path), "%s/%s", rig->dir, CLAAS_CRASH_MARKER_TRAINER);
    marker_path = path;
    crash();
    nanosleep(&moment, NULL); /* the granularity of a file's time */
    fail_next(CLAAS_MSG_CYCLE_STEP, 2, CLAAS_ERR_UNAVAILABLE, false);
    rig_start(rig);
    submit(rig, "me/a", "shorter");
    check_end("job-1", "done");
    assert_int_equal(look_for("job-1")->strikes, 0);
}

static void test_training_values(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_feedback("me/a", "shorter", true);
    cJSON *training;

    rig_start(rig);
    training = claas_json_set(question.body, "training", cJSON_CreateObject());
    claas_json_set_number(training, "steps", 2.5);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_UNPROCESSABLE);
    question = ask_feedback("me/a", "shorter", true);
    training = claas_json_set(question.body, "training", cJSON_CreateObject());
    claas_json_set_number(training, "steps", 1);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_int_equal(calls_of(CLAAS_MSG_CYCLE_STEP), 1);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_done),
        TEST(test_rejected),
        TEST(test_strikes_park),
        TEST(test_absent_peers_are_no_strikes),
        TEST(test_job_that_loses_devices),
        TEST(test_bad_company),
        TEST(test_adapters_take_turns),
        TEST(test_cancel_in_a_cycle),
        TEST(test_cancel_one_of_two),
        TEST(test_a_cancel_that_is_not_recorded),
        TEST(test_jobs_of_others),
        TEST(test_rollback_during_a_cycle),
        TEST(test_feedback_withdrawn_during_a_cycle),
        TEST(test_feedback_withdrawn_at_the_end),
        TEST(test_a_check_without_answer),
        TEST(test_adapter_deleted_during_a_cycle),
        TEST(test_adapter_deleted_while_jobs_wait),
        TEST(test_lost_answer_of_a_publication),
        TEST(test_lost_answer_of_a_feedback),
        TEST(test_lost_answer_of_an_end),
        TEST(test_stop_and_start),
        TEST(test_adapters_learn_together),
        TEST(test_one_adapter_one_cycle),
        TEST(test_the_trainer_says_how_many),
        TEST(test_a_strike_in_company),
        TEST(test_the_guilty_of_two),
        TEST(test_a_full_device),
        TEST(test_cancel_beside_another),
        TEST(test_stop_and_start_with_several),
        TEST(test_a_job_that_crashes_the_trainer),
        TEST(test_a_trainer_that_is_killed),
        TEST(test_training_values),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
