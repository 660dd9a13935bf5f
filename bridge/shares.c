/* How many of the requests being answered are whose: see shares.h. */
#include "shares.h"

#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/mem.h"

#define EVENTS "/" /* the user of streams of events: no name has one with a slash */

/* The length of the user in a name, 0 if there is none. Slashes at its ends mean nothing to storage
 * either. */
static size_t find_user(const char **name)
{
    const char *rest;
    size_t length;

    *name += strspn(*name, "/");
    length = strcspn(*name, "/");
    rest = *name + length;
    return rest[strspn(rest, "/")] ? length : 0;
}

static struct share *share_new(struct share **shares, const char *user, size_t length)
{
    struct share *share = CLAAS_NEW(struct share);

    if (!share)
        return NULL;
    share->user = claas_strndup(user, length);
    if (!share->user) {
        free(share);
        return NULL;
    }
    share->next = *shares;
    share->link = shares;
    if (share->next)
        share->next->link = &share->next;
    *shares = share;
    return share;
}

static int fail_full(const struct share *share)
{
    if (strcmp(share->user, EVENTS) == 0)
        return claas_fail(CLAAS_ERR_OVERLOADED,
                          "http.max_inflight_per_user is %zu, and as many streams of jobs' events "
                          "are open; try again later",
                          share->count);
    if (share->user[0])
        return claas_fail(CLAAS_ERR_OVERLOADED,
                          "http.max_inflight_per_user is %zu, and as many requests of user '%s' "
                          "are being answered; try again later",
                          share->count, claas_quote(share->user).text);
    return claas_fail(CLAAS_ERR_OVERLOADED,
                      "http.max_inflight_per_user is %zu, and as many requests that name no user "
                      "are being answered; try again later",
                      share->count);
}

int share_take(struct share **shares, const char *name, size_t most, struct share **ret)
{
    const char *user = name ? name : EVENTS;
    size_t length = name ? find_user(&user) : strlen(EVENTS);
    struct share *share = *shares;

    while (share && (strncmp(share->user, user, length) != 0 || share->user[length]))
        share = share->next;
    if (!share)
        share = share_new(shares, user, length);
    if (!share)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (share->count >= most)
        return fail_full(share);
    share->count++;
    *ret = share;
    return 0;
}

void share_give_back(struct share **share)
{
    struct share *given = CLAAS_TAKE(*share);

    if (!given || --given->count > 0)
        return;
    *given->link = given->next;
    if (given->next)
        given->next->link = given->link;
    free(given->user);
    free(given);
}
