/* Reproducible random numbers: Philox4x32-10, counter based (Salmon et al. 2011, "Parallel random
 * numbers: as easy as 1, 2, 3"). The same (seed, stream, index) gives the same number on every
 * machine and device. */
#ifndef CLAAS_RANDOM_H
#define CLAAS_RANDOM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Four 32-bit words for one counter value. */
void claas_philox(uint64_t seed, uint64_t stream, uint64_t index, uint32_t ret[4]);
/* Uniform in [0, 1) with 24 bits. */
float claas_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);
/* Standard normal (Box-Muller). */
float claas_random_normal(uint64_t seed, uint64_t stream, uint64_t index);
/* `bytes` random bytes from the system, and 2*bytes lower-case hex digits plus NUL in text. */
void claas_random_hex(char *text, int bytes);
/* 64 random bits from the system. */
uint64_t claas_random_seed(void);

#ifdef __cplusplus
}
#endif
#endif
