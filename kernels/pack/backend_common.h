/* What every back-end does alike with its options and figures. */
#ifndef CLAAS_PACK_BACKEND_COMMON_H
#define CLAAS_PACK_BACKEND_COMMON_H

#include "engine/backend.h"

/* Whether the options ask for float32 ("f32"; NULL and "bf16" do not). INVALID for another name. */
int claas_backend_precision(const struct claas_backend_options *options, bool *ret_f32);

/* Another line of the memory map, unless there are no bytes of it, or no room for the line. */
void claas_backend_add_use(struct claas_backend_memory *memory, const char *what, uint64_t bytes);

/* Rows of a logits buffer of about `floats` numbers: from `least` to `most`, and no more than a
 * pass has tokens. */
int claas_backend_logits_rows(size_t floats, int least, int most, int vocab, int max_tokens);

#endif
