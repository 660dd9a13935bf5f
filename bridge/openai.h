/* OpenAI's chat and completion requests: parameters in, answers out. Inner header of
 * openai_*.c. */
#ifndef CLAAS_BRIDGE_OPENAI_H
#define CLAAS_BRIDGE_OPENAI_H

#include "claas/message.h"

#define OPENAI_CHOICES_MAX 16

struct request;

/* A chat or completion under way: request->state. */
struct openai_call {
    bool chat; /* else a text completion */
    bool stream, include_usage, logprobs;
    int64_t created; /* Unix seconds, the same in every chunk */
    char id[65];
    char model[257]; /* as asked */
    struct {
        bool begun, finished; /* role chunk sent, finish chunk sent */
        size_t characters;    /* so far: text_offset of completions' log-probs */
    } choices[OPENAI_CHOICES_MAX];
};

/* The CHAT message of a request body. When the body is faulty the request is answered and NULL
 * comes back. */
cJSON *openai_chat_body(struct request *request, const cJSON *json, struct openai_call *call);
cJSON *openai_completion_body(struct request *request, const cJSON *json, struct openai_call *call);
/* The text of a message's content as the Python system reads it: null is "", a list the joined
 * texts of its parts, an object its text. New string, NULL when out of memory. */
char *openai_content_text(const cJSON *content);

/* --- answers (openai_answer.c) --- */
/* The whole answer from CHAT's reply, which must outlive it: it lends the log-probs. */
cJSON *openai_answer(const struct openai_call *call, const cJSON *reply);
cJSON *openai_usage(const cJSON *reply);
/* One chunk with an empty list of choices. */
cJSON *openai_chunk(const struct openai_call *call);
/* Log-prob entries in the call's form (chat, which lends them, or completion); NULL entries give
 * null. */
cJSON *openai_logprobs(const struct openai_call *call, const cJSON *entries, size_t offset);

/* --- the stream (openai_stream.c) --- */
/* Called for PROGRESS and REP of a streaming call. */
int openai_stream(struct request *request, claas_message_t *reply, void *arg);

#endif
