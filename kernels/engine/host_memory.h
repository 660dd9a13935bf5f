/* How much of the host's memory this process may have: all of the machine's, or less where it runs
 * in a container or a service with a limit. Pages beyond that limit are not refused: the process is
 * killed for them. */
#ifndef CLAAS_ENGINE_HOST_MEMORY_H
#define CLAAS_ENGINE_HOST_MEMORY_H

#include <stdint.h>

/* In bytes. */
uint64_t claas_host_memory(void);

/* The smallest limit, in bytes, of the control groups (versions 1 and 2) that the process is in by
 * the file `membership` (/proc/self/cgroup), read below `top` (/sys/fs/cgroup); UINT64_MAX if there
 * is none. */
uint64_t claas_cgroup_limit(const char *top, const char *membership);

#endif
