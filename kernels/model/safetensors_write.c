/* Writer of safetensors: float32 tensors in the caller's order, header padded with spaces so that
 * the data is 8-aligned (what the reference implementation does), written beside the target and
 * renamed over it after fsync. */
#include "claas/safetensors.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "claas/buf.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"

#define SEND_BYTES ((size_t)16 << 20)

static int tensor_bytes(const struct claas_safetensor_out *tensor, size_t *ret)
{
    size_t bytes = sizeof(float);

    if (tensor->dims < 0 || tensor->dims > 4)
        return claas_fail(CLAAS_ERR_INVALID, "tensor '%s': %d dimensions", tensor->name,
                          tensor->dims);
    for (int i = 0; i < tensor->dims; i++)
        if (tensor->shape[i] < 0 || __builtin_mul_overflow(bytes, (size_t)tensor->shape[i], &bytes))
            return claas_fail(CLAAS_ERR_INVALID, "tensor '%s': bad shape", tensor->name);
    *ret = bytes;
    return 0;
}

/* The entry of one tensor at `offset`; a NULL child surfaces when the tree is printed. */
static void add_entry(cJSON *header, const struct claas_safetensor_out *tensor, size_t offset,
                      size_t bytes)
{
    cJSON *entry = claas_json_set(header, tensor->name, cJSON_CreateObject());
    cJSON *shape, *offsets;

    claas_json_set_string(entry, "dtype", "F32");
    shape = claas_json_set(entry, "shape", cJSON_CreateArray());
    for (int i = 0; i < tensor->dims; i++)
        cJSON_AddItemToArray(shape, cJSON_CreateNumber((double)tensor->shape[i]));
    offsets = claas_json_set(entry, "data_offsets", cJSON_CreateArray());
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)offset));
    cJSON_AddItemToArray(offsets, cJSON_CreateNumber((double)(offset + bytes)));
}

/* Length prefix and padded JSON, ready to be written. */
static int build_header(const struct claas_safetensor_out *tensors, size_t count,
                        const char *const *metadata, struct claas_buf *ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *header = cJSON_CreateObject();
    CLAAS_AUTO_FREE char *text = NULL;
    size_t offset = 0, bytes = 0;

    if (metadata && metadata[0]) {
        cJSON *map = claas_json_set(header, "__metadata__", cJSON_CreateObject());
        for (size_t i = 0; metadata[i]; i += 2)
            claas_json_set_string(map, metadata[i], metadata[i + 1]);
    }
    for (size_t i = 0; i < count; i++) {
        int rc = tensor_bytes(&tensors[i], &bytes);
        if (rc < 0)
            return rc;
        add_entry(header, &tensors[i], offset, bytes);
        if (__builtin_add_overflow(offset, bytes, &offset))
            return claas_fail(CLAAS_ERR_INVALID, "the tensors exceed the address space");
    }
    text = claas_json_print(header);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    uint64_t length = (strlen(text) + 7) / 8 * 8;
    claas_buf_add(ret, &length, sizeof(length));
    claas_buf_add_text(ret, text);
    while (!ret->error && ret->length % 8 != 0)
        claas_buf_add(ret, " ", 1);
    return ret->error ? claas_fail(ret->error, "the header is too large") : 0;
}

/* After every SEND_BYTES the kernel is told to write out what it has, so that the fsync at the end
 * finds most of the work done: a file of a gigabyte goes to the disk while it is copied to the page
 * cache. */
static int write_all(int fd, const struct claas_buf *header,
                     const struct claas_safetensor_out *tensors, size_t count,
                     bool (*is_unwanted)(void *arg), void *arg)
{
    size_t bytes = 0, waiting = header->length;
    off_t sent = 0;
    int rc = claas_fd_write_all(fd, header->data, header->length);

    for (size_t i = 0; i < count && rc >= 0; i++) {
        if (is_unwanted && is_unwanted(arg))
            return claas_fail(CLAAS_ERR_CANCELLED, "the file is no longer wanted");
        rc = tensor_bytes(&tensors[i], &bytes);
        if (rc >= 0)
            rc = claas_fd_write_all(fd, tensors[i].data, bytes);
        waiting += bytes;
        if (waiting < SEND_BYTES)
            continue;
        (void)sync_file_range(fd, sent, (off_t)waiting, SYNC_FILE_RANGE_WRITE);
        sent += (off_t)waiting;
        waiting = 0;
    }
    if (rc >= 0 && fsync(fd) < 0)
        rc = claas_fail_errno("fsync");
    return rc;
}

int claas_safetensors_write(const char *path, const struct claas_safetensor_out *tensors,
                            size_t count, const char *const *metadata)
{
    return claas_safetensors_write_unless(path, tensors, count, metadata, NULL, NULL);
}

int claas_safetensors_write_unless(const char *path, const struct claas_safetensor_out *tensors,
                                   size_t count, const char *const *metadata,
                                   bool (*is_unwanted)(void *arg), void *arg)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf header;
    CLAAS_AUTO_FREE char *temporary = claas_format("%s.tmp%d", path, (int)getpid());

    claas_buf_init(&header, CLAAS_SAFETENSORS_HEADER_MAX);
    if (!temporary)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = build_header(tensors, count, metadata, &header);
    if (rc < 0)
        return rc;
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return claas_fail_errno("cannot create '%s'", temporary);
    rc = write_all(fd, &header, tensors, count, is_unwanted, arg);
    if (close(fd) < 0 && rc >= 0)
        rc = claas_fail_errno("close");
    if (rc >= 0 && rename(temporary, path) < 0)
        rc = claas_fail_errno("cannot rename to '%s'", path);
    if (rc < 0) {
        (void)unlink(temporary);
        return claas_fail_context(rc, "%s: ", path);
    }
    return claas_fsync_parent(path);
}
