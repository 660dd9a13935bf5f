/* Causal attention of decoding: serving's runs of at most 16 rows (queries times heads of a group),
 * bf16, head_dim D = 64 or 128, on any card. Formulas, online softmax, packed heads:
 * attention_fwd.cu.
 *
 * attend_part: the keys of a run are cut into parts of 128 (or 256, …: at most 32 parts) positions;
 *   a block takes one part, each warp 16 keys of every tile of 64 with all 16 rows, and the warps'
 *   results are joined at the end: with each warp's m (of Q K^T, before the scale), l and O,
 *
 *     m = max m_w, l = sum of exp(scale (m_w - m)) l_w, O = sum of exp(scale (m_w - m)) O_w
 *
 *   and O / l is the row's result. 74.5 KB for D = 128, three blocks on an SM. The grid is as large
 *   as the chip holds and walks over (part, run, kv head).
 *
 *   A warp's 16 keys are a block of the pool, which it copies itself, and its tiles are one
 *   sequence, whatever part they are of: while it works on one, the next is on its way, and the one
 *   behind that is asked for as soon as this one's place is free. So the memory has something to do
 *   while warps are joined and stored, and a barrier is met twice a part (once more where rows are
 *   finished) and twice more where the next 32 items are looked up, not at every tile. What the
 *   warps leave for the join lies in their places of the part's last tile, which are as large. Nor
 *   does a tile that has arrived wait for the address of the next: a block looks its runs up 32
 *   items at once, and block numbers a tile ahead.
 *
 *   In decoding of few rows (cuda_attention.finish) it also does what qkv_finish would: each block
 *   normalises and rotates its queries, and the one whose part holds the row's own position makes
 *   that key and value, for its tile and for the cache. All other keys are of earlier passes, so
 *   that the first tiles are fetched before the q|k|v product is done.
 *
 * join_parts: one warp per row and head joins the parts in order, by the same formula.
 *
 * A run's parts follow from that run alone, and rows of a tile do not mix: a row's result never
 * depends on what else is in the pass.
 *
 * Source: flash-decoding (2023). */
#include "cuda/attention_fwd.cuh"
#include "cuda/launch.cuh"
#include "cuda/qkv_head.cuh"

#define PART_ROWS ATTN_PART_ROWS
#define PART_KEYS 128 /* at least */
#define PARTS_MAX 32
/* Rows up to which attend_part finishes q, k and v itself. The launch saved, and keys that need not
 * wait for it, are some 3 us a layer; every part of a row pays its queries again, about 0.3 us more
 * than fetching them, and at 8 rows of 4,096 positions each place on the card gets five items.
 * Predictions; what was measured is in NOTES.md, "Fewer launches at few rows". */
#define FINISH_ROWS 8

struct part_args {
    struct cuda_attention a;
    int group;
    float scale2;                    /* scale log2 e */
    int part_rows, parts_max, items; /* rows of a part; parts of a run; parts of all, at most */
    float *part_out;        /* [run][kv head][part][part_rows][D], not yet divided by the sum */
    float2 *part_stats;     /* the same without D: maximum of the unscaled scores, sum */
    struct cuda_qkv finish; /* if a.finish */
};

/* --- parts of keys --- */

/* log2 of the keys in a part, for a run that ends at `end`. */
static __device__ __forceinline__ int part_shift(int end)
{
    int shift = 7;

    static_assert(PART_KEYS == 1 << 7, "parts of at least 128 keys");
    while (end > PARTS_MAX << shift)
        shift++;
    return shift;
}

/* How many parts a run is done in; 0: it is not done in parts. */
static __device__ __forceinline__ int parts_of(const struct part_args &args,
                                               const struct cuda_attn_run &run)
{
    const int end = run.pos + run.count, shift = part_shift(end);

    if (!attn_in_parts(args.a, args.group, run))
        return 0;
    return (end + (1 << shift) - 1) >> shift;
}

/* A part of a run's keys, for one kv head: what a block works on at a time. */
struct part {
    int first, count, pos, table; /* the run's; count 0: there is no part */
    int g;
    int from, last; /* positions of its keys */
    int slot;       /* where its row 0 is in part_out and part_stats */
};

/* Whether the part has the run's last key; whether it has all of the run's keys. */
static __device__ __forceinline__ bool part_ends(const struct part &part)
{
    return part.last == part.pos + part.count - 1;
}
static __device__ __forceinline__ bool part_is_all(const struct part &part)
{
    return part.from == 0 && part_ends(part);
}

