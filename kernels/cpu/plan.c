/* Orders the rows of a training step. Rows are sorted by adapter, then by prompt, in the order of
 * their first appearance, so that the plan depends on the request alone. A student's batch never
 * mixes adapters: then an adapter's gradient, whose sums run over the rows of each batch, is the
 * same whoever else is in the step. */
#include "cpu/train.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Tokens of a batch. Training keeps about 0.4 MB per token of a 135M model; inference keeps
 * nothing, and more rows per product than this gain nothing. */
#define TRAIN_TOKENS 512
#define INFER_TOKENS 1024

enum side { SIDE_STUDENT, SIDE_TEACHER, SIDE_BASE };

/* --- checks --- */

static int check_tokens(const struct claas_model_config *c, const int32_t *tokens, size_t count,
                        size_t row)
{
    for (size_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= c->vocab)
            return claas_fail(CLAAS_ERR_INVALID, "row %zu: token %d of a vocabulary of %d", row,
                              tokens[i], c->vocab);
    return 0;
}

static int check_row(const claas_backend_t *backend, const struct claas_backend_train *request,
                     size_t i)
{
    const struct claas_model_config *c = &backend->model.config;
    const struct claas_backend_row *r = &request->rows[i];
    size_t context = (size_t)c->context;
    int code;

    if (!r->row.student_prompt || r->row.student_count == 0)
        return claas_fail(CLAAS_ERR_INVALID, "row %zu has no prompt", i);
    if (!r->row.response || r->row.response_count == 0)
        return claas_fail(CLAAS_ERR_INVALID, "row %zu has no response", i);
    if (r->row.response_count > context || r->row.student_count > context - r->row.response_count ||
        r->row.teacher_count > context - r->row.response_count)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "row %zu: prompts of %zu and %zu tokens and a response of %zu do not fit "
                          "the context of %d",
                          i, r->row.student_count, r->row.teacher_count, r->row.response_count,
                          c->context);
    if (request->update && (!r->student || r->student->use != CLAAS_ADAPTER_TRAIN))
        return claas_fail(CLAAS_ERR_INVALID, "row %zu: its adapter is not one in training", i);
    if (request->update && (!r->row.teacher_prompt || r->row.teacher_count == 0))
        return claas_fail(CLAAS_ERR_INVALID, "row %zu has no teacher prompt", i);
    code = check_tokens(c, r->row.student_prompt, r->row.student_count, i);
    if (code >= 0 && r->row.teacher_prompt)
        code = check_tokens(c, r->row.teacher_prompt, r->row.teacher_count, i);
    if (code >= 0)
        code = check_tokens(c, r->row.response, r->row.response_count, i);
    return code;
}

/* --- one side's sequences --- */

static bool same_prompt(const struct cpu_seq *a, const struct cpu_seq *b)
{
    return a->adapter == b->adapter && a->prompt_count == b->prompt_count &&
           memcmp(a->prompt, b->prompt, (size_t)a->prompt_count * sizeof(int32_t)) == 0;
}

static struct cpu_seq make_seq(const struct claas_backend_row *r, int row, enum side side)
{
    struct cpu_seq seq = {.response = r->row.response, .mask = r->row.mask, .row = row};

    seq.prompt = side == SIDE_TEACHER ? r->row.teacher_prompt : r->row.student_prompt;
    seq.prompt_count = (int)(side == SIDE_TEACHER ? r->row.teacher_count : r->row.student_count);
    seq.adapter = side == SIDE_STUDENT ? r->student : side == SIDE_TEACHER ? r->teacher : NULL;
    for (int t = 0; t < (int)r->row.response_count; t++)
        if (!r->row.mask || r->row.mask[t]) {
            seq.trained++;
            seq.response_count = t + 1;
        }
    if (!seq.prompt)
        seq.prompt_count = 0;
    return seq;
}

/* Moves the sequences into order: each time the first one left, then all left of its adapter, and
 * within those all of the same prompt. */
static void order(struct cpu_seq *seqs, int count, struct cpu_seq *out)
{
    int placed = 0, family = -1;

    for (int a = 0; a < count; a++) {
        if (seqs[a].family < 0)
            continue;
        for (int b = a; b < count; b++) {
            if (seqs[b].family < 0 || seqs[b].adapter != seqs[a].adapter)
                continue;
            family++;
            for (int c = b; c < count; c++)
                if (c == b || (seqs[c].family >= 0 && same_prompt(&seqs[b], &seqs[c]))) {
                    out[placed] = seqs[c];
                    out[placed++].family = family;
                    if (c != b)
                        seqs[c].family = -1;
                }
            if (b != a)
                seqs[b].family = -1;
        }
        seqs[a].family = -1;
    }
}

