/* The gate's bounds: see judge.h. Comparisons are written so that NaN fails. */
#include "judge.h"

#include <math.h>
#include <stdio.h>

static double figure(const cJSON *figures, const char *key)
{
    double value = NAN;

    if (figures)
        claas_json_get_number(figures, key, -1e30, 1e30, &value);
    return value;
}

bool judge(const claas_config_t *config, bool finite, const cJSON *base, const cJSON *candidate,
           char *reason, size_t size)
{
    double nll = figure(candidate, "nll"), base_nll = figure(base, "nll");
    double kl = figure(candidate, "kl");
    double empty = figure(candidate, "short_share"), base_empty = figure(base, "short_share");
    double distinct = figure(candidate, "distinct2"), base_distinct = figure(base, "distinct2");
    double nll_margin = claas_config_number(config, "gate.nll_margin");
    double kl_max = claas_config_number(config, "gate.kl_max");
    double empty_max = claas_config_number(config, "gate.short_share_max");
    double distinct_min = claas_config_number(config, "gate.distinct2_ratio_min") * base_distinct;

    reason[0] = '\0';
    if (!finite)
        snprintf(reason, size, "the step's loss, gradient or weights were not finite");
    else if (!(nll - base_nll <= nll_margin))
        snprintf(reason, size,
                 "neutral text: %.3f nats per token, the base has %.3f, allowed +%.2f", nll,
                 base_nll, nll_margin);
    else if (!(kl <= kl_max))
        snprintf(reason, size, "unrelated prompts: KL to base %.3f nats per token, allowed %.2f",
                 kl, kl_max);
    else if (!(empty - base_empty <= empty_max))
        snprintf(reason, size, "%.0f %% of the answers are empty or one token, allowed %.0f %%",
                 100 * empty, 100 * (base_empty + empty_max));
    else if (!(distinct >= distinct_min))
        snprintf(reason, size, "answers repeat themselves: %.2f distinct 2-grams, at least %.2f",
                 distinct, distinct_min);
    return reason[0] == '\0';
}
