/* Added tokens ("<|im_end|>", "<think>"): whole strings that are cut out of a text before anything
 * else looks at it, leftmost first, the longest at one place, with the stripping and whole-word
 * rules of tokenizer.json.
 *
 * Tokens are sorted by their bytes, so those that agree with the text so far are one range, which
 * each further byte narrows by two binary searches: a match costs O(length x log tokens), whatever
 * the vocabulary holds. */
#include <stdlib.h>
#include <string.h>
#include <unictype.h>
#include <unistr.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

int claas_added_set_add(struct claas_added_set *set, const struct claas_added_token *token)
{
    struct claas_added_token *tokens;
    char *text;

    if ((set->count & (set->count - 1)) == 0) { /* full at 0 and at powers of two */
        tokens = claas_realloc(set->tokens, set->count ? 2 * set->count : 1, sizeof(*tokens));
        if (!tokens)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        set->tokens = tokens;
    }
    text = claas_strndup(token->text, token->length);
    if (!text)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    set->tokens[set->count] = *token;
    set->tokens[set->count++].text = text;
    return 0;
}

static int compare_texts(const char *a, size_t a_length, const char *b, size_t b_length)
{
    int order = memcmp(a, b, a_length < b_length ? a_length : b_length);

    return order ? order : (a_length > b_length) - (a_length < b_length);
}

static int compare_tokens(const void *a, const void *b)
{
    const struct claas_added_token *left = a, *right = b;

    return compare_texts(left->text, left->length, right->text, right->length);
}

int claas_added_set_settle(struct claas_added_set *set)
{
    if (set->count > 0)
        qsort(set->tokens, set->count, sizeof(*set->tokens), compare_tokens);
    for (size_t i = 0; i < set->count; i++) {
        set->first[(uint8_t)set->tokens[i].text[0]] = true;
        if (i > 0 && compare_tokens(&set->tokens[i - 1], &set->tokens[i]) == 0)
            return claas_fail(CLAAS_ERR_FORMAT, "added tokens %d and %d have the same text",
                              set->tokens[i - 1].id, set->tokens[i].id);
    }
    return 0;
}

void claas_added_set_done(struct claas_added_set *set)
{
    for (size_t i = 0; i < set->count; i++)
        free((char *)set->tokens[i].text);
    free(set->tokens);
    *set = (struct claas_added_set){NULL};
}

const struct claas_added_token *claas_added_set_find(const struct claas_added_set *set,
                                                     const char *text, size_t length)
{
    size_t low = 0, high = set->count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct claas_added_token *token = &set->tokens[middle];
        int order = compare_texts(token->text, token->length, text, length);

        if (order == 0)
            return token;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

/* First token in [low, high) whose byte at `depth` is at least `byte`; shorter tokens come first.
 */
static size_t lower_bound(const struct claas_added_set *set, size_t low, size_t high, size_t depth,
                          int byte)
{
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct claas_added_token *token = &set->tokens[middle];

        if (token->length <= depth || (uint8_t)token->text[depth] < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The longest token that the text starts with. */
static const struct claas_added_token *match_here(const struct claas_added_set *set,
                                                  const char *text, size_t length)
{
    const struct claas_added_token *best = NULL;
    size_t low = 0, high = set->count;

    for (size_t depth = 0; depth < length; depth++) {
        int byte = (uint8_t)text[depth];

        low = lower_bound(set, low, high, depth, byte);
        high = lower_bound(set, low, high, depth, byte + 1);
        if (low == high)
            break;
        if (set->tokens[low].length == depth + 1)
            best = &set->tokens[low];
    }
    return best;
}

/* --- the rules at a token's edges --- */

static bool character_before(const char *text, size_t at, ucs4_t *ret, size_t *ret_start)
{
    const uint8_t *start = u8_prev(ret, (const uint8_t *)text + at, (const uint8_t *)text);

    if (!start)
        return false;
    *ret_start = (size_t)(start - (const uint8_t *)text);
    return true;
}

static bool character_at(const char *text, size_t length, size_t at, ucs4_t *ret, size_t *ret_end)
{
    if (at >= length)
        return false;
    *ret_end = at + (size_t)u8_mbtouc_unsafe(ret, (const uint8_t *)text + at, length - at);
    return true;
}

/* \w of Unicode's regular expressions (UTS #18, annex C). */
static bool is_word(ucs4_t c)
{
    return uc_is_property_alphabetic(c) || uc_is_property_join_control(c) ||
           uc_is_general_category_withtable(c, UC_CATEGORY_MASK_M | UC_CATEGORY_MASK_Nd |
                                                   UC_CATEGORY_MASK_Pc);
}

static bool stands_alone(const char *text, size_t length, size_t start, size_t end)
{
    ucs4_t c;
    size_t other;

    if (character_before(text, start, &c, &other) && is_word(c))
        return false;
    return !(character_at(text, length, end, &c, &other) && is_word(c));
}

static size_t strip_left(const char *text, size_t start, size_t least)
{
    ucs4_t c;
    size_t previous;

    while (start > least && character_before(text, start, &c, &previous) &&
           uc_is_property_white_space(c))
        start = previous;
    return start > least ? start : least;
}

static size_t strip_right(const char *text, size_t length, size_t end)
{
    ucs4_t c;
    size_t next;

    while (character_at(text, length, end, &c, &next) && uc_is_property_white_space(c))
        end = next;
    return end;
}

/* --- stretches --- */

/* Places the next token in cursor->held. */
static bool find_token(struct claas_added_cursor *cursor)
{
    const char *text = cursor->text;
    size_t length = cursor->length;
    size_t at = cursor->search;

    while (at < length) {
        const struct claas_added_token *token = NULL;
        size_t start = at, end;

        if (cursor->set->first[(uint8_t)text[at]])
            token = match_here(cursor->set, text + at, length - at);
        if (!token) {
            at++;
            continue;
        }
        at = end = start + token->length;
        if (token->control && !cursor->parse_special)
            continue; /* its characters are plain text, and no other token may start among them */
        if (token->single_word && !stands_alone(text, length, start, end))
            continue;
        if (token->strip_left)
            start = strip_left(text, start, cursor->done);
        if (token->strip_right)
            end = strip_right(text, length, end);
        cursor->search = end;
        cursor->held = (struct claas_stretch){start, end, token->id};
        return true;
    }
    cursor->search = length;
    return false;
}

bool claas_added_next(struct claas_added_cursor *cursor, struct claas_stretch *ret)
{
    if (!cursor->has_held && cursor->set->count > 0)
        cursor->has_held = find_token(cursor);
    size_t text_end = cursor->has_held ? cursor->held.start : cursor->length;
    if (cursor->done < text_end) {
        *ret = (struct claas_stretch){cursor->done, text_end, -1};
        cursor->done = text_end;
        return true;
    }
    if (!cursor->has_held)
        return false;
    *ret = cursor->held;
    cursor->done = ret->end;
    cursor->has_held = false;
    return true;
}