static int make_side(const struct cpu_plan *plan, enum side which, struct cpu_side *side)
{
    const struct claas_backend_train *request = plan->request;
    CLAAS_AUTO_FREE struct cpu_seq *seqs = CLAAS_NEW_ARRAY(struct cpu_seq, request->row_count);
    int count = 0;

    side->seqs = CLAAS_NEW_ARRAY(struct cpu_seq, request->row_count);
    side->batches = CLAAS_NEW_ARRAY(struct cpu_batch, request->row_count);
    if (!seqs || !side->seqs || !side->batches)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < request->row_count; i++) {
        seqs[count] = make_seq(&request->rows[i], (int)i, which);
        if (seqs[count].trained > 0 && seqs[count].prompt_count > 0)
            count++;
    }
    order(seqs, count, side->seqs);
    side->seq_count = count;
    return 0;
}

/* --- batches --- */

/* Tokens that a sequence adds to a batch; `joins`: its prompt is there already. */
static int seq_tokens(const struct cpu_seq *seq, bool joins)
{
    return seq->response_count - 1 + (joins ? 0 : seq->prompt_count);
}

static int fit(const struct cpu_side *side, int first, int budget, bool one_adapter)
{
    int tokens = 0, i = first;

    for (; i < side->seq_count; i++) {
        const struct cpu_seq *seq = &side->seqs[i];
        bool joins = i > first && seq[-1].family == seq->family;

        tokens += seq_tokens(seq, joins);
        if (i > first && (tokens > budget || (one_adapter && seq->adapter != seq[-1].adapter)))
            break;
    }
    return i - first;
}

static int blocks_of(int positions)
{
    return (positions + CLAAS_KV_BLOCK - 1) / CLAAS_KV_BLOCK;
}

/* Where the arrays of a batch being built are filled next. */
struct builder {
    struct cpu_batch *batch;
    int32_t *tables;
};

static int allocate_batch(const struct cpu_side *side, struct cpu_batch *batch,
                          struct builder *builder)
{
    size_t tokens = 0, scored = 0, table = 0, count = (size_t)batch->count;
    int32_t *next;
    uint8_t *records;

    for (int i = 0; i < batch->count; i++) {
        const struct cpu_seq *seq = &side->seqs[batch->first + i];

        tokens += (size_t)seq_tokens(seq, false);
        scored += (size_t)seq->trained;
        table += (size_t)blocks_of(seq->prompt_count) +
                 (size_t)blocks_of(seq->prompt_count + seq->response_count);
    }
    batch->memory = CLAAS_NEW_ARRAY(int32_t, 3 * tokens + 4 * scored + table);
    records = claas_alloc(count, sizeof(struct cpu_group) + 2 * sizeof(struct cpu_run) +
                                     sizeof(struct cpu_copy));
    batch->records = records;
    if (!batch->memory || !records)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    next = batch->memory;
    batch->pack.tokens = next;
    batch->pack.pos = next += tokens;
    batch->pack.blocks = next += tokens;
    batch->scored_row = next += tokens;
    batch->scored_tail = next += scored;
    batch->scored_index = next += scored;
    batch->tail = next += scored;
    builder->tables = next + scored;
    builder->batch = batch;
    /* runs first: they hold pointers, the others nothing wider */
    batch->pack.runs = (struct cpu_run *)(void *)records;
    batch->pack.groups = (struct cpu_group *)(void *)(records + 2 * count * sizeof(struct cpu_run));
    batch->pack.copies = (struct cpu_copy *)(void *)(records + 2 * count * sizeof(struct cpu_run) +
                                                     count * sizeof(struct cpu_group));
    return 0;
}

/* Appends a run of `count` tokens from position `pos`; its table starts with the parent's full
 * blocks. */
static int add_run(struct builder *builder, const claas_backend_adapter_t *adapter,
                   const int32_t *tokens, int count, int pos, int parent)
{
    struct cpu_batch *batch = builder->batch;
    struct cpu_pack *pack = &batch->pack;
    struct cpu_group *group = pack->group_count ? &pack->groups[pack->group_count - 1] : NULL;
    int shared = pos / CLAAS_KV_BLOCK, blocks = blocks_of(pos + count);

    for (int i = 0; i < blocks; i++)
        builder->tables[i] = i < shared ? pack->runs[parent].blocks[i] : batch->block_count++;
    pack->runs[pack->run_count] = (struct cpu_run){
        .first = pack->m, .count = count, .pos = pos, .blocks = builder->tables, .parent = parent};
    if (parent >= 0 && pos % CLAAS_KV_BLOCK)
        pack->copies[pack->copy_count++] =
            (struct cpu_copy){.first = pack->runs[parent].first + shared * CLAAS_KV_BLOCK,
                              .count = pos % CLAAS_KV_BLOCK,
                              .block = builder->tables[shared]};
    if (!group || group->adapter != adapter) {
        group = &pack->groups[pack->group_count++];
        *group = (struct cpu_group){.first = pack->m, .adapter = adapter};
    }
    group->count += count;
    for (int i = 0; i < count; i++, pack->m++) {
        pack->tokens[pack->m] = tokens[i];
        pack->pos[pack->m] = pos + i;
        pack->blocks[pack->m] = builder->tables[(pos + i) / CLAAS_KV_BLOCK];
    }
    builder->tables += blocks;
    return pack->run_count++;
}

