/* Supervision of actor threads.
 *
 * Plain pthreads, joinable, with an eventfd and two flags to each, in place of zactor: destroying a
 * zactor can hang for ever (its exit signal was read already), returns without having told the
 * actor when its pipe is full, waits as long as a busy handler runs, and its threads are detached
 * and their creation unchecked. Here each wait has an end, and a thread that does not stop is left
 * to the end of the process, with a line in the log.
 *
 * One thread starts actors again: after 0.2 s, doubling up to 30 s, with up to a quarter of jitter;
 * a minute of health resets it. Each life has a new incarnation number. Too many restarts mean that
 * restarting does not help: claas_runtime_wait returns the failure, and whoever started the process
 * decides. The same happens for an actor whose loop has not turned for ten minutes, and at once for
 * one whose device was lost: the device belongs to the process, only a new process gets a new
 * one. */
#include "supervisor.h"

#include "actor_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/random.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define ACTORS_MAX 256
#define HEALTHY_MS 60000

struct supervisor_limits supervisor_limits = {
    .backoff_min_ms = 200,
    .backoff_max_ms = 30000,
    .restarts_max = 10,
    .window_ms = 300000,
    .poke_ms = 1000,
    .slow_ms = 10000,
    .stuck_ms = 600000,
    .stop_ms = 5000,
};

enum slot_state {
    SLOT_STARTING,
    SLOT_RUNNING,
    SLOT_ENDED,   /* the thread is over, and not joined yet */
    SLOT_WAITING, /* for restart_ms */
    SLOT_STOPPED, /* never started again */
};

struct slot {
    struct supervisor *supervisor;
    const struct claas_actor_class *class;
    const void *args;
    char name[CLAAS_NAME_MAX];
    uint64_t incarnation;
    pthread_t thread;
    bool has_thread;
    int control_fd;
    _Atomic bool drain_request, stop_request;
    _Atomic int64_t alive_ms;
    /* Under the supervisor's lock: */
    enum slot_state state;
    bool was_ready, drained, is_slow;
    int rc; /* why it failed to start, or ended */
    char text[512];
    int64_t ready_ms, restart_ms, backoff_ms;
    int64_t restarts[32]; /* times of the latest, a ring */
    size_t restart_count;
};

struct supervisor {
    char endpoint[64];
    int mailbox;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int changed_fd;
    int64_t poked_ms;
    struct slot *slots[ACTORS_MAX];
    size_t count;
    pthread_t thread;
    bool has_thread, stopping;
    int failure;
    char failure_text[768];
};

/* Wakes whoever waits for a change; the lock is held. */
static void tell(struct supervisor *supervisor)
{
    uint64_t one = 1;

    pthread_cond_broadcast(&supervisor->changed);
    if (write(supervisor->changed_fd, &one, sizeof(one)) < 0)
        claas_warning("eventfd: %s", strerror(errno));
}

static void poke(const struct slot *slot)
{
    uint64_t one = 1;

    if (write(slot->control_fd, &one, sizeof(one)) < 0)
        claas_warning("eventfd: %s", strerror(errno));
}

/* --- in the actor's thread -------------------------------------------------------------------- */

static void on_alive(void *handle)
{
    struct slot *slot = handle;

    atomic_store(&slot->alive_ms, claas_clock_ms());
}

static void on_ready(void *handle, int rc, const char *text)
{
    struct slot *slot = handle;

    pthread_mutex_lock(&slot->supervisor->lock);
    slot->rc = rc;
    claas_copy_text(slot->text, sizeof(slot->text), text);
    slot->ready_ms = claas_clock_ms();
    slot->is_slow = false;
    on_alive(slot);
    if (rc == 0) {
        slot->was_ready = true;
        slot->state = SLOT_RUNNING;
    }
    tell(slot->supervisor);
    pthread_mutex_unlock(&slot->supervisor->lock);
}

static void on_drained(void *handle)
{
    struct slot *slot = handle;

    pthread_mutex_lock(&slot->supervisor->lock);
    slot->drained = true;
    tell(slot->supervisor);
    pthread_mutex_unlock(&slot->supervisor->lock);
}

static void *run_actor(void *arg)
{
    struct slot *slot = arg;
    struct supervisor *supervisor = slot->supervisor;
    char thread_name[16];

    snprintf(thread_name, sizeof(thread_name), "%.15s", slot->name);
    pthread_setname_np(pthread_self(), thread_name);
    claas_log_thread_name(slot->name);
    int rc = actor_run(&(struct actor_options){.class = slot->class,
                                               .name = slot->name,
                                               .endpoint = supervisor->endpoint,
                                               .args = slot->args,
                                               .incarnation = slot->incarnation,
                                               .mailbox = supervisor->mailbox,
                                               .control_fd = slot->control_fd,
                                               .drain_request = &slot->drain_request,
                                               .stop_request = &slot->stop_request,
                                               .owner = {slot, on_ready, on_alive, on_drained}});
    pthread_mutex_lock(&supervisor->lock);
    if (slot->rc == 0 && rc < 0) {
        slot->rc = rc;
        claas_copy_text(slot->text, sizeof(slot->text), claas_error_text());
    }
    slot->state = SLOT_ENDED;
    tell(supervisor);
    pthread_mutex_unlock(&supervisor->lock);
    return NULL;
}

