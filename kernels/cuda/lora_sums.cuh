/* LoRA's forms with many terms: S, dS, dB and dA (lora_problem.cuh).
 *
 * A block makes a 64 x 64 square of one product. Of every chunk of LORA_CHUNK terms its first team
 * sums the first 256, its second team the last 256: both wait for memory at the same time, so a sum
 * of few terms waits half as often. Operands come in pieces of 64 terms by cp.async, into a ring of
 * two to six places for each team. In sm_90a's code a team is a warpgroup, whose products
 * (wgmma.cuh) run while it asks for later pieces; elsewhere they are mma.sync's. The teams' sums of
 * a chunk begin at zero and are added to each other; then the chunks' sums are added in order.
 * Where there are few tiles and many terms, each chunk has a block of its own, and join_chunks adds
 * the same numbers in the same order. So a row's bits depend on neither the number of rows nor the
 * other groups.
 *
 * The gradients' terms are rows: chunks are added within spans of LORA_SPAN rows, then the spans in
 * order. Where there are few blocks each span has its own, and join_spans adds them.
 *
 *   x and dY are read once for S and dS (a second time where parts*R > 64), once more for the
 *   gradients; A and B once per 64 rows, from the L2 as a rule.
 *   Shared memory: 32 KB for the teams' places of one piece each, 16 KB for the exchange: with
 *   three places two blocks on an SM of sm_90, with six one; with two 80 KB, and a block of 8.6,
 *   8.9 or 12.0 may have 99 KB. */
#ifndef CLAAS_CUDA_LORA_SUMS_CUH
#define CLAAS_CUDA_LORA_SUMS_CUH

#include "cuda/launch.cuh"
#include "cuda/lora_pieces.cuh"
#include "cuda/wgmma.cuh"

#define TEAMS        2
#define SUM_THREADS  (TEAMS * TEAM)
#define CHUNK_PIECES (LORA_CHUNK / TEAMS / STEP) /* of a team */
#define JOIN_BLOCKS  8                           /* of join_chunks, for a tile of rows */
#define SPAN_CHUNKS  (LORA_SPAN / LORA_CHUNK)

/* Places of a team's ring. */
#define STAGES_ANY  2 /* code of any kind but sm_90a's */
#define STAGES_FULL 3 /* sm_90a: two blocks on an SM */
#define STAGES_DEEP 6 /* sm_90a, few blocks: where none shares its SM, it waits for latency alone */

/* Shared memory: both teams' stages, then the exchange. */
static __host__ __device__ constexpr size_t sum_stages(int stages)
{
    return (size_t)(TEAMS * stages * 2 * PIECE); /* bf16 */
}
static constexpr size_t sum_bytes(int stages)
{
    return sum_stages(stages) * sizeof(bf16) + SUM_THREADS * 16 * sizeof(float);
}
static_assert(sum_bytes(STAGES_ANY) <= 99 * 1024, "a block of any card has as much");
static_assert(sum_bytes(STAGES_FULL) <= 113 * 1024, "two blocks on an SM");
static_assert(sum_bytes(STAGES_DEEP) <= 227 * 1024, "a block of sm_90 has as much");

/* Whether this kind of code is launched with so many stages; else the kernel stays empty. */
static __device__ __forceinline__ constexpr bool uses_stages(int stages)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    return stages != STAGES_ANY;
#else
    return stages == STAGES_ANY;
#endif
}

static __device__ __forceinline__ int team_of(void)
{
    return (int)threadIdx.x / TEAM;
}

/* The first term of the team's i-th piece, and how many pieces both teams go through: the first
 * team's number. Those of the second that lie behind the last term are zeros. */
