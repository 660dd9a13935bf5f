/* Who is connected and which name is where.
 *
 * Names of local actors and of joined nodes' actors live in `routes`; clients have none there, so
 * nobody can send them anything but answers. A mailbox mirrors what a peer has not taken yet: it is
 * what bounds an actor by count and by bytes (the high-water mark counts messages only, and adds up
 * over both ends). */
#include "switch_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <string.h>

/* --- tables ----------------------------------------------------------------------------------- */

static size_t hash_bytes(const void *bytes, size_t length)
{
    uint64_t hash = 0xCBF29CE484222325u; /* FNV-1a */

    for (size_t i = 0; i < length; i++)
        hash = (hash ^ ((const uint8_t *)bytes)[i]) * 0x100000001B3u;
    return (size_t)(hash ^ hash >> 32);
}

static size_t hash_peer_id(const void *key)
{
    const struct peer_id *id = key;

    return hash_bytes(id->bytes, id->length);
}

static int compare_peer_ids(const void *a, const void *b)
{
    const struct peer_id *x = a, *y = b;

    return x->length != y->length || memcmp(x->bytes, y->bytes, x->length) != 0;
}

static size_t hash_flight(const void *key)
{
    const struct flight_key *flight = key;

    return hash_bytes(flight->requester, strlen(flight->requester)) +
           (size_t)(flight->correlation * 0x9E3779B97F4A7C15u >> 16);
}

static int compare_flights(const void *a, const void *b)
{
    const struct flight_key *x = a, *y = b;

    return x->correlation != y->correlation || strcmp(x->requester, y->requester) != 0;
}

/* A table whose keys lie in its items. */
static zhashx_t *new_table(zhashx_hash_fn *hash, zhashx_comparator_fn *compare)
{
    zhashx_t *table = zhashx_new();

    if (!table)
        return NULL;
    zhashx_set_key_duplicator(table, NULL);
    zhashx_set_key_destructor(table, NULL);
    if (hash) {
        zhashx_set_key_hasher(table, hash);
        zhashx_set_key_comparator(table, compare);
    }
    return table;
}

int switch_tables_new(struct claas_switch *sw)
{
    sw->inner_peers = new_table(hash_peer_id, compare_peer_ids);
    sw->outer_peers = new_table(hash_peer_id, compare_peer_ids);
    sw->routes = new_table(NULL, NULL);
    sw->flights = new_table(hash_flight, compare_flights);
    if (!sw->inner_peers || !sw->outer_peers || !sw->routes || !sw->flights)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return 0;
}

static void free_peer(struct peer *peer)
{
    free(peer->waiting.sizes);
    backlog_drop(&peer->backlog);
    free(peer);
}

static void free_items(zhashx_t **table, void (*destroy)(void *item))
{
    void *item;

    if (!*table)
        return;
    for (item = zhashx_first(*table); item; item = zhashx_next(*table))
        destroy(item);
    zhashx_destroy(table);
}

static void destroy_peer(void *item)
{
    free_peer(item);
}

void switch_tables_free(struct claas_switch *sw)
{
    free_items(&sw->flights, free);
    free_items(&sw->routes, free);
    free_items(&sw->inner_peers, destroy_peer);
    free_items(&sw->outer_peers, destroy_peer);
    if (sw->upstream)
        free_peer(sw->upstream);
    sw->upstream = NULL;
}

/* --- mailboxes -------------------------------------------------------------------------------- */

bool mailbox_has_room(const struct claas_switch *sw, const struct mailbox *box, size_t bytes)
{
    if (box->count >= sw->mailbox)
        return false;
    return box->count == 0 || box->bytes + bytes <= WAITING_BYTES_MAX;
}

static int grow(struct mailbox *box)
{
    size_t capacity = box->capacity ? 2 * box->capacity : 64;
    uint32_t *sizes = CLAAS_NEW_ARRAY(uint32_t, capacity);

    if (!sizes)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    for (size_t i = 0; i < box->count; i++)
        sizes[i] = box->sizes[(box->first + i) % box->capacity];
    free(box->sizes);
    box->sizes = sizes;
    box->capacity = capacity;
    box->first = 0;
    return 0;
}

int mailbox_put(struct mailbox *box, size_t bytes)
{
    if (box->count == box->capacity && grow(box) < 0)
        return CLAAS_ERR_NO_MEMORY;
    box->sizes[(box->first + box->count++) % box->capacity] = (uint32_t)bytes;
    box->bytes += bytes;
    return 0;
}

void mailbox_take(struct mailbox *box, size_t count)
{
    while (count-- > 0 && box->count > 0) {
        box->bytes -= box->sizes[box->first];
        box->first = (box->first + 1) % box->capacity;
        box->count--;
    }
}

/* --- peers ------------------------------------------------------------------------------------ */

struct peer *peer_new(struct claas_switch *sw, enum peer_kind kind, const struct peer_id *id)
{
    struct peer *peer = CLAAS_NEW(struct peer);

