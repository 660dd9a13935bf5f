/* LoRA for rows of many adapters against sums in double: every form, packs of serving and of
 * training, both types of act; ranks from 8 to 128, absent modules, groups of one row, 64 groups,
 * groups without rows, rows of nobody between them, sizes that are no multiples of a tile and rows
 * that are no whole pieces of 16 bytes. Outputs start as NaN or as known values: what no group owns
 * must stay as it was. And a group alone must have the bits that it has among others.
 *
 * Each operation's reference takes the device's own result of the one before, so that one failing
 * does not hide in another. */
#include "cuda/launch.cuh"
#include "lora_rig.cuh"

#define LATE_CLOCKS 2000000LL /* a millisecond */

static void check_ds_of(struct rig *r)
{
    const int ld = r->lora.ld, n = r->lora.weight->n;
    double *want = (double *)check_alloc((size_t)r->m * ld, sizeof(double));

    for (int i = 0; i < r->m; i++) {
        const int g = owner_of(r, i);

        for (int j = 0; g >= 0 && j < width_of(r, g); j++) {
            const struct cuda_part *part = part_at(r, g, j);
            const int rank = r->groups[g].rank;
            const float *b = view_of(r, g, r->groups[g].b[part->module]) + j % rank;

            for (int p = 0; p < part->n; p++)
                want[(size_t)i * ld + j] +=
                    (double)r->dy.host[(size_t)i * n + part->row + p] * b[(size_t)p * rank];
        }
    }
    compare_owned(r, "dS", &r->ds, want);
    free(want);
}

static void check_dx_of(struct rig *r)
{
    const int ld = r->lora.ld, k = r->lora.weight->k;
    double *want = (double *)check_alloc(r->dx.count, sizeof(double));
    bool *touched = (bool *)check_alloc(r->dx.count, sizeof(bool));

    for (size_t i = 0; i < r->dx.count; i++)
        want[i] = r->dx_before[i];
    for (int i = 0; i < r->m; i++) {
        const int g = owner_of(r, i);

        for (int j = 0; g >= 0 && j < width_of(r, g); j++) {
            const float *a = view_of(r, g, r->groups[g].a[r->lora.kind]) + (size_t)j * k;
            const double ds = r->ds.host[(size_t)i * ld + j];

            for (int p = 0; p < k; p++) {
                want[(size_t)i * k + p] += ds * a[p];
                touched[(size_t)i * k + p] = true;
            }
        }
    }
    compare_added(r, "dx", &r->dx, r->dx_before, want, touched);
    free(want);
    free(touched);
}

/* All of a gradient: what is of other layers or weights must not change. */
static void check_gradient_of(struct rig *r, int g)
{
    const struct cuda_lora_group *group = &r->groups[g];
    const size_t base = LAYER * group->layer;
    const int ld = r->lora.ld, n = r->lora.weight->n, k = r->lora.weight->k;
    double *want = (double *)check_alloc(r->grads[g].count, sizeof(double));
    const float *before = r->grads_before[g], *got = r->grads[g].host;
    /* sums of bfloat16 products in float32 */
    const double limit = r->context->act == CUDA_TYPE_F32 ? CHECK_F32_LIMIT : 1e-4;
    char name[32];

    for (size_t i = 0; i < r->grads[g].count; i++)
        want[i] = before[i];
    for (int i = group->first; i < group->first + group->count; i++)
        for (int j = 0; j < width_of(r, g); j++) {
            const struct cuda_part *part = part_at(r, g, j);
            const double s = group->scale * (double)r->s.host[(size_t)i * ld + j];
            const double ds = r->ds.host[(size_t)i * ld + j];
            double *a = want + base + group->a[r->lora.kind] + (size_t)j * k;
            double *b = want + base + group->b[part->module] + j % group->rank;

            for (int p = 0; p < k; p++)
                a[p] += ds * r->x.host[(size_t)i * k + p];
            for (int p = 0; p < part->n; p++)
                b[(size_t)p * group->rank] += s * r->dy.host[(size_t)i * n + part->row + p];
        }
    snprintf(name, sizeof(name), "gradient of group %d", g);
    check_close(name, got, want, r->grads[g].count, limit);
    for (size_t i = 0; i < r->grads[g].count; i++)
        if (want[i] == before[i] && got[i] != before[i]) {
            check_fail("%s: element %zu of %zu is not this weight's: was %g, is %g", name, i,
                       r->grads[g].count, (double)before[i], (double)got[i]);
            break;
        }
    free(want);
}

