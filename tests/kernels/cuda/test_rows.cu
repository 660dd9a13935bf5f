/* Operations on rows against double references, for float32 and bfloat16. */
#include "cuda_check.h"

#include "cuda/attention.h"
#include "cuda/cuda_rows.h"

#define EPS          1e-6f
#define POSITIONS    128 /* of the table of angles */

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static struct cuda_context context;

static double *doubles(size_t count)
{
    return (double *)check_alloc(count, sizeof(double));
}
static int32_t *ints(size_t count)
{
    return (int32_t *)check_alloc(count, sizeof(int32_t));
}

/* --- RMSNorm --- */

struct norm_case {
    int m, n;
    struct check_array x, w, y, rstd, dy, dx, dx_act;
    float *start; /* dx before */
};

static struct norm_case norm_new(int m, int n)
{
    const size_t count = (size_t)m * n;
    struct norm_case c = {};

    c.m = m, c.n = n;
    c.x = check_acts(context.act, count, 2);
    c.w = check_acts(CUDA_TYPE_F32, n, 1);
    c.y = check_blank(context.act, count);
    c.rstd = check_blank(CUDA_TYPE_F32, m);
    c.dy = check_acts(context.act, count, 1);
    c.dx = check_acts(CUDA_TYPE_F32, count, 1);
    c.dx_act = check_blank(context.act, count);
    c.start = (float *)check_alloc(count, sizeof(float));
    memcpy(c.start, c.dx.host, count * sizeof(float));
    return c;
}

static void norm_run(struct norm_case *c)
{
    check_rc(cuda_rmsnorm(&context, c->m, c->n, c->x.data, (const float *)c->w.data, EPS, c->y.data,
                          (float *)c->rstd.data),
             "rmsnorm");
    check_rc(cuda_rmsnorm_bwd(&context, c->m, c->n, c->x.data, (const float *)c->w.data,
                              (const float *)c->rstd.data, c->dy.data, (float *)c->dx.data,
                              c->dx_act.data),
             "rmsnorm_bwd");
    check_get(&c->y), check_get(&c->rstd), check_get(&c->dx), check_get(&c->dx_act);
}

static void norm_free(struct norm_case *c)
{
    check_free(&c->x, "x"), check_free(&c->w, "w"), check_free(&c->y, "y");
    check_free(&c->rstd, "rstd"), check_free(&c->dy, "dy"), check_free(&c->dx, "dx");
    check_free(&c->dx_act, "dx_act");
    free(c->start);
}

static void check_norm(int m, int n)
{
    struct norm_case c = norm_new(m, n);
    double *y = doubles((size_t)m * n), *dx = doubles((size_t)m * n), *rstd = doubles(m);

    norm_run(&c);
    for (int i = 0; i < m; i++) {
        const size_t row = (size_t)i * n;
        double squares = 0, mean = 0;

        for (int k = 0; k < n; k++) {
            squares += (double)c.x.host[row + k] * c.x.host[row + k];
            mean += (double)c.dy.host[row + k] * c.w.host[k] * c.x.host[row + k] / n;
        }
        rstd[i] = 1 / sqrt(squares / n + (double)EPS);
        for (int k = 0; k < n; k++) {
            const double x = c.x.host[row + k], g = (double)c.dy.host[row + k] * c.w.host[k];

            y[row + k] = x * rstd[i] * c.w.host[k];
            dx[row + k] = c.start[row + k] + rstd[i] * (g - x * rstd[i] * rstd[i] * mean);
        }
    }
    check_close("y", c.y.host, y, c.y.count, check_limit(context.act));
    check_close("rstd", c.rstd.host, rstd, m, CHECK_F32_LIMIT);
    check_close("dx", c.dx.host, dx, c.dx.count, CHECK_F32_LIMIT);
    for (size_t i = 0; i < c.dx.count; i++)
        c.dx.host[i] = check_rounded(context.act, c.dx.host[i]);
    check_same("dx_act", c.dx_act.host, c.dx.host, c.dx.count * sizeof(float));
    free(y), free(dx), free(rstd);
    norm_free(&c);
}

/* Rows alone give the bits that they give among others, with and without what may be NULL. */
static void check_norm_alone(int m, int n)
{
    struct norm_case c = norm_new(m, n);
    struct check_array y = check_blank(context.act, n), dx = check_blank(CUDA_TYPE_F32, n);
    const size_t row = (size_t)(m - 1) * n;

    norm_run(&c);
    memcpy(dx.host, c.start + row, n * sizeof(float));
    check_put(&dx);
    check_rc(cuda_rmsnorm(&context, 1, n, cuda_at(&context, c.x.data, row), (const float *)c.w.data,
                          EPS, y.data, NULL),
             "rmsnorm");
    check_rc(cuda_rmsnorm_bwd(&context, 1, n, cuda_at(&context, c.x.data, row),
                              (const float *)c.w.data, (const float *)c.rstd.data + m - 1,
                              cuda_at(&context, c.dy.data, row), (float *)dx.data, NULL),
             "rmsnorm_bwd");
    check_get(&y), check_get(&dx);
    check_same("y of one row", y.host, c.y.host + row, n * sizeof(float));
    check_same("dx of one row", dx.host, c.dx.host + row, n * sizeof(float));
    check_free(&y, "y"), check_free(&dx, "dx");
    norm_free(&c);
}

