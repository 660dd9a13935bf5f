/* LoRA's six products over lists of tiles and groups (lora_problem.cuh has the forms), on tensor
 * cores.
 *
 * A block makes a 64 x 64 piece of one product: four warps in a square, 32 x 32 each, by
 * mma.sync.m16n8k16 with float32 sums. Operands come in pieces of 64 terms by cp.async, up to three
 * in flight; a piece is 64 rows of memory of 64 elements (128 bytes), swizzled, whether it is
 * turned or not: ldmatrix does the turning. What lies outside of the product is filled with zeros
 * and not read. Sums of LORA_CHUNK terms are begun at zero and added up in order; where there are
 * few tiles and many terms, each chunk is a block's and join_kernel adds up the same numbers in the
 * same order. So a row's bits depend on neither the number of rows nor the other groups.
 *
 *   x, dY (and y, dx) are read once; A and B once per 64 rows, from the L2 as a rule.
 *   Shared memory: 16 KB per piece in flight, 8 KB for y or dx: with a rank up to 64 the forms Y
 * and DX have one piece, 24 KB; S and DS three, 48 KB, four blocks on an SM.
 *
 * In float32, and where rows are no whole pieces of 16 bytes, plain_kernel does the same sections
 * with a thread for each element. */
#include "cuda/attention_tiles.cuh"
#include "cuda/lora_problem.cuh"

#include <type_traits>

#define THREADS       128
#define STEP          64 /* terms of a piece */
#define PIECE         (64 * STEP)
#define PIECES_MAX    3
#define PLAIN_THREADS 256
#define SPLIT_CHUNKS  4 /* fewer are not worth a second launch */

/* --- pieces --- */

/* Waits until at most the newest `pieces` - 1 groups of copies are under way. */
static __device__ __forceinline__ void wait_oldest(int pieces)
{
    if (pieces == 3)
        copies_wait_but<2>();
    else if (pieces == 2)
        copies_wait_but<1>();
    else
        copies_wait_but<0>();
}

/* Starts the copy of 64 rows of 64 elements; zeros from `rows` and from `columns` (a multiple of 8)
 * on. */
static __device__ __forceinline__ void load_piece(bf16 *tile, const bf16 *from, size_t ld, int rows,
                                                  int columns)
{
    const int chunk = (int)threadIdx.x % 8, row = (int)threadIdx.x / 8;

#pragma unroll
    for (int i = 0; i < 64 * 8 / THREADS; i++) {
        const int r = row + i * (THREADS / 8);
        const bool valid = r < rows && chunk * 8 < columns;

        copy_16(tile + place<64>(r, chunk),
                valid ? from + (size_t)r * ld + (size_t)(chunk * 8) : from, valid);
    }
}

/* Terms k … k+63 of both operands. */
template <bool TURNED_LEFT, bool TURNED_RIGHT>
static __device__ __forceinline__ void load_terms(bf16 *tiles, const lora_problem<bf16> &p, int k)
{
    const int terms = p.k_end - k, m = p.m - p.i, n = p.n - p.j;

    if (TURNED_LEFT)
        load_piece(tiles, p.left + (size_t)k * p.ld_left + (size_t)p.i, p.ld_left, terms, m);
    else
        load_piece(tiles, p.left + (size_t)p.i * p.ld_left + (size_t)k, p.ld_left, m, terms);
    if (TURNED_RIGHT)
        load_piece(tiles + PIECE, p.right + (size_t)k * p.ld_right + (size_t)p.j, p.ld_right, terms,
                   n);
    else
        load_piece(tiles + PIECE, p.right + (size_t)p.j * p.ld_right + (size_t)k, p.ld_right, n,
                   terms);
}

