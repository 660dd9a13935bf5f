/* Continuous batching. Every pass runs the next token of all running sequences together with prompt
 * tokens up to a budget, so a long prompt is worked off in chunks beside the others' decoding, and
 * sequences come and go between passes.
 *
 * A sequence is its tokens (prompt and answer so far) and the number of them that are computed;
 * whatever is left is what the next passes have to run. That makes preemption trivial: when blocks
 * run out, the last sequence (a rollout, else of the adapter with most chats) gives its blocks back
 * and later computes the same tokens again. The sample of the n-th token of an answer depends on
 * the seed and n only, and on the CPU a row's result does not depend on its neighbours, so nothing
 * of this shows in the tokens. On a GPU that holds for passes of at most 64 rows. Larger ones go
 * through cuBLASLt, whose sums round differently, so there it may show whether a prompt was found
 * or computed, and beside which others.
 *
 * No adapter's chats keep another's waiting: the next one is of the adapter that has the fewest
 * running; with none running it takes a place of the adapter that has the most; and prompts are
 * read in turns. An adapter alone has all of the device. Rollouts go by age: the scheduler chose
 * whose they are, and it is better to end one cycle than to slow down all. */
#include "engine/engine.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK CLAAS_KV_BLOCK_TOKENS

static struct claas_sequence *as_sequence(struct claas_request *request)
{
    return (struct claas_sequence *)request;
}

static claas_device_t *device_of(const struct claas_sequence *seq)
{
    return seq->request.client->device;
}

static int blocks_for(int tokens)
{
    return (tokens + BLOCK - 1) / BLOCK;
}

/* --- queues --- */

struct claas_share *claas_generate_share(const struct claas_sequence *seq)
{
    return seq->adapter != NULL ? &seq->adapter->share : &device_of(seq)->base_share;
}

static bool is_before(const struct claas_sequence *a, const struct claas_sequence *b)
{
    if (a->priority != b->priority)
        return a->priority < b->priority;
    return a->turn != b->turn ? a->turn < b->turn : a->request.id < b->request.id;
}

/* The last one is looked at first: there nearly all belong. */
static void insert_sorted(struct claas_queue *queue, struct claas_sequence *seq)
{
    struct claas_request *where = queue->last;

    while (where != NULL && is_before(seq, as_sequence(where)))
        where = where->prev;
    claas_queue_insert_after(queue, where, &seq->request);
}

void claas_generate_enqueue(claas_device_t *device, struct claas_sequence *seq)
{
    if (seq->priority == CLAAS_PRIORITY_CHAT && claas_generate_share(seq)->waiting++ == 0)
        device->waiting_shares++;
    insert_sorted(&device->waiting, seq);
}

static void stop_waiting(claas_device_t *device, struct claas_sequence *seq)
{
    if (seq->priority == CLAAS_PRIORITY_CHAT && --claas_generate_share(seq)->waiting == 0)
        device->waiting_shares--;
    claas_queue_remove(&device->waiting, &seq->request);
}

bool claas_generate_has_chat(const claas_device_t *device)
{
    return (device->running.first != NULL &&
            as_sequence(device->running.first)->priority == CLAAS_PRIORITY_CHAT) ||
           (device->waiting.first != NULL &&
            as_sequence(device->waiting.first)->priority == CLAAS_PRIORITY_CHAT);
}

/* Gives the blocks back, the last one first: others are most likely to share the head of a prefix,
 * so it should be the last to be reused. */
static void drop_blocks(struct claas_sequence *seq)
{
    while (seq->block_count > 0)
        claas_kv_drop(device_of(seq)->kv, seq->blocks[--seq->block_count]);
    seq->computed = 0;
    seq->registered = 0;
}

/* No request continues a rollout's answer: its blocks are the next to be reused, so that a cycle
 * does not push out what chats will come back to. */
static void discard_answer(struct claas_sequence *seq)
{
    while (seq->block_count > seq->prompt_count / BLOCK)
        claas_kv_discard(device_of(seq)->kv, seq->blocks[--seq->block_count]);
}

/* Start-time fair queueing: an adapter's next prompt has its turn behind all tokens of its prompts
 * before, but not before the prompt that is being read now, so that no adapter saves up. What in
 * the end is not read is given back. */
static void start_running(claas_device_t *device, struct claas_sequence *seq)
{
    struct claas_share *share = claas_generate_share(seq);

    if (seq->priority == CLAAS_PRIORITY_CHAT) {
        share->running++;
        seq->turn = share->turn > device->turn ? share->turn : device->turn;
        share->turn = seq->turn + seq->count - seq->computed;
    }
    stop_waiting(device, seq);
    insert_sorted(&device->running, seq);
}

