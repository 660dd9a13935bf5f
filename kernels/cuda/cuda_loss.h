/* The SDPO loss of include/claas/loss.h for a chunk of rows on the device. The blocks of a cluster
 * hold a row (wide_rows.cuh). Terms are float32, those of the top K double; the masses of the whole
 * vocabulary are integers, all other sums doubles of fixed order. All pointers are device
 * pointers. */
#ifndef CLAAS_CUDA_CUDA_LOSS_H
#define CLAAS_CUDA_CUDA_LOSS_H

#include "claas/loss.h"
#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a row needs beside its logits. */
struct cuda_loss_position {
    int32_t token;
    float rollout;   /* log-prob at sampling; NAN: none */
    float base;      /* log-prob under the base; read only if kl_weight > 0 */
    float weight;    /* of the row's loss in the gradient */
    int32_t teacher; /* 0: no teacher, the student stands in (divergence NAN) */
};

/* results[rows]; dlogits act [rows][V] gets weight * d loss / d logits (NULL: no gradient).
 * student, teacher: float32 [rows][V]; rows whose position has no teacher do not read `teacher`.
 * Variants FULL, STUDENT_TOPK_TAIL and TEACHER_TOPK (the teacher's top K taken from its logits,
 * lowest index first among equals). */
int cuda_loss(struct cuda_context *context, const struct claas_loss_config *config, int vocab,
              int rows, const float *student, const float *teacher,
              const struct cuda_loss_position *positions, void *dlogits,
              struct claas_loss_result *results);

/* out[i] = log softmax(logits[i])[tokens[i]]; the expression is that of cuda_loss's logprob and of
 * cuda_sample's, so that all agree bit for bit. */
int cuda_logprobs(struct cuda_context *context, int vocab, int rows, const float *logits,
                  const int32_t *tokens, float *out);

#ifdef __cplusplus
}
#endif
#endif
