/* Adapters and training in the engine, on the fake back-end, and a storm of random requests from
 * several threads. */
#include "engine_fixture.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "claas/file.h"
#include "claas/random.h"

static void test_adapter_files(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *first = adapter_new(&rig, 1), *loaded;
    char directory[] = "/tmp/claas-engine-XXXXXX", path[64], missing[64];
    uint64_t id, stamp;

    assert_non_null(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/one", directory);
    snprintf(missing, sizeof(missing), "%s/none", directory);
    assert_int_equal(claas_adapter_lora(first).rank, 2);
    /* train, save, train: the file holds the state between the two steps. */
    assert_int_equal(train_submit(&rig, first, true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    stamp = fake_stamp(first);
    assert_int_equal(claas_device_adapter_save(rig.client, first, path, &id), 0);
    wait_for(&rig, CLAAS_EVENT_SAVED, id);
    assert_int_equal(train_submit(&rig, first, true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    assert_true(fake_stamp(first) != stamp);
    assert_int_equal(claas_device_adapter_load(rig.client, path, CLAAS_ADAPTER_TRAIN, &id), 0);
    loaded = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_true(fake_stamp(loaded) == stamp);
    assert_int_equal(loaded->backend->step, 1);
    claas_adapter_unref(&loaded);
    assert_int_equal(claas_device_adapter_load(rig.client, path, CLAAS_ADAPTER_SERVE, &id), 0);
    loaded = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    /* What cannot work says why. */
    assert_int_equal(claas_device_adapter_save(rig.client, loaded, missing, &id),
                     CLAAS_ERR_INVALID);
    assert_int_equal(claas_device_adapter_copy(rig.client, loaded, &id), CLAAS_ERR_INVALID);
    assert_int_equal(train_submit(&rig, loaded, true, &id), CLAAS_ERR_INVALID);
    assert_int_equal(claas_device_adapter_save(rig.client, first, path, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_EXISTS);
    assert_int_equal(claas_device_adapter_load(rig.client, missing, CLAAS_ADAPTER_SERVE, &id), 0);
    assert_true(wait_for(&rig, CLAAS_EVENT_FAILED, id).text[0] != '\0');
    claas_adapter_unref(&loaded);
    claas_adapter_unref(&first);
    assert_int_equal(claas_remove_all(directory), 0);
    rig_close(&rig);
}

/* The device is full, but for an adapter that was let go and that the compute thread cannot free
 * yet: a new one waits for it. Without one it is refused at once. */
static void test_full_device(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *first = adapter_new(&rig, 1), *second = adapter_new(&rig, 2);
    struct claas_lora_config lora = claas_adapter_lora(first);
    struct job *job = jobs_new(1);
    struct claas_device_event refused;
    uint64_t id;

    fake.adapter_room = 2;
    fake_close_gate(0);
    job_fill(job, 5, 5, 0, 1);
    job_submit(&rig, job);
    fake_wait_at_gate();
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_SERVE, &id), 0);
    refused = wait_for(&rig, CLAAS_EVENT_FAILED, id);
    assert_int_equal(refused.error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(strlen(refused.text), strlen(FAKE_FULL) + FAKE_MAP_BYTES); /* all of the map */
    assert_int_equal(fake.adapters_refused, 2);
    assert_false(claas_adapter_is_shared(first));
    claas_adapter_unref(&first);
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_SERVE, &id), 0);
    fake_wait_refused(3);
    (void)poll(NULL, 0, 20); /* a second try that does not wait would come, and fail, now */
    fake_open_gate();
    do { /* the answer under way ends before or after it */
        struct claas_device_event event;

        assert_int_equal(claas_device_client_wait(rig.client, WAIT_MS, &event), 1);
        if (event.kind == CLAAS_EVENT_FAILED)
            fail_msg("%s", event.text);
        job->ended |= event.kind == CLAAS_EVENT_FINISHED;
        if (event.kind == CLAAS_EVENT_ADAPTER)
            first = CLAAS_TAKE(event.adapter);
        claas_device_event_done(&event);
    } while (!job->ended || first == NULL);
    assert_int_equal(fake.adapters_refused, 3);
    claas_adapter_unref(&first);
    claas_adapter_unref(&second);
    free(job);
    rig_close(&rig);
}

/* What a step left goes for an adapter that finds no room, but not while one learns: its next step
 * would take it again. */
static void test_step_gives_back(void **state)
{
    struct rig rig = rig_open_on(&fake_backend_with_memory, (struct claas_device_options){0});
    claas_adapter_t *trained = adapter_new(&rig, 1), *served;
    struct claas_lora_config lora = claas_adapter_lora(trained);
    uint64_t id;

    fake.step_leaves = 1;
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    fake.adapter_room = 2;
    assert_true(claas_device_trains(rig.client));
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_SERVE, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.given_back, 0);
    claas_adapter_unref(&trained);
    fake.adapter_room = 1;
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_SERVE, &id), 0);
    served = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(fake.given_back, 1);
    assert_false(claas_device_trains(rig.client));
    claas_adapter_unref(&served);
    rig_close(&rig);
}

