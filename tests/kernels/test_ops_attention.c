/* Attention of every table: forward and backward against double, the backward formulas against
 * finite differences, and the rule that a query's result is the same bits in one pass, in chunks,
 * alone as in decoding, and on any team.
 *
 * Tolerances: scores are sums over head_dim, which the exponential turns into relative errors of
 * the weights; with the bfloat16 dot instruction weights are rounded to bfloat16 before they
 * multiply (half an ulp of bfloat16 each). */
#include "check.h"

struct setup {
    int heads, kv_heads, head_dim, count;
};
static const struct setup setups[] = {
    {1, 1, 16, 1},  {2, 1, 16, 5},   {3, 3, 32, 16},  {9, 3, 64, 17},  {9, 3, 64, 75},
    {4, 2, 80, 33}, {14, 2, 64, 40}, {6, 2, 128, 64}, {9, 3, 64, 150}, {60, 1, 16, 20},
};

/* One sequence: rotated queries, keys and values stored in scattered blocks. */
struct sequence {
    struct setup s;
    float scale;
    int ldq, ldk;
    int32_t *pos, *blocks, *block_of; /* [count], per block, [count] */
    struct buffer q, k, v, kv;
    size_t block_bytes;
};

static struct sequence sequence_new(const struct claas_ops *ops, claas_pool_t *pool, struct setup s)
{
    const int n_blocks = (s.count + 15) / 16;
    struct sequence q = {.s = s, .scale = 1.0f / sqrtf((float)s.head_dim)};

    q.ldq = s.heads * s.head_dim + 3, q.ldk = s.kv_heads * s.head_dim + 5;
    q.q = act_rows(ops, s.count, s.heads * s.head_dim, q.ldq, 1.5f);
    q.k = act_rows(ops, s.count, s.kv_heads * s.head_dim, q.ldk, 1.5f);
    q.v = act_rows(ops, s.count, s.kv_heads * s.head_dim, q.ldk, 1);
    q.block_bytes = claas_kv_block_bytes(ops->precision, s.head_dim);
    q.kv = buffer_new((size_t)(n_blocks + 2) * s.kv_heads * q.block_bytes, 1);
    q.pos = malloc((size_t)s.count * 4), q.block_of = malloc((size_t)s.count * 4);
    q.blocks = malloc((size_t)n_blocks * 4);
    assert_true(q.pos && q.block_of && q.blocks);
    for (int b = 0; b < n_blocks; b++)
        q.blocks[b] = n_blocks - b; /* reversed, block 0 unused */
    for (int i = 0; i < s.count; i++)
        q.pos[i] = i, q.block_of[i] = q.blocks[i / 16];
    /* What a broken adapter may have left where nothing was written. */
    for (size_t i = 0; i < q.kv.count / ops->act_bytes; i++)
        act_put(ops, q.kv.data, i, NAN);
    ops->kv_store(pool, s.count, s.kv_heads, s.head_dim, q.k.data, q.v.data, q.ldk, q.pos,
                  q.block_of, q.kv.data, q.block_bytes);
    return q;
}
static void sequence_free(struct sequence *q)
{
    buffer_free(&q->q, "q"), buffer_free(&q->k, "k"), buffer_free(&q->v, "v");
    buffer_free(&q->kv, "kv");
    free(q->pos), free(q->blocks), free(q->block_of);
}

static struct claas_attn_args attn_args(const struct sequence *q, const struct claas_attn_run *runs,
                                        int n)
{
    return (struct claas_attn_args){.heads = q->s.heads,
                                    .kv_heads = q->s.kv_heads,
                                    .head_dim = q->s.head_dim,
                                    .scale = q->scale,
                                    .kv = q->kv.data,
                                    .kv_block_bytes = q->block_bytes,
                                    .runs = runs,
                                    .n_runs = n};
}

