/* `claas model`: base models on this machine; no server is asked. */
#include "claas/mem.h"
#include "cli.h"
#include "model_verbs.h"
#include "verbs.h"

int verb_model(int argc, char **argv)
{
    static const struct cli_verb verbs[] = {
        {"show", model_show, "show a model file: family, shapes, encodings, template"},
        {"calibrate", model_calibrate, "measure how the model is best shown feedback"},
    };

    return cli_dispatch(verbs, CLAAS_COUNT(verbs), "Base models on this machine.", argc, argv);
}
