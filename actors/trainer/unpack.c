/* Takes a PEFT adapter out of an uploaded zip. Only the files of an adapter are taken, by their
 * base names, into a new directory; paths inside the archive never decide where anything is
 * written, and sizes are bounded while they are read, not by what the headers say. */
#include <archive.h>
#include <archive_entry.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "trainer_internal.h"

#define FILE_BYTES_MAX  ((int64_t)4 << 30)
#define ARCHIVE_ENTRIES 64

static const char *const wanted[] = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
};

static void reader_free(struct archive **reader)
{
    if (*reader)
        archive_read_free(*reader);
    *reader = NULL;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

static int write_entry(struct archive *reader, const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    CLAAS_AUTO(close_fd) int fd = -1;
    char block[65536];
    int64_t total = 0;
    la_ssize_t n;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return claas_fail_errno("%s", name);
    while ((n = archive_read_data(reader, block, sizeof(block))) > 0) {
        int rc;

        total += n;
        if (total > FILE_BYTES_MAX)
            return claas_fail(CLAAS_ERR_TOO_LARGE, "%s in the zip is too large", name);
        rc = claas_fd_write_all(fd, block, (size_t)n);
        if (rc < 0)
            return rc;
    }
    if (n < 0)
        return claas_fail(CLAAS_ERR_FORMAT, "the zip is damaged at %s", name);
    return 0;
}

static int read_entries(struct archive *reader, const char *directory, unsigned *found)
{
    struct archive_entry *entry;
    int entries = 0, status;

    while ((status = archive_read_next_header(reader, &entry)) == ARCHIVE_OK) {
        const char *path = archive_entry_pathname(entry);
        const char *name = path ? strrchr(path, '/') : NULL;

        name = name ? name + 1 : path;
        if (++entries > ARCHIVE_ENTRIES)
            return claas_fail(CLAAS_ERR_LIMIT, "the zip holds more than %d files", ARCHIVE_ENTRIES);
        for (unsigned i = 0; name && i < CLAAS_COUNT(wanted); i++) {
            int rc;

            if (strcmp(name, wanted[i]) != 0 || archive_entry_filetype(entry) != AE_IFREG)
                continue;
            if (*found & (1u << i))
                return claas_fail(CLAAS_ERR_FORMAT, "the zip holds %s twice", name);
            rc = write_entry(reader, directory, wanted[i]);
            if (rc < 0)
                return rc;
            *found |= 1u << i;
        }
    }
    if (status != ARCHIVE_EOF)
        return claas_fail(CLAAS_ERR_FORMAT, "the upload is no readable zip: %s",
                          archive_error_string(reader) ? archive_error_string(reader) : "damaged");
    return 0;
}

int unpack_adapter(const char *zip_path, const char *directory)
{
    CLAAS_AUTO(reader_free) struct archive *reader = archive_read_new();
    unsigned found = 0;
    int rc;

    if (!reader)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    archive_read_support_format_zip(reader);
    if (archive_read_open_filename(reader, zip_path, 65536) != ARCHIVE_OK)
        return claas_fail(CLAAS_ERR_FORMAT, "the upload is no readable zip: %s",
                          archive_error_string(reader));
    rc = claas_mkdir_all(directory);
    if (rc == 0)
        rc = read_entries(reader, directory, &found);
    if (rc == 0 && (found & 3u) != 3u)
        rc = claas_fail(CLAAS_ERR_FORMAT,
                        "the zip needs adapter_config.json and adapter_model.safetensors");
    return rc;
}
