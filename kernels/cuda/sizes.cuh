/* What every file of kernels counts with: warps, and the host's grids and alignments. */
#ifndef CLAAS_CUDA_SIZES_CUH
#define CLAAS_CUDA_SIZES_CUH

#include <stddef.h>
#include <stdint.h>

#define WARP      32
#define ALL_LANES 0xffffffffu

/* a / b, rounded up, as a number of a's type. */
template <typename N> static inline N divide_up(N a, decltype(a) b)
{
    return (a + b - 1) / b;
}

/* True for NULL too. */
static inline bool is_aligned(const void *p, size_t bytes)
{
    return (uintptr_t)p % bytes == 0;
}
static inline bool aligned16(const void *p)
{
    return is_aligned(p, 16);
}

#endif