static void run_forward(struct rig *r)
{
    check_rc(cuda_lora_shrink(r->context, &r->lora), "cuda_lora_shrink");
    check_rc(cuda_lora_expand(r->context, &r->lora), "cuda_lora_expand");
    fetch_s(r);
    check_get(&r->y);
}

/* together: gradients and dx by one call. */
static void run_backward(struct rig *r, bool together)
{
    check_rc(cuda_lora_outer(r->context, &r->lora), "cuda_lora_outer");
    check_rc(cuda_lora_inner(r->context, &r->lora, true, together), "cuda_lora_inner");
    if (!together)
        check_rc(cuda_lora_inner(r->context, &r->lora, false, true), "cuda_lora_inner");
    check_get(&r->ds);
    check_get(&r->dx);
    for (int g = 0; g < r->count; g++)
        check_get(&r->grads[g]);
}

/* Everything as it was before the run. */
static void restore(struct rig *r)
{
    memcpy(r->y.host, r->y_before, r->y.count * sizeof(float));
    check_put(&r->y);
    memcpy(r->dx.host, r->dx_before, r->dx.count * sizeof(float));
    check_put(&r->dx);
    for (int g = 0; g < r->count; g++)
        if (r->grads[g].host) {
            memcpy(r->grads[g].host, r->grads_before[g], r->grads[g].count * sizeof(float));
            check_put(&r->grads[g]);
        }
}

static void same_rows(const char *what, const struct check_array *got, const float *want, int first,
                      int count, size_t columns)
{
    check_same(what, got->host + (size_t)first * columns, want + (size_t)first * columns,
               (size_t)count * columns * sizeof(float));
}

/* The last `count` rows of one group alone: the same bits as among the others; of the gradient too
 * if they are all of its rows. */
static void check_alone(struct rig *r, int g, int count, bool few)
{
    const struct cuda_lora_group whole = r->groups[g];
    const int first = whole.first + whole.count - count;
    float *y = copy_floats(&r->y), *dx = copy_floats(&r->dx);
    float *grad = few ? NULL : copy_floats(&r->grads[g]);

    r->groups[g].first = first;
    r->groups[g].count = count;
    describe(r, g, 1, few);
    restore(r);
    run_forward(r);
    same_rows("y alone", &r->y, y, first, count, (size_t)r->lora.weight->n);
    if (!few) {
        run_backward(r, true);
        same_rows("dx alone", &r->dx, dx, first, count, (size_t)r->lora.weight->k);
        if (count == whole.count)
            check_same("gradient alone", r->grads[g].host, grad, r->grads[g].count * sizeof(float));
    }
    r->groups[g] = whole;
    describe(r, 0, r->count, few);
    free(y);
    free(dx);
    free(grad);
}

/* What a run left. */
struct results {
    float *y, *dx, *grads[GROUPS_MAX]; /* NULL: the group does not learn */
};

static struct results results_of(const struct rig *r)
{
    struct results ret = {};

    ret.y = copy_floats(&r->y);
    ret.dx = copy_floats(&r->dx);
    for (int g = 0; g < r->count; g++)
        ret.grads[g] = r->grads[g].host ? copy_floats(&r->grads[g]) : NULL;
    return ret;
}

static void results_free(struct results *results)
{
    free(results->y);
    free(results->dx);
    for (int g = 0; g < GROUPS_MAX; g++)
        free(results->grads[g]);
}

/* y, dx and gradients must be those of an earlier run. how: what differs now. */
static void check_results(const struct rig *r, const char *how, const struct results *want)
{
    char name[64];

    snprintf(name, sizeof(name), "y %s", how);
    check_same(name, r->y.host, want->y, r->y.count * sizeof(float));
    snprintf(name, sizeof(name), "dx %s", how);
    check_same(name, r->dx.host, want->dx, r->dx.count * sizeof(float));
    snprintf(name, sizeof(name), "gradient %s", how);
    for (int g = 0; g < r->count; g++)
        if (want->grads[g])
            check_same(name, r->grads[g].host, want->grads[g], r->grads[g].count * sizeof(float));
}

static void check_again(struct rig *r, const char *how, const struct results *want)
{
    restore(r);
    run_forward(r);
    run_backward(r, true);
    check_results(r, how, want);
}