/* The parts among the block's next 32 items, in their order (not every item has one). */
struct part_list {
    struct part parts[32];
    int blocks[ATTN_WARPS][32]; /* number of the block of the pool that is each warp's share of the
                                   part's first tile */
    int count, next;            /* count of parts; the item behind those that were looked up */
};

/* A block's shared memory. */
template <int D> struct part_shared {
    bf16 stages[2][2][ATTN_KEYS * D]; /* tiles by turns: keys, values */
    bf16 q[2][PART_ROWS * D];         /* parts by turns; rows finished here: q[0] */
    float2 stats[ATTN_WARPS][PART_ROWS];
    bf16 own[2 * D]; /* of a row finished here: key, value */
    struct part_list list;
};

static __device__ __forceinline__ int part_slot(const struct part_args &args, int run, int g,
                                                int part, int row)
{
    return ((run * args.a.kv_heads + g) * args.parts_max + part) * args.part_rows + row;
}

/* The number of the block of the pool that is this warp's share of the tile at position `key`; the
 * part's last block if the share lies beyond the part. */
static __device__ __forceinline__ int block_number(const struct part_args &args,
                                                   const struct part &part, int key)
{
    const int row = (int)threadIdx.x / 32 * CUDA_KV_BLOCK;

    return args.a.tables[part.table + min(key + row, part.last) / CUDA_KV_BLOCK];
}

/* The part that an item below args.items is; count 0: its run has no such part. */
static __device__ __forceinline__ struct part part_of(const struct part_args &args, int item)
{
    const int rest = (uint32_t)item / (uint32_t)args.a.kv_heads;
    const int index = (uint32_t)rest / (uint32_t)args.a.run_count;
    const int run_index = rest - index * args.a.run_count;
    const struct cuda_attn_run run = args.a.runs[run_index];
    const int end = run.pos + run.count, shift = part_shift(end);
    struct part part;

    part.first = run.first;
    part.pos = run.pos;
    part.table = run.table;
    part.g = item - rest * args.a.kv_heads;
    part.from = index << shift;
    part.last = min(part.from + (1 << shift), end) - 1;
    part.slot = part_slot(args, run_index, part.g, index, 0);
    /* The last condition always holds. It is there because the answer needs all of the run, so that
     * nothing of the run is still on its way afterwards: tiles that are multiplied later would wait
     * for that. */
    part.count = 0;
    if (attn_in_parts(args.a, args.group, run) && part.from < end && run.first < args.a.m)
        part.count = run.count;
    return part;
}

/* Looks up the block's items from `item` on, 32 at a time (one a lane), until there is a part among
 * them. So all runs come in one round trip to memory, all block numbers in another, and a part's
 * first tile can be asked for without either. All warps find the same; a barrier is needed before
 * and after. */
static __device__ __forceinline__ void list_parts(const struct part_args &args, int item,
                                                  struct part_list &list)
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int step = (int)gridDim.x;
    struct part part;
    uint32_t there = 0;
    int place = 0;

    do {
        const int mine = item + lane * step;

        part = part_of(args, min(mine, args.items - 1));
        there = __ballot_sync(0xffffffffu, mine < args.items && part.count > 0);
        item += 32 * step;
    } while (there == 0 && item < args.items);
    place = __popc(there & ((1u << lane) - 1));
    if (there >> lane & 1) {
        list.blocks[warp][place] = block_number(args, part, part.from);
        if (warp == 0)
            list.parts[place] = part;
    }
    if (threadIdx.x == 0) {
        list.count = __popc(there);
        list.next = item;
    }
}

/* --- tiles, as they are asked for --- */

/* Starts the copy of this warp's 16 keys and values of the tile at position `key`: block `number`
 * of the pool, as it lies there. Zeros beyond position `stored`. */
