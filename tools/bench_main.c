/* `claas-bench`: the benchmarks that need only the device, for builds without the server. */
#include "bench.h"

#include "claas/err.h"
#include "verbs.h"

int bench_cycle(const struct bench_args *args)
{
    return claas_fail(
        CLAAS_ERR_UNSUPPORTED,
        "this program has no server, which learning cycles need: use claas bench cycle");
}

int main(int argc, char **argv)
{
    return claas_bench_main(argc, argv);
}
