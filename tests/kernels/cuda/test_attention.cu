/* Attention on the device against double sums on the host: packs of runs with and without shared
 * prompts, paged keys and values, both elements, the tiled and the plain kernels; that a row's
 * numbers do not depend on its company; times. */
#include "cuda/attention.h"
#include "cuda/cuda_rows.h"
#include "cuda/launch.cuh"

#include "cuda_check.h"

#include <algorithm>
#include <utility>
#include <vector>

/* --- runs --- */

struct runs {
    int heads, kv_heads, d;
    bool paged;
    bool apart; /* keys before a run's own may be read before the kernels in front have ended */
    int m, longest, furthest;
    std::vector<cuda_attn_run> list;
    std::vector<int> parents;   /* -1: none */
    std::vector<int> sequences; /* a name that stays the same when the run is taken elsewhere */
    std::vector<int32_t> row_run, children;
};

static runs runs_new(int heads, int kv_heads, int d, bool paged)
{
    runs r = {};

    r.heads = heads;
    r.kv_heads = kv_heads;
    r.d = d;
    r.paged = paged;
    return r;
}

/* Appends `count` rows at positions pos …; parent: an index, or -1. */
static void add_run(runs *r, int count, int pos, int parent, int sequence)
{
    cuda_attn_run run = {};

    run.first = r->m;
    run.count = count;
    run.pos = pos;
    run.parent_first = parent >= 0 ? r->list[(size_t)parent].first : 0;
    for (int i = 0; i < count; i++)
        r->row_run.push_back((int32_t)r->list.size());
    r->list.push_back(run);
    r->parents.push_back(parent);
    r->sequences.push_back(sequence);
    r->m += count;
    if (count > r->longest)
        r->longest = count;
    if (pos + count > r->furthest)
        r->furthest = pos + count;
}

static void add_run(runs *r, int count, int pos, int parent)
{
    add_run(r, count, pos, parent, (int)r->list.size());
}

static void list_children(runs *r)
{
    r->children.clear();
    for (size_t i = 0; i < r->list.size(); i++) {
        r->list[i].child_from = (int32_t)r->children.size();
        for (size_t j = 0; j < r->list.size(); j++)
            if (r->parents[j] == (int)i)
                r->children.push_back((int32_t)j);
        r->list[i].child_end = (int32_t)r->children.size();
    }
    if (r->children.empty())
        r->children.push_back(-1);
}

/* --- data --- */

struct data {
    enum cuda_type type;
    int ld, nq, nk;
    std::vector<float> qkv, dout; /* rounded to the type */
    std::vector<size_t> base;     /* paged: a run's first position in `kv` */
    std::vector<float> kv;        /* [position][2][G][d] */
};

/* The same sequence and row get the same values wherever they lie. */
static void random_row(float *to, int count, enum cuda_type type, int sequence, int row, int kind)
{
    check_seed = (uint64_t)(sequence + 1) * 1000003u + (uint64_t)row * 7919u + (uint64_t)kind;
    for (int i = 0; i < 4; i++)
        check_bits();
    for (int j = 0; j < count; j++)
        to[j] = check_rounded(type, check_random());
}

static data data_new(const runs *r, enum cuda_type type, int pad)
{
    data x = {};
    size_t positions = 0;

    x.type = type;
    x.nq = r->heads * r->d;
    x.nk = r->kv_heads * r->d;
    x.ld = x.nq + 2 * x.nk + pad;
    x.qkv.resize((size_t)r->m * (size_t)x.ld, NAN);
    x.dout.resize((size_t)r->m * (size_t)x.nq);
    for (size_t i = 0; i < r->list.size(); i++) {
        const cuda_attn_run *run = &r->list[i];

        for (int j = 0; j < run->count; j++) {
            const size_t row = (size_t)(run->first + j);

            random_row(&x.qkv[row * (size_t)x.ld], x.ld - pad, type, r->sequences[i], j, 1);
            random_row(&x.dout[row * (size_t)x.nq], x.nq, type, r->sequences[i], j, 2);
        }
        x.base.push_back(positions);
        positions += (size_t)(run->pos + run->count);
    }
    if (!r->paged)
        return x;
    x.kv.resize(positions * 2 * (size_t)x.nk);
    for (size_t i = 0; i < r->list.size(); i++)
        for (int p = 0; p < r->list[i].pos + r->list[i].count; p++)
            random_row(&x.kv[(x.base[i] + (size_t)p) * 2 * (size_t)x.nk], 2 * x.nk, type,
                       r->sequences[i], p, 3);
    return x;
}

/* The row of qkv that holds position p of a run's sequence. */
static size_t row_of(const cuda_attn_run *run, int p)
{
    return (size_t)(p < run->pos ? run->parent_first + p : run->first + p - run->pos);
}

static const float *key_of(const runs *r, const data *x, size_t run, int p, int g, int value)
{
    const size_t at = (size_t)(g * r->d);

    if (r->paged)
        return &x->kv[((x->base[run] + (size_t)p) * 2 + (size_t)value) * (size_t)x->nk + at];
    return &x->qkv[row_of(&r->list[run], p) * (size_t)x->ld + (size_t)(x->nq + value * x->nk) + at];
}

/* --- reference --- */

struct reference {
    std::vector<double> out, lse, dqkv;
};

static double dot(const float *a, const float *b, int n)
{
    double sum = 0;

    for (int j = 0; j < n; j++)
        sum += (double)a[j] * b[j];
    return sum;
}

/* Query i of a run, one head; p: its weights. */
static void reference_row(const runs *r, const data *x, double scale, size_t run, int i, int head,
                          reference *ref, std::vector<double> *p)
{
    const int g = head / (r->heads / r->kv_heads), last = r->list[run].pos + i;
    const size_t row = (size_t)(r->list[run].first + i);
    const float *q = &x->qkv[row * (size_t)x->ld + (size_t)(head * r->d)];
    double *out = &ref->out[row * (size_t)x->nq + (size_t)(head * r->d)], max = -INFINITY, sum = 0;

    p->resize((size_t)last + 1);
    for (int t = 0; t <= last; t++) {
        (*p)[(size_t)t] = scale * dot(q, key_of(r, x, run, t, g, 0), r->d);
        max = fmax(max, (*p)[(size_t)t]);
    }
    for (double &w : *p)
        sum += w = exp(w - max);
    ref->lse[row * (size_t)r->heads + (size_t)head] = max + log(sum);
    for (int t = 0; t <= last; t++) {
        const float *v = key_of(r, x, run, t, g, 1);

        (*p)[(size_t)t] /= sum;
        for (int j = 0; j < r->d; j++)
            out[j] += (*p)[(size_t)t] * v[j];
    }
}