    if (!peer)
        return NULL;
    if (kind == PEER_CLIENT && !(peer->backlog = backlog_new())) {
        free(peer);
        return NULL;
    }
    peer->kind = kind;
    peer->heard_ms = claas_clock_ms();
    LIST_INIT(&peer->asked);
    LIST_INIT(&peer->asked_of);
    if (id)
        peer->id = *id;
    if (kind == PEER_ACTOR)
        zhashx_insert(sw->inner_peers, &peer->id, peer);
    else if (kind == PEER_CLIENT)
        zhashx_insert(sw->outer_peers, &peer->id, peer);
    return peer;
}

void peer_mark_dead(struct claas_switch *sw, struct peer *peer)
{
    if (peer->dead)
        return;
    peer->dead = true;
    sw->dead_count++;
}

static void drop_routes_of(struct claas_switch *sw, const struct peer *peer)
{
    struct route *route = zhashx_first(sw->routes);

    while (route) {
        struct route *next = zhashx_next(sw->routes);

        if (route->peer == peer) {
            zhashx_delete(sw->routes, route->name);
            free(route);
        }
        route = next;
    }
}

/* What it had not taken from its mailbox is lost: that is counted, and told to the requesters that
 * wait. The upstream peer stays as an object, because it comes back. */
void peer_bury(struct claas_switch *sw, struct peer *peer)
{
    char text[CLAAS_NAME_MAX + 32];

    if (peer->dead)
        sw->dead_count--;
    peer->dead = false;
    snprintf(text, sizeof(text), "%s went away", peer->name);
    claas_metric_add(CLAAS_METRIC_MESSAGES_LOST, (double)peer->waiting.count);
    mailbox_take(&peer->waiting, peer->waiting.count);
    drop_routes_of(sw, peer);
    flights_fail_of(sw, peer, NULL, CLAAS_ERR_UNAVAILABLE, text);
    flights_cancel_by(sw, peer, NULL);
    if (peer->kind == PEER_UPSTREAM)
        return;
    if (peer->kind == PEER_CLIENT)
        sw->client_count--;
    if (peer->kind == PEER_NODE)
        sw->node_count--;
    if (peer->dead) /* found out again while burying */
        sw->dead_count--;
    zhashx_delete(peer->kind == PEER_ACTOR ? sw->inner_peers : sw->outer_peers, &peer->id);
    free_peer(peer);
}

static struct peer *find_dead(zhashx_t *table)
{
    for (struct peer *peer = zhashx_first(table); peer; peer = zhashx_next(table))
        if (peer->dead)
            return peer;
    return NULL;
}

void switch_bury_dead(struct claas_switch *sw)
{
    while (sw->dead_count > 0) {
        struct peer *peer = find_dead(sw->outer_peers);

        if (!peer)
            peer = find_dead(sw->inner_peers);
        if (!peer)
            peer = sw->upstream;
        if (peer->kind == PEER_UPSTREAM)
            atomic_store(&sw->joined, false);
        if (peer->kind == PEER_NODE)
            claas_warning("node %s went away", peer->name);
        peer_bury(sw, peer);
    }
}

/* --- names ------------------------------------------------------------------------------------ */

struct route *route_find(struct claas_switch *sw, const char *name)
{
    return zhashx_lookup(sw->routes, name);
}

static bool is_member(const struct route *route, const char *name, size_t length)
{
    return route->ready && !route->peer->dead && strncmp(route->name, name, length) == 0 &&
           route->name[length] == '.';
}

/* Among several, the one with the shortest mailbox; equal ones in turns. */
struct route *route_pick(struct claas_switch *sw, const char *name)
{
    struct route *best = zhashx_lookup(sw->routes, name);
    size_t length = strlen(name), seen = 0, turn = 0;

    if (best)
        return best;
    for (struct route *route = zhashx_first(sw->routes); route; route = zhashx_next(sw->routes)) {
        if (!is_member(route, name, length))
            continue;
        if (best && route->peer->waiting.count > best->peer->waiting.count)
            continue;
        if (!best || route->peer->waiting.count < best->peer->waiting.count)
            seen = 0;
        seen++;
        if (!best || seen == 1 || (turn = sw->turn % seen) == 0)
            best = route;
    }
    sw->turn++;
    return best;
}

int route_set(struct claas_switch *sw, const char *name, struct peer *peer, uint64_t incarnation,
              bool ready)
{
    struct route *route = route_find(sw, name);

    if (!route) {
        route = CLAAS_NEW(struct route);
        if (!route)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        claas_copy_text(route->name, sizeof(route->name), name);
        zhashx_insert(sw->routes, route->name, route);
    }
    route->peer = peer;
    route->incarnation = incarnation;
    route->ready = ready;
    return 0;
}

void route_drop(struct claas_switch *sw, struct route *route)
{
    char text[CLAAS_NAME_MAX + 32];

    snprintf(text, sizeof(text), "%s went away", route->name);
    flights_fail_of(sw, route->peer, route->name, CLAAS_ERR_UNAVAILABLE, text);
    zhashx_delete(sw->routes, route->name);
    free(route);
}
