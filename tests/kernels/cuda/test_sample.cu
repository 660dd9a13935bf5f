/* cuda/sample.cu against cpu/sample.c: the same tokens for the same logits, seeds and filters, over
 * rows of every length, flat and peaked, with ties and impossible tokens; greedy choice, scored
 * tokens, alternatives, log-probs; rows that are not finite.
 *
 * Where the CPU's sum of doubles and the device's of integers fall on either side of a border,
 * tokens may differ. A difference is counted, and forgiven once in a thousand draws if the draw is
 * shown to lie on a border: in doubles, and in the order of the logits, the device's token is drawn
 * for a number within 1e-6 of u and a top-p within 1e-6 of what was asked for. */
#include "cuda_check.h"

#include "cuda/cuda_loss.h"
#include "cuda/sample.h"

#define _Atomic /* C only; the layout is the same */
extern "C" {
#include "cpu/step.h"
}
#include "claas/random.h"

static claas_backend_t cpu; /* what claas_cpu_sample uses of it */

static void cpu_open(int vocab)
{
    cpu.model.config.vocab = vocab;
    cpu.forward.sampling = (uint8_t *)check_alloc(claas_cpu_sample_bytes(vocab), 1);
}

static void cpu_close(void)
{
    free(cpu.forward.sampling);
}

struct batch {
    int vocab, m;
    struct check_array logits;
    struct claas_sample *want, *got;
};

static struct batch batch_new(int vocab, int m, float spread)
{
    struct batch b = {};

    b.vocab = vocab;
    b.m = m;
    b.logits = check_acts(CUDA_TYPE_F32, (size_t)vocab * (size_t)m, spread);
    b.want = (struct claas_sample *)check_alloc((size_t)m, sizeof(*b.want));
    b.got = (struct claas_sample *)check_alloc((size_t)m, sizeof(*b.got));
    for (int i = 0; i < m; i++) {
        b.want[i].given = -1;
        b.want[i].temperature = 1;
        b.want[i].top_p = 1;
        b.want[i].seed = check_bits();
        b.want[i].index = (uint64_t)i << (i % 40);
    }
    cpu_open(vocab);
    return b;
}

static void batch_free(struct batch *b)
{
    cpu_close();
    check_free(&b->logits, "logits");
    free(b->want);
    free(b->got);
}

/* b->want holds the requests; both sides fill their results. */
static void run_both(struct cuda_context *context, struct batch *b)
{
    size_t bytes = (size_t)b->m * sizeof(*b->got);
    struct check_buffer device = check_buffer_new(bytes);
    struct claas_sample *staging = NULL;

    check_cuda(cudaMallocHost((void **)&staging, bytes), "pinned memory");
    memcpy(b->got, b->want, bytes);
    check_rc(cuda_sample(context, b->vocab, b->m, (const float *)b->logits.data, b->got, staging,
                         (struct claas_sample *)device.data),
             "cuda_sample");
    claas_cpu_sample(&cpu, b->m, b->logits.host, b->want);
    check_cuda(cudaFreeHost(staging), "pinned memory");
    check_buffer_free(&device, "samples");
}

/* --- forgiven differences --- */

static struct {
    int draws, differences;
} tally;

struct candidate {
    float p, logit;
    int id;
};