/* out: what the forward pass stored, an input of the gradient like the others. */
static void reference_row_bwd(const runs *r, const data *x, double scale, size_t run, int i,
                              int head, const std::vector<float> *out, reference *ref,
                              const std::vector<double> *p)
{
    const int g = head / (r->heads / r->kv_heads), d = r->d;
    const size_t row = (size_t)(r->list[run].first + i), ld = (size_t)x->ld;
    const size_t q_at = row * ld + (size_t)(head * d),
                 o_at = row * (size_t)x->nq + (size_t)(head * d);
    const float *dout = &x->dout[o_at];
    const double delta = dot(dout, &(*out)[o_at], d);

    for (size_t t = 0; t < p->size(); t++) {
        const size_t k_at = row_of(&r->list[run], (int)t) * ld + (size_t)(x->nq + g * d);
        const size_t v_at = k_at + (size_t)x->nk;
        const double ds = (*p)[t] * (dot(dout, &x->qkv[v_at], d) - delta) * scale;

        for (int j = 0; j < d; j++) {
            ref->dqkv[q_at + (size_t)j] += ds * x->qkv[k_at + (size_t)j];
            ref->dqkv[k_at + (size_t)j] += ds * x->qkv[q_at + (size_t)j];
            ref->dqkv[v_at + (size_t)j] += (*p)[t] * dout[j];
        }
    }
}

static reference reference_of(const runs *r, const data *x, double scale,
                              const std::vector<float> *out)
{
    std::vector<double> p;
    reference ref;

    ref.out.resize((size_t)r->m * (size_t)x->nq);
    ref.lse.resize((size_t)r->m * (size_t)r->heads);
    ref.dqkv.resize((size_t)r->m * (size_t)x->ld);
    for (size_t run = 0; run < r->list.size(); run++)
        for (int i = 0; i < r->list[run].count; i++)
            for (int head = 0; head < r->heads; head++) {
                reference_row(r, x, scale, run, i, head, &ref, &p);
                if (!r->paged)
                    reference_row_bwd(r, x, scale, run, i, head, out, &ref, &p);
            }
    return ref;
}

/* --- the device --- */

struct results {
    std::vector<float> out, lse, dqkv;
};

/* Blocks in mixed order, all NaN but for what was written. */
static std::vector<float> make_blocks(runs *r, const data *x, std::vector<int32_t> *tables)
{
    const size_t d = (size_t)r->d, G = (size_t)r->kv_heads, block = 2 * G * CUDA_KV_BLOCK * d;
    std::vector<int32_t> numbers;
    std::vector<float> kv;
    int blocks = 1; /* block 0 is nobody's */

    for (cuda_attn_run &run : r->list) {
        run.table = (int32_t)numbers.size();
        for (int p = 0; p < run.pos + run.count; p += CUDA_KV_BLOCK)
            numbers.push_back(blocks++);
    }
    check_seed = 5;
    for (size_t i = numbers.size() - 1; i > 0; i--) {
        const size_t j = (size_t)check_below((int)i + 1);
        const int32_t swap = numbers[i];

        numbers[i] = numbers[j];
        numbers[j] = swap;
    }
    kv.resize((size_t)blocks * block, NAN);
    for (size_t i = 0; i < r->list.size(); i++)
        for (int p = 0; p < r->list[i].pos + r->list[i].count; p++)
            for (size_t part = 0; part < 2 * G; part++) {
                const size_t b =
                    (size_t)numbers[(size_t)r->list[i].table + (size_t)p / CUDA_KV_BLOCK];

                memcpy(&kv[b * block + (part * CUDA_KV_BLOCK + (size_t)p % CUDA_KV_BLOCK) * d],
                       &x->kv[((x->base[i] + (size_t)p) * 2 * G + part) * d], d * sizeof(float));
            }
    *tables = numbers;
    return kv;
}

template <typename T> static check_buffer buffer_of(const std::vector<T> &v)
{
    return check_buffer_of(v.data(), v.size() * sizeof(T));
}

static std::vector<float> taken(check_array *a)
{
    check_get(a);
    return std::vector<float>(a->host, a->host + a->count);
}

static void set_sizes(struct cuda_attention *args, const runs *r, float scale)
{
    args->heads = r->heads;
    args->kv_heads = r->kv_heads;
    args->head_dim = r->d;
    args->scale = scale;
    args->m = r->m;
    args->run_count = (int)r->list.size();
    args->longest = r->longest;
    args->furthest = r->furthest;
    args->apart = r->apart;
}

/* Windows of keys from the last to the first; what is in the upper halves is nobody's business. */
static check_buffer backwards_order(int m)
{
    std::vector<int64_t> order;

    for (int64_t i = (m + CUDA_KEY_WINDOW - 1) / CUDA_KEY_WINDOW - 1; i >= 0; i--)
        order.push_back((7 - i) * ((int64_t)1 << 32) + i);
    return buffer_of(order);
}

static results run_device(cuda_context *context, runs *r, const data *x, float scale)
{
    check_array qkv = check_copy_of(x->type, x->qkv.data(), x->qkv.size());
    check_array dout = check_copy_of(x->type, x->dout.data(), x->dout.size());
    check_array out = check_blank(x->type, x->dout.size());
    check_array lse = check_blank(CUDA_TYPE_F32, (size_t)(r->m * r->heads));
    check_array delta = check_blank(CUDA_TYPE_F32, (size_t)(r->m * r->heads));
    check_array dqkv = check_blank(x->type, x->qkv.size());
    check_buffer row_run = buffer_of(r->row_run), children = buffer_of(r->children), list,
                 tables = {};
    check_buffer scratch = {};
    check_array kv = {};
    struct cuda_attention args = {};
    results got;

    if (r->paged) {
        std::vector<int32_t> numbers;
        const std::vector<float> blocks = make_blocks(r, x, &numbers);

        kv = check_copy_of(x->type, blocks.data(), blocks.size());
        tables = buffer_of(numbers);
        args.kv = kv.data;
        args.tables = (const int32_t *)tables.data;
        args.scratch_bytes = cuda_attention_scratch_bytes(
            r->heads, r->kv_heads, r->d, (int)r->list.size(), r->longest, r->furthest);
        scratch = check_buffer_new(args.scratch_bytes);
        args.scratch = scratch.data;
    }
    list = buffer_of(r->list);
    set_sizes(&args, r, scale);
    args.runs = (const cuda_attn_run *)list.data;
    args.row_run = (const int32_t *)row_run.data;
    args.qkv = qkv.data;
    args.ldqkv = x->ld;
    args.out = out.data;
    args.lse = (float *)lse.data;
    check_rc(cuda_attention(context, &args), "cuda_attention");
    got.out = taken(&out);
    got.lse = taken(&lse);
    if (!r->paged) {
        struct cuda_attention_bwd bwd = {};
        check_buffer order = backwards_order(r->m);

        bwd.forward = args;
        bwd.key_order = (const int64_t *)order.data;
        bwd.children = (const int32_t *)children.data;
        bwd.dout = dout.data;
        bwd.delta = (float *)delta.data;
        bwd.dqkv = dqkv.data;
        check_rc(cuda_attention_bwd(context, &bwd), "cuda_attention_bwd");
        got.dqkv = taken(&dqkv);
        check_buffer_free(&order, "key_order");
    } else {
        check_free(&kv, "kv");
        check_buffer_free(&tables, "tables");
        check_buffer_free(&scratch, "scratch");
    }
    check_free(&qkv, "qkv");
    check_free(&dout, "dout");
    check_free(&out, "out");
    check_free(&lse, "lse");
    check_free(&delta, "delta");
    check_free(&dqkv, "dqkv");
    check_buffer_free(&row_run, "row_run");
    check_buffer_free(&children, "children");
    check_buffer_free(&list, "runs");
    return got;
}

