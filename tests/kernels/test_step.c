/* The promises of the CPU back-end that are about bits: decode, chunked prefill and training agree
 * exactly, whatever shares a pass or a step; two runs and any number of threads agree; save, load
 * and continue equals never having stopped; a step that fails or is given up changes nothing.
 *
 * With CLAAS_TEST_BACKEND=cuda the first is a matter of limits: there the way of a product depends
 * on the number of rows. What is apart by how much is printed. */
#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"
#include "cpu/step.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define LENGTH   75 /* no multiple of a block, of a chunk or of a tile */
#define ADAPTERS 3  /* base, and two of different shape */

static const struct claas_lora_config wide = {.rank = 8, .alpha = 16, .modules = CLAAS_MODULE_ALL};
/* An odd rank, and modules missing from both fused weights. */
static const struct claas_lora_config narrow = {
    .rank = 3,
    .alpha = 6,
    .modules = 1u << CLAAS_MODULE_Q | 1u << CLAAS_MODULE_V | 1u << CLAAS_MODULE_UP |
               1u << CLAAS_MODULE_DOWN,
};
static const struct claas_loss_config forward_kl = {.variant = CLAAS_LOSS_FULL, .is_clip = 2};

static char quantised_path[512];

static const struct variant {
    const char *precision, *cpu;
} variants[] = {{"f32", "ref"}, {"f32", NULL}, {"bf16", "ref"}, {"bf16", NULL}};

/* What decoding, prefill and training may be apart in a log-prob, in nats, where a back-end does
 * not promise the same bits. */
#define F32_APART  2e-5
#define BF16_APART 0.1
#define FEW_ROWS   64  /* of a pass whose rows have their own bits on a GPU, too */
#define FEW_HIDDEN 256 /* of models that this is promised for */

struct bits {
    struct step_fixture f;
    bool exact;   /* the same bits are promised, whatever a pass is made of; only tests ask, so the
                     seam has no word for it */
    bool few;     /* they are promised for passes of up to FEW_ROWS rows of one adapter */
    double limit; /* where they are not */
    double apart; /* the largest difference since `report` */
    claas_backend_adapter_t *adapters[ADAPTERS];
    int32_t tokens[ADAPTERS][LENGTH];
    float scores[ADAPTERS][LENGTH]; /* decoded one by one */
};

static void open_bits(struct bits *b, const char *model, const char *precision, int threads,
                      const char *cpu)
{
    struct claas_adapter_image image;

    *b = (struct bits){0};
    step_open(&b->f, model, precision, threads, cpu);
    b->exact = b->f.ops == &claas_backend_cpu;
    b->few = strcmp(precision, "bf16") == 0 && b->f.config->hidden >= FEW_HIDDEN;
    b->limit = strcmp(precision, "bf16") == 0 ? BF16_APART : F32_APART;
    image = step_image(&b->f, &wide, 11, 0.1f);
    b->adapters[1] = step_adapter(&b->f, &image, CLAAS_ADAPTER_TRAIN);
    claas_adapter_image_done(&image);
    image = step_image(&b->f, &narrow, 12, 0.1f);
    b->adapters[2] = step_adapter(&b->f, &image, CLAAS_ADAPTER_TRAIN);
    claas_adapter_image_done(&image);
    for (int i = 0; i < ADAPTERS; i++)
        step_random_tokens(&b->f, 20 + (uint64_t)i, LENGTH, b->tokens[i]);
}

static void close_bits(struct bits *b)
{
    for (int i = 0; i < ADAPTERS; i++)
        b->f.ops->adapter_free(b->f.backend, &b->adapters[i]);
    step_close(&b->f);
}

static void expect_same(const float *a, const float *b, int count, const char *what, int adapter)
{
    for (int i = 0; i < count; i++)
        if (memcmp(&a[i], &b[i], sizeof(float)) != 0)
            fail_msg("%s, adapter %d, position %d: %.9g, decoded %.9g", what, adapter, i, a[i],
                     b[i]);
}

/* --- decode = prefill = training --- */

/* Against what was decoded one by one: the same bits if `exact`, else within the limit. */
static void expect_near(struct bits *b, const float *got, const float *decoded, int count,
                        const char *what, int adapter, bool exact)
{
    if (exact)
        expect_same(got, decoded, count, what, adapter);
    for (int i = 0; i < count; i++) {
        const double apart = fabs((double)got[i] - (double)decoded[i]);

        if (!(apart <= b->limit))
            fail_msg("%s, adapter %d, position %d: %.9g, decoded %.9g, apart by more than %g nats",
                     what, adapter, i, got[i], decoded[i], b->limit);
        b->apart = fmax(b->apart, apart);
    }
}

