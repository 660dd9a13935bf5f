/* A growable byte buffer with a mandatory limit, and a bounded little-endian reader.
 *
 * Both keep their first failure: code that assembles or takes apart a message is a straight list of
 * calls with one check at the end. */
#include "claas/buf.h"

#include "claas/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CAPACITY_MIN 64

void claas_buf_init(struct claas_buf *buf, size_t limit)
{
    memset(buf, 0, sizeof(*buf));
    /* One byte of the address space stays for the terminating NUL. */
    buf->limit = limit < SIZE_MAX ? limit : SIZE_MAX - 1;
}

void claas_buf_done(struct claas_buf *buf)
{
    free(buf->data);
    claas_buf_init(buf, buf->limit);
}

static int fail_sticky(struct claas_buf *buf, int code)
{
    buf->error = code;
    return code;
}

/* Makes room for `more` bytes and the NUL. Capacity doubles, but never beyond limit + 1. */
static int reserve(struct claas_buf *buf, size_t more)
{
    size_t needed;
    size_t capacity;
    char *data;

    if (buf->error < 0)
        return buf->error;
    if (more > buf->limit - buf->length)
        return fail_sticky(buf, claas_fail(CLAAS_ERR_TOO_LARGE,
                                           "%zu bytes do not fit after %zu, the limit is %zu", more,
                                           buf->length, buf->limit));
    needed = buf->length + more + 1;
    if (needed <= buf->capacity)
        return 0;
    capacity = buf->capacity > buf->limit / 2 ? buf->limit + 1 : buf->capacity * 2;
    if (capacity < CAPACITY_MIN)
        capacity = CAPACITY_MIN;
    if (capacity < needed)
        capacity = needed;
    data = realloc(buf->data, capacity);
    if (!data)
        return fail_sticky(
            buf, claas_fail(CLAAS_ERR_NO_MEMORY, "no memory for a buffer of %zu bytes", capacity));
    buf->data = data;
    buf->capacity = capacity;
    return 0;
}

int claas_buf_add(struct claas_buf *buf, const void *bytes, size_t length)
{
    int rc = reserve(buf, length);

    if (rc < 0)
        return rc;
    if (length > 0)
        memcpy(buf->data + buf->length, bytes, length);
    buf->length += length;
    buf->data[buf->length] = '\0';
    return 0;
}

int claas_buf_add_text(struct claas_buf *buf, const char *text)
{
    return claas_buf_add(buf, text, strlen(text));
}

int claas_buf_printf(struct claas_buf *buf, const char *format, ...)
{
    va_list args;
    int length;
    int rc;

    va_start(args, format);
    length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (length < 0) {
        if (buf->error < 0)
            return buf->error;
        return fail_sticky(buf, claas_fail(CLAAS_ERR_INVALID, "a text cannot be formatted"));
    }
    rc = reserve(buf, (size_t)length);
    if (rc < 0)
        return rc;
    va_start(args, format);
    vsnprintf(buf->data + buf->length, (size_t)length + 1, format, args);
    va_end(args);
    buf->length += (size_t)length;
    return 0;
}

void claas_buf_consume(struct claas_buf *buf, size_t length)
{
    if (!buf->data)
        return;
    if (length > buf->length)
        length = buf->length;
    /* The NUL moves along. */
    memmove(buf->data, buf->data + length, buf->length - length + 1);
    buf->length -= length;
}

char *claas_buf_take(struct claas_buf *buf, size_t *ret_length)
{
    char *data = NULL;

    if (ret_length)
        *ret_length = 0;
    /* reserve(0) gives an empty buffer its "". */
    if (reserve(buf, 0) < 0) {
        free(buf->data);
    } else {
        data = buf->data;
        data[buf->length] = '\0';
        if (ret_length)
            *ret_length = buf->length;
    }
    buf->data = NULL;
    buf->length = 0;
    buf->capacity = 0;
    return data;
}

void claas_reader_init(struct claas_reader *reader, const void *data, size_t length)
{
    reader->data = data;
    reader->length = length;
    reader->offset = 0;
    reader->error = 0;
}

size_t claas_reader_left(const struct claas_reader *reader)
{
    return reader->length - reader->offset;
}

const uint8_t *claas_reader_bytes(struct claas_reader *reader, size_t length)
{
    static const uint8_t nothing[1];
    const uint8_t *span;

    if (reader->error < 0)
        return NULL;
    if (length > claas_reader_left(reader)) {
        reader->error = claas_fail(CLAAS_ERR_FORMAT, "%zu bytes wanted at offset %zu, %zu are left",
                                   length, reader->offset, claas_reader_left(reader));
        return NULL;
    }
    if (!reader->data)
        return nothing;
    span = reader->data + reader->offset;
    reader->offset += length;
    return span;
}

/* `width` bytes, least significant first: independent of the machine's byte order and alignment. */
static uint64_t read_little(struct claas_reader *reader, size_t width)
{
    const uint8_t *bytes = claas_reader_bytes(reader, width);
    uint64_t value = 0;

    for (size_t i = 0; bytes && i < width; i++)
        value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

uint8_t claas_reader_u8(struct claas_reader *reader)
{
    return (uint8_t)read_little(reader, 1);
}

uint16_t claas_reader_u16(struct claas_reader *reader)
{
    return (uint16_t)read_little(reader, 2);
}

uint32_t claas_reader_u32(struct claas_reader *reader)
{
    return (uint32_t)read_little(reader, 4);
}

uint64_t claas_reader_u64(struct claas_reader *reader)
{
    return read_little(reader, 8);
}
