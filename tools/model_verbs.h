/* The verbs below `claas model`. */
#ifndef CLAAS_TOOLS_MODEL_VERBS_H
#define CLAAS_TOOLS_MODEL_VERBS_H

int model_show(int argc, char **argv);
int model_calibrate(int argc, char **argv);

#endif
