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
#define BLOCK_ROWS        8 /* the most rows for which this beats the panels */

/* Scales and minima of a section, each lane's row as in the pairs: rows 0 … 7 twice each, rows 8 …
 * 15 twice each. */
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

struct blocks_job {
    const struct claas_gemm_args *a;
    claas_pool_t *pool;
    block_tile_fn *tile;
    int groups; /* of one part */
    const char *x[BLOCK_ROWS];
};

static void start_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                       float *acc);
static void finish_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                        const float *acc);
static void multiply(int rows, int panels, struct operand x, const act *w, size_t stride, int steps,
                     float *acc, ptrdiff_t ldacc);

static void blocks_part(void *arg, int index)
{
    const struct blocks_job *job = arg;
    const struct claas_gemm_args *a = job->a;
    const int first = index * job->groups;
    const int end = smaller(first + job->groups, divide_up(a->n, CLAAS_BLOCK_GROUP));
    float *acc = claas_pool_scratch(job->pool);
    char *s_scratch = (char *)(acc + BLOCK_ROWS * TILE_WIDTH);
    const size_t lora_size = panel_elements(a->r);
    const bool lora = a->lora_s && a->lora_b;
    struct operand s = {0};

    if (lora)
        s = operand_of(a->lora_s, a->lds, a->m, a->r, s_scratch);
    for (int g = first; g < end; g++) {
        const int panel = g * TILE_PANELS, column = panel * CLAAS_LANES;
        const int panels = smaller(TILE_PANELS, divide_up(a->n - column, CLAAS_LANES));

        start_sums(a, 0, a->m, column, panels * CLAAS_LANES, acc);
        job->tile(a->blocks->data + (size_t)g * a->blocks->group_bytes, a->k, job->x, acc);
        if (lora)
            multiply(a->m, panels, s, (const act *)a->lora_b + (size_t)panel * lora_size, lora_size,
                     STEPS(a->r), acc, TILE_WIDTH);
        finish_sums(a, 0, a->m, column, panels * CLAAS_LANES, acc);
    }
}

/* Rows are padded to 1, 2, 4 or 8 by repeating the last one; the surplus sums are not used. */
static void gemm_blocks(claas_pool_t *pool, const struct claas_gemm_args *a)
{
    const int size = a->m > 4 ? 3 : a->m > 2 ? 2 : a->m - 1, threads = claas_pool_threads(pool);
    const int groups = divide_up(a->n, CLAAS_BLOCK_GROUP);
    struct blocks_job job = {.a = a, .pool = pool, .tile = block_tiles[a->blocks->form][size]};

    for (int i = 0; i < BLOCK_ROWS; i++)
        job.x[i] = (const char *)((const act *)a->x + (size_t)smaller(i, a->m - 1) * a->ldx);
    job.groups = threads > 1 ? divide_up(groups, threads * 8) : groups;
    claas_pool_run(pool, divide_up(groups, job.groups), blocks_part, &job);
}

#endif
