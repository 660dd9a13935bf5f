/* Cuts text into the words that byte pair encoding works on, with the regular expressions of the
 * original tokenizers run by PCRE2 (JIT where the system allows it, its interpreter otherwise; both
 * give the same words).
 *
 * Three things keep the words equal to the originals': \s is written out, since PCRE2 counts U+180E
 * as white space; \p{L} and \p{N} carry the letters and numbers of Unicode 15 to 17 that PCRE2's
 * tables (Unicode 14 in 10.40 to 10.42) lack; and the whole stretch is the subject, so that a
 * lookahead sees what follows. ASCII letters and digits stand in the classes by name because PCRE2
 * then tests them by a bitmap instead of a property look-up. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

/* White_Space of Unicode; the set is closed since Unicode 6.3. */
#define S                                                                                          \
    "\\t-\\r "                                                                                     \
    "\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"

/* General category L of Unicode 16 less that of Unicode 14. */
#define NEW_LETTERS                                                                                \
    "\\x{1C89}\\x{1C8A}\\x{A7CB}-\\x{A7CD}\\x{A7DA}-\\x{A7DC}\\x{105C0}-\\x{105F3}"                \
    "\\x{10D4A}-\\x{10D65}\\x{10D6F}-\\x{10D85}\\x{10EC2}-\\x{10EC4}\\x{1123F}\\x{11240}"          \
    "\\x{11380}-\\x{11389}\\x{1138B}\\x{1138E}\\x{11390}-\\x{113B5}\\x{113B7}\\x{113D1}"           \
    "\\x{113D3}\\x{11BC0}-\\x{11BE0}\\x{11F02}\\x{11F04}-\\x{11F10}\\x{11F12}-\\x{11F33}"          \
    "\\x{1342F}\\x{13441}-\\x{13446}\\x{13460}-\\x{143FA}\\x{16100}-\\x{1611D}"                    \
    "\\x{16D40}-\\x{16D6C}\\x{18CFF}\\x{1B132}\\x{1B155}\\x{1DF25}-\\x{1DF2A}"                     \
    "\\x{1E030}-\\x{1E06D}\\x{1E4D0}-\\x{1E4EB}\\x{1E5D0}-\\x{1E5ED}\\x{1E5F0}\\x{2B739}"          \
    "\\x{2EBF0}-\\x{2EE5D}\\x{31350}-\\x{323AF}"

/* General category N of Unicode 16 less that of Unicode 14. */
#define NEW_NUMBERS                                                                                \
    "\\x{10D40}-\\x{10D49}\\x{116D0}-\\x{116E3}\\x{11BF0}-\\x{11BF9}\\x{11F50}-\\x{11F59}"         \
    "\\x{16130}-\\x{16139}\\x{16D70}-\\x{16D79}\\x{1CCF0}-\\x{1CCF9}\\x{1D2C0}-\\x{1D2D3}"         \
    "\\x{1E4F0}-\\x{1E4F9}\\x{1E5F1}-\\x{1E5FA}"

/* Category N of Unicode 17 less that of 16. The `Digits` pre-tokenizer asks Rust's tables, which
 * are newer than those of the regular expressions beside it. */
#define NEWER_NUMBERS "\\x{11DE0}-\\x{11DE9}\\x{16FF4}-\\x{16FF6}"

#define L             "a-zA-Z\\p{L}" NEW_LETTERS
#define N             "0-9\\p{N}" NEW_NUMBERS
#define DIGITS        N NEWER_NUMBERS

#define GPT2_HEAD     "'s|'t|'re|'ve|'m|'ll|'d| ?[" L "]+|"
#define TAIL          "\\s+(?!\\S)|\\s+"

/* Qwen2 and Llama 3 differ in how many digits go together. */
#define CL100K(digits)                                                                             \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n" L N "]?[" L "]+|[" N "]" digits "| ?[^" S L N          \
    "]+[\\r\\n]*|[" S "]*[\\r\\n]+|[" S "]+(?![^" S "])|[" S "]+"

/* As tokenizer.json spells them. */
#define ORIGINAL_CL100K(digits)                                                                    \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" digits                     \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|" TAIL

struct pattern_row {
    enum claas_pretokenizer kind;
    const char *original; /* NULL: not one expression in tokenizer.json */
    const char *ours;
};

