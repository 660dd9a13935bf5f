/* How fast the operation tables are: each product at SmolLM2-135M's shapes as GFLOP/s and as a
 * share of the peak of this CPU's multiply instruction, and decoding as GB/s of weights against
 * plain reading.
 *
 *     bench_ops [threads] [table name]
 *
 * The peak is measured in the same run, from a loop over registers on every member of the team.
 * Other programs share the machine, so every figure is the best of several runs within a time
 * budget. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/ops.h"

#define BUDGET 0.4   /* seconds per figure */
#define SAMPLE 0.003 /* seconds per sample */

/* With one thread the time that it ran, so that the machine's other work does not count; else the
 * time that passed. */
static clockid_t bench_clock = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec t;

    clock_gettime(bench_clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

struct bench {
    const struct claas_ops *ops;
    claas_pool_t *pool;
    int threads;
    double peak; /* GFLOP/s of the team */
};

typedef void bench_fn(const struct bench *bench, void *arg);

/* Seconds of a call, the fastest of many samples; a sample is enough calls for the clock's grain.
 */
static double best_of(const struct bench *bench, bench_fn *call, void *arg)
{
    double start = now(), best = 1e9, once = 0;
    int calls = 1;

    call(bench, arg);
    once = now() - start;
    if (once < SAMPLE)
        calls = (int)(SAMPLE / (once > 1e-7 ? once : 1e-7)) + 1;
    start = now();
    do {
        const double before = now();

        for (int i = 0; i < calls; i++)
            call(bench, arg);
        if ((now() - before) / calls < best)
            best = (now() - before) / calls;
    } while (now() - start < BUDGET);
    return best;
}

/* --- peaks --- */

#define PEAK_ROUNDS 200000
static volatile float peak_sink;

#if defined(__x86_64__)
#define ALL_SUMS(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define FLOP_DOT    (12.0 * 64)
#define FLOP_512    (12.0 * 32)
#define FLOP_256    (12.0 * 16)

__attribute__((target("avx512f,avx512bf16"))) static void peak_dot(void *arg, int index)
{
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80),
                   b = (__m512bh)_mm512_set1_epi32(0x3c003c00);
#define SUM(i)  __m512 s##i = _mm512_set1_ps((float)i);
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, a, b);
#define KEEP(i) __asm__ volatile("" : "+v"(s##i));
    ALL_SUMS(SUM)
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        ALL_SUMS(STEP)
        ALL_SUMS(KEEP)
    }
    peak_sink = _mm512_cvtss_f32(s0);
#undef SUM
#undef STEP
}
/* Four tiles of sums from two of each side, as the products do it. */
#define FLOP_AMX (4.0 * 2 * 16 * 16 * 32)
__attribute__((target("amx-tile,amx-bf16"))) static void peak_amx(void *arg, int index)
{
    static const struct {
        unsigned char palette, zero[15];
        unsigned short row_bytes[16];
        unsigned char rows[16];
    } config = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

    _tile_loadconfig(&config);
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}
__attribute__((target("avx512f"))) static void peak_512(void *arg, int index)
{
    const __m512 a = _mm512_set1_ps(1), b = _mm512_set1_ps(0.5f);
#define SUM(i)  __m512 s##i = _mm512_set1_ps((float)i);
#define STEP(i) s##i = _mm512_fmadd_ps(a, b, s##i);
    ALL_SUMS(SUM)
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        ALL_SUMS(STEP)
        ALL_SUMS(KEEP)
    }
    peak_sink = _mm512_cvtss_f32(s0);
#undef SUM
#undef STEP
}
__attribute__((target("avx2,fma"))) static void peak_256(void *arg, int index)
{
    const __m256 a = _mm256_set1_ps(1), b = _mm256_set1_ps(0.5f);
#define SUM(i)  __m256 s##i = _mm256_set1_ps((float)i);
#define STEP(i) s##i = _mm256_fmadd_ps(a, b, s##i);
    ALL_SUMS(SUM)
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        ALL_SUMS(STEP)
        ALL_SUMS(KEEP)
    }
    peak_sink = _mm256_cvtss_f32(s0);
}
#endif

struct peak {
    claas_pool_fn *loop;
};
static void run_peak(const struct bench *bench, void *arg)
{
    claas_pool_run(bench->pool, bench->threads * 4, ((struct peak *)arg)->loop, NULL);
}

