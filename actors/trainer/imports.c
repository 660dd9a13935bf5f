/* Uploaded zips being unpacked beside the trainer's loop: a thread each, at most a few, as storage
 * writes its exports. A thread owns its import until it has put the import's number into the pipe;
 * then the loop joins it. The one thing shared is the flag that breaks it off. */
#include "imports.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "unpack.h"

#define IMPORTS_MAX 4

struct import {
    bool busy;
    pthread_t thread;
    int done_fd; /* write end of the pipe */
    unsigned char index;
    struct unpack_order order;
    char *zip_path, *directory; /* what the order borrows */
    atomic_bool stop;
    import_done_fn *done;
    void *arg;
    int rc;
    char error[512];
};

struct imports {
    struct trainer *trainer;
    int pipe[2];
    struct import items[IMPORTS_MAX];
};

int imports_new(struct trainer *trainer, struct imports **ret)
{
    CLAAS_AUTO(imports_free) struct imports *imports = CLAAS_NEW(struct imports);

    if (!imports)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    imports->trainer = trainer;
    imports->pipe[0] = imports->pipe[1] = -1;
    if (pipe2(imports->pipe, O_CLOEXEC) < 0)
        return claas_fail_errno("pipe");
    *ret = CLAAS_TAKE(imports);
    return 0;
}

static void import_free(struct import *import)
{
    free(import->zip_path);
    free(import->directory);
    import->zip_path = import->directory = NULL;
    import->busy = false;
}

void imports_free(struct imports **imports)
{
    if (!*imports)
        return;
    for (size_t i = 0; i < IMPORTS_MAX; i++) {
        struct import *import = &(*imports)->items[i];

        if (!import->busy)
            continue;
        atomic_store(&import->stop, true);
        pthread_join(import->thread, NULL);
        import->done((*imports)->trainer, import->arg, CLAAS_ERR_UNAVAILABLE,
                     "the trainer stopped");
        import_free(import);
    }
    for (int i = 0; i < 2; i++)
        if ((*imports)->pipe[i] >= 0)
            close((*imports)->pipe[i]);
    free(*imports);
    *imports = NULL;
}

static void *run(void *arg)
{
    struct import *import = arg;

    claas_log_thread_name("import");
    import->rc = unpack_adapter(&import->order);
    if (import->rc < 0)
        snprintf(import->error, sizeof(import->error), "%s", claas_error_text());
    /* One byte into an empty pipe of 64 KiB: neither short nor blocking. */
    (void)!write(import->done_fd, &import->index, 1);
    return NULL;
}

/* Signals are the main thread's. */
static int start_thread(struct import *import)
{
    sigset_t all, old;
    int number;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    number = pthread_create(&import->thread, NULL, run, import);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (number != 0)
        return claas_fail(CLAAS_ERR_UNAVAILABLE, "no thread for an import: %s", strerror(number));
    return 0;
}

int imports_start(struct imports *imports, const char *zip_path, const char *directory,
                  import_done_fn *done, void *arg)
{
    const struct claas_model_config *model = claas_model_config(imports->trainer->model);
    struct import *import = NULL;
    int rc = unpack_check_size(model, zip_path);

    if (rc < 0)
        return rc;
    for (size_t i = 0; i < IMPORTS_MAX && !import; i++)
        if (!imports->items[i].busy)
            import = &imports->items[i];
    if (!import)
        return claas_fail(CLAAS_ERR_OVERLOADED, "%d imports are under way: try again later",
                          IMPORTS_MAX);
    memset(import, 0, sizeof(*import));
    import->index = (unsigned char)(import - imports->items);
    import->done_fd = imports->pipe[1];
    import->done = done;
    import->arg = arg;
    import->zip_path = claas_strdup(zip_path);
    import->directory = claas_strdup(directory);
    import->order =
        (struct unpack_order){model, import->zip_path, import->directory, &import->stop};
    rc = import->zip_path && import->directory ? start_thread(import)
                                               : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc < 0)
        import_free(import);
    else
        import->busy = true;
    return rc;
}

int imports_fd(const struct imports *imports)
{
    return imports->pipe[0];
}

void imports_finish(struct imports *imports)
{
    unsigned char index = IMPORTS_MAX;
    struct import *import;

    if (read(imports->pipe[0], &index, 1) != 1 || index >= IMPORTS_MAX)
        return;
    import = &imports->items[index];
    pthread_join(import->thread, NULL);
    import->done(imports->trainer, import->arg, import->rc, import->error);
    import_free(import);
}
