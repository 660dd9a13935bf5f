/* The table of RoPE angles, which every back-end takes from here so that all have the same bits. */
#ifndef CLAAS_CPU_ROPE_H
#define CLAAS_CPU_ROPE_H

#include "claas/model.h"
#include "cpu/pool.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cos and sin of pos * frequency, [context][head_dim/2][2], computed in double; scaled for YaRN. */
void claas_cpu_rope_table(const struct claas_model_config *config, claas_pool_t *pool, float *out);

#ifdef __cplusplus
}
#endif
#endif
