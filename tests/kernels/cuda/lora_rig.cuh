/* What the LoRA tests share: a weight without a model, adapters of any ranks and modules over the
 * rows of a pack, and sums in double of what every way of serving and training does: S = x A^T and
 * y += S (sB)^T. Outputs start as NaN or as known values: what no group owns must stay as it was.
 * And memory of an 8B model's sizes, for times. */
#ifndef CLAAS_TESTS_CUDA_LORA_RIG_CUH
#define CLAAS_TESTS_CUDA_LORA_RIG_CUH

#include "cuda_check.h"
#include "cuda/cuda_lora.h"

#define GROUPS_MAX 64
#define LAYERS     2
#define LAYER      1 /* the one that is tried */

struct dims {
    const char *name;
    int hidden, nq, nk, inter;
};
struct spec {
    int rank;
    unsigned modules;
    int gap, count; /* rows of nobody before it; its rows */
};

struct rig {
    struct cuda_context *context;
    struct cuda_model model;
    struct cuda_layer layers[LAYERS];
    int count, m;
    struct cuda_adapter adapters[GROUPS_MAX];
    struct check_array views[GROUPS_MAX], grads[GROUPS_MAX];
    struct cuda_lora_group groups[GROUPS_MAX];
    struct check_buffer device_groups, device_tiles;
    struct cuda_lora_rows rows;
    struct cuda_lora lora;
    struct check_array x, s, y, dy, ds, dx, sums;
    struct check_array w, residual; /* of a frozen product, and what is added to it */
    struct check_buffer pair_memory;
    struct cuda_lora_pair pair;
    float *y_before, *dx_before, *grads_before[GROUPS_MAX];
};

#define ALL CLAAS_MODULE_ALL
#define SOME                                                                                       \
    (1u << CLAAS_MODULE_Q | 1u << CLAAS_MODULE_V | 1u << CLAAS_MODULE_UP | 1u << CLAAS_MODULE_DOWN)

static inline const char *kind_name(int kind)
{
    static const char *const names[] = {"q|k|v", "o", "gate|up", "down"};

    return names[kind];
}

/* --- a model without weights, adapters without a file --- */

static inline void set_weight(struct cuda_weight *w, int k, int parts, const int *sizes,
                              enum claas_module first)
{
    w->k = k;
    w->n = 0;
    w->part_count = parts;
    for (int i = 0; i < parts; i++) {
        w->parts[i].row = w->n;
        w->parts[i].n = sizes[i];
        w->parts[i].module = (enum claas_module)(first + i);
        w->n += sizes[i];
    }
}

static inline void set_model(struct cuda_model *model, struct cuda_layer *layers, int count,
                             const struct dims *d)
{
    const int qkv[] = {d->nq, d->nk, d->nk}, hidden[] = {d->hidden}, inter[] = {d->inter, d->inter};

    model->config.layers = count;
    model->layers = layers;
    for (int l = 0; l < count; l++) {
        set_weight(&layers[l].weights[CUDA_QKV], d->hidden, 3, qkv, CLAAS_MODULE_Q);
        set_weight(&layers[l].weights[CUDA_O], d->nq, 1, hidden, CLAAS_MODULE_O);
        set_weight(&layers[l].weights[CUDA_GATE_UP], d->hidden, 2, inter, CLAAS_MODULE_GATE);
        set_weight(&layers[l].weights[CUDA_DOWN], d->inter, 1, hidden, CLAAS_MODULE_DOWN);
    }
}

static inline void set_adapter(struct rig *r, int i, const struct spec *spec, bool learns)
{
    struct cuda_adapter *adapter = &r->adapters[i];

    adapter->lora.rank = spec->rank;
    adapter->lora.modules = spec->modules;
    adapter->lora.alpha = 2.0f;
    check_rc(cuda_lora_layout(&r->model, &adapter->lora, &adapter->layout), "cuda_lora_layout");
    adapter->scale = 0.75f;
    r->views[i] = check_acts(r->context->act, adapter->layout.count, 0.1f);
    adapter->view.base = r->views[i].data;
    if (learns)
        r->grads[i] = check_acts(CUDA_TYPE_F32, adapter->layout.count, 1.0f);
}

