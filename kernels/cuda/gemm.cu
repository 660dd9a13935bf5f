/* Matrix products by cuBLASLt, and which of its algorithms does which product.
 *
 * cuBLASLt is column-major: our row-major out[m][n] is its n x m matrix, so each product is asked
 * for transposed, out^T = b' a', with b first. It sees a as k x m; b as k x n, which it turns (NT),
 * or as n x k (NN).
 *
 * Algorithms are chosen per shape, where m, which varies with the number of tokens, counts by size
 * class only: a pack of 1,713 rows takes what was chosen for 1,601. So the number of choices stays
 * small, and nearly equal packs sum in the same order. Reductions in place (atomic, in no fixed
 * order) and in the output's type (sums rounded to bfloat16) are ruled out. Choices are kept in a
 * file (gemm_choices.h), so that the next process sums in the same order and need not time
 * anything. CLAAS_CUDA_TUNE=0 takes cuBLASLt's first proposal instead, and neither reads nor writes
 * the file: the same in every process.
 *
 * A plan also keeps the product described for cuBLASLt, with the number of tokens it had last: a
 * product that comes again costs a look-up and cublasLtMatmul.
 *
 * Few rows by a weight are multiplied by gemm_few.cu instead; CLAAS_CUDA_FEW=0 leaves them here. */
#include "cuda/gemm.h"
#include "cuda/gemm_choices.h"
#include "cuda/gemm_few.h"

#include "claas/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROPOSALS      8
#define FIRST_CAPACITY 256
#define ALIGNMENT_LOG  8    /* of 256 bytes: what matters at most */
#define BIG_PRODUCT    5e10 /* multiply-adds: a tenth of a millisecond or more */
#define REPEATS_BIG    3
#define REPEATS_SMALL  10
#define CLEARLY_FASTER 0.97f /* timings are noisy: a later proposal must win by this */

/* All int32, so that equal keys are equal bytes. A change of what they mean is a new version of
 * the file's format. */
struct plan_key {
    int32_t form, m, n, k, lda, ldb, ldo;
    int32_t act, out_type; /* of a and b; of the output */
    int32_t accumulates;
    int32_t alignments; /* log2 of a, b, add, out: four bits each */
    int32_t exact;      /* m is itself, not its class */
};
static_assert(sizeof(struct plan_key) == GEMM_CHOICE_KEY, "keys as the file has them");
static_assert(sizeof(cublasLtMatmulAlgo_t) == GEMM_CHOICE_ALGO, "algorithms as the file has them");

enum plan_state {
    PLAN_OPEN, /* nothing chosen yet */
    PLAN_READ, /* the file's algorithm, which cuBLASLt has not looked at */
    PLAN_DECIDED,
    PLAN_GUESSED, /* could not be timed: good for this process, not for the file */
};
struct plan {
    struct plan_key key;
    enum plan_state state;
    cublasLtMatmulAlgo_t algo;
    int m; /* what the descriptors say; 0: nothing yet */
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, out;
};

/* An open-addressing table, at most half full. */
struct cuda_gemm_plans {
    struct plan **slots;
    size_t capacity, count;
    bool tunes, few;
    cudaEvent_t before, after;
    char *path; /* of the file; NULL: none */
    struct gemm_choices_origin origin;
    bool unsaved;    /* something was chosen that the file does not have */
    int64_t written; /* when the file was last written; before that, when the context was opened */
};

/* --- describing a product --- */

