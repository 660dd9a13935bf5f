/* HTTP for the verbs: see http_client.h. */
#include "http_client.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"
#include "sse_reader.h"

#define DEFAULT_URL       "http://127.0.0.1:8080"
#define ANSWER_MAX        (64 << 20)
#define ERROR_BODY_MAX    (1 << 20)
#define CONNECT_TIMEOUT_S 10L

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

void http_interruptible(void)
{
    /* Without SA_RESTART: a Ctrl-C at the prompt ends the read. */
    struct sigaction action = {.sa_handler = on_interrupt};

    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

bool http_take_interrupt(void)
{
    bool was = interrupted;

    interrupted = 0;
    return was;
}

/* --- opening ---------------------------------------------------------------------------------- */

/* A proxy of the environment is not for a server on this machine. */
static bool is_local(const char *url)
{
    static const char *const hosts[] = {"http://127.", "http://localhost", "http://[::1]"};

    for (size_t i = 0; i < CLAAS_COUNT(hosts); i++) {
        if (strncmp(url, hosts[i], strlen(hosts[i])) == 0)
            return true;
    }
    return false;
}

/* A scheme and a host. */
static bool is_address(const char *url)
{
    size_t scheme = strncmp(url, "http://", 7) == 0 ? 7 : strncmp(url, "https://", 8) == 0 ? 8 : 0;

    return scheme > 0 && strcspn(url + scheme, "/:?#") > 0;
}

int http_open(const char *url, struct http *ret)
{
    size_t length;

    *ret = (struct http){0};
    if (!url || !url[0])
        url = getenv("CLAAS_URL");
    if (!url || !url[0])
        url = DEFAULT_URL;
    if (!is_address(url))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' is no address like " DEFAULT_URL, url);
    length = strlen(url);
    while (length > 0 && url[length - 1] == '/')
        length--;
    curl_global_init(CURL_GLOBAL_DEFAULT);
    ret->url = claas_strndup(url, length);
    ret->curl = curl_easy_init();
    if (!ret->url || !ret->curl)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return 0;
}

void http_close(struct http *http)
{
    if (http->curl)
        curl_easy_cleanup(http->curl);
    free(http->url);
    *http = (struct http){0};
}

char *http_path(struct http *http, const char *path, ...)
{
    struct claas_buf buf;
    va_list arguments;
    const char *key;
    char separator = '?';

    claas_buf_init(&buf, 65536);
    claas_buf_add_text(&buf, path);
    va_start(arguments, path);
    while ((key = va_arg(arguments, const char *))) {
        const char *value = va_arg(arguments, const char *);
        char *escaped = value ? curl_easy_escape(http->curl, value, 0) : NULL;

        if (escaped) {
            claas_buf_printf(&buf, "%c%s=%s", separator, key, escaped);
            separator = '&';
        }
        curl_free(escaped);
    }
    va_end(arguments);
    return claas_buf_take(&buf, NULL);
}

/* --- one request ------------------------------------------------------------------------------ */

struct transfer {
    struct http *http;
    struct claas_buf body; /* of an error, or of an answer that is kept */
    FILE *file;            /* download */
    struct sse_reader *sse;
    void (*tick)(void *arg);
    void *arg;
    int error; /* first failure of our own callbacks */
};

static bool is_good(struct http *http)
{
    curl_easy_getinfo(http->curl, CURLINFO_RESPONSE_CODE, &http->status);
    return http->status >= 200 && http->status < 300;
}

/* Any count but `length` ends the transfer. */
static size_t on_bytes(char *bytes, size_t one, size_t length, void *arg)
{
    struct transfer *transfer = arg;

    (void)one;
    if (!is_good(transfer->http) || (!transfer->file && !transfer->sse))
        transfer->error = claas_buf_add(&transfer->body, bytes, length);
    else if (transfer->sse)
        transfer->error = sse_reader_feed(transfer->sse, bytes, length);
    else if (fwrite(bytes, 1, length, transfer->file) != length)
        transfer->error = claas_fail_errno("writing");
    return transfer->error < 0 ? 0 : length;
}

static int on_progress(void *arg, curl_off_t total, curl_off_t now, curl_off_t up_total,
                       curl_off_t up_now)
{
    struct transfer *transfer = arg;

    (void)total, (void)now, (void)up_total, (void)up_now;
    if (transfer->tick)
        transfer->tick(transfer->arg);
    return interrupted;
}

/* {"detail": "…"}, {"detail": [{"loc": […], "msg": "…"}]} or {"error": {"message": "…"}}. */
static const char *server_sentence(const cJSON *json)
{
    const cJSON *detail = claas_json_get(json, "detail");
    const char *text = NULL;

    if (cJSON_IsString(detail))
        return detail->valuestring;
    if (cJSON_IsArray(detail)) {
        const cJSON *location = claas_json_get(detail->child, "loc");
        const cJSON *last = cJSON_GetArrayItem(location, cJSON_GetArraySize(location) - 1);

        if (claas_json_get_string(detail->child, "msg", &text) != 1)
            return NULL;
        if (cJSON_IsString(last))
            claas_fail(CLAAS_ERR_INVALID, "%s: %s", last->valuestring, text);
        else
            claas_fail(CLAAS_ERR_INVALID, "%s", text);
        return claas_error_text();
    }
    claas_json_get_string(claas_json_get(json, "error"), "message", &text);
    return text;
}

static int code_of_status(long status)
{
    switch (status) {
    case 400:
    case 415:
    case 422:
        return CLAAS_ERR_INVALID;
    case 403:
        return CLAAS_ERR_DENIED;
    case 404:
        return CLAAS_ERR_NOT_FOUND;
    case 409:
        return CLAAS_ERR_CONFLICT;
    case 413:
        return CLAAS_ERR_TOO_LARGE;
    case 429:
    case 503:
        return CLAAS_ERR_OVERLOADED;
    case 504:
        return CLAAS_ERR_DEADLINE;
    default:
        return CLAAS_ERR_INTERNAL;
    }
}

static int fail_by_answer(struct transfer *transfer)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    CLAAS_AUTO_FREE char *sentence = NULL;
    long status = transfer->http->status;
    const char *text = NULL;

    if (claas_json_parse(transfer->body.data ? transfer->body.data : "", transfer->body.length,
                         ERROR_BODY_MAX, &json) == 0)
        text = server_sentence(json);
    if (!text)
        return claas_fail(code_of_status(status), "%s answered %ld", transfer->http->url, status);
    sentence = claas_strdup(text); /* it may be this thread's own last sentence */
    return claas_fail(code_of_status(status), "%s", sentence ? sentence : "");
}

