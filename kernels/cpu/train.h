/* The parts of a training step on the CPU: plan.c (which rows go together), space.c (memory),
 * head.c (loss), backward.c (gradients), train.c (the step). A *batch* is a pack of whole sequences
 * with key/value blocks of its own; its size bounds the memory of a step.
 *
 * Prompts are shared: rows of one adapter with the same prompt make a *family*, whose prompt is one
 * run of the pack and whose responses are branches that continue it. */
#ifndef CLAAS_CPU_TRAIN_H
#define CLAAS_CPU_TRAIN_H

#include "cpu/step.h"

/* A row of the request as one side (student, teacher, base) sees it. */
struct cpu_seq {
    const int32_t *prompt, *response;
    const uint8_t *mask;
    const claas_backend_adapter_t *adapter;
    int prompt_count;
    int response_count; /* up to the last trained token: what follows cannot matter */
    int row;            /* in the request */
    int family;         /* equal for rows of one adapter and prompt, which are neighbours */
    int scored;         /* number of its first trained position among all of the step */
    int trained;        /* trained positions */
};

struct cpu_batch {
    struct cpu_pack pack;
    int block_count;
    int first, count; /* sequences of the plan's list */
    /* Trained positions, in the order of the sequences. */
    int scored_count;
    int32_t *scored_row;   /* the pack row that predicts the token */
    int32_t *scored_tail;  /* its place in `tail` */
    int32_t *scored_index; /* its number among all trained positions of the step */
    int32_t *tail;         /* the rows named by scored_row, once each, increasing */
    int tail_count;
    int longest; /* positions of the longest sequence that continues a shared prompt; 0 if none */
    int32_t *memory; /* all arrays of int32 above */
    void *records;   /* groups, runs, copies */
};

/* One side of the step. */
struct cpu_side {
    struct cpu_seq *seqs; /* ordered: adapter, family, row; only rows with a trained position */
    int seq_count;
    struct cpu_batch *batches;
    int batch_count;
};

/* Rows that learn together: one adapter (or, when evaluating, the base model). */
struct cpu_learner {
    claas_backend_adapter_t *adapter;
    int tokens, rows; /* trained positions; rows */
    float *grad;      /* [layout.count] */
    double norm;
};

/* What a trained position needs beside its logits. */
struct cpu_position {
    int row, learner;
    int32_t token;
    float rollout; /* log-prob at sampling; NAN when not given */
    float weight;  /* of its loss in the learner's loss */
    bool teacher;  /* false: no teacher was given, the student stands in */
};

struct cpu_plan {
    const struct claas_backend_train *request;
    struct cpu_side student, teacher, base;
    struct cpu_learner *learners;
    int learner_count;
    struct cpu_position *positions; /* [position_count], numbered along the student's sequences */
    int position_count;
};
/* Checks the request and orders it. INVALID, LIMIT (a row longer than the context), NO_MEMORY. */
int claas_cpu_plan_new(const claas_backend_t *backend, const struct claas_backend_train *request,
                       struct cpu_plan *ret);
void claas_cpu_plan_done(struct cpu_plan *plan);

/* Memory of a step, placed in the back-end's step region. */
struct cpu_step_space {
    struct cpu_pass pass;
    struct cpu_infer infer;
    void *hidden; /* act [tail][D]: final norm of an inference batch */
    void *kv;
    size_t kv_bytes; /* of one layer */
    /* kept through the step */
    void *teacher_hidden;              /* act [positions][D] */
    float *base_logprobs;              /* [positions] */
    struct claas_loss_result *results; /* [positions] */
    /* The student's batch when it trains. Of the last layer's second half (O, MLP) only the tail's
     * rows are computed, so there, in the head and back through it, rows are numbered along the
     * tail. */
    struct cpu_acts *saved; /* [L] */
    bool recompute;         /* all layers but for x_in and x_out share one set of buffers */
    void *tail_x,
        *tail_attn; /* act [tail][D], [tail][Nq]: the last layer's x_in and attn, gathered */
    struct cpu_group tail_group;
    float *dx;    /* float [m][D]: gradient of the residual stream */
    float *dxn;   /* float [m][D]: gradient of a norm's output */
    float *dwide; /* float [m][max(F, Nqkv)]: gradient of h, then of q|k|v */
    float *dattn; /* float [m][Nq] */
    float *ds;    /* float [m][parts*R] */
    void *ds_act, *dy_act, *dgu, *dattn_act;   /* act: roundings of the above; dgu [m][2F] */
    void *branch_q, *branch_out, *branch_dout; /* act [longest][Nq] */
    float *branch_lse, *branch_d;              /* [longest][H], [longest][Nqkv] */
    /* the head, in chunks of rows */
    int chunk;
    void *head_x, *head_xn;         /* act [chunk][D] before and after the final norm */
    float *head_rstd;               /* [chunk] */
    float *logits, *teacher_logits; /* [chunk][V] */
    void *dlogits;                  /* act [chunk][V] */
    float *head_dxn, *head_dx;      /* [chunk][D] */
    float *grad_row, *loss_scratch; /* per member of the pool */
    size_t scratch_floats;
};

enum cpu_stage { CPU_STAGE_TEACHER, CPU_STAGE_BASE, CPU_STAGE_STUDENT };
/* Makes the back-end's step region large enough for every stage. */
int claas_cpu_space_reserve(claas_backend_t *backend, const struct cpu_plan *plan);
/* After a step: gives an unusually large region back. */
void claas_cpu_space_leave(claas_backend_t *backend);
/* Places a stage's buffers; what is kept stays where it is. */
void claas_cpu_space_enter(claas_backend_t *backend, const struct cpu_plan *plan,
                           enum cpu_stage stage, struct cpu_step_space *space);

/* Loss of a batch's trained positions from the student's hidden rows along the tail: after the
 * final norm in space->hidden (saved = false), or before it in the last layer's x_out, and then
 * with the gradient in space->dx. */
int claas_cpu_head(claas_backend_t *backend, const struct cpu_plan *plan,
                   const struct cpu_batch *batch, struct cpu_step_space *space, bool saved);
/* One layer with the activations in space->saved; the last one's second half for the tail alone. */
int claas_cpu_layer_saved(claas_backend_t *backend, const struct cpu_batch *batch,
                          struct cpu_step_space *space, int layer);
/* Log-probs of a batch's tokens from space->hidden into space->base_logprobs. */
int claas_cpu_head_logprobs(claas_backend_t *backend, const struct cpu_plan *plan,
                            const struct cpu_batch *batch, struct cpu_step_space *space);
/* From space->dx through all layers; adds to `grad` in the masters' layout. */
int claas_cpu_backward(claas_backend_t *backend, const struct cpu_batch *batch,
                       struct cpu_step_space *space, float *grad);

#endif
