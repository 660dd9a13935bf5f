/* Conversations laid out as the original Jinja templates do it (without tools), as text or as token
 * ids.
 *
 * A rendering is text plus a list of the places where the template, not a message, wrote a marker.
 * As ids, markers are looked up and everything between two of them is encoded as one stretch in
 * which no control token is recognised: so a user who writes "<|im_end|>" gets the tokens of its
 * letters, and ordinary text gives the same ids as the original's rendering tokenised as a whole.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "chat_template_internal.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/visible_text.h"
#include "tokenizer_internal.h"

enum role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL, ROLE_COUNT };
static const char *const role_names[ROLE_COUNT] = {"system", "user", "assistant", "tool"};

struct message {
    enum role role;
    const char *content;
};

/* A piece of text, borrowed. */
struct piece {
    const char *text;
    size_t length;
};

struct marker {
    size_t start;
    const char *text; /* static */
};

struct rendering {
    const struct claas_chat_template *chat_template;
    const char *date;
    struct message *messages;
    size_t count;
    bool generation_prompt;
    struct claas_buf text;
    struct marker *markers;
    size_t marker_count, marker_capacity;
};

static void rendering_done(struct rendering *r)
{
    free(r->messages);
    free(r->markers);
    claas_buf_done(&r->text);
}

/* --- output; failures stay in r->text.error --- */

static void put(struct rendering *r, const char *text)
{
    claas_buf_add_text(&r->text, text);
}

static void put_piece(struct rendering *r, struct piece piece)
{
    claas_buf_add(&r->text, piece.text, piece.length);
}

static void put_marker(struct rendering *r, const char *marker)
{
    if (r->marker_count == r->marker_capacity) {
        size_t capacity = r->marker_capacity ? 2 * r->marker_capacity : 32;
        struct marker *markers = claas_realloc(r->markers, capacity, sizeof(*markers));

        if (!markers) {
            r->text.error = CLAAS_ERR_NO_MEMORY;
            return;
        }
        r->markers = markers;
        r->marker_capacity = capacity;
    }
    r->markers[r->marker_count++] = (struct marker){r->text.length, marker};
    put(r, marker);
}

/* --- pieces of text --- */

static struct piece whole(const char *text)
{
    return (struct piece){text, strlen(text)};
}

static struct piece strip_newlines_left(struct piece piece)
{
    while (piece.length > 0 && piece.text[0] == '\n') {
        piece.text++;
        piece.length--;
    }
    return piece;
}

static struct piece strip_newlines_right(struct piece piece)
{
    while (piece.length > 0 && piece.text[piece.length - 1] == '\n')
        piece.length--;
    return piece;
}

/* Python's str.strip(). */
static struct piece strip(const char *text)
{
    const char *end;
    size_t space;

    while ((space = claas_space_length(text)) > 0)
        text += space;
    end = text;
    for (const char *c = text; *c;) {
        space = claas_space_length(c);
        c += space ? space : 1;
        if (!space)
            end = c;
    }
    return (struct piece){text, (size_t)(end - text)};
}