/* The bits are the same without each of these: sums cut into chunks of k or spans of rows (a card
 * of one multiprocessor needs no more blocks), memory for partial sums (which then must not be
 * touched), early launches. */
static void check_without(struct rig *r)
{
    struct cuda_context *context = r->context;
    const struct cuda_context as_it_is = *context;
    struct results want = results_of(r);

    context->multiprocessors = 1;
    check_again(r, "uncut", &want);
    context->multiprocessors = as_it_is.multiprocessors;
    context->lt_space = NULL;
    context->lt_space_bytes = 0;
    check_again(r, "without a workspace", &want);
    context->lt_space = as_it_is.lt_space;
    context->lt_space_bytes = as_it_is.lt_space_bytes;
    context->early = false;
    check_again(r, "one after the other", &want);
    context->early = as_it_is.early;
    results_free(&want);
}

static void run_case(struct cuda_context *context, const struct dims *dims, const char *name,
                     const struct spec *specs, int count, bool few)
{
    static struct rig r;

    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        if (check_elsewhere())
            continue;
        check_begin("lora %s %s, %s, %s, %s", few ? "serving" : "training",
                    check_name(context->act), dims->name, name, kind_name(kind));
        open_rig(&r, context, dims, (enum cuda_weight_kind)kind, specs, count, few, 3);
        run_forward(&r);
        check_s_of(&r);
        check_y_of(&r);
        if (!few) {
            run_backward(&r, kind % 2 == 0);
            check_ds_of(&r);
            check_dx_of(&r);
            for (int g = 0; g < count; g++)
                check_gradient_of(&r, g);
        }
        if (!few)
            check_without(&r);
        check_alone(&r, count / 2, specs[count / 2].count, few);
        check_alone(&r, count / 2, 1, few);
        close_rig(&r);
        check_end();
    }
}

/* --- cases --- */

static const struct dims tiny = {"tiny", 64, 64, 32, 96};
static const struct dims smol = {"SmolLM2", 576, 576, 192, 1536};
/* K and N so long that few tiles are cut into chunks, and no multiples of one. */
static const struct dims large = {"large", 2056, 2064, 520, 2600};
static const struct dims odd = {"odd", 36, 36, 12, 52};

static const struct spec one_row[] = {{32, ALL, 0, 1}};
static const struct spec several[] = {
    {8, ALL, 2, 5},  {24, SOME, 0, 1}, {32, ALL, 0, 16}, {64, 1u << CLAAS_MODULE_K, 1, 17},
    {96, ALL, 0, 3},
};
/* Ranks that are made multiples of 8, one with no module of most weights, one without rows. */
static const struct spec hostile[] = {
    {128, ALL, 0, 33}, {3, SOME, 1, 0},  {5, 1u << CLAAS_MODULE_GATE, 0, 64},
    {40, ALL, 7, 65},  {8, SOME, 0, 63},
};

static void test_type(enum cuda_type act)
{
    static const struct spec shared[] = {{32, ALL, 0, 64}};
    static const struct spec long_ones[] = {{32, ALL, 1, 130}, {16, SOME, 0, 200}};
    static const struct spec spans[] = {{8, ALL, 3, 1025}, {24, SOME, 0, 2100}, {5, ALL, 1, 1024}};
    static struct spec many[GROUPS_MAX];
    const struct dims *const all[] = {&tiny, &smol, &odd};
    struct cuda_context context;

    for (int i = 0; i < GROUPS_MAX; i++)
        many[i] = {8 + 8 * (i % 4), i % 3 == 0 ? SOME : ALL, i % 7 == 0, 1};
    check_open(act, &context);
    for (int few = 0; few < 2; few++) {
        for (const struct dims *dims : all) {
            /* one kernel does all of float32 */
            if (act == CUDA_TYPE_F32 && check_leaves_out(dims->hidden, 100))
                continue;
            run_case(&context, dims, "one row", one_row, 1, few);
            run_case(&context, dims, "several", several, 5, few);
            run_case(&context, dims, "hostile", hostile, 5, few);
        }
        run_case(&context, &tiny, "64 groups", many, GROUPS_MAX, few);
        run_case(&context, &smol, "64 rows of one", shared, 1, few);
        if (act == CUDA_TYPE_BF16)
            run_case(&context, &large, "several", several, 5, few);
    }
    run_case(&context, &smol, "two of many rows", long_ones, 2, false);
    run_case(&context, &tiny, "spans of rows", spans, 3, false);
    cuda_context_close(&context);
}

