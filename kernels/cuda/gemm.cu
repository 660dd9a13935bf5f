/* Matrix products by cuBLASLt, and which of its algorithms does which product.
 *
 * cuBLASLt is column-major: our row-major out[m][n] is its n x m matrix, so each product is asked
 * for transposed, out^T = b' a', with b first:
 *
 *   form   b stored as (rows x columns)   op(b)   a stored as   op(a)
 *   NT     k x n, ldb                     T       k x m, lda    N
 *   NN     n x k, ldb                     N       k x m, lda    N
 *   TN     n x k, ldb                     N       m x k, lda    T
 *
 * Algorithms are chosen per shape, where the dimension that varies with the number of tokens (m; k
 * for gradients) counts by size class only: a pack of 1,713 rows takes what was chosen for 1,601.
 * So the number of choices stays small, and nearly equal packs sum in the same order. Reductions in
 * place (atomic, in no fixed order) and in the output's type (sums rounded to bfloat16) are ruled
 * out. CLAAS_CUDA_TUNE=0 takes cuBLASLt's first proposal instead of timing: the same in every
 * process. */
#include "cuda/gemm.h"

#include "claas/mem.h"

#include <stdlib.h>
#include <string.h>

#define PROPOSALS      8
#define FIRST_CAPACITY 256
#define ALIGNMENT_MAX  256u
#define BIG_PRODUCT    5e10 /* multiply-adds: a tenth of a millisecond or more */
#define REPEATS_BIG    3
#define REPEATS_SMALL  10
#define CLEARLY_FASTER 0.97f /* timings are noisy: a later proposal must win by this */

/* All int32, so that equal keys are equal bytes. */
struct plan_key {
    int32_t form, m, n, k, lda, ldb, ldo;
    int32_t out_type;
    int32_t accumulates;
    int32_t alignments; /* log2 of a, b, add, out: four bits each */
    int32_t exact;      /* m and k are themselves, not their class */
};
struct plan {
    bool used;
    struct plan_key key;
    cublasLtMatmulAlgo_t algo;
};

/* An open-addressing table, at most half full. */
struct cuda_gemm_plans {
    struct plan *slots;
    size_t capacity, count;
    bool tunes;
    cudaEvent_t before, after;
};

/* A product as cuBLASLt wants it. */
struct call {
    const struct cuda_gemm *gemm;
    const void *add; /* what beta multiplies, or out */
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, out;
};

/* --- describing a product --- */

