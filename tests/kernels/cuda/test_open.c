/* The context on a CUDA of the test's own, for cards that do not open: whether the process is to be
 * started again. Needs no card. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "claas/device.h"
#include "cuda/context.h"
#include "cuda/gemm.h"

/* --- CUDA: what each call on the way answers --- */

static struct {
    cudaError_t count, set, properties, stream;
    cublasStatus_t library;
    int cards, major;
} machine;

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = machine.cards;
    return machine.count;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int number)
{
    (void)number;
    return machine.set;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int number)
{
    (void)number;
    *properties = (struct cudaDeviceProp){.major = machine.major, .name = "card"};
    return machine.properties;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function)
{
    (void)function;
    memset(attributes, 0, sizeof(*attributes));
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    (void)flags;
    *stream = machine.stream == cudaSuccess ? (cudaStream_t)&machine : NULL;
    return machine.stream;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    (void)stream;
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    (void)stream;
    return cudaSuccess;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = NULL;
    return machine.library;
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    (void)status;
    return "not initialized";
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code)
{
    return code == cudaErrorNoDevice ? "no card" : "busy or unavailable";
}

const char *cudaGetErrorName(cudaError_t code)
{
    (void)code;
    return "cudaErrorDevicesUnavailable";
}

void cuda_gemm_plans_free(struct cuda_context *context)
{
    (void)context;
}

/* --- the tests --- */

static int set_up(void **state)
{
    (void)state;
    memset(&machine, 0, sizeof(machine));
    machine.cards = 1;
    machine.major = 9;
    return unsetenv(CLAAS_DEVICE_LOST_VARIABLE);
}

/* In a process that starts for the first time, and in one that lost its card. */
static void expect(int first, int again, const char *text)
{
    struct cuda_context context;

    for (int i = 0; i < 2; i++) {
        if (i == 1)
            assert_int_equal(setenv(CLAAS_DEVICE_LOST_VARIABLE, "1", 1), 0);
        assert_int_equal(cuda_context_open(CUDA_TYPE_BF16, &context), i == 0 ? first : again);
        if (strstr(claas_error_text(), text) == NULL)
            fail_msg("'%s' is not in '%s'", text, claas_error_text());
    }
}

static void test_not_listed(void **state)
{
    (void)state;
    machine.cards = 0;
    machine.count = cudaErrorNoDevice;
    expect(CLAAS_ERR_UNSUPPORTED, CLAAS_ERR_DEVICE_LOST, "");
    assert_string_equal(claas_error_text(), "the card has not come back: no card");
}

static void test_listed_but_not_ready(void **state)
{
    (void)state;
    machine.set = cudaErrorDevicesUnavailable;
    expect(CLAAS_ERR_DEVICE, CLAAS_ERR_DEVICE_LOST,
           "opening the CUDA device: busy or unavailable (cudaErrorDevicesUnavailable)");
}

static void test_no_stream(void **state)
{
    (void)state;
    machine.stream = cudaErrorDevicesUnavailable;
    expect(CLAAS_ERR_DEVICE, CLAAS_ERR_DEVICE_LOST, "making a stream: busy or unavailable");
}

static void test_no_library(void **state)
{
    (void)state;
    machine.library = CUBLAS_STATUS_NOT_INITIALIZED;
    expect(CLAAS_ERR_DEVICE, CLAAS_ERR_DEVICE_LOST, "opening cuBLASLt: not initialized");
}

/* No restart makes it younger. */
static void test_too_old(void **state)
{
    (void)state;
    machine.major = 7;
    expect(CLAAS_ERR_UNSUPPORTED, CLAAS_ERR_UNSUPPORTED, "card has compute capability 7.0");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_not_listed, set_up),
        cmocka_unit_test_setup(test_listed_but_not_ready, set_up),
        cmocka_unit_test_setup(test_no_stream, set_up),
        cmocka_unit_test_setup(test_no_library, set_up),
        cmocka_unit_test_setup(test_too_old, set_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
