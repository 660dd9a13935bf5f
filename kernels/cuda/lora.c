/* LoRA on the host: groups and tiles of a pack's rows, as the device reads them, and which of the
 * three ways of cuda_lora.h an operation goes. */
#include "cuda/cuda_lora.h"

#include "cuda/gemm.h"

#include <stdlib.h>
#include <string.h>

/* From here on cuBLASLt is no slower at S and dS. */
#define GEMM_ROWS 1024 /* of one adapter */
#define GEMM_SIZE 1024 /* the weight's smaller side */

/* --- groups and tiles --- */

struct cuda_lora_group cuda_lora_group(const struct cuda_adapter *adapter, float *grad, int first,
                                       int count)
{
    const struct cuda_lora_layout *layout = &adapter->layout;
    struct cuda_lora_group group = {
        .view = adapter->view.base,
        .grad = grad,
        .layer = layout->layer,
        .rank = layout->rank,
        .first = first,
        .count = count,
        .scale = adapter->scale,
    };

    for (int kind = 0; kind < CUDA_WEIGHTS; kind++) {
        group.a[kind] = layout->a[kind];
        group.parts[kind] = layout->parts[kind];
    }
    for (int module = 0; module < CLAAS_MODULE_COUNT; module++) {
        group.b[module] = layout->b[module];
        group.index[module] = layout->index[module];
    }
    return group;
}

int cuda_lora_tiles(const struct cuda_lora_group *groups, int count, int tile_rows,
                    struct cuda_lora_tile *tiles)
{
    int listed = 0;

    for (int i = 0; i < count; i++)
        for (int row = 0; row < groups[i].count; row += tile_rows) {
            int left = groups[i].count - row;

            tiles[listed++] = (struct cuda_lora_tile){
                .group = i,
                .first = groups[i].first + row,
                .count = left < tile_rows ? left : tile_rows,
            };
        }
    return listed;
}

/* Whether CLAAS_CUDA_LORA asks for this way, to measure and to compare: grouped (without cuBLASLt
 * even for one large adapter), gemm (with cuBLASLt for a small one too) or apart (nothing beside
 * the frozen products). */
static bool is_wished(const char *way)
{
    const char *wish = getenv("CLAAS_CUDA_LORA");

    return wish && strcmp(wish, way) == 0;
}

struct cuda_lora_rows cuda_lora_rows(const struct cuda_lora_group *groups, int count, int m,
                                     int tile_rows, int tiles)
{
    struct cuda_lora_rows rows = {
        .m = m,
        .group_count = count,
        .tile_count = tiles,
        .tile_rows = tile_rows,
    };

    for (int i = 0; i < count; i++)
        rows.rank = rows.rank > groups[i].rank ? rows.rank : groups[i].rank;
    if (count == 1)
        rows.only = groups[0];
    rows.by_gemm = count == 1 && tile_rows == CUDA_LORA_TILE_ROWS && !is_wished("grouped") &&
                   (groups[0].count >= GEMM_ROWS || is_wished("gemm"));
    return rows;
}

/* --- cuBLASLt: S and dS of one adapter with many rows --- */

static bool is_by_gemm(const struct cuda_lora *lora)
{
    return lora->rows->by_gemm && lora->weight->n >= GEMM_SIZE && lora->weight->k >= GEMM_SIZE;
}

static int width_of(const struct cuda_lora *lora)
{
    return lora->rows->only.parts[lora->kind] * lora->rows->only.rank;
}

static const void *view_at(const struct cuda_context *context, const struct cuda_lora *lora,
                           size_t place)
{
    const struct cuda_lora_group *group = &lora->rows->only;

    return cuda_at(context, group->view, (size_t)lora->layer * group->layer + place);
}

/* In an array of acts: element `element` of the group's first row. */
static void *row_at(const struct cuda_context *context, const struct cuda_lora *lora,
                    const void *base, int ld, size_t element)
{
    return cuda_at(context, base, (size_t)lora->rows->only.first * (size_t)ld + element);
}

static int gemm_shrink(struct cuda_context *context, const struct cuda_lora *lora)
{
    int k = lora->weight->k;

    return cuda_gemm(context, &(struct cuda_gemm){
                                  .form = CUDA_GEMM_NT,
                                  .m = lora->rows->only.count,
                                  .n = width_of(lora),
                                  .k = k,
                                  .a = row_at(context, lora, lora->x, k, 0),
                                  .lda = k,
                                  .b = view_at(context, lora, lora->rows->only.a[lora->kind]),
                                  .ldb = k,
                                  .out = row_at(context, lora, lora->s, lora->ld, 0),
                                  .ldo = lora->ld,
                                  .out_type = context->act,
                              });
}

