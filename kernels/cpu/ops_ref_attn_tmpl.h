/* Reference attention, forward and backward, for one precision: included by ops_ref.c before
 * ops_ref_tmpl.h, with the same macros. One query of one head at a time, positions in increasing
 * order, everything in float32. */

/* One query of one head: the running maximum, sum and weighted values over the key blocks ("online
 * softmax"). */
static void NAME(attend)(const struct claas_attn_args *a, const struct claas_attn_run *run, int i,
                         int head)
{
    const int d = a->head_dim, last = run->pos + i, g = head / (a->heads / a->kv_heads);
    const act *q = (const act *)run->q + (size_t)i * run->ldq + (size_t)head * d;
    act *out = (act *)run->out + (size_t)i * run->ldo + (size_t)head * d;
    float max = -INFINITY, sum = 0, acc[CLAAS_HEAD_DIM_MAX] = {0};

    for (int t = 0; t <= last; t++) {
        const act *block =
            (const act *)((const char *)a->kv +
                          ((size_t)run->blocks[t / CLAAS_KV_BLOCK] * a->kv_heads + g) *
                              a->kv_block_bytes);
        const int p = t % CLAAS_KV_BLOCK;
        float score = 0, weight = 0;

        for (int j = 0; j < d; j++)
            score += LOAD(q[j]) * LOAD(block[KEY_AT(d, p, j)]);
        score *= a->scale;
        if (score > max) {
            const float shrink = expf(max - score);

            for (int j = 0; j < d; j++)
                acc[j] *= shrink;
            sum *= shrink;
            max = score;
        }
        weight = expf(score - max);
        sum += weight;
        for (int j = 0; j < d; j++)
            acc[j] += weight * LOAD(block[VALUE_AT(d, p, j)]);
    }
    for (int j = 0; j < d; j++)
        out[j] = STORE(acc[j] / sum);
    if (run->lse)
        run->lse[(size_t)i * a->heads + head] = max + logf(sum);
}

static void NAME(attention_head)(void *arg, int index)
{
    const struct claas_attn_args *a = arg;
    const struct claas_attn_run *run = &a->runs[index / a->heads];

    for (int i = 0; i < run->count; i++)
        NAME(attend)(a, run, i, index % a->heads);
}

static void NAME(attention)(claas_pool_t *pool, const struct claas_attn_args *args)
{
    claas_pool_run(pool, args->n_runs * args->heads, NAME(attention_head), (void *)args);
}

/* Query i of `head` against keys 0 … i: p = exp(scale q.k - lse), ds = p (dout.v - dout.out) scale;
 * dq = sum ds k, dk += ds q, dv += p dout. */
static void NAME(attend_bwd)(const struct claas_attn_bwd_args *a, int i, int head)
{
    const int d = a->head_dim, g = head / (a->heads / a->kv_heads);
    const act *q = (const act *)a->q + (size_t)i * a->ldq + (size_t)head * d;
    const act *out = (const act *)a->out + (size_t)i * a->ldo + (size_t)head * d;
    const act *dout = (const act *)a->dout + (size_t)i * a->lddo + (size_t)head * d;
    float *dq = a->dq + (size_t)i * a->lddq + (size_t)head * d;
    float delta = 0;

    for (int j = 0; j < d; j++) {
        delta += LOAD(dout[j]) * LOAD(out[j]);
        dq[j] = 0;
    }
    for (int t = 0; t <= i; t++) {
        const act *block = (const act *)((const char *)a->kv +
                                         ((size_t)a->blocks[t / CLAAS_KV_BLOCK] * a->kv_heads + g) *
                                             a->kv_block_bytes);
        const int pos = t % CLAAS_KV_BLOCK;
        float *dk = a->dk + (size_t)t * a->lddkv + (size_t)g * d;
        float *dv = a->dv + (size_t)t * a->lddkv + (size_t)g * d;
        float score = 0, dp = 0, p = 0, ds = 0;

        for (int j = 0; j < d; j++) {
            score += LOAD(q[j]) * LOAD(block[KEY_AT(d, pos, j)]);
            dp += LOAD(dout[j]) * LOAD(block[VALUE_AT(d, pos, j)]);
        }
        p = expf(score * a->scale - a->lse[(size_t)i * a->heads + head]);
        ds = p * (dp - delta) * a->scale;
        for (int j = 0; j < d; j++) {
            dq[j] += ds * LOAD(block[KEY_AT(d, pos, j)]);
            dk[j] += ds * LOAD(q[j]);
            dv[j] += p * LOAD(dout[j]);
        }
    }
}

static void NAME(attention_bwd_group)(void *arg, int g)
{
    const struct claas_attn_bwd_args *a = arg;
    const int group = a->heads / a->kv_heads, d = a->head_dim;

    for (int t = 0; t < a->count; t++) {
        memset(a->dk + (size_t)t * a->lddkv + (size_t)g * d, 0, (size_t)d * sizeof(float));
        memset(a->dv + (size_t)t * a->lddkv + (size_t)g * d, 0, (size_t)d * sizeof(float));
    }
    for (int head = g * group; head < (g + 1) * group; head++)
        for (int i = 0; i < a->count; i++)
            NAME(attend_bwd)(a, i, head);
}

static void NAME(attention_bwd)(claas_pool_t *pool, const struct claas_attn_bwd_args *args)
{
    claas_pool_run(pool, args->kv_heads, NAME(attention_bwd_group), (void *)args);
}
