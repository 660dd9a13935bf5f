/* Reader of safetensors: u64 header length | JSON header | tensor bytes.
 *
 * The header maps each name to dtype, shape and a byte range; the ranges must tile the rest of the
 * file exactly, in any order. A file that passes can be read without any further check: every
 * tensor is in bounds and holds product(shape) elements. */
#include "claas/safetensors.h"
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"

/* {"dtype":"F4","shape":[],"data_offsets":[0,0]} and a name: no entry is shorter. */
#define ENTRY_BYTES_MIN 40

struct claas_safetensors {
    cJSON *header; /* owns the names */
    const cJSON *metadata;
    struct claas_safetensor *tensors;       /* in the header's order */
    const struct claas_safetensor **sorted; /* by name */
    size_t count;
    const uint8_t *mapping; /* NULL when the bytes are the caller's */
    size_t mapping_length;
};

struct dtype_row {
    const char *name;
    enum claas_dtype dtype;
    int bits;
};

static const struct dtype_row dtype_rows[] = {
    {"F32", CLAAS_DTYPE_F32, 32},          {"F16", CLAAS_DTYPE_F16, 16},
    {"BF16", CLAAS_DTYPE_BF16, 16},        {"BOOL", CLAAS_DTYPE_OTHER, 8},
    {"U8", CLAAS_DTYPE_OTHER, 8},          {"I8", CLAAS_DTYPE_OTHER, 8},
    {"F8_E4M3", CLAAS_DTYPE_OTHER, 8},     {"F8_E5M2", CLAAS_DTYPE_OTHER, 8},
    {"F8_E8M0", CLAAS_DTYPE_OTHER, 8},     {"F8_E4M3FNUZ", CLAAS_DTYPE_OTHER, 8},
    {"F8_E5M2FNUZ", CLAAS_DTYPE_OTHER, 8}, {"I16", CLAAS_DTYPE_OTHER, 16},
    {"U16", CLAAS_DTYPE_OTHER, 16},        {"I32", CLAAS_DTYPE_OTHER, 32},
    {"U32", CLAAS_DTYPE_OTHER, 32},        {"C64", CLAAS_DTYPE_OTHER, 64},
    {"F64", CLAAS_DTYPE_OTHER, 64},        {"I64", CLAAS_DTYPE_OTHER, 64},
    {"U64", CLAAS_DTYPE_OTHER, 64},        {"F4", CLAAS_DTYPE_OTHER, 4},
    {"F6_E2M3", CLAAS_DTYPE_OTHER, 6},     {"F6_E3M2", CLAAS_DTYPE_OTHER, 6},
};

static const struct dtype_row *find_dtype(const char *name)
{
    for (size_t i = 0; i < CLAAS_COUNT(dtype_rows); i++)
        if (strcmp(dtype_rows[i].name, name) == 0)
            return &dtype_rows[i];
    return NULL;
}

/* An array item as an integer in [0, 2^53]; the JSON door has refused what is not finite. */
static int read_integer(const cJSON *item, int64_t *ret)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0) ||
        !(item->valuedouble <= 9007199254740992.0) ||
        item->valuedouble != (double)(int64_t)item->valuedouble)
        return CLAAS_ERR_FORMAT;
    *ret = (int64_t)item->valuedouble;
    return 0;
}

static int read_shape(const cJSON *array, struct claas_safetensor *tensor, int64_t *ret_elements)
{
    int64_t elements = 1;
    const cJSON *item;

    if (!cJSON_IsArray(array))
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': 'shape' is not an array", tensor->name);
    cJSON_ArrayForEach(item, array)
    {
        if (tensor->dims == 4)
            return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor '%s' has more than 4 dimensions",
                              tensor->name);
        if (read_integer(item, &tensor->shape[tensor->dims]) < 0 ||
            __builtin_mul_overflow(elements, tensor->shape[tensor->dims], &elements))
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': bad shape", tensor->name);
        tensor->dims++;
    }
    *ret_elements = elements;
    return 0;
}