static cudaDataType_t data_type(enum cuda_type type)
{
    return type == CUDA_TYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

static int check_status(struct cuda_context *context, const struct cuda_gemm *gemm,
                        cublasStatus_t status, const char *what)
{
    static const char *const names[] = {"NT", "NN", "TN"};
    int rc;

    if (status == CUBLAS_STATUS_SUCCESS)
        return 0;
    rc = cuda_check_launch(context, "a matrix product");
    if (rc < 0)
        return rc;
    return claas_fail(CLAAS_ERR_DEVICE, "a matrix product %s of %d x %d x %d: %s: %s",
                      names[gemm->form], gemm->m, gemm->n, gemm->k, what,
                      cublasLtGetStatusString(status));
}

static cublasStatus_t set_operation(cublasLtMatmulDescOpaque_t *product,
                                    cublasLtMatmulDescAttributes_t attribute, bool transposed)
{
    int32_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;

    return cublasLtMatmulDescSetAttribute(product, attribute, &operation, sizeof(operation));
}

/* cuBLASLt's A is our b, its B our a. */
static cublasStatus_t describe(const struct cuda_context *context, const struct cuda_gemm *gemm,
                               struct call *call)
{
    cudaDataType_t act = data_type(context->act);
    uint64_t m = (uint64_t)gemm->m, n = (uint64_t)gemm->n, k = (uint64_t)gemm->k;
    bool a_turned = gemm->form == CUDA_GEMM_TN, b_turned = gemm->form == CUDA_GEMM_NT;
    cublasStatus_t status = cublasLtMatmulDescInit(&call->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);

    call->gemm = gemm;
    call->add = gemm->beta != 0.0f && gemm->add ? gemm->add : gemm->out;
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_operation(&call->product, CUBLASLT_MATMUL_DESC_TRANSA, b_turned);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_operation(&call->product, CUBLASLT_MATMUL_DESC_TRANSB, a_turned);
    if (status == CUBLAS_STATUS_SUCCESS)
        status =
            cublasLtMatrixLayoutInit(&call->b, act, b_turned ? k : n, b_turned ? n : k, gemm->ldb);
    if (status == CUBLAS_STATUS_SUCCESS)
        status =
            cublasLtMatrixLayoutInit(&call->a, act, a_turned ? m : k, a_turned ? k : m, gemm->lda);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatrixLayoutInit(&call->out, data_type(gemm->out_type), n, m, gemm->ldo);
    return status;
}

static cublasStatus_t run(struct cuda_context *context, const struct call *call,
                          const cublasLtMatmulAlgo_t *algo, void *out)
{
    const struct cuda_gemm *gemm = call->gemm;
    /* The API takes descriptors as pointers to non-const but only reads them. */
    struct call *c = (struct call *)(uintptr_t)call;

    return cublasLtMatmul(context->lt, &c->product, &gemm->alpha, gemm->b, &c->b, gemm->a, &c->a,
                          &gemm->beta, call->add, &c->out, out, &c->out, algo, context->lt_space,
                          context->lt_space_bytes, context->stream);
}

/* --- choosing an algorithm --- */

static uint32_t alignment(const void *pointer)
{
    uintptr_t bits = (uintptr_t)pointer;
    uintptr_t lowest = bits & (~bits + 1);

    return lowest == 0 || lowest > ALIGNMENT_MAX ? ALIGNMENT_MAX : (uint32_t)lowest;
}

static cublasStatus_t set_preference(cublasLtMatmulPreferenceOpaque_t *preference,
                                     cublasLtMatmulPreferenceAttributes_t attribute, uint32_t value)
{
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
}

static cublasStatus_t prefer(const struct cuda_context *context, const struct call *call,
                             cublasLtMatmulPreferenceOpaque_t *preference)
{
    const struct cuda_gemm *gemm = call->gemm;
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
                                alignment(call->add));
    if (status == CUBLAS_STATUS_SUCCESS)
        status = set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                                alignment(gemm->out));
    return status;
}

/* cuBLASLt's proposals, its favourite first. */
static int propose(struct cuda_context *context, struct call *call,
                   cublasLtMatmulHeuristicResult_t *proposals, int *ret_count)
{
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t found[PROPOSALS];
    int count = 0;
    cublasStatus_t status = prefer(context, call, &preference);

    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(context->lt, &call->product, &call->b, &call->a,
                                                &call->out, &call->out, &preference, PROPOSALS,
                                                found, &count);
    *ret_count = 0;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; i++)
        if (found[i].state == CUBLAS_STATUS_SUCCESS)
            proposals[(*ret_count)++] = found[i];
    if (status == CUBLAS_STATUS_SUCCESS && *ret_count == 0)
        status = CUBLAS_STATUS_NOT_SUPPORTED;
    return check_status(context, call->gemm, status, "no algorithm");
}

/* Milliseconds of one product; negative if the algorithm does not work here. */
static float time_algo(struct cuda_context *context, const struct call *call,
                       const cublasLtMatmulAlgo_t *algo, void *out)
{
    struct cuda_gemm_plans *plans = context->plans;
    const struct cuda_gemm *gemm = call->gemm;
    int repeats = (double)gemm->m * gemm->n * gemm->k > BIG_PRODUCT ? REPEATS_BIG : REPEATS_SMALL;
    float milliseconds = -1.0f;
    /* Once unmeasured: kernels are loaded when first used. */
    bool good = run(context, call, algo, out) == CUBLAS_STATUS_SUCCESS &&
                cudaEventRecord(plans->before, context->stream) == cudaSuccess;

    for (int i = 0; i < repeats && good; i++)
        good = run(context, call, algo, out) == CUBLAS_STATUS_SUCCESS;
    good = good && cudaEventRecord(plans->after, context->stream) == cudaSuccess &&
           cudaEventSynchronize(plans->after) == cudaSuccess &&
           cudaEventElapsedTime(&milliseconds, plans->before, plans->after) == cudaSuccess;
    return good ? milliseconds / (float)repeats : -1.0f;
}

