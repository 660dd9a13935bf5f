/* Decoding of ggml's block formats to float32.
 *
 * Each format stores a block of 32 or 256 consecutive elements of a row as small integers q with a
 * shared scale (and offset). The formulas, the grouping of the products and their rounding are
 * those of ggml's dequantize_row_*: products and sums are rounded separately (the build uses
 * -ffp-contract=off), so every reader of a file works with the same float32 values. Scales are
 * float16. Loads go through memcpy: blocks are of odd sizes and a mapping gives no alignment. */
#include "claas/model.h"
#include <string.h>
#include "model_internal.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats are little-endian");

struct type_row {
    const char *name;
    int elements, bytes;
};

static const struct type_row type_rows[] = {
    [CLAAS_TYPE_F32] = {"F32", 1, 4},       [CLAAS_TYPE_F16] = {"F16", 1, 2},
    [CLAAS_TYPE_Q4_0] = {"Q4_0", 32, 18},   [CLAAS_TYPE_Q4_1] = {"Q4_1", 32, 20},
    [CLAAS_TYPE_Q5_0] = {"Q5_0", 32, 22},   [CLAAS_TYPE_Q5_1] = {"Q5_1", 32, 24},
    [CLAAS_TYPE_Q8_0] = {"Q8_0", 32, 34},   [CLAAS_TYPE_Q2_K] = {"Q2_K", 256, 84},
    [CLAAS_TYPE_Q3_K] = {"Q3_K", 256, 110}, [CLAAS_TYPE_Q4_K] = {"Q4_K", 256, 144},
    [CLAAS_TYPE_Q5_K] = {"Q5_K", 256, 176}, [CLAAS_TYPE_Q6_K] = {"Q6_K", 256, 210},
    [CLAAS_TYPE_BF16] = {"BF16", 1, 2},
};

static const struct type_row *find_row(enum claas_tensor_type type)
{
    size_t index = (size_t)type;

    if (index >= sizeof(type_rows) / sizeof(type_rows[0]) || !type_rows[index].name)
        return NULL;
    return &type_rows[index];
}

int claas_type_block_elements(enum claas_tensor_type type)
{
    const struct type_row *row = find_row(type);

    return row ? row->elements : 0;
}

int claas_type_block_bytes(enum claas_tensor_type type)
{
    const struct type_row *row = find_row(type);

    return row ? row->bytes : 0;
}

const char *claas_type_name(enum claas_tensor_type type)
{
    const struct type_row *row = find_row(type);

    return row ? row->name : "unknown";
}

static float float_of_bits(uint32_t bits)
{
    float value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

/* Exact, by integers alone: a multiplication by 2^112 would be wrong where denormals are flushed.
 */
float claas_half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;

    if (exponent == 0x1f)
        return float_of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0)
        return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    if (mantissa == 0)
        return float_of_bits(sign);
    /* Subnormal: mantissa * 2^-24, normalised. */
    int shift = __builtin_clz(mantissa) - 21;
    return float_of_bits(sign | (uint32_t)(113 - shift) << 23 |
                         ((mantissa << shift) & 0x3ffu) << 13);
}

static float load_half(const uint8_t *bytes)
{
    uint16_t half;

    memcpy(&half, bytes, sizeof(half));
    return claas_half_to_float(half);
}

static uint32_t load_u32(const uint8_t *bytes)
{
    uint32_t value;

    memcpy(&value, bytes, sizeof(value));
    return value;
}

/* {f16 d; u8 qs[16]}: element j is the low nibble of byte j, element j + 16 the high one. */
static void decode_q4_0(const uint8_t *block, float *out)
{
    float d = load_half(block);
    const uint8_t *qs = block + 2;

    for (int j = 0; j < 16; j++) {
        out[j] = (float)((qs[j] & 15) - 8) * d;
        out[j + 16] = (float)((qs[j] >> 4) - 8) * d;
    }
}

/* {f16 d; f16 m; u8 qs[16]} */
static void decode_q4_1(const uint8_t *block, float *out)
{
    float d = load_half(block), m = load_half(block + 2);
    const uint8_t *qs = block + 4;

    for (int j = 0; j < 16; j++) {
        out[j] = (float)(qs[j] & 15) * d + m;
        out[j + 16] = (float)(qs[j] >> 4) * d + m;
    }
}