static double measure_peak(const struct bench *bench)
{
#if defined(__x86_64__)
    const char *name = bench->ops->name;
    struct peak peak = {peak_256};
    double flop = FLOP_256;

    if (strstr(name, "amx"))
        peak.loop = peak_amx, flop = FLOP_AMX;
    else if (strstr(name, "avx512bf16"))
        peak.loop = peak_dot, flop = FLOP_DOT;
    else if (strstr(name, "avx512"))
        peak.loop = peak_512, flop = FLOP_512;
    else if (strstr(name, "ref"))
        return 0;
    return flop * PEAK_ROUNDS * bench->threads * 4 / best_of(bench, run_peak, &peak) / 1e9;
#else
    return 0;
#endif
}

/* --- inputs --- */

static void *random_acts(const struct bench *bench, size_t count)
{
    unsigned char *p = aligned_alloc(64, (count * bench->ops->act_bytes + 63) / 64 * 64);
    uint32_t seed = 1;

    if (!p)
        exit(1);
    for (size_t i = 0; i < count; i++) { /* +-(0.5 … 1): random bits, no extremes */
        const float value = (float)((seed = seed * 1664525u + 1013904223u) >> 9) / (1 << 24) + 0.5f;
        const float x = seed & 256 ? value : -value;

        if (bench->ops->precision == CLAAS_PRECISION_BF16)
            ((claas_bf16 *)p)[i] = claas_to_bf16(x);
        else
            ((float *)p)[i] = x;
    }
    return p;
}
static float *zero_floats(size_t count)
{
    float *p = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);

    if (!p)
        exit(1);
    memset(p, 0, count * sizeof(float));
    return p;
}

/* --- products --- */

static void run_gemm(const struct bench *bench, void *arg)
{
    bench->ops->gemm(bench->pool, arg);
}
static void run_dx(const struct bench *bench, void *arg)
{
    bench->ops->gemm_dx(bench->pool, arg);
}
static void run_tn(const struct bench *bench, void *arg)
{
    bench->ops->gemm_tn(bench->pool, arg);
}

static void print_rate(const struct bench *bench, const char *what, int m, int n, int k,
                       double flop, double seconds)
{
    printf("  %-10s m %4d  n %5d  k %5d  %8.3f ms  %7.1f GFLOP/s", what, m, n, k, seconds * 1e3,
           flop / seconds / 1e9);
    if (bench->peak > 0)
        printf("  %5.1f%% of peak", 100 * flop / seconds / 1e9 / bench->peak);
    printf("\n");
}

static void bench_products(const struct bench *bench, int m, int n, int k)
{
    enum { R = 16 };
    void *x = random_acts(bench, (size_t)m * k), *dy = random_acts(bench, (size_t)m * n);
    void *w =
        random_acts(bench, claas_panel_bytes(bench->ops->precision, n, k) / bench->ops->act_bytes);
    void *b =
        random_acts(bench, claas_panel_bytes(bench->ops->precision, n, R) / bench->ops->act_bytes);
    void *a =
        random_acts(bench, claas_panel_bytes(bench->ops->precision, R, k) / bench->ops->act_bytes);
    void *s = random_acts(bench, (size_t)m * R), *out = random_acts(bench, (size_t)m * n);
    float *dx = zero_floats((size_t)m * k), *g = zero_floats((size_t)R * k);
    struct claas_gemm_args plain = {
        .m = m, .n = n, .k = k, .x = x, .ldx = k, .w = w, .out = out, .ldo = n};
    struct claas_gemm_args lora = plain, down = plain;
    struct claas_gemm_dx_args back = {
        .m = m, .n = n, .k = k, .dy = dy, .ldy = n, .w = w, .dx = dx, .ldx = k};
    struct claas_gemm_tn_args tn = {
        .m = m, .r = R, .k = k, .p = s, .ldp = R, .x = x, .ldx = k, .g = g, .ldg = k, .scale = 1};

    lora.lora_s = s, lora.lds = R, lora.lora_b = b, lora.r = R;
    down.n = R, down.w = a, down.out = s, down.ldo = R;
    print_rate(bench, "gemm", m, n, k, 2.0 * m * n * k, best_of(bench, run_gemm, &plain));
    print_rate(bench, "gemm+lora", m, n, k, 2.0 * m * n * (k + R), best_of(bench, run_gemm, &lora));
    print_rate(bench, "gemm_dx", m, n, k, 2.0 * m * n * k, best_of(bench, run_dx, &back));
    print_rate(bench, "lora A", m, R, k, 2.0 * m * R * k, best_of(bench, run_gemm, &down));
    print_rate(bench, "gemm_tn", m, R, k, 2.0 * m * R * k, best_of(bench, run_tn, &tn));
    free(x), free(dy), free(w), free(b), free(a), free(s), free(out), free(dx), free(g);
}

