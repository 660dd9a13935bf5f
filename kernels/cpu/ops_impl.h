/* What the files of the CPU operation table share and callers do not see: the tables of every
 * variant, where an element of a panel lies, and how rows are dealt to the pool. */
#ifndef CLAAS_CPU_OPS_IMPL_H
#define CLAAS_CPU_OPS_IMPL_H

#include "cpu/ops.h"

/* The fast variants are written once in templates and compiled per instruction set; each file
 * exports one table per precision. They exist on x86-64 only. */
extern const struct claas_ops claas_ops_bf16_ref, claas_ops_f32_ref;
#if defined(__x86_64__)
extern const struct claas_ops claas_ops_bf16_avx2, claas_ops_f32_avx2;
extern const struct claas_ops claas_ops_bf16_avx512, claas_ops_f32_avx512;
extern const struct claas_ops claas_ops_bf16_avx512bf16, claas_ops_bf16_amx;
#endif

static inline int divide_up(int a, int b)
{
    return (a + b - 1) / b;
}
static inline int smaller(int a, int b)
{
    return a < b ? a : b;
}
static inline int larger(int a, int b)
{
    return a > b ? a : b;
}

/* Elements of one panel of K columns (K rounded up to pairs in BF16). */
static inline size_t panel_elements_bf16(int k)
{
    return (size_t)divide_up(k, 2) * 2 * CLAAS_LANES;
}
static inline size_t panel_elements_f32(int k)
{
    return (size_t)k * CLAAS_LANES;
}
/* Where (lane, k) lies within a panel, in elements. */
static inline size_t panel_at_bf16(int lane, int k)
{
    return (size_t)(k / 2) * 2 * CLAAS_LANES + (size_t)lane * 2 + (size_t)(k & 1);
}
static inline size_t panel_at_f32(int lane, int k)
{
    return (size_t)k * CLAAS_LANES + (size_t)lane;
}
/* First position of row i's block that this call leaves unwritten, if the row begins its block;
 * else CLAAS_KV_BLOCK. */
static inline int kv_unwritten_from(const int32_t *pos, const int32_t *blocks, int m, int i)
{
    int end = i + 1;

    if (pos[i] % CLAAS_KV_BLOCK != 0)
        return CLAAS_KV_BLOCK;
    while (end < m && blocks[end] == blocks[i] && pos[end] == pos[i] + end - i)
        end++;
    return end - i;
}

/* Where position p and dimension d of the head lie within the K and within the V half of a
 * key/value block, in elements. */
static inline size_t key_at_bf16(int head_dim, int p, int d)
{
    return panel_at_bf16(p, d);
}
static inline size_t key_at_f32(int head_dim, int p, int d)
{
    return panel_at_f32(p, d);
}
static inline size_t value_at_bf16(int head_dim, int p, int d)
{
    return (size_t)head_dim * CLAAS_KV_BLOCK + (size_t)(d / 16) * 256 + panel_at_bf16(d % 16, p);
}
static inline size_t value_at_f32(int head_dim, int p, int d)
{
    return (size_t)head_dim * CLAAS_KV_BLOCK + (size_t)(d / 16) * 256 + panel_at_f32(d % 16, p);
}

/* Sums of a long vector are split into at most this many parts, by its length alone, so that their
 * order is the same for any number of threads. */
#define SUM_PARTS 256
static inline size_t sum_part_size(size_t count)
{
    const size_t size = (count + SUM_PARTS - 1) / SUM_PARTS;

    return size < 4096 ? 4096 : (size + 63) / 64 * 64;
}

#endif
