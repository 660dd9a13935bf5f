/* The team of threads: each index exactly once, whatever the team; many short jobs in a row (the
 * path where members still spin) and with pauses between (where they sleep). */
#include <stdatomic.h>
#include <time.h>

#include "check.h"
#include "claas/err.h"

#define INDICES 1000

struct job {
    claas_pool_t *pool;
    atomic_int seen[INDICES];
    atomic_int bad_member;
};

static void count_index(void *arg, int index)
{
    struct job *job = arg;
    const int member = claas_pool_member(job->pool);

    if (member < 0 || member >= claas_pool_threads(job->pool))
        atomic_fetch_add(&job->bad_member, 1);
    memset(claas_pool_scratch(job->pool), index, 4096);
    atomic_fetch_add(&job->seen[index], 1);
}

static void test_each_index_once(void **state)
{
    static struct job job;

    for (int threads = 1; threads <= 4; threads++) {
        claas_pool_t *pool = pool_of(threads);

        assert_int_equal(claas_pool_threads(pool), threads);
        job.pool = pool;
        for (int count = 0; count <= INDICES; count += 1 + count / 3) {
            memset((void *)job.seen, 0, sizeof(job.seen));
            claas_pool_run(pool, count, count_index, &job);
            for (int i = 0; i < INDICES; i++)
                assert_int_equal(job.seen[i], i < count);
        }
        assert_int_equal(job.bad_member, 0);
        claas_pool_free(&pool);
        assert_null(pool);
    }
}

static void add_one(void *arg, int index)
{
    atomic_fetch_add((atomic_long *)arg, 1);
}

static void test_many_short_jobs(void **state)
{
    claas_pool_t *pool = pool_of(3);
    atomic_long sum = 0;
    long want = 0;

    for (int i = 0; i < 20000; i++) {
        claas_pool_run(pool, i % 7, add_one, &sum);
        want += i % 7;
        assert_true(sum == want);
    }
    for (int i = 0; i < 20; i++) {
        nanosleep(&(struct timespec){0, 2000000}, NULL);
        claas_pool_run(pool, 5, add_one, &sum);
        want += 5;
        assert_true(sum == want);
    }
    claas_pool_free(&pool);
}

static void test_scratch_is_apart(void **state)
{
    claas_pool_t *pool = pool_of(4);

    assert_int_equal((uintptr_t)claas_pool_scratch(pool) % 64, 0);
    memset(claas_pool_scratch(pool), 1, CLAAS_POOL_SCRATCH);
    claas_pool_free(&pool);
}

static void test_bad_team_sizes(void **state)
{
    claas_pool_t *pool = NULL;

    assert_int_equal(claas_pool_new(-1, &pool), CLAAS_ERR_INVALID);
    assert_int_equal(claas_pool_new(100000, &pool), CLAAS_ERR_INVALID);
    assert_null(pool);
    assert_int_equal(claas_pool_new(0, &pool), 0);
    assert_true(claas_pool_threads(pool) >= 1);
    claas_pool_free(&pool);
    claas_pool_free(&pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_index_once),
        cmocka_unit_test(test_many_short_jobs),
        cmocka_unit_test(test_scratch_is_apart),
        cmocka_unit_test(test_bad_team_sizes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
