/* Attention of the fast tables: online softmax over groups of four key blocks. Part of ops_fast.c.
 *
 * A part is some consecutive queries of one run times the query heads that share one kv head: its
 * rows, ordered by query. Keys and values of the kv head are read once for all of them, and both
 * products are tiles: scores = Q K (lanes are positions, a step is one or two dimensions), out += P
 * V (lanes are dimensions, steps are positions).
 *
 * A row must get the same bits whichever rows share its part. So it takes part in exactly the
 * blocks that hold a position it sees, in increasing order; since rows are ordered by query, each
 * block concerns the rows from some row on. Groups begin at multiples of 64 whatever the query;
 * positions of the group that the row does not see weigh exactly 0. P is rounded to bfloat16 where
 * the dot instruction multiplies it, the sum that normalises it is not. */
#ifndef CLAAS_CPU_ATTN_FAST_H
#define CLAAS_CPU_ATTN_FAST_H

#define ATTN_ROWS   (4 * TILE_ROWS)
#define ATTN_BLOCKS 4
#define ATTN_GROUP  (ATTN_BLOCKS * CLAAS_KV_BLOCK)

#if defined(CLAAS_OPS_BF16) && !OPERAND_WIDENED
typedef claas_bf16 weight;
#define WEIGHT_STEP 4
/* Like l_store_bf16, but numbers below 1e-38 become 0. */
INLINE void weight_write(claas_bf16 *p, lanes v)
{
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v));
}
#else
typedef float weight;
#define WEIGHT_STEP (4 * STEP_K)
INLINE void weight_write(float *p, lanes v)
{
    l_store(p, v);
}
#endif

struct attn_job {
    const struct claas_attn_args *a;
    claas_pool_t *pool;
    int tile_heads, head_tiles; /* query heads of a part, and how many such parts a kv head has */
    int tile_queries, parts;
};

/* One part's rows and their state. */
struct attn_tile {
    const struct claas_attn_args *a;
    const struct claas_attn_run *run;
    int kv_head, first_head, heads, first_query, queries, rows;
    struct operand q;
    float *scores;   /* [rows][ATTN_GROUP] */
    weight *weights; /* [rows][ATTN_GROUP] */
    float *acc;      /* [rows][head_dim] */
    float *sums;     /* [rows][16] */
    act *values;     /* [head_dim/16][ATTN_BLOCKS][256]: a whole group's values, for many rows */
    float max[ATTN_ROWS];
};

_Static_assert(ATTN_ROWS *(ATTN_GROUP + 16 + CLAAS_HEAD_DIM_MAX) * sizeof(float) +
                       ATTN_ROWS * ATTN_GROUP * sizeof(weight) +
                       (ATTN_GROUP + ATTN_ROWS) * CLAAS_HEAD_DIM_MAX * sizeof(act) +
                       ATTN_ROWS * (CLAAS_HEAD_DIM_MAX * sizeof(float) + 64) <=
                   CLAAS_POOL_SCRATCH,
               "a part's state fits the scratch memory");

static const act *kv_block(const struct attn_tile *t, int block)
{
    const size_t number = (size_t)t->run->blocks[block] * t->a->kv_heads + t->kv_head;

    return (const act *)((const char *)t->a->kv + number * t->a->kv_block_bytes);
}

/* The first row that sees position `pos`; t->rows if none does. */
static int first_row(const struct attn_tile *t, int pos)
{
    const int query = larger(0, pos - t->run->pos - t->first_query);

    return smaller(t->rows, query * t->heads);
}

/* out[rows from `row` on][panels*16] += x w, in tiles. */
static void multiply_rows(const struct attn_tile *t, int row, struct operand x, int panels,
                          const act *w, ptrdiff_t second, int steps, float *out, int ldo)
{
    const int rows = t->rows - row, n_tiles = divide_up(rows, TILE_ROWS);

    for (int i = 0; i < n_tiles; i++) {
        const int start = row + tile_start(rows, n_tiles, i);
        const int height = row + tile_start(rows, n_tiles, i + 1) - start;

        tiles[panels - 1][height](x.x + start * x.ld, x.ld, x.step, (const char *)w, second, steps,
                                  out + (size_t)start * ldo, ldo);
    }
}

static void attn_scores(const struct attn_tile *t, int first, int blocks)
{
    const int row = first_row(t, first), head_dim = t->a->head_dim;

    memset(t->scores + (size_t)row * ATTN_GROUP, 0,
           (size_t)(t->rows - row) * ATTN_GROUP * sizeof(float));
    for (int b = 0; b < blocks; b += TILE_PANELS) {
        const act *block = kv_block(t, first / CLAAS_KV_BLOCK + b);
        const bool two = TILE_PANELS == 2 && b + 1 < blocks;
        const act *next = two ? kv_block(t, first / CLAAS_KV_BLOCK + b + 1) : block;

        multiply_rows(t, first_row(t, first + b * CLAAS_KV_BLOCK), t->q, two ? 2 : 1, block,
                      (const char *)next - (const char *)block, STEPS(head_dim),
                      t->scores + b * CLAAS_KV_BLOCK, ATTN_GROUP);
    }
}

