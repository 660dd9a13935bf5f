/* What the host hands over: buffers that it fills and the device reads, and how a pack lies in one:
 * which adapters the rows belong to (LoRA's groups and tiles), tokens and positions, runs, block
 * numbers. */
#include "cuda/pass.h"

#include <stdlib.h>
#include <string.h>

/* --- buffers --- */

int cuda_upload_new(struct cuda_context *context, struct cuda_upload *upload, size_t bytes,
                    const char *what)
{
    int code = cuda_pin(context, (void **)&upload->host, bytes, what);

    if (code >= 0)
        code = cuda_region_new(context, &upload->device, bytes, what);
    if (code >= 0)
        code = cuda_check(context,
                          cudaEventCreateWithFlags(&upload->copied, cudaEventDisableTiming), what);
    if (code < 0) {
        cuda_upload_done(context, upload);
        return code;
    }
    upload->bytes = bytes;
    return 0;
}

void cuda_upload_done(struct cuda_context *context, struct cuda_upload *upload)
{
    if (upload->copied)
        (void)cudaEventDestroy(upload->copied);
    if (upload->host)
        (void)cudaFreeHost(upload->host);
    cuda_region_done(context, &upload->device);
    *upload = (struct cuda_upload){0};
}

int cuda_upload_begin(struct cuda_context *context, struct cuda_upload *upload)
{
    upload->used = upload->sent = 0;
    if (!upload->pending)
        return 0;
    upload->pending = false;
    return cuda_check(context, cudaEventSynchronize(upload->copied), "a copy to the device");
}

void *cuda_upload_take(struct cuda_upload *upload, size_t bytes, const void **device)
{
    size_t at = upload->used;

    if (bytes > upload->bytes - at)
        return NULL;
    upload->used = (at + bytes + 15) & ~(size_t)15;
    if (upload->used > upload->bytes)
        upload->used = upload->bytes;
    *device = (uint8_t *)upload->device.base + at;
    return upload->host + at;
}

int cuda_upload_send(struct cuda_context *context, struct cuda_upload *upload)
{
    size_t from = upload->sent;
    int code =
        cuda_check(context,
                   cudaMemcpyAsync((uint8_t *)upload->device.base + from, upload->host + from,
                                   upload->used - from, cudaMemcpyHostToDevice, context->stream),
                   "a copy to the device");

    if (code >= 0)
        code = cuda_check(context, cudaEventRecord(upload->copied, context->stream),
                          "a copy to the device");
    upload->sent = upload->used;
    upload->pending = code >= 0;
    return code;
}

/* --- packs --- */

static size_t windows_of(int m)
{
    return ((size_t)m + CUDA_KEY_WINDOW - 1) / CUDA_KEY_WINDOW;
}

size_t cuda_pack_bytes(int m, int runs, int tables)
{
    size_t lora = (size_t)runs * sizeof(struct cuda_lora_group) +
                  (size_t)m * sizeof(struct cuda_lora_tile) + 32;

    return 4 * ((size_t)m * sizeof(int32_t) + 16) + (size_t)runs * sizeof(struct cuda_attn_run) +
           2 * lora + ((size_t)runs + (size_t)tables) * sizeof(int32_t) +
           windows_of(m) * sizeof(int64_t) + 64;
}

static int blocks_of(const struct claas_pack_run *run)
{
    return (run->pos + run->count + CUDA_KV_BLOCK - 1) / CUDA_KV_BLOCK;
}

/* The length of the piece of a run that begins with its row `done`: all that is left, or, with
 * `queries`, as much as attention takes in the way of decoding. */
static int piece_length(const struct claas_pack_run *run, int done, int queries)
{
    int left = run->count - done, pos = run->pos + done, length = left;

    if (queries > 0) {
        int border = cuda_attention_part_border(pos) - pos;

        length = queries < border ? queries : border;
    }
    return left < length ? left : length;
}

static int pieces_of(const struct claas_pack_run *run, int queries)
{
    int pieces = 0;

    for (int done = 0; done < run->count; done += piece_length(run, done, queries))
        pieces++;
    return pieces;
}

static int count_pieces(const struct claas_pack *pack, int queries)
{
    int pieces = 0;

    for (int i = 0; i < pack->run_count; i++)
        pieces += pieces_of(&pack->runs[i], queries);
    return pieces;
}

