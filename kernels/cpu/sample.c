/* From logits to a token and its log-prob.
 *
 * The log-prob is always the one at temperature 1 over the whole vocabulary, logit - logsumexp, by
 * the routine that the loss uses: what a rollout recorded is what training sees. The choice: greedy
 * takes the largest logit, the lowest id among equals. Otherwise probabilities p_i ~ exp((z_i -
 * max) / T); top-k keeps the k likeliest, top-p the shortest list of the likeliest whose mass
 * reaches top_p (always one); one uniform number u picks the first kept token where the running
 * mass exceeds u * kept mass. Without a filter tokens are walked in order of id, so nothing is
 * sorted. */
#include "cpu/step.h"

#include "claas/err.h"
#include "claas/random.h"

#include <math.h>

/* The number of sampling's random stream, different from those of initial weights. */
#define SAMPLE_STREAM 1

struct candidate {
    float p, logit;
    int32_t id;
};

size_t claas_cpu_sample_bytes(int vocab)
{
    return ((size_t)vocab * (sizeof(float) + sizeof(struct candidate)) + 63) & ~(size_t)63;
}

static int32_t greedy(const float *logits, int vocab)
{
    int32_t best = 0;

    for (int i = 1; i < vocab; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Whether a comes before b: likelier, or as likely with a lower id. Compared by logits, since near
 * ones may have the same p by one exponential function and not by another. */
static bool before(struct candidate a, struct candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* Restores the heap (the first candidate on top) below `root`. */
static void sink(struct candidate *heap, int count, int root)
{
    struct candidate moving = heap[root];

    for (int child = 2 * root + 1; child < count; child = 2 * root + 1) {
        if (child + 1 < count && before(heap[child + 1], heap[child]))
            child++;
        if (!before(heap[child], moving))
            break;
        heap[root] = heap[child];
        root = child;
    }
    heap[root] = moving;
}

static int32_t draw(const float *p, int vocab, double sum, float u)
{
    double target = u * sum, mass = 0;
    int32_t last = 0;

    for (int i = 0; i < vocab; i++) {
        if (p[i] <= 0)
            continue;
        mass += p[i];
        last = i;
        if (mass > target)
            break;
    }
    return last;
}

/* Pops the likeliest candidates off a heap, to the end of its array, until top-k or top-p is
 * reached; then draws among them. */
static int32_t draw_filtered(const struct claas_sample *sample, const float *logits, const float *p,
                             int vocab, double sum, float u, struct candidate *heap)
{
    /* Tokens below this floor weigh less than 1 - top_p all together: the nucleus lies above it. */
    float floor = (float)((1.0 - sample->top_p) * sum / vocab);
    int top_k = sample->top_k > 0 && sample->top_k < vocab ? sample->top_k : vocab;
    double wanted = sample->top_p < 1 ? sample->top_p * sum : 2 * sum;
    double mass = 0, target, walked = 0;
    int count = 0, kept = 0, end;

    for (int i = 0; i < vocab; i++)
        if (p[i] > 0 && p[i] >= floor)
            heap[count++] = (struct candidate){p[i], logits[i], i};
    for (int i = count / 2 - 1; i >= 0; i--)
        sink(heap, count, i);
    end = count;
    while (kept < top_k && kept < end && mass < wanted) {
        struct candidate best = heap[0];

        mass += best.p;
        kept++;
        heap[0] = heap[--count];
        if (count > 0)
            sink(heap, count, 0);
        heap[count] = best;
    }
    target = u * mass;
    for (int i = 1; i < kept; i++) {
        walked += heap[end - i].p;
        if (walked > target)
            return heap[end - i].id;
    }
    return heap[end - kept].id;
}

static int32_t choose(const struct claas_sample *sample, const float *logits, int vocab,
                      uint8_t *scratch)
{
    float *p = (float *)(void *)scratch;
    struct candidate *heap = (struct candidate *)(void *)(p + vocab);
    float u = claas_random_uniform(sample->seed, SAMPLE_STREAM, sample->index);
    int32_t best = greedy(logits, vocab);
    double sum = 0;

    if (sample->temperature <= 0 || sample->top_k == 1)
        return best;
    for (int i = 0; i < vocab; i++)
        p[i] = expf((logits[i] - logits[best]) / sample->temperature);
    for (int i = 0; i < vocab; i++)
        sum += p[i];
    if (sample->top_p >= 1 && (sample->top_k <= 0 || sample->top_k >= vocab))
        return draw(p, vocab, sum, u);
    return draw_filtered(sample, logits, p, vocab, sum, u, heap);
}

/* The likeliest tokens, best first, by insertion: the list is short and most logits miss its end.
 */
static void list_top(struct claas_sample *sample, const float *logits, int vocab, float lse)
{
    int want = sample->top_logprobs, have = 0;
    float best[CLAAS_TOP_LOGPROBS_MAX];

    if (want > CLAAS_TOP_LOGPROBS_MAX)
        want = CLAAS_TOP_LOGPROBS_MAX;
    for (int i = 0; i < vocab && want > 0; i++) {
        int place = have;

        if (have == want && logits[i] <= best[want - 1])
            continue;
        while (place > 0 && logits[i] > best[place - 1])
            place--;
        if (have < want)
            have++;
        for (int j = have - 1; j > place; j--) {
            best[j] = best[j - 1];
            sample->top_tokens[j] = sample->top_tokens[j - 1];
        }
        best[place] = logits[i];
        sample->top_tokens[place] = i;
    }
    for (int i = 0; i < have; i++)
        sample->top_logprob[i] = best[i] - lse;
    for (int i = have; i < sample->top_logprobs && i < CLAAS_TOP_LOGPROBS_MAX; i++) {
        sample->top_tokens[i] = -1;
        sample->top_logprob[i] = -INFINITY;
    }
}

struct sample_task {
    claas_backend_t *backend;
    const float *logits;
    struct claas_sample *samples;
};

static void sample_row(void *arg, int row)
{
    struct sample_task *task = arg;
    int vocab = task->backend->model.config.vocab;
    const float *logits = task->logits + (size_t)row * (size_t)vocab;
    struct claas_sample *sample = &task->samples[row];
    uint8_t *scratch =
        task->backend->forward.sampling +
        (size_t)claas_pool_member(task->backend->pool) * claas_cpu_sample_bytes(vocab);
    float lse = claas_logsumexp(logits, vocab);

    sample->token = -1;
    if (!isfinite(lse))
        return;
    sample->token = sample->given;
    if (sample->given < 0 || sample->given >= vocab)
        sample->token = choose(sample, logits, vocab, scratch);
    sample->logprob = logits[sample->token] - lse;
    list_top(sample, logits, vocab, lse);
}

void claas_cpu_sample(claas_backend_t *backend, int m, const float *logits,
                      struct claas_sample *samples)
{
    struct sample_task task = {.backend = backend, .logits = logits, .samples = samples};

    claas_pool_run(backend->pool, m, sample_row, &task);
}