/* {f16 d; u32 qh; u8 qs[16]}: bit j of qh is the fifth bit of element j. */
static void decode_q5_0(const uint8_t *block, float *out)
{
    float d = load_half(block);
    uint32_t qh = load_u32(block + 2);
    const uint8_t *qs = block + 6;

    for (int j = 0; j < 16; j++) {
        int low = (qs[j] & 15) | (int)((qh >> j & 1) << 4);
        int high = (qs[j] >> 4) | (int)((qh >> (j + 16) & 1) << 4);

        out[j] = (float)(low - 16) * d;
        out[j + 16] = (float)(high - 16) * d;
    }
}

/* {f16 d; f16 m; u32 qh; u8 qs[16]} */
static void decode_q5_1(const uint8_t *block, float *out)
{
    float d = load_half(block), m = load_half(block + 2);
    uint32_t qh = load_u32(block + 4);
    const uint8_t *qs = block + 8;

    for (int j = 0; j < 16; j++) {
        int low = (qs[j] & 15) | (int)((qh >> j & 1) << 4);
        int high = (qs[j] >> 4) | (int)((qh >> (j + 16) & 1) << 4);

        out[j] = (float)low * d + m;
        out[j + 16] = (float)high * d + m;
    }
}

/* {f16 d; i8 qs[32]} */
static void decode_q8_0(const uint8_t *block, float *out)
{
    float d = load_half(block);

    for (int j = 0; j < 32; j++)
        out[j] = (float)(int8_t)block[2 + j] * d;
}

/* {u8 scales[16]; u8 qs[64]; f16 d; f16 dmin}: 16 groups of 16; a scale byte is 4 bits of scale, 4
 * of minimum. The four 2-bit planes of 32 bytes are 4 * 32 consecutive elements. */
static void decode_q2_k(const uint8_t *block, float *out)
{
    const uint8_t *scales = block, *qs = block + 16;
    float d = load_half(block + 80), dmin = load_half(block + 82);

    for (int group = 0; group < 16; group++) {
        const uint8_t *q = qs + (group / 8) * 32 + (group & 1) * 16;
        int shift = (group % 8) / 2 * 2;
        float scale = d * (float)(scales[group] & 15);
        float minimum = dmin * (float)(scales[group] >> 4);

        for (int l = 0; l < 16; l++)
            out[group * 16 + l] = scale * (float)(q[l] >> shift & 3) - minimum;
    }
}

/* {u8 hmask[32]; u8 qs[64]; u8 scales[12]; f16 d}: as Q2_K without minima, and with a third bit in
 * hmask (bit n of byte l for the n-th run of 32) whose absence subtracts 4. Scales are 6 bits,
 * minus 32: the low nibbles in bytes 0..7 (low halves are groups 0..7, high halves 8..15), the high
 * pairs in bytes 8..11. */
static void decode_q3_k(const uint8_t *block, float *out)
{
    const uint8_t *hmask = block, *qs = block + 32, *packed = block + 96;
    float d = load_half(block + 108);

    for (int group = 0; group < 16; group++) {
        const uint8_t *q = qs + (group / 8) * 32 + (group & 1) * 16;
        const uint8_t *h = hmask + (group & 1) * 16;
        int shift = (group % 8) / 2 * 2;
        int low = group < 8 ? packed[group] & 15 : packed[group - 8] >> 4;
        int high = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        float scale = d * (float)((low | high << 4) - 32);

        for (int l = 0; l < 16; l++) {
            int value = (q[l] >> shift & 3) - (h[l] >> (group / 2) & 1 ? 0 : 4);

            out[group * 16 + l] = scale * (float)value;
        }
    }
}

/* The 6-bit scale and minimum of sub-block j of Q4_K and Q5_K, from their 12 packed bytes. */
static void unpack_scale(const uint8_t *packed, int j, int *scale, int *minimum)
{
    if (j < 4) {
        *scale = packed[j] & 63;
        *minimum = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        *minimum = (packed[j + 4] >> 4) | (packed[j] >> 6) << 4;
    }
}

/* {f16 d; f16 dmin; u8 scales[12]; u8 qs[128]}: 8 sub-blocks of 32; low nibbles of a run of 32
 * bytes are sub-block 2k, high nibbles 2k + 1. */
