/* cuda/loss.cu against the C code of kernels/sdpo, which has the golden values behind it, and for
 * the whole vocabulary against doubles: all variants, shapes that fit nothing, ties, one-hot rows,
 * -inf and NaN, rows without teacher, clusters of blocks and single blocks, one row after another.
 *
 * To be linked with kernels/sdpo, rows.c there once per instruction set. */
#include "cuda_check.h"

#include "cuda/cuda_loss.h"

static const char *const variant_names[] = {"full", "student_topk_tail", "teacher_topk"};
static const float alphas[] = {0.0F, 0.1F, 0.5F, 0.9F, 1.0F};
#define ALPHAS 5

/* Under a tool that watches every access: 0.1 and 0.9 take 0.5's way through the kernels. */
static bool leaves_out_alpha(int k)
{
    return k % 2 == 1 && check_leaves_out(1, 0);
}

/* Rows of one call, on both sides. */
struct batch {
    int vocab, rows;
    double rounding; /* what a gradient may be off, whatever its size */
    struct check_array student, teacher;
    struct cuda_loss_position *positions;
    struct check_buffer device_positions;
    struct claas_loss_result *want, *got;
    double *grad;               /* as sdpo has it */
    struct check_array dlogits; /* got */
};

static int32_t a_token(int vocab)
{
    return (int32_t)check_below(vocab);
}

/* Logits of every scale; a rollout's and a base's log-prob near the student's; every fourth row has
 * no rollout, the third row no teacher. */
static struct batch batch_new(int vocab, int rows, float spread)
{
    struct batch b = {};
    size_t count = (size_t)vocab * (size_t)rows;

    b.vocab = vocab;
    b.rows = rows;
    b.rounding = 1e-7;
    b.student = check_acts(CUDA_TYPE_F32, count, spread);
    b.teacher = check_acts(CUDA_TYPE_F32, count, spread);
    b.positions = (struct cuda_loss_position *)check_alloc((size_t)rows, sizeof(*b.positions));
    b.want = (struct claas_loss_result *)check_alloc((size_t)rows, sizeof(*b.want));
    b.got = (struct claas_loss_result *)check_alloc((size_t)rows, sizeof(*b.got));
    b.grad = (double *)check_alloc(count, sizeof(double));
    for (int i = 0; i < rows; i++) {
        struct cuda_loss_position *p = &b.positions[i];
        const float *z = b.student.host + (size_t)i * (size_t)vocab;
        float logprob;

        p->token = a_token(vocab);
        logprob = z[p->token] - claas_logsumexp(z, vocab);
        p->rollout = i % 4 == 3 ? NAN : logprob + 0.5F * check_random();
        p->base = logprob + 0.5F * check_random();
        p->weight = 0.25F + (float)(i % 3);
        p->teacher = i != 2;
    }
    b.device_positions = check_buffer_new((size_t)rows * sizeof(*b.positions));
    return b;
}

static void batch_free(struct batch *b)
{
    check_free(&b->student, "student");
    check_free(&b->teacher, "teacher");
    check_buffer_free(&b->device_positions, "positions");
    free(b->positions);
    free(b->want);
    free(b->got);
    free(b->grad);
}

static void run_reference(const struct claas_loss_config *config, struct batch *b)
{
    float *scratch = NULL;
    float *grad = (float *)check_alloc((size_t)b->vocab, sizeof(float));

    if (posix_memalign((void **)&scratch, 64, claas_loss_scratch_floats(b->vocab) * sizeof(float)))
        exit(1);
    for (int i = 0; i < b->rows; i++) {
        size_t first = (size_t)i * (size_t)b->vocab;
        const struct cuda_loss_position *p = &b->positions[i];
        struct claas_loss_row row = {};

        row.student_logits = b->student.host + first;
        row.teacher_logits = (p->teacher ? b->teacher.host : b->student.host) + first;
        row.token = p->token;
        row.rollout_logprob = p->rollout;
        row.base_logprob = p->base;
        check_rc(claas_loss_row(config, b->vocab, &row, p->weight, grad, scratch, &b->want[i]),
                 "claas_loss_row");
        if (!p->teacher)
            b->want[i].divergence = NAN;
        for (int v = 0; v < b->vocab; v++)
            b->grad[first + (size_t)v] = grad[v];
    }
    free(scratch);
    free(grad);
}

