/* Orders the rows of a training step. Rows are sorted by adapter, then by prompt, each in the order
 * of first appearance, so that the plan depends on the request alone, and an adapter's rows of a
 * batch are neighbours. A student's batch mixes adapters only if the back-end asks for it. */
#include "pack/step_plan.h"

#include "claas/err.h"
#include "claas/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static int check_row(const struct claas_model_config *c, const struct claas_backend_train *request,
                     size_t i)
{
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

static bool same_prompt(const struct claas_plan_seq *a, const struct claas_plan_seq *b)
{
    return a->adapter == b->adapter && a->prompt_count == b->prompt_count &&
           memcmp(a->prompt, b->prompt, (size_t)a->prompt_count * sizeof(int32_t)) == 0;
}

static struct claas_plan_seq make_seq(const struct claas_backend_row *r, int row, enum side side)
{
    struct claas_plan_seq seq = {.response = r->row.response, .mask = r->row.mask, .row = row};

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

/* Moves the sequences into order: the first one left, then all others of its adapter, and of those
 * the ones with the same prompt side by side. What was moved is marked by family = -1; in `out`
 * families are numbered. */
static void order(struct claas_plan_seq *seqs, int count, struct claas_plan_seq *out)
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

static int make_side(const struct claas_plan *plan, enum side which, struct claas_plan_side *side)
{
    const struct claas_backend_train *request = plan->request;
    CLAAS_AUTO_FREE struct claas_plan_seq *seqs =
        CLAAS_NEW_ARRAY(struct claas_plan_seq, request->row_count);
    int count = 0;

    side->seqs = CLAAS_NEW_ARRAY(struct claas_plan_seq, request->row_count);
    side->batches = CLAAS_NEW_ARRAY(struct claas_plan_batch, request->row_count);
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
static int seq_tokens(const struct claas_plan_seq *seq, bool joins)
{
    return seq->response_count - 1 + (joins ? 0 : seq->prompt_count);
}

/* How many sequences from `first` on make one batch: at least one. */
static int fit(const struct claas_plan_side *side, int first, int budget, bool one_adapter)
{
    int tokens = 0, i = first;

    for (; i < side->seq_count; i++) {
        const struct claas_plan_seq *seq = &side->seqs[i];
        bool joins = i > first && seq[-1].family == seq->family;

        tokens += seq_tokens(seq, joins);
        if (i > first && (tokens > budget || (one_adapter && seq->adapter != seq[-1].adapter)))
            break;
    }
    return i - first;
}

static int blocks_of(int positions)
{
    return (positions + CLAAS_KV_BLOCK_TOKENS - 1) / CLAAS_KV_BLOCK_TOKENS;
}

/* Where the arrays of a batch being built are filled next. */
struct builder {
    struct claas_plan_batch *batch;
    int32_t *tables;
};

static int allocate_batch(const struct claas_plan_side *side, struct claas_plan_batch *batch,
                          struct builder *builder)
{
    size_t tokens = 0, scored = 0, table = 0, count = (size_t)batch->count;
    int32_t *next;
    uint8_t *records;

    for (int i = 0; i < batch->count; i++) {
        const struct claas_plan_seq *seq = &side->seqs[batch->first + i];

        tokens += (size_t)seq_tokens(seq, false);
        scored += (size_t)seq->trained;
        table += (size_t)blocks_of(seq->prompt_count) +
                 (size_t)blocks_of(seq->prompt_count + seq->response_count);
    }
    batch->memory = CLAAS_NEW_ARRAY(int32_t, 3 * tokens + 4 * scored + table);
    records =
        claas_alloc(count, sizeof(struct claas_pack_group) + 2 * sizeof(struct claas_pack_run) +
                               sizeof(struct claas_pack_copy));
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
    /* runs first: no other record needs a stricter alignment than their pointers */
    batch->pack.runs = (struct claas_pack_run *)(void *)records;
    batch->pack.groups =
        (struct claas_pack_group *)(void *)(records + 2 * count * sizeof(struct claas_pack_run));
    batch->pack.copies =
        (struct claas_pack_copy *)(void *)(records + 2 * count * sizeof(struct claas_pack_run) +
                                           count * sizeof(struct claas_pack_group));
    return 0;
}

/* Appends a run of `count` tokens from position `pos`; its table starts with the parent's full
 * blocks. */
static int add_run(struct builder *builder, const claas_backend_adapter_t *adapter,
                   const int32_t *tokens, int count, int pos, int parent)
{
    struct claas_plan_batch *batch = builder->batch;
    struct claas_pack *pack = &batch->pack;
    struct claas_pack_group *group =
        pack->group_count ? &pack->groups[pack->group_count - 1] : NULL;
    int shared = pos / CLAAS_KV_BLOCK_TOKENS, blocks = blocks_of(pos + count);

    for (int i = 0; i < blocks; i++)
        builder->tables[i] = i < shared ? pack->runs[parent].blocks[i] : batch->block_count++;
    pack->runs[pack->run_count] = (struct claas_pack_run){
        .first = pack->m, .count = count, .pos = pos, .blocks = builder->tables, .parent = parent};
    if (parent >= 0 && pos % CLAAS_KV_BLOCK_TOKENS)
        pack->copies[pack->copy_count++] = (struct claas_pack_copy){
            .first = pack->runs[parent].first + shared * CLAAS_KV_BLOCK_TOKENS,
            .count = pos % CLAAS_KV_BLOCK_TOKENS,
            .block = builder->tables[shared]};
    if (!group || group->adapter != adapter) {
        group = &pack->groups[pack->group_count++];
        *group = (struct claas_pack_group){.first = pack->m, .adapter = adapter};
    }
    group->count += count;
    for (int i = 0; i < count; i++, pack->m++) {
        pack->tokens[pack->m] = tokens[i];
        pack->pos[pack->m] = pos + i;
        pack->blocks[pack->m] = builder->tables[(pos + i) / CLAAS_KV_BLOCK_TOKENS];
    }
    builder->tables += blocks;
    return pack->run_count++;
}

/* A sequence that shares nothing: prompt and response as one run, but for the last token, which
 * predicts nothing. */
static void add_whole(struct builder *builder, const struct claas_plan_seq *seq)
{
    struct claas_pack *pack = &builder->batch->pack;
    int run = add_run(builder, seq->adapter, seq->prompt, seq->prompt_count, 0, -1);
    int blocks = blocks_of(seq->prompt_count);

    /* the run's table is the last one, so it grows in place */
    for (int i = blocks; i < blocks_of(seq->prompt_count + seq->response_count - 1); i++)
        *builder->tables++ = builder->batch->block_count++;
    for (int i = 0; i < seq->response_count - 1; i++, pack->m++) {
        int pos = seq->prompt_count + i;

        pack->tokens[pack->m] = seq->response[i];
        pack->pos[pack->m] = pos;
        pack->blocks[pack->m] = pack->runs[run].blocks[pos / CLAAS_KV_BLOCK_TOKENS];
    }
    pack->runs[run].count += seq->response_count - 1;
    pack->groups[pack->group_count - 1].count += seq->response_count - 1;
}

/* The trained positions of a sequence: response[0] is predicted by row `last` (the prompt's last),
 * response[t] by row `next` + t - 1. */
static void add_scored(struct claas_plan_batch *batch, const struct claas_plan_seq *seq, int last,
                       int next)
{
    int index = seq->scored;

    for (int t = 0; t < seq->response_count; t++) {
        if (seq->mask && !seq->mask[t])
            continue;
        batch->scored_row[batch->scored_count] = t == 0 ? last : next + t - 1;
        batch->scored_index[batch->scored_count++] = index++;
    }
}

/* Fills `tail` and scored_tail. place: scratch [m]. */
static void list_tail(struct claas_plan_batch *batch, int32_t *place)
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

static int build_batch(const struct claas_plan_side *side, struct claas_plan_batch *batch)
{
    struct builder builder = {0};
    CLAAS_AUTO_FREE int32_t *place = NULL;
    int code = allocate_batch(side, batch, &builder), parent = -1;

    if (code < 0)
        return code;
    for (int i = 0; i < batch->count; i++) {
        const struct claas_plan_seq *seq = &side->seqs[batch->first + i];
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
    batch->pack.tail = batch->tail;
    batch->pack.tail_count = batch->tail_count;
    return 0;
}

static int make_batches(struct claas_plan_side *side, int budget, bool one_adapter)
{
    for (int first = 0; first < side->seq_count;) {
        struct claas_plan_batch *batch = &side->batches[side->batch_count++];
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

/* Student's and teacher's rows as one batch. Families of the two are never the same one, even where
 * prompts are: what is saved of the student's rows must be theirs alone. */
static int make_joint(struct claas_plan *plan, int budget)
{
    const struct claas_plan_side *student = &plan->student, *teacher = &plan->teacher;
    struct claas_plan_side *joint = &plan->joint;
    int count = student->seq_count + teacher->seq_count;

    if (student->batch_count != 1 || teacher->batch_count != 1 ||
        student->batches[0].pack.m > budget - teacher->batches[0].pack.m)
        return 0;
    joint->seqs = CLAAS_NEW_ARRAY(struct claas_plan_seq, (size_t)count);
    joint->batches = CLAAS_NEW_ARRAY(struct claas_plan_batch, 1);
    if (!joint->seqs || !joint->batches)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    memcpy(joint->seqs, student->seqs, (size_t)student->seq_count * sizeof(joint->seqs[0]));
    memcpy(joint->seqs + student->seq_count, teacher->seqs,
           (size_t)teacher->seq_count * sizeof(joint->seqs[0]));
    for (int i = student->seq_count; i < count; i++)
        joint->seqs[i].family += student->seq_count;
    joint->seq_count = joint->batches[0].count = count;
    joint->batch_count = 1;
    return build_batch(joint, &joint->batches[0]);
}

/* --- the whole --- */

static int find_learner(struct claas_plan *plan, claas_backend_adapter_t *adapter)
{
    for (int i = 0; i < plan->learner_count; i++)
        if (plan->learners[i].adapter == adapter)
            return i;
    plan->learners[plan->learner_count].adapter = adapter;
    return plan->learner_count++;
}

/* Numbers the trained positions along the student's sequences and gives the teacher's and base's
 * the same numbers. */
static int number_positions(struct claas_plan *plan)
{
    const struct claas_backend_train *request = plan->request;
    CLAAS_AUTO_FREE int *first = CLAAS_NEW_ARRAY(int, request->row_count);
    struct claas_plan_side *others[] = {&plan->teacher, &plan->base};
    int next = 0;

    if (!first)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (int i = 0; i < plan->student.seq_count; i++) {
        struct claas_plan_seq *seq = &plan->student.seqs[i];

        first[seq->row] = seq->scored = next;
        next += seq->trained;
    }
    for (size_t o = 0; o < CLAAS_COUNT(others); o++)
        for (int i = 0; i < others[o]->seq_count; i++)
            others[o]->seqs[i].scored = first[others[o]->seqs[i].row];
    plan->position_count = next;
    return 0;
}

static int fill_positions(struct claas_plan *plan)
{
    const struct claas_backend_train *request = plan->request;

    plan->positions = CLAAS_NEW_ARRAY(struct claas_plan_position, (size_t)plan->position_count);
    if (!plan->positions)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < request->row_count; i++)
        plan->learners[find_learner(plan, request->rows[i].student)].rows++;
    for (int i = 0; i < plan->student.seq_count; i++) {
        const struct claas_plan_seq *seq = &plan->student.seqs[i];

        plan->learners[find_learner(plan, request->rows[seq->row].student)].tokens += seq->trained;
    }
    for (int i = 0; i < plan->student.seq_count; i++) {
        const struct claas_plan_seq *seq = &plan->student.seqs[i];
        const struct claas_train_row *row = &request->rows[seq->row].row;
        int learner = find_learner(plan, request->rows[seq->row].student), index = seq->scored;
        double weight = request->loss.sample_mean
                            ? 1.0 / ((double)plan->learners[learner].rows * seq->trained)
                            : 1.0 / plan->learners[learner].tokens;

        for (int t = 0; t < seq->response_count; t++)
            if (!seq->mask || seq->mask[t])
                plan->positions[index++] = (struct claas_plan_position){
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

int claas_plan_new(const struct claas_model_config *config,
                   const struct claas_backend_train *request,
                   const struct claas_plan_limits *limits, struct claas_plan *ret)
{
    CLAAS_AUTO(claas_plan_done) struct claas_plan plan = {.request = request};
    int code = 0;

    for (size_t i = 0; i < request->row_count && code >= 0; i++)
        code = check_row(config, request, i);
    if (code < 0)
        return code;
    plan.learners = CLAAS_NEW_ARRAY(struct claas_plan_learner, request->row_count);
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
        code = make_batches(&plan.student,
                            request->update ? limits->train_tokens : limits->infer_tokens,
                            !limits->mixed);
    if (code >= 0 && !(request->kept && request->kept->filled))
        code = make_batches(&plan.teacher, limits->infer_tokens, false);
    if (code >= 0)
        code = make_batches(&plan.base, limits->infer_tokens, false);
    if (code >= 0 && request->update)
        code = make_joint(&plan, limits->joint_tokens);
    if (code < 0)
        return code;
    *ret = plan;
    plan = (struct claas_plan){0};
    return 0;
}

/* --- figures --- */

struct sums {
    double loss, divergence, forward_kl, kl_base, ratio, clipped, logprob, entropy;
};

static struct claas_train_row_result finish_row(const struct sums *s, int tokens)
{
    double n = tokens > 0 ? tokens : 1;

    return (struct claas_train_row_result){
        .loss = (float)(s->loss / n),
        .divergence = (float)(s->divergence / n),
        .forward_kl = (float)(s->forward_kl / n),
        .kl_base = (float)(s->kl_base / n),
        .ratio = (float)(s->ratio / n),
        .clip_fraction = (float)(s->clipped / n),
        .logprob = (float)(s->logprob / n),
        .entropy = (float)(s->entropy / n),
        .tokens = tokens,
    };
}

/* Sums are doubles, in the order of the positions. */
void claas_plan_collect(const struct claas_plan *plan, const struct claas_loss_result *results,
                        struct claas_train_result *ret)
{
    double loss = 0, worst = 0;

    ret->finite = true;
    ret->tokens = plan->position_count;
    for (int i = 0; i < plan->student.seq_count; i++) {
        const struct claas_plan_seq *seq = &plan->student.seqs[i];
        struct sums sums = {0};

        for (int j = seq->scored; j < seq->scored + seq->trained; j++) {
            const struct claas_loss_result *r = &results[j];
            const struct claas_plan_position *position = &plan->positions[j];

            sums.loss += r->loss;
            sums.divergence += r->divergence;
            sums.forward_kl += r->forward_kl;
            sums.kl_base += r->kl_base;
            sums.ratio += r->ratio;
            sums.clipped += r->clipped;
            sums.logprob += r->logprob;
            sums.entropy += r->entropy;
            loss += (double)position->weight * r->loss;
            if (!isnan(position->rollout))
                worst = fmax(worst, fabs((double)r->logprob - position->rollout));
            ret->finite = ret->finite && isfinite(r->loss) && isfinite(r->logprob);
        }
        ret->rows[seq->row] = finish_row(&sums, seq->trained);
    }
    ret->loss = (float)(plan->learner_count > 0 ? loss / plan->learner_count : 0);
    ret->max_ratio_error = (float)worst;
}

/* --- the end --- */

static void side_done(struct claas_plan_side *side)
{
    for (int i = 0; i < side->batch_count; i++) {
        free(side->batches[i].memory);
        free(side->batches[i].records);
    }
    free(side->batches);
    free(side->seqs);
    *side = (struct claas_plan_side){0};
}

void claas_plan_part(struct claas_plan *plan)
{
    side_done(&plan->joint);
}

void claas_plan_done(struct claas_plan *plan)
{
    side_done(&plan->student);
    side_done(&plan->teacher);
    side_done(&plan->base);
    side_done(&plan->joint);
    free(plan->learners);
    free(plan->positions);
    *plan = (struct claas_plan){0};
}