/* --- comparison --- */

/* Columns from … from+n-1 of matrices with rows of ld. Zeros (a lone query's dq, dk) are
 * differences of equal sums in other orders: near zero, then. */
static void compare_columns(const char *what, const std::vector<float> *got,
                            const std::vector<double> *want, int m, int ld, int from, int n,
                            double limit)
{
    std::vector<float> a;
    std::vector<double> b;
    double top = 0, zero = 0;

    for (int i = 0; i < m; i++)
        for (int j = from; j < from + n; j++) {
            a.push_back((*got)[(size_t)i * (size_t)ld + (size_t)j]);
            b.push_back((*want)[(size_t)i * (size_t)ld + (size_t)j]);
            top = fmax(top, fabs(b.back()));
            zero += fabs((double)a.back()); /* NaN stays */
        }
    if (top == 0) {
        if (!(zero <= limit * (double)a.size()))
            check_fail("%s: %.3g on average, not 0", what, zero / (double)a.size());
        return;
    }
    check_close(what, a.data(), b.data(), a.size(), limit);
}

static void compare(const runs *r, const data *x, const results *got, const reference *want)
{
    const double limit = check_limit(x->type);

    check_close("out", got->out.data(), want->out.data(), want->out.size(), limit);
    /* not rounded to act: float32's limit, and ex2.approx */
    check_close("lse", got->lse.data(), want->lse.data(), want->lse.size(), 2e-5);
    if (r->paged)
        return;
    compare_columns("dq", &got->dqkv, &want->dqkv, r->m, x->ld, 0, x->nq, limit);
    compare_columns("dk", &got->dqkv, &want->dqkv, r->m, x->ld, x->nq, x->nk, limit);
    compare_columns("dv", &got->dqkv, &want->dqkv, r->m, x->ld, x->nq + x->nk, x->nk, limit);
}

static void check_runs(cuda_context *context, runs *r, int pad)
{
    const double scale = 1 / sqrt((double)r->d);
    const data x = data_new(r, context->act, pad);
    const results got = run_device(context, r, &x, (float)scale);
    const reference want = reference_of(r, &x, (double)(float)scale, &got.out);

    compare(r, &x, &got, &want);
}

/* The runs that `keep` names, and the rest dropped: the kept rows must keep their bits. */
static void check_company(cuda_context *context, runs *r, const std::vector<size_t> &keep)
{
    const float scale = (float)(1 / sqrt((double)r->d));
    runs few = runs_new(r->heads, r->kv_heads, r->d, r->paged);
    std::vector<int> place(r->list.size(), -1);

    for (size_t i : keep) {
        const int parent = r->parents[i];

        place[i] = (int)few.list.size();
        add_run(&few, r->list[i].count, r->list[i].pos, parent < 0 ? -1 : place[(size_t)parent],
                r->sequences[i]);
    }
    list_children(&few);

    const data x = data_new(r, context->act, 0), y = data_new(&few, context->act, 0);
    const results all = run_device(context, r, &x, scale);
    const results some = run_device(context, &few, &y, scale);

    for (size_t i : keep) {
        const size_t from = (size_t)r->list[i].first;
        const size_t to = (size_t)few.list[(size_t)place[i]].first;
        const size_t rows = (size_t)r->list[i].count, nq = (size_t)x.nq, ld = (size_t)x.ld;
        const size_t H = (size_t)r->heads;

        check_same("out", &some.out[to * nq], &all.out[from * nq], rows * nq * sizeof(float));
        check_same("lse", &some.lse[to * H], &all.lse[from * H], rows * H * sizeof(float));
        if (!r->paged)
            check_same("dqkv", &some.dqkv[to * ld], &all.dqkv[from * ld],
                       rows * ld * sizeof(float));
    }
}

/* --- groups of cases --- */

struct shape {
    int heads, kv_heads, d;
};

static const shape tiled_shapes[] = {{4, 2, 64}, {2, 2, 128}, {8, 2, 128}, {9, 3, 64}, {7, 1, 64}};
static const shape plain_shapes[] = {{2, 1, 16}, {3, 3, 80}, {4, 2, 256}, {4, 2, 64}};

static void test_rows(cuda_context *context, shape s, const char *name)
{
    const int counts[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 200};

    if (check_elsewhere())
        return;
    check_begin("rows alone: %s %s, %d of %d heads of %d", name, check_name(context->act), s.heads,
                s.kv_heads, s.d);
    for (int count : counts) {
        runs r = runs_new(s.heads, s.kv_heads, s.d, false);

        add_run(&r, count, 0, -1);
        list_children(&r);
        check_runs(context, &r, 0);
    }
    check_end();
}

/* Prompts that several runs share, whole or in part, between runs without. */
static runs shared_prompts(shape s, int unit)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, false);

    add_run(&r, 5, 0, -1);
    add_run(&r, unit, 0, -1); /* 1: a prompt */
    add_run(&r, unit / 2 + 1, unit, 1);
    add_run(&r, 1, unit, 1);
    add_run(&r, unit + 7, unit / 2 + 3, 1); /* leaves the prompt early */
    add_run(&r, 3 * unit / 2, 0, -1);
    add_run(&r, 67, 0, -1); /* 6: another */
    add_run(&r, 2, 67, 6);
    add_run(&r, unit, 64, 6);
    add_run(&r, 9, 1, 1);
    list_children(&r);
    return r;
}

