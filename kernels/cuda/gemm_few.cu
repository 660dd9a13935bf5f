/* Products of few rows: out[m][n] = a[m][k] b[n][k]^T (+ add), 1 <= m <= 64.
 *
 * A block takes 128 rows of b (columns of out) and all rows of a; its 8 warps take 16 rows of b
 * each. Tensor cores multiply b, as the left operand, by 8, 16, 32 or 64 rows of a. k comes in
 * stages of 64:
 *
 *   stage   b [128][64] and a [8 TILES][64] bf16, cp.async, a ring of STAGES of them; the b part of
 *           all stages but one, 48 KB or more, is on its way while one is multiplied
 *
 * On sm_90a a warpgroup multiplies its 64 rows of b straight from shared memory (wgmma.cuh: rows of
 * 128 bytes, swizzled). Elsewhere mma.m16n8k16, 16 rows of b by 8 of a at a time:
 *
 *   place   16-byte piece p of row r lies at p ^ 4 (r % 2), so that neither the eight lanes that
 *           write a row nor the eight that read four pieces of two rows collide
 *   lane    with g = lane / 4, t = lane % 4, reads piece t (then 4 + t) of rows g and g + 8 of b
 *           and of rows g, g + 8, … of a: eight elements of k, four for one mma and four for the
 *           next. The mma's slots 2t, 2t+1, 2t+8, 2t+9 thus hold the elements 8t … 8t+3 of the
 *           stage: another order of k than the slots', the same for a and b
 *
 * Where n is too small to fill the card, k is split over the 2, 4 or 8 blocks of a cluster. Each
 * stores a share of the tile's columns: it is sent their parts by all of them (mbarrier.cuh), into
 * a place of the ring that its last stages leave free, and adds them up in the order of k. Without
 * clusters (below sm_90) there is no split.
 *
 * With adapters (LORA) the grid's first blocks make S = x A^T meanwhile (lora_shrink.cuh), and S
 * (sB)^T is added to the rounded product before it is stored (lora_join.cuh). The kernel without is
 * another one.
 *
 * The order of an element's sum: terms within a product of 16 (the hardware's), products along k,
 * parts. It follows from n and k (cut_k), whether there are clusters, and which of the instructions
 * multiplies; a column of a product's result does not depend on its neighbours, so m and the row's
 * place never show. */
#include "cuda/gemm_few.h"
#include "cuda/lora_join.cuh"
#include "cuda/lora_shrink.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/wgmma.cuh"

#define WARPS             8
#define THREADS           (32 * WARPS)
#define B_ROWS            (16 * WARPS) /* of a block */
#define DEPTH             64           /* elements of k in a stage */
#define PIECES            (DEPTH / 8)  /* of 16 bytes, in a row of a stage */
#define SPLITS_MAX        8            /* the largest cluster that every card of sm_90 grants */
#define BLOCKS_GOAL       128          /* nearly one for each multiprocessor of an H100 */
#define STAGES_LEAST      2            /* of a part of k */
#define SIZE_LEAST        256
#define LORA_BLOCKS_LEAST 32   /* blocks that make S where the product has no room to spare */
#define LORA_LONG         8192 /* from this k on, blocks that make S are teams */
#define LAST_STAGES       8  /* of a block: when they begin, the next kernel may begin */
/* A thread's registers. With LoRA on sm_90a, two blocks leave room for blocks of the small kernels
 * that follow. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define REGISTERS_OF(lora) __maxnreg__((lora) ? 96 : 128)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define REGISTERS_OF(lora) __launch_bounds__(THREADS, 2)
#else
#define REGISTERS_OF(lora) __launch_bounds__(THREADS)
#endif
/* Floats from one row of a part to the next: so that 2t rows and g columns further lies in another
 * bank for every lane. */
#define PART_PITCH (B_ROWS + 4)
/* The most bytes that the parts of a share take, one block's behind the other's, with rows four
 * floats further apart than they are long. */
#define PARTS_BYTES(tiles) (8 * (tiles) * (B_ROWS + 4 * SPLITS_MAX) * 4)

struct few_args {
    const bf16 *a, *b;
    const void *add; /* or NULL */
    void *out;
    int m, n, k;
    int lda, ldb, ldo;
    int splits;
    bool wide;   /* out and add are float32 */
    bool quads;  /* four columns of out and add are aligned and exist together */
    bool frozen; /* b may be fetched before the kernel before this one is done */
    struct lora_join lora;
};

