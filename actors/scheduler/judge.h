/* The gate: whether a candidate may be published. */
#ifndef CLAAS_SCHEDULER_JUDGE_H
#define CLAAS_SCHEDULER_JUDGE_H

#include "claas/config.h"
#include "claas/json.h"

/* True if the candidate passes; else `reason` says which figure, its value and its bound. `base`
 * and `candidate`: the figures as CYCLE_BEGIN and CYCLE_STEP give them. A figure that is missing or
 * not finite fails. */
bool judge(const claas_config_t *config, bool finite, const cJSON *base, const cJSON *candidate,
           char *reason, size_t size);

#endif
