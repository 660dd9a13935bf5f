/* LoRA (Hu et al. 2021, arXiv 2106.09685): its six products over lists of tiles and groups. For the
 * rows m of one adapter and a part of a weight, N x K, with A [R][K], B [N][R] and the scale s:
 *
 *   S [m][R]  = x [m][K] A^T      y [m][N]  += S (sB)^T
 *   dS [m][R] = dY [m][N] (sB)    dx [m][K] += dS A       dB += s dY^T S    dA += dS^T x
 *
 * lora_problem.cuh has the six as forms of one product. Here is how the kernels on tensor cores are
 * launched: lora_sums.cuh (S, dS, dB, dA: many terms) and lora_adds.cuh (y, dx: few terms, added).
 * In float32, and where rows are no whole pieces of 16 bytes, plain_kernel does the same sections
 * with a thread for each element. */
#include "cuda/launch.cuh"
#include "cuda/lora_adds.cuh"
#include "cuda/lora_sums.cuh"

#define PLAIN_THREADS 256
#define SPLIT_CHUNKS  4 /* fewer are not worth a second launch */
#define WALK_BLOCKS   5 /* on each multiprocessor, before a block walks over more than one tile */

/* Sections without splits and walks; a thread makes one element of the square at a time. */
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

/* Columns of a section (blocks for each tile or group) before k is split. */
static int columns_of(const struct lora_args *args, enum cuda_lora_form form, int walk)
{
    const int ranks = lora_tiles_of(args->rank), widths = lora_tiles_of(args->ld);
    int rows = 0;

    for (int i = 0; i < args->part_count; i++)
        rows += (lora_tiles_of(args->part_n[i]) + walk - 1) / walk;
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
        return (lora_tiles_of(args->k) + walk - 1) / walk;
    }
}

/* How many tiles of columns a block of y or dx walks over: more where enough blocks are left. */
static int walk_of(const struct cuda_context *context, const struct lora_args *args,
                   enum cuda_lora_form form, int tiles)
{
    const int enough = WALK_BLOCKS * context->multiprocessors;
    int walk = 1;

    if (form != CUDA_LORA_Y && form != CUDA_LORA_DX)
        return 1;
    while (walk < WALK_MAX && columns_of(args, form, 2 * walk) * tiles >= enough)
        walk *= 2;
    return walk;
}

/* Into how many chunks k of S or dS is split: 1, unless too few blocks would have too many terms.
 * The chunks' sums lie in the products' workspace, which is free between two products. */
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

/* Into how many spans the gradients' rows are split: 1, unless there are too few blocks. The spans'
 * sums lie in the workspace, too. */
static int spans_of(const struct cuda_context *context, const struct lora_args *args, int blocks)
{
    const int spans = (args->m + LORA_SPAN - 1) / LORA_SPAN;
    const size_t bytes =
        (size_t)spans * (size_t)args->group_count * lora_gradient_size(*args) * sizeof(float);

    return blocks < context->multiprocessors && bytes <= context->lt_space_bytes ? spans : 1;
}

static int launch_join(struct cuda_context *context, const struct lora_args *args, unsigned blocks)
{
    const struct lora_section *section = &args->sections[0];
    const size_t size = lora_gradient_size(*args);
    const unsigned quads = (unsigned)((size + 4 * TEAM - 1) / (4 * TEAM));

    if (section->splits == 1)
        return 0;
    if (section->form == CUDA_LORA_DB)
        return launch(context, "LoRA's spans", join_spans,
                      dim3(quads, (unsigned)args->group_count), dim3(TEAM), 0, *args, size);
    return launch(context, "LoRA's chunks", join_chunks,
                  dim3(blocks / (unsigned)section->columns * JOIN_BLOCKS), dim3(TEAM), 0, *args,
                  section->splits, (bf16 *)(section->form == CUDA_LORA_S ? args->s : args->ds));
}

template <enum cuda_lora_form FORM, int STAGES>
static int launch_stages(struct cuda_context *context, const struct lora_args *args,
                         unsigned blocks)
{
    static bool allowed;
    int code = allow_shared(context, sum_kernel<FORM, STAGES>, sum_bytes(STAGES), &allowed);

    if (code < 0)
        return code;
    return launch(context, "LoRA's sums", sum_kernel<FORM, STAGES>, dim3(blocks),
                  dim3(SUM_THREADS), sum_bytes(STAGES), *args);
}