static __device__ __forceinline__ int team_term(const lora_problem<bf16> &p, int i)
{
    return p.k_first + i / CHUNK_PIECES * LORA_CHUNK + team_of() * (LORA_CHUNK / TEAMS) +
           i % CHUNK_PIECES * STEP;
}
static __device__ __forceinline__ int team_pieces(const lora_problem<bf16> &p)
{
    const int terms = p.k_end - p.k_first, rest = (terms % LORA_CHUNK + STEP - 1) / STEP;

    return terms / LORA_CHUNK * CHUNK_PIECES + min(rest, CHUNK_PIECES);
}

/* A team's 64 x 64: warp w has rows 16 w … 16 w + 15, in 8 fragments of 16 x 8 (mma.cuh). */
typedef float team_sums[8][4];
/* Its share of them when the teams have added theirs: the first team has columns 0 … 31, the second
 * the others. */
typedef float share_sums[4][4];

static __device__ __forceinline__ int share_row(int half)
{
    return team_thread() / 32 * 16 + (int)threadIdx.x % 32 / 4 + 8 * half;
}
static __device__ __forceinline__ int share_column(int nt)
{
    return 32 * team_of() + 8 * nt + 2 * ((int)threadIdx.x % 4);
}

/* sum += left right^T over the terms of a piece. A warpgroup's products are under way when this
 * returns, until await_products. */
template <bool TURNED_LEFT, bool TURNED_RIGHT>
static __device__ __forceinline__ void ask_products(team_sums &sum, const bf16 *left,
                                                    const bf16 *right)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < STEP / 16; k++)
        wgmma_add<TURNED_LEFT, TURNED_RIGHT>(
            sum, TURNED_LEFT ? wgmma_rows<64>(left, k) : wgmma_columns<64>(left, 0, k),
            TURNED_RIGHT ? wgmma_rows<64>(right, k) : wgmma_columns<64>(right, 0, k));
    wgmma_close();
#else
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
        uint32_t rows[4];

        left_operand<TURNED_LEFT>(rows, left, team_thread() / 32 * 16, k);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t columns[4];

            right_operand<TURNED_RIGHT>(columns, right, 16 * n, k);
            multiply(sum[2 * n], rows, columns[0], columns[1]);
            multiply(sum[2 * n + 1], rows, columns[2], columns[3]);
        }
    }
#endif
}

static __device__ __forceinline__ void await_products(team_sums &sum)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wgmma_wait<0>();
    wgmma_settle(sum);
#endif
}

/* Leaves the other team its share of a chunk's sums. swap: [2 teams][16][TEAM]. */
static __device__ __forceinline__ void give_share(const team_sums &sum, float *swap)
{
    const int team = team_of();

    swap += team * 16 * TEAM + team_thread();
#pragma unroll
    for (int e = 0; e < 16; e++)
        swap[e * TEAM] = team == 0 ? sum[4 + e / 4][e % 4] : sum[e / 4][e % 4];
}

/* After a barrier: adds both teams' sums of this team's share to the total, and begins anew. */
static __device__ __forceinline__ void take_share(share_sums &total, team_sums &sum,
                                                  const float *swap)
{
    const int team = team_of();

    swap += (1 - team) * 16 * TEAM + team_thread();
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const float own = team == 0 ? sum[e / 4][e % 4] : sum[4 + e / 4][e % 4];

        total[e / 4][e % 4] += own + swap[e * TEAM];
        sum[e / 4][e % 4] = sum[4 + e / 4][e % 4] = 0.0f;
    }
}

static __device__ __forceinline__ void add_span(share_sums &total, share_sums &span)
{
#pragma unroll
    for (int e = 0; e < 16; e++) {
        total[e / 4][e % 4] += span[e / 4][e % 4];
        span[e / 4][e % 4] = 0.0f;
    }
}

/* Asks for the team's i-th piece of both operands, if there are so many: a group of copies. */
template <int STAGES, bool TURNED_LEFT, bool TURNED_RIGHT>
static __device__ __forceinline__ void ask_pieces(bf16 *tiles, const lora_problem<bf16> &p, int i,
                                                  int pieces)
{
    bf16 *left = tiles + i % STAGES * 2 * PIECE;
    const int k = min(team_term(p, i), p.k_end);

    if (i < pieces) {
        load_left<TURNED_LEFT>(left, p, k);
        load_right<TURNED_RIGHT>(left + PIECE, p, p.j, k);
    }
    copies_commit();
}

