/* The device object on the real CPU back-end and a tiny random model: the same tokens whatever runs
 * beside a request, the importance ratio exactly 1, a loss that falls, and save + load = never
 * stopped, all bit for bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "claas/device.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

#define WAIT_MS 120000
#define ANSWER  24

struct rig {
    claas_model_t *model;
    claas_device_t *device;
    claas_device_client_t *client;
};

static struct rig rig_open(const char *precision, struct claas_device_options options)
{
    struct claas_model_options model = {.path = "random:tiny-llama"};
    struct rig rig = {0};

    options.precision = precision;
    options.threads = 2;
    assert_int_equal(claas_model_open(&model, &rig.model), 0);
    if (claas_device_open(&options, rig.model, &rig.device) < 0)
        fail_msg("%s", claas_error_text());
    assert_int_equal(claas_device_client_new(rig.device, &rig.client), 0);
    return rig;
}

static void rig_close(struct rig *rig)
{
    claas_device_client_free(&rig->client);
    claas_device_free(&rig->device);
    claas_model_free(&rig->model);
}

static struct claas_device_event wait_for(struct rig *rig, enum claas_device_event_kind kind)
{
    struct claas_device_event event;

    do
        assert_int_equal(claas_device_client_wait(rig->client, WAIT_MS, &event), 1);
    while (event.kind == CLAAS_EVENT_TOKEN && kind != CLAAS_EVENT_TOKEN);
    if (event.kind == CLAAS_EVENT_FAILED)
        fail_msg("%s", event.text);
    assert_int_equal(event.kind, kind);
    return event;
}

static claas_adapter_t *adapter_new(struct rig *rig)
{
    struct claas_lora_config lora = {.rank = 8, .alpha = 16, .modules = CLAAS_MODULE_ALL};
    uint64_t id;

    assert_int_equal(claas_device_adapter_init(rig->client, &lora, 5, CLAAS_ADAPTER_TRAIN, &id), 0);
    return wait_for(rig, CLAAS_EVENT_ADAPTER).adapter;
}

/* --- generation
 * -----------------------------------------------------------------------------------------------------
 */

struct answer {
    int32_t prompt[400];
    int prompt_count;
    uint64_t id;
    int count;
    int32_t tokens[ANSWER];
    float logprobs[ANSWER];
    bool ended;
};

static void ask(struct rig *rig, struct answer *answer, int number, claas_adapter_t *adapter)
{
    struct claas_generate_request request = {
        .prompt = answer->prompt,
        .adapter = adapter,
        .max_tokens = ANSWER,
        .temperature = number % 4 == 0 ? 0.0f : 0.9f,
        .top_p = number % 3 == 0 ? 0.8f : 1.0f,
        .top_k = number % 5 == 0 ? 40 : 0,
        .seed = (uint64_t)number,
        .priority = number % 2 == 0 ? CLAAS_PRIORITY_CHAT : CLAAS_PRIORITY_ROLLOUT,
    };

    memset(answer, 0, sizeof(*answer));
    answer->prompt_count = 3 + (number * 37) % 390;
    for (int i = 0; i < answer->prompt_count; i++)
        answer->prompt[i] = (i * 13 + (i > 100 ? number : 0)) % 300;
    request.prompt_count = (size_t)answer->prompt_count;
    assert_int_equal(claas_device_generate(rig->client, &request, &answer->id), 0);
}

static void collect(struct rig *rig, struct answer *answers, int count)
{
    for (int left = count; left > 0;) {
        struct claas_device_event event;
        int i = 0;

        assert_int_equal(claas_device_client_wait(rig->client, WAIT_MS, &event), 1);
        while (i < count && answers[i].id != event.id)
            i++;
        if (i == count) { /* training beside it */
            claas_device_event_done(&event);
            continue;
        }
        if (event.kind == CLAAS_EVENT_TOKEN) {
            answers[i].tokens[answers[i].count] = event.token;
            answers[i].logprobs[answers[i].count++] = event.logprob;
        } else {
            assert_int_equal(event.kind, CLAAS_EVENT_FINISHED);
            answers[i].ended = true;
            left--;
        }
    }
}

static void assert_same(const struct answer *a, const struct answer *b)
{
    assert_int_equal(a->count, ANSWER);
    assert_int_equal(b->count, ANSWER);
    assert_memory_equal(a->tokens, b->tokens, sizeof(a->tokens));
    assert_memory_equal(a->logprobs, b->logprobs, sizeof(a->logprobs));
}

/* --- training
 * -----------------------------------------------------------------------------------------------------------
 */

