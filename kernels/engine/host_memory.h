/* How much of the host's memory this process may have: all of the machine's, or less where it runs
 * in a container or a service with a limit. Pages beyond that limit do not fail to be had: the
 * process is killed for them. */
#ifndef CLAAS_ENGINE_HOST_MEMORY_H
#define CLAAS_ENGINE_HOST_MEMORY_H

#include <stdint.h>

uint64_t claas_host_memory(void);

/* The least limit of the control groups that `membership` (as /proc/self/cgroup) says the process
 * is in, of both versions, with `top` as /sys/fs/cgroup; UINT64_MAX if there is none. */
uint64_t claas_cgroup_limit(const char *top, const char *membership);

#endif
