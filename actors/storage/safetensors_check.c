/* The structure of a safetensors file: [u64 header length][JSON header][data]. The header must
 * describe the data exactly: every tensor as large as its type and shape say, end to end, no hole,
 * no overlap, the last byte the file's last.
 *
 * Files are read, not mapped: one that shrinks meanwhile gives a short read instead of a SIGBUS. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "adapter_files.h"
#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"

/* An adapter of 80 layers needs 0.2 MB; a hostile one must not need gigabytes. */
#define HEADER_BYTES_MAX ((uint64_t)16 << 20)
#define EXACT_MAX        (INT64_C(1) << 53)

struct span {
    int64_t begin, end;
    const char *name;
};

struct file {
    const char *path;
    int fd;
    int64_t size;
    int64_t data; /* offset of the first tensor byte */
};

static const struct {
    const char *name;
    int bytes;
} types[] = {
    {"F64", 8}, {"I64", 8},     {"U64", 8},     {"F32", 4}, {"I32", 4},
    {"U32", 4}, {"F16", 2},     {"BF16", 2},    {"I16", 2}, {"U16", 2},
    {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1},  {"BOOL", 1},
};

static void close_file(struct file *file)
{
    if (file->fd >= 0)
        close(file->fd);
    file->fd = -1;
}

static int fail_file(const struct file *file, const char *tensor, const char *what)
{
    if (tensor)
        return claas_fail(CLAAS_ERR_FORMAT, "%s: tensor '%.200s': %s", file->path, tensor, what);
    return claas_fail(CLAAS_ERR_FORMAT, "%s: %s", file->path, what);
}

static int read_at(const struct file *file, void *target, size_t length, int64_t offset)
{
    char *bytes = target;

    while (length > 0) {
        ssize_t n = pread(file->fd, bytes, length, (off_t)offset);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return claas_fail_errno("%s", file->path);
        if (n == 0)
            return fail_file(file, NULL, "the file ends too early");
        bytes += n;
        offset += n;
        length -= (size_t)n;
    }
    return 0;
}

static int open_file(struct file *file, const char *path)
{
    struct stat info;

    *file = (struct file){path, open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW), 0, 0};
    if (file->fd < 0)
        return claas_fail_errno("%s", path);
    if (fstat(file->fd, &info) < 0)
        return claas_fail_errno("%s", path);
    if (!S_ISREG(info.st_mode))
        return fail_file(file, NULL, "no plain file");
    file->size = (int64_t)info.st_size;
    return 0;
}

static int read_header(struct file *file, cJSON **ret)
{
    CLAAS_AUTO_FREE char *text = NULL;
    uint8_t prefix[8];
    uint64_t length = 0;
    int rc;

    if (file->size < 8)
        return fail_file(file, NULL, "shorter than the length of its header");
    rc = read_at(file, prefix, sizeof(prefix), 0);
    if (rc < 0)
        return rc;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | prefix[i];
    if (length > HEADER_BYTES_MAX || length > (uint64_t)file->size - 8)
        return fail_file(file, NULL, "the header is longer than the file");
    text = claas_alloc(length + 1, 1);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = read_at(file, text, length, 8);
    if (rc == 0)
        rc = claas_json_parse(text, length, length, ret);
    if (rc == 0 && !cJSON_IsObject(*ret))
        rc = claas_fail(CLAAS_ERR_FORMAT, "the header is no JSON object");
    if (rc < 0)
        return claas_fail_context(rc, "%s: ", file->path);
    file->data = 8 + (int64_t)length;
    return 0;
}

/* A non-negative integer that a double holds exactly. */
static int64_t whole(const cJSON *item)
{
    double value = cJSON_IsNumber(item) ? item->valuedouble : -1;

    if (!(value >= 0 && value <= (double)EXACT_MAX) || value != (double)(int64_t)value)
        return -1;
    return (int64_t)value;
}