/* A client that keeps adapters it could do without. */
static void keeper_open(const struct rig *rig, struct rig *keeper)
{
    *keeper = *rig;
    assert_int_equal(claas_device_client_new(rig->device, &keeper->client), 0);
    claas_device_client_keeps_idle(keeper->client);
}

static void expect_asked(struct rig *keeper)
{
    struct claas_device_event event;

    assert_int_equal(claas_device_client_wait(keeper->client, WAIT_MS, &event), 1);
    assert_int_equal(event.kind, CLAAS_EVENT_MEMORY);
    assert_int_equal(event.id, 0);
    claas_device_event_done(&event);
}

/* A step on a full device waits for idle adapters to go, while chats go on, and is made then. */
static void test_idle_adapters_make_room(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0}), keeper;
    claas_adapter_t *trained = adapter_new(&rig, 1), *idle[2];
    struct job *job = jobs_new(1);
    uint64_t id, stamp = fake_stamp(trained);

    keeper_open(&rig, &keeper);
    for (int i = 0; i < 2; i++)
        idle[i] = adapter_new(&keeper, 2 + (uint64_t)i);
    fake.train_room = 1;
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    expect_asked(&keeper);
    assert_int_equal(fake.trains_refused, 1);
    assert_true(fake_stamp(trained) == stamp);
    job_fill(job, 5, 5, 0, 3);
    job_submit(&keeper, job);
    jobs_wait(&keeper, job, 1, -1);
    job_check(job);
    for (int i = 0; i < 2; i++)
        claas_adapter_unref(&idle[i]);
    claas_device_client_gave(keeper.client);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    assert_true(fake_stamp(trained) != stamp);
    assert_int_equal(fake.trains_refused, 1);
    claas_adapter_unref(&trained);
    claas_device_client_free(&keeper.client);
    free(job);
    rig_close(&rig);
}

/* Nothing can go, or who keeps it goes away: the step fails, after one more try. The same with
 * nobody to ask, at once. */
static void test_no_room_is_made(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0}), keeper;
    claas_adapter_t *trained = adapter_new(&rig, 1), *used;
    uint64_t id;

    keeper_open(&rig, &keeper);
    used = adapter_new(&keeper, 2);
    fake.train_room = 1;
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    expect_asked(&keeper);
    claas_device_client_gave(keeper.client);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.trains_refused, 2);
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    expect_asked(&keeper);
    claas_device_client_free(&keeper.client);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.trains_refused, 4);
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.trains_refused, 5);
    claas_adapter_unref(&used);
    claas_adapter_unref(&trained);
    rig_close(&rig);
}

/* How long a keeper has to answer. */
static void give_time(const struct rig *rig, int ms)
{
    pthread_mutex_lock(&rig->device->lock);
    rig->device->await_ms = ms;
    pthread_mutex_unlock(&rig->device->lock);
}

/* Who does not answer costs a step, and the client's other work behind it, a bounded wait; the next
 * step does not wait for him again, and he is asked again once he answered. */
static void test_silent_keeper(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0}), keeper;
    claas_adapter_t *trained = adapter_new(&rig, 1), *used, *next;
    struct claas_lora_config lora = {2, 4, CLAAS_MODULE_ALL};
    uint64_t id;

    keeper_open(&rig, &keeper);
    used = adapter_new(&keeper, 2);
    give_time(&rig, 50);
    fake.train_room = 1;
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    expect_asked(&keeper);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.trains_refused, 2);
    assert_int_equal(train_submit(&rig, trained, true, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.trains_refused, 3);
    fake.adapter_room = 2;
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_TRAIN, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(fake.adapters_refused, 2); /* at once, and when the dead were gone */
    claas_device_client_gave(keeper.client);
    give_time(&rig, WAIT_MS);
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_TRAIN, &id), 0);
    expect_asked(&keeper);
    claas_adapter_unref(&used);
    claas_device_client_gave(keeper.client);
    next = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    claas_adapter_unref(&next);
    claas_adapter_unref(&trained);
    claas_device_client_free(&keeper.client);
    rig_close(&rig);
}