static void test_norm(void)
{
    static const int widths[] = {1,    7,    8,    64,   72,   255,  256,  264,  511,  576, 1000,
                                 1024, 1032, 1535, 2048, 2560, 4095, 4096, 5120, 8192, 8200};
    static const int heights[] = {1, 2, 5, 33};

    check_begin("rmsnorm %s", check_name(context.act));
    for (size_t i = 0; i < COUNT(widths); i++)
        for (size_t j = 0; j < COUNT(heights); j++)
            check_norm(heights[j], widths[i]);
    check_norm(3, 16384), check_norm(2, 16383), check_norm(700, 576);
    check_end();
    check_begin("rmsnorm %s, less aligned", check_name(context.act));
    check_shift = check_size(context.act) == 2 ? 4 : 8;
    check_norm(5, 576), check_norm(3, 4096), check_norm(1, 1001);
    check_shift = 0;
    check_end();
    check_begin("rmsnorm %s, one row", check_name(context.act));
    check_norm_alone(9, 576), check_norm_alone(130, 4096), check_norm_alone(6, 37);
    check_end();
    check_begin("rmsnorm %s, limits", check_name(context.act));
    check_rc(cuda_rmsnorm(&context, 0, 64, NULL, NULL, EPS, NULL, NULL), "no rows");
    if (cuda_rmsnorm(&context, 1, 16385, NULL, NULL, EPS, NULL, NULL) != CLAAS_ERR_UNSUPPORTED)
        check_fail("a row of 16385 is not refused");
    check_end();
}

/* --- q|k|v --- */

enum { WITH_BIAS = 1, WITH_NORM = 2, WITH_KV = 4, VARIANTS = 8 };

struct qkv_case {
    struct cuda_qkv args;
    int rotated, n; /* heads of q and k; elements of a row */
    struct check_array qkv, bias, norm_q, norm_k, table, raw, rstd_q, rstd_k, kv;
    struct check_buffer pos_buffer, blocks_buffer;
    int32_t *pos, *blocks;
    size_t block_count;
    float *start; /* qkv before */
    double *out, *want_raw, *want_q, *want_k;
};

/* Rows as serving has them: runs of one sequence each, of up to 21 positions from any position on,
 * in blocks of their own. */
static void fill_rows(struct qkv_case *c)
{
    const int m = c->args.m;
    int left = 0, block = -1, pos = 0;

    c->pos = ints(m), c->blocks = ints(m);
    for (int i = 0; i < m; i++, pos++, left--) {
        if (left == 0 || pos == POSITIONS) {
            left = 1 + check_below(21);
            pos = check_below(POSITIONS - 1);
            block++;
        } else if (pos % CUDA_KV_BLOCK == 0) {
            block++;
        }
        c->pos[i] = pos;
        c->blocks[i] = block;
    }
    c->block_count = (size_t)block + 2; /* one that nobody writes */
    for (int i = 0; i < m; i++)         /* downwards, and not from 0 on */
        c->blocks[i] = block + 1 - c->blocks[i];
    c->pos_buffer = check_buffer_of(c->pos, m * sizeof(int32_t));
    c->blocks_buffer = check_buffer_of(c->blocks, m * sizeof(int32_t));
}

static struct qkv_case qkv_new(int m, int heads, int kv_heads, int d, int variant)
{
    struct qkv_case c = {};
    const size_t rotated = (size_t)(heads + kv_heads) * d, n = rotated + (size_t)kv_heads * d;
    const bool norm = variant & WITH_NORM;

