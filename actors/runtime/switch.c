/* The switch: sockets, thread, loop.
 *
 * An inner ROUTER (inproc) has the actors of this process. The main node also has an outer ROUTER
 * (ipc) for clients and nodes, and an XPUB for events; a node that joins another one has a DEALER
 * to it instead. Every ROUTER is MANDATORY (a plain one drops silently), never waits (SNDTIMEO and
 * RCVTIMEO 0), and is drained at most 64 messages or 2 ms at a time, so that neither side starves
 * the other or the timers. */
#include "switch.h"

#include "switch_internal.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/log.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define OUTER_NAME "claas.ipc" /* of the socket in the data directory that others come by */

/* CZMQ would install handlers for SIGINT and SIGTERM, and print to stdout. */
static void set_up(void)
{
    setenv("ZSYS_SIGHANDLER", "false", 1);
    zsys_set_max_sockets(4096);
    zsys_init();
    zsys_handler_set(NULL);
    zsys_set_logstream(stderr);
}

void claas_zmq_setup(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, set_up);
}

const char *claas_switch_endpoint(const struct claas_switch *sw)
{
    return sw->endpoint;
}

/* --- drain ------------------------------------------------------------------------------------ */

int switch_drain(struct claas_switch *sw, zsock_t *socket, bool router, switch_take_fn *take)
{
    int64_t until = claas_clock_ns() + 2 * 1000000;
    struct parcel parcel;

    for (int i = 0; i < 64; i++) {
        int rc = parcel_receive(socket, router, &parcel);

        if (rc == 0)
            break;
        take(sw, &parcel, rc);
        parcel_done(&parcel);
        if (claas_clock_ns() > until)
            break;
    }
    switch_bury_dead(sw);
    return sw->stopping ? -1 : 0;
}

/* --- local actors ----------------------------------------------------------------------------- */

void switch_welcome(struct claas_switch *sw, struct peer *peer, int code, const char *text)
{
    struct parcel parcel;

    peer->hello_id = 0;
    parcel_init(&parcel, code < 0 ? CLAAS_KIND_ERR : CLAAS_KIND_WELCOME, 0, 0);
    if (code < 0 && parcel_pack_error(&parcel, code, text) < 0)
        return;
    switch_send(sw, peer, peer->name, SWITCH_NAME, "local", &parcel);
}

/* An actor says its name when it starts, and again when it can be called. The answer to the second
 * tells it, and its supervisor, that requests reach it from now on. */
static void take_hello(struct claas_switch *sw, struct peer *peer, const struct parcel *parcel)
{
    const char *name = parcel->address[0];
    struct route *old = route_find(sw, name);
    bool is_ready = parcel->header.flags & FLAG_READY;

    claas_copy_text(peer->name, sizeof(peer->name), name);
    if (old && old->peer != peer && old->peer->kind != PEER_ACTOR) {
        char text[2 * CLAAS_NAME_MAX + 64];

        snprintf(text, sizeof(text), "%s is an actor of node %s already", name, old->peer->name);
        claas_metric_add(CLAAS_METRIC_PEERS_REFUSED, 1);
        switch_welcome(sw, peer, CLAAS_ERR_EXISTS, text);
        return;
    }
    peer->incarnation = parcel->header.epoch;
    if (old && old->peer != peer)
        peer_bury(sw, old->peer);
    if (route_set(sw, name, peer, peer->incarnation, is_ready) < 0)
        claas_error("%s: %s", name, claas_error_text());
    if (sw->link)
        node_send_hello(sw);
    if (!is_ready)
        return;
    if (sw->link && atomic_load(&sw->joined))
        peer->hello_id = sw->hello_count; /* once main knows it, too */
    else
        switch_welcome(sw, peer, 0, NULL);
}

static void take_inner(struct claas_switch *sw, struct parcel *parcel, int rc)
{
    struct peer *peer = zhashx_lookup(sw->inner_peers, &parcel->peer);

    if (rc < 0) {
        claas_error("a broken message of a local actor: %s", claas_error_text());
        return;
    }
    if (!peer && parcel->header.kind == CLAAS_KIND_HELLO)
        peer = peer_new(sw, PEER_ACTOR, &parcel->peer);
    if (!peer)
        return;
    switch_note(sw, peer, &parcel->header);
    if (parcel->header.kind == CLAAS_KIND_HELLO) {
        take_hello(sw, peer, parcel);
    } else if (parcel->header.kind == CLAAS_KIND_BYE) {
        peer_bury(sw, peer);
        if (sw->link)
            node_send_hello(sw);
    } else {
        const char *principal = parcel->address[1][0] ? parcel->address[1] : "local";
        char text[CLAAS_NAME_MAX];

        claas_copy_text(text, sizeof(text), principal);
        switch_take(sw, peer, peer->name, text, parcel);
    }
}

