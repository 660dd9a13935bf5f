/* Files that must survive kill -9 and a full disk.
 *
 * A file is replaced by write-to-temporary, fsync, rename, fsync of the directory: at any instant
 * the name shows the whole old content or the whole new one. A failure leaves the old file
 * untouched and removes the temporary. A cache goes without the fsyncs. */
#include "claas/file.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define READ_CHUNK ((size_t)1 << 30) /* one read(2) moves at most 2 GiB on Linux */

static void close_fd(int *fd)
{
    int saved_errno = errno;

    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    errno = saved_errno;
}

/* A pipe that nobody writes to is not waited for: it is empty. */
static int open_to_read(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd >= 0)
        (void)fcntl(fd, F_SETFL, 0);
    return fd;
}

/* A new string: the directory that holds `path` ("." if it names none). */
static char *parent_of(const char *path)
{
    size_t length = strlen(path);

    while (length > 1 && path[length - 1] == '/')
        length--;
    while (length > 0 && path[length - 1] != '/')
        length--;
    while (length > 1 && path[length - 1] == '/')
        length--;
    return length > 0 ? claas_strndup(path, length) : claas_strdup(".");
}

/* Reads to the end, which need not be where fstat said (/proc, a file that grows). */
static int read_to_end(int fd, const char *path, size_t limit, char **data, size_t *length)
{
    struct stat info;
    size_t capacity;

    if (fstat(fd, &info) < 0)
        return claas_fail_errno("%s", path);
    if (info.st_size > 0 && (uintmax_t)info.st_size > limit)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "%s: %jd bytes, the limit is %zu", path,
                          (intmax_t)info.st_size, limit);
    /* One byte more than the file: the read that meets the end needs room, and then the NUL. */
    capacity = (size_t)info.st_size + 1;
    for (;;) {
        size_t room;
        ssize_t n;

        if (!*data || *length == capacity) {
            char *grown;

            if (*data)
                capacity = capacity < 4096 ? 4096 : capacity * 2;
            grown = claas_realloc(*data, capacity, 1);
            if (!grown)
                return claas_fail(CLAAS_ERR_NO_MEMORY, "%s: no memory for %zu bytes", path,
                                  capacity);
            *data = grown;
        }
        room = capacity - *length;
        n = read(fd, *data + *length, room < READ_CHUNK ? room : READ_CHUNK);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return claas_fail_errno("%s", path);
        if (n == 0) {
            (*data)[*length] = '\0';
            return 0;
        }
        *length += (size_t)n;
        if (*length > limit)
            return claas_fail(CLAAS_ERR_TOO_LARGE, "%s: more than %zu bytes", path, limit);
    }
}

int claas_file_read(const char *path, size_t limit, char **ret_data, size_t *ret_length)
{
    CLAAS_AUTO(close_fd) int fd = open_to_read(path);
    CLAAS_AUTO_FREE char *data = NULL;
    size_t length = 0;
    int rc;

    if (fd < 0)
        return claas_fail_errno("%s", path);
    rc = read_to_end(fd, path, limit, &data, &length);
    if (rc < 0)
        return rc;
    *ret_data = CLAAS_TAKE(data);
    if (ret_length)
        *ret_length = length;
    return 0;
}

int claas_fd_write_all(int fd, const void *data, size_t length)
{
    const char *bytes = data;

    while (length > 0) {
        ssize_t n = write(fd, bytes, length < READ_CHUNK ? length : READ_CHUNK);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return claas_fail_errno("write");
        bytes += n;
        length -= (size_t)n;
    }
    return 0;
}

static int fsync_fd(int fd, const char *path)
{
    while (fsync(fd) < 0) {
        if (errno == EINTR)
            continue;
        /* Some file systems have no fsync of a directory; then there is nothing to wait for. */
        if (errno == EINVAL)
            return 0;
        return claas_fail_errno("fsync %s", path);
    }
    return 0;
}

int claas_fsync_path(const char *path)
{
    CLAAS_AUTO(close_fd) int fd = open_to_read(path);

    if (fd < 0)
        return claas_fail_errno("%s", path);
    return fsync_fd(fd, path);
}

int claas_fsync_parent(const char *path)
{
    CLAAS_AUTO_FREE char *parent = parent_of(path);

    if (!parent)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_fsync_path(parent);
}

static int fill_and_rename(int fd, const char *temporary, const char *path, const void *data,
                           size_t length, bool durable)
{
    int rc = claas_fd_write_all(fd, data, length);

    if (rc < 0)
        return claas_fail_context(rc, "%s: ", path);
    if (durable)
        rc = fsync_fd(fd, path);
    if (rc < 0)
        return rc;
    if (rename(temporary, path) < 0)
        return claas_fail_errno("%s", path);
    return 0;
}

