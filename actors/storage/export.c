/* The zip of a version. Adapters are float32 noise to a compressor (39 MB/s for nothing), so
 * entries are stored; times, owners and order are fixed, so that two exports of a version can be
 * compared by their bytes. */
#include "export.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapter_files.h"
#include "claas/err.h"
#include "claas/mem.h"

#define BLOCK_BYTES ((size_t)1 << 18)

/* Sorted. */
static const char *const names[] = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_MOMENTS};

void export_close(struct export_files *files)
{
    for (size_t i = 0; i < files->count; i++)
        close(files->fds[i]);
    files->count = 0;
}

int export_open(const char *directory, bool optimizer, struct export_files *ret)
{
    CLAAS_AUTO(export_close) struct export_files files = {.count = 0};

    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, names[i]);
        bool moments = strcmp(names[i], ADAPTER_MOMENTS) == 0;
        int fd;

        if (moments && !optimizer)
            continue;
        if (!path)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (fd < 0 && errno == ENOENT && moments)
            return claas_fail(CLAAS_ERR_NOT_FOUND,
                              "the optimizer's state of this version is not kept "
                              "(storage.keep_moments)");
        if (fd < 0)
            return claas_fail_errno("%s", names[i]);
        files.fds[files.count] = fd;
        files.names[files.count++] = names[i];
    }
    *ret = files;
    files.count = 0; /* handed over */
    return 0;
}

static void archive_done(struct archive **archive)
{
    if (*archive)
        archive_write_free(*archive);
    *archive = NULL;
}

static void entry_done(struct archive_entry **entry)
{
    if (*entry)
        archive_entry_free(*entry);
    *entry = NULL;
}

static int fail_archive(struct archive *archive)
{
    int number = archive_errno(archive);

    if (number > 0) {
        errno = number;
        return claas_fail_errno("export");
    }
    return claas_fail(CLAAS_ERR_IO, "export: %s", archive_error_string(archive));
}

static int copy_file(struct archive *archive, int fd, int64_t size, char *block,
                     const atomic_bool *stop)
{
    int64_t at = 0;

    while (at < size) {
        ssize_t n = pread(fd, block, BLOCK_BYTES, (off_t)at);

        if (atomic_load(stop))
            return claas_fail(CLAAS_ERR_CANCELLED, "export: nobody waits for it any more");
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? claas_fail_errno("export")
                         : claas_fail(CLAAS_ERR_CORRUPT, "export: a file became shorter");
        if (archive_write_data(archive, block, (size_t)n) != n)
            return fail_archive(archive);
        at += n;
    }
    return 0;
}

static int add_file(struct archive *archive, int fd, const char *name, char *block,
                    const atomic_bool *stop)
{
    CLAAS_AUTO(entry_done) struct archive_entry *entry = archive_entry_new();
    struct stat info;

    if (!entry)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (fstat(fd, &info) < 0)
        return claas_fail_errno("export");
    archive_entry_set_pathname(entry, name);
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_entry_set_perm(entry, 0644);
    archive_entry_set_size(entry, info.st_size);
    archive_entry_set_mtime(entry, 0, 0);
    if (archive_write_header(archive, entry) != ARCHIVE_OK)
        return fail_archive(archive);
    return copy_file(archive, fd, (int64_t)info.st_size, block, stop);
}

static int write_zip(const struct export_files *files, int fd, const atomic_bool *stop)
{
    CLAAS_AUTO(archive_done) struct archive *archive = archive_write_new();
    CLAAS_AUTO_FREE char *block = claas_alloc(BLOCK_BYTES, 1);

    if (!archive || !block)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (archive_write_set_format_zip(archive) != ARCHIVE_OK ||
        archive_write_set_options(archive, "zip:compression=store") != ARCHIVE_OK ||
        archive_write_set_bytes_per_block(archive, (int)BLOCK_BYTES) != ARCHIVE_OK ||
        archive_write_set_bytes_in_last_block(archive, 1) != ARCHIVE_OK ||
        archive_write_open_fd(archive, fd) != ARCHIVE_OK)
        return fail_archive(archive);
    for (size_t i = 0; i < files->count; i++) {
        int rc = add_file(archive, files->fds[i], files->names[i], block, stop);

        if (rc < 0)
            return rc;
    }
    return archive_write_close(archive) == ARCHIVE_OK ? 0 : fail_archive(archive);
}

int export_write(const struct export_files *files, const char *path, const atomic_bool *stop)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int rc;

    if (fd < 0)
        return claas_fail_errno("export");
    rc = write_zip(files, fd, stop);
    close(fd);
    if (rc < 0)
        unlink(path);
    return rc;
}
