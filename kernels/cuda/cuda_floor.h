/* The card's own limits, measured: claas_backend_ops.floor of the CUDA back-end. */
#ifndef CLAAS_CUDA_CUDA_FLOOR_H
#define CLAAS_CUDA_CUDA_FLOOR_H

#include "engine/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Takes 2.4 GB of the device for about a second. */
int cuda_floor(const struct claas_backend_options *options, struct claas_device_floor *ret);

#ifdef __cplusplus
}
#endif
#endif
