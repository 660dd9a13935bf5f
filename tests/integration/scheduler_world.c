/* The world around the scheduler: see scheduler_world.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "scheduler_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

/* --- the world ---------------------------------------------------------------------------------
 */

struct world world = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

struct script *script_of(int type)
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

void unlock(void)
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

bool has_ended(const struct world_job *job)
{
    return strcmp(job->state, "done") == 0 || strcmp(job->state, "rejected") == 0 ||
           strcmp(job->state, "failed") == 0 || strcmp(job->state, "cancelled") == 0;
}

cJSON *add_event(struct world_job *job, const char *state, const cJSON *given)
{
    cJSON *event = given ? cJSON_Duplicate(given, true) : cJSON_CreateObject();

    claas_json_set_string(event, "job_id", job->id);
    claas_json_set_int(event, "seq", ++world.seq);
    if (state) {
        claas_json_set_string(event, "state", state);
        claas_copy_text(job->state, sizeof(job->state), state);
    }
    job->updated = claas_clock_unix_ms();
    cJSON_AddItemToArray(job->events, cJSON_Duplicate(event, true));
    return event;
}

int count_state(const struct world_job *job, const char *state)
{
    const cJSON *event;
    int count = 0;

    cJSON_ArrayForEach(event, job->events)
    {
        const char *its = "";

        claas_json_get_string(event, "state", &its);
        count += strcmp(its, state) == 0;
    }
    return count;
}

struct world_job *add_job(const char *lora_id, const char *principal)
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
    const char *after = NULL;
    int64_t limit = 1000;
    int first = 0;

    claas_json_get_int(message->body, "limit", 1, 1000, &limit);
    if (claas_json_get_string(message->body, "after", &after) == 1)
        first = (int)(find(after) - world.jobs) + 1;
    for (int i = first; i < world.job_count && cJSON_GetArraySize(list) < limit; i++) {
        cJSON *json;

        if (has_ended(&world.jobs[i]))
            continue;
        json = cJSON_CreateObject();
        claas_json_set_string(json, "job_id", world.jobs[i].id);
        claas_json_set_string(json, "lora_id", world.jobs[i].lora_id);
        claas_json_set_string(json, "principal", world.jobs[i].principal);
        claas_json_set_string(json, "state", world.jobs[i].state);
        claas_json_set_int(json, "updated", world.jobs[i].updated);
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

/* --- sampler -----------------------------------------------------------------------------------
 */

static int model_info(const claas_message_t *message, cJSON *reply)
{
    (void)message;
    claas_json_set_string(reply, "name", "tiny");
    claas_json_set_string(reply, "fingerprint", "f");
    claas_json_set_int(reply, "context", 128);
    claas_json_set_string(reply, "chat_template", "chatml");
    claas_json_set(reply, "device", cJSON_CreateObject());
    claas_json_set_int(reply, "created", 1);
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
    const char *model = "", *fingerprint = "";
    const cJSON *item;

    claas_json_get_string(message->body, "model", &model);
    claas_json_get_string(message->body, "fingerprint", &fingerprint);
    assert_string_equal(model, "tiny");
    assert_string_equal(fingerprint, "f");
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
    {CLAAS_MSG_MODEL_INFO, model_info},
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
    return fails ? claas_fail(fails, "as the test wants it %0*d", FAILURE_BYTES - 21, 0) : rc;
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
    if (world.more_end && message->type == CLAAS_MSG_JOBS_UNFINISHED)
        claas_actor_tell(self, "scheduler", CLAAS_MSG_JOBS_ENDED, NULL);
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
static const struct claas_handler sampler_handlers[] = {
    {CLAAS_MSG_MODEL_INFO, fake_handle},
};
static const struct claas_handler trainer_handlers[] = {
    {CLAAS_MSG_CYCLE_BEGIN, fake_handle}, {CLAAS_MSG_CYCLE_STEP, fake_handle},
    {CLAAS_MSG_CYCLE_KEEP, fake_handle},  {CLAAS_MSG_CYCLE_STAGE, fake_handle},
    {CLAAS_MSG_CYCLE_END, fake_handle},
};
static const struct claas_actor_class storage_class = {
    "storage", storage_handlers, CLAAS_COUNT(storage_handlers), fake_start, NULL, fake_stop};
static const struct claas_actor_class sampler_class = {
    "sampler", sampler_handlers, CLAAS_COUNT(sampler_handlers), fake_start, NULL, fake_stop};
static const struct claas_actor_class trainer_class = {
    "trainer", trainer_handlers, CLAAS_COUNT(trainer_handlers), fake_start, NULL, fake_stop};

/* --- the process -------------------------------------------------------------------------------
 */

void rig_start(struct rig *rig)
{
    rig->args.config = rig->config;
    assert_int_equal(claas_runtime_new(rig->config, &rig->runtime), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &storage_class, "storage", NULL), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &trainer_class, "trainer.0", NULL), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &sampler_class, "sampler.0", NULL), 0);
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_scheduler_class, "scheduler", &rig->args), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &driver_class, "driver", rig->probe), 0);
}

