/* Memory and ownership. A constructor is `int claas_thing_new(…, claas_thing_t **ret)`, a
 * destructor is `void claas_thing_free(claas_thing_t **thing)`: safe on NULL, safe on half-built
 * objects, sets *thing to NULL. That signature is also what the cleanup attribute wants:
 *
 *     CLAAS_AUTO(claas_thing_free) claas_thing_t *thing = NULL;
 *     …
 *     *ret = CLAAS_TAKE(thing);
 *     return 0;
 */
#ifndef CLAAS_MEM_H
#define CLAAS_MEM_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CLAAS_AUTO(destructor) __attribute__((cleanup(destructor)))
#define CLAAS_AUTO_FREE        CLAAS_AUTO(claas_free_pointer)
#define CLAAS_TAKE(pointer)                                                                        \
    __extension__({                                                                                \
        __typeof__(pointer) taken_ = (pointer);                                                    \
        (pointer) = NULL;                                                                          \
        taken_;                                                                                    \
    })
#define CLAAS_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Zeroed memory for `count` elements of `size` bytes; NULL when out of memory or on overflow. */
void *claas_alloc(size_t count, size_t size);
#define CLAAS_NEW(type)          ((type *)claas_alloc(1, sizeof(type)))
#define CLAAS_NEW_ARRAY(type, n) ((type *)claas_alloc((n), sizeof(type)))
/* Grows or shrinks to `count` elements (new memory is not zeroed); on failure NULL and the old
 * block stays. */
void *claas_realloc(void *block, size_t count, size_t size);
/* Zeroed, 64-byte aligned (the width of a cache line and of a zmm register); free with free(). */
void *claas_alloc_aligned(size_t bytes);
/* A new copy; NULL for NULL, and when out of memory. */
char *claas_strdup(const char *text);
/* A new NUL-terminated copy of `length` bytes. */
char *claas_strndup(const char *text, size_t length);
/* printf into a new string; NULL when out of memory. */
char *claas_format(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* A cleanup handler for plain heap pointers: frees *(void **)pointer and clears it. */
void claas_free_pointer(void *pointer);
/* Copies at most size-1 bytes and terminates; returns 0, or CLAAS_ERR_LIMIT when it did not fit. */
int claas_copy_text(char *target, size_t size, const char *text);

#ifdef __cplusplus
}
#endif
#endif
