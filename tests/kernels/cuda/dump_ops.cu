/* Runs the operations of a step and of decoding in bfloat16, each once on seeded values, and writes
 * what went in and what came out: FOLDER/ops.json and a raw file per array. pytorch_error.py beside
 * this computes the same in float64 and in PyTorch's bfloat16 and compares the two errors.
 *
 *   dump_ops FOLDER
 *
 * ops.json is a list of {"op": kind, "name": …, parameters, "arrays": {name: {"file", "type",
 * "shape"}}}, types bf16, f32 and i32. Values that PyTorch holds in bfloat16 and a kernel in
 * float32 (norm weights, moments, the residual stream's gradient) are bfloat16 numbers here, so
 * that both begin with the same. */
#include "cuda_check.h"

#include "cuda/attention.h"
#include "cuda/cuda_lora.h"
#include "cuda/cuda_loss.h"
#include "cuda/cuda_rows.h"
#include "cuda/gemm.h"
#include "cuda/optimizer.h"

#define EPS 1e-6f

static struct cuda_context context;
static const char *folder;

/* --- the index --- */

static FILE *index_file;
static int ops, arrays, files;

static FILE *open_file(const char *name)
{
    char path[1024];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    file = fopen(path, "wb");
    if (!file) {
        printf("cannot write %s\n", path);
        exit(1);
    }
    return file;
}

/* parameters: of JSON, `, "key": value` each. */
__attribute__((format(printf, 3, 4))) static void op_begin(const char *op, const char *name,
                                                           const char *parameters, ...)
{
    va_list args;

    fprintf(index_file, "%s\n{\"op\": \"%s\", \"name\": \"%s\"", ops++ ? "," : "[", op, name);
    va_start(args, parameters);
    vfprintf(index_file, parameters, args);
    va_end(args);
    fprintf(index_file, ", \"arrays\": {");
    arrays = 0;
    printf("%s\n", name);
}

static void op_end(void)
{
    fprintf(index_file, "}}");
}

static void write_bytes(const char *name, const char *type, const void *bytes, size_t size,
                        size_t rows, size_t columns)
{
    char file_name[32];
    FILE *file;

    snprintf(file_name, sizeof(file_name), "%d.bin", files++);
    file = open_file(file_name);
    if (fwrite(bytes, size, rows * columns, file) != rows * columns || fclose(file) != 0) {
        printf("cannot write %s\n", file_name);
        exit(1);
    }
    fprintf(index_file,
            "%s\"%s\": {\"file\": \"%s\", \"type\": \"%s\", \"shape\": [%zu, %zu]}",
            arrays++ ? ", " : "", name, file_name, type, rows, columns);
}

/* Values as an array of this type holds them. */
static void write_values(const char *name, enum cuda_type type, const float *values, size_t rows,
                         size_t columns)
{
    const size_t count = rows * columns;
    uint16_t *narrow;

    if (type == CUDA_TYPE_F32) {
        write_bytes(name, "f32", values, sizeof(float), rows, columns);
        return;
    }
    narrow = (uint16_t *)check_alloc(count, sizeof(uint16_t));
    for (size_t i = 0; i < count; i++)
        narrow[i] = check_to_bf16(values[i]);
    write_bytes(name, "bf16", narrow, sizeof(uint16_t), rows, columns);
    free(narrow);
}

/* What the array held when it was last put or fetched. */
static void write_array(const char *name, const struct check_array *a, size_t columns)
{
    write_values(name, a->type, a->host, a->count / columns, columns);
}

static void fetch_array(const char *name, struct check_array *a, size_t columns)
{
    check_get(a);
    write_array(name, a, columns);
}

/* Float32 whose values are bfloat16's: base + scale * random. */
static struct check_array round_floats(size_t count, float base, float scale)
{
    struct check_array a = check_blank(CUDA_TYPE_F32, count);

    for (size_t i = 0; i < count; i++)
        a.host[i] = check_rounded(CUDA_TYPE_BF16, base + scale * check_random());
    check_put(&a);
    return a;
}

static struct check_array zero_floats(size_t count)
{
    return round_floats(count, 0, 0);
}

/* --- rows --- */