static int on_inner(zloop_t *loop, zsock_t *socket, void *arg)
{
    return switch_drain(arg, socket, true, take_inner);
}

/* --- loop ------------------------------------------------------------------------------------- */

/* Subscriptions come in here; nothing is done with them, but they must be read. */
static int on_events(zloop_t *loop, zsock_t *socket, void *arg)
{
    zframe_t *frame;

    for (int i = 0; i < 64 && (frame = zframe_recv(socket)) != NULL; i++)
        zframe_destroy(&frame);
    return 0;
}

static int on_stop(zloop_t *loop, zmq_pollitem_t *item, void *arg)
{
    ((struct claas_switch *)arg)->stopping = true;
    return -1;
}

static int on_tick(zloop_t *loop, int timer, void *arg)
{
    struct claas_switch *sw = arg;
    int64_t now = claas_clock_ms();

    flights_expire(sw, now);
    if (sw->outer)
        outer_tick(sw, now);
    if (sw->link)
        node_tick(sw, now);
    switch_bury_dead(sw);
    return 0;
}

static int add_reader(struct claas_switch *sw, zsock_t *socket, zloop_reader_fn *fn)
{
    if (!socket)
        return 0;
    if (zloop_reader(sw->loop, socket, fn, sw) < 0)
        return claas_fail(CLAAS_ERR_INTERNAL, "the loop takes no reader");
    zloop_reader_set_tolerant(sw->loop, socket);
    return 0;
}

static int fill_loop(struct claas_switch *sw)
{
    zmq_pollitem_t stop = {NULL, sw->stop_fd, ZMQ_POLLIN, 0};
    int rc;

    sw->loop = zloop_new();
    if (!sw->loop)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    zloop_set_nonstop(sw->loop, true);
    if (zloop_poller(sw->loop, &stop, on_stop, sw) < 0 ||
        zloop_timer(sw->loop, TICK_MS, 0, on_tick, sw) < 0)
        return claas_fail(CLAAS_ERR_INTERNAL, "the loop takes no timer");
    zloop_poller_set_tolerant(sw->loop, &stop);
    rc = add_reader(sw, sw->inner, on_inner);
    if (rc == 0)
        rc = add_reader(sw, sw->outer, on_outer);
    if (rc == 0)
        rc = add_reader(sw, sw->events, on_events);
    if (rc == 0)
        rc = add_reader(sw, sw->link, on_link);
    return rc;
}

static void *run(void *arg)
{
    struct claas_switch *sw = arg;

    claas_log_thread_name(SWITCH_NAME);
    pthread_setname_np(pthread_self(), "claas-switch");
    if (sw->link)
        node_send_hello(sw);
    while (!sw->stopping) /* any signal ends zloop_start */
        zloop_start(sw->loop);
    switch_leave(sw);
    return NULL;
}

/* --- sockets ---------------------------------------------------------------------------------- */

static zsock_t *new_socket(int type, int hwm)
{
    zsock_t *socket = zsock_new(type);

    if (!socket)
        return NULL;
    zsock_set_sndtimeo(socket, 0);
    zsock_set_rcvtimeo(socket, 0);
    zsock_set_sndhwm(socket, hwm);
    zsock_set_rcvhwm(socket, hwm);
    zsock_set_linger(socket, 1000);
    if (type == ZMQ_ROUTER)
        zsock_set_router_mandatory(socket, 1);
    return socket;
}

/* What every socket that leaves the process has; all of it must be set before bind or connect. */
static void harden(zsock_t *socket)
{
    zsock_set_maxmsgsize(socket, CLAAS_MESSAGE_BYTES);
    zsock_set_heartbeat_ivl(socket, 1000);
    zsock_set_heartbeat_timeout(socket, 5000);
    zsock_set_heartbeat_ttl(socket, 6000);
    zsock_set_handshake_ivl(socket, 5000);
}

/* Binds with mode 0600 from the first instant on. */
static int bind_ipc(zsock_t *socket, const char *path)
{
    mode_t mask = umask(0177);
    int rc = zsock_bind(socket, "ipc://%s", path);
    int number = errno;

    umask(mask);
    if (rc < 0)
        return claas_fail(CLAAS_ERR_IO, "binding ipc://%s: %s", path, zmq_strerror(number));
    return 0;
}

/* libzmq's bind takes an ipc file away from whoever has it, so a lock says whether it is stale.
 * Nodes of one name would take the name from each other in turns: they have a lock, too. */
static int lock_data(const char *data, const char *name, int *ret_fd)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s.lock", data, name);

    if (!path)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    *ret_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (*ret_fd < 0)
        return claas_fail_errno("data: %s", path);
    if (flock(*ret_fd, LOCK_EX | LOCK_NB) < 0)
        return claas_fail(CLAAS_ERR_BUSY, "another server runs on %s (it holds %s)", data, path);
    return 0;
}