static void report(struct bits *b, const char *what)
{
    if (!b->exact)
        print_message("  %s: apart from decoding by %.3g nats at most (goal 0, limit %g)\n", what,
                      b->apart, b->limit);
    b->apart = 0;
}

static void check_chunks(struct bits *b)
{
    static const int chunks[] = {7, 16, 64, LENGTH};
    float scores[LENGTH];

    for (int a = 0; a < ADAPTERS; a++) {
        step_score(&b->f, b->adapters[a], b->tokens[a], LENGTH, 1, 0, b->scores[a]);
        for (size_t i = 0; i < CLAAS_COUNT(chunks); i++) {
            step_score(&b->f, b->adapters[a], b->tokens[a], LENGTH, chunks[i], 20, scores);
            /* an odd rank has another way than decoding's, whatever the rows */
            expect_near(b, scores, b->scores[a], LENGTH - 1, "chunked", a,
                        b->exact || (b->few && chunks[i] <= FEW_ROWS && a != 2));
        }
    }
    report(b, "chunked prefill");
}

/* All three sequences side by side, in pieces of different size, so that packs mix adapters in
 * every way. */
static void check_mixed(struct bits *b)
{
    static const int pieces[][ADAPTERS] = {{1, 1, 1}, {5, 1, 2}, {16, 3, 1}, {30, 30, 30}};
    int32_t blocks[ADAPTERS][8];

    for (int a = 0; a < ADAPTERS; a++)
        for (int i = 0; i < 8; i++)
            blocks[a][i] = 3 * i + a;
    for (size_t p = 0; p < CLAAS_COUNT(pieces); p++) {
        int pos[ADAPTERS] = {0};
        float scores[ADAPTERS][LENGTH];

        for (;;) {
            struct claas_segment segments[ADAPTERS];
            struct claas_sample samples[ADAPTERS * LENGTH] = {0};
            int count = 0, wanted = 0;

            for (int a = 0; a < ADAPTERS; a++) {
                int left = LENGTH - 1 - pos[a];
                int take = left < pieces[p][a] ? left : pieces[p][a];

                if (take == 0)
                    continue;
                segments[count++] = (struct claas_segment){.tokens = b->tokens[a] + pos[a],
                                                           .count = take,
                                                           .pos = pos[a],
                                                           .blocks = blocks[a],
                                                           .adapter = b->adapters[a],
                                                           .wanted = take};
                for (int i = 0; i < take; i++)
                    samples[wanted++].given = b->tokens[a][pos[a] + i + 1];
            }
            if (count == 0)
                break;
            CHECK(b->f.ops->forward(b->f.backend, segments, count, samples));
            wanted = 0;
            for (int a = 0, s = 0; a < ADAPTERS; a++) {
                if (s == count || segments[s].adapter != b->adapters[a])
                    continue;
                for (int i = 0; i < segments[s].count; i++)
                    scores[a][pos[a]++] = samples[wanted++].logprob;
                s++;
            }
        }
        for (int a = 0; a < ADAPTERS; a++)
            expect_near(b, scores[a], b->scores[a], LENGTH - 1, "mixed", a, b->exact);
    }
    report(b, "sequences side by side");
}

/* A row per adapter and split of its tokens into prompt and response; some share their prompt. */
static size_t make_rows(struct bits *b, int first_adapter, struct claas_backend_row *rows)
{
    static const int splits[][2] = {{16, 40}, {16, LENGTH}, {16, 17}, {33, LENGTH}, {5, 6}};
    size_t count = 0;

    for (size_t i = 0; i < CLAAS_COUNT(splits); i++)
        for (int a = first_adapter; a < ADAPTERS; a++) {
            struct claas_backend_row *row = &rows[count++];

            *row = (struct claas_backend_row){.student = b->adapters[a]};
            row->row.student_prompt = b->tokens[a];
            row->row.student_count = (size_t)splits[i][0];
            row->row.teacher_prompt = b->tokens[(a + 1) % ADAPTERS];
            row->row.teacher_count = 20 + i % 2;
            row->row.response = b->tokens[a] + splits[i][0];
            row->row.response_count = (size_t)(splits[i][1] - splits[i][0]);
            row->row.rollout_logprobs = b->scores[a] + splits[i][0] - 1;
        }
    return count;
}