/* Writes a serving run, or its pieces, in the device's form; all have the run's block numbers. */
static int fill_pieces(const struct claas_pack_run *run, int queries, int table,
                       struct cuda_attn_run *runs)
{
    int pieces = 0;

    for (int done = 0; done < run->count; done += runs[pieces++].count)
        runs[pieces] = (struct cuda_attn_run){
            .first = run->first + done,
            .count = piece_length(run, done, queries),
            .pos = run->pos + done,
            .table = table,
        };
    return pieces;
}

static void fill_paged(const struct claas_pack *pack, int queries, struct cuda_attn_run *runs,
                       int32_t *tables)
{
    int table = 0;

    for (int i = 0; i < pack->run_count; i++) {
        const struct claas_pack_run *run = &pack->runs[i];

        runs += fill_pieces(run, queries, table, runs);
        memcpy(tables + table, run->blocks, (size_t)blocks_of(run) * sizeof(int32_t));
        table += blocks_of(run);
    }
}

/* Writes training runs in the device's form; a run's children are listed in their order. */
static void fill_runs(const struct claas_pack *pack, struct cuda_attn_run *runs, int32_t *children)
{
    int child = 0;

    for (int i = 0; i < pack->run_count; i++) {
        const struct claas_pack_run *run = &pack->runs[i];

        runs[i] = (struct cuda_attn_run){
            .first = run->first,
            .count = run->count,
            .pos = run->pos,
            .parent_first = run->parent >= 0 ? pack->runs[run->parent].first : 0,
            .child_from = child,
        };
        for (int j = i + 1; j < pack->run_count && run->parent < 0; j++)
            if (pack->runs[j].parent == i)
                children[child++] = j;
        runs[i].child_end = child;
    }
}

/* How many query rows may see some key of the pack's rows first … end-1. */
static int64_t queries_of_keys(const struct claas_pack *pack, const struct cuda_attn_run *runs,
                               const int32_t *children, int first, int end)
{
    int64_t rows = 0;

    for (int i = 0; i < pack->run_count; i++) {
        const struct cuda_attn_run *run = &runs[i];
        int from = first > run->first ? first - run->first : 0;

        if (run->first >= end || from >= run->count)
            continue;
        rows += run->count - from;
        for (int j = run->child_from; j < run->child_end; j++)
            rows += runs[children[j]].count;
    }
    return rows;
}

static int compare_keys(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x > y) - (x < y);
}

/* The windows of keys, those with most work first, each in the low half of its word. */
static void fill_order(const struct claas_pack *pack, const struct cuda_attn_run *runs,
                       const int32_t *children, int64_t *order)
{
    int count = (int)windows_of(pack->m);

    for (int i = 0; i < count; i++) {
        int first = i * CUDA_KEY_WINDOW, end = first + CUDA_KEY_WINDOW;

        order[i] = (INT32_MAX - queries_of_keys(pack, runs, children, first, end)) << 32 | i;
    }
    qsort(order, (size_t)count, sizeof(order[0]), compare_keys);
}

static void fill_rows(const struct claas_pack *pack, const struct cuda_attn_run *runs,
                      int32_t *tokens, int32_t *pos, int32_t *blocks, int32_t *row_run,
                      struct cuda_pack *ret)
{
    size_t bytes = (size_t)pack->m * sizeof(int32_t);

    memcpy(tokens, pack->tokens, bytes);
    memcpy(pos, pack->pos, bytes);
    memcpy(blocks, pack->blocks, bytes);
    for (int i = 0; i < ret->run_count; i++) {
        int end = runs[i].pos + runs[i].count;

        for (int j = 0; j < runs[i].count; j++)
            row_run[runs[i].first + j] = i;
        ret->longest = ret->longest > runs[i].count ? ret->longest : runs[i].count;
        ret->furthest = ret->furthest > end ? ret->furthest : end;
    }
}

/* Groups of rows with an adapter, numbered along the pack or along its tail. */
static int list_groups(const struct claas_pack *pack, bool tail, struct cuda_lora_group *ret)
{
    int count = 0, at = 0;

    for (int i = 0; i < pack->group_count; i++) {
        const struct claas_pack_group *group = &pack->groups[i];
        int first = tail ? at : group->first;

        while (at < pack->tail_count && pack->tail[at] < group->first + group->count)
            at++;
        if (group->adapter && (!tail || at > first))
            ret[count++] = cuda_lora_group(&group->adapter->cuda, group->adapter->grad, first,
                                           tail ? at - first : group->count);
    }
    return count;
}

