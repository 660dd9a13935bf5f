/* What the routes of adapters share. */
#ifndef CLAAS_BRIDGE_LORA_H
#define CLAAS_BRIDGE_LORA_H

struct request;

/* A trainer may be in a step when asked; init and import then wait for their turn. */
#define LORA_TRAINER_MS 300000

/* The query argument lora_id. When it is missing the request is answered and -1 comes back. */
int lora_id_query(struct request *request, const char **ret);

#endif
