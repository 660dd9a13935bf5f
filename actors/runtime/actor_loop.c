/* One actor's life: connect, start, loop, drain, stop.
 *
 * The zloop watches exactly two things, for good: the DEALER and one epoll descriptor, behind which
 * are the timers (one timerfd for the heap), the supervisor's eventfd and the actor's own
 * descriptors. So the loop's linear scan stays short, and nothing is added or removed while it runs
 * (which would end its pass and starve later readers). Both are tolerant: a reader that fails twice
 * would otherwise be dropped without a word. zloop_start also returns on any signal, hence the loop
 * around it. */
#include "actor_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define EVENTS_MAX    32
#define EVENT_TIMER   UINT64_MAX
#define EVENT_CONTROL (UINT64_MAX - 1)

/* --- timers ----------------------------------------------------------------------------------- */

/* Sets the timerfd to the first timer, if that has changed. */
static void arm(claas_actor_t *actor)
{
    int64_t next = timers_next(&actor->timers);
    struct itimerspec when = {{0}};

    if (next == actor->armed_ms)
        return;
    actor->armed_ms = next;
    if (next != INT64_MAX) {
        int64_t wait = next - claas_clock_ms();

        if (wait < 1)
            wait = 1; /* zero would turn it off */
        when.it_value.tv_sec = wait / 1000;
        when.it_value.tv_nsec = (wait % 1000) * 1000000;
    }
    timerfd_settime(actor->timer_fd, 0, &when, NULL);
}

/* One round: what a callback sets anew waits for the next one, so a period of 0 cannot hold the
 * loop. */
static void fire_timers(claas_actor_t *actor)
{
    int64_t now = claas_clock_ms();
    uint64_t set = actor->timers.set;
    struct timer *timer;
    uint64_t expirations;

    if (read(actor->timer_fd, &expirations, sizeof(expirations)) < 0 && errno != EAGAIN)
        claas_warning("timerfd: %s", strerror(errno));
    actor->armed_ms = INT64_MAX - 1; /* unknown: arm() sets it again */
    while (actor->failure == 0 && (timer = timers_take_due(&actor->timers, now, set)) != NULL) {
        timer->fn(timer->id > 0 ? actor->self : actor, timer->arg);
        free(timer);
    }
}

struct timer *actor_set_timer(claas_actor_t *actor, int64_t delay_ms, timers_fn *fn, void *arg)
{
    return timers_add(&actor->timers, claas_clock_ms() + (delay_ms > 0 ? delay_ms : 0), fn, arg, 0);
}

int claas_actor_timer(claas_actor_t *actor, int64_t delay_ms, claas_timer_fn *fn, void *arg)
{
    struct timer *timer =
        timers_add(&actor->timers, claas_clock_ms() + (delay_ms > 0 ? delay_ms : 0), fn, arg, 1);

    return timer ? timer->id : claas_fail(CLAAS_ERR_NO_MEMORY, "a timer could not be set");
}

void claas_actor_timer_cancel(claas_actor_t *actor, int timer)
{
    if (timer > 0)
        timers_remove(&actor->timers, timers_find(&actor->timers, timer));
}

/* --- descriptors ------------------------------------------------------------------------------ */

