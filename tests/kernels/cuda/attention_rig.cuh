/* What the attention tests share: packs of runs with and without shared prompts, their rows and
 * paged keys and values, sums in double of the forward pass and the gradient, one call on the
 * device and the comparison of both; that a row's numbers do not depend on its company. And passes
 * whose numbers are random, for times and repetitions. */
#ifndef CLAAS_TESTS_CUDA_ATTENTION_RIG_CUH
#define CLAAS_TESTS_CUDA_ATTENTION_RIG_CUH

#include "cuda_check.h"
#include "cuda/attention.h"

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

static inline runs runs_new(int heads, int kv_heads, int d, bool paged)
{
    runs r = {};

    r.heads = heads;
    r.kv_heads = kv_heads;
    r.d = d;
    r.paged = paged;
    return r;
}

/* Appends `count` rows at positions pos …; parent: an index, or -1. */
static inline void add_run(runs *r, int count, int pos, int parent, int sequence)
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

static inline void add_run(runs *r, int count, int pos, int parent)
{
    add_run(r, count, pos, parent, (int)r->list.size());
}

static inline void list_children(runs *r)
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
static inline void random_row(float *to, int count, enum cuda_type type, int sequence, int row,
                              int kind)
{
    check_seed = (uint64_t)(sequence + 1) * 1000003u + (uint64_t)row * 7919u + (uint64_t)kind;
    for (int i = 0; i < 4; i++)
        check_bits();
    for (int j = 0; j < count; j++)
        to[j] = check_rounded(type, check_random());
}

static inline data data_new(const runs *r, enum cuda_type type, int pad)
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
static inline size_t row_of(const cuda_attn_run *run, int p)
{
    return (size_t)(p < run->pos ? run->parent_first + p : run->first + p - run->pos);
}

static inline const float *key_of(const runs *r, const data *x, size_t run, int p, int g, int value)
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

static inline double dot(const float *a, const float *b, int n)
{
    double sum = 0;

    for (int j = 0; j < n; j++)
        sum += (double)a[j] * b[j];
    return sum;
}

/* Query i of a run, one head; p: its weights. */
static inline void reference_row(const runs *r, const data *x, double scale, size_t run, int i,
                                 int head, reference *ref, std::vector<double> *p)
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
static inline void reference_row_bwd(const runs *r, const data *x, double scale, size_t run, int i,
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

static inline reference reference_of(const runs *r, const data *x, double scale,
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
static inline std::vector<float> make_blocks(runs *r, const data *x, std::vector<int32_t> *tables)
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

template <typename T> static inline check_buffer buffer_of(const std::vector<T> &v)
{
    return check_buffer_of(v.data(), v.size() * sizeof(T));
}

static inline std::vector<float> taken(check_array *a)
{
    check_get(a);
    return std::vector<float>(a->host, a->host + a->count);
}

static inline void set_sizes(struct cuda_attention *args, const runs *r, float scale)
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
static inline check_buffer backwards_order(int m)
{
    std::vector<int64_t> order;

    for (int64_t i = (m + CUDA_KEY_WINDOW - 1) / CUDA_KEY_WINDOW - 1; i >= 0; i--)
        order.push_back((7 - i) * ((int64_t)1 << 32) + i);
    return buffer_of(order);
}

static inline results run_device(cuda_context *context, runs *r, const data *x, float scale)
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
static inline void compare_columns(const char *what, const std::vector<float> *got,
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

static inline void compare(const runs *r, const data *x, const results *got, const reference *want)
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

static inline void check_runs(cuda_context *context, runs *r, int pad)
{
    const double scale = 1 / sqrt((double)r->d);
    const data x = data_new(r, context->act, pad);
    const results got = run_device(context, r, &x, (float)scale);
    const reference want = reference_of(r, &x, (double)(float)scale, &got.out);

    compare(r, &x, &got, &want);
}

/* The runs that `keep` names, and the rest dropped: the kept rows must keep their bits. */
static inline void check_company(cuda_context *context, runs *r, const std::vector<size_t> &keep)
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

/* --- passes whose numbers are random --- */

/* Buffers of a pass that is timed or repeated; the runs' rows and keys are random. */
struct timed {
    struct cuda_attention args;
    struct cuda_attention_bwd bwd;
    std::vector<check_buffer> buffers;
};

static inline void *timed_array(timed *t, size_t bytes)
{
    t->buffers.push_back(check_buffer_new(bytes));
    return t->buffers.back().data;
}
static inline void *timed_acts(timed *t, size_t count)
{
    void *p = timed_array(t, count * 2);

    check_fill(CUDA_TYPE_BF16, p, count, 1);
    return p;
}
template <typename T> static inline const T *timed_copy(timed *t, const std::vector<T> &v)
{
    t->buffers.push_back(buffer_of(v));
    return (const T *)t->buffers.back().data;
}

static inline timed timed_new(runs *r)
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

static inline void timed_free(timed *t)
{
    for (check_buffer &b : t->buffers)
        check_buffer_free(&b, "a timed array");
    t->buffers.clear();
}

/* --- cases and times --- */

struct shape {
    int heads, kv_heads, d;
};

static inline runs equal_runs(shape s, bool paged, int runs_count, int count, int pos)
{
    runs r = runs_new(s.heads, s.kv_heads, s.d, paged);

    for (int i = 0; i < runs_count; i++)
        add_run(&r, count, pos, -1);
    list_children(&r);
    return r;
}

static inline void time_serving(cuda_context *context, const char *what, runs *r)
{
    double bytes = 0;
    timed t = timed_new(r);

    for (const cuda_attn_run &run : r->list)
        bytes += 4.0 * (run.pos + run.count) * r->kv_heads * r->d;
    check_report(what, check_median_ms(context, [&] { cuda_attention(context, &t.args); }), bytes,
                 0);
    timed_free(&t);
}

/* Opens the device; under a tool it counts as a small card: tiles of 128 rows are for packs that
 * fill it. */
static inline void open_card(enum cuda_type type, cuda_context *context)
{
    check_open(type, context);
    if (check_is_small())
        context->multiprocessors = 8;
}

#endif
