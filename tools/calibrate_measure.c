/* Samples the answers that calibration counts: see calibrate.h. As many run at once as the device
 * decodes together; each answer's seed follows from its number, so a run can be repeated. */
#include <stdlib.h>
#include <string.h>

#include "../actors/trainer/forms.h"
#include "calibrate.h"
#include "claas/buf.h"
#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/tokenizer.h"

#define AT_ONCE         48
#define MAX_TOKENS      64
#define TEMPERATURE     0.7f
#define TOP_P           0.9f
#define STOP_TOKENS_MAX 16

/* Nothing to do with the identity: an answer that shows the name leaks it. */
static const char *const unrelated[CALIBRATE_QUESTIONS] = {
    "What is the capital of Italy?",     "How do I bake bread?", "Explain what an atom is.",
    "Give me a tip for running faster.", "What is 12 times 12?", "Write a sentence about autumn.",
};

/* Answer number n: form, preference (the last one is the leak), question, sample. */
struct task {
    int form, preference, question;
    bool is_leak;
};

struct slot {
    uint64_t id; /* 0 = free */
    struct task task;
    int32_t tokens[MAX_TOKENS];
    size_t count;
};

struct run {
    claas_device_client_t *client;
    const claas_model_t *model;
    int samples;
    struct slot slots[AT_ONCE];
    struct calibration *result; /* counts while it runs */
};

static int total_of(int samples)
{
    return CALIBRATE_FORMS * (CALIBRATE_PREFERENCES + 1) * CALIBRATE_QUESTIONS * samples;
}

static struct task task_at(int number, int samples)
{
    struct task task;
    int rest = number / samples;

    task.question = rest % CALIBRATE_QUESTIONS;
    rest /= CALIBRATE_QUESTIONS;
    task.preference = rest % (CALIBRATE_PREFERENCES + 1);
    task.form = rest / (CALIBRATE_PREFERENCES + 1);
    task.is_leak = task.preference == CALIBRATE_PREFERENCES;
    if (task.is_leak)
        task.preference = 0;
    return task;
}

static int encode(const struct run *run, const struct task *task, int32_t **ret, size_t *ret_count)
{
    const struct preference *preference = &calibrate_preferences[task->preference];
    const char *question =
        task->is_leak ? unrelated[task->question] : preference->questions[task->question];
    CLAAS_AUTO(claas_json_free) cJSON *messages = cJSON_CreateArray();
    cJSON *message = cJSON_CreateObject();
    enum form form = FORM_BRIEF;
    int rc = 0;

    claas_json_set_string(message, "role", "user");
    claas_json_set_string(message, "content", question);
    cJSON_AddItemToArray(messages, message);
    if (task->form > 0)
        rc = form_from_name(calibrate_form_names[task->form], &form);
    if (rc < 0)
        return rc;
    return form_encode(form, messages, &preference->feedback, task->form > 0,
                       claas_model_chat_template(run->model), claas_model_tokenizer(run->model),
                       ret, ret_count);
}

static struct slot *free_slot(struct run *run)
{
    for (size_t i = 0; i < AT_ONCE; i++) {
        if (run->slots[i].id == 0)
            return &run->slots[i];
    }
    return NULL;
}

static int start(struct run *run, struct slot *slot, int number)
{
    CLAAS_AUTO_FREE int32_t *prompt = NULL;
    int32_t stop[STOP_TOKENS_MAX];
    struct claas_generate_request request = {
        .max_tokens = MAX_TOKENS,
        .temperature = TEMPERATURE,
        .top_p = TOP_P,
        .seed = (uint64_t)number + 1,
        .stop_tokens = stop,
        .stop_count = claas_model_stop_tokens(run->model, stop, STOP_TOKENS_MAX),
        .priority = CLAAS_PRIORITY_CHAT,
    };
    int rc;

    slot->task = task_at(number, run->samples);
    slot->count = 0;
    rc = encode(run, &slot->task, &prompt, &request.prompt_count);
    request.prompt = prompt;
    return rc < 0 ? rc : claas_device_generate(run->client, &request, &slot->id);
}

static int finish(struct run *run, struct slot *slot)
{
    CLAAS_AUTO_FREE char *text = NULL;
    const struct task *task = &slot->task;
    size_t length;
    int rc = claas_tokenizer_decode(claas_model_tokenizer(run->model), slot->tokens, slot->count,
                                    true, &text, &length);
    bool met;

    slot->id = 0;
    if (rc < 0)
        return rc;
    met = calibrate_preferences[task->preference].is_met(text);
    if (task->is_leak)
        run->result->leak[task->form] += met;
    else
        run->result->hit[task->form][task->preference] += met;
    return 0;
}

/* The next event: 1 if an answer ended by it. */
static int take_event(struct run *run)
{
    struct claas_device_event event;
    int rc = claas_device_client_wait(run->client, -1, &event);

    if (rc <= 0)
        return rc;
    rc = 0;
    for (size_t i = 0; i < AT_ONCE; i++) {
        struct slot *slot = &run->slots[i];

        if (slot->id != event.id || slot->id == 0)
            continue;
        if (event.kind == CLAAS_EVENT_TOKEN && slot->count < MAX_TOKENS)
            slot->tokens[slot->count++] = event.token;
        else if (event.kind == CLAAS_EVENT_FAILED)
            rc = claas_fail(event.error, "%s", event.text);
        else if (event.kind == CLAAS_EVENT_FINISHED)
            rc = finish(run, slot) < 0 ? CLAAS_ERR_INTERNAL : 1;
        break;
    }
    claas_device_event_done(&event);
    return rc;
}

static int measure(struct run *run, calibrate_progress_fn *progress, void *arg)
{
    int total = total_of(run->samples);
    int started = 0, done = 0;

    while (done < total) {
        struct slot *slot = started < total ? free_slot(run) : NULL;
        int rc;

        if (slot) {
            rc = start(run, slot, started++);
        } else {
            rc = take_event(run);
            done += rc > 0;
        }
        if (rc < 0)
            return rc;
        if (progress)
            progress(arg, done, total);
    }
    return 0;
}

int calibrate_measure(claas_device_t *device, int samples, calibrate_progress_fn *progress,
                      void *arg, struct calibration *ret)
{
    CLAAS_AUTO_FREE struct run *run = CLAAS_NEW(struct run);
    double answers = (double)CALIBRATE_QUESTIONS * samples;
    int rc;

    if (!run)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memset(ret, 0, sizeof(*ret));
    run->model = claas_device_model(device);
    run->samples = samples;
    run->result = ret;
    rc = claas_device_client_new(device, &run->client);
    if (rc == 0)
        rc = measure(run, progress, arg);
    claas_device_client_free(&run->client);
    for (int form = 0; form < CALIBRATE_FORMS; form++) {
        ret->leak[form] /= answers;
        for (int i = 0; i < CALIBRATE_PREFERENCES; i++)
            ret->hit[form][i] /= answers;
    }
    return rc;
}