/* An adapter to train has precedence over idle ones too; one to chat with has not. */
static void test_room_to_begin(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0}), keeper;
    struct claas_lora_config lora = {2, 4, CLAAS_MODULE_ALL};
    claas_adapter_t *idle, *trained;
    uint64_t id;

    keeper_open(&rig, &keeper);
    idle = adapter_new(&keeper, 2);
    fake.adapter_room = 1;
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_SERVE, &id), 0);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_NO_MEMORY);
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 3, CLAAS_ADAPTER_TRAIN, &id), 0);
    expect_asked(&keeper);
    claas_adapter_unref(&idle);
    claas_device_client_gave(keeper.client);
    trained = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    claas_adapter_unref(&trained);
    claas_device_client_free(&keeper.client);
    rig_close(&rig);
}

/* A step that waits for memory can be cancelled, and its client can go away. */
static void test_cancel_without_memory(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0}), keeper, trainer = rig;
    claas_adapter_t *trained = adapter_new(&rig, 1), *used;
    uint64_t id;

    keeper_open(&rig, &keeper);
    used = adapter_new(&keeper, 2);
    assert_int_equal(claas_device_client_new(rig.device, &trainer.client), 0);
    fake.train_room = 1;
    assert_int_equal(train_submit(&trainer, trained, true, &id), 0);
    expect_asked(&keeper);
    claas_device_cancel(trainer.client, id);
    assert_int_equal(wait_for(&trainer, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_CANCELLED);
    claas_device_client_gave(keeper.client);
    assert_int_equal(train_submit(&trainer, trained, true, &id), 0);
    expect_asked(&keeper);
    claas_device_client_free(&trainer.client);
    claas_adapter_unref(&used);
    claas_adapter_unref(&trained);
    claas_device_client_free(&keeper.client);
    rig_close(&rig);
}

/* The stamp of what a directory holds. */
static uint64_t stamp_of(struct rig *rig, const char *path)
{
    claas_adapter_t *loaded;
    uint64_t id, stamp;

    assert_int_equal(claas_device_adapter_load(rig->client, path, CLAAS_ADAPTER_TRAIN, &id), 0);
    loaded = wait_for(rig, CLAAS_EVENT_ADAPTER, id).adapter;
    stamp = fake_stamp(loaded);
    claas_adapter_unref(&loaded);
    return stamp;
}

static void expect_saved_only(struct rig *rig, claas_adapter_t *kept)
{
    static const int32_t prompt[] = {1, 2, 3};
    struct claas_train_row row = {.student_prompt = prompt,
                                  .student_count = 3,
                                  .teacher_prompt = prompt,
                                  .teacher_count = 3,
                                  .response = prompt,
                                  .response_count = 1,
                                  .teacher = kept};
    struct claas_train_request request = {.rows = &row, .row_count = 1};
    struct claas_generate_request chat = {
        .prompt = prompt, .prompt_count = 3, .adapter = kept, .max_tokens = 4, .top_p = 1};
    uint64_t id;

    assert_int_equal(claas_device_generate(rig->client, &chat, &id), CLAAS_ERR_INVALID);
    assert_int_equal(train_submit(rig, kept, true, &id), CLAAS_ERR_INVALID);
    assert_int_equal(train_submit(rig, kept, false, &id), CLAAS_ERR_INVALID);
    assert_int_equal(claas_device_train(rig->client, &request, &id), CLAAS_ERR_INVALID);
    assert_int_equal(claas_device_adapter_copy(rig->client, kept, &id), CLAAS_ERR_INVALID);
}

/* A copy, and what is loaded or begun to be kept, can be saved and nothing else, and takes nothing
 * of the device. */
