/* Matrix products against sums in double: both forms, both types of act, outputs of act and of
 * float32, with and without something added, rows longer than needed, operands that lie unaligned,
 * and shapes from one element to those of an 8B model; and the choices that are kept in a file. */
#include "cuda_check.h"
#include "cuda/gemm.h"
#include "cuda/gemm_choices.h"

#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SAMPLED_ROWS 8 /* of an output too large for the reference to compute whole */
/* Tensor cores cut off, not round, when they add to a float32 sum: that shows where nothing is
 * rounded to bfloat16 in the end. */
#define CUT_LIMIT 1e-4

struct shape {
    int m, n, k;
    int pad; /* added to every row's length */
};

struct trial {
    enum cuda_gemm_form form;
    struct shape shape;
    enum cuda_type act, out_type;
    bool adds; /* another array */
};

#define FORMS 2
static const char *const form_names[FORMS] = {"NT", "NN"};

static void fill_leading(struct cuda_gemm *g, const struct trial *t)
{
    g->form = t->form;
    g->m = t->shape.m;
    g->n = t->shape.n;
    g->k = t->shape.k;
    g->lda = g->k + t->shape.pad;
    g->ldb = (t->form == CUDA_GEMM_NT ? g->k : g->n) + t->shape.pad;
    g->ldo = g->n + t->shape.pad;
    g->out_type = t->out_type;
}

/* A row of the product in double. */
static void reference_row(const struct cuda_gemm *g, const float *a, const float *b,
                          const float *add, int i, double *want)
{
    for (int j = 0; j < g->n; j++)
        want[j] = g->add ? (double)add[(size_t)i * g->ldo + j] : 0.0;
    for (int j = 0; j < g->n && g->form == CUDA_GEMM_NT; j++) {
        double sum = 0.0;

        for (int p = 0; p < g->k; p++)
            sum += (double)a[(size_t)i * g->lda + p] * b[(size_t)j * g->ldb + p];
        want[j] += sum;
    }
    for (int p = 0; p < g->k && g->form != CUDA_GEMM_NT; p++) {
        double x = a[(size_t)i * g->lda + p];

        for (int j = 0; j < g->n; j++)
            want[j] += x * b[(size_t)p * g->ldb + j];
    }
}

/* All rows, or some of them; and that nothing was written between the rows. */
static void compare(const struct cuda_gemm *g, const struct trial *t, const struct check_array *a,
                    const struct check_array *b, const float *add, const float *before,
                    const float *got)
{
    int rows = (double)g->m * g->n * g->k < 3e7 || g->m < SAMPLED_ROWS ? g->m : SAMPLED_ROWS;
    double limit = t->act == CUDA_TYPE_F32        ? CHECK_F32_LIMIT
                   : t->out_type == CUDA_TYPE_F32 ? CUT_LIMIT
                                                  : CHECK_BF16_LIMIT;
    double *want = (double *)check_alloc((size_t)rows * g->n, sizeof(double));
    float *line = (float *)check_alloc((size_t)rows * g->n, sizeof(float));

    for (int r = 0; r < rows; r++) {
        int i = rows == g->m ? r : r < 2 ? r : r == 2 ? g->m - 1 : check_below(g->m);

        reference_row(g, a->host, b->host, add, i, want + (size_t)r * g->n);
        memcpy(line + (size_t)r * g->n, got + (size_t)i * g->ldo, (size_t)g->n * sizeof(float));
    }
    check_close("product", line, want, (size_t)rows * g->n, limit);
    for (int i = 0; i + 1 < g->m; i++)
        if (memcmp(got + (size_t)i * g->ldo + g->n, before + (size_t)i * g->ldo + g->n,
                   (size_t)t->shape.pad * sizeof(float)) != 0) {
            check_fail("written behind row %d", i);
            break;
        }
    free(want);
    free(line);
}