/* Tokens of a running prompt that need not be read, or not by it. */
static void give_back(const struct claas_sequence *seq, int tokens)
{
    if (seq->priority == CLAAS_PRIORITY_CHAT)
        claas_generate_share(seq)->turn -= tokens;
}

/* While it still says how much of it is computed; its last token, if it was made, is not read yet.
 */
static void stop_running(claas_device_t *device, struct claas_sequence *seq)
{
    const int unread = seq->count - seq->computed - 1;

    give_back(seq, unread > 0 ? unread : 0);
    if (seq->priority == CLAAS_PRIORITY_CHAT)
        claas_generate_share(seq)->running--;
    seq->turn = 0;
    claas_queue_remove(&device->running, &seq->request);
}

/* Takes a sequence that ends out of its queue and counts its tokens into its last event. */
static void retire(struct claas_queue *queue, struct claas_sequence *seq)
{
    claas_device_t *device = device_of(seq);

    if (queue == &device->running)
        stop_running(device, seq);
    else
        stop_waiting(device, seq);
    if (seq->priority == CLAAS_PRIORITY_ROLLOUT)
        discard_answer(seq);
    drop_blocks(seq);
    seq->request.last->prompt_tokens = (size_t)seq->prompt_count;
    seq->request.last->cached_tokens = (size_t)seq->cached;
    seq->request.last->generated_tokens = (size_t)(seq->count - seq->prompt_count);
}

static void cancel_in(struct claas_queue *queue, bool all)
{
    struct claas_request *request = queue->first;

    while (request != NULL) {
        struct claas_request *next = request->next;

        if (all || atomic_load(&request->cancelled)) {
            retire(queue, as_sequence(request));
            claas_request_cancel(request);
        }
        request = next;
    }
}

void claas_generate_reap(claas_device_t *device)
{
    cancel_in(&device->running, false);
    cancel_in(&device->waiting, false);
}

void claas_generate_close(claas_device_t *device)
{
    cancel_in(&device->running, true);
    cancel_in(&device->waiting, true);
}

static void preempt(struct claas_sequence *seq)
{
    claas_device_t *device = device_of(seq);

    stop_running(device, seq);
    drop_blocks(seq);
    seq->preempted = true;
    claas_generate_enqueue(device, seq);
}

/* The one to preempt: the last rollout, else the last chat of the adapter with most. */
static struct claas_sequence *find_victim(const claas_device_t *device)
{
    struct claas_sequence *victim = as_sequence(device->running.last);

    if (victim == NULL || victim->priority != CLAAS_PRIORITY_CHAT)
        return victim;
    for (struct claas_request *r = device->running.last; r != NULL; r = r->prev)
        if (claas_generate_share(as_sequence(r))->running > claas_generate_share(victim)->running)
            victim = as_sequence(r);
    return victim;
}

/* --- shared prefixes --- */

/* Whether what the sequence computes is what its adapter's present weights would compute. */
static bool is_current(const struct claas_sequence *seq)
{
    return seq->adapter == NULL ||
           (!seq->adapter->training && seq->adapter->identity == seq->identity);
}

/* Appends the blocks that are already computed for the tokens to come. The last token is always
 * left to run, since it gives the logits. */
static int attach_found(struct claas_sequence *seq)
{
    int attached = 0;

    if (!is_current(seq) || seq->registered != seq->block_count ||
        seq->computed != seq->block_count * BLOCK)
        return 0;
    while (seq->computed + BLOCK < seq->count) {
        int32_t block =
            claas_kv_find(device_of(seq)->kv, seq->chain, seq->tokens + seq->computed, &seq->chain);

        if (block < 0)
            break;
        seq->blocks[seq->block_count++] = block;
        seq->registered++;
        seq->computed += BLOCK;
        attached += BLOCK;
    }
    return attached;
}

/* Counts tokens whose blocks were found, once they are certain to be used. */
static void count_found(struct claas_sequence *seq, int tokens)
{
    claas_device_t *device = device_of(seq);

    if (tokens == 0)
        return;
    if (!seq->preempted)
        seq->cached += tokens;
    pthread_mutex_lock(&device->lock);
    device->stats.prefix_tokens_shared += (uint64_t)tokens;
    pthread_mutex_unlock(&device->lock);
}

static void register_computed(struct claas_sequence *seq)
{
    if (!is_current(seq))
        return;
    while ((seq->registered + 1) * BLOCK <= seq->computed) {
        seq->chain = claas_kv_register(device_of(seq)->kv, seq->blocks[seq->registered],
                                       claas_kv_root(seq->identity), seq->chain,
                                       seq->tokens + seq->registered * BLOCK);
        seq->registered++;
    }
}

