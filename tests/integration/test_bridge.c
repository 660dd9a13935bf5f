/* The bridge before scripted actors: every route, its answers and its errors. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bridge_fakes.h"
#include "claas/clock.h"
#include "claas/mem.h"
#include "http_probe.h"

static struct fake_server server;

/* --- helpers --- */

static const cJSON *at(const cJSON *json, const char *path)
{
    char key[64];

    while (json && *path) {
        size_t length = strcspn(path, ".");

        snprintf(key, sizeof(key), "%.*s", (int)length, path);
        json = cJSON_IsArray(json) ? cJSON_GetArrayItem(json, atoi(key))
                                   : cJSON_GetObjectItemCaseSensitive(json, key);
        path += length + (path[length] == '.');
    }
    return json;
}

static void check_text(const cJSON *json, const char *path, const char *expected)
{
    const cJSON *value = at(json, path);

    if (!cJSON_IsString(value)) {
        CLAAS_AUTO_FREE char *printed = cJSON_PrintUnformatted(json);

        fail_msg("no text at %s in %s", path, printed);
    }
    assert_string_equal(value->valuestring, expected);
}

static void check_number(const cJSON *json, const char *path, double expected)
{
    const cJSON *value = at(json, path);

    if (!cJSON_IsNumber(value) || !(value->valuedouble == expected)) {
        CLAAS_AUTO_FREE char *printed = cJSON_PrintUnformatted(json);

        fail_msg("not %g at %s in %s", expected, path, printed);
    }
}

static cJSON *ask(const char *method, const char *path, const char *body, int status)
{
    return http_json(server.port, method, path, body, status);
}

static void check_detail(const char *method, const char *path, const char *body, int status,
                         const char *detail)
{
    cJSON *json = ask(method, path, body, status);

    check_text(json, "detail", detail);
    cJSON_Delete(json);
}

/* OpenAI's shape. */
static void check_openai_error(const char *path, const char *body, int status, const char *part,
                               const char *code)
{
    cJSON *json = ask(body ? "POST" : "GET", path, body, status);
    const cJSON *message = at(json, "error.message");

    assert_true(cJSON_IsString(message));
    if (!strstr(message->valuestring, part))
        fail_msg("'%s' lacks '%s'", message->valuestring, part);
    assert_true(cJSON_IsString(at(json, "error.type")));
    assert_non_null(at(json, "error.param"));
    if (code)
        check_text(json, "error.code", code);
    else
        assert_true(cJSON_IsNull(at(json, "error.code")));
    cJSON_Delete(json);
}

static void check_status(const char *method, const char *path, const char *headers,
                         const char *body, int status)
{
    struct answer answer;

    http_ask(server.port, method, path, headers, body, &answer);
    if (answer.status != status)
        fail_msg("%s %s: %d instead of %d: %s", method, path, answer.status, status, answer.body);
    answer_done(&answer);
}

/* --- basics --- */