/* The rows of groups from … from+count-1, as a pack of serving or of training describes them. */
static inline void describe(struct rig *r, int from, int count, bool few)
{
    const int tile_rows = few ? CUDA_LORA_FEW_ROWS : CUDA_LORA_TILE_ROWS;
    struct cuda_lora_tile *tiles =
        (struct cuda_lora_tile *)check_alloc((size_t)r->m, sizeof(struct cuda_lora_tile));
    const int listed = cuda_lora_tiles(r->groups + from, count, tile_rows, tiles);

    r->rows = cuda_lora_rows(r->groups + from, count, r->m, tile_rows, few ? r->m : listed);
    check_cuda(cudaDeviceSynchronize(), "who reads the former ones");
    check_upload(&r->device_tiles, tiles);
    check_cuda(cudaMemcpy(r->device_groups.data, r->groups + from,
                          (size_t)count * sizeof(r->groups[0]), cudaMemcpyHostToDevice),
               "groups");
    check_cuda(cudaDeviceSynchronize(), "groups");
    r->rows.groups = (const struct cuda_lora_group *)r->device_groups.data;
    r->rows.tiles = (const struct cuda_lora_tile *)r->device_tiles.data;
    free(tiles);
}

static inline float *copy_floats(const struct check_array *a)
{
    float *copy = (float *)check_alloc(a->count, sizeof(float));

    memcpy(copy, a->host, a->count * sizeof(float));
    return copy;
}

/* behind: rows of nobody after the last group's. */
static inline void open_rig(struct rig *r, struct cuda_context *context, const struct dims *dims,
                            enum cuda_weight_kind kind, const struct spec *specs, int count,
                            bool few, int behind)
{
    const enum cuda_type act = context->act;
    struct cuda_lora *lora = &r->lora;
    size_t n, k, m;

    *r = {};
    r->context = context;
    r->count = count;
    set_model(&r->model, r->layers, LAYERS, dims);
    lora->rows = &r->rows;
    lora->weight = &r->layers[LAYER].weights[kind];
    lora->kind = kind;
    lora->layer = LAYER;
    for (int i = 0; i < count; i++) {
        set_adapter(r, i, &specs[i], !few);
        r->m += specs[i].gap;
        r->groups[i] = cuda_lora_group(&r->adapters[i], few ? NULL : (float *)r->grads[i].data,
                                       r->m, specs[i].count);
        r->m += specs[i].count;
        const int width = r->groups[i].parts[kind] * r->groups[i].rank;
        lora->ld = lora->ld > width ? lora->ld : width;
    }
    r->m += behind;
    lora->ld += 8;
    n = (size_t)lora->weight->n;
    k = (size_t)lora->weight->k;
    m = (size_t)r->m;
    r->x = check_acts(act, m * k, 1.0f);
    r->dy = check_acts(act, m * n, 0.5f);
    r->y = check_acts(act, m * n, 1.0f);
    r->dx = check_acts(act, m * k, 1.0f);
    r->s = check_blank(act, m * (size_t)lora->ld);
    r->ds = check_blank(act, m * (size_t)lora->ld);
    r->sums = check_blank(CUDA_TYPE_F32, CUDA_LORA_PARTS * m * (size_t)lora->ld);
    r->y_before = copy_floats(&r->y);
    r->dx_before = copy_floats(&r->dx);
    for (int i = 0; i < count && !few; i++)
        r->grads_before[i] = copy_floats(&r->grads[i]);
    r->device_groups = check_buffer_new(sizeof(r->groups));
    r->device_tiles = check_buffer_new(m * sizeof(struct cuda_lora_tile));
    lora->x = r->x.data;
    lora->dy = r->dy.data;
    lora->y = r->y.data;
    lora->dx = r->dx.data;
    lora->s = r->s.data;
    lora->ds = r->ds.data;
    lora->sums = (float *)r->sums.data;
    describe(r, 0, count, few);
}

static inline void close_rig(struct rig *r)
{
    for (int i = 0; i < r->count; i++) {
        check_free(&r->views[i], "a view");
        if (r->grads[i].host)
            check_free(&r->grads[i], "a gradient");
        free(r->grads_before[i]);
    }
    check_free(&r->x, "x");
    check_free(&r->dy, "dY");
    check_free(&r->y, "y");
    check_free(&r->dx, "dx");
    check_free(&r->s, "S");
    check_free(&r->ds, "dS");
    check_free(&r->sums, "the sums of S");
    check_buffer_free(&r->device_groups, "groups");
    check_buffer_free(&r->device_tiles, "tiles");
    free(r->y_before);
    free(r->dx_before);
}

/* --- references --- */

/* A or B (with the scale in it) of group g at the layer tried. */
static const float *view_of(const struct rig *r, int g, size_t place)
{
    return r->views[g].host + LAYER * r->groups[g].layer + place;
}

static inline int width_of(const struct rig *r, int g)
{
    return r->groups[g].parts[r->lora.kind] * r->groups[g].rank;
}

/* The group that owns a row, or -1. */
static inline int owner_of(const struct rig *r, int row)
{
    for (int g = 0; g < r->count; g++)
        if (row >= r->groups[g].first && row < r->groups[g].first + r->groups[g].count)
            return g;
    return -1;
}

