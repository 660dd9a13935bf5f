/* A growable byte buffer with a mandatory limit, and a bounded reader. */
#ifndef CLAAS_BUF_H
#define CLAAS_BUF_H

#include <stddef.h>
#include <stdint.h>

/* Bytes owned by the buffer; data[length] is always 0 once anything was added. */
struct claas_buf {
    char *data;
    size_t length;
    size_t capacity;
    size_t limit; /* adding beyond it fails with CLAAS_ERR_TOO_LARGE */
    int error;    /* first failure; sticky, so a chain of adds is checked once */
};

/* Allocates nothing yet. */
void claas_buf_init(struct claas_buf *buf, size_t limit);
/* Frees the bytes; the buffer can be used again. */
void claas_buf_done(struct claas_buf *buf);
/* These three append a copy: 0, or the buffer's error (TOO_LARGE, NO_MEMORY). */
int claas_buf_add(struct claas_buf *buf, const void *bytes, size_t length);
int claas_buf_add_text(struct claas_buf *buf, const char *text);
int claas_buf_printf(struct claas_buf *buf, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Drops the first `length` bytes. */
void claas_buf_consume(struct claas_buf *buf, size_t length);
/* Hands the bytes over (NUL-terminated, free with free()); the buffer is empty afterwards. NULL
 * after an error. */
char *claas_buf_take(struct claas_buf *buf, size_t *ret_length);

/* A little-endian reader that never runs past its end: after the first short read `error` is set,
 * every further read gives 0, and the caller checks once per section. */
struct claas_reader {
    const uint8_t *data;
    size_t length;
    size_t offset;
    int error; /* 0 or CLAAS_ERR_FORMAT */
};

/* `data` is borrowed. */
void claas_reader_init(struct claas_reader *reader, const void *data, size_t length);
size_t claas_reader_left(const struct claas_reader *reader);
uint8_t claas_reader_u8(struct claas_reader *reader);
uint16_t claas_reader_u16(struct claas_reader *reader);
uint32_t claas_reader_u32(struct claas_reader *reader);
uint64_t claas_reader_u64(struct claas_reader *reader);
/* A borrowed span of `length` bytes, or NULL (and the error) if fewer are left. */
const uint8_t *claas_reader_bytes(struct claas_reader *reader, size_t length);

#endif