/* Training's log-probs against those decoded, the rollout's. */
static void expect_ratio(struct bits *b, const struct claas_train_result *result, size_t rows,
                         const char *what)
{
    assert_true(result->finite);
    if (!(result->max_ratio_error <= (b->exact ? 0 : b->limit)))
        fail_msg("%s: a log-prob differs by %g, limit %g", what, result->max_ratio_error,
                 b->exact ? 0 : b->limit);
    b->apart = fmax(b->apart, (double)result->max_ratio_error);
    for (size_t i = 0; i < rows; i++)
        if (!(fabs((double)result->rows[i].ratio - 1) <= (b->exact ? 0 : 2 * b->limit)))
            fail_msg("%s: the ratio of row %zu is %.9g", what, i, (double)result->rows[i].ratio);
}

static void check_training(struct bits *b)
{
    struct claas_backend_row rows[5 * ADAPTERS];
    struct claas_adamw_config still = {.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};

    for (int update = 0; update < 2; update++) {
        size_t count = make_rows(b, update, rows);
        struct claas_train_result result =
            step_train(&b->f, rows, count, &forward_kl, &still, update);

        expect_ratio(b, &result, count, update ? "training" : "evaluation");
        free(result.rows);
    }
    report(b, "training");
}

static void decode_prefill_and_training_agree(void **state)
{
    /* the last one is read from its quantised blocks when it decodes */
    const char *const models[] = {"random:tiny-llama", "random:tiny-qwen2-untied",
                                  "random:tiny-qwen3", quantised_path};

    for (size_t m = 0; m < CLAAS_COUNT(models); m++)
        for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
            struct bits b;

            open_bits(&b, models[m], variants[v].precision, 2, variants[v].cpu);
            print_message("%s on %s\n", models[m], b.f.ops->describe(b.f.backend));
            check_chunks(&b);
            check_mixed(&b);
            check_training(&b);
            close_bits(&b);
        }
}

/* The same on a real model: thirty layers, quantised weights read from their blocks when decoding.
 */
static void check_long(struct bits *b)
{
    enum { COUNT = 300, PROMPT = 200 };
    int32_t tokens[COUNT];
    float decoded[COUNT], chunked[COUNT];
    struct claas_backend_row row = {.student = b->adapters[1]};
    struct claas_train_result result;

    step_random_tokens(&b->f, 31, COUNT, tokens);
    step_score(&b->f, b->adapters[1], tokens, COUNT, 1, 0, decoded);
    step_score(&b->f, b->adapters[1], tokens, COUNT, 256, 40, chunked);
    expect_near(b, chunked, decoded, COUNT - 1, "chunked, long", 1, b->exact);
    report(b, "chunked prefill, long");
    row.row = (struct claas_train_row){.student_prompt = tokens,
                                       .student_count = PROMPT,
                                       .response = tokens + PROMPT,
                                       .response_count = COUNT - PROMPT,
                                       .rollout_logprobs = decoded + PROMPT - 1};
    result = step_train(&b->f, &row, 1, &forward_kl, NULL, false);
    expect_ratio(b, &result, 1, "evaluation, long");
    report(b, "evaluation, long");
    free(result.rows);
}

static void the_embedded_model_agrees(void **state)
{
    const char *path = getenv("CLAAS_TEST_MODEL");
    struct bits b;

    if (!path || !*path) {
        print_message("CLAAS_TEST_MODEL is not set\n");
        skip();
    }
    open_bits(&b, path, "bf16", 2, NULL);
    print_message("%s on %s\n", claas_model_name(b.f.model), b.f.ops->describe(b.f.backend));
    check_chunks(&b);
    check_mixed(&b);
    check_training(&b);
    check_long(&b);
    close_bits(&b);
}

struct told {
    uint64_t done, total;
    int calls;
};

static void hear(void *arg, uint64_t done, uint64_t total)
{
    struct told *told = arg;

    assert_int_equal(done == 0, told->calls == 0);
    assert_true(done >= told->done && done <= total);
    *told = (struct told){done, total, told->calls + 1};
}