/* One header entry; `data` and `data_length` are the bytes after the header. */
static int read_entry(const cJSON *entry, const uint8_t *data, size_t data_length,
                      struct claas_safetensor *tensor)
{
    const cJSON *offsets = claas_json_get(entry, "data_offsets");
    const cJSON *dtype = claas_json_get(entry, "dtype");
    int64_t begin, end, elements = 0, bits;

    tensor->name = entry->string;
    if (!cJSON_IsObject(entry) || !cJSON_IsString(dtype))
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': no dtype", tensor->name);
    const struct dtype_row *row = find_dtype(dtype->valuestring);
    if (!row)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': unknown dtype '%s'", tensor->name,
                          dtype->valuestring);
    tensor->dtype = row->dtype;
    int rc = read_shape(claas_json_get(entry, "shape"), tensor, &elements);
    if (rc < 0)
        return rc;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        read_integer(offsets->child, &begin) < 0 || read_integer(offsets->child->next, &end) < 0 ||
        begin > end || (uint64_t)end > data_length)
        return claas_fail(CLAAS_ERR_FORMAT,
                          "tensor '%s': data_offsets outside the file's %zu bytes", tensor->name,
                          data_length);
    if (__builtin_mul_overflow(elements, (int64_t)row->bits, &bits) || bits % 8 != 0 ||
        bits / 8 != end - begin)
        return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': %lld bytes do not fit its shape",
                          tensor->name, (long long)(end - begin));
    tensor->data = data + begin;
    tensor->bytes = (size_t)(end - begin);
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    const struct claas_safetensor *const *x = a, *const *y = b;

    return strcmp((*x)->name, (*y)->name);
}

/* By address, an empty tensor before the one that starts where it lies. */
static int compare_places(const void *a, const void *b)
{
    const struct claas_safetensor *const *x = a, *const *y = b;

    if ((*x)->data != (*y)->data)
        return (*x)->data < (*y)->data ? -1 : 1;
    return (*x)->bytes < (*y)->bytes ? -1 : (*x)->bytes > (*y)->bytes;
}

/* The ranges tile the data: sorted by place, each begins where the one before ended, and the last
 * ends the file. */
static int check_tiling(const struct claas_safetensors *file, const uint8_t *data, size_t length)
{
    const uint8_t *next = data;

    qsort(file->sorted, file->count, sizeof(file->sorted[0]), compare_places);
    for (size_t i = 0; i < file->count; i++) {
        if (file->sorted[i]->data != next)
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s': a hole or an overlap before it",
                              file->sorted[i]->name);
        next += file->sorted[i]->bytes;
    }
    if (next != data + length)
        return claas_fail(CLAAS_ERR_FORMAT, "%zu bytes after the last tensor",
                          (size_t)(data + length - next));
    return 0;
}

static int check_metadata(const cJSON *metadata)
{
    const cJSON *item;

    if (!cJSON_IsObject(metadata))
        return claas_fail(CLAAS_ERR_FORMAT, "'__metadata__' is not an object");
    cJSON_ArrayForEach(item, metadata)
    {
        if (!cJSON_IsString(item))
            return claas_fail(CLAAS_ERR_FORMAT, "'__metadata__.%s' is not a string", item->string);
    }
    return 0;
}

static int read_entries(struct claas_safetensors *file, size_t header_length, const uint8_t *data,
                        size_t data_length)
{
    size_t max = header_length / ENTRY_BYTES_MIN + 1;
    const cJSON *entry;

    file->tensors = CLAAS_NEW_ARRAY(struct claas_safetensor, max);
    file->sorted = CLAAS_NEW_ARRAY(const struct claas_safetensor *, max);
    if (!file->tensors || !file->sorted)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(entry, file->header)
    {
        if (strcmp(entry->string, "__metadata__") == 0) {
            int rc = check_metadata(entry);
            if (rc < 0)
                return rc;
            file->metadata = entry;
            continue;
        }
        if (file->count == max)
            return claas_fail(CLAAS_ERR_FORMAT, "more entries than the header has room for");
        int rc = read_entry(entry, data, data_length, &file->tensors[file->count]);
        if (rc < 0)
            return rc;
        file->sorted[file->count] = &file->tensors[file->count];
        file->count++;
    }
    int rc = check_tiling(file, data, data_length);
    if (rc < 0)
        return rc;
    qsort(file->sorted, file->count, sizeof(file->sorted[0]), compare_names);
    for (size_t i = 1; i < file->count; i++)
        if (strcmp(file->sorted[i - 1]->name, file->sorted[i]->name) == 0)
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%s' is listed twice",
                              file->sorted[i]->name);
    return 0;
}

