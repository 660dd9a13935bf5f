/* Serving on the device as a whole: decoding by graphs gives the bits of decoding without, rows do
 * not depend on what fills up their pass nor on how far others have come, the pool of keys and
 * values has the size of the card and bounds what runs, and a step without memory fails and leaves
 * everything usable. */
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "cuda/cuda_backend.h"
#include "cuda/pass.h"
#include "engine/engine.h"
#include "shard.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TOKENS 320
#define SKIP       77

static int passed, failed;
static char why[64 + CLAAS_ERROR_TEXT_BYTES]; /* the group's first failure, or "" */

#define FAIL(...)                                                                                  \
    do {                                                                                           \
        if (!why[0])                                                                               \
            (void)snprintf(why, sizeof(why), __VA_ARGS__);                                         \
    } while (0)

static void finish(const char *name)
{
    if (why[0])
        printf("FAILED %s: %s\n", name, why);
    else
        printf("ok %s\n", name);
    failed += why[0] != '\0';
    passed += why[0] == '\0';
    why[0] = '\0';
    (void)fflush(stdout);
}

/* What must work for anything to be tested. */
static void must(int code, const char *what)
{
    if (code >= 0)
        return;
    printf("FAILED %s: %s\n%d passed, %d failed\n", what, claas_error_text(), passed, failed + 1);
    exit(1);
}

/* --- a model, adapters --- */

struct rig {
    claas_model_t *model;
    const struct claas_model_config *config;
    const struct claas_backend_ops *ops;
    claas_backend_t *backend;
};

static claas_model_t *open_model(const char *name)
{
    struct claas_model_options options = {.path = name, .chat_template = "chatml"};
    claas_model_t *model = NULL;

    must(claas_model_open(&options, &model), name);
    return model;
}

static struct rig rig_open(const char *name, const char *precision, int kv_blocks)
{
    struct claas_backend_options options = {
        .precision = precision, .kv_blocks = kv_blocks, .max_tokens = MAX_TOKENS};
    struct rig rig = {.model = open_model(name), .ops = &claas_backend_cuda};

    rig.config = claas_model_config(rig.model);
    must(rig.ops->open(&options, rig.model, &rig.backend), "opening the back-end");
    return rig;
}

static void rig_close(struct rig *rig)
{
    rig->ops->free(&rig->backend);
    claas_model_free(&rig->model);
}

static claas_backend_adapter_t *adapter_new(const struct rig *rig, int rank, uint64_t seed)
{
    struct claas_lora_config lora = {.rank = rank, .alpha = 16, .modules = CLAAS_MODULE_ALL};
    struct claas_adapter_image image = {.lora = lora};
    size_t count = claas_lora_parameter_count(rig->config, &lora);
    claas_backend_adapter_t *adapter = NULL;

    image.parameters = CLAAS_NEW_ARRAY(float, count);
    for (size_t i = 0; i < count; i++)
        image.parameters[i] = 0.05f * claas_random_normal(seed, 77, i);
    must(rig->ops->adapter_new(rig->backend, &lora, CLAAS_ADAPTER_TRAIN, &adapter), "an adapter");
    must(rig->ops->adapter_upload(rig->backend, adapter, &image), "an adapter");
    claas_adapter_image_done(&image);
    return adapter;
}

/* --- sequences --- */

#define LONGEST 4224

struct seq {
    int32_t tokens[LONGEST], blocks[LONGEST / CLAAS_KV_BLOCK_TOKENS];
    int count, end;
};

static int below(uint64_t seed, uint64_t index, int limit)
{
    return (int)(claas_random_uniform(seed, 3, index) * (float)limit);
}

/* A new sequence of `count` tokens in the given blocks, all of which but the last are computed. */
static void seq_start(const struct rig *rig, struct seq *seq, uint64_t seed, int count,
                      const int32_t *blocks, claas_backend_adapter_t *adapter)
{
    int needed = (count + 63) / CLAAS_KV_BLOCK_TOKENS + 1;

    for (int i = 0; i < count; i++)
        seq->tokens[i] = below(seed, (uint64_t)i, rig->config->vocab);
    memcpy(seq->blocks, blocks, (size_t)needed * sizeof(*blocks));
    seq->count = count;
    seq->end = count + 40;
    for (int pos = 0; pos < count - 1; pos += 256) {
        int left = count - 1 - pos;
        struct claas_segment segment = {.tokens = seq->tokens + pos,
                                        .count = left < 256 ? left : 256,
                                        .pos = pos,
                                        .blocks = seq->blocks,
                                        .adapter = adapter};

        must(rig->ops->forward(rig->backend, &segment, 1, NULL), "a prompt");
    }
}

