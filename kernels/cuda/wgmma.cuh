/* Products of a warpgroup (four warps, sm_90a): c (64 x N, float32) += a (64 x 16) b (16 x N),
 * bf16, N = 8 to 128, in the background of the threads that ask for them. PTX ISA, "Asynchronous
 * warpgroup level matrix instructions".
 *
 * A tile in shared memory is bf16 [rows][D] in panels of 64 columns, [D / 64][rows][64], aligned to
 * 1024 bytes. The eight 16-byte chunks of a panel's row are swizzled, chunk c of row r at c ^ (r %
 * 8): the hardware's 128-byte swizzle. Such a tile can be
 *
 *   an operand along its columns (c += a b^T over D): 16 columns are 32 bytes further in the panel;
 *     the descriptor's stride is from 8 rows to the next, 1024 bytes
 *   an operand along its rows (c += a b over the rows; "transposed"): 16 rows are 2048 bytes
 *     further; the stride is the same, and the leading dimension from panel to panel
 *
 * A result, and a left operand in registers, lie in each warp as those of mma.sync.m16n8k16 do:
 * warp w of the warpgroup has the rows 16 w … 16 w + 15.
 *
 * Order: what is in registers and shared memory before wgmma_begin is seen by the products after it
 * (data that threads wrote to shared memory: after wgmma_publish and a barrier); wgmma_close ends a
 * group; wgmma_wait<n> returns when all groups but the last n are done, and wgmma_settle then keeps
 * the compiler from having read the results before. */
#ifndef CLAAS_CUDA_WGMMA_CUH
#define CLAAS_CUDA_WGMMA_CUH

#include <cuda_bf16.h>
#include <stdint.h>

/* In code of other kinds than sm_90a these functions have no body: what needs a product of theirs
 * is never run there. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
#define WGMMA_ASM(...) (void)0
#endif

static __device__ __forceinline__ void wgmma_begin(void)
{
    WGMMA_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_close(void)
{
    WGMMA_ASM("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> static __device__ __forceinline__ void wgmma_wait(void)
{
    WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Makes this thread's writes to shared memory visible to products that follow a barrier. */