static uint64_t step(struct rig *rig, claas_adapter_t *adapter, const struct answer *answer,
                     bool update)
{
    struct claas_train_row rows[2] = {{
        .student_prompt = answer->prompt,
        .student_count = (size_t)answer->prompt_count,
        .teacher_prompt = answer->prompt + 2,
        .teacher_count = (size_t)answer->prompt_count - 2,
        .response = answer->tokens,
        .response_count = ANSWER,
        .rollout_logprobs = answer->logprobs,
        .student = adapter,
    }};
    struct claas_train_request request = {
        .rows = rows,
        .row_count = 2,
        .loss = {.variant = CLAAS_LOSS_FULL, .is_clip = 2},
        .adamw = {.rate = 1e-2f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1},
        .update = update,
    };
    uint64_t id;

    rows[1] = rows[0];
    rows[1].response_count = ANSWER / 2;
    assert_int_equal(claas_device_train(rig->client, &request, &id), 0);
    return id;
}

static struct claas_train_result finish_step(struct rig *rig)
{
    struct claas_device_event event = wait_for(rig, CLAAS_EVENT_TRAINED);
    struct claas_train_result result = event.trained;

    assert_true(result.finite);
    assert_int_equal(result.row_count, 2);
    assert_int_equal(result.rows[0].tokens, ANSWER);
    claas_device_event_done(&event);
    return result;
}

static void check_alone_and_together(const char *precision)
{
    enum { N = 10 };
    static struct answer alone[N], together[N];
    struct rig rig = rig_open(precision, (struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig), *busy = adapter_new(&rig);

    ask(&rig, &alone[0], 0, adapter);
    collect(&rig, alone, 1);
    for (int i = 0; i < 3; i++) {
        step(&rig, adapter, &alone[0], true);
        finish_step(&rig);
    }
    for (int i = 0; i < N; i++) {
        ask(&rig, &alone[i], i, i % 3 == 0 ? adapter : NULL);
        collect(&rig, &alone[i], 1);
    }
    /* The importance ratio of what was just sampled is exactly 1, in both kinds of prompts. */
    for (int i = 0; i < N; i += 3) {
        step(&rig, adapter, &alone[i], false);
        assert_true(finish_step(&rig).max_ratio_error == 0);
    }
    for (int i = 0; i < N; i++)
        ask(&rig, &together[i], i, i % 3 == 0 ? adapter : NULL);
    for (int i = 0; i < 4; i++)
        step(&rig, busy, &alone[1], true);
    collect(&rig, together, N);
    for (int i = 0; i < N; i++)
        assert_same(&alone[i], &together[i]);
    claas_adapter_unref(&busy);
    /* In a device of little room: small chunks, few blocks, hence preemption. */
    char directory[] = "/tmp/claas-device-XXXXXX", path[64];
    uint64_t id;

    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/a", directory);
    assert_int_equal(claas_device_adapter_save(rig.client, adapter, path, &id), 0);
    do {
        struct claas_device_event event;

        assert_int_equal(claas_device_client_wait(rig.client, WAIT_MS, &event), 1);
        claas_device_event_done(&event);
        if (event.id == id) {
            assert_int_equal(event.kind, CLAAS_EVENT_SAVED);
            break;
        }
    } while (true);
    claas_adapter_unref(&adapter);
    rig_close(&rig);
    rig = rig_open(precision, (struct claas_device_options){
                                  .kv_tokens = 640, .prefill_chunk = 48, .max_batch = 5});
    assert_int_equal(claas_device_adapter_load(rig.client, path, CLAAS_ADAPTER_SERVE, &id), 0);
    adapter = wait_for(&rig, CLAAS_EVENT_ADAPTER).adapter;
    for (int i = 0; i < N; i++)
        ask(&rig, &together[i], i, i % 3 == 0 ? adapter : NULL);
    collect(&rig, together, N);
    for (int i = 0; i < N; i++)
        assert_same(&alone[i], &together[i]);
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(directory), 0);
    rig_close(&rig);
}

static void test_alone_and_together_bf16(void **state)
{
    check_alone_and_together("bf16");
}

static void test_alone_and_together_f32(void **state)
{
    check_alone_and_together("f32");
}

