/* Which operation table runs: the fastest one whose instructions this CPU has, or a slower one on
 * request (CLAAS_CPU = ref | avx2 | avx512 | avx512bf16 | amx). The tables of a precision are
 * listed from the slowest up; every one is complete, so picking is walking the list. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "claas/mem.h"
#include "cpu/ops_impl.h"

/* of <asm/prctl.h>, since Linux 5.16 */
#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA  18

enum level { LEVEL_REF, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512BF16, LEVEL_AMX, LEVEL_COUNT };

static const char *const level_names[LEVEL_COUNT] = {"ref", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)
#define X86_TABLES_BF16                                                                            \
    &claas_ops_bf16_avx2, &claas_ops_bf16_avx512, &claas_ops_bf16_avx512bf16, &claas_ops_bf16_amx
#define X86_TABLES_F32 &claas_ops_f32_avx2, &claas_ops_f32_avx512, NULL, NULL
#else
#define X86_TABLES_BF16 NULL
#define X86_TABLES_F32  NULL
#endif

/* NULL: this level adds nothing to the precision. */
static const struct claas_ops *const tables[2][LEVEL_COUNT] = {
    [CLAAS_PRECISION_BF16] = {&claas_ops_bf16_ref, X86_TABLES_BF16},
    [CLAAS_PRECISION_F32] = {&claas_ops_f32_ref, X86_TABLES_F32},
};

#if defined(__x86_64__)
/* The matrix unit, which a process must ask Linux for before its threads start: the kernel then
 * saves 8 KB more per thread. */
static bool has_amx(void)
{
    unsigned a = 0, b = 0, c = 0, d = 0;
    const unsigned needed = 1u << 22 | 1u << 24; /* AMX-BF16, AMX-TILE */

    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed)
        return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

/* The highest level whose instructions the CPU has and the system saves. */
static enum level cpu_level(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return LEVEL_REF;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return LEVEL_AVX2;
    if (!__builtin_cpu_supports("avx512bf16"))
        return LEVEL_AVX512;
    return has_amx() ? LEVEL_AMX : LEVEL_AVX512BF16;
#else
    return LEVEL_REF;
#endif
}

static enum level wanted_level(void)
{
    const char *name = getenv("CLAAS_CPU");

    for (int i = 0; name && i < LEVEL_COUNT; i++)
        if (strcmp(name, level_names[i]) == 0)
            return (enum level)i;
    return LEVEL_COUNT;
}

const struct claas_ops *claas_ops_pick(enum claas_precision precision)
{
    const enum level have = cpu_level(), want = wanted_level();
    int level = want < have ? want : have;

    while (!tables[precision][level])
        level--;
    return tables[precision][level];
}

const struct claas_ops *claas_ops_at(enum claas_precision precision, int index)
{
    const int have = cpu_level();

    for (int i = 0; i <= have; i++)
        if (tables[precision][i] && index-- == 0)
            return tables[precision][i];
    return NULL;
}

size_t claas_panel_bytes(enum claas_precision precision, int n, int k)
{
    const size_t panels = (size_t)divide_up(n, CLAAS_LANES);

    return panels * (precision == CLAAS_PRECISION_BF16 ? panel_elements_bf16(k) * sizeof(claas_bf16)
                                                       : panel_elements_f32(k) * sizeof(float));
}

size_t claas_kv_block_bytes(enum claas_precision precision, int head_dim)
{
    const size_t act_bytes = precision == CLAAS_PRECISION_BF16 ? sizeof(claas_bf16) : sizeof(float);

    return (size_t)2 * CLAAS_KV_BLOCK * (size_t)head_dim * act_bytes;
}
