/* From logits to tokens on the CPU: greedy choice, temperature, top-k, top-p, alternatives, seeds,
 * on hand-made logits. (The card's: cuda/test_sample.) */
#include "step_fixture.h"

#include "claas/err.h"
#include "claas/mem.h"
#include "cpu/step.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define VOCAB 512

static struct step_fixture fixture;

static int set_up(void **state)
{
    (void)unsetenv("CLAAS_TEST_BACKEND");
    step_open(&fixture, "random:tiny-llama", "f32", 2, NULL);
    assert_int_equal(fixture.config->vocab, VOCAB);
    return 0;
}

static int tear_down(void **state)
{
    step_close(&fixture);
    return 0;
}

/* A long tail at -4, and five tokens above it with probabilities 0.4, 0.25, 0.15, 0.1, 0.05 to each
 * other. */
static const int32_t likely[] = {300, 7, 450, 8, 101};
static const double weights[] = {0.4, 0.25, 0.15, 0.1, 0.05};

static void make_logits(float *logits, float tail)
{
    for (int i = 0; i < VOCAB; i++)
        logits[i] = tail;
    for (size_t i = 0; i < CLAAS_COUNT(likely); i++)
        logits[likely[i]] = (float)log(weights[i]);
}

static int rank_of(int32_t token)
{
    for (size_t i = 0; i < CLAAS_COUNT(likely); i++)
        if (likely[i] == token)
            return (int)i;
    return (int)CLAAS_COUNT(likely);
}

/* Shares of the ranks over many seeds. */
static void draw(const float *logits, struct claas_sample sample, int draws, double *shares)
{
    int counts[CLAAS_COUNT(likely) + 1] = {0};

    sample.given = -1;
    for (int i = 0; i < draws; i++) {
        struct claas_sample one = sample;

        one.seed = (uint64_t)i / 4;
        one.index = (uint64_t)i % 4;
        claas_cpu_sample(fixture.backend, 1, logits, &one);
        counts[rank_of(one.token)]++;
    }
    for (size_t i = 0; i <= CLAAS_COUNT(likely); i++)
        shares[i] = (double)counts[i] / draws;
}

/* Expected shares of the first `kept` ranks; draws within four standard deviations. */
static void expect_shares(const double *shares, const double *expected, int kept, int draws)
{
    double sum = 0;

    for (int i = 0; i < kept; i++)
        sum += expected[i];
    for (int i = 0; i <= (int)CLAAS_COUNT(likely); i++) {
        double p = i < kept ? expected[i] / sum : 0;

        if (!(fabs(shares[i] - p) <= 4 * sqrt(p * (1 - p) / draws)))
            fail_msg("rank %d: share %.4f, expected %.4f", i, shares[i], p);
    }
}

static void greedy_takes_the_first_of_the_best(void **state)
{
    float logits[VOCAB] = {0};
    struct claas_sample sample = {.given = -1, .top_p = 1};

    claas_cpu_sample(fixture.backend, 1, logits, &sample);
    assert_int_equal(sample.token, 0);
    logits[40] = logits[39] = logits[500] = 2;
    claas_cpu_sample(fixture.backend, 1, logits, &sample);
    assert_int_equal(sample.token, 39);
    sample.temperature = 1;
    sample.top_k = 1;
    claas_cpu_sample(fixture.backend, 1, logits, &sample);
    assert_int_equal(sample.token, 39);
    assert_true(sample.logprob == logits[39] - claas_logsumexp(logits, VOCAB));
}

