/* Products of few rows against sums in double: every number of rows, edge sizes of n and k, with
 * and without something added, both types of output; and that a row has the same bits whatever the
 * number of rows and its place among them, and whenever it is made again. Then times, beside
 * cuBLASLt's in the same run. */
#include "cuda_check.h"
#include "cuda/gemm_few.h"

#define ROWS CUDA_GEMM_FEW_ROWS
/* Tensor cores cut off, not round, when they add to a float32 sum. */
#define CUT_LIMIT 1e-4

struct few_case {
    int n, k;
    int pad; /* added to every row's length */
    enum cuda_type out_type;
    bool adds; /* another array */
};

/* A case's operands, all of its rows. */
struct operands {
    const struct few_case *c;
    int lda, ldo;
    float *a; /* host, [ROWS][lda], as the device rounds them */
    struct check_array b, add;
};

/* The product of rows `first`, `first + step`, … of a, m of them, into the first m of ROWS rows of
 * `got`, [ROWS][ldo]; fails if anything else was written. */
static void multiply(struct cuda_context *context, const struct operands *o, int m, int first,
                     int step, float *got)
{
    const struct few_case *c = o->c;
    size_t count = (size_t)ROWS * o->ldo;
    float *rows = (float *)check_alloc((size_t)m * o->lda, sizeof(float));
    float *before = (float *)check_alloc(count, sizeof(float));
    struct check_array a, out;
    struct cuda_gemm g = {};

    for (int i = 0; i < m; i++)
        memcpy(rows + (size_t)i * o->lda, o->a + (size_t)(first + i * step) * o->lda,
               (size_t)o->lda * sizeof(float));
    a = check_copy_of(CUDA_TYPE_BF16, rows, (size_t)m * o->lda);
    out = check_blank(c->out_type, count);
    check_get(&out);
    memcpy(before, out.host, count * sizeof(float));
    g.form = CUDA_GEMM_NT;
    g.m = m;
    g.n = c->n;
    g.k = c->k;
    g.a = a.data;
    g.lda = o->lda;
    g.b = o->b.data;
    g.ldb = o->lda;
    g.out = out.data;
    g.ldo = o->ldo;
    g.out_type = c->out_type;
    g.add = c->adds ? o->add.data : NULL;
    if (!cuda_gemm_few_suits(context, &g))
        check_fail("%d rows are not taken", m);
    check_rc(cuda_gemm(context, &g), "cuda_gemm");
    check_get(&out);
    for (size_t at = 0; at < count; at++)
        if (((int)(at / o->ldo) >= m || (int)(at % o->ldo) >= c->n) &&
            memcmp(&out.host[at], &before[at], sizeof(float)) != 0) {
            check_fail("of %d rows: row %d, column %d of out was written", m, (int)(at / o->ldo),
                       (int)(at % o->ldo));
            break;
        }
    memcpy(got, out.host, count * sizeof(float));
    free(rows);
    free(before);
    check_free(&a, "a");
    check_free(&out, "out");
}

/* What a row of out should be, in double. */
static void reference_row(const struct operands *o, int row, double *want)
{
    const struct few_case *c = o->c;
    const float *x = o->a + (size_t)row * o->lda;

    for (int j = 0; j < c->n; j++) {
        const float *w = o->b.host + (size_t)j * o->lda;
        double sum = c->adds ? o->add.host[(size_t)row * o->ldo + j] : 0.0;

        for (int p = 0; p < c->k; p++)
            sum += (double)x[p] * w[p];
        want[j] = sum;
    }
}

static void open_operands(const struct few_case *c, struct operands *o)
{
    struct check_array a;

    o->c = c;
    o->lda = c->k + c->pad;
    o->ldo = c->n + c->pad;
    a = check_acts(CUDA_TYPE_BF16, (size_t)ROWS * o->lda, 1.0f);
    o->a = (float *)check_alloc(a.count, sizeof(float));
    memcpy(o->a, a.host, a.count * sizeof(float));
    check_free(&a, "a");
    o->b = check_acts(CUDA_TYPE_BF16, (size_t)c->n * o->lda, 1.0f);
    o->add = check_acts(c->out_type, (size_t)ROWS * o->ldo, 2.0f);
}