static void run_trial(struct cuda_context *context, const struct trial *t)
{
    struct cuda_gemm g = {};
    struct check_array a, b, out, add;
    float *before;
    size_t out_count;

    fill_leading(&g, t);
    out_count = (size_t)g.m * g.ldo;
    a = check_acts(t->act, (size_t)g.m * g.lda, 1.0f);
    b = check_acts(t->act, (size_t)(t->form == CUDA_GEMM_NT ? g.n : g.k) * g.ldb, 1.0f);
    add = check_acts(t->out_type, out_count, 2.0f);
    out = check_blank(t->out_type, out_count); /* NaN */
    check_get(&out);
    before = (float *)check_alloc(out_count, sizeof(float));
    memcpy(before, out.host, out_count * sizeof(float));
    g.a = a.data;
    g.b = b.data;
    g.out = out.data;
    g.add = t->adds ? add.data : NULL;
    check_rc(cuda_gemm(context, &g), "cuda_gemm");
    check_get(&out);
    compare(&g, t, &a, &b, add.host, before, out.host);
    /* Again, now that the algorithm is known: the same bits. */
    memcpy(before, out.host, out_count * sizeof(float));
    check_rc(cuda_gemm(context, &g), "cuda_gemm");
    check_get(&out);
    check_same("twice", out.host, before, out_count * sizeof(float));
    free(before);
    check_free(&a, "a");
    check_free(&b, "b");
    check_free(&add, "add");
    check_free(&out, "out");
}

/* Both forms, of one type of act and output; with and without something added, or the two by turns.
 */
static void test_shapes(struct cuda_context *context, const char *name, enum cuda_type out_type,
                        const struct shape *shapes, int count, bool both_ways)
{
    for (int form = 0; form < FORMS; form++) {
        check_begin("gemm %s %s -> %s, %s", form_names[form], check_name(context->act),
                    check_name(out_type), name);
        for (int i = 0; i < count; i++) {
            struct trial t = {};

            if (check_leaves_out((double)shapes[i].m * shapes[i].n * shapes[i].k,
                                 CHECK_SMALL_PRODUCTS) ||
                check_elsewhere())
                continue;
            t.form = (enum cuda_gemm_form)form;
            t.shape = shapes[i];
            t.act = context->act;
            t.out_type = out_type;
            for (int way = 0; way < 2; way++) {
                t.adds = way == 1;
                if (both_ways || i % 2 == way)
                    run_trial(context, &t);
            }
        }
        check_end();
    }
}

static const struct shape edge_shapes[] = {
    {1, 1, 1, 0},    {1, 1, 40, 0},   {1, 8, 8, 0},    {3, 5, 7, 0},
    {17, 33, 65, 0}, {2, 64, 16, 8},  {16, 16, 8, 24}, {129, 257, 63, 3},
    {1, 576, 96, 0}, {7, 96, 576, 8}, {200, 8, 72, 8}, {255, 1, 31, 0},
};
static const struct shape unaligned_shapes[] = {
    {5, 24, 40, 8},
    {33, 136, 72, 8},
    {64, 64, 64, 0},
};
/* Every m of a size class takes what was chosen for the first. */
static const struct shape class_shapes[] = {
    {300, 576, 96, 0}, {301, 576, 96, 0}, {512, 576, 96, 0}, {257, 576, 96, 0},
    {64, 96, 576, 0},  {33, 96, 576, 0},  {57, 96, 576, 0},
};
/* Of SmolLM2-135M, Qwen2.5-0.5B and an 8B model; LoRA's with rank 32. */
static const struct shape large_shapes[] = {
    {513, 960, 576, 0},   {70, 20000, 576, 0}, {1000, 576, 1536, 0},
    {384, 4096, 2048, 0}, {96, 4096, 1024, 0}, {640, 32, 12288, 0},
};

