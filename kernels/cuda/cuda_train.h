/* The parts of a training step on the device: train.c (the step), space.c (memory), head.c (loss),
 * backward.c (gradients). The order of work is cpu/train.c's; batches are larger, and the host
 * decides once, when it has the losses and the norms of all gradients, whether the step is
 * applied. */
#ifndef CLAAS_CUDA_CUDA_TRAIN_H
#define CLAAS_CUDA_CUDA_TRAIN_H

#include "cuda/cuda_loss.h"
#include "cuda/optimizer.h"
#include "cuda/pass.h"

/* A batch of the plan with its arrays on the device. */
struct cuda_batch {
    const struct claas_plan_batch *plan;
    struct cuda_pack pack;
    const int32_t *tail;         /* [tail_count] */
    const int32_t *scored_tail;  /* [scored_count] */
    const int32_t *scored_token; /* the tokens they predict */
};

/* Memory of a step, placed in the back-end's step region. Kept through the step: */
struct cuda_step_space {
    void *teacher_hidden;                 /* act [positions][D] */
    float *base_logprobs;                 /* [positions] */
    struct cuda_loss_position *positions; /* [positions] */
    struct claas_loss_result *results;    /* [positions] */
    double *parts;                        /* [CUDA_NORM_PARTS] */
    struct cuda_learned *learned;         /* [learners] */
    float *grads;                         /* [sum of the learners' counts] */
    /* of the stage at hand */
    struct cuda_pass pass;
    struct cuda_infer infer;
    void *hidden;            /* act [tail][D]: final norm of an inference batch, or of the
                                teacher's rows of a joint one */
    struct cuda_acts *saved; /* host [L]; student in training */
    bool recompute;          /* all layers but for x_in and x_out share one set of buffers */
    void *tail_x, *tail_attn;
    float *dx;                  /* [m][D]: gradient of the residual stream */
    float *dx_spread;           /* [m][D]: where the tail's rows are spread to */
    void *dy;                   /* act [m][max(D, Nqkv)]: dx rounded, then of q|k|v */
    void *dxn;                  /* act [m][D]: gradient of a norm's output */
    void *dh, *dgu;             /* act [m][F], [m][2F] */
    void *dattn, *dattn_spread; /* act [m][Nq] */
    void *ds;                   /* act [m][lds] */
    float *delta;               /* [m][H] */
    /* the head, in chunks of rows */
    int chunk;
    void *head_x, *head_xn, *head_dxn; /* act [chunk][D] */
    float *head_rstd, *head_dx;        /* [chunk], [chunk][D] */
    float *logits, *teacher_logits;    /* [chunk][V] */
    void *dlogits;                     /* act [chunk][V] */
};

/* Everything of a step. */
struct cuda_step {
    claas_backend_t *backend;
    struct claas_plan plan;
    struct cuda_batch *student, *teacher, *base, *joint; /* as many as the plan's sides have */
    struct cuda_acts *saved;                             /* [L] */
    size_t grad_bytes;                                   /* of all learners */
    int kept_tokens; /* the most tokens of a batch whose activations are kept; a longer one computes
                        its layers twice */
    struct cuda_step_space space;
};

enum cuda_stage { CUDA_STAGE_TEACHER, CUDA_STAGE_BASE, CUDA_STAGE_STUDENT };
/* Makes the region large enough for every stage, if need be by computing all layers twice. enter
 * places one stage's buffers; what is kept through the step stays. */
int cuda_space_reserve(struct cuda_step *step);
void cuda_space_enter(struct cuda_step *step, enum cuda_stage stage);
/* Tokens of a training batch, from the memory that is free besides the gradients' bytes. */
struct cuda_train_tokens {
    int batch; /* limit for the plan's batches, in coarse steps; at least 1,024, even where there is
                  no room for that many activations */
    int kept;  /* how many tokens' activations fit, exactly */
};
int cuda_train_tokens(claas_backend_t *backend, size_t gradients, struct cuda_train_tokens *ret);

/* One layer with the activations in space.saved; the last one's second half for the tail alone. */
int cuda_layer_saved(struct cuda_step *step, const struct cuda_batch *batch, int layer);
/* The loss of a batch's trained positions into space.results; saved: from the last layer's x_out,
 * with the gradient added to space.dx; else from space.hidden. */
int cuda_head(struct cuda_step *step, const struct cuda_batch *batch, bool saved);
/* The most bytes that all chunks of a step's head take of chunk_upload. */
size_t cuda_head_bytes(int positions);
/* Log-probs of a batch's trained tokens, from space.hidden into space.base_logprobs. */
int cuda_head_logprobs(struct cuda_step *step, const struct cuda_batch *batch);
/* Adds to the gradients of the adapters that the pack's groups name. */
int cuda_backward(struct cuda_step *step, const struct cuda_batch *batch);

#endif
