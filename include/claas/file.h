/* Files that must survive kill -9 and a full disk. */
#ifndef CLAAS_FILE_H
#define CLAAS_FILE_H

#include <stddef.h>
#include <stdint.h>

/* Reads a whole file of at most `limit` bytes (else TOO_LARGE) into *ret_data, with a NUL after its
 * last byte; free with free(). ret_length may be NULL. A pipe that nobody writes to reads as
 * empty. */
int claas_file_read(const char *path, size_t limit, char **ret_data, size_t *ret_length);
/* Writes a new file and fsyncs it; an existing one is replaced only by a complete one (temporary +
 * rename). */
int claas_file_write(const char *path, const void *data, size_t length);
/* The same without waiting for the disk, for what can be made again and has a checksum: processes
 * see the old file or the new one, but after a power failure it may be neither. */
int claas_file_write_cache(const char *path, const void *data, size_t length);
/* write(2) until all is written. */
int claas_fd_write_all(int fd, const void *data, size_t length);
/* fsync of a file or directory. */
int claas_fsync_path(const char *path);
/* fsync of the directory that holds `path`, so that a rename in it is durable. */
int claas_fsync_parent(const char *path);
/* mkdir -p, with mode 0700 for what is missing. What was made survives a power failure, unless the
 * directory above it may not be read (then it cannot be fsynced). */
int claas_mkdir_all(const char *path);
/* rm -r that never follows a symbolic link; a missing path is fine. */
int claas_remove_all(const char *path);
/* A read-only mapping of a whole file: *ret_data is NULL for an empty one. Release with
 * claas_file_unmap. */
int claas_file_map(const char *path, const uint8_t **ret_data, size_t *ret_length);
void claas_file_unmap(const uint8_t *data, size_t length);

/* What a process that crashed leaves in the data directory: one line, "signal 11". The jobs that
 * were in work get a strike: by storage at its next start; where trainer or scheduler are in a
 * process without storage, by the scheduler, which goes on or starts again. */
#define CLAAS_CRASH_MARKER         "crash-marker"
#define CLAAS_CRASH_MARKER_TRAINER "crash-marker.trainer"
#define CLAAS_CRASH_MARKER_MAX     256

#endif
