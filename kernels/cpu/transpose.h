/* Small rearrangements that turn act rows and panels into the operands of the other two products:
 * 16 x 16 blocks of panels transposed (gemm_dx), rows packed as panels and rows turned into
 * transposed operands (gemm_tn). */
#ifndef CLAAS_CPU_TRANSPOSE_H
#define CLAAS_CPU_TRANSPOSE_H

#if defined(CLAAS_OPS_F32)

/* in[i][j] -> out[j][i], 16 x 16 floats. */
#if defined(__AVX512F__)
static void transpose_block(const act *in, act *out)
{
    __m512 r[16], t[16];

    for (int i = 0; i < 16; i += 2) { /* pairs of rows */
        const __m512 a = _mm512_loadu_ps(in + 16 * i), b = _mm512_loadu_ps(in + 16 * i + 16);

        r[i] = _mm512_unpacklo_ps(a, b);
        r[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    /* Pairs of pairs: t[4g+j] holds columns j, 4+j, 8+j, 12+j of rows 4g … 4g+3. */
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(r[i + j]), b = _mm512_castps_pd(r[i + 2 + j]);

            t[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            t[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; j++) { /* 4 x 4 quarters */
        const __m512 a = _mm512_shuffle_f32x4(t[j], t[4 + j], 0x44);
        const __m512 b = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0x44);
        const __m512 c = _mm512_shuffle_f32x4(t[j], t[4 + j], 0xee);
        const __m512 d = _mm512_shuffle_f32x4(t[8 + j], t[12 + j], 0xee);

        _mm512_storeu_ps(out + 16 * j, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_storeu_ps(out + 16 * (4 + j), _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_storeu_ps(out + 16 * (8 + j), _mm512_shuffle_f32x4(c, d, 0x88));
        _mm512_storeu_ps(out + 16 * (12 + j), _mm512_shuffle_f32x4(c, d, 0xdd));
    }
}
#else
static void transpose_quarter(const float *in, float *out)
{
    __m256 r[8], t[8];

    for (int i = 0; i < 8; i += 2) {
        const __m256 a = _mm256_loadu_ps(in + 16 * i), b = _mm256_loadu_ps(in + 16 * i + 16);

        r[i] = _mm256_unpacklo_ps(a, b);
        r[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m256d a = _mm256_castps_pd(r[i + j]), b = _mm256_castps_pd(r[i + 2 + j]);

            t[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            t[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; j++) {
        _mm256_storeu_ps(out + 16 * j, _mm256_permute2f128_ps(t[j], t[4 + j], 0x20));
        _mm256_storeu_ps(out + 16 * (4 + j), _mm256_permute2f128_ps(t[j], t[4 + j], 0x31));
    }
}
static void transpose_block(const act *in, act *out)
{
    transpose_quarter(in, out);
    transpose_quarter(in + 8, out + 128);
    transpose_quarter(in + 128, out + 8);
    transpose_quarter(in + 136, out + 136);
}
#endif

/* `count` rows of n <= 16 used columns as one panel: row i is step i. */
static void pack_rows(const act *x, int ldx, int count, int n, act *out)
{
    for (int i = 0; i < count; i++)
        a_store(out + 16 * i, a_read(x + (size_t)i * ldx, n));
}

#define TRANSPOSED_BYTES(count, rs) 0

/* The operand whose row r, step i is p[i][r]. */
static struct operand transposed_operand(const act *p, int ldp, int count, int rs, char *scratch)
{
    return (struct operand){(const char *)p, 4, (ptrdiff_t)ldp * 4};
}

#else

/* A block of a panel, [8 pairs of i][16 j][2], to that of the transposed panel, [8 pairs of j][16
 * i][2]. */
#if defined(__AVX512F__)
INLINE __m512i quarter_index(int first)
{
    /* Dword 4t+c of the result is (column 2t, column 2t+1) of row c of the four rows in two
     * vectors. */
    short index[32];

    for (int t = 0; t < 4; t++)
        for (int c = 0; c < 4; c++)
            for (int half = 0; half < 2; half++)
                index[8 * t + 2 * c + half] =
                    (short)(32 * (c >> 1) + 4 * (t + first) + 2 * half + (c & 1));
    return _mm512_loadu_si512(index);
}
static void transpose_block(const act *in, act *out)
{
    const __m512i low = quarter_index(0), high = quarter_index(4);
    __m512i u[2][4];

    for (int q = 0; q < 4; q++) {
        const __m512i a = _mm512_loadu_si512(in + 64 * q), b = _mm512_loadu_si512(in + 64 * q + 32);

        u[0][q] = _mm512_permutex2var_epi16(a, low, b);
        u[1][q] = _mm512_permutex2var_epi16(a, high, b);
    }
    for (int h = 0; h < 2; h++) { /* 4 x 4 quarters */
        const __m512i a = _mm512_shuffle_i32x4(u[h][0], u[h][1], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(u[h][2], u[h][3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(u[h][0], u[h][1], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(u[h][2], u[h][3], 0xee);

        _mm512_storeu_si512(out + 128 * h, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(out + 128 * h + 32, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(out + 128 * h + 64, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(out + 128 * h + 96, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}
#else
static void transpose_block(const act *in, act *out)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
            out[j / 2 * 32 + i * 2 + (j & 1)] = in[i / 2 * 32 + j * 2 + (i & 1)];
}
#endif

/* (a0, b0, a1, b1, …) of 16 elements each. */
#if defined(__AVX512F__)
INLINE void interleave(const act *a, const act *b, act *out)
{
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)a)),
                           _mm256_loadu_si256((const __m256i *)b), 1);

    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
}
#else
INLINE void interleave(const act *a, const act *b, act *out)
{
    const __m256i low = _mm256_loadu_si256((const __m256i *)a);
    const __m256i high = _mm256_loadu_si256((const __m256i *)b);
    const __m256i even = _mm256_unpacklo_epi16(low, high), odd = _mm256_unpackhi_epi16(low, high);

    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}
#endif

/* (a0, b0, a1, b1, …): the first n <= 16 elements of two rows as one step of a panel, the rest
 * zero. */
INLINE void pair_rows(const act *a, const act *b, int n, act *out)
{
    act whole[2][16];

    if (n < 16) {
        memset(whole, 0, sizeof(whole));
        memcpy(whole[0], a, (size_t)n * sizeof(act));
        memcpy(whole[1], b, (size_t)n * sizeof(act));
        a = whole[0];
        b = whole[1];
    }
    interleave(a, b, out);
}

static void pack_rows(const act *x, int ldx, int count, int n, act *out)
{
    static const act zero[16];

    for (int i = 0; i < count; i += 2) {
        const act *a = x + (size_t)i * ldx;

        pair_rows(a, i + 1 < count ? a + ldx : zero, smaller(n, 16), out + 16 * i);
    }
}

#if defined(CLAAS_OPS_AMX)

/* Bytes of a row of `count` transposed: whole cache lines, an odd number of them. */
#define TRANSPOSED_ROW(count)       ((((size_t)(count) + 31) / 32 | 1) * 64)
#define TRANSPOSED_BYTES(count, rs) (TRANSPOSED_ROW(count) * (rs))

/* 16 steps of 16 rows: in[i][r] -> row r, step i, each a pair; rows `bytes` apart. */
INLINE void transpose_steps(const __m512i in[16], char *out, size_t bytes)
{
    __m512i r[16], t[16];

    for (int i = 0; i < 16; i += 2) {
        r[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
        r[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
    }
    /* t[4g+j] holds columns j, 4+j, 8+j, 12+j of rows 4g … 4g+3. */
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            t[i + 2 * j] = _mm512_unpacklo_epi64(r[i + j], r[i + 2 + j]);
            t[i + 2 * j + 1] = _mm512_unpackhi_epi64(r[i + j], r[i + 2 + j]);
        }
    for (int j = 0; j < 4; j++) { /* 4 x 4 quarters */
        const __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xee);

        _mm512_storeu_si512(out + j * bytes, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(out + (4 + j) * bytes, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(out + (8 + j) * bytes, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(out + (12 + j) * bytes, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

/* The operand whose row r, step i is (p[2i][r], p[2i+1][r]), steps side by side. */
static struct operand transposed_operand(const act *p, int ldp, int count, int rs, char *scratch)
{
    static const act zero[16];
    const size_t bytes = TRANSPOSED_ROW(count);

    for (int r = 0; r < rs; r += 16)
        for (int i = 0; i < count; i += 32) {
            const int n = smaller(16, rs - r);
            __m512i steps[16];

            for (int s = 0; s < 16; s++) {
                const int row = i + 2 * s;
                const act *a = row < count ? p + (size_t)row * ldp + r : zero;

                pair_rows(a, row + 1 < count ? a + ldp : zero, n, (act *)&steps[s]);
            }
            transpose_steps(steps, scratch + (size_t)r * bytes + (size_t)i * 2, bytes);
        }
    return (struct operand){scratch, (ptrdiff_t)bytes, 4};
}

#else

#define TRANSPOSED_BYTES(count, rs) ((count) / STEP_K * (rs)*WIDTH_OF_STEP)

/* The operand whose row r, step i is (p[2i][r], p[2i+1][r]). */
static struct operand transposed_operand(const act *p, int ldp, int count, int rs, char *scratch)
{
    static const act zero[16];
    const int width = divide_up(rs, 16) * 16;

    for (int i = 0; i < count; i += 2)
        for (int r = 0; r < rs; r += 16) {
            const act *a = p + (size_t)i * ldp + r;
            const int n = smaller(16, rs - r);
            act *out = (act *)scratch + ((size_t)i / 2 * width + r) * 2;

            pair_rows(a, i + 1 < count ? a + ldp : zero, n, out);
        }
#if OPERAND_WIDENED
    { /* from the end, because the floats take twice the room */
        const size_t total = (size_t)divide_up(count, 2) * width * 2;

        for (size_t i = total; i > 0; i -= 16)
            l_store((float *)scratch + i - 16, a_load((const act *)scratch + i - 16));
    }
    return (struct operand){scratch, 8, (ptrdiff_t)width * 8};
#else
    return (struct operand){scratch, 4, (ptrdiff_t)width * 4};
#endif
}

#endif

#endif

#endif
