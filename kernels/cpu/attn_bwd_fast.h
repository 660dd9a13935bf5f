/* Backward of attention in the fast tables. Part of ops_fast.c.
 *
 *   p = exp(scale q.k - lse), dp = dout.v, ds = p (dp - dout.out) scale   for positions t <= q
 *   dq[q] = sum_t ds k[t]     dk[t] = sum_q ds q[q]     dv[t] = sum_q p dout[q]
 *
 * Two kinds of parts, none of which writes what another one writes, so nothing is combined later:
 *
 *   key parts    64 positions of a kv head, over all later queries of its heads: dk and dv
 *   query parts  some queries of a kv head's heads, over all earlier positions: dq
 *
 * Scores are computed in both: 7 products in place of 5, so that no thread needs sums over the
 * whole sequence.
 *
 * Every product is a tile. With the bfloat16 dot instruction p and ds are rounded to bfloat16 for
 * it; the other variants widen everything to float first and use the float tiles. A "g_elem" is an
 * element of these operands. */
#ifndef CLAAS_CPU_ATTN_BWD_FAST_H
#define CLAAS_CPU_ATTN_BWD_FAST_H

#if defined(CLAAS_OPS_BF16) && !OPERAND_WIDENED
typedef claas_bf16 g_elem;
#define G_STEP        2
#define G_ROWS        GEMM_ROWS
#define g_write(p, v) weight_write(p, v)
#else
typedef float g_elem;
#define G_STEP        1
#define G_ROWS        F32_ROWS
#define g_write(p, v) l_store(p, v)
#endif

#if defined(CLAAS_OPS_AMX)
#define BWD_ROWS (2 * G_ROWS)
#elif defined(__AVX512F__)
#define BWD_ROWS (4 * G_ROWS)
#else
#define BWD_ROWS (8 * G_ROWS)
#endif
#define BWD_KEYS   64
#define BWD_BLOCKS (BWD_KEYS / CLAAS_KV_BLOCK)

struct bwd_job {
    const struct claas_attn_bwd_args *a;
    claas_pool_t *pool;
    int tile_heads, head_tiles, tile_queries;
    int key_tiles, key_parts; /* parts [0, key_parts) are key parts */
};

/* A part's state: the rows (queries x heads, ordered by query) and positions it looks at. */
struct bwd_tile {
    const struct claas_attn_bwd_args *a;
    int kv_head, first_head, heads, first_query, rows;
    int first_key, blocks;
    g_elem *q, *dout; /* [rows][head_dim] */
    g_elem *q_panels; /* [head_dim/16] panels over rows: steps are rows */
    g_elem *dout_panels;
    g_elem *keys, *values_t; /* [blocks] panels of 16 positions over head_dim */
    g_elem *keys_t;          /* [head_dim/16] panels over BWD_KEYS positions */
    float *p, *ds;           /* [rows][BWD_KEYS]; scores and dp before bwd_weights */
    g_elem *p_out, *ds_out;  /* the same as operands */
    float lse[BWD_ROWS], delta[BWD_ROWS];
};

_Static_assert(2 * BWD_ROWS * BWD_KEYS * (sizeof(float) + sizeof(g_elem)) +
                       (4 * BWD_ROWS + 3 * BWD_KEYS) * CLAAS_HEAD_DIM_MAX * sizeof(g_elem) +
                       BWD_ROWS * CLAAS_HEAD_DIM_MAX * sizeof(float) <=
                   CLAAS_POOL_SCRATCH,
               "a part's state fits the scratch memory");

static void g_tile(int rows, int panels, struct operand x, const g_elem *w, size_t stride,
                   int steps, float *out, int ldo)
{
#if G_STEP == 2
    multiply(rows, panels, x, w, stride, steps, out, ldo);
#else
    tiles_f32[panels - 1][rows](x.x, x.ld, x.step, (const char *)w,
                                (ptrdiff_t)(stride * sizeof(g_elem)), steps, out, ldo);
#endif
}

static void g_multiply(int rows, struct operand x, int panels, const g_elem *w, size_t stride,
                       int steps, float *out, int ldo)
{
    const int n_tiles = divide_up(rows, G_ROWS);

    for (int p = 0; p < panels; p += TILE_PANELS)
        for (int i = 0; i < n_tiles; i++) {
            const int start = tile_start(rows, n_tiles, i);
            const int height = tile_start(rows, n_tiles, i + 1) - start;
            const struct operand tile = {x.x + start * x.ld, x.ld, x.step};

            g_tile(height, smaller(TILE_PANELS, panels - p), tile, w + p * stride, stride, steps,
                   out + (size_t)start * ldo + p * CLAAS_LANES, ldo);
        }
}

