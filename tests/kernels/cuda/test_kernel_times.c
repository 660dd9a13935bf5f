/* kernel_times.c on a CUPTI of the test's own: three steps of four launches each behind what counts
 * for nothing.
 *
 *   test_kernel_times [LIBRARY]     LIBRARY: what the driver would load */
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>
#include <cupti.h>

int InitializeInjection(void);

/* --- CUPTI --- */

static CUpti_BuffersCallbackRequestFunc give;
static CUpti_BuffersCallbackCompleteFunc take;
static CUpti_ActivityKernel10 kernels[64];
static size_t count, given;

CUptiResult CUPTIAPI cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc request,
                                                    CUpti_BuffersCallbackCompleteFunc complete)
{
    give = request;
    take = complete;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityEnable(CUpti_ActivityKind kind)
{
    return kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL ? CUPTI_SUCCESS
                                                         : CUPTI_ERROR_INVALID_PARAMETER;
}

CUptiResult CUPTIAPI cuptiActivityFlushAll(uint32_t flag)
{
    uint8_t *buffer;
    size_t bytes, most;

    (void)flag;
    give(&buffer, &bytes, &most);
    take(NULL, 0, buffer, bytes, bytes);
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNextRecord(uint8_t *buffer, size_t used,
                                                CUpti_Activity **record)
{
    (void)buffer;
    (void)used;
    if (given == count)
        return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = (CUpti_Activity *)(void *)&kernels[given++];
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNumDroppedRecords(CUcontext context, uint32_t stream,
                                                       size_t *dropped)
{
    (void)context;
    (void)stream;
    *dropped = 0;
    return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiGetResultString(CUptiResult result, const char **text)
{
    (void)result;
    *text = "";
    return CUPTI_SUCCESS;
}

/* --- launches --- */

static void launch(const char *name, uint64_t start_us, uint64_t us)
{
    kernels[count++] = (CUpti_ActivityKernel10){.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                                .name = name,
                                                .start = 1000 * start_us,
                                                .end = 1000 * (start_us + us)};
}

/* What a program with these launches prints at its end. */
static void run(char *text, size_t size)
{
    int ends[2], status = 0;
    size_t length = 0;
    pid_t child;

    assert_int_equal(pipe(ends), 0);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        exit(InitializeInjection() == 1 ? 0 : 1);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], text + length, size - 1 - length)) > 0;)
        length += (size_t)n;
    text[length] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void expect(const char *text, const char *part)
{
    if (!strstr(text, part))
        fail_msg("no '%s' in:\n%s", part, text);
}

static void steps_are_counted(void **state)
{
    char text[4096];

    (void)state;
    count = 0;
    launch("_Z4warmv", 0, 500);
    launch("_ZL11adamw_quadsILb1EEv10cuda_adamw", 600, 10);
    for (uint64_t step = 0; step < 3; step++) { /* in the order of their ends, as CUPTI has them */
        uint64_t at = 1000 + 1000 * step;

        launch("nvjet_tst_128x256", at, 300);
        launch("_Z9loss_rowsIL14cuda_lora_form3ELi128EEv", at + 200, 200); /* 100 us beside the
                                                                              first */
        launch("nvjet_tst_128x256", at + 500, 100);
        launch("_ZL11adamw_quadsILb1EEv10cuda_adamw", at + 600, 10);
    }
    launch("_Z5floorv", 9000, 900);
    setenv("KERNEL_TIMES_STEPS", "2", 1);
    run(text, sizeof(text));
    expect(text, "nvjet_tst_128x256                              2.0     0.400     0.890    89.0");
    expect(text, "loss_rows<3,128>                               1.0     0.200     0.100    10.0");
    expect(text, "adamw_quads<1>                                 1.0     0.010     0.010     1.0");
    expect(text, "89.0    445.00");
    expect(text, "a step: 1.000 ms, 4.0 launches; some kernel ran for 0.510, none for 0.490");
    assert_null(strstr(text, "warm"));
    assert_null(strstr(text, "floor"));
}

static void without_steps_it_says_so(void **state)
{
    char text[1024];

    (void)state;
    count = 0;
    launch("_Z4warmv", 0, 500);
    launch("_ZL11adamw_quadsILb1EEv10cuda_adamw", 600, 10);
    run(text, sizeof(text));
    expect(text, "2 launches, no two of adamw_quads");
    count = 0;
    run(text, sizeof(text));
    expect(text, "0 launches");
}

static const char *library;

static void the_driver_finds_its_function(void **state)
{
    void *handle;

    (void)state;
    if (!library)
        skip();
    handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        fail_msg("%s", dlerror());
    assert_non_null(dlsym(handle, "InitializeInjection"));
    dlclose(handle);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_counted),
        cmocka_unit_test(without_steps_it_says_so),
        cmocka_unit_test(the_driver_finds_its_function),
    };

    library = argc > 1 ? argv[1] : NULL;

    return cmocka_run_group_tests(tests, NULL, NULL);
}
