/* LoRA in the launch of a frozen product of few rows (joined): the bits that it has in launches of
 * its own behind the product (apart), for every number of 8 rows and every cut of k, again and
 * again, in a graph replayed for other adapters, in a chain of early starts; and against sums in
 * double. The rows of nobody must have the product's bits, the counters must be zero again. */
#include "lora_rig.cuh"
#include "cuda/gemm.h"

/* Beside a rig: the frozen weight, what its product is added to where a layer does that, and the
 * counters. */
static void open_product(struct rig *r)
{
    const size_t n = (size_t)r->lora.weight->n, k = (size_t)r->lora.weight->k;
    const uint32_t none[2] = {0, 0};

    r->w = check_acts(CUDA_TYPE_BF16, n * k, 0.05f);
    r->residual = check_acts(CUDA_TYPE_BF16, (size_t)r->m * n, 1.0f);
    r->turns = check_buffer_of(none, sizeof(none));
    r->lora.turns = (uint32_t *)r->turns.data;
}

static void close_product(struct rig *r)
{
    check_free(&r->w, "W");
    check_free(&r->residual, "the residual");
    check_buffer_free(&r->turns, "the counters");
}

/* x W^T, with the residual for o and down; `joined`: with LoRA. */
static struct cuda_gemm product_of(const struct rig *r, bool joined)
{
    const struct cuda_weight *weight = r->lora.weight;
    const bool adds = r->lora.kind == CUDA_O || r->lora.kind == CUDA_DOWN;
    struct cuda_gemm gemm = {};

    gemm.form = CUDA_GEMM_NT;
    gemm.m = r->m;
    gemm.n = gemm.ldo = weight->n;
    gemm.k = gemm.lda = gemm.ldb = weight->k;
    gemm.a = r->lora.x;
    gemm.b = r->w.data;
    gemm.out = r->lora.y;
    gemm.out_type = CUDA_TYPE_BF16;
    gemm.alpha = 1.0f;
    gemm.beta = adds ? 1.0f : 0.0f;
    gemm.add = adds ? r->residual.data : NULL;
    gemm.frozen = true;
    gemm.lora = joined ? &r->lora : NULL;
    return gemm;
}

/* Queues the product and LoRA, in one launch or in three. */
static void queue(struct rig *r, bool joined)
{
    const struct cuda_gemm gemm = product_of(r, joined);

    if (!joined)
        check_rc(cuda_lora_shrink(r->context, &r->lora), "cuda_lora_shrink");
    check_rc(cuda_gemm(r->context, &gemm), "cuda_gemm");
    if (!joined)
        check_rc(cuda_lora_expand(r->context, &r->lora), "cuda_lora_expand");
}

/* NaN everywhere: what a run leaves out is seen. */
static void poison(struct check_array *a)
{
    check_cuda(cudaMemset(a->data, 0xff, a->buffer.bytes), "poison");
    check_cuda(cudaDeviceSynchronize(), "poison");
}

/* Rows first … first+count-1 of a matrix as it is on the device, bit by bit; NaN equals NaN. */
static void compare_bits(const char *what, struct check_array *got, const float *want, int first,
                         int count, int columns)
{
    size_t wrong = 0, at = 0;

    check_get(got);
    for (size_t i = (size_t)first * columns; i < (size_t)(first + count) * columns; i++) {
        const bool same = isnan(want[i]) ? (bool)isnan(got->host[i])
                                         : memcmp(&got->host[i], &want[i], sizeof(float)) == 0;

        at = same || wrong > 0 ? at : i;
        wrong += !same;
    }
    if (wrong > 0)
        check_fail(
            "%s: %zu of %d x %d values differ, first row %zu, column %zu: got %.9g, want %.9g",
            what, wrong, count, columns, at / columns, at % columns, (double)got->host[at],
            (double)want[at]);
}

static void check_turns(const struct rig *r)
{
    uint32_t turns[2];

    check_download(&r->turns, turns);
    if (turns[0] != 0 || turns[1] != 0)
        check_fail("the counters are %u and %u after a launch, not 0", turns[0], turns[1]);
}

