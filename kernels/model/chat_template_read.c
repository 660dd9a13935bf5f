/* What can be read out of a Jinja template without running it: its identity and its default system
 * text.
 *
 * A template is mostly string literals, so a small scanner of literals is enough: it looks for
 * "<|im_start|>system" and for assignments, and decodes the escapes that Jinja knows. */
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

#include "chat_template_internal.h"
#include "claas/err.h"
#include "claas/mem.h"

#define SYSTEM_MAX ((size_t)64 << 10)

static bool is_blank(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

void claas_chat_template_hash(const char *source, char hex[65])
{
    crypto_hash_sha256_state state;
    unsigned char digest[crypto_hash_sha256_BYTES];
    bool any = false;

    /* SHA-256 in libsodium needs no sodium_init. */
    crypto_hash_sha256_init(&state);
    for (const char *c = source; *c;) {
        const char *word = c;

        while (is_blank(*word))
            word++;
        for (c = word; *c && !is_blank(*c);)
            c++;
        if (any && c > word)
            crypto_hash_sha256_update(&state, (const unsigned char *)" ", 1);
        crypto_hash_sha256_update(&state, (const unsigned char *)word, (size_t)(c - word));
        any = any || c > word;
    }
    crypto_hash_sha256_final(&state, digest);
    sodium_bin2hex(hex, 65, digest, sizeof(digest));
}

/* Decodes one character of a literal; returns how much source it took, 0 at the closing quote or
 * the end. A quote of 0 stands for text outside of literals, which has no escapes but may end with
 * a tag. */
static size_t literal_character(const char *source, char quote, char *ret)
{
    static const char escapes[] = "n\nt\tr\r'\'\"\"\\\\";

    if (*source == '\0' || (quote && *source == quote))
        return 0;
    if (!quote && source[0] == '{' && (source[1] == '{' || source[1] == '%'))
        return 0;
    *ret = *source;
    if (!quote || *source != '\\' || source[1] == '\0')
        return 1;
    for (const char *e = escapes; *e; e += 2)
        if (*e == source[1]) {
            *ret = e[1];
            return 2;
        }
    return 1;
}

/* Decodes the literal from `source` to `stop` (NULL: to its end). Returns 1 and the text, 0 if the
 * literal ends first, or an error. */
static int read_literal(const char *source, char quote, const char *stop, char **ret)
{
    CLAAS_AUTO(claas_buf_done) struct claas_buf buf;
    size_t taken, stop_length = stop ? strlen(stop) : 0, length;
    bool stopped = !stop;
    char c;

    claas_buf_init(&buf, SYSTEM_MAX);
    while ((taken = literal_character(source, quote, &c)) > 0) {
        if (stop && strncmp(source, stop, stop_length) == 0) {
            stopped = true;
            break;
        }
        claas_buf_add(&buf, &c, 1);
        source += taken;
    }
    if (buf.error)
        return claas_fail(buf.error, "the chat template's system text is longer than %zu bytes",
                          SYSTEM_MAX);
    if (!stopped || buf.length == 0)
        return 0;
    *ret = claas_buf_take(&buf, &length);
    return 1;
}

/* The quote of the literal that `at` lies in, 0 when in none: the last unmatched one since the
 * tag's opening. */
static char quote_around(const char *source, const char *at)
{
    char quote = 0;
    bool in_tag = false;

    for (const char *c = source; c < at; c++) {
        if (quote && *c == '\\' && c + 1 < at)
            c++;
        else if (quote)
            quote = *c == quote ? 0 : quote;
        else if (in_tag && (*c == '\'' || *c == '"'))
            quote = *c;
        else if (c[0] == '{' && (c[1] == '{' || c[1] == '%'))
            in_tag = true;
        else if (c[1] == '}' && (c[0] == '}' || c[0] == '%'))
            in_tag = false;
    }
    return quote;
}

/* <|im_start|>system\nTEXT<|im_end|> within one literal. */
static int read_between_markers(const char *source, char **ret)
{
    static const char marker[] = "<|im_start|>system";
    int rc = 0;

    for (const char *at = source; rc == 0 && (at = strstr(at, marker)) != NULL;) {
        char quote = quote_around(source, at), newline;
        size_t taken;

        at += strlen(marker);
        taken = literal_character(at, quote, &newline);
        if (taken > 0 && newline == '\n')
            rc = read_literal(at + taken, quote, "<|im_end|>", ret);
    }
    return rc;
}

/* After an identifier: blanks, '=', blanks, a quote. Returns the text behind the quote, or NULL. */
static const char *after_assignment(const char *at)
{
    at += strspn(at, " ");
    if (*at != '=')
        return NULL;
    at += 1 + strspn(at + 1, " ");
    return *at == '\'' || *at == '"' ? at + 1 : NULL;
}

/* {% set system_message = 'TEXT' %}, {% set default_system_prompt = "TEXT" %} and the like. */
static int read_assigned_system(const char *source, char **ret)
{
    static const char *const names[] = {"default_system_message", "default_system_prompt",
                                        "system_message", "system_prompt"};
    int rc = 0;

    for (size_t i = 0; i < CLAAS_COUNT(names); i++)
        for (const char *at = source; rc == 0 && (at = strstr(at, names[i])) != NULL;) {
            const char *literal = after_assignment(at + strlen(names[i]));

            at += strlen(names[i]);
            if (literal)
                rc = read_literal(literal, literal[-1], NULL, ret);
        }
    return rc;
}

int claas_chat_template_read_system(const char *source, char **ret)
{
    int rc;

    *ret = NULL;
    rc = read_between_markers(source, ret);
    if (rc == 0)
        rc = read_assigned_system(source, ret);
    return rc < 0 ? rc : 0;
}

bool claas_chat_template_read_date(const char *source, char date[CLAAS_CHAT_DATE_SIZE])
{
    CLAAS_AUTO_FREE char *text = NULL;
    const char *literal = NULL;

    for (const char *at = source; !literal && (at = strstr(at, "date_string")) != NULL; at++)
        literal = after_assignment(at + strlen("date_string"));
    return literal && read_literal(literal, literal[-1], NULL, &text) == 1 &&
           claas_copy_text(date, CLAAS_CHAT_DATE_SIZE, text) == 0;
}