static cudaDataType_t data_type(enum cuda_type type)
{
    return type == CUDA_TYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static int check_status(struct cuda_context *context, const struct cuda_gemm *gemm,
                        cublasStatus_t status, const char *what)
{
    static const char *const names[] = {"NT", "NN"};
    int rc;

    if (status == CUBLAS_STATUS_SUCCESS)
        return 0;
    rc = cuda_check_launch(context, "a matrix product");
    if (rc == 0)
        rc = cuda_check_device(context, "a matrix product");
    if (rc < 0)
        return rc;
    rc = status == CUBLAS_STATUS_ALLOC_FAILED ? CLAAS_ERR_NO_MEMORY : CLAAS_ERR_DEVICE;
    return claas_fail(rc, "a matrix product %s of %d x %d x %d: %s: %s",
                      names[gemm->form], gemm->m, gemm->n, gemm->k, what,
                      cublasLtGetStatusString(status));
}

/* cuBLASLt's C: what is added, or the output, which is not read then. */
static const void *added(const struct cuda_gemm *gemm)
{
    return gemm->add ? gemm->add : gemm->out;
}

/* Fills in the plan's descriptors. cuBLASLt's A is our b, its B our a, which it never turns. */
static cublasStatus_t describe(const struct cuda_context *context, const struct cuda_gemm *gemm,
                               struct plan *plan)
{
    cudaDataType_t act = data_type(context->act);
    uint64_t m = (uint64_t)gemm->m, n = (uint64_t)gemm->n, k = (uint64_t)gemm->k;
    bool b_turned = gemm->form == CUDA_GEMM_NT;
    int32_t operation = b_turned ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t status = cublasLtMatmulDescInit(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);

    plan->m = 0;
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_TRANSA,
                                                &operation, sizeof(operation));
    if (status == CUBLAS_STATUS_SUCCESS)
        status =
            cublasLtMatrixLayoutInit(&plan->b, act, b_turned ? k : n, b_turned ? n : k, gemm->ldb);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutInit(&plan->a, act, k, m, gemm->lda);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutInit(&plan->out, data_type(gemm->out_type), n, m, gemm->ldo);
    if (status == CUBLAS_STATUS_SUCCESS)
        plan->m = gemm->m;
    return status;
}

static cublasStatus_t run(struct cuda_context *context, const struct cuda_gemm *gemm,
                          struct plan *plan, const cublasLtMatmulAlgo_t *algo)
{
    const float alpha = 1.0f, beta = gemm->add ? 1.0f : 0.0f;

    return cublasLtMatmul(context->lt, &plan->product, &alpha, gemm->b, &plan->b, gemm->a, &plan->a,
                          &beta, added(gemm), &plan->out, gemm->out, &plan->out, algo,
                          context->lt_space, context->lt_space_bytes, context->stream);
}

/* --- choosing an algorithm --- */

/* log2 of the bytes that an address is a multiple of. */
static int alignment_log(const void *pointer)
{
    return __builtin_ctzll((uintptr_t)pointer | 1ull << ALIGNMENT_LOG);
}

static uint32_t alignment(const void *pointer)
{
    return 1u << alignment_log(pointer);
}

static cublasStatus_t set_preference(cublasLtMatmulPreferenceOpaque_t *preference,
                                     cublasLtMatmulPreferenceAttributes_t attribute, uint32_t value)
{
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
}

static cublasStatus_t prefer(const struct cuda_context *context, const struct cuda_gemm *gemm,
                             cublasLtMatmulPreferenceOpaque_t *preference)
{
    uint64_t space = context->lt_space_bytes;
    cublasStatus_t status = cublasLtMatmulPreferenceInit(preference);

    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulPreferenceSetAttribute(
            preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &space, sizeof(space));
    if (status == CUBLAS_STATUS_SUCCESS) /* no reduction at all is always allowed */
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                                alignment(gemm->b));
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                alignment(gemm->a));
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                                alignment(added(gemm)));
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                alignment(gemm->out));
    return status;
}

/* cuBLASLt's proposals, its favourite first. */
static int propose(struct cuda_context *context, const struct cuda_gemm *gemm, struct plan *plan,
                   cublasLtMatmulHeuristicResult_t *proposals, int *ret_count)
{
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    int count = 0;
    cublasStatus_t status = prefer(context, gemm, &preference);

    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(context->lt, &plan->product, &plan->b, &plan->a,
                                                &plan->out, &plan->out, &preference, PROPOSALS,
                                                found, &count);
    *ret_count = 0;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS)
            proposals[(*ret_count)++] = found[i];
    if (status == CUBLAS_STATUS_SUCCESS && *ret_count == 0)
        status = CUBLAS_STATUS_NOT_SUPPORTED;
    return check_status(context, gemm, status, "no algorithm");
}

