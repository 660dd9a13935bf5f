/* Row-wise operations of the fast tables: norms, rotary embedding, SwiGLU, the key/value store, and
 * conversions. Part of ops_fast.c. Sums over a row use 16 lanes and the fixed tree of l_sum; rows
 * go to the pool in chunks. */
#ifndef CLAAS_CPU_ROWS_FAST_H
#define CLAAS_CPU_ROWS_FAST_H

#define ROWS_PER_PART 8

/* e^x: x = n ln 2 + r, |r| <= ln(2)/2, polynomial in r (coefficients of Cephes' expf, error about 1
 * ulp), times 2^n. exp(0) is exactly 1; below -104 it is 0, above 89 infinity, NaN stays. */
INLINE lanes l_exp(lanes x)
{
    const lanes y = l_max(l_set1(-104.0f), l_min(l_set1(89.0f), x));
    const lanes n = l_round(l_mul(y, l_set1(1.44269504088896341f)));
    lanes r = l_fma(n, l_set1(-0.693359375f), y);
    lanes p = l_set1(1.9875691500e-4f);

    r = l_fma(n, l_set1(2.12194440e-4f), r);
    p = l_fma(p, r, l_set1(1.3981999507e-3f));
    p = l_fma(p, r, l_set1(8.3334519073e-3f));
    p = l_fma(p, r, l_set1(4.1665795894e-2f));
    p = l_fma(p, r, l_set1(1.6666665459e-1f));
    p = l_fma(p, r, l_set1(5.0000001201e-1f));
    p = l_fma(l_mul(r, r), p, l_add(r, l_set1(1.0f)));
    return l_scale(p, n);
}

/* --- conversions and panels --- */

static void pack_panel(void *panels, int k, int panel, const float *const rows[CLAAS_LANES])
{
    act *out = (act *)panels + (size_t)panel * panel_elements(k);

    for (int i = 0; i < STEPS(k) * STEP_K; i++)
        for (int lane = 0; lane < CLAAS_LANES; lane++)
            out[panel_at(lane, i)] = a_from_float(rows[lane] && i < k ? rows[lane][i] : 0.0f);
}

static void unpack_row(const void *panels, int k, int row, void *out)
{
    const act *panel = (const act *)panels + (size_t)(row / CLAAS_LANES) * panel_elements(k);

    for (int i = 0; i < k; i++)
        ((act *)out)[i] = panel[panel_at(row % CLAAS_LANES, i)];
}

static void to_act(const float *in, void *out, size_t count)
{
    for (size_t i = 0; i < count; i += 16) {
        const int n = count - i < 16 ? (int)(count - i) : 16;

        a_write((act *)out + i, l_read(in + i, n), n);
    }
}

static void to_float(const void *in, float *out, size_t count)
{
    for (size_t i = 0; i < count; i += 16) {
        const int n = count - i < 16 ? (int)(count - i) : 16;

        l_write(out + i, a_read((const act *)in + i, n), n);
    }
}

/* --- RMSNorm --- */

INLINE lanes product3(lanes a, lanes b, lanes c)
{
    return l_mul(l_mul(a, b), c);
}

static float row_rstd(const act *x, int d, float eps)
{
    lanes sum = l_zero();

    for (int k = 0; k < d; k += 16) {
        const lanes v = a_read(x + k, d - k);

        sum = l_add(sum, l_mul(v, v));
    }
    return 1.0f / sqrtf(l_sum(sum) / (float)d + eps);
}

/* dx = (add ? dx : 0) + rstd (dy w - x rstd^2 mean(dy w x)); dx may be dy. */
static void norm_row_bwd(const act *x, const float *weight, float rstd, const float *dy, float *dx,
                         int d, bool add)
{
    const lanes r = l_set1(rstd);
    lanes sum = l_zero(), shift;

    for (int k = 0; k < d; k += 16) {
        const int n = d - k;

        sum = l_add(sum, product3(l_read(dy + k, n), l_read(weight + k, n), a_read(x + k, n)));
    }
    shift = l_set1(rstd * rstd * (l_sum(sum) / (float)d));
    for (int k = 0; k < d; k += 16) {
        const int n = smaller(16, d - k);
        const lanes g = l_mul(l_read(dy + k, n), l_read(weight + k, n));
        const lanes v = l_mul(r, l_sub(g, l_mul(a_read(x + k, n), shift)));

        l_write(dx + k, add ? l_add(l_read(dx + k, n), v) : v, n);
    }
}