/* One joined launch against y and S of the launches apart. */
static void check_joined(struct rig *r, const char *what, const float *y, const float *s)
{
    poison(&r->y);
    poison(&r->s);
    queue(r, true);
    compare_bits(what, &r->y, y, 0, r->m, r->lora.weight->n);
    compare_bits("S beside the product", &r->s, s, 0, r->m, r->lora.ld);
    check_turns(r);
}

/* y of the description at hand, by launches apart. */
static float *run_apart(struct rig *r)
{
    poison(&r->y);
    poison(&r->sums);
    queue(r, false);
    check_get(&r->y);
    return copy_floats(&r->y);
}

/* The rows of one group alone, the others being nobody's now: theirs as among the others, the rest
 * the product alone. */
static void check_joined_alone(struct rig *r, int g, const float *among, const float *product)
{
    const int columns = r->lora.weight->n, first = r->groups[g].first;
    const int end = first + r->groups[g].count;

    describe(r, g, 1, true);
    poison(&r->y);
    queue(r, true);
    compare_bits("y alone", &r->y, among, first, end - first, columns);
    compare_bits("rows of nobody before", &r->y, product, 0, first, columns);
    compare_bits("rows of nobody behind", &r->y, product, end, r->m - end, columns);
    check_turns(r);
    describe(r, 0, r->count, true);
}

