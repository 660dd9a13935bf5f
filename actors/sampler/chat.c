/* The life of a chat: resolve the model's name, get the adapter version, render and tokenise the
 * prompt, generate the choices, and when all have ended store the rollout and reply. Every wait is
 * a callback; a chat that fails or is abandoned at any point is freed exactly once. */
#include "chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "claas/chat_template.h"
#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/metrics.h"
#include "claas/random.h"

#define RESOLVE_TIMEOUT_MS 10000
#define STOP_TOKENS_MAX    16
/* One token's log-prob in JSON, with 9 bytes of text: 55 of keys and brackets, the text,
 * numbers. */
#define LOGPROB_BYTES 100
/* All log-probs of an answer that is not streamed, in JSON. As trees of values they take some ten
 * times as much in sampler and bridge, and the bridge's loop does nothing else while it reads and
 * prints them. */
#define LOGPROBS_BYTES_MAX (8 << 20)

void chat_free(struct chat *chat)
{
    struct chat **link = &chat->sampler->chats;

    while (*link && *link != chat)
        link = &(*link)->next;
    if (*link)
        *link = chat->next;
    adapter_cache_forget(chat->sampler->adapters, chat);
    if (chat->ask)
        claas_actor_cancel(chat->sampler->actor, chat->ask);
    for (int i = 0; i < CHAT_CHOICES_MAX; i++) {
        struct choice *choice = &chat->choices[i];

        if (choice->request)
            claas_device_cancel(chat->sampler->client, choice->request);
        free(choice->tokens);
        free(choice->logprobs);
        cJSON_Delete(choice->entries);
        text_stream_done(&choice->stream);
        claas_buf_done(&choice->visible);
    }
    claas_adapter_unref(&chat->adapter);
    claas_json_free(&chat->body);
    free(chat->prompt);
    free(chat);
}

static void chat_refuse(struct chat *chat, int code, const char *text)
{
    claas_actor_reply_error(chat->sampler->actor, &chat->reply_to, code, text);
    chat_free(chat);
}

/* Out of memory, the host's or the device's, is OVERLOADED for a chat: too much at the same
 * time. */
static void chat_fail(struct chat *chat, int code, const char *text)
{
    if (code == CLAAS_ERR_NO_MEMORY) {
        claas_warning("a chat is refused: %s", text);
        code = CLAAS_ERR_OVERLOADED;
        text = "there is not enough memory, try again later";
    }
    chat_refuse(chat, code, text);
}

/* --- prompt ----------------------------------------------------------------------------------- */

static int encode_messages(struct chat *chat)
{
    const claas_model_t *model = chat->sampler->model;
    int count = cJSON_GetArraySize(chat->params.messages);
    CLAAS_AUTO_FREE struct claas_chat_message *messages =
        CLAAS_NEW_ARRAY(struct claas_chat_message, count);
    const cJSON *message;
    int index = 0;

    if (!messages)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(message, chat->params.messages)
    {
        claas_json_get_string(message, "role", &messages[index].role);
        claas_json_get_string(message, "content", &messages[index].content);
        index++;
    }
    return claas_chat_template_encode(claas_model_chat_template(model),
                                      claas_model_tokenizer(model), messages, (size_t)count, true,
                                      &chat->prompt, &chat->prompt_count);
}

static int encode_prompt(struct chat *chat)
{
    const claas_model_t *model = chat->sampler->model;
    int context = claas_model_config(model)->context;
    int rc;

    if (chat->params.messages)
        rc = encode_messages(chat);
    else
        rc = claas_tokenizer_encode(claas_model_tokenizer(model), chat->params.prompt,
                                    strlen(chat->params.prompt), false, &chat->prompt,
                                    &chat->prompt_count);
    if (rc < 0)
        return rc;
    if (chat->prompt_count == 0)
        return claas_fail(CLAAS_ERR_INVALID, "the prompt is empty");
    if (chat->prompt_count >= (size_t)context)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "the prompt has %zu tokens, the context of this model %d",
                          chat->prompt_count, context);
    return 0;
}

/* --- generation ------------------------------------------------------------------------------- */