static const struct pattern_row patterns[] = {
    {CLAAS_PRETOKENIZER_GPT2,
     "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|" TAIL,
     GPT2_HEAD " ?[" N "]+| ?[^" S L N "]+|[" S "]+(?![^" S "])|[" S "]+"},
    /* Two steps in the original, each number character on its own and then GPT-2's expression on
     * what lies between; as one expression, white space before a number is followed by the end of
     * its part. */
    {CLAAS_PRETOKENIZER_SMOLLM, NULL,
     "[" DIGITS "]|" GPT2_HEAD " ?[^" S L DIGITS "]+|[" S "]+(?![^" S DIGITS "])|[" S "]+"},
    {CLAAS_PRETOKENIZER_QWEN2, ORIGINAL_CL100K(""), CL100K("")},
    {CLAAS_PRETOKENIZER_LLAMA3, ORIGINAL_CL100K("{1,3}"), CL100K("{1,3}")},
};

struct claas_pretoken_pattern {
    pcre2_code *code;
    bool jit;
};

struct claas_pretoken_cursor {
    const struct claas_pretoken_pattern *pattern;
    pcre2_match_data *match; /* not shareable between threads */
};

int claas_pretokenizer_from_regex(const char *regex)
{
    for (size_t i = 0; i < CLAAS_COUNT(patterns); i++)
        if (patterns[i].original && strcmp(patterns[i].original, regex) == 0)
            return patterns[i].kind;
    return -1;
}

static const char *pattern_text(enum claas_pretokenizer kind)
{
    for (size_t i = 0; i < CLAAS_COUNT(patterns); i++)
        if (patterns[i].kind == kind)
            return patterns[i].ours;
    return NULL;
}

int claas_pretoken_pattern_new(enum claas_pretokenizer kind, struct claas_pretoken_pattern **ret)
{
    CLAAS_AUTO(claas_pretoken_pattern_free)
    struct claas_pretoken_pattern *pattern = CLAAS_NEW(struct claas_pretoken_pattern);
    const char *text = pattern_text(kind);
    int error = 0;
    PCRE2_SIZE offset = 0;

    if (!text)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "pre-tokenizer number %d", (int)kind);
    if (!pattern)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    pattern->code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                                  PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED, &error, &offset, NULL);
    if (!pattern->code)
        return claas_fail(CLAAS_ERR_INTERNAL, "PCRE2 refuses the pattern of pre-tokenizer %d: %d",
                          (int)kind, error);
    /* Refused where memory may not be both writable and executable; only speed depends on it. */
    pattern->jit = pcre2_jit_compile(pattern->code, PCRE2_JIT_COMPLETE) == 0;
    *ret = CLAAS_TAKE(pattern);
    return 0;
}

void claas_pretoken_pattern_free(struct claas_pretoken_pattern **pattern)
{
    if (*pattern)
        pcre2_code_free((*pattern)->code);
    free(*pattern);
    *pattern = NULL;
}

int claas_pretoken_cursor_new(const struct claas_pretoken_pattern *pattern,
                              struct claas_pretoken_cursor **ret)
{
    CLAAS_AUTO(claas_pretoken_cursor_free)
    struct claas_pretoken_cursor *cursor = CLAAS_NEW(struct claas_pretoken_cursor);

    if (!cursor)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cursor->pattern = pattern;
    cursor->match = pcre2_match_data_create(1, NULL);
    if (!cursor->match)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret = CLAAS_TAKE(cursor);
    return 0;
}

void claas_pretoken_cursor_free(struct claas_pretoken_cursor **cursor)
{
    if (*cursor)
        pcre2_match_data_free((*cursor)->match);
    free(*cursor);
    *cursor = NULL;
}

int claas_pretoken_next(struct claas_pretoken_cursor *cursor, const char *text, size_t length,
                        size_t start, size_t *ret_end)
{
    const pcre2_code *code = cursor->pattern->code;
    PCRE2_SPTR subject = (PCRE2_SPTR)text;
    int rc = PCRE2_ERROR_JIT_STACKLIMIT;

    if (cursor->pattern->jit)
        rc = pcre2_jit_match(code, subject, length, start, PCRE2_NO_UTF_CHECK, cursor->match, NULL);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(code, subject, length, start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         cursor->match, NULL);
    if (rc == PCRE2_ERROR_NOMEMORY)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (rc < 0)
        return claas_fail(CLAAS_ERR_INTERNAL, "PCRE2 failed at byte %zu: %d", start, rc);
    *ret_end = pcre2_get_ovector_pointer(cursor->match)[1];
    if (*ret_end <= start)
        return claas_fail(CLAAS_ERR_INTERNAL, "PCRE2 matched nothing at byte %zu", start);
    return 0;
}