/* Milliseconds of one product; negative if the algorithm does not work here. */
static float time_algo(struct cuda_context *context, const struct cuda_gemm *gemm,
                       struct plan *plan, const cublasLtMatmulAlgo_t *algo)
{
    struct cuda_gemm_plans *plans = context->plans;
    int repeats = (double)gemm->m * gemm->n * gemm->k > BIG_PRODUCT ? REPEATS_BIG : REPEATS_SMALL;
    float milliseconds = -1.0f;
    /* Once unmeasured: kernels are loaded when first used. */
    bool good = run(context, gemm, plan, algo) == CUBLAS_STATUS_SUCCESS &&
                cudaEventRecord(plans->before, context->stream) == cudaSuccess;

    for (int i = 0; i < repeats && good; i++)
        good = run(context, gemm, plan, algo) == CUBLAS_STATUS_SUCCESS;
    good = good && cudaEventRecord(plans->after, context->stream) == cudaSuccess &&
           cudaEventSynchronize(plans->after) == cudaSuccess &&
           cudaEventElapsedTime(&milliseconds, plans->before, plans->after) == cudaSuccess;
    return good ? milliseconds / (float)repeats : -1.0f;
}

/* A chat's turn before a timing: what is new to a process is loaded first, which takes milliseconds
 * each. Its pass may describe the plan for rows of its own, and choose for it. A step that is to be
 * given up ends behind the product (cuda_turn). An error of CUDA's is this product's, so it must
 * not meet the chat. Adds the turn's milliseconds to *away. */
static cublasStatus_t give_turn(struct cuda_context *context, const struct cuda_gemm *gemm,
                                struct plan *plan, int64_t *away)
{
    int64_t start = gemm_choices_clock();

    if (cudaPeekAtLastError() != cudaSuccess)
        return CUBLAS_STATUS_SUCCESS;
    (void)cuda_give_turn(&context->turns);
    *away += gemm_choices_clock() - start;
    return plan->m == gemm->m ? CUBLAS_STATUS_SUCCESS : describe(context, gemm, plan);
}

/* The fastest of the proposals; each makes the product where it is wanted anyway. Ends early where
 * a chat's pass has chosen meanwhile. */
static int pick_fastest(struct cuda_context *context, const struct cuda_gemm *gemm,
                        struct plan *plan, const cublasLtMatmulHeuristicResult_t *proposals,
                        int count, bool *ret_measured)
{
    int64_t start = gemm_choices_clock(), away = 0;
    float best_time = -1.0f;
    int best = 0;

    for (int i = 0; i < count; i++) {
        float time;

        if (give_turn(context, gemm, plan, &away) != CUBLAS_STATUS_SUCCESS ||
            plan->state != PLAN_OPEN)
            break;
        time = time_algo(context, gemm, plan, &proposals[i].algo);
        if (time >= 0.0f && (best_time < 0.0f || time < CLEARLY_FASTER * best_time)) {
            best_time = time;
            best = i;
        }
    }
    gemm_choices_note(gemm->m, gemm->n, gemm->k, gemm_choices_clock() - start - away);
    *ret_measured = best_time >= 0.0f;
    return best;
}

/* Whether the file's algorithm can do this product here, within the workspace, and adds in a fixed
 * order. */
static bool is_usable(struct cuda_context *context, struct plan *plan)
{
    cublasLtMatmulHeuristicResult_t result;
    uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_INPLACE;
    size_t written = 0;

    memset(&result, 0, sizeof(result));
    return cublasLtMatmulAlgoConfigGetAttribute(&plan->algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                                &scheme, sizeof(scheme),
                                                &written) == CUBLAS_STATUS_SUCCESS &&
           written == sizeof(scheme) &&
           (scheme == CUBLASLT_REDUCTION_SCHEME_NONE ||
            scheme == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) &&
           cublasLtMatmulAlgoCheck(context->lt, &plan->product, &plan->b, &plan->a, &plan->out,
                                   &plan->out, &plan->algo, &result) == CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= context->lt_space_bytes;
}

