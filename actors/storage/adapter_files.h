/* Directories of adapters: checking a staged one, putting it in its place. */
#ifndef CLAAS_STORAGE_ADAPTER_FILES_H
#define CLAAS_STORAGE_ADAPTER_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ADAPTER_CONFIG  "adapter_config.json"
#define ADAPTER_WEIGHTS "adapter_model.safetensors"
#define ADAPTER_MOMENTS "optimizer.safetensors"

struct adapter_facts {
    char base_model[257]; /* as the configuration names it, "" if not */
    int64_t rank;
    double alpha;
    int64_t bytes; /* of the weights file */
    bool moments;  /* there is an optimizer state */
    bool trained;  /* some lora_B is not zero; looked for only when asked */
};

/* Reads the structure of a directory: the configuration's numbers, the safetensors files' headers
 * against their sizes. Plain files of the three names only. `look_for_training` reads the lora_B
 * tensors too. */
int adapter_check(const char *directory, bool look_for_training, struct adapter_facts *ret);
/* fsync of every file and of the directory. */
int adapter_sync(const char *directory);
/* rename, durable on both sides; parents of `target` are made. The target must not exist
 * (EXISTS). */
int adapter_move(const char *source, const char *target);
/* FORMAT unless `directory` is a plain directory directly below `staging` (both resolved). */
int adapter_check_staged(const char *directory, const char *staging);
bool path_exists(const char *path);

/* A safetensors file's header against its size; *ret_nonzero_b (may be NULL) as in
 * adapter_facts.trained. */
int safetensors_check(const char *path, bool *ret_nonzero_b);

#endif
