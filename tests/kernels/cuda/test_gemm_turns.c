/* Products that are timed while chats wait, on a cuBLASLt of the test's own: a turn before each
 * timing, and what a chat's pass may do in it to the plan that is being made. Needs no card. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/gemm.h"

#define PROPOSALS 3
#define FASTEST   2 /* their numbers begin at 1 */
#define N         64
#define K         32

/* An output's address tells how many rows the product has. */
#define OUT_OF(m)    ((void *)(uintptr_t)(0x1000000 + 256 * (m)))
#define ROWS_OF(out) (((uintptr_t)(out)-0x1000000) / 256)

static struct {
    uint64_t algo;                  /* of the last product */
    int products, timings, turns;   /* so many so far */
    uint64_t rows[256], algos[256]; /* of each product */
    cudaError_t error;              /* pending */
} library;

/* --- cuBLASLt and CUDA --- */

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, size_t size,
                                               cublasComputeType_t compute, cudaDataType_t scale)
{
    (void)compute, (void)scale;
    memset(product, 0, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size)
{
    (void)product, (void)attribute, (void)value, (void)size;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t ld)
{
    (void)type, (void)ld;
    memset(layout, 0, size);
    layout->data[0] = rows;
    layout->data[1] = columns;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference,
                                                     size_t size)
{
    memset(preference, 0, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t size)
{
    (void)preference, (void)attribute, (void)value, (void)size;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t lt, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *count)
{
    (void)lt, (void)product, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)wanted;
    for (int i = 0; i < PROPOSALS; i++) {
        results[i] = (cublasLtMatmulHeuristicResult_t){.state = CUBLAS_STATUS_SUCCESS};
        results[i].algo.data[0] = (uint64_t)i + 1;
    }
    *count = PROPOSALS;
    return CUBLAS_STATUS_SUCCESS;
}

/* The descriptors must be those of the product whose output this is. */
cublasStatus_t cublasLtMatmul(cublasLtHandle_t lt, cublasLtMatmulDesc_t product, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t bytes, cudaStream_t stream)
{
    (void)lt, (void)product, (void)alpha, (void)a, (void)a_layout, (void)b, (void)beta, (void)c;
    (void)c_layout, (void)workspace, (void)bytes, (void)stream;
    assert_int_equal(d_layout->data[1], ROWS_OF(d));
    assert_int_equal(b_layout->data[1], ROWS_OF(d)); /* its B is our a */
    assert_true(library.products < 256);
    library.rows[library.products] = ROWS_OF(d);
    library.algos[library.products++] = library.algo = algo->data[0];
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void)
{
    return 1;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    *event = NULL;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    (void)event, (void)stream;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    (void)from, (void)to;
    library.timings++;
    *ms = library.algo == FASTEST ? 1.0f : 2.0f;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    (void)stream;
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    (void)function, (void)attribute, (void)value;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

cudaError_t cudaPeekAtLastError(void)
{
    return library.error;
}

/* --- a step and the chats --- */

static struct cuda_context context;
static struct chat {
    int m, n;     /* of its pass's only product; 0: it has no pass */
    bool refuses; /* the step is to be given up */
} chat;

static void multiply(int m, int n)
{
    static char a[1], b[1];

    assert_int_equal(cuda_gemm(&context, &(struct cuda_gemm){.form = CUDA_GEMM_NT,
                                                             .m = m,
                                                             .n = n,
                                                             .k = K,
                                                             .a = a,
                                                             .lda = K,
                                                             .b = b,
                                                             .ldb = K,
                                                             .out = OUT_OF(m),
                                                             .ldo = n,
                                                             .out_type = CUDA_TYPE_F32}),
                     0);
}

/* As cuda_forward does it: a pass gives no turns. */
static int give(void *arg)
{
    const struct cuda_turns turns = context.turns;

    assert_ptr_equal(arg, &library);
    library.turns++;
    context.turns = (struct cuda_turns){0};
    if (chat.m > 0)
        multiply(chat.m, chat.n);
    context.turns = turns;
    return chat.refuses;
}

static int set_up(void **state)
{
    (void)state;
    memset(&library, 0, sizeof(library));
    memset(&context, 0, sizeof(context));
    chat = (struct chat){0};
    context.act = CUDA_TYPE_F32;
    context.act_bytes = 4;
    context.turns = (struct cuda_turns){.give = give, .arg = &library};
    return unsetenv("CLAAS_CUDA_TUNE") == 0 ? setenv("CLAAS_CUDA_CHOICES", "", 1) : -1;
}

static int tear_down(void **state)
{
    (void)state;
    cuda_gemm_plans_free(&context);
    return 0;
}

static void expect_last(int m)
{
    assert_int_equal(library.rows[library.products - 1], m);
    assert_int_equal(library.algos[library.products - 1], FASTEST);
}

static void a_turn_before_each_timing(void **state)
{
    (void)state;
    multiply(300, N);
    assert_int_equal(library.timings, PROPOSALS);
    assert_int_equal(library.turns, PROPOSALS);
    expect_last(300);
    multiply(300, N); /* chosen already */
    assert_int_equal(library.turns, PROPOSALS);
    expect_last(300);
}

/* The product is made all the same, and whoever asked for it learns that the step is given up. */
static void a_step_that_is_given_up(void **state)
{
    (void)state;
    chat.refuses = true;
    multiply(300, N);
    assert_int_equal(library.timings, PROPOSALS);
    assert_int_equal(library.turns, 1);
    assert_true(context.turns.refused);
    expect_last(300);
}

/* An error of CUDA's is not handed to a chat. */
static void no_turn_behind_an_error(void **state)
{
    (void)state;
    library.error = cudaErrorInvalidValue;
    multiply(300, N);
    assert_int_equal(library.turns, 0);
}

static void outside_of_a_step_none(void **state)
{
    (void)state;
    context.turns = (struct cuda_turns){0};
    multiply(300, N);
    assert_int_equal(library.timings, PROPOSALS);
    assert_int_equal(library.turns, 0);
    expect_last(300);
}

/* Another weight's product: it is timed in the first turn, and this one's choice goes on. */
static void a_pass_with_another_product(void **state)
{
    (void)state;
    chat = (struct chat){.m = 20, .n = 2 * N};
    multiply(300, N);
    assert_int_equal(library.turns, PROPOSALS);
    assert_int_equal(library.timings, 2 * PROPOSALS);
    expect_last(300);
}

/* The same weight, and a number of rows of the same class: the pass describes this very plan for
 * its rows and chooses for it, and that choice is kept. */
static void a_pass_with_the_same_plan(void **state)
{
    (void)state;
    chat = (struct chat){.m = 400, .n = N};
    multiply(300, N);
    assert_int_equal(library.turns, 1);
    assert_int_equal(library.timings, PROPOSALS);
    expect_last(300);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_turn_before_each_timing, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_step_that_is_given_up, set_up, tear_down),
        cmocka_unit_test_setup_teardown(no_turn_behind_an_error, set_up, tear_down),
        cmocka_unit_test_setup_teardown(outside_of_a_step_none, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_pass_with_another_product, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_pass_with_the_same_plan, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
