/* The matrix products of the fast tables, on top of the tiles of tile.h: which part of the work
 * computes what, in which order, and what happens to a finished sum. Part of ops_fast.c, compiled
 * once per variant.
 *
 * A part (the unit of work of the pool) is some rows times some neighbouring panels, few enough
 * that the panels stay in the second-level cache while the part walks down its rows in tiles. Rows
 * are dealt evenly to tiles (16 rows are two tiles of 8, not 14 and 2), which keeps the number of
 * independent sums high. */
#ifndef CLAAS_CPU_GEMM_FAST_H
#define CLAAS_CPU_GEMM_FAST_H

#define PART_BYTES     (384 * 1024) /* of a part's panels */
#define PARTS_PER_TEAM 4            /* parts per thread to aim at: a slow thread then takes fewer */
#define SUMS_BYTES     4096         /* one tile of sums, at the start of the scratch memory */

#if defined(CLAAS_OPS_AMX)
#define GEMM_ROWS (2 * AMX_ROWS) /* the most rows of one tile */
#else
#define GEMM_ROWS TILE_ROWS
#endif

static void multiply(int rows, int panels, struct operand x, const act *w, size_t stride, int steps,
                     float *acc, ptrdiff_t ldacc)
{
    const ptrdiff_t second = (ptrdiff_t)(stride * sizeof(act));

#if defined(CLAAS_OPS_AMX)
    amx_multiply(rows, panels, x.x, x.ld, (const char *)w, second, steps, acc, ldacc);
#else
    tiles[panels - 1][rows](x.x, x.ld, x.step, (const char *)w, second, steps, acc, ldacc);
#endif
}

/* First row of tile number `tile` when `count` rows are dealt to `n_tiles`. */
static int tile_start(int count, int n_tiles, int tile)
{
    return tile * (count / n_tiles) + smaller(tile, count % n_tiles);
}

/* The most rows of a tile whose operands need `bytes` per row. */
static int tile_rows(size_t bytes)
{
    const size_t room = CLAAS_POOL_SCRATCH - SUMS_BYTES;
    const size_t fit = bytes ? room / bytes : GEMM_ROWS;

    return fit < 1 ? 1 : fit < GEMM_ROWS ? (int)fit : GEMM_ROWS;
}

/* --- gemm --- */

struct gemm_job {
    const struct claas_gemm_args *a;
    claas_pool_t *pool;
    int row_parts, part_panels, max_rows;
};

static void start_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                       float *acc)
{
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < width; c += 16) {
            const int n = a->n - column - c;
            lanes v = l_zero();

            if (a->accumulate)
                v = l_read(a->out32 + (size_t)(row + i) * a->ldo + column + c, n);
            l_store(acc + i * TILE_WIDTH + c, v);
        }
}

static void finish_sums(const struct claas_gemm_args *a, int row, int rows, int column, int width,
                        const float *acc)
{
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < width; c += 16) {
            const int n = a->n - column - c;
            const size_t at = (size_t)(row + i) * a->ldo + column + c;
            lanes v = l_load(acc + i * TILE_WIDTH + c);

            if (a->bias)
                v = l_add(v, l_read(a->bias + column + c, n));
            if (a->residual)
                v = l_add(v, a_read((const act *)a->residual + at, n));
            if (a->out32)
                l_write(a->out32 + at, v, n);
            else
                a_write((act *)a->out + at, v, n);
        }
}

/* One tile of rows against the panels [first, end). */
static void gemm_rows(const struct claas_gemm_args *a, int row, int rows, int first, int end,
                      char *scratch)
{
    float *acc = (float *)scratch;
    char *x_scratch = scratch + SUMS_BYTES;
    char *s_scratch = x_scratch + (size_t)rows * operand_bytes(a->ldx, a->k);
    const bool lora = a->lora_s && a->lora_b;
    const size_t stride = panel_elements(a->k), lora_stride = panel_elements(a->r);
    const struct operand x =
        operand_of((const act *)a->x + (size_t)row * a->ldx, a->ldx, rows, a->k, x_scratch);
    struct operand s = x;

    if (lora)
        s = operand_of((const act *)a->lora_s + (size_t)row * a->lds, a->lds, rows, a->r,
                       s_scratch);
    for (int p = first; p < end; p += TILE_PANELS) {
        const int panels = smaller(TILE_PANELS, end - p);

        start_sums(a, row, rows, p * CLAAS_LANES, panels * CLAAS_LANES, acc);
        multiply(rows, panels, x, (const act *)a->w + p * stride, stride, STEPS(a->k), acc,
                 TILE_WIDTH);
        if (lora)
            multiply(rows, panels, s, (const act *)a->lora_b + p * lora_stride, lora_stride,
                     STEPS(a->r), acc, TILE_WIDTH);
        finish_sums(a, row, rows, p * CLAAS_LANES, panels * CLAAS_LANES, acc);
    }
}