static void test_shared(cuda_context *context, shape s, const char *name)
{
    if (check_elsewhere())
        return;
    check_begin("shared prompts: %s %s, %d of %d heads of %d", name, check_name(context->act),
                s.heads, s.kv_heads, s.d);
    for (int unit : {6, 70, 129}) {
        runs r = shared_prompts(s, unit);

        check_runs(context, &r, unit == 70 ? 16 : 0);
    }
    check_end();
}

static void test_large(cuda_context *context, shape s)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, false);

    if (check_elsewhere())
        return;
    check_begin("large: %s, %d of %d heads of %d", check_name(context->act), s.heads, s.kv_heads,
                s.d);
    add_run(&r, 333, 0, -1);
    add_run(&r, 600, 0, -1);
    add_run(&r, 150, 333, 0);
    list_children(&r);
    check_runs(context, &r, 0);
    check_end();
}

static void test_paged(cuda_context *context, shape s, const char *name)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);

    if (check_elsewhere())
        return;
    check_begin("paged: %s %s, %d of %d heads of %d", name, check_name(context->act), s.heads,
                s.kv_heads, s.d);
    for (int pos : {0, 1, 15, 16, 63, 64, 255, 256, 257, 300, 1023})
        add_run(&r, 1, pos, -1);
    check_runs(context, &r, 0);
    add_run(&r, 2, 254, -1);
    add_run(&r, 3, 700, -1);
    add_run(&r, 40, 0, -1);
    add_run(&r, 77, 290, -1);
    add_run(&r, 1, 511, -1);
    check_runs(context, &r, 0);
    check_end();
}

/* More than 32 parts of 256 keys. */
static void test_long(cuda_context *context, shape s)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);

    if (check_elsewhere())
        return;
    check_begin("long contexts: %s, %d of %d heads of %d", check_name(context->act), s.heads,
                s.kv_heads, s.d);
    for (int pos : {8191, 8192, 20000, 3})
        add_run(&r, 1, pos, -1);
    check_runs(context, &r, 0);
    check_end();
}

/* More parts than blocks: runs of all lengths, of one row and of as many as are done in parts, and one
 * of more. The numbers are those of as many blocks as the card holds, and of fewer runs; so they are
 * where older keys are read early. */
static void test_walk(cuda_context *context, shape s)
{
    const int all = context->multiprocessors;
    const int queries = cuda_attention_part_queries(s.heads, s.kv_heads);
    const double scale = 1 / sqrt((double)s.d);
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);

    if (check_elsewhere())
        return;
    check_begin("walks over parts: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (int end : {1, 64, 65, 128, 129, 192, 193, 256, 8192, 4096, 4097, 700, 2})
        add_run(&r, 1, end - 1, -1);
    for (int pos : {0, 126, 128, 1000})
        add_run(&r, queries, pos, -1);
    add_run(&r, queries + 1, 300, -1);
    add_run(&r, 1, 385, -1);

    const data x = data_new(&r, context->act, 0);
    results first;

    for (int turn = 0; turn < 4; turn++) {
        context->multiprocessors = turn < 2 ? 1 : turn < 3 ? 5 : all;
        r.apart = turn % 2;

        const results got = run_device(context, &r, &x, (float)scale);

        if (turn == 0) {
            const reference want = reference_of(&r, &x, (double)(float)scale, &got.out);

            compare(&r, &x, &got, &want);
            check_company(context, &r, {4, 8, 14, 17});
            first = got;
        }
        check_same("out", got.out.data(), first.out.data(), first.out.size() * sizeof(float));
        check_same("lse", got.lse.data(), first.lse.data(), first.lse.size() * sizeof(float));
    }
    context->multiprocessors = all;
    check_company(context, &r, {2, 8, 16});
    check_end();
}

static void test_company(cuda_context *context, shape s)
{
    runs r = shared_prompts(s, 70), pages = runs_new(s.heads, s.kv_heads, s.d, true);

    if (check_elsewhere())
        return;
    check_begin("company: %s, %d of %d heads of %d", check_name(context->act), s.heads, s.kv_heads,
                s.d);
    check_company(context, &r, {5});
    check_company(context, &r, {1, 2, 3, 4, 9});
    check_company(context, &r, {6, 7, 8});
    do /* enough for tiles of 128 rows */
        add_run(&r, 70, 0, -1);
    while (r.m * s.heads < 300 * context->multiprocessors);
    list_children(&r);
    check_company(context, &r, {0, 1, 2, 3, 4, 9, r.list.size() - 1});
    for (int pos : {10, 300, 999, 64, 2000})
        add_run(&pages, 1, pos, -1);
    add_run(&pages, 90, 100, -1);
    add_run(&pages, 2, 700, -1);
    check_company(context, &pages, {1});
    check_company(context, &pages, {0, 3});
    check_company(context, &pages, {2, 5});
    check_company(context, &pages, {6});
    check_end();
}

static void test_same_bits(cuda_context *context, shape s)
{
    runs r = shared_prompts(s, 129);
    const data x = data_new(&r, context->act, 0);
    const results first = run_device(context, &r, &x, 0.1f);

    if (check_elsewhere())
        return;
    check_begin("same bits twice: %s, heads of %d", check_name(context->act), s.d);
    for (int i = 0; i < 5; i++) {
        const results again = run_device(context, &r, &x, 0.1f);

        check_same("out", again.out.data(), first.out.data(), first.out.size() * sizeof(float));
        check_same("dqkv", again.dqkv.data(), first.dqkv.data(), first.dqkv.size() * sizeof(float));
    }
    check_end();
}

static void test_refusals(cuda_context *context)
{
    struct cuda_attention args = {};
    struct cuda_qkv finish = {};

    if (check_elsewhere())
        return;
    check_begin("refusals");
    args.heads = 3;
    args.kv_heads = 2;
    args.head_dim = 64;
    args.m = 1;
    if (cuda_attention(context, &args) != CLAAS_ERR_UNSUPPORTED)
        check_fail("3 heads over 2");
    args.heads = 2;
    args.head_dim = 272;
    if (cuda_attention(context, &args) != CLAAS_ERR_UNSUPPORTED)
        check_fail("a head of 272");
    args.head_dim = 64;
    args.run_count = args.longest = 1;
    args.furthest = 300;
    args.kv = args.scratch = (void *)4096; /* never read */
    args.scratch_bytes = (size_t)1 << 30;
    args.ldqkv = 384;
    finish.kv = (void *)4096;
    args.finish = &finish;
    args.m = args.run_count = 8;
    if (cuda_attention(context, &args) != CLAAS_ERR_INTERNAL ||
        cuda_attention_finishes(context, &args))
        check_fail("rows to be finished that are not apart");
    args.apart = true;
    if (!cuda_attention_finishes(context, &args))
        check_fail("8 rows are not finished");
    args.scratch = (void *)4104;
    if (cuda_attention(context, &args) != CLAAS_ERR_INTERNAL)
        check_fail("scratch aligned to 8 bytes");
    args.scratch = (void *)4096;
    args.m = args.run_count = 9;
    if (cuda_attention(context, &args) != CLAAS_ERR_INTERNAL ||
        cuda_attention_finishes(context, &args))
        check_fail("9 rows to be finished");
    check_end();
}

