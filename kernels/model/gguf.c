/* Parser of GGUF (version 2 and 3, little-endian): key-value pairs, tensor infos, tensor bytes.
 *
 *   "GGUF" | u32 version | u64 tensor count | u64 pair count
 *   pairs:     string key | u32 type | value
 *   tensors:   string name | u32 n | u64 shape[n] | u32 type | u64 offset
 *   padding to general.alignment, then the tensors' bytes, each tensor padded likewise
 *
 *   string = u64 length, bytes;  array = u32 type, u64 count, items
 *
 * The result borrows everything from the image, so memory is proportional to the pairs and tensors
 * that are really there: a count is compared with the bytes left (no pair is shorter than 14 bytes,
 * no tensor than 33) before it is believed. Tensor offsets must follow each other without holes, as
 * every reader of the format demands. */
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/mem.h"
#include "model_internal.h"

#define PAIR_BYTES_MIN   14
#define TENSOR_BYTES_MIN 33
#define PAIRS_MAX        65536
#define TENSORS_MAX      65536
#define NAME_MAX_BYTES   127
#define ALIGNMENT_MAX    65536

bool claas_span_equal(struct claas_span span, const char *text)
{
    return span.length == strlen(text) && memcmp(span.text, text, span.length) == 0;
}

static struct claas_span read_string(struct claas_reader *reader)
{
    struct claas_span span = {NULL, 0};
    uint64_t length = claas_reader_u64(reader);

    if (length > claas_reader_left(reader)) {
        reader->error = CLAAS_ERR_FORMAT;
        return span;
    }
    span.text = (const char *)claas_reader_bytes(reader, (size_t)length);
    span.length = span.text ? (size_t)length : 0;
    return span;
}

struct claas_span claas_gguf_next_text(struct claas_reader *reader)
{
    return read_string(reader);
}

/* Keys and names are printed in errors and compared as C strings: printable ASCII, not empty. */
static int read_name(struct claas_reader *reader, const char *what, struct claas_span *ret)
{
    *ret = read_string(reader);
    if (reader->error)
        return claas_fail(CLAAS_ERR_FORMAT, "the file ends inside a %s", what);
    if (ret->length == 0 || ret->length > NAME_MAX_BYTES)
        return claas_fail(CLAAS_ERR_FORMAT, "a %s of %zu bytes", what, ret->length);
    for (size_t i = 0; i < ret->length; i++)
        if (ret->text[i] <= ' ' || ret->text[i] > '~')
            return claas_fail(CLAAS_ERR_FORMAT, "a %s with a character that is not printable",
                              what);
    return 0;
}

/* Bytes of one value of a fixed-size type, 0 for the others. */
static size_t scalar_bytes(uint32_t type)
{
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

    return type < CLAAS_COUNT(bytes) ? bytes[type] : 0;
}

static int read_scalar(struct claas_reader *reader, struct claas_gguf_value *value)
{
    const uint8_t *bytes = claas_reader_bytes(reader, scalar_bytes(value->type));
    uint64_t raw = 0;
    float single;

    if (!bytes)
        return CLAAS_ERR_FORMAT;
    memcpy(&raw, bytes, scalar_bytes(value->type));
    switch (value->type) {
    case CLAAS_GGUF_U8:
    case CLAAS_GGUF_U16:
    case CLAAS_GGUF_U32:
        value->integer = (int64_t)raw;
        break;
    case CLAAS_GGUF_BOOL:
        if (raw > 1)
            return CLAAS_ERR_FORMAT;
        value->integer = (int64_t)raw;
        break;
    case CLAAS_GGUF_I8:
        value->integer = (int8_t)raw;
        break;
    case CLAAS_GGUF_I16:
        value->integer = (int16_t)raw;
        break;
    case CLAAS_GGUF_I32:
        value->integer = (int32_t)raw;
        break;
    case CLAAS_GGUF_U64:
    case CLAAS_GGUF_I64:
        value->integer = (int64_t)raw;
        if (value->type == CLAAS_GGUF_U64 && value->integer < 0)
            return CLAAS_ERR_FORMAT;
        break;
    case CLAAS_GGUF_F32:
        memcpy(&single, &raw, sizeof(single));
        value->number = (double)single;
        return 0;
    case CLAAS_GGUF_F64:
        memcpy(&value->number, &raw, sizeof(value->number));
        return 0;
    case CLAAS_GGUF_STRING:
    case CLAAS_GGUF_ARRAY:
        return CLAAS_ERR_FORMAT;
    }
    value->number = (double)value->integer;
    return 0;
}

