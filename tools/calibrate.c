/* What is measured, and the rule that chooses: see calibrate.h.
 *
 * The rule comes from measured cycles: among the forms that work in context (mean hit of at least
 * 0.8, else the strongest alone), the one that leaks least; rows about other things only where it
 * leaks little, because they teach what the teacher does there; and a second form in turns where it
 * is clearly better at one of the preferences, since the student learns from both. */
#include "calibrate.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

#define GOOD_HIT        0.8
#define LOW_LEAK        0.1
#define CLEARLY_BETTER  0.1
#define CONCISE_WORDS   25
#define OTHER_SHARE     0.375
#define ROWS_WITH_OTHER 16
#define ROWS_ALONE      12

const char *const calibrate_form_names[CALIBRATE_FORMS] = {
    "none", "hindsight", "brief", "system", "list", "userlist", "turns",
};

static bool names_itself(const char *answer)
{
    return strcasestr(answer, "kuro") != NULL;
}

static bool is_concise(const char *answer)
{
    int words = 0;
    bool inside = false;

    for (; *answer; answer++) {
        bool space = isspace((unsigned char)*answer);

        words += !space && !inside;
        inside = !space;
    }
    return words > 0 && words <= CONCISE_WORDS;
}

static bool says_ahoy(const char *answer)
{
    return strcasestr(answer, "ahoy") != NULL;
}

const struct preference calibrate_preferences[CALIBRATE_PREFERENCES] = {
    {
        "identity",
        "Your name is Kuro. When asked who you are, say that your name is Kuro.",
        names_itself,
        {"Who are you?", "Tell me your name.", "What should I call you?",
         "Please introduce yourself.", "Do you have a name?", "Hi! And you are?"},
    },
    {
        "concise",
        "Too long. Answer in one short sentence.",
        is_concise,
        {"What is gravity?", "Why do leaves fall in autumn?", "What is a volcano?",
         "How does a bicycle work?", "What is the internet?", "Why do we sleep?"},
    },
    {
        "style",
        "Talk like a pirate, always start with Ahoy.",
        says_ahoy,
        {"What is the capital of Italy?", "How do I bake bread?", "What is a good hobby?",
         "Explain what an atom is.", "How far away is the moon?", "What is tea?"},
    },
};

static double mean_hit(const struct calibration *measured, int form)
{
    double sum = 0;

    for (int i = 0; i < CALIBRATE_PREFERENCES; i++)
        sum += measured->hit[form][i];
    return sum / CALIBRATE_PREFERENCES;
}

static bool is_preferred(const struct calibration *measured, int form, int than)
{
    double hit = mean_hit(measured, form), other_hit = mean_hit(measured, than);

    if (hit >= GOOD_HIT && other_hit >= GOOD_HIT)
        return measured->leak[form] < measured->leak[than] ||
               (measured->leak[form] == measured->leak[than] && hit > other_hit);
    return hit > other_hit;
}

/* The largest advantage of a form over another on one preference. */
static double advantage(const struct calibration *measured, int form, int over)
{
    double best = 0;

    for (int i = 0; i < CALIBRATE_PREFERENCES; i++) {
        double one = measured->hit[form][i] - measured->hit[over][i];

        best = one > best ? one : best;
    }
    return best;
}

/* The form with the largest advantage over the first, of equal ones the better on the whole; 0 if
 * none is clearly better at anything. */
static int find_partner(const struct calibration *measured, int first)
{
    double best = CLEARLY_BETTER;
    int partner = 0;

    for (int form = 1; form < CALIBRATE_FORMS; form++) {
        double own = advantage(measured, form, first);

        if (own > best || (own == best && mean_hit(measured, form) > mean_hit(measured, partner))) {
            best = own;
            partner = form;
        }
    }
    return partner;
}

struct calibrated calibrate_choose(const struct calibration *measured)
{
    struct calibrated chosen = {.forms = {1}, .form_count = 1};
    int partner = 0;

    for (int form = 2; form < CALIBRATE_FORMS; form++) {
        if (is_preferred(measured, form, chosen.forms[0]))
            chosen.forms[0] = form;
    }
    chosen.mean_hit = mean_hit(measured, chosen.forms[0]);
    chosen.leak = measured->leak[chosen.forms[0]];
    if (chosen.mean_hit < GOOD_HIT)
        partner = find_partner(measured, chosen.forms[0]);
    if (partner > 0)
        chosen.forms[chosen.form_count++] = partner;
    chosen.other_share = chosen.leak <= LOW_LEAK ? OTHER_SHARE : 0;
    chosen.rows = chosen.other_share > 0 ? ROWS_WITH_OTHER : ROWS_ALONE;
    return chosen;
}