/* Results into b->got; the gradient, if wanted, into b->dlogits (the caller frees it). */
static void run_device(struct cuda_context *context, const struct claas_loss_config *config,
                       struct batch *b, bool gradient)
{
    struct check_buffer results = check_buffer_new((size_t)b->rows * sizeof(*b->got));

    check_upload(&b->device_positions, b->positions);
    if (gradient)
        b->dlogits = check_blank(context->act, b->student.count);
    check_rc(cuda_loss(context, config, b->vocab, b->rows, (const float *)b->student.data,
                       (const float *)b->teacher.data,
                       (const struct cuda_loss_position *)b->device_positions.data,
                       gradient ? b->dlogits.data : NULL,
                       (struct claas_loss_result *)results.data),
             "cuda_loss");
    check_download(&results, b->got);
    if (gradient)
        check_get(&b->dlogits);
    check_buffer_free(&results, "results");
}

static void check_field(const char *name, int row, float got, float want, double limit)
{
    double scale = fabs((double)want) > 1 ? fabs((double)want) : 1;

    if (isnan(want) ? !isnan(got)
                    : !(got == want || fabs((double)got - (double)want) <= limit * scale))
        check_fail("%s of row %d: got %.9g, want %.9g", name, row, (double)got, (double)want);
}

static void compare_results(const struct batch *b)
{
    for (int i = 0; i < b->rows; i++) {
        const struct claas_loss_result *got = &b->got[i], *want = &b->want[i];

        check_field("loss", i, got->loss, want->loss, 1e-5);
        check_field("divergence", i, got->divergence, want->divergence, 1e-5);
        check_field("ratio", i, got->ratio, want->ratio, 1e-5);
        check_field("clipped", i, got->clipped, want->clipped, 0);
        check_field("kl_base", i, got->kl_base, want->kl_base, 1e-5);
        check_field("logprob", i, got->logprob, want->logprob, 5e-6); /* an ulp of lse */
        check_field("entropy", i, got->entropy, want->entropy, 1e-5);
        check_field("forward_kl", i, got->forward_kl, want->forward_kl, 1e-5);
    }
}

/* Relative to the rows together, and absolute: below b->rounding per row a gradient is what is left
 * of larger terms. */
static void compare_gradients(const struct batch *b, double limit)
{
    double off = 0, all = 0;

    for (size_t i = 0; i < b->student.count; i++) {
        double gap = (double)b->dlogits.host[i] - b->grad[i];

        off += gap * gap;
        all += b->grad[i] * b->grad[i];
    }
    if (!(sqrt(off) <= limit * sqrt(all) + b->rounding * sqrt(b->rows)))
        check_fail("gradient: error %.3g, norm %.3g", sqrt(off), sqrt(all));
}

static void check_batch(struct cuda_context *context, const struct claas_loss_config *config,
                        struct batch *b)
{
    run_reference(config, b);
    run_device(context, config, b, true);
    compare_results(b);
    compare_gradients(b, check_limit(context->act));
    check_free(&b->dlogits, "dlogits");
}

static struct claas_loss_config a_config(int variant, float alpha, int top_k)
{
    struct claas_loss_config config = {};

    config.variant = (enum claas_loss_variant)variant;
    config.alpha = alpha;
    config.top_k = top_k;
    config.is_clip = 1.2F;
    config.kl_weight = 0.3F;
    return config;
}

/* --- random rows --- */

static void test_shapes(struct cuda_context *context)
{
    static const int vocabs[] = {1,    2,    3,    7,     33,    130,   1000,
                                 4097, 9000, 8191, 32000, 49152, 49157, 151936};

    for (int variant = 0; variant < 3; variant++) {
        check_begin("%s by shape, %s", variant_names[variant], check_name(context->act));
        for (size_t i = 0; i < sizeof(vocabs) / sizeof(vocabs[0]); i++) {
            int rows = vocabs[i] > 10000 ? 3 : 5;
            struct batch b;

            if (check_leaves_out((double)vocabs[i] * rows, CHECK_SMALL_ROWS))
                continue;
            b = batch_new(vocabs[i], rows, 2.5F);
            for (int k = 0; k < ALPHAS; k++) {
                struct claas_loss_config config =
                    a_config(variant, alphas[k], vocabs[i] > 100 ? 100 : 3);

                if (leaves_out_alpha(k) || check_elsewhere())
                    continue;
                config.reference_k3 = i % 2 == 0;
                check_batch(context, &config, &b);
                config.is_clip = 0;
                config.kl_weight = 0;
                check_batch(context, &config, &b);
            }
            batch_free(&b);
        }
        check_end();
    }
}