/* Rows of one head as doubles, [count][head_dim]. */
static double *head_double(const struct claas_ops *ops, const struct buffer *b, int ld, int head,
                           const struct setup *s)
{
    double *x = malloc((size_t)s->count * s->head_dim * sizeof(double));

    assert_non_null(x);
    for (int i = 0; i < s->count; i++)
        for (int j = 0; j < s->head_dim; j++)
            x[i * s->head_dim + j] =
                act_get(ops, b->data, (size_t)i * ld + (size_t)head * s->head_dim + j);
    return x;
}

/* Weights of query i over positions 0 … i; returns the log sum exp. */
static double weights_double(const double *q, const double *k, int i, int d, double scale,
                             double *p)
{
    double max = -INFINITY, sum = 0;

    for (int t = 0; t <= i; t++) {
        p[t] = 0;
        for (int j = 0; j < d; j++)
            p[t] += q[i * d + j] * k[t * d + j] * scale;
        max = fmax(max, p[t]);
    }
    for (int t = 0; t <= i; t++)
        sum += exp(p[t] - max);
    for (int t = 0; t <= i; t++)
        p[t] = exp(p[t] - max) / sum;
    return max + log(sum);
}

/* Whether weights are rounded to bfloat16 in this table. */
static double weight_rounding(const struct claas_ops *ops)
{
    return strcmp(ops->name, "bf16-avx512bf16") == 0 || strcmp(ops->name, "bf16-amx") == 0
               ? HALF_ULP_BF16
               : 0;
}

static void check_forward(const struct claas_ops *ops, claas_pool_t *pool, struct setup s)
{
    struct sequence q = sequence_new(ops, pool, s);
    const int d = s.head_dim, ldo = s.heads * d + 7;
    struct buffer out = buffer_new((size_t)s.count * ldo, ops->act_bytes);
    struct buffer lse = buffer_new((size_t)s.count * s.heads, 4);
    struct claas_attn_run run = {.count = s.count,
                                 .blocks = q.blocks,
                                 .q = q.q.data,
                                 .ldq = q.ldq,
                                 .out = out.data,
                                 .ldo = ldo,
                                 .lse = lse.data};
    struct claas_attn_args args = attn_args(&q, &run, 1);
    double *p = malloc((size_t)s.count * sizeof(double));

    ops->attention(pool, &args);
    for (int h = 0; h < s.heads; h++) {
        double *qs = head_double(ops, &q.q, q.ldq, h, &s);
        double *ks = head_double(ops, &q.k, q.ldk, h / (s.heads / s.kv_heads), &s);
        double *vs = head_double(ops, &q.v, q.ldk, h / (s.heads / s.kv_heads), &s);

        for (int i = 0; i < s.count; i++) {
            const double want_lse = weights_double(qs, ks, i, d, q.scale, p);
            /* |score| < 40 here: its error d half-ulps of the magnitudes, e^that is a relative
             * error */
            const double relative = (d + s.count + 20) * HALF_ULP_F32 * 40;

            check_close(((float *)lse.data)[(size_t)i * s.heads + h], want_lse, relative,
                        "%s lse head %d query %d", ops->name, h, i);
            for (int j = 0; j < d; j++) {
                double want = 0, magnitude = 0;

                for (int t = 0; t <= i; t++)
                    want += p[t] * vs[t * d + j], magnitude += fabs(p[t] * vs[t * d + j]);
                check_close(act_get(ops, out.data, (size_t)i * ldo + (size_t)h * d + j), want,
                            (relative + weight_rounding(ops)) * magnitude +
                                1.01 * act_rounding(ops) * fabs(want),
                            "%s attention heads %d/%d d %d count %d: head %d query %d", ops->name,
                            s.heads, s.kv_heads, d, s.count, h, i);
            }
        }
        free(qs), free(ks), free(vs);
    }
    check_gaps(&out, s.count, s.heads * d, ldo, ops->name);
    buffer_free(&out, "out"), buffer_free(&lse, "lse");
    sequence_free(&q);
    free(p);
}

static void test_forward(void **state)
{
    claas_pool_t *pool = pool_of(2);

    FOR_EACH_TABLE(ops)
    for (size_t i = 0; i < sizeof(setups) / sizeof(setups[0]); i++)
        check_forward(ops, pool, setups[i]);
    claas_pool_free(&pool);
}

