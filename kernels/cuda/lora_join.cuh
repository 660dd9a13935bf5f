/* LoRA beside a frozen product of few rows, in the product's own launch (gemm_few.cu); the
 * arithmetic is lora_few.cuh's.
 *
 * The grid's first blocks make S (lora_shrink.cuh), each its slabs, or four together their parts of
 * them. S itself says what is there: an element is CUDA_LORA_MISSING until it is stored, which
 * happens once.
 *
 * The product's blocks do their sums meanwhile. Towards the end of k their ring has room for the
 * rows of B that meet the block's columns (the first ones may have room of their own and come at
 * the beginning), and for S, which is asked for whether it is made or not. Behind the sums each
 * thread looks at the pieces of S that it copied, and asks again for those in which something is
 * missing. An element that is there is final and says nothing of others, so neither a fence nor an
 * order of loads is needed. A warp takes the same 32 columns of one tile after another; B too comes
 * as a lane's own pieces.
 *
 * Behind launch_wait the product's blocks make all of the next launch's S missing: the launch that
 * read it, the one before this, is done, and those that store or read it next wait for this launch
 * (cuda_lora.h, struct cuda_lora_pair).
 *
 * Why nothing waits for ever: a product's block waits for blocks of lower number in its own grid,
 * and those wait for none but others of their cluster, all of which run at once. Blocks are handed
 * out in the order of their numbers (which cuBLAS and CUTLASS rely on where they split k), so when
 * one waits the others run or are done; and the blocks that make S need nothing of a block that has
 * no place yet. Kernels before this one are all running when it begins (launch.cuh) and need
 * nothing of it; later ones begin when all of its blocks run. */
#ifndef CLAAS_CUDA_LORA_JOIN_CUH
#define CLAAS_CUDA_LORA_JOIN_CUH

#include "cuda/launch.cuh"
#include "cuda/lora_few.cuh"

/* --- who has what --- */

#define LORA_WARPS   8 /* of a block, and at least as many as there are chunks */
#define LORA_THREADS (32 * LORA_WARPS)
#define LORA_LINES   64 /* rows of a pack, so tiles too */
#define LORA_NOBODY  0xff
#define LORA_TEAM    4

struct lora_join {
    struct lora_args args;
    bf16 *s;    /* [m][CUDA_LORA_PAIR_LD]; args.s is not used */
    bf16 *next; /* likewise: the next launch's */
    int blocks; /* that make S, the first of the grid: whole clusters */
    int team;   /* of them, that share a slab: 1, or LORA_TEAM of a cluster */
};

/* One tile, as seen by the blocks that make S of all the weight's parts, or by those that add one
 * part. */
struct lora_line {
    const bf16 *from; /* the first row of A, or of B; NULL: the adapter has none */
    int first, count; /* rows of the pack */
    int size;         /* rows of A, or terms of a row of B: the rank */
    int column;       /* of S, which B's first term meets */
};
/* In shared memory. used is counted by halves of the list. */
struct lora_lines {
    struct lora_line line[LORA_LINES];
    int used[2];            /* tiles that there are: the first ones */
    int high[2];            /* whether there are tiles of more than 8 rows */
    uint8_t of[LORA_LINES]; /* the line that a row of the pack has, or LORA_NOBODY */
};

static __device__ __forceinline__ int lora_slabs_of(int width)
{
    return (width + LORA_SLAB - 1) / LORA_SLAB;
}

/* The line of a tile. module: B's, or -1: A. */
static __device__ __forceinline__ void lora_read_line(struct lora_line *line,
                                                      const struct lora_args &args,
                                                      const struct cuda_lora_tile &tile, int module)
{
    if (tile.count == 0)
        return;
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const bf16 *view = (const bf16 *)group->view + (size_t)args.layer * group->layer;
    const int width = group->parts[args.kind] * group->rank;

    line->first = tile.first;
    line->count = tile.count;
    if (module < 0) {
        line->from = width > 0 ? view + group->a[args.kind] : NULL;
        line->size = width;
    } else if (group->index[module] >= 0) {
        line->from = view + group->b[module];
        line->size = group->rank;
        line->column = group->index[module] * group->rank;
    }
}

/* The list is made by the last two warps, since the first ones ask for the product's rows, in
 * steps, so that other copies are asked for while the tiles are on their way: this one, lora_list
 * and lora_list_rows. The pack's description and the adapters were written before a copy to the
 * device, which no early start overtakes: they may be read before launch_wait. */
