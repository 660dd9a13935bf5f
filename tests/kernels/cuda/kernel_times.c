/* Which kernels a training step's time goes to, of any program with the CUDA back-end and without
 * changing it:
 *
 *   CUDA_INJECTION64_PATH=…/libkernel_times.so claas-bench step --device cuda …
 *
 * The driver loads this library and calls InitializeInjection (CUPTI's manual, "Injection"). At the
 * program's end stderr has a line for each kernel: its launches, the time in which they ran, and
 * how much longer the step is by them (from the end of all launches before to their own: a launch
 * that begins early and waits, or runs beside another, counts for what comes after that one alone).
 * A step is what lies between two launches of the kernel that KERNEL_TIMES_MARK names (adamw_quads,
 * the last one of a step of one adapter). Only the last KERNEL_TIMES_STEPS (5) steps count: before
 * them a program chooses algorithms and measures floors. */
#include <cupti.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUFFER_BYTES ((size_t)8 << 20)
#define ALIGNMENT    64
#define NAME_MAX_    40

struct launch {
    const char *name;    /* CUPTI's, which stays; mangled */
    uint64_t start, end; /* ns */
};
static struct {
    pthread_mutex_t lock;
    struct launch *items;
    size_t count, capacity, lost;
} launches = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* One kernel's launches in the steps that count. */
struct row {
    char name[NAME_MAX_ + 1];
    size_t count;
    uint64_t ns;    /* from start to end */
    uint64_t added; /* from the end of all before to its end; all rows' add up to the step */
};

/* --- what CUPTI hands over --- */

static void CUPTIAPI give_buffer(uint8_t **ret, size_t *ret_bytes, size_t *ret_records)
{
    *ret = aligned_alloc(ALIGNMENT, BUFFER_BYTES);
    *ret_bytes = *ret ? BUFFER_BYTES : 0;
    *ret_records = 0; /* as many as fit */
}

static void add_launch(const CUpti_ActivityKernel10 *kernel)
{
    if (launches.count == launches.capacity) {
        size_t capacity = launches.capacity > 0 ? 2 * launches.capacity : 65536;
        struct launch *items = realloc(launches.items, capacity * sizeof(*items));

        if (!items) {
            launches.lost++;
            return;
        }
        launches.items = items;
        launches.capacity = capacity;
    }
    launches.items[launches.count++] = (struct launch){kernel->name, kernel->start, kernel->end};
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t bytes,
                                 size_t used)
{
    CUpti_Activity *record = NULL;
    size_t dropped = 0;

    (void)bytes;
    pthread_mutex_lock(&launches.lock);
    while (cuptiActivityGetNextRecord(buffer, used, &record) == CUPTI_SUCCESS)
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)
            add_launch((const CUpti_ActivityKernel10 *)(const void *)record);
    if (cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS)
        launches.lost += dropped;
    pthread_mutex_unlock(&launches.lock);
    free(buffer);
}

/* --- what is printed --- */

static int by_start(const void *a, const void *b)
{
    const struct launch *x = a, *y = b;

    return x->start < y->start ? -1 : x->start > y->start;
}
static int by_added(const void *a, const void *b)
{
    const struct row *x = a, *y = b;

    return x->added > y->added ? -1 : x->added < y->added;
}

/* Appends the numbers among a template's arguments, <1,128>; `at` is behind the name (Itanium C++
 * ABI: I, then L, a type, the number, E for each of them, E). */
static void add_numbers(const char *at, char ret[NAME_MAX_ + 1])
{
    size_t length = strlen(ret);

    if (*at++ != 'I')
        return;
    for (int count = 0; at[0] == 'L' && length < NAME_MAX_; count++) {
        char *type;
        long named = strtol(++at, &type, 10); /* an enumeration's name, or one letter */
        size_t skip = type == at ? 1 : (size_t)named;
        size_t digits;

        if (skip > strlen(type))
            break;
        digits = strcspn(type + skip, "E");
        if (type[skip + digits] != 'E')
            break;
        length += (size_t)snprintf(ret + length, NAME_MAX_ + 1 - length, "%c%.*s",
                                   count > 0 ? ',' : '<', (int)digits, type + skip);
        at = type + skip + digits + 1;
        if (at[0] != 'L' && length < NAME_MAX_)
            snprintf(ret + length, NAME_MAX_ + 1 - length, ">");
    }
}

/* A function's own name out of a mangled one (_Z4name…, _ZL4name…); others as they are, cut off. */
static void short_name(const char *mangled, char ret[NAME_MAX_ + 1])
{
    const char *at = mangled;
    char *end;
    long length;

    if (strncmp(at, "_Z", 2) == 0)
        at += at[2] == 'L' ? 3 : 2;
    length = strtol(at, &end, 10);
    if (at == mangled || end == at || length <= 0 || (size_t)length > strlen(end)) {
        snprintf(ret, NAME_MAX_ + 1, "%s", mangled);
        return;
    }
    snprintf(ret, NAME_MAX_ + 1, "%.*s", (int)(length < NAME_MAX_ ? length : NAME_MAX_), end);
    add_numbers(end + length, ret);
}

