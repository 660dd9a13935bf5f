/* The team of threads behind the CPU operations.
 *
 * One 64-bit word, `ticket`, holds the number of the job (high half) and the next index to hand out
 * (low half); taking an index is one compare-and-swap on it. Because the job's number is in the
 * same word, a member that overslept a whole job cannot take an index of one job with the function
 * of another, and the caller need not wait for members that never woke up: it waits for the indices
 * only. Between jobs the word is "closed" (index CLOSED), which is what makes rewriting the job's
 * fields safe.
 *
 * Operations follow each other within microseconds in a forward pass and then pause for long, so
 * members spin for about SPIN_ROUNDS pauses and then sleep on a futex. */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/syscall.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cpu/pool.h"

#define POOL_THREADS_MAX 256
#define SPIN_ROUNDS      4000       /* about 0.1 ms */
#define CLOSED           UINT32_MAX /* an index no job reaches */

struct member {
    claas_pool_t *pool;
    int index;
    bool started;
    pthread_t thread;
    void *scratch;
};

struct claas_pool {
    int threads;
    struct member *members;
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int remaining;   /* indices not finished yet */
    _Alignas(64) _Atomic uint32_t signal; /* changes with every job: what sleepers wait on */
    _Atomic int sleepers;
    _Atomic bool stop;
    /* The job; written only while the ticket is closed. */
    _Atomic(claas_pool_fn *) work;
    _Atomic(void *) arg;
    _Atomic int count;
};

static _Thread_local int this_member;

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

/* Takes and runs indices of the open job until there are none. */
static void drain(claas_pool_t *pool)
{
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);

    for (;;) {
        const uint32_t index = (uint32_t)ticket;
        const int count = atomic_load_explicit(&pool->count, memory_order_relaxed);
        claas_pool_fn *work = atomic_load_explicit(&pool->work, memory_order_relaxed);
        void *arg = atomic_load_explicit(&pool->arg, memory_order_relaxed);

        if (index == CLOSED || index >= (uint32_t)count)
            return;
        /* Success proves that the job was still open, so the fields read above are its own. */
        if (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1,
                                                   memory_order_acq_rel, memory_order_acquire))
            continue;
        work(arg, (int)index);
        atomic_fetch_sub_explicit(&pool->remaining, 1, memory_order_release);
        ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    }
}

static void sleep_until_signal(claas_pool_t *pool, uint32_t seen)
{
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->signal) == seen)
        syscall(SYS_futex, &pool->signal, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
}

static void *run_member(void *arg)
{
    struct member *self = arg;
    claas_pool_t *pool = self->pool;
    uint32_t seen = 0;

    this_member = self->index;
    for (;;) {
        int rounds = 0;

        while (atomic_load_explicit(&pool->signal, memory_order_acquire) == seen &&
               rounds++ < SPIN_ROUNDS)
            relax();
        if (atomic_load(&pool->signal) == seen)
            sleep_until_signal(pool, seen);
        seen = atomic_load_explicit(&pool->signal, memory_order_acquire);
        if (atomic_load(&pool->stop))
            return NULL;
        drain(pool);
    }
}

/* Sequentially consistent on `signal` and `sleepers`, so that either the caller sees the sleeper or
 * the sleeper sees the new signal. */
static void wake(claas_pool_t *pool)
{
    atomic_fetch_add(&pool->signal, 1);
    if (atomic_load(&pool->sleepers) > 0)
        syscall(SYS_futex, &pool->signal, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static int count_cpus(void)
{
    cpu_set_t set;

    if (sched_getaffinity(0, sizeof(set), &set) == 0)
        return CPU_COUNT(&set);
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

int claas_pool_new(int threads, claas_pool_t **ret)
{
    CLAAS_AUTO(claas_pool_free) claas_pool_t *pool = NULL;

    if (threads < 0 || threads > POOL_THREADS_MAX)
        return claas_fail(CLAAS_ERR_INVALID, "%d threads: must be 0 to %d", threads,
                          POOL_THREADS_MAX);
    if (threads == 0)
        threads = count_cpus();
    if (threads < 1)
        threads = 1;
    if (threads > POOL_THREADS_MAX)
        threads = POOL_THREADS_MAX;
    pool = claas_alloc_aligned(sizeof(*pool));
    if (!pool)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    pool->threads = threads;
    atomic_store(&pool->ticket, CLOSED);
    pool->members = CLAAS_NEW_ARRAY(struct member, (size_t)threads);
    if (!pool->members)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < threads; i++) {
        struct member *member = &pool->members[i];

        member->pool = pool;
        member->index = i;
        member->scratch = claas_alloc_aligned(CLAAS_POOL_SCRATCH);
        if (!member->scratch)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        if (i > 0 && pthread_create(&member->thread, NULL, run_member, member) != 0)
            return claas_fail(CLAAS_ERR_NO_MEMORY, "cannot start thread %d of %d", i + 1, threads);
        member->started = i > 0;
    }
    *ret = CLAAS_TAKE(pool);
    return 0;
}

void claas_pool_free(claas_pool_t **pool)
{
    claas_pool_t *self = *pool;

    if (!self)
        return;
    atomic_store(&self->stop, true);
    wake(self);
    for (int i = 0; self->members && i < self->threads; i++) {
        if (self->members[i].started)
            pthread_join(self->members[i].thread, NULL);
        free(self->members[i].scratch);
    }
    free(self->members);
    free(self);
    *pool = NULL;
}

int claas_pool_threads(const claas_pool_t *pool)
{
    return pool->threads;
}

void claas_pool_run(claas_pool_t *pool, int count, claas_pool_fn *work, void *arg)
{
    uint64_t job = 0;
    int rounds = 0;

    if (count <= 0)
        return;
    if (count == 1 || pool->threads == 1) {
        for (int i = 0; i < count; i++)
            work(arg, i);
        return;
    }
    job = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&pool->work, work, memory_order_relaxed);
    atomic_store_explicit(&pool->arg, arg, memory_order_relaxed);
    atomic_store_explicit(&pool->count, count, memory_order_relaxed);
    atomic_store_explicit(&pool->remaining, count, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, job << 32, memory_order_release);
    wake(pool);
    drain(pool);
    while (atomic_load_explicit(&pool->remaining, memory_order_acquire) > 0) {
        relax();
        if (++rounds > SPIN_ROUNDS)
            sched_yield();
    }
    atomic_store_explicit(&pool->ticket, (job << 32) | CLOSED, memory_order_release);
}

int claas_pool_member(const claas_pool_t *pool)
{
    return pool->threads > 1 ? this_member : 0;
}

void *claas_pool_scratch(const claas_pool_t *pool)
{
    return pool->members[claas_pool_member(pool)].scratch;
}
