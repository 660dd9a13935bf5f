/* What the switch says of itself: who is here and how much waits for each. */
#include "switch_internal.h"

#include "claas/clock.h"

#include <inttypes.h>

static cJSON *describe_route(const struct route *route)
{
    cJSON *entry = cJSON_CreateObject();
    char incarnation[32];

    snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, route->incarnation);
    claas_json_set_string(entry, "actor", route->name);
    claas_json_set_string(entry, "incarnation", incarnation);
    claas_json_set_bool(entry, "ready", route->ready);
    claas_json_set_int(entry, "waiting", (int64_t)route->peer->waiting.count);
    claas_json_set_string(entry, "node", route->peer->kind == PEER_NODE ? route->peer->name : "");
    return entry;
}

cJSON *switch_status(struct claas_switch *sw)
{
    cJSON *body = cJSON_CreateObject(), *detail, *actors;
    char incarnation[32];

    snprintf(incarnation, sizeof(incarnation), "%016" PRIx64, sw->incarnation);
    claas_json_set_string(body, "actor", SWITCH_NAME);
    claas_json_set_string(body, "incarnation", incarnation);
    claas_json_set_int(body, "uptime_ms", claas_clock_ms() - sw->started_ms);
    claas_json_set_int(body, "handled", 0);
    detail = claas_json_set(body, "detail", cJSON_CreateObject());
    claas_json_set_int(detail, "clients", (int64_t)sw->client_count);
    claas_json_set_int(detail, "nodes", (int64_t)sw->node_count);
    claas_json_set_int(detail, "requests", (int64_t)zhashx_size(sw->flights));
    claas_json_set_bool(detail, "joined", sw->link ? atomic_load(&sw->joined) : true);
    actors = claas_json_set(detail, "actors", cJSON_CreateArray());
    for (struct route *route = zhashx_first(sw->routes); route; route = zhashx_next(sw->routes))
        cJSON_AddItemToArray(actors, describe_route(route));
    return body;
}