static void close_operands(struct operands *o)
{
    check_free(&o->b, "b");
    check_free(&o->add, "add");
    free(o->a);
}

/* Row `at` of `got` has the bits of row `row` of `all`. */
static void compare_row(const struct operands *o, const char *what, int m, const float *got, int at,
                        const float *all, int row)
{
    const float *x = got + (size_t)at * o->ldo, *y = all + (size_t)row * o->ldo;

    for (int j = 0; j < o->c->n; j++)
        if (memcmp(&x[j], &y[j], sizeof(float)) != 0) {
            check_fail("%s of %d: row %d as row %d, column %d: %.9g, but %.9g as row %d of %d",
                       what, m, row, at, j, (double)x[j], (double)y[j], row, ROWS);
            return;
        }
}

/* All m; or those at the edges of tiles, where a case is large or differs from another only in what
 * is added. */
static bool is_tried(int m, bool all)
{
    return (all && !check_is_small()) || m <= 2 || m % 8 == 1 || m % 16 == 0;
}

static void run_case(struct cuda_context *context, const struct few_case *c)
{
    bool large = (double)ROWS * c->n * c->k > 4e7;
    struct operands o;
    size_t count;
    float *all, *got;
    double *want;

    check_begin("few rows %d x %d, pad %d, %s, %s", c->n, c->k, c->pad, check_name(c->out_type),
                c->adds ? "something added" : "nothing added");
    open_operands(c, &o);
    count = (size_t)ROWS * o.ldo;
    all = (float *)check_alloc(count, sizeof(float));
    got = (float *)check_alloc(count, sizeof(float));
    want = (double *)check_alloc((size_t)c->n, sizeof(double));
    multiply(context, &o, ROWS, 0, 1, all);
    for (int row = 0; row < ROWS; row += large ? 21 : 1) { /* 0, 21, 42, 63 */
        char what[32];

        reference_row(&o, row, want);
        snprintf(what, sizeof(what), "row %d", row);
        check_close(what, all + (size_t)row * o.ldo, want, (size_t)c->n,
                    c->out_type == CUDA_TYPE_F32 ? CUT_LIMIT : CHECK_BF16_LIMIT);
    }
    for (int m = 1; m <= ROWS; m++) {
        if (!is_tried(m, !large && !c->adds))
            continue;
        multiply(context, &o, m, 0, 1, got);
        for (int i = 0; i < m; i++)
            compare_row(&o, "the first rows", m, got, i, all, i);
    }
    if (!c->adds) { /* elsewhere a row would be added to by another */
        multiply(context, &o, ROWS, ROWS - 1, -1, got);
        for (int i = 0; i < ROWS; i++)
            compare_row(&o, "turned round", ROWS, got, i, all, ROWS - 1 - i);
        for (int row = 1; row < ROWS; row += 31) {
            multiply(context, &o, 1, row, 1, got);
            compare_row(&o, "alone", 1, got, 0, all, row);
        }
    }
    free(all);
    free(got);
    free(want);
    close_operands(&o);
    check_end();
}

/* On a card of sm_90 these are cut along k into 1, 2, 4 and 8 parts; some of the stages are not
 * whole, some tiles of n are not, and some rows of out do not lie at multiples of four. */
static void test_cases(struct cuda_context *context)
{
    static const int sizes[][3] = {
        {256, 256, 0},  {257, 264, 0}, {300, 320, 8},  {383, 1000, 24}, {576, 576, 0},
        {960, 576, 16}, {640, 520, 0}, {258, 2056, 8}, {1002, 4104, 0}, {16386, 328, 8},
    };

    for (const int *size : sizes)
        for (int kind = 0; kind < 4; kind++) {
            struct few_case c = {size[0], size[1], size[2],
                                 kind < 2 ? CUDA_TYPE_BF16 : CUDA_TYPE_F32, kind % 2 == 1};

            if (check_leaves_out((double)ROWS * c.n * c.k, CHECK_SMALL_PRODUCTS) ||
                check_elsewhere())
                continue;
            /* The large ones once in each type. */
            if ((double)c.n * c.k < 1e6 || c.adds == (c.out_type == CUDA_TYPE_BF16))
                run_case(context, &c);
        }
}