/* Rows row … row+15 of the left operand, terms k … k+15. */
template <bool TURNED>
static __device__ __forceinline__ void load_left(uint32_t (&to)[4], const bf16 *tile, int row,
                                                 int k)
{
    const int lane = (int)threadIdx.x % 32;

    if (TURNED)
        load_transposed(to, tile + place<64>(k + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
    else
        load_matrices(to, tile + place<64>(row + lane % 16, k / 8 + lane / 16));
}

/* Columns column … column+15 of the right operand: two fragments side by side. */
template <bool TURNED>
static __device__ __forceinline__ void load_right(uint32_t (&to)[4], const bf16 *tile, int column,
                                                  int k)
{
    const int lane = (int)threadIdx.x % 32;

    if (TURNED)
        load_transposed(to, tile + place<64>(k + lane % 16, column / 8 + lane / 16));
    else
        load_matrices(to,
                      tile + place<64>(column + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}

/* A warp's 32 x 32 of a piece of the result. */
typedef float warp_sums[2][4][4];

template <bool TURNED_LEFT, bool TURNED_RIGHT>
static __device__ __forceinline__ void multiply_piece(warp_sums &sum, const bf16 *tiles, int row,
                                                      int column)
{
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
        uint32_t left[2][4];

#pragma unroll
        for (int mt = 0; mt < 2; mt++)
            load_left<TURNED_LEFT>(left[mt], tiles, row + 16 * mt, k);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t right[4];

            load_right<TURNED_RIGHT>(right, tiles + PIECE, column + 16 * n, k);
#pragma unroll
            for (int mt = 0; mt < 2; mt++) {
                multiply(sum[mt][2 * n], left[mt], right[0], right[1]);
                multiply(sum[mt][2 * n + 1], left[mt], right[2], right[3]);
            }
        }
    }
}

static __device__ __forceinline__ void add_chunk(warp_sums &total, warp_sums &sum)
{
#pragma unroll
    for (int mt = 0; mt < 2; mt++)
#pragma unroll
        for (int nt = 0; nt < 4; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                total[mt][nt][e] += sum[mt][nt][e];
                sum[mt][nt][e] = 0.0f;
            }
}

/* total = the product's piece at (i, j). `tiles`: shared memory of `pieces` pieces; what else was
 * begun to be copied arrives with the first. */
template <bool TURNED_LEFT, bool TURNED_RIGHT>
static __device__ __forceinline__ void sum_piece(warp_sums &total, const lora_problem<bf16> &p,
                                                 bf16 *tiles, int pieces, int row, int column)
{
    warp_sums sum = {};
    int ahead = p.k_first, at = 0;

    for (int i = 0; i < pieces; i++, ahead += STEP) {
        if (ahead < p.k_end)
            load_terms<TURNED_LEFT, TURNED_RIGHT>(tiles + i * 2 * PIECE, p, ahead);
        copies_commit();
    }
    for (int k = p.k_first; k < p.k_end; k += STEP, ahead += STEP) {
        bf16 *tile = tiles + at * 2 * PIECE;

        wait_oldest(pieces);
        __syncthreads();
        multiply_piece<TURNED_LEFT, TURNED_RIGHT>(sum, tile, row, column);
        if ((k + STEP) % LORA_CHUNK == 0 || k + STEP >= p.k_end)
            add_chunk(total, sum);
        __syncthreads(); /* all warps are done with the tile */
        if (ahead < p.k_end)
            load_terms<TURNED_LEFT, TURNED_RIGHT>(tile, p, ahead);
        copies_commit();
        at = at + 1 == pieces ? 0 : at + 1;
    }
}

/* --- results --- */

/* Lane l holds columns 2 (l % 4) + {0, 1} of row l / 4 (elements 0, 1) and l / 4 + 8 (2, 3). */
#define FOR_PAIRS(mt, nt, half)                                                                    \
    _Pragma("unroll") for (int mt = 0; mt < 2; mt++)                                               \
        _Pragma("unroll") for (int nt = 0; nt < 4; nt++)                                           \
            _Pragma("unroll") for (int half = 0; half < 2; half++)

static __device__ __forceinline__ int pair_row(int row, int mt, int half)
{
    return row + 16 * mt + 8 * half + (int)threadIdx.x % 32 / 4;
}
static __device__ __forceinline__ int pair_column(int column, int nt)
{
    return column + 8 * nt + 2 * ((int)threadIdx.x % 4);
}

/* S, dS: rounded, or float32 where k is split. n is a multiple of 8, so pairs are whole. */
static __device__ __forceinline__ void store_rows_of(const lora_problem<bf16> &p,
                                                     const warp_sums &total, int row, int column)
{
    FOR_PAIRS(mt, nt, half)
    {
        const int i = p.i + pair_row(row, mt, half), j = p.j + pair_column(column, nt);
        const float low = total[mt][nt][2 * half], high = total[mt][nt][2 * half + 1];

        if (i < p.m && j < p.n && p.partial)
            *(float2 *)(p.partial + (size_t)i * p.out_i + (size_t)j) = make_float2(low, high);
        else if (i < p.m && j < p.n)
            *(uint32_t *)((bf16 *)p.out + (size_t)i * p.out_i + (size_t)j) = pack_pair(low, high);
    }
}

/* y, dx: added to what was copied into `tile`, then stored in pieces of 16 bytes. */
static __device__ __forceinline__ void
add_rows_of(const lora_problem<bf16> &p, const warp_sums &total, bf16 *tile, int row, int column)
{
    const int chunk = (int)threadIdx.x % 8;

    FOR_PAIRS(mt, nt, half)
    {
        const int j = pair_column(column, nt);
        bf16 *at = tile + place<64>(pair_row(row, mt, half), j / 8) + j % 8;
        const float2 old = __bfloat1622float2(*(const __nv_bfloat162 *)at);

        *(uint32_t *)at =
            pack_pair(old.x + total[mt][nt][2 * half], old.y + total[mt][nt][2 * half + 1]);
    }
    __syncthreads();
    for (int r = (int)threadIdx.x / 8; r < 64; r += THREADS / 8)
        if (p.i + r < p.m && p.j + chunk * 8 < p.n)
            *(uint4 *)((bf16 *)p.out + (size_t)(p.i + r) * p.out_i + (size_t)(p.j + chunk * 8)) =
                *(const uint4 *)(tile + place<64>(r, chunk));
}

/* dB, dA: all reads of 16 rows before the writes, so that they are under way together. */
static __device__ __forceinline__ void add_gradients(const lora_problem<bf16> &p,
                                                     const warp_sums &total, int row, int column)
{
    float *out = (float *)p.out;

#pragma unroll
    for (int mt = 0; mt < 2; mt++) {
        float old[16];

#pragma unroll
        for (int e = 0; e < 16; e++) {
            const int i = p.i + pair_row(row, mt, e / 2 % 2);
            const int j = p.j + pair_column(column, e / 4) + e % 2;

            old[e] = i < p.m && j < p.n ? out[(size_t)i * p.out_i + (size_t)j * p.out_j] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < 16; e++) {
            const int i = p.i + pair_row(row, mt, e / 2 % 2);
            const int j = p.j + pair_column(column, e / 4) + e % 2;

            if (i < p.m && j < p.n)
                out[(size_t)i * p.out_i + (size_t)j * p.out_j] =
                    fmaf(p.scale, total[mt][e / 4][e % 4], old[e]);
        }
    }
}

/* --- the kernels --- */

/* Dynamic shared memory: `pieces` times both operands' pieces, then y's or dx's if a section is of
 * such a form. */
static __global__ void __launch_bounds__(THREADS, 4)
    grouped_kernel(const struct lora_args args, int pieces)
{
    extern __shared__ __align__(128) uint8_t shared[];
    bf16 *tiles = (bf16 *)shared, *result = tiles + pieces * 2 * PIECE;
    const int warp = (int)threadIdx.x / 32, row = warp / 2 * 32, column = warp % 2 * 32;
    lora_problem<bf16> p;
    warp_sums total = {};

    if (!lora_find(args, &p))
        return;
    switch (p.form) {
    case CUDA_LORA_S:
        sum_piece<false, false>(total, p, tiles, pieces, row, column);
        store_rows_of(p, total, row, column);
        break;
    case CUDA_LORA_DS:
        sum_piece<false, true>(total, p, tiles, pieces, row, column);
        store_rows_of(p, total, row, column);
        break;
    case CUDA_LORA_Y:
        load_piece(result, (const bf16 *)p.out + (size_t)p.i * p.out_i + (size_t)p.j, p.out_i,
                   p.m - p.i, p.n - p.j);
        sum_piece<false, false>(total, p, tiles, pieces, row, column);
        add_rows_of(p, total, result, row, column);
        break;
    case CUDA_LORA_DX:
        load_piece(result, (const bf16 *)p.out + (size_t)p.i * p.out_i + (size_t)p.j, p.out_i,
                   p.m - p.i, p.n - p.j);
        sum_piece<false, true>(total, p, tiles, pieces, row, column);
        add_rows_of(p, total, result, row, column);
        break;
    default: /* CUDA_LORA_DB, CUDA_LORA_DA */
        sum_piece<true, true>(total, p, tiles, pieces, row, column);
        add_gradients(p, total, row, column);
        break;
    }
}

/* A block per tile: adds up the chunks of its rows of S or dS in order, the group's width of them.
 */
static __global__ void __launch_bounds__(PLAIN_THREADS)
    join_kernel(const struct lora_args args, int splits, bf16 *out)
{
    const struct cuda_lora_tile tile = args.tiles[blockIdx.x];
    const struct cuda_lora_group *group = &args.groups[tile.group];
    const int width = group->parts[args.kind] * group->rank;
    const size_t chunk = (size_t)args.m * (size_t)args.ld;

    for (int e = (int)threadIdx.x; e < tile.count * width; e += PLAIN_THREADS) {
        const size_t at = (size_t)(tile.first + e / width) * (size_t)args.ld + (size_t)(e % width);
        float total = 0.0f;

        for (int i = 0; i < splits; i++)
            total += args.partial[(size_t)i * chunk + at];
        out[at] = __float2bfloat16_rn(total);
    }
}

static __device__ __forceinline__ float widen(float x)
{
    return x;
}
static __device__ __forceinline__ float widen(bf16 x)
{
    return __bfloat162float(x);
}
static __device__ __forceinline__ void narrow(float *to, float x)
{
    *to = x;
}
static __device__ __forceinline__ void narrow(bf16 *to, float x)
{
    *to = __float2bfloat16_rn(x);
}

/* Sections without splits, an element of the piece at a time. */
template <typename T>
static __global__ void __launch_bounds__(PLAIN_THREADS) plain_kernel(const struct lora_args args)
{
    lora_problem<T> p;

    if (!lora_find(args, &p))
        return;
    const bool turned_left = p.form == CUDA_LORA_DB || p.form == CUDA_LORA_DA;
    const bool turned_right = turned_left || p.form == CUDA_LORA_DS || p.form == CUDA_LORA_DX;

    for (int e = (int)threadIdx.x; e < LORA_TILE * LORA_TILE; e += PLAIN_THREADS) {
        const int i = p.i + e / LORA_TILE, j = p.j + e % LORA_TILE;
        const T *left = p.left + (turned_left ? (size_t)i : (size_t)i * p.ld_left);
        const T *right = p.right + (turned_right ? (size_t)j : (size_t)j * p.ld_right);
        const size_t left_k = turned_left ? p.ld_left : 1, right_k = turned_right ? p.ld_right : 1;
        const size_t at = (size_t)i * p.out_i + (size_t)j * p.out_j;
        float total = 0.0f;

        if (i >= p.m || j >= p.n)
            continue;
        for (int k = 0; k < p.k_end; k++)
            total = fmaf(widen(left[(size_t)k * left_k]), widen(right[(size_t)k * right_k]), total);
        if (turned_left)
            ((float *)p.out)[at] = fmaf(p.scale, total, ((float *)p.out)[at]);
        else if (p.form == CUDA_LORA_Y || p.form == CUDA_LORA_DX)
            narrow((T *)p.out + at, widen(((const T *)p.out)[at]) + total);
        else
            narrow((T *)p.out + at, total);
    }
}

/* --- launches --- */

bool cuda_lora_is_even(const struct cuda_context *context, const struct cuda_lora *lora)
{
    const struct cuda_weight *weight = lora->weight;
    const uintptr_t places = (uintptr_t)lora->x | (uintptr_t)lora->s | (uintptr_t)lora->y |
                             (uintptr_t)lora->dy | (uintptr_t)lora->ds | (uintptr_t)lora->dx;
    int sizes = weight->n | weight->k | lora->ld;

    for (int i = 0; i < weight->part_count; i++)
        sizes |= weight->parts[i].n | weight->parts[i].row;
    return context->act == CUDA_TYPE_BF16 && sizes % 8 == 0 && places % 16 == 0;
}

/* Columns of a section before k is split. */
static int columns_of(const struct lora_args *args, enum cuda_lora_form form)
{
    const int ranks = lora_tiles_of(args->rank), widths = lora_tiles_of(args->ld);
    int rows = 0;

    for (int i = 0; i < args->part_count; i++)
        rows += lora_tiles_of(args->part_n[i]);
    switch (form) {
    case CUDA_LORA_S:
        return widths;
    case CUDA_LORA_Y:
        return rows;
    case CUDA_LORA_DS:
        return args->part_count * ranks;
    case CUDA_LORA_DB:
        return rows * ranks;
    case CUDA_LORA_DA:
        return lora_tiles_of(args->k) * widths;
    default: /* CUDA_LORA_DX */
        return lora_tiles_of(args->k);
    }
}

/* Into how many chunks k is split: 1, unless too few blocks would have too many terms. The chunks'
 * sums lie in the products' workspace, which is free between two products. */
static int splits_of(const struct cuda_context *context, const struct lora_args *args,
                     enum cuda_lora_form form, int blocks)
{
    int terms = args->k, chunks;
    size_t bytes = (size_t)args->m * (size_t)args->ld * sizeof(float);

    for (int i = 0; i < args->part_count && form == CUDA_LORA_DS; i++)
        terms = i == 0 || terms < args->part_n[i] ? args->part_n[i] : terms;
    chunks = (terms + LORA_CHUNK - 1) / LORA_CHUNK;
    if ((form != CUDA_LORA_S && form != CUDA_LORA_DS) || chunks < SPLIT_CHUNKS ||
        blocks >= context->multiprocessors || bytes * (size_t)chunks > context->lt_space_bytes)
        return 1;
    return chunks;
}

/* Pieces in flight: as many as the section with the most terms has, but at most PIECES_MAX. */
static int pieces_of(const struct lora_args *args)
{
    int pieces = 1;

    for (int i = 0; i < args->section_count; i++) {
        const enum cuda_lora_form form = args->sections[i].form;
        const int terms = form == CUDA_LORA_Y ? args->rank : form == CUDA_LORA_DX ? args->ld : 4096;
        const int need = (terms + STEP - 1) / STEP;

        pieces = pieces > need ? pieces : need;
    }
    return pieces < PIECES_MAX ? pieces : PIECES_MAX;
}

static int launch_tensor(struct cuda_context *context, const struct lora_args *args,
                         unsigned blocks)
{
    const size_t most = (2 * PIECES_MAX + 1) * PIECE * sizeof(bf16);
    const int pieces = pieces_of(args), splits = args->sections[0].splits;
    size_t bytes = (size_t)(2 * pieces) * PIECE * sizeof(bf16);
    static bool allowed;
    int code = allow_shared(context, grouped_kernel, most, &allowed);

    for (int i = 0; i < args->section_count; i++)
        if (args->sections[i].form == CUDA_LORA_Y || args->sections[i].form == CUDA_LORA_DX) {
            bytes += PIECE * sizeof(bf16);
            break;
        }
    if (code < 0)
        return code;
    grouped_kernel<<<blocks, THREADS, bytes, context->stream>>>(*args, pieces);
    if (splits > 1)
        join_kernel<<<blocks / (unsigned)args->sections[0].columns, PLAIN_THREADS, 0,
                      context->stream>>>(
            *args, splits, (bf16 *)(args->sections[0].form == CUDA_LORA_S ? args->s : args->ds));
    return cuda_check_launch(context, "LoRA");
}

int cuda_lora_grouped(struct cuda_context *context, const struct cuda_lora *lora,
                      const enum cuda_lora_form *forms, int count)
{
    struct lora_args args = lora_args_of(lora);
    const bool even = cuda_lora_is_even(context, lora);
    unsigned blocks = 0;

    args.section_count = count;
    for (int i = 0; i < count; i++) {
        struct lora_section *section = &args.sections[i];
        const bool whole = forms[i] == CUDA_LORA_DB || forms[i] == CUDA_LORA_DA;
        const int lines = whole ? lora->rows->group_count : lora->rows->tile_count;

        section->form = forms[i];
        section->first = blocks;
        section->columns = columns_of(&args, forms[i]);
        section->splits = 1;
        if (even && count == 1)
            section->splits = splits_of(context, &args, forms[i], section->columns * lines);
        section->columns *= section->splits;
        blocks += (unsigned)section->columns * (unsigned)lines;
        if (section->splits > 1)
            args.partial = (float *)context->lt_space;
    }
    if (blocks == 0)
        return 0;
    if (even)
        return launch_tensor(context, &args, blocks);
    if (context->act == CUDA_TYPE_F32)
        plain_kernel<float><<<blocks, PLAIN_THREADS, 0, context->stream>>>(args);
    else
        plain_kernel<bf16><<<blocks, PLAIN_THREADS, 0, context->stream>>>(args);
    return cuda_check_launch(context, "LoRA");
}