/* --- starting --------------------------------------------------------------------------------- */

/* Higher with every start: seconds above, chance below. */
static uint64_t new_incarnation(uint64_t last)
{
    uint64_t fresh =
        (uint64_t)(claas_clock_unix_ms() / 1000) << 32 | (claas_random_seed() & 0xFFFFFFFF);

    return fresh > last ? fresh : last + 1;
}

/* Signals go to the main thread only. The lock is held. */
static int launch(struct slot *slot)
{
    sigset_t all, before;

    slot->state = SLOT_STARTING;
    slot->was_ready = slot->drained = false;
    slot->rc = 0;
    slot->text[0] = '\0';
    slot->incarnation = new_incarnation(slot->incarnation);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int number = pthread_create(&slot->thread, NULL, run_actor, slot);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    slot->has_thread = number == 0;
    if (number == 0)
        return 0;
    slot->state = SLOT_ENDED;
    return claas_fail(CLAAS_ERR_NO_MEMORY, "no thread for %s: %s", slot->name, strerror(number));
}

static struct slot *find_slot(struct supervisor *supervisor, const char *name)
{
    for (size_t i = 0; i < supervisor->count; i++)
        if (strcmp(supervisor->slots[i]->name, name) == 0)
            return supervisor->slots[i];
    return NULL;
}

static void free_slot(struct slot *slot)
{
    if (slot->control_fd >= 0)
        close(slot->control_fd);
    free(slot);
}

static int new_slot(struct supervisor *supervisor, const struct claas_actor_class *actor_class,
                    const char *name, const void *args, struct slot **ret)
{
    if (!name_valid(name) || strcmp(name, "switch") == 0 || strncmp(name, "client.", 7) == 0)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' cannot be the name of an actor", name);
    if (find_slot(supervisor, name))
        return claas_fail(CLAAS_ERR_EXISTS, "there is an actor %s already", name);
    if (supervisor->count == ACTORS_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "a process can have %d actors", ACTORS_MAX);
    struct slot *slot = CLAAS_NEW(struct slot);
    if (!slot)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    slot->supervisor = supervisor;
    slot->class = actor_class;
    slot->args = args;
    slot->backoff_ms = supervisor_limits.backoff_min_ms;
    claas_copy_text(slot->name, sizeof(slot->name), name);
    slot->control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (slot->control_fd < 0) {
        free_slot(slot);
        return claas_fail_errno("eventfd");
    }
    *ret = slot;
    return 0;
}

/* Not in the list yet, so the restarting thread leaves it alone if it fails. */
static int start_first(struct supervisor *supervisor, struct slot *slot)
{
    int rc = launch(slot);

    while (rc == 0 && slot->state == SLOT_STARTING)
        pthread_cond_wait(&supervisor->changed, &supervisor->lock);
    if (rc == 0 && !slot->was_ready) {
        pthread_mutex_unlock(&supervisor->lock);
        pthread_join(slot->thread, NULL);
        pthread_mutex_lock(&supervisor->lock);
        rc = claas_fail(slot->rc, "%s: %s", slot->name, slot->text);
    }
    return rc;
}

int supervisor_start(struct supervisor *supervisor, const struct claas_actor_class *actor_class,
                     const char *name, const void *args)
{
    struct slot *slot = NULL;

    pthread_mutex_lock(&supervisor->lock);
    int rc = new_slot(supervisor, actor_class, name, args, &slot);
    if (rc == 0)
        rc = start_first(supervisor, slot);
    if (rc == 0)
        supervisor->slots[supervisor->count++] = slot;
    pthread_cond_broadcast(&supervisor->changed);
    pthread_mutex_unlock(&supervisor->lock);
    if (rc < 0 && slot)
        free_slot(slot);
    return rc;
}

/* --- restarting ------------------------------------------------------------------------------- */

static int64_t jitter(int64_t ms)
{
    return ms + (int64_t)(claas_random_seed() % (uint64_t)(ms / 4 + 1));
}