static void test_loss_falls(void **state)
{
    struct rig rig = rig_open("bf16", (struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig);
    static struct answer answer;
    float first, last;
    uint64_t id;

    ask(&rig, &answer, 3, NULL);
    collect(&rig, &answer, 1);
    id = step(&rig, adapter, &answer, false);
    first = finish_step(&rig).loss;
    assert_true(first > 0);
    for (int i = 0; i < 10; i++) {
        step(&rig, adapter, &answer, true);
        assert_int_equal(finish_step(&rig).step, i + 1);
    }
    assert_true(step(&rig, adapter, &answer, false) > id);
    last = finish_step(&rig).loss;
    assert_true(last < 0.7f * first);
    claas_adapter_unref(&adapter);
    rig_close(&rig);
}

/* The gate's way: an evaluation of the same texts after each step. The first device evaluates after
 * every step, so that all but the first time the teacher's rows are those of before; the second one
 * after the last step alone. */
static void test_teacher_is_kept(void **state)
{
    enum { STEPS = 3 };
    static struct answer answer;
    struct claas_train_row_result rows[2][2];
    struct claas_device_stats stats;

    for (int device = 0; device < 2; device++) {
        struct rig rig = rig_open("bf16", (struct claas_device_options){0});
        claas_adapter_t *adapter = adapter_new(&rig);
        struct claas_device_event event;

        ask(&rig, &answer, 3, NULL);
        collect(&rig, &answer, 1);
        for (int i = 1; i <= STEPS; i++) {
            step(&rig, adapter, &answer, true);
            finish_step(&rig);
            if (device == 1 && i < STEPS)
                continue;
            step(&rig, adapter, &answer, false);
            event = wait_for(&rig, CLAAS_EVENT_TRAINED);
            memcpy(rows[device], event.trained.rows, sizeof(rows[device]));
            claas_device_event_done(&event);
        }
        claas_device_stats(rig.device, &stats);
        assert_int_equal(stats.teacher_missed, 1);
        assert_int_equal(stats.teacher_found, device == 0 ? STEPS - 1 : 0);
        claas_adapter_unref(&adapter);
        rig_close(&rig);
    }
    assert_true(rows[0][0].forward_kl > 0);
    assert_memory_equal(rows[0], rows[1], sizeof(rows[0]));
}

/* Ten steps at once, and ten steps with a save, a load in another device and a copy between them.
 */
static void test_continue(void **state)
{
    struct rig rig = rig_open("bf16", (struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig), *copy;
    char directory[] = "/tmp/claas-device-XXXXXX", path[64], kept[64];
    struct claas_train_result whole[10], part;
    static struct answer answer;
    uint64_t id;

    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/a", directory);
    snprintf(kept, sizeof(kept), "%s/b", directory);
    ask(&rig, &answer, 3, NULL);
    collect(&rig, &answer, 1);
    for (int i = 0; i < 10; i++) {
        if (i == 4) {
            assert_int_equal(claas_device_adapter_save(rig.client, adapter, path, &id), 0);
            wait_for(&rig, CLAAS_EVENT_SAVED);
        }
        step(&rig, adapter, &answer, true);
        whole[i] = finish_step(&rig);
    }
    claas_adapter_unref(&adapter);
    rig_close(&rig);
    rig = rig_open("bf16", (struct claas_device_options){0});
    assert_int_equal(claas_device_adapter_load(rig.client, path, CLAAS_ADAPTER_TRAIN, &id), 0);
    adapter = wait_for(&rig, CLAAS_EVENT_ADAPTER).adapter;
    for (int i = 4; i < 10; i++) {
        if (i == 7) { /* a kept copy is as good as a save of the adapter itself */
            assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
            copy = wait_for(&rig, CLAAS_EVENT_ADAPTER).adapter;
            claas_adapter_unref(&adapter);
            assert_int_equal(claas_device_adapter_save(rig.client, copy, kept, &id), 0);
            wait_for(&rig, CLAAS_EVENT_SAVED);
            claas_adapter_unref(&copy);
            assert_int_equal(claas_device_adapter_load(rig.client, kept, CLAAS_ADAPTER_TRAIN, &id),
                             0);
            adapter = wait_for(&rig, CLAAS_EVENT_ADAPTER).adapter;
        }
        step(&rig, adapter, &answer, true);
        part = finish_step(&rig);
        assert_int_equal(part.step, i + 1);
        assert_memory_equal(&part.loss, &whole[i].loss, sizeof(float));
        assert_memory_equal(&part.grad_norm, &whole[i].grad_norm, sizeof(float));
    }
    claas_adapter_unref(&adapter);
    assert_int_equal(claas_remove_all(directory), 0);
    rig_close(&rig);
}

static void test_open_errors(void **state)
{
    struct claas_model_options model = {.path = "random:tiny-llama"};
    struct claas_device_options bad[] = {
        {.device = "abacus"}, {.precision = "f8"}, {.threads = -1}, {.prefill_chunk = -5}};
    claas_model_t *opened;
    claas_device_t *device = NULL;

    assert_int_equal(claas_model_open(&model, &opened), 0);
    for (size_t i = 0; i < CLAAS_COUNT(bad); i++) {
        assert_true(claas_device_open(&bad[i], opened, &device) < 0);
        assert_null(device);
    }
    claas_model_free(&opened);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alone_and_together_bf16),
        cmocka_unit_test(test_alone_and_together_f32),
        cmocka_unit_test(test_loss_falls),
        cmocka_unit_test(test_teacher_is_kept),
        cmocka_unit_test(test_continue),
        cmocka_unit_test(test_open_errors),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