struct norm_job {
    int m, d, ldx, ldy, lddx;
    const act *x;
    const float *weight, *rstd_in, *dy;
    float eps;
    act *y;
    float *rstd, *dx;
};

static void rmsnorm_rows(void *arg, int part)
{
    const struct norm_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART);

    for (int i = part * ROWS_PER_PART; i < end; i++) {
        const act *x = job->x + (size_t)i * job->ldx;
        const float rstd = row_rstd(x, job->d, job->eps);

        for (int k = 0; k < job->d; k += 16) {
            const int n = smaller(16, job->d - k);
            const lanes v = l_mul(a_read(x + k, n), l_set1(rstd));

            a_write(job->y + (size_t)i * job->ldy + k, l_mul(v, l_read(job->weight + k, n)), n);
        }
        if (job->rstd)
            job->rstd[i] = rstd;
    }
}

static void rmsnorm(claas_pool_t *pool, int m, int d, const void *x, int ldx, const float *weight,
                    float eps, void *y, int ldy, float *rstd)
{
    struct norm_job job = {.m = m,
                           .d = d,
                           .x = x,
                           .ldx = ldx,
                           .weight = weight,
                           .eps = eps,
                           .y = y,
                           .ldy = ldy,
                           .rstd = rstd};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), rmsnorm_rows, &job);
}

static void rmsnorm_bwd_rows(void *arg, int part)
{
    const struct norm_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART);

    for (int i = part * ROWS_PER_PART; i < end; i++)
        norm_row_bwd(job->x + (size_t)i * job->ldx, job->weight, job->rstd_in[i],
                     job->dy + (size_t)i * job->ldy, job->dx + (size_t)i * job->lddx, job->d, true);
}

static void rmsnorm_bwd(claas_pool_t *pool, int m, int d, const void *x, int ldx,
                        const float *weight, const float *rstd, const float *dy, int lddy,
                        float *dx, int lddx)
{
    struct norm_job job = {.m = m,
                           .d = d,
                           .x = x,
                           .ldx = ldx,
                           .weight = weight,
                           .rstd_in = rstd,
                           .dy = dy,
                           .ldy = lddy,
                           .dx = dx,
                           .lddx = lddx};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), rmsnorm_bwd_rows, &job);
}

/* --- head norm and rotary embedding --- */

struct rope_job {
    int m, heads, head_dim, ldx, lddx;
    act *x;
    const act *x_raw;
    float *dx, *rstd;
    const float *norm_weight, *rstd_in, *cos_sin;
    float eps;
    const int32_t *pos;
};

/* cos and sin of 16 (or n) neighbouring dimensions. */
INLINE void read_angles(const float *cs, int n, lanes *cosine, lanes *sine)
{
    float whole[32];

    if (n < 16) {
        memset(whole, 0, sizeof(whole));
        memcpy(whole, cs, (size_t)n * 2 * sizeof(float));
        cs = whole;
    }
    l_load_pairs(cs, cosine, sine);
}

static void norm_rope_head(const struct rope_job *job, act *x, const float *cs, float *rstd_out)
{
    const int d = job->head_dim, half = d / 2;
    const float *weight = job->norm_weight;
    const float rstd = weight ? row_rstd(x, d, job->eps) : 1.0f;

    if (rstd_out)
        *rstd_out = rstd;
    for (int k = 0; k < half; k += 16) {
        const int n = smaller(16, half - k);
        lanes a = a_read(x + k, n), b = a_read(x + k + half, n), cosine, sine;

        read_angles(cs + 2 * k, n, &cosine, &sine);
        if (weight) {
            a = product3(a, l_set1(rstd), l_read(weight + k, n));
            b = product3(b, l_set1(rstd), l_read(weight + k + half, n));
        }
        a_write(x + k, l_sub(l_mul(a, cosine), l_mul(b, sine)), n);
        a_write(x + k + half, l_add(l_mul(b, cosine), l_mul(a, sine)), n);
    }
}