/* --- what is left to cuBLASLt --- */

static void expect_suits(const struct cuda_context *context, const struct cuda_gemm *g, bool want,
                         const char *what)
{
    if (cuda_gemm_few_suits(context, g) != want)
        check_fail("%s: %s", what, want ? "not taken" : "taken");
}

static void test_suits(struct cuda_context *context)
{
    struct cuda_context wide = *context;
    struct cuda_gemm base = {}, g;
    const uint8_t *memory = (const uint8_t *)4096; /* never read */

    base.form = CUDA_GEMM_NT;
    base.m = 64;
    base.n = base.k = 256;
    base.lda = base.ldb = base.ldo = 256;
    base.a = base.b = memory;
    base.out = (void *)memory;
    base.out_type = CUDA_TYPE_BF16;
    wide.act = CUDA_TYPE_F32;
    check_begin("few rows, which products");
    expect_suits(context, &base, true, "the smallest");
    expect_suits(&wide, &base, false, "float32");
    g = base, g.m = 65;
    expect_suits(context, &g, false, "65 rows");
    g = base, g.n = 255;
    expect_suits(context, &g, false, "255 columns");
    g = base, g.k = 248;
    expect_suits(context, &g, false, "k 248");
    g = base, g.k = 260, g.lda = g.ldb = 264;
    expect_suits(context, &g, false, "k 260");
    g = base, g.lda = 257;
    expect_suits(context, &g, false, "rows of 257 in a");
    g = base, g.ldb = 260;
    expect_suits(context, &g, false, "rows of 260 in b");
    g = base, g.a = memory + 8;
    expect_suits(context, &g, false, "a 8 bytes off");
    g = base, g.b = memory + 2;
    expect_suits(context, &g, false, "b 2 bytes off");
    g = base, g.form = CUDA_GEMM_NN;
    expect_suits(context, &g, false, "NN");
    check_end();
}

/* --- time --- */

#define TRAFFIC ((size_t)256 << 20) /* more than any L2 keeps */

struct timing {
    int m, n, k;
    enum cuda_type out_type;
    const uint8_t *a;
    uint8_t *b, *out;
    int copies, calls; /* of the weight, taken by turns; in a graph */
};

static void queue_calls(struct cuda_context *context, const struct timing *t)
{
    size_t bytes = (size_t)t->n * t->k * 2;

    for (int i = 0; i < t->calls; i++) {
        struct cuda_gemm g = {};

        g.form = CUDA_GEMM_NT;
        g.m = t->m;
        g.n = t->n;
        g.k = t->k;
        g.a = t->a;
        g.lda = t->k;
        g.b = t->b + (size_t)(i % t->copies) * bytes;
        g.ldb = t->k;
        g.out = t->out;
        g.ldo = t->n;
        g.out_type = t->out_type;
        check_rc(cuda_gemm(context, &g), "cuda_gemm");
    }
}

/* Milliseconds of a call. */
static float time_calls(struct cuda_context *context, const struct timing *t)
{
    return check_graph_ms(context, [&] { queue_calls(context, t); }) / (float)t->calls;
}