static void dump_norm(const char *name, int m, int n)
{
    const size_t count = (size_t)m * n;
    struct check_array x = check_acts(CUDA_TYPE_BF16, count, 2);
    struct check_array w = round_floats(n, 1, 0.3f), start = round_floats(count, 0, 1);
    struct check_array dy = check_acts(CUDA_TYPE_BF16, count, 1);
    struct check_array y = check_blank(CUDA_TYPE_BF16, count);
    struct check_array rstd = check_blank(CUDA_TYPE_F32, m);
    struct check_array dx = check_copy_of(CUDA_TYPE_F32, start.host, count);
    struct check_array dx_act = check_blank(CUDA_TYPE_BF16, count);

    check_rc(cuda_rmsnorm(&context, m, n, x.data, (const float *)w.data, EPS, y.data,
                          (float *)rstd.data),
             name);
    check_rc(cuda_rmsnorm_bwd(&context, m, n, x.data, (const float *)w.data,
                              (const float *)rstd.data, dy.data, (float *)dx.data, dx_act.data),
             name);
    op_begin("rmsnorm", name, ", \"eps\": %.9g", (double)EPS);
    write_array("x", &x, n), write_array("w", &w, n), write_array("start", &start, n);
    write_array("dy", &dy, n), fetch_array("y", &y, n), fetch_array("dx", &dx_act, n);
    op_end();
    check_free(&x, "x"), check_free(&w, "w"), check_free(&start, "start"), check_free(&dy, "dy");
    check_free(&y, "y"), check_free(&rstd, "rstd"), check_free(&dx, "dx");
    check_free(&dx_act, "dx_act");
}

/* The angles of row i are those of position i, theta 10,000. */
static void dump_qkv(const char *name, int m, int heads, int kv_heads, int d, bool norm)
{
    const size_t rotated = (size_t)(heads + kv_heads) * d, n = rotated + (size_t)kv_heads * d;
    struct check_array qkv = check_acts(CUDA_TYPE_BF16, m * n, 2);
    struct check_array given = check_copy_of(CUDA_TYPE_BF16, qkv.host, m * n);
    struct check_array dqkv = check_acts(CUDA_TYPE_BF16, m * n, 1);
    struct check_array given_d = check_copy_of(CUDA_TYPE_BF16, dqkv.host, m * n);
    struct check_array norm_q = round_floats(d, 1, 0.3f), norm_k = round_floats(d, 1, 0.3f);
    struct check_array table = check_blank(CUDA_TYPE_F32, (size_t)m * d);
    struct check_array raw = check_blank(CUDA_TYPE_BF16, m * rotated);
    struct check_array rstd_q = check_blank(CUDA_TYPE_F32, (size_t)m * heads);
    struct check_array rstd_k = check_blank(CUDA_TYPE_F32, (size_t)m * kv_heads);
    int32_t *pos = (int32_t *)check_alloc(m, sizeof(int32_t));
    struct check_buffer device_pos;
    struct cuda_qkv args = {};

    for (int i = 0; i < m; i++) {
        pos[i] = i;
        for (int k = 0; k < d / 2; k++) {
            const double angle = i * pow(10000, -2.0 * k / d);

            table.host[(size_t)i * d + 2 * k] = (float)cos(angle);
            table.host[(size_t)i * d + 2 * k + 1] = (float)sin(angle);
        }
    }
    check_put(&table);
    device_pos = check_buffer_of(pos, m * sizeof(int32_t));
    args.m = m, args.heads = heads, args.kv_heads = kv_heads, args.head_dim = d;
    args.qkv = qkv.data, args.eps = EPS;
    args.cos_sin = (const float *)table.data, args.pos = (const int32_t *)device_pos.data;
    if (norm) {
        args.norm_q = (const float *)norm_q.data, args.norm_k = (const float *)norm_k.data;
        args.raw = raw.data;
        args.rstd_q = (float *)rstd_q.data, args.rstd_k = (float *)rstd_k.data;
    }
    check_rc(cuda_qkv_finish(&context, &args), name);
    check_rc(cuda_qkv_finish_bwd(&context, &args, dqkv.data), name);
    op_begin("qkv", name,
             ", \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"norm\": %d, \"eps\": %.9g",
             heads, kv_heads, d, norm, (double)EPS);
    write_array("qkv", &given, n), write_array("dout", &given_d, n);
    write_array("norm_q", &norm_q, d), write_array("norm_k", &norm_k, d);
    write_array("table", &table, d), fetch_array("out", &qkv, n), fetch_array("dqkv", &dqkv, n);
    op_end();
    check_free(&qkv, "qkv"), check_free(&given, "given"), check_free(&dqkv, "dqkv");
    check_free(&given_d, "given_d"), check_free(&norm_q, "norm_q"), check_free(&norm_k, "norm_k");
    check_free(&table, "table"), check_free(&raw, "raw"), check_free(&rstd_q, "rstd_q");
    check_free(&rstd_k, "rstd_k"), check_buffer_free(&device_pos, "pos");
    free(pos);
}

