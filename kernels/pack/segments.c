/* From the segments of a forward pass to a pack: see segments.h. Everything is checked here, so
 * that no back-end reads a token, block or row that cannot be. */
#include "pack/segments.h"

#include "claas/err.h"

static int check_segment(const struct claas_pack_limits *c, const struct claas_segment *segment)
{
    if (segment->count < 1 || segment->pos < 0 || segment->pos > c->context - segment->count)
        return claas_fail(CLAAS_ERR_LIMIT, "positions %d ... %d of a context of %d", segment->pos,
                          segment->pos + segment->count, c->context);
    if (segment->wanted < 0 || segment->wanted > segment->count)
        return claas_fail(CLAAS_ERR_INVALID, "%d rows wanted of %d", segment->wanted,
                          segment->count);
    for (int i = 0; i < segment->count; i++)
        if (segment->tokens[i] < 0 || segment->tokens[i] >= c->vocab)
            return claas_fail(CLAAS_ERR_INVALID, "token %d of a vocabulary of %d",
                              segment->tokens[i], c->vocab);
    for (int i = 0; i <= (segment->pos + segment->count - 1) / CLAAS_KV_BLOCK_TOKENS; i++)
        if (segment->blocks[i] < 0 || segment->blocks[i] >= c->kv_blocks)
            return claas_fail(CLAAS_ERR_INVALID, "block %d of %d", segment->blocks[i],
                              c->kv_blocks);
    return 0;
}

static void add_segment(const struct claas_segment *segment, struct claas_pack *pack, int32_t *tail,
                        int *tail_count)
{
    struct claas_pack_group *group =
        pack->group_count ? &pack->groups[pack->group_count - 1] : NULL;

    pack->runs[pack->run_count++] = (struct claas_pack_run){.first = pack->m,
                                                            .count = segment->count,
                                                            .pos = segment->pos,
                                                            .blocks = segment->blocks,
                                                            .parent = -1};
    if (!group || group->adapter != segment->adapter) {
        group = &pack->groups[pack->group_count++];
        *group = (struct claas_pack_group){.first = pack->m, .adapter = segment->adapter};
    }
    group->count += segment->count;
    for (int i = 0; i < segment->count; i++) {
        pack->tokens[pack->m] = segment->tokens[i];
        pack->pos[pack->m] = segment->pos + i;
        pack->blocks[pack->m] = segment->blocks[(segment->pos + i) / CLAAS_KV_BLOCK_TOKENS];
        if (i >= segment->count - segment->wanted)
            tail[(*tail_count)++] = pack->m;
        pack->m++;
    }
}

int claas_pack_segments(const struct claas_pack_limits *limits,
                        const struct claas_segment *segments, int count, struct claas_pack *pack,
                        int32_t *tail, int *tail_count)
{
    pack->m = pack->group_count = pack->run_count = pack->tail_count = 0;
    *tail_count = 0;
    for (int i = 0; i < count; i++) {
        int code = check_segment(limits, &segments[i]);

        if (code < 0)
            return code;
        if (segments[i].count > limits->max_tokens - pack->m)
            return claas_fail(CLAAS_ERR_LIMIT, "more than %d tokens in one pass",
                              limits->max_tokens);
        add_segment(&segments[i], pack, tail, tail_count);
    }
    pack->tail = tail;
    pack->tail_count = *tail_count;
    return 0;
}