/* Whether an earlier sequence is about to compute the very block that this one needs next: then
 * this one waits a pass and finds it. Equal chains mean equal tokens so far. */
static bool is_led(const struct claas_sequence *seq)
{
    if (seq->registered * BLOCK != seq->computed || seq->computed + BLOCK >= seq->count ||
        !is_current(seq))
        return false;
    for (struct claas_request *r = seq->request.prev; r != NULL; r = r->prev) {
        const struct claas_sequence *leader = as_sequence(r);

        if (leader->computed == seq->computed && leader->chain == seq->chain &&
            leader->registered == seq->registered && leader->computed + BLOCK <= leader->count &&
            leader->identity == seq->identity &&
            memcmp(leader->tokens + leader->computed, seq->tokens + seq->computed,
                   BLOCK * sizeof(*seq->tokens)) == 0)
            return true;
    }
    return false;
}

/* --- admission --- */

/* Blocks that running sequences still need for what they have to compute. */
static int count_promised(const claas_device_t *device)
{
    int promised = 0;

    for (struct claas_request *r = device->running.first; r != NULL; r = r->next)
        promised += blocks_for(as_sequence(r)->count) - as_sequence(r)->block_count;
    return promised;
}

/* Takes memory for the longest that the sequence may become, once, so that none can be missing
 * later. */
