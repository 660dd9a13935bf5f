/* Launches that begin while the kernel before them on the stream still ends (programmatic dependent
 * launch, CUDA C++ Programming Guide): a chain of kernels of a few microseconds then loses no time
 * between them, and a kernel can fetch what never changes before it waits.
 *
 * A kernel launched here first does what needs nothing of the work queued before it, calls
 * launch_wait, and only then reads memory that such work writes, or writes memory that such work
 * reads or writes. What it reads must not be declared __restrict__ and const, which would say that
 * nobody writes it while the kernel lives. It calls launch_next when the next kernel may begin to
 * do the same. launch_wait returns when all work queued before is complete and its writes are seen:
 * it waits for the kernel just before, which has itself waited for what was before it.
 *
 * A kernel may also run beside the one before it, if neither touches what the other writes
 * (attention_sm90_bwd.cu, lora_adds.cuh). It works without waiting, on what still older kernels
 * wrote: the one before must have made sure that they were complete, by calling launch_next behind
 * its own launch_wait. At its end one block calls launch_wait all the same, so that whoever waits
 * for this kernel waits for the one before, too.
 *
 * Below sm_90 both functions do nothing and launches are ordinary ones. */
#ifndef CLAAS_CUDA_LAUNCH_CUH
#define CLAAS_CUDA_LAUNCH_CUH

#include "cuda/context.h"

/* The next kernel of the stream may begin, as soon as all blocks have called this (or ended) and it
 * finds room. */
static __device__ __forceinline__ void launch_next(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void launch_wait(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* kernel<<<grid, block, shared, the context's stream>>>(args...), early, in clusters of `cluster`
 * neighbours along the grid's x, a multiple of it: at most 8; below sm_90 1, which is none. */
template <typename... P, typename... A>
static int launch_clusters(struct cuda_context *context, const char *what, void (*kernel)(P...),
                           dim3 grid, dim3 block, size_t shared, int cluster, A... args)
{
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};

    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = context->stream;
    config.attrs = attributes;
    if (cluster > 1) {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = (unsigned)cluster;
        attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
        config.numAttrs = 1;
    }
    if (context->early) {
        cudaLaunchAttribute *early = &attributes[config.numAttrs++];

        early->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early->val.programmaticStreamSerializationAllowed = 1;
    }
    return cuda_check(context, cudaLaunchKernelEx(&config, kernel, P(args)...), what);
}

template <typename... P, typename... A>
static int launch(struct cuda_context *context, const char *what, void (*kernel)(P...), dim3 grid,
                  dim3 block, size_t shared, A... args)
{
    return launch_clusters(context, what, kernel, grid, block, shared, 1, args...);
}

/* Lets a kernel have more than 48 KB of shared memory. *done: an earlier call has. */
template <typename K>
static int allow_shared(struct cuda_context *context, K kernel, size_t bytes, bool *done)
{
    int err = 0;

    if (*done)
        return 0;
    err = cuda_check(
        context,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes),
        "a kernel's shared memory");
    *done = err == 0;
    return err;
}

#endif