/* The prompt and the response but its last token as one run of a sequence that shares nothing. */
static void add_whole(struct builder *builder, const struct cpu_seq *seq)
{
    struct cpu_pack *pack = &builder->batch->pack;
    int run = add_run(builder, seq->adapter, seq->prompt, seq->prompt_count, 0, -1);
    int blocks = blocks_of(seq->prompt_count);

    /* the table goes on in place */
    for (int i = blocks; i < blocks_of(seq->prompt_count + seq->response_count - 1); i++)
        *builder->tables++ = builder->batch->block_count++;
    for (int i = 0; i < seq->response_count - 1; i++, pack->m++) {
        int pos = seq->prompt_count + i;

        pack->tokens[pack->m] = seq->response[i];
        pack->pos[pack->m] = pos;
        pack->blocks[pack->m] = pack->runs[run].blocks[pos / CLAAS_KV_BLOCK];
    }
    pack->runs[run].count += seq->response_count - 1;
    pack->groups[pack->group_count - 1].count += seq->response_count - 1;
}

/* The trained positions of a sequence: response[0] is predicted by row `last` (the prompt's last),
 * response[t] by row `next` + t - 1. */
static void add_scored(struct cpu_batch *batch, const struct cpu_seq *seq, int last, int next)
{
    int index = seq->scored;

    for (int t = 0; t < seq->response_count; t++) {
        if (seq->mask && !seq->mask[t])
            continue;
        batch->scored_row[batch->scored_count] = t == 0 ? last : next + t - 1;
        batch->scored_index[batch->scored_count++] = index++;
    }
}

static void list_tail(struct cpu_batch *batch, int32_t *place)
{
    for (int i = 0; i < batch->pack.m; i++)
        place[i] = -1;
    for (int i = 0; i < batch->scored_count; i++)
        place[batch->scored_row[i]] = 0;
    for (int row = 0; row < batch->pack.m; row++)
        if (place[row] == 0) {
            place[row] = batch->tail_count;
            batch->tail[batch->tail_count++] = row;
        }
    for (int i = 0; i < batch->scored_count; i++)
        batch->scored_tail[i] = place[batch->scored_row[i]];
}

static int build_batch(const struct cpu_side *side, struct cpu_batch *batch)
{
    struct builder builder = {0};
    CLAAS_AUTO_FREE int32_t *place = NULL;
    int code = allocate_batch(side, batch, &builder), parent = -1;

    if (code < 0)
        return code;
    for (int i = 0; i < batch->count; i++) {
        const struct cpu_seq *seq = &side->seqs[batch->first + i];
        bool joins = i > 0 && seq[-1].family == seq->family;
        bool joined = i + 1 < batch->count && seq[1].family == seq->family;
        int next, last;

        if (!joins && !joined) {
            next = batch->pack.m + seq->prompt_count;
            add_whole(&builder, seq);
            add_scored(batch, seq, next - 1, next);
            continue;
        }
        if (!joins)
            parent = add_run(&builder, seq->adapter, seq->prompt, seq->prompt_count, 0, -1);
        last = batch->pack.runs[parent].first + seq->prompt_count - 1;
        next = batch->pack.m;
        if (seq->response_count > 1)
            (void)add_run(&builder, seq->adapter, seq->response, seq->response_count - 1,
                          seq->prompt_count, parent);
        add_scored(batch, seq, last, next);
        if (batch->longest < seq->prompt_count + seq->response_count - 1)
            batch->longest = seq->prompt_count + seq->response_count - 1;
    }
    place = CLAAS_NEW_ARRAY(int32_t, (size_t)batch->pack.m);
    if (!place)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    list_tail(batch, place);
    return 0;
}

static int make_batches(struct cpu_side *side, int budget, bool one_adapter)
{
    for (int first = 0; first < side->seq_count;) {
        struct cpu_batch *batch = &side->batches[side->batch_count++];
        int code;

        batch->first = first;
        batch->count = fit(side, first, budget, one_adapter);
        first += batch->count;
        code = build_batch(side, batch);
        if (code < 0)
            return code;
    }
    return 0;
}

