/* The memory of a training step on a card of the test's own, which counts bytes and has none: which
 * batches keep their activations, what is tried when there is no room, how the region grows, what
 * lies where something else did. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "claas/mem.h"
#include "cuda/cuda_train.h"

#define LAYERS      4
#define HIDDEN      8
#define LAYER_BYTES 1000 /* of a token's activations in one layer, without its output */
#define TOKEN_BYTES (LAYERS * (LAYER_BYTES + 2 * HIDDEN))

/* --- the card --- */

static struct {
    size_t bytes, others; /* all there is; what other processes hold */
    int taken, refused, swept;
    int pass_rows;       /* of the pass that was placed last */
    enum cuda_keep keep; /* of the activations that were placed last */
    size_t hot;          /* bytes that make_room lets go */
} card;

int cuda_memory_free(struct cuda_context *context, size_t *ret)
{
    *ret = card.bytes - card.others - context->bytes;
    return 0;
}

int cuda_region_new(struct cuda_context *context, struct cuda_region *region, size_t bytes,
                    const char *what)
{
    size_t available = 0;

    (void)what;
    *region = (struct cuda_region){0};
    assert_int_equal(cuda_memory_free(context, &available), 0);
    if (bytes > available) {
        card.refused++;
        return CLAAS_ERR_NO_MEMORY;
    }
    card.taken++;
    context->bytes += bytes;
    *region = (struct cuda_region){.base = &card, .bytes = bytes};
    return 0;
}

void cuda_region_done(struct cuda_context *context, struct cuda_region *region)
{
    context->bytes -= region->bytes;
    *region = (struct cuda_region){0};
}

void *cuda_take(struct cuda_arena *arena, size_t bytes)
{
    arena->used += bytes;
    return arena->base;
}

/* --- the model: activations are all that counts --- */

void cuda_place_pass(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                     struct cuda_pass *pass)
{
    (void)backend, (void)arena, (void)pass;
    card.pass_rows = m;
}

struct cuda_acts cuda_place_acts(const claas_backend_t *backend, struct cuda_arena *arena, int m,
                                 const int lds[CUDA_WEIGHTS], enum cuda_keep keep)
{
    (void)backend, (void)lds;
    card.keep = keep;
    (void)cuda_take(arena, (size_t)m * LAYER_BYTES);
    return (struct cuda_acts){0};
}

void cuda_place_infer(const claas_backend_t *backend, struct cuda_arena *arena, int m, int tail,
                      const struct cuda_pass *pass, struct cuda_infer *infer)
{
    (void)backend, (void)arena, (void)m, (void)tail, (void)pass, (void)infer;
}

/* --- a step --- */

static claas_backend_t backend;

static void make_room(void *arg)
{
    (void)arg;
    card.swept++;
    backend.context.bytes -= card.hot;
    card.hot = 0;
}

struct rig {
    struct cuda_step step;
    struct claas_plan_batch batch;
    struct claas_backend_train request;
    struct cuda_acts saved[LAYERS];
};

/* A step with one batch of so many tokens. */
static void rig_open(struct rig *rig, int m)
{
    struct cuda_train_tokens tokens = {0};

    *rig = (struct rig){.request = {.update = true, .make_room = make_room}};
    rig->batch.pack.m = m;
    rig->step.backend = &backend;
    rig->step.saved = rig->saved;
    rig->step.plan.request = &rig->request;
    rig->step.plan.student.batches = &rig->batch;
    rig->step.plan.student.batch_count = 1;
    assert_int_equal(cuda_train_tokens(&backend, 0, &tokens), 0);
    rig->step.kept_tokens = tokens.kept;
}

static int reserve(struct rig *rig)
{
    int code = cuda_space_reserve(&rig->step);

    if (code >= 0)
        cuda_space_enter(&rig->step, CUDA_STAGE_STUDENT);
    return code;
}

static int set_up(void **state)
{
    (void)state;
    memset(&card, 0, sizeof(card));
    memset(&backend, 0, sizeof(backend));
    backend.context.act_bytes = 2;
    backend.model.config = (struct claas_model_config){
        .layers = LAYERS, .hidden = HIDDEN, .vocab = 64, .heads = 1, .intermediate = 1};
    return 0;
}

static struct cuda_train_tokens tokens_of(size_t free_bytes, size_t gradients)
{
    struct cuda_train_tokens tokens = {0};

    card.bytes = free_bytes;
    assert_int_equal(cuda_train_tokens(&backend, gradients, &tokens), 0);
    return tokens;
}