/* The row at position pos of a sequence. */
static struct claas_segment row_of(const struct seq *seq, int pos, claas_backend_adapter_t *adapter)
{
    return (struct claas_segment){.tokens = seq->tokens + pos,
                                  .count = 1,
                                  .pos = pos,
                                  .blocks = seq->blocks,
                                  .adapter = adapter,
                                  .wanted = 1};
}

/* --- with graphs and without --- */

#define SEQS  40
#define STEPS 120
#define POOL  640

struct record {
    int32_t token;
    float logprob;
};
struct script {
    struct rig rig;
    struct seq seqs[SEQS];
    claas_backend_adapter_t *adapters[3]; /* the first is none */
    int32_t free_blocks[POOL];
    int free_count, starts;
    struct record records[SEQS * STEPS];
    int count;
};

/* Blocks for a prompt and its answer, in no order, out of those that nobody has. */
static void restart(struct script *s, int i, claas_backend_adapter_t *adapter)
{
    struct seq *seq = &s->seqs[i];
    uint64_t seed = 1000 + (uint64_t)s->starts++;
    int count = 1 + below(seed, 0, i == 0 ? 600 : 60), needed = (count + 63) / 16 + 1;
    int32_t blocks[LONGEST / CLAAS_KV_BLOCK_TOKENS];

    if (seq->count > 0)
        for (int b = 0; b < (seq->end - 40 + 63) / 16 + 1; b++)
            s->free_blocks[s->free_count++] = seq->blocks[b];
    for (int b = 0; b < needed; b++) {
        int at = below(seed, 1 + (uint64_t)b, s->free_count);

        blocks[b] = s->free_blocks[at];
        s->free_blocks[at] = s->free_blocks[--s->free_count];
    }
    seq_start(&s->rig, seq, seed, count, blocks, adapter);
}

/* A pass: some of the sequences, in changing number and order; adapters in the middle third, one of
 * which is another one after half of it. */
static void run_step(struct script *s, int step)
{
    struct claas_segment segments[SEQS];
    struct claas_sample samples[SEQS] = {0};
    int chosen[SEQS], rows = 1 + step * 7 % SEQS;

    if (step == STEPS / 2) {
        s->rig.ops->adapter_free(s->rig.backend, &s->adapters[2]);
        s->adapters[2] = adapter_new(&s->rig, 16, 99);
    }
    for (int i = 0; i < rows; i++) {
        int n = chosen[i] = (step * 3 + i * (step % 2 ? 1 : SEQS - 1)) % SEQS;
        bool adapted = step >= STEPS / 3 && step < 2 * STEPS / 3;
        claas_backend_adapter_t *adapter = s->adapters[adapted ? (n + step / 10) % 3 : 0];
        struct seq *seq = &s->seqs[n];

        if (seq->count == 0 || seq->count == seq->end)
            restart(s, n, adapter);
        segments[i] = row_of(seq, seq->count - 1, adapter);
        samples[i] = (struct claas_sample){.temperature = 0.8f,
                                           .top_p = 0.95f,
                                           .seed = (uint64_t)n,
                                           .index = (uint64_t)seq->count,
                                           .given = -1};
    }
    must(s->rig.ops->forward(s->rig.backend, segments, rows, samples), "decoding");
    for (int i = 0; i < rows; i++) {
        struct seq *seq = &s->seqs[chosen[i]];

        s->records[s->count++] = (struct record){samples[i].token, samples[i].logprob};
        if (samples[i].token < 0)
            FAIL("step %d, row %d of %d: the logits are not finite", step, i, rows);
        seq->tokens[seq->count++] = samples[i].token < 0 ? 0 : samples[i].token;
    }
}

