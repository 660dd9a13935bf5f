/* The reference operations for one precision: the obvious loop for each formula of ops.h. Included
 * twice by ops_ref.c (attention is in ops_ref_attn_tmpl.h) with
 *
 *   NAME(x)                     the name of a function for this precision
 *   act, LOAD(a), STORE(x)      the element type, to and from float
 *   PANEL_ELEMENTS, PANEL_AT    the layouts of ops_impl.h
 *   KEY_AT, VALUE_AT
 *   TABLE, TABLE_NAME           the exported table
 *   PRECISION
 *
 * Speed matters only so far that tests finish: the loops over 16 lanes vectorise, nothing is
 * blocked. */

static void NAME(pack_panel)(void *panels, int k, int panel, const float *const rows[CLAAS_LANES])
{
    act *out = (act *)panels + (size_t)panel * PANEL_ELEMENTS(k);

    memset(out, 0, PANEL_ELEMENTS(k) * sizeof(act));
    for (int lane = 0; lane < CLAAS_LANES; lane++)
        for (int i = 0; rows[lane] && i < k; i++)
            out[PANEL_AT(lane, i)] = STORE(rows[lane][i]);
}

static void NAME(unpack_row)(const void *panels, int k, int row, void *out)
{
    const act *panel = (const act *)panels + (size_t)(row / CLAAS_LANES) * PANEL_ELEMENTS(k);

    for (int i = 0; i < k; i++)
        ((act *)out)[i] = panel[PANEL_AT(row % CLAAS_LANES, i)];
}

static void NAME(to_act)(const float *in, void *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        ((act *)out)[i] = STORE(in[i]);
}

static void NAME(to_float)(const void *in, float *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = LOAD(((const act *)in)[i]);
}

/* acc[lane] += sum over k of x[k] panel[lane][k] */
static void NAME(add_products)(float acc[CLAAS_LANES], const act *x, const act *panel, int k)
{
    for (int i = 0; i < k; i++) {
        const float value = LOAD(x[i]);

        for (int lane = 0; lane < CLAAS_LANES; lane++)
            acc[lane] += value * LOAD(panel[PANEL_AT(lane, i)]);
    }
}

static void NAME(gemm_panel)(void *arg, int panel)
{
    const struct claas_gemm_args *a = arg;
    const int first = panel * CLAAS_LANES, lanes = smaller(CLAAS_LANES, a->n - first);
    const act *w = (const act *)a->w + (size_t)panel * PANEL_ELEMENTS(a->k);
    const act *b = a->lora_b ? (const act *)a->lora_b + (size_t)panel * PANEL_ELEMENTS(a->r) : NULL;

    for (int i = 0; i < a->m; i++) {
        const size_t at = (size_t)i * a->ldo + first;
        float acc[CLAAS_LANES] = {0};

        for (int lane = 0; a->accumulate && lane < lanes; lane++)
            acc[lane] = a->out32[at + lane];
        NAME(add_products)(acc, (const act *)a->x + (size_t)i * a->ldx, w, a->k);
        if (a->lora_s && b)
            NAME(add_products)(acc, (const act *)a->lora_s + (size_t)i * a->lds, b, a->r);
        for (int lane = 0; lane < lanes; lane++) {
            float value = acc[lane];

            if (a->bias)
                value += a->bias[first + lane];
            if (a->residual)
                value += LOAD(((const act *)a->residual)[at + lane]);
            if (a->out32)
                a->out32[at + lane] = value;
            else
                ((act *)a->out)[at + lane] = STORE(value);
        }
    }
}

static void NAME(gemm)(claas_pool_t *pool, const struct claas_gemm_args *args)
{
    if (args->m > 0)
        claas_pool_run(pool, divide_up(args->n, CLAAS_LANES), NAME(gemm_panel), (void *)args);
}

static void NAME(gemm_dx_row)(void *arg, int i)
{
    const struct claas_gemm_dx_args *a = arg;
    const act *w = a->w;

    for (int k = 0; k < a->k; k++) {
        float *dx = &a->dx[(size_t)i * a->ldx + k];
        float acc = a->accumulate ? *dx : 0;

        for (int n = 0; n < a->n; n++)
            acc += LOAD(((const act *)a->dy)[(size_t)i * a->ldy + n]) *
                   LOAD(w[(size_t)(n / CLAAS_LANES) * PANEL_ELEMENTS(a->k) +
                          PANEL_AT(n % CLAAS_LANES, k)]);
        *dx = acc;
    }
}