/* Batches end at few places, and no sooner than at 1,024 tokens; what is kept has no such steps. */
static void test_tokens(void **state)
{
    static const int tokens[][2] = {
        {0, 1024},      {1500, 1024},   {1600, 1536},     {2100, 2048},  {3000, 2048},
        {3100, 3072},   {4200, 4096},   {7000, 6144},     {12000, 8192}, {12500, 12288},
        {16000, 12288}, {17000, 16384}, {1 << 20, 16384},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++) {
        size_t bytes = (size_t)((double)tokens[i][0] * TOKEN_BYTES / 0.6);
        struct cuda_train_tokens found = tokens_of(bytes, 0);

        assert_int_equal(found.batch, tokens[i][1]);
        assert_in_range(found.kept, tokens[i][0] / 100 * 99, tokens[i][0]);
        found = tokens_of(bytes + 500, 500);
        assert_int_equal(found.batch, tokens[i][1]);
    }
    assert_int_equal(tokens_of(1000, 5000).kept, 0);
}

/* The memory that others hold is not free; the last step's own is. */
static void test_others(void **state)
{
    int alone = tokens_of((size_t)10000 * TOKEN_BYTES, 0).kept;

    (void)state;
    card.others = card.bytes / 2;
    assert_in_range(tokens_of(card.bytes, 0).kept, alone / 2 - 1, alone / 2 + 1);
    backend.step.bytes = backend.context.bytes = card.bytes / 4;
    assert_in_range(tokens_of(card.bytes, 0).kept, alone / 2 - 1, alone / 2 + 1);
}

/* A small batch on a full card computes its layers twice. */
static void test_small_batch(void **state)
{
    struct rig rig;

    (void)state;
    card.bytes = (size_t)1000 * TOKEN_BYTES;
    rig_open(&rig, 500);
    assert_int_equal(reserve(&rig), 0);
    assert_false(rig.step.space.recompute);
    set_up(NULL);
    card.bytes = (size_t)400 * TOKEN_BYTES;
    rig_open(&rig, 500);
    assert_int_equal(reserve(&rig), 0);
    assert_true(rig.step.space.recompute);
    assert_int_equal(card.refused, 0);
}

/* The room was there when the step was planned and is gone: saved copies go, then the layers are
 * computed twice, and only then is it too much. */
static void test_no_room(void **state)
{
    struct rig rig;

    (void)state;
    card.bytes = (size_t)1000 * TOKEN_BYTES;
    rig_open(&rig, 500);
    card.others = (size_t)600 * TOKEN_BYTES;
    assert_int_equal(reserve(&rig), 0);
    assert_true(rig.step.space.recompute);
    assert_int_equal(card.swept, 1);
    assert_int_equal(card.refused, 2);
    assert_int_equal(card.taken, 1);
    set_up(NULL);
    card.bytes = (size_t)1000 * TOKEN_BYTES;
    rig_open(&rig, 500);
    backend.context.bytes = card.hot = (size_t)600 * TOKEN_BYTES;
    assert_int_equal(reserve(&rig), 0);
    assert_false(rig.step.space.recompute);
    assert_int_equal(card.swept, 1);
    set_up(NULL);
    card.bytes = (size_t)1000 * TOKEN_BYTES;
    backend.context.bytes = card.hot = (size_t)600 * TOKEN_BYTES;
    rig_open(&rig, 500); /* planned with the copies there */
    assert_int_equal(reserve(&rig), 0);
    assert_false(rig.step.space.recompute);
    assert_int_equal(card.swept, 1);
    set_up(NULL);
    card.bytes = (size_t)1000 * TOKEN_BYTES;
    rig_open(&rig, 500);
    card.others = card.bytes;
    assert_int_equal(reserve(&rig), CLAAS_ERR_NO_MEMORY);
}

/* Student's and teacher's rows in one batch: both are kept, and what norms gave. Where the room is
 * gone meanwhile, they go one after the other; where more is gone, the student's are computed
 * twice, but not before saved copies went. */
static void test_joint(void **state)
{
    struct claas_plan_batch teacher = {.pack.m = 600};
    struct rig rig;
    size_t alone;

    (void)state;
    for (int gone = 0; gone < 3; gone++) {
        set_up(NULL);
        card.bytes = (size_t)3000 * TOKEN_BYTES;
        rig_open(&rig, 500);
        assert_int_equal(reserve(&rig), 0);
        alone = backend.step.bytes;
        cuda_region_done(&backend.context, &backend.step);
        rig.step.plan.teacher = (struct claas_plan_side){.batches = &teacher, .batch_count = 1};
        rig.step.plan.joint = (struct claas_plan_side){
            .batches = CLAAS_NEW_ARRAY(struct claas_plan_batch, 1), .batch_count = 1};
        assert_non_null(rig.step.plan.joint.batches);
        rig.step.plan.joint.batches[0].pack.m = 500 + 600;
        rig.step.plan.joint.batches[0].tail_count = 70;
        card.others = (size_t)(gone == 0 ? 0 : gone == 1 ? 2300 : 2600) * TOKEN_BYTES;
        assert_int_equal(reserve(&rig), 0);
        assert_int_equal(rig.step.space.recompute, gone == 2);
        assert_int_equal(rig.step.plan.joint.batch_count, gone == 0);
        assert_int_equal(card.pass_rows, gone == 0 ? 500 + 600 : 500);
        assert_int_equal(card.keep, gone == 0 ? CUDA_KEEP_ALL : CUDA_KEEP_LEAST);
        assert_int_equal(card.swept, gone == 2);
        if (gone == 0) /* a tail row: what the last layer's second half reads, and its final norm */
            assert_true(backend.step.bytes >=
                        alone + (size_t)600 * TOKEN_BYTES + (size_t)70 * 2 * 2 * HIDDEN);
        claas_plan_part(&rig.step.plan);
    }
}

