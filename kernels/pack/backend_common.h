/* What every back-end does alike with its options and figures. */
#ifndef CLAAS_PACK_BACKEND_COMMON_H
#define CLAAS_PACK_BACKEND_COMMON_H

#include "engine/backend.h"

/* Whether the options ask for float32 ("f32"; NULL and "bf16" do not). INVALID for another name. */
int claas_backend_precision(const struct claas_backend_options *options, bool *ret_f32);

/* Adds a line to the memory map, unless `bytes` is 0 or the map is full. `what` is a literal. */
void claas_backend_add_use(struct claas_backend_memory *memory, const char *what, uint64_t bytes);

/* How many rows of `vocab` logits a buffer of about `floats` numbers gets: from `least` to `most`,
 * and no more than a pass has tokens. */
int claas_backend_logits_rows(size_t floats, int least, int most, int vocab, int max_tokens);

#endif