static int open_outer(struct claas_switch *sw)
{
    CLAAS_AUTO_FREE char *outer = claas_format("%s/" OUTER_NAME, sw->data);
    CLAAS_AUTO_FREE char *events = claas_format("%s/events.ipc", sw->data);
    size_t room = sizeof(((struct sockaddr_un *)0)->sun_path) - 1;

    if (!outer || !events)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    if (strlen(events) > room)
        return claas_fail(CLAAS_ERR_LIMIT,
                          "the path %s has %zu bytes, a socket's has at most %zu: use a shorter "
                          "data directory",
                          events, strlen(events), room);
    int rc = lock_data(sw->data, OUTER_NAME, &sw->lock_fd);
    if (rc == 0)
        rc = node_token(sw->data, true, sw->token);
    if (rc < 0)
        return rc;
    sw->outer = new_socket(ZMQ_ROUTER, OUTER_HWM);
    sw->events = new_socket(ZMQ_XPUB, 1000);
    if (!sw->outer || !sw->events)
        return claas_fail(CLAAS_ERR_IO, "no socket: %s", zmq_strerror(errno));
    harden(sw->outer);
    harden(sw->events);
    rc = bind_ipc(sw->outer, outer);
    return rc < 0 ? rc : bind_ipc(sw->events, events);
}

static int open_link(struct claas_switch *sw)
{
    char lock[CLAAS_NAME_MAX + 8];

    snprintf(lock, sizeof(lock), "node-%s", sw->node_name);
    int rc = lock_data(sw->data, lock, &sw->lock_fd);
    if (rc < 0)
        return rc;
    sw->upstream = peer_new(sw, PEER_UPSTREAM, NULL);
    sw->link = new_socket(ZMQ_DEALER, OUTER_HWM);
    if (!sw->upstream || !sw->link)
        return claas_fail(CLAAS_ERR_IO, "no socket: %s", zmq_strerror(errno));
    claas_copy_text(sw->upstream->name, CLAAS_NAME_MAX, "the other node");
    harden(sw->link);
    zsock_set_immediate(sw->link, 1); /* no connection: refuse now instead of queueing blindly */
    zsock_set_reconnect_ivl(sw->link, 100);
    zsock_set_reconnect_ivl_max(sw->link, 2000);
    if (zsock_connect(sw->link, "%s", sw->upstream_endpoint) < 0)
        return claas_fail(CLAAS_ERR_INVALID, "connect: '%s' is not an address: %s",
                          sw->upstream_endpoint, zmq_strerror(errno));
    return 0;
}

static int open_inner(struct claas_switch *sw)
{
    char hex[17];

    claas_random_hex(hex, 8);
    snprintf(sw->endpoint, sizeof(sw->endpoint), "inproc://claas-switch-%s", hex);
    /* The mailbox bounds what waits; the mark must not be met before. */
    sw->inner = new_socket(ZMQ_ROUTER, (int)sw->mailbox * 4 + 65536);
    if (!sw->inner)
        return claas_fail(CLAAS_ERR_IO, "no socket: %s", zmq_strerror(errno));
    if (zsock_bind(sw->inner, "%s", sw->endpoint) < 0)
        return claas_fail(CLAAS_ERR_IO, "binding %s: %s", sw->endpoint, zmq_strerror(errno));
    return 0;
}

/* --- birth and death -------------------------------------------------------------------------- */

int claas_switch_check_upstream(const char *endpoint)
{
    static const char scheme[] = "ipc://";
    bool is_ipc = strncmp(endpoint, scheme, strlen(scheme)) == 0;
    const char *path = is_ipc ? endpoint + strlen(scheme) : "";
    struct stat status;

    if (!path[0])
        return claas_fail(CLAAS_ERR_INVALID,
                          "connect: '%s' is not an address: ipc:// and the path of the server's "
                          "socket, as in ipc:///var/lib/claas/claas.ipc",
                          claas_quote(endpoint).text);
    if (strlen(path) >= sizeof(((struct sockaddr_un *)0)->sun_path))
        return claas_fail(CLAAS_ERR_INVALID, "connect: the path of a socket has at most %zu bytes",
                          sizeof(((struct sockaddr_un *)0)->sun_path) - 1);
    if (stat(path, &status) == 0 && !S_ISSOCK(status.st_mode))
        return claas_fail(CLAAS_ERR_INVALID, "connect: %s is not a socket", claas_quote(path).text);
    return 0;
}