static int reserve(struct claas_sequence *seq)
{
    int32_t *tokens, *blocks;

    if (seq->blocks != NULL)
        return 0;
    tokens = claas_realloc(seq->tokens, (size_t)seq->limit, sizeof(*tokens));
    if (tokens == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    seq->tokens = tokens;
    blocks = CLAAS_NEW_ARRAY(int32_t, (size_t)blocks_for(seq->limit));
    if (blocks == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    seq->blocks = blocks;
    return 0;
}

/* Moves a waiting sequence to the running ones if there are blocks for its tokens and one token
 * more. */
static bool admit_if_fits(claas_device_t *device, struct claas_sequence *seq)
{
    int found;

    seq->identity = seq->adapter != NULL ? seq->adapter->identity : 0;
    seq->chain = claas_kv_root(seq->identity);
    found = attach_found(seq);
    if (count_promised(device) + blocks_for(seq->count + 1) - seq->block_count >
        claas_kv_available(device->kv)) {
        drop_blocks(seq);
        return false;
    }
    count_found(seq, found);
    claas_request_begin(&seq->request);
    start_running(device, seq);
    return true;
}

/* Blocks that are the sequence's alone. */
static int count_own(const claas_device_t *device, const struct claas_sequence *seq)
{
    int own = 0;

    for (int i = 0; i < seq->block_count; i++)
        own += claas_kv_is_alone(device->kv, seq->blocks[i]);
    return own;
}

/* Whether a chat of an adapter that has none running may take places of the victim's adapter: if
 * all but its first chat make room enough, and that one and as many blocks as are taken are left.
 */
static bool may_replace(const claas_device_t *device, const struct claas_sequence *seq,
                        const struct claas_sequence *victim)
{
    const int needed = blocks_for(seq->count + 1);
    const struct claas_sequence *first = NULL;
    int freed = 0, room;

    if (claas_generate_share(seq)->running > 0 || claas_generate_share(victim)->running < 2)
        return false;
    for (struct claas_request *r = device->running.first; r != NULL; r = r->next) {
        if (as_sequence(r)->adapter != victim->adapter)
            continue;
        if (first == NULL)
            first = as_sequence(r);
        else
            freed += count_own(device, as_sequence(r));
    }
    room = claas_kv_available(device->kv) - count_promised(device) + freed;
    return needed <= room && 2 * needed <= room + first->block_count;
}

/* Preempts one for a chat, which does not wait for room that a rollout holds. */
static bool make_room(claas_device_t *device, const struct claas_sequence *seq)
{
    struct claas_sequence *victim = find_victim(device);

    if (seq->priority != CLAAS_PRIORITY_CHAT || victim == NULL ||
        (victim->priority == CLAAS_PRIORITY_CHAT && !may_replace(device, seq, victim)))
        return false;
    preempt(victim);
    return true;
}

/* False if the sequence has to wait. */
static bool admit_one(claas_device_t *device, struct claas_sequence *seq)
{
    if (reserve(seq) < 0) {
        retire(&device->waiting, seq);
        claas_request_fail(&seq->request, CLAAS_ERR_NO_MEMORY);
        return true;
    }
    while (device->running.count >= device->options.max_batch || !admit_if_fits(device, seq))
        if (!make_room(device, seq))
            return false;
    return true;
}

/* Lower ones go first: those whose adapter has none running; an answer that was interrupted, since
 * somebody reads it; then by how many the adapter has. */
static int find_rank(const struct claas_sequence *seq)
{
    int running = claas_generate_share(seq)->running;

    return running == 0 ? 0 : seq->preempted ? 1 : 1 + running;
}

/* The waiting chat to admit next, the oldest of equals; NULL if there is none. Of each adapter the
 * first one is looked at, and none behind the last of these. */
static struct claas_sequence *find_chat(claas_device_t *device)
{
    struct claas_sequence *found = NULL;
    int left = device->waiting_shares;

    device->share_scan++;
    for (struct claas_request *r = device->waiting.first; r != NULL && left > 0; r = r->next) {
        struct claas_sequence *seq = as_sequence(r);
        struct claas_share *share = claas_generate_share(seq);

        if (seq->priority != CLAAS_PRIORITY_CHAT)
            break;
        if (share->scan == device->share_scan || claas_train_precedes(device, seq))
            continue;
        share->scan = device->share_scan;
        left--;
        if (found == NULL || find_rank(seq) < find_rank(found))
            found = seq;
    }
    return found;
}

/* Without overtaking: where one does not fit, those behind it wait too, so that a long prompt gets
 * its turn. Chats of other adapters may come before it only while its own has more running, which
 * come to an end, since none of them is admitted before it. Only sequences that wait for a training
 * step of their own client are stepped over. */
static void admit(claas_device_t *device)
{
    struct claas_sequence *chat;
    struct claas_request *next;

    while ((chat = find_chat(device)) != NULL)
        if (!admit_one(device, chat))
            return;
    for (struct claas_request *r = device->waiting.first; r != NULL; r = next) {
        next = r->next;
        if (!claas_train_precedes(device, as_sequence(r)) && !admit_one(device, as_sequence(r)))
            return;
    }
}

/* --- a pass --- */

/* How many of its tokens the sequence runs: all that are left, or whole blocks within the budget.
 */
static int find_run(const struct claas_sequence *seq, int budget)
{
    int left = seq->count - seq->computed;

    if (left == 1 || left <= budget)
        return left;
    return (seq->computed + budget) / BLOCK * BLOCK - seq->computed;
}

/* Preempts until there are blocks for all that the running ones have to compute. One alone always
 * fits. */
static void make_fit(claas_device_t *device)
{
    while (count_promised(device) > claas_kv_available(device->kv))
        preempt(find_victim(device));
}

/* Takes blocks for the first `tokens` tokens: there are enough after make_fit. Were there not, it
 * would be false, and the sequence not in this pass. */
static bool take_blocks(claas_device_t *device, struct claas_sequence *seq, int tokens)
{
    while (seq->block_count < blocks_for(tokens)) {
        int32_t block = claas_kv_take(device->kv);

        if (block < 0)
            return false;
        seq->blocks[seq->block_count++] = block;
    }
    return true;
}

/* Inserts into device->planned [count] behind the last sequence with the same adapter, whose
 * weights are then read once for all of its rows. */
static void add_planned(claas_device_t *device, int count, struct claas_sequence *seq)
{
    struct claas_sequence **planned = device->planned;
    int at = count;

    while (at > 0 && planned[at - 1]->adapter != seq->adapter)
        at--;
    if (at == 0)
        at = count;
    memmove(planned + at + 1, planned + at, (size_t)(count - at) * sizeof(*planned));
    planned[at] = seq;
}

/* Chooses which sequences run how many tokens: device->planned[0 … ret). */
static int plan(claas_device_t *device)
{
    int most, budget, found, count = 0;

    make_fit(device);
    most = budget = claas_budget_find(device);
    for (struct claas_request *r = device->running.first; r != NULL; r = r->next) {
        struct claas_sequence *seq = as_sequence(r);

        found = attach_found(seq);
        give_back(seq, found);
        count_found(seq, found);
        seq->planned = is_led(seq) ? 0 : find_run(seq, budget);
        if (seq->planned <= 0 || !take_blocks(device, seq, seq->computed + seq->planned))
            continue;
        if (seq->count - seq->computed > 1) {
            if (budget == most && seq->turn > device->turn)
                device->turn = seq->turn;
            budget -= seq->planned;
        }
        add_planned(device, count++, seq);
    }
    return count;
}

static int run_pass(claas_device_t *device, int count)
{
    int samples = 0, rc = claas_fault_pass(&device->fault);

    if (rc < 0)
        return rc;
    for (int i = 0; i < count; i++) {
        struct claas_sequence *seq = device->planned[i];

        seq->wanted = seq->computed + seq->planned == seq->count;
        device->segments[i] = (struct claas_segment){
            .tokens = seq->tokens + seq->computed,
            .count = seq->planned,
            .pos = seq->computed,
            .blocks = seq->blocks,
            .adapter = seq->adapter != NULL ? seq->adapter->backend : NULL,
            .wanted = seq->wanted ? 1 : 0,
        };
        if (seq->wanted) {
            device->samples[samples] = seq->sample;
            device->samples[samples++].index = (uint64_t)(seq->count - seq->prompt_count);
        }
    }
    return device->ops->forward(device->backend, device->segments, count, device->samples);
}

static bool is_stop(const struct claas_sequence *seq, int32_t token)
{
    for (size_t i = 0; i < seq->stop_count; i++)
        if (seq->stops[i] == token)
            return true;
    return false;
}

static int send_token(struct claas_sequence *seq, const struct claas_sample *sample, int64_t made)
{
    int top = sample->top_logprobs;
    struct claas_event_node *node =
        claas_alloc(1, sizeof(*node) + (size_t)top * sizeof(node->top[0]));

    if (node == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    node->kind = CLAAS_EVENT_TOKEN;
    node->id = seq->request.id;
    node->token = sample->token;
    node->logprob = sample->logprob;
    node->made = made;
    node->top_count = top;
    for (int i = 0; i < top; i++) {
        node->top[i].token = sample->top_tokens[i];
        node->top[i].logprob = sample->top_logprob[i];
    }
    claas_client_push(seq->request.client, node);
    return 0;
}

static void take_token(claas_device_t *device, struct claas_sequence *seq,
                       const struct claas_sample *sample, int64_t made)
{
    bool stop = is_stop(seq, sample->token);
    int rc;

    /* Its adapter is broken, which does not touch the other sequences of the pass. */
    if (sample->token < 0)
        rc = claas_fail(CLAAS_ERR_NOT_FINITE, "the model gave logits that are not finite");
    else
        rc = send_token(seq, sample, made);
    if (rc < 0) {
        retire(&device->running, seq);
        claas_request_fail(&seq->request, rc);
        return;
    }

    seq->tokens[seq->count++] = sample->token;
    if (!stop && seq->count < seq->limit)
        return;
    retire(&device->running, seq);
    seq->request.last->kind = CLAAS_EVENT_FINISHED;
    seq->request.last->finish = stop ? CLAAS_FINISH_STOP : CLAAS_FINISH_LENGTH;
    claas_request_finish(&seq->request);
}

static void fail_pass(claas_device_t *device, int count, int rc)
{
    for (int i = 0; i < count; i++) {
        struct claas_sequence *seq = device->planned[i];

        retire(&device->running, seq);
        claas_request_fail(&seq->request, rc);
    }
}

/* Figures of a pass: what it computed, and how long that took. */
static void account(claas_device_t *device, int count, int64_t ns)
{
    int prefilled = 0, all = 0, rows = 0, decoded = 0;

    for (int i = 0; i < count; i++) {
        const struct claas_sequence *seq = device->planned[i];
        int prompt = seq->prompt_count - seq->computed;

        all += seq->planned;
        rows += seq->planned == 1;
        if (prompt > 0)
            prefilled += prompt < seq->planned ? prompt : seq->planned;
        decoded += seq->wanted;
    }
    claas_budget_learn(device, all - rows, ns);
    pthread_mutex_lock(&device->lock);
    device->stats.passes++;
    device->stats.tokens_prefilled += (uint64_t)prefilled;
    device->stats.tokens_decoded += (uint64_t)decoded;
    pthread_mutex_unlock(&device->lock);
}

bool claas_generate_iterate(claas_device_t *device)
{
    int64_t start, end;
    int count, rc, sample = 0;

    admit(device);
    count = plan(device);
    if (count == 0)
        return false;
    start = device->now();
    rc = run_pass(device, count);
    if (rc < 0) {
        fail_pass(device, count, rc);
        return true;
    }
    end = device->now();
    account(device, count, end - start);
    for (int i = 0; i < count; i++) {
        struct claas_sequence *seq = device->planned[i];

        seq->computed += seq->planned;
        register_computed(seq);
        if (seq->wanted)
            take_token(device, seq, &device->samples[sample++], end);
    }
    return true;
}
