/* Zips being written beside the storage actor's loop: a thread each, at most a few. A thread owns
 * its work until it has put the work's number into the pipe; then the loop joins it and answers. So
 * nothing is locked, and nothing is shared but the flag `stop`.
 *
 * The asker opens the zip and unlinks it at once. If it goes away while the answer is on its way,
 * the zip stays: exports_sweep removes it later. */
#include "exports.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "export.h"

#define WORKS_MAX 4
#define PREFIX    "export-"
#define KEPT_S    120 /* nobody waits longer for an export, and its answer takes milliseconds */

struct work {
    bool busy;
    pthread_t thread;
    int done; /* write end of the pipe */
    unsigned char index;
    atomic_bool stop; /* the asker has gone */
    struct export_order order;
    struct export_files files;
    char *path;
    int rc;
    char error[512];
};

struct exports {
    claas_actor_t *actor;
    int pipe[2];
    struct work works[WORKS_MAX];
};

int exports_new(claas_actor_t *actor, struct exports **ret)
{
    CLAAS_AUTO(exports_free) struct exports *exports = CLAAS_NEW(struct exports);

    if (!exports)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    exports->actor = actor;
    exports->pipe[0] = exports->pipe[1] = -1;
    if (pipe2(exports->pipe, O_CLOEXEC) < 0)
        return claas_fail_errno("pipe");
    *ret = CLAAS_TAKE(exports);
    return 0;
}

static void work_done(struct work *work)
{
    export_close(&work->files);
    free(work->path);
    work->path = NULL;
    work->busy = false;
}

void exports_free(struct exports **exports)
{
    if (!*exports)
        return;
    for (size_t i = 0; i < WORKS_MAX; i++) {
        struct work *work = &(*exports)->works[i];

        if (!work->busy)
            continue;
        atomic_store(&work->stop, true);
        pthread_join(work->thread, NULL);
        if (work->rc == 0)
            unlink(work->path);
        work_done(work);
    }
    for (int i = 0; i < 2; i++)
        if ((*exports)->pipe[i] >= 0)
            close((*exports)->pipe[i]);
    free(*exports);
    *exports = NULL;
}

static void *run(void *arg)
{
    struct work *work = arg;

    work->rc = export_write(&work->files, work->path, &work->stop);
    if (work->rc < 0)
        snprintf(work->error, sizeof(work->error), "%s", claas_error_text());
    /* One byte into an empty pipe of 64 KiB: neither short nor blocking. */
    (void)!write(work->done, &work->index, 1);
    return NULL;
}

/* Signals are the main thread's. */
static int start_thread(struct work *work)
{
    sigset_t all, old;
    int number;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    number = pthread_create(&work->thread, NULL, run, work);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (number != 0)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "no thread for an export: %s", strerror(number));
    return 0;
}

int exports_start(struct exports *exports, const struct export_order *order, const char *directory,
                  const char *staging)
{
    struct work *work = NULL;
    char hex[17];
    int rc;

    for (size_t i = 0; i < WORKS_MAX && !work; i++)
        if (!exports->works[i].busy)
            work = &exports->works[i];
    if (!work)
        return claas_fail(CLAAS_ERR_OVERLOADED, "%d exports are under way: try again later",
                          WORKS_MAX);
    memset(work, 0, sizeof(*work));
    work->index = (unsigned char)(work - exports->works);
    work->done = exports->pipe[1];
    work->order = *order;
    claas_random_hex(hex, 8);
    work->path = claas_format("%s/" PREFIX "%s.zip", staging, hex);
    rc = work->path ? export_open(directory, order->optimizer, &work->files)
                    : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc == 0)
        rc = start_thread(work);
    if (rc < 0)
        work_done(work);
    else
        work->busy = true;
    return rc;
}

bool exports_idle(const struct exports *exports)
{
    for (size_t i = 0; i < WORKS_MAX; i++)
        if (exports->works[i].busy)
            return false;
    return true;
}

int exports_fd(const struct exports *exports)
{
    return exports->pipe[0];
}

void exports_abandon(struct exports *exports, const struct claas_reply_to *to)
{
    for (size_t i = 0; i < WORKS_MAX; i++) {
        struct work *work = &exports->works[i];

        if (work->busy && work->order.reply_to.correlation == to->correlation &&
            strcmp(work->order.reply_to.to, to->to) == 0)
            atomic_store(&work->stop, true);
    }
}

/* When the asker is known to be gone, the zip is removed here: nobody will open it. */
static void answer(struct exports *exports, struct work *work)
{
    cJSON *body;

    if (work->rc < 0) {
        claas_actor_reply_error(exports->actor, &work->order.reply_to, work->rc, work->error);
        return;
    }
    body = cJSON_CreateObject();
    claas_json_set_string(body, "path", work->path);
    claas_json_set_string(body, "lora_id", work->order.lora_id);
    claas_json_set_int(body, "version", work->order.version);
    if (atomic_load(&work->stop) ||
        claas_actor_reply(exports->actor, &work->order.reply_to, CLAAS_TAKE(body)) < 0)
        unlink(work->path);
    claas_json_free(&body);
}

void exports_finish(struct exports *exports)
{
    unsigned char index = WORKS_MAX;
    struct work *work;

    if (read(exports->pipe[0], &index, 1) != 1 || index >= WORKS_MAX)
        return;
    work = &exports->works[index];
    pthread_join(work->thread, NULL);
    answer(exports, work);
    work_done(work);
}

/* --- zips that nobody fetched ---------------------------------------------------------- */

static bool is_written(const struct exports *exports, const char *path)
{
    for (size_t i = 0; i < WORKS_MAX; i++)
        if (exports->works[i].busy && strcmp(exports->works[i].path, path) == 0)
            return true;
    return false;
}

static void sweep(const struct exports *exports, const char *path)
{
    struct stat info;

    if (!is_written(exports, path) && stat(path, &info) == 0 && time(NULL) - info.st_mtime > KEPT_S)
        unlink(path);
}

void exports_sweep(const struct exports *exports, const char *staging)
{
    DIR *dir = opendir(staging);
    struct dirent *entry;

    if (!dir)
        return;
    while ((entry = readdir(dir)) != NULL) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/%s", staging, entry->d_name);

        if (path && strncmp(entry->d_name, PREFIX, strlen(PREFIX)) == 0)
            sweep(exports, path);
    }
    closedir(dir);
}
