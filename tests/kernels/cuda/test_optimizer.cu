/* Gradient norm, clipping and AdamW against double, and bit for bit against the same operations in
 * float on the host. */
#include "cuda_check.h"

#include "cuda/optimizer.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static struct cuda_context context;

/* Arrays of one adapter. */
struct state {
    size_t count;
    struct check_array parameters, exp_avg, exp_avg_sq, grad;
    struct check_buffer parts, learned;
};

static struct state state_new(size_t count, float scale)
{
    const size_t shift = check_shift;
    struct state s = {};

    s.count = count;
    s.parameters = check_acts(CUDA_TYPE_F32, count, 1);
    s.exp_avg = check_acts(CUDA_TYPE_F32, count, 0.1f);
    s.exp_avg_sq = check_acts(CUDA_TYPE_F32, count, 0.1f);
    for (size_t i = 0; i < count; i++)
        s.exp_avg_sq.host[i] *= s.exp_avg_sq.host[i];
    check_put(&s.exp_avg_sq);
    s.grad = check_acts(CUDA_TYPE_F32, count, scale);
    check_shift = 0; /* doubles: always aligned */
    s.parts = check_buffer_new(CUDA_NORM_PARTS * sizeof(double));
    s.learned = check_buffer_new(sizeof(struct cuda_learned));
    check_shift = shift;
    return s;
}

static void state_free(struct state *s)
{
    check_free(&s->parameters, "parameters"), check_free(&s->exp_avg, "exp_avg");
    check_free(&s->exp_avg_sq, "exp_avg_sq"), check_free(&s->grad, "grad");
    check_buffer_free(&s->parts, "parts"), check_buffer_free(&s->learned, "learned");
}

static struct cuda_learned measure(struct state *s)
{
    struct cuda_learned learned = {};

    check_rc(cuda_measure_gradient(&context, (const float *)s->grad.data, s->count,
                                   (double *)s->parts.data,
                                   (struct cuda_learned *)s->learned.data),
             "measure_gradient");
    check_download(&s->learned, &learned);
    return learned;
}

static struct cuda_adamw adamw_args(struct state *s, int64_t step, float max_grad_norm)
{
    struct cuda_adamw args = {};

    args.count = s->count;
    args.parameters = (float *)s->parameters.data;
    args.exp_avg = (float *)s->exp_avg.data;
    args.exp_avg_sq = (float *)s->exp_avg_sq.data;
    args.grad = (const float *)s->grad.data;
    args.rate = 3e-3f, args.beta1 = 0.9f, args.beta2 = 0.999f, args.eps = 1e-8f;
    args.weight_decay = 0.01f;
    args.max_grad_norm = max_grad_norm;
    args.step = step;
    args.learned = (const struct cuda_learned *)s->learned.data;
    return args;
}

static void check_norm(size_t count)
{
    struct state s = state_new(count, 2);
    const struct cuda_learned a = measure(&s), b = measure(&s);
    double sum = 0;

    for (size_t i = 0; i < count; i++)
        sum += (double)s.grad.host[i] * s.grad.host[i];
    if (!(fabs(a.norm - sqrt(sum)) <= 1e-12 * sqrt(sum)))
        check_fail("norm of %zu: got %.17g, want %.17g", count, a.norm, sqrt(sum));
    if (a.finite != 1)
        check_fail("norm of %zu: finite is %d", count, a.finite);
    check_same("a second measure's norm", &b.norm, &a.norm, sizeof(a.norm));
    check_same("a second measure's finite", &b.finite, &a.finite, sizeof(a.finite));
    state_free(&s);
}

static const size_t counts[] = {1,    2,    3,    4,    5,      8,       1022,
                                1023, 1024, 1025, 4100, 100000, 1048577, 3000001};

static void test_norm(void)
{
    check_begin("gradient norm");
    for (size_t i = 0; i < COUNT(counts); i++)
        check_norm(counts[i]);
    check_norm(0);
    check_end();
    check_begin("gradient norm, less aligned");
    check_shift = 8;
    check_norm(5), check_norm(100003);
    check_shift = 0;
    check_end();
}

/* An update in double, and with the operations of cpu/optim_fast.h in float. */
struct wanted {
    double *parameters, *exp_avg, *exp_avg_sq;
    float *bits[3];
};