/* Scales the scores of a row, hides those of positions it does not see, returns the largest. */
INLINE float attn_row_max(const struct attn_tile *t, int row, int seen)
{
    float *scores = t->scores + (size_t)row * ATTN_GROUP;
    const lanes scale = l_set1(t->a->scale), hidden = l_set1(-INFINITY);
    lanes largest = hidden;

    for (int at = 0; at < seen; at += 16) {
        lanes s = l_mul(l_load(scores + at), scale);

        if (seen - at < 16)
            s = l_keep(s, seen - at, hidden);
        l_store(scores + at, s);
        largest = l_max(largest, s);
    }
    return l_largest(largest);
}

/* Scores of a row to weights; what it has summed so far is scaled to the new maximum. */
INLINE void attn_row_weights(const struct attn_tile *t, int row, int seen, float max, float shrink)
{
    const int head_dim = t->a->head_dim;
    const float *scores = t->scores + (size_t)row * ATTN_GROUP;
    float *sums = t->sums + row * 16, *acc = t->acc + (size_t)row * head_dim;
    const lanes factor = l_set1(shrink);
    lanes sum = l_mul(l_load(sums), factor);

    for (int at = 0; at < seen; at += 16) {
        lanes p = l_exp(l_sub(l_load(scores + at), l_set1(max)));

        if (seen - at < 16)
            p = l_keep(p, seen - at, l_zero());
        sum = l_add(sum, p);
        weight_write(t->weights + (size_t)row * ATTN_GROUP + at, p);
    }
    l_store(sums, sum);
    for (int j = 0; j < head_dim; j += 16)
        l_store(acc + j, l_mul(l_load(acc + j), factor));
}

/* Without branches on values: whether a row's maximum moves is unpredictable, and a factor of
 * exactly 1 changes nothing. */
static void attn_softmax(struct attn_tile *t, int first)
{
    const int from = first_row(t, first), pos = t->run->pos + t->first_query - first + 1;
    const int full = first_row(t, first + ATTN_GROUP - 1); /* from here on all is seen */
    float fresh[ATTN_ROWS + 16], shrink[ATTN_ROWS + 16];

    for (int row = from; row < full; row++)
        fresh[row] = attn_row_max(t, row, pos + row / t->heads);
    for (int row = larger(from, full); row < t->rows; row++)
        fresh[row] = attn_row_max(t, row, ATTN_GROUP);
    for (int row = from; row < t->rows; row += 16) {
        const int n = t->rows - row;
        const lanes old = l_read(t->max + row, n), max = l_max(l_read(fresh + row, n), old);

        l_write(t->max + row, max, n);
        l_write(shrink + row, l_exp(l_sub(old, max)), n);
    }
    for (int row = from; row < full; row++)
        attn_row_weights(t, row, pos + row / t->heads, t->max[row], shrink[row]);
    for (int row = larger(from, full); row < t->rows; row++)
        attn_row_weights(t, row, ATTN_GROUP, t->max[row], shrink[row]);
}

/* The values of four blocks as panels of 64 positions, so that sums stay in registers for 4 times
 * as long. */
static void attn_gather_values(const struct attn_tile *t, int first)
{
    const int head_dim = t->a->head_dim;

    for (int b = 0; b < ATTN_BLOCKS; b++) {
        const act *values = kv_block(t, first / CLAAS_KV_BLOCK + b) + head_dim * CLAAS_KV_BLOCK;

        for (int j = 0; j < head_dim / CLAAS_LANES; j++)
            memcpy(t->values + (j * ATTN_BLOCKS + b) * 256, values + j * 256, 256 * sizeof(act));
    }
}

static void attn_values(const struct attn_tile *t, int first, int blocks)
{
    const int head_dim = t->a->head_dim, panels = head_dim / CLAAS_LANES;
    const int whole_from = first_row(t, first + (ATTN_BLOCKS - 1) * CLAAS_KV_BLOCK);
    const bool gather = blocks == ATTN_BLOCKS && whole_from == 0 && t->rows >= TILE_ROWS;
    const int step =
        gather ? ATTN_BLOCKS : 1; /* all rows see all blocks: one product instead of four */
    const size_t pitch = (size_t)step * 256;

    if (gather)
        attn_gather_values(t, first);
    for (int b = 0; b < blocks; b += step) {
        const act *values =
            gather ? t->values
                   : kv_block(t, first / CLAAS_KV_BLOCK + b) + head_dim * CLAAS_KV_BLOCK;
        const struct operand p = {(const char *)(t->weights + b * CLAAS_KV_BLOCK),
                                  ATTN_GROUP * sizeof(weight), WEIGHT_STEP};
        const int row = first_row(t, first + b * CLAAS_KV_BLOCK);

        for (int j = 0; j < panels; j += TILE_PANELS)
            multiply_rows(t, row, p, smaller(TILE_PANELS, panels - j), values + j * pitch,
                          (ptrdiff_t)(pitch * sizeof(act)), STEPS(CLAAS_KV_BLOCK) * step,
                          t->acc + j * CLAAS_LANES, head_dim);
    }
}