/* --- attention --- */

static void run_attention(const struct bench *bench, void *arg)
{
    bench->ops->attention(bench->pool, arg);
}
static void run_attention_bwd(const struct bench *bench, void *arg)
{
    bench->ops->attention_bwd(bench->pool, arg);
}

static void bench_attention(const struct bench *bench, int count)
{
    enum { HEADS = 9, KV = 3, D = 64 };
    const int n_blocks = (count + 15) / 16, width = HEADS * D;
    const size_t block_bytes = claas_kv_block_bytes(bench->ops->precision, D);
    void *kv = random_acts(bench, (size_t)n_blocks * KV * block_bytes / bench->ops->act_bytes);
    void *q = random_acts(bench, (size_t)count * width),
         *dout = random_acts(bench, (size_t)count * width);
    void *out = random_acts(bench, (size_t)count * width);
    float *lse = zero_floats((size_t)count * HEADS), *dq = zero_floats((size_t)count * width);
    float *dk = zero_floats((size_t)count * KV * D), *dv = zero_floats((size_t)count * KV * D);
    int32_t *blocks = malloc((size_t)n_blocks * 4);
    struct claas_attn_run run = {.count = count,
                                 .blocks = blocks,
                                 .q = q,
                                 .ldq = width,
                                 .out = out,
                                 .ldo = width,
                                 .lse = lse};
    struct claas_attn_args args = {.heads = HEADS,
                                   .kv_heads = KV,
                                   .head_dim = D,
                                   .scale = 0.125f,
                                   .kv = kv,
                                   .kv_block_bytes = block_bytes,
                                   .runs = &run,
                                   .n_runs = 1};
    struct claas_attn_bwd_args back = {.heads = HEADS,
                                       .kv_heads = KV,
                                       .head_dim = D,
                                       .scale = 0.125f,
                                       .kv = kv,
                                       .kv_block_bytes = block_bytes,
                                       .count = count,
                                       .blocks = blocks,
                                       .q = q,
                                       .out = out,
                                       .ldq = width,
                                       .ldo = width,
                                       .lse = lse,
                                       .dout = dout,
                                       .lddo = width,
                                       .dq = dq,
                                       .lddq = width,
                                       .dk = dk,
                                       .dv = dv,
                                       .lddkv = KV * D};
    const double flop = 2.0 * count * count * D * HEADS; /* causal: half of 2 products of 2 flop */

    if (!blocks)
        exit(1);
    for (int i = 0; i < n_blocks; i++)
        blocks[i] = i;
    print_rate(bench, "attention", count, HEADS, D, flop, best_of(bench, run_attention, &args));
    print_rate(bench, "  backward", count, HEADS, D, 2.5 * flop,
               best_of(bench, run_attention_bwd, &back));
    run = (struct claas_attn_run){.count = 1,
                                  .pos = count - 1,
                                  .blocks = blocks,
                                  .q = q,
                                  .ldq = width,
                                  .out = out,
                                  .ldo = width};
    print_rate(bench, "  decode", 1, HEADS, D, 4.0 * count * D * HEADS,
               best_of(bench, run_attention, &args));
    free(kv), free(q), free(dout), free(out), free(lse), free(dq), free(dk), free(dv), free(blocks);
}

/* --- row operations --- */