static void norm_rope_rows(void *arg, int part)
{
    const struct rope_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART);

    for (int i = part * ROWS_PER_PART; i < end; i++)
        for (int h = 0; h < job->heads; h++)
            norm_rope_head(job, job->x + (size_t)i * job->ldx + (size_t)h * job->head_dim,
                           job->cos_sin + (size_t)job->pos[i] * job->head_dim,
                           job->rstd && job->norm_weight ? &job->rstd[(size_t)i * job->heads + h]
                                                         : NULL);
}

static void norm_rope(claas_pool_t *pool, int m, int heads, int head_dim, void *x, int ldx,
                      const float *norm_weight, float eps, float *rstd, const float *cos_sin,
                      const int32_t *pos)
{
    struct rope_job job = {.m = m,
                           .heads = heads,
                           .head_dim = head_dim,
                           .x = x,
                           .ldx = ldx,
                           .norm_weight = norm_weight,
                           .eps = eps,
                           .rstd = rstd,
                           .cos_sin = cos_sin,
                           .pos = pos};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), norm_rope_rows, &job);
}

static void norm_rope_head_bwd(const struct rope_job *job, float *dx, const float *cs)
{
    const int half = job->head_dim / 2;

    for (int k = 0; k < half; k += 16) {
        const int n = smaller(16, half - k);
        const lanes a = l_read(dx + k, n), b = l_read(dx + k + half, n);
        lanes cosine, sine;

        read_angles(cs + 2 * k, n, &cosine, &sine);
        l_write(dx + k, l_add(l_mul(a, cosine), l_mul(b, sine)), n);
        l_write(dx + k + half, l_sub(l_mul(b, cosine), l_mul(a, sine)), n);
    }
}

static void norm_rope_bwd_rows(void *arg, int part)
{
    const struct rope_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART), d = job->head_dim;

    for (int i = part * ROWS_PER_PART; i < end; i++)
        for (int h = 0; h < job->heads; h++) {
            float *dx = job->dx + (size_t)i * job->lddx + (size_t)h * d;

            norm_rope_head_bwd(job, dx, job->cos_sin + (size_t)job->pos[i] * d);
            if (job->norm_weight)
                norm_row_bwd(job->x_raw + (size_t)i * job->ldx + (size_t)h * d, job->norm_weight,
                             job->rstd_in[(size_t)i * job->heads + h], dx, dx, d, false);
        }
}

static void norm_rope_bwd(claas_pool_t *pool, int m, int heads, int head_dim, float *dx, int lddx,
                          const void *x_raw, int ldx, const float *norm_weight, const float *rstd,
                          const float *cos_sin, const int32_t *pos)
{
    struct rope_job job = {.m = m,
                           .heads = heads,
                           .head_dim = head_dim,
                           .dx = dx,
                           .lddx = lddx,
                           .x_raw = x_raw,
                           .ldx = ldx,
                           .norm_weight = norm_weight,
                           .rstd_in = rstd,
                           .cos_sin = cos_sin,
                           .pos = pos};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), norm_rope_bwd_rows, &job);
}

/* --- key/value store --- */

struct store_job {
    int m, kv_heads, head_dim, ldk;
    const act *k, *v;
    const int32_t *pos, *blocks;
    char *kv;
    size_t block_bytes;
};

