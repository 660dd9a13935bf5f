/* A few rows times a quantised weight in the layout of blocks.h: each pair of k becomes the same
 * vector of bfloat16 that the panel holds and meets the same dot instruction in the same order, so
 * results are those of the panels bit for bit. Part of ops_fast.c, in the variant with the bfloat16
 * dot instruction only.
 *
 * Per pair: shift (or load and widen), q to float (nibbles by a table in a register, which also
 * subtracts the zero point), scale in two vectors, round both to bfloat16 into one, multiply: about
 * 8 instructions for 32 weights, as fast as memory delivers them. */
#ifndef CLAAS_CPU_BLOCKS_FAST_H
#define CLAAS_CPU_BLOCKS_FAST_H

#include "cpu/blocks.h"

#define CLAAS_FAST_BLOCKS 1
#if defined(CLAAS_OPS_AMX)
#define BLOCK_ROWS 32 /* one tile: an expanded weight serves them all */
#else
#define BLOCK_ROWS 8 /* the most rows for which this beats the panels */
#endif

/* Scales and minima of a section, in the lanes of the pairs: [0] has rows 0 … 7, each twice, [1]
 * rows 8 … 15. */
struct section_scales {
    __m512 d[2], m[2];
};

INLINE void spread_rows(__m512 rows, __m512 out[2])
{
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);

    out[0] = _mm512_permutexvar_ps(low, rows);
    out[1] = _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), rows);
}
INLINE __m512 load_scales(const uint8_t *at, const int wide)
{
    return wide ? _mm512_loadu_ps(at) : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

/* Pair number `pair` of four as bfloat16; q = the first byte of the four. */
INLINE __m512i expand_pair(const uint8_t *q, const int pair, const int bits, const int minima,
                           __m512 table, const struct section_scales *s)
{
    __m512 a, b;

    if (bits == 4) { /* the table looks at the low 4 bits of each lane */
        const __m512i four = _mm512_loadu_si512(q);
        const int shift = pair * 8;

        a = _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(four, shift) : four, table);
        b = _mm512_permutexvar_ps(_mm512_srli_epi32(four, shift + 4), table);
    } else {
        const __m128i low = _mm_loadu_si128((const __m128i *)(q + pair * 32));
        const __m128i high = _mm_loadu_si128((const __m128i *)(q + pair * 32 + 16));

        a = _mm512_cvtepi32_ps(minima ? _mm512_cvtepu8_epi32(low) : _mm512_cvtepi8_epi32(low));
        b = _mm512_cvtepi32_ps(minima ? _mm512_cvtepu8_epi32(high) : _mm512_cvtepi8_epi32(high));
    }
    a = minima ? _mm512_fmadd_ps(a, s->d[0], s->m[0]) : _mm512_mul_ps(a, s->d[0]);
    b = minima ? _mm512_fmadd_ps(b, s->d[1], s->m[1]) : _mm512_mul_ps(b, s->d[1]);
    return (__m512i)_mm512_cvtne2ps_pbh(b, a);
}

/* Scales and minima of one half of the section at q. */
INLINE void take_scales(const uint8_t *q, const int half, const int minima, const int wide,
                        struct section_scales *s)
{
    const int width = 16 * (wide ? 4 : 2);

    spread_rows(load_scales(q + half * width, wide), s->d);
    if (minima)
        spread_rows(load_scales(q + (2 + half) * width, wide), s->m);
}

INLINE __m512 nibble_table(int zero)
{
    return _mm512_sub_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_ps((float)zero));
}

#if defined(CLAAS_OPS_AMX)

/* 32 k of the section(s) at q as one matrix tile per half; returns what follows them. */
INLINE const uint8_t *expand_tiles(const uint8_t *q, const int bits, const int minima,
                                   const int wide, const int section, __m512 table,
                                   claas_bf16 out[2][AMX_ITEMS])
{
    for (int at = 0; at < 32; at += section) {
        struct section_scales s0, s1;

        take_scales(q, 0, minima, wide, &s0);
        take_scales(q, 1, minima, wide, &s1);
        q += scale_bytes(minima, wide);
        for (int k = at; k < at + section; k += 8, q += 32 * bits) {
            _Pragma("GCC unroll 4") for (int pair = 0; pair < 4; pair++)
            {
                const int item = (k / 2 + pair) * 32;

                _mm512_store_si512(out[0] + item, expand_pair(q, pair, bits, minima, table, &s0));
                _mm512_store_si512(out[1] + item,
                                   expand_pair(q + 16 * bits, pair, bits, minima, table, &s1));
            }
        }
    }
    return q;
}

