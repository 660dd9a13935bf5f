/* Sampling on the device: the rules of cpu/sample.c, row by row. */
#ifndef CLAAS_CUDA_SAMPLE_H
#define CLAAS_CUDA_SAMPLE_H

#include "cuda/context.h"
#include "engine/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills the results of m samples from float32 logits [m][V] on the device. `samples` is the host's;
 * `device_samples` (m of them) is device memory, `staging` pinned host memory for as many. Waits
 * for the stream: this is the pass's one synchronisation. The same request, seed and logits give
 * the CPU's token (but see sample.cu on borders). */
int cuda_sample(struct cuda_context *context, int vocab, int m, const float *logits,
                struct claas_sample *samples, struct claas_sample *staging,
                struct claas_sample *device_samples);

#ifdef __cplusplus
}
#endif
#endif