int claas_switch_try(const claas_config_t *config)
{
    int fd = -1, rc;

    if (claas_config_string(config, "connect")[0])
        return 0;
    rc = lock_data(claas_config_string(config, "data"), OUTER_NAME, &fd);
    if (fd >= 0)
        close(fd);
    return rc;
}

static int read_config(struct claas_switch *sw, const claas_config_t *config)
{
    const char *connect = claas_config_string(config, "connect");
    const char *node_name = claas_config_string(config, "node_name");

    int rc = connect[0] ? claas_switch_check_upstream(connect) : 0;

    if (rc < 0)
        return rc;
    sw->mailbox = (size_t)claas_config_int(config, "runtime.mailbox");
    if (claas_copy_text(sw->data, sizeof(sw->data), claas_config_string(config, "data")) < 0)
        return claas_fail(CLAAS_ERR_LIMIT, "the data directory's path is too long");
    if (claas_copy_text(sw->upstream_endpoint, sizeof(sw->upstream_endpoint), connect) < 0)
        return claas_fail(CLAAS_ERR_LIMIT, "connect: too long");
    if (node_name[0] && !name_valid(node_name))
        return claas_fail(CLAAS_ERR_INVALID, "node_name: '%s' is not a name ([A-Za-z0-9._-])",
                          node_name);
    claas_copy_text(sw->node_name, sizeof(sw->node_name), node_name);
    if (connect[0] && !node_name[0]) /* by its roles: "trainer", "scheduler-trainer" */
        for (size_t i = 0; claas_config_list_at(config, "roles", i); i++) {
            size_t used = strlen(sw->node_name);

            snprintf(sw->node_name + used, sizeof(sw->node_name) - used, "%s%s", i ? "-" : "",
                     claas_config_list_at(config, "roles", i));
        }
    return 0;
}

static int start_thread(struct claas_switch *sw)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int number = pthread_create(&sw->thread, NULL, run, sw);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (number != 0)
        return claas_fail(CLAAS_ERR_NO_MEMORY, "no thread for the switch: %s", strerror(number));
    sw->running = true;
    return 0;
}

int claas_switch_joined(struct claas_switch *sw)
{
    char text[sizeof(sw->join_text)];

    if (!sw->link || atomic_load(&sw->joined))
        return 1;
    pthread_mutex_lock(&sw->join_lock);
    int refusal = sw->join_refusal;
    memcpy(text, sw->join_text, sizeof(text));
    pthread_mutex_unlock(&sw->join_lock);
    if (refusal == 0 || refusal == CLAAS_ERR_UNAVAILABLE)
        return 0;
    return claas_fail(refusal, "%s: %s", sw->upstream_endpoint, text);
}

const char *claas_switch_upstream(const struct claas_switch *sw)
{
    return sw->upstream_endpoint;
}

static int open_all(struct claas_switch *sw)
{
    int rc = switch_tables_new(sw);

    if (rc == 0)
        rc = claas_mkdir_all(sw->data);
    sw->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (rc == 0 && sw->stop_fd < 0)
        rc = claas_fail_errno("eventfd");
    if (rc == 0)
        rc = open_inner(sw);
    if (rc == 0)
        rc = sw->upstream_endpoint[0] ? open_link(sw) : open_outer(sw);
    if (rc == 0)
        rc = fill_loop(sw);
    return rc;
}

int claas_switch_new(const claas_config_t *config, struct claas_switch **ret)
{
    CLAAS_AUTO(claas_switch_free) struct claas_switch *sw = NULL;

    claas_zmq_setup();
    sw = CLAAS_NEW(struct claas_switch);
    if (!sw)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    sw->lock_fd = sw->stop_fd = -1;
    pthread_mutex_init(&sw->join_lock, NULL);
    sw->incarnation = claas_random_seed() | 1;
    sw->started_ms = claas_clock_ms();
    int rc = read_config(sw, config);
    if (rc == 0)
        rc = open_all(sw);
    if (rc == 0)
        rc = start_thread(sw);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(sw);
    return 0;
}

void claas_switch_free(struct claas_switch **pointer)
{
    struct claas_switch *sw = *pointer;
    uint64_t one = 1;

    if (!sw)
        return;
    *pointer = NULL;
    if (sw->running) {
        if (write(sw->stop_fd, &one, sizeof(one)) < 0)
            claas_error("eventfd: %s", strerror(errno));
        pthread_join(sw->thread, NULL);
    }
    zloop_destroy(&sw->loop);
    switch_tables_free(sw);
    zsock_destroy(&sw->outer);
    zsock_destroy(&sw->events);
    zsock_destroy(&sw->link);
    zsock_destroy(&sw->inner);
    if (sw->stop_fd >= 0)
        close(sw->stop_fd);
    if (sw->lock_fd >= 0)
        close(sw->lock_fd);
    pthread_mutex_destroy(&sw->join_lock);
    free(sw);
}
