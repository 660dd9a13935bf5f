/* A conversation with a model, answers streamed to stdout as they are made. */
#ifndef CLAAS_TOOLS_CONVERSATION_H
#define CLAAS_TOOLS_CONVERSATION_H

#include "http_client.h"

struct sampling {
    double temperature, top_p; /* < 0: the server's default */
    int64_t max_tokens;        /* 0: what the context leaves */
    int64_t seed;              /* < 0: random; else this for the first answer, then + 1 each */
};

struct conversation {
    struct http *http;
    const char *model;
    struct sampling sampling;
    cJSON *messages; /* [{role, content}] */
    char id[65];     /* of the last answer, the handle for feedback; "" if there is none */
    int64_t answers;
    bool plain; /* stdout is a terminal: control characters of an answer are left out */
};

/* `system` may be NULL. */
int conversation_begin(struct conversation *conversation, struct http *http, const char *model,
                       const char *system, const struct sampling *sampling);
void conversation_done(struct conversation *conversation);
/* Sends a user turn and prints the answer and a line end. After a failure the conversation is as
 * before. */
int conversation_ask(struct conversation *conversation, const char *text);
/* Takes the last question and answer out; the question, or NULL if there is none. Free it. */
char *conversation_take_back(struct conversation *conversation);
/* Forgets everything but the system message. */
void conversation_clear(struct conversation *conversation);

#endif