/* The ring fits twice into a multiprocessor of sm_90, and once into 99 KB (sm_86, sm_89). The last
 * stage of k comes to lie in its first slot, so that the others become free one after the other
 * while the last stages are multiplied. The parts lie in the second and third one, which are free
 * when two stages are left. */
template <int TILES> struct few_shape {
    static const int stages = TILES <= 2 ? 5 : 4;
    static const int stage_pieces = (B_ROWS + 8 * TILES) * PIECES;
    static const int slot = stage_pieces * 16;
    static const int ring = stages * slot;
    static const int parts = slot;
    static const int parts_left = 2; /* stages that are left when that place is free */
    static const int barrier = ring;
    static const int bytes = barrier + MBARRIER_BYTES;

    static_assert(parts + PARTS_BYTES(TILES) <= (stages - 1) * slot, "two stages have their slots");
};

/* Places with LoRA, in bytes: its sums, S, and `depth` items of B for each warp. The first item and
 * S lie behind the ring where there is room (`early`), so that they may be asked for early: either
 * takes 2 or 3 us to come from the L2 beside a product. Then the parts have a place of their own,
 * too, which is free when one stage is left; otherwise they come to lie where S and B were when
 * those are used up (parts_left: 0). SM90: sm_90a, where two blocks have 227 KB together; elsewhere
 * one has 99 KB at least. */
template <int TILES, bool SM90> struct join_shape {
    using few = few_shape<TILES>;
    static const int stages = few::stages;
    static const int slot = few::slot;
    static const int item = LORA_WARPS * LORA_ITEM;
    static const int sums = 8 * TILES * PART_PITCH * 4;
    static const int s_bytes = LORA_S_BYTES(8 * TILES);
    static const int depth = TILES <= 2 ? 4 : 3;
    static const bool early = SM90 && TILES <= 4;
    static const int free = sums > slot ? sums : slot; /* from here on the ring is free when one
                                                          stage is left */
    static const int s = early ? few::ring : free;
    static const int first = s + s_bytes; /* item of B; the others from `rest` on */
    static const int rest = early ? free : first + item;
    static const int end = rest + (depth - 1) * item;
    static const int s_left = early ? stages - 1 : 2; /* stages that are left when S is asked for */
    static const int parts = early ? end : sums;
    static const int parts_left = early ? 1 : 0;
    static const int shrink_ring = SM90 ? 12288 : 8192; /* a warp's ring in blocks that make S */
    static const int shrink = LORA_SHRINK_BYTES(shrink_ring);
    static const int joined = early ? first + item : end > few::ring ? end : few::ring;
    static const int lines = joined > shrink ? joined : shrink;
    static const int barrier = lines + (int)sizeof(struct lora_lines);
    static const int bytes = barrier + 2 * MBARRIER_BYTES; /* two, for blocks that make S */

    static_assert(early || first <= (stages - 1) * slot, "S has room when one stage is left");
    static_assert(!early || parts + PARTS_BYTES(TILES) <= few::ring, "S and an item lie apart");
    static_assert(!early || sums <= slot, "LoRA's sums are not where B is");
    static_assert(parts + PARTS_BYTES(TILES) <= lines && lines % 16 == 0, "all has");
    static_assert(parts % 16 == 0 && barrier % MBARRIER_BYTES == 0, "all is aligned");
    static_assert(bytes <= (SM90 ? 113 : 99) * 1024, "a multiprocessor has as much");
};
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int TILES> using join_here = join_shape<TILES, true>;
#else
template <int TILES> using join_here = join_shape<TILES, false>;
#endif
template <int TILES, bool LORA> struct parts_here {
    static const int at = LORA ? join_here<TILES>::parts : few_shape<TILES>::parts;
    static const int left = LORA ? join_here<TILES>::parts_left : few_shape<TILES>::parts_left;
    static const int barrier = LORA ? join_here<TILES>::barrier : few_shape<TILES>::barrier;
};

/* --- a part of k --- */

static __device__ __forceinline__ int place(int row, int piece)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    return wgmma_place<B_ROWS>(row, piece) / 8;
#else
    return row * PIECES + (piece ^ (row & 1) << 2);
#endif
}

