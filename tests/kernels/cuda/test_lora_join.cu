/* LoRA in the launch of a frozen product of few rows (joined): the bits that it has in launches of
 * its own behind the product (apart), for every number of 8 rows and every cut of k, again and
 * again, in a graph replayed for other adapters, in a chain of early starts; and against sums in
 * double. The rows of nobody must have the product's bits; of the pair of S a launch must fill its
 * own elements alone, and make the other's rows missing and no more. */
#include "lora_rig.cuh"
#include "cuda/gemm.h"

/* Launches of one kind: a tool that watches each by itself need not see the same ones so often. */
static int times(int all, int small)
{
    return check_is_small() ? small : all;
}

/* Beside a rig: the frozen weight, what its product is added to where a layer does that, and the
 * pair of S. */
static void open_product(struct rig *r)
{
    const size_t n = (size_t)r->lora.weight->n, k = (size_t)r->lora.weight->k;

    r->w = check_acts(CUDA_TYPE_BF16, n * k, 0.05f);
    r->residual = check_acts(CUDA_TYPE_BF16, (size_t)r->m * n, 1.0f);
    r->pair_memory = check_buffer_new(CUDA_LORA_PAIR_BYTES);
    r->pair.s = r->pair_memory.data;
    r->lora.pair = &r->pair;
}

static void close_product(struct rig *r)
{
    check_free(&r->w, "W");
    check_free(&r->residual, "the residual");
    check_buffer_free(&r->pair_memory, "the pair of S");
}

/* x W^T, with the residual for o and down; `joined`: with LoRA. */
static struct cuda_gemm product_of(const struct rig *r, bool joined)
{
    const struct cuda_weight *weight = r->lora.weight;
    const bool adds = r->lora.kind == CUDA_O || r->lora.kind == CUDA_DOWN;
    struct cuda_gemm gemm = {};

    gemm.form = CUDA_GEMM_NT;
    gemm.m = r->rows.m;
    gemm.n = gemm.ldo = weight->n;
    gemm.k = gemm.lda = gemm.ldb = weight->k;
    gemm.a = r->lora.x;
    gemm.b = r->w.data;
    gemm.out = r->lora.y;
    gemm.out_type = CUDA_TYPE_BF16;
    gemm.add = adds ? r->residual.data : NULL;
    gemm.frozen = true;
    gemm.lora = joined ? &r->lora : NULL;
    return gemm;
}

