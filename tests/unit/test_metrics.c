/* Counters from several threads, histogram buckets, and the Prometheus text (by promtool where it
 * is installed). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/runtime.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *count(void *arg)
{
    for (int i = 0; i < 100000; i++) {
        claas_metric_add(CLAAS_METRIC_STEPS, 1);
        claas_metric_observe(CLAAS_METRIC_STEP_SECONDS, 0.25);
    }
    return NULL;
}

static void has_line(const char *text, const char *line)
{
    const char *at = strstr(text, line);

    if (!at || (at != text && at[-1] != '\n') || at[strlen(line)] != '\n')
        fail_msg("no line '%s'", line);
}

static void threads_lose_nothing(void **state)
{
    pthread_t threads[4];

    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, count, NULL);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    assert_true(claas_metric_value(CLAAS_METRIC_STEPS) == 400000);
    CLAAS_AUTO_FREE char *text = claas_metrics_text();
    has_line(text, "claas_training_steps_total 400000");
    has_line(text, "claas_training_step_seconds_bucket{le=\"0.1\"} 0");
    has_line(text, "claas_training_step_seconds_bucket{le=\"0.25\"} 400000");
    has_line(text, "claas_training_step_seconds_bucket{le=\"+Inf\"} 400000");
    has_line(text, "claas_training_step_seconds_sum 100000");
    has_line(text, "claas_training_step_seconds_count 400000");
}

static void odd_values(void **state)
{
    claas_metric_set(CLAAS_METRIC_JOBS_QUEUED, -2.5);
    claas_metric_set(CLAAS_METRIC_JOBS_QUEUED, NAN);
    claas_metric_add(CLAAS_METRIC_JOBS_QUEUED, INFINITY);
    assert_true(claas_metric_value(CLAAS_METRIC_JOBS_QUEUED) == -2.5);
    claas_metric_add(-1, 1);
    claas_metric_add(100000, 1);
    claas_metric_observe(100000, 1);
    assert_true(claas_metric_value(100000) == 0);
    claas_metric_observe(CLAAS_METRIC_JOB_SECONDS, 1e9);
    claas_metric_observe(CLAAS_METRIC_JOB_SECONDS, 600);
    CLAAS_AUTO_FREE char *text = claas_metrics_text();
    has_line(text, "claas_job_seconds_bucket{le=\"600\"} 1");
    has_line(text, "claas_job_seconds_bucket{le=\"+Inf\"} 2");
    has_line(text, "claas_jobs_queued -2.5");
    has_line(text, "# TYPE claas_job_seconds histogram");
    assert_non_null(strstr(text, "\nprocess_resident_memory_bytes "));
}

static void promtool_is_content(void **state)
{
    CLAAS_AUTO_FREE char *text = claas_metrics_text();
    char output[4096] = "", path[] = "/tmp/claas-metrics-XXXXXX", command[128];

    if (system("command -v promtool >/dev/null") != 0)
        skip();
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *file = fdopen(fd, "w");
    fputs(text, file);
    fclose(file);
    snprintf(command, sizeof(command), "promtool check metrics <%s 2>&1; rm %s", path, path);
    file = popen(command, "r");
    size_t length = fread(output, 1, sizeof(output) - 1, file);
    pclose(file);
    output[length] = '\0';
    if (length > 0)
        fail_msg("%s", output);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_lose_nothing),
        cmocka_unit_test(odd_values),
        cmocka_unit_test(promtool_is_content),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
