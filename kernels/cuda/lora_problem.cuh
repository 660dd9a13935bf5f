/* What the LoRA kernels share: the arguments of a launch, and how a block finds its work.
 *
 * Every form is a product P[i][j] = sum over k of left(i, k) right(j, k), for one group or one tile
 * of its rows:
 *
 *   form  P              i        j        k        left        right       into
 *   S     x A^T          rows     parts*R  K        x           A           S
 *   Y     S (sB)^T       rows     N part   R        S           sB          y, added
 *   DS    dY (sB)        rows     R        N part   dY          sB turned   dS
 *   DX    dS A           rows     K        parts*R  dS          A turned    dx, added
 *   DB    dY^T S         N part   R        rows     dY turned   S turned    dB, added, times s
 *   DA    x^T dS         K        parts*R  rows     x turned    dS turned   dA^T, added
 *
 * An operand lies in memory with k along its rows, or turned, with k across them. P is made in
 * squares of 64 x 64. A launch is a list of sections, one per form; a section has `columns` blocks
 * for each tile of rows (DB, DA: for each group), numbered along the parts of the weight. */
#ifndef CLAAS_CUDA_LORA_PROBLEM_CUH
#define CLAAS_CUDA_LORA_PROBLEM_CUH

#include "cuda/cuda_lora.h"

#define LORA_TILE 64 /* of i and of j */
/* Sums have one order, whichever blocks make them: terms are added within chunks, chunks in order.
 * The gradients' terms are rows; their chunks are added within spans, spans in order. */
#define LORA_CHUNK 512  /* terms */
#define LORA_SPAN  1024 /* rows */

struct lora_section {
    enum cuda_lora_form form;
    unsigned first; /* block */
    int columns;
    int splits; /* parts of k, a block each: 1, or as many as chunks (DB, DA: as spans) */
    int walk;   /* Y, DX: tiles of columns that a block walks over; else 1 */
};
struct lora_args {
    const struct cuda_lora_group *groups;
    const struct cuda_lora_tile *tiles;
    int group_count, m, layer, kind, n, k, ld;
    int part_count, row[CUDA_PARTS_MAX], part_n[CUDA_PARTS_MAX], module[CUDA_PARTS_MAX];
    int rank; /* the largest, for sizes of grids */
    const void *x, *dy;
    void *s, *y, *ds, *dx;
    float *partial; /* [splits][m][ld]; DB, DA: [splits][groups][lora_gradient_size()]; NULL: k is
                       not split */
    int section_count;
    struct lora_section sections[CUDA_LORA_FORMS];
};

static inline struct lora_args lora_args_of(const struct cuda_lora *lora)
{
    struct lora_args args = {};

    args.groups = lora->rows->groups;
    args.tiles = lora->rows->tiles;
    args.group_count = lora->rows->group_count;
    args.m = lora->rows->m;
    args.layer = lora->layer;
    args.kind = lora->kind;
    args.n = lora->weight->n;
    args.k = lora->weight->k;
    args.ld = lora->ld;
    args.part_count = lora->weight->part_count;
    for (int i = 0; i < args.part_count; i++) {
        args.row[i] = lora->weight->parts[i].row;
        args.part_n[i] = lora->weight->parts[i].n;
        args.module[i] = lora->weight->parts[i].module;
    }
    args.rank = lora->rows->rank;
    args.x = lora->x;
    args.dy = lora->dy;
    args.s = lora->s;
    args.y = lora->y;
    args.ds = lora->ds;
    args.dx = lora->dx;
    return args;
}

static __host__ __device__ __forceinline__ int lora_tiles_of(int size)
{
    return (size + LORA_TILE - 1) / LORA_TILE;
}

/* Elements of a group's partial gradient: dA, then dB of all of the weight's rows. */
static __host__ __device__ __forceinline__ size_t lora_gradient_size(const struct lora_args &args)
{
    return (size_t)args.ld * (size_t)args.k + (size_t)args.n * (size_t)args.rank;
}

/* What a block has to do: a LORA_TILE x LORA_TILE square of a product, or a row of squares. */
template <typename T> struct lora_problem {
    enum cuda_lora_form form;
    const T *left, *right;
    size_t ld_left, ld_right;
    int m, n, i, j;      /* the product's size; where the first square begins */
    int j_end;           /* where the row of squares ends, unless n comes first */
    int k_first, k_end;  /* the terms to sum */
    void *out;           /* of (0, 0): act; DB, DA: float32 */
    size_t out_i, out_j; /* strides */
    float scale;
    float *partial; /* of (0, 0): float32, out_i apart; or NULL */
};

/* The part of the weight that a section's column `x` (a block) belongs to; each part has `per`
 * columns for every `size` of its N rows. x becomes the column within the part. */