/* All queries at once; in runs of uneven length given together; one by one. */
static void test_same_bits_in_any_split(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};

    FOR_EACH_TABLE(ops)
    for (size_t i = 0; i < sizeof(setups) / sizeof(setups[0]); i++) {
        const struct setup s = setups[i];
        struct sequence q = sequence_new(ops, pools[0], s);
        const int width = s.heads * s.head_dim;
        struct buffer whole = buffer_new((size_t)s.count * width, ops->act_bytes);
        struct buffer split = buffer_new((size_t)s.count * width, ops->act_bytes);
        struct buffer lse[2] = {buffer_new((size_t)s.count * s.heads, 4),
                                buffer_new((size_t)s.count * s.heads, 4)};
        struct claas_attn_run runs[200];
        struct claas_attn_run all = {.count = s.count,
                                     .blocks = q.blocks,
                                     .q = q.q.data,
                                     .ldq = q.ldq,
                                     .out = whole.data,
                                     .ldo = width,
                                     .lse = lse[0].data};
        struct claas_attn_args args = attn_args(&q, &all, 1);

        ops->attention(pools[0], &args);
        for (int step = 1; step <= 23; step += 11) { /* 1, 12, 23 queries a run */
            int n = 0;

            memset(split.data, 0xff, split.count * split.size);
            for (int at = 0; at < s.count; at += step)
                runs[n++] =
                    (struct claas_attn_run){.count = at + step < s.count ? step : s.count - at,
                                            .pos = at,
                                            .blocks = q.blocks,
                                            .q = act_at(ops, q.q.data, (size_t)at * q.ldq),
                                            .ldq = q.ldq,
                                            .out = act_at(ops, split.data, (size_t)at * width),
                                            .ldo = width,
                                            .lse = (float *)lse[1].data + (size_t)at * s.heads};
            args = attn_args(&q, runs, n);
            ops->attention(pools[1], &args);
            assert_memory_equal(whole.data, split.data, whole.count * whole.size);
            assert_memory_equal(lse[0].data, lse[1].data, lse[0].count * 4);
        }
        buffer_free(&whole, "out"), buffer_free(&split, "out");
        buffer_free(&lse[0], "lse"), buffer_free(&lse[1], "lse");
        sequence_free(&q);
    }
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

/* --- backward
 * --------------------------------------------------------------------------------------------------
 */

/* Gradients of sum(dout . out) for one query head in double: dq written, dk and dv added to; m* are
 * the sums of the terms' magnitudes. `out` is the rounded output that the operation is given. */
struct gradients {
    double *dq, *dk, *dv, *mq, *mk, *mv;
};

static void backward_double(const double *q, const double *k, const double *v, const double *out,
                            const double *dout, int count, int d, double scale, struct gradients *g)
{
    double *p = malloc((size_t)count * sizeof(double));

    for (int i = 0; i < count; i++) {
        double delta = 0, mdelta = 0;

        weights_double(q, k, i, d, scale, p);
        for (int j = 0; j < d; j++)
            delta += dout[i * d + j] * out[i * d + j],
                mdelta += fabs(dout[i * d + j] * out[i * d + j]);
        for (int t = 0; t <= i; t++) {
            double dp = 0, mdp = 0, ds = 0, mds = 0;

            for (int j = 0; j < d; j++)
                dp += dout[i * d + j] * v[t * d + j], mdp += fabs(dout[i * d + j] * v[t * d + j]);
            ds = p[t] * (dp - delta) * scale, mds = p[t] * (mdp + mdelta) * scale;
            for (int j = 0; j < d; j++) {
                g->dq[i * d + j] += ds * k[t * d + j], g->mq[i * d + j] += mds * fabs(k[t * d + j]);
                g->dk[t * d + j] += ds * q[i * d + j], g->mk[t * d + j] += mds * fabs(q[i * d + j]);
                g->dv[t * d + j] += p[t] * dout[i * d + j];
                g->mv[t * d + j] += p[t] * fabs(dout[i * d + j]);
            }
        }
    }
    free(p);
}

