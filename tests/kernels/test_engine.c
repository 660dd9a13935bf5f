/* The engine's generation on the fake back-end: whatever runs beside it, a request's tokens are
 * those of a run alone. */
#include "engine_fixture.h"

#include <poll.h>
#include <stdlib.h>

/* --- the table of blocks
 * -------------------------------------------------------------------------------------------- */

static void test_kv_table(void **state)
{
    int32_t a[16] = {1}, b[16] = {2}, block[4];
    uint64_t root = claas_kv_root(3), chain_a, chain_b, chain;
    claas_kv_t *kv;

    assert_int_equal(claas_kv_new(0, &kv), CLAAS_ERR_INVALID);
    assert_int_equal(claas_kv_new(4, &kv), 0);
    for (int i = 0; i < 4; i++)
        block[i] = claas_kv_take(kv);
    assert_int_equal(claas_kv_take(kv), -1);
    assert_int_equal(claas_kv_available(kv), 0);
    chain_a = claas_kv_register(kv, block[0], root, root, a);
    chain_b = claas_kv_register(kv, block[1], root, chain_a, b);
    assert_true(chain_a != chain_b);
    /* An equal block leads to the first one; the same tokens elsewhere do not. */
    assert_true(claas_kv_register(kv, block[2], root, root, a) == chain_a);
    assert_int_equal(claas_kv_find(kv, root, b, &chain), -1);
    assert_int_equal(claas_kv_find(kv, claas_kv_root(4), a, &chain), -1);
    assert_int_equal(claas_kv_find(kv, chain_a, b, &chain), block[1]);
    assert_true(chain == chain_b);
    claas_kv_drop(kv, block[1]);
    for (int i = 3; i >= 0; i--)
        claas_kv_drop(kv, block[i]);
    assert_int_equal(claas_kv_available(kv), 4);
    /* Unregistered blocks go first, then the one that was dropped first. */
    block[2] = claas_kv_take(kv);
    block[3] = claas_kv_take(kv);
    assert_int_equal(claas_kv_find(kv, root, a, &chain), block[0]);
    claas_kv_drop(kv, block[0]);
    assert_int_equal(claas_kv_take(kv), block[1]);
    assert_int_equal(claas_kv_find(kv, chain_a, b, &chain), -1);
    claas_kv_forget(kv, claas_kv_root(4));
    assert_int_equal(claas_kv_find(kv, root, a, &chain), block[0]);
    claas_kv_forget(kv, root);
    assert_int_equal(claas_kv_find(kv, root, a, &chain), -1);
    claas_kv_drop(kv, block[0]);
    assert_int_equal(claas_kv_available(kv), 1);
    claas_kv_free(&kv);
    assert_null(kv);
}

static int32_t remember(claas_kv_t *kv, int32_t token)
{
    int32_t tokens[16] = {token}, block = claas_kv_take(kv);

    assert_true(claas_kv_register(kv, block, claas_kv_root(3), claas_kv_root(3), tokens) != 0);
    claas_kv_drop(kv, block);
    return block;
}

/* What is remembered makes half of the pool resident and no more; what is in use may have all. */
static void test_kv_memory(void **state)
{
    int32_t tokens[16] = {9}, block;
    uint64_t root = claas_kv_root(3), chain;
    claas_kv_t *kv;

    assert_int_equal(claas_kv_new(8, &kv), 0);
    for (int i = 0; i < 10; i++)
        assert_int_equal(remember(kv, i), i % 4);
    assert_int_equal(claas_kv_find(kv, root, tokens, &chain), 1);
    /* Its last user discards it: found no more, and the next to be taken. */
    assert_int_equal(claas_kv_find(kv, root, tokens, &chain), 1);
    claas_kv_discard(kv, 1);
    assert_int_equal(claas_kv_find(kv, root, tokens, &chain), 1);
    claas_kv_drop(kv, 1);
    claas_kv_discard(kv, 1);
    assert_int_equal(claas_kv_find(kv, root, tokens, &chain), -1);
    assert_int_equal(claas_kv_take(kv), 1);
    assert_int_equal(claas_kv_available(kv), 7);
    for (int i = 7; i > 0; i--) {
        block = claas_kv_take(kv);
        assert_true(block >= 0 && block < 8 && block != 1);
        assert_int_equal(claas_kv_available(kv), i - 1);
    }
    assert_int_equal(claas_kv_take(kv), -1);
    /* Once used, all of it remembers. */
    for (int i = 0; i < 8; i++)
        claas_kv_drop(kv, i);
    for (int i = 0; i < 8; i++)
        remember(kv, 20 + i);
    for (int i = 0; i < 8; i++) {
        tokens[0] = 20 + i;
        assert_true(claas_kv_find(kv, root, tokens, &chain) >= 0);
    }
    claas_kv_free(&kv);
}

