/* The head's chunks on a CUDA of the test's own that does nothing before it is waited for: what a
 * chunk hands over is still there then, and no chunk waits for the one before it. Needs no card. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "cuda/cuda_train.h"

#define CALLS_MAX 64
#define CHUNK     2

/* --- CUDA: a queue of copies and of what cuda_add_rows was given --- */

struct call {
    void *to;
    const void *from;
    size_t bytes;
    int targets;
    const int32_t *starts, *items, *rows; /* NULL: a copy */
};

static struct {
    struct call calls[CALLS_MAX];
    int count, waits, done; /* done: chunks that were looked at */
    int products, turns;    /* products since the last turn; turns in all */
} stream;

static const int32_t scored_tail[] = {3, 1, 3, 0, 2, 2, 1, 0};
static const int32_t scored_index[] = {0, 1, 2, 4, 5, 7, 9, 10};
static const int firsts[] = {0, 2, 3, 5, 6}, counts[] = {2, 1, 2, 1, 2};

/* Each row of the chunk goes where its position lies, those of one tail row in their order. */
static void look_at(const struct call *call)
{
    const int32_t *rows = scored_tail + firsts[stream.done];
    int count = counts[stream.done++], listed = 0;

    assert_int_equal(call->starts[0], 0);
    assert_int_equal(call->starts[call->targets], count);
    for (int t = 0; t < call->targets; t++)
        for (int i = call->starts[t]; i < call->starts[t + 1]; i++, listed++) {
            assert_int_equal(call->rows[call->items[i]], rows[call->items[i]]);
            assert_int_equal(rows[call->items[i]], rows[call->items[call->starts[t]]]);
            assert_true(i == call->starts[t] || call->items[i] > call->items[i - 1]);
        }
    assert_int_equal(listed, count);
}

static void run_all(void)
{
    for (int i = 0; i < stream.count; i++) {
        const struct call *call = &stream.calls[i];

        if (call->starts)
            look_at(call);
        else
            memcpy(call->to, call->from, call->bytes);
    }
    stream.count = 0;
}

static void put(struct call call)
{
    assert_true(stream.count < CALLS_MAX);
    stream.calls[stream.count++] = call;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t on)
{
    (void)kind, (void)on;
    put((struct call){.to = to, .from = from, .bytes = bytes});
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t on)
{
    (void)to, (void)value, (void)bytes, (void)on;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    (void)event, (void)flags;
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on)
{
    (void)event, (void)on;
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    (void)event;
    stream.waits++;
    run_all();
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *base)
{
    free(base);
    return cudaSuccess;
}

/* --- the other files --- */

int cuda_check(struct cuda_context *context, cudaError_t code, const char *what)
{
    (void)context, (void)what;
    return code == cudaSuccess ? 0 : CLAAS_ERR_DEVICE;
}

int cuda_pin(struct cuda_context *context, void **ret, size_t bytes, const char *what)
{
    (void)context, (void)what;
    *ret = calloc(bytes, 1);
    return *ret ? 0 : CLAAS_ERR_OVERLOADED;
}

int cuda_region_new(struct cuda_context *context, struct cuda_region *region, size_t bytes,
                    const char *what)
{
    (void)context, (void)what;
    *region = (struct cuda_region){.base = calloc(bytes, 1), .bytes = bytes};
    return region->base ? 0 : CLAAS_ERR_NO_MEMORY;
}

void cuda_region_done(struct cuda_context *context, struct cuda_region *region)
{
    (void)context;
    free(region->base);
}

int cuda_add_rows(struct cuda_context *context, int targets, int n, const int32_t *starts,
                  const int32_t *items, const int32_t *rows, const float *in, float *out)
{
    (void)context, (void)n, (void)in, (void)out;
    put((struct call){.targets = targets, .starts = starts, .items = items, .rows = rows});
    return 0;
}

int cuda_gather(struct cuda_context *context, int count, int n, const void *in, const int32_t *rows,
                void *out)
{
    (void)context, (void)count, (void)n, (void)in, (void)rows, (void)out;
    return 0;
}

int cuda_rmsnorm(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                 float eps, void *y, float *rstd)
{
    (void)context, (void)m, (void)n, (void)x, (void)weight, (void)eps, (void)y, (void)rstd;
    return 0;
}

