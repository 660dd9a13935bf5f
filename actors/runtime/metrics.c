/* The registry of metrics.def and its Prometheus text (format 0.0.4).
 *
 * Lock-free: a counter or gauge is one atomic word that holds a double's bits; a histogram is one
 * atomic count per bucket plus a sum. The text is not a snapshot of one instant, but each
 * histogram's count is the sum of the buckets as read, so that it is consistent in itself. */
#include "claas/actor.h"
#include "claas/buf.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/runtime.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define TEXT_LIMIT (4 << 20)

enum metric_kind { COUNTER, GAUGE, HISTOGRAM };

struct metric_row {
    enum metric_kind kind;
    const char *name, *labels, *help;
};

static const struct metric_row rows[] = {
#define X(name, kind, prometheus, labels, help) {kind, prometheus, labels, help},
#include "claas/metrics.def"
#undef X
};

/* Upper bounds in seconds: a token gap (ms) to a job (minutes). Histograms of sizes use them
 * too. */
static const double bounds[] = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                1,      2.5,   5,      10,    30,   60,    120,  300, 600};

#define METRIC_COUNT CLAAS_COUNT(rows)
#define BUCKET_COUNT (CLAAS_COUNT(bounds) + 1)

static _Atomic uint64_t values[METRIC_COUNT]; /* bits of a double: the value, or a sum */
static _Atomic uint64_t buckets[METRIC_COUNT][BUCKET_COUNT];

static double double_of(uint64_t bits)
{
    double value;

    memcpy(&value, &bits, sizeof(value));
    return value;
}

static uint64_t bits_of(double value)
{
    uint64_t bits;

    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

static bool is_metric(int metric, double value)
{
    return metric >= 0 && (size_t)metric < METRIC_COUNT && isfinite(value);
}

void claas_metric_add(int metric, double value)
{
    if (!is_metric(metric, value))
        return;
    uint64_t seen = atomic_load_explicit(&values[metric], memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&values[metric], &seen,
                                                  bits_of(double_of(seen) + value),
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
}

void claas_metric_set(int metric, double value)
{
    if (is_metric(metric, value))
        atomic_store_explicit(&values[metric], bits_of(value), memory_order_relaxed);
}

void claas_metric_observe(int metric, double value)
{
    size_t bucket = 0;

    if (!is_metric(metric, value))
        return;
    while (bucket < CLAAS_COUNT(bounds) && value > bounds[bucket])
        bucket++;
    atomic_fetch_add_explicit(&buckets[metric][bucket], 1, memory_order_relaxed);
    claas_metric_add(metric, value);
}

double claas_metric_value(int metric)
{
    return is_metric(metric, 0) ? double_of(atomic_load(&values[metric])) : 0;
}

static void print_histogram(struct claas_buf *buf, size_t metric)
{
    const char *name = rows[metric].name;
    uint64_t count = 0;

    for (size_t i = 0; i < CLAAS_COUNT(bounds); i++) {
        count += atomic_load_explicit(&buckets[metric][i], memory_order_relaxed);
        claas_buf_printf(buf, "%s_bucket{le=\"%g\"} %llu\n", name, bounds[i],
                         (unsigned long long)count);
    }
    count += atomic_load_explicit(&buckets[metric][BUCKET_COUNT - 1], memory_order_relaxed);
    claas_buf_printf(buf, "%s_bucket{le=\"+Inf\"} %llu\n", name, (unsigned long long)count);
    claas_buf_printf(buf, "%s_sum %.17g\n", name, claas_metric_value((int)metric));
    claas_buf_printf(buf, "%s_count %llu\n", name, (unsigned long long)count);
}

static void print_metric(struct claas_buf *buf, size_t metric)
{
    static const char *const kinds[] = {"counter", "gauge", "histogram"};
    const struct metric_row *row = &rows[metric];

    claas_buf_printf(buf, "# HELP %s %s\n# TYPE %s %s\n", row->name, row->help, row->name,
                     kinds[row->kind]);
    if (row->kind == HISTOGRAM)
        print_histogram(buf, metric);
    else
        claas_buf_printf(buf, "%s%s %.17g\n", row->name, row->labels,
                         claas_metric_value((int)metric));
}

/* Resident memory, second field of /proc/self/statm in pages: the figure people look for first. */
static void print_process(struct claas_buf *buf)
{
    FILE *file = fopen("/proc/self/statm", "re");
    unsigned long long size, resident;

    if (!file)
        return;
    if (fscanf(file, "%llu %llu", &size, &resident) == 2)
        claas_buf_printf(buf,
                         "# HELP process_resident_memory_bytes Resident memory size in bytes.\n"
                         "# TYPE process_resident_memory_bytes gauge\n"
                         "process_resident_memory_bytes %llu\n",
                         resident * (unsigned long long)sysconf(_SC_PAGESIZE));
    fclose(file);
}

char *claas_metrics_text(void)
{
    struct claas_buf buf;

    claas_buf_init(&buf, TEXT_LIMIT);
    for (size_t i = 0; i < METRIC_COUNT; i++)
        print_metric(&buf, i);
    print_process(&buf);
    char *text = claas_buf_take(&buf, NULL);
    claas_buf_done(&buf);
    return text;
}
