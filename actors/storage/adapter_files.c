/* Directories of adapters. What is published must be readable later, by this program or another: so
 * every byte that describes the files is checked here, without the numeric code: names, sizes, the
 * header of each safetensors file (see safetensors_check.c). A directory gets its final name by one
 * rename, after everything in it was fsynced. */
#include "adapter_files.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"

#define CONFIG_BYTES_MAX ((size_t)1 << 20)

static const char *const names[] = {ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_MOMENTS};

static void close_directory(DIR **dir)
{
    if (*dir)
        closedir(*dir);
    *dir = NULL;
}

bool path_exists(const char *path)
{
    struct stat info;

    return lstat(path, &info) == 0;
}

static int check_entry(const char *directory, const char *name, unsigned *found)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    struct stat info;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (lstat(path, &info) < 0)
        return claas_fail_errno("%s", path);
    for (unsigned i = 0; i < CLAAS_COUNT(names); i++) {
        if (strcmp(name, names[i]) != 0)
            continue;
        if (!S_ISREG(info.st_mode))
            return claas_fail(CLAAS_ERR_FORMAT, "%s is no plain file", path);
        *found |= 1u << i;
        return 0;
    }
    return claas_fail(CLAAS_ERR_FORMAT, "%s does not belong to an adapter", path);
}

/* Bits of the names that are there. */
static int list_files(const char *directory, unsigned *found)
{
    CLAAS_AUTO(close_directory) DIR *dir = opendir(directory);
    struct dirent *entry;

    if (!dir)
        return claas_fail_errno("%s", directory);
    *found = 0;
    for (;;) {
        int rc;

        errno = 0;
        entry = readdir(dir);
        if (!entry)
            break;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        rc = check_entry(directory, entry->d_name, found);
        if (rc < 0)
            return rc;
    }
    if (errno)
        return claas_fail_errno("%s", directory);
    if ((*found & 3u) != 3u)
        return claas_fail(CLAAS_ERR_FORMAT, "%s: %s is missing", directory,
                          *found & 1u ? ADAPTER_WEIGHTS : ADAPTER_CONFIG);
    return 0;
}

static int read_config(const char *directory, struct adapter_facts *facts)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, ADAPTER_CONFIG);
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *config = NULL;
    const char *base_model = "";
    size_t length = 0;
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = claas_file_read(path, CONFIG_BYTES_MAX, &text, &length);
    if (rc < 0)
        return rc;
    rc = claas_json_parse(text, length, CONFIG_BYTES_MAX, &config);
    if (rc == 0)
        rc = claas_json_get_int(config, "r", 1, 65536, &facts->rank);
    if (rc == 0)
        rc = claas_fail(CLAAS_ERR_FORMAT, "'r' is missing");
    if (rc > 0)
        rc = claas_json_get_number(config, "lora_alpha", 0, 1e9, &facts->alpha);
    if (rc == 0)
        rc = claas_fail(CLAAS_ERR_FORMAT, "'lora_alpha' is missing");
    if (rc > 0)
        rc = claas_json_get_string(config, "base_model_name_or_path", &base_model);
    if (rc < 0) {
        claas_fail_context(rc, "%s: ", path);
        return rc == CLAAS_ERR_NO_MEMORY ? rc : CLAAS_ERR_FORMAT;
    }
    /* A path too long for the column is no name worth keeping. */
    if (claas_copy_text(facts->base_model, sizeof(facts->base_model), base_model) < 0)
        facts->base_model[0] = '\0';
    return 0;
}

static int check_weights(const char *directory, const char *name, bool *nonzero_b, int64_t *bytes)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    struct stat info;
    int rc;

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = safetensors_check(path, nonzero_b);
    if (rc < 0)
        return rc;
    if (stat(path, &info) < 0)
        return claas_fail_errno("%s", path);
    *bytes = (int64_t)info.st_size;
    return 0;
}

int adapter_check(const char *directory, bool look_for_training, struct adapter_facts *ret)
{
    struct adapter_facts facts = {0};
    int64_t ignored;
    unsigned found = 0;
    int rc = list_files(directory, &found);

    if (rc == 0)
        rc = read_config(directory, &facts);
    if (rc == 0)
        rc = check_weights(directory, ADAPTER_WEIGHTS, look_for_training ? &facts.trained : NULL,
                           &facts.bytes);
    facts.moments = found & 4u;
    if (rc == 0 && facts.moments)
        rc = check_weights(directory, ADAPTER_MOMENTS, NULL, &ignored);
    if (rc < 0)
        return rc;
    *ret = facts;
    return 0;
}

int adapter_sync(const char *directory)
{
    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, names[i]);
        int rc;

        if (!path)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        if (!path_exists(path))
            continue;
        rc = claas_fsync_path(path);
        if (rc < 0)
            return rc;
    }
    return claas_fsync_path(directory);
}

/* The two directories above `target` were perhaps made just now: their own entries must be durable
 * too. */
static int sync_parents(const char *target, int levels)
{
    CLAAS_AUTO_FREE char *path = claas_strdup(target);

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < levels; i++) {
        char *slash = strrchr(path, '/');
        int rc = claas_fsync_parent(path);

        if (rc < 0)
            return rc;
        if (!slash || slash == path)
            return 0;
        *slash = '\0';
    }
    return 0;
}

int adapter_move(const char *source, const char *target)
{
    CLAAS_AUTO_FREE char *parent = claas_strdup(target);
    char *slash;
    int rc;

    if (!parent)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    slash = strrchr(parent, '/');
    if (slash && slash != parent) {
        *slash = '\0';
        rc = claas_mkdir_all(parent);
        if (rc < 0)
            return rc;
    }
    /* rename would replace an empty directory. */
    if (path_exists(target))
        return claas_fail(CLAAS_ERR_EXISTS, "%s exists", target);
    if (rename(source, target) < 0)
        return claas_fail_errno("%s cannot become %s", source, target);
    rc = sync_parents(target, 3);
    if (rc == 0)
        rc = claas_fsync_parent(source);
    return rc;
}

int adapter_check_staged(const char *directory, const char *staging)
{
    CLAAS_AUTO_FREE char *real_staging = realpath(staging, NULL);
    CLAAS_AUTO_FREE char *real = realpath(directory, NULL);
    size_t length = real_staging ? strlen(real_staging) : 0;
    struct stat info;

    if (!real_staging)
        return claas_fail_errno("%s", staging);
    if (!real)
        return claas_fail_errno("staged directory %s", directory);
    if (strncmp(real, real_staging, length) != 0 || real[length] != '/' ||
        strchr(real + length + 1, '/'))
        return claas_fail(CLAAS_ERR_INVALID, "%s is not in the staging folder %s", directory,
                          real_staging);
    if (lstat(directory, &info) < 0)
        return claas_fail_errno("%s", directory);
    if (!S_ISDIR(info.st_mode))
        return claas_fail(CLAAS_ERR_FORMAT, "%s is no directory", directory);
    return 0;
}