static void dump_swiglu(const char *name, int m, int f)
{
    const size_t count = (size_t)m * f;
    struct check_array gate_up = check_acts(CUDA_TYPE_BF16, 2 * count, 2);
    struct check_array dh = check_acts(CUDA_TYPE_BF16, count, 1);
    struct check_array h = check_blank(CUDA_TYPE_BF16, count);
    struct check_array again = check_blank(CUDA_TYPE_BF16, count);
    struct check_array dgu = check_blank(CUDA_TYPE_BF16, 2 * count);

    check_rc(cuda_swiglu(&context, m, f, gate_up.data, h.data), name);
    check_rc(cuda_swiglu_bwd(&context, m, f, gate_up.data, dh.data, dgu.data, again.data), name);
    op_begin("swiglu", name, ", \"width\": %d", f);
    write_array("gate_up", &gate_up, 2 * (size_t)f), write_array("dh", &dh, f);
    fetch_array("h", &h, f), fetch_array("dgu", &dgu, 2 * (size_t)f);
    op_end();
    check_free(&gate_up, "gate_up"), check_free(&dh, "dh"), check_free(&h, "h");
    check_free(&again, "again"), check_free(&dgu, "dgu");
}

/* --- attention --- */

#define RUNS_MAX 8

/* Runs of `lengths` positions side by side, as in training. */
static void dump_attention(const char *name, int heads, int kv_heads, int d, const int *lengths,
                           int runs)
{
    const int nq = heads * d, n = nq + 2 * kv_heads * d;
    struct cuda_attn_run list[RUNS_MAX] = {};
    const int32_t no_children = -1;
    struct cuda_attention_bwd bwd = {};
    struct cuda_attention *args = &bwd.forward;
    struct check_array qkv, dout, out, lse, delta, dqkv;
    struct check_buffer device_list, device_rows, children;
    int32_t *row_run, m = 0;

    for (int i = 0; i < runs; i++) {
        list[i].first = m;
        list[i].count = lengths[i];
        m += lengths[i];
        args->longest = lengths[i] > args->longest ? lengths[i] : args->longest;
    }
    row_run = (int32_t *)check_alloc(m, sizeof(int32_t));
    for (int i = 0; i < runs; i++)
        for (int j = 0; j < lengths[i]; j++)
            row_run[list[i].first + j] = i;
    qkv = check_acts(CUDA_TYPE_BF16, (size_t)m * n, 1);
    dout = check_acts(CUDA_TYPE_BF16, (size_t)m * nq, 1);
    out = check_blank(CUDA_TYPE_BF16, (size_t)m * nq);
    lse = check_blank(CUDA_TYPE_F32, (size_t)m * heads);
    delta = check_blank(CUDA_TYPE_F32, (size_t)m * heads);
    dqkv = check_blank(CUDA_TYPE_BF16, (size_t)m * n);
    device_list = check_buffer_of(list, runs * sizeof(list[0]));
    device_rows = check_buffer_of(row_run, m * sizeof(int32_t));
    children = check_buffer_of(&no_children, sizeof(no_children));
    args->heads = heads, args->kv_heads = kv_heads, args->head_dim = d;
    args->scale = (float)(1 / sqrt((double)d));
    args->m = m, args->run_count = runs, args->furthest = args->longest;
    args->runs = (const struct cuda_attn_run *)device_list.data;
    args->row_run = (const int32_t *)device_rows.data;
    args->qkv = qkv.data, args->ldqkv = n, args->out = out.data, args->lse = (float *)lse.data;
    bwd.children = (const int32_t *)children.data, bwd.dout = dout.data;
    bwd.delta = (float *)delta.data, bwd.dqkv = dqkv.data;
    check_rc(cuda_attention(&context, args), name);
    check_rc(cuda_attention_bwd(&context, &bwd), name);
    op_begin("attention", name,
             ", \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"scale\": %.9g",
             heads, kv_heads, d, (double)args->scale);
    write_bytes("lengths", "i32", lengths, sizeof(lengths[0]), 1, runs);
    write_array("qkv", &qkv, n), write_array("dout", &dout, nq);
    fetch_array("out", &out, nq), fetch_array("dqkv", &dqkv, n);
    op_end();
    check_free(&qkv, "qkv"), check_free(&dout, "dout"), check_free(&out, "out");
    check_free(&lse, "lse"), check_free(&delta, "delta"), check_free(&dqkv, "dqkv");
    check_buffer_free(&device_list, "runs"), check_buffer_free(&device_rows, "row_run");
    check_buffer_free(&children, "children");
    free(row_run);
}

