/* What attention's gradient for any card (attention_bwd.cu) and the one for sm_90a
 * (attention_sm90_bwd.cu) share: the arguments, the order of a walk over the queries that see a
 * window of keys, and what a lane knows of its queries. */
#ifndef CLAAS_CUDA_ATTENTION_GRAD_CUH
#define CLAAS_CUDA_ATTENTION_GRAD_CUH

#include "cuda/attention_tiles.cuh"

struct grad_args {
    struct cuda_attention a;
    const int32_t *children;
    const int64_t *key_order;
    const bf16 *dout;
    const float *delta;
    bf16 *dqkv;
    int group, queries; /* query heads of a kv head; queries of a tile */
    float scale2;       /* scale log2 e */
};

int cuda_attention_bwd_sm90(struct cuda_context *context, const struct grad_args &args);

/* The tiles of queries that see a block of keys, in order. */
struct query_walk {
    struct cuda_attn_run run; /* whose queries these are */
    int tile, tiles;
    int shift;     /* a key's position in this sequence is its row + shift */
    int limit;     /* a child sees the keys before this position; 0: the run itself, causal */
    int next, end; /* children to come */
    int before;    /* tiles of the run and its children before this one's, seen or not */
};

static __device__ __forceinline__ struct query_walk
walk_begin(const struct grad_args &args, const struct cuda_attn_run &run, int key_row)
{
    struct query_walk walk;

    walk.run = run;
    walk.tile = (key_row - run.first) / args.queries;
    walk.tiles = (run.count + args.queries - 1) / args.queries;
    walk.shift = run.pos - run.first;
    walk.limit = 0;
    walk.next = run.child_from;
    walk.end = run.child_end;
    walk.before = 0;
    return walk;
}

/* Moves on to the next tile; false at the end. */
static __device__ __forceinline__ bool walk_next(const struct grad_args &args,
                                                 struct query_walk &walk, int key_row)
{
    if (++walk.tile < walk.tiles)
        return true;
    while (walk.next < walk.end) {
        walk.run = args.a.runs[args.children[walk.next++]];
        walk.before += walk.tiles;
        walk.tile = 0;
        walk.tiles = (walk.run.count + args.queries - 1) / args.queries;
        walk.shift = -walk.run.parent_first;
        walk.limit = walk.run.pos;
        if (walk.tiles > 0 && key_row + walk.shift < walk.limit)
            return true;
    }
    return false;
}

/* Which of two blocks that share a walk takes the tile: they take turns. Tiles are counted from the
 * run's first one, not from where the walk begins, and through all children, even those that do not
 * see the walk's keys. So whose a tile is follows from the sequences alone, not from where in the
 * pack they lie. */
static __device__ __forceinline__ int walk_rank(const struct query_walk &walk)
{
    return (walk.before + walk.tile) & 1;
}

/* Whether the tile needs a mask: some query of it does not see some key up to the row last_row. */
static __device__ __forceinline__ bool walk_masked(const struct grad_args &args,
                                                   const struct query_walk &walk, int last_row)
{
    const int last = last_row + walk.shift;

    if (walk.limit)
        return last >= walk.limit;
    return last > walk.run.pos + walk.tile * args.queries;
}

/* What a lane knows of its rows l / 4 and l / 4 + 8. */
struct query_rows {
    int position[2];
    float lse2[2], delta[2]; /* lse log2 e */
};

static __device__ __forceinline__ struct query_rows
query_rows_of(const struct grad_args &args, int first, int first_pos, int row, int used, int head)
{
    struct query_rows rows;

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + 8 * half + (int)threadIdx.x % 32 / 4;
        const bool valid = r < used;
        const int i = valid ? r / args.group : 0, h = valid ? r - i * args.group : 0;
        const size_t at = (size_t)(first + i) * args.a.heads + head + h;

        rows.position[half] = first_pos + i;
        rows.lse2[half] = valid ? args.a.lse[at] * ATTN_LOG2E : 0.0f;
        rows.delta[half] = valid ? args.delta[at] : 0.0f;
    }
    return rows;
}

#endif
