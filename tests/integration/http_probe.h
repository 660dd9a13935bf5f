/* A raw HTTP client for tests: sends the bytes it is told to, reads answers by their framing. Fails
 * the running test when nothing comes for 10 s. */
#ifndef CLAAS_TEST_HTTP_PROBE_H
#define CLAAS_TEST_HTTP_PROBE_H

#include <stdbool.h>
#include <stddef.h>

#include "claas/buf.h"
#include "claas/json.h"

struct probe {
    int fd;
    struct claas_buf in; /* read and not yet used */
};

struct answer {
    int status; /* 0: the connection was closed without one */
    char *headers, *body;
    size_t length; /* of body */
};

void probe_open(struct probe *probe, int port);
void probe_close(struct probe *probe);
void probe_send(struct probe *probe, const char *text);
void probe_send_bytes(struct probe *probe, const void *bytes, size_t length);
/* False if the peer is gone. */
bool probe_try_send(struct probe *probe, const void *bytes, size_t length);
/* One answer; `head`: it has no body. */
void probe_read(struct probe *probe, bool head, struct answer *ret);
/* Reads until `text` has come, anywhere. */
void probe_wait_for(struct probe *probe, const char *text);
/* True once the server has closed the connection (whatever it sent before is in probe->in). */
bool probe_closed(struct probe *probe);
void answer_done(struct answer *answer);
/* The value of a header, NULL if absent; valid until answer_done. */
const char *answer_header(struct answer *answer, const char *name, char *value, size_t size);

/* A whole request on its own connection. `headers` is "" or lines that end in \r\n. */
void http_ask(int port, const char *method, const char *path, const char *headers, const char *body,
              struct answer *ret);
/* The same, and checks the status; the body is parsed (free with claas_json_free). */
cJSON *http_json(int port, const char *method, const char *path, const char *body, int status);

#endif