    c.args.m = m, c.args.heads = heads, c.args.kv_heads = kv_heads, c.args.head_dim = d;
    c.args.eps = EPS;
    c.rotated = heads + kv_heads, c.n = (int)n;
    fill_rows(&c);
    c.qkv = check_acts(context.act, m * n, 2);
    c.start = (float *)check_alloc(m * n, sizeof(float));
    memcpy(c.start, c.qkv.host, m * n * sizeof(float));
    c.bias = check_acts(CUDA_TYPE_F32, n, 1);
    c.norm_q = check_acts(CUDA_TYPE_F32, d, 1);
    c.norm_k = check_acts(CUDA_TYPE_F32, d, 1);
    c.table = check_blank(CUDA_TYPE_F32, (size_t)POSITIONS * d);
    for (size_t i = 0; i < c.table.count / 2; i++) {
        const double angle = (double)check_random() * 3;

        c.table.host[2 * i] = (float)cos(angle);
        c.table.host[2 * i + 1] = (float)sin(angle);
    }
    check_put(&c.table);
    c.raw = check_blank(context.act, m * rotated);
    c.rstd_q = check_blank(CUDA_TYPE_F32, (size_t)m * heads);
    c.rstd_k = check_blank(CUDA_TYPE_F32, (size_t)m * kv_heads);
    c.kv = check_blank(context.act, c.block_count * 2 * kv_heads * CUDA_KV_BLOCK * d);
    c.args.qkv = c.qkv.data;
    c.args.bias = variant & WITH_BIAS ? (const float *)c.bias.data : NULL;
    c.args.norm_q = norm ? (const float *)c.norm_q.data : NULL;
    c.args.norm_k = norm ? (const float *)c.norm_k.data : NULL;
    c.args.cos_sin = (const float *)c.table.data;
    c.args.pos = (const int32_t *)c.pos_buffer.data;
    c.args.raw = c.raw.data;
    c.args.rstd_q = (float *)c.rstd_q.data, c.args.rstd_k = (float *)c.rstd_k.data;
    c.args.kv = variant & WITH_KV ? c.kv.data : NULL;
    c.args.blocks = (const int32_t *)c.blocks_buffer.data;
    c.out = doubles(m * n), c.want_raw = doubles(m * rotated);
    c.want_q = doubles((size_t)m * heads), c.want_k = doubles((size_t)m * kv_heads);
    return c;
}

static void qkv_free(struct qkv_case *c)
{
    check_free(&c->qkv, "qkv"), check_free(&c->bias, "bias"), check_free(&c->norm_q, "norm_q");
    check_free(&c->norm_k, "norm_k"), check_free(&c->table, "table"), check_free(&c->raw, "raw");
    check_free(&c->rstd_q, "rstd_q"), check_free(&c->rstd_k, "rstd_k"), check_free(&c->kv, "kv");
    check_buffer_free(&c->pos_buffer, "pos"), check_buffer_free(&c->blocks_buffer, "blocks");
    free(c->pos), free(c->blocks), free(c->start);
    free(c->out), free(c->want_raw), free(c->want_q), free(c->want_k);
}

/* One head in double: x as given, with its bias, rounded where the norm reads it. */
static void want_head(struct qkv_case *c, int row, int head)
{
    const int d = c->args.head_dim, half = d / 2;
    const bool rotated = head < c->rotated, q = head < c->args.heads;
    const float *norm = q ? c->norm_q.host : c->norm_k.host;
    const float *cs = c->table.host + (size_t)c->pos[row] * d;
    const size_t at = (size_t)row * c->n + (size_t)head * d;
    double *out = c->out + at, squares = 0, rstd = 1;

    for (int k = 0; k < d; k++) {
        const float x = c->start[at + k] + (c->args.bias ? c->bias.host[head * d + k] : 0.0f);

        out[k] = rotated && c->args.norm_q ? (double)check_rounded(context.act, x) : (double)x;
        squares += out[k] * out[k];
        if (rotated)
            c->want_raw[((size_t)row * c->rotated + head) * d + k] = check_rounded(context.act, x);
    }
    if (!rotated)
        return;
    if (c->args.norm_q)
        rstd = 1 / sqrt(squares / d + (double)EPS);
    (q ? c->want_q : c->want_k)[q ? (size_t)row * c->args.heads + head
                                  : (size_t)row * c->args.kv_heads + head - c->args.heads] = rstd;
    for (int k = 0; k < half; k++) {
        const double a = out[k] * rstd * (c->args.norm_q ? norm[k] : 1);
        const double b = out[k + half] * rstd * (c->args.norm_q ? norm[k + half] : 1);

        out[k] = a * cs[2 * k] - b * cs[2 * k + 1];
        out[k + half] = b * cs[2 * k] + a * cs[2 * k + 1];
    }
}

/* The blocks hold the rows' keys and values, and what they held before (NaN) elsewhere. */
static void check_kv(struct qkv_case *c)
{
    const size_t d = c->args.head_dim, kv_heads = c->args.kv_heads;
    const size_t slot = CUDA_KV_BLOCK * d, block = 2 * kv_heads * slot;
    float *want = (float *)check_alloc(c->kv.count, sizeof(float));

    for (size_t i = 0; i < c->kv.count; i++)
        want[i] = NAN;
    for (int i = 0; i < c->args.m; i++) {
        const size_t p = c->pos[i] % CUDA_KV_BLOCK, b = c->blocks[i];

        for (size_t s = 0; s < 2 * kv_heads; s++)
            memcpy(&want[b * block + s * slot + p * d],
                   &c->qkv.host[(size_t)i * c->n + (c->args.heads + s) * d], d * sizeof(float));
    }
    for (size_t i = 0; i < c->kv.count; i++)
        if (isnan(want[i]) ? !isnan(c->kv.host[i]) : !(c->kv.host[i] == want[i])) {
            check_fail("kv: element %zu is %g, want %g", i, (double)c->kv.host[i], (double)want[i]);
            break;
        }
    free(want);
}