static void NAME(gemm_dx)(claas_pool_t *pool, const struct claas_gemm_dx_args *args)
{
    claas_pool_run(pool, args->m, NAME(gemm_dx_row), (void *)args);
}

static void NAME(gemm_tn_row)(void *arg, int r)
{
    const struct claas_gemm_tn_args *a = arg;
    float *g = a->g + (size_t)r * a->ldg;

    for (int k = 0; k < a->k; k++) {
        float sum = 0;

        for (int i = 0; i < a->m; i++)
            sum += LOAD(((const act *)a->p)[(size_t)i * a->ldp + r]) *
                   LOAD(((const act *)a->x)[(size_t)i * a->ldx + k]);
        g[k] = a->accumulate ? g[k] + a->scale * sum : a->scale * sum;
    }
}

static void NAME(gemm_tn)(claas_pool_t *pool, const struct claas_gemm_tn_args *args)
{
    claas_pool_run(pool, args->r, NAME(gemm_tn_row), (void *)args);
}

struct NAME(norm_job) {
    int d, ldx, ldy, lddx;
    const act *x;
    const float *weight, *rstd_in, *dy;
    float eps;
    act *y;
    float *rstd, *dx;
};

static void NAME(rmsnorm_row)(void *arg, int i)
{
    const struct NAME(norm_job) *job = arg;
    const act *x = job->x + (size_t)i * job->ldx;
    act *y = job->y + (size_t)i * job->ldy;
    float sum = 0, rstd = 0;

    for (int k = 0; k < job->d; k++)
        sum += LOAD(x[k]) * LOAD(x[k]);
    rstd = 1.0f / sqrtf(sum / (float)job->d + job->eps);
    for (int k = 0; k < job->d; k++)
        y[k] = STORE(LOAD(x[k]) * rstd * job->weight[k]);
    if (job->rstd)
        job->rstd[i] = rstd;
}

static void NAME(rmsnorm)(claas_pool_t *pool, int m, int d, const void *x, int ldx,
                          const float *weight, float eps, void *y, int ldy, float *rstd)
{
    struct NAME(norm_job) job = {
        .d = d, .x = x, .ldx = ldx, .weight = weight, .eps = eps, .y = y, .ldy = ldy, .rstd = rstd};

    claas_pool_run(pool, m, NAME(rmsnorm_row), &job);
}

static void NAME(rmsnorm_bwd_row)(void *arg, int i)
{
    const struct NAME(norm_job) *job = arg;
    const act *x = job->x + (size_t)i * job->ldx;
    const float *dy = job->dy + (size_t)i * job->ldy;
    float *dx = job->dx + (size_t)i * job->lddx;
    const float rstd = job->rstd_in[i];
    float mean = 0;

    for (int k = 0; k < job->d; k++)
        mean += dy[k] * job->weight[k] * LOAD(x[k]);
    mean /= (float)job->d;
    for (int k = 0; k < job->d; k++)
        dx[k] += rstd * (dy[k] * job->weight[k] - LOAD(x[k]) * rstd * rstd * mean);
}

static void NAME(rmsnorm_bwd)(claas_pool_t *pool, int m, int d, const void *x, int ldx,
                              const float *weight, const float *rstd, const float *dy, int lddy,
                              float *dx, int lddx)
{
    struct NAME(norm_job) job = {.d = d,
                                 .x = x,
                                 .ldx = ldx,
                                 .weight = weight,
                                 .rstd_in = rstd,
                                 .dy = dy,
                                 .ldy = lddy,
                                 .dx = dx,
                                 .lddx = lddx};

    claas_pool_run(pool, m, NAME(rmsnorm_bwd_row), &job);
}

struct NAME(rope_job) {
    int heads, head_dim, ldx, lddx;
    act *x;
    const act *x_raw;
    float *dx, *rstd;
    const float *norm_weight, *rstd_in, *cos_sin;
    float eps;
    const int32_t *pos;
};