static void check_near(const char *what, const struct check_array *got, const float *want)
{
    double *wide = (double *)check_alloc(got->count, sizeof(double));

    for (size_t i = 0; i < got->count; i++)
        wide[i] = want[i];
    check_close(what, got->host, wide, got->count, CHECK_BF16_LIMIT);
    free(wide);
}

/* One adapter with so many rows that cuBLASLt does them, against the grouped kernels: a reference
 * of this size takes too long on the host. */
static void test_gemm_way(void)
{
    static const struct dims dims = {"8B's half", 2048, 2048, 512, 2048};
    static const struct spec spec[] = {{32, ALL, 5, 1100}};
    static struct rig r;
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        struct results by_gemm;

        if (check_elsewhere())
            continue;
        check_begin("lora by cuBLASLt against grouped, %s", kind_name(kind));
        open_rig(&r, &context, &dims, (enum cuda_weight_kind)kind, spec, 1, false, 3);
        if (!r.rows.by_gemm)
            check_fail("1100 rows of one adapter are not cuBLASLt's");
        run_forward(&r);
        run_backward(&r, true);
        by_gemm = results_of(&r);
        restore(&r);
        r.rows.by_gemm = false;
        run_forward(&r);
        run_backward(&r, true);
        check_near("y", &r.y, by_gemm.y);
        check_near("dx", &r.dx, by_gemm.dx);
        check_near("gradient", &r.grads[0], by_gemm.grads[0]);
        results_free(&by_gemm);
        close_rig(&r);
        check_end();
    }
    cuda_context_close(&context);
}

/* --- what comes late --- */

/* Lets the next kernel begin at once, and long after that writes two arrays. */
static __global__ void write_late(uint8_t *to, const uint8_t *from, size_t bytes, uint8_t *to2,
                                  const uint8_t *from2, size_t bytes2)
{
    const long long begin = clock64();

    launch_next();
    while (clock64() - begin < LATE_CLOCKS)
        continue;
    for (size_t i = threadIdx.x; i < bytes; i += blockDim.x)
        to[i] = from[i];
    for (size_t i = threadIdx.x; i < bytes2; i += blockDim.x)
        to2[i] = from2[i];
}

/* Moves what two arrays hold to `spare`, and queues a kernel that brings it back late. */
static void take_away(struct rig *r, const struct check_buffer *a, const struct check_buffer *b,
                      struct check_buffer spare[2])
{
    const struct check_buffer *const both[] = {a, b};

    for (int i = 0; i < 2; i++) {
        spare[i] = check_buffer_new(both[i]->bytes);
        check_cuda(cudaMemcpy(spare[i].data, both[i]->data, both[i]->bytes,
                              cudaMemcpyDeviceToDevice),
                   "copy");
        check_cuda(cudaMemset(both[i]->data, 0xff, both[i]->bytes), "memset");
    }
    check_cuda(cudaDeviceSynchronize(), "copy");
    write_late<<<1, 256, 0, r->context->stream>>>(
        (uint8_t *)a->data, (const uint8_t *)spare[0].data, a->bytes, (uint8_t *)b->data,
        (const uint8_t *)spare[1].data, b->bytes);
}

static void give_back(struct check_buffer spare[2])
{
    check_buffer_free(&spare[0], "spare");
    check_buffer_free(&spare[1], "spare");
}

/* Kernels that begin early wait for what they read. That goes for dx, too, although it does not
 * wait itself: it runs beside the gradients and relies on their waiting. */
static void test_late(void)
{
    static const struct spec spec[] = {{32, ALL, 3, 1100}};
    static struct rig r;
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        struct check_buffer spare[2];
        struct results want;

        if (check_elsewhere())
            continue;
        check_begin("lora, what it reads comes late, %s", kind_name(kind));
        open_rig(&r, &context, &tiny, (enum cuda_weight_kind)kind, spec, 1, false, 3);
        run_forward(&r);
        run_backward(&r, true);
        want = results_of(&r);
        restore(&r);
        take_away(&r, &r.x.buffer, &r.y.buffer, spare);
        run_forward(&r);
        give_back(spare);
        take_away(&r, &r.dy.buffer, &r.x.buffer, spare);
        check_rc(cuda_lora_outer(&context, &r.lora), "cuda_lora_outer");
        check_get(&r.ds); /* waits */
        give_back(spare);
        take_away(&r, &r.ds.buffer, &r.dx.buffer, spare);
        check_rc(cuda_lora_inner(&context, &r.lora, true, true), "cuda_lora_inner");
        check_get(&r.dx);
        check_get(&r.grads[0]);
        give_back(spare);
        check_results(&r, "of what came late", &want);
        results_free(&want);
        close_rig(&r);
        check_end();
    }
    cuda_context_close(&context);
}

