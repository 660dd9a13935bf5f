/* Requests under way. The switch keeps one entry per request until it is answered, so that
 *   - an answer is only taken from the actor that was asked, and only once;
 *   - when that actor or its node goes away, everyone who waits is told at once;
 *   - when the requester goes away, the actor is told to stop working for it. */
#include "switch_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#include <string.h>

static struct flight_key key_of(const char *requester, uint64_t correlation)
{
    struct flight_key key = {.correlation = correlation};

    claas_copy_text(key.requester, sizeof(key.requester), requester);
    return key;
}

struct flight *flight_find(struct claas_switch *sw, const char *requester, uint64_t correlation)
{
    struct flight_key key = key_of(requester, correlation);

    return zhashx_lookup(sw->flights, &key);
}

struct flight *flight_new(struct claas_switch *sw, struct peer *requester,
                          const char *requester_name, struct peer *receiver,
                          const char *receiver_name, const struct claas_header *header)
{
    struct flight *flight = CLAAS_NEW(struct flight);

    if (!flight)
        return NULL;
    flight->key = key_of(requester_name, header->correlation);
    flight->requester = requester;
    flight->receiver = receiver;
    flight->type = header->type;
    flight->epoch = header->epoch;
    flight->deadline_ms = claas_clock_ms() + header->budget_ms;
    memcpy(flight->trace_id, header->trace_id, sizeof(flight->trace_id));
    claas_copy_text(flight->receiver_name, sizeof(flight->receiver_name), receiver_name);
    zhashx_insert(sw->flights, &flight->key, flight);
    LIST_INSERT_HEAD(&requester->asked, flight, by_requester);
    LIST_INSERT_HEAD(&receiver->asked_of, flight, by_receiver);
    requester->asked_count++;
    return flight;
}

void flight_free(struct claas_switch *sw, struct flight *flight)
{
    LIST_REMOVE(flight, by_requester);
    LIST_REMOVE(flight, by_receiver);
    flight->requester->asked_count--;
    zhashx_delete(sw->flights, &flight->key);
    free(flight);
}

/* Both take the flight out of the tables before they send. */
static struct flight take(struct claas_switch *sw, struct flight *flight)
{
    struct flight copy = *flight;

    flight_free(sw, flight);
    return copy;
}

static void tell_requester(struct claas_switch *sw, const struct flight *ended, int code,
                           const char *text)
{
    struct claas_header about = {.type = (uint16_t)ended->type,
                                 .correlation = ended->key.correlation,
                                 .epoch = ended->epoch};

    memcpy(about.trace_id, ended->trace_id, sizeof(about.trace_id));
    switch_send_error(sw, ended->requester, ended->key.requester, &about, code, text);
}

void flight_fail(struct claas_switch *sw, struct flight *flight, int code, const char *text)
{
    struct flight ended = take(sw, flight);

    tell_requester(sw, &ended, code, text);
}

void flight_abort(struct claas_switch *sw, struct flight *flight, int code, const char *text)
{
    struct flight ended = *flight;

    flight_cancel(sw, flight);
    tell_requester(sw, &ended, code, text);
}

void flight_cancel(struct claas_switch *sw, struct flight *flight)
{
    struct flight ended = take(sw, flight);
    struct parcel parcel;

    parcel_init(&parcel, CLAAS_KIND_CANCEL, ended.type, ended.key.correlation);
    parcel.header.epoch = ended.epoch;
    memcpy(parcel.header.trace_id, ended.trace_id, sizeof(ended.trace_id));
    switch_send(sw, ended.receiver, ended.receiver_name, ended.key.requester, "local", &parcel);
}

void flights_fail_of(struct claas_switch *sw, struct peer *receiver, const char *receiver_name,
                     int code, const char *text)
{
    struct flight *flight = LIST_FIRST(&receiver->asked_of);

    while (flight) {
        struct flight *next = LIST_NEXT(flight, by_receiver);

        if (!receiver_name || strcmp(flight->receiver_name, receiver_name) == 0)
            flight_fail(sw, flight, code, text);
        flight = next;
    }
}

void flights_cancel_by(struct claas_switch *sw, struct peer *requester, const char *requester_name)
{
    struct flight *flight = LIST_FIRST(&requester->asked);

    while (flight) {
        struct flight *next = LIST_NEXT(flight, by_requester);

        if (!requester_name || strcmp(flight->key.requester, requester_name) == 0)
            flight_cancel(sw, flight);
        flight = next;
    }
}

/* Actors and nodes watch their own deadlines and cancel; a client may be a script that does not. */
static void expire(struct claas_switch *sw, struct flight *flight)
{
    if (flight->requester->kind == PEER_CLIENT)
        flight_abort(sw, flight, CLAAS_ERR_DEADLINE, "no answer in time");
    else
        flight_free(sw, flight);
}

/* Collected first: expiring changes the table that is being walked. */
void flights_expire(struct claas_switch *sw, int64_t now_ms)
{
    struct flight *late[1024];
    size_t count;

    do {
        struct flight *flight = zhashx_first(sw->flights);

        for (count = 0; flight && count < CLAAS_COUNT(late); flight = zhashx_next(sw->flights)) {
            int64_t grace = flight->requester->kind == PEER_CLIENT ? 0 : 1000;

            if (flight->deadline_ms + grace <= now_ms)
                late[count++] = flight;
        }
        for (size_t i = 0; i < count; i++)
            expire(sw, late[i]);
    } while (count == CLAAS_COUNT(late));
}
