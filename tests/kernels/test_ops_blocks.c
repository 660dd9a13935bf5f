/* Decoding from the file's blocks gives the bits of the bfloat16 panels: for every quantised type,
 * any number of rows up to 9, rows that are no multiple of 16, interleaved attention rows, fused
 * tensors, with and without LoRA. */
#include "check.h"
#include "claas/err.h"
#include "claas/mem.h"

static const enum claas_tensor_type types[] = {
    CLAAS_TYPE_Q4_0, CLAAS_TYPE_Q4_1, CLAAS_TYPE_Q5_0, CLAAS_TYPE_Q5_1, CLAAS_TYPE_Q8_0,
    CLAAS_TYPE_Q2_K, CLAAS_TYPE_Q3_K, CLAAS_TYPE_Q4_K, CLAAS_TYPE_Q5_K, CLAAS_TYPE_Q6_K,
};

/* A float16 of random sign and mantissa; subnormal now and then. */
static void put_half(uint8_t *at)
{
    const uint32_t bits = check_bits();
    const uint32_t exponent = bits % 7 == 0 ? 0 : 1 + bits / 7 % 16;
    const uint32_t half = (bits >> 8 & 1) << 15 | exponent << 10 | (bits >> 9 & 1023);

    at[0] = (uint8_t)half, at[1] = (uint8_t)(half >> 8);
}

/* Where a block's float16 fields lie; -1: none. */
static void scale_offsets(enum claas_tensor_type type, int offsets[2])
{
    offsets[0] = 0, offsets[1] = -1;
    switch (type) {
    case CLAAS_TYPE_Q4_1:
    case CLAAS_TYPE_Q5_1:
    case CLAAS_TYPE_Q4_K:
    case CLAAS_TYPE_Q5_K:
        offsets[1] = 2;
        break;
    case CLAAS_TYPE_Q2_K:
        offsets[0] = 80, offsets[1] = 82;
        break;
    case CLAAS_TYPE_Q3_K:
        offsets[0] = 108;
        break;
    case CLAAS_TYPE_Q6_K:
        offsets[0] = 208;
        break;
    default:
        break;
    }
}

static struct claas_tensor tensor_new(enum claas_tensor_type type, int rows, int columns,
                                      int head_rows)
{
    const size_t block = (size_t)claas_type_block_bytes(type);
    struct claas_tensor t = {
        .type = type, .rows = rows, .columns = columns, .permuted_head_rows = head_rows};
    uint8_t *data = NULL;
    int offsets[2];

    t.bytes = (size_t)rows * (size_t)(columns / claas_type_block_elements(type)) * block;
    data = malloc(t.bytes);
    assert_non_null(data);
    for (size_t i = 0; i < t.bytes; i++)
        data[i] = (uint8_t)check_bits();
    scale_offsets(type, offsets);
    for (size_t at = 0; at < t.bytes; at += block)
        for (int i = 0; i < 2; i++)
            if (offsets[i] >= 0)
                put_half(data + at + offsets[i]);
    t.data = data;
    return t;
}

/* Panels of tensors one after the other, by way of claas_tensor_row. */
static struct buffer panels_of_tensors(const struct claas_ops *ops, const struct claas_tensor *t,
                                       int count, int *n)
{
    const int k = t[0].columns;
    float *w = NULL;
    struct buffer panels;

    *n = 0;
    for (int i = 0; i < count; i++)
        *n += t[i].rows;
    w = malloc((size_t)*n * k * sizeof(float));
    assert_non_null(w);
    for (int i = 0, row = 0; i < count; i++)
        for (int r = 0; r < t[i].rows; r++, row++)
            claas_tensor_row(&t[i], r, w + (size_t)row * k);
    panels = panels_of(ops, w, *n, k);
    free(w);
    return panels;
}

