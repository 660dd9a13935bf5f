/* The table of recipes. Its rows were measured (`claas model calibrate`): the forms by their
 * success in context on that model; rows about other things (other_share) only where the form leaks
 * little.
 */
#include "recipe.h"

#include <ctype.h>
#include <string.h>

#include "claas/mem.h"

/* match, steps, rows, rate, other_share, forms, form_count */
static const struct recipe recipes[] = {
    {"smollm2-135m", 8, 12, 7e-4, 0, {"brief", "brief", "hindsight"}, 3},
    {"qwen2.5-0.5b", 8, 16, 5e-4, 0.375, {"list"}, 1},
    {NULL, 8, 16, 5e-4, 0.375, {"list"}, 1}, /* not measured yet */
};

/* Model names compare without case, and with any of space, '-' and '_' for each other. */
static bool name_starts_with(const char *name, const char *prefix)
{
    for (; *prefix; name++, prefix++) {
        char c = (char)tolower((unsigned char)*name);

        if (c == '_' || c == ' ')
            c = '-';
        if (c != *prefix)
            return false;
    }
    return true;
}

static const struct recipe *find(const char *fingerprint, const char *model)
{
    const struct recipe *recipe = recipes;

    while (recipe->match && strcmp(recipe->match, fingerprint) != 0 &&
           !name_starts_with(model, recipe->match))
        recipe++;
    return recipe;
}

struct recipe recipe_for(const claas_config_t *config, const char *fingerprint, const char *model)
{
    struct recipe recipe = *find(fingerprint, model);
    const char *form;

    if (claas_config_int(config, "cycle.steps") > 0)
        recipe.steps = (int)claas_config_int(config, "cycle.steps");
    if (claas_config_int(config, "cycle.rows") > 0)
        recipe.rows = (int)claas_config_int(config, "cycle.rows");
    if (claas_config_number(config, "cycle.rate") > 0)
        recipe.rate = claas_config_number(config, "cycle.rate");
    if (claas_config_number(config, "cycle.other_share") >= 0)
        recipe.other_share = claas_config_number(config, "cycle.other_share");
    if (claas_config_list_at(config, "cycle.forms", 0)) {
        recipe.form_count = 0;
        while (recipe.form_count < RECIPE_FORMS_MAX &&
               (form = claas_config_list_at(config, "cycle.forms", (size_t)recipe.form_count)))
            recipe.forms[recipe.form_count++] = form;
    }
    return recipe;
}
