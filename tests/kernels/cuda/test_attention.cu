/* Attention on the device against double sums on the host: packs of runs with and without shared
 * prompts, paged keys and values, both elements, the tiled and the plain kernels; that a row's
 * numbers do not depend on its company; times of training and prefill. */
#include "attention_rig.cuh"
#include "cuda/cuda_rows.h"

/* --- groups of cases --- */

static const shape tiled_shapes[] = {{4, 2, 64}, {2, 2, 128}, {8, 2, 128},
                                     {9, 3, 64}, {7, 1, 64},  {8, 1, 128}};
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

/* What two blocks share in the gradient of keys: walks of one, two and three tiles of queries, of
 * many runs in one window; and a prompt some of whose keys a child does not see, so that where
 * the prompt lies decides whether a window's walk passes over that child. Which block has the tiles
 * behind it must not change with that. */
static void test_walks(cuda_context *context, shape s)
{
    const int tile = 64 / (s.heads / s.kv_heads), prompt = 200;
    runs r = runs_new(s.heads, s.kv_heads, s.d, false);

    if (check_elsewhere())
        return;
    check_begin("walks: %s, %d of %d heads of %d", check_name(context->act), s.heads, s.kv_heads,
                s.d);
    for (int i = 0; i < 20; i++)
        add_run(&r, 1, 0, -1);
    for (int tiles : {1, 2, 3})
        for (int rows : {tiles * tile - 1, tiles * tile, tiles * tile + 1})
            add_run(&r, rows, 0, -1);
    list_children(&r);
    check_runs(context, &r, 0);
    r = runs_new(s.heads, s.kv_heads, s.d, false);
    add_run(&r, 70, 0, -1);
    add_run(&r, prompt, 0, -1);
    add_run(&r, 2 * tile + 1, 40, 1); /* three tiles that most of the prompt is spared */
    add_run(&r, tile, prompt, 1);
    add_run(&r, 1, 150, 1);
    add_run(&r, 1, prompt, 1);
    add_run(&r, 2 * tile + 1, prompt, 1);
    list_children(&r);
    check_runs(context, &r, 0);
    check_company(context, &r, {1, 2, 3, 4, 5, 6});
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

static void times(cuda_context *context)
{
    const shape large = {32, 8, 128}, small = {9, 3, 64};
    runs shared = equal_runs(large, false, 1, 1024, 0), r;

    r = equal_runs(large, false, 16, 256, 0);
    time_training(context, "16 x 256, 32/8 heads of 128", &r);
    r = equal_runs(large, false, 4, 1024, 0);
    time_training(context, "4 x 1024, 32/8 heads of 128", &r);
    for (int rows : {350, 1024}) {
        char name[64];

        snprintf(name, sizeof(name), "1 x %d, 32/8 heads of 128", rows);
        r = equal_runs(large, false, 1, rows, 0);
        time_training(context, name, &r);
    }
    r = equal_runs({16, 8, 128}, false, 4, 1024, 0);
    time_training(context, "4 x 1024, 16/8 heads of 128", &r);
    r = equal_runs(small, false, 4, 256, 0);
    time_training(context, "4 x 256, 9/3 heads of 64", &r);
    r = equal_runs(large, false, 1, 4096, 0);
    time_training(context, "1 x 4096, 32/8 heads of 128", &r);
    for (int i = 0; i < 8; i++)
        add_run(&shared, 384, 1024, 0);
    list_children(&shared);
    time_training(context, "1024 and 8 x 384 behind it, 32/8 heads of 128", &shared);
    r = equal_runs(small, false, 8, 512, 0);
    time_training(context, "8 x 512, 9/3 heads of 64", &r);
    r = equal_runs(large, true, 1, 512, 8192);
    time_serving(context, "512 queries behind 8192, 32/8 heads of 128", &r);
}

static void test_type(enum cuda_type type)
{
    cuda_context context = {};

    open_card(type, &context);
    if (type == CUDA_TYPE_BF16) {
        for (shape s : tiled_shapes) {
            test_rows(&context, s, "tiled");
            test_shared(&context, s, "tiled");
            test_paged(&context, s, "tiled");
            test_company(&context, s);
            test_walks(&context, s);
        }
        test_large(&context, {4, 2, 64});
        test_large(&context, {4, 1, 128});
        test_paged(&context, {20, 1, 64}, "tiled, more than 16 heads in a group");
        test_same_bits(&context, {4, 2, 64});
        test_same_bits(&context, {4, 2, 128});
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
