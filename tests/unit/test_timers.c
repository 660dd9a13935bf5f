/* The heap of timers against a plain list, under a long run of random additions, removals and time
 * steps. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "timers.h"

#include "claas/mem.h"
#include "claas/random.h"

#include <stdbool.h>
#include <stdlib.h>

#define MODEL 512

struct entry {
    struct timer *timer;
    int64_t due;
    uint64_t order;
};

static struct entry model[MODEL];
static size_t model_count;

static size_t model_first(void)
{
    size_t first = 0;

    for (size_t i = 1; i < model_count; i++)
        if (model[i].due < model[first].due ||
            (model[i].due == model[first].due && model[i].order < model[first].order))
            first = i;
    return first;
}

static void fire_due(struct timers *timers, int64_t now)
{
    struct timer *timer;

    while ((timer = timers_take_due(timers, now, timers->set)) != NULL) {
        size_t first = model_first();

        assert_true(model_count > 0 && model[first].due <= now);
        assert_ptr_equal(model[first].timer, timer);
        model[first] = model[--model_count];
        free(timer);
    }
    for (size_t i = 0; i < model_count; i++)
        assert_true(model[i].due > now);
}

static void against_a_list(void **state)
{
    struct timers timers = {0};
    int64_t now = 0;

    for (uint64_t i = 0; i < 20000; i++) {
        uint32_t random[4];

        claas_philox(3, 4, i, random);
        if (random[0] % 8 < 5 && model_count < MODEL) {
            int64_t due = now + random[1] % 50;

            model[model_count].timer = timers_add(&timers, due, NULL, NULL, 1);
            model[model_count].due = due;
            model[model_count].order = i;
            assert_ptr_equal(timers_find(&timers, model[model_count].timer->id),
                             model[model_count].timer);
            model_count++;
        } else if (random[0] % 8 < 7 && model_count > 0) {
            size_t victim = random[1] % model_count;

            timers_remove(&timers, model[victim].timer);
            model[victim] = model[--model_count];
        } else {
            now += random[1] % 4;
            fire_due(&timers, now);
        }
        assert_int_equal(timers.count, model_count);
        int64_t next = model_count > 0 ? model[model_first()].due : INT64_MAX;
        assert_true(timers_next(&timers) == next);
    }
    timers_done(&timers);
    model_count = 0;
}

/* What a callback sets waits for the next round, even when it is due at once. */
static void rounds_end(void **state)
{
    struct timers timers = {0};
    uint64_t set;

    timers_add(&timers, 5, NULL, NULL, 1);
    set = timers.set;
    struct timer *first = timers_take_due(&timers, 10, set);
    assert_non_null(first);
    timers_add(&timers, 5, NULL, NULL, 1);
    assert_null(timers_take_due(&timers, 10, set));
    timers_remove(&timers, NULL);
    assert_null(timers_find(&timers, 99));
    free(first);
    timers_done(&timers);
    assert_true(timers_next(&timers) == INT64_MAX);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(against_a_list),
        cmocka_unit_test(rounds_end),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