/* b's part of stage number `index` of k: eight threads to a row, 32 rows at a time. */
static __device__ __forceinline__ void load_weights(const struct few_args *args, int first_row,
                                                    int index, uint4 *stage)
{
    int piece = (int)threadIdx.x % PIECES, row = (int)threadIdx.x / PIECES;
    int column = index * DEPTH + 8 * piece;
    bool inside = column < args->k; /* k is a multiple of 8 */

#pragma unroll
    for (int i = 0; i < B_ROWS; i += THREADS / PIECES) {
        int r = first_row + i + row;
        bool valid = inside && r < args->n;

        copy_16_of_many(stage + place(i + row, piece),
                        args->b + (valid ? (size_t)r * (size_t)args->ldb + (size_t)column : 0),
                        valid);
    }
}

/* a's part of it. */
template <int TILES>
static __device__ __forceinline__ void load_rows(const struct few_args *args, int index,
                                                 uint4 *stage)
{
    int piece = (int)threadIdx.x % PIECES, row = (int)threadIdx.x / PIECES;
    int column = index * DEPTH + 8 * piece;
    bool inside = column < args->k;

    stage += B_ROWS * PIECES;
#pragma unroll
    for (int i = 0; i < 8 * TILES; i += THREADS / PIECES) {
        int r = i + row;
        bool valid = inside && r < args->m;

        if (8 * TILES % (THREADS / PIECES) == 0 || r < 8 * TILES)
            copy_16_of_many(stage + place(r, piece),
                            args->a + (valid ? (size_t)r * (size_t)args->lda + (size_t)column : 0),
                            valid);
    }
}

/* sums += a stage's products: begun by begin_stage, there after end_stage. Other copies may be
 * asked for in between. */
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <int TILES>
static __device__ __forceinline__ void begin_stage(const uint4 *stage, float (&sums)[TILES][4])
{
    const bf16 *b = (const bf16 *)stage, *a = (const bf16 *)(stage + B_ROWS * PIECES);
    const int first = (int)threadIdx.x / 128 * 64;

    wgmma_begin();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++)
        wgmma_nt(sums, wgmma_columns<B_ROWS>(b, first, k), wgmma_columns<8 * TILES>(a, 0, k), 1);
    wgmma_close();
}
template <int TILES>
static __device__ __forceinline__ void end_stage(const uint4 *, float (&sums)[TILES][4])
{
    wgmma_wait<0>();
    wgmma_settle(sums);
}
#else
template <int TILES>
static __device__ __forceinline__ void begin_stage(const uint4 *, float (&)[TILES][4])
{
}
template <int TILES>
static __device__ __forceinline__ void end_stage(const uint4 *stage, float (&sums)[TILES][4])
{
    int g = ((int)threadIdx.x & 31) / 4, t = (int)threadIdx.x % 4;
    const uint4 *b = stage + (int)threadIdx.x / 32 * 16 * PIECES;
    const uint4 *a = stage + B_ROWS * PIECES;

#pragma unroll
    for (int half = 0; half < PIECES; half += 4) {
        uint4 low = b[place(g, half + t)], high = b[place(g + 8, half + t)];
        const uint32_t first[4] = {low.x, high.x, low.y, high.y};
        const uint32_t second[4] = {low.z, high.z, low.w, high.w};

#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint4 x = a[place(8 * i + g, half + t)];

            multiply(sums[i], first, x.x, x.y);
            multiply(sums[i], second, x.z, x.w);
        }
    }
}
#endif

/* What a block knows of the LoRA it adds. */
struct few_lora {
    struct lora_lines *lines;
    struct lora_share share;
    struct lora_place next; /* the next item of B for this warp to ask for */
    int items;              /* how many items of B it has asked for */
};

/* Where this warp's item of B number `item` comes to lie; item 1 and those behind it are together.
 */
template <int TILES> static __device__ __forceinline__ uint4 *item_of_b(uint4 *ring, int item)
{
    using shape = join_here<TILES>;
    const int at = item == 0 ? shape::first : shape::rest + (item - 1) * shape::item;

    return ring + (at + (int)threadIdx.x / 32 * LORA_ITEM) / 16;
}

/* Asks for what LoRA needs, into those slots of the ring that are free when `left` stages are still
 * to come behind the present one. with_s: for S, too, once. */