/* --- one request
 * ------------------------------------------------------------------------------------------------------
 */

static void run_one(struct rig *rig, struct job *job)
{
    job_submit(rig, job);
    jobs_wait(rig, job, 1, -1);
    job_check(job);
}

static void test_one(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    struct pollfd item = {.fd = claas_device_client_fd(rig.client), .events = POLLIN};
    struct job *job = jobs_new(1);
    int32_t first;

    assert_int_equal(poll(&item, 1, 0), 0);
    job_fill(job, 5, 5, 0, 7);
    job->request.top_logprobs = CLAAS_TOP_LOGPROBS_MAX;
    job_submit(&rig, job);
    assert_int_equal(poll(&item, 1, WAIT_MS), 1);
    jobs_wait(&rig, job, 1, -1);
    job_check(job);
    assert_int_equal(poll(&item, 1, 0), 0);
    first = job->tokens[3];
    /* The stop token is part of the answer. */
    job_fill(job, 5, 5, 0, 100);
    job->stops[0] = first;
    run_one(&rig, job);
    assert_int_equal(job->last.finish, CLAAS_FINISH_STOP);
    assert_int_equal(job->tokens[job->count - 1], first);
    /* A prompt of one token, and one that nearly fills the context. */
    job_fill(job, 1, 1, 0, 1);
    run_one(&rig, job);
    job_fill(job, 2047, 0, 5, 100);
    run_one(&rig, job);
    assert_int_equal(job->count, 1);
    job_fill(job, 2000, 0, 6, 100000);
    run_one(&rig, job);
    assert_int_equal(job->count, 48);
    free(job);
    rig_close(&rig);
}

/* A token is as old as its pass, however late it is read. */
static void test_when_made(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    struct job *job = jobs_new(1);
    struct claas_device_event event;
    int64_t made = 0;

    job_fill(job, 5, 5, 0, 4);
    job_submit(&rig, job);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(claas_device_client_wait(rig.client, WAIT_MS, &event), 1);
        assert_int_equal(event.kind, CLAAS_EVENT_TOKEN);
        if (i > 0)
            assert_int_equal(event.made - made, fake.pass_ns + fake.token_ns);
        made = event.made;
    }
    assert_int_equal(made, fake_now());
    assert_int_equal(wait_for(&rig, CLAAS_EVENT_FINISHED, job->id).generated_tokens, 4);
    free(job);
    rig_close(&rig);
}

static void test_bad_requests(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.kv_tokens = 512});
    struct job *job = jobs_new(1);
    struct claas_generate_request *r = &job->request;
    uint64_t id;

#define REFUSE(code, field, value)                                                                 \
    do {                                                                                           \
        job_fill(job, 5, 5, 0, 7);                                                                 \
        r->prompt = job->prompt;                                                                   \
        r->field = value;                                                                          \
        assert_int_equal(claas_device_generate(rig.client, r, &id), code);                         \
    } while (0)
    REFUSE(CLAAS_ERR_INVALID, prompt_count, 0);
    REFUSE(CLAAS_ERR_LIMIT, prompt_count, 2048);
    REFUSE(CLAAS_ERR_LIMIT, prompt_count, 512);
    REFUSE(CLAAS_ERR_INVALID, max_tokens, 0);
    REFUSE(CLAAS_ERR_INVALID, temperature, -1.0f);
    REFUSE(CLAAS_ERR_INVALID, temperature, __builtin_nanf(""));
    REFUSE(CLAAS_ERR_INVALID, top_p, 0.0f);
    REFUSE(CLAAS_ERR_INVALID, top_p, 1.5f);
    REFUSE(CLAAS_ERR_INVALID, top_k, -1);
    REFUSE(CLAAS_ERR_INVALID, top_logprobs, 21);
    REFUSE(CLAAS_ERR_INVALID, stop_count, 1);
    job_fill(job, 5, 5, 0, 7);
    r->prompt = job->prompt;
    job->prompt[4] = FAKE_VOCAB;
    assert_int_equal(claas_device_generate(rig.client, r, &id), CLAAS_ERR_INVALID);
    assert_int_equal(train_submit(&rig, NULL, true, &id), CLAAS_ERR_INVALID);
    free(job);
    rig_close(&rig);
}