static void check_qkv(int m, int heads, int kv_heads, int d, int variant)
{
    struct qkv_case c = qkv_new(m, heads, kv_heads, d, variant);
    struct check_array again;

    check_rc(cuda_qkv_finish(&context, &c.args), "qkv_finish");
    check_get(&c.qkv), check_get(&c.raw), check_get(&c.kv);
    check_get(&c.rstd_q), check_get(&c.rstd_k);
    for (int i = 0; i < m; i++)
        for (int h = 0; h < c.rotated + kv_heads; h++)
            want_head(&c, i, h);
    check_close("qkv", c.qkv.host, c.out, c.qkv.count, check_limit(context.act));
    check_close("raw", c.raw.host, c.want_raw, c.raw.count, CHECK_F32_LIMIT);
    if (variant & WITH_NORM) {
        check_close("rstd_q", c.rstd_q.host, c.want_q, c.rstd_q.count, CHECK_F32_LIMIT);
        check_close("rstd_k", c.rstd_k.host, c.want_k, c.rstd_k.count, CHECK_F32_LIMIT);
    }
    if (variant & WITH_KV)
        check_kv(&c);
    /* Without what may be NULL: the same bits. */
    again = check_copy_of(context.act, c.start, c.qkv.count);
    c.args.qkv = again.data, c.args.raw = NULL, c.args.rstd_q = NULL, c.args.rstd_k = NULL;
    c.args.kv = NULL;
    check_rc(cuda_qkv_finish(&context, &c.args), "qkv_finish");
    check_get(&again);
    check_same("qkv again", again.host, c.qkv.host, again.count * sizeof(float));
    check_free(&again, "again");
    qkv_free(&c);
}

/* Back through one head in double. */
static void want_head_bwd(struct qkv_case *c, const float *given, int row, int head)
{
    const int d = c->args.head_dim, half = d / 2;
    const bool q = head < c->args.heads;
    const float *norm = q ? c->norm_q.host : c->norm_k.host;
    const float *cs = c->table.host + (size_t)c->pos[row] * d;
    const float *raw = c->raw.host + ((size_t)row * c->rotated + head) * d;
    const size_t at = (size_t)row * c->n + (size_t)head * d;
    double *out = c->out + at, mean = 0, squares = 0, rstd = 0;

    for (int k = 0; k < half; k++) {
        const double a = given[at + k], b = given[at + k + half];

        out[k] = a * cs[2 * k] + b * cs[2 * k + 1];
        out[k + half] = b * cs[2 * k] - a * cs[2 * k + 1];
    }
    if (!c->args.norm_q)
        return;
    for (int k = 0; k < d; k++) {
        squares += (double)raw[k] * raw[k];
        mean += out[k] * norm[k] * raw[k] / d;
    }
    rstd = 1 / sqrt(squares / d + (double)EPS);
    for (int k = 0; k < d; k++)
        out[k] = rstd * (out[k] * norm[k] - raw[k] * rstd * rstd * mean);
}

static void check_qkv_bwd(int m, int heads, int kv_heads, int d, int variant)
{
    struct qkv_case c = qkv_new(m, heads, kv_heads, d, variant);
    struct check_array dqkv = check_acts(context.act, c.qkv.count, 1);
    float *given = (float *)check_alloc(dqkv.count, sizeof(float));

    memcpy(given, dqkv.host, dqkv.count * sizeof(float));
    check_rc(cuda_qkv_finish(&context, &c.args), "qkv_finish");
    check_get(&c.raw);
    if (!(variant & WITH_NORM))
        c.args.raw = NULL, c.args.rstd_q = NULL, c.args.rstd_k = NULL;
    check_rc(cuda_qkv_finish_bwd(&context, &c.args, dqkv.data), "qkv_finish_bwd");
    check_get(&dqkv);
    for (int i = 0; i < m; i++) {
        for (int h = 0; h < c.rotated; h++)
            want_head_bwd(&c, given, i, h);
        for (size_t k = (size_t)c.rotated * d; k < (size_t)c.n; k++) /* v's is left alone */
            c.out[(size_t)i * c.n + k] = given[(size_t)i * c.n + k];
    }
    check_close("dqkv", dqkv.host, c.out, dqkv.count, check_limit(context.act));
    free(given);
    check_free(&dqkv, "dqkv");
    qkv_free(&c);
}