static void test_type(enum cuda_type act)
{
    static const size_t shifts[] = {16, 64}; /* parts of rows begin so */
    struct cuda_context context;

    check_open(act, &context);
    for (int wide = 0; wide < (act == CUDA_TYPE_BF16 ? 2 : 1); wide++) {
        enum cuda_type out_type = wide ? CUDA_TYPE_F32 : act;

        test_shapes(&context, "edges", out_type, edge_shapes,
                    (int)(sizeof(edge_shapes) / sizeof(edge_shapes[0])), true);
        test_shapes(&context, "size classes", out_type, class_shapes,
                    (int)(sizeof(class_shapes) / sizeof(class_shapes[0])), false);
        test_shapes(&context, "large", out_type, large_shapes,
                    (int)(sizeof(large_shapes) / sizeof(large_shapes[0])), false);
        for (size_t shift : shifts) {
            char name[32];

            check_shift = shift;
            snprintf(name, sizeof(name), "%d bytes off", (int)shift);
            test_shapes(&context, name, out_type, unaligned_shapes, 3, true);
            check_shift = 0;
        }
    }
    cuda_context_close(&context);
}

static void test_refusals(void)
{
    struct cuda_context context;
    struct cuda_gemm g = {};
    float *memory = NULL;

    check_open(CUDA_TYPE_F32, &context);
    check_cuda(cudaMalloc((void **)&memory, 4096), "cudaMalloc");
    check_begin("gemm refusals");
    g.form = CUDA_GEMM_NT;
    g.m = g.n = 4;
    g.k = 8;
    g.lda = g.ldb = 8;
    g.ldo = 4;
    g.a = g.b = memory;
    g.out = memory + 512;
    g.m = 0;
    check_rc(cuda_gemm(&context, &g), "no rows");
    g.m = 4;
    g.lda = 7;
    if (cuda_gemm(&context, &g) >= 0)
        check_fail("rows shorter than k went through");
    g.lda = 8;
    g.add = g.out;
    if (cuda_gemm(&context, &g) != CLAAS_ERR_INTERNAL ||
        !strstr(claas_error_text(), "adds to its own output"))
        check_fail("a product that adds to its own output: %s", claas_error_text());
    check_cuda(cudaDeviceSynchronize(), "after refusals");
    check_end();
    check_cuda(cudaFree(memory), "cudaFree");
    cuda_context_close(&context);
}

/* --- choices kept in a file --- */

static char kept_path[] = "/tmp/claas-gemm-XXXXXX";

/* The file's identity: a new one whenever it was replaced. 0: there is none. */
static unsigned long long kept_inode(void)
{
    struct stat info;

    return stat(kept_path, &info) == 0 ? (unsigned long long)info.st_ino : 0;
}

#define KEPT_PRODUCTS (2 * FORMS)

/* Different products in a context of their own, that is, as in a process of its own. */
static void run_kept(enum cuda_type act)
{
    struct cuda_context context;

    check_open(act, &context);
    for (int i = 0; i < KEPT_PRODUCTS; i++) {
        struct trial t = {};

        t.form = (enum cuda_gemm_form)(i % FORMS);
        t.adds = i >= FORMS;
        t.shape = {200, 576, 320, 0};
        t.act = act;
        t.out_type = CUDA_TYPE_F32; /* so the types of a and b are all that differs */
        run_trial(&context, &t);
    }
    cuda_context_close(&context);
}

static size_t kept_bytes(uint8_t *bytes, size_t room)
{
    FILE *file = fopen(kept_path, "rb");
    size_t length = file ? fread(bytes, 1, room, file) : 0;

    if (file)
        fclose(file);
    return length;
}

static void put_kept(const uint8_t *bytes, size_t length)
{
    FILE *file = fopen(kept_path, "wb");

    if (!file || fwrite(bytes, 1, length, file) != length)
        check_fail("cannot write %s", kept_path);
    if (file)
        fclose(file);
}

/* Algorithms that make no sense, in a file that is whole. The origin lies behind magic, version,
 * size, count and checksum. */
static void put_senseless(const uint8_t *bytes, size_t length)
{
    struct gemm_choices_origin origin;
    struct gemm_choices choices = {};
    uint8_t *changed = NULL;

    memcpy(&origin, bytes + 32, sizeof(origin));
    check_rc(gemm_choices_decode(&origin, bytes, length, &choices), "reading the file");
    for (size_t i = 0; i < choices.count; i++)
        memset(choices.items[i].algo, 0xff, GEMM_CHOICE_ALGO);
    check_rc(gemm_choices_encode(&origin, &choices, &changed, &length), "making a file");
    if (changed)
        put_kept(changed, length);
    free(changed);
    gemm_choices_done(&choices);
}