static __device__ __forceinline__ int lora_part_of(const struct lora_args &args, int size, int per,
                                                   int *x)
{
    int part = 0;

    for (; part < args.part_count - 1; part++) {
        const int columns = (args.part_n[part] + size - 1) / size * per;

        if (*x < columns)
            break;
        *x -= columns;
    }
    return part;
}

/* Operands and result of a form over rows from `first` on. Y, DS: for one part of the weight, which
 * is the place-th of those that the adapter has; S, DX: for all of these at once, place 0. */
template <typename T>
static __device__ __forceinline__ void
lora_set_rows(const struct lora_args &args, const struct cuda_lora_group *group, size_t first,
              int part, int place, struct lora_problem<T> *p)
{
    const T *view = (const T *)group->view + (size_t)args.layer * group->layer;
    const T *a = view + group->a[args.kind], *b = view + group->b[args.module[part]];
    const size_t at = (size_t)place * (size_t)group->rank, row = (size_t)args.row[part];
    const size_t n = (size_t)args.n, k = (size_t)args.k, ld = (size_t)args.ld;
    const int width = group->parts[args.kind] * group->rank;
    const bool of_a = p->form == CUDA_LORA_S || p->form == CUDA_LORA_DX;

    p->right = of_a ? a : b;
    p->ld_right = of_a ? k : (size_t)group->rank;
    switch (p->form) {
    case CUDA_LORA_S:
        p->left = (const T *)args.x + first * k;
        p->ld_left = k;
        p->n = width;
        p->k_end = args.k;
        p->out = (T *)args.s + first * ld;
        p->out_i = ld;
        break;
    case CUDA_LORA_Y:
        p->left = (const T *)args.s + first * ld + at;
        p->ld_left = ld;
        p->n = args.part_n[part];
        p->k_end = group->rank;
        p->out = (T *)args.y + first * n + row;
        p->out_i = n;
        break;
    case CUDA_LORA_DS:
        p->left = (const T *)args.dy + first * n + row;
        p->ld_left = n;
        p->n = group->rank;
        p->k_end = args.part_n[part];
        p->out = (T *)args.ds + first * ld + at;
        p->out_i = ld;
        break;
    default: /* CUDA_LORA_DX */
        p->left = (const T *)args.ds + first * ld;
        p->ld_left = ld;
        p->n = args.k;
        p->k_end = width;
        p->out = (T *)args.dx + first * k;
        p->out_i = k;
        break;
    }
}

/* S, Y, DS, DX: a block's problem within a tile of rows. false: nothing to do. */
template <typename T>
static __device__ bool lora_row_problem(const struct lora_args &args,
                                        const struct lora_section &section, int x, int y,
                                        struct lora_problem<T> *p)
{
    const struct cuda_lora_tile tile = args.tiles[y];
    const bool of_part = section.form == CUDA_LORA_Y || section.form == CUDA_LORA_DS;
    const size_t first = (size_t)tile.first;
    int part = 0, place = 0, chunk = 0;

    if (tile.count == 0)
        return false;
    const struct cuda_lora_group *group = &args.groups[tile.group];

    if (section.form == CUDA_LORA_Y) {
        part = lora_part_of(args, LORA_TILE * section.walk, 1, &x);
    } else if (section.form == CUDA_LORA_DS) {
        const int per = lora_tiles_of(args.rank) * section.splits;

        part = x / per;
        x %= per;
    }
    if (of_part)
        place = group->index[args.module[part]];
    if (place < 0)
        return false;
    if (section.splits > 1) {
        chunk = x % section.splits;
        x /= section.splits;
    }
    p->form = section.form;
    p->m = tile.count;
    p->i = 0;
    p->j = x * LORA_TILE * section.walk;
    p->j_end = p->j + LORA_TILE * section.walk;
    p->k_first = 0;
    p->out_j = 1;
    p->scale = 1.0f;
    p->partial = NULL;
    lora_set_rows(args, group, first, part, place, p);
    if (section.splits > 1) {
        p->partial = args.partial + ((size_t)chunk * (size_t)args.m + first) * (size_t)args.ld +
                     (size_t)place * (size_t)group->rank;
        p->k_first = chunk * LORA_CHUNK;
        /* parts are cut into as many chunks as the longest: a shorter one's last sums are zero */
        p->k_end = p->k_end < p->k_first + LORA_CHUNK ? p->k_end : p->k_first + LORA_CHUNK;
    }
    return p->j < p->n && p->k_end > 0;
}

/* The element of the group's gradient that element `at` of its partial gradient is added to, and
 * the factor of that; NULL: there is none. */