/* --- passes whose numbers are random --- */

/* Buffers of a pass that is timed or repeated; the runs' rows and keys are random. */
struct timed {
    struct cuda_attention args;
    struct cuda_attention_bwd bwd;
    std::vector<check_buffer> buffers;
};

static void *timed_array(timed *t, size_t bytes)
{
    t->buffers.push_back(check_buffer_new(bytes));
    return t->buffers.back().data;
}
static void *timed_acts(timed *t, size_t count)
{
    void *p = timed_array(t, count * 2);

    check_fill(CUDA_TYPE_BF16, p, count, 1);
    return p;
}
template <typename T> static const T *timed_copy(timed *t, const std::vector<T> &v)
{
    t->buffers.push_back(buffer_of(v));
    return (const T *)t->buffers.back().data;
}

static timed timed_new(runs *r)
{
    const size_t m = (size_t)r->m, nq = (size_t)(r->heads * r->d),
                 nk = (size_t)(r->kv_heads * r->d);
    timed t = {};
    struct cuda_attention *a = &t.args;

    set_sizes(a, r, (float)(1 / sqrt((double)r->d)));
    a->ldqkv = (int)(nq + 2 * nk);
    a->qkv = timed_acts(&t, m * (nq + 2 * nk));
    a->out = timed_array(&t, m * nq * 2);
    if (r->paged) {
        std::vector<int32_t> tables;

        for (cuda_attn_run &run : r->list) {
            run.table = (int32_t)tables.size();
            for (int p = 0; p < run.pos + run.count; p += CUDA_KV_BLOCK)
                tables.push_back((int32_t)tables.size());
        }
        a->apart = true;
        a->kv = timed_acts(&t, tables.size() * 2 * nk * CUDA_KV_BLOCK);
        a->tables = timed_copy(&t, tables);
        a->scratch_bytes = cuda_attention_scratch_bytes(r->heads, r->kv_heads, r->d, a->run_count,
                                                        r->longest, r->furthest);
        a->scratch = timed_array(&t, a->scratch_bytes);
    } else {
        a->lse = (float *)timed_array(&t, m * (size_t)r->heads * sizeof(float));
        t.bwd.children = timed_copy(&t, r->children);
        t.bwd.dout = timed_acts(&t, m * nq);
        t.bwd.delta = (float *)timed_array(&t, m * (size_t)r->heads * sizeof(float));
        t.bwd.dqkv = timed_array(&t, m * (nq + 2 * nk) * 2);
    }
    a->runs = timed_copy(&t, r->list);
    a->row_run = timed_copy(&t, r->row_run);
    t.bwd.forward = *a;
    return t;
}

static void timed_free(timed *t)
{
    for (check_buffer &b : t->buffers)
        check_buffer_free(&b, "a timed array");
    t->buffers.clear();
}

/* --- rows that attention finishes --- */

#define EPS 1e-6f

struct finished {
    std::vector<float> out, qkv, kv;
};

/* Rows of the product's q|k|v, to be finished by cuda_qkv_finish, or by attention itself. */
struct unfinished {
    runs *r;
    const data *x;
    struct cuda_qkv args; /* but what each call has of its own */
    std::vector<float> blocks;
    std::vector<int32_t> numbers;
};

static finished run_finished(cuda_context *context, const unfinished *u, bool itself)
{
    runs *r = u->r;
    check_array qkv = check_copy_of(CUDA_TYPE_BF16, u->x->qkv.data(), u->x->qkv.size());
    check_array kv = check_copy_of(CUDA_TYPE_BF16, u->blocks.data(), u->blocks.size());
    check_array out = check_blank(CUDA_TYPE_BF16, u->x->dout.size());
    check_buffer list = buffer_of(r->list), row_run = buffer_of(r->row_run);
    check_buffer tables = buffer_of(u->numbers), scratch = {};
    struct cuda_qkv finish = u->args;
    struct cuda_attention args = {};
    finished got;

    finish.qkv = qkv.data;
    finish.kv = kv.data;
    set_sizes(&args, r, (float)(1 / sqrt((double)r->d)));
    args.runs = (const cuda_attn_run *)list.data;
    args.row_run = (const int32_t *)row_run.data;
    args.qkv = qkv.data;
    args.ldqkv = u->x->ld;
    args.out = out.data;
    args.kv = kv.data;
    args.tables = (const int32_t *)tables.data;
    args.scratch_bytes = cuda_attention_scratch_bytes(r->heads, r->kv_heads, r->d, args.run_count,
                                                      r->longest, r->furthest);
    scratch = check_buffer_new(args.scratch_bytes);
    args.scratch = scratch.data;
    args.apart = true;
    args.finish = itself ? &finish : NULL;
    if (itself && !cuda_attention_finishes(context, &args))
        check_fail("%d rows are not finished by attention", r->m);
    if (!itself)
        check_rc(cuda_qkv_finish(context, &finish), "cuda_qkv_finish");
    check_rc(cuda_attention(context, &args), "cuda_attention");
    got.out = taken(&out);
    got.qkv = taken(&qkv);
    got.kv = taken(&kv);
    check_free(&qkv, "qkv");
    check_free(&kv, "kv");
    check_free(&out, "out");
    check_buffer_free(&list, "runs");
    check_buffer_free(&row_run, "row_run");
    check_buffer_free(&tables, "tables");
    check_buffer_free(&scratch, "scratch");
    return got;
}

/* NaN is like NaN; says where the first difference is, in rows of `ld`. */
static void compare_finished(const char *what, const std::vector<float> &got,
                             const std::vector<float> &want, size_t ld)
{
    for (size_t i = 0; i < want.size(); i++)
        if (memcmp(&got[i], &want[i], sizeof(float)) != 0 && !(isnan(got[i]) && isnan(want[i]))) {
            check_fail("%s: row %zu, column %zu: %.9g, by qkv_finish %.9g", what, i / ld, i % ld,
                       (double)got[i], (double)want[i]);
            return;
        }
}