static bool is_too_often(struct slot *slot, int64_t now)
{
    size_t ring = CLAAS_COUNT(slot->restarts);
    size_t limit = (size_t)supervisor_limits.restarts_max;
    size_t recent = 0;

    for (size_t i = 0; i < ring && i < slot->restart_count; i++)
        if (now - slot->restarts[i] < supervisor_limits.window_ms)
            recent++;
    return recent >= (limit < ring ? limit : ring);
}

static void give_up(struct supervisor *supervisor, int code)
{
    supervisor->failure = code;
    claas_error("%s", supervisor->failure_text);
    tell(supervisor);
}

/* An actor's thread has ended by itself: joins it, and sets the time of its next life. */
static void plan_restart(struct supervisor *supervisor, struct slot *slot)
{
    int64_t now = claas_clock_ms();

    if (slot->has_thread)
        pthread_join(slot->thread, NULL); /* it is past its last line: no wait */
    slot->has_thread = false;
    if (slot->rc == CLAAS_ERR_DEVICE_LOST || is_too_often(slot, now)) {
        int code = slot->rc < 0 ? slot->rc : CLAAS_ERR_INTERNAL;

        slot->state = SLOT_STOPPED;
        snprintf(supervisor->failure_text, sizeof(supervisor->failure_text), "%s%s: %s", slot->name,
                 code == CLAAS_ERR_DEVICE_LOST ? "" : " failed again and again",
                 slot->text[0] ? slot->text : claas_err_text(code));
        give_up(supervisor, code);
        return;
    }
    if (slot->was_ready && now - slot->ready_ms > HEALTHY_MS)
        slot->backoff_ms = supervisor_limits.backoff_min_ms;
    slot->restart_ms = now + jitter(slot->backoff_ms);
    slot->backoff_ms *= 2;
    if (slot->backoff_ms > supervisor_limits.backoff_max_ms)
        slot->backoff_ms = supervisor_limits.backoff_max_ms;
    slot->state = SLOT_WAITING;
    claas_warning("%s ended (%s%s%s); it starts again in %lld ms", slot->name,
                  claas_err_name(slot->rc), slot->text[0] ? ": " : "", slot->text,
                  (long long)(slot->restart_ms - now));
}

static void restart(struct slot *slot)
{
    slot->restarts[slot->restart_count++ % CLAAS_COUNT(slot->restarts)] = claas_clock_ms();
    claas_metric_add(CLAAS_METRIC_ACTOR_RESTARTS, 1);
    if (launch(slot) < 0)
        claas_error("%s", claas_error_text());
}

static void wait_until(struct supervisor *supervisor, int64_t due_ms)
{
    struct timespec when = {due_ms / 1000, due_ms % 1000 * 1000000};

    pthread_cond_timedwait(&supervisor->changed, &supervisor->lock, &when);
}

/* A thread cannot be ended from outside: an actor that does not come back takes the process with
 * it, whose own supervisor starts it again. */
static void check_pulse(struct supervisor *supervisor, struct slot *slot)
{
    int64_t silence = claas_clock_ms() - atomic_load(&slot->alive_ms);

    poke(slot);
    if (silence < supervisor_limits.slow_ms) {
        if (slot->is_slow)
            claas_info("%s answers again", slot->name);
        slot->is_slow = false;
        return;
    }
    if (!slot->is_slow)
        claas_warning("%s has not answered for %lld ms", slot->name, (long long)silence);
    slot->is_slow = true;
    if (silence > supervisor_limits.stuck_ms && supervisor->failure == 0) {
        snprintf(supervisor->failure_text, sizeof(supervisor->failure_text),
                 "%s is stuck: its loop has not turned for %lld ms", slot->name,
                 (long long)silence);
        give_up(supervisor, CLAAS_ERR_INTERNAL);
    }
}

/* Looks after every slot once; returns when to look again. */
static int64_t look_after(struct supervisor *supervisor)
{
    int64_t now = claas_clock_ms();
    bool is_round = now - supervisor->poked_ms >= supervisor_limits.poke_ms;
    int64_t next;

    if (is_round)
        supervisor->poked_ms = now;
    next = supervisor->poked_ms + supervisor_limits.poke_ms;

    for (size_t i = 0; i < supervisor->count; i++) {
        struct slot *slot = supervisor->slots[i];

        if (slot->state == SLOT_ENDED)
            plan_restart(supervisor, slot);
        if (slot->state == SLOT_WAITING && slot->restart_ms <= claas_clock_ms())
            restart(slot);
        if (slot->state == SLOT_RUNNING && is_round)
            check_pulse(supervisor, slot);
        if (slot->state == SLOT_WAITING && slot->restart_ms < next)
            next = slot->restart_ms;
    }
    return next;
}

