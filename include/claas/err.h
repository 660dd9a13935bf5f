/* Errors: every function that can fail returns an int: >= 0 is success, < 0 is a code of err.def.
 *
 * The code says what kind of failure it is; the sentence that a person needs ("tensor 'x': 3 bytes
 * missing") is kept beside it, one per thread, by claas_fail(). The idiom is
 *
 *     if (n > limit)
 *         return claas_fail(CLAAS_ERR_LIMIT, "%zu rows, the limit is %zu", n, limit);
 *
 * and whoever reports the failure (an actor's reply, a tool's message) reads claas_error_text().
 * Library code never prints. */
#ifndef CLAAS_ERR_H
#define CLAAS_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

enum claas_err {
    CLAAS_OK = 0,
#define X(name, code, http, text) CLAAS_ERR_##name = code,
#include "claas/err.def"
#undef X
};

/* The longest sentence and its NUL: a copy needs no more room. */
#define CLAAS_ERROR_TEXT_BYTES 1024

/* Records the sentence for this thread and returns `code`. A NULL format stands for the catalogue's
 * text. */
int claas_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts a context in front of the recorded sentence ("model.gguf: ") and returns `code`. */
int claas_fail_context(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* claas_fail for a failed system call: maps errno (ENOSPC, ENOENT, ENOMEM…) to a code and appends
 * its text. */
int claas_fail_errno(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Takes `path` out of the recorded sentence: "path/file" becomes "file" and a bare "path" becomes
 * `word`. For answers to clients, who know the files that they sent, but not where the server keeps
 * them. Returns `code`. */
int claas_fail_hide_path(int code, const char *path, const char *word);

/* Text from outside as it may stand in a sentence: printable ASCII stays, all else is written as
 * \xHH (a backslash as two), and what is longer than 100 characters is cut. Use it within one
 * expression: claas_fail(code, "'%s' is no name", claas_quote(text).text). */
struct claas_quoted {
    char text[104];
};
struct claas_quoted claas_quote(const char *text);

/* A number as a person writes it: the shortest of 15, 16 and 17 digits that reads back as the same
 * number. Use it as claas_quote. */
struct claas_number {
    char text[32];
};
struct claas_number claas_number(double value);

/* The sentence of this thread's last failure; never NULL. Valid until the thread's next failure. */
const char *claas_error_text(void);

/* "NOT_FOUND"; "UNKNOWN" for a code outside the catalogue. */
const char *claas_err_name(int code);
/* The catalogue's text for a code. */
const char *claas_err_text(int code);
/* The HTTP status a code is answered with. */
int claas_err_http_status(int code);
/* The code of a catalogue name, CLAAS_ERR_INTERNAL if unknown. */
int claas_err_from_name(const char *name);

#ifdef __cplusplus
}
#endif
#endif
