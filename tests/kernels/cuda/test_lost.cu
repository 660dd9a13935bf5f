/* A kernel that faults: the device is lost, every call says so from then on, and what is left can
 * be closed. A program of its own, since nothing works after it; not for compute-sanitizer, to
 * which the fault is a finding (run --sanitize leaves it out). */
#include "cuda_check.h"

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

int main(void)
{
    struct cuda_context context;
    struct cuda_region kept, region;
    size_t available = 0;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("a lost device");
    check_rc(cuda_region_new(&context, &kept, 1000, "a test"), "before the fault");
    if (context.lost)
        check_fail("lost before the fault");
    fault<<<1, 1, 0, context.stream>>>();
    expect_lost(cuda_wait(&context), "waiting for the fault");
    printf("as it should be: %s\n", claas_error_text());
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