template <int TILES>
static __device__ __forceinline__ void ask_for_lora(const struct few_args *args,
                                                    struct few_lora *lora, uint4 *ring, int left,
                                                    bool with_s)
{
    using shape = join_here<TILES>;

    if (with_s)
        lora_ask_s(args->lora, lora->lines, ring + shape::s / 16);
    if (lora->items == 0)
        lora->next = lora_first_place(lora->lines, lora->share);
    for (; lora->items < shape::depth; lora->items++) {
        const bool early = shape::early && lora->items == 0;

        if (!early && left > 0 &&
            shape::rest + lora->items * shape::item > (shape::stages - left) * shape::slot)
            break;
        lora_ask_b(lora->lines, lora->share, &lora->next, item_of_b<TILES>(ring, lora->items));
    }
}

/* Sums the stages `first` to `end` of k, two or more. Ends with the ring free for other uses,
 * except for LoRA's B and S, which have arrived, and for the parts that other blocks send from
 * cluster_arrive on. */
template <int TILES, bool LORA>
static __device__ __forceinline__ void add_up(const struct few_args *args, int first_row, int first,
                                              int end, uint4 *ring, float (&sums)[TILES][4],
                                              struct few_lora *lora)
{
    const int stages = few_shape<TILES>::stages, pieces = few_shape<TILES>::stage_pieces;
    const int left = parts_here<TILES, LORA>::left;
    int slot = (stages - (end - 1 - first) % stages) % stages; /* the last stage's is 0 */
    int ahead = (slot + stages - 1) % stages;
    struct cuda_lora_tile tile = {};

    if (LORA)
        tile = lora_begin_list(lora->lines, args->lora.args);
    if (!args->frozen)
        launch_wait();
    for (int i = 0; i < stages - 1 && first + i < end; i++)
        load_weights(args, first_row, first + i, ring + (slot + i) % stages * pieces);
    if (LORA) /* reads only what was there before the pass, so it need not come behind the wait */
        lora_list(lora->lines, args->lora.args, tile, lora->share.module);
    if (args->frozen)
        launch_wait();
    for (int i = 0; i < stages - 1; i++) {
        if (first + i < end)
            load_rows<TILES>(args, first + i, ring + (slot + i) % stages * pieces);
        copies_commit(); /* the first one's also holds all of the weights above */
    }
    if (LORA) /* while the first rows are on their way */
        lora_clear_next(args->lora);
    for (int index = first; index < end; index++) {
        if (index == max(first, end - LAST_STAGES))
            launch_next();
        copies_wait_but<stages - 2>(); /* this thread's part of stage `index` is there */
        wgmma_publish();
        __syncthreads(); /* all threads' parts are there, and no thread reads the stage before any
                            more */
        if (left > 0 && args->splits > 1 && index == end - left)
            cluster_arrive(); /* other blocks may send their parts */
        begin_stage<TILES>(ring + slot * pieces, sums);
        if (index + stages - 1 < end) {
            load_weights(args, first_row, index + stages - 1, ring + ahead * pieces);
            load_rows<TILES>(args, index + stages - 1, ring + ahead * pieces);
        }
        if (LORA && (index + stages - 1 >= end || (join_here<TILES>::early && index == first))) {
            ask_for_lora<TILES>(args, lora, ring, end - 1 - index,
                                index == max(first + 1, end - join_here<TILES>::s_left));
        }
        if (LORA && index == first) /* S is not asked for before the next barrier */
            lora_list_rows(lora->lines);
        copies_commit();
        end_stage<TILES>(ring + slot * pieces, sums);
        ahead = slot;
        slot = slot + 1 < stages ? slot + 1 : 0;
    }
    if (LORA)
        lora_receive_s<8 * TILES>(args->lora, lora->lines, ring + join_here<TILES>::s / 16);
    else
        copies_wait_but<0>();
    __syncthreads();
}

/* --- the parts' sum --- */

/* Quads of columns in a block's share of the tile, and their logarithm: splits are powers of two,
 * and divisions would be felt here. The parts of a share lie as [block][row of a][quads + 1], in
 * quads: the eight lanes that send the same columns of eight rows do not collide, nor those that
 * read a row. */
static __device__ __forceinline__ int share_shift(int splits)
{
    return __ffs(B_ROWS / 4) - __ffs(splits);
}

/* part[row of a][row of b] = this block's sums. */
template <int TILES>
static __device__ __forceinline__ void keep_part(const float (&sums)[TILES][4], float *part)
{
    int g = ((int)threadIdx.x & 31) / 4, t = (int)threadIdx.x % 4;
    int column = (int)threadIdx.x / 32 * 16 + g;

#pragma unroll
    for (int i = 0; i < TILES; i++) {
        float *at = part + (8 * i + 2 * t) * PART_PITCH + column;

        at[0] = sums[i][0];
        at[PART_PITCH] = sums[i][1];
        at[8] = sums[i][2];
        at[PART_PITCH + 8] = sums[i][3];
    }
}