static void test_root(void **state)
{
    char value[128];
    struct answer answer;
    cJSON *json = ask("GET", "/", NULL, 200);

    (void)state;
    check_text(json, "name", "CLaaS API");
    cJSON_Delete(json);
    http_ask(server.port, "GET", "/docs", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    assert_non_null(strstr(answer.body, "/v1/feedback"));
    assert_int_equal(strlen(answer_header(&answer, "x-request-id", value, sizeof(value))), 32);
    answer_done(&answer);
}

static void test_unknown_paths_and_methods(void **state)
{
    char value[128];
    struct answer answer;

    (void)state;
    check_detail("GET", "/nope", NULL, 404, "Not Found");
    check_detail("GET", "/v1/distill", NULL, 404, "Not Found");
    check_openai_error("/v1/chat/nope", "{}", 404, "Not Found", "unknown_url");
    http_ask(server.port, "PUT", "/v1/lora", "", "x", &answer);
    assert_int_equal(answer.status, 405);
    assert_string_equal(answer_header(&answer, "Allow", value, sizeof(value)), "GET, HEAD, DELETE");
    assert_non_null(answer_header(&answer, "x-request-id", value, sizeof(value)));
    answer_done(&answer);
    http_ask(server.port, "OPTIONS", "/v1/feedback", "", NULL, &answer);
    assert_int_equal(answer.status, 204);
    assert_string_equal(answer_header(&answer, "Allow", value, sizeof(value)), "POST");
    answer_done(&answer);
    http_ask(server.port, "HEAD", "/", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    assert_true(atoi(answer_header(&answer, "Content-Length", value, sizeof(value))) > 50);
    answer_done(&answer);
}

static void test_health(void **state)
{
    cJSON *json = ask("GET", "/v1/health", NULL, 200);

    (void)state;
    check_text(json, "status", "healthy");
    check_text(json, "worker.status", "healthy");
    assert_true(cJSON_IsNull(at(json, "worker.error")));
    check_text(json, "actors.storage.status", "healthy");
    check_text(json, "actors.sampler.actor", "sampler");
    check_text(json, "model.device.name", "fake");
    cJSON_Delete(json);
    json = ask("GET", "/health", NULL, 200);
    cJSON_Delete(json);
}

static void test_metrics(void **state)
{
    char value[128];
    struct answer answer;

    (void)state;
    http_ask(server.port, "GET", "/metrics", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    assert_string_equal(answer_header(&answer, "Content-Type", value, sizeof(value)),
                        "text/plain; version=0.0.4; charset=utf-8");
    assert_non_null(strstr(answer.body, "claas_http_requests_total"));
    answer_done(&answer);
}

/* --- chat --- */

static cJSON *echo(const char *path, const char *body)
{
    cJSON *json = ask("POST", path, body, 200);
    const cJSON *text = at(json, "choices.0.message.content");
    cJSON *echoed;

    if (!text)
        text = at(json, "choices.0.text");
    assert_true(cJSON_IsString(text));
    echoed = cJSON_Parse(text->valuestring);
    cJSON_Delete(json);
    return echoed;
}

static void test_chat(void **state)
{
    cJSON *json = ask("POST", "/v1/chat/completions",
                      "{\"model\":\"me/x\",\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],"
                      "\"n\":2,\"unknown\":{\"a\":1}}",
                      200);

    (void)state;
    check_text(json, "id", "chatcmpl-0123456789ab");
    check_text(json, "object", "chat.completion");
    check_text(json, "model", "me/x");
    check_text(json, "choices.0.message.role", "assistant");
    check_text(json, "choices.0.message.content", "Hi there");
    check_text(json, "choices.0.finish_reason", "stop");
    assert_true(cJSON_IsNull(at(json, "choices.0.logprobs")));
    check_text(json, "choices.1.finish_reason", "length");
    check_number(json, "usage.total_tokens", 10);
    check_number(json, "usage.prompt_tokens_details.cached_tokens", 2);
    check_text(json, "adapter.lora_id", "me/x");
    check_number(json, "adapter.version", 4);
    cJSON_Delete(json);
}

static void test_chat_parameters(void **state)
{
    cJSON *json =
        echo("/v1/chat/completions",
             "{\"messages\":[{\"role\":\"developer\",\"content\":null},{\"role\":\"user\","
             "\"name\":\"x\",\"content\":[{\"type\":\"text\",\"text\":\"echo\"}]}],"
             "\"max_tokens\":5,\"max_completion_tokens\":6,\"temperature\":0,"
             "\"top_p\":0.5,\"top_k\":-1,\"seed\":42,\"stop\":\"END\",\"logprobs\":true,"
             "\"stream\":false}");

    (void)state;
    assert_null(at(json, "model"));
    check_text(json, "messages.0.role", "system");
    check_text(json, "messages.0.content", "");
    check_text(json, "messages.1.content", "echo");
    assert_null(at(json, "messages.1.name"));
    check_number(json, "max_tokens", 6);
    check_number(json, "temperature", 0);
    check_number(json, "top_p", 0.5);
    assert_null(at(json, "top_k"));
    check_number(json, "seed", 42);
    check_text(json, "stop.0", "END");
    check_number(json, "top_logprobs", 1);
    cJSON_Delete(json);
    json =
        echo("/v1/chat/completions", "{\"model\":\"base\",\"messages\":[{\"role\":\"assistant\"},"
                                     "{\"role\":\"user\",\"content\":\"echo\"}],"
                                     "\"stop\":[\"a\",\"b\"],\"top_k\":3,\"top_logprobs\":4}");
    check_text(json, "messages.0.content", "");
    check_text(json, "stop.1", "b");
    check_number(json, "top_k", 3);
    assert_null(at(json, "logprobs"));
    assert_null(at(json, "top_logprobs"));
    cJSON_Delete(json);
}

static void test_chat_logprobs(void **state)
{
    cJSON *json = ask("POST", "/v1/chat/completions",
                      "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"logprobs\":true,"
                      "\"top_logprobs\":1}",
                      200);

    (void)state;
    check_text(json, "choices.0.logprobs.content.0.token", "Hi");
    check_number(json, "choices.0.logprobs.content.0.top_logprobs.0.logprob", -0.5);
    cJSON_Delete(json);
    json = ask("POST", "/v1/completions", "{\"prompt\":\"hi\",\"logprobs\":1}", 200);
    check_text(json, "object", "text_completion");
    check_text(json, "choices.0.text", "Hi there");
    check_text(json, "choices.0.logprobs.tokens.0", "Hi");
    check_number(json, "choices.0.logprobs.token_logprobs.0", -0.5);
    check_number(json, "choices.0.logprobs.top_logprobs.0.Hi", -0.5);
    check_number(json, "choices.0.logprobs.text_offset.0", 0);
    cJSON_Delete(json);
    json = echo("/v1/completions", "{\"prompt\":[\"echo\"],\"stop\":null}");
    check_text(json, "prompt", "echo");
    cJSON_Delete(json);
}

#define CHAT(text) "{\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]}"

static void test_chat_errors(void **state)
{
    static const char path[] = "/v1/chat/completions";

    (void)state;
    check_openai_error(path, "{\"messages\":[{]}", 400, "JSON line 1, column 16", NULL);
    check_openai_error(path, "[]", 400, "JSON object", NULL);
    check_openai_error(path, "", 400, "JSON", NULL);
    check_openai_error(path, "{}", 400, "messages: Field required", "missing_required_parameter");
    check_openai_error(path, "{\"messages\":[]}", 400, "messages: List should have", NULL);
    check_openai_error(path, "{\"messages\":[7]}", 400, "messages.0: Input", NULL);
    check_openai_error(path, "{\"messages\":[{\"content\":\"x\"}]}", 400, "messages.0.role: Field",
                       "missing_required_parameter");
    check_openai_error(path, "{\"messages\":[{\"role\":\"king\",\"content\":\"x\"}]}", 400,
                       "messages.0.role: Input should be", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\"}],\"temperature\":3}", 400,
                       "temperature: Input should be less", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\"}],\"n\":0}", 400, "n: Input", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\"}],\"max_tokens\":1.5}", 400,
                       "max_tokens: Input should be a valid integer", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\"}],\"stop\":[\"\"]}", 400,
                       "stop: ", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}", 400,
                       "JSON", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}", 400,
                       "JSON", NULL);
    check_openai_error(path, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\\u0000\"}]}", 400,
                       "JSON", NULL);
    check_openai_error(path,
                       "{\"model\":\"nope\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}",
                       404, "nope", "model_not_found");
    check_openai_error(path, CHAT("long"), 400, "9000", "context_length_exceeded");
    check_openai_error(path, CHAT("busy"), 503, "too many", "overloaded");
    check_openai_error(path, CHAT("deadline"), 504, "late", "timeout");
    check_openai_error("/v1/completions", "{}", 400, "prompt: Field required",
                       "missing_required_parameter");
    check_openai_error("/v1/completions", "{\"prompt\":[\"a\",\"b\"]}", 400, "prompt: ", NULL);
    check_openai_error("/v1/completions", "{\"prompt\":\"a\",\"logprobs\":99}", 400,
                       "logprobs: ", NULL);
}

/* The field that OpenAI's clients point at. */
static void check_openai_param(const char *path, const char *body, int status, const char *param)
{
    cJSON *json = ask("POST", path, body, status);

    check_text(json, "error.param", param);
    cJSON_Delete(json);
}

static void test_error_params(void **state)
{
    static const char chat[] = "/v1/chat/completions", text[] = "/v1/completions";

    (void)state;
    check_openai_param(chat, CHAT("long"), 400, "messages");
    check_openai_param(text, "{\"prompt\":\"long\"}", 400, "prompt");
    check_openai_param(text, "{\"prompt\":\"a\",\"model\":\"nope\"}", 404, "model");
}

static void test_content_types(void **state)
{
    static const char path[] = "/v1/chat/completions";

    (void)state;
    check_status("POST", path, "", CHAT("hi"), 200);
    check_status("POST", path, "Content-Type: application/json; charset=utf-8\r\n", CHAT("hi"),
                 200);
    check_status("POST", path, "Content-Type: text/plain\r\n", CHAT("hi"), 415);
    check_status("POST", path, "Content-Type: application/jsonx\r\n", CHAT("hi"), 415);
    check_status("POST", path, "Sec-Fetch-Site: cross-site\r\n", CHAT("hi"), 403);
    check_status("POST", path, "Sec-Fetch-Site: same-site\r\n", CHAT("hi"), 403);
    check_status("POST", path, "Sec-Fetch-Site: same-origin\r\n", CHAT("hi"), 200);
}

static void test_overloaded_says_when(void **state)
{
    char value[64];
    struct answer answer;

    (void)state;
    http_ask(server.port, "POST", "/v1/chat/completions", "", CHAT("busy"), &answer);
    assert_int_equal(answer.status, 503);
    assert_string_equal(answer_header(&answer, "Retry-After", value, sizeof(value)), "2");
    answer_done(&answer);
}

/* --- streams --- */

static void stream(const char *path, const char *body, struct answer *answer)
{
    http_ask(server.port, "POST", path, "Content-Type: application/json\r\n", body, answer);
}

static void test_chat_stream(void **state)
{
    static const char expected[] =
        "data: "
        "{\"id\":\"chatcmpl-0123456789ab\",\"object\":\"chat.completion.chunk\",\"created\":0,"
        "\"model\":\"default\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\","
        "\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n"
        "data: "
        "{\"id\":\"chatcmpl-0123456789ab\",\"object\":\"chat.completion.chunk\",\"created\":0,"
        "\"model\":\"default\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hi\"},"
        "\"logprobs\":null,\"finish_reason\":null}]}\n\n"
        "data: "
        "{\"id\":\"chatcmpl-0123456789ab\",\"object\":\"chat.completion.chunk\",\"created\":0,"
        "\"model\":\"default\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" there\"},"
        "\"logprobs\":null,\"finish_reason\":null}]}\n\n"
        "data: "
        "{\"id\":\"chatcmpl-0123456789ab\",\"object\":\"chat.completion.chunk\",\"created\":0,"
        "\"model\":\"default\",\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,"
        "\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
    struct answer answer;
    char value[64];
    struct claas_buf clean;

    (void)state;
    stream("/v1/chat/completions",
           "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":true}", &answer);
    assert_int_equal(answer.status, 200);
    assert_string_equal(answer_header(&answer, "Content-Type", value, sizeof(value)),
                        "text/event-stream; charset=utf-8");
    assert_string_equal(answer_header(&answer, "Cache-Control", value, sizeof(value)), "no-cache");
    claas_buf_init(&clean, 1 << 20);
    for (const char *c = answer.body; *c;) { /* "created" is the time: the same everywhere */
        if (strncmp(c, "\"created\":", 10) == 0) {
            claas_buf_add_text(&clean, "\"created\":0");
            c += 10 + strspn(c + 10, "0123456789");
        } else {
            claas_buf_add(&clean, c++, 1);
        }
    }
    assert_string_equal(clean.data, expected);
    claas_buf_done(&clean);
    answer_done(&answer);
}

static int count(const char *text, const char *part)
{
    int found = 0;

    for (; (text = strstr(text, part)); text += strlen(part))
        found++;
    return found;
}

static void test_chat_stream_options(void **state)
{
    struct answer answer;

    (void)state;
    stream("/v1/chat/completions",
           "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"stream\":true,\"n\":2,"
           "\"logprobs\":true,\"stream_options\":{\"include_usage\":true}}",
           &answer);
    assert_int_equal(count(answer.body, "\"role\":\"assistant\""), 2);
    assert_int_equal(count(answer.body, "\"index\":1"), 4);
    assert_int_equal(count(answer.body, "\"finish_reason\":\"length\""), 1);
    assert_int_equal(count(answer.body, "\"usage\":null"), 8);
    assert_int_equal(count(answer.body, "\"choices\":[],\"usage\":{\"prompt_tokens\":7"), 1);
    assert_int_equal(count(answer.body, "\"logprobs\":{\"content\":[{\"token\":\"Hi\""), 2);
    answer_done(&answer);
    stream("/v1/chat/completions",
           "{\"messages\":[{\"role\":\"user\",\"content\":\"no pieces\"}],\"stream\":true}",
           &answer);
    assert_int_equal(count(answer.body, "\"content\":\"Hi there\""), 1);
    assert_int_equal(count(answer.body, "\"finish_reason\":\"stop\""), 1);
    answer_done(&answer);
    stream("/v1/completions", "{\"prompt\":\"hi\",\"stream\":true,\"logprobs\":0}", &answer);
    assert_int_equal(count(answer.body, "\"object\":\"text_completion\""), 3);
    assert_int_equal(count(answer.body, "\"text\":\"Hi\""), 1);
    assert_int_equal(count(answer.body, "\"text_offset\":[0]"), 1);
    answer_done(&answer);
}

static void test_chat_stream_errors(void **state)
{
    struct answer answer;

    (void)state;
    stream("/v1/chat/completions",
           "{\"model\":\"nope\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],"
           "\"stream\":true}",
           &answer);
    assert_int_equal(answer.status, 404);
    answer_done(&answer);
    stream("/v1/chat/completions",
           "{\"messages\":[{\"role\":\"user\",\"content\":\"piece then error\"}],\"stream\":true}",
           &answer);
    assert_int_equal(answer.status, 200);
    assert_int_equal(count(answer.body,
                           "data: {\"error\":{\"message\":\"the device failed\",\"type\":"
                           "\"server_error\",\"param\":null,\"code\":null}}\n\n"),
                     1);
    assert_int_equal(count(answer.body, "[DONE]"), 0);
    answer_done(&answer);
}

/* --- models --- */

static void test_models(void **state)
{
    cJSON *json = ask("GET", "/v1/models", NULL, 200);

    (void)state;
    check_text(json, "object", "list");
    check_text(json, "data.0.id", "base");
    check_text(json, "data.1.id", "Tiny");
    check_text(json, "data.2.id", "me/x");
    check_text(json, "data.2.owned_by", "claas");
    check_number(json, "data.2.created", 1700000000);
    cJSON_Delete(json);
    json = ask("GET", "/v1/models/Tiny", NULL, 200);
    check_text(json, "object", "model");
    cJSON_Delete(json);
    json = ask("GET", "/v1/models/me/x@5", NULL, 200);
    check_text(json, "id", "me/x@5");
    check_number(json, "created", 1700000000);
    cJSON_Delete(json);
    json = ask("GET", "/v1/models/me%2Fx", NULL, 200);
    check_text(json, "id", "me/x");
    cJSON_Delete(json);
    check_openai_error("/v1/models/nope", NULL, 404, "nope", "model_not_found");
}

/* --- adapters --- */

static void test_lora_init(void **state)
{
    cJSON *json = ask("POST", "/v1/lora/init", "{\"lora_id\":\"me/new\",\"lora_r\":8}", 200);

    (void)state;
    check_text(json, "lora_id", "me/new-init");
    cJSON_Delete(json);
    json = ask("POST", "/v1/lora/init", "{\"lora_r\":3,\"lora_alpha\":300}", 422);
    check_text(json, "detail.0.loc.0", "body");
    check_text(json, "detail.0.loc.1", "lora_id");
    check_text(json, "detail.0.type", "missing");
    check_text(json, "detail.1.type", "greater_than_equal");
    check_text(json, "detail.2.type", "less_than_equal");
    cJSON_Delete(json);
    check_detail("POST", "/v1/lora/init", "{\"lora_id\":\"me/exists\"}", 409,
                 "LoRA already exists: me/exists");
    check_detail("POST", "/v1/lora/init", "{\"lora_id\":\"me/denied\"}", 403,
                 "base_model 'x' is not allowed for initialization. Allowed models: Tiny, base");
    check_detail("POST", "/v1/lora/init", "{\"lora_id\":\"me/broken\"}", 500,
                 "LoRA initialization failed: disk");
    json = ask("POST", "/v1/lora/init", "{\"lora_id\":}", 400);
    assert_non_null(strstr(at(json, "detail")->valuestring, "line 1, column 12"));
    cJSON_Delete(json);
}

static void test_lora_routes(void **state)
{
    cJSON *json = ask("GET", "/v1/lora?prefix=me", NULL, 200);

    (void)state;
    check_text(json, "loras.0", "me/x");
    check_text(json, "loras.1", "me/x-init");
    check_text(json, "loras.2", "me/x-latest");
    check_number(json, "adapters.0.current", 5);
    cJSON_Delete(json);
    json = ask("DELETE", "/v1/lora?lora_id=me/x", NULL, 200);
    assert_true(cJSON_IsTrue(at(json, "deleted")));
    cJSON_Delete(json);
    json = ask("DELETE", "/v1/lora", NULL, 422);
    check_text(json, "detail.0.loc.0", "query");
    cJSON_Delete(json);
    json = ask("GET", "/v1/lora/versions?lora_id=me%2Fx", NULL, 200);
    check_number(json, "current", 1);
    check_number(json, "versions.1.parent", 0);
    cJSON_Delete(json);
    check_detail("GET", "/v1/lora/versions?lora_id=me/none", NULL, 404, "LoRA not found: me/none");
    check_detail("GET", "/v1/lora/versions?lora_id=../x", NULL, 400,
                 "Invalid lora_id: path traversal detected in '../x'");
    check_detail("GET", "/v1/lora/versions?lora_id=%ff", NULL, 400, "lora_id is not UTF-8");
    json = ask("POST", "/v1/lora/rollback", "{\"lora_id\":\"me/x\",\"version\":0}", 200);
    check_text(json, "lora_id", "me/x");
    check_number(json, "version", 0);
    cJSON_Delete(json);
    json = ask("POST", "/v1/lora/rollback", "{\"lora_id\":\"me/x\"}", 422);
    cJSON_Delete(json);
    json = ask("GET", "/v1/lora/feedback?lora_id=me/x", NULL, 200);
    check_text(json, "feedback.0.text", "be brief");
    cJSON_Delete(json);
    json = ask("DELETE", "/v1/lora/feedback?lora_id=me/x&id=fb-1", NULL, 200);
    check_number(json, "withdrawn", 1);
    cJSON_Delete(json);
}

static void test_lora_export(void **state)
{
    char value[128];
    struct answer answer;

    (void)state;
    http_ask(server.port, "GET", "/v1/lora/export?lora_id=me/x-init", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    assert_string_equal(answer.body, "PK zip");
    assert_string_equal(answer_header(&answer, "Content-Type", value, sizeof(value)),
                        "application/zip");
    assert_string_equal(answer_header(&answer, "Content-Disposition", value, sizeof(value)),
                        "attachment; filename=\"me__x-init.zip\"");
    answer_done(&answer);
    check_detail("GET", "/v1/lora/export?lora_id=me/none", NULL, 404, "LoRA not found: me/none");
    /* The fake has no optimizer state. */
    check_detail("GET", "/v1/lora/export?lora_id=me/x&optimizer=true", NULL, 404,
                 "the optimizer's state is gone");
    http_ask(server.port, "GET", "/v1/lora/export?lora_id=me/x&optimizer=0", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    answer_done(&answer);
    http_ask(server.port, "GET", "/v1/lora/export?lora_id=me/x&optimizer=yes", "", NULL, &answer);
    assert_int_equal(answer.status, 422);
    assert_non_null(strstr(answer.body, "\"optimizer\""));
    answer_done(&answer);
}

static void test_lora_import(void **state)
{
    struct answer answer;

    (void)state;
    http_ask(server.port, "POST", "/v1/lora/import?lora_id=me/new",
             "Content-Type: application/zip\r\n", "0123456789", &answer);
    assert_int_equal(answer.status, 200);
    assert_string_equal(answer.body, "{\"lora_id\":\"me/new\",\"version\":10}");
    answer_done(&answer);
    check_status("POST", "/v1/lora/import?lora_id=me/new", "", "", 400);
    check_status("POST", "/v1/lora/import?lora_id=me/new", "Content-Type: text/plain\r\n", "x",
                 415);
    check_status("POST", "/v1/lora/import", "", "x", 422);
}

/* --- feedback --- */

#define ITEM(text)  "{\"lora_id\":\"me/x\",\"response_id\":\"chatcmpl-1\",\"feedback\":\"" text "\"}"
#define BATCH(text) "{\"requests\":[" ITEM(text) "]}"

static void test_feedback_done(void **state)
{
    cJSON *json = ask("POST", "/v1/feedback", BATCH("ok"), 200);

    (void)state;
    check_text(json, "status", "ok");
    assert_int_equal(strlen(at(json, "request_id")->valuestring), 32);
    check_text(json, "lora_id", "me/x");
    check_text(json, "distill_result.lora_id", "me/x");
    check_number(json, "distill_result.metadata.total_loss", 0.25);
    check_number(json, "distill_result.metadata.steps.1.step", 2);
    assert_true(cJSON_IsFalse(at(json, "vllm.slept")));
    assert_true(cJSON_IsFalse(at(json, "vllm.woke")));
    check_text(json, "feedback_log_path", "");
    check_number(json, "timing_ms.distill", 1234);
    check_number(json, "timing_ms.save", 500);
    check_number(json, "timing_ms.sleep", 0);
    check_number(json, "batch_size", 1);
    check_text(json, "job_id", "job-ok");
    check_number(json, "version", 5);
    assert_true(cJSON_IsNull(at(json, "reason")));
    cJSON_Delete(json);
    json = ask("POST", "/v1/feedback", ITEM("ok"), 200); /* the older body */
    check_text(json, "job_id", "job-ok");
    cJSON_Delete(json);
}

static void test_feedback_other_ends(void **state)
{
    cJSON *json = ask("POST", "/v1/feedback", BATCH("reject"), 200);

    (void)state;
    check_text(json, "status", "rejected");
    assert_true(cJSON_IsNull(at(json, "version")));
    assert_true(cJSON_IsNull(at(json, "distill_result")));
    check_text(json, "reason", "KL to base 2.1");
    cJSON_Delete(json);
    json = ask("POST", "/v1/feedback", BATCH("fail"), 500);
    check_text(json, "detail", "Feedback update failed in phase 'distill': the device failed");
    check_text(json, "job_id", "job-fail");
    cJSON_Delete(json);
    json = ask("POST", "/v1/feedback", BATCH("cancel"), 409);
    cJSON_Delete(json);
    check_detail("POST", "/v1/feedback", BATCH("unknown response"), 404,
                 "No cached completion for content_hash=0123…");
    check_detail("POST", "/v1/feedback", BATCH("bad training"), 422,
                 "invalid training config: alpha must be within [0, 1]");
}

static void test_feedback_async(void **state)
{
    char value[128];
    struct answer answer;
    cJSON *json =
        ask("POST", "/v1/feedback", "{\"requests\":[" ITEM("hang") "],\"wait\":false}", 202);
    int64_t start;

    (void)state;
    check_text(json, "job_id", "job-hang");
    cJSON_Delete(json);
    http_ask(server.port, "POST", "/v1/feedback", "Prefer: wait=5, respond-async\r\n",
             BATCH("hang"), &answer);
    assert_int_equal(answer.status, 202);
    assert_string_equal(answer_header(&answer, "Preference-Applied", value, sizeof(value)),
                        "respond-async");
    assert_string_equal(answer_header(&answer, "Location", value, sizeof(value)),
                        "/v1/jobs/job-hang");
    answer_done(&answer);
    start = claas_clock_ms(); /* feedback.wait is 500 ms in these tests */
    json = ask("POST", "/v1/feedback", BATCH("hang"), 202);
    check_text(json, "job_id", "job-hang");
    assert_true(claas_clock_ms() - start >= 450);
    cJSON_Delete(json);
    http_ask(server.port, "POST", "/v1/feedback",
             "Idempotency-Key: key-1\r\nPrefer: respond-async\r\n", BATCH("hang"), &answer);
    assert_string_equal(answer.body, "{\"job_id\":\"job-key-1\"}");
    answer_done(&answer);
    check_status("POST", "/v1/feedback", "Idempotency-Key: \r\n", BATCH("ok"), 400);
}

static void test_feedback_schema(void **state)
{
    cJSON *json = ask("POST", "/v1/feedback", "{}", 422);

    (void)state;
    check_text(json, "detail.0.loc.1", "requests");
    cJSON_Delete(json);
    json = ask("POST", "/v1/feedback", "{\"requests\":[]}", 422);
    check_text(json, "detail.0.type", "too_short");
    cJSON_Delete(json);
    json = ask(
        "POST", "/v1/feedback",
        "{\"requests\":[{\"lora_id\":\"me/x\",\"feedback\":\"\",\"training\":{\"alpha\":\"x\"}}],"
        "\"orchestration\":{\"sleep_level\":3}}",
        422);
    check_text(json, "detail.0.loc.1", "orchestration");
    check_text(json, "detail.1.loc.3", "feedback");
    check_number(json, "detail.1.loc.2", 0);
    check_text(json, "detail.2.loc.3", "response");
    check_text(json, "detail.3.loc.4", "alpha");
    cJSON_Delete(json);
    check_detail("POST", "/v1/feedback",
                 "{\"requests\":[" ITEM("ok") ",{\"lora_id\":\"me/y\",\"response\":\"r\","
                                              "\"feedback\":\"f\"}]}",
                 400, "all requests must use the same lora_id");
    check_detail("POST", "/v1/feedback",
                 "{\"requests\":[" ITEM("ok") ",{\"lora_id\":\"me/x\",\"response\":\"r\","
                                              "\"feedback\":\"f\",\"training\":{}}]}",
                 400, "all requests must use the same training config");
    json = ask("POST", "/v1/feedback",
               "{\"requests\":[{\"lora_id\":\"me/x\",\"response\":\"r\",\"feedback\":\"ok\","
               "\"training\":{\"alpha\":0.5}},{\"lora_id\":\"me/x\",\"response\":\"r\","
               "\"feedback\":\"f\",\"training\":{\"steps\":1}}]}",
               200);
    check_number(json, "batch_size", 2);
    cJSON_Delete(json);
}

/* --- jobs --- */

static void test_jobs(void **state)
{
    cJSON *json = ask("GET", "/v1/jobs?lora_id=me/x&state=done&limit=7&before=job-9", NULL, 200);

    (void)state;
    check_text(json, "jobs.0.lora_id", "me/x");
    check_text(json, "jobs.0.state", "done");
    check_number(json, "jobs.0.limit", 7);
    check_text(json, "jobs.0.before", "job-9");
    cJSON_Delete(json);
    json = ask("GET", "/v1/jobs?limit=0", NULL, 422);
    check_text(json, "detail.0.loc.1", "limit");
    cJSON_Delete(json);
    json = ask("GET", "/v1/jobs?state=odd", NULL, 422);
    check_text(json, "detail.0.loc.1", "state");
    cJSON_Delete(json);
    json = ask("GET", "/v1/jobs/job-ok", NULL, 200);
    check_text(json, "job_id", "job-ok");
    check_text(json, "transitions.0.state", "queued");
    cJSON_Delete(json);
    check_detail("GET", "/v1/jobs/job-none", NULL, 404, "job not found: job-none");
    json = ask("DELETE", "/v1/jobs/job-ok", NULL, 200);
    assert_true(cJSON_IsTrue(at(json, "cancelled")));
    cJSON_Delete(json);
}

static void test_job_events(void **state)
{
    struct answer answer;

    (void)state;
    http_ask(server.port, "GET", "/v1/jobs/job-ok/events", "", NULL, &answer);
    assert_int_equal(answer.status, 200);
    assert_int_equal(strncmp(answer.body, "id: 1\nevent: state\ndata: {", 25), 0);
    assert_int_equal(count(answer.body, "id: 2\nevent: step\ndata: {\"kind\":\"step\""), 1);
    assert_int_equal(count(answer.body, "event: job\ndata: {"), 1);
    answer_done(&answer);
    http_ask(server.port, "GET", "/v1/jobs/job-ok/events", "Last-Event-ID: 1\r\n", NULL, &answer);
    assert_int_equal(count(answer.body, "id: "), 1);
    answer_done(&answer);
    http_ask(server.port, "GET", "/v1/jobs/job-none/events", "", NULL, &answer);
    assert_int_equal(answer.status, 404);
    answer_done(&answer);
}

/* --- a server that goes down --- */

static void *stop_server(void *arg)
{
    fake_server_stop(arg);
    return NULL;
}

/* Waiting feedback is answered 202 while the server drains; a watcher's stream ends. */
static void test_drain(void **state)
{
    static const char *const settings[] = {"log.level=error", NULL};
    struct fake_server own;
    struct probe feedback, events, idle;
    struct answer answer;
    CLAAS_AUTO_FREE char *text = NULL;
    pthread_t thread;

    (void)state;
    fake_server_start(&own, settings);
    probe_open(&idle, own.port);
    probe_open(&feedback, own.port);
    text = claas_format(
        "POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n%s",
        strlen(BATCH("hang")), BATCH("hang"));
    probe_send(&feedback, text);
    probe_open(&events, own.port);
    probe_send(&events, "GET /v1/jobs/job-hang/events HTTP/1.1\r\nHost: localhost\r\n\r\n");
    probe_wait_for(&events, "event: step");
    fake_wait(&fake_held, 2);
    pthread_create(&thread, NULL, stop_server, &own);
    probe_read(&feedback, false, &answer);
    assert_int_equal(answer.status, 202);
    assert_string_equal(answer.body, "{\"job_id\":\"job-hang\"}");
    answer_done(&answer);
    assert_true(probe_closed(&feedback));
    assert_true(probe_closed(&events));
    assert_true(probe_closed(&idle));
    pthread_join(thread, NULL);
    probe_close(&feedback);
    probe_close(&events);
    probe_close(&idle);
}

static int start(void **state)
{
    static const char *const settings[] = {"feedback.wait=500ms", "log.level=error", NULL};

    (void)state;
    fake_server_start(&server, settings);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    fake_server_stop(&server);
    return 0;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_root),
        cmocka_unit_test(test_unknown_paths_and_methods),
        cmocka_unit_test(test_health),
        cmocka_unit_test(test_metrics),
        cmocka_unit_test(test_chat),
        cmocka_unit_test(test_chat_parameters),
        cmocka_unit_test(test_chat_logprobs),
        cmocka_unit_test(test_chat_errors),
        cmocka_unit_test(test_error_params),
        cmocka_unit_test(test_content_types),
        cmocka_unit_test(test_overloaded_says_when),
        cmocka_unit_test(test_chat_stream),
        cmocka_unit_test(test_chat_stream_options),
        cmocka_unit_test(test_chat_stream_errors),
        cmocka_unit_test(test_models),
        cmocka_unit_test(test_lora_init),
        cmocka_unit_test(test_lora_routes),
        cmocka_unit_test(test_lora_export),
        cmocka_unit_test(test_lora_import),
        cmocka_unit_test(test_feedback_done),
        cmocka_unit_test(test_feedback_other_ends),
        cmocka_unit_test(test_feedback_async),
        cmocka_unit_test(test_feedback_schema),
        cmocka_unit_test(test_jobs),
        cmocka_unit_test(test_job_events),
    };
    const struct CMUnitTest drain_tests[] = {cmocka_unit_test(test_drain)};
    int failed;

    signal(SIGPIPE, SIG_IGN);
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    failed = cmocka_run_group_tests(tests, start, stop);
    return failed + cmocka_run_group_tests(drain_tests, NULL, NULL);
}
