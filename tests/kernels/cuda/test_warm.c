/* The passes before the first chat, on a pass of the test's own: which rows they have, and where
 * keys and values go. Needs no card. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "claas/mem.h"
#include "cuda/pass.h"

static claas_backend_t backend;
static struct {
    int rows[64], count, kept;
    int failing, code; /* the pass with this number returns code */
} passes;

void cuda_gemm_keep(struct cuda_context *context)
{
    assert_ptr_equal(context, &backend.context);
    passes.kept++;
}

int cuda_gemm_class(int m)
{
    int power = 1;

    while (power < m)
        power *= 2;
    return m <= 256 ? power : (m + 255) / 256 * 256;
}

int cuda_forward(claas_backend_t *of, const struct claas_segment *segments, int count,
                 struct claas_sample *samples)
{
    const int m = segments[0].count;

    assert_ptr_equal(of, &backend);
    assert_int_equal(count, 1);
    assert_int_equal(segments[0].pos, 0);
    assert_int_equal(segments[0].wanted, 1);
    assert_null(segments[0].adapter);
    assert_in_range(m, 1, backend.max_tokens);
    assert_in_range(m, 1, backend.model.config.context);
    for (int i = 0; i < m; i++)
        assert_in_range(segments[0].tokens[i], 0, backend.model.config.vocab - 1);
    for (int i = 0; i <= (m - 1) / CUDA_KV_BLOCK; i++) { /* all different, all in the pool */
        assert_in_range(segments[0].blocks[i], 0, backend.kv_blocks - 1);
        for (int j = 0; j < i; j++)
            assert_int_not_equal(segments[0].blocks[i], segments[0].blocks[j]);
    }
    assert_in_range(samples[0].given, 0, backend.model.config.vocab - 1);
    assert_true(passes.count < (int)CLAAS_COUNT(passes.rows));
    passes.rows[passes.count] = m;
    return passes.count++ == passes.failing ? passes.code : 0;
}

static int warm(int max_tokens, int kv_blocks, int context)
{
    passes.count = passes.kept = 0;
    backend.max_tokens = max_tokens;
    backend.kv_blocks = kv_blocks;
    backend.model.config.context = context;
    backend.model.config.vocab = 100;
    return cuda_warm(&backend);
}

/* Every number of rows up to `most` is of a pass's class. */
static void expect_classes(int most)
{
    for (int m = 1, i = 0; m <= most; m++) {
        while (i < passes.count && cuda_gemm_class(passes.rows[i]) < cuda_gemm_class(m))
            i++;
        assert_true(i < passes.count);
        assert_int_equal(cuda_gemm_class(passes.rows[i]), cuda_gemm_class(m));
    }
    assert_int_equal(passes.rows[passes.count - 1], most);
}

static void there_is_a_pass_of_each_class(void **state)
{
    (void)state;
    assert_int_equal(warm(2112, 100000, 40960), 0);
    expect_classes(2112);
    assert_int_equal(passes.count, 7 + 10); /* to 64, to 2,112 */
    assert_int_equal(passes.kept, 1);
    assert_int_equal(setenv("CLAAS_CUDA_WARM", "0", 1), 0);
    assert_int_equal(warm(2112, 100000, 40960), 0);
    assert_int_equal(passes.count, 0);
    assert_int_equal(unsetenv("CLAAS_CUDA_WARM"), 0);
}

static void they_fit_pool_and_context(void **state)
{
    (void)state;
    assert_int_equal(warm(2112, 5, 40960), 0);
    expect_classes(80);
    assert_int_equal(warm(2112, 100000, 300), 0);
    expect_classes(300);
    assert_int_equal(warm(1, 1, 1), 0);
    expect_classes(1);
    assert_int_equal(warm(64, INT32_MAX, 2048), 0);
    expect_classes(64);
}

/* The server starts without them; not on a card that is lost. */
static void a_failure_ends_them(void **state)
{
    (void)state;
    passes.failing = 3;
    passes.code = CLAAS_ERR_NO_MEMORY;
    assert_int_equal(warm(2112, 100000, 40960), 0);
    assert_int_equal(passes.count, 4);
    passes.failing = 0;
    passes.code = CLAAS_ERR_DEVICE_LOST;
    assert_int_equal(warm(2112, 100000, 40960), CLAAS_ERR_DEVICE_LOST);
    assert_int_equal(passes.count, 1);
}

static int set_up(void **state)
{
    (void)state;
    memset(&passes, 0, sizeof(passes));
    passes.failing = -1;
    return unsetenv("CLAAS_CUDA_WARM");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(there_is_a_pass_of_each_class, set_up),
        cmocka_unit_test_setup(they_fit_pool_and_context, set_up),
        cmocka_unit_test_setup(a_failure_ends_them, set_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