static void open_and_hear(const char *path, struct told *told)
{
    struct claas_model_options of_model = {.path = path, .chat_template = "chatml"};
    struct claas_backend_options options = {
        .threads = 2, .kv_blocks = 4, .max_tokens = 16, .loading = hear, .loading_arg = told};
    claas_model_t *model = NULL;
    claas_backend_t *backend = NULL;

    assert_int_equal(claas_model_open(&of_model, &model), 0);
    assert_int_equal(step_backend()->open(&options, model, &backend), 0);
    assert_true(told->total == claas_model_weight_bytes(model));
    step_backend()->free(&backend);
    claas_model_free(&model);
}

/* Every byte of a file counts once; a random model has none. */
static void loading_is_heard_of(void **state)
{
    struct told told = {0};

    open_and_hear("random:tiny-llama", &told);
    assert_int_equal(told.calls, 0);
    open_and_hear(quantised_path, &told);
    assert_true(told.calls > 10 && told.done == told.total);
}

static void a_new_adapter_is_the_base_model(void **state)
{
    for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
        struct bits b;
        struct claas_adapter_image image;
        claas_backend_adapter_t *fresh;
        float base[LENGTH], adapted[LENGTH];

        open_bits(&b, "random:tiny-llama", variants[v].precision, 1, variants[v].cpu);
        image = step_image(&b.f, &wide, 5, 0);
        fresh = step_adapter(&b.f, &image, CLAAS_ADAPTER_SERVE);
        step_score(&b.f, NULL, b.tokens[0], LENGTH, 8, 0, base);
        step_score(&b.f, fresh, b.tokens[0], LENGTH, 8, 0, adapted);
        expect_same(adapted, base, LENGTH - 1, "untrained", 0);
        claas_adapter_image_done(&image);
        b.f.ops->adapter_free(b.f.backend, &fresh);
        close_bits(&b);
    }
}

/* --- a teacher that answered before --- */

static struct claas_train_result evaluate(struct bits *b, struct claas_backend_row *rows,
                                          size_t count, struct claas_teacher_kept *kept)
{
    struct claas_backend_train request = {.rows = rows,
                                          .row_count = count,
                                          .loss = {.variant = CLAAS_LOSS_FULL, .kl_weight = 0.1f},
                                          .kept = kept};
    struct claas_train_result result = {0};

    CHECK(b->f.ops->train(b->f.backend, &request, &result));
    assert_true(result.finite);
    return result;
}

static void expect_same_figures(const struct claas_train_result *a,
                                const struct claas_train_result *b)
{
    assert_int_equal(a->tokens, b->tokens);
    assert_int_equal(a->row_count, b->row_count);
    assert_memory_equal(&a->loss, &b->loss, sizeof(a->loss));
    assert_memory_equal(a->rows, b->rows, a->row_count * sizeof(a->rows[0]));
}

/* Computed and not kept, computed and kept, not kept for want of room, and given three times. Some
 * rows share their teacher's prompt, one has no teacher, one is trained in parts. */
static void check_kept_teacher(struct bits *b)
{
    struct claas_teacher_kept kept = {.limit = SIZE_MAX}, none = {.limit = 1};
    struct claas_teacher_kept *const places[] = {&kept, &none, &kept, &kept, &kept};
    struct claas_backend_row rows[5 * ADAPTERS];
    size_t count = make_rows(b, 0, rows);
    uint8_t mask[LENGTH] = {0, 1, 1, 0, 1};
    struct claas_train_result first;

    rows[3].row.teacher_prompt = NULL;
    rows[3].row.teacher_count = 0;
    rows[4].row.mask = mask;
    /* Twice, since a GPU times products when they first come. */
    free(evaluate(b, rows, count, NULL).rows);
    first = evaluate(b, rows, count, NULL);
    for (size_t i = 0; i < CLAAS_COUNT(places); i++) {
        struct claas_train_result result = evaluate(b, rows, count, places[i]);

        expect_same_figures(&result, &first);
        assert_true(kept.filled);
        assert_false(none.filled);
        free(result.rows);
    }
    /* That they are used shows with others in their place. */
    memset(kept.rows, 0, kept.bytes);
    for (int i = 0; i < 2; i++) {
        struct claas_train_result result = evaluate(b, rows, count, i == 0 ? &kept : NULL);

        if (i == 0)
            assert_true(memcmp(&result.rows[0], &first.rows[0], sizeof(first.rows[0])) != 0);
        else
            expect_same_figures(&result, &first);
        free(result.rows);
    }
    free(first.rows);
    if (b->f.ops->host_free)
        b->f.ops->host_free(b->f.backend, kept.rows);
    else
        free(kept.rows);
}

