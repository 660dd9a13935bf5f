/* How many prompt tokens a pass may run. Alone a prompt is read in large chunks; beside a chat that
 * streams, a pass must not take longer than about two slices, or the chat would falter. A pass has
 * a fixed cost (it reads all weights), so the time for a token depends on how many there are: the
 * budget is steered by the time of whole passes that used it up. */
#include "engine/engine.h"

static double streaming_target_ns(const claas_device_t *device)
{
    return 2e6 * device->options.slice_ms;
}

/* Whether a chat's answer is under way, whose next token the pass would delay. */
static bool is_streaming(const claas_device_t *device)
{
    for (struct claas_request *r = device->running.first; r != NULL; r = r->next) {
        const struct claas_sequence *seq = (const struct claas_sequence *)r;

        if (seq->priority != CLAAS_PRIORITY_CHAT)
            break;
        if (seq->count > seq->prompt_count && seq->computed == seq->count - 1)
            return true;
    }
    return false;
}

int claas_budget_find(claas_device_t *device)
{
    int most = device->options.prefill_chunk;
    int budget = most;

    device->streaming = is_streaming(device);
    if (device->streaming) {
        if (!(device->streaming_tokens > 0) && device->ns_per_token > 0)
            device->streaming_tokens = streaming_target_ns(device) / device->ns_per_token;
        if (device->streaming_tokens > 0 && device->streaming_tokens < most)
            budget = (int)device->streaming_tokens / CLAAS_KV_BLOCK_TOKENS * CLAAS_KV_BLOCK_TOKENS;
    }
    return budget < CLAAS_KV_BLOCK_TOKENS ? CLAAS_KV_BLOCK_TOKENS : budget;
}

void claas_budget_learn(claas_device_t *device, int tokens, int64_t ns)
{
    double ratio = streaming_target_ns(device) / (double)(ns > 0 ? ns : 1);

    if (tokens < CLAAS_KV_BLOCK_TOKENS)
        return;
    device->ns_per_token = (double)ns / tokens;
    if (!device->streaming || !(device->streaming_tokens > 0) ||
        tokens < (int)device->streaming_tokens / CLAAS_KV_BLOCK_TOKENS * CLAAS_KV_BLOCK_TOKENS)
        return;
    ratio = ratio < 0.5 ? 0.5 : ratio > 2 ? 2 : ratio;
    device->streaming_tokens *= ratio;
    if (device->streaming_tokens < CLAAS_KV_BLOCK_TOKENS)
        device->streaming_tokens = CLAAS_KV_BLOCK_TOKENS;
    if (device->streaming_tokens > device->options.prefill_chunk)
        device->streaming_tokens = device->options.prefill_chunk;
}
