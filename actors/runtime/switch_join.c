/* How the main node takes a node in: the token proves that the peer may read DATA/keys, the list of
 * its actors becomes routes. A node says HELLO again whenever that list changes; a new incarnation
 * of the node, or of one of its actors, ends what was asked of the old one. */
#include "switch_internal.h"

#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"

#include <sodium.h>
#include <string.h>

struct joining_actor {
    char name[CLAAS_NAME_MAX];
    uint64_t incarnation;
    bool ready;
};

struct joining {
    char node[CLAAS_NAME_MAX];
    uint64_t incarnation;
    struct joining_actor actors[NODE_ACTORS_MAX];
    size_t count;
};

static int check_token(const struct claas_switch *sw, const cJSON *body)
{
    const char *token = NULL;

    if (claas_json_get_string(body, "token", &token) != 1 || strlen(token) != strlen(sw->token) ||
        sodium_memcmp(token, sw->token, strlen(sw->token)) != 0)
        return claas_fail(CLAAS_ERR_DENIED, "the node token is missing or wrong");
    return 0;
}

static int read_actor(const cJSON *item, struct joining_actor *actor)
{
    const char *name = "", *incarnation = "";
    int rc = claas_json_get_string(item, "name", &name);

    if (rc >= 0)
        rc = claas_json_get_string(item, "incarnation", &incarnation);
    if (rc >= 0)
        rc = claas_json_get_bool(item, "ready", &actor->ready);
    if (rc < 0)
        return rc;
    if (!name_valid(name) || strcmp(name, SWITCH_NAME) == 0 || strncmp(name, "client.", 7) == 0)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' cannot be the name of an actor", name);
    claas_copy_text(actor->name, sizeof(actor->name), name);
    actor->incarnation = strtoull(incarnation, NULL, 16);
    return 0;
}

static int read_joining(const cJSON *body, struct joining *joining)
{
    const char *node = "";
    const cJSON *actors = NULL, *item;
    int rc = claas_json_get_string(body, "node", &node);

    if (rc >= 0)
        rc = claas_json_get_array(body, "actors", &actors);
    if (rc < 0)
        return rc;
    if (!name_valid(node))
        return claas_fail(CLAAS_ERR_INVALID, "'%s' cannot be the name of a node", node);
    claas_copy_text(joining->node, sizeof(joining->node), node);
    cJSON_ArrayForEach(item, actors)
    {
        if (joining->count == NODE_ACTORS_MAX)
            return claas_fail(CLAAS_ERR_LIMIT, "a node can have %d actors", NODE_ACTORS_MAX);
        rc = read_actor(item, &joining->actors[joining->count++]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static struct peer *find_node(struct claas_switch *sw, const char *name)
{
    for (struct peer *peer = zhashx_first(sw->outer_peers); peer;
         peer = zhashx_next(sw->outer_peers))
        if (peer->kind == PEER_NODE && strcmp(peer->name, name) == 0)
            return peer;
    return NULL;
}

/* A name is free, or the node's own, or of the same node's former life. */
static int check_names(struct claas_switch *sw, const struct peer *peer, const struct peer *former,
                       const struct joining *joining)
{
    for (size_t i = 0; i < joining->count; i++) {
        const struct route *route = route_find(sw, joining->actors[i].name);

        if (route && route->peer != peer && route->peer != former)
            return claas_fail(CLAAS_ERR_EXISTS, "%s is an actor of %s already", route->name,
                              route->peer->kind == PEER_NODE ? route->peer->name : "the main node");
    }
    return 0;
}

static const struct joining_actor *find_joining(const struct joining *joining, const char *name)
{
    for (size_t i = 0; i < joining->count; i++)
        if (strcmp(joining->actors[i].name, name) == 0)
            return &joining->actors[i];
    return NULL;
}

/* One name of the peer that is not on the list any more, or another actor now. */
static struct route *find_stale(struct claas_switch *sw, const struct peer *peer,
                                const struct joining *joining)
{
    for (struct route *route = zhashx_first(sw->routes); route; route = zhashx_next(sw->routes)) {
        const struct joining_actor *actor = find_joining(joining, route->name);

        if (route->peer == peer && (!actor || actor->incarnation != route->incarnation))
            return route;
    }
    return NULL;
}

static int apply(struct claas_switch *sw, struct peer *peer, const struct joining *joining)
{
    struct route *stale;
    int rc = 0;

    while ((stale = find_stale(sw, peer, joining)) != NULL) {
        flights_cancel_by(sw, peer, stale->name);
        route_drop(sw, stale);
    }
    for (size_t i = 0; i < joining->count && rc == 0; i++)
        rc = route_set(sw, joining->actors[i].name, peer, joining->actors[i].incarnation,
                       joining->actors[i].ready);
    return rc;
}

static int become_node(struct claas_switch *sw, struct peer *peer, const struct joining *joining)
{
    if (peer->kind == PEER_NODE)
        return 0;
    if (sw->node_count >= NODES_MAX)
        return claas_fail(CLAAS_ERR_LIMIT, "%d nodes have joined already", NODES_MAX);
    flights_cancel_by(sw, peer, NULL); /* what it asked as a client */
    peer->kind = PEER_NODE;
    sw->client_count--;
    sw->node_count++;
    claas_copy_text(peer->name, sizeof(peer->name), joining->node);
    peer->incarnation = joining->incarnation;
    claas_info("node %s joined", joining->node); /* its actors come one by one */
    return 0;
}

int join_take_hello(struct claas_switch *sw, struct peer *peer, const struct claas_header *header,
                    const cJSON *body)
{
    CLAAS_AUTO_FREE struct joining *joining = CLAAS_NEW(struct joining);
    int rc = joining ? check_token(sw, body) : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    if (rc == 0)
        rc = read_joining(body, joining);
    if (rc < 0)
        return rc;
    joining->incarnation = header->epoch;
    struct peer *former = find_node(sw, joining->node);
    if (peer->kind == PEER_NODE && former != peer)
        return claas_fail(CLAAS_ERR_CONFLICT, "this node joined as %s", peer->name);
    rc = check_names(sw, peer, former, joining);
    if (rc < 0)
        return rc;
    if (former && former != peer) {
        claas_info("node %s is here anew", joining->node);
        peer_bury(sw, former);
    }
    rc = become_node(sw, peer, joining);
    return rc < 0 ? rc : apply(sw, peer, joining);
}