static void run_script(struct script *s, const char *model, const char *precision, bool graphs)
{
    const struct cuda_graphs *seen;

    memset(s, 0, sizeof(*s));
    (void)setenv("CLAAS_CUDA_GRAPHS", graphs ? "1" : "0", 1);
    s->rig = rig_open(model, precision, POOL);
    seen = &s->rig.backend->forward.graphs;
    for (int i = 0; i < POOL; i++)
        s->free_blocks[s->free_count++] = i;
    s->adapters[1] = adapter_new(&s->rig, 8, 1);
    s->adapters[2] = adapter_new(&s->rig, 4, 2);
    for (int step = 0; step < STEPS; step++)
        run_step(s, step);
    if (graphs ? seen->captures < 5 || seen->replays < STEPS / 8
               : seen->captures > 0 || seen->replays > 0)
        FAIL("%d captures, %d replays %s graphs", (int)seen->captures, (int)seen->replays,
             graphs ? "with" : "without");
    for (int i = 1; i < 3; i++)
        s->rig.ops->adapter_free(s->rig.backend, &s->adapters[i]);
    rig_close(&s->rig);
    (void)unsetenv("CLAAS_CUDA_GRAPHS");
}

static void test_graphs(const char *model, const char *precision)
{
    struct script *with = CLAAS_NEW(struct script), *without = CLAAS_NEW(struct script);
    char name[128];

    run_script(without, model, precision, false);
    run_script(with, model, precision, true);
    for (int i = 0; i < with->count; i++)
        if (memcmp(&with->records[i], &without->records[i], sizeof(struct record)) != 0)
            FAIL("sample %d of %d: token %d with %.9g, without graphs %d with %.9g", i, with->count,
                 with->records[i].token, (double)with->records[i].logprob,
                 without->records[i].token, (double)without->records[i].logprob);
    (void)snprintf(name, sizeof(name), "graphs change nothing, %s %s", model, precision);
    finish(name);
    free(with);
    free(without);
}

/* --- rows and their neighbours --- */

#define GROUP  8
#define PROMPT 64

/* Log-probs of fixed tokens behind `n` sequences at their present ends, in the order of `which`. */
static void score(const struct rig *rig, const struct seq *seqs, const int *which, int n,
                  claas_backend_adapter_t *const *adapters, float *out)
{
    struct claas_segment segments[GROUP];
    struct claas_sample samples[GROUP] = {0};

    for (int i = 0; i < n; i++) {
        segments[i] = row_of(&seqs[which[i]], seqs[which[i]].count - 1, adapters[which[i]]);
        samples[i].given = which[i] + 1;
    }
    must(rig->ops->forward(rig->backend, segments, n, samples), "scoring");
    for (int i = 0; i < n; i++)
        out[i] = samples[i].logprob;
}

static void expect_same(const char *what, int row, float got, float want)
{
    if (memcmp(&got, &want, sizeof(got)) != 0 || !isfinite(got))
        FAIL("%s, sequence %d: %.9g, want %.9g", what, row, (double)got, (double)want);
}

/* GROUP sequences; adapted: of each three one is without an adapter. */
static void start_group(const struct rig *rig, struct seq *seqs, claas_backend_adapter_t **adapters,
                        bool adapted)
{
    for (int i = 0; i < GROUP; i++) {
        int32_t blocks[16];

        for (int b = 0; b < 16; b++)
            blocks[b] = b * GROUP + i;
        adapters[i] = adapted && i % 3 ? adapter_new(rig, 8 * (i % 3), (uint64_t)i) : NULL;
        seq_start(rig, &seqs[i], 50 + (uint64_t)i, 3 + 17 * i, blocks, adapters[i]);
    }
}

#define TAIL 3

/* Log-probs of the last TAIL of a sequence's first `count` tokens. The second half of the pass's
 * last layer has their rows alone: fewer than came before, or, if those were too many for LoRA
 * beside products, the pass's only ones that have it there. */
static void score_tail(const struct rig *rig, const struct seq *seq,
                       claas_backend_adapter_t *adapter, int count, float *out)
{
    struct claas_segment segment = {.tokens = seq->tokens,
                                    .count = count,
                                    .blocks = seq->blocks,
                                    .adapter = adapter,
                                    .wanted = TAIL};
    struct claas_sample samples[TAIL] = {0};

    for (int i = 0; i < TAIL; i++)
        samples[i].given = i + 1;
    must(rig->ops->forward(rig->backend, &segment, 1, samples), "a prompt's end");
    for (int i = 0; i < TAIL; i++)
        out[i] = samples[i].logprob;
}