/* K from 1 to beyond V; logits that are whole numbers, so that the K-th has many equals. */
static void test_selection(struct cuda_context *context)
{
    static const int vocabs[] = {5, 300, 9001, 49152};
    static const int counts[] = {1, 2, 5, 20, 299, 300, 5000, 60000};

    for (int variant = 1; variant < 3; variant++) {
        check_begin("%s by K, with ties, %s", variant_names[variant], check_name(context->act));
        for (size_t i = 0; i < 4 * 8; i++) {
            struct claas_loss_config config = a_config(variant, i % 3 ? 0.5F : 1.0F, counts[i % 8]);
            struct batch b;

            if (check_leaves_out(vocabs[i / 8] * 2.0, CHECK_SMALL_ROWS) || check_elsewhere())
                continue;
            b = batch_new(vocabs[i / 8], 2, 1.5F);
            for (size_t v = 0; v < b.student.count; v++) {
                b.student.host[v] = rintf(b.student.host[v]);
                b.teacher.host[v] = v % 3 ? rintf(b.teacher.host[v]) : -0.0F;
            }
            check_put(&b.student);
            check_put(&b.teacher);
            check_batch(context, &config, &b);
            batch_free(&b);
        }
        check_end();
    }
}

/* --- against doubles --- */

static void log_softmax(const float *z, int n, double *ret)
{
    double max = -INFINITY, sum = 0;

    for (int i = 0; i < n; i++)
        max = (double)z[i] > max ? (double)z[i] : max;
    for (int i = 0; i < n; i++)
        sum += exp((double)z[i] - max);
    for (int i = 0; i < n; i++)
        ret[i] = (double)z[i] - max - log(sum);
}

/* D; grad[v] = dD/dz_v. */
static double plain_divergence(int n, double alpha, const double *s, const double *t, double *grad)
{
    double sum = 0, center = 0;

    for (int v = 0; v < n; v++) {
        double m = log((1 - alpha) * exp(s[v]) + alpha * exp(t[v]));

        if (alpha == 0) {
            sum += exp(t[v]) * (t[v] - s[v]);
            grad[v] = -exp(t[v]);
        } else if (alpha == 1) {
            sum += exp(s[v]) * (s[v] - t[v]);
            grad[v] = exp(s[v]) * (s[v] - t[v]);
        } else {
            sum += (1 - alpha) * exp(s[v]) * (s[v] - m) + alpha * exp(t[v]) * (t[v] - m);
            grad[v] = (1 - alpha) * exp(s[v]) * (s[v] - m);
        }
        center += grad[v];
    }
    for (int v = 0; v < n; v++)
        grad[v] -= exp(s[v]) * center;
    return sum;
}

/* nearness: of the teacher to the student; 0: unrelated. */
static void check_plain(struct cuda_context *context, int vocab, float nearness)
{
    struct batch b = batch_new(vocab, 1, 3.0F);
    double *s = (double *)check_alloc((size_t)vocab, sizeof(double));
    double *t = (double *)check_alloc((size_t)vocab, sizeof(double));

    for (int v = 0; nearness > 0 && v < vocab; v++)
        b.teacher.host[v] = b.student.host[v] + nearness * check_random();
    check_put(&b.teacher);
    log_softmax(b.student.host, vocab, s);
    log_softmax(b.teacher.host, vocab, t);
    b.positions[0].weight = 1;
    for (int k = 0; k < ALPHAS; k++) {
        struct claas_loss_config config = {};
        double want;

        if (leaves_out_alpha(k) || check_elsewhere())
            continue;
        want = plain_divergence(vocab, (double)alphas[k], s, t, b.grad);
        config.alpha = alphas[k];
        run_device(context, &config, &b, true);
        if (!(fabs((double)b.got[0].divergence - want) <= 1e-6 * fabs(want) + 2e-7))
            check_fail("alpha %g, V %d: D is %.9g, want %.9g", (double)alphas[k], vocab,
                       (double)b.got[0].divergence, want);
        if (nearness == 0)
            compare_gradients(&b, check_limit(context->act));
        check_free(&b.dlogits, "dlogits");
    }
    free(s);
    free(t);
    batch_free(&b);
}

