/* The 64-byte header: fixed offsets, network byte order, no pointers and no allocation.
 *
 * Encoder and decoder are the same list of fields and widths in wire order: change both together.
 * Bytes 0-3 (signature, version, kind) and 8-15 (correlation) stay where they are in every later
 * version: that is what lets an old peer answer a new one with VERSION and the right request. */
#include "claas/message.h"

#include "claas/err.h"

#include <string.h>

static uint8_t *put(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = bytes - 1; i >= 0; i--) {
        at[i] = (uint8_t)value;
        value >>= 8;
    }
    return at + bytes;
}

static uint64_t take(const uint8_t **at, int bytes)
{
    uint64_t value = 0;

    for (int i = 0; i < bytes; i++)
        value = value << 8 | (*at)[i];
    *at += bytes;
    return value;
}

void claas_header_encode(const struct claas_header *header, uint8_t bytes[CLAAS_HEADER_BYTES])
{
    uint8_t *at = bytes;

    at = put(at, CLAAS_SIGNATURE, 2);
    at = put(at, header->version, 1);
    at = put(at, header->kind, 1);
    at = put(at, header->type, 2);
    at = put(at, header->codec, 1);
    at = put(at, header->flags, 1);
    at = put(at, header->correlation, 8);
    at = put(at, header->budget_ms, 4);
    at = put(at, header->link_seq, 4);
    memcpy(at, header->trace_id, sizeof(header->trace_id));
    at += sizeof(header->trace_id);
    memcpy(at, header->span_id, sizeof(header->span_id));
    at += sizeof(header->span_id);
    at = put(at, header->epoch, 8);
    at = put(at, header->attempt, 2);
    at = put(at, header->credit, 2);
    put(at, header->body_len, 4);
}

int claas_header_decode(const uint8_t *bytes, size_t length, struct claas_header *ret)
{
    const uint8_t *at = bytes;

    if (length != CLAAS_HEADER_BYTES)
        return claas_fail(CLAAS_ERR_FORMAT, "the header has %zu bytes, it must have %d", length,
                          CLAAS_HEADER_BYTES);
    if (take(&at, 2) != CLAAS_SIGNATURE)
        return claas_fail(CLAAS_ERR_FORMAT, "the header does not begin with the signature %04X",
                          CLAAS_SIGNATURE);
    ret->version = (uint8_t)take(&at, 1);
    ret->kind = (uint8_t)take(&at, 1);
    ret->type = (uint16_t)take(&at, 2);
    ret->codec = (uint8_t)take(&at, 1);
    ret->flags = (uint8_t)take(&at, 1);
    ret->correlation = take(&at, 8);
    ret->budget_ms = (uint32_t)take(&at, 4);
    ret->link_seq = (uint32_t)take(&at, 4);
    memcpy(ret->trace_id, at, sizeof(ret->trace_id));
    at += sizeof(ret->trace_id);
    memcpy(ret->span_id, at, sizeof(ret->span_id));
    at += sizeof(ret->span_id);
    ret->epoch = take(&at, 8);
    ret->attempt = (uint16_t)take(&at, 2);
    ret->credit = (uint16_t)take(&at, 2);
    ret->body_len = (uint32_t)take(&at, 4);
    if (ret->version != CLAAS_PROTOCOL_VERSION)
        return claas_fail(CLAAS_ERR_VERSION, "protocol version %u, this peer speaks %d",
                          ret->version, CLAAS_PROTOCOL_VERSION);
    return 0;
}