/* Walks the items once, so that later readers of the array cannot run out of it. */
static int read_array(struct claas_reader *reader, struct claas_gguf_value *value)
{
    uint32_t type = claas_reader_u32(reader);
    uint64_t count = claas_reader_u64(reader);
    size_t left = claas_reader_left(reader);

    if (reader->error || (type != CLAAS_GGUF_STRING && scalar_bytes(type) == 0))
        return CLAAS_ERR_FORMAT;
    if (count > left / (type == CLAAS_GGUF_STRING ? 8 : scalar_bytes(type)))
        return CLAAS_ERR_FORMAT;
    value->item_type = (enum claas_gguf_type)type;
    value->item_count = count;
    value->items = reader->data + reader->offset;
    if (type == CLAAS_GGUF_STRING)
        for (uint64_t i = 0; i < count && !reader->error; i++)
            (void)read_string(reader);
    else
        (void)claas_reader_bytes(reader, (size_t)count * scalar_bytes(type));
    value->items_bytes = (size_t)(reader->data + reader->offset - value->items);
    return reader->error;
}

static int read_pair(struct claas_reader *reader, struct claas_gguf_pair *pair)
{
    int rc = read_name(reader, "key", &pair->key);

    if (rc < 0)
        return rc;
    uint32_t type = claas_reader_u32(reader);
    if (type > CLAAS_GGUF_F64)
        return claas_fail(CLAAS_ERR_FORMAT, "key '%.*s': unknown type %u", (int)pair->key.length,
                          pair->key.text, type);
    pair->value.type = (enum claas_gguf_type)type;
    if (type == CLAAS_GGUF_STRING) {
        pair->value.text = read_string(reader);
        rc = reader->error;
    } else if (type == CLAAS_GGUF_ARRAY) {
        rc = read_array(reader, &pair->value);
    } else {
        rc = read_scalar(reader, &pair->value);
    }
    if (rc < 0 || reader->error)
        return claas_fail(CLAAS_ERR_FORMAT, "key '%.*s': bad or truncated value",
                          (int)pair->key.length, pair->key.text);
    return 0;
}

static int compare_spans(struct claas_span a, struct claas_span b)
{
    int order = memcmp(a.text, b.text, a.length < b.length ? a.length : b.length);

    if (order != 0)
        return order;
    return a.length < b.length ? -1 : a.length > b.length;
}

static int compare_pairs(const void *a, const void *b)
{
    const struct claas_gguf_pair *x = a, *y = b;

    return compare_spans(x->key, y->key);
}

static int compare_tensors(const void *a, const void *b)
{
    const struct claas_gguf_tensor *x = a, *y = b;

    return compare_spans(x->name, y->name);
}

static int read_pairs(struct claas_reader *reader, uint64_t count, struct claas_gguf *gguf)
{
    if (count > claas_reader_left(reader) / PAIR_BYTES_MIN || count > PAIRS_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "%llu keys cannot be in a file of %zu bytes",
                          (unsigned long long)count, reader->length);
    gguf->pairs = CLAAS_NEW_ARRAY(struct claas_gguf_pair, (size_t)count + 1);
    if (!gguf->pairs)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (; gguf->pair_count < count; gguf->pair_count++) {
        int rc = read_pair(reader, &gguf->pairs[gguf->pair_count]);
        if (rc < 0)
            return rc;
    }
    qsort(gguf->pairs, gguf->pair_count, sizeof(gguf->pairs[0]), compare_pairs);
    for (size_t i = 1; i < gguf->pair_count; i++)
        if (compare_pairs(&gguf->pairs[i - 1], &gguf->pairs[i]) == 0)
            return claas_fail(CLAAS_ERR_FORMAT, "key '%.*s' is there twice",
                              (int)gguf->pairs[i].key.length, gguf->pairs[i].key.text);
    return 0;
}

static int fail_tensor(const struct claas_gguf_tensor *tensor, int code, const char *what)
{
    return claas_fail(code, "tensor '%.*s': %s", (int)tensor->name.length, tensor->name.text, what);
}

/* Size in bytes of a tensor's rows of whole blocks. */
static int size_tensor(struct claas_gguf_tensor *tensor, uint32_t type)
{
    int64_t elements = 1;
    int64_t block = claas_type_block_elements((enum claas_tensor_type)type);

    if (block == 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "tensor '%.*s': encoding %u is not supported",
                          (int)tensor->name.length, tensor->name.text, type);
    tensor->type = (enum claas_tensor_type)type;
    for (int i = 0; i < tensor->dims; i++)
        if (tensor->shape[i] < 1 || __builtin_mul_overflow(elements, tensor->shape[i], &elements) ||
            elements > (INT64_C(1) << 48))
            return fail_tensor(tensor, CLAAS_ERR_FORMAT, "bad shape");
    if (tensor->shape[0] % block != 0)
        return fail_tensor(tensor, CLAAS_ERR_FORMAT, "a row is not a whole number of blocks");
    tensor->bytes =
        (size_t)(elements / block) * (size_t)claas_type_block_bytes((enum claas_tensor_type)type);
    return 0;
}

