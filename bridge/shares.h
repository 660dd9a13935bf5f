/* How many of the requests being answered are whose, so that the long ones of one user leave room
 * for another's.
 *
 * There are no keys yet, and a request is the user's whose adapter it names: the name up to its
 * '/', as for the turns of learning. What names no user (the base model, a name of one segment) has
 * one share together. A share for each such name would be a way round the bound: storage takes
 * `user-name` for `user/name`. Streams of jobs' events, which may last for hours, have another one.
 * Pure: no sockets. */
#ifndef CLAAS_BRIDGE_SHARES_H
#define CLAAS_BRIDGE_SHARES_H

#include <stddef.h>

/* Of one user; there while it counts something. */
struct share {
    struct share *next, **link;
    char *user; /* "" for those without */
    size_t count;
};

/* Counts one more for the user in `name` (NULL: for streams of events): OVERLOADED, with a
 * sentence, if there are `most` (at least 1) already. */
int share_take(struct share **shares, const char *name, size_t most, struct share **ret);
/* Counts one less; NULL-safe. */
void share_give_back(struct share **share);

#endif
