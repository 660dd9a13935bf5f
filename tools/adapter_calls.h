/* Requests about adapters that several verbs make: 0, or < 0 with the server's sentence. *ret is
 * freed with claas_json_free. */
#ifndef CLAAS_TOOLS_ADAPTER_CALLS_H
#define CLAAS_TOOLS_ADAPTER_CALLS_H

#include "http_client.h"

/* {lora_id, current, versions: […]} */
int adapter_versions(struct http *http, const char *lora_id, cJSON **ret);
/* Makes it if there is none; *made says so. */
int adapter_ensure(struct http *http, const char *lora_id, bool *made);
int adapter_rollback(struct http *http, const char *lora_id, int64_t version);
/* The parent of the current version; CONFLICT if that is the untrained one. */
int adapter_parent(struct http *http, const char *lora_id, int64_t *ret);
/* {lora_id, feedback: [{id, text, created, …}]} */
int adapter_standing(struct http *http, const char *lora_id, cJSON **ret);
int adapter_withdraw(struct http *http, const char *lora_id, const char *id);

/* Tables of the two lists. */
int adapter_print_versions(const cJSON *reply, bool json);
int adapter_print_standing(const cJSON *reply, bool json);

#endif