static void a_kept_teacher_is_a_computed_one(void **state)
{
    static const char *const models[] = {"random:tiny-llama", "random:tiny-qwen3"};

    for (size_t m = 0; m < CLAAS_COUNT(models); m++)
        for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
            struct bits b;

            open_bits(&b, models[m], variants[v].precision, 2, variants[v].cpu);
            for (int a = 0; a < ADAPTERS; a++)
                step_score(&b.f, b.adapters[a], b.tokens[a], LENGTH, 1, 0, b.scores[a]);
            check_kept_teacher(&b);
            close_bits(&b);
        }
}

/* --- the same again --- */

/* Adapters after a few steps over rows of both. */
static void run_steps(struct bits *b, int steps, struct claas_adapter_image images[ADAPTERS])
{
    struct claas_backend_row rows[5 * ADAPTERS];
    struct claas_adamw_config adamw = step_adamw(1e-3f);

    for (int i = 0; i < steps; i++) {
        size_t count = make_rows(b, 1, rows);
        struct claas_train_result result =
            step_train(&b->f, rows, count, &forward_kl, &adamw, true);

        assert_true(result.finite);
        free(result.rows);
    }
    for (int a = 1; a < ADAPTERS; a++)
        images[a] = step_download(&b->f, b->adapters[a]);
}

static void done_images(struct claas_adapter_image images[ADAPTERS])
{
    for (int a = 1; a < ADAPTERS; a++)
        claas_adapter_image_done(&images[a]);
}

static void runs_and_thread_counts_agree(void **state)
{
    static const int threads[] = {1, 2, 2, 3};

    for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
        struct claas_adapter_image first[ADAPTERS], again[ADAPTERS];

        for (size_t t = 0; t < CLAAS_COUNT(threads); t++) {
            struct bits b;

            open_bits(&b, "random:tiny-qwen3", variants[v].precision, threads[t], variants[v].cpu);
            run_steps(&b, 2, t == 0 ? first : again);
            for (int a = 1; a < ADAPTERS && t > 0; a++)
                assert_true(step_same_image(&b.f, &first[a], &again[a]));
            if (t > 0)
                done_images(again);
            close_bits(&b);
        }
        done_images(first);
    }
}

/* An adapter's step does not depend on who else is in it: on the CPU, whose products sum a row in
 * the same order however many there are. */
static void together_is_alone(void **state)
{
    if (getenv("CLAAS_TEST_BACKEND"))
        skip();
    for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
        struct claas_backend_row rows[5 * ADAPTERS] = {0}, own[5 * ADAPTERS];
        struct claas_adamw_config adamw = step_adamw(1e-3f);
        struct claas_adapter_image together[ADAPTERS];
        struct bits b;

        open_bits(&b, "random:tiny-llama", variants[v].precision, 2, variants[v].cpu);
        run_steps(&b, 1, together);
        close_bits(&b);
        open_bits(&b, "random:tiny-llama", variants[v].precision, 2, variants[v].cpu);
        for (int a = 1; a < ADAPTERS; a++) {
            size_t all = make_rows(&b, 1, rows), count = 0;
            struct claas_adapter_image alone;

            for (size_t i = 0; i < all; i++)
                if (rows[i].student == b.adapters[a])
                    own[count++] = rows[i];
            free(step_train(&b.f, own, count, &forward_kl, &adamw, true).rows);
            alone = step_download(&b.f, b.adapters[a]);
            assert_true(step_same_image(&b.f, &alone, &together[a]));
            claas_adapter_image_done(&alone);
        }
        done_images(together);
        close_bits(&b);
    }
}

static void saved_and_loaded_goes_on_as_never_stopped(void **state)
{
    for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
        struct claas_adapter_image whole[ADAPTERS], half[ADAPTERS], resumed[ADAPTERS];
        struct bits b;

        open_bits(&b, "random:tiny-qwen2", variants[v].precision, 2, variants[v].cpu);
        run_steps(&b, 4, whole);
        close_bits(&b);
        open_bits(&b, "random:tiny-qwen2", variants[v].precision, 2, variants[v].cpu);
        run_steps(&b, 2, half);
        close_bits(&b);
        open_bits(&b, "random:tiny-qwen2", variants[v].precision, 2, variants[v].cpu);
        for (int a = 1; a < ADAPTERS; a++)
            CHECK(b.f.ops->adapter_upload(b.f.backend, b.adapters[a], &half[a]));
        run_steps(&b, 2, resumed);
        for (int a = 1; a < ADAPTERS; a++) {
            assert_int_equal(resumed[a].step, 4);
            assert_true(step_same_image(&b.f, &whole[a], &resumed[a]));
        }
        close_bits(&b);
        done_images(whole);
        done_images(half);
        done_images(resumed);
    }
}