static void bwd_layout(struct bwd_tile *t, char *scratch)
{
    const size_t wide = (size_t)BWD_ROWS * t->a->head_dim, keys = (size_t)BWD_KEYS * t->a->head_dim;

    t->p = (float *)scratch;
    t->ds = t->p + BWD_ROWS * BWD_KEYS;
    t->p_out = (g_elem *)(t->ds + BWD_ROWS * BWD_KEYS);
    t->ds_out = t->p_out + BWD_ROWS * BWD_KEYS;
    t->q = t->ds_out + BWD_ROWS * BWD_KEYS;
    t->dout = t->q + wide;
    t->keys = t->dout + wide;
    t->values_t = t->keys + keys;
    t->q_panels = t->values_t + keys; /* key parts */
    t->dout_panels = t->q_panels + wide;
    t->keys_t = t->values_t + keys; /* query parts */
}

/* Copies the rows of queries [first, first+count) and computes delta = dout.out. */
static void bwd_load_rows(struct bwd_tile *t, int first, int count)
{
    const struct claas_attn_bwd_args *a = t->a;
    const int d = a->head_dim;

    t->first_query = first;
    t->rows = count * t->heads;
    for (int row = 0; row < t->rows; row++) {
        const int query = first + row / t->heads, head = t->first_head + row % t->heads;
        const act *q = (const act *)a->q + (size_t)query * a->ldq + (size_t)head * d;
        const act *out = (const act *)a->out + (size_t)query * a->ldo + (size_t)head * d;
        const act *dout = (const act *)a->dout + (size_t)query * a->lddo + (size_t)head * d;
        lanes delta = l_zero();

        for (int j = 0; j < d; j += 16) {
            const lanes v = a_load(dout + j);

            delta = l_add(delta, l_mul(v, a_load(out + j)));
            g_write(t->dout + (size_t)row * d + j, v);
            g_write(t->q + (size_t)row * d + j, a_load(q + j));
        }
        t->delta[row] = l_sum(delta);
        t->lse[row] = a->lse[(size_t)query * a->heads + head];
    }
}

/* 256 neighbouring elements of a block as g elements, and transposed. */
static void bwd_copy_block(const act *in, g_elem *out)
{
#if OPERAND_WIDENED
    for (int i = 0; i < 16; i++)
        for (int lane = 0; lane < 16; lane++)
            out[i * 16 + lane] = claas_from_bf16(in[panel_at(lane, i)]);
#else
    memcpy(out, in, 256 * sizeof(act));
#endif
}
static void bwd_transpose_block(const act *in, g_elem *out)
{
#if OPERAND_WIDENED
    act turned[256];

    transpose_block(in, turned);
    bwd_copy_block(turned, out);
#else
    transpose_block(in, out);
#endif
}

/* Panels of the positions from `first` on; with_keys_t: also those that dq needs. */
static void bwd_load_keys(struct bwd_tile *t, int first, bool with_keys_t)
{
    const struct claas_attn_bwd_args *a = t->a;
    const size_t size = (size_t)a->head_dim * CLAAS_KV_BLOCK;

    t->first_key = first;
    t->blocks = smaller(BWD_BLOCKS, divide_up(a->count - first, CLAAS_KV_BLOCK));
    for (int b = 0; b < t->blocks; b++) {
        const size_t number =
            (size_t)a->blocks[first / CLAAS_KV_BLOCK + b] * a->kv_heads + t->kv_head;
        const act *block = (const act *)((const char *)a->kv + number * a->kv_block_bytes);

        for (size_t at = 0; at < size; at += 256) {
            bwd_copy_block(block + at, t->keys + b * size + at);
            bwd_transpose_block(block + size + at, t->values_t + b * size + at);
            if (with_keys_t)
                bwd_transpose_block(block + at, t->keys_t + at * BWD_BLOCKS + (size_t)b * 256);
        }
    }
}

