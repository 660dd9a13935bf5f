/* The layout of quantised weights that decoding reads: blocks.c packs it, blocks_fast.h multiplies.
 *
 * Decoding reads every weight once per token, so its speed is the number of bytes; a bfloat16 panel
 * has 2 to 3 times those of the file. Rows are regrouped so that 16 rows' weights of a pair
 * (k, k+1) become one vector of a bfloat16 panel with a handful of instructions and no shuffle
 * between lanes. Two panels at a time, because one chain of sums would wait for its own latency:
 *
 *   [group of 32 rows][section of 16 or 32 k]
 *       scales  d[32]: float16 as in the file; float32 where it is itself a product (K types)
 *       minima  m[32]: same type, where the type has them
 *       [section/8][half: 16 rows]: four pairs of k
 *           nibbles  [16 lanes j][4 pairs], one 64-byte load: low nibble = q of row j/2,
 *                    high nibble = q of row 8 + j/2, both of k + j%2
 *           bytes    [4 pairs][2][16 lanes j]: q of row j/2, then of row 8 + j/2, of k + j%2;
 *                    int8, or uint8 where there are minima
 *
 * so that memory is read strictly forward: prefetching by the processor loses two interleaved
 * streams.
 *
 * weight = bf16(d (q - zero) + m). d (q - zero) is exact in float32 for every type that has minima,
 * so the fused multiply-add rounds like the separate product and sum of claas_dequantize: the same
 * bits as the panels. */
#ifndef CLAAS_CPU_BLOCKS_H
#define CLAAS_CPU_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* X(name, bits, minima, wide (float32 scales), section, zero) */
#define CLAAS_BLOCK_FORMS(X)                                                                       \
    X(nibble_half, 4, 0, 0, 32, 8)        /* Q4_0 */                                               \
    X(nibble_half_min, 4, 1, 0, 32, 0)    /* Q4_1 */                                               \
    X(byte_half, 8, 0, 0, 32, 0)          /* Q8_0, Q5_0 */                                         \
    X(byte_half_min, 8, 1, 0, 32, 0)      /* Q5_1 */                                               \
    X(nibble_wide_min, 4, 1, 1, 32, 0)    /* Q4_K */                                               \
    X(byte_wide_min, 8, 1, 1, 32, 0)      /* Q5_K */                                               \
    X(byte_wide_16, 8, 0, 1, 16, 0)       /* Q6_K */                                               \
    X(nibble_wide_min_16, 4, 1, 1, 16, 0) /* Q2_K */                                               \
    X(nibble_wide_16, 4, 0, 1, 16, 4)     /* Q3_K */

enum block_form {
#define X(name, bits, minima, wide, section, zero) FORM_##name,
    CLAAS_BLOCK_FORMS(X)
#undef X
        FORM_COUNT
};

struct claas_blocks {
    int n, k;
    enum block_form form;
    size_t group_bytes; /* of 32 rows */
    size_t bytes;
    uint8_t *data;
};

#define CLAAS_BLOCK_GROUP 32 /* rows */

/* Bytes of the scales and minima of a section, and of a whole section. */
static inline int scale_bytes(int minima, int wide)
{
    return CLAAS_BLOCK_GROUP * (wide ? 4 : 2) * (1 + minima);
}
static inline int section_bytes(int bits, int minima, int wide, int section)
{
    return scale_bytes(minima, wide) + section * CLAAS_BLOCK_GROUP * bits / 8;
}

#endif
