/* The card's own limits, measured: the peak that shares of the peak refer to. */
#ifndef CLAAS_CUDA_CUDA_FLOOR_H
#define CLAAS_CUDA_CUDA_FLOOR_H

#include "claas/device.h"
#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Takes 2.4 GB of the device for about a second. */
int cuda_floor(enum cuda_type act, struct claas_device_floor *ret);

#ifdef __cplusplus
}
#endif
#endif
