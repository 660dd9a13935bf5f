/* The file that remembers which algorithm does which matrix product, so that processes need not
 * time them anew and sum in the same order. A cache: what is missing, damaged or of another card,
 * driver or library counts as empty and is replaced. Knows nothing of CUDA: keys and algorithms are
 * bytes. */
#ifndef CLAAS_CUDA_GEMM_CHOICES_H
#define CLAAS_CUDA_GEMM_CHOICES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GEMM_CHOICE_KEY   48
#define GEMM_CHOICE_ALGO  64
#define GEMM_CHOICES_MAX  65536

#define GEMM_CHOICES_WAIT 5000 /* ms between two writes of a table that grows */

/* Everything that may change what is fastest, or what an algorithm's bytes mean. No padding, since
 * it is compared as bytes. */
struct gemm_choices_origin {
    char device[64]; /* its name, zeros behind */
    uint64_t library;
    int32_t driver, arch;
};

struct gemm_choice {
    uint8_t key[GEMM_CHOICE_KEY];
    uint8_t algo[GEMM_CHOICE_ALGO];
};

struct gemm_choices {
    struct gemm_choice *items;
    size_t count;
};
void gemm_choices_done(struct gemm_choices *choices);

/* Bytes of a file and back. FORMAT, with what is wrong, for anything that encode did not make for
 * this origin. */
int gemm_choices_encode(const struct gemm_choices_origin *origin,
                        const struct gemm_choices *choices, uint8_t **ret, size_t *ret_length);
int gemm_choices_decode(const struct gemm_choices_origin *origin, const void *data, size_t length,
                        struct gemm_choices *ret);

/* A new string: CLAAS_CUDA_CHOICES, else gemm-<device>.bin in $XDG_CACHE_HOME/claas or
 * ~/.cache/claas; NULL: no file is kept (CLAAS_CUDA_CHOICES is empty, there is no home, something
 * else than a file is there, as /dev/null). device: the card's name, of which letters and digits
 * are kept: cards of two kinds share a home. */
char *gemm_choices_path(const char *device);
/* Reads the file; no choices, and a line in the log, if it is no good. A missing file is not worth
 * a line. */
void gemm_choices_read(const char *path, const struct gemm_choices_origin *origin,
                       struct gemm_choices *ret);
/* Replaces the file, in one step, by these choices and those that others have added to it; for the
 * same product ours count. Writers take turns by a lock on <path>.lock, a file that stays; a writer
 * that does not get the lock within half a second writes without it. A failure is logged. */
int gemm_choices_write(const char *path, const struct gemm_choices_origin *origin,
                       const struct gemm_choices *choices);
/* Monotonic milliseconds, to space writes. */
int64_t gemm_choices_clock(void);
/* A line in the log if choosing for a product of m x n x k took long enough to delay a chat. */
void gemm_choices_note(int m, int n, int k, int64_t ms);

#ifdef __cplusplus
}
#endif
#endif
