/* The guard at the door: refuses requests that two HTTP parsers may read differently.
 *
 * libmicrohttpd 0.9.75 accepts a Content-Length beside a Transfer-Encoding, two different
 * Content-Lengths, "Transfer-Encoding: xchunked", and a blank before the colon (the header is then
 * not recognised); behind a proxy each of them smuggles a second request in the body of the first.
 * Here they are refused before a byte of the body is read (RFC 9112, sections 3.2, 5.1, 6.1-6.3).
 * Pure: no sockets. */
#ifndef CLAAS_BRIDGE_HTTP_GUARD_H
#define CLAAS_BRIDGE_HTTP_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What is known after the headers seen so far. Start with {0}. */
struct http_guard {
    int hosts, lengths, encodings;
    const char *reason;      /* first thing that is wrong, or NULL */
    uint64_t content_length; /* if lengths == 1 */
};

/* Once for every header line. */
void http_guard_header(struct http_guard *guard, const char *name, size_t name_length,
                       const char *value, size_t value_length);
/* After the last one: NULL, or the sentence for a 400. `version` is "HTTP/1.1". */
const char *http_guard_verdict(const struct http_guard *guard, const char *version);
/* False if the raw request target holds control characters, blanks or an escaped NUL (which would
 * cut the decoded path). */
bool http_guard_target_ok(const char *target);
/* How much of a Host header's value is the name: its port and the dot of the root are not. */
size_t http_guard_name_length(const char *host);
/* Whether a Host is that name (each with or without a port); is localhost or a name under it, which
 * browsers resolve to this machine (RFC 6761); is an IPv4 or [IPv6] address. */
bool http_guard_host_is(const char *host, const char *name);
bool http_guard_host_is_local(const char *host);
bool http_guard_host_is_address(const char *host);
/* True if the request has a body (or says so). */
bool http_guard_has_body(const struct http_guard *guard);

#endif
