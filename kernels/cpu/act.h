/* Activations of the fast tables: what an act is in the precision being compiled, its loads and
 * stores as lanes, and how rows of it become the broadcast operand of the tiles.
 *
 * Compiled with CLAAS_OPS_F32 or CLAAS_OPS_BF16. A "step" is 1 k in float32, 2 in bfloat16 (see
 * tile.h). */
#ifndef CLAAS_CPU_ACT_H
#define CLAAS_CPU_ACT_H

#if defined(CLAAS_OPS_F32)

typedef float act;
#define STEP_K             1
#define panel_elements     panel_elements_f32
#define panel_at           panel_at_f32
#define key_at             key_at_f32
#define value_at           value_at_f32
#define a_load(p)          l_load(p)
#define a_load_n(p, n)     l_load_n(p, n)
#define a_store(p, v)      l_store(p, v)
#define a_store_n(p, v, n) l_store_n(p, v, n)
#define a_from_float(x)    (x)
#define WIDTH_OF_STEP      4

#else

typedef claas_bf16 act;
#define STEP_K             2
#define panel_elements     panel_elements_bf16
#define panel_at           panel_at_bf16
#define key_at             key_at_bf16
#define value_at           value_at_bf16
#define a_load(p)          l_load_bf16(p)
#define a_load_n(p, n)     l_load_bf16_n(p, n)
#define a_store(p, v)      l_store_bf16(p, v)
#define a_store_n(p, v, n) l_store_bf16_n(p, v, n)
#define a_from_float(x)    claas_to_bf16(x)
#if defined(__AVX512BF16__)
#define WIDTH_OF_STEP 4
#else
#define OPERAND_WIDENED 1 /* pairs of floats: there is no bfloat16 multiply */
#define WIDTH_OF_STEP   8
#endif

#endif

#if !defined(OPERAND_WIDENED)
#define OPERAND_WIDENED 0
#endif
#define STEPS(k) divide_up(k, STEP_K)

/* Rows as the tiles read them; `ld` and `step` in bytes. */
struct operand {
    const char *x;
    ptrdiff_t ld, step;
};

/* Whether rows must be copied before tiles read them: to be widened; to be completed to whole
 * pairs, because what follows the row's end may be NaN and NaN times the panel's zero is not zero;
 * or because the rows lie so that all of a tile's fall into the same few sets of the first-level
 * cache (8 ways, 4096 bytes apart) and would evict each other. */
static bool operand_is_copied(int ldx, int k)
{
    return OPERAND_WIDENED || k % STEP_K || (size_t)ldx * sizeof(act) % 4096 == 0;
}

/* Bytes of a copied row: whole cache lines, an odd number of them. */
static size_t operand_bytes(int ldx, int k)
{
    const size_t lines = ((size_t)STEPS(k) * WIDTH_OF_STEP + 63) / 64;

    return operand_is_copied(ldx, k) ? (lines | 1) * 64 : 0;
}

/* The operand of `rows` rows of k elements: the rows themselves or a copy in `scratch`,
 * operand_bytes() per row. */
static struct operand operand_of(const act *x, int ldx, int rows, int k, char *scratch)
{
    const size_t bytes = operand_bytes(ldx, k);

    if (!bytes)
        return (struct operand){(const char *)x, (ptrdiff_t)ldx * (ptrdiff_t)sizeof(act),
                                WIDTH_OF_STEP};
    for (int i = 0; i < rows; i++) {
        const act *from = x + (size_t)i * ldx;
#if OPERAND_WIDENED
        float *to = (float *)(scratch + (size_t)i * bytes);
        int j = 0;

        for (; j + 16 <= k; j += 16)
            l_store(to + j, a_load(from + j));
        for (; j < k; j++)
            to[j] = claas_from_bf16(from[j]);
#else
        act *to = (act *)(scratch + (size_t)i * bytes);

        memcpy(to, from, (size_t)k * sizeof(act));
#endif
        if (k % STEP_K)
            to[k] = 0;
    }
    return (struct operand){scratch, (ptrdiff_t)bytes, WIDTH_OF_STEP};
}

/* 16 elements, or the first n of them. */
INLINE lanes a_read(const act *p, int n)
{
    return n >= 16 ? a_load(p) : a_load_n(p, n);
}
INLINE void a_write(act *p, lanes v, int n)
{
    if (n >= 16)
        a_store(p, v);
    else
        a_store_n(p, v, n);
}
INLINE lanes l_read(const float *p, int n)
{
    return n >= 16 ? l_load(p) : l_load_n(p, n);
}
INLINE void l_write(float *p, lanes v, int n)
{
    if (n >= 16)
        l_store(p, v);
    else
        l_store_n(p, v, n);
}

#endif