static struct wanted want_update(const struct state *s, const struct cuda_adamw *a, double norm)
{
    const double clip =
        a->max_grad_norm > 0 ? fmin(1, (double)a->max_grad_norm / (norm + 1e-6)) : 1;
    const double c1 = 1 - pow((double)a->beta1, (double)a->step);
    const double c2 = sqrt(1 - pow((double)a->beta2, (double)a->step));
    const float step_size = a->rate / (float)c1, decay = 1.0f - a->rate * a->weight_decay;
    const float rest1 = 1.0f - a->beta1, rest2 = 1.0f - a->beta2;
    struct wanted w = {};

    w.parameters = (double *)check_alloc(s->count, sizeof(double));
    w.exp_avg = (double *)check_alloc(s->count, sizeof(double));
    w.exp_avg_sq = (double *)check_alloc(s->count, sizeof(double));
    for (int i = 0; i < 3; i++)
        w.bits[i] = (float *)check_alloc(s->count, sizeof(float));
    for (size_t i = 0; i < s->count; i++) {
        const double g = s->grad.host[i] * clip;
        /* volatile: every operation is rounded by itself, whatever the compiler may fuse */
        const volatile float gf = s->grad.host[i] * (float)clip;
        const volatile float m_old = a->beta1 * s->exp_avg.host[i], m_new = rest1 * gf;
        const volatile float v_old = a->beta2 * s->exp_avg_sq.host[i], v_half = rest2 * gf;
        const volatile float v_new = v_half * gf, m = m_old + m_new, v = v_old + v_new;
        const volatile float ratio = sqrtf(v) / (float)c2, up = step_size * m;
        const volatile float root = ratio + a->eps, p_old = s->parameters.host[i] * decay;
        const volatile float step = up / root;

        w.exp_avg[i] = a->beta1 * (double)s->exp_avg.host[i] + (1 - (double)a->beta1) * g;
        w.exp_avg_sq[i] = a->beta2 * (double)s->exp_avg_sq.host[i] + (1 - (double)a->beta2) * g * g;
        w.parameters[i] = s->parameters.host[i] * (1 - (double)a->rate * a->weight_decay) -
                          a->rate / c1 * w.exp_avg[i] / (sqrt(w.exp_avg_sq[i]) / c2 + a->eps);
        w.bits[0][i] = p_old - step, w.bits[1][i] = m, w.bits[2][i] = v;
    }
    return w;
}

static void wanted_free(struct wanted *w)
{
    free(w->parameters), free(w->exp_avg), free(w->exp_avg_sq);
    for (int i = 0; i < 3; i++)
        free(w->bits[i]);
}

static void fetch(struct state *s)
{
    check_get(&s->parameters), check_get(&s->exp_avg), check_get(&s->exp_avg_sq);
}

/* Three updates one after the other, each from what the device holds. */
static void check_adamw(size_t count, float scale, float max_grad_norm, int64_t first_step)
{
    struct state s = state_new(count, scale);

    for (int64_t step = first_step; step < first_step + 3; step++) {
        const struct cuda_adamw args = adamw_args(&s, step, max_grad_norm);
        const struct cuda_learned learned = measure(&s);
        struct wanted want = want_update(&s, &args, learned.norm);

        check_rc(cuda_adamw(&context, &args), "adamw");
        fetch(&s);
        check_close("parameters", s.parameters.host, want.parameters, count, CHECK_F32_LIMIT);
        check_close("exp_avg", s.exp_avg.host, want.exp_avg, count, CHECK_F32_LIMIT);
        check_close("exp_avg_sq", s.exp_avg_sq.host, want.exp_avg_sq, count, CHECK_F32_LIMIT);
        check_same("parameters", s.parameters.host, want.bits[0], count * sizeof(float));
        check_same("exp_avg", s.exp_avg.host, want.bits[1], count * sizeof(float));
        check_same("exp_avg_sq", s.exp_avg_sq.host, want.bits[2], count * sizeof(float));
        wanted_free(&want);
    }
    state_free(&s);
}