/* Two launches captured once, replayed for all groups, for one, and for all again. */
static void check_replayed(struct rig *r, int g)
{
    float *all = run_apart(r), *one;
    cudaGraphExec_t exec = NULL;
    cudaGraph_t graph = NULL;

    describe(r, g, 1, true);
    one = run_apart(r);
    check_cuda(cudaStreamBeginCapture(r->context->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    queue(r, true);
    queue(r, true);
    check_cuda(cudaStreamEndCapture(r->context->stream, &graph), "capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    for (int i = 0; i < 4; i++) {
        describe(r, i == 1 ? g : 0, i == 1 ? 1 : r->count, true);
        poison(&r->y);
        check_cuda(cudaGraphLaunch(exec, r->context->stream), "a graph");
        compare_bits(i == 1 ? "replayed for one group" : "replayed for all groups", &r->y,
                     i == 1 ? one : all, 0, r->m, r->lora.weight->n);
        check_turns(r);
    }
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    free(all);
    free(one);
}

/* x and y are of one size: each is the other's operand by turns, without waiting on the host,
 * so that a launch that begins too early, or counts for its neighbour, is seen. */
static void check_chain(struct rig *r)
{
    const void *x = r->lora.x;
    void *y = r->lora.y;
    float *x_before = copy_floats(&r->x), *want[2] = {};
    const bool early = r->context->early;

    for (int run = 0; run < 2; run++) {
        const bool joined = run == 1;

        memcpy(r->x.host, x_before, r->x.count * sizeof(float));
        check_put(&r->x);
        poison(&r->y);
        r->context->early = early && joined;
        for (int i = 0; i < 8; i++) {
            r->lora.x = i % 2 == 0 ? x : y;
            r->lora.y = i % 2 == 0 ? y : (void *)x;
            queue(r, joined);
        }
        if (joined) {
            compare_bits("a chain's last result", &r->x, want[0], 0, r->m, r->lora.weight->n);
            compare_bits("a chain's last but one", &r->y, want[1], 0, r->m, r->lora.weight->n);
            check_turns(r);
        } else {
            check_get(&r->x);
            check_get(&r->y);
            want[0] = copy_floats(&r->x);
            want[1] = copy_floats(&r->y);
        }
    }
    r->lora.x = x;
    r->lora.y = y;
    r->context->early = early;
    memcpy(r->x.host, x_before, r->x.count * sizeof(float));
    check_put(&r->x);
    free(x_before);
    free(want[0]);
    free(want[1]);
}

/* Two operands and two results by turns, without waiting on the host: who takes S, sums or counts
 * of the launch before is seen. */
static void check_by_turns(struct rig *r)
{
    const void *x = r->lora.x;
    void *y = r->lora.y;
    float *of_other = copy_floats(&r->x), *want[2] = {run_apart(r), NULL};
    struct check_array other_x, other_y = check_blank(r->context->act, r->y.count);

    for (size_t i = 0; i < r->x.count; i++)
        of_other[i] *= -0.5f;
    other_x = check_copy_of(r->context->act, of_other, r->x.count);
    r->lora.x = other_x.data;
    want[1] = run_apart(r);
    poison(&r->y);
    for (int i = 0; i < 8; i++) {
        r->lora.x = i % 2 == 0 ? x : other_x.data;
        r->lora.y = i % 2 == 0 ? y : other_y.data;
        queue(r, true);
    }
    compare_bits("by turns", &r->y, want[0], 0, r->m, r->lora.weight->n);
    compare_bits("by turns, the other", &other_y, want[1], 0, r->m, r->lora.weight->n);
    check_turns(r);
    r->lora.x = x;
    r->lora.y = y;
    check_free(&other_x, "the other operand");
    check_free(&other_y, "the other result");
    free(of_other);
    free(want[0]);
    free(want[1]);
}

/* What a weight's shape says: n and k of 256 or more, parts that begin at multiples of 128. */
static bool may_join(const struct cuda_weight *weight)
{
    for (int i = 0; i < weight->part_count; i++)
        if (weight->parts[i].row % 128 != 0)
            return false;
    return weight->n >= 256 && weight->k >= 256;
}

static void check_product(struct rig *r)
{
    const struct cuda_gemm gemm = product_of(r, false);
    float *y, *s;

    poison(&r->y);
    check_rc(cuda_gemm(r->context, &gemm), "cuda_gemm");
    check_get(&r->y);
    free(r->y_before);
    r->y_before = copy_floats(&r->y);
    y = run_apart(r);
    fetch_s(r);
    s = copy_floats(&r->s);
    for (int i = 0; i < 3; i++)
        check_joined(r, i == 0 ? "y" : "y again", y, s);
    check_s_of(r);
    check_y_of(r);
    r->context->early = !r->context->early && r->context->arch >= 90;
    check_joined(r, "y with the other kind of start", y, s);
    r->context->early = !r->context->early && r->context->arch >= 90;
    check_joined_alone(r, r->count / 2, y, r->y_before);
    check_replayed(r, r->count / 2);
    check_by_turns(r);
    if (r->lora.weight->n == r->lora.weight->k)
        check_chain(r);
    free(y);
    free(s);
}

static void run_joined(struct cuda_context *context, const struct dims *dims, const char *name,
                       const struct spec *specs, int count, int behind)
{
    static struct rig r;

    int kind = dims->hidden > 1024 ? CUDA_DOWN : dims->inter > 4096 ? CUDA_GATE_UP : 0;

    for (; kind < CUDA_WEIGHTS; kind++) {
        if (check_elsewhere())
            continue;
        check_begin("lora joined, %s, %s, %s", dims->name, name, kind_name(kind));
        open_rig(&r, context, dims, (enum cuda_weight_kind)kind, specs, count, true, behind);
        open_product(&r);
        const struct cuda_gemm gemm = product_of(&r, true);
        const bool joins = cuda_gemm_adds_lora(context, &gemm);

        if (joins != may_join(r.lora.weight))
            check_fail("cuda_gemm_adds_lora says %d of %d x %d", joins, gemm.n, gemm.k);
        else if (joins)
            check_product(&r);
        else if (cuda_gemm(context, &gemm) >= 0)
            check_fail("cuda_gemm took LoRA that it cannot add");
        close_product(&r);
        close_rig(&r);
        check_end();
    }
}

/* k from which on the blocks that make S are teams, cut so that the last chunk is not whole and its
 * last quarters are empty, quarters not a multiple of a group of terms; in 8 parts (two teams in a
 * cluster, of which one may have nothing to do) and in 4. One row of a large rank has more slabs
 * than there are teams, as have 64 adapters; "tall" has them with a tile of more than 8 rows. */
static void test_teams(void)
{
    static const struct dims eight_parts = {"long", 256, 256, 128, 8264};
    static const struct dims four_parts = {"long and wide", 3976, 256, 128, 8264};
    static const struct spec small[] = {{8, ALL, 0, 1}}, large[] = {{128, ALL, 0, 1}};
    static const struct spec without[] = {
        {128, ALL, 1, 2}, {40, 1u << CLAAS_MODULE_K, 0, 2}, {24, SOME, 0, 3}};
    static const struct spec shared[] = {{72, ALL, 0, 64}};
    static struct spec many[GROUPS_MAX], tall[GROUPS_MAX - 8];
    const struct dims *const all[] = {&eight_parts, &four_parts};
    struct cuda_context context;

    for (int i = 0; i < GROUPS_MAX; i++)
        many[i] = {8 + 8 * (i % 5), i % 7 == 3 ? 1u << CLAAS_MODULE_K : ALL, 0, 1};
    for (int i = 0; i < GROUPS_MAX - 8; i++)
        tall[i] = {128, ALL, 0, i == 0 ? 9 : 1};
    check_open(CUDA_TYPE_BF16, &context);
    for (const struct dims *dims : all) {
        run_joined(&context, dims, "one of rank 128", large, 1, 0);
        run_joined(&context, dims, "three, one without", without, 3, 0);
        if (check_leaves_out((double)GROUPS_MAX * dims->hidden * dims->inter,
                             CHECK_SMALL_PRODUCTS))
            continue;
        run_joined(&context, dims, "64 of 64", many, GROUPS_MAX, 0);
        run_joined(&context, dims, "tall", tall, GROUPS_MAX - 8, 0);
        if (dims == &four_parts)
            continue;
        run_joined(&context, dims, "one of rank 8", small, 1, 0);
        run_joined(&context, dims, "8 of 8", many, 8, 0);
        run_joined(&context, dims, "64 of one", shared, 1, 0);
    }
    cuda_context_close(&context);
}

/* Sizes for every cut of k: 2 (k = 256), 4, 8, and none (16,384 columns, of which only the long
 * weights are tried); k and n that are no multiples of a stage and of a block; parts that begin
 * within one. */
static void test_joined(void)
{
    static const struct dims smol = {"SmolLM2", 576, 576, 192, 1536};
    static const struct dims narrow = {"narrow", 256, 512, 128, 384};
    static const struct dims uneven = {"uneven", 328, 384, 128, 520};
    static const struct dims wide = {"wide", 256, 256, 128, 8192};
    static const struct spec one[] = {{32, ALL, 0, 1}}, two[] = {{16, ALL, 0, 2}};
    static const struct spec sixteen[] = {{64, ALL, 0, 16}};
    static const struct spec seventeen[] = {{32, ALL, 0, 17}}, shared[] = {{32, ALL, 0, 64}};
    static const struct spec mixed[] = {
        {8, ALL, 2, 5},   {16, SOME, 0, 1}, {128, ALL, 0, 3}, {64, 1u << CLAAS_MODULE_K, 1, 2},
        {96, ALL, 0, 16},
    };
    static const struct spec three[] = {{32, ALL, 1, 17}, {24, SOME, 3, 1}, {40, ALL, 0, 33}};
    static struct spec many[GROUPS_MAX], eight[8];
    const struct dims *const all[] = {&narrow, &uneven, &smol, &wide};
    struct cuda_context context;

    for (int i = 0; i < GROUPS_MAX; i++)
        many[i] = {8 + 8 * (i % 4), i % 3 == 0 ? SOME : ALL, 0, 1};
    for (int i = 0; i < 8; i++)
        eight[i] = {i % 2 == 0 ? 32 : 64, i % 5 == 3 ? SOME : ALL, 0, 1};
    check_open(CUDA_TYPE_BF16, &context);
    for (const struct dims *dims : all) {
        run_joined(&context, dims, "one of one", one, 1, 0);
        run_joined(&context, dims, "two of one", two, 1, 0);
        run_joined(&context, dims, "eight of eight", eight, 8, 0);
        run_joined(&context, dims, "sixteen of one", sixteen, 1, 0);
        run_joined(&context, dims, "seventeen of one", seventeen, 1, 2);
        run_joined(&context, dims, "five mixed", mixed, 5, 3);
        run_joined(&context, dims, "three of many", three, 3, 2);
        run_joined(&context, dims, "64 of one", shared, 1, 0);
    }
    run_joined(&context, &narrow, "64 of 64", many, GROUPS_MAX, 0);
    run_joined(&context, &smol, "64 of 64", many, GROUPS_MAX, 0);
    cuda_context_close(&context);
}

/* --- time --- */

enum way { ALONE, JOINED, APART };

/* Queues the products of all layers, every weight with memory of its own. only: of this kind, or
 * -1. */
static void queue_layers(struct cuda_context *context, struct timed *t, const uint8_t *weight,
                         uint32_t *turns, enum way way, int only)
{
    for (int i = 0; i < TIMED_LAYERS * CUDA_WEIGHTS; i++) {
        struct cuda_lora lora = timed_lora(t, i / CUDA_WEIGHTS, i % CUDA_WEIGHTS);
        struct cuda_gemm gemm = {};

        lora.turns = turns;
        gemm.form = CUDA_GEMM_NT;
        gemm.m = t->rows.m;
        gemm.n = gemm.ldo = lora.weight->n;
        gemm.k = gemm.lda = gemm.ldb = lora.weight->k;
        gemm.a = lora.x;
        gemm.b = weight;
        gemm.out = lora.y;
        gemm.out_type = CUDA_TYPE_BF16;
        gemm.alpha = 1.0f;
        gemm.frozen = true;
        gemm.lora = way == JOINED ? &lora : NULL;
        weight += (size_t)gemm.n * (size_t)gemm.k * 2;
        if (only >= 0 && i % CUDA_WEIGHTS != only)
            continue;
        if (way == APART)
            check_rc(cuda_lora_shrink(context, &lora), "cuda_lora_shrink");
        check_rc(cuda_gemm(context, &gemm), "cuda_gemm");
        if (way == APART)
            check_rc(cuda_lora_expand(context, &lora), "cuda_lora_expand");
    }
}

/* The products of an 8B model: alone, and with LoRA in their launches or in launches of its own; of
 * each weight by itself too, in us a product. */
static void time_products(struct cuda_context *context, const char *what, int adapters, int rows)
{
    static const char *const ways[] = {"no LoRA", "LoRA joined", "LoRA apart"};
    static const struct dims dims = {"8B", 4096, 4096, 1024, 12288};
    static struct timed t;
    size_t bytes = 0;
    uint8_t *weights;
    uint32_t *turns;

    open_timed(&t, &dims, TIMED_LAYERS, 32, adapters, rows, true);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        bytes += 2 * TIMED_LAYERS * (size_t)t.layers[0].weights[kind].n *
                 (size_t)t.layers[0].weights[kind].k;
    weights = (uint8_t *)timed_memory(bytes);
    turns = (uint32_t *)timed_memory(2 * sizeof(uint32_t));
    for (int way = ALONE; way <= APART; way++) {
        const auto time_ms = [&](int only) {
            return check_graph_ms(
                context, [&] { queue_layers(context, &t, weights, turns, (enum way)way, only); });
        };
        char name[160];
        double us[CUDA_WEIGHTS];

        for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
            us[kind] = 1e3 / TIMED_LAYERS * time_ms(kind);
        snprintf(name, sizeof(name), "8B's products, r=32, %s, %s (%.1f, %.1f, %.1f, %.1f us)",
                 what, ways[way], us[CUDA_QKV], us[CUDA_O], us[CUDA_GATE_UP], us[CUDA_DOWN]);
        check_report(name, time_ms(-1), (double)bytes + (way == ALONE ? 0 : t.bytes), 0);
    }
    check_cuda(cudaFree(weights), "cudaFree");
    check_cuda(cudaFree(turns), "cudaFree");
    close_timed(&t);
}

static void time_all(void)
{
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("lora joined, timing");
    time_products(&context, "1 row", 1, 1);
    time_products(&context, "8 rows of 8 adapters", 8, 1);
    time_products(&context, "64 rows of 1 adapter", 1, 64);
    time_products(&context, "64 rows of 64 adapters", 64, 1);
    check_end();
    cuda_context_close(&context);
}

int main(void)
{
    test_joined();
    test_teams();
    if (check_measures())
        time_all();
    return check_finish();
}