template <int D>
static __device__ __forceinline__ void load_own_keys(const struct part_args &args, int g, int key,
                                                     int number, int stored,
                                                     bf16 (&stage)[2][ATTN_KEYS * D])
{
    static_assert(ATTN_KEYS / ATTN_WARPS == CUDA_KV_BLOCK, "a warp copies a block of the pool");
    static_assert(PART_ROWS == CUDA_KV_BLOCK, "and leaves as many rows in its place");
    constexpr int chunks = D / 8, rows = 32 / chunks;
    const int lane = (int)threadIdx.x % 32, row = (int)threadIdx.x / 32 * CUDA_KV_BLOCK;
    const size_t head = (size_t)number * (size_t)(2 * args.a.kv_heads) + (size_t)g;
    const bf16 *k = (const bf16 *)args.a.kv + head * (CUDA_KV_BLOCK * D) + lane * 8;
    const bf16 *v = k + (size_t)args.a.kv_heads * (CUDA_KV_BLOCK * D);

#pragma unroll
    for (int i = 0; i < CUDA_KV_BLOCK / rows; i++) {
        const int r = row + lane / chunks + i * rows, to = place<D>(r, lane % chunks);
        const bool valid = key + r <= stored;

        copy_16(stage[0] + to, k + i * rows * D, valid);
        copy_16(stage[1] + to, v + i * rows * D, valid);
    }
}

/* The 16-byte pieces of a part's queries that this thread copies, of every rows-th tile row; at:
 * where they are, from the part's first query and head on, so that divisions are made once. */
template <int D> struct query_pieces {
    static constexpr int chunks = D / 8, rows = ATTN_THREADS / chunks, count = PART_ROWS / rows;
    int at[count];
};

template <int D>
static __device__ __forceinline__ struct query_pieces<D> find_pieces(const struct part_args &args)
{
    typedef struct query_pieces<D> pieces;
    const int row = (int)threadIdx.x / pieces::chunks, chunk = (int)threadIdx.x % pieces::chunks;
    pieces found;

#pragma unroll
    for (int i = 0; i < pieces::count; i++) {
        const int r = row + i * pieces::rows;

        found.at[i] = r / args.group * args.a.ldqkv + r % args.group * D + chunk * 8;
    }
    return found;
}

/* Copies the pieces, to where load_queries would put them. */
template <int D>
static __device__ __forceinline__ void
load_part_queries(const struct part_args &args, const struct part &part,
                  const struct query_pieces<D> &mine, bf16 *q)
{
    const int row = (int)threadIdx.x / mine.chunks, chunk = (int)threadIdx.x % mine.chunks;
    const bf16 *from = (const bf16 *)args.a.qkv + (size_t)part.first * (size_t)args.a.ldqkv +
                       (size_t)(part.g * args.group) * D;

#pragma unroll
    for (int i = 0; i < mine.count; i++) {
        const int r = row + i * mine.rows;
        const bool valid = r < part.count * args.group;

        copy_16(q + place<D>(r, chunk), from + (valid ? mine.at[i] : 0), valid);
    }
}

/* The next tile to ask for: of `part` from position `key` on, or, behind its last, the first of the
 * list's next part. */
template <int D> struct part_walk {
    struct part part;
    int key;
    /* number of the warp's block of the tile, if that is of `part`: read one tile before it is
     * used */
    int number;
    int place;  /* in the list, of the part behind this one */
    bool first; /* nothing has been multiplied yet */
    struct query_pieces<D> mine;
};

/* To the list's next part, if there is one. */
template <int D>
static __device__ __forceinline__ void next_part(struct part_walk<D> &walk,
                                                 const struct part_list &list)
{
    if (walk.place < list.count) {
        walk.part = list.parts[walk.place];
        walk.number = list.blocks[threadIdx.x / 32][walk.place++];
    } else {
        walk.part.count = 0;
    }
    walk.key = walk.part.from;
}

/* Makes the next list if this one has been walked through. All warps come here and see the same. */
template <int D>
static __device__ __forceinline__ void list_more(const struct part_args &args,
                                                 struct part_walk<D> &walk, struct part_list &list)
{
    const int next = list.next; /* before another warp writes it */

    if (walk.place < list.count || next >= args.items)
        return;
    __syncthreads();
    list_parts(args, next, list);
    walk.place = 0;
    __syncthreads();
}

/* Asks for the warp's share of the next tile: a group of copies, an empty one if there is no part
 * left. OWN: the key and value at the row's own position are not in the pool. The number that the
 * tile behind it needs is asked for, too, and nobody waits for it before that tile's turn. */
template <int D, bool OWN>
static __device__ __forceinline__ void
ask_tile(const struct part_args &args, struct part_walk<D> &walk, bf16 (&stage)[2][ATTN_KEYS * D])
{
    const struct part &part = walk.part;

    if (part.count > 0) {
        load_own_keys<D>(args, part.g, walk.key, walk.number,
                         OWN && part_ends(part) ? part.last - 1 : part.last, stage);
        walk.key += ATTN_KEYS;
        if (walk.key <= part.last)
            walk.number = block_number(args, part, walk.key);
    }
    copies_commit();
}

