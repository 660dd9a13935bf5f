/* A binary min-heap of timers. It stands in for zloop's own timers, which cost a linear scan each,
 * fire in a burst after a stall, and fire once more after being cancelled in the same tick. */
#include "timers.h"

#include "claas/mem.h"

#include <stdlib.h>

static int is_before(const struct timer *a, const struct timer *b)
{
    return a->due_ms != b->due_ms ? a->due_ms < b->due_ms : a->order < b->order;
}

static void put(struct timers *timers, size_t place, struct timer *timer)
{
    timers->heap[place] = timer;
    timer->place = place;
}

static void rise(struct timers *timers, struct timer *timer)
{
    size_t place = timer->place;

    while (place > 0 && is_before(timer, timers->heap[(place - 1) / 2])) {
        put(timers, place, timers->heap[(place - 1) / 2]);
        place = (place - 1) / 2;
    }
    put(timers, place, timer);
}

static void sink(struct timers *timers, struct timer *timer)
{
    size_t place = timer->place;

    for (;;) {
        size_t child = 2 * place + 1;

        if (child >= timers->count)
            break;
        if (child + 1 < timers->count && is_before(timers->heap[child + 1], timers->heap[child]))
            child++;
        if (!is_before(timers->heap[child], timer))
            break;
        put(timers, place, timers->heap[child]);
        place = child;
    }
    put(timers, place, timer);
}

struct timer *timers_add(struct timers *timers, int64_t due_ms, timers_fn *fn, void *arg,
                         int numbered)
{
    struct timer *timer = CLAAS_NEW(struct timer);

    if (timer && timers->count == timers->capacity) {
        size_t capacity = timers->capacity ? 2 * timers->capacity : 32;
        void *heap = claas_realloc(timers->heap, capacity, sizeof(*timers->heap));

        if (!heap) {
            free(timer);
            return NULL;
        }
        timers->heap = heap;
        timers->capacity = capacity;
    }
    if (!timer)
        return NULL;
    timer->due_ms = due_ms;
    timer->order = timers->set++;
    timer->fn = fn;
    timer->arg = arg;
    if (numbered) {
        timers->last_id = timers->last_id == INT32_MAX ? 1 : timers->last_id + 1;
        timer->id = timers->last_id;
    }
    timer->place = timers->count++;
    rise(timers, timer);
    return timer;
}

static void take_out(struct timers *timers, struct timer *timer)
{
    struct timer *last = timers->heap[--timers->count];

    if (last == timer)
        return;
    put(timers, timer->place, last);
    rise(timers, last);
    sink(timers, last);
}

void timers_remove(struct timers *timers, struct timer *timer)
{
    if (!timer)
        return;
    take_out(timers, timer);
    free(timer);
}

struct timer *timers_find(const struct timers *timers, int id)
{
    for (size_t i = 0; i < timers->count; i++)
        if (timers->heap[i]->id == id)
            return timers->heap[i];
    return NULL;
}

int64_t timers_next(const struct timers *timers)
{
    return timers->count > 0 ? timers->heap[0]->due_ms : INT64_MAX;
}

struct timer *timers_take_due(struct timers *timers, int64_t now_ms, uint64_t set)
{
    struct timer *first = timers->count > 0 ? timers->heap[0] : NULL;

    if (!first || first->due_ms > now_ms || first->order >= set)
        return NULL;
    take_out(timers, first);
    return first;
}

void timers_done(struct timers *timers)
{
    for (size_t i = 0; i < timers->count; i++)
        free(timers->heap[i]);
    free(timers->heap);
    *timers = (struct timers){0};
}
