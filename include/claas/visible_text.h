/* What a reader sees of a raw answer, and the form in which texts are compared: the Python system's
 * rules, kept to the character, because its clients look answers up by their text. */
#ifndef CLAAS_VISIBLE_TEXT_H
#define CLAAS_VISIBLE_TEXT_H

#include <stddef.h>

/* The final channel of a harmony answer, without <think>…</think> spans (an orphan </think> cuts
 * all before it), stripped of white space at both ends. New string, free with free(); NULL when out
 * of memory. */
char *claas_visible_text(const char *raw);
/* A text without thinking, stripped, with one blank for every run of white space: its SHA-256 is
 * the look-up key. New string, free with free(). */
char *claas_normalized_text(const char *text);
/* Bytes of the white space character (Python's str.isspace) that starts at `text`, 0 if it is
 * none. */
size_t claas_space_length(const char *text);

#endif
