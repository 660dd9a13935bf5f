/* The engine's test back-end, see fake_backend.h. */
#include "fake_backend.h"

#include <stdlib.h>
#include <string.h>

struct fake fake;

static _Atomic int64_t clock_ns;
static _Atomic int adapters_alive;

struct slot {
    int32_t token;
    uint64_t stamp;
    int pass; /* that wrote it */
};

struct claas_backend {
    int blocks;
    struct slot *slots; /* [blocks][16] */
    bool training;
    int left;           /* by a step; fake.lock */
    int64_t trained_ns; /* since the last pass */
    int operations;     /* since the last pass */
};

void fake_reset(void)
{
    pthread_mutex_init(&fake.lock, NULL);
    pthread_cond_init(&fake.changed, NULL);
    memset((char *)&fake + offsetof(struct fake, gate), 0,
           sizeof(fake) - offsetof(struct fake, gate));
    fake.gate = INT32_MAX;
    fake.pass_ns = 1000000;
    fake.token_ns = 10000;
    fake.operation_ns = 10000000;
    fake.train_operations = 3;
    fake.fewest_operations = INT32_MAX;
    fake.teacher_bytes = 64;
}

int64_t fake_now(void)
{
    return atomic_load(&clock_ns);
}

void fake_close_gate(int passes)
{
    pthread_mutex_lock(&fake.lock);
    fake.gate = fake.passes + passes;
    fake.at_gate = 0;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
}

void fake_wait_at_gate(void)
{
    pthread_mutex_lock(&fake.lock);
    while (fake.at_gate == 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    pthread_mutex_unlock(&fake.lock);
}

void fake_open_gate(void)
{
    pthread_mutex_lock(&fake.lock);
    fake.gate = INT32_MAX;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
}

static int refuse(void)
{
    return claas_fail(CLAAS_ERR_NO_MEMORY, FAKE_FULL "%0*d", FAKE_MAP_BYTES, 0);
}

void fake_wait_refused(int count)
{
    pthread_mutex_lock(&fake.lock);
    while (fake.adapters_refused < count)
        pthread_cond_wait(&fake.changed, &fake.lock);
    pthread_mutex_unlock(&fake.lock);
}

static uint64_t mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * UINT64_C(0x9e3779b97f4a7c15);
    return hash ^ (hash >> 29);
}

uint64_t fake_stamp(const claas_adapter_t *adapter)
{
    return adapter == NULL ? 1 : atomic_load(&adapter->backend->stamp);
}

static int32_t finish_token(uint64_t hash, uint64_t seed, uint64_t index)
{
    return (int32_t)(mix(mix(hash, seed), index) % FAKE_VOCAB);
}

int32_t fake_next(const int32_t *tokens, size_t count, uint64_t stamp, uint64_t seed,
                  uint64_t index)
{
    uint64_t hash = 0;

    for (size_t i = 0; i < count; i++)
        hash = mix(mix(hash, (uint64_t)tokens[i]), stamp);
    return finish_token(hash, seed, index);
}

float fake_logprob(int32_t token)
{
    return -0.01f * (float)(token + 1);
}

/* --- the operations
 * -------------------------------------------------------------------------------------------------
 */

static int open_fake(const struct claas_backend_options *options, claas_model_t *model,
                     claas_backend_t **ret)
{
    claas_backend_t *backend = CLAAS_NEW(claas_backend_t);

    backend->blocks = options->kv_blocks;
    backend->slots =
        CLAAS_NEW_ARRAY(struct slot, (size_t)options->kv_blocks * CLAAS_KV_BLOCK_TOKENS);
    *ret = backend;
    return 0;
}

static void free_fake(claas_backend_t **backend)
{
    if (atomic_load(&adapters_alive) != 0 || atomic_load(&fake.host_blocks) != 0)
        fake.broken++;
    free((*backend)->slots);
    free(*backend);
    *backend = NULL;
}

static const char *describe(const claas_backend_t *backend)
{
    return "fake";
}

static void memory(const claas_backend_t *backend, struct claas_backend_memory *ret)
{
    ret->adapters = (uint64_t)atomic_load(&adapters_alive);
}

static int new_adapter(claas_backend_t *backend, const struct claas_lora_config *lora,
                       enum claas_adapter_use use, claas_backend_adapter_t **ret)
{
    claas_backend_adapter_t *adapter;
    bool is_full;

