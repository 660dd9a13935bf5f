/* One open learning cycle in the trainer. */
#ifndef CLAAS_TRAINER_CYCLE_H
#define CLAAS_TRAINER_CYCLE_H

#include "forms.h"
#include "generations.h"
#include "probes.h"
#include "staging.h"

#define CYCLE_ITEMS_MAX 272 /* new and replayed feedback */
/* Teacher answers to new feedback kept out of training, and as many to earlier feedback: they score
 * the candidates. */
#define CYCLE_HELD_OUT     4
#define CYCLE_STANDING_MAX 256

/* A feedback with the conversation it is about and the answer as it was sampled. */
struct item {
    cJSON *messages; /* owned copy */
    char *feedback;
    int32_t *prompt, *response;
    float *logprobs; /* [response_count] */
    size_t prompt_count, response_count;
};

enum row_source { ROW_FEEDBACK, ROW_REPLAY, ROW_OTHER, ROW_RECORDED };

/* One row of a step while it is worked on. */
struct step_row {
    enum row_source source;
    enum form form;
    bool from_teacher;
    const int32_t *student_prompt; /* borrowed from the item, or own_prompt */
    size_t student_count;
    int32_t *own_prompt, *teacher_prompt; /* owned */
    size_t teacher_count;
    int max_tokens;             /* of its rollout: what the context leaves of the cycle's */
    uint8_t *mask;              /* owned; NULL = all trained */
    struct generation *rollout; /* NULL for recorded rows */
    const struct item *item;    /* NULL for other rows */
};

struct cycle_step {
    struct cycle *cycle;
    int number;
    bool gate;
    cJSON *asked, *next; /* rows as they came in the request: this step's, and the next one's */
    struct step_row *rows;
    size_t row_count;
    struct generations *rollouts; /* of the rows, then the held-out ones at step 1 */
    bool rolled_out;              /* they have ended, or there were none */
    int rollout_error;
    char *rollout_text;
    struct claas_loss_config loss;
    struct claas_adamw_config adamw;
    cJSON *reply;   /* built up phase by phase */
    int64_t lap_ns; /* when the phase under way began */
    double rollout_ms;
    /* gate phase */
    struct generations *answers;
    struct gate_figures figures;
    int gate_parts; /* evaluation and answers still out */
};

struct cycle {
    struct cycle *next;
    struct trainer *trainer;
    char id[65];
    char lora_id[257];
    uint64_t seed;
    int max_tokens;
    struct item items[CYCLE_ITEMS_MAX];
    size_t item_count, replay_count; /* new ones first, then the replayed ones */
    char *standing[CYCLE_STANDING_MAX];
    size_t standing_count;
    cJSON *recent; /* [[{role, content}]] */
    claas_adapter_t *adapter, *kept;
    int kept_step;
    struct {
        int32_t *student_prompt, *teacher_prompt, *tokens;
        size_t student_count, teacher_count, count;
        bool replay;
    } held_out[2 * CYCLE_HELD_OUT];
    size_t held_out_count;
    struct cycle_step *step;  /* under way */
    struct cycle_step *ahead; /* the one after it: its rollouts are being sampled */
    bool busy;                /* a request is being answered */
    struct claas_reply_to reply_to;
    struct staging *staging; /* of `kept` */
    /* A copy of what the last step made, written while its gate is measured: if that step proves to
     * be the best, its save has begun already. */
    struct {
        claas_adapter_t *adapter; /* NULL: none */
        struct staging *staging;
        int step;
    } last;
};

/* cycle.c */
struct cycle *cycle_find(struct trainer *trainer, const char *id);
void cycle_free(struct cycle *cycle);
/* The open cycle a request names, marked busy with it. */
int cycle_take(struct trainer *trainer, const claas_message_t *message, struct cycle **ret);
/* Answers the request under way with an error; the cycle stays open. */
void cycle_fail(struct cycle *cycle, int code, const char *text);
/* The step under way is the last one and has been trained: copies what it made, where the device
 * can do that without the host, and begins to write it. */
void cycle_last_start(struct cycle *cycle);

/* rows.c: from the message's rows to prompts. */
int step_rows_build(struct cycle *cycle, struct cycle_step *step, const cJSON *rows);
/* Masks thinking spans out of a response. *ret stays NULL when there are none. */
int step_row_mask(const claas_tokenizer_t *tokenizer, const int32_t *tokens, size_t count,
                  uint8_t **ret);
/* Free cycle->step, whose device requests are cancelled, and cycle->ahead. */
void cycle_step_free(struct cycle *cycle);
void cycle_ahead_free(struct cycle *cycle);

/* gate.c */
/* Starts the gate of the step under way, which ends in cycle_step_reply or cycle_step_fail. */
int cycle_gate_start(struct cycle *cycle);
/* Measures the base's figures once; calls back through `done` (0, or an error). */
typedef void base_measured_fn(struct trainer *trainer, void *arg, int error, const char *text);
int base_figures_measure(struct trainer *trainer, base_measured_fn *done, void *arg);
/* Forgets a waiter that goes away. */
void base_figures_forget(struct trainer *trainer, void *arg);

/* cycle_step.c */
/* The end of a step: its reply goes out. */
void cycle_step_reply(struct cycle *cycle);
/* The end of a step by an error. Weights that give no finite values are a result, not an error: the
 * reply says so, and the gate refuses it. */
void cycle_step_fail(struct cycle *cycle, int code, const char *text);
/* Tells the asker which phase begins. Returns how long the one before took, in ms. */
double cycle_step_phase(struct cycle *cycle, const char *phase);
/* How long the phase under way took, for the last one. */
double cycle_step_lap(struct cycle_step *step);

#endif