static void test_kept_adapters(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *first = adapter_new(&rig, 1), *kept[3] = {NULL};
    struct claas_lora_config lora = claas_adapter_lora(first);
    char directory[] = "/tmp/claas-engine-XXXXXX", paths[3][64];
    struct claas_device_stats stats;
    uint64_t id, stamp, fresh = fake_stamp(first);

    assert_non_null(mkdtemp(directory));
    for (int i = 0; i < 3; i++)
        snprintf(paths[i], sizeof(paths[i]), "%s/%d", directory, i);
    /* train, copy, train: the copy is what was between the steps */
    assert_int_equal(train_submit(&rig, first, true, &id), 0);
    assert_int_equal(claas_device_adapter_copy(rig.client, first, &id), 0);
    claas_device_event_done(&(struct claas_device_event){
        .trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id - 1).trained});
    kept[0] = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    stamp = fake_stamp(first);
    assert_int_equal(train_submit(&rig, first, true, &id), 0);
    claas_device_event_done(
        &(struct claas_device_event){.trained = wait_for(&rig, CLAAS_EVENT_TRAINED, id).trained});
    assert_true(fake_stamp(first) != stamp);
    claas_adapter_unref(&first); /* it lives without what it is a copy of */
    assert_int_equal(claas_device_adapter_save(rig.client, kept[0], paths[0], &id), 0);
    wait_for(&rig, CLAAS_EVENT_SAVED, id);
    assert_int_equal(claas_device_adapter_load(rig.client, paths[0], CLAAS_ADAPTER_KEEP, &id), 0);
    kept[1] = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    assert_int_equal(claas_device_adapter_init(rig.client, &lora, 1, CLAAS_ADAPTER_KEEP, &id), 0);
    kept[2] = wait_for(&rig, CLAAS_EVENT_ADAPTER, id).adapter;
    for (int i = 0; i < 3; i++) {
        expect_saved_only(&rig, kept[i]);
        assert_int_equal(claas_adapter_lora(kept[i]).rank, 2);
    }
    /* Twice, for a save leaves it as it was. */
    assert_int_equal(claas_remove_all(paths[0]), 0);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(claas_device_adapter_save(rig.client, kept[i], paths[i], &id), 0);
        wait_for(&rig, CLAAS_EVENT_SAVED, id);
        assert_true(stamp_of(&rig, paths[i]) == (i < 2 ? stamp : fresh));
    }
    do /* stamp_of's adapters end on the compute thread */
        claas_device_stats(rig.device, &stats);
    while (stats.bytes_adapters > 0);
    for (int i = 0; i < 3; i++)
        claas_adapter_unref(&kept[i]);
    assert_int_equal(claas_remove_all(directory), 0);
    rig_close(&rig);
}

static void finish_training(struct rig *rig, uint64_t id)
{
    struct claas_device_event event = wait_for(rig, CLAAS_EVENT_TRAINED, id);

    assert_int_equal(event.trained.tokens, 2);
    claas_device_event_done(&event);
}

static void run_one(struct rig *rig, struct job *job)
{
    job_submit(rig, job);
    jobs_wait(rig, job, 1, -1);
    job_check(job);
}

static void test_trained_adapter_is_new(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *job = jobs_new(1);
    uint64_t id;

    for (int i = 0; i < 5; i++) {
        /* Before each run: nothing; an evaluation; a step that is not finite; a step; nothing. */
        static const size_t cached[] = {0, 96, 96, 0, 96};

        if (i == 1 || i == 2 || i == 3) {
            fake.report_nonfinite = i == 2;
            assert_int_equal(train_submit(&rig, adapter, i != 1, &id), 0);
            finish_training(&rig, id);
        }
        job_fill(job, 100, 100, i, 5);
        job->request.adapter = adapter;
        run_one(&rig, job);
        assert_int_equal(job->last.cached_tokens, cached[i]);
    }
    claas_adapter_unref(&adapter);
    free(job);
    rig_close(&rig);
}

/* rollout, step, rollout, sent at once: the first sees the old weights, the second the new ones. */
static void test_order_of_a_client(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.slice_ms = 1});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(3);
    uint64_t id;

    for (int i = 0; i < 3; i++) {
        job_fill(&jobs[i], 100, 100, i, 30);
        jobs[i].request.priority = CLAAS_PRIORITY_ROLLOUT;
        jobs[i].request.adapter = adapter;
    }
    fake.train_operations = 5;
    fake_close_gate(0);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0);
    job_submit(&rig, &jobs[1]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 1, -1);
    job_check(&jobs[0]);
    finish_training(&rig, id);
    jobs_wait(&rig, jobs + 1, 1, -1);
    jobs[1].stamp = fake_stamp(adapter);
    assert_true(jobs[1].stamp != jobs[0].stamp);
    job_check(&jobs[1]);
    assert_int_equal(jobs[1].last.cached_tokens, 0);
    run_one(&rig, &jobs[2]);
    assert_int_equal(jobs[2].last.cached_tokens, 96);
    claas_adapter_unref(&adapter);
    free(jobs);
    rig_close(&rig);
}