static struct gradients gradients_new(size_t n)
{
    struct gradients g;
    double **fields[] = {&g.dq, &g.dk, &g.dv, &g.mq, &g.mk, &g.mv};

    for (int i = 0; i < 6; i++) {
        *fields[i] = calloc(n, sizeof(double));
        assert_non_null(*fields[i]);
    }
    return g;
}
static void gradients_free(struct gradients *g)
{
    free(g->dq), free(g->dk), free(g->dv), free(g->mq), free(g->mk), free(g->mv);
}

static void check_rows(const struct buffer *got, int ld, int head, const double *want,
                       const double *magnitude, int count, int d, double relative, const char *what)
{
    for (int i = 0; i < count; i++)
        for (int j = 0; j < d; j++)
            check_close(((float *)got->data)[(size_t)i * ld + (size_t)head * d + j],
                        want[i * d + j], relative * magnitude[i * d + j] + 1e-30,
                        "%s head %d row %d of %d", what, head, i, count);
}

/* What a backward pass was given and gave. */
struct backward {
    struct buffer out, dout, dq, dk, dv;
    int ldo, lddq, lddkv;
};

static void compare_backward(const struct claas_ops *ops, const struct sequence *q,
                             const struct backward *b)
{
    const struct setup s = q->s;
    const int d = s.head_dim, group = s.heads / s.kv_heads;
    const double relative = (d + 3 * s.count + 30) * HALF_ULP_F32 * 40 + 2 * weight_rounding(ops);

    for (int g = 0; g < s.kv_heads; g++) {
        struct gradients sum = gradients_new((size_t)s.count * d);
        double *ks = head_double(ops, &q->k, q->ldk, g, &s),
               *vs = head_double(ops, &q->v, q->ldk, g, &s);

        for (int h = g * group; h < (g + 1) * group; h++) {
            double *qs = head_double(ops, &q->q, q->ldq, h, &s),
                   *os = head_double(ops, &b->out, b->ldo, h, &s);
            double *dos = head_double(ops, &b->dout, b->ldo, h, &s);

            memset(sum.dq, 0, (size_t)s.count * d * sizeof(double));
            memset(sum.mq, 0, (size_t)s.count * d * sizeof(double));
            backward_double(qs, ks, vs, os, dos, s.count, d, q->scale, &sum);
            check_rows(&b->dq, b->lddq, h, sum.dq, sum.mq, s.count, d, relative, ops->name);
            free(qs), free(os), free(dos);
        }
        check_rows(&b->dk, b->lddkv, g, sum.dk, sum.mk, s.count, d, relative, ops->name);
        check_rows(&b->dv, b->lddkv, g, sum.dv, sum.mv, s.count, d, relative, ops->name);
        gradients_free(&sum);
        free(ks), free(vs);
    }
}