/* The same; but before that, as a group of its own, asks for the queries if the tile begins a part:
 * into q, which the part before the last needs no longer. No other tile uses the stage. */
template <int D, bool OWN>
static __device__ __forceinline__ void ask(const struct part_args &args, struct part_walk<D> &walk,
                                           struct part_shared<D> &shared,
                                           bf16 (&stage)[2][ATTN_KEYS * D], bf16 *q)
{
    if (walk.key > walk.part.last) {
        next_part(walk, shared.list);
        if (!OWN && walk.part.count > 0)
            load_part_queries<D>(args, walk.part, walk.mine, q);
    }
    copies_commit();
    ask_tile<D, OWN>(args, walk, stage);
}

/* --- a part's end --- */

/* Where a warp leaves columns 4 chunk … 4 chunk+3 of a row for the join: the first half of the
 * columns where its keys were, the second where its values were. In elements of the stage. */
template <int D> static __device__ __forceinline__ int left_at(int row, int chunk)
{
    constexpr int half = D / 8;

    return chunk / half * ATTN_KEYS * D + place<D>(row, chunk % half);
}

/* Leaves what the warp has of the part's `used` rows where the other warps can read it. */
template <int D>
static __device__ __forceinline__ void leave_rows(const struct attend_state<D, 1> &state, int used,
                                                  bf16 *stage,
                                                  float2 (&stats)[ATTN_WARPS][PART_ROWS])
{
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;

    __syncwarp(); /* keys and values have been read by all lanes */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = lane / 4 + 8 * half, at = left_at<D>(warp * PART_ROWS + r, lane % 4 / 2);
        const float sum = row_sum(state.sum[0][half]);

        if (r >= used)
            continue;
        if (lane % 4 == 0)
            stats[warp][r] = make_float2(state.max[0][half], sum);
#pragma unroll
        for (int n = 0; n < D / 8; n++) { /* the swizzle is an XOR below the eighth chunk */
            const int to = (at ^ left_at<D>(0, 2 * n % 8)) + left_at<D>(0, 2 * n / 8 * 8);

            *(float2 *)((float *)(stage + to) + lane % 2 * 2) =
                make_float2(state.out[0][n][2 * half], state.out[0][n][2 * half + 1]);
        }
    }
}

/* Joins what the four warps left, in the warps' order, and stores it: as the result if this is the
 * run's only part, else for join_parts. */
template <int D>
static __device__ __forceinline__ void join_warps(const struct part_args &args,
                                                  const struct part &part, const bf16 *stage,
                                                  const float2 (&stats)[ATTN_WARPS][PART_ROWS])
{
    constexpr int chunks = D / 4;

    for (int i = (int)threadIdx.x; i < part.count * args.group * chunks; i += ATTN_THREADS) {
        const int r = i / chunks, chunk = i % chunks;
        float max = -INFINITY, seen = 0, sum = 0;
        float4 value = {};

        for (int w = 0; w < ATTN_WARPS; w++)
            max = fmaxf(max, stats[w][r].x);
        seen = max == -INFINITY ? 0.0f : max;
        for (int w = 0; w < ATTN_WARPS; w++) {
            const float2 s = stats[w][r];
            const float4 out = *(const float4 *)(stage + left_at<D>(w * PART_ROWS + r, chunk));
            const float weight = power_of_2((s.x - seen) * args.scale2);

            sum = fmaf(weight, s.y, sum);
            value.x = fmaf(weight, out.x, value.x);
            value.y = fmaf(weight, out.y, value.y);
            value.z = fmaf(weight, out.z, value.z);
            value.w = fmaf(weight, out.w, value.w);
        }
        if (part_is_all(part)) {
            const size_t at = row_head(args.a, args.group, part.first, part.g * args.group, r);
            const float one = 1.0f / sum;

            *(uint2 *)((bf16 *)args.a.out + at * D + 4 * chunk) = make_uint2(
                pack_pair(value.x * one, value.y * one), pack_pair(value.z * one, value.w * one));
            if (args.a.lse && chunk == 0)
                args.a.lse[at] = max * args.a.scale + logf(sum);
        } else {
            *(float4 *)(args.part_out + (size_t)(part.slot + r) * D + 4 * chunk) = value;
            if (chunk == 0)
                args.part_stats[part.slot + r] = make_float2(max, sum);
        }
    }
}

/* --- rows that are finished here --- */