static bool runs_on_cpu(void)
{
    const char *name = getenv("CLAAS_TEST_BACKEND");

    return name == NULL || strcmp(name, claas_backend_cpu.name) == 0;
}

/* A batch too long to keep its activations computes them twice, to the same bits. The limit is the
 * CPU back-end's own; of the card's, tests/kernels/cuda/test_agree asks the same. */
static void recomputed_activations_change_nothing(void **state)
{
    static const char *const models[] = {"random:tiny-llama", "random:tiny-qwen3-untied"};

    if (!runs_on_cpu())
        skip();
    for (size_t m = 0; m < CLAAS_COUNT(models); m++)
        for (size_t v = 0; v < CLAAS_COUNT(variants); v++) {
            struct claas_adapter_image kept[ADAPTERS], twice[ADAPTERS];
            struct bits b;

            open_bits(&b, models[m], variants[v].precision, 2, variants[v].cpu);
            run_steps(&b, 2, kept);
            close_bits(&b);
            open_bits(&b, models[m], variants[v].precision, 2, variants[v].cpu);
            b.f.backend->saved_limit = 0;
            run_steps(&b, 2, twice);
            for (int a = 1; a < ADAPTERS; a++)
                assert_true(step_same_image(&b.f, &kept[a], &twice[a]));
            close_bits(&b);
            done_images(kept);
            done_images(twice);
        }
}

/* Down and up again, for either use: the same image, the same scores. Of both adapters, since one
 * has an odd rank. */
static void an_image_is_the_same_adapter(void **state)
{
    struct bits b;
    claas_backend_adapter_t *copy, *served;
    struct claas_adapter_image original, copied;
    float scores[3][LENGTH];

    open_bits(&b, "random:tiny-llama", "bf16", 1, NULL);
    for (int a = 1; a < ADAPTERS; a++) {
        original = step_download(&b.f, b.adapters[a]);
        copy = step_adapter(&b.f, &original, CLAAS_ADAPTER_TRAIN);
        served = step_adapter(&b.f, &original, CLAAS_ADAPTER_SERVE);
        copied = step_download(&b.f, copy);
        assert_true(step_same_image(&b.f, &original, &copied));
        step_score(&b.f, b.adapters[a], b.tokens[0], LENGTH, 8, 0, scores[0]);
        step_score(&b.f, copy, b.tokens[0], LENGTH, 8, 0, scores[1]);
        step_score(&b.f, served, b.tokens[0], LENGTH, 8, 0, scores[2]);
        expect_same(scores[1], scores[0], LENGTH - 1, "to train", a);
        expect_same(scores[2], scores[0], LENGTH - 1, "to serve", a);
        assert_int_equal(b.f.ops->adapter_upload(b.f.backend, b.adapters[ADAPTERS - a], &original),
                         CLAAS_ERR_INVALID);
        claas_adapter_image_done(&original);
        claas_adapter_image_done(&copied);
        b.f.ops->adapter_free(b.f.backend, &copy);
        b.f.ops->adapter_free(b.f.backend, &served);
    }
    close_bits(&b);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(decode_prefill_and_training_agree),
        cmocka_unit_test(the_embedded_model_agrees),
        cmocka_unit_test(loading_is_heard_of),
        cmocka_unit_test(a_new_adapter_is_the_base_model),
        cmocka_unit_test(a_kept_teacher_is_a_computed_one),
        cmocka_unit_test(runs_and_thread_counts_agree),
        cmocka_unit_test(together_is_alone),
        cmocka_unit_test(saved_and_loaded_goes_on_as_never_stopped),
        cmocka_unit_test(recomputed_activations_change_nothing),
        cmocka_unit_test(an_image_is_the_same_adapter),
    };

    (void)snprintf(quantised_path, sizeof(quantised_path), "%s/step/quantised.gguf",
                   argc > 1 ? argv[1] : "tests/golden");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
