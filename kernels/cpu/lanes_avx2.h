/* Sixteen float32 lanes on AVX2 + FMA, as two halves: the twin of lanes_avx512.h, same names, same
 * order of sums. */
#ifndef CLAAS_CPU_LANES_AVX2_H
#define CLAAS_CPU_LANES_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "cpu/ops_impl.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    __m256 a, b;
} lanes;

INLINE lanes l_load(const float *p)
{
    return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
INLINE void l_store(float *p, lanes v)
{
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
INLINE lanes l_load_n(const float *p, int n)
{
    float all[16] = {0};

    memcpy(all, p, (size_t)n * sizeof(float));
    return l_load(all);
}
INLINE void l_store_n(float *p, lanes v, int n)
{
    float all[16];

    l_store(all, v);
    memcpy(p, all, (size_t)n * sizeof(float));
}
INLINE lanes l_set1(float x)
{
    return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
INLINE lanes l_zero(void)
{
    return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
INLINE lanes l_add(lanes x, lanes y)
{
    return (lanes){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
INLINE lanes l_sub(lanes x, lanes y)
{
    return (lanes){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
INLINE lanes l_mul(lanes x, lanes y)
{
    return (lanes){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
INLINE lanes l_div(lanes x, lanes y)
{
    return (lanes){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
INLINE lanes l_sqrt(lanes x)
{
    return (lanes){_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)};
}
/* x y + z, rounded once */
INLINE lanes l_fma(lanes x, lanes y, lanes z)
{
    return (lanes){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
/* NaN of `y` is kept. */
INLINE lanes l_max(lanes x, lanes y)
{
    return (lanes){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
INLINE lanes l_min(lanes x, lanes y)
{
    return (lanes){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
/* Lanes 0 … n-1 of `v`, the others from `fill`. */
INLINE lanes l_keep(lanes v, int n, lanes fill)
{
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), first);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), first);

    return (lanes){_mm256_blendv_ps(fill.a, v.a, _mm256_castsi256_ps(low)),
                   _mm256_blendv_ps(fill.b, v.b, _mm256_castsi256_ps(high))};
}
INLINE float l_sum(lanes v)
{
    const __m256 a = _mm256_add_ps(v.a, v.b);
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));

    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float l_largest(lanes v)
{
    const __m256 a = _mm256_max_ps(v.a, v.b);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));

    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
INLINE lanes l_round(lanes v)
{
    return (lanes){_mm256_round_ps(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   _mm256_round_ps(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/* v 2^n for whole n in [-252, 254], in two factors because one alone may not be a normal number. */
INLINE __m256 l_scale_half(__m256 v, __m256 n)
{
    const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(first, bias), 23);
    const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, first), bias), 23);

    return _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
INLINE lanes l_scale(lanes v, lanes n)
{
    return (lanes){l_scale_half(v.a, n.a), l_scale_half(v.b, n.b)};
}
/* Pairs (a0, b0, a1, b1, …) in memory to two vectors. */
INLINE __m256 l_every_second(__m256 low, __m256 high, const int odd)
{
    const __m256 mixed =
        odd ? _mm256_shuffle_ps(low, high, 0xdd) : _mm256_shuffle_ps(low, high, 0x88);

    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
INLINE void l_load_pairs(const float *p, lanes *a, lanes *b)
{
    const __m256 v0 = _mm256_loadu_ps(p), v1 = _mm256_loadu_ps(p + 8);
    const __m256 v2 = _mm256_loadu_ps(p + 16), v3 = _mm256_loadu_ps(p + 24);

    *a = (lanes){l_every_second(v0, v1, 0), l_every_second(v2, v3, 0)};
    *b = (lanes){l_every_second(v0, v1, 1), l_every_second(v2, v3, 1)};
}

/* --- bfloat16: 16 elements of memory <-> lanes --- */
INLINE __m256 l_widen_half(__m128i v)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
/* claas_to_bf16 on every lane, in the low half of each */
INLINE __m256i l_narrow_half(__m256 v)
{
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));

    return _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
}
INLINE lanes l_load_bf16(const claas_bf16 *p)
{
    return (lanes){l_widen_half(_mm_loadu_si128((const __m128i *)p)),
                   l_widen_half(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void l_store_bf16(claas_bf16 *p, lanes v)
{
    const __m256i mixed = _mm256_packus_epi32(l_narrow_half(v.a), l_narrow_half(v.b));

    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
INLINE lanes l_load_bf16_n(const claas_bf16 *p, int n)
{
    claas_bf16 all[16] = {0};

    memcpy(all, p, (size_t)n * sizeof(claas_bf16));
    return l_load_bf16(all);
}
INLINE void l_store_bf16_n(claas_bf16 *p, lanes v, int n)
{
    claas_bf16 all[16];

    l_store_bf16(all, v);
    memcpy(p, all, (size_t)n * sizeof(claas_bf16));
}

#endif