/* Finishes the queries of a run of one row, into tile rows 0 …, and, if the part has the row's own
 * position, its key and value, into own [2][D] and into the cache. The same bits as qkv_finish's.
 * What they are multiplied by, and where they go, does not change during the pass and is read
 * before launch_wait. */
template <int D>
static __device__ __forceinline__ void finish_row(const struct part_args &args,
                                                  const struct part &part, bf16 *q, bf16 *own)
{
    constexpr int lanes = D / 16, at_once = ATTN_THREADS / lanes, chunks = D / 8;
    const struct cuda_qkv &a = args.finish;
    const bool key = part_ends(part);
    const int heads = args.group + (key ? 2 : 0);
    struct kv_slot slot = {};

    if (key)
        slot = find_slot(a, part.first);
    for (int i = (int)threadIdx.x; i < (PART_ROWS - args.group) * chunks; i += ATTN_THREADS)
        *(uint4 *)(q + place<D>(args.group + i / chunks, i % chunks)) = make_uint4(0, 0, 0, 0);
    for (int first = 0; first < heads; first += at_once) { /* warps whole, for read_head */
        const int i = first + (int)threadIdx.x / lanes, chunk = (int)threadIdx.x % lanes;
        float low[ROW_CHUNK] = {}, high[ROW_CHUNK] = {}, rstd = 0;
        struct head_turn turn = {};
        struct head_place at = {};

        at.row = part.first;
        at.at = chunk * ROW_CHUNK;
        at.q = i < args.group;
        at.k = i == args.group;
        at.here = i < heads;
        at.head = at.q ? part.g * args.group + i : a.heads + (at.k ? 0 : a.kv_heads) + part.g;
        if (at.here && (at.q || at.k))
            load_turn(a, at, part.pos, turn);
        launch_wait();
        rstd = read_head<bf16>(a, at, lanes, low, high);
        if (at.here && (at.q || at.k))
            finish_head(a, at, rstd, turn, low, high);
        if (at.here && at.q) {
            store8<true>(q + place<D>(i, chunk), ROW_CHUNK, low);
            store8<true>(q + place<D>(i, chunk + chunks / 2), ROW_CHUNK, high);
        } else if (at.here) {
            store_halves(own + (at.k ? 0 : D) + at.at, D / 2, low, high);
            store_kv<bf16>(a, at, slot, low, high);
        }
    }
}

/* Puts the row's own key and value into row `row` of its tile, which has arrived without them; by
 * the warp whose row that is. */
template <int D>
static __device__ __forceinline__ void place_own(bf16 (&stage)[2][ATTN_KEYS * D], int row,
                                                 const bf16 *own)
{
    constexpr int chunks = D / 8;
    const int lane = (int)threadIdx.x % 32;

    if (row / CUDA_KV_BLOCK != (int)threadIdx.x / 32)
        return;
    if (lane < 2 * chunks)
        *(uint4 *)(stage[lane / chunks] + place<D>(row, lane % chunks)) =
            *(const uint4 *)(own + lane * ROW_CHUNK);
    __syncwarp();
}

/* --- the walk --- */

/* Asks for the first tile and queries. What describes the pass (runs, block numbers) is there
 * before its first kernel begins, and so are a run's older keys if no other row of the pass writes
 * them. FINISH: that holds, and the run's own keys are not read from the pool at all. */
template <int D, bool FINISH>
static __device__ __forceinline__ void
begin_walk(const struct part_args &args, struct part_walk<D> &walk, struct part_shared<D> &shared)
{
    const struct part &part = walk.part;
    const bool older = args.a.apart && min(part.from + ATTN_KEYS - 1, part.last) < part.pos;

    if (!FINISH && !older)
        launch_wait();
    ask_tile<D, FINISH>(args, walk, shared.stages[0]);
    if (!FINISH) {
        launch_wait();
        if (part.count > 0)
            load_part_queries<D>(args, part, walk.mine, shared.q[0]);
    }
    copies_commit();
}

/* Makes the queries of a part that begins visible to all warps, after its first two tiles have been
 * asked for. For all but a block's first part that was done when the part before it ended. */
template <int D, bool FINISH>
static __device__ __forceinline__ void begin_part(const struct part_args &args,
                                                  const struct part &part, bool first,
                                                  struct part_shared<D> &shared)
{
    if (FINISH)
        finish_row<D>(args, part, shared.q[0], shared.own);
    else if (first)
        copies_wait_but<2>();
    if (FINISH || first)
        __syncthreads();
}