/* The block of the pool that is nobody's, or everybody's, counts as zeros. */
static void clear_block(const unfinished *u, int32_t block, finished *got)
{
    const size_t size = 2 * (size_t)u->x->nk * CUDA_KV_BLOCK;

    std::fill_n(got->kv.begin() + (ptrdiff_t)((size_t)block * size), size, 0.0f);
}

/* Rows at these positions, and behind them `spares` that fill up the pass: at position 0 of one
 * block, which all of them write, so that what they come to is nobody's business. Returns the others'
 * results. */
static std::vector<float> check_finished(cuda_context *context, shape s,
                                         const std::vector<int> &positions, bool norm, bool bias,
                                         int spares = 0)
{
    const int nqkv = (s.heads + 2 * s.kv_heads) * s.d, table = 4200;
    check_array norm_q = check_acts(CUDA_TYPE_F32, (size_t)s.d, 1);
    check_array norm_k = check_acts(CUDA_TYPE_F32, (size_t)s.d, 1);
    check_array biases = check_acts(CUDA_TYPE_F32, (size_t)nqkv, 1);
    check_array angles = check_acts(CUDA_TYPE_F32, (size_t)table * (size_t)s.d, 0.7f);
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);
    std::vector<int32_t> pos, blocks;
    check_buffer device_pos, device_blocks;
    unfinished u = {};
    finished itself, apart;

    for (int p : positions)
        add_run(&r, 1, p, -1);
    for (int i = 0; i < spares; i++)
        add_run(&r, 1, 0, -1);

    const data x = data_new(&r, CUDA_TYPE_BF16, 0);
    const size_t real = positions.size() * (size_t)x.nq;

    u.r = &r;
    u.x = &x;
    u.blocks = make_blocks(&r, &x, &u.numbers);
    for (int i = 0; i < spares; i++) /* tables of one number, the last ones */
        u.numbers[u.numbers.size() - 1 - (size_t)i] = u.numbers.back();
    for (const cuda_attn_run &run : r.list) {
        pos.push_back(run.pos);
        blocks.push_back(u.numbers[(size_t)(run.table + run.pos / CUDA_KV_BLOCK)]);
    }
    device_pos = buffer_of(pos);
    device_blocks = buffer_of(blocks);
    u.args.m = r.m;
    u.args.heads = s.heads;
    u.args.kv_heads = s.kv_heads;
    u.args.head_dim = s.d;
    u.args.bias = bias ? (const float *)biases.data : NULL;
    u.args.norm_q = norm ? (const float *)norm_q.data : NULL;
    u.args.norm_k = norm ? (const float *)norm_k.data : NULL;
    u.args.eps = EPS;
    u.args.cos_sin = (const float *)angles.data;
    u.args.pos = (const int32_t *)device_pos.data;
    u.args.blocks = (const int32_t *)device_blocks.data;
    apart = run_finished(context, &u, false);
    itself = run_finished(context, &u, true);
    apart.out.resize(real);
    if (spares > 0)
        for (finished *got : {&apart, &itself})
            clear_block(&u, u.numbers.back(), got);
    for (float value : apart.out)
        if (!isfinite(value)) {
            check_fail("out is not finite");
            break;
        }
    compare_finished("out", itself.out, apart.out, (size_t)x.nq);
    compare_finished("keys and values", itself.kv, apart.kv, (size_t)s.d);
    compare_finished("q|k|v, which stays", itself.qkv, x.qkv, (size_t)nqkv);
    check_free(&norm_q, "norm_q");
    check_free(&norm_k, "norm_k");
    check_free(&biases, "bias");
    check_free(&angles, "angles");
    check_buffer_free(&device_pos, "pos");
    check_buffer_free(&device_blocks, "blocks");
    return apart.out;
}

/* Rows at the edges of blocks, of tiles and of parts, one to eight of them; keys read early, too. */
static void test_finished(cuda_context *context, shape s)
{
    const int all = context->multiprocessors;

    if (check_elsewhere())
        return;
    check_begin("rows finished by attention: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (int kind = 0; kind < 4; kind++) {
        const bool norm = kind % 2, bias = kind / 2;

        check_finished(context, s, {0}, norm, bias);
        check_finished(context, s, {511}, norm, bias);
        check_finished(context, s, {300, 1, 17}, norm, bias);
        check_finished(context, s, {0, 15, 16, 63, 64, 127, 128, 129}, norm, bias);
        check_finished(context, s, {65, 191, 192, 2049, 4095, 4096, 1000, 31}, norm, bias);
        context->multiprocessors = 1; /* blocks take one part after the other */
        check_finished(context, s, {64, 700, 256, 0, 511, 127}, norm, bias);
        context->multiprocessors = all;
    }
    check_end();
}

/* Rows that fill up a pass do not show in the others' results, finished by attention or not. */
static void test_filled_up(cuda_context *context, shape s)
{
    if (check_elsewhere())
        return;
    check_begin("rows that fill up a pass: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (const std::vector<int> &positions :
         {std::vector<int>{300}, std::vector<int>{64, 511, 127}, std::vector<int>{0, 16, 700}}) {
        check_seed = 3; /* of the weights and angles */

        const std::vector<float> alone = check_finished(context, s, positions, true, true);

        check_seed = 3;

        const std::vector<float> filled =
            check_finished(context, s, positions, true, true, 8 - (int)positions.size());

        check_same("out", filled.data(), alone.data(), alone.size() * sizeof(float));
    }
    check_end();
}

/* --- parts --- */

/* A row's own key and value of all heads, from another pool with the same blocks: a block for each
 * row. The kernel behind it may begin before and waits for some time. */
static __global__ void write_own(uint16_t *kv, const uint16_t *from, const cuda_attn_run *runs,
                                 const int32_t *tables, int kv_heads, int d, int64_t clocks)
{
    const cuda_attn_run run = runs[blockIdx.x];
    const size_t block = (size_t)tables[run.table + run.pos / CUDA_KV_BLOCK];
    const int64_t begin = clock64();

    launch_next();
    launch_wait();
    while (clock64() - begin < clocks)
        continue;
    for (int i = (int)threadIdx.x; i < 2 * kv_heads * d; i += (int)blockDim.x) {
        const size_t head = block * 2 * (size_t)kv_heads + (size_t)(i / d);
        const size_t at =
            (head * CUDA_KV_BLOCK + (size_t)(run.pos % CUDA_KV_BLOCK)) * (size_t)d + (size_t)(i % d);

        kv[at] = from[at];
    }
}

static void launch_own(cuda_context *context, const timed *t, const void *from, int64_t clocks)
{
    const struct cuda_attention *a = &t->args;

    check_rc(launch(context, "own keys", write_own, dim3((unsigned)a->run_count), dim3(128), 0,
                    (uint16_t *)a->kv, (const uint16_t *)from, a->runs, a->tables, a->kv_heads,
                    a->head_dim, clocks),
             "own keys");
}

