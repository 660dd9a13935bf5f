/* Reader and writer of the safetensors format; the reader refuses everything that the format
 * forbids (holes, overlaps, duplicate names, sizes that do not fit). */
#ifndef CLAAS_SAFETENSORS_H
#define CLAAS_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Largest header read or written. The format allows 100 MB, but the largest real ones have a few
 * megabytes, and a hostile one costs up to 32 times its size while it is parsed. */
#define CLAAS_SAFETENSORS_HEADER_MAX ((size_t)8 << 20)

enum claas_dtype { CLAAS_DTYPE_F32, CLAAS_DTYPE_F16, CLAAS_DTYPE_BF16, CLAAS_DTYPE_OTHER };

struct claas_safetensor {
    const char *name; /* owned by the file object */
    enum claas_dtype dtype;
    int dims;
    int64_t shape[4];
    const uint8_t *data; /* borrowed from the mapping */
    size_t bytes;
};

typedef struct claas_safetensors claas_safetensors_t;

/* Maps the file until claas_safetensors_free. FORMAT says what is wrong and where. */
int claas_safetensors_open(const char *path, claas_safetensors_t **ret);
/* The same over memory that outlives the object (fuzzing, tests). */
int claas_safetensors_parse(const uint8_t *data, size_t length, claas_safetensors_t **ret);
void claas_safetensors_free(claas_safetensors_t **file);
size_t claas_safetensors_count(const claas_safetensors_t *file);
/* In the header's order; NULL past the end, and for a name that is not there. */
const struct claas_safetensor *claas_safetensors_at(const claas_safetensors_t *file, size_t index);
const struct claas_safetensor *claas_safetensors_find(const claas_safetensors_t *file,
                                                      const char *name);
/* A value of "__metadata__", NULL if absent. */
const char *claas_safetensors_metadata(const claas_safetensors_t *file, const char *key);

/* Writes float32 tensors in the given order, then fsyncs. `metadata`: key, value, key, value, …,
 * NULL, or NULL. */
struct claas_safetensor_out {
    const char *name;
    int dims;
    int64_t shape[4];
    const float *data;
};
int claas_safetensors_write(const char *path, const struct claas_safetensor_out *tensors,
                            size_t count, const char *const *metadata);
/* The same, asking between tensors whether the file is still wanted (NULL: it is): CANCELLED if
 * not, and there is no file. */
int claas_safetensors_write_unless(const char *path, const struct claas_safetensor_out *tensors,
                                   size_t count, const char *const *metadata,
                                   bool (*is_unwanted)(void *arg), void *arg);

#endif