/* --- the whole --- */

static int find_learner(struct cpu_plan *plan, claas_backend_adapter_t *adapter)
{
    for (int i = 0; i < plan->learner_count; i++)
        if (plan->learners[i].adapter == adapter)
            return i;
    plan->learners[plan->learner_count].adapter = adapter;
    return plan->learner_count++;
}

/* Numbers the trained positions along the student's sequences and gives the teacher's and base's
 * the same numbers. */
static int number_positions(struct cpu_plan *plan)
{
    const struct claas_backend_train *request = plan->request;
    CLAAS_AUTO_FREE int *first = CLAAS_NEW_ARRAY(int, request->row_count);
    struct cpu_side *others[] = {&plan->teacher, &plan->base};
    int next = 0;

    if (!first)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < plan->student.seq_count; i++) {
        struct cpu_seq *seq = &plan->student.seqs[i];

        first[seq->row] = seq->scored = next;
        next += seq->trained;
    }
    for (size_t o = 0; o < CLAAS_COUNT(others); o++)
        for (int i = 0; i < others[o]->seq_count; i++)
            others[o]->seqs[i].scored = first[others[o]->seqs[i].row];
    plan->position_count = next;
    return 0;
}

static int fill_positions(struct cpu_plan *plan)
{
    const struct claas_backend_train *request = plan->request;

    plan->positions = CLAAS_NEW_ARRAY(struct cpu_position, (size_t)plan->position_count);
    if (!plan->positions)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < request->row_count; i++)
        plan->learners[find_learner(plan, request->rows[i].student)].rows++;
    for (int i = 0; i < plan->student.seq_count; i++) {
        const struct cpu_seq *seq = &plan->student.seqs[i];

        plan->learners[find_learner(plan, request->rows[seq->row].student)].tokens += seq->trained;
    }
    for (int i = 0; i < plan->student.seq_count; i++) {
        const struct cpu_seq *seq = &plan->student.seqs[i];
        const struct claas_train_row *row = &request->rows[seq->row].row;
        int learner = find_learner(plan, request->rows[seq->row].student), index = seq->scored;
        double weight = request->loss.sample_mean
                            ? 1.0 / ((double)plan->learners[learner].rows * seq->trained)
                            : 1.0 / plan->learners[learner].tokens;

        for (int t = 0; t < seq->response_count; t++)
            if (!seq->mask || seq->mask[t])
                plan->positions[index++] = (struct cpu_position){
                    .row = seq->row,
                    .learner = learner,
                    .token = seq->response[t],
                    .rollout = row->rollout_logprobs ? row->rollout_logprobs[t] : NAN,
                    .weight = (float)weight,
                    .teacher = row->teacher_prompt && row->teacher_count > 0,
                };
    }
    return 0;
}

int claas_cpu_plan_new(const claas_backend_t *backend, const struct claas_backend_train *request,
                       struct cpu_plan *ret)
{
    CLAAS_AUTO(claas_cpu_plan_done) struct cpu_plan plan = {.request = request};
    int code = 0;

    for (size_t i = 0; i < request->row_count && code >= 0; i++)
        code = check_row(backend, request, i);
    if (code < 0)
        return code;
    plan.learners = CLAAS_NEW_ARRAY(struct cpu_learner, request->row_count);
    if (!plan.learners)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    code = make_side(&plan, SIDE_STUDENT, &plan.student);
    if (code >= 0)
        code = make_side(&plan, SIDE_TEACHER, &plan.teacher);
    if (code >= 0 && request->loss.kl_weight > 0)
        code = make_side(&plan, SIDE_BASE, &plan.base);
    if (code >= 0)
        code = number_positions(&plan);
    if (code >= 0)
        code = fill_positions(&plan);
    if (code >= 0)
        code = make_batches(&plan.student, request->update ? TRAIN_TOKENS : INFER_TOKENS, true);
    if (code >= 0)
        code = make_batches(&plan.teacher, INFER_TOKENS, false);
    if (code >= 0)
        code = make_batches(&plan.base, INFER_TOKENS, false);
    if (code < 0)
        return code;
    *ret = plan;
    plan = (struct cpu_plan){0};
    return 0;
}

static void side_done(struct cpu_side *side)
{
    for (int i = 0; i < side->batch_count; i++) {
        free(side->batches[i].memory);
        free(side->batches[i].records);
    }
    free(side->batches);
    free(side->seqs);
    *side = (struct cpu_side){0};
}

void claas_cpu_plan_done(struct cpu_plan *plan)
{
    side_done(&plan->student);
    side_done(&plan->teacher);
    side_done(&plan->base);
    free(plan->learners);
    free(plan->positions);
    *plan = (struct cpu_plan){0};
}