/* Of the four lanes l, l ^ 4, l ^ 8, l ^ 12, which have two rows of a by two columns each, in the
 * order of keep_part: lane l gets four neighbouring columns, 8 (l / 8 % 2) + 4 (l / 16) … +3 of the
 * warp's 16, of row 2 (l % 4) + l / 4 % 2. */
static __device__ __forceinline__ float4 gather_quad(const float (&sum)[4])
{
    const bool odd = (threadIdx.x & 4) != 0, upper = (threadIdx.x & 8) != 0;
    const float low = __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 4);
    const float high = __shfl_xor_sync(~0u, odd ? sum[2] : sum[3], 4);
    /* of this lane's row: two neighbours of the first eight columns, two of the others */
    const float a = odd ? low : sum[0], b = odd ? sum[1] : low;
    const float c = odd ? high : sum[2], d = odd ? sum[3] : high;
    const float first = __shfl_xor_sync(~0u, upper ? a : c, 8);
    const float second = __shfl_xor_sync(~0u, upper ? b : d, 8);

    return upper ? make_float4(first, second, c, d) : make_float4(a, b, first, second);
}

/* Sends this block's sums of every share to the block whose share it is: a warp's columns are all
 * of one share. */
template <int TILES>
static __device__ __forceinline__ void push_part(const struct few_args *args, int rank,
                                                 const float (&sums)[TILES][4], float4 *parts,
                                                 const uint64_t *barrier)
{
    const int lane = (int)threadIdx.x & 31, first = (int)threadIdx.x / 32 * 4;
    const int shift = share_shift(args->splits), quads = 1 << shift, to = first >> shift;
    const int row = 2 * (lane % 4) + lane / 4 % 2;
    const int quad = (first & (quads - 1)) + 2 * (lane / 8 % 2) + lane / 16;
    uint32_t at = cluster_address(parts + (rank * args->m + row) * (quads + 1) + quad, to);
    const uint32_t counted = cluster_address(barrier, to);

#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const float4 x = gather_quad(sums[i]);

        if (8 * i + row < args->m)
            push_16(at, x, counted);
        at += 8 * (quads + 1) * (int)sizeof(x);
    }
}

/* Brings this block's sums to where they are added up. */
template <int TILES>
static __device__ __forceinline__ void give_part(const struct few_args *args, int rank,
                                                 const float (&sums)[TILES][4], float4 *parts,
                                                 const uint64_t *barrier)
{
    if (args->splits == 1) {
        keep_part<TILES>(sums, (float *)parts);
        return;
    }
    cluster_wait(); /* all have room for them */
    push_part<TILES>(args, rank, sums, parts, barrier);
}

static __device__ __forceinline__ float read_one(const struct few_args *args, size_t at)
{
    return args->wide ? ((const float *)args->add)[at]
                      : widen(((const bf16 *)args->add)[at]);
}

/* Elements `at` to `at + 3` of what is added. */
static __device__ __forceinline__ float4 read_quad(const struct few_args *args, size_t at,
                                                   int count)
{
    float4 add = make_float4(0, 0, 0, 0);

    if (!args->quads) {
        add.x = read_one(args, at);
        add.y = count > 1 ? read_one(args, at + 1) : 0;
        add.z = count > 2 ? read_one(args, at + 2) : 0;
        add.w = count > 3 ? read_one(args, at + 3) : 0;
    } else if (args->wide) {
        add = *(const float4 *)((const float *)args->add + at);
    } else {
        const __nv_bfloat162 *pairs = (const __nv_bfloat162 *)((const bf16 *)args->add + at);
        float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);

        add = make_float4(low.x, low.y, high.x, high.y);
    }
    return add;
}

static __device__ __forceinline__ void write_one(const struct few_args *args, size_t at, float x)
{
    if (args->wide)
        ((float *)args->out)[at] = x;
    else
        narrow((bf16 *)args->out + at, x);
}

static __device__ __forceinline__ void write_quad(const struct few_args *args, size_t at, int count,
                                                  float4 x)
{
    if (!args->quads) {
        write_one(args, at, x.x);
        if (count > 1)
            write_one(args, at + 1, x.y);
        if (count > 2)
            write_one(args, at + 2, x.z);
        if (count > 3)
            write_one(args, at + 3, x.w);
    } else if (args->wide) {
        *(float4 *)((float *)args->out + at) = x;
    } else {
        *(uint2 *)((bf16 *)args->out + at) = make_uint2(pack_pair(x.x, x.y), pack_pair(x.z, x.w));
    }
}

