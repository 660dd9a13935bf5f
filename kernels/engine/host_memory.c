/* The host's memory: see host_memory.h. A line of /proc/self/cgroup is "number:controllers:group";
 * version 2 has one line without controllers. Source: man 7 cgroups. */
#include "engine/host_memory.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/file.h"
#include "claas/mem.h"

#define FILE_MAX ((size_t)64 << 10)

/* "max" means no limit, as does a missing file; version 1 says so with a number beyond all
 * memory. */
static uint64_t read_limit(const char *directory, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length = 0;

    if (path == NULL || claas_file_read(path, FILE_MAX, &text, &length) < 0)
        return UINT64_MAX;
    return text[0] >= '0' && text[0] <= '9' ? strtoull(text, NULL, 10) : UINT64_MAX;
}

/* A group's limit holds for the groups within it too, so all from the process's own up to the top
 * are read. A container often sees its own group as the top, under another name than membership
 * says. */
static uint64_t find_least(const char *top, const char *group, const char *name)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s%s", top, group);
    uint64_t least = UINT64_MAX;

    while (path != NULL && strlen(path) >= strlen(top)) {
        uint64_t limit = read_limit(path, name);

        if (limit < least)
            least = limit;
        *strrchr(path, '/') = '\0';
    }
    return least;
}

/* Cuts the list. */
static bool has_memory(char *controllers)
{
    char *rest = NULL;

    for (char *one = strtok_r(controllers, ",", &rest); one != NULL;
         one = strtok_r(NULL, ",", &rest))
        if (strcmp(one, "memory") == 0)
            return true;
    return false;
}

/* Cuts the line. */
static uint64_t find_limit(const char *top, char *line)
{
    CLAAS_AUTO_FREE char *first_version = claas_format("%s/memory", top);
    char *controllers = strchr(line, ':');
    char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;

    if (group == NULL || group[1] != '/' || first_version == NULL)
        return UINT64_MAX;
    *group++ = '\0';
    controllers++;
    if (controllers[0] == '\0')
        return find_least(top, group, "memory.max");
    return has_memory(controllers) ? find_least(first_version, group, "memory.limit_in_bytes")
                                   : UINT64_MAX;
}

uint64_t claas_cgroup_limit(const char *top, const char *membership)
{
    CLAAS_AUTO_FREE char *text = NULL;
    uint64_t least = UINT64_MAX;
    size_t length = 0;
    char *rest = NULL;

    if (claas_file_read(membership, FILE_MAX, &text, &length) < 0)
        return UINT64_MAX;
    for (char *line = strtok_r(text, "\n", &rest); line != NULL;
         line = strtok_r(NULL, "\n", &rest)) {
        uint64_t limit = find_limit(top, line);

        if (limit < least)
            least = limit;
    }
    return least;
}

uint64_t claas_host_memory(void)
{
    uint64_t all = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t limit = claas_cgroup_limit("/sys/fs/cgroup", "/proc/self/cgroup");

    return limit < all ? limit : all;
}