/* Column j of S and dS belongs to this row of its part, or NULL: beyond the group's width. */
static const struct cuda_part *part_at(const struct rig *r, int g, int j)
{
    for (int i = 0; i < r->lora.weight->part_count; i++) {
        const struct cuda_part *part = &r->lora.weight->parts[i];

        if (r->groups[g].index[part->module] == j / r->groups[g].rank)
            return part;
    }
    return NULL;
}

/* Values of a matrix [m][ld] that have an owner against `want`, and that the others are NaN. */
static inline void compare_owned(const struct rig *r, const char *what,
                                 const struct check_array *got, const double *want)
{
    const int ld = r->lora.ld;
    float *values = (float *)check_alloc(got->count, sizeof(float));
    double *wanted = (double *)check_alloc(got->count, sizeof(double));
    size_t count = 0;

    for (int i = 0; i < r->m; i++) {
        const int g = owner_of(r, i), width = g < 0 ? 0 : width_of(r, g);

        for (int j = 0; j < ld; j++) {
            const size_t at = (size_t)i * ld + j;

            if (j < width) {
                values[count] = got->host[at];
                wanted[count++] = want[at];
            } else if (!isnan(got->host[at])) {
                check_fail("%s: row %d, column %d is nobody's and was written: %g", what, i, j,
                           (double)got->host[at]);
            }
        }
    }
    check_close(what, values, wanted, count, check_limit(r->context->act));
    free(values);
    free(wanted);
}

static inline void check_s_of(struct rig *r)
{
    const int ld = r->lora.ld, k = r->lora.weight->k;
    double *want = (double *)check_alloc((size_t)r->m * ld, sizeof(double));

    for (int i = 0; i < r->m; i++) {
        const int g = owner_of(r, i);

        for (int j = 0; g >= 0 && j < width_of(r, g); j++) {
            const float *a = view_of(r, g, r->groups[g].a[r->lora.kind]) + (size_t)j * k;

            for (int p = 0; p < k; p++)
                want[(size_t)i * ld + j] += (double)r->x.host[(size_t)i * k + p] * a[p];
        }
    }
    compare_owned(r, "S", &r->s, want);
    free(want);
}

/* Rows of nobody, and columns of absent modules, must keep their bits: `touched` says which. */
static inline void compare_added(const struct rig *r, const char *what,
                                 const struct check_array *got, const float *before,
                                 const double *want, const bool *touched)
{
    check_close(what, got->host, want, got->count, check_limit(r->context->act));
    for (size_t i = 0; i < got->count; i++)
        if (!touched[i] && memcmp(&got->host[i], &before[i], sizeof(float)) != 0) {
            check_fail("%s: element %zu is nobody's: was %g, is %g", what, i, (double)before[i],
                       (double)got->host[i]);
            return;
        }
}

static inline void check_y_of(struct rig *r)
{
    const int ld = r->lora.ld, n = r->lora.weight->n;
    double *want = (double *)check_alloc(r->y.count, sizeof(double));
    bool *touched = (bool *)check_alloc(r->y.count, sizeof(bool));

    for (size_t i = 0; i < r->y.count; i++)
        want[i] = r->y_before[i];
    for (int i = 0; i < r->m; i++) {
        const int g = owner_of(r, i);

        for (int j = 0; g >= 0 && j < width_of(r, g); j++) {
            const struct cuda_part *part = part_at(r, g, j);
            const int rank = r->groups[g].rank;
            const float *b = view_of(r, g, r->groups[g].b[part->module]) + j % rank;
            const double s = r->s.host[(size_t)i * ld + j];

            for (int p = 0; p < part->n; p++) {
                want[(size_t)i * n + part->row + p] += s * b[(size_t)p * rank];
                touched[(size_t)i * n + part->row + p] = true;
            }
        }
    }
    compare_added(r, "y", &r->y, r->y_before, want, touched);
    free(want);
    free(touched);
}

/* --- running --- */

/* S as it enters the products, whichever way it was made. */
static inline void fetch_s(struct rig *r)
{
    const size_t chunk = (size_t)r->m * r->lora.ld;

    if (!cuda_lora_is_few(r->context, &r->lora)) {
        check_get(&r->s);
        return;
    }
    check_get(&r->sums);
    for (size_t i = 0; i < chunk; i++) {
        float sum = 0.0f;

        /* chunks that there are not stay NaN */
        for (int c = 0; c < CUDA_LORA_PARTS && !isnan(r->sums.host[c * chunk + i]); c++)
            sum += r->sums.host[c * chunk + i];
        r->s.host[i] = isnan(r->sums.host[i]) ? NAN : check_rounded(r->context->act, sum);
    }
}

