/* State shared by the scheduler's files. */
#ifndef CLAAS_SCHEDULER_INTERNAL_H
#define CLAAS_SCHEDULER_INTERNAL_H

#include "claas/err.h"
#include "plan.h"
#include "scheduler.h"

#define CYCLE_JOBS_MAX 16
#define CYCLES_MAX     64 /* at the same time: the largest value of trainer.jobs */
#define ASK_MS         30000
/* A step on a large model and a slow device takes minutes; a dead trainer is noticed by the runtime
 * long before. */
#define STEP_ASK_MS 1800000

struct scheduler;

/* An unfinished job. What it is about stays on disk; here is what is needed to pick the next
 * cycle. */
struct job {
    struct job *next; /* in order of arrival */
    char id[65];
    char lora_id[257];
    char principal[CLAAS_NAME_MAX];
    int items;
    cJSON *training;                    /* NULL = the default cycle */
    int64_t accepted_ms, not_before_ms; /* monotonic */
    struct cycle_run *run;              /* the cycle it is in, NULL while it waits */
    bool cancel;  /* being cancelled, or ended on disk: no cycle takes it, its own lets it go */
    bool alone;   /* a cycle with it failed: no other job shares its cycles from now on */
    bool sole;    /* it has a strike: no other cycle runs during its own from now on */
    int crowded;  /* times its cycle met a full device while others ran */
    int away;     /* times in a row that its cycle found a peer away before its first step, or lost
                     its work to a disk */
    char *waits;  /* why it waits, as the disk says it; "" = for its turn, NULL = not known */
    bool listing; /* the list under way will say whether it has ended (jobs_load) */
};

/* Somebody who gets the events of a job. */
struct watcher {
    struct watcher *next;
    struct scheduler *scheduler;
    struct claas_reply_to reply_to;
    char job_id[65];
    int64_t seq;   /* of the last event sent */
    bool reading;  /* old events are on their way from storage */
    bool again;    /* something happened meanwhile: read once more */
    bool feedback; /* the reply is FEEDBACK's, with job_id beside job */
    uint64_t ask;
};

/* A learning cycle under way: the jobs of one adapter, taken together. */
struct cycle_run {
    struct cycle_run *next; /* in no order */
    struct scheduler *scheduler;
    char cycle_id[65];
    char lora_id[257];
    char trainer[CLAAS_NAME_MAX];     /* "trainer" until one has begun the cycle */
    char model[257], fingerprint[65]; /* the sampler's, which the trainer's has to be */
    struct job *jobs[CYCLE_JOBS_MAX];
    int job_count;
    struct plan plan;
    int64_t version;   /* the parent */
    int64_t withdrawn; /* CYCLE_INPUT's, for CYCLE_CHECK */
    cJSON *base;       /* the base's gate figures */
    int step;
    int best_step; /* 0 = none passed yet */
    double best_score;
    cJSON *best_metadata, *steps; /* of the best step; of all steps, for the result */
    cJSON *gate;                  /* figures of the best step, else of the last one */
    char last_reason[256];
    uint64_t seed;
    uint64_t ask;    /* the request under way, 0 = none */
    bool publishing; /* too late to cancel */
    bool ending; /* its end is being recorded, and the answer will refer to it: do not free it */
    bool waits;  /* it is over, and its jobs are recorded as waiting already */
    char away[CLAAS_ERROR_TEXT_BYTES]; /* it is over: what its jobs wait for, "" = their turn */
    bool company; /* another cycle ran at the same time, so a failure may not be its own fault */
    int64_t started_ms, started_unix_ms;
};

struct scheduler {
    claas_actor_t *actor;
    const claas_config_t *config;
    struct job *jobs, *last_job;
    size_t job_count;
    size_t unlisted; /* at most so many jobs here were not named yet by the list under way */
    struct watcher *watchers;
    struct cycle_run *runs;
    int run_count;
    int trainer_jobs; /* cycles at the same time that the trainer wants; 0 = it did not say yet */
    int narrowed;     /* the device had memory for so many cycles only; 0 = for all */
    int64_t narrowed_ms;
    char turns[CYCLES_MAX][257]; /* a ring: adapters of the last cycles, other users' go first */
    uint64_t turn_count;         /* cycles so far */
    bool loaded;                 /* the list of jobs is storage's: cycles may start */
    bool loading;                /* storage was asked for its list … */
    bool load_again;             /* … and has to be asked once more */
    int records;                 /* JOB_RECORDs that storage has not answered */
    bool crash_known;            /* what an earlier life's crash left is counted (crash.c) … */
    bool crash_many;   /* … and struck a job already: those that follow did not run alone */
    cJSON *crash_jobs; /* of the list under way, those that were in a cycle on disk */
    bool draining;
    int timer; /* of the next dispatch, 0 = none; due at wake_ms */
    int64_t wake_ms;
    int watch_timer; /* of watchers whose reading failed */
};