/* The one place where an algorithm is decided on. While a graph is captured nothing can be timed: a
 * shape that is first seen then gets the favourite, and its plan stays open. */
static int choose(struct cuda_context *context, const struct cuda_gemm *gemm, struct plan *plan)
{
    cublasLtMatmulHeuristicResult_t proposals[PROPOSALS];
    bool capturing = cuda_is_capturing(context);
    bool measured = true; /* nothing to choose from, or nobody wants it timed */
    int count = 0, best = 0, rc;

    if (plan->state == PLAN_READ && is_usable(context, plan)) {
        plan->state = PLAN_DECIDED;
        return 0;
    }
    plan->state = PLAN_OPEN;
    rc = propose(context, gemm, plan, proposals, &count);
    if (rc < 0)
        return rc;
    if (count > 1 && context->plans->tunes && !capturing) {
        best = pick_fastest(context, gemm, plan, proposals, count, &measured);
        if (plan->state != PLAN_OPEN)
            return 0;
    }
    plan->algo = proposals[best].algo;
    rc = cuda_check_launch(context, "timing a matrix product");
    if (rc == 0 && !capturing) {
        plan->state = measured ? PLAN_DECIDED : PLAN_GUESSED;
        context->plans->unsaved = context->plans->unsaved || measured;
    }
    return rc;
}

/* --- the table of choices --- */

/* Finer where a few rows more change what is best. */
int cuda_gemm_class(int m)
{
    int step = m <= 4096 ? 256 : 1024;
    int power = 1;

    if (m > 256)
        return (int)(((int64_t)m + step - 1) / step * step);
    while (power < m)
        power *= 2;
    return power;
}

static struct plan_key make_key(const struct cuda_context *context, const struct cuda_gemm *gemm,
                                bool exact)
{
    struct plan_key key;

    key.form = gemm->form;
    key.m = exact ? gemm->m : cuda_gemm_class(gemm->m);
    key.n = gemm->n;
    key.k = gemm->k;
    key.lda = gemm->lda;
    key.ldb = gemm->ldb;
    key.ldo = gemm->ldo;
    key.act = context->act;
    key.out_type = gemm->out_type;
    key.accumulates = gemm->add != NULL;
    key.alignments = alignment_log(gemm->a) | alignment_log(gemm->b) << 4 |
                     alignment_log(added(gemm)) << 8 | alignment_log(gemm->out) << 12;
    key.exact = exact;
    return key;
}

/* FNV-1a over the key's words. */
static size_t hash_key(const struct plan_key *key)
{
    uint32_t words[sizeof(*key) / 4];
    uint64_t hash = UINT64_C(0xcbf29ce484222325);

    memcpy(words, key, sizeof(words));
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
        hash = (hash ^ words[i]) * UINT64_C(0x100000001b3);
    return (size_t)(hash ^ hash >> 32);
}

/* The key's slot, or the free one where it belongs. */
static struct plan **find_slot(struct plan **slots, size_t capacity, const struct plan_key *key)
{
    size_t at = hash_key(key) & (capacity - 1);

    while (slots[at] && memcmp(&slots[at]->key, key, sizeof(*key)) != 0)
        at = (at + 1) & (capacity - 1);
    return &slots[at];
}

static int grow(struct cuda_gemm_plans *plans)
{
    size_t capacity = plans->capacity ? 2 * plans->capacity : FIRST_CAPACITY;
    struct plan **slots = CLAAS_NEW_ARRAY(struct plan *, capacity);

    if (!slots)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < plans->capacity; i++)
        if (plans->slots[i])
            *find_slot(slots, capacity, &plans->slots[i]->key) = plans->slots[i];
    free(plans->slots);
    plans->slots = slots;
    plans->capacity = capacity;
    return 0;
}