static void decode_q4_k(const uint8_t *block, float *out)
{
    float d = load_half(block), dmin = load_half(block + 2);

    for (int j = 0; j < 8; j++) {
        const uint8_t *q = block + 16 + j / 2 * 32;
        int sc, mn;

        unpack_scale(block + 4, j, &sc, &mn);
        float scale = d * (float)sc, minimum = dmin * (float)mn;
        for (int l = 0; l < 32; l++)
            out[j * 32 + l] = scale * (float)(j & 1 ? q[l] >> 4 : q[l] & 15) - minimum;
    }
}

/* {f16 d; f16 dmin; u8 scales[12]; u8 qh[32]; u8 qs[128]}: bit j of qh[l] adds 16 in sub-block j.
 */
static void decode_q5_k(const uint8_t *block, float *out)
{
    float d = load_half(block), dmin = load_half(block + 2);
    const uint8_t *qh = block + 16;

    for (int j = 0; j < 8; j++) {
        const uint8_t *q = block + 48 + j / 2 * 32;
        int sc, mn;

        unpack_scale(block + 4, j, &sc, &mn);
        float scale = d * (float)sc, minimum = dmin * (float)mn;
        for (int l = 0; l < 32; l++) {
            int low = j & 1 ? q[l] >> 4 : q[l] & 15;

            out[j * 32 + l] = scale * (float)(low + (qh[l] >> j & 1 ? 16 : 0)) - minimum;
        }
    }
}

/* {u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d}: per half of 128, four runs of 32: run 0 and 1 are
 * the low nibbles of ql[0..31] and ql[32..63], runs 2 and 3 their high nibbles; bits 2*run of qh
 * are the upper pair; minus 32. */
static void decode_q6_k(const uint8_t *block, float *out)
{
    float d = load_half(block + 208);

    for (int half = 0; half < 2; half++) {
        const uint8_t *ql = block + half * 64, *qh = block + 128 + half * 32;
        const uint8_t *scales = block + 192 + half * 8;

        for (int run = 0; run < 4; run++)
            for (int l = 0; l < 32; l++) {
                uint8_t byte = ql[l + (run & 1) * 32];
                int low = run < 2 ? byte & 15 : byte >> 4;
                int value = (low | (qh[l] >> (2 * run) & 3) << 4) - 32;
                float scale = d * (float)(int8_t)scales[run * 2 + l / 16];

                out[half * 128 + run * 32 + l] = scale * (float)value;
            }
    }
}

typedef void decode_block_fn(const uint8_t *block, float *out);

static decode_block_fn *const decoders[] = {
    [CLAAS_TYPE_Q4_0] = decode_q4_0, [CLAAS_TYPE_Q4_1] = decode_q4_1,
    [CLAAS_TYPE_Q5_0] = decode_q5_0, [CLAAS_TYPE_Q5_1] = decode_q5_1,
    [CLAAS_TYPE_Q8_0] = decode_q8_0, [CLAAS_TYPE_Q2_K] = decode_q2_k,
    [CLAAS_TYPE_Q3_K] = decode_q3_k, [CLAAS_TYPE_Q4_K] = decode_q4_k,
    [CLAAS_TYPE_Q5_K] = decode_q5_k, [CLAAS_TYPE_Q6_K] = decode_q6_k,
};

void claas_dequantize(enum claas_tensor_type type, const void *blocks, size_t count, float *out)
{
    const struct type_row *row = find_row(type);
    const uint8_t *bytes = blocks;

    if (!row || count == 0)
        return;
    if (type == CLAAS_TYPE_F32) {
        memcpy(out, bytes, count * sizeof(float));
    } else if (type == CLAAS_TYPE_F16) {
        for (size_t i = 0; i < count; i++)
            out[i] = load_half(bytes + 2 * i);
    } else if (type == CLAAS_TYPE_BF16) {
        for (size_t i = 0; i < count; i++)
            out[i] = float_of_bits((uint32_t)(bytes[2 * i] | bytes[2 * i + 1] << 8) << 16);
    } else {
        for (size_t i = 0; i < count / (size_t)row->elements; i++)
            decoders[type](bytes + i * (size_t)row->bytes, out + i * (size_t)row->elements);
    }
}
