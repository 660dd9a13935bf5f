/* The table of routes. A new route is a line in routes.c and a function. */
#ifndef CLAAS_BRIDGE_ROUTES_H
#define CLAAS_BRIDGE_ROUTES_H

#include <stddef.h>

struct request;

enum route_flag {
    ROUTE_OPENAI = 1, /* errors in OpenAI's shape */
    ROUTE_JSON = 2,   /* the body is JSON: other content types are 415 */
    ROUTE_EXEMPT = 4, /* answered even when the server is full or draining */
};

struct route {
    const char *method;
    /* "*" matches one path segment, a final "**" the rest; what the first of them matched is
     * request->tail. */
    const char *path;
    unsigned flags;
    int (*handle)(struct request *request);
    const char *summary;
    /* The body goes here piece by piece (limit: http.max_import), not into memory. */
    int (*take_body)(struct request *request, const char *data, size_t length);
};

/* The route of a method (HEAD finds GET's) and path; *ret_tail is a new string or NULL. */
const struct route *routes_find(const char *method, const char *path, char **ret_tail);
const struct route *routes_at(size_t index);
/* Answers a request without a route: 404, 405 with Allow, or 204 for OPTIONS. */
void routes_fail(struct request *request);

/* --- their functions, by file --- */
int route_root(struct request *request); /* health_routes.c */
int route_docs(struct request *request);
int route_health(struct request *request);
int route_metrics(struct request *request);
int route_chat(struct request *request); /* openai_chat.c */
int route_completions(struct request *request);
int route_models(struct request *request); /* openai_models.c */
int route_model(struct request *request);
int route_lora_init(struct request *request); /* lora_routes.c */
int route_lora_list(struct request *request);
int route_lora_delete(struct request *request);
int route_lora_versions(struct request *request);
int route_lora_rollback(struct request *request);
int route_standing_list(struct request *request);
int route_standing_withdraw(struct request *request);
int route_lora_export(struct request *request); /* lora_files.c */
int route_lora_import(struct request *request);
int take_lora_import(struct request *request, const char *data, size_t length);
int route_feedback(struct request *request); /* feedback_routes.c */
int route_jobs(struct request *request);     /* jobs_routes.c */
int route_job(struct request *request);
int route_job_events(struct request *request);
int route_job_cancel(struct request *request);

#endif