static int compare_candidates(const void *a, const void *b)
{
    const struct candidate *x = (const struct candidate *)a, *y = (const struct candidate *)b;

    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

/* The mass of the shortest list of `most` candidates at most that holds `share` of the sum. */
static double kept_mass(const struct candidate *list, int most, double share, double sum)
{
    double kept = 0;

    for (int v = 0; v < most && kept < share * sum; v++)
        kept += (double)list[v].p;
    return kept;
}

/* Whether the device's token is drawn for a number within 1e-6 of u from the list as asked for, or
 * from one for a top-p 1e-6 lower or higher: the token's interval, in doubles, touches that of the
 * numbers. */
static bool is_near(const struct batch *b, int row)
{
    const struct claas_sample *s = &b->want[row];
    const float *z = b->logits.host + (size_t)row * (size_t)b->vocab;
    struct candidate *list = (struct candidate *)check_alloc((size_t)b->vocab, sizeof(*list));
    bool filtered = s->top_p < 1 || (s->top_k > 0 && s->top_k < b->vocab), near = false;
    int most = s->top_k > 0 && s->top_k < b->vocab ? s->top_k : b->vocab;
    double u = (double)claas_random_uniform(s->seed, 1, s->index), sum = 0, below = 0;
    float max = -INFINITY;

    for (int v = 0; v < b->vocab; v++)
        max = z[v] > max ? z[v] : max;
    for (int v = 0; v < b->vocab; v++) {
        list[v].p = expf((z[v] - max) / s->temperature);
        list[v].logit = z[v];
        list[v].id = v;
        sum += (double)list[v].p;
    }
    if (filtered)
        qsort(list, (size_t)b->vocab, sizeof(*list), compare_candidates);
    for (int v = 0; v < b->vocab; v++) {
        const double above = below + (double)list[v].p;

        for (int edge = -1; edge <= 1 && list[v].id == b->got[row].token; edge++) {
            const double share = s->top_p >= 1 ? 2 : (double)s->top_p * (1 + 1e-6 * edge);
            const double kept = kept_mass(list, most, share, sum);

            near = near || (below <= (u + 1e-6) * kept && above >= (u - 1e-6) * kept);
        }
        below = above;
    }
    free(list);
    return near;
}

static void compare(const struct batch *b)
{
    for (int i = 0; i < b->m; i++) {
        const struct claas_sample *got = &b->got[i], *want = &b->want[i];

        tally.draws++;
        if (got->token != want->token) {
            tally.differences++;
            if (got->token < 0 || got->token >= b->vocab || !is_near(b, i))
                check_fail("row %d of V %d: T %g, top-k %d, top-p %g: token %d, want %d", i,
                           b->vocab, (double)want->temperature, want->top_k, (double)want->top_p,
                           got->token, want->token);
        } else if (want->token >= 0 && !(fabsf(got->logprob - want->logprob) <= 5e-6F)) {
            check_fail("row %d of V %d: log-prob %.9g, want %.9g", i, b->vocab,
                       (double)got->logprob, (double)want->logprob);
        }
    }
}

static void finish_tally(void)
{
    if (!(tally.differences <= 1 + tally.draws / 1000))
        check_fail("%d of %d tokens differ from the CPU's", tally.differences, tally.draws);
    check_end();
    if (tally.differences > 0)
        printf("   (%d of %d tokens fell on a border)\n", tally.differences, tally.draws);
    tally.draws = tally.differences = 0;
}

/* --- cases --- */

static const int vocabs[] = {1, 2, 5, 33, 512, 1001, 8191, 8192, 20003, 49152, 151936};
#define VOCABS ((int)(sizeof(vocabs) / sizeof(vocabs[0])))

static void set_filter(struct batch *b, int filter, int round)
{
    static const float temperatures[] = {1, 0.7F, 1.5F, 0.2F};
    static const float shares[] = {0.9F, 0.5F, 0.999F, 0.01F, 1e-6F};
    static const int counts[] = {50, 2, 5, 1000, 100000};

    for (int i = 0; i < b->m; i++) {
        b->want[i].temperature = temperatures[(i + round) % 4];
        if (filter & 1)
            b->want[i].top_p = shares[(i + round / 2) % 5];
        if (filter & 2)
            b->want[i].top_k = counts[(i / 2 + round) % 5];
    }
}

static void test_draws(struct cuda_context *context)
{
    static const char *const names[] = {"no filter", "top-p", "top-k", "top-k and top-p"};
    static const float spreads[] = {0.01F, 1, 3, 10};

    for (int filter = 0; filter < 4; filter++) {
        check_begin("draws, %s", names[filter]);
        for (int i = 0; i < 4 * VOCABS; i++) {
            int vocab = vocabs[i / 4], m = vocab > 10000 ? 8 : 40;
            const bool between = i % 4 == 1 || i % 4 == 2; /* flat and peaked rows stay */
            struct batch b;

            if (check_leaves_out((double)vocab * m, between ? 0 : CHECK_SMALL_ROWS) ||
                check_elsewhere())
                continue;
            b = batch_new(vocab, m, spreads[i % 4]);
            set_filter(&b, filter, i);
            run_both(context, &b);
            compare(&b);
            batch_free(&b);
        }
        finish_tally();
    }
}

/* Whole numbers have many equals: filters end among them. Half of the tokens are impossible. */
static void test_ties(struct cuda_context *context)
{
    check_begin("draws among equals and impossible tokens");
    for (int i = 0; i < 4 * VOCABS; i++) {
        int vocab = vocabs[i / 4], m = vocab > 10000 ? 4 : 20;
        struct batch b;

        if (check_leaves_out((double)vocab * m, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocab, m, 1);
        for (size_t v = 0; v < b.logits.count; v++)
            b.logits.host[v] = v % (size_t)vocab && check_below(2) ? -INFINITY
                               : v % 5                             ? rintf(b.logits.host[v])
                                                                   : -0.0F;
        check_put(&b.logits);
        set_filter(&b, i % 4, i / 4);
        run_both(context, &b);
        compare(&b);
        batch_free(&b);
    }
    finish_tally();
}

static void test_greedy(struct cuda_context *context)
{
    check_begin("greedy takes the first of the best");
    for (int i = 0; i < 3 * VOCABS; i++) {
        int vocab = vocabs[i / 3];
        struct batch b;

        if (check_leaves_out(vocab * 6.0, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocab, 6, 1);
        for (size_t v = 0; i % 3 && v < b.logits.count; v++)
            b.logits.host[v] = i % 3 == 1 ? rintf(b.logits.host[v]) : v % 2 ? 0.0F : -0.0F;
        check_put(&b.logits);
        for (int k = 0; k < b.m; k++) {
            b.want[k].temperature = k % 2 ? 1 : 0;
            b.want[k].top_k = 1;
        }
        run_both(context, &b);
        for (int k = 0; k < b.m; k++)
            if (b.got[k].token != b.want[k].token)
                check_fail("V %d: token %d, want %d", vocab, b.got[k].token, b.want[k].token);
        compare(&b);
        batch_free(&b);
    }
    finish_tally();
}

/* The log-probs of scored tokens are those of cuda_logprobs, bit for bit. */
static void test_given(struct cuda_context *context)
{
    check_begin("scored tokens");
    for (int i = 0; i < VOCABS; i++) {
        struct check_array out;
        int32_t tokens[5];
        struct check_buffer device;
        struct batch b;

        if (check_leaves_out(vocabs[i] * 5.0, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocabs[i], 5, 2);
        out = check_blank(CUDA_TYPE_F32, 5);
        for (int k = 0; k < b.m; k++)
            tokens[k] = b.want[k].given = k == 3 ? 0 : check_below(b.vocab);
        b.want[4].given = b.vocab; /* not a token: one is drawn */
        device = check_buffer_of(tokens, sizeof(tokens));
        run_both(context, &b);
        compare(&b);
        check_rc(cuda_logprobs(context, b.vocab, 5, (const float *)b.logits.data,
                               (const int32_t *)device.data, (float *)out.data),
                 "cuda_logprobs");
        check_get(&out);
        for (int k = 0; k < 4; k++)
            if (b.got[k].token != tokens[k] || b.got[k].logprob != out.host[k])
                check_fail("V %d: token %d with %.9g, want %d with %.9g", b.vocab, b.got[k].token,
                           (double)b.got[k].logprob, tokens[k], (double)out.host[k]);
        check_free(&out, "log-probs");
        check_buffer_free(&device, "tokens");
        batch_free(&b);
    }
    finish_tally();
}

static void test_alternatives(struct cuda_context *context)
{
    check_begin("alternatives, best first");
    for (int i = 0; i < 2 * VOCABS; i++) {
        struct batch b;

        if (check_leaves_out(vocabs[i / 2] * 4.0, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocabs[i / 2], 4, 2);
        for (size_t v = 0; i % 2 && v < b.logits.count; v++)
            b.logits.host[v] = rintf(b.logits.host[v]);
        check_put(&b.logits);
        for (int k = 0; k < b.m; k++)
            b.want[k].top_logprobs = k == 0 ? 20 : k;
        run_both(context, &b);
        compare(&b);
        for (int k = 0; k < b.m; k++)
            for (int j = 0; j < b.want[k].top_logprobs; j++) {
                float got = b.got[k].top_logprob[j], want = b.want[k].top_logprob[j];

                if (b.got[k].top_tokens[j] != b.want[k].top_tokens[j] ||
                    !(got == want || fabsf(got - want) <= 5e-6F))
                    check_fail("V %d: alternative %d is %d with %g, want %d with %g", b.vocab, j,
                               b.got[k].top_tokens[j], (double)got, b.want[k].top_tokens[j],
                               (double)want);
            }
        batch_free(&b);
    }
    finish_tally();
}

static void test_broken_rows(struct cuda_context *context)
{
    check_begin("rows that are not finite give no token");
    for (int i = 0; i < 3 * VOCABS; i++) {
        size_t first = (size_t)vocabs[i / 3];
        struct batch b;

        if (check_leaves_out(vocabs[i / 3] * 3.0, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocabs[i / 3], 3, 2);
        if (i % 3 == 2)
            for (int v = 0; v < b.vocab; v++)
                b.logits.host[first + (size_t)v] = -INFINITY;
        else
            b.logits.host[first + (size_t)check_below(b.vocab)] = i % 3 ? INFINITY : NAN;
        check_put(&b.logits);
        set_filter(&b, i % 4, i);
        run_both(context, &b);
        compare(&b);
        if (b.got[1].token != -1 || b.got[0].token < 0 || b.got[2].token < 0)
            check_fail("V %d: tokens %d %d %d", b.vocab, b.got[0].token, b.got[1].token,
                       b.got[2].token);
        batch_free(&b);
    }
    finish_tally();
}

/* Clusters of blocks, single blocks that read global memory again, unaligned rows, rows alone: the
 * same tokens and bits. */
static void test_paths(struct cuda_context *context)
{
    int arch = context->arch;

    check_begin("the same on every path");
    for (int i = 0; i < 4 * VOCABS; i++) {
        struct claas_sample first[3];
        struct batch b, other;

        if (check_leaves_out(vocabs[i / 4] * 3.0, CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        other = b = batch_new(vocabs[i / 4], 3, 1);
        set_filter(&b, i % 4, i);
        b.want[1].top_logprobs = 3;
        memcpy(first, b.want, sizeof(first));
        run_both(context, &b);
        memcpy(other.want, first, sizeof(first));
        memcpy(first, b.got, sizeof(first));
        check_shift = 4;
        other.logits = check_copy_of(CUDA_TYPE_F32, b.logits.host, b.logits.count);
        check_shift = 0;
        context->arch = 80;
        run_both(context, &other);
        context->arch = arch;
        check_same("single blocks, unaligned", other.got, first, sizeof(first));
        check_free(&other.logits, "logits");
        other.logits = b.logits;
        other.m = 1;
        run_both(context, &other);
        check_same("alone", other.got, first, sizeof(first[0]));
        batch_free(&b);
    }
    check_end();
}

/* --- time --- */

static void time_sample(struct cuda_context *context, int vocab, int m, float top_p,
                        int top_logprobs)
{
    struct batch b = batch_new(vocab, m, 2.5F);
    struct check_buffer device = check_buffer_new((size_t)m * sizeof(*b.got));
    struct claas_sample *staging = NULL;
    char what[96];
    float ms;

    check_cuda(cudaMallocHost((void **)&staging, (size_t)m * sizeof(*staging)), "pinned memory");
    for (int i = 0; i < m; i++) {
        b.want[i].temperature = top_p > 0 ? 1 : 0;
        b.want[i].top_p = top_p;
        b.want[i].top_logprobs = top_logprobs;
    }
    ms = check_median_ms(context, [&] {
        check_rc(cuda_sample(context, vocab, m, (const float *)b.logits.data, b.want, staging,
                             (struct claas_sample *)device.data),
                 "cuda_sample");
    });
    snprintf(what, sizeof(what), "%s, %d alternatives [%d][%d]",
             top_p == 0  ? "greedy"
             : top_p < 1 ? "nucleus"
                         : "sample",
             top_logprobs, m, vocab);
    check_report(what, ms, (double)b.logits.count * 4, 0);
    check_cuda(cudaFreeHost(staging), "pinned memory");
    check_buffer_free(&device, "samples");
    batch_free(&b);
}

/* --no-timing: no measurements. */
int main(int argc, char **argv)
{
    bool fast = !check_measures() || (argc > 1 && strcmp(argv[1], "--no-timing") == 0);
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    if (claas_pool_new(1, &cpu.pool) < 0)
        return 1;
    test_draws(&context);
    test_ties(&context);
    test_greedy(&context);
    test_given(&context);
    test_alternatives(&context);
    test_broken_rows(&context);
    test_paths(&context);
    for (int i = 0; !fast && i < 4; i++) {
        int vocab = i % 2 ? 151936 : 49152, m = i / 2 ? 64 : 1;

        time_sample(&context, vocab, m, 0, 0);
        time_sample(&context, vocab, m, 1, 0);
        time_sample(&context, vocab, m, 0.9F, 0);
        time_sample(&context, vocab, m, 0, 20);
    }
    claas_pool_free(&cpu.pool);
    cuda_context_close(&context);
    return check_finish();
}