static void check_backward(const struct claas_ops *ops, claas_pool_t *pools[2], struct setup s)
{
    struct sequence q = sequence_new(ops, pools[0], s);
    const int d = s.head_dim, ldo = s.heads * d + 1;
    const int lddq = s.heads * d + 2, lddkv = s.kv_heads * d + 4;
    struct buffer out = buffer_new((size_t)s.count * ldo, ops->act_bytes);
    struct buffer lse = buffer_new((size_t)s.count * s.heads, 4);
    struct buffer dout = act_rows(ops, s.count, s.heads * d, ldo, 1);
    struct buffer dq[2], dk[2], dv[2];
    struct claas_attn_run run = {.count = s.count,
                                 .blocks = q.blocks,
                                 .q = q.q.data,
                                 .ldq = q.ldq,
                                 .out = out.data,
                                 .ldo = ldo,
                                 .lse = lse.data};
    struct claas_attn_args forward = attn_args(&q, &run, 1);

    ops->attention(pools[0], &forward);
    for (int i = 0; i < 2; i++) {
        dq[i] = buffer_new((size_t)s.count * lddq, 4),
        dk[i] = buffer_new((size_t)s.count * lddkv, 4);
        dv[i] = buffer_new((size_t)s.count * lddkv, 4);
        ops->attention_bwd(pools[i], &(struct claas_attn_bwd_args){.heads = s.heads,
                                                                   .kv_heads = s.kv_heads,
                                                                   .head_dim = d,
                                                                   .scale = q.scale,
                                                                   .kv = q.kv.data,
                                                                   .kv_block_bytes = q.block_bytes,
                                                                   .count = s.count,
                                                                   .blocks = q.blocks,
                                                                   .q = q.q.data,
                                                                   .ldq = q.ldq,
                                                                   .out = out.data,
                                                                   .ldo = ldo,
                                                                   .lse = lse.data,
                                                                   .dout = dout.data,
                                                                   .lddo = ldo,
                                                                   .dq = dq[i].data,
                                                                   .lddq = lddq,
                                                                   .dk = dk[i].data,
                                                                   .dv = dv[i].data,
                                                                   .lddkv = lddkv});
    }
    assert_memory_equal(dq[0].data, dq[1].data, dq[0].count * 4);
    assert_memory_equal(dk[0].data, dk[1].data, dk[0].count * 4);
    assert_memory_equal(dv[0].data, dv[1].data, dv[0].count * 4);
    compare_backward(ops, &q, &(struct backward){out, dout, dq[0], dk[0], dv[0], ldo, lddq, lddkv});
    check_gaps(&dq[0], s.count, s.heads * d, lddq, "dq");
    check_gaps(&dk[0], s.count, s.kv_heads * d, lddkv, "dk");
    for (int i = 0; i < 2; i++)
        buffer_free(&dq[i], "dq"), buffer_free(&dk[i], "dk"), buffer_free(&dv[i], "dv");
    buffer_free(&out, "out"), buffer_free(&lse, "lse"), buffer_free(&dout, "dout");
    sequence_free(&q);
}

static void test_backward(void **state)
{
    claas_pool_t *pools[2] = {pool_of(1), pool_of(2)};

    FOR_EACH_TABLE(ops)
    for (size_t i = 0; i < sizeof(setups) / sizeof(setups[0]); i++)
        check_backward(ops, pools, setups[i]);
    claas_pool_free(&pools[0]);
    claas_pool_free(&pools[1]);
}

static double loss_double(const double *q, const double *k, const double *v, const double *dout,
                          int count, int d, double scale, double *out)
{
    double loss = 0, p[16];

    for (int i = 0; i < count; i++) {
        weights_double(q, k, i, d, scale, p);
        for (int j = 0; j < d; j++) {
            out[i * d + j] = 0;
            for (int t = 0; t <= i; t++)
                out[i * d + j] += p[t] * v[t * d + j];
            loss += out[i * d + j] * dout[i * d + j];
        }
    }
    return loss;
}

/* The double formulas above are the derivative of the forward pass. */
static void test_formulas_by_finite_differences(void **state)
{
    enum { COUNT = 9, D = 6, N = COUNT * D };
    double x[4][N], out[N];
    struct gradients g = gradients_new(N);
    const double step = 1e-5;

    for (int a = 0; a < 4; a++)
        for (int i = 0; i < N; i++)
            x[a][i] = check_random();
    loss_double(x[0], x[1], x[2], x[3], COUNT, D, 0.4, out);
    backward_double(x[0], x[1], x[2], out, x[3], COUNT, D, 0.4, &g);
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < N; i++) {
            const double saved = x[a][i], *want = a == 0 ? g.dq : a == 1 ? g.dk : g.dv;
            double up, down;

            x[a][i] = saved + step, up = loss_double(x[0], x[1], x[2], x[3], COUNT, D, 0.4, out);
            x[a][i] = saved - step, down = loss_double(x[0], x[1], x[2], x[3], COUNT, D, 0.4, out);
            x[a][i] = saved;
            check_close((up - down) / (2 * step), want[i], 1e-7, "finite difference %d %d", a, i);
        }
    gradients_free(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formulas_by_finite_differences),
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_same_bits_in_any_split),
        cmocka_unit_test(test_backward),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
