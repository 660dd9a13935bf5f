/* Writing a kept adapter: see staging.h. One that is dropped while it is written lives on until the
 * device has let go of it. */
#include "staging.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"

struct staging {
    struct trainer *trainer;
    uint64_t id;
    char directory[4096];
    bool ended, dropped;
    int error;
    char *text;
    staged_fn *done;
    void *arg;
};

static void staging_free(struct staging *staging)
{
    free(staging->text);
    free(staging);
}

static void saved(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct staging *staging = arg;

    staging->ended = true;
    trainer->stagings--;
    if (event->kind != CLAAS_EVENT_SAVED) {
        staging->error = event->error;
        staging->text = claas_strdup(event->text);
    }
    if (staging->dropped)
        staging_drop(&staging);
    else if (staging->done)
        staging->done(trainer, staging->arg, staging->error, staging->text);
}

int staging_start(struct trainer *trainer, claas_adapter_t *kept, struct staging **ret)
{
    struct staging *staging = CLAAS_NEW(struct staging);
    char hex[17];
    int rc;

    if (!staging)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    staging->trainer = trainer;
    claas_random_hex(hex, 8);
    snprintf(staging->directory, sizeof(staging->directory), "%s/staging/cycle-%ld-%s",
             claas_config_string(trainer->config, "data"), (long)getpid(), hex);
    rc = claas_device_adapter_save(trainer->client, kept, staging->directory, &staging->id);
    if (rc == 0)
        rc = device_call_add(trainer, staging->id, saved, staging);
    if (rc < 0) {
        staging_free(staging);
        return rc;
    }
    trainer->stagings++;
    *ret = staging;
    return 0;
}

void staging_await(struct staging *staging, staged_fn *done, void *arg)
{
    staging->done = done;
    staging->arg = arg;
    if (staging->ended)
        done(staging->trainer, arg, staging->error, staging->text);
}

bool staging_has_failed(const struct staging *staging)
{
    return staging->ended && staging->error;
}

bool staging_is_gone(const struct staging *staging)
{
    return staging->ended && !staging->error && access(staging->directory, F_OK) < 0;
}

const char *staging_directory(const struct staging *staging)
{
    return staging->directory;
}

void staging_drop(struct staging **ref)
{
    struct staging *staging = CLAAS_TAKE(*ref);

    if (!staging)
        return;
    staging->dropped = true;
    if (!staging->ended) {
        claas_device_cancel(staging->trainer->client, staging->id);
        return;
    }
    if (!staging->error) { /* there, unless it was published */
        claas_device_adapter_forget(staging->trainer->device, staging->directory);
        staged_remove(staging->directory);
    }
    staging_free(staging);
}

/* Whether the entry is a cycle's directory of a dead process, or of this process before the trainer
 * was restarted: this trainer has staged nothing yet. */
static bool is_left_over(const char *name)
{
    long pid = 0;

    if (sscanf(name, "cycle-%ld-", &pid) != 1 || pid <= 0)
        return false;
    return pid == (long)getpid() || (kill((pid_t)pid, 0) < 0 && errno == ESRCH);
}

void staging_sweep(struct trainer *trainer)
{
    CLAAS_AUTO_FREE char *staging =
        claas_format("%s/staging", claas_config_string(trainer->config, "data"));
    DIR *dir = staging ? opendir(staging) : NULL;
    const struct dirent *entry;

    if (!dir)
        return; /* storage has not made it yet */
    while ((entry = readdir(dir)) != NULL) {
        CLAAS_AUTO_FREE char *path =
            is_left_over(entry->d_name) ? claas_format("%s/%s", staging, entry->d_name) : NULL;

        if (path)
            staged_remove(path);
    }
    closedir(dir);
}