static void test_plain(struct cuda_context *context)
{
    check_begin("full against doubles, %s", check_name(context->act));
    check_plain(context, 1000, 0);
    check_plain(context, 49152, 0);
    if (!check_leaves_out(151936, CHECK_SMALL_ROWS))
        check_plain(context, 151936, 0);
    check_end();
    check_begin("a small divergence does not drown, %s", check_name(context->act));
    check_plain(context, 1000, 0.01F);
    check_plain(context, 49152, 0.01F);
    check_end();
}

/* --- special rows --- */

static void test_one_hot(struct cuda_context *context)
{
    static const float student[] = {18, 18, 18, 24, 70}, teacher[] = {0, 60, 0, 0, 0};

    check_begin("one-hot rows, %s", check_name(context->act));
    for (int i = 0; i < 5 * 3 * ALPHAS; i++) {
        struct claas_loss_config config = a_config(i / 5 % 3, alphas[i / 15], 5);
        struct batch b;

        if (leaves_out_alpha(i / 15) || check_elsewhere())
            continue;
        b = batch_new(40, 1, 1.0F);
        b.student.host[3] = student[i % 5];
        b.teacher.host[3] = teacher[i % 5];
        if (i % 5 >= 2)
            b.teacher.host[7] = 25;
        b.positions[0].token = 3;
        /* a x and c es, each of size D = 20, all but cancel; sdpo is off by as much, against
         * doubles */
        b.rounding = 2e-6;
        check_put(&b.student);
        check_put(&b.teacher);
        if (i % 5 < 4) {
            check_batch(context, &config, &b);
        } else { /* the others' exponentials are at float's end, where sdpo cuts them off */
            run_device(context, &config, &b, true);
            if (!isfinite(b.got[0].loss) || !isfinite(b.got[0].entropy))
                check_fail("a finite row has loss %g", (double)b.got[0].loss);
            for (int v = 0; v < 40; v++)
                if (!isfinite(b.dlogits.host[v]))
                    check_fail("gradient %d is %g", v, (double)b.dlogits.host[v]);
            check_free(&b.dlogits, "dlogits");
        }
        batch_free(&b);
    }
    check_end();
}

/* Tokens forbidden to both; then one forbidden to the student alone. */
static void test_minus_infinity(struct cuda_context *context)
{
    check_begin("logits of -inf, %s", check_name(context->act));
    for (int i = 0; i < 2 * 3 * ALPHAS; i++) {
        struct claas_loss_config config = a_config(i / 2 % 3, alphas[i / 6], 6);
        struct batch b;

        if (leaves_out_alpha(i / 6) || check_elsewhere())
            continue;
        b = batch_new(i % 2 ? 40 : 20001, 1, 2.0F);
        for (int v = 30; v < b.vocab; v++)
            if (v < 38 || v > 10000)
                b.student.host[v] = b.teacher.host[v] = -INFINITY;
        b.positions[0].token = 5;
        b.positions[0].base = b.positions[0].rollout = -2;
        check_put(&b.student);
        check_put(&b.teacher);
        check_batch(context, &config, &b);
        b.teacher.host[31] = 0;
        check_put(&b.teacher);
        config.variant = CLAAS_LOSS_FULL;
        run_reference(&config, &b);
        run_device(context, &config, &b, false);
        if (isfinite(b.got[0].forward_kl))
            check_fail("a forward KL of %g should be infinite", (double)b.got[0].forward_kl);
        if (isfinite(b.got[0].loss) != isfinite(b.want[0].loss))
            check_fail("alpha %g: the loss is %g, want %g", (double)config.alpha,
                       (double)b.got[0].loss, (double)b.want[0].loss);
        batch_free(&b);
    }
    check_end();
}

