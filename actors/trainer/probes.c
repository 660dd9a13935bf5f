/* The gate's probes: see probes.h. */
#include "probes.h"

#include <stdlib.h>
#include <string.h>

#include "claas/chat_template.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/tokenizer.h"

/* Unrelated to any likely feedback, each with a long enough answer. */
static const char *const questions[PROBE_QUESTIONS] = {
    "What is the capital of France?",    "Explain how rain forms.",
    "Write a short poem about the sea.", "How do I boil an egg?",
    "List three uses of a paper clip.",  "Why is the sky blue?",
};

static const char *const sentences[PROBE_SENTENCES] = {
    "The old library stood at the corner of the street, and every evening its windows were lit.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "She packed a small bag, locked the door behind her, and walked to the station in the rain.",
    "The committee will meet again next month to discuss the budget and the plans for the park.",
    "Many birds fly south in autumn, where the winter is mild and food is easier to find.",
};

/* Other prompts for learning where a preference applies; none of them is a probe of the gate. */
static const char *const other_questions[] = {
    "What is 17 plus 25?",
    "Give me a recipe for pancakes.",
    "Tell me about the planet Mars.",
    "How can I sleep better?",
    "Translate 'good morning' into French.",
    "What should I pack for a trip to the mountains?",
    "Who wrote Romeo and Juliet?",
    "Explain what a computer program is.",
    "Suggest a name for a cat.",
    "What is the difference between a frog and a toad?",
    "Summarize the story of Cinderella.",
    "How do plants make food?",
};

size_t probes_other_count(void)
{
    return CLAAS_COUNT(other_questions);
}

const char *probes_other_question(size_t index)
{
    return other_questions[index % CLAAS_COUNT(other_questions)];
}

void probes_free(struct probes **probes)
{
    if (!*probes)
        return;
    for (int i = 0; i < PROBE_QUESTIONS; i++)
        free((*probes)->questions[i]);
    for (int i = 0; i < PROBE_SENTENCES; i++)
        free((*probes)->sentences[i]);
    generations_free(&(*probes)->base_answers);
    free(*probes);
    *probes = NULL;
}

int probes_new(struct trainer *trainer, struct probes **ret)
{
    const claas_tokenizer_t *tokenizer = claas_model_tokenizer(trainer->model);
    const claas_chat_template_t *chat_template = claas_model_chat_template(trainer->model);
    CLAAS_AUTO(probes_free) struct probes *probes = CLAAS_NEW(struct probes);
    int rc = 0;

    if (!probes)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    probes->trainer = trainer;
    for (int i = 0; rc == 0 && i < PROBE_QUESTIONS; i++) {
        struct claas_chat_message message = {"user", questions[i]};

        rc = claas_chat_template_encode(chat_template, tokenizer, &message, 1, true,
                                        &probes->questions[i], &probes->question_counts[i]);
    }
    for (int i = 0; rc == 0 && i < PROBE_SENTENCES; i++)
        rc = claas_tokenizer_encode(tokenizer, sentences[i], strlen(sentences[i]), false,
                                    &probes->sentences[i], &probes->sentence_counts[i]);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(probes);
    return 0;
}

size_t probes_rows(const struct probes *probes, claas_adapter_t *candidate,
                   struct claas_train_row *rows)
{
    size_t count = 0;

    for (int i = 0; i < PROBE_SENTENCES; i++)
        rows[count++] = (struct claas_train_row){
            .student_prompt = probes->sentences[i],
            .student_count = 1,
            .response = probes->sentences[i] + 1,
            .response_count = probes->sentence_counts[i] - 1,
            .student = candidate,
        };
    for (int i = 0; i < PROBE_QUESTIONS; i++) {
        const struct generation *answer = &probes->base_answers->items[i];

        rows[count++] = (struct claas_train_row){
            .student_prompt = probes->questions[i],
            .student_count = probes->question_counts[i],
            .teacher_prompt = probes->questions[i],
            .teacher_count = candidate ? probes->question_counts[i] : 0,
            .response = answer->tokens,
            .response_count = answer->count,
            .student = candidate,
        };
    }
    return count;
}

void probes_read_rows(const struct claas_train_row_result *results, size_t count,
                      struct gate_figures *figures)
{
    double nll = 0, kl = 0, entropy = 0;
    int neutral = 0, answered = 0;

    for (size_t i = 0; i < count; i++) {
        const struct claas_train_row_result *row = &results[i];

        if (i < PROBE_SENTENCES) {
            nll -= (double)row->logprob * row->tokens;
            neutral += row->tokens;
        } else {
            kl += (double)row->forward_kl * row->tokens;
            entropy += (double)row->entropy * row->tokens;
            answered += row->tokens;
        }
    }
    figures->nll = neutral ? nll / neutral : 0;
    figures->kl = answered ? kl / answered : 0;
    figures->entropy = answered ? entropy / answered : 0;
}

int probes_generations(const struct probes *probes, claas_adapter_t *candidate,
                       generations_done_fn *done, void *arg, struct generations **ret)
{
    int rc = generations_new(probes->trainer, PROBE_QUESTIONS, PROBE_TOKENS, done, arg, ret);

    for (int i = 0; rc == 0 && i < PROBE_QUESTIONS; i++) {
        struct generation *item = &(*ret)->items[i];

        item->prompt = probes->questions[i];
        item->prompt_count = probes->question_counts[i];
        item->adapter = candidate;
        item->temperature = 0;
        item->seed = (uint64_t)i;
    }
    return rc;
}

static int compare_pairs(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Distinct 2-grams over all answers together, as a share of all 2-grams; 1 when there are none. */
static double distinct_pairs(const struct generations *answers)
{
    uint64_t pairs[PROBE_QUESTIONS * PROBE_TOKENS];
    size_t count = 0, distinct = 0;

    for (size_t i = 0; i < answers->count; i++) {
        const struct generation *item = &answers->items[i];

        for (size_t t = 1; t < item->count && count < CLAAS_COUNT(pairs); t++)
            pairs[count++] =
                ((uint64_t)(uint32_t)item->tokens[t - 1] << 32) | (uint32_t)item->tokens[t];
    }
    if (count == 0)
        return 1;
    qsort(pairs, count, sizeof(pairs[0]), compare_pairs);
    for (size_t i = 0; i < count; i++)
        distinct += i == 0 || pairs[i] != pairs[i - 1];
    return (double)distinct / (double)count;
}

void probes_read_answers(const struct probes *probes, const struct generations *answers,
                         struct gate_figures *figures)
{
    const claas_tokenizer_t *tokenizer = claas_model_tokenizer(probes->trainer->model);
    size_t tokens = 0, empty = 0;

    for (size_t i = 0; i < answers->count; i++) {
        const struct generation *item = &answers->items[i];
        size_t visible = 0;

        for (size_t t = 0; t < item->count; t++)
            visible += !claas_tokenizer_is_control(tokenizer, item->tokens[t]);
        tokens += item->count;
        empty += visible <= 1;
    }
    figures->short_share = (double)empty / (double)answers->count;
    figures->length = (double)tokens / (double)answers->count;
    figures->distinct2 = distinct_pairs(answers);
}

cJSON *gate_figures_json(const struct gate_figures *figures)
{
    cJSON *json = cJSON_CreateObject();

    claas_json_set_number(json, "nll", figures->nll);
    claas_json_set_number(json, "kl", figures->kl);
    claas_json_set_number(json, "entropy", figures->entropy);
    claas_json_set_number(json, "short_share", figures->short_share);
    claas_json_set_number(json, "distinct2", figures->distinct2);
    claas_json_set_number(json, "length", figures->length);
    return json;
}
