/* libFuzzer entry for tokenizer.json: whatever the bytes, an error or a tokenizer that encodes and
 * decodes. The first byte tells where the file ends and the text to encode begins. clang
 * -fsanitize=fuzzer,address,undefined with this file and the model and base libraries' sources. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "claas/mem.h"
#include "claas/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void use(const claas_tokenizer_t *tokenizer, const char *text, size_t length, bool special)
{
    CLAAS_AUTO_FREE int32_t *ids = NULL;
    CLAAS_AUTO_FREE char *back = NULL;
    size_t count, back_length;

    if (claas_tokenizer_encode(tokenizer, text, length, special, &ids, &count) == 0)
        claas_tokenizer_decode(tokenizer, ids, count, special, &back, &back_length);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = NULL;
    size_t text_length;

    if (size < 1)
        return 0;
    text_length = data[0] < size - 1 ? data[0] : size - 1;
    if (claas_tokenizer_from_json((const char *)data + 1, size - 1 - text_length, &tokenizer) < 0)
        return 0;
    use(tokenizer, (const char *)data + size - text_length, text_length, true);
    use(tokenizer, (const char *)data + size - text_length, text_length, false);
    use(tokenizer, "the <s> e\xcc\x81 12 abab", 19, true);
    return 0;
}
