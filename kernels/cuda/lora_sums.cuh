/* LoRA's forms with many terms: S, dS, dB and dA (lora_problem.cuh).
 *
 * A block makes a 64 x 64 square of one product. Of every chunk of LORA_CHUNK terms its first team
 * sums the first 256, its second team the last 256: both wait for memory at the same time, so a sum
 * of few terms waits half as often. Operands come in pieces of 64 terms by cp.async, three of each
 * team in flight (two but in sm_90a's code). The teams' sums of a chunk begin at zero and are added
 * to each other; then the chunks' sums are added in order. Where there are few tiles and many
 * terms, each chunk has a block of its own, and join_chunks adds the same numbers in the same
 * order. So a row's bits depend on neither the number of rows nor the other groups.
 *
 * The gradients' terms are rows: chunks are added within spans of LORA_SPAN rows, then the spans in
 * order. Where there are few blocks each span has its own, and join_spans adds them.
 *
 *   x and dY are read once for S and dS (a second time where parts*R > 64), once more for the
 *   gradients; A and B once per 64 rows, from the L2 as a rule.
 *   Shared memory: 2 teams x 3 x 16 KB and 16 KB for the exchange: two blocks on an SM of sm_90.
 *   With two pieces in flight 80 KB; a block of 8.6, 8.9 or 12.0 may have 99 KB. */
#ifndef CLAAS_CUDA_LORA_SUMS_CUH
#define CLAAS_CUDA_LORA_SUMS_CUH

#include "cuda/launch.cuh"
#include "cuda/lora_pieces.cuh"

#define TEAMS        2
#define SUM_THREADS  (TEAMS * TEAM)
#define CHUNK_PIECES (LORA_CHUNK / TEAMS / STEP) /* of a team */
#define JOIN_BLOCKS  8                           /* of join_chunks, for a tile of rows */
#define SPAN_CHUNKS  (LORA_SPAN / LORA_CHUNK)

/* Pieces of each operand that a team has in flight. */
#define SUM_STAGES(sm90a) ((sm90a) ? 3 : 2)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STAGES SUM_STAGES(true)
#else
#define STAGES SUM_STAGES(false)
#endif

/* Shared memory: both teams' stages, then the exchange. */
static __host__ __device__ constexpr size_t sum_stages(int stages)
{
    return (size_t)(TEAMS * stages * 2 * PIECE); /* bf16 */
}
static constexpr size_t sum_bytes(int stages)
{
    return sum_stages(stages) * sizeof(bf16) + SUM_THREADS * 16 * sizeof(float);
}
static_assert(sum_bytes(SUM_STAGES(true)) <= 113 * 1024, "two blocks on an SM");
static_assert(sum_bytes(SUM_STAGES(false)) <= 99 * 1024, "a block of any card has as much");

static __device__ __forceinline__ int team_of(void)
{
    return (int)threadIdx.x / TEAM;
}

/* The first term of the team's i-th piece, and how many pieces both teams go through: the first
 * team's number. The second may have fewer, and nothing to do for the rest. */
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

/* A team's share of the 64 x 64 result: of each warp's 32 rows the first team has 0 … 15, the
 * second the others. */
typedef float share_sums[4][4];

/* Leaves the other team its share of a chunk's sums. swap: [2 teams][16][TEAM]. */
static __device__ __forceinline__ void give_share(const warp_sums &sum, float *swap)
{
    const int team = team_of();

    swap += team * 16 * TEAM + team_thread();
#pragma unroll
    for (int e = 0; e < 16; e++)
        swap[e * TEAM] = team == 0 ? sum[1][e / 4][e % 4] : sum[0][e / 4][e % 4];
}

/* After a barrier: adds both teams' sums of this team's share to the total, and begins anew. */
static __device__ __forceinline__ void take_share(share_sums &total, warp_sums &sum,
                                                  const float *swap)
{
    const int team = team_of();

    swap += (1 - team) * 16 * TEAM + team_thread();
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const float own = team == 0 ? sum[0][e / 4][e % 4] : sum[1][e / 4][e % 4];

        total[e / 4][e % 4] += own + swap[e * TEAM];
        sum[0][e / 4][e % 4] = sum[1][e / 4][e % 4] = 0.0f;
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

/* total = the team's share of the product's square at (i, j). SPANS: span by span. */
template <bool TURNED_LEFT, bool TURNED_RIGHT, bool SPANS>
static __device__ __forceinline__ void sum_terms(share_sums &total, const lora_problem<bf16> &p,
                                                 bf16 *shared)
{
    bf16 *tiles = shared + team_of() * STAGES * 2 * PIECE;
    float *swap = (float *)(shared + sum_stages(STAGES));
    const int pieces = team_pieces(p);
    warp_sums sum = {};
    share_sums span = {};

    for (int i = 0, stage = 0; i < pieces + STAGES; i++) {
        bf16 *left = tiles + stage * 2 * PIECE, *right = left + PIECE;
        const int at = i - STAGES; /* the piece asked for STAGES turns ago */

        if (at >= 0) {
            const bool end = at == pieces - 1, last = end || (at + 1) % CHUNK_PIECES == 0;

            copies_wait_but<STAGES - 1>();
            __syncthreads(); /* also: all have taken their share, so `swap` is free */
            if (team_term(p, at) < p.k_end)
                multiply_pieces<TURNED_LEFT, TURNED_RIGHT>(sum, left, right, STEP);
            if (last)
                give_share(sum, swap);
            __syncthreads(); /* all warps are done with the stage */
            if (last)
                take_share(SPANS ? span : total, sum, swap);
            if (SPANS && (end || (at + 1) % (SPAN_CHUNKS * CHUNK_PIECES) == 0))
                add_span(total, span);
        }
        if (i < pieces && team_term(p, i) < p.k_end) {
            load_left<TURNED_LEFT>(left, p, team_term(p, i));
            load_right<TURNED_RIGHT>(right, p, p.j, team_term(p, i));
        }
        copies_commit();
        stage = stage + 1 == STAGES ? 0 : stage + 1;
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
            const int i = p.i + pair_row(team_of(), half), j = p.j + pair_column(nt);
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
        const int i = p.i + pair_row(team_of(), e / 2 % 2), j = p.j + pair_column(e / 4) + e % 2;
        const bool read = i < p.m && j < p.n && !p.partial;

        old[e] = read ? out[(size_t)i * p.out_i + (size_t)j * p.out_j] : 0.0f;
    }
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const int i = p.i + pair_row(team_of(), e / 2 % 2), j = p.j + pair_column(e / 4) + e % 2;
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
template <enum cuda_lora_form FORM>
static __global__ void __launch_bounds__(SUM_THREADS, 2) sum_kernel(const struct lora_args args)
{
    extern __shared__ __align__(128) uint8_t shared[];
    lora_problem<bf16> p;
    share_sums total = {};
    const bool found = lora_find(args, &p);

    launch_wait();
    launch_next();
    if (!found)
        return;
    sum_terms<FORM == CUDA_LORA_DB, FORM != CUDA_LORA_S, FORM == CUDA_LORA_DB>(total, p,
                                                                               (bf16 *)shared);
    if (FORM == CUDA_LORA_DB)
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