/* LoRA in the launches of the products gives the bits that it has in launches of its own: launched,
 * captured, replayed again and again, and beside the ends of prompts. */
static void test_ways(const char *model)
{
    static const int all[GROUP] = {0, 1, 2, 3, 4, 5, 6, 7}, lengths[] = {20, 64, 100, 120};
    float apart[GROUP], other[GROUP], tails[2][CLAAS_COUNT(lengths)][TAIL];
    char name[128];

    for (int way = 0; way < 2; way++) {
        struct seq *seqs = CLAAS_NEW_ARRAY(struct seq, GROUP);
        claas_backend_adapter_t *adapters[GROUP] = {0};
        struct rig rig;

        (void)setenv("CLAAS_CUDA_LORA", way == 0 ? "apart" : "", 1);
        rig = rig_open(model, "bf16", GROUP * 16);
        start_group(&rig, seqs, adapters, true);
        for (int round = 0; round < 6; round++) {
            score(&rig, seqs, all, GROUP, adapters, way == 0 ? apart : other);
            for (int i = 0; i < GROUP && way == 1; i++)
                expect_same("beside the products", i, other[i], apart[i]);
        }
        for (size_t i = 0; i < CLAAS_COUNT(lengths); i++)
            score_tail(&rig, &seqs[7], adapters[7], lengths[i], tails[way][i]);
        for (size_t i = 0; i < CLAAS_COUNT(lengths) * TAIL && way == 1; i++)
            expect_same("at the end of a prompt", lengths[i / TAIL], tails[1][i / TAIL][i % TAIL],
                        tails[0][i / TAIL][i % TAIL]);
        for (int i = 0; i < GROUP; i++)
            rig.ops->adapter_free(rig.backend, &adapters[i]);
        free(seqs);
        rig_close(&rig);
    }
    (void)unsetenv("CLAAS_CUDA_LORA");
    (void)snprintf(name, sizeof(name), "LoRA beside the products and apart, %s", model);
    finish(name);
}

/* `alone`: also that one row gives the same bits as several, which products must be made for. */
static void test_neighbours(const char *precision, bool adapted, bool alone)
{
    static const int all[GROUP] = {0, 1, 2, 3, 4, 5, 6, 7}, back[GROUP] = {7, 6, 5, 4, 3, 2, 1, 0};
    struct rig rig = rig_open("random:smollm2-135m", precision, GROUP * 16);
    struct seq *seqs = CLAAS_NEW_ARRAY(struct seq, GROUP);
    claas_backend_adapter_t *adapters[GROUP] = {0};
    float eight[GROUP], other[GROUP];
    char name[128];

    start_group(&rig, seqs, adapters, adapted);
    score(&rig, seqs, all, GROUP, adapters, eight);
    for (int round = 0; round < 3; round++) { /* launched, captured, replayed */
        score(&rig, seqs, all, 5, adapters, other);
        for (int i = 0; i < 5; i++)
            expect_same("five filled up to eight", i, other[i], eight[i]);
        score(&rig, seqs, back, GROUP, adapters, other);
        for (int i = 0; i < GROUP; i++)
            expect_same("in another order", back[i], other[i], eight[back[i]]);
        for (int i = 0; i < GROUP && alone; i++) {
            score(&rig, seqs, &all[i], 1, adapters, other);
            expect_same("alone", i, other[0], eight[i]);
        }
    }
    (void)snprintf(name, sizeof(name), "rows do not see their neighbours%s, %s%s",
                   alone ? ", nor whether there are any" : "", precision,
                   adapted ? ", with adapters" : "");
    finish(name);
    for (int i = 0; i < GROUP; i++)
        rig.ops->adapter_free(rig.backend, &adapters[i]);
    free(seqs);
    rig_close(&rig);
}