/* Takes as many places as there are runs and rows, and fills in groups and tiles; few: all tiles of
 * the list count, those left over being empty. */
static int fill_lora(struct cuda_upload *upload, const struct claas_pack *pack, bool tail, bool few,
                     struct cuda_lora_rows *ret)
{
    int m = tail ? pack->tail_count : pack->m, count, listed;
    int tile_rows = few ? CUDA_LORA_FEW_ROWS : CUDA_LORA_TILE_ROWS;
    const void *at[2] = {0};
    struct cuda_lora_group *groups =
        cuda_upload_take(upload, (size_t)pack->run_count * sizeof(struct cuda_lora_group), &at[0]);
    struct cuda_lora_tile *tiles =
        cuda_upload_take(upload, (size_t)m * sizeof(struct cuda_lora_tile), &at[1]);

    if (!groups || !tiles)
        return claas_fail(CLAAS_ERR_LIMIT, "the groups of %d rows are more than their buffer holds",
                          m);
    count = list_groups(pack, tail, groups);
    listed = cuda_lora_tiles(groups, count, tile_rows, tiles);
    if (few) {
        memset(tiles + listed, 0, (size_t)(m - listed) * sizeof(struct cuda_lora_tile));
        listed = m;
    }
    *ret = cuda_lora_rows(groups, count, m, tile_rows, listed);
    ret->groups = at[0];
    ret->tiles = at[1];
    return 0;
}

/* Takes the arrays whose sizes do not depend on how far the runs go, then `last` bytes. */
static int take_arrays(struct cuda_upload *upload, int m, int runs, size_t last, void *host[7],
                       const void *at[7])
{
    size_t rows = (size_t)m * sizeof(int32_t);

    for (int i = 0; i < 4; i++)
        host[i] = cuda_upload_take(upload, rows, &at[i]);
    host[4] = cuda_upload_take(upload, (size_t)runs * sizeof(struct cuda_attn_run), &at[4]);
    host[5] = cuda_upload_take(upload, (size_t)runs * sizeof(int32_t), &at[5]);
    host[6] = cuda_upload_take(upload, last, &at[6]);
    for (int i = 0; i < 7; i++)
        if (!host[i])
            return claas_fail(CLAAS_ERR_LIMIT, "a pack of %d rows is larger than its buffer", m);
    return 0;
}

int cuda_pack_fill(struct cuda_upload *upload, const struct claas_pack *pack, bool paged,
                   int queries, struct cuda_pack *ret)
{
    size_t table = 0;
    const void *at[7] = {0};
    void *host[7];
    bool few = paged && pack->m <= CUDA_LORA_FEW;
    int code;

    *ret = (struct cuda_pack){.m = pack->m,
                              .run_count = paged ? count_pieces(pack, queries) : pack->run_count};
    for (int i = 0; i < pack->run_count && paged; i++)
        table += (size_t)blocks_of(&pack->runs[i]);
    code = fill_lora(upload, pack, false, few, &ret->rows);
    if (code >= 0)
        code = take_arrays(upload, pack->m, ret->run_count,
                           paged ? table * sizeof(int32_t) : windows_of(pack->m) * sizeof(int64_t),
                           host, at);
    if (code < 0)
        return code;
    if (paged) {
        fill_paged(pack, queries, host[4], host[6]);
    } else {
        fill_runs(pack, host[4], host[5]);
        fill_order(pack, host[4], host[5], host[6]);
    }
    fill_rows(pack, host[4], host[0], host[1], host[2], host[3], ret);
    ret->tokens = at[0];
    ret->pos = at[1];
    ret->blocks = at[2];
    ret->row_run = at[3];
    ret->runs = at[4];
    ret->children = at[5];
    ret->tables = paged ? at[6] : NULL;
    ret->key_order = paged ? NULL : at[6];
    if (pack->tail_count < pack->m)
        return fill_lora(upload, pack, true, few, &ret->tail);
    ret->tail = ret->rows;
    return 0;
}
