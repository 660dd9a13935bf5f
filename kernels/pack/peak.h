/* The highest value that a counter had. For C and CUDA C++, which have no atomic type in common. */
#ifndef CLAAS_PACK_PEAK_H
#define CLAAS_PACK_PEAK_H

#include <stdint.h>

/* peak = max(peak, now), from any thread. */
static inline void claas_peak_raise(uint64_t *peak, uint64_t now)
{
    uint64_t before = __atomic_load_n(peak, __ATOMIC_RELAXED);

    while (now > before &&
           !__atomic_compare_exchange_n(peak, &before, now, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

/* The highest value so far. */
static inline uint64_t claas_peak(const uint64_t *peak)
{
    return __atomic_load_n(peak, __ATOMIC_RELAXED);
}

#endif