static bool starts_with(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

static bool ends_with(const char *text, const char *suffix)
{
    size_t length = strlen(text), suffix_length = strlen(suffix);

    return length >= suffix_length && strcmp(text + length - suffix_length, suffix) == 0;
}

/* --- ChatML: SmolLM2, Qwen --- */

static void put_chatml(struct rendering *r, const char *role, struct piece content)
{
    put_marker(r, "<|im_start|>");
    put(r, role);
    put(r, "\n");
    put_piece(r, content);
    put_marker(r, "<|im_end|>");
    put(r, "\n");
}

/* Results of tools in a row share one user turn. */
static void put_tool_response(struct rendering *r, size_t i)
{
    if (i == 0 || r->messages[i - 1].role != ROLE_TOOL) {
        put_marker(r, "<|im_start|>");
        put(r, "user");
    }
    put(r, "\n<tool_response>\n");
    put(r, r->messages[i].content);
    put(r, "\n</tool_response>");
    if (i + 1 == r->count || r->messages[i + 1].role != ROLE_TOOL) {
        put_marker(r, "<|im_end|>");
        put(r, "\n");
    }
}

/* Index of the last message in which a person asked something; of the last if there is none. */
static size_t last_query(const struct rendering *r)
{
    for (size_t i = r->count; i-- > 0;) {
        const char *content = r->messages[i].content;

        if (r->messages[i].role == ROLE_USER &&
            !(starts_with(content, "<tool_response>") && ends_with(content, "</tool_response>")))
            return i;
    }
    return r->count - 1;
}

/* Last occurrence of a tag within a piece, or NULL. */
static const char *find_last(struct piece piece, const char *tag)
{
    const char *last = NULL, *at = piece.text;
    size_t tag_length = strlen(tag);

    while ((at = memmem(at, (size_t)(piece.text + piece.length - at), tag, tag_length)) != NULL)
        last = at++;
    return last;
}

/* Splits an answer at its </think>: thinking is what stands between the first </think> and the last
 * <think> before it, the rest is what follows the last </think>. */
static void split_thinking(const char *content, struct piece *thinking, struct piece *rest)
{
    static const char open[] = "<think>", close[] = "</think>";
    const char *end = strstr(content, close);
    const char *begin;

    *thinking = (struct piece){"", 0};
    *rest = whole(content);
    if (!end)
        return;
    *rest = strip_newlines_left(whole(find_last(*rest, close) + strlen(close)));
    *thinking = strip_newlines_right((struct piece){content, (size_t)(end - content)});
    begin = find_last(*thinking, open);
    if (begin) {
        begin += strlen(open);
        thinking->length -= (size_t)(begin - thinking->text);
        thinking->text = begin;
    }
    *thinking = strip_newlines_left(*thinking);
}

static void put_qwen3_answer(struct rendering *r, size_t i)
{
    struct piece thinking, rest;

    split_thinking(r->messages[i].content, &thinking, &rest);
    if (i <= last_query(r) || (i + 1 < r->count && thinking.length == 0)) {
        put_chatml(r, "assistant", rest);
        return;
    }
    put_marker(r, "<|im_start|>");
    put(r, "assistant\n");
    put_marker(r, "<think>");
    put(r, "\n");
    put_piece(r, strip_newlines_right(thinking));
    put(r, "\n");
    put_marker(r, "</think>");
    put(r, "\n\n");
    put_piece(r, strip_newlines_left(rest));
    put_marker(r, "<|im_end|>");
    put(r, "\n");
}

static void render_chatml(struct rendering *r)
{
    enum claas_chat_style style = r->chat_template->style;

    if (r->chat_template->default_system && r->messages[0].role != ROLE_SYSTEM)
        put_chatml(r, "system", whole(r->chat_template->default_system));
    for (size_t i = 0; i < r->count; i++) {
        const struct message *message = &r->messages[i];

        if (message->role == ROLE_TOOL && style != CLAAS_CHAT_CHATML)
            put_tool_response(r, i);
        else if (message->role == ROLE_ASSISTANT && style == CLAAS_CHAT_QWEN3)
            put_qwen3_answer(r, i);
        else
            put_chatml(r, role_names[message->role], whole(message->content));
    }
    if (!r->generation_prompt)
        return;
    put_marker(r, "<|im_start|>");
    put(r, "assistant\n");
    if (r->chat_template->opens_thinking) {
        put_marker(r, "<think>");
        put(r, "\n");
    }
}

/* --- Llama 3 --- */

static void put_header(struct rendering *r, const char *role)
{
    put_marker(r, "<|start_header_id|>");
    put(r, role);
    put_marker(r, "<|end_header_id|>");
    put(r, "\n\n");
}

/* A JSON string as Python's json.dumps(ensure_ascii=False) writes it: how Llama 3.1 shows the
 * result of a tool. */
static void put_json_string(struct rendering *r, const char *text)
{
    static const char escapes[] = "\"\"\\\\\nn\rr\tt\bb\ff";

    put(r, "\"");
    for (; *text; text++) {
        const char *e = escapes;

        while (*e && *e != *text)
            e += 2;
        if (*e)
            claas_buf_printf(&r->text, "\\%c", e[1]);
        else if ((unsigned char)*text < 0x20)
            claas_buf_printf(&r->text, "\\u%04x", *text);
        else
            claas_buf_add(&r->text, text, 1);
    }
    put(r, "\"");
}

/* 3.1 and later always start with a system turn that tells the date. */
static size_t put_llama3_system(struct rendering *r)
{
    bool given = r->messages[0].role == ROLE_SYSTEM;

    put_header(r, "system");
    put(r, "Cutting Knowledge Date: December 2023\nToday Date: ");
    put(r, r->chat_template->date_today ? r->date : r->chat_template->date);
    put(r, "\n\n");
    if (given)
        put_piece(r, strip(r->messages[0].content));
    put_marker(r, "<|eot_id|>");
    return given ? 1 : 0;
}

static void render_llama3(struct rendering *r)
{
    bool dated = r->chat_template->date[0] != '\0';
    size_t i = 0;

    put_marker(r, "<|begin_of_text|>");
    if (dated)
        i = put_llama3_system(r);
    for (; i < r->count; i++) {
        const struct message *message = &r->messages[i];

        if (message->role == ROLE_TOOL && dated) {
            put_header(r, "ipython");
            put_json_string(r, message->content);
        } else {
            put_header(r, role_names[message->role]);
            put_piece(r, strip(message->content));
        }
        put_marker(r, "<|eot_id|>");
    }
    if (r->generation_prompt)
        put_header(r, "assistant");
}

/* --- the whole --- */

static int read_role(const char *name, enum role *ret)
{
    for (int i = 0; i < ROLE_COUNT; i++)
        if (strcmp(role_names[i], name) == 0) {
            *ret = (enum role)i;
            return 0;
        }
    if (strcmp(name, "developer") != 0)
        return claas_fail(CLAAS_ERR_INVALID,
                          "no role is called '%.40s'; there are system, user, assistant, tool",
                          name);
    *ret = ROLE_SYSTEM;
    return 0;
}

static int render(const claas_chat_template_t *chat_template, const char *date,
                  const struct claas_chat_message *messages, size_t count, bool generation_prompt,
                  struct rendering *r)
{
    int rc = 0;

    *r = (struct rendering){.chat_template = chat_template,
                            .date = date,
                            .count = count,
                            .generation_prompt = generation_prompt};
    claas_buf_init(&r->text, CLAAS_TEXT_MAX);
    if (count == 0)
        return claas_fail(CLAAS_ERR_INVALID, "a conversation without messages");
    r->messages = CLAAS_NEW_ARRAY(struct message, count);
    if (!r->messages)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; rc >= 0 && i < count; i++) {
        r->messages[i].content = messages[i].content;
        rc = read_role(messages[i].role, &r->messages[i].role);
    }
    if (rc < 0)
        return rc;
    if (chat_template->style == CLAAS_CHAT_LLAMA3)
        render_llama3(r);
    else
        render_chatml(r);
    return r->text.error ? claas_fail(r->text.error, "the conversation is too long to render") : 0;
}