static void gemm_part(void *arg, int index)
{
    const struct gemm_job *job = arg;
    const struct claas_gemm_args *a = job->a;
    const int first = index / job->row_parts * job->part_panels;
    const int end = smaller(first + job->part_panels, divide_up(a->n, CLAAS_LANES));
    const int row = tile_start(a->m, job->row_parts, index % job->row_parts);
    const int rows = tile_start(a->m, job->row_parts, index % job->row_parts + 1) - row;
    const int n_tiles = divide_up(rows, job->max_rows);
    char *scratch = claas_pool_scratch(job->pool);

    for (int t = 0; t < n_tiles; t++) {
        const int start = tile_start(rows, n_tiles, t);

        gemm_rows(a, row + start, tile_start(rows, n_tiles, t + 1) - start, first, end, scratch);
    }
}

/* How many panels one part gets (a multiple of the tile's) and into how many parts the rows go. */
static void plan_parts(int threads, int m, int panels, size_t panel_bytes, int max_rows,
                       int *part_panels, int *row_parts)
{
    const int want = threads > 1 ? threads * PARTS_PER_TEAM : 1;
    const int columns = divide_up(panels, TILE_PANELS);
    const int fit = (int)(PART_BYTES / (panel_bytes * TILE_PANELS + 1));
    int width = smaller(columns / want, fit);

    width = larger(width, 1);
    *part_panels = width * TILE_PANELS;
    *row_parts = 1;
    if (columns < want)
        *row_parts =
            larger(1, smaller(divide_up(want, larger(columns, 1)), divide_up(m, max_rows)));
}

static void gemm(claas_pool_t *pool, const struct claas_gemm_args *a)
{
    const int panels = divide_up(a->n, CLAAS_LANES);
    const size_t bytes =
        operand_bytes(a->ldx, a->k) + (a->lora_s ? operand_bytes(a->lds, a->r) : 0);
    struct gemm_job job = {.a = a, .pool = pool, .max_rows = tile_rows(bytes)};

    if (a->m <= 0 || a->n <= 0)
        return;
#if defined(CLAAS_FAST_BLOCKS)
    if (a->blocks && a->m <= BLOCK_ROWS) {
        gemm_blocks(pool, a);
        return;
    }
#endif
    plan_parts(claas_pool_threads(pool), a->m, panels, panel_elements(a->k) * sizeof(act),
               job.max_rows, &job.part_panels, &job.row_parts);
    claas_pool_run(pool, divide_up(panels, job.part_panels) * job.row_parts, gemm_part, &job);
}

/* --- gemm_dx --- */

#define DX_PANELS 6 /* the most per part: where dY is copied, many panels must share the copy */
#define DX_CHUNK                                                                                   \
    512 /* n at a time: the transposed panels of a part stay in the second-level cache */
#define DX_SPAN                                                                                    \
    4096 /* n between two waits of the team: dY's columns stay in the last-level cache */
#define DX_AHEAD   2 /* panels ahead to prefetch: blocks of one column lie far apart */
#define DX_SUMS    SUMS_BYTES
#define DX_W_BYTES (DX_PANELS * DX_CHUNK * CLAAS_LANES * sizeof(act))

_Static_assert(DX_SUMS + DX_W_BYTES + GEMM_ROWS * (DX_CHUNK * WIDTH_OF_STEP + 128) <=
                   CLAAS_POOL_SCRATCH,
               "a part's panels and operands fit the scratch memory");

struct dx_job {
    const struct claas_gemm_dx_args *a;
    claas_pool_t *pool;
    int panels, row_parts; /* panels of a part; parts that the rows go to */
    int from, to;          /* this span of n */
};

/* Writes the panels [first, first+panels) of W^T, restricted to the n-panels [from, to): panel p at
 * p*stride elements. Both W's panels and those of W^T hold 16 x 16 elements in 256 neighbouring
 * elements. */
