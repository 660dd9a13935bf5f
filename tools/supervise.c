/* Starting a lost server again: see supervise.h.
 *
 * The child is a fork without exec: the parent has done nothing yet but read its command line. The
 * child has a process group of its own, so that a Ctrl-C of the terminal reaches the parent alone,
 * which passes it on once; a second one would cut the server's end short. */
#include "supervise.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/device.h"
#include "claas/err.h"
#include "cli.h"
#include "verbs.h"

#define BACKOFF_FIRST_MS 1000
#define BACKOFF_MAX_MS   30000
#define HEALTHY_MS       60000

struct watch {
    sigset_t signals, before; /* those waited for here; the mask from before, for the child */
    pid_t child;              /* 0 between two lives */
    bool ending;              /* SIGTERM or SIGINT came */
};

static int start_child(struct watch *watch, supervised_fn *child, void *arg)
{
    pid_t parent = getpid();

    fflush(NULL); /* or the child would write what is buffered a second time */
    watch->child = fork();
    if (watch->child < 0)
        return claas_fail_errno("fork");
    if (watch->child > 0)
        return 0;
    setpgid(0, 0);
    /* When the parent dies, kill -9: the data survives that, and a server that still drains would
     * be in its successor's way. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* gone before the line above */
        _exit(EXIT_CODE_FAILED);
    sigprocmask(SIG_SETMASK, &watch->before, NULL);
    exit(child(arg));
}

/* One signal, or `until_ms` (monotonic; INT64_MAX = no end). */
static void await_signal(struct watch *watch, int64_t until_ms)
{
    int64_t left = until_ms == INT64_MAX ? 3600000 : until_ms - claas_clock_ms();
    struct timespec wait = {left / 1000, left % 1000 * 1000000};
    int number = left > 0 ? sigtimedwait(&watch->signals, NULL, &wait) : 0;

    if (number != SIGTERM && number != SIGINT)
        return;
    watch->ending = true;
    if (watch->child > 0)
        kill(watch->child, number);
}

/* The child's status when it has ended; an error only if there is none to wait for. */
static int await_child(struct watch *watch, int *status)
{
    pid_t ended;

    while ((ended = waitpid(watch->child, status, WNOHANG)) == 0)
        await_signal(watch, INT64_MAX);
    watch->child = 0;
    return ended < 0 ? claas_fail_errno("waitpid") : 0;
}

/* Whether another life would help. */
static bool is_lost(int status)
{
    return WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_CODE_AGAIN);
}

/* When fork fails, that counts as a life that a signal ended. */
static void say(bool began, int status, int64_t wait_ms)
{
    char how[64];

    if (!began)
        snprintf(how, sizeof(how), "before it began, %s", claas_error_text());
    else if (WIFSIGNALED(status))
        snprintf(how, sizeof(how), "by signal %d, %s", WTERMSIG(status),
                 strsignal(WTERMSIG(status)));
    else
        snprintf(how, sizeof(how), "with %d", WEXITSTATUS(status));
    fprintf(stderr, "claas serve: the server ended %s; it starts again in %lld s\n", how,
            (long long)(wait_ms / 1000));
}

static int code_of(const struct watch *watch, int status)
{
    if (WIFEXITED(status))
        return WEXITSTATUS(status);
    /* Asked to end before it listened to signals: an orderly end, too. */
    if (watch->ending && (WTERMSIG(status) == SIGTERM || WTERMSIG(status) == SIGINT))
        return EXIT_CODE_OK;
    return 128 + WTERMSIG(status);
}

int supervise(supervised_fn *child, void *arg)
{
    struct watch watch = {0};
    int64_t backoff_ms = BACKOFF_FIRST_MS;

    sigemptyset(&watch.signals);
    sigaddset(&watch.signals, SIGTERM);
    sigaddset(&watch.signals, SIGINT);
    sigaddset(&watch.signals, SIGCHLD);
    sigprocmask(SIG_BLOCK, &watch.signals, &watch.before);
    signal(SIGHUP, SIG_IGN);
    signal(SIGCHLD, SIG_DFL); /* ignored, as a launcher may leave it, it would never come */
    while (!watch.ending) {
        int64_t started_ms = claas_clock_ms(), again_ms;
        bool began = start_child(&watch, child, arg) >= 0;
        int status = 0;

        if (began && await_child(&watch, &status) < 0)
            return cli_fail("claas serve");
        if (began && (watch.ending || !is_lost(status)))
            return code_of(&watch, status);
        if (began && WIFEXITED(status)) /* the next life must not make do with the CPU */
            (void)setenv(CLAAS_DEVICE_LOST_VARIABLE, "1", 1);
        if (claas_clock_ms() - started_ms >= HEALTHY_MS)
            backoff_ms = BACKOFF_FIRST_MS;
        say(began, status, backoff_ms);
        again_ms = claas_clock_ms() + backoff_ms;
        while (!watch.ending && claas_clock_ms() < again_ms)
            await_signal(&watch, again_ms);
        backoff_ms = backoff_ms < BACKOFF_MAX_MS / 2 ? 2 * backoff_ms : BACKOFF_MAX_MS;
    }
    return EXIT_CODE_OK;
}