static void NAME(norm_rope_row)(void *arg, int i)
{
    const struct NAME(rope_job) *job = arg;
    const int d = job->head_dim, half = d / 2;
    const float *cs = job->cos_sin + (size_t)job->pos[i] * d;

    for (int h = 0; h < job->heads; h++) {
        act *x = job->x + (size_t)i * job->ldx + (size_t)h * d;
        float rstd = 1, sum = 0;

        for (int k = 0; job->norm_weight && k < d; k++)
            sum += LOAD(x[k]) * LOAD(x[k]);
        if (job->norm_weight)
            rstd = 1.0f / sqrtf(sum / (float)d + job->eps);
        if (job->norm_weight && job->rstd)
            job->rstd[(size_t)i * job->heads + h] = rstd;
        for (int k = 0; k < half; k++) {
            float a = LOAD(x[k]), b = LOAD(x[k + half]);
            const float cosine = cs[2 * k], sine = cs[2 * k + 1];

            if (job->norm_weight) {
                a = a * rstd * job->norm_weight[k];
                b = b * rstd * job->norm_weight[k + half];
            }
            x[k] = STORE(a * cosine - b * sine);
            x[k + half] = STORE(b * cosine + a * sine);
        }
    }
}

static void NAME(norm_rope)(claas_pool_t *pool, int m, int heads, int head_dim, void *x, int ldx,
                            const float *norm_weight, float eps, float *rstd, const float *cos_sin,
                            const int32_t *pos)
{
    struct NAME(rope_job) job = {.heads = heads,
                                 .head_dim = head_dim,
                                 .x = x,
                                 .ldx = ldx,
                                 .norm_weight = norm_weight,
                                 .eps = eps,
                                 .rstd = rstd,
                                 .cos_sin = cos_sin,
                                 .pos = pos};

    claas_pool_run(pool, m, NAME(norm_rope_row), &job);
}

static void NAME(norm_rope_bwd_row)(void *arg, int i)
{
    const struct NAME(rope_job) *job = arg;
    const int d = job->head_dim, half = d / 2;
    const float *cs = job->cos_sin + (size_t)job->pos[i] * d;

    for (int h = 0; h < job->heads; h++) {
        float *dx = job->dx + (size_t)i * job->lddx + (size_t)h * d;
        const act *x = job->norm_weight ? job->x_raw + (size_t)i * job->ldx + (size_t)h * d : NULL;
        float rstd = 0, mean = 0;

        for (int k = 0; k < half; k++) { /* the inverse rotation */
            const float a = dx[k], b = dx[k + half], cosine = cs[2 * k], sine = cs[2 * k + 1];

            dx[k] = a * cosine + b * sine;
            dx[k + half] = b * cosine - a * sine;
        }
        if (!job->norm_weight)
            continue;
        rstd = job->rstd_in[(size_t)i * job->heads + h];
        for (int k = 0; k < d; k++)
            mean += dx[k] * job->norm_weight[k] * LOAD(x[k]);
        mean /= (float)d;
        for (int k = 0; k < d; k++)
            dx[k] = rstd * (dx[k] * job->norm_weight[k] - LOAD(x[k]) * rstd * rstd * mean);
    }
}

static void NAME(norm_rope_bwd)(claas_pool_t *pool, int m, int heads, int head_dim, float *dx,
                                int lddx, const void *x_raw, int ldx, const float *norm_weight,
                                const float *rstd, const float *cos_sin, const int32_t *pos)
{
    struct NAME(rope_job) job = {.heads = heads,
                                 .head_dim = head_dim,
                                 .dx = dx,
                                 .lddx = lddx,
                                 .x_raw = x_raw,
                                 .ldx = ldx,
                                 .norm_weight = norm_weight,
                                 .rstd_in = rstd,
                                 .cos_sin = cos_sin,
                                 .pos = pos};

    claas_pool_run(pool, m, NAME(norm_rope_bwd_row), &job);
}

struct NAME(store_job) {
    int m, kv_heads, head_dim, ldk;
    const act *k, *v;
    const int32_t *pos, *blocks;
    char *kv;
    size_t block_bytes;
};

static void NAME(kv_store_row)(void *arg, int i)
{
    const struct NAME(store_job) *job = arg;
    const int p = job->pos[i] % CLAAS_KV_BLOCK, d = job->head_dim;
    const int unwritten = kv_unwritten_from(job->pos, job->blocks, job->m, i);

    for (int g = 0; g < job->kv_heads; g++) {
        act *block =
            (act *)(job->kv + ((size_t)job->blocks[i] * job->kv_heads + g) * job->block_bytes);
        const size_t at = (size_t)i * job->ldk + (size_t)g * d;

        for (int j = 0; j < d; j++) {
            block[KEY_AT(d, p, j)] = job->k[at + j];
            block[VALUE_AT(d, p, j)] = job->v[at + j];
        }
        for (int rest = unwritten; rest < CLAAS_KV_BLOCK; rest++)
            for (int j = 0; j < d; j++)
                block[KEY_AT(d, rest, j)] = block[VALUE_AT(d, rest, j)] = STORE(0);
    }
}