static __device__ __forceinline__ struct cuda_lora_tile
lora_begin_list(struct lora_lines *lines, const struct lora_args &args)
{
    const int t = (int)threadIdx.x - (LORA_THREADS - LORA_LINES);
    struct cuda_lora_tile tile = {};

    if (t >= 0)
        lines->of[t] = LORA_NOBODY;
    if (t >= 0 && t < args.m)
        tile = args.tiles[t];
    return tile;
}

/* By all threads; a barrier then makes the lines visible to all of them. */
static __device__ __forceinline__ void lora_list(struct lora_lines *lines,
                                                 const struct lora_args &args,
                                                 const struct cuda_lora_tile &tile, int module)
{
    const int t = (int)threadIdx.x - (LORA_THREADS - LORA_LINES);
    struct lora_line line = {};

    if (t < 0)
        return;
    lora_read_line(&line, args, tile, module);
    lines->line[t] = line;
    const unsigned used = __ballot_sync(~0u, line.count > 0);
    const unsigned high = __ballot_sync(~0u, line.count > 8);

    if (t % 32 == 0) {
        lines->high[t / 32] = high != 0;
        lines->used[t / 32] = __popc(used);
    }
}

/* Notes which line each row has. Comes behind that barrier, which separates it from the filling
 * with LORA_NOBODY; the next barrier makes it visible to all threads. The blocks that make S do
 * without. */
static __device__ __forceinline__ void lora_list_rows(struct lora_lines *lines)
{
    const int t = (int)threadIdx.x - (LORA_THREADS - LORA_LINES);

    if (t < 0)
        return;
    const struct lora_line line = lines->line[t];

    for (int row = 0; row < line.count && line.from; row++)
        lines->of[line.first + row] = (uint8_t)t;
}

static __device__ __forceinline__ int lora_used(const struct lora_lines *lines)
{
    return lines->used[0] + lines->used[1];
}

/* --- S (sB)^T --- */

#define LORA_ITEM (32 * 32 * 2) /* bytes of B that a warp takes at a time: 32 columns, 32 terms */

/* The columns of a part that a block of the product stores, and a warp's turn among them: 32
 * columns of every step-th tile. */
struct lora_share {
    int module;
    int first; /* row of the part's B */
    int left;  /* rows of it from there on */
    int width; /* columns: 128 over the size of the cluster */
    int column, step;
};

/* Of `width` columns from column `first` of the weight on, which begin in one part. */
static __device__ __forceinline__ struct lora_share lora_share_of(const struct lora_args &args,
                                                                  int first, int width)
{
    const int warp = (int)threadIdx.x / 32, groups = width > 64 ? 4 : width > 32 ? 2 : 1;
    struct lora_share share = {args.module[0], first, args.part_n[0] - first, width, 0, 0};

    static_assert(LORA_WARPS % 4 == 0, "a warp keeps its columns");
#pragma unroll
    for (int i = 1; i < CUDA_PARTS_MAX; i++)
        if (i < args.part_count && first >= args.row[i]) {
            share.module = args.module[i];
            share.first = first - args.row[i];
            share.left = args.part_n[i] - share.first;
        }
    share.column = warp % groups * 32;
    share.step = LORA_WARPS / groups;
    return share;
}

/* What a warp multiplies next: terms k … k+31 of a tile. */
struct lora_place {
    int tile, k;
};

/* Tiles of adapters without the module are passed over. */
static __device__ __forceinline__ void lora_settle(const struct lora_lines *lines,
                                                   const struct lora_share &share,
                                                   struct lora_place *place)
{
    const int used = lora_used(lines);

    while (place->tile < used && !lines->line[place->tile].from)
        place->tile += share.step;
}
static __device__ __forceinline__ struct lora_place lora_first_place(const struct lora_lines *lines,
                                                                     const struct lora_share &share)
{
    struct lora_place place = {(int)threadIdx.x / 32 / (LORA_WARPS / share.step), 0};

    lora_settle(lines, share, &place);
    return place;
}
static __device__ __forceinline__ void lora_advance(const struct lora_lines *lines,
                                                    const struct lora_share &share, int size,
                                                    struct lora_place *place)
{
    place->k += 32;
    if (place->k < size)
        return;
    place->k = 0;
    place->tile += share.step;
    lora_settle(lines, share, place);
}