static void test_poison(struct cuda_context *context)
{
    check_begin("NaN and infinity are not hidden, %s", check_name(context->act));
    for (int i = 0; i < 4 * 3 * ALPHAS; i++) {
        struct claas_loss_config config = a_config(i / 4 % 3, alphas[i / 12], 4);
        struct check_array *at;
        struct batch b;

        if (leaves_out_alpha(i / 12) || check_elsewhere())
            continue;
        b = batch_new(i % 7 ? 50 : 20000, 3, 2.0F);
        at = i & 1 ? &b.student : &b.teacher;
        config.kl_weight = 0;
        b.positions[1].token = 20;
        at->host[b.vocab + check_below(b.vocab)] = i & 2 ? INFINITY : NAN;
        check_put(at);
        run_device(context, &config, &b, true);
        if (isfinite(b.got[1].loss))
            check_fail("%s alpha %g: loss %g", variant_names[config.variant], (double)config.alpha,
                       (double)b.got[1].loss);
        if (!isfinite(b.got[0].loss) || !isfinite(b.got[2].loss))
            check_fail("%s alpha %g: a neighbour is spoiled", variant_names[config.variant],
                       (double)config.alpha);
        check_free(&b.dlogits, "dlogits");
        batch_free(&b);
    }
    check_end();
}

/* --- bits --- */

static float *logprobs_of(struct cuda_context *context, const struct batch *b)
{
    struct check_array out = check_blank(CUDA_TYPE_F32, (size_t)b->rows);
    int32_t *tokens = (int32_t *)check_alloc((size_t)b->rows, sizeof(int32_t));
    float *ret = (float *)check_alloc((size_t)b->rows, sizeof(float));
    struct check_buffer device;

    for (int i = 0; i < b->rows; i++)
        tokens[i] = b->positions[i].token;
    device = check_buffer_of(tokens, (size_t)b->rows * sizeof(int32_t));
    check_rc(cuda_logprobs(context, b->vocab, b->rows, (const float *)b->student.data,
                           (const int32_t *)device.data, (float *)out.data),
             "cuda_logprobs");
    check_get(&out);
    memcpy(ret, out.host, (size_t)b->rows * sizeof(float));
    check_free(&out, "log-probs");
    check_buffer_free(&device, "tokens");
    free(tokens);
    return ret;
}

/* The loss and cuda_logprobs, by clusters and by single blocks: the same log-probs, bit for bit.
 * And an on-policy row has a ratio of exactly 1. */
static void test_logprobs(struct cuda_context *context)
{
    static const int vocabs[] = {1, 77, 5000, 20003, 49152, 151936, 262144};
    int arch = context->arch;

    check_begin("log-probs agree bit for bit, %s", check_name(context->act));
    for (size_t i = 0; i < sizeof(vocabs) / sizeof(vocabs[0]); i++) {
        struct claas_loss_config config = a_config(i % 2 ? 0 : 2, 0.5F, 10);
        float *whole, *single;
        struct batch b;

        if (check_leaves_out(vocabs[i], CHECK_SMALL_ROWS) || check_elsewhere())
            continue;
        b = batch_new(vocabs[i], 4, 3.0F);
        whole = logprobs_of(context, &b);
        context->arch = 80;
        single = logprobs_of(context, &b);
        context->arch = arch;
        check_same("log-probs", single, whole, (size_t)b.rows * sizeof(float));
        for (int k = 0; k < b.rows; k++) {
            b.positions[k].rollout = whole[k];
            check_field("log-prob", k, whole[k],
                        b.student.host[(size_t)k * (size_t)b.vocab + b.positions[k].token] -
                            claas_logsumexp(b.student.host + (size_t)k * (size_t)b.vocab, b.vocab),
                        1e-6);
        }
        run_device(context, &config, &b, false);
        for (int k = 0; k < b.rows; k++)
            if (b.got[k].logprob != whole[k] || b.got[k].ratio != 1)
                check_fail("V %d: the loss has log-prob %.9g, cuda_logprobs %.9g", b.vocab,
                           (double)b.got[k].logprob, (double)whole[k]);
        free(whole);
        free(single);
        batch_free(&b);
    }
    check_end();
}

