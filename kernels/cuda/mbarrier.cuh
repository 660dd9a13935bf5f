/* Barriers that count bytes (mbarrier), and stores into another block of the cluster that are
 * counted there (st.async): from sm_90 on. PTX ISA, "mbarrier" and "st.async".
 *
 * The sender does not wait, and what is sent is there when the receiver's barrier has counted it.
 * So there is no fence, which would wait for all of a thread's memory accesses, and no barrier of
 * all blocks. The order:
 *
 *   begin    the receiver's mbarrier_init by one thread; cluster_arrive by all threads of every
 *            block, once the place for what will be sent to the block is free; cluster_wait before
 *            the first push
 *   a phase  the receiver's mbarrier_expect by one thread, before or after the pushes arrive
 *            (without it the phase cannot end); mbarrier_wait, with the phase's parity, by all who
 *            read
 *   end      a block may leave when it has received all that is sent to it; its own pushes need it
 *            no more, since they took their values from registers
 *
 * cluster_arrive is relaxed: mbarrier_init has a fence of its own, and other blocks read nothing
 * else that was written. A place is free when the reads of it are over: reads by the block's
 * threads end at a barrier of the block before cluster_arrive, reads by wgmma at its wait.
 *
 * Below sm_90 the functions are empty; nobody calls them there. */
#ifndef CLAAS_CUDA_MBARRIER_CUH
#define CLAAS_CUDA_MBARRIER_CUH

#include "cuda/mma.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define CLUSTER_ASM(...) (void)0
#endif

#define MBARRIER_BYTES     8
#define MBARRIER_POLLS_MAX (1u << 22) /* each poll waits some microseconds: many seconds */

/* Each phase has one arrival, mbarrier_expect's. The block's other threads may wait on it behind a
 * barrier of the block. */
static __device__ __forceinline__ void mbarrier_init(uint64_t *barrier)
{
    CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier))
                : "memory");
}

/* The arrival: the phase ends when so many bytes have come. */
static __device__ __forceinline__ void mbarrier_expect(uint64_t *barrier, int bytes)
{
    CLUSTER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                    shared_address(barrier)),
                "r"(bytes)
                : "memory");
}

/* Waits until the phase of this parity (0, 1, 0, …) has ended. */
static __device__ __forceinline__ void mbarrier_wait(const uint64_t *barrier, int parity)
{
    uint32_t done = 1, polls = 0;

    do
        CLUSTER_ASM("{\n.reg .pred p;\n"
                    "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                    "selp.u32 %0, 1, 0, p;\n}"
                    : "=r"(done)
                    : "r"(shared_address(barrier)), "r"(parity)
                    : "memory");
    while (!done && ++polls < MBARRIER_POLLS_MAX);
    if (!done)
        __trap(); /* an error that ends the context, instead of a grid that never ends */
}

/* By all threads of a warp together, a wait for each arrival. Threads that have left the kernel are
 * not waited for. */
static __device__ __forceinline__ void cluster_arrive(void)
{
    CLUSTER_ASM("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
static __device__ __forceinline__ void cluster_wait(void)
{
    CLUSTER_ASM("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* This block's number in its cluster. */
static __device__ __forceinline__ int cluster_rank(void)
{
    int rank = 0;

    CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* The address, in block `rank` of the cluster, of what this block has at p. */
static __device__ __forceinline__ uint32_t cluster_address(const void *p, int rank)
{
    uint32_t address = 0;

    CLUSTER_ASM("mapa.shared::cluster.u32 %0, %1, %2;"
                : "=r"(address)
                : "r"(shared_address(p)), "r"(rank));
    return address;
}

/* Sends x to `to`, aligned to 16 bytes (push_8: to 8), and counts it at `barrier`; both are
 * cluster_addresses in one block. */
static __device__ __forceinline__ void push_16(uint32_t to, const float4 &x, uint32_t barrier)
{
    CLUSTER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
                : "memory");
}
static __device__ __forceinline__ void push_8(uint32_t to, float x, float y, uint32_t barrier)
{
    CLUSTER_ASM("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
                "[%0], {%1, %2}, [%3];" ::"r"(to),
                "f"(x), "f"(y), "r"(barrier)
                : "memory");
}

#endif
