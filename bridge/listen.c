/* The listening socket: see listen.h. Without keys everyone who reaches the port is the one user
 * there is, so nothing but loopback may be bound. */
#include "listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/log.h"

#define OTHER_DESCRIPTORS 256 /* files, pipes and sockets of everything but HTTP */

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

static int parse_port(const char *text, const char *whole, int *ret)
{
    char *end;
    long port;

    errno = 0;
    port = strtol(text, &end, 10);
    if (errno || end == text || *end || port < 0 || port > 65535 || text[0] == '+' ||
        text[0] == '-')
        return claas_fail(CLAAS_ERR_INVALID, "listen: '%s' has no port from 0 to 65535", whole);
    *ret = (int)port;
    return 0;
}

static int parse(const char *text, union address *address, int *ret_port)
{
    char host[64];
    const char *colon = strrchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : 0;
    int rc;

    memset(address, 0, sizeof(*address));
    if (!colon || length == 0 || length >= sizeof(host))
        return claas_fail(CLAAS_ERR_INVALID, "listen: '%s' is not ADDRESS:PORT", text);
    rc = parse_port(colon + 1, text, ret_port);
    if (rc < 0)
        return rc;
    snprintf(host, sizeof(host), "%.*s", (int)length, text);
    if (strcmp(host, "localhost") == 0)
        snprintf(host, sizeof(host), "127.0.0.1");
    if (host[0] == '[' && host[length - 1] == ']') {
        host[length - 1] = '\0';
        if (inet_pton(AF_INET6, host + 1, &address->v6.sin6_addr) == 1) {
            address->v6.sin6_family = AF_INET6;
            return 0;
        }
    } else if (inet_pton(AF_INET, host, &address->v4.sin_addr) == 1) {
        address->v4.sin_family = AF_INET;
        return 0;
    }
    return claas_fail(CLAAS_ERR_INVALID,
                      "listen: '%s' is no IPv4 address, [IPv6] address or localhost", host);
}

static bool is_loopback(const union address *address)
{
    if (address->any.sa_family == AF_INET6)
        return IN6_IS_ADDR_LOOPBACK(&address->v6.sin6_addr);
    return ntohl(address->v4.sin_addr.s_addr) >> 24 == 127;
}

/* An address that may be bound. */
static int parse_allowed(const char *text, union address *address, int *ret_port)
{
    int rc = parse(text, address, ret_port);

    if (rc == 0 && !is_loopback(address))
        return claas_fail(CLAAS_ERR_DENIED,
                          "listen: %s is not a loopback address; without keys only 127.0.0.1 and "
                          "[::1] may be bound. Put a proxy that authenticates in front",
                          text);
    return rc;
}

int listen_check(const char *text)
{
    union address address;
    int port;

    return parse_allowed(text, &address, &port);
}

static int fail_bind(int fd, const char *text)
{
    int code = errno;

    close(fd);
    if (code == EADDRINUSE)
        return claas_fail(CLAAS_ERR_CONFLICT, "listen: %s is in use by another program", text);
    errno = code;
    return claas_fail_errno("listen: %s", text);
}

/* A socket that has the address, and does not listen yet. */
static int bind_socket(const char *text, int port_hint, int *ret_fd)
{
    union address address;
    socklen_t size;
    int port = 0, fd, yes = 1;
    int rc = parse_allowed(text, &address, &port);

    if (rc < 0)
        return rc;
    if (port == 0 && port_hint > 0)
        port = port_hint;
    if (address.any.sa_family == AF_INET6)
        address.v6.sin6_port = htons((uint16_t)port);
    else
        address.v4.sin_port = htons((uint16_t)port);
    size = address.any.sa_family == AF_INET6 ? sizeof(address.v6) : sizeof(address.v4);
    fd = socket(address.any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return claas_fail_errno("listen: socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    if (bind(fd, &address.any, size) < 0)
        return fail_bind(fd, text);
    *ret_fd = fd;
    return 0;
}

int listen_try(const char *text)
{
    int fd = -1, rc = bind_socket(text, 0, &fd);

    if (rc == 0)
        close(fd);
    return rc;
}

int listen_open(const char *text, int port_hint, int backlog, int *ret_fd, int *ret_port)
{
    union address address;
    socklen_t size = sizeof(address);
    int fd = -1, rc = bind_socket(text, port_hint, &fd);

    if (rc < 0)
        return rc;
    if (listen(fd, backlog) < 0)
        return fail_bind(fd, text);
    getsockname(fd, &address.any, &size);
    *ret_port =
        ntohs(address.any.sa_family == AF_INET6 ? address.v6.sin6_port : address.v4.sin_port);
    *ret_fd = fd;
    return 0;
}

void listen_raise_descriptors(size_t connections)
{
    rlim_t wanted = connections + OTHER_DESCRIPTORS;
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= wanted)
        return;
    limit.rlim_cur = wanted < limit.rlim_max ? wanted : limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur < wanted)
        claas_warning("http.max_connections is %zu, but only %zu descriptors may be open",
                      connections, (size_t)limit.rlim_cur);
}