/* The key's plan, open if it is new; NULL without memory. */
static struct plan *find_plan(struct cuda_gemm_plans *plans, const struct plan_key *key)
{
    struct plan **slot = find_slot(plans->slots, plans->capacity, key);

    if (*slot)
        return *slot;
    if (2 * (plans->count + 1) > plans->capacity) {
        if (grow(plans) < 0)
            return NULL;
        slot = find_slot(plans->slots, plans->capacity, key);
    }
    *slot = CLAAS_NEW(struct plan);
    if (!*slot)
        return NULL;
    (*slot)->key = *key;
    plans->count++;
    return *slot;
}

/* The plan of a product, with an algorithm, and with descriptors for this very product. */
static int look_up(struct cuda_context *context, const struct cuda_gemm *gemm, bool exact,
                   struct plan **ret)
{
    struct plan_key key = make_key(context, gemm, exact);
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    struct plan *plan = find_plan(context->plans, &key);
    int rc = 0;

    if (!plan)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (plan->m != gemm->m)
        status = describe(context, gemm, plan);
    if (status != CUBLAS_STATUS_SUCCESS)
        return check_status(context, gemm, status, "describing it");
    if (plan->state == PLAN_OPEN || plan->state == PLAN_READ)
        rc = choose(context, gemm, plan);
    *ret = plan;
    return rc;
}

/* --- what is kept between processes --- */

static void set_origin(const struct cuda_context *context, struct gemm_choices_origin *origin)
{
    int driver = 0;

    (void)cudaDriverGetVersion(&driver);
    memset(origin, 0, sizeof(*origin));
    (void)snprintf(origin->device, sizeof(origin->device), "%s", context->name);
    origin->library = cublasLtGetVersion();
    origin->driver = driver;
    origin->arch = context->arch;
}

