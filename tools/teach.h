/* Feedback as the verbs send it: accepted at once, then its job is watched, with a progress bar on
 * a terminal. */
#ifndef CLAAS_TOOLS_TEACH_H
#define CLAAS_TOOLS_TEACH_H

#include "http_client.h"

/* Sends feedback on an answer; durable when it returns 0 and the job's id. */
int teach_send(struct http *http, const char *lora_id, const char *response_id, int choice,
               const char *text, char job_id[65]);
/* Waits for the end of a job, showing its steps; *ret is the job. The stream is taken up again when
 * the server restarts. CANCELLED after Ctrl-C: the job goes on. */
int teach_watch(struct http *http, const char *job_id, cJSON **ret);
/* Called for every event of the job (claas jobs watch --json); may be NULL. */
typedef void teach_event_fn(void *arg, const char *data);
int teach_watch_events(struct http *http, const char *job_id, teach_event_fn *event, void *arg,
                       cJSON **ret);
/* What came of a job, as one sentence; true if a version was published. Free *ret with free(). */
bool teach_outcome(const cJSON *job, char **ret);

#endif
