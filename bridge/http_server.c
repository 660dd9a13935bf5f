/* The HTTP server: see http_server.h. */
#include "http_server.h"

#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "http_guard.h"
#include "listen.h"
#include "request.h"

#define CONNECTION_MEMORY (32 * 1024) /* headers and one read buffer; more gave no speed */
#define BACKLOG           1024
#define PUMP_ROUNDS       16
/* Should a wake-up be lost after all, it costs this long and not for ever. */
#define TIMER_CAP_MS 250
#define SWEEP_MS     1000
/* How long a body may still take to arrive when the server ends. */
#define DRAIN_BODY_MS 3000
#define CLOSE_WAIT    8 /* TCP_CLOSE_WAIT of <netinet/tcp.h>, which does not go with <linux/tcp.h> */

/* Tags of the outer epoll set; larger values are peers. */
enum { TAG_DAEMON, TAG_TIMER, TAG_PEERS };

/* --- the pump --- */

static void arm_timer(const struct http_server *server, int64_t delay_ms)
{
    struct itimerspec spec = {0};

    if (delay_ms >= 0) {
        spec.it_value.tv_sec = delay_ms / 1000;
        spec.it_value.tv_nsec = delay_ms % 1000 * 1000000 + 1; /* 0 would disarm it */
    }
    timerfd_settime(server->timer_fd, 0, &spec, NULL);
}

void http_server_pump(struct http_server *server)
{
    MHD_UNSIGNED_LONG_LONG wait_ms = 0;
    bool timed = false;
    int rounds = 0;

    if (!server->daemon)
        return;
    if (server->pumping) {
        server->again = true;
        return;
    }
    server->pumping = true;
    do {
        server->again = false;
        MHD_run(server->daemon);
        timed = MHD_get_timeout(server->daemon, &wait_ms) == MHD_YES;
    } while (((timed && wait_ms == 0) || server->again) && ++rounds < PUMP_ROUNDS);
    server->pumping = false;
    if (rounds == PUMP_ROUNDS)
        arm_timer(server, 0); /* the actor's other work comes first */
    else if (timed && wait_ms < TIMER_CAP_MS)
        arm_timer(server, (int64_t)wait_ms);
    else
        arm_timer(server, server->peers ? TIMER_CAP_MS : -1);
}

static void outer_readable(void *self, int fd)
{
    struct http_server *server = self;
    struct epoll_event events[64];
    uint64_t expirations;
    int count = epoll_wait(fd, events, (int)CLAAS_COUNT(events), 0);

    for (int i = 0; i < count; i++) {
        struct peer *peer = server->peers;

        if (events[i].data.u64 == TAG_TIMER &&
            read(server->timer_fd, &expirations, sizeof(expirations)) < 0 && errno != EAGAIN)
            claas_warning("timer: %s", strerror(errno));
        if (events[i].data.u64 < TAG_PEERS)
            continue;
        while (peer && peer->id != events[i].data.u64)
            peer = peer->next;
        if (peer && peer->request)
            request_gone(peer->request);
    }
    http_server_pump(server);
}

static int outer_add(const struct http_server *server, int fd, uint32_t events, uint64_t tag)
{
    struct epoll_event event = {.events = events, .data.u64 = tag};

    if (epoll_ctl(server->outer, EPOLL_CTL_ADD, fd, &event) < 0)
        return claas_fail_errno("epoll_ctl");
    return 0;
}

/* --- connections --- */

void peer_watch(struct peer *peer)
{
    /* A half-closed connection counts as gone, as most proxies have it. */
    if (!peer->watched)
        peer->watched = outer_add(peer->server, peer->fd, EPOLLRDHUP | EPOLLONESHOT, peer->id) == 0;
}

void peer_unwatch(struct peer *peer)
{
    if (peer->watched)
        epoll_ctl(peer->server->outer, EPOLL_CTL_DEL, peer->fd, NULL);
    peer->watched = false;
}

static uint64_t bytes_received(int fd)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof(info);

    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) < 0)
        return 0;
    return info.tcpi_bytes_received;
}

void peer_set_phase(struct peer *peer, enum peer_phase phase)
{
    const struct http_server *server = peer->server;
    int64_t limit_ms = 0;

    peer->phase = phase;
    if (phase == PEER_HEADERS)
        limit_ms = server->header_ms;
    else if (phase == PEER_BODY)
        limit_ms = server->body_ms;
    else if (phase == PEER_IDLE)
        limit_ms = server->idle_ms;
    peer->deadline_ms = limit_ms ? claas_clock_ms() + limit_ms : 0;
    if (phase == PEER_IDLE)
        peer->bytes_received = bytes_received(peer->fd);
}

static struct peer *peer_of(struct MHD_Connection *connection)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

    return info ? info->socket_context : NULL;
}