/* total = the team's share of the product's square at (i, j). SPANS: span by span. */
template <int STAGES, bool TURNED_LEFT, bool TURNED_RIGHT, bool SPANS>
static __device__ __forceinline__ void sum_terms(share_sums &total, const lora_problem<bf16> &p,
                                                 bf16 *shared)
{
    bf16 *tiles = shared + team_of() * STAGES * 2 * PIECE;
    float *swap = (float *)(shared + sum_stages(STAGES));
    const int pieces = team_pieces(p);
    team_sums sum = {};
    share_sums span = {};

    for (int i = 0; i < STAGES - 1; i++)
        ask_pieces<STAGES, TURNED_LEFT, TURNED_RIGHT>(tiles, p, i, pieces);
    for (int i = 0; i < pieces;) {
        for (const int end = min(i + CHUNK_PIECES, pieces); i < end; i++) {
            const bf16 *left = tiles + i % STAGES * 2 * PIECE;

            copies_wait_but<STAGES - 2>(); /* piece i is there, */
            await_products(sum);           /* piece i - 1 is used up, */
            wgmma_publish();
            __syncthreads(); /* for all warps; and all have taken their share, so `swap` is free */
            if (STAGES == STAGES_ANY) /* products are done when they are asked for */
                ask_pieces<STAGES, TURNED_LEFT, TURNED_RIGHT>(tiles, p, i + STAGES - 1, pieces);
            ask_products<TURNED_LEFT, TURNED_RIGHT>(sum, left, left + PIECE);
            if (STAGES != STAGES_ANY)
                ask_pieces<STAGES, TURNED_LEFT, TURNED_RIGHT>(tiles, p, i + STAGES - 1, pieces);
        }
        await_products(sum);
        give_share(sum, swap);
        __syncthreads();
        take_share(SPANS ? span : total, sum, swap);
        if (SPANS && (i == pieces || i % (SPAN_CHUNKS * CHUNK_PIECES) == 0))
            add_span(total, span);
    }
}

/* --- results --- */

/* S, dS: rounded, or float32 for join_chunks. n is a multiple of 8, so pairs are whole. */
static __device__ __forceinline__ void store_sums(const lora_problem<bf16> &p,
                                                  const share_sums &sum)
{
#pragma unroll
    for (int nt = 0; nt < 4; nt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = p.i + share_row(half), j = p.j + share_column(nt);
            const float low = sum[nt][2 * half], high = sum[nt][2 * half + 1];
            const size_t at = (size_t)i * p.out_i + (size_t)j;

            if (i < p.m && j < p.n && p.partial)
                *(float2 *)(p.partial + at) = make_float2(low, high);
            else if (i < p.m && j < p.n)
                *(uint32_t *)((bf16 *)p.out + at) = pack_pair(low, high);
        }
}

/* dB, dA: added to the gradient, all reads before the writes so that they are under way together; a
 * span's sums are stored for join_spans. */
static __device__ __forceinline__ void add_gradients(const lora_problem<bf16> &p,
                                                     const share_sums &sum)
{
    float *out = p.partial ? p.partial : (float *)p.out, old[16];

#pragma unroll
    for (int e = 0; e < 16; e++) {
        const int i = p.i + share_row(e / 2 % 2), j = p.j + share_column(e / 4) + e % 2;
        const bool read = i < p.m && j < p.n && !p.partial;

        old[e] = read ? out[(size_t)i * p.out_i + (size_t)j * p.out_j] : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const int i = p.i + share_row(e / 2 % 2), j = p.j + share_column(e / 4) + e % 2;
        const float x = sum[e / 4][e % 4];

        if (i < p.m && j < p.n)
            out[(size_t)i * p.out_i + (size_t)j * p.out_j] =
                p.partial ? x : fmaf(p.scale, x, old[e]);
    }
}