static void *supervise(void *arg)
{
    struct supervisor *supervisor = arg;

    claas_log_thread_name("supervisor");
    pthread_setname_np(pthread_self(), "claas-super");
    pthread_mutex_lock(&supervisor->lock);
    while (!supervisor->stopping) {
        int64_t next = look_after(supervisor);

        if (!supervisor->stopping)
            wait_until(supervisor, next);
    }
    pthread_mutex_unlock(&supervisor->lock);
    return NULL;
}

/* --- drain and stop --------------------------------------------------------------------------- */

int supervisor_fd(const struct supervisor *supervisor)
{
    return supervisor->changed_fd;
}

int supervisor_failure(struct supervisor *supervisor)
{
    pthread_mutex_lock(&supervisor->lock);
    int failure = supervisor->failure;
    if (failure < 0)
        claas_fail(failure, "%s", supervisor->failure_text);
    pthread_mutex_unlock(&supervisor->lock);
    return failure;
}

/* From the first call on nothing is restarted. */
static void end_supervision(struct supervisor *supervisor)
{
    pthread_mutex_lock(&supervisor->lock);
    supervisor->stopping = true;
    pthread_cond_broadcast(&supervisor->changed);
    pthread_mutex_unlock(&supervisor->lock);
    if (supervisor->has_thread)
        pthread_join(supervisor->thread, NULL);
    supervisor->has_thread = false;
}

bool supervisor_drain(struct supervisor *supervisor, size_t index_from_last)
{
    end_supervision(supervisor);
    if (index_from_last >= supervisor->count)
        return false;
    struct slot *slot = supervisor->slots[supervisor->count - 1 - index_from_last];
    atomic_store(&slot->drain_request, true);
    poke(slot);
    return true;
}

bool supervisor_is_drained(struct supervisor *supervisor, size_t index_from_last)
{
    struct slot *slot = supervisor->slots[supervisor->count - 1 - index_from_last];

    pthread_mutex_lock(&supervisor->lock);
    bool is_drained = slot->drained || slot->state == SLOT_ENDED || slot->state == SLOT_WAITING ||
                      slot->state == SLOT_STOPPED;
    pthread_mutex_unlock(&supervisor->lock);
    return is_drained;
}

/* Waits for the thread's end; false when it does not come. */
static bool stop_slot(struct supervisor *supervisor, struct slot *slot, int64_t wait_ms)
{
    int64_t until = claas_clock_ms() + wait_ms;

    atomic_store(&slot->stop_request, true);
    poke(slot);
    pthread_mutex_lock(&supervisor->lock);
    while (slot->has_thread && slot->state != SLOT_ENDED && claas_clock_ms() < until)
        wait_until(supervisor, until);
    bool has_ended = !slot->has_thread || slot->state == SLOT_ENDED;
    pthread_mutex_unlock(&supervisor->lock);
    if (!has_ended) {
        claas_error("%s does not stop; it is left to the end of the process", slot->name);
        return false;
    }
    if (slot->has_thread)
        pthread_join(slot->thread, NULL);
    slot->has_thread = false;
    return true;
}

bool supervisor_stop(struct supervisor *supervisor, int64_t wait_ms)
{
    bool is_clean = true;

    end_supervision(supervisor);
    for (size_t i = supervisor->count; i-- > 0;)
        is_clean &= stop_slot(supervisor, supervisor->slots[i], wait_ms);
    return is_clean;
}

/* --- birth and death -------------------------------------------------------------------------- */

int supervisor_new(const char *endpoint, int mailbox, struct supervisor **ret)
{
    CLAAS_AUTO(supervisor_free) struct supervisor *supervisor = CLAAS_NEW(struct supervisor);
    pthread_condattr_t monotonic;
    sigset_t all, before;

    if (!supervisor)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    claas_copy_text(supervisor->endpoint, sizeof(supervisor->endpoint), endpoint);
    supervisor->mailbox = mailbox;
    pthread_mutex_init(&supervisor->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&supervisor->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    supervisor->changed_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (supervisor->changed_fd < 0)
        return claas_fail_errno("eventfd");
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int number = pthread_create(&supervisor->thread, NULL, supervise, supervisor);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (number != 0)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no thread for the supervisor: %s",
                          strerror(number));
    supervisor->has_thread = true;
    *ret = CLAAS_TAKE(supervisor);
    return 0;
}

void supervisor_free(struct supervisor **pointer)
{
    struct supervisor *supervisor = *pointer;

    if (!supervisor)
        return;
    *pointer = NULL;
    if (!supervisor_stop(supervisor, 0))
        return; /* a thread still uses it */
    for (size_t i = 0; i < supervisor->count; i++)
        free_slot(supervisor->slots[i]);
    if (supervisor->changed_fd >= 0)
        close(supervisor->changed_fd);
    pthread_cond_destroy(&supervisor->changed);
    pthread_mutex_destroy(&supervisor->lock);
    free(supervisor);
}
