/* HTTP for the verbs: JSON requests, server-sent events as they arrive, files up and down.
 *
 * Every failure is a code with a sentence (claas/err.h): the server's own words when it answered,
 * else why it could not be reached. Ctrl-C ends what runs with CLAAS_ERR_CANCELLED, once
 * http_interruptible() was called. */
#ifndef CLAAS_TOOLS_HTTP_CLIENT_H
#define CLAAS_TOOLS_HTTP_CLIENT_H

#include <stdio.h>

#include <curl/curl.h>

#include "claas/json.h"

/* One server; one request at a time, over one kept connection. */
struct http {
    char *url; /* without a slash at the end */
    CURL *curl;
    long status; /* of the last answer, 0 if there was none */
};

/* `url`: NULL = CLAAS_URL of the environment, else http://127.0.0.1:8080. */
int http_open(const char *url, struct http *ret);
void http_close(struct http *http);

/* From now on SIGINT ends a running request instead of the process. */
void http_interruptible(void);
/* Whether a Ctrl-C came that no request has seen; forgets it. */
bool http_take_interrupt(void);

/* A path with its query, values escaped: http_path(http, "/v1/lora", "lora_id", id, NULL). Pairs
 * whose value is NULL are left out. Free with free(). */
char *http_path(struct http *http, const char *path, ...) __attribute__((sentinel));

/* `body` (taken) may be NULL; *ret (may be NULL) is the answer's JSON. Any 2xx is success. */
int http_json(struct http *http, const char *method, const char *path, cJSON *body, cJSON **ret);

/* An event of a stream: its name ("message" by default), its id (NULL without) and its data.
 * Returning < 0 ends the stream with that code. */
typedef int http_event_fn(void *arg, const char *name, const char *id, const char *data);
struct http_stream {
    const char *method, *path;
    cJSON *body;               /* taken, may be NULL */
    const char *last_event_id; /* may be NULL */
    http_event_fn *event;
    void (*tick)(void *arg); /* about once a second, also when nothing arrives; may be NULL */
    void *arg;
};
/* 0 when the server ended the stream. */
int http_events(struct http *http, struct http_stream *stream);

/* The answer's body into `file`; and a file as a request's body. */
int http_download(struct http *http, const char *path, FILE *file);
int http_upload(struct http *http, const char *path, const char *file_path, cJSON **ret);

#endif