static void check_blocks(const struct claas_ops *ops, claas_pool_t *pool,
                         const struct claas_tensor *t, int count)
{
    enum { R = 5 };
    const struct claas_tensor *pointers[3] = {&t[0], &t[1], &t[2]};
    CLAAS_AUTO(claas_blocks_free) struct claas_blocks *blocks = NULL;
    const int k = t[0].columns;
    int n = 0;
    struct buffer panels = panels_of_tensors(ops, t, count, &n);
    float *b = weights_new(ops, n, R);
    struct buffer pb = panels_of(ops, b, n, R);

    assert_int_equal(claas_blocks_new_fused(pointers, count, &blocks), 0);
    assert_non_null(blocks);
    assert_true(claas_blocks_bytes(blocks) > 0);
    for (int m = 1; m <= 33; m += m < 9 || (m > 14 && m < 17) || m > 30 ? 1 : 3)
        for (int lora = 0; lora < 2; lora++) {
            struct buffer x = act_rows(ops, m, k, k + 2, 1), s = act_rows(ops, m, R, R, 1);
            struct buffer want = buffer_new((size_t)m * (n + 3), 4),
                          got = buffer_new((size_t)m * (n + 3), 4);
            struct claas_gemm_args args = {.m = m,
                                           .n = n,
                                           .k = k,
                                           .x = x.data,
                                           .ldx = k + 2,
                                           .w = panels.data,
                                           .out32 = want.data,
                                           .ldo = n + 3};

            if (lora)
                args.lora_s = s.data, args.lds = R, args.lora_b = pb.data, args.r = R;
            ops->gemm(pool, &args);
            args.blocks = blocks, args.out32 = got.data;
            ops->gemm(pool, &args);
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) {
                    const float *a = (float *)want.data + (size_t)i * (n + 3) + j;
                    const float *c = (float *)got.data + (size_t)i * (n + 3) + j;

                    if (memcmp(a, c, 4) != 0)
                        fail_msg("%s %s m=%d n=%d k=%d lora %d at (%d, %d): %.9g from panels, %.9g "
                                 "from blocks",
                                 ops->name, claas_type_name(t[0].type), m, n, k, lora, i, j,
                                 (double)*a, (double)*c);
                }
            check_gaps(&got, m, n, n + 3, ops->name);
            buffer_free(&x, "x"), buffer_free(&s, "s"), buffer_free(&want, "out");
            buffer_free(&got, "out");
        }
    buffer_free(&panels, "panels"), buffer_free(&pb, "b");
    free(b);
}

static void check_types(const struct claas_ops *ops, claas_pool_t *pool)
{
    for (size_t i = 0; i < CLAAS_COUNT(types); i++) {
        const int unit = claas_type_block_elements(types[i]);
        struct claas_tensor t[3] = {tensor_new(types[i], 37, 2 * unit, 0),
                                    tensor_new(types[i], 64, 2 * unit, 16),
                                    tensor_new(types[i], 5, 2 * unit, 0)};

        check_blocks(ops, pool, t, 1);
        check_blocks(ops, pool, t + 1, 1);
        check_blocks(ops, pool, t, 3);
        for (int j = 0; j < 3; j++)
            free((void *)t[j].data);
    }
}

/* In every table that has them. */
static void test_same_bits_as_panels(void **state)
{
    claas_pool_t *pool = pool_of(2);
    const struct claas_ops *ops = NULL;
    int checked = 0;

    for (int i = 0; (ops = claas_ops_at(CLAAS_PRECISION_BF16, i)) != NULL; i++)
        if (strcmp(ops->name, "bf16-avx512bf16") == 0 || strcmp(ops->name, "bf16-amx") == 0) {
            check_types(ops, pool);
            checked++;
        }
    claas_pool_free(&pool);
    if (checked == 0)
        skip();
}

/* Types without a fast path, mixtures and short data give no blocks, and no error. */
static void test_no_blocks(void **state)
{
    struct claas_tensor a = tensor_new(CLAAS_TYPE_Q4_1, 16, 64, 0),
                        b = tensor_new(CLAAS_TYPE_Q8_0, 16, 64, 0);
    struct claas_tensor f = tensor_new(CLAAS_TYPE_BF16, 16, 64, 0), c = a;
    const struct claas_tensor *mixed[2] = {&a, &b};
    struct claas_blocks *blocks = NULL;

    assert_int_equal(claas_blocks_new_fused(mixed, 2, &blocks), 0);
    assert_null(blocks);
    assert_int_equal(claas_blocks_new(&f, &blocks), 0);
    assert_null(blocks);
    c.bytes -= 1;
    assert_int_equal(claas_blocks_new(&c, &blocks), 0);
    assert_null(blocks);
    c = a, c.data = NULL;
    assert_int_equal(claas_blocks_new(&c, &blocks), 0);
    assert_null(blocks);
    c = a, c.columns = 63;
    assert_int_equal(claas_blocks_new(&c, &blocks), 0);
    assert_null(blocks);
    assert_int_equal(claas_blocks_new_fused(mixed, 0, &blocks), 0);
    assert_null(blocks);
    assert_int_equal(claas_blocks_bytes(NULL), 0);
    free((void *)a.data), free((void *)b.data), free((void *)f.data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits_as_panels),
        cmocka_unit_test(test_no_blocks),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
