/* Where the elements of a tile in shared memory lie: bf16 [rows][D], D a multiple of 64. Its
 * 16-byte chunks are swizzled: chunk c of row r lies at c ^ (r % 8), so that the eight rows an
 * ldmatrix reads at one chunk fall into eight different groups of four banks. A tile of 64 columns
 * lies as the products of warpgroups want it, too; a wider one does in panels (wgmma.cuh). */
#ifndef CLAAS_CUDA_TILES_CUH
#define CLAAS_CUDA_TILES_CUH

#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

/* Element of chunk `chunk` (8 elements) of a row. PANEL: rows of a tile that lies in panels of 64
 * columns; 0: of one whose rows lie whole. */
template <int D, int PANEL = 0> static __device__ __forceinline__ int place(int row, int chunk)
{
    return PANEL > 0 ? wgmma_place<PANEL>(row, chunk) : row * D + ((chunk ^ (row & 7)) << 3);
}

#endif
