/* A fake storage, a fake sampler and a fake trainer around the scheduler that keep just enough of a
 * world (jobs, versions, events) to notice what would be lost, done twice or never done. The test
 * scripts them: the n-th call fails, fails after it has taken effect, waits, or is never answered.
 */
#ifndef CLAAS_TEST_SCHEDULER_WORLD_H
#define CLAAS_TEST_SCHEDULER_WORLD_H

#include <pthread.h>

#include "runtime_fixture.h"
#include "scheduler.h"

#define JOBS_MAX   2100
#define CYCLES_MAX 64
#define GATHER_MAX 4
#define WAIT_S     20
/* The sentence of scripted failures: as long as one with the map of a device's memory. */
#define FAILURE_BYTES 700

struct world_job {
    char id[16], lora_id[64], principal[16], state[16], key[16], feedback[32];
    int strikes;
    int64_t version, updated;
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

struct world {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct world_job jobs[JOBS_MAX];
    int job_count;
    int64_t seq, versions[4], withdrawn; /* versions of the adapters that end in a … d */
    bool deleted, bad_gate;
    bool more_end; /* whenever the list is asked for, jobs are said to end meanwhile */
    struct script scripts[32];
    char cycles[CYCLES_MAX][64]; /* the jobs of each CYCLE_BEGIN, "job-1 job-2 " */
    int64_t seeds[CYCLES_MAX];
    int cycle_count, ends;
    struct open_cycle open[CYCLES_MAX];
    int open_count, open_most;
    bool open_twice;  /* one adapter in two cycles at the same time */
    int trainer_jobs; /* what the trainer says to CYCLE_BEGIN, 0 = nothing */
};

extern struct world world;

struct rig {
    char dir[64];
    claas_config_t *config;
    claas_runtime_t *runtime;
    struct probe *probe;
    struct claas_scheduler_args args;
};

/* Of a message; the world is locked in these and in hooks. */
struct script *script_of(int type);
bool has_ended(const struct world_job *job);
cJSON *add_event(struct world_job *job, const char *state, const cJSON *given);
/* How often it came into the state. */
int count_state(const struct world_job *job, const char *state);
struct world_job *add_job(const char *lora_id, const char *principal);
void unlock(void);
/* "trainer.jobs=3", "cycle.retries=2": before rig_start. */
void configure(struct rig *rig, const char *jobs, const char *retries);
/* Of each test, with a rig as its state. */
int set_up(void **state);
int tear_down(void **state);
/* The process. */
void rig_start(struct rig *rig);
/* What the tests do. */
void fail_next(int type, int count, int code, bool after);
void set_block(int type, bool block);
void set_hold(int type, bool hold);
void set_gather(int type, int count);
void set_hook(int type, void (*hook)(void));
int calls_of(int type);
/* The world as it is now, copied under its lock: actors go on writing it. */
struct world *look(void);
const struct world_job *look_for(const char *id);
/* Waits until `holds` says so; the world is locked in it. */
void await(bool (*holds)(const void *arg), const void *arg, const char *what);
void await_calls(int type, int count);
bool job_ended(const void *arg);
void check_end(const char *id, const char *state);
struct question ask_feedback(const char *lora_id, const char *text, bool wait);
struct question ask_about(int type, const char *job_id);
void submit(struct rig *rig, const char *lora_id, const char *text);

#endif