/* A chat of another client whose tokens wait at the gate, in passes of 8 ms. */
static void begin_stream(const struct rig *rig, struct rig *other, struct job *job)
{
    *other = *rig;
    assert_int_equal(claas_device_client_new(rig->device, &other->client), 0);
    fake.pass_ns = 8000000;
    job_fill(job, 20, 20, 0, 100000);
    fake_close_gate(0);
    job_submit(other, job);
    fake_wait_at_gate();
}

static void end_stream(struct rig *other, struct job *job)
{
    claas_device_cancel(other->client, job->id);
    jobs_wait(other, job, 1, -1);
    job_check(job);
    claas_device_client_free(&other->client);
}

static void test_training_yields(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.slice_ms = 50}), other;
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *job = jobs_new(1);
    uint64_t id;

    fake.train_operations = 400; /* of 10 ms: 80 slices */
    begin_stream(&rig, &other, job);
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0);
    fake_open_gate();
    finish_training(&rig, id);
    /* 80 turns of at most 7 passes each. */
    assert_in_range(fake.passes_in_training, 79, 80 * 7);
    assert_in_range(fake.longest_slice, 10000000, 50000000);
    assert_true(fake.fewest_operations >= 1);
    assert_int_equal(fake.operations_done, 400);
    end_stream(&other, job);
    claas_adapter_unref(&adapter);
    free(job);
    rig_close(&rig);
}

/* A copy of an adapter is read back between two steps of a cycle: chats go on meanwhile. */
static void test_copying_yields(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.slice_ms = 50}), other;
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct claas_device_event event;
    struct job *job = jobs_new(1);
    uint64_t id;

    fake.download_operations = 90; /* of 10 ms: 18 slices */
    begin_stream(&rig, &other, job);
    assert_int_equal(claas_device_adapter_copy(rig.client, adapter, &id), 0);
    fake_open_gate();
    event = wait_for(&rig, CLAAS_EVENT_ADAPTER, id);
    assert_in_range(fake.passes_in_training, 17, 18 * 7);
    assert_in_range(fake.longest_slice, 10000000, 50000000);
    assert_int_equal(fake.operations_done, 90);
    claas_device_event_done(&event);
    end_stream(&other, job);
    claas_adapter_unref(&adapter);
    free(job);
    rig_close(&rig);
}

/* Operations longer than a slice: training still gets one between two turns. */
static void test_training_goes_on(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.slice_ms = 1});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(2);
    uint64_t id;

    fake.train_operations = 100;
    for (int i = 0; i < 2; i++) {
        job_fill(&jobs[i], 20, 20, i, 100000);
        jobs[i].request.priority = i == 0 ? CLAAS_PRIORITY_CHAT : CLAAS_PRIORITY_ROLLOUT;
        job_submit(&rig, &jobs[i]);
    }
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0);
    for (;;) {
        struct claas_device_event event;

        assert_int_equal(claas_device_client_wait(rig.client, WAIT_MS, &event), 1);
        claas_device_event_done(&event);
        if (event.kind == CLAAS_EVENT_TRAINED)
            break;
    }
    assert_int_equal(fake.operations_done, 100);
    assert_true(fake.fewest_operations >= 1);
    claas_adapter_unref(&adapter);
    claas_device_client_free(&rig.client);
    assert_int_equal(claas_device_client_new(rig.device, &rig.client), 0);
    free(jobs);
    rig_close(&rig);
}

static void test_training_ends(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    uint64_t stamp = fake_stamp(adapter), id, waiting;
    claas_device_client_t *other;
    struct rig second = rig;
    struct claas_device_event event;

    fake.fail_trains = 1;
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0);
    event = wait_for(&rig, CLAAS_EVENT_FAILED, id);
    assert_int_equal(event.error, CLAAS_ERR_DEVICE);
    assert_string_equal(event.text, "the training step failed on purpose");
    /* Cancelled in the middle and before its turn. */
    pthread_mutex_lock(&fake.lock);
    fake.train_operations = INT32_MAX;
    fake.operations_done = 0;
    pthread_mutex_unlock(&fake.lock);
    assert_int_equal(train_submit(&rig, adapter, true, &id), 0);
    assert_int_equal(train_submit(&rig, adapter, true, &waiting), 0);
    pthread_mutex_lock(&fake.lock);
    while (fake.operations_done == 0)
        pthread_cond_wait(&fake.changed, &fake.lock);
    pthread_mutex_unlock(&fake.lock);
    claas_device_cancel(rig.client, waiting);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, waiting).error, CLAAS_ERR_CANCELLED);
    claas_device_cancel(rig.client, id);
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FAILED, id).error, CLAAS_ERR_CANCELLED);
    assert_true(fake_stamp(adapter) == stamp);
    /* The client goes in the middle of a step, with adapters in its events. */
    assert_int_equal(claas_device_client_new(rig.device, &other), 0);
    second.client = other;
    assert_int_equal(train_submit(&second, adapter, true, &id), 0);
    claas_adapter_unref(&adapter);
    claas_device_client_free(&other);
    rig_close(&rig);
}