/* As a pass begins. */
static void begin(struct rig *r)
{
    check_rc(cuda_lora_begin(r->context, &r->pair, r->rows.m), "cuda_lora_begin");
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

/* --- the pair of S --- */

#define PAIR_ROW  (CUDA_LORA_PAIR_LD * sizeof(uint16_t)) /* bytes */
#define PAIR_PART (CUDA_LORA_PAIR_ROWS * CUDA_LORA_PAIR_LD)

/* The buffer of a turn. */
static uint8_t *part_of(const struct rig *r, unsigned turn)
{
    return (uint8_t *)r->pair.s + turn * CUDA_LORA_PAIR_ROWS * PAIR_ROW;
}

/* As a launch finds the pair: its buffer's rows missing. All else is zeros, so that whatever else
 * becomes missing is seen. */
static void prepare_pair(struct rig *r)
{
    r->pair.rows = r->rows.m;
    check_cuda(cudaMemset(r->pair.s, 0, CUDA_LORA_PAIR_BYTES), "the pair of S");
    check_cuda(cudaMemset(part_of(r, r->pair.turn), 0xff, (size_t)r->rows.m * PAIR_ROW),
               "the pair of S");
    check_cuda(cudaDeviceSynchronize(), "the pair of S");
}

static uint16_t *fetch_pair(const struct rig *r)
{
    uint16_t *pair = (uint16_t *)check_alloc(2 * PAIR_PART, sizeof(uint16_t));

    check_download(&r->pair_memory, pair);
    return pair;
}

/* Rows first … end-1 of the turn's buffer are all `want`. */
static void expect_all(const uint16_t *pair, const char *what, unsigned turn, int first, int end,
                       unsigned want)
{
    const uint16_t *part = pair + turn * PAIR_PART;

    for (int i = first * CUDA_LORA_PAIR_LD; i < end * CUDA_LORA_PAIR_LD; i++)
        if (part[i] != want) {
            check_fail("%s: row %d, column %d of buffer %u is %#x, not %#x", what,
                       i / CUDA_LORA_PAIR_LD, i % CUDA_LORA_PAIR_LD, turn, part[i], want);
            return;
        }
}

/* The rows of the buffer whose turn is next are missing. */
static void check_next_missing(const struct rig *r)
{
    uint16_t *pair = fetch_pair(r);

    expect_all(pair, "the next S", r->pair.turn, 0, r->rows.m, CUDA_LORA_MISSING);
    free(pair);
}

/* After a launch that found the pair prepared. s: S of the launches apart. A NaN must be the one of
 * rounding. */
static void check_pair(const struct rig *r, const float *s)
{
    uint16_t *pair = fetch_pair(r);
    const unsigned next = r->pair.turn, used = next ^ 1;

    for (int row = 0; row < r->m; row++) {
        const int g = owner_of(r, row), width = g < 0 ? 0 : width_of(r, g);

        for (int j = 0; j < CUDA_LORA_PAIR_LD; j++) {
            const float value = j < width ? s[(size_t)row * r->lora.ld + j] : 0;
            const unsigned want =
                j >= width ? CUDA_LORA_MISSING : isnan(value) ? 0x7fff : check_to_bf16(value);
            const unsigned got = pair[used * PAIR_PART + row * CUDA_LORA_PAIR_LD + j];

            if (got != want)
                check_fail("S beside the product: row %d, column %d is %#x, not %#x", row, j, got,
                           want);
        }
    }
    expect_all(pair, "S behind the rows", used, r->m, CUDA_LORA_PAIR_ROWS, 0);
    expect_all(pair, "the next S", next, 0, r->m, CUDA_LORA_MISSING);
    expect_all(pair, "the next S behind the rows", next, r->m, CUDA_LORA_PAIR_ROWS, 0);
    free(pair);
}

static void check_begin_pair(struct rig *r)
{
    uint16_t *pair;

    check_cuda(cudaMemset(r->pair.s, 0, CUDA_LORA_PAIR_BYTES), "the pair of S");
    check_cuda(cudaDeviceSynchronize(), "the pair of S");
    r->pair.turn = 1;
    begin(r);
    pair = fetch_pair(r);
    for (unsigned turn = 0; turn < 2; turn++) {
        expect_all(pair, "a pass's beginning", turn, 0, r->m, CUDA_LORA_MISSING);
        expect_all(pair, "behind its rows", turn, r->m, CUDA_LORA_PAIR_ROWS, 0);
    }
    if (r->pair.turn != 0)
        check_fail("a pass begins with turn %u", r->pair.turn);
    free(pair);
}

/* --- one launch, and several --- */

/* One joined launch against y and S of the launches apart. */
static void check_joined(struct rig *r, const char *what, const float *y, const float *s)
{
    poison(&r->y);
    prepare_pair(r);
    queue(r, true);
    compare_bits(what, &r->y, y, 0, r->m, r->lora.weight->n);
    check_pair(r, s);
}

/* A NaN that is all ones and an infinity in x of one row: nothing waits for ever, and no other row
 * sees them. */
static void check_not_finite(struct rig *r, const float *y, const float *s)
{
    const int n = r->lora.weight->n, k = r->lora.weight->k, row = r->groups[r->count / 2].first;
    const float nan = check_from_bf16(0xffff);
    float *x = copy_floats(&r->x), *want_y = (float *)check_alloc(r->y.count, sizeof(float));
    float *want_s = (float *)check_alloc(r->s.count, sizeof(float));

    memcpy(want_y, y, r->y.count * sizeof(float));
    memcpy(want_s, s, r->s.count * sizeof(float));
    for (int j = 0; j < n; j++)
        want_y[(size_t)row * n + j] = nan;
    for (int j = 0; j < r->lora.ld; j++)
        want_s[(size_t)row * r->lora.ld + j] = nan;
    r->x.host[(size_t)row * k + 3] = nan;
    r->x.host[(size_t)row * k + k - 1] = INFINITY;
    check_put(&r->x);
    check_joined(r, "a row that is not finite", want_y, want_s);
    memcpy(r->x.host, x, r->x.count * sizeof(float));
    check_put(&r->x);
    free(x);
    free(want_y);
    free(want_s);
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

/* S becomes another one: what was left by the launch before is seen. */
static void turn_x(struct rig *r)
{
    for (size_t i = 0; i < r->x.count; i++)
        r->x.host[i] = -r->x.host[i];
    check_put(&r->x);
}

/* Launches of fewer rows behind one of all, as the tail's: up to the first row of a group. */
static void check_fewer(struct rig *r)
{
    const int g = r->count / 2, count = r->groups[g].count, columns = r->lora.weight->n;
    const int rows = r->groups[g].first + 1;

    begin(r);
    queue(r, true);
    r->groups[g].count = 1;
    describe(r, 0, g + 1, true);
    r->rows.m = r->rows.tile_count = rows;
    for (int i = 0; i < times(4, 2); i++) { /* and x as it was, in the end */
        float *want;

        turn_x(r);
        want = run_apart(r);
        poison(&r->y);
        queue(r, true);
        compare_bits("fewer rows behind more", &r->y, want, 0, rows, columns);
        for (size_t j = (size_t)rows * columns; j < r->y.count; j++)
            if (!isnan(r->y.host[j])) {
                check_fail("fewer rows behind more: row %zu was written", j / columns);
                break;
            }
        check_next_missing(r);
        free(want);
    }
    if (r->pair.rows != rows)
        check_fail("behind %d rows there may be %d", rows, r->pair.rows);
    r->groups[g].count = count;
    describe(r, 0, r->count, true);
}

/* The rows of one group alone, the others being nobody's now: theirs as among the others, the rest
 * the product alone. */
static void check_joined_alone(struct rig *r, int g, const float *among, const float *product)
{
    const int columns = r->lora.weight->n, first = r->groups[g].first;
    const int end = first + r->groups[g].count;

    describe(r, g, 1, true);
    poison(&r->y);
    begin(r);
    queue(r, true);
    compare_bits("y alone", &r->y, among, first, end - first, columns);
    compare_bits("rows of nobody before", &r->y, product, 0, first, columns);
    compare_bits("rows of nobody behind", &r->y, product, end, r->m - end, columns);
    check_next_missing(r);
    describe(r, 0, r->count, true);
}

/* A pass of three launches captured once, the first with a y of its own, replayed for all groups,
 * for one, and for all again, with another x each time. */
static void check_replayed(struct rig *r, int g)
{
    const int columns = r->lora.weight->n;
    struct check_array first = check_blank(CUDA_TYPE_BF16, r->y.count);
    cudaGraphExec_t exec = NULL;
    cudaGraph_t graph = NULL;

    check_cuda(cudaStreamBeginCapture(r->context->stream, cudaStreamCaptureModeThreadLocal),
               "capture");
    begin(r);
    for (int i = 0; i < 3; i++) {
        r->lora.y = i == 0 ? first.data : r->y.data;
        queue(r, true);
    }
    check_cuda(cudaStreamEndCapture(r->context->stream, &graph), "capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    for (int i = 0; i < times(4, 2); i++) {
        const char *what = i == 1 ? "replayed for one group" : "replayed for all groups";
        float *want;

        turn_x(r);
        describe(r, i == 1 ? g : 0, i == 1 ? 1 : r->count, true);
        want = run_apart(r);
        poison(&r->y);
        poison(&first);
        check_cuda(cudaGraphLaunch(exec, r->context->stream), "a graph");
        compare_bits(what, &r->y, want, 0, r->m, columns);
        compare_bits(what, &first, want, 0, r->m, columns);
        check_next_missing(r);
        free(want);
    }
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    check_free(&first, "the first y");
}

/* x and y are of one size: each is the other's operand by turns, without waiting on the host,
 * so that a launch that begins too early, or takes its neighbour's S, is seen. */
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
        if (joined)
            begin(r);
        for (int i = 0; i < times(8, 2); i++) {
            r->lora.x = i % 2 == 0 ? x : y;
            r->lora.y = i % 2 == 0 ? y : (void *)x;
            queue(r, joined);
        }
        if (joined) {
            compare_bits("a chain's last result", &r->x, want[0], 0, r->m, r->lora.weight->n);
            compare_bits("a chain's last but one", &r->y, want[1], 0, r->m, r->lora.weight->n);
            check_next_missing(r);
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

/* Two operands and two results by turns, without waiting on the host: who takes S or sums of the
 * launch before, or of the one before that, is seen. */
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
    begin(r);
    /* Each operand has both turns: two, then one of the other. */
    for (int i = 0; i < times(12, 6); i++) {
        r->lora.x = i % 3 < 2 ? x : other_x.data;
        r->lora.y = i % 3 < 2 ? y : other_y.data;
        queue(r, true);
    }
    compare_bits("by turns", &r->y, want[0], 0, r->m, r->lora.weight->n);
    compare_bits("by turns, the other", &other_y, want[1], 0, r->m, r->lora.weight->n);
    check_next_missing(r);
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
    check_begin_pair(r);
    for (int i = 0; i < times(3, 1); i++)
        check_joined(r, i == 0 ? "y" : "y again", y, s);
    check_s_of(r);
    check_y_of(r);
    r->context->early = !r->context->early && r->context->arch >= 90;
    check_joined(r, "y with the other kind of start", y, s);
    r->context->early = !r->context->early && r->context->arch >= 90;
    check_not_finite(r, y, s);
    check_joined_alone(r, r->count / 2, y, r->y_before);
    if (!check_only_own()) { /* racecheck: what is between launches is nothing to it */
        check_fewer(r);
        check_replayed(r, r->count / 2);
        check_by_turns(r);
        if (r->lora.weight->n == r->lora.weight->k)
            check_chain(r);
    }
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
        bool joins;

        r.lora.pair = NULL;
        if (cuda_gemm_adds_lora(context, &gemm))
            check_fail("cuda_gemm_adds_lora without a place for S");
        r.lora.pair = &r.pair;
        r.pair.rows = r.rows.m - 1;
        if (cuda_gemm_adds_lora(context, &gemm))
            check_fail("cuda_gemm_adds_lora for more rows than before");
        r.pair.rows = r.rows.m;
        joins = cuda_gemm_adds_lora(context, &gemm);
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
                         struct cuda_lora_pair *pair, enum way way, int only)
{
    if (way == JOINED)
        check_rc(cuda_lora_begin(context, pair, t->rows.m), "cuda_lora_begin");
    for (int i = 0; i < TIMED_LAYERS * CUDA_WEIGHTS; i++) {
        struct cuda_lora lora = timed_lora(t, i / CUDA_WEIGHTS, i % CUDA_WEIGHTS);
        struct cuda_gemm gemm = {};

        lora.pair = pair;
        gemm.form = CUDA_GEMM_NT;
        gemm.m = t->rows.m;
        gemm.n = gemm.ldo = lora.weight->n;
        gemm.k = gemm.lda = gemm.ldb = lora.weight->k;
        gemm.a = lora.x;
        gemm.b = weight;
        gemm.out = lora.y;
        gemm.out_type = CUDA_TYPE_BF16;
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
    struct cuda_lora_pair pair = {};

    open_timed(&t, &dims, TIMED_LAYERS, 32, adapters, rows, true);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        bytes += 2 * TIMED_LAYERS * (size_t)t.layers[0].weights[kind].n *
                 (size_t)t.layers[0].weights[kind].k;
    weights = (uint8_t *)timed_memory(bytes);
    pair.s = timed_memory(CUDA_LORA_PAIR_BYTES);
    for (int way = ALONE; way <= APART; way++) {
        const auto time_ms = [&](int only) {
            return check_graph_ms(
                context, [&] { queue_layers(context, &t, weights, &pair, (enum way)way, only); });
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
    check_cuda(cudaFree(pair.s), "cudaFree");
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