/* Again, alone, and from arrays that cannot be read by four. */
static void test_bits(struct cuda_context *context)
{
    static const int vocabs[] = {52, 20000, 49152};

    for (int variant = 0; variant < 3; variant++) {
        check_begin("%s repeats bit for bit, %s", variant_names[variant], check_name(context->act));
        for (int i = 0; i < 3 * ALPHAS; i++) {
            struct claas_loss_config config = a_config(variant, alphas[i / 3], 7);
            struct claas_loss_result first[3];
            struct check_array grad;
            struct batch b, other;
            size_t bytes;

            if (leaves_out_alpha(i / 3) ||
                check_leaves_out(vocabs[i % 3] * 3.0, CHECK_SMALL_ROWS) || check_elsewhere())
                continue;
            other = b = batch_new(vocabs[i % 3], 3, 2.0F);
            bytes = b.student.count * sizeof(float);
            run_device(context, &config, &b, true);
            memcpy(first, b.got, sizeof(first));
            grad = b.dlogits;
            run_device(context, &config, &b, false);
            check_same("again, without gradient", b.got, first, sizeof(first));
            check_shift = 4;
            other.student = check_copy_of(CUDA_TYPE_F32, b.student.host, b.student.count);
            other.teacher = check_copy_of(CUDA_TYPE_F32, b.teacher.host, b.student.count);
            run_device(context, &config, &other, true);
            check_same("unaligned", b.got, first, sizeof(first));
            check_same("unaligned gradient", other.dlogits.host, grad.host, bytes);
            check_free(&other.student, "student");
            check_free(&other.teacher, "teacher");
            check_free(&other.dlogits, "dlogits");
            check_shift = 0;
            other = b;
            other.rows = 1;
            run_device(context, &config, &other, false);
            check_same("alone", b.got, first, sizeof(first[0]));
            check_free(&grad, "dlogits");
            batch_free(&b);
        }
        check_end();
    }
}

/* Single blocks, as on cards below sm_90, and rows that do not fit into shared memory. */
static void test_paths(struct cuda_context *context)
{
    static const int vocabs[] = {10001, 49152, 262144};
    int arch = context->arch;

    for (int single = 0; single < 2; single++) {
        check_begin("%s, %s", single ? "single blocks" : "very wide rows",
                    check_name(context->act));
        context->arch = single ? 80 : arch;
        for (int i = 0; i < 3 * ALPHAS; i++) {
            struct claas_loss_config config = a_config(i % 3, alphas[i / 3], 50);
            struct batch b;

            if ((i / 3 != ALPHAS / 2 &&
                 check_leaves_out(single ? 0 : vocabs[2], CHECK_SMALL_ROWS)) ||
                check_elsewhere())
                continue;
            b = batch_new(single ? vocabs[i % 2] : vocabs[2], 2, 2.0F);
            check_batch(context, &config, &b);
            batch_free(&b);
        }
        context->arch = arch;
        check_end();
    }
}

/* On a card of two multiprocessors a cluster has several rows in turn. They get the bits that they
 * get when each has a cluster to itself; the third row has no teacher. */
static void test_turns(struct cuda_context *context)
{
    static const int vocabs[] = {52, 4096, 16000, 49152, 151936}, rows[] = {14, 9, 6, 6, 4};
    int multiprocessors = context->multiprocessors;

    check_begin("rows in turn, %s", check_name(context->act));
    for (int i = 0; i < 5 * ALPHAS; i++) {
        struct claas_loss_config config = a_config(0, alphas[i / 5], 7);
        int vocab = vocabs[i % 5], count = rows[i % 5];
        struct check_array grad;
        struct batch b;

        if (leaves_out_alpha(i / 5) || check_leaves_out((double)vocab * count, CHECK_SMALL_ROWS) ||
            check_elsewhere())
            continue;
        b = batch_new(vocab, count, 2.0F);
        run_reference(&config, &b);
        context->multiprocessors = 2;
        run_device(context, &config, &b, true);
        context->multiprocessors = multiprocessors;
        compare_results(&b);
        compare_gradients(&b, check_limit(context->act));
        memcpy(b.want, b.got, (size_t)count * sizeof(*b.got));
        grad = b.dlogits;
        run_device(context, &config, &b, true);
        check_same("one at a time", b.got, b.want, (size_t)count * sizeof(*b.got));
        check_same("its gradient", b.dlogits.host, grad.host, b.student.count * sizeof(float));
        check_free(&grad, "dlogits");
        check_free(&b.dlogits, "dlogits");
        batch_free(&b);
    }
    check_end();
}

static void test_arguments(struct cuda_context *context)
{
    struct batch b = batch_new(9, 1, 1.0F);

    check_begin("bad arguments, %s", check_name(context->act));
    for (int i = 0; i < 8; i++) {
        struct claas_loss_config config = a_config(1, 0.5F, 2);
        int code;

        config.alpha = i == 0 ? -0.1F : i == 1 ? 1.1F : i == 2 ? NAN : 0.5F;
        config.top_k = i == 3 ? 0 : 2;
        config.is_clip = i == 4 ? -1.0F : i == 5 ? NAN : 0;
        config.kl_weight = i == 6 ? -1.0F : 0;
        config.variant = i == 7 ? (enum claas_loss_variant)9 : config.variant;
        code = cuda_loss(context, &config, 9, 1, (const float *)b.student.data,
                         (const float *)b.teacher.data, NULL, NULL, NULL);
        if (code != CLAAS_ERR_INVALID)
            check_fail("case %d gives %d", i, code);
    }
    batch_free(&b);
    check_end();
}