static void test_qkv(void)
{
    static const int shapes[][3] = {{1, 1, 16},   {3, 1, 48}, {4, 2, 64},  {9, 3, 64}, {14, 2, 64},
                                    {32, 8, 128}, {2, 1, 80}, {5, 5, 256}, {2, 2, 512}};
    static const int heights[] = {1, 7, 45};

    for (int variant = 0; variant < VARIANTS; variant++) {
        if (check_elsewhere())
            continue;
        check_begin("qkv_finish %s%s%s%s", check_name(context.act),
                    variant & WITH_BIAS ? " bias" : "", variant & WITH_NORM ? " norm" : "",
                    variant & WITH_KV ? " kv" : "");
        for (size_t s = 0; s < COUNT(shapes); s++)
            for (size_t i = 0; i < COUNT(heights); i++)
                check_qkv(heights[i], shapes[s][0], shapes[s][1], shapes[s][2], variant);
        check_end();
    }
    for (int variant = 0; variant <= WITH_NORM; variant += WITH_NORM) {
        if (check_elsewhere())
            continue;
        check_begin("qkv_finish_bwd %s%s", check_name(context.act), variant ? " norm" : "");
        for (size_t s = 0; s < COUNT(shapes); s++)
            for (size_t i = 0; i < COUNT(heights); i++)
                check_qkv_bwd(heights[i], shapes[s][0], shapes[s][1], shapes[s][2], variant);
        check_end();
    }
    check_begin("qkv_finish %s, limits", check_name(context.act));
    struct cuda_qkv args = {};
    args.m = 1, args.heads = 1, args.kv_heads = 1, args.head_dim = 24;
    if (cuda_qkv_finish(&context, &args) != CLAAS_ERR_UNSUPPORTED)
        check_fail("heads of 24 are not refused");
    args.head_dim = 64, args.m = 0;
    check_rc(cuda_qkv_finish(&context, &args), "no rows");
    check_rc(cuda_qkv_finish_bwd(&context, &args, NULL), "no rows");
    check_end();
}

/* --- SwiGLU --- */

static void check_swiglu(int m, int f)
{
    const size_t count = (size_t)m * f;
    struct check_array gate_up = check_acts(context.act, 2 * count, 4);
    struct check_array dh = check_acts(context.act, count, 1);
    struct check_array h = check_blank(context.act, count), h2 = check_blank(context.act, count);
    struct check_array dgu = check_blank(context.act, 2 * count);
    double *want = doubles(count), *want_d = doubles(2 * count);

    check_rc(cuda_swiglu(&context, m, f, gate_up.data, h.data), "swiglu");
    check_rc(cuda_swiglu_bwd(&context, m, f, gate_up.data, dh.data, dgu.data, h2.data),
             "swiglu_bwd");
    check_get(&h), check_get(&h2), check_get(&dgu);
    for (int i = 0; i < m; i++)
        for (int k = 0; k < f; k++) {
            const size_t at = (size_t)i * f + k, wide = (size_t)i * 2 * f + k;
            const double g = gate_up.host[wide], u = gate_up.host[wide + f];
            const double s = 1 / (1 + exp(-g)), d = dh.host[at];

            want[at] = g * s * u;
            want_d[wide] = d * u * (s * (1 + g * (1 - s)));
            want_d[wide + f] = d * g * s;
        }
    check_close("h", h.host, want, count, check_limit(context.act));
    check_close("dgu", dgu.host, want_d, 2 * count, check_limit(context.act));
    check_same("h again", h2.host, h.host, count * sizeof(float));
    check_free(&gate_up, "gate_up"), check_free(&dh, "dh"), check_free(&h, "h");
    check_free(&h2, "h2"), check_free(&dgu, "dgu");
    free(want), free(want_d);
}

/* Gates far from 0: silu(-200) is 0 and silu(200) is 200, never NaN. */
static void check_swiglu_far(void)
{
    static const float values[] = {-200, -89, 0, 89, 200, -200, 1e30f, -1e30f,
                                   1,    1,   1, 1,  1,   1,    1,     1};
    struct check_array gate_up = check_copy_of(context.act, values, 16);
    struct check_array h = check_blank(context.act, 8);
    double want[8];

    check_rc(cuda_swiglu(&context, 1, 8, gate_up.data, h.data), "swiglu");
    check_get(&h);
    for (int i = 0; i < 8; i++)
        want[i] = gate_up.host[i] > 0 ? gate_up.host[i] / (1 + exp(-(double)gate_up.host[i])) : 0;
    check_close("h", h.host, want, 8, check_limit(context.act));
    check_free(&gate_up, "gate_up"), check_free(&h, "h");
}

