/* Timers of one actor: a min-heap by due time. Each entry knows its place, so removing one is O(log
 * n). */
#ifndef CLAAS_RUNTIME_TIMERS_H
#define CLAAS_RUNTIME_TIMERS_H

#include <stddef.h>
#include <stdint.h>

typedef void timers_fn(void *self, void *arg);

struct timer {
    int64_t due_ms;
    uint64_t order; /* equal times fire in the order of their setting */
    size_t place;
    int id; /* > 0; 0 for the runtime's own */
    timers_fn *fn;
    void *arg;
};
struct timers {
    struct timer **heap;
    size_t count, capacity;
    uint64_t set;
    int last_id;
};

/* NULL when out of memory. With `numbered` it gets an id. */
struct timer *timers_add(struct timers *timers, int64_t due_ms, timers_fn *fn, void *arg,
                         int numbered);
/* Removes and frees; NULL is fine. */
void timers_remove(struct timers *timers, struct timer *timer);
struct timer *timers_find(const struct timers *timers, int id);
/* Due time of the first, INT64_MAX when there is none. */
int64_t timers_next(const struct timers *timers);
/* Takes the first one off the heap if it is due and was there when timers->set was `set`; the
 * caller frees it. */
struct timer *timers_take_due(struct timers *timers, int64_t now_ms, uint64_t set);
void timers_done(struct timers *timers);

#endif