static int fail_by_curl(struct transfer *transfer, CURLcode code, const char *text)
{
    if (transfer->error < 0)
        return transfer->error;
    if (http_take_interrupt())
        return claas_fail(CLAAS_ERR_CANCELLED, "interrupted");
    if (code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST)
        return claas_fail(CLAAS_ERR_UNAVAILABLE,
                          "no server at %s: %s\n(`claas serve` starts one; --url or CLAAS_URL "
                          "names another)",
                          transfer->http->url, text[0] ? text : curl_easy_strerror(code));
    return claas_fail(CLAAS_ERR_UNAVAILABLE, "%s: %s", transfer->http->url,
                      text[0] ? text : curl_easy_strerror(code));
}

/* Runs what was set up on the handle, which is as new afterwards. */
static int perform(struct http *http, const char *path, struct curl_slist *headers,
                   struct transfer *transfer)
{
    CLAAS_AUTO_FREE char *url = claas_format("%s%s", http->url, path);
    char text[CURL_ERROR_SIZE] = "";
    CURL *curl = http->curl;
    CURLcode code;
    int rc;

    transfer->http = http;
    claas_buf_init(&transfer->body, ANSWER_MAX);
    if (!path || !url) {
        curl_slist_free_all(headers);
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    if (interrupted) {
        curl_slist_free_all(headers);
        return fail_by_curl(transfer, CURLE_ABORTED_BY_CALLBACK, text);
    }
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_USERAGENT, "claas/" CLAAS_VERSION);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT, CONNECT_TIMEOUT_S);
    curl_easy_setopt(curl, CURLOPT_ERRORBUFFER, text);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_bytes);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, transfer);
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, transfer);
    if (is_local(http->url))
        curl_easy_setopt(curl, CURLOPT_PROXY, "");
    code = curl_easy_perform(curl);
    rc = code != CURLE_OK ? fail_by_curl(transfer, code, text)
         : is_good(http)  ? 0
                          : fail_by_answer(transfer);
    curl_easy_reset(curl); /* keeps the connection */
    curl_slist_free_all(headers);
    return rc;
}