static void transpose_weights(const struct claas_gemm_dx_args *a, int first, int panels, int from,
                              int to, act *out, size_t stride)
{
    const size_t width = panel_elements(a->k);

    for (int j = from; j < to; j++)
        for (int p = 0; p < panels; p++) {
            const size_t at = (size_t)(first + p) * 256;
            const act *block = (const act *)a->w + j * width + at;
            act whole[256];

            for (size_t line = 0; line < 256 * sizeof(act); line += 64)
                _mm_prefetch((const char *)(block + DX_AHEAD * width) + line, _MM_HINT_T0);
            if (at + 256 > width) { /* the last columns of a panel */
                memset(whole, 0, sizeof(whole));
                memcpy(whole, block, (width - at) * sizeof(act));
                block = whole;
            }
            transpose_block(block, out + p * stride + (size_t)(j - from) * 256);
        }
}

/* Adds the chunk's products to one tile of rows. Whole tiles are summed in dx itself. */
static void dx_rows(const struct claas_gemm_dx_args *a, int row, int rows, int first, int panels,
                    struct operand dy, const act *wt, size_t stride, int steps, float *acc)
{
    for (int p = 0; p < panels; p += TILE_PANELS) {
        const int width = smaller(TILE_PANELS, panels - p);
        const int column = (first + p) * CLAAS_LANES;
        float *dx = a->dx + (size_t)row * a->ldx + column;
        const int n = smaller(a->k - column, width * CLAAS_LANES);

        if (n == width * CLAAS_LANES) {
            multiply(rows, width, dy, wt + p * stride, stride, steps, dx, a->ldx);
            continue;
        }
        for (int i = 0; i < rows; i++)
            memcpy(acc + i * TILE_WIDTH, dx + (size_t)i * a->ldx, (size_t)n * sizeof(float));
        multiply(rows, width, dy, wt + p * stride, stride, steps, acc, TILE_WIDTH);
        for (int i = 0; i < rows; i++)
            memcpy(dx + (size_t)i * a->ldx, acc + i * TILE_WIDTH, (size_t)n * sizeof(float));
    }
}

static void dx_part(void *arg, int index)
{
    const struct dx_job *job = arg;
    const struct claas_gemm_dx_args *a = job->a;
    const int first = index / job->row_parts * job->panels;
    const int panels = smaller(job->panels, divide_up(a->k, CLAAS_LANES) - first);
    const int row = tile_start(a->m, job->row_parts, index % job->row_parts);
    const int rows = tile_start(a->m, job->row_parts, index % job->row_parts + 1) - row;
    const int n_tiles = divide_up(rows, GEMM_ROWS);
    char *scratch = claas_pool_scratch(job->pool);
    act *wt = (act *)(scratch + DX_SUMS);
    char *dy_scratch = scratch + DX_SUMS + DX_W_BYTES;
    const int columns = smaller(panels * CLAAS_LANES, a->k - first * CLAAS_LANES);

    for (int i = 0; !a->accumulate && job->from == 0 && i < rows; i++)
        memset(a->dx + (size_t)(row + i) * a->ldx + first * CLAAS_LANES, 0,
               (size_t)columns * sizeof(float));
    memset(scratch, 0, SUMS_BYTES); /* lanes beyond K are summed too: keep them finite */
    for (int n = job->from; n < job->to; n += DX_CHUNK) {
        const int count = smaller(DX_CHUNK, job->to - n);

        transpose_weights(a, first, panels, n / CLAAS_LANES, divide_up(n + count, CLAAS_LANES), wt,
                          (size_t)DX_CHUNK * CLAAS_LANES);
        for (int t = 0; t < n_tiles; t++) {
            const int start = row + tile_start(rows, n_tiles, t);
            const int height = row + tile_start(rows, n_tiles, t + 1) - start;
            const struct operand dy = operand_of((const act *)a->dy + (size_t)start * a->ldy + n,
                                                 a->ldy, height, count, dy_scratch);

            dx_rows(a, start, height, first, panels, dy, wt, (size_t)DX_CHUNK * CLAAS_LANES,
                    STEPS(count), (float *)scratch);
        }
    }
}

static void gemm_dx(claas_pool_t *pool, const struct claas_gemm_dx_args *a)
{
    struct dx_job job = {.a = a,
                         .pool = pool,
                         .panels = operand_is_copied(a->ldy, DX_CHUNK) ? DX_PANELS : TILE_PANELS};
    const int parts = divide_up(a->k, job.panels * CLAAS_LANES);
    const int want = claas_pool_threads(pool) > 1 ? claas_pool_threads(pool) * PARTS_PER_TEAM : 1;

    if (a->m <= 0 || a->k <= 0)
        return;
    job.row_parts = larger(1, smaller(divide_up(want, parts), divide_up(a->m, 4 * GEMM_ROWS)));
    for (; job.from < larger(a->n, 1); job.from += DX_SPAN) {
        job.to = smaller(job.from + DX_SPAN, a->n);
        claas_pool_run(pool, parts * job.row_parts, dx_part, &job);
    }
}

