/* A raw HTTP client for tests: see http_probe.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "http_probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "claas/mem.h"

#define READ_TIMEOUT_S 10
#define ANSWER_MAX     (64 << 20)

void probe_open(struct probe *probe, int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct timeval timeout = {READ_TIMEOUT_S, 0};

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    probe->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(probe->fd >= 0);
    setsockopt(probe->fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(probe->fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(probe->fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        fail_msg("connect: %s", strerror(errno));
    claas_buf_init(&probe->in, ANSWER_MAX);
}

void probe_close(struct probe *probe)
{
    close(probe->fd);
    claas_buf_done(&probe->in);
}

bool probe_try_send(struct probe *probe, const void *bytes, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(probe->fd, bytes, length, MSG_NOSIGNAL);

        if (sent <= 0)
            return false;
        bytes = (const char *)bytes + sent;
        length -= (size_t)sent;
    }
    return true;
}

void probe_send_bytes(struct probe *probe, const void *bytes, size_t length)
{
    if (!probe_try_send(probe, bytes, length))
        fail_msg("send: %s", strerror(errno));
}

void probe_send(struct probe *probe, const char *text)
{
    probe_send_bytes(probe, text, strlen(text));
}

/* More bytes; false at the end (or after a reset). */
static bool read_more(struct probe *probe)
{
    char block[65536];
    ssize_t length = recv(probe->fd, block, sizeof(block), 0);

    if (length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        fail_msg("nothing came for %d s after '%.200s'", READ_TIMEOUT_S,
                 probe->in.data ? probe->in.data : "");
    if (length <= 0)
        return false;
    claas_buf_add(&probe->in, block, (size_t)length);
    return true;
}

bool probe_closed(struct probe *probe)
{
    while (read_more(probe)) {
    }
    return true;
}

void probe_wait_for(struct probe *probe, const char *text)
{
    while (!probe->in.data || !memmem(probe->in.data, probe->in.length, text, strlen(text))) {
        if (!read_more(probe))
            fail_msg("closed before '%s' came: '%.300s'", text,
                     probe->in.data ? probe->in.data : "");
    }
}

const char *answer_header(struct answer *answer, const char *name, char *value, size_t size)
{
    const char *line = answer->headers;
    size_t length = strlen(name);

    while (line && (line = strstr(line, "\r\n"))) {
        line += 2;
        if (strncasecmp(line, name, length) == 0 && line[length] == ':') {
            line += length + 1;
            line += strspn(line, " ");
            snprintf(value, size, "%.*s", (int)strcspn(line, "\r"), line);
            return value;
        }
    }
    return NULL;
}

static char *text_of(const struct probe *probe, size_t offset, size_t length)
{
    return claas_strndup(probe->in.data + offset, length);
}

static void read_chunks(struct probe *probe, struct answer *answer)
{
    struct claas_buf body;

    claas_buf_init(&body, ANSWER_MAX);
    claas_buf_add_text(&body, "");
    for (;;) {
        char *end;
        size_t size;

        while (!probe->in.length || !(end = memmem(probe->in.data, probe->in.length, "\r\n", 2))) {
            if (!read_more(probe))
                fail_msg("closed inside of a chunked body: '%.300s'", body.data ? body.data : "");
        }
        size = strtoul(probe->in.data, NULL, 16);
        claas_buf_consume(&probe->in, (size_t)(end - probe->in.data) + 2);
        while (probe->in.length < size + 2) {
            if (!read_more(probe))
                fail_msg("closed inside of a chunk");
        }
        claas_buf_add(&body, probe->in.data, size);
        claas_buf_consume(&probe->in, size + 2);
        if (size == 0)
            break;
    }
    answer->length = body.length;
    answer->body = body.data ? claas_buf_take(&body, NULL) : claas_strdup("");
}

static bool read_head(struct probe *probe, struct answer *ret)
{
    char *end;
    size_t length;

    while (!probe->in.length || !(end = memmem(probe->in.data, probe->in.length, "\r\n\r\n", 4))) {
        if (!read_more(probe)) {
            ret->status = 0;
            ret->headers = claas_strdup("");
            ret->body = claas_strdup("");
            return false;
        }
    }
    length = (size_t)(end - probe->in.data);
    ret->headers = text_of(probe, 0, length + 2);
    claas_buf_consume(&probe->in, length + 4);
    ret->status = (int)strtol(ret->headers + strlen("HTTP/1.1 "), NULL, 10);
    return true;
}

void probe_read(struct probe *probe, bool head, struct answer *ret)
{
    char value[64];

    memset(ret, 0, sizeof(*ret));
    do { /* 100 Continue comes before the answer */
        free(ret->headers);
        if (!read_head(probe, ret))
            return;
    } while (ret->status == 100);
    if (head || ret->status == 204) {
        ret->body = claas_strdup("");
    } else if (answer_header(ret, "Transfer-Encoding", value, sizeof(value))) {
        read_chunks(probe, ret);
    } else if (answer_header(ret, "Content-Length", value, sizeof(value))) {
        ret->length = strtoul(value, NULL, 10);
        while (probe->in.length < ret->length) {
            if (!read_more(probe))
                fail_msg("closed after %zu of %zu bytes", probe->in.length, ret->length);
        }
        ret->body = ret->length ? text_of(probe, 0, ret->length) : claas_strdup("");
        claas_buf_consume(&probe->in, ret->length);
    } else {
        probe_closed(probe);
        ret->length = probe->in.length;
        ret->body = ret->length ? text_of(probe, 0, ret->length) : claas_strdup("");
        claas_buf_consume(&probe->in, ret->length);
    }
}

void answer_done(struct answer *answer)
{
    free(answer->headers);
    free(answer->body);
    memset(answer, 0, sizeof(*answer));
}

void http_ask(int port, const char *method, const char *path, const char *headers, const char *body,
              struct answer *ret)
{
    CLAAS_AUTO_FREE char *text = NULL;
    struct probe probe;

    if (body)
        text = claas_format("%s %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %zu\r\n\r\n%s",
                            method, path, headers, strlen(body), body);
    else
        text = claas_format("%s %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n", method, path, headers);
    probe_open(&probe, port);
    probe_send(&probe, text);
    probe_read(&probe, strcmp(method, "HEAD") == 0, ret);
    probe_close(&probe);
}

cJSON *http_json(int port, const char *method, const char *path, const char *body, int status)
{
    struct answer answer;
    cJSON *json;

    http_ask(port, method, path, body ? "Content-Type: application/json\r\n" : "", body, &answer);
    if (answer.status != status)
        fail_msg("%s %s: %d instead of %d: %s", method, path, answer.status, status, answer.body);
    json = cJSON_Parse(answer.body);
    if (!json)
        fail_msg("%s %s: not JSON: %s", method, path, answer.body);
    answer_done(&answer);
    return json;
}