static void peer_open(struct http_server *server, struct MHD_Connection *connection, void **context)
{
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct peer *peer = CLAAS_NEW(struct peer);

    *context = peer;
    if (!peer) /* its first request will be closed */
        return;
    peer->server = server;
    peer->fd = info->connect_fd;
    peer->id = TAG_PEERS + ++server->last_peer;
    peer->next = server->peers;
    peer->link = &server->peers;
    if (peer->next)
        peer->next->link = &peer->next;
    server->peers = peer;
    server->peer_count++;
    peer_set_phase(peer, PEER_HEADERS);
}

static void peer_close(struct peer *peer)
{
    peer_unwatch(peer);
    *peer->link = peer->next;
    if (peer->next)
        peer->next->link = peer->link;
    peer->server->peer_count--;
    free(peer);
}

static void connection_changed(void *arg, struct MHD_Connection *connection, void **context,
                               enum MHD_ConnectionNotificationCode code)
{
    struct http_server *server = arg;

    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        peer_open(server, connection, context);
        return;
    }
    if (*context)
        peer_close(*context);
    *context = NULL;
    /* At its connection limit the daemon takes the listening socket out of its epoll set and puts
     * it back at the start of the next MHD_run only: without this one it may never accept again. */
    server->again = true;
}

/* The client has closed its side and all it sent was read. When the close came together with the
 * last data, the daemon's edge-triggered set never tells of it. */
static bool has_ended(int fd)
{
    struct tcp_info info = {0};
    socklen_t length = sizeof(info);
    int unread = 0;

    return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 &&
           info.tcpi_state == CLOSE_WAIT && ioctl(fd, FIONREAD, &unread) == 0 && unread == 0;
}

/* Ends connections that are past their deadline. They are shut down, not closed: the descriptor is
 * the daemon's. */
static void sweep(void *self, void *arg)
{
    struct http_server *server = arg;
    int64_t now = claas_clock_ms();

    (void)self;
    for (struct peer *peer = server->peers; peer; peer = peer->next) {
        if (peer->phase == PEER_IDLE && bytes_received(peer->fd) != peer->bytes_received)
            peer_set_phase(peer, PEER_HEADERS);
        if (peer->deadline_ms && (now >= peer->deadline_ms || has_ended(peer->fd))) {
            shutdown(peer->fd, SHUT_RDWR);
            peer->deadline_ms = 0;
        }
    }
    server->sweep_timer = claas_actor_timer(server->actor, server->sweep_ms, sweep, server);
    http_server_pump(server);
}

/* --- callbacks of the daemon --- */

static void *target_seen(void *arg, const char *target, struct MHD_Connection *connection)
{
    struct peer *peer = peer_of(connection);

    (void)arg;
    if (peer) {
        peer->bad_target = !http_guard_target_ok(target);
        peer->target_end = target + strlen(target);
        if (peer->phase == PEER_IDLE)
            peer_set_phase(peer, PEER_HEADERS);
    }
    return NULL; /* the request begins when its headers are complete */
}

static enum MHD_Result accessed(void *arg, struct MHD_Connection *connection, const char *url,
                                const char *method, const char *version, const char *data,
                                size_t *length, void **context)
{
    struct request *request = *context;
    struct peer *peer = peer_of(connection);

    if (!peer)
        return MHD_NO;
    if (!request)
        return request_begin(arg, peer, connection, url, method, version,
                             (struct request **)context);
    if (*length > 0) {
        size_t taken = *length;

        *length = 0;
        return request_take_body(request, data, taken);
    }
    return request_work(request);
}

static void completed(void *arg, struct MHD_Connection *connection, void **context,
                      enum MHD_RequestTerminationCode code)
{
    struct request *request = *context;

    (void)arg;
    (void)connection;
    *context = NULL;
    if (request)
        request_end(request, code == MHD_REQUEST_TERMINATED_COMPLETED_OK);
}

static void daemon_logs(void *arg, const char *format, va_list values)
    __attribute__((format(printf, 2, 0)));
static void daemon_logs(void *arg, const char *format, va_list values)
{
    char line[512];
    int length = vsnprintf(line, sizeof(line), format, values);

    (void)arg;
    while (length > 0 && length < (int)sizeof(line) && line[length - 1] == '\n')
        line[--length] = '\0';
    claas_debug("http: %s", line); /* mostly what clients do wrong */
}

/* --- life --- */

static unsigned seconds_up(int64_t ms)
{
    return (unsigned)((ms + 999) / 1000);
}