/* jobs.c */
struct job *job_add(struct scheduler *scheduler, const char *id, const char *lora_id,
                    const char *principal, int items, const cJSON *training);
struct job *job_find(struct scheduler *scheduler, const char *id);
void job_remove(struct scheduler *scheduler, struct job *job);
/* Starts cycles while jobs wait and turns.c allows another. */
void jobs_dispatch(struct scheduler *scheduler);
/* The same, in delay_ms at the latest. */
void jobs_wake(struct scheduler *scheduler, int64_t delay_ms);
/* Makes the list agree with storage's: at the start, and whenever something may have happened to a
 * job of which no answer told. No cycle starts meanwhile. */
void jobs_load(struct scheduler *scheduler);
/* The same in a while: storage is away, or its disk is full. */
void jobs_load_later(struct scheduler *scheduler);

/* turns.c */
/* The first job of the adapter whose turn it is; NULL if no cycle may start now. *ret_wait: ms
 * until the first job that only waits for its time (not_before_ms) may start; -1 if there is
 * none. */
struct job *turn_next(struct scheduler *scheduler, int64_t *ret_wait);
/* The adapter has had its turn. */
void turn_take(struct scheduler *scheduler, const char *lora_id);
/* How many cycles may run at the same time. */
int turns_limit(const struct scheduler *scheduler);
/* The device had no memory for as many as run: fewer, for a while. */
void turns_narrow(struct scheduler *scheduler);

/* submit.c, watch.c */
int handle_feedback(void *self, claas_message_t *message);
int handle_job_watch(void *self, claas_message_t *message);
/* Starts to watch; with `feedback` the final reply is that of FEEDBACK. */
int watch_start(struct scheduler *scheduler, const struct claas_reply_to *to, const char *job_id,
                int64_t since, bool feedback);
/* Sends an event of a job to its watchers. */
void watch_event(struct scheduler *scheduler, const cJSON *event);
/* A job has ended on disk without an event that came this way. */
void watch_ended(struct scheduler *scheduler, const char *job_id);
/* The watchers' request was given up. */
void watch_cancel(struct scheduler *scheduler, const struct claas_reply_to *to);
void watch_free_all(struct scheduler *scheduler, bool tell);

/* record.c: JOB_RECORD with its events handed to the watchers. */
typedef void recorded_fn(struct scheduler *scheduler, void *arg, int error, const char *text,
                         const cJSON *reply);
struct record {
    const char *state; /* NULL: the event alone */
    cJSON *event;      /* taken */
    cJSON *result;     /* taken, may be NULL */
    bool failure;
    recorded_fn *done; /* may be NULL */
    void *arg;
};
int record_jobs(struct scheduler *scheduler, struct job *const *jobs, int count,
                const struct record *record);
/* Records that the job waits again, for its turn (reason "") or for what the reason says, unless
 * the disk says so already. Where that cannot be recorded, it waits all the same. */
void record_waits(struct scheduler *scheduler, struct job *job, const char *reason);

/* crash.c */
/* Whether a trainer in a process of its own crashed at that time or later: a sentence that says
 * so. */
bool crash_since(const struct scheduler *scheduler, int64_t unix_ms, char *ret_text, size_t size);
/* Keeps of a page of storage's list what crash_count needs. */
void crash_note(struct scheduler *scheduler, const cJSON *page);
/* At the start, with storage's list: strikes for the jobs that ran when the trainer crashed and
 * this process with it. True while they are being recorded: the list is read again afterwards. When
 * it returns false, no job is recorded as being in a cycle any more. */
bool crash_count(struct scheduler *scheduler);

/* cycle_run.c, cycle_end.c */
void cycle_run_start(struct scheduler *scheduler, struct job *const *jobs, int count);
/* Drops the run, here and in the trainer; its jobs wait again, and on disk too. */
void cycle_run_abandon(struct cycle_run *run);
void cycle_run_free(struct cycle_run *run);
/* After the last step: publish the best, or reject. */
void cycle_run_finish(struct cycle_run *run);
/* The cycle cannot go on: by the code its jobs wait again, or get a strike, or a single one is
 * parked. */
void cycle_run_fail(struct cycle_run *run, int code, const char *text);
/* The same after an error from the trainer, or without an answer: it may have crashed. */
void cycle_run_fail_trainer(struct cycle_run *run, int code, const char *text);
/* How long to wait for the trainer, for what takes it `ms` at most when no other cycle runs. */
int64_t cycle_run_patience(const struct cycle_run *run, int64_t ms);
/* Lets cancelled jobs go. True if there were any: then the run is freed and its other jobs wait
 * again. */
bool cycle_run_drop_cancelled(struct cycle_run *run);
int cycle_run_ask(struct cycle_run *run, const char *to, int type, cJSON *body, int64_t timeout_ms,
                  claas_reply_fn *reply);

#endif