static int64_t type_bytes(const cJSON *tensor)
{
    const char *name = NULL;

    if (claas_json_get_string(tensor, "dtype", &name) != 1)
        return -1;
    for (size_t i = 0; i < CLAAS_COUNT(types); i++)
        if (strcmp(types[i].name, name) == 0)
            return types[i].bytes;
    return -1;
}

static int read_tensor(const struct file *file, const cJSON *tensor, struct span *span)
{
    const cJSON *offsets = claas_json_get(tensor, "data_offsets");
    const cJSON *shape = claas_json_get(tensor, "shape");
    int64_t bytes = type_bytes(tensor);
    const cJSON *dimension;

    span->name = tensor->string;
    if (bytes < 0)
        return fail_file(file, span->name, "no known dtype");
    if (!cJSON_IsArray(shape) || !cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2)
        return fail_file(file, span->name, "shape and two data_offsets expected");
    cJSON_ArrayForEach(dimension, shape)
    {
        int64_t size = whole(dimension);

        if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes))
            return fail_file(file, span->name, "impossible shape");
    }
    span->begin = whole(offsets->child);
    span->end = whole(offsets->child->next);
    if (span->begin < 0 || span->end < span->begin || span->end - span->begin != bytes)
        return fail_file(file, span->name, "data_offsets do not fit the shape");
    return 0;
}

static int compare_spans(const void *a, const void *b)
{
    const struct span *x = a, *y = b;

    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int check_layout(const struct file *file, struct span *spans, size_t count)
{
    int64_t at = 0;

    qsort(spans, count, sizeof(*spans), compare_spans);
    for (size_t i = 0; i < count; i++) {
        if (spans[i].begin != at)
            return fail_file(file, spans[i].name, "a hole or an overlap in front of it");
        at = spans[i].end;
    }
    if (at != file->size - file->data)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "%s: %" PRId64 " bytes of tensors, the header describes %" PRId64,
                          file->path, file->size - file->data, at);
    return 0;
}

static int find_nonzero(const struct file *file, const struct span *span, bool *found)
{
    unsigned char block[65536];

    for (int64_t at = span->begin; at < span->end && !*found;) {
        size_t n =
            span->end - at < (int64_t)sizeof(block) ? (size_t)(span->end - at) : sizeof(block);
        int rc = read_at(file, block, n, file->data + at);

        if (rc < 0)
            return rc;
        /* All bytes zero: the first is, and each equals the one in front of it. (-0.0 counts as
         * trained: harmless.) */
        *found = block[0] != 0 || memcmp(block, block + 1, n - 1) != 0;
        at += (int64_t)n;
    }
    return 0;
}

static int check_tensors(const struct file *file, const cJSON *header, bool *nonzero_b)
{
    CLAAS_AUTO_FREE struct span *spans = NULL;
    size_t count = 0;
    const cJSON *tensor;
    int rc;

    spans = CLAAS_NEW_ARRAY(struct span, (size_t)cJSON_GetArraySize(header) + 1);
    if (!spans)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(tensor, header)
    {
        if (strcmp(tensor->string, "__metadata__") == 0)
            continue;
        rc = read_tensor(file, tensor, &spans[count++]);
        if (rc < 0)
            return rc;
    }
    if (count == 0)
        return fail_file(file, NULL, "no tensors");
    rc = check_layout(file, spans, count);
    for (size_t i = 0; rc == 0 && nonzero_b && i < count; i++)
        if (strstr(spans[i].name, "lora_B"))
            rc = find_nonzero(file, &spans[i], nonzero_b);
    return rc;
}

int safetensors_check(const char *path, bool *ret_nonzero_b)
{
    CLAAS_AUTO(close_file) struct file file = {.fd = -1};
    CLAAS_AUTO(claas_json_free) cJSON *header = NULL;
    int rc = open_file(&file, path);

    if (rc == 0)
        rc = read_header(&file, &header);
    if (rc == 0)
        rc = check_tensors(&file, header, ret_nonzero_b);
    return rc;
}
