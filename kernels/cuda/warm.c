/* Passes before the first chat. Kernels are loaded when they are first used, and cuBLASLt's
 * products of a new size class are timed then, each with several algorithms: milliseconds each, in
 * a pass that nothing can come between, while every chat waits. So there is a pass of every class
 * of rows, without an adapter, over key/value blocks that nobody uses yet. What is chosen is kept
 * in a file (gemm_choices.h), so all but a machine's first start take a fraction of a second.
 * CLAAS_CUDA_WARM=0: no such passes. */
#include "cuda/pass.h"

#include "claas/clock.h"
#include "claas/log.h"
#include "claas/mem.h"

#define LONGEST_MS 5000 /* what is left then is for the chats */

static int least(int a, int b)
{
    return a < b ? a : b;
}

/* m tokens of a sequence, and the score of the last one. */
static int run_rows(claas_backend_t *backend, int m, const int32_t *tokens, const int32_t *blocks)
{
    const struct claas_segment segment = {
        .tokens = tokens, .count = m, .blocks = blocks, .wanted = 1};
    struct claas_sample sample = {.temperature = 1, .top_p = 1};

    return cuda_forward(backend, &segment, 1, &sample);
}

int cuda_warm(claas_backend_t *backend)
{
    const int64_t start = claas_clock_ms();
    const int room = least(backend->kv_blocks, INT32_MAX / CUDA_KV_BLOCK) * CUDA_KV_BLOCK;
    const int most = least(least(backend->max_tokens, room), backend->model.config.context);
    CLAAS_AUTO_FREE int32_t *tokens = CLAAS_NEW_ARRAY(int32_t, (size_t)most);
    CLAAS_AUTO_FREE int32_t *blocks = CLAAS_NEW_ARRAY(int32_t, (size_t)(most / CUDA_KV_BLOCK) + 1);
    int code = 0, passes = 0;

    if (cuda_is_off("CLAAS_CUDA_WARM"))
        return 0;
    if (!tokens || !blocks)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i <= most / CUDA_KV_BLOCK; i++)
        blocks[i] = i;
    for (int m = 1; m <= most && code >= 0 && claas_clock_ms() - start < LONGEST_MS;
         m = cuda_gemm_class(m) + 1, passes++)
        code = run_rows(backend, least(cuda_gemm_class(m), most), tokens, blocks);
    cuda_gemm_keep(&backend->context);
    if (code == CLAAS_ERR_DEVICE_LOST)
        return code;
    if (code < 0)
        claas_warning("passes before the first chat: %s", claas_error_text());
    else
        claas_info("%d passes before the first chat, %lld ms", passes,
                   (long long)(claas_clock_ms() - start));
    return 0;
}