template <enum cuda_lora_form FORM>
static int launch_sums(struct cuda_context *context, const struct lora_args *args, unsigned blocks)
{
    int code;

    if (!context->warpgroups)
        code = launch_stages<FORM, STAGES_ANY>(context, args, blocks);
    else if (blocks > (unsigned)context->multiprocessors)
        code = launch_stages<FORM, STAGES_FULL>(context, args, blocks);
    else
        code = launch_stages<FORM, STAGES_DEEP>(context, args, blocks);
    return code < 0 ? code : launch_join(context, args, blocks);
}

template <bool TURNED>
static int launch_adds(struct cuda_context *context, const struct lora_args *args, unsigned blocks,
                       bool beside)
{
    const size_t most = (size_t)(lora_tiles_of(CUDA_LORA_PAIR_LD) + 2 * ADD_STAGES) * PIECE;
    const size_t terms = (size_t)(TURNED ? args->part_count : 1) * (size_t)args->rank;
    const size_t bytes = ((terms + STEP - 1) / STEP + 2 * ADD_STAGES) * PIECE * sizeof(bf16);
    static bool allowed;
    int code = allow_shared(context, add_kernel<TURNED>, most * sizeof(bf16), &allowed);

    if (code < 0)
        return code;
    return launch(context, "LoRA", add_kernel<TURNED>, dim3(blocks), dim3(TEAM), bytes, *args,
                  beside);
}

static int launch_plain(struct cuda_context *context, const struct lora_args *args, unsigned blocks)
{
    if (context->act == CUDA_TYPE_F32)
        plain_kernel<float><<<blocks, PLAIN_THREADS, 0, context->stream>>>(*args);
    else
        plain_kernel<bf16><<<blocks, PLAIN_THREADS, 0, context->stream>>>(*args);
    return cuda_check_launch(context, "LoRA");
}

/* The first section's form says which kernel: all sections of a launch have the same one. */
static int launch_sections(struct cuda_context *context, const struct lora_args *args,
                           unsigned blocks, bool even, bool beside)
{
    if (blocks == 0)
        return 0;
    if (!even)
        return launch_plain(context, args, blocks);
    switch (args->sections[0].form) {
    case CUDA_LORA_S:
        return launch_sums<CUDA_LORA_S>(context, args, blocks);
    case CUDA_LORA_DS:
        return launch_sums<CUDA_LORA_DS>(context, args, blocks);
    case CUDA_LORA_Y:
        return launch_adds<false>(context, args, blocks, beside);
    case CUDA_LORA_DX:
        return launch_adds<true>(context, args, blocks, beside);
    default: /* CUDA_LORA_DB, CUDA_LORA_DA */
        return launch_sums<CUDA_LORA_DB>(context, args, blocks);
    }
}

/* Numbers the sections' blocks; returns how many there are. */
static unsigned number_blocks(struct lora_args *args, int groups, int tiles)
{
    unsigned blocks = 0;

    for (int i = 0; i < args->section_count; i++) {
        struct lora_section *section = &args->sections[i];
        const bool by_group = section->form == CUDA_LORA_DB || section->form == CUDA_LORA_DA;

        section->first = blocks;
        section->columns = columns_of(args, section->form, section->walk) * section->splits;
        blocks += (unsigned)section->columns * (unsigned)(by_group ? groups : tiles);
    }
    return blocks;
}

int cuda_lora_grouped(struct cuda_context *context, const struct cuda_lora *lora,
                      const enum cuda_lora_form *forms, int count, bool beside)
{
    const int groups = lora->rows->group_count, tiles = lora->rows->tile_count;
    const bool even = cuda_lora_is_even(context, lora);
    struct lora_args args = lora_args_of(lora);
    int blocks, splits = 1;

    args.section_count = count;
    for (int i = 0; i < count; i++)
        args.sections[i] = (struct lora_section){
            .form = forms[i],
            .splits = 1,
            .walk = even ? walk_of(context, &args, forms[i], tiles) : 1,
        };
    blocks = (int)number_blocks(&args, groups, tiles);
    if (even)
        splits = count > 1 ? spans_of(context, &args, blocks)
                           : splits_of(context, &args, forms[0], blocks);
    for (int i = 0; i < count && splits > 1; i++)
        args.sections[i].splits = splits;
    if (splits > 1) {
        args.partial = (float *)context->lt_space;
        blocks = (int)number_blocks(&args, groups, tiles);
    }
    return launch_sections(context, &args, (unsigned)blocks, even, beside);
}