static void filters_keep_what_they_say(void **state)
{
    enum { DRAWS = 6000 };
    float logits[VOCAB];
    double shares[CLAAS_COUNT(likely) + 1], squared[CLAAS_COUNT(likely)];
    struct claas_sample sample = {.temperature = 1, .top_p = 1};

    make_logits(logits, -INFINITY);
    draw(logits, sample, DRAWS, shares);
    expect_shares(shares, weights, 5, DRAWS);
    make_logits(logits, -12); /* a tail of 507 tokens with a mass of 0.3 % */
    sample.top_k = 3;
    draw(logits, sample, DRAWS, shares);
    expect_shares(shares, weights, 3, DRAWS);
    sample.top_k = 0;
    sample.top_p = 0.6f; /* 0.42 + 0.26 reaches it */
    draw(logits, sample, DRAWS, shares);
    expect_shares(shares, weights, 2, DRAWS);
    sample.top_p = 0.95f;
    sample.top_k = 4;
    draw(logits, sample, DRAWS, shares);
    expect_shares(shares, weights, 4, DRAWS);
    sample = (struct claas_sample){.temperature = 0.5f, .top_p = 0.999f};
    for (size_t i = 0; i < CLAAS_COUNT(weights); i++)
        squared[i] = weights[i] * weights[i];
    draw(logits, sample, DRAWS, shares);
    expect_shares(shares, squared, 5, DRAWS);
}

static void the_nucleus_has_always_one_token(void **state)
{
    float logits[VOCAB];
    struct claas_sample sample = {.given = -1, .temperature = 1, .top_p = 1e-6f};

    make_logits(logits, -3);
    for (uint64_t seed = 0; seed < 50; seed++) {
        sample.seed = seed;
        claas_cpu_sample(fixture.backend, 1, logits, &sample);
        assert_int_equal(sample.token, likely[0]);
    }
    sample.top_p = 1;
    sample.temperature = 1e-8f; /* far beyond the range of exp */
    claas_cpu_sample(fixture.backend, 1, logits, &sample);
    assert_int_equal(sample.token, likely[0]);
}

static void seeds_and_indices_reproduce(void **state)
{
    float logits[3 * VOCAB];
    struct claas_sample together[3], alone;
    int different = 0;

    for (int i = 0; i < 3; i++)
        make_logits(logits + i * VOCAB, -6);
    for (uint64_t seed = 0; seed < 20; seed++) {
        for (int i = 0; i < 3; i++)
            together[i] = (struct claas_sample){
                .given = -1, .temperature = 1, .top_p = 1, .seed = seed, .index = (uint64_t)i};
        claas_cpu_sample(fixture.backend, 3, logits, together);
        for (int i = 0; i < 3; i++) {
            alone = (struct claas_sample){
                .given = -1, .temperature = 1, .top_p = 1, .seed = seed, .index = (uint64_t)i};
            claas_cpu_sample(fixture.backend, 1, logits, &alone);
            assert_int_equal(alone.token, together[i].token);
        }
        different += together[0].token != together[1].token;
    }
    assert_true(different > 5);
}

static void alternatives_are_sorted(void **state)
{
    float logits[VOCAB], lse;
    struct claas_sample sample = {.given = 101, .top_logprobs = 8};

    make_logits(logits, -9);
    lse = claas_logsumexp(logits, VOCAB);
    claas_cpu_sample(fixture.backend, 1, logits, &sample);
    assert_int_equal(sample.token, 101);
    assert_true(sample.logprob == logits[101] - lse);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(sample.top_tokens[i], likely[i]);
        assert_true(sample.top_logprob[i] == logits[likely[i]] - lse);
    }
    for (int i = 5; i < 8; i++) /* equals in order of id */
        assert_int_equal(sample.top_tokens[i], i - 5);
}

static void logits_that_are_not_finite_give_no_token(void **state)
{
    static const float bad[] = {NAN, INFINITY};

    for (size_t i = 0; i < CLAAS_COUNT(bad); i++) {
        float logits[2 * VOCAB] = {0};
        struct claas_sample samples[2] = {{.given = -1}, {.given = -1}};

        logits[VOCAB + 77] = bad[i];
        claas_cpu_sample(fixture.backend, 2, logits, samples);
        assert_int_equal(samples[0].token, 0);
        assert_int_equal(samples[1].token, -1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_first_of_the_best),
        cmocka_unit_test(filters_keep_what_they_say),
        cmocka_unit_test(the_nucleus_has_always_one_token),
        cmocka_unit_test(seeds_and_indices_reproduce),
        cmocka_unit_test(alternatives_are_sorted),
        cmocka_unit_test(logits_that_are_not_finite_give_no_token),
    };

    return cmocka_run_group_tests(tests, set_up, tear_down);
}
