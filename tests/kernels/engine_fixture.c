#include "engine_fixture.h"

#include <stdlib.h>

struct rig rig_open(struct claas_device_options options)
{
    return rig_open_on(&fake_backend, options);
}

struct rig rig_open_on(const struct claas_backend_ops *ops, struct claas_device_options options)
{
    struct claas_model_options model = {.path = "random:tiny-llama"};
    struct rig rig = {0};

    fake_reset();
    fake.pins = ops->host_new != NULL;
    assert_int_equal(claas_model_open(&model, &rig.model), 0);
    assert_int_equal(claas_device_open_with(ops, fake_now, &options, rig.model, &rig.device), 0);
    assert_int_equal(claas_device_client_new(rig.device, &rig.client), 0);
    return rig;
}

void rig_close(struct rig *rig)
{
    struct claas_device_event event;

    assert_int_equal(claas_device_client_next(rig->client, &event), 0);
    claas_device_client_free(&rig->client);
    claas_device_free(&rig->device);
    claas_model_free(&rig->model);
    assert_int_equal(fake.broken, 0);
}

struct job *jobs_new(int count)
{
    return CLAAS_NEW_ARRAY(struct job, (size_t)count);
}

void job_fill(struct job *job, int count, int same, int variant, int max_tokens)
{
    memset(job, 0, sizeof(*job));
    for (int i = 0; i < count; i++)
        job->prompt[i] = (i * 7 + 3 + (i >= same ? 11 * variant + 1 : 0)) % FAKE_VOCAB;
    job->stops[0] = -1;
    job->request = (struct claas_generate_request){
        .prompt_count = (size_t)count,
        .max_tokens = max_tokens,
        .temperature = 1,
        .top_p = 1,
        .seed = (uint64_t)variant,
        .priority = CLAAS_PRIORITY_CHAT,
    };
}

void job_submit(struct rig *rig, struct job *job)
{
    job->request.prompt = job->prompt;
    job->request.stop_tokens = job->stops;
    job->request.stop_count = job->stops[0] >= 0;
    job->stamp = fake_stamp(job->request.adapter);
    assert_int_equal(claas_device_generate(rig->client, &job->request, &job->id), 0);
}

static void take_event(struct job *job, const struct claas_device_event *event)
{
    assert_false(job->ended);
    if (event->kind != CLAAS_EVENT_TOKEN) {
        job->ended = true;
        job->last = *event;
        return;
    }
    assert_true(job->count < CLAAS_COUNT(job->tokens));
    job->tokens[job->count++] = event->token;
    assert_true(event->logprob == fake_logprob(event->token));
    assert_int_equal(event->top_count, job->request.top_logprobs);
    for (int i = 0; i < event->top_count; i++)
        assert_int_equal(event->top_tokens[i], (event->token + i) % FAKE_VOCAB);
}

void jobs_wait(struct rig *rig, struct job *jobs, int count, int count_tokens)
{
    for (;;) {
        struct claas_device_event event;
        int left = 0, i;

        for (i = 0; i < count; i++)
            left += !jobs[i].ended;
        if (left == 0 || (count_tokens >= 0 && jobs[0].count >= (size_t)count_tokens))
            return;
        assert_int_equal(claas_device_client_wait(rig->client, WAIT_MS, &event), 1);
        for (i = 0; i < count && jobs[i].id != event.id; i++)
            ;
        assert_true(i < count);
        take_event(&jobs[i], &event);
        claas_device_event_done(&event);
    }
}

void job_check(const struct job *job)
{
    const struct claas_generate_request *r = &job->request;
    size_t count = r->prompt_count, room = 2048 - count;
    int32_t *tokens = CLAAS_NEW_ARRAY(int32_t, 4096);
    bool stopped = false;
    size_t n = 0;

    memcpy(tokens, job->prompt, count * sizeof(*tokens));
    for (; n < (size_t)r->max_tokens && n < room && !stopped; n++) {
        tokens[count + n] = fake_next(tokens, count + n, job->stamp, r->seed, n);
        stopped = tokens[count + n] == job->stops[0];
        if (n < job->count)
            assert_int_equal(job->tokens[n], tokens[count + n]);
    }
    free(tokens);
    assert_true(job->ended);
    assert_int_equal(job->last.kind, CLAAS_EVENT_FINISHED);
    assert_int_equal(job->last.prompt_tokens, count);
    assert_int_equal(job->last.generated_tokens, job->count);
    if (job->last.finish == CLAAS_FINISH_CANCELLED)
        return;
    assert_int_equal(job->count, n);
    assert_int_equal(job->last.finish, stopped ? CLAAS_FINISH_STOP : CLAAS_FINISH_LENGTH);
}

struct claas_device_event wait_for(struct rig *rig, enum claas_device_event_kind kind, uint64_t id)
{
    struct claas_device_event event;

    do
        assert_int_equal(claas_device_client_wait(rig->client, WAIT_MS, &event), 1);
    while (event.kind == CLAAS_EVENT_TOKEN);
    if (event.kind == CLAAS_EVENT_FAILED && kind != CLAAS_EVENT_FAILED)
        fail_msg("%s", event.text);
    assert_int_equal(event.kind, kind);
    assert_int_equal(event.id, id);
    return event;
}

claas_adapter_t *adapter_new(struct rig *rig, uint64_t seed)
{
    struct claas_lora_config lora = {.rank = 2, .alpha = 4, .modules = CLAAS_MODULE_ALL};
    uint64_t id;

    assert_int_equal(claas_device_adapter_init(rig->client, &lora, seed, CLAAS_ADAPTER_TRAIN, &id),
                     0);
    return wait_for(rig, CLAAS_EVENT_ADAPTER, id).adapter;
}

int train_submit(struct rig *rig, claas_adapter_t *adapter, bool update, uint64_t *ret_id)
{
    static const int32_t prompt[] = {1, 2, 3}, response[] = {4, 5};
    struct claas_train_row row = {
        .student_prompt = prompt,
        .student_count = 3,
        .teacher_prompt = prompt,
        .teacher_count = 2,
        .response = response,
        .response_count = 2,
        .student = adapter,
    };
    struct claas_train_request request = {
        .rows = &row,
        .row_count = 1,
        .adamw = {.rate = 1e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1},
        .update = update,
    };

    return claas_device_train(rig->client, &request, ret_id);
}