/* Runs with the file as it is: whether it is replaced, and the next run is content with it. */
static void expect_replaced(const char *what)
{
    unsigned long long before = kept_inode(), after;

    run_kept(CUDA_TYPE_BF16);
    after = kept_inode();
    if (after == 0 || after == before)
        check_fail("%s: the file was not replaced", what);
    run_kept(CUDA_TYPE_BF16);
    if (kept_inode() != after)
        check_fail("%s: the file is replaced again and again", what);
}

/* With a file of bfloat16's choices: float32's are added, and nobody has to choose anew. */
static void expect_shared(void)
{
    unsigned long long both;

    run_kept(CUDA_TYPE_F32);
    both = kept_inode();
    run_kept(CUDA_TYPE_BF16);
    if (kept_inode() != both)
        check_fail("two types of operands replace each other's choices");
}

static void unlink_kept(void)
{
    char lock[sizeof(kept_path) + 8];

    snprintf(lock, sizeof(lock), "%s.lock", kept_path);
    unlink(kept_path);
    unlink(lock);
}

static void test_kept(void)
{
    const char *tune = getenv("CLAAS_CUDA_TUNE");
    uint8_t bytes[4096];
    size_t length;
    int fd;

    if (tune && strcmp(tune, "0") == 0) /* then nothing is kept */
        return;
    check_begin("gemm choices in a file");
    fd = mkstemp(kept_path);
    if (fd < 0)
        check_fail("no temporary file");
    else
        close(fd); /* empty: a file cut to nothing */
    setenv("CLAAS_CUDA_CHOICES", kept_path, 1);
    expect_replaced("an empty file");
    length = kept_bytes(bytes, sizeof(bytes));
    if (length != 112 + KEPT_PRODUCTS * (GEMM_CHOICE_KEY + GEMM_CHOICE_ALGO))
        check_fail("%d choices in %zu bytes", KEPT_PRODUCTS, length);
    else {
        bytes[length / 2] ^= 1;
        put_kept(bytes, length);
        expect_replaced("a flipped bit");
        length = kept_bytes(bytes, sizeof(bytes));
        put_senseless(bytes, length);
        expect_replaced("senseless algorithms");
    }
    unlink_kept();
    expect_replaced("no file");
    expect_shared();
    unlink_kept();
    setenv("CLAAS_CUDA_CHOICES", "", 1);
    check_end();
}

/* --- time --- */

static void time_shape(struct cuda_context *context, const char *what, enum cuda_gemm_form form,
                       int m, int n, int k, enum cuda_type out_type)
{
    size_t act = context->act_bytes, out_bytes = out_type == CUDA_TYPE_F32 ? 4 : 2;
    struct cuda_gemm g = {};
    struct trial t = {};
    void *a = NULL, *b = NULL, *out = NULL;
    double bytes;
    char name[96];
    float ms;

    t.form = form;
    t.shape = {m, n, k, 0};
    t.act = context->act;
    t.out_type = out_type;
    fill_leading(&g, &t);
    check_cuda(cudaMalloc(&a, (size_t)m * k * act), "cudaMalloc");
    check_cuda(cudaMalloc(&b, (size_t)n * k * act), "cudaMalloc");
    check_cuda(cudaMalloc(&out, (size_t)m * n * out_bytes), "cudaMalloc");
    check_fill(context->act, a, (size_t)m * k, 1.0f);
    check_fill(context->act, b, (size_t)n * k, 1.0f);
    g.a = a;
    g.b = b;
    g.out = out;
    ms = check_median_ms(context, [&] { check_rc(cuda_gemm(context, &g), "cuda_gemm"); });
    bytes = (double)act * ((double)m * k + (double)n * k) + (double)out_bytes * m * n;
    snprintf(name, sizeof(name), "gemm %s %s %d x %d x %d", form_names[form], what, m, n, k);
    check_report(name, ms, bytes, 2.0 * m * n * k);
    check_cuda(cudaFree(a), "cudaFree");
    check_cuda(cudaFree(b), "cudaFree");
    check_cuda(cudaFree(out), "cudaFree");
}