/* --- many requests
 * --------------------------------------------------------------------------------------------------------
 */

static void test_batch(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 8, .prefill_chunk = 48});
    claas_adapter_t *adapters[3] = {NULL, adapter_new(&rig, 1), adapter_new(&rig, 2)};
    struct job *jobs = jobs_new(24);

    fake_close_gate(0);
    for (int i = 0; i < 24; i++) {
        job_fill(&jobs[i], 1 + i * 9, i % 2 ? 40 : 0, i / 6, 1 + (i * 5) % 37);
        jobs[i].request.adapter = adapters[i % 3];
        jobs[i].request.priority = i % 4 == 0 ? CLAAS_PRIORITY_ROLLOUT : CLAAS_PRIORITY_CHAT;
        jobs[i].request.top_logprobs = i % 5;
        job_submit(&rig, &jobs[i]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 24, -1);
    for (int i = 0; i < 24; i++)
        job_check(&jobs[i]);
    assert_true(fake.largest_pass <= 8 + 48);
    assert_int_equal(fake.most_groups, 3); /* though they came by turns */
    claas_adapter_unref(&adapters[1]);
    claas_adapter_unref(&adapters[2]);
    free(jobs);
    rig_close(&rig);
}

static void test_shared_prefix(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 32});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(6);
    struct claas_device_stats stats;

    /* Together: the first one computes, the second waits for it, the third shares 48 tokens, the
     * fourth has an adapter. */
    fake_close_gate(0);
    job_fill(&jobs[0], 1, 0, 1, 1);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    job_fill(&jobs[1], 100, 100, 1, 5);
    job_fill(&jobs[2], 100, 100, 2, 5);
    job_fill(&jobs[3], 100, 50, 3, 5);
    job_fill(&jobs[4], 100, 100, 4, 5);
    jobs[4].request.adapter = adapter;
    for (int i = 1; i < 5; i++)
        job_submit(&rig, &jobs[i]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 5, -1);
    for (int i = 0; i < 5; i++)
        job_check(&jobs[i]);
    assert_int_equal(jobs[1].last.cached_tokens, 0);
    assert_int_equal(jobs[2].last.cached_tokens, 96);
    assert_int_equal(jobs[3].last.cached_tokens, 48);
    assert_int_equal(jobs[4].last.cached_tokens, 0);
    claas_device_stats(rig.device, &stats);
    assert_int_equal(stats.tokens_prefilled, 1 + 100 + 4 + 52 + 100);
    assert_int_equal(stats.prefix_tokens_shared, 96 + 48);
    assert_int_equal(stats.tokens_decoded, 1 + 4 * 5);
    assert_int_equal(stats.passes, fake.passes);
    /* Later: the prompt and the answer of before are found, but for the last token. */
    job_fill(&jobs[5], 100, 100, 1, 3);
    memcpy(jobs[5].prompt + 100, jobs[1].tokens, 5 * sizeof(int32_t));
    jobs[5].request.prompt_count = 105;
    run_one(&rig, &jobs[5]);
    assert_int_equal(jobs[5].last.cached_tokens, 96);
    job_fill(&jobs[5], 96, 100, 1, 3);
    run_one(&rig, &jobs[5]);
    assert_int_equal(jobs[5].last.cached_tokens, 80);
    claas_adapter_unref(&adapter);
    free(jobs);
    rig_close(&rig);
}

/* What a rollout read is found again, what it wrote is not. */
static void test_rollouts_leave_no_answers(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    struct job *jobs = jobs_new(2);

    job_fill(&jobs[0], 40, 40, 1, 60);
    jobs[0].request.priority = CLAAS_PRIORITY_ROLLOUT;
    run_one(&rig, &jobs[0]);
    for (int i = 0; i < 2; i++) {
        job_fill(&jobs[1], 40, 40, 1, 1);
        memcpy(jobs[1].prompt + 40, jobs[0].tokens, 60 * sizeof(int32_t));
        jobs[1].request.prompt_count = 100;
        run_one(&rig, &jobs[1]);
        assert_int_equal(jobs[1].last.cached_tokens, i == 0 ? 32 : 96);
    }
    free(jobs);
    rig_close(&rig);
}

/* Room for both prompts in one pass: the second waits all the same, and computes only its last
 * tokens. */
