/* Teacher prompts: see forms.h. The texts are part of what was measured; changing a character
 * changes what is learnt. */
#include "forms.h"

#include <stdlib.h>
#include <string.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/visible_text.h"

#define PROMPT_BYTES_MAX (16 << 20)

static const char default_system[] = "You are a helpful assistant.";
static const char hindsight_block[] =
    "\n\n=== HINDSIGHT CONTEXT ===\n[The following is a future user message. Use this to guide "
    "your answer to the user prompt.]\n";
static const char list_head[] =
    "\nStanding feedback from this user, to follow only where it fits the question:";
static const char userlist_head[] = "[My earlier feedback, use it only where it fits:";

static const char *const form_names[] = {
    [FORM_HINDSIGHT] = "hindsight", [FORM_BRIEF] = "brief",       [FORM_SYSTEM] = "system",
    [FORM_LIST] = "list",           [FORM_USERLIST] = "userlist", [FORM_TURNS] = "turns",
};

int form_from_name(const char *name, enum form *ret)
{
    for (size_t i = 0; i < CLAAS_COUNT(form_names); i++) {
        if (strcmp(name, form_names[i]) == 0) {
            *ret = (enum form)i;
            return 0;
        }
    }
    return claas_fail(CLAAS_ERR_INVALID,
                      "'%s' is no form of showing feedback (hindsight, brief, system, list, "
                      "userlist, turns)",
                      name);
}

bool form_is_list(enum form form)
{
    return form == FORM_LIST || form == FORM_USERLIST || form == FORM_TURNS;
}

/* A conversation under construction: borrowed role names, owned contents. */
struct conversation {
    struct claas_chat_message *messages;
    size_t count;
};

static void conversation_done(struct conversation *conversation)
{
    for (size_t i = 0; i < conversation->count; i++)
        free((char *)conversation->messages[i].content);
    free(conversation->messages);
    *conversation = (struct conversation){0};
}

static void add(struct conversation *conversation, const char *role, char *content)
{
    conversation->messages[conversation->count].role = role;
    conversation->messages[conversation->count++].content = content;
}

static char *strip(const char *text)
{
    size_t length, space;

    while ((space = claas_space_length(text)) > 0)
        text += space;
    length = strlen(text);
    while (length > 0 && claas_space_length(text + length - 1) == 1)
        length--;
    return claas_strndup(text, length);
}

/* "- one\n- two", or "one two" with an empty bullet. */
static void add_feedback(struct claas_buf *buf, const char *separator, const char *const *feedback,
                         size_t count)
{
    for (size_t i = 0; i < count; i++) {
        CLAAS_AUTO_FREE char *text = strip(feedback[i]);

        claas_buf_add_text(buf, separator);
        claas_buf_add_text(buf, text ? text : "");
    }
}

/* The system text with the feedback in it. `given`: the conversation's own system text or NULL. */
static char *system_with_feedback(enum form form, const char *given, const char *const *feedback,
                                  size_t count)
{
    struct claas_buf buf;

    claas_buf_init(&buf, PROMPT_BYTES_MAX);
    claas_buf_add_text(&buf, given && given[0] ? given : default_system);
    if (form == FORM_LIST) {
        claas_buf_add_text(&buf, list_head);
        add_feedback(&buf, "\n- ", feedback, count);
    } else {
        add_feedback(&buf, " ", feedback, count);
    }
    return claas_buf_take(&buf, NULL);
}

/* The last user turn with the feedback in it. */
static char *user_with_feedback(enum form form, const char *text, const char *const *feedback,
                                size_t count)
{
    struct claas_buf buf;

    claas_buf_init(&buf, PROMPT_BYTES_MAX);
    if (form == FORM_USERLIST) {
        claas_buf_add_text(&buf, userlist_head);
        add_feedback(&buf, "\n- ", feedback, count);
        claas_buf_add_text(&buf, "]\n\n");
        claas_buf_add_text(&buf, text);
    } else if (form == FORM_HINDSIGHT) {
        claas_buf_add_text(&buf, text);
        claas_buf_add_text(&buf, hindsight_block);
        add_feedback(&buf, "", feedback, 1);
        add_feedback(&buf, "\n", feedback + 1, count - 1);
    } else {
        claas_buf_add_text(&buf, text);
        add_feedback(&buf, "\n\n(", feedback, 1);
        add_feedback(&buf, " ", feedback + 1, count - 1);
        claas_buf_add_text(&buf, ")");
    }
    return claas_buf_take(&buf, NULL);
}

static int last_user_index(const cJSON *messages)
{
    const cJSON *message;
    int index = 0, last = -1;

    cJSON_ArrayForEach(message, messages)
    {
        const char *role = "";

        claas_json_get_string(message, "role", &role);
        if (strcmp(role, "user") == 0)
            last = index;
        index++;
    }
    return last;
}

static void add_turns(struct conversation *conversation, const char *const *feedback, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        add(conversation, "user", strip(feedback[i]));
        add(conversation, "assistant", claas_strdup("Understood."));
    }
}

static void build(struct conversation *conversation, enum form form, const cJSON *messages,
                  const char *const *feedback, size_t count)
{
    bool in_system = count > 0 && (form == FORM_SYSTEM || form == FORM_LIST);
    bool in_user = count > 0 && !in_system && form != FORM_TURNS;
    int last_user = last_user_index(messages);
    bool has_system = false, turns_due = count > 0 && form == FORM_TURNS;
    const cJSON *message;
    int index = 0;

    cJSON_ArrayForEach(message, messages)
    {
        const char *role = "", *content = "";
        bool is_system;

        claas_json_get_string(message, "role", &role);
        claas_json_get_string(message, "content", &content);
        is_system = strcmp(role, "system") == 0 || strcmp(role, "developer") == 0;
        if (index == 0 && in_system && !is_system)
            add(conversation, "system", system_with_feedback(form, NULL, feedback, count));
        if (turns_due && !is_system) {
            add_turns(conversation, feedback, count);
            turns_due = false;
        }
        if (is_system && in_system && !has_system)
            add(conversation, role, system_with_feedback(form, content, feedback, count));
        else if (index == last_user && in_user)
            add(conversation, role, user_with_feedback(form, content, feedback, count));
        else
            add(conversation, role, claas_strdup(content));
        has_system = has_system || is_system;
        index++;
    }
}

int form_encode(enum form form, const cJSON *messages, const char *const *feedback, size_t count,
                const claas_chat_template_t *chat_template, const claas_tokenizer_t *tokenizer,
                int32_t **ret_ids, size_t *ret_count)
{
    CLAAS_AUTO(conversation_done) struct conversation conversation = {0};
    size_t most = (size_t)cJSON_GetArraySize(messages) + 2 * count + 1;

    conversation.messages = CLAAS_NEW_ARRAY(struct claas_chat_message, most);
    if (!conversation.messages)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    build(&conversation, form, messages, feedback, count);
    for (size_t i = 0; i < conversation.count; i++) {
        if (!conversation.messages[i].content)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    return claas_chat_template_encode(chat_template, tokenizer, conversation.messages,
                                      conversation.count, true, ret_ids, ret_count);
}