struct rows {
    int m;
    void *x, *y;
    float *w, *g, *g2, *rstd;
};
static void run_rmsnorm(const struct bench *bench, void *arg)
{
    struct rows *r = arg;

    bench->ops->rmsnorm(bench->pool, r->m, 576, r->x, 576, r->w, 1e-5f, r->y, 576, r->rstd);
}
static void run_swiglu(const struct bench *bench, void *arg)
{
    struct rows *r = arg;

    bench->ops->swiglu(bench->pool, r->m, 1536, r->x, 3072, r->y, 1536);
}
static void run_swiglu_bwd(const struct bench *bench, void *arg)
{
    struct rows *r = arg;

    bench->ops->swiglu_bwd(bench->pool, r->m, 1536, r->x, 3072, r->g, 1536, r->y, 3072, NULL, 0);
}
static void run_adamw(const struct bench *bench, void *arg)
{
    struct rows *r = arg;
    const struct claas_adamw_args args = {.count = (size_t)r->m * 1536,
                                          .parameters = r->g,
                                          .exp_avg = r->g2,
                                          .exp_avg_sq = r->w,
                                          .grad = r->rstd,
                                          .grad_scale = 1,
                                          .rate = 1e-5f,
                                          .beta1 = 0.9f,
                                          .beta2 = 0.999f,
                                          .eps = 1e-8f,
                                          .step = 1};

    bench->ops->adamw(bench->pool, &args);
}

static void bench_rows(const struct bench *bench, int m)
{
    const size_t n = (size_t)m * 3072;
    struct rows r = {m,
                     random_acts(bench, n),
                     random_acts(bench, n),
                     zero_floats(n),
                     zero_floats(n),
                     zero_floats(n),
                     zero_floats(n)};
    const struct {
        const char *name;
        bench_fn *call;
        double elements;
    } all[] = {{"rmsnorm", run_rmsnorm, 576.0 * m},
               {"swiglu", run_swiglu, 1536.0 * m},
               {"swiglu_bwd", run_swiglu_bwd, 1536.0 * m},
               {"adamw", run_adamw, 1536.0 * m}};

    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        const double seconds = best_of(bench, all[i].call, &r);

        printf("  %-10s m %4d  %8.3f ms  %6.2f G elements/s\n", all[i].name, m, seconds * 1e3,
               all[i].elements / seconds / 1e9);
    }
    free(r.x), free(r.y), free(r.w), free(r.g), free(r.g2), free(r.rstd);
}

/* --- decoding: all weights of the model once, a few rows --- */

struct weight {
    int n, k;
    void *panels;
    struct claas_blocks *blocks;
    size_t panel_bytes, block_bytes;
};
#define LAYERS  30
#define WEIGHTS (LAYERS * 4 + 1)
struct decode {
    struct weight weights[WEIGHTS];
    int m;
    bool from_blocks;
    void *x, *out;
    float *out32;
};

static void run_decode(const struct bench *bench, void *arg)
{
    const struct decode *d = arg;

    for (int i = 0; i < WEIGHTS; i++) {
        const struct weight *w = &d->weights[i];
        const bool head = i == WEIGHTS - 1;
        const struct claas_gemm_args args = {.m = d->m,
                                             .n = w->n,
                                             .k = w->k,
                                             .x = d->x,
                                             .ldx = w->k,
                                             .w = w->panels,
                                             .blocks = d->from_blocks ? w->blocks : NULL,
                                             .out = head ? NULL : d->out,
                                             .out32 = head ? d->out32 : NULL,
                                             .ldo = w->n};

        bench->ops->gemm(bench->pool, &args);
    }
}