    pthread_mutex_lock(&fake.lock);
    is_full =
        fake.adapter_room > 0 && atomic_load(&adapters_alive) + backend->left >= fake.adapter_room;
    fake.adapters_refused += is_full;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
    if (is_full)
        return refuse();
    adapter = CLAAS_NEW(claas_backend_adapter_t);
    adapter->lora = *lora;
    adapter->use = use;
    atomic_fetch_add(&adapters_alive, 1);
    *ret = adapter;
    return 0;
}

static uint64_t adapter_bytes(const claas_backend_adapter_t *adapter)
{
    return adapter->use == CLAAS_ADAPTER_TRAIN ? 1000 : 100;
}

static void free_adapter(claas_backend_t *backend, claas_backend_adapter_t **adapter)
{
    free((*adapter)->parameters);
    free(*adapter);
    *adapter = NULL;
    atomic_fetch_sub(&adapters_alive, 1);
}

static void set_stamp(claas_backend_adapter_t *adapter)
{
    uint64_t hash = 7;

    for (size_t i = 0; i < adapter->count; i++) {
        uint32_t bits;

        memcpy(&bits, &adapter->parameters[i], 4);
        hash = mix(hash, bits);
    }
    atomic_store(&adapter->stamp, hash);
}

/* random:tiny-llama */
static const struct claas_model_config shape = {
    .hidden = 64, .intermediate = 160, .layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 16};

static int upload(claas_backend_t *backend, claas_backend_adapter_t *adapter,
                  const struct claas_adapter_image *image)
{
    atomic_fetch_add(&fake.uploads, 1);
    adapter->count = claas_lora_parameter_count(&shape, &image->lora);
    free(adapter->parameters);
    adapter->parameters = CLAAS_NEW_ARRAY(float, adapter->count);
    memcpy(adapter->parameters, image->parameters, adapter->count * sizeof(float));
    adapter->step = image->step;
    set_stamp(adapter);
    return 0;
}

static void begin_work(claas_backend_t *backend)
{
    backend->training = true;
    backend->trained_ns = 0;
    backend->operations = 0;
}

/* One operation of a step, or of reading an adapter back. */
static void operate(claas_backend_t *backend)
{
    atomic_fetch_add(&clock_ns, fake.operation_ns);
    backend->trained_ns += fake.operation_ns;
    backend->operations++;
    pthread_mutex_lock(&fake.lock);
    fake.operations_done++;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
}

static int download(claas_backend_t *backend, const claas_backend_adapter_t *adapter,
                    claas_turn_fn *turn, void *turn_arg, struct claas_adapter_image *ret)
{
    begin_work(backend);
    for (int i = 0; i < fake.download_operations; i++) {
        operate(backend);
        if (turn)
            turn(turn_arg);
    }
    backend->training = false;
    claas_adapter_image_new(&shape, &adapter->lora, ret->memory, true, ret);
    ret->step = adapter->step;
    memcpy(ret->parameters, adapter->parameters, adapter->count * sizeof(float));
    memset(ret->exp_avg, 0, adapter->count * sizeof(float));
    memset(ret->exp_avg_sq, 0, adapter->count * sizeof(float));
    return 0;
}

static int clone_adapter(claas_backend_t *backend, const claas_backend_adapter_t *source,
                         enum claas_adapter_use use, claas_backend_adapter_t **ret)
{
    int rc = new_adapter(backend, &source->lora, use, ret);

    if (rc < 0)
        return rc;
    (*ret)->count = source->count;
    (*ret)->parameters = CLAAS_NEW_ARRAY(float, source->count);
    memcpy((*ret)->parameters, source->parameters, source->count * sizeof(float));
    (*ret)->step = source->step;
    set_stamp(*ret);
    return 0;
}

static void *host_new(claas_backend_t *backend, size_t bytes)
{
    void *base = fake.fail_host_new ? NULL : claas_alloc(bytes, 1);

    (void)backend;
    if (base != NULL)
        atomic_fetch_add(&fake.host_blocks, 1);
    return base;
}

static void host_free(claas_backend_t *backend, void *base)
{
    (void)backend;
    atomic_fetch_sub(&fake.host_blocks, 1);
    free(base);
}

static void sample_row(const claas_backend_t *backend, const struct claas_segment *segment,
                       struct claas_sample *sample)
{
    uint64_t hash = 0;