/* acc[rows][32] += x w for a group. Tiles are expanded one product ahead, so that their stores are
 * done when the unit loads them. */
typedef void block_tile_fn(const uint8_t *group, int k, int rows, const char *x, ptrdiff_t ldx,
                           float *acc);

/* clang-format off */
#define BLOCK_TILE(name, bits, minima, wide, section, zero)                                        \
    static void block_##name(const uint8_t *q, int k, int rows, const char *x, ptrdiff_t ldx,      \
                             float *acc)                                                           \
    {                                                                                              \
        const __m512 table = nibble_table(zero);                                                   \
        claas_bf16 w[2][2][AMX_ITEMS] __attribute__((aligned(64)));                                \
                                                                                                   \
        amx_set_rows(rows);                                                                        \
        amx_take_sums(acc, TILE_WIDTH * 4, rows > AMX_ROWS, true);                                 \
        q = expand_tiles(q, bits, minima, wide, section, table, w[0]);                             \
        for (int at = 0; at < k; at += 32) {                                                       \
            claas_bf16 (*now)[AMX_ITEMS] = w[at / 32 & 1];                                         \
                                                                                                   \
            if (at + 32 < k)                                                                       \
                q = expand_tiles(q, bits, minima, wide, section, table, w[(at / 32 + 1) & 1]);     \
            amx_product(x, ldx, (const char *)now[0], (const char *)now[1], rows > AMX_ROWS, true); \
            x += 64;                                                                               \
        }                                                                                          \
        amx_give_sums(acc, TILE_WIDTH * 4, rows > AMX_ROWS, true);                                 \
    }

#define X(name, bits, minima, wide, section, zero)                                                 \
    BLOCK_TILE(name, bits, minima, wide, section, zero)
CLAAS_BLOCK_FORMS(X)
#undef X
/* clang-format on */

static block_tile_fn *const block_tiles[FORM_COUNT] = {
#define X(name, bits, minima, wide, section, zero) block_##name,
    CLAAS_BLOCK_FORMS(X)
#undef X
};

/* One row, for which filling whole tiles would cost more than the products: the matrix unit's
 * arithmetic, done with vectors. A product of 16 steps sums the first and the second elements of
 * the pairs on their own, each with one rounding per element, and adds the sum of both to the
 * element. x: the row as floats. */
typedef void block_row_fn(const uint8_t *group, int k, const float *x, float *acc);

#define BLOCK_AHEAD 1536 /* bytes to prefetch ahead */

struct row_sums {
    __m512 first[2], second[2];
};

INLINE void row_step(struct row_sums *s, const int half, __m512i pairs, const float *x)
{
    const __m512 first = low_floats(pairs), second = high_floats(pairs);

    s->first[half] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[0]), s->first[half]);
    s->second[half] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[1]), s->second[half]);
}

/* clang-format off */
#define BLOCK_ROW(name, bits, minima, wide, section, zero)                                         \
    static void row_##name(const uint8_t *q, int k, const float *x, float *acc)                    \
    {                                                                                              \
        const __m512 table = nibble_table(zero);                                                   \
        __m512 sum0 = _mm512_loadu_ps(acc), sum1 = _mm512_loadu_ps(acc + 16);                      \
                                                                                                   \
        for (int at = 0; at < k; at += 32) {                                                       \
            struct row_sums s = {{l_zero(), l_zero()}, {l_zero(), l_zero()}};                      \
                                                                                                   \
            for (int part = 0; part < 32; part += section) {                                       \
                struct section_scales s0, s1;                                                      \
                                                                                                   \
                take_scales(q, 0, minima, wide, &s0);                                              \
                take_scales(q, 1, minima, wide, &s1);                                              \
                q += scale_bytes(minima, wide);                                                    \
                for (int four = 0; four < section / 8; four++, q += 32 * bits) {                   \
                    _mm_prefetch((const char *)q + BLOCK_AHEAD, _MM_HINT_T0);                      \
                    _mm_prefetch((const char *)q + BLOCK_AHEAD + 64, _MM_HINT_T0);                 \
                    _Pragma("GCC unroll 4")                                                        \
                    for (int pair = 0; pair < 4; pair++, x += 2) {                                 \
                        row_step(&s, 0, expand_pair(q, pair, bits, minima, table, &s0), x);        \
                        row_step(&s, 1, expand_pair(q + 16 * bits, pair, bits, minima, table, &s1), x); \
                    }                                                                              \
                }                                                                                  \
            }                                                                                      \
            sum0 = _mm512_add_ps(sum0, _mm512_add_ps(s.first[0], s.second[0]));                    \
            sum1 = _mm512_add_ps(sum1, _mm512_add_ps(s.first[1], s.second[1]));                    \
        }                                                                                          \
        _mm512_storeu_ps(acc, sum0);                                                               \
        _mm512_storeu_ps(acc + 16, sum1);                                                          \
    }