static __device__ __forceinline__ float4 add_quads(float4 x, float4 y)
{
    return make_float4(__fadd_rn(x.x, y.x), __fadd_rn(x.y, y.y), __fadd_rn(x.z, y.z),
                       __fadd_rn(x.w, y.w));
}

/* The parts added in the order of k, `step` quads from one to the next. All are asked for before
 * the first is waited for. */
static __device__ __forceinline__ float4 add_parts(const float4 *from, int step, int splits)
{
    float4 parts[SPLITS_MAX], sum;

#pragma unroll
    for (int rank = 0; rank < SPLITS_MAX; rank++)
        if (rank < splits)
            parts[rank] = from[rank * step];
    sum = parts[0];
#pragma unroll
    for (int rank = 1; rank < SPLITS_MAX; rank++)
        if (rank < splits)
            sum = add_quads(sum, parts[rank]);
    return sum;
}

/* The product is rounded before LoRA's sum is added to it, as if it had been stored. */
static __device__ __forceinline__ float4 add_lora(float4 product, const float *sums)
{
    const float4 add = *(const float4 *)sums;

    product.x = __bfloat162float(__float2bfloat16_rn(product.x)) + add.x;
    product.y = __bfloat162float(__float2bfloat16_rn(product.y)) + add.y;
    product.z = __bfloat162float(__float2bfloat16_rn(product.z)) + add.z;
    product.w = __bfloat162float(__float2bfloat16_rn(product.w)) + add.w;
    return product;
}

/* Stores this block's share of the tile, four columns a thread; the blocks of a cluster have
 * neighbouring columns. sums: LoRA's, of the share's columns and the rows that have it. */
template <bool LORA>
static __device__ __forceinline__ void
store_share(const struct few_args *args, int first_row, int rank, const float4 *parts,
            const uint64_t *barrier, const float *sums, const struct lora_lines *lines)
{
    const int shift = share_shift(args->splits), quads = 1 << shift, step = args->m * (quads + 1);

    for (int i = (int)threadIdx.x; i < args->m * quads; i += THREADS) {
        int row = i >> shift, quad = i & (quads - 1), column = 4 * (rank * quads + quad);
        int left = args->n - first_row - column;
        size_t at = (size_t)row * (size_t)args->ldo + (size_t)first_row + (size_t)column;
        float4 out, add = make_float4(0, 0, 0, 0);

        if (left > 0 && args->add)
            add = read_quad(args, at, left); /* on its way while the parts are */
        if (args->splits > 1)
            mbarrier_wait(barrier, 0); /* also in a block that stores nothing: it is sent parts,
                                          too */
        if (left <= 0)
            continue;
        out = add_parts(parts + i + row, step, args->splits);
        if (args->add)
            out = add_quads(out, add);
        if (LORA && lines->of[row] != LORA_NOBODY)
            out = add_lora(out, sums + row * PART_PITCH + 4 * quad);
        write_quad(args, at, left, out);
    }
}

/* The grid: with LORA the blocks that make S, then tiles of n times splits of k; a cluster is the
 * splits of one tile. */