static int read_choices(struct cuda_context *context)
{
    struct cuda_gemm_plans *plans = context->plans;
    struct gemm_choices choices = {};
    size_t taken = 0;
    bool all;

    plans->path = gemm_choices_path(context->name);
    if (!plans->path)
        return 0;
    set_origin(context, &plans->origin);
    gemm_choices_read(plans->path, &plans->origin, &choices);
    while (taken < choices.count) {
        struct plan_key key;
        struct plan *plan;

        memcpy(&key, choices.items[taken].key, sizeof(key));
        plan = find_plan(plans, &key);
        if (!plan)
            break;
        memcpy(&plan->algo, choices.items[taken].algo, sizeof(plan->algo));
        plan->state = PLAN_READ;
        taken++;
    }
    all = taken == choices.count;
    gemm_choices_done(&choices);
    return all ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* A file that cannot be written is not tried again. */
static void write_choices(struct cuda_gemm_plans *plans)
{
    struct gemm_choices choices = {};

    plans->unsaved = false;
    plans->written = gemm_choices_clock();
    choices.items = CLAAS_NEW_ARRAY(struct gemm_choice, plans->count + 1);
    if (!choices.items)
        return;
    for (size_t i = 0; i < plans->capacity; i++) {
        const struct plan *plan = plans->slots[i];

        if (!plan || plan->state == PLAN_OPEN || plan->state == PLAN_GUESSED)
            continue;
        memcpy(choices.items[choices.count].key, &plan->key, sizeof(plan->key));
        memcpy(choices.items[choices.count].algo, &plan->algo, sizeof(plan->algo));
        choices.count++;
    }
    if (gemm_choices_write(plans->path, &plans->origin, &choices) < 0) {
        free(plans->path);
        plans->path = NULL;
    }
    gemm_choices_done(&choices);
}

/* Writes the file now and then while the table grows, and never during a capture. */
static void keep_choices(struct cuda_context *context)
{
    struct cuda_gemm_plans *plans = context->plans;

    if (plans->path && gemm_choices_clock() - plans->written >= GEMM_CHOICES_WAIT &&
        !cuda_is_capturing(context))
        write_choices(plans);
}

void cuda_gemm_keep(struct cuda_context *context)
{
    struct cuda_gemm_plans *plans = context->plans;

    if (plans && plans->path && plans->unsaved)
        write_choices(plans);
}

/* --- opening and closing --- */

static int open_plans(struct cuda_context *context)
{
    struct cuda_gemm_plans *plans;
    int rc;

    if (context->plans)
        return 0;
    plans = CLAAS_NEW(struct cuda_gemm_plans);
    if (!plans)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    context->plans = plans;
    plans->tunes = !cuda_is_off("CLAAS_CUDA_TUNE");
    plans->few = !cuda_is_off("CLAAS_CUDA_FEW");
    plans->written = gemm_choices_clock();
    rc = grow(plans);
    if (rc == 0)
        rc = cuda_check(context, cudaEventCreate(&plans->before), "making an event");
    if (rc == 0)
        rc = cuda_check(context, cudaEventCreate(&plans->after), "making an event");
    if (rc == 0)
        rc = cuda_gemm_few_open(context);
    if (rc == 0 && plans->tunes)
        rc = read_choices(context);
    if (rc < 0)
        cuda_gemm_plans_free(context);
    return rc;
}

void cuda_gemm_plans_free(struct cuda_context *context)
{
    struct cuda_gemm_plans *plans = context->plans;

    context->plans = NULL;
    if (!plans)
        return;
    if (plans->unsaved && plans->path)
        write_choices(plans);
    if (plans->before)
        (void)cudaEventDestroy(plans->before);
    if (plans->after)
        (void)cudaEventDestroy(plans->after);
    for (size_t i = 0; i < plans->capacity; i++)
        free(plans->slots[i]);
    free(plans->slots);
    free(plans->path);
    free(plans);
}

/* --- products --- */

static int check_gemm(const struct cuda_gemm *gemm)
{
    if (gemm->k < 1 || gemm->lda < gemm->k ||
        gemm->ldb < (gemm->form == CUDA_GEMM_NT ? gemm->k : gemm->n) || gemm->ldo < gemm->n)
        return claas_fail(CLAAS_ERR_INTERNAL,
                          "a matrix product of %d x %d x %d with rows of %d, %d and %d", gemm->m,
                          gemm->n, gemm->k, gemm->lda, gemm->ldb, gemm->ldo);
    if (gemm->add && gemm->add == gemm->out)
        return claas_fail(CLAAS_ERR_INTERNAL,
                          "a matrix product of %d x %d x %d that adds to its own output", gemm->m,
                          gemm->n, gemm->k);
    return 0;
}

/* Does the product by cuBLASLt. */
static int run_library(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    struct plan *plan = NULL;
    cublasStatus_t status;
    int rc = look_up(context, gemm, false, &plan);

    if (rc < 0)
        return rc;
    status = run(context, gemm, plan, &plan->algo);
    /* An algorithm that suits one size of a class need not suit all of them. */
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
        rc = look_up(context, gemm, true, &plan);
        if (rc < 0)
            return rc;
        status = run(context, gemm, plan, &plan->algo);
    }
    if (context->plans->unsaved)
        keep_choices(context);
    return check_status(context, gemm, status, "running it");
}

bool cuda_gemm_adds_lora(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    return open_plans(context) == 0 && context->plans->few && cuda_gemm_few_suits(context, gemm) &&
           cuda_gemm_few_adds(context, gemm);
}

int cuda_gemm(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    int rc;

    if (gemm->m < 1 || gemm->n < 1)
        return 0;
    rc = check_gemm(gemm);
    if (rc == 0)
        rc = open_plans(context);
    if (rc == 0 && gemm->lora && !cuda_gemm_adds_lora(context, gemm))
        rc = claas_fail(CLAAS_ERR_INTERNAL, "a product of %d x %d x %d that cannot add LoRA",
                        gemm->m, gemm->n, gemm->k);
    if (rc < 0)
        return rc;
    if (context->plans->few && cuda_gemm_few_suits(context, gemm))
        return cuda_gemm_few(context, gemm);
    return run_library(context, gemm);
}