    for (int i = 0; i < segment->pos + segment->count; i++) {
        const struct slot *slot =
            &backend->slots[segment->blocks[i / CLAAS_KV_BLOCK_TOKENS] * CLAAS_KV_BLOCK_TOKENS +
                            i % CLAAS_KV_BLOCK_TOKENS];

        hash = mix(mix(hash, (uint64_t)slot->token), slot->stamp);
    }
    sample->token = finish_token(hash, sample->seed, sample->index);
    sample->logprob = fake_logprob(sample->token);
    for (int i = 0; i < sample->top_logprobs; i++) {
        sample->top_tokens[i] = (sample->token + i) % FAKE_VOCAB;
        sample->top_logprob[i] = fake_logprob(sample->token) - (float)i;
    }
}

static void store_segment(claas_backend_t *backend, const struct claas_segment *segment)
{
    for (int i = 0; i < segment->count; i++) {
        int pos = segment->pos + i;
        int32_t block = segment->blocks[pos / CLAAS_KV_BLOCK_TOKENS];
        struct slot *slot;

        if (block < 0 || block >= backend->blocks) {
            fake.broken++;
            return;
        }
        slot = &backend->slots[block * CLAAS_KV_BLOCK_TOKENS + pos % CLAAS_KV_BLOCK_TOKENS];
        fake.broken += slot->pass == fake.passes; /* two rows wrote one position in one pass */
        slot->pass = fake.passes;
        slot->token = segment->tokens[i];
        slot->stamp = segment->adapter == NULL ? 1 : atomic_load(&segment->adapter->stamp);
    }
}

static void count_pass(claas_backend_t *backend, const struct claas_segment *segments, int count)
{
    int tokens = 0, single = 0, groups = 0;

    for (int i = 0; i < count; i++) {
        groups += i == 0 || segments[i].adapter != segments[i - 1].adapter;
        tokens += segments[i].count;
        single += segments[i].count == 1;
    }
    fake.passes++;
    fake.tokens += tokens;
    fake.single_rows += single;
    fake.passes_without_decode += single == 0;
    if (groups > fake.most_groups)
        fake.most_groups = groups;
    if (tokens > fake.largest_pass)
        fake.largest_pass = tokens;
    if (backend->training) {
        fake.passes_in_training++;
        if (backend->operations > 0 && backend->operations < fake.fewest_operations)
            fake.fewest_operations = backend->operations;
        if (backend->trained_ns > fake.longest_slice)
            fake.longest_slice = backend->trained_ns;
        backend->trained_ns = 0;
        backend->operations = 0;
    }
    atomic_fetch_add(&clock_ns, fake.pass_ns + tokens * fake.token_ns);
}

static int forward(claas_backend_t *backend, const struct claas_segment *segments, int count,
                   struct claas_sample *samples)
{
    int rc = 0, sample = 0;

    pthread_mutex_lock(&fake.lock);
    if (fake.passes >= fake.gate) {
        fake.at_gate++;
        pthread_cond_broadcast(&fake.changed);
    }
    while (fake.passes >= fake.gate)
        pthread_cond_wait(&fake.changed, &fake.lock);
    if (fake.fail_forwards > 0) {
        fake.fail_forwards--;
        rc = claas_fail(CLAAS_ERR_DEVICE, "the forward pass failed on purpose");
    } else {
        count_pass(backend, segments, count);
        for (int i = 0; i < count; i++) {
            store_segment(backend, &segments[i]);
            fake.broken +=
                segments[i].count < 1 || segments[i].wanted < 0 || segments[i].wanted > 1;
        }
        for (int i = 0; i < count; i++)
            if (segments[i].wanted == 1)
                sample_row(backend, &segments[i], &samples[sample++]);
    }
    pthread_mutex_unlock(&fake.lock);
    return rc;
}

/* Each trained adapter changes by an amount that depends on its step and the rows. */
static void update(const struct claas_backend_train *request)
{
    for (size_t i = 0; i < request->row_count; i++) {
        claas_backend_adapter_t *adapter = request->rows[i].student;

        for (size_t k = 0; k < adapter->count; k++)
            adapter->parameters[k] += 0.5f + 0.001f * (float)request->rows[i].row.response[0];
        set_stamp(adapter);
        adapter->step++;
    }
}

static bool lacks_room(void)
{
    return fake.train_room > 0 && atomic_load(&adapters_alive) > fake.train_room;
}