template <int TILES, bool LORA>
static __global__ void REGISTERS_OF(LORA) few_kernel(const struct few_args args)
{
    extern __shared__ __align__(1024) uint4 ring[];
    using shape = join_here<TILES>;
    using where = parts_here<TILES, LORA>;
    int block = (int)blockIdx.x - (LORA ? args.lora.blocks : 0);
    int rank = block % args.splits, first_row = block / args.splits * B_ROWS;
    int stages = (args.k + DEPTH - 1) / DEPTH;
    float4 *parts = (float4 *)((uint8_t *)ring + where::at);
    uint64_t *barrier = (uint64_t *)((uint8_t *)ring + where::barrier);
    float sums[TILES][4] = {};
    struct few_lora lora = {};

    static_assert(8 * TILES * PART_PITCH * 4 <= PARTS_BYTES(TILES), "one part is less than many");
    static_assert(THREADS == LORA_THREADS, "the same blocks");
    if (LORA) {
        lora.lines = (struct lora_lines *)(ring + shape::lines / 16);
        if (block < 0) {
            lora_shrink<shape::shrink_ring, (TILES > 1)>(args.lora, ring, lora.lines, barrier);
            return;
        }
        lora.share = lora_share_of(args.lora.args, first_row + rank * (B_ROWS / args.splits),
                                   B_ROWS / args.splits);
    }
    if (args.splits > 1 && threadIdx.x == 0) {
        mbarrier_init(barrier);
        mbarrier_expect(barrier, args.m * B_ROWS * (int)sizeof(float));
    }
    add_up<TILES, LORA>(&args, first_row, stages * rank / args.splits,
                        stages * (rank + 1) / args.splits, ring, sums, &lora);
    if (where::left > 0)
        give_part<TILES>(&args, rank, sums, parts, barrier);
    if (LORA) {
        lora_expand<shape::depth, (TILES > 1)>(
            lora.lines, lora.share, lora.next, ring + shape::s / 16, item_of_b<TILES>(ring, 0),
            item_of_b<TILES>(ring, 1), shape::item / 16, (float *)ring, PART_PITCH);
        __syncthreads(); /* all threads see its sums; B and S are used up */
    }
    if (where::left == 0) {
        if (args.splits > 1)
            cluster_arrive(); /* the parts come to lie where S and B were */
        give_part<TILES>(&args, rank, sums, parts, barrier);
    }
    if (args.splits == 1)
        __syncthreads();
    store_share<LORA>(&args, first_row, rank, parts, barrier, (float *)ring, lora.lines);
}

/* --- launching --- */

static const struct {
    void (*kernel[2])(const struct few_args); /* [1]: with LoRA */
    int tiles, bytes, join_bytes[2];          /* shared memory; with LoRA, [1]: of sm_90a */
} kernels[] = {
#define KERNELS(tiles)                                                                             \
    {                                                                                              \
        {few_kernel<tiles, false>, few_kernel<tiles, true>}, tiles, few_shape<tiles>::bytes,       \
        {                                                                                          \
            join_shape<tiles, false>::bytes, join_shape<tiles, true>::bytes                        \
        }                                                                                          \
    }
    KERNELS(1),
    KERNELS(2),
    KERNELS(4),
    KERNELS(8),
};

static int shared_of(const struct cuda_context *context, size_t which, bool lora)
{
    return lora ? kernels[which].join_bytes[context->warpgroups] : kernels[which].bytes;
}

int cuda_gemm_few_open(struct cuda_context *context)
{
    int rc = 0;

    for (size_t i = 0; i < 2 * sizeof(kernels) / sizeof(kernels[0]) && rc == 0; i++)
        rc = cuda_check(context,
                        cudaFuncSetAttribute((const void *)kernels[i / 2].kernel[i % 2],
                                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             shared_of(context, i / 2, i % 2 == 1)),
                        "products of few rows");
    return rc;
}

bool cuda_gemm_few_suits(const struct cuda_context *context, const struct cuda_gemm *gemm)
{
    uintptr_t starts = (uintptr_t)gemm->a | (uintptr_t)gemm->b;

    return gemm->form == CUDA_GEMM_NT && context->act == CUDA_TYPE_BF16 && gemm->m >= 1 &&
           gemm->m <= CUDA_GEMM_FEW_ROWS && gemm->n >= SIZE_LEAST && gemm->k >= SIZE_LEAST &&
           gemm->k % 8 == 0 && gemm->lda % 8 == 0 && gemm->ldb % 8 == 0 && starts % 16 == 0;
}

bool cuda_gemm_few_adds(const struct cuda_context *context, const struct cuda_gemm *gemm)
{
    const struct cuda_lora *lora = gemm->lora;
    const struct cuda_weight *weight = lora->weight;

    for (int i = 1; i < weight->part_count; i++)
        if (weight->parts[i].row % B_ROWS != 0)
            return false;
    return cuda_lora_may_join(context, lora) && gemm->out_type == CUDA_TYPE_BF16 &&
           lora->rows->m == gemm->m && lora->rows->tile_count == gemm->m && weight->n == gemm->n &&
           weight->k == gemm->k && lora->x == gemm->a && gemm->lda == gemm->k;
}

/* How many blocks share k: enough to fill the card, each with some stages. Does not depend on m. */
static int cut_k(const struct cuda_context *context, int n, int k)
{
    int tiles = (n + B_ROWS - 1) / B_ROWS, stages = (k + DEPTH - 1) / DEPTH, splits = 1;

    while (context->arch >= 90 && splits < SPLITS_MAX && tiles * splits < BLOCKS_GOAL &&
           stages >= STAGES_LEAST * 2 * splits)
        splits *= 2;
    return splits;
}

