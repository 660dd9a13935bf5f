/* The segments of a forward pass as the rows of a pack, for every back-end. */
#ifndef CLAAS_PACK_SEGMENTS_H
#define CLAAS_PACK_SEGMENTS_H

#include "pack/step_plan.h"

/* What a pass must stay within. */
struct claas_pack_limits {
    int context, vocab, kv_blocks, max_tokens;
};

/* Fills a pack whose arrays have room for max_tokens rows: a run per segment, groups of neighbours
 * with the same adapter; `tail` (as large) lists the wanted rows, increasing. LIMIT: positions
 * beyond the context, too many tokens; INVALID: tokens, blocks or wanted rows that cannot be. */
int claas_pack_segments(const struct claas_pack_limits *limits,
                        const struct claas_segment *segments, int count, struct claas_pack *pack,
                        int32_t *tail, int *tail_count);

#endif