static int start_choice(struct chat *chat, int index)
{
    const struct chat_params *p = &chat->params;
    int room = claas_model_config(chat->sampler->model)->context - (int)chat->prompt_count;
    int32_t stop[STOP_TOKENS_MAX];
    struct claas_generate_request request = {
        .prompt = chat->prompt,
        .prompt_count = chat->prompt_count,
        .adapter = chat->adapter,
        .max_tokens = p->max_tokens > 0 && p->max_tokens < room ? p->max_tokens : room,
        .temperature = (float)p->temperature,
        .top_p = (float)p->top_p,
        .top_k = p->top_k,
        .seed = p->seed + (uint64_t)index,
        .stop_tokens = stop,
        .stop_count = claas_model_stop_tokens(chat->sampler->model, stop, STOP_TOKENS_MAX),
        .top_logprobs = p->top_logprobs,
        .priority = CLAAS_PRIORITY_CHAT,
    };
    struct choice *choice = &chat->choices[index];

    text_stream_init(&choice->stream, p->stops, p->stop_count, p->messages == NULL);
    claas_buf_init(&choice->visible, CLAAS_MESSAGE_BYTES);
    if (p->logprobs)
        choice->entries = cJSON_CreateArray();
    return claas_device_generate(chat->sampler->client, &request, &choice->request);
}

/* Without streaming all log-probs go out at once. A request that names too many tokens for that
 * hears so before the work, one that names none gets as many as may go. */
static int bound_logprobs(struct chat *chat)
{
    struct chat_params *p = &chat->params;
    int room = claas_model_config(chat->sampler->model)->context - (int)chat->prompt_count;
    int most = LOGPROBS_BYTES_MAX / (LOGPROB_BYTES * (1 + p->top_logprobs) * p->n);
    int wanted = p->max_tokens > 0 && p->max_tokens < room ? p->max_tokens : room;

    if (!p->logprobs || p->stream || wanted <= most)
        return 0;
    if (claas_json_get(chat->body, "max_tokens"))
        return claas_fail(CLAAS_ERR_INVALID,
                          "with these log-probs an answer may have %d tokens, %d are asked for: "
                          "lower max_tokens, top_logprobs or n, or stream",
                          most, wanted);
    p->max_tokens = most;
    return 0;
}

static void start_generation(struct chat *chat)
{
    int rc = encode_prompt(chat);

    if (rc == 0)
        rc = bound_logprobs(chat);
    for (int i = 0; rc == 0 && i < chat->params.n; i++) {
        rc = start_choice(chat, i);
        if (rc == 0)
            chat->running++;
    }
    if (rc < 0) {
        chat_fail(chat, rc, claas_error_text());
        return;
    }
    claas_metric_add(CLAAS_METRIC_CHAT_PROMPT_TOKENS, (double)chat->prompt_count);
}

static int keep_token(struct choice *choice, const struct claas_device_event *event)
{
    if (choice->count == choice->capacity) {
        size_t capacity = choice->capacity ? choice->capacity * 2 : 64;
        int32_t *tokens = claas_realloc(choice->tokens, capacity, sizeof(int32_t));
        float *logprobs;

        if (!tokens)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        choice->tokens = tokens;
        logprobs = claas_realloc(choice->logprobs, capacity, sizeof(float));
        if (!logprobs)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        choice->logprobs = logprobs;
        choice->capacity = capacity;
    }
    choice->tokens[choice->count] = event->token;
    choice->logprobs[choice->count++] = event->logprob;
    return 0;
}

static void observe_token(struct chat *chat, struct choice *choice)
{
    int64_t now = claas_clock_ns();

    claas_metric_add(CLAAS_METRIC_CHAT_TOKENS, 1);
    if (choice->last_token_ns)
        claas_metric_observe(CLAAS_METRIC_CHAT_GAP_SECONDS,
                             (double)(now - choice->last_token_ns) / 1e9);
    else
        claas_metric_observe(CLAAS_METRIC_CHAT_FIRST_TOKEN_SECONDS,
                             (double)(now - chat->started_ns) / 1e9);
    choice->last_token_ns = now;
}

static int take_token(struct chat *chat, struct choice *choice,
                      const struct claas_device_event *event)
{
    const claas_tokenizer_t *tokenizer = claas_model_tokenizer(chat->sampler->model);
    size_t length = 0;
    const char *piece = claas_tokenizer_piece(tokenizer, event->token, &length);
    int rc = keep_token(choice, event);

    if (rc < 0)
        return rc;
    observe_token(chat, choice);
    if (claas_tokenizer_is_control(tokenizer, event->token))
        length = 0;
    if (chat->params.logprobs)
        cJSON_AddItemToArray(choice->entries, chat_logprob_entry(tokenizer, event));
    rc = text_stream_add(&choice->stream, piece, length);
    if (rc == 1 && !choice->finish_reason) {
        choice->finish_reason = "stop";
        claas_device_cancel(chat->sampler->client, choice->request);
    }
    if (rc < 0)
        return rc;
    return chat_send_piece(chat, choice, false);
}

static int finish_choice(struct chat *chat, struct choice *choice,
                         const struct claas_device_event *event)
{
    choice->request = 0;
    chat->cached_tokens += event->cached_tokens;
    if (!choice->finish_reason)
        choice->finish_reason = event->finish == CLAAS_FINISH_LENGTH ? "length" : "stop";
    chat->running--;
    return chat_send_piece(chat, choice, true);
}