static __device__ __forceinline__ float *lora_gradient_at(const struct lora_args &args,
                                                          const struct cuda_lora_group *group,
                                                          size_t at, float *scale)
{
    const size_t of_a = (size_t)args.ld * (size_t)args.k, rank = (size_t)group->rank;
    const size_t width = (size_t)(group->parts[args.kind] * group->rank);
    float *grad = group->grad + (size_t)args.layer * group->layer;

    *scale = 1.0f;
    if (!group->grad)
        return NULL;
    if (at < of_a)
        return at < width * (size_t)args.k ? grad + group->a[args.kind] + at : NULL;
    at -= of_a;
    *scale = group->scale;
    for (int part = 0; part < args.part_count; part++) {
        const size_t first = (size_t)args.row[part] * rank, size = (size_t)args.part_n[part] * rank;

        if (at >= first && at < first + size)
            return group->index[args.module[part]] >= 0
                       ? grad + group->b[args.module[part]] + (at - first)
                       : NULL;
    }
    return NULL;
}

/* Operands and result of a gradient over a group's rows; x becomes the number of the square within
 * the product. false: nothing to do. */
template <typename T>
static __device__ bool lora_set_gradient(const struct lora_args &args,
                                         const struct cuda_lora_group *group, float *partial,
                                         int *x, struct lora_problem<T> *p)
{
    const size_t first = (size_t)group->first, layer = (size_t)args.layer * group->layer;
    int part, place;

    if (p->form == CUDA_LORA_DA) {
        p->left = (const T *)args.x + first * (size_t)args.k;
        p->ld_left = (size_t)args.k;
        p->right = (const T *)args.ds + first * (size_t)args.ld;
        p->m = args.k;
        p->n = group->parts[args.kind] * group->rank;
        p->out = group->grad + layer + group->a[args.kind];
        p->out_i = 1;
        p->out_j = (size_t)args.k;
        p->scale = 1.0f;
        p->partial = partial;
        return true;
    }
    part = lora_part_of(args, LORA_TILE, lora_tiles_of(args.rank), x);
    place = group->index[args.module[part]];
    if (place < 0)
        return false;
    p->left = (const T *)args.dy + first * (size_t)args.n + (size_t)args.row[part];
    p->ld_left = (size_t)args.n;
    p->right = (const T *)args.s + first * (size_t)args.ld + (size_t)place * (size_t)group->rank;
    p->m = args.part_n[part];
    p->n = group->rank;
    p->out = group->grad + layer + group->b[args.module[part]];
    p->out_i = (size_t)group->rank;
    p->out_j = 1;
    p->scale = group->scale;
    p->partial = partial ? partial + (size_t)args.ld * (size_t)args.k +
                               (size_t)args.row[part] * (size_t)group->rank
                         : NULL;
    return true;
}

/* DB, DA: a block's problem over all rows of a group, or a span of them. false: nothing to do. */
template <typename T>
static __device__ bool lora_group_problem(const struct lora_args &args,
                                          const struct lora_section &section, int x, int y,
                                          struct lora_problem<T> *p)
{
    const struct cuda_lora_group *group = &args.groups[y];
    const int per = lora_tiles_of(section.form == CUDA_LORA_DB ? args.rank : args.ld);
    const int span = x % section.splits;
    float *partial = NULL;

    if (!group->grad)
        return false;
    x /= section.splits;
    p->form = section.form;
    p->k_first = span * LORA_SPAN;
    p->k_end = group->count;
    if (section.splits > 1) {
        const size_t at = (size_t)span * (size_t)args.group_count + (size_t)y;

        partial = args.partial + at * lora_gradient_size(args);
        p->k_end = p->k_end < p->k_first + LORA_SPAN ? p->k_end : p->k_first + LORA_SPAN;
    }
    if (p->k_first >= p->k_end || !lora_set_gradient(args, group, partial, &x, p))
        return false;
    p->ld_right = (size_t)args.ld;
    p->i = x / per * LORA_TILE;
    p->j = x % per * LORA_TILE;
    return p->j < p->n;
}

/* This block's problem. false: nothing to do. */
template <typename T>
static __device__ __forceinline__ bool lora_find(const struct lora_args &args,
                                                 struct lora_problem<T> *p)
{
    int at = 0;

    while (at + 1 < args.section_count && blockIdx.x >= args.sections[at + 1].first)
        at++;
    const struct lora_section &section = args.sections[at];
    const unsigned block = blockIdx.x - section.first;
    const int y = (int)(block / (unsigned)section.columns);
    const int x = (int)(block % (unsigned)section.columns);

    if (section.form == CUDA_LORA_DB || section.form == CUDA_LORA_DA)
        return lora_group_problem(args, section, x, y, p);
    return lora_row_problem(args, section, x, y, p);
}

#endif