static int add_epoll(claas_actor_t *actor, int fd, uint64_t data)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};

    if (epoll_ctl(actor->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        return claas_fail_errno("watching descriptor %d", fd);
    return 0;
}

int claas_actor_watch(claas_actor_t *actor, int fd, claas_watch_fn *fn)
{
    struct watch *watch = &actor->watches[actor->watch_count];

    if (actor->watch_count == WATCH_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "an actor can watch %d descriptors", WATCH_MAX);
    *watch = (struct watch){fd, ++actor->watch_generation, fn};
    int rc = add_epoll(actor, fd, (uint64_t)watch->generation << 32 | (uint32_t)fd);
    if (rc == 0)
        actor->watch_count++;
    return rc;
}

void claas_actor_unwatch(claas_actor_t *actor, int fd)
{
    for (size_t i = 0; i < actor->watch_count; i++)
        if (actor->watches[i].fd == fd) {
            epoll_ctl(actor->epoll_fd, EPOLL_CTL_DEL, fd, NULL); /* fails if it was closed: fine */
            actor->watches[i] = actor->watches[--actor->watch_count];
            return;
        }
}

static void call_watch(claas_actor_t *actor, uint64_t data)
{
    for (size_t i = 0; i < actor->watch_count; i++) {
        const struct watch *watch = &actor->watches[i];

        if (watch->fd == (int)(uint32_t)data && watch->generation == data >> 32) {
            watch->fn(actor->self, watch->fd);
            return;
        }
    }
}

/* --- drain and stop --------------------------------------------------------------------------- */

static void check_drained(void *self, void *arg)
{
    claas_actor_t *actor = self;

    if (actor->drained)
        return;
    if (!actor->class->drain || actor->class->drain(actor->self)) {
        actor->drained = true;
        actor->owner.drained(actor->owner.handle);
        return;
    }
    if (!actor_set_timer(actor, DRAIN_POLL_MS, check_drained, NULL))
        claas_warning("out of memory while draining");
}

static void look_at_control(claas_actor_t *actor)
{
    uint64_t count;

    if (read(actor->control_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        claas_warning("eventfd: %s", strerror(errno));
    actor->owner.alive(actor->owner.handle);
    if (atomic_load(actor->drain_request) && !actor->draining) {
        actor->draining = true;
        check_drained(actor, NULL);
    }
    if (atomic_load(actor->stop_request))
        actor->stopping = true;
}

/* --- the loop --------------------------------------------------------------------------------- */

/* End of every callback: credit, timer; -1 ends zloop. */
static int finish_pass(claas_actor_t *actor)
{
    actor_send_credit(actor);
    arm(actor);
    return actor->failure != 0 || actor->stopping ? -1 : 0;
}

static int on_data(zloop_t *loop, zsock_t *socket, void *arg)
{
    claas_actor_t *actor = arg;
    int64_t until = claas_clock_ns() + DRAIN_MS * 1000000;
    struct parcel parcel;

    for (int i = 0; i < DRAIN_MESSAGES && actor->failure == 0; i++) {
        int rc = parcel_receive(socket, false, &parcel);

        if (rc == 0)
            break;
        if (rc > 0)
            actor_dispatch(actor, &parcel);
        else
            claas_error("a message of the switch: %s", claas_error_text());
        if (claas_clock_ns() > until)
            break;
    }
    return finish_pass(actor);
}

static int on_epoll(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    claas_actor_t *actor = arg;
    struct epoll_event events[EVENTS_MAX];
    int count = epoll_wait(actor->epoll_fd, events, EVENTS_MAX, 0);

    for (int i = 0; i < count && actor->failure == 0; i++) {
        uint64_t data = events[i].data.u64;

        if (data == EVENT_TIMER)
            fire_timers(actor);
        else if (data == EVENT_CONTROL)
            look_at_control(actor);
        else
            call_watch(actor, data);
    }
    return finish_pass(actor);
}

static int run_loop(claas_actor_t *actor)
{
    zmq_pollitem_t item = {NULL, actor->epoll_fd, ZMQ_POLLIN, 0};

    actor->loop = zloop_new();
    if (!actor->loop)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    zloop_set_nonstop(actor->loop, true);
    if (zloop_reader(actor->loop, actor->data, on_data, actor) < 0 ||
        zloop_poller(actor->loop, &item, on_epoll, actor) < 0)
        return claas_fail(CLAAS_ERR_INTERNAL, "the loop takes no reader");
    zloop_reader_set_tolerant(actor->loop, actor->data);
    zloop_poller_set_tolerant(actor->loop, &item);
    arm(actor);
    while (actor->failure == 0 && !actor->stopping)
        zloop_start(actor->loop);
    return actor->failure;
}

/* --- birth and death -------------------------------------------------------------------------- */

static int open_descriptors(claas_actor_t *actor)
{
    actor->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    actor->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (actor->epoll_fd < 0 || actor->timer_fd < 0)
        return claas_fail_errno("descriptors of %s", actor->name);
    int rc = add_epoll(actor, actor->timer_fd, EVENT_TIMER);
    return rc < 0 ? rc : add_epoll(actor, actor->control_fd, EVENT_CONTROL);
}

/* The routing id is new with each incarnation, so a restarted actor never meets the pipe of its
 * former life (a ROUTER is mute towards the second owner of an id). */
static int connect_switch(claas_actor_t *actor, const char *endpoint, int mailbox)
{
    char id[CLAAS_NAME_MAX + 32];

    actor->data = zsock_new(ZMQ_DEALER);
    if (!actor->data)
        return claas_fail(CLAAS_ERR_IO, "no socket for %s: %s", actor->name, zmq_strerror(errno));
    snprintf(id, sizeof(id), "%s#%llx", actor->name, (unsigned long long)actor->incarnation);
    zsock_set_identity(actor->data, id);
    /* inproc, too, drops what was sent just before a close with linger 0. */
    zsock_set_linger(actor->data, 5000);
    zsock_set_sndtimeo(actor->data, 0);
    zsock_set_rcvtimeo(actor->data, 0);
    zsock_set_sndhwm(actor->data, 4 * mailbox + 65536);
    zsock_set_rcvhwm(actor->data, 4 * mailbox + 65536);
    if (zsock_connect(actor->data, "%s", endpoint) < 0)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s cannot reach the switch: %s", actor->name,
                          zmq_strerror(errno));
    return 0;
}

/* HELLO tells the switch the name; with READY, that requests are welcome. */
static int send_hello(claas_actor_t *actor, enum claas_message_kind kind, uint8_t flags)
{
    struct parcel parcel;

    parcel_init(&parcel, kind, 0, 0);
    parcel.header.epoch = actor->incarnation;
    parcel.header.flags = flags;
    parcel_address(&parcel, actor->name, NULL, NULL);
    return actor_send(actor, &parcel);
}

static int start(claas_actor_t *actor, const struct actor_options *options)
{
    int rc = open_descriptors(actor);

    if (rc == 0)
        rc = connect_switch(actor, options->endpoint, options->mailbox);
    if (rc == 0)
        rc = send_hello(actor, CLAAS_KIND_HELLO, 0);
    if (rc == 0 && actor->class->start)
        rc = actor->class->start(actor, actor->args, &actor->self);
    if (rc >= 0 && actor->failure < 0)
        rc = claas_fail(actor->failure, "%s", actor->failure_text);
    if (rc >= 0)
        rc = send_hello(actor, CLAAS_KIND_HELLO, FLAG_READY);
    actor->started = rc >= 0;
    return rc < 0 ? rc : 0;
}

static void finish(claas_actor_t *actor)
{
    actor->stopping = true;
    if (actor->asks)
        actor_end_asks(actor, CLAAS_ERR_CANCELLED, "the asking actor stopped");
    if (actor->class->stop && (actor->started || actor->self))
        actor->class->stop(&actor->self);
    if (actor->data)
        send_hello(actor, CLAAS_KIND_BYE, 0);
    zloop_destroy(&actor->loop);
    zsock_destroy(&actor->data);
    zhashx_destroy(&actor->asks);
    timers_done(&actor->timers);
    if (actor->timer_fd >= 0)
        close(actor->timer_fd);
    if (actor->epoll_fd >= 0)
        close(actor->epoll_fd);
}

static size_t hash_id(const void *key)
{
    return (size_t)(*(const uint64_t *)key * 0x9E3779B97F4A7C15u >> 16);
}

static int compare_ids(const void *a, const void *b)
{
    return *(const uint64_t *)a != *(const uint64_t *)b;
}

static int new_asks(claas_actor_t *actor)
{
    actor->asks = zhashx_new();
    if (!actor->asks)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    zhashx_set_key_duplicator(actor->asks, NULL);
    zhashx_set_key_destructor(actor->asks, NULL);
    zhashx_set_key_hasher(actor->asks, hash_id);
    zhashx_set_key_comparator(actor->asks, compare_ids);
    return 0;
}

int actor_run(const struct actor_options *options)
{
    CLAAS_AUTO_FREE claas_actor_t *actor = CLAAS_NEW(claas_actor_t);

    if (!actor)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    actor->class = options->class;
    actor->args = options->args;
    actor->incarnation = options->incarnation;
    actor->owner = options->owner;
    actor->control_fd = options->control_fd;
    actor->drain_request = options->drain_request;
    actor->stop_request = options->stop_request;
    actor->epoll_fd = actor->timer_fd = -1;
    actor->armed_ms = INT64_MAX;
    actor->started_ms = claas_clock_ms();
    actor->trace_seed = claas_random_seed();
    claas_copy_text(actor->name, sizeof(actor->name), options->name);

    int rc = new_asks(actor);
    if (rc == 0)
        rc = start(actor, options);
    if (rc == 0) /* ready is said when the switch has answered */
        rc = run_loop(actor);
    else
        actor->owner.ready(actor->owner.handle, rc, claas_error_text());
    finish(actor);
    return actor->failure < 0 ? claas_fail(rc, "%s", actor->failure_text) : rc;
}