/* --- gemm_tn --- */

#if defined(CLAAS_OPS_AMX)
#define TN_PANELS                                                                                  \
    6 /* per part; each part turns the whole P, which costs as much as its product                 \
       */
#else
#define TN_PANELS 4
#endif
#define TN_CHUNK 256 /* rows at a time (even: pairs of rows never straddle chunks) */
#define TN_ROWS  256 /* r at a time */
#define TN_WIDTH (TN_PANELS * CLAAS_LANES)

_Static_assert(TN_ROWS *TN_WIDTH * sizeof(float) +
                       TN_PANELS * TN_CHUNK * CLAAS_LANES * sizeof(act) +
                       TRANSPOSED_BYTES(TN_CHUNK, TN_ROWS) <=
                   CLAAS_POOL_SCRATCH,
               "a part's sums and operands fit the scratch memory");

struct tn_job {
    const struct claas_gemm_tn_args *a;
    claas_pool_t *pool;
};

/* Sums of rows [row, row+count) for r in [r0, r0+rs): acc[r][TN_WIDTH] += P^T X. */
static void tn_chunk(const struct claas_gemm_tn_args *a, int row, int count, int r0, int rs, int k0,
                     int ks, float *acc, char *scratch)
{
    const int panels = divide_up(ks, CLAAS_LANES), n_tiles = divide_up(rs, GEMM_ROWS);
    const size_t stride = (size_t)TN_CHUNK * CLAAS_LANES;
    act *w = (act *)scratch;
    const act *x = (const act *)a->x + (size_t)row * a->ldx + k0;
    const struct operand p =
        transposed_operand((const act *)a->p + (size_t)row * a->ldp + r0, a->ldp, count, rs,
                           scratch + TN_PANELS * stride * sizeof(act));

    for (int j = 0; j < panels; j++)
        pack_rows(x + j * CLAAS_LANES, a->ldx, count, ks - j * CLAAS_LANES, w + j * stride);
    for (int t = 0; t < n_tiles; t++) {
        const int r = tile_start(rs, n_tiles, t), rows = tile_start(rs, n_tiles, t + 1) - r;
        const struct operand tile = {p.x + r * p.ld, p.ld, p.step};

        for (int j = 0; j < panels; j += TILE_PANELS)
            multiply(rows, smaller(TILE_PANELS, panels - j), tile, w + j * stride, stride,
                     STEPS(count), acc + r * TN_WIDTH + j * CLAAS_LANES, TN_WIDTH);
    }
}

static void tn_part(void *arg, int index)
{
    const struct tn_job *job = arg;
    const struct claas_gemm_tn_args *a = job->a;
    const int k0 = index * TN_WIDTH, ks = smaller(TN_WIDTH, a->k - k0);
    float *acc = claas_pool_scratch(job->pool);
    char *rest = (char *)(acc + TN_ROWS * TN_WIDTH);
    const lanes scale = l_set1(a->scale);

    for (int r0 = 0; r0 < a->r; r0 += TN_ROWS) {
        const int rs = smaller(TN_ROWS, a->r - r0);

        memset(acc, 0, (size_t)rs * TN_WIDTH * sizeof(float));
        for (int row = 0; row < a->m; row += TN_CHUNK)
            tn_chunk(a, row, smaller(TN_CHUNK, a->m - row), r0, rs, k0, ks, acc, rest);
        for (int r = 0; r < rs; r++)
            for (int c = 0; c < ks; c += 16) {
                float *g = a->g + (size_t)(r0 + r) * a->ldg + k0 + c;
                lanes v = l_mul(scale, l_load(acc + r * TN_WIDTH + c));

                if (a->accumulate)
                    v = l_add(l_read(g, ks - c), v);
                l_write(g, v, ks - c);
            }
    }
}

static void gemm_tn(claas_pool_t *pool, const struct claas_gemm_tn_args *a)
{
    struct tn_job job = {.a = a, .pool = pool};

    claas_pool_run(pool, divide_up(a->k, TN_WIDTH), tn_part, &job);
}

#endif
