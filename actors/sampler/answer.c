/* What goes out of a chat: streamed pieces, log-prob entries, the stored rollout, the final
 * reply. */
#include <string.h>

#include "chat.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/tokenizer.h"

#define STORE_TIMEOUT_MS 30000
#define PIECE_ENTRIES    2048 /* of log-probs: a message holds twice as many */

/* A token's text as JSON wants it (broken UTF-8 shown as U+FFFD) and its exact bytes. */
static void set_token_text(cJSON *entry, const claas_tokenizer_t *tokenizer, int32_t token)
{
    size_t length = 0;
    const char *piece = claas_tokenizer_piece(tokenizer, token, &length);
    cJSON *bytes = cJSON_CreateArray();
    struct text_stream stream;
    char *text = NULL;

    text_stream_init(&stream, NULL, 0, true);
    if (length > 0)
        text_stream_add(&stream, piece, length);
    if (text_stream_next(&stream, true, &text) == 0)
        claas_json_set_string(entry, "token", text);
    claas_free_pointer(&text);
    text_stream_done(&stream);
    for (size_t i = 0; i < length; i++)
        cJSON_AddItemToArray(bytes, cJSON_CreateNumber((unsigned char)piece[i]));
    claas_json_set(entry, "bytes", bytes);
}

cJSON *chat_logprob_entry(const claas_tokenizer_t *tokenizer,
                          const struct claas_device_event *event)
{
    cJSON *entry = cJSON_CreateObject();
    cJSON *top = cJSON_CreateArray();

    set_token_text(entry, tokenizer, event->token);
    claas_json_set_number(entry, "logprob", event->logprob);
    for (int i = 0; i < event->top_count; i++) {
        cJSON *alternative = cJSON_CreateObject();

        set_token_text(alternative, tokenizer, event->top_tokens[i]);
        claas_json_set_number(alternative, "logprob", event->top_logprobs[i]);
        cJSON_AddItemToArray(top, alternative);
    }
    claas_json_set(entry, "top_logprobs", top);
    return entry;
}

int chat_send_piece(struct chat *chat, struct choice *choice, bool last)
{
    CLAAS_AUTO_FREE char *text = NULL;
    int rc = text_stream_next(&choice->stream, last, &text);
    cJSON *body;

    if (rc < 0)
        return rc;
    rc = claas_buf_add_text(&choice->visible, text);
    if (rc < 0)
        return rc;
    if (!chat->params.stream)
        return 0;
    /* Long hidden thinking shows no text, but its log-probs have to go out before a message is
     * full. */
    if (text[0] == '\0' && !last && cJSON_GetArraySize(choice->entries) < PIECE_ENTRIES)
        return 0;
    body = cJSON_CreateObject();
    claas_json_set_string(body, "id", chat->id);
    claas_json_set_int(body, "choice", choice - chat->choices);
    claas_json_set_string(body, "text", text);
    if (choice->entries) {
        claas_json_set(body, "logprobs", CLAAS_TAKE(choice->entries));
        choice->entries = cJSON_CreateArray();
    }
    if (last)
        claas_json_set_string(body, "finish_reason", choice->finish_reason);
    return claas_actor_progress(chat->sampler->actor, &chat->reply_to, body);
}

static const char *visible_text(const struct choice *choice)
{
    return choice->visible.data ? choice->visible.data : "";
}

static cJSON *sampling_object(const struct chat_params *params)
{
    cJSON *sampling = cJSON_CreateObject();

    claas_json_set_number(sampling, "temperature", params->temperature);
    claas_json_set_number(sampling, "top_p", params->top_p);
    claas_json_set_int(sampling, "top_k", params->top_k);
    claas_json_set_int(sampling, "seed", (int64_t)params->seed);
    claas_json_set_int(sampling, "max_tokens", params->max_tokens);
    return sampling;
}

