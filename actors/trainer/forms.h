/* How feedback is shown to the teacher: the forms measured for each model (the scheduler's recipes
 * choose among them). */
#ifndef CLAAS_TRAINER_FORMS_H
#define CLAAS_TRAINER_FORMS_H

#include "claas/chat_template.h"
#include "claas/json.h"

enum form {
    FORM_HINDSIGHT, /* the Python system's block after the last user turn */
    FORM_BRIEF,     /* "(feedback)" after the last user turn */
    FORM_SYSTEM,    /* in the system message */
    FORM_LIST,      /* in the system message, as a list "to follow only where it fits" */
    FORM_USERLIST,  /* the same list in front of the last user turn */
    FORM_TURNS,     /* each as an earlier user turn, answered "Understood." */
};

/* CLAAS_ERR_INVALID for an unknown name. */
int form_from_name(const char *name, enum form *ret);
/* Whether the form can show many feedbacks at once. */
bool form_is_list(enum form form);
/* The conversation with the feedback shown, rendered with a generation prompt and tokenised; free
 * *ret_ids with free(). `messages`: [{role, content}]; `feedback`: at least one text. With no
 * feedback: the plain conversation. */
int form_encode(enum form form, const cJSON *messages, const char *const *feedback, size_t count,
                const claas_chat_template_t *chat_template, const claas_tokenizer_t *tokenizer,
                int32_t **ret_ids, size_t *ret_count);

#endif
