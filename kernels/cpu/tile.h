/* The inner loops of every matrix product: acc[rows][16 or 32] += X W for a few rows and one or two
 * panels, with all sums in registers.
 *
 * A "step" is what one multiply instruction sums over: one k in float32, one pair (k, k+1) in
 * bfloat16. At each step a tile reads 64 bytes of each panel and one broadcast operand per row, and
 * does rows x panels multiply-adds; with 14 rows and 2 panels that is 28 independent chains, more
 * than latency times throughput of any CPU here, and measured 98% of the peak. The sum of an
 * element is one chain over the steps, so tile shape never changes a result.
 *
 *   operand of row i, step s   x + i*ldx + s*xstep    bytes; 4 of them, or 8 of widened pairs
 *   panel p, step s            w + p*second + s*64    bytes
 *   sums of row i, panel p     acc + i*ldacc + 16*p   floats, loaded first and stored last
 *
 * Local arrays would be kept in memory by the compilers (they unroll after they have decided what
 * lives in registers), hence one variable per sum, made by macros. Rows are addressed from a base
 * pointer for every third row: x86 has base+index*1 and *2 only, and 14 row pointers would not fit
 * the integer registers. */
#ifndef CLAAS_CPU_TILE_H
#define CLAAS_CPU_TILE_H

typedef void tile_fn(const char *x, ptrdiff_t ldx, ptrdiff_t xstep, const char *w, ptrdiff_t second,
                     int steps, float *acc, ptrdiff_t ldacc);

/* clang-format off */
#define ROWS_1(M)  M(0)
#define ROWS_2(M)  ROWS_1(M) M(1)
#define ROWS_3(M)  ROWS_2(M) M(2)
#define ROWS_4(M)  ROWS_3(M) M(3)
#define ROWS_5(M)  ROWS_4(M) M(4)
#define ROWS_6(M)  ROWS_5(M) M(5)
#define ROWS_7(M)  ROWS_6(M) M(6)
#define ROWS_8(M)  ROWS_7(M) M(7)
#define ROWS_9(M)  ROWS_8(M) M(8)
#define ROWS_10(M) ROWS_9(M) M(9)
#define ROWS_11(M) ROWS_10(M) M(10)
#define ROWS_12(M) ROWS_11(M) M(11)
#define ROWS_13(M) ROWS_12(M) M(12)
#define ROWS_14(M) ROWS_13(M) M(13)

#define AT_0  (x0)
#define AT_1  (x0 + ldx)
#define AT_2  (x0 + 2 * ldx)
#define AT_3  (x1)
#define AT_4  (x1 + ldx)
#define AT_5  (x1 + 2 * ldx)
#define AT_6  (x2)
#define AT_7  (x2 + ldx)
#define AT_8  (x2 + 2 * ldx)
#define AT_9  (x3)
#define AT_10 (x3 + ldx)
#define AT_11 (x3 + 2 * ldx)
#define AT_12 (x4)
#define AT_13 (x4 + ldx)
/* clang-format on */

#if defined(__AVX512F__)

#define TILE_PANELS 2
typedef __m512 tile_vector;
#define TILE_LOAD(p)     _mm512_loadu_ps(p)
#define TILE_STORE(p, v) _mm512_storeu_ps(p, v)
#define TILE_SECOND_SUM  16
#define TILE_SECOND_W    second
INLINE __m512i load_raw(const char *p)
{
    return _mm512_loadu_si512(p);
}
INLINE __m512 broadcast_float(const char *p)
{
    float value;

    memcpy(&value, p, sizeof(value));
    return _mm512_set1_ps(value);
}
INLINE __m512 low_floats(__m512i pairs)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
INLINE __m512 high_floats(__m512i pairs)
{
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}
#define TILE_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)

#else

/* One panel is two vectors here, its second half 8 lanes further. */
#define TILE_PANELS       1
typedef __m256 tile_vector;
#define TILE_LOAD(p)      _mm256_loadu_ps(p)
#define TILE_STORE(p, v)  _mm256_storeu_ps(p, v)
#define TILE_SECOND_SUM   8
#define TILE_SECOND_W     32
INLINE __m256i load_raw(const char *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}
INLINE __m256 broadcast_float(const char *p)
{
    float value;

    memcpy(&value, p, sizeof(value));
    return _mm256_set1_ps(value);
}
INLINE __m256 low_floats(__m256i pairs)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
INLINE __m256 high_floats(__m256i pairs)
{
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}
#define TILE_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)