/* A short sequence beside ones of every size class of attention's grid, and those beside it. */
static void test_lengths(const char *precision)
{
    static const int lengths[] = {15,  16,  17,   255,  256,  257,  511,  512,
                                  513, 768, 1024, 1025, 2048, 2049, 4096, 4097};
    struct rig rig = rig_open("random:smollm2-135m", precision, 300);
    struct seq *seqs = CLAAS_NEW_ARRAY(struct seq, 3);
    claas_backend_adapter_t *none[GROUP] = {0};
    int32_t blocks[300];
    float near[2], far[2], again[2];
    char name[64];

    for (int i = 0; i < 300; i++)
        blocks[i] = i * 7 % 300;
    seq_start(&rig, &seqs[0], 1, 20, blocks, NULL);
    seq_start(&rig, &seqs[1], 2, 33, blocks + 8, NULL);
    seq_start(&rig, &seqs[2], 3, 4100, blocks + 16, NULL);
    score(&rig, seqs, (const int[]){0, 1}, 2, none, near);
    for (size_t i = 0; i < CLAAS_COUNT(lengths); i++) {
        seqs[2].count = lengths[i] + 1; /* the row at that position */
        score(&rig, seqs, (const int[]){0, 2}, 2, none, far);
        if (far[0] != near[0])
            FAIL("beside a sequence of %d: %.9g, want %.9g", lengths[i], (double)far[0],
                 (double)near[0]);
        for (int round = 0; round < 3; round++) {
            score(&rig, seqs, (const int[]){2, 1}, 2, none, again);
            if (again[0] != far[1] || again[1] != near[1] || !isfinite(again[0]))
                FAIL("length %d, round %d: %.9g and %.9g, want %.9g and %.9g", lengths[i], round,
                     (double)again[0], (double)again[1], (double)far[1], (double)near[1]);
        }
    }
    (void)snprintf(name, sizeof(name), "rows do not see how far others are, %s", precision);
    finish(name);
    free(seqs);
    rig_close(&rig);
}

/* Log-probs of the tokens behind PROMPT positions from `from` on, read in pieces of `piece`. */
static void read_in_pieces(const struct rig *rig, const struct seq *seq,
                           claas_backend_adapter_t *adapter, int from, int piece, float *out)
{
    struct claas_sample samples[PROMPT];

    for (int pos = from; pos < from + PROMPT; pos += piece) {
        int left = from + PROMPT - pos, n = left < piece ? left : piece;
        struct claas_segment segment = {.tokens = seq->tokens + pos,
                                        .count = n,
                                        .pos = pos,
                                        .blocks = seq->blocks,
                                        .adapter = adapter,
                                        .wanted = n};

        memset(samples, 0, sizeof(samples));
        for (int i = 0; i < n; i++)
            samples[i].given = seq->tokens[pos + i + 1];
        must(rig->ops->forward(rig->backend, &segment, 1, samples), "a piece");
        for (int i = 0; i < n; i++)
            out[pos - from + i] = samples[i].logprob;
    }
}

/* A short prompt has the same bits read at once, in pieces and token by token: what was found in
 * the cache must not show in an answer. So has the end of a long one, `from` positions in, also
 * where attention's parts grow (4,096). */
static void test_pieces(const char *model, bool adapted, int from)
{
    static const int pieces[] = {1, 4, 5, 7, 16, 33, PROMPT - 1};
    struct rig rig = rig_open(model, "bf16", 300);
    struct seq *seq = CLAAS_NEW(struct seq);
    claas_backend_adapter_t *adapter = adapted ? adapter_new(&rig, 8, 5) : NULL;
    int32_t blocks[300];
    float whole[PROMPT], other[PROMPT];
    char name[128];

    for (int i = 0; i < 300; i++)
        blocks[i] = i * 7 % 300;
    seq_start(&rig, seq, 77, from + PROMPT + 1, blocks,
              adapter); /* what comes before `from` stays */
    read_in_pieces(&rig, seq, adapter, from, PROMPT, whole);
    for (size_t i = 0; i < CLAAS_COUNT(pieces); i++) {
        read_in_pieces(&rig, seq, adapter, from, pieces[i], other);
        for (int t = 0; t < PROMPT; t++)
            if (memcmp(&other[t], &whole[t], sizeof(whole[t])) != 0 || !isfinite(whole[t])) {
                FAIL("pieces of %d, position %d: %.9g, want %.9g", pieces[i], t, (double)other[t],
                     (double)whole[t]);
                break;
            }
    }
    (void)snprintf(name, sizeof(name), "%d tokens read in pieces from %d on, %s%s", PROMPT, from,
                   model, adapted ? ", with an adapter" : "");
    finish(name);
    rig.ops->adapter_free(rig.backend, &adapter);
    free(seq);
    rig_close(&rig);
}

