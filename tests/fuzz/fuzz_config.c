/* libFuzzer entry for configuration files: whatever the bytes, an error or a configuration. clang
 * -fsanitize=fuzzer,address,undefined with this file and the base and runtime libraries' sources.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "claas/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static int fd = -1;
    claas_config_t *config = NULL;
    char path[64];

    if (fd < 0)
        fd = memfd_create("config", 0);
    if (ftruncate(fd, 0) < 0 || pwrite(fd, data, size, 0) != (ssize_t)size)
        __builtin_trap();
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    claas_config_load(path, NULL, 0, &config);
    claas_config_free(&config);
    return 0;
}