static void attn_finish(const struct attn_tile *t)
{
    const int head_dim = t->a->head_dim;

    for (int row = 0; row < t->rows; row++) {
        const int query = t->first_query + row / t->heads, head = t->first_head + row % t->heads;
        act *out = (act *)t->run->out + (size_t)query * t->run->ldo + (size_t)head * head_dim;
        const float sum = l_sum(l_load(t->sums + row * 16));

        for (int j = 0; j < head_dim; j += 16)
            a_store(out + j, l_div(l_load(t->acc + (size_t)row * head_dim + j), l_set1(sum)));
        if (t->run->lse)
            t->run->lse[(size_t)query * t->a->heads + head] = t->max[row] + logf(sum);
    }
}

/* Lays the part's state out in the scratch memory and collects its queries. */
static void attn_start(struct attn_tile *t, char *scratch)
{
    const int head_dim = t->a->head_dim;
    act *q = NULL;

    t->scores = (float *)scratch;
    t->sums = t->scores + ATTN_ROWS * ATTN_GROUP;
    t->acc = t->sums + ATTN_ROWS * 16;
    t->weights = (weight *)(t->acc + ATTN_ROWS * head_dim);
    t->values = (act *)(t->weights + ATTN_ROWS * ATTN_GROUP);
    q = t->values + ATTN_GROUP * head_dim;
    for (int row = 0; row < t->rows; row++) {
        const int query = t->first_query + row / t->heads, head = t->first_head + row % t->heads;

        memcpy(q + (size_t)row * head_dim,
               (const act *)t->run->q + (size_t)query * t->run->ldq + (size_t)head * head_dim,
               (size_t)head_dim * sizeof(act));
        t->max[row] = -INFINITY;
    }
    t->q = operand_of(q, head_dim, t->rows, head_dim, (char *)(q + ATTN_ROWS * head_dim));
    memset(t->sums, 0, (size_t)t->rows * 16 * sizeof(float));
    memset(t->acc, 0, (size_t)t->rows * head_dim * sizeof(float));
}

static void attn_part(void *arg, int index)
{
    const struct attn_job *job = arg;
    const struct claas_attn_args *a = job->a;
    const int per_tile = a->kv_heads * job->head_tiles, group = a->heads / a->kv_heads;
    struct attn_tile t = {.a = a, .run = a->runs};
    int tile = (job->parts - 1 - index) / per_tile,
        last = 0; /* the parts with the most positions first: those at the end of a run */
    const int head_tile = (job->parts - 1 - index) % per_tile;

    while (tile >= divide_up(t.run->count, job->tile_queries)) {
        tile -= divide_up(t.run->count, job->tile_queries);
        t.run++;
    }
    t.kv_head = head_tile / job->head_tiles;
    t.first_head = t.kv_head * group + head_tile % job->head_tiles * job->tile_heads;
    t.heads = smaller(job->tile_heads, (t.kv_head + 1) * group - t.first_head);
    t.first_query = tile * job->tile_queries;
    t.queries = smaller(job->tile_queries, t.run->count - t.first_query);
    t.rows = t.queries * t.heads;
    attn_start(&t, claas_pool_scratch(job->pool));
    last = t.run->pos + t.first_query + t.queries - 1;
    for (int first = 0; first <= last; first += ATTN_GROUP) {
        const int blocks = smaller(ATTN_BLOCKS, (last - first) / CLAAS_KV_BLOCK + 1);

        attn_scores(&t, first, blocks);
        attn_softmax(&t, first);
        attn_values(&t, first, blocks);
    }
    attn_finish(&t);
}

static void attention(claas_pool_t *pool, const struct claas_attn_args *a)
{
    const int group = a->heads / a->kv_heads;
    struct attn_job job = {.a = a, .pool = pool, .tile_heads = smaller(group, ATTN_ROWS)};
    int tiles_of_runs = 0;

    job.head_tiles = divide_up(group, job.tile_heads);
    job.tile_queries = ATTN_ROWS / job.tile_heads;
    for (int i = 0; i < a->n_runs; i++)
        tiles_of_runs += divide_up(a->runs[i].count, job.tile_queries);
    job.parts = tiles_of_runs * a->kv_heads * job.head_tiles;
    claas_pool_run(pool, job.parts, attn_part, &job);
}

#endif