static void test_swiglu(void)
{
    static const int widths[] = {1, 7, 8, 100, 1536, 1537, 12288};
    static const int heights[] = {1, 3, 50};

    check_begin("swiglu %s", check_name(context.act));
    for (size_t i = 0; i < COUNT(widths); i++)
        for (size_t j = 0; j < COUNT(heights); j++)
            check_swiglu(heights[j], widths[i]);
    check_swiglu_far();
    check_rc(cuda_swiglu(&context, 0, 8, NULL, NULL), "no rows");
    check_end();
    check_begin("swiglu %s, less aligned", check_name(context.act));
    check_shift = 4;
    check_swiglu(3, 1536);
    check_shift = 0;
    check_end();
}

/* --- copies and sums of rows --- */

static void check_gather(int count, int source, int n)
{
    struct check_array in = check_acts(context.act, (size_t)source * n, 1);
    struct check_array out = check_blank(context.act, (size_t)count * n);
    struct check_array embedded = check_blank(context.act, (size_t)count * n);
    int32_t *rows = ints(count);
    struct check_buffer device_rows;

    for (int i = 0; i < count; i++)
        rows[i] = check_below(source);
    device_rows = check_buffer_of(rows, count * sizeof(int32_t));
    check_rc(cuda_gather(&context, count, n, in.data, (const int32_t *)device_rows.data, out.data),
             "gather");
    check_rc(
        cuda_embed(&context, count, n, in.data, (const int32_t *)device_rows.data, embedded.data),
        "embed");
    check_get(&out), check_get(&embedded);
    for (int i = 0; i < count; i++)
        check_same("a row", out.host + (size_t)i * n, in.host + (size_t)rows[i] * n,
                   n * sizeof(float));
    check_same("embed", embedded.host, out.host, out.count * sizeof(float));
    check_free(&in, "in"), check_free(&out, "out"), check_free(&embedded, "embedded");
    check_buffer_free(&device_rows, "rows");
    free(rows);
}

/* About one row in `every` has an input. */
static void check_spread(enum cuda_type type, int m, int every, int n)
{
    int32_t *rows = ints(m);
    struct check_array in, out = check_blank(type, (size_t)m * n);
    struct check_buffer device_rows;
    float *want = (float *)check_alloc((size_t)m * n, sizeof(float));
    int count = 0;

    for (int i = 0; i < m && every > 0; i++)
        if (check_below(every) == 0)
            rows[count++] = i;
    in = check_acts(type, (size_t)count * n, 1);
    device_rows = check_buffer_of(rows, count * sizeof(int32_t));
    for (int i = 0; i < count; i++)
        memcpy(want + (size_t)rows[i] * n, in.host + (size_t)i * n, n * sizeof(float));
    check_rc(type == context.act
                 ? cuda_spread(&context, m, count, n, in.data, (const int32_t *)device_rows.data,
                               out.data)
                 : cuda_spread_f32(&context, m, count, n, (const float *)in.data,
                                   (const int32_t *)device_rows.data, (float *)out.data),
             "spread");
    check_get(&out);
    check_same("out", out.host, want, out.count * sizeof(float));
    check_free(&in, "in"), check_free(&out, "out"), check_buffer_free(&device_rows, "rows");
    free(rows), free(want);
}

/* `count` inputs for `targets` different rows, in an order that mixes them: the sums of float32 in
 * the order of i, bit for bit. */
static void check_add_rows(int targets, int count, int n)
{
    const int m = targets * 2 + 1;
    struct check_array in = check_acts(CUDA_TYPE_F32, (size_t)count * n, 1);
    struct check_array out = check_acts(CUDA_TYPE_F32, (size_t)m * n, 1);
    int32_t *rows = ints(count), *starts = ints(targets + 1), *items = ints(count);
    float *want = (float *)check_alloc(out.count, sizeof(float));
    struct check_buffer device_rows, device_starts, device_items;
    int filled = 0;

    memcpy(want, out.host, out.count * sizeof(float));
    for (int i = 0; i < count; i++) {
        rows[i] = 2 * check_below(targets) + 1;
        for (int k = 0; k < n; k++)
            want[(size_t)rows[i] * n + k] += in.host[(size_t)i * n + k];
    }
    for (int t = 0; t < targets; t++) { /* some may have none */
        starts[t] = filled;
        for (int i = 0; i < count; i++)
            if (rows[i] == 2 * t + 1)
                items[filled++] = i;
    }
    starts[targets] = filled;
    device_rows = check_buffer_of(rows, count * sizeof(int32_t));
    device_starts = check_buffer_of(starts, (targets + 1) * sizeof(int32_t));
    device_items = check_buffer_of(items, count * sizeof(int32_t));
    check_rc(cuda_add_rows(&context, targets, n, (const int32_t *)device_starts.data,
                           (const int32_t *)device_items.data, (const int32_t *)device_rows.data,
                           (const float *)in.data, (float *)out.data),
             "add_rows");
    check_get(&out);
    check_same("out", out.host, want, out.count * sizeof(float));
    check_free(&in, "in"), check_free(&out, "out");
    check_buffer_free(&device_rows, "rows"), check_buffer_free(&device_starts, "starts");
    check_buffer_free(&device_items, "items");
    free(rows), free(starts), free(items), free(want);
}

