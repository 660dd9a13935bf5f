/* The parts of a training step on the CPU: space.c (memory), head.c (loss), backward.c (gradients),
 * train.c (the step). Which rows go together is pack/step_plan.c's. */
#ifndef CLAAS_CPU_TRAIN_H
#define CLAAS_CPU_TRAIN_H

#include "cpu/step.h"

/* Memory of a step, placed in the back-end's step region. Sizes are those of the largest batch of
 * the stage. */
struct cpu_step_space {
    struct cpu_pass pass;
    struct cpu_infer infer;
    void *hidden; /* act [tail][D]: final norm of an inference batch */
    void *kv;
    size_t kv_bytes; /* of one layer's blocks */
    /* kept through the step */
    void *teacher_hidden;              /* act [positions][D] */
    float *base_logprobs;              /* [positions] */
    struct claas_loss_result *results; /* [positions] */
    /* The student's batch when it trains. Of the last layer's second half (O, MLP) only the tail's
     * rows are computed, so there, in the head and back through it, rows are numbered along the
     * tail. */
    struct cpu_acts *saved; /* [L] */
    bool recompute;         /* all layers share one set of buffers, but for x_in and x_out */
    void *tail_x,
        *tail_attn; /* act [tail][D], [tail][Nq]: the last layer's x_in and attn, gathered */
    struct claas_pack_group tail_group;
    float *dx;    /* float [m][D]: gradient of the residual stream */
    float *dxn;   /* float [m][D]: gradient of a norm's output */
    float *dwide; /* float [m][max(F, Nqkv)]: gradient of h, then of q|k|v */
    float *dattn; /* float [m][Nq] */
    float *ds;    /* float [m][parts*R] */
    void *ds_act, *dy_act, *dgu, *dattn_act;   /* act: the above, rounded; dgu [m][2F]: gradient of
                                                  gate|up */
    void *branch_q, *branch_out, *branch_dout; /* act [longest][Nq]: a whole sequence of a branch */
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
int claas_cpu_space_reserve(claas_backend_t *backend, const struct claas_plan *plan);
/* After a step: gives an unusually large region back. */
void claas_cpu_space_leave(claas_backend_t *backend);
/* Places a stage's buffers; what is kept stays where it is. */
void claas_cpu_space_enter(claas_backend_t *backend, const struct claas_plan *plan,
                           enum cpu_stage stage, struct cpu_step_space *space);

/* Loss of a batch's trained positions, from the student's hidden rows along the tail. saved =
 * false: those in space->hidden, after the final norm. saved = true: those of the last layer's
 * x_out, before it; the gradient is then added to space->dx. */
int claas_cpu_head(claas_backend_t *backend, const struct claas_plan *plan,
                   const struct claas_plan_batch *batch, struct cpu_step_space *space, bool saved);
/* One layer with the activations in space->saved; the last one's second half for the tail alone. */
int claas_cpu_layer_saved(claas_backend_t *backend, const struct claas_plan_batch *batch,
                          struct cpu_step_space *space, int layer);
/* Log-probs of a batch's trained tokens, from space->hidden into space->base_logprobs. */
int claas_cpu_head_logprobs(claas_backend_t *backend, const struct claas_plan *plan,
                            const struct claas_plan_batch *batch, struct cpu_step_space *space);
/* Takes space->dx back through all layers; adds to `grad`, in the order of the masters. */
int claas_cpu_backward(claas_backend_t *backend, const struct claas_plan_batch *batch,
                       struct cpu_step_space *space, float *grad);

#endif