static __device__ __forceinline__ void wgmma_publish(void)
{
    WGMMA_ASM("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int NT> static __device__ __forceinline__ void wgmma_settle(float (&c)[NT][4])
{
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+f"(c[n][e])::"memory");
}

template <int KT> static __device__ __forceinline__ void wgmma_settle(uint32_t (&a)[KT][4])
{
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            asm volatile("" : "+r"(a[k][e])::"memory");
}

/* Element of chunk `chunk` (8 elements) of a row of a tile of ROWS. */
template <int ROWS> static __device__ __forceinline__ int wgmma_place(int row, int chunk)
{
    return (chunk >> 3) * ROWS * 64 + row * 64 + (((chunk ^ row) & 7) << 3);
}

/* leading: bytes between panels. */
static __device__ __forceinline__ uint64_t wgmma_descriptor(const __nv_bfloat16 *at, int leading)
{
    const uint64_t swizzle_128 = (uint64_t)1 << 62, stride = 1024;
    const uint64_t address = (uint64_t)__cvta_generic_to_shared(at) & 0x3ffff;

    return address >> 4 | (uint64_t)(leading >> 4) << 16 | stride >> 4 << 32 | swizzle_128;
}

/* Columns 16 k … +15 of the tile's rows from `row` on. */
template <int ROWS>
static __device__ __forceinline__ uint64_t wgmma_columns(const __nv_bfloat16 *tile, int row, int k)
{
    return wgmma_descriptor(tile + k / 4 * ROWS * 64 + row * 64 + k % 4 * 16, 16);
}

/* Rows 16 k … +15 of the tile, all columns. */
template <int ROWS>
static __device__ __forceinline__ uint64_t wgmma_rows(const __nv_bfloat16 *tile, int k)
{
    return wgmma_descriptor(tile + k * 16 * 64, ROWS * 64 * (int)sizeof(__nv_bfloat16));
}

#define WGMMA_4(c, n)      "+f"((c)[n][0]), "+f"((c)[n][1]), "+f"((c)[n][2]), "+f"((c)[n][3])
#define WGMMA_8(c, n)      WGMMA_4(c, n), WGMMA_4(c, n + 1)
#define WGMMA_16(c, n)     WGMMA_8(c, n), WGMMA_8(c, n + 2)
#define WGMMA_32(c, n)     WGMMA_16(c, n), WGMMA_16(c, n + 4)
#define WGMMA_REGISTERS_4  "%0, %1, %2, %3"
#define WGMMA_REGISTERS_8  WGMMA_REGISTERS_4 ", %4, %5, %6, %7"
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGISTERS_32                                                                         \
    WGMMA_REGISTERS_16                                                                             \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_64                                                                         \
    WGMMA_REGISTERS_32                                                                             \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* c = a b^T (+ c), both from shared memory along their columns (wgmma_columns). x, y, z: the
 * numbers of the asm's operands behind c's. */
#define WGMMA_NT(tiles, columns, registers, x, y, z, ...)                                          \
    static __device__ __forceinline__ void wgmma_nt(float(&c)[tiles][4], uint64_t a, uint64_t b,   \
                                                    int add)                                       \
    {                                                                                              \
        WGMMA_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %" #z ", 0;\n"                                 \
                  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" registers     \
                  "}, %" #x ", %" #y ", p, 1, 1, 0, 0;\n}"                                         \
                  : __VA_ARGS__                                                                    \
                  : "l"(a), "l"(b), "r"(add));                                                     \
    }
WGMMA_NT(1, 8, WGMMA_REGISTERS_4, 4, 5, 6, WGMMA_4(c, 0))
WGMMA_NT(2, 16, WGMMA_REGISTERS_8, 8, 9, 10, WGMMA_8(c, 0))
WGMMA_NT(4, 32, WGMMA_REGISTERS_16, 16, 17, 18, WGMMA_16(c, 0))
WGMMA_NT(8, 64, WGMMA_REGISTERS_32, 32, 33, 34, WGMMA_32(c, 0))

/* c += a b, a in registers, b from shared memory along its rows (wgmma_rows). */
static __device__ __forceinline__ void wgmma_nn(float (&c)[8][4], const uint32_t (&a)[4],
                                                uint64_t b)
{
    WGMMA_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
              "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_REGISTERS_32 "}, "
              "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
              : WGMMA_32(c, 0)
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}
static __device__ __forceinline__ void wgmma_nn(float (&c)[16][4], const uint32_t (&a)[4],
                                                uint64_t b)
{
    WGMMA_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
              "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_REGISTERS_64 "}, "
              "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
              : WGMMA_32(c, 0), WGMMA_32(c, 8)
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));
}

/* c += a b, both from shared memory, 64 of each: along their columns, or turned, along their rows
 * (wgmma_rows). */
template <bool TURNED_A, bool TURNED_B>
static __device__ __forceinline__ void wgmma_add(float (&c)[8][4], uint64_t a, uint64_t b)
{
    WGMMA_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
              "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_REGISTERS_32
              "}, %32, %33, p, 1, 1, %35, %36;\n}"
              : WGMMA_32(c, 0)
              : "l"(a), "l"(b), "r"(1), "n"((int)TURNED_A), "n"((int)TURNED_B));
}

/* c = a b^T over D columns: 64 rows of a from a_row on, all rows of b; the group stays open. */
template <int D, int A_ROWS, int B_ROWS, int NT>
static __device__ __forceinline__ void wgmma_product_nt(float (&c)[NT][4], const __nv_bfloat16 *a,
                                                        int a_row, const __nv_bfloat16 *b)
{
    static_assert(8 * NT == B_ROWS, "all rows of b");
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_nt(c, wgmma_columns<A_ROWS>(a, a_row, k), wgmma_columns<B_ROWS>(b, 0, k), k > 0);
}

/* c (64 x D) += a (64 x 16 KT, in registers) b, all rows of b; the group stays open. */
template <int B_ROWS, int KT, int NT>
static __device__ __forceinline__ void
wgmma_product_nn(float (&c)[NT][4], const uint32_t (&a)[KT][4], const __nv_bfloat16 *b)
{
    static_assert(16 * KT == B_ROWS, "all rows of b");
#pragma unroll
    for (int k = 0; k < KT; k++)
        wgmma_nn(c, a[k], wgmma_rows<B_ROWS>(b, k));
}

#endif
