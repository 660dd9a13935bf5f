/* Sets of answers: see generations.h. */
#include "generations.h"

#include <stdlib.h>

#include "claas/err.h"
#include "claas/mem.h"

#define STOP_TOKENS_MAX 16

int generations_new(struct trainer *trainer, size_t count, int max_tokens,
                    generations_done_fn *done, void *arg, struct generations **ret)
{
    struct generations *set = CLAAS_NEW(struct generations);

    if (set)
        set->items = CLAAS_NEW_ARRAY(struct generation, count);
    if (!set || !set->items) {
        free(set);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    set->count = count;
    set->max_tokens = max_tokens;
    set->done = done;
    set->arg = arg;
    set->trainer = trainer;
    for (size_t i = 0; i < count; i++)
        set->items[i].set = set;
    *ret = set;
    return 0;
}

static void stop_all(struct generations *set)
{
    for (size_t i = 0; i < set->count; i++)
        device_calls_drop(set->trainer, &set->items[i]);
    set->running = 0;
}

void generations_free(struct generations **set)
{
    if (!*set)
        return;
    stop_all(*set);
    for (size_t i = 0; i < (*set)->count; i++) {
        free((*set)->items[i].tokens);
        free((*set)->items[i].logprobs);
    }
    free((*set)->items);
    free(*set);
    *set = NULL;
}

static void on_event(struct trainer *trainer, void *arg, struct claas_device_event *event)
{
    struct generation *item = arg;
    struct generations *set = item->set;

    if (event->kind == CLAAS_EVENT_TOKEN) {
        if (item->count < (size_t)set->max_tokens) {
            item->tokens[item->count] = event->token;
            item->logprobs[item->count++] = event->logprob;
        }
        return;
    }
    if (event->kind == CLAAS_EVENT_FAILED) {
        stop_all(set);
        set->done(trainer, set->arg, event->error, event->text);
        return;
    }
    if (--set->running == 0)
        set->done(trainer, set->arg, 0, NULL);
}

static int start_one(struct generations *set, struct generation *item)
{
    int32_t stop[STOP_TOKENS_MAX];
    struct claas_generate_request request = {
        .prompt = item->prompt,
        .prompt_count = item->prompt_count,
        .adapter = item->adapter,
        .max_tokens = item->max_tokens > 0 ? item->max_tokens : set->max_tokens,
        .temperature = item->temperature,
        .top_p = 1,
        .seed = item->seed,
        .stop_tokens = stop,
        .stop_count = claas_model_stop_tokens(set->trainer->model, stop, STOP_TOKENS_MAX),
        .priority = CLAAS_PRIORITY_ROLLOUT,
    };
    uint64_t id;
    int rc;

    item->tokens = CLAAS_NEW_ARRAY(int32_t, set->max_tokens);
    item->logprobs = CLAAS_NEW_ARRAY(float, set->max_tokens);
    if (!item->tokens || !item->logprobs)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_device_generate(set->trainer->client, &request, &id);
    if (rc == 0)
        rc = device_call_add(set->trainer, id, on_event, item);
    return rc;
}

int generations_start(struct generations *set)
{
    for (size_t i = 0; i < set->count; i++) {
        int rc = start_one(set, &set->items[i]);

        if (rc < 0) {
            stop_all(set);
            return rc;
        }
        set->running++;
    }
    return 0;
}