/* One query each, behind `positions` keys in blocks, as in decoding. */
static void dump_decoding(const char *name, int heads, int kv_heads, int d, int runs, int positions)
{
    const int nq = heads * d, n = nq + 2 * kv_heads * d;
    const int blocks = (positions + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK; /* of a run */
    const size_t block = 2 * (size_t)kv_heads * CUDA_KV_BLOCK * d;
    struct cuda_attn_run list[RUNS_MAX] = {};
    struct cuda_attention args = {};
    struct check_array qkv = check_acts(CUDA_TYPE_BF16, (size_t)runs * n, 1);
    struct check_array kv = check_acts(CUDA_TYPE_BF16, (size_t)runs * blocks * block, 1);
    struct check_array out = check_blank(CUDA_TYPE_BF16, (size_t)runs * nq);
    int32_t row_run[RUNS_MAX];
    int32_t *tables = (int32_t *)check_alloc((size_t)runs * blocks, sizeof(int32_t));
    struct check_buffer device_list, device_rows, device_tables, scratch;

    for (int i = 0; i < runs; i++) {
        list[i].first = row_run[i] = i;
        list[i].count = 1;
        list[i].pos = positions - 1;
        list[i].table = i * blocks;
    }
    for (int i = 0; i < runs * blocks; i++)
        tables[i] = i;
    device_list = check_buffer_of(list, runs * sizeof(list[0]));
    device_rows = check_buffer_of(row_run, runs * sizeof(row_run[0]));
    device_tables = check_buffer_of(tables, (size_t)runs * blocks * sizeof(tables[0]));
    args.heads = heads, args.kv_heads = kv_heads, args.head_dim = d;
    args.scale = (float)(1 / sqrt((double)d));
    args.m = args.run_count = runs, args.longest = 1, args.furthest = positions;
    args.runs = (const struct cuda_attn_run *)device_list.data;
    args.row_run = (const int32_t *)device_rows.data;
    args.qkv = qkv.data, args.ldqkv = n, args.out = out.data;
    args.kv = kv.data, args.tables = (const int32_t *)device_tables.data;
    args.scratch_bytes = cuda_attention_scratch_bytes(heads, kv_heads, d, runs, 1, positions);
    scratch = check_buffer_new(args.scratch_bytes);
    args.scratch = scratch.data;
    check_rc(cuda_attention(&context, &args), name);
    op_begin("decoding", name,
             ", \"heads\": %d, \"kv_heads\": %d, \"head_dim\": %d, \"scale\": %.9g, "
             "\"positions\": %d, \"blocks\": %d",
             heads, kv_heads, d, (double)args.scale, positions, blocks);
    write_array("qkv", &qkv, n), write_array("kv", &kv, block), fetch_array("out", &out, nq);
    op_end();
    check_free(&qkv, "qkv"), check_free(&kv, "kv"), check_free(&out, "out");
    check_buffer_free(&device_list, "runs"), check_buffer_free(&device_rows, "row_run");
    check_buffer_free(&device_tables, "tables"), check_buffer_free(&scratch, "scratch");
    free(tables);
}

/* --- products --- */

/* add: a residual is added, in bfloat16 like the output. */
static void dump_gemm(const char *name, enum cuda_gemm_form form, int m, int n, int k,
                      enum cuda_type out_type, bool add)
{
    static const char *const forms[] = {"NT", "NN"};
    struct check_array a = check_acts(CUDA_TYPE_BF16, (size_t)m * k, 1);
    struct check_array b = check_acts(CUDA_TYPE_BF16, (size_t)n * k, 0.05f);
    struct check_array residual = check_acts(CUDA_TYPE_BF16, (size_t)m * n, 1);
    struct check_array out = check_blank(out_type, (size_t)m * n);
    struct cuda_gemm g = {};

    g.form = form, g.m = m, g.n = n, g.k = k;
    g.lda = k, g.ldb = form == CUDA_GEMM_NT ? k : n, g.ldo = n;
    g.a = a.data, g.b = b.data, g.out = out.data, g.out_type = out_type;
    g.add = add ? residual.data : NULL;
    check_rc(cuda_gemm(&context, &g), name);
    op_begin("gemm", name, ", \"form\": \"%s\"", forms[form]);
    write_array("a", &a, g.lda), write_array("b", &b, g.ldb);
    if (add)
        write_array("add", &residual, n);
    fetch_array("out", &out, n);
    op_end();
    check_free(&a, "a"), check_free(&b, "b"), check_free(&residual, "add"), check_free(&out, "out");
}

/* --- LoRA --- */

#define LORA_RANK  32
#define LORA_SCALE 0.5f /* a power of two: sB is exact, and B = sB / s */

/* A model of one layer, of which only o [n][k] has an adapter. */
struct lora_rig {
    struct cuda_model model;
    struct cuda_layer layer;
    struct cuda_adapter adapter;
    struct cuda_lora_group group;
    struct cuda_lora_rows rows;
    struct cuda_lora lora;
    struct check_array view, grad, x, s, y, dy, ds, dx, sums, y_before, dx_before;
    struct check_buffer groups, tiles;
};

static void place_lora(struct lora_rig *r, int k, int n)
{
    static const enum claas_module firsts[] = {CLAAS_MODULE_Q, CLAAS_MODULE_O, CLAAS_MODULE_GATE,
                                               CLAAS_MODULE_DOWN};

    r->model.config.layers = 1;
    r->model.layers = &r->layer;
    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        struct cuda_weight *weight = &r->layer.weights[kind];

        weight->k = k, weight->n = n, weight->part_count = 1;
        weight->parts[0].n = n, weight->parts[0].module = firsts[kind];
    }
    r->adapter.lora.rank = LORA_RANK, r->adapter.lora.alpha = LORA_RANK * LORA_SCALE;
    r->adapter.lora.modules = 1u << CLAAS_MODULE_O;
    check_rc(cuda_lora_layout(&r->model, &r->adapter.lora, &r->adapter.layout), "cuda_lora_layout");
    r->adapter.scale = LORA_SCALE;
    r->view = check_acts(CUDA_TYPE_BF16, r->adapter.layout.count, 0.05f);
    r->grad = zero_floats(r->adapter.layout.count);
    r->adapter.view.base = r->view.data;
}