/* What the teacher's rows and their order follow from, as one number. */
static uint64_t hash_teacher(const struct claas_backend_train *request)
{
    uint64_t hash = 3;

    for (size_t i = 0; i < request->row_count; i++) {
        const struct claas_train_row *row = &request->rows[i].row;

        hash = mix(hash, row->teacher_count);
        hash = mix(hash, request->rows[i].student == request->rows[0].student);
        for (size_t t = 0; t < row->student_count; t++)
            hash = mix(hash, (uint64_t)row->student_prompt[t]);
        for (size_t t = 0; t < row->teacher_count; t++)
            hash = mix(hash, (uint64_t)row->teacher_prompt[t]);
        for (size_t t = 0; t < row->response_count; t++)
            hash = mix(mix(hash, (uint64_t)row->response[t]), row->mask == NULL || row->mask[t]);
    }
    return hash;
}

/* Before anything of the step can fail: what the engine keeps of one that did shows. */
static void run_teacher(claas_backend_t *backend, const struct claas_backend_train *request)
{
    struct claas_teacher_kept *kept = request->kept;
    uint64_t hash = hash_teacher(request);

    if (kept == NULL)
        return;
    if (kept->filled) {
        fake.broken += request->update || kept->bytes != fake.teacher_bytes ||
                       memcmp(kept->rows, &hash, sizeof(hash)) != 0;
        fake.teachers_taken++;
        return;
    }
    fake.broken += request->update || kept->rows != NULL;
    if (fake.teacher_bytes > kept->limit)
        return;
    kept->rows =
        fake.pins ? host_new(backend, fake.teacher_bytes) : claas_alloc(fake.teacher_bytes, 1);
    if (kept->rows == NULL)
        return;
    memcpy(kept->rows, &hash, sizeof(hash));
    kept->bytes = fake.teacher_bytes;
    kept->filled = true;
    fake.teachers_left++;
}

static int train(claas_backend_t *backend, const struct claas_backend_train *request,
                 struct claas_train_result *ret)
{
    int operations, failing;
    bool is_full;

    if (lacks_room())
        request->make_room(request->yield_arg);
    pthread_mutex_lock(&fake.lock);
    is_full = lacks_room();
    fake.trains_refused += is_full;
    pthread_cond_broadcast(&fake.changed);
    operations = fake.train_operations;
    failing = fake.fail_trains;
    fake.fail_trains -= failing > 0;
    backend->left = fake.step_leaves;
    pthread_mutex_unlock(&fake.lock);
    if (is_full)
        return refuse();
    run_teacher(backend, request);
    begin_work(backend);
    for (int i = 0; i < operations; i++) {
        operate(backend);
        if (request->yield != NULL && request->yield(request->yield_arg) != 0) {
            backend->training = false;
            return claas_fail(CLAAS_ERR_CANCELLED, "the step was given up");
        }
    }
    backend->training = false;
    if (failing > 0)
        return claas_fail(CLAAS_ERR_DEVICE, "the training step failed on purpose");
    ret->finite = !fake.report_nonfinite;
    if (request->update && ret->finite)
        update(request);
    ret->row_count = request->row_count;
    ret->rows = CLAAS_NEW_ARRAY(struct claas_train_row_result, request->row_count);
    for (size_t i = 0; i < request->row_count; i++)
        ret->tokens += (int)request->rows[i].row.response_count;
    ret->step = request->rows[0].student != NULL ? request->rows[0].student->step : 0;
    return 0;
}

static void give_back(claas_backend_t *backend)
{
    pthread_mutex_lock(&fake.lock);
    fake.broken += backend->training;
    fake.given_back++;
    backend->left = 0;
    pthread_mutex_unlock(&fake.lock);
}

#define FAKE_OPERATIONS                                                                            \
    .name = "fake", .open = open_fake, .free = free_fake, .describe = describe, .memory = memory,  \
    .adapter_new = new_adapter, .adapter_free = free_adapter, .adapter_bytes = adapter_bytes,      \
    .adapter_upload = upload, .adapter_download = download, .forward = forward, .train = train

const struct claas_backend_ops fake_backend = {FAKE_OPERATIONS};

const struct claas_backend_ops fake_backend_with_memory = {
    FAKE_OPERATIONS,        .adapter_clone = clone_adapter, .host_new = host_new,
    .host_free = host_free, .give_back = give_back,         .cycles = 3,
};
