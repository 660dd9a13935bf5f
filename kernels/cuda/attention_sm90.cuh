/* What attention's two files for sm_90a share: tiles in the layout of wgmma.cuh, filled and emptied
 * by all COPIERS threads of a block. */
#ifndef CLAAS_CUDA_ATTENTION_SM90_CUH
#define CLAAS_CUDA_ATTENTION_SM90_CUH

#include "cuda/attention_tiles.cuh"

/* The order in which windows of queries are taken: the longest walks first, because a block that
 * begins one last is waited for by the whole card. Runs of a pack are often equally long, so
 * windows at one place of every `period` go together, the last place first. */
struct wide_order {
    int windows, period, rounds;
};

/* Windows of `queries` rows in a pack whose longest run has `longest`. */
static inline struct wide_order wide_order_of(const struct cuda_attention *a, int queries)
{
    struct wide_order order;
    int period = (a->longest + queries / 2) / queries;

    order.windows = (a->m + queries - 1) / queries;
    order.period = period < 1 ? 1 : period < order.windows ? period : order.windows;
    order.rounds = (order.windows + order.period - 1) / order.period;
    return order;
}

/* The grid: kv heads, times places in the order. Some places have no window. */
static inline dim3 wide_grid(const struct wide_order &order, const struct cuda_attention *a)
{
    return dim3((unsigned)a->kv_heads, (unsigned)(order.period * order.rounds));
}

/* The window at a place; order.windows or more: none. */
static __device__ __forceinline__ int wide_window(const struct wide_order &order, int place)
{
    const int at = place / order.rounds, round = place - at * order.rounds;

    return round * order.period + order.period - 1 - at;
}

/* Waits until all copies but those of the last PENDING groups have arrived (0: those that are in no
 * group yet, too), and makes them visible to the products of all threads. */
template <int PENDING> static __device__ __forceinline__ void wide_arrived(void)
{
    if (PENDING == 0)
        copies_wait();
    else
        copies_wait_but<PENDING>();
    wgmma_publish();
    __syncthreads();
}

/* How a block's threads share the copy of a tile: a thread takes chunk `chunk` of the rows row, row
 * + step, …; the swizzle of them is one, since step is a multiple of 8. */
template <int D, int COPIERS> struct wide_share {
    static const int chunks = D / 8, step = COPIERS / chunks;

    static __device__ __forceinline__ int chunk(void)
    {
        return (int)threadIdx.x % chunks;
    }
    static __device__ __forceinline__ int row(void)
    {
        return (int)threadIdx.x / chunks;
    }
};

/* Starts the copy of the keys (or values, `base`) at positions first … first+ROWS-1; zeros beyond
 * `last`. */
template <int D, int ROWS, int COPIERS>
static __device__ __forceinline__ void wide_keys(bf16 *tile, const struct attn_keys<bf16> &keys,
                                                 const bf16 *base, int first, int last)
{
    using share = wide_share<D, COPIERS>;
    const int chunk = share::chunk(), row = share::row();
    bf16 *to = tile + wgmma_place<ROWS>(row, chunk);

    base += 8 * chunk;
    first += row;
    if (keys.table) {
#pragma unroll 4
        for (int i = 0; i < ROWS / share::step; i++) {
            const int p = first + i * share::step;

            copy_16(to + i * share::step * 64, base + attn_key_at(keys, min(p, last)), p <= last);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < ROWS / share::step; i++) {
        const int p = first + i * share::step, at = min(p, last);
        const int from = at + (at < keys.pos ? keys.parent : keys.own - keys.pos);

        copy_16(to + i * share::step * 64, base + (size_t)from * keys.stride, p <= last);
    }
}

/* r / group = r inverse >> 16, for r < 128 and group <= 64. */
static __device__ __forceinline__ int wide_inverse(int group)
{
    return (65535 + group) / group;
}

/* Starts the copy of `count` rows with the heads of a group: tile row i*group + h is head h of
 * matrix row first+i, at `base` + row*ld + h*D. Zeros beyond, up to ROWS rows. */
template <int D, int ROWS, int COPIERS>
static __device__ __forceinline__ void wide_rows(bf16 *tile, const bf16 *base, size_t ld, int first,
                                                 int count, int group, int inverse)
{
    using share = wide_share<D, COPIERS>;
    const int chunk = share::chunk(), row = share::row();
    bf16 *to = tile + wgmma_place<ROWS>(row, chunk);

    base += (size_t)first * ld + (size_t)(8 * chunk);
#pragma unroll
    for (int j = 0; j < ROWS / share::step; j++) {
        const int r = row + j * share::step;
        const bool valid = r < count * group;
        const int i = valid ? r * inverse >> 16 : 0, h = valid ? r - i * group : 0;

        copy_16(to + j * share::step * 64, base + (size_t)i * ld + (size_t)(h * D), valid);
    }
}

#endif