/* --- time --- */

#define TIMED_LAYERS 36

/* Memory that nobody looks at. */
struct timed {
    struct cuda_model model;
    struct cuda_layer layers[TIMED_LAYERS];
    struct cuda_adapter adapters[GROUPS_MAX];
    struct cuda_lora_group groups[GROUPS_MAX];
    struct cuda_lora_rows rows;
    void *views, *x, *y, *s, *ds;
    float *sums, *grads;
    double bytes; /* of the adapters' views */
};

static inline void *timed_memory(size_t bytes)
{
    void *p = NULL;

    check_cuda(cudaMalloc(&p, bytes), "cudaMalloc");
    check_cuda(cudaMemset(p, 0, bytes), "cudaMemset");
    return p;
}

static inline void open_timed(struct timed *t, const struct dims *dims, int layers, int rank,
                              int adapters, int rows, bool few)
{
    const int tile_rows = few ? CUDA_LORA_FEW_ROWS : CUDA_LORA_TILE_ROWS, m = adapters * rows;
    const size_t widest =
        (size_t)(2 * dims->inter > dims->nq + 2 * dims->nk ? 2 * dims->inter
                                                           : dims->nq + 2 * dims->nk);
    struct cuda_lora_tile *tiles =
        (struct cuda_lora_tile *)check_alloc((size_t)m, sizeof(struct cuda_lora_tile));
    int listed;
    size_t count;

    *t = {};
    set_model(&t->model, t->layers, layers, dims);
    for (int i = 0; i < adapters; i++) {
        t->adapters[i].lora.rank = rank;
        t->adapters[i].lora.modules = ALL;
        check_rc(cuda_lora_layout(&t->model, &t->adapters[i].lora, &t->adapters[i].layout),
                 "cuda_lora_layout");
    }
    count = t->adapters[0].layout.count;
    t->bytes = 2.0 * (double)count * adapters;
    t->views = timed_memory(2 * count * (size_t)adapters);
    t->grads = few ? NULL : (float *)timed_memory(4 * count * (size_t)adapters);
    for (int i = 0; i < adapters; i++) {
        t->adapters[i].view.base = (uint8_t *)t->views + 2 * count * (size_t)i;
        t->groups[i] = cuda_lora_group(&t->adapters[i], few ? NULL : t->grads + count * (size_t)i,
                                       i * rows, rows);
    }
    listed = cuda_lora_tiles(t->groups, adapters, tile_rows, tiles);
    t->rows = cuda_lora_rows(t->groups, adapters, m, tile_rows, few ? m : listed);
    t->rows.groups = (struct cuda_lora_group *)timed_memory(sizeof(t->groups));
    t->rows.tiles = (struct cuda_lora_tile *)timed_memory((size_t)m * sizeof(*tiles));
    check_cuda(
        cudaMemcpy((void *)t->rows.groups, t->groups, sizeof(t->groups), cudaMemcpyHostToDevice),
        "groups");
    check_cuda(cudaMemcpy((void *)t->rows.tiles, tiles, (size_t)m * sizeof(*tiles),
                          cudaMemcpyHostToDevice),
               "tiles");
    free(tiles);
    t->x = timed_memory((size_t)m * widest * 2);
    t->y = timed_memory((size_t)m * widest * 2);
    t->s = timed_memory((size_t)m * 3 * (size_t)rank * 2);
    t->ds = timed_memory((size_t)m * 3 * (size_t)rank * 2);
    t->sums =
        few ? (float *)timed_memory(CUDA_LORA_PARTS * (size_t)m * 3 * (size_t)rank * 4) : NULL;
}

static inline void close_timed(struct timed *t)
{
    void *const memory[] = {t->views,
                            t->x,
                            t->y,
                            t->s,
                            t->ds,
                            t->sums,
                            t->grads,
                            (void *)t->rows.groups,
                            (void *)t->rows.tiles};

    for (void *p : memory)
        check_cuda(cudaFree(p), "cudaFree");
}

static inline struct cuda_lora timed_lora(struct timed *t, int layer, int kind)
{
    struct cuda_lora lora = {};

    lora.rows = &t->rows;
    lora.weight = &t->layers[layer].weights[kind];
    lora.kind = (enum cuda_weight_kind)kind;
    lora.layer = layer;
    lora.ld = t->adapters[0].layout.parts[kind] * t->adapters[0].layout.rank;
    lora.x = t->x;
    lora.dy = t->y;
    lora.y = t->y;
    lora.dx = t->x;
    lora.s = t->s;
    lora.ds = t->ds;
    lora.sums = t->sums;
    return lora;
}

#endif