/* The kernel in front lets attention begin and writes the runs' own keys some 20 us later, NaN until
 * then: a tile that holds one and is read too early would be seen. */
static void test_own_late(cuda_context *context, shape s)
{
    const int all = context->multiprocessors;
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);

    if (check_elsewhere())
        return;
    check_begin("own keys written late: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (int pos : {62, 63, 64, 127, 128, 0, 1, 191, 192, 300})
        add_run(&r, 1, pos, -1);

    timed t = timed_new(&r);
    /* of q|k|v, of the result, of the pool */
    const size_t bytes = (size_t)(r.m * r.heads * r.d) * 2, pool = t.buffers[2].bytes;
    void *kept = timed_array(&t, pool), *blank = timed_array(&t, pool);
    std::vector<uint8_t> first(bytes), now(bytes);

    check_cuda(cudaMemcpy(kept, t.args.kv, pool, cudaMemcpyDeviceToDevice), "a copy");
    check_cuda(cudaMemset(blank, 0xff, pool), "memset");
    check_cuda(cudaDeviceSynchronize(), "a copy");
    check_rc(cuda_attention(context, &t.args), "cuda_attention");
    check_cuda(cudaStreamSynchronize(context->stream), "attention");
    check_cuda(cudaMemcpy(first.data(), t.args.out, bytes, cudaMemcpyDeviceToHost), "download");
    for (int round = 0; round < 6; round++) {
        context->multiprocessors = round % 2 ? 1 : all;
        launch_own(context, &t, blank, 0);
        check_cuda(cudaMemsetAsync(t.args.out, 0xff, bytes, context->stream), "memset");
        check_cuda(cudaStreamSynchronize(context->stream), "blanks");
        launch_own(context, &t, kept, 40000);
        check_rc(cuda_attention(context, &t.args), "cuda_attention");
        check_cuda(cudaStreamSynchronize(context->stream), "attention");
        check_cuda(cudaMemcpy(now.data(), t.args.out, bytes, cudaMemcpyDeviceToHost), "download");
        check_same("out", now.data(), first.data(), bytes);
    }
    context->multiprocessors = all;
    timed_free(&t);
    check_end();
}

/* Parts are joined again and again with the same scratch: launched, then replayed in a graph beside a call of fewer parts; always the first call's bits. */
static void test_joined(cuda_context *context, shape s)
{
    const int rounds = 20;
    runs r = runs_new(s.heads, s.kv_heads, s.d, true), few = r;
    cudaGraphExec_t exec;

    if (check_elsewhere())
        return;
    check_begin("parts joined again and again: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (int pos : {0, 127, 128, 129, 500, 1000, 2049, 4095, 4096, 9000})
        add_run(&r, 1, pos, -1);
    add_run(&r, 2, 1022, -1);
    for (int pos : {200, 3, 700})
        add_run(&few, 1, pos, -1);

    timed t = timed_new(&r), other = timed_new(&few);
    const size_t bytes = (size_t)(r.m * r.heads * r.d) * 2;
    std::vector<uint8_t> first(bytes), now(bytes);

    other.args.scratch = t.args.scratch;
    other.args.scratch_bytes = t.args.scratch_bytes;
    check_rc(cuda_attention(context, &t.args), "cuda_attention");
    check_cuda(cudaStreamSynchronize(context->stream), "attention");
    check_cuda(cudaMemcpy(first.data(), t.args.out, bytes, cudaMemcpyDeviceToHost), "download");
    exec = check_graph(context, [&] {
        check_rc(cuda_attention(context, &t.args), "cuda_attention");
        check_rc(cuda_attention(context, &other.args), "cuda_attention");
    });
    for (int round = 0; round < 2 * rounds; round++) {
        check_cuda(cudaMemsetAsync(t.args.out, 0xff, bytes, context->stream), "memset");
        if (round % 2 == 0)
            check_rc(cuda_attention(context, &t.args), "cuda_attention");
        else
            check_cuda(cudaGraphLaunch(exec, context->stream), "launch");
        check_cuda(cudaStreamSynchronize(context->stream), "attention");
        check_cuda(cudaMemcpy(now.data(), t.args.out, bytes, cudaMemcpyDeviceToHost), "download");
        check_same(round % 2 == 0 ? "launched again" : "replayed", now.data(), first.data(), bytes);
    }
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    timed_free(&other);
    timed_free(&t);
    check_end();
}

/* Other runs in the place of those that a graph was captured with: one row each, of which row i is at
 * position `far` or before it, and its blocks are anywhere in the pool. */
static void place_runs(const timed *t, int far, int round)
{
    const int blocks = far / CUDA_KV_BLOCK + 1, rows = t->args.run_count;
    std::vector<cuda_attn_run> list((size_t)rows);
    std::vector<int32_t> tables((size_t)(rows * blocks));

    for (size_t i = 0; i < tables.size(); i++)
        tables[i] = (int32_t)i;
    check_seed = (uint64_t)round + 1;
    for (size_t i = tables.size() - 1; i > 0; i--)
        std::swap(tables[i], tables[(size_t)check_below((int)i + 1)]);
    for (int i = 0; i < rows; i++) {
        list[(size_t)i].first = i;
        list[(size_t)i].count = 1;
        list[(size_t)i].pos = i < 3 ? 127 + i - round : check_below(far + 1);
        list[(size_t)i].table = i * blocks;
    }
    check_cuda(cudaMemcpy((void *)t->args.runs, list.data(), list.size() * sizeof(list[0]),
                          cudaMemcpyHostToDevice),
               "runs");
    check_cuda(cudaMemcpy((void *)t->args.tables, tables.data(), tables.size() * sizeof(tables[0]),
                          cudaMemcpyHostToDevice),
               "tables");
    check_cuda(cudaDeviceSynchronize(), "runs");
}

/* A graph of decoding, whose blocks walk, gives at each replay what the runs that are there then give
 * when launched: by more blocks, and with room for more parts. */
static void test_replayed(cuda_context *context, shape s)
{
    const int rows = 12, far = 1199, all = context->multiprocessors;
    runs r = runs_new(s.heads, s.kv_heads, s.d, true);
    cudaGraphExec_t exec;

    if (check_elsewhere())
        return;
    check_begin("replayed with other runs: %d of %d heads of %d", s.heads, s.kv_heads, s.d);
    for (int i = 0; i < rows; i++)
        add_run(&r, 1, far, -1);
    r.furthest = 2048; /* which the scratch is for, and no run reaches */

    timed t = timed_new(&r);
    const size_t bytes = (size_t)(r.m * r.heads * r.d) * 2;
    std::vector<uint8_t> replayed(bytes), launched(bytes);

    t.args.furthest = far + 1;
    context->multiprocessors = 1;
    exec = check_graph(context,
                       [&] { check_rc(cuda_attention(context, &t.args), "cuda_attention"); });
    context->multiprocessors = all;
    t.args.furthest = r.furthest;
    for (int round = 0; round < 6; round++) {
        place_runs(&t, far, round % 3);
        for (std::vector<uint8_t> *out : {&replayed, &launched}) {
            check_cuda(cudaMemsetAsync(t.args.out, 0xff, bytes, context->stream), "memset");
            if (out == &replayed)
                check_cuda(cudaGraphLaunch(exec, context->stream), "launch");
            else
                check_rc(cuda_attention(context, &t.args), "cuda_attention");
            check_cuda(cudaStreamSynchronize(context->stream), "attention");
            check_cuda(cudaMemcpy(out->data(), t.args.out, bytes, cudaMemcpyDeviceToHost),
                       "download");
        }
        check_same("replayed", replayed.data(), launched.data(), bytes);
    }
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    timed_free(&t);
    check_end();
}

/* --- times --- */

/* TFLOP/s count what the mask leaves: 4 d for a query, a key and a head, and 10 d for the gradient.
 */
static void time_training(cuda_context *context, const char *what, runs *r)
{
    double pairs = 0;
    char name[128];
    timed t = timed_new(r);

    for (const cuda_attn_run &run : r->list)
        pairs += run.count * (run.pos + (run.count + 1) / 2.0);
    pairs *= r->heads;
    snprintf(name, sizeof(name), "%s, forward", what);
    check_report(name, check_median_ms(context, [&] { cuda_attention(context, &t.args); }), 0,
                 4.0 * r->d * pairs);
    snprintf(name, sizeof(name), "%s, backward", what);
    check_report(name, check_median_ms(context, [&] { cuda_attention_bwd(context, &t.bwd); }), 0,
                 10.0 * r->d * pairs);
    timed_free(&t);
}

static void time_serving(cuda_context *context, const char *what, runs *r)
{
    double bytes = 0;
    timed t = timed_new(r);

    for (const cuda_attn_run &run : r->list)
        bytes += 4.0 * (run.pos + run.count) * r->kv_heads * r->d;
    check_report(what, check_median_ms(context, [&] { cuda_attention(context, &t.args); }), bytes,
                 0);
    timed_free(&t);
}

static runs equal_runs(shape s, bool paged, int runs_count, int count, int pos)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, paged);

    for (int i = 0; i < runs_count; i++)
        add_run(&r, count, pos, -1);
    list_children(&r);
    return r;
}

