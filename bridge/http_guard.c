/* The guard at the door: see http_guard.h. */
#include "http_guard.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

#define LENGTH_DIGITS_MAX 18 /* fits 63 bits */

/* tchar of RFC 9110, section 5.6.2. */
static bool is_token_char(unsigned char c)
{
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
           (c != 0 && strchr("!#$%&'*+-.^_`|~", c));
}

static bool is_token(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        if (!is_token_char((unsigned char)text[i]))
            return false;
    }
    return length > 0;
}

static bool is_field_value(const char *text, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)text[i];

        if ((c < 0x20 && c != '\t') || c == 0x7f)
            return false;
    }
    return true;
}

static bool is_name(const char *name, size_t length, const char *wanted)
{
    return strlen(wanted) == length && strncasecmp(name, wanted, length) == 0;
}

static void refuse(struct http_guard *guard, const char *reason)
{
    if (!guard->reason)
        guard->reason = reason;
}

static void take_length(struct http_guard *guard, const char *value, size_t length)
{
    uint64_t number = 0;

    if (length == 0 || length > LENGTH_DIGITS_MAX)
        refuse(guard, "Content-Length is not a number");
    for (size_t i = 0; i < length && i < LENGTH_DIGITS_MAX; i++) {
        if (value[i] < '0' || value[i] > '9')
            refuse(guard, "Content-Length is not a number");
        number = number * 10 + (uint64_t)(value[i] - '0');
    }
    guard->content_length = number;
    if (++guard->lengths > 1)
        refuse(guard, "more than one Content-Length");
}

static void take_encoding(struct http_guard *guard, const char *value, size_t length)
{
    if (!is_name(value, length, "chunked"))
        refuse(guard, "Transfer-Encoding other than chunked");
    if (++guard->encodings > 1)
        refuse(guard, "more than one Transfer-Encoding");
}

static void take_host(struct http_guard *guard, const char *value, size_t length)
{
    for (size_t i = 0; i < length; i++) {
        if (strchr(" \t,/?#@\\", value[i]))
            refuse(guard, "malformed Host");
    }
    if (++guard->hosts > 1)
        refuse(guard, "more than one Host");
}

void http_guard_header(struct http_guard *guard, const char *name, size_t name_length,
                       const char *value, size_t value_length)
{
    if (!is_token(name, name_length)) {
        refuse(guard, "malformed header name");
        return;
    }
    if (!is_field_value(value, value_length))
        refuse(guard, "control character in a header");
    if (is_name(name, name_length, "content-length"))
        take_length(guard, value, value_length);
    else if (is_name(name, name_length, "transfer-encoding"))
        take_encoding(guard, value, value_length);
    else if (is_name(name, name_length, "host"))
        take_host(guard, value, value_length);
}

const char *http_guard_verdict(const struct http_guard *guard, const char *version)
{
    bool old = strcmp(version, "HTTP/1.0") == 0;

    if (guard->reason)
        return guard->reason;
    if (!old && strcmp(version, "HTTP/1.1") != 0)
        return "unsupported HTTP version";
    if (guard->lengths && guard->encodings)
        return "both Content-Length and Transfer-Encoding";
    if (old && guard->encodings)
        return "Transfer-Encoding in HTTP/1.0";
    if (!old && guard->hosts != 1)
        return "no Host";
    return NULL;
}

bool http_guard_target_ok(const char *target)
{
    for (const char *c = target; *c; c++) {
        if ((unsigned char)*c <= 0x20 || *c == 0x7f || strncmp(c, "%00", 3) == 0)
            return false;
    }
    return target[0] != '\0';
}

size_t http_guard_name_length(const char *host)
{
    size_t length = strcspn(host, host[0] == '[' ? "]" : ":");

    if (host[length] == ']')
        return length + 1;
    return length > 0 && host[length - 1] == '.' ? length - 1 : length;
}

bool http_guard_host_is(const char *host, const char *name)
{
    size_t length = http_guard_name_length(host);

    return length == http_guard_name_length(name) && strncasecmp(host, name, length) == 0;
}

bool http_guard_host_is_local(const char *host)
{
    size_t length = http_guard_name_length(host), tail = strlen("localhost");

    return length >= tail && strncasecmp(host + length - tail, "localhost", tail) == 0 &&
           (length == tail || (length > tail + 1 && host[length - tail - 1] == '.'));
}

bool http_guard_host_is_address(const char *host)
{
    struct in6_addr address;
    char text[INET6_ADDRSTRLEN];
    size_t length = http_guard_name_length(host);
    bool is_v6 = length > 1 && host[0] == '[' && host[length - 1] == ']';

    if (length >= sizeof(text) + 2 * is_v6)
        return false;
    snprintf(text, sizeof(text), "%.*s", (int)(length - 2 * is_v6), host + is_v6);
    return inet_pton(is_v6 ? AF_INET6 : AF_INET, text, &address) == 1;
}

bool http_guard_has_body(const struct http_guard *guard)
{
    return guard->encodings > 0 || (guard->lengths > 0 && guard->content_length > 0);
}