/* --- time --- */

/* All LoRA of a decoding step of an 8B model, as a graph, without the frozen products. */
static void time_decode(struct cuda_context *context, const char *what, int adapters, int rows)
{
    static const struct dims dims = {"8B", 4096, 4096, 1024, 12288};
    static struct timed t;
    const auto queue = [&] {
        for (int l = 0; l < TIMED_LAYERS; l++)
            for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
                const struct cuda_lora lora = timed_lora(&t, l, kind);

                check_rc(cuda_lora_shrink(context, &lora), "shrink");
                check_rc(cuda_lora_expand(context, &lora), "expand");
            }
    };

    open_timed(&t, &dims, TIMED_LAYERS, 32, adapters, rows, true);
    check_report(what, check_graph_ms(context, queue), t.bytes, 0);
    close_timed(&t);
}

/* The four calls of one weight in training; bytes: x, dY, y, dx as often as they are moved. */
static void time_training(struct cuda_context *context, const struct dims *dims, int rank,
                          int adapters, int rows, bool gemm)
{
    static const char *const calls[] = {"S", "y", "dS", "dB, dA, dx"};
    static struct timed t;

    open_timed(&t, dims, 1, rank, adapters, rows, false);
    t.rows.by_gemm = t.rows.by_gemm && gemm;
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++)
        for (int call = 0; call < 4; call++) {
            const struct cuda_lora lora = timed_lora(&t, 0, kind);
            const double n = 2.0 * t.rows.m * lora.weight->n, k = 2.0 * t.rows.m * lora.weight->k;
            const double bytes = call == 0 ? k : call == 1 ? 2 * n : call == 2 ? n : n + 3 * k;
            char name[128];

            snprintf(name, sizeof(name), "lora %s r=%d, %d x %d rows%s, %s %s", dims->name, rank,
                     adapters, rows, t.rows.by_gemm ? " (cuBLASLt)" : "", kind_name(kind),
                     calls[call]);
            check_report(name,
                         check_median_ms(context,
                                         [&] {
                                             check_rc(call == 0   ? cuda_lora_shrink(context, &lora)
                                                      : call == 1 ? cuda_lora_expand(context, &lora)
                                                      : call == 2 ? cuda_lora_outer(context, &lora)
                                                                  : cuda_lora_inner(context, &lora,
                                                                                    true, true),
                                                      "LoRA");
                                         }),
                         bytes, 0);
        }
    close_timed(&t);
}

static void time_all(void)
{
    static const struct dims b8 = {"8B", 4096, 4096, 1024, 12288};
    static const struct dims b17 = {"1.7B", 2048, 2048, 1024, 6144};
    struct cuda_context context;

    check_open(CUDA_TYPE_BF16, &context);
    check_begin("lora timing");
    time_decode(&context, "lora 8B r=32, decoding 1 row", 1, 1);
    time_decode(&context, "lora 8B r=32, decoding 8 rows of 8 adapters", 8, 1);
    time_decode(&context, "lora 8B r=32, decoding 64 rows of 1 adapter", 1, 64);
    time_decode(&context, "lora 8B r=32, decoding 64 rows of 64 adapters", 64, 1);
    time_training(&context, &smol, 32, 1, 1024, false);
    time_training(&context, &b8, 32, 1, 350, false);
    time_training(&context, &b8, 32, 1, 4096, true);
    time_training(&context, &b8, 32, 1, 4096, false);
    time_training(&context, &b8, 8, 40, 350, false);
    time_training(&context, &b17, 32, 40, 350, false);
    check_end();
    cuda_context_close(&context);
}

int main(void)
{
    test_type(CUDA_TYPE_F32);
    test_type(CUDA_TYPE_BF16);
    test_late();
    if (!check_only_own())
        test_gemm_way();
    if (check_measures())
        time_all();
    return check_finish();
}