#define HOST_CALLS 400 /* fewer than a stream's queue holds */

static double clock_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec * 1e-3;
}

/* What a call that is known costs the host: nothing is waited for. */
static void time_host(struct cuda_context *context, const char *what, int m, int n, int k)
{
    struct cuda_gemm g = {};
    struct trial t = {};
    void *memory = NULL;
    double start = 0;

    t.form = CUDA_GEMM_NT;
    t.shape = {m, n, k, 0};
    t.act = t.out_type = CUDA_TYPE_BF16;
    fill_leading(&g, &t);
    check_cuda(cudaMalloc(&memory, (size_t)(m * k + n * k + m * n) * 2), "cudaMalloc");
    check_cuda(cudaMemset(memory, 0, (size_t)(m * k + n * k + m * n) * 2), "cudaMemset");
    g.a = memory;
    g.b = (const uint16_t *)memory + m * k;
    g.out = (uint16_t *)memory + m * k + n * k;
    for (int i = -20; i < HOST_CALLS; i++) {
        if (i == 0) {
            check_cuda(cudaDeviceSynchronize(), "a product");
            start = clock_us();
        }
        check_rc(cuda_gemm(context, &g), "cuda_gemm");
    }
    printf("time host, %s: %.2f us a call\n", what, (clock_us() - start) / HOST_CALLS);
    check_cuda(cudaDeviceSynchronize(), "products");
    check_cuda(cudaFree(memory), "cudaFree");
}

static void time_all(void)
{
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("gemm timing");
    time_host(&context, "cuBLASLt", 128, 96, 96);
    time_host(&context, "few rows", 1, 576, 576);
    time_shape(&context, "peak", CUDA_GEMM_NT, 8192, 8192, 8192, CUDA_TYPE_BF16);
    time_shape(&context, "8B qkv", CUDA_GEMM_NT, 4096, 6144, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "8B o", CUDA_GEMM_NT, 4096, 4096, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "8B gate|up", CUDA_GEMM_NT, 4096, 24576, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "8B down", CUDA_GEMM_NT, 4096, 4096, 12288, CUDA_TYPE_BF16);
    time_shape(&context, "8B d(gate|up)", CUDA_GEMM_NN, 4096, 4096, 24576, CUDA_TYPE_BF16);
    time_shape(&context, "8B head", CUDA_GEMM_NT, 1024, 151936, 4096, CUDA_TYPE_F32);
    time_shape(&context, "8B qkv, small", CUDA_GEMM_NT, 512, 6144, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "LoRA x A^T", CUDA_GEMM_NT, 4096, 96, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "LoRA S B^T", CUDA_GEMM_NT, 4096, 4096, 32, CUDA_TYPE_BF16);
    time_shape(&context, "decode 8B gate|up", CUDA_GEMM_NT, 1, 24576, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "decode 8B down", CUDA_GEMM_NT, 1, 4096, 12288, CUDA_TYPE_BF16);
    time_shape(&context, "decode 8B gate|up", CUDA_GEMM_NT, 16, 24576, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "decode 8B gate|up", CUDA_GEMM_NT, 64, 24576, 4096, CUDA_TYPE_BF16);
    time_shape(&context, "135M gate|up", CUDA_GEMM_NT, 512, 3072, 576, CUDA_TYPE_BF16);
    check_end();
    cuda_context_close(&context);
}

int main(void)
{
    setenv("CLAAS_CUDA_CHOICES", "", 1);
    test_refusals();
    test_type(CUDA_TYPE_F32);
    test_type(CUDA_TYPE_BF16);
    test_kept();
    if (check_measures())
        time_all();
    return check_finish();
}
