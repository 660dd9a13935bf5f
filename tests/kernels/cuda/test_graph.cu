/* cuda/graph.h: work runs once as often as it is asked for, whether launched, captured or replayed;
 * more keys than graphs; work that cannot be captured, or fails; another thread that uses the
 * device during a capture. */
#include "cuda_check.h"

#include "cuda/graph.h"

#include <pthread.h>

struct work {
    struct cuda_context *context;
    int *count;          /* on the device */
    int calls, code;     /* how often the host was asked; what it answers */
    bool waits, meddles; /* waits for the device; has another thread use it */
};

static __global__ void add_one(int *count)
{
    *count += 1;
}

/* What an I/O thread does: memory of its own, and an event behind the stream's work. */
static void *meddle(void *arg)
{
    struct work *work = (struct work *)arg;
    struct cuda_region region;
    int rc = cuda_region_new(work->context, &region, 1 << 20, "another thread");

    if (rc >= 0)
        cuda_region_done(work->context, &region);
    else
        check_fail("another thread's memory: %s", claas_error_text());
    return NULL;
}

static int launch(void *arg)
{
    struct work *work = (struct work *)arg;
    pthread_t thread;
    int rc;

    work->calls++;
    if (work->code < 0)
        return claas_fail(work->code, "on purpose");
    add_one<<<1, 1, 0, work->context->stream>>>(work->count);
    rc = cuda_check_launch(work->context, "add_one");
    if (rc >= 0 && work->meddles && pthread_create(&thread, NULL, meddle, work) == 0)
        pthread_join(thread, NULL);
    if (rc >= 0 && work->waits)
        rc = cuda_wait(work->context);
    return rc;
}

static int read_count(const struct work *work)
{
    int count = -1;

    check_rc(cuda_wait(work->context), "waiting");
    check_cuda(cudaMemcpy(&count, work->count, sizeof(count), cudaMemcpyDeviceToHost), "the count");
    return count;
}

static struct work work_new(struct cuda_context *context, struct cuda_graphs *graphs)
{
    struct work work = {};