static int replace(const char *path, const void *data, size_t length, bool durable)
{
    CLAAS_AUTO_FREE char *temporary = claas_format("%s.tmp-XXXXXX", path);
    CLAAS_AUTO(close_fd) int fd = -1;
    int rc;

    if (!temporary)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        return claas_fail_errno("%s", path);
    rc = fill_and_rename(fd, temporary, path, data, length, durable);
    if (rc < 0) {
        unlink(temporary);
        return rc;
    }
    return durable ? claas_fsync_parent(path) : 0;
}

int claas_file_write(const char *path, const void *data, size_t length)
{
    return replace(path, data, length, true);
}

int claas_file_write_cache(const char *path, const void *data, size_t length)
{
    return replace(path, data, length, false);
}

int claas_mkdir_all(const char *path)
{
    CLAAS_AUTO_FREE char *prefix = claas_strdup(path);
    struct stat info;

    if (!prefix)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (!prefix[0])
        return claas_fail(CLAAS_ERR_INVALID, "an empty directory name");
    for (char *end = prefix + 1;; end++) {
        char kept = *end;

        if (kept != '/' && kept != '\0')
            continue;
        *end = '\0';
        if (mkdir(prefix, 0700) == 0) {
            int rc = claas_fsync_parent(prefix);

            /* A parent that may be written but not read cannot be opened to wait for. */
            if (rc < 0 && rc != CLAAS_ERR_DENIED)
                return rc;
        } else {
            /* On a read-only parent an existing directory answers EROFS, not EEXIST. */
            int number = errno;

            if (stat(prefix, &info) < 0) {
                errno = number == EEXIST ? errno : number;
                return claas_fail_errno("%s", prefix);
            }
            if (!S_ISDIR(info.st_mode)) {
                errno = number == EEXIST ? ENOTDIR : number;
                return claas_fail_errno("%s", prefix);
            }
        }
        *end = kept;
        if (kept == '\0')
            return 0;
    }
}

static int remove_at(int parent, const char *name);

static void close_dir(DIR **dir)
{
    int saved_errno = errno;

    if (*dir)
        closedir(*dir);
    *dir = NULL;
    errno = saved_errno;
}

/* 0, or -1 with errno. */
static int empty_dir(DIR *dir)
{
    struct dirent *entry;

    for (;;) {
        errno = 0;
        entry = readdir(dir);
        if (!entry)
            return errno == 0 ? 0 : -1;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (remove_at(dirfd(dir), entry->d_name) < 0)
            return -1;
    }
}

/* Everything goes through the parent's descriptor and O_NOFOLLOW, so that no link, not even one put
 * in place meanwhile, leads out of the tree. One descriptor per level of depth. 0, or -1 with
 * errno. */
static int remove_at(int parent, const char *name)
{
    CLAAS_AUTO(close_dir) DIR *dir = NULL;
    int fd;

    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT)
        return 0;
    if (errno != EISDIR && errno != EPERM) /* POSIX lets unlink of a directory answer EPERM */
        return -1;
    fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        if (errno == ENOTDIR || errno == ELOOP)
            errno = EPERM; /* a file that may not be removed */
        return errno == ENOENT ? 0 : -1;
    }
    dir = fdopendir(fd);
    if (!dir) {
        close_fd(&fd);
        return -1;
    }
    if (empty_dir(dir) < 0)
        return -1;
    return unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT ? 0 : -1;
}

int claas_remove_all(const char *path)
{
    size_t length = strlen(path);
    CLAAS_AUTO_FREE char *plain = NULL;

    if (length == 0)
        return claas_fail(CLAAS_ERR_INVALID, "an empty path");
    /* "link/" would be followed by the kernel whatever the flags say. */
    while (length > 1 && path[length - 1] == '/')
        length--;
    plain = claas_strndup(path, length);
    if (!plain)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (remove_at(AT_FDCWD, plain) < 0)
        return claas_fail_errno("cannot remove %s", plain);
    return 0;
}

int claas_file_map(const char *path, const uint8_t **ret_data, size_t *ret_length)
{
    CLAAS_AUTO(close_fd) int fd = open_to_read(path);
    struct stat info;
    void *data;

    if (fd < 0)
        return claas_fail_errno("%s", path);
    if (fstat(fd, &info) < 0)
        return claas_fail_errno("%s", path);
    if (!S_ISREG(info.st_mode))
        return claas_fail(CLAAS_ERR_INVALID, "%s: not a regular file", path);
    *ret_data = NULL;
    *ret_length = 0;
    if (info.st_size == 0)
        return 0;
    data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        return claas_fail_errno("cannot map %s", path);
    *ret_data = data;
    *ret_length = (size_t)info.st_size;
    return 0;
}

void claas_file_unmap(const uint8_t *data, size_t length)
{
    if (data)
        munmap((void *)(uintptr_t)data, length);
}