struct read_job {
    const char *data;
    size_t bytes;
};
#define READ_PARTS 64
static void read_part(void *arg, int index)
{
    const struct read_job *job = arg;
    const uint64_t *p = (const uint64_t *)(job->data + job->bytes / READ_PARTS * (size_t)index);
    uint64_t sum[8] = {0};

    for (size_t i = 0; i + 8 <= job->bytes / READ_PARTS / 8; i += 8)
        for (int j = 0; j < 8; j++)
            sum[j] += p[i + j];
    peak_sink = (float)(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}
static void run_read(const struct bench *bench, void *arg)
{
    claas_pool_run(bench->pool, READ_PARTS, read_part, arg);
}

/* A tensor of random blocks with sane scales. */
static void make_blocks(struct weight *w, enum claas_tensor_type type)
{
    struct claas_tensor tensor = {.type = type, .rows = w->n, .columns = w->k};
    const size_t block = type == CLAAS_TYPE_Q4_1 ? 20 : type == CLAAS_TYPE_Q4_0 ? 18 : 34;
    unsigned char *data = NULL;
    uint32_t seed = 7;

    tensor.bytes = (size_t)w->n * (size_t)(w->k / 32) * block;
    data = malloc(tensor.bytes);
    if (!data)
        exit(1);
    for (size_t i = 0; i < tensor.bytes; i++) {
        const size_t at = i % block;

        data[i] = (unsigned char)((seed = seed * 1664525u + 1013904223u) >> 24);
        if (at == 1 || (type == CLAAS_TYPE_Q4_1 && at == 3))
            data[i] = 0x20; /* float16 near 0.008 */
    }
    tensor.data = data;
    if (claas_blocks_new(&tensor, &w->blocks) < 0)
        exit(1);
    w->block_bytes = claas_blocks_bytes(w->blocks);
    free(data);
}

static void bench_decode(const struct bench *bench)
{
    static const int shapes[5][2] = {
        {960, 576}, {576, 576}, {3072, 576}, {576, 1536}, {49152, 576}};
    static struct decode d;
    size_t panel_bytes = 0, block_bytes = 0;
    struct read_job read = {0};
    double seconds = 0;

    d.x = random_acts(bench, 16 * 1536);
    d.out = random_acts(bench, 16 * 3072);
    d.out32 = zero_floats(16 * 49152);
    for (int i = 0; i < WEIGHTS; i++) {
        struct weight *w = &d.weights[i];
        const int *shape = i == WEIGHTS - 1 ? shapes[4] : shapes[i % 4];

        w->n = shape[0], w->k = shape[1];
        w->panel_bytes = claas_panel_bytes(bench->ops->precision, w->n, w->k);
        w->panels = random_acts(bench, w->panel_bytes / bench->ops->act_bytes);
        if (bench->ops->precision == CLAAS_PRECISION_BF16)
            make_blocks(w, i == WEIGHTS - 1 ? CLAAS_TYPE_Q8_0 : CLAAS_TYPE_Q4_1);
        panel_bytes += w->panel_bytes, block_bytes += w->block_bytes;
    }
    read.data = d.weights[WEIGHTS - 1].panels, read.bytes = d.weights[WEIGHTS - 1].panel_bytes;
    printf("  reading memory: %.1f GB/s\n",
           (double)read.bytes / best_of(bench, run_read, &read) / 1e9);
    for (d.m = 1; d.m <= 16; d.m *= 2)
        for (int from_blocks = 0; from_blocks < (block_bytes ? 2 : 1); from_blocks++) {
            d.from_blocks = from_blocks;
            seconds = best_of(bench, run_decode, &d);
            printf("  decode m %2d from %s  %8.3f ms  %6.1f GB/s\n", d.m,
                   from_blocks ? "blocks" : "panels", seconds * 1e3,
                   (double)(from_blocks ? block_bytes : panel_bytes) / seconds / 1e9);
        }
    for (int i = 0; i < WEIGHTS; i++) {
        free(d.weights[i].panels);
        claas_blocks_free(&d.weights[i].blocks);
    }
    free(d.x), free(d.out), free(d.out32);
}

int main(int argc, char **argv)
{
    const int threads = argc > 1 ? atoi(argv[1]) : 0;
    const char *wanted = argc > 2 ? argv[2] : NULL;
    const char *part = argc > 3 ? argv[3] : "pard";
    struct bench bench = {0};

    if (claas_pool_new(threads, &bench.pool) < 0)
        return 1;
    bench.threads = claas_pool_threads(bench.pool);
    if (bench.threads == 1)
        bench_clock = CLOCK_THREAD_CPUTIME_ID;
    for (int precision = 0; precision < 2; precision++)
        for (int i = 0; (bench.ops = claas_ops_at((enum claas_precision)precision, i)); i++) {
            if (wanted ? strcmp(wanted, bench.ops->name) != 0
                       : bench.ops != claas_ops_pick((enum claas_precision)precision))
                continue;
            bench.peak = measure_peak(&bench);
            printf("%s, %d threads: peak %.1f GFLOP/s\n", bench.ops->name, bench.threads,
                   bench.peak);
            for (int m = 128; strchr(part, 'p') && m <= 512; m *= 4) {
                bench_products(&bench, m, 960, 576);
                bench_products(&bench, m, 576, 576);
                bench_products(&bench, m, 3072, 576);
                bench_products(&bench, m, 576, 1536);
                bench_products(&bench, m, 49152, 576);
            }
            for (int count = 128; strchr(part, 'a') && count <= 2048; count *= 4)
                bench_attention(&bench, count);
            if (strchr(part, 'r'))
                bench_rows(&bench, 256);
            if (strchr(part, 'd'))
                bench_decode(&bench);
        }
    claas_pool_free(&bench.pool);
    return 0;
}
