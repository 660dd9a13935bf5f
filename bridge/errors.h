/* Error answers: OpenAI's shape {"error": {message, type, param, code}} on OpenAI's routes,
 * {"detail": …} on the others. In a stream that has begun, an error is an event and the end. */
#ifndef CLAAS_BRIDGE_ERRORS_H
#define CLAAS_BRIDGE_ERRORS_H

#include "claas/json.h"

struct request;

/* By a code of err.def. */
void request_fail(struct request *request, int code, const char *text);
/* `param` and `code` (may be NULL) are OpenAI's fields. */
void request_fail_status(struct request *request, int status, const char *text, const char *param,
                         const char *code);
/* 422 with the list of a body's faults ([{loc, msg, type}], taken); on OpenAI's routes 400 with
 * the first of them. */
void request_fail_schema(struct request *request, cJSON *faults);

#endif