static void test_shared_prefix_in_one_pass(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 1024});
    struct job *jobs = jobs_new(4);
    struct claas_device_stats stats;

    fake_close_gate(0);
    job_fill(&jobs[0], 1, 0, 1, 1);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    for (int i = 1; i < 4; i++) {
        job_fill(&jobs[i], 200, 200, i, 5);
        job_submit(&rig, &jobs[i]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 4, -1);
    for (int i = 0; i < 4; i++)
        job_check(&jobs[i]);
    claas_device_stats(rig.device, &stats);
    assert_int_equal(stats.tokens_prefilled, 1 + 200 + 2 * 8);
    free(jobs);
    rig_close(&rig);
}

/* The one who computes a shared prefix is cancelled: the others go on without it. */
static void test_leader_cancelled(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 16});
    struct job *jobs = jobs_new(3);

    fake_close_gate(0);
    for (int i = 0; i < 3; i++) {
        job_fill(&jobs[i], 200, 200, i, 4);
        job_submit(&rig, &jobs[i]);
    }
    fake_wait_at_gate();
    claas_device_cancel(rig.client, jobs[0].id);
    fake_open_gate();
    jobs_wait(&rig, jobs, 3, -1);
    for (int i = 0; i < 3; i++)
        job_check(&jobs[i]);
    assert_int_equal(jobs[0].last.finish, CLAAS_FINISH_CANCELLED);
    assert_true(jobs[1].last.cached_tokens >= 16);
    assert_int_equal(jobs[2].last.cached_tokens, 192);
    free(jobs);
    rig_close(&rig);
}

static void test_chunks_beside_decoding(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 64});
    struct job *jobs = jobs_new(2);
    int before;

    job_fill(&jobs[0], 10, 10, 0, 2000);
    fake_close_gate(3);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    before = fake.passes_without_decode;
    job_fill(&jobs[1], 1000, 0, 1, 2);
    job_submit(&rig, &jobs[1]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 2, -1);
    job_check(&jobs[0]);
    job_check(&jobs[1]);
    /* 1000 tokens in 16 passes; all of them with a row of the first request. */
    assert_int_equal(fake.passes_without_decode, before);
    assert_int_equal(fake.largest_pass, 65);
    free(jobs);
    rig_close(&rig);
}

/* While a chat streams, a pass with prompt tokens may take two slices: at 5 ms a token, 16 tokens.
 */
static void test_slow_prefill_is_cut(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 256, .slice_ms = 50});
    struct job *jobs = jobs_new(2);

    fake.token_ns = 5000000;
    job_fill(&jobs[0], 40, 40, 0, 2000);
    fake_close_gate(3);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    job_fill(&jobs[1], 500, 0, 1, 2);
    job_submit(&rig, &jobs[1]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 2, -1);
    job_check(&jobs[0]);
    job_check(&jobs[1]);
    assert_int_equal(fake.largest_pass, 40);
    free(jobs);
    rig_close(&rig);
}

static void test_preemption(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.kv_tokens = 128, .prefill_chunk = 32});
    struct job *jobs = jobs_new(8);
    struct claas_device_stats stats;
    uint64_t prompts = 0;

    fake_close_gate(0);
    for (int i = 0; i < 8; i++) {
        job_fill(&jobs[i], 10 + 5 * i, 0, i, i == 7 ? 1000 : 70 + i);
        jobs[i].request.priority = i < 3 ? CLAAS_PRIORITY_ROLLOUT : CLAAS_PRIORITY_CHAT;
        prompts += jobs[i].request.prompt_count;
        job_submit(&rig, &jobs[i]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 8, -1);
    jobs[7].request.max_tokens = 128 - 45; /* the whole pool is its context */
    for (int i = 0; i < 8; i++)
        job_check(&jobs[i]);
    claas_device_stats(rig.device, &stats);
    assert_true(stats.tokens_prefilled > prompts);
    assert_int_equal(stats.kv_blocks, 8);
    free(jobs);
    rig_close(&rig);
}

static void test_chat_before_rollouts(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 2});
    struct job *jobs = jobs_new(3);

    fake_close_gate(9);
    for (int i = 1; i < 3; i++) {
        job_fill(&jobs[i], 20, 0, i, 2000);
        jobs[i].request.priority = CLAAS_PRIORITY_ROLLOUT;
        job_submit(&rig, &jobs[i]);
    }
    fake_wait_at_gate();
    job_fill(&jobs[0], 20, 0, 9, 50);
    job_submit(&rig, &jobs[0]);
    fake_close_gate(60);
    jobs_wait(&rig, jobs, 3, 50);
    assert_false(jobs[1].ended);
    assert_false(jobs[2].ended);
    fake_open_gate();
    /* The younger one had to go; all the same nothing is lost. */
    jobs_wait(&rig, jobs, 3, -1);
    for (int i = 0; i < 3; i++)
        job_check(&jobs[i]);
    free(jobs);
    rig_close(&rig);
}

