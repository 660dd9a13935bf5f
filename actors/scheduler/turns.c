/* Whose turn it is, and how many cycles run at the same time.
 *
 * Several adapters learn at the same time (trainer.jobs), but one adapter is never in two cycles:
 * its versions come one after the other, in the order of its feedback. The next cycle is of the
 * adapter that has waited longest, except that one which had one of the last N turns is passed over
 * while another waits; N is the number of cycles that may run at the same time. So an adapter that
 * has just learnt waits for N others, not for all that wait. The same holds for users (the name up
 * to its '/') before it does for adapters: a user with hundreds of adapters has a turn, not
 * hundreds, before another's first.
 *
 * A job with a strike learns while no other cycle runs: a crash or a lost device strikes all jobs
 * that ran, and the next failure has to show whose fault it was. It does not wait for a pause that
 * never comes: when it is its turn, nothing starts until it has run. */
#include <stdio.h>
#include <string.h>

#include "claas/clock.h"
#include "claas/log.h"
#include "scheduler_internal.h"

#define WIDEN_MS 300000 /* after a full device: this long for each cycle more at the same time */

/* As configured, or as the trainer says (CYCLE_BEGIN's reply); 1 before its first reply. */
static int find_wanted(const struct scheduler *scheduler)
{
    int wanted = (int)claas_config_int(scheduler->config, "trainer.jobs");

    if (wanted == 0)
        wanted = scheduler->trainer_jobs;
    return wanted < 1 ? 1 : wanted > CYCLES_MAX ? CYCLES_MAX : wanted;
}

int turns_limit(const struct scheduler *scheduler)
{
    int wanted = find_wanted(scheduler);
    int64_t narrow;

    if (scheduler->narrowed == 0)
        return wanted;
    narrow = scheduler->narrowed + (claas_clock_ms() - scheduler->narrowed_ms) / WIDEN_MS;
    return narrow < wanted ? (int)narrow : wanted;
}

void turns_narrow(struct scheduler *scheduler)
{
    int others = scheduler->run_count - 1;

    scheduler->narrowed = others > 1 ? others : 1;
    scheduler->narrowed_ms = claas_clock_ms();
    claas_warning("the device has no memory for %d cycles at the same time: %d for now",
                  scheduler->run_count, scheduler->narrowed);
}

void turn_take(struct scheduler *scheduler, const char *lora_id)
{
    char *turn = scheduler->turns[scheduler->turn_count++ % CYCLES_MAX];

    snprintf(turn, sizeof(scheduler->turns[0]), "%s", lora_id);
}

static bool has_same_user(const char *a, const char *b)
{
    size_t length = strcspn(a, "/");

    return strcspn(b, "/") == length && strncmp(a, b, length) == 0;
}

/* Lower ones go first. 2: the user had one of the last `limit` turns; 1 more: the adapter had one
 * of its user's last `limit`, as far as the ring goes back. */
static int find_rank(const struct scheduler *scheduler, int limit, const char *lora_id)
{
    uint64_t count = scheduler->turn_count, kept = count > CYCLES_MAX ? count - CYCLES_MAX : 0;
    int rank = 0, own = 0;

    for (uint64_t turn = count; turn > kept && own < limit; turn--) {
        const char *other = scheduler->turns[(turn - 1) % CYCLES_MAX];

        if (!has_same_user(other, lora_id))
            continue;
        if (count - turn < (uint64_t)limit)
            rank = 2;
        own++;
        if (strcmp(other, lora_id) == 0)
            return rank + 1;
    }
    return rank;
}

static bool is_learning(const struct scheduler *scheduler, const char *lora_id)
{
    for (const struct cycle_run *run = scheduler->runs; run; run = run->next)
        if (strcmp(run->lora_id, lora_id) == 0)
            return true;
    return false;
}

/* Whether a cycle runs that must be the only one. */
static bool has_sole(const struct scheduler *scheduler)
{
    for (const struct cycle_run *run = scheduler->runs; run; run = run->next)
        for (int i = 0; i < run->job_count; i++)
            if (run->jobs[i]->sole)
                return true;
    return false;
}

struct job *turn_next(struct scheduler *scheduler, int64_t *ret_wait)
{
    int64_t now = claas_clock_ms();
    int limit = turns_limit(scheduler);
    struct job *next = NULL;
    int rank, best = 0;

    *ret_wait = -1;
    if (scheduler->run_count >= limit || has_sole(scheduler))
        return NULL; /* the end of a cycle asks again */
    for (struct job *job = scheduler->jobs; job; job = job->next) {
        int64_t wait = job->not_before_ms - now;

        if (job->cancel || is_learning(scheduler, job->lora_id))
            continue;
        if (wait > 0) {
            if (*ret_wait < 0 || wait < *ret_wait)
                *ret_wait = wait;
            continue;
        }
        rank = find_rank(scheduler, limit, job->lora_id);
        if (!next || rank < best) {
            next = job;
            best = rank;
        }
        if (best == 0)
            break;
    }
    if (next && next->sole && scheduler->run_count > 0)
        return NULL;
    return next;
}
