/* NFC, as Hugging Face's `tokenizers` does it: with the tables of Unicode 9, which its normaliser
 * has kept.
 *
 * libunistring's tables are newer. The difference is only in characters that came later and have a
 * combining class or take part in compositions: for the original they are plain letters. So the
 * text is cut around them, and what lies between is normalised by libunistring. */
#include <stdlib.h>
#include <uninorm.h>
#include <unistr.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

struct range {
    uint32_t first, last;
};

/* Characters of Unicode 10 to 16 with a combining class other than 0, and the blocks since then in
 * which characters compose (Dives Akuru, Todhri, Tulu-Tigalari, Gurung Khema, Kirat Rai); sorted.
 */
static const struct range later[] = {
    {0x07fd, 0x07fd},   {0x0897, 0x089f},   {0x08ca, 0x08d3},   {0x09fe, 0x09fe},
    {0x0c3c, 0x0c3c},   {0x0d3b, 0x0d3c},   {0x0eba, 0x0eba},   {0x1715, 0x1715},
    {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x105c0, 0x105ff},
    {0x10d24, 0x10d27}, {0x10d69, 0x10d6d}, {0x10eab, 0x10eac}, {0x10efc, 0x10eff},
    {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b},
    {0x11380, 0x113ff}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11930, 0x11930},
    {0x11935, 0x11935}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99},
    {0x11d42, 0x11d42}, {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42},
    {0x16100, 0x1613f}, {0x16d40, 0x16d7f}, {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f},
    {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
    {0x1e5ee, 0x1e5ef},
};

/* Characters that are their own NFC, have combining class 0 and are never the second half of a
 * composition: the scripts that most text is made of. A mark behind one may still change it.
 * Sorted. */
static const struct range inert[] = {
    {0x0000, 0x02ff}, {0x0388, 0x0482}, {0x048a, 0x0590}, {0x0620, 0x064a},   {0x0904, 0x0939},
    {0x0e01, 0x0e37}, {0x1e00, 0x1eff}, {0x2010, 0x2070}, {0x2190, 0x2328},   {0x3041, 0x3096},
    {0x30a1, 0xa66e}, {0xac00, 0xd7a3}, {0xff00, 0xffff}, {0x1f000, 0x1faff},
};

static bool is_in(const struct range *ranges, size_t count, uint32_t c)
{
    size_t low = 0, high = count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (c > ranges[middle].last)
            low = middle + 1;
        else
            high = middle;
    }
    return low < count && c >= ranges[low].first;
}

static bool is_later(ucs4_t c)
{
    return c >= later[0].first && is_in(later, CLAAS_COUNT(later), c);
}

static bool is_inert(ucs4_t c)
{
    return c <= inert[0].last || is_in(inert, CLAAS_COUNT(inert), c);
}

static int add_normalized(struct claas_buf *buf, const char *text, size_t length)
{
    CLAAS_AUTO_FREE uint8_t *normal = NULL;
    size_t normal_length = 0;

    if (length == 0)
        return 0;
    normal = u8_normalize(UNINORM_NFC, (const uint8_t *)text, length, NULL, &normal_length);
    if (!normal)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return claas_buf_add(buf, normal, normal_length);
}

/* A run of characters that may change, with the one before it: normalised, but for the later
 * characters in it. */
static int add_run(struct claas_buf *buf, const char *text, size_t length)
{
    size_t done = 0, step;
    int rc = 0;

    for (size_t at = 0; rc >= 0 && at < length; at += step) {
        ucs4_t c;

        step = (size_t)u8_mbtouc_unsafe(&c, (const uint8_t *)text + at, length - at);
        if (!is_later(c))
            continue;
        rc = add_normalized(buf, text + done, at - done);
        if (rc >= 0)
            rc = claas_buf_add(buf, text + at, step);
        done = at + step;
    }
    return rc < 0 ? rc : add_normalized(buf, text + done, length - done);
}

int claas_nfc(const char *text, size_t length, char **ret, size_t *ret_length)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf buf;
    size_t done = 0;     /* up to here the text is in the buffer */
    size_t previous = 0; /* start of the character before this one */
    bool in_run = false; /* characters since `done` may change */
    size_t step;
    int rc = 0;

    *ret = NULL;
    /* NFC is at most three times as long (Unicode Standard Annex #15, table 6). */
    claas_buf_init(&buf, 3 * length + 1);
    for (size_t at = 0; rc >= 0 && at < length; at += step) {
        ucs4_t c = (uint8_t)text[at];

        step = 1;
        if (c >= 0x80)
            step = (size_t)u8_mbtouc_unsafe(&c, (const uint8_t *)text + at, length - at);
        if (in_run && is_inert(c)) {
            rc = add_run(&buf, text + done, at - done);
            done = at;
            in_run = false;
        } else if (!in_run && !is_inert(c)) {
            rc = claas_buf_add(&buf, text + done, previous - done);
            done = previous;
            in_run = true;
        }
        previous = at;
    }
    if (rc >= 0 && done == 0 && !in_run)
        return 0;
    if (rc >= 0)
        rc = in_run ? add_run(&buf, text + done, length - done)
                    : claas_buf_add(&buf, text + done, length - done);
    if (rc < 0)
        return claas_fail(rc, "the text could not be normalised");
    *ret = claas_buf_take(&buf, ret_length);
    return 0;
}