/* --- adapters share --- */

static void submit_as(struct rig *rig, struct job *job, claas_adapter_t *adapter)
{
    job->request.adapter = adapter;
    job_submit(rig, job);
}

static int count_ended(const struct job *jobs, int count)
{
    int ended = 0;

    for (int i = 0; i < count; i++)
        ended += jobs[i].ended;
    return ended;
}

static void check_all(struct rig *rig, struct job *jobs, int count)
{
    fake_open_gate();
    jobs_wait(rig, jobs, count, -1);
    for (int i = 0; i < count; i++)
        job_check(&jobs[i]);
    free(jobs);
}

/* One adapter has all places and a queue: the base model's chat begins at once. */
static void test_flood_leaves_a_place(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 4});
    claas_adapter_t *flood = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(13);

    fake_close_gate(0);
    for (int i = 1; i < 13; i++) {
        job_fill(&jobs[i], 20, 0, i, 100);
        submit_as(&rig, &jobs[i], flood);
    }
    fake_close_gate(20);
    fake_wait_at_gate();
    job_fill(&jobs[0], 20, 0, 0, 30);
    job_submit(&rig, &jobs[0]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 13, 30);
    assert_int_equal(count_ended(jobs + 1, 12), 0);
    check_all(&rig, jobs, 13);
    claas_adapter_unref(&flood);
    rig_close(&rig);
}

/* A chat of jobs[0]'s adapter had to go for another adapter's first: it goes on before that one's
 * second begins. */
static void test_interrupted_goes_first(void **state)
{
    static const int answers[] = {40, 25, 200, 200};
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 4});
    claas_adapter_t *flood = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(7);

    fake_close_gate(0);
    for (int i = 3; i >= 0; i--) { /* the first is the youngest */
        job_fill(&jobs[i], 20, 0, i, answers[i]);
        submit_as(&rig, &jobs[i], flood);
    }
    fake_close_gate(20);
    fake_wait_at_gate();
    for (int i = 4; i < 7; i++) {
        job_fill(&jobs[i], 20, 0, i, 200);
        job_submit(&rig, &jobs[i]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 7, 40);
    assert_true(jobs[1].ended && jobs[4].count > 0);
    assert_int_equal(jobs[5].count, 0);
    check_all(&rig, jobs, 7);
    claas_adapter_unref(&flood);
    rig_close(&rig);
}

/* A chat that would not fit without the first one of the adapter that has most interrupts none. */
static void test_none_is_interrupted_in_vain(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.kv_tokens = 512});
    claas_adapter_t *flood = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(3);

    fake_close_gate(0);
    job_fill(&jobs[0], 300, 0, 0, 60);
    submit_as(&rig, &jobs[0], flood);
    job_fill(&jobs[1], 40, 0, 1, 60);
    submit_as(&rig, &jobs[1], flood);
    fake_close_gate(10);
    fake_wait_at_gate();
    job_fill(&jobs[2], 230, 0, 2, 20);
    job_submit(&rig, &jobs[2]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 3, 60);
    assert_in_range(jobs[1].count, 55, 60);
    check_all(&rig, jobs, 3);
    claas_adapter_unref(&flood);
    rig_close(&rig);
}

/* Prompts that were cancelled before they were read cost their adapter no turn. */
static void test_unread_prompts_cost_nothing(void **state)
{
    struct rig rig =
        rig_open((struct claas_device_options){.prefill_chunk = 64, .kv_tokens = 32768});
    claas_adapter_t *adapter = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(17);

    fake_close_gate(0);
    for (int i = 9; i < 17; i++) {
        job_fill(&jobs[i], 900, 0, i, 1);
        submit_as(&rig, &jobs[i], adapter);
    }
    fake_close_gate(2);
    fake_wait_at_gate();
    for (int i = 9; i < 17; i++)
        claas_device_cancel(rig.client, jobs[i].id);
    for (int i = 1; i < 9; i++) {
        job_fill(&jobs[i], 900, 0, i, 1);
        job_submit(&rig, &jobs[i]);
    }
    fake_close_gate(20); /* the second of these is being read */
    fake_wait_at_gate();
    job_fill(&jobs[0], 100, 0, 0, 2);
    submit_as(&rig, &jobs[0], adapter);
    fake_open_gate();
    jobs_wait(&rig, jobs, 17, 1);
    assert_in_range(count_ended(jobs + 1, 8), 1, 3);
    fake_open_gate();
    jobs_wait(&rig, jobs, 17, -1);
    for (int i = 0; i < 9; i++)
        job_check(&jobs[i]);
    free(jobs);
    claas_adapter_unref(&adapter);
    rig_close(&rig);
}