/* --- q, k and v finished by attention --- */

/* Log-probs of GROUP sequences, each alone and all together, three times (launched, captured,
 * replayed); by a back-end whose attention finishes them, or not. */
static void score_fused(const char *model, const char *fuse, float out[3 * 2 * GROUP])
{
    static const int all[GROUP] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct seq *seqs = CLAAS_NEW_ARRAY(struct seq, GROUP);
    claas_backend_adapter_t *none[GROUP] = {0};
    struct rig rig;

    (void)setenv("CLAAS_CUDA_FUSE", fuse, 1);
    rig = rig_open(model, "bf16", GROUP * 16);
    for (int i = 0; i < GROUP; i++) {
        int32_t blocks[16];

        for (int b = 0; b < 16; b++)
            blocks[b] = b * GROUP + i;
        seq_start(&rig, &seqs[i], 50 + (uint64_t)i, 70 + 17 * i, blocks, NULL);
    }
    (void)unsetenv("CLAAS_CUDA_FUSE");
    for (int round = 0; round < 3; round++, out += 2 * GROUP) {
        for (int i = 0; i < GROUP; i++)
            score(&rig, seqs, &all[i], 1, none, out + i);
        score(&rig, seqs, all, GROUP, none, out + GROUP);
    }
    free(seqs);
    rig_close(&rig);
}

static void test_fused(const char *model)
{
    float with[3 * 2 * GROUP], without[3 * 2 * GROUP];
    char name[128];

    score_fused(model, "0", without);
    score_fused(model, "1", with);
    for (size_t i = 0; i < CLAAS_COUNT(with); i++)
        if (memcmp(&with[i], &without[i], sizeof(with[i])) != 0 || !isfinite(with[i]))
            FAIL("log-prob %zu of %zu: %.9g, by kernels of their own %.9g", i, CLAAS_COUNT(with),
                 (double)with[i], (double)without[i]);
    (void)snprintf(name, sizeof(name), "attention that finishes q, k and v changes nothing, %s",
                   model);
    finish(name);
}

/* --- the pool --- */

static claas_device_t *device_open(claas_model_t *model, size_t kv_tokens)
{
    struct claas_device_options options = {.precision = "bf16", .kv_tokens = kv_tokens};
    claas_device_t *device = NULL;

    must(claas_device_open_with(&claas_backend_cuda, NULL, &options, model, &device), "the device");
    return device;
}

static void test_pool_size(void)
{
    static const size_t asked[] = {0, 512, 100000};
    claas_model_t *model = open_model("random:smollm2-135m");

    for (size_t i = 0; i < CLAAS_COUNT(asked); i++) {
        claas_device_t *device = device_open(model, asked[i]);
        size_t card = device->backend->context.memory;
        struct claas_device_stats stats;
        uint64_t held = 0;

        claas_device_stats(device, &stats);
        for (int use = 0; use < stats.use_count; use++)
            held += stats.uses[use].bytes;
        if (held != device->backend->context.bytes)
            FAIL("the memory map adds up to %zu of %zu bytes", (size_t)held,
                 device->backend->context.bytes);
        if (asked[i] > 0 && (size_t)stats.kv_blocks != asked[i] / CLAAS_KV_BLOCK_TOKENS)
            FAIL("%d blocks for %zu tokens", stats.kv_blocks, asked[i]);
        /* 23,040 bytes a token: 20,000 tokens in every GB of the share */
        if (asked[i] == 0 && (stats.kv_blocks < 8192 / CLAAS_KV_BLOCK_TOKENS ||
                              (double)stats.bytes_kv > 0.36 * (double)card ||
                              (card > (size_t)40 << 30 && stats.kv_blocks < 20000)))
            FAIL("a card of %zu MiB got %d blocks, %zu MiB", card >> 20, stats.kv_blocks,
                 (size_t)(stats.bytes_kv >> 20));
        if (stats.kv_blocks_free != stats.kv_blocks)
            FAIL("%d of %d blocks are free", stats.kv_blocks_free, stats.kv_blocks);
        claas_device_free(&device);
    }
    claas_model_free(&model);
    finish("the pool has the size of the card, or what was asked for");
}

