/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) on the device: the words of claas_philox
 * (actors/base/random.c). */
#ifndef CLAAS_CUDA_PHILOX_CUH
#define CLAAS_CUDA_PHILOX_CUH

#include <stdint.h>

static __device__ __forceinline__ void philox(uint64_t seed, uint64_t stream, uint64_t index,
                                              uint32_t ret[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);

    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;

        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    ret[0] = c0;
    ret[1] = c1;
    ret[2] = c2;
    ret[3] = c3;
}

#endif