/* p and ds of all rows and positions; zero where the position is later than the query. */
static void bwd_weights(struct bwd_tile *t)
{
    const int d = t->a->head_dim, width = t->blocks * CLAAS_KV_BLOCK;
    const struct operand q = {(const char *)t->q, d * sizeof(g_elem), G_STEP * sizeof(g_elem)};
    const struct operand dout = {(const char *)t->dout, q.ld, q.step};
    const size_t stride = (size_t)d * CLAAS_KV_BLOCK;
    const lanes scale = l_set1(t->a->scale);

    memset(t->p, 0, (size_t)t->rows * BWD_KEYS * sizeof(float));
    memset(t->ds, 0, (size_t)t->rows * BWD_KEYS * sizeof(float));
    g_multiply(t->rows, q, t->blocks, t->keys, stride, d / G_STEP, t->p, BWD_KEYS);
    g_multiply(t->rows, dout, t->blocks, t->values_t, stride, d / G_STEP, t->ds, BWD_KEYS);
    for (int row = 0; row < t->rows; row++) {
        const int seen = t->first_query + row / t->heads - t->first_key + 1;
        const lanes lse = l_set1(t->lse[row]), delta = l_set1(t->delta[row]);

        for (int j = 0; j < width; j += 16) {
            float *p_at = t->p + row * BWD_KEYS + j, *ds_at = t->ds + row * BWD_KEYS + j;
            const int n = larger(0, smaller(16, seen - j));
            const lanes e = l_exp(l_sub(l_mul(l_load(p_at), scale), lse));
            const lanes p = l_keep(e, n, l_zero());
            const lanes slope = l_mul(l_mul(e, l_sub(l_load(ds_at), delta)), scale);

            l_store(p_at, p);
            l_store(ds_at, l_keep(slope, n, l_zero()));
        }
    }
}

#if G_STEP == 2
/* Positions [j, j+16) of rows (row, row+1) as pairs; zero past the last row. */
static void bwd_pair(const struct bwd_tile *t, const float *weights, int row, int j,
                     claas_bf16 out[32])
{
    claas_bf16 pair[2][16] = {{0}, {0}};

    for (int i = 0; i < 2 && row + i < t->rows; i++)
        g_write(pair[i], l_load(weights + (row + i) * BWD_KEYS + j));
    pair_rows(pair[0], pair[1], 16, out);
}
#endif

/* weights[rows][BWD_KEYS] as the operand whose row is a position and whose steps are the rows. */
static struct operand bwd_turned(const struct bwd_tile *t, const float *weights, g_elem *out)
{
#if defined(CLAAS_OPS_AMX)
    const size_t bytes = BWD_ROWS * sizeof(g_elem);

    for (int row = 0; row < t->rows; row += 32)
        for (int j = 0; j < BWD_KEYS; j += 16) {
            __m512i steps[16];

            for (int s = 0; s < 16; s++)
                bwd_pair(t, weights, row + 2 * s, j, (claas_bf16 *)&steps[s]);
            transpose_steps(steps, (char *)out + j * bytes + row * sizeof(g_elem), bytes);
        }
    return (struct operand){(const char *)out, (ptrdiff_t)bytes, 4};
#elif G_STEP == 2
    for (int row = 0; row < t->rows; row += 2)
        for (int j = 0; j < BWD_KEYS; j += 16)
            bwd_pair(t, weights, row, j, out + row * BWD_KEYS + 2 * j);
    return (struct operand){(const char *)out, 4, BWD_KEYS * 4};
#else
    (void)out;
    return (struct operand){(const char *)weights, 4, BWD_KEYS * 4};
#endif
}

/* rows[t->rows][head_dim] as panels of 16 dimensions whose steps are the rows. */
static void bwd_panels(const struct bwd_tile *t, const g_elem *rows, g_elem *out)
{
    const int d = t->a->head_dim;

    for (int j = 0; j < d; j += 16) {
        g_elem *panel = out + (size_t)j * BWD_ROWS;

#if G_STEP == 2
        pack_rows(rows + j, d, t->rows, 16, panel);
#else
        for (int row = 0; row < t->rows; row++)
            l_store(panel + row * 16, l_load(rows + (size_t)row * d + j));
#endif
    }
}