/* How many blocks make S, and in which teams. These blocks are handed out first and should leave
 * room for the product's, all of which then run at once for most weights. But if each row has an
 * adapter of rank 32, they should have the share of the places that A has of all bytes, or the
 * product waits for S in the end. That makes two slabs for each row and part; more blocks than
 * slabs would have nothing to do. Where k is long and clusters are large enough, teams share a
 * slab; a shorter slab is made sooner by one block. A function of m, n and k, as a graph needs it:
 * not of the adapters. */
static void plan_lora(const struct cuda_context *context, const struct cuda_gemm *gemm, int splits,
                      struct lora_join *join)
{
    const int tiles = (gemm->n + B_ROWS - 1) / B_ROWS;
    const int places = context->multiprocessors * (context->warpgroups ? 2 : 1);
    const int slabs = 2 * gemm->lora->weight->part_count * gemm->m;
    const int share = places * slabs * LORA_SLAB / (slabs * LORA_SLAB + gemm->n);
    int room = places - tiles * splits, most;

    static_assert(LORA_BLOCKS_LEAST % SPLITS_MAX == 0 && SPLITS_MAX % LORA_TEAM == 0,
                  "whole clusters of whole teams");
    static_assert(CUDA_LORA_PAIR_ROWS == CUDA_GEMM_FEW_ROWS && LORA_LINES == CUDA_GEMM_FEW_ROWS &&
                      CUDA_LORA_PAIR_LD >= CUDA_PARTS_MAX * CLAAS_RANK_MAX,
                  "all rows and terms have a place");
    room = room > share ? room : share;
    room = room > LORA_BLOCKS_LEAST ? room / splits * splits : LORA_BLOCKS_LEAST;
    join->team = splits >= LORA_TEAM && gemm->k >= LORA_LONG ? LORA_TEAM : 1;
    most = (slabs * join->team + splits - 1) / splits * splits;
    join->blocks = room < most ? room : most;
}

static bf16 *pair_at(const struct cuda_lora_pair *pair, unsigned turn)
{
    return (bf16 *)pair->s + turn * CUDA_LORA_PAIR_ROWS * CUDA_LORA_PAIR_LD;
}

static void fill_args(struct cuda_context *context, const struct cuda_gemm *gemm,
                      struct few_args *args)
{
    size_t quad = gemm->out_type == CUDA_TYPE_F32 ? 16 : 8;

    args->a = (const bf16 *)gemm->a;
    args->b = (const bf16 *)gemm->b;
    args->add = gemm->add;
    args->out = gemm->out;
    args->m = gemm->m;
    args->n = gemm->n;
    args->k = gemm->k;
    args->lda = gemm->lda;
    args->ldb = gemm->ldb;
    args->ldo = gemm->ldo;
    args->splits = cut_k(context, gemm->n, gemm->k);
    args->wide = gemm->out_type == CUDA_TYPE_F32;
    args->frozen = gemm->frozen;
    args->quads = gemm->n % 4 == 0 && gemm->ldo % 4 == 0 &&
                  ((uintptr_t)gemm->out | (uintptr_t)gemm->add) % quad == 0;
    if (gemm->lora) {
        const struct cuda_lora_pair *pair = gemm->lora->pair;

        args->lora.args = lora_args_of(gemm->lora);
        args->lora.s = pair_at(pair, pair->turn);
        args->lora.next = pair_at(pair, pair->turn ^ 1);
        plan_lora(context, gemm, args->splits, &args->lora);
    }
}

int cuda_gemm_few(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    struct few_args args = {};
    const bool with = gemm->lora != NULL;
    size_t which = 0;
    unsigned tiles;

    fill_args(context, gemm, &args);
    if (with) {
        gemm->lora->pair->turn ^= 1;
        gemm->lora->pair->rows = gemm->m;
    }
    while (8 * kernels[which].tiles < gemm->m)
        which++;
    tiles = (unsigned)((gemm->n + B_ROWS - 1) / B_ROWS);
    return launch_clusters(context, "a product of few rows", kernels[which].kernel[with],
                           dim3(tiles * (unsigned)args.splits + (unsigned)args.lora.blocks),
                           dim3(THREADS), (size_t)shared_of(context, which, with), args.splits,
                           args);
}