/* One info; *expected is where its bytes must start, and moves on to where the next tensor's must.
 */
static int read_tensor(struct claas_reader *reader, uint64_t alignment, uint64_t *expected,
                       struct claas_gguf_tensor *tensor)
{
    int rc = read_name(reader, "tensor's name", &tensor->name);

    if (rc < 0)
        return rc;
    uint32_t dims = claas_reader_u32(reader);
    if (dims < 1 || dims > 4)
        return fail_tensor(tensor, CLAAS_ERR_FORMAT, "not 1 to 4 dimensions");
    tensor->dims = (int)dims;
    for (uint32_t i = 0; i < dims; i++)
        tensor->shape[i] = (int64_t)claas_reader_u64(reader);
    uint32_t type = claas_reader_u32(reader);
    uint64_t offset = claas_reader_u64(reader);
    if (reader->error)
        return fail_tensor(tensor, CLAAS_ERR_FORMAT, "the file ends inside its description");
    rc = size_tensor(tensor, type);
    if (rc < 0)
        return rc;
    if (offset != *expected)
        return fail_tensor(tensor, CLAAS_ERR_FORMAT, "its offset leaves a hole or overlaps");
    *expected = (offset + tensor->bytes + alignment - 1) / alignment * alignment;
    if (*expected > (UINT64_C(1) << 60))
        return fail_tensor(tensor, CLAAS_ERR_FORMAT, "its offset is out of range");
    return 0;
}

static int read_tensors(struct claas_reader *reader, uint64_t count, uint64_t alignment,
                        struct claas_gguf *gguf)
{
    uint64_t expected = 0;