static void test_adamw(void)
{
    check_begin("adamw");
    for (size_t i = 0; i < COUNT(counts); i++)
        check_adamw(counts[i], 2, 0, 1);
    check_end();
    check_begin("adamw, clipped");
    check_adamw(1, 2, 0.5f, 1), check_adamw(100001, 2, 1, 1), check_adamw(100001, 2, 1, 5000);
    check_adamw(1000, 2, 1e6f, 2);      /* a limit that is not reached */
    check_adamw(1000, 1e-7f, 1e-6f, 1); /* a norm as small as the limit and the 1e-6 beside it */
    check_end();
    check_begin("adamw, less aligned");
    check_shift = 4;
    check_adamw(7, 2, 1, 1), check_adamw(100001, 2, 1, 1);
    check_shift = 0;
    check_end();
}

/* With `value` as one gradient nothing may change. */
static void check_refused(size_t count, size_t at, float value)
{
    struct state s = state_new(count, 1);
    float *before = (float *)check_alloc(3 * count, sizeof(float));
    struct cuda_adamw args = {};
    struct cuda_learned learned = {};

    s.grad.host[at] = value;
    check_put(&s.grad);
    memcpy(before, s.parameters.host, count * sizeof(float));
    memcpy(before + count, s.exp_avg.host, count * sizeof(float));
    memcpy(before + 2 * count, s.exp_avg_sq.host, count * sizeof(float));
    learned = measure(&s);
    if (learned.finite != 0)
        check_fail("%g in grad at %zu: finite is %d", (double)value, at, learned.finite);
    args = adamw_args(&s, 1, 1);
    check_rc(cuda_adamw(&context, &args), "adamw");
    fetch(&s);
    check_same("parameters", s.parameters.host, before, count * sizeof(float));
    check_same("exp_avg", s.exp_avg.host, before + count, count * sizeof(float));
    check_same("exp_avg_sq", s.exp_avg_sq.host, before + 2 * count, count * sizeof(float));
    free(before);
    state_free(&s);
}

static void test_refused(void)
{
    check_begin("adamw, not finite");
    check_refused(1, 0, NAN);
    check_refused(5003, 5002, INFINITY);
    check_refused(2000001, 1999999, NAN);
    check_refused(2000001, 1, -INFINITY);
    check_refused(100, 3, NAN);
    check_end();
    check_begin("adamw, no parameters");
    struct state s = state_new(0, 1);
    const struct cuda_adamw args = adamw_args(&s, 1, 1);
    const struct cuda_learned learned = measure(&s);
    if (learned.norm != 0 || learned.finite != 1)
        check_fail("norm %g, finite %d", learned.norm, learned.finite);
    check_rc(cuda_adamw(&context, &args), "adamw");
    state_free(&s);
    check_end();
}

/* The adapter of Qwen3-8B with rank 32 on all modules. */
static void time_all(void)
{
    const size_t count = 87293952;
    float *arrays[4] = {};
    struct state s = state_new(1, 1);
    struct cuda_adamw args = adamw_args(&s, 10, 1);
    float ms;

    for (int i = 0; i < 4; i++) {
        check_cuda(cudaMalloc((void **)&arrays[i], count * sizeof(float)), "cudaMalloc");
        check_fill(CUDA_TYPE_F32, arrays[i], count, 1);
    }
    /* the second moments: squares of nothing, but not negative */
    check_cuda(cudaMemset(arrays[2], 0, count * sizeof(float)), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "cudaMemset");
    args.count = count;
    args.parameters = arrays[0], args.exp_avg = arrays[1], args.exp_avg_sq = arrays[2];
    args.grad = arrays[3];
    ms = check_median_ms(&context, [&] {
        cuda_measure_gradient(&context, arrays[3], count, (double *)s.parts.data,
                              (struct cuda_learned *)s.learned.data);
    });
    check_report("gradient norm, 87.3M", ms, 4.0 * (double)count, 0);
    ms = check_median_ms(&context, [&] { cuda_adamw(&context, &args); });
    check_report("adamw, 87.3M", ms, 28.0 * (double)count, 0);
    for (int i = 0; i < 4; i++)
        cudaFree(arrays[i]);
    state_free(&s);
}

int main(void)
{
    check_open(CUDA_TYPE_BF16, &context);
    test_norm();
    test_adamw();
    test_refused();
    if (check_measures())
        time_all();
    cuda_context_close(&context);
    return check_finish();
}