    work.context = context;
    check_cuda(cudaMalloc((void **)&work.count, sizeof(int)), "cudaMalloc");
    check_cuda(cudaMemset(work.count, 0, sizeof(int)), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaMemset");
    cuda_graphs_open(graphs);
    return work;
}

static void work_free(struct work *work, struct cuda_graphs *graphs)
{
    check_rc(cuda_wait(work->context), "waiting");
    cuda_graphs_done(graphs);
    check_cuda(cudaFree(work->count), "cudaFree");
    check_end();
}

static int run(struct work *work, struct cuda_graphs *graphs, int rows, int furthest, bool adapters)
{
    struct cuda_graph_key key = {};

    key.rows = rows;
    key.furthest = furthest;
    key.adapters = adapters;
    return cuda_graphs_run(work->context, graphs, &key, launch, work);
}

static void expect(const struct work *work, const struct cuda_graphs *graphs, int count, int calls,
                   int captures, int replays)
{
    int seen = read_count(work);

    if (seen != count || work->calls != calls || graphs->captures != (uint64_t)captures ||
        graphs->replays != (uint64_t)replays)
        check_fail("ran %d times, want %d; asked the host %d times, want %d; %d captures, want %d; "
                   "%d replays, want %d",
                   seen, count, work->calls, calls, (int)graphs->captures, captures,
                   (int)graphs->replays, replays);
}

/* Keys that differ in one field each. */
static void test_replays(struct cuda_context *context, bool meddles)
{
    struct cuda_graphs graphs;
    struct work work = work_new(context, &graphs);

    check_begin("launched, captured, replayed%s", meddles ? ", beside another thread" : "");
    work.meddles = meddles;
    for (int i = 0; i < 20; i++) {
        check_rc(run(&work, &graphs, 8, 256, false), "the first key");
        check_rc(run(&work, &graphs, 8, 256, true), "with adapters");
        check_rc(run(&work, &graphs, 8, 512, false), "further");
        check_rc(run(&work, &graphs, 16, 256, false), "more rows");
    }
    expect(&work, &graphs, 80, 8, 4, 72);
    work_free(&work, &graphs);
}

static void test_eviction(struct cuda_context *context)
{
    const int keys = CUDA_GRAPHS_MAX + 5;
    struct cuda_graphs graphs;
    struct work work = work_new(context, &graphs);

    check_begin("the least recently used graph makes room");
    for (int round = 0; round < 3; round++)
        for (int key = 1; key <= keys; key++)
            check_rc(run(&work, &graphs, key, 0, false), "a key");
    expect(&work, &graphs, 3 * keys, 3 * keys, 0, 0);
    /* the last CUDA_GRAPHS_MAX keys are there, seen once since they came back */
    for (int i = 0; i < 2; i++)
        for (int key = keys - CUDA_GRAPHS_MAX + 1; key <= keys; key++)
            check_rc(run(&work, &graphs, key, 0, false), "a key that is there");
    expect(&work, &graphs, 3 * keys + 2 * CUDA_GRAPHS_MAX, 3 * keys + CUDA_GRAPHS_MAX,
           CUDA_GRAPHS_MAX, CUDA_GRAPHS_MAX);
    /* a new key takes the place of the oldest one only */
    check_rc(run(&work, &graphs, 1000, 0, false), "a new key");
    check_rc(run(&work, &graphs, keys, 0, false), "the newest key");
    check_rc(run(&work, &graphs, keys - CUDA_GRAPHS_MAX + 1, 0, false), "the oldest key");
    expect(&work, &graphs, 3 * keys + 2 * CUDA_GRAPHS_MAX + 3, 3 * keys + CUDA_GRAPHS_MAX + 2,
           CUDA_GRAPHS_MAX, CUDA_GRAPHS_MAX + 1);
    work_free(&work, &graphs);
}

/* Waiting ends a capture; what was asked for is done all the same, once. */
static void test_refusal(struct cuda_context *context)
{
    struct cuda_graphs graphs;
    struct work work = work_new(context, &graphs);

    check_begin("work that cannot be captured runs without");
    work.waits = true;
    for (int i = 0; i < 5; i++)
        check_rc(run(&work, &graphs, 1, 0, false), "work that waits");
    expect(&work, &graphs, 5, 6, 0, 0); /* once in vain */
    work.waits = false;
    for (int i = 0; i < 3; i++)
        check_rc(run(&work, &graphs, 2, 0, false), "other work");
    expect(&work, &graphs, 8, 8, 1, 1);
    if (context->lost)
        check_fail("the device counts as lost");
    work_free(&work, &graphs);
}

static void test_failure(struct cuda_context *context)
{
    struct cuda_graphs graphs;
    struct work work = work_new(context, &graphs);

    check_begin("work that fails");
    work.code = CLAAS_ERR_LIMIT;
    for (int i = 0; i < 3; i++)
        if (run(&work, &graphs, 1, 0, false) != CLAAS_ERR_LIMIT)
            check_fail("run %d did not fail with LIMIT", i);
    work.code = 0;
    for (int i = 0; i < 3; i++)
        check_rc(run(&work, &graphs, 1, 0, false), "work that failed before");
    expect(&work, &graphs, 3, 5, 1, 1);
    work_free(&work, &graphs);
}

static void test_off(struct cuda_context *context)
{
    struct cuda_graphs graphs;
    struct work work;

    setenv("CLAAS_CUDA_GRAPHS", "0", 1);
    work = work_new(context, &graphs);
    unsetenv("CLAAS_CUDA_GRAPHS");
    check_begin("CLAAS_CUDA_GRAPHS=0");
    for (int i = 0; i < 4; i++)
        check_rc(run(&work, &graphs, 1, 0, false), "work");
    expect(&work, &graphs, 4, 4, 0, 0);
    work_free(&work, &graphs);
}

int main(void)
{
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    test_replays(&context, false);
    test_replays(&context, true);
    test_eviction(&context);
    test_refusal(&context);
    test_failure(&context);
    test_off(&context);
    cuda_context_close(&context);
    return check_finish();
}
