/* How well a base model follows feedback that it is shown, for each form of showing it: what
 * `claas model calibrate` measures. */
#ifndef CLAAS_TOOLS_CALIBRATE_H
#define CLAAS_TOOLS_CALIBRATE_H

#include "claas/device.h"

#define CALIBRATE_FORMS       7 /* the first is none: the base without feedback */
#define CALIBRATE_PREFERENCES 3
#define CALIBRATE_QUESTIONS   6

/* A preference with a test of its own: no judge is needed. */
struct preference {
    const char *name;
    const char *feedback;
    bool (*is_met)(const char *answer);
    const char *questions[CALIBRATE_QUESTIONS];
};
extern const struct preference calibrate_preferences[CALIBRATE_PREFERENCES];
/* "none", "hindsight", … */
extern const char *const calibrate_form_names[CALIBRATE_FORMS];

struct calibration {
    double hit[CALIBRATE_FORMS][CALIBRATE_PREFERENCES]; /* share of answers that meet it */
    double leak[CALIBRATE_FORMS]; /* share of unrelated answers that show the identity */
};

/* Samples `samples` answers to each question. `progress` (may be NULL) sees how many are done. */
typedef void calibrate_progress_fn(void *arg, int done, int total);
int calibrate_measure(claas_device_t *device, int samples, calibrate_progress_fn *progress,
                      void *arg, struct calibration *ret);

/* The choice: at most two forms, taken in turns, and the share of rows about other things. */
struct calibrated {
    int forms[2];
    int form_count;
    double mean_hit, leak; /* of the first form */
    double other_share;
    int rows;
};
struct calibrated calibrate_choose(const struct calibration *measured);

#endif