/* Starts the copy of B at `place`, if there is any, and moves on. slot: LORA_ITEM bytes. */
static __device__ __forceinline__ void lora_ask_b(const struct lora_lines *lines,
                                                  const struct lora_share &share,
                                                  struct lora_place *place, uint4 *slot)
{
    const int lane = (int)threadIdx.x % 32, term = place->k + 8 * (lane % 4);
    const int column = share.column + lane / 4, columns = min(share.width, share.left) - column;

    if (place->tile >= lora_used(lines))
        return;
    const struct lora_line *line = &lines->line[place->tile];
    const bf16 *from = line->from;
    const int size = line->size, at = (share.first + column) * size + term;

#pragma unroll
    for (int n = 0; n < 4; n++) {
        const bool valid = 8 * n < columns && term < size;

        copy_16(slot + 32 * n + lane, from + (valid ? at + 8 * n * size : 0), valid);
    }
    lora_advance(lines, share, size, place);
}

/* --- S --- */

#define LORA_S_PIECES      (CLAAS_RANK_MAX / 8) /* of 16 bytes, of a row: one part's terms */
#define LORA_S_BYTES(rows) ((rows)*LORA_S_PIECES * 16)
#define LORA_POLLS_MAX     (1u << 26) /* of one waiting thread: half a minute and more */

/* Where the 8 terms `piece` of a row of S lie in shared memory: swizzled so that eight lanes that
 * read four pieces of two rows do not collide. */
static __device__ __forceinline__ int lora_s_at(int row, int piece)
{
    return row * LORA_S_PIECES + (piece ^ (row & 1) << 2);
}

/* Makes the next launch's S missing. By all threads of the product's blocks, behind launch_wait;
 * not by those that make S, of which some leave before. */
static __device__ __forceinline__ void lora_clear_next(const struct lora_join &join)
{
    const int pieces = join.args.m * (CUDA_LORA_PAIR_LD / 8), blocks = (int)gridDim.x - join.blocks;
    const uint32_t word = CUDA_LORA_MISSING * 0x10001u;

#pragma unroll 1 /* hardly ever more than once */
    for (int i = ((int)blockIdx.x - join.blocks) * LORA_THREADS + (int)threadIdx.x; i < pieces;
         i += blocks * LORA_THREADS)
        ((uint4 *)join.next)[i] = make_uint4(word, word, word, word);
}

/* Starts the copy of the rows of S, as they are by now: as many terms as the rank, which is whole
 * pieces of 8 (cuda_lora_layout), and zeros up to a multiple of 32. */
static __device__ __forceinline__ void lora_ask_s(const struct lora_join &join,
                                                  const struct lora_lines *lines, uint4 *s)
{
    for (int i = (int)threadIdx.x; i < join.args.m * LORA_S_PIECES; i += LORA_THREADS) {
        const int row = i / LORA_S_PIECES, piece = i % LORA_S_PIECES, of = lines->of[row];

        if (of == LORA_NOBODY)
            continue;
        const struct lora_line *line = &lines->line[of];
        const bool valid = 8 * piece < line->size;

        if (8 * piece < (line->size + 31) / 32 * 32)
            copy_16(s + lora_s_at(row, piece),
                    join.s + row * CUDA_LORA_PAIR_LD + line->column + (valid ? 8 * piece : 0),
                    valid);
    }
}

/* Whether some of the 8 terms are missing: a half of a word is all ones where that half of ~word is
 * zero. */
static __device__ __forceinline__ bool lora_misses(const uint4 &terms)
{
    const uint32_t words[4] = {terms.x, terms.y, terms.z, terms.w};
    uint32_t found = 0;

    static_assert(CUDA_LORA_MISSING == 0xffff, "ones are missing");
#pragma unroll
    for (int i = 0; i < 4; i++)
        found |= (~words[i] - 0x00010001u) & words[i];
    return (found & 0x80008000u) != 0;
}

/* 8 terms of S as they are now, each of them old or new as a whole. (So does the hardware with two
 * bytes in their place; PTX promises it of stores and loads of one size.) */
static __device__ __forceinline__ uint4 lora_load_s(const bf16 *from)
{
    uint4 terms;

    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(terms.x), "=r"(terms.y), "=r"(terms.z), "=r"(terms.w)
                 : "l"(__cvta_generic_to_global(from))
                 : "memory");
    return terms;
}