/* Method and JSON body; `text` must live until the request is done. */
static struct curl_slist *set_body(struct http *http, const char *method, const char *text)
{
    curl_easy_setopt(http->curl, CURLOPT_CUSTOMREQUEST, method);
    if (!text)
        return NULL;
    curl_easy_setopt(http->curl, CURLOPT_POSTFIELDS, text);
    curl_easy_setopt(http->curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)strlen(text));
    return curl_slist_append(curl_slist_append(NULL, "Content-Type: application/json"), "Expect:");
}

static int print_body(cJSON *body, char **ret)
{
    *ret = NULL;
    if (!body)
        return 0;
    *ret = claas_json_print(body);
    cJSON_Delete(body);
    return *ret ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int read_answer(struct transfer *transfer, cJSON **ret)
{
    int rc;

    if (!ret)
        return 0;
    rc = claas_json_parse(transfer->body.data ? transfer->body.data : "", transfer->body.length,
                          ANSWER_MAX, ret);
    return rc < 0 ? claas_fail_context(rc, "the answer of %s: ", transfer->http->url) : 0;
}

int http_json(struct http *http, const char *method, const char *path, cJSON *body, cJSON **ret)
{
    struct transfer transfer = {0};
    CLAAS_AUTO_FREE char *text = NULL;
    int rc = print_body(body, &text);

    if (rc == 0)
        rc = perform(http, path, set_body(http, method, text), &transfer);
    if (rc == 0)
        rc = read_answer(&transfer, ret);
    claas_buf_done(&transfer.body);
    return rc;
}

int http_events(struct http *http, struct http_stream *stream)
{
    struct sse_reader reader;
    struct transfer transfer = {.sse = &reader, .tick = stream->tick, .arg = stream->arg};
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO_FREE char *last = NULL;
    struct curl_slist *headers;
    int rc = print_body(stream->body, &text);

    stream->body = NULL;
    if (rc < 0)
        return rc;
    headers = curl_slist_append(set_body(http, stream->method, text), "Accept: text/event-stream");
    if (stream->last_event_id) {
        last = claas_format("Last-Event-ID: %s", stream->last_event_id);
        headers = curl_slist_append(headers, last ? last : "");
    }
    sse_reader_init(&reader, stream->event, stream->arg);
    rc = perform(http, stream->path, headers, &transfer);
    sse_reader_done(&reader);
    claas_buf_done(&transfer.body);
    return rc;
}

int http_download(struct http *http, const char *path, FILE *file)
{
    struct transfer transfer = {.file = file};
    int rc = perform(http, path, NULL, &transfer);

    claas_buf_done(&transfer.body);
    return rc;
}

int http_upload(struct http *http, const char *path, const char *file_path, cJSON **ret)
{
    struct transfer transfer = {0};
    FILE *file = fopen(file_path, "rb");
    curl_off_t length = -1;
    int rc;

    if (!file)
        return claas_fail_errno("%s", file_path);
    if (fseeko(file, 0, SEEK_END) == 0)
        length = ftello(file);
    if (length < 0 || fseeko(file, 0, SEEK_SET) < 0) {
        fclose(file);
        return claas_fail_errno("%s", file_path);
    }
    curl_easy_setopt(http->curl, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(http->curl, CURLOPT_CUSTOMREQUEST, "POST");
    curl_easy_setopt(http->curl, CURLOPT_READDATA, file);
    curl_easy_setopt(http->curl, CURLOPT_INFILESIZE_LARGE, length);
    rc = perform(http, path, curl_slist_append(NULL, "Content-Type: application/zip"), &transfer);
    if (rc == 0)
        rc = read_answer(&transfer, ret);
    claas_buf_done(&transfer.body);
    fclose(file);
    return rc;
}
