/* The listening socket: address syntax, the loopback rule, bind. */
#ifndef CLAAS_BRIDGE_LISTEN_H
#define CLAAS_BRIDGE_LISTEN_H

#include <stddef.h>

/* Whether `address` is well formed (else INVALID) and may be bound (else DENIED). */
int listen_check(const char *address);
/* Whether `address` can be bound now; it is let go again. */
int listen_try(const char *address);
/* `address` is "127.0.0.1:8080", "[::1]:8080" or "localhost:8080"; `port_hint` > 0 replaces port 0.
 * INVALID: syntax; DENIED: not a loopback address; CONFLICT: taken. */
int listen_open(const char *address, int port_hint, int backlog, int *ret_fd, int *ret_port);
/* Raises this process's limit of open descriptors, as far as allowed, to hold `connections`. */
void listen_raise_descriptors(size_t connections);

#endif
