/* Chat templates: no C implementation of Jinja exists, so the families' templates are written in C
 * and chosen by the hash of the model's normalised template, else by markers of a family (with a
 * warning). */
#ifndef CLAAS_CHAT_TEMPLATE_H
#define CLAAS_CHAT_TEMPLATE_H

#include "claas/tokenizer.h"

typedef struct claas_chat_template claas_chat_template_t;

struct claas_chat_message {
    const char *role;    /* "system", "user", "assistant", "tool"; "developer" is taken as system */
    const char *content; /* UTF-8, NUL-terminated */
};

/* `source`: the model's Jinja text or NULL; `override`: a family name, as the setting
 * chat_template has them, or NULL. Error: UNSUPPORTED when no family fits, with the names to choose
 * from. */
int claas_chat_template_new(const char *source, const char *override, claas_chat_template_t **ret);
void claas_chat_template_free(claas_chat_template_t **chat_template);
const char *claas_chat_template_name(const claas_chat_template_t *chat_template);
/* Non-NULL when the family was guessed from markers: a sentence for the log. */
const char *claas_chat_template_warning(const claas_chat_template_t *chat_template);
/* The system text the template puts in when a conversation has none, or NULL. */
const char *claas_chat_template_default_system(const claas_chat_template_t *chat_template);

/* The conversation as text, as the original template gives it (without tools; Qwen3's
 * enable_thinking left at its default); free with free(). Errors: INVALID for no messages or an
 * unknown role, TOO_LARGE. */
int claas_chat_template_render(const claas_chat_template_t *chat_template,
                               const struct claas_chat_message *messages, size_t count,
                               bool add_generation_prompt, char **ret_text, size_t *ret_length);
/* The same as token ids: markers become special tokens, text of messages never does. Free with
 * free(). */
int claas_chat_template_encode(const claas_chat_template_t *chat_template,
                               const claas_tokenizer_t *tokenizer,
                               const struct claas_chat_message *messages, size_t count,
                               bool add_generation_prompt, int32_t **ret_ids, size_t *ret_count);

#endif