static void list_rows(struct lora_rig *r, int m, bool few)
{
    const int tile_rows = few ? CUDA_LORA_FEW_ROWS : CUDA_LORA_TILE_ROWS;
    struct cuda_lora_tile *tiles =
        (struct cuda_lora_tile *)check_alloc(m, sizeof(struct cuda_lora_tile));
    int listed;

    r->group = cuda_lora_group(&r->adapter, few ? NULL : (float *)r->grad.data, 0, m);
    listed = cuda_lora_tiles(&r->group, 1, tile_rows, tiles);
    r->groups = check_buffer_of(&r->group, sizeof(r->group));
    r->tiles = check_buffer_of(tiles, m * sizeof(tiles[0]));
    r->rows = cuda_lora_rows(&r->group, 1, m, tile_rows, listed);
    r->rows.groups = (const struct cuda_lora_group *)r->groups.data;
    r->rows.tiles = (const struct cuda_lora_tile *)r->tiles.data;
    free(tiles);
}

static void open_lora(struct lora_rig *r, int m, int k, int n, bool few)
{
    const size_t rows = m;

    place_lora(r, k, n);
    list_rows(r, m, few);
    r->x = check_acts(CUDA_TYPE_BF16, rows * k, 1);
    r->dy = check_acts(CUDA_TYPE_BF16, rows * n, 1);
    r->y = check_acts(CUDA_TYPE_BF16, rows * n, 1);
    r->y_before = check_copy_of(CUDA_TYPE_BF16, r->y.host, rows * n);
    r->dx = check_acts(CUDA_TYPE_BF16, rows * k, 1);
    r->dx_before = check_copy_of(CUDA_TYPE_BF16, r->dx.host, rows * k);
    r->s = check_blank(CUDA_TYPE_BF16, rows * LORA_RANK);
    r->ds = check_blank(CUDA_TYPE_BF16, rows * LORA_RANK);
    r->sums = check_blank(CUDA_TYPE_F32, CUDA_LORA_PARTS * rows * LORA_RANK);
    r->lora.rows = &r->rows, r->lora.weight = &r->layer.weights[CUDA_O];
    r->lora.kind = CUDA_O, r->lora.ld = LORA_RANK;
    r->lora.x = r->x.data, r->lora.s = r->s.data, r->lora.y = r->y.data, r->lora.dy = r->dy.data;
    r->lora.ds = r->ds.data, r->lora.dx = r->dx.data, r->lora.sums = (float *)r->sums.data;
}

