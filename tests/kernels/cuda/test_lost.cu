/* A kernel that faults: the device is lost, every call says so from then on, and what is left can
 * be closed. A program of its own, since nothing works after it; not for compute-sanitizer, to
 * which the fault is a finding (run --sanitize leaves it out). */
#include "cuda_check.h"
#include "cuda/gemm.h"

static __global__ void fault(void)
{
    asm volatile("trap;");
}

static void expect_lost(int rc, const char *what)
{
    if (rc != CLAAS_ERR_DEVICE_LOST)
        check_fail("%s: code %d, want DEVICE_LOST (%d): %s", what, rc, CLAAS_ERR_DEVICE_LOST,
                   rc < 0 ? claas_error_text() : "success");
}

#define SIDE     128 /* rows enough to be cuBLASLt's */
#define PRODUCTS 1000000

static int multiply(struct cuda_context *context, const struct cuda_region *place)
{
    uint8_t *base = (uint8_t *)place->base;
    const size_t matrix = SIDE * SIDE * context->act_bytes;
    struct cuda_gemm gemm = {};

    gemm.form = CUDA_GEMM_NT;
    gemm.m = gemm.n = gemm.k = gemm.lda = gemm.ldb = gemm.ldo = SIDE;
    gemm.a = base;
    gemm.b = base + matrix;
    gemm.out = base + 2 * matrix;
    gemm.out_type = context->act;
    return cuda_gemm(context, &gemm);
}

/* The fault comes to light in a product, which has it from cuBLASLt and not from CUDA. */
static int multiply_until_it_fails(struct cuda_context *context, const struct cuda_region *place)
{
    int rc = 0;

    for (int i = 0; i < PRODUCTS && rc == 0; i++)
        rc = multiply(context, place);
    return rc;
}

int main(void)
{
    struct cuda_context context;
    struct cuda_region kept, region;
    size_t available = 0;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("a lost device");
    check_rc(cuda_region_new(&context, &kept, 3 * SIDE * SIDE * context.act_bytes, "a test"),
             "before the fault");
    check_rc(multiply(&context, &kept), "a product before the fault");
    check_rc(cuda_wait(&context), "before the fault");
    if (context.lost)
        check_fail("lost before the fault");
    fault<<<1, 1, 0, context.stream>>>();
    expect_lost(multiply_until_it_fails(&context, &kept), "a product behind the fault");
    printf("as it should be: %s\n", claas_error_text());
    expect_lost(cuda_wait(&context), "waiting for the fault");
    if (!context.lost)
        check_fail("the context does not know");
    expect_lost(cuda_wait(&context), "waiting again");
    expect_lost(cuda_region_new(&context, &region, 1000, "more"), "new memory");
    if (region.base)
        check_fail("memory of a lost device");
    expect_lost(cuda_memory_free(&context, &available), "asking for free memory");
    cuda_region_done(&context, &kept);
    check_end();
    cuda_context_close(&context);
    return check_finish();
}
