/* What the files of the loss share. The way of a row: measure (loss.c) -> a divergence (loss.c for
 * the whole vocabulary, buckets.c for the top-K variants) -> gradient (loss.c). */
#ifndef CLAAS_SDPO_LOSS_PARTS_H
#define CLAAS_SDPO_LOSS_PARTS_H

#include "claas/loss.h"
#include "sdpo/rows.h"

/* A row being worked on. es, et, ids and spare are the scratch: four rows of V elements. */
struct claas_loss_work {
    const struct claas_loss_config *config;
    const struct claas_loss_row *row;
    const struct claas_rows *rows;
    size_t vocab;
    float *es;    /* exp(z - max z) */
    float *et;    /* exp(zt - max zt); undefined without teacher logits */
    int32_t *ids; /* members of the support */
    float *spare; /* a copy without the top K, then the patch */
    float max, max_t;
    double lse, lse_t; /* log sum exp of z and zt */
    struct claas_rows_sums sums;
    double divergence;
};

/* The gradient of D by z, in parts: grad[v] = a x[v] + c es[v]; then patch[k] replaces grad[ids[k]]
 * or is added to it, for k < patches; then at_token is added to grad[token]. All zero: no gradient.
 */
struct claas_loss_slope {
    double a;
    const float *x; /* NULL: only c es */
    double c;
    const int32_t *ids;
    const float *patch;
    size_t patches;
    bool replaces; /* where c es and the patch would be large numbers of opposite sign */
    double at_token;
};

/* Both set work->divergence and fill a zeroed slope. */
void claas_loss_student_topk(struct claas_loss_work *work, struct claas_loss_slope *slope);
void claas_loss_teacher_topk(struct claas_loss_work *work, struct claas_loss_slope *slope);

#endif
