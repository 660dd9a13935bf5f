/* POST /v1/chat/completions and /v1/completions. */
#include <stdlib.h>

#include "claas/config.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "openai.h"
#include "request.h"

static int answered(struct request *request, claas_message_t *reply, void *arg)
{
    (void)arg;
    if (reply->kind != CLAAS_KIND_PROGRESS)
        request_answer_json(request, MHD_HTTP_OK, openai_answer(request->state, reply->body));
    return 0;
}

static int start(struct request *request,
                 cJSON *read(struct request *, const cJSON *, struct openai_call *))
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    struct openai_call *call = CLAAS_NEW(struct openai_call);
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;

    if (!call)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    request->state = call;
    request->state_free = free;
    if (request_json(request, &json) < 0)
        return 0;
    body = read(request, json, call);
    if (!body || request_take_share(request, call->model) < 0) /* answered */
        return 0;
    return request_ask(request,
                       &(struct request_ask){
                           .to = "sampler",
                           .type = CLAAS_MSG_CHAT,
                           .body = CLAAS_TAKE(body),
                           .timeout_ms = claas_config_int(request->server->config, "chat.timeout"),
                           .reply = call->stream ? openai_stream : answered,
                       });
}

int route_chat(struct request *request)
{
    return start(request, openai_chat_body);
}

int route_completions(struct request *request)
{
    return start(request, openai_completion_body);
}