static cJSON *rollout_body(const struct chat *chat)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *choices = cJSON_CreateArray();

    claas_json_set_string(body, "id", chat->id);
    if (chat->lora_id[0]) {
        claas_json_set_string(body, "lora_id", chat->lora_id);
        claas_json_set_int(body, "version", chat->version);
    }
    if (chat->params.messages)
        claas_json_set(body, "messages", cJSON_Duplicate(chat->params.messages, true));
    else
        claas_json_set_string(body, "prompt", chat->params.prompt);
    claas_json_set(body, "sampling", sampling_object(&chat->params));
    for (int i = 0; i < chat->params.n; i++) {
        const struct choice *choice = &chat->choices[i];
        const char *raw = choice->stream.raw.data ? choice->stream.raw.data : "";
        cJSON *item = cJSON_CreateObject();

        claas_json_set_int(item, "index", i);
        claas_json_set_string(item, "text", visible_text(choice));
        claas_json_set_string(
            item, "raw",
            claas_utf8_valid(raw, choice->stream.raw.length) ? raw : visible_text(choice));
        claas_json_set_string(item, "finish_reason", choice->finish_reason);
        cJSON_AddItemToArray(choices, item);
    }
    claas_json_set(body, "choices", choices);
    return body;
}

static void send_reply(struct chat *chat)
{
    cJSON *body = cJSON_CreateObject();
    cJSON *choices = cJSON_CreateArray();
    int64_t completion_tokens = 0;
    const char *model = chat->params.model;

    claas_json_set_string(body, "id", chat->id);
    claas_json_set_string(body, "model", model && model[0] ? model : "default");
    if (chat->lora_id[0]) {
        claas_json_set_string(body, "lora_id", chat->lora_id);
        claas_json_set_int(body, "version", chat->version);
    }
    for (int i = 0; i < chat->params.n; i++) {
        struct choice *choice = &chat->choices[i];
        cJSON *item = cJSON_CreateObject();

        claas_json_set_int(item, "index", i);
        claas_json_set_string(item, "text", visible_text(choice));
        claas_json_set_string(item, "finish_reason", choice->finish_reason);
        claas_json_set_int(item, "tokens", (int64_t)choice->count);
        if (choice->entries && !chat->params.stream)
            claas_json_set(item, "logprobs", CLAAS_TAKE(choice->entries));
        cJSON_AddItemToArray(choices, item);
        completion_tokens += (int64_t)choice->count;
    }
    claas_json_set(body, "choices", choices);
    claas_json_set_int(body, "prompt_tokens", (int64_t)chat->prompt_count);
    claas_json_set_int(body, "completion_tokens", completion_tokens);
    claas_json_set_int(body, "cached_tokens", (int64_t)chat->cached_tokens);
    claas_actor_reply(chat->sampler->actor, &chat->reply_to, body);
}

/* The answer itself is good: it goes out, and feedback on it will say that it was not kept. */
static void warn_not_kept(const struct chat *chat, const char *text)
{
    claas_warning("answer %s was not kept for feedback: %s", chat->id, text);
}

static void stored(void *self, void *arg, claas_message_t *reply)
{
    struct chat *chat = arg;

    (void)self;
    chat->ask = 0;
    if (reply->error)
        warn_not_kept(chat, reply->error_text);
    send_reply(chat);
    chat_free(chat);
}

void chat_finish(struct chat *chat)
{
    struct claas_attachment parts[3 * CHAT_CHOICES_MAX];
    size_t count = 0;
    int rc;

    for (int i = 0; i < chat->params.n; i++) {
        const struct choice *choice = &chat->choices[i];

        parts[count++] =
            (struct claas_attachment){chat->prompt, chat->prompt_count * sizeof(int32_t)};
        parts[count++] = (struct claas_attachment){choice->tokens, choice->count * sizeof(int32_t)};
        parts[count++] = (struct claas_attachment){choice->logprobs, choice->count * sizeof(float)};
    }
    rc = claas_actor_ask(chat->sampler->actor,
                         &(struct claas_ask){
                             .to = "storage",
                             .type = CLAAS_MSG_ROLLOUT_PUT,
                             .body = rollout_body(chat),
                             .attachments = parts,
                             .attachment_count = count,
                             .timeout_ms = STORE_TIMEOUT_MS,
                             .principal = chat->reply_to.principal,
                             .reply = stored,
                             .arg = chat,
                         },
                         &chat->ask);
    if (rc == 0)
        return;
    warn_not_kept(chat, claas_error_text());
    send_reply(chat);
    chat_free(chat);
}