static void close_lora(struct lora_rig *r)
{
    check_free(&r->view, "the view"), check_free(&r->grad, "the gradient");
    check_free(&r->x, "x"), check_free(&r->s, "S");
    check_free(&r->y, "y"), check_free(&r->dy, "dY");
    check_free(&r->ds, "dS"), check_free(&r->dx, "dx"), check_free(&r->sums, "sums");
    check_free(&r->y_before, "y before"), check_free(&r->dx_before, "dx before");
    check_buffer_free(&r->groups, "groups"), check_buffer_free(&r->tiles, "tiles");
}

/* few: as in decoding, forward alone; S then exists as sums only. */
static void dump_lora(const char *name, int m, int k, int n, bool few)
{
    static struct lora_rig r;
    const size_t a = LORA_RANK * (size_t)k, b = LORA_RANK * (size_t)n;

    r = {};
    open_lora(&r, m, k, n, few);
    check_rc(cuda_lora_shrink(&context, &r.lora), name);
    check_rc(cuda_lora_expand(&context, &r.lora), name);
    if (!few) {
        check_rc(cuda_lora_outer(&context, &r.lora), name);
        check_rc(cuda_lora_inner(&context, &r.lora, true, true), name);
    }
    if (r.adapter.layout.count != a + b || r.adapter.layout.rank != LORA_RANK)
        check_fail("the layout has %zu elements, want %zu", r.adapter.layout.count, a + b);
    op_begin("lora", name, ", \"scale\": %.9g", (double)LORA_SCALE);
    write_array("x", &r.x, k), write_array("y_before", &r.y_before, n);
    write_values("a", CUDA_TYPE_BF16, r.view.host + r.adapter.layout.a[CUDA_O], LORA_RANK, k);
    write_values("sb", CUDA_TYPE_BF16, r.view.host + r.adapter.layout.b[CLAAS_MODULE_O], n,
                 LORA_RANK);
    fetch_array("y", &r.y, n);
    if (!few) {
        write_array("dy", &r.dy, n), write_array("dx_before", &r.dx_before, k);
        fetch_array("s", &r.s, LORA_RANK), fetch_array("ds", &r.ds, LORA_RANK);
        fetch_array("dx", &r.dx, k);
        check_get(&r.grad);
        write_values("da", CUDA_TYPE_F32, r.grad.host + r.adapter.layout.a[CUDA_O], LORA_RANK, k);
        write_values("db", CUDA_TYPE_F32, r.grad.host + r.adapter.layout.b[CLAAS_MODULE_O], n,
                     LORA_RANK);
    }
    op_end();
    close_lora(&r);
}

/* --- head and loss --- */

/* By way of a copy, which initcheck sees: cuBLASLt's own stores it does not. */
static void logits_of(const struct check_array *hidden, const struct check_array *head, int rows,
                      int vocab, int d, struct check_array *logits)
{
    const size_t bytes = (size_t)rows * vocab * sizeof(float);
    struct check_buffer made = check_buffer_new(bytes);
    struct cuda_gemm g = {};

    g.form = CUDA_GEMM_NT, g.m = rows, g.n = vocab, g.k = d;
    g.a = hidden->data, g.lda = d, g.b = head->data, g.ldb = d;
    g.out = made.data, g.ldo = vocab, g.out_type = CUDA_TYPE_F32;
    check_rc(cuda_gemm(&context, &g), "logits");
    check_cuda(cudaMemcpyAsync(logits->data, made.data, bytes, cudaMemcpyDeviceToDevice,
                               context.stream),
               "logits");
    check_cuda(cudaStreamSynchronize(context.stream), "logits");
    check_buffer_free(&made, "logits");
}

