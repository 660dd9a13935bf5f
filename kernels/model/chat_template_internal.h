/* The parts of a chat template, private to kernels/model and its tests. */
#ifndef CLAAS_CHAT_TEMPLATE_INTERNAL_H
#define CLAAS_CHAT_TEMPLATE_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

#include "claas/buf.h"
#include "claas/chat_template.h"

/* How a conversation is laid out. */
enum claas_chat_style {
    CLAAS_CHAT_CHATML, /* <|im_start|>role\ncontent<|im_end|>\n */
    CLAAS_CHAT_QWEN25, /* the same, but results of tools are shown as a user's turn */
    CLAAS_CHAT_QWEN3,  /* and earlier answers lose their thinking */
    CLAAS_CHAT_LLAMA3, /* <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|> */
};

/* Room for "26 Jul 2024". */
#define CLAAS_CHAT_DATE_SIZE 64

struct claas_chat_template {
    const char *name; /* of the family */
    enum claas_chat_style style;
    char *default_system;            /* NULL: none is put in */
    char *warning;                   /* NULL: the template is a known one */
    char date[CLAAS_CHAT_DATE_SIZE]; /* llama3: shown as "Today Date"; "" = no such block */
    bool date_today;                 /* llama3: the date is that of the rendering instead */
    bool opens_thinking;             /* qwen3: the generation prompt ends with "<think>\n" */
};

/* --- reading Jinja texts (chat_template_read.c) --- */

/* SHA-256, as 64 hex digits and NUL, of a template whose runs of white space are one blank each,
 * none at the ends. */
void claas_chat_template_hash(const char *source, char hex[65]);
/* The system text that a template puts in by itself: what stands between <|im_start|>system\n and
 * <|im_end|> in one string literal, else the literal given to a variable named after the system
 * message. *ret is NULL if there is none, else freed with free(). */
int claas_chat_template_read_system(const char *source, char **ret);
/* The literal given to the variable date_string; false if there is none that fits. */
bool claas_chat_template_read_date(const char *source, char date[CLAAS_CHAT_DATE_SIZE]);

/* --- families and known texts (chat_template.c) --- */

/* The family's name for a hash of the table, NULL if unknown. */
const char *claas_chat_template_known(const char *hex);

/* --- rendering (chat_template_render.c) --- */

/* claas_chat_template_render for a given day ("26 Jul 2024") instead of today. */
int claas_chat_template_render_on(const claas_chat_template_t *chat_template, const char *date,
                                  const struct claas_chat_message *messages, size_t count,
                                  bool add_generation_prompt, char **ret_text, size_t *ret_length);

#endif