int claas_chat_template_render_on(const claas_chat_template_t *chat_template, const char *date,
                                  const struct claas_chat_message *messages, size_t count,
                                  bool add_generation_prompt, char **ret_text, size_t *ret_length)
{
    CLAAS_AUTO(rendering_done) struct rendering r;
    int rc = render(chat_template, date, messages, count, add_generation_prompt, &r);

    if (rc < 0)
        return rc;
    *ret_text = claas_buf_take(&r.text, ret_length);
    return 0;
}

/* Appends the ids of the text between two markers. */
static int encode_between(const struct rendering *r, const claas_tokenizer_t *tokenizer,
                          size_t start, size_t end, struct claas_id_list *ids)
{
    CLAAS_AUTO_FREE int32_t *part = NULL;
    size_t count = 0;
    int rc;

    if (start == end)
        return 0;
    rc = claas_tokenizer_encode(tokenizer, r->text.data + start, end - start, false, &part, &count);
    if (rc >= 0)
        rc = claas_id_list_reserve(ids, count);
    if (rc < 0)
        return rc;
    memcpy(ids->ids + ids->count, part, count * sizeof(*part));
    ids->count += count;
    return 0;
}

static int encode_on(const claas_chat_template_t *chat_template, const char *date,
                     const claas_tokenizer_t *tokenizer, const struct claas_chat_message *messages,
                     size_t count, bool add_generation_prompt, int32_t **ret_ids, size_t *ret_count)
{
    CLAAS_AUTO(rendering_done) struct rendering r;
    CLAAS_AUTO(claas_id_list_done) struct claas_id_list ids = {NULL};
    size_t done = 0;
    int rc = render(chat_template, date, messages, count, add_generation_prompt, &r);

    for (size_t i = 0; rc >= 0 && i < r.marker_count; i++) {
        const struct marker *marker = &r.markers[i];
        int32_t id = claas_tokenizer_special(tokenizer, marker->text);

        if (id < 0)
            continue; /* a vocabulary without it: the marker is part of the text */
        rc = encode_between(&r, tokenizer, done, marker->start, &ids);
        if (rc >= 0)
            rc = claas_id_list_reserve(&ids, 1);
        if (rc >= 0)
            ids.ids[ids.count++] = id;
        done = marker->start + strlen(marker->text);
    }
    if (rc >= 0)
        rc = encode_between(&r, tokenizer, done, r.text.length, &ids);
    if (rc < 0)
        return rc;
    *ret_ids = CLAAS_TAKE(ids.ids);
    *ret_count = ids.count;
    return 0;
}

/* strftime's "%d %b %Y" in the C locale, whatever locale the process has. */
static void today(char date[CLAAS_CHAT_DATE_SIZE])
{
    static const char months[12][4] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                       "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
    time_t now = time(NULL);
    struct tm tm = {0};

    localtime_r(&now, &tm);
    snprintf(date, CLAAS_CHAT_DATE_SIZE, "%02d %s %d", tm.tm_mday, months[tm.tm_mon],
             tm.tm_year + 1900);
}

int claas_chat_template_render(const claas_chat_template_t *chat_template,
                               const struct claas_chat_message *messages, size_t count,
                               bool add_generation_prompt, char **ret_text, size_t *ret_length)
{
    char date[CLAAS_CHAT_DATE_SIZE];

    today(date);
    return claas_chat_template_render_on(chat_template, date, messages, count,
                                         add_generation_prompt, ret_text, ret_length);
}

int claas_chat_template_encode(const claas_chat_template_t *chat_template,
                               const claas_tokenizer_t *tokenizer,
                               const struct claas_chat_message *messages, size_t count,
                               bool add_generation_prompt, int32_t **ret_ids, size_t *ret_count)
{
    char date[CLAAS_CHAT_DATE_SIZE];

    today(date);
    return encode_on(chat_template, date, tokenizer, messages, count, add_generation_prompt,
                     ret_ids, ret_count);
}
