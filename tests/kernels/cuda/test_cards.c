/* The list of cards on a CUDA of the test's own: one that is full, one that another process has for
 * itself, and the others beside them. Needs no card. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "cuda/context.h"
#include "cuda/cuda_backend.h"

#define BYTES 1000

/* --- CUDA: what becomes of each card's context, and of the question for its free memory --- */

static struct {
    int count, current;
    cudaError_t properties[4], set[4], info[4];
} machine;

int cuda_find_device(void)
{
    return 0;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = machine.count;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 12080;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 12040;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int number)
{
    *properties = (struct cudaDeviceProp){.major = 9, .minor = 0, .totalGlobalMem = BYTES};
    (void)snprintf(properties->name, sizeof(properties->name), "card of number %d", number);
    return machine.properties[number];
}

cudaError_t cudaSetDevice(int number)
{
    machine.current = number;
    return machine.set[number];
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *available = (size_t)(100 + machine.current);
    *total = BYTES - 1;
    return machine.info[machine.current];
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t code)
{
    return code == cudaErrorMemoryAllocation ? "out of memory" : "busy or unavailable";
}

static void test_unknown_memory(void **state)
{
    struct claas_cards cards = {0};

    (void)state;
    machine.count = 4;
    machine.info[1] = cudaErrorMemoryAllocation;
    machine.set[2] = cudaErrorDevicesUnavailable;
    assert_int_equal(claas_cuda_cards(&cards), 0);
    assert_int_equal(cards.count, 4);
    for (int i = 0; i < 4; i++) {
        char name[64];

        (void)snprintf(name, sizeof(name), "card of number %d", i);
        assert_string_equal(cards.cards[i].name, name);
        assert_int_equal(cards.cards[i].major, 9);
        assert_int_equal(cards.cards[i].bytes, i == 1 || i == 2 ? BYTES : BYTES - 1);
        assert_int_equal(cards.cards[i].bytes_free, i == 1 || i == 2 ? 0 : 100 + i);
    }
    assert_string_equal(cards.cards[0].unknown, "");
    assert_string_equal(cards.cards[1].unknown, "out of memory");
    assert_string_equal(cards.cards[2].unknown, "busy or unavailable");
    assert_string_equal(cards.cards[3].unknown, "");
}

static void test_no_properties(void **state)
{
    struct claas_cards cards = {0};

    (void)state;
    machine.count = 2;
    machine.properties[1] = cudaErrorDevicesUnavailable;
    assert_int_equal(claas_cuda_cards(&cards), CLAAS_ERR_DEVICE);
    assert_string_equal(claas_error_text(), "card 1: busy or unavailable");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unknown_memory),
        cmocka_unit_test(test_no_properties),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