/* --- the kernels --- */

/* FORM: S, DS, or DB for both gradients. launch_next must come behind launch_wait: add_kernel for
 * dx, which runs beside the gradients, does not wait for what it reads (dS, and the frozen
 * product's dx). These are complete when it begins, since all blocks here have waited by then. */
template <enum cuda_lora_form FORM, int STAGES>
static __global__ void __launch_bounds__(SUM_THREADS, STAGES < STAGES_DEEP ? 2 : 1)
    sum_kernel(const struct lora_args args)
{
    constexpr bool gradients = FORM == CUDA_LORA_DB, turned = FORM != CUDA_LORA_S;
    extern __shared__ __align__(1024) uint8_t pieces[];
    lora_problem<bf16> p;
    share_sums total = {};

    if (!uses_stages(STAGES))
        return;
    const bool found = lora_find(args, &p);

    launch_wait();
    launch_next();
    if (!found)
        return;
    sum_terms<STAGES, gradients, turned, gradients>(total, p, (bf16 *)pieces);
    if (gradients)
        add_gradients(p, total);
    else
        store_sums(p, total);
}

/* S or dS, rounded: adds up its chunks in order. JOIN_BLOCKS blocks have a tile of rows, a thread
 * four elements at a time, of as many columns as the group's adapter has. */
static __global__ void __launch_bounds__(TEAM)
    join_chunks(const struct lora_args args, int splits, bf16 *out)
{
    const struct cuda_lora_tile tile = args.tiles[blockIdx.x / JOIN_BLOCKS];
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const int width = group->parts[args.kind] * group->rank;
    const int first = ((int)(blockIdx.x % JOIN_BLOCKS) * TEAM + (int)threadIdx.x) * 4;
    const size_t sums = (size_t)args.m * (size_t)args.ld;

    launch_next();
    launch_wait();
    for (int e = first; e < tile.count * width; e += JOIN_BLOCKS * TEAM * 4) {
        const size_t at = (size_t)(tile.first + e / width) * (size_t)args.ld + (size_t)(e % width);
        float4 total = {};

#pragma unroll 8
        for (int i = 0; i < splits; i++) {
            const float4 x = *(const float4 *)(args.partial + (size_t)i * sums + at);

            total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
        }
        *(uint2 *)(out + at) =
            make_uint2(pack_pair(total.x, total.y), pack_pair(total.z, total.w));
    }
}

/* Adds up the spans of a group's dB and dA in order and adds them to its gradient: four elements a
 * thread, a group for each y of the grid. launch_next may come first, although add_kernel for dx
 * may be next: sum_kernel's blocks had all waited when this kernel began. */
static __global__ void __launch_bounds__(TEAM)
    join_spans(const struct lora_args args, size_t size)
{
    const struct cuda_lora_group *group = &args.groups[blockIdx.y];
    const size_t at = ((size_t)blockIdx.x * TEAM + threadIdx.x) * 4;
    const float *from = args.partial + (size_t)blockIdx.y * size + at;
    const int spans = (group->count + LORA_SPAN - 1) / LORA_SPAN;
    float scale, *to = lora_gradient_at(args, group, at, &scale);
    float4 sum = {};

    launch_next();
    launch_wait();
    if (at >= size || !to)
        return;
    for (int i = 0; i < spans; i++) {
        const float4 x = *(const float4 *)(from + (size_t)i * (size_t)args.group_count * size);

        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    const float4 old = *(const float4 *)to;

    *(float4 *)to = make_float4(fmaf(scale, sum.x, old.x), fmaf(scale, sum.y, old.y),
                                fmaf(scale, sum.z, old.z), fmaf(scale, sum.w, old.w));
}

#endif