static int ask(claas_device_client_t *client, const int32_t *prompt, size_t count, int max_tokens,
               uint64_t *ret_id)
{
    struct claas_generate_request request = {.prompt = prompt,
                                             .prompt_count = count,
                                             .max_tokens = max_tokens,
                                             .temperature = 1,
                                             .top_p = 1,
                                             .priority = CLAAS_PRIORITY_CHAT};

    return claas_device_generate(client, &request, ret_id);
}

/* Twelve answers of 60 tokens to prompts of 40 in a pool of 512: they take turns. */
static void run_in_turns(claas_device_client_t *client, const int32_t *prompts)
{
    int ended = 0, tokens = 0;
    uint64_t id;

    for (int i = 0; i < 12; i++)
        must(ask(client, prompts + i, 40, 60, &id), "a request");
    while (ended < 12) {
        struct claas_device_event event;

        if (claas_device_client_wait(client, 60000, &event) != 1) {
            FAIL("nothing for a minute, %d requests and %d tokens came", ended, tokens);
            return;
        }
        if (event.kind == CLAAS_EVENT_FAILED)
            FAIL("a request failed: %s", event.text);
        tokens += event.kind == CLAAS_EVENT_TOKEN;
        ended += event.kind != CLAAS_EVENT_TOKEN;
        claas_device_event_done(&event);
    }
    if (tokens != 12 * 60)
        FAIL("%d tokens of %d", tokens, 12 * 60);
}

static void test_pool_full(void)
{
    claas_model_t *model = open_model("random:smollm2-135m");
    claas_device_t *device = device_open(model, 512);
    claas_device_client_t *client = NULL;
    int32_t prompts[600];
    int code = 0, sent = 0;
    uint64_t id;

    for (int i = 0; i < 600; i++)
        prompts[i] = below(7, (uint64_t)i, 49152);
    must(claas_device_client_new(device, &client), "a client");
    run_in_turns(client, prompts);
    if (ask(client, prompts, 512, 10, &id) != CLAAS_ERR_LIMIT)
        FAIL("a prompt as large as the pool was not refused with LIMIT");
    while (code >= 0 && sent < 2 * CLAAS_ENGINE_QUEUE_MAX) {
        code = ask(client, prompts, 400, 100, &id);
        sent += code >= 0;
    }
    if (code != CLAAS_ERR_OVERLOADED)
        FAIL("after %d requests: code %d, want OVERLOADED", sent, code);
    claas_device_client_free(&client);
    claas_device_free(&device);
    claas_model_free(&model);
    finish("a full pool makes wait, then refuses");
}

/* --- no memory --- */

static int train_once(const struct rig *rig, claas_backend_adapter_t *adapter,
                      const struct seq *seq)
{
    struct claas_backend_row row = {.student = adapter};
    struct claas_backend_train request = {
        .rows = &row,
        .row_count = 1,
        .loss = {.variant = CLAAS_LOSS_FULL, .is_clip = 2},
        .adamw = {.rate = 1e-4f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .max_grad_norm = 1},
        .update = true};
    struct claas_train_result result = {0};
    int code;

    row.row.student_prompt = row.row.teacher_prompt = seq->tokens;
    row.row.student_count = row.row.teacher_count = 100;
    row.row.response = seq->tokens + 100;
    row.row.response_count = 50;
    code = rig->ops->train(rig->backend, &request, &result);
    if (code >= 0 && !result.finite)
        FAIL("the step is not finite");
    free(result.rows);
    return code;
}