int claas_safetensors_parse(const uint8_t *data, size_t length, claas_safetensors_t **ret)
{
    CLAAS_AUTO(claas_safetensors_free) claas_safetensors_t *file = NULL;
    uint64_t header_length;

    if (length < sizeof(header_length))
        return claas_fail(CLAAS_ERR_FORMAT, "no safetensors file: %zu bytes", length);
    memcpy(&header_length, data, sizeof(header_length));
    if (header_length > length - 8)
        return claas_fail(CLAAS_ERR_FORMAT, "the header's %llu bytes exceed the file",
                          (unsigned long long)header_length);
    if (header_length > CLAAS_SAFETENSORS_HEADER_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "a header of %llu bytes, the limit is %zu",
                          (unsigned long long)header_length, CLAAS_SAFETENSORS_HEADER_MAX);
    if (header_length == 0 || data[8] != '{')
        return claas_fail(CLAAS_ERR_FORMAT, "the header does not begin with '{'");
    file = CLAAS_NEW(claas_safetensors_t);
    if (!file)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    int rc = claas_json_parse((const char *)data + 8, (size_t)header_length,
                              CLAAS_SAFETENSORS_HEADER_MAX, &file->header);
    if (rc < 0)
        return claas_fail_context(rc, "header: ");
    if (!cJSON_IsObject(file->header))
        return claas_fail(CLAAS_ERR_FORMAT, "the header is not an object");
    rc = read_entries(file, (size_t)header_length, data + 8 + header_length,
                      length - 8 - (size_t)header_length);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(file);
    return 0;
}

int claas_safetensors_open(const char *path, claas_safetensors_t **ret)
{
    const uint8_t *data = NULL;
    size_t length = 0;

    int rc = claas_file_map(path, &data, &length);
    if (rc < 0)
        return rc;
    rc = claas_safetensors_parse(data, length, ret);
    if (rc < 0) {
        claas_file_unmap(data, length);
        return claas_fail_context(rc, "%s: ", path);
    }
    (*ret)->mapping = data;
    (*ret)->mapping_length = length;
    return 0;
}

void claas_safetensors_free(claas_safetensors_t **file)
{
    if (!*file)
        return;
    claas_json_free(&(*file)->header);
    free((*file)->tensors);
    free((*file)->sorted);
    if ((*file)->mapping)
        claas_file_unmap((*file)->mapping, (*file)->mapping_length);
    free(*file);
    *file = NULL;
}

size_t claas_safetensors_count(const claas_safetensors_t *file)
{
    return file->count;
}

const struct claas_safetensor *claas_safetensors_at(const claas_safetensors_t *file, size_t index)
{
    return index < file->count ? &file->tensors[index] : NULL;
}

const struct claas_safetensor *claas_safetensors_find(const claas_safetensors_t *file,
                                                      const char *name)
{
    const struct claas_safetensor key = {.name = name}, *pointer = &key;
    const struct claas_safetensor *const *found =
        bsearch(&pointer, file->sorted, file->count, sizeof(file->sorted[0]), compare_names);

    return found ? *found : NULL;
}

const char *claas_safetensors_metadata(const claas_safetensors_t *file, const char *key)
{
    const cJSON *item = file->metadata ? claas_json_get(file->metadata, key) : NULL;

    return item ? item->valuestring : NULL;
}