/* Two floods, one behind the other: the second one's chats end as fast as the first one's. */
static void test_floods_share(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 4});
    claas_adapter_t *adapters[2] = {adapter_new(&rig, 1), adapter_new(&rig, 2)};
    struct job *jobs = jobs_new(40);

    fake_close_gate(0);
    for (int i = 0; i < 40; i++) {
        struct job *job = &jobs[(i + 10) % 40]; /* jobs[0] is the second one's tenth */

        job_fill(job, 20, 0, i, 20);
        submit_as(&rig, job, adapters[i / 20]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 40, 1);
    assert_in_range(count_ended(jobs + 10, 20), 6, 14);
    check_all(&rig, jobs, 40);
    for (int i = 0; i < 2; i++)
        claas_adapter_unref(&adapters[i]);
    rig_close(&rig);
}

/* Long prompts that were admitted before, whose answers are short, so that others follow them: a
 * short prompt of another adapter waits for the one being read and no more. */
static void test_prompts_take_turns(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.prefill_chunk = 64});
    claas_adapter_t *flood = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(9);

    fake_close_gate(0);
    for (int i = 1; i < 9; i++) {
        job_fill(&jobs[i], 900, 0, i, 1);
        submit_as(&rig, &jobs[i], flood);
    }
    fake_close_gate(20); /* the second of them is being read */
    fake_wait_at_gate();
    job_fill(&jobs[0], 100, 0, 0, 2);
    job_submit(&rig, &jobs[0]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 9, 1);
    assert_in_range(count_ended(jobs + 1, 8), 1, 2);
    check_all(&rig, jobs, 9);
    claas_adapter_unref(&flood);
    rig_close(&rig);
}

/* Answers outgrow the blocks: those of the adapter with most chats go back, whoever is youngest. */
static void test_flood_gives_blocks(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.kv_tokens = 512, .prefill_chunk = 16});
    claas_adapter_t *flood = adapter_new(&rig, 1);
    struct job *jobs = jobs_new(9);

    fake_close_gate(0);
    for (int i = 1; i < 9; i++) {
        job_fill(&jobs[i], 17, 0, i, 200);
        submit_as(&rig, &jobs[i], flood);
    }
    fake_close_gate(18);
    fake_wait_at_gate();
    job_fill(&jobs[0], 17, 0, 0, 100);
    job_submit(&rig, &jobs[0]);
    fake_open_gate();
    jobs_wait(&rig, jobs, 9, 100);
    assert_in_range(jobs[1].count, 117, 121);
    check_all(&rig, jobs, 9);
    claas_adapter_unref(&flood);
    rig_close(&rig);
}

/* A long prompt that does not fit is not overtaken by short ones of other adapters, and pushes out
 * none that would not make room enough. */
static void test_long_prompt_gets_its_turn(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.kv_tokens = 256});
    claas_adapter_t *adapters[8];
    struct job *jobs = jobs_new(10);
    struct claas_device_stats stats;

    for (int i = 0; i < 8; i++)
        adapters[i] = adapter_new(&rig, (uint64_t)i);
    fake_close_gate(0);
    for (int i = 1; i < 3; i++) {
        job_fill(&jobs[i], 50, 0, i, 60);
        submit_as(&rig, &jobs[i], adapters[0]);
    }
    fake_close_gate(5);
    fake_wait_at_gate();
    job_fill(&jobs[0], 200, 0, 0, 1);
    job_submit(&rig, &jobs[0]);
    for (int i = 3; i < 10; i++) {
        job_fill(&jobs[i], 10, 0, i, 50);
        submit_as(&rig, &jobs[i], adapters[i - 2]);
    }
    fake_open_gate();
    jobs_wait(&rig, jobs, 10, 1);
    for (int i = 1; i < 10; i++)
        assert_int_equal(jobs[i].count > 0, i < 3);
    assert_int_equal(count_ended(jobs + 1, 2), 2);
    check_all(&rig, jobs, 10);
    claas_device_stats(rig.device, &stats);
    assert_int_equal(stats.prefix_tokens_shared, 0); /* none was preempted and began again */
    for (int i = 0; i < 8; i++)
        claas_adapter_unref(&adapters[i]);
    rig_close(&rig);
}