static void kv_store_rows(void *arg, int part)
{
    const struct store_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART), d = job->head_dim;

    for (int i = part * ROWS_PER_PART; i < end; i++) {
        const int unwritten = kv_unwritten_from(job->pos, job->blocks, job->m, i);

        for (int g = 0; g < job->kv_heads; g++) {
            const size_t number = (size_t)job->blocks[i] * job->kv_heads + g;
            const size_t at = (size_t)i * job->ldk + (size_t)g * d;
            const int p = job->pos[i] % CLAAS_KV_BLOCK;
            act *block = (act *)(job->kv + number * job->block_bytes);

            for (int j = 0; j < d; j++) {
                block[key_at(d, p, j)] = job->k[at + j];
                block[value_at(d, p, j)] = job->v[at + j];
            }
            for (int rest = unwritten; rest < CLAAS_KV_BLOCK; rest++)
                for (int j = 0; j < d; j++)
                    block[key_at(d, rest, j)] = block[value_at(d, rest, j)] = 0;
        }
    }
}

static void kv_store(claas_pool_t *pool, int m, int kv_heads, int head_dim, const void *k,
                     const void *v, int ldk, const int32_t *pos, const int32_t *blocks, void *kv,
                     size_t kv_block_bytes)
{
    struct store_job job = {.m = m,
                            .kv_heads = kv_heads,
                            .head_dim = head_dim,
                            .ldk = ldk,
                            .k = k,
                            .v = v,
                            .pos = pos,
                            .blocks = blocks,
                            .kv = kv,
                            .block_bytes = kv_block_bytes};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), kv_store_rows, &job);
}

/* --- SwiGLU --- */

struct swiglu_job {
    int m, n, ldx, ldh, lddh, lddx;
    const act *x;
    const float *dh;
    act *h, *dx;
};

INLINE lanes sigmoid(lanes x)
{
    return l_div(l_set1(1.0f), l_add(l_set1(1.0f), l_exp(l_sub(l_zero(), x))));
}

static void swiglu_rows(void *arg, int part)
{
    const struct swiglu_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART);

    for (int i = part * ROWS_PER_PART; i < end; i++) {
        const act *gate = job->x + (size_t)i * job->ldx, *up = gate + job->n;

        for (int k = 0; k < job->n; k += 16) {
            const int n = smaller(16, job->n - k);
            const lanes x = a_read(gate + k, n);

            a_write(job->h + (size_t)i * job->ldh + k, product3(x, sigmoid(x), a_read(up + k, n)),
                    n);
        }
    }
}

static void swiglu(claas_pool_t *pool, int m, int n, const void *x, int ldx, void *h, int ldh)
{
    struct swiglu_job job = {.m = m, .n = n, .x = x, .ldx = ldx, .h = h, .ldh = ldh};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), swiglu_rows, &job);
}

/* s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)) */
static void swiglu_bwd_rows(void *arg, int part)
{
    const struct swiglu_job *job = arg;
    const int end = smaller(job->m, (part + 1) * ROWS_PER_PART);
    const lanes one = l_set1(1.0f);

    for (int i = part * ROWS_PER_PART; i < end; i++) {
        const act *gate = job->x + (size_t)i * job->ldx, *up = gate + job->n;
        act *dgate = job->dx + (size_t)i * job->lddx, *dup = dgate + job->n;

        for (int k = 0; k < job->n; k += 16) {
            const int n = smaller(16, job->n - k);
            const lanes x = a_read(gate + k, n), u = a_read(up + k, n), s = sigmoid(x);
            const lanes dh = l_read(job->dh + (size_t)i * job->lddh + k, n);
            const lanes slope = l_mul(s, l_fma(x, l_sub(one, s), one));

            if (job->h)
                a_write(job->h + (size_t)i * job->ldh + k, product3(x, s, u), n);
            a_write(dgate + k, product3(dh, u, slope), n);
            a_write(dup + k, product3(dh, x, s), n);
        }
    }
}

static void swiglu_bwd(claas_pool_t *pool, int m, int n, const void *x, int ldx, const float *dh,
                       int lddh, void *dx, int lddx, void *h, int ldh)
{
    struct swiglu_job job = {.m = m,
                             .n = n,
                             .x = x,
                             .ldx = ldx,
                             .dh = dh,
                             .lddh = lddh,
                             .dx = dx,
                             .lddx = lddx,
                             .h = h,
                             .ldh = ldh};

    claas_pool_run(pool, divide_up(m, ROWS_PER_PART), swiglu_bwd_rows, &job);
}

#endif