/* --- time --- */

static void time_loss(struct cuda_context *context, int variant, float alpha, int vocab, int rows)
{
    size_t count = (size_t)vocab * (size_t)rows;
    struct check_buffer z = check_buffer_new(count * sizeof(float));
    struct check_buffer zt = check_buffer_new(count * sizeof(float));
    struct check_buffer dlogits = check_buffer_new(count * context->act_bytes);
    struct check_buffer results = check_buffer_new((size_t)rows * sizeof(struct claas_loss_result));
    struct check_buffer positions =
        check_buffer_new((size_t)rows * sizeof(struct cuda_loss_position));
    struct cuda_loss_position *host =
        (struct cuda_loss_position *)check_alloc((size_t)rows, sizeof(*host));
    struct claas_loss_config config = a_config(variant, alpha, 100);
    char what[96];
    float ms;

    for (int i = 0; i < rows; i++) {
        host[i].token = a_token(vocab);
        host[i].rollout = host[i].base = -2;
        host[i].weight = 1;
        host[i].teacher = 1;
    }
    check_upload(&positions, host);
    check_fill(CUDA_TYPE_F32, z.data, count, 2.5F);
    check_fill(CUDA_TYPE_F32, zt.data, count, 2.5F);
    ms = check_median_ms(context, [&] {
        check_rc(cuda_loss(context, &config, vocab, rows, (const float *)z.data,
                           (const float *)zt.data,
                           (const struct cuda_loss_position *)positions.data, dlogits.data,
                           (struct claas_loss_result *)results.data),
                 "cuda_loss");
    });
    snprintf(what, sizeof(what), "%s alpha %g [%d][%d]", variant_names[variant], (double)alpha,
             rows, vocab);
    check_report(what, ms, (double)count * (8 + (double)context->act_bytes), 0);
    if (variant == 0 && alpha == 0) {
        int32_t *tokens = (int32_t *)results.data; /* any small numbers */

        check_cuda(cudaMemset(tokens, 0, (size_t)rows * sizeof(int32_t)), "tokens");
        ms = check_median_ms(context, [&] {
            check_rc(cuda_logprobs(context, vocab, rows, (const float *)z.data, tokens,
                                   (float *)dlogits.data),
                     "cuda_logprobs");
        });
        snprintf(what, sizeof(what), "log-probs [%d][%d]", rows, vocab);
        check_report(what, ms, (double)count * 4, 0);
    }
    check_buffer_free(&z, "student");
    check_buffer_free(&zt, "teacher");
    check_buffer_free(&dlogits, "dlogits");
    check_buffer_free(&results, "results");
    check_buffer_free(&positions, "positions");
    free(host);
}

/* --no-timing: no measurements. */
int main(int argc, char **argv)
{
    static const int vocabs[] = {49152, 151936};
    bool fast = !check_measures() || (argc > 1 && strcmp(argv[1], "--no-timing") == 0);

    for (int type = 0; type < 2; type++) {
        struct cuda_context context;

        check_open(type ? CUDA_TYPE_BF16 : CUDA_TYPE_F32, &context);
        test_shapes(&context);
        test_selection(&context);
        test_plain(&context);
        test_one_hot(&context);
        test_minus_infinity(&context);
        test_poison(&context);
        test_logprobs(&context);
        test_bits(&context);
        test_paths(&context);
        test_turns(&context);
        test_arguments(&context);
        for (int i = 0; type && !fast && i < 2; i++) {
            time_loss(&context, 0, 0.0F, vocabs[i], 1024);
            time_loss(&context, 0, 0.0F, vocabs[i], 32);
            time_loss(&context, 0, 0.5F, vocabs[i], 1024);
            time_loss(&context, 0, 1.0F, vocabs[i], 1024);
            time_loss(&context, 1, 0.5F, vocabs[i], 1024);
            time_loss(&context, 2, 0.5F, vocabs[i], 1024);
        }
        cuda_context_close(&context);
    }
    return check_finish();
}