/* Submits until the queue refuses; how many that were. */
static int fill_queue(struct rig *rig, struct job *jobs, claas_adapter_t *adapter)
{
    for (int count = 0;; count++) {
        struct job *job = &jobs[count];

        job_fill(job, 1, 1, 1, 1);
        job->request.adapter = adapter;
        job->request.prompt = job->prompt;
        job->stamp = fake_stamp(adapter);
        if (claas_device_generate(rig->client, &job->request, &job->id) == CLAAS_ERR_OVERLOADED)
            return count;
    }
}

/* However much waits of one adapter, others find a place in the queue. */
static void test_queue_has_places_for_all(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 1});
    claas_adapter_t *adapters[3] = {NULL, adapter_new(&rig, 1), adapter_new(&rig, 2)};
    struct job *jobs = jobs_new(CLAAS_ENGINE_CHATS_MAX + 1);
    int count = 1;

    job_fill(&jobs[0], 1, 1, 1, 1);
    fake_close_gate(0);
    job_submit(&rig, &jobs[0]);
    fake_wait_at_gate();
    for (int i = 0; i < 3; i++) {
        int places = fill_queue(&rig, jobs + count, adapters[i]);

        assert_int_equal(places, CLAAS_ENGINE_QUEUE_MAX >> i);
        count += places;
    }
    check_all(&rig, jobs, count);
    for (int i = 1; i < 3; i++)
        claas_adapter_unref(&adapters[i]);
    rig_close(&rig);
}

/* --- ends
 * -------------------------------------------------------------------------------------------------------------------
 */

static void test_cancel(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 1});
    struct job *jobs = jobs_new(3);

    fake_close_gate(0);
    for (int i = 0; i < 3; i++) {
        job_fill(&jobs[i], 20, 0, i, 2000);
        job_submit(&rig, &jobs[i]);
    }
    claas_device_cancel(rig.client, 987654);
    claas_device_cancel(rig.client, jobs[1].id);
    fake_close_gate(12);
    fake_wait_at_gate();
    claas_device_cancel(rig.client, jobs[0].id);
    fake_open_gate();
    jobs_wait(&rig, jobs, 3, -1);
    assert_int_equal(jobs[0].last.finish, CLAAS_FINISH_CANCELLED);
    assert_int_equal(jobs[1].last.finish, CLAAS_FINISH_CANCELLED);
    assert_int_equal(jobs[1].count, 0);
    assert_int_equal(jobs[2].last.finish, CLAAS_FINISH_LENGTH);
    for (int i = 0; i < 3; i++)
        job_check(&jobs[i]);
    claas_device_cancel(rig.client, jobs[2].id); /* too late: nothing */
    free(jobs);
    rig_close(&rig);
}

static void test_client_free(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 4});
    claas_device_client_t *other;
    struct rig second = rig;
    struct job *jobs = jobs_new(4);
    uint64_t id;

    assert_int_equal(claas_device_client_new(rig.device, &other), 0);
    second.client = other;
    for (int i = 0; i < 3; i++) {
        job_fill(&jobs[i], 100, 0, i, 1000);
        job_submit(&second, &jobs[i]);
    }
    job_fill(&jobs[3], 50, 0, 7, 300);
    job_submit(&rig, &jobs[3]);
    jobs_wait(&rig, jobs + 3, 1, 5);
    assert_int_equal(claas_device_adapter_init(
                         other, &(struct claas_lora_config){.rank = 1, .alpha = 1, .modules = 1}, 1,
                         CLAAS_ADAPTER_TRAIN, &id),
                     0);
    claas_device_client_free(&other);
    assert_null(other);
    jobs_wait(&rig, jobs + 3, 1, -1);
    job_check(&jobs[3]);
    free(jobs);
    rig_close(&rig);
}

/* Many cycles learn at the same time: their rollouts fill no queue of the chats'. */
static void test_rollouts_refuse_no_chat(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 1});
    struct job *jobs = jobs_new(CLAAS_ENGINE_QUEUE_MAX + 3);
    int count = CLAAS_ENGINE_QUEUE_MAX + 2;

    fake_close_gate(0);
    for (int i = 0; i < count; i++) {
        job_fill(&jobs[i], 20, 20, 1, 1);
        jobs[i].request.priority = CLAAS_PRIORITY_ROLLOUT;
        job_submit(&rig, &jobs[i]);
    }
    job_fill(&jobs[count], 20, 20, 1, 1);
    job_submit(&rig, &jobs[count++]);
    fake_open_gate();
    jobs_wait(&rig, jobs, count, -1);
    for (int i = 0; i < count; i++)
        job_check(&jobs[i]);
    free(jobs);
    rig_close(&rig);
}

