/* Memory of the CPU back-end: regions of zeroed pages and a bump allocator over one of them.
 *
 * Regions come from mmap rather than malloc: the KV pool is sized for the longest context but
 * rarely filled, and pages that nobody touched cost nothing; a region given back returns to the
 * system at once. Huge pages are asked for where the memory is streamed through (weights: one 2 MB
 * page instead of 512 TLB entries). */
#include "cpu/step.h"

#include "claas/err.h"

#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)

int claas_cpu_region_new(struct cpu_region *region, size_t bytes, const char *what)
{
    void *base;

    if (bytes == 0)
        bytes = 64;
    base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
    if (base == MAP_FAILED)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no memory for %s: %zu bytes", what, bytes);
    region->base = base;
    region->bytes = bytes;
    return 0;
}

void claas_cpu_region_huge(const struct cpu_region *region)
{
    /* A hint: a kernel without huge pages refuses it, and that is fine. */
    if (region->bytes >= HUGE_PAGE)
        (void)madvise(region->base, region->bytes, MADV_HUGEPAGE);
}

void claas_cpu_region_done(struct cpu_region *region)
{
    if (region->base)
        (void)munmap(region->base, region->bytes);
    region->base = NULL;
    region->bytes = 0;
}

void *claas_cpu_take(struct cpu_arena *arena, size_t bytes)
{
    void *place = arena->base ? arena->base + arena->used : NULL;

    arena->used += (bytes + 63) & ~(size_t)63;
    return place;
}