void chat_event(struct chat *chat, struct choice *choice, const struct claas_device_event *event)
{
    int rc = 0;

    if (event->kind == CLAAS_EVENT_FAILED) {
        choice->request = 0;
        chat_fail(chat, event->error, event->text);
        return;
    }
    if (event->kind == CLAAS_EVENT_TOKEN && !choice->finish_reason)
        rc = take_token(chat, choice, event);
    else if (event->kind == CLAAS_EVENT_FINISHED)
        rc = finish_choice(chat, choice, event);
    if (rc < 0)
        chat_fail(chat, rc, claas_error_text());
    else if (chat->running == 0)
        chat_finish(chat);
}

/* --- which weights ---------------------------------------------------------------------------- */

static void adapter_ready(void *arg, claas_adapter_t *adapter, int error, const char *text)
{
    struct chat *chat = arg;
    char name[sizeof(chat->lora_id) + 16];

    if (error) {
        claas_fail(error, "LoRA %s@%d: %s", chat->lora_id, chat->version, text);
        chat_refuse(chat, error, claas_error_text()); /* NO_MEMORY as it is: no later try helps */
        return;
    }
    chat->adapter = adapter;
    snprintf(name, sizeof(name), "%s@%d", chat->lora_id, chat->version);
    claas_adapter_set_name(adapter, name);
    start_generation(chat);
}

static void resolved(void *self, void *arg, claas_message_t *reply)
{
    struct sampler *sampler = self;
    struct chat *chat = arg;
    const char *lora_id = "", *directory = "", *uid = "";
    bool trained = false;
    int64_t version = 0;
    int rc;

    chat->ask = 0;
    if (reply->error) {
        int code = reply->error;

        if (code == CLAAS_ERR_NOT_FOUND) /* OpenAI's sentence */
            claas_fail(code, "The model `%s` does not exist.", chat->params.model);
        else
            claas_fail(code, "%s", reply->error_text);
        chat_fail(chat, code, claas_error_text());
        return;
    }
    claas_json_get_string(reply->body, "lora_id", &lora_id);
    claas_json_get_string(reply->body, "directory", &directory);
    claas_json_get_string(reply->body, "uid", &uid);
    claas_json_get_bool(reply->body, "trained", &trained);
    claas_json_get_int(reply->body, "version", 0, 1000000000, &version);
    snprintf(chat->lora_id, sizeof(chat->lora_id), "%s", lora_id);
    chat->version = (int)version;
    if (!trained) { /* B = 0: exactly the base's answers, without the adapter's arithmetic */
        start_generation(chat);
        return;
    }
    rc = adapter_cache_get(sampler->adapters, uid, (int)version, directory, adapter_ready, chat);
    if (rc < 0)
        chat_fail(chat, rc, claas_error_text());
}

static bool is_base_name(const struct sampler *sampler, const char *name)
{
    return !name || name[0] == '\0' || strcmp(name, "base") == 0 || strcmp(name, "default") == 0 ||
           strcmp(name, claas_model_name(sampler->model)) == 0;
}

static int resolve(struct chat *chat)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "name", chat->params.model);
    return claas_actor_ask(chat->sampler->actor,
                           &(struct claas_ask){
                               .to = "storage",
                               .type = CLAAS_MSG_ADAPTER_RESOLVE,
                               .body = body,
                               .timeout_ms = RESOLVE_TIMEOUT_MS,
                               .principal = chat->reply_to.principal,
                               .reply = resolved,
                               .arg = chat,
                           },
                           &chat->ask);
}

int chat_start(struct sampler *sampler, claas_message_t *message)
{
    struct chat *chat = CLAAS_NEW(struct chat);
    char hex[25];
    int rc;

    if (!chat)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    chat->sampler = sampler;
    chat->reply_to = message->reply_to;
    chat->started_ns = claas_clock_ns();
    chat->body = CLAAS_TAKE(message->body);
    message->body = cJSON_CreateObject();
    chat->next = sampler->chats;
    sampler->chats = chat;
    rc = chat_params_read(sampler->config, chat->body, &chat->params);
    if (rc == 0) {
        claas_random_hex(hex, 12);
        snprintf(chat->id, sizeof(chat->id), "%s-%s", chat->params.messages ? "chatcmpl" : "cmpl",
                 hex);
        if (!is_base_name(sampler, chat->params.model))
            rc = resolve(chat);
        else
            start_generation(chat); /* answers its own failures and frees the chat then */
    }
    if (rc < 0) {
        chat_free(chat);
        return rc;
    }
    claas_metric_add(CLAAS_METRIC_CHAT_REQUESTS, 1);
    return 0;
}
