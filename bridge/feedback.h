/* Feedback's two bodies in, the contract's answer out. Inner header of feedback_*.c. */
#ifndef CLAAS_BRIDGE_FEEDBACK_H
#define CLAAS_BRIDGE_FEEDBACK_H

#include "claas/json.h"

struct request;

/* The FEEDBACK message of either body: {requests: […], orchestration, wait} or the older single
 * item {lora_id, prompt, response, feedback, training, orchestration}. When it is faulty the
 * request is answered and NULL comes back. */
cJSON *feedback_body(struct request *request, const cJSON *json, int *ret_batch);
/* Answers with the ended job. */
void feedback_answer(struct request *request, const cJSON *job, const char *job_id, int batch);

#endif
