/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
 * 2011).
 *
 * A keyed bijection of a 128-bit counter: no state, so that any number of a stream can be made
 * anywhere, in any order. Key = seed, counter = (index, stream), low words first, which is the
 * layout of cuRAND and PyTorch too. */
#include "claas/random.h"

#include <math.h>
#include <sodium.h>
#include <stdlib.h>

#define ROUNDS 10
#define M0     UINT32_C(0xD2511F53)
#define M1     UINT32_C(0xCD9E8D57)
#define W0     UINT32_C(0x9E3779B9) /* golden ratio */
#define W1     UINT32_C(0xBB67AE85) /* sqrt(3) - 1 */

void claas_philox(uint64_t seed, uint64_t stream, uint64_t index, uint32_t ret[4])
{
    uint32_t k0 = (uint32_t)seed;
    uint32_t k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index;
    uint32_t c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)stream;
    uint32_t c3 = (uint32_t)(stream >> 32);

    for (int round = 0; round < ROUNDS; round++) {
        uint64_t p0 = (uint64_t)M0 * c0;
        uint64_t p1 = (uint64_t)M1 * c2;

        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += W0;
        k1 += W1;
    }
    ret[0] = c0;
    ret[1] = c1;
    ret[2] = c2;
    ret[3] = c3;
}

float claas_random_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];

    claas_philox(seed, stream, index, words);
    /* The upper 24 bits: every value is exact in a float, and 1.0 cannot come out. */
    return (float)(words[0] >> 8) * 0x1p-24F;
}

float claas_random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    double radius;
    double angle;

    claas_philox(seed, stream, index, words);
    /* (0, 1]: the logarithm is finite; the largest value is sqrt(64 ln 2) = 6.66. */
    radius = sqrt(-2.0 * log(((double)words[0] + 1.0) * 0x1p-32));
    angle = 2.0 * M_PI * ((double)words[1] * 0x1p-32);
    return (float)(radius * cos(angle));
}

/* sodium_init is idempotent and safe from any thread; without entropy no secret may be made. */
static void fill_random(void *target, size_t length)
{
    if (sodium_init() < 0)
        abort();
    randombytes_buf(target, length);
}

void claas_random_hex(char *text, int bytes)
{
    static const char digits[] = "0123456789abcdef";

    for (int i = 0; i < bytes; i++) {
        uint8_t byte;

        fill_random(&byte, 1);
        *text++ = digits[byte >> 4];
        *text++ = digits[byte & 15];
    }
    *text = '\0';
}

uint64_t claas_random_seed(void)
{
    uint64_t seed;

    fill_random(&seed, sizeof(seed));
    return seed;
}
