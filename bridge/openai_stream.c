/* A streamed answer: a chunk with the role, chunks with the text as it is made, one with the finish
 * reason, for each choice; then the usage if asked for, and [DONE]. The 200 is held back until the
 * first piece, so that whatever fails before it is a proper HTTP status. */
#include "openai.h"

#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "request.h"

/* `delta` (chat) or `text` (completion), and finish (may be NULL), of one choice. */
static int send_choice(struct request *request, int index, cJSON *delta, const char *text,
                       cJSON *logprobs, const char *finish)
{
    const struct openai_call *call = request->state;
    cJSON *chunk = openai_chunk(call);
    cJSON *choice = cJSON_CreateObject();

    claas_json_set_int(choice, "index", index);
    if (call->chat)
        claas_json_set(choice, "delta", delta);
    else
        claas_json_set_string(choice, "text", text);
    claas_json_set(choice, "logprobs", logprobs ? logprobs : cJSON_CreateNull());
    if (finish)
        claas_json_set_string(choice, "finish_reason", finish);
    else
        claas_json_set_null(choice, "finish_reason");
    cJSON_AddItemToArray((cJSON *)claas_json_get(chunk, "choices"), choice);
    return sse_send(request, NULL, -1, chunk);
}

static cJSON *delta_of(const struct openai_call *call, const char *role, const char *content)
{
    cJSON *delta;

    if (!call->chat)
        return NULL;
    delta = cJSON_CreateObject();
    if (role)
        claas_json_set_string(delta, "role", role);
    if (content)
        claas_json_set_string(delta, "content", content);
    return delta;
}

static size_t entries_characters(const cJSON *entries)
{
    const cJSON *entry;
    size_t count = 0;

    cJSON_ArrayForEach(entry, entries)
    {
        const char *token = "";

        claas_json_get_string(entry, "token", &token);
        for (; *token; token++)
            count += ((unsigned char)*token & 0xC0) != 0x80;
    }
    return count;
}

/* A piece of text of a choice, and its end if `finish` is given. */
static int send_piece(struct request *request, int index, const char *text, const cJSON *entries,
                      const char *finish)
{
    struct openai_call *call = request->state;
    int rc = 0;

    if (call->choices[index].finished)
        return 0;
    if (call->chat && !call->choices[index].begun)
        rc = send_choice(request, index, delta_of(call, "assistant", ""), NULL, NULL, NULL);
    call->choices[index].begun = true;
    if (!call->logprobs)
        entries = NULL;
    if (rc == 0 && (text[0] || cJSON_GetArraySize(entries) > 0)) {
        rc = send_choice(request, index, delta_of(call, NULL, text), text,
                         openai_logprobs(call, entries, call->choices[index].characters), NULL);
        call->choices[index].characters += entries_characters(entries);
    }
    if (rc == 0 && finish) {
        call->choices[index].finished = true;
        rc = send_choice(request, index, delta_of(call, NULL, NULL), "", NULL, finish);
    }
    return rc;
}

static int take_piece(struct request *request, const cJSON *body)
{
    struct openai_call *call = request->state;
    const char *id = "", *text = "", *finish = NULL;
    int64_t index = 0;
    int rc = sse_begin(request);

    claas_json_get_string(body, "id", &id);
    claas_json_get_string(body, "text", &text);
    claas_json_get_string(body, "finish_reason", &finish);
    claas_json_get_int(body, "choice", 0, OPENAI_CHOICES_MAX - 1, &index);
    claas_copy_text(call->id, sizeof(call->id), id);
    return rc < 0 ? rc
                  : send_piece(request, (int)index, text, claas_json_get(body, "logprobs"), finish);
}

static int send_usage(struct request *request, const cJSON *reply)
{
    const struct openai_call *call = request->state;
    cJSON *chunk;

    if (!call->include_usage)
        return 0;
    chunk = openai_chunk(call);
    claas_json_set(chunk, "usage", openai_usage(reply));
    return sse_send(request, NULL, -1, chunk);
}

/* The reply: choices that ended without a last piece get theirs now. */
static int finish_stream(struct request *request, const cJSON *reply)
{
    struct openai_call *call = request->state;
    const cJSON *choice;
    int rc = sse_begin(request);

    if (!call->id[0]) {
        const char *id = "";

        claas_json_get_string(reply, "id", &id);
        claas_copy_text(call->id, sizeof(call->id), id);
    }
    cJSON_ArrayForEach(choice, claas_json_get(reply, "choices"))
    {
        const char *text = "", *finish = "stop";
        int64_t index = 0;

        claas_json_get_int(choice, "index", 0, OPENAI_CHOICES_MAX - 1, &index);
        claas_json_get_string(choice, "finish_reason", &finish);
        if (!call->choices[index].begun)
            claas_json_get_string(choice, "text", &text);
        if (rc == 0)
            rc = send_piece(request, (int)index, text, NULL, finish);
    }
    if (rc == 0)
        rc = send_usage(request, reply);
    if (rc == 0)
        rc = sse_send_text(request, "[DONE]");
    if (rc == 0)
        sse_end(request);
    return rc;
}

int openai_stream(struct request *request, claas_message_t *reply, void *arg)
{
    (void)arg;
    if (reply->kind == CLAAS_KIND_PROGRESS)
        return take_piece(request, reply->body);
    return finish_stream(request, reply->body);
}
