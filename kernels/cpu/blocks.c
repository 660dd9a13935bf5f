/* Repacks a quantised tensor into the layout of blocks.h, once, when a model is loaded. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "cpu/blocks.h"
#include "cpu/ops_impl.h"

#define BLOCK_MAX 256 /* elements of the largest file block */

/* One block of the file taken apart: q as it will be stored; scale and minimum as the file's
 * float16, or in float32 per section. */
struct parts {
    uint8_t q[BLOCK_MAX];
    uint16_t half_d, half_m;
    float d[BLOCK_MAX / 16], m[BLOCK_MAX / 16];
};

static uint16_t read_half(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

/* Exact; float16 has no value that float32 lacks. */
static float half_to_float(uint16_t half)
{
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    union {
        uint32_t u;
        float f;
    } v;

    if (exponent == 0) { /* mantissa 2^-24 */
        v.f = (float)mantissa * 0x1p-24f;
        v.u |= (uint32_t)(half & 0x8000) << 16;
        return v.f;
    }
    v.u = (uint32_t)(half & 0x8000) << 16 | (uint32_t)mantissa << 13 |
          (uint32_t)(exponent == 31 ? 255 : exponent + 112) << 23;
    return v.f;
}

static void split_nibbles(const uint8_t *qs, uint8_t *q)
{
    for (int j = 0; j < 16; j++) {
        q[j] = qs[j] & 15;
        q[j + 16] = qs[j] >> 4;
    }
}

static void take_q4_0(const uint8_t *b, struct parts *p)
{
    p->half_d = read_half(b);
    split_nibbles(b + 2, p->q);
}

static void take_q4_1(const uint8_t *b, struct parts *p)
{
    p->half_d = read_half(b);
    p->half_m = read_half(b + 2);
    split_nibbles(b + 4, p->q);
}

/* Five bits become a byte: `high` has bit j of element j. */
static void add_fifth_bits(const uint8_t *high, uint8_t *q, int zero)
{
    for (int j = 0; j < 32; j++)
        q[j] = (uint8_t)((q[j] | (high[j / 8] >> (j % 8) & 1) << 4) - zero);
}

static void take_q5_0(const uint8_t *b, struct parts *p)
{
    p->half_d = read_half(b);
    split_nibbles(b + 6, p->q);
    add_fifth_bits(b + 2, p->q, 16);
}

static void take_q5_1(const uint8_t *b, struct parts *p)
{
    p->half_d = read_half(b);
    p->half_m = read_half(b + 2);
    split_nibbles(b + 8, p->q);
    add_fifth_bits(b + 4, p->q, 0);
}

static void take_q8_0(const uint8_t *b, struct parts *p)
{
    p->half_d = read_half(b);
    memcpy(p->q, b + 2, 32);
}

/* {scales[16], qs[64], d, dmin}: sections of 16; planes of two bits. */
static void take_q2_k(const uint8_t *b, struct parts *p)
{
    const float d = half_to_float(read_half(b + 80)), dmin = half_to_float(read_half(b + 82));

    for (int s = 0; s < 16; s++) {
        const uint8_t *qs = b + 16 + s / 8 * 32 + (s & 1) * 16;

        p->d[s] = d * (float)(b[s] & 15);
        p->m[s] = -(dmin * (float)(b[s] >> 4));
        for (int l = 0; l < 16; l++)
            p->q[s * 16 + l] = qs[l] >> (s % 8 / 2 * 2) & 3;
    }
}

/* {hmask[32], qs[64], scales[12], d}: as Q2_K, a third bit in hmask whose absence subtracts 4.
 * Stored with 4 added. */
static void take_q3_k(const uint8_t *b, struct parts *p)
{
    const uint8_t *packed = b + 96;
    const float d = half_to_float(read_half(b + 108));

    for (int s = 0; s < 16; s++) {
        const uint8_t *qs = b + 32 + s / 8 * 32 + (s & 1) * 16, *mask = b + (s & 1) * 16;
        const int low = s < 8 ? packed[s] & 15 : packed[s - 8] >> 4;
        const int high = packed[8 + s % 4] >> (2 * (s / 4)) & 3;

        p->d[s] = d * (float)((low | high << 4) - 32);
        for (int l = 0; l < 16; l++)
            p->q[s * 16 + l] =
                (uint8_t)((qs[l] >> (s % 8 / 2 * 2) & 3) + (mask[l] >> (s / 2) & 1 ? 4 : 0));
    }
}

/* The 6-bit scales and minima of Q4_K and Q5_K: {d, dmin, scales[12]}. */
static void take_k_scales(const uint8_t *b, struct parts *p)
{
    const float d = half_to_float(read_half(b)), dmin = half_to_float(read_half(b + 2));
    const uint8_t *packed = b + 4;

    for (int j = 0; j < 8; j++) {
        const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        const int minimum = j < 4 ? packed[j + 4] & 63 : packed[j + 4] >> 4 | (packed[j] >> 6) << 4;

        p->d[j] = d * (float)scale;
        p->m[j] = -(dmin * (float)minimum);
    }
}

static void take_q4_k(const uint8_t *b, struct parts *p)
{
    take_k_scales(b, p);
    for (int j = 0; j < 8; j++)
        for (int l = 0; l < 32; l++)
            p->q[j * 32 + l] = b[16 + j / 2 * 32 + l] >> (j & 1 ? 4 : 0) & 15;
}

static void take_q5_k(const uint8_t *b, struct parts *p)
{
    take_k_scales(b, p);
    for (int j = 0; j < 8; j++)
        for (int l = 0; l < 32; l++)
            p->q[j * 32 + l] = (uint8_t)((b[48 + j / 2 * 32 + l] >> (j & 1 ? 4 : 0) & 15) |
                                         (b[16 + l] >> j & 1) << 4);
}

/* {ql[128], qh[64], scales[16], d} */
static void take_q6_k(const uint8_t *b, struct parts *p)
{
    const float d = half_to_float(read_half(b + 208));

    for (int s = 0; s < 16; s++)
        p->d[s] = d * (float)(int8_t)b[192 + s];
    for (int i = 0; i < 256; i++) {
        const int half = i / 128, run = i % 128 / 32, l = i % 32;
        const uint8_t low = b[half * 64 + (run & 1) * 32 + l], high = b[128 + half * 32 + l];

        p->q[i] = (uint8_t)(((run < 2 ? low & 15 : low >> 4) | (high >> (2 * run) & 3) << 4) - 32);
    }
}

typedef void take_fn(const uint8_t *block, struct parts *parts);

struct type_row {
    take_fn *take;
    enum block_form form;
    int elements, bytes;
};

static const struct type_row type_rows[] = {
    [CLAAS_TYPE_Q4_0] = {take_q4_0, FORM_nibble_half, 32, 18},
    [CLAAS_TYPE_Q4_1] = {take_q4_1, FORM_nibble_half_min, 32, 20},
    [CLAAS_TYPE_Q5_0] = {take_q5_0, FORM_byte_half, 32, 22},
    [CLAAS_TYPE_Q5_1] = {take_q5_1, FORM_byte_half_min, 32, 24},
    [CLAAS_TYPE_Q8_0] = {take_q8_0, FORM_byte_half, 32, 34},
    [CLAAS_TYPE_Q2_K] = {take_q2_k, FORM_nibble_wide_min_16, 256, 84},
    [CLAAS_TYPE_Q3_K] = {take_q3_k, FORM_nibble_wide_16, 256, 110},
    [CLAAS_TYPE_Q4_K] = {take_q4_k, FORM_nibble_wide_min, 256, 144},
    [CLAAS_TYPE_Q5_K] = {take_q5_k, FORM_byte_wide_min, 256, 176},
    [CLAAS_TYPE_Q6_K] = {take_q6_k, FORM_byte_wide_16, 256, 210},
};

struct form_row {
    int bits, minima, wide, section, zero;
};

static const struct form_row form_rows[FORM_COUNT] = {
#define X(name, bits, minima, wide, section, zero) {bits, minima, wide, section, zero},
    CLAAS_BLOCK_FORMS(X)
#undef X
};

static size_t form_section_bytes(const struct form_row *form)
{
    return (size_t)section_bytes(form->bits, form->minima, form->wide, form->section);
}

/* Puts one block of a row into its sections; `row` is the row within the group of 32. */
static void place_block(const struct form_row *form, const struct parts *p, int elements, int row,
                        uint8_t *sections)
{
    const int width = form->wide ? 4 : 2, lane = row % 16, four_pairs = 16 * form->bits;

    for (int s = 0; s * form->section < elements; s++) {
        uint8_t *at = sections + (size_t)s * form_section_bytes(form);
        const void *d = form->wide ? (const void *)&p->d[s] : (const void *)&p->half_d;
        const void *m = form->wide ? (const void *)&p->m[s] : (const void *)&p->half_m;

        memcpy(at + row * width, d, (size_t)width);
        if (form->minima)
            memcpy(at + (CLAAS_BLOCK_GROUP + row) * width, m, (size_t)width);
        at += scale_bytes(form->minima, form->wide);
        for (int i = 0; i < form->section; i++) {
            const uint8_t q = p->q[s * form->section + i];
            uint8_t *four = at + (i / 8 * 2 + row / 16) * four_pairs;
            const int column = lane % 8 * 2 + (i & 1), pair = i / 2 % 4;

            if (form->bits == 4)
                four[column * 4 + pair] |= (uint8_t)(lane < 8 ? q : q << 4);
            else
                four[pair * 32 + lane / 8 * 16 + column] = q;
        }
    }
}

/* Where row r (in Hugging Face's order) lies in the file: see claas_tensor.permuted_head_rows. */
static size_t file_row(const struct claas_tensor *tensor, int row)
{
    const int head_rows = tensor->permuted_head_rows;
    const int r = head_rows > 0 ? row % head_rows : 0;

    if (head_rows <= 0)
        return (size_t)row;
    return (size_t)(row - r + (r < head_rows / 2 ? 2 * r : 2 * (r - head_rows / 2) + 1));
}

static void pack_row(struct claas_blocks *blocks, const struct claas_tensor *tensor, int row,
                     int to)
{
    const struct type_row *type = &type_rows[tensor->type];
    const struct form_row *form = &form_rows[blocks->form];
    const size_t count = (size_t)(tensor->columns / type->elements);
    const uint8_t *from = tensor->data + file_row(tensor, row) * count * (size_t)type->bytes;
    uint8_t *group = blocks->data + (size_t)(to / CLAAS_BLOCK_GROUP) * blocks->group_bytes;
    struct parts parts = {0};

    for (size_t i = 0; i < count; i++) {
        type->take(from + i * (size_t)type->bytes, &parts);
        place_block(form, &parts, type->elements, to % CLAAS_BLOCK_GROUP, group);
        group += (size_t)(type->elements / form->section) * form_section_bytes(form);
    }
}

/* Whether the type has a fast path, all tensors are alike, and the table in use multiplies
 * blocks. */
static bool is_packable(const struct claas_tensor *const *tensors, int count)
{
    const struct claas_tensor *first = count > 0 ? tensors[0] : NULL;

#if defined(__x86_64__)
    const struct claas_ops *ops = claas_ops_pick(CLAAS_PRECISION_BF16);

    if (ops != &claas_ops_bf16_avx512bf16 && ops != &claas_ops_bf16_amx)
        return false;
#else
    return false;
#endif
    if (!first || (unsigned)first->type >= CLAAS_COUNT(type_rows) || !type_rows[first->type].take)
        return false;
    for (int i = 0; i < count; i++) {
        const struct type_row *type = &type_rows[first->type];
        const size_t row_bytes =
            (size_t)(tensors[i]->columns / type->elements) * (size_t)type->bytes;

        if (tensors[i]->type != first->type || tensors[i]->columns != first->columns ||
            tensors[i]->columns < 1 || tensors[i]->columns % type->elements || !tensors[i]->data ||
            tensors[i]->rows < 1 || tensors[i]->bytes < row_bytes * (size_t)tensors[i]->rows ||
            (tensors[i]->permuted_head_rows > 0 &&
             tensors[i]->rows % tensors[i]->permuted_head_rows))
            return false;
    }
    return true;
}

int claas_blocks_new_fused(const struct claas_tensor *const *tensors, int count,
                           struct claas_blocks **ret)
{
    CLAAS_AUTO(claas_blocks_free) struct claas_blocks *blocks = NULL;
    const struct form_row *form = NULL;
    int row = 0;

    *ret = NULL;
    if (!is_packable(tensors, count))
        return 0;
    blocks = CLAAS_NEW(struct claas_blocks);
    if (!blocks)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < count; i++)
        blocks->n += tensors[i]->rows;
    blocks->k = tensors[0]->columns;
    blocks->form = type_rows[tensors[0]->type].form;
    form = &form_rows[blocks->form];
    blocks->group_bytes = (size_t)(blocks->k / form->section) * form_section_bytes(form);
    blocks->bytes = (size_t)divide_up(blocks->n, CLAAS_BLOCK_GROUP) * blocks->group_bytes;
    blocks->data = claas_alloc_aligned(blocks->bytes);
    if (!blocks->data)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory for %zu bytes of weights", blocks->bytes);
    for (int i = 0; i < count; i++)
        for (int r = 0; r < tensors[i]->rows; r++)
            pack_row(blocks, tensors[i], r, row++);
    *ret = CLAAS_TAKE(blocks);
    return 0;
}

int claas_blocks_new(const struct claas_tensor *tensor, struct claas_blocks **ret)
{
    return claas_blocks_new_fused(&tensor, 1, ret);
}

void claas_blocks_free(struct claas_blocks **blocks)
{
    if (!*blocks)
        return;
    free((*blocks)->data);
    free(*blocks);
    *blocks = NULL;
}

size_t claas_blocks_bytes(const struct claas_blocks *blocks)
{
    return blocks ? blocks->bytes : 0;
}