/* --- the storm
 * ----------------------------------------------------------------------------------------------------------
 */

struct storm {
    struct rig rig;
    claas_adapter_t *adapters[3];
    uint64_t seed, picked;
};

#define STORM_JOBS 250

static uint32_t pick(struct storm *storm, uint32_t below)
{
    uint32_t random[4];

    claas_philox(storm->seed, 0, storm->picked++, random);
    return random[0] % below;
}

static void *run_storm(void *arg)
{
    struct storm *storm = arg;
    struct job *jobs = jobs_new(STORM_JOBS);
    int begun = 0, ended = 0;

    while (ended < STORM_JOBS) {
        while (begun < STORM_JOBS && begun - ended < 40) {
            struct job *job = &jobs[begun++];

            job_fill(job, 1 + (int)pick(storm, pick(storm, 10) == 0 ? 300 : 60),
                     (int)pick(storm, 50), (int)pick(storm, 4), 1 + (int)pick(storm, 40));
            job->request.priority = (enum claas_priority)pick(storm, 2);
            job->request.adapter = storm->adapters[pick(storm, 3)];
            job->stops[0] = pick(storm, 3) == 0 ? (int32_t)pick(storm, FAKE_VOCAB) : -1;
            job_submit(&storm->rig, job);
            if (pick(storm, 8) == 0)
                claas_device_cancel(storm->rig.client, jobs[pick(storm, (uint32_t)begun)].id);
        }
        int first = 0;

        while (jobs[first].ended)
            first++;
        jobs_wait(&storm->rig, jobs + first, begun - first, (int)jobs[first].count + 1);
        ended = 0;
        for (int i = 0; i < begun; i++)
            ended += jobs[i].ended;
    }
    for (int i = 0; i < STORM_JOBS; i++)
        job_check(&jobs[i]);
    free(jobs);
    return NULL;
}

static void test_storm(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){
        .kv_tokens = 1024, .max_batch = 12, .prefill_chunk = 64, .slice_ms = 1});
    claas_adapter_t *adapters[3] = {NULL, adapter_new(&rig, 1), adapter_new(&rig, 2)};
    claas_adapter_t *trained = adapter_new(&rig, 3);
    struct storm storms[4];
    pthread_t threads[4];
    uint64_t id;

    for (int i = 0; i < 4; i++) {
        storms[i].rig = rig;
        storms[i].seed = (uint64_t)i;
        storms[i].picked = 0;
        memcpy(storms[i].adapters, adapters, sizeof(adapters));
        assert_int_equal(claas_device_client_new(rig.device, &storms[i].rig.client), 0);
        assert_int_equal(pthread_create(&threads[i], NULL, run_storm, &storms[i]), 0);
    }
    for (int i = 0; i < 10; i++) {
        assert_int_equal(train_submit(&rig, trained, true, &id), 0);
        finish_training(&rig, id);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        claas_device_client_free(&storms[i].rig.client);
    }
    claas_adapter_unref(&adapters[1]);
    claas_adapter_unref(&adapters[2]);
    claas_adapter_unref(&trained);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adapter_files),
        cmocka_unit_test(test_kept_adapters),
        cmocka_unit_test(test_trained_adapter_is_new),
        cmocka_unit_test(test_order_of_a_client),
        cmocka_unit_test(test_training_yields),
        cmocka_unit_test(test_copying_yields),
        cmocka_unit_test(test_training_goes_on),
        cmocka_unit_test(test_training_ends),
        cmocka_unit_test(test_storm),
        cmocka_unit_test(test_full_device),
        cmocka_unit_test(test_step_gives_back),
        cmocka_unit_test(test_idle_adapters_make_room),
        cmocka_unit_test(test_no_room_is_made),
        cmocka_unit_test(test_silent_keeper),
        cmocka_unit_test(test_room_to_begin),
        cmocka_unit_test(test_cancel_without_memory),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
