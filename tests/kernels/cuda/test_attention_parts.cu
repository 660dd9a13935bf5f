/* Decoding in parts of the keys: against double sums on the host, blocks that walk over parts, rows
 * that attention finishes against qkv_finish, the same bits however often parts are joined,
 * replayed in graphs, beside rows that fill up a pass and with own keys that come late; times. */
#include "attention_rig.cuh"
#include "cuda/cuda_rows.h"
#include "cuda/launch.cuh"

#include <algorithm>
#include <utility>

/* --- against double sums --- */

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

/* More parts than blocks: runs of all lengths, of one row and of as many as are done in parts, and
 * one of more. The numbers are those of as many blocks as the card holds, and of fewer runs; so
 * they are where older keys are read early. */
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
 * block, which all of them write, so that what they come to is nobody's business. Returns the
 * others' results. */
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

/* Rows at the edges of blocks, of tiles and of parts, one to eight; keys read early, too. */
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

/* --- the same bits again --- */

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
        const size_t at = (head * CUDA_KV_BLOCK + (size_t)(run.pos % CUDA_KV_BLOCK)) * (size_t)d +
                          (size_t)(i % d);

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

/* The kernel in front lets attention begin and writes the runs' own keys some 20 us later, NaN
 * until then: a tile that holds one and is read too early would be seen. */
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

/* Parts are joined again and again with the same scratch: launched, then replayed in a graph beside
 * a call of fewer parts; always the first call's bits. */
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

/* Other runs in the place of those that a graph was captured with: one row each, of which row i is
 * at position `far` or before it, and its blocks are anywhere in the pool. */
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

/* A graph of decoding, whose blocks walk, gives at each replay what the runs that are there then
 * give when launched: by more blocks, and with room for more parts. */
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
    exec =
        check_graph(context, [&] { check_rc(cuda_attention(context, &t.args), "cuda_attention"); });
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

static void times(cuda_context *context)
{
    const shape large = {32, 8, 128}, small = {9, 3, 64};
    runs r;

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
}

/* Parts are of bfloat16 alone. */
int main(void)
{
    cuda_context context = {};

    open_card(CUDA_TYPE_BF16, &context);
    test_long(&context, {4, 1, 128});
    test_long(&context, {3, 1, 64});
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
    if (check_measures())
        times(&context);
    cuda_context_close(&context);
    return check_finish();
}