static void bwd_key_part(struct bwd_tile *t, const struct bwd_job *job, int key_tile)
{
    const struct claas_attn_bwd_args *a = t->a;
    const int d = a->head_dim, group = a->heads / a->kv_heads, first = key_tile * BWD_KEYS;
    const int keys = smaller(BWD_KEYS, a->count - first);
    const size_t at = (size_t)first * a->lddkv + (size_t)t->kv_head * d;

    for (int i = 0; i < keys; i++) {
        memset(a->dk + at + (size_t)i * a->lddkv, 0, (size_t)d * sizeof(float));
        memset(a->dv + at + (size_t)i * a->lddkv, 0, (size_t)d * sizeof(float));
    }
    bwd_load_keys(t, first, false);
    for (int tile = 0; tile < job->head_tiles; tile++) {
        t->first_head = t->kv_head * group + tile * job->tile_heads;
        t->heads = smaller(job->tile_heads, (t->kv_head + 1) * group - t->first_head);
        for (int query = first; query < a->count; query += job->tile_queries) {
            struct operand x;

            bwd_load_rows(t, query, smaller(job->tile_queries, a->count - query));
            bwd_weights(t);
            bwd_panels(t, t->q, t->q_panels);
            bwd_panels(t, t->dout, t->dout_panels);
            x = bwd_turned(t, t->ds, t->ds_out);
            g_multiply(keys, x, d / CLAAS_LANES, t->q_panels, (size_t)BWD_ROWS * CLAAS_LANES,
                       divide_up(t->rows, G_STEP), a->dk + at, a->lddkv);
            x = bwd_turned(t, t->p, t->p_out);
            g_multiply(keys, x, d / CLAAS_LANES, t->dout_panels, (size_t)BWD_ROWS * CLAAS_LANES,
                       divide_up(t->rows, G_STEP), a->dv + at, a->lddkv);
        }
    }
}

static void bwd_query_part(struct bwd_tile *t, const struct bwd_job *job, int head_tile, int tile)
{
    const struct claas_attn_bwd_args *a = t->a;
    const int d = a->head_dim, group = a->heads / a->kv_heads, first = tile * job->tile_queries;
    const int queries = smaller(job->tile_queries, a->count - first), last = first + queries - 1;
    float *dq = NULL;

    t->first_head = t->kv_head * group + head_tile * job->tile_heads;
    t->heads = smaller(job->tile_heads, (t->kv_head + 1) * group - t->first_head);
    bwd_load_rows(t, first, queries);
    dq = (float *)(t->keys_t + (size_t)BWD_KEYS * d); /* [rows][head_dim] */
    memset(dq, 0, (size_t)t->rows * d * sizeof(float));
    for (int key = 0; key <= last; key += BWD_KEYS) {
        const struct operand x = {(const char *)t->ds_out, BWD_KEYS * sizeof(g_elem),
                                  G_STEP * sizeof(g_elem)};

        bwd_load_keys(t, key, true);
        bwd_weights(t);
        for (int i = 0; i < t->rows * BWD_KEYS; i += 16)
            g_write(t->ds_out + i, l_load(t->ds + i));
        g_multiply(t->rows, x, d / CLAAS_LANES, t->keys_t, (size_t)BWD_BLOCKS * 256,
                   t->blocks * CLAAS_KV_BLOCK / G_STEP, dq, d);
    }
    for (int row = 0; row < t->rows; row++)
        memcpy(a->dq + (size_t)(first + row / t->heads) * a->lddq +
                   (size_t)(t->first_head + row % t->heads) * d,
               dq + (size_t)row * d, (size_t)d * sizeof(float));
}

static void bwd_part(void *arg, int index)
{
    const struct bwd_job *job = arg;
    const struct claas_attn_bwd_args *a = job->a;
    struct bwd_tile t = {.a = a};
    const int heads = a->kv_heads * job->head_tiles;

    bwd_layout(&t, claas_pool_scratch(job->pool));
    if (index < job->key_parts) { /* the earliest positions first, which have the most queries */
        t.kv_head = index % a->kv_heads;
        bwd_key_part(&t, job, index / a->kv_heads);
        return;
    }
    index = divide_up(a->count, job->tile_queries) * heads - 1 - (index - job->key_parts);
    t.kv_head = index % heads / job->head_tiles;
    bwd_query_part(&t, job, index % heads % job->head_tiles, index / heads);
}

static void attention_bwd(claas_pool_t *pool, const struct claas_attn_bwd_args *a)
{
    const int group = a->heads / a->kv_heads;
    struct bwd_job job = {.a = a, .pool = pool, .tile_heads = smaller(group, BWD_ROWS)};

    if (a->count <= 0)
        return;
    job.head_tiles = divide_up(group, job.tile_heads);
    job.tile_queries = BWD_ROWS / job.tile_heads;
    job.key_parts = divide_up(a->count, BWD_KEYS) * a->kv_heads;
    claas_pool_run(
        pool, job.key_parts + divide_up(a->count, job.tile_queries) * a->kv_heads * job.head_tiles,
        bwd_part, &job);
}

#endif
