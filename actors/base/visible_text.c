/* Visible text of an answer: see visible_text.h. Works on bytes; the only multi-byte characters
 * that matter are white space, whose UTF-8 forms are listed here. */
#include "claas/visible_text.h"

#include <stdlib.h>
#include <string.h>

#include "claas/mem.h"

/* Python's \s and str.strip(): U+0009-000D, 001C-0020, 0085, 00A0, 1680, 2000-200A, 2028, 2029,
 * 202F, 205F, 3000. */
size_t claas_space_length(const char *text)
{
    const unsigned char *c = (const unsigned char *)text;

    if ((c[0] >= 0x09 && c[0] <= 0x0d) || (c[0] >= 0x1c && c[0] <= 0x20))
        return 1;
    if (c[0] == 0xc2 && (c[1] == 0x85 || c[1] == 0xa0))
        return 2;
    if (c[0] == 0xe1 && c[1] == 0x9a && c[2] == 0x80)
        return 3;
    if (c[0] == 0xe2 && c[1] == 0x80 &&
        ((c[2] >= 0x80 && c[2] <= 0x8a) || c[2] == 0xa8 || c[2] == 0xa9 || c[2] == 0xaf))
        return 3;
    if (c[0] == 0xe2 && c[1] == 0x81 && c[2] == 0x9f)
        return 3;
    if (c[0] == 0xe3 && c[1] == 0x80 && c[2] == 0x80)
        return 3;
    return 0;
}

/* Moves the stripped text to the front of its own buffer. */
static void strip_in_place(char *text)
{
    char *start = text;
    char *end = text; /* just after the last character that is not white space */
    size_t space;

    while ((space = claas_space_length(start)) > 0)
        start += space;
    for (char *c = start; *c;) {
        space = claas_space_length(c);
        c += space ? space : 1;
        if (!space)
            end = c;
    }
    if (end < start)
        end = start;
    memmove(text, start, (size_t)(end - start));
    text[end - start] = '\0';
}

/* Deletes every <think>…</think>, then everything up to a </think> that is left over. An unclosed
 * <think> stays. */
static void strip_thinking_in_place(char *text)
{
    static const char open[] = "<think>", close[] = "</think>";
    char *start = text;
    char *orphan;

    while ((start = strstr(start, open)) != NULL) {
        char *end = strstr(start + strlen(open), close);

        if (!end)
            break;
        end += strlen(close);
        memmove(start, end, strlen(end) + 1);
    }
    orphan = strstr(text, close);
    if (orphan) {
        orphan += strlen(close);
        memmove(text, orphan, strlen(orphan) + 1);
    }
    strip_in_place(text);
}

/* The final channel of a harmony-formatted answer; other texts unchanged. */
static char *extract_final_channel(const char *raw)
{
    static const char final[] = "<|channel|>final<|message|>";
    const char *start = strstr(raw, final);
    const char *end, *other;
    char *text;

    if (!start) {
        if (strstr(raw, "<|channel|>analysis<|message|>"))
            return claas_strdup("");
        return claas_strdup(raw);
    }
    start += strlen(final);
    end = strstr(start, "<|end|>");
    other = strstr(start, "<|return|>");
    if (!end || (other && other < end))
        end = other;
    text = claas_strndup(start, end ? (size_t)(end - start) : strlen(start));
    if (text)
        strip_in_place(text);
    return text;
}

char *claas_visible_text(const char *raw)
{
    char *text = extract_final_channel(raw);

    if (text)
        strip_thinking_in_place(text);
    return text;
}

char *claas_normalized_text(const char *text)
{
    char *copy = claas_strdup(text);
    char *out = copy;

    if (!copy)
        return NULL;
    strip_thinking_in_place(copy);
    for (const char *c = copy; *c;) {
        size_t space = claas_space_length(c);

        if (!space) {
            *out++ = *c++;
            continue;
        }
        while ((space = claas_space_length(c)) > 0)
            c += space;
        *out++ = ' ';
    }
    *out = '\0';
    return copy;
}