static void times(cuda_context *context)
{
    const shape large = {32, 8, 128}, small = {9, 3, 64};
    runs shared = equal_runs(large, false, 1, 1024, 0), r;

    r = equal_runs(large, false, 16, 256, 0);
    time_training(context, "16 x 256, 32/8 heads of 128", &r);
    r = equal_runs(large, false, 4, 1024, 0);
    time_training(context, "4 x 1024, 32/8 heads of 128", &r);
    r = equal_runs(large, false, 1, 4096, 0);
    time_training(context, "1 x 4096, 32/8 heads of 128", &r);
    for (int i = 0; i < 8; i++)
        add_run(&shared, 384, 1024, 0);
    list_children(&shared);
    time_training(context, "1024 and 8 x 384 behind it, 32/8 heads of 128", &shared);
    r = equal_runs(small, false, 8, 512, 0);
    time_training(context, "8 x 512, 9/3 heads of 64", &r);
    r = equal_runs(large, true, 1, 1, 2047);
    time_serving(context, "decode 1 x 2048, 32/8 heads of 128", &r);
    r = equal_runs(large, true, 64, 1, 2047);
    time_serving(context, "decode 64 x 2048, 32/8 heads of 128", &r);
    r = equal_runs(large, true, 64, 1, 575);
    time_serving(context, "decode 64 x 576, 32/8 heads of 128", &r);
    r = equal_runs(large, true, 8, 1, 32767);
    time_serving(context, "decode 8 x 32768, 32/8 heads of 128", &r);
    r = equal_runs(small, true, 16, 1, 1023);
    time_serving(context, "decode 16 x 1024, 9/3 heads of 64", &r);
    r = equal_runs(large, true, 1, 512, 8192);
    time_serving(context, "512 queries behind 8192, 32/8 heads of 128", &r);
}

static void test_type(enum cuda_type type)
{
    cuda_context context = {};

    check_open(type, &context);
    if (check_is_small()) /* tiles of 128 rows are for packs that fill the card */
        context.multiprocessors = 8;
    if (type == CUDA_TYPE_BF16) {
        for (shape s : tiled_shapes) {
            test_rows(&context, s, "tiled");
            test_shared(&context, s, "tiled");
            test_paged(&context, s, "tiled");
            test_company(&context, s);
        }
        test_large(&context, {4, 2, 64});
        test_large(&context, {4, 1, 128});
        test_paged(&context, {20, 1, 64}, "tiled, more than 16 heads in a group");
        test_long(&context, {4, 1, 128});
        test_long(&context, {3, 1, 64});
        test_same_bits(&context, {4, 2, 64});
        test_same_bits(&context, {4, 2, 128});
        for (shape s : {shape{4, 2, 64}, shape{8, 2, 128}, shape{9, 3, 64}, shape{16, 1, 128},
                        shape{15, 1, 64}, shape{32, 8, 128}})
            test_finished(&context, s);
        for (shape s : {shape{8, 2, 128}, shape{9, 3, 64}}) {
            test_walk(&context, s);
            test_joined(&context, s);
            test_replayed(&context, s);
            test_own_late(&context, s);
            test_filled_up(&context, s);
        }
        test_walk(&context, {4, 2, 64}); /* runs of up to 8 rows */
        test_walk(&context, {16, 1, 128});
        test_refusals(&context);
    }
    for (shape s : plain_shapes)
        if (type == CUDA_TYPE_F32 || s.d != 64) {
            test_rows(&context, s, "plain");
            test_shared(&context, s, "plain");
            test_paged(&context, s, "plain");
        }
    test_company(&context, {2, 1, 16});
    if (type == CUDA_TYPE_BF16 && check_measures())
        times(&context);
    cuda_context_close(&context);
}

int main(void)
{
    test_type(CUDA_TYPE_BF16);
    test_type(CUDA_TYPE_F32);
    return check_finish();
}