/* The tiles of a part, the first of which is on its way to stage `stage`. While one is multiplied
 * the next of the walk is on its way to the other stage. Returns the last one's. */
template <int D, bool FINISH>
static __device__ __forceinline__ int
attend_tiles(const struct part_args &args, const struct part &part, struct part_walk<D> &walk,
             int turn, int stage, struct part_shared<D> &shared)
{
    const int lane = (int)threadIdx.x % 32, row = (int)threadIdx.x / 32 * CUDA_KV_BLOCK;
    struct attend_state<D, 1> state;
    int position[1][2];

    position[0][0] = position[0][1] = part.pos;
    if (part.count > 1)
        for (int half = 0; half < 2; half++)
            position[0][half] += min((lane / 4 + 8 * half) / args.group, part.count - 1);
    for (int key = part.from; key <= part.last; key += ATTN_KEYS, stage ^= 1) {
        bf16(&tile)[2][ATTN_KEYS * D] = shared.stages[stage];

        __syncwarp(); /* the tile before this one has been read by all lanes */
        ask<D, FINISH>(args, walk, shared, shared.stages[stage ^ 1], shared.q[turn ^ 1]);
        if (key == part.from) {
            begin_part<D, FINISH>(args, part, walk.first, shared);
            attend_begin(state); /* not earlier, so that its registers are free until here */
        }
        walk.first = false;
        copies_wait_but<2>(); /* all but what was asked for last, which is of the next tile */
        __syncwarp();
        if (FINISH && part_ends(part) && part.last - key < ATTN_KEYS)
            place_own<D>(tile, part.last - key, shared.own);
        attend_tile<D, 1, 2>(state, shared.q[turn], 0, tile[0], tile[1], row, key + row, position,
                             true, args.scale2);
    }
    leave_rows<D>(state, part.count * args.group, shared.stages[stage ^ 1][0], shared.stats);
    return stage ^ 1;
}

/* At the first barrier of a part, what the warps left is there; at the second it has been read, its
 * stage is free, and all warps' shares of the next part's queries are there. */
template <int D, bool FINISH>
static __global__ __launch_bounds__(ATTN_THREADS, 3) void attend_part(const struct part_args args)
{
    extern __shared__ __align__(128) unsigned char memory[];
    struct part_shared<D> &shared = *(struct part_shared<D> *)memory;
    struct part_walk<D> walk = {
    };
    struct part part;
    int turn = 0, stage = 0; /* of the part's queries, of its next tile */

    launch_next();
    list_parts(args, (int)blockIdx.x, shared.list);
    __syncthreads();
    walk.first = true;
    walk.mine = find_pieces<D>(args);
    next_part(walk, shared.list);
    part = walk.part;
    begin_walk<D, FINISH>(args, walk, shared);
    while (part.count > 0) {
        list_more(args, walk, shared.list);
        stage = attend_tiles<D, FINISH>(args, part, walk, turn, stage, shared);
        __syncthreads();
        join_warps<D>(args, part, shared.stages[stage][0], shared.stats);
        copies_wait_but<1>(); /* all but the next tile */
        __syncthreads();
        part = walk.part;
        stage ^= 1;
        turn ^= !FINISH;
    }
}

/* Columns of a row that a lane of join_parts has. */
template <int N> struct __align__(4 * N) columns
{
    float at[N];
};

/* Asks for up to JOIN_AT_ONCE parts of a row, from `part` on. slot: that of part 0. */
#define JOIN_AT_ONCE 8
template <int N>
static __device__ __forceinline__ void load_joined(const struct part_args &args,
                                                   struct columns<N> (&to)[JOIN_AT_ONCE], int slot,
                                                   int part, int parts)
{
    const struct columns<N> *from = (const struct columns<N> *)args.part_out + threadIdx.x % 32;

#pragma unroll
    for (int i = 0; i < JOIN_AT_ONCE; i++)
        if (part + i < parts)
            to[i] = from[(size_t)(slot + (part + i) * args.part_rows) * 32];
}

/* Stores a lane's columns of a row, times `factor`. */
template <int N>
static __device__ __forceinline__ void store_joined(const float (&value)[N], float factor, bf16 *to)
{
    const uint32_t first = pack_pair(value[0] * factor, value[1] * factor);

    static_assert(N == 2 || N == 4, "heads of 64 or 128");
    if (N == 4)
        *(uint2 *)to = make_uint2(first, pack_pair(value[N - 2] * factor, value[N - 1] * factor));
    else
        *(uint32_t *)to = first;
}

