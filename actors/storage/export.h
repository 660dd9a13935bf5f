/* An adapter version as a zip: stored, sorted, without times: the same bytes for the same version.
 * The optimizer's state is kept for the newest versions only, so it is part of a zip only when it
 * is asked for. */
#ifndef CLAAS_STORAGE_EXPORT_H
#define CLAAS_STORAGE_EXPORT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define EXPORT_FILES_MAX 8

/* The files of a version, open: they stay readable when retention removes the version meanwhile. */
struct export_files {
    int fds[EXPORT_FILES_MAX];
    const char *names[EXPORT_FILES_MAX];
    size_t count;
};

/* Opens the files of the directory; with `optimizer` its state too: NOT_FOUND if that is gone. */
int export_open(const char *directory, bool optimizer, struct export_files *ret);
void export_close(struct export_files *files);
/* Writes `path`, which must not exist; removes it again on failure. `stop` breaks it off:
 * CANCELLED. Reads and writes in bulk: not for an actor's loop. */
int export_write(const struct export_files *files, const char *path, const atomic_bool *stop);

#endif
