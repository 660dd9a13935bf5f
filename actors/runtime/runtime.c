/* One process of actors: the switch and the supervisor, put together; signals; the orderly end.
 *
 * Signals are read from a signalfd in the main thread (every other thread blocks them all). The end
 * is: drain the actors, the last one started first, within one common deadline that a second signal
 * cuts short; stop them in the same order; close the switch, which lets answers on their way out
 * have a second. */
#include "claas/runtime.h"

#include "supervisor.h"
#include "switch.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define JOIN_FIRST_MS 5000  /* silence of the node to join after which the log says so, */
#define JOIN_AGAIN_MS 60000 /* and how often it says so again */
#define LOST_MS       3000  /* without a device there is little to finish */

struct claas_runtime {
    struct claas_switch *sw;
    struct supervisor *supervisor;
    int signal_fd;
    int64_t drain_ms;
};

/* Number of the signal that came, 0 for none. */
static int take_signal(const claas_runtime_t *runtime)
{
    struct signalfd_siginfo info;

    return read(runtime->signal_fd, &info, sizeof(info)) == sizeof(info) ? (int)info.ssi_signo : 0;
}

/* The node to join may come long after this process, which nobody would start again: so it
 * waits. */
static int join(const claas_runtime_t *runtime)
{
    struct pollfd item = {.fd = runtime->signal_fd, .events = POLLIN};
    const char *endpoint = claas_switch_upstream(runtime->sw);
    int64_t say_ms = claas_clock_ms() + JOIN_FIRST_MS;
    int rc;

    while ((rc = claas_switch_joined(runtime->sw)) == 0) {
        int number = take_signal(runtime);

        if (number != 0)
            return claas_fail(CLAAS_ERR_CANCELLED, "%s while waiting for the node at %s",
                              strsignal(number), endpoint);
        if (claas_clock_ms() >= say_ms) {
            claas_warning("waiting for the node at %s: no server answers there yet; is the "
                          "address right, and is the server started?",
                          endpoint);
            say_ms += JOIN_AGAIN_MS;
        }
        (void)poll(&item, 1, 5);
    }
    return rc < 0 ? rc : 0;
}

int claas_runtime_check(const claas_config_t *config)
{
    const char *upstream = claas_config_string(config, "connect");

    return upstream[0] ? claas_switch_check_upstream(upstream) : 0;
}

int claas_runtime_try(const claas_config_t *config)
{
    return claas_switch_try(config);
}

int claas_runtime_new(const claas_config_t *config, claas_runtime_t **ret)
{
    CLAAS_AUTO(claas_runtime_free) claas_runtime_t *runtime = CLAAS_NEW(claas_runtime_t);
    sigset_t ends;

    if (!runtime)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    runtime->drain_ms = claas_config_int(config, "runtime.drain");
    runtime->signal_fd = signalfd(-1, &ends, SFD_CLOEXEC | SFD_NONBLOCK);
    if (runtime->signal_fd < 0)
        return claas_fail_errno("signalfd");
    int rc = claas_switch_new(config, &runtime->sw);
    if (rc == 0)
        rc = join(runtime);
    if (rc == 0)
        rc = supervisor_new(claas_switch_endpoint(runtime->sw),
                            (int)claas_config_int(config, "runtime.mailbox"), &runtime->supervisor);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(runtime);
    return 0;
}

int claas_runtime_start(claas_runtime_t *runtime, const struct claas_actor_class *actor_class,
                        const char *name, const void *args)
{
    return supervisor_start(runtime->supervisor, actor_class, name, args);
}

/* Sleeps until a signal, a change of an actor's state, or `until_ms`. */
static void await_change(const claas_runtime_t *runtime, int64_t until_ms)
{
    struct pollfd fds[2] = {{.fd = runtime->signal_fd, .events = POLLIN},
                            {.fd = supervisor_fd(runtime->supervisor), .events = POLLIN}};
    int64_t wait = until_ms - claas_clock_ms();
    uint64_t count;

    if (until_ms == INT64_MAX)
        wait = -1;
    else if (wait < 0)
        wait = 0;
    if (poll(fds, 2, (int)wait) > 0 && (fds[1].revents & POLLIN) &&
        read(fds[1].fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
        claas_warning("eventfd: %s", strerror(errno));
}

int claas_runtime_wait(claas_runtime_t *runtime)
{
    int failure, number;

    signal(SIGHUP, SIG_IGN);
    while ((failure = supervisor_failure(runtime->supervisor)) == 0) {
        number = take_signal(runtime);
        if (number != 0) {
            claas_info("%s: finishing the running work", strsignal(number));
            return 0;
        }
        await_change(runtime, INT64_MAX);
    }
    if (failure == CLAAS_ERR_DEVICE_LOST && runtime->drain_ms > LOST_MS)
        runtime->drain_ms = LOST_MS;
    return failure;
}

static void drain(claas_runtime_t *runtime)
{
    int64_t until = claas_clock_ms() + runtime->drain_ms;

    for (size_t i = 0; supervisor_drain(runtime->supervisor, i); i++) {
        while (!supervisor_is_drained(runtime->supervisor, i)) {
            if (take_signal(runtime) != 0) {
                claas_warning("a second signal: stopping at once");
                return;
            }
            if (claas_clock_ms() >= until) {
                claas_warning("running work was not finished within %lld ms",
                              (long long)runtime->drain_ms);
                return;
            }
            await_change(runtime, until);
        }
    }
}

bool claas_runtime_free(claas_runtime_t **pointer)
{
    claas_runtime_t *runtime = *pointer;
    bool is_clean = true;

    if (!runtime)
        return true;
    *pointer = NULL;
    if (runtime->supervisor) {
        drain(runtime);
        is_clean = supervisor_stop(runtime->supervisor, supervisor_limits.stop_ms);
    }
    /* A thread that does not end still uses the switch's inproc socket and its slot. */
    if (is_clean) {
        supervisor_free(&runtime->supervisor);
        claas_switch_free(&runtime->sw);
    }
    if (runtime->signal_fd >= 0)
        close(runtime->signal_fd);
    free(runtime);
    return is_clean;
}