void configure(struct rig *rig, const char *jobs, const char *retries)
{
    char data[96];
    const char *overrides[] = {data, jobs, retries, "cycle.steps=2", "log.level=error"};

    snprintf(data, sizeof(data), "data=%s", rig->dir);
    claas_config_free(&rig->config);
    assert_int_equal(claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &rig->config), 0);
}

int set_up(void **state)
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
    world.deleted = world.bad_gate = world.more_end = false;
    memset(world.scripts, 0, sizeof(world.scripts));
    *state = rig;
    return 0;
}

int tear_down(void **state)
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

void fail_next(int type, int count, int code, bool after)
{
    struct script *script = script_lock(type);

    script->fail_count = count;
    script->code = code;
    script->after = after;
    unlock();
}

void set_block(int type, bool block)
{
    script_lock(type)->block = block;
    unlock();
}

void set_hold(int type, bool hold)
{
    script_lock(type)->hold = hold;
    unlock();
}

void set_gather(int type, int count)
{
    script_lock(type)->gather = count;
    unlock();
}

void set_hook(int type, void (*hook)(void))
{
    script_lock(type)->hook = hook;
    unlock();
}

/* The world as it is now, copied under its lock: actors go on writing it. */
struct world *look(void)
{
    static struct world copy;

    pthread_mutex_lock(&world.lock);
    copy = world;
    unlock();
    return &copy;
}

int calls_of(int type)
{
    int calls = script_lock(type)->calls;

    unlock();
    return calls;
}

/* Waits until `holds` says so; the world is locked in it. */
void await(bool (*holds)(const void *arg), const void *arg, const char *what)
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

void await_calls(int type, int count)
{
    await(calls_made, &(struct calls){type, count}, "a call");
}

bool job_ended(const void *arg)
{
    const struct world_job *job = find(arg);

    return job && has_ended(job);
}

const struct world_job *look_for(const char *id)
{
    return find_in(look(), id);
}

void check_end(const char *id, const char *state)
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

struct question ask_feedback(const char *lora_id, const char *text, bool wait)
{
    return (struct question){.to = "scheduler",
                             .type = CLAAS_MSG_FEEDBACK,
                             .body = feedback_body(lora_id, text, wait),
                             .timeout_ms = WAIT_S * 1000};
}

void submit(struct rig *rig, const char *lora_id, const char *text)
{
    struct question question = ask_feedback(lora_id, text, false);

    assert_int_equal(probe_call(rig->probe, &question), 0);
}

struct question ask_about(int type, const char *job_id)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "job_id", job_id);
    return (struct question){
        .to = "scheduler", .type = type, .body = body, .timeout_ms = WAIT_S * 1000};
}