/* From the hidden rows of student and teacher, which are alike, to loss, log-prob and dlogits. */
static void dump_loss(const char *name, int rows, int vocab, int d, float alpha)
{
    const size_t count = (size_t)rows * d;
    struct check_array student = check_acts(CUDA_TYPE_BF16, count, 1);
    struct check_array teacher = check_blank(CUDA_TYPE_BF16, count);
    struct check_array head = check_acts(CUDA_TYPE_BF16, (size_t)vocab * d, 2.5f / sqrtf((float)d));
    struct check_array z = check_blank(CUDA_TYPE_F32, (size_t)rows * vocab);
    struct check_array zt = check_blank(CUDA_TYPE_F32, (size_t)rows * vocab);
    struct check_array dlogits = check_blank(CUDA_TYPE_BF16, (size_t)rows * vocab);
    struct cuda_loss_position *positions =
        (struct cuda_loss_position *)check_alloc(rows, sizeof(*positions));
    struct claas_loss_result *results =
        (struct claas_loss_result *)check_alloc(rows, sizeof(*results));
    float *losses = (float *)check_alloc(rows, sizeof(float));
    float *logprobs = (float *)check_alloc(rows, sizeof(float));
    int32_t *tokens = (int32_t *)check_alloc(rows, sizeof(int32_t));
    struct check_buffer device_results = check_buffer_new(rows * sizeof(*results));
    struct check_buffer device_positions;
    struct claas_loss_config config = {};

    for (size_t i = 0; i < count; i++)
        teacher.host[i] = student.host[i] + 0.3f * check_random();
    check_put(&teacher);
    for (int i = 0; i < rows; i++) {
        tokens[i] = positions[i].token = check_below(vocab);
        positions[i].rollout = NAN;
        positions[i].weight = 1;
        positions[i].teacher = 1;
    }
    device_positions = check_buffer_of(positions, rows * sizeof(*positions));
    config.variant = CLAAS_LOSS_FULL, config.alpha = alpha;
    logits_of(&student, &head, rows, vocab, d, &z);
    logits_of(&teacher, &head, rows, vocab, d, &zt);
    check_rc(cuda_loss(&context, &config, vocab, rows, (const float *)z.data,
                       (const float *)zt.data,
                       (const struct cuda_loss_position *)device_positions.data, dlogits.data,
                       (struct claas_loss_result *)device_results.data),
             name);
    check_download(&device_results, results);
    for (int i = 0; i < rows; i++) {
        losses[i] = results[i].loss;
        logprobs[i] = results[i].logprob;
    }
    op_begin("loss", name, ", \"alpha\": %.9g", (double)alpha);
    write_array("student", &student, d), write_array("teacher", &teacher, d);
    write_array("head", &head, d);
    write_bytes("tokens", "i32", tokens, sizeof(tokens[0]), rows, 1);
    write_values("loss", CUDA_TYPE_F32, losses, rows, 1);
    write_values("logprob", CUDA_TYPE_F32, logprobs, rows, 1);
    fetch_array("dlogits", &dlogits, vocab);
    op_end();
    check_free(&student, "student"), check_free(&teacher, "teacher"), check_free(&head, "head");
    check_free(&z, "logits"), check_free(&zt, "logits"), check_free(&dlogits, "dlogits");
    check_buffer_free(&device_positions, "positions");
    check_buffer_free(&device_results, "results");
    free(positions), free(results), free(losses), free(logprobs), free(tokens);
}

/* --- optimizer --- */

