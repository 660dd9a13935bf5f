/* The gate's probes: questions that have nothing to do with the feedback, and plain English
 * sentences. What the base answers and gives them is measured once per process; each candidate is
 * measured against it. */
#ifndef CLAAS_TRAINER_PROBES_H
#define CLAAS_TRAINER_PROBES_H

#include "generations.h"

#define PROBE_QUESTIONS 6
#define PROBE_SENTENCES 5
#define PROBE_TOKENS    24 /* of an answer */

/* Figures of one model: the base or a candidate. */
struct gate_figures {
    double nll; /* neutral sentences, nats per token */
    double kl; /* KL(base || candidate) on the base's own answers, nats per token; 0 for the base */
    double entropy;     /* on the same answers */
    double short_share; /* share of answers with at most one visible token */
    double distinct2;   /* distinct 2-grams / all 2-grams of the answers */
    double length;      /* mean tokens of an answer */
};

struct probe_waiter;

struct probes {
    struct trainer *trainer;
    struct probe_waiter *waiters;        /* who waits for the base's figures (gate.c) */
    int32_t *questions[PROBE_QUESTIONS]; /* rendered prompts */
    size_t question_counts[PROBE_QUESTIONS];
    int32_t *sentences[PROBE_SENTENCES];
    size_t sentence_counts[PROBE_SENTENCES];
    struct generations *base_answers;
    struct gate_figures base;
    bool measuring, measured;
};

int probes_new(struct trainer *trainer, struct probes **ret);
void probes_free(struct probes **probes);

/* Number of built-in questions that serve as other prompts, and one of them as messages
 * (borrowed). */
size_t probes_other_count(void);
const char *probes_other_question(size_t index);

/* Fills the rows that measure a candidate (NULL = the base): PROBE_SENTENCES neutral rows, then
 * PROBE_QUESTIONS answer rows. Returns how many rows were written (at most PROBE_SENTENCES +
 * PROBE_QUESTIONS). */
size_t probes_rows(const struct probes *probes, claas_adapter_t *candidate,
                   struct claas_train_row *rows);
/* Reads the figures back from the results of these rows. */
void probes_read_rows(const struct claas_train_row_result *results, size_t count,
                      struct gate_figures *figures);
/* The same questions as a set of generations of a candidate, to be started by the caller. */
int probes_generations(const struct probes *probes, claas_adapter_t *candidate,
                       generations_done_fn *done, void *arg, struct generations **ret);
void probes_read_answers(const struct probes *probes, const struct generations *answers,
                         struct gate_figures *figures);
cJSON *gate_figures_json(const struct gate_figures *figures);

#endif
