/* One chat in the sampler, from request to stored rollout. */
#ifndef CLAAS_SAMPLER_CHAT_H
#define CLAAS_SAMPLER_CHAT_H

#include "adapter_cache.h"
#include "sampler.h"
#include "text_stream.h"

#define CHAT_CHOICES_MAX 16
#define CHAT_STOPS_MAX   16

/* What a request asks for, checked and with defaults filled in. Strings are borrowed from the
 * request's body. */
struct chat_params {
    const char *model;
    const cJSON *messages; /* NULL for a text completion */
    const char *prompt;    /* NULL for a chat */
    int max_tokens;        /* 0 = what the context leaves */
    double temperature, top_p;
    int top_k, n, top_logprobs;
    uint64_t seed;
    bool logprobs, stream;
    const char *stops[CHAT_STOPS_MAX];
    size_t stop_count;
};
int chat_params_read(const claas_config_t *config, const cJSON *body, struct chat_params *ret);

/* One answer being made. */
struct choice {
    uint64_t request; /* id on the device, 0 before and after */
    int32_t *tokens;
    float *logprobs; /* [count], temperature 1 */
    size_t count, capacity;
    struct text_stream stream;
    cJSON *entries; /* log-probs not sent yet; without streaming, those of the whole answer */
    struct claas_buf visible;
    const char *finish_reason; /* NULL while it runs */
    int64_t last_token_ns;
};

struct sampler;

struct chat {
    struct chat *next;
    struct sampler *sampler;
    struct claas_reply_to reply_to;
    cJSON *body; /* the request, kept for messages and strings */
    struct chat_params params;
    char id[40];
    char lora_id[257]; /* empty for the base */
    int version;
    claas_adapter_t *adapter; /* NULL: base weights */
    int32_t *prompt;
    size_t prompt_count, cached_tokens;
    struct choice choices[CHAT_CHOICES_MAX];
    int running;  /* choices not finished */
    uint64_t ask; /* request to storage under way, 0 = none */
    int64_t started_ns;
};

struct sampler {
    claas_actor_t *actor;
    const claas_config_t *config;
    claas_device_t *device;
    claas_model_t *model;
    claas_device_client_t *client;
    struct adapter_cache *adapters;
    struct chat *chats;
    int64_t started_unix_s;
    bool draining;
};

/* Starts a chat for a request, whose body it takes; an error is the caller's to answer. */
int chat_start(struct sampler *sampler, claas_message_t *message);
/* Also when the requester went away: stops the generation and forgets the chat. */
void chat_free(struct chat *chat);
/* A TOKEN, FINISHED or FAILED event of one of the chat's choices; the chat may be gone
 * afterwards. */
void chat_event(struct chat *chat, struct choice *choice, const struct claas_device_event *event);

/* answer.c: replies and the stored rollout of a finished chat. */
cJSON *chat_logprob_entry(const claas_tokenizer_t *tokenizer,
                          const struct claas_device_event *event);
int chat_send_piece(struct chat *chat, struct choice *choice, bool last);
/* All choices have ended: stores the rollout, replies and frees the chat. */
void chat_finish(struct chat *chat);

#endif