int cuda_rmsnorm_bwd(struct cuda_context *context, int m, int n, const void *x, const float *weight,
                     const float *rstd, const void *dy, float *dx, void *dx_act)
{
    (void)context, (void)m, (void)n, (void)x, (void)weight, (void)rstd, (void)dy, (void)dx;
    (void)dx_act;
    return 0;
}

/* A product may be timed first, so chats must have had their turn since the last one. */
static void note_product(void)
{
    assert_int_equal(stream.products++, 0);
}

int cuda_logits(claas_backend_t *backend, int m, const void *x, float *logits)
{
    (void)backend, (void)m, (void)x, (void)logits;
    note_product();
    return 0;
}

int cuda_loss(struct cuda_context *context, const struct claas_loss_config *config, int vocab,
              int rows, const float *student, const float *teacher,
              const struct cuda_loss_position *positions, void *dlogits,
              struct claas_loss_result *results)
{
    (void)context, (void)config, (void)vocab, (void)rows, (void)student, (void)teacher;
    (void)positions, (void)dlogits, (void)results;
    return 0;
}

int cuda_logprobs(struct cuda_context *context, int vocab, int rows, const float *logits,
                  const int32_t *tokens, float *out)
{
    (void)context, (void)vocab, (void)rows, (void)logits, (void)tokens, (void)out;
    return 0;
}

int cuda_gemm(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    (void)context, (void)gemm;
    note_product();
    return 0;
}

int cuda_turn(const struct cuda_pass *pass)
{
    (void)pass;
    stream.products = 0;
    stream.turns++;
    return 0;
}

int cuda_yield(const struct cuda_pass *pass)
{
    return cuda_turn(pass);
}

struct cuda_lora_group cuda_lora_group(const struct cuda_adapter *adapter, float *grad, int first,
                                       int count)
{
    (void)adapter, (void)grad, (void)first, (void)count;
    return (struct cuda_lora_group){0};
}

int cuda_lora_tiles(const struct cuda_lora_group *groups, int count, int tile_rows,
                    struct cuda_lora_tile *tiles)
{
    (void)groups, (void)count, (void)tile_rows, (void)tiles;
    return 0;
}

struct cuda_lora_rows cuda_lora_rows(const struct cuda_lora_group *groups, int count, int m,
                                     int tile_rows, int tiles)
{
    (void)groups, (void)count, (void)m, (void)tile_rows, (void)tiles;
    return (struct cuda_lora_rows){0};
}

int cuda_attention_part_border(int position)
{
    return position;
}

/* --- the test --- */

static void test_chunks(void **state)
{
    const int positions = (int)(sizeof(scored_tail) / sizeof(scored_tail[0]));
    static claas_backend_t backend;
    struct cuda_upload *upload = &backend.chunk_upload;
    struct cuda_acts saved = {0};
    struct claas_backend_train request = {.update = true};
    struct claas_plan_batch plan = {.tail_count = 4,
                                    .scored_count = positions,
                                    .scored_tail = (int32_t *)scored_tail,
                                    .scored_index = (int32_t *)scored_index};
    struct cuda_batch batch = {.plan = &plan};
    struct cuda_step step = {.backend = &backend, .plan.request = &request};

    (void)state;
    backend.model.config = (struct claas_model_config){.layers = 1, .hidden = 8, .vocab = 8};
    step.space.saved = &saved;
    step.space.chunk = CHUNK;
    assert_int_equal(
        cuda_upload_new(&backend.context, upload, cuda_head_bytes(positions), "chunks"), 0);
    for (int run = 0; run < 2; run++) { /* the second step begins when the first one is done */
        assert_int_equal(cuda_upload_begin(&backend.context, upload), 0);
        stream.waits = stream.done = stream.turns = 0;
        assert_int_equal(cuda_head(&step, &batch, true), 0);
        assert_int_equal(stream.waits, 0);
        assert_int_equal(stream.turns, 4 * sizeof(firsts) / sizeof(firsts[0]));
        run_all();
        assert_int_equal(stream.done, sizeof(firsts) / sizeof(firsts[0]));
    }
    cuda_upload_done(&backend.context, upload);
}

/* As many chunks as there are positions have room, and one for all of them. */
static void test_bytes(void **state)
{
    (void)state;
    for (int count = 1; count < 40; count++) {
        size_t each = (((size_t)count + 1) * sizeof(int32_t) + 15) / 16 * 16;

        assert_true(3 * each <= cuda_head_bytes(count));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chunks),
        cmocka_unit_test(test_bytes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