static struct row *row_of(struct row *rows, size_t *count, const char *name)
{
    for (size_t i = 0; i < *count; i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    snprintf(rows[*count].name, sizeof(rows[*count].name), "%s", name);
    return &rows[(*count)++];
}

/* The index of the first launch of the last `steps` steps, in *ret_end that behind their last
 * launch and in *ret_steps how many steps there are. */
static size_t find_steps(const char *mark, long steps, size_t *ret_end, long *ret_steps)
{
    size_t begin = 0;
    long marks = 0;

    *ret_end = 0;
    for (size_t i = launches.count; i > 0 && marks <= steps; i--) {
        if (!strstr(launches.items[i - 1].name, mark))
            continue;
        if (marks == 0)
            *ret_end = i;
        begin = i;
        marks++;
    }
    *ret_steps = marks - 1;
    return begin;
}

/* Milliseconds in which some kernel ran, after the launch before `begin`. */
static double busy_ms(size_t begin, size_t end)
{
    uint64_t busy = 0, until = launches.items[begin - 1].end;

    for (size_t i = begin; i < end; i++) {
        uint64_t from = launches.items[i].start > until ? launches.items[i].start : until;

        if (launches.items[i].end > from)
            busy += launches.items[i].end - from;
        if (launches.items[i].end > until)
            until = launches.items[i].end;
    }
    return (double)busy * 1e-6;
}

static void print_rows(size_t begin, size_t end, double steps)
{
    struct row *rows = calloc(end - begin, sizeof(*rows));
    double all = (double)(launches.items[end - 1].end - launches.items[begin - 1].end) * 1e-6;
    double busy = busy_ms(begin, end);
    uint64_t until = launches.items[begin - 1].end;
    size_t count = 0;

    if (!rows)
        return;
    for (size_t i = begin; i < end; i++) {
        const struct launch *launch = &launches.items[i];
        char name[NAME_MAX_ + 1];
        struct row *row;

        short_name(launch->name, name);
        row = row_of(rows, &count, name);
        row->count++;
        row->ns += launch->end - launch->start;
        row->added += launch->end > until ? launch->end - until : 0;
        until = launch->end > until ? launch->end : until;
    }
    qsort(rows, count, sizeof(*rows), by_added);
    fprintf(stderr, "%-*s %9s %9s %9s %7s %9s\n", NAME_MAX_, "kernel", "launches", "ran, ms",
            "adds, ms", "%", "us each");
    for (size_t i = 0; i < count; i++) {
        double added = (double)rows[i].added * 1e-6;

        fprintf(stderr, "%-*s %9.1f %9.3f %9.3f %7.1f %9.2f\n", NAME_MAX_, rows[i].name,
                (double)rows[i].count / steps, (double)rows[i].ns * 1e-6 / steps, added / steps,
                100 * added / all, 1e3 * added / (double)rows[i].count);
    }
    fprintf(stderr, "a step: %.3f ms, %.1f launches; some kernel ran for %.3f, none for %.3f\n",
            all / steps, (double)(end - begin) / steps, busy / steps, (all - busy) / steps);
    free(rows);
}

static void report(void)
{
    const char *mark = getenv("KERNEL_TIMES_MARK"), *wanted = getenv("KERNEL_TIMES_STEPS");
    size_t begin, end;
    long steps;

    if (!mark)
        mark = "adamw_quads";
    (void)cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    pthread_mutex_lock(&launches.lock);
    if (launches.count > 0)
        qsort(launches.items, launches.count, sizeof(*launches.items), by_start);
    begin = find_steps(mark, wanted ? strtol(wanted, NULL, 10) : 5, &end, &steps);
    if (launches.lost > 0)
        fprintf(stderr, "kernel times: %zu launches are missing\n", launches.lost);
    if (steps > 0)
        print_rows(begin, end, (double)steps);
    else
        fprintf(stderr, "kernel times: %zu launches, no two of %s\n", launches.count, mark);
    pthread_mutex_unlock(&launches.lock);
}

/* The driver calls it when it starts, if the library exports this name. 1: all is well. */
__attribute__((visibility("default"))) int InitializeInjection(void);
int InitializeInjection(void)
{
    CUptiResult rc = cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
    const char *text = "";

    if (rc == CUPTI_SUCCESS)
        rc = cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    if (rc != CUPTI_SUCCESS) {
        (void)cuptiGetResultString(rc, &text);
        fprintf(stderr, "kernel times: CUPTI: %s\n", text);
        return 0;
    }
    return atexit(report) == 0;
}
