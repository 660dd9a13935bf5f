/* Sixteen float32 lanes on AVX-512 (F, BW, VL, DQ): the vocabulary that the fast operations are
 * written in; its twin is lanes_avx2.h. Every sum over lanes uses one fixed tree. Partial loads
 * fill with zero. */
#ifndef CLAAS_CPU_LANES_AVX512_H
#define CLAAS_CPU_LANES_AVX512_H

#include <immintrin.h>
#include <string.h>

#include "cpu/ops_impl.h"

#define INLINE static inline __attribute__((always_inline))

typedef __m512 lanes;

INLINE lanes l_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
INLINE void l_store(float *p, lanes v)
{
    _mm512_storeu_ps(p, v);
}
INLINE __mmask16 l_mask(int n)
{
    return (__mmask16)((1u << n) - 1u);
}
INLINE lanes l_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(l_mask(n), p);
}
INLINE void l_store_n(float *p, lanes v, int n)
{
    _mm512_mask_storeu_ps(p, l_mask(n), v);
}
INLINE lanes l_set1(float x)
{
    return _mm512_set1_ps(x);
}
INLINE lanes l_zero(void)
{
    return _mm512_setzero_ps();
}
INLINE lanes l_add(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}
INLINE lanes l_sub(lanes a, lanes b)
{
    return _mm512_sub_ps(a, b);
}
INLINE lanes l_mul(lanes a, lanes b)
{
    return _mm512_mul_ps(a, b);
}
INLINE lanes l_div(lanes a, lanes b)
{
    return _mm512_div_ps(a, b);
}
INLINE lanes l_sqrt(lanes a)
{
    return _mm512_sqrt_ps(a);
}
/* a b + c, rounded once */
INLINE lanes l_fma(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}
/* NaN of `b` is kept. */
INLINE lanes l_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}
INLINE lanes l_min(lanes a, lanes b)
{
    return _mm512_min_ps(a, b);
}
/* Lanes 0 … n-1 of `v`, the others from `fill`. */
INLINE lanes l_keep(lanes v, int n, lanes fill)
{
    return _mm512_mask_mov_ps(fill, l_mask(n), v);
}
INLINE float l_sum(lanes v)
{
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));

    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float l_largest(lanes v)
{
    return _mm512_reduce_max_ps(v);
}
INLINE lanes l_round(lanes v)
{
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* v 2^n for whole n; overflows to infinity, underflows gradually. */
INLINE lanes l_scale(lanes v, lanes n)
{
    return _mm512_scalef_ps(v, n);
}
/* Pairs (a0, b0, a1, b1, …) in memory to two vectors, and back. */
INLINE void l_load_pairs(const float *p, lanes *a, lanes *b)
{
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);

    *a = _mm512_permutex2var_ps(low, even, high);
    *b = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

/* --- bfloat16: 16 elements of memory <-> lanes --- */
INLINE lanes l_widen(__m256i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
/* claas_to_bf16 on every lane */
INLINE __m256i l_narrow(lanes v)
{
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);

    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, quiet), 16));
}
INLINE lanes l_load_bf16(const claas_bf16 *p)
{
    return l_widen(_mm256_loadu_si256((const __m256i *)p));
}
INLINE lanes l_load_bf16_n(const claas_bf16 *p, int n)
{
    return l_widen(_mm256_maskz_loadu_epi16(l_mask(n), p));
}
INLINE void l_store_bf16(claas_bf16 *p, lanes v)
{
    _mm256_storeu_si256((__m256i *)p, l_narrow(v));
}
INLINE void l_store_bf16_n(claas_bf16 *p, lanes v, int n)
{
    _mm256_mask_storeu_epi16(p, l_mask(n), l_narrow(v));
}

#endif
