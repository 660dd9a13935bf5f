/* Allocation with the overflow check in one place. A request for nothing still gives a block, so
 * that NULL always means "out of memory". Nothing here records an error text: the caller knows what
 * the memory was for. */
#include "claas/mem.h"

#include "claas/err.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64

void *claas_alloc(size_t count, size_t size)
{
    size_t bytes;

    if (__builtin_mul_overflow(count, size, &bytes))
        return NULL;
    return calloc(bytes > 0 ? bytes : 1, 1);
}

void *claas_realloc(void *block, size_t count, size_t size)
{
    size_t bytes;

    if (__builtin_mul_overflow(count, size, &bytes))
        return NULL;
    return realloc(block, bytes > 0 ? bytes : 1);
}

void *claas_alloc_aligned(size_t bytes)
{
    size_t rounded;
    void *block;

    if (bytes > SIZE_MAX - (ALIGNMENT - 1))
        return NULL;
    rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (rounded == 0)
        rounded = ALIGNMENT;
    block = aligned_alloc(ALIGNMENT, rounded);
    if (block)
        memset(block, 0, rounded);
    return block;
}

char *claas_strdup(const char *text)
{
    return text ? strdup(text) : NULL;
}

char *claas_strndup(const char *text, size_t length)
{
    char *copy;

    if (length == SIZE_MAX)
        return NULL;
    copy = malloc(length + 1);
    if (!copy)
        return NULL;
    if (length > 0)
        memcpy(copy, text, length);
    copy[length] = '\0';
    return copy;
}

char *claas_format(const char *format, ...)
{
    char *text = NULL;
    va_list args;
    int length;

    va_start(args, format);
    length = vasprintf(&text, format, args);
    va_end(args);
    return length < 0 ? NULL : text;
}

void claas_free_pointer(void *pointer)
{
    void *block;

    /* memcpy, because *pointer may be any object pointer type (char *, float *…). */
    memcpy(&block, pointer, sizeof(block));
    free(block);
    block = NULL;
    memcpy(pointer, &block, sizeof(block));
}

int claas_copy_text(char *target, size_t size, const char *text)
{
    size_t length = strlen(text);

    if (size == 0)
        return claas_fail(CLAAS_ERR_LIMIT, "no room for a text of %zu bytes", length);
    if (length >= size) {
        memcpy(target, text, size - 1);
        target[size - 1] = '\0';
        return claas_fail(CLAAS_ERR_LIMIT, "a text of %zu bytes, the limit is %zu", length,
                          size - 1);
    }
    memcpy(target, text, length + 1);
    return 0;
}