static void check_to_act(size_t count)
{
    struct check_array in = check_acts(CUDA_TYPE_F32, count, 3);
    struct check_array out = check_blank(context.act, count);

    check_rc(cuda_to_act(&context, count, (const float *)in.data, out.data), "to_act");
    check_get(&out);
    for (size_t i = 0; i < count; i++)
        in.host[i] = check_rounded(context.act, in.host[i]);
    check_same("out", out.host, in.host, count * sizeof(float));
    check_free(&in, "in"), check_free(&out, "out");
}

static void test_copies(void)
{
    static const int widths[] = {1, 4, 7, 8, 30, 72, 576, 1000, 4096, 4100};

    for (int shift = 0; shift <= 4; shift += 4) {
        if (check_elsewhere())
            continue;
        check_shift = shift;
        check_begin("gather and embed %s%s", check_name(context.act),
                    shift ? ", less aligned" : "");
        for (size_t i = 0; i < COUNT(widths); i++)
            check_gather(1, 1, widths[i]), check_gather(37, 50, widths[i]);
        check_end();
        check_begin("spread %s%s", check_name(context.act), shift ? ", less aligned" : "");
        for (size_t i = 0; i < COUNT(widths); i++)
            for (int every = 0; every <= 3; every++) {
                check_spread(context.act, 1, every, widths[i]);
                check_spread(context.act, 61, every, widths[i]);
                check_spread(CUDA_TYPE_F32, 61, every, widths[i]);
            }
        check_end();
        check_begin("add_rows%s", shift ? ", less aligned" : "");
        for (size_t i = 0; i < COUNT(widths); i++) {
            check_add_rows(1, 1, widths[i]), check_add_rows(3, 50, widths[i]);
            check_add_rows(20, 30, widths[i]);
        }
        check_end();
        check_begin("to_act %s%s", check_name(context.act), shift ? ", less aligned" : "");
        check_to_act(0), check_to_act(1), check_to_act(3), check_to_act(4), check_to_act(2047);
        check_to_act(2048), check_to_act(2049), check_to_act(1000003);
        check_end();
    }
    check_shift = 0;
}

/* --- time: Qwen3-8B's shapes --- */

struct time_space {
    void *act[4];  /* TIME_ROWS x TIME_WIDTH each */
    float *f32[2]; /* TIME_ROWS x 4096 each */
    float *weight, *rstd;
    int32_t *numbers; /* 0, 2, 4, … (then positions and rows) */
};

#define TIME_ROWS  8192
#define TIME_WIDTH 12288
#define TIME_D     4096

static struct time_space time_space_new(void)
{
    const size_t wide = (size_t)TIME_ROWS * TIME_WIDTH, narrow = (size_t)TIME_ROWS * TIME_D;
    struct time_space s = {};
    int32_t *numbers = ints(TIME_ROWS);

    for (int i = 0; i < 4; i++) {
        check_cuda(cudaMalloc(&s.act[i], wide * 2 * context.act_bytes), "cudaMalloc");
        check_fill(context.act, s.act[i], wide * 2, 1);
    }
    for (int i = 0; i < 2; i++) {
        check_cuda(cudaMalloc((void **)&s.f32[i], narrow * 4), "cudaMalloc");
        check_fill(CUDA_TYPE_F32, s.f32[i], narrow, 1);
    }
    check_cuda(cudaMalloc((void **)&s.weight, TIME_WIDTH * 4), "cudaMalloc");
    check_fill(CUDA_TYPE_F32, s.weight, TIME_WIDTH, 1);
    check_cuda(cudaMalloc((void **)&s.rstd, (size_t)TIME_ROWS * 64 * 4), "cudaMalloc");
    check_fill(CUDA_TYPE_F32, s.rstd, (size_t)TIME_ROWS * 64, 0.1f);
    for (int i = 0; i < TIME_ROWS; i++)
        numbers[i] = 2 * i;
    check_cuda(cudaMalloc((void **)&s.numbers, TIME_ROWS * 4), "cudaMalloc");
    check_cuda(cudaMemcpy(s.numbers, numbers, TIME_ROWS * 4, cudaMemcpyHostToDevice), "upload");
    check_cuda(cudaDeviceSynchronize(), "upload");
    free(numbers);
    return s;
}

