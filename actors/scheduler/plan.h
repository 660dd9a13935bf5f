/* What each step of a cycle trains on and how fast: pure functions of the recipe, the configuration
 * and the counts. */
#ifndef CLAAS_SCHEDULER_PLAN_H
#define CLAAS_SCHEDULER_PLAN_H

#include "claas/json.h"
#include "recipe.h"

struct plan {
    struct recipe recipe;
    bool reference; /* the Python system's single step on the recorded rollouts */
    int steps;
    double rate; /* of the first step */
    double replay_share, teacher_share;
    int items, replay, prompts; /* available: new feedback, earlier feedback, other prompts */
    cJSON *training; /* owned: the explicit values of the request; NULL = the default cycle */
};

/* `training`: the request's object or NULL. */
void plan_init(struct plan *plan, const claas_config_t *config, const struct recipe *recipe,
               const cJSON *training);
void plan_done(struct plan *plan);
/* Rows of CYCLE_STEP for step 1 … steps. */
cJSON *plan_rows(const struct plan *plan, int step);
/* The rate of a step: linearly down to a tenth. */
double plan_rate(const struct plan *plan, int step);
/* The training object of CYCLE_STEP. */
cJSON *plan_training(const struct plan *plan, const claas_config_t *config, int step);

/* Checks a request's training values against the contract's bounds: one error that names them
 * all. */
int training_check(const cJSON *training);

#endif