static int gemm_outer(struct cuda_context *context, const struct cuda_lora *lora)
{
    const struct cuda_weight *weight = lora->weight;
    const struct cuda_lora_group *group = &lora->rows->only;
    int code = 0;

    for (int i = 0; i < weight->part_count && code >= 0; i++) {
        const struct cuda_part *part = &weight->parts[i];
        int place = group->index[part->module];

        if (place < 0)
            continue;
        code = cuda_gemm(context,
                         &(struct cuda_gemm){
                             .form = CUDA_GEMM_NN,
                             .m = group->count,
                             .n = group->rank,
                             .k = part->n,
                             .a = row_at(context, lora, lora->dy, weight->n, (size_t)part->row),
                             .lda = weight->n,
                             .b = view_at(context, lora, group->b[part->module]),
                             .ldb = group->rank,
                             .out = row_at(context, lora, lora->ds, lora->ld,
                                           (size_t)place * (size_t)group->rank),
                             .ldo = lora->ld,
                             .out_type = context->act,
                         });
    }
    return code;
}

/* --- operations --- */

bool cuda_lora_is_few(const struct cuda_context *context, const struct cuda_lora *lora)
{
    return lora->rows->tile_rows == CUDA_LORA_FEW_ROWS && cuda_lora_is_even(context, lora);
}

bool cuda_lora_may_join(const struct cuda_context *context, const struct cuda_lora *lora)
{
    return cuda_lora_is_few(context, lora) && lora->pair && lora->rows->m <= lora->pair->rows;
}

int cuda_lora_begin(struct cuda_context *context, struct cuda_lora_pair *pair, int m)
{
    const size_t row = CUDA_LORA_PAIR_LD * 2; /* bytes */

    pair->turn = 0;
    pair->rows = is_wished("apart") ? 0 : m;
    if (pair->rows == 0)
        return 0;
    return cuda_check(context,
                      cudaMemset2DAsync(pair->s, CUDA_LORA_PAIR_ROWS * row,
                                        CUDA_LORA_MISSING & 0xff, (size_t)m * row, 2,
                                        context->stream),
                      "LoRA");
}

/* Whether there is nothing to do, since the only adapter has none of the weight's modules. */
static bool is_absent(const struct cuda_lora *lora)
{
    return lora->rows->group_count == 1 && width_of(lora) == 0 &&
           lora->rows->tile_rows == CUDA_LORA_TILE_ROWS;
}

int cuda_lora_shrink(struct cuda_context *context, const struct cuda_lora *lora)
{
    const enum cuda_lora_form form = CUDA_LORA_S;

    if (is_absent(lora))
        return 0;
    if (cuda_lora_is_few(context, lora))
        return cuda_lora_few_shrink(context, lora);
    if (is_by_gemm(lora))
        return gemm_shrink(context, lora);
    return cuda_lora_grouped(context, lora, &form, 1, false);
}

int cuda_lora_expand(struct cuda_context *context, const struct cuda_lora *lora)
{
    const enum cuda_lora_form form = CUDA_LORA_Y;

    if (is_absent(lora))
        return 0;
    if (cuda_lora_is_few(context, lora))
        return cuda_lora_few_expand(context, lora);
    return cuda_lora_grouped(context, lora, &form, 1, false);
}

int cuda_lora_outer(struct cuda_context *context, const struct cuda_lora *lora)
{
    const enum cuda_lora_form form = CUDA_LORA_DS;

    if (is_absent(lora))
        return 0;
    return is_by_gemm(lora) ? gemm_outer(context, lora)
                            : cuda_lora_grouped(context, lora, &form, 1, false);
}

int cuda_lora_inner(struct cuda_context *context, const struct cuda_lora *lora, bool gradients,
                    bool input)
{
    const enum cuda_lora_form both[] = {CUDA_LORA_DB, CUDA_LORA_DA}, dx = CUDA_LORA_DX;
    int code = 0;

    if (is_absent(lora))
        return 0;
    if (gradients)
        code = cuda_lora_grouped(context, lora, both, CUDA_LORA_FORMS, false);
    return input && code >= 0 ? cuda_lora_grouped(context, lora, &dx, 1, gradients) : code;
}
