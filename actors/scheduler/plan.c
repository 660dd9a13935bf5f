/* The plan of a cycle: see plan.h. */
#include "plan.h"

#include <math.h>
#include <string.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/mem.h"

/* The contract's defaults, used for what an explicit training object leaves out. */
#define REFERENCE_RATE    3e-5
#define REFERENCE_ALPHA   0.5
#define REFERENCE_IS_CLIP 5.0
#define REFERENCE_TOP_K   100

static double value_of(const cJSON *training, const char *key, double fallback)
{
    double value = fallback;

    if (training)
        claas_json_get_number(training, key, -HUGE_VAL, HUGE_VAL, &value);
    return value;
}

void plan_init(struct plan *plan, const claas_config_t *config, const struct recipe *recipe,
               const cJSON *training)
{
    *plan = (struct plan){.recipe = *recipe};
    plan->steps = training ? (int)value_of(training, "steps", 1) : recipe->steps;
    plan->rate = training ? value_of(training, "learning_rate", REFERENCE_RATE) : recipe->rate;
    plan->reference = training && plan->steps == 1;
    plan->replay_share = claas_config_number(config, "cycle.replay_share");
    plan->teacher_share = claas_config_number(config, "cycle.teacher_share");
    plan->training = training ? cJSON_Duplicate(training, true) : NULL;
}

void plan_done(struct plan *plan)
{
    cJSON_Delete(plan->training);
    *plan = (struct plan){0};
}

double plan_rate(const struct plan *plan, int step)
{
    if (plan->steps < 2)
        return plan->rate;
    return plan->rate * (1 - 0.9 * (step - 1) / (plan->steps - 1));
}

/* The share of rollouts from the teacher: falls from teacher_share at the first step to nothing at
 * half time. */
static double teacher_share(const struct plan *plan, int step)
{
    double half = plan->steps / 2.0;
    double share = plan->teacher_share * (1 - (step - 1) / half);

    return share > 0 ? share : 0;
}

static void add_row(cJSON *rows, const char *source, int index, const char *form, bool from_teacher)
{
    cJSON *row = cJSON_CreateObject();

    claas_json_set_string(row, "source", source);
    claas_json_set_int(row, "index", index);
    claas_json_set_string(row, "form", form);
    claas_json_set_bool(row, "from_teacher", from_teacher);
    cJSON_AddItemToArray(rows, row);
}

/* `count` rows of one source. Forms change every second row and teacher rollouts come evenly
 * spaced, so that each form has both kinds; the step shifts both, so that over a cycle every item
 * meets every form. */
static void add_rows(const struct plan *plan, cJSON *rows, const char *source, int count,
                     int available, int step)
{
    double share = teacher_share(plan, step);

    for (int i = 0; i < count; i++) {
        bool from_teacher = floor((i + 1) * share) > floor(i * share);
        const char *form = plan->recipe.forms[(i / 2 + step) % plan->recipe.form_count];

        add_row(rows, source, (i + step * count) % available, form, from_teacher);
    }
}

cJSON *plan_rows(const struct plan *plan, int step)
{
    cJSON *rows = cJSON_CreateArray();
    int total = plan->recipe.rows;
    int other = plan->prompts > 0 ? (int)lround(total * plan->recipe.other_share) : 0;
    int replay = plan->replay > 0 ? (int)lround(total * plan->replay_share) : 0;

    if (plan->reference) {
        for (int i = 0; i < plan->items; i++)
            add_row(rows, "recorded", i, "hindsight", false);
        return rows;
    }
    if (total < plan->items)
        total = plan->items; /* every new feedback has a row */
    if (other + replay > total - plan->items)
        other = other < total - plan->items ? other : total - plan->items;
    if (other + replay > total - plan->items)
        replay = total - plan->items - other;
    add_rows(plan, rows, "feedback", total - other - replay, plan->items, step);
    if (replay > 0)
        add_rows(plan, rows, "replay", replay, plan->replay, step);
    if (other > 0)
        add_rows(plan, rows, "other", other, plan->prompts, step);
    return rows;
}

