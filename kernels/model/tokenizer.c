/* A text to ids and back: added tokens are cut out, what lies between is NFC-normalised where the
 * family asks for it, cut into words and encoded word by word. The tokenizer is never written to,
 * so any number of threads may encode. */
#include "claas/tokenizer.h"

#include <stdlib.h>
#include <string.h>
#include <unistr.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

/* One running encode. */
struct run {
    const struct claas_tokenizer *tokenizer;
    struct claas_pretoken_cursor *cursor;
    struct claas_bpe_scratch scratch;
    struct claas_id_list ids;
    bool parse_special;
};

static void run_done(struct run *run)
{
    claas_pretoken_cursor_free(&run->cursor);
    claas_bpe_scratch_done(&run->scratch);
    claas_id_list_done(&run->ids);
}

static int encode_words(struct run *run, const char *text, size_t length)
{
    size_t end;
    int rc = 0;

    for (size_t start = 0; rc >= 0 && start < length; start = end) {
        rc = claas_pretoken_next(run->cursor, text, length, start, &end);
        if (rc >= 0)
            rc = claas_bpe_encode(&run->tokenizer->bpe, &run->scratch, text + start, end - start,
                                  &run->ids);
    }
    return rc;
}

static int push_id(struct run *run, int32_t id)
{
    int rc = claas_id_list_reserve(&run->ids, 1);

    if (rc >= 0)
        run->ids.ids[run->ids.count++] = id;
    return rc;
}

static int encode_normalized(struct run *run, const char *text, size_t length)
{
    struct claas_added_cursor cursor = {.set = &run->tokenizer->normalized_added,
                                        .text = text,
                                        .length = length,
                                        .parse_special = run->parse_special};
    struct claas_stretch stretch;
    int rc = 0;

    while (rc >= 0 && claas_added_next(&cursor, &stretch))
        rc = stretch.id >= 0 ? push_id(run, stretch.id)
                             : encode_words(run, text + stretch.start, stretch.end - stretch.start);
    return rc;
}

static int encode_plain(struct run *run, const char *text, size_t length)
{
    CLAAS_AUTO_FREE char *normal = NULL;
    size_t normal_length = 0;
    int rc = run->tokenizer->normalize_nfc ? claas_nfc(text, length, &normal, &normal_length) : 0;

    if (rc < 0)
        return rc;
    return encode_normalized(run, normal ? normal : text, normal ? normal_length : length);
}

static int encode_text(struct run *run, const char *text, size_t length)
{
    struct claas_added_cursor cursor = {.set = &run->tokenizer->raw_added,
                                        .text = text,
                                        .length = length,
                                        .parse_special = run->parse_special};
    struct claas_stretch stretch;
    int rc = 0;

    while (rc >= 0 && claas_added_next(&cursor, &stretch))
        rc = stretch.id >= 0 ? push_id(run, stretch.id)
                             : encode_plain(run, text + stretch.start, stretch.end - stretch.start);
    return rc;
}

int claas_tokenizer_encode(const claas_tokenizer_t *tokenizer, const char *text, size_t length,
                           bool parse_special, int32_t **ret_ids, size_t *ret_count)
{
    CLAAS_AUTO(run_done)
    struct run run = {.tokenizer = tokenizer, .parse_special = parse_special};
    const uint8_t *broken;
    int rc;

    if (length > CLAAS_TEXT_MAX)
        return claas_fail(CLAAS_ERR_TOO_LARGE, "a text of %zu bytes, the limit is %zu", length,
                          CLAAS_TEXT_MAX);
    broken = u8_check((const uint8_t *)text, length);
    if (broken)
        return claas_fail(CLAAS_ERR_FORMAT, "not valid UTF-8 at byte %zu",
                          (size_t)(broken - (const uint8_t *)text));
    rc = claas_pretoken_cursor_new(tokenizer->pattern, &run.cursor);
    if (rc >= 0)
        rc = claas_bpe_scratch_start(&run.scratch, length);
    /* English has about four bytes a token; and there is always a block to hand over. */
    if (rc >= 0)
        rc = claas_id_list_reserve(&run.ids, length / 4 + 16);
    if (rc >= 0)
        rc = encode_text(&run, text, length);
    if (rc < 0)
        return rc;
    *ret_ids = CLAAS_TAKE(run.ids.ids);
    *ret_count = run.ids.count;
    return 0;
}

static bool is_id(const claas_tokenizer_t *tokenizer, int32_t id)
{
    return id >= 0 && (size_t)id < tokenizer->vocab_count;
}

const char *claas_tokenizer_piece(const claas_tokenizer_t *tokenizer, int32_t id,
                                  size_t *ret_length)
{
    if (!is_id(tokenizer, id)) {
        *ret_length = 0;
        return "";
    }
    *ret_length = tokenizer->offsets[id + 1] - tokenizer->offsets[id];
    return tokenizer->bytes + tokenizer->offsets[id];
}

int claas_tokenizer_decode(const claas_tokenizer_t *tokenizer, const int32_t *ids, size_t count,
                           bool skip_control, char **ret_text, size_t *ret_length)
{
    size_t total = 0, length;
    char *text;

    for (size_t i = 0; i < count; i++) {
        claas_tokenizer_piece(tokenizer, ids[i], &length);
        total += skip_control && claas_tokenizer_is_control(tokenizer, ids[i]) ? 0 : length;
    }
    text = CLAAS_NEW_ARRAY(char, total + 1);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret_text = text;
    *ret_length = total;
    for (size_t i = 0; i < count; i++) {
        const char *piece = claas_tokenizer_piece(tokenizer, ids[i], &length);

        if (skip_control && claas_tokenizer_is_control(tokenizer, ids[i]))
            continue;
        memcpy(text, piece, length);
        text += length;
    }
    return 0;
}

size_t claas_tokenizer_vocab_count(const claas_tokenizer_t *tokenizer)
{
    return tokenizer->vocab_count;
}

bool claas_tokenizer_is_control(const claas_tokenizer_t *tokenizer, int32_t id)
{
    return is_id(tokenizer, id) && tokenizer->control[id];
}

int32_t claas_tokenizer_special(const claas_tokenizer_t *tokenizer, const char *text)
{
    const struct claas_added_token *token =
        claas_added_set_find(&tokenizer->raw_added, text, strlen(text));

    if (!token)
        token = claas_added_set_find(&tokenizer->normalized_added, text, strlen(text));
    return token ? token->id : -1;
}

int32_t claas_tokenizer_bos(const claas_tokenizer_t *tokenizer)
{
    return tokenizer->bos;
}