static int start_daemon(struct http_server *server)
{
    const claas_config_t *config = server->config;
    const union MHD_DaemonInfo *info;
    int64_t longest = server->header_ms;

    if (server->body_ms > longest)
        longest = server->body_ms;
    if (server->idle_ms > longest)
        longest = server->idle_ms;
    /* The daemon's own time-out is for inactivity only; it ends clients that stop reading. */
    server->daemon = MHD_start_daemon(
        MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, accessed,
        server, MHD_OPTION_EXTERNAL_LOGGER, daemon_logs, NULL, MHD_OPTION_LISTEN_SOCKET,
        server->listen_fd, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)claas_config_int(config, "http.max_connections"),
        MHD_OPTION_PER_IP_CONNECTION_LIMIT,
        (unsigned)claas_config_int(config, "http.max_connections_per_ip"),
        MHD_OPTION_CONNECTION_TIMEOUT, seconds_up(longest), MHD_OPTION_CONNECTION_MEMORY_LIMIT,
        (size_t)CONNECTION_MEMORY, MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1,
        MHD_OPTION_STRICT_FOR_CLIENT, 1, MHD_OPTION_URI_LOG_CALLBACK, target_seen, NULL,
        MHD_OPTION_NOTIFY_COMPLETED, completed, NULL, MHD_OPTION_NOTIFY_CONNECTION,
        connection_changed, server, MHD_OPTION_END);
    if (!server->daemon)
        return claas_fail(CLAAS_ERR_INTERNAL, "the HTTP server did not start");
    info = MHD_get_daemon_info(server->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    return outer_add(server, info->epoll_fd, EPOLLIN, TAG_DAEMON);
}

static void read_limits(struct http_server *server)
{
    const claas_config_t *config = server->config;
    int64_t shortest;

    server->max_body = claas_config_int(config, "http.max_body");
    server->max_import = claas_config_int(config, "http.max_import");
    server->max_inflight = claas_config_int(config, "http.max_inflight");
    server->max_inflight_per_user = claas_config_int(config, "http.max_inflight_per_user");
    server->header_ms = claas_config_int(config, "http.header_timeout");
    server->body_ms = claas_config_int(config, "http.body_timeout");
    server->idle_ms = claas_config_int(config, "http.idle_timeout");
    shortest = server->header_ms < server->body_ms ? server->header_ms : server->body_ms;
    shortest = server->idle_ms < shortest ? server->idle_ms : shortest;
    server->sweep_ms = shortest / 4 < SWEEP_MS ? shortest / 4 : SWEEP_MS;
}

int http_server_start(struct http_server *server, claas_actor_t *actor,
                      const claas_config_t *config, int port_hint)
{
    int rc;

    *server = (struct http_server){
        .actor = actor, .config = config, .outer = -1, .timer_fd = -1, .listen_fd = -1};
    read_limits(server);
    rc = listen_open(claas_config_string(config, "listen"), port_hint, BACKLOG, &server->listen_fd,
                     &server->port);
    if (rc < 0)
        return rc;
    listen_raise_descriptors((size_t)claas_config_int(config, "http.max_connections"));
    server->outer = epoll_create1(EPOLL_CLOEXEC);
    server->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (server->outer < 0 || server->timer_fd < 0)
        return claas_fail_errno("HTTP server");
    rc = outer_add(server, server->timer_fd, EPOLLIN, TAG_TIMER);
    if (rc == 0)
        rc = start_daemon(server);
    if (rc == 0)
        rc = claas_actor_watch(actor, server->outer, outer_readable);
    if (rc == 0)
        sweep(NULL, server);
    return rc;
}

static void stop_accepting(struct http_server *server)
{
    if (server->daemon)
        MHD_quiesce_daemon(server->daemon);
    if (server->listen_fd >= 0)
        close(server->listen_fd);
    server->listen_fd = -1;
}

bool http_server_drain(struct http_server *server)
{
    struct request *next;
    int64_t body_until = claas_clock_ms() + DRAIN_BODY_MS;
    bool first = !server->draining;

    server->draining = true;
    stop_accepting(server);
    for (struct request *request = server->requests; request; request = next) {
        next = request->next;
        request_drain(request);
    }
    for (struct peer *peer = server->peers; peer; peer = peer->next) {
        if (!peer->request && peer->deadline_ms) {
            shutdown(peer->fd, SHUT_RDWR);
            peer->deadline_ms = 0;
        }
        if (first && peer->phase == PEER_BODY && peer->deadline_ms > body_until)
            peer->deadline_ms = body_until;
    }
    http_server_pump(server);
    return server->requests == NULL;
}

void http_server_stop(struct http_server *server)
{
    struct request *next;

    if (server->sweep_timer > 0)
        claas_actor_timer_cancel(server->actor, server->sweep_timer);
    stop_accepting(server);
    /* Stopping a daemon that has suspended connections breaks its contract. */
    for (struct request *request = server->requests; request; request = next) {
        next = request->next;
        request_gone(request);
    }
    for (int i = 0; i < 4; i++)
        http_server_pump(server);
    if (server->outer >= 0 && server->daemon)
        claas_actor_unwatch(server->actor, server->outer);
    if (server->daemon)
        MHD_stop_daemon(server->daemon);
    server->daemon = NULL;
    if (server->timer_fd >= 0)
        close(server->timer_fd);
    if (server->outer >= 0)
        close(server->outer);
    server->timer_fd = server->outer = -1;
}
