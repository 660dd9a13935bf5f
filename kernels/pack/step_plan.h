/* The rows of a training step in order, for every back-end: which sequences go together, where
 * their tokens lie, which positions are trained. Host code; nothing here is about a device,
 * adapters are opaque.
 *
 * A *pack* is rows (tokens) of several sequences side by side. A *batch* is a pack of whole
 * sequences with key/value blocks of its own; its size bounds the memory of a step. Prompts are
 * shared: rows of one adapter with the same prompt make a *family*, whose prompt is one run of the
 * pack and whose responses are branches that continue it. */
#ifndef CLAAS_PACK_STEP_PLAN_H
#define CLAAS_PACK_STEP_PLAN_H

#include "engine/backend.h"

/* Consecutive rows under one adapter (NULL = base). */
struct claas_pack_group {
    int first, count;
    const claas_backend_adapter_t *adapter;
};
/* Consecutive rows that are consecutive positions of one sequence. */
struct claas_pack_run {
    int first, count, pos;
    const int32_t *blocks; /* of positions 0 … pos+count-1 */
    int parent;            /* the run that holds positions 0 … pos-1 in the same pack, or -1 */
};
/* The keys and values of these rows are also written to `block`: the last block of a prompt, partly
 * filled, that several branches continue, each in a copy of its own. */
struct claas_pack_copy {
    int first, count;
    int32_t block;
};
struct claas_pack {
    int m;                          /* rows */
    int32_t *tokens, *pos, *blocks; /* [m]; blocks: the one that holds the row's position */
    int group_count, run_count, copy_count;
    struct claas_pack_group *groups;
    struct claas_pack_run *runs;
    struct claas_pack_copy *copies;
    const int32_t *tail; /* [tail_count]: the rows whose results are wanted, increasing */
    int tail_count;
};

/* A row of the request as one side (student, teacher, base) sees it. */
struct claas_plan_seq {
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

struct claas_plan_batch {
    struct claas_pack pack;
    int block_count;  /* key/value blocks that it uses, numbered from 0 */
    int first, count; /* sequences of the side's list */
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
struct claas_plan_side {
    struct claas_plan_seq
        *seqs; /* ordered: adapter, family, row; only rows with a trained position */
    int seq_count;
    struct claas_plan_batch *batches;
    int batch_count;
};

/* Rows that learn together: one adapter (or, when evaluating, the base model). */
struct claas_plan_learner {
    claas_backend_adapter_t *adapter;
    int tokens, rows; /* trained positions; rows */
    float *grad;      /* set by the back-end: its gradient */
    double norm;      /* likewise: the gradient's norm */
};

/* What a trained position needs beside its logits. */
struct claas_plan_position {
    int row, learner;
    int32_t token;
    float rollout; /* log-prob at sampling; NAN when not given */
    float weight;  /* of its loss in the learner's loss */
    bool teacher;  /* false: no teacher was given, the student stands in */
};

struct claas_plan {
    const struct claas_backend_train *request;
    /* The teacher's side has no batches where another request left its rows
     * (claas_backend_train.kept). */
    struct claas_plan_side student, teacher, base;
    /* The rows of the student's and of the teacher's only batch side by side, the student's first,
     * in one batch for the way forward; or no batch, where the limits leave them apart. */
    struct claas_plan_side joint;
    struct claas_plan_learner *learners;
    int learner_count;
    struct claas_plan_position
        *positions; /* [position_count], numbered along the student's sequences */
    int position_count;
};

/* The most tokens of a batch (a longer sequence is a batch by itself): train_tokens where
 * activations are kept for the way back, else infer_tokens. mixed: a student's batch may hold rows
 * of several adapters, whose gradients the back-end keeps apart. Without it an adapter's gradients
 * are summed in batches of its own, and so are the same whatever else is in the step. joint_tokens:
 * the most of student and teacher together that go forward in one batch; 0 = they never do. */
struct claas_plan_limits {
    int train_tokens, infer_tokens;
    bool mixed;
    int joint_tokens;
};
/* Checks the request and orders it. INVALID, LIMIT (a row longer than the context), NO_MEMORY. */
int claas_plan_new(const struct claas_model_config *config,
                   const struct claas_backend_train *request,
                   const struct claas_plan_limits *limits, struct claas_plan *ret);
void claas_plan_done(struct claas_plan *plan);
/* Takes the joint batch apart again: its two batches do as well. */
void claas_plan_part(struct claas_plan *plan);

/* From results [position_count]: fills ret->rows [row_count], which the caller allocated, and the
 * step's loss, tokens, max_ratio_error and finite (of the losses). */
void claas_plan_collect(const struct claas_plan *plan, const struct claas_loss_result *results,
                        struct claas_train_result *ret);

#endif