static void time_space_free(struct time_space *s)
{
    for (int i = 0; i < 4; i++)
        cudaFree(s->act[i]);
    cudaFree(s->f32[0]), cudaFree(s->f32[1]), cudaFree(s->weight), cudaFree(s->rstd);
    cudaFree(s->numbers);
}

/* Bytes per element of act. */
#define A ((double)context.act_bytes)

static void time_norm(const struct time_space *s, int m, int n)
{
    const double count = (double)m * n;
    char name[64];
    float ms;

    ms = check_median_ms(&context, [=] {
        cuda_rmsnorm(&context, m, n, s->act[0], s->weight, EPS, s->act[1], s->rstd);
    });
    snprintf(name, sizeof(name), "rmsnorm %dx%d", m, n);
    check_report(name, ms, count * 2 * A, 0);
    ms = check_median_ms(&context, [=] {
        cuda_rmsnorm_bwd(&context, m, n, s->act[0], s->weight, s->rstd, s->act[1], s->f32[0],
                         s->act[2]);
    });
    snprintf(name, sizeof(name), "rmsnorm_bwd %dx%d", m, n);
    check_report(name, ms, count * (3 * A + 8), 0);
}

static void time_qkv(const struct time_space *s, int m)
{
    struct cuda_qkv args = {};
    const double count = (double)m * 40 * 128;
    float ms;

    args.m = m, args.heads = 32, args.kv_heads = 8, args.head_dim = 128, args.eps = EPS;
    args.qkv = s->act[0], args.norm_q = s->weight, args.norm_k = s->weight + 128;
    args.cos_sin = s->f32[0], args.pos = s->numbers, args.raw = s->act[1];
    args.rstd_q = s->rstd, args.rstd_k = s->rstd + (size_t)m * 32;
    ms = check_median_ms(&context, [=] { cuda_qkv_finish(&context, &args); });
    check_report(m > 1 ? "qkv_finish 32+8+8 heads, 8192 rows" : "qkv_finish, one row", ms,
                 count * 3 * A, 0);
    ms = check_median_ms(&context, [=] { cuda_qkv_finish_bwd(&context, &args, s->act[2]); });
    check_report(m > 1 ? "qkv_finish_bwd, 8192 rows" : "qkv_finish_bwd, one row", ms, count * 3 * A,
                 0);
}

static void time_rest(const struct time_space *s)
{
    const double wide = (double)TIME_ROWS * TIME_WIDTH, narrow = (double)TIME_ROWS * TIME_D;
    float ms;

    ms = check_median_ms(
        &context, [=] { cuda_swiglu(&context, TIME_ROWS, TIME_WIDTH, s->act[0], s->act[1]); });
    check_report("swiglu 8192x12288", ms, wide * 3 * A, 0);
    ms = check_median_ms(&context, [=] {
        cuda_swiglu_bwd(&context, TIME_ROWS, TIME_WIDTH, s->act[0], s->act[1], s->act[2],
                        s->act[3]);
    });
    check_report("swiglu_bwd 8192x12288", ms, wide * 6 * A, 0);
    ms = check_median_ms(&context, [=] {
        cuda_gather(&context, TIME_ROWS, TIME_D, s->act[0], s->numbers, s->act[1]);
    });
    check_report("gather 8192x4096", ms, narrow * 2 * A, 0);
    ms = check_median_ms(&context, [=] {
        cuda_spread(&context, TIME_ROWS, TIME_ROWS / 2, TIME_D, s->act[0], s->numbers, s->act[1]);
    });
    check_report("spread 4096 of 8192x4096", ms, narrow * 1.5 * A, 0);
    ms = check_median_ms(
        &context, [=] { cuda_to_act(&context, (size_t)TIME_ROWS * TIME_D, s->f32[0], s->act[1]); });
    check_report("to_act 33.5M", ms, narrow * (4 + A), 0);
}

static void run_all(enum cuda_type act)
{
    struct time_space space;

    check_open(act, &context);
    if (!check_elsewhere())
        test_norm();
    test_qkv();
    if (!check_elsewhere())
        test_swiglu();
    test_copies();
    if (act == CUDA_TYPE_BF16 && check_measures()) {
        space = time_space_new();
        time_norm(&space, TIME_ROWS, TIME_D), time_norm(&space, TIME_ROWS, 1024);
        time_norm(&space, 1, TIME_D);
        time_qkv(&space, TIME_ROWS), time_qkv(&space, 1);
        time_rest(&space);
        time_space_free(&space);
    }
    cuda_context_close(&context);
}

int main(void)
{
    run_all(CUDA_TYPE_F32);
    run_all(CUDA_TYPE_BF16);
    return check_finish();
}