/* The fastest of the proposals. The product is made where it is wanted anyway, but for one that
 * adds to its own output: that goes to memory of its own, and without such memory the favourite is
 * taken unmeasured. */
static int pick_fastest(struct cuda_context *context, const struct call *call,
                        const cublasLtMatmulHeuristicResult_t *proposals, int count)
{
    const struct cuda_gemm *gemm = call->gemm;
    bool adds_to_itself = gemm->beta != 0.0f && call->add == gemm->out;
    size_t element = gemm->out_type == CUDA_TYPE_F32 ? 4 : 2;
    size_t bytes = (size_t)gemm->m * (size_t)gemm->ldo * element;
    void *scratch = NULL;
    float best_time = -1.0f;
    int best = 0;

    if (adds_to_itself && cudaMalloc(&scratch, bytes) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    for (int i = 0; i < count; i++) {
        float time =
            time_algo(context, call, &proposals[i].algo, adds_to_itself ? scratch : gemm->out);

        if (time >= 0.0f && (best_time < 0.0f || time < CLEARLY_FASTER * best_time)) {
            best_time = time;
            best = i;
        }
    }
    if (scratch)
        (void)cudaFree(scratch);
    return best;
}

static bool is_capturing(const struct cuda_context *context)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;

    return cudaStreamIsCapturing(context->stream, &status) != cudaSuccess ||
           status != cudaStreamCaptureStatusNone;
}

/* The one place where an algorithm is decided on; choices kept from an earlier run would be looked
 * up here. */
static int choose(struct cuda_context *context, struct call *call, cublasLtMatmulAlgo_t *ret)
{
    cublasLtMatmulHeuristicResult_t proposals[PROPOSALS];
    int count = 0, best = 0;
    int rc = propose(context, call, proposals, &count);

    if (rc < 0)
        return rc;
    if (count > 1 && context->plans->tunes)
        best = pick_fastest(context, call, proposals, count);
    *ret = proposals[best].algo;
    return cuda_check_launch(context, "timing a matrix product");
}

/* --- the table of choices --- */

/* Finer where a few rows more change what is best. */
static int32_t size_class(int size)
{
    int step = size <= 4096 ? 256 : 1024;
    int power = 1;

    if (size > 256)
        return (int32_t)(((int64_t)size + step - 1) / step * step);
    while (power < size)
        power *= 2;
    return power;
}

static int log2_of(uint32_t power)
{
    int log = 0;

    while (power > 1) {
        power /= 2;
        log++;
    }
    return log;
}

static struct plan_key make_key(const struct call *call, bool exact)
{
    const struct cuda_gemm *gemm = call->gemm;
    bool gradient = gemm->form == CUDA_GEMM_TN;
    struct plan_key key;

    key.form = gemm->form;
    key.m = exact || gradient ? gemm->m : size_class(gemm->m);
    key.n = gemm->n;
    key.k = exact || !gradient ? gemm->k : size_class(gemm->k);
    key.lda = gemm->lda;
    key.ldb = gemm->ldb;
    key.ldo = gemm->ldo;
    key.out_type = gemm->out_type;
    key.accumulates = gemm->beta != 0.0f;
    key.alignments = log2_of(alignment(gemm->a)) | log2_of(alignment(gemm->b)) << 4 |
                     log2_of(alignment(call->add)) << 8 | log2_of(alignment(gemm->out)) << 12;
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
static struct plan *find_slot(struct plan *slots, size_t capacity, const struct plan_key *key)
{
    size_t at = hash_key(key) & (capacity - 1);