static void dump_adamw(const char *name, size_t count)
{
    struct check_array p = round_floats(count, 0, 0.1f), g = round_floats(count, 0, 0.02f);
    struct check_array m = round_floats(count, 0, 0.01f), v = round_floats(count, 0, 0.01f);
    struct check_buffer parts = check_buffer_new(CUDA_NORM_PARTS * sizeof(double));
    struct check_buffer learned = check_buffer_new(sizeof(struct cuda_learned));
    struct cuda_adamw args = {};

    for (size_t i = 0; i < count; i++)
        v.host[i] = check_rounded(CUDA_TYPE_BF16, v.host[i] * v.host[i]);
    check_put(&v);
    args.count = count, args.step = 10;
    args.parameters = (float *)p.data, args.grad = (const float *)g.data;
    args.exp_avg = (float *)m.data, args.exp_avg_sq = (float *)v.data;
    args.rate = 1e-3f, args.beta1 = 0.9f, args.beta2 = 0.999f, args.eps = 1e-8f;
    args.weight_decay = 0.01f, args.max_grad_norm = 1;
    args.learned = (const struct cuda_learned *)learned.data;
    op_begin("adamw", name,
             ", \"rate\": %.9g, \"beta1\": %.9g, \"beta2\": %.9g, \"eps\": %.9g, "
             "\"weight_decay\": %.9g, \"max_norm\": %.9g, \"step\": %d",
             (double)args.rate, (double)args.beta1, (double)args.beta2, (double)args.eps,
             (double)args.weight_decay, (double)args.max_grad_norm, (int)args.step);
    write_array("p", &p, count), write_array("m", &m, count), write_array("v", &v, count);
    write_array("g", &g, count);
    check_rc(cuda_measure_gradient(&context, (const float *)g.data, count,
                                   (double *)parts.data, (struct cuda_learned *)learned.data),
             name);
    check_rc(cuda_adamw(&context, &args), name);
    fetch_array("p_after", &p, count), fetch_array("m_after", &m, count);
    fetch_array("v_after", &v, count);
    op_end();
    check_free(&p, "p"), check_free(&g, "g"), check_free(&m, "m"), check_free(&v, "v");
    check_buffer_free(&parts, "parts"), check_buffer_free(&learned, "learned");
}

static void dump_products(void)
{
    dump_gemm("x W^T", CUDA_GEMM_NT, 512, 1536, 1024, CUDA_TYPE_BF16, false);
    dump_gemm("x W^T + residual", CUDA_GEMM_NT, 512, 1024, 1536, CUDA_TYPE_BF16, true);
    dump_gemm("dy W", CUDA_GEMM_NN, 512, 1024, 1536, CUDA_TYPE_BF16, false);
    dump_gemm("x W^T to float32", CUDA_GEMM_NT, 512, 1536, 1024, CUDA_TYPE_F32, false);
    dump_gemm("x W^T, 1 row", CUDA_GEMM_NT, 1, 1536, 1024, CUDA_TYPE_BF16, false);
    dump_gemm("x W^T, 64 rows", CUDA_GEMM_NT, 64, 1536, 1024, CUDA_TYPE_BF16, false);
    dump_gemm("x W^T + residual, 64 rows", CUDA_GEMM_NT, 64, 1024, 1536, CUDA_TYPE_BF16, true);
    dump_lora("LoRA, grouped", 700, 1024, 1536, false);
    dump_lora("LoRA, by cuBLASLt", 1100, 1024, 1536, false);
    dump_lora("LoRA, few rows", 16, 1024, 1536, true);
}

int main(int argc, char **argv)
{
    static const int lengths[] = {300, 512, 77};

    if (argc != 2) {
        printf("dump_ops FOLDER\n");
        return 64;
    }
    folder = argv[1];
    check_open(CUDA_TYPE_BF16, &context);
    index_file = open_file("ops.json");
    check_begin("dump");
    dump_norm("rmsnorm of 4096", 300, 4096), dump_norm("rmsnorm of 576", 300, 576);
    dump_qkv("QK-norm and RoPE, heads of 128", 400, 8, 2, 128, true);
    dump_qkv("RoPE, heads of 64", 400, 9, 3, 64, false);
    dump_swiglu("SwiGLU", 200, 3072);
    dump_attention("attention, heads of 128", 8, 2, 128, lengths, 3);
    dump_attention("attention, heads of 64", 9, 3, 64, lengths, 3);
    dump_decoding("attention of decoding, heads of 128", 32, 8, 128, 4, 1000);
    dump_decoding("attention of decoding, heads of 64", 9, 3, 64, 4, 1000);
    dump_products();
    dump_loss("head and forward KL", 96, 16384, 1024, 0);
    dump_loss("head and Jensen-Shannon", 96, 16384, 1024, 0.5f);
    dump_loss("head and reverse KL", 96, 16384, 1024, 1);
    dump_adamw("clip and AdamW", 100000);
    fprintf(index_file, "\n]\n");
    if (fclose(index_file) != 0)
        check_fail("ops.json could not be written");
    check_end();
    cuda_context_close(&context);
    return check_finish();
}