#define X(name, bits, minima, wide, section, zero)                                                 \
    BLOCK_ROW(name, bits, minima, wide, section, zero)
CLAAS_BLOCK_FORMS(X)
#undef X
/* clang-format on */

static block_row_fn *const block_rows[FORM_COUNT] = {
#define X(name, bits, minima, wide, section, zero) row_##name,
    CLAAS_BLOCK_FORMS(X)
#undef X
};

#else

/* acc[row][32] += x w for a group */
typedef void block_tile_fn(const uint8_t *group, int k, const char *const x[BLOCK_ROWS],
                           float *acc);

/* clang-format off */
#define BLOCK_LOAD(i)                                                                              \
    __m512 a##i##_0 = _mm512_loadu_ps(acc + (i) * TILE_WIDTH);                                     \
    __m512 a##i##_1 = _mm512_loadu_ps(acc + (i) * TILE_WIDTH + 16);                                \
    const char *x##i = x[i];
#define BLOCK_STEP(i)                                                                              \
    {                                                                                              \
        const __m512i b = broadcast_pair(x##i);                                                    \
                                                                                                   \
        a##i##_0 = TILE_DOT(a##i##_0, w0, b);                                                      \
        a##i##_1 = TILE_DOT(a##i##_1, w1, b);                                                      \
        x##i += 4;                                                                                 \
    }
#define BLOCK_STORE(i)                                                                             \
    _mm512_storeu_ps(acc + (i) * TILE_WIDTH, a##i##_0);                                            \
    _mm512_storeu_ps(acc + (i) * TILE_WIDTH + 16, a##i##_1);

#define BLOCK_TILE(name, ROWS, bits, minima, wide, section, zero)                                  \
    static void block_##name##_##ROWS(const uint8_t *q, int k, const char *const x[BLOCK_ROWS],    \
                                      float *acc)                                                  \
    {                                                                                              \
        const __m512 table = nibble_table(zero);                                                   \
                                                                                                   \
        ROWS_##ROWS(BLOCK_LOAD)                                                                    \
        for (int at = 0; at < k; at += section) {                                                  \
            struct section_scales s0, s1;                                                          \
                                                                                                   \
            take_scales(q, 0, minima, wide, &s0);                                                  \
            take_scales(q, 1, minima, wide, &s1);                                                  \
            q += scale_bytes(minima, wide);                                                        \
            for (int four = 0; four < section / 8; four++, q += 32 * bits) {                       \
                _Pragma("GCC unroll 4")                                                            \
                for (int pair = 0; pair < 4; pair++) {                                             \
                    const __m512i w0 = expand_pair(q, pair, bits, minima, table, &s0);             \
                    const __m512i w1 = expand_pair(q + 16 * bits, pair, bits, minima, table, &s1); \
                                                                                                   \
                    ROWS_##ROWS(BLOCK_STEP)                                                        \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        ROWS_##ROWS(BLOCK_STORE)                                                                   \
    }

#define X(name, bits, minima, wide, section, zero)                                                 \
    BLOCK_TILE(name, 1, bits, minima, wide, section, zero)                                         \
    BLOCK_TILE(name, 2, bits, minima, wide, section, zero)                                         \
    BLOCK_TILE(name, 4, bits, minima, wide, section, zero)                                         \
    BLOCK_TILE(name, 8, bits, minima, wide, section, zero)
CLAAS_BLOCK_FORMS(X)
#undef X
/* clang-format on */

static block_tile_fn *const block_tiles[FORM_COUNT][4] = {
#define X(name, bits, minima, wide, section, zero)                                                 \
    {block_##name##_1, block_##name##_2, block_##name##_4, block_##name##_8},
    CLAAS_BLOCK_FORMS(X)
#undef X
};

#endif

struct blocks_job {
    const struct claas_gemm_args *a;
    claas_pool_t *pool;
    int groups; /* of one part */
#if !defined(CLAAS_OPS_AMX)
    block_tile_fn *tile;
    const char *x[BLOCK_ROWS];
#endif
};

static void start_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                       float *acc);
static void finish_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                        const float *acc);
static void multiply(int rows, int panels, struct operand x, const act *w, size_t stride, int steps,
                     float *acc, ptrdiff_t ldacc);

#if defined(CLAAS_OPS_AMX)

/* Room for a row as floats. */
#define ROW_BYTES(a) ((a)->m == 1 ? ((size_t)(a)->k * sizeof(float) + 63) / 64 * 64 : 0)

/* Prepares what a part needs besides X itself: the row as floats if there is only one. */
static void prepare_part(const struct blocks_job *job, char *scratch)
{
    const struct claas_gemm_args *a = job->a;

    for (int j = 0; a->m == 1 && j < a->k; j += 16)
        l_store((float *)scratch + j, a_load((const act *)a->x + j));
}

/* acc[m][32] += X W */
static void multiply_group(const struct blocks_job *job, const uint8_t *group, const char *scratch,
                           float *acc)
{
    const struct claas_gemm_args *a = job->a;

    if (a->m == 1)
        block_rows[a->blocks->form](group, a->k, (const float *)scratch, acc);
    else
        block_tiles[a->blocks->form](group, a->k, a->m, a->x,
                                     (ptrdiff_t)a->ldx * (ptrdiff_t)sizeof(act), acc);
}

static void choose_tile(struct blocks_job *job)
{
    (void)job;
}

#else

#define ROW_BYTES(a) 0

static void prepare_part(const struct blocks_job *job, char *scratch)
{
    (void)job, (void)scratch;
}

/* acc[m][32] += X W */
static void multiply_group(const struct blocks_job *job, const uint8_t *group, const char *scratch,
                           float *acc)
{
    (void)scratch;
    job->tile(group, job->a->k, job->x, acc);
}

/* Rows are padded to 1, 2, 4 or 8 by repeating the last one; the surplus sums are not used. */
static void choose_tile(struct blocks_job *job)
{
    const struct claas_gemm_args *a = job->a;
    const int size = a->m > 4 ? 3 : a->m > 2 ? 2 : a->m - 1;

    job->tile = block_tiles[a->blocks->form][size];
    for (int i = 0; i < BLOCK_ROWS; i++)
        job->x[i] = (const char *)((const act *)a->x + (size_t)smaller(i, a->m - 1) * a->ldx);
}

#endif

static void blocks_part(void *arg, int index)
{
    const struct blocks_job *job = arg;
    const struct claas_gemm_args *a = job->a;
    const int first = index * job->groups;
    const int end = smaller(first + job->groups, divide_up(a->n, CLAAS_BLOCK_GROUP));
    float *acc = claas_pool_scratch(job->pool);
    char *x_scratch = (char *)(acc + BLOCK_ROWS * TILE_WIDTH);
    char *s_scratch = x_scratch + ROW_BYTES(a);
    const size_t lora_size = panel_elements(a->r);
    const bool lora = a->lora_s && a->lora_b;
    struct operand s = {0};

    if (lora)
        s = operand_of(a->lora_s, a->lds, a->m, a->r, s_scratch);
    prepare_part(job, x_scratch);
    for (int g = first; g < end; g++) {
        const int panel = g * TILE_PANELS, column = panel * CLAAS_LANES;
        const int panels = smaller(TILE_PANELS, divide_up(a->n - column, CLAAS_LANES));

        start_sums(a, 0, a->m, column, panels * CLAAS_LANES, acc);
        multiply_group(job, a->blocks->data + (size_t)g * a->blocks->group_bytes, x_scratch, acc);
        if (lora)
            multiply(a->m, panels, s, (const act *)a->lora_b + (size_t)panel * lora_size, lora_size,
                     STEPS(a->r), acc, TILE_WIDTH);
        finish_sums(a, 0, a->m, column, panels * CLAAS_LANES, acc);
    }
}

static void gemm_blocks(claas_pool_t *pool, const struct claas_gemm_args *a)
{
    const int threads = claas_pool_threads(pool), groups = divide_up(a->n, CLAAS_BLOCK_GROUP);
    struct blocks_job job = {.a = a, .pool = pool};

    choose_tile(&job);
    job.groups = threads > 1 ? divide_up(groups, threads * 8) : groups;
    claas_pool_run(pool, divide_up(groups, job.groups), blocks_part, &job);
}

#endif