/* Waits for all copies of this thread, and until no term of S is missing in those that lora_ask_s
 * started; a barrier then makes S visible to all threads. ROWS: the pack has no more. A piece that
 * was whole at the first look is stored where it was: one way for all. */
template <int ROWS>
static __device__ __forceinline__ void lora_receive_s(const struct lora_join &join,
                                                      const struct lora_lines *lines, uint4 *s)
{
    constexpr int step = LORA_THREADS / LORA_S_PIECES, most = (ROWS + step - 1) / step;
    const int row = (int)threadIdx.x / LORA_S_PIECES, piece = (int)threadIdx.x % LORA_S_PIECES;
    unsigned missing = 0, polls = 0; /* missing: a bit for each piece, as far as is known */
    uint4 terms[most];
    int from[most];

    static_assert(step % 2 == 0, "a thread's pieces are a whole number of rows apart");
    static_assert(most * step <= LORA_LINES, "all rows have a place in the list");
    s += lora_s_at(row, piece);
#pragma unroll
    for (int n = 0; n < most; n++) {
        const int of = lines->of[row + n * step];
        const struct lora_line *line = &lines->line[of == LORA_NOBODY ? 0 : of];

        from[n] = (row + n * step) * CUDA_LORA_PAIR_LD + line->column + 8 * piece;
        if (of != LORA_NOBODY && 8 * piece < line->size)
            missing |= 1u << n;
    }
    copies_wait_but<0>();
#pragma unroll
    for (int n = 0; n < most; n++)
        if (missing >> n & 1)
            terms[n] = s[n * step * LORA_S_PIECES];
    for (;;) {
#pragma unroll
        for (int n = 0; n < most; n++)
            if (missing >> n & 1 && !lora_misses(terms[n])) {
                s[n * step * LORA_S_PIECES] = terms[n];
                missing &= ~(1u << n);
            }
        if (missing == 0)
            break;
        if (++polls == LORA_POLLS_MAX)
            __trap(); /* ends the context: an error instead of a grid that never does */
#pragma unroll
        for (int n = 0; n < most; n++) /* all are on their way before the first is looked at */
            if (missing >> n & 1)
                terms[n] = lora_load_s(join.s + from[n]);
    }
}

/* --- their product --- */

/* sums[row of the pack][column of the share] = S (sB)^T, `pitch` floats apart, for the rows that
 * have a line. The warp's first DEPTH items of B are in its slots, `first` and then `slots`,
 * `stride` pieces apart; `next` is the place behind them. */
template <int DEPTH, bool HIGH>
static __device__ __forceinline__ void
lora_expand(const struct lora_lines *lines, const struct lora_share &share, struct lora_place next,
            const uint4 *s, uint4 *first_slot, uint4 *slots, int stride, float *sums, int pitch)
{
    const int lane = (int)threadIdx.x % 32, row = lane / 4, used = lora_used(lines);
    struct lora_place now = lora_first_place(lines, share);
    int slot = 0;

    while (now.tile < used) {
        const struct lora_line *line = &lines->line[now.tile];
        const int first = line->first + row, size = line->size;
        const bool low = row < line->count, high = HIGH && row + 8 < line->count;
        float *at = sums + first * pitch + share.column + 2 * (lane % 4), sum[4][4] = {};

        do {
            uint4 *item = slot == 0 ? first_slot : slots + (slot - 1) * stride;
            const uint4 none = make_uint4(0, 0, 0, 0), *b = item + lane;
            const int piece = now.k / 8 + lane % 4;
            const uint4 of_low = low ? s[lora_s_at(first, piece)] : none;
            const uint4 of_high = high ? s[lora_s_at(first + 8, piece)] : none;

            copies_wait_but<DEPTH - 1>();
#pragma unroll
            for (int n = 0; n < 4; n++)
                multiply_32(sum[n], of_low, of_high, b[32 * n]);
            lora_ask_b(lines, share, &next, item);
            copies_commit();
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
            lora_advance(lines, share, size, &now);
        } while (now.k > 0);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (share.column + 8 * n >= share.width)
                continue;
            if (low)
                *(float2 *)(at + 8 * n) = make_float2(sum[n][0], sum[n][1]);
            if (high)
                *(float2 *)(at + 8 * pitch + 8 * n) = make_float2(sum[n][2], sum[n][3]);
        }
    }
}

#endif
