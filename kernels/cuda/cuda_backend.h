/* The CUDA back-end's name for the engine; present where CLAAS_CUDA is defined. */
#ifndef CLAAS_CUDA_CUDA_BACKEND_H
#define CLAAS_CUDA_CUDA_BACKEND_H

#include "engine/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const struct claas_backend_ops claas_backend_cuda;
/* claas_device_cards, where there is CUDA. */
int claas_cuda_cards(struct claas_cards *ret);

#ifdef __cplusplus
}
#endif
#endif