/* All values of up to JOIN_AT_ONCE parts are asked for at once, and before the maxima and sums that
 * they are weighed by have come. */
template <int D>
static __global__ __launch_bounds__(ATTN_THREADS) void join_parts(const struct part_args args)
{
    constexpr int n = D / 32;
    const int lane = (int)threadIdx.x % 32;
    const int item = (int)(blockIdx.x * ATTN_WARPS + threadIdx.x / 32);
    const int r = item % args.part_rows, rest = item / args.part_rows;
    const int g = rest % args.a.kv_heads, run_index = rest / args.a.kv_heads;
    const int slot = part_slot(args, run_index, g, 0, r);
    float2 own = make_float2(-INFINITY, 0);
    float max = 0, weight = 0, sum = 0, value[n] = {};
    struct columns<n> out[JOIN_AT_ONCE];
    struct cuda_attn_run run;
    int parts = 0;

    launch_next();
    if (run_index >= args.a.run_count)
        return;
    run = args.a.runs[run_index]; /* there before the pass's first kernel begins */
    parts = parts_of(args, run);
    launch_wait();
    if (parts <= 1 || r >= run.count * args.group)
        return;
    if (lane < parts)
        own = args.part_stats[slot + lane * args.part_rows];
    load_joined<n>(args, out, slot, 0, parts);
    max = own.x;
    for (int step = 16; step > 0; step /= 2)
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    weight = power_of_2((own.x - max) * args.scale2);
    for (int part = 0; part < parts; part += JOIN_AT_ONCE) {
        if (part > 0)
            load_joined<n>(args, out, slot, part, parts);
#pragma unroll
        for (int i = 0; i < JOIN_AT_ONCE; i++) {
            const float w = __shfl_sync(0xffffffffu, weight, part + i);

            sum = fmaf(w, __shfl_sync(0xffffffffu, own.y, part + i), sum); /* 0 beyond the last */
#pragma unroll
            for (int j = 0; j < n; j++)
                value[j] = part + i < parts ? fmaf(w, out[i].at[j], value[j]) : value[j];
        }
    }
    if (args.a.lse && lane == 0)
        args.a.lse[row_head(args.a, args.group, run.first, g * args.group, r)] =
            max * args.a.scale + logf(sum);
    sum = 1.0f / sum;
    store_joined(value, sum,
                 (bf16 *)args.a.out +
                     row_head(args.a, args.group, run.first, g * args.group, r) * D + n * lane);
}

/* --- host --- */

extern "C" int cuda_attention_part_queries(int heads, int kv_heads)
{
    return PART_ROWS / (heads / kv_heads);
}

extern "C" int cuda_attention_part_border(int position)
{
    int border = PART_KEYS * PARTS_MAX;

    while (border <= position)
        border *= 2;
    return border;
}

/* The most rows that a run in parts has; 0: no run is done in parts. */
static int rows_in_parts(int heads, int kv_heads, int longest)
{
    const int group = heads / kv_heads, queries = cuda_attention_part_queries(heads, kv_heads);

    return group * (longest < queries ? longest : queries);
}

static int parts_at_most(int furthest)
{
    const int parts = (furthest + PART_KEYS - 1) / PART_KEYS;

    return parts < PARTS_MAX ? parts : PARTS_MAX;
}

extern "C" size_t cuda_attention_scratch_bytes(int heads, int kv_heads, int head_dim, int runs,
                                               int longest, int furthest)
{
    const int parts = parts_at_most(furthest);
    const size_t slots = (size_t)runs * (size_t)kv_heads * (size_t)parts *
                         (size_t)rows_in_parts(heads, kv_heads, longest);

    if (parts <= 1 || (head_dim != 64 && head_dim != 128))
        return 0;
    return slots * ((size_t)head_dim * sizeof(float) + sizeof(float2));
}

/* Rounds the number of parts up to a power of two, so that there are six sizes of grids. */
extern "C" int cuda_attention_reach(int furthest)
{
    int parts = 1;

    while (parts < PARTS_MAX && parts * PART_KEYS < furthest)
        parts *= 2;
    return parts < PARTS_MAX ? parts * PART_KEYS : INT32_MAX;
}

/* Asks once how many blocks of attend_part a multiprocessor holds: three on sm_90, fewer where it
 * has less shared memory. */