/* The card as full as it can be: what is there works on. */
static void test_no_memory(void)
{
    struct rig rig = rig_open("random:smollm2-135m", "bf16", 64);
    struct seq *seqs = CLAAS_NEW_ARRAY(struct seq, 1);
    claas_backend_adapter_t *adapters[GROUP] = {adapter_new(&rig, 8, 1)}, *more = NULL;
    struct claas_lora_config lora = {.rank = 64, .alpha = 16, .modules = CLAAS_MODULE_ALL};
    size_t full = rig.backend->context.bytes + ((size_t)1 << 20);
    char limit[32];
    int32_t blocks[64];
    float before, after;

    rig.ops->adapter_free(rig.backend, &adapters[0]);
    rig_close(&rig);
    (void)snprintf(limit, sizeof(limit), "%zu", full);
    (void)setenv("CLAAS_CUDA_MEMORY_LIMIT", limit, 1);
    rig = rig_open("random:smollm2-135m", "bf16", 64);
    (void)unsetenv("CLAAS_CUDA_MEMORY_LIMIT");
    adapters[0] = adapter_new(&rig, 8, 1);
    for (int i = 0; i < 64; i++)
        blocks[i] = 63 - i;
    seq_start(&rig, &seqs[0], 5, 200, blocks, adapters[0]);
    score(&rig, seqs, (const int[]){0}, 1, adapters, &before);
    for (int round = 0; round < 2; round++) {
        if (train_once(&rig, adapters[0], seqs) != CLAAS_ERR_NO_MEMORY ||
            !strstr(claas_error_text(), "a training step") ||
            !strstr(claas_error_text(), "the model's weights"))
            FAIL("a step without memory: %s", claas_error_text());
        if (rig.ops->adapter_new(rig.backend, &lora, CLAAS_ADAPTER_TRAIN, &more) !=
            CLAAS_ERR_NO_MEMORY)
            FAIL("an adapter without memory was not refused with NO_MEMORY");
        score(&rig, seqs, (const int[]){0}, 1, adapters, &after);
        expect_same("after a refused step", 0, after, before);
    }
    printf("as it should be: %s\n", claas_error_text());
    rig.backend->context.limit = 0;
    if (train_once(&rig, adapters[0], seqs) < 0)
        FAIL("with memory again: %s", claas_error_text());
    score(&rig, seqs, (const int[]){0}, 1, adapters, &after);
    if (!isfinite(after) || after == before)
        FAIL("the step changed nothing: %.9g, before %.9g", (double)after, (double)before);
    finish("a step without memory fails and leaves everything usable");
    rig.ops->adapter_free(rig.backend, &adapters[0]);
    free(seqs);
    rig_close(&rig);
}

/* CLAAS_TEST_SMALL: only what no other test's kernels do; CLAAS_TEST_OWN: without cuBLASLt's
 * products in bfloat16. */
enum part { ALL, SMALL, OWN };

static bool is_mine(enum part part)
{
    if ((part < SMALL && getenv("CLAAS_TEST_SMALL")) || (part < OWN && getenv("CLAAS_TEST_OWN")))
        return false;
    return !check_elsewhere();
}

int main(void)
{
    struct cuda_context context = {0};

    if (cuda_context_open(CUDA_TYPE_BF16, &context) < 0) {
        printf("skipped: %s\n", claas_error_text());
        return SKIP;
    }
    cuda_context_close(&context);
    (void)setenv("CLAAS_CUDA_TUNE", "0", 1); /* timed choices differ from one opening to the next */
    if (is_mine(OWN))
        test_graphs("random:tiny-llama", "f32");
    if (is_mine(SMALL))
        test_graphs("random:tiny-qwen3", "bf16");
    if (is_mine(SMALL))
        test_neighbours("bf16", true, false);
    if (is_mine(SMALL))
        test_ways("random:smollm2-135m");
    if (is_mine(SMALL))
        test_pieces("random:smollm2-135m", true, 0);
    if (is_mine(ALL))
        test_graphs("random:smollm2-135m", "bf16");
    if (is_mine(ALL)) {
        test_neighbours("f32", false, false);
        test_neighbours("bf16", false, true);
    }
    if (is_mine(ALL)) {
        test_lengths("f32");
        test_lengths("bf16");
    }
    if (is_mine(ALL)) {
        test_pieces("random:smollm2-135m", false, 0);
        test_pieces("random:smollm2-135m", false, 4061);
    }
    if (is_mine(ALL)) {
        test_pieces("random:qwen3-0.6b", false, 0);
        test_fused("random:qwen3-0.6b");
        test_ways("random:qwen3-0.6b");
    }
    if (is_mine(SMALL))
        test_fused("random:smollm2-135m");
    if (is_mine(SMALL))
        test_pool_size();
    if (is_mine(SMALL))
        test_pool_full();
    if (is_mine(SMALL))
        test_no_memory();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