static void NAME(kv_store)(claas_pool_t *pool, int m, int kv_heads, int head_dim, const void *k,
                           const void *v, int ldk, const int32_t *pos, const int32_t *blocks,
                           void *kv, size_t kv_block_bytes)
{
    struct NAME(store_job) job = {.m = m,
                                  .kv_heads = kv_heads,
                                  .head_dim = head_dim,
                                  .ldk = ldk,
                                  .k = k,
                                  .v = v,
                                  .pos = pos,
                                  .blocks = blocks,
                                  .kv = kv,
                                  .block_bytes = kv_block_bytes};

    claas_pool_run(pool, m, NAME(kv_store_row), &job);
}

struct NAME(swiglu_job) {
    int n, ldx, ldh, lddh, lddx;
    const act *x;
    const float *dh;
    act *h, *dx;
};

static void NAME(swiglu_row)(void *arg, int i)
{
    const struct NAME(swiglu_job) *job = arg;
    const act *gate = job->x + (size_t)i * job->ldx, *up = gate + job->n;
    act *h = job->h + (size_t)i * job->ldh;

    for (int k = 0; k < job->n; k++) {
        const float x = LOAD(gate[k]);

        h[k] = STORE(x / (1.0f + expf(-x)) * LOAD(up[k]));
    }
}

static void NAME(swiglu)(claas_pool_t *pool, int m, int n, const void *x, int ldx, void *h, int ldh)
{
    struct NAME(swiglu_job) job = {.n = n, .x = x, .ldx = ldx, .h = h, .ldh = ldh};

    claas_pool_run(pool, m, NAME(swiglu_row), &job);
}

/* s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)) */
static void NAME(swiglu_bwd_row)(void *arg, int i)
{
    const struct NAME(swiglu_job) *job = arg;
    const act *gate = job->x + (size_t)i * job->ldx, *up = gate + job->n;
    const float *dh = job->dh + (size_t)i * job->lddh;
    act *dgate = job->dx + (size_t)i * job->lddx, *dup = dgate + job->n;

    for (int k = 0; k < job->n; k++) {
        const float x = LOAD(gate[k]), u = LOAD(up[k]), s = 1.0f / (1.0f + expf(-x));

        dgate[k] = STORE(dh[k] * u * (s * (1.0f + x * (1.0f - s))));
        dup[k] = STORE(dh[k] * (x * s));
        if (job->h)
            job->h[(size_t)i * job->ldh + k] = STORE(x / (1.0f + expf(-x)) * u);
    }
}

static void NAME(swiglu_bwd)(claas_pool_t *pool, int m, int n, const void *x, int ldx,
                             const float *dh, int lddh, void *dx, int lddx, void *h, int ldh)
{
    struct NAME(swiglu_job) job = {.n = n,
                                   .x = x,
                                   .ldx = ldx,
                                   .dh = dh,
                                   .lddh = lddh,
                                   .dx = dx,
                                   .lddx = lddx,
                                   .h = h,
                                   .ldh = ldh};

    claas_pool_run(pool, m, NAME(swiglu_bwd_row), &job);
}

const struct claas_ops TABLE = {
    .name = TABLE_NAME,
    .precision = PRECISION,
    .act_bytes = sizeof(act),
    .pack_panel = NAME(pack_panel),
    .unpack_row = NAME(unpack_row),
    .to_act = NAME(to_act),
    .to_float = NAME(to_float),
    .gemm = NAME(gemm),
    .gemm_dx = NAME(gemm_dx),
    .gemm_tn = NAME(gemm_tn),
    .rmsnorm = NAME(rmsnorm),
    .rmsnorm_bwd = NAME(rmsnorm_bwd),
    .norm_rope = NAME(norm_rope),
    .norm_rope_bwd = NAME(norm_rope_bwd),
    .kv_store = NAME(kv_store),
    .attention = NAME(attention),
    .attention_bwd = NAME(attention_bwd),
    .swiglu = NAME(swiglu),
    .swiglu_bwd = NAME(swiglu_bwd),
    .sum_squares = sum_squares,
    .adamw = adamw,
};
