/* Takes a PEFT adapter out of an uploaded zip. Only the files of an adapter are taken, by their
 * base names, into a new directory; paths inside the archive never decide where anything is
 * written, and sizes are bounded while they are read, by what the largest adapter of this model
 * takes and not by what the headers say: a few kilobytes of zip can hold gigabytes of zeros. */
#include "unpack.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/adapter.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

#define TEXT_BYTES_MAX  ((int64_t)1 << 20) /* the configuration; a safetensors file's header */
#define ARCHIVE_ENTRIES 64
#define OTHER_BYTES_MAX ((int64_t)256 << 20) /* of all files in the zip that are passed over */

static const struct {
    const char *name;
    int images; /* float32 images of the adapter that it holds */
} wanted[] = {
    {"adapter_config.json", 0},
    {"adapter_model.safetensors", 1},
    {"optimizer.safetensors", 2},
};

struct unpacking {
    const struct unpack_order *order;
    struct archive *reader;
    int64_t image_bytes;
    unsigned found; /* bits of wanted */
};

/* A float32 image of the largest adapter of this model. */
static int64_t largest_image(const struct claas_model_config *model)
{
    const struct claas_lora_config largest = {CLAAS_RANK_MAX, 1, CLAAS_MODULE_ALL};

    return (int64_t)(claas_lora_parameter_count(model, &largest) * sizeof(float));
}

static int64_t file_limit(unsigned file, int64_t image_bytes)
{
    return TEXT_BYTES_MAX + wanted[file].images * image_bytes;
}

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

/* A file that this machine cannot read says nothing against the zip. libarchive gives a malformed
 * one EILSEQ, EINVAL or a negative number. */
static int fail_archive(struct archive *reader, const char *what)
{
    int number = archive_errno(reader);
    const char *text = archive_error_string(reader);

    if (number > 0 && number != EILSEQ && number != EINVAL) {
        errno = number;
        return claas_fail_errno("the upload");
    }
    return claas_fail(CLAAS_ERR_FORMAT, "%s: %s", what, text ? text : "damaged");
}

static int fail_large(const char *name, int64_t limit)
{
    return claas_fail(CLAAS_ERR_TOO_LARGE,
                      "%s in the zip is larger than any adapter of this model (%lld bytes)", name,
                      (long long)limit);
}

static int copy_entry(const struct unpacking *unpacking, int fd, const char *name, int64_t limit)
{
    char block[65536];
    int64_t total = 0;
    la_ssize_t n;

    while ((n = archive_read_data(unpacking->reader, block, sizeof(block))) > 0) {
        int rc;

        if (atomic_load(unpacking->order->stop))
            return claas_fail(CLAAS_ERR_CANCELLED, NULL);
        total += n;
        if (total > limit)
            return fail_large(name, limit);
        rc = claas_fd_write_all(fd, block, (size_t)n);
        if (rc < 0)
            return claas_fail_context(rc, "%s: ", name);
    }
    if (n < 0)
        return claas_fail_context(fail_archive(unpacking->reader, "the zip is damaged"),
                                  "%s: ", name);
    return 0;
}

static int write_entry(const struct unpacking *unpacking, struct archive_entry *entry,
                       unsigned file)
{
    const char *name = wanted[file].name;
    int64_t limit = file_limit(file, unpacking->image_bytes);
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", unpacking->order->directory, name);
    CLAAS_AUTO(close_fd) int fd = -1;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (archive_entry_size_is_set(entry) && archive_entry_size(entry) > limit)
        return fail_large(name, limit);
    fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return claas_fail_errno("%s", name);
    return copy_entry(unpacking, fd, name, limit);
}

static int read_entries(struct unpacking *unpacking)
{
    struct archive *reader = unpacking->reader;
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

            if (strcmp(name, wanted[i].name) != 0 || archive_entry_filetype(entry) != AE_IFREG)
                continue;
            if (unpacking->found & (1u << i))
                return claas_fail(CLAAS_ERR_FORMAT, "the zip holds %s twice", name);
            rc = write_entry(unpacking, entry, i);
            if (rc < 0)
                return rc;
            unpacking->found |= 1u << i;
        }
    }
    if (status != ARCHIVE_EOF)
        return fail_archive(reader, "the upload is no readable zip");
    return 0;
}

int unpack_check_size(const struct claas_model_config *model, const char *zip_path)
{
    int64_t limit = OTHER_BYTES_MAX;
    struct stat info;

    for (unsigned i = 0; i < CLAAS_COUNT(wanted); i++)
        limit += file_limit(i, largest_image(model));
    if (stat(zip_path, &info) < 0)
        return claas_fail_errno("the upload");
    if (info.st_size > limit)
        return claas_fail(CLAAS_ERR_TOO_LARGE,
                          "the upload has %lld bytes, an adapter of this model needs at most %lld",
                          (long long)info.st_size, (long long)limit);
    return 0;
}

static int unpack(struct unpacking *unpacking)
{
    const struct unpack_order *order = unpacking->order;
    CLAAS_AUTO(reader_free) struct archive *reader = archive_read_new();
    int rc;

    if (!reader)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    unpacking->reader = reader;
    /* By the zip's directory, not as a stream: so files that are passed over are not
     * decompressed. */
    archive_read_support_format_zip_seekable(reader);
    if (archive_read_open_filename(reader, order->zip_path, 65536) != ARCHIVE_OK)
        return fail_archive(reader, "the upload is no readable zip");
    rc = claas_mkdir_all(order->directory);
    if (rc == 0)
        rc = read_entries(unpacking);
    if (rc == 0 && (unpacking->found & 3u) != 3u)
        rc = claas_fail(CLAAS_ERR_FORMAT,
                        "the zip needs adapter_config.json and adapter_model.safetensors");
    return rc;
}

int unpack_adapter(const struct unpack_order *order)
{
    struct unpacking unpacking = {.order = order, .image_bytes = largest_image(order->model)};
    int rc = unpack(&unpacking);

    if (rc < 0) {
        claas_fail_hide_path(rc, order->directory, "the upload");
        claas_fail_hide_path(rc, order->zip_path, "the upload");
    }
    return rc;
}