static void time_shape(struct cuda_context *few, struct cuda_context *library, const char *what,
                       int n, int k, enum cuda_type out_type)
{
    size_t bytes = (size_t)n * k * 2, out_bytes = out_type == CUDA_TYPE_F32 ? 4 : 2;
    struct timing t = {};
    void *a = NULL;

    t.n = n;
    t.k = k;
    t.out_type = out_type;
    t.copies = (int)((TRAFFIC + bytes - 1) / bytes);
    t.calls = t.copies < 4 ? 4 : t.copies > 256 ? 256 : t.copies;
    check_cuda(cudaMalloc(&a, (size_t)ROWS * k * 2), "cudaMalloc");
    check_cuda(cudaMalloc((void **)&t.b, bytes * t.copies), "cudaMalloc");
    check_cuda(cudaMalloc((void **)&t.out, (size_t)ROWS * n * out_bytes), "cudaMalloc");
    check_fill(CUDA_TYPE_BF16, a, (size_t)ROWS * k, 1.0f);
    check_fill(CUDA_TYPE_BF16, t.b, bytes / 2 * t.copies, 1.0f);
    t.a = (const uint8_t *)a;
    for (int m = 1; m <= ROWS; m *= 8) {
        double moved;
        char name[96];
        float ours, theirs;

        t.m = m;
        moved = (double)bytes + 2.0 * m * k + (double)out_bytes * m * n;
        ours = time_calls(few, &t);
        theirs = time_calls(library, &t);
        snprintf(name, sizeof(name), "few rows %s %d x %d x %d", what, m, n, k);
        check_report(name, ours, moved, 0);
        snprintf(name, sizeof(name), "cublaslt %s %d x %d x %d (x %.2f)", what, m, n, k,
                 (double)(theirs / ours));
        check_report(name, theirs, moved, 0);
    }
    check_cuda(cudaFree(a), "cudaFree");
    check_cuda(cudaFree(t.b), "cudaFree");
    check_cuda(cudaFree(t.out), "cudaFree");
}

static void time_copy(const struct cuda_context *context)
{
    size_t bytes = (size_t)1 << 30;
    void *from = NULL, *to = NULL;

    check_cuda(cudaMalloc(&from, bytes), "cudaMalloc");
    check_cuda(cudaMalloc(&to, bytes), "cudaMalloc");
    check_cuda(cudaMemset(from, 1, bytes), "cudaMemset");
    check_report("copy of 1 GiB",
                 check_median_ms(context,
                                 [&] {
                                     check_cuda(cudaMemcpyAsync(to, from, bytes,
                                                                cudaMemcpyDeviceToDevice,
                                                                context->stream),
                                                "copy");
                                 }),
                 2.0 * (double)bytes, 0);
    check_cuda(cudaFree(from), "cudaFree");
    check_cuda(cudaFree(to), "cudaFree");
}

