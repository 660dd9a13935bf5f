/* Names of adapters: `user/name`, perhaps followed by -init, -latest or @N. */
#ifndef CLAAS_STORAGE_NAMES_H
#define CLAAS_STORAGE_NAMES_H

#include <stdint.h>

#define CLAAS_LORA_NAME_BYTES 257
#define CLAAS_LORA_CURRENT    (-1)

struct claas_lora_name {
    char name[CLAAS_LORA_NAME_BYTES]; /* canonical: "user/name", or "name" */
    int64_t version;                  /* of @N; CLAAS_LORA_CURRENT without it */
};

/* INVALID with a sentence for anything that is no name: another character than A-Z a-z 0-9 . _ -, a
 * `..` or `.` or empty segment, more than two segments, too long. Slashes at both ends are
 * ignored. */
int claas_lora_name_parse(const char *text, struct claas_lora_name *ret);
/* INVALID for names that mean the base model in chat. */
int claas_lora_name_check_new(const struct claas_lora_name *name);

#endif
