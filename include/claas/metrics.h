/* Names of the metrics in metrics.def; actor.h has the calls. */
#ifndef CLAAS_METRICS_H
#define CLAAS_METRICS_H

enum claas_metric {
#define X(name, kind, prometheus, labels, help) CLAAS_METRIC_##name,
#include "claas/metrics.def"
#undef X
};

#endif