#endif

#define TILE_WIDTH (TILE_PANELS * CLAAS_LANES)

/* clang-format off */
/* One or two vectors of sums per row. */
#define LOAD_1(i) tile_vector a##i##_0 = TILE_LOAD(acc + (i)*ldacc);
#define LOAD_2(i) LOAD_1(i) tile_vector a##i##_1 = TILE_LOAD(acc + (i)*ldacc + TILE_SECOND_SUM);
#define STORE_1(i) TILE_STORE(acc + (i)*ldacc, a##i##_0);
#define STORE_2(i) STORE_1(i) TILE_STORE(acc + (i)*ldacc + TILE_SECOND_SUM, a##i##_1);

/* float32: a step is one k. */
#define W_F32_1                                                                                    \
    const tile_vector w0 = TILE_LOAD((const float *)w);
#define W_F32_2 W_F32_1 const tile_vector w1 = TILE_LOAD((const float *)(w + TILE_SECOND_W));
#define STEP_F32_1(i) a##i##_0 = TILE_FMA(w0, broadcast_float(AT_##i), a##i##_0);
#define STEP_F32_2(i)                                                                              \
    {                                                                                              \
        const tile_vector b = broadcast_float(AT_##i);                                             \
        a##i##_0 = TILE_FMA(w0, b, a##i##_0);                                                      \
        a##i##_1 = TILE_FMA(w1, b, a##i##_1);                                                      \
    }

/* bfloat16 without the dot instruction: pairs of the panel are widened here, X's were before. */
#define W_WIDE_1                                                                                   \
    const tile_vector w0 = low_floats(load_raw(w)), w0_ = high_floats(load_raw(w));
#define W_WIDE_2                                                                                   \
    W_WIDE_1 const tile_vector w1 = low_floats(load_raw(w + TILE_SECOND_W)),                       \
                               w1_ = high_floats(load_raw(w + TILE_SECOND_W));
#define STEP_WIDE_1(i)                                                                             \
    a##i##_0 = TILE_FMA(w0, broadcast_float(AT_##i), a##i##_0);                                    \
    a##i##_0 = TILE_FMA(w0_, broadcast_float(AT_##i + 4), a##i##_0);
#define STEP_WIDE_2(i)                                                                             \
    {                                                                                              \
        const tile_vector b = broadcast_float(AT_##i), b_ = broadcast_float(AT_##i + 4);           \
        a##i##_0 = TILE_FMA(w0, b, a##i##_0);                                                      \
        a##i##_1 = TILE_FMA(w1, b, a##i##_1);                                                      \
        a##i##_0 = TILE_FMA(w0_, b_, a##i##_0);                                                    \
        a##i##_1 = TILE_FMA(w1_, b_, a##i##_1);                                                    \
    }

/* bfloat16 with it: a pair of the row against 16 pairs of the panel. */
#if defined(__AVX512BF16__)
INLINE __m512i broadcast_pair(const char *p)
{
    int value;

    memcpy(&value, p, sizeof(value));
    return _mm512_set1_epi32(value);
}
#define TILE_DOT(a, w, b) _mm512_dpbf16_ps(a, (__m512bh)(w), (__m512bh)(b))
#define W_DOT_1           const __m512i w0 = load_raw(w);
#define W_DOT_2           W_DOT_1 const __m512i w1 = load_raw(w + second);
#define STEP_DOT_1(i)     a##i##_0 = TILE_DOT(a##i##_0, w0, broadcast_pair(AT_##i));
#define STEP_DOT_2(i)                                                                              \
    {                                                                                              \
        const __m512i b = broadcast_pair(AT_##i);                                                  \
        a##i##_0 = TILE_DOT(a##i##_0, w0, b);                                                      \
        a##i##_1 = TILE_DOT(a##i##_1, w1, b);                                                      \
    }
#endif

/* Bytes ahead to prefetch: 10 to 15% when the panels come from memory (few rows, or the first tile
 * of a part). */
#define TILE_AHEAD 2048

#define TILE(KIND, ROWS, VECTORS)                                                                  \
    static void tile_##KIND##_##ROWS##x##VECTORS(                                                  \
        const char *x, ptrdiff_t ldx, ptrdiff_t xstep, const char *w, ptrdiff_t second, int steps, \
        float *acc, ptrdiff_t ldacc)                                                               \
    {                                                                                              \
        const char *x0 = x, *x1 = (ROWS) > 3 ? x + 3 * ldx : x;                                    \
        const char *x2 = (ROWS) > 6 ? x + 6 * ldx : x, *x3 = (ROWS) > 9 ? x + 9 * ldx : x;         \
        const char *x4 = (ROWS) > 12 ? x + 12 * ldx : x;                                           \
                                                                                                   \
        ROWS_##ROWS(LOAD_##VECTORS)                                                                \
        for (int s = 0; s < steps; s++) {                                                          \
            W_##KIND##_##VECTORS                                                                   \
            ROWS_##ROWS(STEP_##KIND##_##VECTORS)                                                   \
            x0 += xstep;                                                                           \
            x1 += xstep;                                                                           \
            x2 += xstep;                                                                           \
            x3 += xstep;                                                                           \
            x4 += xstep;                                                                           \
            _mm_prefetch(w + TILE_AHEAD, _MM_HINT_T0);                                             \
            if ((VECTORS) == 2 && TILE_PANELS == 2)                                                \
                _mm_prefetch(w + second + TILE_AHEAD, _MM_HINT_T0);                                \
            w += 64;                                                                               \
        }                                                                                          \
        ROWS_##ROWS(STORE_##VECTORS)                                                               \
        (void)second, (void)x1, (void)x2, (void)x3, (void)x4;                                      \
    }

#define TILES_4(KIND, V)  TILE(KIND, 1, V) TILE(KIND, 2, V) TILE(KIND, 3, V) TILE(KIND, 4, V)
#define TILES_6(KIND, V)  TILES_4(KIND, V) TILE(KIND, 5, V) TILE(KIND, 6, V)
#define TILES_12(KIND, V)                                                                          \
    TILES_6(KIND, V) TILE(KIND, 7, V) TILE(KIND, 8, V) TILE(KIND, 9, V) TILE(KIND, 10, V)          \
        TILE(KIND, 11, V) TILE(KIND, 12, V)
#define TILES_14(KIND, V) TILES_12(KIND, V) TILE(KIND, 13, V) TILE(KIND, 14, V)

#define NAMES_4(KIND, V)                                                                           \
    NULL, tile_##KIND##_1x##V, tile_##KIND##_2x##V, tile_##KIND##_3x##V, tile_##KIND##_4x##V
#define NAMES_6(KIND, V) NAMES_4(KIND, V), tile_##KIND##_5x##V, tile_##KIND##_6x##V
#define NAMES_12(KIND, V)                                                                          \
    NAMES_6(KIND, V), tile_##KIND##_7x##V, tile_##KIND##_8x##V, tile_##KIND##_9x##V,               \
        tile_##KIND##_10x##V, tile_##KIND##_11x##V, tile_##KIND##_12x##V
#define NAMES_14(KIND, V) NAMES_12(KIND, V), tile_##KIND##_13x##V, tile_##KIND##_14x##V

/* `tiles_f32` multiplies float panels and is in every variant; `tiles` are those of the table's
 * precision. */
#if defined(__AVX512F__)
#define F32_ROWS 14
TILES_14(F32, 1)
TILES_14(F32, 2)
static tile_fn *const tiles_f32[2][F32_ROWS + 1] = {{NAMES_14(F32, 1)}, {NAMES_14(F32, 2)}};
#else
#define F32_ROWS 6
TILES_6(F32, 2)
static tile_fn *const tiles_f32[1][F32_ROWS + 1] = {{NAMES_6(F32, 2)}};
#endif

#if defined(CLAAS_OPS_F32)
#define TILE_ROWS F32_ROWS
#define tiles     tiles_f32
#elif defined(__AVX512BF16__)
#define TILE_ROWS 14
TILES_14(DOT, 1)
TILES_14(DOT, 2)
static tile_fn *const tiles[2][TILE_ROWS + 1] = {{NAMES_14(DOT, 1)}, {NAMES_14(DOT, 2)}};
#elif defined(__AVX512F__)
#define TILE_ROWS 12
TILES_12(WIDE, 1)
TILES_12(WIDE, 2)
static tile_fn *const tiles[2][TILE_ROWS + 1] = {{NAMES_12(WIDE, 1)}, {NAMES_12(WIDE, 2)}};
#else
#define TILE_ROWS 4
TILES_4(WIDE, 2)
static tile_fn *const tiles[1][TILE_ROWS + 1] = {{NAMES_4(WIDE, 2)}};
#endif

/* clang-format on */

#endif