static void set_reference_loss(cJSON *json, const cJSON *training)
{
    double alpha = value_of(training, "alpha", REFERENCE_ALPHA);

    /* At 0 and 1 the Python system's form trains nothing or explodes; there the divergence is the
     * exact KL. */
    claas_json_set_string(json, "variant", alpha > 0 && alpha < 1 ? "teacher_topk" : "full");
    claas_json_set_number(json, "alpha", alpha);
    claas_json_set_number(json, "top_k", value_of(training, "teacher_top_k", REFERENCE_TOP_K));
    claas_json_set_number(json, "is_clip", value_of(training, "is_clip", REFERENCE_IS_CLIP));
    claas_json_set_number(json, "kl_weight", value_of(training, "kl_reg_weight", 0));
    claas_json_set_number(json, "max_grad_norm", value_of(training, "max_grad_norm", 1));
    claas_json_set_bool(json, "sample_mean", true);
}

cJSON *plan_training(const struct plan *plan, const claas_config_t *config, int step)
{
    cJSON *json = cJSON_CreateObject();

    claas_json_set_number(json, "rate", plan_rate(plan, step));
    claas_json_set_number(json, "beta1", claas_config_number(config, "cycle.beta1"));
    claas_json_set_number(json, "beta2", claas_config_number(config, "cycle.beta2"));
    claas_json_set_number(json, "eps", claas_config_number(config, "cycle.eps"));
    claas_json_set_number(json, "weight_decay", claas_config_number(config, "cycle.weight_decay"));
    if (plan->training) {
        set_reference_loss(json, plan->training);
        return json;
    }
    claas_json_set_string(json, "variant", "full");
    claas_json_set_number(json, "alpha", claas_config_number(config, "cycle.alpha"));
    claas_json_set_number(json, "is_clip", claas_config_number(config, "cycle.is_clip"));
    claas_json_set_number(json, "kl_weight", claas_config_number(config, "cycle.kl_weight"));
    claas_json_set_number(json, "max_grad_norm",
                          claas_config_number(config, "cycle.max_grad_norm"));
    claas_json_set_bool(json, "sample_mean", claas_config_bool(config, "cycle.sample_mean"));
    return json;
}

/* --- bounds of the contract ------------------------------------------------------------------- */

struct bound {
    const char *key, *text;
    double min, max;
    bool above; /* min itself is out */
    bool whole;
};

static const struct bound bounds[] = {
    {"learning_rate", "learning_rate must be > 0", 0, HUGE_VAL, true, false},
    {"alpha", "alpha must be within [0, 1]", 0, 1, false, false},
    {"is_clip", "is_clip must be within [1, 20]", 1, 20, false, false},
    {"max_grad_norm", "max_grad_norm must be >= 0", 0, HUGE_VAL, false, false},
    {"kl_reg_weight", "kl_reg_weight must be within [0, 1]", 0, 1, false, false},
    {"teacher_top_k", "teacher_top_k must be within [10, 100]", 10, 100, false, true},
    {"steps", "steps must be within [1, 1000]", 1, 1000, false, true},
};

int training_check(const cJSON *training)
{
    struct claas_buf text;
    int rc = 0;

    claas_buf_init(&text, 4096);
    for (size_t i = 0; i < CLAAS_COUNT(bounds); i++) {
        const struct bound *bound = &bounds[i];
        const cJSON *value = claas_json_get(training, bound->key);
        double number;

        if (!value)
            continue;
        number = cJSON_IsNumber(value) ? value->valuedouble : NAN;
        if (bound->whole && number != floor(number))
            number = NAN;
        if (number >= bound->min && number <= bound->max && !(bound->above && number == bound->min))
            continue;
        claas_buf_printf(&text, "%s%s", text.length ? "; " : "", bound->text);
    }
    if (text.length > 0)
        rc = claas_fail(CLAAS_ERR_UNPROCESSABLE, "invalid training config: %s", text.data);
    claas_buf_done(&text);
    return rc;
}
