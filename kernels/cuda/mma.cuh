/* The instructions that every product by mma.sync is made of: copies into shared memory in the
 * background, matrices from there into registers, 16 x 8 x 16 products in bfloat16 with float32
 * sums. Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16": lane l holds of a 16 x 8
 * result the columns 2 (l % 4) + {0, 1} of row l / 4 (elements 0, 1) and of row l / 4 + 8 (elements
 * 2, 3). */
#ifndef CLAAS_CUDA_MMA_CUH
#define CLAAS_CUDA_MMA_CUH

#include "cuda/act.cuh"

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory in the background, zeros if not valid (nothing is read then). */
static __device__ __forceinline__ void copy_16(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}
/* The same, where the rest of the surrounding 256 bytes will be wanted soon. */
static __device__ __forceinline__ void copy_16_of_many(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}

static __device__ __forceinline__ void copies_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Waits until all of this thread's groups of copies but the last PENDING have arrived; a barrier
 * then makes them visible to all threads. */
template <int PENDING> static __device__ __forceinline__ void copies_wait_but(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
static __device__ __forceinline__ void copies_wait(void)
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}
static __device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const bf16 *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

/* c (16 x 8) += a (16 x 16) b (16 x 8). */
static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
