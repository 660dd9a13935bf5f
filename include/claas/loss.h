/* The SDPO loss of one response position, with its gradient, in float32 (sums in fixed order).
 *
 * Symbols: student logits z in R^V, S = softmax(z); teacher T = softmax(teacher logits), a
 * constant; y the sampled token; o its rollout log-prob; b its log-prob under the frozen base.
 * tests/kernels/test_loss.c compares it with golden values.
 *
 *   divergence D   alpha = 0: KL(T||S) (forward, mass covering); alpha = 1: KL(S||T) (reverse);
 *                  else the generalised Jensen-Shannon divergence
 *                  (1-alpha) KL(S||M) + alpha KL(T||M), M = (1-alpha) S + alpha T
 *   ratio          rho = min(exp(clamp(log S_y - o, +-20)), is_clip), detached
 *   KL to base     k3 estimate with x = clamp(b - log S_y, +-20): exp(x) - 1 - x
 *   loss           rho * D + kl_weight * k3
 */
#ifndef CLAAS_LOSS_H
#define CLAAS_LOSS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum claas_loss_variant {
    CLAAS_LOSS_FULL,              /* over the whole vocabulary */
    CLAAS_LOSS_STUDENT_TOPK_TAIL, /* the student's top K and one tail bucket */
    CLAAS_LOSS_TEACHER_TOPK, /* the Python system's: both renormalised over the teacher's top K, no
                              * tail; alpha = 1 is its token form with the floor of -20 */
};

struct claas_loss_config {
    enum claas_loss_variant variant;
    float alpha;       /* [0, 1] */
    int top_k;         /* K of the top-K variants; clamped to V */
    float is_clip;     /* cap of the importance ratio; 0 = no ratio (rho = 1) */
    float kl_weight;   /* weight of the k3 term; 0 = no base pass is needed */
    bool reference_k3; /* the Python system's sign (x = log S_y - b), for parity only */
    bool sample_mean;  /* mean over samples of their token means (the Python system); else mean over
                          all tokens */
};

struct claas_loss_row {
    const float *student_logits; /* [V] */
    const float *teacher_logits; /* [V], or NULL when teacher_ids is given */
    /* [teacher_count]: a remote teacher's top K, best first (TEACHER_TOPK only) */
    const int32_t *teacher_ids;
    const float *teacher_logprobs;
    int teacher_count;
    int32_t token;         /* y */
    float rollout_logprob; /* o; NAN: none, rho = 1 */
    float base_logprob;    /* b; read only if kl_weight > 0 */
};

struct claas_loss_result {
    float loss;       /* rho * D + kl_weight * k3 */
    float divergence; /* D, before the ratio */
    float ratio;      /* rho */
    float clipped;    /* 1 if rho reached is_clip */
    float kl_base;    /* k3 */
    float logprob;    /* log S_y at temperature 1 over the whole vocabulary */
    float entropy;    /* of S */
    float forward_kl; /* KL(T||S), whole vocabulary; NAN if the teacher gave only its top K */
};

/* INVALID, with a sentence, for a configuration that no row can be computed with. Any thread. */
int claas_loss_check(const struct claas_loss_config *config);

/* Loss of one row; when `grad` is not NULL, grad[v] = weight * d loss / d z_v for all v (every
 * element written; it may be student_logits itself, which then are overwritten). `scratch`:
 * claas_loss_scratch_floats(vocab) floats, 64-byte aligned; grad may be NULL. Returns 0, or
 * CLAAS_ERR_INVALID for a bad configuration. Non-finite inputs give non-finite results, which the
 * caller checks. Any thread. */
int claas_loss_row(const struct claas_loss_config *config, int vocab,
                   const struct claas_loss_row *row, float weight, float *grad, float *scratch,
                   struct claas_loss_result *ret);
size_t claas_loss_scratch_floats(int vocab);

/* log sum exp of a row of logits: the one routine behind every log-prob in the system, so that the
 * sampler's and the trainer's agree bit for bit. Same bits for the same row whatever its
 * alignment. */
float claas_logsumexp(const float *logits, int vocab);

#ifdef __cplusplus
}
#endif
#endif