template <typename K>
static int find_held(struct cuda_context *context, K kernel, size_t bytes, int *held)
{
    int blocks = 0, err = 0;

    if (*held > 0)
        return 0;
    err = cuda_check(
        context,
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, ATTN_THREADS, bytes),
        "room for attention");
    *held = err < 0 ? 0 : blocks > 1 ? blocks : 1;
    return err;
}

template <int D, bool FINISH>
static int launch_parts(struct cuda_context *context, const struct part_args &args)
{
    static bool ready = false;
    static int held = 0;
    const size_t bytes = sizeof(struct part_shared<D>);
    const int rows = args.a.run_count * args.a.kv_heads * args.part_rows;
    int err = allow_shared(context, attend_part<D, FINISH>, bytes, &ready), grid = 0;

    if (err == 0)
        err = find_held(context, attend_part<D, FINISH>, bytes, &held);
    if (err < 0)
        return err;
    grid = held * context->multiprocessors;
    grid = args.items < grid ? args.items : grid;
    err = launch(context, "attention in parts", attend_part<D, FINISH>, dim3((unsigned)grid),
                 dim3(ATTN_THREADS), bytes, args);
    if (err < 0 || args.parts_max == 1)
        return err;
    return launch(context, "attention in parts", join_parts<D>,
                  dim3((unsigned)((rows + ATTN_WARPS - 1) / ATTN_WARPS)), dim3(ATTN_THREADS), 0,
                  args);
}

/* Sizes of the parts and their place in the scratch. */
static int place_parts(struct part_args *args)
{
    const struct cuda_attention *a = &args->a;
    const size_t need = cuda_attention_scratch_bytes(a->heads, a->kv_heads, a->head_dim,
                                                     a->run_count, a->longest, a->furthest);

    args->part_rows = rows_in_parts(a->heads, a->kv_heads, a->longest);
    args->parts_max = parts_at_most(a->furthest);
    args->items = a->run_count * a->kv_heads * args->parts_max;
    if (need > (a->scratch ? a->scratch_bytes : 0))
        return claas_fail(CLAAS_ERR_INTERNAL, "attention: %zu bytes of scratch, %zu are needed",
                          a->scratch ? a->scratch_bytes : (size_t)0, need);
    if (need > 0 && !aligned16(a->scratch))
        return claas_fail(CLAAS_ERR_INTERNAL, "attention: scratch is not aligned to 16 bytes");
    args->part_out = (float *)a->scratch; /* first, since it needs the stricter alignment */
    args->part_stats = (float2 *)(args->part_out + (size_t)args->items * (size_t)args->part_rows *
                                                       (size_t)a->head_dim);
    return 0;
}

/* Runs of one row, as many as there are rows, all of them in parts; older keys that may be read
 * before launch_wait, since here they are; whole pieces of 16 bytes. */
bool attn_can_finish(const struct cuda_context *context, const struct cuda_attention *a)
{
    const struct cuda_qkv *finish = a->finish;

    return attn_tiled(context, a) && a->kv && a->apart && a->longest == 1 && a->m == a->run_count &&
           a->m <= FINISH_ROWS && a->heads / a->kv_heads <= PART_ROWS && a->kv == finish->kv &&
           a->qkv == finish->qkv && !finish->raw && !finish->rstd_q && !finish->rstd_k &&
           a->ldqkv == (a->heads + 2 * a->kv_heads) * a->head_dim && aligned16(finish->bias) &&
           aligned16(finish->norm_q) && aligned16(finish->norm_k) && aligned16(finish->cos_sin);
}

extern "C" bool cuda_attention_finishes(const struct cuda_context *context,
                                        const struct cuda_attention *a)
{
    return context->fuse && a->finish && attn_check(a) == 0 && attn_can_finish(context, a);
}

int cuda_attention_parts(struct cuda_context *context, const struct cuda_attention *a)
{
    struct part_args args = {};
    int err = 0;

    args.a = *a;
    args.group = a->heads / a->kv_heads;
    args.scale2 = a->scale * ATTN_LOG2E;
    if (a->finish)
        args.finish = *a->finish;
    if (a->run_count == 1 && a->longest * args.group > PART_ROWS)
        return 0;
    err = place_parts(&args);
    if (err < 0 || args.part_rows == 0)
        return err;
    if (a->head_dim == 64)
        return a->finish ? launch_parts<64, true>(context, args)
                         : launch_parts<64, false>(context, args);
    return a->finish ? launch_parts<128, true>(context, args)
                     : launch_parts<128, false>(context, args);
}