/* A step that is a little longer takes a quarter more than the last one had, where there is plenty;
 * what was taken serves the shorter ones. */
static void test_growth(void **state)
{
    struct rig rig;
    size_t first;

    (void)state;
    card.bytes = (size_t)10000 * TOKEN_BYTES;
    rig_open(&rig, 500);
    assert_int_equal(reserve(&rig), 0);
    first = backend.step.bytes;
    rig_open(&rig, 510);
    assert_int_equal(reserve(&rig), 0);
    assert_int_equal(backend.step.bytes, first + first / 4);
    rig_open(&rig, 600);
    assert_int_equal(reserve(&rig), 0);
    rig_open(&rig, 100);
    assert_int_equal(reserve(&rig), 0);
    assert_int_equal(card.taken, 2);
    rig_open(&rig, 2000);
    assert_int_equal(reserve(&rig), 0);
    assert_in_range(backend.step.bytes, 3.9 * first, 4 * first);
    card.others = (size_t)7000 * TOKEN_BYTES; /* and no more than needed where there is not */
    rig_open(&rig, 2010);
    rig.step.kept_tokens = 2010;
    assert_int_equal(reserve(&rig), 0);
    assert_in_range(backend.step.bytes, 3.9 * first, 4.1 * first);
    assert_int_equal(card.refused, 0);
}

/* With plenty of memory a step takes twice what it needs, so that longer ones find room. */
static void test_spare(void **state)
{
    struct rig rig;

    (void)state;
    card.bytes = (size_t)100000 * TOKEN_BYTES;
    for (int m = 500; m < 1000; m += 99) {
        rig_open(&rig, m);
        assert_int_equal(reserve(&rig), 0);
    }
    assert_int_equal(card.taken, 1);
    rig_open(&rig, 1010);
    assert_int_equal(reserve(&rig), 0);
    assert_int_equal(card.taken, 2);
    assert_true(backend.step.bytes >= (size_t)2020 * TOKEN_BYTES);
}

/* The bytes of a step of 500 tokens, without the spare ones. */
static size_t bytes_of(int positions, int intermediate)
{
    const size_t gib = (size_t)1 << 30;
    struct rig rig;

    set_up(NULL);
    card.bytes = (size_t)1 << 40;
    backend.model.config.vocab = 151936;
    backend.model.config.intermediate = intermediate;
    rig_open(&rig, 500);
    rig.step.plan.position_count = rig.batch.scored_count = positions;
    assert_int_equal(reserve(&rig), 0);
    if (positions == 2048)
        assert_int_equal(rig.step.space.chunk, 768); /* 768 and 512, not 883 and 282 */
    if (positions == 883)
        assert_int_equal(rig.step.space.chunk, 883);
    return backend.step.bytes / 2 <= gib ? backend.step.bytes / 2 : backend.step.bytes - gib;
}

/* The head's buffers lie where those of the layers do: the larger of the two counts. */
static void test_head(void **state)
{
    const size_t kept = 2 * HIDDEN + sizeof(float) + sizeof(struct cuda_loss_position) +
                        sizeof(struct claas_loss_result);
    const size_t head = (size_t)768 * 151936 * (4 + 4 + 2);

    (void)state;
    assert_int_equal(bytes_of(2048, 1 << 20) - bytes_of(0, 1 << 20), 2048 * kept);
    assert_in_range(bytes_of(2048, 1) - bytes_of(0, 1), head, head + head / 100);
    assert_true(bytes_of(883, 1) > bytes_of(2048, 1));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_tokens, set_up),
        cmocka_unit_test_setup(test_others, set_up),
        cmocka_unit_test_setup(test_small_batch, set_up),
        cmocka_unit_test_setup(test_no_room, set_up),
        cmocka_unit_test_setup(test_joint, set_up),
        cmocka_unit_test_setup(test_growth, set_up),
        cmocka_unit_test_setup(test_spare, set_up),
        cmocka_unit_test_setup(test_head, set_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
