/* Failures on demand: see fault.h. */
#include "engine/fault.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#define VARIABLE "CLAAS_DEVICE_FAULT"

int claas_fault_read(struct claas_fault *ret)
{
    const char *text = getenv(VARIABLE);
    const char *colon = text != NULL ? strchr(text, ':') : NULL;
    char name[32];
    char *end = NULL;

    *ret = (struct claas_fault){0};
    if (text == NULL || text[0] == '\0')
        return 0;
    if (colon != NULL && (size_t)(colon - text) < sizeof(name)) {
        memcpy(name, text, (size_t)(colon - text));
        name[colon - text] = '\0';
        ret->code = claas_err_from_name(name);
        if (strcmp(claas_err_name(ret->code), name) != 0)
            ret->code = 0;
        ret->first = strtoull(colon + 1, &end, 10);
    }
    if (ret->code >= 0 || end == NULL || end == colon + 1 || *end != '\0' || ret->first == 0)
        return claas_fail(CLAAS_ERR_INVALID, VARIABLE "='%s' is not CODE:N",
                          claas_quote(text).text);
    claas_warning("training step %llu and later ones will fail with %s: " VARIABLE " is set",
                  (unsigned long long)ret->first, claas_err_name(ret->code));
    return 0;
}

int claas_fault_step(struct claas_fault *fault)
{
    if (fault->code == 0 || ++fault->steps < fault->first)
        return 0;
    fault->is_lost = fault->code == CLAAS_ERR_DEVICE_LOST;
    return claas_fail(fault->code, "the training step failed by order of " VARIABLE);
}

int claas_fault_pass(const struct claas_fault *fault)
{
    return fault->is_lost ? claas_fail(CLAAS_ERR_DEVICE_LOST, NULL) : 0;
}