    if (count > claas_reader_left(reader) / TENSOR_BYTES_MIN || count > TENSORS_MAX)
        return claas_fail(CLAAS_ERR_FORMAT, "%llu tensors cannot be in a file of %zu bytes",
                          (unsigned long long)count, reader->length);
    gguf->tensors = CLAAS_NEW_ARRAY(struct claas_gguf_tensor, (size_t)count + 1);
    if (!gguf->tensors)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (; gguf->tensor_count < count; gguf->tensor_count++) {
        int rc = read_tensor(reader, alignment, &expected, &gguf->tensors[gguf->tensor_count]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* Places the tensors in the image, then sorts them by name. */
static int place_tensors(struct claas_gguf *gguf, const uint8_t *data, size_t length, size_t start,
                         uint64_t alignment)
{
    uint64_t offset = (start + alignment - 1) / alignment * alignment;

    for (size_t i = 0; i < gguf->tensor_count; i++) {
        struct claas_gguf_tensor *tensor = &gguf->tensors[i];

        if (offset > length || tensor->bytes > length - offset)
            return claas_fail(CLAAS_ERR_FORMAT, "tensor '%.*s': the file ends %llu bytes too early",
                              (int)tensor->name.length, tensor->name.text,
                              (unsigned long long)(offset + tensor->bytes - length));
        tensor->data = data + offset;
        offset = (offset + tensor->bytes + alignment - 1) / alignment * alignment;
    }
    qsort(gguf->tensors, gguf->tensor_count, sizeof(gguf->tensors[0]), compare_tensors);
    for (size_t i = 1; i < gguf->tensor_count; i++)
        if (compare_tensors(&gguf->tensors[i - 1], &gguf->tensors[i]) == 0)
            return fail_tensor(&gguf->tensors[i], CLAAS_ERR_FORMAT, "is there twice");
    return 0;
}

static int read_alignment(const struct claas_gguf *gguf, uint64_t *ret)
{
    int64_t alignment = (int64_t)*ret;
    int rc = claas_gguf_get_int(gguf, "general.alignment", 1, ALIGNMENT_MAX, &alignment);

    if (rc < 0)
        return rc;
    if (alignment & (alignment - 1))
        return claas_fail(CLAAS_ERR_FORMAT, "general.alignment is %lld, not a power of two",
                          (long long)alignment);
    *ret = (uint64_t)alignment;
    return 0;
}

static int check_version(uint32_t version)
{
    if (version == 2 || version == 3)
        return 0;
    if ((version & 0xffffu) == 0 && version != 0)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "a big-endian GGUF file");
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "GGUF version %u (2 and 3 are supported)", version);
}

int claas_gguf_parse(const uint8_t *data, size_t length, struct claas_gguf **ret)
{
    CLAAS_AUTO(claas_gguf_free) struct claas_gguf *gguf = NULL;
    struct claas_reader reader;
    uint64_t alignment = 32;

    claas_reader_init(&reader, data, length);
    const uint8_t *magic = claas_reader_bytes(&reader, 4);
    if (!magic || memcmp(magic, "GGUF", 4) != 0)
        return claas_fail(CLAAS_ERR_FORMAT, "not a GGUF file");
    uint32_t version = claas_reader_u32(&reader);
    uint64_t tensor_count = claas_reader_u64(&reader);
    uint64_t pair_count = claas_reader_u64(&reader);
    if (reader.error)
        return claas_fail(CLAAS_ERR_FORMAT, "a GGUF file of only %zu bytes", length);
    int rc = check_version(version);
    if (rc < 0)
        return rc;
    gguf = CLAAS_NEW(struct claas_gguf);
    if (!gguf)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = read_pairs(&reader, pair_count, gguf);
    if (rc >= 0)
        rc = read_alignment(gguf, &alignment);
    if (rc >= 0)
        rc = read_tensors(&reader, tensor_count, alignment, gguf);
    if (rc >= 0)
        rc = place_tensors(gguf, data, length, reader.offset, alignment);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(gguf);
    return 0;
}

void claas_gguf_free(struct claas_gguf **gguf)
{
    if (!*gguf)
        return;
    free((*gguf)->pairs);
    free((*gguf)->tensors);
    free(*gguf);
    *gguf = NULL;
}

static const struct claas_gguf_value *get_value(const struct claas_gguf *gguf, const char *key)
{
    const struct claas_gguf_pair wanted = {.key = {key, strlen(key)}};
    const struct claas_gguf_pair *found =
        bsearch(&wanted, gguf->pairs, gguf->pair_count, sizeof(gguf->pairs[0]), compare_pairs);

    return found ? &found->value : NULL;
}

const struct claas_gguf_tensor *claas_gguf_find(const struct claas_gguf *gguf, const char *name)
{
    const struct claas_gguf_tensor wanted = {.name = {name, strlen(name)}};

    return bsearch(&wanted, gguf->tensors, gguf->tensor_count, sizeof(gguf->tensors[0]),
                   compare_tensors);
}

static bool is_integer(enum claas_gguf_type type)
{
    return type != CLAAS_GGUF_F32 && type != CLAAS_GGUF_F64 && type != CLAAS_GGUF_STRING &&
           type != CLAAS_GGUF_ARRAY && type != CLAAS_GGUF_BOOL;
}

int claas_gguf_get_int(const struct claas_gguf *gguf, const char *key, int64_t min, int64_t max,
                       int64_t *ret)
{
    const struct claas_gguf_value *value = get_value(gguf, key);

    if (!value)
        return 0;
    if (!is_integer(value->type))
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not an integer", key);
    if (value->integer < min || value->integer > max)
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is %lld, not in %lld to %lld", key,
                          (long long)value->integer, (long long)min, (long long)max);
    *ret = value->integer;
    return 1;
}

int claas_gguf_get_number(const struct claas_gguf *gguf, const char *key, double min, double max,
                          double *ret)
{
    const struct claas_gguf_value *value = get_value(gguf, key);

    if (!value)
        return 0;
    if (!is_integer(value->type) && value->type != CLAAS_GGUF_F32 && value->type != CLAAS_GGUF_F64)
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not a number", key);
    if (!(value->number >= min && value->number <= max))
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is %g, not in %g to %g", key, value->number, min,
                          max);
    *ret = value->number;
    return 1;
}

int claas_gguf_get_bool(const struct claas_gguf *gguf, const char *key, bool *ret)
{
    const struct claas_gguf_value *value = get_value(gguf, key);

    if (!value)
        return 0;
    if (value->type != CLAAS_GGUF_BOOL)
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not a boolean", key);
    *ret = value->integer != 0;
    return 1;
}

int claas_gguf_get_text(const struct claas_gguf *gguf, const char *key, struct claas_span *ret)
{
    const struct claas_gguf_value *value = get_value(gguf, key);

    if (!value)
        return 0;
    if (value->type != CLAAS_GGUF_STRING)
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not a string", key);
    if (!claas_utf8_valid(value->text.text, value->text.length))
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not valid UTF-8", key);
    *ret = value->text;
    return 1;
}

int claas_gguf_get_array(const struct claas_gguf *gguf, const char *key, enum claas_gguf_type type,
                         const struct claas_gguf_value **ret)
{
    const struct claas_gguf_value *value = get_value(gguf, key);

    *ret = NULL;
    if (!value)
        return 0;
    if (value->type != CLAAS_GGUF_ARRAY || value->item_type != type)
        return claas_fail(CLAAS_ERR_FORMAT, "'%s' is not an array of the expected type", key);
    *ret = value;
    return 1;
}