    while (slots[at].used && memcmp(&slots[at].key, key, sizeof(*key)) != 0)
        at = (at + 1) & (capacity - 1);
    return &slots[at];
}

static int grow(struct cuda_gemm_plans *plans)
{
    size_t capacity = plans->capacity ? 2 * plans->capacity : FIRST_CAPACITY;
    struct plan *slots = CLAAS_NEW_ARRAY(struct plan, capacity);

    if (!slots)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < plans->capacity; i++)
        if (plans->slots[i].used)
            *find_slot(slots, capacity, &plans->slots[i].key) = plans->slots[i];
    free(plans->slots);
    plans->slots = slots;
    plans->capacity = capacity;
    return 0;
}

static int open_plans(struct cuda_context *context)
{
    const char *tune = getenv("CLAAS_CUDA_TUNE");
    struct cuda_gemm_plans *plans;
    int rc;

    if (context->plans)
        return 0;
    plans = CLAAS_NEW(struct cuda_gemm_plans);
    if (!plans)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    context->plans = plans;
    plans->tunes = !tune || strcmp(tune, "0") != 0;
    rc = grow(plans);
    if (rc == 0)
        rc = cuda_check(context, cudaEventCreate(&plans->before), "making an event");
    if (rc == 0)
        rc = cuda_check(context, cudaEventCreate(&plans->after), "making an event");
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
    if (plans->before)
        (void)cudaEventDestroy(plans->before);
    if (plans->after)
        (void)cudaEventDestroy(plans->after);
    free(plans->slots);
    free(plans);
}

/* The algorithm of a product, chosen now if there is none yet. While a graph is captured nothing
 * can be timed: a shape first seen then gets the favourite and stays undecided. */
static int look_up(struct cuda_context *context, struct call *call, bool exact,
                   cublasLtMatmulAlgo_t *ret)
{
    struct plan_key key = make_key(call, exact);
    struct plan *plan;
    int rc = open_plans(context);

    if (rc == 0 && 2 * (context->plans->count + 1) > context->plans->capacity)
        rc = grow(context->plans);
    if (rc < 0)
        return rc;
    plan = find_slot(context->plans->slots, context->plans->capacity, &key);
    if (!plan->used && is_capturing(context)) {
        cublasLtMatmulHeuristicResult_t proposals[PROPOSALS];
        int count = 0;

        rc = propose(context, call, proposals, &count);
        if (rc == 0)
            *ret = proposals[0].algo;
        return rc;
    }
    if (!plan->used) {
        rc = choose(context, call, &plan->algo);
        if (rc < 0)
            return rc;
        plan->key = key;
        plan->used = true;
        context->plans->count++;
    }
    *ret = plan->algo;
    return 0;
}

static int check_gemm(const struct cuda_gemm *gemm)
{
    bool a_turned = gemm->form == CUDA_GEMM_TN, b_turned = gemm->form == CUDA_GEMM_NT;

    if (gemm->k < 1 || gemm->lda < (a_turned ? gemm->m : gemm->k) ||
        gemm->ldb < (b_turned ? gemm->k : gemm->n) || gemm->ldo < gemm->n)
        return claas_fail(CLAAS_ERR_INTERNAL,
                          "a matrix product of %d x %d x %d with rows of %d, %d and %d", gemm->m,
                          gemm->n, gemm->k, gemm->lda, gemm->ldb, gemm->ldo);
    return 0;
}

int cuda_gemm(struct cuda_context *context, const struct cuda_gemm *gemm)
{
    cublasLtMatmulAlgo_t algo;
    cublasStatus_t status;
    struct call call;
    int rc;

    if (gemm->m < 1 || gemm->n < 1)
        return 0;
    rc = check_gemm(gemm);
    if (rc < 0)
        return rc;
    status = describe(context, gemm, &call);
    if (status != CUBLAS_STATUS_SUCCESS)
        return check_status(context, gemm, status, "describing it");
    rc = look_up(context, &call, false, &algo);
    if (rc < 0)
        return rc;
    status = run(context, &call, &algo, gemm->out);
    /* What suits one size of a class need not do for all of it. */
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) {
        rc = look_up(context, &call, true, &algo);
        if (rc < 0)
            return rc;
        status = run(context, &call, &algo, gemm->out);
    }
    return check_status(context, gemm, status, "running it");
}