static void test_overload(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){.max_batch = 1});
    struct job *jobs = jobs_new(CLAAS_ENGINE_QUEUE_MAX + 2);
    int rc = 0, count = 0;

    fake_close_gate(0);
    job_fill(&jobs[count], 20, 20, 1, 1);
    job_submit(&rig, &jobs[count++]);
    fake_wait_at_gate();
    for (; count < CLAAS_ENGINE_QUEUE_MAX + 2; count++) {
        struct job *job = &jobs[count];

        job_fill(job, 20, 20, 1, 1);
        job->request.prompt = job->prompt;
        job->stamp = 1;
        rc = claas_device_generate(rig.client, &job->request, &job->id);
        if (rc < 0)
            break;
    }
    assert_int_equal(rc, CLAAS_ERR_OVERLOADED);
    assert_int_equal(count, CLAAS_ENGINE_QUEUE_MAX + 1);
    fake_open_gate();
    jobs_wait(&rig, jobs, count, -1);
    for (int i = 0; i < count; i++)
        job_check(&jobs[i]);
    job_fill(&jobs[0], 20, 20, 1, 1);
    run_one(&rig, &jobs[0]);
    free(jobs);
    rig_close(&rig);
}

static void test_forward_error(void **state)
{
    struct rig rig = rig_open((struct claas_device_options){0});
    struct job *jobs = jobs_new(3);

    fake_close_gate(0);
    for (int i = 0; i < 2; i++) {
        job_fill(&jobs[i], 60, 60, i, 20);
        job_submit(&rig, &jobs[i]);
    }
    fake_wait_at_gate();
    fake.fail_forwards = 1;
    fake_open_gate();
    jobs_wait(&rig, jobs, 2, -1);
    assert_int_equal(jobs[0].last.kind, CLAAS_EVENT_FAILED);
    assert_int_equal(jobs[0].last.error, CLAAS_ERR_DEVICE);
    assert_string_equal(jobs[0].last.text, "the forward pass failed on purpose");
    /* Nothing of the failed pass is found later. */
    job_fill(&jobs[2], 60, 60, 2, 20);
    run_one(&rig, &jobs[2]);
    free(jobs);
    rig_close(&rig);
}

/* --- passes before the first chat --- */

static int warm_passes;

static int count_warm(claas_backend_t *backend)
{
    assert_non_null(backend);
    warm_passes++;
    return 0;
}

static void a_device_is_warmed_where_that_is_asked_for(void **state)
{
    struct claas_backend_ops ops = fake_backend;

    (void)state;
    warm_passes = 0;
    for (int asked = 0; asked < 2; asked++)
        for (int has = 0; has < 2; has++) {
            struct rig rig;

            ops.warm = has ? count_warm : NULL;
            rig = rig_open_on(&ops, (struct claas_device_options){.warm = asked});
            rig_close(&rig);
        }
    assert_int_equal(warm_passes, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_is_warmed_where_that_is_asked_for),
        cmocka_unit_test(test_kv_table),
        cmocka_unit_test(test_kv_memory),
        cmocka_unit_test(test_one),
        cmocka_unit_test(test_when_made),
        cmocka_unit_test(test_bad_requests),
        cmocka_unit_test(test_batch),
        cmocka_unit_test(test_shared_prefix),
        cmocka_unit_test(test_rollouts_leave_no_answers),
        cmocka_unit_test(test_shared_prefix_in_one_pass),
        cmocka_unit_test(test_leader_cancelled),
        cmocka_unit_test(test_chunks_beside_decoding),
        cmocka_unit_test(test_slow_prefill_is_cut),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_chat_before_rollouts),
        cmocka_unit_test(test_flood_leaves_a_place),
        cmocka_unit_test(test_interrupted_goes_first),
        cmocka_unit_test(test_none_is_interrupted_in_vain),
        cmocka_unit_test(test_unread_prompts_cost_nothing),
        cmocka_unit_test(test_floods_share),
        cmocka_unit_test(test_prompts_take_turns),
        cmocka_unit_test(test_flood_gives_blocks),
        cmocka_unit_test(test_long_prompt_gets_its_turn),
        cmocka_unit_test(test_queue_has_places_for_all),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_client_free),
        cmocka_unit_test(test_overload),
        cmocka_unit_test(test_rollouts_refuse_no_chat),
        cmocka_unit_test(test_forward_error),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