static void time_all(struct cuda_context *few)
{
    struct cuda_context library;
    struct cuda_gemm g = {};
    float *memory = NULL;

    check_begin("few rows timing");
    check_open(CUDA_TYPE_BF16, &library);
    /* The variable counts when the first product is made. */
    check_cuda(cudaMalloc((void **)&memory, 4096), "cudaMalloc");
    check_cuda(cudaMemset(memory, 0, 4096), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaMemset");
    g.m = g.n = g.k = g.lda = g.ldb = g.ldo = 8;
    g.a = g.b = memory;
    g.out = memory + 512;
    g.out_type = CUDA_TYPE_BF16;
    setenv("CLAAS_CUDA_FEW", "0", 1);
    check_rc(cuda_gemm(&library, &g), "cuda_gemm");
    unsetenv("CLAAS_CUDA_FEW");
    time_copy(few);
    time_shape(few, &library, "8B qkv", 6144, 4096, CUDA_TYPE_BF16);
    time_shape(few, &library, "8B o", 4096, 4096, CUDA_TYPE_BF16);
    time_shape(few, &library, "8B gate|up", 24576, 4096, CUDA_TYPE_BF16);
    time_shape(few, &library, "8B down", 4096, 12288, CUDA_TYPE_BF16);
    time_shape(few, &library, "8B head", 151936, 4096, CUDA_TYPE_F32);
    time_shape(few, &library, "135M qkv", 960, 576, CUDA_TYPE_BF16);
    time_shape(few, &library, "135M o", 576, 576, CUDA_TYPE_BF16);
    time_shape(few, &library, "135M gate|up", 3072, 576, CUDA_TYPE_BF16);
    time_shape(few, &library, "135M down", 576, 1536, CUDA_TYPE_BF16);
    time_shape(few, &library, "135M head", 49152, 576, CUDA_TYPE_F32);
    cuda_context_close(&library);
    check_cuda(cudaFree(memory), "cudaFree");
    check_end();
}

/* A graph does what a launch does. */
static void test_graph(struct cuda_context *context)
{
    struct few_case c = {640, 4096, 0, CUDA_TYPE_F32, false};
    struct check_array direct, replayed, a;
    struct cuda_gemm g = {};
    struct operands o;
    cudaGraph_t graph;
    cudaGraphExec_t exec;

    check_begin("few rows in a graph");
    open_operands(&c, &o);
    a = check_copy_of(CUDA_TYPE_BF16, o.a, (size_t)ROWS * o.lda);
    direct = check_blank(CUDA_TYPE_F32, (size_t)ROWS * o.ldo);
    replayed = check_blank(CUDA_TYPE_F32, (size_t)ROWS * o.ldo);
    g.form = CUDA_GEMM_NT;
    g.m = 13;
    g.n = c.n;
    g.k = c.k;
    g.a = a.data;
    g.b = o.b.data;
    g.lda = g.ldb = o.lda;
    g.ldo = o.ldo;
    g.out_type = CUDA_TYPE_F32;
    g.out = direct.data;
    check_rc(cuda_gemm(context, &g), "cuda_gemm");
    g.out = replayed.data;
    check_cuda(cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    check_rc(cuda_gemm(context, &g), "cuda_gemm while capturing");
    check_cuda(cudaStreamEndCapture(context->stream, &graph), "capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    for (int i = 0; i < 2; i++)
        check_cuda(cudaGraphLaunch(exec, context->stream), "launch");
    check_get(&direct);
    check_get(&replayed);
    for (int i = 0; i < g.m; i++)
        compare_row(&o, "replayed", g.m, replayed.host, i, direct.host, i);
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    check_free(&a, "a");
    check_free(&direct, "direct");
    check_free(&replayed, "replayed");
    close_operands(&o);
    check_end();
}

/* Launches one behind the other, each into memory of its own: all have the first one's bits. */
static void test_repeats(struct cuda_context *context)
{
    const int repeats = check_is_small() ? 3 : 24;
    /* on a card of sm_90 in 2, 4, 8 and 8 parts; the last tile of n is not whole */
    static const int sizes[][2] = {{300, 320}, {576, 576}, {258, 2056}, {1002, 4104}};

    for (const int *size : sizes)
        for (int m = 1; m <= ROWS; m = m == 1 ? 7 : 3 * m) { /* 1, 7, 21, 63 */
            struct few_case c = {size[0], size[1], 0, CUDA_TYPE_F32, false};
            const size_t bytes = (size_t)ROWS * c.n * sizeof(float);
            struct check_array a, out;
            struct cuda_gemm g = {};
            struct operands o;

            if (check_elsewhere())
                continue;
            check_begin("few rows again and again, %d x %d x %d", m, c.n, c.k);
            open_operands(&c, &o);
            a = check_copy_of(CUDA_TYPE_BF16, o.a, (size_t)ROWS * o.lda);
            out = check_blank(CUDA_TYPE_F32, (size_t)repeats * ROWS * c.n);
            g.form = CUDA_GEMM_NT;
            g.m = m;
            g.n = g.ldo = c.n;
            g.k = g.lda = g.ldb = c.k;
            g.a = a.data;
            g.b = o.b.data;
            g.out_type = CUDA_TYPE_F32;
            for (int i = 0; i < repeats; i++) {
                g.out = (uint8_t *)out.data + (size_t)i * bytes;
                check_rc(cuda_gemm(context, &g), "cuda_gemm");
            }
            check_get(&out);
            for (int i = 1; i < repeats; i++)
                for (int row = 0; row < m; row++)
                    compare_row(&o, "again", m, out.host + (size_t)i * ROWS * c.n, row, out.host,
                                row);
            check_free(&a, "a");
            check_free(&out, "out");
            close_operands(&o);
            check_end();
        }
}

int main(void)
{
    struct cuda_context context;

    setenv("CLAAS_CUDA_CHOICES", "", 1);
    check_open(CUDA_TYPE_BF16, &context);
    test_suits(&context);
    test_cases(&context);
    test_graph(&context);
    test_repeats(&context);
    if (check_measures())
        time_all(&context);
    cuda_context_close(&context);
    return check_finish();
}
